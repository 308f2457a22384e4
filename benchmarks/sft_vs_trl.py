"""Supervised fine-tuning against TRL 1.16.0 on ragged rows: real tokens per second, and peak memory.

    D=../shared/data; python benchmarks/sft_vs_trl.py --model $D/models/imdb-gpt2-mini \\
        --dataset $D/alpaca/train.jsonl.gz --small-tokenizer $D/tokenizers/gpt2

A turn is one pass over --rows rows of Alpaca in --steps optimizer steps. TRL runs padded, with rows of like lengths
together, and packed without padding (bfd). Real tokens are those of prompts and outputs. Runs the given model, and one
of GPT-2 small's shape with its 50,257 tokens.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import versus  # noqa: E402

LENGTH = 512


def rows_of(config: dict) -> list[dict]:
    """Rows with prompt and completion."""
    from common.data import evenly, read_rows
    from examples.formats import alpaca

    return [alpaca(row) for row in evenly(read_rows(config["_dataset"], "--dataset"), config["rows"])]


def ours(config: dict, turns) -> None:
    """sft.py, stopped after each pass."""
    import sft

    counts, every = {"tokens": 0, "samples": 0}, config["steps"]
    batches = sft.micro_batches

    def counted(examples, *rest):
        counts["tokens"] += sum(len(example.prompt) + len(example.output) for example in examples)
        counts["samples"] += len(examples)
        return batches(examples, *rest)

    sft.micro_batches, sft.RunLog = counted, versus.stopped(sft.RunLog, turns, every, counts)
    sft.train(sft.Args(
        model=config["_model"], tokenizer=config["_tokenizer"], dataset="given", held_out=0.0, num_eval_prompts=0,
        dtype=config["_dtype"], max_length=LENGTH, epochs=10**4, batch_size=config["rows"] // every, eval_every=10**9,
        output_dir=tempfile.mkdtemp(), learning_rate=1e-5, **config["_ours"]), samples=rows_of(config))


def trl(config: dict, turns) -> None:
    """TRL's SFTTrainer, stopped after each epoch."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(config["_tokenizer"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(config["_model"], dtype=torch.float32)
    options, counts = dict(config["_trl"]), {"tokens": 0, "samples": 0}
    lines = config["rows"] // config["steps"]
    if config["peer"] == "packed":
        options |= dict(packing=True)
        lines = config["_lines"]
    else:
        options |= dict(train_sampling_strategy="group_by_length")
    micro = min(config["micro"], lines)

    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=Dataset.from_list(rows_of(config)),
        callbacks=[versus.stopped_epochs(turns, counts)],
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(), max_length=LENGTH, per_device_train_batch_size=micro,
            gradient_accumulation_steps=-(-lines // micro), num_train_epochs=10**4, report_to="none",
            save_strategy="no", logging_steps=10**6, disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
            learning_rate=1e-5, bf16=config["_dtype"] == "bfloat16", gradient_checkpointing=False,
            completion_only_loss=True, **options))
    collate = trainer.data_collator

    def counted(examples):
        counts["tokens"] += sum(len(example["input_ids"]) for example in examples)
        counts["samples"] += sum(len(example.get("seq_lengths", [0])) for example in examples)  # several of a line
        return collate(examples)

    trainer.data_collator = counted
    trainer.train()


def main():
    """Run and report."""
    flags = versus.parser(__doc__)
    flags.add_argument("--model", required=True, help="path of a GPT-2-like model of a few million parameters")
    flags.add_argument("--small-tokenizer", help="path of GPT-2's tokenizer, for the model of its shape")
    flags.add_argument("--dataset", required=True, help="Alpaca's rows")
    flags.add_argument("--rows", type=int, default=128)
    flags.add_argument("--steps", type=int, default=2, help="optimizer steps in a pass")
    flags.add_argument("--only", nargs="*", choices=("given", "gpt2-small", "padded", "packed"), default=[])
    flags.add_argument("--ours", default='{"micro_batch_size": 4}', help="JSON of flags for sft.py")
    flags.add_argument("--trl", default="{}", help="JSON of settings of SFTConfig")
    flags.add_argument("--trl-micro", type=int, default=1,
                       help="TRL's rows of a forward, padded, or lines, packed; 1 was its fastest on a CPU")
    args = flags.parse_args()
    from transformers import AutoConfig, AutoModelForCausalLM

    from common.data import pack
    from common.models import load_tokenizer

    results, folder = [], tempfile.mkdtemp()
    for name in ("given", "gpt2-small"):
        if {"given", "gpt2-small"} & set(args.only) and name not in args.only:
            continue
        path, words, count = args.model, args.model, args.rows
        if name == "gpt2-small":
            if not args.small_tokenizer:
                continue
            path, words, count = f"{folder}/gpt2-small", args.small_tokenizer, args.rows // 8
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**versus.gpt2_small())).save_pretrained(path)
        config, tokenizer = AutoConfig.from_pretrained(path), load_tokenizer(words)
        given = {"model": name, "rows": count, "steps": args.steps, "_model": path, "_tokenizer": words,
                 "_dataset": args.dataset, "_dtype": args.dtype, "_ours": json.loads(args.ours),
                 "_trl": json.loads(args.trl)}
        lengths = [[min(LENGTH, len(tokenizer(text)["input_ids"])) for text in (row["prompt"], row["prompt"]
                    + row["completion"] + tokenizer.eos_token)] for row in rows_of(given)]
        lines = len(pack([both[1] for both in lengths], LENGTH))
        flops = 3 * sum(versus.forward_flops(config, whole, whole - prompt, whole) for prompt, whole in lengths)
        for peer in ("padded", "packed"):
            if {"padded", "packed"} & set(args.only) and peer not in args.only:
                continue
            results.append(versus.compare(
                f"SFT {name}, TRL {peer}", {"ours": ours, "trl": trl},
                {**given, "peer": peer, "micro": args.trl_micro, "_lines": -(-lines // args.steps)}, pairs=args.pairs,
                threads=args.threads, dtype=args.dtype, flops=flops, near=("tokens",),
                alike=("samples", "updates") if peer == "padded" else ("samples",)))
    versus.report("sft_vs_trl", results, args.json)


if __name__ == "__main__":
    main()

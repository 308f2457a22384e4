"""Direct preference optimisation against TRL 1.16.0 on ragged pairs: pairs per second, and peak memory.

    D=../shared/data; python benchmarks/dpo_vs_trl.py --model $D/models/imdb-gpt2-mini \\
        --dataset $D/hh_rlhf/train.jsonl.gz --small-tokenizer $D/tokenizers/gpt2

A turn is one pass over --pairs-of-data pairs of HH in --steps optimizer steps, with the reference in memory. TRL pads
(its padding-free mode is switched off in 1.16); it shuffles, and has no batches of like lengths for DPO. Ours lets a
pair share its prompt. Runs the given model, and one of GPT-2 small's shape with its 50,257 tokens.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import versus  # noqa: E402

LENGTH = 512


def rows_of(config: dict) -> list[dict]:
    """Rows with prompt, chosen and rejected that both sides use whole."""
    from common.data import evenly, read_rows
    from common.models import load_tokenizer

    tokenizer = load_tokenizer(config["_tokenizer"])
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")}
            for row in evenly(read_rows(config["_dataset"], "--dataset"), 4 * config["rows"])]
    count = lambda row, side: len(tokenizer(row["prompt"] + row[side])["input_ids"])  # noqa: E731
    fits = [row for row in rows if row["chosen"] != row["rejected"]
            and max(count(row, "chosen"), count(row, "rejected")) < LENGTH - 1]
    return evenly(fits, config["rows"])


def ours(config: dict, turns) -> None:
    """dpo.py, stopped after each pass."""
    import dpo

    counts, every = {"samples": 0}, config["steps"]
    batches = dpo.pair_batches

    def counted(rows, *rest):
        counts["samples"] += len(rows)
        return batches(rows, *rest)

    dpo.pair_batches, dpo.RunLog = counted, versus.stopped(dpo.RunLog, turns, every, counts)
    dpo.train(dpo.Args(
        model=config["_model"], tokenizer=config["_tokenizer"], dataset="given", held_out=0.0, num_eval_prompts=0,
        dtype=config["_dtype"], max_length=LENGTH, epochs=10**4, batch_size=config["rows"] // every, eval_every=10**9,
        output_dir=tempfile.mkdtemp(), learning_rate=1e-6, **config["_ours"]), pairs=rows_of(config))


def trl(config: dict, turns) -> None:
    """TRL's DPOTrainer, stopped after each epoch."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(config["_tokenizer"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model, reference = (AutoModelForCausalLM.from_pretrained(config["_model"], dtype=torch.float32) for _ in range(2))
    counts, batch = {"samples": 0}, config["rows"] // config["steps"]
    micro = min(config["micro"], batch)

    trainer = DPOTrainer(
        model=model, ref_model=reference, processing_class=tokenizer, train_dataset=Dataset.from_list(rows_of(config)),
        callbacks=[versus.stopped_epochs(turns, counts)], args=DPOConfig(
            output_dir=tempfile.mkdtemp(), max_length=LENGTH, per_device_train_batch_size=micro,
            gradient_accumulation_steps=batch // micro, num_train_epochs=10**4, report_to="none", save_strategy="no",
            logging_steps=10**6, disable_tqdm=True, use_cpu=not torch.cuda.is_available(), learning_rate=1e-6,
            bf16=config["_dtype"] == "bfloat16", gradient_checkpointing=False, **config["_trl"]))
    collate = trainer.data_collator

    def counted(examples):
        counts["samples"] += len(examples)
        return collate(examples)

    trainer.data_collator = counted
    trainer.train()


def main():
    """Run and report."""
    flags = versus.parser(__doc__)
    flags.add_argument("--model", required=True, help="path of a GPT-2-like model of a few million parameters")
    flags.add_argument("--small-tokenizer", help="path of GPT-2's tokenizer, for the model of its shape")
    flags.add_argument("--dataset", required=True, help="rows with prompt, chosen, rejected")
    flags.add_argument("--rows", type=int, default=64, help="pairs of a pass")
    flags.add_argument("--steps", type=int, default=2, help="optimizer steps in a pass")
    flags.add_argument("--only", choices=("given", "gpt2-small"), help="one of the two models")
    flags.add_argument("--ours", default='{"micro_batch_size": 2}', help="JSON of flags for dpo.py")
    flags.add_argument("--trl", default="{}", help="JSON of settings of DPOConfig")
    flags.add_argument("--trl-micro", type=int, default=1, help="TRL's pairs of a forward; 1 was its fastest on a CPU")
    args = flags.parse_args()
    from transformers import AutoConfig, AutoModelForCausalLM

    from common.models import load_tokenizer

    results, folder = [], tempfile.mkdtemp()
    for name in ("given", "gpt2-small"):
        if args.only not in (None, name) or name == "gpt2-small" and not args.small_tokenizer:
            continue
        path, words, count = args.model, args.model, args.rows
        if name == "gpt2-small":
            path, words, count = f"{folder}/gpt2-small", args.small_tokenizer, args.rows // 8
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**versus.gpt2_small())).save_pretrained(path)
        config, tokenizer = AutoConfig.from_pretrained(path), load_tokenizer(words)
        given = {"model": name, "rows": count, "steps": args.steps, "micro": args.trl_micro, "_model": path,
                 "_tokenizer": words, "_dataset": args.dataset, "_dtype": args.dtype, "_ours": json.loads(args.ours),
                 "_trl": json.loads(args.trl)}
        flops = 0.0
        for row in rows_of(given):
            prompt, chosen, rejected = (len(tokenizer(row[name])["input_ids"]) for name in row)
            flops += 4 * versus.forward_flops(config, prompt + chosen + rejected + 2, chosen + rejected + 2,
                                              prompt + (chosen + rejected) / 2)  # policy, its backward, reference
        results.append(versus.compare(f"DPO {name}", {"ours": ours, "trl": trl}, given, pairs=args.pairs,
                                      threads=args.threads, dtype=args.dtype, flops=flops, unit="samples",
                                      alike=("samples", "updates")))
    versus.report("dpo_vs_trl", results, args.json)


if __name__ == "__main__":
    main()

"""A PPO iteration against TRL 1.12.0, the last release with PPO: IMDB prompts, 40 new tokens, 4 epochs, 2 minibatches.

    D=../shared/data
    python benchmarks/ppo_vs_trl.py --model $D/models/imdb-gpt2-mini --prompts $D/imdb/train.jsonl.gz

Both sample 40 tokens behind 8 tokens of each prompt, score them by the same trivial function, and take 8 optimizer
steps. TRL trains a second network for the value, which is its only way; ours is a head on the policy. Runs the given
model and one of GPT-2 small's shape with random weights.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import versus  # noqa: E402

PROMPT, RESPONSE, EPOCHS, MINIBATCHES = 8, 40, 4, 2


def prompts_of(config: dict) -> tuple[object, list[str]]:
    """The tokenizer, and texts that are PROMPT tokens each in it."""
    from common.data import read_rows
    from common.models import load_tokenizer

    tokenizer = load_tokenizer(config["_tokenizer"])
    texts = [row["text"] for row in read_rows(config["_prompts"], "--prompts")[:4000]]
    ids = [tokenizer(text)["input_ids"][:PROMPT] for text in texts]
    cut = [tokenizer.decode(row) for row in ids]
    return tokenizer, [text for text, row in zip(cut, ids)
                       if tokenizer(text)["input_ids"] == row and len(row) == PROMPT]


def score(texts: list[str]) -> list[float]:
    """The reward on both sides: so cheap that it does not count."""
    return [len(text) % 7 / 7 for text in texts]


def ours(config: dict, turns) -> None:
    """ppo.py, stopped between its steps."""
    import ppo

    _, texts = prompts_of(config)
    batch = config["batch"]
    count = {"tokens": 0}

    class Log(ppo.RunLog):
        def metrics(self, step, values, show=()):
            super().metrics(step, values, show)
            done, count["tokens"] = values["tokens"] - count["tokens"], values["tokens"]
            if step:
                turns.tick(tokens=done, samples=batch)
            else:
                turns.wait()

    ppo.RunLog = Log
    ppo.train(
        ppo.arguments(
            model=config["_model"], tokenizer=config["_tokenizer"], dtype=config["_dtype"],
            max_length=PROMPT + RESPONSE, max_new_tokens=RESPONSE, min_new_tokens=RESPONSE,
            total_episodes=1000 * batch, rollout_batch_size=batch,
            batch_size=batch // MINIBATCHES, micro_batch_size=config["micro_batch"], ppo_epochs=EPOCHS,
            generation_batch_size=batch, num_eval_prompts=1, eval_every=10**6,
            output_dir=tempfile.mkdtemp(), **config["_ours"]),
        reward_fn=lambda outputs, **_: score(outputs), prompts=texts)


def trl(config: dict, turns) -> None:
    """TRL's PPOTrainer, stopped in its callback."""
    sys.path.insert(0, versus.peer("trl==1.12.0"))
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer, texts = prompts_of(config)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch, micro = config["batch"], config["micro_batch"]
    options = dict(dtype=torch.float32)
    policy, reference = (AutoModelForCausalLM.from_pretrained(config["_model"], **options) for _ in range(2))
    value = AutoModelForSequenceClassification.from_pretrained(config["_model"], num_labels=1, **options)

    class Backbone(nn.Module):
        def forward(self, input_ids, **_):
            from transformers.modeling_outputs import BaseModelOutputWithPast

            return BaseModelOutputWithPast(hidden_states=(input_ids[..., None].float(),))

    class Reward(nn.Module):
        """Cheap, as ours."""

        base_model_prefix = "model"

        def __init__(self):
            super().__init__()
            self.model, self.unused = Backbone(), nn.Parameter(torch.zeros(1))

        def score(self, states):
            return states % 7 / 7

    class Stop(TrainerCallback):
        episodes = 0

        def on_train_begin(self, *_, **__):
            turns.wait()

        def on_step_end(self, _, state, *__, **___):
            done, self.episodes = state.episode - self.episodes, state.episode
            turns.tick(tokens=done * RESPONSE, samples=done)  # without a stop token all outputs are of this length

    # more gradient_accumulation_steps would make fewer optimizer steps, whatever num_mini_batches says
    assert micro == batch // MINIBATCHES
    arguments = PPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch, gradient_accumulation_steps=1,
        num_mini_batches=MINIBATCHES, num_ppo_epochs=EPOCHS, total_episodes=1000 * batch,
        response_length=RESPONSE, temperature=1.0, local_rollout_forward_batch_size=batch, num_sample_generations=0,
        bf16=config["_dtype"] == "bfloat16", gradient_checkpointing=False, report_to="none", save_strategy="no",
        logging_steps=10**6, disable_tqdm=True, use_cpu=not torch.cuda.is_available(), seed=1, **config["_trl"])
    data = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in texts]})
    PPOTrainer(args=arguments, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=Reward(),
               value_model=value, train_dataset=data, eval_dataset=data.select(range(4)), callbacks=[Stop()]).train()


def flops_of(config, batch: int) -> float:
    """What an iteration needs: sampling with a cache, a forward of policy and reference, and EPOCHS times a forward and
    a backward, which is two more, with a value head on the policy; logits for outputs only."""
    length = PROMPT + RESPONSE
    one = versus.forward_flops(config, length, RESPONSE, length)
    return batch * one * (1 + 2 + 3 * EPOCHS)


def main():
    """Run and report."""
    flags = versus.parser(__doc__)
    flags.add_argument("--model", required=True, help="path of a GPT-2-like model of a few million parameters")
    flags.add_argument("--prompts", required=True, help="rows with column text")
    flags.add_argument("--batch", type=int, default=64, help="samples of an iteration")
    flags.add_argument("--only", choices=("given", "gpt2-small"), help="one of the two models")
    flags.add_argument("--ours", default="{}", help="JSON of flags for ppo.py, such as its best settings here")
    flags.add_argument("--trl", default="{}", help="JSON of settings of PPOConfig")
    args = flags.parse_args()
    from transformers import AutoConfig, AutoModelForCausalLM

    from common.models import load_tokenizer

    results, folder = [], tempfile.mkdtemp()
    for name, batch in (("given", args.batch), ("gpt2-small", args.batch // 8)):
        if args.only not in (None, name):
            continue
        path = args.model
        if name == "gpt2-small":
            vocabulary = len(load_tokenizer(args.model))
            settings = versus.gpt2_small(50257)
            config = AutoConfig.for_model(**settings, bos_token_id=0, eos_token_id=0)
            assert vocabulary <= 50257
            path = f"{folder}/gpt2-small"
            AutoModelForCausalLM.from_config(config).save_pretrained(path)
        config = AutoConfig.from_pretrained(path)
        work = {"model": name, "batch": batch, "micro_batch": batch // MINIBATCHES, "prompt": PROMPT,
                "response": RESPONSE, "epochs": EPOCHS, "minibatches": MINIBATCHES, "_model": path,
                "_tokenizer": args.model, "_prompts": args.prompts, "_dtype": args.dtype,
                "_ours": json.loads(args.ours), "_trl": json.loads(args.trl)}
        results.append(versus.compare(f"PPO {name}", {"ours": ours, "trl": trl}, work, pairs=args.pairs,
                                      threads=args.threads, dtype=args.dtype, unit="samples",
                                      flops=flops_of(config, batch)))
    versus.report("ppo_vs_trl", results, args.json)


if __name__ == "__main__":
    main()

"""Thousands of PPO updates of a tiny model: does memory grow, are files left open, is every line of the log there?

    python benchmarks/soak.py
    torchrun --nproc_per_node 2 benchmarks/soak.py --updates 2000

Rollouts are ragged, and there are evaluations and checkpoints. Prints the resident memory over the second half of the
updates as a line: its slope in bytes an update with the standard error, and what that is of the whole.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def tiny(folder: str) -> None:
    """Write a random GPT-2 of 2 layers and a tokenizer of letters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(1)
    letters = ["<end>", *" abcdefghijklmnopqrstuvwxyz"]
    core = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<end>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>").save_pretrained(folder)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(letters), n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0,
                               eos_token_id=0)).save_pretrained(folder)


def resident() -> int:
    """Bytes of this process that are in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def slope(values: list[int]) -> tuple[float, float]:
    """Least squares of values over their number: the slope and its standard error."""
    n = len(values)
    xs = [x - (n - 1) / 2 for x in range(n)]
    mean, spread = sum(values) / n, sum(x * x for x in xs)
    found = sum(x * value for x, value in zip(xs, values)) / spread
    errors = [value - mean - found * x for x, value in zip(xs, values)]
    return found, (sum(error * error for error in errors) / max(1, n - 2) / spread) ** 0.5


def soak(updates: int, folder: str) -> dict:
    """Run; returns memory in bytes and open files after each rollout of two updates, and what the log lacks."""
    import ppo
    from common.distributed import broadcast, init

    init(1)
    folder = broadcast(folder)
    if not int(os.environ.get("RANK", 0)):
        tiny(f"{folder}/tiny")
    broadcast(None)  # it is there
    found, inner = {"memory": [], "files": []}, ppo.RunLog

    class Log(inner):
        def metrics(self, step, values, show=()):
            super().metrics(step, values, ())
            found["memory"].append(resident())
            found["files"].append(len(os.listdir("/proc/self/fd")))

    ppo.RunLog = Log
    try:
        ppo.train(ppo.Args(
            model=f"{folder}/tiny", output_dir=f"{folder}/run", rollout_batch_size=8, batch_size=8, ppo_epochs=2,
            total_episodes=4 * updates, max_new_tokens=12, max_length=32, num_eval_prompts=4, eval_every=50,
            save_every=50, learning_rate=1e-4), reward_fn=lambda outputs: [float(len(set(text))) for text in outputs],
            prompts=["a", "the cat", "some more words"])
    finally:
        ppo.RunLog = inner
    steps = [json.loads(line)["step"] for line in open(f"{folder}/run/metrics.jsonl")]
    found["complete"] = steps == list(range(updates // 2 + 1))
    return found


def main():
    """Run and report."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--updates", type=int, default=2000)
    args = flags.parse_args()
    found = soak(args.updates, tempfile.mkdtemp())
    memory, files = found["memory"][len(found["memory"]) // 2 :], found["files"][len(found["files"]) // 2 :]
    grows, error = (part / 2 for part in slope(memory))
    print(f"rank {os.environ.get('RANK', 0)}: {args.updates} updates, {memory[0] / 2**20:.1f} MiB in the middle, "
          f"{memory[-1] / 2**20:.1f} MiB at the end: {grows:.0f} ± {error:.0f} bytes an update; open files {files[0]} "
          f"and {files[-1]}; log {'complete' if found['complete'] else 'INCOMPLETE'}")


if __name__ == "__main__":
    main()

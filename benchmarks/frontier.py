"""Reward against KL: the controlled sentiment experiment of the DPO paper (arXiv 2305.18290, section 6.1), in small.

    D=../shared/data; OMP_NUM_THREADS=1 python benchmarks/frontier.py --model $D/models/imdb-gpt2-mini \\
        --reward $D/models/imdb-sentiment --prompts $D/imdb/train.jsonl.gz --eval-prompts $D/imdb/test.jsonl.gz

Samples four outputs for each of 256 beginnings of reviews, ranks them by a sentiment classifier, whose score is the
true reward here, and makes of each four the six pairs. Trains dpo.py on them at several betas, with IPO too, and ppo.py
on the score itself. Draws each run's way through KL and score, measured on samples, and
prints where each run ended, measured anew for all alike on the same held-out prompts. Needs
benchmarks/requirements.txt.
"""

import argparse
import itertools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import dpo  # noqa: E402
from common.data import encode_prompts, evenly, load_prompts  # noqa: E402
from common.distributed import generator, init  # noqa: E402
from common.generation import noise, sample_texts  # noqa: E402
from common.models import LanguageModel, LogitRules, end_tokens, load_classifier, load_lm, load_tokenizer  # noqa: E402

TOKENS, WORDS = 40, 4
RUNS = {**{f"dpo-{beta:g}": ["dpo.py", "--beta", f"{beta:g}"] for beta in (0.05, 0.2, 1.0)},
        **{f"ipo-{beta:g}": ["dpo.py", "--loss", "ipo", "--beta", f"{beta:g}"] for beta in (3.0, 10.0)},
        **{f"ppo-{coef:g}": ["ppo.py", "--kl-coef", f"{coef:g}"] for coef in (0.02,)}}


class Sampler:
    """Samples from models and scores them, with the same prompts and random numbers for each."""

    def __init__(self, model: str, reward: str):
        self.device = init(1)
        self.tokenizer = load_tokenizer(model)
        self.classify = load_classifier(reward, "--reward", self.device, batch_size=64)
        self.rules = LogitRules(eos_ids=end_tokens(self.tokenizer, model))

    def load(self, path: str) -> LanguageModel:
        """The model at a path."""
        model = LanguageModel(load_lm(path)).to(self.device).requires_grad_(False)
        model.device = self.device
        return model

    def prompts(self, path: str, count: int) -> list[dict]:
        """The beginnings of `count` reviews."""
        return evenly(load_prompts(None, path, "--prompts", [], WORDS), count)

    def sample(self, model: LanguageModel, rows: list[dict], seed: int) -> list[dict]:
        """An output for each row, with its score."""
        ids, _ = encode_prompts(rows, self.tokenizer, 100, "left", False)
        items = sample_texts(model, self.tokenizer, ids, noise(generator(seed), len(ids), TOKENS), self.rules,
                             batch_size=128)
        return [{**item, "score": score} for item, score in zip(items, self.classify([i["sample"] for i in items]))]


def make_pairs(sampler: Sampler, model: LanguageModel, rows: list[dict], path: Path) -> None:
    """Four outputs a prompt and all pairs of them, the higher score chosen."""
    items = sampler.sample(model, [row for row in rows for _ in range(4)], seed=11)
    with open(path, "w") as file:
        for four in (items[i : i + 4] for i in range(0, len(items), 4)):
            for pair in itertools.combinations(four, 2):
                rejected, chosen = sorted(pair, key=lambda item: item["score"])
                if chosen["output"].strip() and rejected["output"].strip() and chosen["score"] > rejected["score"]:
                    file.write(json.dumps({"prompt": chosen["prompt"], "chosen": chosen["output"],
                                           "rejected": rejected["output"]}) + "\n")


def run(name: str, args, folder: Path) -> None:
    """One training run, unless its model is there already."""
    if (folder / name / "model").exists():
        return
    words = RUNS[name] + ["--model", args.model, "--output-dir", str(folder / name), "--seed", str(args.seed),
                          "--dtype", args.dtype, "--eval-prompts", args.eval_prompts, "--prompt-words", str(WORDS),
                          "--max-new-tokens", str(TOKENS), "--warmup-steps", "5", "--num-eval-prompts", "128"]
    if words[0] == "dpo.py":
        words += ["--dataset", str(folder / "pairs.jsonl"), "--metric", args.reward, "--no-train-eos", "--max-length",
                  "64", "--batch-size", "32", "--micro-batch-size", "16", "--learning-rate", "1e-4",
                  "--eval-every", "8"]
    else:
        words += ["--reward", args.reward, "--prompts", args.prompts, "--total-episodes", "2560",
                  "--rollout-batch-size", "256", "--batch-size", "64", "--micro-batch-size", "32",
                  "--learning-rate", "1e-4", "--eval-every", "20"]
    with open(folder / f"{name}.log", "w") as log:
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=log, stderr=subprocess.STDOUT)


def way(folder: Path) -> list[tuple[float, float]]:
    """(KL, score) of a run's samples as it went on: of dpo.py's evaluations, of ppo.py's rollouts."""
    with open(folder / "metrics.jsonl") as file:
        rows = [json.loads(line) for line in file]
    names = ("rollout/kl", "rollout/score") if any("rollout/kl" in row for row in rows) else ("eval/kl", "eval/score")
    return [tuple(row[name] for name in names) for row in rows if names[0] in row]


def draw(folder: Path, finals: dict[str, dict], out: str) -> None:
    """All ways in one picture."""
    figure, panel = plt.subplots(figsize=(7, 4.6))
    shades = {"dpo": plt.cm.Blues, "ipo": plt.cm.Greens, "ppo": plt.cm.Oranges}
    words = {"dpo": "DPO, beta", "ipo": "IPO, beta", "ppo": "PPO, KL coefficient"}
    for name in RUNS:
        kind, value = name.split("-")
        family = [other for other in RUNS if other.startswith(kind)]
        colour = shades[kind](0.4 + 0.55 * family.index(name) / max(1, len(family) - 1))
        points = way(folder / name)
        panel.plot(*zip(*points), marker="o", markersize=3, linewidth=1, color=colour, label=f"{words[kind]} {value}")
        panel.plot(finals[name]["kl"], finals[name]["score"], marker="*", markersize=11, color=colour,
                   markeredgecolor="black", markeredgewidth=0.5)
    panel.set_xlabel("KL to the reference, nats an output of at most 40 tokens")
    panel.set_ylabel("mean score: probability of a positive review")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    print(f"wrote {out}")


def main():
    """Pairs, runs, measurement, picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a language model of reviews")
    parser.add_argument("--reward", required=True, help="a sentiment classifier")
    parser.add_argument("--prompts", required=True, help="reviews to take beginnings of")
    parser.add_argument("--eval-prompts", required=True, help="others")
    parser.add_argument("--folder", default="runs/frontier")
    parser.add_argument("--out", default="benchmarks/frontier.png")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--only", nargs="+", default=list(RUNS), help="train these runs alone, and draw nothing")
    args = parser.parse_args()
    folder = ROOT / args.folder
    folder.mkdir(parents=True, exist_ok=True)
    sampler = Sampler(args.model, args.reward)
    start = sampler.load(args.model)
    if not (folder / "pairs.jsonl").exists():
        make_pairs(sampler, start, sampler.prompts(args.prompts, 256), folder / "pairs.jsonl")
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda name: run(name, args, folder), args.only))
    if set(args.only) != set(RUNS):
        return
    rows, finals = sampler.prompts(args.eval_prompts, 512), {}
    print(f"{'run':>10}  {'score':>15}  {'KL':>15}  distinct")
    for name in ["start", *RUNS]:
        model = start if name == "start" else sampler.load(str(folder / name / "model"))
        items = sampler.sample(model, rows, seed=12)
        kl = dpo.sample_kl(model, lambda batch: start(**batch, with_entropy=False)["logprobs"], items, 64)["kl"]
        found = {"score": torch.tensor([item["score"] for item in items]), "kl": torch.tensor(kl)}
        finals[name] = {metric: values.mean().item() for metric, values in found.items()}
        score, kl = (f"{values.mean():.3f} +- {values.std() / len(items) ** 0.5:.3f}" for values in found.values())
        distinct = len({item["output"] for item in items}) / len(items)
        print(f"{name:>10}  {score:>15}  {kl:>15}  {distinct:.3f}", flush=True)
    draw(folder, finals, args.out)


if __name__ == "__main__":
    main()

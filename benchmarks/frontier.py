"""Reward against KL: the controlled sentiment experiment of the DPO paper (arXiv 2305.18290, section 6.1), in small.

    D=../shared/data; OMP_NUM_THREADS=1 python benchmarks/frontier.py --model $D/models/imdb-gpt2-mini \\
        --reward $D/models/imdb-sentiment --prompts $D/imdb/train.jsonl.gz --eval-prompts $D/imdb/test.jsonl.gz

Samples four outputs for each of 256 beginnings of reviews, ranks them by a sentiment classifier, whose score is the
true reward here, and makes of each four the six pairs. Trains dpo.py on them at several betas, with IPO too, and ppo.py
on the score itself at several KL coefficients. Prints and draws where each run ended, measured for all alike on samples
for the same held-out prompts. Needs benchmarks/requirements.txt.
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
        **{f"ppo-{coef:g}": ["ppo.py", "--kl-coef", f"{coef:g}"] for coef in (0.02, 0.1, 0.3)}}


class Sampler:
    """Samples from models and scores them, with the same prompts and random numbers for each."""

    def __init__(self, model: str, reward: str):
        self.device = init(1)
        self.tokenizer = load_tokenizer(model)
        self.classify = load_classifier(reward, "--reward", self.device, batch_size=64)
        self.rules = LogitRules(eos_ids=end_tokens(self.tokenizer, load_lm(model)))

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


def draw(finals: dict[str, dict[str, tuple[float, float]]], out: str) -> None:
    """Where each run ended, (mean, standard error) of KL and score, those of a method joined, in one picture."""
    figure, panel = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for kind, words, colour, marker in (("dpo", "DPO, beta", "#0072b2", "o"), ("ipo", "IPO, beta", "#009e73", "s"),
                                        ("ppo", "PPO, KL coefficient", "#d55e00", "^")):
        ends = sorted(((finals[name], name.split("-")[1]) for name in RUNS if name.startswith(kind)),
                      key=lambda end: end[0]["kl"])
        kls, scores = (list(zip(*(end[metric] for end, _ in ends))) for metric in ("kl", "score"))
        panel.errorbar(kls[0], scores[0], scores[1], kls[1], color=colour, marker=marker, markersize=5, linewidth=1,
                       label=f"{words} {', '.join(value for _, value in ends)}")
        for end, value in ends:
            panel.annotate(value, (end["kl"][0], end["score"][0]), (5, -11), textcoords="offset points", fontsize=8,
                           color=colour)
    panel.errorbar(0, *finals["start"]["score"], color="black", marker="*", markersize=9, linestyle="", label="start")
    panel.set_xlabel("KL to the start, nats an output of at most 40 tokens")
    panel.set_ylabel("mean score: probability of a positive review")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=9, loc="lower right", title="values from left to right; bars: standard error")
    figure.savefig(out, dpi=200)
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
        finals[name] = {metric: (values.mean().item(), values.std().item() / len(items) ** 0.5)
                        for metric, values in found.items()}
        score, kl = (f"{value:.3f} +- {error:.3f}" for value, error in finals[name].values())
        distinct = len({item["output"] for item in items}) / len(items)
        print(f"{name:>10}  {score:>15}  {kl:>15}  {distinct:.3f}", flush=True)
    draw(finals, args.out)


if __name__ == "__main__":
    main()

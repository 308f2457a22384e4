"""Held-out preference accuracy and margin of a model of dpo.py, with 95 % intervals by a bootstrap over prompts.

    python benchmarks/pair_accuracy.py runs/dpo-NAME-1/model --reference MODEL --dataset test.jsonl.gz [--beta 0.1]
        [--format examples/formats.py:NAME] [--max-length N] [--truncation-side right] [--no-train-eos] [--means]

Pairs of one prompt are not independent: prompts are drawn again, each with all its pairs. Beside DPO's implicit reward
stand what the length alone would choose, and the likelihood by the reference and by the model.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import dpo  # noqa: E402
from common.data import window  # noqa: E402
from common.distributed import init  # noqa: E402
from common.functions import load_function  # noqa: E402
from common.models import LanguageModel, end_tokens, load_lm, load_tokenizer, shares_exactly  # noqa: E402


def measures(model: str, reference: str, rows: list, args: dpo.Args) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What pairs show of a model, and of which prompt each is.

    Args:
        model, reference: paths or hub ids; the tokenizer is the reference's.
        rows: of `dpo.load_pairs`.
        args: the settings of the run: how long a pair may be, beta, what its log-probs are.
    Returns:
        values (M,) by their names: accuracies (0, 0.5 for equal ones, 1) and the margin in nats times beta; and the
        numbers of the whole prompts (M,), which may be cut to different lengths beside different outputs.
    """
    tokenizer, prompts, found = load_tokenizer(reference), {}, []
    for row in rows:
        prompt = str(row[0].messages[: row[0].first] if row[0].messages else row[0].turns[0])
        prompts.setdefault(prompt, []).append(row)
    for path in (reference, model):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        lm = LanguageModel(load_lm(path).to(device))
        longest = window(args.max_length, lm.lm.config.get_text_config())
        groups = [dpo.make_pairs(some, tokenizer, end_tokens(tokenizer, lm.lm), lm.seq2seq, longest, args)[0]
                  for some in prompts.values()]
        pairs = dpo.with_reference(lm, sum(groups, []), shares_exactly(lm, longest), args.micro_batch_size)
        found.append(np.array([pair.reference for pair in pairs]))
    lengths = np.array([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
    if args.logprobs == "mean" or (args.logprobs == "auto" and args.loss in ("ipo", "simpo")):
        found = [sums / lengths for sums in found]
    before, after = found
    both = {"accuracy of the implicit reward": after - before, "accuracy of log pi": after,
            "accuracy of log pi_ref": before, "accuracy of the longer output": lengths}
    values = {name: np.sign(each[:, 0] - each[:, 1]) / 2 + 0.5 for name, each in both.items()}
    values["margin"] = args.beta * ((after - before)[:, 0] - (after - before)[:, 1])
    return values, np.repeat(np.arange(len(groups)), [len(some) for some in groups])


def interval(values: np.ndarray, groups: np.ndarray, draws: int = 2000, seed: int = 1) -> tuple[float, float, float]:
    """The mean of values (M,), and the ends of its 95 % interval by a bootstrap over groups (M,): as many are drawn as
    there are, with replacement, each with all its values."""
    _, groups = np.unique(groups, return_inverse=True)
    sums, counts, rng = np.bincount(groups, values), np.bincount(groups), np.random.default_rng(seed)
    means = []
    for _ in range(draws):
        drawn = rng.integers(len(counts), size=len(counts))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    return float(np.mean(values)), *map(float, np.quantile(means, [0.025, 0.975]))


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--reference", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--format")
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--truncation-side", default="left")
    parser.add_argument("--no-train-eos", action="store_true", help="of a run with that flag")
    parser.add_argument("--means", action="store_true", help="means over tokens, of a run with --loss ipo or simpo")
    args = parser.parse_args()
    init(1)
    format_fn = load_function(args.format, "--format") if args.format else None
    rows = dpo.load_pairs(None, args.dataset, "--dataset", format_fn)
    settings = dpo.Args(max_length=args.max_length, truncation_side=args.truncation_side, beta=args.beta,
                        train_eos=not args.no_train_eos, logprobs="mean" if args.means else "sum")
    values, prompts = measures(args.model, args.reference, rows, settings)
    print(f"{len(prompts)} pairs of {len(set(prompts))} prompts")
    for name, each in values.items():
        mean, low, high = interval(each, prompts)
        print(f"{name}: {mean:.3f}, 95 % interval {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()

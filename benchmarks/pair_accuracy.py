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

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import dpo  # noqa: E402
from common.data import window  # noqa: E402
from common.distributed import init  # noqa: E402
from common.functions import load_function  # noqa: E402
from common.models import LanguageModel, end_tokens, load_lm, load_tokenizer, shares_exactly  # noqa: E402


def logprobs(path: str, rows: list, args) -> tuple[list, np.ndarray]:
    """The pairs, and log-probs (M, 2) of their outputs by the model at a path."""
    tokenizer, model = load_tokenizer(args.reference), LanguageModel(load_lm(path))
    longest = window(args.max_length, model.lm.config.get_text_config())
    pairs, _ = dpo.make_pairs(rows, tokenizer, end_tokens(tokenizer, path), model.seq2seq, longest,
                              dpo.Args(truncation_side=args.truncation_side, train_eos=not args.no_train_eos))
    found = dpo.with_reference(model, pairs, shares_exactly(model, longest), 8)
    return found, np.array([pair.reference for pair in found])


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
    pairs, before = logprobs(args.reference, rows, args)
    _, after = logprobs(args.model, rows, args)
    numbers = {}
    prompts = np.array([numbers.setdefault(tuple(pair.prompt), len(numbers)) for pair in pairs])
    lengths = np.array([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
    if args.means:
        before, after = before / lengths, after / lengths
    rng = np.random.default_rng(1)
    draws = [rng.integers(prompts.max() + 1, size=prompts.max() + 1) for _ in range(2000)]
    weights = np.array([np.bincount(draw, minlength=prompts.max() + 1)[prompts] for draw in draws])
    print(f"{len(pairs)} pairs of {prompts.max() + 1} prompts")
    measures = {"accuracy of the implicit reward": after - before, "accuracy of log pi": after,
                "accuracy of log pi_ref": before, "accuracy of the longer output": lengths}
    values = {name: np.sign(both[:, 0] - both[:, 1]) / 2 + 0.5 for name, both in measures.items()}
    values["margin"] = args.beta * ((after - before)[:, 0] - (after - before)[:, 1])
    for name, each in values.items():
        means = weights @ each / weights.sum(1)
        low, high = np.quantile(means, [0.025, 0.975])
        print(f"{name}: {each.mean():.3f}, 95 % interval {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()

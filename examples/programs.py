"""Problems for the list language of rewards.py: which program turns this list into that one? For sft.py and ppo.py.

    python examples/programs.py --count 20000 --output programs.jsonl
    python sft.py --from-config examples/gpt2-mini.json --train-tokenizer 300 --dataset programs.jsonl --output-dir sft
    python ppo.py --model sft/model --prompts programs.jsonl --reward examples/rewards.py:list_program

trlX's grounded program synthesis, with a language of its own. A row has prompt, completion (a program that solves it,
of 1 to 3 operations, not always the shortest), and the columns input and target, which the reward reads.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from rewards import OPERATIONS, interpret  # noqa: E402

from common.cli import UserError, check_bounds, run  # noqa: E402
from common.data import write_rows  # noqa: E402


@dataclass
class Args:
    """Write random problems of the list language. The head of programs.py explains the rows."""

    count: int = 10000
    """how many problems to write, no two of which ask the same"""
    output: str = "programs.jsonl"
    """the file to write"""
    seed: int = 1
    """seed of the problems"""


def problem(rng: np.random.Generator) -> dict | None:
    """A random problem; None for one that asks for nothing: where the list stays as it is, or nothing is left of it."""
    values, steps = rng.integers(10, size=rng.integers(2, 6)).tolist(), []
    for name in rng.choice(list(OPERATIONS), size=rng.integers(1, 4)):
        steps.append(name if name in ("reverse", "sort") else f"{name} {rng.integers(1, 5)}")
    program = " | ".join(steps)
    target = interpret(program, values)
    if not target or target == values:
        return None
    return {"prompt": f"Input: {values} Output: {target} Program:", "completion": f" {program}", "input": values,
            "target": target}


def problems(count: int, seed: int) -> list[dict]:
    """`count` problems with different prompts; the first ones are the same for any number. Raises UserError where
    chance finds no more."""
    rng, found = np.random.default_rng(seed), {}
    for _ in range(20 * count + 100):
        if len(found) == count:
            return list(found.values())
        if row := problem(rng):
            found.setdefault(row["prompt"], row)
    raise UserError(f"--count {count}: {20 * count + 100} draws have given only {len(found)} problems; ask for fewer")


def main(args: Args) -> None:
    """Write the file."""
    check_bounds(args, positive=("count",), not_negative=("seed",), unit=())
    rows = problems(args.count, args.seed)
    write_rows(args.output, rows, "--output")
    print(f"{len(rows)} problems in {args.output}; the first: {rows[0]['prompt']}{rows[0]['completion']}")


if __name__ == "__main__":
    run(main, Args)

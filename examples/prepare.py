"""Rows for the scripts from data sets of the Hub that need more than a flag: a prompt made of columns, a data set with
configurations, two rows from one.

    python examples/prepare.py cnn_dailymail 'abisee/cnn_dailymail:3.0.0:train[:20000]' --output cnn.jsonl
    python examples/prepare.py pairs Dahoas/full-hh-rlhf:train --output hh.jsonl

The first word is a function of this file, from a row to a list of rows; the second a Hub data set name:split or
name:configuration:split, or a file.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from formats import alpaca, tldr_pair  # noqa: E402

from common.cli import UserError, run  # noqa: E402
from common.data import listed, read_rows, write_rows  # noqa: E402


@dataclass
class Args:
    """Write rows for the scripts. The head of prepare.py explains the words."""

    function: Positional[str] = ""
    """cnn_dailymail, english_to_german, openings, rewrite_bad_reviews, pairs or tldr_pairs"""
    dataset: Positional[str] = ""
    """Hub data set name:split or name:configuration:split, or a file"""
    output: str = "rows.jsonl"
    """the file to write"""


def cnn_dailymail(row: dict) -> list[dict]:
    """Prompts for ppo.py from articles (abisee/cnn_dailymail), with the editors' summary as column reference."""
    return [{"prompt": "Summarize: " + row["article"], "reference": row["highlights"]}]


def english_to_german(row: dict) -> list[dict]:
    """Prompts for ppo.py from pairs of sentences (wmt/wmt16), with the translation as column reference."""
    pair = row["translation"]
    return [{"prompt": "translate English to German: " + pair["en"], "reference": pair["de"]}]


def openings(row: dict) -> list[dict]:
    """Prompts from the first four words of texts, for rft.py."""
    return [{"prompt": " ".join(row["text"].split()[:4])}]


def rewrite_bad_reviews(row: dict) -> list[dict]:
    """Evaluation prompts for an Alpaca model: make a good review of a bad one (stanfordnlp/imdb)."""
    task = {"instruction": "Rewrite the input into a positive review.", "input": row["text"][:1024], "output": ""}
    return [{"prompt": alpaca(task)["prompt"]}] if row["label"] == 0 else []


def pairs(row: dict) -> list[dict]:
    """Rows for ilql.py from preferences: the chosen output with reward 1, the rejected one with -1."""
    return [{"prompt": row["prompt"], "completion": row[name], "reward": reward}
            for name, reward in (("chosen", 1), ("rejected", -1))]


def tldr_pairs(row: dict) -> list[dict]:
    """Rows for ilql.py from CarperAI/openai_summarize_comparisons, worded as `formats.py:tldr_pair` does."""
    pair = tldr_pair(row)
    return pairs(pair) if pair else []


def main(args: Args) -> None:
    """Write the rows of one data set."""
    functions = (cnn_dailymail, english_to_german, openings, rewrite_bad_reviews, pairs, tldr_pairs)
    functions = {function.__name__: function for function in functions}
    if not args.dataset:
        raise UserError("give a function of rows and a data set; see --help")
    if args.function not in functions:
        raise UserError(f"'{args.function}': no such function of rows; choose from {listed(functions)}")
    rows = read_rows(args.dataset, "the data set")
    try:
        made = [each for row in rows for each in functions[args.function](row)]
    except KeyError as error:
        raise UserError(f"{args.dataset}: has no column {error}, only {listed(rows[0])}") from None
    if not made:
        raise UserError(f"{args.dataset}: {args.function} makes no row of its {len(rows)}; look at their columns")
    write_rows(args.output, made, "--output")
    print(f"{len(made)} rows in {args.output}")


if __name__ == "__main__":
    run(main, Args)

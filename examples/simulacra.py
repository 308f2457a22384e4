"""The ratings of Simulacra Aesthetic Captions as rows for ilql.py: prompts for images, rated 1 to 10 by what came out.

    curl -OL https://raw.githubusercontent.com/JD-P/simulacra-aesthetic-captions/main/sac_public_2022_06_29.sqlite
    python examples/simulacra.py sac_public_2022_06_29.sqlite --output rows.jsonl
    python ilql.py --model gpt2 --dataset rows.jsonl --max-length 64

Of the database are read: generations (id, prompt), images (id, and gid, the generation it is of), ratings (iid, the
image it is of, and rating). A row is one rating, as in trlX's example: a prompt comes as often as it was rated.
"""

import sqlite3
import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.cli import UserError, run  # noqa: E402
from common.data import write_rows  # noqa: E402

QUERY = """
    SELECT generations.prompt, ratings.rating
    FROM ratings JOIN images ON ratings.iid = images.id JOIN generations ON images.gid = generations.id
    WHERE ratings.rating IS NOT NULL AND trim(generations.prompt) != ''
"""


@dataclass
class Args:
    """Write the ratings of Simulacra Aesthetic Captions as rows for ilql.py."""

    database: Positional[str] = ""
    """the SQLite file of the ratings"""
    output: str = "rows.jsonl"
    """the file to write"""


def rated_prompts(path: str) -> list[dict]:
    """A row for each rating in the database. Raises UserError for a file that is none, and where there is no rating."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file" if path else "give the SQLite file of the ratings")
    try:
        connection = sqlite3.connect(path)
        rows = [{"text": prompt, "reward": rating} for prompt, rating in connection.execute(QUERY)]
        connection.close()
    except sqlite3.Error as error:  # no database, or a table or column that is not there
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not rows:
        raise UserError(f"{path}: holds no rating of a prompt")
    return rows


def main(args: Args) -> None:
    """Write the file."""
    rows = rated_prompts(args.database)
    write_rows(args.output, rows, "--output")
    mean = sum(row["reward"] for row in rows) / len(rows)
    print(f"{len(rows)} ratings of {len({row['text'] for row in rows})} prompts in {args.output}; mean {mean:.2f}")


if __name__ == "__main__":
    run(main, Args)

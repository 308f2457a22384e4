"""Rows from JSON lines, JSON, CSV, Parquet or a Hub data set, and users' functions called with what they accept."""

import csv
import gzip
import inspect
import json
import os
from collections.abc import Callable

from common.cli import UserError


def read_rows(path: str, flag: str) -> list[dict]:
    """The rows of a `.jsonl[.gz] .json .csv .parquet` file, or of the Hub data set `name:split` (split `train` if none).

    `flag` names the setting in messages. Raises UserError naming file and row for anything that cannot be read, for a
    row that is not an object, and for empty data.
    """
    lower = path.lower().removesuffix(".gz")
    is_file = lower.endswith((".jsonl", ".json", ".csv", ".parquet"))
    if is_file and not os.path.isfile(path):
        raise UserError(f"{flag} {path}: no such file")
    try:
        if lower.endswith(".jsonl"):
            rows = []
            with _open(path) as file:
                for number, line in enumerate(file, 1):
                    try:
                        if line.strip():
                            rows.append(json.loads(line))
                    except ValueError as error:
                        raise UserError(f"{flag} {path}, line {number}: not valid JSON ({error}); write one object a line") from None
        elif lower.endswith(".json"):
            with _open(path) as file:
                rows = json.load(file)
        elif lower.endswith(".csv"):
            with _open(path) as file:
                rows = list(csv.DictReader(file))
        elif lower.endswith(".parquet"):
            from datasets import Dataset

            rows = Dataset.from_parquet(path).to_list()
        else:
            from datasets import load_dataset

            name, _, split = path.partition(":")
            rows = load_dataset(name, split=split or "train").to_list()
    except UserError:
        raise
    except Exception as error:  # each reader has its own set
        hint = "" if is_file else "; a file needs the ending .jsonl, .json, .csv or .parquet, a Hub data set is name:split"
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{flag} {path}: cannot be read ({type(error).__name__}: {reason[:200]}){hint}") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{flag} {path}: holds no rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{flag} {path}, row {number}: must be an object with named columns, not {_short(row)}")
    return rows


def _open(path: str):
    return gzip.open(path, "rt", encoding="utf-8") if path.lower().endswith(".gz") else open(path, encoding="utf-8", newline="")


def _short(value) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:40]}{'...' if len(text) > 40 else ''}"


def prompt_rows(prompts: list, where: str) -> list[dict]:
    """Prompts as new rows `{"prompt", ...metadata}`; the caller's objects are not changed.

    A prompt is a text, or a row whose column `prompt` (or, where there is none, `text`) is a text or a list of messages.
    Raises UserError naming `where` and the row.
    """
    if not len(prompts):
        raise UserError(f"{where}: holds no prompts")
    rows = []
    for number, prompt in enumerate(prompts, 1):
        row = dict(prompt) if isinstance(prompt, dict) else {"prompt": prompt}
        if "prompt" not in row:
            if "text" not in row:
                raise UserError(f"{where}, row {number}: has no column 'prompt' or 'text', only {', '.join(map(str, row)) or 'nothing'}")
            row["prompt"] = row.pop("text")
        messages = row["prompt"]
        is_chat = isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m and "content" in m for m in messages)
        if not isinstance(messages, str) and not is_chat:
            raise UserError(f"{where}, row {number}: the prompt must be a text or a list of messages, not {_short(messages)}")
        rows.append(row)
    columns = set().union(*rows) if len({frozenset(row) for row in rows}) > 1 else set()
    return [dict.fromkeys(columns) | row for row in rows]  # every row has every column, None where it was missing


def call(function: Callable, /, **arguments):
    """Call a user's function with those of the arguments that it accepts."""
    parameters = inspect.signature(function).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        accepted = {parameter.name for parameter in parameters}
        arguments = {name: value for name, value in arguments.items() if name in accepted}
    return function(**arguments)

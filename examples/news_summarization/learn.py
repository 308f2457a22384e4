"""From readers' choices to the next model: export of pairs, training by sft.py and dpo.py, evaluation, registry.

A model is taught what the server would show of it: prompts as `texts.prompt_of` writes them, and summaries of which
every sentence cites the passage that supports it, as `texts.cite` would attribute it. `article_row` and
`preference_row` do that to rows of articles with summaries or with preferences, also as --format of sft.py and dpo.py;
NEWS_TOKENIZER then names the tokenizer to count by, NEWS_ROOM the tokens of a prompt.
"""

import functools
import hashlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC
from pathlib import Path

from psycopg.types.json import Jsonb

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [path for path in (str(Path(__file__).parent), str(ROOT)) if path not in sys.path]  # for --format

from common.cli import UserError  # noqa: E402
from database import LOCK, Database  # noqa: E402
from ingest import PASSAGE, article  # noqa: E402
from summaries import MOST_NEW, ROOM  # noqa: E402
from texts import MARK, cite, marked, passages_of, prompt_of, sentences, split  # noqa: E402

NEEDED = 50  # pairs, before a model is trained on them

# --- pairs from choices -----------------------------------------------------------------------------------------------


def pairs(database: Database) -> list[dict]:
    """The choices between two different summaries, in the order in which they were made.

    Returns:
        rows with prompt, chosen, rejected (texts with citation marks), and, for whoever reads them, ask, made,
        chosen_model and rejected_model.
    """
    rows = database.run(
        lambda connection: connection.execute(
            "SELECT asks.id, asks.prompt, asks.summaries, choices.chosen, choices.made FROM choices "
            "JOIN asks ON asks.id = choices.ask WHERE jsonb_array_length(asks.summaries) = 2 "
            "ORDER BY choices.made, asks.id"
        ).fetchall()
    )
    found = []
    for row in rows:
        chosen, rejected = row["summaries"][row["chosen"]], row["summaries"][1 - row["chosen"]]
        if chosen["text"] != rejected["text"]:
            found.append(
                {"prompt": row["prompt"], "chosen": chosen["text"], "rejected": rejected["text"], "ask": str(row["id"]),
                 "made": row["made"].astimezone(UTC).isoformat(), "chosen_model": chosen["model"],
                 "rejected_model": rejected["model"]}
            )  # fmt: skip
    return found


def _write(path: str | Path, text: str) -> None:
    """A file that is there as a whole or not at all."""
    try:
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def export(database: Database, path: str | Path) -> int:
    """Write `pairs` as JSON lines for dpo.py; return how many."""
    found = pairs(database)
    _write(path, _lines(found))
    return len(found)


# --- articles with summaries or preferences, in the server's form -----------------------------------------------------


@functools.cache
def counter(tokenizer: str | None) -> Callable[[list[str]], list[int]]:
    """A function from texts to numbers of tokens: of the tokenizer at a path or hub id, or guessed from words."""
    if not tokenizer:
        return lambda texts: [math.ceil(len(text.split()) * 4 / 3) for text in texts]
    from common.models import load_tokenizer

    encode = load_tokenizer(tokenizer)
    return lambda texts: (
        [len(ids) for ids in encode(texts, add_special_tokens=False, verbose=False)["input_ids"]] if texts else []
    )


def _prompt(row: dict, columns: dict, count: Callable | None, room: int | None) -> str:
    """An article as the server would hand it to a model for a question that is its title, or its first words."""
    count = count or counter(os.environ.get("NEWS_TOKENIZER"))
    room = room or int(os.environ.get("NEWS_ROOM", ROOM - 2))
    found = article(row, columns)  # cleaned as in ingestion
    spans = split(found.text, PASSAGE, count)
    return prompt_of(found.title, [(found.title, found.text[a:b]) for a, b in spans], room, count)[0]


def example(row: dict, count: Callable | None = None, room: int | None = None, most: int = MOST_NEW - 1) -> dict:
    """A row with article or text, summary and perhaps title as prompt, completion and reference (the summary as given).

    The completion has the sentences of the summary that a passage in the prompt supports, each with the best such one,
    at the threshold of the server: a sentence below it would never be shown, and to learn it is to learn to invent. It
    may be empty; `left_out` counts the others. Rows with prompt and completion are taken as they are.

    Args:
        count: numbers of tokens of some texts; none: by NEWS_TOKENIZER, or guessed.
        room, most: tokens of a prompt and of a completion, without special ones.
    Errors:
        ValueError: the row has not these columns, or they are no texts.
    """
    if "prompt" in row and "completion" in row:
        return {"reference": MARK.sub("", row["completion"]), "left_out": 0, **row}
    summary = row.get("summary")
    if not isinstance(summary, str) or not summary.strip():
        raise ValueError(f"no 'summary', only {', '.join(map(str, row))}"[:200])
    prompt = _prompt(row, {"text": "article"} if "article" in row else {}, count, room)
    found = cite(summary, passages_of(prompt))
    while len(found) > 1 and (count or counter(os.environ.get("NEWS_TOKENIZER")))([marked(found)])[0] > most:
        found.pop()
    left_out = len(sentences(summary)) - len(found)
    return {"prompt": prompt, "completion": marked(found), "reference": summary.strip(), "left_out": left_out}


def article_row(row: dict) -> dict | None:
    """`example` for --format of sft.py; rows of which no sentence is supported are left out."""
    found = example(row)
    return found if found["completion"] else None


def preference_row(row: dict, count: Callable | None = None, room: int | None = None) -> dict:
    """A row with an article as prompt, chosen and rejected, in the form of `pairs`; for --format of dpo.py.

    Sentences that a passage supports are marked; the others stay, since the choice was made on the whole text. Rows
    that have the server's prompt are taken as they are.
    """
    for name in ("prompt", "chosen", "rejected"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ValueError(f"no '{name}', only {', '.join(map(str, row))}"[:200])
    if row["prompt"].startswith("summarize: question: "):
        return row
    prompt = _prompt(row, {"text": "prompt"}, count, room)
    given, made = passages_of(prompt), {"prompt": prompt}
    for name in ("chosen", "rejected"):
        pieces = [row[name][a:b] for a, b in sentences(row[name])]
        made[name] = " ".join(marked(cite(piece, given)) or piece for piece in pieces)
    return made


# --- training ---------------------------------------------------------------------------------------------------------


def _command(script: str, words: list[str], folder: Path, processes: int) -> None:
    """Run sft.py or dpo.py, its output shown and added to log.txt, unless its model is there.

    Errors:
        UserError: it failed; it goes on from its last checkpoint when it is run again.
    """
    name = script.removesuffix(".py")
    if (folder / name / "model").is_dir():
        print(f"{script}: done before, {folder / name / 'model'}", flush=True)
        return
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words = [*words, "--output-dir", str(folder / name), "--resume", "auto"]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / script), *words]
    last = ""

    def show(lines) -> None:
        nonlocal last
        for line in lines:
            last = line.strip() or last
            print(line, end="", flush=True)
            log.write(line)
            log.flush()

    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        show([f"$ {shlex.join(command)}\n"])
        # a session of its own: Ctrl-C comes here alone, and what runs is told to end, which writes a checkpoint
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            text=True, encoding="utf-8", errors="replace", env={**os.environ, "PYTHONUNBUFFERED": "1"},
        ) as child:  # fmt: skip
            try:
                show(child.stdout)
            except BaseException:
                child.terminate()
                show(child.stdout)
                raise
    if child.returncode:
        again = f"the same command goes on; all it said is in {folder}/log.txt"
        raise UserError(f"{script} ended with {child.returncode}: {last[:300]} ({again})")
    shutil.rmtree(folder / name / "checkpoints", ignore_errors=True)  # they have served


def _held(question: str, share: float) -> bool:
    """Whether a question is kept out of training: always the same, so that no later model has trained on it either."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8]) < share * 2**64


def _converted(rows: list[dict], flag: str, convert: Callable[[dict], dict]) -> list[dict]:
    """Rows in the server's form; UserError names the one that has not its columns."""
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(convert(row))
        except ValueError as error:
            raise UserError(f"{flag}, row {number}: {error}") from None
    return found


def _prepare(folder: Path, given: dict, tokenizer: str | None, room: int, most: int, share: float) -> dict[str, list]:
    """Summaries and pairs, to train on and held out, from the folder's data/, or converted, divided and written there.

    What has a question in common is on one side, whatever its passages, summaries and pairs alike.
    """
    names, path = ("held_summaries", "held_pairs", "summaries", "pairs"), folder / "data"
    if not path.is_dir():
        count, apart, sets = counter(tokenizer), set(), {}
        converters = {
            "summaries": lambda row: example(row, count, room, most),
            "pairs": lambda row: preference_row(row, count, room),
        }
        for name in names:
            kind, question = name.removeprefix("held_"), lambda row: row["prompt"].partition(" [1] ")[0]
            rows = _converted(given[name], f"--{name.replace('_', '-')}", converters[kind])
            # what differed only in blanks teaches nothing
            rows = [row for row in rows if kind == "summaries" or row["chosen"] != row["rejected"]]
            if name == kind:
                hashed = not given[f"held_{kind}"]
                out = [question(row) in apart or hashed and _held(question(row), share) for row in rows]
                if hashed:
                    sets[f"held_{kind}"] = [row for row, gone in zip(rows, out) if gone]
                rows = [row for row, gone in zip(rows, out) if not gone]
            else:
                apart |= {question(row) for row in rows}
            sets[name] = rows
        shutil.rmtree(f"{path}.tmp", ignore_errors=True)
        os.mkdir(f"{path}.tmp")
        for name, rows in sets.items():
            _write(f"{path}.tmp/{name}.jsonl", _lines(rows))
            if "summaries" in name:  # those with an output to learn from
                _write(f"{path}.tmp/{name}_cited.jsonl", _lines([row for row in rows if row["completion"]]))
        os.replace(f"{path}.tmp", path)
    texts = {name: (path / f"{name}.jsonl").read_text(encoding="utf-8") for name in names}
    return {name: [json.loads(line) for line in text.split("\n") if line] for name, text in texts.items()}


def train(
    database: Database,
    folder: str | Path,
    base: str | None = None,
    from_config: str | None = None,
    tokenizer: str | None = None,
    train_tokenizer: int | None = None,
    summaries: str | None = None,
    held_summaries: str | None = None,
    pairs_file: str | None = None,
    held_pairs: str | None = None,
    needed: int = NEEDED,
    held_out: float = 0.2,
    max_length: int = ROOM + MOST_NEW,
    max_new_tokens: int = MOST_NEW,
    processes: int = 1,
    save_every: int = 100,
    sft_flags: str = "",
    dpo_flags: str = "",
) -> dict:
    """Train a model on the readers' choices, evaluate it, register it, and have it served unless it is worse.

    Interrupted, the same command goes on: the run's folder is named after data and flags, and what is finished there is
    not repeated. New choices make another run of it.

    Args:
        folder: where the folder of this run is made.
        base: path or hub id of the model to start from; none: the active one.
        from_config: start from scratch instead, see sft.py; with tokenizer (a path), or train_tokenizer (a size).
        summaries: file of rows with article (or text), summary and perhaps title, for sft.py before dpo.py.
        pairs_file: file of pairs instead of the choices, also with plain articles as prompts.
        held_summaries, held_pairs: files to evaluate on; without them a share `held_out` of the prompts.
        needed: fewest pairs, of both sides.
        max_length: tokens of prompt and output; a prompt has what max_new_tokens leaves.
        processes: of torchrun, for each script.
        save_every: steps between checkpoints.
        sft_flags, dpo_flags: further flags of the scripts, as one would type them.
    Returns:
        version, served, report and folder.
    Errors:
        UserError: what is given does not fit, there are too few pairs, or a script failed.
    """
    import dpo
    import sft
    from common.checkpoint import put_in_place
    from common.cli import parse as parse_flags
    from common.data import read_rows
    from common.models import train_tokenizer as new_tokenizer
    from evaluation import evaluate, worse

    began = time.time()
    if base and from_config:
        raise UserError("--model and --from-config: one of them, a model to start from or one from scratch")
    if from_config and not summaries:
        raise UserError("--from-config needs --summaries: a model from scratch can prefer nothing before it can write")
    if from_config and bool(tokenizer) == bool(train_tokenizer):
        raise UserError("--from-config needs --tokenizer or --train-tokenizer")
    if not (base or from_config):
        row = active(database)
        if not row:
            raise UserError("no model is active: give --model, or --from-config for one from scratch")
        base = row["path"]
    base = os.path.abspath(base) if base and os.path.isdir(base) else base
    files = {"summaries": summaries, "held_summaries": held_summaries, "pairs": pairs_file, "held_pairs": held_pairs}
    given = {n: read_rows(path, f"--{n.replace('_', '-')}") if path else [] for n, path in files.items()}
    given["pairs"] = given["pairs"] if pairs_file else pairs(database)
    if len(given["pairs"]) < needed:
        found = len(given["pairs"])
        raise UserError(f"{found} pairs, and {needed} are needed: let readers choose more, or lower --needed")

    # --- flags: defaults, what the user says, and what must be as it is
    lengths = ["--max-length", str(max_length), "--max-new-tokens", str(max_new_tokens), "--truncation-side", "right"]
    words = [*lengths, "--num-eval-rows", "200", "--num-eval-prompts", "4", "--save-every", str(save_every)]
    sft_words, dpo_words = [*words, *shlex.split(sft_flags)], [*words, *shlex.split(dpo_flags)]
    for script, said in ((sft, sft_words), (dpo, dpo_words)):
        try:
            parse_flags(script.Args, None, said)
        except UserError as error:
            raise UserError(f"{script.__name__}.py: {error}") from None
    state = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for path in (base, from_config, tokenizer)
        if path and os.path.exists(path)
        for file in ([Path(path)] if os.path.isfile(path) else sorted(Path(path).iterdir()))
    ]
    key = [given, base, from_config, tokenizer, train_tokenizer, state, held_out, sft_words, dpo_words]
    run = Path(folder).resolve() / f"run-{hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:12]}"
    run.mkdir(parents=True, exist_ok=True)
    print(f"this run's folder: {run}", flush=True)

    # --- data
    if train_tokenizer:
        tokenizer = str(run / "tokenizer")
        if not os.path.isdir(tokenizer):
            columns = ("article", "text", "summary")
            texts = (row[name] for row in given["summaries"] for name in columns if isinstance(row.get(name), str))
            new_tokenizer(texts, train_tokenizer).save_pretrained(tokenizer + ".tmp")
            put_in_place(tokenizer)
    room = max_length - max_new_tokens - 2  # BOS and EOS
    data = _prepare(run, given, tokenizer or base, room, max_new_tokens - 1, held_out)
    for kind in ("summaries", "pairs"):
        sides = [[row for row in data[name] if row.get("completion") != ""] for name in (kind, f"held_{kind}")]
        if given[kind] and not all(sides):
            raise UserError(f"--{kind}: {len(sides[0])} to train on and {len(sides[1])} held out: more are needed")
        if given["summaries"] and kind == "summaries":
            none, left = len(data[kind]) - len(sides[0]), sum(row["left_out"] for row in data[kind])
            why = "that a passage in the prompt supports"
            print(f"{len(sides[0])} summaries to train on; {none} have no sentence {why}; {left} sentences left out")
    print(f"{len(data['pairs'])} pairs to train on, {len(data['held_pairs'])} held out", flush=True)

    # --- the two scripts
    files = {name: str(run / "data" / f"{name}.jsonl") for name in ("pairs", "held_pairs")}
    start = base
    if summaries:
        cited = [str(run / "data" / f"{name}_cited.jsonl") for name in ("summaries", "held_summaries")]
        source = ["--from-config", from_config, "--tokenizer", tokenizer] if from_config else ["--model", base]
        _command("sft.py", [*sft_words, *source, "--dataset", cited[0], "--eval-dataset", cited[1]], run, processes)
        start = str(run / "sft" / "model")
    source = ["--model", start, "--dataset", files["pairs"], "--eval-dataset", files["held_pairs"]]
    _command("dpo.py", [*dpo_words, *source], run, processes)

    # --- evaluation and registry
    models = {"before": base or start, "reference": start, "after": str(run / "dpo" / "model")}
    if not (run / "report.json").is_file():
        print("evaluating ...", flush=True)
        report = evaluate(models, data["held_pairs"], data["held_summaries"], dpo_words)
        _write(run / "samples.jsonl", _lines(report.pop("outputs")))
        sizes = {name: len(rows) for name, rows in data.items()}
        report |= {"data": sizes, "sft": sft_flags, "dpo": dpo_flags, "seconds": time.time() - began}
        _write(run / "report.json", json.dumps(report, indent=1))
    report = json.loads((run / "report.json").read_text("utf-8"))
    reason = worse(report)
    version = register(database, models["after"], base or from_config, report, serve=reason is None)
    row = active(database)
    served = bool(row) and row["version"] == version
    print(f"version {version}: {summary(report)}")
    hint = f": {reason or 'another was chosen'}; `news.py use {version}` serves it"
    print(f"version {version} is {'served' if served else 'not served' + hint}", flush=True)
    return {"version": version, "served": served, "report": report, "folder": str(run)}


def summary(report: dict) -> str:
    """A report in one line."""

    def shown(values) -> str:
        return "none" if values is None else "{:.3f} ({:.3f} to {:.3f})".format(*values)

    if "accuracy" not in report:
        return "not evaluated"
    counted = f"on {report['pairs']} pairs of {report['prompts']} prompts"
    parts = [f"preference accuracy {shown(report['accuracy'])} {counted}"]
    if report["rouge"]:
        before, after, difference = (report["rouge"][name]["rougeL"] for name in ("before", "after", "difference"))
        parts.append(f"ROUGE-L {before[0]:.3f} -> {after[0]:.3f}, difference {shown(difference)}")
    raw = report["citations"]["after"]["raw"]
    parts.append(f"citation precision {shown(raw['precision'])}, recall {shown(raw['recall'])}")
    return "; ".join(parts)


# --- registry ---------------------------------------------------------------------------------------------------------
#
# What is served is the last activation that was not undone. All of it may be done again when an answer was lost: a path
# is registered once, what is active is not activated again, and an activation is undone by its number.

ACTIVE = "SELECT id, model FROM activations WHERE undone IS NULL ORDER BY id DESC LIMIT 1"


def _activate(connection, version: int | None) -> None:
    row = connection.execute(ACTIVE).fetchone()
    if (row and row["model"]) != version:
        connection.execute("INSERT INTO activations (model) VALUES (%s)", [version])


def register(database: Database, path: str, base: str, report: dict, serve: bool = False) -> int:
    """Enter a model, a folder or hub id, and its report; return its version. With `serve`, it is also activated, if it
    is new: what was trained once and rolled back is not served again because the same command was given again."""

    def work(connection) -> int:
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
        known = connection.execute("SELECT version FROM models WHERE path = %s", [path]).fetchone()
        if known:
            return known["version"]
        insert = "INSERT INTO models (path, base, report) VALUES (%s, %s, %s) RETURNING version"
        version = connection.execute(insert, [path, base, Jsonb(report)]).fetchone()["version"]
        if serve:
            _activate(connection, version)
        return version

    return database.run(work)


def activate(database: Database, version: int | None) -> None:
    """Serve a registered model; None: the extractive summariser.

    Errors:
        UserError: there is no such version, or its folder is gone.
    """

    def work(connection) -> None:
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
        if version is not None:
            row = connection.execute("SELECT path FROM models WHERE version = %s", [version]).fetchone()
            if row is None:
                raise UserError(f"there is no version {version}; `news.py models` lists them")
            if os.path.isabs(row["path"]) and not os.path.isdir(row["path"]):
                raise UserError(f"version {version}: its folder {row['path']} is gone")
        _activate(connection, version)

    database.run(work)


def active(database: Database) -> dict | None:
    """What is served: version, path, base, made and report; None: the extractive summariser."""
    query = f"SELECT models.* FROM ({ACTIVE}) AS last JOIN models ON models.version = last.model"
    return database.run(lambda connection: connection.execute(query).fetchone())


def rollback(database: Database) -> dict | None:
    """Undo the last activation; return what is served now, as `active`.

    Errors:
        UserError: there is none.
    """
    last = database.run(lambda connection: connection.execute(ACTIVE).fetchone())
    if last is None:
        raise UserError("nothing to roll back: the extractive summariser is served, as at the beginning")
    undo = "UPDATE activations SET undone = now() WHERE id = %s AND undone IS NULL"
    database.run(lambda connection: connection.execute(undo, [last["id"]]))
    return active(database)


def versions(database: Database) -> list[dict]:
    """All registered models, oldest first: version, path, base, made and report."""
    return database.run(lambda connection: connection.execute("SELECT * FROM models ORDER BY version").fetchall())

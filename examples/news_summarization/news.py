"""News with citations, from a summariser that learns from its readers' choices. README.md explains it.

python news.py serve                        the page on http://127.0.0.1:8000, with a few dozen articles of our own
python news.py ingest PATH...               add articles: JSON lines, RSS or Atom; files or folders
python news.py ask "a question"             answer on the terminal
python news.py export --out pairs.jsonl     the readers' choices as {"prompt", "chosen", "rejected"}
python news.py train                        sft.py and dpo.py on them; evaluate, register and serve the new model
python news.py models                       the registered models
python news.py use VERSION                  serve one of them; `extractive` is the summariser without a model
python news.py rollback                     serve what was served before
"""

import os
import signal
import socket
import sys
import textwrap
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]  # this folder's files, and the repository's common/

from tyro.conf import Positional, arg  # noqa: E402

from common.cli import UserError, parse  # noqa: E402


@dataclass
class Common:
    """Flags of all commands."""

    data: str = str(HERE / "data")
    """folder of the embedded database and of trained models; DATABASE_URL names a server of yours instead"""
    embedding_model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """path or hub id of a sentence-transformers model; the collection remembers it"""

    def open(self):
        """The database."""
        from database import open_database

        return open_database(self.data)

    def embedder(self):
        """The embedding model."""
        from embedding import Embedder

        return Embedder(self.embedding_model)

    def run(self) -> None:
        """Do what the command says."""
        raise NotImplementedError


@dataclass
class Serve(Common):
    """Serve the page and the API. An empty collection gets our own articles first."""

    host: str = "127.0.0.1"
    """address to listen on; anything but loopback lets others in, without a password"""
    port: int = 8000
    """0: any free one"""
    allow_host: list[str] = field(default_factory=list)
    """further names by which browsers may call this server, for example behind a proxy"""
    model: str | None = None
    """path or hub id of a model to serve in this process, instead of the registered one"""
    threads: int = 2
    """questions that are answered at the same time"""
    examples: bool = True
    """ingest our own articles into an empty collection"""

    def run(self) -> None:
        """Serve until interrupted."""
        import server
        from ingest import ingest, prepare

        if self.threads < 1:
            raise UserError("--threads: at least 1")
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self.host, self.port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--host {self.host} --port {self.port}: {reason}") from None
        with self.open() as database:
            embedder = self.embedder()
            prepare(database, embedder)
            if self.examples and not database.run(lambda c: c.execute("SELECT 1 FROM articles LIMIT 1").fetchone()):
                print("the collection is empty: ingesting our own articles ...", flush=True)
                ingest(database, embedder, [str(HERE / "articles.jsonl")], {})
            served = server.Served(database, embedder, self.model)
            loopback = self.host in ("127.0.0.1", "::1", "localhost")
            hosts = {"127.0.0.1", "localhost", "[::1]", *(name.lower() for name in self.allow_host)}
            # on another address the machine's names are not known here; --allow-host then makes the check
            app = server.make_app(
                database, embedder, served, hosts if loopback or self.allow_host else None, self.threads
            )
            listener.listen(128)
            shown = f"[{self.host}]" if ":" in self.host else self.host
            if not loopback:
                print(f"warning: whoever reaches {self.host} can ask and choose; put a proxy with a password before it")
            print(f"summaries by {served.summariser.name}; Ctrl-C ends", flush=True)
            print(f"serving on http://{shown}:{listener.getsockname()[1]}", flush=True)
            server.serve(app, [listener])


@dataclass
class Ingest(Common):
    """Add articles: one that is there changes nothing, another text under a known URL takes the old one's place."""

    paths: Positional[list[str]] = field(default_factory=list)
    """files or folders: .jsonl[.gz] with title, text, url, published, source; .rss, .atom, .xml"""
    columns: Annotated[list[str], arg(metavar="FIELD=COLUMN")] = field(default_factory=list)
    """other names of the fields, for example text=article published=date"""

    def run(self) -> None:
        """Ingest, and print what happened."""
        from ingest import ingest

        if not self.paths:
            raise UserError("ingest: name files or folders, for example: python news.py ingest articles.jsonl")
        wrong = [pair for pair in self.columns if "=" not in pair]
        if wrong:
            raise UserError(f"--columns {wrong[0]}: must be FIELD=COLUMN, for example text=article")
        with self.open() as database:
            found = ingest(database, self.embedder(), self.paths, dict(pair.split("=", 1) for pair in self.columns))
        rate = (found["new"] + found["changed"]) / max(found["seconds"], 1e-9)
        print(
            f"{found['new']} new, {found['changed']} changed, {found['known']} known, {found['left out']} left out, "
            f"{found['undated']} without their date; "
            f"{found['passages']} passages; {found['seconds']:.1f} s, {rate:.1f} articles/s"
        )


@dataclass
class Ask(Common):
    """Answer a question on the terminal."""

    query: Positional[str] = ""
    """the question"""
    k: int = 5
    """passages"""
    since: date | None = None
    """first day, YYYY-MM-DD"""
    until: date | None = None
    """last day"""
    model: str | None = None
    """path or hub id of a model, instead of the registered one"""

    def run(self) -> None:
        """Print summaries and passages."""
        import learn
        from ingest import prepare
        from server import answer
        from summaries import load

        if not self.query.strip() or not 1 <= self.k <= 20:
            raise UserError("ask: a question, and --k from 1 to 20")
        with self.open() as database:
            embedder = self.embedder()
            prepare(database, embedder)
            row = None if self.model else learn.active(database)
            name = f"version {row['version']}" if row else self.model or ""
            summariser = load(self.model or (row and row["path"]), name, embedder)
            found = answer(database, embedder, summariser, self.query, self.k, self.since, self.until)
        width = min(100, os.get_terminal_size().columns) if sys.stdout.isatty() else 100
        for summary in found["summaries"]:
            print(f"\n{textwrap.fill(summary['text'], width)}\n  ({summary['model']})")
        print(f"\n{found['message']}\n" if found["message"] else "")
        for p in found["passages"]:
            day = p["published"][:10] if p["published"] else "no date"
            where = f"{p['source'] or 'no source'}, {day}, similarity {p['similarity']:.2f}"
            print(f"[{p['number']}] {p['title']} ({where}) {p['url'] or ''}")


@dataclass
class Export(Common):
    """Write the readers' choices as preference pairs, which dpo.py reads."""

    out: str = "pairs.jsonl"
    """the file to write"""

    def run(self) -> None:
        """Export, and print how many."""
        import learn

        with self.open() as database:
            print(f"{learn.export(database, self.out)} pairs in {self.out}")


@dataclass
class Train(Common):
    """Train a model on the readers' choices by sft.py and dpo.py, evaluate, register, and serve it unless it is worse.

    The same command goes on where an interrupted one stopped.
    """

    model: str | None = None
    """path or hub id of the causal or encoder-decoder model to start from, for example google/flan-t5-base; none: the
    registered one that is served"""
    from_config: str | None = None
    """start from scratch: a model's config.json, with --tokenizer or --train-tokenizer"""
    tokenizer: str | None = None
    """path or hub id of a tokenizer, with --from-config"""
    train_tokenizer: int | None = None
    """size of a tokenizer that is trained on the summaries, with --from-config"""
    summaries: str | None = None
    """file of articles and summaries (article or text, summary, title) for sft.py, before dpo.py"""
    held_summaries: str | None = None
    """the same, for evaluation; none: a share of --summaries"""
    pairs: str | None = None
    """file of preference pairs instead of the readers' choices"""
    held_pairs: str | None = None
    """the same, for evaluation; none: a share of the pairs, by question"""
    needed: int = 50
    """fewest pairs to train on"""
    max_length: int = 1152
    """tokens of prompt and summary together"""
    max_new_tokens: int = 128
    """tokens of a summary"""
    processes: int = 1
    """of torchrun, for each script"""
    sft_flags: str = ""
    """further flags of sft.py in one word: --sft-flags="--learning-rate 1e-4 --epochs 2\""""
    dpo_flags: str = ""
    """the same for dpo.py"""

    def run(self) -> None:
        """Train; learn.train prints the report, and whether the model is served."""
        import learn

        with self.open() as database:
            learn.train(
                database,
                Path(self.data) / "models",
                base=self.model,
                from_config=self.from_config,
                tokenizer=self.tokenizer,
                train_tokenizer=self.train_tokenizer,
                summaries=self.summaries,
                held_summaries=self.held_summaries,
                pairs_file=self.pairs,
                held_pairs=self.held_pairs,
                needed=self.needed,
                max_length=self.max_length,
                max_new_tokens=self.max_new_tokens,
                processes=self.processes,
                sft_flags=self.sft_flags,
                dpo_flags=self.dpo_flags,
            )


@dataclass
class Models(Common):
    """List the registered models; the one that is served has a star."""

    def run(self) -> None:
        """Print a table."""
        import learn

        with self.open() as database:
            active, rows = learn.active(database), learn.versions(database)
        print(f"{' ' if active else '*'} extractive")
        for row in rows:
            star = "*" if active and row["version"] == active["version"] else " "
            what = f"version {row['version']}, {row['made']:%Y-%m-%d %H:%M}, {row['path']}"
            print(f"{star} {what}: {learn.summary(row['report'])}")


@dataclass
class Use(Common):
    """Serve a registered model."""

    version: Positional[str] = ""
    """its number, or extractive"""

    def run(self) -> None:
        """Activate it; a server that runs takes it up within seconds."""
        import learn

        if not (self.version.isdecimal() or self.version == "extractive"):
            raise UserError("use: a version's number, or extractive; `news.py models` lists them")
        with self.open() as database:
            learn.activate(database, None if self.version == "extractive" else int(self.version))
        print(f"serving {'the extractive summariser' if self.version == 'extractive' else f'version {self.version}'}")


@dataclass
class Rollback(Common):
    """Serve what was served before."""

    def run(self) -> None:
        """Undo the last activation."""
        import learn

        with self.open() as database:
            row = learn.rollback(database)
        name = f"version {row['version']}" if row else "the extractive summariser"
        print(f"serving {name}")


COMMANDS = {
    "serve": Serve,
    "ingest": Ingest,
    "ask": Ask,
    "export": Export,
    "train": Train,
    "models": Models,
    "use": Use,
    "rollback": Rollback,
}


def main() -> None:
    """Run a command; a user's mistake is one line on stderr and exit code 2."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h", "help"):
        print(__doc__ + "\nEach command has --help.")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if name not in COMMANDS:
            raise UserError(f"no command {name!r}; there are {', '.join(COMMANDS)}")
        parse(COMMANDS[name], words=sys.argv[2:]).run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # as in `news.py models | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()

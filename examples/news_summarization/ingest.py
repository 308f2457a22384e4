"""From files of articles to passages in the database: JSON lines, RSS and Atom."""

import gzip
import hashlib
import html
import json
import re
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import feedparser
import numpy as np
from dateutil import parser as dates
from psycopg import sql
from tqdm import tqdm

from common.cli import UserError
from database import LOCK, Database
from embedding import Embedder
from texts import split

LINES, FEEDS = (".jsonl", ".jsonl.gz", ".ndjson"), (".rss", ".atom", ".xml")
MOST_CHARACTERS = 400_000  # of one article
FIELDS = ("title", "text", "url", "published", "source")
PASSAGE = 180  # tokens; with the title before it, within the 256 that all-MiniLM-L6-v2 was trained with


class Article(NamedTuple):
    """One article, checked."""

    title: str
    text: str
    url: str | None
    published: datetime | None
    source: str
    remark: str = ""
    """what was wrong with a field that was left out"""

    @property
    def hash(self) -> bytes:
        """What makes two articles the same, wherever they were found."""
        return hashlib.sha256(f"{self.title}\0{self.text}".encode()).digest()


class Rejected(ValueError):
    """Why a row is left out."""


def plain(value: object, what: str, lines: bool = False) -> str:
    """A text without what PostgreSQL or a page cannot hold: control characters, lone surrogates, odd blanks."""
    if not isinstance(value, str):
        raise Rejected(f"{what} is {type(value).__name__}, not a text")
    value = value.encode("utf-8", "replace").decode()
    value = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]", " ", value.replace("\r\n", "\n").replace("\r", "\n"))
    if not lines:
        return " ".join(value.split())
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[^\S\n]*\n[^\S\n]*", "\n", re.sub(r"[^\S\n]+", " ", value))).strip()


def link(value: object) -> str | None:
    """A URL that a reader may be sent to: http or https, with a host; anything else is no link."""
    if not isinstance(value, str) or len(value) > 2000 or re.search(r"[\s\x00-\x1f<>\"\\]", value.strip()):
        return None
    try:
        parts = urllib.parse.urlsplit(value.strip())
    except ValueError:
        return None
    return value.strip() if parts.scheme.lower() in ("http", "https") and parts.hostname else None


def moment(value: object) -> datetime | None:
    """When an article was published: ISO 8601, RFC 822 or another wording of a day; UTC where no zone is named."""
    if value is None or value == "":
        return None
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return datetime.fromtimestamp(value, UTC)
        # a day of its own where the text names none, so that "Tuesday" is not taken for this week's
        found = [
            dates.parse(str(value), default=datetime(year, month, day))
            for year, month, day in ((2000, 1, 1), (2001, 2, 2))
        ]
    except (ValueError, OverflowError, TypeError, OSError):
        raise Rejected(f"published {str(value)[:40]!r} is no date; write it as 2026-03-12T06:30:00Z") from None
    if found[0].date() != found[1].date():
        raise Rejected(f"published {str(value)[:40]!r} names no whole day; write it as 2026-03-12T06:30:00Z")
    return found[0] if found[0].tzinfo else found[0].replace(tzinfo=UTC)


def article(row: object, columns: dict[str, str]) -> Article:
    """A checked article from a row; `columns` says under which name a field is found, if not its own.

    Errors:
        Rejected: the row is no object, has no text, or a field of another type.
    """
    if not isinstance(row, dict):
        raise Rejected(f"a {type(row).__name__}, not an object")
    value = {field: row.get(columns.get(field, field)) for field in FIELDS}
    if value["text"] is None:
        raise Rejected(f"no '{columns.get('text', 'text')}'; it has {', '.join(map(str, row)) or 'nothing'}"[:200])
    text = plain(value["text"], "text", lines=True)
    if not re.search(r"\w", text):
        raise Rejected("an empty text")
    if len(text) > MOST_CHARACTERS:
        raise Rejected(f"a text of {len(text):,} characters; {MOST_CHARACTERS:,} are the most")
    title = plain(value["title"] or "", "title")[:500]
    source = plain(value["source"] or "", "source")[:200]
    title = title or text.split("\n")[0][:80]
    try:
        published, remark = moment(value["published"]), ""
    except Rejected as error:  # no reason to do without the article
        published, remark = None, str(error)
    return Article(title, text, link(value["url"]), published, source, remark)


class _Text(HTMLParser):
    """The text of HTML: blocks become lines, scripts and styles go."""

    BLOCKS = frozenset("p div br li ul ol h1 h2 h3 h4 h5 h6 tr table blockquote section article pre".split())

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.hidden = [], 0

    def handle_starttag(self, tag, attributes):
        self.hidden += tag in ("script", "style")
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag):
        self.hidden -= self.hidden > 0 and tag in ("script", "style")
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data):
        if not self.hidden:
            self.parts.append(data)


def text_of(markup: str) -> str:
    """What a reader of HTML sees."""
    reader = _Text()
    reader.feed(markup)
    reader.close()
    return "".join(reader.parts)


def feed_rows(data: bytes, name: str) -> Iterator[tuple[str, dict]]:
    """The entries of an RSS or Atom file, as rows. Nothing is fetched: what an entry says of itself is its text."""
    feed = feedparser.parse(BytesIO(data))  # bytes in a file object: a string might be taken for an address
    if not feed.version:
        raise UserError(f"{name}: neither RSS nor Atom: {feed.get('bozo_exception') or 'no feed in it'}")
    own = [one.get("href", "") for one in feed.feed.get("links", []) if one.get("rel") == "self"]
    base = next(filter(link, [*own, feed.feed.get("link")]), "")  # for links that say only where on the site they lead
    for number, entry in enumerate(feed.entries, 1):
        body = entry.content[0].value if entry.get("content") else entry.get("summary", "")
        date = entry.get("published") or entry.get("updated")
        title = html.unescape(text_of(entry.get("title", "")))
        url = urllib.parse.urljoin(base, entry.get("link", ""))
        row = {"title": title, "text": text_of(body), "url": url, "published": date}
        yield f"{name}, entry {number}", {**row, "source": feed.feed.get("title", "")}


def files(paths: list[str]) -> list[Path]:
    """The files to read: those named, and of folders all that end in a known way, in the order of their names."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(LINES + FEEDS))
            if not inside:
                raise UserError(f"{path}: no file in it ends in {', '.join(LINES + FEEDS)}")
            found += inside
        elif not path.exists():
            raise UserError(f"{path}: no such file or folder")
        else:
            found.append(path)
    return found


def rows(path: Path) -> Iterator[tuple[str, object]]:
    """Where a row stands, and the row; for a line that is no JSON, `Rejected` in its place."""
    try:
        if path.name.endswith(FEEDS):
            yield from feed_rows(path.read_bytes(), str(path))
            return
        with gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield f"{path}:{number}", json.loads(line)
                    except (ValueError, RecursionError):
                        yield f"{path}:{number}", Rejected("not JSON")
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def add(database: Database, embedder: Embedder, batch: list[Article]) -> Counter:
    """Put articles into the collection, in one transaction; an article that is there changes nothing.

    One with a known URL and another text takes the old one's place. One with a known title and text under another URL
    is the same article.

    Returns:
        how many are "new", "changed" or "known", and the "passages" written.
    """

    def news(connection) -> list[Article]:
        known = "SELECT url, hash FROM articles WHERE hash = ANY(%s)"
        hashes = {bytes(row["hash"]) for row in connection.execute(known, [[a.hash for a in batch]])}
        fresh = {}
        for entry in batch:
            if entry.hash not in hashes:
                hashes.add(entry.hash)
                fresh[entry.url or entry.hash] = entry  # of two versions under one URL, the later
        return list(fresh.values())

    fresh = database.run(news)
    pieces = [(at, *span) for at, a in enumerate(fresh) for span in split(a.text, PASSAGE, embedder.lengths)]
    titled = [f"{fresh[at].title}\n{fresh[at].text[start:stop]}" for at, start, stop in pieces]
    vectors = embedder.embed(titled) if titled else np.zeros((0, embedder.dimension))

    def write(connection) -> Counter:
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])  # one writer: no deadlocks over lexemes
        counts, ids = Counter(known=len(batch) - len(fresh)), []
        for entry in fresh:
            if connection.execute("SELECT 1 FROM articles WHERE hash = %s", [entry.hash]).fetchone():
                ids.append(None)  # another process was faster, or this one before the connection was lost
                counts["known"] += 1
                continue
            gone = connection.execute("DELETE FROM articles WHERE url = %s RETURNING id", [entry.url]).fetchone()
            counts["changed" if gone else "new"] += 1
            written = connection.execute(
                "INSERT INTO articles (url, hash, title, text, source, published) VALUES (%s, %s, %s, %s, %s, %s) "
                "RETURNING id",
                [entry.url, entry.hash, entry.title, entry.text, entry.source, entry.published],
            )
            ids.append(written.fetchone()["id"])
        values = [
            (ids[at], start, stop, fresh[at].published, fresh[at].title, fresh[at].text[start:stop], vector)
            for (at, start, stop), vector in zip(pieces, vectors)
            if ids[at] is not None
        ]
        counts["passages"] = len(values)
        if values:  # one statement: the trigger that counts lexemes runs once
            connection.execute(
                "INSERT INTO chunks (article, start, stop, published, words, embedding) "
                "SELECT article, start, stop, published, "
                "setweight(to_tsvector('english', title), 'A') || setweight(to_tsvector('english', body), 'B'), "
                "embedding FROM unnest(%s::bigint[], %s::int[], %s::int[], %s::timestamptz[], %s::text[], %s::text[], "
                "%s::vector[]) AS new (article, start, stop, published, title, body, embedding)",
                [list(column) for column in zip(*values)],
            )
        return counts

    return database.run(write)


def prepare(database: Database, embedder: Embedder) -> None:
    """Record the embedding model and its dimension at the first ingestion, with the index that they need; later, check.

    Errors:
        UserError: the collection was embedded by another model.
    """

    def work(connection):
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
        here = {row["name"]: row["value"] for row in connection.execute("SELECT name, value FROM settings")}
        if here:
            return here
        for name, value in (("embedding model", embedder.name), ("dimension", str(embedder.dimension))):
            connection.execute("INSERT INTO settings (name, value) VALUES (%s, %s)", [name, value])
        size = sql.Literal(embedder.dimension)
        connection.execute(sql.SQL("ALTER TABLE chunks ALTER COLUMN embedding TYPE vector({})").format(size))
        connection.execute("CREATE INDEX chunks_embedding ON chunks USING hnsw (embedding vector_cosine_ops)")
        return None

    here = database.run(work)
    if here and (here["embedding model"], here["dimension"]) != (embedder.name, str(embedder.dimension)):
        raise UserError(
            f"the collection was embedded by {here['embedding model']} ({here['dimension']} numbers a passage), not by "
            f"{embedder.name} ({embedder.dimension}): give --embedding-model {here['embedding model']}, or ingest into "
            f"another database (--data)"
        )


def ingest(
    database: Database, embedder: Embedder, paths: list[str], columns: dict[str, str], batch_size: int = 64
) -> Counter:
    """Read files and add their articles, with a progress bar; rows that cannot be used are named and left out.

    Killed at any moment, it can be started again: each batch is there as a whole or not at all.
    """
    unknown = sorted(set(columns) - set(FIELDS))
    if unknown:
        raise UserError(f"--columns {unknown[0]}=...: no such field; there are {', '.join(FIELDS)}")
    found, counts, batch, began = files(paths), Counter(), [], time.monotonic()
    prepare(database, embedder)
    with tqdm(desc="articles", unit=" articles", dynamic_ncols=True, mininterval=0.5) as bar:
        for path in found:
            bar.set_postfix_str(path.name, refresh=False)
            for where, row in rows(path):
                try:
                    if isinstance(row, Rejected):
                        raise row
                    batch.append(article(row, columns))
                    if batch[-1].remark:
                        counts["undated"] += 1
                        if counts["undated"] <= 5:
                            bar.write(f"without a date: {where}: {batch[-1].remark}")
                except Rejected as error:
                    counts["left out"] += 1
                    if counts["left out"] <= 5:
                        bar.write(f"left out: {where}: {error}")
                if len(batch) == batch_size:
                    counts += add(database, embedder, batch)
                    bar.update(len(batch))
                    batch = []
        if batch:
            counts += add(database, embedder, batch)
            bar.update(len(batch))
    counts["seconds"] = time.monotonic() - began
    return counts

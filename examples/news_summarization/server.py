"""The API and the page: questions in, cited summaries out, choices kept."""

import asyncio
import json
import logging
import random
import re
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import psycopg
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from psycopg.types.json import Jsonb
from psycopg_pool import PoolTimeout
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.exceptions import HTTPException as StarletteHTTPException

import learn
import retrieval
from common.cli import UserError
from database import HERE, Database
from embedding import Embedder
from ingest import Rejected, plain
from summaries import load, relevant

MOST_BYTES = 16_384  # of a request
LOST = (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout)
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Strict(BaseModel):
    """A request's body; a field that is not known is an error."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, hide_input_in_errors=True)


class Ask(Strict):
    """A question."""

    query: Annotated[str, StringConstraints(min_length=1, max_length=500)]
    k: Annotated[int, Field(ge=1, le=20, strict=True)] = 5
    since: Annotated[date | None, Field(alias="from")] = None
    until: Annotated[date | None, Field(alias="to", lt=date.max)] = None  # which has no day after it


class Choice(Strict):
    """Which of the two summaries is better."""

    ask: uuid.UUID
    chosen: Literal[0, 1]


class Rating(Strict):
    """A thumb up or down for one summary."""

    ask: uuid.UUID
    summary: Literal[0, 1]
    rating: Literal[-1, 1]


class Served:
    """The summariser that is served, which follows the registry while the server runs."""

    def __init__(self, database: Database, embedder: Embedder, path: str | None = None):
        """Load `path`, whatever the registry says, or the registered model and whatever becomes active later."""
        self.database, self.embedder, self.fixed = database, embedder, path is not None
        row = None if self.fixed else learn.active(database)
        self.version = row and row["version"]
        self.summariser = load(path, path or "", embedder) if self.fixed else self._load(row)
        self._stop = threading.Event()
        if not self.fixed:
            threading.Thread(target=self._follow, daemon=True).start()

    def _load(self, row: dict | None):
        return load(row and row["path"], f"version {row['version']}" if row else "", self.embedder)

    def _follow(self) -> None:
        while not self._stop.wait(2):
            try:
                row = learn.active(self.database)
                if (row and row["version"]) != self.version:
                    self.summariser = self._load(row)  # answers go on by the old one meanwhile
                    self.version = row and row["version"]
                    print(f"now serving {self.summariser.name}", flush=True)
            except (psycopg.Error, PoolTimeout):
                pass  # asked again in two seconds
            except UserError as error:
                print(f"error: {error}; still serving {self.summariser.name}", flush=True)
                self.version = row and row["version"]

    def stop(self) -> None:
        """End the thread that follows the registry."""
        self._stop.set()


def answer(database: Database, embedder: Embedder, summariser, query: str, k: int = 5, since=None, until=None) -> dict:
    """What `/api/ask` returns: passages, and up to two summaries of them; stored, so that a choice can refer to it.

    Args:
        since, until: days, both included; None: no bound.
    """
    began = time.monotonic()
    first = since and datetime(since.year, since.month, since.day, tzinfo=UTC)
    last = until and datetime(until.year, until.month, until.day, tzinfo=UTC) + timedelta(days=1)
    passages = retrieval.search(database, embedder, query, k, first, last, patience=3)
    shown = [
        {"number": number, "title": p.title, "source": p.source, "published": p.published and p.published.isoformat(),
         "url": p.url, "text": p.text, "score": round(p.score, 5), "similarity": round(p.similarity, 4), "used": False,
         "article": p.article, "start": p.start, "stop": p.stop}
        for number, p in enumerate(passages, 1)
    ]  # fmt: skip
    found = {"ask": None, "query": query, "answered": False, "message": "", "summaries": [], "passages": shown}
    dated = " between these dates" if since or until else ""
    if not passages:
        found["message"] = f"The collection has no article{dated}." if dated else "The collection is empty."
    elif not relevant(passages):
        found["message"] = f"The collection has nothing{dated} that answers this question."
    else:
        prompt, used = summariser.prompt(query, passages)
        summaries = [{**asdict(s), "text": s.text} for s in summariser.write(query, passages[:used])]
        # by chance, or what readers like of the left side would be taken for what they like of a model; but a page that
        # is loaded again shows the same
        random.Random(query).shuffle(summaries)
        for summary in summaries:
            summary["sentences"] = [
                {"text": text, "citations": list(numbers)} for text, numbers in summary["sentences"]
            ]
        for passage in shown:
            passage["used"] = passage["number"] <= used
        found |= {"answered": bool(summaries), "summaries": summaries, "ask": str(uuid.uuid4())}
        if not summaries:
            found["message"] = "The passages found have no sentence that could be quoted."
        columns = "INSERT INTO asks (id, query, prompt, passages, summaries) VALUES (%s, %s, %s, %s, %s)"
        values = [found["ask"], query, prompt, Jsonb(shown), Jsonb(summaries)]
        database.run(lambda connection: connection.execute(f"{columns} ON CONFLICT DO NOTHING", values), patience=3)
    return {**found, "seconds": round(time.monotonic() - began, 3)}


def choose(database: Database, ask: uuid.UUID, chosen: int) -> int:
    """Keep a choice, in place of an earlier one for the same answer; committed when this returns.

    Returns:
        how many choices there are.
    Errors:
        HTTPException 404: no such answer; 409: it has not two summaries.
    """

    def work(connection) -> int:
        row = connection.execute("SELECT jsonb_array_length(summaries) AS n FROM asks WHERE id = %s", [ask]).fetchone()
        if row is None:
            raise HTTPException(404, "no such answer; ask again")
        if row["n"] != 2:
            raise HTTPException(409, "this answer has one summary, so there is nothing to choose")
        connection.execute(
            "INSERT INTO choices (ask, chosen) VALUES (%s, %s) "
            "ON CONFLICT (ask) DO UPDATE SET chosen = excluded.chosen, made = now()",
            [ask, chosen],
        )
        return connection.execute("SELECT count(*) AS n FROM choices").fetchone()["n"]

    return database.run(work)


def rate(database: Database, ask: uuid.UUID, summary: int, rating: int) -> int:
    """Keep a thumb up (1) or down (-1), in place of an earlier one; how many there are.

    Errors:
        HTTPException 404: no such answer or summary.
    """

    def work(connection) -> int:
        row = connection.execute("SELECT jsonb_array_length(summaries) AS n FROM asks WHERE id = %s", [ask]).fetchone()
        if row is None or summary >= row["n"]:
            raise HTTPException(404, "no such answer; ask again")
        connection.execute(
            "INSERT INTO ratings (ask, summary, rating) VALUES (%s, %s, %s) "
            "ON CONFLICT (ask, summary) DO UPDATE SET rating = excluded.rating, made = now()",
            [ask, summary, rating],
        )
        return connection.execute("SELECT count(*) AS n FROM ratings").fetchone()["n"]

    return database.run(work)


def questions(connection) -> list[str]:
    """Example questions: ours as far as their articles are in the collection, else the newest titles."""
    lines = (HERE / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    ours = [row for row in map(json.loads, lines) if row["urls"]]
    urls = [url for row in ours for url in row["urls"]]
    there = {row["url"] for row in connection.execute("SELECT url FROM articles WHERE url = ANY(%s)", [urls])}
    found = [row["question"] for row in ours if there.issuperset(row["urls"])]
    newest = "SELECT title FROM articles ORDER BY published DESC NULLS LAST, id LIMIT 6"
    return found[::4][:6] or [row["title"] for row in connection.execute(newest)]


class Guard:
    """ASGI middleware: refuses requests of other sites and large bodies, and adds the security headers.

    Without the check of the Host header, a page of another site could read a server on this machine by a name that it
    lets point here (DNS rebinding); without that of Origin, it could send choices.
    """

    def __init__(self, app, hosts: set[str] | None):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")

        async def respond(message):
            if message["type"] == "http.response.start":
                own = {name.lower().encode(): value.encode() for name, value in HEADERS.items()}
                message["headers"] = [
                    *(pair for pair in message["headers"] if pair[0].lower() not in own),
                    *own.items(),
                ]
            await send(message)

        refusal = None
        if self.hosts is not None and re.sub(r":\d*$", "", host).lower() not in self.hosts:
            refusal = 421, f"this server is not called {host[:60]!r}; --allow-host lets it be"
        elif origin and origin.split("://")[-1] != host and scope["method"] not in ("GET", "HEAD"):
            refusal = 403, "requests from pages of other sites are refused"
        if refusal is None and scope["method"] == "POST":
            if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
                refusal = 415, "send JSON, with Content-Type: application/json"
            else:
                body = b""
                while len(body) <= MOST_BYTES:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if not message.get("more_body"):
                        break
                if len(body) > MOST_BYTES:
                    refusal = 413, f"a request may have {MOST_BYTES:,} bytes"
                given = [{"type": "http.request", "body": body}]
                pending, receive = receive, lambda: _next(given, pending)
        if refusal:
            return await JSONResponse({"error": refusal[1]}, refusal[0])(scope, receive, respond)
        return await self.app(scope, receive, respond)


async def _next(given: list, receive: Callable):
    return given.pop() if given else await receive()


def make_app(
    database: Database, embedder: Embedder, served: Served, hosts: set[str] | None, threads: int = 2
) -> FastAPI:
    """The application.

    Args:
        hosts: names by which the server may be called; None: any.
        threads: how many questions are answered at once. Others wait; when 16 do for each thread, more are refused.
    """
    # Apart, so that models, choices that wait for a database, and the health check do not keep each other waiting
    thinking, writing, looking = (
        ThreadPoolExecutor(n, name) for n, name in ((threads, "ask"), (6, "write"), (2, "look"))
    )
    waiting = 0

    async def off_loop(pool: ThreadPoolExecutor, work: Callable, *arguments):
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, partial(work, *arguments))
        except (HTTPException, *LOST):
            raise
        except Exception:  # left to Starlette, it would also end the connection
            logging.getLogger("uvicorn.error").exception("a request failed")
            raise HTTPException(500, "the server failed; its log says why") from None

    @asynccontextmanager
    async def lifespan(app):
        yield
        served.stop()
        thinking.shutdown(cancel_futures=True)
        writing.shutdown()
        looking.shutdown()

    app = FastAPI(title="News with citations", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, hosts=hosts)

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: StarletteHTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:] if isinstance(part, str))
        return JSONResponse({"error": f"{where + ': ' if where else ''}{first['msg']}"[:300]}, 422)

    async def away(request: Request, error: Exception):
        return JSONResponse({"error": "the database cannot be reached; try again"}, 503, headers={"Retry-After": "2"})

    for lost in LOST:
        app.add_exception_handler(lost, away)

    @app.post("/api/ask")
    async def ask(body: Ask):
        """A question's answer: cited summaries and the passages."""
        nonlocal waiting
        try:
            query = plain(body.query, "query")
        except Rejected as error:
            raise HTTPException(422, str(error)) from None
        if not query:
            raise HTTPException(422, "query: empty")
        if body.since and body.until and body.since > body.until:
            raise HTTPException(422, "from: later than to")
        if waiting >= 17 * threads:
            raise HTTPException(503, "too many questions at once; try again", headers={"Retry-After": "2"})
        waiting += 1
        try:
            given = (database, embedder, served.summariser, query, body.k, body.since, body.until)
            return await off_loop(thinking, answer, *given)
        finally:
            waiting -= 1

    @app.post("/api/choices")
    async def choices(body: Choice):
        """Keep a choice: it is in the database when this answers."""
        return {"choices": await off_loop(writing, choose, database, body.ask, body.chosen)}

    @app.post("/api/ratings")
    async def ratings(body: Rating):
        """Keep a thumb."""
        return {"ratings": await off_loop(writing, rate, database, body.ask, body.summary, body.rating)}

    @app.get("/api/improve")
    async def improve():
        """How many choices there are, and who writes the summaries."""

        def work(connection):
            counts = "SELECT (SELECT count(*) FROM choices) AS choices, (SELECT count(*) FROM ratings) AS ratings"
            return {**connection.execute(counts).fetchone(), "questions": questions(connection)}

        found = await off_loop(looking, database.run, work, 1)
        return {**found, "needed": learn.NEEDED, "model": served.summariser.name}

    @app.get("/api/health")
    async def health():
        """Whether this works, which model it serves and of how many articles."""

        def work(connection):
            return connection.execute(
                "SELECT (SELECT count(*) FROM articles) AS articles, "
                "coalesce((SELECT chunks FROM lexemes WHERE lexeme = ''), 0) AS passages"
            ).fetchone()

        counts = await off_loop(looking, database.run, work, 0)
        return {"status": "ok", "model": served.summariser.name, **counts, "embedding_model": embedder.name}

    @app.get("/")
    async def page():
        """The page."""
        return FileResponse(HERE / "page" / "index.html")

    app.mount("/page", StaticFiles(directory=Path(HERE / "page")))
    return app


def serve(app: FastAPI, sockets: list) -> None:
    """Serve until SIGINT or SIGTERM; requests under way are finished."""
    import uvicorn

    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=10, server_header=False
    )
    uvicorn.Server(config).run(sockets=sockets)

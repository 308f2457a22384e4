"""The figures of README.md. Data sets are JSON lines with their own columns, as a user has them.

python benchmark.py articles --out DIR NAME=FILE...        rows of data sets as JSON lines that news.py ingests
python benchmark.py retrieval --data FOLDER QUESTIONS      recall@5 and MRR by vector, text and both
python benchmark.py relevance --data FOLDER QUESTIONS      how near answers are, for the bounds in summaries.py
python benchmark.py latency --data FOLDER QUESTIONS        queries' p50 and p95, one after the other and four at once
python benchmark.py enlarge --data FOLDER --passages N TEXTS...   fill a collection up with further texts
"""

import argparse
import gzip
import json
import sys
import threading
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import retrieval  # noqa: E402
import summaries  # noqa: E402
from database import Database  # noqa: E402
from embedding import Embedder  # noqa: E402


def read(path: str) -> list[dict]:
    """Rows of a file of JSON lines, gzipped or not."""
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def articles(args) -> None:
    """Each row with the URL https://NAME.example/ID, by which questions name their answers."""
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for given in args.files:
        name, path = given.split("=", 1)
        out = Path(args.out) / f"{name}-{Path(path).name.split('.')[0]}.jsonl"
        rows = read(path)
        with open(out, "w", encoding="utf-8") as file:
            for number, row in enumerate(rows):
                one = {"title": row.get("title") or "", "text": row["article"], "source": row.get("source") or name}
                one |= {
                    "url": f"https://{name}.example/{row.get('id') or f'{out.stem}-{number}'}",
                    "published": row.get("date"),
                }
                file.write(json.dumps(one) + "\n")
        print(f"{len(rows)} rows in {out}")


def answers(row: dict) -> set[str]:
    """The last part of the URLs of the articles that answer a question."""
    return set(row.get("article_ids") or [url.rsplit("/", 1)[-1] for url in row["urls"]])


def interval(values: np.ndarray) -> str:
    """A mean with its 95 % interval by a bootstrap over questions."""
    draws = np.random.default_rng(1).choice(values, (10_000, len(values))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{values.mean():.3f} ({low:.3f} to {high:.3f})"


def ask_all(database, embedder, rows: list[dict], mode: str, k: int) -> list[list[retrieval.Passage]]:
    """Passages of each question, at most one of an article: then recall@5 means five articles."""
    return [retrieval.search(database, embedder, row["question"], k, mode=mode, per_article=1) for row in rows]


def measure_retrieval(args, database, embedder) -> None:
    """Recall@5: the share of questions with an answering article among five. MRR: the mean of 1 / its rank in ten."""
    rows = [row for row in read(args.questions) if answers(row)]
    print(f"| {len(rows)} questions | recall@5 | MRR@10 |\n|---|---|---|")
    for mode in ("vector", "text", "hybrid"):
        ranks = []
        for row, found in zip(rows, ask_all(database, embedder, rows, mode, 10)):
            urls = [(p.url or "").rsplit("/", 1)[-1] for p in found]
            ranks.append(min((urls.index(one) + 1 for one in answers(row) if one in urls), default=np.inf))
        ranks = np.array(ranks)
        print(f"| {mode} | {interval((ranks <= 5).astype(float))} | {interval(1 / ranks)} |")


def measure_relevance(args, database, embedder) -> None:
    """The best similarity and coverage of each question, those without an answer in the collection last."""
    rows = sorted(read(args.questions), key=lambda row: not answers(row))
    right = {True: [], False: []}
    for row, found in zip(rows, ask_all(database, embedder, rows, "hybrid", 5)):
        says = summaries.relevant(found)
        right[bool(answers(row))].append(says)
        near, share = max(p.similarity for p in found), max(p.coverage for p in found)
        there, said = "answer" if answers(row) else "none  ", "yes" if says else "no "
        print(f"{there} {said} {near:.2f} {share:.2f} {row['question']}")
    for name, says in (("with an answer", right[True]), ("without one", right[False])):
        print(f"{sum(says)} of {len(says)} questions {name} are answered")


def measure_latency(args, database, embedder) -> None:
    """Milliseconds of `search`, embedding included, and of a whole answer with its two extractive summaries."""
    from server import answer

    questions = [row["question"] for row in read(args.questions)]
    counts = "SELECT (SELECT count(*) FROM articles) AS articles, (SELECT count(*) FROM chunks) AS passages"
    print(database.run(lambda c: c.execute(counts).fetchone()))
    summariser = summaries.Extractive(embedder)
    ways = {
        "embedding": lambda q: embedder.embed([q]),
        "vector": lambda q: retrieval.search(database, embedder, q, mode="vector"),
        "text": lambda q: retrieval.search(database, embedder, q, mode="text"),
        "hybrid": lambda q: retrieval.search(database, embedder, q),
        "whole answer": lambda q: answer(database, embedder, summariser, q),
    }
    print("| | p50 ms | p95 ms |\n|---|---|---|")
    for name, way in ways.items():
        for question in questions[:5]:
            way(question)
        print(f"| {name} | {percentiles(timed(way, questions * args.rounds))} |")
    lists = [[] for _ in range(4)]
    work = lambda into: into.extend(timed(ways["hybrid"], questions * args.rounds))
    threads = [threading.Thread(target=work, args=[into]) for into in lists]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"| hybrid, four at once | {percentiles(sum(lists, []))} |")


def timed(way, questions: list[str]) -> list[float]:
    """Milliseconds of each."""
    found = []
    for question in questions:
        began = time.perf_counter()
        way(question)
        found.append(1000 * (time.perf_counter() - began))
    return found


def percentiles(values: list[float]) -> str:
    """Median and 95th percentile."""
    return " | ".join(f"{value:.1f}" for value in np.quantile(values, [0.5, 0.95]))


def enlarge(args, database, embedder) -> None:
    """Fill up to N passages with other texts, in pieces of 110 words. Their vectors are real ones of the collection,
    turned a little (by noise a fifth as long), since embedding them all takes an hour here; index, text search and rows
    are what they would be."""
    rng = np.random.default_rng(1)
    fetch = lambda c: c.execute("SELECT embedding FROM chunks").fetchall()
    base = np.array([row["embedding"].to_numpy() for row in database.run(fetch)], np.float32)
    missing, began, insert = args.passages - len(base), time.monotonic(), []
    texts = (row["text"] for path in args.files for row in read(path))
    for number, text in enumerate(texts):
        words = text.split()
        insert.append(
            (f"https://more.example/{number}", [" ".join(words[at : at + 110]) for at in range(0, len(words), 110)])
        )
        if sum(len(pieces) for _, pieces in insert) < 1000:
            continue
        work = lambda c: write(c, insert, base, rng)
        missing -= database.run(work)
        insert = []
        print(f"{missing} to go, {time.monotonic() - began:.0f} s", flush=True)
        if missing <= 0:
            break
    database.run(lambda c: c.execute("ANALYZE chunks"))


def write(connection, rows: list[tuple[str, list[str]]], base: np.ndarray, rng) -> int:
    """One transaction of `enlarge`; how many passages it wrote."""
    made = []
    for url, pieces in rows:
        connection.execute(
            "INSERT INTO articles (url, hash, title, text, source) VALUES (%s, sha256(%s), %s, %s, 'more')",
            [url, url.encode(), pieces[0][:60], " ".join(pieces)],
        )
        at = 0
        for piece in pieces:
            made.append((url, at, at + len(piece), piece))
            at += len(piece) + 1
    vectors = base[rng.integers(len(base), size=len(made))]
    vectors = vectors + 0.2 / np.sqrt(vectors.shape[1]) * rng.standard_normal(vectors.shape).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    connection.execute(
        "INSERT INTO chunks (article, start, stop, words, embedding) "
        "SELECT a.id, start, stop, to_tsvector('english', body), embedding "
        "FROM unnest(%s::text[], %s::int[], %s::int[], %s::text[], %s::vector[]) "
        "AS new (link, start, stop, body, embedding) JOIN articles AS a ON a.url = link",
        [*(list(column) for column in zip(*made)), list(vectors)],
    )
    return len(made)


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("articles")
    one.add_argument("--out", required=True)
    one.add_argument("files", nargs="+", metavar="NAME=FILE")
    one.set_defaults(work=articles)
    for work in (measure_retrieval, measure_relevance, measure_latency):
        one = commands.add_parser(work.__name__.split("_")[1])
        one.add_argument("--data", required=True)
        one.add_argument("--rounds", type=int, default=10)
        one.add_argument("questions")
        one.set_defaults(work=work)
    one = commands.add_parser("enlarge")
    one.add_argument("--data", required=True)
    one.add_argument("--passages", type=int, default=150_000)
    one.add_argument("files", nargs="+")
    one.set_defaults(work=enlarge)
    args = parser.parse_args()
    if args.work is articles:
        return articles(args)
    with Database(None, args.data) as database:
        args.work(args, database, Embedder())


if __name__ == "__main__":
    main()

"""Hybrid retrieval: nearest vectors and BM25 over lexemes, joined by reciprocal rank fusion."""

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from psycopg import Connection, sql

from database import Database
from embedding import Embedder

DEPTH = 50  # how many passages each of the two ways brings
RRF = 60  # Cormack, Clarke and Büttcher 2009: 1 / (60 + rank)
MOST_MATCHES = 5000  # passages that a question's rarer words may match, before its common ones are left out
K1, B = 1.2, 0.75  # BM25's


@dataclass
class Passage:
    """A passage as it was found."""

    chunk: int
    article: int
    start: int
    stop: int
    title: str
    text: str
    url: str | None
    source: str
    published: datetime | None
    score: float
    """the sum of 1 / (60 + rank) over the ways that found it; it orders, and has no other meaning"""
    similarity: float
    """cosine between question and passage"""
    coverage: float
    """the share of the question's lexemes, weighted by their rarity, that the passage has"""


def _within(since: datetime | None, until: datetime | None) -> tuple[sql.Composable, list]:
    """The filter by date as SQL: from `since` on, before `until`; TRUE leaves the vector index alone."""
    parts, values = [sql.SQL("TRUE")], []
    for word, value in ((">=", since), ("<", until)):
        if value is not None:
            parts.append(sql.SQL("published {} %s").format(sql.SQL(word)))
            values.append(value)
    return sql.SQL(" AND ").join(parts), values


def by_vector(connection: Connection, vector, since=None, until=None, depth: int = DEPTH) -> list[int]:
    """Ids of the passages nearest to a unit vector (dimension,), best first."""
    within, values = _within(since, until)
    # as many candidates as are asked for, and further ones where the filter leaves too few
    connection.execute("SELECT set_config('hnsw.ef_search', %s, true)", [str(max(100, 2 * depth))])
    connection.execute("SET LOCAL hnsw.iterative_scan = strict_order")
    query = sql.SQL("SELECT id FROM chunks WHERE {} ORDER BY embedding <=> %s LIMIT %s").format(within)
    return [row["id"] for row in connection.execute(query, [*values, vector, depth], prepare=False)]


def weights(connection: Connection, query: str) -> dict[str, tuple[float, int]]:
    """BM25's inverse document frequency of each lexeme of a question, and in how many passages it occurs."""
    found = connection.execute(
        "SELECT q.lexeme, coalesce(l.chunks, 0) AS chunks, "
        "coalesce((SELECT chunks FROM lexemes WHERE lexeme = ''), 0) AS total "
        "FROM unnest(to_tsvector('english', %s)) AS q LEFT JOIN lexemes AS l USING (lexeme)",
        [query],
    ).fetchall()
    return {
        row["lexeme"]: (math.log(1 + (row["total"] - row["chunks"] + 0.5) / (row["chunks"] + 0.5)), row["chunks"])
        for row in found
    }


def by_text(
    connection: Connection, lexemes: dict[str, tuple[float, int]], since=None, until=None, depth: int = DEPTH
) -> list[int]:
    """Ids of the passages with the highest BM25 score among those that have one of the rarer of some lexemes."""
    known = {lexeme: found for lexeme, found in lexemes.items() if found[1]}
    rare, matches = [], 0
    for lexeme in sorted(known, key=lambda lexeme: known[lexeme][1]):
        matches += known[lexeme][1]
        if rare and matches > MOST_MATCHES:
            break
        rare.append(lexeme)
    if not rare:
        return []
    within, values = _within(since, until)
    # first the sum of the weights that a passage has, which needs no positions; then BM25 for the best of them
    scored = sql.SQL(
        "WITH matching AS MATERIALIZED ("
        "  SELECT id, words FROM chunks WHERE words @@ "
        "  array_to_string(ARRAY(SELECT quote_literal(unnest(%s::text[]))), ' | ')::tsquery AND {}),"
        "weights AS (SELECT * FROM unnest(%s::text[], %s::float8[]) AS w (lexeme, idf)),"
        "best AS (SELECT id, words FROM matching ORDER BY "
        "  (SELECT sum(idf) FROM weights WHERE words @@ quote_literal(lexeme)::tsquery) DESC, id LIMIT %s),"
        "mean AS (SELECT avg(length(words)) AS length FROM best) "
        "SELECT best.id FROM best, mean, unnest(best.words) AS u JOIN weights USING (lexeme) "
        "GROUP BY best.id, best.words, mean.length "
        "ORDER BY sum(idf * cardinality(u.positions) * {k} / (cardinality(u.positions) "
        "  + {k1} * (1 - {b} + {b} * length(best.words) / mean.length))) DESC, best.id LIMIT %s"
    ).format(within, k=sql.Literal(K1 + 1), k1=sql.Literal(K1), b=sql.Literal(B))
    idfs = [known[lexeme][0] for lexeme in known]
    given = [rare, *values, list(known), idfs, 4 * depth, depth]
    return [row["id"] for row in connection.execute(scored, given, prepare=False)]


def fuse(*rankings: list[int]) -> dict[int, float]:
    """Reciprocal rank fusion: id -> sum of 1 / (60 + rank), best first; ties in the order of the first ranking."""
    scores = {}
    for ranking in rankings:
        for rank, one in enumerate(ranking, 1):
            scores[one] = scores.get(one, 0.0) + 1 / (RRF + rank)
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


def search(
    database: Database,
    embedder: Embedder,
    query: str,
    k: int = 5,
    since: datetime | None = None,
    until: datetime | None = None,
    mode: Literal["hybrid", "vector", "text"] = "hybrid",
    per_article: int = 2,
    patience: float | None = None,
) -> list[Passage]:
    """The k best passages for a question, at most `per_article` of one article, best first."""
    vector = embedder.embed([query])[0]

    def work(connection: Connection) -> list[Passage]:
        rankings = [by_vector(connection, vector, since, until)] if mode != "text" else []
        lexemes = weights(connection, query)
        rankings += [by_text(connection, lexemes, since, until)] if mode != "vector" else []
        scores = fuse(*rankings)
        idf = {lexeme: found[0] for lexeme, found in lexemes.items()}
        rows = connection.execute(
            "SELECT c.id AS chunk, c.article, c.start, c.stop, a.title, "
            "substr(a.text, c.start + 1, c.stop - c.start) AS text, "
            "a.url, a.source, a.published, 1 - (c.embedding <=> %s) AS similarity, "
            "(SELECT coalesce(sum(idf), 0) FROM unnest(%s::text[], %s::float8[]) AS w (lexeme, idf) "
            " WHERE c.words @@ quote_literal(lexeme)::tsquery) AS matched "
            "FROM chunks AS c JOIN articles AS a ON a.id = c.article WHERE c.id = ANY(%s)",
            [vector, list(idf), list(idf.values()), list(scores)],
        ).fetchall()
        rows = {row["chunk"]: row for row in rows}
        found, taken = [], {}
        for chunk, score in scores.items():
            if chunk not in rows:  # its article was replaced meanwhile
                continue
            row = rows[chunk]
            taken[row["article"]] = taken.get(row["article"], 0) + 1
            if taken[row["article"]] <= per_article and len(found) < k:
                coverage = row.pop("matched") / (sum(idf.values()) or 1)
                found.append(Passage(**row, score=score, coverage=coverage))
        return found

    return database.run(work, patience)

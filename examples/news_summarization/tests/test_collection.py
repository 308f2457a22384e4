"""Ingestion and retrieval on the real PostgreSQL, against plain Python over all passages."""

import gzip
import json
import math
import threading
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psycopg
import pytest

import database as module
import ingest
import retrieval
from common.cli import UserError
from database import Database, migrate

HERE = Path(__file__).resolve().parent
ARTICLES = HERE.parent / "articles.jsonl"


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def rows_of(database, query, *values):
    return database.run(lambda connection: connection.execute(query, values).fetchall())


def row(number=1, **fields):
    text = f"The ferry number {number} left the harbour. Fog came in over the bay."
    return {"title": f"Ferry {number}", "text": text, "url": f"https://a.example/{number}", "source": "A", **fields}


@pytest.fixture
def ours(database, embedder):
    """The articles of the example."""
    counts = ingest.ingest(database, embedder, [str(ARTICLES)], {})
    assert counts["new"] == 40 and not counts["left out"]
    return database


def state(database):
    """All that ingestion writes, but for ids and times."""
    passages = rows_of(
        database,
        "SELECT a.url, a.title, a.text, a.source, a.published, c.start, c.stop, "
        "c.published AS day, c.words::text, c.embedding "
        "FROM articles a JOIN chunks c ON c.article = a.id ORDER BY a.hash, c.start",
    )
    passages = [{**one, "embedding": one["embedding"].to_list()} for one in passages]
    return passages, rows_of(database, "SELECT * FROM lexemes WHERE chunks > 0 ORDER BY lexeme")


def test_the_same_articles_twice_change_nothing(ours, embedder):
    before = state(ours), rows_of(ours, "SELECT max(id) FROM articles")
    counts = ingest.ingest(ours, embedder, [str(ARTICLES)], {})
    assert counts["known"] == 40 and not counts["new"] and not counts["changed"]
    assert (state(ours), rows_of(ours, "SELECT max(id) FROM articles")) == before


def test_passages_are_what_their_offsets_say_and_lexemes_are_counted(ours, embedder):
    texts = {json.loads(line)["url"]: json.loads(line) for line in ARTICLES.read_text().splitlines()}
    passages, lexemes = state(ours)
    assert len({one["url"] for one in passages}) == 40 < len(passages)
    for one in passages:
        given = texts[one["url"]]
        text = given["text"][one["start"] : one["stop"]]
        assert text == text.strip() and embedder.lengths([text])[0] <= ingest.PASSAGE
        assert one["published"] == one["day"] == datetime.fromisoformat(given["published"])
        vector = embedder.embed([f"{given['title']}\n{text}"])[0]
        assert np.allclose(one["embedding"], vector, atol=1e-5)
    counted = Counter(
        lexeme["lexeme"]
        for one in passages
        for lexeme in rows_of(ours, "SELECT lexeme FROM unnest(%s::tsvector)", one["words"])
    )
    assert {one["lexeme"]: one["chunks"] for one in lexemes} == {**counted, "": len(passages)}


def test_another_text_under_a_known_url_takes_the_old_ones_place(database, embedder, tmp_path):
    ingest.ingest(database, embedder, [write(tmp_path / "a.jsonl", [row(1), row(2)])], {})
    changed = row(1, text="The harbour is closed.")
    counts = ingest.ingest(database, embedder, [write(tmp_path / "b.jsonl", [changed])], {})
    assert counts["changed"] == 1 and counts["new"] == 0
    after = state(database)
    ingest.ingest(database, embedder, [write(tmp_path / "c.jsonl", [row(2), changed])], {})
    assert state(database) == after
    found = {one["lexeme"]: one["chunks"] for one in after[1]}
    assert found[""] == 2 and found["fog"] == 1 and found["close"] == 1  # the old one's words are taken off


def test_the_same_text_under_another_url_is_the_same_article(database, embedder, tmp_path):
    rows = [row(1), row(1, url="https://b.example/1"), row(1, url=None), {**row(2), "title": ""}]
    counts = ingest.ingest(database, embedder, [write(tmp_path / "a.jsonl", rows)], {})
    assert (counts["new"], counts["known"]) == (2, 2)
    assert [one["title"] for one in rows_of(database, "SELECT title FROM articles ORDER BY id")] == [
        "Ferry 1",
        "The ferry number 2 left the harbour. Fog came in over the bay.",  # the text's beginning stands in for a title
    ]


def test_rows_that_cannot_be_used_are_named_and_left_out(database, embedder, tmp_path, capsys):
    good = row(7, text="A\u0000 letter \ud800 that cannot be stored.\r\n\r\n\r\nAnother  line.", title=" Odd\ttitle ")
    rows = ["{", "[1]", {"title": "x"}, row(1, text=5), row(2, text=" \n"), row(3, published="soon"), json.dumps(good)]
    rows += [
        row(4, url="javascript:alert(1)"),
        row(5, url="https://a.example/a b"),
        row(6, published="26-FEB-1987 15:01:01.79"),
    ]
    counts = ingest.ingest(database, embedder, [write(tmp_path / "bad.jsonl", rows)], {})
    assert counts["left out"] == 5 and counts["new"] == 5 and counts["undated"] == 1
    said = capsys.readouterr()
    said = said.out + said.err
    for number, reason in enumerate(
        ["not JSON", "a list, not an object", "no 'text'", "text is int", "an empty text"], 1
    ):
        assert f"left out: {tmp_path}/bad.jsonl:{number}: {reason}" in said
    assert f"without a date: {tmp_path}/bad.jsonl:6: published 'soon' is no date" in said
    found = {one["title"]: one for one in rows_of(database, "SELECT * FROM articles")}
    assert found["Odd title"]["text"] == "A letter ? that cannot be stored.\n\nAnother line."
    assert found["Ferry 4"]["url"] is None and found["Ferry 5"]["url"] is None
    assert found["Ferry 3"]["published"] is None
    assert found["Ferry 6"]["published"] == datetime(1987, 2, 26, 15, 1, 1, 790000, UTC)


@pytest.mark.parametrize(
    "value, expected",
    [
        ("http://a.example/x?y=1#z", "http://a.example/x?y=1#z"),
        (" https://a.example ", "https://a.example"),
        ("HTTPS://A.example/", "HTTPS://A.example/"),
        ("javascript:alert(1)", None),
        ("data:text/html,x", None),
        ("//a.example/x", None),
        ("https:///x", None),
        ("https://a.example/\nx", None),
        ('https://a.example/"><script>', None),
        ("http://[bad", None),
        (7, None),
        (None, None),
    ],
)
def test_links_are_http_or_nothing(value, expected):
    assert ingest.link(value) == expected


@pytest.mark.parametrize(
    "value, expected",
    [
        ("2026-03-12T06:30:00Z", datetime(2026, 3, 12, 6, 30, tzinfo=UTC)),
        ("2026-03-12T06:30:00+02:00", datetime(2026, 3, 12, 4, 30, tzinfo=UTC)),
        ("2026-03-12", datetime(2026, 3, 12, tzinfo=UTC)),
        ("Thu, 12 Mar 2026 06:30:00 GMT", datetime(2026, 3, 12, 6, 30, tzinfo=UTC)),
        (1773297000, datetime(2026, 3, 12, 6, 30, tzinfo=UTC)),
        ("", None),
        (None, None),
    ],
)
def test_dates(value, expected):
    assert ingest.moment(value) == expected


@pytest.mark.parametrize("value", ["Tuesday", "12:30", "2026", "March 2026", "soon", True, [1], "9" * 400, 1e300])
def test_what_is_no_whole_day_is_refused(value):
    with pytest.raises(ingest.Rejected):
        ingest.moment(value)


def test_columns_folders_and_gzip(database, embedder, tmp_path):
    (tmp_path / "more").mkdir()
    with gzip.open(tmp_path / "more" / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps({"headline": "H", "article": "Rain fell all day long.", "link": "https://a.example/1"}))
    (tmp_path / "readme.txt").write_text("not an article")
    columns = {"title": "headline", "text": "article", "url": "link"}
    assert ingest.ingest(database, embedder, [str(tmp_path)], columns)["new"] == 1
    assert rows_of(database, "SELECT title, url FROM articles") == [{"title": "H", "url": "https://a.example/1"}]
    for paths, columns, words in (
        ([str(tmp_path / "nothing")], {}, "no such file"),
        ([str(tmp_path / "more")], {"texts": "a"}, "no such field"),
    ):
        with pytest.raises(UserError, match=words):
            ingest.ingest(database, embedder, paths, columns)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file in it"):
        ingest.ingest(database, embedder, [str(tmp_path / "empty")], {})
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:40])
    with pytest.raises(UserError, match="cut.jsonl.gz: cannot be read"):
        ingest.ingest(database, embedder, [str(tmp_path / "cut.jsonl.gz")], {})


def test_feeds(database, embedder, tmp_path):
    counts = ingest.ingest(database, embedder, [str(HERE / "data")], {})
    assert counts["new"] == 7 and not counts["left out"]
    found = rows_of(database, "SELECT * FROM articles ORDER BY id")
    assert all(one["source"] and "<" not in one["text"] + one["title"] and "alert(" not in one["text"] for one in found)
    assert all(one["url"] is None or one["url"].startswith("https://") for one in found)
    assert [one["url"] is None for one in found].count(True) == 1  # javascript:
    assert [one["published"] is None for one in found].count(True) == 1
    assert sum(one["url"] is not None and "//lantern.example/" in one["url"] for one in found) == 3  # relative ones too
    assert ingest.ingest(database, embedder, [str(HERE / "data")], {})["known"] == 7
    with pytest.raises(UserError, match="neither RSS nor Atom"):
        ingest.ingest(database, embedder, [write(tmp_path / "x.rss", ["<html><body>no feed</body></html>"])], {})


def test_a_feed_reads_no_other_file(database, embedder, tmp_path):
    (tmp_path / "secret").write_text("SECRET")
    feed = (
        f'<?xml version="1.0"?><!DOCTYPE rss [<!ENTITY x SYSTEM "file://{tmp_path}/secret">]>'
        '<rss version="2.0"><channel>'
        "<title>T</title><item><title>A</title><description>Text &x; here.</description></item></channel></rss>"
    )
    ingest.ingest(database, embedder, [write(tmp_path / "x.rss", [feed])], {})
    assert not any("SECRET" in one["text"] for one in rows_of(database, "SELECT text FROM articles"))


def test_killed_in_the_middle_and_started_again(database, embedder, tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [row(number) for number in range(10)])
    real, calls = embedder.embed, []

    def fails(texts):
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(texts)

    monkeypatch.setattr(embedder, "embed", fails)
    with pytest.raises(KeyboardInterrupt):
        ingest.ingest(database, embedder, [path], {}, batch_size=3)
    monkeypatch.setattr(embedder, "embed", real)
    assert rows_of(database, "SELECT count(*) AS n FROM articles")[0]["n"] == 6
    counts = ingest.ingest(database, embedder, [path], {}, batch_size=3)
    assert (counts["known"], counts["new"]) == (6, 4)


def test_two_processes_ingest_at_once(database, embedder, tmp_path):
    path = write(tmp_path / "a.jsonl", [row(number) for number in range(12)])
    counts, threads = [], []
    for _ in range(3):
        work = lambda: counts.append(ingest.ingest(database, embedder, [path], {}, batch_size=2))
        threads.append(threading.Thread(target=work))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert sum(one["new"] for one in counts) == 12 and sum(one["known"] for one in counts) == 24
    passages, lexemes = state(database)
    assert len(passages) == 12 and {"lexeme": "", "chunks": 12} in lexemes


def test_another_embedding_model_is_refused(ours, embedder, monkeypatch):
    monkeypatch.setattr(embedder, "name", "other/model")
    with pytest.raises(UserError, match="embedded by sentence-transformers/all-MiniLM-L6-v2 .384 numbers"):
        ingest.prepare(ours, embedder)
    monkeypatch.undo()
    monkeypatch.setattr(embedder, "dimension", 768)
    with pytest.raises(UserError, match="embedded by"):
        ingest.prepare(ours, embedder)


# --- retrieval --------------------------------------------------------------------------------------------------------

QUESTIONS = [json.loads(line)["question"] for line in (HERE.parent / "questions.jsonl").read_text().splitlines()]


def passages_of(database):
    rows = rows_of(database, "SELECT id, article, words::text, embedding, published FROM chunks ORDER BY id")
    return [{**one, "embedding": one["embedding"].to_numpy()} for one in rows]


def bm25(database, passages, query):
    """Scores by the formula, over all passages, with term frequencies from the tsvectors' positions."""
    lexemes = {
        one["lexeme"] for one in rows_of(database, "SELECT lexeme FROM unnest(to_tsvector('english', %s))", query)
    }
    counts = []
    for one in passages:
        parts = rows_of(database, "SELECT lexeme, cardinality(positions) AS n FROM unnest(%s::tsvector)", one["words"])
        counts.append({part["lexeme"]: part["n"] for part in parts})
    containing = {lexeme: sum(lexeme in count for count in counts) for lexeme in lexemes}
    idf = {lexeme: math.log(1 + (len(passages) - n + 0.5) / (n + 0.5)) for lexeme, n in containing.items()}
    matching = [at for at, count in enumerate(counts) if lexemes & set(count)]
    # the mean length is that of the best candidates by the sum of weights, as search takes it
    coarse = sorted(matching, key=lambda at: (-sum(idf[one] for one in lexemes & set(counts[at])), passages[at]["id"]))[
        :200
    ]
    mean = sum(len(counts[at]) for at in coarse) / max(1, len(coarse))
    scores = {}
    for at in coarse:
        norm = retrieval.K1 * (1 - retrieval.B + retrieval.B * len(counts[at]) / mean)
        tfs = {one: counts[at][one] for one in lexemes & set(counts[at])}
        scores[passages[at]["id"]] = sum(idf[one] * tf * (retrieval.K1 + 1) / (tf + norm) for one, tf in tfs.items())
    return scores, idf


def test_text_search_is_bm25(ours):
    passages = passages_of(ours)
    for query in QUESTIONS[:12]:
        scores, idf = bm25(ours, passages, query)

        def work(connection, query=query):
            lexemes = retrieval.weights(connection, query)
            return lexemes, retrieval.by_text(connection, lexemes, depth=30)

        lexemes, found = ours.run(work)
        assert {one: pytest.approx(weight) for one, (weight, _) in lexemes.items()} == idf
        expected = sorted(scores, key=lambda one: (-scores[one], one))[:30]
        assert [round(scores[one], 9) for one in found] == [round(scores[one], 9) for one in expected]


def test_vector_search_is_the_nearest(ours, embedder):
    passages = passages_of(ours)
    for query in QUESTIONS[:12]:
        vector = embedder.embed([query])[0]
        near = {one["id"]: float(one["embedding"] @ vector) for one in passages}
        found = ours.run(lambda connection, vector=vector: retrieval.by_vector(connection, vector, depth=20))
        assert [round(near[one], 6) for one in found] == [round(n, 6) for n in sorted(near.values(), reverse=True)[:20]]


def test_fusion_by_hand():
    assert retrieval.fuse([3, 1], [1, 2]) == pytest.approx({1: 1 / 62 + 1 / 61, 3: 1 / 61, 2: 1 / 62})
    assert list(retrieval.fuse([3, 1], [1, 2])) == [1, 3, 2]
    assert list(retrieval.fuse([5], [4])) == [5, 4] and retrieval.fuse() == {}


def test_search_finds_the_articles_that_answer(ours, embedder):
    lines = [json.loads(line) for line in (HERE.parent / "questions.jsonl").read_text().splitlines()]
    for line in (line for line in lines if line["urls"]):
        found = retrieval.search(ours, embedder, line["question"], 5)
        assert {one.url for one in found} & set(line["urls"]), line["question"]
        assert len(found) == 5 and max(Counter(one.article for one in found).values()) <= 2
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)


def test_similarity_and_coverage(ours, embedder):
    query = QUESTIONS[0]
    passages = passages_of(ours)
    _, idf = bm25(ours, passages, query)
    words = {one["id"]: one["words"] for one in passages}
    vectors = {one["id"]: one["embedding"] for one in passages}
    for one in retrieval.search(ours, embedder, query, 5):
        there = rows_of(ours, "SELECT lexeme FROM unnest(%s::tsvector)", words[one.chunk])
        share = sum(idf.get(part["lexeme"], 0) for part in there) / sum(idf.values())
        assert one.coverage == pytest.approx(share)
        assert one.similarity == pytest.approx(float(vectors[one.chunk] @ embedder.embed([query])[0]), abs=1e-5)


@pytest.mark.parametrize("mode", ["vector", "text", "hybrid"])
def test_the_date_filter_leaves_k_passages_and_no_others(ours, embedder, mode):
    since, until = datetime(2026, 5, 1, tzinfo=UTC), datetime(2026, 6, 1, tzinfo=UTC)
    inside = [one for one in passages_of(ours) if since <= one["published"] < until]
    found = retrieval.search(ours, embedder, "the council of Vellmouth", 20, since, until, mode, per_article=9)
    assert found and all(since <= one.published < until for one in found)
    if mode != "text":  # of which a passage may have no word
        assert {one.chunk for one in found} == {one["id"] for one in inside}
    assert retrieval.search(ours, embedder, "the council", 5, datetime(2030, 1, 1, tzinfo=UTC), None, mode) == []


def test_a_narrow_date_filter_over_many_passages(database, embedder):
    """The vector index alone would look at the nearest hundred, none of which has the date."""

    def fill(connection):
        rng = np.random.default_rng(0)
        connection.execute(
            "INSERT INTO articles (hash, title, text, source, published) SELECT sha256(n::text::bytea), 'T', 'x', '', "
            "CASE WHEN n % 250 = 0 THEN '2026-01-01' ELSE '2020-01-01' END::timestamptz FROM generate_series(1, 1500) n"
        )
        vectors = rng.standard_normal((1500, 384)).astype(np.float32)
        vectors[249::250, 0] = -20  # far from the question, unlike the others
        vectors[:, 0] += 10
        connection.execute(
            "INSERT INTO chunks (article, start, stop, published, words, embedding) "
            "SELECT a.id, 0, 1, a.published, to_tsvector('x'), v "
            "FROM unnest(%s::vector[]) WITH ORDINALITY AS new (v, n) "
            "JOIN articles a ON a.hash = sha256(n::text::bytea)",
            [list(vectors)],
        )
        connection.execute("ANALYZE chunks")

    ingest.prepare(database, embedder)
    database.run(fill)
    vector = np.eye(1, 384, dtype=np.float32)[0]
    for since in (datetime(2026, 1, 1, tzinfo=UTC), None):

        def work(connection, since=since):
            connection.execute("SET LOCAL enable_seqscan = off")
            connection.execute("SET LOCAL enable_bitmapscan = off")
            connection.execute("DROP INDEX IF EXISTS chunks_published")
            found = retrieval.by_vector(connection, vector, since, depth=5)
            connection.rollback()
            return found

        assert len(database.run(work)) == 5


@pytest.mark.parametrize(
    "query",
    [
        "'; DROP TABLE chunks; --",
        "a 'quote' & | ! <-> \\ ( :* %s {} %(x)s",
        '"',
        "the of and",
        "\u0130\u00df\u4e2d\u6587 \U0001f6a2",
        "x" * 500,
        "\\x00",
    ],
)
def test_odd_questions_are_only_questions(ours, embedder, query):
    assert len(retrieval.search(ours, embedder, query, 3)) == 3
    assert rows_of(ours, "SELECT count(*) AS n FROM articles")[0]["n"] == 40


def test_an_empty_collection(database, embedder):
    ingest.prepare(database, embedder)
    assert retrieval.search(database, embedder, "anything", 5) == []


# --- the schema -------------------------------------------------------------------------------------------------------


@pytest.fixture
def blank(opened):
    """A connection to a database without any tables."""
    with psycopg.connect(opened.pool.conninfo, autocommit=True) as admin:
        admin.execute("DROP DATABASE IF EXISTS blank WITH (FORCE)")
        admin.execute("CREATE DATABASE blank")
    info = psycopg.conninfo.make_conninfo(opened.pool.conninfo, dbname="blank")
    with psycopg.connect(info, row_factory=psycopg.rows.dict_row) as connection:
        yield connection


def test_a_database_of_the_first_version_is_brought_up_to_date(blank, tmp_path):
    names = sorted(path.name for path in (module.HERE / "migrations").glob("*.sql"))
    assert len(names) >= 3
    (tmp_path / names[0]).write_bytes((module.HERE / "migrations" / names[0]).read_bytes())
    assert migrate(blank, tmp_path) == [names[0][:-4]]
    blank.execute("INSERT INTO articles (hash, title, text, source) VALUES ('x', 'T', 'body', 's')")
    blank.execute(
        "INSERT INTO chunks (article, start, stop, words, embedding) VALUES (1, 0, 4, to_tsvector('body'), '[1,2]')"
    )
    blank.commit()
    assert migrate(blank) == [name[:-4] for name in names[1:]]
    assert migrate(blank) == []
    assert blank.execute("SELECT title FROM articles").fetchall() == [{"title": "T"}]
    assert blank.execute("SELECT count(*) AS n FROM asks").fetchone()["n"] == 0
    assert {one["lexeme"]: one["chunks"] for one in blank.execute("SELECT * FROM lexemes")} == {"": 1, "bodi": 1}


def test_a_failing_migration_leaves_nothing_behind(blank, tmp_path):
    (tmp_path / "001_a.sql").write_text("CREATE TABLE a (x int); INSERT INTO a VALUES (1);")
    (tmp_path / "002_b.sql").write_text("CREATE TABLE b (x int); INSERT INTO nowhere VALUES (1);")
    with pytest.raises(UserError, match='002_b.sql: relation "nowhere" does not exist'):
        migrate(blank, tmp_path)
    assert blank.execute("SELECT to_regclass('b') AS b, to_regclass('a') AS a").fetchone() == {"b": None, "a": "a"}
    (tmp_path / "002_b.sql").write_text("CREATE TABLE b (x int);")
    assert migrate(blank, tmp_path) == ["002_b"]


def test_newer_and_changed_migrations_are_refused(blank, tmp_path):
    (tmp_path / "001_a.sql").write_text("CREATE TABLE a (x int);")
    (tmp_path / "002_b.sql").write_text("CREATE TABLE b (x int);")
    migrate(blank, tmp_path)
    (tmp_path / "002_b.sql").unlink()
    with pytest.raises(UserError, match="newer code .migration 002_b"):
        migrate(blank, tmp_path)
    (tmp_path / "002_b.sql").write_text("CREATE TABLE b (x bigint);")
    with pytest.raises(UserError, match="002_b.sql: changed after it was applied"):
        migrate(blank, tmp_path)


def test_processes_that_start_together_migrate_once(blank):
    done, threads, info = [], [], blank.info.dsn

    def work():
        with psycopg.connect(info, row_factory=psycopg.rows.dict_row) as connection:
            done.append(migrate(connection))

    for _ in range(4):
        threads.append(threading.Thread(target=work))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert sorted(map(len, done)) == [0, 0, 0, len(list((module.HERE / "migrations").glob("*.sql")))]


def test_a_database_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="the database of DATABASE_URL cannot be reached") as error:
        Database("postgresql://someone:secret@127.0.0.1:1/none", tmp_path)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)

"""The API over real sockets, on the real PostgreSQL; the server as a command is driven by test_page.py."""

import concurrent.futures
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psutil
import pytest
import uvicorn

import ingest
import learn
import server
import summaries
from retrieval import Passage, search
from summaries import Extractive, Written, relevant
from texts import content_words, sentences

HERE = Path(__file__).resolve().parent.parent
QUESTION = "Could the Stannick reservoir have prevented the flood in Tollenby?"


class Serving:
    """An application on a port of its own, in a thread."""

    def __init__(self, app):
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, args=[[self.listener]])

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return httpx.Client(base_url=self.url, timeout=60)

    def __exit__(self, *error):
        self.server.should_exit = True
        self.thread.join()


class Fixed:
    """A summariser that serves what it is given, as `server.Served` holds one."""

    def __init__(self, summariser):
        self.summariser = summariser

    def stop(self):
        pass


@pytest.fixture
def ours(database, embedder):
    ingest.ingest(database, embedder, [str(HERE / "articles.jsonl")], {})
    return database


@pytest.fixture
def client(ours, embedder):
    with Serving(server.make_app(ours, embedder, Fixed(Extractive(embedder)), {"127.0.0.1"})) as client:
        yield client


def ask(client, query=QUESTION, **fields):
    reply = client.post("/api/ask", json={"query": query, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def one(database, query, *values):
    return database.run(lambda connection: connection.execute(query, values).fetchone())


# --- answers ----------------------------------------------------------------------------------------------------------


def test_every_sentence_cites_a_passage_that_has_it(client):
    for line in (HERE / "questions.jsonl").read_text().splitlines()[::3]:
        row = json.loads(line)
        found = ask(client, row["question"])
        if not row["urls"]:
            assert (
                not found["answered"]
                and found["summaries"] == []
                and "nothing" in found["message"]
                and not found["ask"]
            )
            continue
        assert found["answered"] and found["message"] == "" and 1 <= len(found["summaries"]) <= 2
        numbers = [passage["number"] for passage in found["passages"]]
        assert numbers == list(range(1, len(numbers) + 1))
        for summary in found["summaries"]:
            assert sum(len(sentence["text"].split()) for sentence in summary["sentences"]) <= 150
            for sentence in summary["sentences"]:
                assert sentence["citations"]
                for number in sentence["citations"]:
                    text = " ".join(found["passages"][number - 1]["text"].split())
                    assert sentence["text"] in text  # extracts are word for word
            marks = [f"{s['text']} " + " ".join(f"[{n}]" for n in s["citations"]) for s in summary["sentences"]]
            assert summary["text"] == " ".join(marks)
        texts = [summary["text"] for summary in found["summaries"]]
        assert len(set(texts)) == len(texts)


def test_passages_say_where_they_are_from(client):
    found = ask(client, k=3)
    articles = {a["url"]: a for a in map(json.loads, (HERE / "articles.jsonl").read_text().splitlines())}
    assert len(found["passages"]) == 3
    for passage in found["passages"]:
        given = articles[passage["url"]]
        assert given["text"][passage["start"] : passage["stop"]] == passage["text"]
        assert (passage["title"], passage["source"]) == (given["title"], given["source"])
        assert datetime.fromisoformat(passage["published"]) == datetime.fromisoformat(given["published"])
        assert passage["used"] is True and 0 < passage["score"] < 0.04 and -1 <= passage["similarity"] <= 1


def test_days_are_included_at_both_ends(client):
    everything = ask(client, "council of Vellmouth", k=20)["passages"]
    day = everything[0]["published"][:10]
    found = ask(client, "council of Vellmouth", k=20, **{"from": day, "to": day})["passages"]
    assert found and {passage["published"][:10] for passage in found} == {day}
    late = ask(client, **{"from": "2030-01-01"})
    assert not late["answered"] and late["message"] == "The collection has no article between these dates."


def test_neither_kind_of_summary_stands_always_on_one_side(client, ours, embedder):
    rows = map(json.loads, (HERE / "questions.jsonl").read_text().splitlines())
    sides = []
    for question in [row["question"] for row in rows if row["urls"]][:12]:
        found = ask(client, question)["summaries"]
        _, used = Extractive(embedder).prompt(question, passages := search(ours, embedder, question, 5))
        written = [summary.text for summary in Extractive(embedder).write(question, passages[:used])]
        assert {summary["text"] for summary in found} == set(written)
        sides.append(found[0]["text"] == written[0])
        assert ask(client, question)["summaries"] == found  # but always on the same for one question
    assert 2 <= sum(sides) <= 10


def test_answers_are_kept_as_they_were_shown(client, ours):
    found = ask(client)
    row = one(ours, "SELECT * FROM asks")
    assert str(row["id"]) == found["ask"] and row["query"] == QUESTION
    assert row["summaries"] == found["summaries"] and row["passages"] == found["passages"]
    begin = f"summarize: question: {QUESTION} [1] {found['passages'][0]['title']}: {found['passages'][0]['text'][:40]}"
    assert row["prompt"].startswith(begin)
    used = [passage["number"] for passage in found["passages"] if passage["used"]]
    assert used == list(range(1, len(used) + 1)) and f" [{len(used)}] " in row["prompt"] + " "
    cited = {n for summary in found["summaries"] for sentence in summary["sentences"] for n in sentence["citations"]}
    assert cited <= set(used)  # a model could have written it from the prompt
    many = ask(client, k=20)
    assert sum(passage["used"] for passage in many["passages"]) < 20
    cited = {n for summary in many["summaries"] for sentence in summary["sentences"] for n in sentence["citations"]}
    assert cited <= {passage["number"] for passage in many["passages"] if passage["used"]}


def passage(text, number=1, similarity=0.6, **fields):
    given = {
        "chunk": number,
        "article": number,
        "start": 0,
        "stop": len(text),
        "title": f"T{number}",
        "text": text,
        "url": None,
    }
    given |= {"source": "", "published": datetime(2026, 1, number, tzinfo=UTC), "score": 0.03, "similarity": similarity}
    return Passage(**{**given, "coverage": 0.5, **fields})


def test_what_is_relevant():
    assert not relevant([]) and not relevant([passage("x", similarity=0.29, coverage=1.0)])
    assert relevant([passage("x", similarity=0.1), passage("x", similarity=summaries.NEAR)])
    assert relevant([passage("x", similarity=summaries.FAIR, coverage=summaries.COVERED)])
    assert not relevant([passage("x", similarity=summaries.FAIR, coverage=summaries.COVERED - 0.01)])


def test_extracts_do_not_repeat_themselves(embedder):
    same = (
        "The reservoir was nearly full before the flood came down the valley. Who is to blame for that flood now? Why?"
    )
    other = "Engineers opened the gates of the reservoir at two in the morning, hours too late."
    found = Extractive(embedder).write("Was the reservoir full?", [passage(same, 2), passage(f"{same} {other}", 1)])
    for summary in found:
        texts = [sentence.text for sentence in summary.sentences]
        assert len(set(texts)) == len(texts) and not any(text.endswith("?") for text in texts)
    assert Extractive(embedder).write("x", [passage("Why? Oh no.")]) == []
    # where both are the same sentences, the nearest stands alone in the second; of one sentence there is no choice
    two = Extractive(embedder).write("Was the reservoir full?", [passage(f"{same.split('. ')[0]}. {other}")])
    assert [len(summary.sentences) for summary in two] == [2, 1]
    assert len(Extractive(embedder).write("reservoir", [passage(same.split(". ")[0] + ".")])) == 1


def test_the_second_extract_goes_by_date(embedder):
    texts = [
        "The bridge was closed in January after cracks were found.",
        "Repairs of the bridge began in March with new steel.",
        "The bridge opened to cars again in the month of October.",
    ]
    passages = [passage(text, number) for text, number in zip(texts, (3, 1, 2))]
    second = Extractive(embedder, words=12).write("What happened to the bridge?", passages)[
        -1
    ]  # the first has room for one
    days = [passages[sentence.citations[0] - 1].published for sentence in second.sentences]
    assert len(days) > 1 and days == sorted(days)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Untrained models of both kinds, with a tokenizer made here."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = [json.loads(line)["text"] for line in (HERE / "articles.jsonl").read_text().splitlines()]
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, special_tokens=["<pad>", "</s>", "<unk>"]))
    from tokenizers import decoders

    raw.decoder = decoders.Metaspace()
    folder = tmp_path_factory.mktemp("models")
    for kind in ("t5", "gpt2"):
        if kind == "t5":
            raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
            config = T5Config(
                vocab_size=600, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
            )
            model = T5ForConditionalGeneration(config)
        else:
            raw.post_processor = processors.TemplateProcessing(single="$A")
            config = GPT2Config(
                vocab_size=600, n_positions=300, n_embd=32, n_layer=1, n_head=2, eos_token_id=1, bos_token_id=1
            )
            model = GPT2LMHeadModel(config)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        )
        tokenizer.model_max_length = 400
        model.save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    return folder


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_a_model_gets_a_prompt_within_its_window(tiny, ours, embedder, kind):
    written = Written(str(tiny / kind), "version 1", embedder)
    passages = search(ours, embedder, QUESTION, 8)
    prompt, used = written.prompt(QUESTION, passages)
    length = len(written.tokenizer(prompt)["input_ids"])
    assert 1 <= used < 8 and length <= (400 if kind == "t5" else 300 - summaries.MOST_NEW)
    assert f"[{used}]" in prompt and f"[{used + 1}]" not in prompt
    # untrained, it writes nothing that holds: extracts of the passages that it saw stand in
    found = written.write(QUESTION, passages)
    assert found and {summary.model for summary in found} == {"extractive"}
    assert max(n for summary in found for sentence in summary.sentences for n in sentence.citations) <= used


def test_what_a_model_writes_is_checked(tiny, ours, embedder, monkeypatch):
    written = Written(str(tiny / "t5"), "version 1", embedder)
    passages = search(ours, embedder, QUESTION, 5)
    sentence = next(
        passages[0].text[a:b] for a, b in sentences(passages[0].text) if len(content_words(passages[0].text[a:b])) > 5
    )
    outputs = iter([f"{sentence} [1] The dam was built by 700 Martians. [1]", f"{sentence} [2]"])
    monkeypatch.setattr(written, "generate", lambda *_, **__: next(outputs))
    first, second = written.write(QUESTION, passages)
    assert first.model == "version 1" and first.text == f"{sentence} [1]"
    assert second.model == "extractive"  # the sample says the same, so that there is nothing to choose between


def test_a_model_that_cannot_be_loaded_is_one_line(embedder, tmp_path):
    with pytest.raises(server.UserError, match="cannot be loaded") as error:
        Written(str(tmp_path), "x", embedder)
    assert "\n" not in str(error.value)


def test_the_server_follows_the_registry(ours, embedder, tiny):
    served = server.Served(ours, embedder)
    try:
        assert served.summariser.name == "extractive"
        version = learn.register(ours, str(tiny / "t5"), "scratch", {})
        learn.activate(ours, version)
        wait_for(lambda: served.summariser.name == f"version {version}")
        lost = learn.register(ours, str(tiny), "scratch", {})  # a folder, but no model
        learn.activate(ours, lost)
        wait_for(lambda: served.version == lost)
        assert served.summariser.name == f"version {version}"  # one that cannot be loaded leaves the old one in place
        learn.rollback(ours)
        learn.rollback(ours)
        wait_for(lambda: served.summariser.name == "extractive")
    finally:
        served.stop()


def wait_for(condition):
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def gone(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # where the first process reaps nobody
    except psutil.NoSuchProcess:
        return True


# --- choices ----------------------------------------------------------------------------------------------------------


def test_choices_and_ratings_are_kept_and_may_change(client, ours):
    found = ask(client)
    assert client.get("/api/improve").json()["choices"] == 0
    assert client.post("/api/choices", json={"ask": found["ask"], "chosen": 0}).json() == {"choices": 1}
    assert client.post("/api/choices", json={"ask": found["ask"], "chosen": 1}).json() == {"choices": 1}
    assert one(ours, "SELECT chosen FROM choices")["chosen"] == 1
    for rating in (1, -1):
        reply = client.post("/api/ratings", json={"ask": found["ask"], "summary": 1, "rating": rating})
        assert reply.json() == {"ratings": 1}
    assert one(ours, "SELECT rating FROM ratings")["rating"] == -1
    counts = client.get("/api/improve").json()
    assert (counts["choices"], counts["ratings"], counts["model"]) == (1, 1, "extractive") and len(
        counts["questions"]
    ) == 6


def test_choices_refer_to_answers(client, ours):
    unknown = {"ask": str(uuid.uuid4()), "chosen": 0}
    assert client.post("/api/choices", json=unknown).status_code == 404
    assert client.post("/api/ratings", json={"ask": unknown["ask"], "summary": 0, "rating": 1}).status_code == 404
    found = ask(client)
    ours.run(lambda c: c.execute("UPDATE asks SET summaries = jsonb_build_array(summaries -> 0)"))
    assert client.post("/api/choices", json={"ask": found["ask"], "chosen": 0}).status_code == 409
    assert client.post("/api/ratings", json={"ask": found["ask"], "summary": 1, "rating": 1}).status_code == 404
    assert one(ours, "SELECT count(*) AS n FROM choices")["n"] == 0


@pytest.mark.parametrize("own", [True, False])
def test_no_acknowledged_choice_is_lost_when_the_database_restarts(ours, embedder, monkeypatch, own):
    """Readers choose while PostgreSQL is stopped at once, as by a crash, and comes back: by the server's own doing if
    it is the embedded one, else by somebody else's."""
    postgres = ours._server
    if not own:
        monkeypatch.setattr(ours, "_server", None)
    with Serving(server.make_app(ours, embedder, Fixed(Extractive(embedder)), None)) as client:
        asks = [ask(client)["ask"] for _ in range(2)]
        asks += [str(uuid.uuid4()) for _ in range(16)]
        copy = "INSERT INTO asks SELECT %s, asked, query, prompt, passages, summaries FROM asks LIMIT 1"
        ours.run(lambda c: [c.execute(copy, [one]) for one in asks[2:]])
        acknowledged, refused, stop = {}, [], threading.Event()

        def reader(mine):
            rng = random.Random(mine[0])
            with httpx.Client(base_url=client.base_url, timeout=60) as http:
                for given in itertools.cycle(mine):
                    if stop.is_set():
                        return
                    chosen = rng.choice([0, 1])
                    reply = http.post("/api/choices", json={"ask": given, "chosen": chosen})
                    if reply.status_code == 200:
                        acknowledged[given] = {chosen}
                    else:  # 503: it may have been written or not
                        refused.append(reply.status_code)
                        acknowledged.setdefault(given, {None}).add(chosen)

        threads = [threading.Thread(target=reader, args=[asks[at::6]]) for at in range(6)]
        for thread in threads:
            thread.start()
        for _ in range(2):
            time.sleep(0.5)
            wait_for(lambda: client.get("/api/health").status_code == 200)
            # not by `pg_ctl -m immediate -w stop`, which sends the same signal but takes a server that is back between
            # two of its looks for the old one, and fails after a minute
            process = psutil.Process(int((postgres.pgdata / "postmaster.pid").read_text().split()[0]))
            process.send_signal(signal.SIGQUIT)
            wait_for(lambda: gone(process))
            if not own:
                time.sleep(1)
                assert client.get("/api/health").status_code == 503
                with postgres._lock:
                    postgres.ensure_postgres_running()
        time.sleep(1.5)
        wait_for(lambda: client.get("/api/health").status_code == 200)
        stop.set()
        for thread in threads:
            thread.join()
    assert len(acknowledged) == 18 and set(refused) <= {503}
    kept = ours.run(lambda c: {str(r["ask"]): r["chosen"] for r in c.execute("SELECT ask, chosen FROM choices")})
    assert all(kept.get(given) in chosen for given, chosen in acknowledged.items())


# --- load and abuse ---------------------------------------------------------------------------------------------------


class Slow(Extractive):
    """Takes as long as it is told to."""

    def __init__(self, embedder):
        super().__init__(embedder)
        self.go, self.running, self.most, self._lock = threading.Event(), 0, 0, threading.Lock()

    def write(self, query, passages):
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        self.go.wait(30)
        with self._lock:
            self.running -= 1
        return [summaries.Summary([summaries.Cited("It is so.", [1])], "slow")]


def test_slow_answers_block_neither_choices_nor_the_health_check(ours, embedder):
    slow = Slow(embedder)
    with (
        Serving(server.make_app(ours, embedder, Fixed(slow), None, threads=2)) as client,
        concurrent.futures.ThreadPoolExecutor(60) as pool,
    ):
        answers = [pool.submit(client.post, "/api/ask", json={"query": QUESTION}) for _ in range(40)]
        wait_for(lambda: slow.running == 2)
        wait_for(lambda: sum(answer.done() for answer in answers) == 6)  # 2 at work and 32 waiting are the most
        assert client.get("/api/health").json()["status"] == "ok"
        assert client.post("/api/choices", json={"ask": str(uuid.uuid4()), "chosen": 0}).status_code == 404
        assert client.get("/").status_code == 200
        slow.go.set()
        codes = sorted(answer.result().status_code for answer in answers)
        assert codes == [200] * 34 + [503] * 6 and slow.most == 2
        assert ask(client)["summaries"][0]["model"] == "slow"  # and there is room again


def test_limits_and_mistakes_are_one_line(client, ours):
    def post(body, path="/api/ask", **options):
        return client.post(path, **({"content": body} if isinstance(body, (bytes, str)) else {"json": body}), **options)

    json_type = {"content-type": "application/json"}
    bad = [
        (post({"query": ""}), 422), (post({"query": " \n"}), 422), (post({"query": "x" * 501}), 422), (post({}), 422),
        (post({"query": 5}), 422), (post({"query": "x", "k": 0}), 422), (post({"query": "x", "k": 21}), 422),
        (post({"query": "x", "k": "5"}), 422), (post({"query": "x", "from": "soon"}), 422),
        (post({"query": "x", "foo": 1}), 422), (post({"query": "x", "to": "9999-12-31"}), 422),
        (post({"query": "x", "from": "2026-02-01", "to": "2026-01-01"}), 422), (post("{", headers=json_type), 422),
        (post("[" * 9000, headers=json_type), 400), (post(b"\xff", headers=json_type), 400),
        (post("query=x", headers={"content-type": "application/x-www-form-urlencoded"}), 415), (post(b"{}"), 415),
        (post(b"x" * 20_000, headers=json_type), 413), (post({"ask": "x", "chosen": 0}, "/api/choices"), 422),
        (post({"ask": str(uuid.uuid4()), "chosen": 2}, "/api/choices"), 422), (client.get("/api/ask"), 405),
        (client.get("/nothing"), 404), (client.get("/page/../server.py"), 404),
        (client.get("/page/%2e%2e/server.py"), 404),
        (client.get("/api/health", headers={"host": "evil.example"}), 421),
        (post({"query": "x"}, headers={"origin": "https://evil.example"}), 403),
        (post({"query": "x"}, headers={"origin": "null"}), 403),
    ]  # fmt: skip
    for reply, code in bad:
        assert reply.status_code == code, (reply.request.content[:60], reply.text)
        assert (
            list(reply.json()) == ["error"] and "\n" not in reply.json()["error"] and len(reply.json()["error"]) <= 300
        )
        assert (
            reply.headers["x-content-type-options"] == "nosniff"
            and "default-src 'none'" in reply.headers["content-security-policy"]
        )
    assert one(ours, "SELECT count(*) AS n FROM asks")["n"] == 0
    far = {"query": "x", "from": "0001-01-01", "to": "9999-12-30"}
    assert post(far).status_code == 200
    assert (
        post({"query": "\U0001f600 ok", "k": 1}, headers={"origin": str(client.base_url).rstrip("/")}).status_code
        == 200
    )


def test_a_body_in_pieces_is_limited_too(client):
    def pieces():
        for _ in range(100):
            yield b"x" * 1000

    assert client.post("/api/ask", content=pieces(), headers={"content-type": "application/json"}).status_code == 413


def test_questions_are_never_sql(client, ours):
    for query in ("'; DROP TABLE asks; --", "%s %(x)s {}", "\\", "a\u0000b", "' OR 1=1 --"):
        assert ask(client, query)["query"]
    assert one(ours, "SELECT count(*) AS n FROM articles")["n"] == 40


def test_errors_inside_are_one_line_and_the_server_goes_on(ours, embedder, capfd):
    class Broken(Extractive):
        def write(self, query, passages):
            raise RuntimeError("inside")

    with Serving(server.make_app(ours, embedder, Fixed(Broken(embedder)), None)) as client:
        reply = client.post("/api/ask", json={"query": QUESTION})
        assert reply.status_code == 500 and reply.json() == {"error": "the server failed; its log says why"}
        assert client.get("/api/health").status_code == 200


# --- the command ------------------------------------------------------------------------------------------------------


def news(*words, **options):
    command = [sys.executable, str(HERE / "news.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize(
    "words, line",
    [
        (["sing"], "error: no command 'sing'; there are serve, ingest, ask"),
        (["ingest"], "error: ingest: name files or folders"),
        (["ingest", "x", "--columns", "text"], "error: --columns text: must be FIELD=COLUMN"),
        (["ask"], "error: ask: a question"),
        (["serve", "--port", "99999"], "error: --host 127.0.0.1 --port 99999"),
        (["serve", "--prot", "1"], "error: unknown flag --prot; did you mean --port?"),
    ],
)
def test_mistakes_on_the_command_line(words, line, monkeypatch, capsys):
    import news as commands

    monkeypatch.setattr(sys, "argv", ["news.py", *words])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        commands.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith(line) and said.count("\n") == 1


def test_a_server_of_ones_own(ours):
    done = news("models", env={**os.environ, "DATABASE_URL": ours.pool.conninfo})
    assert (done.returncode, done.stdout, done.stderr) == (0, "* extractive\n", "")
    done = news("models", env={**os.environ, "DATABASE_URL": "postgresql://me:secret@127.0.0.1:1/none"})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "secret" not in done.stderr


def test_the_default_address_is_loopback_and_sigterm_ends_it(folder):
    import news as commands

    assert commands.Serve().host == "127.0.0.1"
    command = [sys.executable, str(HERE / "news.py"), "serve", "--port", "0", "--data", folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "serving on" in line:
                break
        assert lines[-1].startswith("serving on http://127.0.0.1:")
        url = lines[-1].split()[-1]
        assert httpx.get(f"{url}/api/health", timeout=30).json()["articles"] == 40
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, 143, -signal.SIGTERM)

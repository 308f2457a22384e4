"""learn.py and evaluation.py on the embedded PostgreSQL: exports by hand, metrics by brute force, a whole training."""

import json
import os
import random
import shlex
import signal
import subprocess
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch
from psycopg.types.json import Jsonb
from safetensors.torch import load_file

import dpo
import evaluation
import learn
import texts
from benchmarks.pair_accuracy import interval, measures
from common.cli import UserError, parse
from common.data import read_rows
from common.models import load_lm, load_tokenizer

torch.set_num_threads(1)
CITIES = "Arden Brill Corran Dunmore Elster Farrow Garth Hollin Ivel Jarrow Kells Lorne".split()


def ask(database, prompt, summaries, chosen=None, made=0):
    """Store an answer, and which summary a reader chose, `made` minutes after noon."""
    number = uuid.uuid4()
    rows = [{"text": text, "sentences": [], "model": model} for text, model in summaries]

    def work(connection):
        insert = "INSERT INTO asks (id, query, prompt, passages, summaries) VALUES (%s, %s, %s, %s, %s)"
        connection.execute(insert, [number, "?", prompt, Jsonb([]), Jsonb(rows)])
        if chosen is not None:
            moment = datetime(2026, 3, 12, 12, tzinfo=UTC) + timedelta(minutes=made)
            connection.execute("INSERT INTO choices (ask, chosen, made) VALUES (%s, %s, %s)", [number, chosen, moment])

    database.run(work)
    return str(number)


# --- export -----------------------------------------------------------------------------------------------------------


def test_export_is_what_was_chosen(database, tmp_path):
    """Chosen and rejected by hand, in the order of the choices; what says nothing is left out; dpo.py reads it."""
    later = ask(database, "p2\u2028é", [("A. [1]", "version 1"), ("B. [2]", "extractive")], 1, made=7)
    first = ask(database, "p1", [("C. [1] [2]", "version 1"), ("D. [1]", "version 2")], 0, made=3)
    ask(database, "p3", [("same", "version 1"), ("same", "extractive")], 0)
    ask(database, "p4", [("alone", "extractive")], 0)
    ask(database, "p5", [("E", "version 1"), ("F", "version 1")])
    path = tmp_path / "pairs.jsonl"
    path.write_text("old")
    assert learn.export(database, path) == 2
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] == [
        {"prompt": "p1", "chosen": "C. [1] [2]", "rejected": "D. [1]", "ask": first,
         "made": "2026-03-12T12:03:00+00:00", "chosen_model": "version 1", "rejected_model": "version 2"},
        {"prompt": "p2\u2028é", "chosen": "B. [2]", "rejected": "A. [1]", "ask": later,
         "made": "2026-03-12T12:07:00+00:00", "chosen_model": "extractive", "rejected_model": "version 1"},
    ]  # fmt: skip
    assert path.read_text(encoding="utf-8").count("\n") == 2 and os.listdir(tmp_path) == ["pairs.jsonl"]
    rows = dpo.load_pairs(None, str(path), "--dataset", None)
    assert [(a.turns, b.turns) for a, b in rows] == [
        (["p1", "C. [1] [2]"], ["p1", "D. [1]"]),
        (["p2\u2028é", "B. [2]"], ["p2\u2028é", "A. [1]"]),
    ]
    with pytest.raises(UserError, match="cannot be written"):
        learn.export(database, tmp_path / "no" / "pairs.jsonl")


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    """Not a line of a new file is in the old one's place before all of them are on the disk."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        learn._write(path, "new")
    assert path.read_text() == "old"


# --- the server's form ------------------------------------------------------------------------------------------------

ARTICLE = {
    "title": "Flood in Arden",
    "article": "The river Wen rose by 3 metres in Arden on Monday. Two bridges were closed by the police. "
    "The mayor opened a school for families without power. Trains to Brill stopped until Friday morning.",
    "summary": "The river Wen rose by 3 metres in Arden.\nThe river rose by 4 metres.\nThe mayor opened a school. "
    "Trains to Brill stopped. The police closed a museum and a mill. A minister promised money.",
}
COUNT = learn.counter(None)


def test_words_stand_for_tokens_where_no_tokenizer_is_known(monkeypatch):
    """4 tokens for 3 words, rounded up."""
    assert COUNT(["one", "one two three", "one two three four", ""]) == [2, 4, 6, 0]


def test_articles_become_prompts_and_cited_summaries(monkeypatch):
    """The server's prompt; of the summary, what a passage supports, with its number; the rest is counted."""
    monkeypatch.setattr(learn, "PASSAGE", 30)
    found = learn.example(ARTICLE, COUNT, 500)
    title, (a, b, c, d) = ARTICLE["title"], [ARTICLE["article"][i:j] for i, j in texts.sentences(ARTICLE["article"])]
    passages = [(title, f"{a} {b}"), (title, f"{b} {c}"), (title, f"{c} {d}")]
    assert found["prompt"] == texts.prompt_of(title, passages, 500, COUNT)[0]
    assert found["prompt"].startswith(f"summarize: question: Flood in Arden [1] Flood in Arden: {a} {b} [2] ")
    assert found["completion"] == (
        "The river Wen rose by 3 metres in Arden. [1] The mayor opened a school. [2] Trains to Brill stopped. [3]"
    )
    assert found["left_out"] == 3 and found["reference"] == ARTICLE["summary"]
    assert texts.passages_of(found["prompt"]) == [f"{title}: {text}" for title, text in passages]
    # what was cut away, or does not fit, is neither cited nor written
    room = COUNT([found["prompt"].split(" [2] ")[0]])[0]
    assert learn.example(ARTICLE, COUNT, room)["completion"] == "The river Wen rose by 3 metres in Arden. [1]"
    cut = learn.example(ARTICLE, COUNT, room - 1)
    assert cut["prompt"].endswith("on Monday.") and cut["left_out"] == 5
    assert learn.example(ARTICLE, COUNT, 500, most=22)["completion"].endswith("opened a school. [2]")
    # a tokenizer that is named counts, and so does the room
    monkeypatch.setenv("NEWS_ROOM", str(room - 1))
    assert learn.article_row(ARTICLE)["prompt"] == cut["prompt"]
    assert learn.article_row({**ARTICLE, "summary": "A minister promised money."}) is None
    untitled = learn.example({"text": ARTICLE["article"], "summary": "The river rose."}, COUNT, 500)
    assert untitled["prompt"].startswith(f"summarize: question: {ARTICLE['article'][:80]} [1] ")
    assert learn.example({"prompt": "p", "completion": "A. [1]", "x": 1}) == {
        "prompt": "p", "completion": "A. [1]", "reference": "A.", "left_out": 0, "x": 1}  # fmt: skip
    for row, message in (({"article": "Text."}, "no 'summary'"), ({"summary": "A."}, "no 'text'")):
        with pytest.raises(ValueError, match=message):
            learn.example(row)


def test_preferences_keep_every_sentence_and_mark_the_supported(monkeypatch):
    """The choice was between whole texts: what no passage supports stays, unmarked."""
    monkeypatch.setattr(learn, "PASSAGE", 30)
    row = {
        "prompt": ARTICLE["article"],
        "chosen": "The mayor opened a school. A minister wept.",
        "rejected": "Snow fell.",
    }
    found = learn.preference_row(row, COUNT, 500)
    assert found["chosen"] == "The mayor opened a school. [2] A minister wept." and found["rejected"] == "Snow fell."
    assert found["prompt"].startswith(f"summarize: question: {ARTICLE['article'][:80]} [1] ")
    served = {"prompt": "summarize: question: Why? [1] T: Text.", "chosen": "A. [1]", "rejected": "B.", "ask": "7"}
    assert learn.preference_row(served) == served
    with pytest.raises(ValueError, match="no 'rejected'"):
        learn.preference_row({"prompt": "Text.", "chosen": "A."})


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_loops():
    """Groups are drawn, each with all its values."""
    rng = random.Random(1)
    groups = [rng.randrange(7) * 3 for _ in range(40)]
    values = [rng.random() for _ in groups]
    names, draws = sorted(set(groups)), np.random.default_rng(1)
    means = []
    for _ in range(2000):
        drawn = [names[i] for i in draws.integers(len(names), size=len(names))]
        every = [value for name in drawn for value, group in zip(values, groups) if group == name]
        means.append(sum(every) / len(every))
    expected = [sum(values) / 40, *np.quantile(means, [0.025, 0.975])]
    np.testing.assert_allclose(interval(np.array(values), np.array(groups)), expected, rtol=1e-12)
    assert expected[1] < expected[0] < expected[2]


def common_subsequence(a, b):
    """Length of the longest one, by its definition."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_rouge_is_that_of_plain_python():
    """F1 of shared words, pairs of words and the longest common subsequence; marks are no words."""
    rng = random.Random(2)
    for _ in range(50):
        a, b = ([rng.choice("the cat sat on a mat".split()) for _ in range(rng.randint(1, 9))] for _ in range(2))
        expected = {}
        for kind, size in (("rouge1", 1), ("rouge2", 2)):
            grams = [[tuple(x[i : i + size]) for i in range(len(x) - size + 1)] for x in (a, b)]
            shared = sum(min(grams[0].count(gram), grams[1].count(gram)) for gram in set(grams[0]))
            expected[kind] = 2 * shared / max(1, len(grams[0]) + len(grams[1])) if min(map(len, grams)) else 0
        expected["rougeL"] = 2 * common_subsequence(a, b) / (len(a) + len(b))
        found = evaluation.rouge([" ".join(a) + ". [1] [12]"], [" ".join(b)])
        assert {kind: pytest.approx(value[0]) for kind, value in found.items()} == expected


def test_citations_are_counted_as_by_hand():
    """Recall over sentences, precision over marks, wrong numbers and marks of no sentence among them."""
    passages = ["Flood: The river rose by 3 metres.", "Fire: A mill burned in Brill."]
    text = "[1] The river rose. [1] A mill burned. [1] [2] The river rose. Pigs fly. [7] A mill burned in Brill."
    found = evaluation.citations([text, "", "The river rose. [2]"], [passages, passages, passages])
    # sentences: right, right, uncited, wrong number, uncited; wrong
    # marks: of nothing, right, wrong, right, no such; wrong
    assert (found["sentences"], found["marks"]) == (6, 6)
    assert found["recall"][0] == pytest.approx(2 / 6) and found["precision"][0] == pytest.approx(2 / 6)
    served = [texts.marked(texts.cite(text, passages))]
    kept = evaluation.citations(served, [passages])
    assert kept["recall"] == kept["precision"] == [1, 1, 1] and kept["sentences"] == 4
    assert evaluation.citations([""], [passages]) == {"recall": None, "precision": None, "sentences": 0, "marks": 0}


@pytest.mark.parametrize("accuracy, difference, reason", [
    ([0.4, 0.3, 0.51], [-0.1, -0.2, 0.01], None), ([0.4, 0.3, 0.49], None, "it prefers what readers rejected"),
    ([0.9, 0.8, 1.0], [-0.1, -0.2, -0.01], "its summaries are farther from the references"),
    ([0.9, 0.8, 1.0], None, None),
])  # fmt: skip
def test_worse_is_an_interval_on_the_wrong_side(accuracy, difference, reason):
    """What chance can explain is no reason."""
    rouge = difference and {"difference": {"rougeL": difference}}
    assert evaluation.worse({"accuracy": accuracy, "rouge": rouge}) == reason


# --- registry ---------------------------------------------------------------------------------------------------------


class Twice:
    """A database whose answers are lost once: everything is done again."""

    def __init__(self, database):
        self.database = database

    def run(self, work):
        """Once more, as after a lost connection."""
        self.database.run(work)
        return self.database.run(work)


@pytest.mark.parametrize("kind", [lambda database: database, Twice])
def test_registry(database, tmp_path, kind):
    """What is served is the last activation that was not undone, also when each answer is lost once."""
    db = kind(database)
    assert learn.active(db) is None and learn.versions(db) == []
    paths = [str(tmp_path / name) for name in "abc"]
    for path in paths:
        os.mkdir(path)
    assert [learn.register(db, path, "base", {"n": 1}, serve=path != paths[1]) for path in paths] == [1, 2, 3]
    assert learn.register(db, paths[1], "base", {}, serve=True) == 2  # known: neither again nor served
    assert [row["version"] for row in learn.versions(db)] == [1, 2, 3] and learn.versions(db)[1]["report"] == {"n": 1}
    assert learn.active(db)["version"] == 3 and learn.active(db)["path"] == paths[2]
    learn.activate(db, 2)
    learn.activate(db, 2)
    learn.activate(db, None)
    assert learn.active(db) is None
    assert [(row or {}).get("version") for row in (learn.rollback(db) for _ in range(4))] == [2, 3, 1, None]
    with pytest.raises(UserError, match="nothing to roll back"):
        learn.rollback(db)
    with pytest.raises(UserError, match="there is no version 9"):
        learn.activate(db, 9)
    os.rmdir(paths[0])
    with pytest.raises(UserError, match="is gone"):
        learn.activate(db, 1)
    learn.activate(db, 3)
    assert learn.active(db)["version"] == 3


# --- training ---------------------------------------------------------------------------------------------------------


def story(number):
    """An article about a storm or a flood in one of 12 cities, its title and a summary."""
    city, kind = CITIES[number % 12], ("storm", "flood")[number % 7 % 2]
    return {
        "title": f"{kind.title()} {number} in {city}",
        "article": f"A {kind} hit the town on Monday. The mayor of {city} closed {number} roads. Trains stopped.",
        "summary": f"A {kind} hit the town on Monday. Trains stopped.",
    }


def choices(database):
    """60 choices between a summary and its last sentence alone, which always loses."""
    rng = random.Random(3)
    for number in range(60):
        row = story(number)
        prompt, _ = texts.prompt_of(row["title"], [(row["title"], row["article"])], 500, COUNT)
        both = [(texts.marked(texts.cite(row["summary"], [row["article"]])), "extractive")]
        both += [(both[0][0].split(" [1] ")[1], "version 1")]
        chosen = rng.randrange(2)
        ask(database, prompt, both[::-1] if chosen else both, chosen, made=number)


def settings(folder):
    """What the trainings of this file have in common."""
    shape = {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    (folder / "shape.json").write_text(json.dumps(shape))
    (folder / "summaries.jsonl").write_text("".join(json.dumps(story(number)) + "\n" for number in range(100, 148)))
    flags = "--batch-size 16 --micro-batch-size 16"
    return {
        "folder": folder / "runs", "from_config": str(folder / "shape.json"), "train_tokenizer": 400,
        "summaries": str(folder / "summaries.jsonl"), "max_length": 120, "max_new_tokens": 40, "save_every": 2,
        # --format: what has been converted stays as it is, and learn.py can be loaded by a script of the repository
        "sft_flags": f"{flags} --learning-rate 5e-3 --epochs 25 --format {learn.__file__}:article_row",
        "dpo_flags": f"{flags} --learning-rate 2e-4 --epochs 6 --sft-coef 1",
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(opened, tmp_path_factory):
    """A training that was killed within dpo.py and run again: what the first said, and what the second returned."""
    folder = tmp_path_factory.mktemp("trained")
    tables = "asks, choices, ratings, models, activations"
    opened.run(lambda connection: connection.execute(f"TRUNCATE {tables} RESTART IDENTITY"))
    choices(opened)
    given, children, real = settings(folder), [], subprocess.Popen

    def remembered(command, **options):
        children.append(real(command, **options))
        return children[-1]

    def kill():
        until = time.monotonic() + 60
        while time.monotonic() < until and not list(folder.glob("runs/run-*/dpo/checkpoints/step-4")):
            time.sleep(0.01)
        children[-1].kill()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learn.subprocess, "Popen", remembered)
        threading.Thread(target=kill, daemon=True).start()
        with pytest.raises(UserError) as stopped:
            learn.train(opened, **given)
        found = learn.train(opened, **given)
    return given, str(stopped.value), found, [child.args for child in children]


def test_a_killed_training_goes_on(trained, tmp_path):
    """sft.py is not run again, dpo.py goes on from a checkpoint, and the weights are those of a run without a kill."""
    _, stopped, found, commands = trained
    assert stopped.startswith("dpo.py ended with -9: ") and "the same command goes on" in stopped
    assert [os.path.basename(command[1]) for command in commands] == ["sft.py", "dpo.py", "dpo.py"]
    assert commands[1] == commands[2]
    steps = [json.loads(line)["step"] for line in open(f"{found['folder']}/dpo/metrics.jsonl")]
    assert steps == list(range(len(steps)))  # one line of step 0: it did not start again
    words = shlex.split(
        shlex.join(commands[1][2:]).replace(f"{found['folder']}/dpo", str(tmp_path)).replace(" --resume auto", "")
    )
    dpo.train(parse(dpo.Args, dpo.preset, words))
    whole, resumed = (load_file(f"{path}/model/model.safetensors") for path in (tmp_path, f"{found['folder']}/dpo"))
    assert whole and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not os.path.exists(f"{found['folder']}/dpo/checkpoints")
    log = open(f"{found['folder']}/log.txt").read()
    assert log.count("$ ") == 3 and f"step {steps[-1]}/{steps[-1]}" in log


def single_rows(path, rows):
    """Log-probs (M, 2) of chosen and rejected by the T5 at a path, each row alone."""
    tokenizer, model, sums = load_tokenizer(path), load_lm(path), []
    for row in rows:
        ids = [tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in ("prompt", "chosen", "rejected")]
        labels = [torch.tensor([[*side, tokenizer.eos_token_id]]) for side in ids[1:]]
        losses = [model(input_ids=torch.tensor(ids[:1]), labels=side).loss.item() for side in labels]
        sums.append([-loss * side.shape[1] for loss, side in zip(losses, labels)])
    return np.array(sums)


def test_measures_are_those_of_single_rows(trained):
    """Accuracies and margin of pairs that are right and wrong, of prompts that come again after others."""
    run, rng = trained[2]["folder"], random.Random(4)
    rows = []
    for number in range(24):
        sides = [
            " ".join(rng.choice(CITIES + ["storm", "Trains", "[1]"]) for _ in range(rng.randint(1, 6))) for _ in "ab"
        ]
        rows.append({"prompt": story(number % 5)["article"], "chosen": sides[0], "rejected": sides[1] + "."})
    paths = [f"{run}/{name}/model" for name in ("sft", "dpo")]
    args = dpo.Args(max_length=300, beta=0.3)
    values, groups = measures(paths[1], paths[0], dpo.load_pairs(rows, None, "--pairs", None), args)
    order = [number for prompt in range(5) for number in range(prompt, 24, 5)]
    assert groups.tolist() == [number % 5 for number in order]
    before, after = (single_rows(path, [rows[number] for number in order]) for path in paths)
    lengths = np.array(
        [[len(load_tokenizer(paths[0])(rows[n][side])["input_ids"]) for side in ("chosen", "rejected")] for n in order]
    )
    gain = after - before
    expected = {"implicit reward": gain, "log pi": after, "log pi_ref": before, "longer output": lengths}
    expected = {f"accuracy of {'' if 'log' in name else 'the '}{name}": (x[:, 0] > x[:, 1]) + 0.5 * (x[:, 0] == x[:, 1])
                for name, x in expected.items()}  # fmt: skip
    for name, each in (expected | {"margin": 0.3 * (gain[:, 0] - gain[:, 1])}).items():
        np.testing.assert_allclose(values[name], each, atol=1e-3, err_msg=name)
    right, *others = [each.tolist() for each in expected.values()]
    assert right not in others and all(0 < sum(each) < 24 for each in (right, *others))
    mean = measures(
        paths[1], paths[0], dpo.load_pairs(rows, None, "--pairs", None), dpo.Args(max_length=300, loss="ipo", beta=0.1)
    )[0]
    gain = gain / (lengths + 1)
    np.testing.assert_allclose(mean["margin"], 0.1 * (gain[:, 0] - gain[:, 1]), atol=1e-4)


def test_training_learns_what_readers_chose(trained, opened):
    """Held-out accuracy is above chance, and every figure is what plain transformers or a loop gives."""
    given, _, found, _ = trained
    report, run = found["report"], found["folder"]
    assert found["served"] and learn.active(opened)["version"] == found["version"] == 1
    row = learn.active(opened)
    assert row["path"] == f"{run}/dpo/model" and row["base"] == given["from_config"] and row["report"] == report
    assert report["accuracy"][1] > 0.5 and report["accuracy"][0] > 0.9
    held = read_rows(f"{run}/data/held_pairs.jsonl", "")
    trained_on = read_rows(f"{run}/data/pairs.jsonl", "")
    assert len(held) + len(trained_on) == 60 and report["pairs"] == len(held) == report["prompts"]
    assert [row["ask"] for row in trained_on + held if row["chosen"].startswith("Trains")] == []
    sums = {name: single_rows(f"{run}/{name}/model", held) for name in ("sft", "dpo")}
    gain = sums["dpo"] - sums["sft"]
    assert report["margin"][0] == pytest.approx(0.1 * (gain[:, 0] - gain[:, 1]).mean(), rel=1e-3)
    assert report["accuracy"][0] == pytest.approx((gain[:, 0] > gain[:, 1]).mean())
    last = json.loads(open(f"{run}/dpo/metrics.jsonl").readlines()[-1])
    assert report["margin"][0] == pytest.approx(last["eval/margin"], rel=1e-3)
    # outputs, greedy; ROUGE and its paired difference; citations
    samples = read_rows(f"{run}/samples.jsonl", "")
    references = read_rows(f"{run}/data/held_summaries.jsonl", "")
    assert [row["reference"] for row in samples] == [row["reference"] for row in references] and samples
    tokenizer = load_tokenizer(f"{run}/dpo/model")
    for name, key in (("sft", "before"), ("dpo", "after")):
        ids = tokenizer(samples[0]["prompt"], add_special_tokens=False, return_tensors="pt")["input_ids"]
        plain = load_lm(f"{run}/{name}/model").generate(ids, max_new_tokens=40, do_sample=False)
        assert samples[0][key] == tokenizer.decode(plain[0], skip_special_tokens=True)
    scores = [
        [evaluation.rouge([row[key]], [row["reference"]])["rougeL"][0] for row in samples]
        for key in ("before", "after")
    ]
    change = interval(np.array(scores[1]) - np.array(scores[0]), np.arange(len(samples)))
    assert report["rouge"]["difference"]["rougeL"] == pytest.approx(list(change))
    assert report["rouge"]["before"]["rougeL"][0] == pytest.approx(np.mean(scores[0]))
    given = [texts.passages_of(row["prompt"]) for row in samples]
    assert report["citations"]["after"]["raw"] == evaluation.citations([row["after"] for row in samples], given)
    for precise in (report["citations"][name]["served"]["precision"] for name in ("before", "after")):
        assert precise in (None, [1, 1, 1])
    assert f"preference accuracy {report['accuracy'][0]:.3f}" in learn.summary(report)


def test_before_and_after_are_told_apart(trained, monkeypatch):
    """Outputs that differ as one expects: a better model has a positive difference, and more of it is served."""
    run = trained[2]["folder"]
    data = [read_rows(f"{run}/data/{name}.jsonl", "") for name in ("held_pairs", "held_summaries")]
    rows = {row["prompt"]: row["completion"] for row in data[1]}

    def outputs(path, prompts, room, most):
        assert (room, most) == (80, 40)
        return [rows[prompt] if path == "new" else "Pigs fly. [1]" for prompt in prompts]

    monkeypatch.setattr(evaluation, "write_outputs", outputs)
    monkeypatch.setattr(
        evaluation,
        "measures",
        lambda new, old, *_: (
            {
                "margin": np.ones(2),
                **{f"accuracy of the {name}": np.array([0.0, 1.0]) for name in ("implicit reward", "longer output")},
            },
            np.arange(2),
        ),
    )
    words = ["--max-length", "120", "--max-new-tokens", "40"]
    found = evaluation.evaluate({"before": "old", "reference": "old", "after": "new"}, *data, words)
    assert found["rouge"]["after"]["rougeL"] == found["rouge"]["difference"]["rougeL"] == [1, 1, 1]
    assert found["rouge"]["before"]["rouge1"] == [0, 0, 0] and found["rouge"]["references"] == len(rows)
    assert found["citations"]["before"]["raw"]["recall"] == [0, 0, 0] and found["accuracy"][0] == 0.5
    assert (found["citations"]["before"]["nothing_left"], found["citations"]["after"]["nothing_left"]) == (1, 0)
    assert found["citations"]["after"]["served"]["sentences"] == 2 * len(rows)
    few = evaluation.evaluate({"before": "old", "reference": "old", "after": "new"}, *data, words, most=3)
    assert len(few["outputs"]) == 3 and [row["after"] for row in few["outputs"]] == [
        rows[r["prompt"]] for r in few["outputs"]
    ]
    rows |= {row["prompt"]: row["chosen"] for row in data[0]}
    alone = evaluation.evaluate({"before": "old", "reference": "old", "after": "new"}, data[0], [], words)
    assert alone["rouge"] is None and len(alone["outputs"]) == len(data[0])


def test_a_finished_training_is_only_registered(trained, database, capsys, monkeypatch):
    """Nothing is run again. A worse model is registered and not served; one that was rolled back stays so."""
    given, _, found, _ = trained
    choices_again(database, found)
    monkeypatch.setattr(learn.subprocess, "Popen", None)
    path = f"{found['folder']}/report.json"
    before = open(path).read()
    try:
        again = learn.train(database, **given)
        assert again == {**found, "report": json.loads(before)} and "done before" in capsys.readouterr().out
        assert learn.rollback(database) is None
        assert not learn.train(database, **given)["served"] and "`news.py use 1`" in capsys.readouterr().out
        database.run(lambda connection: connection.execute("TRUNCATE models, activations RESTART IDENTITY"))
        with open(path, "w") as file:
            json.dump({**json.loads(before), "accuracy": [0.2, 0.1, 0.3]}, file)
        bad = learn.train(database, **given)
        said = capsys.readouterr().out.splitlines()[-1]
        assert said == "version 1 is not served: it prefers what readers rejected; `news.py use 1` serves it"
        assert not bad["served"] and learn.active(database) is None and len(learn.versions(database)) == 1
        learn.activate(database, 1)
        assert learn.active(database)["path"] == f"{found['folder']}/dpo/model"
    finally:
        with open(path, "w") as file:
            file.write(before)


def choices_again(database, found):
    """The choices that a training was made from, as they were: the same data is the same run."""
    rows = read_rows(f"{found['folder']}/data/pairs.jsonl", "") + read_rows(
        f"{found['folder']}/data/held_pairs.jsonl", ""
    )
    for row in rows:
        first = row["chosen_model"] == "extractive"

        def work(connection, row=row, first=first):
            both = [{"text": row[side], "model": row[f"{side}_model"]} for side in ("chosen", "rejected")]
            insert = "INSERT INTO asks (id, query, prompt, passages, summaries) VALUES (%s, '', %s, '[]', %s)"
            connection.execute(insert, [row["ask"], row["prompt"], Jsonb(both if first else both[::-1])])
            connection.execute("INSERT INTO choices VALUES (%s, %s, %s)", [row["ask"], 0 if first else 1, row["made"]])

        database.run(work)


def test_questions_are_on_one_side(tmp_path):
    """Held out by the question, whatever the passages; with held-out files, their questions are not trained on."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()

    def rows(numbers):
        prompts = [(f"summarize: question: q{n} [1] T: text {i}.", i) for n in numbers for i in range(3)]
        return [{"prompt": prompt, "chosen": "A", "rejected": "B" if i else "A"} for prompt, i in prompts]

    stories = [story(number) for number in range(40)]
    given = {"pairs": rows(range(50)), "held_pairs": [], "summaries": stories, "held_summaries": []}
    data = learn._prepare(tmp_path / "a", given, None, 80, 40, 0.3)
    questions = {name: {row["prompt"].split(" [1] ")[0] for row in some} for name, some in data.items()}
    for kind, count in (("pairs", 50), ("summaries", 40)):
        assert not questions[kind] & questions[f"held_{kind}"]
        assert (
            len(questions[kind] | questions[f"held_{kind}"]) == count
            and 0.1 < len(questions[f"held_{kind}"]) / count < 0.5
        )
    assert len(data["pairs"]) + len(data["held_pairs"]) == 100  # those of equal texts are gone
    more = {**given, "pairs": rows(range(90))}
    (tmp_path / "c").mkdir()
    later = learn._prepare(tmp_path / "c", more, None, 80, 40, 0.3)
    assert {row["prompt"] for row in data["held_pairs"]} <= {row["prompt"] for row in later["held_pairs"]}
    assert learn._prepare(tmp_path / "a", {}, None, 80, 40, 0.3) == data  # from the disk
    given |= {"held_pairs": rows(range(5)), "held_summaries": stories[:3]}
    data = learn._prepare(tmp_path / "b", given, None, 80, 40, 0.3)
    assert [len(data[name]) for name in ("pairs", "held_pairs", "summaries", "held_summaries")] == [90, 10, 37, 3]


def test_mistakes_are_one_line(database, tmp_path):
    """What is missing, how much, and what to do."""
    ask(database, "p", [("A", "x"), ("B", "y")], 0)
    given = settings(tmp_path)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "Text.", "chosen": "A"}\n')
    for change, message in (
        ({}, "1 pairs, and 50 are needed: let readers choose more, or lower --needed"),
        ({"pairs_file": str(bad), "needed": 1}, "--pairs, row 1: no 'rejected', only prompt, chosen"),
        ({"needed": 1}, "--pairs: .* to train on and .* held out: more are needed"),
        ({"base": "x"}, "--model and --from-config: one of them"),
        ({"summaries": None}, "--from-config needs --summaries"),
        ({"tokenizer": "x"}, "--from-config needs --tokenizer or --train-tokenizer"),
        ({"from_config": None, "train_tokenizer": None}, "no model is active"),
        ({"needed": 1, "dpo_flags": "--bta 1"}, "dpo.py: unknown flag --bta; did you mean --beta"),
        ({"needed": 1, "sft_flags": "--epochs x"}, "sft.py: .*epochs"),
    ):
        with pytest.raises(UserError, match=message):
            learn.train(database, **{**given, **change})
    assert learn.versions(database) == []


def test_commands_are_shown_logged_and_told_to_end(tmp_path, monkeypatch, capsys):
    """A failing script is one line; Ctrl-C lets the script write its checkpoint; what is finished is not run."""
    monkeypatch.setattr(learn, "ROOT", tmp_path)
    (tmp_path / "dpo.py").write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1], 'w').close(), print('saved'), sys.exit(143)))\n"
        "print('é', *sys.argv[2:])\n"
        "if 'wait' in sys.argv: os.kill(os.getppid(), signal.SIGINT); time.sleep(30)\n"
        "print('error: bad'); sys.exit(3)\n"
    )
    saved = str(tmp_path / "saved")
    with pytest.raises(UserError, match="dpo.py ended with 3: error: bad .*log.txt"):
        learn._command("dpo.py", [saved, "--x", "1 2"], tmp_path, 1)
    shown = capsys.readouterr().out
    assert f"é --x 1 2 --output-dir {tmp_path}/dpo --resume auto\nerror: bad\n" in shown
    assert shown == (tmp_path / "log.txt").read_text(encoding="utf-8") and "'1 2'" in shown
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job of a shell has not
    with pytest.raises(KeyboardInterrupt):
        learn._command("dpo.py", [saved, "wait"], tmp_path, 1)
    signal.signal(signal.SIGINT, before)
    assert os.path.exists(saved) and capsys.readouterr().out.endswith("saved\n")
    (tmp_path / "dpo" / "model").mkdir(parents=True)
    learn._command("dpo.py", ["wait"], tmp_path, 1)
    assert "done before" in capsys.readouterr().out

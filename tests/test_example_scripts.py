"""The example scripts: a reward model, rejection sampling, list programs, Simulacra; maths by hand, and tiny runs."""

import functools
import json
import math
import re
import sqlite3
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, bpe_tokenizer, char_tokenizer, run_forked

sys.path.insert(0, str(ROOT / "examples"))
import programs  # noqa: E402
import reward_model  # noqa: E402
import rewards  # noqa: E402
import rft  # noqa: E402
import simulacra  # noqa: E402

import dpo  # noqa: E402
import ppo  # noqa: E402
from common import randomwalks  # noqa: E402
from common.cli import UserError  # noqa: E402
from common.data import read_rows  # noqa: E402
from common.models import load_classifier, load_lm, load_tokenizer  # noqa: E402
from common.samples import sample_row  # noqa: E402


def refused(words, call, *args):
    """The call raises UserError, in one line with these words."""
    with pytest.raises(UserError) as error:
        call(*args)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), str(error.value)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- reward model: maths ----------------------------------------------------------------------------------------------


def test_pair_loss_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.0, -2.0]), torch.tensor([1.0, 2.0, -5.0])
    expected = [math.log(1 + math.exp(r - c)) for c, r in zip(chosen.tolist(), rejected.tolist())]
    assert reward_model.pair_loss(chosen, rejected).tolist() == pytest.approx(expected)
    assert expected[0] == pytest.approx(math.log(2)) and expected[1] > expected[0] > expected[2]


def load(path, **flags):
    torch.manual_seed(3)
    return reward_model.load_model(reward_model.Args(model=path, **flags))


PAIRS = [([5, 6, 7, 2], [5, 2]), ([8, 2], [9, 10, 11, 12, 13, 2]), ([4, 4, 2], [4, 14, 2])]


def alone(model, ids):
    """The score of one row, without padding: the head on the hidden state of its last token."""
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        return (model.score.weight @ hidden).item()


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt"])
def test_scores_are_those_of_the_last_real_token(architecture, model_path):
    """The loss and the accuracy of padded rows equal those of rows alone, whatever the micro-batches; and so does the
    gradient that is added."""
    model, _, own = load(model_path(architecture))
    scores = [[alone(model, side) for side in pair] for pair in PAIRS]
    assert len({round(score, 4) for both in scores for score in both}) == 6
    loss = sum(math.log(1 + math.exp(r - c)) for c, r in scores) / 3
    gradients = []
    for micro in (1, 2, 8):
        model.zero_grad()
        found = reward_model.run_batch(model, PAIRS, micro, torch.float32)
        assert found == pytest.approx((loss, sum(c > r for c, r in scores) / 3), abs=1e-5)
        gradients.append(model.score.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    assert all(torch.allclose(gradients[0], gradient, atol=1e-6) for gradient in gradients[1:])
    with torch.no_grad():
        tie = reward_model.run_batch(model, [([4, 2], [4, 2])], 1, torch.float32)
    assert tie == pytest.approx((math.log(2), 0.5))


def test_the_head_starts_with_the_variance_of_the_paper(tmp_path):
    """N(0, 1 / (d + 1)), as a variance; the rest is the model's; a model that has such a head keeps it."""
    config = transformers.GPT2Config(n_embd=1023, n_layer=1, n_head=1, n_positions=8, vocab_size=61)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    char_tokenizer().save_pretrained(tmp_path)
    model, _, own = load(str(tmp_path))
    weight = model.score.weight.detach()
    assert weight.std().item() == pytest.approx(1 / 32, rel=0.1) and abs(weight.mean().item()) < 0.005
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, load_lm(str(tmp_path)).transformer.h[0].mlp.c_fc.weight)
    model.save_pretrained(tmp_path / "rm")
    own.save_pretrained(tmp_path / "rm")
    torch.manual_seed(5)
    assert torch.equal(reward_model.load_model(reward_model.Args(model=f"{tmp_path}/rm"))[0].score.weight, weight)


def test_only_the_top_blocks_are_trained(model_path):
    model, _, _ = load(model_path("gpt2"), num_layers_unfrozen=1)
    trained = {name.split(".")[2] if ".h." in name else name.split(".")[-2] for name, parameter in
               model.named_parameters() if parameter.requires_grad}
    assert trained == {"2", "ln_f", "score"}
    assert all(parameter.requires_grad for parameter in load(model_path("gpt2"))[0].parameters())
    with pytest.raises(UserError, match="--num-layers-unfrozen 4: must be -1, or 1 to 3"):
        load(model_path("gpt2"), num_layers_unfrozen=4)


# --- reward model: texts ----------------------------------------------------------------------------------------------


def test_texts_end_with_eos_and_lose_their_beginning():
    own = reward_model.reward_tokenizer(char_tokenizer(), 6)
    assert own.decode(own("abc")["input_ids"]) == "abc<eos>"
    assert own.decode(own("abcdefgh", truncation=True)["input_ids"]) == "defgh<eos>"
    assert own.pad_token == "<pad>" and own.padding_side == "right"


def test_eos_never_pads():
    """GPT-2's tokenizer has one special token. Where it padded, scores would be those of the token before it."""
    own = reward_model.reward_tokenizer(bpe_tokenizer(["ab ab"], 300), 6)
    assert own.pad_token_id == len(own) - 1 != own.eos_token_id
    assert own("ab")["input_ids"][-1] == own.eos_token_id


ROWS = [{"prompt": f"is {a}{b} a film ", "chosen": f"good {c}", "rejected": f"bad {c}"}
        for a in "abcd" for b in "efgh" for c in "xy"]


def test_pairs_are_the_texts_that_ppo_hands_over(model_path):
    """prompt + output + EOS; equal pairs left out; of dialogues what the template writes, without special tokens."""
    _, tokenizer, own = load(model_path("gpt2"))
    equal = {"prompt": "a ", "chosen": "b", "rejected": "b"}
    pairs = reward_model.encode(dpo.load_pairs([ROWS[0], equal], None, "--dataset", None), tokenizer, own)
    assert [[own.decode(side) for side in pair] for pair in pairs] == [
        ["is ae a film good x<eos>", "is ae a film bad x<eos>"]]
    tokenizer.chat_template = ("{% for m in messages %}{{ '<bos>' + m['role'][0] + ' ' + m['content'] + '<eos>' }}"
                               "{% endfor %}{% if add_generation_prompt %}{{ '<bos>a ' }}{% endif %}")
    said = [{"role": "user", "content": "hi"}]
    chat = {"chosen": [*said, {"role": "assistant", "content": "yes"}],
            "rejected": [*said, {"role": "assistant", "content": "no"}]}
    pairs = reward_model.encode(dpo.load_pairs([chat], None, "--dataset", None), tokenizer, own)
    assert [[own.decode(side) for side in pair] for pair in pairs] == [["u hia yes<eos>", "u hia no<eos>"]]
    _, tokenizer, own = load(model_path("gpt2"), max_length=6)
    cut = [{"prompt": "a ", "chosen": "no end", "rejected": "end"}]
    pairs = reward_model.encode(dpo.load_pairs(cut, None, "--dataset", None), tokenizer, own)
    assert [[own.decode(side) for side in pair] for pair in pairs] == [["o end<eos>", "a end<eos>"]]
    longer = [{"prompt": "a", "chosen": "no abcde", "rejected": "yes abcde"}]
    assert not reward_model.encode(dpo.load_pairs(longer, None, "--dataset", None), tokenizer, own), "equal once cut"


# --- reward model: a run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_a_trained_model_scores_for_ppo_as_in_training(kind, model_path, tmp_path, capsys):
    """It learns; DIR/model by `load_classifier`, padded among others and cut, scores texts as the training forward
    does; ppo.py takes it."""
    data, folder = write(tmp_path / "pairs.jsonl", ROWS), model_path("gpt2")
    if kind == "bpe":
        folder = str(tmp_path / "start")
        tokenizer = bpe_tokenizer([text for row in ROWS for text in row.values()], 280)
        torch.manual_seed(1)
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=len(tokenizer))
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    args = reward_model.Args(model=folder, dataset=data, output_dir=f"{tmp_path}/rm", held_out=0.2, batch_size=8,
                             micro_batch_size=3, learning_rate=1e-2, epochs=3, max_length=30)
    model, own, _, after = reward_model.main(args)
    assert after == 1.0 and "held-out accuracy" in capsys.readouterr().out
    texts = ["is ae a film good x", "a", "is ae a film bad x, and much more that does not fit in at all"]
    rows = own(texts, truncation=True)["input_ids"]
    assert max(map(len, rows)) == 30 and all(row[-1] == own.eos_token_id for row in rows)
    expected = [alone(model, row) for row in rows]
    assert load_classifier(f"{tmp_path}/rm/model", "--reward", "cpu", 3)(texts) == pytest.approx(expected, abs=1e-4)
    assert expected[0] > expected[2]
    if kind == "characters":
        ppo.train(ppo.Args(model=folder, reward=f"{tmp_path}/rm/model", total_episodes=4, rollout_batch_size=4,
                           batch_size=4, max_length=16, max_new_tokens=4, output_dir=f"{tmp_path}/ppo"),
                  prompts=["is a"])
        scores = [json.loads(line) for line in open(f"{tmp_path}/ppo/samples.jsonl")]
        for line in scores:
            ids = own(line["prompt"] + line["output"])["input_ids"]
            assert line["reward"] == pytest.approx(alone(model, ids), abs=1e-4)


def test_mistakes_of_the_reward_model_are_one_line(model_path, tmp_path, monkeypatch):
    data = write(tmp_path / "pairs.jsonl", ROWS[:4])
    good = dict(model=model_path("gpt2"), dataset=data, output_dir=str(tmp_path / "rm"))
    for change, words in [({"model": ""}, ["give --model"]), ({"model": f"{tmp_path}/none"}, ["/none"]),
                          ({"model": model_path("t5")}, ["--model", "decoder"]), ({"held_out": 0.0}, ["0 held out"]),
                          ({"dataset": f"{tmp_path}/x.jsonl"}, ["no such"])]:
        refused(words, reward_model.main, reward_model.Args(**{**good, **change}))
    monkeypatch.setenv("RANK", "0")
    refused(["one process"], reward_model.main, reward_model.Args(**good))
    monkeypatch.delenv("RANK")
    (tmp_path / "rm/model").mkdir(parents=True)
    refused(["--output-dir", "already"], reward_model.main, reward_model.Args(**good))


def test_a_roberta_reads_what_its_positions_behind_its_pad_hold(tmp_path):
    config = transformers.RobertaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=34,
        vocab_size=61, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    transformers.RobertaModel(config).save_pretrained(tmp_path)
    tokenizer = char_tokenizer()
    tokenizer.pad_token = "<bos>"
    tokenizer.save_pretrained(tmp_path)
    model, _, own = reward_model.load_model(reward_model.Args(model=str(tmp_path)))
    pairs = [(own("good " * 20, truncation=True)["input_ids"], own("bad " * 20, truncation=True)["input_ids"])]
    assert [len(side) for side in pairs[0]] == [32, 32]
    reward_model.run_batch(model, pairs, 1, torch.float32)


# --- rejection sampling -----------------------------------------------------------------------------------------------


def archive(*draws):
    """An archive of (output, score), outputs being single tokens."""
    made = rft.Archive()
    for token, score in draws:
        made.add([token], score)
    return made


def chosen(archives, percentile):
    return [[token for token, in some] for some in rft.select(archives, percentile)]


def test_selection_by_hand():
    """Scores at or above the percentile of all draws of their prompt, duplicates counted there and trained once."""
    first = archive((1, 0.0), (2, 0.5), (2, 0.5), (3, 0.7), (4, 1.0))  # median 0.5, of different outputs 0.6
    second = archive((1, 0.1), (5, 0.2), (6, 0.3))  # median 0.2, the lowest threshold: exclusive
    assert chosen([first, second], 0.5) == [[2, 3, 4], [6]]
    assert np.quantile([0.0, 0.5, 0.5, 0.7, 1.0], 0.9) == pytest.approx(0.88)
    assert chosen([first, second], 0.9) == [[4], [6]]
    assert chosen([first], 0.0) == [[2, 3, 4]], "all of the lowest score are out"


def test_ties_at_the_bottom_are_out_and_at_the_top_in():
    bottom = archive((1, 0.0), (2, 0.0), (3, 0.0), (4, 0.0), (5, 1.0))  # most are invalid: its median is the lowest
    top = archive((1, 1.0), (2, 1.0), (3, 1.0), (4, 0.0))
    assert chosen([bottom, top], 0.5) == [[5], [1, 2, 3]]
    assert chosen([bottom, bottom], 0.5) == [[5], [5]], "also where all thresholds are the lowest score"
    assert chosen([top, top], 0.5) == [[1, 2, 3], [1, 2, 3]]
    assert chosen([archive((1, 1.0), (2, 1.0))], 0.5) == [[1, 2]], "nothing is better than anything"


def test_percentiles_rise_from_start_to_end():
    args = rft.Args(start_percentile=0.5, end_percentile=0.9, improve_steps=3)
    assert [rft.percentile_of(step, args) for step in range(3)] == pytest.approx([0.5, 0.7, 0.9])
    assert rft.percentile_of(0, rft.Args(start_percentile=0.5, end_percentile=0.9)) == 0.5


REWARD = """
def reward(outputs):
    return [float(output.count("a")) for output in outputs]
"""


def test_rejection_sampling_of_a_model(model_path, tmp_path, capsys, monkeypatch):
    """A reward of the user's own goes up. What is trained: the sampled tokens and no prompt, at most so many a prompt,
    each once, in random order."""
    (tmp_path / "mine.py").write_text(REWARD)
    steps, shuffled, real = [], 0, rft.sft.batch_loss
    monkeypatch.setattr(rft.sft, "batch_loss", lambda model, examples, *rest: (
        steps.append(examples), real(model, examples, *rest))[1])
    sampled, sample = set(), rft.sample_texts

    def spy(*args, **options):
        items = sample(*args, **options)
        sampled.update((*item["prompt_ids"], -1, *item["tokens"]) for item in items)
        return items

    monkeypatch.setattr(rft, "sample_texts", spy)
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "b"}, {"prompt": "cd"}])
    args = rft.Args(model=model_path("gpt2"), prompts=prompts, reward=f"{tmp_path}/mine.py:reward", rounds=4,
                    generations=60, improve_steps=2, start_percentile=0.8, most_per_prompt=5, batch_size=4,
                    max_new_tokens=5, learning_rate=3e-3, output_dir=f"{tmp_path}/run")
    means = rft.main(args)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:4]] == [f"round {i}" for i in range(1, 5)]
    assert len(means) == 5 and means[-1] > means[0] + 0.3
    known = [load_tokenizer(args.model)(text)["input_ids"] for text in ("b", "cd")]
    for example in (example for batch in steps for example in batch):
        assert example.prompt in known and 1 <= len(example.output) <= 5
        assert list(example.trained) == [1] * len(example.output)
    trained = [int(number) for line in lines[:4] for number in line.split("trained on ")[1].split(" of")[0].split(", ")]
    assert len(trained) == 8 and max(trained) == 10, "5 of each of 2 prompts at most, in 4 rounds of 2 steps"
    for count in trained:  # the steps of each improve step, in order
        batches = [steps.pop(0) for _ in range(math.ceil(count / 4))]
        some = [(*example.prompt, -1, *example.output) for batch in batches for example in batch]
        assert len(set(some)) == len(some) == count and all(len(batch) <= 4 for batch in batches)
        assert set(some) <= sampled, "each was drawn for its prompt"
        shuffled += some != sorted(some, key=lambda row: row[0])
    assert not steps and shuffled
    load_lm(f"{tmp_path}/run/model")
    refused(["--output-dir", "already"], rft.main, args)
    for flags in (dict(model=args.model, prompts=prompts), dict(model=args.model, reward=args.reward),
                  dict(reward=args.reward)):
        short = rft.Args(**flags, rounds=1, generations=2, output_dir=f"{tmp_path}/other")
        refused(["--reward", "none of them"], rft.main, short)


def test_where_nothing_is_selected_nothing_is_trained(model_path, tmp_path, capsys, monkeypatch):
    """As a reward that is partly chance may have it."""
    (tmp_path / "mine.py").write_text(REWARD)
    monkeypatch.setattr(rft, "select", lambda archives, _: [[] for _ in archives])
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "b"}])
    rft.main(rft.Args(model=model_path("gpt2"), prompts=prompts, reward=f"{tmp_path}/mine.py:reward", rounds=1,
                      generations=2, improve_steps=1, max_new_tokens=2, output_dir=f"{tmp_path}/run"))
    assert re.search(r"trained on 0 of \d outputs; 0 steps; \d+ s\n", capsys.readouterr().out)


def test_the_start_of_another_seed_is_not_taken(tmp_path, monkeypatch):
    """Each seed has a graph of its own, and a run that was broken off leaves its start behind."""
    seen = []

    def stop(path, *_):
        seen.append(path)
        raise UserError("enough")

    monkeypatch.setattr(rft, "write_cloned_walker", stop)
    for seed in (1, 2):
        refused(["enough"], rft.main, rft.Args(**{**rft.preset(rft.Args()), "seed": seed, "output_dir": str(tmp_path)}))
    assert len(set(seen)) == 2


def test_rejection_sampling_of_random_walks(tmp_path, capsys, monkeypatch):
    """Two rounds are enough to be better than the start, a walker that has seen the walks twice."""
    monkeypatch.setattr(randomwalks, "cloned_walker", functools.partial(randomwalks.cloned_walker, epochs=2))
    args = rft.Args(**{**rft.preset(rft.Args()), "rounds": 2, "generations": 20, "output_dir": str(tmp_path / "run")})
    means = rft.main(args)
    assert means[-1] > means[0] + 0.1 and "round 2" in capsys.readouterr().out


# --- list programs ----------------------------------------------------------------------------------------------------


def test_programs_solve_their_problems(tmp_path, capsys):
    programs.main(programs.Args(count=300, output=f"{tmp_path}/p.jsonl", seed=4))
    rows = read_rows(f"{tmp_path}/p.jsonl", "--dataset")
    assert len({row["prompt"] for row in rows}) == len(rows) == 300 and "300 problems" in capsys.readouterr().out
    inputs, targets = ([row[name] for row in rows] for name in ("input", "target"))
    assert rewards.list_program([row["completion"] for row in rows], inputs, targets) == [1.0] * 300
    assert {len(row["completion"].split("|")) for row in rows} == {1, 2, 3}
    assert all(row["target"] and row["target"] != row["input"] for row in rows)
    row = rows[0]
    assert row["prompt"] == f"Input: {row['input']} Output: {row['target']} Program:"
    assert sample_row(row, "here").turns == [row["prompt"], row["completion"]] and row["completion"][0] == " "
    assert programs.problems(10, 4) == rows[:10] != programs.problems(10, 5)


def test_mistakes_of_programs_are_one_line(tmp_path):
    refused(["--count 0"], programs.main, programs.Args(count=0))
    refused(["--output", "nowhere"], programs.main, programs.Args(count=1, output=f"{tmp_path}/nowhere/p.jsonl"))


def test_too_many_programs_are_refused(monkeypatch):
    monkeypatch.setattr(programs, "problem", lambda rng: {"prompt": "the same"})
    refused(["--count 2", "only 1"], programs.problems, 2, 1)


# --- Simulacra --------------------------------------------------------------------------------------------------------


def database(path):
    """Three prompts, four images, five ratings, of which one is missing and one is of an image without a prompt."""
    with sqlite3.connect(path) as connection:
        connection.executescript("""
            CREATE TABLE generations (id INTEGER PRIMARY KEY, prompt TEXT, method INTEGER);
            CREATE TABLE images (id INTEGER PRIMARY KEY, gid INTEGER, idx INTEGER);
            CREATE TABLE ratings (sid INTEGER, iid INTEGER, rating INTEGER, verified INTEGER);
            INSERT INTO generations VALUES (1, 'a "red" dress', 2), (2, 'the sea', 3), (3, ' ', 3);
            INSERT INTO images VALUES (10, 2, 0), (11, 1, 0), (12, 1, 1), (13, 3, 0);
            INSERT INTO ratings VALUES (7, 11, 8, 1), (7, 12, 3, 1), (8, 10, 10, 0), (8, 11, NULL, 1), (8, 13, 5, 1);
        """)
    connection.close()
    return str(path)


def test_simulacra_rows(tmp_path, capsys):
    simulacra.main(simulacra.Args(database(tmp_path / "a?b.sqlite"), output=f"{tmp_path}/rows.jsonl"))
    rows = read_rows(f"{tmp_path}/rows.jsonl", "--dataset")
    assert sorted((row["text"], row["reward"]) for row in rows) == [
        ('a "red" dress', 3), ('a "red" dress', 8), ("the sea", 10)]
    assert all(set(row) == {"text", "reward"} for row in rows)
    assert "3 ratings of 2 prompts" in (said := capsys.readouterr().out) and "mean 7.00" in said


def test_mistakes_of_simulacra_are_one_line(tmp_path):
    path = tmp_path / "x.sqlite"
    refused(["no such file"], simulacra.rated_prompts, str(path))
    assert not path.exists()
    refused(["give the SQLite file"], simulacra.rated_prompts, "")
    path.write_text("not a database, but long enough to look at")
    refused(["not a database"], simulacra.rated_prompts, str(path))
    with sqlite3.connect(tmp_path / "empty") as connection:
        connection.execute("CREATE TABLE ratings (iid INTEGER, rating INTEGER)")
    connection.close()
    refused(["no such table: images"], simulacra.rated_prompts, f"{tmp_path}/empty")
    with sqlite3.connect(database(tmp_path / "unrated")) as connection:
        connection.execute("DELETE FROM ratings")
    connection.close()
    refused(["no rating"], simulacra.rated_prompts, f"{tmp_path}/unrated")


def test_mistakes_on_the_command_line():
    ended = run_forked("examples/simulacra.py", "--outptu", "x")
    assert ended.returncode == 2 and "did you mean --output?" in ended.stderr and ended.stderr.count("\n") == 1

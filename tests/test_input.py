"""What users get wrong: flags, files, rows, prompts, functions, scores. Each mistake ends in one line that says what
and where. And the random walks, which are the input of a run that is given none."""

import contextlib
import copy
import csv
import dataclasses
import datetime
import functools
import gzip
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, bpe_tokenizer, char_tokenizer, run_forked, run_script
from tokenizers import processors
from transformers.utils import chat_template_utils

import dpo
import ilql
import ppo
import sft
from common import cli, data
from common.cli import UserError
from common.data import chat_ends, check_data, encode_prompts, prompt_room, prompt_rows, read_rows, shuffled
from common.functions import call, check_scores, load_function
from common.randomwalks import LETTERS, random_walks
from common.randomwalks import tokenizer as walks_tokenizer


@contextlib.contextmanager
def refused(*parts):
    """Expect a UserError whose message is one line with these parts."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message and len(message) < 500
    for part in parts:
        assert part in message


def parse(*words):
    return cli.parse(ppo.Args, ppo.preset, list(words))


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words,parts", [
    (["--lerning-rate", "1"], ["unknown flag --lerning-rate", "did you mean --learning-rate?"]),
    (["--modle=gpt2"], ["unknown flag --modle", "did you mean --model?"]),
    (["--zzzzzz"], ["unknown flag --zzzzzz", "--help"]),
    (["--learning-rate", "fast"], ["--learning-rate", "'fast'"]),
    (["--batch-size", "1.5"], ["--batch-size", "'1.5'"]),
    (["--kl-target", "high"], ["--kl-target", "'high'"]),
    (["--eval-top-k", "1", "x"], ["--eval-top-k", "'x'"]),
    (["--dtype", "float16"], ["--dtype", "'float16'", "bfloat16"]),
    (["--learning-rate"], ["--learning-rate", "Missing value"]),
    (["--learning-rate", "--seed", "3"], ["--learning-rate", "Missing value"]),
])
def test_a_wrong_flag_is_named_in_one_line(words, parts):
    with refused(*parts):
        parse(*words)


def test_flags_of_every_type():
    args = parse("--learning-rate=3e-4", "--track", "--no-offload", "--eval-temperature", "0.5", "0.7", "--stop", "\n",
                 "|", "--kl-target", "6", "--reward-clip", "None", "--num-layers-unfrozen", "-1", "--seed", "7")
    assert (args.learning_rate, args.track, args.offload, args.eval_temperature) == (3e-4, True, False, [0.5, 0.7])
    assert (args.stop, args.kl_target, args.reward_clip) == (["\n", "|"], 6.0, None)
    assert (args.num_layers_unfrozen, args.seed) == (-1, 7)


@pytest.fixture
def yaml_file(tmp_path):
    """A function from a text to a YAML file with it."""

    def write(text):
        (tmp_path / "run.yaml").write_text(text)
        return str(tmp_path / "run.yaml")

    return write


YAML = """
learning_rate: 3e-4        # a text to YAML, which wants 3.0e-4
kl-coef: 1.0e-3
track: true
offload: false
eval_temperature: [0.5, 0.7]
stop: []
reward_clip: null
num_layers_unfrozen: -1
model: some/path
"""


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_yaml_lies_under_the_command_line(form, yaml_file):
    path = yaml_file(YAML)
    args = parse(*form.format(path).split())
    expected = dict(learning_rate=3e-4, kl_coef=1e-3, track=True, offload=False, eval_temperature=[0.5, 0.7], stop=[],
                    reward_clip=None, num_layers_unfrozen=-1, model="some/path", config=path)
    assert {name: getattr(args, name) for name in expected} == expected
    words = "--no-track --offload --learning-rate 1 --eval-temperature 2 --stop | --reward-clip 5 --model other".split()
    changed = dict(learning_rate=1.0, track=False, offload=True, eval_temperature=[2.0], stop=["|"], reward_clip=5.0,
                   model="other")
    for order in ([*form.format(path).split(), *words], [*words, *form.format(path).split()]):
        args = parse(*order)
        assert {name: getattr(args, name) for name in expected} == expected | changed


@pytest.mark.parametrize("text,parts", [
    ("lerning_rate: 1", ["--config", "'lerning_rate'", "did you mean 'learning_rate'?"]),
    ("zzzzzz: 1", ["--config", "'zzzzzz'"]),
    ("a: b: c", ["--config", "not valid YAML", "line 1"]),
    ("seed: 1\nstop: [", ["--config", "not valid YAML", "line 2"]),
    ("- 1\n- 2", ["--config", "list"]),
    ("just words", ["--config", "str"]),
    ("learning_rate: fast", ["--learning-rate", "'fast'"]),
    ("dtype: float16", ["--dtype", "'float16'"]),
])
def test_a_wrong_yaml_file_is_refused(text, parts, yaml_file):
    path = yaml_file(text)
    with refused(*parts, *([path] if parts[0] == "--config" else [])):
        parse("--config", path)


def test_a_missing_or_empty_yaml_file(yaml_file):
    with refused("--config", "nowhere.yaml", "No such file"):
        parse("--config", "nowhere.yaml")
    path = yaml_file("# nothing\n")
    assert parse("--config", path) == dataclasses.replace(parse(), config=path)


def test_presets_lie_under_yaml_and_flags(yaml_file):
    """The task's defaults apply once the task is chosen, wherever that was, and only where nothing else is said."""
    walks, other = parse(), ppo.Args()
    assert ppo.PRESETS["randomwalks"].items() <= dataclasses.asdict(walks).items()
    assert walks.max_new_tokens != other.max_new_tokens, "the preset must differ from the default to be seen"
    assert parse("--reward", "x.py:f") == dataclasses.replace(other, reward="x.py:f")
    assert parse("--max-new-tokens", str(other.max_new_tokens)).max_new_tokens == other.max_new_tokens
    assert parse("--reward", "sentiment").prompts == ppo.PRESETS["sentiment"]["prompts"]
    path = yaml_file("reward: sentiment\nprompts: mine.jsonl\n")
    args = parse("--config", path, "--prompt-words", "7")
    assert (args.prompts, args.prompt_words) == ("mine.jsonl", 7)
    assert args.eval_prompts is None, "own prompts are evaluated on, too"
    assert parse("--reward", "sentiment").eval_prompts == ppo.PRESETS["sentiment"]["eval_prompts"]


# --- as a user sees it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words,parts", [
    (["--lerning-rate", "1"], ["--lerning-rate", "--learning-rate"]),
    (["--model", "{model}", "--reward", "json:loads", "--prompts", "missing.jsonl"],
     ["--prompts missing.jsonl", "no such file"]),
    (["--model", "no/such-model", "--reward", "json:loads"], ["--model", "no/such-model"]),
], ids=["flag", "prompts", "model"])
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(words, parts, model_path, tmp_path):
    done = run_forked(f"{ROOT}/ppo.py", *(word.format(model=model_path("gpt2")) for word in words), cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("ppo.py: error: ")
    assert all(part in lines[0] for part in parts)
    assert "Traceback" not in done.stdout + done.stderr


def test_letters_that_a_locale_lacks_stop_no_run(tmp_path):
    """In a locale of ASCII alone, samples are written all the same, and the terminal shows what it can."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from common import cli, distributed, metrics
import sft
def train(args):
    distributed.init(1)
    log = metrics.RunLog(".", args, 0, 1, False, 0.0)
    log.samples(1, [{{"prompt": chr(0x1f642)}}])
    metrics.say(chr(0x1f642))
cli.run(train, sft.Args)
"""
    done = run_script("-c", code, cwd=tmp_path, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "samples.jsonl").read_text(encoding="utf-8"))["prompt"] == "🙂"


def test_help_lists_every_flag(tmp_path):
    done = run_script(f"{ROOT}/ppo.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    flags = {word.strip(",│ ") for word in done.stdout.split()}
    missing = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(ppo.Args)]
    assert not [flag for flag in missing if flag not in flags]
    assert not list(tmp_path.iterdir()), "--help leaves no files"


# --- settings that cannot work ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags,parts", [
    *[({name: value}, [f"--{name.replace('_', '-')} {value}", "more than 0"]) for name, value in dict(
        total_episodes=0, rollout_batch_size=0, ppo_epochs=0, batch_size=-4, micro_batch_size=0, learning_rate=0.0,
        max_new_tokens=0, temperature=0.0, generation_batch_size=0, reward_batch_size=0, eval_every=0,
        num_eval_prompts=0, eval_samples=0, keep_checkpoints=0).items()],
    *[({name: value}, [f"--{name.replace('_', '-')}"]) for name, values in dict(
        max_steps=[0, -1], shard_size=[0], kl_target=[0.0], kl_horizon=[0], reward_clip=[-1.0], prompt_words=[-1],
        warmup_steps=[-1], save_every=[-1], clip_range=[-1.0], seed=[-1], lora_rank=[-1], num_value_layers=[-1],
        num_layers_unfrozen=[0, -2], min_new_tokens=[41], eval_temperature=[[], [-1.0]], eval_top_k=[[-1], []],
        eval_top_p=[[0.0], [1.1]], stop=[[""]], temperature=[float("nan")], learning_rate=[float("inf")],
        gamma=[1.5], lam=[2.0], adam_beta1=[-0.1], adam_beta2=[1.5], missing_eos_penalty=[float("nan")],
        reward_device=["cuda:7"]).items() for value in values],
    (dict(model="x"), ["--model x", "--reward"]),
    (dict(batch_size=129), ["--batch-size 129", "--rollout-batch-size 128"]),
    (dict(total_episodes=127), ["--total-episodes 127", "--rollout-batch-size 128"]),
    (dict(lora_rank=8, num_layers_unfrozen=2), ["--num-layers-unfrozen", "--lora-rank"]),
    (dict(reward="sentiment"), ["--reward sentiment", "--model"]),
    (dict(reward_model="x"), ["--reward-model", "--reward sentiment"]),
    (dict(reference_std=2.0), ["--reference-std", "--reward-scaling reference"]),
    (dict(reference_std=0.0, reward_scaling="reference"), ["--reference-std"]),
])
def test_impossible_settings_name_their_flag(flags, parts):
    with refused(*parts):
        ppo.check(ppo.Args(**flags))


@pytest.mark.parametrize("flags,positions,room", [
    (dict(max_length=41), None, 1), (dict(max_length=40), None, "--max-length 40.*--max-new-tokens 40"),
    (dict(), 64, 24), (dict(), None, 984), (dict(), 2048, 984),
    (dict(max_length=65), 64, "--max-length 65: the model has 64 positions"),
    (dict(max_new_tokens=64), 64, "--max-length 64.*--max-new-tokens 64")])
def test_lengths_fit_each_other_and_the_model(flags, positions, room):
    args, config = ppo.Args(**flags), SimpleNamespace(max_position_embeddings=positions)
    if isinstance(room, int):
        assert prompt_room(args.max_length, args.max_new_tokens, config) == room
    else:
        with pytest.raises(UserError, match=room):
            prompt_room(args.max_length, args.max_new_tokens, config)


def test_possible_settings_pass():
    for flags in (dict(), dict(max_length=41), dict(batch_size=128, total_episodes=128), dict(lora_rank=8),
                  dict(model="x", reward="sentiment", reward_model="y"),
                  dict(reference_std=2.0, reward_scaling="reference")):
        ppo.check(ppo.Args(**flags))
    ppo.check(ppo.Args(reward="mine"), reward_fn=len)


# --- rows from files --------------------------------------------------------------------------------------------------

ROWS = [{"prompt": 'Grüße, "Welt" 你好 😀', "answer": 1.5, "words": ["a", "ü"]},
        {"prompt": "two\r\nlines,\nand a comma", "answer": -2.0, "words": []},
        {"prompt": "", "answer": 0.0, "words": ["\u2028"]}]


def write_rows(path, rows):
    """Write rows as a user's tools would: pandas and spreadsheets for CSV, arrow for Parquet."""
    if path.endswith(".jsonl"):
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif path.endswith(".jsonl.gz"):
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write("\n\n".join(json.dumps(row) for row in rows))
    elif path.endswith(".json"):
        with open(path, "w", encoding="utf-8") as file:
            json.dump(rows, file, ensure_ascii=False, indent=1)
    elif path.endswith(".csv"):
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
def test_every_format_gives_the_same_rows(ending, tmp_path):
    """Letters of every kind, quotes, line breaks inside a text; CSV knows texts only."""
    expected = [{name: str(value) for name, value in row.items()} for row in ROWS] if ending == "csv" else ROWS
    assert read_rows(write_rows(f"{tmp_path}/rows.{ending}", ROWS), "--prompts") == expected


@pytest.mark.parametrize("name,text,parts", [
    ("bad.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"\n', ["line 3", "not valid JSON"]),
    ("row.jsonl", '{"prompt": "a"}\n"b"\n', ["row 2", "object", "str 'b'"]),
    ("row.json", '[{"prompt": "a"}, {"prompt": "b"}, null]', ["row 3", "object", "None"]),
    ("bad.json", '[{"prompt": "a"},]', ["cannot be read", "line 1"]),
    ("empty.jsonl", "\n", ["no rows"]),
    ("empty.json", "[]", ["no rows"]),
    ("empty.csv", "prompt,answer\n", ["no rows"]),
    ("not.parquet", "prompt", ["cannot be read"]),
    ("not.jsonl.gz", '{"prompt": "a"}\n', ["cannot be read", "gzip"]),
])
def test_files_that_cannot_be_read_name_the_place(name, text, parts, tmp_path):
    path = f"{tmp_path}/{name}"
    with open(path, "w") as file:
        file.write(text)
    with refused(f"--eval-prompts {path}", *parts):
        read_rows(path, "--eval-prompts")


def test_bytes_that_are_not_unicode(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with refused("--prompts", "latin.jsonl", "utf-8"):
        read_rows(f"{tmp_path}/latin.jsonl", "--prompts")


def test_a_missing_file_and_a_hub_data_set_that_cannot_be_reached(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet", "A.CSV"):
        with refused(f"--prompts {tmp_path}/{name}", "no such file"):
            read_rows(f"{tmp_path}/{name}", "--prompts")
    for name in ("prompts.txt", "no-such-owner/no-such-set:train"):
        with refused(f"--prompts {name}", "cannot be read", ".jsonl", ".csv", ".parquet", "name:split",
                     "name:configuration:split"):
            read_rows(name, "--prompts")


def test_a_hub_data_set_is_name_perhaps_configuration_and_split(monkeypatch):
    import datasets

    seen = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: seen.append((*names, split))
                        or datasets.Dataset.from_list(ROWS))
    for words in ("owner/set:test", "owner/set", "set:", "set:train[:10]", "wmt16:de-en:train", "set:3.0.0:test[:5%]"):
        assert read_rows(words, "--prompts") == ROWS
    assert seen == [("owner/set", "test"), ("owner/set", "train"), ("set", "train"), ("set", "train[:10]"),
                    ("wmt16", "de-en", "train"), ("set", "3.0.0", "test[:5%]")]


# --- prompts ----------------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "hi"}]


def test_prompts_of_every_form_become_rows_and_stay_as_they_were():
    prompts = ["a", {"prompt": "b"}, {"text": "c"}, {"prompt": CHAT}, {"prompt": "d", "text": "kept"}]
    before = copy.deepcopy(prompts)
    rows = prompt_rows(prompts, "--prompts")
    assert [row["prompt"] for row in rows] == ["a", "b", "c", CHAT, "d"]
    assert [row["text"] for row in rows] == [None] * 4 + ["kept"]
    for row in rows:
        row["prompt"] = row["new"] = "changed"
    assert prompts == before


def test_every_row_gets_every_column():
    rows = prompt_rows(["a", {"prompt": "b", "answer": 1}, {"text": "c", "source": "x"}], "--prompts")
    assert rows == [{"prompt": "a", "answer": None, "source": None}, {"prompt": "b", "answer": 1, "source": None},
                    {"prompt": "c", "answer": None, "source": "x"}]


@pytest.mark.parametrize("prompts,parts", [
    ([], ["no rows"]),
    (["a", 3], ["row 2", "int 3"]),
    ([None], ["row 1", "None"]),
    ([{"text": 1.5}], ["row 1", "float 1.5"]),
    (["a", "b", {"question": "c", "answer": "d"}], ["row 3", "'prompt' or 'text'", "question, answer"]),
    ([{}], ["row 1", "'prompt' or 'text'", "nothing"]),
    ([{"prompt": []}], ["row 1", "list []"]),
    ([{"prompt": ["a"]}], ["row 1", "list of messages"]),
    ([{"prompt": [{"role": "user"}]}], ["row 1", "list of messages"]),
    ([{"prompt": ["long" * 100]}], ["row 1", "..."]),
])
def test_wrong_prompts_name_the_row(prompts, parts):
    with refused("--prompts x.csv", *parts):
        prompt_rows(prompts, "--prompts x.csv")


def test_load_prompts_takes_the_first_words_of_texts_only(tmp_path):
    """Given rows win over a file, a file over the default; a message list keeps all its words."""
    path = write_rows(f"{tmp_path}/p.jsonl", [{"prompt": " one two  three", "answer": "a b c"}, {"prompt": CHAT}])
    rows = ppo.load_prompts(None, path, "--prompts", ["default"], 2)
    assert rows == [{"prompt": "one two", "answer": "a b c"}, {"prompt": CHAT, "answer": None}]
    given = [{"prompt": "a b c"}, "d"]
    assert ppo.load_prompts(given, path, "--prompts", [], 2) == [{"prompt": "a b"}, {"prompt": "d"}]
    assert given == [{"prompt": "a b c"}, "d"]
    assert ppo.load_prompts(None, None, "--prompts", [" a  b\nc"], None) == [{"prompt": " a  b\nc"}]
    with refused("--prompts", "no rows"):
        ppo.load_prompts([], path, "--prompts", ["default"], None)
    with refused(f"--prompts {write_rows(f'{tmp_path}/q.jsonl', [{'a': 'b'}])}", "row 1"):
        ppo.load_prompts(None, f"{tmp_path}/q.jsonl", "--prompts", [], None)


def encode(prompts, tokenizer, room=100, side="left", seq2seq=False):
    return encode_prompts([{"prompt": prompt} for prompt in prompts], tokenizer, room, side, seq2seq)


def with_specials(template):
    """The character tokenizer with special tokens added as `template` says, such as "<bos> $A"."""
    tokenizer = char_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    return tokenizer


def ids_of(text):
    return char_tokenizer()(text)["input_ids"]


def test_long_prompts_are_cut_on_the_chosen_side_and_counted():
    prompts = ["abc", "abcd", "abcde"]
    left, cut = encode(prompts, char_tokenizer(), 4, "left")
    assert left == [ids_of("abc"), ids_of("abcd"), ids_of("bcde")] and cut == [False, False, True]
    right, cut = encode(prompts, char_tokenizer(), 4, "right")
    assert right == [ids_of("abc"), ids_of("abcd"), ids_of("abcd")] and cut == [False, False, True]


def test_an_empty_prompt_becomes_a_start_token():
    """BOS, or EOS where there is no BOS; without either it is refused. Other prompts need neither."""
    gpt2 = bpe_tokenizer(["some text"])
    for seq2seq in (False, True):
        assert encode(["", "a"], char_tokenizer(), seq2seq=seq2seq)[0] == [[1], ids_of("a")]
        assert encode([""], char_tokenizer(bos=False), seq2seq=seq2seq)[0] == [[2]]
        assert encode([""], gpt2, seq2seq=seq2seq)[0] == [[gpt2.eos_token_id]]
        neither = char_tokenizer(bos=False)
        neither.eos_token = None
        assert encode(["a"], neither, seq2seq=seq2seq)[0] == [ids_of("a")]
        with refused("empty", "BOS", "EOS"):
            encode(["a", ""], neither, seq2seq=seq2seq)


def test_special_tokens_are_the_tokenizers_own_but_nothing_ends_a_causal_prompt():
    """Llama's BOS stays; an appended EOS stays for an encoder only, one that is in the text stays anywhere."""
    assert encode(["ab"], with_specials("<bos> $A"))[0] == [[1, *ids_of("ab")]]
    both = with_specials("<bos> $A <eos>")
    assert encode(["ab", ""], both)[0] == [[1, *ids_of("ab")], [1]]
    assert encode(["ab", ""], both, seq2seq=True)[0] == [[1, *ids_of("ab"), 2], [1, 2]]
    assert encode(["", "ab"], with_specials("$A <eos>"))[0] == [[1], ids_of("ab")]
    assert encode(["ab<eos>"], char_tokenizer())[0] == [[*ids_of("ab"), 2]]
    assert encode(["abc"], both, room=4)[1] == [False], "what is taken off is not counted as cut"


def test_messages_go_through_the_chat_template():
    """With the opening of the answer, and without a second BOS."""
    tokenizer = with_specials("<bos> $A <eos>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ message.role[0] }} {{ message.content }}|{% endfor %}"
        "{% if add_generation_prompt %}a {% endif %}")
    messages = [{"role": "system", "content": "be kind"}, *CHAT]
    for seq2seq in (False, True):
        ids, cut = encode([messages, "hi"], tokenizer, seq2seq=seq2seq)
        assert ids == [[1, *ids_of("s be kind|u hi|a ")], [1, *ids_of("hi"), *([2] if seq2seq else [])]]
        assert cut == [False, False]


OPENINGS = {  # chat templates, and what each writes after a user's last word
    "{% for m in messages %}.{{ m.role[0] }} {{ m.content }}!{% endfor %}{% if add_generation_prompt %}.a {% endif %}":
        "!.a ",
    "{% for m in messages %}{{ m.content }}|{% endfor %}": "|",
    "<bos>{{ messages[-1].content }}": "",
    "<bos>ab": "ab",
}


@pytest.mark.parametrize("template", OPENINGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_opening_of_an_answer_outlives_a_cut(template, side):
    """Whatever side a chat is cut on: without it the model would go on with the user's words."""
    tokenizer, opening = char_tokenizer(), ids_of(OPENINGS[template])
    tokenizer.chat_template = template
    messages = [{"role": "user", "content": "abcdefghijklmnop"}, {"role": "user", "content": "ABCDEFGHIJKLMNOP"}]
    (whole,), _ = encode([messages], tokenizer)
    head = int(whole[0] == 1)
    assert chat_ends(whole, tokenizer) == (head, len(opening))
    for room in range(head + len(opening) + 1, len(whole) + 2):
        (ids,), (cut,) = encode([messages], tokenizer, room, side)
        assert len(ids) == min(room, len(whole)) and cut == (room < len(whole)) and ids[:head] == whole[:head]
        assert ids[len(ids) - len(opening):] == opening
        body, space = whole[head : len(whole) - len(opening)], len(ids) - head - len(opening)
        kept = body[len(body) - space:] if side == "left" else body[:space]
        assert ids[head : len(ids) - len(opening)] == kept
    if len(whole) > head + len(opening):
        with refused(f"may have {head + len(opening)} tokens", "--max-length"):
            encode([messages], tokenizer, head + len(opening), side)


def test_a_template_that_refuses_a_user_alone_is_cut_as_any_text():
    tokenizer = char_tokenizer()
    tokenizer.chat_template = ("{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
                               "{% for m in messages %}{{ m.content }}{% endfor %}|")
    messages = [{"role": "system", "content": "abc"}, *CHAT]
    assert encode([messages], tokenizer, 4, "right")[0] == [ids_of("abch")]


def test_no_prompt_is_longer_than_its_room():
    """One that would be, with the special tokens that stay, is refused before it meets a model without positions."""
    assert encode(["abc"], with_specials("<bos> $A"), 2)[0] == [[1, *ids_of("c")]]
    assert encode([""], with_specials("<bos> $A"), 1)[0] == [[1]]
    for seq2seq in (False, True):
        with refused(f"may have {1 + seq2seq} tokens, and {1 + seq2seq} stay", "--max-length", "--max-new-tokens"):
            encode(["a", "bc"], with_specials("<bos> $A <eos>"), 1 + seq2seq, seq2seq=seq2seq)


# --- data that must not change ----------------------------------------------------------------------------------------


def test_the_checksum_sees_where_a_part_ends():
    """The same bytes, in other parts or other examples, are other data."""
    sums = {check_data(examples, "--format") for examples in (
        [(b"ab", b"c")], [(b"a", b"bc")], [(b"", b"abc")], [(b"abc", b"")], [(b"ab", b"c"), (b"", b"")],
        [(b"ab", b""), (b"c", b"")], [], [(b"", b"")])}
    assert len(sums) == 8


class Day(datetime.datetime):
    """A clock that tests set."""

    @classmethod
    def now(cls):
        return cls(2026, 11, cls.today)


@pytest.mark.parametrize("script,given", [
    (sft, [{"prompt": CHAT, "completion": word} for word in ("yo", "no", "so")]),
    (dpo, [{"prompt": CHAT, "chosen": word, "rejected": "go"} for word in ("yo", "no", "so")]),
    (ilql, [{"prompt": CHAT, "completion": word, "reward": i} for i, word in enumerate(("yo", "no", "so"))]),
    (ppo, [{"prompt": CHAT}, {"prompt": [{"role": "user", "content": "ho"}]}]),
], ids=["sft", "dpo", "ilql", "ppo"])
def test_a_run_goes_on_another_day_with_the_date_that_it_began_with(script, given, model_path, tmp_path, monkeypatch):
    """Chat templates such as Llama 3's write today's date. A resumed run must have the data that it had."""
    model, tokenizer = f"{tmp_path}/model", char_tokenizer()
    tokenizer.chat_template = ("{{ strftime_now('%A') }}{% for m in messages %}{{ m.content }}{% if not loop.last %}|"
                               "{% endif %}{% endfor %}{% if add_generation_prompt %}|{% endif %}")
    shutil.copytree(model_path("gpt2"), model)
    tokenizer.save_pretrained(model)
    sizes = dict(total_episodes=4, rollout_batch_size=2) if script is ppo else dict(epochs=2)
    monkeypatch.setattr(data.datetime, "datetime", Day)
    monkeypatch.setattr(chat_template_utils, "datetime", Day)
    written = []

    def train(folder, day, steps, **flags):
        Day.today = day
        args = script.Args(model=model, output_dir=f"{tmp_path}/{folder}", batch_size=2, max_new_tokens=4,
                           max_length=40, num_eval_prompts=1, max_steps=steps, save_every=1, **sizes, **flags)
        task = dict(reward_fn=lambda prompts: written.extend(prompts) or [1.0] * len(prompts)) if script is ppo else {}
        metric = lambda prompts: written.extend(prompts) or {}
        script.train(args, **task, **{"prompts" if script is ppo else "pairs" if script is dpo else "samples": given},
                     metric_fn=metric)
        return (tmp_path / folder / "model" / "model.safetensors").read_bytes()

    straight = train("straight", 2, 2)
    train("resumed", 2, 1)
    assert train("resumed", 3, 2, resume="auto") == straight
    assert {prompt[:6] for prompt in written} == {"Monday"}
    written.clear()
    assert train("later", 3, 2) != straight and {prompt[:7] for prompt in written} == {"Tuesday"}
    assert chat_template_utils.datetime is Day, "outside of runs templates have today's date"


# --- users' functions -------------------------------------------------------------------------------------------------


def test_functions_are_found_in_files_and_modules(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def score(samples):\n    return [1.0 for _ in samples]\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "inner.py").write_text("from mine import score\n")
    monkeypatch.syspath_prepend(tmp_path)
    for spec in (f"{tmp_path}/mine.py:score", "mine:score", "package.inner:score"):
        assert load_function(spec, "--reward")(["a", "b"]) == [1.0, 1.0]
    assert ppo.load_reward(ppo.Args(reward=f"{tmp_path}/mine.py:score"), torch.device("cpu"))(["a"]) == [1.0]


def test_a_users_file_does_not_stand_in_for_a_module_of_its_name(tmp_path):
    code = "import dataclasses\n@dataclasses.dataclass\nclass Score:\n    value: float = 1.0\n"
    (tmp_path / "json.py").write_text(code)
    before = sys.modules["json"]
    assert load_function(f"{tmp_path}/json.py:Score", "--reward")().value == 1.0 and sys.modules["json"] is before


@pytest.mark.parametrize("spec,parts", [
    ("{}/nowhere.py:score", ["nowhere.py"]), ("{}/mine.py:scores", ["'scores'"]), ("no_such_module:score",
    ["'no_such_module'"]), ("json:scores", ["'scores'"]), ("json.nowhere:score", ["json.nowhere"]),
    (".relative:score", ["relative"]), (":score", ["mpty module name"]), ("{}/folder.py:score", ["folder.py"])])
def test_functions_that_do_not_exist_are_named(spec, parts, tmp_path):
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "mine.py").write_text("def score(samples):\n    return [1.0 for _ in samples]\n")
    spec = spec.format(tmp_path)
    with refused(f"--reward {spec}", *parts, "file.py:function"):
        load_function(spec, "--reward")
    with refused(f"--reward {spec}"):
        ppo.load_reward(ppo.Args(reward=spec), torch.device("cpu"))


class Scorer:
    def __call__(self, outputs, scale=2):
        return outputs, scale


def test_call_passes_what_a_function_accepts():
    everything = dict(samples=[1], outputs=[2], answer=[3])
    assert call(lambda outputs: outputs, **everything) == [2]
    assert call(lambda outputs, answer=None, other=5: (outputs, answer, other), **everything) == ([2], [3], 5)
    assert call(lambda samples, **rest: (samples, rest), **everything) == ([1], dict(outputs=[2], answer=[3]))
    assert call(lambda *, answer: answer, **everything) == [3]
    assert call(lambda: 7, **everything) == 7
    assert call(Scorer(), **everything) == ([2], 2)
    assert call(functools.partial(Scorer(), scale=9), **everything) == ([2], 9)
    assert call(functools.partial(lambda bound, samples: (bound, samples), 4), **everything) == (4, [1])
    assert call(random_walks(1).reward, samples=["a"], function=["a column of this name"]) == [1.0]


def test_call_names_the_argument_that_is_missing():
    def needs_a_column(samples, label):
        raise AssertionError("must not be called")

    with refused("needs_a_column", "'label'", "samples, outputs"):
        call(needs_a_column, samples=[1], outputs=[2])
    with refused("partial", "'label'"):
        call(functools.partial(needs_a_column, samples=[1]), outputs=[2])


def test_an_error_inside_a_function_is_the_functions_own():
    with pytest.raises(ZeroDivisionError):
        call(lambda samples: 1 / 0, samples=[])


LENGTHS = [3, 1]


@pytest.mark.parametrize("scores,expected", [
    ([1, 2.5], [1.0, 2.5]), ((1.0, -2.0), [1.0, -2.0]), (np.array([1.0, 2.0]), [1.0, 2.0]),
    (np.array([1, 0], dtype=np.int8), [1.0, 0.0]), (torch.tensor([1.0, 2.0]), [1.0, 2.0]),
    ([torch.tensor(1.0), np.float32(2)], [1.0, 2.0]), ([True, False], [1.0, 0.0]),
    ([[1, 2, 3], [4]], [[1.0, 2.0, 3.0], [4.0]]), ([[1, 2, 3], 5], [[1.0, 2.0, 3.0], 5.0]),
    ([np.array([1, 2, 3]), torch.tensor([0.5])], [[1.0, 2.0, 3.0], [0.5]]),
    ([[torch.tensor(1.0), np.float64(2), 3], [3]], [[1.0, 2.0, 3.0], [3.0]]),
    ([[1.0], (2.0,)], [1.0, 2.0]), (torch.ones(2, 1), [1.0, 1.0]), ((x for x in (1.0, 2.0)), [1.0, 2.0]),
])
def test_scores_of_every_type_become_floats(scores, expected):
    checked = check_scores(scores, LENGTHS)
    assert checked == expected
    assert all(type(value) is float for score in checked for value in (score if isinstance(score, list) else [score]))


@pytest.mark.parametrize("scores,parts", [
    ([1.0], ["1 values", "2 samples"]), ([1.0] * 3, ["3 values", "2 samples"]), ([], ["0 values", "2 samples"]),
    (1.0, ["a float", "2 samples"]), (None, ["a NoneType"]), ("ab", ["a str"]), ({0: 1.0, 1: 2.0}, ["a dict"]),
    (torch.tensor(3.0), ["a float"]), ([[1.0, 2.0], 5], ["2 token rewards", "sample 0", "3 tokens"]),
    ([1.0, float("nan")], ["sample 1", "nan"]), ([float("inf"), 1.0], ["sample 0", "inf"]),
    (torch.tensor([1.0, -torch.inf]), ["sample 1", "-inf"]), ([None, 1.0], ["sample 0", "None"]),
    ([1.0, "2.0"], ["sample 1", "'2.0'"]), ([{"score": 1.0}, 1.0], ["sample 0", "dict"]),
    ([[1.0, float("nan")], 1.0], ["sample 0", "nan"]), ([1.0, ["x"]], ["sample 1", "'x'"]),
    ([[1.0, [2.0]], 1.0], ["sample 0", "list"]), ([[1.0] * 4, 1.0], ["sample 0", "4 token rewards", "3 tokens"]),
    ([1.0, [1.0, 2.0]], ["sample 1", "2 token rewards", "1 tokens"]), ([1.0, []], ["sample 1", "0 token rewards"]),
])
def test_wrong_scores_name_the_sample(scores, parts):
    with refused("the reward function returned", *parts):
        check_scores(scores, LENGTHS)


def test_a_wrong_reward_function_stops_a_run_before_the_first_update(model_path, tmp_path):
    args = ppo.Args(model=model_path("gpt2"), total_episodes=8, rollout_batch_size=8, batch_size=8, max_length=16,
                    max_new_tokens=4, num_eval_prompts=2, output_dir=f"{tmp_path}/run")
    with refused("the reward function returned", "nan", "sample 1"):
        ppo.train(args, lambda samples: [0.0, float("nan")], prompts=["a", "b"])
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


# --- the order of the data --------------------------------------------------------------------------------------------


def test_shuffled_shows_every_row_once_a_pass_in_an_order_of_its_own():
    def order(epoch, seed=1, count=50):
        return [shuffled(position, count, seed) for position in range(epoch * count, (epoch + 1) * count)]

    orders = [order(0), order(1), order(2), order(0, seed=2), order(1, seed=2)]
    assert all(sorted(rows) == list(range(50)) for rows in orders)
    assert len(set(map(tuple, orders))) == 5 and list(range(50)) not in orders
    assert [order(2), order(0)] == [orders[2], orders[0]], "asked in any order, it is the same"
    assert [shuffled(position, 1, 1) for position in range(3)] == [0, 0, 0]


# --- random walks -----------------------------------------------------------------------------------------------------

SUCCESSORS = ("a:a b:dju c:ekor d:alt e:bs f:dhim g:cqru h:c i:dh j:n k:bgjn l:b "
              "m:befghs n:ab o:r p:ju q:fj r:gjo s:du t:k u:bis")
SHORTEST = "3 4 2 4 3 5 5 3 3 3 4 4 2 5 4 4 4 3 4 4"


@pytest.fixture(scope="module")
def walks():
    return random_walks(1000)


def successors(walks):
    return {LETTERS[i]: "".join(LETTERS[j] for j in np.flatnonzero(row)) for i, row in enumerate(walks.adjacency)}


def test_the_graph_and_walks_of_seed_1000_are_trlxs(walks):
    assert " ".join(f"{node}:{to}" for node, to in successors(walks).items()) == SUCCESSORS
    assert walks.walks[:5] == ["sda", "fda", "ebjnbdtkna", "jnbjna", "lbusdtkbui"]
    assert [walks.shortest[letter] for letter in LETTERS[1:]] == [int(n) for n in SHORTEST.split()]
    assert walks.starts == list(LETTERS[1:]) and walks.max_length == 10


def test_walks_follow_edges_and_stop_at_the_goal(walks):
    edges = successors(walks)
    assert len(walks.walks) == 1000
    for walk in walks.walks:
        assert 2 <= len(walk) <= 10 and "a" not in walk[:-1] and (len(walk) == 10 or walk[-1] == "a")
        assert all(to in edges[node] for node, to in zip(walk, walk[1:]))


def test_the_metric_of_a_walk(walks):
    full = next(walk for walk in walks.walks if len(walk) == 10 and walk[-1] == "a")
    lost = next(walk for walk in walks.walks if len(walk) == 10 and walk[-1] != "a")
    cases = {"sda": (1, 0), "sdab": (1, 0), "sda sda": (1, 0), "lbdtkna": (3 / 6, 0), "jnbjna": (4 / 7, 0),
             "sd": (0, 1), "sxa": (0, 1), "sa": (0, 1), "s": (0, 1), "": (0, 1), "SDA": (0, 1), "s d a": (0, 1),
             full: (0, 0), lost: (0, 1), "jnbjnbjnbjna": (0, 0)}
    metric = walks.metric(list(cases), prompts=None)
    assert metric["optimality"] == pytest.approx([optimality for optimality, _ in cases.values()])
    assert metric["invalid"] == [invalid for _, invalid in cases.values()]
    assert walks.reward(list(cases)) == metric["optimality"]


@pytest.mark.parametrize("seed", [1000, 1001, 1003, 1007, 1012, 1015, 1020, 0, 1, 2])
def test_shortest_paths_are_those_of_brute_force(seed):
    walks = random_walks(seed, count=1)
    edges = successors(walks)
    for start in walks.starts:
        reached, nodes = {start}, 1
        while "a" not in reached:
            reached, nodes = {to for node in reached for to in edges[node]}, nodes + 1
            assert nodes < 30, "the goal cannot be reached"
        assert walks.shortest[start] == nodes


def test_the_goal_can_be_reached_and_no_optimality_divides_by_zero():
    """trlX's graphs of seeds 1001, 1003, 1007, 1009, 1010, 1012 and 1015 have starts without a way."""
    for seed in range(1000, 1021):
        walks = random_walks(seed, count=50)
        assert walks.starts == list(LETTERS[1:]) and max(walks.shortest.values()) < 10
        assert all(walks.adjacency.any(1)) and walks.adjacency[0].tolist() == [True] + [False] * 20
        assert not walks.adjacency.diagonal()[1:].any()
        assert all(0 <= value <= 1 for value in walks.reward(walks.walks))


def test_walks_depend_on_the_seed_alone(walks):
    again, other = random_walks(1000), random_walks(2)
    assert again.walks == walks.walks and np.array_equal(again.adjacency, walks.adjacency)
    assert other.walks != walks.walks and not np.array_equal(other.adjacency, walks.adjacency)


def test_the_walks_tokenizer_is_lossless(walks):
    tokenizer = walks_tokenizer()
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3 and len(tokenizer) == 24
    for walk in [LETTERS, *walks.walks[:20]]:
        ids = tokenizer(walk)["input_ids"]
        assert len(ids) == len(walk) and tokenizer.decode(ids) == walk
    assert tokenizer("sda" + tokenizer.eos_token)["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode([tokenizer.bos_token_id, *tokenizer("sda")["input_ids"], tokenizer.eos_token_id],
                            skip_special_tokens=True) == "sda"

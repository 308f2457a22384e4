"""Properties of all that reads what users give: whatever it is, it is trained on as the plain references here say, or
is refused in one line; and it stays as it was. Thousands of cases with PLAINRL_LONG=1 (see conftest.py), else a few."""

import copy
import csv
import functools
import gzip
import io
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import bpe_tokenizer, char_tokenizer
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import processors

import dpo
import ilql
import ppo
import sft
from common import cli
from common.cli import UserError
from common.data import (
    chat_turns,
    cut_prompt,
    encode_prompts,
    load_prompts,
    pack,
    prompt_rows,
    read_rows,
    tokenize_turns,
)
from common.functions import call, check_metrics, check_scores
from common.generation import find_stop, pick, stop_checker
from common.metrics import table
from common.models import LogitRules, check_logit_mask, collate, collate_branches, pad_rows, train_tokenizer
from common.randomwalks import random_walks
from common.samples import Example, fit, load_samples, prompt_of, sample_row, whole_example

PAD, BOS, EOS = 0, 1, 2
CPU = torch.device("cpu")


def answer(function, *arguments, **options):
    """What a function returns, or None where it refuses; its arguments stay as they were, a refusal is one line."""
    before = copy.deepcopy((arguments, options))
    try:
        found = function(*arguments, **options)
    except UserError as error:
        message, found = str(error), None
        assert message and len(message.splitlines()) == 1 and len(message) < 1000, message
    assert equal((arguments, options), before), "what was given has changed"
    return found


def equal(one, other) -> bool:
    """Equality of nested values, arrays and NaN among them."""
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict):
        return type(one) is type(other) and list(one) == list(other) and all(map(equal, one.values(), other.values()))
    if isinstance(one, (np.ndarray, torch.Tensor)):
        return type(one) is type(other) and one.shape == other.shape and equal(one.tolist(), other.tolist())
    return one is other or one == other or (one != one and other != other)


# --- what users give --------------------------------------------------------------------------------------------------

LETTER_PIECES = ["a", "b", "c", " ", "\n", "|", "."]
PIECES = [*LETTER_PIECES, "<eos>", "<pad>", "<bos>", "é", "🙂"]  # what the character tokenizer does not know is its pad
pieces = st.lists(st.sampled_from(PIECES), max_size=12)
letters = st.lists(st.sampled_from(LETTER_PIECES), max_size=8).map("".join)
unicode = st.text(st.characters(exclude_categories=()), max_size=20)  # half characters among them
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), unicode)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(unicode, inner, max_size=3),
                      max_leaves=8)
arrays = st.sampled_from([np.array(["a", "b"]), np.array([1.0, math.nan]), np.array(3), torch.ones(2), np.str_("a b"),
                          torch.tensor(1j), np.datetime64("2026-01-01"), np.array(None), np.int64(3), b"a", 10**5000,
                          (1, 2), {3}, ..., range(3), torch.tensor([True, False]), np.float32(0.5)])
names = st.sampled_from(["text", "prompt", "completion", "messages", "turns", "chosen", "rejected", "reward", "other"])
roles = st.sampled_from(["user", "assistant", "system"])
chats = st.lists(st.fixed_dictionaries({"role": roles, "content": letters}), min_size=1, max_size=5)
any_chats = st.lists(st.fixed_dictionaries({"role": roles | values, "content": letters | values}, optional={
    "name": values}), max_size=3)
contents = st.one_of(letters, unicode, chats, any_chats, values, arrays, st.lists(letters, max_size=4))
rows = st.one_of(contents, st.dictionaries(names, contents, max_size=5), st.dictionaries(unicode | names, contents,
                                                                                       max_size=3))
groups = st.one_of(st.lists(rows, max_size=4), rows.filter(lambda row: row is not None), st.tuples(rows, rows))


def with_specials(template: str):
    """The character tokenizer with special tokens added as `template` says, such as "<bos> $A"."""
    tokenizer = char_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", BOS), ("<eos>", EOS)])
    return tokenizer


def without_end():
    tokenizer = char_tokenizer(bos=False)
    tokenizer.eos_token = None
    return tokenizer


# name -> tokenizer, and what it puts before and after a text
TOKENIZERS = {"plain": (char_tokenizer(), [], []), "no bos": (char_tokenizer(bos=False), [], []),
              "neither": (without_end(), [], []), "llama": (with_specials("<bos> $A"), [BOS], []),
              "t5": (with_specials("$A <eos>"), [], [EOS]), "both": (with_specials("<bos> $A <eos>"), [BOS], [EOS])}
IDS = {name: {piece: tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in PIECES}
       for name, (tokenizer, _, _) in TOKENIZERS.items()}
BPE = train_tokenizer(["the cat sat on the mat, \n\na cat | é 🙂🙂 and so on"] * 3, 300)
tokenizers = st.sampled_from(list(TOKENIZERS))
sides = st.sampled_from(["left", "right"])


def ids_of(pieces: list[str], name: str = "plain") -> list[int]:
    """Tokens of pieces, each by itself: with characters for tokens nothing merges."""
    return [token for piece in pieces for token in IDS[name][piece]]


# --- files ------------------------------------------------------------------------------------------------------------

odd_lines = st.sampled_from(["{", "\x00", "[[[", '{"a": 1}', '"', ","])
lines = st.lists(st.one_of(values.map(json.dumps), unicode, odd_lines), max_size=4)
endings = st.sampled_from([".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz", ".JSONL"])


@given(content=st.binary(max_size=60) | lines.map(lambda parts: "\n".join(parts).encode(errors="surrogatepass")),
       ending=endings, packed=st.sampled_from(["as named", "not", "cut off"]))
@example(content=b"[" * 100_000, ending=".json", packed="as named")
@example(content=b'{"a": ' + b"1" * 5000 + b"}", ending=".jsonl", packed="as named")
@example(content=b"a,b\n1,2,3\n", ending=".csv", packed="as named")
@example(content=b'a\n"' + b"x" * 200_000 + b'"\n', ending=".csv", packed="as named")
def test_any_file_is_rows_or_refused(content, ending, packed, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"rows{ending}"
    if ending.endswith(".gz") and packed != "not":
        content = gzip.compress(content)
        content = content[: len(content) // 2] if packed == "cut off" else content
    path.write_bytes(content)
    try:
        found = read_rows(str(path), "--prompts")
    except UserError as error:
        assert str(error).startswith(f"--prompts {path}") and len(str(error).splitlines()) == 1
    else:
        assert found and all(type(row) is dict and None not in row for row in found)
        assert ".csv" not in ending or all(type(cell) in (str, type(None)) for row in found for cell in row.values())
    assert path.read_bytes() == content


texts = st.text(max_size=20)


@given(rows=st.lists(st.dictionaries(texts, values, max_size=3), min_size=1, max_size=3), ending=endings,
       ascii=st.booleans())
@example(rows=[{"a": "\ud83d"}], ending=".jsonl", ascii=True)
@example(rows=[{"a": "\u2028\x85\r"}], ending=".jsonl", ascii=False)
@example(rows=[{"a": "x\ry\r\nz\n", "b": '"'}], ending=".csv", ascii=False)
def test_what_is_written_is_read(rows, ending, ascii, tmp_path_factory):
    """Every value of JSON, half characters among them, where they are escaped; every text in CSV."""
    path = f"{tmp_path_factory.getbasetemp()}/written{ending}"
    if "csv" in ending:
        columns = list(dict.fromkeys(name.lstrip("\ufeff") or "a" for row in rows for name in row)) or ["a"]
        rows = [{name: str(row.get(name)).encode(errors="replace").decode() for name in columns} for row in rows]
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, columns)
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    elif "jsonl" in ending.lower():
        text = "\n".join(json.dumps(row, ensure_ascii=ascii) for row in rows)
    else:
        text = json.dumps(rows, ensure_ascii=ascii)
    try:
        data = text.encode()
    except UnicodeEncodeError:
        assume(False)
    with (gzip.open if ending.endswith("gz") else open)(path, "wb") as file:
        file.write(data)
    assert equal(read_rows(path, "--dataset"), rows)


# --- prompts ----------------------------------------------------------------------------------------------------------


def prompt_of_row(row):
    """The prompt of a row that a user gave, None where it has none; and its other columns."""
    if not isinstance(row, dict):
        row = {"prompt": row}
    if not all(isinstance(name, str) for name in row):
        return None, {}
    name = "prompt" if "prompt" in row else "text"
    prompt, others = row.get(name), {key: value for key, value in row.items() if key != name}
    if isinstance(prompt, str):
        return (None if any(0xD800 <= ord(character) < 0xE000 for character in prompt) else prompt), others
    chat = isinstance(prompt, list) and prompt and all(
        isinstance(message, dict) and "role" in message and "content" in message for message in prompt)
    return (prompt if chat else None), others


@given(given=groups, words=st.none() | st.integers(1, 3))
@example(given=(prompt for prompt in ["a", "b"]), words=None)
@example(given=5, words=None)
@example(given=b"ab", words=None)
@example(given={"a": ["b"]}, words=None)
@example(given=[{"prompt": "a", 3: "b"}], words=None)
@example(given=["\ud83d"], words=None)
@example(given=[{"a\nb": "c"}], words=None)
@example(given=[{"x" * 1000: "c"}], words=None)
@example(given=[10**5000], words=None)
@example(given=[math.nan, None, 3], words=None)
@example(given=np.array(["a", "b"]), words=1)
@example(given=["a", {"text": "b", "other": 1}, {"prompt": "a  b", "text": "c"}], words=1)
def test_any_prompts_are_rows_or_refused(given, words):
    if hasattr(given, "send"):  # a generator, which cannot be copied
        assert prompt_rows(given, "--prompts") == [{"prompt": "a"}, {"prompt": "b"}]
        return
    found = answer(load_prompts, given, None, "--prompts", [], words)
    is_list = not isinstance(given, (str, bytes, dict)) and hasattr(given, "__iter__") and getattr(given, "ndim", 1)
    wanted = [prompt_of_row(row) for row in given] if is_list else []
    if not wanted or any(prompt is None for prompt, _ in wanted):
        assert found is None
        return
    columns = {name for _, others in wanted for name in others}
    for row, (prompt, others) in zip(found, wanted, strict=True):
        cut = words and isinstance(prompt, str)
        assert equal(row["prompt"], " ".join(re.findall(r"\S+", prompt)[:words]) if cut else prompt) or cut and (
            row["prompt"] == " ".join(prompt.split()[:words]))
        assert row.keys() == columns | {"prompt"}
        assert all(equal(row[name], others.get(name)) for name in columns - {"prompt"})


@given(prompts=st.lists(pieces, min_size=1, max_size=3), name=tokenizers, room=st.integers(1, 9), side=sides,
       seq2seq=st.booleans())
@example(prompts=[[]], name="plain", room=1, side="left", seq2seq=False)
@example(prompts=[[]], name="neither", room=5, side="left", seq2seq=False)
@example(prompts=[["<eos>"], ["<pad>"] * 3, ["<eos>"] * 9], name="no bos", room=2, side="right", seq2seq=True)
@example(prompts=[["a", "b"]], name="llama", room=1, side="left", seq2seq=False)
@example(prompts=[["a"]], name="both", room=2, side="left", seq2seq=True)
def test_prompts_are_their_tokens_cut_to_the_room(prompts, name, room, side, seq2seq):
    """Prompts that are empty, or nothing but pad or end tokens, among them: those are tokens as any others."""
    tokenizer, head, tail = TOKENIZERS[name]
    tail = tail if seq2seq else []
    rows = [{"prompt": "".join(prompt)} for prompt in prompts]
    found = answer(functools.partial(encode_prompts, tokenizer=tokenizer, room=room, side=side, seq2seq=seq2seq), rows)
    starts = {"no bos": [EOS], "neither": []}.get(name, [BOS])
    wanted, cuts = [], []
    for prompt in prompts:
        body, space = ids_of(prompt, name), room - len(head) - len(tail)
        cuts.append(len(body) > max(space, 1) or len(body) > 0 >= space)
        if len(body) > space:
            body = (body[len(body) - space:] if side == "left" else body[:space]) if space > 0 else None
        wanted.append(None if body is None else head + body + tail or starts)
    if any(not ids for ids in wanted):
        assert found is None
    else:
        assert found == (wanted, cuts)


@given(ids=st.lists(st.integers(0, 60), max_size=12), room=st.integers(1, 12), side=sides, head=st.integers(0, 3),
       tail=st.integers(0, 3))
def test_a_cut_keeps_both_ends(ids, room, side, head, tail):
    assume(head + tail <= len(ids))
    body = ids[head : len(ids) - tail]
    while len(body) > 1 and head + len(body) + tail > room:
        body = body[1:] if side == "left" else body[:-1]
    assert answer(cut_prompt, ids, room, side, head, tail) == ids[:head] + body + ids[len(ids) - tail:]


# --- turns and messages -----------------------------------------------------------------------------------------------


@given(turns=st.lists(st.lists(pieces, min_size=1, max_size=5), max_size=4), apart=st.booleans())
@example(turns=[[["a"], ["a", "b"], ["a", "b"]]], apart=True)
def test_turns_have_their_tokens(turns, apart):
    texts = [["".join(turn) for turn in row] for row in turns]
    wanted = [[ids_of(turn) for turn in row] for row in turns]
    assert answer(functools.partial(tokenize_turns, tokenizer=TOKENIZERS["plain"][0], apart=apart), texts) == wanted


@given(turns=st.lists(st.lists(st.text(max_size=9) | st.text("the cat\n🙂é<|endoftext|>", max_size=9), min_size=1,
                               max_size=4), max_size=3), apart=st.booleans())
@example(turns=[["the c", "at"], ["a", "\n", "\n", "b"], ["🙂", "🙂"], ["", "", "a"]], apart=False)
@example(turns=[["x" * 100_000, "y" * 100_000]], apart=True)
def test_turns_of_bytes_say_what_they_said(turns, apart):
    """With merges over the boundaries: no letter is lost, none is said by another turn."""
    found = answer(functools.partial(tokenize_turns, tokenizer=BPE, apart=apart), turns)
    for row, ids in zip(turns, found, strict=True):
        assert [BPE.decode(part) for part in ids] == row
        assert ids[0] == BPE(row[0])["input_ids"]


END = "{{ m.content }}<eos>{{ '\n' }}"
OPEN = "{% if add_generation_prompt %}.a {% endif %}"
TEMPLATES = {  # and what is said of it after an answer's words: the token that ends it, else all that it writes there
    "chatml": ("{% for m in messages %}.{{ m.role[0] }} " + END + "{% endfor %}" + OPEN, "<eos>"),
    "marked": ("{% for m in messages %}.{{ m.role[0] }} {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
               "<eos>{% endgeneration %}{{ '\n' }}{% else %}" + END + "{% endif %}{% endfor %}" + OPEN, "<eos>"),
    "bare marks": ("{% for m in messages %}.{{ m.role[0] }} {% if m.role == 'assistant' %}{% generation %}"
                   "{{ m.content }}{% endgeneration %}<eos>{{ '\n' }}{% else %}" + END + "{% endif %}{% endfor %}" +
                   OPEN, "<eos>"),
    "no end": ("{% for m in messages %}.{{ m.role[0] }} {{ m.content }}{{ '\n' }}{% endfor %}" + OPEN, "\n"),
    "rewriting": ("{% for m in messages %}{{ '!' if loop.last else '.' }}" + END + "{% endfor %}", ""),
}


def chatting(template: str):
    tokenizer = char_tokenizer()
    tokenizer.chat_template = TEMPLATES[template][0]
    return tokenizer


@given(messages=chats, template=st.sampled_from(list(TEMPLATES)), first=st.integers(0, 4), split=st.booleans())
@example(messages=[{"role": "assistant", "content": ""}], template="no end", first=0, split=False)
@example(messages=[{"role": "assistant", "content": "a"}], template="rewriting", first=0, split=False)
@example(messages=[{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")],
         template="bare marks", first=0, split=False)
def test_the_assistants_words_and_no_others_are_said(messages, template, first, split):
    first, tokenizer = min(first, len(messages)), chatting(template)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    found = answer(functools.partial(chat_turns, tokenizer=tokenizer, ends=(EOS,), first=first, split=split), messages)
    said = [turn for turns, flags in found for turn, flag in zip(turns, flags, strict=True) if flag]
    wanted = [message["content"] for message in messages[first:] if message["role"] == "assistant"]
    assert len(said) == len(wanted)
    for one, other in zip(said, wanted):
        if template == "rewriting" and len(messages) == 1 and not split:
            other = f"!{other}<eos>"  # without marks, it is what the message adds to the text
        assert one == other + ("" if split else TEMPLATES[template][1])
    if len(found) == 1 and not split and template != "rewriting":
        assert text.startswith("".join(found[0][0])), "the text is that of the template"
        places, at = [], 0
        for turn, flag in zip(*found[0]):
            places += [at] if flag else []
            at += len(turn)
        for place in places:
            assert text[:place].endswith(".a "), "an answer begins where the template asks for one"


# --- rows of samples --------------------------------------------------------------------------------------------------


@given(given=groups)
@example(given=np.array(5))
@example(given=["\ud800"])
@example(given=[{"prompt": "a", "completion": "\udfff"}])
@example(given=[{"messages": [{"role": "user", "content": "\ud800"}]}])
@example(given=[{"text": value} for value in (1, math.nan, True)])
@example(given=[{"text": None, "a\nb": 1}])
@example(given=[{"text": 10**5000}])
def test_any_samples_are_rows_or_refused(given):
    found = answer(load_samples, given, None, "--dataset", None)
    for row in found or []:
        assert bool(row.turns) != bool(row.messages)
        texts = row.turns or [message[name] for message in row.messages for name in ("role", "content")]
        assert all(isinstance(text, str) and text.encode() is not None for text in texts)
        assert row.messages or len(row.said) == len(row.turns)
        if row.messages is None or row.first < len(row.messages):
            prompt = prompt_of(row, 3)["prompt"]
            assert isinstance(prompt, (str, list)) and (row.said != [True] or len(prompt.split()) <= 3)


@given(given=groups, template=st.sampled_from(["chatml", "marked"]), seq2seq=st.booleans(), history=st.none() |
       st.integers(1, 3), longest=st.integers(2, 20), side=sides)
@example(given=[[{"role": "user", "content": "a", "name": "\ud800"}, {"role": "assistant", "content": "b"}]],
         template="chatml", seq2seq=False, history=None, longest=9, side="left")
def test_any_samples_are_examples_within_the_window_or_refused(given, template, seq2seq, history, longest, side):
    """By every script, whatever reading they pass: the prompt and what is trained fit, and something is trained."""
    tokenizer, known = chatting(template), answer(load_samples, given, None, "--dataset", None)
    if not known:
        return
    made = answer(functools.partial(sft.make_examples, tokenizer=tokenizer, ends=(EOS,), seq2seq=seq2seq,
                                    longest=longest, args=sft.Args(history=history, truncation_side=side)), known)
    for item in made[0] if made else []:
        assert 0 < len(item.prompt) < len(item.prompt) + len(item.output) <= longest
        assert len(item.trained) == len(item.output) and any(item.trained) and item.trained[-1]
    rewarded = [row._replace(columns={**row.columns, "reward": 1.0}) for row in known]
    made = answer(functools.partial(ilql.make_trajectories, tokenizer=tokenizer, ends=(EOS,), seq2seq=seq2seq,
                                    longest=longest, args=ilql.Args(history=history, truncation_side=side)), rewarded)
    for item in made[0] if made else []:
        assert 0 < len(item.prompt) < len(item.prompt) + len(item.output) <= longest
        assert 0 < len(item.actions) == len(item.rewards) and item.actions[-1] < len(item.output)


def reference_examples(turns, said, name, seq2seq, history, whole=False):
    """The examples of turns, as (prompt, output, which output each token is of): the plain way. whole: a list of texts
    that ends in what is not trained keeps its end tokens to itself (ILQL)."""
    _, head, tail = TOKENIZERS[name]
    eos, start = {"neither": ([], [])}.get(name, ([EOS], [EOS] if name == "no bos" else [BOS]))
    tail, ids = tail if seq2seq else [], [ids_of(turn, name) for turn in turns]
    if (seq2seq or history) and said != [True]:
        parts = []
        for i, flag in enumerate(said):
            if flag:
                before = sum(ids[max(0, i - (history or i)) : i], [])
                parts.append([(head + before + tail or start, 0), (ids[i], len([f for f in said[: i + 1] if f]))])
    else:
        numbers = [sum(said[: i + 1]) if flag else 0 for i, flag in enumerate(said)]
        opening = head or ([] if ids[0] or said[0] else start)
        parts = [[(opening, 0), *zip(ids, numbers)]]
    found = []
    for part in parts:
        tokens = [(token, number) for piece, number in part for token in piece]
        while tokens and not tokens[-1][1]:
            tokens.pop()
        if not tokens:
            continue
        if tokens[-1][0] != EOS:
            tokens += [(token, tokens[-1][1]) for token in eos]
        begin = max(1, next(i for i, (_, number) in enumerate(tokens) if number))
        if tokens[begin:]:
            ids_here, numbers_here = map(list, zip(*tokens))
            found.append((ids_here[:begin], ids_here[begin:], numbers_here[begin:]))
    return found


dialogues = st.one_of(
    st.tuples(st.lists(pieces, min_size=1, max_size=5), st.just("turns")),
    st.tuples(st.lists(pieces, min_size=2, max_size=2), st.just("pair")),
    st.tuples(st.lists(pieces, min_size=1, max_size=1), st.just("text")))


def row_of(turns: list[list[str]], form: str):
    turns = ["".join(turn) for turn in turns]
    return {"turns": {"turns": turns}, "pair": {"prompt": turns[0], "completion": turns[-1]}, "text": turns[0]}[form]


def said_of(turns, form) -> list[bool]:
    return [True] if form == "text" else [bool(i % 2) for i in range(len(turns))]


@given(dialogue=dialogues, name=tokenizers, seq2seq=st.booleans(), history=st.none() | st.integers(1, 3))
@example(dialogue=([[], ["<eos>"]], "pair"), name="plain", seq2seq=False, history=None)
@example(dialogue=([["<pad>"], ["<pad>"]], "pair"), name="llama", seq2seq=True, history=None)
@example(dialogue=([[], []], "turns"), name="neither", seq2seq=False, history=None)
@example(dialogue=([["<eos>", "<eos>"]], "text"), name="no bos", seq2seq=False, history=None)
def test_what_is_trained_is_what_the_outputs_say(dialogue, name, seq2seq, history):
    """Token by token: the outputs and one end token, nothing of the prompts, nothing after the end."""
    turns, form = dialogue
    if seq2seq and form == "text":
        return
    args = sft.Args(history=history)
    known = load_samples([row_of(turns, form)], None, "--dataset", None)
    made = answer(functools.partial(sft.make_examples, tokenizer=TOKENIZERS[name][0], ends=(EOS,), seq2seq=seq2seq,
                                    longest=1000, args=args), known)
    wanted = reference_examples(turns, said_of(turns, form), name, seq2seq, history)
    if made is None:
        assert name == "neither" and seq2seq
        return
    found = [(list(prompt), list(output), [bool(flag) for flag in flags]) for prompt, output, flags in made[0]]
    assert found == [(prompt, output, [bool(number) for number in numbers]) for prompt, output, numbers in wanted]
    assert made[1:] == (int(not found), 0)


@given(ids=st.lists(st.integers(0, 5), max_size=8), data=st.data(), eos=st.sampled_from([[], [EOS]]))
def test_a_sequence_ends_with_its_last_trained_token(ids, data, eos):
    trained = data.draw(st.lists(st.integers(0, 2), min_size=len(ids), max_size=len(ids)))
    found = answer(whole_example, ids, trained, (EOS, 3), eos)
    kept = list(zip(ids, trained))
    while kept and not kept[-1][1]:
        kept.pop()
    if kept and kept[-1][0] not in (EOS, 3):
        kept += [(token, kept[-1][1]) for token in eos]
    if len(kept) < 2:
        assert found == []
    else:
        (item,) = found
        assert [*item.prompt, *item.output] == [token for token, _ in kept]
        assert list(item.trained) == [number for _, number in kept[len(item.prompt):]]
        assert not any(number for _, number in kept[1 : len(item.prompt)]), "all that can be trained is"


@given(prompt=st.integers(1, 12), trained=st.lists(st.integers(0, 2), min_size=1, max_size=12),
       longest=st.integers(2, 15), side=sides, head=st.integers(0, 2), tail=st.integers(0, 3))
def test_an_example_is_cut_at_the_prompt_and_at_its_end(prompt, trained, longest, side, head, tail):
    assume(any(trained) and head + tail <= prompt)
    whole = Example([100 + i for i in range(prompt)], list(range(len(trained))), trained)
    found = answer(fit, whole, longest, side, head, tail)
    output = trained[: max(0, longest - min(prompt, max(longest // 2, head + tail + 1)))]
    while output and not output[-1]:
        output = output[:-1]
    ids = cut_prompt(whole.prompt, longest - len(output), side, head, tail)
    ids = whole.prompt if prompt <= longest - len(output) else ids
    if len(ids) + len(output) > longest:
        output = []
    assert found == (ids, list(range(len(output))), trained[: len(output)])
    assert not output or len(found.prompt) + len(found.output) <= longest
    assert output or not trained[0] or min(prompt, head + tail + 1) >= longest, "what can keep an output keeps it"


@given(texts=st.lists(pieces, min_size=1, max_size=5), name=tokenizers, length=st.integers(2, 9))
def test_windows_train_each_token_once(texts, name, length):
    """Packed texts: all tokens of all texts in order, each trained once, but for the first."""
    tokenizer = TOKENIZERS[name][0]
    known = load_samples(["".join(text) for text in texts], None, "--dataset", None)
    made, _, cut = sft.make_examples(known, tokenizer, (EOS,), False, length, sft.Args(packing="windows"))
    whole = [reference_examples([text], [True], name, False, None) for text in texts]
    stream = [token for found in whole for prompt, output, _ in found for token in prompt + output]
    start = {"no bos": EOS, "neither": None}.get(name, BOS)
    stream = stream if start is None or stream[:1] == [start] else [start, *stream]
    assert cut == 0 and all(len(item.prompt) == 1 and all(item.trained) for item in made)
    assert all(len(item.output) == length - 1 for item in made[:-1]) and all(len(item.output) < length for item in made)
    assert [token for item in made for token in item.output] == stream[1:]
    assert [item.prompt[0] for item in made] == [stream[:1][0] if not i else made[i - 1].output[-1]
                                                 for i in range(len(made))]


# --- pairs ------------------------------------------------------------------------------------------------------------


any_pairs = st.fixed_dictionaries({"chosen": letters | chats | contents, "rejected": letters | chats},
                                  optional={"prompt": letters | chats | contents, "other": contents})


@given(given=groups | st.lists(any_pairs, max_size=3), template=st.sampled_from(["chatml", "marked", "rewriting"]),
       seq2seq=st.booleans(), longest=st.integers(2, 20), side=sides)
@example(given=[{"chosen": "a b", "rejected": "a c", "other": np.array(["a", "b"])}], template="chatml", seq2seq=False,
         longest=9, side="left")
@example(given=[{"chosen": np.array(["a", "b"]), "rejected": "a c"}], template="chatml", seq2seq=False, longest=9,
         side="left")
@example(given=[{"prompt": "a", "chosen": "b\ud800", "rejected": "c"}], template="chatml", seq2seq=False, longest=9,
         side="left")
def test_any_pairs_are_pairs_within_the_window_or_refused(given, template, seq2seq, longest, side):
    found = answer(dpo.load_pairs, given, None, "--dataset", None)
    if not found:
        return
    for row, other in found:
        assert row.where == other.where and bool(row.messages) == bool(other.messages)
        if row.turns:
            assert row.turns[0] == other.turns[0] and row.turns[1] and other.turns[1]
    made = answer(functools.partial(dpo.make_pairs, tokenizer=chatting(template), ends=(EOS,), seq2seq=seq2seq,
                                    longest=longest, args=dpo.Args(truncation_side=side)), found)
    for pair in made[0] if made else []:
        assert pair.prompt and list(pair.chosen) != list(pair.rejected)
        for output, trained in ((pair.chosen, pair.chosen_trained), (pair.rejected, pair.rejected_trained)):
            assert 0 < len(output) == len(trained) and any(trained) and len(pair.prompt) + len(output) <= longest


@given(prompt=pieces, chosen=pieces, rejected=pieces, name=tokenizers, seq2seq=st.booleans(), train_eos=st.booleans())
@example(prompt=["a"], chosen=["<eos>"], rejected=["<pad>"], name="plain", seq2seq=False, train_eos=False)
def test_pairs_are_their_tokens(prompt, chosen, rejected, name, seq2seq, train_eos):
    """The prompt untrained, both outputs up to one end token trained."""
    texts = ["".join(part) for part in (prompt, chosen, rejected)]
    rows = answer(dpo.load_pairs, [dict(zip(("prompt", "chosen", "rejected"), texts))], None, "--dataset", None)
    if not texts[1].strip() or not texts[2].strip():
        assert rows is None
        return
    wanted = [reference_examples([prompt, output], [False, True], name, seq2seq, None) for output in (chosen, rejected)]
    made = answer(functools.partial(dpo.make_pairs, tokenizer=TOKENIZERS[name][0], ends=(EOS,), seq2seq=seq2seq,
                                    longest=1000, args=dpo.Args(train_eos=train_eos)), rows)
    if any(len(found) != 1 for found in wanted) or wanted[0][0][0] != wanted[1][0][0]:
        assert made is None, "there is nothing that both answer"
        return
    outputs = [found[0][1] for found in wanted]
    if not train_eos:
        outputs = [output[:-1] if output[-1] == EOS else output for output in outputs]
    if not all(outputs) or outputs[0] == outputs[1]:
        assert made[0] == [] and made[1]["equal"] + made[1]["dropped"] == 1
        return
    (pair,), counts = made
    assert [list(part) for part in pair[:3]] == [wanted[0][0][0], *outputs] and not any(counts.values())
    assert all(pair.chosen_trained) and all(pair.rejected_trained)


@given(chosen=letters, rejected=letters, shared=letters)
def test_what_two_dialogues_share_is_the_beginning_of_both(chosen, rejected, shared):
    for mark in ("", "\n\nAssistant:"):
        one, other = shared + mark + chosen, shared + mark + rejected
        found = dpo.shared_beginning(one, other)
        assert one.startswith(found) and other.startswith(found)
        if mark:
            assert found == shared + mark
        elif found:
            assert len(found) < min(len(one), len(other)), "both go on"


@given(prompts=st.lists(st.sampled_from("abcd"), min_size=1, max_size=12), share=st.floats(0, 0.99),
       most=st.integers(1, 6), seed=st.integers(0, 5))
def test_a_prompt_is_trained_on_or_held_out(prompts, share, most, seed):
    pairs = [(sample_row({"prompt": prompt, "completion": str(i)}, "row"),) * 2 for i, prompt in enumerate(prompts)]
    trained, held = answer(dpo.split, pairs, share, most, seed)
    assert trained and sorted(row.turns[1] for row, _ in trained + held) == sorted(map(str, range(len(prompts))))
    assert not {row.turns[0] for row, _ in trained} & {row.turns[0] for row, _ in held}
    assert bool(held) == (share > 0 and len(set(prompts)) > 1)


# --- rewards ----------------------------------------------------------------------------------------------------------

numbers = st.floats(-100, 100).map(lambda value: round(value, 3))


@given(value=values | arrays | st.floats() | st.floats().map(str) | st.lists(numbers | st.lists(numbers), max_size=3))
@example(value=[[[1.0]]])
@example(value="nan")
@example(value="1e999")
def test_any_reward_is_numbers_or_refused(value):
    found = answer(ilql.read_reward, value, "row 1")

    def flat(value):
        return [number for part in value for number in flat(part)] if isinstance(value, list) else [value]

    if found is not None:
        assert flat(found) and all(type(number) is float and math.isfinite(number) for number in flat(found))
        largest = max(map(abs, flat(found)))
        assert ilql.total(found) == pytest.approx(math.fsum(flat(found)), rel=1e-6, abs=1e-6 * largest)


@given(dialogue=dialogues, data=st.data(), name=tokenizers, seq2seq=st.booleans(),
       history=st.none() | st.integers(1, 3))
@example(dialogue=([["a"], []], "pair"), data=None, name="plain", seq2seq=False, history=None)
def test_actions_are_what_the_outputs_say_and_get_all_the_reward(dialogue, data, name, seq2seq, history):
    """The rewards of a row's actions sum to its own, be it one number, one for each output, or one for each token."""
    turns, form = dialogue
    said = said_of(turns, form)
    if seq2seq and form == "text" or not any(said):
        return
    kind = data.draw(st.sampled_from(["row", "outputs"])) if data else "row"
    reward = data.draw(numbers) if data else 1.0
    if kind == "outputs":
        reward = data.draw(st.lists(numbers, min_size=sum(said), max_size=sum(said)))
    known = load_samples([row_of(turns, form)], None, "--dataset", None)
    known = [row._replace(columns={**row.columns, "reward": reward}) for row in known]
    args = ilql.Args(history=history, normalize_rewards="none")
    made = answer(functools.partial(ilql.make_trajectories, tokenizer=TOKENIZERS[name][0], ends=(EOS,), seq2seq=seq2seq,
                                    longest=1000, args=args), known)
    if made is None:
        assert name == "neither" and seq2seq
        return
    trajectories, dropped, cut = made
    assert not cut and dropped == (not trajectories)
    if not trajectories:
        return
    total = sum(sum(item.rewards) for item in trajectories)
    lost = kind == "outputs" and any(not turn for turn, flag in zip(turns, said) if flag)  # nothing before may be said
    assert lost or total == pytest.approx(ilql.total(reward), abs=1e-6)
    actions = [item.output[place] for item in trajectories for place in item.actions]
    wanted = [token for _, output, numbers in reference_examples(turns, said, name, seq2seq, history)
              for token, number in zip(output, numbers) if number]
    ends = [token for token in actions if token != EOS], [token for token in wanted if token != EOS]
    assert ends[0] == ends[1], "but for end tokens, which a row that a user ends does without"
    if kind == "outputs" and said[-1] and not lost:
        owners = [number for _, _, numbers in reference_examples(turns, said, name, seq2seq, history)
                  for number in numbers if number]
        assert actions == wanted
        assert [number for item in trajectories for number in item.rewards] == pytest.approx(
            [reward[owner - 1] if owners[i + 1 : i + 2] != [owner] else 0.0 for i, owner in enumerate(owners)])
    steps = ilql.transitions(trajectories, CPU)
    expected, place, beyond = [], 0, len(actions)
    for item in trajectories:
        for i in range(len(item.actions)):
            place += 1
            last = i + 1 == len(item.actions)
            expected.append((0, True) if last and not item.next_prompt else (beyond, False) if last else (place, False))
        beyond += bool(item.next_prompt)
    assert list(zip(steps["next_state"].tolist(), steps["terminal"].tolist())) == expected


# --- stop sequences ---------------------------------------------------------------------------------------------------


@given(text=st.text("ab|\n", max_size=12), stops=st.lists(st.text("ab|\n", min_size=1, max_size=3), max_size=3))
def test_the_first_stop_sequence_is_found(text, stops):
    places = [i for i in range(len(text)) if any(text[i:].startswith(stop) for stop in stops)]
    assert answer(find_stop, text, stops) == (places[0] if places else -1)


@given(text=st.text("ab|\n🙂é the", max_size=14), stops=st.lists(st.text("ab|\n🙂é the", min_size=1, max_size=4),
                                                               min_size=1, max_size=3), bytes_=st.booleans())
@example(text="🙂" * 8, stops=["🙂🙂🙂"], bytes_=True)
@example(text="a😀😀😀b", stops=["😀😀😀"], bytes_=True)
def test_an_output_ends_with_the_token_that_completes_a_stop_sequence(text, stops, bytes_):
    tokenizer = BPE if bytes_ else TOKENIZERS["plain"][0]
    text = text if bytes_ else "".join(letter for letter in text if letter in "ab|\n the")
    ids, stop = tokenizer(text)["input_ids"], stop_checker(tokenizer, stops)
    whole = [any(part in tokenizer.decode(ids[:i]) for part in stops) for i in range(1, len(ids) + 1)]
    first = whole.index(True) + 1 if True in whole else len(ids)
    assert [stop(ids[:i]) for i in range(1, first + 1)] == whole[:first]


@given(stops=st.lists(values, max_size=3) | values | arrays)
@example(stops=[""])
@example(stops=["\udcff"])
@example(stops="ab")
@example(stops=iter(["a"]))
def test_any_stop_sequences_are_texts_or_refused(stops):
    try:
        found = stop_checker(BPE, stops)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and "stop_sequences" in str(error)
    else:
        assert isinstance(stops, (list, tuple)) and all(isinstance(stop, str) and stop for stop in stops)
        assert (found is None) == (not stops) and (found is None or found([]) is False)


# --- batches ----------------------------------------------------------------------------------------------------------

tokens = st.lists(st.integers(0, 60), max_size=6)
some_tokens = st.lists(st.integers(0, 60), min_size=1, max_size=6)


@given(rows=st.lists(tokens, min_size=1, max_size=4), left=st.booleans(), fill=st.integers(0, 9))
def test_padding_is_where_the_mask_says(rows, left, fill):
    """Tokens that equal the padding among them: the mask is of lengths alone."""
    width = max(map(len, rows))
    padded, mask = answer(pad_rows, rows, fill, left)
    assert padded.shape == mask.shape == (len(rows), width)
    for row, ids, real in zip(rows, padded.tolist(), mask.tolist()):
        blank = width - len(row)
        assert ids == ([fill] * blank + row if left else row + [fill] * blank)
        assert real == ([False] * blank + [True] * len(row) if left else [True] * len(row) + [False] * blank)


@given(rows=st.lists(st.tuples(some_tokens, tokens), min_size=1, max_size=4), start=st.none() | st.integers(0, 9),
       data=st.data())
def test_a_batch_scores_the_trained_tokens_alone(rows, start, data):
    prompts, outputs = ([row[i] for row in rows] for i in (0, 1))
    trained = [data.draw(st.lists(st.booleans(), min_size=len(output), max_size=len(output))) for output in outputs]
    for marks in (None, trained):
        batch = answer(collate, prompts, outputs, start, CPU, marks)
        for i, (prompt, output) in enumerate(rows):
            head = prompt if start is None else [start]
            flags = marks[i] if marks else [True] * len(output)
            assert batch["ids"][i][batch["mask"][i]].tolist() == head + output
            assert batch["scored"][i][batch["mask"][i]].tolist() == [False] * len(head) + flags
            assert not batch["scored"][i][~batch["mask"][i]].any()
            if start is not None:
                assert batch["encoder_ids"][i][batch["encoder_mask"][i]].tolist() == prompt


branches = st.tuples(some_tokens, st.lists(tokens, min_size=1, max_size=3))


@given(lines=st.lists(st.lists(branches, min_size=1, max_size=3), min_size=1, max_size=2), data=st.data())
def test_outputs_in_a_line_see_their_prompt_and_themselves_alone(lines, data):
    flags = [[[data.draw(st.lists(st.booleans(), min_size=len(output), max_size=len(output))) for output in outputs]
              for _, outputs in line] for line in lines]
    batch = answer(collate_branches, [[(prompt, outputs, marks) for (prompt, outputs), marks in zip(line, some)]
                                      for line, some in zip(lines, flags)], CPU)
    for row, (line, some) in enumerate(zip(lines, flags)):
        at = 0
        for (prompt, outputs), marks in zip(line, some):
            begin = list(range(at, at + len(prompt) - 1))
            at += len(begin)
            for output, mark in zip(outputs, marks):
                own = list(range(at, at + 1 + len(output)))
                at += len(own)
                for i, place in enumerate(own):
                    seen = begin + own[: i + 1]
                    assert batch["mask"][row, place].nonzero()[:, 0].tolist() == seen
                    assert batch["ids"][row, seen].tolist() == (prompt + output)[: len(seen)]
                    assert batch["position_ids"][row, place] == len(seen) - 1
                assert batch["scored"][row, own].tolist() == [False, *mark]
        assert not batch["scored"][row, at:].any()


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12), spare=st.integers(0, 30), ranks=st.integers(1, 4))
def test_packed_lines_hold_every_row_once(lengths, spare, ranks):
    room = max(lengths) + spare
    found = answer(pack, lengths, room, ranks)
    assert sorted(row for line in found for row in line) == list(range(len(lengths))) and all(found)
    sums = sorted(sum(lengths[row] for row in line) for line in found)
    assert sums[-1] <= room and len(found) <= len(lengths)
    assert ranks > 1 or len(sums) < 2 or sums[0] + sums[1] > room, "two lines that fit in one"


# --- sampling ---------------------------------------------------------------------------------------------------------


@given(weights=st.lists(st.integers(0, 9), min_size=1, max_size=12), uniform=st.floats(0, 1, exclude_max=True),
       top_k=st.integers(0, 14), top_p=st.sampled_from([1.0, 0.9, 0.5, 0.1]))
@example(weights=[0, 0, 1], uniform=0.0, top_k=0, top_p=1.0)
@example(weights=[1, 0, 0], uniform=0.9999999999, top_k=0, top_p=1.0)
def test_a_token_is_picked_by_its_probability(weights, uniform, top_k, top_p):
    assume(any(weights))
    logprobs = (torch.tensor([weights], dtype=torch.float32) / sum(weights)).log()
    found = answer(pick, logprobs, torch.tensor([uniform]), top_k, top_p).item()
    kept = list(weights)
    if 0 < top_k < len(kept):
        least = sorted(kept, reverse=True)[top_k - 1]
        kept = [weight if weight >= least else 0 for weight in kept]
    if top_p < 1:
        order, before = sorted(range(len(kept)), key=lambda i: -kept[i]), 0
        assume(all(abs(sum(kept[j] for j in order[:i]) / sum(kept) - top_p) > 1e-6 for i in range(len(order))))
        allowed = set()
        for i in order:
            if before / sum(kept) < top_p:
                allowed.add(kept[i])
            before += kept[i]
        assert kept[found] in allowed, "it is as likely as one that is kept"
    assert kept[found] > 0
    if top_p == 1:
        below = sum(kept[:found]) / sum(kept)
        assert below - 1e-6 <= uniform <= below + kept[found] / sum(kept) + 1e-6


@given(mask=values | arrays | st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 2**16)))
@example(mask=(0, 0, 0))
@example(mask=(2, 2, 3))
def test_any_logit_mask_leaves_each_token_a_successor_or_is_refused(mask):
    if isinstance(mask, tuple) and len(mask) == 3:
        height, width, bits = mask
        mask = torch.tensor([bits >> i & 1 for i in range(height * width)], dtype=torch.bool).reshape(height, width)
    found = answer(check_logit_mask, mask, CPU)
    if found is not None:
        size = len(found)
        assert found.shape == (size, size) and found.dtype == torch.bool and size
        previous = torch.arange(size + 2)
        logits = LogitRules(logit_mask=found)(torch.zeros(size + 2, size + 2), previous, torch.zeros(size + 2))
        assert (logits[:, :size] > -torch.inf).any(1).all()
        assert torch.equal(logits[:size, :size] == -torch.inf, found) and torch.isfinite(logits[size:]).all()
    else:
        square = isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[0] == mask.shape[1]
        assert mask is None or not square or not len(mask) or mask.dtype != torch.bool or mask.all(1).any()


# --- users' functions -------------------------------------------------------------------------------------------------


any_scores = st.one_of(numbers, values, arrays, st.lists(numbers | arrays, max_size=3))


@given(scores=st.lists(any_scores, max_size=3) | values | arrays,
       lengths=st.lists(st.integers(1, 3), min_size=1, max_size=3))
@example(scores=[[np.str_("x")]], lengths=[1])
@example(scores=[[torch.tensor(1j)]], lengths=[1])
@example(scores=[[np.datetime64("2026-01-01")]], lengths=[1])
@example(scores=[10**5000], lengths=[1])
@example(scores=[0.0, 3.402823466385289e+38], lengths=[1, 1])
@example(scores=[[1.0], 2.0], lengths=[2, 1])
@example(scores=[[torch.tensor(1.0), np.float64(2)], 3], lengths=[2, 1])
def test_any_scores_are_floats_or_refused(scores, lengths):
    """Numbers that float32 holds, one a sample, or one for each token of its output."""
    found, most = answer(check_scores, scores, lengths), torch.finfo(torch.float32).max

    def real(value):
        value = value.item() if getattr(value, "ndim", None) == 0 else value
        return isinstance(value, (int, float)) and abs(value) <= most

    fits = isinstance(scores, list) and len(scores) == len(lengths) and all(
        len(score) == length and all(map(real, score)) if isinstance(score, list) else real(score)
        for score, length in zip(scores, lengths))
    assert found is not None or not fits
    for score, length in zip(found, lengths, strict=True) if found is not None else ():
        assert not isinstance(score, list) or len(score) == length
        for value in score if isinstance(score, list) else [score]:
            assert type(value) is float and abs(value) <= most


@given(metrics=st.dictionaries(unicode, st.lists(numbers | arrays, max_size=3) | values | arrays, max_size=3) | values |
       arrays, count=st.integers(1, 3))
@example(metrics={"a": [torch.ones(2)]}, count=1)
@example(metrics={"a": [np.ones(3), 1.0]}, count=2)
@example(metrics={"a": 10**400}, count=1)
@example(metrics={"a": math.nan, "b": [math.inf]}, count=1)
@example(metrics=torch.ones(2), count=2)
def test_any_metrics_have_a_mean_or_are_refused(metrics, count):
    found = answer(check_metrics, metrics, count)
    for name, value in (found or {}).items():
        assert isinstance(name, str) and (not isinstance(value, list) or len(value) == count)
        torch.as_tensor(value, dtype=torch.float64).mean().item()


FUNCTIONS = [lambda a: a, lambda a, /: a, lambda a, /, b=1: (a, b), lambda a=1, /, b=2: (a, b), lambda **all: all,
             lambda *all: all, lambda a, *, b: (a, b), lambda *, b=3, **all: (b, all), max, dict, print, len, 3, None,
             functools.partial(lambda a, b: (a, b), b=9), SimpleNamespace]


@given(function=st.sampled_from(FUNCTIONS), arguments=st.dictionaries(st.sampled_from("abcd"), st.integers(0, 9)))
@example(function=max, arguments={"a": 1})
@example(function=lambda a, /: a, arguments={"a": 1})
@example(function=3, arguments={})
def test_a_function_gets_what_it_takes_or_is_refused(function, arguments):
    try:
        found = call(function, **arguments)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        return
    if function is FUNCTIONS[0]:
        assert found == arguments["a"]
    elif function is FUNCTIONS[3]:
        assert found == (1, arguments.get("b", 2))
    elif function is FUNCTIONS[4]:
        assert found == arguments
    elif function is FUNCTIONS[6]:
        assert found == (arguments["a"], arguments["b"])
    elif function is FUNCTIONS[7]:
        assert found == (arguments.get("b", 3), {name: value for name, value in arguments.items() if name != "b"})


# --- settings, and what is shown --------------------------------------------------------------------------------------

flags = st.sampled_from(["learning_rate", "stop", "seed", "track", "model", "dtype", "x\ny"])
settings_of_yaml = st.dictionaries(flags, scalars | st.lists(scalars, max_size=2), max_size=3)


@settings(max_examples=settings.default.max_examples // 4)
@given(content=settings_of_yaml | unicode | st.binary(max_size=30))
@example(content=b"seed: 2026-13-01")
@example(content=b"[" * 5000)
@example(content="\ud800")
@example(content={"x\ny": 1})
def test_any_config_is_settings_or_refused(content, tmp_path_factory):
    import yaml

    path = tmp_path_factory.getbasetemp() / "any.yaml"
    if isinstance(content, dict):
        content = yaml.safe_dump(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
    found = answer(cli.parse, ppo.Args, ppo.preset, ["--config", str(path)])
    assert found is None or isinstance(found, ppo.Args)


WALKS = random_walks(1000)


@given(samples=st.lists(unicode | st.text("abcdefghijklmnopqrstu", max_size=12), max_size=4))
@example(samples=["b!ida", "buida", ""])
def test_any_text_is_a_walk_or_no_walk(samples):
    metric = answer(WALKS.metric, samples)
    assert all(0 <= value <= 1 for value in metric["optimality"]) and len(metric["invalid"]) == len(samples)
    edges = WALKS.adjacency
    for sample, invalid in zip(samples, metric["invalid"]):
        nodes = [ord(letter) - ord("a") for letter in sample[: sample.find("a") + 1]]
        real = bool(nodes) and all(0 <= n < 21 for n in nodes) and all(edges[i, j] for i, j in zip(nodes, nodes[1:]))
        assert invalid == (not real)


@given(rows=st.lists(st.fixed_dictionaries({"prompt": unicode, "output": unicode, "score": st.floats()}), min_size=1,
                     max_size=3))
def test_a_table_has_a_line_for_each_row(rows):
    found = answer(table, "title", rows)
    assert len(found.split("\n")) == 3 + len(rows)


# --- what no strategy draws -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [ppo, sft, ilql, dpo])
def test_no_new_tokens_are_refused(script):
    with pytest.raises(UserError, match="^--max-new-tokens 0: must be more than 0$"):
        script.check(script.Args(max_new_tokens=0))


@pytest.mark.parametrize("script,given", [
    (sft, ["ab"]), (dpo, [{"prompt": "a", "chosen": "b", "rejected": "c"}]), (ilql, [{"text": "ab", "reward": 1}]),
    (ppo, ["ab"])], ids=["sft", "dpo", "ilql", "ppo"])
def test_a_vocabulary_larger_than_the_embedding_is_refused(script, given, model_path, tmp_path):
    """Before training, whatever the data say: its tokens would be read beyond the table."""
    bpe_tokenizer([chr(i) for i in range(0x4E00, 0x4E80)], 300).save_pretrained(tmp_path / "large")
    args = script.Args(model=model_path("gpt2"), tokenizer=f"{tmp_path}/large", output_dir=f"{tmp_path}/run",
                       max_length=16, max_new_tokens=4, max_steps=1)
    task = dict(prompts=given, reward_fn=lambda samples: [0.0] * len(samples)) if script is ppo else {
        "pairs" if script is dpo else "samples": given}
    with pytest.raises(UserError, match="^the tokenizer has [0-9]+ tokens and .* embeds fewer: give its own --token"):
        script.train(args, **task)


@pytest.mark.parametrize("name", ["no pad", "no bos", "neither"])
@pytest.mark.parametrize("script", [ppo, sft, ilql, dpo])
def test_runs_without_a_pad_start_or_end_token(script, name, model_path, tmp_path):
    """On prompts of pad or end tokens alone, and where the tokenizer has a start, on empty ones."""
    tokenizer = {"no pad": char_tokenizer(), "no bos": char_tokenizer(bos=False), "neither": without_end()}[name]
    tokenizer.pad_token = tokenizer.pad_token if name == "no bos" else None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    prompts = ["<eos>", "<pad><pad>", "<eos><pad><eos>", "a", *([] if name == "neither" else [""])]
    given = {sft: [dict(prompt=prompt, completion="b") for prompt in prompts],
             dpo: [dict(prompt=prompt, chosen="b<pad>", rejected="b") for prompt in prompts],
             ilql: [dict(prompt=prompt, completion="b", reward=i) for i, prompt in enumerate(prompts)], ppo: prompts}
    args = script.Args(model=model_path("gpt2"), tokenizer=f"{tmp_path}/tokenizer", output_dir=f"{tmp_path}/run",
                       max_length=12, max_new_tokens=4, batch_size=5, max_steps=1,
                       **(dict(total_episodes=5, rollout_batch_size=5) if script is ppo else {}))
    task = dict(reward_fn=lambda samples: [0.0] * len(samples)) if script is ppo else {}
    script.train(args, **{"prompts" if script is ppo else "pairs" if script is dpo else "samples": given[script]},
                 eval_prompts=prompts, **task)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for row in rows for value in row.values()) and rows[-1]["step"] == 1


def test_a_very_long_word():
    """300,000 letters without a space, in any builder, are as any others."""
    word = "a" * 300_000
    row = {"prompt": "b", "completion": word}
    known = [sample_row(row, "row 1")]
    (item,), dropped, cut = sft.make_examples(known, char_tokenizer(), (EOS,), False, 64, sft.Args())
    assert (list(item.prompt), len(item.output), dropped, cut) == (ids_of("b"), 63, 0, 1)
    ids, cut = encode_prompts([{"prompt": word}], char_tokenizer(), 9, "left", False)
    assert ids == [ids_of("a") * 9] and cut == [True]


@pytest.mark.parametrize("value", [1, 1.5, math.nan, None, True, ["a"], {"a": "b"}])
def test_what_is_no_text_in_a_column_of_texts_is_refused_with_its_row(value):
    """Numbers, NaN (as pandas writes for nothing) and None, in the second row of each kind of data."""
    rows = {load_samples: [{"text": "a"}, {"text": value}], prompt_rows: [{"prompt": "a"}, {"prompt": value}],
            dpo.load_pairs: [dict(prompt="a", chosen="b", rejected="c"), dict(prompt="a", chosen=value, rejected="c")]}
    for function, data in rows.items():
        options = ("x.jsonl",) if function is prompt_rows else (None, "x.jsonl", None)
        with pytest.raises(UserError, match="x.jsonl, row 2: "):
            function(data, *options)
    with pytest.raises(UserError, match="x.jsonl, row 1: "):
        load_samples([{"prompt": "a", "completion": value}], None, "x.jsonl", None)
    with pytest.raises(UserError, match="x.jsonl, row 1: "):
        load_samples([{"turns": ["a", value]}], None, "x.jsonl", None)


def test_a_template_that_writes_half_a_character_is_refused_with_its_row():
    """From a field that nobody else reads, too."""
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.name }}{{ m.content }}<eos>{% endfor %}"
    messages = [{"role": role, "content": "a", "name": "\ud83d"} for role in ("user", "assistant")]
    for seq2seq in (False, True):
        with pytest.raises(UserError, match="^x, row 1: the tokenizer's chat template refuses list .*surrogates not"):
            sft.make_examples([sample_row(messages, "x, row 1")], tokenizer, (EOS,), seq2seq, 9, sft.Args())
    with pytest.raises(UserError, match="^the tokenizer's chat template refuses list "):
        encode_prompts([{"prompt": messages}], tokenizer, 9, "left", False)


def test_the_long_run_has_ten_thousand_cases():
    """But for one, of settings, each property in this file has all the cases of the profile."""
    count = sum(hasattr(value, "hypothesis") for value in globals().values())
    assert settings.get_profile("long").max_examples * (count - 1) >= 20_000

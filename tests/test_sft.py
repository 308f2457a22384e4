"""sft.py against plain transformers on single, unpadded rows, and as its users run it.

Sequences are written as marked text, a character a token: `ab[cd$]` is the prompt "ab" and the trained tokens "cd" and
EOS; ^ is BOS; what stands before > goes to the encoder of an encoder-decoder.
"""

import copy
import json
import math
import os
import random
import re
from pathlib import Path

import pytest
import torch
import transformers
from conftest import CONFIGS, ROOT, VOCABULARY, bpe_tokenizer, char_tokenizer, documented_metrics, run_forked, tiny_lm
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import ppo
import sft
from common.cli import UserError, parse
from common.data import chat_ids, encode_prompts, pack, shuffled, tokenize_turns
from common.distributed import gather_rows, init
from common.functions import check_metrics
from common.models import LanguageModel, new_lm, packs_exactly, prepare

LETTERS = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!|\n"  # ids from 3 on; 0 is pad
BOS, EOS = 1, 2
CPU = torch.device("cpu")
AUTO = {True: transformers.AutoModelForSeq2SeqLM, False: transformers.AutoModelForCausalLM}


def parsed(line: str) -> tuple[list[int], list[bool]]:
    """Token ids of a marked text, and which are trained."""
    ids, said, trained = [], [], False
    for character in line:
        if character in "[]":
            trained = character == "["
        elif character != ">":
            ids.append({"^": BOS, "$": EOS}.get(character) or 3 + LETTERS.index(character))
            said.append(trained)
    return ids, said


def marked(example, seq2seq: bool = False) -> str:
    """The marked text of an example."""
    line, trained = "", False
    tokens = [*((token, False) for token in example.prompt), *zip(example.output, example.trained, strict=True)]
    for place, (token, said) in enumerate(tokens):
        line += ">" if seq2seq and place == len(example.prompt) else ""
        line += "" if said == trained else "[" if said else "]"
        line, trained = line + ("?^$" + LETTERS)[token], said
    return line + ("]" if trained else "")


def brute_force(lm, lines: list[str]) -> torch.Tensor:
    """Mean of -log p over the trained tokens of all lines, by transformers alone, one unpadded line at a time."""
    total, count = 0.0, 0
    for line in lines:
        prompt, _, output = line.rpartition(">")
        ids, said = parsed(output)
        if lm.config.is_encoder_decoder:
            decoder = torch.tensor([[lm.config.decoder_start_token_id, *ids[:-1]]])
            logits = lm(input_ids=torch.tensor([parsed(prompt)[0]]), decoder_input_ids=decoder).logits[0]
        else:
            logits = lm(input_ids=torch.tensor([ids])).logits[0]
            ids, said = ids[1:], said[1:]
        logprobs = logits.double().log_softmax(-1)
        total = total - sum(logprobs[place, token] for place, token in enumerate(ids) if said[place])
        count += sum(said)
    return total / count


def gradients(lm) -> dict[str, torch.Tensor]:
    """Takes the gradients off a model."""
    found = {name: parameter.grad for name, parameter in lm.named_parameters() if parameter.grad is not None}
    lm.zero_grad()
    return found


def reference(lm, lines: list[str]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by brute force."""
    loss = brute_force(lm, lines)
    loss.backward()
    return loss.item(), gradients(lm)


def assert_same_gradients(found: dict, expected: dict, tolerance: float = 2e-5):
    assert expected and found.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    assert scale > 1e-2
    for name in expected:
        assert (found[name] - expected[name]).abs().max() < tolerance * scale, name


def examples_of(samples, tokenizer=None, seq2seq=False, longest=64, ends=(EOS,), **flags):
    """`make_examples` of what a user gives: examples, rows dropped, rows cut."""
    rows = sft.load_samples(samples, None, "--dataset", None)
    tokenizer = tokenizer or char_tokenizer()
    examples, *counts = sft.make_examples(rows, tokenizer, ends, seq2seq, longest, sft.Args(**flags))
    return [sft.Example(*map(list, example)) for example in examples], *counts


def lines_of(samples, *arguments, seq2seq=False, **options) -> list[str]:
    examples, *_ = examples_of(samples, *arguments, seq2seq=seq2seq, **options)
    return [marked(example, seq2seq) for example in examples]


def with_specials(template: str):
    """The character tokenizer with special tokens added as `template` says, such as "<bos> $A"."""
    tokenizer = char_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", BOS), ("<eos>", EOS)])
    return tokenizer


CHATML = ("{% for m in messages %}.{{ m.role[0] }} {{ m.content }}<eos>{{ '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}.a {% endif %}")


def chat_tokenizer(template: str = CHATML):
    tokenizer = char_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def says(*contents: str, first: str = "user") -> list[dict]:
    """Messages of user and assistant in turn."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


# what a user gives -> what a causal model and an encoder-decoder train on
TEXTS = ["the cat", "a", "", "dog<eos>", "ab<eos>cd", "Some longer words, here."]
TEXT_LINES = ["t[he cat$]", "a[$]", "d[og$]", "a[b$cd$]", "S[ome longer words, here.$]"]
PAIRS = [{"prompt": "ab", "completion": "cde"}, {"prompt": "", "completion": "xy"}, {"prompt": "p", "completion": ""},
         {"prompt": "why not ", "completion": "no<eos>"}, {"prompt": "q", "completion": " an end"}]
PAIR_LINES = ["ab[cde$]", "^[xy$]", "why not [no$]", "q[ an end$]"]
DIALOGUES = [["ab", "cd", "ef", "gh"], ["long prompt ", "o", "second"], ["", "cd", "e", "f"], ["a", "", "b", "c"],
             {"turns": ("a", "b<eos>", "c", "d")}, ["only a prompt"], ["a", "b", "c", ""]]
DIALOGUE_LINES = ["ab[cd]ef[gh$]", "long prompt [o$]", "^[cd]e[f$]", "ab[c$]", "a[b$]c[d$]", "a[b$]"]
CHATS = [says("hi", "yo"), {"messages": [{"role": "system", "content": "be"}, *says("a", "b", "c", "dd")]},
         {"prompt": says("hi", "yo", "q"), "completion": "r"},
         {"prompt": says("hi"), "completion": says("yo", "w", "z", first="assistant")}, says("unanswered"),
         says("a", "b", "not answered"), says("hi", "y<eos>o")]
CHAT_LINES = [".u hi$\n.a [yo$]", ".s be$\n.u a$\n.a [b$]\n.u c$\n.a [dd$]", ".u hi$\n.a yo$\n.u q$\n.a [r$]",
              ".u hi$\n.a [yo$]\n.u w$\n.a [z$]", ".u a$\n.a [b$]", ".u hi$\n.a [y$o$]"]
SEQ2SEQ_LINES = {
    "pairs": ["ab>[cde$]", "^>[xy$]", "why not >[no$]", "q>[ an end$]"],
    "dialogues": ["ab>[cd$]", "abcdef>[gh$]", "long prompt >[o$]", "^>[cd$]", "cde>[f$]", "ab>[c$]", "a>[b$]",
                  "ab$c>[d$]", "a>[b$]"],
    "chats": [".u hi$\n.a >[yo$]", ".s be$\n.u a$\n.a >[b$]", ".s be$\n.u a$\n.a b$\n.u c$\n.a >[dd$]",
              ".u hi$\n.a yo$\n.u q$\n.a >[r$]", ".u hi$\n.a >[yo$]", ".u hi$\n.a yo$\n.u w$\n.a >[z$]",
              ".u a$\n.a >[b$]", ".u hi$\n.a >[y$o$]"]}
FORMS = {"texts": (TEXTS, TEXT_LINES), "pairs": (PAIRS, PAIR_LINES), "dialogues": (DIALOGUES, DIALOGUE_LINES),
         "chats": (CHATS, CHAT_LINES)}
CASES = [(architecture, form) for architecture in ("gpt2", "llama", "gemma2", "t5", "bart")
         for form in FORMS if CONFIGS[architecture].is_encoder_decoder <= (form in SEQ2SEQ_LINES)]


# --- what is trained, and its loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_row_trains_its_outputs_and_one_end_token(form):
    """EOS once, also where the text has it already, at the end of a dialogue only; prompts, BOS and what follows the
    last output have no loss; rows without an output are dropped and counted; nothing given is changed."""
    samples, lines = FORMS[form]
    given = copy.deepcopy(samples)
    assert lines_of(samples, chat_tokenizer()) == lines
    if form in SEQ2SEQ_LINES:
        assert lines_of(samples, chat_tokenizer(), seq2seq=True) == SEQ2SEQ_LINES[form]
        assert examples_of(samples, chat_tokenizer(), seq2seq=True)[1:] == (len(samples) - len(lines), 0)
    assert examples_of(samples, chat_tokenizer())[1:] == (len(samples) - len(lines), 0)
    assert samples == given


@pytest.mark.parametrize("architecture,form", CASES)
def test_loss_and_gradient_are_those_of_single_unpadded_rows(architecture, form):
    """In micro-batches of 1, 2 and 5, rows padded or packed; without gradients the same loss and none left behind."""
    lm = tiny_lm(architecture)
    model, seq2seq = LanguageModel(lm), lm.config.is_encoder_decoder
    samples, lines = FORMS[form]
    lines = SEQ2SEQ_LINES[form] if seq2seq else lines
    loss, expected = reference(lm, lines)
    examples, *_ = examples_of(samples, chat_tokenizer(), seq2seq=seq2seq)
    before = copy.deepcopy(examples)
    for room in (None,) if seq2seq else (None, 40, 64):
        for micro_batch_size in (1, 2, 5):
            assert sft.batch_loss(model, examples, room, micro_batch_size) == pytest.approx(loss, rel=1e-5)
            assert_same_gradients(gradients(lm), expected)
    with torch.no_grad():
        assert sft.batch_loss(model, examples, None, 2) == pytest.approx(loss, rel=1e-5)
    assert not gradients(lm) and examples == before


def test_loss_is_the_sum_over_tokens_that_count():
    logprobs, weight = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True), torch.tensor([True, False, True])
    loss = sft.lm_loss(logprobs, weight)
    loss.backward()
    assert loss == 5 and logprobs.grad.tolist() == [-1, 0, -1]


def micro_batches(examples, room, size, start_id=None):
    return list(sft.micro_batches(examples, room, size, start_id, CPU))


def test_windows_overlap_by_one_token_and_train_each_token_once():
    lines = ["^[abc]", "c[$de]", "e[$f$]"]
    assert lines_of(["abc", "de", "", "f"], packing="windows", longest=4) == lines
    assert lines_of(["abc", "def"], packing="windows", longest=6) == ["^[abc$d]", "d[ef$]"]
    assert examples_of(["abc", "de", "", "f"], packing="windows", longest=4)[1:] == (1, 0)
    assert lines_of(["ab", "c"], with_specials("<bos> $A"), packing="windows", longest=9) == ["^[ab$^c$]"]
    lm = tiny_lm("llama")
    examples, *_ = examples_of(["abc", "de", "f"], packing="windows", longest=4)
    assert sft.batch_loss(LanguageModel(lm), examples, None, 2) == pytest.approx(reference(lm, lines)[0], rel=1e-5)


def test_windows_joined_are_the_stream():
    draw = random.Random(0)
    for _ in range(100):
        texts = ["".join(draw.choices("abc", k=draw.randrange(9))) for _ in range(draw.randrange(1, 6))]
        longest = draw.randrange(2, 12)
        examples, dropped, _ = examples_of(texts, packing="windows", longest=longest)
        stream = parsed("^" + "".join(text + "$" for text in texts if text))[0]
        joined = [token for example in examples for token in example.output]
        assert joined == stream[1:] and all(all(example.trained) for example in examples)
        assert dropped == texts.count("")
        last = stream[:1]
        for number, example in enumerate(examples, 1):
            assert example.prompt == last and len(example.prompt) == 1
            size = 1 + len(example.output)
            assert size == longest or (number == len(examples) and 1 < size <= longest)
            last = example.output[-1:]


RUN = dict(held_out=0.0, num_eval_prompts=0, batch_size=4, micro_batch_size=2, max_length=40, max_new_tokens=4,
           learning_rate=1e-3)


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]


def numbers(row: dict) -> dict:
    """What must be equal between two equal runs: everything but the clock."""
    return {name: value for name, value in row.items() if not name.startswith("perf/") and name != "seconds"}


def plain(folder):
    """The model in a folder, by transformers alone."""
    config = transformers.AutoConfig.from_pretrained(folder)
    return AUTO[bool(config.is_encoder_decoder)].from_pretrained(folder).eval()


@pytest.fixture(scope="session")
def chat_path(model_path, tmp_path_factory):
    """As model_path, with a chat template."""
    def path(architecture):
        folder = str(tmp_path_factory.mktemp(architecture) / "chat")
        plain(model_path(architecture)).save_pretrained(folder)
        chat_tokenizer().save_pretrained(folder)
        return folder
    return path


RUNS = {
    "gpt2 texts": ("gpt2", TEXTS, {}, TEXT_LINES),
    "gpt2 packed": ("gpt2", PAIRS, dict(packing="rows"), PAIR_LINES),
    "llama dialogues": ("llama", DIALOGUES, dict(packing="rows"), DIALOGUE_LINES),
    "llama windows": ("llama", ["abc", "de", "f"], dict(packing="windows", max_length=4),
                      ["^[abc]", "c[$de]", "e[$f$]"]),
    "gemma2 chats": ("gemma2", CHATS, dict(packing="rows"), CHAT_LINES),
    "t5 pairs": ("t5", PAIRS, {}, SEQ2SEQ_LINES["pairs"]),
    "bart chats": ("bart", CHATS, dict(packing="rows"), SEQ2SEQ_LINES["chats"]),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_step_of_a_run_is_a_step_of_adamw_on_the_brute_force_loss(run, chat_path, tmp_path):
    """loss/lm, gradient norm, and every weight after one step; the user's objects are unchanged."""
    architecture, samples, flags, lines = RUNS[run]
    given = copy.deepcopy(samples)
    args = sft.Args(model=chat_path(architecture), output_dir=str(tmp_path / "run"), weight_decay=0.5,
                    **{**RUN, "batch_size": 99, **flags})
    model, tokenizer = sft.train(args, samples)
    assert samples == given
    lm = plain(args.model)
    loss, grads = reference(lm, lines)
    norm = torch.stack([gradient.norm() for gradient in grads.values()]).norm()
    start, row = rows_of(tmp_path / "run")
    assert row["loss/lm"] == pytest.approx(loss, rel=1e-5)
    assert row["optim/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert row["optim/learning_rate"] == 1e-3 and row["samples"] == len(lines) and row["epoch"] == 1
    assert row["tokens"] == sum(sum(parsed(line)[1]) for line in lines)
    assert start["data/rows"] == len(samples) and start["data/held_out"] == start["data/cut"] == 0
    dropped = [sample for sample in samples if "windows" not in run and not lines_of([sample], tokenizer)]
    assert start["data/dropped"] == len(dropped)
    trained = dict(model.named_parameters())
    for name, parameter in lm.named_parameters():
        clipped = grads[name] * min(1, 1 / norm)
        decay = 1e-3 * 0.5 if parameter.ndim > 1 else 0
        stepped = parameter.detach() * (1 - decay) - 1e-3 * clipped / (clipped.abs() + 1e-8)
        sure = clipped.abs() > 1e-5  # Adam's first step is the sign, also of what is but rounding
        assert ((trained[name] - stepped).abs() * sure).max() < 2e-5, name
    again = plain(tmp_path / "run" / "model")
    inputs = dict(input_ids=torch.tensor([[5, 6, 7]]))
    inputs |= dict(decoder_input_ids=torch.tensor([[0, 4]])) if lm.config.is_encoder_decoder else {}
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert not torch.equal(again(**inputs).logits, lm(**inputs).logits)
    assert tokenizer("ab")["input_ids"] == parsed("ab")[0]


# --- micro-batches, packing, ranks ------------------------------------------------------------------------------------

MIXED = [*PAIRS, *TEXTS, *DIALOGUES]
MIXED_LINES = [*PAIR_LINES, *TEXT_LINES, *DIALOGUE_LINES]
PACKING = ["gpt2", "llama", "gpt_neox", "qwen3", "gemma2", "gemma3", "mixtral"]


def assert_same_loss(architecture, samples, lines, rooms):
    lm = tiny_lm(architecture)
    loss, expected = reference(lm, lines)
    examples, *_ = examples_of(samples, chat_tokenizer())
    for room in rooms:
        assert sft.batch_loss(LanguageModel(lm), examples, room, 2) == pytest.approx(loss, rel=1e-5)
        assert_same_gradients(gradients(lm), expected)


@pytest.mark.parametrize("architecture", PACKING)
def test_packing_changes_neither_loss_nor_gradient(architecture):
    """Windows of attention shorter than a row (Gemma) and experts (Mixtral) too."""
    assert_same_loss(architecture, MIXED, MIXED_LINES, (None, 40, 64))


def test_lines_hold_several_rows_and_padding_is_less():
    examples, *_ = examples_of(MIXED)
    padded, packed = (micro_batches(examples, room, 3) for room in (None, 40))
    assert sum(len(batch["ids"]) for batch, _ in padded) == len(examples)
    assert sum(len(batch["ids"]) for batch, _ in packed) < len(examples) / 2
    assert all(batch["ids"].shape[1] <= 40 for batch, _ in packed)
    assert sum(batch["scored"].sum() for batch, _ in packed) == sum(sum(example.trained) for example in examples)
    assert len(padded) == math.ceil(len(examples) / 3), "micro_batch_size lines a forward"
    widths = [batch["ids"].shape[1] for batch, _ in padded]
    assert widths == sorted(widths), "like lengths share a micro-batch"


@pytest.mark.parametrize("architecture", PACKING)
def test_rows_that_share_a_line_do_not_see_each_other(architecture):
    model = LanguageModel(tiny_lm(architecture))
    lines = {}
    for text in ("abcdefgh", "stuvwxyz"):
        examples, *_ = examples_of([text, "the cat", "dog"])
        ((batch, _),) = micro_batches(examples, 64, 1)
        with torch.no_grad():
            lines[text] = model(**batch, with_entropy=False)["logprobs"]
    first, second = lines.values()
    assert len(first) == 8 + 7 + 3
    assert (first[:8] - second[:8]).abs().max() > 0.1
    assert (first[8:] - second[8:]).abs().max() < 1e-5


@pytest.mark.parametrize("architecture", CONFIGS)
def test_what_packs_exactly_is_found_out(architecture):
    """For large random weights, and for the small ones that transformers starts from."""
    fresh = AUTO[bool(CONFIGS[architecture].is_encoder_decoder)].from_config(copy.deepcopy(CONFIGS[architecture]))
    for lm in (tiny_lm(architecture), fresh.eval()):
        assert packs_exactly(LanguageModel(lm)) == (architecture in PACKING)


def test_a_model_of_few_positions_can_be_asked():
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=4, vocab_size=9, bos_token_id=1,
                                     eos_token_id=2)
    assert packs_exactly(LanguageModel(transformers.GPT2LMHeadModel(config).eval()))


@pytest.mark.parametrize("share", [1.0, 1e-3])
@pytest.mark.parametrize("architecture", PACKING)
def test_rows_that_see_each_other_are_found_out(architecture, share, monkeypatch):
    """Positions restart, but attention crosses rows, or a little of it, in a model that has just been initialised."""
    torch.manual_seed(1)
    model = LanguageModel(AUTO[False].from_config(copy.deepcopy(CONFIGS[architecture])).eval())
    states, calls = model._states, []

    def crossing(trunk, ids, mask, *arguments, position_ids=None):
        right, cache = states(trunk, ids, mask, *arguments, position_ids=position_ids)
        if position_ids is None:
            return right, cache
        calls.append(position_ids)
        output = trunk(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=position_ids, use_cache=False)
        return right + share * (output.last_hidden_state - right), cache

    assert packs_exactly(model)
    monkeypatch.setattr(model, "_states", crossing)
    assert not packs_exactly(model) and calls


def test_the_run_says_whether_rows_share_lines(model_path, tmp_path, capsys):
    for architecture, said in {
            "gpt2": "packing: rows share lines of 40 tokens",
            "opt": "packing: a OPTForCausalLM does not keep rows that share a line apart; each is padded instead",
            "bloom": "a BloomForCausalLM does not"}.items():
        args = sft.Args(model=model_path(architecture), output_dir=str(tmp_path / architecture), packing="rows", **RUN)
        sft.train(args, PAIRS)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("packing")]
        assert len(lines) == 1 and said in lines[0]
    args = sft.Args(model=model_path("gpt2"), output_dir=str(tmp_path / "none"), **RUN)
    sft.train(args, PAIRS)
    assert "packing" not in capsys.readouterr().out


def test_pack_puts_every_row_in_one_line_that_has_room():
    draw = random.Random(0)
    for _ in range(200):
        room = draw.randrange(1, 30)
        lengths = [draw.randrange(1, room + 1) for _ in range(draw.randrange(40))]
        lines = pack(lengths, room)
        assert sorted(row for line in lines for row in line) == list(range(len(lengths)))
        sums = [sum(lengths[row] for row in line) for line in lines]
        assert all(0 < used <= room for used in sums)
        assert sum(sorted(sums)[:2]) > room or len(sums) < 2, "two lines that would fit in one"


def test_pack_spreads_rows_over_the_lines_that_ranks_would_lack():
    """Lines are a multiple of the ranks where there are rows enough, and none is longer than without ranks."""
    draw, better = random.Random(0), 0
    for _ in range(300):
        ranks, room = draw.randrange(2, 9), draw.randrange(20, 60)
        lengths = [draw.randrange(1, room + 1) for _ in range(draw.randrange(1, 50))]
        plain, lines = pack(lengths, room), pack(lengths, room, ranks)
        assert sorted(row for line in lines for row in line) == list(range(len(lengths)))
        longest, before = (max(sum(lengths[row] for row in line) for line in some) for some in (lines, plain))
        assert longest <= room
        if lines != plain:
            assert len(lines) == min(len(lengths), -(-len(plain) // ranks) * ranks)
            better += longest < before
        elif len(plain) % ranks and len(lengths) > len(plain):
            assert len(plain) > 1  # it could not be done within the room
    assert better > 80
    assert pack([5, 3, 2], 10, 2) == [[0], [1, 2]]  # one line would do, for one rank


# what two ranks compute: model, rows, what they train, room of a line
RANKED = {
    "gpt2": ("gpt2", MIXED[:6], MIXED_LINES[:5], None),  # 5 lines: the last of rank 1 is a stand-in
    "gpt2 alone": ("gpt2", PAIRS[:1], PAIR_LINES[:1], None),  # fewer rows than ranks
    "gpt2 packed": ("gpt2", MIXED, MIXED_LINES, 40),
    "llama packed alone": ("llama", PAIRS[:1], PAIR_LINES[:1], 40),
    "llama packed": ("llama", MIXED, MIXED_LINES, 64),
    "gpt2 packed pair": ("gpt2", TEXTS[:2], TEXT_LINES[:2], 64),  # which one line would have room for
    "t5": ("t5", PAIRS, SEQ2SEQ_LINES["pairs"], None),
    "bart": ("bart", PAIRS[:4], SEQ2SEQ_LINES["pairs"][:3], None),
}
WORKER = f"import sys\nsys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\nimport test_sft\ntest_sft.work(sys.argv[1])\n"


def work(folder: str) -> None:
    """Run on each of several ranks: losses and whole gradients of RANKED, written by rank 0."""
    torch.set_num_threads(1)
    init(0)
    found = {}
    for name, (architecture, samples, _, room) in RANKED.items():
        model = prepare(LanguageModel(tiny_lm(architecture)), torch.float32, CPU)
        examples, *_ = examples_of(samples, seq2seq=model.seq2seq)
        for micro_batch_size in (1, 2, 5):
            loss = sft.batch_loss(model, examples, room, micro_batch_size)
            grads = {name.removeprefix("lm."): parameter.grad.full_tensor()
                     for name, parameter in model.named_parameters() if parameter.grad is not None}
            model.zero_grad()
            with torch.no_grad():
                again = sft.batch_loss(model, examples, room, micro_batch_size)
            found[name, micro_batch_size] = loss, again, grads
        real = [weight.any().item() for _, weight in micro_batches(examples, room, 1, model.start_id)]
        found[name] = sum(gather_rows([any(real)], torch.distributed.get_world_size()))
    if torch.distributed.get_rank() == 0:
        torch.save(found, f"{folder}/found.pt")
    torch.distributed.barrier()
    os._exit(0)  # as common.cli.run does


def test_two_ranks_have_the_loss_and_gradient_of_one(tmp_path):
    """In micro-batches of 1, 2 and 5, padded and packed, with lines that do not divide evenly."""
    (tmp_path / "worker.py").write_text(WORKER)
    done = run_forked(str(tmp_path / "worker.py"), str(tmp_path), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for name, (architecture, _, lines, _) in RANKED.items():
        loss, expected = reference(tiny_lm(architecture), lines)
        assert found[name] == min(2, len(lines)), "a rank has nothing to do"
        for micro_batch_size in (1, 2, 5):
            both, again, grads = found[name, micro_batch_size]
            assert both == pytest.approx(loss, rel=1e-5) and again == pytest.approx(loss, rel=1e-5), name
            assert_same_gradients(grads, expected)


# --- each has its outcome ---------------------------------------------------------------------------------------------

MARKED = (  # how templates mark what the assistant says: EOS inside, more than EOS inside, EOS outside
    "{{ m.content }}<eos>{% endgeneration %}{{ '\n' }}", "{{ m.content }}<eos>{{ '\n' }}{% endgeneration %}",
    "{{ m.content }}{% endgeneration %}<eos>{{ '\n' }}")


@pytest.mark.parametrize("end", MARKED)
def test_generation_marks_say_the_same_as_prefixes(end):
    """EOS after a marked span is trained, and what follows EOS in one is not."""
    template = ("{% for m in messages %}.{{ m.role[0] }} {% if m.role == 'assistant' %}{% generation %}" + end +
                "{% else %}{{ m.content }}<eos>{{ '\n' }}{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}.a {% endif %}")
    assert lines_of(CHATS, chat_tokenizer(template)) == CHAT_LINES
    assert lines_of(CHATS, chat_tokenizer(template), seq2seq=True) == SEQ2SEQ_LINES["chats"]


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("marks", [False, True])
def test_the_tokens_of_a_chat_are_those_of_its_template(marks, trim_offsets):
    """With byte-level BPE, whose offsets leave out the spaces (as GPT-2's and Llama 3's) or not (Qwen's), and which has
    several tokens for one character."""
    said = "{% generation %}{{ m.content }}<|end|>{% endgeneration %}" if marks else "{{ m.content }}<|end|>"
    tokenizer = sft.train_tokenizer(CORPUS, 300)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|start|>{{ m.role + '\n' }}{% if m.role == 'assistant' %}" + said + "{% else %}"
        "{{ m.content }}<|end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{{ '\n' }}{% endif %}")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for content in ("the cat sat on the mat", "🙂🙂 the dog é sat", "so 🙂", " a  space ", "a\n\n b\n"):
        messages = says("hi there 🙂", content, "why 🙂", content + "!")
        (example,), *_ = examples_of([messages], tokenizer, ends=(tokenizer.eos_token_id, end), longest=999)
        ids = [*example.prompt, *example.output]
        whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert ids == whole[: len(whole) - whole[::-1].index(end)]
        trained = [token for token, flag in zip(example.output, example.trained) if flag]
        assert tokenizer.decode(trained) == f"{content}<|end|>{content}!<|end|>"


def test_an_end_token_of_the_generation_config_ends_a_turn():
    """A chat model's end of turn is not its tokenizer's EOS: it is trained, nothing after it, and no EOS is added."""
    tokenizer = chat_tokenizer(CHATML.replace("<eos>", "!"))
    end = parsed("!")[0][0]
    assert lines_of([says("hi", "yo", "q", "r")], tokenizer, ends=(EOS, end)) == [
        ".u hi!\n.a [yo!]\n.u q!\n.a [r!]"]
    assert lines_of([says("hi", "yo")], tokenizer) == [".u hi!\n.a [yo!\n$]"], "not an end token: as any other"


@pytest.mark.parametrize("marks", [False, True])
def test_a_dialogue_may_begin_with_the_assistant(marks):
    """Its opening has no loss, with marks and without them."""
    said = "{% generation %}{{ m.content }}<eos>{% endgeneration %}" if marks else "{{ m.content }}<eos>"
    template = ("{% for m in messages %}.{{ m.role[0] }} {% if m.role == 'assistant' %}" + said + "{% else %}"
                "{{ m.content }}<eos>{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}.a {% endif %}")
    assert lines_of([says("hi", "q", "yo", first="assistant")], chat_tokenizer(template)) == [
        ".a [hi$]\n.u q$\n.a [yo$]"]


def test_a_held_out_dialogue_may_be_one_message_of_the_assistant(chat_path, tmp_path):
    folder = run(tmp_path, chat_path("gpt2"), PAIRS, held_out_samples=[says("hi", first="assistant"), ["a", "b"]],
                 num_eval_prompts=2)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {sample["prompt"] for sample in samples} == {"a"}, "it has nothing to be asked; its loss is measured"
    assert rows_of(folder)[0]["data/held_out"] == 2


def test_a_run_knows_the_end_tokens_of_the_generation_config(chat_path, tmp_path, monkeypatch):
    folder, end = Path(chat_path("gpt2")), parsed("!")[0][0]
    chat_tokenizer(CHATML.replace("<eos>", "!")).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, end]}))
    calls = recorded(monkeypatch)
    run(tmp_path, str(folder), [says("hi", "yo")])
    assert calls["train"] == [[".u hi!\n.a [yo!]"]]


def test_a_template_without_an_end_token_gets_eos():
    tokenizer = chat_tokenizer(CHATML.replace("<eos>", ""))
    assert lines_of([says("hi", "yo", "q", "r")], tokenizer) == [".u hi\n.a [yo\n].u q\n.a [r\n$]"]
    opened = chat_tokenizer("{% for m in messages %}<bos>{{ m.role[0] }} {{ m.content }}{% endfor %}"
                            "{% if add_generation_prompt %}<bos>a {% endif %}")
    assert lines_of([says("hi", "yo", "q", "r")], opened) == ["^u hi^a [yo]^u q^a [r$]"], "not what opens the next"


def test_a_template_that_rewrites_earlier_turns_has_an_example_for_each_answer():
    """As Qwen3's, which leaves out earlier thoughts; with marks one example says all."""
    rewriting = "{% for m in messages %}{{ '!' if loop.last else '.' }}{{ m.content }}<eos>{% endfor %}"
    assert lines_of([says("hi", "yo", "q", "r"), says("a", "b")], chat_tokenizer(rewriting)) == [
        "!hi$[yo$]", ".hi$.yo$!q$[r$]", "!a$[b$]"]
    marked_up = rewriting.replace("{{ m.content }}<eos>", "{% if m.role == 'assistant' %}{% generation %}"
                                  "{{ m.content }}<eos>{% endgeneration %}{% else %}{{ m.content }}{% endif %}")
    assert lines_of([says("hi", "yo", "q", "r")], chat_tokenizer(marked_up)) == [".hi.[yo$].q![r$]"]


def test_a_special_token_after_the_marks_ends_a_turn():
    """<|im_end|> of a tokenizer whose EOS is another: trained with the answer, marked or not; then comes EOS."""
    tokenizer = char_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["!"]})  # a letter as a special token
    said = "{% generation %}{{ m.content }}{% endgeneration %}"
    for content in (said, "{{ m.content }}"):
        tokenizer.chat_template = ("{% for m in messages %}.{{ m.role[0] }} {% if m.role == 'assistant' %}" + content +
                                   "{% else %}{{ m.content }}{% endif %}!{{ '\n' }}{% endfor %}"
                                   "{% if add_generation_prompt %}.a {% endif %}")
        assert lines_of([says("hi", "yo", "q", "r")], tokenizer) == [".u hi!\n.a [yo!]\n.u q!\n.a [r!$]"]


def test_an_answer_may_merge_with_what_comes_before_it():
    """Where a tokenizer joins the end of the prompt and the beginning of an answer, both keep their own tokens."""
    tokenizer = bpe_tokenizer(["a\n\nb\n\n\nc" * 9], 300)
    tokenizer.chat_template = ("{% for m in messages %}{{ m.role[0] + '\n' + m.content + eos_token }}{% endfor %}"
                               "{% if add_generation_prompt %}a{{ '\n' }}{% endif %}")
    eos = tokenizer.eos_token_id
    (example,), *_ = examples_of([says("b", "\n\nc")], tokenizer, ends=(eos,))
    prompt = chat_ids(says("b"), tokenizer, add_generation_prompt=True)
    whole = chat_ids(says("b", "\n\nc"), tokenizer)
    assert whole[: len(prompt)] != prompt, "else there is nothing to see"
    assert example.prompt == prompt and tokenizer.decode(example.output) == "\n\nc<|endoftext|>"


def test_messages_need_a_chat_template():
    for seq2seq in (False, True):
        with pytest.raises(UserError, match="lists of messages and the tokenizer has no chat template: give texts$"):
            examples_of(CHATS, char_tokenizer(), seq2seq=seq2seq)
    refusing = chat_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="chat template refuses .*: roles must alternate$"):
        examples_of(CHATS, refusing)


LONG = {  # prompt and completion, and what is left of them in 8 tokens, cut on the left and on the right
    ("abcd", "efg"): ("abcd[efg$]", "abcd[efg$]", False),
    ("abcdefghij", "klm"): ("ghij[klm$]", "abcd[klm$]", True),
    ("abcdefg", "x"): ("bcdefg[x$]", "abcdef[x$]", True),
    ("abcdef", "klmnopqrst"): ("cdef[klmn]", "abcd[klmn]", True),
    ("ab", "klmnopqrst"): ("ab[klmnop]", "ab[klmnop]", True),
    ("abcd", "klm<eos>"): ("abcd[klm$]", "abcd[klm$]", False),
    ("", "klmnopqrst"): ("^[klmnopq]", "^[klmnopq]", True),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seq2seq", [False, True])
def test_a_long_prompt_gives_way_but_keeps_half_of_the_window(side, seq2seq):
    for (prompt, completion), (left, right, cut) in LONG.items():
        expected = (left if side == "left" else right).replace("[", ">[" if seq2seq else "[")
        examples, *counts = examples_of([{"prompt": prompt, "completion": completion}], seq2seq=seq2seq, longest=8,
                                        truncation_side=side)
        assert [marked(example, seq2seq) for example in examples] == [expected] and counts == [0, cut]
    assert lines_of(["abcdefghijkl", ["abcdefgh", "ij", "kl", "mn"], ["a", "bcd", "ef", "ghi", "j", "k"]], longest=8,
                    truncation_side=side) == [
        "a[bcdefgh]", "cdefgh[ij]" if side == "left" else "abcdef[ij]", "a[bcd]ef[gh]"]
    chat = examples_of([says("hi", "yo", "q", "rst")], chat_tokenizer(), longest=12, truncation_side=side)
    assert marked(chat[0][0]) == ("u hi$\n.a " if side == "left" else ".u h$\n.a ") + "[yo$]"
    assert chat[1:] == (0, 1)


def test_the_tokenizers_own_special_tokens_outlive_a_cut():
    """Llama's BOS and T5's EOS; a causal prompt gets no EOS. BOS is not trained; it opens a text or an empty prompt."""
    llama, t5 = with_specials("<bos> $A"), with_specials("$A <eos>")
    rows = [{"prompt": "abcdefghij", "completion": "xy"}, {"prompt": "", "completion": "xy"}, ["ab", "c", "d", "e"]]
    assert lines_of([*rows, "xyz", ""], llama, longest=8) == ["^ghij[xy$]", "^[xy$]", "^ab[c]d[e$]", "^[xyz$]"]
    assert lines_of(rows, llama, longest=8, truncation_side="right")[0] == "^abcd[xy$]"
    assert lines_of(rows, t5, longest=8, seq2seq=True) == ["ghij$>[xy$]", "$>[xy$]", "ab$>[c$]", "abcd$>[e$]"]
    assert lines_of(rows[:1], t5, longest=8, seq2seq=True, truncation_side="right") == ["abcd$>[xy$]"]
    assert lines_of(rows, with_specials("<bos> $A <eos>"), longest=8)[0] == "^ghij[xy$]"
    assert examples_of(rows[:1], with_specials("<bos> $A <eos>"), True, longest=3) == ([], 1, 0), "dropped, not cut"


def test_any_row_with_an_output_trains_a_token_of_it_within_the_window():
    draw = random.Random(0)
    for seq2seq in (False, True):
        for _ in range(40):
            longest, side = draw.randrange(2, 15), draw.choice(["left", "right"])
            rows = [{"prompt": "".join(draw.choices(LETTERS, k=draw.randrange(20))),
                     "completion": "".join(draw.choices(LETTERS, k=draw.randrange(1, 20)))} for _ in range(20)]
            examples, dropped, cut = examples_of(rows, seq2seq=seq2seq, longest=longest, truncation_side=side)
            assert dropped == 0 and len(examples) == 20
            over = 0
            for row, (prompt, output, trained) in zip(rows, examples):
                before, whole = parsed(row["prompt"] or "^")[0], parsed(row["completion"] + "$")[0]
                assert len(prompt) + len(output) <= longest and all(trained) and len(trained) == len(output) > 0
                assert output == whole[: len(output)]
                assert prompt == (before[-len(prompt):] if side == "left" else before[: len(prompt)])
                over += len(before) + len(whole) > longest
                if len(before) + len(whole) <= longest:
                    assert prompt == before and output == whole
                else:
                    assert len(prompt) + len(output) == longest
                    assert len(prompt) >= min(len(before), longest // 2)
                    assert len(output) == len(whole) or len(prompt) <= max(1, longest // 2)
            assert cut == over


def test_dropped_and_cut_rows_are_said_and_logged(model_path, tmp_path, capsys):
    args = sft.Args(model=model_path("gpt2"), output_dir=str(tmp_path / "run"), **{**RUN, "max_length": 8})
    sft.train(args, [["abcdefghijkl", "xyz"], ["q", "a"], ["p", ""], "", "a text of many letters"])
    assert ("5 rows to train on, 0 held out; 2 and 0 have no output and were left out; 2 to train on have more "
            "than 8 tokens and were cut") in capsys.readouterr().out
    start, step = rows_of(tmp_path / "run")
    assert {name: start[name] for name in start if name.startswith("data/")} == {
        "data/rows": 5, "data/held_out": 0, "data/dropped": 2, "data/cut": 2}
    assert step["samples"] == 3 and step["tokens"] == 4 + 2 + 7


def test_data_that_cannot_be_trained_on_is_refused(model_path, tmp_path):
    def train(samples, architecture="gpt2", **flags):
        args = sft.Args(model=model_path(architecture), output_dir=str(tmp_path / "run"), **{**RUN, **flags})
        sft.train(args, samples)

    for samples in (["", ["p", ""], ["p"]], [""]):
        with pytest.raises(UserError, match=f"^--dataset : none of its {len(samples)} rows has an output to train on$"):
            train(samples)
    with pytest.raises(UserError, match="^--dataset, row 1: a text alone is for causal models; an encoder-decoder"):
        train(TEXTS, "t5")
    with pytest.raises(UserError, match="^--packing windows is for texts: use --packing rows"):
        train(PAIRS, packing="windows")
    with pytest.raises(UserError, match="^--max-length 65: the model has 64 positions$"):
        train(PAIRS, max_length=65)
    with pytest.raises(UserError, match="^--dataset: holds no rows"):
        train([])
    for samples, problem in {
            ("ab", 3): "row 2: must be a text, a list of turns or an object with columns, not int 3",
            ("ab", ("p", 1)): "row 2: what is said must be texts, not int 1",
            ((),): "row 1: turns are a list of texts, not list"}.items():
        with pytest.raises(UserError, match=f"^--dataset, {problem}"):
            train(list(samples))
    for row, problem in ((dict(a="b", c="d"), "has no text, prompt and completion, messages or turns, only a, c; "),
                         (dict(prompt="p"), "has no text.* only prompt"), ({}, "has no text.* only nothing"),
                         (dict(messages=["hi"]), "messages are objects with role and content, not list"),
                         (dict(prompt="p", completion=says("a")), "must be texts, not list"),
                         (dict(messages=[{"role": "user", "content": None}]), "must be texts, not NoneType"),
                         (dict(text="p", turns="abc"), "are a list of texts, not str"), (dict(text=["a"]), "not list")):
        with pytest.raises(UserError, match=f"^--dataset, row 1: .*{problem}"):
            train([row])


def test_columns_that_are_empty_are_as_if_missing():
    """Files with a column for each form have None where a row does not use it; prompt and completion come first."""
    blank = dict.fromkeys(("text", "prompt", "completion", "messages", "turns"))
    rows = [{**blank, "text": "ab"}, {**blank, "prompt": "p", "completion": "c"}, {**blank, "turns": ["p", "c"]},
            {**blank, "messages": says("p", "c")}, {"prompt": "p", "completion": "c", "text": "whole"}]
    given = copy.deepcopy(rows)
    assert lines_of(rows, chat_tokenizer()) == ["a[b$]", "p[c$]", "p[c$]", ".u p$\n.a [c$]", "p[c$]"]
    assert rows == given


def test_columns_for_the_metric_function_may_have_any_name():
    """What sft.py does not read of a row is the metric function's, whatever it is called."""
    pair, chat = {"prompt": "p", "completion": "c"}, {"messages": says("p", "c")}
    for seq2seq, lines in ((False, ["p[c$]", ".u p$\n.a [c$]"]), (True, ["p>[c$]", ".u p$\n.a >[c$]"])):
        for row, line in zip((pair, chat), lines):
            for name, value in (("messages", says("x", "y")), ("turns", 3), ("turns", ["x", "y"]), ("first", 7),
                                ("said", [True, True]), ("first", "x"), ("text", "x"), ("prompt_id", 4)):
                if name not in row:
                    assert lines_of([row | {name: value}], chat_tokenizer(), seq2seq=seq2seq) == [line], (line, name)


# --- tokenizers -------------------------------------------------------------------------------------------------------

CORPUS = ["the cat sat on the mat. the dog ate the cat", "why did the cat sit? no one can tell, said the dog\n",
          "User, hi there\nBot, hello\nUser, bye\nBot, bye"]


def metaspace_tokenizer(scheme: str = "first"):
    """BPE on words that begin with a marked space, and a BOS in front: as Llama 2's SentencePiece model."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    newlines = pre_tokenizers.Split("\n", "isolated")  # which are byte tokens in Llama's
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme=scheme), newlines])
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"]))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>",
                                                unk_token="<unk>", clean_up_tokenization_spaces=False)


TOKENIZERS = {
    "char": char_tokenizer, "llama": lambda: with_specials("<bos> $A"), "t5": lambda: with_specials("$A <eos>"),
    "glm": lambda: with_specials("<eos> <bos> $A"), "bart": lambda: with_specials("<bos> $A <eos>"),
    "bert": lambda: with_specials("$A <bos>"),
    "bpe": lambda: bpe_tokenizer(CORPUS, 90), "metaspace": metaspace_tokenizer,
    "metaspace always": lambda: metaspace_tokenizer("always")}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("seq2seq", [False, True])
def test_a_prompt_has_the_same_tokens_in_training_and_in_sampling(kind, seq2seq):
    """Also where prompt and output would be tokenized otherwise together, and where the prompt is cut or empty."""
    tokenizer = TOKENIZERS[kind]()
    tokenizer.chat_template = ("{{ bos_token }}{% for m in messages %}{{ m.role[0] + '\n' + m.content + eos_token }}"
                               "{% endfor %}{% if add_generation_prompt %}a{{ '\n' }}{% endif %}")
    pairs = [("the cat", " sat"), ("the ca", "t sat"), ("why did the d", "og sit"), ("", "the cat"), (" ", "the"),
             ("User, hi there\nBot,", " hello"), ("the cat sat on the mat. the dog", " ate"), ("the cat\n", "no")]
    if kind.startswith(("bpe", "metaspace")):
        assert any(tokenizer(p + c).input_ids[: len(ids := tokenizer(p).input_ids)] != ids for p, c in pairs[:4])
    samples = [*({"prompt": prompt, "completion": output} for prompt, output in pairs),
               {"prompt": says("the ca"), "completion": "t sat"}]
    for longest, side in ((400, "left"), (9, "left"), (9, "right")):
        ends = (tokenizer.eos_token_id,)
        examples, dropped, _ = examples_of(samples, tokenizer, seq2seq, longest, ends, truncation_side=side)
        assert len(examples) == len(samples) and not dropped
        for sample, example in zip(samples, examples):
            (sampled,), _ = encode_prompts([sample], tokenizer, len(example.prompt), side, seq2seq)
            assert example.prompt == sampled
            assert longest == 9 or example.output[-1] == tokenizer.eos_token_id not in example.output[:-1]
            if seq2seq and longest > 9:  # an output of its own, as the decoder writes it
                alone = tokenizer(sample["completion"], add_special_tokens=False).input_ids
                assert example.output == [*alone, tokenizer.eos_token_id]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_turns_joined_are_the_text(kind):
    """No turn loses its leading space, or gets one that it does not have."""
    tokenizer = TOKENIZERS[kind]()
    rows = [["User, hi there\nBot,", " hello", "\nUser, bye\nBot,", " bye"], ["the cat", " sat", " on the mat.", " no"],
            ["the dog", "\n", "the cat"], ["", "the cat"], ["the cat", ""], ["why did"], [], ["", ""]]
    clean = len(rows)  # in the others tokens would reach over the boundaries
    rows += [["the ca", "t sat", " on", " the ma", "t"], list("the cat sat")]
    for number, (turns, pieces) in enumerate(zip(rows, tokenize_turns(rows, tokenizer), strict=True)):
        assert len(pieces) == len(turns)
        assert tokenizer.decode(sum(pieces, [])) == "".join(turns)
        for n in range(1, len(turns) + 1):
            assert tokenizer.decode(sum(pieces[:n], [])) == "".join(turns[:n])
        if turns:
            assert pieces[0] == tokenizer(turns[0], add_special_tokens=False)["input_ids"]
            whole = tokenizer("".join(turns), add_special_tokens=False)["input_ids"]
            if "metaspace" in kind and number < clean:
                assert sum(pieces, []) == whole


def test_an_empty_prompt_needs_a_token_to_start_from():
    """An encoder needs something to read; a causal model reads the output's first token instead."""
    tokenizer = char_tokenizer(bos=False)
    tokenizer.eos_token = None
    assert lines_of([["", "abc"]], tokenizer, ends=()) == ["a[bc]"]
    with pytest.raises(UserError, match="^--dataset, row 2: the prompt is empty, and the tokenizer has no BOS or EOS"):
        lines_of([["a", "b"], ["", "abc"]], tokenizer, ends=(), seq2seq=True)


def test_a_trained_tokenizer_gives_texts_back():
    sizes = []
    for size in (258, 300):
        tokenizer = sft.train_tokenizer(CORPUS, size)
        sizes.append(len(tokenizer))
        for text in ("the cat sat on", " é\t中 \n", ""):
            assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert sizes == [258, 300]
    assert len(tokenizer("the cat").input_ids) < len("the cat")
    assert tokenizer.bos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id is not None
    with pytest.raises(UserError, match="^--train-tokenizer 257: must be at least 258"):
        sft.train_tokenizer(CORPUS, 257)


# --- runs -------------------------------------------------------------------------------------------------------------

WORDS = ["the cat", "dog", "a mouse sat", "no", "some more words", "xyz", "Big Red", "q", "the end", "Not, here", "up",
         "down"]
ROWS = [{"prompt": word, "completion": word[::-1], "number": number} for number, word in enumerate(WORDS)]


def run(tmp_path, model, samples=ROWS, name="run", **flags):
    """The run's folder, after `sft.train` with small settings."""
    options = {name: flags.pop(name) for name in ("metric_fn", "eval_prompts", "held_out_samples") if name in flags}
    sft.train(sft.Args(model=model, output_dir=str(tmp_path / name), **{**RUN, **flags}), samples, **options)
    return tmp_path / name


def recorded(monkeypatch) -> dict[str, list]:
    """What `batch_loss` is called with from now on: examples of each batch, and of each evaluation."""
    calls, batch_loss = {"train": [], "eval": []}, sft.batch_loss

    def record(model, examples, *arguments):
        calls["train" if torch.is_grad_enabled() else "eval"].append([marked(example) for example in examples])
        return batch_loss(model, examples, *arguments)

    monkeypatch.setattr(sft, "batch_loss", record)
    return calls


def test_each_epoch_has_every_row_once_in_another_order_and_held_out_rows_never(model_path, tmp_path, monkeypatch):
    """The rows held out are the same whatever the number of steps."""
    lines, held = lines_of(ROWS), []
    for name, flags in {"long": dict(epochs=3), "short": dict(epochs=2, max_steps=1), "other": dict(seed=2)}.items():
        calls = recorded(monkeypatch)
        run(tmp_path, model_path("gpt2"), name=name, held_out=0.2, **flags)
        monkeypatch.undo()
        assert len(calls["eval"]) == 2 and calls["eval"][0] == calls["eval"][1]
        held.append(calls["eval"][0])
        seen = sum(calls["train"], [])
        if name == "long":
            assert [len(batch) for batch in calls["train"]] == [4] * 6 + [3]
            epochs = [seen[:9], seen[9:18], seen[18:]]
            assert all(sorted(epoch + held[0]) == sorted(lines) for epoch in epochs)
            assert len({tuple(epoch) for epoch in [*epochs, [line for line in lines if line in epochs[0]]]}) == 4
            order = [shuffled(place, 9, 1) for place in range(9)]
            assert [sorted(epochs[0], key=lines.index)[i] for i in order] == epochs[0]
        if name == "short":
            assert seen == epochs[0][:4], "the first batch is that of a longer run"
        assert not set(seen) & set(held[-1])
    assert len(held[0]) == 3 and held[0] == held[1] and held[0] != held[2]
    rows = rows_of(tmp_path / "long")
    assert [row["samples"] for row in rows] == [0, 4, 8, 12, 16, 20, 24, 27]
    assert rows[-1]["epoch"] == 3 and rows[2]["epoch"] == pytest.approx(8 / 9)
    trained = {line: sum(parsed(line)[1]) for line in lines}
    assert rows[-1]["tokens"] == 3 * sum(count for line, count in trained.items() if line not in held[0])


def test_held_out_loss_is_that_of_the_held_out_rows(model_path, tmp_path):
    """Rows of their own, at most num_eval_rows of them spread evenly; one end of training is evaluated always."""
    others = [["p" * n, "q" * n] for n in range(1, 11)]
    folder = run(tmp_path, model_path("gpt2"), held_out_samples=others, num_eval_rows=3, eval_every=2, held_out=0.5)
    rows = rows_of(folder)
    assert rows[0]["data/rows"] == 12 and rows[0]["data/held_out"] == 3
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 2, 3]
    for row, lm in ((rows[0], plain(model_path("gpt2"))), (rows[-1], plain(folder / "model"))):
        loss = brute_force(lm, lines_of([others[0], others[3], others[6]])).item()
        assert row["eval/loss"] == pytest.approx(loss, rel=1e-5)
        assert row["eval/perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


@pytest.mark.parametrize("flags", [dict(), dict(packing="rows"), dict(lora_rank=2)], ids=["whole", "packed", "lora"])
def test_the_best_checkpoint_is_that_of_the_lowest_held_out_loss(flags, model_path, tmp_path):
    """The held-out loss rises from some step on, as training data and held-out data differ."""
    texts = ["ab" * 8] * 12
    folder = run(tmp_path, model_path("gpt2"), texts, held_out_samples=["ab cd cd"], eval_every=1, epochs=4,
                 **{"learning_rate": 1e-2, **flags})
    losses = {row["step"]: row["eval/loss"] for row in rows_of(folder)[1:]}
    least = min(losses, key=losses.get)
    assert losses[12] > losses[least] + 0.1
    best, last = plain(folder / "checkpoints" / "best"), plain(folder / "model")
    (line,) = lines_of(["ab cd cd"])
    assert brute_force(best, [line]).item() == pytest.approx(losses[least], rel=1e-5)
    assert brute_force(last, [line]).item() == pytest.approx(losses[12], rel=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(folder / "checkpoints" / "best")("ab").input_ids == [4, 5]


def same_runs(a: Path, b: Path):
    """Metrics, samples and weights are equal to the last bit."""
    assert [numbers(row) for row in rows_of(a)] == [numbers(row) for row in rows_of(b)]
    assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()
    for folder in ("model", "checkpoints/best"):
        left, right = plain(a / folder).state_dict(), plain(b / folder).state_dict()
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


TINY_GPT2 = dict(model_type="gpt2", n_embd=16, n_layer=2, n_head=2, n_positions=64)


@pytest.fixture(scope="session")
def config_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "mini.json"
    path.write_text(json.dumps(TINY_GPT2))
    return str(path)


@pytest.mark.parametrize("flags", [
    dict(warmup_steps=3), dict(packing="rows", num_layers_unfrozen=1), dict(lora_rank=2),
    dict(model=None, train_tokenizer=270)], ids=["whole", "packed", "lora", "from scratch"])
def test_resume_is_exact(flags, model_path, config_path, tmp_path):
    """Stopped after step 3 and resumed from step 2, in the middle of an epoch of 10 rows; the best of before is kept
    against worse ones after."""
    flags = {"model": model_path("gpt2"), "epochs": 2, "save_every": 2, "keep_checkpoints": 9, "eval_every": 1,
             "num_eval_prompts": 2, "held_out": 0.1, "learning_rate": 1e-2,
             "from_config": None if "model" not in flags else config_path, **flags}
    metric = lambda outputs: {"score": [output.count("e") + torch.rand(()).item() for output in outputs]}  # noqa: E731
    for name, more in {"a": {}, "b": dict(max_steps=3)}.items():
        run(tmp_path, name=name, samples=ROWS[:11], metric_fn=metric, **flags, **more)
    resume = str(tmp_path / "b" / "checkpoints" / "step-2")
    args = sft.Args(**{**RUN, **flags}, resume=resume)
    sft.train(args, ROWS[:11], metric_fn=metric)
    assert len(rows_of(tmp_path / "a")) == 6
    same_runs(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match="is of another run: its --epochs was 2, not 3"):
        sft.train(sft.Args(**{**RUN, **flags, "epochs": 3}, resume=resume), ROWS[:11])


def test_the_best_is_remembered_by_a_resumed_run(model_path, tmp_path):
    """The held-out loss was lowest before the stop, and is worse at each later step."""
    flags = dict(model=model_path("gpt2"), samples=["ab" * 9] * 12, held_out_samples=["Z" * 30], eval_every=1,
                 save_every=1, learning_rate=1e-2, epochs=2)
    a, b = run(tmp_path, name="a", **flags), run(tmp_path, name="b", max_steps=2, **flags)
    run(tmp_path, name="b", resume="auto", **flags)
    losses = [row["eval/loss"] for row in rows_of(a)]
    assert losses[1:] == sorted(losses[1:]) and len(losses) == 7
    same_runs(a, b)


@pytest.mark.parametrize("architecture", ["gpt2", "t5_v1_1"])
def test_lora_exports_load_in_plain_transformers(architecture, model_path, tmp_path):
    """model/ with the adapters merged, and best/; the adapter stands by itself."""
    args = sft.Args(model=model_path(architecture), output_dir=str(tmp_path / "run"), lora_rank=2, lora_alpha=8.0,
                    **{**RUN, "held_out": 0.2, "learning_rate": 1e-2})
    model, _ = sft.train(args, ROWS)
    inputs = dict(input_ids=torch.tensor([[5, 6, 7]]))
    inputs |= dict(decoder_input_ids=torch.tensor([[0, 4]])) if model.config.is_encoder_decoder else {}
    lms = [plain(tmp_path / "run" / folder) for folder in ("model", "checkpoints/best")]
    for lm in lms:
        assert torch.equal(lm(**inputs).logits, model(**inputs).logits)
    assert not torch.equal(plain(args.model)(**inputs).logits, model(**inputs).logits)
    adapter = json.loads((tmp_path / "run" / "model" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (2, 8.0)
    losses = [row["eval/loss"] for row in rows_of(tmp_path / "run") if "eval/loss" in row]
    assert losses[-1] < losses[0]


def test_only_the_top_is_trained(model_path, tmp_path):
    folder = run(tmp_path, model_path("gpt2"), num_layers_unfrozen=1)
    before, after = plain(model_path("gpt2")).state_dict(), plain(folder / "model").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(("transformer.h.2.", "transformer.ln_f."))}


def test_training_lowers_the_loss_and_learns_when_to_stop(model_path, tmp_path):
    """A pair is learned by heart: greedy output is the completion and ends there."""
    folder = run(tmp_path, model_path("gpt2"), [["ab", "cde"], ["x", "yz"]] * 8, epochs=12, learning_rate=1e-2,
                 eval_prompts=["ab", "x"], num_eval_prompts=2, eval_temperature=[0.0], max_new_tokens=8)
    rows = rows_of(folder)
    assert rows[-1]["loss/lm"] < 0.1 < 1 < rows[1]["loss/lm"]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [(sample["prompt"], sample["output"]) for sample in samples[-2:]] == [("ab", "cde"), ("x", "yz")]
    assert rows[-1]["eval/length"] == (4 + 3) / 2


def test_held_out_rows_are_the_evaluation_prompts_and_their_columns_reach_the_metric(chat_path, tmp_path):
    """All before a row's last output; the metric function's numbers are logged, and stand beside the samples."""
    calls = []

    def metric(samples, prompts, outputs, tokenizer, number):
        calls.append((prompts, number, [prompt + output == sample for prompt, output, sample in
                                        zip(prompts, outputs, samples)]))
        return {"sevens": [len(output) % 7 for output in outputs], "constant": 3}

    samples = [["a", "b"], {"turns": ["ab", "c", "de", "f", "g"], "number": 1}, {"prompt": "xyz", "completion": "q",
               "number": 2}, {"messages": says("hi", "yo", "c", "d"), "number": 3}, "only text",
               {"prompt": says("hi"), "completion": "yo", "number": 5}]
    given = copy.deepcopy(samples)
    flags = dict(num_eval_prompts=9, eval_samples=2, eval_temperature=[0.0, 1.0], held_out_samples=samples,
                 metric_fn=metric, max_new_tokens=5)
    folder = run(tmp_path, chat_path("gpt2"), PAIRS, **flags)
    prompts = ["a", "abcde", "xyz", ".u hi\n.a yo\n.u c\n.a ", "only", ".u hi\n.a "]
    assert [call[0] for call in calls] == [[prompt for prompt in prompts for _ in range(2)]] * 4
    assert calls[0][1] == [number for number in (None, 1, 2, 3, None, 5) for _ in range(2)]
    assert all(all(call[2]) for call in calls) and samples == given
    rows = rows_of(folder)
    for row in (rows[0], rows[-1]):
        assert {name for name in row if name.startswith("eval/")} == {
            "eval/loss", "eval/perplexity", *(f"eval/{name}@temperature={value}" for value in (0, 1)
                                              for name in ("sevens", "constant", "length"))}
        assert row["eval/constant@temperature=1"] == 3
    found = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(found) == 2 * 2 * 12 and set(found[0]) == {"step", "option", "prompt", "output", "sevens", "length"}
    first = [sample["sevens"] for sample in found if sample["step"] == 0 and sample["option"] == "@temperature=1"]
    assert rows[0]["eval/sevens@temperature=1"] == pytest.approx(sum(first) / 12)


def test_evaluation_prompts_of_texts_and_given_ones(model_path, tmp_path):
    """Texts have their first words, at most half of them; given prompts win, at most num_eval_prompts of them, in
    prompt_words words; 0 means none."""
    prompts = {"texts": ["a", "Some longer"], "given": ["one two", "five six"], "none": None}
    flags = {"texts": {}, "given": dict(eval_prompts=[{"prompt": "one two three"}, "four", "five six seven", "no"],
                                        num_eval_prompts=2, prompt_words=2), "none": dict(num_eval_prompts=0)}
    for name, expected in prompts.items():
        seen = []
        run(tmp_path, model_path("gpt2"), TEXTS, name=name, metric_fn=lambda prompts: seen.append(prompts) or {},
            **{"num_eval_prompts": 9, "held_out": 0.2, **flags[name]})
        assert seen == ([expected] * 2 if expected else [])
    seen = []
    run(tmp_path, model_path("gpt2"), TEXTS, name="words", metric_fn=lambda prompts: seen.append(prompts) or {},
        num_eval_prompts=9, prompt_words=5, held_out_samples=["a b c d e f g h i j k l", "a b c d"])
    assert seen[0] == ["a b c d e", "a b"]


@pytest.mark.parametrize("architecture,side", [("gpt2", "left"), ("t5", "right")])
def test_evaluation_samples_are_those_of_transformers(architecture, side, tmp_path):
    """Greedy, and from the likeliest token alone: prompts have the tokenizer's special tokens and are cut on the chosen
    side to leave room for the output, which ends where a stop sequence begins."""
    lm, tokenizer, model = tiny_lm(architecture), with_specials("<bos> $A <eos>"), str(tmp_path / "model")
    lm.save_pretrained(model)
    tokenizer.save_pretrained(model)
    expected, tail = [], "$" if lm.config.is_encoder_decoder else ""
    for prompt in ("ab", "abcdefghijklmnopqr"):
        kept = prompt if len(prompt) < 8 else prompt[-7 + len(tail):] if side == "left" else prompt[: 7 - len(tail)]
        ids = torch.tensor([parsed(f"^{kept}{tail}")[0]])
        output = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)[0]
        output = tokenizer.decode(output[1 if tail else ids.shape[1]:], skip_special_tokens=True)
        expected.append((kept, output))
    letter = expected[1][1][1]
    greedy = dict(eval_temperature=[0.0])
    for name, flags in {"greedy": greedy, "likeliest": dict(eval_top_k=[1]), "nucleus": dict(eval_top_p=[1e-6]),
                        "stopped": dict(**greedy, stop=[letter])}.items():
        folder = run(tmp_path, model, PAIRS, name, num_eval_prompts=2, max_length=12, truncation_side=side, max_steps=1,
                     eval_prompts=["ab", "abcdefghijklmnopqr"], **flags)
        found = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        found = [(sample["prompt"], sample["output"]) for sample in found if sample["step"] == 0]
        assert found == [(prompt, output.split(letter)[0] if "stop" in flags else output)
                         for prompt, output in expected]


def test_what_saves_memory_or_time_changes_no_number(model_path, tmp_path, monkeypatch):
    calls, checkpoint_blocks = [], sft.checkpoint_blocks
    monkeypatch.setattr(sft, "checkpoint_blocks", lambda lm: calls.append(lm) or checkpoint_blocks(lm))
    more = dict(held_out=0.2, num_eval_prompts=3, eval_temperature=[0.0], eval_every=2)
    one = rows_of(run(tmp_path, model_path("llama"), **more))
    for flags in (dict(gradient_checkpointing=True), dict(keep_sharded=True), dict(offload=True), dict(packing="rows"),
                  dict(micro_batch_size=1, generation_batch_size=1), dict(dtype="bfloat16")):
        other, near = run(tmp_path, model_path("llama"), name=str(flags), **more, **flags), "dtype" in flags
        for row, same in zip(one, rows_of(other), strict=True):
            for name in numbers(row):
                if not (near and name == "eval/length"):
                    assert same[name] == pytest.approx(row[name], rel=0.05 if near else 1e-4), (flags, name)
    assert len(calls) == 1


def test_a_metric_called_loss_is_not_the_held_out_loss(model_path, tmp_path):
    folder = run(tmp_path, model_path("gpt2"), PAIRS, held_out=0.3, num_eval_prompts=1,
                 metric_fn=lambda outputs: {"loss": -1.0, "perplexity": -1.0})
    assert all(row["eval/loss"] > 0 and row["eval/perplexity"] > 0 for row in rows_of(folder))


def test_metric_functions_may_return_arrays_and_must_return_numbers():
    import numpy as np

    given = {"a": np.array([1.0, 2.0]), "b": torch.tensor([1, 2]), "c": [np.float32(1), np.int64(2)], "e": (1, 2),
             "d": np.float64(3), "f": True}
    assert check_metrics(given, 2) == {"a": [1, 2], "b": [1, 2], "c": [1, 2], "d": 3, "e": [1, 2], "f": True}
    assert check_metrics([1.0, 2.0], 2) == check_metrics(np.array([1.0, 2.0]), 2) == {"reward": [1.0, 2.0]}
    for wrong in (None, [1.0], {"a": [1.0]}, {"a": "text"}, {"a": [1.0, "x"]}, {"a": None}):
        with pytest.raises(UserError, match="^the metric function returned"):
            check_metrics(wrong, 2)


def test_tracking_needs_no_samples(model_path, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run(tmp_path, model_path("gpt2"), PAIRS, num_eval_prompts=0, track=True)


def test_held_out_rows_are_no_more_than_are_used(model_path, tmp_path):
    """The others are trained on."""
    folder = run(tmp_path, model_path("gpt2"), ["ab"] * 20, held_out=0.5, num_eval_rows=3, num_eval_prompts=0)
    start = rows_of(folder)[0]
    assert start["data/rows"] == 17 and start["data/held_out"] == 3


def test_data_that_has_changed_is_not_resumed(model_path, tmp_path):
    flags = dict(model=model_path("gpt2"), num_eval_prompts=0, batch_size=2, epochs=2, save_every=1)
    run(tmp_path, samples=["ab", "cd", "ef"], max_steps=1, **flags)
    with pytest.raises(UserError, match="^--resume .*step-1: the data has changed since"):
        run(tmp_path, samples=["ab", "cd", "eg"], resume="auto", **flags)
    run(tmp_path, samples=["ab", "cd", "ef"], resume="auto", **flags)


def test_tables_of_other_libraries_are_refused(model_path, tmp_path):
    """Iterating over a data frame gives the names of its columns."""
    pandas = pytest.importorskip("pandas")
    with pytest.raises(UserError, match="^--dataset: is not a list of rows"):
        run(tmp_path, model_path("gpt2"), pandas.DataFrame({"text": ["ab", "cd"]}))


def test_a_format_function_that_fails_names_the_row(model_path, tmp_path):
    (tmp_path / "mine.py").write_text("def format(row):\n    return {'text': row['missing']}\n")
    with pytest.raises(UserError, match="^--dataset, row 1: the --format function raised KeyError: 'missing'$"):
        run(tmp_path, model_path("gpt2"), [{"text": "ab"}], format=f"{tmp_path}/mine.py:format")


@pytest.mark.parametrize("settings,problem", [
    (dict(TINY_GPT2, n_layr=3), "a gpt2 has no setting n_layr; did you mean n_layer"),
    (dict(TINY_GPT2, n_layer="4"), "holds nothing that transformers can use"),
    (dict(n_layer=4), "holds nothing that transformers can use"), (dict(model_type="gpt9"), "holds nothing")])
def test_a_wrong_setting_in_a_config_is_named_before_a_tokenizer_is_trained(settings, problem, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"^--from-config .*c.json: .*{problem}") as caught:
        run(tmp_path, None, CORPUS, from_config=str(tmp_path / "c.json"), train_tokenizer=270)
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "tokenizer").exists()


def test_metrics_may_come_and_go(model_path, tmp_path):
    """A metric function that has a number to give only at times."""
    names = iter("abcd")
    folder = run(tmp_path, model_path("gpt2"), PAIRS, num_eval_prompts=1, metric_fn=lambda outputs: {next(names): 1.0})
    assert "eval/a" in rows_of(folder)[0] and "eval/b" in rows_of(folder)[1]


def test_a_classifier_measures_score(monkeypatch, model_path, tmp_path):
    def load(path, flag, device, batch_size):
        assert (path, flag) == ("some/classifier", "--metric")
        return lambda samples: [len(sample) / 10 for sample in samples]

    monkeypatch.setattr("common.generation.load_classifier", load)
    folder = run(tmp_path, model_path("gpt2"), PAIRS, num_eval_prompts=2, metric="some/classifier")
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert samples and all(sample["score"] == len(sample["prompt"] + sample["output"]) / 10 for sample in samples)


USERS = """
import json

def shout(row):
    return None if row["skip"] else {"prompt": row["q"], "completion": row["a"] + "!", "q": row["q"]}

def nothing(row):
    return None

def capitals(outputs, q):
    return {"capitals": [sum(map(str.isupper, output)) for output in outputs], "given": len("".join(q))}

def wrong(outputs):
    return [0.0]
"""


def test_files_format_and_metric_functions(model_path, tmp_path, monkeypatch):
    """--dataset, --eval-dataset, --format, which may leave rows out, --metric, --eval-prompts: all from files."""
    (tmp_path / "users.py").write_text(USERS)
    rows = [{"q": "x" * n, "a": "y", "skip": n % 3 == 0} for n in range(1, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held.json").write_text(json.dumps(rows[:4]))
    flags = dict(samples=None, dataset=str(tmp_path / "rows.jsonl"), eval_dataset=str(tmp_path / "held.json"),
                 format=f"{tmp_path}/users.py:shout", metric=f"{tmp_path}/users.py:capitals", num_eval_prompts=2)
    calls = recorded(monkeypatch)
    found = rows_of(run(tmp_path, model_path("gpt2"), **flags))
    assert sorted(sum(calls["train"], [])) == sorted(f"{'x' * n}[y!$]" for n in (1, 2, 4, 5, 7, 8))
    assert calls["eval"] == [[f"{'x' * n}[y!$]" for n in (1, 2, 4)]] * 2
    assert "eval/capitals" in found[0] and found[-1]["eval/given"] == len("x" + "xx")
    for flag, path, problem in [
            ("format", "users.py:nothing", "^--dataset .*rows.jsonl: --format left out every row$"),
            ("format", "users.py:none", "^--format .*users.py:none: .* has no attribute 'none'"),
            ("metric", "nowhere.py:fn", "^--metric .*nowhere.py"),
            ("eval_dataset", "none.csv", "^--eval-dataset .*none.csv: no such file$"),
            ("metric", "users.py:wrong", "^the metric function returned list .* as 'reward' of 2 samples")]:
        with pytest.raises(UserError, match=problem):
            run(tmp_path, model_path("gpt2"), name="wrong", **{**flags, flag: f"{tmp_path}/{path}"})


def test_an_eval_dataset_without_outputs_is_refused(model_path, tmp_path):
    (tmp_path / "held.json").write_text(json.dumps([{"text": ""}]))
    with pytest.raises(UserError, match="^--eval-dataset .*held.json: none of its 1 rows has an output$"):
        run(tmp_path, model_path("gpt2"), eval_dataset=str(tmp_path / "held.json"))


def test_a_gradient_that_is_not_finite_stops_with_the_batch_saved(model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "lm_loss", lambda logprobs, weight: logprobs.sum() * float("nan"))
    with pytest.raises(UserError, match="^step 0: the gradient is nan; its batch and .*/nonfinite-step-0, "):
        run(tmp_path, model_path("gpt2"))
    saved = torch.load(tmp_path / "run" / "nonfinite-step-0" / "batch.pt", weights_only=True)
    lines = [marked(sft.Example(*example)) for example in saved["examples"]]
    assert lines == [lines_of(ROWS)[shuffled(place, len(ROWS), 1)] for place in range(4)]
    assert len(rows_of(tmp_path / "run")) == 1 and not (tmp_path / "run" / "model").exists()


def test_learning_rates():
    rate = lambda step, schedule: sft.learning_rate_at(step, 12, 2.0, 2, schedule)  # noqa: E731
    for schedule, values in {"constant": (2, 2, 2), "linear": (2, 1, 0.2), "cosine": (2, 1, 0.0489)}.items():
        assert [rate(step, schedule) for step in (0, 1)] == [1, 2]
        assert [rate(step, schedule) for step in (2, 7, 11)] == pytest.approx(values, rel=1e-3)
    assert sft.learning_rate_at(0, 10, 2.0, 0, "cosine") == 2


def test_a_run_stopped_early_has_the_learning_rates_of_the_whole(model_path, tmp_path):
    folder = run(tmp_path, model_path("gpt2"), schedule="linear", warmup_steps=1, max_steps=2, epochs=2)
    assert [row["optim/learning_rate"] for row in rows_of(folder)[1:]] == pytest.approx([1e-3, 1e-3])
    folder = run(tmp_path, model_path("gpt2"), schedule="linear", max_steps=2, epochs=2, name="more")
    assert [row["optim/learning_rate"] for row in rows_of(folder)[1:]] == pytest.approx([1e-3, 1e-3 * 5 / 6])


# --- from scratch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "t5", "bart"])
def test_from_scratch_by_a_config_file(kind, tmp_path):
    """Vocabulary and special tokens are those of the tokenizer that the data train; a seed is a model."""
    sizes = dict(gpt2=TINY_GPT2, t5=dict(model_type="t5", d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2),
                 bart=dict(model_type="bart", d_model=16, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=16,
                           encoder_attention_heads=2, decoder_attention_heads=2, decoder_ffn_dim=16))
    (tmp_path / "config.json").write_text(json.dumps(sizes[kind]))
    samples = [{"prompt": text, "completion": text[::-1] + "é"} for text in CORPUS]
    flags = dict(from_config=str(tmp_path / "config.json"), train_tokenizer=280, num_eval_prompts=2, epochs=3,
                 learning_rate=1e-2, max_length=64)
    folder = run(tmp_path, None, samples, **flags)
    lm, tokenizer = plain(folder / "model"), transformers.AutoTokenizer.from_pretrained(folder / "model")
    assert len(tokenizer) == 280 == lm.config.vocab_size == len(lm.get_input_embeddings().weight)
    assert tokenizer.decode(tokenizer("é the cat").input_ids) == "é the cat"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(lm.config, name) == getattr(tokenizer, name) is not None
    if lm.config.is_encoder_decoder:
        assert lm.config.decoder_start_token_id == tokenizer.pad_token_id
    rows = rows_of(folder)
    assert rows[-1]["loss/lm"] < rows[1]["loss/lm"] < math.log(280) + 1
    first = {seed: new_lm(flags["from_config"], tokenizer, seed).state_dict() for seed in (1, 2)}
    again = new_lm(flags["from_config"], tokenizer, 1).state_dict()
    assert all(torch.equal(first[1][name], again[name]) for name in again)
    assert not all(torch.equal(first[1][name], first[2][name]) for name in again)
    assert not any(module.training for module in new_lm(flags["from_config"], tokenizer, 1).modules()), "dropout"


def test_from_scratch_in_the_shape_of_a_model(model_path, tmp_path):
    """With its tokenizer; none of its weights, and as it was when it was new: eval mode, small weights."""
    for architecture in ("llama", "t5"):
        folder = run(tmp_path, None, PAIRS, name=architecture, from_config=model_path(architecture), learning_rate=1e-9)
        lm, shape = plain(folder / "model"), plain(model_path(architecture))
        assert {n: p.shape for n, p in lm.named_parameters()} == {n: p.shape for n, p in shape.named_parameters()}
        assert len(lm.get_input_embeddings().weight) == len(char_tokenizer()) == VOCABULARY
        fresh = new_lm(model_path(architecture), char_tokenizer(), 1)
        for name, weight in lm.named_parameters():
            assert (weight - fresh.state_dict()[name]).abs().max() < 1e-6, name


def test_another_tokenizer_gives_the_vocabulary(model_path, tmp_path):
    tokenizer = bpe_tokenizer(CORPUS, 70)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    folder = run(tmp_path, None, CORPUS, from_config=model_path("llama"), tokenizer=str(tmp_path / "tokenizer"))
    lm = plain(folder / "model")
    assert lm.config.vocab_size == len(lm.get_input_embeddings().weight) == len(tokenizer) == 70
    with pytest.raises(UserError, match="the tokenizer has 70 tokens and .* embeds fewer: give its own --tokenizer"):
        run(tmp_path, model_path("llama"), CORPUS, tokenizer=str(tmp_path / "tokenizer"), name="other")


def test_a_trained_tokenizer_is_that_of_the_flags(config_path, tmp_path):
    """Also where an earlier try in the same folder stopped at a mistake."""
    flags = dict(samples=CORPUS, from_config=config_path, num_eval_prompts=1)
    with pytest.raises(UserError, match="^--eval-prompts: holds no rows"):
        run(tmp_path, None, **flags, train_tokenizer=270, eval_prompts=[])
    folder = run(tmp_path, None, **flags, train_tokenizer=280)
    assert len(transformers.AutoTokenizer.from_pretrained(folder / "model")) == 280


def test_a_config_that_cannot_be_used_is_one_line(tmp_path):
    for text in ("{", "[]", '{"n_embd": 8}', '{"model_type": "none"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="^--from-config .*config.json: [^\n]*$"):
            run(tmp_path, None, CORPUS, from_config=str(tmp_path / "config.json"), train_tokenizer=258)


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags,problem", [
    (dict(model="m", from_config="c"), "--from-config c: leave it out, or --model m"),
    (dict(model="m", dataset=None), "--model m needs a --dataset"),
    (dict(from_config="c.json", dataset=None), "--from-config c.json needs a --dataset"),
    (dict(dataset="rows.jsonl"), "--dataset rows.jsonl needs a --model, or --from-config"),
    (dict(model="m", train_tokenizer=300), "--train-tokenizer is for --from-config"),
    (dict(from_config="c", tokenizer="t", train_tokenizer=300), "--train-tokenizer is for --from-config"),
    (dict(train_tokenizer=300, dataset=None), "--train-tokenizer is for --from-config"),
    (dict(from_config="c.json", train_tokenizer=300, dataset="randomwalks"), "--train-tokenizer"),
    (dict(from_config="c.json"), "--from-config c.json needs a --tokenizer, or --train-tokenizer"),
    (dict(from_config="c", lora_rank=2), "--lora-rank and --num-layers-unfrozen need a --model"),
    (dict(dataset=None, num_layers_unfrozen=1), "--lora-rank and --num-layers-unfrozen need a --model"),
    (dict(model="m", num_layers_unfrozen=1, lora_rank=2), "--num-layers-unfrozen: leave it out, --lora-rank"),
    (dict(model="m", num_layers_unfrozen=0), "--num-layers-unfrozen 0: must be -1 for all, or at least 1"),
    (dict(model="m", max_length=1), "--max-length 1: must be at least 2"),
    (dict(model="m", eval_temperature=[-1.0]), "--eval-temperature -1.0: has a value that means nothing"),
    (dict(model="m", eval_temperature=[]), "--eval-temperature : has a value"),
    (dict(model="m", eval_top_p=[0.0]), "--eval-top-p 0.0: has a value"),
    (dict(model="m", stop=[""]), "--stop '': has a value"),
    (dict(model="m", held_out=1.5), "--held-out 1.5: must be from 0 to 1"),
    (dict(model="m", held_out=math.nan), "--held-out nan: must be from 0 to 1"),
    (dict(model="m", adam_beta1=-0.1), "--adam-beta1 -0.1: must be from 0 to 1"),
    (dict(model="m", learning_rate=math.inf), "--learning-rate inf: must be more than 0"),
    *[(dict(model="m", **{name: 0}), f"--{name.replace('_', '-')} 0: must be more than 0") for name in (
        "epochs", "batch_size", "micro_batch_size", "max_steps", "learning_rate", "adam_epsilon", "max_grad_norm",
        "max_new_tokens", "generation_batch_size", "eval_every", "eval_samples", "prompt_words", "num_eval_rows",
        "keep_checkpoints", "shard_size")],
    *[(dict(model="m", **{name: -1}), f"--{name.replace('_', '-')} -1: must be 0 or more") for name in (
        "seed", "warmup_steps", "save_every", "weight_decay", "lora_rank", "num_eval_prompts")]])
def test_settings_that_cannot_work_are_refused(flags, problem):
    with pytest.raises(UserError, match="^" + re.escape(problem)) as error:
        sft.check(sft.Args(**{"dataset": "rows.jsonl", **flags}))
    assert "\n" not in str(error.value)


def test_settings_that_work_are_let_through():
    for flags in (dict(), dict(dataset="randomwalks"), dict(model="m", dataset="rows.jsonl", lora_rank=2),
                  dict(model="m", dataset="randomwalks"), dict(from_config="c", dataset="rows.jsonl"),
                  dict(from_config="c.json", dataset="rows.jsonl", train_tokenizer=300, held_out=0.0),
                  dict(from_config="c.json", dataset="rows.jsonl", tokenizer="t", num_eval_prompts=0),
                  dict(from_config="c.json", dataset="randomwalks")):
        sft.check(sft.Args(**flags))
    sft.check(sft.Args(model="m"), samples=TEXTS)
    with pytest.raises(UserError, match="^--dataset .*needs a --model"):
        sft.check(sft.Args(), samples=TEXTS)


def test_arguments_have_the_tasks_defaults():
    assert sft.arguments().max_length == sft.RANDOM_WALKS["max_length"] == 32
    assert sft.arguments(epochs=3).epochs == 3 and sft.arguments(dataset="randomwalks", model="m").batch_size == 50
    assert sft.arguments(model="m", dataset="f.jsonl") == sft.Args(model="m", dataset="f.jsonl")
    assert parse(sft.Args, sft.preset, ["--epochs", "2"]) == sft.arguments(epochs=2)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """Random walks for two steps, by the command alone."""
    folder = tmp_path_factory.mktemp("walks") / "run"
    done = run_forked("sft.py", "--max-steps", "2", "--eval-samples", "2", "--output-dir", str(folder))
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_command_alone_shows_tables_and_final_lines(walked):
    folder, done = walked
    lines = done.stdout.splitlines()
    assert lines[0] == "950 rows to train on, 50 held out"
    assert "before training" in lines and "after training" in lines
    assert re.fullmatch(r"loss \d\.\d{3} -> \d\.\d{3}; perplexity .*; invalid .*\d", lines[-3])
    assert re.fullmatch("model in .*/model", lines[-2])
    assert re.fullmatch(r"share of valid paths, over edges that exist to the goal: \d\.\d{3}; of the walks it learned "
                        r"from: 0\.\d{3}", lines[-1])
    assert done.stderr == "" and max(map(len, lines[:-2])) <= 140
    rows = rows_of(folder)
    assert [row["samples"] for row in rows] == [0, 50, 100] and rows[2]["eval/loss"] < rows[0]["eval/loss"]
    assert set().union(*rows) == documented_metrics("sft.py") - {"eval/score"}


def test_ppo_starts_from_what_it_trained(walked, tmp_path):
    folder, _ = walked
    words = ["--model", str(folder / "model"), "--reward", "randomwalks", "--max-steps", "1", "--eval-samples", "2",
             "--rollout-batch-size", "8", "--batch-size", "8", "--ppo-epochs", "1",
             "--output-dir", str(tmp_path / "ppo")]
    ppo.train(parse(ppo.Args, ppo.preset, words))
    start, step = rows_of(tmp_path / "ppo")
    assert start["eval/optimality"] == pytest.approx(rows_of(folder)[-1]["eval/optimality"], abs=1e-6)
    assert step["rollout/sampler_gap"] < 1e-4


def test_two_processes_give_the_numbers_of_one(walked, tmp_path):
    done = run_forked("sft.py", "--max-steps", "2", "--eval-samples", "2", "--output-dir", str(tmp_path / "two"),
                      "--packing", "rows", processes=2)
    assert done.returncode == 0, done.stderr
    one, two = rows_of(walked[0]), rows_of(tmp_path / "two")
    assert numbers(two[0]) == pytest.approx(numbers(one[0]), rel=1e-5)
    for row, other in zip(one[1:], two[1:], strict=True):
        for name in numbers(row):
            if "eval" not in name or "loss" in name:
                assert other[name] == pytest.approx(row[name], rel=1e-3 if row is one[2] else 1e-5), name
    assert "packing: rows share lines of 32 tokens" in done.stdout and done.stdout.count("after training") == 1
    plain(tmp_path / "two" / "model")


def test_a_mistake_is_one_line_and_exit_code_2():
    done = run_forked("sft.py", "--learning-rates", "1")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "sft.py: error: unknown flag --learning-rates; did you mean --learning-rate?\n"

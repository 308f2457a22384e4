"""dpo.py against plain Python and plain transformers on single, unpadded rows, and as its users run it.

Outputs are written as texts, a character a token: $ is EOS, ^ is BOS, and what stands in parentheses is not trained.
"""

import contextlib
import copy
import json
import math
import os
import random
import re
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import CONFIGS, ROOT, bpe_tokenizer, char_tokenizer, documented_metrics, run_forked, tiny_lm
from safetensors.torch import load_file
from tokenizers import processors

import dpo
from common.cli import UserError, parse
from common.data import chat_ids, encode_prompts, shuffled
from common.distributed import init
from common.models import LanguageModel, collate_branches, shares_exactly
from common.randomwalks import LETTERS as NODES
from common.randomwalks import random_walks
from common.samples import Example

LETTERS = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!|\n"  # ids from 3 on; 0 is pad
BOS, EOS = 1, 2
CPU = torch.device("cpu")
AUTO = {True: transformers.AutoModelForSeq2SeqLM, False: transformers.AutoModelForCausalLM}


def parsed(text: str) -> tuple[list[int], list[bool]]:
    """Token ids of a text, and which are trained."""
    ids, trained, said = [], [], True
    for character in text:
        if character in "()":
            said = character == ")"
        else:
            ids.append({"^": BOS, "$": EOS}.get(character) or 3 + LETTERS.index(character))
            trained.append(said)
    return ids, trained


def written(ids, trained=None) -> str:
    """The text of token ids."""
    text, last = "", True
    for token, said in zip(ids, trained or [True] * len(ids), strict=True):
        text += "" if bool(said) == last else "()"[last := bool(said)]
        text += ("?^$" + LETTERS)[token]
    return text + ("" if last else ")")


def pair(prompt: str, chosen: str, rejected: str) -> dpo.Pair:
    (chosen, chosen_trained), (rejected, rejected_trained) = parsed(chosen), parsed(rejected)
    return dpo.Pair(parsed(prompt)[0], chosen, rejected, bytes(chosen_trained), bytes(rejected_trained))


def texts(found: dpo.Pair) -> tuple[str, str, str]:
    return (written(found.prompt), written(found.chosen, found.chosen_trained),
            written(found.rejected, found.rejected_trained))


def brute_sums(lm, pairs) -> torch.Tensor:
    """Summed log-probs (M, 2) of chosen and rejected, by transformers alone, one unpadded row at a time."""
    sums = []
    for found in pairs:
        for output, trained in ((found.chosen, found.chosen_trained), (found.rejected, found.rejected_trained)):
            prompt, output = list(found.prompt), list(output)
            if lm.config.is_encoder_decoder:
                start = [lm.config.decoder_start_token_id]
                logits = lm(input_ids=torch.tensor([prompt]),
                            decoder_input_ids=torch.tensor([start + output[:-1]])).logits[0]
            else:
                logits = lm(input_ids=torch.tensor([prompt + output])).logits[0, len(prompt) - 1 :]
            logprobs = logits.double().log_softmax(-1)
            sums.append(sum(logprobs[place, token] for place, token in enumerate(output) if trained[place]))
    return torch.stack(sums).view(-1, 2)


def softplus(x: float) -> float:
    """log(1 + e^x)."""
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


def plain_loss(args, chosen, rejected, ref_chosen, ref_rejected) -> float:
    """The loss of a pair in plain Python, as the papers write it."""
    if args.loss == "simpo":
        return softplus(-(args.beta * chosen - args.beta * rejected - args.simpo_gamma))
    margin = args.beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    right, wrong, e = softplus(-margin), softplus(margin), args.label_smoothing
    return {"sigmoid": (1 - e) * right + e * wrong,
            "robust": ((1 - e) * right - e * wrong) / (1 - 2 * e),
            "ipo": (margin / args.beta - 1 / (2 * args.beta)) ** 2,
            "hinge": max(0.0, 1 - margin)}[args.loss]


def by_hand(args, sums, ref_sums, lengths, weights=None) -> dict[str, float]:
    """All that is logged of pairs, by plain Python: means, or sums with weights."""
    means = {"sum": False, "mean": True, "auto": args.loss in ("ipo", "simpo")}[args.logprobs]
    totals = {}
    for row, weight in enumerate(weights or [1 / len(sums)] * len(sums)):
        (c, r), (rc, rr), (nc, nr) = sums[row], ref_sums[row], lengths[row]
        used = (c / nc, r / nr, rc / nc, rr / nr) if means else (c, r, rc, rr)
        rewards = args.beta * (used[0] - used[2]), args.beta * (used[1] - used[3])
        preference = plain_loss(args, *used)
        parts = {"loss": preference - args.sft_coef * c / nc, "preference_loss": preference, "sft_loss": -c / nc,
                 "accuracy": 1.0 if rewards[0] > rewards[1] else 0.5 if rewards[0] == rewards[1] else 0.0,
                 "margin": rewards[0] - rewards[1], "chosen_reward": rewards[0], "rejected_reward": rewards[1],
                 "chosen_logprob": c, "rejected_logprob": r, "kl": ((rc - c) + (rr - r)) / 2,
                 "gap": (abs(rc - c) + abs(rr - r)) / 2}
        if args.loss == "simpo":
            del parts["kl"], parts["gap"]
        totals = {name: totals.get(name, 0.0) + weight * value for name, value in parts.items()}
    return totals


def says(*contents: str, first: str = "user") -> list[dict]:
    """Messages of user and assistant in turn."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


CHATML = ("{% for m in messages %}.{{ m.role[0] }} {{ m.content }}<eos>{{ '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}.a {% endif %}")


def chat_tokenizer(template: str = CHATML):
    tokenizer = char_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def with_specials(template: str):
    """The character tokenizer with special tokens added as `template` says, such as "<bos> $A"."""
    tokenizer = char_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", BOS), ("<eos>", EOS)])
    return tokenizer


def made(rows, tokenizer=None, seq2seq=False, longest=200, side="left", ends=(EOS,), **flags):
    """`make_pairs` of what a user gives: pairs and counts."""
    rows, args = dpo.load_pairs(rows, None, "--dataset", None), dpo.Args(truncation_side=side, **flags)
    return dpo.make_pairs(rows, tokenizer or chat_tokenizer(), ends, seq2seq, longest, args)


def made_texts(rows, *arguments, **options) -> list[tuple[str, str, str]]:
    return [texts(found) for found in made(rows, *arguments, **options)[0]]


# --- losses -----------------------------------------------------------------------------------------------------------

LOSSES = [dict(loss="sigmoid"), dict(loss="sigmoid", label_smoothing=0.2), dict(loss="robust"),
          dict(loss="robust", label_smoothing=0.3), dict(loss="ipo", beta=0.3), dict(loss="hinge"),
          dict(loss="simpo", beta=2.5, simpo_gamma=1.4), dict(loss="simpo", simpo_gamma=0.0)]
VALUES = [(-3.0, -4.0, -3.5, -3.75), (-9.0, -2.0, -3.0, -4.0), (-1.0, -1.0, -1.0, -1.0), (-5.0, -6.0, -6.0, -7.0),
          (-2.0, -900.0, -800.0, -3.0), (-900.0, -2.0, -3.0, -800.0), (-1e5, -1.0, -1.0, -1e5),
          (-1.0, -1e5, -1e5, -1.0)]


def float64(rows, gradient=False) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64, requires_grad=gradient)


def columns(rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Policy and reference (M, 2) of rows of VALUES."""
    return float64([row[:2] for row in rows], True), float64([row[2:] for row in rows])


@pytest.mark.parametrize("flags", LOSSES, ids=str)
def test_each_loss_is_that_of_plain_python(flags):
    args = dpo.Args(**{"beta": 0.7, **flags})
    policy, reference = columns(VALUES)
    found = dpo.preference_loss(policy, reference, args)
    assert found.tolist() == pytest.approx([plain_loss(args, *row) for row in VALUES], rel=1e-9)
    found.sum().backward()
    assert policy.grad.isfinite().all()
    if args.loss == "simpo":
        assert torch.equal(found, dpo.preference_loss(policy, reference * 7, args)), "it has no reference"


def test_losses_by_their_own_names():
    """Argument by argument: chosen, rejected and their references are where the signature says."""
    row = (-3.0, -5.0, -4.0, -4.5)
    tensors = [float64([value]) for value in row]
    for function, flags, more in (
            (dpo.dpo_loss, dict(), ()), (dpo.dpo_loss, dict(label_smoothing=0.1), (0.1,)),
            (dpo.robust_loss, dict(loss="robust", label_smoothing=0.1), (0.1,)),
            (dpo.ipo_loss, dict(loss="ipo"), ()), (dpo.hinge_loss, dict(loss="hinge"), ())):
        expected = plain_loss(dpo.Args(beta=0.7, **flags), *row)
        assert function(*tensors, 0.7, *more).item() == pytest.approx(expected, rel=1e-9)
    expected = plain_loss(dpo.Args(beta=0.7, loss="simpo", simpo_gamma=0.4), *row)
    assert dpo.simpo_loss(*tensors[:2], 0.7, 0.4).item() == pytest.approx(expected, rel=1e-9)
    assert dpo.implicit_reward(tensors[0], tensors[2], 0.7).item() == pytest.approx(0.7)


def test_equal_policy_and_reference_give_log_2():
    policy = float64([[-3.0, -50.0], [-1.0, -1.0]])
    for flags, value in ((dict(), math.log(2)), (dict(label_smoothing=0.4), math.log(2)),
                         (dict(loss="robust", label_smoothing=0.4), math.log(2)),
                         (dict(loss="hinge"), 1), (dict(loss="ipo", beta=0.25), 4)):
        assert dpo.preference_loss(policy, policy, dpo.Args(**flags)).tolist() == pytest.approx([value] * 2)


def test_robust_loss_is_unbiased_for_choices_that_flip():
    """E over flips with probability e of the robust loss is DPO's on the true choice; cDPO's is another mean."""
    c, r, rc, rr = (float64([value]) for value in (-3.0, -5.0, -4.0, -4.5))
    for e in (0.1, 0.4):
        mean = (1 - e) * dpo.robust_loss(c, r, rc, rr, 0.7, e) + e * dpo.robust_loss(r, c, rr, rc, 0.7, e)
        assert mean.item() == pytest.approx(dpo.dpo_loss(c, r, rc, rr, 0.7).item(), rel=1e-9)
        mean = (1 - e) * dpo.dpo_loss(c, r, rc, rr, 0.7) + e * dpo.dpo_loss(r, c, rr, rc, 0.7)
        assert mean.item() == pytest.approx(dpo.dpo_loss(c, r, rc, rr, 0.7, e).item(), rel=1e-9)


def test_gradient_of_dpo_is_the_papers():
    """-beta sigmoid(r(rejected) - r(chosen)) (grad log pi(chosen) - grad log pi(rejected))."""
    policy, reference = columns(VALUES[:4])
    dpo.preference_loss(policy, reference, dpo.Args(beta=0.7)).sum().backward()
    for (c, r, rc, rr), (by_chosen, by_rejected) in zip(VALUES, policy.grad.tolist()):
        weight = 0.7 / (1 + math.exp(0.7 * ((c - rc) - (r - rr))))
        assert (by_chosen, by_rejected) == pytest.approx((-weight, weight), rel=1e-9)


PAIR_LOSSES = [flags | more for flags, more in zip(
    LOSSES * 3, [dict(logprobs=logprobs, sft_coef=coef) for logprobs, coef in (("auto", 0.0), ("sum", 0.3), ("mean", 2))
                 for _ in LOSSES])]


@pytest.mark.parametrize("flags", PAIR_LOSSES, ids=str)
def test_pair_loss_and_what_is_logged(flags):
    """Sums or means of log-probs, SFT, ties, a pair of weight 0, against plain Python; gradients against finite
    differences."""
    args = dpo.Args(**{"beta": 0.7, **flags})
    lengths, weights = [(2, 5), (4, 1), (3, 3), (1, 7), (6, 2)], [1.0, 1.0, 1.0, 0.0, 1.0]
    rows = [*VALUES[:4], (-3.0, -2.0, -1.0, -9.0)]
    sums, ref_sums = columns(rows)

    def value(sums):
        return by_hand(args, sums, ref_sums.tolist(), lengths, weights)

    loss, parts = dpo.pair_loss(sums, ref_sums, torch.tensor(lengths), float64(weights), args)
    assert loss.item() == pytest.approx(value(sums.tolist())["loss"], rel=1e-9)
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(value(sums.tolist()), rel=1e-9)
    assert not any(part.requires_grad for part in parts.values())
    loss.backward()
    for i, j in product(range(5), range(2)):
        moved = {sign: [list(row) for row in sums.tolist()] for sign in (1, -1)}
        for sign in moved:
            moved[sign][i][j] += sign * 1e-6
        slope = (value(moved[1])["loss"] - value(moved[-1])["loss"]) / 2e-6
        assert sums.grad[i, j].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_ties_are_half_right():
    sums = torch.tensor([[-2.0, -2.0], [-1.0, -2.0], [-2.0, -1.0], [-2.0, -2.0]])
    lengths = torch.ones(4, 2, dtype=torch.long)
    _, parts = dpo.pair_loss(sums, torch.zeros(4, 2), lengths, torch.ones(4), dpo.Args())
    assert parts["accuracy"] == 0.5 + 1 + 0 + 0.5


def test_log_probs_of_outputs_are_sums_over_their_tokens():
    owner, draw = [0, 0, 0, 2, 3, 3, 2, 0], random.Random(0)
    logprobs = [-draw.random() for _ in owner]
    found = dpo.output_logprobs(torch.tensor(logprobs), torch.tensor(owner), 5)
    expected = [sum(p for p, output in zip(logprobs, owner) if output == number) for number in range(5)]
    assert found.tolist() == pytest.approx(expected)


def test_learning_rates():
    rate = lambda step, schedule: dpo.learning_rate_at(step, 12, 2.0, 2, schedule)
    for schedule, values in {"constant": (2, 2, 2), "linear": (2, 1, 0.2), "cosine": (2, 1, 0.0489)}.items():
        assert [rate(step, schedule) for step in (0, 1)] == [1, 2]
        assert [rate(step, schedule) for step in (2, 7, 11)] == pytest.approx(values, rel=1e-3)


# --- lines ------------------------------------------------------------------------------------------------------------

MIXED = [("ab", "cd$", "ef$"), ("a", "x$", "longer output$"), ("why not ", "no, never$", "yes"), ("^", "xy$", "z$"),
         ("the cat", "sat(oh no)on$", "on(, )sat and(s)at$"), ("q", "$", "a$"), ("so many words of a", "long$", "l"),
         ("why not ", "b$", "because$"), ("zz", "(a)b$", "b(b)b$")]
PAIRS = [pair(*line) for line in MIXED]
SHARING = ["gpt2", "gpt_neox", "opt", "llama", "mixtral", "qwen3"]


def test_lines_against_nested_loops():
    """A token sees its own prompt, and its own output up to itself, and nothing else."""
    lines = [[("abc", ["de", "f"], [[1, 1], [1]]), ("g", ["hij", "k"], [[1, 0, 1], [0]])],
             [("lm", ["n", "", "op"], [[1], [], [1, 1]])]]
    number = {letter: 3 + LETTERS.index(letter) for letter in LETTERS}
    batch = collate_branches([[([number[c] for c in prompt], [[number[c] for c in output] for output in outputs], flags)
                               for prompt, outputs, flags in line] for line in lines], CPU)
    expected = []
    for line in lines:
        tokens = []  # letter, position, scored, prompt and output that it is of
        for group, (prompt, outputs, trained) in enumerate(line):
            for place, letter in enumerate(prompt[:-1]):
                tokens.append((letter, place, False, group, None))
            for output, flags in enumerate(trained):
                tokens.append((prompt[-1], len(prompt) - 1, False, group, output))
                for place, flag in enumerate(flags):
                    tokens.append((outputs[output][place], len(prompt) + place, bool(flag), group, output))
        expected.append(tokens)
    width = max(map(len, expected))
    assert batch["ids"].shape == batch["position_ids"].shape == batch["scored"].shape == (2, width)
    assert batch["mask"].shape == (2, width, width) and batch["mask"].dtype == torch.bool
    for row, tokens in enumerate(expected):
        for i in range(width):
            if i >= len(tokens):
                assert not batch["scored"][row, i]
                continue
            letter, place, scored, group, output = tokens[i]
            assert batch["ids"][row, i] == number[letter] and batch["position_ids"][row, i] == place
            assert batch["scored"][row, i] == scored
            for j in range(width):
                sees = (j < len(tokens) and tokens[j][1] <= place and tokens[j][3] == group
                        and tokens[j][4] in (None, output))
                assert batch["mask"][row, i, j] == (sees and j <= i), (row, i, j)
    assert batch["ids"][0].tolist() == [number[c] for c in "ab" "cde" "cf" "ghij" "gk"]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 2, 3, 0, 1, 2, 3, 0, 1]


def test_no_token_of_padding_is_without_a_place_to_look():
    """A row of a mask that is False throughout is NaN in some attention kernels."""
    batch = next(dpo.pair_batches(PAIRS, True, 99, None, CPU))[2]
    assert batch["mask"].any(2).all()


def reference_of(lm):
    model = LanguageModel(lm)
    return lambda batch: model(**batch, with_entropy=False)["logprobs"]


def gradients(lm) -> dict[str, torch.Tensor]:
    """Takes the gradients off a model."""
    found = {name: parameter.grad for name, parameter in lm.named_parameters() if parameter.grad is not None}
    lm.zero_grad()
    return found


def assert_same_gradients(found: dict, expected: dict, tolerance: float = 2e-5):
    assert expected and found.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    assert scale > 1e-2
    for name in expected:
        assert (found[name] - expected[name]).abs().max() < tolerance * scale, name


FLAGS = dict(beta=0.3, sft_coef=0.4)


def brute_force(lm, reference, pairs, **flags) -> tuple[dict, dict]:
    """What is logged of pairs, and the gradient of DPO's loss with an SFT term, by transformers alone."""
    sums, lengths = brute_sums(lm, pairs), [(sum(p.chosen_trained), sum(p.rejected_trained)) for p in pairs]
    with torch.no_grad():
        ref_sums = brute_sums(reference, pairs)
    margin = (sums - ref_sums)[:, 0] - (sums - ref_sums)[:, 1]
    sft = -sums[:, 0] / torch.tensor([n for n, _ in lengths])
    (F.softplus(-0.3 * margin) + 0.4 * sft).mean().backward()
    return by_hand(dpo.Args(**FLAGS), sums.tolist(), ref_sums.tolist(), lengths), gradients(lm)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_numbers_and_gradients_are_those_of_single_unpadded_rows(architecture):
    """In lines that pairs share, padded, and one by one; the numbers are the same without gradients."""
    lm, ref = tiny_lm(architecture), tiny_lm(architecture, seed=1)
    model, reference = LanguageModel(lm), reference_of(ref)
    expected, slopes = brute_force(lm, ref, PAIRS)
    before = copy.deepcopy(PAIRS)
    for shared, size in product((False, True) if architecture in SHARING else (False,), (1, 4, 99)):
        args = dpo.Args(micro_batch_size=size, **FLAGS)
        found = dpo.batch_metrics(model, reference, PAIRS, shared, args)
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5), (shared, size)
        assert_same_gradients(gradients(lm), slopes)
    with torch.no_grad():
        assert dpo.batch_metrics(model, reference, PAIRS, False, args) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert not gradients(lm) and not gradients(ref) and before == PAIRS


def test_pairs_with_their_references_need_none_in_memory():
    lm, ref = tiny_lm("gpt2"), tiny_lm("gpt2", seed=1)
    expected, _ = brute_force(lm, ref, PAIRS)
    for shared, size in product((False, True), (1, 4)):
        known = dpo.with_reference(LanguageModel(ref), PAIRS, shared, size)
        assert [texts(one) for one in known] == MIXED
        assert [list(one.reference) for one in known] == [pytest.approx(row, rel=1e-5) for row in
                                                          brute_sums(ref, PAIRS).tolist()]
        found = dpo.batch_metrics(LanguageModel(lm), None, known, shared, dpo.Args(micro_batch_size=size, **FLAGS))
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_simpo_needs_no_reference():
    lm = tiny_lm("gpt2")
    args = dpo.Args(loss="simpo", beta=2.0, sft_coef=0.1)
    lengths = [(sum(p.chosen_trained), sum(p.rejected_trained)) for p in PAIRS]
    with torch.no_grad():
        expected = by_hand(args, brute_sums(lm, PAIRS).tolist(), [(0, 0)] * len(PAIRS), lengths)
        assert dpo.batch_metrics(LanguageModel(lm), None, PAIRS, True, args) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_what_shares_exactly_is_found_out(architecture):
    """For large random weights, and for the small ones that transformers starts from."""
    fresh = AUTO[bool(CONFIGS[architecture].is_encoder_decoder)].from_config(copy.deepcopy(CONFIGS[architecture]))
    for lm in (tiny_lm(architecture), fresh.eval()):
        for longest in (2, 3, 7, 64):
            found = shares_exactly(LanguageModel(lm), longest)
            assert found == (architecture in SHARING or architecture in ("gemma2", "gemma3") and longest < 5)


def test_lines_are_not_shared_where_attention_has_a_shorter_reach():
    """Whatever a config calls it; an option that is only on or off is no reach."""
    for name, value, shares in (("attention_chunk_size", 8, False), ("keep_window_size", 8, False),
                                ("window", 64, True), ("max_window_layers", 8, True), ("use_window", True, True),
                                ("chunk", None, True)):
        lm = tiny_lm("llama")
        setattr(lm.config, name, value)
        assert shares_exactly(LanguageModel(lm), 64) == shares, name


@pytest.mark.parametrize("architecture", [*SHARING, "gemma3"])
def test_where_outputs_may_share_lines_long_ones_may(architecture):
    """Lines longer than the model has positions, its longest rows, and windows of attention as long as these."""
    longest, draw = 4 if architecture == "gemma3" else 64, random.Random(0)
    model = LanguageModel(tiny_lm(architecture))
    assert shares_exactly(model, longest)
    pairs = []
    for _ in range(6):
        cut = draw.randrange(1, longest)
        prompt, *outputs = (draw.choices(range(61), k=k) for k in (cut, longest - cut, draw.randint(1, longest - cut)))
        pairs.append(dpo.Pair(prompt, *outputs, *(bytes([1] * len(output)) for output in outputs)))
    with torch.no_grad():
        expected = brute_sums(model.lm, pairs)
        found = dpo.with_reference(model, pairs, True, 2)
    assert longest == 4 or max(len(sum(map(list, p[:3]), [])) for p in pairs) > 64
    for one, row in zip(found, expected.tolist()):
        assert list(one.reference) == pytest.approx(row, rel=1e-5)


@pytest.mark.parametrize("setting", ["sliding_window", "attention_chunk_size"])
def test_windows_of_attention_shorter_than_rows_are_not_shared(setting):
    lm = tiny_lm("llama")
    for reach, answer in ((None, True), (20, True), (19, False), (4, False)):
        setattr(lm.config, setting, reach)
        assert shares_exactly(LanguageModel(lm), 20) == answer


@pytest.mark.parametrize("wrong,share", [("mask", 1.0), ("mask", 1e-3), ("positions", 1.0)])
@pytest.mark.parametrize("architecture", SHARING)
def test_outputs_that_see_each_other_are_found_out(architecture, wrong, share, monkeypatch):
    """Or a little of it, or have positions that go on, in a model that has just been initialised."""
    torch.manual_seed(1)
    model = LanguageModel(AUTO[False].from_config(copy.deepcopy(CONFIGS[architecture])).eval())
    states, calls = model._states, []

    def crossing(trunk, ids, mask, *arguments, position_ids=None):
        right, cache = states(trunk, ids, mask, *arguments, position_ids=position_ids)
        if position_ids is None:
            return right, cache
        calls.append(position_ids)
        if wrong == "mask":
            mask = torch.ones_like(mask).tril()
        else:
            position_ids = torch.arange(ids.shape[1]).expand_as(ids)
        return right + share * (states(trunk, ids, mask, position_ids=position_ids)[0] - right), cache

    assert shares_exactly(model, 40)
    monkeypatch.setattr(model, "_states", crossing)
    assert not shares_exactly(model, 40) and calls


def test_a_model_that_cannot_take_such_a_mask_is_padded(monkeypatch):
    model = LanguageModel(tiny_lm("llama"))
    for error in (ValueError, RuntimeError, IndexError, TypeError, AttributeError, NotImplementedError):
        def states(*_, **__):
            raise error("no")
        monkeypatch.setattr(model, "_states", states)
        assert not shares_exactly(model, 40)


def test_micro_batches_hold_each_pair_once_and_lines_several():
    for shared, size, seq2seq in product((False, True), (1, 3, 99), (False, True)):
        if shared and seq2seq:
            continue
        batches = list(dpo.pair_batches(PAIRS, shared, size, 0 if seq2seq else None, CPU))
        assert sorted(number for numbers, *_ in batches for number in numbers) == list(range(len(PAIRS)))
        widths = []
        for numbers, weight, batch, owner in batches:
            assert weight.tolist() == [1] * len(numbers) and len(batch["ids"]) <= (size if shared else 2 * size)
            counts = [sum(flags) for number in numbers for flags in PAIRS[number][3:5]]
            assert owner.tolist() == [output for output, count in enumerate(counts) for _ in range(count)]
            assert batch["scored"].sum() == len(owner)
            widths.append(batch["ids"].shape[1])
            if seq2seq:
                assert len(batch["encoder_ids"]) == len(numbers), "an encoder reads a prompt once"
                assert batch["encoder_mask"].sum(1).tolist() == [len(PAIRS[number].prompt) for number in numbers]
        longest = max(len(p.prompt) + len(p.chosen) + len(p.rejected) + 1 for p in PAIRS)
        lines = sum(len(batch["ids"]) for _, _, batch, _ in batches)
        if shared:
            assert max(widths) == longest and lines == 5 and len(batches) == math.ceil(lines / size)
        else:
            assert lines == 2 * len(PAIRS) and len(batches) == math.ceil(len(PAIRS) / size)
            order = [sum(map(len, PAIRS[number][:3])) for numbers, *_ in batches for number in numbers]
            assert order == sorted(order), "like lengths share a micro-batch"


# --- runs -------------------------------------------------------------------------------------------------------------

WORDS = ["the cat", "dog", "a mouse sat", "no", "some more words", "xyz", "Big Red", "q", "the end", "Not, here", "up"]
ROWS = [{"prompt": word, "chosen": word[::-1] * (1 + number % 2), "rejected": word.upper()[:5] + "z", "number": number}
        for number, word in enumerate(WORDS)]
RUN = dict(held_out=0.2, num_eval_prompts=0, batch_size=4, micro_batch_size=2, max_length=40, max_new_tokens=4,
           learning_rate=1e-3, eval_every=1, schedule="constant")


def run(tmp_path, model, rows=ROWS, name="run", **flags):
    """The run's folder, after `dpo.train` with small settings."""
    options = {name: flags.pop(name) for name in ("metric_fn", "eval_prompts", "held_out_pairs", "stop_sequences")
               if name in flags and not isinstance(flags[name], str)}
    dpo.train(dpo.Args(model=model, output_dir=str(tmp_path / name), **{**RUN, **flags}), rows, **options)
    return tmp_path / name


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]


def numbers(row: dict) -> dict:
    """What must be equal between two equal runs: everything but the clock."""
    return {name: value for name, value in row.items() if not name.startswith("perf/") and name != "seconds"}


def group(row: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}


def plain(folder):
    """The model in a folder, by transformers alone."""
    config = transformers.AutoConfig.from_pretrained(folder)
    return AUTO[bool(config.is_encoder_decoder)].from_pretrained(folder).eval()


def recorded(monkeypatch) -> dict[str, list]:
    """What `batch_metrics` is called with from now on: pairs of each batch, and of each evaluation."""
    calls, batch_metrics = {"train": [], "eval": []}, dpo.batch_metrics

    def record(model, reference, pairs, *arguments):
        calls["train" if torch.is_grad_enabled() else "eval"].append(list(pairs))
        return batch_metrics(model, reference, pairs, *arguments)

    monkeypatch.setattr(dpo, "batch_metrics", record)
    return calls


@pytest.fixture(scope="session")
def chat_path(model_path, tmp_path_factory):
    """As model_path, with a chat template."""
    def path(architecture):
        folder = str(tmp_path_factory.mktemp(architecture) / "chat")
        plain(model_path(architecture)).save_pretrained(folder)
        chat_tokenizer().save_pretrained(folder)
        return folder
    return path


KINDS = {"copy": dict(), "lora": dict(lora_rank=2), "top": dict(num_layers_unfrozen=1)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
def test_the_reference_is_the_model_that_training_starts_from(architecture, kind, model_path, tmp_path, monkeypatch):
    """Policy and reference agree at the start, whose loss is log 2; afterwards the policy is another, and the reference
    is what plain transformers make of the model given. Numbers computed before are the same over the whole run."""
    flags, calls = dict(learning_rate=1e-2, epochs=2, micro_batch_size=3, **KINDS[kind]), recorded(monkeypatch)
    live = run(tmp_path, model_path(architecture), **flags)
    held = calls["eval"][0]
    before = live if architecture == "llama" and kind != "copy" else run(
        tmp_path, model_path(architecture), name="before", precompute_reference=True, **flags)
    rows = rows_of(live)
    assert len(rows) == 5
    assert rows[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[1]["train/loss"] == rows[1]["train/preference_loss"] == pytest.approx(math.log(2), abs=1e-5)
    for name in ("margin", "chosen_reward", "rejected_reward", "kl", "gap"):
        assert abs(rows[1][f"train/{name}"]) < 1e-5
    for one, other in zip(rows, rows_of(before), strict=True):
        for name, value in numbers(one).items():
            about = dict(abs=0.5) if "accuracy" in name and one["step"] == 0 else dict(rel=2e-3, abs=2e-4)
            if name != "train/accuracy" or one["step"] > 1:  # of ties, but for rounding
                assert other[name] == pytest.approx(value, **about), (one["step"], name)
    sums = [brute_sums(plain(folder), held).tolist() for folder in (live / "model", model_path(architecture))]
    lengths = [(len(p.chosen), len(p.rejected)) for p in held]
    expected = by_hand(dpo.Args(), *sums, lengths)
    expected["pair_kl"] = expected.pop("kl")
    assert group(rows[-1], "eval/") == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert abs(expected["margin"]) > 0.01 and abs(expected["pair_kl"]) > 0.1, "the policy has changed"


@pytest.mark.parametrize("architecture", ["gpt2", "t5", "gemma2"])
def test_a_step_of_a_run_is_a_step_of_adamw_on_the_brute_force_loss(architecture, model_path, tmp_path):
    """Loss, gradient norm, and every weight after one step; the user's objects are unchanged."""
    given = copy.deepcopy(ROWS)
    model, tokenizer = dpo.train(dpo.Args(model=model_path(architecture), output_dir=str(tmp_path / "run"),
                                          **{**RUN, "batch_size": 99, "held_out": 0.0}, **FLAGS), given)
    assert given == ROWS
    lm, ref = plain(model_path(architecture)), plain(model_path(architecture))
    expected, slopes = brute_force(lm, ref, made(ROWS, seq2seq=lm.config.is_encoder_decoder)[0])
    start, row = rows_of(tmp_path / "run")
    assert 0 <= row.pop("train/accuracy") <= 1 and expected.pop("accuracy") > 0.4  # of ties, but for rounding
    assert group(row, "train/") == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert not any(name.startswith("eval/") for name in start | row)
    norm = torch.stack([gradient.norm() for gradient in slopes.values()]).norm()
    assert row["optim/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert row["samples"] == len(ROWS) and row["epoch"] == 1 and start["data/pairs"] == len(ROWS)
    read = sum(len(one["prompt"] + 2 * "$") + len(one["chosen"] + one["rejected"]) for one in ROWS)
    assert row["perf/tokens_per_second"] * row["perf/seconds"] == pytest.approx(read)
    assert row["perf/pairs_per_second"] * row["perf/seconds"] == pytest.approx(len(ROWS))
    trained = dict(model.named_parameters())
    for name, parameter in lm.named_parameters():
        clipped = slopes[name] * min(1, 1 / norm)
        stepped = parameter.detach() - 1e-3 * clipped / (clipped.abs() + 1e-8)
        sure = clipped.abs() > 1e-5  # Adam's first step is the sign, also of what is but rounding
        assert ((trained[name] - stepped).abs() * sure).max() < 2e-5, name
    again = plain(tmp_path / "run" / "model")
    inputs = dict(input_ids=torch.tensor([[5, 6, 7]]))
    inputs |= dict(decoder_input_ids=torch.tensor([[0, 4]])) if lm.config.is_encoder_decoder else {}
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert not torch.equal(again(**inputs).logits, lm(**inputs).logits)
    assert tokenizer("ab")["input_ids"] == parsed("ab")[0]


@pytest.mark.parametrize("flags", LOSSES[1:], ids=str)
def test_every_loss_is_that_of_its_start_and_its_end(flags, model_path, tmp_path, monkeypatch):
    """The held-out numbers at the end, by plain transformers; the margin rises."""
    calls = recorded(monkeypatch)
    folder = run(tmp_path, model_path("gpt2"), epochs=4, eval_every=99, **flags)
    held, args = calls["eval"][0], dpo.Args(**flags)
    sums = [brute_sums(plain(path), held).tolist() for path in (folder / "model", model_path("gpt2"))]
    if args.loss == "simpo":
        sums[1] = [(0, 0)] * len(held)
    expected = by_hand(args, *sums, [(len(p.chosen), len(p.rejected)) for p in held])
    expected = {"pair_kl" if name == "kl" else name: value for name, value in expected.items()}
    rows = rows_of(folder)
    assert group(rows[-1], "eval/") == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert rows[-1]["train/margin"] > rows[1]["train/margin"]


def test_training_prefers_what_was_chosen(model_path, tmp_path):
    folder = run(tmp_path, model_path("gpt2"), epochs=15, batch_size=9, learning_rate=3e-3, beta=0.5)
    rows = rows_of(folder)
    assert rows[-1]["train/accuracy"] == 1 and rows[-1]["train/loss"] < 0.05
    assert rows[-1]["train/chosen_logprob"] - rows[1]["train/chosen_logprob"] > (
        rows[-1]["train/rejected_logprob"] - rows[1]["train/rejected_logprob"])
    assert rows[-1]["train/kl"] != 0


def test_what_saves_memory_or_time_changes_no_number(model_path, tmp_path, monkeypatch):
    calls, checkpoint_blocks = [], dpo.checkpoint_blocks
    monkeypatch.setattr(dpo, "checkpoint_blocks", lambda lm: calls.append(lm) or checkpoint_blocks(lm))
    more, prepared, prepare = dict(num_eval_prompts=3, eval_temperature=[0.0]), [], dpo.prepare
    monkeypatch.setattr(dpo, "prepare", lambda *some, **all: prepared.append(all["offload"]) or prepare(*some, **all))
    one = rows_of(run(tmp_path, model_path("llama"), **more))
    for flags in (dict(gradient_checkpointing=True), dict(keep_sharded=True), dict(offload=True), dict(pack=False),
                  dict(micro_batch_size=1, generation_batch_size=1), dict(dtype="bfloat16"),
                  dict(precompute_reference=True)):
        other, near = run(tmp_path, model_path("llama"), name=str(flags), **more, **flags), "dtype" in flags
        for row, same in zip(one, rows_of(other), strict=True):
            for name, value in numbers(row).items():
                if not (near and name in ("eval/length", "eval/kl", "train/kl", "eval/pair_kl", "train/margin")) and (
                        "accuracy" not in name) and not ("precompute_reference" in flags and name == "eval/kl"):
                    same_value = same[name]
                    assert same_value == pytest.approx(value, rel=0.1 if near else 2e-4, abs=0.1 if near else 2e-5), (
                        flags, name)
    assert len(calls) == 1 and prepared.count(True) == 2, "policy and reference"
    assert "eval/kl" not in same and "eval/kl" in row, "samples of a run without a reference have no KL"


def test_only_the_top_is_trained(model_path, tmp_path):
    for name, flags in {"live": {}, "before": dict(precompute_reference=True), "none": dict(loss="simpo")}.items():
        folder = run(tmp_path, model_path("gpt2"), name=name, num_layers_unfrozen=1, **flags)
        before, after = plain(model_path("gpt2")).state_dict(), plain(folder / "model").state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {name for name in before if name.startswith(("transformer.h.2.", "transformer.ln_f."))}


@pytest.mark.parametrize("architecture", ["gpt2", "t5_v1_1"])
def test_lora_exports_load_in_plain_transformers(architecture, model_path, tmp_path):
    """model/ with the adapters merged, and best/; the adapter stands by itself."""
    args = dpo.Args(model=model_path(architecture), output_dir=str(tmp_path / "run"), lora_rank=2, lora_alpha=8.0,
                    **{**RUN, "learning_rate": 1e-2})
    model, _ = dpo.train(args, ROWS)
    inputs = dict(input_ids=torch.tensor([[5, 6, 7]]))
    inputs |= dict(decoder_input_ids=torch.tensor([[0, 4]])) if model.config.is_encoder_decoder else {}
    lms = [plain(tmp_path / "run" / folder) for folder in ("model", "checkpoints/best")]
    assert torch.equal(lms[0](**inputs).logits, model(**inputs).logits)
    for lm in lms:
        assert not torch.equal(plain(args.model)(**inputs).logits, lm(**inputs).logits)
    adapter = json.loads((tmp_path / "run" / "model" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (2, 8.0)


def test_each_epoch_has_every_pair_once_in_another_order_and_held_out_pairs_never(model_path, tmp_path, monkeypatch):
    """The pairs held out are the same whatever the number of steps, and none that training would miss otherwise."""
    lines, held = made_texts(ROWS), []
    for name, flags in {"long": dict(epochs=3), "short": dict(epochs=2, max_steps=1), "other": dict(seed=2)}.items():
        calls = recorded(monkeypatch)
        folder = run(tmp_path, model_path("gpt2"), name=name, batch_size=5, **flags)
        monkeypatch.undo()
        assert all(found == calls["eval"][0] for found in calls["eval"])
        held.append([texts(found) for found in calls["eval"][0]])
        seen = [texts(found) for found in sum(calls["train"], [])]
        if name == "long":
            assert [len(batch) for batch in calls["train"]] == [5, 5, 5, 5, 4]
            epochs = [seen[:8], seen[8:16], seen[16:]]
            assert all(sorted(epoch + held[0]) == sorted(lines) for epoch in epochs)
            assert len({tuple(epoch) for epoch in [*epochs, [line for line in lines if line in epochs[0]]]}) == 4
            order = [shuffled(place, 8, 1) for place in range(8)]
            assert [sorted(epochs[0], key=lines.index)[i] for i in order] == epochs[0]
            assert [row["samples"] for row in rows_of(folder)] == [0, 5, 10, 15, 20, 24]
            assert [row["epoch"] for row in rows_of(folder)][1:3] == [0.625, 1.25]
        assert name != "short" or seen == epochs[0][:5], "the first batch is that of a longer run"
        assert not set(seen) & set(held[-1])
    assert len(held[0]) == 3 and held[0] == held[1] and held[0] != held[2]


def test_held_out_pairs_are_no_more_than_are_used(model_path, tmp_path, monkeypatch):
    """Of a share of the data the others are trained on; of pairs given for it, those that are used are spread."""
    start = rows_of(run(tmp_path, model_path("gpt2"), held_out=0.5, num_eval_rows=2, max_steps=1))[0]
    assert (start["data/pairs"], start["data/held_out"]) == (9, 2)
    calls = recorded(monkeypatch)
    start = rows_of(run(tmp_path, model_path("gpt2"), held_out_pairs=ROWS, num_eval_rows=2, max_steps=1, name="own"))[0]
    assert (start["data/pairs"], start["data/held_out"]) == (11, 2)
    assert [texts(found) for found in calls["eval"][0]] == [made_texts(ROWS)[0], made_texts(ROWS)[5]]
    start = rows_of(run(tmp_path, model_path("gpt2"), rows=ROWS[:1], max_steps=1, name="one"))[0]
    assert (start["data/pairs"], start["data/held_out"]) == (1, 0)


def test_the_best_checkpoint_is_that_of_the_lowest_held_out_loss(model_path, tmp_path, monkeypatch):
    """The held-out loss rises from some step on, as the held-out choices are the other way round."""
    others = [{"prompt": "the cat", "chosen": "aaa", "rejected": "bbb"}]
    rows = [{"prompt": "the dog", "chosen": "bbb", "rejected": "aaa"}, {"prompt": "x", "chosen": "aa", "rejected": "b"}]
    calls = recorded(monkeypatch)
    folder = run(tmp_path, model_path("gpt2"), rows * 4, held_out_pairs=others, epochs=4, learning_rate=3e-3)
    losses = {row["step"]: row["eval/loss"] for row in rows_of(folder)[1:]}
    least = min(losses, key=losses.get)
    held = calls["eval"][0]
    for path, step in ((folder / "checkpoints" / "best", least), (folder / "model", 8)):
        sums = [brute_sums(plain(path), held).tolist() for path in (path, model_path("gpt2"))]
        assert by_hand(dpo.Args(), *sums, [(4, 4)])["loss"] == pytest.approx(losses[step], rel=1e-4)
    assert losses[8] > losses[least] and transformers.AutoTokenizer.from_pretrained(folder / "checkpoints" / "best")


def test_a_run_says_whether_pairs_share_lines(model_path, tmp_path, capsys, monkeypatch):
    shares, pair_batches = [], dpo.pair_batches
    monkeypatch.setattr(dpo, "pair_batches",
                        lambda pairs, shared, *more: shares.append(shared) or pair_batches(pairs, shared, *more))
    said = "packing: a {} does not keep outputs that share a line apart; each is padded instead"
    for architecture, flags, kind in (("gpt2", {}, None), ("gpt2", dict(pack=False), None),
                                      ("bloom", {}, "BloomForCausalLM"), ("t5", {}, "T5ForConditionalGeneration"),
                                      ("t5", dict(pack=False), None)):
        run(tmp_path, model_path(architecture), name=f"{architecture}{flags}", max_steps=1, **flags)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("packing")]
        assert lines == ([said.format(kind)] if kind else [])
        assert set(shares) == {architecture == "gpt2" and not flags}
        shares.clear()


def test_a_run_stopped_early_has_the_learning_rates_of_the_whole(model_path, tmp_path):
    folder = run(tmp_path, model_path("gpt2"), schedule="linear", warmup_steps=1, max_steps=3, epochs=2)
    assert [row["optim/learning_rate"] for row in rows_of(folder)[1:]] == pytest.approx([1e-3, 1e-3, 1e-3 * 2 / 3])


def test_evaluation_is_at_the_start_at_the_end_and_every_so_many_steps(model_path, tmp_path):
    rows = rows_of(run(tmp_path, model_path("gpt2"), eval_every=2, epochs=2, max_steps=3))
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 2, 3]


def test_settings_of_the_optimizer_reach_it_and_the_start_is_checked_once(model_path, tmp_path, monkeypatch):
    calls, adamw, optimizer_step = [], dpo.adamw, dpo.optimizer_step
    monkeypatch.setattr(dpo, "adamw", lambda model, *more: calls.append(more) or adamw(model, *more))
    monkeypatch.setattr(dpo, "optimizer_step", lambda optimizer, rate, norm, *more: calls.append((rate, norm))
                        or optimizer_step(optimizer, rate, norm, *more))
    monkeypatch.setattr(dpo, "check_reference", lambda *more: calls.append(more))
    folder = run(tmp_path, model_path("gpt2"), adam_beta1=0.1, adam_beta2=0.2, adam_epsilon=0.3, weight_decay=0.4,
                 max_grad_norm=0.5, max_steps=2, precompute_reference=True)
    gap = rows_of(folder)[1]["train/gap"]
    assert gap > 0 and calls == [(1e-3, (0.1, 0.2), 0.3, 0.4), (gap, torch.float32), (1e-3, 0.5), (1e-3, 0.5)]


def test_a_gradient_that_is_not_finite_stops_with_the_batch_saved(model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "preference_loss", lambda policy, *_: policy.sum(1) * float("nan"))
    with pytest.raises(UserError, match="^step 0: the gradient is nan; its batch and .*/nonfinite-step-0, "):
        run(tmp_path, model_path("gpt2"), held_out=0.0, max_length=9)
    saved = torch.load(tmp_path / "run" / "nonfinite-step-0" / "batch.pt", weights_only=True)
    lines = [texts(dpo.Pair(*one)) for one in saved["pairs"]]
    assert lines == [made_texts(ROWS, longest=9)[shuffled(place, len(ROWS), 1)] for place in range(4)]


def test_a_reference_that_is_not_the_policy_stops_the_run(model_path, tmp_path, monkeypatch):
    """Before the first update; for simpo, which has none, anything goes."""
    monkeypatch.setattr(dpo, "load_lm", lambda path, calls=[]: calls.append(path) or tiny_lm("gpt2", len(calls) - 1))
    with pytest.raises(UserError, match="^before the first update policy and reference differ by .* nats an output"):
        run(tmp_path, model_path("gpt2"))
    assert len(rows_of(tmp_path / "run")) == 1


def test_how_far_policy_and_reference_may_be_apart():
    for gap, dtype, wrong in ((0.009, torch.float32, False), (0.011, torch.float32, True), (0.9, torch.bfloat16, False),
                              (1.1, torch.bfloat16, True), (math.nan, torch.float32, True)):
        with pytest.raises(UserError) if wrong else contextlib.nullcontext():
            dpo.check_reference(gap, dtype)


def test_gaps_of_several_pairs_do_not_cancel(model_path, tmp_path, monkeypatch):
    """Log-probs of the reference that have come to the wrong pairs have the right mean."""
    with_reference = dpo.with_reference

    def turned(*arguments):
        pairs = with_reference(*arguments)
        return [one._replace(reference=other.reference) for one, other in zip(pairs, pairs[1:] + pairs[:1])]

    monkeypatch.setattr(dpo, "with_reference", turned)
    with pytest.raises(UserError, match="^before the first update policy and reference differ"):
        run(tmp_path, model_path("gpt2"), precompute_reference=True, held_out=0.0, batch_size=99)


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_kl_of_samples_is_that_of_plain_transformers(architecture):
    lm, ref = tiny_lm(architecture), tiny_lm(architecture, seed=1)
    outputs = [("ab", "cd$"), ("a", "longer output"), ("why", "x"), ("the end", "of it$"), ("q", "$")]
    items = [{"prompt_ids": parsed(prompt)[0], "tokens": parsed(output)[0]} for prompt, output in outputs]
    lines = [pair(prompt, output, output) for prompt, output in outputs]
    with torch.no_grad():
        expected = (brute_sums(lm, lines) - brute_sums(ref, lines))[:, 0].tolist()
    for size in (1, 2, 99):
        found = dpo.sample_kl(LanguageModel(lm), reference_of(ref), items, size)
        assert found == {"kl": pytest.approx(expected, rel=1e-4, abs=1e-4)}


@pytest.mark.parametrize("kind", KINDS)
def test_kl_of_the_samples_of_a_run(kind, model_path, tmp_path):
    """At the end, of the outputs that samples.jsonl has."""
    folder = run(tmp_path, model_path("gpt2"), num_eval_prompts=4, eval_samples=2, learning_rate=1e-2, **KINDS[kind])
    rows = rows_of(folder)
    assert abs(rows[0]["eval/kl"]) < 1e-5 and rows[-1]["eval/kl"] > 0.01
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    samples = [sample for sample in samples if sample["step"] == rows[-1]["step"]]
    assert sum(sample["kl"] for sample in samples) / len(samples) == pytest.approx(rows[-1]["eval/kl"])
    lms = plain(folder / "model"), plain(model_path("gpt2"))
    for sample in samples:
        if sample["length"] == len(sample["output"]):  # else there are special tokens in it
            line = [pair(sample["prompt"], sample["output"], "$")]
            with torch.no_grad():
                kl = brute_sums(lms[0], line) - brute_sums(lms[1], line)
            assert sample["kl"] == pytest.approx(kl[0, 0].item(), rel=1e-3, abs=1e-3)


def test_held_out_prompts_are_evaluated_and_their_columns_reach_the_metric(chat_path, tmp_path):
    calls = []

    def metric(prompts, outputs, number):
        calls.append((prompts, number))
        return {"letters": [len(output) for output in outputs], "loss": -1.0}

    rows = [{"prompt": "ab", "chosen": "x", "rejected": "y", "number": 1},
            {"prompt": says("hi", "yo", "c"), "chosen": "x", "rejected": "y"},
            {"chosen": says("hi", "yo"), "rejected": says("hi", "no"), "number": 3},
            {"chosen": "so it goes", "rejected": "so it went", "number": 4}]
    given = copy.deepcopy(rows)
    folder = run(tmp_path, chat_path("gpt2"), held_out_pairs=rows, num_eval_prompts=9, metric_fn=metric, max_steps=1,
                 eval_samples=2)
    prompts = ["ab", ".u hi\n.a yo\n.u c\n.a ", ".u hi\n.a ", "so it"]
    assert calls == [([prompt for prompt in prompts for _ in range(2)], [1, 1, None, None, 3, 3, 4, 4])] * 2
    assert rows == given
    found = rows_of(folder)
    assert found[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-5), "a metric called loss is not the loss"
    assert "eval/letters" in found[0] and {"eval/kl", "eval/pair_kl"} < set(found[1])


def test_evaluation_samples_are_those_of_transformers(model_path, tmp_path):
    """Greedy, and from the likeliest token alone: a prompt is cut on the chosen side to leave room for an output, which
    ends where a stop sequence begins."""
    lm, tokenizer = tiny_lm("gpt2"), char_tokenizer()
    for side, kept in (("left", "klmnopqr"), ("right", "abcdefgh")):
        ids = torch.tensor([parsed(kept)[0]])
        output = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)[0, 8:]
        output = tokenizer.decode(output, skip_special_tokens=True)
        for name, flags in {"greedy": dict(eval_temperature=[0.0]), "likeliest": dict(eval_top_k=[1]),
                            "nucleus": dict(eval_top_p=[1e-6]), "several": dict(eval_temperature=[1e-6, 1e-5]),
                            "stopped": dict(eval_temperature=[0.0], stop=[output[1]]),
                            "given": dict(eval_temperature=[0.0], stop_sequences=[output[1]], stop=["q"])}.items():
            folder = run(tmp_path, model_path("gpt2"), name=side + name, num_eval_prompts=1, eval_samples=2,
                         max_length=12, max_steps=1, truncation_side=side, eval_prompts=["abcdefghijklmnopqr"], **flags)
            found = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
            found = [(sample["prompt"], sample["output"]) for sample in found if sample["step"] == 0]
            ends = name in ("stopped", "given")
            assert found == [(kept, output.split(output[1])[0] if ends else output)] * (4 if name == "several" else 2)
    assert {"eval/kl@temperature=1e-06", "eval/kl@temperature=1e-05"} < set(
        rows_of(tmp_path / "leftseveral")[0])


def test_evaluation_prompts_of_their_own(model_path, tmp_path):
    seen = []
    run(tmp_path, model_path("gpt2"), eval_prompts=["one two three", "four", "five six seven", "no"], prompt_words=2,
        num_eval_prompts=2, metric_fn=lambda prompts: seen.append(prompts) or {}, max_steps=1)
    assert seen == [["one two", "five six"]] * 2
    seen.clear()
    run(tmp_path, model_path("gpt2"), held_out=0.0, num_eval_prompts=99, name="own", max_steps=1,
        metric_fn=lambda prompts: seen.append(prompts) or {})
    assert seen[0] == WORDS, "without held-out pairs those of the training data"


# --- resume -----------------------------------------------------------------------------------------------------------


def same_runs(a: Path, b: Path):
    """Metrics, samples and weights are equal to the last bit."""
    assert [numbers(row) for row in rows_of(a)] == [numbers(row) for row in rows_of(b)]
    assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()
    for folder in ("model", "checkpoints/best"):
        left, right = plain(a / folder).state_dict(), plain(b / folder).state_dict()
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("flags", [
    dict(warmup_steps=3), dict(pack=False, num_layers_unfrozen=1), dict(lora_rank=2), dict(precompute_reference=True),
    dict(loss="simpo", schedule="cosine")], ids=["whole", "top", "lora", "precomputed", "simpo"])
def test_resume_is_exact(flags, model_path, tmp_path, monkeypatch):
    """Stopped after step 3 and resumed from step 2, in the middle of an epoch; what was computed before is read."""
    flags = {"epochs": 2, "save_every": 2, "keep_checkpoints": 9, "num_eval_prompts": 2, "learning_rate": 1e-2,
             "batch_size": 3, **flags}
    metric = lambda outputs: {"score": [output.count("e") + torch.rand(()).item() for output in outputs]}
    for name, more in {"a": {}, "b": dict(max_steps=3)}.items():
        run(tmp_path, model_path("gpt2"), name=name, metric_fn=metric, **flags, **more)
    resume = str(tmp_path / "b" / "checkpoints" / "step-2")
    args = dpo.Args(model=model_path("gpt2"), **{**RUN, **flags}, resume=resume)
    monkeypatch.setattr(dpo, "with_reference", None)
    dpo.train(args, ROWS, metric_fn=metric)
    assert len(rows_of(tmp_path / "a")) == 7
    same_runs(tmp_path / "a", tmp_path / "b")
    assert sorted(os.listdir(tmp_path / "b" / "checkpoints")) == ["best", "step-2", "step-4", "step-6"]
    with pytest.raises(UserError, match="is of another run: its --epochs was 2, not 3"):
        dpo.train(dpo.Args(model=model_path("gpt2"), **{**RUN, **flags, "epochs": 3}, resume=resume), ROWS)


def test_the_best_is_remembered_by_a_resumed_run(model_path, tmp_path):
    """The held-out loss is lowest before the stop, and worse at each later step."""
    flags = dict(rows=[{"prompt": "the dog", "chosen": "bbb", "rejected": "aaa"}] * 8, save_every=1, epochs=2,
                 held_out_pairs=[{"prompt": "the cat", "chosen": "aaa", "rejected": "bbb"}], learning_rate=1e-2)
    a, b = (run(tmp_path, model_path("gpt2"), name=name, max_steps=steps, **flags) for name, steps in
            (("a", None), ("b", 2)))
    run(tmp_path, model_path("gpt2"), name="b", resume="auto", **flags)
    losses = [row["eval/loss"] for row in rows_of(a)]
    assert losses[1:] == sorted(losses[1:]) and len(losses) == 5
    same_runs(a, b)


def test_data_that_has_changed_is_not_resumed(model_path, tmp_path):
    flags = dict(batch_size=2, epochs=2, save_every=1, held_out=0.0, model=model_path("gpt2"))
    run(tmp_path, rows=ROWS[:3], max_steps=1, **flags)
    for other in ([*ROWS[:2], {**ROWS[2], "rejected": "zzz"}], [*ROWS[:2], {**ROWS[2], "prompt": "zzz"}],
                  [ROWS[1], ROWS[0], ROWS[2]], ROWS[:4]):
        with pytest.raises(UserError, match="^--resume .*step-1: the data has changed since"):
            run(tmp_path, rows=other, resume="auto", **flags)
    run(tmp_path, rows=ROWS[:3], resume="auto", **flags)
    run(tmp_path, rows=ROWS[:3], held_out_pairs=ROWS[3:5], max_steps=1, name="held", **flags)
    with pytest.raises(UserError, match="^--resume .*step-1: the data has changed since"):
        run(tmp_path, rows=ROWS[:4], held_out_pairs=ROWS[4:5], resume="auto", name="held", **flags)


def test_numbers_computed_before_are_read_if_they_are_of_this_data(tmp_path, monkeypatch):
    model, sets, args = LanguageModel(tiny_lm("gpt2")), [PAIRS[:5], PAIRS[5:]], dpo.Args(precompute_reference=True)
    first = dpo.precomputed(model, sets, True, str(tmp_path), [7, 5], args)
    assert [[list(one.reference) for one in some] for some in first] == [
        [pytest.approx(row, rel=1e-5) for row in brute_sums(model.lm, some).tolist()] for some in sets]
    assert [[texts(one) for one in some] for some in first] == [MIXED[:5], MIXED[5:]]
    found = load_file(tmp_path / "reference.safetensors")
    assert found["train"].shape == (5, 2) and found["held_out"].shape == (4, 2)
    other = LanguageModel(tiny_lm("gpt2", seed=1))
    assert dpo.precomputed(other, sets, True, str(tmp_path), [7, 5], args) == first, "read, not computed"
    assert dpo.precomputed(other, sets, True, str(tmp_path), [7, 6], args) != first
    again = dpo.precomputed(other, sets, True, str(tmp_path), [8, 5], args)
    assert [list(one.reference) for one in again[0]] == [
        pytest.approx(row, rel=1e-5) for row in brute_sums(other.lm, sets[0]).tolist()]
    alone = dpo.precomputed(other, [PAIRS, []], True, str(tmp_path), [9, 5], args)
    assert [len(some) for some in alone] == [9, 0] == [len(some) for some in dpo.precomputed(
        model, [PAIRS, []], True, str(tmp_path), [9, 5], args)]


def test_numbers_computed_before_are_not_those_of_another_split(model_path, tmp_path):
    """The same rows in the same order, one more of them held out; the first try stopped at a mistake after them."""
    flags = dict(model=model_path("gpt2"), precompute_reference=True, num_eval_prompts=2, learning_rate=1e-9)
    with pytest.raises(UserError, match="^--eval-prompts: holds no rows"):
        run(tmp_path, rows=ROWS[:7], held_out_pairs=ROWS[7:], eval_prompts=[], **flags)
    folder = run(tmp_path, rows=ROWS[:6], held_out_pairs=ROWS[6:], **flags)
    start, *_, last = rows_of(folder)
    assert start["data/pairs"] == 6 and start["data/held_out"] == 5
    assert start["eval/pair_kl"] == pytest.approx(0, abs=1e-4) and last["samples"] == 6


def test_numbers_computed_before_are_not_those_of_another_model(model_path, tmp_path):
    """The first try, in the same folder, stopped at a mistake after they were computed."""
    tiny_lm("gpt2", seed=1).save_pretrained(tmp_path / "other")
    char_tokenizer().save_pretrained(tmp_path / "other")
    flags = dict(precompute_reference=True, num_eval_prompts=2, max_steps=1)
    with pytest.raises(UserError, match="^--eval-prompts: holds no rows"):
        run(tmp_path, str(tmp_path / "other"), eval_prompts=[], **flags)
    folder = run(tmp_path, model_path("gpt2"), **flags)
    assert rows_of(folder)[1]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)


# --- ranks ------------------------------------------------------------------------------------------------------------

# what several ranks run: model, rows, flags
RANKED = {
    "gpt2": ("gpt2", ROWS, dict(batch_size=5)),
    "llama padded": ("llama", ROWS, dict(batch_size=5, pack=False, micro_batch_size=1, loss="ipo", sft_coef=0.1)),
    "llama alone": ("llama", ROWS, dict(batch_size=1, micro_batch_size=9)),  # fewer lines than ranks
    "t5": ("t5", ROWS, dict(batch_size=5)),
    "t5 alone": ("t5", ROWS, dict(batch_size=1)),
    "precomputed": ("gpt2", ROWS, dict(batch_size=5, precompute_reference=True)),
    "lora": ("gpt2", ROWS, dict(batch_size=5, lora_rank=2)),
    "top": ("gpt2", ROWS, dict(batch_size=3, num_layers_unfrozen=1, save_every=1)),
}
RANKED_FLAGS = dict(RUN, max_steps=3, eval_every=2, held_out=0.3, num_eval_prompts=3, beta=0.3)
WORKER = (f"import sys\nsys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\nimport test_dpo\n"
          "test_dpo.work(*sys.argv[1:])\n")


def work(folder: str, models: str) -> None:
    """Run on each of several ranks: those of RANKED that have a model."""
    torch.set_num_threads(1)
    init(0)
    for name, model in json.loads(models).items():
        _, rows, flags = RANKED[name]
        dpo.train(dpo.Args(model=model, output_dir=f"{folder}/{name}", **{**RANKED_FLAGS, **flags}), rows)
    torch.distributed.barrier()
    os._exit(0)  # as common.cli.run does


@pytest.mark.parametrize("ranks,names", [(2, [*RANKED]), (3, ["gpt2", "t5 alone"])])
def test_several_ranks_have_the_numbers_of_one(ranks, names, model_path, tmp_path):
    """Batches that do not divide, fewer lines than ranks, held-out pairs that do not divide; sampled texts too."""
    (tmp_path / "worker.py").write_text(WORKER)
    models = {name: model_path(RANKED[name][0]) for name in names}
    done = run_forked(str(tmp_path / "worker.py"), str(tmp_path / "several"), json.dumps(models), processes=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        architecture, rows, flags = RANKED[name]
        one = run(tmp_path, model_path(architecture), rows, f"one/{name}", **{**RANKED_FLAGS, **flags})
        for row, other in zip(rows_of(one), rows_of(tmp_path / "several" / name), strict=True):
            for metric, value in numbers(row).items():
                if "accuracy" not in metric or row["step"] > 1:  # of ties, but for rounding
                    assert other[metric] == pytest.approx(value, rel=2e-4, abs=2e-4), (name, row["step"], metric)
        lines = [[json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
                 for folder in (one, tmp_path / "several" / name)]
        assert [line["output"] for line in lines[0][:3]] == [line["output"] for line in lines[1][:3]]
        if flags.get("save_every"):  # one process goes on with what several have left
            resume = str(tmp_path / "several" / name / "checkpoints" / "step-2")
            dpo.train(dpo.Args(model=model_path(architecture), resume=resume, **{**RANKED_FLAGS, **flags}), rows)
            assert rows_of(tmp_path / "several" / name)[-1]["train/loss"] == pytest.approx(
                rows_of(one)[-1]["train/loss"], rel=2e-4)


# --- data -------------------------------------------------------------------------------------------------------------

HH = "\n\nHuman: hi\n\nAssistant:"
BEGINNINGS = [  # chosen, rejected, and the prompt
    (HH + " yes", HH + " no", HH),
    (HH + " yo\n\nHuman: so\n\nAssistant: a b", HH + " yo\n\nHuman: so\n\nAssistant: a c",
     HH + " yo\n\nHuman: so\n\nAssistant:"),
    (HH + " yo\n\nHuman: so\n\nAssistant: a", HH + " no\n\nHuman: so\n\nAssistant: a", HH),
    (HH + " yes", HH + " yes, more", HH),
    (HH + " a", HH + "", HH),
    ("tell me one", "tell me two", "tell me"),
    ("tell me one more", "tell me one", "tell me"),
    ("tell me one", "tell me one two", "tell me"),
    ("a\tb", "a\tc", "a"), ("a\nb c", "a\nb d", "a\nb"),
    ("abc", "abd", ""), ("abc", "abcd", ""), ("", "a", ""), ("x y", "z y", ""),
    ("same words", "same words", "same"), (HH + " same", HH + " same", HH), (" a", " b", ""),
    ("so it goes ", "so it goes on", "so it"),
]


@pytest.mark.parametrize("chosen,rejected,prompt", BEGINNINGS)
def test_the_prompt_of_texts_is_what_both_begin_with(chosen, rejected, prompt):
    assert dpo.shared_beginning(chosen, rejected) == dpo.shared_beginning(rejected, chosen) == prompt
    if not prompt:
        with pytest.raises(UserError, match="^here: (has no prompt, only .*|chosen is empty); --format can"):
            dpo.pair_rows({"chosen": chosen, "rejected": rejected}, "here")
    elif len(chosen) > len(prompt) < len(rejected):
        row = {"chosen": chosen, "rejected": rejected}
        found = dpo.pair_rows(row, "here")
        assert [side.turns for side in found] == [[prompt, text[len(prompt):]] for text in (chosen, rejected)]
        assert [side.said for side in found] == [[False, True]] * 2
    else:
        with pytest.raises(UserError, match="^here: (chosen|rejected) is empty; --format can leave rows out$"):
            dpo.pair_rows({"chosen": chosen, "rejected": rejected}, "here")


def test_a_question_under_another_name_is_no_prompt():
    """Texts that begin alike are not taken for whole dialogues where the row has another text, unless they are HH's."""
    row = {"chosen": "The answer is four", "rejected": "The sum is five"}
    with pytest.raises(UserError, match="^here: has no prompt, only question, chosen, rejected; --format"):
        dpo.pair_rows({"question": "two and two", **row}, "here")
    assert dpo.pair_rows({**row, "id": "a1", "score": 0.5}, "here")[0].turns == ["The", " answer is four"]
    whole = {"source": "harmless base", "rejected": HH + " no", "chosen": HH + " yes"}
    assert [side.turns for side in dpo.pair_rows(whole, "here")] == [[HH, " yes"], [HH, " no"]]


def test_messages_are_the_same_whatever_fields_they_have_beside():
    """Parquet gives null fields, Hub data sets ids."""
    asked, extra = says("hi"), lambda messages, **more: [{**message, **more} for message in messages]
    sides = {"chosen": extra(says("hi", "yo"), name=None), "rejected": extra(says("hi", "no"), id=7)}
    for prompt in ({}, {"prompt": asked}, {"prompt": extra(asked, name="u")}):
        assert made_texts([{**prompt, **sides}], chat_tokenizer()) == [(ASKED, "yo$", "no$")]
    with pytest.raises(UserError, match="^here: chosen has a message of the system where an answer should be$"):
        whole = {name: [SYSTEM, *says("hi", name)] for name in ("chosen", "rejected")}
        dpo.pair_rows({"prompt": asked, **whole}, "here")


# what a user gives -> prompt, chosen and rejected
ASKED, SYSTEM = ".u hi$\n.a ", {"role": "system", "content": "be"}
FORMS = [
    ({"prompt": "ab", "chosen": "cd", "rejected": "e"}, ("ab", "cd$", "e$")),
    ({"prompt": "", "chosen": "cd", "rejected": "e"}, ("^", "cd$", "e$")),
    ({"prompt": "ab", "chosen": " c<eos>", "rejected": "e<eos>d", "extra": 3}, ("ab", " c$", "e$d$")),
    ({"prompt": None, "chosen": "ab cd", "rejected": "ab ef"}, ("ab", " cd$", " ef$")),
    ({"prompt": says("hi"), "chosen": "yo", "rejected": "no"}, (ASKED, "yo$", "no$")),
    ({"prompt": says("hi"), "chosen": says("yo", first="assistant"), "rejected": says("no", first="assistant")},
     (ASKED, "yo$", "no$")),
    ({"prompt": says("hi"), "chosen": says("hi", "yo"), "rejected": says("hi", "no")}, (ASKED, "yo$", "no$")),
    ({"chosen": says("hi", "yo"), "rejected": says("hi", "no")}, (ASKED, "yo$", "no$")),
    ({"prompt": "hi", "chosen": says("hi", "yo"), "rejected": says("hi", "no")}, (ASKED, "yo$", "no$")),
    ({"prompt": "hi", "chosen": [SYSTEM, *says("hi", "yo")], "rejected": [SYSTEM, *says("hi", "no")]},
     (".s be$\n" + ASKED, "yo$", "no$")),
    ({"chosen": says("hi", "yo", "q", "a"), "rejected": says("hi", "yo", "q", "b")},
     (".u hi$\n.a yo$\n.u q$\n.a ", "a$", "b$")),
    ({"chosen": says("hi", "yo", "q", "a"), "rejected": says("hi", "yo", "r", "b")},
     (ASKED, "yo$(\n.u q$\n.a )a$", "yo$(\n.u r$\n.a )b$")),
    ({"chosen": says("hi", "yo"), "rejected": says("hi", "yo", "r", "b")}, (ASKED, "yo$", "yo$(\n.u r$\n.a )b$")),
    ({"prompt": says("hi"), "chosen": says("hi", "yo", "q", "a"), "rejected": says("hi", "yo", "q", "b")},
     (".u hi$\n.a yo$\n.u q$\n.a ", "a$", "b$")),
]


@pytest.mark.parametrize("row,lines", FORMS)
def test_every_form_of_pair(row, lines):
    """EOS once at the end of each output, also where the text has it; one prompt for both; nothing given is changed."""
    given = copy.deepcopy(row)
    assert made_texts([row], chat_tokenizer()) == [lines] and row == given
    if "(" not in lines[1] + lines[2] and lines[0] != "^":
        assert made_texts([row], chat_tokenizer(), seq2seq=True) == [lines]
    sides = dpo.load_pairs([row, row], None, "--dataset", None)[1]
    assert [side.where for side in sides] == ["--dataset, row 2"] * 2
    assert all(side.columns == {name: value for name, value in row.items() if value is not None} for side in sides)


def test_an_end_token_need_not_be_trained():
    """With --no-train-eos it goes from the end of each output, and from nowhere else."""
    for row, lines in FORMS:
        expected = (lines[0], *(output.removesuffix("$") for output in lines[1:]))
        assert made_texts([row], chat_tokenizer(), train_eos=False) == [expected]
    tokenizer = char_tokenizer()
    tokenizer.eos_token = None
    assert made_texts([GOOD], tokenizer, ends=(), train_eos=False) == [("a", "b", "c")]
    pairs, counts = made([{**GOOD, "chosen": "<eos>"}, GOOD, {"prompt": "ab", "chosen": "c", "rejected": "defgh"}],
                         train_eos=False, longest=6)
    assert [texts(found) for found in pairs] == [("a", "b", "c"), ("ab", "c", "defg")]
    assert counts == {"equal": 0, "dropped": 1, "cut": 1}


def test_columns_of_rows_of_messages_may_have_any_name():
    """What dpo.py does not read of a row is the metric function's."""
    for name, value in (("messages", says("x", "y")), ("text", "x"), ("turns", 3), ("completion", "x"), ("said", 1)):
        assert made_texts([{"prompt": "ab", "chosen": "cd", "rejected": "e", name: value}]) == [("ab", "cd$", "e$")]


BAD = [
    ({"prompt": "a", "chosen": "b"}, "has no rejected, only prompt, chosen; --format can map rows"),
    ({"prompt": "a", "rejected": "b"}, "has no chosen, only prompt, rejected; --format can map rows"),
    ({"chosen": None, "rejected": "b"}, "has no chosen, only rejected; "), ({}, "has no chosen, only nothing; "),
    ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen is empty; --format can leave rows out"),
    ({"prompt": "a", "chosen": " ", "rejected": "b"}, "chosen is empty; --format can leave rows out"),
    ({"prompt": "a", "chosen": "b", "rejected": "\n"}, "rejected is empty"),
    ({"chosen": says("a", " "), "rejected": says("a", "b")}, "chosen is empty"),
    ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected is empty"),
    ({"prompt": says("a"), "chosen": [], "rejected": says("b", first="assistant")}, "chosen is empty"),
    ({"chosen": [], "rejected": says("a", "b")}, "chosen is empty"),
    ({"prompt": "a", "chosen": says("a", "b"), "rejected": []}, "rejected is empty"),
    ({"chosen": says("a"), "rejected": says("a", "b")}, "chosen is empty"),
    ({"chosen": says("a", "b"), "rejected": says("a", "")}, "rejected is empty"),
    ({"prompt": says("a"), "chosen": "", "rejected": "c"}, "chosen is empty"),
    ({"prompt": "a", "chosen": 3, "rejected": "b"}, "chosen is a text or a list of messages, not int 3"),
    ({"prompt": "a", "chosen": "b", "rejected": [1, 2]}, "rejected is a text or a list of messages, not list [1, 2]"),
    ({"prompt": "a", "chosen": {"role": "user"}, "rejected": "b"}, "chosen is a text or a list of messages, not dict"),
    ({"prompt": "a", "chosen": True, "rejected": "b"}, "chosen is a text or a list of messages, not bool True"),
    ({"prompt": 3, "chosen": "b", "rejected": "c"}, "what is said must be texts, not int 3"),
    ({"prompt": ["a"], "chosen": "b", "rejected": "c"}, "what is said must be texts, not list"),
    ({"chosen": says("a", 7), "rejected": says("a", "b")}, "what is said must be texts, not int 7"),
    ({"chosen": says(None, "b"), "rejected": says(None, "c")}, "what is said must be texts, not NoneType"),
    ({"chosen": says("a", "b"), "rejected": "b"}, "chosen and rejected must both be texts, or both lists of messages"),
    ({"chosen": "b", "rejected": says("a", "b")}, "chosen and rejected must both be texts, or both lists of messages"),
    ({"chosen": says("a", "b"), "rejected": says("c", "b")},
     "chosen and rejected begin with different messages, and there is no prompt"),
    ("a text", "must be an object with columns, not str 'a text'"),
    (None, "must be an object with columns, not None"),
    (["a", "b"], "must be an object with columns, not list"),
]
GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize("row,problem", BAD, ids=lambda value: str(value)[:60])
def test_a_row_that_is_no_pair_is_one_line_that_names_it(row, problem, tmp_path):
    with pytest.raises(UserError) as error:
        dpo.load_pairs([GOOD, row], None, "--dataset", None)
    assert str(error.value).startswith(f"--dataset, row 2: {problem}") and "\n" not in str(error.value)
    if isinstance(row, dict):
        path = str(tmp_path / "rows.jsonl")
        Path(path).write_text("".join(json.dumps(one) + "\n" for one in (GOOD, GOOD, row)))
        with pytest.raises(UserError) as error:
            dpo.load_pairs(None, path, "--eval-dataset", None)
        assert str(error.value).startswith(f"--eval-dataset {path}, row 3: {problem}")


def test_what_is_no_list_of_pairs_is_refused(tmp_path):
    for given in (GOOD, "a text", 3):
        with pytest.raises(UserError, match="^--dataset: is not a list of rows, but "):
            dpo.load_pairs(given, None, "--dataset", None)
    with pytest.raises(UserError, match="^--dataset: holds no rows$"):
        dpo.load_pairs([], None, "--dataset", None)
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(UserError, match="^--dataset .*rows.jsonl: holds no rows$"):
        dpo.load_pairs(None, str(tmp_path / "rows.jsonl"), "--dataset", None)
    assert len(dpo.load_pairs(iter([GOOD, GOOD]), None, "--dataset", None)) == 2


# shows a bug: dict(row) is inside of the `try` that is for the user's function
def test_a_row_that_is_no_object_is_not_the_fault_of_a_format_function():
    for row in ("ab", ["a", "b"], 3):
        with pytest.raises(UserError, match="^--dataset, row 1: must be an object with columns, not"):
            dpo.load_pairs([row], None, "--dataset", lambda row: row)


def test_format_functions_map_rows_and_leave_them_out():
    rows = [{"q": "a", "good": "b", "bad": "c"}, {"q": "skip"}, {"q": "d", "good": "e", "bad": "f"}]
    given = copy.deepcopy(rows)

    def swap(row):
        q = row.pop("q")
        return None if q == "skip" else {"prompt": q, "chosen": row["good"], "rejected": row["bad"]}

    found = dpo.load_pairs(rows, None, "--dataset", swap)
    assert [[side.turns for side in sides] for sides in found] == [[["a", "b"], ["a", "c"]], [["d", "e"], ["d", "f"]]]
    assert [sides[0].where for sides in found] == ["--dataset, row 1", "--dataset, row 3"] and rows == given
    for function, problem in ((lambda row: None, ": --format left out every row$"),
                              (lambda row: row["x"], ", row 1: the --format function raised KeyError: 'x'$"),
                              (lambda row: "ab", ", row 1: must be an object with columns, not str 'ab'$")):
        with pytest.raises(UserError, match="^--dataset" + problem):
            dpo.load_pairs(rows, None, "--dataset", function)


CORPUS = ["the cat sat on the mat. the dog ate the cat", "why did the cat sit? no one can tell, said the dog\n",
          "User, hi there\nBot, hello\nUser, bye\nBot, bye"]
TOKENIZERS = {"char": char_tokenizer, "llama": lambda: with_specials("<bos> $A"),
              "t5": lambda: with_specials("$A <eos>"), "bpe": lambda: bpe_tokenizer(CORPUS, 90)}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("seq2seq", [False, True])
def test_a_prompt_has_the_tokens_that_it_has_alone(kind, seq2seq):
    """As in sampling, for both outputs, also where it would have others together with one of them; the texts come back,
    and the end token stands once, at the end."""
    tokenizer = TOKENIZERS[kind]()
    rows = [{"prompt": "the cat", "chosen": " sat", "rejected": "s sat"}, {"prompt": "the ca", "chosen": "t sat",
            "rejected": "n"}, {"prompt": "why did the d", "chosen": "og sit", "rejected": " ate"},
            {"chosen": "the cat sat on", "rejected": "the cat sat on the mat"},
            {"chosen": "the dog ate", "rejected": "the dogs ate"}, {"prompt": " ", "chosen": "the", "rejected": "a"}]
    if kind == "bpe":
        assert tokenizer("the cat").input_ids[: len(ids := tokenizer("the ca").input_ids)] != ids
    eos = tokenizer.eos_token_id
    pairs, counts = made(rows, tokenizer, seq2seq, ends=(eos,))
    assert len(pairs) == len(rows) and not any(counts.values())
    for row, found in zip(rows, pairs):
        prompt = row.get("prompt", dpo.shared_beginning(row["chosen"], row["rejected"]))
        (sampled,), _ = encode_prompts([{"prompt": prompt}], tokenizer, 200, "left", seq2seq)
        assert list(found.prompt) == sampled
        for name, output, trained in (("chosen", found.chosen, found.chosen_trained),
                                      ("rejected", found.rejected, found.rejected_trained)):
            whole = row[name] if "prompt" not in row else prompt + row[name]
            assert output[-1] == eos not in output[:-1] and all(trained) and len(trained) == len(output)
            if not seq2seq:
                assert tokenizer.decode([*sampled, *output], skip_special_tokens=True) == whole
            else:  # an output of its own, as the decoder writes it
                assert list(output[:-1]) == tokenizer(whole[len(prompt):], add_special_tokens=False).input_ids


def test_the_tokens_of_a_chat_are_those_of_its_template():
    row = {"prompt": says("hi", "yo", "q"), "chosen": "aa", "rejected": "b"}
    tokenizer = chat_tokenizer()
    ((prompt, chosen, rejected, *_),), _ = made([row], tokenizer)
    assert list(prompt) == chat_ids(row["prompt"], tokenizer, add_generation_prompt=True)
    for output, said in ((chosen, "aa"), (rejected, "b")):
        whole = chat_ids([*row["prompt"], *says(said, first="assistant")], tokenizer)
        assert [*prompt, *output] == whole[: len(prompt) + len(output)] and output[-1] == EOS


def test_a_template_that_does_not_write_a_pair_as_one_prompt_is_refused():
    """It rewrites earlier turns by what follows them."""
    rewriting = "{% for m in messages %}{{ messages | length }}{{ m.content }}<eos>{% endfor %}"
    tokenizer = chat_tokenizer(rewriting.replace("{{ messages | length }}", "{{ '!' if loop.last else '.' }}"))
    row = {"chosen": says("hi", "yo", "q", "a"), "rejected": says("hi", "no", "r", "b")}
    with pytest.raises(UserError, match="^--dataset, row 1: the chat template does not write .*; give pairs that"):
        made([row], tokenizer)
    row = {"prompt": says("hi"), "chosen": says("yo", first="assistant"), "rejected": says("hi", "no")}
    with pytest.raises(UserError, match="^--dataset, row 1: rejected has a message of the user where an answer"):
        made([row])
    with pytest.raises(UserError, match="^--dataset, row 1: .*lists of messages and the tokenizer has no chat templ"):
        made([{"prompt": says("hi"), "chosen": "yo", "rejected": "no"}], char_tokenizer())


def test_pairs_of_equal_outputs_are_left_out_and_counted():
    """Also those that are equal once they are cut."""
    rows = [GOOD, {**GOOD, "rejected": "b"}, {"chosen": "ab ab", "rejected": "ab ab"},
            {"prompt": "ab", "chosen": "same beginnings", "rejected": "same beginning, no"},
            {"prompt": says("a"), "chosen": "b", "rejected": "b"}]
    pairs, counts = made(rows, longest=8)
    assert [texts(found) for found in pairs] == [("a", "b$", "c$")] and counts == {"equal": 4, "dropped": 0, "cut": 0}
    pairs, counts = made(rows, longest=40)
    assert len(pairs) == 2 and counts == {"equal": 3, "dropped": 0, "cut": 0}


LONG = {  # prompt, chosen and rejected, and what is left of them in 8 tokens, cut on the left and on the right
    ("abcd", "efg", "e"): (("abcd", "efg$", "e$"), ("abcd", "efg$", "e$"), 0),
    ("abcdefghij", "klm", "n"): (("ghij", "klm$", "n$"), ("abcd", "klm$", "n$"), 1),
    ("abcdefghij", "n", "klm"): (("ghij", "n$", "klm$"), ("abcd", "n$", "klm$"), 1),
    ("abcdefg", "x", "y"): (("bcdefg", "x$", "y$"), ("abcdef", "x$", "y$"), 1),
    ("abcdef", "klmnopqrst", "x"): (("cdef", "klmn", "x$"), ("abcd", "klmn", "x$"), 1),
    ("ab", "x", "klmnopqrst"): (("ab", "x$", "klmnop"), ("ab", "x$", "klmnop"), 1),
    ("", "klmnopqrst", "x"): (("^", "klmnopq", "x$"), ("^", "klmnopq", "x$"), 1),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seq2seq", [False, True])
def test_a_long_prompt_gives_way_but_keeps_half_of_the_window(side, seq2seq):
    """The same prompt for both outputs, that of the longer one."""
    for given, (left, right, cut) in LONG.items():
        row = dict(zip(("prompt", "chosen", "rejected"), given))
        pairs, counts = made([row], seq2seq=seq2seq, longest=8, side=side)
        assert [texts(found) for found in pairs] == [left if side == "left" else right]
        assert counts == {"equal": 0, "dropped": 0, "cut": cut}


def test_special_tokens_outlive_a_cut_and_what_has_no_room_is_dropped():
    row = {"prompt": "abcdefghij", "chosen": "xy", "rejected": "z"}
    assert made_texts([row], with_specials("<bos> $A"), longest=8) == [("^ghij", "xy$", "z$")]
    assert made_texts([row], with_specials("<bos> $A"), longest=8, side="right") == [("^abcd", "xy$", "z$")]
    assert made_texts([row], with_specials("$A <eos>"), longest=8, seq2seq=True) == [("ghij$", "xy$", "z$")]
    pairs, counts = made([row], with_specials("<bos> $A <eos>"), longest=3, seq2seq=True)
    assert not pairs and counts == {"equal": 0, "dropped": 1, "cut": 0}
    assert not made([row], with_specials("<bos> $A <eos>"), longest=2, seq2seq=True)[0]
    chat = {"prompt": says("hi", "yo", "q"), "chosen": "rst", "rejected": "u"}
    assert made_texts([chat], chat_tokenizer("<bos>" + CHATML), longest=12) == [("^ q$\n.a ", "rst$", "u$")]


def test_no_output_is_cut_away_and_no_pair_is_too_long():
    draw = random.Random(0)
    for seq2seq, side in product((False, True), ("left", "right")):
        for _ in range(25):
            longest = draw.randrange(2, 15)
            rows = [{"prompt": "".join(draw.choices(LETTERS, k=draw.randrange(20))),
                     **{name: first + "".join(draw.choices(LETTERS, k=draw.randrange(20)))
                        for name, first in (("chosen", "A"), ("rejected", "B"))}} for _ in range(20)]
            pairs, counts = made(rows, seq2seq=seq2seq, longest=longest, side=side)
            assert len(pairs) == 20 and counts["dropped"] == counts["equal"] == 0
            over = 0
            for row, found in zip(rows, pairs):
                before, *whole = (parsed(text)[0] for text in (row["prompt"] or "^", row["chosen"] + "$",
                                                               row["rejected"] + "$"))
                prompt, *outputs = map(list, found[:3])
                assert prompt == (before[-len(prompt):] if side == "left" else before[: len(prompt)])
                most = max(map(len, whole))
                over += len(before) + most > longest
                assert len(prompt) == min(len(before), max(longest // 2, longest - most, 1))
                for output, all_of_it in zip(outputs, whole):
                    assert output and len(prompt) + len(output) <= longest
                    assert output == all_of_it[: longest - len(prompt)]
                assert found.chosen_trained == bytes([1] * len(outputs[0]))
                assert found.rejected_trained == bytes([1] * len(outputs[1]))
            assert counts["cut"] == over


def test_a_later_turn_has_no_say_in_how_much_of_the_other_output_stays():
    """The longer output trains its first token and its last ones, and has no room for those."""
    sides = [Example([3] * 10, [4] * 8, [1] * 8), Example([3] * 10, [5] * 12, [1] + [0] * 9 + [1] * 2)]
    prompt = {len(found.prompt) for found in dpo.fit_pair(sides, 12, "left", 0, 0)}
    assert prompt == {6}, "half of the window is for the outputs"


def sides_of(rows):
    return [(row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]) for row in rows]


def test_walks_are_paired_with_worse_ones_from_the_same_start():
    walks = random_walks(3)
    known, score = set(walks.walks), dict(zip(walks.walks, walks.reward(walks.walks)))
    found, held = dpo.walk_pairs(walks, 3, 0.2)
    for better, worse in sides_of(found + held):
        assert {better, worse} <= known and better[0] == worse[0] and score[better] > score[worse]
        assert set(better + worse) <= set(NODES)
    assert all(len(row["prompt"]) == 1 for row in found + held)
    assert len(found) == len(set(sides_of(found))) and len(found) > len(known) > len(held) > 20
    assert dpo.walk_pairs(walks, 3, 0.2) == (found, held) and dpo.walk_pairs(walks, 4, 0.2)[0] != found
    few, none = dpo.walk_pairs(walks, 3, 0.0, partners=1)
    every, _ = dpo.walk_pairs(walks, 3, 0.0, partners=1000)
    assert none == [] and 0 < len(few) <= len(known) and len(few) < len(found) < len(every)
    assert set(sides_of(every)) == {(a, b) for a in known for b in known if a[0] == b[0] and score[a] > score[b]}
    reached, possible = (set(sum(sides_of(rows), ())) for rows in (few, every))
    assert reached == possible, "each has a part"


def test_held_out_pairs_of_walks_are_of_walks_that_training_has_not_seen():
    for seed in (1, 2):
        found, held = (set(sum(sides_of(rows), ())) for rows in dpo.walk_pairs(random_walks(seed), seed, 0.15))
        assert not found & held and 0.08 < len(held) / len(found | held) < 0.2


def test_all_pairs_of_a_prompt_are_on_one_side():
    """Prompts of texts and of messages; about the share that is wanted, and never all."""
    rows = [{"prompt": f"p{i % 23}", "chosen": f"a{i}", "rejected": "b"} for i in range(100)]
    rows += [{"prompt": says(f"m{i % 7}"), "chosen": f"a{i}", "rejected": "b"} for i in range(21)]
    rows = dpo.load_pairs(rows, None, "--dataset", None)
    asked = lambda some: {str(row.messages[:1] if row.messages else row.turns[0]) for row, _ in some}  # noqa: E731
    for share, most, low, high in ((0.2, 1000, 25, 29), (0.9, 1000, 109, 120), (0.5, 10, 10, 14), (0.0, 1000, 0, 0)):
        kept, held = dpo.split(rows, share, most, seed=1)
        assert not asked(kept) & asked(held) and len(kept) + len(held) == len(rows) and low <= len(held) <= high
        assert [row for row in rows if row in kept] == kept and [row for row in rows if row in held] == held
        assert dpo.split(rows, share, most, seed=1) == (kept, held)
    assert dpo.split(rows, 0.2, 1000, 1) != dpo.split(rows, 0.2, 1000, 2)
    assert dpo.split(rows[:1], 0.5, 9, 1) == (rows[:1], []), "something is left to train on"


def test_what_was_left_out_is_said_and_logged(model_path, tmp_path, capsys):
    rows = [*ROWS, {**GOOD, "rejected": "b"}, {"prompt": "x" * 50, "chosen": "ab", "rejected": "cd"}]
    held = [GOOD, {**GOOD, "rejected": "b"}]
    start = rows_of(run(tmp_path, model_path("gpt2"), rows, held_out_pairs=held, max_steps=1))[0]
    assert group(start, "data/") == {"pairs": 12, "held_out": 1, "equal": 1, "dropped": 0, "cut": 1}
    assert ("12 pairs to train on, 1 held out; 2 have equal outputs and were left out; 1 to train on have more than 40 "
            "tokens and were cut\n") in capsys.readouterr().out
    run(tmp_path, model_path("gpt2"), ROWS, held_out=0.0, max_steps=1, name="all")
    assert "11 pairs to train on, 0 held out\n" in capsys.readouterr().out


def test_data_that_cannot_be_trained_on_is_refused(model_path, tmp_path):
    same = {**GOOD, "rejected": "b"}
    (tmp_path / "same.json").write_text(json.dumps([same, same]))
    for rows, flags, problem in (
            ([same, same], {}, "--dataset : none of its [12] rows has two different outputs"),
            (None, dict(dataset=f"{tmp_path}/same.json"), "--dataset .*same.json: none of its [12] rows has two diff"),
            ([GOOD], dict(eval_dataset=f"{tmp_path}/same.json"), "--eval-dataset .*json: none of its 2 rows has two d"),
            ([GOOD], dict(held_out_pairs=[same]), "--eval-dataset : none of its 1 rows has two different outputs"),
            ([GOOD], dict(eval_dataset="none.csv"), "--eval-dataset none.csv: no such file"),
            ([GOOD], dict(max_length=65), "--max-length 65: the model has 64 positions"),
            ([GOOD, {"chosen": "a"}], {}, "--dataset, row 2: has no rejected, only chosen; ")):
        with pytest.raises(UserError, match="^" + problem) as error:
            run(tmp_path, model_path("gpt2"), rows, **flags)
        assert "\n" not in str(error.value)
    bpe_tokenizer(CORPUS, 70).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="^the tokenizer has 70 tokens and .* embeds fewer: give its own --tokenizer"):
        run(tmp_path, model_path("gpt2"), tokenizer=str(tmp_path / "tokenizer"))


def test_files_format_and_metric_functions(model_path, tmp_path, monkeypatch):
    """--dataset, --eval-dataset, --format, --metric, --eval-prompts and --stop from the command line."""
    (tmp_path / "users.py").write_text(
        "def shout(row):\n    return {**row, 'chosen': row['chosen'] + '!'} if row['n'] % 3 else None\n\n"
        "def count(outputs, n):\n    return {'score': [len(o) + k for o, k in zip(outputs, n)]}\n")
    rows = [{"prompt": "x" * n, "chosen": "y", "rejected": "z", "n": n} for n in range(1, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held.json").write_text(json.dumps(rows[:4]))
    calls = recorded(monkeypatch)
    words = ["--model", model_path("gpt2"), "--dataset", f"{tmp_path}/rows.jsonl", "--eval-dataset",
             f"{tmp_path}/held.json", "--format", f"{tmp_path}/users.py:shout", "--metric",
             f"{tmp_path}/users.py:count", "--max-new-tokens", "4", "--output-dir", f"{tmp_path}/run", "--no-pack"]
    dpo.train(parse(dpo.Args, dpo.preset, words))
    assert sorted(texts(one) for one in sum(calls["train"], [])) == sorted(
        ("x" * n, "y!$", "z$") for n in (1, 2, 4, 5, 7, 8))
    assert [[texts(one) for one in some] for some in calls["eval"]] == [
        [("x" * n, "y!$", "z$") for n in (1, 2, 4)]] * 2
    assert rows_of(tmp_path / "run")[0]["eval/score"] >= 1


def test_a_classifier_measures_score(monkeypatch, model_path, tmp_path):
    def load(path, flag, device, batch_size):
        assert (path, flag) == ("some/classifier", "--metric")
        return lambda samples: [len(sample) / 10 for sample in samples]

    monkeypatch.setattr("common.generation.load_classifier", load)
    folder = run(tmp_path, model_path("gpt2"), num_eval_prompts=2, metric="some/classifier", max_steps=1)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert samples and all(sample["score"] == len(sample["prompt"] + sample["output"]) / 10 for sample in samples)


def test_a_tokenizer_without_an_end_token(model_path, tmp_path, capsys):
    tokenizer = char_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    run(tmp_path, model_path("gpt2"), tokenizer=str(tmp_path / "tokenizer"), max_steps=1)
    assert "the tokenizer has no EOS, so that outputs are not taught to end" in capsys.readouterr().out


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags,problem", [
    (dict(dataset=None), "--model m needs a --dataset: a file, a Hub data set, or randomwalks"),
    (dict(model=None), "--dataset pairs.jsonl needs a --model"),
    (dict(model=None, dataset=None, tokenizer="t"), "--tokenizer needs a --model: random walks has its own"),
    (dict(max_length=1), "--max-length 1: must be at least 2"),
    (dict(label_smoothing=0.5), "--label-smoothing 0.5: must be below 0.5"),
    (dict(label_smoothing=-0.1), "--label-smoothing -0.1: must be 0 or more"),
    *[(dict(label_smoothing=0.1, loss=loss), f"--label-smoothing is for --loss sigmoid and robust, not {loss}")
      for loss in ("ipo", "hinge", "simpo")],
    (dict(precompute_reference=True, loss="simpo"), "--precompute-reference: --loss simpo has no reference"),
    (dict(held_out=1.0), "--held-out 1.0: leaves nothing to train on"),
    (dict(held_out=1.5), "--held-out 1.5: must be from 0 to 1"), (dict(held_out=math.nan), "--held-out nan: must be"),
    (dict(adam_beta1=-0.1), "--adam-beta1 -0.1: must be from 0 to 1"),
    (dict(adam_beta2=1.1), "--adam-beta2 1.1: must be from 0 to 1"),
    (dict(beta=math.inf), "--beta inf: must be more than 0"),
    (dict(learning_rate=math.inf), "--learning-rate inf: must be more than 0"),
    (dict(num_layers_unfrozen=1, lora_rank=2), "--num-layers-unfrozen: leave it out, --lora-rank"),
    (dict(num_layers_unfrozen=0), "--num-layers-unfrozen 0: must be -1 for all, or at least 1"),
    (dict(eval_temperature=[-1.0]), "--eval-temperature -1.0: has a value that means nothing"),
    (dict(eval_top_p=[0.0]), "--eval-top-p 0.0: has a value"), (dict(eval_top_k=[-1]), "--eval-top-k -1: has a value"),
    (dict(stop=[""]), "--stop '': has a value"),
    *[(dict(**{name: 0}), f"--{name.replace('_', '-')} 0: must be more than 0") for name in (
        "epochs", "batch_size", "micro_batch_size", "max_steps", "learning_rate", "adam_epsilon", "beta",
        "max_grad_norm", "max_new_tokens", "generation_batch_size", "eval_every", "eval_samples", "prompt_words",
        "num_eval_rows", "keep_checkpoints", "shard_size")],
    *[(dict(**{name: -1}), f"--{name.replace('_', '-')} -1: must be 0 or more") for name in (
        "seed", "warmup_steps", "save_every", "weight_decay", "lora_rank", "num_eval_prompts", "label_smoothing",
        "simpo_gamma", "sft_coef")]])
def test_settings_that_cannot_work_are_refused(flags, problem):
    with pytest.raises(UserError, match="^" + re.escape(problem)) as error:
        dpo.check(dpo.Args(**{"dataset": "pairs.jsonl", "model": "m", **flags}))
    assert "\n" not in str(error.value)


def test_settings_that_work_are_let_through():
    for flags in (dict(), dict(dataset="randomwalks"), dict(model="m", dataset="pairs.jsonl", lora_rank=2),
                  dict(model="m", dataset="randomwalks"), dict(loss="robust", label_smoothing=0.49, max_length=2),
                  dict(loss="simpo", simpo_gamma=0.0, beta=2.5), dict(precompute_reference=True, loss="ipo"),
                  dict(held_out=0.0, num_eval_prompts=0, logprobs="mean", sft_coef=1.0),
                  dict(model="m", dataset="pairs.jsonl", num_layers_unfrozen=1, precompute_reference=True)):
        dpo.check(dpo.Args(**flags))
    dpo.check(dpo.Args(model="m"), pairs=ROWS)
    with pytest.raises(UserError, match="^--dataset .*needs a --model"):
        dpo.check(dpo.Args(), pairs=ROWS)


def test_arguments_have_the_tasks_defaults():
    assert dpo.arguments().max_length == dpo.RANDOM_WALKS["max_length"] == 32
    assert dpo.arguments(epochs=3).epochs == 3
    assert dpo.arguments(dataset="randomwalks", model="m").batch_size == dpo.RANDOM_WALKS["batch_size"]
    assert dpo.arguments(model="m", dataset="f.jsonl") == dpo.Args(model="m", dataset="f.jsonl")
    assert parse(dpo.Args, dpo.preset, ["--epochs", "2"]) == dpo.arguments(epochs=2)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """Random walks for two steps, by a copy of the script elsewhere, with common/ beside it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(ROOT / "dpo.py", folder)
    shutil.copytree(ROOT / "common", folder / "common", ignore=shutil.ignore_patterns("__pycache__"))
    done = run_forked("dpo.py", "--max-steps", "2", "--eval-samples", "1", "--num-eval-rows", "50", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "dpo-randomwalks-1", done


def test_the_command_alone(walked):
    """What it says, and what it writes: a model that plain transformers load, better than where it started."""
    folder, done = walked
    lines = done.stdout.splitlines()
    assert any(re.match(r"\d+ pairs to train on, \d+ held out", line) for line in lines)
    assert "before training" in lines and "after training" in lines and done.stderr == ""
    assert re.search(r"preference_loss 0\.693 -> 0\.\d{3}; .*optimality \d\.\d{3} -> .*\d$", lines[-2])
    assert re.fullmatch("model in .*/model", lines[-1])
    rows = rows_of(folder)
    assert [row["samples"] for row in rows] == [0, 64, 128]
    assert rows[1]["train/preference_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[2]["eval/loss"] < rows[0]["eval/loss"]
    assert abs(rows[0]["eval/kl"]) < 1e-4
    found, held = dpo.walk_pairs(random_walks(1), 1, dpo.RANDOM_WALKS["held_out"])
    assert rows[0]["data/pairs"] == len(found) and rows[0]["data/held_out"] == 50 < len(held)
    assert not rows[0]["data/equal"]
    lm = plain(folder / "model")
    assert lm.config.vocab_size == plain(folder / "start").config.vocab_size
    assert not all(torch.equal(a, b) for a, b in zip(lm.parameters(), plain(folder / "start").parameters()))


def test_an_empty_prompt_without_a_token_for_it_is_no_fault_of_a_chat_template():
    tokenizer = char_tokenizer(bos=False)
    tokenizer.eos_token = None
    rows = dpo.load_pairs([{"prompt": "", "chosen": "ab", "rejected": "cd"}], None, "--dataset", None)
    with pytest.raises(UserError, match="row 1: the prompt is empty, and the tokenizer has no BOS or EOS for it$"):
        dpo.make_pairs(rows, tokenizer, (), False, 20, dpo.Args())


def test_defaults_depend_on_the_loss_and_the_task():
    """Flags win; a model with data of its own has nothing of random walks."""
    for loss, walks, own in (("sigmoid", 1.0, 0.1), ("hinge", 1.0, 0.1), ("ipo", 1.0, 1.0), ("simpo", 2.0, 2.0)):
        assert dpo.Args(loss=loss).beta == own and dpo.Args(loss=loss, beta=0.3).beta == 0.3
        assert dpo.arguments(loss=loss).beta == walks and dpo.arguments(loss=loss, beta=0.3).beta == 0.3
        args = dpo.arguments(loss=loss, model="m", dataset="rows.jsonl")
        assert args.beta == own and args.sft_coef == 0.0 and args.epochs == 1


def test_what_is_logged_is_what_the_readme_says(walked):
    assert set().union(*rows_of(walked[0])) == documented_metrics("dpo.py") - {"eval/score"}


def test_a_mistake_is_one_line_and_exit_code_2(model_path, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(GOOD) + '\n{"prompt": "a", "chosen": "", "rejected": "b"}\n')
    done = run_forked("dpo.py", "--model", model_path("gpt2"), "--dataset", str(tmp_path / "pairs.jsonl"),
                      "--output-dir", str(tmp_path / "run"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (f"dpo.py: error: --dataset {tmp_path}/pairs.jsonl, row 2: chosen is empty; "
                           "--format can leave rows out\n")

"""ilql.py against plain Python and plain transformers on single, unpadded rows, and as its users run it.

Trajectories are written as in test_sft.py, a character a token: `ab[cd$]` has the prompt "ab" and the actions "c", "d"
and EOS; what stands before > goes to the encoder. Beside it stand the rewards after each action, and what has been said
up to the state after the last one, "" where there is none.
"""

import copy
import json
import math
import os
import random
import re
import statistics

import numpy
import pytest
import torch
import transformers
from conftest import CONFIGS, ROOT, VOCABULARY, char_tokenizer, documented_metrics, run_forked, tiny_lm
from safetensors.torch import load_file
from test_sft import (
    CHATML,
    CPU,
    EOS,
    LETTERS,
    assert_same_gradients,
    chat_tokenizer,
    gradients,
    marked,
    numbers,
    plain,
    rows_of,
    says,
    with_specials,
)

import common.models
import ilql
from common.cli import UserError, parse
from common.distributed import full_state_dict, gather_rows, generator, init
from common.generation import noise, sample_texts
from common.models import LanguageModel, LogitRules, TokenHead, export, load_heads, make_head, prepare
from common.randomwalks import random_walks
from common.samples import Example, load_samples

# --- brute force ------------------------------------------------------------------------------------------------------


def parsed(line: str) -> tuple[list[int], list[bool]]:
    """Token ids of a marked text, and which are actions; ? is the pad token, which may be sampled."""
    ids, said, acts = [], [], False
    for mark in line:
        if mark in "[]":
            acts = mark == "["
        elif mark != ">":
            ids.append(("?^$" + LETTERS).index(mark))
            said.append(acts)
    return ids, said


def texts_of(ids) -> str:
    return "".join(("?^$" + LETTERS)[token] for token in ids)


def made(line: str, rewards: list[float], after: str = "") -> ilql.Trajectory:
    """The trajectory that is written so."""
    ids, said = parsed(line)
    first = len(parsed(line.split(">")[0])[0]) if ">" in line else said.index(True)
    before, _, behind = after.partition(">")
    return ilql.Trajectory(ids[:first], ids[first:], [i for i, flag in enumerate(said[first:]) if flag], rewards,
                           parsed(before)[0], parsed(behind)[0])


def written(item: ilql.Trajectory, seq2seq: bool = False) -> tuple[str, list[float], str]:
    """How a trajectory is written."""
    trained = [place in item.actions for place in range(len(item.output))]
    assert sum(trained) == len(item.actions) == len(item.rewards) and list(item.actions) == sorted(item.actions)
    after = texts_of(item.next_prompt) + (">" if seq2seq and item.next_prompt else "") + texts_of(item.next_output)
    return marked(Example(list(item.prompt), list(item.output), trained), seq2seq), list(item.rewards), after


def states_of(lm, line: str) -> tuple[list[int], list[bool], list, list]:
    """Of a line by itself, by transformers alone: its tokens (the decoder's), which are actions, and the states before
    each of them and after the last, as hidden states and as logits. A causal model's first token has none before."""
    ids, said = parsed(line.rpartition(">")[2])
    if lm.config.is_encoder_decoder:
        out = lm(input_ids=torch.tensor([parsed(line.split(">")[0])[0]]), output_hidden_states=True,
                 decoder_input_ids=torch.tensor([[lm.config.decoder_start_token_id, *ids]]))
        return ids, said, list(out.decoder_hidden_states[-1][0]), list(out.logits[0])
    out = lm(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return ids, said, [None, *out.hidden_states[-1][0]], [None, *out.logits[0]]


def head_output(head, state: torch.Tensor) -> torch.Tensor:
    return (head[2].weight @ (head[0].weight @ state + head[0].bias).relu() + head[2].bias).double()


def brute_force(model: LanguageModel, lines: list[tuple], args: ilql.Args) -> dict[str, torch.Tensor]:
    """All that `batch_loss_and_gradient` returns, action by action, in plain Python; `loss/total` has its gradient."""
    lm, heads, rows = model.lm, model.heads, []
    names = ["q1", "q2"] if args.two_qs else ["q1"]
    for line, rewards, after in lines:
        tokens, said, states, logits = states_of(lm, line)
        places = [place for place, flag in enumerate(said) if flag]
        assert len(places) == len(rewards)
        for place, reward, later in zip(places, rewards, [*places[1:], None]):
            following = 0.0
            if later is not None:
                following = head_output(heads["v"], states[later]).item()
            elif after:
                following = head_output(heads["v"], states_of(lm, after)[2][-1]).item()
            target = reward + args.gamma * following
            state, token = states[place], tokens[place]
            every = [head_output(heads[name], state) for name in names]
            target_q = min(head_output(heads[f"target_{name}"], state)[token].item() for name in names)
            value = head_output(heads["v"], state)[0]
            advantage = target_q - value.item()
            share = args.tau if advantage > 0 else 1 - args.tau
            logprob = logits[place].double().log_softmax(-1)[token]
            row = {"loss/q": sum((q[token] - target) ** 2 for q in every),
                   "loss/v": share * (target_q - value) ** 2,
                   "loss/cql": sum(q.exp().sum().log() - q[token] for q in every),
                   "loss/awac": -min(math.exp(args.awac_beta * advantage), 100) * logprob}
            row["loss/total"] = (row["loss/q"] + row["loss/v"] + args.cql_scale * row["loss/cql"]
                                 + args.awac_scale * row["loss/awac"])
            rows.append(row | {"loss/lm": -logprob, "value/q": every[0][token], "value/target_q": target_q,
                               "value/v": value, "value/td_target": target, "value/advantage": advantage})
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def reference(model, lines, args) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Numbers and gradients by brute force."""
    found = brute_force(model, lines, args)
    found["loss/total"].backward()
    return {name: float(torch.as_tensor(value).detach()) for name, value in found.items()}, gradients(model)


def valued(lm, two_qs: bool = True) -> LanguageModel:
    """A model with heads that say something, and targets that say something else."""
    model = LanguageModel(lm if not isinstance(lm, str) else tiny_lm(lm))
    model.heads["v"] = make_head(model.width, 1)
    for name in ("q1", "q2") if two_qs else ("q1",):
        model.heads[name] = TokenHead(model.width, VOCABULARY)
        model.heads[f"target_{name}"] = TokenHead(model.width, VOCABULARY).requires_grad_(False)
    torch.manual_seed(1)
    for parameter in model.heads.parameters():
        parameter.data.normal_(0, 0.1)
    return model


def expectile(values: list[float], tau: float) -> float:
    """The v at which tau E[(x - v)+] is (1 - tau) E[(v - x)+], by bisection."""
    low, high = min(values), max(values)
    for _ in range(60):
        v = (low + high) / 2
        if sum((tau if x > v else 1 - tau) * (x - v) for x in values) > 0:
            low = v
        else:
            high = v
    return low


def trajectories_of(samples, tokenizer=None, seq2seq=False, longest=64, ends=(EOS,), **flags):
    """`make_trajectories` of what a user gives: trajectories, rows dropped, rows cut."""
    args = ilql.Args(**{"normalize_rewards": "none", **flags})
    rows = load_samples(samples, None, "--dataset", None)
    return ilql.make_trajectories(rows, tokenizer or chat_tokenizer(), ends, seq2seq, longest, args)


def written_of(samples, *arguments, seq2seq=False, **options) -> list[tuple[str, list[float], str]]:
    return [written(item, seq2seq) for item in trajectories_of(samples, *arguments, seq2seq=seq2seq, **options)[0]]


# --- losses -----------------------------------------------------------------------------------------------------------

TARGET_Q, VALUE, REWARD = [0.5, -1.0, 2.0, 0.25], [0.75, -2.0, 1.0, 0.125], [1.0, 0.0, -0.5, 3.0]


def tensors(*lists):
    return [torch.tensor(values, requires_grad=isinstance(values[0], float)) for values in lists]


def test_each_loss_over_one_trajectory():
    """Four actions, the third of which does not count; the last is terminal."""
    q, other, lse, value, logprob = tensors([1.0, 2.0, 3.0, 4.0], [0.5, 2.5, -3.0, 1.0], [3.0, 3.5, 4.0, 5.0], VALUE,
                                            [-1.0, -2.0, -3.0, -0.5])
    target_q, weight = torch.tensor(TARGET_Q, requires_grad=True), torch.tensor([True, True, False, True])
    following = torch.tensor([*VALUE[1:], 99.0], requires_grad=True)
    targets = ilql.td_targets(torch.tensor(REWARD), following, torch.tensor([False, False, False, True]), 0.5)
    expected = [1 + 0.5 * -2, 0 + 0.5 * 1, -0.5 + 0.5 * 0.125, 3]
    assert targets.tolist() == expected and not targets.requires_grad
    counted = [0, 1, 3]
    loss = ilql.q_loss([q, other], targets.requires_grad_(), weight)
    assert loss.item() == sum((head[i].item() - expected[i]) ** 2 for head in (q, other) for i in counted)
    for tau in (0.9, 0.5, 0.2):
        loss = loss + ilql.expectile_loss(value, target_q, weight, tau)
        u = [TARGET_Q[i] - VALUE[i] for i in counted]
        assert ilql.expectile_loss(value, target_q, weight, tau).item() == pytest.approx(
            sum((tau if x > 0 else 1 - tau) * x**2 for x in u))
    cql = ilql.cql_loss([q, other], [lse, lse + 1], weight)
    assert cql.item() == (2 + 1.5 + 1) + (3.5 + 2 + 5)
    for beta in (0.0, 3.0):
        awac = ilql.awac_loss(logprob, target_q - value, weight, beta)
        assert awac.item() == pytest.approx(sum(
            -math.exp(beta * (TARGET_Q[i] - VALUE[i])) * logprob[i].item() for i in counted))
    (loss + 0.3 * cql + awac).backward()
    assert target_q.grad is following.grad is targets.grad is None, "what is regressed to has no gradient"
    for tensor in (q, other, lse, value, logprob):
        assert [gradient != 0 for gradient in tensor.grad.tolist()] == weight.tolist()


def test_the_expectile_at_one_half_is_half_the_squared_error():
    value, target_q = torch.randn(100, requires_grad=True), torch.randn(100)
    loss = ilql.expectile_loss(value, target_q, torch.ones(100), 0.5)
    assert loss.item() == pytest.approx(0.5 * sum((a - b) ** 2 for a, b in zip(value.tolist(), target_q.tolist())))
    loss.backward()
    assert (value.grad - (value.detach() - target_q)).abs().max() < 1e-6


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.9])
def test_what_minimises_the_expectile_loss_is_the_expectile(tau):
    samples = torch.tensor([0.0, 1.0, 1.0, 5.0])
    grid = torch.linspace(-1, 6, 7001)
    losses = [ilql.expectile_loss(value.expand(4), samples, torch.ones(4), tau).item() for value in grid]
    assert grid[losses.index(min(losses))].item() == pytest.approx(expectile(samples.tolist(), tau), abs=2e-3)


def test_the_weight_of_cloning_is_at_most_100():
    """Without a gradient, and also where the exponential is infinite."""
    logprobs, advantages = tensors([-1.0, -1.0, -1.0], [math.log(99), math.log(101), 1e4])
    loss = ilql.awac_loss(logprobs, advantages, torch.ones(3), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(99 + 100 + 100) and advantages.grad is None
    assert logprobs.grad.tolist() == pytest.approx([-99, -100, -100])


# --- rows as trajectories ---------------------------------------------------------------------------------------------


def zeros(count: int, *last: float) -> list[float]:
    return [0.0] * count + list(last)


def reply(turns, reward, **columns):
    return {"turns": turns, "reward": reward, **columns}


# what a user gives -> what a causal model and an encoder-decoder learn from
TEXTS = [{"text": "the cat", "reward": 2.0}, {"text": "abc", "reward": [1, 2, 3, 4]}, {"text": "ab", "reward": [3.0]},
         {"text": "", "reward": 1.0}, {"text": "dog<eos>", "reward": [[0, 0.5, -1]]}, {"text": "a", "reward": -1},
         {"text": "a", "reward": [[1, 2]]}, {"text": "ab<eos>cd", "reward": 1}]
TEXT_LINES = [("t[he cat$]", zeros(6, 2), ""), ("a[bc$]", [2, 3, 4], ""), ("a[b$]", [0, 3], ""),
              ("d[og$]", [0.5, -1, 0], ""), ("a[$]", [-1], ""), ("a[$]", [2], ""), ("a[b$cd$]", zeros(4, 1), "")]
PAIRS = [{"prompt": "ab", "completion": "cde", "reward": 1.5}, {"prompt": "", "completion": "xy", "reward": [1, 2, 3]},
         {"prompt": "p", "completion": "", "reward": 1}, {"prompt": "q", "completion": "no<eos>", "reward": [[1, 2]]},
         {"prompt": "w", "completion": "x", "reward": [-2]}, {"prompt": "why not ", "completion": "no", "reward": 0}]
PAIR_LINES = [("ab[cde$]", zeros(3, 1.5), ""), ("^[xy$]", [1, 2, 3], ""), ("p[$]", [1], ""), ("q[no$]", [1, 2, 0], ""),
              ("w[x$]", [0, -2], ""), ("why not [no$]", zeros(3), "")]
FOUR = ["ab", "cd", "ef", "gh"]
TURNS = [reply(FOUR, 1), reply(FOUR, [1, 2]), reply(FOUR, [[1, 2], [3, 4, 5]]), reply(tuple(FOUR), (7, [3])),
         reply(["a", "b", "c"], 1), reply(["a", "b", "c"], [2]), reply(["a", "b", "c"], [[2]]),
         reply(["ab", "c", "de", "f", "g"], [1, 2]), reply(["only"], 4), reply(["a", "", "b", "c"], [0, 1]),
         reply(["a", "b", "c", ""], [5, 1]), reply(["a", "bc", "d", "", "e", "f"], [5, 1, 2]),
         reply(["", "ab"], 2), reply(["a", "b", "c", "", "d"], 3), reply(["a", "b", ""], 1)]
TURN_LINES = [("ab[cd]ef[gh$]", [0, 0, 0, 0, 1], ""), ("ab[cd]ef[gh$]", [0, 1, 0, 0, 2], ""),
              ("ab[cd]ef[gh$]", [1, 2, 3, 4, 5], ""), ("ab[cd]ef[gh$]", [0, 7, 3, 0, 0], ""),
              ("a[b]", [1], "abc"), ("a[b]", [2], "abc"), ("a[b]", [2], "abc"), ("ab[c]de[f]", [1, 2], "abcdefg"),
              ("ab[c$]", [0, 1], ""), ("a[b]c[$]", [5, 1], ""), ("a[bc]de[f$]", [0, 6, 0, 2], ""),
              ("^[ab$]", [0, 0, 2], ""), ("a[b]", [3], "abcd"), ("a[b]", [1], "ab")]
CHATS = [{"messages": says("hi", "yo"), "reward": 1}, {"messages": says("hi", "yo", "q", "r"), "reward": [1, 2]},
         {"messages": says("hi", "yo", "q"), "reward": 3}, {"messages": says("hi", "yo", "q"), "reward": [[1, 2, 3]]},
         {"prompt": says("hi", "yo", "q"), "completion": "r", "reward": [[1, 2]]}, {"messages": says("a"), "reward": 9},
         {"prompt": says("hi"), "completion": says("yo", "w", "z", first="assistant"), "reward": [[4], 5]}]
HI, ASKED = ".u hi$\n.a ", ".u hi$\n.a yo$\n.u q$\n.a "
CHAT_LINES = [(HI + "[yo$]", [0, 0, 1], ""), (HI + "[yo$]\n.u q$\n.a [r$]", [0, 0, 1, 0, 2], ""),
              (HI + "[yo$]", [0, 0, 3], ASKED), (HI + "[yo$]", [1, 2, 3], ASKED), (ASKED + "[r$]", [1, 2], ""),
              (HI + "[yo$]\n.u w$\n.a [z$]", [4, 0, 0, 0, 5], "")]
SEQ2SEQ = {
    "pairs": [(line.replace("[", ">["), *more) for line, *more in PAIR_LINES],
    "turns": [("ab>[cd$]", [0, 0, 0], "abcdef>"), ("abcdef>[gh$]", [0, 0, 1], ""),
              ("ab>[cd$]", [0, 0, 1], "abcdef>"), ("abcdef>[gh$]", [0, 0, 2], ""),
              ("ab>[cd$]", [1, 2, 0], "abcdef>"), ("abcdef>[gh$]", [3, 4, 5], ""),
              ("ab>[cd$]", [0, 0, 7], "abcdef>"), ("abcdef>[gh$]", [3, 0, 0], ""),
              ("a>[b$]", [0, 1], "abc>"), ("a>[b$]", [0, 2], "abc>"), ("a>[b$]", [2, 0], "abc>"),
              ("ab>[c$]", [0, 1], "abcde>"), ("abcde>[f$]", [0, 2], "abcdefg>"),
              ("a>[$]", [0], "ab>"), ("ab>[c$]", [0, 1], ""), ("a>[b$]", [0, 5], "abc>"), ("abc>[$]", [1], ""),
              ("a>[bc$]", [0, 0, 5], "abcd>"), ("abcd>[$]", [1], "abcde>"), ("abcde>[f$]", [0, 2], ""),
              ("^>[ab$]", [0, 0, 2], ""), ("a>[b$]", [0, 0], "abc>"), ("abc>[$]", [3], "abcd>"),
              ("a>[b$]", [0, 1], "ab>")],
    "chats": [(HI + ">[yo$]", [0, 0, 1], ""), (HI + ">[yo$]", [0, 0, 1], ASKED + ">"), (ASKED + ">[r$]", [0, 2], ""),
              (HI + ">[yo$]", [0, 0, 3], ASKED + ">"), (HI + ">[yo$]", [1, 2, 3], ASKED + ">"),
              (ASKED + ">[r$]", [1, 2], ""), (HI + ">[yo$]", [4, 0, 0], HI + "yo$\n.u w$\n.a >"),
              (HI + "yo$\n.u w$\n.a >[z$]", [0, 5], "")]}
FORMS = {"texts": (TEXTS, TEXT_LINES), "pairs": (PAIRS, PAIR_LINES), "turns": (TURNS, TURN_LINES),
         "chats": (CHATS, CHAT_LINES)}
FIVE = reply(["ab", "cd", "ef", "gh", "ij"], [1, [2, 3]])
HISTORY = {1: [("ab[cd$]", [0, 0, 1], "ef"), ("ef[gh$]", [2, 3, 0], "ij")],
           2: [("ab[cd$]", [0, 0, 1], "cdef"), ("cdef[gh$]", [2, 3, 0], "ghij")]}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_row_and_of_reward(form):
    """EOS is an action, at the end of a row that does not go on, also of an empty answer; rewards of a row and of an
    output are on their last action, those of tokens on theirs; rows without an output are dropped and counted; nothing
    given is changed."""
    samples, lines = FORMS[form]
    given = copy.deepcopy(samples)
    assert written_of(samples) == lines
    assert trajectories_of(samples)[1:] == (len(samples) - len(lines), 0)
    if form in SEQ2SEQ:
        assert written_of(samples, seq2seq=True) == SEQ2SEQ[form]
        assert trajectories_of(samples, seq2seq=True)[1:] == (len(samples) - len(lines), 0)
    assert samples == given


@pytest.mark.parametrize("history", [1, 2])
def test_with_a_history_each_output_is_a_trajectory(history):
    assert written_of([FIVE], history=history) == HISTORY[history]
    seq2seq = [(line.replace("[", ">["), rewards, after + ">") for line, rewards, after in HISTORY[history]]
    assert written_of([FIVE], history=history, seq2seq=True) == seq2seq
    assert written_of([reply(FOUR, 1)], history=history)[1][2] == "", "terminal"


# --- the whole loss and its gradient ----------------------------------------------------------------------------------

SETTINGS = {
    "plain": dict(gamma=0.9, tau=0.8, cql_scale=0.3, awac_scale=0.7),
    "one q": dict(gamma=0.8, tau=0.3, two_qs=False, cql_scale=0.0),
    "awac": dict(gamma=1.0, tau=0.6, awac_beta=1.5, cql_scale=1.0),
    "clamped": dict(gamma=0.5, tau=0.9, awac_beta=30.0, awac_scale=0.01)}
CASES = [*((architecture, form, settings) for architecture, settings in
           (("gpt2", "plain"), ("llama", "awac"), ("gemma2", "one q"), ("t5", "plain"), ("bart", "awac"))
           for form in FORMS if CONFIGS[architecture].is_encoder_decoder <= (form in SEQ2SEQ)),
         *((architecture, "turns", "plain") for architecture in CONFIGS
           if architecture not in ("gpt2", "llama", "gemma2", "t5", "bart")),
         ("gpt2", "turns", "clamped"), ("gpt2", "turns", "one q"), ("t5", "turns", "clamped"), ("t5", "turns", "one q")]


def assert_loss_and_gradient(model, items, lines, args, sizes=(1, 2, 99)):
    expected, expected_gradients = reference(model, lines, args)
    assert not any("target" in name for name in expected_gradients)
    for size in sizes:
        args.micro_batch_size = size
        found = ilql.batch_loss_and_gradient(model, items, args)
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert_same_gradients(gradients(model), expected_gradients)
    return expected


@pytest.mark.parametrize("architecture,form,settings", CASES)
def test_loss_and_gradient_are_those_of_single_unpadded_rows(architecture, form, settings):
    """All numbers, and all gradients, in micro-batches of 1, 2 and all; targets have none."""
    args = ilql.Args(**SETTINGS[settings])
    model = valued(architecture, args.two_qs)
    samples, lines = FORMS[form]
    lines = SEQ2SEQ[form] if model.seq2seq else lines
    items, *_ = trajectories_of(samples, seq2seq=model.seq2seq)
    before = copy.deepcopy(items)
    expected = assert_loss_and_gradient(model, items, lines, args)
    assert items == before
    if settings == "clamped":
        assert expected["loss/awac"] > 10 * expected["loss/lm"], "nothing is clamped"


def test_the_model_of_these_tests_has_something_to_tell():
    """Advantages of both signs, each head the smaller one somewhere, targets unlike the heads."""
    model, signs, smaller = valued("gpt2"), set(), set()
    for line, *_ in TURN_LINES:
        tokens, said, states, _ = states_of(model.lm, line)
        for place in (place for place, flag in enumerate(said) if flag):
            q = {name: head_output(model.heads[name], states[place])[tokens[place]].item()
                 for name in ("q1", "q2", "target_q1", "target_q2")}
            value = head_output(model.heads["v"], states[place]).item()
            smaller.add(q["target_q1"] < q["target_q2"])
            signs.add(min(q["target_q1"], q["target_q2"]) > value)
            assert abs(q["q1"] - q["target_q1"]) > 1e-4
    assert signs == smaller == {True, False}


@pytest.mark.parametrize("history", [1, 2])
@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_loss_and_gradient_with_a_history(architecture, history):
    model = valued(architecture)
    items, *_ = trajectories_of([FIVE, reply(FOUR, 1)], seq2seq=model.seq2seq, history=history)
    lines = [written(item, model.seq2seq) for item in items]
    assert [bool(after) for *_, after in lines] == [True, True, True, False]
    assert_loss_and_gradient(model, items, lines, ilql.Args(**SETTINGS["plain"]))


LOST = [("abc[de]", [1, 2], "abc>de"), ("f[gh]ij[k]", [3, 4, 5], "f>ghijk"), ("abcd[e$]", [0, 1], "")]


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "bart"])
def test_the_state_after_a_row_that_lost_its_end(architecture):
    """Outputs after the prompt in the state after the last action, alone in a micro-batch or not."""
    model = valued(architecture)
    lines = LOST if not model.seq2seq else [(line.replace("[", ">[", 1), *more) for line, *more in LOST]
    items = [made(*line) for line in lines]
    assert items[0].next_output and items[0].next_prompt
    found = ilql.values_after(model, items[:2])
    assert found.shape == (2,) and not found.requires_grad and ilql.values_after(model, []).shape == (0,)
    expect = lines if model.seq2seq else [(line, rewards, after.replace(">", "")) for line, rewards, after in lines]
    assert_loss_and_gradient(model, items, expect, ilql.Args(**SETTINGS["plain"]))


@pytest.mark.parametrize("settings", ["plain", "awac"])
def test_chunks_change_no_number(settings, monkeypatch):
    """Of the heads over the vocabulary, as of the logits: computed anew in the backward."""
    calls, checkpoint = [], common.models.checkpoint
    monkeypatch.setattr(common.models, "CHUNK", 3 * VOCABULARY)
    monkeypatch.setattr(common.models, "checkpoint", lambda *a, **k: calls.append(a[0]) or checkpoint(*a, **k))
    model = valued("gpt2")
    items, *_ = trajectories_of(TURNS)
    assert_loss_and_gradient(model, items, TURN_LINES, ilql.Args(**SETTINGS[settings]), (4,))
    assert {call.__qualname__.split(".")[0] for call in calls} == {"LanguageModel", "TokenHead"}


def test_a_token_head_has_an_output_for_each_token(monkeypatch):
    head, states = TokenHead(8, 11), torch.randn(9, 8)
    assert torch.equal(head(states), torch.zeros(9, 11)), "it starts at 0"
    torch.nn.init.normal_(head[2].weight)
    tokens = torch.randint(11, (9,))
    for chunk in (1, 25, 2**24):
        monkeypatch.setattr(common.models, "CHUNK", chunk)
        for i, (chosen, logsumexp) in enumerate(head(states, tokens).tolist()):
            every = head_output(head, states[i]).tolist()
            assert chosen == pytest.approx(every[tokens[i]], abs=1e-5)
            assert logsumexp == pytest.approx(math.log(sum(map(math.exp, every))), abs=1e-5)
    both = head(states, tokens)
    assert (head.requires_grad_(False)(states, tokens) - both[:, :1]).abs().max() < 1e-5, "of a frozen one"
    assert head(states, tokens).shape == (9, 1) and head(states[:0], tokens[:0]).shape == (0, 1)


def test_what_is_trained_is_not_what_it_is_held_to():
    """The value of the next state, and the smaller target Q, have no gradient: with no other loss, V of a state
    that no action is taken in stays."""
    model = valued("gpt2")
    out = model(**common.models.collate([[3, 4]], [[5, 6]], None, CPU))
    assert {name: tensor.requires_grad for name, tensor in out.items() if name in model.heads} == {
        "v": True, "q1": True, "q2": True, "target_q1": False, "target_q2": False}
    args = ilql.Args(awac_scale=0.0, cql_scale=0.0, gamma=1.0)
    ilql.batch_loss_and_gradient(model, [made("a[b]", [1.0], "axyz")], args)
    seen = gradients(model)["lm.transformer.wte.weight"].abs().sum(1)
    used = {token: seen[token].item() for token in parsed("axyz")[0]}
    tied = used.pop(parsed("a")[0][0])
    assert tied > 0 and not any(used.values())


def test_steps_are_those_of_the_mdp():
    """Index tensors by brute force."""
    draw = random.Random(0)
    for _ in range(200):
        items, rewards = [], iter(range(10**6))
        for _ in range(draw.randrange(1, 6)):
            actions = sorted(draw.sample(range(9), draw.randrange(1, 5)))
            after = [7] if draw.random() < 0.5 else []
            items.append(ilql.Trajectory([1], [0] * 9, actions, [float(next(rewards)) for _ in actions], after, []))
        count = sum(len(item.actions) for item in items)
        steps = ilql.transitions(items, CPU)
        assert steps["rewards"].tolist() == list(range(count)) and steps["rewards"].dtype == torch.float32
        state, beyond = 0, count
        for item in items:
            for number in range(len(item.actions)):
                last = number == len(item.actions) - 1
                assert steps["terminal"][state] == (last and not item.next_prompt)
                if not last:
                    assert steps["next_state"][state] == state + 1
                elif item.next_prompt:
                    assert steps["next_state"][state] == beyond
                    beyond += 1
                state += 1
        assert state == len(steps["terminal"]) == len(steps["next_state"])
        assert all(0 <= place < beyond for place in steps["next_state"].tolist())


# --- rewards ----------------------------------------------------------------------------------------------------------

ONE = [("a[b]", [2.0], "abc")]


@pytest.mark.parametrize("reward", [
    2, 2.0, numpy.float32(2), numpy.int64(2), torch.tensor(2.0), torch.tensor(2), [2], (2,), [[2.0]], numpy.array([2]),
    "2", "2.0", [" 2e0"], torch.tensor([2.0]), torch.tensor([[2.0]]), [torch.tensor(2.0)], [numpy.array([2.0])],
    numpy.array(2.0)], ids=repr)
def test_rewards_may_be_numbers_of_any_kind(reward):
    assert written_of([reply(["a", "b", "c"], reward)]) == ONE
    (found,), *_ = trajectories_of([reply(["a", "b", "c"], reward)])
    assert [type(number) for number in found.rewards] == [float]


@pytest.mark.parametrize("reward", [True, numpy.bool_(True), torch.tensor(True), [True]], ids=repr)
def test_labels_may_be_booleans(reward):
    assert written_of([{"prompt": "a", "completion": "b", "reward": reward}]) == [("a[b$]", [0, 1], "")]


A_REWARD = ("a reward is a finite number, a list with one for each output, or a list for each output with one for each "
            "of its tokens, not ")
BAD = [
    (math.nan, A_REWARD + "float nan"), (math.inf, A_REWARD + "float inf"), (-math.inf, A_REWARD + "float -inf"),
    ("1.0x", A_REWARD + "str '1.0x'"), ("nan", A_REWARD + "float nan"), ("", A_REWARD + "str ''"),
    ([], A_REWARD + "list []"), ({}, A_REWARD + "dict {}"),
    ([1, math.nan], A_REWARD + "float nan"), ([[1, "b"], 3], A_REWARD + "str 'b'"), ([None, 1], A_REWARD + "NoneType"),
    ([[], 1], A_REWARD + "list []"), ([[[1.0]], 2], A_REWARD + "list [1.0]"), (1e400, A_REWARD + "float inf"),
    (torch.tensor(math.nan), A_REWARD + "float nan"), (numpy.array([]), A_REWARD + "list []"), (1j, A_REWARD),
    (numpy.zeros((2, 2, 2)), A_REWARD), ([1, [2, math.inf]], A_REWARD + "float inf"), (object(), A_REWARD + "object"),
    ([1], "has 1 rewards for 2 outputs"), ([1, 2, 3], "has 3 rewards for 2 outputs"),
    ([[1], [2], [3]], "has 3 rewards for 2 outputs"),
    ([[1, 2, 3], 1], "has 3 token rewards for output 1, which has 2 tokens, the end token among them"),
    ([1, [1, 2, 3, 4]], "has 4 token rewards for output 2, which has 3 tokens")]


@pytest.mark.parametrize("reward,problem", BAD, ids=[repr(reward)[:40] for reward, _ in BAD])
def test_bad_rewards_are_one_line_that_names_the_row(reward, problem):
    for seq2seq in (False, True):
        if not (seq2seq and repr(reward) == "[[1, 2, 3], 1]"):  # there each output ends with EOS
            with pytest.raises(UserError, match="^" + re.escape("--dataset, row 2: " + problem)) as caught:
                trajectories_of([reply(["a", "b"], 1), reply(FOUR, reward)], seq2seq=seq2seq)
            assert "\n" not in str(caught.value)


def test_token_rewards_of_an_encoder_decoder_may_reach_its_end_tokens():
    assert [rewards for _, rewards, _ in written_of([reply(FOUR, [[1, 2, 3], 1])], seq2seq=True)] == [
        [1, 2, 3], [0, 0, 1]]


@pytest.mark.parametrize("row,problem", [
    ({"text": "abc", "reward": [1, 2, 3, 4, 5]}, "has 5 token rewards for output 1, which has 4 tokens"),
    ({"prompt": "a", "completion": "b", "reward": [1, 2, 3]}, "has 3 token rewards for output 1, which has 2 tokens"),
    (reply(["a", "", "b", "c"], [[1], 2]), "has 1 token rewards for output 1, which has 0 tokens"),
    (reply(["a", "b", "c"], [1, 2]), "has 2 token rewards for output 1, which has 1 tokens"),
    ({"prompt": "p", "completion": "", "reward": [1, 2]}, "has 2 token rewards for output 1, which has 1 tokens"),
    (reply(["only"], [1]), "has 1 rewards for 0 outputs"),
    ({"messages": says("a"), "reward": [1]}, "has 1 rewards for 0 outputs"),
    ({"messages": says("hi", "yo"), "reward": [1, 2, 3, 4]}, "has 4 token rewards for output 1, which has 3 tokens")])
def test_token_rewards_that_do_not_fit_are_one_line(row, problem):
    with pytest.raises(UserError, match="^" + re.escape("--dataset, row 1: " + problem)):
        trajectories_of([row])


def test_a_text_with_the_tokenizers_bos_has_a_state_before_its_first_token():
    rows = [{"text": "abc", "reward": [1, 2, 3, 4]}, {"text": "abc", "reward": 5}]
    assert written_of(rows, with_specials("<bos> $A")) == [("^[abc$]", [1, 2, 3, 4], ""), ("^[abc$]", zeros(3, 5), "")]
    with pytest.raises(UserError, match="has 5 token rewards for output 1, which has 4 tokens"):
        trajectories_of([{"text": "abc", "reward": [1, 2, 3, 4, 5]}], with_specials("<bos> $A"))


def test_token_rewards_of_a_text_with_a_history():
    """With --history a text has BOS before it, and its first token is an action."""
    (line, rewards, _), = written_of([{"text": "abc", "reward": [1, 2, 3, 4]}], history=1)
    assert (line, rewards) in [("^[abc$]", [1, 2, 3, 4]), ("a[bc$]", [2, 3, 4])]


def test_token_rewards_after_an_empty_prompt_without_bos_and_eos():
    """The output's first token is no action there either."""
    tokenizer = char_tokenizer(bos=False)
    tokenizer.eos_token = None
    rows = [{"prompt": "", "completion": "abc", "reward": [1, 2, 3]}, reply(["only"], 1), reply(["", "ab", "c", "de"],
            [[1, 2], [3, 4]]), reply(["x", "ab"], [[1, 2]])]
    assert written_of(rows, tokenizer, ends=()) == [
        ("a[bc]", [2, 3], ""), ("a[b]c[de]", [2, 3, 4], ""), ("x[ab]", [1, 2], "")]
    mixed = [reply(["", "ab", "c", "de"], rewards) for rewards in ([[0, 1], [3, 4]], [1, [3, 4]])]
    first, second = written_of(mixed, tokenizer, ends=())
    assert first == second, "the second output's first token is an action, whatever the first output's reward is"


VARIED = [reply(FOUR, 2), reply(FOUR, [1, -4]), reply(FOUR, [[1, 2], [0, 0.5]]), reply(FOUR, [3, [5, 1, 1]]),
          {"prompt": "p", "completion": "cd", "reward": [1, 2, 3]}, reply(FOUR, -0.25)]
TOTALS = [2, -3, 3.5, 10, 6, -0.25]


@pytest.mark.parametrize("how", ["none", "mean-std", "std"])
@pytest.mark.parametrize("seq2seq", [False, True])
def test_rewards_are_normalised_by_the_totals_of_the_rows(how, seq2seq):
    """Each number over the standard deviation, unbiased; the mean comes off the last one. So totals have mean 0 and
    deviation 1, and no number but the last depends on the mean."""
    given = copy.deepcopy(VARIED)
    mean = statistics.mean(TOTALS) if how == "mean-std" else 0
    scale = statistics.stdev(TOTALS) if how != "none" else 1
    found = [rewards for _, rewards, _ in written_of(VARIED, seq2seq=seq2seq, normalize_rewards=how)]
    plain = [rewards for _, rewards, _ in written_of(VARIED, seq2seq=seq2seq, normalize_rewards="none")]
    if seq2seq:  # two trajectories a row, one of the pair
        cuts = [0, 2, 4, 6, 8, 9, 11]
        found, plain = ([sum(rewards[a:b], []) for a, b in zip(cuts, cuts[1:])] for rewards in (found, plain))
    last = [-1, -1, (3 if seq2seq else 2) + 1, -1, -1, -1]  # the place of the last number that was given
    for rewards, raw, place, total in zip(found, plain, last, TOTALS, strict=True):
        expected = [number / scale for number in raw]
        expected[place] -= mean / scale
        assert rewards == pytest.approx(expected, rel=1e-12, abs=1e-12) and sum(raw) == total
    assert VARIED == given


def test_the_mean_is_not_taken_off_rows_that_go_on():
    """In steps of a longer story it would be taken off once a step, and so pay, or fine, for the story's length: the
    values of a choice between one step of 1.2 and two of 0.8 each would change places."""
    steps = [reply(["s", "a"], 1.2), reply(["s", "b", "t"], 0.8), reply(["t", "a"], 0.8),
             {"messages": says("s", "b", "t"), "reward": 0.8}, {"messages": says("t", "a"), "reward": 0.8}]
    totals = [1.2, 0.8, 0.8, 0.8, 0.8]
    mean, std = statistics.mean(totals), statistics.stdev(totals)
    found = [rewards[-1] for _, rewards, _ in written_of(steps, normalize_rewards="mean-std")]
    ends = [True, False, True, False, True]
    assert found == pytest.approx([(total - mean * end) / std for total, end in zip(totals, ends, strict=True)])
    long = reply(["s", "cd", "efgh", "ij"], [1.2, 2])  # in 6 tokens its end is lost, and the mean with it
    found = written_of([long, reply(["s", "a"], 2)], longest=6, normalize_rewards="mean-std")
    assert found[0] == ("s[cd]", [0, pytest.approx(1.2 / statistics.stdev([3.2, 2]))], "cdefgh")


@pytest.mark.parametrize("how", ["none", "mean-std", "std"])
def test_rewards_without_a_spread_are_as_they_are(how):
    assert written_of([reply(["a", "b"], 5)], normalize_rewards=how) == [("a[b$]", [0, 5], "")], "one sample only"
    for rows in ([reply(["a", "b"], 0.1)] * 3, [reply(["a", "b"], [0.1]), reply(["a", "b"], 0.1)]):
        found = written_of(rows, normalize_rewards=how)
        assert [rewards for _, rewards, _ in found] == [[0, 0.1]] * len(rows), "equal totals"


def test_many_rows_have_the_rewards_of_their_own():
    """Rows are tokenized a thousand at a time."""
    rows = [reply(["a", "b" * (1 + i % 3)], i) for i in range(2500)]
    found = written_of(rows)
    assert [rewards[-1] for _, rewards, _ in found] == list(range(2500))
    assert all(line == f"a[{'b' * (1 + i % 3)}$]" for i, (line, *_) in enumerate(found))


# --- truncation -------------------------------------------------------------------------------------------------------

LONG = {  # turns, reward -> what is left of them in 8 tokens: prompts cut on the left, on the right; beginnings lost
    ("abcdefghij", "klm"): [("ghij[klm$]", zeros(3, 1), ""), ("abcd[klm$]", zeros(3, 1), ""),
                            ("ghij[klm$]", zeros(3, 1), "")],
    ("ab", "klmnopqrst"): [("ab[klmnop]", zeros(5, 1), "")] * 2 + [("n[opqrst$]", zeros(6, 1), "")],
    ("abcdef", "klmnopqrst"): [("cdef[klmn]", zeros(3, 1), ""), ("abcd[klmn]", zeros(3, 1), ""),
                               ("n[opqrst$]", zeros(6, 1), "")],
    ("ab", "cd", "efgh", "ij"): [("ab[cd]", [0, 1], "")] * 2 + [("d" + "efgh[ij$]", [0, 0, 1], "")],
    ("ab", "cde", "f", "ij"): [("ab[cde]f[ij]", zeros(4, 1), "")] * 2 + [("b[cde]f[ij$]", zeros(5, 1), "")],
    ("a", "bcd", "e", "fgh", "i"): [("a[bcd]e[fgh]", zeros(5, 1), "bcdefghi"),
                                    ("a[bcd]e[fgh]", zeros(5, 1), "abcdefgh"),
                                    ("a[bcd]e[fgh]", zeros(5, 1), "bcdefghi")]}
LOST_ENDS = {  # the same with a reward for each output: what has lost its last reward goes on
    ("abcdefghij", "klm"): ("ghij[klm$]", zeros(3, 1), ""), ("ab", "klmnopqrst"): ("ab[klmnop]", zeros(6), "abklmnop"),
    ("abcdef", "klmnopqrst"): ("cdef[klmn]", zeros(4), "cdefklmn"),
    ("ab", "cd", "efgh", "ij"): ("ab[cd]", [0, 1], "abcdefgh"),  # cut in the user's words: the state behind them
    ("ab", "cde", "f", "ij"): ("ab[cde]f[ij]", [0, 0, 1, 0, 0], "abcdefij"),
    ("a", "bcd", "e", "fgh", "i"): ("a[bcd]e[fgh]", [0, 0, 1, 0, 0, 2], "bcdefghi")}


@pytest.mark.parametrize("number,flags", [
    (0, {}), (1, dict(truncation_side="right")), (2, dict(row_loses="beginning"))])
def test_what_is_left_of_a_long_row(number, flags):
    """A scalar reward is on the last action left, and that is terminal, unless the user has the last word."""
    for turns, lines in LONG.items():
        assert trajectories_of([reply(turns, 1)], longest=8, **flags)[1:] == (0, 1)
        assert written_of([reply(turns, 1)], longest=8, **flags) == [lines[number]]


def test_a_row_that_lost_rewards_goes_on():
    for turns, line in LOST_ENDS.items():
        rewards = list(range(1, len(turns) // 2 + 1))
        assert written_of([reply(turns, rewards)], longest=8) == [line]
    assert written_of([reply(["ab", "cd", "efgh", "ij"], [1, 2])], longest=8, row_loses="beginning") == [
        ("defgh[ij$]", [0, 0, 2], "")]
    assert written_of([reply(["ab", "cde", "f", "ij"], [[1, 2, 3], [4, 5, 6]])], longest=8, row_loses="beginning") == [
        ("b[cde]f[ij$]", [1, 2, 3, 4, 5, 6], "")], "here the end and its rewards are there"
    assert written_of([{"text": "abcdefgh", "reward": [*range(9)]}], longest=5, row_loses="beginning") == [
        ("e[fgh$]", [5, 6, 7, 8], "")], "the first token left is no action"


def test_a_row_that_goes_on_may_lose_its_beginning():
    """What is said up to the state after the last action loses its beginning as well."""
    assert written_of([reply(["abc", "def", "ghi"], [1])], longest=5, row_loses="beginning") == [
        ("bc[def]", [0, 0, 1], "efghi")]
    assert written_of([{"messages": says("hi", "yo", "q"), "reward": 1}], longest=9, row_loses="beginning") == [
        ("i$\n.a [yo$]", [0, 0, 1], ".u q$\n.a ")]


@pytest.mark.parametrize("side", ["left", "right"])
def test_long_rows_of_an_encoder_decoder(side):
    """Each output is cut by itself; the state after one that lost its end and rewards is after what is left of it."""
    left = side == "left"
    turns = ["abcdefgh", "ij", "kl", "mnopqr"]
    prompts = ["defgh", "ghijkl"[-4:]] if left else ["abcde", "abcd"]
    found = written_of([reply(turns, [1, 2])], longest=8, truncation_side=side, seq2seq=True)
    assert found == [(f"{prompts[0]}>[ij$]", [0, 0, 1], f"{prompts[1]}>"),
                     (f"{prompts[1]}>[mnop]", zeros(4), f"{prompts[1]}>mnop")]
    found = written_of([reply(turns, 3)], longest=8, truncation_side=side, seq2seq=True, row_loses="beginning")
    assert found == [(f"{prompts[0]}>[ij$]", [0, 0, 0], f"{prompts[1]}>"), (f"{prompts[1]}>[mnop]", zeros(3, 3), "")]
    found = written_of([reply([*turns, "st"], 3)], longest=8, truncation_side=side, seq2seq=True)
    last = "mnopqrst" if left else "abcdefgh"
    assert found[1] == (f"{prompts[1]}>[mnop]", zeros(3, 3), f"{last}>")


def test_special_tokens_outlive_every_cut():
    rows = [reply(["abcdefgh", "xy"], 1), reply(["ab", "cdefghijk"], 1)]
    for flags, first in ((dict(), "^fgh[xy$]"), (dict(truncation_side="right"), "^abc[xy$]")):
        found = written_of(rows, with_specials("<bos> $A"), longest=7, **flags)
        assert [line for line, *_ in found] == [first, "^ab[cdef]"]
    found = written_of(rows, with_specials("<bos> $A"), longest=7, row_loses="beginning")
    assert [line for line, *_ in found] == ["^fgh[xy$]", "^g[hijk$]"], "what follows them is no action"
    assert written_of([{"text": "abcdefgh", "reward": [*range(9)]}], with_specials("<bos> $A"), longest=4,
                      row_loses="beginning") == [("^g[h$]", [7, 8], "")]
    assert written_of(rows[:1], with_specials("$A <eos>"), longest=7, seq2seq=True)[0][0] == "fgh$>[xy$]"


def drawn_row(draw, seq2seq: bool, history: int | None):
    """A random row, its outputs' lengths, and whether the user has the last word."""
    words = lambda most: "".join(draw.choices(LETTERS, k=draw.randrange(most)))  # noqa: E731
    kind = draw.choice(["turns", "turns", "turns", "pair", "text"])
    if kind == "text" and not seq2seq and not history:
        return {"text": words(14)}, None
    turns = [words(10) for _ in range(2 if kind == "pair" else draw.randrange(1, 8))]
    return {"turns": turns}, turns


def drawn_reward(draw, turns, form: str):
    if form == "row" or turns is None or len(turns) < 2:
        return draw.randrange(-9, 9)
    outputs = turns[1::2]
    if form == "outputs":
        return [draw.randrange(1, 9) for _ in outputs]
    return [[draw.randrange(1, 9) for _ in output] or draw.randrange(1, 9) for output in outputs]


@pytest.mark.parametrize("seed", range(6))
def test_any_row_in_any_window(seed):
    """Never an empty output or a trajectory without an action, never more than the window, never a row lost that has an
    output; what is left is a piece of the row, with the rewards that it had there; a reward of a row is on its last
    action; what has lost rewards at its end goes on."""
    draw = random.Random(seed)
    seq2seq, history = [(False, None), (False, None), (False, None), (False, 2), (True, None), (True, 1)][seed]
    tokenizer = [char_tokenizer(), with_specials("<bos> $A"), char_tokenizer()][seed % 3]
    for _ in range(60):
        longest = draw.randrange(4, 30)
        flags = dict(truncation_side=draw.choice(["left", "right"]), history=history)
        loses = "end" if seq2seq or history else draw.choice(["end", "beginning"])
        row, turns = drawn_row(draw, seq2seq, history)
        row["reward"] = reward = drawn_reward(draw, turns, draw.choice(["row", "outputs", "tokens"]))
        found = lambda longest: trajectories_of([row], tokenizer, seq2seq, longest, row_loses=loses, **flags)  # noqa: E731
        (items, dropped, cut), (whole, none, _) = found(longest), found(10**6)
        outputs = turns[1::2] if turns is not None else [row["text"]]
        ends = bool(turns) and (seq2seq or history or len(turns) % 2 == 0)  # an empty output is EOS, at an end
        assert dropped == none == (not (outputs and (ends or any(outputs))))
        assert len(items) == len(whole) and (items or dropped)
        for number, (item, full) in enumerate(zip(items, whole)):
            size, count = len(item.prompt) + len(item.output), len(item.actions)
            assert item.prompt and item.output and count == len(item.rewards) and size <= longest
            assert item.actions[-1] == len(item.output) - 1 and len(item.next_prompt) + len(item.next_output) <= longest
            if size == len(full.prompt) + len(full.output):
                assert item[:3] == full[:3]
            goes_on = bool(full.next_prompt)
            raw, mine = list(full.rewards), list(item.rewards)
            last = number == len(items) - 1
            if not isinstance(reward, list):
                assert sum(mine) == sum(raw) == mine[-1] == reward * last
                raw[-1] = mine[-1] = 0.0
            if loses == "beginning":
                ids, kept = [*full.prompt, *full.output], [*item.prompt, *item.output]
                head = len(tokenizer("").input_ids)
                assert kept == ids or kept == ids[:head] + ids[len(ids) - longest + head:]
                assert mine == raw[-count:]
            else:
                assert list(item.output) == list(full.output)[: len(item.output)]
                assert list(item.actions) == list(full.actions)[:count] and mine == raw[:count]
                if len(item.output) < len(full.output) and isinstance(reward, list):
                    if len(item.output) in full.actions:  # an output has lost its end
                        assert (item.next_prompt, item.next_output) == (item.prompt, item.output)
                        continue
                    heard = [*full.prompt, *full.output[: full.actions[count]]]  # the state behind the user's words
                    head = len(tokenizer("").input_ids)
                    cut_heard = heard if len(heard) <= longest else heard[:head] + heard[len(heard) - longest + head:]
                    assert (list(item.next_prompt), list(item.next_output)) == (cut_heard, [])
                    continue
            assert bool(item.next_prompt) == goes_on and not item.next_output
            assert goes_on == (not last or bool(turns and len(turns) % 2))
        assert cut == any(a[:2] != b[:2] or (not a.next_output and a.next_prompt != b.next_prompt)
                          for a, b in zip(items, whole)) or dropped


def test_rows_of_a_form_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="^--dataset, row 1: a text alone is for causal models; an encoder-decoder"):
        trajectories_of(TEXTS, seq2seq=True)
    with pytest.raises(UserError, match="^--dataset, row 1: a history of 2 texts is for turns, not for messages"):
        trajectories_of(CHATS, history=2)
    with pytest.raises(UserError, match="lists of messages and the tokenizer has no chat template: give texts$"):
        trajectories_of(CHATS, char_tokenizer())


def test_rows_without_an_output_are_dropped_and_counted():
    rows = [reply(["only"], 1), reply(["a", ""], 1), reply(["a", "b"], 1), {"text": "", "reward": 2},
            {"messages": says("q"), "reward": 1}]
    items, dropped, cut = trajectories_of(rows)
    assert (len(items), dropped, cut) == (2, 3, 0)


def test_an_answer_that_is_empty_keeps_its_place():
    """Where a template marks what the assistant says, and an answer says nothing."""
    said = "{% generation %}{{ m.content }}{% endgeneration %}<eos>"
    tokenizer = chat_tokenizer("{% for m in messages %}.{% if m.role == 'assistant' %}" + said + "{% else %}"
                               "{{ m.content }}<eos>{% endif %}{% endfor %}")
    ((line, rewards, _),) = written_of([{"messages": says("a", "", "b", "c"), "reward": [1, [2, 3]]}], tokenizer)
    assert (line, rewards) == (".a$.[$].b$.[c$]", [1, 2, 3])


def test_a_chat_that_goes_on_has_no_end_token_that_its_template_does_not_write():
    """As a row of turns: EOS ends what ends."""
    rows = [{"messages": says("hi", "yo", "q"), "reward": 1}, {"messages": says("hi", "yo"), "reward": 1}]
    assert written_of(rows, chat_tokenizer(CHATML.replace("<eos>", ""))) == [
        (".u hi\n.a [yo\n]", zeros(2, 1), ".u hi\n.a yo\n.u q\n.a "), (".u hi\n.a [yo\n$]", zeros(3, 1), "")]


def test_a_template_that_rewrites_earlier_turns_has_a_chain_of_trajectories():
    """The state after an answer is the next one's prompt."""
    rewriting = chat_tokenizer("{% for m in messages %}{{ '!' if loop.last else '.' }}{{ m.content }}<eos>{% endfor %}")
    assert written_of([{"messages": says("hi", "yo", "q", "r"), "reward": [1, 2]}], rewriting) == [
        ("!hi$[yo$]", [0, 0, 1], ".hi$.yo$!q$"), (".hi$.yo$!q$[r$]", [0, 2], "")]


# --- runs -------------------------------------------------------------------------------------------------------------

RUN = dict(num_eval_prompts=0, batch_size=4, micro_batch_size=2, max_length=40, max_new_tokens=4, learning_rate=1e-2,
           target_rate=0.3, tau=0.8)
WORDS = ["the cat", "dog", "a mouse sat", "no", "some more words", "xyz", "Big Red", "q", "the end", "Not, here"]
ROWS = [reply([word, word[::-1], *["more"][: number % 3 % 2]], [number % 4], number=number)
        for number, word in enumerate(WORDS)]


def run(tmp_path, model, samples=ROWS, name="run", **flags):
    """The run's folder, after `ilql.train` with small settings."""
    names = ("rewards", "metric_fn", "eval_prompts", "stop_sequences", "logit_mask")
    options = {name: flags.pop(name) for name in names if name in flags}
    ilql.train(ilql.Args(model=model, output_dir=str(tmp_path / name), **{**RUN, **flags}), samples, **options)
    return tmp_path / name


def recorded(monkeypatch) -> list[tuple[dict, list]]:
    """What each batch finds and is, from now on: all weights, targets too, and trajectories as they are written."""
    calls, inner = [], ilql.batch_loss_and_gradient

    def record(model, batch, args):
        weights = {name: tensor.clone() for name, tensor in full_state_dict(model).items()}
        for name, head in model.heads.items():
            assert all(p.requires_grad == (not name.startswith("target_")) for p in head.parameters())
        calls.append((weights, [written(item, model.seq2seq) for item in batch]))
        return inner(model, batch, args)

    monkeypatch.setattr(ilql, "batch_loss_and_gradient", record)
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


RUNS = {"gpt2 turns": ("gpt2", TURNS, {}, TURN_LINES), "llama texts": ("llama", TEXTS, {}, TEXT_LINES),
        "gemma2 chats": ("gemma2", CHATS, dict(two_qs=False), CHAT_LINES),
        "gpt2 history": ("gpt2", [FIVE], dict(history=2), HISTORY[2]),
        "t5 turns": ("t5", TURNS, dict(awac_beta=2.0), SEQ2SEQ["turns"]),
        "bart chats": ("bart", CHATS, {}, SEQ2SEQ["chats"])}


@pytest.mark.parametrize("name", RUNS)
def test_steps_of_a_run_are_steps_of_adamw_on_the_brute_force_loss(name, chat_path, tmp_path, monkeypatch):
    """All that is logged at each step, and every weight after the first; targets begin as the heads, which begin at 0
    and unlike each other; the user's objects are unchanged."""
    architecture, samples, flags, lines = RUNS[name]
    given, calls = copy.deepcopy(samples), recorded(monkeypatch)
    args = ilql.Args(model=chat_path(architecture), output_dir=str(tmp_path / "run"), normalize_rewards="none",
                     weight_decay=0.5, epochs=3, schedule="constant",
                     **{**RUN, "batch_size": len(lines), **flags})
    returned, tokenizer = ilql.train(args, samples)
    assert samples == given
    start, *rows = rows_of(tmp_path / "run")
    assert {name: start[name] for name in start if name.startswith("data/")} == {
        "data/rows": len(samples), "data/trajectories": len(lines), "data/cut": 0,
        "data/dropped": sum(not written_of([row], seq2seq=returned.config.is_encoder_decoder) for row in samples)}
    actions = sum(len(rewards) for _, rewards, _ in lines)
    model = valued(plain(args.model), args.two_qs)
    for number, ((weights, batch), row) in enumerate(zip(calls, rows, strict=True)):
        assert sorted(batch) == sorted(lines)
        model.load_state_dict(weights)
        for q in ["q1", "q2"][: 1 + args.two_qs]:
            same = [torch.equal(a, b) for a, b in zip(model.heads[q].parameters(),
                                                      model.heads[f"target_{q}"].parameters())]
            assert all(same) if number == 0 else not same[2]
        expected, grads = reference(model, lines, args)
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=2e-4, abs=2e-5)
        norm = torch.stack([gradient.norm() for gradient in grads.values()]).norm().item()
        assert row["optim/grad_norm"] == pytest.approx(norm, rel=1e-3) and row["optim/learning_rate"] == 1e-2
        assert row["samples"] == (number + 1) * len(lines) and row["epoch"] == number + 1
        assert row["actions"] == (number + 1) * actions and row["optim/target_syncs"] == number + 1
        if number == 0:
            assert row["value/q"] == row["value/v"] == row["value/target_q"] == 0
            heads = [model.heads[name][0].weight for name in ["v", "q1", "q2"][: 2 + args.two_qs]]
            assert len({weight[0, 0].item() for weight in heads}) == len(heads)
            for name, parameter in model.named_parameters():
                if name in grads:
                    clipped = grads[name] * min(1, 1 / norm)
                    decay = 1e-2 * 0.5 if parameter.ndim > 1 else 0
                    stepped = parameter.detach() * (1 - decay) - 1e-2 * clipped / (clipped.abs() + 1e-8)
                    sure = clipped.abs() > 1e-5  # Adam's first step is the sign, also of what is but rounding
                    assert ((calls[1][0][name] - stepped).abs() * sure).max() < 2e-5, name
    lm = plain(tmp_path / "run" / "model")
    inputs = dict(input_ids=torch.tensor([[5, 6, 7]]))
    inputs |= dict(decoder_input_ids=torch.tensor([[0, 4]])) if lm.config.is_encoder_decoder else {}
    assert torch.equal(lm(**inputs).logits, returned(**inputs).logits)
    assert tokenizer("ab")["input_ids"] == parsed("ab")[0]
    expected = ["v", *(f"{kind}{q}" for q in ("q1", "q2")[: 1 + args.two_qs] for kind in ("", "target_"))]
    assert sorted(load_heads(str(tmp_path / "run" / "model"))) == sorted(expected)


@pytest.mark.parametrize("every,rate", [(1, 0.3), (2, 0.3), (3, 1.0), (4, 0.5), (100, 0.5)])
def test_targets_follow_every_so_many_steps(every, rate, model_path, tmp_path, monkeypatch):
    """Seven steps over three epochs; targets by hand after each."""
    calls = recorded(monkeypatch)
    folder = run(tmp_path, model_path("gpt2"), ROWS[:5], batch_size=2, epochs=3, sync_every=every, target_rate=rate,
                 max_steps=7)
    weights = [weights for weights, _ in calls]
    weights.append({f"heads.{name}.{key}": value for name, head in load_heads(f"{folder}/model").items()
                    for key, value in head.state_dict().items()})
    targets = {name: tensor.double() for name, tensor in weights[0].items() if "target_" in name}
    assert len(weights) == 8 and len(targets) == 8
    for step, found in enumerate(weights):
        for name in targets:
            online = found[name.replace("target_", "")]
            if step and step % every == 0:
                targets[name] = (1 - rate) * targets[name] + rate * online.double()
            assert (found[name] - targets[name]).abs().max() < 1e-6, (step, name)
            if step and ".2." in name:  # the others have no gradient at first, as the last layer is 0
                assert torch.equal(found[name], online) == (rate == 1 and step % every == 0), (step, name)
    assert [row["optim/target_syncs"] for row in rows_of(folder)[1:]] == [step // every for step in range(1, 8)]


def same_runs(a, b):
    """Metrics, samples, weights and heads are equal to the last bit."""
    assert [numbers(row) for row in rows_of(a)] == [numbers(row) for row in rows_of(b)]
    assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()
    for folder in ("model", "checkpoints/best"):
        left, right = plain(a / folder).state_dict(), plain(b / folder).state_dict()
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
        left, right = load_file(a / folder / "heads.safetensors"), load_file(b / folder / "heads.safetensors")
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("flags", [dict(warmup_steps=3, sync_every=3), dict(num_layers_unfrozen=1, two_qs=False),
                                   dict(lora_rank=2)], ids=["whole", "unfrozen", "lora"])
def test_resume_is_exact(flags, model_path, tmp_path):
    """Stopped after step 3 and resumed from step 2, in the middle of an epoch of 10 rows and between two syncs."""
    flags = {"model": model_path("gpt2"), "epochs": 2, "save_every": 2, "keep_checkpoints": 9, "eval_every": 1,
             "num_eval_prompts": 2, "beta": [0.0, 3.0], **flags}
    metric = lambda outputs: {"score": [output.count("e") + torch.rand(()).item() for output in outputs]}  # noqa: E731
    for name, more in {"a": {}, "b": dict(max_steps=3)}.items():
        run(tmp_path, name=name, metric_fn=metric, **flags, **more)
    resume = str(tmp_path / "b" / "checkpoints" / "step-2")
    ilql.train(ilql.Args(**{**RUN, **flags}, resume=resume), ROWS, metric_fn=metric)
    assert len(rows_of(tmp_path / "a")) == 6
    same_runs(tmp_path / "a", tmp_path / "b")
    saved = load_file(next((tmp_path / "b" / "checkpoints" / "step-2").glob("*.safetensors")))
    assert sum(name.startswith("model.heads.target_") for name in saved) == 4 * (1 + flags.get("two_qs", True))
    with pytest.raises(UserError, match="is of another run: its --epochs was 2, not 3"):
        ilql.train(ilql.Args(**{**RUN, **flags, "epochs": 3}, resume=resume), ROWS)
    changed = [*ROWS[:-1], {**ROWS[-1], "reward": [77]}]
    with pytest.raises(UserError, match="^--resume .*step-2: the data has changed since"):
        ilql.train(ilql.Args(**{**RUN, **flags}, resume=resume), changed)


def test_each_epoch_has_every_trajectory_once_in_another_order(model_path, tmp_path, monkeypatch):
    calls = recorded(monkeypatch)
    folder = run(tmp_path, model_path("gpt2"), epochs=2, normalize_rewards="none")
    lines = written_of(ROWS)
    assert [len(batch) for _, batch in calls] == [4] * 5 and len(lines) == 10
    seen = sum((batch for _, batch in calls), [])
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(lines) and seen[:10] != seen[10:]
    assert [row["actions"] for row in rows_of(folder)] == [
        sum(len(rewards) for _, rewards, _ in seen[: 4 * step]) for step in range(6)]


def test_rewards_may_stand_beside_the_samples(model_path, tmp_path, monkeypatch):
    """A list of any kind; it wins over a column; nothing given is changed."""
    samples, rewards = [["a", "b"], {"turns": ["c", "d", "e"], "reward": 9}, "xyz"], [1, [2], torch.tensor(3.0)]
    given = copy.deepcopy((samples, rewards))
    calls = recorded(monkeypatch)
    run(tmp_path, model_path("gpt2"), samples, rewards=rewards, normalize_rewards="none")
    run(tmp_path, model_path("gpt2"), samples, name="tensor", rewards=torch.tensor([1.0, 2, 3]),
        normalize_rewards="none")
    for _, batch in calls:
        assert sorted(batch) == [("a[b$]", [0, 1], ""), ("c[d]", [2], "cde"), ("x[yz$]", [0, 0, 3], "")]
    assert (samples, rewards) == given


def test_rewards_that_are_missing_or_too_many_are_refused(model_path, tmp_path):
    def train(samples, **flags):
        run(tmp_path, model_path("gpt2"), samples, **flags)

    for rewards in ([1.0], [1, 2, 3], []):
        with pytest.raises(UserError, match="^rewards: must be a list with one for each of the 2 samples"):
            train([["a", "b"], ["c", "d"]], rewards=rewards)
    with pytest.raises(UserError, match="^--dataset, row 2: a reward is a finite number, .* not NoneType"):
        train([["a", "b"], ["c", "d"]], rewards=[1, None])
    for samples in ([["a", "b"]], [reply(["a", "b"], 1), "text"], [reply(["a", "b"], None)]):
        with pytest.raises(UserError, match=f"^--dataset, row {len(samples)}: has no reward.*; --format can map rows"):
            train(samples)
    with pytest.raises(UserError, match="^--dataset : none of its 2 rows has an output to learn from"):
        train([reply(["a"], 1), reply(["a", "", "b"], 1)])
    with pytest.raises(UserError, match="^--dataset, row 1: has no text, prompt and completion, messages or turns"):
        train([{"reward": 1}])
    assert not (tmp_path / "run" / "args.yaml").exists(), "nothing has begun"


@pytest.mark.parametrize("rewards", [1.0, None, "ab"])
def test_rewards_that_are_no_list_are_refused(rewards, model_path, tmp_path):
    with pytest.raises(UserError, match="^[^\n]*reward[^\n]*$"):
        run(tmp_path, model_path("gpt2"), [["a", "b"], ["c", "d"]], rewards=rewards)


def test_random_walks_are_learned_from_their_optimality(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(ilql, "batch_loss_and_gradient", lambda model, batch, args: calls.append(batch) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ilql.train(ilql.arguments(output_dir=str(tmp_path), num_eval_prompts=0))
    walks = random_walks(1)
    rewards = dict(zip(walks.walks, walks.reward(walks.walks)))
    every = [rewards[walk] for walk in walks.walks]
    assert len(calls[0]) == 100
    for item in calls[0]:
        walk = "".join("abcdefghijklmnopqrstu"[token - 3] for token in [*item.prompt, *item.output[:-1]])
        assert len(item.prompt) == 1 and item.output[-1] == EOS and not item.next_prompt
        assert list(item.actions) == list(range(len(item.output)))
        assert item.rewards[-1] == pytest.approx((rewards[walk] - statistics.mean(every)) / statistics.stdev(every))
        assert not any(item.rewards[:-1])


def test_a_run_stopped_early_has_the_learning_rates_of_the_whole(model_path, tmp_path):
    flags = dict(warmup_steps=1, max_steps=3, epochs=2, learning_rate=2.0 / 1000)
    for schedule, shares in {"constant": (1, 1, 1), "linear": (1, 1, 3 / 4),
                             "cosine": (1, 1, (1 + math.cos(math.pi / 4)) / 2)}.items():
        folder = run(tmp_path, model_path("gpt2"), name=schedule, schedule=schedule, **flags)
        assert [row["optim/learning_rate"] for row in rows_of(folder)[1:]] == pytest.approx(
            [share * 2e-3 for share in shares])


def test_one_row_is_enough(model_path, tmp_path):
    """Its reward is as it is; there is no batch or spread that is too small."""
    folder = run(tmp_path, model_path("gpt2"), [["a", "b"]], rewards=[3.0], epochs=2)
    assert [row["loss/q"] for row in rows_of(folder)[1:2]] == pytest.approx([2 * 9 / 2]), "over two actions"


def test_a_gradient_that_is_not_finite_stops_with_the_batch_saved(model_path, tmp_path):
    rows = [reply(["a", "b"], 1), reply(["a", "b"], 1e200)]
    with pytest.raises(UserError, match="^step 0: the gradient is (nan|inf); its batch and .*/nonfinite-step-0, "):
        run(tmp_path, model_path("gpt2"), rows, normalize_rewards="none")
    saved = torch.load(tmp_path / "run" / "nonfinite-step-0" / "batch.pt", weights_only=True)
    assert sorted(written(ilql.Trajectory(*item)) for item in saved["trajectories"]) == [
        ("a[b$]", [0, 1], ""), ("a[b$]", [0, 1e200], "")]
    assert not (tmp_path / "run" / "model").exists()


# --- known values -----------------------------------------------------------------------------------------------------


def steps_of(lines: list[tuple]) -> list[tuple]:
    """(state, action, reward, state after it or None) of each step; a state is the text before it."""
    steps = []
    for line, rewards, after in lines:
        text, said, taken = "", False, []
        for mark in line:
            said = mark == "[" if mark in "[]" else said
            if mark not in "[]":
                taken += [(text, mark)] if said else []
                text += mark
        follow = [*(state for state, _ in taken[1:]), after or None]
        steps += [(*pair, reward, later) for pair, reward, later in zip(taken, rewards, follow, strict=True)]
    return steps


def solved(lines: list[tuple], gamma: float, tau: float) -> tuple[dict, dict]:
    """Q and V of a small MDP by iteration: Q(s, a) is the mean of r + gamma V(s'), V(s) the expectile of Q(s, a)."""
    q, v, steps = {}, {}, steps_of(lines)
    for _ in range(300):
        targets = {}
        for state, action, reward, later in steps:
            targets.setdefault((state, action), []).append(reward + gamma * (v.get(later, 0) if later else 0))
        q = {pair: statistics.mean(values) for pair, values in targets.items()}
        v = {state: expectile([q[s, a] for s, a, *_ in steps if s == state], tau) for state, *_ in steps}
    return q, v


def assert_learns(lines, gamma: float, tau: float, rounds: int = 400, tolerance: float = 0.05, **flags):
    """Train heads and model on all the lines, and compare what they say in each state with the known values."""
    config = copy.deepcopy(CONFIGS["gpt2"])
    config.n_layer = 2
    torch.manual_seed(3)
    model = valued(transformers.GPT2LMHeadModel(config).eval())
    args = ilql.Args(gamma=gamma, tau=tau, cql_scale=0.0, awac_scale=0.0, micro_batch_size=99, **flags)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    items = [made(*line) for line in lines]
    for step in range(rounds):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, 2 * (1 - step / rounds))
        ilql.batch_loss_and_gradient(model, items, args)
        optimizer.step()
        optimizer.zero_grad()
        ilql.sync_targets(model, 0.2)
    q, v = solved(lines, gamma, tau)
    worst = 0.0
    for state in v:
        hidden = states_of(model.lm, state)[2][-1].detach()
        worst = max(worst, abs(head_output(model.heads["v"], hidden).item() - v[state]))
        for (where, action), value in q.items():
            if where == state:
                for name in ("q1", "q2", "target_q1", "target_q2"):
                    worst = max(worst, abs(head_output(model.heads[name], hidden)[parsed(action)[0][0]].item() - value))
    assert worst < tolerance
    return q, v


TREE = [("s[ab$]", [0, 0, 1], ""), ("s[ac$]", [0, 0, -1], ""), ("s[ac$]", [0, 0, -1], ""), ("s[d$]", [0, 0.5], ""),
        ("s[d$]", [0, 0.5], ""), ("t[a$]", [-0.5, 2], "")]


@pytest.mark.parametrize("gamma,tau", [(0.9, 0.5), (1.0, 0.9)])
def test_the_values_of_a_tree_are_learned(gamma, tau):
    """At tau 0.5 V is the value of the data's own policy; towards 1 that of its best actions."""
    q, v = assert_learns(TREE, gamma, tau)
    if tau == 0.5:
        assert v["sa"] == pytest.approx(0.9 * (1 - 2) / 3) and q["s", "a"] == pytest.approx(0.9**2 * -1 / 3)
        assert v["s"] == pytest.approx((3 * q["s", "a"] + 2 * 0.9 * 0.5) / 5)
    else:
        assert 0.5 < v["sa"] < 1 and v["s"] > 0.5


def test_values_go_across_what_the_user_says():
    """Which is random here: Q is the mean over what may be said."""
    lines = [("s[a]u[b$]", [0.1, 0, 1], ""), ("s[a]v[b$]", [0.1, 0, 0], ""), ("s[a]v[c$]", [0.1, 1, -0.5], ""),
             ("s[c]w[$]", [0, 0.5], "")]
    q, v = assert_learns(lines, 0.8, 0.7)
    assert q["s", "a"] == pytest.approx(0.1 + 0.8 * (v["sau"] + 2 * v["sav"]) / 3)


def test_a_row_that_goes_on_is_worth_what_follows():
    """A loop without an end: each round says "a" and EOS, earns 1, and comes back to the same state. Were the row's end
    terminal, it would be worth 1."""
    samples = [reply(["s", "a", "s"], [1])]
    (line,) = written_of(samples, history=1)
    q, v = assert_learns([line], 0.8, 0.5, rounds=600, tolerance=0.1)
    assert v["sa"] == q["sa", "$"] == pytest.approx(1 / (1 - 0.8**2)) and v["s"] == pytest.approx(0.8 * v["sa"])


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def valued_path(tmp_path_factory):
    """A function from an architecture to a folder with a tiny model of it, with heads that say something."""
    made = {}

    def path(architecture: str, two_qs: bool = True) -> str:
        if (architecture, two_qs) not in made:
            folder = made[architecture, two_qs] = str(tmp_path_factory.mktemp(architecture) / "model")
            export(valued(architecture, two_qs), char_tokenizer(), folder, with_heads=True)
        return made[architecture, two_qs]

    return path


def steered(lm, heads, text: str, beta: float, temperature: float = 1.0, top_k: int = 0, mask=None) -> list[float]:
    """The probabilities of the next token after a text, in plain Python."""
    tokens, _, states, logits = states_of(lm, text)
    logprobs, state = logits[-1].double().log_softmax(-1), states[-1]
    q = [head_output(heads[name], state) for name in heads if name.startswith("target_")]
    value = head_output(heads["v"], state).item()
    scores = [logprobs[i].item() + beta * (min(head[i].item() for head in q) - value) for i in range(len(logprobs))]
    if mask is not None:
        previous = tokens[-1] if tokens else lm.config.decoder_start_token_id
        scores = [-math.inf if mask[previous, i] else score for i, score in enumerate(scores)]
    scores = [score / temperature for score in scores]
    least = sorted(scores)[-top_k] if top_k else -math.inf
    weights = [math.exp(score - max(scores)) if score >= least else 0.0 for score in scores]
    return [weight / sum(weights) for weight in weights]


def chain(lm, heads, prompt: str, uniforms: list[float], greedy: bool = False, **options) -> str:
    """An output sampled one token after the other by inverting the distribution."""
    text = prompt + ">" * lm.config.is_encoder_decoder
    start = len(text)
    for uniform in uniforms:
        share = steered(lm, heads, text, **options)
        token = share.index(max(share)) if greedy else next(
            i for i in range(len(share)) if sum(share[: i + 1]) > uniform)
        text += ("?^$" + LETTERS)[token]
        if token == EOS:
            break
    return text[start:].replace("$", "").replace("?", "").replace("^", "")


MASK = torch.rand(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(4)) < 0.8
MASK[:, [2, 9]] = False
SAMPLING = {"gpt2": [dict(beta=3.0), dict(beta=-2.0, temperature=0.6), dict(beta=5.0, top_k=3), dict(beta=0.0)],
            "gpt2 one": [dict(beta=4.0)], "gemma2": [dict(beta=3.0, temperature=1.5), dict(beta=2.0, mask=MASK)],
            "t5": [dict(beta=3.0), dict(beta=2.0, mask=MASK)], "bart": [dict(beta=4.0, top_k=2, temperature=2.0)]}


@pytest.mark.parametrize("case", SAMPLING)
@torch.no_grad()
def test_samples_are_those_of_plain_python(case, valued_path):
    """log pi + beta (min Q - V) of the targets, then mask, temperature and top k; alike in batches of any size."""
    model, tokenizer = ilql.load(valued_path(case.split()[0], "one" not in case))
    prompts, changed = ["ab", "the cat", "q"], 0
    for options in SAMPLING[case]:
        chained = [chain(model.lm, model.heads, prompt, uniforms, **options) for prompt, uniforms in
                   zip(prompts, noise(generator(7), 3, 6).tolist())]
        keywords = {**options, "logit_mask": options.get("mask")}
        keywords.pop("mask", None)
        for batch_size in (1, 8):
            assert chained == ilql.sample(model, tokenizer, prompts, max_new_tokens=6, seed=7, batch_size=batch_size,
                                          **keywords)
        changed += chained != ilql.sample(model, tokenizer, prompts, max_new_tokens=6, seed=7,
                                          **{**keywords, "beta": 0.0})
    assert changed >= len(SAMPLING[case]) - any(not options["beta"] for options in SAMPLING[case])
    greedy = [chain(model.lm, model.heads, prompt, [0] * 6, greedy=True, beta=4.0) for prompt in prompts]
    assert greedy == ilql.sample(model, tokenizer, prompts, max_new_tokens=6, temperature=0.0, beta=4.0)


@torch.no_grad()
def test_steering_takes_the_smaller_target_and_the_value():
    """Token by token, and so for states of any number; beta 0 leaves the logits alone."""
    model = valued("gpt2")
    states, logits = torch.randn(5, 32), torch.randn(5, VOCABULARY)
    assert ilql.steer(model, 0.0) is None
    found = ilql.steer(model, 2.5)(logits, states, None)
    for i in range(5):
        q = [head_output(model.heads[f"target_{name}"], states[i]) for name in ("q1", "q2")]
        value = head_output(model.heads["v"], states[i])[0]
        expected = logits[i].double().log_softmax(-1) + 2.5 * (torch.minimum(*q) - value)
        assert (found[i] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "t5", "bart"])
def test_a_model_with_heads_is_a_plain_model_too(architecture, valued_path, caplog):
    """transformers loads it with the logits that it had and says nothing; beta 0 is its own sampling."""
    folder = valued_path(architecture)
    lm, expected = plain(folder), tiny_lm(architecture)
    inputs = dict(input_ids=torch.tensor([[5, 6, 7]]))
    inputs |= dict(decoder_input_ids=torch.tensor([[0, 4]])) if lm.config.is_encoder_decoder else {}
    assert torch.equal(lm(**inputs).logits, expected(**inputs).logits)
    auto = transformers.AutoModelForSeq2SeqLM if lm.config.is_encoder_decoder else transformers.AutoModelForCausalLM
    _, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    model, tokenizer = ilql.load(folder)
    for prompt in ("ab", "the cat"):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        output = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)[0]
        output = output[1 if model.seq2seq else ids.shape[1]:]
        assert ilql.sample(model, tokenizer, [prompt], beta=0.0, temperature=0.0, max_new_tokens=5) == [
            tokenizer.decode(output, skip_special_tokens=True)]
    for name, head in model.heads.items():
        assert all(torch.equal(a, b) for a, b in zip(head.parameters(), valued(architecture).heads[name].parameters()))
        assert isinstance(head, TokenHead) == (name != "v")


def test_a_model_without_heads_can_only_be_cloned(model_path):
    model, tokenizer = ilql.load(model_path("gpt2"))
    assert len(ilql.sample(model, tokenizer, ["ab"], beta=0.0, max_new_tokens=3)) == 1
    with pytest.raises(UserError, match="^beta 1.0 needs the heads of a run of ilql.py beside the model"):
        ilql.sample(model, tokenizer, ["ab"], max_new_tokens=3)


def test_what_sample_takes(valued_path):
    """Seeds, stop sequences, messages, top p, prompts that are too long or none at all."""
    model, tokenizer = ilql.load(valued_path("gpt2"))
    found = {seed: ilql.sample(model, tokenizer, ["ab", "cd"], seed=seed, max_new_tokens=9) for seed in (0, 1)}
    assert found[0] != found[1] and found[0] == ilql.sample(model, tokenizer, ["ab", "cd"], max_new_tokens=9)
    stop = found[0][0][3]
    assert ilql.sample(model, tokenizer, ["ab"], max_new_tokens=9, stop_sequences=[stop]) == [
        found[0][0].split(stop)[0]]
    likeliest = ilql.sample(model, tokenizer, ["ab"], max_new_tokens=5, temperature=0.0)
    assert likeliest == ilql.sample(model, tokenizer, ["ab"], max_new_tokens=5, top_p=1e-6)
    assert likeliest == ilql.sample(model, tokenizer, ["ab"], max_new_tokens=5, top_k=1)
    tokenizer.chat_template = CHATML
    assert ilql.sample(model, tokenizer, [says("hi")], max_new_tokens=5) == ilql.sample(
        model, tokenizer, [".u hi<eos>\n.a "], max_new_tokens=5)
    assert len(ilql.sample(model, tokenizer, ["a" * 99, ""], max_new_tokens=5)) == 2
    for prompts, what in (([], "holds no rows$"), ("ab", "is not a list of rows, but str 'ab'$")):
        with pytest.raises(UserError, match=f"^prompts: {what}"):
            ilql.sample(model, tokenizer, prompts)
    for wrong in (dict(max_new_tokens=0), dict(batch_size=0), dict(top_p=0.0), dict(top_k=-1), dict(beta=1e7)):
        with pytest.raises(UserError, match="^sample: .*max_new_tokens at least 1$"):
            ilql.sample(model, tokenizer, ["ab"], **wrong)
    with pytest.raises(UserError, match="stop_sequences: must be a list of texts, none empty, not str 'ab'$"):
        ilql.sample(model, tokenizer, ["ab"], stop_sequences="ab")


@pytest.mark.parametrize("architecture,flags", [
    ("gpt2", dict(eval_temperature=[0.0, 1.0])), ("t5", {}), ("gpt2", dict(lora_rank=2, eval_top_k=[3, 0])),
    ("llama", dict(num_layers_unfrozen=1, keep_sharded=True))])
def test_what_is_loaded_says_what_the_run_said(architecture, flags, model_path, tmp_path, monkeypatch):
    """For each beta and each other option, whose names follow the metric's."""
    folder = run(tmp_path, model_path(architecture), beta=[0.0, 3.0], num_eval_prompts=3, eval_samples=2, max_steps=3,
                 prompt_words=None, metric_fn=lambda outputs: {"letters": [len(output) for output in outputs]}, **flags)
    prompts = [row["turns"][0] for row in (ROWS[0], ROWS[3], ROWS[6]) for _ in range(2)]
    monkeypatch.setattr(ilql, "noise", lambda _, *shape: noise(generator(1, 2), *shape))
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    last, model, tokenizer = rows_of(folder)[-1], *ilql.load(f"{folder}/model")
    names = [name for name in last if name.startswith("eval/letters")]
    assert len(names) == 2 * math.prod(len(value) for value in flags.values() if isinstance(value, list))
    outputs = []
    for name in names:
        settings = dict(part.split("=") for part in name.split("@")[1:])
        options = {"temperature": float(settings.get("temperature", 1)), "top_k": int(settings.get("top_k", 0))}
        found = ilql.sample(model, tokenizer, prompts, beta=float(settings["beta"]), max_new_tokens=4, **options)
        here = [sample for sample in samples if (sample["step"], "eval/letters" + sample["option"]) == (3, name)]
        assert [(sample["prompt"], sample["output"]) for sample in here] == list(zip(prompts, found))
        assert last[name] == pytest.approx(sum(map(len, found)) / 6)
        outputs.append(found)
    assert outputs[0] != outputs[-1]


def test_what_is_frozen_stays_and_the_heads_learn(model_path, tmp_path, monkeypatch):
    for name, flags in {"top": dict(num_layers_unfrozen=1), "lora": dict(lora_rank=2, lora_alpha=8.0)}.items():
        calls = recorded(monkeypatch)
        folder = run(tmp_path, model_path("gpt2"), name=name, epochs=2, **flags)
        monkeypatch.undo()
        first, last = calls[0][0], calls[-1][0]
        changed = {key for key in first if not torch.equal(first[key], last[key])}
        assert {key for key in first if key.startswith("heads.")} <= changed
        lm = {key.removeprefix("lm.") for key in changed if key.startswith("lm.")}
        if name == "top":
            assert lm == {key.removeprefix("lm.") for key in first if key.startswith(("lm.transformer.h.2.",
                                                                                      "lm.transformer.ln_f."))}
        else:
            assert lm and all("lora_" in key for key in lm)
            assert json.loads((folder / "model" / "adapter" / "adapter_config.json").read_text())["r"] == 2
        before, after = plain(model_path("gpt2")).state_dict(), plain(folder / "model").state_dict()
        assert torch.equal(before["transformer.wte.weight"], after["transformer.wte.weight"])
        assert not torch.equal(before["transformer.h.2.mlp.c_fc.weight"], after["transformer.h.2.mlp.c_fc.weight"])


def test_the_headline_is_the_reward_or_the_first_metric():
    headline = lambda **metrics: ilql.headline({f"eval/{name}": value for name, value in metrics.items()})  # noqa: E731
    assert headline(other=3, reward=1, length=9) == {"eval/reward": 1}
    assert headline(score=3, other=4, length=9) == {"eval/score": 3}
    assert headline(length=9) == headline() == {}
    several = {"b@beta=0": 1, "length@beta=0": 5, "b@beta=2": 4, "a@beta=2": 6, "length@beta=2": 5}
    assert headline(**several) == {"eval/b@beta=0": 1, "eval/b@beta=2": 4}
    assert headline(length=3, lengthy=2) == {"eval/lengthy": 2}


def test_the_last_table_has_a_row_for_each_option():
    before = {"eval/a@beta=0": 1.0, "eval/a@beta=2@top_k=3": 2.0, "eval/b@home": 3.0}
    after = {"eval/a@beta=0": 1.5, "eval/length@beta=0": 4, "eval/a@beta=2@top_k=3": 2.5, "eval/b@home": 3.5}
    assert ilql.comparison(before, after) == [
        {"sampled with": "beta=0", "a": "1.000 -> 1.500", "length": "4.000"},
        {"sampled with": "beta=2@top_k=3", "a": "2.000 -> 2.500"},
        {"sampled with": "one beta", "b@home": "3.000 -> 3.500"}]


def test_the_best_checkpoint_is_that_of_the_highest_headline_at_any_beta(model_path, tmp_path):
    """By the second of two betas at step 2; what is worse later does not replace it."""
    scores = {0: (9, 9), 1: (1, 2), 2: (0, 7), 3: (6, 3), 4: (7, 0)}

    def scripted():
        answers = iter([score for step in scores for score in scores[step]])
        return lambda outputs: {"reward": next(answers), "noise": 100.0}

    flags = dict(model=model_path("gpt2"), eval_every=1, schedule="constant", num_eval_prompts=1, beta=[1.0, 2.0])
    folder = run(tmp_path, metric_fn=scripted(), max_steps=4, epochs=2, **flags)
    other = run(tmp_path, metric_fn=scripted(), name="other", max_steps=2, epochs=2, **flags)
    for name in ("model.safetensors", "heads.safetensors"):
        best, there, last = (load_file(path / name) for path in (folder / "checkpoints" / "best", other / "model",
                                                                 folder / "model"))
        assert all(torch.equal(best[key], there[key]) for key in best)
        assert not all(torch.equal(best[key], last[key]) for key in best)
    model, tokenizer = ilql.load(str(folder / "checkpoints" / "best"))
    assert ilql.sample(model, tokenizer, ["ab"], beta=2.0, max_new_tokens=3)


def test_metrics_may_come_and_go(model_path, tmp_path):
    """A metric function that has a number to give only at times, or only for one beta."""
    names = iter("abcd")
    folder = run(tmp_path, model_path("gpt2"), num_eval_prompts=1, max_steps=1,
                 metric_fn=lambda outputs: {next(names): 1.0})
    rows = rows_of(folder)
    assert "eval/a@beta=0" in rows[0] and "eval/b@beta=1" in rows[0] and "eval/d@beta=1" in rows[1]


def test_another_metric_for_random_walks(tmp_path):
    folder = tmp_path / "run"
    ilql.train(ilql.arguments(output_dir=str(folder), max_steps=1, batch_size=4, eval_samples=1, num_eval_prompts=2,
                              beta=[1.0], max_new_tokens=2), metric_fn=lambda outputs: {"mine": 1.0})
    assert rows_of(folder)[-1]["eval/mine"] == 1


def test_evaluation_prompts_and_columns(chat_path, tmp_path):
    """All before a row's last output, or --history texts of it; the other columns reach the metric function."""
    samples = [{**ROWS[0], "extra": 1}, reply(["ab", "c", "de", "f", "g"], [1, 2]), {"text": "Some longer words, here",
               "reward": 1}, {"messages": says("hi", "yo", "c", "d"), "reward": 3}]
    for history, turn in ((None, "abcde"), (1, "de")):
        seen = []
        rows = samples if history is None else samples[:2]
        run(tmp_path, chat_path("gpt2"), rows, name=f"run{history}", num_eval_prompts=9, history=history, beta=[0.0],
            metric_fn=lambda prompts, extra, reward: seen.append((prompts, extra, reward)) or {})
        expected = ["the cat", turn, "Some longer", ".u hi\n.a yo\n.u c\n.a "][: len(rows)]
        assert seen == [(expected, [1, *[None] * (len(rows) - 1)], [row["reward"] for row in rows])] * 2


def test_what_saves_memory_or_time_changes_no_number(model_path, tmp_path):
    more = dict(num_eval_prompts=3, eval_temperature=[0.0], eval_every=2, beta=[2.0])
    one = rows_of(run(tmp_path, model_path("llama"), **more))
    for flags in (dict(gradient_checkpointing=True, keep_sharded=True), dict(offload=True),
                  dict(micro_batch_size=1, generation_batch_size=1), dict(dtype="bfloat16")):
        other, near = run(tmp_path, model_path("llama"), name=str(flags), **more, **flags), "dtype" in flags
        for row, same in zip(one, rows_of(other), strict=True):
            for name in numbers(row):
                if not (near and name == "eval/length"):
                    assert same[name] == pytest.approx(row[name], rel=0.05 if near else 1e-3,
                                                       abs=0.05 if near else 1e-4), (flags, name)


def test_logit_mask_and_stop_sequences_reach_the_evaluation(model_path, tmp_path):
    mask = torch.ones(VOCABULARY, VOCABULARY, dtype=torch.bool)
    mask[:, [5, 6]] = False  # only b and c
    folder = run(tmp_path, model_path("gpt2"), num_eval_prompts=3, beta=[0.0, 5.0], logit_mask=mask, max_steps=1)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {letter for sample in samples for letter in sample["output"]} == {"b", "c"}
    folder = run(tmp_path, model_path("gpt2"), name="stop", num_eval_prompts=3, beta=[0.0, 5.0], logit_mask=mask,
                 max_steps=1, stop_sequences=["c"])
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {letter for sample in samples for letter in sample["output"]} == {"b"}
    for wrong in (mask.float(), mask[0], torch.ones_like(mask)):
        with pytest.raises(UserError, match="^logit_mask must be "):
            run(tmp_path, model_path("gpt2"), name="wrong", logit_mask=wrong)


# --- ranks ------------------------------------------------------------------------------------------------------------

# what two ranks compute: model, rows, what they are, settings, CHUNK
RANKED = {
    "gpt2": ("gpt2", TURNS, TURN_LINES, "plain", 2**24),  # 13: the last of rank 1 is a stand-in
    "gpt2 chunks": ("gpt2", TURNS, TURN_LINES, "awac", 3 * VOCABULARY),
    "llama pairs": ("llama", PAIRS, PAIR_LINES, "awac", 2**24),  # none goes on
    "gpt2 alone": ("gpt2", TURNS[4:5], TURN_LINES[4:5], "plain", 2**24),  # fewer than ranks
    "gpt2 two": ("gpt2", TURNS[3:5], TURN_LINES[3:5], "one q", 2**24),  # one goes on
    "t5": ("t5", TURNS, SEQ2SEQ["turns"], "plain", 2**24),
    "bart two": ("bart", [TURNS[4], TURNS[12]], [("a>[b$]", [0, 1], "abc>"), ("^>[ab$]", [0, 0, 2], "")], "plain",
                 2**24),
    "t5 alone": ("t5", TURNS[4:5], [("a>[b$]", [0, 1], "abc>")], "awac", 2**24),
}
WORKER = f"""import sys
sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}
import test_ilql
test_ilql.work(*sys.argv[1:])
"""
RANKED_RUN = dict(epochs=2, save_every=2, eval_every=2, num_eval_prompts=3, beta=[0.0, 3.0], eval_temperature=[0.0],
                  sync_every=3)


def work(folder: str, model: str) -> None:
    """Run on each of several ranks: numbers and whole gradients of RANKED, samples, and the first steps of a run."""
    torch.set_num_threads(1)
    init(0)
    found = {}
    for name, (architecture, samples, _, settings, common.models.CHUNK) in RANKED.items():
        args = ilql.Args(**SETTINGS[settings])
        policy = prepare(valued(architecture, args.two_qs), torch.float32, CPU)
        items, *_ = trajectories_of(samples, seq2seq=policy.seq2seq)
        for args.micro_batch_size in (1, 5):
            values = ilql.batch_loss_and_gradient(policy, items, args)
            grads = {name: parameter.grad.full_tensor() for name, parameter in policy.named_parameters()
                     if parameter.grad is not None}
            policy.zero_grad()
            assert len(set(gather_rows([repr(values)], torch.distributed.get_world_size()))) == 1
            found[name, args.micro_batch_size] = values, grads
        for keep_sharded in (False, True):
            items = sample_texts(policy, char_tokenizer(), [[4, 5], [6], [7, 8]], noise(generator(1), 3, 5),
                                 LogitRules(eos_ids=(EOS,)), batch_size=2, adjust_logits=ilql.steer(policy, 3.0),
                                 keep_sharded=keep_sharded)
            found[name, "samples", keep_sharded] = [item["tokens"] for item in items]
        ilql.sync_targets(policy, 0.25)
        found[name, "targets"] = full_state_dict(policy.heads)
    common.models.CHUNK = 2**24
    ilql.train(ilql.Args(model=model, output_dir=f"{folder}/two", max_steps=2, **{**RUN, **RANKED_RUN}), ROWS)
    if torch.distributed.get_rank() == 0:
        torch.save(found, f"{folder}/found.pt")
    torch.distributed.barrier()
    os._exit(0)  # as common.cli.run does


@pytest.fixture(scope="module")
def two_ranks(model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "worker.py").write_text(WORKER)
    done = run_forked(str(folder / "worker.py"), str(folder), model_path("gpt2"), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", RANKED)
def test_two_ranks_have_the_numbers_and_gradients_of_one(name, two_ranks):
    """Numbers, gradients, samples and synced targets; with trajectories that do not divide evenly, fewer than ranks, or
    of which one rank has none that goes on."""
    found = torch.load(two_ranks / "found.pt", weights_only=True)
    architecture, samples, lines, settings, _ = RANKED[name]
    args = ilql.Args(**SETTINGS[settings])
    model = valued(architecture, args.two_qs)
    expected, expected_gradients = reference(model, lines, args)
    for micro_batch_size in (1, 5):
        values, grads = found[name, micro_batch_size]
        assert values == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert_same_gradients(grads, expected_gradients)
    uniforms = noise(generator(1), 3, 5).tolist()
    with torch.no_grad():
        chained = [chain(model.lm, model.heads, prompt, row, beta=3.0)
                   for prompt, row in zip(["ab", "c", "de"], uniforms)]
    for keep_sharded in (False, True):
        texts = [texts_of(tokens) for tokens in found[name, "samples", keep_sharded]]
        assert [re.sub("[?^$]", "", text) for text in texts] == chained
    heads = model.heads.state_dict()
    for key, tensor in found[name, "targets"].items():
        online = heads[key.replace("target_", "")]
        assert torch.allclose(tensor, 0.75 * heads[key] + 0.25 * online if "target_" in key else online, atol=1e-6)


def test_one_process_goes_on_with_what_two_have_left(two_ranks, model_path, tmp_path):
    """The first steps have the numbers of one process, and so have those after them, targets too."""
    whole = run(tmp_path, model_path("gpt2"), name="one", **RANKED_RUN)
    ilql.train(ilql.Args(model=model_path("gpt2"), output_dir=str(two_ranks / "two"), resume="auto",
                         **{**RUN, **RANKED_RUN}), ROWS)
    one, two = rows_of(whole), rows_of(two_ranks / "two")
    assert len(one) == len(two) == 6 and one[2]["optim/target_syncs"] == 0 and one[3]["optim/target_syncs"] == 1
    for row, other in zip(one, two):
        assert numbers(other) == pytest.approx(numbers(row), rel=5e-3, abs=1e-3)
    left, right = (load_heads(str(folder / "model")) for folder in (whole, two_ranks / "two"))
    for name in left:
        for a, b in zip(left[name].parameters(), right[name].parameters(), strict=True):
            assert (a - b).abs().max() < 2e-3, name


# --- flags and the command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags,problem", [
    (dict(beta=[math.nan]), "--beta nan: needs values"), (dict(beta=[]), "--beta : needs values"),
    (dict(beta=[0.0, math.inf]), "--beta 0.0 inf: needs values"), (dict(beta=[1e7]), "--beta 10000000.0: needs values"),
    (dict(tau=0.0), "--tau 0.0: must lie between 0 and 1"), (dict(tau=1.0), "--tau 1.0: must lie between 0 and 1"),
    (dict(tau=math.nan), "--tau nan: must be from 0 to 1"), (dict(tau=1.5), "--tau 1.5: must be from 0 to 1"),
    (dict(gamma=1.01), "--gamma 1.01: must be from 0 to 1"), (dict(gamma=-0.1), "--gamma -0.1: must be from 0 to 1"),
    (dict(target_rate=1.1), "--target-rate 1.1: must be from 0 to 1"),
    (dict(dataset=None), "--model m needs a --dataset"),
    (dict(model=None), "--dataset rows.jsonl needs a --model"),
    (dict(model=None, dataset=None, lora_rank=2), "--lora-rank and --num-layers-unfrozen need a --model"),
    (dict(model=None, dataset="randomwalks", num_layers_unfrozen=1), "--lora-rank and --num-layers-unfrozen need"),
    (dict(model=None, dataset=None, tokenizer="t"), "--tokenizer needs a --model"),
    (dict(num_layers_unfrozen=1, lora_rank=2), "--num-layers-unfrozen: leave it out, --lora-rank"),
    (dict(num_layers_unfrozen=0), "--num-layers-unfrozen 0: must be -1 for all, or at least 1"),
    (dict(max_length=1), "--max-length 1: must be at least 2"),
    (dict(eval_temperature=[-1.0]), "--eval-temperature -1.0: has a value that means nothing"),
    (dict(eval_top_p=[0.0]), "--eval-top-p 0.0: has a value"), (dict(stop=[""]), "--stop '': has a value"),
    *[(dict(**{name: 0}), f"--{name.replace('_', '-')} 0: must be more than 0") for name in (
        "epochs", "batch_size", "micro_batch_size", "max_steps", "learning_rate", "adam_epsilon", "max_grad_norm",
        "max_new_tokens", "generation_batch_size", "eval_every", "eval_samples", "prompt_words", "keep_checkpoints",
        "shard_size", "sync_every", "history", "target_rate")],
    *[(dict(**{name: -1}), f"--{name.replace('_', '-')} -1: must be 0 or more") for name in (
        "seed", "warmup_steps", "save_every", "weight_decay", "lora_rank", "num_eval_prompts", "cql_scale",
        "awac_scale", "awac_beta")]])
def test_settings_that_cannot_work_are_refused(flags, problem):
    with pytest.raises(UserError, match="^" + re.escape(problem)) as error:
        ilql.check(ilql.Args(**{"dataset": "rows.jsonl", "model": "m", **flags}))
    assert "\n" not in str(error.value)


def test_settings_that_work_are_let_through():
    for flags in (dict(), dict(dataset="randomwalks"), dict(model="m", dataset="rows.jsonl", lora_rank=2),
                  dict(model="m", dataset="randomwalks"), dict(gamma=1.0, tau=0.5, target_rate=1.0, beta=[-1.0, 100.0]),
                  dict(gamma=0.0, target_rate=1e-9, cql_scale=0.0, awac_scale=0.0)):
        ilql.check(ilql.Args(**flags))
    ilql.check(ilql.Args(model="m"), samples=[["a", "b"]])
    with pytest.raises(UserError, match="^--dataset .*needs a --model"):
        ilql.check(ilql.Args(), samples=[["a", "b"]])


def test_arguments_have_the_tasks_defaults():
    assert ilql.arguments().tau == ilql.RANDOM_WALKS["tau"] == 0.9
    assert ilql.arguments(epochs=3).epochs == 3 and ilql.arguments(dataset="randomwalks", model="m").tau == 0.9
    assert ilql.arguments(model="m", dataset="f.jsonl") == ilql.Args(model="m", dataset="f.jsonl")
    assert parse(ilql.Args, ilql.preset, ["--epochs", "2"]) == ilql.arguments(epochs=2)


def test_the_command_alone(tmp_path):
    """Random walks for two steps: what is logged is what docs/ilql.md says, what is written can be loaded."""
    folder = tmp_path / "run"
    done = run_forked("ilql.py", "--max-steps", "2", "--eval-samples", "1", "--output-dir", str(folder), "--batch-size",
                      "20", "--sync-every", "2")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "before training" in done.stdout and done.stdout.count("after training") >= 1
    rows = rows_of(folder)
    assert [row["samples"] for row in rows] == [0, 20, 40] and rows[0]["data/rows"] == 1000
    assert [row.get("optim/target_syncs") for row in rows] == [None, 0, 1]
    assert {f"eval/{name}@beta={beta}" for name in ("optimality", "invalid", "length") for beta in (0, 1, 100)} == {
        name for name in rows[0] if name.startswith("eval/")}
    assert {name.split("@")[0] for row in rows for name in row} == documented_metrics("ilql.py") - {"eval/score"}
    model, tokenizer = ilql.load(str(folder / "model"))
    outputs = ilql.sample(model, tokenizer, ["b", "c"], beta=100, max_new_tokens=9)
    assert len(outputs) == 2 and set("".join(outputs)) <= set("abcdefghijklmnopqrstu")


def test_files_and_format_functions(model_path, tmp_path, monkeypatch):
    """--dataset with a column of rewards, --format, which may leave rows out, --metric and --eval-prompts."""
    (tmp_path / "users.py").write_text(
        "def shout(row):\n    return {**row, 'completion': row['completion'] + '!'} if row['reward'] else None\n\n"
        "def count(outputs, answer):\n    return {'score': [len(o) + len(a) for o, a in zip(outputs, answer)]}\n")
    rows = [{"prompt": "x" * n, "completion": "y", "reward": n % 3} for n in range(1, 7)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    calls = recorded(monkeypatch)
    found = rows_of(run(
        tmp_path, model_path("gpt2"), None, dataset=str(tmp_path / "rows.jsonl"), num_eval_prompts=2, beta=[0.0],
        format=f"{tmp_path}/users.py:shout", metric=f"{tmp_path}/users.py:count", normalize_rewards="none",
        eval_prompts=[{"prompt": "x", "answer": "1"}]))
    assert sorted(sum((batch for _, batch in calls), [])) == sorted(
        (f"{'x' * n}[y!$]", [0, 0, n % 3], "") for n in (1, 2, 4, 5))
    assert found[-1]["eval/score"] >= 1
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b", "reward": 1}\n'
                                        '{"prompt": "a", "completion": "b", "reward": NaN}\n')
    with pytest.raises(UserError, match="^--dataset .*bad.jsonl, row 2: a reward is a finite number, .* float nan"):
        run(tmp_path, model_path("gpt2"), None, name="bad", dataset=str(tmp_path / "bad.jsonl"))


def test_a_mistake_is_one_line_and_exit_code_2(model_path, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "ab"}\n')
    done = run_forked("ilql.py", "--model", model_path("gpt2"), "--dataset", str(tmp_path / "rows.jsonl"),
                      "--output-dir", str(tmp_path / "run"))
    assert done.returncode == 2 and done.stdout == ""
    problem = "row 1: has no reward, only text; --format can map rows\n"
    assert re.fullmatch(f"ilql.py: error: --dataset .*rows.jsonl, {problem}", done.stderr)

"""Sampling against transformers' generate, against the training forward, and against plain Python."""

import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, CONFIGS, IDS, LLAMA, VOCABULARY, bpe_tokenizer, char_tokenizer
from test_models import CPU, PROMPTS, close, tiny, train
from torch import nn
from torch.distributed.tensor import DTensor
from torch.fx.experimental.proxy_tensor import make_fx

from common import graphs
from common.cli import UserError
from common.distributed import generator, unsharded
from common.generation import find_stop, generate, noise, pick, sample_texts, stop_checker, try_out
from common.models import LanguageModel, LogitRules, collate, make_head, prepare

MANY = [PROMPTS[i % len(PROMPTS)] + [i % VOCABULARY] for i in range(12)]
MANY_EOS = tuple(range(0, VOCABULARY, 4))  # a quarter of all tokens ends an output, so that rows end all the time


def uniforms(count, length, seed=0):
    return noise(generator(seed), count, length)


def row_masks(seed=0, width=VOCABULARY):
    """A (width, width) mask with about half of all pairs forbidden."""
    return torch.rand(width, width, generator=generator(seed)) < 0.5


class Forbid(transformers.LogitsProcessor):
    """LogitRules' mask, as transformers' generate takes such things."""

    def __init__(self, forbidden):
        self.forbidden = forbidden

    def __call__(self, ids, scores):
        return scores.masked_fill(self.forbidden[ids[:, -1]], -torch.inf)


def reference(lm, prompt, count, eos_id=None, forbidden=None):
    """transformers' greedy continuation of one prompt alone: its tokens, and their log-probs."""
    lm.generation_config.eos_token_id = eos_id
    ids = torch.tensor([prompt])
    out = lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, pad_token_id=0,
                      max_new_tokens=count, return_dict_in_generate=True, output_scores=True,
                      logits_processor=[] if forbidden is None else [Forbid(forbidden)])
    tokens = out.sequences[0, 1 if lm.config.is_encoder_decoder else len(prompt):].tolist()
    return tokens, [scores[0].log_softmax(-1)[token].item() for scores, token in zip(out.scores, tokens)]


def equal(out, expected):
    """Whether a Generation has the expected (tokens, logprobs) for each row."""
    return out.tokens == [tokens for tokens, _ in expected] and all(
        found == pytest.approx(logprobs, abs=1e-4) for found, (_, logprobs) in zip(out.logprobs, expected))


def text_model(tokens):
    """A model, and the logits (see `say`) with which it says these tokens: for tests of what happens around it."""
    return LanguageModel(tiny("gpt2")), nn.functional.one_hot(torch.tensor(tokens), VOCABULARY) * 100.0


def say(script):
    """An adjust_logits hook that takes the next step's logits from a script, whatever the model's are."""
    steps = iter(script)
    return lambda logits, state, previous: next(steps).expand_as(logits)


# --- greedy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("varied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_transformers_generate(architecture, varied):
    """Ragged prompts in one batch here, each alone there. Varied: half of all pairs are forbidden, so that small models
    do not repeat themselves."""
    lm = tiny(architecture)
    forbidden = row_masks() if varied else None
    expected = [reference(lm, prompt, 12, forbidden=forbidden) for prompt in PROMPTS]
    out = generate(LanguageModel(lm), PROMPTS, uniforms(5, 12), LogitRules(0.0, logit_mask=forbidden))
    assert equal(out, expected)
    assert out.finished == [False] * 5 and all(len(tokens) == 12 for tokens in out.tokens)
    if varied:
        assert len({token for tokens in out.tokens for token in tokens}) > 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_ends_with_the_end_token(architecture):
    """The end token is one that the model says; the output includes it and nothing after it."""
    lm = tiny(architecture)
    free = [reference(lm, prompt, 12, forbidden=row_masks())[0] for prompt in PROMPTS]
    eos = free[1][5]
    expected = [reference(lm, prompt, 12, eos_id=eos, forbidden=row_masks()) for prompt in PROMPTS]
    out = generate(LanguageModel(lm), PROMPTS, uniforms(5, 12), LogitRules(0.0, (eos,), logit_mask=row_masks()))
    assert equal(out, expected)
    assert out.tokens[1] == free[1][:free[1].index(eos) + 1] and len(out.tokens[1]) < 12
    assert out.finished == [tokens[-1] == eos for tokens in out.tokens]


def test_greedy_ignores_the_noise_and_reports_log_probs_at_temperature_1():
    model = LanguageModel(tiny("llama"))
    first, second = (generate(model, PROMPTS, uniforms(5, 6, seed), LogitRules(0.0)) for seed in (0, 1))
    assert first == second
    batch = collate(PROMPTS, first.tokens, None, CPU)
    with torch.no_grad():
        assert torch.tensor(sum(first.logprobs, [])) == pytest.approx(model(**batch)["logprobs"], abs=1e-4)


# --- sampler and trainer agree ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_width", [None, VOCABULARY, 50])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampled_logprobs_equal_the_training_forwards(architecture, mask_width):
    """Ragged outputs, temperature, end tokens that are forbidden at first, and a mask of what may follow what."""
    model = LanguageModel(tiny(architecture))
    forbidden = None
    if mask_width:
        forbidden = row_masks(1, mask_width)
    prompts = [[token % 50 for token in prompt] for prompt in MANY]
    rules = LogitRules(0.7, MANY_EOS, 3, forbidden)
    out = generate(model, prompts, uniforms(12, 10), rules)
    batch = collate(prompts, out.tokens, model.start_id, CPU)
    with torch.no_grad():
        logprobs = model(**batch, rules=rules)["logprobs"].tolist()
    assert sum(out.logprobs, []) == pytest.approx(logprobs, abs=1e-4) and all(map(math.isfinite, logprobs))
    assert min(map(len, out.tokens)) >= 4 and len(set(map(len, out.tokens))) > 2
    if mask_width:
        for prompt, tokens in zip(prompts, out.tokens):
            first = model.start_id if model.seq2seq else prompt[-1]
            for before, after in zip([first, *tokens], tokens):
                assert max(before, after) >= mask_width or not forbidden[before, after]


def test_logprobs_are_those_before_top_k_and_top_p():
    model = LanguageModel(tiny("gpt2"))
    out = generate(model, PROMPTS, uniforms(5, 8), LogitRules(0.7), top_k=3, top_p=0.9)
    with torch.no_grad():
        logprobs = model(**collate(PROMPTS, out.tokens, None, CPU), rules=LogitRules(0.7))["logprobs"]
    assert sum(out.logprobs, []) == pytest.approx(logprobs.tolist(), abs=1e-4)


# --- a row's noise is all its chance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_row_is_sampled_alike_alone_in_another_order_and_among_rows_that_end(architecture):
    """Rows end all the time, and leave the batch, which the hook sees; nobody else's tokens change."""
    model, sizes = LanguageModel(tiny(architecture)), []

    def hook(logits, state, previous):
        sizes.append(len(logits))
        assert len(logits) == len(state) == len(previous)
        return logits

    numbers, rules = uniforms(12, 16), LogitRules(1.0, MANY_EOS)
    whole = generate(model, MANY, numbers, rules, adjust_logits=hook)
    assert sizes[0] == 12 and sizes[-1] <= 6 and len(set(sizes)) > 2 and sizes == sorted(sizes, reverse=True)
    assert any(whole.finished) and len(set(map(len, whole.tokens))) > 3
    alone = [generate(model, [prompt], numbers[i:i + 1], rules) for i, prompt in enumerate(MANY)]
    order = torch.randperm(12, generator=generator(3)).tolist()
    moved = generate(model, [MANY[i] for i in order], numbers[order], rules)
    for row in range(12):
        assert whole.tokens[row] == alone[row].tokens[0] == moved.tokens[order.index(row)]
        assert whole.finished[row] == alone[row].finished[0] == moved.finished[order.index(row)]
        assert whole.logprobs[row] == pytest.approx(alone[row].logprobs[0], abs=1e-4)


def test_equal_noise_gives_equal_rows_and_other_noise_other_rows():
    model, numbers = LanguageModel(tiny("gpt2")), uniforms(1, 10)
    out = generate(model, [PROMPTS[0]] * 3, torch.cat([numbers, numbers, uniforms(1, 10, 1)]))
    assert out.tokens[0] == out.tokens[1] != out.tokens[2]


def test_noise_is_uniform_and_depends_on_the_seed_alone():
    first = uniforms(300, 20)
    assert torch.equal(first, uniforms(300, 20)) and not torch.equal(first, uniforms(300, 20, 1))
    assert first.shape == (300, 20) and first.min() >= 0 and first.max() < 1
    assert first.mean().item() == pytest.approx(0.5, abs=0.01) and first.var().item() == pytest.approx(1 / 12, abs=0.01)


# --- pick -------------------------------------------------------------------------------------------------------------

# Unordered, with two zeros, and with ties at the second and at the fourth place.
PROBABILITIES = [0.10, 0.0, 0.20, 0.05, 0.20, 0.0, 0.30, 0.10, 0.05]


def frequencies(probabilities, points=20000, **options):
    """How often each token is picked, over a grid of uniforms."""
    grid = (torch.arange(points) + 0.5) / points
    tokens = pick(torch.tensor(probabilities).log().expand(points, -1), grid, **options)
    return (torch.bincount(tokens, minlength=len(probabilities)) / points).tolist()


def only(kept):
    """PROBABILITIES restricted to the tokens kept, and normalised."""
    total = sum(PROBABILITIES[token] for token in kept)
    return [p / total if token in kept else 0.0 for token, p in enumerate(PROBABILITIES)]


def test_pick_inverts_the_distribution_function():
    assert frequencies(PROBABILITIES) == pytest.approx(PROBABILITIES, abs=1e-3)
    logprobs = torch.randn(1, 300, generator=generator(0)).mul(2).log_softmax(-1)
    assert frequencies(logprobs[0].exp().tolist(), 100_000) == pytest.approx(logprobs[0].exp().tolist(), abs=1e-4)


def test_pick_takes_each_rows_own_noise_and_distribution():
    rows = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.1, 0.1, 0.8]]).log()
    assert pick(rows, torch.tensor([0.7, 0.3, 0.15])).tolist() == [1, 1, 1]
    assert pick(rows, torch.tensor([0.3, 0.7, 0.05])).tolist() == [0, 2, 0]


@pytest.mark.parametrize("top_k,kept", [(1, {6}), (2, {6, 2, 4}), (3, {6, 2, 4}), (4, {6, 2, 4, 0, 7}),
                                        (5, {6, 2, 4, 0, 7}), (7, {0, 2, 3, 4, 6, 7, 8})])
def test_top_k_keeps_the_k_most_likely_and_ties_with_the_last(top_k, kept):
    assert frequencies(PROBABILITIES, top_k=top_k) == pytest.approx(only(kept), abs=1e-3)


@pytest.mark.parametrize("top_p", [0.01, 0.29, 0.31, 0.69, 0.71, 0.79, 0.81, 0.89, 0.96, 0.999])
def test_top_p_keeps_the_fewest_tokens_that_suffice(top_p):
    """Any of equals may be kept: what is held is how many, that they suffice, and that one less would not."""
    found = frequencies(PROBABILITIES, top_p=top_p)
    kept = {token for token, frequency in enumerate(found) if frequency}
    masses = sorted((PROBABILITIES[token] for token in kept), reverse=True)
    assert masses == sorted(PROBABILITIES, reverse=True)[:len(kept)], "the most likely ones"
    assert sum(masses) >= top_p > sum(masses[:-1])
    assert found == pytest.approx(only(kept), abs=1e-3)


def test_top_p_counts_what_top_k_has_left():
    """Of 0.3 / 0.2 / 0.2, normalised 0.43 / 0.29 / 0.29, two suffice for 0.7; without top-k it takes three."""
    def kept(**options):
        return sum(frequency > 0 for frequency in frequencies(PROBABILITIES, top_p=0.7 - 1e-3, **options))
    assert kept(top_k=3) == 2 and kept() == 3


def test_large_top_k_and_top_p_of_1_do_nothing():
    for options in (dict(top_k=9), dict(top_k=1000), dict(top_k=0), dict(top_p=1.0), dict(top_k=9, top_p=1.0)):
        assert frequencies(PROBABILITIES, **options) == frequencies(PROBABILITIES)


@pytest.mark.parametrize("options", [dict(), dict(top_k=3), dict(top_p=0.6), dict(top_k=5, top_p=0.8)])
def test_impossible_tokens_are_never_picked(options):
    """Not at the ends of the noise either, and not where most tokens are impossible."""
    lists = [PROBABILITIES, [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    lists += [[0.0] * 500 + [0.5, 0.0, 0.5] + [0.0] * 500]
    lists += [[0.0 if i % 3 else 1e-3 * (i + 1) for i in range(width)] for width in (10, 1001)]
    for probabilities in lists:
        logprobs = torch.tensor(probabilities).log().log_softmax(-1)
        for uniform in (0.0, 1e-8, 0.25, 0.5, 0.75, 0.999999, 0.9999999, 1 - 2**-24):
            assert probabilities[pick(logprobs[None], torch.tensor([uniform]), **options)]


def test_pick_leaves_its_inputs_alone():
    logprobs, numbers = torch.randn(4, 9).log_softmax(-1), torch.rand(4)
    before = logprobs.clone(), numbers.clone()
    pick(logprobs, numbers, 3, 0.5)
    assert torch.equal(logprobs, before[0]) and torch.equal(numbers, before[1])


# --- when an output ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
@pytest.mark.parametrize("minimum", [0, 1, 4])
def test_lengths_lie_between_minimum_and_maximum_and_finished_says_why_they_ended(architecture, minimum):
    """Several end tokens; before the minimum there is none, and so an output has at least one token more."""
    model = LanguageModel(tiny(architecture))
    out = generate(model, MANY * 3, uniforms(36, 7), LogitRules(1.0, MANY_EOS, minimum))
    lengths = list(map(len, out.tokens))
    assert min(lengths) == minimum + 1 and max(lengths) == 7
    for tokens, logprobs, finished in zip(out.tokens, out.logprobs, out.finished):
        assert len(tokens) == len(logprobs)
        assert not any(token in MANY_EOS for token in tokens[:-1])
        assert finished == (tokens[-1] in MANY_EOS) and (finished or len(tokens) == 7)
    assert any(out.finished) and not all(out.finished)


def test_an_end_token_as_the_last_possible_token_counts_as_finished():
    model, script = text_model([10, 11, 2])
    out = generate(model, [[5]], uniforms(1, 3), LogitRules(1.0, (2,)), adjust_logits=say(script))
    assert out.tokens == [[10, 11, 2]] and out.finished == [True]
    out = generate(model, [[5]], uniforms(1, 2), LogitRules(1.0, (2,)), adjust_logits=say(script))
    assert out.tokens == [[10, 11]] and out.finished == [False]


def test_stop_is_called_with_each_rows_own_output_so_far():
    model, seen = LanguageModel(tiny("gpt2")), []

    def stop(tokens):
        seen.append(list(tokens))
        return len(tokens) == 3 and tokens[0] % 2 == 0

    out = generate(model, MANY, uniforms(12, 5), LogitRules(1.0, (2,)), stop=stop)
    for tokens, finished in zip(out.tokens, out.finished):
        assert finished == (tokens[-1] == 2 or len(tokens) == 3 and tokens[0] % 2 == 0)
        assert finished or len(tokens) == 5
        assert all(tokens[:n] in seen for n in range(1, len(tokens) + (tokens[-1] != 2)))
    assert len({(len(tokens), finished) for tokens, finished in zip(out.tokens, out.finished)}) > 1


def test_nothing_to_do():
    model = LanguageModel(tiny("gpt2"))
    out = generate(model, [], uniforms(0, 5))
    assert out.tokens == out.logprobs == out.finished == []
    out = generate(model, PROMPTS, uniforms(5, 0))
    assert out.tokens == out.logprobs == [[]] * 5 and out.finished == [False] * 5
    out = generate(model, [], uniforms(0, 5), synced=True)
    assert out.tokens == out.logprobs == out.finished == []
    seq2seq = LanguageModel(tiny("t5"))
    assert generate(seq2seq, [], uniforms(0, 5), synced=True).tokens == []
    assert sample_texts(model, char_tokenizer(), [], uniforms(0, 5), LogitRules(), batch_size=4) == []
    items = sample_texts(model, char_tokenizer(), PROMPTS, uniforms(5, 0), LogitRules(), batch_size=4)
    assert [item["output"] for item in items] == [""] * 5 and all(item["sample"] == item["prompt"] for item in items)


# --- stop sequences ---------------------------------------------------------------------------------------------------


def test_find_stop_is_the_first_place_of_any():
    assert find_stop("abcabc", ["c", "bc"]) == 1 and find_stop("abcabc", ["ca"]) == 2
    assert find_stop("abc", ["x"]) == find_stop("abc", []) == find_stop("", ["x"]) == -1
    assert find_stop("abc", ["abc", "x"]) == 0


BPE_TEXTS = ["the cat sat on the mat. User: the cat", "the dog sat on the log. User: the dog",
             "the end\nUser: the end"] * 9


def tokenizers():
    return {"char": char_tokenizer(), "bpe": bpe_tokenizer(BPE_TEXTS, 330)}


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("stops", [["\nUser"], ["at"], ["e"], ["xyz"], ["dog", "cat", "at on"], ["sat on the mat"],
                                   [".", "\n"]])
def test_stop_checker_sees_the_stop_at_the_token_that_completes_it(kind, stops):
    """Over all prefixes: true at first where the whole decoded text has a stop sequence at first."""
    tokenizer = tokenizers()[kind]
    check = stop_checker(tokenizer, stops)
    for text in ("the cat sat on the mat.", "on the end\nUser  the dog", "dogcat sat on", "the log"):
        ids = encode(tokenizer, text)
        assert tokenizer.decode(ids) == text
        whole = [any(stop in tokenizer.decode(ids[:n]) for stop in stops) for n in range(1, len(ids) + 1)]
        found = [check(ids[:n]) for n in range(1, len(ids) + 1)]
        assert whole.index(True) == found.index(True) if any(whole) else not any(found)


def test_stop_checker_without_stop_sequences_is_none():
    assert stop_checker(char_tokenizer(), []) is None


def test_stop_checker_looks_at_the_end_only_and_at_bytes():
    """It decodes a few last tokens, not all each time; a stop sequence of many bytes is still found."""
    seen = []

    def decode(ids):
        seen.append(len(ids))
        return "".join(map(chr, ids))

    check = stop_checker(SimpleNamespace(decode=decode), ["ab"])
    assert check([120] * 500 + [97, 98]) and not check([120] * 500 + [97]) and max(seen) < 20
    tokenizer = bpe_tokenizer(["abc 日本語"], 5)
    ids = encode(tokenizer, "abc 日本語")
    assert len(ids) == 13 and tokenizer.decode(ids) == "abc 日本語"
    check = stop_checker(tokenizer, ["日本語"])
    assert [check(ids[:n]) for n in range(1, 14)] == [False] * 12 + [True]


@pytest.mark.parametrize("stops,said,output,count", [
    (["\nU"], "so it is\nUser", "so it is", 10),  # spans two tokens; nothing is sampled after the second
    (["stop", "it"], "so it is stop", "so ", 5),  # the first hit wins, in whatever order they are given
    (["it", "stop"], "so it is stop", "so ", 5),
    (["zz"], "so it is", "so it is", 8),  # no hit
    (["s"], "so it", "", 1),  # at once
    ([], "so it is", "so it is", 8),
])
def test_sample_texts_cuts_the_text_where_the_stop_begins_and_keeps_the_tokens(stops, said, output, count):
    tokenizer = char_tokenizer()
    model, script = text_model(encode(tokenizer, said))
    (item,) = sample_texts(model, tokenizer, [encode(tokenizer, "Hi. ")], uniforms(1, len(said)), LogitRules(),
                           batch_size=4, stop_sequences=stops, adjust_logits=say(script))
    assert item["tokens"] == encode(tokenizer, said)[:count] and len(item["logprobs"]) == count
    assert item["finished"] == any(stop in said for stop in stops)
    assert (item["prompt"], item["output"], item["sample"]) == ("Hi. ", output, "Hi. " + output)


def test_a_stop_sequence_inside_a_token_ends_the_output_with_that_token():
    tokenizer = bpe_tokenizer(BPE_TEXTS, 61)
    token = max(range(61), key=lambda i: len(tokenizer.decode([i])) if i else 0)
    text = tokenizer.decode([token])
    assert len(text) >= 3 and len(tokenizer) <= VOCABULARY
    other = encode(tokenizer, "g")[0]
    model, script = text_model([other, token, other])
    (item,) = sample_texts(model, tokenizer, [[other]], uniforms(1, 3), LogitRules(), batch_size=1,
                           stop_sequences=[text[1:3]], adjust_logits=say(script))
    assert item["tokens"] == [other, token] and item["output"] == "g" + text[:1] and item["finished"]


def test_a_stop_sequence_in_the_prompt_does_not_count():
    tokenizer = char_tokenizer()
    model, script = text_model(encode(tokenizer, "and so on"))
    (item,) = sample_texts(model, tokenizer, [encode(tokenizer, "Stop |")], uniforms(1, 9), LogitRules(), batch_size=1,
                           stop_sequences=["|", "| a"], adjust_logits=say(script))
    assert item["output"] == "and so on" and not item["finished"]


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_sample_texts(architecture):
    """In the order of the prompts, alike for every batch size; special tokens are in the ids, not in the texts."""
    tokenizer, model = char_tokenizer(), LanguageModel(tiny(architecture))
    texts = ["Hello", "a", "This is one.", " b ", "Last"] * 3
    prompts, numbers = [encode(tokenizer, text) for text in texts], uniforms(15, 8)
    rules = LogitRules(1.0, (2, *range(40, VOCABULARY)))
    one, some, many = (sample_texts(model, tokenizer, prompts, numbers, rules, batch_size=size) for size in (1, 4, 100))
    direct = generate(model, prompts, numbers, rules)
    for row, item in enumerate(many):
        for other in (one[row], some[row]):
            assert other["logprobs"] == pytest.approx(item["logprobs"], abs=1e-4)
            assert {**other, "logprobs": 0} == {**item, "logprobs": 0}
        assert item["tokens"] == direct.tokens[row] and item["finished"] == direct.finished[row]
        assert item["logprobs"] == direct.logprobs[row] and item["prompt"] == texts[row]
        assert item["output"] == "".join(tokenizer.decode([i]) for i in item["tokens"] if i > 2)
        assert item["sample"] == item["prompt"] + (" " if architecture == "t5" else "") + item["output"]
    assert len(many) == 15 and len({item["output"] for item in many}) > 5
    assert any(set(item["tokens"]) & {0, 1, 2} for item in many), "no special token was sampled: another seed is needed"


def test_special_tokens_in_the_prompt_are_not_in_its_text():
    tokenizer, model = char_tokenizer(), LanguageModel(tiny("gpt2"))
    prompt = [1, *encode(tokenizer, "Hi"), 0]
    (item,) = sample_texts(model, tokenizer, [prompt], uniforms(1, 5), LogitRules(), batch_size=1)
    assert item["prompt"] == "Hi" and item["sample"] == "Hi" + item["output"]
    assert item["output"] == tokenizer.decode(item["tokens"], skip_special_tokens=True)


def test_the_space_between_prompt_and_output_is_kept():
    """Metaspace tokenizers drop a text's first space: the output is what follows the prompt in both together."""
    tokenizer = char_tokenizer()
    space, letter = encode(tokenizer, " a")

    class Dropping:
        def decode(self, ids, skip_special_tokens):
            return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens).removeprefix(" ")

    model, script = text_model([space, letter])
    for prompt, text in (([letter], "a"), ([space, letter], "a")):
        (item,) = sample_texts(model, Dropping(), [prompt], uniforms(1, 2), LogitRules(), batch_size=1,
                               adjust_logits=say(script))
        assert (item["prompt"], item["output"], item["sample"]) == (text, " a", text + " a")


# --- adjusted logits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "t5"])
def test_adjust_logits_sees_raw_logits_states_and_last_tokens(architecture):
    """The states are those that heads read, and the logits those before temperature and end-token rules."""
    lm = tiny(architecture)
    model, seen = LanguageModel(lm, {"state": nn.Identity()}), []

    def hook(logits, state, previous):
        seen.append((logits.clone(), state.clone(), previous.clone()))
        return logits

    out = generate(model, PROMPTS, uniforms(5, 4), LogitRules(0.5, (2,), 4), adjust_logits=hook)
    with torch.no_grad():
        batch = collate(PROMPTS, out.tokens, model.start_id, CPU)
        states = model(**batch)["state"].reshape(5, 4, model.width)
        logits = model.logits(states.reshape(20, -1)).reshape(5, 4, -1)
    firsts = torch.tensor([model.start_id if model.seq2seq else prompt[-1] for prompt in PROMPTS])
    for step, (raw, state, previous) in enumerate(seen):
        assert raw.shape == (5, VOCABULARY) and raw.dtype == torch.float32
        assert close(state, states[:, step]) and close(raw, logits[:, step], 1e-3)
        assert torch.equal(previous, torch.tensor(out.tokens)[:, step - 1] if step else firsts)
    assert len(seen) == 4


def test_adjusted_logits_are_what_is_sampled_from_and_reported():
    """ILQL's use: a token pushed through, and log-probs of the adjusted distribution, with the rules applied after."""
    model, added = LanguageModel(tiny("gpt2")), torch.randn(VOCABULARY, generator=generator(0)) * 3
    forced = generate(model, PROMPTS, uniforms(5, 6), adjust_logits=lambda logits, *_: logits.index_fill(
        1, torch.tensor([33]), 1e4))
    assert forced.tokens == [[33] * 6] * 5 and sum(forced.logprobs, []) == pytest.approx([0.0] * 30, abs=1e-5)
    rules, raw = LogitRules(0.7, (2, 3), 2), []

    def hook(logits, state, previous):
        raw.append(logits.clone())
        return logits + added

    out = generate(model, PROMPTS[:1], uniforms(1, 6), rules, adjust_logits=hook)
    for step, token in enumerate(out.tokens[0]):
        adjusted = (raw[step][0] + added) / 0.7
        adjusted[[2, 3]] -= math.inf if step < 2 else 0.0
        assert out.logprobs[0][step] == pytest.approx(adjusted.log_softmax(-1)[token].item(), abs=1e-5)


# --- rows that wait, caches with room ---------------------------------------------------------------------------------

REFILLED = [name for name in ARCHITECTURES if not name.startswith(("t5", "bart"))]  # whose rows join a running batch


@pytest.mark.parametrize("size", [1, 3, 4, 8])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_that_wait_for_a_place_are_sampled_as_alone(architecture, size):
    """Ragged prompts, ends all the time, far fewer places than rows: nobody's tokens change."""
    model, numbers, rules, sizes = LanguageModel(tiny(architecture)), uniforms(30, 16), LogitRules(1.0, MANY_EOS), []
    draw = torch.Generator().manual_seed(size)
    prompts = [torch.randint(VOCABULARY, (1 + 3 * i % 7,), generator=draw).tolist() for i in range(30)]

    def hook(logits, *_):
        sizes.append(len(logits))
        return logits

    out = generate(model, prompts, numbers, rules, batch_size=size, adjust_logits=hook)
    for row, prompt in enumerate(prompts):
        alone = generate(model, [prompt], numbers[row : row + 1], rules)
        assert out.tokens[row] == alone.tokens[0] and out.finished[row] == alone.finished[0]
        assert out.logprobs[row] == pytest.approx(alone.logprobs[0], abs=1e-4)
    assert max(sizes) == size


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox"])
def test_places_that_get_free_are_filled(architecture):
    """A batch of 8 of which outputs end at any time: fewer steps than batch after batch would take."""
    model, numbers, calls = LanguageModel(tiny(architecture)), uniforms(48, 20), []
    prompts = [[i % VOCABULARY, (5 * i) % VOCABULARY] for i in range(48)]
    rules = LogitRules(1.0, tuple(range(0, VOCABULARY, 9)))
    whole = generate(model, prompts, numbers, rules, batch_size=8,
                     adjust_logits=lambda logits, *_: calls.append(len(logits)) or logits)
    chunks = [whole.tokens[i : i + 8] for i in range(0, 48, 8)]
    assert len(calls) < 0.8 * sum(max(map(len, chunk)) for chunk in chunks)
    assert sum(calls) < 1.35 * sum(map(len, whole.tokens)), "rows that have ended are computed on"


def test_a_cache_does_not_keep_the_columns_of_rows_that_have_gone():
    """Long prompts first: when they have left, the short ones do not drag their padding along."""
    model, widths = LanguageModel(tiny("gpt2")), []
    decode = model.decode

    def watch(ids, mask, cache=None, **rest):
        if cache is not None:
            widths.append(mask.shape[1])
            assert mask.shape[1] == cache.get_seq_length() + 1 and mask.any(0).all()
        return decode(ids, mask, cache, **rest)

    model.decode = watch
    prompts = [[7] * 20] * 4 + [[5, 6]] * 12
    generate(model, prompts, uniforms(16, 6), LogitRules(1.0, (2,)), batch_size=4)
    assert max(widths) > 20 and widths[-1] <= 2 + 6


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5", "bart"])
def test_equal_prompts_are_read_once(architecture):
    model, read = LanguageModel(tiny(architecture)), []
    decode = model.decode

    def watch(ids, mask, cache=None, **rest):
        if cache is None:
            read.append(len(ids))
        return decode(ids, mask, cache, **rest)

    model.decode = watch
    prompts = [PROMPTS[i % 2] for i in range(10)]
    out = generate(model, prompts, uniforms(10, 6), LogitRules(1.0, MANY_EOS))
    assert read == [2]
    for row, prompt in enumerate(prompts):
        alone = generate(model, [prompt], uniforms(10, 6)[row : row + 1], LogitRules(1.0, MANY_EOS))
        assert out.tokens[row] == alone.tokens[0]
        assert out.logprobs[row] == pytest.approx(alone.logprobs[0], abs=1e-4)
    assert len(set(map(tuple, out.tokens))) > 4


def test_tokens_are_written_into_the_cache_and_not_copied():
    """Over 70 steps the buffers of a layer move twice, when their room is used up, and hold what a copy would hold."""
    model, places = LanguageModel(tiny("llama")), set()
    decode, caches = model.decode, []

    def watch(ids, mask, cache=None, **rest):
        out = decode(ids, mask, cache, **rest)
        caches.append(out[2])
        if cache is not None:
            places.add(cache.layers[0].keys.data_ptr())
        return out

    model.decode = watch
    (tokens,) = generate(model, [[5, 6, 7]], uniforms(1, 70)).tokens
    assert len(tokens) == 70 and len(places) <= 2
    with torch.no_grad():
        whole = model.lm.model(torch.tensor([[5, 6, 7, *tokens[:-1]]]), use_cache=True).past_key_values
    for layer, other in zip(caches[-1].layers, whole.layers):
        assert close(layer.keys, other.keys) and close(layer.values, other.values)


def test_a_rollout_runs_without_the_blocks_hooks_and_gives_them_back():
    model = prepare(LanguageModel(tiny("gpt2")), torch.float32, CPU)
    block = model.lm.transformer.h[0]
    before = [dict(hooks) for hooks in (block._forward_pre_hooks, block._forward_hooks)]
    assert all(before)
    with unsharded(model):
        assert not block._forward_pre_hooks and not block._forward_hooks
    assert [dict(hooks) for hooks in (block._forward_pre_hooks, block._forward_hooks)] == before


@pytest.mark.parametrize("count", [2, 3, 10, 97, 5000])
def test_pick_inverts_the_distribution_token_by_token(count):
    """Against the double sum; where the number lies on a boundary both neighbours would do."""
    draw = torch.Generator().manual_seed(count)
    logprobs = (3 * torch.randn(64, count, generator=draw)).log_softmax(-1)
    logprobs[:, ::3] = -torch.inf  # forbidden tokens
    logprobs[:, -1] = -1.0
    numbers = torch.rand(64, generator=draw)
    for row, token in enumerate(pick(logprobs, numbers).tolist()):
        weights = [math.exp(value) for value in logprobs[row].tolist()]
        level, below = numbers[row].item() * math.fsum(weights), math.fsum(weights[:token])
        assert weights[token] > 0
        assert below - 1e-6 <= level <= below + weights[token] + 1e-6
    for number, token in ((0.0, 1 if count > 2 else 1), (1.0, count - 1)):
        assert pick(logprobs, torch.full((64,), number)).tolist() == [token] * 64


# --- shapes that do not change ----------------------------------------------------------------------------------------


def traced(self, advance):
    """In the place of a CUDA graph, which no CPU has: the tensor operations of one step, to be run again on the same
    tensors without any of its Python. As there, what asks a tensor for its value fails or goes stale."""
    changed = (self.previous, self.index, self.lengths, self.chosen)
    saved = [tensor.clone() for tensor in changed]
    graph = make_fx(lambda: advance())()
    for tensor, before in zip(changed, saved):
        tensor.copy_(before)
    return graph


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_shapes_that_do_not_change_give_the_same_rows(architecture, replayed, monkeypatch):
    """Ragged prompts, ends all the time, places taken again, wider graphs as rows grow, a head that moves logits."""
    model, seen = LanguageModel(tiny(architecture)), []
    monkeypatch.setattr(graphs, "NARROWEST", 4)
    plain = graphs.FixedBatch._capture

    def capture(self, advance):
        seen.append(advance.args[-1])
        return (traced if replayed else plain)(self, advance)

    monkeypatch.setattr(graphs.FixedBatch, "_capture", capture)
    model.heads["state"] = nn.Linear(model.width, VOCABULARY).requires_grad_(False)
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(50, (1 + 3 * i % 7,), generator=draw).tolist() for i in range(30)]
    rules = LogitRules(0.8, MANY_EOS, 2, row_masks(1, 50))
    settings = dict(batch_size=5, top_p=0.9,
                    adjust_logits=lambda logits, states, _: logits + model.heads["state"](states))
    expected = generate(model, prompts, uniforms(30, 16), rules, **settings)
    assert not seen
    found = generate(model, prompts, uniforms(30, 16), rules, fixed=True, **settings)
    assert found.tokens == expected.tokens and found.finished == expected.finished
    assert sum(found.logprobs, []) == pytest.approx(sum(expected.logprobs, []), abs=1e-4)
    plain_caches = architecture not in ("gemma2", "gemma3", "bloom", "t5", "t5_v1_1", "bart")
    assert len(set(seen)) == len(seen) and (len(seen) >= 3) == plain_caches


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gpt_neox"])
def test_rows_that_have_ended_stay_inside_the_models_positions(architecture, monkeypatch):
    """Some end early and wait for others to end, beside rows that reach the last of 64 positions."""
    model, steps = LanguageModel(tiny(architecture)), []
    advance = graphs.FixedBatch._advance

    def watch(self, *rest):
        steps.append((self.rows[:], self.lengths.tolist()))
        advance(self, *rest)

    monkeypatch.setattr(graphs.FixedBatch, "_advance", watch)
    prompts = [[7, 8, i % VOCABULARY] + [9] * 41 for i in range(150)]
    numbers, stop = uniforms(150, 20), lambda ids: (7 * ids[0] + len(ids)) % 23 == 0  # the fewest end themselves
    expected = generate(model, prompts, numbers, batch_size=16, stop=stop)
    assert generate(model, prompts, numbers, batch_size=16, stop=stop, fixed=True).tokens == expected.tokens
    idle = [length for rows, lengths in steps for row, length in zip(rows, lengths) if row is None]
    assert max(idle) > 64, "the test has no row that would go on so far"


_LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
               layer_types=["linear_attention", "full_attention", "full_attention"], num_key_value_heads=2, head_dim=8)
UNUSUAL = {  # windows counted in columns, biases by distance, and caches that are no keys and values
    "gpt_neo": transformers.GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, window_size=8, intermediate_size=64, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]], **IDS),
    "falcon": transformers.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, **IDS),
    "lfm2": transformers.Lfm2Config(num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"], **LLAMA),
    "qwen3_5": transformers.Qwen3_5TextConfig(**_LINEAR, **LLAMA),
}


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("name", UNUSUAL)
def test_rows_of_unusual_attention_are_those_of_the_forward(name, fixed):
    """Rows that outgrow a window, places taken again, equal prompts: the sampler's log-probs are the forward's."""
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(UNUSUAL[name]).eval()
    for parameter in lm.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.15)
    model, rules = LanguageModel(lm), LogitRules(eos_ids=(2, 3, 4, 5))
    try_out(model)
    prompts = [[5, 6, 7], [8] * 20, [9], [5, 6, 7], [10, 11, 12, 13, 14], [20, 21]]
    out = generate(model, prompts, uniforms(6, 24), rules, batch_size=3, fixed=fixed)
    assert max(map(len, out.tokens)) > 8 and out.tokens[0] != out.tokens[3]
    with torch.no_grad():
        logprobs = model(**collate(prompts, out.tokens, None, CPU), rules=rules)["logprobs"]
    assert sum(out.logprobs, []) == pytest.approx(logprobs.tolist(), abs=1e-4)


@pytest.mark.parametrize("lm_class, config", [
    (transformers.XGLMForCausalLM, transformers.XGLMConfig(
        d_model=32, num_layers=2, attention_heads=4, ffn_dim=64, max_position_embeddings=64, **IDS)),
    (transformers.M2M100ForConditionalGeneration, transformers.M2M100Config(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, decoder_start_token_id=2, **IDS))])
def test_embeddings_in_float32_do_not_stop_a_bfloat16_rollout(lm_class, config):
    """They add positions that are no parameters, so in float32; FSDP's hooks, which a rollout takes off, cast that."""
    torch.manual_seed(0)
    model = prepare(LanguageModel(lm_class(config).eval()), torch.bfloat16, CPU)
    for _ in range(2):
        with unsharded(model):
            out = generate(model, MANY, uniforms(12, 8))
        with torch.no_grad():
            logprobs = model(**collate(MANY, out.tokens, model.start_id, CPU))["logprobs"]
        assert (torch.tensor(sum(out.logprobs, [])) - logprobs).abs().mean() < 0.1


def test_an_error_without_a_message_is_told_by_its_type(monkeypatch):
    monkeypatch.setattr(LanguageModel, "decode", lambda *_, **__: (_ for _ in ()).throw(NotImplementedError()))
    with pytest.raises(UserError, match=r"a GPT2LMHeadModel cannot be .* here \(NotImplementedError\)$"):
        try_out(LanguageModel(tiny("gpt2")))


# --- sharded models ---------------------------------------------------------------------------------------------------


def all_sharded(model):
    return all(isinstance(p, DTensor) for p in model.parameters())


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sharded_models_sample_the_same_and_train_on(architecture, held):
    """Parameters gathered once for the whole rollout, or (keep_sharded) for each token, with ranks in step."""
    lm = tiny(architecture)
    model = LanguageModel(lm)
    model.heads["value"] = make_head(model.width, 1)
    numbers, rules = uniforms(12, 8), LogitRules(1.0, MANY_EOS)
    expected = generate(model, MANY, numbers, rules)
    prepare(model, torch.float32, CPU)
    with unsharded(model, keep_sharded=not held):
        out = generate(model, MANY, numbers, rules, synced=not held)
        assert generate(model, MANY, numbers, rules, synced=not held, fixed=True).tokens == out.tokens
        if held:
            assert not any(isinstance(p, DTensor) for p in model.parameters()), "gathered again after the first forward"
    assert out.tokens == expected.tokens and out.finished == expected.finished
    assert sum(out.logprobs, []) == pytest.approx(sum(expected.logprobs, []), abs=1e-5)
    assert not held or all_sharded(model)
    with torch.no_grad():
        batch = collate(MANY, expected.tokens, model.start_id, CPU)
        before = model(**batch)["logprobs"]
    assert before.tolist() == pytest.approx(model(**batch, rules=LogitRules())["logprobs"].tolist(), abs=1e-5)
    train(model, steps=1, lr=0.1)
    assert all_sharded(model) and any(p.grad is not None for p in model.parameters())
    with unsharded(model, keep_sharded=not held):
        after = generate(model, MANY, numbers, rules, synced=not held)
    assert sum(after.logprobs, []) != pytest.approx(sum(expected.logprobs, []), abs=1e-3), "samples from old weights"


@pytest.mark.parametrize("keep_sharded", [False, True])
def test_sample_texts_of_a_sharded_model(keep_sharded):
    tokenizer, model = char_tokenizer(), LanguageModel(tiny("llama"))
    prompts = [encode(tokenizer, "abc"), encode(tokenizer, "x")] * 3
    numbers, rules = uniforms(6, 5), LogitRules(1.0, MANY_EOS)
    expected = sample_texts(model, tokenizer, prompts, numbers, rules, batch_size=4)
    prepare(model, torch.float32, CPU)
    found = sample_texts(model, tokenizer, prompts, numbers, rules, batch_size=4, keep_sharded=keep_sharded)
    assert [item["tokens"] for item in found] == [item["tokens"] for item in expected]
    assert [item["sample"] for item in found] == [item["sample"] for item in expected]


def test_a_rollout_that_fails_leaves_the_model_sharded():
    model = prepare(LanguageModel(tiny("gpt2")), torch.float32, CPU)

    def hook(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), unsharded(model):
        generate(model, PROMPTS, uniforms(5, 3), adjust_logits=hook)
    assert all_sharded(model)
    train(model, steps=1)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_in_bfloat16_reports_float32_log_probs_close_to_the_trainers(architecture, fixed):
    model = prepare(LanguageModel(tiny(architecture)), torch.bfloat16, CPU)
    rules = LogitRules(0.7, MANY_EOS)
    with unsharded(model):
        out = generate(model, MANY, uniforms(12, 8), rules, fixed=fixed)
    with torch.no_grad():
        logprobs = model(**collate(MANY, out.tokens, model.start_id, CPU), rules=rules)["logprobs"]
    found = torch.tensor(sum(out.logprobs, []))
    assert (found - logprobs).abs().mean() < 0.1
    assert not torch.equal(found, found.bfloat16().float()), "the log-probs themselves were rounded"

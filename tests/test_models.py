"""The training forward, references, LoRA and export against plain transformers, one row at a time."""

import copy
import math
import os
import random

import peft
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, CONFIGS, VOCABULARY, char_tokenizer, tiny_lm
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.activations import FastGELUActivation, NewGELUActivation

import common.models
from common.cli import UserError
from common.distributed import block_lists
from common.generation import generate
from common.models import (
    LanguageModel,
    LogitRules,
    add_lora,
    check_logit_mask,
    checkpoint_blocks,
    collate,
    end_tokens,
    export,
    freeze_below,
    frozen,
    fuse_activations,
    load_lm,
    load_tokenizer,
    make_head,
    pad_rows,
    positions,
    prepare,
    top_copy,
    trunk_of,
)

CPU = torch.device("cpu")
CAUSAL = [name for name in ARCHITECTURES if not CONFIGS[name].is_encoder_decoder]
SEQ2SEQ = [name for name in ARCHITECTURES if CONFIGS[name].is_encoder_decoder]
# Ids 0 (pad) and 2 (EOS) are tokens like any other, in prompts and in responses.
PROMPTS = [[5, 9, 0, 7], [11], [4, 2, 2, 30, 31, 32, 33, 8, 60], [7, 7, 0], [0, 0]]
RESPONSES = [[3, 0, 2], [40, 41, 2, 0, 42, 43, 44, 45], [2], [6, 0, 0, 9, 0], [17, 18, 19, 20]]
COUNT = sum(map(len, RESPONSES))
# What is trained besides whole blocks when the top blocks are: whatever lies above them and is no input embedding.
ABOVE_BLOCKS = {
    "gpt2": ["transformer.ln_f"], "gpt_neox": ["gpt_neox.final_layer_norm", "embed_out", "lm_head"],
    "opt": ["model.decoder.final_layer_norm", "model.decoder.project_out"], "llama": ["model.norm", "lm_head"],
    "qwen3": ["model.norm", "lm_head"], "gemma2": ["model.norm"], "gemma3": ["model.norm"],
    "bloom": ["transformer.ln_f"], "t5": ["decoder.final_layer_norm"],
    "t5_v1_1": ["decoder.final_layer_norm", "lm_head"], "bart": [],
}


def tiny(architecture, seed=0):
    """tiny_lm with random biases and norms too and, as the checkpoints of T5 1.1 have it, a head that is not tied."""
    lm = tiny_lm(architecture, seed)
    for tensor in [*lm.parameters(), *(buffer for name, buffer in lm.named_buffers() if "final_logits_bias" in name)]:
        if tensor.ndim == 1 or tensor.shape[0] == 1:
            tensor.data.add_(torch.randn_like(tensor) * 0.2)
    if architecture == "t5":
        lm.shared.weight.data.mul_(4)  # its tied head is scaled down again
    if architecture == "t5_v1_1":
        lm.lm_head.weight = nn.Parameter(torch.randn_like(lm.lm_head.weight) * 0.3)
    return lm


def batch_of(model, rows=slice(None), prompts=PROMPTS, responses=RESPONSES):
    return collate(prompts[rows], responses[rows], model.start_id, CPU)


def plain(lm, prompt, response, **options):
    """transformers' own forward on one unpadded row: its output, and the places that predict the response's tokens."""
    if lm.config.is_encoder_decoder:
        decoder_ids = torch.tensor([[lm.config.decoder_start_token_id, *response[:-1]]])
        return lm(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder_ids, **options), slice(None)
    return lm(input_ids=torch.tensor([prompt + response]), **options), slice(len(prompt) - 1, -1)


def plain_logits(lm, prompts=PROMPTS, responses=RESPONSES):
    """(N, V) logits of all responses' tokens, row by row."""
    found = [plain(lm, prompt, response) for prompt, response in zip(prompts, responses)]
    return torch.cat([output.logits[0, places] for output, places in found])


def close(a, b, tolerance=1e-4):
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=tolerance)


def weighted(values):
    """A loss that gives every number another weight."""
    return (values * torch.linspace(-1, 2, values.numel()).reshape(values.shape)).sum()


def gradients(model, loss):
    """Every parameter's gradient after the loss's backward."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
            for name, p in model.named_parameters() if p.grad is not None}


def same(left, right, tolerance):
    return left.keys() == right.keys() and all(close(left[name], right[name], tolerance) for name in left)


def train(model, steps=3, lr=0.02):
    """A few SGD steps on whatever is trainable."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (-model(**batch_of(model))["logprobs"].mean()).backward()
        optimizer.step()


def logprobs_of(model):
    with torch.no_grad():
        return model(**batch_of(model))["logprobs"]


# --- the forward ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_equals_plain_transformers_token_by_token(architecture, temperature):
    """Each row alone and unpadded through transformers' forward, and one softmax a token in double precision."""
    lm = tiny(architecture)
    model = LanguageModel(lm)
    with torch.no_grad():
        out = model(**batch_of(model), rules=LogitRules(temperature))
        every = plain_logits(lm).double() / temperature
    targets = [token for response in RESPONSES for token in response]
    assert out["logprobs"].dtype == torch.float32 and out["logprobs"].shape == out["entropy"].shape == (COUNT,)
    for logits, target, logprob, entropy in zip(every, targets, out["logprobs"].tolist(), out["entropy"].tolist()):
        expected = logits - logits.exp().sum().log()
        assert logprob == pytest.approx(expected[target].item(), abs=1e-4)
        assert entropy == pytest.approx(-(expected.exp() * expected).sum().item(), abs=1e-4)
    assert out["logprobs"].std() > 0.3, "the model is too flat to tell tokens apart"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_row_alone_equals_the_row_in_a_batch(architecture):
    model = LanguageModel(tiny(architecture))
    with torch.no_grad():
        whole = model(**batch_of(model))
        alone = [model(**batch_of(model, slice(row, row + 1))) for row in range(len(PROMPTS))]
    for name in ("logprobs", "entropy"):
        assert close(whole[name], torch.cat([out[name] for out in alone]), 2e-5)


@pytest.mark.parametrize("architecture", CAUSAL)
def test_left_padding_and_junk_in_the_padding_change_nothing(architecture):
    model = LanguageModel(tiny(architecture))
    expected = logprobs_of(model)
    ids, mask = pad_rows([prompt + response for prompt, response in zip(PROMPTS, RESPONSES)], 13, left=True)
    scored, _ = pad_rows([[False] * len(p) + [True] * len(r) for p, r in zip(PROMPTS, RESPONSES)], False, left=True)
    assert not mask[:, 0].all() and mask[:, -1].all()
    with torch.no_grad():
        assert close(model(ids, mask, scored)["logprobs"], expected, 2e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ids_in_the_padding_are_never_read(architecture):
    """Not by the model, the encoder, or the chosen targets."""
    model = LanguageModel(tiny(architecture))
    batch = batch_of(model)
    junk = batch | {"ids": batch["ids"].masked_fill(~batch["mask"], 13)}
    if model.seq2seq:
        junk["encoder_ids"] = batch["encoder_ids"].masked_fill(~batch["encoder_mask"], 13)
    with torch.no_grad():
        assert close(model(**junk)["logprobs"], model(**batch)["logprobs"], 1e-6)


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_left_padded_encoder_input_equals_right_padded_for_relative_positions(architecture):
    """T5 measures distances only; BART's absolute encoder positions are why `collate` pads on the right."""
    model = LanguageModel(tiny(architecture))
    batch = batch_of(model)
    ids, mask = pad_rows(PROMPTS, 13, left=True)
    with torch.no_grad():
        moved = model(**batch | {"encoder_ids": ids, "encoder_mask": mask})["logprobs"]
    assert close(moved, logprobs_of(model), 2e-5) == architecture.startswith("t5")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_chunks_give_the_same_values_and_gradients(architecture, monkeypatch):
    model = LanguageModel(tiny(architecture))
    rules = LogitRules(0.7, eos_ids=(2, 9), min_new_tokens=0)
    one = model(**batch_of(model), rules=rules)
    expected = gradients(model, weighted(one["logprobs"]))
    monkeypatch.setattr(common.models, "CHUNK", VOCABULARY * 3)
    many = model(**batch_of(model), rules=rules)
    assert close(one["logprobs"], many["logprobs"], 1e-5) and close(one["entropy"], many["entropy"], 1e-5)
    assert not one["entropy"].requires_grad and not many["entropy"].requires_grad
    assert same(expected, gradients(model, weighted(many["logprobs"])), 1e-4)
    assert any(gradient.abs().max() > 1 for gradient in expected.values())


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_exist_for_scored_tokens_only_and_a_chunk_at_a_time(architecture, grad, monkeypatch):
    """The rows that pass through the output embedding are counted: never batch x length of them."""
    lm = tiny(architecture)
    model, rows = LanguageModel(lm), []
    lm.get_output_embeddings().register_forward_hook(lambda _m, _i, out: rows.append(out.numel() // out.shape[-1]))
    logprobs_of(model)
    assert rows == [COUNT], "one chunk is one call"
    rows.clear()
    monkeypatch.setattr(common.models, "CHUNK", VOCABULARY * 3 + 1)
    with torch.set_grad_enabled(grad):
        loss = model(**batch_of(model))["logprobs"].sum()
    expected = [3] * (COUNT // 3) + [COUNT % 3] * (COUNT % 3 > 0)
    assert rows == expected
    if grad:
        rows.clear()
        loss.backward()
        assert sorted(rows) == sorted(expected), "each chunk's logits are computed again, not kept"


def test_logprobs_do_not_depend_on_what_comes_after():
    """The last response token is a target only: changing it changes its own log-prob and no other."""
    model = LanguageModel(tiny("gpt2"))
    changed = [response[:-1] + [25] for response in RESPONSES]
    with torch.no_grad():
        before, after = (model(**batch_of(model, responses=each))["logprobs"] for each in (RESPONSES, changed))
    last = {sum(map(len, RESPONSES[:row + 1])) - 1 for row in range(len(RESPONSES))}
    assert set(((before - after).abs() > 1e-4).nonzero()[:, 0].tolist()) == last


# --- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_width", [None, VOCABULARY, 40])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_rules_are_temperature_mask_and_minimum_length(temperature, mask_width):
    """Models have more embeddings than their tokenizer has tokens: a mask says nothing about ids beyond it."""
    rng, eos, minimum = random.Random(0), (2, 7, 45), 3
    forbidden = None
    if mask_width:
        forbidden = torch.rand(mask_width, mask_width, generator=torch.Generator().manual_seed(1)) < 0.5
    logits = torch.randn(6, VOCABULARY, dtype=torch.bfloat16)
    previous, index = torch.tensor([*(rng.randrange(40) for _ in range(4)), 45, 60]), torch.arange(6)
    before = [tensor.clone() for tensor in (logits, previous, index)]
    out = LogitRules(temperature, eos, minimum, forbidden)(logits, previous, index)
    assert out.dtype == torch.float32
    for n in range(6):
        for token in range(VOCABULARY):
            expected = logits[n, token].item() / (temperature or 1.0)
            if mask_width and max(previous[n], token) < mask_width and forbidden[previous[n], token]:
                expected = -float("inf")
            if index[n] < minimum and token in eos:
                expected = -float("inf")
            assert out[n, token].item() == pytest.approx(expected, rel=1e-6)
    assert all(torch.equal(x, y) for x, y in zip(before, (logits, previous, index)))


def test_rules_without_end_tokens_or_without_minimum_forbid_nothing():
    logits, place = torch.randn(2, VOCABULARY), torch.zeros(2, dtype=torch.long)
    for rules in (LogitRules(), LogitRules(min_new_tokens=5), LogitRules(eos_ids=(3,))):
        assert torch.equal(rules(logits, place, place), logits)


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_forward_applies_the_rules_with_each_tokens_predecessor_and_place(architecture):
    """With a mask and a minimum length: brute force; entropy and gradients are finite though tokens are at -inf."""
    lm = tiny(architecture)
    model = LanguageModel(lm)
    forbidden = torch.rand(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(2)) < 0.5
    eos, minimum = (50, 51, 2), 2
    responses = [[30 if token == 2 else token for token in response] for response in RESPONSES]
    for prompt, response in zip(PROMPTS, responses):
        first = lm.config.decoder_start_token_id if model.seq2seq else prompt[-1]
        forbidden[[first, *response[:-1]], response] = False
    out = model(**batch_of(model, responses=responses), rules=LogitRules(0.7, eos, minimum, forbidden))
    every, n = plain_logits(lm, responses=responses) / 0.7, 0
    for prompt, response in zip(PROMPTS, responses):
        previous = lm.config.decoder_start_token_id if model.seq2seq else prompt[-1]
        for place, token in enumerate(response):
            possible = [j for j in range(VOCABULARY) if place >= minimum or j not in eos]
            allowed = [j for j in possible if not forbidden[previous, j]]
            logprobs = every[n, allowed].log_softmax(-1)
            assert out["logprobs"][n].item() == pytest.approx(logprobs[allowed.index(token)].item(), abs=1e-4)
            assert out["entropy"][n].item() == pytest.approx(-(logprobs.exp() * logprobs).sum().item(), abs=1e-4)
            previous, n = token, n + 1
    assert out["entropy"].isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(model, out["logprobs"].sum()).values())


# --- heads ------------------------------------------------------------------------------------------------------------


def test_a_new_head_is_exactly_zero_and_can_learn():
    head = make_head(32, 2)
    out = head(torch.randn(10, 32))
    assert out.shape == (10, 2) and torch.equal(out, torch.zeros(10, 2))
    assert head[0].weight.shape == (64, 32) and head[0].weight.abs().max() > 0
    weighted(out).backward()
    assert head[2].weight.grad.abs().max() > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_heads_read_the_state_that_predicts_the_token(architecture):
    """The last layer's state after the final norm, at the place before the token."""
    lm = tiny(architecture)
    model = LanguageModel(lm, {"state": nn.Identity()})
    model.heads["value"] = make_head(model.width, 1)
    with torch.no_grad():
        out = model(**batch_of(model))
        expected = []
        for prompt, response in zip(PROMPTS, RESPONSES):
            output, places = plain(lm, prompt, response, output_hidden_states=True)
            states = output.decoder_hidden_states if model.seq2seq else output.hidden_states
            expected.append(states[-1][0, places])
    assert close(out["state"], torch.cat(expected)) and out["state"].shape[1] == model.width
    assert torch.equal(out["value"], torch.zeros(COUNT, 1))


# --- references that share the trunk ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_trunk_reference_equals_the_policy_at_start_and_a_whole_copy_ever_after(architecture, layers):
    lm = tiny(architecture)
    whole = LanguageModel(copy.deepcopy(lm))
    twin = top_copy(lm, layers, whole=True, detach=True)
    freeze_below(lm, twin)
    policy, reference = LanguageModel(lm), frozen(twin, torch.float32)
    start = logprobs_of(policy)
    assert close(logprobs_of(reference), start, 1e-6) and close(start, logprobs_of(whole), 1e-6)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    train(policy)
    assert not close(logprobs_of(policy), start, 0.05), "training did nothing"
    assert close(logprobs_of(reference), logprobs_of(whole), 1e-5)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_what_lies_above_the_cut_is_trained(architecture, layers):
    lm = tiny(architecture)
    twin = top_copy(lm, layers, whole=True, detach=True)
    freeze_below(lm, twin)
    blocks = max(block_lists(trunk_of(lm)), key=len)
    expected = {id(p) for block in blocks[-layers:] for p in block.parameters()}
    expected |= {id(p) for name, p in lm.named_parameters() if name.rpartition(".")[0] in ABOVE_BLOCKS[architecture]}
    trained = {id(p) for p in lm.parameters() if p.requires_grad}
    names = {id(p): name for name, p in lm.named_parameters()}
    assert {names[i] for i in trained} == {names[i] for i in expected}
    assert not lm.get_input_embeddings().weight.requires_grad
    assert all(p.grad is None for p in [*lm.parameters(), *twin.parameters()]), "the trial backward left gradients"


@pytest.mark.parametrize("architecture", ["llama", "bart"])
def test_shared_trunk_reference_holds_no_second_trunk(architecture):
    """The copy of one block of three has no parameters of the others, nor of an encoder, nor of an untied embedding."""
    lm = tiny(architecture)
    twin = top_copy(lm, 1, whole=True, detach=True)
    kept = {id(p) for p in twin.parameters()}
    assert not kept & {id(p) for p in lm.parameters()}
    block = max(block_lists(trunk_of(lm)), key=len)[-1]
    allowed = sum(p.numel() for p in block.parameters()) + VOCABULARY * 32 + 64 * 32 + 200  # head, positions, norms
    assert sum(p.numel() for p in twin.parameters()) < allowed


def test_copies_do_not_record():
    """A second, deeper copy takes over a block on which the first one listens; it must not keep activations alive."""
    lm = tiny("t5")
    first, second = top_copy(lm, 1, whole=False, detach=False), top_copy(lm, 2, whole=True, detach=True)
    assert sum(len(module._forward_hooks) for module in lm.modules()) == 4  # two cuts, the encoder, and an embedding
    assert not any(module._forward_hooks for twin in (first, second) for module in twin.modules())


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
@pytest.mark.parametrize("layers", [0, 3, 4, -2])
def test_impossible_numbers_of_layers_are_refused(architecture, layers):
    with pytest.raises(UserError, match="3"):
        top_copy(tiny(architecture), layers, whole=True, detach=True)


def test_a_reference_in_bfloat16_is_held_in_bfloat16():
    reference = frozen(tiny("gpt2"), torch.bfloat16)
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16}
    assert logprobs_of(reference).dtype == torch.float32


# --- the value branch -------------------------------------------------------------------------------------------------


def random_head(width):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_value_branch_starts_as_the_policys_own_top_and_learns_apart_from_it(architecture):
    """A loss on the head reaches the branch and the trunk below the cut, not the policy's own top blocks or head."""
    lm = tiny(architecture)
    head = random_head(lm.get_output_embeddings().weight.shape[1])
    without = LanguageModel(lm, {"value": head})(**batch_of(LanguageModel(lm)))
    branch = top_copy(lm, 2, whole=False, detach=False)
    model = LanguageModel(lm, {"value": head}, branch)
    out = model(**batch_of(model))
    assert close(out["value"], without["value"], 1e-6) and out["value"].std() > 0.01
    assert close(out["logprobs"], without["logprobs"], 1e-6)
    model.zero_grad()
    weighted(out["value"]).backward()
    blocks, copies = (max(block_lists(trunk), key=len) for trunk in (trunk_of(lm), branch))
    assert len(blocks) == len(copies) == 3
    reached = [*copies[1:], blocks[0], head] + ([lm.get_encoder()] if model.seq2seq else [])
    for module in reached:
        assert any(p.grad is not None and p.grad.abs().max() > 1e-4 for p in module.parameters())
    assert all(p.grad.abs().max() > 0 for block in copies[1:] for p in block.parameters() if p.ndim > 1)
    assert all(p.grad is None for block in blocks[1:] for p in block.parameters())
    if lm.get_output_embeddings().weight is not lm.get_input_embeddings().weight:
        assert lm.get_output_embeddings().weight.grad is None


@pytest.mark.parametrize("architecture", ["gpt2", "t5_v1_1"])
def test_value_branch_equals_training_the_same_two_blocks(architecture):
    """The gradient that the branch sends below the cut is the one that the policy's own top blocks would send."""
    lm = tiny(architecture)
    head = random_head(32)
    twin = copy.deepcopy(lm)
    model = LanguageModel(lm, {"value": head}, top_copy(lm, 1, whole=False, detach=False))
    own = LanguageModel(twin, {"value": head})
    left = gradients(model.lm, weighted(model(**batch_of(model))["value"]))
    right = gradients(own.lm, weighted(own(**batch_of(own))["value"]))
    assert left and same(left, {name: right[name] for name in left}, 1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "t5"])
@pytest.mark.parametrize("sharded", [False, True])
def test_branch_and_shared_trunk_reference_work_on_one_model(architecture, sharded):
    """As ppo.py builds them, with gradient checkpointing: neither copy's recordings disturb the other's."""
    lm = tiny(architecture)
    head, whole = random_head(lm.get_output_embeddings().weight.shape[1]), copy.deepcopy(lm)
    expected = LanguageModel(whole, {"value": head})(**batch_of(LanguageModel(whole)))
    branch = top_copy(lm, 2, whole=False, detach=False)
    twin = top_copy(lm, 1, whole=True, detach=True)
    freeze_below(lm, twin)
    checkpoint_blocks(lm)
    model, reference = LanguageModel(lm, {"value": head}, branch), frozen(twin, torch.float32)
    if sharded:
        prepare(model, torch.float32, CPU)
        prepare(reference, torch.float32, CPU)
    with torch.no_grad():
        out = model(**batch_of(model))
    assert close(out["value"], expected["value"], 1e-5) and close(out["logprobs"], expected["logprobs"], 1e-5)
    assert close(logprobs_of(reference), out["logprobs"], 1e-5)
    train(model)
    changed = logprobs_of(model)
    assert not close(changed, out["logprobs"], 1e-3)
    assert close(logprobs_of(reference), expected["logprobs"].detach(), 1e-5)


# --- LoRA -------------------------------------------------------------------------------------------------------------


def adapted(architecture, sharded=False):
    """A model with adapters that do something, peft's wrapper, and a copy of the model from before."""
    lm = tiny(architecture)
    base = copy.deepcopy(lm)
    lora = add_lora(lm, 4, 8.0)
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    model = LanguageModel(lm)
    return prepare(model, torch.float32, CPU) if sharded else model, lora, base


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
def test_lora_trains_adapters_only_and_switches_off_to_the_base(architecture, sharded):
    lm = tiny(architecture)
    base = logprobs_of(LanguageModel(copy.deepcopy(lm)))
    lora = add_lora(lm, 4, 8.0)
    model = LanguageModel(lm)
    if sharded:
        prepare(model, torch.float32, CPU)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    assert close(logprobs_of(model), base, 1e-5), "adapters start at 0"
    train(model, lr=1.0)
    assert not close(logprobs_of(model), base, 0.02)
    with lora.disable_adapter():
        assert close(logprobs_of(model), base, 1e-5)
    assert not close(logprobs_of(model), base, 0.02), "the adapters come back"
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_adapts_every_linear_layer_of_the_blocks_and_no_other(architecture):
    lm = tiny(architecture)
    linear = (nn.Linear, transformers.pytorch_utils.Conv1D)
    inside = {f"{id(block)}.{name}" for blocks in block_lists(lm) for block in blocks
              for name, module in block.named_modules() if isinstance(module, linear)}
    blocks = [block for blocks in block_lists(lm) for block in blocks]
    add_lora(lm, 4, 8.0)
    found = {f"{id(block)}.{name}" for block in blocks
             for name, module in block.named_modules() if hasattr(module, "lora_A")}
    assert found == inside and found
    assert not hasattr(lm.get_output_embeddings(), "lora_A") and not hasattr(lm.get_input_embeddings(), "lora_A")


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_export_is_a_plain_model_and_an_adapter(architecture, sharded, tmp_path):
    """Merged weights load without peft; the adapter alone does the same to the base model, saved elsewhere."""
    model, lora, base = adapted(architecture, sharded)
    expected = logprobs_of(model)
    assert not close(expected, logprobs_of(LanguageModel(base)), 0.05)
    export(model, char_tokenizer(), str(tmp_path / "out"), lora)
    base.save_pretrained(tmp_path / "base")
    assert close(logprobs_of(model), expected, 0), "the model in training is left as it was"
    lm = load_lm(str(tmp_path / "out"))
    assert type(lm) is type(base) and not any("lora" in name for name in lm.state_dict())
    assert close(logprobs_of(LanguageModel(lm)), expected)
    wrapper = peft.PeftModel.from_pretrained(load_lm(str(tmp_path / "base")), str(tmp_path / "out" / "adapter"))
    assert close(logprobs_of(LanguageModel(wrapper.get_base_model())), expected)
    assert sorted(os.listdir(tmp_path)) == ["base", "out"]
    assert load_tokenizer(str(tmp_path / "out")).get_vocab() == char_tokenizer().get_vocab()


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_export_loads_in_plain_transformers_with_identical_logits(architecture, sharded, tmp_path):
    lm = tiny(architecture)
    model = LanguageModel(lm, {"value": make_head(lm.get_output_embeddings().weight.shape[1], 1)})
    with torch.no_grad():
        expected, weights = plain_logits(lm), {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    if sharded:
        prepare(model, torch.float32, CPU)
        assert any(isinstance(p, DTensor) for p in model.parameters())
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "stale").touch()
    export(model, char_tokenizer(), str(folder))
    assert os.listdir(tmp_path) == ["model"] and not (folder / "stale").exists()
    auto = transformers.AutoModelForSeq2SeqLM if model.seq2seq else transformers.AutoModelForCausalLM
    loaded, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert close(plain_logits(loaded.eval()), expected, 5e-6)  # memory alignment alone can move the last bit
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("Some text.").input_ids == char_tokenizer()("Some text.").input_ids


@pytest.mark.parametrize("with_lora", [False, True])
def test_export_keeps_what_ends_a_generation(with_lora, tmp_path):
    """Chat models have several end tokens, which stand in their generation config alone."""
    model, lora, base = adapted("llama")
    if not with_lora:
        model, lora = LanguageModel(base), None
    model.lm.generation_config.eos_token_id = [2, 7]
    export(model, char_tokenizer(), str(tmp_path / "out"), lora)
    assert load_lm(str(tmp_path / "out")).generation_config.eos_token_id == [2, 7]


# --- memory, dropout, precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
def test_gradient_checkpointing_changes_no_number(architecture, sharded):
    lm = tiny(architecture)
    model = LanguageModel(lm)
    calls = []
    block = max(block_lists(trunk_of(lm)), key=len)[1]
    inner = next(module for module in block.modules() if "Norm" in type(module).__name__)
    inner.register_forward_hook(lambda *_: calls.append(1))
    out = model(**batch_of(model))["logprobs"]
    expected = gradients(model, weighted(out))
    tokens = generate(model, PROMPTS, torch.rand(5, 6, generator=torch.Generator().manual_seed(0))).tokens
    checkpoint_blocks(lm)
    if sharded:
        prepare(model, torch.float32, CPU)
    calls.clear()
    again = model(**batch_of(model))["logprobs"]
    before = len(calls)
    assert close(again, out, 1e-6) and same(expected, gradients(model, weighted(again)), 1e-4)
    assert len(calls) == 2 * before, "the block was not computed again"
    assert generate(model, PROMPTS, torch.rand(5, 6, generator=torch.Generator().manual_seed(0))).tokens == tokens


@pytest.mark.parametrize("architecture,rates", [
    ("gpt2", dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)),
    ("t5", dict(dropout_rate=0.5)),
    ("llama", dict(attention_dropout=0.5)),
    ("bart", dict(dropout=0.5, attention_dropout=0.5, activation_dropout=0.5)),
])
@pytest.mark.parametrize("wrap", ["plain", "lora", "copy", "sharded"])
def test_dropout_never_acts(architecture, rates, wrap, tmp_path):
    """Not in a loaded model, with LoRA, in copies, or sharded; though the same model in train mode does drop."""
    config = copy.deepcopy(CONFIGS[architecture])
    for name, rate in rates.items():
        assert hasattr(config, name)
        setattr(config, name, rate)
    lm = tiny(architecture)
    type(lm)(config).save_pretrained(tmp_path)
    lm = load_lm(str(tmp_path))
    if wrap == "lora":
        add_lora(lm, 4, 8.0)
    branch = top_copy(lm, 2, whole=False, detach=False) if wrap == "copy" else None
    model = LanguageModel(lm, {"state": nn.Identity()}, branch)
    if wrap == "sharded":
        prepare(model, torch.float32, CPU)
    first, second = (model(**batch_of(model)) for _ in range(2))
    assert torch.equal(first["logprobs"], second["logprobs"]) and torch.equal(first["state"], second["state"])
    if wrap == "plain":
        lm.train()
        assert not torch.equal(logprobs_of(model), logprobs_of(model)), "the rates do nothing here"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sharding_changes_no_number(architecture):
    lm = tiny(architecture)
    head = random_head(lm.get_output_embeddings().weight.shape[1])
    model = LanguageModel(lm, {"value": head})

    def numbers():
        out = model(**batch_of(model))
        return out, gradients(model, weighted(out["logprobs"]) + weighted(out["value"]))

    plain_out, plain_gradients = numbers()
    prepare(model, torch.float32, CPU)
    out, grads = numbers()
    for name in ("logprobs", "entropy", "value"):
        assert close(out[name], plain_out[name], 1e-5)
    assert same(plain_gradients, grads, 1e-4) and all(isinstance(p.grad, DTensor) for p in model.parameters()
                                                      if p.grad is not None)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_computes_the_softmax_and_the_heads_in_float32(architecture):
    lm = tiny(architecture)
    model = LanguageModel(lm, {"value": random_head(lm.get_output_embeddings().weight.shape[1])})
    for parameter in lm.parameters():
        parameter.data *= 0.5  # smaller weights, since the tolerance is absolute
    with torch.no_grad():
        expected = model(**batch_of(model))
    dtypes = []
    model.heads["value"][0].register_forward_hook(lambda m, inputs, _: dtypes.append((inputs[0].dtype, m.weight.dtype)))
    prepare(model, torch.bfloat16, CPU)
    out = model(**batch_of(model))
    assert {tensor.dtype for tensor in out.values()} == {torch.float32}
    assert dtypes == [(torch.float32, torch.float32)]
    for name in out:
        assert close(out[name], expected[name], 0.05) and not torch.equal(out[name], expected[name])
    grads = gradients(model, out["logprobs"].sum() + out["value"].sum())
    assert {gradient.dtype for gradient in grads.values()} == {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_mask_that_leaves_only_the_end_is_refused_where_outputs_must_not_be_short():
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[3] = torch.tensor([True, True, False, True, True])  # after 3 only 2, the end
    assert torch.equal(check_logit_mask(mask, CPU), mask) and torch.equal(check_logit_mask(mask, CPU, (4, 70)), mask)
    with pytest.raises(UserError, match="must forbid no token every successor, the end tokens left out, which --min-"):
        check_logit_mask(mask, CPU, (2,))
    assert mask.sum() == 4, "what is given stays as it is"


def test_ends_are_those_of_the_config_where_there_is_no_generation_config(tmp_path):
    """As for transformers' generate, but for an architecture's default that lies outside of the vocabulary."""
    tokenizer = char_tokenizer()
    for number, (eos, expected) in enumerate((([2, 7], (2, 7)), (50256, (2,)), (None, (2,)), (9, (2, 9)))):
        lm, folder = tiny("gpt2"), tmp_path / str(number)
        lm.config.eos_token_id = eos
        lm.save_pretrained(folder)
        (folder / "generation_config.json").unlink()
        assert end_tokens(tokenizer, load_lm(str(folder))) == expected


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "bart", "t5"])
def test_rows_in_bfloat16_have_their_attention_in_float32_on_a_cpu(architecture, monkeypatch):
    """And single tokens, of which a sampler reads one at a time, theirs in bfloat16."""
    plain, seen = nn.functional.scaled_dot_product_attention, set()

    def watch(query, *rest, **options):
        seen.add((query.dtype, query.shape[2] > 1, torch.is_grad_enabled()))
        return plain(query, *rest, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watch)
    model = prepare(LanguageModel(tiny(architecture)), torch.bfloat16, CPU)
    model(**batch_of(model))["logprobs"].sum().backward()
    assert seen == {(torch.float32, True, True)}
    with torch.no_grad():
        model(**batch_of(model))
        assert seen == {(torch.float32, True, True), (torch.float32, True, False)}
        generate(model, PROMPTS, torch.full((len(PROMPTS), 3), 0.5), synced=True)
    assert (torch.bfloat16, False, False) in seen and (torch.bfloat16, True, False) not in seen


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True])
def test_pad_rows(left):
    """Masks come from lengths, whatever the ids are."""
    rows = [[0, 2, 0], [], [7], [0, 0, 0, 0, 2]]
    values, mask = pad_rows(rows, 9, left=left)
    assert values.shape == mask.shape == (4, 5) and mask.dtype == torch.bool and values.dtype == torch.long
    for row, value, real in zip(rows, values.tolist(), mask.tolist()):
        blank = 5 - len(row)
        assert value == ([9] * blank + row if left else row + [9] * blank)
        assert real == ([False] * blank + [True] * len(row) if left else [True] * len(row) + [False] * blank)


def test_pad_rows_of_nothing_and_of_other_kinds():
    values, mask = pad_rows([], 0)
    assert values.shape == mask.shape == (0, 0)
    values, mask = pad_rows([[0.5], [1.5, 2.5]], 0.0)
    assert values.tolist() == [[0.5, 0.0], [1.5, 2.5]] and values.dtype == torch.float32
    assert pad_rows([[True], [False, True]], False)[0].dtype == torch.bool


def test_collate_for_causal_models():
    batch = collate(PROMPTS, RESPONSES, None, CPU)
    assert batch.keys() == {"ids", "mask", "scored"}
    for b, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        total = len(prompt) + len(response)
        assert batch["ids"][b, :total].tolist() == prompt + response
        places = range(batch["ids"].shape[1])
        assert batch["mask"][b].tolist() == [t < total for t in places]
        assert batch["scored"][b].tolist() == [len(prompt) <= t < total for t in places]


def test_collate_for_encoder_decoder_models():
    batch = collate(PROMPTS, RESPONSES, 2, CPU)
    assert batch["ids"].shape[1] == 1 + max(map(len, RESPONSES))
    for b, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        places = range(batch["ids"].shape[1])
        assert batch["ids"][b, :len(response) + 1].tolist() == [2, *response]
        assert batch["mask"][b].tolist() == [t <= len(response) for t in places]
        assert batch["scored"][b].tolist() == [1 <= t <= len(response) for t in places]
        assert batch["encoder_ids"][b, :len(prompt)].tolist() == prompt
        assert batch["encoder_mask"][b].tolist() == [t < len(prompt) for t in range(batch["encoder_ids"].shape[1])]


def test_positions_count_real_tokens_from_zero():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    found = positions(mask).tolist()
    assert found[0][2:] == [0, 1, 2] and found[1][:3] == [0, 1, 2] and found[2] == [0, 1, 2, 3, 4]
    assert min(map(min, found)) == 0 and max(map(max, found)) < 5, "padding has positions that exist"


# --- what cannot be loaded --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_lm, load_tokenizer])
@pytest.mark.parametrize("broken", ["absent", "empty", "junk"])
def test_a_model_that_cannot_be_read_is_one_line_about_the_flag(load, broken, tmp_path):
    path = tmp_path / "there"
    if broken != "absent":
        path.mkdir()
    if broken == "junk":
        (path / "config.json").write_text("{")
    with pytest.raises(UserError) as error:
        load(str(path))
    message = str(error.value)
    assert "\n" not in message and message.startswith("--model") and str(path) in message
    assert ("--tokenizer" in message) == (load is load_tokenizer)


@pytest.mark.parametrize("cls", [transformers.GPT2Model, transformers.LlamaModel, transformers.T5Model])
def test_a_model_without_a_head_is_refused(cls):
    config = next(config for config in CONFIGS.values() if isinstance(config, cls.config_class))
    with pytest.raises(UserError, match=cls.__name__):
        LanguageModel(cls(config))


def test_a_model_file_that_was_cut_off_is_one_line_about_the_flag(tmp_path):
    """As an interrupted download or copy leaves it."""
    tiny("gpt2").save_pretrained(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError) as error:
        load_lm(str(tmp_path))
    assert "\n" not in str(error.value) and str(error.value).startswith(f"--model {tmp_path}")


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_loaded_models_are_float32_and_in_eval_mode(architecture, tmp_path):
    lm = tiny(architecture)
    lm.config = copy.deepcopy(lm.config)  # saving writes the precision into it, and other tests share it
    lm.to(torch.bfloat16).save_pretrained(tmp_path)
    assert '"bfloat16"' in (tmp_path / "config.json").read_text()
    lm = load_lm(str(tmp_path))
    assert {p.dtype for p in lm.parameters()} == {torch.float32}
    assert not any(module.training for module in lm.modules())


# --- speed that must not change numbers -------------------------------------------------------------------------------


def test_activations_in_one_operation_are_those_in_several():
    """gelu_new, GPT-2's, and gelu_fast are the tanh form of GELU; loaded models have it as one operation."""
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.new, self.fast, self.relu = NewGELUActivation(), FastGELUActivation(), nn.ReLU()

    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    plain, one = Holder(), Holder()
    fuse_activations(one)
    assert type(one.new) is type(one.fast) is nn.GELU and type(one.relu) is nn.ReLU
    assert close(one.new(x), plain.new(x), 1e-12) and close(one.fast(x), plain.fast(x), 1e-7)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox"])
def test_rows_padded_on_the_right_run_without_a_mask(architecture, monkeypatch):
    """Causal attention hides what follows; rows padded on the left have a mask, and the numbers are the same."""
    masks, attend = [], nn.functional.scaled_dot_product_attention

    def watch(*args, attn_mask=None, **rest):
        masks.append(attn_mask is not None)
        return attend(*args, attn_mask=attn_mask, **rest)

    model, rows = LanguageModel(tiny(architecture)), [[3, 4, 5, 6], [7, 8], [9]]
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watch)
    found = []
    for left in (False, True):
        ids, mask = pad_rows(rows, 0, left=left)
        masks.clear()
        with torch.no_grad():
            states, _ = model._states(trunk_of(model.lm), ids, mask)
        assert masks and set(masks) == {left}
        found.append(torch.cat([row[real] for row, real in zip(states, mask)]))
    assert close(*found, 1e-5)


def test_entropy_of_a_distribution_with_forbidden_tokens():
    forbidden = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.bool)
    forbidden[:, 5:] = True
    model = LanguageModel(tiny("gpt2"))
    out = model(**collate([[1, 2]], [[3, 4, 1]], None, CPU), rules=LogitRules(logit_mask=forbidden))
    ids = torch.tensor([[1, 2, 3, 4]])
    logprobs = model.lm(ids).logits[0, 1:, :5].log_softmax(-1)
    expected = [-sum(p * math.log(p) for p in row) for row in logprobs.exp().tolist()]
    assert out["entropy"].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_reference_keeps_nothing_of_its_forwards():
    """FSDP notes them for a backward; what a policy has noted goes when that comes, a reference has none."""
    batch = collate([[5, 6]], [[7, 8]], None, CPU)
    policy = prepare(LanguageModel(tiny("gpt2")), torch.float32, CPU)
    reference = prepare(frozen(tiny("gpt2"), torch.float32), torch.float32, CPU)
    for model, count in ((policy, 12), (reference, 0)):
        with torch.no_grad():
            for _ in range(3):
                model(**batch)
        state = model._get_fsdp_state()
        kept = [len(group._post_forward_indices) for each in state._state_ctx.all_states
                for group in each._fsdp_param_groups]
        assert len(state._comm_ctx.post_forward_order) == sum(kept) == count

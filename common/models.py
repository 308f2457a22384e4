"""Language models for training: one forward that returns token log-probs and head outputs, reference models, loading.

Nothing here knows an architecture. Blocks are the members of a model's lists of modules, the trunk is what transformers
calls the decoder, and the head is the model itself with its trunk taken out, so that whatever a model does around its
head (scaling, soft-capping, biases) is done here too.
"""

import contextlib
import copy
import difflib
import functools
import inspect
import json
import logging
import math
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GPT2Tokenizer,
    PreTrainedModel,
    pipeline,
)
from transformers.activations import FastGELUActivation, NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import AttentionInterface

from common.checkpoint import attempt, put_in_place
from common.cli import UserError, reason
from common.distributed import block_lists, full_state_dict, shard

transformers.logging.disable_progress_bar()  # the run has its own
# it advises a mask where rows share a line, which must have none
logging.getLogger("transformers.modeling_utils").addFilter(
    lambda record: "recommend passing in an `attention_mask`" not in record.getMessage())
CHUNK = 2**24  # most fp32 logits alive at once: 64 MiB
# What comes with a model is data: of code in its folder transformers would ask on the terminal whether to run it
NO_CODE = dict(trust_remote_code=False)


def _attention(module: nn.Module, query, key, value, attention_mask, **options):
    """transformers' sdpa, but with float32 for rows of tokens in bfloat16 on a CPU: torch's backward takes up to twelve
    times as long there in bfloat16. In forwards without gradient too, so that all log-probs are rounded alike; a
    sampler's single tokens stay as they are."""
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or query.shape[2] == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    query, key, value, attention_mask, options = tree_map_only(
        torch.Tensor, lambda part: part.float() if part.is_floating_point() else part,
        (query, key, value, attention_mask, options))
    output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return output.bfloat16(), weights


# --- loading ----------------------------------------------------------------------------------------------------------


def load_tokenizer(path: str):
    """The tokenizer at a path or hub id. Its pad token may be missing or equal to EOS: nothing is inferred from ids."""
    with _readable("--model or --tokenizer", path):
        return AutoTokenizer.from_pretrained(path, **NO_CODE)


def load_lm(path: str) -> PreTrainedModel:
    """The causal or encoder-decoder LM at a path or hub id, in float32, and in eval mode for good: no dropout."""
    with _readable("--model", path):
        config = AutoConfig.from_pretrained(path, **NO_CODE)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return auto.from_pretrained(path, dtype=torch.float32, **NO_CODE).eval()


def load_config(path: str):
    """The config to make a model from: of a JSON file with `model_type` and any of its settings, or of a model by path
    or hub id. Raises UserError for settings that there are not."""
    with _readable("--from-config", path):
        if not path.endswith(".json"):
            return AutoConfig.from_pretrained(path, **NO_CODE)
        if not os.path.isfile(path):
            raise UserError(f"--from-config {path}: no such file")
        with open(path, encoding="utf-8") as file:
            settings = json.load(file)
        config = AutoConfig.for_model(**settings)
        known = {*AutoConfig.for_model(config.model_type).to_dict(), *config.attribute_map, "architectures"}
        if unknown := sorted(set(settings) - known):
            near = difflib.get_close_matches(unknown[0], known, 1)
            raise UserError(f"--from-config {path}: a {config.model_type} has no setting {unknown[0]}"
                            + (f"; did you mean {near[0]}?" if near else ""))
        return config


def new_lm(path: str, tokenizer, seed: int) -> PreTrainedModel:
    """A randomly initialised LM by `load_config`, in float32 and in eval mode for good: no dropout.

    Vocabulary size and special tokens are the tokenizer's; a decoder starts with its pad token, or its BOS.
    """
    config = load_config(path)
    with _readable("--from-config", path):
        text = config.get_text_config()
        text.vocab_size = len(tokenizer)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(text, name, getattr(tokenizer, name))
        if config.is_encoder_decoder:
            starts = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
            config.decoder_start_token_id = next((token for token in starts if token is not None), 0)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        torch.manual_seed(seed)
        return auto.from_config(config, dtype=torch.float32, **NO_CODE).eval()


def train_tokenizer(texts: Iterable[str], size: int) -> GPT2Tokenizer:
    """A byte-level BPE tokenizer, as GPT-2's, of at most `size` tokens, trained on `texts`; <|endoftext|> is BOS and
    EOS, <|pad|> the pad token. Raises UserError for a size below the 256 bytes and these two."""
    if size < 258:
        raise UserError(f"--train-tokenizer {size}: must be at least 258, the 256 bytes and two special tokens")
    return GPT2Tokenizer(pad_token="<|pad|>").train_new_from_iterator(texts, size, show_progress=False)


@contextlib.contextmanager
def _readable(flag: str, path: str):
    """Turns what transformers raises for a model that it cannot load into one line."""
    try:
        yield
    except UserError:
        raise
    except pickle.UnpicklingError:  # transformers reads old weight files as tensors alone
        raise UserError(f"{flag} {path}: its weight file is a pickle of more than tensors, which is not read, since it "
                        "would run as a program; give safetensors") from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        what = "no such folder, and no hub model of that name can be reached"
        if os.path.isfile(path):
            what = "the file holds nothing that transformers can use"
        elif os.path.isdir(path):
            what = "the folder holds nothing that transformers can load"
        raise UserError(f"{flag} {path}: {what} ({reason(error)})") from None


def end_tokens(tokenizer, lm: PreTrainedModel) -> tuple[int, ...]:
    """Ids that end an output: the tokenizer's EOS and those that the model's generation config adds (chat models'),
    which transformers makes of its config where a model has none."""
    extra = lm.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(extra if isinstance(extra, list) else [extra])} - {None}
    words = lm.config.get_text_config().vocab_size
    return tuple(sorted(token for token in ends if token < words))  # an architecture's default may lie outside


def positions_of(model: nn.Module) -> int | None:
    """How many tokens a model can read, if its positions are limited. RoBERTa's begin behind its pad token's."""
    count = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    words = model.get_input_embeddings()  # which may be as many, and have a pad token too
    spent = [part.padding_idx + 1 for part in model.modules() if isinstance(part, nn.Embedding) and part is not words
             and part.num_embeddings == count and part.padding_idx is not None]
    return count and count - max(spent, default=0)


def load_classifier(path: str, flag: str, device, batch_size: int) -> Callable[[list[str]], list[float]]:
    """A sequence-classification model, with its own tokenizer, as a function from texts to scores: the probability of
    the label POSITIVE (else of label 1 of 2), or the bare output of a model that has only one, as reward models do."""
    with _readable(flag, path):
        architectures = AutoConfig.from_pretrained(path, **NO_CODE).architectures or []
        if not any("SequenceClassification" in name for name in architectures):
            raise UserError(f"{flag} {path}: is not a sequence-classification model; its head would be random")
        classify = pipeline("text-classification", model=path, device=device, top_k=None, truncation=True,
                            batch_size=batch_size, **NO_CODE)
    if classify.tokenizer.pad_token is None:
        classify.tokenizer.pad_token = classify.tokenizer.eos_token
    config = classify.model.config  # GPT-2-like reward models read the last token that is not a pad
    config.get_text_config().pad_token_id = config.pad_token_id = classify.tokenizer.pad_token_id
    classify.tokenizer.truncation_side = "left"  # what is to be judged, the output, stands at the end
    longest = positions_of(classify.model)
    if longest and classify.tokenizer.model_max_length > longest:
        classify.tokenizer.model_max_length = longest
    labels = classify.model.config.id2label
    named = [label for label in labels.values() if label.upper() == "POSITIVE"]
    positive = named[0] if named else labels[min(1, len(labels) - 1)]
    if len(labels) > 2 and not named:
        raise UserError(f"{flag} {path}: has {len(labels)} labels, none of them POSITIVE; write a function around it")

    def score(texts: list[str]) -> list[float]:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # like lengths together: little padding
        answers = classify([texts[i] for i in order], function_to_apply="none" if len(labels) == 1 else "softmax")
        scores = {i: next(a["score"] for a in answer if a["label"] == positive) for i, answer in zip(order, answers)}
        return [scores[i] for i in range(len(texts))]

    return score


def add_lora(lm: PreTrainedModel, rank: int, alpha: float):
    """Freeze `lm`, add LoRA adapters (arXiv 2106.09685) to all linear layers of its blocks, return peft's wrapper."""
    from peft import LoraConfig, get_peft_model

    task = "SEQ_2_SEQ_LM" if lm.config.is_encoder_decoder else "CAUSAL_LM"
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type=task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of peft's use of transformers
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # it sees that GPT-2's layers are transposed
        return get_peft_model(lm, config).eval()


def checkpoint_blocks(lm: nn.Module) -> None:
    """Gradient checkpointing: recompute each block's inside in the backward instead of keeping it."""
    for block in (block for blocks in block_lists(lm) for block in blocks):
        def forward(*args, _inner=block.forward, **kwargs):
            if not torch.is_grad_enabled():
                return _inner(*args, **kwargs)
            return checkpoint(_inner, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)  # no dropout

        block.forward = forward


def export(
    model: "LanguageModel", tokenizer, folder: str, lora=None, with_heads: bool = False, keep_going: bool = False
) -> None:
    """Write the model and its tokenizer in Hugging Face format: plain `from_pretrained(folder)` gives identical logits.

    With `lora` (peft's wrapper) the adapters are merged into the weights, and stand by themselves in `folder/adapter`.
    with_heads: the model's heads go to `folder/heads.safetensors`, see `load_heads`. keep_going: see `attempt`.
    """
    state, heads = full_state_dict(model.lm), full_state_dict(model.heads) if with_heads else {}

    def write(state=state):
        if dist.get_rank():
            return
        shutil.rmtree(folder + ".tmp", ignore_errors=True)
        lm = model.lm
        if lora is not None:
            from peft import get_peft_model
            from peft.utils import get_peft_model_state_dict

            config = lora.peft_config["default"]
            plain = copy.deepcopy(config)
            plain.target_modules = "all-linear"
            fresh = type(lm)(copy.deepcopy(lm.config))
            if lm.get_output_embeddings().weight is not lm.get_input_embeddings().weight:  # whatever its config says
                head = fresh.get_output_embeddings()
                head.weight = nn.Parameter(head.weight.detach().clone())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                wrapper = get_peft_model(fresh, plain)
            wrapper.base_model.model.load_state_dict(state)
            wrapper.save_pretrained(folder + ".tmp/adapter", state_dict=get_peft_model_state_dict(wrapper))
            generation_config, lm = lm.generation_config, wrapper.merge_and_unload()
            lm.generation_config, state = generation_config, lm.state_dict()
        lm.save_pretrained(folder + ".tmp", state_dict=state)
        tokenizer.save_pretrained(folder + ".tmp")
        if with_heads:
            save_file(heads, folder + ".tmp/heads.safetensors")
        put_in_place(folder)
    attempt(write, f"the model {folder}", keep_going)


def load_heads(folder: str) -> dict[str, nn.Module]:
    """The heads that `export` wrote beside a model, by name; none where there are none."""
    path, heads = f"{folder}/heads.safetensors", {}
    if not os.path.isfile(path):
        return heads
    with _readable("--model", path):
        state = load_file(path)
        for name in dict.fromkeys(key.split(".")[0] for key in state):
            outputs, width = state[f"{name}.2.weight"].shape[0], state[f"{name}.0.weight"].shape[1]
            heads[name] = make_head(width, 1) if outputs == 1 else TokenHead(width, outputs)
            heads[name].load_state_dict({key.split(".", 1)[1]: value for key, value in state.items()
                                         if key.split(".")[0] == name})
    return heads


# --- from logits to the policy ----------------------------------------------------------------------------------------


def check_logit_mask(mask, device: torch.device, not_yet: tuple[int, ...] = ()) -> torch.Tensor | None:
    """A user's logit mask (see `LogitRules`) on the device. not_yet: tokens that may be forbidden beside it, the end
    tokens of outputs that must not be short. Raises UserError for what cannot be one."""
    if mask is None:
        return None
    fits = isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.ndim == 2
    closed = mask
    if fits and not_yet:
        closed = mask.clone()
        closed[:, [token for token in not_yet if token < mask.shape[1]]] = True
    if not fits or mask.shape[0] != mask.shape[1] or not len(mask) or closed.all(1).any():
        raise UserError("logit_mask must be (V, V) bool, and must forbid no token every successor"
                        + (", the end tokens left out, which --min-new-tokens forbids" if not_yet else ""))
    return mask.to(device)


@functools.cache
def _on_device(ids: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(ids, device=device)  # once, since a CUDA graph cannot hold the copy


@dataclass(frozen=True)
class LogitRules:
    """What turns logits into the policy's distribution. Sampler and training forward apply the same rules."""

    temperature: float = 1.0
    """divides the logits; 0 is greedy, for the sampler only"""
    eos_ids: tuple[int, ...] = ()
    """tokens that end an output"""
    min_new_tokens: int = 0
    """no end token is possible before an output has this many tokens"""
    logit_mask: torch.Tensor | None = None
    """(V, V) bool, [i, j]: token j must not follow token i"""

    def __call__(self, logits: torch.Tensor, previous: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """logits (N, V), previous (N,) the token before, index (N,) the place in the output -> fp32 logits (N, V)."""
        logits = logits.float()
        if self.temperature not in (0.0, 1.0):
            logits = logits / self.temperature
        if self.logit_mask is not None:
            known = len(self.logit_mask)  # models often have more embeddings than their tokenizer has tokens
            forbidden = self.logit_mask.to(logits.device)[previous.clamp(max=known - 1)] & (previous < known)[:, None]
            forbidden = nn.functional.pad(forbidden, (0, logits.shape[1] - forbidden.shape[1]))
            logits = logits.masked_fill(forbidden, -torch.inf)
        if self.min_new_tokens and self.eos_ids:
            early = torch.where(index < self.min_new_tokens, -torch.inf, 0.0)[:, None].expand(-1, len(self.eos_ids))
            logits = logits.index_add(1, _on_device(self.eos_ids, logits.device), early)
        return logits


# --- batches ----------------------------------------------------------------------------------------------------------


def pad_rows(rows: list[list], fill, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged rows as a (B, T) tensor filled up with `fill`, and a (B, T) bool mask of what is real."""
    width = max(map(len, rows), default=0)
    spare = [[fill] * (width - len(row)) for row in rows]
    values = [blank + list(row) if left else list(row) + blank for row, blank in zip(rows, spare)]
    lengths, places = torch.tensor([len(row) for row in rows])[:, None], torch.arange(width)
    mask = places >= width - lengths if left else places < lengths
    return torch.tensor(values).reshape(len(rows), width), mask


def collate(
    prompts: list[list[int]],
    responses: list[list[int]],
    start_id: int | None,
    device: torch.device,
    trained: list[list[bool]] | None = None,
) -> dict[str, torch.Tensor]:
    """Token-id lists as inputs of `LanguageModel.forward`: right-padded, with masks made from lengths alone.

    Causal models (start_id None): ids = prompt + response. Encoder-decoder models: the prompt goes to the encoder and
    ids = start token + response. Returns ids, mask and scored, each (B, T), and for encoder-decoders encoder_ids and
    encoder_mask (B, P). scored: the response tokens, or those of them that `trained` marks.
    """
    heads = prompts if start_id is None else [[start_id]] * len(prompts)
    ids, mask = pad_rows([head + response for head, response in zip(heads, responses)], 0)
    trained = trained or [[True] * len(response) for response in responses]
    marks = [[False] * len(head) + list(flags) for head, flags in zip(heads, trained)]
    scored, _ = pad_rows(marks, False)
    batch = {"ids": ids, "mask": mask, "scored": scored}
    if start_id is not None:
        batch["encoder_ids"], batch["encoder_mask"] = pad_rows(prompts, 0)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def collate_branches(
    lines: list[list[tuple[list, list[list], list[list]]]], device: torch.device
) -> dict[str, torch.Tensor]:
    """Prompts with several outputs each, several of them a line, as inputs of a causal `LanguageModel.forward`.

    lines: for each line, groups of a prompt, its outputs, and which tokens of these are to be scored. In the line the
    prompt stands once, without its last token, which stands before each output: what predicts an output's first token.
    Positions restart; mask (B, T, T) shows each token the prompt and the output that it belongs to, up to itself.
    Scored tokens come in the order of the groups and of their outputs. See `shares_exactly`.
    """
    ids, places, scored, groups, branches = ([[] for _ in lines] for _ in range(5))
    for row, line in enumerate(lines):
        for group, (prompt, outputs, trained) in enumerate(line, 1):
            prompt, pieces = list(prompt), [(list(prompt[:-1]), [False] * (len(prompt) - 1), 0)]
            pieces += [(prompt[-1:] + list(output), [False, *map(bool, flags)], len(prompt) - 1)
                       for output, flags in zip(outputs, trained)]
            for branch, (tokens, flags, first) in enumerate(pieces):
                ids[row] += tokens
                places[row] += range(first, first + len(tokens))
                scored[row] += flags
                groups[row] += [group] * len(tokens)
                branches[row] += [branch] * len(tokens)
    ids, places, scored, groups, branches = (pad_rows(part, 0)[0].to(device)
                                             for part in (ids, places, scored, groups, branches))
    mask = (groups[:, :, None] == groups[:, None]).tril_()
    mask &= (branches[:, None] == 0) | (branches[:, :, None] == branches[:, None])
    return {"ids": ids, "mask": mask, "scored": scored.bool(), "position_ids": places}


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position ids (B, T) of a padded batch: real tokens count from 0 wherever the padding is."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


# --- the model --------------------------------------------------------------------------------------------------------


class _Given(nn.Module):
    """Stands in for a trunk: returns the hidden states it is given, so that a model's forward runs its head alone."""

    def forward(self, *_, inputs_embeds=None, **__):
        output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)
        output.router_logits = None  # mixtures of experts look for it
        return output


def _replaced(root: nn.Module, target: nn.Module, new: nn.Module) -> nn.Module:
    """A shallow copy of `root` that shares everything but has `new` in the place of `target`."""
    if root is target:
        return new
    twin = copy.copy(root)
    twin._modules = {name: _replaced(child, target, new) if any(m is target for m in child.modules()) else child
                     for name, child in root._modules.items() if child is not None}
    return twin


def trunk_of(lm: PreTrainedModel) -> nn.Module:
    """The module that turns tokens into the last hidden states: the LM without its head (and without its encoder)."""
    return lm.get_decoder()


def fuse_activations(lm: nn.Module) -> None:
    """Make each activation that transformers computes in several steps, GPT-2's among them, one operation."""
    for module in lm.modules():
        for name, child in module.named_children():
            if isinstance(child, (NewGELUActivation, FastGELUActivation)):
                setattr(module, name, nn.GELU(approximate="tanh").eval())


def make_head(width: int, outputs: int) -> nn.Sequential:
    """Linear(d, 2d), ReLU, Linear(2d, outputs) in fp32, as trlX's heads, but with a zero last layer: it starts at 0."""
    head = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, outputs))
    nn.init.zeros_(head[2].weight)
    nn.init.zeros_(head[2].bias)
    return head


class TokenHead(nn.Sequential):
    """A head with an output for each token of the vocabulary: `make_head` with V outputs."""

    def __init__(self, width: int, outputs: int):
        super().__init__(*make_head(width, outputs))

    def forward(self, states: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states (N, H) -> all outputs (N, V). With tokens (N,), a trained head gives each token's output and
        the log-sum-exp of all outputs (N, 2), CHUNK numbers at a time and again in the backward, as logits are made; a
        frozen head gives the token's output alone (N, 1)."""
        inner, last = self[1](self[0](states)), self[2]
        if tokens is None:
            return last(inner)
        if not last.weight.requires_grad:
            return (inner * last.weight[tokens]).sum(1, keepdim=True) + last.bias[tokens][:, None]

        def score(inner, tokens):
            outputs = last(inner)
            return torch.stack([outputs.gather(1, tokens[:, None])[:, 0], outputs.logsumexp(-1)], 1)

        pieces = list(zip(*(part.split(max(1, CHUNK // last.out_features)) for part in (inner, tokens))))
        if len(pieces) > 1 and inner.requires_grad:
            score = functools.partial(checkpoint, score, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([score(*piece) for piece in pieces])


class LanguageModel(nn.Module):
    """A transformers LM with small heads on its last hidden state, run as one module, so that FSDP has one root.

    Its activations are fused, so that its numbers are those of the LM to rounding.
    heads: modules from hidden states (N, H) to (N, outputs), or `TokenHead`s; no gradient goes through frozen ones.
    branch: an optional copy of the trunk's top blocks (`top_copy`); the heads then read its hidden states instead.
    """

    def __init__(self, lm: PreTrainedModel, heads: dict[str, nn.Module] | None = None, branch: nn.Module | None = None):
        super().__init__()
        fuse_activations(lm)
        self.lm = lm
        self.heads = nn.ModuleDict(heads or {})
        self.branch = branch
        self.seq2seq = lm.config.is_encoder_decoder
        self.start_id = lm.config.decoder_start_token_id if self.seq2seq else None
        trunk = trunk_of(lm)
        if trunk is lm or lm.get_output_embeddings() is None:
            raise UserError(f"{type(lm).__name__} has no trunk apart from a language-model head: it cannot be trained")
        self.takes_positions = "position_ids" in inspect.signature(trunk.forward).parameters
        self.device, self.dtype = next(lm.parameters()).device, next(lm.parameters()).dtype
        self._head = (_replaced(lm, trunk, _Given()),)  # in a tuple, or its parameters would be registered twice

    @property
    def width(self) -> int:
        """Size H of the hidden states that the heads read."""
        return self.lm.get_output_embeddings().weight.shape[1]

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states (N, H) -> logits (N, V), by the model's own forward around an absent trunk."""
        if self.seq2seq:
            inputs = {"encoder_outputs": (states[None],), "decoder_inputs_embeds": states[None]}
        else:
            inputs = {"inputs_embeds": states[None]}
        return self._head[0](**inputs, use_cache=False).logits.squeeze(0)

    def _states(self, trunk, ids, mask, encoder_states=None, encoder_mask=None, cache=None, use_cache=False,
                position_ids=None):
        """Run `trunk`: hidden states (B, T, H) and the cache. mask covers cached and new tokens, or is None.

        With position_ids (B, T), lines hold several rows, and positions restart where one begins. transformers then
        keeps the rows apart, but only without a mask and without a cache; or the mask (B, T, T) does.
        """
        if mask is not None and mask.ndim == 2 and cache is None and mask[:, 0].all():
            mask = torch.ones_like(mask)  # padding is on the right, where causal attention does not look
        inputs = {"input_ids": ids, "attention_mask": None if mask is None else mask.long(), "use_cache": use_cache}
        if cache is not None:
            inputs["past_key_values"] = cache
        if self.seq2seq:
            inputs |= {"encoder_hidden_states": encoder_states, "encoder_attention_mask": encoder_mask.long()}
        elif position_ids is not None:
            inputs |= {"position_ids": position_ids, "attention_mask": None}
            if mask.ndim == 3:  # added to the scores, made once in the dtype that all blocks compute in
                zeros = torch.zeros(mask.shape, dtype=self.dtype, device=mask.device)
                inputs["attention_mask"] = zeros.masked_fill_(~mask, -torch.inf)[:, None]
        elif self.takes_positions:
            inputs["position_ids"] = positions(mask)[:, -ids.shape[1]:]
        output = trunk(**inputs)
        return output.last_hidden_state, output.past_key_values

    def _encode(self, encoder_ids, encoder_mask):
        return self.lm.get_encoder()(input_ids=encoder_ids, attention_mask=encoder_mask.long()).last_hidden_state

    def _score(self, states, targets, previous, index, rules, with_entropy):
        """Log-prob and entropy of a chunk of tokens, fp32 log-softmax: (n, H), (n,), (n,), (n,) -> (n,), (n,)."""
        logprobs = rules(self.logits(states), previous, index).log_softmax(-1)
        chosen = logprobs.gather(1, targets[:, None])[:, 0]
        with torch.no_grad():
            # a forbidden token's log-prob is -inf, and its term 0
            entropy = -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(-1) if with_entropy else chosen.detach()
        return chosen, entropy

    def forward(
        self, ids, mask, scored, encoder_ids=None, encoder_mask=None, rules: LogitRules = LogitRules(),
        position_ids=None, with_entropy: bool = True,
    ) -> dict[str, torch.Tensor]:
        """Score the tokens marked in `scored` given all before them (see `collate`).

        ids, mask, scored (B, T); encoder_ids, encoder_mask (B, P), or (B / n, P) for prompts with n outputs each, one
        after another. position_ids (B, T): each line holds several rows (see `packs_exactly`, `collate_branches`), none
        of which may have its first token scored; `rules` must then not count tokens.
        Returns flat tensors over the N scored tokens in row order: logprobs (N,) under `rules`, entropy (N,) without
        gradient, unless told not to, and for each head its outputs (N, outputs) on the hidden state that predicts the
        token; of a `TokenHead`, the token's output and the log-sum-exp of all (N, 2), or if frozen, its output (N, 1).
        Logits exist for scored tokens only, CHUNK numbers at a time, and are computed again in the backward when there
        is more than one chunk.
        """
        encoder_states = None
        if self.seq2seq:
            states = self._encode(encoder_ids, encoder_mask)
            encoder_states, encoder_mask = (part.repeat_interleave(len(ids) // len(encoder_ids), 0)
                                            for part in (states, encoder_mask))
        trunk_inputs = (ids, mask, encoder_states, encoder_mask)
        hidden, _ = self._states(trunk_of(self.lm), *trunk_inputs, position_ids=position_ids)
        rows, columns = scored[:, 1:].nonzero(as_tuple=True)
        index = (scored.long().cumsum(1) - 1)[rows, columns + 1]
        states, previous, targets = hidden[rows, columns], ids[rows, columns], ids[rows, columns + 1]
        size = max(1, CHUNK // self.lm.get_output_embeddings().weight.shape[0])
        pieces = [piece.split(size) for piece in (states, targets, previous, index)]
        if len(pieces[0]) > 1 and torch.is_grad_enabled():
            score = functools.partial(checkpoint, self._score, use_reentrant=False, preserve_rng_state=False)
        else:
            score = self._score
        logprobs, entropy = (torch.cat(part) for part in zip(*(score(*part, rules, with_entropy)
                                                               for part in zip(*pieces))))
        if self.branch is not None:
            hidden, _ = self._states(self.branch, *trunk_inputs, position_ids=position_ids)
            states = hidden[rows, columns]
        out = {"logprobs": logprobs, **({"entropy": entropy} if with_entropy else {})}
        for name, head in self.heads.items():
            trained = any(parameter.requires_grad for parameter in head.parameters())
            read = (states if trained else states.detach(), *([targets] if isinstance(head, TokenHead) else []))
            out[name] = head(*read)
        return out

    def read(self, head: str, ids, mask, marked, encoder_ids=None, encoder_mask=None):
        """Outputs (N, outputs) of one head on the hidden states of the N tokens marked in (B, T), in row order; without
        logits. The other tensors are those of `forward`."""
        encoder_states = self._encode(encoder_ids, encoder_mask) if self.seq2seq else None
        hidden, _ = self._states(trunk_of(self.lm), ids, mask, encoder_states, encoder_mask)
        return self.heads[head](hidden[marked])

    def encode(self, encoder_ids, encoder_mask):
        """Encoder states (B, P, H) of an encoder-decoder model, for `decode`. `forward` calls `_encode`: FSDP
        gathers the root's parameters around this method, and would let go of them within `forward`."""
        return self._encode(encoder_ids, encoder_mask)

    def decode(self, ids, mask, cache=None, encoder_states=None, encoder_mask=None):
        """One step of generation: logits (B, V), hidden state (B, H) of the last position, and the key-value cache.

        ids (B, t) new tokens; mask (B, cached + t), None for an encoder-decoder model, whose outputs all start alike.
        """
        hidden, cache = self._states(trunk_of(self.lm), ids, mask, encoder_states, encoder_mask, cache, use_cache=True)
        return self.logits(hidden[:, -1]), hidden[:, -1], cache


def prepare(model: LanguageModel, dtype: torch.dtype, device: torch.device, **options) -> LanguageModel:
    """Shard a model for training or as a reference (see `distributed.shard`); its heads compute in float32."""
    if dtype == torch.bfloat16 and device.type == "cpu":
        AttentionInterface.register("sdpa", _attention)  # for all models of this process
    shard(model, dtype, device, fp32=list(model.heads.values()),
          methods=("encode", "decode", "read"), **options)
    model.device, model.dtype = device, dtype  # not those of its parameters, which may be offloaded
    return model


@torch.no_grad()
def packs_exactly(model: LanguageModel) -> bool:
    """Whether rows that share a line, with positions that restart, have the hidden states that they have alone.

    To be asked before the model is sharded. The test is relative, since a model from scratch has small weights. Where
    the answer is no (OPT and BLOOM, encoder-decoders), rows that share a line see each other or have wrong positions.
    """
    if model.seq2seq or not model.takes_positions:
        return False
    words = model.lm.get_input_embeddings().weight.shape[0]
    longest = getattr(model.lm.config.get_text_config(), "max_position_embeddings", None) or 9
    rows = [[(7 * i + 3 * n) % words for i in range(min(n, longest))] for n in (6, 4, 9)]
    line, places = (torch.tensor([sum(parts, [])], device=model.device)
                    for parts in (rows, [[*range(len(r))] for r in rows]))
    packed, _ = model._states(trunk_of(model.lm), line, torch.ones_like(line), position_ids=places)
    alone = torch.cat([_alone(model, row) for row in rows], 1)
    return bool((packed - alone).abs().max() < 1e-5 * alone.abs().max())


def _alone(model: LanguageModel, row: list[int]) -> torch.Tensor:
    """Hidden states (1, T, H) of a row by itself."""
    ids = torch.tensor([row], device=model.device)
    return model._states(trunk_of(model.lm), ids, torch.ones_like(ids))[0]


def reach(model: LanguageModel) -> float:
    """How many tokens back attention may look, where the config limits it: a sliding window, a chunk."""
    config = model.lm.config.get_text_config().to_dict()
    return min([value for name, value in config.items() if type(value) is int and value > 0
                and ("window" in name or "chunk" in name) and name != "max_window_layers"], default=math.inf)


@torch.no_grad()
def shares_exactly(model: LanguageModel, longest: int) -> bool:
    """Whether the outputs of a line of `collate_branches` have the hidden states that they have alone behind their
    prompt, in rows of at most `longest` tokens. To be asked before the model is sharded, as `packs_exactly`.

    Where attention reaches less far than that the answer is no: a mask given replaces what limits it.
    """
    if model.seq2seq or not model.takes_positions or reach(model) < longest:
        return False
    words = model.lm.get_input_embeddings().weight.shape[0]
    texts = [[(7 * i + 3 * n) % words for i in range(min(n, max(1, longest // 2)))] for n in (6, 4, 9, 1, 5, 3)]
    groups = [(texts[0], texts[1:3]), (texts[3], texts[4:])]
    lines = [[(prompt, outputs, outputs) for prompt, outputs in groups], [(texts[4], texts[:1], texts[:1])]]
    batch = collate_branches(lines, model.device)
    try:
        shared, _ = model._states(trunk_of(model.lm), batch["ids"], batch["mask"], position_ids=batch["position_ids"])
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    place = 0
    for prompt, outputs in groups:
        place += len(prompt) - 1
        for output in outputs:
            alone = _alone(model, prompt + output)[:, len(prompt) - 1 :]
            found = shared[:1, place : place + 1 + len(output)]
            if not (found - alone).abs().max() < 1e-5 * alone.abs().max():
                return False
            place += 1 + len(output)
    return True


# --- copies of the top blocks, references -----------------------------------------------------------------------------


class _Recorded(nn.Module):
    """Stands in for the blocks below a cut: returns what the policy's last block below it has just returned."""

    def __init__(self, detach: bool):
        super().__init__()
        self.detach, self.value = detach, None

    def record(self, _module, _inputs, output):
        """Forward hook for the policy's block."""
        self.value = tree_map_only(torch.Tensor, torch.Tensor.detach, output) if self.detach else output

    def forward(self, *_, **__):
        return self.value


def top_copy(lm: PreTrainedModel, layers: int, whole: bool, detach: bool) -> nn.Module:
    """A copy of the top `layers` blocks of `lm` and of all above them, fed by the forward of `lm` itself.

    whole: copy the LM with its head, else only its trunk. Everything below the cut, an encoder too, is a `_Recorded`
    that returns what `lm` computed there in its last forward: one trunk pass serves both, for any architecture, since
    each block is called by the model's own code with that model's own arguments. detach: record without gradient.
    """
    trunk = trunk_of(lm)
    blocks = max(block_lists(trunk), key=len)
    cut = len(blocks) - layers
    if not 0 < cut < len(blocks):
        raise UserError(f"--num-layers-unfrozen or --num-value-layers {layers}: the model has {len(blocks)} layers, "
                        f"so choose 1 to {len(blocks) - 1}")
    sources = [blocks[cut - 1]]
    if whole and lm.config.is_encoder_decoder:
        sources.append(lm.get_encoder())
    embedded = lm.get_input_embeddings().weight
    if not (whole and lm.get_output_embeddings().weight is embedded):  # nobody reads what it gives: no copy of it
        sources += [part for part in trunk.modules() if isinstance(part, nn.Embedding) and part.weight is embedded]
    memo = {id(source): _Recorded(detach) for source in sources}  # deepcopy finds these already "copied"
    memo |= dict.fromkeys(map(id, blocks[:cut]), memo[id(sources[0])])
    twin = copy.deepcopy(lm if whole else trunk, dict(memo))
    for module in twin.modules():
        module._forward_hooks.clear()
    for source in sources:
        source.register_forward_hook(memo[id(source)].record)
    return twin


def freeze_below(lm: PreTrainedModel, twin: PreTrainedModel) -> None:
    """Freeze in `lm` all below the cut of its `top_copy`: what no gradient of the copy reaches, and the embeddings."""
    start = lm.config.decoder_start_token_id if lm.config.is_encoder_decoder else None
    batch = collate([[0, 1]], [[1, 0]], start, next(lm.parameters()).device)
    with torch.no_grad():
        LanguageModel(lm)(**batch)
    LanguageModel(twin)(**batch)["logprobs"].sum().backward()
    reached = {name for name, parameter in twin.named_parameters() if parameter.grad is not None}
    embeddings = {id(parameter) for parameter in lm.get_input_embeddings().parameters()}
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_(name in reached and id(parameter) not in embeddings)
    twin.zero_grad()


def train_top(lm: PreTrainedModel, layers: int) -> None:
    """Freeze in `lm` all below its top `layers` blocks, the embeddings too."""
    freeze_below(lm, top_copy(lm, layers, whole=True, detach=True))
    for module in lm.modules():
        module._forward_hooks.clear()  # which recorded for the copy


def frozen(lm: PreTrainedModel, dtype: torch.dtype) -> LanguageModel:
    """`lm` as a frozen reference, its weights held in the precision that the policy computes in."""
    for parameter in lm.requires_grad_(False).parameters():
        parameter.data = parameter.data.to(dtype)  # not its buffers: rotary frequencies stay float32, as the policy's
    return LanguageModel(lm)

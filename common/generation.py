"""The decode loop for rollouts and evaluation: our own, on the model's key-value cache, for any transformers LM."""

import dataclasses
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.functional import pad
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from common.cli import UserError, reason
from common.data import short, whole_text
from common.distributed import broadcast, gather_rows, generator, meet, rank_rows, unsharded
from common.functions import ask, load_function
from common.graphs import FixedBatch
from common.models import LanguageModel, LogitRules, collate, load_classifier, pad_rows, reach


@dataclass
class Generation:
    """Outputs of `generate`, one entry a prompt."""

    tokens: list[list[int]]
    """sampled ids, as sampled, up to and including the end token or the token that completed a stop sequence"""
    logprobs: list[list[float]]
    """the sampler's log-prob of each token under the rules, before top-k and top-p"""
    finished: list[bool]
    """ended by itself, rather than by max_new_tokens"""


def noise(generator: torch.Generator, count: int, max_new_tokens: int) -> torch.Tensor:
    """Uniform numbers (count, max_new_tokens) for `generate`: what is sampled depends on a row's numbers alone, not on
    the ranks or batches that rows are spread over."""
    return torch.rand(count, max_new_tokens, generator=generator)


def pick(logprobs: torch.Tensor, uniform: torch.Tensor, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Sample token ids (B,) from log-probs (B, V), with one uniform number each (B,), by inverting the distribution.

    top_k keeps the k most likely tokens (ties with the k-th too), top_p the fewest that together have probability top_p
    (arXiv 1904.09751).
    """
    if 0 < top_k < logprobs.shape[1]:
        least = logprobs.topk(top_k).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < least, -torch.inf)
    if top_p < 1:
        ordered, order = logprobs.softmax(-1).sort(descending=True)
        drop = ordered.cumsum(-1) - ordered >= top_p  # the tokens before it already suffice
        logprobs = logprobs.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -torch.inf)

    def find(weights, level):  # in float64, since a float32 sum may rise at a weight of 0
        sums = weights.double().cumsum(-1)
        # at least 0 and below the total, whatever was rounded, so that the search ends at a positive weight
        level = torch.minimum(level.clamp(min=0), sums[:, -1] * (1 - 1e-9))
        place = torch.searchsorted(sums, level[:, None], right=True)
        return place[:, 0], level - (sums - weights).gather(1, place)[:, 0]

    size = int(logprobs.shape[1] ** 0.5)  # first a block of tokens, then one of its tokens: few float64 sums
    probs = pad(logprobs.softmax(-1), (0, -logprobs.shape[1] % size)).unflatten(1, (-1, size))  # (B, blocks, size)
    totals = probs.sum(-1)
    block, level = find(totals, uniform.double() * totals.sum(-1, dtype=torch.float64))
    return block * size + find(probs[torch.arange(len(block), device=block.device), block], level)[0]


def find_stop(text: str, stop_sequences: list[str]) -> int:
    """Where the first stop sequence begins in `text`, or -1."""
    return min((place for stop in stop_sequences if (place := text.find(stop)) >= 0), default=-1)


def stop_checker(tokenizer, stop_sequences: list[str]) -> Callable[[list[int]], bool] | None:
    """A function for `generate` that tells whether an output's last token has completed a stop sequence. Raises
    UserError for what is no list of texts, or an empty one, at which every output would end before it begins."""
    is_list = isinstance(stop_sequences, (list, tuple))
    if not is_list or not all(isinstance(stop, str) and stop and whole_text(stop) for stop in stop_sequences):
        raise UserError(f"--stop or stop_sequences: must be a list of texts, none empty, not {short(stop_sequences)}")
    if not stop_sequences:
        return None
    # A stop sequence can spread over as many tokens as it has bytes; a few more give the decoder its context.
    tail = max(len(stop.encode()) for stop in stop_sequences) + 4
    return lambda ids: find_stop(tokenizer.decode(ids[-tail:]), stop_sequences) >= 0


class _Roomy(DynamicLayer):
    """A cache layer with columns to spare: a new token is written into them, where transformers' own copies all."""

    room = None  # keys and values, each (B, heads, columns and some to spare, size)

    def update(self, key_states, value_states, *_, **__):
        """Append keys and values (B, heads, t, size); return all so far."""
        old, new = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if self.room is None or self.room[0].shape[2] < new:
            self.room = [part.new_empty(*part.shape[:2], new + 64, part.shape[3]) for part in (self.keys, self.values)]
            for room, part in zip(self.room, (self.keys, self.values)):
                room[:, :, :old] = part
        for room, part in zip(self.room, (key_states, value_states)):
            room[:, :, old:new] = part
        self.keys, self.values = (room[:, :, :new] for room in self.room)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep these rows."""
        self.take(beam_idx, 0, None)

    def take(self, rows: torch.Tensor, skip: int, other: DynamicLayer | None) -> None:
        """Keep these rows, without their first `skip` columns, and add those of another layer, flush right."""
        for name in ("keys", "values"):
            parts = [getattr(self, name)[rows, :, skip:], *([getattr(other, name)] if other else [])]
            width = max(part.shape[2] for part in parts)
            setattr(self, name, torch.cat([pad(part, (0, 0, width - part.shape[2], 0)) for part in parts]))
        self.room = None


def _with_room(cache) -> bool:
    """Make the plain layers of a cache roomy ones. Returns whether these are all there is, so that rows can join."""
    parts = [cache.self_attention_cache] if isinstance(cache, EncoderDecoderCache) else [cache]
    for layer in (layer for part in parts for layer in part.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            layer.__class__ = _Roomy
    return type(cache) is DynamicCache and all(type(layer) is _Roomy for layer in cache.layers)


@dataclass
class _Batch:
    """The rows that are being continued."""

    rows: list[int | None]
    """the prompt of each row; None for one that has ended"""
    previous: torch.Tensor
    """(b,) the last token of each row, which is not yet in the cache"""
    index: torch.Tensor
    """(b,) how many tokens each row has been given"""
    numbers: torch.Tensor
    """(b,) which uniform numbers are each row's"""
    mask: torch.Tensor | None
    """(b, t) what is real in the cache and the token after it; None for an encoder-decoder model"""
    cache: object
    encoder: dict[str, torch.Tensor]
    joins: bool
    """whether rows can join: left-padded ones with plain layers"""
    fixed = False
    """whether shapes never change: true of a `FixedBatch`, which has the same methods"""

    def going(self) -> list[int]:
        """The places of the rows that have not ended."""
        return [place for place, row in enumerate(self.rows) if row is not None]

    def keep(self, fresh: "_Batch | None" = None) -> "_Batch":
        """The batch without the rows that have ended, and with those of another."""
        places = self.going() or [0]  # a rank that waits for the others still takes part
        at = torch.tensor(places, device=self.previous.device)
        mask = None if self.mask is None else self.mask[at]
        if self.joins:
            skip = int(mask.any(0).long().argmax())
            others = fresh.cache.layers if fresh else [None] * len(self.cache.layers)
            for layer, other in zip(self.cache.layers, others):
                layer.take(at, skip, other)
            masks = [mask[:, skip:], *([fresh.mask] if fresh else [])]
            width = max(part.shape[1] for part in masks)
            mask = torch.cat([pad(part, (width - part.shape[1], 0)) for part in masks])
        else:
            self.cache.reorder_cache(at)  # caches of linear attention have it too
        rows, each = [self.rows[place] for place in places], [self.previous[at], self.index[at], self.numbers[at]]
        if fresh:
            rows += fresh.rows
            each = [torch.cat(pair) for pair in zip(each, (fresh.previous, fresh.index, fresh.numbers))]
        encoder = {name: tensor[at] for name, tensor in self.encoder.items()}
        return _Batch(rows, *each, mask, self.cache, encoder, self.joins)

    def step(self, model: LanguageModel, draw: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample a token for each row: the tokens (b,) and their log-probs (b,)."""
        logits, states, _ = model.decode(self.previous[:, None], self.mask, self.cache, **self.encoder)
        return self.append(*draw(logits, states, self.previous, self.index, self.numbers))

    def append(self, tokens: torch.Tensor, logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take these tokens for the last ones of the rows, and hand them on."""
        self.previous, self.index = tokens, self.index + 1
        if self.mask is not None:  # rows that have ended do not grow, or they would leave the model's positions
            going = torch.tensor([row is not None for row in self.rows], device=tokens.device)
            self.mask = torch.cat([self.mask, going[:, None]], 1)
        return tokens, logprobs


def _begin(model: LanguageModel, rows: list[int | None], texts: list[list[int]]) -> tuple:
    """Read the prompts `texts` of `rows`: the batch, the logits (b, V) and states (b, H) that predict a first token."""
    device, unique = model.device, list(dict.fromkeys(map(tuple, texts)))
    ids, mask = (tensor.to(device) for tensor in pad_rows(unique, 0, left=not model.seq2seq))
    encoder = {}
    if model.seq2seq:
        encoder = {"encoder_states": model.encode(ids, mask), "encoder_mask": mask}
        ids, mask = torch.full((len(ids), 1), model.start_id, device=device), None
    logits, states, cache = model.decode(ids, mask, None, **encoder)
    previous = ids[:, -1]
    if len(unique) < len(rows):  # several outputs of one prompt
        number = {text: i for i, text in enumerate(unique)}
        at = torch.tensor([number[tuple(text)] for text in texts], device=device)
        cache.reorder_cache(at)
        logits, states, previous = logits[at], states[at], previous[at]
        mask, encoder = None if mask is None else mask[at], {name: part[at] for name, part in encoder.items()}
    index = torch.zeros(len(rows), dtype=torch.long, device=device)
    numbers = torch.tensor([row or 0 for row in rows], device=device)
    return _Batch(rows, previous, index, numbers, mask, cache, encoder, _with_room(cache)), logits, states


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: list[list[int]],
    uniforms: torch.Tensor,
    rules: LogitRules = LogitRules(),
    *,
    batch_size: int | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Callable[[list[int]], bool] | None = None,
    adjust_logits: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    synced: bool = False,
    fixed: bool | None = None,
) -> Generation:
    """Continue each prompt (non-empty ids) by at most `uniforms.shape[1]` tokens.

    uniforms: (B, max_new_tokens), see `noise`. rules: temperature (0 is greedy), end tokens, minimum length, mask.
    batch_size: most rows at a time; all by default. stop: see `stop_checker`. adjust_logits(logits (b, V), state
    (b, H), previous (b,)) -> logits, before the rules. synced: the model is sharded, so all ranks must take the same
    number of steps, and begin all their prompts at once; else ranks may stop apart. fixed: decode in shapes that do not
    change, by CUDA graphs (see `FixedBatch`), where cache and attention allow it; on a GPU by default, and never when
    synced.

    Rows that have ended leave the batch, and the cache, once they are a quarter of it; prompts that wait take their
    places where the cache allows it. Equal prompts that begin together are read once.
    """
    device, limit = model.device, uniforms.shape[1]
    result = Generation([[] for _ in prompts], [[] for _ in prompts], [False] * len(prompts))
    if not limit or not (prompts or synced):
        return result
    # a rank that has no prompts still takes part when synced, with a row of its own that nobody reads
    uniforms = uniforms.to(device) if prompts else uniforms.new_zeros(1, limit, device=device)
    most = min(batch_size or len(prompts), len(prompts)) or 1
    fixed = (device.type == "cuda" if fixed is None else fixed) and not synced and model.takes_positions
    longest = max(map(len, prompts), default=1) + limit
    # there the columns of a row are not distances, which windows and ALiBi count
    fixed = fixed and reach(model) >= longest and not getattr(model.lm.config, "alibi", False)
    waiting = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))  # like lengths together

    def draw(logits, states, previous, index, numbers):
        logits = logits.float()
        if adjust_logits:
            logits = adjust_logits(logits, states, previous)
        logprobs = rules(logits, previous, index).log_softmax(-1)
        if rules.temperature:
            tokens = pick(logprobs, uniforms[numbers, index.clamp(max=limit - 1)], top_k, top_p)
        else:
            tokens = logprobs.argmax(-1)
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0]

    batch = None
    while True:
        free = most - (len(batch.going()) if batch else 0)
        fresh = None
        # read new prompts once all rows have ended, or where they can join, once a quarter of the places is free
        if batch is None or waiting and (free == most or batch.joins and 4 * free >= most):
            rows, waiting = sorted(waiting[:free]), waiting[free:]
            fresh, logits, states = _begin(model, rows or [None], [prompts[row] for row in rows] or [[0]])
            tokens, chosen = fresh.append(*draw(logits, states, fresh.previous, fresh.index, fresh.numbers))
        else:
            tokens, chosen = batch.step(model, draw)
        now = fresh or batch
        for place, (row, token, logprob) in enumerate(zip(now.rows, tokens.tolist(), chosen.tolist())):
            if row is not None:
                result.tokens[row].append(token)
                result.logprobs[row].append(logprob)
                result.finished[row] = token in rules.eos_ids or bool(stop and stop(result.tokens[row]))
                if result.finished[row] or len(result.tokens[row]) == limit:
                    now.rows[place] = None
        if fresh and batch is None and fixed and fresh.joins:
            batch = FixedBatch(fresh.cache.layers, most, longest, device)
        if fresh:
            batch = batch.keep(fresh) if batch and (batch.going() or batch.fixed) else fresh
        left = torch.tensor(len(batch.going()) + len(waiting))
        if synced:
            dist.all_reduce(left, dist.ReduceOp.MAX)
        if not left:
            return result
        # no row will join soon: drop those that have ended once they are a quarter
        if (not (waiting and batch.joins or batch.fixed) and len(batch.going()) <= 0.75 * len(batch.rows)
                and len(batch.rows) > 1):
            batch = batch.keep()


def try_out(model: LanguageModel) -> None:
    """Generate and score a few tokens. Raises UserError, in one line, for an architecture that cannot be handled."""
    prompts = [[0], [0, 0, 0], [0]]  # equal ones too, which are read once
    try:
        responses = generate(model, prompts, torch.full((3, 2), 0.5), synced=True).tokens
        with torch.no_grad():
            model(**collate(prompts, responses, model.start_id, model.device))
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        name = type(model.lm).__name__
        raise UserError(f"--model: a {name} cannot be sampled from and scored here ({reason(error)})") from error


def sample_texts(
    model: LanguageModel,
    tokenizer,
    prompts: list[list[int]],
    uniforms: torch.Tensor,
    rules: LogitRules,
    *,
    batch_size: int,
    stop_sequences: list[str] = (),
    keep_sharded: bool = False,
    **options,
) -> list[dict]:
    """`generate` over all ranks: each samples its share of the prompts, in batches; all return all, in order.

    Returns for each prompt a dict of prompt_ids, of tokens, logprobs and finished (see `Generation`), and of the texts
    prompt, output (cut where the first stop sequence begins) and sample (both together), without special tokens.
    """
    rows, real = rank_rows(len(prompts))
    mine = rows if keep_sharded else [row for row, is_real in zip(rows, real) if is_real]
    stop, items = stop_checker(tokenizer, stop_sequences), []
    size = batch_size if keep_sharded else max(1, len(mine))
    with unsharded(model, keep_sharded):
        for start in range(0, len(mine), size):
            chunk = mine[start : start + size]
            texts = [prompts[row] for row in chunk]
            out = generate(model, texts, uniforms[chunk], rules, batch_size=batch_size, stop=stop, synced=keep_sharded,
                           **options)
            items += [dict(tokens=t, logprobs=p, finished=f) for t, p, f in zip(out.tokens, out.logprobs, out.finished)]
    for row, item in zip(mine, items):
        prompt, output = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompts[row], item["tokens"]))
        if not model.seq2seq:  # decoded alone, an output loses its leading space in some tokenizers
            whole = tokenizer.decode(prompts[row] + item["tokens"], skip_special_tokens=True)
            output = whole[len(prompt) :] if whole.startswith(prompt) else output
        if (end := find_stop(output, stop_sequences)) >= 0:
            output = output[:end]
        item.update(prompt_ids=prompts[row], prompt=prompt, output=output,
                    sample=prompt + (" " if model.seq2seq else "") + output)
    return gather_rows(items, len(prompts))


def load_metric(spec: str | None, device: torch.device) -> Callable | None:
    """The metric function that `--metric` names. A classifier's answers are called `score`."""
    if spec is None or dist.get_rank():  # called on rank 0 alone
        return None
    if ":" in spec and not os.path.exists(spec):
        return load_function(spec, "--metric")
    classify = load_classifier(spec, "--metric", device, batch_size=64)
    return lambda samples, **_: {"score": classify(samples)}


def evaluate_samples(
    model: LanguageModel,
    tokenizer,
    prompts: list[list[int]],
    rows: list[dict],
    rules: LogitRules,
    metric_fn: Callable | None,
    score: Callable[[list[dict], list[dict]], dict[str, list]] | None = None,
    *,
    repeats: int,
    max_new_tokens: int,
    seed: int,
    options: dict[str, list],
    columns: tuple[str, ...] | None = None,
    choose: Callable[..., dict] = dict,
    reward_timeout: float | None = None,
    **sampling,
) -> tuple[dict[str, float], list[dict]]:
    """Sample `repeats` outputs for each prompt; return the means of their metrics, as eval/NAME, and the samples.

    Done once for each combination of the list-valued `options` (temperature, top_k, top_p), whose names and values are
    added to a metric's name where there are several. choose(**values), the temperature left out, gives the options of
    `generate`; by default they are those. The random numbers are the same each time, so that two evaluations compare
    well. metric_fn: a user's function, asked on rank 0 (see `ask`). score(items, rows) -> lists, one value a sample,
    called on all ranks. columns: which lists stand beside the samples; all of them by default.
    """
    prompts, rows = ([row for row in every for _ in range(repeats)] for every in (prompts, rows))
    uniforms = noise(generator(seed, 2), len(prompts), max_new_tokens)
    metrics, samples = {}, []
    for values in itertools.product(*options.values()):
        chosen = dict(zip(options, values))
        suffix = "".join(f"@{name}={value:g}" for name, value in chosen.items() if len(options[name]) > 1)
        ruled = dataclasses.replace(rules, temperature=chosen.pop("temperature"))
        items = sample_texts(model, tokenizer, prompts, uniforms, ruled, **choose(**chosen), **sampling)
        found = score(items, rows) if score else {}
        if metric_fn and dist.get_rank() == 0:
            found = ask(metric_fn, "metric", items, rows, tokenizer, reward_timeout) | found
        meet()
        found = broadcast(found) | {"length": [len(item["tokens"]) for item in items]}
        for name, value in found.items():
            metrics[f"eval/{name}{suffix}"] = torch.as_tensor(value, dtype=torch.float64).mean().item()
        beside = [name for name in found if isinstance(found[name], list) and (columns is None or name in columns)]
        samples += [{**({"option": suffix} if suffix else {}), "prompt": item["prompt"], "output": item["output"],
                     **{name: found[name][i] for name in beside}} for i, item in enumerate(items)]
    return metrics, samples

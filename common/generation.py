"""The decode loop for rollouts and evaluation: our own, on the model's key-value cache, for any transformers LM."""

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from common.cli import UserError
from common.data import call, check_metrics
from common.distributed import broadcast, gather_rows, generator, rank_rows, unsharded
from common.models import LanguageModel, LogitRules, collate, pad_rows


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
    # in float64, since a float32 sum may rise at a probability of 0
    cumulative = logprobs.softmax(-1, dtype=torch.float64).cumsum(-1)
    # below the total, so that the search ends at a token of positive probability
    level = uniform.double().clamp(max=1 - 1e-9)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, level, right=True)[:, 0]


def find_stop(text: str, stop_sequences: list[str]) -> int:
    """Where the first stop sequence begins in `text`, or -1."""
    return min((place for stop in stop_sequences if (place := text.find(stop)) >= 0), default=-1)


def stop_checker(tokenizer, stop_sequences: list[str]) -> Callable[[list[int]], bool] | None:
    """A function for `generate` that tells whether an output's last token has completed a stop sequence."""
    if not stop_sequences:
        return None
    # A stop sequence can spread over as many tokens as it has bytes; a few more give the decoder its context.
    reach = max(len(stop.encode()) for stop in stop_sequences) + 4
    return lambda ids: find_stop(tokenizer.decode(ids[-reach:]), stop_sequences) >= 0


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: list[list[int]],
    uniforms: torch.Tensor,
    rules: LogitRules = LogitRules(),
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Callable[[list[int]], bool] | None = None,
    adjust_logits: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    synced: bool = False,
) -> Generation:
    """Continue each prompt (non-empty ids) by at most `uniforms.shape[1]` tokens.

    uniforms: (B, max_new_tokens), see `noise`. rules: temperature (0 is greedy), end tokens, minimum length, mask.
    stop: see `stop_checker`. adjust_logits(logits (b, V), state (b, H), previous (b,)) -> logits, before the rules.
    synced: the model is sharded, so all ranks must take the same number of steps; else ranks may stop apart.

    Rows that have ended leave the batch, and the cache, once they are a quarter of it.
    """
    device = model.device
    max_new_tokens = uniforms.shape[1]
    result = Generation([[] for _ in prompts], [[] for _ in prompts], [False] * len(prompts))
    if not max_new_tokens or not (prompts or synced):
        return result
    ids, mask = (tensor.to(device) for tensor in pad_rows(prompts or [[0]], 0, left=not model.seq2seq))
    uniforms = uniforms.to(device) if prompts else uniforms.new_zeros(1, max_new_tokens, device=device)
    encoder = {}
    if model.seq2seq:
        encoder = {"encoder_states": model.encode(ids, mask), "encoder_mask": mask}
        ids, mask = torch.full((len(ids), 1), model.start_id, device=device), None
    rows = list(range(len(prompts)))  # the prompt of each row of the batch; None for one that has ended
    rows = rows or [None]
    cache, previous = None, ids[:, -1]
    for step in range(max_new_tokens):
        logits, state, cache = model.decode(ids, mask, cache, **encoder)
        logits = logits.float()
        if adjust_logits:
            logits = adjust_logits(logits, state, previous)
        logprobs = rules(logits, previous, torch.full_like(previous, step)).log_softmax(-1)
        tokens = pick(logprobs, uniforms[:, step], top_k, top_p) if rules.temperature else logprobs.argmax(-1)
        chosen = logprobs.gather(1, tokens[:, None])[:, 0]
        for place, (row, token, logprob) in enumerate(zip(rows, tokens.tolist(), chosen.tolist())):
            if row is not None:
                result.tokens[row].append(token)
                result.logprobs[row].append(logprob)
                result.finished[row] = token in rules.eos_ids or bool(stop and stop(result.tokens[row]))
                rows[place] = None if result.finished[row] else row
        active = [place for place, row in enumerate(rows) if row is not None]
        going = torch.tensor(len(active))
        if synced:
            dist.all_reduce(going, dist.ReduceOp.MAX)
        if not going:
            break
        if len(active) <= 0.75 * len(rows) and len(rows) > 1:
            active = active or [0]  # a rank that waits for the others still takes part
            keep = torch.tensor(active, device=device)
            cache.batch_select_indices(keep)
            rows, tokens, uniforms = [rows[place] for place in active], tokens[keep], uniforms[keep]
            mask = None if mask is None else mask[keep]
            encoder = {name: tensor[keep] for name, tensor in encoder.items()}
        ids, previous = tokens[:, None], tokens
        mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return result


def try_out(model: LanguageModel) -> None:
    """Generate and score a few tokens. Raises UserError, in one line, for an architecture that cannot be handled."""
    prompts = [[0], [0, 0, 0]]
    try:
        responses = generate(model, prompts, torch.full((2, 2), 0.5), synced=True).tokens
        with torch.no_grad():
            model(**collate(prompts, responses, model.start_id, model.device))
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        name, reason = type(model.lm).__name__, str(error).strip().splitlines()[0][:160]
        raise UserError(f"--model: a {name} cannot be sampled from and scored here ({reason})") from error


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
    stop, items = stop_checker(tokenizer, list(stop_sequences)), []
    with unsharded(model, keep_sharded):
        for start in range(0, len(mine), batch_size):
            chunk = mine[start : start + batch_size]
            texts = [prompts[row] for row in chunk]
            out = generate(model, texts, uniforms[chunk], rules, stop=stop, synced=keep_sharded, **options)
            items += [dict(tokens=t, logprobs=p, finished=f) for t, p, f in zip(out.tokens, out.logprobs, out.finished)]
    for row, item in zip(mine, items):
        prompt, output = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompts[row], item["tokens"]))
        if not model.seq2seq:  # decoded alone, an output loses its leading space in some tokenizers
            whole = tokenizer.decode(prompts[row] + item["tokens"], skip_special_tokens=True)
            output = whole[len(prompt) :] if whole.startswith(prompt) else output
        if (end := find_stop(output, list(stop_sequences))) >= 0:
            output = output[:end]
        item.update(prompt_ids=prompts[row], prompt=prompt, output=output,
                    sample=prompt + (" " if model.seq2seq else "") + output)
    return gather_rows(items + [None] * (len(rows) - len(items)), len(prompts))


def text_columns(items: list[dict], rows: list[dict]) -> dict[str, list]:
    """What a reward or metric function is called with: texts, sampled ids, and the other columns of the prompts."""
    metadata = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    texts = {f"{name}s": [item[name] for item in items] for name in ("sample", "prompt", "output")}
    return {**metadata, **texts, "output_ids": [list(item["tokens"]) for item in items]}


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
    **sampling,
) -> tuple[dict[str, float], list[dict]]:
    """Sample `repeats` outputs for each prompt; return the means of their metrics, as eval/NAME, and the samples.

    Done once for each combination of the list-valued `options` (temperature, top_k, top_p), whose names and values are
    added to a metric's name where there are several; choose(**values) turns all but temperature into those of
    `generate`, if they are others. The random numbers are the same each time, so that two evaluations
    compare well. metric_fn: a user's function, called on rank 0 with `text_columns`. score(items, rows) -> lists, one
    value a sample, called on all ranks. columns: which lists stand beside the samples; all of them by default.
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
            measured = call(metric_fn, **{**text_columns(items, rows), "tokenizer": tokenizer})
            found = check_metrics(measured, len(items)) | found
        found = broadcast(found) | {"length": [len(item["tokens"]) for item in items]}
        for name, value in found.items():
            metrics[f"eval/{name}{suffix}"] = torch.as_tensor(value, dtype=torch.float64).mean().item()
        beside = [name for name in found if isinstance(found[name], list) and (columns is None or name in columns)]
        samples += [{**({"option": suffix} if suffix else {}), "prompt": item["prompt"], "output": item["output"],
                     **{name: found[name][i] for name in beside}} for i, item in enumerate(items)]
    return metrics, samples

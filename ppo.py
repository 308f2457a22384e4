"""Proximal policy optimisation for language models (PPO, arXiv 1707.06347, as in 1909.08593 and 2203.02155).

Sample outputs from the policy, score them with any reward function, subtract a penalty for each token's distance from a
frozen reference, and take a few epochs of clipped policy-gradient steps on advantages from a learned value.

Differences from the papers, and from trlX where it differs from them:
1. The value is a small head on the policy's own hidden states (or on a trainable copy of its top blocks,
   `--num-value-layers`), as in trlX; its last layer starts at zero. 2009.01325 has a separate value network.
2. Log-probs of the update, of the old policy and of the reference come from one function, with the temperature of the
   sampling. Rollouts sample from the whole distribution: top-k and top-p exist for evaluation only.
3. The score sits on the last real token, advantages are whitened over all real tokens of the rollout on all ranks, and
   a minibatch's loss is a sum over its tokens divided by their number, whatever the micro-batches and ranks.
4. Adam's epsilon is 1e-5, gradients are clipped to norm 1. No entropy bonus, no early stop.
5. Random walks, the default task, starts from trlX's hyperparameters and changes these: 80 rollouts of 256 episodes
   with 2 epochs (trlX: 20 of 128 with 4), so that each start is sampled often; minibatches of 64 (100), since smaller
   steps lost starts for good; a KL coefficient of 0.01 (0), which brings such starts back and ends the walk at the
   goal; a learning rate that rises over 10 steps and falls to 0 (constant); vf_coef 0.1 (1.2).

One step is one rollout of `--rollout-batch-size` episodes and its updates. Batch sizes are global: the same flags give
the same optimisation, and sample the same tokens up to rounding, on any number of processes.

    python ppo.py                                                         random walks on a CPU, two to three minutes
    python ppo.py --model gpt2 --reward sentiment                         one GPU
    torchrun --nproc_per_node 8 ppo.py --model gpt2 --reward sentiment    eight GPUs
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 ppo.py --model gpt2 \\
        --reward sentiment                                                two machines: the same command on each
"""

import contextlib
import dataclasses
import functools
import math
import os
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from common.checkpoint import load_checkpoint, read_batch, read_state, save_checkpoint
from common.cli import UserError, check_bounds, check_shared_flags, end_if_told, run
from common.data import check_data, encode_prompts, evenly, load_prompts, pin_date, prompt_room, shuffled
from common.distributed import adamw, broadcast, gather_rows, generator, init, meet, optimizer_step, rank_rows
from common.functions import ask, load_function
from common.generation import evaluate_samples, noise, sample_texts, try_out
from common.metrics import RunLog, open_run, replay, say, table
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
    load_classifier,
    load_lm,
    load_tokenizer,
    make_head,
    prepare,
    top_copy,
)
from common.randomwalks import random_walks, write_cloned_walker

# --- arguments --------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    """PPO for language models. The head of this file explains the algorithm, docs/ppo.md the metrics."""

    # model
    model: str | None = None
    """path or hub id of a causal or encoder-decoder LM; random walks makes its own when none is given"""
    tokenizer: str | None = None
    """path or hub id of the tokenizer, if it is not beside the model"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """what the model computes in; weights and optimizer are float32. auto: bfloat16 on a GPU, float32 on a CPU"""
    num_layers_unfrozen: int = -1
    """train the top n blocks only; a reference, if there is one, shares the frozen rest. -1: all"""
    num_value_layers: int = 0
    """give the value head a trainable copy of the top n blocks; 0: it reads the policy's last hidden state"""
    lora_rank: int = 0
    """train LoRA adapters of this rank; a reference, if there is one, is the model without them; 0: no adapters"""
    lora_alpha: float = 32.0
    """scale of the LoRA adapters: their output is multiplied by alpha / rank"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward: less memory, a third more arithmetic"""
    offload: bool = False
    """keep parameters and optimizer in CPU memory, for models that do not fit on the GPUs"""
    shard_size: int | None = None
    """processes that share one copy of the weights (hybrid sharding); all of them by default"""
    keep_sharded: bool = False
    """do not hold the gathered parameters during a rollout: slow, for models that fit on a GPU only in shards"""

    # prompts
    prompts: str | None = None
    """.jsonl[.gz], .json, .csv, .parquet or Hub data set name:split, with column prompt or text; none: the BOS token"""
    eval_prompts: str | None = None
    """prompts for evaluation, a file or Hub data set with column prompt or text; none: some of the run's own"""
    num_eval_prompts: int = 256
    """how many evaluation prompts to use at most"""
    prompt_words: int | None = None
    """use the first n words of each prompt"""
    max_length: int | None = None
    """most tokens of prompt and output together, longer prompts being cut; none: the model's positions, at most 1024"""
    truncation_side: Literal["left", "right"] = "left"
    """the end of a long prompt that is cut off"""

    # reward
    reward: str | None = None
    """randomwalks, sentiment, file.py:function, package.module:function, or a classification model's path or hub id"""
    reward_model: str | None = None
    """the classifier behind --reward sentiment, in place of lvwerra/distilbert-imdb"""
    reward_device: str | None = None
    """device of a reward model, such as cuda:7 with --reward-on rank0; the process's own by default"""
    reward_batch_size: int = 64
    """texts per forward of a reward model"""
    reward_on: Literal["all", "rank0"] = "all"
    """call the reward function on each process with its own samples, or on process 0, which alone has it, with all"""
    reward_timeout: float | None = None
    """end the run when a reward or metric function takes more seconds than this; none: wait as long as it takes"""
    reward_clip: float | None = 10.0
    """clip scores to plus and minus this"""
    reward_scaling: Literal["none", "running", "reference"] = "none"
    """divide scores by their standard deviation: over all so far, or of the first rollout"""
    reference_std: float | None = None
    """the standard deviation for --reward-scaling reference, if it is known"""
    missing_eos_penalty: float = 0.0
    """taken from the score of an output that did not end by itself"""

    # sampling
    max_new_tokens: int = 40
    """most tokens in an output"""
    min_new_tokens: int = 0
    """no end token before an output has this many tokens"""
    temperature: float = 1.0
    """sampling temperature of rollouts; log-probs of the update use it too"""
    stop: list[str] = dataclasses.field(default_factory=list)
    """stop sequences: the output ends where the first one begins"""
    generation_batch_size: int = 128
    """prompts per generation batch on one process; affects memory and speed only"""
    eval_temperature: list[float] = dataclasses.field(default_factory=lambda: [1.0])
    """sampling temperature of evaluation; several values repeat it"""
    eval_top_k: list[int] = dataclasses.field(default_factory=lambda: [0])
    """sample from the k most likely tokens at evaluation, 0 from all; several values repeat it"""
    eval_top_p: list[float] = dataclasses.field(default_factory=lambda: [1.0])
    """sample from the likeliest tokens of this total probability at evaluation; several values repeat it"""
    eval_samples: int = 1
    """outputs per evaluation prompt"""

    # algorithm
    total_episodes: int = 25600
    """outputs to sample in all"""
    rollout_batch_size: int = 128
    """outputs per step"""
    ppo_epochs: int = 4
    """passes over each rollout"""
    gamma: float = 1.0
    """discount"""
    lam: float = 0.95
    """lambda of generalised advantage estimation"""
    clip_range: float = 0.2
    """clip range of the policy's probability ratio"""
    clip_range_value: float = 0.2
    """clip range of the value around the rollout's value"""
    vf_coef: float = 0.1
    """weight of the value loss"""
    kl_coef: float = 0.05
    """weight of the per-token KL penalty, or its start when adaptive"""
    kl_target: float | None = None
    """KL (nats per output) that an adaptive coefficient steers to; none: fixed coefficient"""
    kl_horizon: int = 10000
    """episodes over which the adaptive coefficient moves"""
    max_kl: float | None = None
    """stop the run when the KL (nats per output) is more than this; none: never"""
    whiten_rewards: bool = False
    """divide the penalised token rewards by their standard deviation"""

    # optimisation
    batch_size: int = 32
    """sequences per optimizer step, over all processes"""
    micro_batch_size: int = 32
    """sequences per forward on one process; affects memory and speed only"""
    learning_rate: float = 3e-5
    """peak learning rate"""
    schedule: Literal["constant", "cosine", "linear"] = "linear"
    """the learning rate after warm-up: constant, or down to 0 as a cosine or a line"""
    warmup_steps: int = 0
    """optimizer steps over which the learning rate rises from 0"""
    adam_beta1: float = 0.9
    """Adam's decay of the mean gradient"""
    adam_beta2: float = 0.95
    """Adam's decay of the mean squared gradient"""
    adam_epsilon: float = 1e-5
    """Adam's epsilon"""
    weight_decay: float = 0.0
    """decoupled weight decay of matrices"""
    max_grad_norm: float = 1.0
    """clip the gradient to this norm"""

    # run
    max_steps: int | None = None
    """stop after this many steps even if more was asked for"""
    eval_every: int = 10
    """steps between evaluations; the start and the end are always evaluated"""
    save_every: int = 0
    """steps between checkpoints; 0: none"""
    keep_checkpoints: int = 2
    """newest checkpoints to keep"""
    keep_going: bool = False
    """go on training when a checkpoint or a line of the log cannot be written, on a full disk for one"""
    output_dir: str | None = None
    """run directory; runs/SCRIPT-MODEL-SEED by default"""
    resume: str | None = None
    """auto, for the newest checkpoint of the run directory, or the path of a checkpoint"""
    replay: str | None = None
    """nonfinite-step-N of a run that stopped there: run that batch again, show which of its rows do it, and end"""
    seed: int = 1
    """seed of everything, the graph of random walks included"""
    track: bool = False
    """log to Weights and Biases too (WANDB_PROJECT, WANDB_MODE=offline and the like are its own settings)"""
    config: str | None = None
    """YAML file with flags; those on the command line win"""


PRESETS = {  # defaults that a task brings along; flags and --config win
    "randomwalks": dict(
        max_length=32, max_new_tokens=9, eval_samples=50, eval_every=20, total_episodes=20480, rollout_batch_size=256,
        ppo_epochs=2, batch_size=64, learning_rate=3e-4, warmup_steps=10, kl_coef=0.01, reward_clip=1.0),
    "sentiment": dict(prompts="stanfordnlp/imdb:train", eval_prompts="stanfordnlp/imdb:test", prompt_words=4),
}
RESUMABLE = (  # settings that may differ between a run and its resumption
    "max_steps", "eval_every", "save_every", "keep_checkpoints", "keep_going", "output_dir", "resume", "replay",
    "track", "config", "micro_batch_size", "generation_batch_size", "reward_batch_size", "reward_device",
    "reward_on", "shard_size", "keep_sharded", "offload", "gradient_checkpointing",
    "reward_timeout")


def preset(args: Args) -> dict:
    """The defaults of the task that the flags choose. Those of --prompts stay whole, and are evaluated on too."""
    chosen = PRESETS.get(args.reward or ("randomwalks" if args.model is None else ""), {})
    own = ("eval_prompts", "prompt_words") if args.prompts else ()
    return {name: value for name, value in chosen.items() if name not in own}


def arguments(**flags) -> Args:
    """Args with the defaults of the task that the flags choose, as the command line makes them."""
    return Args(**{**preset(Args(**flags)), **flags})


def check(args: Args, reward_fn: Callable | None = None) -> None:
    """Refuse settings that cannot work, in one line that names the flag."""
    check_bounds(
        args,
        positive=("total_episodes", "rollout_batch_size", "ppo_epochs", "batch_size", "micro_batch_size", "max_steps",
                  "learning_rate", "adam_epsilon", "max_grad_norm", "max_new_tokens", "temperature", "reward_clip",
                  "generation_batch_size", "reward_batch_size", "kl_target", "kl_horizon", "max_kl", "eval_every",
                  "eval_samples", "num_eval_prompts", "prompt_words", "keep_checkpoints", "shard_size",
                  "reward_timeout"),
        not_negative=("seed", "min_new_tokens", "warmup_steps", "save_every", "clip_range", "clip_range_value",
                      "kl_coef", "vf_coef", "weight_decay", "num_value_layers", "lora_rank", "missing_eos_penalty"),
        unit=("gamma", "lam", "adam_beta1", "adam_beta2"))
    check_shared_flags(args)
    if args.min_new_tokens > args.max_new_tokens:
        raise UserError(f"--min-new-tokens {args.min_new_tokens} is more than --max-new-tokens {args.max_new_tokens}")
    if args.batch_size > args.rollout_batch_size:
        raise UserError(f"--batch-size {args.batch_size} is more than a rollout holds: at most --rollout-batch-size "
                        f"{args.rollout_batch_size}")
    if args.total_episodes < args.rollout_batch_size:
        raise UserError(f"--total-episodes {args.total_episodes} is less than one --rollout-batch-size "
                        f"{args.rollout_batch_size}")
    if args.model is None and args.reward not in (None, "randomwalks") and reward_fn is None:
        raise UserError(f"--reward {args.reward} needs a --model")
    if args.model is not None and args.reward is None and reward_fn is None:
        raise UserError(f"--model {args.model} needs a --reward: randomwalks, sentiment, file.py:function or a model")
    if args.reward_device and args.reward_device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--reward-device {args.reward_device}: there is no GPU here")
    if args.reward_model and args.reward != "sentiment":
        raise UserError("--reward-model is for --reward sentiment; give another classifier as --reward PATH")
    if args.kl_target is not None and args.rollout_batch_size >= 5 * args.kl_horizon:
        raise UserError(f"--kl-horizon {args.kl_horizon}: must be more than a fifth of --rollout-batch-size "
                        f"{args.rollout_batch_size}, or the KL coefficient could fall below 0 in one step")
    if args.reference_std is not None and (args.reward_scaling != "reference" or args.reference_std <= 0):
        raise UserError("--reference-std is for --reward-scaling reference, and must be more than 0")


# --- rewards ----------------------------------------------------------------------------------------------------------


def load_reward(args: Args, device: torch.device) -> Callable:
    """The reward function that `--reward` names. Raises UserError where there is none."""
    if args.reward in (None, "randomwalks"):
        return random_walks(args.seed).reward
    if args.reward_on == "rank0" and dist.get_rank():
        return lambda **_: []  # never called
    if args.reward != "sentiment" and ":" in args.reward and not os.path.exists(args.reward):
        return load_function(args.reward, "--reward")
    path = (args.reward_model or "lvwerra/distilbert-imdb") if args.reward == "sentiment" else args.reward
    flag = "--reward-model" if args.reward == "sentiment" else "--reward"
    classify = load_classifier(path, flag, args.reward_device or device, args.reward_batch_size)
    return lambda samples, **_: classify(samples)


def compute_scores(reward_fn: Callable, items: list[dict], rows: list[dict], tokenizer, args: Args) -> list:
    """Scores of all samples on all ranks: a number each, or a list of token rewards each. Every rank scores its share
    of the samples, or rank 0 scores all."""
    on_rank_0 = args.reward_on == "rank0"
    start, every = (0, 1) if on_rank_0 else (dist.get_rank(), dist.get_world_size())
    scores, mine_items, mine_rows = [], items[start::every], rows[start::every]
    if mine_items and not (on_rank_0 and dist.get_rank()):
        scores = ask(reward_fn, "reward", mine_items, mine_rows, tokenizer, args.reward_timeout)
    meet()
    return broadcast(scores) if on_rank_0 else gather_rows(scores, len(items))


def shape_scores(raw: list, finished: list[bool], moments: tuple, args: Args) -> tuple[list, tuple]:
    """Clip scores, scale them by a standard deviation, take the missing-EOS penalty from outputs that did not end by
    themselves. Also returns the moments of the clipped scores: of all so far, or of the first rollout."""
    limit = math.inf if args.reward_clip is None else args.reward_clip
    scores = [score if isinstance(score, list) else [score] for score in raw]
    scores = [[max(-limit, min(limit, value)) for value in score] for score in scores]
    if args.reward_scaling == "running" or not moments[0]:
        moments = update_moments(moments, torch.tensor([sum(score) for score in scores], dtype=torch.float64))
    std = args.reference_std or math.sqrt(moments[2] / max(1, moments[0] - 1))
    scale = std if args.reward_scaling != "none" and std > 1e-6 else 1.0  # equal scores have no scale
    scores = [[value / scale for value in score] for score in scores]
    for score, ended in zip(scores, finished):
        if not ended:
            score[-1] -= args.missing_eos_penalty
    return [score if isinstance(given, list) else score[0] for score, given in zip(scores, raw)], moments


# --- algorithm --------------------------------------------------------------------------------------------------------


def kl_penalty(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: Literal["k1", "k3"]) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) from samples of the policy (B, R) -> (B, R), in nats.

    k1 = log p - log q, unbiased, enters the reward (arXiv 1909.08593, Eq. 2); k3 = q/p - 1 - log q/p, never negative,
    is for monitoring (Schulman, "Approximating KL divergence", 2020).
    """
    log_ratio = ref_logprobs - logprobs
    return -log_ratio if estimator == "k1" else log_ratio.exp() - 1 - log_ratio


def token_rewards(scores: list, kl: torch.Tensor, mask: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """Rewards (B, R): -kl_coef * kl on each real token, plus the score on the last one, or dense scores from the first.

    The sum of a row is its score minus kl_coef times its summed kl.
    """
    rewards = -kl_coef * kl * mask
    last = mask.long().sum(1) - 1
    for row, score in enumerate(scores):
        if isinstance(score, list):
            rewards[row, : len(score)] += rewards.new_tensor(score)
        else:
            rewards[row, last[row]] += score
    return rewards


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, Eqs. 11 and 16): advantages and returns (B, R).

    values[:, t] is the value of the state before token t. An episode ends with its last real token: no value follows
    it. Both results are 0 where no token is.
    """
    advantages, following, next_value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        advantages[:, t] = following
        next_value = values[:, t] * mask[:, t]
    return advantages, (advantages + values) * mask


def whiten(x: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Scale x (B, R) to variance 1, and shift it to mean 0 unless told not to, over real tokens (biased variance, as in
    the code of arXiv 1909.08593, which without the shift scales the deviations alone and adds the mean back)."""
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean) ** 2 * mask).sum() / count
    return (x - (mean if shift_mean else 0)) * torch.rsqrt(variance + 1e-8) * mask


def policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped surrogate (arXiv 1707.06347, Eq. 7), negated, summed over the tokens of the mask; and sums for the log.

    All tensors have one shape, (N,) or (B, R). Divide by the number of tokens of the whole minibatch.
    """
    log_ratio = (logprobs - old_logprobs) * mask
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = (torch.maximum(plain, clipped) * mask).sum()
    with torch.no_grad():
        sums = {"policy/clipfrac": ((clipped > plain) * mask).sum(),
                "policy/approx_kl": ((ratio - 1 - log_ratio) * mask).sum()}
    return loss, sums


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Half the squared error to the return, the worse of the value and the value clipped to old_values +- clip_range
    (PPO's published code; arXiv 2005.12729, section 3), summed over the tokens of the mask; and sums for the log.

    Shapes as in `policy_loss`.
    """
    clipped_values = old_values + (values - old_values).clamp(-clip_range, clip_range)
    plain, clipped = (values - returns) ** 2, (clipped_values - returns) ** 2
    loss = 0.5 * (torch.maximum(plain, clipped) * mask).sum()
    return loss, {"value/clipfrac": ((clipped > plain) * mask).sum().detach()}


def adapt_kl_coef(kl_coef: float, kl: float, target: float | None, episodes: int, horizon: int) -> float:
    """The adaptive KL controller (arXiv 1909.08593, section 2.2): the coefficient changes by the relative error of the
    KL, at most 20 %, times episodes / horizon."""
    if target is None:
        return kl_coef
    return kl_coef * (1 + max(-0.2, min(0.2, kl / target - 1)) * episodes / horizon)


def update_moments(moments: tuple[float, float, float], values: torch.Tensor) -> tuple[float, float, float]:
    """(count, mean, sum of squared deviations) after more values (Chan, Golub and LeVeque 1979, Eq. 2.1)."""
    count, mean, squares = moments
    n, delta = len(values), values.mean().item() - mean
    total = count + n
    squares += ((values - values.mean()) ** 2).sum().item() + delta**2 * count * n / total
    return total, mean + delta * n / total, squares


def learning_rate_at(step: int, total: int, peak: float, warmup: int, schedule: str) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total`: a linear rise, then constant, a cosine or a line."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * {"constant": 1.0, "linear": 1 - progress, "cosine": cosine}[schedule]


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - Var(return - value) / Var(return) over real tokens: 1 is a perfect value, 0 no better than a constant."""
    values, returns = values[mask], returns[mask]
    return 1 - ((returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)).item()


# --- rollout ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score_tokens(
    model: LanguageModel,
    reference: Callable,
    prompts: list[list[int]],
    responses: list[list[int]],
    rules: LogitRules,
    micro_batch_size: int,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Run policy, value and reference over all responses, on all ranks, which share the work: logprobs, ref_logprobs,
    values, entropy and mask, each (B, R).

    Column t belongs to response token t; its value is that of the state before it. 0 and False where no token is.
    """
    rows, _ = rank_rows(len(prompts))
    order = sorted(range(len(rows)), key=lambda i: len(prompts[rows[i]]) + len(responses[rows[i]]))
    found = [None] * len(rows)
    for start in range(0, len(rows), micro_batch_size):
        micro = order[start : start + micro_batch_size]
        chosen = [responses[rows[i]] for i in micro]
        batch = collate([prompts[rows[i]] for i in micro], chosen, model.start_id, device)
        out = model(**batch, rules=rules)
        flat = torch.stack([out["logprobs"], reference(batch), out["value"][:, 0], out["entropy"]], 1).cpu()  # (N, 4)
        for i, piece in zip(micro, flat.split([len(response) for response in chosen])):
            found[i] = piece
    whole = pad_sequence(gather_rows(found, len(prompts)), batch_first=True)  # (B, R, 4)
    mask = torch.arange(whole.shape[1]) < torch.tensor([len(response) for response in responses])[:, None]
    return dict(zip(("logprobs", "ref_logprobs", "values", "entropy"), whole.unbind(-1))) | {"mask": mask}


def check_start(sampled: torch.Tensor, data: dict[str, torch.Tensor], step: int, dtype: torch.dtype) -> None:
    """Stop before the first update if this model cannot be trained rightly: the sampler's log-probs must be those of
    the training forward, and at step 0 the reference's must be the policy's, but for rounding."""
    gaps = {"the sampler's log-probs differ from the training forward's": sampled - data["logprobs"]}
    if step == 0:
        gaps["the reference differs from the untrained policy"] = data["ref_logprobs"] - data["logprobs"]
    for what, gap in gaps.items():
        mean = gap[data["mask"]].abs().mean().item()
        if not mean < (1e-3 if dtype == torch.float32 else 3e-2):
            raise UserError(f"{what} by {mean:.4f} nats a token: either this architecture cannot be "
                            "handled here, or a change of the code breaks it")


# --- training ---------------------------------------------------------------------------------------------------------


def build(
    args: Args, lm: PreTrainedModel, path: str, dtype: torch.dtype, device: torch.device, rules: LogitRules
) -> tuple[LanguageModel, Callable, object]:
    """The sharded policy with its value head, the reference's log-probs as a function of a batch (to be called right
    after the policy's forward on it, whose lower blocks it may reuse), and peft's wrapper if there is one."""
    options = dict(shard_size=args.shard_size, offload=args.offload)
    lora = twin = None
    branch = top_copy(lm, args.num_value_layers, whole=False, detach=False) if args.num_value_layers else None
    if args.lora_rank:
        lora = add_lora(lm, args.lora_rank, args.lora_alpha)
    elif args.num_layers_unfrozen != -1:
        twin = top_copy(lm, args.num_layers_unfrozen, whole=True, detach=True)
        freeze_below(lm, twin)
    for module in filter(None, (lm, branch) if args.gradient_checkpointing else ()):
        checkpoint_blocks(module)
    model = LanguageModel(lm, branch=branch)
    model.heads["value"] = make_head(model.width, 1)
    prepare(model, dtype, device, **options)
    # a copy of the whole model is read when the policy has been sharded, not beside it
    reference = model if lora else prepare(frozen(twin or load_lm(path), dtype), dtype, device, **options)

    def reference_logprobs(batch):
        with lora.disable_adapter() if lora else contextlib.nullcontext():
            return reference(**batch, rules=rules, with_entropy=False)["logprobs"]

    return model, reference_logprobs, lora


def add_gradient(
    model: LanguageModel,
    minibatch: list[int],
    prompts: list[list[int]],
    responses: list[list[int]],
    data: dict[str, torch.Tensor],
    rules: LogitRules,
    args: Args,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Add the gradient of the loss of these rows of a rollout, a mean over their tokens on all ranks. Returns for this
    rank's share of them the loss and numbers for the log, summed over tokens, and the largest ratio or 1 / ratio.

    data: of `score_tokens`, with advantages and returns: each (B, R), for the whole rollout."""
    device, world = model.device, dist.get_world_size()
    # on the device until the end, so that a micro-batch need not wait for the one before it
    total, largest, sums = torch.zeros((), device=device), torch.ones((), device=device), {}
    minibatch = sorted(minibatch, key=lambda row: len(prompts[row]) + len(responses[row]))  # like lengths together
    tokens = data["mask"][minibatch].sum().item()  # the one denominator, known before the first backward
    mine, real = rank_rows(len(minibatch))
    for start in range(0, len(mine), args.micro_batch_size):
        micro = slice(start, start + args.micro_batch_size)
        rows = [minibatch[place] for place in mine[micro]]
        inside = data["mask"][rows]  # (b, R); what follows is flat over its N tokens
        weight = torch.tensor(real[micro])[:, None].expand_as(inside)[inside].to(device)
        old = {name: data[name][rows][inside].to(device) for name in data}
        batch = collate([prompts[row] for row in rows], [responses[row] for row in rows], model.start_id, device)
        out = model(**batch, rules=rules, with_entropy=False)
        logprobs, values = out["logprobs"], out["value"][:, 0]
        surrogate, parts = policy_loss(logprobs, old["logprobs"], old["advantages"], weight, args.clip_range)
        error, more = value_loss(values, old["values"], old["returns"], weight, args.clip_range_value)
        loss = surrogate + args.vf_coef * error
        (loss * world / tokens).backward()  # FSDP takes the mean of the ranks' gradients; times their number, a sum
        parts |= {"loss/policy": surrogate.detach(), "loss/value": error.detach(), **more}
        sums = {name: sums.get(name, 0.0) + value.double() for name, value in parts.items()}
        total += loss.detach()
        largest = largest.maximum(((logprobs.detach() - old["logprobs"]).abs() * weight).max().exp())
    return total, sums, largest


def update(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    prompts: list[list[int]],
    responses: list[list[int]],
    data: dict[str, torch.Tensor],
    rules: LogitRules,
    state: dict,
    total_updates: int,
    args: Args,
    rescue: Callable[..., str],
) -> dict[str, float]:
    """The optimizer steps of one rollout: epochs x minibatches x micro-batches. Returns means over tokens and ranks.
    data: see `add_gradient`. rescue(name, batch) saves what a step that is not finite was made of."""
    world, sums, ratios, tokens_seen = dist.get_world_size(), {}, [], 0
    shuffles = [generator(args.seed, 3, state["step"], epoch) for epoch in range(args.ppo_epochs)]
    orders = [torch.randperm(len(prompts), generator=shuffle) for shuffle in shuffles]
    for minibatch in (minibatch.tolist() for order in orders for minibatch in order.split(args.batch_size)):
        loss, parts, ratio = add_gradient(model, minibatch, prompts, responses, data, rules, args)
        rate = learning_rate_at(state["updates"], total_updates, args.learning_rate, args.warmup_steps, args.schedule)
        norm = optimizer_step(optimizer, rate, args.max_grad_norm, loss.item(), state["step"], functools.partial(
            rescue, batch={"rows": minibatch, "prompts": prompts, "responses": responses, **data}))
        state["updates"] += 1
        tokens = data["mask"][minibatch].sum().item()
        tokens_seen += tokens
        ratios.append(ratio)
        parts["optim/grad_norm"] = torch.tensor(norm * tokens / world)  # all ranks know it: their sum counts it once
        sums = {name: sums.get(name, 0.0) + value.double() for name, value in parts.items()}
    sums = {name: value.item() for name, value in sums.items()}
    every = gather_rows([(sums, max(map(float, ratios)), float(ratios[0]) - 1)], world)
    return {**{name: sum(rank_sums[name] for rank_sums, _, _ in every) / tokens_seen for name in sums},
            "policy/ratio_max": max(largest for _, largest, _ in every),
            "policy/first_ratio_error": max(error for _, _, error in every), "optim/learning_rate": rate}


def train(
    args: Args | None = None,
    reward_fn: Callable | None = None,
    prompts: list | None = None,
    eval_prompts: list | None = None,
    metric_fn: Callable | None = None,
    stop_sequences: list[str] | None = None,
    logit_mask: torch.Tensor | None = None,
):
    """Train by PPO; return the model and its tokenizer, plain transformers objects (the model on rank 0, else None).

    reward_fn(samples, prompts, outputs, tokenizer, **metadata) -> for each sample a number, or a list of numbers, one
    for each output token; it replaces --reward. metric_fn, called alike at evaluation -> {name: list or number}. Each
    gets those arguments that it accepts, output_ids (the sampled ids) among them. prompts, eval_prompts: texts, or rows
    with a prompt and metadata. logit_mask: (V, V) bool, [i, j] forbids token j after token i. args: see `arguments`;
    random walks by default. Raises UserError for what the user can mend.
    """
    started, args = time.time(), args or arguments()
    if args.replay:
        args = Args(**{**read_state(args.replay, "--replay")["args"], "replay": args.replay})
    check(args, reward_fn)
    device = init(args.seed)
    name = os.path.basename((args.model or "randomwalks").rstrip("/"))
    folder, checkpoint = open_run(args, f"ppo-{name}-{args.seed}", RESUMABLE)

    # --- task
    on_walks = args.model is None or (args.reward == "randomwalks" and reward_fn is None)
    walks = random_walks(args.seed) if on_walks else None
    path = args.model or f"{folder}/start"
    if args.model is None:
        write_cloned_walker(path, walks, args.seed)
    tokenizer = load_tokenizer(args.tokenizer or path)
    date = pin_date(tokenizer, checkpoint)  # chat templates may write today's date
    reward_fn = reward_fn or load_reward(args, device)
    metric_fn = metric_fn or (walks.metric if walks else None)
    rows = load_prompts(prompts, args.prompts, "--prompts", walks.starts if walks else [""], args.prompt_words)
    eval_rows = load_prompts(eval_prompts, args.eval_prompts, "--eval-prompts", rows, args.prompt_words)
    eval_rows = evenly(eval_rows, args.num_eval_prompts)
    stop = args.stop if stop_sequences is None else stop_sequences

    # --- models
    automatic = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, automatic if args.dtype == "auto" else args.dtype)
    torch.manual_seed(args.seed)  # the value head is the same on every rank, whatever was drawn before
    lm = load_lm(path)
    ends = end_tokens(tokenizer, lm)
    rules = LogitRules(args.temperature, ends, args.min_new_tokens,
                       check_logit_mask(logit_mask, device, ends if args.min_new_tokens else ()))
    model, reference, lora = build(args, lm, path, dtype, device, rules)
    try_out(model)  # an architecture that cannot be handled ends here, in one line
    if len(tokenizer) > model.lm.get_input_embeddings().weight.shape[0]:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens and {path} embeds fewer: give its own --tokenizer")
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = adamw(model, args.learning_rate, betas, args.adam_epsilon, args.weight_decay)
    room = prompt_room(args.max_length, args.max_new_tokens, model.lm.config.get_text_config())
    ids, cut = encode_prompts(rows, tokenizer, room, args.truncation_side, model.seq2seq)
    eval_ids, eval_cut = encode_prompts(eval_rows, tokenizer, room, args.truncation_side, model.seq2seq)
    if any(cut + eval_cut):
        say(f"{sum(cut)} of {len(cut)} prompts and {sum(eval_cut)} of {len(eval_cut)} evaluation prompts have more "
            f"than {room} tokens and were cut on the {args.truncation_side}")

    # --- loop
    planned = args.total_episodes // args.rollout_batch_size
    steps = min(planned, args.max_steps or planned)
    total_updates = planned * args.ppo_epochs * math.ceil(args.rollout_batch_size / args.batch_size)
    # the loop's state: with weights and optimizer, all that a checkpoint holds
    state = {"step": 0, "episodes": 0, "tokens": 0, "updates": 0, "kl_coef": args.kl_coef, "moments": (0, 0.0, 0.0),
             "best": -math.inf, "date": date, "data": check_data([(array("i", row),) for row in ids + eval_ids], None)}
    if checkpoint:
        state |= load_checkpoint(checkpoint, model, optimizer, state["data"])

    def save(name: str, batch: dict | None = None) -> str:
        return save_checkpoint(f"{folder}/{name}", model, optimizer, {**state, "args": dataclasses.asdict(args)},
                               args.keep_checkpoints, args.keep_going, batch)

    if args.replay:  # run a saved batch again, row by row, and end
        data = read_batch(args.replay)
        minibatch, batch_prompts, responses = (data.pop(name) for name in ("rows", "prompts", "responses"))

        def mean_loss(chosen):
            loss, _, _ = add_gradient(model, chosen, batch_prompts, responses, data, rules, args)
            return sum(gather_rows([loss.item()], dist.get_world_size())) / data["mask"][chosen].sum().item()

        texts = {row: tokenizer.decode(batch_prompts[row] + responses[row]) for row in minibatch}
        return replay(args.replay, optimizer, texts, mean_loss)
    log = RunLog(folder, args, state["step"], steps, args.track, started, args.keep_going)

    def eval_scores(items, rows):
        scores = compute_scores(reward_fn, items, rows, tokenizer, args)
        return {"reward": [sum(score) if isinstance(score, list) else score for score in scores]}

    evaluate = functools.partial(
        evaluate_samples, model, tokenizer, eval_ids, eval_rows, rules, metric_fn, eval_scores,
        repeats=args.eval_samples, max_new_tokens=args.max_new_tokens, seed=args.seed, columns=("reward",),
        options={"temperature": args.eval_temperature, "top_k": args.eval_top_k, "top_p": args.eval_top_p},
        batch_size=args.generation_batch_size, stop_sequences=stop, keep_sharded=args.keep_sharded,
        reward_timeout=args.reward_timeout)
    if not checkpoint:
        state["before"], samples = evaluate()
        log.metrics(0, {"episodes": 0, "tokens": 0, **state["before"]}, tuple(state["before"]))
        log.samples(0, samples)
        say(table("before training", samples[:: max(1, len(samples) // 5)][:5]))
    first_step = state["step"]
    for step in range(first_step, steps):
        end_if_told(state["step"], save)
        begun = time.time()

        # rollout: sample outputs, score them, run policy, value and reference once over them
        chosen = [shuffled(state["episodes"] + i, len(ids), args.seed) for i in range(args.rollout_batch_size)]
        batch_prompts, batch_rows = [ids[row] for row in chosen], [rows[row] for row in chosen]
        uniforms = noise(generator(args.seed, 1, step), len(chosen), args.max_new_tokens)
        items = sample_texts(model, tokenizer, batch_prompts, uniforms, rules, batch_size=args.generation_batch_size,
                             stop_sequences=stop, keep_sharded=args.keep_sharded)
        responses = [item["tokens"] for item in items]
        raw = compute_scores(reward_fn, items, batch_rows, tokenizer, args)
        data = score_tokens(model, reference, batch_prompts, responses, rules, args.micro_batch_size, device)
        mask = data["mask"]
        sampled = pad_sequence([torch.tensor(item["logprobs"]) for item in items], batch_first=True)
        if step == first_step:
            check_start(sampled, data, step, dtype)
        rollout_seconds = time.time() - begun
        kl = kl_penalty(data["logprobs"], data["ref_logprobs"], "k1")
        mean_kl = (kl * mask).sum().item() / len(items)
        if args.max_kl is not None and mean_kl > args.max_kl:
            path = save(f"checkpoints/step-{step}")
            raise UserError(f"step {step}: the KL to the reference is {mean_kl:.2f} nats an output, more than --max-kl "
                            f"{args.max_kl:g}; the policy is in {path}. Raise --kl-coef or lower --learning-rate")
        end_if_told(step, save)  # a rollout is easily made again

        # advantages: every rank has the whole rollout and computes the same numbers
        finished = [item["finished"] for item in items]
        scores, state["moments"] = shape_scores(raw, finished, state["moments"], args)
        rewards = token_rewards(scores, kl, mask, state["kl_coef"])
        metrics = {"rollout/reward": rewards.sum().item() / len(items)}
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, data["returns"] = gae(rewards, data["values"], mask, args.gamma, args.lam)
        data["advantages"] = whiten(advantages, mask)

        # update
        metrics |= update(model, optimizer, batch_prompts, responses, data, rules, state, total_updates, args, save)
        rounding = 1e-2 if dtype == torch.float32 else 0.5  # before the first step the ratio is 1 but for this
        if step == first_step and not metrics["policy/first_ratio_error"] < rounding:
            raise UserError(f"the first ratio is off by {metrics['policy/first_ratio_error']:.3f}: the update's "
                            "forward disagrees with the rollout's. Either this architecture cannot be handled here, "
                            "or a change of the code breaks it")
        state["step"], state["episodes"] = step + 1, state["episodes"] + len(items)
        state["tokens"] += int(mask.sum())

        # evaluate, log, save
        totals = torch.tensor([sum(score) if isinstance(score, list) else score for score in raw])
        seconds = time.time() - begun
        metrics |= {
            "episodes": state["episodes"], "tokens": state["tokens"],
            "rollout/score": totals.mean().item(), "rollout/score_std": totals.std(correction=0).item(),
            "rollout/kl": mean_kl, "rollout/kl_coef": state["kl_coef"],
            "rollout/kl_k3": kl_penalty(data["logprobs"], data["ref_logprobs"], "k3")[mask].sum().item() / len(items),
            "rollout/entropy": data["entropy"][mask].mean().item(), "rollout/length": mask.sum().item() / len(items),
            "rollout/finished": sum(finished) / len(items), "rollout/cut_prompts": sum(cut[row] for row in chosen),
            "rollout/sampler_gap": (sampled - data["logprobs"])[mask].abs().max().item(),
            "value/mean": data["values"][mask].mean().item(),
            "value/explained_variance": explained_variance(data["values"], data["returns"], mask),
            "perf/rollout_seconds": rollout_seconds, "perf/update_seconds": seconds - rollout_seconds,
            "perf/episodes_per_second": len(items) / seconds, "perf/tokens_per_second": mask.sum().item() / seconds}
        state["kl_coef"] = adapt_kl_coef(state["kl_coef"], mean_kl, args.kl_target, len(items), args.kl_horizon)
        if state["step"] % args.eval_every == 0 or state["step"] == steps:
            state["after"], samples = evaluate()
            metrics |= state["after"]
            log.samples(state["step"], samples)
            reward = next(value for name, value in state["after"].items() if name.split("@")[0] == "eval/reward")
            if reward > state["best"]:
                state["best"] = reward
                export(model, tokenizer, f"{folder}/checkpoints/best", lora, keep_going=args.keep_going)
        log.metrics(state["step"], metrics, ("rollout/score", "rollout/kl", "rollout/length", *state.get("after", ())))
        if args.save_every and (state["step"] % args.save_every == 0 or state["step"] == steps):
            save(f"checkpoints/step-{state['step']}")

    export(model, tokenizer, f"{folder}/model", lora)
    log.close()
    if state["step"] > first_step:
        say(table("after training", samples[:: max(1, len(samples) // 5)][:5]))
    after = state.get("after", state["before"])
    before = {name: f"{value:.3f} -> " for name, value in state["before"].items()}
    changes = [f"{name.removeprefix('eval/')} {before.get(name, '')}{value:.3f}" for name, value in after.items()]
    say("; ".join(changes))
    say(f"model in {folder}/model")
    return (load_lm(f"{folder}/model") if dist.get_rank() == 0 else None), tokenizer


if __name__ == "__main__":
    run(train, Args, preset)

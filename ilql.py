"""Implicit language Q-learning (ILQL, arXiv 2206.11871): offline reinforcement learning on outputs with rewards.

Fit the language model to the data (behaviour cloning), and with it, on the same hidden states, heads for the values of
a token-level Markov decision process: Q of each next token, and V as an upper expectile of Q over the data's own tokens
(implicit Q-learning, IQL, 2110.06169). Then sample from the model with beta * (Q - V) added to its log-probs.

Differences from the papers, and from trlX where it differs from them:
1. One network: the heads share the trunk with the language model, as in trlX. 2206.11871 has separate networks for the
   policy and for the values, and Polyak-averages a whole target network where here the Q heads alone have targets.
2. Targets follow every `--sync-every` optimizer steps. trlX looks whether to once a pass over the data only.
3. The language-model loss can be weighted by exp(beta (Q - V)), at most 100 (IQL's policy extraction, AWAC); by default
   the weight is 1. Heads start at 0.
4. Rewards may come for a row, for each output, or for each token. A row that ends with a user's message, or loses its
   end while its rewards are of outputs or tokens, goes on: its last action is bootstrapped by the value of the state
   after it. trlX has one reward a row, and ends every row.
5. The next state of an output's last token is the state after the user's message that follows, as in trlX; with an
   encoder-decoder or with `--history` that state is in another sequence, and its value is computed there.
6. A step's loss is a sum over its actions divided by their number, whatever the micro-batches, ranks and padding.
   2206.11871's code never averages gradients over processes, trlX takes means of micro-batches.
7. Sampling uses all tokens unless --eval-top-k says less. No dropout. EOS is an action, the last.
8. Random walks, the default task, has trlX's 200 steps of 100 walks and its hyperparameters but for these: a learning
   rate of 1e-3 that rises over 10 steps and falls to 0 as a cosine (2e-4, constant), targets synced each step (every 5)
   and tau 0.9 (0.8), since 200 steps are too few for trlX's to reach every start (benchmarks/NOTES.md).

One step is one optimizer step on `--batch-size` sequences, over all processes: the same flags give the same
optimisation on any number of them.

    python ilql.py                                                        random walks on a CPU, one to two minutes
    python ilql.py --model gpt2 --dataset rewarded.jsonl                  one GPU
    torchrun --nproc_per_node 8 ilql.py --model gpt2 --dataset rewarded.jsonl  eight GPUs
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 ilql.py --model gpt2 \\
        --dataset rewarded.jsonl                                          two machines: the same command on each

Sample from what it wrote:

    import ilql
    model, tokenizer = ilql.load("runs/ilql-randomwalks-1/model")
    print(ilql.sample(model, tokenizer, ["b", "c"], beta=100, max_new_tokens=9))
"""

import contextlib
import dataclasses
import functools
import math
import os
import re
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from common.checkpoint import load_checkpoint, read_batch, read_state, save_checkpoint
from common.cli import UserError, check_bounds, check_shared_flags, end_if_told, run
from common.data import (
    chat_ends,
    check_data,
    cut_prompt,
    encode_prompts,
    evenly,
    listed,
    load_prompts,
    pin_date,
    prompt_room,
    prompt_rows,
    short,
    shuffled,
    special_tokens,
    start_token,
    window,
)
from common.distributed import adamw, gather_rows, generator, init, optimizer_step, rank_rows, sharded_parameters
from common.functions import load_function, plain
from common.generation import evaluate_samples, load_metric, noise, sample_texts, try_out
from common.metrics import RunLog, open_run, replay, say, table
from common.models import (
    LanguageModel,
    LogitRules,
    TokenHead,
    add_lora,
    check_logit_mask,
    checkpoint_blocks,
    collate,
    end_tokens,
    export,
    load_heads,
    load_lm,
    load_tokenizer,
    make_head,
    prepare,
    train_top,
)
from common.randomwalks import random_walks, untrained_walker
from common.randomwalks import tokenizer as walks_tokenizer
from common.samples import Example, Row, encode, fit, load_samples, prompt_of

# --- arguments --------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    """ILQL for language models. The head of this file explains the algorithm, docs/ilql.md the metrics."""

    # model
    model: str | None = None
    """path or hub id of a causal or encoder-decoder LM; random walks makes its own when none is given"""
    tokenizer: str | None = None
    """path or hub id of the tokenizer, if it is not beside the model"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """what the model computes in; weights and optimizer are float32. auto: bfloat16 on a GPU, float32 on a CPU"""
    num_layers_unfrozen: int = -1
    """train the top n blocks only; a reference, if there is one, shares the frozen rest. -1: all"""
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

    # data
    dataset: str | None = None
    """randomwalks, or .jsonl[.gz], .json, .csv, .parquet or Hub data set name:split, with columns text, prompt and
    completion, messages, or turns ([prompt, output, prompt, output, ...])"""
    format: str | None = None
    """file.py:function or package.module:function from a row to a row with these columns, or to None to leave it out"""
    normalize_rewards: Literal["none", "mean-std", "std"] = "mean-std"
    """divide the column reward (a number, a list with one for each output, or a list for each output with one for each
    token) by the standard deviation of the rows' totals, and take the totals' mean from each row's last number"""
    max_length: int | None = None
    """most tokens of prompt and output together, longer prompts being cut; none: the model's positions, at most 1024"""
    truncation_side: Literal["left", "right"] = "left"
    """the end of a long prompt that is cut off"""
    row_loses: Literal["end", "beginning"] = "end"
    """what is cut off a row that is too long when its prompt has given way; where each output is an example of its own
    it is always the end"""
    history: int | None = None
    """make each output of turns an example that has only so many texts before it; none: all, in one sequence"""

    # evaluation
    beta: list[float] = dataclasses.field(default_factory=lambda: [0.0, 1.0])
    """weight of Q - V in sampling, 0 for behaviour cloning; several values repeat the evaluation"""
    eval_prompts: str | None = None
    """prompts for evaluation, a file or Hub data set with column prompt or text; none: some of the run's own"""
    num_eval_prompts: int = 256
    """how many evaluation prompts to use at most"""
    prompt_words: int | None = None
    """use the first n words of each prompt"""
    metric: str | None = None
    """measure samples by file.py:function, package.module:function, or a classification model's path or hub id"""
    reward_timeout: float | None = None
    """end the run when a reward or metric function takes more seconds than this; none: wait as long as it takes"""
    max_new_tokens: int = 40
    """most tokens in an output"""
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
    gamma: float = 0.99
    """discount"""
    tau: float = 0.7
    """the expectile of Q that V is; 0.5: the mean, towards 1: the best of the data"""
    two_qs: bool = True
    """two Q heads; targets and sampling take the smaller value"""
    cql_scale: float = 0.1
    """weight of the CQL loss, which lowers Q of tokens that the data does not have"""
    awac_scale: float = 1.0
    """weight of the language-model loss"""
    awac_beta: float = 0.0
    """weights the language-model loss of a token by exp(beta (Q - V)); 0: behaviour cloning"""
    target_rate: float = 0.005
    """how far the target heads move to the Q heads at a sync (Polyak averaging); 1: all the way"""
    sync_every: int = 1
    """optimizer steps between syncs of the target heads"""

    # optimisation
    epochs: int = 1
    """passes over the data"""
    batch_size: int = 32
    """sequences per optimizer step, over all processes"""
    micro_batch_size: int = 8
    """sequences per forward on one process; affects memory and speed only"""
    learning_rate: float = 3e-5
    """peak learning rate"""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """the learning rate after warm-up: constant, or down to 0 as a cosine or a line"""
    warmup_steps: int = 0
    """optimizer steps over which the learning rate rises from 0"""
    adam_beta1: float = 0.9
    """Adam's decay of the mean gradient"""
    adam_beta2: float = 0.95
    """Adam's decay of the mean squared gradient"""
    adam_epsilon: float = 1e-8
    """Adam's epsilon"""
    weight_decay: float = 0.0
    """decoupled weight decay of matrices"""
    max_grad_norm: float = 1.0
    """clip the gradient to this norm"""

    # run
    max_steps: int | None = None
    """stop after this many steps even if more was asked for"""
    eval_every: int = 100
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


RANDOM_WALKS = dict(  # defaults that the task brings along; flags and --config win
    max_length=32, max_new_tokens=9, eval_samples=50, eval_every=100, epochs=20, batch_size=100, micro_batch_size=100,
    learning_rate=1e-3, warmup_steps=10, tau=0.9, target_rate=0.1, beta=[0.0, 1.0, 100.0], eval_top_k=[10])
RESUMABLE = (  # settings that may differ between a run and its resumption
    "max_steps", "eval_every", "save_every", "keep_checkpoints", "keep_going", "output_dir", "resume", "replay",
    "track", "config", "micro_batch_size", "generation_batch_size", "shard_size", "keep_sharded",
    "offload", "gradient_checkpointing", "reward_timeout")
AWAC_MOST = 100.0  # the largest weight of a token's language-model loss, as in IQL's code


def preset(args: Args) -> dict:
    """The defaults of the task that the flags choose."""
    return RANDOM_WALKS if args.dataset == "randomwalks" or args.dataset is None and args.model is None else {}


def arguments(**flags) -> Args:
    """Args with the defaults of the task that the flags choose, as the command line makes them."""
    return Args(**{**preset(Args(**flags)), **flags})


def check(args: Args, samples: list | None = None) -> None:
    """Refuse settings that cannot work, in one line that names the flag."""
    check_bounds(
        args,
        positive=("epochs", "batch_size", "micro_batch_size", "max_steps", "learning_rate", "adam_epsilon", "history",
                  "max_grad_norm", "max_new_tokens", "generation_batch_size", "eval_every", "eval_samples",
                  "prompt_words", "keep_checkpoints", "shard_size", "sync_every", "target_rate", "reward_timeout"),
        not_negative=("seed", "warmup_steps", "save_every", "weight_decay", "lora_rank", "num_eval_prompts",
                      "cql_scale", "awac_scale", "awac_beta"),
        unit=("adam_beta1", "adam_beta2", "gamma", "tau", "target_rate"))
    check_shared_flags(args)
    if not args.beta or not all(abs(beta) <= 1e6 for beta in args.beta):
        raise UserError(f"--beta {' '.join(map(str, args.beta))}: needs values, each within a million of 0")
    if args.tau in (0, 1):
        raise UserError(f"--tau {args.tau}: must lie between 0 and 1, or V learns from one side only")
    given = samples is not None or args.dataset not in (None, "randomwalks")
    if args.model and samples is None and args.dataset is None:
        raise UserError(f"--model {args.model} needs a --dataset: a file, a Hub data set, or randomwalks")
    if given and not args.model:
        raise UserError(f"--dataset {args.dataset or ''} needs a --model; sft.py makes one from scratch")
    if args.tokenizer and not args.model:
        raise UserError("--tokenizer needs a --model: random walks has its own")
    if not args.model and (args.lora_rank or args.num_layers_unfrozen != -1):
        raise UserError("--lora-rank and --num-layers-unfrozen need a --model: they would leave random weights as they "
                        "are")


# --- data -------------------------------------------------------------------------------------------------------------


class Trajectory(NamedTuple):
    """A sequence of the token-level MDP (2206.11871, section 4). A state is all that has been said; an action is the
    next token of an output, taken in the state before it. What the user says is between two states."""

    prompt: Sequence[int]  # ids of all before the first action; never empty
    output: Sequence[int]  # ids of all from the first action to the last
    actions: Sequence[int]  # (A,) the places of the actions in the output; never empty
    rewards: Sequence[float]  # (A,) after each action
    next_prompt: Sequence[int]  # the state after the last action is the one after these ids,
    next_output: Sequence[int]  # prompt and output; both are empty where the last action is terminal


def read_reward(value, where: str, depth: int = 2):
    """A row's reward as a float, a list of floats, or a list of lists of them. Raises UserError for what is none."""
    value = plain(value)
    if isinstance(value, str):  # as CSV files have it
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, (list, tuple)) and value and depth:
        return [read_reward(part, where, depth - 1) for part in value]
    if not isinstance(value, (int, float)) or not abs(value) < 1e300:
        raise UserError(f"{where}: a reward is a finite number, a list with one for each output, or a list for each "
                        f"output with one for each of its tokens, not {short(value)}")
    return float(value)


def total(reward) -> float:
    """The sum of all numbers of a reward."""
    return sum(map(total, reward)) if isinstance(reward, list) else reward


def normalized(reward, mean: float, std: float):
    """The reward over std, with mean / std taken from the last of its numbers, so that its total is (total - mean) /
    std. Taken once, at the end, the mean shifts the value of every state alike; taken more often it would pay for
    length. So it is 0 for a row that goes on."""
    if isinstance(reward, list):
        return [*(normalized(part, 0.0, std) for part in reward[:-1]), normalized(reward[-1], mean, std)]
    return (reward - mean) / std


def place_rewards(examples: list[Example], reward, outputs: int, skipped: int, where: str) -> list[list[float]]:
    """Rewards for each token of each example of a row, before anything is cut; a reward for the whole row is not here.

    The reward of an output sits on its last token, that of an empty output on the token before; where there is none, as
    before an empty first output, nothing was done, and it is left out. A list of token rewards begins with an output's
    first token; the first `skipped` tokens of the row's first output are no actions. Raises UserError where the numbers
    do not fit.
    """
    placed = [[0.0] * len(example.output) for example in examples]
    if not isinstance(reward, list):
        return placed
    if outputs == 1 and len(reward) > 1 and not any(isinstance(part, list) for part in reward):
        reward = [reward]
    if len(reward) != outputs:
        raise UserError(f"{where}: has {len(reward)} rewards for {outputs} outputs")
    places, last = {}, []
    for example, tokens in zip(examples, placed):
        for i, number in enumerate(example.trained):
            places.setdefault(number, []).append((tokens, i))
    for output, value in enumerate(reward, 1):
        own = places.get(output, [])
        last = own[-1:] or last
        if isinstance(value, list):
            before = skipped if output == 1 else 0
            if len(value) - before > len(own):
                raise UserError(f"{where}: has {len(value)} token rewards for output {output}, which has "
                                f"{len(own) + before} tokens, the end token among them")
            value = value[before:]
        else:
            own, value = last, [value]
        for (tokens, i), number in zip(own, value):
            tokens[i] += number
    return placed


def cut_example(
    example: Example, rewards: list[float], longest: int, side: str, loses: str, head: int, tail: int
) -> tuple[Example, list[float]]:
    """The example and its token rewards in at most `longest` tokens; an action stays if there was one. loses "end": see
    `fit`. loses "beginning": the first `head` tokens stay, special ones, and behind them the end of the row, whose
    first token is no action, since what it answers is gone."""
    if loses == "end" or len(example.prompt) + len(example.output) <= longest:
        fitted = fit(example, longest, side, head, tail)
        return fitted, rewards[: len(fitted.output)]
    ids, none = [*example.prompt, *example.output], [0] * len(example.prompt)
    keep = [*range(head), *range(len(ids) - longest + head, len(ids))]
    ids, trained, rewards = ([row[i] for i in keep] for row in (ids, none + [*example.trained], none + rewards))
    first = next((i for i, number in enumerate(trained) if number), len(ids))
    first = min(max(first, head + 1), len(ids) - bool(example.output))
    return Example(ids[:first], ids[first:], trained[first:]), rewards[first:]


def row_trajectories(
    row: Row, reward, whole: list[Example], tokenizer, special: tuple[int, int], longest: int, side: str, loses: str
) -> tuple[list[Trajectory], bool]:
    """The trajectories of a row, given its examples, in at most `longest` tokens; and whether anything was cut.
    special: how many special tokens stand at either end of a prompt.

    The value of the state that follows a trajectory is needed where its row goes on in another one, or ends with a
    user's message, or has lost its end and the rewards there; otherwise its last action is terminal.
    """
    outputs, skipped = sum(message["role"] == "assistant" for message in (row.messages or [])[row.first :]), 0
    if row.said:
        outputs = sum(row.said)
        opens = not special[0] and outputs and not any(row.turns[: row.said.index(True)])  # an output begins the row
        skipped = int(opens and (row.said == [True] or start_token(tokenizer) is None))  # its first token is the prompt
    parts, heads = [], []
    for example, numbers in zip(whole, place_rewards(whole, reward, outputs, skipped, row.where)):
        head, tail = chat_ends(example.prompt, tokenizer) if row.messages else special
        parts.append(cut_example(example, numbers, longest, side, loses, head, tail))
        heads.append(head)
    made = []
    for i, (example, numbers) in enumerate(parts):
        full, kept = whole[i], len(example.output)
        after = (parts[i + 1][0].prompt if i + 1 < len(parts) else [], [])
        if loses == "end" and isinstance(reward, list) and kept < len(full.output):
            after = (example.prompt, example.output)
            if not full.trained[kept]:  # what is lost begins with the user's words: the state is the one behind them
                answer = next(place for place in range(kept, len(full.output)) if full.trained[place])
                after = (cut_prompt([*full.prompt, *full.output[:answer]], longest, "left", heads[i]), [])
        if actions := [place for place, number in enumerate(example.trained) if number]:
            rewards = [numbers[place] for place in actions]
            made.append(Trajectory(example.prompt, example.output, actions, rewards, *after))
    if made and not isinstance(reward, list):
        made[-1].rewards[-1] += reward
    cut = any(len(part.prompt) + len(part.output) < len(full.prompt) + len(full.output)
              for (part, _), full in zip(parts, whole))
    return made, cut


def make_trajectories(
    rows: list[Row], tokenizer, ends: tuple[int, ...], seq2seq: bool, longest: int, args: Args
) -> tuple[list[Trajectory], int, int]:
    """The trajectories of all rows: one a row, or one an output (encoder-decoders, --history); how many rows had no
    action; how many were cut."""
    rewards = [read_reward(row.columns.get("reward"), row.where) for row in rows]
    totals = torch.tensor([total(reward) for reward in rewards], dtype=torch.float64)
    std = totals.std().item() if len(totals) > 1 else 0.0
    if args.normalize_rewards != "none" and std > 1e-8:  # equal rewards have no scale
        mean = totals.mean().item() if args.normalize_rewards == "mean-std" else 0.0
        rewards = [normalized(reward, 0.0 if row.goes_on else mean, std) for row, reward in zip(rows, rewards)]
    loses = "end" if seq2seq or args.history else args.row_loses
    head, tail = special_tokens(tokenizer, seq2seq)
    made, dropped, cut = [], 0, 0
    for start in range(0, len(rows), 1000):
        some = slice(start, start + 1000)
        encoded = encode(rows[some], tokenizer, ends, seq2seq, args.history, open_ended=True)
        for row, reward, whole in zip(rows[some], rewards[some], encoded):
            found, shorter = row_trajectories(row, reward, whole, tokenizer, (len(head), len(tail)), longest,
                                              args.truncation_side, loses)
            # arrays, of ints and (rewards) doubles, take a tenth of the memory of lists
            made += [Trajectory(*(array(kind, part) for kind, part in zip("iiidii", item))) for item in found]
            dropped, cut = dropped + (not found), cut + shorter
    return made, dropped, cut


def transitions(trajectories: list[Trajectory], device: torch.device) -> dict[str, torch.Tensor]:
    """The steps of the MDP as index tensors over the N actions of the trajectories, in order: rewards (N,), terminal
    (N,) and next_state (N,).

    State i < N is the one that action i is taken in; states from N on are those after the trajectories that go on, in
    order (see `Trajectory`). next_state is 0, and means nothing, where the action is terminal.
    """
    rewards = [reward for item in trajectories for reward in item.rewards]
    next_state, terminal, beyond = [], [], len(rewards)
    for item in trajectories:
        goes_on, first = bool(len(item.next_prompt)), len(next_state)
        next_state += [*range(first + 1, first + len(item.actions)), beyond if goes_on else 0]
        terminal += [False] * (len(item.actions) - 1) + [not goes_on]
        beyond += goes_on
    return {"rewards": torch.tensor(rewards, dtype=torch.float32, device=device),
            "next_state": torch.tensor(next_state, device=device), "terminal": torch.tensor(terminal, device=device)}


# --- algorithm --------------------------------------------------------------------------------------------------------
#
# All tensors are flat over the N actions of a micro-batch. Losses are sums over actions, each times its weight: divide
# by the number of actions of the whole batch.


def td_targets(
    rewards: torch.Tensor, next_values: torch.Tensor, terminal: torch.Tensor, gamma: float
) -> torch.Tensor:
    """r + gamma V(s'), what Q(s, a) regresses to (IQL, Eq. 6); nothing follows a terminal action. All (N,)."""
    return rewards + gamma * next_values.detach() * ~terminal


def q_loss(qs: list[torch.Tensor], targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Squared error of Q(s, a) to the targets (IQL, Eq. 6), summed over the heads, each (N,)."""
    return sum((weight * (q - targets.detach()) ** 2).sum() for q in qs)


def expectile_loss(values: torch.Tensor, target_q: torch.Tensor, weight: torch.Tensor, tau: float) -> torch.Tensor:
    """|tau - 1[u < 0]| u^2 for u = Q(s, a) - V(s) (IQL, Eq. 5): V becomes the tau-expectile of the target heads'
    Q over the data's actions. At tau 0.5 it is half the squared error. All (N,)."""
    u = target_q.detach() - values
    return (weight * torch.where(u < 0, 1 - tau, tau) * u**2).sum()


def cql_loss(qs: list[torch.Tensor], logsumexps: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """log sum exp Q(s, .) - Q(s, a) (CQL, arXiv 2006.04779, Eq. 4): lowers Q of tokens that the data does not have.
    Summed over the heads, each (N,)."""
    return sum((weight * (logsumexp - q)).sum() for q, logsumexp in zip(qs, logsumexps))


def awac_loss(logprobs: torch.Tensor, advantages: torch.Tensor, weight: torch.Tensor, beta: float) -> torch.Tensor:
    """-exp(beta (Q - V)) log pi(a | s) (IQL, Eq. 7), the exponential at most 100: behaviour cloning at beta 0. All
    (N,)."""
    return -(weight * (beta * advantages.detach()).exp().clamp(max=AWAC_MOST) * logprobs).sum()


def ilql_loss(
    out: dict[str, torch.Tensor], steps: dict[str, torch.Tensor], next_values: torch.Tensor, weight: torch.Tensor,
    args: Args,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a micro-batch (2206.11871, section 4), summed over its N actions, and sums for the log.

    out: of `LanguageModel.forward`: logprobs (N,), v (N, 1), for each Q head the action's Q and the log-sum-exp over
    all tokens (N, 2), for each target head the action's Q (N, 1). steps: see `transitions`. next_values: V of the
    states from N on. weight (N,).
    """
    qs, logsumexps = zip(*(out[name].unbind(1) for name in q_names(out)))
    target_q = torch.stack([out[f"target_{name}"][:, 0] for name in q_names(out)]).amin(0)
    values = out["v"][:, 0]
    following = torch.cat([values.detach(), next_values])[steps["next_state"]]
    targets = td_targets(steps["rewards"], following, steps["terminal"], args.gamma)
    advantages = (target_q - values).detach()
    parts = {"loss/q": q_loss(qs, targets, weight),
             "loss/v": expectile_loss(values, target_q, weight, args.tau),
             "loss/cql": cql_loss(qs, logsumexps, weight),
             "loss/awac": awac_loss(out["logprobs"], advantages, weight, args.awac_beta)}
    loss = parts["loss/q"] + parts["loss/v"] + args.cql_scale * parts["loss/cql"] + args.awac_scale * parts["loss/awac"]
    means = {"loss/total": loss, **parts, "loss/lm": -(weight * out["logprobs"]).sum(),
             "value/q": (weight * qs[0]).sum(), "value/target_q": (weight * target_q).sum(),
             "value/v": (weight * values).sum(), "value/td_target": (weight * targets).sum(),
             "value/advantage": (weight * advantages).sum()}
    return loss, {name: value.detach() for name, value in means.items()}


def q_names(heads) -> list[str]:
    """The names of the Q heads: q1, or q1 and q2."""
    return [name for name in ("q1", "q2") if name in heads]


@torch.no_grad()
def sync_targets(model: LanguageModel, rate: float) -> None:
    """Polyak averaging (IQL, Algorithm 1): each weight of a target head moves by `rate` of its way to the Q head's."""
    parameters = sharded_parameters(model)
    for name, online in parameters.items():
        if name.startswith("heads.q"):
            parameters[name.replace("heads.q", "heads.target_q")].mul_(1 - rate).add_(online, alpha=rate)


def learning_rate_at(step: int, total: int, peak: float, warmup: int, schedule: str) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total`: a linear rise, then constant, a cosine or a line."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * {"constant": 1.0, "linear": 1 - progress, "cosine": cosine}[schedule]


# --- forward ----------------------------------------------------------------------------------------------------------


def batch_loss_and_gradient(model: LanguageModel, batch: list[Trajectory], args: Args) -> dict[str, float]:
    """Add the gradient of the mean of `ilql_loss` over the actions of all trajectories. Returns that mean and those of
    its sums for the log, the same on all ranks."""
    world, count, sums = dist.get_world_size(), sum(len(item.actions) for item in batch), {}
    batch = sorted(batch, key=lambda item: len(item.prompt) + len(item.output))  # like lengths share a micro-batch
    goes_on = any(len(item.next_prompt) for item in batch)
    mine, real = rank_rows(len(batch))
    for start in range(0, len(mine), args.micro_batch_size):
        micro = slice(start, start + args.micro_batch_size)
        items = [batch[row] for row in mine[micro]]
        chosen = [set(item.actions) for item in items]
        marks = [[place in actions for place in range(len(item.output))] for actions, item in zip(chosen, items)]
        inputs = collate([[*item.prompt] for item in items], [[*item.output] for item in items], model.start_id,
                         model.device, marks)
        weight = torch.tensor([counts for item, counts in zip(items, real[micro]) for _ in item.actions],
                              device=model.device)
        next_values = torch.zeros(0, device=model.device)
        if goes_on:  # somewhere in the batch, so that all ranks make the same calls
            next_values = values_after(model, [item for item in items if item.next_prompt])
        loss, parts = ilql_loss(model(**inputs, with_entropy=False), transitions(items, model.device), next_values,
                                weight, args)
        # FSDP takes the mean of the ranks' gradients; times their number, it is the sum
        (loss * world / count).backward()
        sums = {name: sums.get(name, 0.0) + value.double() for name, value in parts.items()}
    every = gather_rows([{name: value.item() for name, value in sums.items()}], world)
    return {name: sum(rank_sums[name] for rank_sums in every) / count for name in sums}


@torch.no_grad()
def values_after(model: LanguageModel, items: list[Trajectory]) -> torch.Tensor:
    """V (M,) of the state after each of M trajectories that go on."""
    # a rank that has none reads a single token all the same: all ranks make the same calls
    prompts = [[*item.next_prompt] for item in items] or [[0]]
    outputs = [[*item.next_output] for item in items] or [[]]
    inputs = collate(prompts, outputs, model.start_id, model.device)
    del inputs["scored"]
    last = torch.zeros_like(inputs["mask"])
    last[torch.arange(len(last)), inputs["mask"].sum(1) - 1] = True  # (M, T), each row's last real token
    return model.read("v", **inputs, marked=last)[: len(items), 0]


# --- sampling and evaluation ------------------------------------------------------------------------------------------


def steer(model: LanguageModel, beta: float) -> Callable | None:
    """What `generate` does to the logits (B, V) of a step: log pi(a | s) + beta (Q(s, a) - V(s)), with the smaller of
    the target heads' Q (2206.11871, section 4). None for beta 0, behaviour cloning."""
    names = [f"target_{name}" for name in q_names(model.heads)]

    def adjust(logits, states, previous):
        states = states.float()
        q = torch.stack([model.heads[name](states) for name in names]).amin(0)  # (B, V)
        return logits.log_softmax(-1) + beta * (q - model.heads["v"](states))

    return adjust if beta else None


def load(folder: str) -> tuple[LanguageModel, object]:
    """The model that a run wrote, with its heads, and its tokenizer, for `sample`; without heads, for beta 0 alone."""
    device = init(None)
    model = LanguageModel(load_lm(folder), load_heads(folder)).to(device)
    model.device = device
    return model, load_tokenizer(folder)


def sample(
    model: LanguageModel,
    tokenizer,
    prompts: list,
    *,
    beta: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    max_new_tokens: int = 40,
    stop_sequences: list[str] = (),
    logit_mask: torch.Tensor | None = None,
    batch_size: int = 128,
    seed: int = 0,
) -> list[str]:
    """An output for each prompt, texts or lists of messages, by a model that `load` returned.

    temperature: 0 is greedy. top_k, top_p: 0 and 1 for all tokens. stop_sequences: outputs end where the first begins.
    logit_mask: (V, V) bool, [i, j] forbids token j after token i. The same seed gives the same outputs.
    """
    counts = min(batch_size, max_new_tokens)
    if not abs(beta) <= 1e6 or not temperature >= 0 or top_k < 0 or not 0 < top_p <= 1 or counts < 1:
        raise UserError("sample: beta lies within a million of 0, temperature and top_k are 0 or more, top_p more than "
                        "0 and at most 1, batch_size and max_new_tokens at least 1")
    if beta and not model.heads:
        raise UserError(f"beta {beta} needs the heads of a run of ilql.py beside the model: heads.safetensors")
    rows = prompt_rows(prompts, "prompts")
    room = prompt_room(None, max_new_tokens, model.lm.config.get_text_config())
    ids, _ = encode_prompts(rows, tokenizer, room, "left", model.seq2seq)
    rules = LogitRules(temperature, end_tokens(tokenizer, model.lm),
                       logit_mask=check_logit_mask(logit_mask, model.device))
    items = sample_texts(model, tokenizer, ids, noise(generator(seed), len(ids), max_new_tokens), rules, top_k=top_k,
                         top_p=top_p, batch_size=batch_size, stop_sequences=stop_sequences,
                         adjust_logits=steer(model, beta))
    return [item["output"] for item in items]


def named(metric: str) -> tuple[str, str]:
    """Name and option of a metric of the evaluation: eval/score@beta=4 is score with beta=4."""
    name = re.split(r"@(?=(?:beta|temperature|top_k|top_p)=)", metric, maxsplit=1)[0]
    return name.removeprefix("eval/"), metric[len(name) + 1 :]


def headline(metrics: dict[str, float]) -> dict[str, float]:
    """The metric that the best model is chosen by, for each beta: the one called reward, else the first of all but the
    length."""
    names = [name for name, _ in map(named, metrics) if name != "length"]
    chosen = "reward" if "reward" in names else (names or [None])[0]
    return {metric: value for metric, value in metrics.items() if named(metric)[0] == chosen}


def comparison(before: dict[str, float], after: dict[str, float]) -> list[dict]:
    """Rows for `table`: each metric before and after training, a row for each beta."""
    rows = {}
    for metric, value in after.items():
        name, option = named(metric)
        row = rows.setdefault(option, {"sampled with": option or "one beta"})
        row[name] = (f"{before[metric]:.3f} -> " if metric in before else "") + f"{value:.3f}"
    return list(rows.values())


# --- training ---------------------------------------------------------------------------------------------------------


def train(
    args: Args | None = None,
    samples: list | None = None,
    rewards: list | None = None,
    eval_prompts: list | None = None,
    metric_fn: Callable | None = None,
    stop_sequences: list[str] | None = None,
    logit_mask: torch.Tensor | None = None,
):
    """Train by ILQL; return the model and its tokenizer, plain transformers objects (the model on rank 0, else None).
    They do not know the heads: `load` and `sample` do.

    samples: texts, lists [prompt, output, prompt, output, ...], lists of messages, or rows with columns as in
    `--dataset`, which they replace. rewards: of each sample, unless the rows have a column of them. eval_prompts:
    texts, or rows with a prompt and metadata. metric_fn(samples, prompts, outputs, tokenizer, **metadata) -> {name:
    list or number} measures them; it gets those arguments that it accepts. logit_mask: (V, V) bool, [i, j] forbids
    token j after token i in evaluation. args: see `arguments`; random walks by default. Raises UserError for what the
    user can mend.
    """
    started, args = time.time(), args or (arguments() if samples is None else Args())
    if args.replay:
        args = Args(**{**read_state(args.replay, "--replay")["args"], "replay": args.replay})
    check(args, samples)
    device = init(args.seed)
    name = os.path.basename((args.model or "randomwalks").rstrip("/"))
    folder, checkpoint = open_run(args, f"ilql-{name}-{args.seed}", RESUMABLE)

    # --- data and model
    walks = random_walks(args.seed) if samples is None and args.dataset in (None, "randomwalks") else None
    if walks:
        samples, rewards = walks.walks, walks.reward(walks.walks)
    rows = load_samples(samples, args.dataset, "--dataset",
                        load_function(args.format, "--format") if args.format else None)
    if rewards is not None:
        rewards = plain(rewards)
        if not isinstance(rewards, (list, tuple)) or len(rewards) != len(rows):
            raise UserError(f"rewards: must be a list with one for each of the {len(rows)} samples")
        rows = [row._replace(columns={**row.columns, "reward": reward}) for row, reward in zip(rows, rewards)]
    for row in rows:
        if "reward" not in row.columns:
            raise UserError(f"{row.where}: has no reward, only {listed(row.columns)}; --format can map rows")
    tokenizer = load_tokenizer(args.tokenizer or args.model) if args.tokenizer or args.model else walks_tokenizer()
    date = pin_date(tokenizer, checkpoint)  # chat templates may write today's date
    lm = load_lm(args.model) if args.model else untrained_walker(args.seed)
    vocabulary = lm.get_output_embeddings().weight.shape[0]
    if len(tokenizer) > lm.get_input_embeddings().weight.shape[0]:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens and {args.model} embeds fewer: give its own "
                        "--tokenizer")
    ends = end_tokens(tokenizer, lm)
    if tokenizer.eos_token_id is None:
        say("the tokenizer has no EOS, so that outputs are not taught to end")
    rules = LogitRules(eos_ids=ends, logit_mask=check_logit_mask(logit_mask, device))
    config, seq2seq = lm.config.get_text_config(), lm.config.is_encoder_decoder
    longest = window(args.max_length, config)
    data, dropped, cut = make_trajectories(rows, tokenizer, ends, seq2seq, longest, args)
    if not data:
        raise UserError(f"--dataset {args.dataset or ''}: none of its {len(rows)} rows has an output to learn from")
    say(f"{len(rows)} rows, {len(data)} trajectories, {sum(len(item.actions) for item in data)} actions"
        + (f"; {dropped} rows have no output and were left out" if dropped else "")
        + (f"; {cut} have more than {longest} tokens and were cut" if cut else ""))

    # --- what is trained
    if args.num_layers_unfrozen != -1:
        train_top(lm, args.num_layers_unfrozen)
    lora = add_lora(lm, args.lora_rank, args.lora_alpha) if args.lora_rank else None
    if args.gradient_checkpointing:
        checkpoint_blocks(lm)
    torch.manual_seed(args.seed)  # the heads are the same on every rank, whatever was drawn before
    model = LanguageModel(lm)
    model.heads["v"] = make_head(model.width, 1)
    for q in ("q1", "q2") if args.two_qs else ("q1",):
        model.heads[q] = TokenHead(model.width, vocabulary)
        model.heads[f"target_{q}"] = TokenHead(model.width, vocabulary).requires_grad_(False)
        model.heads[f"target_{q}"].load_state_dict(model.heads[q].state_dict())
    automatic = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, automatic if args.dtype == "auto" else args.dtype)
    prepare(model, dtype, device, shard_size=args.shard_size, offload=args.offload)
    try_out(model)  # an architecture that cannot be handled ends here, in one line
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = adamw(model, args.learning_rate, betas, args.adam_epsilon, args.weight_decay)

    # --- evaluation
    metric_fn = metric_fn or load_metric(args.metric, device) or (walks.metric if walks else None)
    # prompts of the run's own: what its rows begin with
    own = [prompt_of(row, args.prompt_words or 4, args.history) for row in rows]
    empty = [[]] if start_token(tokenizer) is not None else [[], ""]  # give the model nothing to start from
    own = walks.starts if walks else [row for row in own if row["prompt"] not in empty]
    eval_rows, eval_ids = [], []
    if args.num_eval_prompts and (own or args.eval_prompts or eval_prompts is not None):
        eval_rows = load_prompts(eval_prompts, args.eval_prompts, "--eval-prompts", own, args.prompt_words)
        eval_rows = evenly(eval_rows, args.num_eval_prompts)
        free = prompt_room(args.max_length, args.max_new_tokens, config)
        eval_ids, _ = encode_prompts(eval_rows, tokenizer, free, args.truncation_side, seq2seq)

    def evaluate() -> tuple[dict[str, float], list[dict]]:
        if not eval_ids:
            return {}, []
        return evaluate_samples(
            model, tokenizer, eval_ids, eval_rows, rules, metric_fn, repeats=args.eval_samples,
            reward_timeout=args.reward_timeout,
            max_new_tokens=args.max_new_tokens, seed=args.seed, batch_size=args.generation_batch_size,
            options={"beta": args.beta, "temperature": args.eval_temperature, "top_k": args.eval_top_k,
                     "top_p": args.eval_top_p},
            choose=lambda beta, **options: {"adjust_logits": steer(model, beta), **options},
            stop_sequences=args.stop if stop_sequences is None else stop_sequences, keep_sharded=args.keep_sharded)

    # --- loop
    total_samples = args.epochs * len(data)
    planned = math.ceil(total_samples / args.batch_size)
    steps = min(planned, args.max_steps or planned)
    # the loop's state: with weights and optimizer, all that a checkpoint holds
    state = {"step": 0, "samples": 0, "actions": 0, "syncs": 0, "best": -math.inf, "date": date,
             "data": check_data(data, "--format")}
    if checkpoint:
        state |= load_checkpoint(checkpoint, model, optimizer, state["data"])

    def save(name: str, batch: dict | None = None) -> str:
        return save_checkpoint(f"{folder}/{name}", model, optimizer, {**state, "args": dataclasses.asdict(args)},
                               args.keep_checkpoints, args.keep_going, batch)

    if args.replay:  # run a saved batch again, row by row, and end
        saved = read_batch(args.replay)["trajectories"]
        batch = [Trajectory(*trajectory) for trajectory in saved]
        texts = dict(enumerate(tokenizer.decode([*row.prompt, *row.output]) for row in batch))
        return replay(args.replay, optimizer, texts, lambda rows: batch_loss_and_gradient(
            model, [batch[row] for row in rows], args)["loss/total"])
    log = RunLog(folder, args, state["step"], steps, args.track, started, args.keep_going)
    outputs = []
    if not checkpoint:
        state["before"], outputs = evaluate()
        counts = {"data/rows": len(rows), "data/trajectories": len(data), "data/dropped": dropped, "data/cut": cut}
        log.metrics(0, {"samples": 0, "actions": 0, "epoch": 0.0, **counts, **state["before"]},
                    tuple(headline(state["before"])))
        log.samples(0, outputs)
        if outputs:
            say(table("before training", evenly(outputs, 6)))
    for step in range(state["step"], steps):
        end_if_told(state["step"], save)
        begun = time.time()

        # batch: the next rows, in an order that is shuffled anew each epoch
        places = range(state["samples"], min(state["samples"] + args.batch_size, total_samples))
        batch = [data[shuffled(place, len(data), args.seed)] for place in places]

        # update: the model, then the target heads
        metrics = batch_loss_and_gradient(model, batch, args)
        rate = learning_rate_at(step, planned, args.learning_rate, args.warmup_steps, args.schedule)
        norm = optimizer_step(optimizer, rate, args.max_grad_norm, metrics["loss/total"], step, functools.partial(
            save, batch={"trajectories": [[list(part) for part in item] for item in batch]}))
        if (step + 1) % args.sync_every == 0:
            sync_targets(model, args.target_rate)
            state["syncs"] += 1
        state["step"], state["samples"] = step + 1, state["samples"] + len(batch)
        state["actions"] += sum(len(item.actions) for item in batch)
        seconds = time.time() - begun
        read = sum(len(item.prompt) + len(item.output) for item in batch)
        metrics |= {"samples": state["samples"], "actions": state["actions"], "epoch": state["samples"] / len(data),
                    "optim/grad_norm": norm, "optim/learning_rate": rate, "optim/target_syncs": state["syncs"],
                    "perf/seconds": seconds, "perf/samples_per_second": len(batch) / seconds,
                    "perf/tokens_per_second": read / seconds}

        # evaluate, log, save
        if state["step"] % args.eval_every == 0 or state["step"] == steps:
            state["after"], outputs = evaluate()
            metrics |= state["after"]
            log.samples(state["step"], outputs)
            best = max((x for x in headline(state["after"]).values() if not math.isnan(x)), default=-math.inf)
            if best > state["best"]:
                state["best"] = best
                export(model, tokenizer, f"{folder}/checkpoints/best", lora, True, args.keep_going)
        log.metrics(state["step"], metrics, ("loss/total", "value/q", "value/v", *headline(state.get("after", {}))))
        if args.save_every and (state["step"] % args.save_every == 0 or state["step"] == steps):
            save(f"checkpoints/step-{state['step']}")

    export(model, tokenizer, f"{folder}/model", lora, with_heads=True)
    log.close()
    if "after" in state and outputs:
        say(table("after training", evenly(outputs, 6)))
    after = state.get("after", state["before"])
    if after:
        lines = comparison(state["before"], after)
        if walks:
            found = walks.metric(walks.walks).items()
            lines.append({"sampled with": "(the walks)",
                          **{name: f"{sum(values) / len(values):.3f}" for name, values in found}})
        say(table("before -> after training", lines))
    say(f"model in {folder}/model")
    return (load_lm(f"{folder}/model") if dist.get_rank() == 0 else None), tokenizer


if __name__ == "__main__":
    run(train, Args, preset)

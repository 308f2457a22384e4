"""Direct preference optimisation (DPO, arXiv 2305.18290): learn from pairs of outputs, of which one was preferred.

The policy is its own reward model: r(x, y) = beta log(pi(y | x) / pi_ref(y | x)) is the reward that pi would be optimal
for under a KL penalty beta to the reference pi_ref, the model that training starts from. Minimise
-log sigmoid(r(chosen) - r(rejected)), the likelihood of the choices under the Bradley-Terry model.

Differences from the papers, and from other code where it differs from them:
1. `--loss` has cDPO by --label-smoothing, robust DPO, IPO, hinge (SLiC) and the reference-free SimPO; --sft-coef adds
   the chosen outputs' likelihood. An output's log-prob is the sum over its tokens, EOS among them, but the mean for ipo
   and simpo: 2310.12036 is written with sums, its authors' published runs took means. --logprobs says otherwise; beta
   means another thing then.
2. A step's loss is a sum over its pairs divided by their number, whatever the micro-batches, ranks and padding.
3. Both outputs of a pair go through one forward, behind one prompt: in lines that hold several pairs, each seeing its
   own prompt and itself alone, where a check at the start finds that exact for the architecture; an encoder reads the
   prompt once. The numbers are those of padded rows.
4. The reference is a frozen copy, the model with its adapters off (--lora-rank), its own top blocks as they were
   (--num-layers-unfrozen), or numbers computed once before training (--precompute-reference). Before the first step
   policy and reference must agree, so that the first loss is log 2.
5. The prompt is cut first, to half of the window at most, then the ends of the outputs: none is ever cut away whole.
   Pairs of equal outputs are left out and counted.
6. No dropout. AdamW; the paper has RMSprop. EOS is an action, the last.
7. Random walks, the default task: of two walks from one start the one nearer to a shortest path is chosen; training
   starts from a small GPT-2 fitted to the walks. With --sft-coef 1, or the policy leaves the graph: pairs say what not
   to do, and nothing of what neither output does (benchmarks/NOTES.md).

One step is one optimizer step on `--batch-size` pairs, over all processes: the same flags give the same optimisation on
any number of them.

    python dpo.py                                                        random walks on a CPU, one to two minutes
    python dpo.py --model gpt2 --dataset pairs.jsonl                     one GPU
    torchrun --nproc_per_node 8 dpo.py --model gpt2 --dataset pairs.jsonl  eight GPUs
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 dpo.py --model gpt2 \\
        --dataset pairs.jsonl                                            two machines: the same command on each
"""

import contextlib
import dataclasses
import functools
import math
import os
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from common.checkpoint import load_checkpoint, read_batch, read_state, save_checkpoint
from common.cli import UserError, check_bounds, check_shared_flags, end_if_told, run
from common.data import (
    chat_ends,
    check_data,
    cut_prompt,
    encode_prompts,
    evenly,
    is_chat,
    listed,
    load_prompts,
    pack,
    pin_date,
    prompt_room,
    short,
    shuffled,
    special_tokens,
    start_token,
    window,
)
from common.distributed import adamw, broadcast, gather_rows, generator, init, optimizer_step, rank_rows
from common.functions import load_function
from common.generation import evaluate_samples, load_metric, try_out
from common.metrics import RunLog, open_run, replay, say, table
from common.models import (
    LanguageModel,
    LogitRules,
    add_lora,
    checkpoint_blocks,
    collate,
    collate_branches,
    end_tokens,
    export,
    freeze_below,
    frozen,
    load_lm,
    load_tokenizer,
    prepare,
    shares_exactly,
    top_copy,
    train_top,
)
from common.randomwalks import RandomWalks, random_walks, write_cloned_walker
from common.samples import Example, Row, encode, formatted_rows, prompt_of, sample_row

# --- arguments --------------------------------------------------------------------------------------------------------

BETAS = {"ipo": 1.0, "simpo": 2.0}  # of the losses on mean log-probs; 0.1 for the others


@dataclass
class Args:
    """DPO for language models. The head of this file explains the algorithm, docs/dpo.md the metrics."""

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
    precompute_reference: bool = False
    """compute the reference's log-probs of all pairs before training and keep them in the run directory, so that one
    model is in memory; samples then have no KL"""
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
    """randomwalks, or .jsonl[.gz], .json, .csv, .parquet or Hub data set name:split, with columns chosen and rejected,
    and prompt unless it is what both begin with: texts, or lists of messages"""
    format: str | None = None
    """file.py:function or package.module:function from a row to a row with these columns, or to None to leave it out"""
    eval_dataset: str | None = None
    """rows for the held-out loss, in the same forms; none: a share of the data set, by --held-out"""
    held_out: float = 0.05
    """share of the data set that is kept out of training for evaluation, when there is no --eval-dataset"""
    num_eval_rows: int = 1000
    """how many held-out rows to use at most"""
    max_length: int | None = None
    """most tokens of prompt and output together, longer prompts being cut; none: the model's positions, at most 1024"""
    truncation_side: Literal["left", "right"] = "left"
    """the end of a long prompt that is cut off"""
    train_eos: bool = True
    """let EOS be the last token of each output; off for outputs that were cut off"""
    pack: bool = True
    """let pairs share lines, and the outputs of a pair their prompt, where a check at the start finds that exact, which
    changes speed only (--micro-batch-size then counts lines)"""

    # evaluation
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
    loss: Literal["sigmoid", "robust", "ipo", "hinge", "simpo"] = "sigmoid"
    """sigmoid: DPO, or cDPO with --label-smoothing; simpo has no reference"""
    beta: float | None = None
    """weight of the KL penalty in the implicit reward: with less the policy goes farther; none: 0.1, or 1 for ipo and 2
    for simpo, whose log-probs are means"""
    label_smoothing: float = 0.0
    """share of the choices taken to be wrong, below 0.5, for sigmoid (cDPO) and robust"""
    simpo_gamma: float = 1.0
    """margin of simpo by which the chosen reward should be the larger one"""
    logprobs: Literal["auto", "sum", "mean"] = "auto"
    """an output's log-prob is the sum of its tokens' or their mean; auto: the mean for ipo and simpo, else the sum"""
    sft_coef: float = 0.0
    """weight of the negative log-likelihood of the chosen output, a mean over its tokens (2404.19733, Eq. 1)"""

    # optimisation
    epochs: int = 1
    """passes over the data"""
    batch_size: int = 32
    """pairs per optimizer step, over all processes"""
    micro_batch_size: int = 8
    """pairs per forward on one process; affects memory and speed only"""
    learning_rate: float = 5e-6
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

    def __post_init__(self):
        self.beta = BETAS.get(self.loss, 0.1) if self.beta is None else self.beta


RANDOM_WALKS = dict(  # defaults that the task brings along; flags and --config win
    max_length=32, max_new_tokens=9, eval_samples=50, eval_every=50, epochs=3, batch_size=64, micro_batch_size=64,
    learning_rate=3e-4, warmup_steps=10, beta=1.0, sft_coef=1.0, held_out=0.15)
RESUMABLE = (  # settings that may differ between a run and its resumption
    "max_steps", "eval_every", "save_every", "keep_checkpoints", "keep_going", "output_dir", "resume", "replay",
    "track", "config", "micro_batch_size", "generation_batch_size", "shard_size", "keep_sharded",
    "offload", "gradient_checkpointing", "reward_timeout")


def preset(args: Args) -> dict:
    """The defaults of the task that the flags choose."""
    alone = args.dataset is None and args.model is None
    task = RANDOM_WALKS if alone or args.dataset == "randomwalks" else {}
    return task | ({"beta": BETAS[args.loss]} if args.loss in BETAS else {})


def arguments(**flags) -> Args:
    """Args with the defaults of the task that the flags choose, as the command line makes them."""
    return Args(**{**preset(Args(**flags)), **flags})


def check(args: Args, pairs: list | None = None) -> None:
    """Refuse settings that cannot work, in one line that names the flag."""
    check_bounds(
        args,
        positive=("epochs", "batch_size", "micro_batch_size", "max_steps", "learning_rate", "adam_epsilon", "beta",
                  "max_grad_norm", "max_new_tokens", "generation_batch_size", "eval_every", "eval_samples",
                  "prompt_words", "num_eval_rows", "keep_checkpoints", "shard_size", "reward_timeout"),
        not_negative=("seed", "warmup_steps", "save_every", "weight_decay", "lora_rank", "num_eval_prompts",
                      "label_smoothing", "simpo_gamma", "sft_coef"),
        unit=("adam_beta1", "adam_beta2", "held_out"))
    check_shared_flags(args)
    if args.label_smoothing >= 0.5:
        raise UserError(f"--label-smoothing {args.label_smoothing}: must be below 0.5, or the choices say nothing")
    if args.label_smoothing and args.loss not in ("sigmoid", "robust"):
        raise UserError(f"--label-smoothing is for --loss sigmoid and robust, not {args.loss}")
    if args.precompute_reference and args.loss == "simpo":
        raise UserError("--precompute-reference: --loss simpo has no reference; leave it out")
    if args.held_out == 1:
        raise UserError("--held-out 1.0: leaves nothing to train on")
    given = pairs is not None or args.dataset not in (None, "randomwalks")
    if args.model and pairs is None and args.dataset is None:
        raise UserError(f"--model {args.model} needs a --dataset: a file, a Hub data set, or randomwalks")
    if given and not args.model:
        raise UserError(f"--dataset {args.dataset or ''} needs a --model")
    if args.tokenizer and not args.model:
        raise UserError("--tokenizer needs a --model: random walks has its own")


# --- data -------------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A prompt with two outputs, as token ids. A causal model reads prompt + output; an encoder reads the prompt."""

    prompt: Sequence[int]  # never empty
    chosen: Sequence[int]
    rejected: Sequence[int]
    chosen_trained: Sequence[int]  # which tokens of the output count: 0 for those of a user's message within it
    rejected_trained: Sequence[int]
    reference: Sequence[float] = ()  # the reference's log-probs of chosen and rejected, summed, if computed beforehand


def walk_pairs(walks: RandomWalks, seed: int, held_out: float, partners: int = 4) -> tuple[list[dict], list[dict]]:
    """Each walk beside a few others from the same start that are better or worse by the task's metric, the better one
    chosen; a pair that comes twice stands once. Returns pairs to train on, and pairs of a share of the walks, which are
    in none of the others."""
    rng = np.random.default_rng(seed)
    texts = [str(walk) for walk in rng.permutation(sorted(set(walks.walks)))]
    count = round(held_out * len(texts))
    made = []
    for some in (texts[count:], texts[:count]):
        pairs, optimality = {}, walks.reward(some)
        for walk, score in zip(some, optimality):
            others = [(other, value) for other, value in zip(some, optimality)
                      if other[0] == walk[0] and value != score]
            for i in rng.permutation(len(others))[:partners]:
                other, value = others[i]
                pairs[(walk, other) if score > value else (other, walk)] = None
        made.append([{"prompt": a[0], "chosen": a[1:], "rejected": b[1:]} for a, b in pairs])
    return tuple(made)


def split(rows: list[tuple[Row, Row]], held_out: float, most: int, seed: int) -> tuple[list, list]:
    """Rows to train on and rows held out, about a share of them and about `most` at most: all pairs of a prompt are on
    one side, and one prompt at least is trained on."""
    prompts = {}
    for number, (row, _) in enumerate(rows):
        prompt = row.messages[: row.first] if row.messages else row.turns[0]
        prompts.setdefault(str(prompt), []).append(number)
    groups = list(prompts.values())
    order = torch.randperm(len(groups), generator=generator(seed, 4)).tolist()
    count, chosen = min(math.ceil(held_out * len(rows)), most), set()
    for group in order[:-1] if held_out else []:
        if len(chosen) >= count:
            break
        chosen.update(groups[group])
    return [row for i, row in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(chosen)]


def shared_beginning(chosen: str, rejected: str) -> str:
    """The prompt of two dialogues written out whole: what both begin with, up to the last "Assistant:" in it (as in
    Anthropic's HH), else up to the last space, so that both go on; nothing if they begin with different words."""
    both = os.path.commonprefix([chosen, rejected])
    mark = both.rfind("\n\nAssistant:")
    if mark >= 0:
        return both[: mark + len("\n\nAssistant:")]
    both = both[: min(len(chosen), len(rejected)) - 1]
    return both[: max(0, *map(both.rfind, " \n\t"))]


def spoken(messages: list[dict]) -> list[tuple]:
    """What counts when messages are compared, whatever other fields they have."""
    return [(message["role"], message["content"]) for message in messages]


def pair_rows(row, where: str) -> tuple[Row, Row]:
    """The two sides of a row, each as one of `sample_row`. Raises UserError naming the row for what is no pair."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be an object with columns, not {short(row)}")
    columns = {name: value for name, value in row.items() if value is not None}
    for name in ("chosen", "rejected"):
        if name not in columns:
            raise UserError(f"{where}: has no {name}, only {listed(columns)}; --format can map rows")
        if isinstance(columns[name], (str, list)) and not columns[name]:
            raise UserError(f"{where}: {name} is empty; --format can leave rows out")
        if not isinstance(columns[name], str) and not is_chat(columns[name]):
            raise UserError(f"{where}: {name} is a text or a list of messages, not {short(columns[name])}")
    prompt, sides = columns.get("prompt"), [columns["chosen"], columns["rejected"]]
    if isinstance(sides[0], str) != isinstance(sides[1], str):
        raise UserError(f"{where}: chosen and rejected must both be texts, or both lists of messages")
    if isinstance(sides[0], str):
        if prompt is None:
            prompt = shared_beginning(*sides)
            others = [text for text in map(str, columns.values()) if text not in sides and len(text.split()) > 1]
            if not prompt or (others and not prompt.endswith("\n\nAssistant:")):  # another column may be it
                raise UserError(f"{where}: has no prompt, only {listed(columns)}; --format can map rows")
            sides = [side[len(prompt) :] for side in sides]
    elif not is_chat(prompt) or all(spoken(side[: len(prompt)]) == spoken(prompt) for side in sides):  # whole dialogues
        shared = next((i for i, (one, other) in enumerate(zip(*map(spoken, sides))) if one != other),
                      min(map(len, sides)))
        while shared and sides[0][shared - 1]["role"] == "assistant":
            shared -= 1
        prompt, sides = sides[0][:shared], [side[shared:] for side in sides]
        if not prompt:
            lacks = "there is no prompt" if columns.get("prompt") is None else "the prompt is no list of messages"
            raise UserError(f"{where}: chosen and rejected begin with different messages, and {lacks}")
    made = []
    for name, side in zip(("chosen", "rejected"), sides):
        answers = [side] if isinstance(side, str) else [m["content"] for m in side if m["role"] == "assistant"]
        if not any(answer.strip() if isinstance(answer, str) else answer for answer in answers):
            raise UserError(f"{where}: {name} is empty; --format can leave rows out")
        if not isinstance(side, str) and side[0]["role"] != "assistant":
            raise UserError(f"{where}: {name} has a message of the {side[0]['role']} where an answer should be")
        made.append(sample_row({"prompt": prompt, "completion": side}, where)._replace(columns=columns))
    return tuple(made)


def load_pairs(given: list | None, path: str | None, flag: str, format_fn: Callable | None) -> list[tuple[Row, Row]]:
    """The pairs of a list, else of a file or Hub data set. Raises UserError naming the row for what is no pair."""
    return [pair_rows(row, where) for row, where in formatted_rows(given, path, flag, format_fn)]


def fit_pair(sides: list[Example], longest: int, side: str, head: int, tail: int) -> list[Example]:
    """Both examples in at most `longest` tokens, behind one prompt: it is cut on `side` as far as the longer output
    needs, to half of them at most, then the outputs' ends. Its first `head` and last `tail` tokens stay, special ones,
    and one more, even if they are more than half."""
    prompt, most = sides[0].prompt, max(len(example.output) for example in sides)
    kept = min(len(prompt), max(longest // 2, head + tail + 1))  # of the prompt, however long the outputs are
    room = max(kept, longest - most)
    prompt = cut_prompt(prompt, room, side, head, tail) if len(prompt) > room else prompt
    room = max(0, longest - len(prompt))
    return [Example(prompt, example.output[:room], example.trained[:room]) for example in sides]


def make_pairs(
    rows: list[tuple[Row, Row]], tokenizer, ends: tuple[int, ...], seq2seq: bool, longest: int, args: Args
) -> tuple[list[Pair], dict[str, int]]:
    """The pairs of the rows, in at most `longest` tokens each; and how many rows had equal outputs, had no room for an
    output ("dropped"), or were cut."""
    pairs, counts = [], {"equal": 0, "dropped": 0, "cut": 0}
    head, tail = map(len, special_tokens(tokenizer, seq2seq))
    for some in (rows[i : i + 500] for i in range(0, len(rows), 500)):
        encoded = encode([row for both in some for row in both], tokenizer, ends, seq2seq)
        for (row, _), chosen, rejected in zip(some, encoded[::2], encoded[1::2]):
            if len(chosen) != 1 or len(rejected) != 1 or list(chosen[0].prompt) != list(rejected[0].prompt):
                if not row.messages:
                    raise UserError(f"{row.where}: the prompt is empty, and the tokenizer has no BOS or EOS for it")
                raise UserError(f"{row.where}: the chat template does not write chosen and rejected as one answer each "
                                "to the same prompt; give pairs that differ in the last answer alone")
            whole = [chosen[0], rejected[0]]
            if not args.train_eos:
                whole = [Example(prompt, output[:-1], trained[:-1]) if output[-1] in ends else
                         Example(prompt, output, trained) for prompt, output, trained in whole]
            ends_of_prompt = chat_ends(whole[0].prompt, tokenizer) if row.messages else (head, tail)
            sides = fit_pair(whole, longest, args.truncation_side, *ends_of_prompt)
            if not all(any(example.trained) for example in sides):
                counts["dropped"] += 1
            elif list(sides[0].output) == list(sides[1].output):
                counts["equal"] += 1
            else:
                counts["cut"] += any(sum(map(len, a[:2])) < sum(map(len, b[:2])) for a, b in zip(sides, whole))
                # arrays take a tenth of the memory of lists
                ids = [array("i", part) for part in (sides[0].prompt, sides[0].output, sides[1].output)]
                pairs.append(Pair(*ids, *(bytes(map(bool, example.trained)) for example in sides)))
    return pairs, counts


def pair_batches(
    pairs: list[Pair], shared: bool, micro_batch_size: int, start_id: int | None, device: torch.device
) -> Iterator[tuple[list[int], torch.Tensor, dict[str, torch.Tensor], torch.Tensor]]:
    """This rank's share of the pairs, in micro-batches of M: numbers, which pairs they are; weight (M,), 0 for pairs
    that are there only because all ranks make the same calls, else 1; inputs of `LanguageModel.forward`; and owner
    (N,), the output that each of the N scored tokens is of: 2i for the chosen one of the i-th pair, 2i + 1 for the
    rejected one.

    shared: lines hold several pairs, as many as the longest one leaves room for, each with its prompt once.
    """
    lengths = [len(pair.prompt) + len(pair.chosen) + len(pair.rejected) + 1 for pair in pairs]
    if shared:
        lines = pack(lengths, max(lengths), dist.get_world_size())
    else:  # like lengths share a micro-batch
        lines = [[number] for number in sorted(range(len(pairs)), key=lengths.__getitem__)]
    mine, real = rank_rows(len(lines))
    for begin in range(0, len(mine), micro_batch_size):
        micro = slice(begin, begin + micro_batch_size)
        numbers = [number for line in mine[micro] for number in lines[line]]
        weight = [float(is_real) for line, is_real in zip(mine[micro], real[micro]) for _ in lines[line]]
        outputs = [(pairs[number].chosen, pairs[number].rejected) for number in numbers]
        trained = [(pairs[number].chosen_trained, pairs[number].rejected_trained) for number in numbers]
        if shared:
            groups = iter(zip((pairs[number].prompt for number in numbers), outputs, trained))
            batch = collate_branches([[next(groups) for _ in lines[line]] for line in mine[micro]], device)
        else:
            prompts = [list(pairs[number].prompt) for number in numbers for _ in range(2)]
            batch = collate(prompts, [list(output) for both in outputs for output in both], start_id, device,
                            [list(map(bool, flags)) for both in trained for flags in both])
            for name in ("encoder_ids", "encoder_mask") if start_id is not None else ():
                batch[name] = batch[name][::2]  # one row a pair: both outputs read it
        counts = torch.tensor([sum(map(bool, flags)) for both in trained for flags in both])
        owner = torch.arange(len(counts)).repeat_interleave(counts).to(device)
        yield numbers, torch.tensor(weight, device=device), batch, owner


# --- algorithm --------------------------------------------------------------------------------------------------------
#
# Log-probs of outputs, chosen and rejected, by the policy and by the reference, are vectors (M,), in nats; so are
# losses, one a pair. Divide their sum by the number of pairs of the whole batch.


def output_logprobs(logprobs: torch.Tensor, owner: torch.Tensor, count: int) -> torch.Tensor:
    """log pi(y | x) of `count` outputs, the sums of their tokens' log-probs: (N,), (N,) -> (count,)."""
    return torch.zeros(count, device=logprobs.device).index_add(0, owner, logprobs)


def implicit_reward(logprob: torch.Tensor, ref_logprob: torch.Tensor, beta: float) -> torch.Tensor:
    """r(x, y) = beta log(pi(y | x) / pi_ref(y | x)) (DPO, Eq. 5), without beta log Z(x), which no choice shows."""
    return beta * (logprob - ref_logprob)


def dpo_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor, beta: float,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """-log sigmoid(r(chosen) - r(rejected)) (DPO, Eq. 7). Its gradient is -beta sigmoid(r(rejected) - r(chosen)) times
    that of log pi(chosen) - log pi(rejected) (section 4): pairs that are ordered wrongly weigh more. With label
    smoothing, cDPO: the expectation when that share of the choices is the wrong way round (Mitchell 2023, Eq. 3)."""
    margin = implicit_reward(chosen, ref_chosen, beta) - implicit_reward(rejected, ref_rejected, beta)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def robust_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor, beta: float,
    label_smoothing: float,
) -> torch.Tensor:
    """Robust DPO (arXiv 2403.00409, section 3): unbiased for the loss on true choices, when a share `label_smoothing`
    of those seen is the wrong way round. It can be below 0."""
    margin = implicit_reward(chosen, ref_chosen, beta) - implicit_reward(rejected, ref_rejected, beta)
    right, wrong = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def ipo_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor, beta: float
) -> torch.Tensor:
    """IPO (arXiv 2310.12036, Eq. 17): (h - 1 / (2 beta))^2 for h = log(pi(chosen) pi_ref(rejected) / (pi(rejected)
    pi_ref(chosen))); its tau is beta here. The margin has an optimum, so that certain choices do not drive it on."""
    return ((chosen - ref_chosen) - (rejected - ref_rejected) - 1 / (2 * beta)) ** 2


def hinge_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor, beta: float
) -> torch.Tensor:
    """max(0, 1 - (r(chosen) - r(rejected))): SLiC's hinge (arXiv 2305.10425) on DPO's rewards (RSO, 2309.06657)."""
    margin = implicit_reward(chosen, ref_chosen, beta) - implicit_reward(rejected, ref_rejected, beta)
    return torch.relu(1 - margin)


def simpo_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """-log sigmoid(beta chosen - beta rejected - gamma) of mean log-probs (SimPO, arXiv 2405.14734, Eq. 6)."""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def preference_loss(policy: torch.Tensor, reference: torch.Tensor, args: Args) -> torch.Tensor:
    """The loss that `--loss` names, a pair (M,); log-probs of chosen and rejected outputs (M, 2)."""
    columns = (*policy.unbind(1), *reference.unbind(1))
    if args.loss == "simpo":
        return simpo_loss(*columns[:2], args.beta, args.simpo_gamma)
    if args.loss in ("ipo", "hinge"):
        return {"ipo": ipo_loss, "hinge": hinge_loss}[args.loss](*columns, args.beta)
    return {"sigmoid": dpo_loss, "robust": robust_loss}[args.loss](*columns, args.beta, args.label_smoothing)


def pair_loss(
    sums: torch.Tensor, ref_sums: torch.Tensor, lengths: torch.Tensor, weight: torch.Tensor, args: Args
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a micro-batch, summed over its M pairs, and sums for the log. sums, ref_sums, lengths (M, 2): of
    chosen and rejected, the log-probs of policy and reference, summed over tokens, and numbers of tokens; weight (M,).
    """
    means = args.logprobs == "mean" or (args.logprobs == "auto" and args.loss in ("ipo", "simpo"))
    policy, reference = (sums / lengths, ref_sums / lengths) if means else (sums, ref_sums)
    preference, sft = preference_loss(policy, reference, args), -sums[:, 0] / lengths[:, 0]
    rewards = implicit_reward(policy, reference, args.beta)
    margin = rewards[:, 0] - rewards[:, 1]
    parts = {"loss": preference + args.sft_coef * sft, "preference_loss": preference, "sft_loss": sft,
             "accuracy": (margin > 0) + 0.5 * (margin == 0), "margin": margin,
             "chosen_reward": rewards[:, 0], "rejected_reward": rewards[:, 1],
             "chosen_logprob": sums[:, 0], "rejected_logprob": sums[:, 1], "kl": (ref_sums - sums).mean(1),
             "gap": (ref_sums - sums).abs().mean(1)}
    if args.loss == "simpo":
        del parts["kl"], parts["gap"]
    return (parts["loss"] * weight).sum(), {name: (part.detach() * weight).sum() for name, part in parts.items()}


def learning_rate_at(step: int, total: int, peak: float, warmup: int, schedule: str) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total`: a linear rise, then constant, a cosine or a line."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * {"constant": 1.0, "linear": 1 - progress, "cosine": cosine}[schedule]


# --- forward and reference --------------------------------------------------------------------------------------------


def batch_metrics(
    model: LanguageModel, reference: Callable | None, pairs: list[Pair], shared: bool, args: Args
) -> dict[str, float]:
    """Means over all pairs, on all ranks, of what `pair_loss` gives; where gradients are on, adds the gradient of their
    mean loss. reference: token log-probs of a batch that the policy has just scored; None where the pairs have them, or
    nothing asks for them."""
    world, names, totals = dist.get_world_size(), [], 0.0
    for numbers, weight, batch, owner in pair_batches(pairs, shared, args.micro_batch_size, model.start_id,
                                                       model.device):
        count = 2 * len(numbers)
        sums = output_logprobs(model(**batch, with_entropy=False)["logprobs"], owner, count).view(-1, 2)
        lengths = owner.bincount(minlength=count).view(-1, 2)
        if reference:
            with torch.no_grad():
                ref_sums = output_logprobs(reference(batch), owner, count).view(-1, 2)
        elif pairs[0].reference:
            ref_sums = sums.new_tensor([list(pairs[number].reference) for number in numbers])
        else:
            ref_sums = torch.zeros_like(sums)
        loss, parts = pair_loss(sums, ref_sums, lengths, weight, args)
        if torch.is_grad_enabled():
            # FSDP takes the mean of the ranks' gradients; times their number, it is the sum
            (loss * world / len(pairs)).backward()
        names, totals = list(parts), totals + torch.stack(list(parts.values())).double()
    every = gather_rows([totals.tolist()], world)
    return {name: sum(values) / len(pairs) for name, values in zip(names, zip(*every))}


def load_models(
    lm: PreTrainedModel, path: str, dtype: torch.dtype, device: torch.device, longest: int, args: Args
) -> tuple[LanguageModel, Callable | None, object, bool]:
    """The sharded policy; the reference's token log-probs as a function of a batch (to be called right after the
    policy's forward on it, whose lower blocks it may reuse), if one is wanted in memory; peft's wrapper if there is
    one; whether pairs share lines."""
    options = dict(shard_size=args.shard_size, offload=args.offload)
    live = args.loss != "simpo" and not args.precompute_reference
    lora = twin = None
    if args.lora_rank:
        lora = add_lora(lm, args.lora_rank, args.lora_alpha)
    elif args.num_layers_unfrozen != -1 and live:
        twin = top_copy(lm, args.num_layers_unfrozen, whole=True, detach=True)
        freeze_below(lm, twin)
    elif args.num_layers_unfrozen != -1:
        train_top(lm, args.num_layers_unfrozen)
    model = LanguageModel(lm)
    shared = args.pack and shares_exactly(model, longest)
    if args.gradient_checkpointing:
        checkpoint_blocks(lm)
    prepare(model, dtype, device, **options)
    if live and not args.lora_rank:  # a copy of the whole model is read when the policy has been sharded, not beside it
        twin = twin or load_lm(path)
    reference = prepare(frozen(twin, dtype), dtype, device, **options) if twin else model

    def reference_logprobs(batch):
        with lora.disable_adapter() if lora else contextlib.nullcontext():
            return reference(**batch, with_entropy=False)["logprobs"]

    return model, reference_logprobs if live else None, lora, shared


@torch.no_grad()
def with_reference(
    model: LanguageModel, pairs: list[Pair], shared: bool, micro_batch_size: int
) -> list[Pair]:
    """The pairs with their outputs' log-probs by the model as it is."""
    found = []
    for numbers, _, batch, owner in pair_batches(pairs, shared, micro_batch_size, model.start_id, model.device):
        logprobs = model(**batch, with_entropy=False)["logprobs"]
        found += zip(numbers, output_logprobs(logprobs, owner, 2 * len(numbers)).view(-1, 2).tolist())
    # the ranks have different numbers of pairs, the first line's perhaps on several
    every = dict(sum(gather_rows([found], dist.get_world_size()), []))
    return [pair._replace(reference=array("f", every[number])) for number, pair in enumerate(pairs)]


def precomputed(
    model: LanguageModel, sets: list[list[Pair]], shared: bool, folder: str, data: list[int], args: Args
) -> list[list[Pair]]:
    """The sets of pairs with the reference's log-probs, from the run directory if it has those of this data
    (checksums), else computed and written there. To be called before the model has changed."""
    path, known = f"{folder}/reference.safetensors", None
    if dist.get_rank() == 0 and os.path.exists(path):
        found = load_file(path)
        known = [found["train"].tolist(), found["held_out"].tolist()] if found["data"].tolist() == data else None
    if known := broadcast(known):
        return [[pair._replace(reference=array("f", both)) for pair, both in zip(pairs, values)]
                for pairs, values in zip(sets, known)]
    say(f"computing the reference's log-probs of {sum(map(len, sets))} pairs ...")
    sets = [with_reference(model, pairs, shared, args.micro_batch_size) if pairs else [] for pairs in sets]
    if dist.get_rank() == 0:
        tables = [torch.tensor([list(pair.reference) for pair in pairs]).reshape(-1, 2) for pairs in sets]
        save_file({"train": tables[0], "held_out": tables[1], "data": torch.tensor(data)}, path + ".tmp")
        os.replace(path + ".tmp", path)
    dist.barrier()
    return sets


# --- evaluation -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_kl(
    model: LanguageModel, reference: Callable, items: list[dict], micro_batch_size: int
) -> dict[str, list[float]]:
    """`kl` of each sample, log pi(y | x) - log pi_ref(y | x): at temperature 1 their mean is an unbiased estimate of
    KL(pi || pi_ref), in nats an output. All ranks share the work."""
    rows, _ = rank_rows(len(items))
    found = []
    for start in range(0, len(rows), micro_batch_size):
        chosen = [items[row] for row in rows[start : start + micro_batch_size]]
        batch = collate([item["prompt_ids"] for item in chosen], [item["tokens"] for item in chosen], model.start_id,
                        model.device)
        owner = batch["scored"].nonzero()[:, 0]
        logprobs = model(**batch, with_entropy=False)["logprobs"]
        found += output_logprobs(logprobs - reference(batch), owner, len(chosen)).tolist()
    return {"kl": gather_rows(found, len(items))}


def check_reference(gap: float, dtype: torch.dtype) -> None:
    """Stop before the first update if policy and reference, which are the same model, differ by more than rounding."""
    if not gap < (1e-2 if dtype == torch.float32 else 1.0):
        raise UserError(f"before the first update policy and reference differ by {gap:.4f} nats an output: either "
                        "this architecture cannot be handled here, or a change of the code breaks it")


# --- training ---------------------------------------------------------------------------------------------------------


def train(
    args: Args | None = None,
    pairs: list | None = None,
    eval_prompts: list | None = None,
    metric_fn: Callable | None = None,
    held_out_pairs: list | None = None,
    stop_sequences: list[str] | None = None,
):
    """Train by DPO; return the model and its tokenizer, plain transformers objects (the model on rank 0, else None).

    pairs: rows with columns as in `--dataset`, which they replace; held_out_pairs: likewise, for the held-out loss.
    eval_prompts: texts, or rows with a prompt and metadata. metric_fn(samples, prompts, outputs, tokenizer,
    **metadata) -> {name: list or number} measures them; it gets those arguments that it accepts. args: see `arguments`;
    random walks by default. Raises UserError for what the user can mend.
    """
    started, args = time.time(), args or (arguments() if pairs is None else Args())
    if args.replay:
        args = Args(**{**read_state(args.replay, "--replay")["args"], "replay": args.replay})
    check(args, pairs)
    device = init(args.seed)
    name = os.path.basename((args.model or "randomwalks").rstrip("/"))
    folder, checkpoint = open_run(args, f"dpo-{name}-{args.seed}", RESUMABLE)

    # --- data and models
    walks = random_walks(args.seed) if pairs is None and args.dataset in (None, "randomwalks") else None
    path = args.model or f"{folder}/start"
    if args.model is None:
        write_cloned_walker(path, walks, args.seed)
    format_fn = load_function(args.format, "--format") if args.format else None
    if walks:
        pairs, held_out_pairs = walk_pairs(walks, args.seed, args.held_out)
        held_out_pairs = None if args.eval_dataset else held_out_pairs or None
    rows = load_pairs(pairs, args.dataset, "--dataset", format_fn)
    if args.eval_dataset or held_out_pairs is not None:
        held_out = load_pairs(held_out_pairs, args.eval_dataset, "--eval-dataset", format_fn)
    else:
        rows, held_out = split(rows, args.held_out, args.num_eval_rows, args.seed)
    held_out = evenly(held_out, args.num_eval_rows)
    tokenizer, lm = load_tokenizer(args.tokenizer or path), load_lm(path)
    date = pin_date(tokenizer, checkpoint)  # chat templates may write today's date
    if len(tokenizer) > lm.get_input_embeddings().weight.shape[0]:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens and {path} embeds fewer: give its own --tokenizer")
    if tokenizer.eos_token_id is None:
        say("the tokenizer has no EOS, so that outputs are not taught to end")
    config, seq2seq = lm.config.get_text_config(), lm.config.is_encoder_decoder
    rules, longest = LogitRules(eos_ids=end_tokens(tokenizer, lm)), window(args.max_length, config)
    data, counts = make_pairs(rows, tokenizer, rules.eos_ids, seq2seq, longest, args)
    evals, left = make_pairs(held_out, tokenizer, rules.eos_ids, seq2seq, longest, args)
    if not data:
        raise UserError(f"--dataset {args.dataset or ''}: none of its {len(rows)} rows has two different outputs")
    if not evals and (args.eval_dataset or held_out_pairs is not None):
        raise UserError(f"--eval-dataset {args.eval_dataset or ''}: none of its {len(held_out)} rows has two different "
                        "outputs")
    equal, dropped = (counts[name] + left[name] for name in ("equal", "dropped"))
    say(f"{len(data)} pairs to train on, {len(evals)} held out"
        + (f"; {equal} have equal outputs and were left out" if equal else "")
        + (f"; {dropped} have no room for an output and were left out" if dropped else "")
        + (f"; {counts['cut']} to train on have more than {longest} tokens and were cut" if counts["cut"] else ""))
    automatic = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, automatic if args.dtype == "auto" else args.dtype)
    model, reference, lora, shared = load_models(lm, path, dtype, device, longest, args)
    if args.pack and not shared:
        say(f"packing: a {type(lm).__name__} does not keep outputs that share a line apart; each is padded instead")
    try_out(model)  # an architecture that cannot be handled ends here, in one line
    checksums = [check_data([pair[:5] for pair in pairs], "--format") for pairs in (data, evals)]
    if args.precompute_reference:
        if not checkpoint and dist.get_rank() == 0:  # a run that was killed before its first step may have left some
            with contextlib.suppress(FileNotFoundError):
                os.remove(f"{folder}/reference.safetensors")
        data, evals = precomputed(model, [data, evals], shared, folder, checksums, args)
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = adamw(model, args.learning_rate, betas, args.adam_epsilon, args.weight_decay)

    # --- evaluation
    metric_fn = metric_fn or load_metric(args.metric, device) or (walks.metric if walks else None)
    # prompts of the run's own: those of its rows
    own = [prompt_of(row, 4) for row, _ in held_out or rows]
    empty = [[]] if start_token(tokenizer) is not None else [[], ""]  # give the model nothing to start from
    own = walks.starts if walks else [row for row in own if row["prompt"] not in empty]
    eval_rows, eval_ids = [], []
    if args.num_eval_prompts and (own or args.eval_prompts or eval_prompts is not None):
        eval_rows = load_prompts(eval_prompts, args.eval_prompts, "--eval-prompts", own, args.prompt_words)
        eval_rows = evenly(eval_rows, args.num_eval_prompts)
        free = prompt_room(args.max_length, args.max_new_tokens, config)
        eval_ids, _ = encode_prompts(eval_rows, tokenizer, free, args.truncation_side, seq2seq)
    kl = (lambda items, _: sample_kl(model, reference, items, args.micro_batch_size)) if reference else None

    def evaluate() -> tuple[dict[str, float], list[dict]]:
        metrics, outputs = {}, []
        if evals:
            with torch.no_grad():
                found = batch_metrics(model, reference, evals, shared, args)
            metrics = {f"eval/pair_{name}" if name == "kl" else f"eval/{name}": value for name, value in found.items()}
        if eval_ids:
            found, outputs = evaluate_samples(
                model, tokenizer, eval_ids, eval_rows, rules, metric_fn, kl, repeats=args.eval_samples,
                reward_timeout=args.reward_timeout,
                max_new_tokens=args.max_new_tokens, seed=args.seed, batch_size=args.generation_batch_size,
                options={"temperature": args.eval_temperature, "top_k": args.eval_top_k, "top_p": args.eval_top_p},
                stop_sequences=args.stop if stop_sequences is None else stop_sequences, keep_sharded=args.keep_sharded)
            # in this order, and a metric_fn's own `loss` does not replace the held-out one
            metrics = {**metrics, **found, **metrics}
        return metrics, outputs

    # --- loop
    total_samples = args.epochs * len(data)
    planned = math.ceil(total_samples / args.batch_size)
    steps = min(planned, args.max_steps or planned)
    # the loop's state: with weights and optimizer, all that a checkpoint holds
    state = {"step": 0, "samples": 0, "best": math.inf, "date": date, "data": checksums}
    if checkpoint:
        state |= load_checkpoint(checkpoint, model, optimizer, checksums)

    def save(name: str, batch: dict | None = None) -> str:
        return save_checkpoint(f"{folder}/{name}", model, optimizer, {**state, "args": dataclasses.asdict(args)},
                               args.keep_checkpoints, args.keep_going, batch)

    if args.replay:  # run a saved batch again, row by row, and end
        batch = [Pair(*pair) for pair in read_batch(args.replay)["pairs"]]
        texts = dict(enumerate(tokenizer.decode([*row.prompt, *row.chosen]) for row in batch))
        return replay(args.replay, optimizer, texts, lambda rows: batch_metrics(
            model, reference, [batch[row] for row in rows], shared, args)["loss"])
    log = RunLog(folder, args, state["step"], steps, args.track, started, args.keep_going)
    shown, outputs = ("accuracy", "optimality", "score", "kl"), []
    if not checkpoint:
        state["before"], outputs = evaluate()
        sizes = {"data/pairs": len(data), "data/held_out": len(evals), **{f"data/{n}": v for n, v in counts.items()}}
        log.metrics(0, {"samples": 0, "epoch": 0.0, **sizes, **state["before"]}, tuple(f"eval/{n}" for n in shown))
        log.samples(0, outputs)
        if outputs:
            say(table("before training", evenly(outputs, 5)))
    for step in range(state["step"], steps):
        end_if_told(state["step"], save)
        begun = time.time()

        # batch: the next rows, in an order that is shuffled anew each epoch
        places = range(state["samples"], min(state["samples"] + args.batch_size, total_samples))
        batch = [data[shuffled(place, len(data), args.seed)] for place in places]

        # update
        found = batch_metrics(model, reference, batch, shared, args)  # adds the gradient, too
        if step == 0 and args.loss != "simpo":
            check_reference(found["gap"], dtype)
        rate = learning_rate_at(step, planned, args.learning_rate, args.warmup_steps, args.schedule)
        norm = optimizer_step(optimizer, rate, args.max_grad_norm, found["loss"], step, functools.partial(
            save, batch={"pairs": [[list(part) for part in pair] for pair in batch]}))
        state["step"], state["samples"] = step + 1, state["samples"] + len(batch)
        seconds = time.time() - begun
        read = sum(len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in batch)
        metrics = {"samples": state["samples"], "epoch": state["samples"] / len(data),
                   **{f"train/{name}": value for name, value in found.items()},
                   "optim/grad_norm": norm, "optim/learning_rate": rate, "perf/seconds": seconds,
                   "perf/pairs_per_second": len(batch) / seconds, "perf/tokens_per_second": read / seconds}

        # evaluate, log, save
        if state["step"] % args.eval_every == 0 or state["step"] == steps:
            state["after"], outputs = evaluate()
            metrics |= state["after"]
            log.samples(state["step"], outputs)
            if metrics.get("eval/loss", math.inf) < state["best"]:
                state["best"] = metrics["eval/loss"]
                export(model, tokenizer, f"{folder}/checkpoints/best", lora, keep_going=args.keep_going)
        log.metrics(state["step"], metrics, ("train/loss", "train/margin", *(f"eval/{name}" for name in shown)))
        if args.save_every and (state["step"] % args.save_every == 0 or state["step"] == steps):
            save(f"checkpoints/step-{state['step']}")

    export(model, tokenizer, f"{folder}/model", lora)
    log.close()
    if "after" in state and outputs:
        say(table("after training", evenly(outputs, 5)))
    after = state.get("after", state["before"])
    before = {name: f"{value:.3f} -> " for name, value in state["before"].items()}
    changes = [f"{name.removeprefix('eval/')} {before.get(name, '')}{value:.3f}" for name, value in after.items()]
    say("; ".join(changes))
    say(f"model in {folder}/model")
    return (load_lm(f"{folder}/model") if dist.get_rank() == 0 else None), tokenizer


if __name__ == "__main__":
    run(train, Args, preset)

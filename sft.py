"""Supervised fine-tuning and pretraining of language models (SFT): maximum likelihood of the outputs of a data set.

Minimise the mean of -log p(token | all before it) over the tokens to be learned: all tokens of a text (GPT, Radford et
al. 2018, Eq. 1), the outputs of prompt and output, the assistant's turns of a dialogue (2203.02155, section 3.5).

Differences from the papers, and from trlX where it differs from them:
1. The loss of a step is a sum over its trained tokens divided by their number, whatever the micro-batches, ranks and
   padding. trlX takes means of micro-batches, which weight a token by the company it is in.
2. EOS is added once, at the end of a row, and trained, so that length is learned. trlX adds none to texts.
3. Rows are shuffled anew each epoch, alike on every number of processes. trlX does not shuffle.
4. In a row that is too long the prompt gives way to the output, but keeps half of the window; what still does not fit
   is cut off the output's end, EOS with it. A row without an output is left out. Both are counted.
5. `--packing rows` lets rows share a line, positions restarting, without attention from one to another: the same
   numbers with less padding, where a check at the start finds it exact. `--packing windows` joins texts and cuts them
   into full windows that overlap by one token, so that each token is trained once; attention crosses texts there.
6. No dropout. Prompts have no loss. The random-walks task trains a 6-layer GPT-2 from scratch, as trlX's examples do.

One step is one optimizer step on `--batch-size` rows, over all processes: the same flags give the same optimisation on
any number of them.

    python sft.py                                                         random walks on a CPU, less than a minute
    python sft.py --model gpt2 --dataset rows.jsonl                       one GPU
    torchrun --nproc_per_node 8 sft.py --model gpt2 --dataset rows.jsonl  eight GPUs
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 sft.py --model gpt2 \\
        --dataset rows.jsonl                                              two machines: the same command on each
"""

import dataclasses
import functools
import math
import os
import shutil
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from common.checkpoint import load_checkpoint, put_in_place, read_batch, read_state, save_checkpoint
from common.cli import UserError, check_bounds, check_shared_flags, end_if_told, run
from common.data import (
    chat_ends,
    check_data,
    encode_prompts,
    evenly,
    load_prompts,
    pack,
    pin_date,
    prompt_room,
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
    end_tokens,
    export,
    load_config,
    load_lm,
    load_tokenizer,
    new_lm,
    packs_exactly,
    pad_rows,
    prepare,
    train_tokenizer,
    train_top,
)
from common.randomwalks import random_walks, untrained_walker
from common.randomwalks import tokenizer as walks_tokenizer
from common.samples import Example, Row, encode, fit, load_samples, prompt_of

# --- arguments --------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    """SFT for language models. The head of this file explains the algorithm, docs/sft.md the metrics."""

    # model
    model: str | None = None
    """path or hub id of a causal or encoder-decoder LM; random walks makes its own when none is given"""
    from_config: str | None = None
    """train from scratch: a JSON file with model_type and its settings, or the model, by path or hub id, to shape as"""
    tokenizer: str | None = None
    """path or hub id of the tokenizer, if it is not beside the model"""
    train_tokenizer: int | None = None
    """train a byte-level BPE tokenizer of this many tokens on the data, for --from-config"""
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
    history: int | None = None
    """make each output of turns an example that has only so many texts before it; none: all, in one sequence"""
    packing: Literal["none", "rows", "windows"] = "none"
    """rows: several rows share a line of --max-length tokens, kept apart, which changes speed only (--micro-batch-size
    then counts lines); windows: texts are joined and cut into full windows of --max-length tokens"""

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
    max_length=32, max_new_tokens=9, eval_samples=50, eval_every=50, epochs=10, batch_size=50, micro_batch_size=50,
    learning_rate=1e-3, schedule="linear", warmup_steps=10)
RESUMABLE = (  # settings that may differ between a run and its resumption
    "max_steps", "eval_every", "save_every", "keep_checkpoints", "keep_going", "output_dir", "resume", "replay",
    "track", "config", "micro_batch_size", "generation_batch_size", "shard_size", "keep_sharded",
    "offload", "gradient_checkpointing", "reward_timeout")


def preset(args: Args) -> dict:
    """The defaults of the task that the flags choose."""
    alone = args.dataset is None and args.model is None and args.from_config is None
    return RANDOM_WALKS if alone or args.dataset == "randomwalks" else {}


def arguments(**flags) -> Args:
    """Args with the defaults of the task that the flags choose, as the command line makes them."""
    return Args(**{**preset(Args(**flags)), **flags})


def check(args: Args, samples: list | None = None) -> None:
    """Refuse settings that cannot work, in one line that names the flag."""
    check_bounds(
        args,
        positive=("epochs", "batch_size", "train_tokenizer", "micro_batch_size", "max_steps", "learning_rate",
                  "adam_epsilon", "max_grad_norm", "max_new_tokens", "generation_batch_size", "eval_every",
                  "eval_samples", "prompt_words", "num_eval_rows", "keep_checkpoints", "shard_size", "history",
                  "reward_timeout"),
        not_negative=("seed", "warmup_steps", "save_every", "weight_decay", "lora_rank", "num_eval_prompts"),
        unit=("adam_beta1", "adam_beta2", "held_out"))
    check_shared_flags(args)
    given = samples is not None or args.dataset not in (None, "randomwalks")
    if args.model and args.from_config:
        raise UserError(f"--from-config {args.from_config}: leave it out, or --model {args.model}")
    if (args.model or args.from_config) and samples is None and args.dataset is None:
        flag = f"--model {args.model}" if args.model else f"--from-config {args.from_config}"
        raise UserError(f"{flag} needs a --dataset: a file, a Hub data set, or randomwalks")
    if given and not (args.model or args.from_config):
        raise UserError(f"--dataset {args.dataset or ''} needs a --model, or --from-config for one from scratch")
    if args.held_out == 1:
        raise UserError("--held-out 1.0: leaves nothing to train on")
    if args.train_tokenizer is not None and (args.model or args.tokenizer or not args.from_config or not given):
        raise UserError("--train-tokenizer is for --from-config with a --dataset of texts, without a --tokenizer")
    if args.tokenizer and not (args.model or args.from_config):
        raise UserError("--tokenizer needs a --model or --from-config: random walks has its own")
    if given and args.from_config and args.from_config.endswith(".json"):
        if not (args.tokenizer or args.train_tokenizer):
            raise UserError(f"--from-config {args.from_config} needs a --tokenizer, or --train-tokenizer N")
    if not args.model and (args.lora_rank or args.num_layers_unfrozen != -1):
        raise UserError("--lora-rank and --num-layers-unfrozen need a --model: they would leave random weights as they "
                        "are")


# --- data -------------------------------------------------------------------------------------------------------------


def windows(examples: list[Example], length: int, start: int | None) -> list[Example]:
    """Texts, each with its end token, joined behind a start token and cut into windows of `length` tokens that overlap
    by one: each token is trained once, given all before it in its window. The last window is shorter."""
    stream = array("i", [] if start is None or examples and examples[0].prompt[0] == start else [start])
    for example in examples:
        stream.extend(example.prompt)
        stream.extend(example.output)
    cuts = [stream[i : i + length] for i in range(0, len(stream) - 1, length - 1)]
    return [Example(cut[:1], cut[1:], b"\1" * (len(cut) - 1)) for cut in cuts]


def make_examples(
    rows: list[Row], tokenizer, ends: tuple[int, ...], seq2seq: bool, longest: int, args: Args
) -> tuple[list[Example], int, int]:
    """The examples of the rows, in at most `longest` tokens; how many rows had nothing to train; how many were cut."""
    examples, dropped, cut = [], 0, 0
    head, tail = map(len, special_tokens(tokenizer, seq2seq))
    for some in (rows[i : i + 1000] for i in range(0, len(rows), 1000)):
        for row, found in zip(some, encode(some, tokenizer, ends, seq2seq, args.history)):
            kept = []
            for example in found:
                if args.packing != "windows":
                    ends_of_prompt = chat_ends(example.prompt, tokenizer) if row.messages else (head, tail)
                    example = fit(example, longest, args.truncation_side, *ends_of_prompt)
                # arrays take a tenth of the memory of lists
                trained = bytes(map(bool, example.trained))
                kept.append(Example(array("i", example.prompt), array("i", example.output), trained))
            cut += any(part.output and len(part.prompt) + len(part.output) < len(whole.prompt) + len(whole.output)
                       for part, whole in zip(kept, found))
            kept = [example for example in kept if example.output]
            dropped += not kept
            examples += kept
    if args.packing == "windows":
        examples = windows(examples, longest, start_token(tokenizer))
    return examples, dropped, cut


def micro_batches(
    examples: list[Example], room: int | None, micro_batch_size: int, start_id: int | None, device: torch.device
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """This rank's share of the examples: inputs of `LanguageModel.forward`, and the weight (N,) of each trained token,
    which is 0 in the lines that are there only because all ranks make the same calls.

    room: several examples share a line of at most this many tokens; None: each has a line of its own, padded.
    """
    lengths = [len(example.prompt) + len(example.output) for example in examples]
    if room:
        lines = pack(lengths, room, dist.get_world_size())
    else:  # like lengths share a micro-batch
        lines = [[row] for row in sorted(range(len(examples)), key=lengths.__getitem__)]
    mine, real = rank_rows(len(lines))
    for begin in range(0, len(mine), micro_batch_size):
        micro = slice(begin, begin + micro_batch_size)
        chosen, packed = [[examples[row] for row in lines[line]] for line in mine[micro]], {}
        if room:
            prompts = [[] for _ in chosen]  # a line is one output, whose rows' prompts are not trained
            outputs = [[token for part in line for token in (*part.prompt, *part.output)] for line in chosen]
            trained = [[flag for part in line for flag in (*[0] * len(part.prompt), *part.trained)] for line in chosen]
            places = [[i for part in line for i in range(len(part.prompt) + len(part.output))] for line in chosen]
            packed["position_ids"] = pad_rows(places, 0)[0].to(device)
        else:
            prompts, outputs, trained = zip(*([list(part) for part in line[0]] for line in chosen))
        trained = [[bool(flag) for flag in flags] for flags in trained]
        batch = collate(prompts, outputs, start_id, device, trained) | packed
        weight = torch.tensor(real[micro], device=device)[:, None].expand_as(batch["scored"])[batch["scored"]]
        yield batch, weight


# --- algorithm --------------------------------------------------------------------------------------------------------


def lm_loss(logprobs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood (GPT, Radford et al. 2018, Eq. 1), summed over tokens, both (N,), in nats.

    Divide by the number of trained tokens of the whole batch.
    """
    return -(logprobs * weight).sum()


def learning_rate_at(step: int, total: int, peak: float, warmup: int, schedule: str) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total`: a linear rise, then constant, a cosine or a line."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * {"constant": 1.0, "linear": 1 - progress, "cosine": cosine}[schedule]


# --- forward ----------------------------------------------------------------------------------------------------------


def batch_loss(model: LanguageModel, examples: list[Example], room: int | None, micro_batch_size: int) -> float:
    """Mean loss over the trained tokens of all examples, the same on all ranks; where gradients are on, also adds its
    gradient. room: see `micro_batches`."""
    world, tokens = dist.get_world_size(), sum(sum(example.trained) for example in examples)
    total = torch.zeros((), device=model.device)
    for batch, weight in micro_batches(examples, room, micro_batch_size, model.start_id, model.device):
        loss = lm_loss(model(**batch, with_entropy=False)["logprobs"], weight)
        if torch.is_grad_enabled():
            # FSDP takes the mean of the ranks' gradients; times their number, it is the sum
            (loss * world / tokens).backward()
        total += loss.detach()
    return sum(gather_rows([total.item()], world)) / tokens


# --- training ---------------------------------------------------------------------------------------------------------


def make_tokenizer(args: Args, rows: list[Row], folder: str, resumes: bool):
    """The tokenizer that the flags name, or one trained on the rows, on rank 0, which a resumed run finds again."""
    if not args.train_tokenizer:
        return load_tokenizer(args.tokenizer or args.model or args.from_config)
    path = f"{folder}/tokenizer"
    if any(row.messages for row in rows):
        raise UserError("--train-tokenizer: the data has messages, which need a tokenizer with a chat template")
    if not (resumes and broadcast(os.path.exists(path))):
        say(f"training a tokenizer of {args.train_tokenizer} tokens ...")
        if dist.get_rank() == 0:
            shutil.rmtree(path + ".tmp", ignore_errors=True)
            texts = (text for row in rows for text in row.turns)
            train_tokenizer(texts, args.train_tokenizer).save_pretrained(path + ".tmp")
            put_in_place(path)
        dist.barrier()
    return load_tokenizer(path)


def train(
    args: Args | None = None,
    samples: list | None = None,
    eval_prompts: list | None = None,
    metric_fn: Callable | None = None,
    held_out_samples: list | None = None,
    stop_sequences: list[str] | None = None,
):
    """Train by SFT; return the model and its tokenizer, plain transformers objects (the model on rank 0, else None).

    samples: texts, lists [prompt, output, prompt, output, ...], lists of messages, or rows with columns as in
    `--dataset`, which they replace; held_out_samples: likewise, for the held-out loss. eval_prompts: texts, or rows
    with a prompt and metadata. metric_fn(samples, prompts, outputs, tokenizer, **metadata) -> {name: list or number}
    measures them; it gets those arguments that it accepts. args: see `arguments`; random walks by default. Raises
    UserError for what the user can mend.
    """
    started, args = time.time(), args or (arguments() if samples is None else Args())
    if args.replay:
        args = Args(**{**read_state(args.replay, "--replay")["args"], "replay": args.replay})
    check(args, samples)
    device = init(args.seed)
    name = os.path.basename((args.model or args.from_config or "randomwalks").rstrip("/")).removesuffix(".json")
    folder, checkpoint = open_run(args, f"sft-{name}-{args.seed}", RESUMABLE)

    # --- data, tokenizer, model
    walks = random_walks(args.seed) if samples is None and args.dataset in (None, "randomwalks") else None
    format_fn = load_function(args.format, "--format") if args.format else None
    rows = load_samples(walks.walks if walks else samples, args.dataset, "--dataset", format_fn)
    if args.eval_dataset or held_out_samples is not None:
        held_out = load_samples(held_out_samples, args.eval_dataset, "--eval-dataset", format_fn)
    else:
        order = torch.randperm(len(rows), generator=generator(args.seed, 4)).tolist()
        count = min(len(rows) - 1, math.ceil(args.held_out * len(rows)), args.num_eval_rows)
        rows, held_out = ([rows[i] for i in sorted(part)] for part in (order[count:], order[:count]))
    held_out = evenly(held_out, args.num_eval_rows)
    if args.packing == "windows" and any(row.said != [True] for row in rows + held_out):
        raise UserError("--packing windows is for texts: use --packing rows for prompts with outputs")
    if args.from_config:
        load_config(args.from_config)  # a mistake in it shows before a tokenizer is trained
    if walks and not (args.model or args.tokenizer):
        tokenizer = walks_tokenizer()
    else:
        tokenizer = make_tokenizer(args, rows, folder, bool(checkpoint))
    date = pin_date(tokenizer, checkpoint)  # chat templates may write today's date
    if args.model:
        lm = load_lm(args.model)
    else:
        lm = new_lm(args.from_config, tokenizer, args.seed) if args.from_config else untrained_walker(args.seed)
    if len(tokenizer) > lm.get_input_embeddings().weight.shape[0]:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens and {args.model} embeds fewer: give its own "
                        "--tokenizer")
    if tokenizer.eos_token_id is None:
        say("the tokenizer has no EOS, so that outputs are not taught to end")
    rules = LogitRules(eos_ids=end_tokens(tokenizer, lm))
    config, seq2seq = lm.config.get_text_config(), lm.config.is_encoder_decoder
    longest = window(args.max_length, config)
    examples, dropped, cut = make_examples(rows, tokenizer, rules.eos_ids, seq2seq, longest, args)
    evals, evals_dropped, _ = make_examples(held_out, tokenizer, rules.eos_ids, seq2seq, longest, args)
    if not examples:
        raise UserError(f"--dataset {args.dataset or ''}: none of its {len(rows)} rows has an output to train on")
    if not evals and (args.eval_dataset or held_out_samples is not None):
        raise UserError(f"--eval-dataset {args.eval_dataset or ''}: none of its {len(held_out)} rows has an output")
    say(f"{len(rows)} rows to train on, {len(held_out)} held out"
        + (f"; {dropped} and {evals_dropped} have no output and were left out" if dropped + evals_dropped else "")
        + (f"; {cut} to train on have more than {longest} tokens and were cut" if cut else ""))

    # --- what is trained
    if args.num_layers_unfrozen != -1:
        train_top(lm, args.num_layers_unfrozen)
    lora = add_lora(lm, args.lora_rank, args.lora_alpha) if args.lora_rank else None
    model = LanguageModel(lm)
    room = longest if args.packing == "rows" and packs_exactly(model) else None  # of a line that rows share
    if args.packing == "rows":
        say(f"packing: rows share lines of {longest} tokens" if room else
            f"packing: a {type(lm).__name__} does not keep rows that share a line apart; each is padded instead")
    if args.gradient_checkpointing:
        checkpoint_blocks(lm)
    automatic = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, automatic if args.dtype == "auto" else args.dtype)
    prepare(model, dtype, device, shard_size=args.shard_size, offload=args.offload)
    try_out(model)  # an architecture that cannot be handled ends here, in one line
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = adamw(model, args.learning_rate, betas, args.adam_epsilon, args.weight_decay)

    # --- evaluation
    # prompts of the run's own: what its rows begin with
    own = [prompt_of(row, args.prompt_words or 4, args.history) for row in held_out or rows]
    empty = [[]] if start_token(tokenizer) is not None else [[], ""]  # give the model nothing to start from
    own = walks.starts if walks else [row for row in own if row["prompt"] not in empty]
    metric_fn = metric_fn or load_metric(args.metric, device) or (walks.metric if walks else None)
    eval_rows, eval_ids = [], []
    if args.num_eval_prompts and (own or args.eval_prompts or eval_prompts is not None):
        eval_rows = load_prompts(eval_prompts, args.eval_prompts, "--eval-prompts", own, args.prompt_words)
        eval_rows = evenly(eval_rows, args.num_eval_prompts)
        free = prompt_room(args.max_length, args.max_new_tokens, config)
        eval_ids, _ = encode_prompts(eval_rows, tokenizer, free, args.truncation_side, seq2seq)

    def evaluate() -> tuple[dict[str, float], list[dict]]:
        metrics, outputs = {}, []
        if evals:
            with torch.no_grad():
                loss = batch_loss(model, evals, room, args.micro_batch_size)
            metrics = {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700))}
        if eval_ids:
            found, outputs = evaluate_samples(
                model, tokenizer, eval_ids, eval_rows, rules, metric_fn, repeats=args.eval_samples,
                reward_timeout=args.reward_timeout,
                max_new_tokens=args.max_new_tokens, seed=args.seed, batch_size=args.generation_batch_size,
                options={"temperature": args.eval_temperature, "top_k": args.eval_top_k, "top_p": args.eval_top_p},
                stop_sequences=args.stop if stop_sequences is None else stop_sequences, keep_sharded=args.keep_sharded)
            metrics |= {name: value for name, value in found.items() if name not in metrics}  # the held-out loss stays
        return metrics, outputs

    # --- loop
    total_samples = args.epochs * len(examples)
    planned = math.ceil(total_samples / args.batch_size)
    steps = min(planned, args.max_steps or planned)
    # the loop's state: with weights and optimizer, all that a checkpoint holds
    state = {"step": 0, "samples": 0, "tokens": 0, "best": math.inf, "date": date,
             "data": check_data(examples + evals, "--format")}
    if checkpoint:
        state |= load_checkpoint(checkpoint, model, optimizer, state["data"])

    def save(name: str, batch: dict | None = None) -> str:
        return save_checkpoint(f"{folder}/{name}", model, optimizer, {**state, "args": dataclasses.asdict(args)},
                               args.keep_checkpoints, args.keep_going, batch)

    if args.replay:  # run a saved batch again, row by row, and end
        batch = [Example(*example) for example in read_batch(args.replay)["examples"]]
        texts = dict(enumerate(tokenizer.decode([*row.prompt, *row.output]) for row in batch))
        return replay(args.replay, optimizer, texts,
                      lambda rows: batch_loss(model, [batch[row] for row in rows], room, args.micro_batch_size))
    log = RunLog(folder, args, state["step"], steps, args.track, started, args.keep_going)
    outputs = []
    if not checkpoint:
        state["before"], outputs = evaluate()
        counts = {"data/rows": len(rows), "data/held_out": len(held_out), "data/dropped": dropped, "data/cut": cut}
        log.metrics(0, {"samples": 0, "tokens": 0, "epoch": 0.0, **counts, **state["before"]}, tuple(state["before"]))
        log.samples(0, outputs)
        if outputs:
            say(table("before training", evenly(outputs, 5)))
    for step in range(state["step"], steps):
        end_if_told(state["step"], save)
        begun = time.time()

        # batch: the next rows, in an order that is shuffled anew each epoch
        places = range(state["samples"], min(state["samples"] + args.batch_size, total_samples))
        batch = [examples[shuffled(place, len(examples), args.seed)] for place in places]

        # update
        loss = batch_loss(model, batch, room, args.micro_batch_size)  # adds its gradient, too
        rate = learning_rate_at(step, planned, args.learning_rate, args.warmup_steps, args.schedule)
        norm = optimizer_step(optimizer, rate, args.max_grad_norm, loss, step, functools.partial(
            save, batch={"examples": [[list(part) for part in example] for example in batch]}))
        state["step"], state["samples"] = step + 1, state["samples"] + len(batch)
        state["tokens"] += sum(sum(example.trained) for example in batch)
        seconds = time.time() - begun
        read = sum(len(example.prompt) + len(example.output) for example in batch)
        metrics = {"samples": state["samples"], "tokens": state["tokens"], "epoch": state["samples"] / len(examples),
                   "loss/lm": loss, "optim/grad_norm": norm, "optim/learning_rate": rate, "perf/seconds": seconds,
                   "perf/samples_per_second": len(batch) / seconds, "perf/tokens_per_second": read / seconds}

        # evaluate, log, save
        if state["step"] % args.eval_every == 0 or state["step"] == steps:
            state["after"], outputs = evaluate()
            metrics |= state["after"]
            log.samples(state["step"], outputs)
            if metrics.get("eval/loss", math.inf) < state["best"]:
                state["best"] = metrics["eval/loss"]
                export(model, tokenizer, f"{folder}/checkpoints/best", lora, keep_going=args.keep_going)
        log.metrics(state["step"], metrics, ("loss/lm", *state.get("after", ())))
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
    if walks and "eval/invalid" in after:
        invalid = sum(walks.metric(walks.walks)["invalid"]) / len(walks.walks)
        say(f"share of valid paths, over edges that exist to the goal: {1 - after['eval/invalid']:.3f}; of the walks "
            f"it learned from: {1 - invalid:.3f}")
    return (load_lm(f"{folder}/model") if dist.get_rank() == 0 else None), tokenizer


if __name__ == "__main__":
    run(train, Args, preset)

"""Rejection-sampling fine-tuning: sample, keep each prompt's best outputs, train on them by SFT, again and again.

trlX's RFT (the method of arXiv 2308.01825, and with improve steps that of ReST, 2308.08998). A round samples
`--generations` outputs for every prompt, scores them, and adds them to an archive; then, in each of `--improve-steps`
steps with rising percentiles, it trains on the archived outputs whose score is at or above that percentile of all the
scores their prompt has had, so that hard prompts have as many as easy ones.

As in trlX: the archive is never cleared, an output drawn twice counts twice in the percentile and is trained once, and
the lowest threshold of all prompts is exclusive: scores often tie at the bottom (0, invalid), where a percentile would
let all of them in; while at the top, where they tie too, all of the best are in. Otherwise than in trlX:
1. "Exclusive" is exact, whatever the scale of the scores; trlX moves thresholds by 0.001.
2. The loss is on outputs alone, on the tokens that were sampled, EOS where it was; not on prompts, and not on pads.
3. The samples are shuffled, anew in each pass; a step's loss is a mean over its tokens (`sft.batch_loss`).
4. The last improve step has the end percentile, which trlX's never reaches.
5. The learning rate falls to 0 over the rounds. `--most-per-prompt` bounds what a round trains on, as archives grow.
6. Random walks, the default task, starts from the walker of ppo.py.

Runs under torchrun, too. There are no checkpoints: DIR/model is written at the end.

    python examples/rft.py                                                random walks on a CPU, a few minutes
    python examples/rft.py --model gpt2 --prompts prompts.jsonl --reward file.py:function --improve-steps 3
"""

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import ppo  # noqa: E402
import sft  # noqa: E402
from common.cli import UserError, check_bounds, run  # noqa: E402
from common.data import encode_prompts, load_prompts, prompt_room  # noqa: E402
from common.distributed import adamw, broadcast, generator, init, optimizer_step  # noqa: E402
from common.generation import noise, sample_texts, try_out  # noqa: E402
from common.metrics import say  # noqa: E402
from common.models import LanguageModel, LogitRules, end_tokens, export, load_lm, load_tokenizer, prepare  # noqa: E402
from common.randomwalks import random_walks, write_cloned_walker  # noqa: E402
from common.samples import Example  # noqa: E402


@dataclass
class Args:
    """Rejection-sampling fine-tuning. The head of rft.py explains the algorithm."""

    model: str | None = None
    """path or hub id of a causal or encoder-decoder LM; random walks makes its own when none is given"""
    prompts: str | None = None
    """.jsonl[.gz], .json, .csv, .parquet or Hub data set name:split, with column prompt or text"""
    reward: str | None = None
    """file.py:function, package.module:function, or a classification model's path or hub id; see ppo.py"""
    output_dir: str = "runs/rft"
    """run directory"""
    rounds: int = 20
    """how often to sample"""
    generations: int = 100
    """outputs to sample for each prompt in a round"""
    improve_steps: int = 1
    """times to select and train in a round"""
    start_percentile: float = 0.9
    """percentile, from 0 to 1, of the first improve step"""
    end_percentile: float = 0.95
    """percentile of the last improve step, if there are several"""
    most_per_prompt: int | None = None
    """train on so many of a prompt's selected outputs at most, drawn anew in each improve step; none: on all"""
    epochs: int = 1
    """passes over the selected samples in an improve step"""
    max_length: int | None = None
    """most tokens of prompt and output together, longer prompts being cut; none: the model's positions, at most 1024"""
    max_new_tokens: int = 40
    """most tokens in an output"""
    temperature: float = 1.0
    """sampling temperature"""
    stop: list[str] = field(default_factory=list)
    """stop sequences: the output ends where the first one begins"""
    generation_batch_size: int = 128
    """prompts per generation batch on one process; affects memory and speed only"""
    batch_size: int = 32
    """sequences per optimizer step, over all processes"""
    micro_batch_size: int = 32
    """sequences per forward on one process; affects memory and speed only"""
    learning_rate: float = 3e-5
    """learning rate of the first round; it falls to 0 in even steps"""
    seed: int = 1
    """seed of everything, the graph of random walks included"""


def preset(args: Args) -> dict:
    """The defaults of random walks, where no model is given."""
    walks = dict(max_length=32, max_new_tokens=9, rounds=20, generations=50, most_per_prompt=40, batch_size=50,
                 micro_batch_size=50, learning_rate=1e-3, generation_batch_size=1000)
    return {} if args.model else walks


class Archive:
    """What was sampled for one prompt: the scores of all draws, and each different output once."""

    def __init__(self):
        self.draws: list[float] = []
        self.outputs: dict[tuple[int, ...], float] = {}  # token ids -> score; the first one, if they differ

    def add(self, tokens: list[int], score: float) -> None:
        """One more draw."""
        self.draws.append(score)
        self.outputs.setdefault(tuple(tokens), score)


def select(archives: list[Archive], percentile: float) -> list[list[tuple[int, ...]]]:
    """For each prompt the outputs to train on: those at or above its percentile of scores. A threshold that is the
    lowest of all prompts' is exclusive; if all are the same, only where it is the lowest score of all. If every score
    is the same nothing is better than anything, and all are selected."""
    thresholds = [np.quantile(archive.draws, percentile) for archive in archives]
    lowest = min(min(archive.draws) for archive in archives)
    floor = min(thresholds) if min(thresholds) < max(thresholds) else lowest
    if all(score == lowest for archive in archives for score in archive.draws):
        floor = -np.inf
    return [[tokens for tokens, score in archive.outputs.items() if score >= threshold and score > floor]
            for archive, threshold in zip(archives, thresholds)]


def percentile_of(step: int, args: Args) -> float:
    """Percentile of improve step `step` (from 0): evenly from start to end."""
    return args.start_percentile + (args.end_percentile - args.start_percentile) * step / max(1, args.improve_steps - 1)


def main(args: Args):
    """Train by RFT; return the mean score of the samples of each round, and of as many drawn at the end."""
    check_bounds(args, positive=("rounds", "generations", "improve_steps", "epochs", "max_new_tokens", "temperature",
                                 "most_per_prompt", "generation_batch_size", "batch_size", "micro_batch_size",
                                 "learning_rate"),
                 not_negative=("seed",), unit=("start_percentile", "end_percentile"))
    if bool(args.model) != bool(args.reward) or args.model and not args.prompts:
        raise UserError("give --model, --prompts and --reward; or none of them, for random walks")
    device = init(args.seed)
    path = args.model or f"{args.output_dir}/start-{args.seed}"
    if broadcast(os.path.exists(f"{args.output_dir}/model")):
        raise UserError(f"--output-dir {args.output_dir}: holds a model already; choose another")
    if args.model is None:
        write_cloned_walker(path, random_walks(args.seed), args.seed)

    # --- what ppo.py samples with and scores by
    scoring = ppo.Args(reward=args.reward, seed=args.seed)
    tokenizer, reward_fn = load_tokenizer(path), ppo.load_reward(scoring, device)
    model = LanguageModel(load_lm(path))
    prepare(model, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    try_out(model)
    rules = LogitRules(args.temperature, end_tokens(tokenizer, model.lm))
    optimizer = adamw(model, args.learning_rate, (0.9, 0.99), 1e-8, 0.0)
    rows = load_prompts(None, args.prompts, "--prompts", [] if args.model else random_walks(args.seed).starts, None)
    room = prompt_room(args.max_length, args.max_new_tokens, model.lm.config.get_text_config())
    ids, _ = encode_prompts(rows, tokenizer, room, "left", model.seq2seq)

    def stop(name: str):
        raise UserError(f"{name}: a loss or gradient is not finite; lower --learning-rate")

    def draw(number: int) -> tuple[list[dict], list[float]]:
        """Samples of all prompts, side by side, and their scores."""
        uniforms = noise(generator(args.seed, 1, number), len(ids) * args.generations, args.max_new_tokens)
        items = sample_texts(model, tokenizer, [row for row in ids for _ in range(args.generations)], uniforms, rules,
                             batch_size=args.generation_batch_size, stop_sequences=args.stop)
        every = [row for row in rows for _ in range(args.generations)]
        scores = ppo.compute_scores(reward_fn, items, every, tokenizer, scoring)
        return items, [sum(score) if isinstance(score, list) else score for score in scores]

    archives, means, steps = [Archive() for _ in ids], [], 0
    for number in range(args.rounds):
        begun = time.time()
        items, scores = draw(number)
        means.append(sum(scores) / len(scores))
        for i, (item, score) in enumerate(zip(items, scores)):
            archives[i // args.generations].add(item["tokens"], score)
        losses, kept, rate = [], [], args.learning_rate * (1 - number / args.rounds)
        for step in range(args.improve_steps):
            chosen = select(archives, percentile_of(step, args))
            examples = []
            for i, some in enumerate(chosen):
                order = torch.randperm(len(some), generator=generator(args.seed, 2, number, step, i))
                examples += [Example(ids[i], some[j], b"\1" * len(some[j])) for j in order[: args.most_per_prompt]]
            kept.append(len(examples))
            for epoch in range(args.epochs):
                order = torch.randperm(len(examples), generator=generator(args.seed, 3, number, step, epoch))
                for batch in order.split(args.batch_size) if examples else ():
                    losses.append(sft.batch_loss(model, [examples[i] for i in batch], None, args.micro_batch_size))
                    optimizer_step(optimizer, rate, 1.0, losses[-1], steps, stop)
                    steps += 1
        known = sum(len(archive.outputs) for archive in archives)
        say(f"round {number + 1}: score {means[-1]:.3f}; trained on {', '.join(map(str, kept))} of {known} outputs; "
            f"{len(losses)} steps" + (f", loss {np.mean(losses):.3f}" if losses else "")
            + f"; {time.time() - begun:.0f} s")
    _, scores = draw(args.rounds)
    means.append(sum(scores) / len(scores))
    export(model, tokenizer, f"{args.output_dir}/model")
    say(f"score {means[0]:.3f} -> {means[-1]:.3f} after {steps} steps; model in {args.output_dir}/model")
    return means


if __name__ == "__main__":
    run(main, Args, preset)

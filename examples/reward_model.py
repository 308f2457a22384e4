"""A reward model from pairs of outputs, of which one was preferred: a number for a text, for `ppo.py --reward`.

Minimise -log sigmoid(r(chosen) - r(rejected)), the likelihood of the choices under the Bradley-Terry model (2203.02155,
Eq. 1, with pairs), where r is the score that a linear head reads at a text's last token, EOS. The head starts from
N(0, 1 / (d + 1)), a variance (2009.01325, section 3.4). No dropout.

What it reads is what ppo.py will give it: prompt and output as text, without special tokens, to which the tokenizer
that is saved with it adds its own, and EOS. Lists of messages are such texts, too, by the chat template. Padding is on
the right, by a token that is not EOS; a text that is too long loses its beginning: the prompt gives way first. Pairs of
equal texts are left out. A step's loss is the mean over its pairs, whatever the micro-batches.

One process, on a GPU if there is one. DIR/model, in Hugging Face format, is a sequence-classification model of one
label.

    python examples/reward_model.py --model gpt2 --dataset pairs.jsonl --output-dir rm
    python ppo.py --model gpt2 --prompts prompts.jsonl --reward rm/model
"""

import itertools
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, processors

sys.path.insert(0, str(Path(__file__).parent.parent))
import dpo  # noqa: E402
from common.cli import UserError, check_bounds, reason, run  # noqa: E402
from common.data import shuffled, special_tokens, window  # noqa: E402
from common.distributed import block_lists  # noqa: E402
from common.functions import load_function  # noqa: E402
from common.models import NO_CODE, load_tokenizer, pad_rows, positions_of  # noqa: E402

Pair = tuple[list[int], list[int]]  # token ids, whole texts, chosen and rejected


@dataclass
class Args:
    """Train a reward model on pairs. The head of reward_model.py explains the algorithm."""

    model: str = ""
    """path or hub id of the model to start from, best the one that PPO will start from"""
    dataset: str = ""
    """.jsonl[.gz], .json, .csv, .parquet or Hub data set name:split, with columns chosen and rejected, and prompt
    unless it is what both begin with: texts, or lists of messages"""
    format: str | None = None
    """file.py:function or package.module:function from a row to a row with these columns, or to None to leave it out"""
    eval_dataset: str | None = None
    """held-out pairs, in the same forms; none: a share of the data set, by --held-out"""
    held_out: float = 0.05
    """share of the data set that is kept out of training"""
    output_dir: str = ""
    """where the folder `model` is written"""
    max_length: int | None = None
    """most tokens of a text; none: the model's positions, at most 1024"""
    num_layers_unfrozen: int = -1
    """train the top n blocks and the head only; -1: all"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """what the model computes in; weights and optimizer are float32. auto: bfloat16 on a GPU, float32 on a CPU"""
    epochs: int = 1
    """passes over the pairs"""
    max_steps: int | None = None
    """stop after this many steps even if more was asked for"""
    batch_size: int = 32
    """pairs per optimizer step"""
    micro_batch_size: int = 8
    """pairs per forward; affects memory and speed only"""
    learning_rate: float = 1e-5
    """peak learning rate, which falls to 0 as a cosine"""
    seed: int = 1
    """seed of the head, of the held-out pairs and of the order"""


def reward_tokenizer(tokenizer, longest: int) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer, but that it ends each text with EOS, cuts texts on the left, and has a pad token of its own: where
    EOS pads, transformers' models read the score before the EOS."""
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    head, tail = special_tokens(tokenizer, True)
    tail = tail if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    head, tail = tokenizer.convert_ids_to_tokens(head), tokenizer.convert_ids_to_tokens(tail)
    core.post_processor = processors.TemplateProcessing(
        single=[*head, "$A", *tail], special_tokens=[(token, core.token_to_id(token)) for token in {*head, *tail}])
    own = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, **tokenizer.special_tokens_map, model_max_length=longest, truncation_side="left",
        padding_side="right", model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=False)
    if own.pad_token in (None, own.eos_token):
        own.add_special_tokens({"pad_token": "<|pad|>"})
    return own


def load_model(args: Args):
    """The model with a head of one output, and the tokenizers, the one that reads the pairs and the one to save."""
    tokenizer = load_tokenizer(args.model)
    transformers.logging.set_verbosity_error()  # it says that the head is new
    try:
        config = transformers.AutoConfig.from_pretrained(args.model, num_labels=1, **NO_CODE)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            args.model, config=config, dtype=torch.float32, **NO_CODE).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"--model {args.model}: has no form with a head for scores ({reason(error)})") from None
    if config.is_encoder_decoder or not tokenizer.is_fast:
        raise UserError(f"--model {args.model}: must be a decoder or an encoder, with a fast tokenizer")
    head = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part.out_features == 1][-1]
    if not any("SequenceClassification" in name for name in config.architectures or []):  # else it is trained further
        head.weight.data.normal_(0, (head.in_features + 1) ** -0.5)
    longest = window(args.max_length, config.get_text_config())
    own = reward_tokenizer(tokenizer, min(longest, positions_of(model) or longest))
    if len(own) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(own), mean_resizing=False)
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = own.pad_token_id
    model.config.use_cache = False
    if args.num_layers_unfrozen != -1:
        blocks = max(block_lists(model), key=len)
        if not 0 < args.num_layers_unfrozen <= len(blocks):
            raise UserError(f"--num-layers-unfrozen {args.num_layers_unfrozen}: must be -1, or 1 to {len(blocks)}")
        top = {id(parameter) for parameter in blocks[-args.num_layers_unfrozen :].parameters()}
        for parameter in itertools.takewhile(lambda each: id(each) not in top, model.parameters()):
            parameter.requires_grad_(False)  # what comes before in the order of the forward
    return model, tokenizer, own


def encode(rows: list, tokenizer, own) -> list[Pair]:
    """The rows of `dpo.load_pairs` as pairs of texts, the way ppo.py hands them over, in tokens."""
    pairs, _ = dpo.make_pairs(rows, tokenizer, (tokenizer.eos_token_id,), False, 10**9, dpo.Args())
    texts = [tokenizer.decode([*pair.prompt, *side], skip_special_tokens=True)
             for pair in pairs for side in (pair.chosen, pair.rejected)]
    ids = own(texts, truncation=True)["input_ids"] if texts else []
    return [(chosen, rejected) for chosen, rejected in zip(ids[::2], ids[1::2]) if chosen != rejected]


def pair_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(r(chosen) - r(rejected)) of each pair (M,), in nats (2203.02155, Eq. 1)."""
    return -F.logsigmoid(chosen - rejected)


def run_batch(model, pairs: list[Pair], micro_batch_size: int, dtype: torch.dtype) -> tuple[float, float]:
    """Mean loss and accuracy of the pairs, a tie counting half; where gradients are on, adds the mean's gradient."""
    totals = torch.zeros(2, dtype=torch.float64)
    pairs = sorted(pairs, key=lambda pair: max(map(len, pair)))  # like lengths together
    for micro in (pairs[i : i + micro_batch_size] for i in range(0, len(pairs), micro_batch_size)):
        ids, mask = (part.to(model.device) for part in pad_rows([side for pair in micro for side in pair],
                                                                model.config.pad_token_id))
        with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            scores = model(input_ids=ids, attention_mask=mask.long()).logits[:, 0].float()
        margin, loss = scores[::2] - scores[1::2], pair_loss(scores[::2], scores[1::2])
        if torch.is_grad_enabled():
            (loss.sum() / len(pairs)).backward()
        right = (margin > 0).sum() + 0.5 * (margin == 0).sum()
        totals += torch.stack([loss.sum(), right]).detach().cpu() / len(pairs)
    return tuple(totals.tolist())


def main(args: Args):
    """Train, and write the model; return it with its tokenizer, and the held-out accuracies before and after."""
    check_bounds(args, positive=("epochs", "max_steps", "batch_size", "micro_batch_size", "learning_rate"),
                 not_negative=("seed",), unit=("held_out",))
    if not (args.model and args.dataset and args.output_dir):
        raise UserError("give --model, --dataset and --output-dir")
    folder = f"{args.output_dir}/model"
    if os.path.exists(folder):
        raise UserError(f"--output-dir {args.output_dir}: holds a model already; choose another")
    if "RANK" in os.environ:
        raise UserError("a reward model is trained by one process: start it with python")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, {"auto": "bfloat16" if device.type == "cuda" else "float32"}.get(args.dtype, args.dtype))
    torch.manual_seed(args.seed)

    format_fn = load_function(args.format, "--format") if args.format else None
    rows = dpo.load_pairs(None, args.dataset, "--dataset", format_fn)
    if args.eval_dataset:
        held_out = dpo.load_pairs(None, args.eval_dataset, "--eval-dataset", format_fn)
    else:
        rows, held_out = dpo.split(rows, args.held_out, len(rows), args.seed)
    model, tokenizer, own = load_model(args)
    pairs, evals = encode(rows, tokenizer, own), encode(held_out, tokenizer, own)
    if not pairs or not evals:
        raise UserError(f"{len(pairs)} pairs to train on and {len(evals)} held out: needs some of both")
    model.to(device)
    print(f"{len(pairs)} pairs to train on, {len(evals)} held out; "
          f"{len(rows) + len(held_out) - len(pairs) - len(evals)} are equal and were left out", flush=True)

    with torch.no_grad():
        before = run_batch(model, evals, args.micro_batch_size, dtype)
    print(f"before training: held-out accuracy {before[1]:.3f}, loss {before[0]:.3f}", flush=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.95), weight_decay=0)
    total = -(-args.epochs * len(pairs) // args.batch_size)
    for step in range(min(total, args.max_steps or total)):
        places = range(step * args.batch_size, min((step + 1) * args.batch_size, args.epochs * len(pairs)))
        batch = [pairs[shuffled(place, len(pairs), args.seed)] for place in places]
        loss, accuracy = run_batch(model, batch, args.micro_batch_size, dtype)
        norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0).item()
        if not math.isfinite(loss + norm):
            raise UserError(f"step {step}: the loss is {loss}, its gradient {norm}; lower --learning-rate")
        optimizer.param_groups[0]["lr"] = dpo.learning_rate_at(step, total, args.learning_rate, 0, "cosine")
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, total // 10) == 0:
            print(f"step {step + 1} of {total}: loss {loss:.3f}, accuracy {accuracy:.3f}", flush=True)
    with torch.no_grad():
        after = run_batch(model, evals, args.micro_batch_size, dtype)
    model.save_pretrained(folder + ".tmp")
    own.save_pretrained(folder + ".tmp")
    os.replace(folder + ".tmp", folder)
    print(f"held-out accuracy {before[1]:.3f} -> {after[1]:.3f}, loss {before[0]:.3f} -> {after[0]:.3f}; model in "
          f"{folder}")
    return model, own, before[1], after[1]


if __name__ == "__main__":
    run(main, Args)

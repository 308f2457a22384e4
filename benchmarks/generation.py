"""Sampling with ragged prompts and outputs, against `generate` of transformers: real tokens per second.

    python benchmarks/generation.py --model ../shared/data/models/imdb-gpt2-mini

The peer is given its best: prompts sorted by length into batches, left padding, its own stopping, and, by --static, a
static cache with a compiled forward, which it uses on a GPU only. Prompts are random tokens. Both sample until the end
token, which each model gives about once in --mean tokens, or --longest of them; "uniform" has prompts of one length and
outputs that do not end. Real tokens are those up to the end, padding and what follows an end are none.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import versus  # noqa: E402

EOS = 0


def work(config: dict):
    """The model, whose end token has the wanted probability at any place, and the prompts."""
    import torch

    from common.models import load_lm

    lm = load_lm(config["_model"]).to("cuda" if torch.cuda.is_available() else "cpu", getattr(torch, config["_dtype"]))
    draw = torch.Generator().manual_seed(1)
    words = lm.config.get_text_config().vocab_size
    low, high = config["prompt"]
    lengths = torch.randint(low, high + 1, (config["prompts"],), generator=draw).tolist()
    return lm, [torch.randint(1, words, (length,), generator=draw).tolist() for length in lengths]


def ends(logits, mean: float | None):
    """Logits (B, V) under which the end token has probability 1 / mean, or none."""
    import math

    import torch

    others = logits[:, EOS + 1 :].logsumexp(-1)
    odds = -torch.inf if mean is None else -math.log(mean - 1)
    logits[:, EOS] = others + odds
    return logits


def ours(config: dict, turns) -> None:
    """common/generation.py."""
    import torch

    from common.distributed import init
    from common.generation import generate, noise
    from common.models import LanguageModel, LogitRules

    init(1)
    lm, prompts = work(config)
    model, longest = LanguageModel(lm), config["longest"]
    model.requires_grad_(False)
    adjust = lambda logits, states, previous: ends(logits, config["mean"])  # noqa: E731
    turn = 0
    while True:
        turns.wait()
        turn += 1
        uniforms = noise(torch.Generator().manual_seed(turn), len(prompts), longest)
        out = generate(model, prompts, uniforms, LogitRules(eos_ids=(EOS,)), batch_size=config["batch"],
                       adjust_logits=adjust)
        turns.done(tokens=sum(map(len, out.tokens)), samples=len(prompts))


def transformers(config: dict, turns) -> None:
    """model.generate."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    lm, prompts = work(config)
    order = sorted(prompts, key=len, reverse=True)

    class Ends(LogitsProcessor):
        def __call__(self, _, scores):
            return ends(scores, config["mean"])

    turn = 0
    while True:
        turns.wait()
        turn += 1
        torch.manual_seed(turn)
        tokens = 0
        for start in range(0, len(order), config["batch"]):
            rows = order[start : start + config["batch"]]
            width = max(map(len, rows))
            ids = torch.tensor([[EOS] * (width - len(row)) + row for row in rows], device=lm.device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=lm.device)
            out = lm.generate(ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=config["longest"],
                              eos_token_id=EOS, pad_token_id=EOS, logits_processor=LogitsProcessorList([Ends()]),
                              **({"cache_implementation": "static"} if config["static"] else {}))[:, width:]
            ended = (out == EOS).long()
            tokens += int((ended.cumsum(1) - ended == 0).sum())  # up to the end token
        turns.done(tokens=tokens, samples=len(prompts))


def main():
    """Run and report."""
    flags = versus.parser(__doc__)
    flags.add_argument("--model", required=True, help="path of a model of a few million parameters")
    flags.add_argument("--batch", type=int, default=64)
    flags.add_argument("--prompts", type=int, default=256)
    flags.add_argument("--mean", type=float, default=40, help="tokens to an end, on average")
    flags.add_argument("--longest", type=int, default=128, help="most new tokens")
    flags.add_argument("--static", action=argparse.BooleanOptionalAction, default=False)
    flags.add_argument("--only", choices=("given", "gpt2-small"), help="one of the two models")
    args = flags.parse_args()
    from transformers import AutoConfig, AutoModelForCausalLM

    results, folder = [], tempfile.mkdtemp()
    for name in ("given", "gpt2-small"):
        if args.only not in (None, name):
            continue
        path, count = args.model, args.prompts
        if name == "gpt2-small":
            path, count = f"{folder}/gpt2-small", args.batch // 4
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**versus.gpt2_small())).save_pretrained(path)
        config = AutoConfig.from_pretrained(path)
        for kind, shape in (("ragged", dict(prompt=(4, 64), mean=args.mean, longest=args.longest)),
                            ("uniform", dict(prompt=(32, 32), mean=None, longest=32))):
            given = dict(model=name, kind=kind, batch=args.batch, prompts=count, static=args.static, _model=path,
                         _dtype=args.dtype, **shape)
            tokens = args.mean * (1 - (1 - 1 / args.mean) ** args.longest) if kind == "ragged" else 32
            read = sum(shape["prompt"]) / 2
            flops = count * versus.forward_flops(config, read + tokens - 1, tokens, read + tokens)
            results.append(versus.compare(
                f"{name}, {kind}", {"ours": ours, "transformers": transformers}, given, pairs=args.pairs,
                threads=args.threads, dtype=args.dtype, flops=flops,
                moved=versus.decode_bytes(config, count * tokens, args.batch, read + tokens / 2),
                alike=("samples",) if kind == "ragged" else ("samples", "tokens")))
    versus.report("generation", results, args.json)


if __name__ == "__main__":
    main()

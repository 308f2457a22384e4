"""Absolute figures of this machine, a GPU above all: SFT, DPO, rollouts and PPO of random weights of a given size.

    python benchmarks/throughput.py --shape gpt2-small 1.5b 7b
    torchrun --nproc_per_node 8 benchmarks/throughput.py --shape 7b

Prints tokens, pairs or samples per second, peak memory, and the share of the machine: of SFT, DPO and PPO the model's
floating-point operations over those of a large matmul in the same precision, measured in the same run (MFU against
what can be had; --peak TFLOPS takes the data sheet's figure instead); of rollouts the bytes of weights and cache that
each step must read over the bandwidth of a large copy. Rows are full: --prompt and --response tokens.
"""

import argparse
import os
import sys
import time
from array import array
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import versus  # noqa: E402

SHAPES = {  # Llama's blocks; settings of LlamaConfig
    "tiny": dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, vocab_size=512),
    "gpt2-small": dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
                       vocab_size=50257, tie_word_embeddings=True),
    "1.5b": dict(hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=16,
                 vocab_size=50257),
    "7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
               vocab_size=32000),
}


def measure(shape: str, args) -> list[dict]:
    """Run each kind of work on a model of this shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import dpo
    import ppo
    import sft
    from common.distributed import adamw, init, optimizer_step, unsharded
    from common.generation import generate, noise
    from common.models import LanguageModel, LogitRules, checkpoint_blocks, frozen, make_head, prepare
    from common.samples import Example

    device = init(1)
    cuda, world = device.type == "cuda", torch.distributed.get_world_size()
    dtype = getattr(torch, args.dtype or ("bfloat16" if cuda else "float32"))
    length = args.prompt + args.response
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=length + 1)

    def make(head=False):
        with device:
            lm = LlamaForCausalLM(config).eval()
        if args.gradient_checkpointing:
            checkpoint_blocks(lm)
        model = LanguageModel(lm)
        if head:
            model.heads["value"] = make_head(model.width, 1)
        return prepare(model, dtype, device)

    def rows(count):
        draw = torch.Generator().manual_seed(1)
        return torch.randint(1, config.vocab_size, (count, length), generator=draw).tolist()

    def timed(name, unit, amount, work, flops=0.0, moved=0.0):
        work(), work()
        if cuda:
            torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        for _ in range(args.repeats):
            work()
        if cuda:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - begun) / args.repeats
        peak = torch.cuda.max_memory_allocated() if cuda else versus.resident_peak()
        return {"name": f"{name} {shape}", "unit": unit, "per_second": amount / seconds, "seconds": seconds,
                "flops": flops, "moved": moved, "peak": peak, "world": world}

    def step(model, optimizer, backward):
        backward()
        optimizer_step(optimizer, 1e-6, 1.0, 0.0, 0, str)

    one = versus.forward_flops(config, length, length - 1, length)
    found, batch = [], args.batch * world
    model = make()
    optimizer = adamw(model, 1e-6, (0.9, 0.95), 1e-8, 0.0)
    examples = [Example(array("i", row[:1]), array("i", row[1:]), bytes([1] * (length - 1))) for row in rows(batch)]
    found.append(timed("SFT", "tokens", batch * length, lambda: step(model, optimizer, lambda: sft.batch_loss(
        model, examples, None, args.micro_batch)), 3 * one * batch))

    lm_bytes = sum(part.numel() for part in model.parameters()) * dtype.itemsize
    cache = 2 * config.num_hidden_layers * config.hidden_size * dtype.itemsize  # bytes a token
    prompts, uniforms = [row[: args.prompt] for row in rows(64)], noise(torch.Generator(), 64, args.response)

    def sample():
        with unsharded(model):
            generate(model, prompts, uniforms, LogitRules())

    moved = args.response * (lm_bytes + 64 * cache * (args.prompt + args.response / 2))
    found.append(timed("rollout, batch 64,", "tokens", 64 * args.response * world, sample, moved=moved))

    reference = prepare(frozen(LlamaForCausalLM(config).eval(), dtype), dtype, device)
    scored = versus.forward_flops(config, length, args.response, length)
    pairs = [dpo.Pair(*(array("i", part) for part in (row[: args.prompt], row[args.prompt :], row[: args.prompt - 1
                        : -1])), *[bytes([1] * args.response)] * 2) for row in rows(batch)]
    settings = dpo.Args(micro_batch_size=args.micro_batch)
    score = lambda part: reference(**part, with_entropy=False)["logprobs"]  # noqa: E731
    found.append(timed("DPO", "pairs", batch, lambda: step(model, optimizer, lambda: dpo.batch_metrics(
        model, score, pairs, True, settings)), batch * 4 * versus.forward_flops(
            config, length + args.response, 2 * args.response, length)))
    model = optimizer = None  # its memory is wanted
    policy = make(head=True)
    optimizer = adamw(policy, 1e-6, (0.9, 0.95), 1e-8, 0.0)
    settings = ppo.Args(batch_size=batch, micro_batch_size=args.micro_batch, rollout_batch_size=batch)
    starts, chances = [row[: args.prompt] for row in rows(batch)], noise(torch.Generator(), batch, args.response)

    def iterate():
        items = ppo.sample_texts(policy, Letters(), starts, chances, LogitRules(), batch_size=64)
        outputs = [item["tokens"] for item in items]
        data = ppo.score_tokens(policy, lambda part: reference(**part, with_entropy=False)["logprobs"], starts, outputs,
                                LogitRules(), args.micro_batch, device)
        rewards = ppo.token_rewards([1.0] * batch, data["logprobs"] - data["ref_logprobs"], data["mask"], 0.1)
        advantages, data["returns"] = ppo.gae(rewards, data["values"], data["mask"], 1.0, 0.95)
        data["advantages"] = ppo.whiten(advantages, data["mask"])
        ppo.update(policy, optimizer, starts, outputs, data, LogitRules(), {"step": 0, "updates": 0}, 10**6, settings,
                   str)

    found.append(timed("PPO", "samples", batch, iterate, batch * scored * (1 + 2 + 3 * settings.ppo_epochs)))
    return found


class Letters:
    """A tokenizer that says nothing, since texts do not matter here."""

    def decode(self, *_, **__) -> str:
        """No text."""
        return ""


def main():
    """Run and report."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--shape", nargs="+", choices=tuple(SHAPES), default=["gpt2-small"])
    flags.add_argument("--batch", type=int, default=16, help="rows of a step on each process")
    flags.add_argument("--micro-batch", type=int, default=8)
    flags.add_argument("--prompt", type=int, default=256)
    flags.add_argument("--response", type=int, default=256)
    flags.add_argument("--repeats", type=int, default=3)
    flags.add_argument("--dtype", choices=("float32", "bfloat16"))
    flags.add_argument("--gradient-checkpointing", action="store_true")
    flags.add_argument("--peak", type=float, help="TFLOPS of one device by its data sheet")
    flags.add_argument("--json", default=None)
    args = flags.parse_args()
    found = [line for shape in args.shape for line in measure(shape, args)]
    if int(os.environ.get("RANK", 0)):
        return
    import torch

    dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    rates = versus.rates(dtype)
    peak = args.peak * 1e12 if args.peak else rates["flops"]
    lines = [["work", "per second", "figure", "seconds", "of the machine", "peak memory"]]
    for line in found:
        floor = max(line["flops"] / peak / line["world"], line["moved"] / rates["bandwidth"])
        line["share"] = floor / line["seconds"]
        lines.append([line["name"], line["unit"], f"{line['per_second']:.4g}", f"{line['seconds']:.3g}",
                      f"{line['share']:.0%} of {'bandwidth' if line['moved'] else 'matmul'}",
                      f"{line['peak'] / 2**30:.2f} GiB"])
    versus.print_table(lines)
    versus.write("throughput", {"rates": rates, "runs": found}, args.json)


if __name__ == "__main__":
    main()

"""Two programs on the same work, in turn, on one machine: what the benchmarks of speed are made of.

Each side runs in its own process, which waits while the other works. After a warm-up they take turns (A B, B A, ...),
so that a machine whose speed drifts drifts for both. Beside the ratio of each pair stand the floor, the counted
floating-point operations over the matmul rate, or the bytes over the bandwidth if that takes longer, both measured
between the pairs, and the peak of each process's memory.
"""

import argparse
import contextlib
import datetime
import functools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
COUNTS = ("tokens", "updates", "samples")  # what both sides must have done alike


def parser(document: str, **defaults) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks share."""
    flags = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--pairs", type=int, default=defaults.get("pairs", 5), help="pairs of runs")
    flags.add_argument("--threads", type=int, default=1, help="threads of each side")
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="what both compute in")
    flags.add_argument("--json", default=None, help="where the figures go; benchmarks/results/NAME.json by default")
    return flags


def peer(requirement: str) -> str:
    """A folder with another release of a package, such as trl==1.12.0, for a side to put first in sys.path."""
    folder = ROOT / "benchmarks" / ".peers" / requirement
    if not folder.exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{folder}.tmp",
                        requirement], check=True)
        os.rename(f"{folder}.tmp", folder)
    return str(folder)


class Turns:
    """A side's end of the pipe: `wait` returns when it is this side's turn, `done` hands over what the turn did."""

    def __init__(self, pipe):
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.pipe, self.begun, self.updates = pipe, 0.0, 0
        register_optimizer_step_post_hook(self._count)  # of any optimizer, on either side

    def _count(self, *_):
        self.updates += 1

    def wait(self) -> None:
        """Sleep until it is this side's turn; leave when there is none any more."""
        if not self.pipe.recv():
            sys.stdout.flush()
            os._exit(0)
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak of the resident size starts anew
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
            sys.modules["torch"].cuda.reset_peak_memory_stats()
        self.begun, self.updates = time.perf_counter(), 0

    def done(self, **counts) -> None:
        """End a turn: its seconds, its peak memory, and what it counted."""
        torch = sys.modules["torch"]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.begun
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident_peak()
        self.pipe.send({"seconds": seconds, "peak": peak, "updates": self.updates, **counts})

    def tick(self, **counts) -> None:
        """End a turn and wait for the next, for loops that are not ours."""
        self.done(**counts)
        self.wait()


def resident_peak() -> int:
    """The most bytes that were resident since the start, or since the peak was cleared."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def stopped(log: type, turns: Turns, every: int, counts: dict[str, int]) -> type:
    """Our `RunLog` with a turn that ends after every so many steps; `counts` begins anew then."""
    class Log(log):
        def metrics(self, step, values, show=()):
            super().metrics(step, values, show)
            if step and step % every == 0:
                turns.done(**counts)
                counts.update(dict.fromkeys(counts, 0))
            if step % every == 0:
                turns.wait()

    return Log


def stopped_epochs(turns: Turns, counts: dict[str, int]):
    """A callback for a trainer of transformers, with a turn that is an epoch; `counts` begins anew then."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_train_begin(self, *_, **__):
            turns.wait()

        def on_epoch_end(self, *_, **__):
            turns.done(**counts)
            counts.update(dict.fromkeys(counts, 0))
            turns.wait()

    return Stop()


def _serve(role, config, threads, pipe, log):
    os.environ.update(OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
                      HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    import torch

    torch.set_num_threads(threads)
    role(config, Turns(pipe))


def rates(dtype: str) -> dict[str, float]:
    """What the machine does: floating-point operations of large matmuls, and bytes copied, per second."""
    import torch

    cuda, kind = torch.cuda.is_available(), getattr(torch, dtype)
    device, size = ("cuda", 8192) if cuda else ("cpu", 1024)
    a, b = (torch.randn(size, size, dtype=kind, device=device) for _ in range(2))
    c, block = torch.empty_like(a), torch.zeros(2**28 if cuda else 2**25, dtype=torch.float32, device=device)
    other = torch.zeros_like(block)

    def per_second(work, amount):
        work()
        count, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < 0.4:
            work()
            if cuda:
                torch.cuda.synchronize()
            count += 1
        return amount * count / (time.perf_counter() - begun)

    return {"flops": per_second(lambda: torch.mm(a, b, out=c), 2 * size**3),
            "bandwidth": per_second(lambda: other.copy_(block), 2 * block.numel() * 4)}


def _gauge(threads: int, dtype: str, pipe) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    while pipe.recv():
        pipe.send(rates(dtype))


def compare(
    name: str, roles: dict[str, Callable], config: dict, *, pairs: int, threads: int, dtype: str = "float32",
    flops: float = 0.0, moved: float = 0.0, unit: str = "tokens", alike: tuple[str, ...] = COUNTS,
    near: tuple[str, ...] = (),
) -> dict:
    """Run the two roles in turn and return what was measured; see `row`.

    roles: name -> role(config, turns), ours first; a role sets up, then loops over turns.wait() and turns.done(counts),
    or hands turns.tick to a loop of its own. flops, moved: operations and bytes that a turn of this work needs.
    unit: the count that is reported per second. alike, near: the counts that must be equal, or within 2 %, else the run
    is worth nothing.
    """
    spawn, sides = multiprocessing.get_context("spawn"), {}
    folder = Path(os.environ.get("TMPDIR", "/tmp"))
    for side, role in roles.items():
        here, there = spawn.Pipe()
        log = folder / f"{name}-{side}.log".replace(" ", "-").replace("/", "-")
        process = spawn.Process(target=_serve, args=(role, config, threads, there, str(log)), daemon=True)
        process.start()
        there.close()
        sides[side] = (here, process, log)
    here, there = spawn.Pipe()
    gauge = spawn.Process(target=_gauge, args=(threads, dtype, there), daemon=True)
    gauge.start()

    def turn(side):
        pipe, _, log = sides[side]
        try:
            pipe.send(True)
            return pipe.recv()
        except (EOFError, BrokenPipeError):
            sys.exit(f"{name}: {side} ended:\n" + log.read_text()[-3000:])

    found, measured = {side: [] for side in roles}, []
    for side in roles:  # warm-up: first shapes, compilation, the allocator
        turn(side), turn(side)
    for number in range(pairs):
        here.send(True)
        measured.append(here.recv())
        for side in list(roles) if number % 2 == 0 else list(roles)[::-1]:
            found[side].append(turn(side))
        print(f"{name}, pair {number + 1}: "
              + ", ".join(f"{side} {runs[-1]['seconds']:.2f} s" for side, runs in found.items()), file=sys.stderr)
    here.send(False)
    for pipe, process, _ in sides.values():
        with contextlib.suppress(BrokenPipeError):
            pipe.send(False)
        process.join(10)
        process.kill()
    first, second = found.values()
    for count, apart in [*((count, 0.0) for count in alike), *((count, 0.02) for count in near)]:
        for one, other in zip(first, second):
            if abs(one[count] - other[count]) > apart * one[count]:
                sys.exit(f"{name}: not the same work: {one[count]} {count} against {other[count]}")
    seconds = statistics.median(run["seconds"] for run in first)
    matmuls, bandwidth = (statistics.median(rate[key] for rate in measured) for key in ("flops", "bandwidth"))
    floor = max(flops / matmuls, moved / bandwidth)
    ratios = [(one[unit] / one["seconds"]) / (other[unit] / other["seconds"]) for one, other in zip(first, second)]
    result = {
        "name": name, "config": {key: value for key, value in config.items() if not key.startswith("_")},
        "unit": unit, "ratio": statistics.median(ratios), "ratios": ratios,
        **{f"{side}_per_second": statistics.median(run[unit] / run["seconds"] for run in runs)
           for side, runs in found.items()},
        **{f"{side}_peak": statistics.median(run["peak"] for run in runs) for side, runs in found.items()},
        "floor_seconds": floor, "share_of_floor": floor / seconds, "matmul_flops": matmuls, "bandwidth": bandwidth,
        "runs": found, "threads": threads, "dtype": dtype}
    return result


def report(name: str, results: list[dict], path: str | None) -> None:
    """Print one table of the results of `compare`, and write them with the machine and the commit as JSON."""
    first, second = (key[: -len("_per_second")] for key in results[0] if key.endswith("_per_second"))
    lines = [["work", "per second", first, second, "ratio (all pairs)", "of the floor", f"peak {first}",
              f"peak {second}"]]
    for result in results:
        low, high = min(result["ratios"]), max(result["ratios"])
        lines.append([result["name"], result["unit"], f"{result[first + '_per_second']:.4g}",
                      f"{result[second + '_per_second']:.4g}", f"{result['ratio']:.2f} ({low:.2f} to {high:.2f})",
                      f"{result['share_of_floor']:.0%}", f"{result[first + '_peak'] / 2**20:.0f} MiB",
                      f"{result[second + '_peak'] / 2**20:.0f} MiB"])
    print_table(lines)
    write(name, results, path)


def print_table(lines: list[list[str]]) -> None:
    """Print rows of cells as a table that Markdown reads, too."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for number, line in enumerate(lines):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |")
        if not number:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def processor() -> str:
    """The name of this machine's processor."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    return platform.machine()


def write(name: str, results, path: str | None) -> None:
    """Write results as JSON, with the machine, the versions and the commit that they are of."""
    import torch
    import transformers

    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    path = Path(path or ROOT / "benchmarks" / "results" / f"{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({
        "benchmark": name, "device": device, "cores": os.cpu_count(), "torch": torch.__version__,
        "transformers": transformers.__version__, "commit": git.stdout.strip(), "command": " ".join(sys.argv),
        "date": datetime.date.today().isoformat(), "results": results}, indent=1) + "\n")
    print(f"written to {path}")


def gpt2_small(vocabulary: int = 50257) -> dict:
    """The settings of a model of GPT-2 small's shape (Radford et al. 2019), without dropout."""
    return dict(model_type="gpt2", vocab_size=vocabulary, n_positions=1024, n_embd=768, n_layer=12, n_head=12,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


@functools.cache
def _weights(settings: str) -> tuple[int, int]:
    """How many weights the matrices of a model's blocks have, and its head."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(settings)))
    head = model.get_output_embeddings().weight
    blocks = sum(part.numel() for module in model.modules() for part in module.parameters(recurse=False)
                 if part.ndim == 2 and part is not head and not isinstance(module, torch.nn.Embedding))
    return blocks, head.numel()


def forward_flops(config, tokens: float, scored: float, length: float) -> float:
    """Floating-point operations of a forward over `tokens` tokens in rows of `length`, with logits for `scored` ones:
    two for each weight of a matrix and token, and those of causal attention."""
    blocks, head = _weights(json.dumps(config.to_dict(), default=str))
    text = config.get_text_config()
    attention = 2 * 2 * text.num_hidden_layers * text.hidden_size * length / 2
    return tokens * (2 * blocks + attention) + scored * 2 * head


def decode_bytes(config, tokens: float, rows: int, read: float) -> float:
    """Bytes that decoding so many tokens in float32 in a batch of `rows` must read: all weights for each step, and for
    each token the keys and values of the `read` tokens before it, on average."""
    text = config.get_text_config()
    return 4 * (tokens / rows * sum(_weights(json.dumps(config.to_dict(), default=str)))
                + tokens * read * 2 * text.num_hidden_layers * text.hidden_size)

"""How the time and the peak memory of PPO and SFT grow with layers, batch, prompt, output, and processes.

    python benchmarks/scaling.py

Needs no data: models are of GPT-2's shape with random weights, prompts and outputs are random tokens of fixed lengths.
One quantity at a time departs from BASE, each case runs in its own process, and a straight line is fitted to what was
measured. Seconds are the least of the timed steps, since what else the machine does only adds to them. Peak memory is
that of the resident size (on a GPU, of what torch allocated) in those steps; torch alone holds some 400 MiB of it.

Then BASE on 1 and 2 processes, with FSDP's all-gathers and reduce-scatters of a step, counted where it calls them and
told apart by phase, beside the number that there should be.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import versus  # noqa: E402  (it puts the repository before this folder)

BASE = {"layers": 4, "batch": 32, "prompt": 32, "output": 32}
VARIED = {"layers": (2, 4, 8), "batch": (16, 32, 64), "prompt": (16, 32, 64), "output": (16, 32, 64)}
WIDTH, VOCABULARY, MICRO, MINIBATCH, EPOCHS = 128, 2048, 8, 16, 2
MEASURES = {"ppo": ("rollout", "update", "peak"), "sft": ("update", "peak")}


# --- one case, in a process of its own --------------------------------------------------------------------------------


class Counter:
    """Counts of (phase, what): collectives of FSDP, forwards and micro-batches, under the phase they happen in."""

    def __init__(self):
        self.phase, self.counts = "else", {}

    def add(self, what: str) -> None:
        """One more in the present phase."""
        self.counts[f"{self.phase}: {what}"] = self.counts.get(f"{self.phase}: {what}", 0) + 1

    def counted(self, function, what: str):
        """The function, each call of which is counted."""
        def call(*args, **kwargs):
            self.add(what)
            return function(*args, **kwargs)
        return call

    def during(self, function, phase: str):
        """The function, whose time is the phase."""
        def call(*args, **kwargs):
            before, self.phase = self.phase, phase
            try:
                return function(*args, **kwargs)
            finally:
                self.phase = before
        return call


class Enough(Exception):
    """Ends a run."""


def make(folder: str, layers: int) -> None:
    """A model with random weights, and a tokenizer whose tokens are words."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    transformers.logging.disable_progress_bar()
    core = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w1"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="w0", pad_token="w0").save_pretrained(folder)
    torch.manual_seed(1)
    config = AutoConfig.for_model("gpt2", vocab_size=VOCABULARY, n_positions=256, n_embd=WIDTH, n_layer=layers,
                                  n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0,
                                  eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def run_case(case: dict, rank: int, port: int, log: str, pipe) -> None:
    """Run a few steps of the script, as torchrun would, and send what the timed ones took."""
    import random

    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case["processes"]),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    import torch
    import torch.distributed as dist

    import ppo
    import sft
    from common.distributed import broadcast, init
    from common.metrics import RunLog

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    counter, found, script = Counter(), {"rollout": [], "update": []}, {"ppo": ppo, "sft": sft}[case["script"]]
    # the two functions that FSDP2 calls (torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py)
    dist.all_gather_single = counter.counted(dist.all_gather_single, "all-gathers")
    dist.reduce_scatter_single = counter.counted(dist.reduce_scatter_single, "reduce-scatters")
    torch.Tensor.backward = counter.during(torch.Tensor.backward, "update, backward")
    script.collate = counter.counted(script.collate, "micro-batches")  # called once for each
    for name, phase in (("sample_texts", "sampling"), ("score_tokens", "scoring"), ("update", "update, forward"),
                        ("batch_loss", "update, forward")):
        if hasattr(script, name):
            setattr(script, name, counter.during(getattr(script, name), phase))
    cuda = torch.cuda.is_available()

    class Log(RunLog):
        def metrics(self, step, values, show=()):
            if step:
                found["rollout"].append(values.get("perf/rollout_seconds", 0.0))
                found["update"].append(values.get("perf/update_seconds", values.get("perf/seconds")))
            if step == 1:  # the first step is a warm-up
                found["rollout"].clear(), found["update"].clear()
                with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
                    file.write("5")
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
            if step > case["steps"]:
                raise Enough
            counter.counts.clear()

    script.RunLog = Log
    init(1)
    folder, draw = broadcast(tempfile.mkdtemp()), random.Random(1)
    path = case["model"]
    words = lambda length: " ".join(f"w{draw.randrange(1, VOCABULARY)}" for _ in range(length))  # noqa: E731
    shared = dict(model=path, micro_batch_size=MICRO, max_new_tokens=case["output"], output_dir=folder)
    with contextlib.suppress(Enough):
        if case["script"] == "ppo":
            ppo.train(
                ppo.Args(**shared, min_new_tokens=case["output"], rollout_batch_size=case["batch"], ppo_epochs=EPOCHS,
                         batch_size=MINIBATCH, total_episodes=1000 * case["batch"], num_eval_prompts=1,
                         eval_every=10**6),
                reward_fn=lambda outputs: [len(text) % 7 / 7 for text in outputs],
                prompts=[words(case["prompt"]) for _ in range(256)])
        else:
            rows = [{"prompt": words(case["prompt"]), "completion": " " + words(case["output"] - 1)}  # and its end
                    for _ in range(256)]
            sft.train(sft.Args(**shared, batch_size=case["batch"], epochs=10**4, held_out=0.0, num_eval_prompts=0,
                               eval_every=10**6), samples=rows)
    peak = torch.cuda.max_memory_allocated() if cuda else versus.resident_peak()
    pipe.send({"rollout": min(found["rollout"]), "update": min(found["update"]), "peak": peak, "runs": found,
               "counts": counter.counts})
    dist.barrier()
    dist.destroy_process_group()


# --- all cases --------------------------------------------------------------------------------------------------------


def measure(context, script: str, folder: str, steps: int, processes: int = 1, **changed) -> dict:
    """A case in processes of its own: what rank 0 found, and the largest peak of all."""
    case = {"script": script, "steps": steps * (3 if script == "sft" else 1), "processes": processes, **BASE, **changed}
    case["model"] = f"{folder}/{case['layers']}"
    if not os.path.exists(case["model"]):
        make(case["model"], case["layers"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks, found = [], []
    for rank in range(processes):
        here, there = context.Pipe(duplex=False)
        log = f"{folder}/rank-{rank}.log"
        process = context.Process(target=run_case, args=(case, rank, port, log, there), daemon=True)
        process.start()
        there.close()
        ranks.append((here, process, log))
    for here, _, log in ranks:
        try:
            found.append(here.recv())
        except EOFError:
            sys.exit(f"{case}: ended:\n" + Path(log).read_text()[-3000:])
    for _, process, _ in ranks:
        process.join()
    result = {**case, **found[0], "peak": max(one["peak"] for one in found)}
    del result["model"]
    print(f"{script} {changed or 'base'} on {processes}: rollout {result['rollout']:.2f} s, "
          f"update {result['update']:.2f} s", file=sys.stderr)
    return result


def line_through(points: list[tuple[float, float]]) -> dict:
    """The straight line of least squares: slope, value at 0, R^2, and the largest gap over the largest value."""
    mean_x, mean_y = (sum(part) / len(points) for part in zip(*points))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    start = mean_y - slope * mean_x
    gaps = [y - start - slope * x for x, y in points]
    total = sum((y - mean_y) ** 2 for _, y in points)
    return {"slope": slope, "start": start, "r2": 1 - sum(gap**2 for gap in gaps) / total if total else 1.0,
            "gap": max(map(abs, gaps)) / max(y for _, y in points)}


def expected(script: str, layers: int, processes: int) -> dict[str, int]:
    """The collectives of a step, by what is gathered when (common/distributed.py): a group for each block, one for the
    value head, and the root, which alone stays gathered from a forward to its backward, or to the next forward if there
    is no backward. One process has nothing to gather."""
    if processes == 1:
        return {}
    head = script == "ppo"
    inner = layers + head  # the groups but the root
    scored = -(-BASE["batch"] // processes // MICRO)  # micro-batches of all rows
    if script == "sft":
        return {"update, forward: all-gathers": scored * (inner + 1), "update, backward: all-gathers": scored * inner,
                "update, backward: reduce-scatters": scored * (inner + 1)}
    trained = EPOCHS * (BASE["batch"] // MINIBATCH) * -(-MINIBATCH // processes // MICRO)
    return {
        "sampling: all-gathers": inner + 1,  # once a rollout, however many tokens
        "scoring: all-gathers": 1 + scored * inner + scored * (layers + 1),  # of the policy, of the reference
        "update, forward: all-gathers": trained * (inner + 1) - 1,  # the scoring has left the root
        "update, backward: all-gathers": trained * inner,
        "update, backward: reduce-scatters": trained * (inner + 1)}


def shown(measure: str, value: float) -> str:
    """A figure as text."""
    return f"{value / 2**20:.0f}" if measure == "peak" else f"{value:.3f}"


def main():
    """Run and report."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--steps", type=int, default=4, help="timed steps of a case; thrice as many of SFT")
    flags.add_argument("--threads", type=int, default=1, help="threads of each process")
    flags.add_argument("--script", choices=("ppo", "sft"), help="one of the two")
    flags.add_argument("--only", choices=(*VARIED, "processes"), help="one of the quantities")
    flags.add_argument("--json", default=None, help="where the figures go; benchmarks/results/scaling.json by default")
    args = flags.parse_args()
    os.environ.update(OMP_NUM_THREADS=str(args.threads), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import torch

    context = multiprocessing.get_context("forkserver")  # cases begin with all imported, and nothing else
    context.set_forkserver_preload(["ppo", "sft", "transformers.models.gpt2.modeling_gpt2"])
    folder, cases, fits = tempfile.mkdtemp(), [], []
    scripts = [args.script] if args.script else list(MEASURES)
    lines = [["script", "varied", "value", "rollout, s", "update, s", "peak, MiB"]]
    fitted = [["script", "varied", "measure", "slope", "at 0", "R2", "largest gap", "last / first"]]

    def show(varied, value, case):
        rollout = shown("rollout", case["rollout"]) if case["script"] == "ppo" else ""
        lines.append([case["script"], varied, str(value), rollout, shown("update", case["update"]),
                      shown("peak", case["peak"])])

    for script in scripts:
        known = {}  # the base belongs to each quantity
        for varied in [name for name in VARIED if args.only in (None, name)]:
            found = []
            for value in VARIED[varied]:
                key = json.dumps({**BASE, varied: value})
                if key not in known:
                    known[key] = measure(context, script, folder, args.steps, **{varied: value})
                    cases.append(known[key])
                found.append((value, known[key]))
                show(varied, value, known[key])
            for name in MEASURES[script]:
                line = line_through([(value, case[name]) for value, case in found])
                growth = found[-1][1][name] / found[0][1][name]
                fits.append({"script": script, "varied": varied, "measure": name, "growth": growth, **line})
                slope = f"{line['slope'] / 2**20:.3g} MiB" if name == "peak" else f"{1000 * line['slope']:.3g} ms"
                fitted.append([script, varied, name, slope, shown(name, line["start"]), f"{line['r2']:.4f}",
                               f"{line['gap']:.1%}", f"{growth:.2f}"])
    counted, wrong = [["script", "processes", "phase", "micro-batches", "collectives", "counted", "expected"]], []
    for script in scripts if args.only in (None, "processes") else []:
        for processes in (1, 2) if torch.cuda.device_count() != 1 else (1,):  # NCCL wants a GPU for each
            case = measure(context, script, folder, args.steps, processes)
            cases.append(case)
            show("processes", processes, case)
            wanted = case["expected"] = expected(script, BASE["layers"], processes)
            counts = case["counts"]
            told = [*wanted, *(key for key in counts if key not in wanted and not key.endswith("micro-batches"))]
            for key in told or ["all: all-gathers"]:
                phase, what = key.split(": ")
                micro = counts.get(f"{phase.replace('backward', 'forward')}: micro-batches", "")
                counted.append([script, str(processes), phase, str(micro), what, str(counts.get(key, 0)),
                                str(wanted.get(key, 0))])
                if counts.get(key, 0) != wanted.get(key, 0):
                    wrong.append(f"{script} on {processes} processes, {key}: {counts.get(key, 0)}, "
                                 f"not {wanted.get(key, 0)}")
    versus.print_table(lines)
    for more in (fitted, counted):
        if len(more) > 1:
            print()
            versus.print_table(more)
    versus.write("scaling", {"base": BASE, "width": WIDTH, "vocabulary": VOCABULARY, "micro_batch": MICRO,
                             "minibatch": MINIBATCH, "epochs": EPOCHS, "threads": args.threads, "cases": cases,
                             "fits": fits}, args.json)
    if wrong:
        sys.exit("not the expected collectives: " + "; ".join(wrong))


if __name__ == "__main__":
    main()

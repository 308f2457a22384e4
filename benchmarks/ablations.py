"""What breaks when it is wrong: faults that others had, or that are easily made, each as a change of a line or two of
a script (or a flag), and their effect on random walks against the script as it is, over the same seeds and graphs.

    OMP_NUM_THREADS=1 python benchmarks/ablations.py --script ppo.py [--faults NAME ...] [--seeds 1 2 3 4 5] [--jobs 2]
    python benchmarks/ablations.py --script ppo.py --diff NAME    # the change, to make it yourself
    python benchmarks/ablations.py --write    # the tables of docs/, from benchmarks/results/ablations.json

Runs go on where they were interrupted: what stands in the results is not run again, unless --keep wants its log; take
rows out of the file to measure them anew. Each runs in a copy of the scripts and common/, so that the checkout stays as
it is.
"""

import difflib
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from plot import interval  # noqa: E402
from versus import processor  # noqa: E402

import common.checkpoint  # noqa: E402, F401  with common.models: what all runs import, once
import common.models  # noqa: E402, F401
from common.cli import UserError, leave, parse  # noqa: E402
from common.randomwalks import cloned_walker, random_walks, tokenizer  # noqa: E402

RESULTS = ROOT / "benchmarks/results/ablations.json"


@dataclass
class Args:
    """Faults of a script and their effect. The head of ablations.py explains it."""

    script: str = ""
    """ppo.py, sft.py, ilql.py or dpo.py"""
    faults: list[str] = field(default_factory=list)
    """which ones; none: all of the script"""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    """each with a graph of its own"""
    jobs: int = 1
    """runs at the same time"""
    keep: str = ""
    """keep the logs of the runs in this folder, for plot.py; runs without a log there are run again"""
    diff: str = ""
    """print what this fault changes, and end"""
    write: bool = False
    """write the tables into docs/, and end"""


class Fault(NamedTuple):
    """A change of the code: (file, old text, new text), each found once; or flags; or both."""

    name: str
    where: str  # the function that is changed
    what: str  # what is wrong, and who had it
    edits: list[tuple[str, str, str]] = []
    flags: str = ""


# What a run of each script is given, and which numbers of its last line are watched beside optimality
BASE = {"ppo.py": "--reward randomwalks --total-episodes 5120 --eval-every 1000",
        "sft.py": "--eval-every 1000",
        "ilql.py": "--epochs 10 --beta 100 --eval-every 1000",
        "dpo.py": "--dataset randomwalks --epochs 1 --eval-every 1000"}
WATCHED = {"ppo.py": ["eval/invalid", "eval/length", "rollout/kl", "value/explained_variance"],
           "sft.py": ["eval/invalid", "eval/length", "eval/loss"],
           "ilql.py": ["eval/invalid", "value/q", "value/v", "loss/q"],
           "dpo.py": ["eval/invalid", "eval/length", "eval/accuracy", "eval/margin", "eval/kl"]}
LOAD = ("common/models.py", "return auto.from_pretrained(path, dtype=torch.float32, **NO_CODE).eval()",
        "return auto.from_pretrained(path, dtype=torch.float32, **NO_CODE).train()")
FAULTS = {
    "ppo.py": [
        Fault("score-late", "`token_rewards`, `gae`", "the score two tokens behind the last one, where padding is, as "
              "trlX has it: it reaches the output only through lambda squared", [
                  ("ppo.py", "last = mask.long().sum(1) - 1", "last = (mask.sum(1) + 1).clamp(max=mask.shape[1] - 1)"),
                  ("ppo.py", "following = (delta + gamma * lam * following) * mask[:, t]",
                   "following = delta + gamma * lam * following")]),
        Fault("end-untrained", "`train`", "the end token has no gradient, as in trlX where pad and EOS are one token: "
              "when to stop is not learned", [
                  ("ppo.py", 'data["advantages"] = whiten(advantages, mask)',
                   'data["advantages"] = whiten(advantages, mask) * (torch.arange(mask.shape[1]) < mask.sum(1)[:, None]'
                   " - torch.tensor(finished)[:, None].long())")]),
        Fault("value-late", "`gae`", "the value of the state after each token in place of the one before it", [
            ("ppo.py", 'gae(rewards, data["values"], mask', 'gae(rewards, data["values"].roll(-1, 1), mask')]),
        Fault("not-whitened", "`whiten`", "advantages as they come", [
            ("ppo.py", 'data["advantages"] = whiten(advantages, mask)', 'data["advantages"] = advantages')]),
        Fault("whitened-with-padding", "`whiten`", "mean and variance over padding too, as in trlX", [
            ("ppo.py", 'data["advantages"] = whiten(advantages, mask)',
             'data["advantages"] = whiten(advantages, torch.ones_like(mask))')]),
        Fault("rewards-shifted", "`whiten`", "`--whiten-rewards` that shifts the mean: each token is paid, or fined, "
              "for being there", [("ppo.py", "whiten(rewards, mask, shift_mean=False)", "whiten(rewards, mask)")],
              "--whiten-rewards"),
        Fault("mean-of-means", "`add_gradient`", "a mean over each micro-batch, and then over micro-batches: a token "
              "of a short output weighs more, and the memory you have decides by how much", [
                  ("ppo.py", "(loss * world / tokens).backward()",
                   "(loss * world / inside.sum() * args.micro_batch_size / len(mine)).backward()")],
              "--micro-batch-size 8"),
        Fault("not-clipped", "`policy_loss`", "no clipping of the ratio", flags="--clip-range 1e9"),
        Fault("no-kl", "`token_rewards`", "no KL penalty, trlX's own setting for this task", flags="--kl-coef 0"),
        Fault("top-k-rollouts", "`train`", "rollouts from the 5 likeliest tokens, trained as if from all", [
            ("ppo.py", "items = sample_texts(model, tokenizer, batch_prompts, uniforms, rules,",
             "items = sample_texts(model, tokenizer, batch_prompts, uniforms, rules, top_k=5,")]),
        Fault("rough-softmax", "`LogitRules`", "log-softmax in bfloat16, in rollouts and updates", [
            ("common/models.py", "logits = logits.float()\n        if self.temperature not in",
             "logits = logits.bfloat16()\n        if self.temperature not in")]),
        Fault("positions-forgotten", "`positions`", "left-padded rows whose positions count the pads, as they do where "
              "position ids are left out; here rows that join a batch are padded so", [
                  ("common/models.py", "return (mask.long().cumsum(1) - 1).clamp(min=0)",
                   "return torch.arange(mask.shape[1], device=mask.device).expand_as(mask)")]),
        Fault("dropout", "`load_lm`", "dropout left on, as model classes come", [LOAD]),
        Fault("temperature-forgotten", "`LanguageModel._score`", "outputs sampled at temperature 0.7 and scored at 1", [
            ("common/models.py", "logprobs = rules(self.logits(states), previous, index).log_softmax(-1)",
             "logprobs = self.logits(states).float().log_softmax(-1)")], "--temperature 0.7"),
        Fault("reference-short", "`build`", "a reference without its first block, as trlX makes when no layers are "
              "frozen", [("ppo.py", "    lora = twin = None",
                          "    lora, twin = None, load_lm(path); del twin.transformer.h[0]")])],
    "sft.py": [
        Fault("end-untrained", "`make_examples`", "the end token is not trained, as with trlX's texts and wherever "
              "pads are masked by id and pad is EOS", [
                  ("sft.py", "trained = bytes(map(bool, example.trained))",
                   'trained = bytes(map(bool, example.trained))[:-1] + b"\\0"')]),
        Fault("not-shuffled", "`train`", "rows in the order of the file, as in trlX; here they come sorted", [
            ("sft.py", "batch = [examples[shuffled(place, len(examples), args.seed)] for place in places]",
             "batch = [sorted(examples)[place % len(examples)] for place in places]")]),
        Fault("shifted", "`LanguageModel.forward`", "the log-prob of a token from the state that has read it", [
            ("common/models.py", "states, previous, targets = hidden[rows, columns], ids",
             "states, previous, targets = hidden[rows, columns + 1], ids")]),
        Fault("rows-not-apart", "`micro_batches`", "rows that share a line see each other: positions that do not start "
              "again", [("sft.py", "[[i for part in line for i in range(len(part.prompt) + len(part.output))] "
                         "for line in chosen]", "[list(range(len(output))) for output in outputs]")],
              "--packing rows"),
        Fault("mean-of-means", "`batch_loss`", "a mean over each micro-batch, and then over micro-batches", [
            ("sft.py", "(loss * world / tokens).backward()",
             "(loss * world / len(weight) * micro_batch_size / len(examples)).backward()")], "--micro-batch-size 5"),
        Fault("dropout", "`untrained_walker`", "dropout left on, in training and in sampling", [
            ("common/randomwalks.py", "pad_token_id=codec.pad_token_id)).eval()",
             "pad_token_id=codec.pad_token_id)).train()")])],
    "ilql.py": [
        Fault("targets-once-a-pass", "`train`", "targets follow once a pass over the data, as in trlX since 2023",
              flags="--sync-every 10"),
        Fault("targets-never", "`train`", "they never do, as in trlX's sentiment example, which looks after each pass "
              "whether the steps so far are a multiple of 5", flags="--sync-every 100000"),
        Fault("next-state-early", "`transitions`", "Q regresses to the value of the state the action was taken in", [
            ("ilql.py", "next_state += [*range(first + 1, first + len(item.actions)), beyond if goes_on else 0]",
             "next_state += [*range(first, first + len(item.actions) - 1), beyond if goes_on else 0]")]),
        Fault("no-terminal", "`td_targets`", "the last action is bootstrapped too, from some other row's state", [
            ("ilql.py", "return rewards + gamma * next_values.detach() * ~terminal",
             "return rewards + gamma * next_values.detach()")]),
        Fault("expectile-turned", "`expectile_loss`", "the weights the other way round: V is the worst of the data", [
            ("ilql.py", "torch.where(u < 0, 1 - tau, tau)", "torch.where(u < 0, tau, 1 - tau)")]),
        Fault("larger-q", "`ilql_loss`, `steer`", "the larger of the two Qs", [
            ("ilql.py", '[:, 0] for name in q_names(out)]).amin(0)', '[:, 0] for name in q_names(out)]).amax(0)'),
            ("ilql.py", "(states) for name in names]).amin(0)", "(states) for name in names]).amax(0)")]),
        Fault("no-cql", "`cql_loss`", "nothing lowers Q of tokens that the data does not have", flags="--cql-scale 0")],
    "dpo.py": [
        Fault("no-reference", "`pair_loss`", "log-probs of the policy alone", [
            ("dpo.py", "preference_loss(policy, reference, args)",
             "preference_loss(policy, torch.zeros_like(reference), args)")]),
        Fault("reference-moves", "`load_models`", "the reference is the model that is trained, as the embeddings of "
              "trlX's are when no layers are frozen", [
                  ("dpo.py", "reference = prepare(frozen(twin, dtype), dtype, device, **options) if twin else model",
                   "reference = model")]),
        Fault("means", "`pair_loss`", "log-probs averaged over an output's tokens, not summed",
              flags="--logprobs mean"),
        Fault("end-untrained", "`make_pairs`", "without the end token in either output", flags="--no-train-eos"),
        Fault("no-sft", "`pair_loss`", "the paper's loss alone, without the chosen output's likelihood",
              flags="--sft-coef 0"),
        Fault("dropout", "`load_lm`", "dropout left on", [LOAD])],
}


# --- running ----------------------------------------------------------------------------------------------------------


def changed(fault: Fault) -> dict[str, tuple[str, str]]:
    """Of each file that the fault changes, the text before and after. Raises UserError where the code has moved on."""
    texts = {}
    for file, old, new in fault.edits:
        before, after = texts.get(file) or ((ROOT / file).read_text(),) * 2
        if after.count(old) != 1:
            raise UserError(f"{fault.name}: {file} has '{old}' {after.count(old)} times, not once; mend the fault")
        texts[file] = before, after.replace(old, new)
    return texts


def forked(folder: Path, script: str, words: list[str]) -> tuple[int, str]:
    """Run the script of the folder with its own common/, as `python SCRIPT WORDS` there, but forked from this process,
    which has imported torch and transformers: exit code and what it printed."""
    child = os.fork()
    if not child:
        code = 1
        try:
            os.chdir(folder)
            log = os.open("log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1), os.dup2(log, 2)
            for name in [name for name in sys.modules if name.split(".")[0] == "common"]:
                del sys.modules[name]
            sys.argv, sys.path[0] = [script, *words], str(folder)
            runpy.run_path(script, run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code or 0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), (folder / "log").read_text()


def kept_log(keep: str, script: str, fault: str, seed: int) -> Path:
    """Where --keep puts a run's log."""
    return Path(keep) / f"{script.removesuffix('.py')}-{fault.replace(' ', '-')}-{seed}"


def run(script: str, fault: Fault, seed: int, work: Path, keep: str) -> dict:
    """One run in a copy of the code: the watched numbers of its last line, or the line with which it was refused. With
    `keep` its log stays in that folder, its settings with the fault's name among them, by which plot.py tells it."""
    folder = work / f"{script}-{fault.name}-{seed}"
    shutil.copytree(ROOT / "common", folder / "common", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / script, folder)
    for file, (_, after) in changed(fault).items():
        (folder / file).write_text(after)
    words = [*BASE[script].split(), *fault.flags.split(), "--seed", str(seed), "--output-dir", "run"]
    if script in ("ppo.py", "dpo.py"):
        words += ["--model", str(work / f"start-{seed}")]
    code, log = forked(folder, script, words)
    made = {"script": script, "fault": fault.name, "seed": seed}
    if code not in (0, 2):  # 2: the script has said in one line what is wrong
        raise UserError(f"{script}, {fault.name}, seed {seed}: exit code {code}\n{log[-3000:]}")
    if code:
        made["refused"] = log.strip().splitlines()[-1]
    else:
        last = json.loads((folder / "run/metrics.jsonl").read_text().splitlines()[-1])
        made |= {name: round(last[name], 5) for name in ["eval/optimality", *WATCHED[script]]}
    if keep and not code:
        kept = kept_log(keep, script, fault.name, seed)
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "run/metrics.jsonl", kept)
        settings = (folder / "run/args.yaml").read_text().replace(str(work / f"start-{seed}"), "start")
        (kept / "args.yaml").write_text(f"{settings}fault: {fault.name}\n")
    shutil.rmtree(folder)
    return made


def git(*words: str) -> str:
    """What git says of the checkout."""
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def run_all(args: Args) -> None:
    """All runs that the results do not have yet, each written down as it ends."""
    if args.script not in FAULTS:
        raise UserError(f"--script {args.script}: must be one of {', '.join(FAULTS)}")
    faults = {fault.name: fault for fault in [Fault("as it is", "", ""), *FAULTS[args.script]]}
    for name in args.faults:
        if name not in faults:
            raise UserError(f"--faults {name}: {args.script} has {', '.join(faults)}")
    machine, lock = processor(), threading.Lock()
    rows = {(row["script"], row["fault"], row["seed"], row["machine"]): row for row in read_results()}
    known = {key[:3] for key, row in rows.items()
             if not args.keep or "refused" in row or kept_log(args.keep, *key[:3]).exists()}
    wanted = {(name, seed) for name in args.faults or faults for seed in args.seeds
              if (args.script, name, seed) not in known}
    # beside the script as it is on the same machine, since rounding differs between them: see `page`
    wanted |= {("as it is", seed) for _, seed in wanted if (args.script, "as it is", seed, machine) not in rows}
    wanted = [(fault, seed) for seed in args.seeds for name, fault in faults.items() if (name, seed) in wanted]
    if not wanted:
        print(f"nothing to run: {RESULTS} has all; take rows out to measure them anew")
    commit = git("describe", "--always") + ("-dirty" if git("status", "--porcelain", "-uno", "--", "*.py") else "")
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(args.jobs) as pool:
        for seed in {seed for _, seed in wanted} if args.script in ("ppo.py", "dpo.py") else ():
            cloned_walker(random_walks(seed), seed).save_pretrained(f"{work}/start-{seed}")
            tokenizer().save_pretrained(f"{work}/start-{seed}")

        def one(fault: Fault, seed: int) -> None:
            row = run(args.script, fault, seed, Path(work), args.keep) | {"commit": commit, "machine": machine}
            with lock:
                rows[args.script, fault.name, seed, machine] = row
                RESULTS.write_text("[\n" + ",\n".join(json.dumps(rows[key]) for key in sorted(rows)) + "\n]\n")
                print(row, flush=True)

        for future in [pool.submit(one, *each) for each in wanted]:
            future.result()


def read_results() -> list[dict]:
    """The rows of the results, one a run."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


# --- the pages --------------------------------------------------------------------------------------------------------


def page(script: str, rows: list[dict]) -> str:
    """The faults of a script and the table of their effects, in Markdown."""
    watched, lines = WATCHED[script], []
    for fault in FAULTS[script]:
        flags = f" `{fault.flags}`" if fault.flags else ""
        lines.append(f"- **{fault.name}** ({fault.where}){flags}: {fault.what}.")
    runs = {name: {} for name in ["as it is", *(fault.name for fault in FAULTS[script])]}
    for row in (row for row in rows if row["script"] == script and row["fault"] in runs):
        runs[row["fault"]][row["seed"], row["machine"]] = row
    base = runs["as it is"]  # which a fault is compared with by seed and machine
    lines += ["", f"| change | optimality | difference (95 % interval) | {' | '.join(watched)} |",
              "|---|---|---|" + "---|" * len(watched)]
    for name, found in runs.items():
        refused = sorted({row["refused"] for row in found.values() if "refused" in row})
        if len(found) < 5 and not refused:  # too few seeds for a figure
            continue
        trained = {key: row for key, row in found.items() if "refused" not in row}
        if not trained:
            message = refused[0].removeprefix(f"{script}: error: ")
            cells = [f"refused at the start: \"{message}\"", *[""] * (len(watched) + 1)]
        else:
            numbers = {key: [row[key] for row in trained.values()] for key in ["eval/optimality", *watched]}
            gaps = [row["eval/optimality"] - base[key]["eval/optimality"] for key, row in trained.items()]
            gap, spread = interval(gaps)
            gap = "" if name == "as it is" else f"{gap:+.3f} ({gap - spread:+.3f} to {gap + spread:+.3f})"
            cells = [f"{mean(numbers['eval/optimality']):.3f}", gap]
            for key in watched:
                change, spread = interval([row[key] - base[each][key] for each, row in trained.items()])
                cells.append(f"**{mean(numbers[key]):.3g}**" if abs(change) > spread else f"{mean(numbers[key]):.3g}")
        stopped = len(found) - len(trained)
        name += f", {stopped} of {len(found)} seeds refused at the start" if trained and stopped else ""
        lines.append(f"| {name} | {' | '.join(cells)} |")
    made = {f"{row['commit']} ({row['machine']})" for found in runs.values() for row in found.values()}
    lines += ["", "Bold: the 95 % interval of the difference to the script as it is, paired by seed, leaves 0 out. One "
              f"core for each run; commits: {', '.join(sorted(made))}."]
    return "\n".join(lines)


def write_pages() -> None:
    """Put the tables between the marks that docs/SCRIPT.md has for them."""
    for script in FAULTS:
        path = ROOT / "docs" / f"{script.removesuffix('.py')}.md"
        text = path.read_text()
        head, rest = text.split("<!-- faults: by benchmarks/ablations.py --write -->\n")
        _, tail = rest.split("<!-- end -->")
        path.write_text(f"{head}<!-- faults: by benchmarks/ablations.py --write -->\n{page(script, read_results())}\n"
                        f"<!-- end -->{tail}")


def show(name: str, scripts: list[str]) -> None:
    """Print what a fault changes, as a diff and flags, of these scripts."""
    found = [(script, fault) for script in scripts for fault in FAULTS[script] if fault.name == name]
    if not found:
        names = ", ".join(fault.name for script in scripts for fault in FAULTS[script])
        raise UserError(f"--diff {name}: no fault is called so, only {names}")
    for script, fault in found:
        print(f"{script} {fault.flags}".strip())
        for file, (before, after) in changed(fault).items():
            print("".join(difflib.unified_diff(before.splitlines(True), after.splitlines(True), file, file, n=1)))


def main() -> None:
    """Run, show or write, as the flags say."""
    try:
        args = parse(Args)
        if args.jobs < 1 or min(args.seeds, default=0) < 0:
            raise UserError("--jobs must be 1 or more, and --seeds 0 or more")
        if args.diff:
            show(args.diff, [args.script] if args.script in FAULTS else list(FAULTS))
        elif args.write:
            write_pages()
        else:
            run_all(args)
    except UserError as error:
        leave(2, f"error: {error}")


if __name__ == "__main__":
    main()

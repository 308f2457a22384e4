"""A script over flags and seeds, as a small YAML file says: a grid or random draws, several runs at a time, one table.

    python benchmarks/sweep.py sweep.yaml [--jobs 4] [--dry-run]

    script: ppo.py
    seeds: [1, 2, 3]
    metric: eval/optimality            # any that the script logs
    goal: maximize                     # or minimize
    method: grid                       # or random, with `runs: 20`, the number of settings, and its own `seed: 1`
    flags: {total-episodes: 2560}      # of every run
    grid:                              # values to try; with random also {min: 1.0e-5, max: 1.0e-3, log: true}
      learning-rate: [1.0e-4, 3.0e-4]
      kl-coef: [0.0, 0.05]
    processes: 2                       # each run by torchrun on so many; left out: plain python
    name: first                        # the folder in runs/sweeps; left out: the name of the file

Paths are relative to the folder that you are in. Each run has one thread unless OMP_NUM_THREADS says otherwise, and its
own GPUs where there are several. Each has a directory in runs/sweeps/NAME, with a log and its command in sweep.json;
after each, table.md and table.csv are written anew: mean over seeds with a 95 % t-interval, at the end of the runs and
at their best.

The same command again goes on: a finished run is not run again, one that was interrupted resumes from its newest
checkpoint, or starts afresh where there is none, one that failed is tried again. Ctrl-C lets each run write a
checkpoint and end; twice kills them. Seeds, values and draws may be added, and metric and goal changed: what is
finished counts.
"""

import csv
import difflib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from tyro.conf import Positional

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from plot import interval, number, read_rows  # noqa: E402

from common.checkpoint import lock  # noqa: E402
from common.cli import UserError, leave, parse  # noqa: E402

OWN = ("seed", "output_dir", "resume", "replay")  # flags that the sweep sets, or that mean nothing in one


@dataclass
class Args:
    """Run a script over flags and seeds. The head of sweep.py explains the file."""

    file: Positional[str] = ""
    """what to run, a YAML file"""
    jobs: int = 1
    """runs at the same time"""
    dry_run: bool = False
    """check everything, print the commands, and end"""


# --- the file ---------------------------------------------------------------------------------------------------------


@dataclass
class Sweep:
    """What the YAML file says; see the head of this file."""

    script: str = ""
    metric: str = ""
    seeds: list = field(default_factory=list)
    goal: str = "maximize"
    method: str = "grid"
    runs: int = 0
    seed: int = 1
    flags: dict = field(default_factory=dict)
    grid: dict = field(default_factory=dict)
    processes: int = 0
    name: str = ""


def read_sweep(path: str) -> Sweep:
    """The file, its keys and values checked. Raises UserError that names the key."""
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}" if path else "give the YAML file of a sweep") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold 'key: value' lines, not a {type(found).__name__}")
    kinds = {key: type(value) for key, value in asdict(Sweep()).items()}
    names = {str: "a text", int: "a whole number", list: "a list", dict: "'flag: value' lines"}
    for key, value in found.items():
        if key not in kinds:
            raise UserError(f"{path}: no key is called '{key}'{hint(key, kinds)}")
        if type(value) is not kinds[key]:
            raise UserError(f"{path}: {key}: is {value!r}; it must be {names[kinds[key]]}")
    sweep = Sweep(**{"name": Path(path).stem, **found})
    sweep.flags, sweep.grid = ({str(flag).replace("_", "-"): value for flag, value in part.items()}
                               for part in (sweep.flags, sweep.grid))
    drawn = sweep.method == "random"
    rules = [(key, not getattr(sweep, key), "is missing") for key in ("script", "metric", "seeds")] + [
        ("goal", sweep.goal not in ("maximize", "minimize"), "must be maximize or minimize"),
        ("method", sweep.method not in ("grid", "random"), "must be grid or random"),
        ("runs", drawn and sweep.runs < 1, "method random needs a number of settings to draw"),
        ("runs", not drawn and sweep.runs, "is for method random; a grid has as many as it has"),
        ("seeds", not all(type(seed) is int and seed >= 0 for seed in sweep.seeds), "must be whole numbers from 0"),
        ("seeds", len(set(map(str, sweep.seeds))) < len(sweep.seeds), "has one twice"),
        ("processes", sweep.processes < 0, "must be 1 or more"),
        ("name", not re.fullmatch(r"\w[\w.+=-]*", sweep.name), "must be the name of a folder")]
    for flag, values in sweep.grid.items():
        rules.append((f"grid: {flag}", flag in sweep.flags, "stands in flags, too"))
        if isinstance(values, dict) and drawn:
            rules.append((f"grid: {flag}", not bounds(values), "must be {min: 1.0e-5, max: 1.0e-3}, min less than max, "
                          "and with log: true more than 0"))
        else:
            rules.append((f"grid: {flag}", not (values and isinstance(values, list)), "must be a list of values"
                          + " or {min:, max:, log: true}" * drawn))
    for key, wrong, why in rules:
        if wrong:
            raise UserError(f"{path}: {key}: {why}")
    return sweep


def bounds(space: dict) -> tuple | None:
    """min, max and log of a range to draw from; None where it is none. 1e-5 is a text to YAML, but a number here."""
    try:
        low, high = (space[end] if type(space[end]) is int else float(space[end]) for end in ("min", "max"))
    except (KeyError, TypeError, ValueError):
        return None
    log = space.get("log", False)
    sound = type(log) is bool and set(space) <= {"min", "max", "log"} and low < high < math.inf
    return (low, high, log) if sound and low > (0 if log else -math.inf) else None


def hint(name, names) -> str:
    """The end of a message about a name that does not exist."""
    near = difflib.get_close_matches(str(name), names, 1)
    return f"; did you mean '{near[0]}'?" if near else ""


def settings_of(sweep: Sweep) -> list[dict]:
    """The settings to compare: the whole grid; or random draws, of which the first are the same for any number."""
    if sweep.method == "grid":
        return [dict(zip(sweep.grid, values)) for values in itertools.product(*sweep.grid.values())]
    chance = random.Random(sweep.seed)

    def draw(space):
        if isinstance(space, list):
            return chance.choice(space)
        low, high, log = bounds(space)
        value = math.exp(chance.uniform(math.log(low), math.log(high))) if log else chance.uniform(low, high)
        return round(value) if type(low) is type(high) is int else float(f"{value:.4g}")

    return [{flag: draw(space) for flag, space in sweep.grid.items()} for _ in range(sweep.runs)]


# --- the runs ---------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One setting, by its number, with one seed: its directory, its words on the command line, and all settings as the
    script reads them."""

    setting: int
    seed: int
    folder: Path
    words: list[str]
    settings: dict


def to_words(flags: dict) -> list[str]:
    """Flags as words of a command line."""
    words = []
    for name, value in flags.items():
        values = [] if isinstance(value, bool) else value if isinstance(value, list) else [value]
        words += [f"--no-{name}" if value is False else f"--{name}", *map(str, values)]
    return words


def load_script(path: str):
    """The script as a module."""
    try:
        spec = importlib.util.spec_from_file_location(f"swept_{Path(path).stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except Exception as error:  # whatever is wrong in it
        raise UserError(f"script: {path} cannot be imported: {type(error).__name__}: {error}") from None


def plan(sweep: Sweep, path: str) -> tuple[list[dict], list[Run]]:
    """The settings and their runs, first all of the first seed, their flags read and checked as the script does it.
    Raises UserError for what it would refuse, before anything runs."""
    script = load_script(sweep.script)
    known = [flag.name.replace("_", "-") for flag in fields(script.Args)]
    for where, flag in [*(("flags", flag) for flag in sweep.flags), *(("grid", flag) for flag in sweep.grid)]:
        if flag not in known:
            raise UserError(f"{path}: {where}: no flag of {sweep.script} is called '{flag}'{hint(flag, known)}")
        if flag.replace("-", "_") in OWN:
            raise UserError(f"{path}: {where}: {flag} is not for sweeps, which set it themselves")
    settings, runs, seen = [], [], []
    for setting in settings_of(sweep):
        text = ",".join(f"{flag}={value}" for flag, value in setting.items()) or "run"
        name = re.sub(r"[^\w.,=+-]", "_", text)[:100]
        name += f"-{zlib.crc32(text.encode()):08x}" if name != text else ""
        mine = []
        for seed in sweep.seeds:
            folder = Path("runs/sweeps", sweep.name, f"{name},seed={seed}")
            words = to_words({**sweep.flags, **setting, "seed": seed, "output-dir": str(folder)})
            mine.append(Run(len(settings), seed, folder, words, {}))
        try:
            args = parse(script.Args, getattr(script, "preset", None), [*mine[0].words, "--resume", "auto"])
            getattr(script, "check", lambda _: None)(args)
        except UserError as error:
            raise UserError(f"{path}: {text}: {error}") from None
        read = {name: value for name, value in asdict(args).items() if name not in (*OWN, "config")}
        read = json.loads(json.dumps(read, default=str))  # as it will be read back
        if read in seen:
            print(f"{text}: means the same as another setting, and is left out")
        else:
            settings.append(setting), seen.append(read)
            runs += [run._replace(settings=read) for run in mine]
    if ":" not in str(seen[0].get("metric")):  # a user's own function may name its metrics as it likes
        check_metric(sweep, path)
    return settings, sorted(runs, key=lambda run: sweep.seeds.index(run.seed))


def check_metric(sweep: Sweep, path: str) -> None:
    """Refuse a metric with a word that stands nowhere in the script and in common/; the rest the first run shows."""
    source = "".join(file.read_text(encoding="utf-8") for file in [Path(sweep.script), *ROOT.glob("common/*.py")])
    words = set(re.findall("[A-Za-z0-9]+", source))
    for word in set(re.findall("[A-Za-z0-9]+", sweep.metric.split("@")[0])) - words:
        raise UserError(f"{path}: metric: {sweep.script} logs no '{sweep.metric}': nothing there has the name '{word}'"
                        + hint(word, words))


def command(sweep: Sweep, words: list[str], python=("python",), torchrun=("torchrun",)) -> list[str]:
    """The script with these words, as one types it or as this machine runs it."""
    launcher = [*torchrun, "--nproc_per_node", str(sweep.processes)] if sweep.processes else python
    return [*launcher, sweep.script, *words]


def complete(run: Run) -> bool:
    """Whether the directory holds what a run leaves at its end."""
    return (run.folder / "model").exists() and (run.folder / "metrics.jsonl").exists()


def state(run: Run) -> str:
    """new, begun or finished. Raises UserError where the directory holds something else."""
    if not run.folder.exists():
        return "new"
    try:
        note = json.loads((run.folder / "sweep.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{run.folder}: is not of a sweep; delete it, or give the sweep another name") from None
    before = note["settings"]
    for name in {**run.settings, **before}:
        if run.settings.get(name) != before.get(name):
            raise UserError(f"{run.folder}: was run with --{name.replace('_', '-')} {before.get(name)}, which is "
                            f"{run.settings.get(name)} now; delete the folder, or give the sweep another name")
    return "finished" if note["finished"] and complete(run) else "begun"


def take_down(run: Run, line: str, finished: bool) -> None:
    """Write the note of a run, whole or not at all."""
    note = {"command": line, "settings": run.settings, "finished": finished}
    (run.folder / "sweep.tmp").write_text(json.dumps(note, indent=1))
    os.replace(run.folder / "sweep.tmp", run.folder / "sweep.json")


def gpus(slot: int, processes: int) -> dict[str, str]:
    """The environment that gives the run in a slot GPUs of its own, where there are several and enough for it."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    named = named.split(",")
    mine = [named[(slot * processes + i) % len(named)] for i in range(processes)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine)} if processes <= len(named) > 1 else {}


def start(sweep: Sweep, run: Run, slot: int) -> subprocess.Popen:
    """The run as a process in a session of its own, so that Ctrl-C reaches the sweep alone."""
    words = [*run.words, "--resume", "auto"] if run.folder.exists() else run.words
    run.folder.mkdir(parents=True, exist_ok=True)
    take_down(run, shlex.join(command(sweep, words)), False)
    python = (sys.executable,)
    torchrun = (*python, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
    with open(run.folder / "log", "a") as log:
        print("$", shlex.join(command(sweep, words)), file=log, flush=True)
        return subprocess.Popen(
            command(sweep, words, python, torchrun), start_new_session=True, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, env={"OMP_NUM_THREADS": "1", **os.environ, **gpus(slot, sweep.processes or 1)})


def last_words(run: Run, script: str) -> str:
    """The last line of a run's log, or of the script's own where torchrun speaks after it."""
    lines = (run.folder / "log").read_text(errors="replace").rsplit("\n$ ", 1)[-1].splitlines()[1:]  # this attempt's
    said = [line for line in lines if re.match(rf"(\[rank \d+\] )?{re.escape(Path(script).name)}: ", line)]
    return ([line.strip() for line in said or lines if line.strip()] or ["nothing was said"])[-1]


def run_all(todo: list[Run], jobs: int, begin: Callable, end: Callable) -> list[int]:
    """Run all, `jobs` at a time: begin(run, slot) starts one, end(run, code, told) hears of its end and returns whether
    to stop. Told to stop, by a signal or `end`, it lets the runs write checkpoints; told again, it kills them. Returns
    the signals, 0 for `end`."""
    told, heard, active, slots = [], 0, {}, list(range(jobs))
    heeded = [one for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) != signal.SIG_IGN]
    before = {one: signal.signal(one, lambda number, _: told.append(number)) for one in heeded}
    try:
        while active or (todo and not told):
            while todo and slots and not told:
                run, slot = todo.pop(0), slots.pop(0)
                active[begin(run, slot)] = run, slot
            time.sleep(0.05)
            for process in [process for process in active if process.poll() is not None]:
                run, slot = active.pop(process)
                slots.append(slot)
                if end(run, process.returncode, bool(told)):
                    told.append(0)
            if len(told) > heard:
                for process in active:
                    process.terminate() if not heard else os.killpg(process.pid, signal.SIGKILL)
                print(f"ending {len(active)} runs, which write checkpoints; a second Ctrl-C kills them", flush=True)
                heard = len(told)
    finally:  # after an error here, such as a full disk, too
        for process in active:
            process.terminate()
        for one, handler in before.items():
            signal.signal(one, handler)
    return told


# --- the table --------------------------------------------------------------------------------------------------------


def result(run: Run, sweep: Sweep) -> tuple[float, float, float]:
    """The metric at the end of a run, the best on the way, and the run's seconds. Raises UserError where it has no such
    metric."""
    rows = read_rows(run.folder)
    values = [row[sweep.metric] for row in rows if isinstance(row.get(sweep.metric), (int, float))]
    if not values:
        logged = sorted({name for row in rows for name in row})
        logged = [name for name in logged if name.startswith(sweep.metric.split("/")[0])] or logged
        raise UserError(f"metric: {run.folder} has not logged {sweep.metric}, but {', '.join(logged)}")
    best = (max if sweep.goal == "maximize" else min)(filter(number, values), default=math.nan)
    return values[-1] if number(values[-1]) else math.nan, best, rows[-1].get("seconds", math.nan)


def summary(settings: list[dict], results: dict[tuple[int, int], tuple], sweep: Sweep) -> list[dict]:
    """A row for each setting, the best first: means over its finished seeds, the ends of their 95 % t-intervals, and
    how it stands against the best. Settings that lack seeds come last: what they would have added is not known."""
    sign, rows, every = 1 if sweep.goal == "maximize" else -1, [], len(sweep.seeds)
    for i, setting in enumerate(settings):
        finals, bests, seconds = zip(*[results.get((i, seed), ()) or (None,) * 3 for seed in sweep.seeds])
        row = dict(setting)
        for name, values in (("final", finals), ("best", bests)):
            values = [value for value in values if value is not None]
            mean, half = interval(values) if values else (math.nan, math.inf)
            row |= {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}
        seconds = [value for value in seconds if value is not None]
        rows.append({**row, "seeds": len(seconds), "seconds": statistics.fmean(seconds) if seconds else math.nan})
    rows.sort(key=lambda row: (row["seeds"] < every, math.isnan(row["final"]),
                               0 if math.isnan(row["final"]) else -sign * row["final"]))
    for row in rows:
        first, second = (rows[0], row) if sign > 0 else (row, rows[0])
        row["against_best"] = (
            f"not judged: {row['seeds']} of {every} seeds" if row["seeds"] < every
            else "not judged: not a number" if math.isnan(row["final"])
            else "best" if row is rows[0] else "not judged: one seed" if every == 1
            else "tie: intervals overlap" if first["final_low"] <= second["final_high"] else "worse")
    return rows


def table(rows: list[dict], sweep: Sweep) -> str:
    """The rows as Markdown, what they say, and the best command."""
    def mean(row, name):
        half = row[f"{name}_high"] - row[name]
        return f"{row[name]:.4g}" + (f" ± {half:.2g}" if math.isfinite(half) else "")

    lines = [[*sweep.grid, f"{sweep.metric}, end", "best on the way", "seeds", "seconds", "against the best"]]
    for row in rows:
        lines.append([*(str(row[flag]) for flag in sweep.grid), mean(row, "final"), mean(row, "best"),
                      str(row["seeds"]), f"{row['seconds']:.0f}", row["against_best"]])
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    ties = sum(row["against_best"].startswith("tie") for row in rows)
    text += ["", "Means over seeds ± their 95 % t-interval" + (
        f"; {ties} of the settings cannot be told from the best by these seeds." if ties else ".")]
    if rows[0]["seeds"]:
        flags = {**sweep.flags, **{flag: rows[0][flag] for flag in sweep.grid}}
        text += ["", "Best:", "", f"    {shlex.join(command(sweep, to_words(flags)))}"]
    return "\n".join(text) + "\n"


def write_tables(folder: Path, rows: list[dict], sweep: Sweep) -> None:
    """table.md and table.csv."""
    (folder / "table.md").write_text(table(rows, sweep), encoding="utf-8")
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, list(rows[0]))
        out.writeheader()
        out.writerows({name: "" if isinstance(value, float) and not number(value) else value
                       for name, value in row.items()} for row in rows)


def main(args: Args) -> int:
    """Check all, run what is not finished, print the table; returns the exit code."""
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: must be 1 or more")
    sweep = read_sweep(args.file)
    settings, runs = plan(sweep, args.file)
    states = [state(run) for run in runs]
    if args.dry_run:
        print("\n".join(f"{shlex.join(command(sweep, run.words))}  # {now}" for run, now in zip(runs, states)))
        return 0
    folder, results, failed, stop = runs[0].folder.parent, {}, [], []
    if owner := lock(str(folder)):
        raise UserError(f"{folder}: {owner} is sweeping there; wait for it, or give the sweep another name")

    def end(run, code, told):
        if code == 0 and complete(run):
            take_down(run, json.loads((run.folder / "sweep.json").read_text())["command"], True)
            try:
                results[run.setting, run.seed] = result(run, sweep)
            except UserError as error:  # it will be the same with the others
                stop.append(error)
                return True
            final, _, seconds = results[run.setting, run.seed]
            print(f"[{len(results)}/{len(runs)}] {run.folder.name}: {sweep.metric} {final:.4g}, {seconds:.0f} s",
                  flush=True)
            write_tables(folder, summary(settings, results, sweep), sweep)
        elif not told:
            failed.append(f"failed: {run.folder.name}: {last_words(run, sweep.script)} ({run.folder}/log)")
            print(failed[-1], flush=True)

    done = [run for run, now in zip(runs, states) if now == "finished"]
    results.update({(run.setting, run.seed): result(run, sweep) for run in done})
    print(f"{len(settings)} settings, {len(runs)} runs: {len(done)} finished, {states.count('begun')} begun; in "
          f"{folder}", flush=True)
    told = run_all([run for run in runs if run not in done], args.jobs,
                   lambda run, slot: start(sweep, run, slot), end)
    if stop:
        raise stop[0]
    if told:
        leave(128 + told[0], f"interrupted with {len(results)} of {len(runs)} runs finished; the same command goes on")
    write_tables(folder, summary(settings, results, sweep), sweep)
    print("\n" + (folder / "table.md").read_text(encoding="utf-8"))
    print("\n".join(failed + [f"{len(failed)} of {len(runs)} runs failed; the same command tries them again"]
                    if failed else [f"also in {folder}/table.md and table.csv"]))
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(parse(Args)))
    except UserError as error:
        leave(2, f"error: {error}")
    except OSError as error:
        leave(2, f"error: {error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        leave(130, "interrupted before anything ran")

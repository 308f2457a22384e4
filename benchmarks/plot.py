"""Learning curves of one or many runs, from their metrics.jsonl, as a PNG with a panel for each metric.

    python benchmarks/plot.py RUN_DIR... [--metrics eval/optimality rollout/kl] [--x episodes] [--smooth 5]
        [--out curve.png] [--title WORDS]
    python benchmarks/plot.py runs/sweeps/NAME                            all runs of a folder

Runs whose args.yaml differ in nothing but the seed (and where and how they were saved) are one curve: the mean over
seeds at each step that all of them have logged. Around it, with three seeds or more, the 95 % t-interval of that mean;
with two, the range from the lower to the higher. Where a seed has gone further than another, its own curve goes on as a
thin line. Curves are named by the flags in which they differ. `--smooth N` draws the mean of the last N points of each
run. A run may still be going. Needs matplotlib (benchmarks/requirements.txt).
"""

import difflib
import json
import math
import re
import statistics
import sys
import textwrap
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import yaml
from tyro.conf import Positional

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.cli import UserError, run  # noqa: E402

UNSEEN = {"seed", "output_dir", "resume", "replay", "config", "track", "save_every", "keep_checkpoints", "keep_going"}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555")  # told apart by all eyes
T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
MOST = 6  # panels that nobody asked for
UNITS = (("kl$|kl_k3$|approx_kl$|entropy$|sampler_gap$", "nats"), ("loss/lm$|loss/awac$|eval/loss$", "nats"),
         ("/length$", "tokens"), ("seconds$", "s"))  # of metrics that have one


@dataclass
class Args:
    """Draw learning curves. The head of this file explains how."""

    runs: Positional[list[str]] = field(default_factory=list)
    """run directories, or folders that hold some"""
    metrics: list[str] = field(default_factory=list)
    """a panel for each, with all of its variants, such as @beta=4; none: eval/*, else rewards and losses, at most 6"""
    x: Literal["step", "episodes", "samples", "tokens", "epoch", "seconds"] = "step"
    """what runs along the bottom; where seeds differ in it, at a step, their mean"""
    smooth: int = 1
    """draw the mean of so many points, the last ones of each run"""
    out: str = "curve.png"
    """where the picture goes"""
    title: str = ""
    """a line above it"""


# --- runs -------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A run directory: its settings, and the lines of its log in the order of their steps."""

    folder: Path
    settings: dict
    rows: list[dict]


def number(value) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_rows(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; of a step that was taken twice, the later one. A line that a kill, a full
    disk or a run that is writing it has cut is left out."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{folder}/metrics.jsonl: {error.strerror}; give the directory of a run") from None
    rows = {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and number(row.get("step")):
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def load(paths: list[str]) -> list[Run]:
    """The runs of these directories, each once. Raises UserError for one that is none and holds none."""
    folders = []
    for path in map(Path, paths):
        inside = sorted(file.parent for file in path.glob("*/metrics.jsonl"))
        folders += inside if inside and not (path / "metrics.jsonl").exists() else [path]
    runs = []
    for folder in {folder.resolve(): folder for folder in folders}.values():
        rows = read_rows(folder)
        try:
            settings = yaml.safe_load((folder / "args.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = getattr(error, "strerror", None) or "not valid YAML"
            raise UserError(f"{folder}/args.yaml: {reason}; give the directory of a run") from None
        if not isinstance(settings, dict):
            raise UserError(f"{folder}/args.yaml: holds no settings; give the directory of a run")
        runs.append(Run(folder, settings, rows))
    return runs


# --- groups of seeds --------------------------------------------------------------------------------------------------


def stem(run: Run) -> Path:
    """The path of a run, without the seed if its name has it."""
    name = run.folder.name
    for found in list(re.finditer(rf"[-_,]?(seed)?[-_=]?(?<!\d){run.settings.get('seed')}(?!\d)", name))[-1:]:
        name = name[: found.start()] + name[found.end() :]
    return run.folder.with_name(name) if name.strip(".") else run.folder.parent


def group(runs: list[Run]) -> dict[str, list[Run]]:
    """Label -> the runs that differ in their seed alone. Where a seed comes twice with the same settings, as after a
    change of the code, the names of the directories tell which runs belong together."""
    same = defaultdict(list)
    for one in runs:
        settings = {name: value for name, value in one.settings.items() if name not in UNSEEN}
        same[json.dumps(settings, sort_keys=True, default=str)].append(one)
    groups = []
    for members in same.values():
        again = len({one.settings.get("seed") for one in members}) < len(members)
        parts = defaultdict(list)
        for one in members:
            parts[stem(one) if again else ""].append(one)
        groups += parts.values()
    labels = [label(members[0], [other[0] for other in groups]) for members in groups]
    stems = [stem(members[0]) for members in groups]
    short = len({path.name for path in stems}) == len(stems)
    names = [path.name if short else str(path) for path in stems]
    return {text if text and labels.count(text) == 1 else f"{name}, {text}".removesuffix(", "): members
            for text, name, members in zip(labels, names, groups)}  # what flags do not tell apart, names do


def label(one: Run, others: list[Run]) -> str:
    """The flags in which a run differs from others of its script, which are those with the same flags; of paths, the
    last two parts."""
    peers = [other.settings for other in others if other.settings.keys() == one.settings.keys()]
    flags = {name.replace("_", "-"): "/".join(str(value).split("/")[-2:]) for name, value in one.settings.items()
             if name not in UNSEEN and any(other[name] != value for other in peers)}
    return ", ".join(f"{name} {value}" for name, value in flags.items())


# --- curves -----------------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """A mean over seeds with its band, what single ones have logged beyond the last common step, as (xs, values), how
    many seeds it is of, and the least and largest of their values."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    tails: list[tuple[list[float], list[float]]]
    seeds: int
    span: tuple[float, float]


def t95(df: int) -> float:
    """What 95 % of Student's t with df degrees of freedom lie within, on both sides of 0; from 11 on by its expansion
    about the normal (Cornish and Fisher 1938)."""
    return T95[df - 1] if df <= len(T95) else 1.95996 + 2.37227 / df + 2.82250 / df**2 + 2.55585 / df**3


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half the length of its 95 % t-interval; of a single value, infinity."""
    n, mean = len(values), statistics.fmean(values)
    variance = sum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else math.inf
    return mean, math.sqrt(variance / n) * t95(max(1, n - 1))


def points(run: Run, metric: str, x: str, smooth: int) -> dict[int, tuple[float, float]]:
    """step -> (x, mean of the last `smooth` values of the metric), where a line has both as finite numbers."""
    rows = [row for row in run.rows if number(row.get(metric)) and number(row.get(x))]
    values = [row[metric] for row in rows]
    return {row["step"]: (row[x], statistics.fmean(values[max(0, i + 1 - smooth) : i + 1]))
            for i, row in enumerate(rows)}


def curve(runs: list[Run], metric: str, x: str = "step", smooth: int = 1) -> Curve | None:
    """The curve of a group; None where no run has the metric. A run without any point of it does not count."""
    found = [place for place in (points(one, metric, x, smooth) for one in runs) if place]
    if not found:
        return None
    common = sorted(set.intersection(*map(set, found)))
    means, lows, highs = [], [], []
    for step in common:
        values = [places[step][1] for places in found]
        mean, half = interval(values)
        low, high = (mean - half, mean + half) if len(values) > 2 else (min(values), max(values))
        means.append(mean), lows.append(low), highs.append(high)
    last = common[-1] if common else -math.inf
    tails = [[places[step] for step in sorted(places) if step >= last] for places in found]
    every = [value for places in found for _, value in places.values()]
    return Curve([statistics.fmean(places[step][0] for places in found) for step in common], means, lows, highs,
                 [tuple(map(list, zip(*tail))) for tail in tails if len(tail) > bool(common)],
                 len(found), (min(every), max(every)))


def choose(runs: list[Run], wanted: list[str]) -> dict[str, list[str]]:
    """Panel -> the metrics in it: one that is wanted, or its variants. Raises UserError for one that no run has."""
    logged = list(dict.fromkeys(name for one in runs for row in one.rows for name in row if number(row[name])))
    if not logged:
        raise UserError(f"{runs[0].folder}/metrics.jsonl: nothing is logged yet; wait for the first step")
    if not wanted:
        names = list(dict.fromkeys(name.split("@")[0] for name in logged))
        wanted = ([name for name in names if name.startswith("eval/")]
                  or [name for name in names if re.search("reward|score|loss", name)] or names)
        if wanted[MOST:]:
            print(f"not drawn: {' '.join(wanted[MOST:])}; choose by --metrics", file=sys.stderr)
        wanted = wanted[:MOST]
    panels = {metric: [name for name in logged if name == metric or name.startswith(metric + "@")] for metric in wanted}
    for metric in (metric for metric, variants in panels.items() if not variants):
        near = difflib.get_close_matches(metric, logged, 3, 0.5) or logged
        raise UserError(f"--metrics {metric}: no run has logged it; there is {', '.join(near)}")
    return panels


def prepare(args: Args) -> dict[str, dict[str, Curve]]:
    """What is to be drawn: panel -> label -> curve."""
    if not args.runs:
        raise UserError("give the directories of runs, such as runs/ppo-randomwalks-1")
    if args.smooth < 1:
        raise UserError(f"--smooth {args.smooth}: must be 1 or more")
    runs = load(args.runs)
    panels, groups = choose(runs, args.metrics), group(runs)
    for one in runs:
        if one.rows and not any(number(row.get(args.x)) for row in one.rows):
            raise UserError(f"--x {args.x}: {one.folder} does not log it; choose another one, such as step")
    drawn = {metric: {} for metric in panels}
    for metric, variants in panels.items():
        for name, members in groups.items():
            for variant in variants:
                parts = [name] * (len(groups) > 1 or variant == metric) + variant[len(metric) :].split("@")[1:]
                if found := curve(members, variant, args.x, args.smooth):
                    drawn[metric][", ".join(parts)] = found
    return drawn


# --- picture ----------------------------------------------------------------------------------------------------------

LOOK = {"font.size": 10, "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "axes.edgecolor": "#888888", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "axes.axisbelow": True, "grid.color": "#e6e6e6", "xtick.color": "#444444", "ytick.color": "#444444",
        "lines.linewidth": 1.8, "lines.markersize": 3.5, "legend.fontsize": 9.5, "figure.titlesize": 11.5}


def draw(drawn: dict[str, dict[str, Curve]], args: Args) -> None:
    """Write the PNG: to be read at 800 pixels, on white whatever is around it."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from matplotlib.ticker import EngFormatter, MaxNLocator
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install -r benchmarks/requirements.txt") from None
    plt.rcParams.update(LOOK)
    seeds = {name: max(by_name[name].seeds for by_name in drawn.values() if name in by_name)
             for by_name in drawn.values() for name in by_name}
    styles = {name: dict(color=COLOURS[i % len(COLOURS)], linestyle=("-", "--", ":", "-.")[i // len(COLOURS) % 4])
              for i, name in enumerate(seeds)}
    across = {1: 1, 2: 2, 4: 2}.get(len(drawn), 3)
    down = math.ceil(len(drawn) / across)
    size = (6 if across == 1 else 8, (3.6, 2.7, 2.3)[across - 1] * down + 0.1 * len(seeds) + 0.3)
    figure, panels = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained", facecolor="white")
    cut = False  # whether a band leaves its frame
    for place, (panel, (metric, by_name)) in enumerate(zip(panels.flat, drawn.items())):
        for name, found in by_name.items():
            few = len(found.x) + max([len(xs) for xs, _ in found.tails], default=0) < 10
            panel.plot(found.x, found.mean, marker="o" if few else None, **styles[name])
            panel.fill_between(found.x, found.low, found.high, color=styles[name]["color"], alpha=0.18, linewidth=0)
            for xs, values in found.tails:
                panel.plot(xs, values, linewidth=0.8, **styles[name])
        low, high = (limit(found.span[i] for found in by_name.values()) for i, limit in enumerate((min, max)))
        if low < high:  # a wide interval of few seeds may leave the frame, since it would flatten the curves
            panel.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
        bottom, top = panel.get_ylim()
        cut |= any(value < bottom for found in by_name.values() for value in found.low)
        cut |= any(value > top for found in by_name.values() for value in found.high)
        panel.set_title(", ".join([metric, *(unit for names, unit in UNITS if re.search(names, metric))]))
        panel.set_xlabel(args.x if place + across >= len(drawn) else "")
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=args.x != "epoch"))
        if args.x != "epoch":
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 10k
    for panel in panels.flat[len(drawn) :]:
        panel.remove()
    keys = [plt.Line2D([], [], label=textwrap.fill(name + (f" ({count} seeds)" if count > 1 else ""), 90),
                       **styles[name]) for name, count in seeds.items()]
    counts = {found.seeds for by_name in drawn.values() for found in by_name.values()}
    more = ", cut at the frame" if cut else ""
    for wanted, text in ((max(counts) > 2, "95 % t-interval of the mean over seeds" + more),
                         (2 in counts, "from the lower to the higher of two seeds")):
        keys += [plt.Rectangle((0, 0), 1, 1, color="#dddddd", label=text)] * wanted
    if len(keys) > 1:
        fit = 13 * size[0] // (max(len(key.get_label()) for key in keys) + 6)
        figure.legend(handles=keys, loc="outside lower center", frameon=False, ncols=max(1, min(3, fit)))
    figure.suptitle(args.title or (keys[0].get_label() if len(keys) == 1 else None))
    try:
        figure.savefig(args.out, dpi=200)
    except (OSError, ValueError) as error:
        raise UserError(f"--out {args.out}: {getattr(error, 'strerror', None) or error}") from None
    print(f"wrote {args.out}: {', '.join(drawn)}")


def main(args: Args) -> None:
    """Read, then draw."""
    draw(prepare(args), args)


if __name__ == "__main__":
    run(main, Args)

"""Learning curves of runs from their metrics.jsonl, as a PNG.

    python benchmarks/plot.py RUN_DIR... [--metrics rollout/score rollout/kl] [--x episodes] [--out curve.png]

Runs whose directory names differ only in a final number are seeds of one curve: their mean, and a band of plus and
minus one standard deviation. Needs benchmarks/requirements.txt.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def read(folder: str, metric: str, x: str) -> dict[float, float]:
    """x -> metric of each logged step that has both."""
    with open(Path(folder) / "metrics.jsonl") as file:
        rows = [json.loads(line) for line in file]
    return {row[x]: row[metric] for row in rows if metric in row and x in row}


def main():
    """Draw one panel for each metric."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--metrics", nargs="+", default=["rollout/score", "rollout/kl"])
    parser.add_argument("--x", default="episodes")
    parser.add_argument("--out", default="curve.png")
    parser.add_argument("--title", default="")
    args = parser.parse_args()
    groups = defaultdict(list)
    for run in args.runs:
        groups[re.sub(r"-\d+$", "", Path(run).name)].append(run)
    figure, panels = plt.subplots(1, len(args.metrics), figsize=(4.6 * len(args.metrics), 3.4), squeeze=False)
    for panel, metric in zip(panels[0], args.metrics):
        for name, runs in groups.items():
            curves = [read(run, metric, args.x) for run in runs]
            places = sorted(set.intersection(*(set(curve) for curve in curves)))
            values = np.array([[curve[place] for place in places] for curve in curves])
            mean, deviation = values.mean(0), values.std(0, ddof=1) if len(runs) > 1 else np.zeros(len(places))
            label = name + (f" ({len(runs)} seeds)" if len(runs) > 1 else "")
            line, = panel.plot(places, mean, label=label, marker="o" if len(places) < 12 else None, markersize=3)
            if len(runs) > 1:
                panel.fill_between(places, mean - deviation, mean + deviation, alpha=0.2, color=line.get_color())
        panel.set_xlabel(args.x)
        panel.set_title(metric, fontsize=10)
        panel.grid(alpha=0.3)
    if len(groups) > 1:
        panels[0][0].legend(fontsize=8)
    figure.suptitle(args.title, fontsize=11)
    figure.tight_layout()
    figure.savefig(args.out, dpi=120)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

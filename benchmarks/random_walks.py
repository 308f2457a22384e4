"""The README's random-walks tables: `python SCRIPT` over several seeds, each with a graph of its own.

    OMP_NUM_THREADS=1 python benchmarks/random_walks.py [--script ppo.py] [--seeds 1 2 3 4 5 6] [--jobs 1]
        [--folder runs/benchmark]
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from common.randomwalks import random_walks  # noqa: E402


def run(script: str, seed: int, folder: str) -> dict:
    """Metrics of the first and the last evaluation, and seconds of the whole command, start-up and all."""
    path, started = f"{folder}/{script.removesuffix('.py')}-randomwalks-{seed}", time.time()
    subprocess.run([sys.executable, script, "--seed", str(seed), "--output-dir", path], cwd=ROOT, check=True,
                   capture_output=True)
    seconds = time.time() - started
    rows = [json.loads(line) for line in open(ROOT / path / "metrics.jsonl")]
    names = [name for name in rows[0] if name.startswith("eval/") and not name.startswith("eval/length")]
    walks = random_walks(seed)
    return {"seed": seed, **{name[5:]: rows[-1][name] for name in names},
            "before": next(rows[0][name] for name in names if name.startswith("eval/optimality")),
            "walks": mean(walks.reward(walks.walks)), "seconds": seconds}


def main():
    """Run all seeds and print a table and its means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", default="ppo.py")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", default="runs/benchmark")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda seed: run(args.script, seed, args.folder), args.seeds))
    widths = {name: max(10, len(name)) for name in results[0]}
    print("  ".join(f"{name:>{widths[name]}}" for name in results[0]))
    for row in results:
        print("  ".join(f"{value:{widths[name]}{'.3f' if isinstance(value, float) else ''}}"
                        for name, value in row.items()))
    for name in list(results[0])[1:]:
        values = [row[name] for row in results]
        print(f"{name}: mean {mean(values):.3f}, standard deviation {stdev(values) if len(values) > 1 else 0:.3f}, "
              f"from {min(values):.3f} to {max(values):.3f}")


if __name__ == "__main__":
    main()

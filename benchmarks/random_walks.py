"""The README's random-walks table: `python ppo.py` over several seeds, each with a graph of its own.

    OMP_NUM_THREADS=1 python benchmarks/random_walks.py [--seeds 1 2 3 4 5 6] [--jobs 1] [--folder runs/benchmark]
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


def run(seed: int, folder: str) -> dict:
    """Metrics of the first and the last evaluation, and seconds of the whole command, start-up and all."""
    path, started = f"{folder}/randomwalks-{seed}", time.time()
    subprocess.run([sys.executable, "ppo.py", "--seed", str(seed), "--output-dir", path], cwd=ROOT, check=True,
                   capture_output=True)
    seconds = time.time() - started
    rows = [json.loads(line) for line in open(ROOT / path / "metrics.jsonl")]
    return {"seed": seed, "before": rows[0]["eval/optimality"], "optimality": rows[-1]["eval/optimality"],
            "invalid": rows[-1]["eval/invalid"], "seconds": seconds}


def main():
    """Run all seeds and print a table and its means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", default="runs/benchmark")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda seed: run(seed, args.folder), args.seeds))
    print("seed  before  optimality  invalid  seconds")
    for row in results:
        print("{seed:4}  {before:6.3f}  {optimality:10.3f}  {invalid:7.3f}  {seconds:7.0f}".format(**row))
    for name in ("before", "optimality", "invalid", "seconds"):
        values = [row[name] for row in results]
        print(f"{name}: mean {mean(values):.3f}, standard deviation {stdev(values) if len(values) > 1 else 0:.3f}, "
              f"from {min(values):.3f} to {max(values):.3f}")


if __name__ == "__main__":
    main()

"""benchmarks/plot.py and sweep.py: curves and tables against numbers made by hand; runs of a stand-in for a script."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT, run_forked

sys.path.insert(0, str(ROOT / "benchmarks"))
import plot  # noqa: E402
import sweep  # noqa: E402

from common.cli import UserError  # noqa: E402


def refused(words, call, *args):
    """The call raises UserError, in one line with these words."""
    with pytest.raises(UserError) as error:
        call(*args)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), str(error.value)


# --- plot -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def make(tmp_path):
    """A function that writes a run directory: its values of eval/a, from step 0 on, or whole lines; its settings."""
    def write(name, values=(), rows=None, **settings):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        rows = rows or [{"step": i, "tokens": 10 * i, "eval/a": value} for i, value in enumerate(values)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "args.yaml").write_text(yaml.safe_dump({"output_dir": name, "resume": None, **settings}))
        return str(folder)

    return write


def drawn(*runs, **flags):
    return plot.prepare(plot.Args(runs=list(runs), **flags))


def student_inside(t, df):
    """The share of Student's t within plus and minus t, by Simpson's rule on the density."""
    scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    density = [scale * (1 + (t * i / 2000) ** 2 / df) ** (-(df + 1) / 2) for i in range(2001)]
    return 2 * t / 6000 * (density[0] + density[-1] + 4 * sum(density[1:-1:2]) + 2 * sum(density[2:-1:2]))


def test_t_interval():
    for df in [*range(1, 32), 60, 150]:
        assert abs(student_inside(plot.t95(df), df) - 0.95) < 3e-5, df
    mean, half = plot.interval([1.0, 2.0, 6.0])
    assert mean == 3.0 and abs(half - 4.3027 * math.sqrt(7 / 3)) < 1e-9  # variance (4 + 1 + 9) / 2
    assert plot.interval([5.0]) == (5.0, math.inf)


def test_mean_and_band(make):
    a, b, c = (make(f"r-{s}", values, seed=s) for s, values in ((1, [1, 2]), (2, [2, 4]), (3, [6, 9])))
    (name, one), = drawn(a)["eval/a"].items()
    assert name == "r" and one.mean == one.low == one.high == [1, 2] and one.seeds == 1 and not one.tails
    (_, two), = drawn(a, b)["eval/a"].items()
    assert two.mean == [1.5, 3] and two.low == [1, 2] and two.high == [2, 4] and two.seeds == 2
    (_, three), = drawn(a, b, c)["eval/a"].items()
    assert three.x == [0, 1] and three.mean == [3, 5] and three.seeds == 3 and three.span == (1, 9)
    assert three.low == pytest.approx([3 - 4.3027 * (7 / 3) ** 0.5, 5 - 4.3027 * (13 / 3) ** 0.5])
    assert three.high == pytest.approx([3 + 4.3027 * (7 / 3) ** 0.5, 5 + 4.3027 * (13 / 3) ** 0.5])


def test_seeds_of_unequal_length(make):
    """The mean ends with the shortest; the longer ones go on alone. One without a single point does not count."""
    a, b = make("r-1", [1, 2, 3, 4], seed=1), make("r-2", [3, 4], seed=2)
    none = make("r-3", rows=[{"step": 0, "loss": 1}], seed=3)
    (_, found), = drawn(a, b, none, metrics=["eval/a"])["eval/a"].items()
    assert found.x == [0, 1] and found.mean == [2, 3] and found.seeds == 2
    assert found.tails == [([1, 2, 3], [2, 3, 4])]
    c = make("s-1", rows=[{"step": 0, "eval/a": 1}], seed=1, rate=2)
    d = make("s-2", rows=[{"step": 5, "eval/a": 2}], seed=2, rate=2)
    (_, apart), = drawn(c, d)["eval/a"].items()  # no step in common
    assert apart.mean == [] and sorted(apart.tails) == [([0], [1]), ([5], [2])]


def test_places_and_smoothing(make):
    def rows(*values):
        return [dict(zip(("step", "tokens", "eval/a"), row)) for row in values]

    a = make("r-1", rows=rows((0, 0, 1), (2, 10, 3), (4, 30, 8)), seed=1)
    b = make("r-2", rows=rows((0, 0, 1), (2, 20, 5), (4, 50, 0)), seed=2)
    (_, found), = drawn(a, b, x="tokens")["eval/a"].items()
    assert found.x == [0, 15, 40] and found.mean == [1, 4, 4]  # where seeds differ, the mean place of the step
    (_, found), = drawn(a, x="step", smooth=2)["eval/a"].items()
    assert found.x == [0, 2, 4] and found.mean == [1, 2, 5.5]


def test_log_that_was_cut_and_resumed(make, tmp_path):
    values = enumerate([1, 5, math.nan])
    folder = make("r-1", rows=[{"step": step, "eval/a": value} for step, value in values], seed=1)
    with open(folder + "/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "eval\n"nonsense"\n{"step": 1, "eval/a": 2}\n{"step": 4, "eval/a": 7, "b": true}\n')
        file.write('{"step"')
    rows = plot.read_rows(tmp_path / "r-1")
    assert [row["step"] for row in rows] == [0, 1, 2, 4] and rows[1]["eval/a"] == 2
    (_, found), = drawn(folder)["eval/a"].items()
    assert found.x == [0, 1, 4] and found.mean == [1, 2, 7]  # what is not finite is no point
    refused(["b", "no run has logged it"], lambda: drawn(folder, metrics=["b"]))


def test_groups_and_labels(make):
    runs = [make(f"x/{rate}-{s}", [s], seed=s, rate=rate, model=None, track=s == 2)
            for rate in (0.1, 3e-5) for s in (1, 2)]
    labels = {name: curve.seeds for name, curve in drawn(*runs)["eval/a"].items()}
    assert labels == {"rate 0.1": 2, "rate 3e-05": 2}
    other = make("x/sft-walks-1", [5], seed=1, epochs=3)  # of another script: other flags
    assert list(drawn(*runs, other)["eval/a"]) == ["rate 0.1", "rate 3e-05", "sft-walks"]
    deep = make("x/deep-1", [5], seed=1, rate=0.1, model="/a/b/c/model", micro_batch_size=3)
    deeper = make("x/deeper-1", [5], seed=1, rate=0.1, model="/a/b/d/model", micro_batch_size=3)
    assert list(drawn(deep, deeper)["eval/a"]) == ["model c/model", "model d/model"]


def test_the_same_flags_and_seed_twice_are_two_curves(make):
    """After a change of the code, say: not four seeds, but two of each."""
    runs = [make(f"{when}/r-{s}", [value + s], seed=s, rate=1) for when, value in (("old", 0), ("new", 10))
            for s in (1, 2)]
    found = drawn(runs[0], runs[3], runs[2], runs[1])["eval/a"]
    assert [(name.split("/")[-2], curve.mean, curve.seeds) for name, curve in found.items()] == [
        ("old", [1.5], 2), ("new", [11.5], 2)]
    again = [make(f"ppo0.2-{name}", [1], seed=int(name[0]), rate=2) for name in ("1", "2", "1-2", "2-2")]
    assert {name: curve.seeds for name, curve in drawn(*again)["eval/a"].items()} == {"ppo0.2": 2, "ppo0.2-2": 2}
    both = drawn(*again, make("t-1", [1], seed=1, rate=3))["eval/a"]
    assert list(both) == ["ppo0.2, rate 2", "ppo0.2-2, rate 2", "rate 3"]


def test_choice_of_metrics(make, capsys):
    row = {"step": 0, "seconds": 1.0, "loss/q": 1, "rollout/score": 2, "perf/x": 3}
    bare, nothing = make("a-1", rows=[row], seed=1), make("b-1", rows=[{"step": 0, "perf/x": 1}], seed=1)
    assert list(drawn(bare)) == ["loss/q", "rollout/score"] and "perf/x" in drawn(nothing)
    many = make("c-1", rows=[row | {f"eval/{i}": i for i in range(8)}], seed=1)
    assert list(drawn(many)) == [f"eval/{i}" for i in range(6)]
    assert "eval/6 eval/7" in capsys.readouterr().err
    betas = make("d-1", rows=[row | {"eval/o@beta=0": 1, "eval/o@beta=4": 2, "eval/oo": 3}], seed=1)
    assert {name: list(by) for name, by in drawn(betas).items()} == {"eval/o": ["beta=0", "beta=4"], "eval/oo": ["d"]}
    assert list(drawn(betas, many, metrics=["eval/o"])["eval/o"]) == ["d, beta=0", "d, beta=4"]
    assert list(drawn(betas, metrics=["eval/o@beta=4"])["eval/o@beta=4"].values())[0].mean == [2]


def test_plot_refuses_in_one_line(make, tmp_path):
    good = make("r-1", [1], seed=1)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/metrics.jsonl").write_text("")
    refused(["give the directories"], drawn)
    refused(["--smooth 0"], lambda: drawn(good, smooth=0))
    refused([f"{tmp_path}/gone/metrics.jsonl", "No such file"], drawn, str(tmp_path / "gone"))
    refused([f"{tmp_path}/bare/args.yaml"], drawn, str(tmp_path / "bare"))
    (tmp_path / "bare/args.yaml").write_text("[")
    refused(["bare/args.yaml", "not valid YAML"], drawn, str(tmp_path / "bare"))
    (tmp_path / "bare/args.yaml").write_text("3")
    refused(["bare/args.yaml", "no settings"], drawn, str(tmp_path / "bare"))
    (tmp_path / "bare/args.yaml").write_text("seed: 2")
    refused(["nothing is logged yet"], drawn, str(tmp_path / "bare"))
    assert len(drawn(good, str(tmp_path / "bare"))["eval/a"]) == 1  # it has just begun
    refused(["--metrics eval/b", "eval/a"], lambda: drawn(good, metrics=["eval/a", "eval/b"]))
    refused(["--x episodes", "r-1"], lambda: drawn(good, x="episodes"))


def test_a_folder_of_runs(make, tmp_path):
    for seed in (2, 1):
        make(f"many/r-{seed}", [seed], seed=seed)
    (_, found), = drawn(str(tmp_path / "many"), str(tmp_path / "many/r-1"))["eval/a"].items()
    assert found.seeds == 2 and found.mean == [1.5]  # each once


def test_picture(make, tmp_path, monkeypatch, capsys):
    runs = [make(f"{rate}-{s}", [s, rate * s, s][: s + 1], seed=s, rate=rate) for rate in (1, 2) for s in (1, 2, 3)]
    args = plot.Args(runs=runs, out=str(tmp_path / "c.png"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        refused(["pip install -r benchmarks/requirements.txt"], plot.main, args)
    pytest.importorskip("matplotlib")
    plot.main(args)
    figure = sys.modules["matplotlib.pyplot"].gcf()
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["eval/a"]
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1].endswith(" over seeds, cut at the frame")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG") and "c.png: eval/a" in capsys.readouterr().out
    args.out = str(tmp_path / "gone/c.png")
    refused(["--out", "gone/c.png", "No such file"], plot.main, args)


# --- sweep ------------------------------------------------------------------------------------------------------------

STUB = '''
"""A stand-in for a training script: its metric is 10 rate + seed at the end, and 1 more in the middle."""
import json, os, signal, sys, time
from dataclasses import dataclass, field

@dataclass
class Args:
    """Flags."""
    rate: float = 0.1
    mode: str = "well"
    wide: bool = False
    names: list[str] = field(default_factory=list)
    nap: float = 0.0
    metric: str | None = None
    config: str | None = None
    seed: int = 1
    output_dir: str | None = None
    resume: str | None = None

def check(args):
    from common.cli import UserError
    if args.rate < 0:
        raise UserError(f"--rate {args.rate}: must be 0 or more")

if __name__ == "__main__":
    words = sys.argv[1:]
    flags = {word[2:]: value for word, value in zip(words, words[1:] + [""]) if word.startswith("--")}
    folder, rate, seed = flags["output-dir"], float(flags["rate"]), int(flags["seed"])
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/attempts", "a") as file:
        print(json.dumps([words, os.environ.get("OMP_NUM_THREADS")]), file=file)
    print("hello", flush=True)
    if flags.get("mode") == "unlucky" and seed == 2 and not os.path.exists("mended"):
        sys.exit("stub.py: error: no luck\\n")
    saved = f"{folder}/checkpoint"
    done = int(open(saved).read()) if os.path.exists(saved) and "resume" in flags else 0
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    for step in range(done, 3):
        with open(f"{folder}/metrics.jsonl", "a") as file:
            value = 10 * rate + seed + (step == 1)
            print(json.dumps({"step": step, "eval/score": value, "seconds": 2.0 * step}), file=file)
        for _ in range(round(100 * float(flags.get("nap", 0)))):
            time.sleep(0 if told else 0.01)
        if told:
            open(saved, "w").write(str(step + 1))
            sys.exit(143)
    os.makedirs(f"{folder}/model", exist_ok=True)
'''
BASIC = {"script": "stub.py", "seeds": [1, 2], "metric": "eval/score"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with the stand-in, to be in."""
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def swept(jobs=1, dry_run=False, **keys):
    """The exit code of a sweep of the stand-in."""
    with open("s.yaml", "w") as file:
        yaml.safe_dump({**BASIC, **keys}, file, sort_keys=False)
    return sweep.main(sweep.Args("s.yaml", jobs, dry_run))


def attempts(setting, seed):
    """The commands that were run for a setting and a seed."""
    try:
        with open(f"runs/sweeps/s/{setting},seed={seed}/attempts") as file:
            return [json.loads(line) for line in file]
    except FileNotFoundError:
        return []


def table():
    with open("runs/sweeps/s/table.csv") as file:
        return list(csv.DictReader(file))


def test_a_sweep_from_its_file_to_its_table(here, capsys):
    flags = {"wide": False, "names": ["a b", "c"]}
    assert swept(flags=flags, grid={"rate": [0.5, "1e-1"]}, dry_run=True) == 0
    line = ("python stub.py --no-wide --names 'a b' c --rate 0.5 --seed 1 --output-dir "
            "runs/sweeps/s/rate=0.5,seed=1  # new")
    assert line in capsys.readouterr().out and not os.path.exists("runs")
    assert swept(flags=flags, grid={"rate": [0.5, "1e-1"]}) == 0
    words = ["--no-wide", "--names", "a b", "c", "--rate", "1e-1", "--seed", "2", "--output-dir",
             "runs/sweeps/s/rate=1e-1,seed=2"]
    assert attempts("rate=1e-1", 2) == [[words, "1"]]  # and one thread
    first, second = table()
    half = 12.7062 * math.sqrt(0.5) / math.sqrt(2)  # of two seeds that differ by 1
    assert first["rate"] == "0.5" and first["against_best"] == "best" and first["seeds"] == "2"
    assert [float(first[name]) for name in ("final", "final_low", "final_high", "best", "seconds")] == pytest.approx(
        [6.5, 6.5 - half, 6.5 + half, 7.5, 4.0])
    assert float(second["final"]) == pytest.approx(2.5) and second["against_best"] == "tie: intervals overlap"
    out = capsys.readouterr().out
    assert "6.5 ± 6.4" in out and "1 of the settings cannot be told from the best" in out and "[4/4]" in out
    assert "\n    python stub.py --no-wide --names 'a b' c --rate 0.5\n" in out
    assert open("runs/sweeps/s/table.md").read() in out
    assert "hello" in open("runs/sweeps/s/rate=0.5,seed=1/log").read()
    note = json.load(open("runs/sweeps/s/rate=0.5,seed=1/sweep.json"))
    assert note["finished"] and note["command"] == line.split("  #")[0]


def test_what_is_finished_is_not_run_again(here, capsys, monkeypatch):
    assert swept(grid={"rate": [0.5]}) == 0
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert swept(grid={"rate": [0.5, 2]}, seeds=[2, 1, 3], goal="minimize", metric="seconds") == 0
    assert [len(attempts("rate=0.5", seed)) for seed in (1, 2, 3)] == [1, 1, 1]
    assert attempts("rate=0.5", 3)[0][1] == "3"  # threads as they are set
    assert {row["seeds"] for row in table()} == {"3"} and float(table()[0]["best"]) == 0  # the least seconds
    assert "6 runs: 2 finished, 0 begun" in capsys.readouterr().out
    os.rmdir("runs/sweeps/s/rate=0.5,seed=1/model")  # no run is finished without
    assert swept(grid={"rate": [0.5]}) == 0
    assert attempts("rate=0.5", 1)[1][0][-2:] == ["--resume", "auto"] and len(attempts("rate=0.5", 2)) == 1
    refused(["rate=0.5,seed=1", "--nap 0.0", "0.01", "another name"],
            lambda: swept(grid={"rate": [0.5]}, flags={"nap": 0.01}))
    os.makedirs("runs/sweeps/s/rate=7,seed=1")
    refused(["rate=7,seed=1", "not of a sweep"], lambda: swept(grid={"rate": [7]}))


def test_a_failed_run_stops_no_other_and_is_tried_again(here, capsys):
    keys = dict(grid={"rate": [0.5, 0.1]}, flags={"mode": "unlucky"}, seeds=[1, 2, 3])
    assert swept(**keys) == 1
    out = capsys.readouterr().out
    assert "failed: rate=0.5,seed=2: stub.py: error: no luck (runs/sweeps/s/rate=0.5,seed=2/log)" in out
    assert "2 of 6 runs failed" in out
    assert [row["against_best"] for row in table()] == ["not judged: 2 of 3 seeds"] * 2
    open("mended", "w").close()
    assert swept(**keys) == 0
    assert [row["seeds"] for row in table()] == ["3", "3"] and len(attempts("rate=0.5", 3)) == 1
    assert len(attempts("rate=0.5", 2)) == 2


def test_ctrl_c_lets_runs_save_and_the_same_command_resumes_them(here, capsys):
    keys = dict(grid={"rate": [0.5]}, flags={"nap": 0.5}, seeds=[1, 2, 3])
    with open("s.yaml", "w") as file:
        yaml.safe_dump({**BASIC, **keys}, file, sort_keys=False)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # where it is ignored, so it is in children
    process = subprocess.Popen([sys.executable, str(ROOT / "benchmarks/sweep.py"), "s.yaml", "--jobs", "2"],
                               stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    signal.signal(signal.SIGINT, handler)
    deadline = time.time() + 60
    logs = [here / f"runs/sweeps/s/rate=0.5,seed={seed}/metrics.jsonl" for seed in (1, 2)]
    while not all(log.exists() and log.read_text() for log in logs) and time.time() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all that share a session with the sweep
    out, err = process.communicate()
    assert "sweep.py: interrupted with 0 of 3 runs finished; the same command goes on" in err
    assert "ending 2 runs" in out and "failed" not in out
    assert process.returncode == 130 and not attempts("rate=0.5", 3)
    assert all((log.parent / "checkpoint").exists() for log in logs)
    assert swept(**keys, jobs=3) == 0
    assert "3 runs: 0 finished, 2 begun" in capsys.readouterr().out
    for log in logs:  # no step was taken twice
        assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [0, 1, 2]
    assert "--resume" not in attempts("rate=0.5", 3)[0][0]


class Child:
    """A process that ends after some polls, or when it is told."""

    pid, left = -1, 3

    def __init__(self, code=0):
        self.code, self.told = code, False

    def poll(self):
        self.left -= 1
        self.returncode = 143 if self.told else self.code
        return self.returncode if self.left < 0 or self.told else None

    def terminate(self):
        self.told = True


def test_so_many_at_a_time():
    running, begun = {}, []

    def begin(run, slot):
        assert slot in (0, 1) and slot not in running.values()
        running[run] = slot
        begun.append((run, len(running)))
        return Child(code=run)

    def end(run, code, told):
        del running[run]
        assert code == run and not told

    before = signal.getsignal(signal.SIGTERM)
    assert sweep.run_all([1, 2, 3, 4, 5], 2, begin, end) == []
    assert [run for run, _ in begun] == [1, 2, 3, 4, 5] and max(count for _, count in begun) == 2
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_stops_the_sweep_ends_its_runs():
    children, codes = [], []

    def begin(run, slot):
        children.append(Child())
        children[-1].left += 5 * run
        return children[-1]

    def end(run, code, told):
        codes.append((run, code, told))
        return run == 0

    assert sweep.run_all([0, 9, 9, 9], 2, begin, end) == [0]
    assert codes == [(0, 0, False), (9, 143, True)] and len(children) == 2
    children.clear()
    with pytest.raises(OSError):
        sweep.run_all([1, 9], 2, begin, lambda *_: open("/gone/for/good"))
    assert children[1].told


def test_a_second_signal_kills(monkeypatch):
    killed = []
    monkeypatch.setattr(os, "killpg", lambda group, how: killed.append((group, how)))

    class Deaf(Child):
        left = 10**6

        def poll(self):
            os.kill(os.getpid(), signal.SIGTERM)
            self.left = -1 if killed else self.left
            return super().poll() if not self.told or killed else None

    assert len(sweep.run_all([0], 1, lambda *_: Deaf(), lambda *_: False)) >= 2
    assert killed[0] == (-1, signal.SIGKILL)


def test_metric_that_only_the_first_run_shows_to_be_none(here):
    keys = dict(grid={"rate": [0.5, 1]}, metric="eval/seconds")
    refused(["metric: ", "rate=0.5,seed=1", "eval/score"], lambda: swept(**keys))
    assert not attempts("rate=1", 1)  # and nothing more was run
    assert swept(**{**keys, "metric": "eval/score"}) == 0 and len(attempts("rate=0.5", 1)) == 1


@pytest.mark.parametrize("text, words", [
    ("[1]", ["key: value", "list"]), ("a: [", ["not valid YAML"]), ("scirpt: ppo.py", ["'scirpt'", "'script'"]),
    ("script: 3", ["script: is 3", "a text"]), ("{script: a, metric: b}", ["seeds: is missing"]),
    ("{script: a, seeds: [1]}", ["metric: is missing"]), ("{metric: a, seeds: [1]}", ["script: is missing"]),
    ("seeds: 3", ["seeds: is 3", "a list"]), ("seeds: [1, x]", ["seeds: must be whole numbers"]),
    ("seeds: [-1]", ["seeds: must be"]), ("seeds: [1, 1]", ["seeds: has one twice"]),
    ("goal: up", ["goal: must be maximize or minimize"]), ("method: bayes", ["method: must be grid or random"]),
    ("method: random", ["runs: "]), ("runs: 3", ["runs: is for method random"]), ("runs: true", ["runs: is True"]),
    ("processes: -1", ["processes: "]), ("name: ../x", ["name: "]), ("flags: [a]", ["flags: is", "'flag: value'"]),
    ("grid: {a: 3}", ["grid: a: must be a list"]), ("grid: {a: []}", ["grid: a: must be a list"]),
    ("grid: {a: {min: 1, max: 2}}", ["grid: a: must be a list"]),
    ("{flags: {a_b: 1}, grid: {a-b: [1]}}", ["grid: a-b: stands in flags"]),
    ("{method: random, runs: 1, grid: {a: {min: 2, max: 1}}}", ["grid: a: must be {min"]),
    ("{method: random, runs: 1, grid: {a: {min: 0, max: 1, log: true}}}", ["grid: a: must be {min"]),
    ("{method: random, runs: 1, grid: {a: {min: 0}}}", ["grid: a: must be {min"]),
    ("{method: random, runs: 1, grid: {a: {min: 0, max: .inf}}}", ["grid: a: must be {min"]),
    ("{method: random, runs: 1, grid: {a: {min: 0, max: 1, step: 1}}}", ["grid: a: must be {min"])])
def test_bad_files_are_refused_by_their_key(here, text, words):
    found = yaml.safe_load(text) if text != "a: [" else None
    if isinstance(found, dict) and not {"script", "metric", "seeds"} & found.keys() - {"seeds"}:
        text = yaml.safe_dump({**BASIC, **found})
    (here / "bad.yaml").write_text(text)
    refused(["bad.yaml: ", *words], sweep.read_sweep, "bad.yaml")


def test_flags_are_checked_before_anything_runs(here):
    refused(["s.yaml: flags: ", "'rat'", "'rate'"], lambda: swept(flags={"rat": 1}))
    refused(["s.yaml: grid: ", "'moed'", "'mode'"], lambda: swept(grid={"moed": [1]}))
    for own in ("seed", "output_dir", "resume"):
        refused([f"flags: {own.replace('_', '-')} is not for sweeps"], lambda: swept(flags={own: 1}))
    refused(["rate=x", "--rate"], lambda: swept(grid={"rate": [1, "x"]}))
    refused(["rate=-1", "must be 0 or more"], lambda: swept(grid={"rate": [1, -1]}))
    refused(["metric: ", "eval/scroe", "did you mean 'score'"], lambda: swept(metric="eval/scroe"))
    assert swept(metric="eval/qqq", flags={"metric": "own.py:function"}, dry_run=True) == 0  # which may log just that
    refused(["script: gone.py"], lambda: swept(script="gone.py"))
    refused(["--jobs 0"], lambda: swept(jobs=0))
    refused(["gone.yaml: No such file"], sweep.main, sweep.Args("gone.yaml"))
    refused(["give the YAML file"], sweep.main, sweep.Args())
    (here / "broken.py").write_text("import nowhere")
    refused(["script: broken.py", "nowhere"], lambda: swept(script="broken.py"))
    assert not os.path.exists("runs")


def test_real_scripts_and_their_metrics(here):
    """Their flags are read with the task's defaults, and what they log is not refused."""
    for script, metrics in {"ppo.py": ("eval/optimality", "rollout/kl_k3", "policy/clipfrac"), "dpo.py": (
            "eval/pair_kl", "train/accuracy"), "ilql.py": ("eval/invalid@beta=100", "value/td_target"),
            "sft.py": ("eval/perplexity", "loss/lm", "seconds")}.items():
        for metric in metrics:
            sweep.check_metric(sweep.Sweep(script=str(ROOT / script), metric=metric), "s.yaml")
    grid = sweep.Sweep(str(ROOT / "ppo.py"), "eval/reward", [5], grid={"kl-coef": [0.5]}, name="n")
    (setting,), (run,) = sweep.plan(grid, "s.yaml")
    assert setting == {"kl-coef": 0.5} and run.words[:4] == ["--kl-coef", "0.5", "--seed", "5"]
    assert run.settings["kl_coef"] == 0.5 and run.settings["total_episodes"] == 20480
    assert not {"seed", "output_dir", "resume"} & run.settings.keys()
    grid.flags = {"batch-size": 512}
    refused(["kl-coef=0.5", "--batch-size 512"], sweep.plan, grid, "s.yaml")


def test_settings(here, capsys):
    grid = sweep.settings_of(sweep.Sweep(grid={"a": [1, 2], "b": [True, "x"]}))
    assert grid == [{"a": 1, "b": True}, {"a": 1, "b": "x"}, {"a": 2, "b": True}, {"a": 2, "b": "x"}]
    space = {"r": {"min": "1e-5", "max": 1e-2, "log": True}, "n": {"min": 1, "max": 4}, "u": {"min": 0, "max": 1.0},
             "c": ["p", "q"]}
    draws = sweep.settings_of(sweep.Sweep(method="random", runs=300, grid=space))
    assert draws[:20] == sweep.settings_of(sweep.Sweep(method="random", runs=20, grid=space))
    assert draws[:20] != sweep.settings_of(sweep.Sweep(method="random", runs=20, seed=2, grid=space))
    assert all(1e-5 <= draw["r"] <= 1e-2 and 0 <= draw["u"] <= 1 for draw in draws)
    assert 60 < sum(draw["r"] < 1e-4 for draw in draws) < 140 and 60 < sum(draw["u"] < 1 / 3 for draw in draws) < 140
    assert {draw["n"] for draw in draws} == {1, 2, 3, 4} and {draw["c"] for draw in draws} == {"p", "q"}
    assert all(type(draw["n"]) is int and draw["r"] == float(f"{draw['r']:.4g}") for draw in draws)
    settings, runs = sweep.plan(sweep.Sweep("stub.py", "eval/score", [2, 1], grid={"rate": [0.1, "1e-1", 3]}), "s.yaml")
    assert settings == [{"rate": 0.1}, {"rate": 3}] and "rate=1e-1: means the same" in capsys.readouterr().out
    assert [(run.setting, run.seed) for run in runs] == [(0, 2), (1, 2), (0, 1), (1, 1)]
    paths = sweep.Sweep("stub.py", "eval/score", [1], grid={"mode": ["a/b", "a_b", "x" * 300]})
    names = [run.folder.name for run in sweep.plan(paths, "s.yaml")[1]]
    assert len(set(names)) == 3 and names[1] == "mode=a_b,seed=1" and max(map(len, names)) < 130


def results(*values):
    """Of settings with these final values, one for each seed; None where a seed is not finished."""
    return {(i, seed): (value, value, 1.0) for i, row in enumerate(values) for seed, value in enumerate(row)
            if value is not None}


def test_how_settings_stand_against_the_best():
    def verdicts(*values, goal="maximize"):
        asked = sweep.Sweep(seeds=list(range(len(values[0]))), goal=goal)
        rows = sweep.summary([{"i": i} for i in range(len(values))], results(*values), asked)
        return [(row["i"], row["against_best"].split(":")[0]) for row in rows]

    low, middle, high = [1.0, 1.1, 0.9], [1.3, 1.2, 1.4], [2.0, 2.1, 1.9]  # each ± 0.248
    assert verdicts(low, high, middle) == [(1, "best"), (2, "worse"), (0, "worse")]
    assert verdicts(low, high, middle, goal="minimize") == [(0, "best"), (2, "tie"), (1, "worse")]
    assert verdicts([1, 2, 3], [2, 3, 4]) == [(1, "best"), (0, "tie")]
    assert verdicts(low, [9, 9, None], [None] * 3) == [(0, "best"), (1, "not judged"), (2, "not judged")]
    assert verdicts(low, [math.nan, 1, 1]) == [(0, "best"), (1, "not judged")]
    assert verdicts([1.0], [2.0]) == [(1, "best"), (0, "not judged")]


def test_table_of_what_is_missing(tmp_path):
    asked = sweep.Sweep("s.py", "eval/a", [0, 1], grid={"i": [0, 1]}, processes=2)
    rows = sweep.summary([{"i": 0}, {"i": 1}], results([3.0, None], [None, None]), asked)
    text = sweep.table(rows, asked)
    assert "| 0 | 3 " in text and "| 1 | nan" in text and "not judged: 1 of 2 seeds" in text and "±" in text
    assert "torchrun --nproc_per_node 2 s.py --i 0\n" in text
    sweep.write_tables(tmp_path, rows, asked)
    with open(tmp_path / "table.csv") as file:
        one, none = csv.DictReader(file)
    assert (one["final"], one["final_low"], one["seeds"]) == ("3.0", "", "1") and none["final"] == none["seconds"] == ""
    assert "Best" not in sweep.table(rows[1:], asked)


def test_result_of_a_run(tmp_path):
    rows = [{"step": 0, "a": 5.0, "seconds": 1}, {"step": 1, "a": 2.0, "seconds": 2}, {"step": 2, "seconds": 3}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = sweep.Run(0, 0, tmp_path, [], {})
    assert sweep.result(run, sweep.Sweep(metric="a")) == (2.0, 5.0, 3)
    assert sweep.result(run, sweep.Sweep(metric="a", goal="minimize")) == (2.0, 2.0, 3)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('\n{"step": 3, "a": NaN, "seconds": 4}\n')
    final, best, seconds = sweep.result(run, sweep.Sweep(metric="a"))
    assert math.isnan(final) and best == 5.0 and seconds == 4


def test_last_words(tmp_path):
    run = sweep.Run(0, 0, tmp_path, [], {})
    (tmp_path / "log").write_text("$ python s.py\ns.py: error: old\n$ python s.py\nbegun\n\n  KeyError: 'a'  \n\n")
    assert sweep.last_words(run, "x/s.py") == "KeyError: 'a'"
    (tmp_path / "log").write_text("$ torchrun s.py\n[rank 1] s.py: error: bad row\nE torch.distributed\n======\n")
    assert sweep.last_words(run, "x/s.py") == "[rank 1] s.py: error: bad row"
    (tmp_path / "log").write_text("$ python s.py\n")
    assert sweep.last_words(run, "s.py") == "nothing was said"


def test_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert [sweep.gpus(slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1, 2)] == ["4,5", "6,7", "4,5"]
    assert sweep.gpus(3, 1) == {"CUDA_VISIBLE_DEVICES": "7"} and sweep.gpus(0, 8) == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert sweep.gpus(1, 1) == {}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 2)
    assert sweep.gpus(1, 1) == {"CUDA_VISIBLE_DEVICES": "1"}


def test_two_sweeps_in_one_folder(here, monkeypatch):
    monkeypatch.setattr(sweep, "lock", lambda folder: "process 7 on there")
    refused(["runs/sweeps/s", "process 7 on there is sweeping there"], lambda: swept(grid={"rate": [1]}))


def test_one_line_on_the_command_line(tmp_path):
    for script in ("plot.py", "sweep.py"):
        ended = run_forked(str(ROOT / "benchmarks" / script), "gone", cwd=tmp_path)
        assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
        assert ended.stderr.startswith(f"{script}: error: gone") and not ended.stdout

"""Runs that are killed, told to end, starved of disk space, fed numbers that are not finite, or started twice.

PLAINRL_LONG=1 pytest tests/test_reliability.py kills each script 50 times, on 1 and on 2 processes; else a slice of it.
"""

import contextlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_forked
from crash import SHARED, WORDS, contents, score

import dpo
import ilql
import ppo
import sft
from common import cli, metrics
from common.checkpoint import checkpoints, damage, lock, tidy, unlock
from common.cli import Terminated, UserError

LONG = bool(os.environ.get("PLAINRL_LONG"))
SCRIPTS = ("ppo", "sft", "dpo", "ilql")


def kill(folder, model, script: str, processes: int, kills: int) -> dict:
    os.symlink(model, f"{folder}/model")
    done = run_forked("tests/crash.py", str(folder), script, str(processes), str(kills), str(kills),
                      timeout=200 + 60 * kills)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT"))
    print(script, processes, found)
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_runs_resume_to_the_last_bit(script, model_path, tmp_path):
    found = kill(tmp_path, model_path("gpt2"), script, 1, 50 if LONG else 3)
    assert found["resumed"] and found["writing"] > (2 if LONG else -1)


@pytest.mark.parametrize("script", SCRIPTS if LONG else ("ppo",))
def test_killed_runs_of_two_processes_resume_to_the_last_bit(script, model_path, tmp_path):
    found = kill(tmp_path, model_path("gpt2"), script, 2, 50 if LONG else 1)
    assert found["kills"] and (not LONG or found["resumed"] and found["writing"])


def train(script: str, model: str, folder, **flags):
    """A short run of any script, in this process, on the words that `crash` uses."""
    flags = {**SHARED, "model": model, "output_dir": str(folder), "resume": None, **flags}
    pairs = [{"prompt": word, "chosen": word[::-1], "rejected": "z" + word, "completion": word[::-1]} for word in WORDS]
    if script == "ppo":
        few = dict(rollout_batch_size=8, total_episodes=32, num_eval_prompts=4, ppo_epochs=1)
        return ppo.train(ppo.Args(**{**few, **flags}), reward_fn=score, prompts=WORDS)
    if script == "sft":
        return sft.train(sft.Args(**{**dict(epochs=2, held_out=0.2, num_eval_prompts=2), **flags}), pairs)
    if script == "dpo":
        return dpo.train(dpo.Args(**{**dict(epochs=2, held_out=0.2, num_eval_prompts=2), **flags}), pairs)
    return ilql.train(ilql.Args(**{**dict(epochs=2, num_eval_prompts=2, beta=[0.0]), **flags}),
                      [[word, word[::-1]] for word in WORDS], [float(len(word)) for word in WORDS], metric_fn=score)


def lines(folder) -> list[dict]:
    path = Path(folder) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --- being told to end ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(folder, model: str, processes: int = 0):
    """A long run of ppo.py as users start it, once it has taken a step."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": word}) + "\n" for word in WORDS))
    (folder / "score.py").write_text("def score(outputs, **_):\n    return [float(len(o)) for o in outputs]\n")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes else []
    flags = dict(SHARED, model=model, reward=f"{folder}/score.py:score", prompts=f"{folder}/prompts.jsonl",
                 output_dir=f"{folder}/run", rollout_batch_size=8, total_episodes=800000, num_eval_prompts=2,
                 save_every=0, eval_every=10**6)
    words = [sys.executable, *launcher, "ppo.py"]
    words += [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
    try:
        until = time.time() + 120
        while len(lines(folder / "run")) < 3:
            assert process.poll() is None and time.time() < until, (folder / "log").read_text()[-3000:]
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        for child in workers(folder):
            os.kill(child, signal.SIGKILL)
        process.wait()


def workers(folder) -> list[int]:
    """The processes that still train in this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if f"{folder}/run".encode() in words and b"torch.distributed.run" not in words:
                found.append(int(path.parent.name))
    return found


def gone(folder, seconds: float) -> bool:
    """Whether nobody trains in this folder any more, at the latest after so many seconds."""
    until = time.time() + seconds
    while workers(folder) and time.time() < until:
        time.sleep(0.05)
    return not workers(folder)


def test_a_run_that_is_told_to_end_writes_a_checkpoint_and_leaves_with_143(model_path, tmp_path):
    with running(tmp_path, model_path("gpt2")) as process:
        other = run_forked("ppo.py", "--model", model_path("gpt2"), "--reward", "randomwalks", "--output-dir",
                           f"{tmp_path}/run", "--resume", "auto")
        assert other.returncode == 2 and len(other.stderr.splitlines()) == 1, other.stderr
        assert f"{tmp_path}/run: process {process.pid} on " in other.stderr and "is training there" in other.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    (path,) = checkpoints(f"{tmp_path}/run/checkpoints")
    assert damage(path) is None and lines(tmp_path / "run")[-1]["step"] == int(path.rsplit("-", 1)[1])
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last == f"ppo.py: told to end at step {path.rsplit('-', 1)[1]}; --resume auto goes on from there"


@pytest.mark.parametrize("script,call", [*((script, 3) for script in SCRIPTS), ("ppo", 4)])
def test_each_script_goes_on_where_it_was_told_to_end(script, call, model_path, tmp_path, monkeypatch):
    """At the beginning of a step; of PPO also in the middle, where the rollout is given up."""
    train(script, model_path("gpt2"), tmp_path / "straight")
    module, asked = LOSSES[script][0], []
    with monkeypatch.context() as patch:
        real = module.end_if_told
        patch.setattr(module, "end_if_told", lambda *at: (asked.append(1), patch.setattr(
            cli._Told, "signal", len(asked) == call), real(*at)))
        step = 1 if script == "ppo" else 2
        with pytest.raises(Terminated, match=f"^told to end at step {step}; --resume auto goes on from there$"):
            train(script, model_path("gpt2"), tmp_path / "run", save_every=0)
    assert [os.path.basename(path) for path in checkpoints(f"{tmp_path}/run/checkpoints")] == [f"step-{step}"]
    train(script, model_path("gpt2"), tmp_path / "run", resume="auto")
    assert contents(tmp_path / "run") == contents(tmp_path / "straight")


def test_processes_that_are_told_to_end_write_one_checkpoint_and_leave(model_path, tmp_path):
    with running(tmp_path, model_path("gpt2"), 2) as process:
        process.send_signal(signal.SIGTERM)
        assert gone(tmp_path, 20)
        process.wait(20)
    (path,) = checkpoints(f"{tmp_path}/run/checkpoints")
    assert damage(path) is None and {"random-0.json", "random-1.json"} <= set(os.listdir(path))


def test_a_process_that_dies_takes_the_others_down(model_path, tmp_path):
    with running(tmp_path, model_path("gpt2"), 2) as process:
        os.kill(max(workers(tmp_path)), signal.SIGKILL)
        assert process.wait(120) != 0 and gone(tmp_path, 1)
    assert "forcefully exiting" not in (tmp_path / "log").read_text()  # by themselves, before torchrun kills them


def test_a_process_with_other_flags_is_refused(model_path, tmp_path):
    """By a script that gives the second process another seed."""
    (tmp_path / "two.py").write_text(
        "import os, sys\nsys.path.insert(0, os.getcwd())\nimport ppo\nfrom common.cli import run\n"
        "sys.argv += ['--seed', str(5 + int(os.environ['RANK']))]\nrun(ppo.train, ppo.Args, ppo.preset)\n")
    done = run_forked(f"{tmp_path}/two.py", "--model", model_path("gpt2"), "--reward", "randomwalks", "--output-dir",
                      f"{tmp_path}/run", processes=2)
    assert done.returncode and "error: --seed is 6 for process 1 and 5 for process 0: start all with " in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_has_one_run_at_a_time(tmp_path):
    """Another process, since a lock is a process's; this one may take its own again."""
    claim = tmp_path / "claim.py"
    claim.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom common.checkpoint import lock\n"
                     f"print(lock({str(tmp_path)!r}))\n")
    other = lambda: run_forked(str(claim)).stdout.strip()  # noqa: E731
    assert lock(str(tmp_path)) is None and lock(f"{tmp_path}/../{tmp_path.name}") is None
    assert other().startswith(f"process {os.getpid()} on ")
    unlock(str(tmp_path))
    assert other() == "None" and lock(str(tmp_path)) is None
    unlock(str(tmp_path))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_is_not_resumed_on_other_data(script, model_path, tmp_path, monkeypatch):
    train(script, model_path("gpt2"), tmp_path / "run", max_steps=1)
    monkeypatch.setattr(sys.modules[__name__], "WORDS", [*WORDS[:-1], "thirteen"])
    with pytest.raises(UserError, match="step-1: the data has changed since; start again in another --output-dir$"):
        train(script, model_path("gpt2"), tmp_path / "run", resume="auto")


# --- checkpoints that are not what was written ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    train("sft", model_path("gpt2"), folder, keep_checkpoints=3)
    return folder


def spoil(path: str, how: str) -> str:
    """Damage a checkpoint; returns the file that is to be named."""
    name = next(name for name in os.listdir(path) if name.endswith(".safetensors"))
    file = Path(path) / {"state": "state.json", "random": "random-0.json", "manifest": "manifest.json"}.get(how, name)
    if how == "bit":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif how == "cut":
        os.truncate(file, file.stat().st_size - 1)
    elif how == "gone":
        file.unlink()
    else:
        file.write_text("{")
    return file.name


@pytest.mark.parametrize("how", ["bit", "cut", "gone", "state", "random", "manifest"])
def test_a_damaged_checkpoint_is_named_and_skipped(how, finished, model_path, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    newest = checkpoints(f"{folder}/checkpoints")[-1]
    name = spoil(newest, how)
    with pytest.raises(UserError, match=f"^--resume {newest}: {name} .*; choose another checkpoint$"):
        train("sft", model_path("gpt2"), folder, keep_checkpoints=3, resume=newest)
    train("sft", model_path("gpt2"), folder, keep_checkpoints=3, resume="auto")
    assert f"{newest} is damaged and skipped: {name} " in capsys.readouterr().out
    assert contents(folder) == contents(finished)


def test_where_no_checkpoint_is_whole_nothing_is_overwritten(finished, model_path, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for path in checkpoints(f"{folder}/checkpoints"):
        spoil(path, "cut")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="^--resume auto: no checkpoint in .* is whole; start again in another"):
        train("sft", model_path("gpt2"), folder, keep_checkpoints=3, resume="auto")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_what_a_kill_leaves_between_two_renames_is_put_right(tmp_path):
    for name in ("a.old", "a.tmp", "b", "b.old", "c.old", "d.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    tidy(str(tmp_path))
    assert {path.name: (path / "file").read_text() for path in tmp_path.iterdir()} == {"a": "a.old", "b": "b"}


def test_a_run_that_was_killed_between_two_renames_finds_its_best_model_again(finished, model_path, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    os.rename(folder / "checkpoints" / "best", folder / "checkpoints" / "best.old")
    (folder / "checkpoints" / "best.tmp").mkdir()
    (folder / "model.tmp").mkdir()
    train("sft", model_path("gpt2"), folder, keep_checkpoints=3, resume="auto")
    assert contents(folder) == contents(finished) and not list(folder.rglob("*.tmp")) + list(folder.rglob("*.old"))


def test_the_newest_checkpoints_and_the_best_model_are_kept(finished):
    found = {int(path.rsplit("-", 1)[1]) for path in checkpoints(f"{finished}/checkpoints")}
    steps = max(row["step"] for row in lines(finished))
    assert found == {steps - 2, steps - 1, steps}
    assert (finished / "checkpoints" / "best" / "model.safetensors").exists()


# --- disk -------------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_ends_the_run_with_a_line_and_leaves_the_last_checkpoint(model_path, tmp_path):
    """Files of at most so many bytes stand for it: the first that does not fit is a checkpoint's."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": word, "completion": word[::-1]}) + "\n" for word in WORDS))
    words = ["--model", model_path("gpt2"), "--dataset", str(rows), "--output-dir", f"{tmp_path}/run", "--save-every",
             "1", "--eval-every", "99", "--num-eval-prompts", "0", "--max-new-tokens", "4", "--max-length", "40",
             "--batch-size", "4", "--held-out", "0.0", "--keep-checkpoints", "9"]
    assert run_forked("sft.py", *words, "--max-steps", "1").returncode == 0
    before = contents(tmp_path / "run" / "checkpoints" / "step-1")
    done = subprocess.run([sys.executable, "sft.py", *words, "--resume", "auto"], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000)))
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.splitlines()[-1] == (
        f"sft.py: error: the checkpoint {tmp_path}/run/checkpoints/step-2 could not be written: File too large; make "
        "room and --resume auto, or train on all the same with --keep-going")
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-1"]
    assert contents(tmp_path / "run" / "checkpoints" / "step-1") == before
    assert run_forked("sft.py", *words, "--resume", "auto").returncode == 0
    assert [row["step"] for row in lines(tmp_path / "run")] == [0, 1, 2, 3]


@pytest.mark.parametrize("script", SCRIPTS)
def test_by_flag_a_run_goes_on_without_its_checkpoints(script, model_path, tmp_path, capsys):
    """Where they should be is a folder in which nobody, not even root, can write."""
    (tmp_path / "run").mkdir()
    os.symlink("/proc", tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match="^the checkpoint .*step-1 could not be written: .*; make room and "):
        train(script, model_path("gpt2"), tmp_path / "run", eval_every=99)
    os.remove(tmp_path / "run" / "args.yaml")
    train(script, model_path("gpt2"), tmp_path / "run", keep_going=True)
    said = capsys.readouterr().err
    assert "step-1 could not be written" in said and "/best could not be written" in said
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert [row["step"] for row in lines(tmp_path / "run")][-1] == max(row["step"] for row in lines(tmp_path / "run"))


def test_a_log_that_cannot_be_written_is_one_line(model_path, tmp_path):
    (tmp_path / "run").mkdir()
    os.symlink("/dev/full", tmp_path / "run" / "metrics.jsonl.tmp")
    with pytest.raises(UserError, match="run/metrics.jsonl could not be written: No space left on device; make room"):
        train("sft", model_path("gpt2"), tmp_path / "run")


@pytest.mark.parametrize("kind", ["raises", "hangs"])
def test_a_run_does_not_need_weights_and_biases(kind, model_path, tmp_path, monkeypatch, capsys):
    """Where it can be reached, test_ppo.py runs it offline; here it is one that fails, or never answers."""
    def init(**_):
        if kind == "hangs":
            time.sleep(60)
        raise ConnectionError("nobody there\nand more")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=dict))
    monkeypatch.setattr(metrics, "PATIENCE", 0.5)
    train("sft", model_path("gpt2"), tmp_path / "plain")
    begun = time.time()
    train("sft", model_path("gpt2"), tmp_path / "run", track=True)
    assert time.time() - begun < 30 and contents(tmp_path / "run") == contents(tmp_path / "plain")
    assert ("wandb: nobody there; the run goes on without it\n" in capsys.readouterr().err) == (kind == "raises")


# --- numbers that are not finite --------------------------------------------------------------------------------------

LOSSES = {"ppo": (ppo, "value_loss", "loss/value"), "sft": (sft, "lm_loss", "loss/lm"),
          "dpo": (dpo, "preference_loss", "train/loss"), "ilql": (ilql, "q_loss", "loss/total")}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_loss_that_is_not_finite_stops_and_is_replayed(script, value, model_path, tmp_path, monkeypatch, capsys):
    """At the third step, with weights that the first two have changed. An infinite loss has a finite gradient here."""
    module, name, metric = LOSSES[script]
    train(script, model_path("gpt2"), tmp_path / "straight", eval_every=99)
    plain, steps, step = getattr(module, name), [], module.optimizer_step

    def broken(*inputs):
        found = plain(*inputs)
        if not torch.is_grad_enabled() or len(steps) < 2:
            return found
        wrong = lambda loss: loss * value if value != value else loss + value  # noqa: E731
        return (wrong(found[0]), *found[1:]) if isinstance(found, tuple) else wrong(found)

    monkeypatch.setattr(module, name, broken)
    monkeypatch.setattr(module, "optimizer_step", lambda *inputs: steps.append(1) or step(*inputs))
    folder = tmp_path / "run"
    what = "gradient is nan" if value != value else "loss is not finite"
    # of PPO, a step is a rollout with several updates
    with pytest.raises(UserError, match=rf"^step \d: the {what}; its batch and the state before it are in .*--replay "):
        train(script, model_path("gpt2"), folder, eval_every=99)
    (saved,) = folder.glob("nonfinite-step-*")
    assert damage(str(saved)) is None and not (folder / "model").exists()
    before, flags = contents(folder), dict(eval_every=99, replay=str(saved))
    with pytest.raises(UserError, match=f"^--replay {saved}: again the loss is {value}"):
        train(script, model_path("gpt2"), tmp_path / "not used", **flags)
    assert f"of {saved}/batch.pt are not finite alone" not in capsys.readouterr().err
    monkeypatch.setattr(module, name, plain)
    train(script, model_path("gpt2"), tmp_path / "not used", **flags)
    said = capsys.readouterr().out
    assert "loss and gradient are finite now" in said and not (tmp_path / "not used").exists()
    assert contents(folder) == before, "a replay changes nothing"
    if script == "sft":  # from there on, in the run's own folder
        train(script, model_path("gpt2"), None, output_dir=None, eval_every=99, resume=str(saved))
        assert (folder / "model").exists() and lines(folder)[-1]["step"] == lines(tmp_path / "straight")[-1]["step"]
    if script != "ppo":
        whole = float(next(line for line in said.splitlines() if line.startswith("all")).split()[1])
        assert whole == pytest.approx(lines(tmp_path / "straight")[3][metric], abs=2e-3), "other weights, or batch"


def test_a_replay_says_which_rows_do_it(model_path, tmp_path, capsys):
    """ILQL with one reward that is out of all bounds, as a user types it."""
    rows = [{"prompt": "a", "completion": word, "reward": 1e200 if word == "six" else 1.0} for word in WORDS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", model_path("gpt2"), "--dataset", f"{tmp_path}/rows.jsonl", "--num-eval-prompts", "0",
             "--output-dir", f"{tmp_path}/run", "--batch-size", "12", "--normalize-rewards", "none", "--max-length",
             "40"]
    done = run_forked("ilql.py", *words)
    assert done.returncode == 2 and f"--replay {tmp_path}/run/nonfinite-step-0 shows the rows" in done.stderr
    done = run_forked("ilql.py", "--replay", f"{tmp_path}/run/nonfinite-step-0")
    assert done.returncode == 2 and "again the loss is " in done.stderr and len(done.stderr.splitlines()) == 1
    table = done.stdout.split("1 of 12 rows of ")[1].splitlines()
    batch = torch.load(tmp_path / "run" / "nonfinite-step-0" / "batch.pt", weights_only=True)["trajectories"]
    (bad,) = [number for number, row in enumerate(batch) if max(row[3]) > 1]
    assert table[3].split()[0] == str(bad) and "six" in table[3] and table[4].split()[0] == "all"


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_cannot_be_replayed_is_one_line(script, finished, model_path, tmp_path):
    with pytest.raises(UserError, match=f"^--replay {tmp_path}/none: no checkpoint there"):
        train(script, model_path("gpt2"), tmp_path / "run", replay=f"{tmp_path}/none")
    if script == "sft":
        step = checkpoints(f"{finished}/checkpoints")[-1]
        with pytest.raises(UserError, match=f"^--replay {step}: its batch.pt cannot be read .*; give the nonfinite-"):
            train(script, model_path("gpt2"), tmp_path / "run", replay=step)


def test_a_kl_that_runs_away_stops_the_run(model_path, tmp_path):
    train("ppo", model_path("gpt2"), tmp_path / "free", learning_rate=0.1, save_every=0)
    kl = [row["rollout/kl"] for row in lines(tmp_path / "free")[1:]]
    step = next(step for step, value in enumerate(kl) if value > 1.0)
    assert step > 0
    with pytest.raises(UserError, match=rf"^step {step}: the KL to the reference is {kl[step]:.2f} nats an output, "):
        train("ppo", model_path("gpt2"), tmp_path / "run", learning_rate=0.1, save_every=0, max_kl=1.0)
    (path,) = checkpoints(f"{tmp_path}/run/checkpoints")
    assert path.endswith(f"step-{step}") and lines(tmp_path / "run")[-1]["step"] == step


# --- long runs --------------------------------------------------------------------------------------------------------


def test_a_long_run_neither_grows_nor_leaves_files_open_nor_loses_lines():
    done = run_forked("benchmarks/soak.py", "--updates", "2000" if LONG else "60", timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.splitlines()[-1]
    print(said)
    grows, first, last = map(int, re.search(r": (-?\d+) ± .* open files (\d+) and (\d+); log complete", said).groups())
    assert first == last and grows < (1000 if LONG else 10**5)  # a short run still grows into its memory

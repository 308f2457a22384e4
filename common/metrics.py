"""The run directory: metrics.jsonl, samples.jsonl, args.yaml; and the terminal: progress bar, tables; and wandb."""

import dataclasses
import json
import math
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import yaml
from tqdm import tqdm

from common.checkpoint import checkpoints, damage, drop, lock, read_state, tidy, unlock
from common.cli import UserError, reason
from common.distributed import broadcast, clip_gradient, gather_rows


def say(text: str) -> None:
    """Print on rank 0, above the progress bar if there is one."""
    if dist.get_rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()


def open_run(args, name: str, free: tuple[str, ...]) -> tuple[str, str | None]:
    """Choose and create the run directory; return it and the checkpoint to resume from, if any.

    Without `--output-dir` it is `runs/NAME`, with -2, -3, ... where that is taken. `--resume auto` takes the newest
    checkpoint of the directory that is whole, or starts afresh where there is none; `--resume PATH` takes that one. It
    must be of a run with equal settings but for those `free`; later checkpoints beside it go, as their steps will be
    taken again. With `--replay` it is the directory of that run, which is only read. Raises UserError for a directory
    that cannot be written, that holds another run or that another process is writing to, for a damaged checkpoint, and
    where the processes were given different flags.
    """
    if args.replay:
        return os.path.dirname(os.path.abspath(args.replay)), args.replay
    mine = dataclasses.asdict(args)
    for rank, settings in enumerate(gather_rows([mine], dist.get_world_size())):
        for key in (key for key in mine if settings[key] != mine[key]):
            flag, here = f"--{key.replace('_', '-')}", dist.get_rank()
            raise UserError(f"{flag} is {settings[key]} for process {rank} and {mine[key]} for process {here}: start "
                            "all with the same flags")
    folder, found = _on_rank_0(lambda: _find(args, name))
    checkpoint = None
    for path in reversed(found):
        problem = damage(path)
        if problem is None:
            checkpoint = path
            break
        if args.resume != "auto":
            raise UserError(f"--resume {path}: {problem}; choose another checkpoint")
        say(f"{path} is damaged and skipped: {problem}")
    if found and not checkpoint:
        raise UserError(f"--resume auto: no checkpoint in {folder} is whole; start again in another --output-dir")
    _on_rank_0(lambda: _prepare(args, folder, checkpoint, free))
    return folder, checkpoint


def _on_rank_0(work: Callable):
    """What `work` returns on rank 0, or the UserError that it raises there, on all ranks."""
    answer = None
    if dist.get_rank() == 0:
        try:
            answer = work()
        except UserError as error:
            answer = error
        except OSError as error:
            answer = UserError(f"--output-dir {error.filename}: {error.strerror}; choose a folder that can be written")
    answer = broadcast(answer)
    if isinstance(answer, UserError):
        raise answer
    return answer


def _find(args, name) -> tuple[str, list[str]]:
    """The run directory, claimed for this process, and the checkpoints to resume from, oldest first."""
    base = args.output_dir or os.path.join("runs", name)
    names = [base] if args.output_dir else [base, *(f"{base}-{n}" for n in range(2, 10000))]
    taken = [folder for folder in names if os.path.exists(f"{folder}/args.yaml")]
    found = []
    if args.resume not in (None, "auto"):
        found = [args.resume.rstrip("/")]
        home = os.path.dirname(os.path.abspath(found[0])).removesuffix("/checkpoints")  # of the run that wrote it
        folder = args.output_dir or home
        holds = taken and (checkpoints(f"{base}/checkpoints") or os.path.exists(f"{base}/model"))  # what could be lost
        if args.output_dir and holds and os.path.isdir(found[0]) and not os.path.samefile(base, home):
            raise UserError(f"--output-dir {base}: holds another run than --resume {found[0]}; choose another folder, "
                            "or --resume auto to go on with that one")
    elif args.resume:
        folder = next((folder for folder in reversed(taken) if checkpoints(f"{folder}/checkpoints")), base)
    elif args.output_dir and taken:
        raise UserError(f"--output-dir {base}: holds a run already; add --resume auto, or choose another folder")
    else:
        folder = next(folder for folder in names if folder not in taken and (args.output_dir or not lock(folder)))
    if owner := lock(folder):
        raise UserError(f"--output-dir {folder}: {owner} is training there; wait for it, or choose another folder")
    for inside in (folder, f"{folder}/checkpoints"):
        tidy(inside)
    return folder, found or (checkpoints(f"{folder}/checkpoints") if args.resume else [])


def _prepare(args, folder, checkpoint, free) -> None:
    settings = dataclasses.asdict(args)
    if checkpoint:
        state = read_state(checkpoint)
        before = state["args"]
        for key in settings:
            if key not in free and settings[key] != before.get(key):
                flag = f"--{key.replace('_', '-')}"
                raise UserError(f"--resume {checkpoint}: is of another run: its {flag} was {before.get(key)}, "
                                f"not {settings[key]}")
        for later in checkpoints(f"{folder}/checkpoints"):  # another run's, that is only read, stay
            if int(later.rsplit("-", 1)[1]) > state["step"]:
                drop(later)
    os.makedirs(f"{folder}/checkpoints", exist_ok=True)


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity for one that a kill or a full disk has cut."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


PATIENCE = 30.0  # seconds for Weights and Biases at the end of a run


class _Wandb:
    """Weights and Biases in a thread of its own, so that a run neither stops nor waits when it cannot be reached."""

    def __init__(self, **settings):
        self.work, self.settings = queue.SimpleQueue(), settings
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self):
        try:
            import wandb

            run = wandb.init(project=os.environ.get("WANDB_PROJECT", "plainrl"), **self.settings,
                             settings=wandb.Settings(init_timeout=20))
            for send in iter(self.work.get, None):
                send(wandb, run)
            run.finish()
        except Exception as error:  # whatever it is, the run goes on
            tqdm.write(f"wandb: {reason(error)}; the run goes on without it", file=sys.stderr)

    def close(self) -> None:
        """Send what is left, but not for longer than PATIENCE."""
        self.work.put(None)
        self.thread.join(PATIENCE)


class RunLog:
    """Writes a run's settings (args.yaml), metrics and samples; does nothing on ranks other than 0.

    After a resume, lines of steps later than `step` are dropped: they are about to be made again. Raises UserError
    where a file cannot be written; with keep_going it is said, and training goes on.
    """

    def __init__(self, folder: str, args, step: int, total: int, track: bool, started: float, keep_going: bool = False):
        self.folder, self.main, self.wandb, self.start = folder, dist.get_rank() == 0, None, started
        self.keep_going, self.told = keep_going, False
        if not self.main:
            return
        self._write("args.yaml", yaml.safe_dump(dataclasses.asdict(args), sort_keys=False))
        for name in ("metrics.jsonl", "samples.jsonl"):
            path, lines = os.path.join(folder, name), []
            if step and os.path.exists(path):
                with open(path, encoding="utf-8") as file:
                    lines = [line for line in file if _step_of(line) <= step]
            self._write(name, "".join(lines))
            if name == "metrics.jsonl" and lines:
                self.start -= json.loads(lines[-1])["seconds"]
        self.bar = tqdm(total=total, initial=step, dynamic_ncols=True, leave=False, disable=not sys.stderr.isatty(),
                        bar_format="step {n_fmt}/{total_fmt} |{bar:5}| {elapsed}<{remaining}{postfix}")
        if track:
            self.wandb = _Wandb(name=os.path.basename(folder), dir=folder, config=dataclasses.asdict(args))

    def _write(self, name: str, text: str, more: bool = False) -> None:
        """A file of the run: whole, by a temporary one, since a kill may come in the middle; or some more lines."""
        path = os.path.join(self.folder, name)
        try:
            with open(path if more else path + ".tmp", "a" if more else "w", encoding="utf-8") as file:
                file.write(text)
            if not more:
                os.replace(path + ".tmp", path)
        except OSError as error:
            if not self.keep_going:
                raise UserError(f"{path} could not be written: {error.strerror}; make room and --resume auto, or train "
                                "on all the same with --keep-going") from None
            if not self.told:
                say(f"{path} could not be written: {error.strerror}; training goes on, and lines will be missing")
            self.told = True

    def metrics(self, step: int, values: dict[str, float], show: tuple[str, ...] = ()) -> None:
        """Append one line to metrics.jsonl and show the metrics named in `show` on the progress line."""
        if not self.main:
            return
        row = {"step": step, **values, "seconds": round(time.time() - self.start, 3)}
        self._write("metrics.jsonl", json.dumps(row) + "\n", more=True)
        if self.wandb:
            self.wandb.work.put(lambda _, run: run.log(row, step=step))
        self.bar.n = step
        shown = [f"{name.rsplit('/', 1)[-1]} {values[name]:.3g}" for name in show if name in values]
        line = "  ".join(shown)
        clock = "0:00:00" if row["seconds"] * self.bar.total > 3600 * max(1, step) else "00:00"
        head = f"step {step}/{self.bar.total} |12345| {clock}<{clock}, "
        room = shutil.get_terminal_size((100, 24)).columns - len(head)
        while shown and len("  ".join(shown)) >= room:  # whole metrics, as many as the terminal has room for
            shown.pop()
        self.bar.set_postfix_str("  ".join(shown))
        evaluated = any(name.startswith("eval/") for name in values)
        if self.bar.disable and (evaluated or step % max(1, self.bar.total // 100) == 0):
            print(f"step {step}/{self.bar.total}  {line}", flush=True)

    def samples(self, step: int, rows: list[dict]) -> None:
        """Append evaluation samples to samples.jsonl."""
        if not self.main:
            return
        lines = [json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows]
        self._write("samples.jsonl", "".join(lines), more=True)
        if self.wandb and rows:
            values = [list(row.values()) for row in rows]
            self.wandb.work.put(lambda wandb, run: run.log(
                {"samples": wandb.Table(columns=list(rows[0]), data=values)}, step=step))

    def close(self) -> None:
        """End the progress line and the wandb run, and give the directory up."""
        if self.main:
            self.bar.close()
            unlock(self.folder)
        if self.wandb:
            self.wandb.close()


def replay(
    path: str, optimizer: torch.optim.Optimizer, texts: dict[int, str], gradient: Callable[[list[int]], float]
) -> None:
    """Run the saved batch of `--replay`: each row alone, then all. Raises UserError if that is not finite, again.

    texts: of the rows, by their numbers. gradient(rows) adds the gradient of these rows' mean loss, and returns the
    loss.
    """
    def measured(some):
        loss = gradient(some)
        norm = clip_gradient(optimizer, math.inf)
        optimizer.zero_grad()
        return {"loss": loss, "gradient norm": norm}

    found = [{"row": str(row), **measured([row]), "text": text} for row, text in texts.items()]
    broken = [row for row in found if not (math.isfinite(row["loss"]) and math.isfinite(row["gradient norm"]))]
    whole = measured(list(texts))
    say(table(f"{len(broken)} of {len(texts)} rows of {path}/batch.pt are not finite alone",
              (broken or found)[:50] + [{"row": "all", **whole, "text": ""}]))
    if not all(map(math.isfinite, whole.values())):
        what = " and ".join(f"the {name} is {value:.4g}" for name, value in whole.items())
        raise UserError(f"--replay {path}: again {what}")
    say(f"--replay {path}: loss and gradient are finite now; if nothing was changed since, suspect the machine")


def table(title: str, rows: list[dict]) -> str:
    """Rows as a plain text table that fits the terminal: numbers as they are, texts share what is left and are cut."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 140)
    names = list(rows[0])

    def text(value):
        return f"{value:.3f}" if isinstance(value, float) else " ".join(str(value).split())

    cells = [[text(row.get(name, "")) for name in names] for row in rows]
    need = [max(len(line[i]) for line in [names, *cells]) for i in range(len(names))]
    texts = [i for i in range(len(names)) if isinstance(rows[0][names[i]], str)]
    spare = width - 2 * (len(names) - 1) - sum(need[i] for i in range(len(names)) if i not in texts)
    for done, i in enumerate(sorted(texts, key=lambda i: need[i])):
        need[i] = min(need[i], max(8, spare // (len(texts) - done)))
        spare -= need[i]

    def fit(i, cell):
        cell = cell if len(cell) <= need[i] else cell[: need[i] - 1] + "…"
        return cell.ljust(need[i]) if i in texts else cell.rjust(need[i])

    lines = ["  ".join(fit(i, cell) for i, cell in enumerate(line)).rstrip() for line in [names, *cells]]
    return "\n".join([title, lines[0], "-" * min(width, max(map(len, lines))), *lines[1:]])

"""The run directory: metrics.jsonl, samples.jsonl, args.yaml; and the terminal: progress bar, tables; and wandb."""

import dataclasses
import json
import os
import shutil
import sys
import time

import torch.distributed as dist
import yaml
from tqdm import tqdm

from common.cli import UserError
from common.distributed import broadcast, checkpoints, read_state


def say(text: str) -> None:
    """Print on rank 0, above the progress bar if there is one."""
    if dist.get_rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()


def open_run(args, name: str, free: tuple[str, ...]) -> tuple[str, str | None]:
    """Choose and create the run directory; return it and the checkpoint to resume from, if any.

    Without `--output-dir` it is `runs/NAME`, with -2, -3, ... where that is taken. `--resume auto` takes the newest
    checkpoint of the directory, or starts afresh where there is none; `--resume PATH` takes that one. It must be of a
    run with equal settings but for those `free`; later checkpoints beside it go, as their steps will be taken again.
    Raises UserError for a directory that cannot be written or that holds another run.
    """
    answer = None
    if dist.get_rank() == 0:
        try:
            answer = _open_run(args, name, free)
        except UserError as error:
            answer = error
        except OSError as error:
            answer = UserError(f"--output-dir {error.filename}: {error.strerror}; choose a folder that can be written")
    answer = broadcast(answer)
    if isinstance(answer, UserError):
        raise answer
    return answer


def _open_run(args, name, free):
    base = args.output_dir or os.path.join("runs", name)
    checkpoint = None if args.resume in (None, "auto") else args.resume.rstrip("/")
    if checkpoint:
        folder = args.output_dir or os.path.dirname(os.path.dirname(os.path.abspath(checkpoint)))
    else:
        names = [base] if args.output_dir else [base, *(f"{base}-{n}" for n in range(2, 10000))]
        taken = [folder for folder in names if os.path.exists(f"{folder}/args.yaml")]
        if args.resume:
            found = [path for folder in taken for path in checkpoints(f"{folder}/checkpoints")[-1:]]
            checkpoint = found[-1] if found else None
            folder = os.path.dirname(os.path.dirname(found[-1])) if found else base
        elif args.output_dir and taken:
            raise UserError(f"--output-dir {base}: holds a run already; add --resume auto, or choose another folder")
        else:
            folder = next(folder for folder in names if folder not in taken)
    settings = dataclasses.asdict(args)
    if checkpoint:
        state = read_state(checkpoint)
        before = state["args"]
        for key in settings:
            if key not in free and settings[key] != before.get(key):
                flag = f"--{key.replace('_', '-')}"
                raise UserError(f"--resume {checkpoint}: is of another run: its {flag} was {before.get(key)}, "
                                f"not {settings[key]}")
        for later in checkpoints(os.path.dirname(os.path.abspath(checkpoint))):
            if int(later.rsplit("-", 1)[1]) > state["step"]:
                shutil.rmtree(later)
    os.makedirs(f"{folder}/checkpoints", exist_ok=True)
    return folder, checkpoint


class RunLog:
    """Writes a run's settings (args.yaml), metrics and samples; does nothing on ranks other than 0.

    After a resume, lines of steps later than `step` are dropped: they are about to be made again.
    """

    def __init__(self, folder: str, args, step: int, total: int, track: bool, started: float):
        self.folder, self.main, self.wandb, self.start = folder, dist.get_rank() == 0, None, started
        if not self.main:
            return
        with open(f"{folder}/args.yaml", "w", encoding="utf-8") as file:
            yaml.safe_dump(dataclasses.asdict(args), file, sort_keys=False)
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = os.path.join(folder, name)
            lines = []
            if step and os.path.exists(path):
                with open(path, encoding="utf-8") as file:
                    lines = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= step]
            with open(path, "w", encoding="utf-8") as file:
                file.writelines(lines)
            if name == "metrics.jsonl" and lines:
                self.start -= json.loads(lines[-1])["seconds"]
        self.bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, leave=False,
                        disable=not sys.stderr.isatty())
        if track:
            import wandb

            project = os.environ.get("WANDB_PROJECT", "plainrl")
            self.wandb = wandb.init(project=project, name=os.path.basename(folder), dir=folder,
                                    config=dataclasses.asdict(args))

    def metrics(self, step: int, values: dict[str, float], show: tuple[str, ...] = ()) -> None:
        """Append one line to metrics.jsonl and show the metrics named in `show` on the progress line."""
        if not self.main:
            return
        row = {"step": step, **values, "seconds": round(time.time() - self.start, 3)}
        with open(f"{self.folder}/metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.wandb:
            self.wandb.log(row, step=step)
        self.bar.n = step
        line = "  ".join(f"{name.rsplit('/', 1)[-1]} {values[name]:.3g}" for name in show if name in values)
        self.bar.set_postfix_str(line)
        evaluated = any(name.startswith("eval/") for name in values)
        if self.bar.disable and (evaluated or step % max(1, self.bar.total // 100) == 0):
            print(f"step {step}/{self.bar.total}  {line}", flush=True)

    def samples(self, step: int, rows: list[dict]) -> None:
        """Append evaluation samples to samples.jsonl."""
        if not self.main:
            return
        with open(f"{self.folder}/samples.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows)
        if self.wandb and rows:
            import wandb

            values = [list(row.values()) for row in rows]
            self.wandb.log({"samples": wandb.Table(columns=list(rows[0]), data=values)}, step=step)

    def close(self) -> None:
        """End the progress line and the wandb run."""
        if self.main:
            self.bar.close()
        if self.wandb:
            self.wandb.finish()


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

"""The command line: flags from a dataclass, a YAML file under them, and one line for a user's mistake."""

import contextlib
import dataclasses
import difflib
import io
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist
import tyro
import yaml


class UserError(ValueError):
    """A mistake that the user can mend. The message is one line: what is wrong, where, and what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # it may quote a name or another error, of several lines


def reason(error: BaseException, line: int = 0) -> str:
    """One line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[line][:160]


class Terminated(BaseException):
    """The run was told to end (SIGTERM), and has written a checkpoint. The message is one line."""


class FunctionError(UserError):
    """An exception in a user's function: `__cause__`. Its traceback, which begins at that function, is shown above the
    line."""


def _flags_of(path: str, default) -> list[str]:
    """The settings of a YAML file as command-line words, so that they are checked in the same way."""
    names = [field.name for field in dataclasses.fields(default)]
    try:
        with open(path, encoding="utf-8") as file:
            settings = yaml.safe_load(file) or {}
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no Unicode, or a day as 2026-13-01
        raise UserError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError(f"--config {path}: must hold 'name: value' lines, not a {type(settings).__name__}")
    words = []
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean '{near[0]}'?" if near else "; --help lists the settings"
            raise UserError(f"--config {path}: no setting is called '{key}'{hint}")
        flag = name.replace("_", "-")
        if isinstance(value, bool) != isinstance(getattr(default, name), bool):
            raise UserError(f"--config {path}: '{key}' is {value!r}; true and false are for flags that are on or off")
        if isinstance(value, list) != isinstance(getattr(default, name), list):
            raise UserError(f"--config {path}: '{key}' is {value!r}; lists are for settings that take several values")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return words


def _cli(default, words: list[str]):
    """`tyro.cli`, with its boxed error report folded into one line."""
    report = io.StringIO()
    try:
        with contextlib.redirect_stderr(report):
            return tyro.cli(type(default), args=words, default=default)
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
    text = re.sub(r"\x1b\[[0-9;]*m", "", report.getvalue())
    lines = [line.strip("│╭╮╰╯ ") for line in text.splitlines()[1:]]
    rule = next((i for i, line in enumerate(lines) if line.startswith("──")), len(lines))
    message = " ".join(" ".join(lines[:rule]).split())
    unknown = re.search(r"Unrecognized options: ([^,]+)", message)
    if unknown and unknown[1].startswith("--"):
        known = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(default)]
        near = difflib.get_close_matches(unknown[1], known, 1)
        message = f"unknown flag {unknown[1]}" + (f"; did you mean {near[0]}?" if near else "; --help lists the flags")
    elif unknown and unknown[1] in words:
        flags = [word for word in words[: words.index(unknown[1])] if word.startswith("--")]
        message = f"'{unknown[1]}' is one value too many" + (f" after {flags[-1]}" if flags else "")
    raise UserError(message)


def parse(args_class, preset=None, words: list[str] | None = None):
    """Read flags into `args_class`: its defaults, then the task's `preset`, then `--config FILE.yaml`, then the flags.

    `preset(args) -> dict` looks at the arguments once read and returns the defaults of the task that they choose.
    Raises `UserError` for an unknown flag, a value of the wrong type, or a setting that does not exist.
    """
    words = list(sys.argv[1:] if words is None else words)
    args = _cli(args_class(), words)
    if getattr(args, "config", None) is not None:  # the flags of some benchmarks have none
        words = _flags_of(args.config, args_class()) + words
        args = _cli(args_class(), words)
    return _cli(args_class(**preset(args)), words) if preset else args


def check_bounds(args, positive: tuple[str, ...], not_negative: tuple[str, ...], unit: tuple[str, ...]) -> None:
    """Raise UserError for a number among the named settings that is not finite or is out of bounds: more than 0, 0 or
    more, 0 to 1. None is within all bounds."""
    for names, bound in ((positive, "more than 0"), (not_negative, "0 or more"), (unit, "from 0 to 1")):
        for name in names:
            value = getattr(args, name)
            inside = value is None or (math.isfinite(value) and value >= 0 and (value > 0 or names is not positive))
            if not inside or (names is unit and value > 1):
                raise UserError(f"--{name.replace('_', '-')} {value}: must be {bound}")


def check_shared_flags(args) -> None:
    """Raise UserError for values that mean nothing, of flags that all scripts have."""
    allowed = {"eval_temperature": lambda value: 0 <= value < math.inf, "eval_top_k": lambda value: value >= 0,
               "eval_top_p": lambda value: 0 < value <= 1, "stop": bool}
    for name, allow in allowed.items():
        values = getattr(args, name)
        if not all(map(allow, values)) or (not values and name != "stop"):
            given = " ".join(map(repr, values))
            raise UserError(f"--{name.replace('_', '-')} {given}: has a value that means nothing")
    if args.max_length is not None and args.max_length < 2:
        raise UserError(f"--max-length {args.max_length}: must be at least 2, one token before the one to be learned")
    if args.num_layers_unfrozen == 0 or args.num_layers_unfrozen < -1:
        raise UserError(f"--num-layers-unfrozen {args.num_layers_unfrozen}: must be -1 for all, or at least 1")
    if args.lora_rank and args.num_layers_unfrozen != -1:
        raise UserError("--num-layers-unfrozen: leave it out, --lora-rank freezes all weights already")


LOST = ("Connection closed by peer", "Connection reset by peer", "remote process exited")  # as gloo and NCCL say it


def leave(code: int, line: str, above: str = "") -> None:
    """End this process at once, from any thread: print what stands above the line, and the line; exit with `code`."""
    rank = int(os.environ.get("RANK", 0))
    if rank and line:
        # The same mistake usually stops every rank. Rank 0 speaks first, and torchrun then ends the others before
        # they repeat it; a mistake of this rank alone is still shown.
        time.sleep(2)
        if _Told.signal:
            os._exit(code)
    script = (f"[rank {rank}] " if rank else "") + os.path.basename(sys.argv[0])
    if line:  # sys.stderr may be the user's, or be caught
        print(f"{above}{script}: {line}", file=sys.__stderr__, flush=True)
    sys.stdout.flush()
    os._exit(code)


# --- being told to end ------------------------------------------------------------------------------------------------

GRACE = 25.0  # seconds; torchrun kills after 30


class _Told:
    """Whether SIGTERM has come, and whether somebody is there to ask."""

    signal = loop = False


def _watch() -> None:
    """Note a SIGTERM, by a thread: the main one may be waiting in a collective for a rank that is no more."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, lambda *_: None)  # Python's own, which the main thread would have to run
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def listen():
        while signal.SIGTERM not in os.read(reader, 1):
            pass
        _Told.signal = True
        if not _Told.loop:
            # under torchrun it is another's failure that has brought this, and that one has said why
            leave(143, "" if "RANK" in os.environ else "told to end before the first step")
        if dist.get_world_size() > 1:  # one process has nobody to wait for, and takes the time that it needs
            time.sleep(GRACE)
            os._exit(143)

    threading.Thread(target=listen, daemon=True).start()


def end_if_told(step: int, save: Callable[[str], str]) -> None:
    """Save, and raise Terminated, if any process has been told to end, SIGTERM, since the first call. All must call,
    where a checkpoint can be written: until the first call, SIGTERM ends a process at once."""
    _Told.loop = True
    told = torch.tensor(int(_Told.signal))
    dist.all_reduce(told, dist.ReduceOp.MAX)
    if told:
        save(f"checkpoints/step-{step}")
        raise Terminated(f"told to end at step {step}; --resume auto goes on from there")


def run(train, args_class, preset=None) -> None:
    """Run a script: parse the flags, train, and turn a `UserError` into one line on stderr and exit code 2.

    A rank that fails leaves at once, without waiting in a collective; torchrun then stops the others. SIGTERM ends with
    143, see `end_if_told`.
    """
    _watch()
    sys.stdout.reconfigure(errors="backslashreplace")  # samples hold letters that a terminal may not have
    try:
        train(parse(args_class, preset))
    except UserError as error:
        above = traceback.format_exception(error.__cause__) if isinstance(error, FunctionError) else []
        leave(2, f"error: {error}", "".join(above))
    except Terminated as error:
        leave(143, "" if int(os.environ.get("RANK", 0)) else str(error))
    except KeyboardInterrupt:
        leave(130, "interrupted; --resume auto goes on from a checkpoint")
    except Exception as error:
        if _Told.signal:  # as the others were, which are gone
            leave(143, "")
        if isinstance(error, RuntimeError) and any(words in str(error) for words in LOST):
            time.sleep(5)  # torchrun, which has seen that one end, ends this one without a word
            leave(1, "error: another process has ended; what it said last is the reason")
        leave(1, f"error: {type(error).__name__}, see above", traceback.format_exc())
    if dist.is_initialized() and dist.get_world_size() > 1:
        # Without Python's own teardown: in torch 2.13 threads of gloo that outlive it abort some of the exits
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)

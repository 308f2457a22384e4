"""Users' reward and metric functions: found, called with copies, timed, their answers checked, their failures shown."""

import contextlib
import copy
import faulthandler
import functools
import importlib
import importlib.util
import inspect
import itertools
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Literal

import torch
import torch.distributed as dist

from common.cli import FunctionError, UserError, leave
from common.data import listed, short


def load_function(spec: str, flag: str) -> Callable:
    """The function that `file.py:function` or `package.module:function` names. Raises UserError when there is none, and
    FunctionError when its module fails."""
    path, _, name = spec.rpartition(":")
    hint = "give file.py:function or package.module:function"
    if path.endswith(".py") and not os.path.isfile(path):
        raise UserError(f"{flag} {spec}: no such file: '{path}'; {hint}")
    try:
        if path.endswith(".py"):
            name_of_module = "users_" + os.path.basename(path)[:-3]  # a file may be called json.py
            found = importlib.util.spec_from_file_location(name_of_module, path)
            module = importlib.util.module_from_spec(found)
            sys.modules[found.name] = module  # dataclasses and pickle look there
            found.loader.exec_module(module)
        else:
            sys.path.append(os.getcwd())
            module = importlib.import_module(path)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and f"{path}.".startswith(f"{error.name}.")
        missing = missing or not path or path.startswith(".")
        if missing and not path.endswith(".py"):
            raise UserError(f"{flag} {spec}: {error}; {hint}") from None
        raise FunctionError(f"{flag} {spec}: its module fails: {_reason(error)}") from _own_frames(error)
    if not hasattr(module, name):
        raise UserError(f"{flag} {spec}: {path} has no attribute '{name}'; {hint}")
    function = getattr(module, name)
    if not callable(function):
        raise UserError(f"{flag} {spec}: is {short(function)}, not a function")
    return function


def call(function: Callable, /, **arguments):
    """Call a user's function with those of the arguments that it accepts. Raises UserError if it needs others."""
    name = _name(function)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some that are written in C
        raise UserError(f"{short(function)} is no function, or one that does not tell its arguments: wrap it in one "
                        "that names them") from None
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if missing := [p.name for p in needed if p.name not in arguments]:
        raise UserError(f"the function {name} needs an argument '{missing[0]}', but gets only {listed(arguments)}")
    if unnamed := [p.name for p in needed if p.kind is p.POSITIONAL_ONLY]:
        raise UserError(f"the function {name} does not take '{unnamed[0]}' by name: take the / out of its arguments")
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        accepted = {parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY}
        arguments = {name: value for name, value in arguments.items() if name in accepted}
    return function(**arguments)


def ask(
    function: Callable, kind: Literal["reward", "metric"], items: list[dict], rows: list[dict], tokenizer,
    timeout: float | None,
):
    """What a user's reward or metric function says of samples: `check_scores` or `check_metrics` of its answer.

    The function gets copies of `text_columns(items, rows)` and of the tokenizer. Raises FunctionError when it fails,
    naming the sample where a single one does it (for which the function is called again), and UserError for an answer
    that means nothing. Ends this process when it takes more than `timeout` seconds (see `time_limit`).
    """
    def answer(items, rows):
        found = call(function, **{**text_columns(items, rows), "tokenizer": _tokenizer_copy(tokenizer)})
        if kind == "metric":
            return check_metrics(found, len(items))
        return check_scores(found, [len(item["tokens"]) for item in items])

    begun, what, batch = time.monotonic(), f"the {kind} function {_name(function)}", f"a batch of {len(items)} samples"
    what += f" on rank {dist.get_rank()}" if dist.get_world_size() > 1 else ""
    late = f"{what} has not returned after {timeout or 0:g} seconds, for {batch}"
    try:
        with time_limit(timeout, f"{late}: its stack is above; mend it, or raise --reward-timeout"):
            return answer(items, rows)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        cause, reason = _own_frames(error), _reason(error)
    if len(items) > 1 and time.monotonic() - begun < SEARCH_SECONDS:
        above = "".join(traceback.format_exception(cause))
        with time_limit(4 * SEARCH_SECONDS, f"{what} failed on {batch}: {reason}", above):
            batch = _failing(answer, items, rows, cause) or batch
    elif len(items) == 1:
        batch = f"sample 0 of 1, {_texts(items[0])}"
    raise FunctionError(f"{what} failed on {batch}: {reason}") from cause


SEARCH_SECONDS = 5.0  # what finding the sample that a function failed on may take
GRACE_SECONDS = 5.0  # how long after a time limit the last resort acts


def _failing(answer: Callable, items: list[dict], rows: list[dict], error: BaseException) -> str | None:
    """Which samples alone make the function fail as it did, in words; None if there was no time to find out."""
    def place(error):
        frames = traceback.extract_tb(error.__traceback__)
        return type(error), [(frame.filename, frame.lineno) for frame in frames[:1]]

    begun, failed, tried = time.monotonic(), [], 0
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        while tried < len(items) and time.monotonic() - begun < SEARCH_SECONDS:
            try:
                answer(items[tried : tried + 1], rows[tried : tried + 1])
            except (Exception, SystemExit) as other:
                if place(_own_frames(other)) == place(error):
                    failed.append(tried)
            tried += 1
    if not failed:
        return f"a batch of {tried} samples, though on none of them alone" if tried == len(items) else None
    first = f"sample {failed[0]} of {len(items)}, {_texts(items[failed[0]])}"
    return first if len(failed) == 1 else f"{len(failed)} of {tried} samples, the first of them {first}"


def _texts(item: dict) -> str:
    shown = ((name, item[name][:80], "..." if len(item[name]) > 80 else "") for name in ("prompt", "output"))
    return ", ".join(f"{name} {text!r}{more}" for name, text, more in shown)


def _name(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _reason(error: BaseException) -> str:
    """The type and message of an exception, as the last lines of a traceback have them, in one line."""
    lines = "".join(traceback.format_exception_only(error)).splitlines()
    line = next((line for line in lines if line[:1].strip()), type(error).__name__)
    return line[:200] + ("..." if len(line) > 200 else "")


def _own_frames(error: BaseException) -> BaseException:
    """The exception with a traceback that begins in the user's code, not in ours or Python's importing."""
    frozen, trace = "<frozen importlib", error.__traceback__
    while trace and trace.tb_frame.f_code.co_filename.startswith((__file__, importlib.__file__, frozen)):
        trace = trace.tb_next
    return error.with_traceback(trace)


@contextlib.contextmanager
def time_limit(seconds: float | None, line: str, above: str | None = None):
    """End this process, with exit code 2 and `line` below the stack of the block (or `above`), where the block takes
    more seconds; torchrun then ends the others. None: no limit.

    From a thread of its own, so that nothing in the block can catch it, and signals, which a function may use for time
    limits of its own, stay free. C code that never lets another thread run, such as a regular expression that
    backtracks, holds that thread up too: GRACE_SECONDS later faulthandler, which needs no interpreter, ends the process
    with exit code 1 and the stack alone.
    """
    if seconds is None:
        yield
        return
    caller = threading.get_ident()

    def stop():
        stack = traceback.extract_stack(sys._current_frames()[caller])
        block = itertools.dropwhile(lambda frame: frame.filename != __file__, stack)
        theirs = list(itertools.dropwhile(lambda frame: frame.filename == __file__, block))
        shown = "Stack (most recent call last):\n" + "".join(traceback.format_list(theirs or stack))
        leave(2, f"error: {line}", shown if above is None else above)

    seconds = min(seconds, 1e9)  # clocks hold no more
    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True, file=2)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def text_columns(items: list[dict], rows: list[dict]) -> dict[str, list]:
    """What a reward or metric function is called with: texts, sampled ids, and the other columns of the prompts. The
    function may change all of it."""
    metadata = {name: [_copy(row[name]) for row in rows] for name in rows[0] if name != "prompt"}
    texts = {f"{name}s": [item[name] for item in items] for name in ("sample", "prompt", "output")}
    return {**metadata, **texts, "output_ids": [list(item["tokens"]) for item in items]}


def _copy(value):
    try:
        return copy.deepcopy(value)
    except Exception:  # an open file, a lock
        return value


_tokenizer_copy = functools.lru_cache(maxsize=1)(_copy)  # one, which keeps what the function sets


def plain(value):
    """A user's answer as lists, numbers and texts: arrays, tensors and series on any device, iterators, views. What is
    no list of something, and what has names or no order, stays as it is."""
    if type(value) in (float, int, bool, str, type(None)):
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (str, bytes, Mapping, Set)):
        return value
    return [plain(each) for each in value] if isinstance(value, Iterable) else value


def as_number(value) -> float | None:
    """A number of any type as a float; None for anything else, texts of digits too."""
    try:
        return float(value) if hasattr(type(value), "__float__") else None
    except (ArithmeticError, TypeError, ValueError):
        return None


def _each(values, count: int):
    """Plain values for `count` samples: a column of single numbers (shape (N, 1)) as numbers, and a number as a list
    where there is one sample. `.squeeze()` forgotten, and too much of it."""
    if count == 1 and as_number(values) is not None:
        return [values]
    if isinstance(values, list) and all(isinstance(x, list) and len(x) == 1 and as_number(x[0]) is not None
                                        for x in values):
        return [value for value, in values]
    return values


def check_scores(scores, lengths: list[int]) -> list[float | list[float]]:
    """A reward function's answer as a list with, for each sample, a number, or a list of numbers for its output tokens.

    lengths: output tokens of each sample. Takes lists, arrays, tensors, iterators and columns of shape (N, 1). Raises
    UserError, naming the sample, for a wrong count, a wrong type, NaN, infinity, or another number of token rewards
    than tokens.
    """
    scores = _each(plain(scores), len(lengths))
    if not isinstance(scores, list) or len(scores) != len(lengths):
        what = f"{len(scores)} values" if isinstance(scores, list) else f"a {type(scores).__name__}"
        raise UserError(f"the reward function returned {what} for {len(lengths)} samples: return a list, one each")
    for number, (score, length) in enumerate(zip(scores, lengths)):
        dense = isinstance(score, list)
        for token, value in enumerate(score if dense else [score]):
            found = as_number(value)
            if found is None or not abs(found) <= torch.finfo(torch.float32).max:
                what = f"{short(value)} for sample {number}" + (f", token {token}" if dense else "")
                raise UserError(f"the reward function returned {what}: it must be a finite number (of float32)")
        if dense and len(score) != length:
            what = f"{len(score)} token rewards for sample {number}"
            raise UserError(f"the reward function returned {what}, whose output has {length} tokens: return a number "
                            "for each token in output_ids, the end token included, or one for the sample")
    return [[float(value) for value in score] if isinstance(score, list) else float(score) for score in scores]


def check_metrics(metrics, count: int) -> dict[str, float | list[float]]:
    """A metric function's answer, as numbers and lists of `count` numbers by name; a bare list, as reward functions
    return it, is called reward. Takes the types that `check_scores` takes, and NaN and infinity, which are logged as
    they are: no training depends on a metric. Raises UserError for anything else."""
    if not isinstance(metrics, Mapping):
        values = _each(plain(metrics), count)
        if not isinstance(values, list):
            raise UserError(f"the metric function returned {short(metrics)}: return a dict of numbers or lists of "
                            "numbers")
        metrics = {"reward": values}
    checked = {}
    for name, value in metrics.items():
        value = plain(value)
        many = isinstance(value, list)
        values = _each(value, count) if many else [value]
        if not isinstance(name, str):
            raise UserError(f"the metric function returned a metric called {short(name)}: a name is a text")
        if many and len(values) != count:
            raise UserError(f"the metric function returned {short(values)} as '{name}' of {count} samples, a list of "
                            f"{len(values)}: return a number, or a list with a number for each sample")
        for number, each in enumerate(values):
            if as_number(each) is None:
                what = f"{short(each)} as '{name}'" + (f" of sample {number}" if many else "")
                raise UserError(f"the metric function returned {what}: it must be a number")
        numbers = [each if isinstance(each, (int, float)) else float(each) for each in values]
        checked[name] = numbers if many else numbers[0]
    return checked

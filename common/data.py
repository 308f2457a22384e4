"""Rows from files and the Hub, prompts as token ids, the order of the data; users' functions found, called, checked."""

import bisect
import contextlib
import copy
import csv
import faulthandler
import functools
import gzip
import heapq
import importlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Literal

import jinja2
import torch
import torch.distributed as dist
from transformers.utils.chat_template_utils import render_jinja_template

from common.cli import FunctionError, UserError, leave
from common.distributed import gather_rows, generator


def read_rows(path: str, flag: str) -> list[dict]:
    """The rows of a `.jsonl[.gz] .json .csv .parquet` file, or of the Hub data set `name:split` (`train` if none).

    `flag` names the setting in messages. Raises UserError naming file and row for anything that cannot be read, for a
    row that is not an object, and for empty data.
    """
    lower = path.lower().removesuffix(".gz")
    is_file = lower.endswith((".jsonl", ".json", ".csv", ".parquet"))
    if is_file and not os.path.isfile(path):
        raise UserError(f"{flag} {path}: no such file")
    try:
        if lower.endswith(".jsonl"):
            rows = []
            with _open(path) as file:
                for number, line in enumerate(file, 1):
                    try:
                        if line.strip():
                            rows.append(json.loads(line))
                    except ValueError as error:
                        where = f"{flag} {path}, line {number}"
                        raise UserError(f"{where}: not valid JSON ({error}); write one object a line") from None
        elif lower.endswith(".json"):
            with _open(path) as file:
                rows = json.load(file)
        elif lower.endswith(".csv"):
            csv.field_size_limit(2**30)
            with _open(path) as file:
                rows = list(csv.DictReader(file))
        elif lower.endswith(".parquet"):
            from datasets import Dataset

            rows = Dataset.from_parquet(path).to_list()
        else:
            from datasets import load_dataset

            name, _, split = path.partition(":")
            rows = load_dataset(name, split=split or "train").to_list()
    except UserError:
        raise
    except Exception as error:  # each reader has its own set
        hint = "" if is_file else "; a file ends in .jsonl, .json, .csv or .parquet, a Hub data set is name:split"
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{flag} {path}: cannot be read ({type(error).__name__}: {reason[:200]}){hint}") from None
    if not isinstance(rows, list) or not rows:
        what = "holds no rows" if isinstance(rows, list) else "must be a list of objects"
        raise UserError(f"{flag} {path}: {what}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{flag} {path}, row {number}: must be an object with named columns, not {short(row)}")
        if None in row:
            raise UserError(f"{flag} {path}, row {number}: has more fields than the header: {short(row[None])}")
    return rows


def _open(path: str):
    opener = gzip.open if path.lower().endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def is_chat(prompt) -> bool:
    """Whether a value is a list of messages, objects with role and content."""
    return isinstance(prompt, list) and bool(prompt) and all(
        isinstance(message, dict) and {"role", "content"} <= set(message) for message in prompt)


def short(value) -> str:
    """A value's type and beginning, for messages."""
    text = repr(value)
    return f"{type(value).__name__} {text[:40]}{'...' if len(text) > 40 else ''}"


def evenly(rows: list, most: int) -> list:
    """At most `most` of the rows, spread evenly, since files are often sorted."""
    count = min(most, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def prompt_rows(prompts: list, where: str) -> list[dict]:
    """Prompts as new rows `{"prompt", ...metadata}`; the caller's objects are not changed.

    A prompt is a text, or a row whose column `prompt` (or, without one, `text`) is a text or a list of messages.
    Raises UserError naming `where` and the row.
    """
    if isinstance(prompts, (str, dict)) or not len(prompts):
        raise UserError(f"{where}: holds no prompts, or is not a list of them")
    rows = []
    for number, prompt in enumerate(prompts, 1):
        row = dict(prompt) if isinstance(prompt, dict) else {"prompt": prompt}
        if "prompt" not in row:
            if "text" not in row:
                columns = ", ".join(map(str, row)) or "nothing"
                raise UserError(f"{where}, row {number}: has no column 'prompt' or 'text', only {columns}")
            row["prompt"] = row.pop("text")
        prompt = row["prompt"]
        if not isinstance(prompt, str) and not is_chat(prompt):
            raise UserError(f"{where}, row {number}: a prompt is a text or a list of messages, not {short(prompt)}")
        rows.append(row)
    columns = set().union(*rows) if len({frozenset(row) for row in rows}) > 1 else set()
    return [dict.fromkeys(columns) | row for row in rows]  # every row has every column, None where it was missing


def load_prompts(given: list | None, path: str | None, flag: str, default: list, words: int | None) -> list[dict]:
    """Prompt rows from a list, else a file or Hub data set, else the default; of each text the first `words` words."""
    rows = read_rows(path, flag) if given is None and path else default if given is None else given
    rows = prompt_rows(rows, f"{flag} {path}" if given is None and path else flag)
    for row in rows:
        if words and isinstance(row["prompt"], str):
            row["prompt"] = " ".join(row["prompt"].split()[:words])
    return rows


def window(max_length: int | None, config) -> int:
    """The most tokens of a row: max_length, or without one as many as the model has positions, at most 1024."""
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    if (max_length or 0) > positions:
        raise UserError(f"--max-length {max_length}: the model has {positions} positions")
    return max_length or min(1024, positions)


def prompt_room(max_length: int | None, max_new_tokens: int, config) -> int:
    """Tokens that a prompt may have beside max_new_tokens; without a max_length, as many as the model has positions, at
    most 1024 in all. Raises UserError where the lengths do not fit each other or the model's config."""
    longest = window(max_length, config)
    if longest <= max_new_tokens:
        raise UserError(f"--max-length {longest} leaves no room for a prompt beside --max-new-tokens "
                        f"{max_new_tokens}: raise the one or lower the other")
    return longest - max_new_tokens


def encode_prompts(
    rows: list[dict], tokenizer, room: int, side: str, seq2seq: bool
) -> tuple[list[list[int]], list[bool]]:
    """Token ids of each row's prompt, at most `room` of them, and which prompts were cut, on `side`.

    The tokenizer's own special tokens are added and outlive a cut (Llama's BOS, T5's EOS), but no end token is put in
    front of a causal output. A list of messages goes through the chat template. An empty prompt becomes the BOS token.
    """
    ids, cut = [], []
    head, tail = special_tokens(tokenizer, seq2seq)
    for row in rows:
        if isinstance(row["prompt"], str):
            body = tokenizer(row["prompt"], add_special_tokens=False, verbose=False)["input_ids"]
            whole, ends = head + body + tail, (len(head), len(tail))
        else:
            whole = chat_ids(row["prompt"], tokenizer, add_generation_prompt=True)
            ends = chat_ends(whole, tokenizer)
        tokens = cut_prompt(whole, room, side, *ends)
        cut.append(len(tokens) < len(whole))
        if not tokens:
            if start_token(tokenizer) is None:
                raise UserError("a prompt is empty and the tokenizer has no BOS or EOS: remove empty prompts")
            tokens = [start_token(tokenizer)]
        ids.append(tokens)
    return ids, cut


def special_tokens(tokenizer, seq2seq: bool) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text: Llama's BOS, T5's EOS. Nothing follows a causal prompt."""
    body, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(body)] == body), len(whole))
    return whole[:start], whole[start + len(body) :] if seq2seq else []


def start_token(tokenizer) -> int | None:
    """What stands for an empty prompt: BOS, or EOS where the tokenizer has none."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def cut_prompt(ids: list[int], room: int, side: str, head: int = 0, tail: int = 0) -> list[int]:
    """At most `room` tokens of a prompt, cut on `side`; its first `head` and last `tail` tokens stay, and one more."""
    body = ids[head : len(ids) - tail]
    space = max(1, room - head - tail)
    return ids[:head] + (body[-space:] if side == "left" else body[:space]) + ids[len(ids) - tail :]


def chat_ends(ids: list[int], tokenizer) -> tuple[int, int]:
    """How many tokens at either end of a prompt by chat template outlive a cut: its BOS."""
    return int(ids[:1] == [tokenizer.bos_token_id]), 0


def tokenize_turns(rows: list[list[str]], tokenizer, apart: bool = False) -> list[list[list[int]]]:
    """Token ids of texts that follow one another, such as [prompt, output, prompt, output], for each row.

    A turn has the tokens that it has in its context, unless one of them would reach over the boundary: then those that
    it has on a new line, so that SentencePiece adds no space in front of it. The first turn, and each with `apart`, has
    those of the text alone, as in sampling. No special tokens are added.
    """
    def new_line(text):
        line, both = (tokenizer(part, **options)["input_ids"] for part in ("\n", "\n" + text))
        return both[len(line) :] if both[: len(line)] == line else tokenizer(text, **options)["input_ids"]

    contexts = [turn if apart else "".join(turns[: i + 1]) for turns in rows for i, turn in enumerate(turns)]
    options = dict(add_special_tokens=False, return_attention_mask=False, verbose=False)
    encoded = iter(tokenizer(contexts, **options)["input_ids"] if contexts else [])
    pieces = []
    for turns in rows:
        before = []
        pieces.append([])
        for turn in turns:
            whole = next(encoded)
            pieces[-1].append(whole[len(before) :] if whole[: len(before)] == before else new_line(turn))
            before = [] if apart else whole
    return pieces


def chat_ids(messages: list[dict], tokenizer, **options) -> list[int]:
    """Token ids of messages by the tokenizer's chat template. Raises UserError where there is none, or it fails."""
    return _chat(messages, tokenizer, return_dict=True, **options)["input_ids"]


def _chat(messages, tokenizer, **options):
    if tokenizer.chat_template is None:
        raise UserError("the data has lists of messages and the tokenizer has no chat template: give texts")
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(f"the tokenizer's chat template refuses {short(messages)}: {error}") from None


def chat_turns(
    messages: list[dict], tokenizer, ends: tuple[int, ...], first: int = 0, split: bool = False
) -> list[tuple[list[str], list[bool]]]:
    """Messages as rows of turns, texts by the tokenizer's chat template, and which of the turns the assistant says in
    `messages[first:]`, each with the token that ends it: one of `ends` or another special one.

    One row, where the template tells: by its own {% generation %} marks, or because what it writes for the messages up
    to an assistant's is how it begins for more of them. Otherwise (Qwen3 leaves out earlier thoughts), or with `split`,
    a row [all before, the bare answer] for each of the assistant's messages.
    """
    def render(count, said=messages, **options):
        return _chat(said[:count], tokenizer, tokenize=False, **options) if count else ""

    def before(i):
        if i:
            return render(i, add_generation_prompt=True)
        asked = [{"role": "user", "content": "a"}]  # templates take no empty list, and an answer may come first
        opening = render(1, asked, add_generation_prompt=True).removeprefix(render(1, asked))
        return text[: text.find(opening) + len(opening)] if opening in render(1) else ""

    text = render(len(messages))
    answers = [i for i, message in enumerate(messages) if i >= first and message["role"] == "assistant"]
    marked = re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template())
    if split:
        spans = None
    elif marked:
        # what apply_chat_template does, but as places in the text, which do not depend on the tokenizer
        (text,), (marks,) = render_jinja_template(
            [messages], chat_template=tokenizer.get_chat_template(), return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map)
        spans = [(start, stop) for start, stop in marks if start >= len(render(first))]
    else:
        parts = [(before(i), render(i + 1)) for i in answers]
        told = all(text.startswith(after) and after.startswith(start) for start, after in parts)
        spans = [(len(start), len(after)) for start, after in parts] if told else None
    if spans is None:
        return [([before(i), messages[i]["content"]], [False, True]) for i in answers]
    specials = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    specials += [tokenizer.decode([token]) for token in ends]
    turns, done = [], 0
    for start, stop in spans:
        last = max((text.rfind(token, start, stop) + len(token) for token in specials if token in text[start:stop]),
                   default=start)
        if last > start and not text[last:stop].strip():
            stop = last  # what a template writes after the end is not the assistant's
        elif marked:  # marks around the words alone
            stop = max((stop + len(token) for token in specials if text.startswith(token, stop)), default=stop)
        turns += [text[done:start], text[start:stop]]
        done = stop
    return [(turns, [False, True] * len(spans))] if spans else []


def pack(lengths: list[int], room: int, ranks: int = 1) -> list[list[int]]:
    """Row numbers in lines of at most `room` tokens: longest row first, each in the fullest line that it fits in.

    The lines that ranks would lack for an equal share are not left empty where rows can be spread over them: then each
    row goes to the line that has least, and all lines are shorter.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    lines, free = [], []  # free: space and number of each line, least space first
    for row in order:
        place = bisect.bisect_left(free, (lengths[row], -1))
        if place == len(free):
            free.append((room, len(lines)))
            lines.append([])
        space, line = free.pop(place)
        lines[line].append(row)
        bisect.insort(free, (space - lengths[row], line))
    count = min(len(lengths), -(-len(lines) // ranks) * ranks)
    if count > len(lines):
        heap, spread = [(0, line) for line in range(count)], [[] for _ in range(count)]
        for row in order:
            used, line = heapq.heappop(heap)
            spread[line].append(row)
            heapq.heappush(heap, (used + lengths[row], line))
        if max(used for used, _ in heap) <= room:
            return spread
    return lines


def shuffled(position: int, count: int, seed: int) -> int:
    """Which of `count` rows comes at `position` of an endless stream that shuffles anew each pass. Nothing to save: the
    position is the whole state."""
    return _order(count, seed, position // count)[position % count]


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(count, generator=generator(seed, 0, epoch)).tolist()


def check_data(examples: list[tuple], flag: str) -> int:
    """A checksum of the data, tuples of arrays or bytes. Raises UserError where it is not the same on every rank."""
    found = 0
    for part in (part for example in examples for part in example):
        found = zlib.crc32(part, found)
    if len(set(gather_rows([found], dist.get_world_size()))) > 1:
        raise UserError(f"the processes have read different data: give all the same files, and a {flag} function that "
                        "returns the same on each")
    return found


# --- users' functions -------------------------------------------------------------------------------------------------


def load_function(spec: str, flag: str) -> Callable:
    """The function that `file.py:function` or `package.module:function` names. Raises UserError when there is none, and
    FunctionError when its module fails."""
    path, _, name = spec.rpartition(":")
    hint = "give file.py:function or package.module:function"
    if path.endswith(".py") and not os.path.isfile(path):
        raise UserError(f"{flag} {spec}: no such file: '{path}'; {hint}")
    try:
        if path.endswith(".py"):
            found = importlib.util.spec_from_file_location(os.path.basename(path)[:-3], path)
            module = importlib.util.module_from_spec(found)
            sys.modules[found.name] = module  # dataclasses and pickle look there
            found.loader.exec_module(module)
        else:
            sys.path.append(os.getcwd())
            module = importlib.import_module(path)
    except (Exception, SystemExit) as error:
        missing = not path or isinstance(error, ModuleNotFoundError) and f"{path}.".startswith(f"{error.name}.")
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
    except (TypeError, ValueError):
        raise UserError(f"{short(function)} is no function, or one that does not tell its arguments: wrap it in one "
                        "that names them") from None
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if missing := [name for name in needed if name not in arguments]:
        raise UserError(f"the function {name} needs an argument '{missing[0]}', but gets only {', '.join(arguments)}")
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        accepted = {parameter.name for parameter in parameters}
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
        if not isinstance(name, str):
            raise UserError(f"the metric function returned a metric called {short(name)}: a name is a text")
        if isinstance(value, list) and len(value := _each(value, count)) != count:
            raise UserError(f"the metric function returned {short(value)} as '{name}' of {count} samples, a list of "
                            f"{len(value)}: return a number, or a list with a number for each sample")
        for number, each in enumerate(value if isinstance(value, list) else [value]):
            if as_number(each) is None:
                what = f"{short(each)} as '{name}'" + (f" of sample {number}" if isinstance(value, list) else "")
                raise UserError(f"the metric function returned {what}: it must be a number")
        numbers = [each if isinstance(each, (int, float)) else float(each)
                   for each in (value if isinstance(value, list) else [value])]
        checked[name] = numbers if isinstance(value, list) else numbers[0]
    return checked

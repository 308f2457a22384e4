"""Rows from files and the Hub, prompts and dialogues as token ids, rows packed into lines, the order of the data."""

import bisect
import contextlib
import csv
import datetime
import functools
import gzip
import heapq
import json
import math
import os
import re
import zlib
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.distributed as dist
from transformers.utils import chat_template_utils

from common.checkpoint import read_state
from common.cli import UserError, reason
from common.distributed import broadcast, gather_rows, generator


def read_rows(path: str, flag: str) -> list[dict]:
    """The rows of a `.jsonl[.gz] .json .csv .parquet` file, or of the Hub data set `name:split` (`train` if none)
    or `name:configuration:split`.

    `flag` names the setting in messages. Raises UserError naming file and row for anything that cannot be read, for a
    row that is not an object, and for empty data.
    """
    lower = path.lower().removesuffix(".gz")
    is_file = lower.endswith((".jsonl", ".json", ".csv", ".parquet"))
    if is_file and not os.path.isfile(path):
        raise UserError(f"{flag} {path}: no such file")
    try:
        if lower.endswith(".parquet"):
            from datasets import Dataset

            rows = Dataset.from_parquet(path).to_list()
        elif is_file:
            csv.field_size_limit(2**30)
            opener = gzip.open if path.lower().endswith(".gz") else open
            with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
                rows = (json.load(file) if lower.endswith(".json") else
                        list(csv.DictReader(file) if lower.endswith(".csv") else _json_lines(file, f"{flag} {path}")))
        else:
            from datasets import load_dataset

            name, _, split = path.partition(":")
            configuration = []
            if ":" in split.split("[")[0]:  # not that of a slice, train[:100]
                *configuration, split = split.split(":", 1)
            rows = load_dataset(name, *configuration, split=split or "train").to_list()
    except UserError:
        raise
    except Exception as error:  # each reader has its own set
        hint = "" if is_file else ("; a file ends in .jsonl, .json, .csv or .parquet, a Hub data set is name:split or "
                                   "name:configuration:split")
        raise UserError(f"{flag} {path}: cannot be read ({type(error).__name__}: {reason(error)}){hint}") from None
    if not isinstance(rows, list) or not rows:
        what = "holds no rows" if isinstance(rows, list) else "must be a list of objects"
        raise UserError(f"{flag} {path}: {what}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{flag} {path}, row {number}: must be an object with named columns, not {short(row)}")
        if None in row:
            raise UserError(f"{flag} {path}, row {number}: has more fields than the header: {short(row[None])}")
    return rows


def write_rows(path: str, rows: list[dict], flag: str) -> None:
    """Write rows as a `.jsonl` file. Raises UserError naming the flag where it cannot be written."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}") from None


def _json_lines(file, where: str) -> Iterator:
    for number, line in enumerate(file, 1):
        try:
            if line.strip():
                yield json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}, line {number}: not valid JSON ({error}); write one object a line") from None


def is_chat(prompt) -> bool:
    """Whether a value is a list of messages, objects with role and content."""
    return isinstance(prompt, list) and bool(prompt) and all(
        isinstance(message, dict) and {"role", "content"} <= set(message) for message in prompt)


def short(value) -> str:
    """A value's type and beginning, for messages."""
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits has none
        text = ""
    return f"{type(value).__name__} {text[:40]}{'...' if len(text) > 40 else ''}"


def listed(columns) -> str:
    """Names of columns, for messages."""
    text = ", ".join(map(str, columns)) or "nothing"
    return text if len(text) <= 200 else text[:200] + "..."


def whole_text(text: str) -> bool:
    """Whether a text can be written as UTF-8. One with half of a character cannot, a lone surrogate such as JSON's
    "\\ud83d" cut off from its other half, and no tokenizer takes it."""
    try:
        return text.encode() is not None
    except UnicodeEncodeError:
        return False


def given_rows(rows, where: str) -> list:
    """What a user gave as rows, as a list. Raises UserError for what cannot be rows, or holds none."""
    try:
        found = None if isinstance(rows, (str, bytes)) or hasattr(rows, "keys") else list(rows)
    except TypeError:
        found = None
    if not found:
        what = "holds no rows" if found == [] else f"is not a list of rows, but {short(rows)}"
        raise UserError(f"{where}: {what}")
    return found


def evenly(rows: list, most: int) -> list:
    """At most `most` of the rows, spread evenly, since files are often sorted."""
    count = min(most, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def prompt_rows(prompts: list, where: str) -> list[dict]:
    """Prompts as new rows `{"prompt", ...metadata}`; the caller's objects are not changed.

    A prompt is a text, or a row whose column `prompt` (or, without one, `text`) is a text or a list of messages.
    Raises UserError naming `where` and the row.
    """
    rows = []
    for number, prompt in enumerate(given_rows(prompts, where), 1):
        row = dict(prompt) if isinstance(prompt, dict) else {"prompt": prompt}
        if "prompt" not in row:
            if "text" not in row:
                raise UserError(f"{where}, row {number}: has no column 'prompt' or 'text', only {listed(row)}")
            row["prompt"] = row.pop("text")
        prompt = row["prompt"]
        if not isinstance(prompt, str) and not is_chat(prompt):
            raise UserError(f"{where}, row {number}: a prompt is a text or a list of messages, not {short(prompt)}")
        if isinstance(prompt, str) and not whole_text(prompt):
            raise UserError(f"{where}, row {number}: has half of a character, which is no text: {short(prompt)}")
        if wrong := [name for name in row if not isinstance(name, str)]:  # functions get columns by name
            raise UserError(f"{where}, row {number}: the name of a column is a text, not {short(wrong[0])}")
        rows.append(row)
    columns = {name: None for row in rows for name in row} if len({frozenset(row) for row in rows}) > 1 else {}
    return [columns | row for row in rows]  # every row has every column, None where it was missing


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
    front of a causal output. A list of messages goes through the chat template, whose opening of the answer outlives a
    cut, too. An empty prompt becomes the BOS token.
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
        if len(tokens) > room:
            raise UserError(f"a prompt may have {room} tokens, and {sum(ends)} stay in each, special ones or those of "
                            "the chat template's end: raise --max-length, or lower --max-new-tokens")
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
    """How many tokens at either end of a prompt by chat template outlive a cut: its BOS, and what the template writes
    after a user's last word to ask for an answer."""
    head = int(ids[:1] == [tokenizer.bos_token_id])
    tail = len(os.path.commonprefix([ids[::-1], _closing(tokenizer, tokenizer.chat_template)]))
    return head, min(tail, len(ids) - head)


@functools.lru_cache(maxsize=1)
def _closing(tokenizer, _template) -> list[int]:
    """What the chat template writes between a user's words and the answer, last token first. _template: for the cache,
    since a user may give the tokenizer another."""
    with contextlib.suppress(UserError):  # a template may refuse a user's message alone
        return os.path.commonprefix([chat_ids([{"role": "user", "content": said}], tokenizer,
                                              add_generation_prompt=True)[::-1] for said in "ab"])
    return []


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


def pin_date(tokenizer, checkpoint: str | None) -> str:
    """Let chat templates that write today's date write that of the run's beginning, also when it is resumed on another
    day: its data must stay as they are. Returns it, for the `date` of the checkpoints' state."""
    began = read_state(checkpoint).get("date") if checkpoint else None
    tokenizer.run_date = broadcast(began or datetime.datetime.now().isoformat())
    return tokenizer.run_date


@contextlib.contextmanager
def _dated(tokenizer):
    """Today is the tokenizer's `run_date`, if it has one, for chat templates, which ask transformers."""
    before, day = chat_template_utils.datetime, getattr(tokenizer, "run_date", None)
    if day:
        chat_template_utils.datetime = SimpleNamespace(now=lambda: datetime.datetime.fromisoformat(day))
    try:
        yield
    finally:
        chat_template_utils.datetime = before


def chat_ids(messages: list[dict], tokenizer, **options) -> list[int]:
    """Token ids of messages by the tokenizer's chat template. Raises UserError where there is none, or it fails."""
    return _chat(messages, tokenizer, return_dict=True, **options)["input_ids"]


def _chat(messages, tokenizer, **options):
    if tokenizer.chat_template is None:
        raise UserError("the data has lists of messages and the tokenizer has no chat template: give texts")
    try:
        with _dated(tokenizer):
            found = tokenizer.apply_chat_template(messages, **options)
        if isinstance(found, str):
            found.encode()  # no tokenizer takes half of a character
        return found
    except Exception as error:  # a template is a program
        raise UserError(f"the tokenizer's chat template refuses {short(messages)}: {error}") from None


def chat_turns(
    messages: list[dict], tokenizer, ends: tuple[int, ...], first: int = 0, split: bool = False
) -> list[tuple[list[str], list[bool]]]:
    """Messages written out by the tokenizer's chat template: rows of turns, which are texts, and for each turn whether
    it is what the assistant says in one of `messages[first:]`. Such a turn includes the token that ends it, one of
    `ends` or another special one.

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
        with _dated(tokenizer):
            (text,), (marks,) = chat_template_utils.render_jinja_template(
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


def check_data(examples: list[tuple], flag: str | None) -> int:
    """A checksum of the data, tuples of arrays or bytes. Raises UserError where it is not the same on every rank; flag:
    what names a user's function that takes part in making it."""
    found = 0
    for part in (part for example in examples for part in example):
        found = zlib.crc32(part, zlib.crc32(b"%d " % len(part), found))  # lengths too: where a part ends is data
    if len(set(gather_rows([found], dist.get_world_size()))) > 1:
        raise UserError("the processes have read different data: give all the same files"
                        + (f", and a {flag} function that returns the same on each" if flag else ""))
    return found

"""Rows of a data set, texts, turns or messages, as token ids: what is said, by whom, and where each output ends."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from common.cli import UserError
from common.data import (
    chat_ids,
    chat_turns,
    cut_prompt,
    given_rows,
    is_chat,
    listed,
    read_rows,
    short,
    special_tokens,
    start_token,
    tokenize_turns,
    whole_text,
)


class Example(NamedTuple):
    """One sequence to train on, as token ids. A causal model reads prompt + output; an encoder reads the prompt."""

    prompt: Sequence[int]  # all before the first trained token, or the first token of a text; never empty
    output: Sequence[int]  # all after it; empty only where nothing is left to train (see `fit`, `encode`)
    trained: Sequence[int]  # for each token of the output: 0 if not trained, else the row's output it is of, from 1


class Row(NamedTuple):
    """A row of the data set: turns, texts, with `said`, which of them are trained; or else messages."""

    where: str  # its file and number, for messages to the user
    columns: dict  # what a metric function can ask for
    turns: list[str] | None = None
    said: list[bool] | None = None
    messages: list[dict] | None = None
    first: int = 0  # the number of the first message that may be trained

    @property
    def goes_on(self) -> bool:
        """Whether it ends with what is not trained, such as a user's message that waits for an answer."""
        return not (self.messages[-1]["role"] == "assistant" if self.messages else self.said[-1])


def formatted_rows(
    given: list | None, path: str | None, flag: str, format_fn: Callable | None
) -> list[tuple[object, str]]:
    """The rows of a list, else of a file or Hub data set, by the user's function if there is one, each with its place
    for messages; nothing given is changed. Raises UserError where there are none, or the function fails."""
    where = flag if given is not None else f"{flag} {path}"
    rows = []
    for number, row in enumerate(read_rows(path, flag) if given is None else given_rows(given, where), 1):
        try:
            row = format_fn(dict(row) if isinstance(row, dict) else row) if format_fn else row
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{where}, row {number}: the --format function raised {reason}") from error
        if row is not None or not format_fn:
            rows.append((row, f"{where}, row {number}"))
    if not rows:
        raise UserError(f"{where}: --format left out every row")
    return rows


def load_samples(given: list | None, path: str | None, flag: str, format_fn: Callable | None) -> list[Row]:
    """The samples of a list, else of a file or Hub data set. Raises UserError naming the row for one that has none of
    the forms."""
    return [sample_row(row, where) for row, where in formatted_rows(given, path, flag, format_fn)]


def sample_row(row, where: str) -> Row:
    """A text, a list of turns or of messages, or a dict with one of these or with prompt and completion, as a Row."""
    if isinstance(row, str):
        row = {"text": row}
    elif isinstance(row, (list, tuple)):
        row = {"messages" if is_chat(list(row)) else "turns": list(row)}
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be a text, a list of turns or an object with columns, not {short(row)}")
    columns = {name: value for name, value in row.items() if value is not None}
    turns = said = messages = None
    first = 0
    if "prompt" in columns and "completion" in columns:
        prompt, completion = columns["prompt"], columns["completion"]
        if is_chat(prompt):
            answer = completion if is_chat(completion) else [{"role": "assistant", "content": completion}]
            messages, first = [*prompt, *answer], len(prompt)
        else:
            turns, said = [prompt, completion], [False, True]
    elif "messages" in columns:
        messages = columns["messages"]
        if not is_chat(messages):
            raise UserError(f"{where}: messages are objects with role and content, not {short(messages)}")
    elif "turns" in columns:
        turns = columns["turns"]
        if not isinstance(turns, (list, tuple)) or not turns:
            raise UserError(f"{where}: turns are a list of texts, not {short(turns)}")
        turns, said = list(turns), [bool(i % 2) for i in range(len(turns))]
    elif "text" in columns:
        turns, said = [columns["text"]], [True]
    else:
        raise UserError(f"{where}: has no text, prompt and completion, messages or turns, only {listed(columns)}; "
                        "--format can map rows")
    texts = [message[name] for message in messages for name in ("role", "content")] if messages else turns
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise UserError(f"{where}: what is said must be texts, not {short(wrong[0])}")
    if wrong := [text for text in texts if not whole_text(text)]:
        raise UserError(f"{where}: has half of a character, which is no text: {short(wrong[0])}")
    return Row(where, columns, turns, said, messages, first)


def prompt_of(row: Row, words: int, history: int | None = None) -> dict:
    """The row as an evaluation prompt, with its columns: all before its last output, or the last `history` texts of it;
    of a text, its first words."""
    if row.messages:
        said = [i for i, m in enumerate(row.messages) if m["role"] == "assistant" and i >= row.first]
        prompt = row.messages[: said[-1]] if said else row.messages
    elif row.said == [True]:
        opening = row.turns[0].split()
        prompt = " ".join(opening[: min(words, max(1, len(opening) // 2))])
    else:
        last = max((i for i, said in enumerate(row.said) if said), default=0)
        prompt = "".join(row.turns[max(0, last - (history or last)) : last])
    return {**row.columns, "prompt": prompt}


def encode(
    rows: list[Row],
    tokenizer,
    ends: tuple[int, ...],
    seq2seq: bool,
    history: int | None = None,
    open_ended: bool = False,
) -> list[list[Example]]:
    """The examples of each row: one for a causal model (but see `chat_turns`), one for each output for an
    encoder-decoder, none where there is nothing to train. Each ends in an end token, added where the data has none.

    history: an example for each output of turns, which sees only so many texts before it. open_ended: a row that
    ends with what is not trained has no end token added to its last output, and one more example, without an output:
    the whole prompt that the next answer would have. And an empty output at a row's end becomes an end token.
    """
    apart, found = seq2seq or history is not None, []
    for row in rows:
        if seq2seq and row.said == [True]:
            raise UserError(f"{row.where}: a text alone is for causal models; an encoder-decoder needs rows with "
                            "prompt and completion")
        if history is not None and row.messages:
            raise UserError(f"{row.where}: a history of {history} texts is for turns, not for messages")
        try:
            found.append(chat_turns(row.messages, tokenizer, ends, row.first, split=seq2seq) if row.messages else
                         [(row.turns, row.said)])
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None
        asks = open_ended and not row.messages and row.goes_on
        if apart and row.said != [True]:  # the prompt is all that comes before an output, or what of it is given
            parts = [(turns, [*said, True] if asks else said) for turns, said in found[-1]]
            found[-1] = [(["".join(turns[max(0, i - (history or i)) : i]), *turns[i : i + 1]],
                          [False, True] if i < len(turns) else [False])
                         for turns, said in parts for i, flag in enumerate(said) if flag]
        elif asks:
            found[-1].append((row.turns, [False] * len(row.turns)))
    specials = special_tokens(tokenizer, seq2seq)
    eos, start = ([] if token is None else [token] for token in (tokenizer.eos_token_id, start_token(tokenizer)))
    tokenized = iter(tokenize_turns([turns for parts in found for turns, _ in parts], tokenizer, apart=seq2seq))
    examples = []
    for row, parts in zip(rows, found):
        head, tail = ([], []) if row.messages else specials  # a chat template writes its own
        examples.append([])
        number = 0  # of the row's outputs so far
        goes_on = open_ended and row.goes_on
        for _, said in parts:
            first, *others = next(tokenized)
            first += tail
            if open_ended and others and said[-1] and not others[-1]:
                others[-1] = eos
            opening = head or ([] if first or said[0] else start)  # BOS stands for an empty prompt
            if seq2seq and not opening + first:
                raise UserError(f"{row.where}: the prompt is empty, and the tokenizer has no BOS or EOS in its place")
            pieces, trained = [opening, first, *others], []
            for flag, piece in zip([False, *said], pieces):
                number += flag
                trained += [number if flag else 0] * len(piece)
            if not any(said) and open_ended:
                examples[-1].append(Example(sum(pieces, []), [], []))
                continue
            closes = apart or not goes_on or bool(row.messages and len(parts) > 1)
            examples[-1] += whole_example(sum(pieces, []), trained, ends, eos if closes else [])
        if row.messages and goes_on:
            examples[-1].append(Example(chat_ids(row.messages, tokenizer, add_generation_prompt=True), [], []))
    return examples


def whole_example(ids: list[int], trained: list[int], ends: tuple[int, ...], eos: list[int]) -> list[Example]:
    """The sequence up to its last trained token and an end token; nothing where none is trained."""
    if not any(trained):
        return []
    end = max(i for i, number in enumerate(trained) if number) + 1  # nothing is learned from what follows
    more = [] if ids[end - 1] in ends else eos
    ids, trained = ids[:end] + more, trained[:end] + trained[end - 1 : end] * len(more)
    first = max(1, next(i for i, number in enumerate(trained) if number))  # the first token of a text has none before
    return [Example(ids[:first], ids[first:], trained[first:])] if ids[first:] else []


def fit(example: Example, longest: int, side: str, head: int, tail: int) -> Example:
    """The example in at most `longest` tokens: the prompt is cut on `side`, to half of them at most, then the output's
    end. The first `head` and the last `tail` tokens of the prompt stay, special ones, and one more, even if they are
    more than half."""
    kept = max(0, longest - min(len(example.prompt), max(longest // 2, head + tail + 1)))
    kept = max((i + 1 for i, trained in enumerate(example.trained[:kept]) if trained), default=0)
    output, trained, room = example.output[:kept], example.trained[:kept], longest - kept
    prompt = example.prompt if len(example.prompt) <= room else cut_prompt(example.prompt, room, side, head, tail)
    return Example(prompt, output, trained) if len(prompt) + len(output) <= longest else Example(prompt, [], [])

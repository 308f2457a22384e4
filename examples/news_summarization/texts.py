"""Sentences, passages and prompts: what is between an article and a model."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sentencex import get_sentence_boundaries


class Span(NamedTuple):
    """Characters start to stop of a text."""

    start: int
    stop: int


def sentences(text: str) -> list[Span]:
    """The sentences of a text, without the blanks around them; a line break that stands alone in a line ends one."""
    spans = []
    for found in get_sentence_boundaries("en", text):
        piece = text[found["start_index"] : found["end_index"]]
        start = found["start_index"] + len(piece) - len(piece.lstrip())
        stop = start + len(piece.strip())
        if start < stop:
            spans.append(Span(start, stop))
    return spans


def split(text: str, size: int, count: Callable[[list[str]], list[int]], overlap: int = 1) -> list[Span]:
    """Passages of whole sentences with at most `size` tokens, each beginning with the last `overlap` sentences of the
    one before, where they fit. A longer sentence is cut between words.

    Args:
        count: how many tokens each of some texts has.
    """
    units = sentences(text)
    lengths = count([text[unit.start : unit.stop] for unit in units])
    for at in reversed([at for at, length in enumerate(lengths) if length > size]):
        pieces = _cut(text, units[at], size, count)
        units[at : at + 1], lengths[at : at + 1] = pieces, count([text[piece.start : piece.stop] for piece in pieces])
    spans, first = [], 0
    while first < len(units):
        last, room = first, size - lengths[first]
        while last + 1 < len(units) and lengths[last + 1] <= room:
            last += 1
            room -= lengths[last]
        spans.append(Span(units[first].start, units[last].stop))
        if last + 1 == len(units):
            break
        back = last + 1
        # taken over only where the next sentence fits behind them, so that each passage brings something new
        while back > first + 1 and last + 1 - back < overlap and sum(lengths[back - 1 : last + 2]) <= size:
            back -= 1
        first = back
    return spans


def _cut(text: str, unit: Span, size: int, count) -> list[Span]:
    """A sentence that is too long, in pieces of whole words; a word that is too long alone, in halves."""
    if unit.stop - unit.start == 1 or count([text[unit.start : unit.stop]])[0] <= size:
        return [unit]
    middle = (unit.start + unit.stop) // 2
    blanks = [at.start() for at in re.finditer(r"\s+", text[unit.start : unit.stop])]
    cut = unit.start + min(blanks, key=lambda at: abs(unit.start + at - middle)) if blanks else middle
    rest = cut + len(text[cut : unit.stop]) - len(text[cut : unit.stop].lstrip())
    return _cut(text, Span(unit.start, cut), size, count) + _cut(text, Span(rest, unit.stop), size, count)


def prompt_of(
    query: str, passages: Sequence[tuple[str, str]], room: int, count: Callable[[list[str]], list[int]]
) -> tuple[str, int]:
    """What a model is given: the question and numbered passages (title, text), as many as fit into `room` tokens.

    The first passage that does not fit is cut after a whole sentence, where one fits.

    Returns:
        the prompt, and how many of the passages are in it.
    """
    prompt = f"summarize: question: {query}"
    for number, (title, text) in enumerate(passages, 1):
        begin = f"{prompt} [{number}] {title}: "
        ends = [span.stop for span in sentences(text)]
        # the whole, or as many sentences as fit; lengths grow with the text, but not by fixed amounts a sentence
        fits = [end for end, length in zip(ends, count([begin + text[:end] for end in ends])) if length <= room]
        if not fits:
            return prompt, number - 1
        prompt = begin + text[: max(fits)]
        if max(fits) < ends[-1]:
            return prompt, number
    return prompt, len(passages)


def passages_of(prompt: str) -> list[str]:
    """The passages of a prompt, each "title: text", as far as they are in it."""
    found, number, at = [], 1, prompt.find(" [1] ")
    while at >= 0:
        number += 1
        end = prompt.find(f" [{number}] ", at)
        found.append(prompt[at : end if end >= 0 else None].partition("] ")[2])
        at = end
    return found


MARK = re.compile(r"\s*\[(\d{1,3})\]")
STOPWORDS = frozenset(
    "a about after again all also am an and any are as at be because been before being between both but by can "
    "could did do does doing down during each few for from further had has have having he her here hers him his "
    "how i if in into is it its just me more most my no nor not now of off on once only or other our out over own "
    "said same say says she should so some such than that the their them then there these they this those through "
    "to too under until up very was we were what when where which while who whom why will with would you your".split()
)


def content_words(text: str) -> list[str]:
    """The words of a text that say something: lower case, without stop words, a plural's or possessive's s cut off."""
    words = re.findall(r"\w+(?:[.,]\d+)*", text.lower().replace("\u2019s", "").replace("'s", ""))
    return [re.sub(r"(?<=[^\Ws\d_]{3})s$", "", word) for word in words if word not in STOPWORDS]


def support(sentence: str, passage: str) -> float:
    """The share of a sentence's content words that a passage has; 0 if it has a number that the passage has not.

    No test of meaning: a passage can have all the words of a false sentence. What it does find is what a summariser
    made up or took from elsewhere.
    """
    wanted, there = content_words(sentence), set(content_words(passage))
    if not wanted or any(word[0].isdigit() and word not in there for word in wanted):
        return 0.0
    return sum(word in there for word in wanted) / len(wanted)


class Cited(NamedTuple):
    """A sentence of a summary, and the numbers of the passages that it rests on."""

    text: str
    citations: list[int]


SUPPORTED = 0.6  # of a sentence's content words, for a passage to be cited


def parse(summary: str) -> list[Cited]:
    """The sentences of a text, each with the numbers of the marks behind it, whatever they point to.

    Marks before the first sentence are of an empty one.
    """
    # a mark stands behind its sentence: "It rained. [1] It stopped. [2]"
    pieces, numbers, at = [], [], 0
    for run in re.finditer(r"(?:\s*\[\d{1,3}\])+", summary):
        pieces.append(summary[at : run.start()])
        numbers.append([int(number) for number in MARK.findall(run.group())])
        at = run.end()
    found = []
    for piece, marks in zip([*pieces, summary[at:]], [*numbers, []]):
        texts = [piece[span.start : span.stop] for span in sentences(piece)] or [""] * bool(marks)
        found += [Cited(text, marks if place + 1 == len(texts) else []) for place, text in enumerate(texts)]
    return found


def cite(summary: str, passages: Sequence[str], threshold: float = SUPPORTED) -> list[Cited]:
    """The sentences of a model's summary that passages support, each with its citations.

    A mark `[n]` that the model wrote stays if passage n supports the sentence; without such, the passage that supports
    it best is cited. What no passage supports is left out.
    """
    found = []
    for text, marks in parse(summary):
        scores = [support(text, passage) for passage in passages]
        cited = sorted({n for n in marks if 1 <= n <= len(scores) and scores[n - 1] >= threshold})
        if not cited and scores and max(scores) >= threshold:
            cited = [scores.index(max(scores)) + 1]
        if cited:
            found.append(Cited(text, cited))
    return found


def marked(cited: Sequence[Cited]) -> str:
    """A summary as text: "It rained. [1] It stopped. [1] [2]"; what models learn to write."""
    return " ".join(f"{sentence.text} " + " ".join(f"[{n}]" for n in sentence.citations) for sentence in cited)

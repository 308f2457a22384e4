"""Sentences, passages, prompts and citations, against plain Python on the whole texts."""

import random

import pytest

from texts import Cited, cite, content_words, marked, prompt_of, sentences, split, support


def words(texts):
    """A tokenizer that counts words: as many tokens as blanks separate."""
    return [len(text.split()) for text in texts]


TEXT = (
    'The U.S. ferry left at 5 p.m. on Monday. Mr. Brun said: "It is late." Nobody was hurt.\n\n'
    "Repairs cost 3.2 million crowns, 12 per cent more than planned. Zo\u00eb's caf\u00e9 stayed open \U0001f6a2. "
    "When will it end?"
)


def test_sentences_keep_abbreviations_and_offsets():
    found = [TEXT[start:stop] for start, stop in sentences(TEXT)]
    assert found[0] == "The U.S. ferry left at 5 p.m. on Monday."
    assert found[-3:] == [
        "Repairs cost 3.2 million crowns, 12 per cent more than planned.",
        "Zo\u00eb's caf\u00e9 stayed open \U0001f6a2.",
        "When will it end?",
    ]
    assert all(piece == piece.strip() and piece for piece in found)
    assert "".join(found).replace(" ", "") == "".join(TEXT.split())  # nothing is lost
    assert sentences("") == sentences(" \n ") == []


@pytest.mark.parametrize("seed", range(30))
def test_split_covers_every_word_within_the_size(seed):
    rng = random.Random(seed)
    size, overlap = rng.choice([5, 9, 20]), rng.choice([0, 1, 2])
    text = " ".join(
        " ".join(rng.choice(["a", "bb", "caf\u00e9", "x" * 30]) for _ in range(rng.choice([1, 3, 7, 40]))).capitalize()
        + "."
        for _ in range(rng.randrange(1, 12))
    )
    spans = split(text, size, words, overlap)
    assert all(words([text[start:stop]])[0] <= size for start, stop in spans)
    covered = set()
    for start, stop in spans:
        assert text[start:stop].strip() == text[start:stop] != ""
        covered |= set(range(start, stop))
    assert all(at in covered for at, letter in enumerate(text) if not letter.isspace())
    # each passage brings something that no earlier one has, and begins no earlier
    assert all(b.stop > a.stop and b.start > a.start for a, b in zip(spans, spans[1:]))
    if overlap == 0:
        assert all(b.start >= a.stop for a, b in zip(spans, spans[1:]))


def test_split_overlaps_by_a_sentence_where_it_fits():
    text = "One two three. Four five six. Seven eight nine. Ten."
    found = [text[start:stop] for start, stop in split(text, 6, words)]
    assert found == ["One two three. Four five six.", "Four five six. Seven eight nine.", "Seven eight nine. Ten."]
    assert split("", 6, words) == []


def test_a_word_that_is_too_long_is_halved():
    letters = lambda texts: [len(text) for text in texts]
    text = "x" * 100
    found = split(text, 30, letters)
    assert "".join(text[start:stop] for start, stop in found) == text and all(
        stop - start <= 30 for start, stop in found
    )


def test_prompt_has_numbered_passages_within_the_room():
    passages = [("First", "It rained. It poured."), ("Second", "It stopped. Sun came. All dried.")]
    whole = "summarize: question: why? [1] First: It rained. It poured. [2] Second: It stopped. Sun came. All dried."
    assert prompt_of("why?", passages, 100, words) == (whole, 2)
    assert prompt_of("why?", passages, len(whole.split()), words) == (whole, 2)
    cut = "summarize: question: why? [1] First: It rained. It poured. [2] Second: It stopped. Sun came."
    assert prompt_of("why?", passages, len(whole.split()) - 1, words) == (cut, 2)
    # no sentence of the second fits: it is left out, title and all
    assert prompt_of("why?", passages, 10, words) == ("summarize: question: why? [1] First: It rained. It poured.", 1)
    assert prompt_of("why?", passages, 3, words) == ("summarize: question: why?", 0)


def test_content_words_and_support():
    assert content_words("The ferry's 28 crossings were 3.5 km long, she says.") == [
        "ferry",
        "28",
        "crossing",
        "3.5",
        "km",
        "long",
    ]
    passage = "The ferry sailed 801 crossings in ten weeks; 28 were lost to fog."
    assert support("The ferry lost 28 crossings.", passage) == 1.0
    assert support("The ferry lost 29 crossings.", passage) == 0.0  # a number that is not there
    assert support("Ferry crossings delighted everybody.", passage) == 0.5
    assert support("It was they.", passage) == 0.0  # says nothing


def test_citations_are_checked_and_given():
    passages = ["Fog stopped the ferry on 28 days.", "The bridge opened in October after repairs."]
    found = cite(
        "The bridge opened in October. [2] Fog stopped the ferry. [2] Aliens landed. [1] The ferry stopped.", passages
    )
    assert found == [
        Cited("The bridge opened in October.", [2]),
        Cited("Fog stopped the ferry.", [1]),  # the mark was wrong
        Cited("The ferry stopped.", [1]),  # there was none
    ]
    assert cite("Fog stopped the ferry. [1] [2] [7] [0]", passages) == [Cited("Fog stopped the ferry.", [1])]
    # a mark belongs to the sentence before it, not to those before that one
    both = cite("The bridge opened. Fog stopped the ferry. [1]", passages)
    assert both == [Cited("The bridge opened.", [2]), Cited("Fog stopped the ferry.", [1])]
    same = "The bridge opened after fog stopped the ferry."
    assert [one.citations for one in cite("The bridge opened. Fog stopped the ferry. [2]", [same, same])] == [[1], [2]]
    assert cite("", passages) == cite("[1]", passages) == cite("The bridge opened.", []) == []


def test_marked_summaries_are_read_back():
    cited = [Cited("Fog stopped the ferry.", [1]), Cited("The bridge opened in October.", [1, 2])]
    text = marked(cited)
    assert text == "Fog stopped the ferry. [1] The bridge opened in October. [1] [2]"
    same = "The bridge opened in October after fog stopped the ferry."
    assert cite(text, [same, same]) == cited

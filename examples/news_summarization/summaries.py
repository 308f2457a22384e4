"""Summaries in which every sentence cites a passage: extractive, or by a model of transformers."""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from common.cli import UserError
from embedding import Embedder
from retrieval import Passage
from texts import Cited, cite, content_words, marked, prompt_of, sentences

ROOM = 1024  # tokens of a prompt when no model says how many it can have: five passages
MOST_NEW = 128  # tokens of a summary


@dataclass
class Summary:
    """What a reader sees."""

    sentences: list[Cited]
    model: str

    @property
    def text(self) -> str:
        """With citation marks, as models learn it."""
        return marked(self.sentences)


def relevant(passages: Sequence[Passage]) -> bool:
    """Whether the passages can answer the question: one is near in meaning, or less near but with the question's rare
    words. The bounds are those of `benchmark.py relevance`, for all-MiniLM-L6-v2."""
    return any(p.similarity >= NEAR or (p.similarity >= FAIR and p.coverage >= COVERED) for p in passages)


NEAR, FAIR, COVERED = 0.50, 0.30, 0.40


class Extractive:
    """Picks sentences of the passages, word for word: it cannot say what no article says."""

    name = "extractive"

    def __init__(self, embedder: Embedder, words: int = 80, most: int = 3):
        self.embedder, self.words, self.most = embedder, words, most

    def prompt(self, query: str, passages: Sequence[Passage]) -> tuple[str, int]:
        """What a model would have been given, from which it can learn to write such extracts, and how many passages."""
        return prompt_of(query, [(p.title, p.text) for p in passages], ROOM, self.embedder.lengths)

    def write(self, query: str, passages: Sequence[Passage]) -> list[Summary]:
        """Two summaries, of which the readers choose: the sentences nearest to the question, and one sentence from each
        article in the order of their dates; where these are the same, the nearest alone. Or one, of one sentence."""
        pieces = []
        for number, passage in enumerate(passages, 1):
            for span in sentences(passage.text):
                text = " ".join(passage.text[span.start : span.stop].split())
                # a passage may begin or end within a sentence that was too long, and say nothing by itself
                if len(content_words(text)) >= 4 and not text.endswith("?") and text not in {p[1] for p in pieces}:
                    pieces.append((number, text))
        if not pieces:
            return []
        vectors = self.embedder.embed([query, *(text for _, text in pieces)])
        near, alike = vectors[1:] @ vectors[0], vectors[1:] @ vectors[1:].T
        first = self._pick(pieces, near, alike)
        second = self._spread(pieces, near, alike, passages)
        if sorted(first) == sorted(second):
            second = [max(first, key=lambda at: near[at])]
        found = [
            Summary([Cited(pieces[at][1], [pieces[at][0]]) for at in chosen], self.name) for chosen in (first, second)
        ]
        return found if sorted(first) != sorted(second) else found[:1]

    def _pick(self, pieces, near: np.ndarray, alike: np.ndarray) -> list[int]:
        """Maximal marginal relevance (Carbonell and Goldstein 1998): near to the question, unlike what is there."""
        chosen, words = [], 0
        while len(chosen) < self.most:
            scores = near - 0.5 * np.max(alike[:, chosen], axis=1, initial=0.0)
            for at in np.argsort(-scores, kind="stable"):
                room = self.words - words - len(pieces[at][1].split())
                good = not chosen or (near[at] >= 0.6 * near[chosen[0]] and room >= 0)
                if at not in chosen and good and np.max(alike[at, chosen], initial=0.0) < 0.85:
                    chosen.append(int(at))
                    words += len(pieces[at][1].split())
                    break
            else:
                break
        return sorted(chosen)

    def _spread(self, pieces, near: np.ndarray, alike: np.ndarray, passages: Sequence[Passage]) -> list[int]:
        """The best sentence of each article, at most `most`, oldest article first."""
        best = {}
        for at in np.argsort(-near, kind="stable"):
            article = passages[pieces[at][0] - 1].article
            others = list(best.values())
            if article not in best and near[at] >= 0.5 * near.max() and np.max(alike[at, others], initial=0.0) < 0.85:
                best[article] = int(at)
        chosen = sorted(best.values(), key=lambda at: -near[at])[: self.most]
        date = {at: passages[pieces[at][0] - 1].published for at in chosen}
        return sorted(chosen, key=lambda at: (date[at] is None, date[at] and date[at].timestamp(), at))


class Written:
    """By a causal or encoder-decoder model. What no passage supports is left out; extracts stand in for nothing."""

    def __init__(self, path: str, name: str, embedder: Embedder):
        """Load a model and its tokenizer by path or hub id.

        Errors:
            UserError: it cannot be loaded.
        """
        try:
            config = AutoConfig.from_pretrained(path)
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            self.model = kind.from_pretrained(
                path, dtype=torch.float32 if not torch.cuda.is_available() else torch.bfloat16
            )
        except Exception as error:
            raise UserError(f"model {path}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None
        self.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.path, self.name, self.seq2seq, self.extractive = (
            path,
            name,
            config.is_encoder_decoder,
            Extractive(embedder),
        )
        text = config.get_text_config()
        window = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or ROOM
        window = min(window, self.tokenizer.model_max_length, 4096)
        self.room = (window if self.seq2seq else window - MOST_NEW) - 2  # BOS and EOS
        self._one = threading.Lock()

    def count(self, texts: list[str]) -> list[int]:
        """How many tokens each text has."""
        return (
            [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
            if texts
            else []
        )

    def prompt(self, query: str, passages: Sequence[Passage]) -> tuple[str, int]:
        """What the model is given, and of how many passages."""
        with self._one:
            return prompt_of(query, [(p.title, p.text) for p in passages], self.room, self.count)

    @torch.inference_mode()
    def generate(self, prompt: str, **options) -> str:
        """The model's output as text; `options` are those of transformers' generate."""
        with self._one:
            given = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
            given.pop("token_type_ids", None)
            ids = self.model.generate(**given, max_new_tokens=MOST_NEW, max_time=60.0, **options)[0]
            start = 0 if self.seq2seq else given["input_ids"].shape[1]
            return self.tokenizer.decode(ids[start:], skip_special_tokens=True)

    def write(self, query: str, passages: Sequence[Passage]) -> list[Summary]:
        """Two summaries: the likeliest output and a sampled one, each with extracts in its place if nothing holds."""
        prompt, used = self.prompt(query, passages)
        texts = [f"{p.title}. {p.text}" for p in passages[:used]]
        outputs = [
            self.generate(prompt, do_sample=False, num_beams=1),
            self.generate(prompt, do_sample=True, temperature=0.9, top_k=50),
        ]
        found = [Summary(cited, self.name) for output in outputs if (cited := cite(output, texts))]
        if len({summary.text for summary in found}) == 2:
            return found
        extracts = [
            s
            for s in self.extractive.write(query, passages[:used] or passages)
            if s.text not in {f.text for f in found}
        ]
        return (found[:1] + extracts)[:2]


def load(path: str | None, name: str, embedder: Embedder):
    """The summariser at a path, or the extractive one."""
    if path is None:
        return Extractive(embedder)
    return Written(os.path.abspath(path) if os.path.isdir(path) else path, name, embedder)

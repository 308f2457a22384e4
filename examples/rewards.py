"""Reward functions to pass to ppo.py as they are, or to copy and change.

    python ppo.py --model gpt2 --prompts questions.jsonl --reward examples/rewards.py:exact_number
    REWARD_MODEL=PATH python ppo.py --model gpt2 --prompts p.jsonl --reward examples/rewards.py:better_than_reference

A reward function names the arguments it wants: samples (prompt and output), prompts, outputs, output_ids (the sampled
token ids of each output), tokenizer, and any other column of the prompt rows. All but tokenizer are lists, aligned. It
returns a number for each sample, or a list of numbers for each, one for every token in output_ids: a dense reward.
PPO finds whatever pays; where the cheapest way to a high score is known, the docstring says so.
"""

import functools
import json
import os
import re
from collections import Counter

# --- form -----------------------------------------------------------------------------------------------------------

TARGET_WORDS, MOST_WORDS = 20, 30


def target_length(outputs):
    """0 for an output of TARGET_WORDS words, falling evenly on both sides, to -1 at none and at twice as many. Any
    filler of the right length pays."""
    return [-abs(len(output.split()) - TARGET_WORDS) / TARGET_WORDS for output in outputs]


def short_without_repetition(outputs):
    """The share of an output's words that are distinct, less its words beyond MOST_WORDS as a share of MOST_WORDS; -1
    if it is empty. A single word scores 1: add a reward that wants more."""

    def score(words):
        return len(set(words)) / len(words) - max(0, len(words) - MOST_WORDS) / MOST_WORDS if words else -1.0

    return [score(output.lower().split()) for output in outputs]


def valid_json(outputs):
    """1 for an output that is one JSON object and nothing else, -1 for any other. `{}` is one: ask for keys too."""

    def is_object(text):
        try:
            return isinstance(json.loads(text), dict)
        except (ValueError, RecursionError):
            return False

    return [1.0 if is_object(output) else -1.0 for output in outputs]


def boxed_answer(outputs):
    r"""1 for an output that matches a regular expression, here exactly one \boxed{...}, at the end and not empty;
    else 0. Anything in the box pays; add `exact_number` for a right answer."""
    pattern = re.compile(r"((?!\\boxed).)*\\boxed\{(?!\s*\})([^{}]|\{[^{}]*\})+\}[\s.$]*", re.DOTALL)
    return [float(bool(pattern.fullmatch(output))) for output in outputs]


def few_colons(outputs):
    """Minus the number of colons: trlX's architext example, where each room of a floor plan takes one. An empty
    output is best; `--min-new-tokens` or the KL penalty must hold against that."""
    return [-float(output.count(":")) for output in outputs]


# --- against a column of the prompt rows ----------------------------------------------------------------------------


def contains_keywords(outputs, keywords):
    """The share of the words in column `keywords` (a list, or a text with commas) that are in the output, as whole
    words in any case. A bare list of the keywords scores 1."""
    lists = [words.split(",") if isinstance(words, str) else words or [] for words in keywords]
    return [sum(bool(re.search(rf"(?<!\w){re.escape(word.strip())}(?!\w)", output, re.IGNORECASE)) for word in words)
            / max(1, len(words)) for output, words in zip(outputs, lists)]


def last_number(text):
    """The last number written in a text, with or without thousands separators; None if there is none."""
    found = re.findall(r"(?<!\d)-?(?:\d[\d,]*)?\.?\d+", text)
    return float(found[-1].replace(",", "")) if found else None


def exact_number(outputs, answer):
    """1 if the last number of the output equals the last one in column `answer` (a number, or a text such as GSM8K's
    "... #### 72"), else 0. The reasoning before it is not looked at, and small answers can be guessed."""
    wanted = [last_number(str(text)) for text in answer]
    return [float(number is not None and last_number(output) == number) for output, number in zip(outputs, wanted)]


def unigram_f1(text, reference):
    """ROUGE-1: the harmonic mean of the shares of each text's words, counted with repeats, that the other has too."""
    a, b = (Counter(re.findall(r"\w+", words.lower())) for words in (text, reference))
    return 2 * (a & b).total() / max(1, a.total() + b.total())


def overlap(outputs, reference):
    """Unigram F1 of the output with the text in column `reference`. Blind to word order: a bag of likely words is
    enough for a good score."""
    return [unigram_f1(output, text) for output, text in zip(outputs, reference)]


def chrf(outputs, reference):
    """chrF of the output with the translation in column `reference`, from 0 to 1: the F-score, recall counting twice,
    of sequences of up to six letters. Needs `pip install sacrebleu`. Fluent words that the source does not have cost
    little."""
    try:
        from sacrebleu import sentence_chrf
    except ImportError:
        from common.cli import UserError

        raise UserError("the reward chrf needs sacrebleu: pip install sacrebleu") from None
    return [sentence_chrf(output, [text]).score / 100 for output, text in zip(outputs, reference)]


# --- a classifier or reward model, from the environment variable REWARD_MODEL ---------------------------------------


@functools.lru_cache(maxsize=1)
def load_reward_model(path):
    """The sequence-classification model at a path or hub id, loaded once: a function from texts to scores."""
    import torch

    from common.models import load_classifier

    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return load_classifier(path, "REWARD_MODEL", device, batch_size=64)


def reward_model(texts):
    """Scores of texts: the probability of POSITIVE, or the output of a model with one label (see
    common/models.py)."""
    return load_reward_model(os.environ.get("REWARD_MODEL", "lvwerra/distilbert-imdb"))(texts)


def sentiment(samples):
    """The classifier's probability that prompt and output together are POSITIVE, as `--reward sentiment`. Praise of
    anything, over and over, scores near 1: watch the KL."""
    return reward_model(samples)


def better_than_reference(samples, outputs, reference):
    """The reward model's score of the sample minus its score of the same prompt with column `reference`, as in
    summarisation: what the prompt is worth cancels out. Reward models tend to like length; compare lengths too."""
    heads = [sample[: len(sample) - len(output)] for sample, output in zip(samples, outputs)]
    wanted = reward_model([head + text for head, text in zip(heads, reference)])
    return [score - other for score, other in zip(reward_model(samples), wanted)]


def better_than_chosen(samples, outputs, chosen):
    """`better_than_reference` with column `chosen`, as the pairs of Dahoas/rm-static have it: trlX's HH example."""
    return better_than_reference(samples, outputs, chosen)


def better_than_label(samples, outputs, label):
    """`better_than_reference` with column `label`, a summary that somebody wrote (CarperAI/openai_summarize_tldr),
    after the one space that `formats.py:tldr` puts before it: trlX's TL;DR example."""
    return better_than_reference(samples, outputs, [" " + text.strip() for text in label])


def output_sentiment(outputs):
    """The classifier's probability that the output alone is POSITIVE, whatever its prompt says."""
    return reward_model(outputs)


def dense_sentiment(output_ids, tokenizer):
    """First negative, then positive: trlX's dense example, for a classifier with two labels. The middle token, the
    last of the output's first half, gets the probability that this half is not POSITIVE; the last token that the
    second half is. Two stock phrases are enough."""
    halves = [(ids[: (len(ids) + 1) // 2], ids[(len(ids) + 1) // 2 :]) for ids in output_ids]
    first, second = (reward_model(tokenizer.batch_decode([pair[i] for pair in halves], skip_special_tokens=True))
                     for i in (0, 1))
    rewards = [[0.0] * len(ids) for ids in output_ids]
    for row, (start, _), a, b in zip(rewards, halves, first, second):
        row[len(start) - 1] += 1 - a
        row[-1] += b
    return rewards


# --- rules for each token, and programs -----------------------------------------------------------------------------


def no_repeated_token(output_ids):
    """Dense: -1 for each token that repeats the one before it, 0 for others. Two tokens in turn get round it."""
    return [[0.0] + [-float(a == b) for a, b in zip(ids, ids[1:])] for ids in output_ids]


OPERATIONS = {
    "reverse": lambda values, n: values[::-1],
    "sort": lambda values, n: sorted(values),
    "drop": lambda values, n: values[n:],
    "take": lambda values, n: values[:n],
    "add": lambda values, n: [value + n for value in values],
    "multiply": lambda values, n: [value * n for value in values],
}


def interpret(program, values):
    """Run a program such as "sort | drop 2 | add 10" on a list of integers. Raises ValueError if it does not parse:
    it may hold the words above and numbers of up to three digits; nothing is evaluated."""
    for step in program.split("|"):
        found = re.fullmatch(r"(reverse|sort)()|(drop|take|add|multiply) +([0-9]{1,3})", step.strip())
        if not found:
            raise ValueError(f"not an operation: {step.strip()!r}")
        values = OPERATIONS[found[1] or found[3]](values, int(found[4] or 0))
    return values


def list_program(outputs, input, target):
    """1 for a program (see `interpret`) that turns the list in column `input` into the one in column `target` (lists,
    or JSON texts), -0.5 for one that runs but makes another list, -1 for one that does not parse. A lone "reverse" is
    a safe -0.5, and a policy may stay there."""

    def score(program, values, wanted):
        values, wanted = (json.loads(value) if isinstance(value, str) else value for value in (values, wanted))
        try:
            return 1.0 if interpret(program, values) == wanted else -0.5
        except ValueError:
            return -1.0

    return [score(*row) for row in zip(outputs, input, target)]

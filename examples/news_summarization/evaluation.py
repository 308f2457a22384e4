"""How a model does on held-out preferences and references: accuracy, ROUGE, citations, each with its interval.

Citations are judged by `texts.support`: it finds whether a passage has a sentence's words and numbers, not whether the
sentence follows from it.
"""

import numpy as np
import torch
from rouge_score.rouge_scorer import RougeScorer

import dpo
from benchmarks.pair_accuracy import interval, measures
from common.cli import parse as parse_flags
from common.data import encode_prompts, evenly
from common.distributed import init
from common.generation import generate
from common.models import LanguageModel, LogitRules, end_tokens, load_lm, load_tokenizer
from texts import MARK, SUPPORTED, cite, marked, parse, passages_of, support


def citations(texts: list[str], passages: list[list[str]]) -> dict:
    """Citation recall: the share of sentences with a citation that supports them. Precision: the share of citations
    whose passage supports the sentence before them. Both by `texts.support`, with intervals over texts.

    Returns:
        recall and precision as [mean, low, high], None where there is nothing to count; how many sentences and marks.
    """
    right = {"recall": [], "precision": []}  # (whether, number of the text)
    for number, (text, given) in enumerate(zip(texts, passages, strict=True)):
        for sentence, marks in parse(text):
            good = [1 <= n <= len(given) and support(sentence, given[n - 1]) >= SUPPORTED for n in marks]
            right["precision"] += [(one, number) for one in good]
            right["recall"] += [(any(good), number)] if sentence else []
    found = {name: list(interval(*np.array(some, float).T)) if some else None for name, some in right.items()}
    return {**found, "sentences": len(right["recall"]), "marks": len(right["precision"])}


def rouge(outputs: list[str], references: list[str]) -> dict[str, np.ndarray]:
    """F-measures (N,) of ROUGE-1, 2 and L with stemming (package rouge-score), citation marks left out."""
    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds, use_stemmer=True)
    found = [scorer.score(given, MARK.sub("", output)) for output, given in zip(outputs, references, strict=True)]
    return {kind: np.array([one[kind].fmeasure for one in found]) for kind in kinds}


def write_outputs(path: str, prompts: list[str], room: int, most: int) -> list[str]:
    """What the model at a path writes, greedily: at most `most` tokens to each prompt, cut to `room` tokens."""
    tokenizer = load_tokenizer(path)
    model = LanguageModel(load_lm(path).to("cuda" if torch.cuda.is_available() else "cpu"))
    ids, _ = encode_prompts([{"prompt": prompt} for prompt in prompts], tokenizer, room, "right", model.seq2seq)
    rules = LogitRules(temperature=0, eos_ids=end_tokens(tokenizer, model.lm))
    found = generate(model, ids, torch.full((len(ids), most), 0.5), rules, batch_size=32)
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in found.tokens]


def evaluate(models: dict[str, str], held: list[dict], references: list[dict], words: list[str], most=500) -> dict:
    """How a new model does on held-out pairs, against the reference model of its training, and on held-out references.

    Args:
        models: paths by name: before (what it would replace), reference, after.
        held: pairs; references: rows with prompt and reference; without any, prompts of the pairs are written to.
        words: the flags that dpo.py was given.
        most: prompts to write outputs to.
    Returns:
        means with 95 % intervals [mean, low, high]: accuracy and margin (over prompts), rouge before, after and the
        paired difference (over references), citations of raw outputs and of what is served of them; and the outputs.
    """
    init(None)
    args = parse_flags(dpo.Args, dpo.preset, ["--model", "", "--dataset", "", *words])  # no preset of random walks
    values, groups = measures(models["after"], models["reference"], dpo.load_pairs(held, None, "--pairs", None), args)
    report = {
        "pairs": len(groups), "prompts": len(set(groups.tolist())),
        "accuracy": list(interval(values["accuracy of the implicit reward"], groups)),
        "margin": list(interval(values["margin"], groups)),
        "accuracy_longer": list(interval(values["accuracy of the longer output"], groups)),
        "rouge": None, "citations": {}, "outputs": [],
    }  # fmt: skip
    rows = evenly(references or list({row["prompt"]: row for row in held}.values()), most)
    prompts, given = [row["prompt"] for row in rows], [passages_of(row["prompt"]) for row in rows]
    room = args.max_length - args.max_new_tokens
    texts = {name: write_outputs(models[name], prompts, room, args.max_new_tokens) for name in ("before", "after")}
    for name, raw in texts.items():
        served = [marked(cite(text, passages)) for text, passages in zip(raw, given)]
        report["citations"][name] = {"raw": citations(raw, given), "served": citations(served, given)}
        report["citations"][name]["nothing_left"] = served.count("") / len(served)
    if references:
        scores = {name: rouge(raw, [row["reference"] for row in rows]) for name, raw in texts.items()}
        scores["difference"] = {kind: scores["after"][kind] - each for kind, each in scores["before"].items()}
        each = np.arange(len(rows))
        report["rouge"] = {
            name: {kind: list(interval(some, each)) for kind, some in kinds.items()} for name, kinds in scores.items()
        } | {"references": len(rows)}
    report["outputs"] = [
        {"prompt": row["prompt"], "reference": row.get("reference"), "before": before, "after": after}
        for row, before, after in zip(rows, texts["before"], texts["after"])
    ]
    return report


def worse(report: dict) -> str | None:
    """Why a model is not to be served: an interval that is wholly on the wrong side."""
    if report["accuracy"][2] < 0.5:
        return "it prefers what readers rejected"
    if report["rouge"] and report["rouge"]["difference"]["rougeL"][2] < 0:
        return "its summaries are farther from the references"
    return None

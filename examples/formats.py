"""Functions for `--format examples/formats.py:NAME`: from a row of a data set to a row that the scripts know.

Each gets a row as a dict and returns a text, a list of turns, a list of messages, or a dict with columns text, prompt
and completion, messages or turns, for dpo.py chosen and rejected; or None, which leaves the row out. Other columns go
on to the metric function.
"""


def alpaca(row: dict) -> dict:
    """Instruction, input and output (tatsu-lab/alpaca), as its authors' training code words them."""
    if row.get("input"):
        prompt = ("Below is an instruction that describes a task, paired with an input that provides further context. "
                  "Write a response that appropriately completes the request.\n\n"
                  f"### Instruction:\n{row['instruction']}\n\n### Input:\n{row['input']}\n\n### Response:\n")
    else:
        prompt = ("Below is an instruction that describes a task. "
                  "Write a response that appropriately completes the request.\n\n"
                  f"### Instruction:\n{row['instruction']}\n\n### Response:\n")
    return {"prompt": prompt, "completion": row["output"]}


def summary(row: dict) -> dict:
    """Article and summary, with the prefix that T5 was trained with."""
    return {"prompt": "summarize: " + row["article"], "completion": row["summary"]}


def positive(row: dict) -> dict | None:
    """Reviews labelled 1, as texts."""
    return {"text": row["text"]} if row["label"] == 1 else None


def labelled(row: dict) -> dict:
    """A text and its 0/1 label as reward, for ilql.py."""
    return {"text": row["text"], "reward": row["label"]}


def game(row: dict) -> dict:
    """The turns of a game as one text, so that a model from scratch learns to read what it will have to answer."""
    return {"text": "".join(row["turns"])}


def preferred_summary(row: dict) -> dict:
    """Article and two summaries, with the prefix that T5 was trained with, for dpo.py."""
    return {**row, "prompt": "summarize: " + row["prompt"]}


def preferred(row: dict) -> dict:
    """The chosen output of a pair, for sft.py, which dpo.py then goes on from."""
    return {"prompt": row["prompt"], "completion": row["chosen"]}


def labelled_continuation(row: dict) -> dict:
    """The first four words of a labelled text as the prompt of the others, for ilql.py with an encoder-decoder."""
    words = row["text"].split(" ")
    return {"prompt": " ".join(words[:4]), "completion": " ".join(words[4:]), "reward": row["label"]}


def tldr(row: dict) -> dict:
    """A Reddit post, which ends in "TL;DR:", and its summary (CarperAI/openai_summarize_tldr)."""
    return {"prompt": row["prompt"], "completion": " " + row["label"].strip()}


def tldr_pair(row: dict) -> dict | None:
    """A post and two summaries (CarperAI/openai_summarize_comparisons), worded as `tldr` does. Pairs with a summary of
    less than five words are left out, and equal ones, as in trlX's reward model."""
    chosen, rejected = (row[name].removeprefix("TL;DR:").strip() for name in ("chosen", "rejected"))
    if chosen == rejected or min(len(chosen.split()), len(rejected.split())) < 5:
        return None
    return {"prompt": row["prompt"].rstrip() + "\nTL;DR:", "chosen": " " + chosen, "rejected": " " + rejected}

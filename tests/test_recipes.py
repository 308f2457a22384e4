"""Every command of docs/recipes.md, run here with small stand-ins: for each model of the Hub a random one of the same
architecture, for each data set a few rows with its columns, one step in place of thousands."""

import copy
import importlib.util
import json
import math
import re
import shlex
import sqlite3
import sys
import types
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
import torch
import transformers
import yaml
from conftest import CONFIGS, ROOT, bpe_tokenizer, char_tokenizer, run_forked

import common.randomwalks
import ilql
import ppo
import sft
from common.cli import parse
from common.data import read_rows

PAGE = (ROOT / "docs/recipes.md").read_text()
SCRIPTS = {"ppo.py": ppo, "sft.py": sft, "ilql.py": ilql}

# --- stand-ins: what the Hub has, and what the tests have in its place ------------------------------------------------

_OWN = dict(vocab_size=400, n_embd=32, n_layer=3, n_head=4, rotary_dim=4, bos_token_id=0, eos_token_id=0)
ARCHITECTURES = CONFIGS | {"gptj": transformers.GPTJConfig(**_OWN), "codegen": transformers.CodeGenConfig(**_OWN)}
MODELS = {
    "gpt2": "gpt2", "lvwerra/gpt2-imdb": "gpt2", "NousResearch/Llama-2-7b-hf": "llama",
    "EleutherAI/gpt-j-6b": "gptj", "architext/gptj-162M": "gptj", "Salesforce/codegen-350M-mono": "codegen",
    "lvwerra/t5-imdb": "t5", "google-t5/t5-large": "t5", "google/flan-t5-large": "t5_v1_1",
    "pvduy/flant5-xl_openai_tldr_sft": "t5_v1_1",
    "Dahoas/pythia-125M-static-sft": "gpt_neox", "Dahoas/pythia-1B-static-sft": "gpt_neox",
    "Dahoas/pythia-6B-static-sft": "gpt_neox", "EleutherAI/gpt-neox-20b": "gpt_neox",
    "EleutherAI/pythia-125m-deduped": "gpt_neox", "EleutherAI/pythia-1.4b-deduped": "gpt_neox",
    "EleutherAI/pythia-6.9b-deduped": "gpt_neox",
    "lvwerra/distilbert-imdb": "classifier",
}
_HH = [{"prompt": f"\n\nHuman: How many legs has a {animal}?\n\nAssistant:", "response": f" It has {legs}.",
        "chosen": f" A {animal} has {legs} legs.", "rejected": f" I do not know about the {animal}."}
       for animal, legs in (("cat", 4), ("hen", 2), ("fly", 6), ("spider", 8), ("snake", 0), ("horse", 4))]
_POSTS = [f"SUBREDDIT: r/pets\nTITLE: My {animal}\nPOST: It sleeps in the {place} all day.\nTL;DR:"
          for animal, place in (("cat", "sun"), ("hen", "straw"), ("dog", "hall"), ("mouse", "wall"), ("ant", "hill"))]
DATA = {  # name or name:configuration -> its splits, and rows with its columns
    "stanfordnlp/imdb": ("train test", [
        {"text": f"This film was quite {word} and I would {advice} it to all my friends.", "label": label}
        for word, advice, label in (
            ("bad", "hide", 0), ("dull", "burn", 0), ("good", "show", 1), ("fine", "give", 1), ("slow", "sell", 0),
            ("warm", "play", 1), ("rich", "send", 1), ("odd", "post", 1))]),
    "tatsu-lab/alpaca": ("train", [
        {"instruction": f"Add {n}.", "input": "" if n % 2 else "1 and 2", "output": f"It is {n}.", "text": "..."}
        for n in range(8)]),
    "abisee/cnn_dailymail:3.0.0": ("train validation test", [
        {"article": f"In {city} it has rained for {n} days.", "highlights": f"Rain in {city}.", "id": str(n)}
        for n, city in enumerate(("Rome", "Oslo", "Lima", "Bonn", "Cairo", "Perth"))]),
    "wmt/wmt16:de-en": ("train validation test", [
        {"translation": {"de": de, "en": en}} for de, en in (("ein Haus", "a house"), ("der Hund", "the dog"),
                                                             ("gut", "good"), ("Regen", "rain"), ("rot", "red"))]),
    "CarperAI/openai_summarize_tldr": ("train test valid", [
        {"prompt": post, "label": " My pet sleeps a lot these days."} for post in _POSTS]),
    "CarperAI/openai_summarize_comparisons": ("train test valid1 valid2", [
        {"prompt": post.removesuffix("\nTL;DR:"), "chosen": f"TL;DR: {n} hours of sleep a day, is that fine?",
         "rejected": "TL;DR: I think it was on a Monday."} for n, post in enumerate(_POSTS)]),
    "Dahoas/rm-static": ("train test", _HH),
    "Dahoas/full-hh-rlhf": ("train test", _HH),
}
DOWNLOADS = {"https://raw.githubusercontent.com/JD-P/simulacra-aesthetic-captions/main/sac_public_2022_06_29.sqlite": [
    "CREATE TABLE generations (id INTEGER PRIMARY KEY, prompt TEXT)",
    "CREATE TABLE images (id INTEGER PRIMARY KEY, gid INTEGER)",
    "CREATE TABLE ratings (iid INTEGER, rating INTEGER)",
    "INSERT INTO generations VALUES (1, 'a lighthouse in fog'), (2, 'an apple of glass'), (3, 'two grey cats, oil')",
    "INSERT INTO images VALUES (1, 1), (2, 1), (3, 2), (4, 3)",
    "INSERT INTO ratings VALUES (1, 7), (2, 4), (3, 9), (4, 2), (4, 5), (1, NULL)"]}
PACKAGES = {"sacrebleu": {"sentence_chrf": lambda text, references: types.SimpleNamespace(
    score=100 * len(set(text) & set(references[0])) / len(set(text) | set(references[0])))}}

# --- smaller: flags that follow those of the recipe, and win ----------------------------------------------------------

SMALLER = {
    "ppo.py": "--max-steps 1 --total-episodes 4 --rollout-batch-size 4 --batch-size 2 --micro-batch-size 2 "
              "--ppo-epochs 1 --num-eval-prompts 2 --eval-samples 1 --max-new-tokens 4",
    "sft.py": "--max-steps 1 --batch-size 2 --held-out 0.2 --num-eval-prompts 2 --eval-samples 1 --max-new-tokens 4",
    "ilql.py": "--max-steps 1 --batch-size 2 --num-eval-prompts 2 --eval-samples 1 --max-new-tokens 4",
    "examples/reward_model.py": "--max-steps 1 --batch-size 2",
    "examples/rft.py": "--rounds 1 --generations 2 --batch-size 2 --max-new-tokens 4",
    "examples/programs.py": "--count 12", "examples/prepare.py": "", "examples/simulacra.py": "",
}
AT_MOST = {"--num-layers-unfrozen": 2, "--min-new-tokens": 2, "--max-length": 64}  # for 3 layers, 64 positions
MODEL_FLAGS = ("--model", "--tokenizer", "--metric", "--reward", "--reward-model", "--from-config", "REWARD_MODEL")
DATA_FLAGS = ("--dataset", "--eval-dataset", "--prompts", "--eval-prompts")
TORCHRUN = ("--output-dir runs/tldr-ppo",)  # in these: two processes, really

# --- the page ---------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """The commands of the fenced blocks of a text, each in one line."""
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.M | re.S)
    return [" ".join(line.split()) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


SECTIONS = {part.splitlines()[0]: commands(part) for part in re.split(r"^## ", PAGE, flags=re.M)[1:]}


def hub_data(name: str) -> tuple[str, list[dict]]:
    """The splits and rows of what a recipe calls name:split or name:configuration:split."""
    path, split, _ = re.fullmatch(r"(.*):(\w+)(\[:\d+\])?", name).groups()
    splits, rows = DATA[path]
    assert split in splits.split(), f"{path} has no split {split}, only {splits}"
    return rows


def load_dataset(name: str, configuration: str | None = None, *, split: str):
    """In place of that of datasets."""
    return datasets.Dataset.from_list(hub_data(":".join(filter(None, (name, configuration, split)))))


def text_of(value) -> str:
    """All texts in a row or rows."""
    return " ".join(map(text_of, value.values() if isinstance(value, dict) else value)) if isinstance(
        value, (dict, list)) else str(value)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function from the name of a model of the Hub to the folder of its stand-in."""
    folder = tmp_path_factory.mktemp("hub")
    tokenizer = bpe_tokenizer([text_of([rows for _, rows in DATA.values()])], 400)

    def path(name: str) -> str:
        where, kind = folder / name, MODELS[name]
        if where.exists():
            return str(where)
        torch.manual_seed(0)
        if kind == "classifier":
            labels = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
            config = transformers.DistilBertConfig(dim=16, hidden_dim=32, n_layers=1, n_heads=2, vocab_size=61,
                                                   **labels)
            model, own = transformers.DistilBertForSequenceClassification(config), char_tokenizer()
            own.model_input_names = ["input_ids", "attention_mask"]
        else:
            config = copy.deepcopy(ARCHITECTURES[kind])
            special = kind in ("t5", "t5_v1_1", "llama")  # which have a pad token, or a BOS of its own
            own = char_tokenizer() if special else tokenizer
            config.vocab_size, config.eos_token_id = max(61, len(own)), own.eos_token_id
            config.bos_token_id = own.bos_token_id
            kind = "Seq2Seq" if config.is_encoder_decoder else "Causal"
            model = getattr(transformers, f"AutoModelFor{kind}LM").from_config(config)
        model.save_pretrained(where)
        own.save_pretrained(where)
        return str(where)

    return path


def substituted(words: list[str], models, folder: Path, files: bool) -> list[str]:
    """The words with stand-ins for what is on the Hub. What is in the folder, which earlier commands have written to,
    and functions stay. files: data sets as files, for another process."""
    found = []
    for flag, word in zip(["", *words], words):
        if (folder / word.partition(".py:")[0]).exists() or (folder / f"{word.partition('.py:')[0]}.py").exists():
            pass
        elif flag in MODEL_FLAGS and word not in ("sentiment", "randomwalks"):
            word = models(word)
        elif flag in DATA_FLAGS:
            rows = hub_data(word)
            if files:
                word = re.sub(r"\W", "_", word) + ".jsonl"
                (folder / word).write_text("".join(json.dumps(row) + "\n" for row in rows))
        found.append(word)
    return found


def flag_of(words: list[str], name: str, default=None):
    return words[len(words) - words[::-1].index(name)] if name in words else default


def run(command: str, folder: Path, models, monkeypatch) -> None:
    """One command as a user types it, with stand-ins and smaller."""
    words = shlex.split(command)
    if words[0] == "curl":
        *options, url = words[1:]
        assert options == ["-OL"]
        with sqlite3.connect(folder / url.rsplit("/", 1)[1]) as database:
            for line in DOWNLOADS[url]:
                database.execute(line)
        return
    if words[:2] == ["pip", "install"]:
        for name in words[2:]:
            monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**PACKAGES[name]))
        return
    environment = {}
    while re.match(r"[A-Z_]+=", words[0]):
        name, value = words.pop(0).split("=", 1)
        environment[name] = substituted([name, value], models, folder, False)[1]
    assert words[0] == "python" or words[:3] == ["torchrun", "--nproc_per_node", "8"], command
    script, *words = words[1 if words[0] == "python" else 3 :]
    if script in SCRIPTS:  # as the flags stand they must be such as could run
        module = SCRIPTS[script]
        args = parse(module.Args, getattr(module, "preset", None), words)
        module.check(args)
        assert args.max_length is None or args.max_length > args.max_new_tokens
    if flag_of(words, "--reward") == "sentiment":
        words += ["--reward-model", "lvwerra/distilbert-imdb"]
    really = any(part in command for part in TORCHRUN)
    small = substituted(words, models, folder, files=really) + SMALLER[script].split()
    settings = yaml.safe_load((folder / flag_of(words, "--config")).read_text()) if "--config" in words else {}
    for flag, most in AT_MOST.items():
        given = flag_of(words, flag, settings.get(flag[2:]))
        small += [flag, str(min(int(given), most))] if given else []
    if really:
        found = run_forked(script, *small, processes=2, cwd=folder, **environment)
        assert found.returncode == 0, found.stderr[-3000:]
        return
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if script in SCRIPTS:
        args = parse(module.Args, getattr(module, "preset", None), small)
        module.train(args)
        return
    monkeypatch.setattr(sys, "argv", [script, *small])
    spec = importlib.util.spec_from_file_location("recipe_" + Path(script).stem, folder / script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    module.main(parse(module.Args, getattr(module, "preset", None), small))


@pytest.mark.parametrize("section", SECTIONS)
def test_a_recipe_runs(section, models, tmp_path, monkeypatch):
    """All of its commands, in order, in one folder, as a user who types them one after the other."""
    for path in [*ROOT.glob("*.py"), ROOT / "common", ROOT / "examples"]:
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(common.randomwalks, "cloned_walker",  # PPO's and RFT's start, which takes ten seconds to fit
                        lambda _, seed: common.randomwalks.untrained_walker(seed))
    for command in SECTIONS[section]:
        before = set(tmp_path.glob("runs/*"))
        with monkeypatch.context() as own:
            run(command, tmp_path, models, own if "pip install" not in command else monkeypatch)
        made = set(tmp_path.glob("runs/*")) - before
        trains = re.search(r"\b(ppo|sft|ilql|reward_model|rft)\.py", command)
        assert len(made) == bool(trains), command
        for folder in made:
            transformers.AutoConfig.from_pretrained(folder / "model")
            metrics = folder / "metrics.jsonl"
            lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
            assert all(math.isfinite(value) for line in lines for value in line.values()), command
            if trains[1] in ("ppo", "sft", "ilql"):
                names = {name.split("@")[0] for name in lines[-1]}
                assert lines[-1]["step"] == 1
                measured = "--metric" in command or "hh_ilql" in command or trains[1] == "ppo"
                assert not measured or {"eval/score", "eval/reward"} & names, command


# --- nothing is left out ----------------------------------------------------------------------------------------------


def test_every_fenced_command_is_one_that_is_run():
    assert sum(map(len, SECTIONS.values())) == len(commands(PAGE)) > 30
    assert PAGE.count("\n```") == 2 * len(re.findall(r"^```\n.*?^```$", PAGE, re.M | re.S))
    for part in TORCHRUN:
        assert sum(part in command for command in commands(PAGE)) == 1


def test_every_stand_in_is_used():
    """By the page, or by the defaults of --reward sentiment."""
    text = " ".join(commands(PAGE)) + " ".join(map(str, ppo.PRESETS["sentiment"].values()))
    for path in set(re.findall(r"examples/\w+\.yaml", PAGE)):
        text += (ROOT / path).read_text()
    for name in [*MODELS, *DATA, *DOWNLOADS, *PACKAGES]:
        assert re.search(rf"(?<![\w/.-]){re.escape(name)}(?![\w/-])", text), f"{name} stands in for nothing"


def test_the_table_links_to_sections():
    headings = re.findall(r"^#+ (.*)$", PAGE, re.M)
    slugs = {re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings}
    links = set(re.findall(r"\]\(#(.*?)\)", PAGE))
    assert links <= slugs and {re.sub(r"[^\w-]", "", name.lower()) for name in SECTIONS} <= links
    for path in re.findall(r"\]\((\.\./.*?)\)", PAGE):
        assert (ROOT / "docs" / path).exists()


def test_every_example_of_trlx_is_there():
    for name in """ppo_randomwalks.py ilql_randomwalks.py rft_randomwalks.py ppo_sentiments.py ppo_dense_sentiments.py
            ppo_sentiments_peft.py ppo_sentiments_llama.py ppo_sentiments_t5.py ilql_sentiments.py
            ilql_sentiments_t5.py sft_sentiments.py rft_sentiments.py sft_alpaca.py architext.py simulacra.py
            t5_summarize_daily_cnn.py ppo_translation_t5.py summarize_rlhf/ ppo_hh.py ilql_hh.py sft_hh.py
            grounded_program_synthesis/ nemo_ppo_sentiments.py nemo_ilql_sentiments.py nemo_sft_sentiments.py
            nemo_ppo_inference.py nemo_ilql_inference.py llama_nemo/ nemo_vs_ds_chat.py trlx_sentiments.ipynb
            trlx_simulacra.ipynb trlx_inference_gptj.py""".split():
        assert name in PAGE.split("\n## ")[0], f"the table has no {name}"


def test_the_rows_of_files_are_those_of_the_hub(tmp_path, monkeypatch):
    """What another process reads from a file is what this one gets from the Hub's stand-in."""
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows("stanfordnlp/imdb:test", "--prompts") == DATA["stanfordnlp/imdb"][1]
    words = substituted(["--prompts", "stanfordnlp/imdb:test"], None, tmp_path, files=True)
    assert read_rows(f"{tmp_path}/{words[1]}", "--prompts") == DATA["stanfordnlp/imdb"][1]

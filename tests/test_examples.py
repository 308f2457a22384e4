"""The examples: reward functions on inputs made by hand and as a user runs them, row formats, model configs."""

import copy
import json
import math
import sys
import types

import datasets
import pytest
import torch
import transformers
from conftest import CONFIGS, ROOT, VOCABULARY, char_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import ppo
from common.cli import UserError
from common.functions import call, check_scores, load_function
from common.models import load_classifier, new_lm, positions_of
from common.samples import sample_row

REWARDS = f"{ROOT}/examples/rewards.py"


def score(name, outputs, prompt="", output_ids=None, tokenizer=None, **columns):
    """What the function `name` of rewards.py gives for `outputs`, called and checked as ppo.py does it."""
    output_ids = output_ids or [[0] * (len(output) + 1) for output in outputs]
    columns |= {"samples": [prompt + output for output in outputs], "prompts": [prompt] * len(outputs)}
    answer = call(load_function(f"{REWARDS}:{name}", "--reward"), outputs=list(outputs), output_ids=output_ids,
                  tokenizer=tokenizer, **columns)
    return check_scores(answer, [len(ids) for ids in output_ids])


# --- row formats and model configs for sft.py -------------------------------------------------------------------------


@pytest.mark.parametrize("name,row,turns,said", [
    ("alpaca", dict(instruction="Add.", input="1 and 2", output="3"), ["### Input:\n1 and 2\n\n### Response:\n", "3"],
     [False, True]),
    ("alpaca", dict(instruction="Add 1 and 2.", input="", output="3"),
     ["### Instruction:\nAdd 1 and 2.\n\n### Response:\n", "3"], [False, True]),
    ("summary", dict(article="Long.", summary="Short."), ["summarize: Long.", "Short."], [False, True]),
    ("positive", dict(text="good", label=1), ["good"], [True]),
    ("labelled", dict(text="bad", label=0), ["bad"], [True]),
    ("game", dict(turns=["a\n", "b\n", "c\n"], reward=[1]), ["a\nb\nc\n"], [True]),
    ("labelled_continuation", dict(text="a b c d e  f", label=1), ["a b c d", "e  f"], [False, True]),
    ("tldr", dict(prompt="POST: x\nTL;DR:", label="Short."), ["POST: x\nTL;DR:", " Short."], [False, True])])
def test_formats_give_rows_that_sft_knows(name, row, turns, said):
    made = sample_row(load_function(f"{ROOT}/examples/formats.py:{name}", "--format")(row), "here")
    assert made.turns[-1] == turns[-1] and made.turns[0].endswith(turns[0]) and made.said == said


def test_labels_are_rewards():
    labelled = load_function(f"{ROOT}/examples/formats.py:labelled", "--format")
    assert [labelled(dict(text="t", label=label))["reward"] for label in (0, 1)] == [0, 1]


def test_positive_leaves_other_reviews_out():
    assert load_function(f"{ROOT}/examples/formats.py:positive", "--format")({"text": "bad", "label": 0}) is None


def test_pairs_of_summaries_are_worded_as_the_summaries_that_sft_learns():
    """Whatever spaces stand around "TL;DR:"; equal pairs and those with a short summary are left out."""
    fmt, sft_row = (load_function(f"{ROOT}/examples/formats.py:{name}", "--format") for name in ("tldr_pair", "tldr"))
    five, other = "One two three four five.", "Another one of five words."
    for chosen, prompt in ((f"TL;DR:  {five}", "POST: x"), (f"TL;DR: {five}", "POST: x\n"), (five, "POST: x")):
        made = fmt(dict(prompt=prompt, chosen=chosen, rejected=f"TL;DR: {other}"))
        assert made == {"prompt": "POST: x\nTL;DR:", "chosen": f" {five}", "rejected": f" {other}"}
        assert sft_row(dict(prompt=made["prompt"], label=five)) == {"prompt": made["prompt"], "completion": f" {five}"}
    assert fmt(dict(prompt="POST: x", chosen=f"TL;DR: {five}", rejected=f"TL;DR:  {five} ")) is None
    assert fmt(dict(prompt="POST: x", chosen=f"TL;DR: {five}", rejected="TL;DR: One two three four.")) is None


# --- rows from data sets ----------------------------------------------------------------------------------------------


def prepare():
    """The module examples/prepare.py."""
    return sys.modules[load_function(f"{ROOT}/examples/prepare.py:main", "prepare").__module__]


@pytest.mark.parametrize("name,row,rows", [
    ("cnn_dailymail", dict(article="Long.", highlights="Short.", id="1"),
     [dict(prompt="Summarize: Long.", reference="Short.")]),
    ("english_to_german", dict(translation=dict(de="gut", en="good")),
     [dict(prompt="translate English to German: good", reference="gut")]),
    ("openings", dict(text="a b  c d e", label=0), [dict(prompt="a b c d")]),
    ("rewrite_bad_reviews", dict(text="good", label=1), []),
    ("pairs", dict(prompt="p", response="r", chosen="a", rejected="b"),
     [dict(prompt="p", completion="a", reward=1), dict(prompt="p", completion="b", reward=-1)]),
    ("tldr_pairs", dict(prompt="p", chosen="TL;DR: a", rejected="TL;DR: b"), [])])
def test_rows_are_made_of_those_of_a_data_set(name, row, rows):
    assert getattr(prepare(), name)(row) == rows


def test_a_bad_review_is_asked_for_as_alpaca_asks():
    (row,) = prepare().rewrite_bad_reviews(dict(text="b" * 2000, label=0))
    assert "### Instruction:\nRewrite the input into a positive review.\n\n### Input:\nb" in row["prompt"]
    assert row["prompt"].count("b" * 1024) == 1 and "b" * 1025 not in row["prompt"]


@pytest.mark.parametrize("dataset,asked", [
    ("a/b:train", ("a/b", "train")), ("a/b:3.0.0:train[:20]", ("a/b", "3.0.0", "train[:20]")),
    ("a/b:test[5:9]", ("a/b", "test[5:9]"))])
def test_a_data_set_may_have_a_configuration(dataset, asked, tmp_path, monkeypatch, capsys):
    seen, data = [], datasets.Dataset.from_list([dict(text="a ü c d e")])
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, split: seen.append((*name, split)) or data)
    module = prepare()
    module.main(module.Args("openings", dataset, f"{tmp_path}/rows.jsonl"))
    assert seen == [asked] and capsys.readouterr().out == f"1 rows in {tmp_path}/rows.jsonl\n"
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == {"prompt": "a ü c d"}


def test_rows_of_which_none_is_left_are_no_success(tmp_path):
    """Labels as CSV files have them: texts, none of which is 0."""
    (tmp_path / "rows.csv").write_text("text,label\nbad,0\ndull,0\n")
    module = prepare()
    with pytest.raises(UserError, match="rows.csv: rewrite_bad_reviews makes no row of its 2; look at their columns$"):
        module.main(module.Args("rewrite_bad_reviews", f"{tmp_path}/rows.csv", f"{tmp_path}/out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("function,dataset,output,message", [
    ("nothing", "a/b:train", "x", "'nothing': no such function of rows; choose from cnn_dailymail, "),
    ("openings", "", "x", "give a function of rows and a data set; see --help"),
    ("openings", "a/b:no", "x", "the data set a/b:no: cannot be read .ValueError: no such split"),
    ("openings", "a.jsonl", "x", "the data set a.jsonl: no such file"),
    ("pairs", "a/b:train", "x", "a/b:train: has no column 'prompt', only text"),
    ("openings", "a/b:train", "no/where", "--output no/where: No such file")])
def test_mistakes_in_preparing_rows_are_one_line(function, dataset, output, message, tmp_path, monkeypatch):
    def load_dataset(name, split):
        if split == "no":
            raise ValueError("no such split\nchoose another")
        return datasets.Dataset.from_list([dict(text="a")])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    module = prepare()
    with pytest.raises(UserError, match=f"^{message}"):
        module.main(module.Args(function, dataset, output))


@pytest.mark.parametrize("name,seq2seq,width", [
    ("gpt2-mini", False, 192), ("gpt2-tiny", False, 128), ("t5-mini", True, 192)])
def test_example_configs_make_models(name, seq2seq, width):
    lm = new_lm(f"{ROOT}/examples/{name}.json", char_tokenizer(), 1)
    assert lm.config.is_encoder_decoder == seq2seq and lm.get_input_embeddings().weight.shape == (VOCABULARY, width)


# --- form -------------------------------------------------------------------------------------------------------------


def test_target_length():
    assert score("target_length", ["w " * 20, "w " * 10, "w " * 30, "", "w " * 60]) == [0.0, -0.5, -0.5, -1.0, -2.0]


def test_short_without_repetition():
    outputs = ["a b c", "a A a b", "", "one", " ".join(map(str, range(45)))]
    assert score("short_without_repetition", outputs) == [1.0, 0.5, -1.0, 1.0, 0.5]


def test_valid_json():
    good = ['{"a": [1, 2]}', " {} \n"]
    bad = ["[1]", "3", "", "{'a': 1}", '{"a": 1} and', "so {}", "[" * 100000]
    assert score("valid_json", good + bad) == [1.0] * len(good) + [-1.0] * len(bad)


def test_boxed_answer():
    good = [r"so \boxed{42}.", r"$\boxed{ x }$", "two\nlines \\boxed{\\frac{1}{2}}\n"]
    bad = [r"\boxed{}", r"\boxed{ }", r"\boxed{1} or \boxed{2}", r"\boxed{4} is it", "42", r"\boxed{4", ""]
    assert score("boxed_answer", good + bad) == [1.0] * len(good) + [0.0] * len(bad)


def test_few_colons():
    assert score("few_colons", ["", "a: b", "::x:"]) == [0.0, -1.0, -3.0]


# --- against a column -------------------------------------------------------------------------------------------------


def test_contains_keywords():
    """Whole words in any case, from a list or a text with commas (CSV), and a row without any."""
    outputs = ["A Big CAT!", "category", "1+1 (c++)", "x"]
    assert score("contains_keywords", outputs, keywords=[["cat", "dog"], "cat", "c++, 1+1", None]) == [0.5, 0, 1, 0]


@pytest.mark.parametrize("output,answer,expected", [
    ("so 6 * 7 = 42.", 42, 1), ("42 or 41", 42, 0), ("it is 1,234.50", "1234.5", 1), ("-3", 3, 0), ("5-3", 3, 1),
    ("$18", "9 * 2 = <<9*2=18>>18\n#### 18", 1), ("18 eggs, then .5", 0.5, 1), ("none", 0, 0), ("", "no number", 0)])
def test_exact_number(output, answer, expected):
    """The last number counts, on both sides, as a number: not as text."""
    assert score("exact_number", [output], answer=[answer]) == [expected]


def test_overlap_is_the_f1_of_words_with_repeats():
    outputs, reference = ["a b b c", "The cat.", "x", "", "a a a a"], ["b b d", "the CAT", "y", "", "a"]
    expected = [2 * 2 / (4 + 3), 1.0, 0.0, 0.0, 2 * 1 / (4 + 1)]
    assert score("overlap", outputs, reference=reference) == pytest.approx(expected)


def test_chrf_is_that_of_sacrebleu(monkeypatch):
    """Of each output with its own reference, over 100; one line where the package is missing."""
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match="^the reward chrf needs sacrebleu: pip install sacrebleu$"):
        score("chrf", ["a"], reference=["b"])
    monkeypatch.setitem(sys.modules, "sacrebleu", types.SimpleNamespace(
        sentence_chrf=lambda text, references: types.SimpleNamespace(score=50.0 * (references == [text]))))
    assert score("chrf", ["a", "b"], reference=["a", "c"]) == [0.5, 0.0]


# --- a classifier -----------------------------------------------------------------------------------------------------


def save_classifier(folder, labels):
    """A random DistilBERT with these labels, and its own tokenizer; returns its probabilities, or its one output, of a
    text, computed without padding."""
    torch.manual_seed(len(labels))
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=16, hidden_dim=32, n_layers=1, n_heads=2, max_position_embeddings=24,
        id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)})
    model = transformers.DistilBertForSequenceClassification(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.5)
    tokenizer = char_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)])
    tokenizer.model_max_length = 24
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    tokenizer.truncation_side = "left"  # of a long text the end is read, where the output is

    def outputs(text):
        with torch.no_grad():
            logits = model(**tokenizer(text, truncation=True, return_tensors="pt")).logits[0]
        return (logits.softmax(0) if len(labels) > 1 else logits).tolist()

    return outputs


TEXTS = ["good", "a very bad film", "", "x", "so long that it is cut off at the end of what the model takes"]


def scores_alone_and_together(model, folder) -> tuple:
    """What a reward model says of texts of unlike lengths, one by one and in one batch; and its function."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.15)
    model.save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    score = load_classifier(str(folder), "--reward", "cpu", 4)
    texts = ["hello", "a b", "hello world again"]
    return [score([text])[0] for text in texts], score(texts), score


@pytest.mark.parametrize("pad", [None, 0, 2])
def test_a_reward_model_scores_a_text_as_if_alone_whatever_pad_its_config_has(pad, tmp_path):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS["llama"])
    config.pad_token_id, config.num_labels = pad, 1
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    alone, together, score = scores_alone_and_together(model, tmp_path)
    assert together == pytest.approx(alone, abs=1e-5)
    long = "hello" * 13  # more than the 64 positions
    assert score([long + " this is good"]) != pytest.approx(score([long + " awful bad bad"]), abs=1e-4)


def test_a_reward_model_of_a_config_within_a_config_scores_a_text_as_if_alone(tmp_path):
    """As Gemma 3's, whose text part has a pad token of its own."""
    text = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                intermediate_size=64, max_position_embeddings=64, vocab_size=VOCABULARY, pad_token_id=2)
    vision = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=28,
                  patch_size=14)
    torch.manual_seed(0)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, num_labels=1, mm_tokens_per_image=4)
    model = transformers.Gemma3ForSequenceClassification(config).eval()
    alone, together, _ = scores_alone_and_together(model, tmp_path)
    assert together == pytest.approx(alone, abs=1e-5)


def test_a_roberta_reads_as_many_tokens_as_it_has_positions_behind_its_pad(tmp_path):
    config = transformers.RobertaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=34,
        vocab_size=VOCABULARY, pad_token_id=1, bos_token_id=0, eos_token_id=2, num_labels=1)
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer = char_tokenizer()  # which names no length
    tokenizer.pad_token = "<bos>"
    tokenizer.save_pretrained(tmp_path)
    score = load_classifier(str(tmp_path), "--metric", "cpu", 4)
    assert len(score(["hello" * 20, "abc"])) == 2


def test_a_vocabulary_as_large_as_the_positions_takes_none_of_them():
    config = copy.deepcopy(CONFIGS["llama"])
    config.max_position_embeddings, config.pad_token_id, config.num_labels = VOCABULARY, 3, 1
    assert positions_of(transformers.AutoModelForSequenceClassification.from_config(config)) == VOCABULARY


@pytest.mark.parametrize("labels", [("NEGATIVE", "POSITIVE"), ("POSITIVE", "NEGATIVE"), ("LABEL_0", "LABEL_1")])
def test_sentiment_is_the_probability_of_positive(labels, tmp_path, monkeypatch):
    """Of each text, in order, whatever the order of the labels, as if it were alone in its batch."""
    outputs, place = save_classifier(tmp_path, labels), labels.index("POSITIVE") if "POSITIVE" in labels else 1
    monkeypatch.setenv("REWARD_MODEL", str(tmp_path))
    expected = [outputs("it is " + text)[place] for text in TEXTS]
    assert max(expected) - min(expected) > 0.1
    assert score("sentiment", TEXTS, prompt="it is ") == pytest.approx(expected, abs=1e-5)


def test_better_than_reference_is_a_difference_of_two_rewards_of_one_prompt(tmp_path, monkeypatch):
    """With a reward model of one output, which is used as it is, and loaded once."""
    outputs = save_classifier(tmp_path, ["LABEL_0"])
    monkeypatch.setenv("REWARD_MODEL", str(tmp_path))
    reference = ["bad", "fine", "good", "", "a"]
    expected = [outputs("sum: " + a)[0] - outputs("sum: " + b)[0] for a, b in zip(TEXTS, reference)]
    assert max(map(abs, expected)) > 0.05
    assert score("better_than_reference", TEXTS, prompt="sum: ", reference=reference) == pytest.approx(
        expected, abs=1e-4)
    load = load_function(f"{REWARDS}:load_reward_model", "--reward")
    assert load(str(tmp_path)) is load(str(tmp_path))


@pytest.mark.parametrize("name,column,space", [
    ("better_than_chosen", "chosen", ""), ("better_than_label", "label", " ")])
def test_better_than_another_column(name, column, space, tmp_path, monkeypatch):
    """The same difference, of the column that the data set has."""
    outputs = save_classifier(tmp_path, ["LABEL_0"])
    monkeypatch.setenv("REWARD_MODEL", str(tmp_path))
    others = ["bad", "fine", "good", "x", "a"]
    expected = [outputs("sum: " + a)[0] - outputs(f"sum: {space}{b}")[0] for a, b in zip(TEXTS, others)]
    assert score(name, TEXTS, prompt="sum: ", **{column: others}) == pytest.approx(expected, abs=1e-4)


def test_the_sentiment_of_an_output_does_not_hear_its_prompt(tmp_path, monkeypatch):
    outputs = save_classifier(tmp_path, ["NEGATIVE", "POSITIVE"])
    monkeypatch.setenv("REWARD_MODEL", str(tmp_path))
    assert score("output_sentiment", TEXTS, prompt="good ") == pytest.approx([outputs(t)[1] for t in TEXTS], abs=1e-5)


def test_dense_sentiment_pays_for_the_halves_of_the_output(tmp_path, monkeypatch):
    """At the middle token what is not positive in the first half, at the last token what is positive in the second."""
    outputs = save_classifier(tmp_path, ["NEGATIVE", "POSITIVE"])
    monkeypatch.setenv("REWARD_MODEL", str(tmp_path))
    tokenizer = char_tokenizer()
    texts = ["abcdef", "abcde", "ab", "a"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    ids[1].append(tokenizer.eos_token_id)
    answer = score("dense_sentiment", texts, output_ids=ids, tokenizer=tokenizer)
    halves = [("abc", "def"), ("abc", "de"), ("a", "b")]
    for row, (first, second), size in zip(answer, halves, (6, 6, 2)):
        expected = [0.0] * size
        expected[size // 2 - 1], expected[-1] = outputs(first)[0], outputs(second)[1]
        assert row == pytest.approx(expected, abs=1e-5)
    assert answer[3] == pytest.approx([outputs("a")[0] + outputs("")[1]], abs=1e-5), "one token is middle and last"


def test_a_reward_model_that_does_not_exist_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("REWARD_MODEL", f"{tmp_path}/nothing")
    with pytest.raises(UserError, match="REWARD_MODEL .*/nothing") as caught:
        score("sentiment", ["a"])
    assert "\n" not in str(caught.value)


# --- tokens and programs ----------------------------------------------------------------------------------------------


def test_no_repeated_token():
    ids = [[5, 5, 5, 6], [5, 6, 5], [7]]
    assert score("no_repeated_token", ["", "", ""], output_ids=ids) == [[0.0, -1.0, -1.0, 0.0], [0.0] * 3, [0.0]]


@pytest.mark.parametrize("program,result", [
    ("reverse", [2, 1, 3]), (" sort | reverse ", [3, 2, 1]), ("drop 2", [2]), ("take  1|add 10", [13]),
    ("multiply 2", [6, 2, 4]), ("take 0", []), ("sort|drop 1|add 0", [2, 3])])
def test_list_programs_run(program, result):
    """1 for the wanted list, -0.5 for another, also where the columns are JSON texts, as in a CSV file."""
    assert score("list_program", [program] * 3, input=[[3, 1, 2], "[3, 1, 2]", [3, 1, 2]],
                 target=[result, json.dumps(result), [99]]) == [1.0, 1.0, -0.5]


def test_list_programs_that_do_not_parse():
    programs = ["", "sort |", "sort 2", "drop", "drop -1", "drop x", "add 1000", "SORT", "sort drop 1", "[1]",
                "__import__('os')", "add 1\n2", "drop ١"]
    lists = [[1]] * len(programs)
    assert score("list_program", programs, input=lists, target=lists) == [-1.0] * len(programs)


# --- as a user runs them ----------------------------------------------------------------------------------------------


def train(folder, **flags):
    """Two steps of PPO; returns the evaluation samples and the lines of metrics.jsonl."""
    args = ppo.Args(total_episodes=16, rollout_batch_size=8, batch_size=4, micro_batch_size=4, max_length=32,
                    max_new_tokens=6, eval_every=100, num_eval_prompts=4, output_dir=f"{folder}/run", **flags)
    columns = dict(reference=[" ".join(f"w{i}" for i in range(n)) for n in (0, 20, 40, 58)], number=[0, 1, 2, 3])
    rows = [dict(zip(columns, values), prompt="w1 w2") for values in zip(*columns.values())]
    ppo.train(args, prompts=rows)
    samples, metrics = ([json.loads(line) for line in open(f"{folder}/run/{name}.jsonl")]
                        for name in ("samples", "metrics"))
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert [line["step"] for line in samples] == [0] * 4 + [2] * 4
    for step in (0, 2):
        rewards = [line["reward"] for line in samples if line["step"] == step]
        assert metrics[step]["eval/reward"] == pytest.approx(sum(rewards) / 4)
    return samples, metrics, columns


def test_the_columns_of_the_prompts_reach_the_function(model_path, tmp_path):
    """`overlap` with a column that differs from row to row, on outputs of whole words; other columns do no harm."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(
        ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(VOCABULARY - 3))])}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>",
                                         eos_token="<eos>").save_pretrained(tmp_path / "words")
    samples, metrics, columns = train(tmp_path, model=model_path("gpt2"), tokenizer=f"{tmp_path}/words",
                                      reward=f"{REWARDS}:overlap")
    for step in (0, 4):
        outputs = [line["output"] for line in samples[step : step + 4]]
        expected = score("overlap", outputs, reference=columns["reference"])
        assert [line["reward"] for line in samples[step : step + 4]] == pytest.approx(expected)
        assert expected[0] == 0 and expected[3] > 0
    assert metrics[1]["rollout/score"] > 0


def test_a_dense_reward_of_a_classifier_trains(model_path, tmp_path, monkeypatch):
    save_classifier(tmp_path / "classifier", ["NEGATIVE", "POSITIVE"])
    monkeypatch.setenv("REWARD_MODEL", f"{tmp_path}/classifier")
    samples, metrics, _ = train(tmp_path, model=model_path("gpt2"), reward=f"{REWARDS}:dense_sentiment")
    assert all(0 < line["reward"] < 2 for line in samples)
    assert all(0 < line["rollout/score"] < 2 and math.isfinite(line["loss/policy"]) for line in metrics[1:])

"""ppo.py as its users run it: from Python on tiny models, and as a command on one and two processes."""

import json
import math
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, char_tokenizer, documented_metrics, run_forked, run_script, tiny_lm
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, MambaConfig, MambaForCausalLM

import ppo
from common.cli import UserError
from common.models import LanguageModel, LogitRules, collate, load_lm, make_head, prepare

TINY = dict(total_episodes=16, rollout_batch_size=8, batch_size=4, micro_batch_size=4, max_length=32, max_new_tokens=6,
            eval_every=100, num_eval_prompts=4, learning_rate=1e-3)
TINY_FLAGS = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]
PROMPTS = ["ab", "The cat", "hello ", "x", "some words here"]


def letters(samples, outputs, **_):
    """A reward for capital letters that no two tiny models score alike."""
    return [sum(ord(letter) % 7 for letter in output) / 10 for output in outputs]


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]


def numbers(row: dict) -> dict:
    """What must be equal between two equal runs: everything but the clock."""
    return {name: value for name, value in row.items() if not name.startswith("perf/") and name != "seconds"}


# --- what every run must show -----------------------------------------------------------------------------------------

VARIANTS = {
    "mixtral hydra": dict(num_layers_unfrozen=1),
    "llama bfloat16": dict(dtype="bfloat16"),
    "gpt2": dict(),
    "gpt2 hydra": dict(num_layers_unfrozen=1),
    "gpt2 value branch": dict(num_value_layers=1),
    "gpt2 lora": dict(lora_rank=4),
    "gpt2 checkpointed": dict(gradient_checkpointing=True),
    "gpt2 temperature": dict(temperature=0.7, min_new_tokens=3),
    "gpt2 keep_sharded": dict(keep_sharded=True),
    "gpt2 bfloat16": dict(dtype="bfloat16"),
    "gpt_neox hydra": dict(num_layers_unfrozen=2),
    "opt hydra": dict(num_layers_unfrozen=1),
    "llama hydra branch": dict(num_layers_unfrozen=1, num_value_layers=2),
    "llama lora": dict(lora_rank=4),
    "qwen3": dict(),
    "gemma2 hydra": dict(num_layers_unfrozen=1),
    "gemma3": dict(),
    "bloom hydra": dict(num_layers_unfrozen=1),
    "bloom value branch bfloat16": dict(num_value_layers=1, dtype="bfloat16"),
    "opt value branch bfloat16": dict(num_value_layers=1, dtype="bfloat16"),
    "bart value branch bfloat16": dict(num_value_layers=1, dtype="bfloat16"),
    "t5": dict(),
    "t5 hydra branch": dict(num_layers_unfrozen=1, num_value_layers=1),
    "t5_v1_1 lora": dict(lora_rank=4),
    "bart hydra": dict(num_layers_unfrozen=1),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_contracts_hold_in_every_kind_of_run(variant, model_path, tmp_path):
    """Ratio 1 at the first minibatch, reference equal to the policy at step 0, sampler equal to the training forward,
    and the exported model loads in plain transformers with the logits of the returned one."""
    architecture, flags = variant.split()[0], VARIANTS[variant]
    args = ppo.Args(model=model_path(architecture), output_dir=str(tmp_path / "run"), **{**TINY, **flags})
    model, tokenizer = ppo.train(args, reward_fn=letters, prompts=PROMPTS)
    first, second = rows_of(tmp_path / "run")[1:]
    tolerance = 0.15 if "bfloat16" in variant else 1e-4
    assert first["policy/first_ratio_error"] < tolerance and second["policy/first_ratio_error"] < tolerance
    if "bfloat16" in variant and "hydra" not in variant:
        assert first["rollout/kl"] == 0, "the reference computes what the policy computes, rotary frequencies too"
    assert abs(first["rollout/kl"]) < tolerance and abs(first["rollout/kl_k3"]) < tolerance
    assert first["rollout/sampler_gap"] < tolerance and second["rollout/sampler_gap"] < tolerance
    assert second["rollout/kl_k3"] > 1e-6, "the policy has not moved from its reference"
    assert first["optim/grad_norm"] > 0
    auto = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path / "run" / "model").eval()
    inputs = dict(input_ids=torch.tensor([[5, 6, 7]]))
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[0, 4]])
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    start = load_lm(args.model)
    assert not torch.equal(again(**inputs).logits, start(**inputs).logits)
    if "hydra" not in variant and "lora" not in variant:  # what is trained is trained: the root's weights as well
        for name in ("get_input_embeddings", "get_output_embeddings"):
            assert not torch.equal(getattr(again, name)().weight, getattr(start, name)().weight), name
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").eos_token_id == tokenizer.eos_token_id
    model.generate(inputs["input_ids"], attention_mask=torch.ones(1, 3, dtype=torch.long), max_new_tokens=2)


def test_run_directory(model_path, tmp_path):
    args = ppo.Args(model=model_path("gpt2"), output_dir=str(tmp_path / "run"), save_every=1, keep_checkpoints=1,
                    eval_temperature=[0.0, 1.0], eval_top_k=[3], **{**TINY, "eval_every": 1})
    ppo.train(args, reward_fn=letters, prompts=PROMPTS,
              metric_fn=lambda outputs: {"chars": [len(output) for output in outputs], "constant": 3.0})
    run = tmp_path / "run"
    assert yaml.safe_load((run / "args.yaml").read_text())["learning_rate"] == 1e-3
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [0, 1, 2] and [row["episodes"] for row in rows] == [0, 8, 16]
    assert all(row["seconds"] > 0 for row in rows) and rows[2]["tokens"] > rows[1]["tokens"] > 0
    for temperature in (0, 1):
        for name in ("reward", "chars", "constant", "length"):
            assert f"eval/{name}@temperature={temperature}" in rows[2]
    assert rows[1]["eval/constant@temperature=1"] == 3.0
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3 * 2 * 4 and {"step", "option", "prompt", "output", "reward"} == set(samples[0])
    assert sorted(os.listdir(run / "checkpoints")) == ["best", "step-2"]
    AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "best")
    greedy = [sample["output"] for sample in samples if sample["step"] == 0 and sample["option"] == "@temperature=0"]
    tokenizer, lm = char_tokenizer(), load_lm(args.model)
    for prompt, output in zip(PROMPTS, greedy):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        expected = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert output == tokenizer.decode(expected[0, ids.shape[1]:], skip_special_tokens=True)


def test_metrics_are_those_of_the_docs(model_path, tmp_path):
    """The table of docs/ppo.md and the log hold the same names."""
    args = ppo.Args(model=model_path("gpt2"), output_dir=str(tmp_path / "run"), **TINY)
    ppo.train(args, reward_fn=letters, prompts=PROMPTS)
    logged = set().union(*rows_of(tmp_path / "run"))
    assert logged == documented_metrics("ppo.py") - {"eval/optimality", "eval/invalid"}  # random walks only


def test_the_reference_stays_and_the_penalty_is_paid(model_path, tmp_path):
    """score - kl_coef * kl = the sum of the token rewards."""
    args = ppo.Args(model=model_path("gpt2"), output_dir=str(tmp_path / "run"), kl_coef=0.3, **TINY)
    ppo.train(args, reward_fn=letters, prompts=PROMPTS)
    for row in rows_of(tmp_path / "run")[1:]:
        assert row["rollout/reward"] == pytest.approx(row["rollout/score"] - 0.3 * row["rollout/kl"], abs=1e-4)


def test_user_objects_are_unchanged_and_metadata_reaches_the_function(model_path, tmp_path):
    prompts = [{"prompt": prompt, "wanted": prompt[::-1]} for prompt in PROMPTS]
    before, calls = json.dumps(prompts), []

    def reward(samples, prompts, outputs, wanted, tokenizer, output_ids):
        calls.append((prompts, wanted, samples, outputs))
        assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in output_ids] == outputs
        return [0.0] * len(samples)

    args = ppo.Args(model=model_path("gpt2"), output_dir=str(tmp_path / "run"), **TINY)
    ppo.train(args, reward_fn=reward, prompts=prompts)
    assert json.dumps(prompts) == before
    for texts, wanted, samples, outputs in calls:
        assert [text[::-1] for text in texts] == wanted
        assert [text + output for text, output in zip(texts, outputs)] == samples


def test_an_export_has_the_float32_weights_of_a_bfloat16_run(model_path, tmp_path):
    """Also of the root, which a run that is kept sharded leaves gathered in bfloat16 after an evaluation: not copies of
    that precision."""
    args = ppo.Args(model=model_path("gpt2"), output_dir=str(tmp_path / "run"), dtype="bfloat16", keep_sharded=True,
                    **TINY)
    model, _ = ppo.train(args, reward_fn=letters, prompts=PROMPTS)
    for name, weight in model.named_parameters():
        assert not torch.equal(weight, weight.bfloat16().float()) or weight.unique().numel() < 3, name


def test_default_prompt_is_the_bos_token(model_path, tmp_path):
    seen = []

    def reward(prompts, samples):
        seen.extend(prompts)
        return [0.0] * len(samples)

    args = ppo.Args(model=model_path("gpt2"), output_dir=str(tmp_path / "run"), **TINY)
    ppo.train(args, reward_fn=reward)
    assert set(seen) == {""}


def test_dense_rewards_train(model_path, tmp_path):
    def reward(samples, output_ids):
        return [[0.5 if token == 7 else 0.0 for token in ids] for ids in output_ids]

    args = ppo.Args(model=model_path("gpt2"), output_dir=str(tmp_path / "run"), kl_coef=0.0,
                    **{**TINY, "total_episodes": 640, "rollout_batch_size": 64, "batch_size": 32,
                       "micro_batch_size": 32, "learning_rate": 5e-3})
    ppo.train(args, reward_fn=reward, prompts=PROMPTS)
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["rollout/score"] > rows[1]["rollout/score"] + 0.5


def test_reward_on_rank_0_sees_all_samples(model_path, tmp_path):
    counts = []

    def reward(samples):
        counts.append(len(samples))
        return [1.0] * len(samples)

    args = ppo.Args(model=model_path("gpt2"), output_dir=str(tmp_path / "run"), reward_on="rank0", **TINY)
    ppo.train(args, reward_fn=reward, prompts=PROMPTS)
    assert set(counts) == {4, 8}


def test_stop_sequences_end_outputs(model_path, tmp_path):
    """The text is cut where the stop sequence begins; the tokens end with the one that completed it, and count as
    finished, so the missing-EOS penalty spares them."""
    seen = []

    def reward(samples, outputs, output_ids, tokenizer):
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in output_ids]
        seen.extend(zip(outputs, texts))
        return [0.0] * len(samples)

    stop = list("abcdefghijklm")
    args = ppo.Args(model=model_path("gpt2"), output_dir=str(tmp_path / "run"), **TINY)
    ppo.train(args, reward_fn=reward, prompts=PROMPTS, stop_sequences=stop)
    assert any(len(output) < len(tokens) for output, tokens in seen)
    for output, tokens in seen:
        assert not set(output) & set(stop)
        assert tokens in (output, *(output + letter for letter in stop))


def test_logit_mask_is_obeyed_in_sampling_and_in_training(model_path, tmp_path):
    """Tokens are followed by tokens of the other parity only; the sampler still agrees with the training forward."""
    parity = torch.arange(61) % 2
    mask = parity[:, None] == parity[None, :]
    seen = []

    def reward(samples, output_ids):
        seen.extend(output_ids)
        return [0.0] * len(samples)

    args = ppo.Args(model=model_path("gpt2"), output_dir=str(tmp_path / "run"), **TINY)
    ppo.train(args, reward_fn=reward, prompts=PROMPTS, logit_mask=mask)
    assert all((a + b) % 2 for ids in seen for a, b in zip(ids, ids[1:]))
    assert all(row["rollout/sampler_gap"] < 1e-4 for row in rows_of(tmp_path / "run")[1:])


def test_a_logit_mask_that_cannot_be_is_refused(model_path, tmp_path):
    args = ppo.Args(model=model_path("gpt2"), output_dir=str(tmp_path / "run"), **TINY)
    for mask in (torch.ones(61, 61, dtype=torch.bool), torch.zeros(61, 61), torch.zeros(61, dtype=torch.bool)):
        with pytest.raises(UserError, match="logit_mask must be"):
            ppo.train(args, reward_fn=letters, prompts=PROMPTS, logit_mask=mask)


def test_every_end_token_of_a_chat_model_ends_an_output(model_path, tmp_path):
    """Those of the generation config count as well as the tokenizer's."""
    folder, seen = str(tmp_path / "model"), []
    shutil.copytree(model_path("gpt2"), folder)
    Path(folder, "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(2, 40))}))

    def reward(samples, output_ids):
        seen.extend(output_ids)
        return [0.0] * len(samples)

    ppo.train(ppo.Args(model=folder, output_dir=str(tmp_path / "run"), **TINY), reward_fn=reward, prompts=PROMPTS)
    assert all(token >= 40 for ids in seen for token in ids[:-1]) and any(ids[-1] < 40 for ids in seen)


def test_a_model_that_cannot_be_handled_ends_in_one_line(tmp_path):
    folder = str(tmp_path / "mamba")
    sizes = dict(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=61)
    MambaForCausalLM(MambaConfig(**sizes)).save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    with pytest.raises(UserError, match="--model: a MambaForCausalLM cannot be sampled from and scored here"):
        ppo.train(ppo.Args(model=folder, output_dir=str(tmp_path / "run"), **TINY), reward_fn=letters, prompts=PROMPTS)


def test_resuming_from_an_older_checkpoint_drops_the_later_ones(model_path, tmp_path):
    flags = dict(model=model_path("gpt2"), save_every=1, keep_checkpoints=5, **{**TINY, "total_episodes": 32})
    run = tmp_path / "run"
    ppo.train(ppo.Args(output_dir=str(run), **flags), reward_fn=letters, prompts=PROMPTS)
    older = str(run / "checkpoints" / "step-2")
    ppo.train(ppo.Args(resume=older, max_steps=3, **flags), reward_fn=letters, prompts=PROMPTS)
    assert sorted(os.listdir(run / "checkpoints")) == ["best", "step-1", "step-2", "step-3"]
    (tmp_path / "link").symlink_to(run)  # another name of the same folder
    named = ppo.Args(resume=older, output_dir=str(tmp_path / "link"), max_steps=2, **flags)
    ppo.train(named, reward_fn=letters, prompts=PROMPTS)  # nothing left to do
    assert sorted(os.listdir(run / "checkpoints")) == ["best", "step-1", "step-2"]


def test_resuming_elsewhere_leaves_the_other_run_as_it_is(model_path, tmp_path):
    flags = dict(model=model_path("gpt2"), save_every=1, keep_checkpoints=5, **{**TINY, "total_episodes": 32})
    one, other = tmp_path / "one", tmp_path / "other"
    ppo.train(ppo.Args(output_dir=str(one), **flags), reward_fn=letters, prompts=PROMPTS)
    before = {path: path.read_bytes() for path in one.rglob("*") if path.is_file()}
    other.mkdir()
    (other / "args.yaml").write_text("")  # as a try leaves it that was killed before its first checkpoint
    elsewhere = ppo.Args(resume=str(one / "checkpoints" / "step-2"), output_dir=str(other), max_steps=3, **flags)
    ppo.train(elsewhere, reward_fn=letters, prompts=PROMPTS)
    assert sorted(os.listdir(other / "checkpoints")) == ["best", "step-3"]
    assert {path: path.read_bytes() for path in one.rglob("*") if path.is_file()} == before
    with pytest.raises(UserError, match=f"^--output-dir {other}: holds another run than --resume .*step-2; choose"):
        ppo.train(elsewhere, reward_fn=letters, prompts=PROMPTS)  # which would drop that one's later checkpoints
    assert sorted(os.listdir(other / "checkpoints")) == ["best", "step-3"]


def test_the_best_model_is_that_of_the_best_reward(model_path, tmp_path, monkeypatch):
    """Whatever else a metric function calls its numbers."""
    rewards, exported, plain = [0.0, 5.0, 7.0, 6.0], [], ppo.export

    def evaluate(*_, **__):
        reward = rewards.pop(0)
        return {"eval/reward_length": 10 - reward, "eval/reward": reward}, [{"prompt": "", "output": "", "reward": 0.0}]

    def export(model, tokenizer, folder, *rest, **flags):
        exported.append((os.path.basename(folder), len(rewards)))
        plain(model, tokenizer, folder, *rest, **flags)

    monkeypatch.setattr(ppo, "evaluate_samples", evaluate)
    monkeypatch.setattr(ppo, "export", export)
    flags = {**TINY, "total_episodes": 24, "eval_every": 1}
    ppo.train(ppo.Args(model=model_path("gpt2"), output_dir=str(tmp_path / "run"), **flags), reward_fn=letters,
              prompts=PROMPTS)
    assert exported == [("best", 2), ("best", 1), ("model", 0)], "after the second and the third of four"


def test_a_seed_may_be_larger_than_numpys():
    assert ppo.random_walks(2**32 + 1).walks == ppo.random_walks(1).walks


def test_the_kl_coefficient_cannot_change_its_sign():
    assert ppo.adapt_kl_coef(0.05, 0.0, 6.0, 2048, 256) < 0, "what the flags must not allow"
    with pytest.raises(UserError, match="^--kl-horizon 256: must be more than a fifth of --rollout-batch-size 2048"):
        ppo.check(ppo.Args(model="m", reward="r.py:f", kl_target=6.0, kl_horizon=256, rollout_batch_size=2048,
                           total_episodes=4096))


def test_prompts_of_ones_own_are_not_cut_to_the_tasks_words():
    args = ppo.arguments(model="m", reward="sentiment", prompts="mine.jsonl")
    assert args.prompt_words is None and args.eval_prompts is None
    assert ppo.arguments(model="m", reward="sentiment").prompt_words == 4


def test_equal_scores_are_not_scaled_up():
    for scaling in ("running", "reference"):
        scores, _ = ppo.shape_scores([-1.0] * 4, [True] * 4, (0, 0.0, 0.0), ppo.Args(reward_scaling=scaling))
        assert scores == [-1.0] * 4


def test_arguments_have_the_tasks_defaults():
    assert ppo.arguments().max_new_tokens == ppo.PRESETS["randomwalks"]["max_new_tokens"]
    assert ppo.arguments(model="x", reward="sentiment").prompt_words == 4
    assert ppo.arguments(model="x", reward="f.py:f") == ppo.Args(model="x", reward="f.py:f")


def test_long_prompts_are_cut_and_counted(model_path, tmp_path, capsys):
    args = ppo.Args(model=model_path("gpt2"), output_dir=str(tmp_path / "run"), **{**TINY, "max_length": 10})
    ppo.train(args, reward_fn=letters, prompts=PROMPTS)
    assert "3 of 5 prompts" in capsys.readouterr().out
    assert rows_of(tmp_path / "run")[1]["rollout/cut_prompts"] > 0


def test_non_finite_gradient_stops_with_the_batch_saved(model_path, tmp_path, monkeypatch):
    broken = lambda *inputs: (inputs[0].sum() * float("nan"), {})  # noqa: E731
    monkeypatch.setattr(ppo, "policy_loss", broken)
    args = ppo.Args(model=model_path("gpt2"), output_dir=str(tmp_path / "run"), **TINY)
    with pytest.raises(UserError, match="step 0: the gradient is nan; its batch and the state before it are in"):
        ppo.train(args, reward_fn=letters, prompts=PROMPTS)
    saved = torch.load(tmp_path / "run" / "nonfinite-step-0" / "batch.pt", weights_only=True)
    assert len(saved["rows"]) == 4 and len(saved["responses"]) == 8


def test_the_largest_ratio_is_that_of_all_tokens_in_either_direction():
    """Against a plain forward of each row alone, in micro-batches of two."""
    model = LanguageModel(tiny_lm("gpt2"))
    model.heads["value"] = make_head(model.width, 1)
    prepare(model, torch.float32, torch.device("cpu"))
    prompts, responses = [[5, 6], [7], [8, 9, 10]], [[11, 12], [13], [14, 15, 16]]
    mask = torch.arange(3) < torch.tensor([len(response) for response in responses])[:, None]
    data = {"mask": mask, **{name: torch.zeros(3, 3) for name in ("values", "advantages", "returns")}}
    gaps = torch.tensor([[0.1, 0.2, 0.0], [-0.9, 0.0, 0.0], [0.3, 0.0, 0.4]])
    with torch.no_grad():
        alone = [model(**collate([p], [r], None, model.device))["logprobs"] for p, r in zip(prompts, responses)]
    data["logprobs"] = torch.nn.utils.rnn.pad_sequence(alone, batch_first=True) + gaps
    args = ppo.Args(micro_batch_size=2)
    *_, largest = ppo.add_gradient(model, [0, 1, 2], prompts, responses, data, LogitRules(), args)
    assert largest.item() == pytest.approx(math.exp(0.9), rel=1e-5)


def test_an_architecture_that_goes_wrong_is_refused_before_the_first_update(model_path, tmp_path, monkeypatch):
    """A sampler that disagrees with the training forward, and a reference that is not the policy."""
    monkeypatch.setattr("common.models.positions", lambda mask: torch.arange(mask.shape[1]).expand(mask.shape))
    args = ppo.Args(model=model_path("gpt2"), output_dir=str(tmp_path / "a"), **TINY)
    with pytest.raises(UserError, match="sampler's log-probs differ"):
        ppo.train(args, reward_fn=letters, prompts=PROMPTS)
    monkeypatch.undo()
    other = str(tmp_path / "other")
    tiny_lm("gpt2", seed=5).save_pretrained(other)
    load = ppo.load_lm
    loads = iter([args.model, other])
    monkeypatch.setattr(ppo, "load_lm", lambda path: load(next(loads)))
    with pytest.raises(UserError, match="reference differs from the untrained policy"):
        args.output_dir = str(tmp_path / "b")
        ppo.train(args, reward_fn=letters, prompts=PROMPTS)


def test_adaptive_kl_follows_its_target(model_path, tmp_path):
    args = ppo.Args(model=model_path("gpt2"), output_dir=str(tmp_path / "run"), kl_target=1e-9, kl_horizon=8, **TINY)
    ppo.train(args, reward_fn=letters, prompts=PROMPTS)
    first, second = (row["rollout/kl_coef"] for row in rows_of(tmp_path / "run")[1:])
    assert first == 0.05 and second == pytest.approx(0.05 * 0.8) or second == pytest.approx(0.05 * 1.2)


# --- resume -----------------------------------------------------------------------------------------------------------


def straight_and_resumed(tmp_path, model, flags, **options):
    """Two equal runs of 4 steps; the second stops after 3 and goes on from its checkpoint of step 2."""
    flags = {**TINY, "total_episodes": 32, "eval_every": 2, "save_every": 2, "keep_checkpoints": 9, **flags}
    ppo.train(ppo.Args(model=model, output_dir=str(tmp_path / "a"), **flags), prompts=PROMPTS, **options)
    ppo.train(ppo.Args(model=model, output_dir=str(tmp_path / "b"), max_steps=3, **flags), prompts=PROMPTS, **options)
    resumed = ppo.Args(model=model, resume=str(tmp_path / "b" / "checkpoints" / "step-2"), **flags)
    ppo.train(resumed, prompts=PROMPTS, **options)
    return tmp_path / "a", tmp_path / "b"


@pytest.mark.parametrize("flags", [
    dict(reward_scaling="running", kl_target=0.5, kl_horizon=50, warmup_steps=3),
    dict(num_layers_unfrozen=1, num_value_layers=1), dict(lora_rank=2), dict(keep_sharded=True)],
    ids=["whole", "hydra", "lora", "keep_sharded"])
def test_resume_is_exact(flags, model_path, tmp_path):
    """Every metric and every weight, to the last bit, with a reward function that draws random numbers."""
    def reward(samples, outputs):
        return [output.count("e") + torch.rand(()).item() for output in outputs]

    a, b = straight_and_resumed(tmp_path, model_path("gpt2"), flags, reward_fn=reward)
    assert [numbers(row) for row in rows_of(a)] == [numbers(row) for row in rows_of(b)]
    assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()
    left, right = load_lm(str(a / "model")).state_dict(), load_lm(str(b / "model")).state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(model_path, tmp_path):
    run = tmp_path / "run"

    def train(output_dir=str(run), **flags):
        args = ppo.Args(**{**dict(model=model_path("gpt2"), save_every=1, output_dir=output_dir), **TINY, **flags})
        ppo.train(args, reward_fn=letters, prompts=PROMPTS)

    train()
    with pytest.raises(UserError, match="holds a run already"):
        train()
    with pytest.raises(UserError, match="another run: its --learning-rate was 0.001, not 0.5"):
        train(resume="auto", learning_rate=0.5)
    train(output_dir=str(tmp_path / "none"), resume="auto", max_steps=1)  # nothing to resume: starts afresh
    assert len(rows_of(tmp_path / "none")) == 2
    with pytest.raises(UserError, match="no checkpoint there"):
        train(resume=str(tmp_path / "nowhere" / "checkpoints" / "step-1"))
    for file in (run / "checkpoints" / "step-2").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="step-2: shard-.* is not as it was written; choose another checkpoint"):
        train(resume=str(run / "checkpoints" / "step-2"))


def test_a_mistake_does_not_block_the_next_try(model_path, tmp_path):
    """A run that stopped before its first step leaves a directory that the mended command may use."""
    args = ppo.Args(model=model_path("gpt2"), output_dir=str(tmp_path / "run"), prompts="none.jsonl", **TINY)
    with pytest.raises(UserError, match="none.jsonl: no such file"):
        ppo.train(args, reward_fn=letters)
    args.prompts = None
    ppo.train(args, reward_fn=letters, prompts=PROMPTS)


def test_a_folder_without_a_model_is_one_line(tmp_path):
    """As a LoRA's, which has a tokenizer."""
    char_tokenizer().save_pretrained(tmp_path / "lora")
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    args = ppo.Args(model=str(tmp_path / "lora"), output_dir=str(tmp_path / "run"), **TINY)
    with pytest.raises(UserError, match="^--model .*/lora: the folder holds nothing that transformers can load"):
        ppo.train(args, reward_fn=letters, prompts=PROMPTS)


def test_a_directory_that_cannot_be_written_is_one_line(model_path, tmp_path):
    (tmp_path / "file").write_text("")
    args = ppo.Args(model=model_path("gpt2"), output_dir=str(tmp_path / "file" / "run"), **TINY)
    with pytest.raises(UserError, match="--output-dir .*: .*choose a folder that can be written"):
        ppo.train(args, reward_fn=letters)


# --- the command ------------------------------------------------------------------------------------------------------

WALKS = ["--max-steps", "2", "--eval-samples", "2"]
ON_WALKS = [*WALKS, "--reward", "randomwalks"]  # with a --model, a --reward must be named


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A run of random walks for two steps, whose start others reuse."""
    run = tmp_path_factory.mktemp("walks") / "run"
    done = run_script("ppo.py", *WALKS, "--output-dir", str(run), "--save-every", "1")
    assert done.returncode == 0, done.stderr
    return run, done


def test_the_command_alone_shows_tables_and_one_final_line(started):
    run, done = started
    lines = done.stdout.splitlines()
    assert "before training" in lines and "after training" in lines
    assert re.fullmatch(r"optimality \d\.\d{3} -> \d\.\d{3}; invalid .*\d", lines[-2])
    assert re.fullmatch("model in .*/model", lines[-1])
    assert done.stderr == ""
    assert max(map(len, lines[:-1])) <= 120


def test_two_processes_give_the_numbers_of_one(started, tmp_path):
    """The same tokens, scores and metrics in the first step; later steps within rounding that Adam makes larger."""
    run, _ = started
    shutil.copytree(run / "start", tmp_path / "two" / "start")  # which takes ten seconds to fit
    done = run_script("ppo.py", *WALKS, "--output-dir", str(tmp_path / "two"), processes=2)
    assert done.returncode == 0, done.stderr
    one, two = rows_of(run), rows_of(tmp_path / "two")
    assert numbers(two[0]) == pytest.approx(numbers(one[0]), rel=1e-6)
    for name in one[1]:
        if name.startswith(("rollout/", "value/explained", "episodes", "tokens")) and "gap" not in name:
            assert two[1][name] == pytest.approx(one[1][name], rel=1e-4, abs=1e-5), name
    assert two[1]["loss/policy"] == pytest.approx(one[1]["loss/policy"], abs=0.01)
    assert two[1]["policy/first_ratio_error"] < 1e-4 and two[1]["rollout/sampler_gap"] < 1e-4
    AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "model")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def test_two_agents_as_two_machines(started, tmp_path):
    """`--nnodes 2`: two torchrun agents that meet at a local rendezvous."""
    run, _ = started
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "two", "ppo.py",
               *ON_WALKS, "--max-steps", "1", "--model", str(run / "start"),
               "--output-dir", str(tmp_path / "run")]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    agents = [subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) for _ in range(2)]
    outputs = [agent.communicate(timeout=180) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert sum("after training" in out for out, _ in outputs) == 1
    assert rows_of(tmp_path / "run")[1]["rollout/score"] == pytest.approx(rows_of(run)[1]["rollout/score"], rel=1e-5)


def test_a_script_runs_when_copied_elsewhere_with_common_and_changed(started, tmp_path):
    """As docs/experiments.md says: another advantage by its diff, another reward in a file."""
    page = (ROOT / "docs/experiments.md").read_text()
    text = (ROOT / "ppo.py").read_text()
    for hunk in re.search(r"```diff\n(.*?)```", page, re.S)[1].split("@@\n"):
        before, after = ("".join(line[1:] + "\n" for line in hunk.splitlines() if line[:1] != other) for other in "+-")
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    (tmp_path / "ppo.py").write_text(text)
    (tmp_path / "reward.py").write_text(re.search(r"```python\n(# reward.py\n.*?)```", page, re.S)[1])
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__"))
    done = run_forked("ppo.py", *WALKS, "--model", str(started[0] / "start"), "--prompts", str(prompts_file(tmp_path)),
                      "--reward", "reward.py:short", "--max-new-tokens", "9", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "ppo-start-1" / "model" / "config.json").exists()
    changed = runpy.run_path(str(tmp_path / "ppo.py"))
    rewards, mask = torch.tensor([[1.0, 0], [0, 5], [2, 2], [3, 0]]), torch.tensor([[1, 0], [1, 1], [1, 1], [1, 0]])
    advantages = changed["leave_one_out"](rewards, [[4], [5], [4], [4]], mask.bool())
    assert torch.allclose(advantages, torch.tensor([[1 - 3.5, 0], [0, 0], [4 - 2, 4 - 2], [3 - 2.5, 0]]))


def test_a_failing_rank_takes_the_other_down_with_its_message(started, tmp_path):
    """A reward function that fails on rank 1 alone: no hang, and the message is that of rank 1."""
    (tmp_path / "reward.py").write_text(
        "import torch.distributed as dist\n"
        "def reward(samples):\n    return [0.0] * (len(samples) + dist.get_rank())\n")
    begun = time.time()
    done = run_script("ppo.py", *WALKS, "--model", str(started[0] / "start"), "--output-dir", str(tmp_path / "run"),
                      "--reward", f"{tmp_path}/reward.py:reward", "--prompts", str(prompts_file(tmp_path)),
                      "--max-new-tokens", "9", processes=2)
    assert done.returncode != 0 and time.time() - begun < 60
    assert "[rank 1] ppo.py: error: the reward function returned" in done.stderr


def prompts_file(folder) -> Path:
    path = Path(folder) / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": letter}) + "\n" for letter in "bcdefgh"))
    return path


def test_wandb_works_offline(model_path, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    args = ppo.Args(model=model_path("gpt2"), output_dir=str(tmp_path / "run"), track=True, **TINY)
    ppo.train(args, reward_fn=letters, prompts=PROMPTS)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_random_walks_are_learned(started, tmp_path):
    """The bar of a short run: from below 0.3 to above 0.75 in 12 steps, some 30 seconds on one core."""
    done = run_forked("ppo.py", "--model", str(started[0] / "start"), "--reward", "randomwalks", "--output-dir",
                      str(tmp_path / "run"), "--max-steps", "12", "--eval-every", "12")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "run")
    assert rows[0]["eval/optimality"] < 0.3 and rows[-1]["eval/optimality"] > 0.75

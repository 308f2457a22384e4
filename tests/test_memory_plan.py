"""The plan of a run's memory: rows against bytes counted by hand, a peak against a measured one, nothing allocated."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import memory_plan  # noqa: E402

BLOCK = (32 * 32 + 2 * 16 * 32 + 32 * 32) + 3 * 32 * 64 + 2 * 32  # attention with 2 of 4 heads for keys, MLP, norms
HEAD, EMBEDDING = 61 * 32, 61 * 32
NUMBERS = 6 * BLOCK + HEAD + EMBEDDING + 32
TENSORS = 6 * 9 + 3
PLANS = """
import json, resource, sys, tempfile, time
sys.path.insert(0, "benchmarks")
import torch
torch.set_num_threads(1)
import memory_plan
from transformers import LlamaConfig

config = LlamaConfig(hidden_size=32, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
                     intermediate_size=64, max_position_embeddings=64, vocab_size=61, bos_token_id=1, eos_token_id=2)
sizes = dict(micro_batch_size=2, batch_size=2, generation_batch_size=0, prompt_length=8, response_length=5)

def listed(phases):
    return {phase: list(windows.values()) for phase, windows in phases.items()}

def plan(**settings):
    made = memory_plan.Plan(config, **{**sizes, **settings})
    return listed(memory_plan.dry_run(made, config))

found = {"whole": plan(algorithm="sft", generation_batch_size=3), "halves": plan(algorithm="sft", ranks=2),
         "lora": plan(algorithm="sft", lora_rank=2),
         "top": plan(algorithm="dpo", num_layers_unfrozen=1)}
found["extrapolated"] = listed(memory_plan.windows_of(memory_plan.Plan(config, "sft", 2, **sizes)))

before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()
large = memory_plan.Plan(memory_plan.load_model_config("llama-3-70b"), "sft", ranks=64, generation_batch_size=0)
parameters = memory_plan.phases_of(large)["update"]["parameters"]
found["large"] = [parameters, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, time.time() - began]

settings = dict(dtype="float32", batch_size=8, micro_batch_size=8, gradient_checkpointing=True, prompt_length=160,
                response_length=8)
with tempfile.TemporaryDirectory() as folder:
    memory_plan.make_model(folder, "llama")
    small = memory_plan.Plan(memory_plan.load_model_config(folder), "sft", generation_batch_size=0, **settings)
    found["update"] = [sum(memory_plan.phases_of(small)["update"].values()),
                       memory_plan.measure(folder, "sft", settings)["update"]]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def plans():
    """In a process of its own, since a plan makes its own process group."""
    done = subprocess.run([sys.executable, "-c", PLANS], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def highest(windows: list[dict], row: str) -> float:
    return max(rows[row] for rows in windows)


def test_state_is_what_is_counted_by_hand(plans):
    """Master weights of 4 bytes, two moments of 4, and a gradient of 4 when the optimizer steps; halves on 2 ranks."""
    rows = plans["whole"]["optimizer"][-1]
    buffers = rows["parameters"] - 4 * NUMBERS
    assert 0 <= buffers <= 64  # rotary frequencies
    assert rows["gradients"] == 4 * NUMBERS
    assert rows["optimizer"] == 2 * 4 * NUMBERS + 4 * TENSORS  # and counts of steps
    halves = plans["halves"]["optimizer"][-1]
    padded = NUMBERS + 2 * 32  # 61 rows are 2 x 31
    assert halves["parameters"] - buffers == 4 * padded / 2 and halves["gradients"] == 4 * padded / 2
    assert abs(halves["optimizer"] - rows["optimizer"] / 2) <= 4 * 2 * 32 + 4 * TENSORS


def test_adapters_alone_have_gradients_and_moments(plans):
    rows = plans["lora"]["optimizer"][-1]
    adapters = 6 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert rows["gradients"] == 4 * adapters
    assert rows["optimizer"] == 2 * 4 * adapters + 4 * 2 * 6 * 7
    assert abs(rows["parameters"] - 4 * (NUMBERS + adapters)) <= 64


def test_the_cache_has_keys_and_values_of_all_tokens(plans):
    """bfloat16, 2 heads of 8, 6 layers, 3 rows; while a layer's grows by a token, its old one is there too."""
    layer = 3 * 2 * 2 * 8 * 2  # bytes a token
    assert highest(plans["whole"]["rollout, prompt"], "KV cache") == 6 * 8 * layer
    assert 6 * 13 * layer <= highest(plans["whole"]["rollout, last token"], "KV cache") <= 7 * 13 * layer


def test_a_rollout_gathers_all_parameters_in_the_compute_dtype(plans):
    assert highest(plans["whole"]["rollout, last token"], "gathered parameters") == 2 * NUMBERS


def test_a_reference_that_shares_the_frozen_blocks_has_the_top_alone(plans):
    """In bfloat16; what is trained is as much."""
    rows = plans["top"]["optimizer"][-1]
    assert 0 <= rows["reference"] - 2 * (BLOCK + HEAD + 32) <= 128  # rotary frequencies
    assert rows["gradients"] == 4 * (BLOCK + HEAD + 32)


def test_a_deep_model_is_as_planned_from_shallow_ones(plans):
    for phase in plans["halves"]:
        whole, planned = (max(plans[name][phase], key=lambda rows: sum(rows.values()))
                          for name in ("halves", "extrapolated"))
        assert planned == pytest.approx(whole, rel=1e-6), phase


def test_a_large_model_is_planned_without_memory(plans):
    parameters, megabytes, seconds = plans["large"]
    assert parameters == pytest.approx(4 * 70.55e9 / 64, rel=1e-3)
    assert megabytes < 500 and seconds < 60


def test_a_plan_is_within_15_percent_of_the_measured_peak(plans):
    planned, measured = plans["update"]
    assert planned == pytest.approx(measured, rel=0.15)


def test_an_unknown_model_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["memory_plan.py", "--model", "no/such-model.json"])
    with pytest.raises(SystemExit) as stopped:
        memory_plan.main()
    message = stopped.value.code
    assert message.startswith("memory_plan.py: error: --model no/such-model.json: no such file")
    assert "gpt-j-6b" in message and "\n" not in message

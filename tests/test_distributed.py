"""One and several processes are the same code path and the same numbers: tests/worker.py alone and under torchrun."""

import json

import pytest
from conftest import run_forked

ARCHITECTURES = ("gpt2", "llama", "t5")


def launch(folder, processes: int, *checks: str) -> dict:
    done = run_forked("tests/worker.py", str(folder), *checks, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))[7:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def one(folder):
    return launch(folder, 0, "gradients", "sampling", "apart", "rows", "scores", "few", "start", "checkpoint")


@pytest.fixture(scope="module")
def two(folder, one):
    return launch(folder, 2, "gradients", "hybrid", "sampling", "apart", "gathers", "rows", "scores", "few",
                  "start", "checkpoint")


@pytest.fixture(scope="module")
def three(folder):
    return launch(folder, 3, "gradients", "rows", "few")


def assert_close(a, b, tolerance):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_close(a[key], b[key], tolerance)
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_close(x, y, tolerance)
    else:
        assert a == pytest.approx(b, abs=tolerance, rel=tolerance)


def test_gradients_do_not_depend_on_ranks_micro_batches_or_padding(one, two, three):
    """Rows of uneven lengths, 5 of them on 1, 2 and 3 ranks, in micro-batches of 1, 2 and 5: one gradient."""
    for architecture in ARCHITECTURES:
        assert any(norm > 1e-2 for norm, _ in one["gradients"][f"{architecture}-1"].values())
        for micro in (2, 5):
            assert_close(one["gradients"][f"{architecture}-{micro}"], one["gradients"][f"{architecture}-1"], 2e-4)
    assert_close(two["gradients"], one["gradients"], 2e-4)
    assert_close(three["gradients"], one["gradients"], 2e-4)


def test_fewer_rows_than_ranks_have_the_same_numbers(one, two, three):
    assert_close(two["few"], one["few"], 2e-4)
    assert_close(three["few"], one["few"], 2e-4)


def test_the_start_of_random_walks_is_written_once(one, two):
    assert one["start"] and two["start"] == one["start"]


def test_hybrid_sharding_has_the_same_gradients(one, two):
    assert_close(two["hybrid"], one["gradients"]["gpt2-2"], 2e-4)


def test_the_same_tokens_are_sampled_on_any_number_of_ranks(one, two):
    """Also where ranks end at different lengths, and where there are fewer prompts than ranks; gathered or not."""
    assert one["sampling"] == two["sampling"]
    for name, tokens in one["sampling"].items():
        assert tokens == one["sampling"][name.replace("True", "False")]
    assert len({len(tokens) for tokens in one["sampling"]["gpt2-False-5"]}) > 1


def test_ranks_do_not_wait_for_each_other_in_a_rollout(one, two):
    assert_close(two["apart"], one["apart"], 2e-4)


def test_a_rollout_gathers_parameters_once(two):
    """As many all-gathers for 12 tokens as for 2."""
    short, long = two["gathers"]
    assert 0 < short == long


def test_rows_over_ranks_and_back(one, two, three):
    for found in (one, two, three):
        assert found["rows"] == [[row * 10 for row in range(count)] for count in (1, 2, 3, 5, 8)]


def test_scores_do_not_depend_on_ranks(one, two):
    assert_close(two["scores"], one["scores"], 1e-5)


def test_a_checkpoint_continues_to_the_last_bit_and_on_other_numbers_of_ranks(folder, one, two):
    """The worker asserts that what is read continues as what was written; here: 1 rank's on 2, and 2 ranks' on 1."""
    losses, _ = one["checkpoint"]
    assert_close(two["checkpoint"], [losses, losses], 1e-5)
    assert_close(launch(folder, 0, "checkpoint")["checkpoint"], [losses, losses], 1e-5)

"""The pure functions of ppo.py against plain-Python computations."""

import math

import pytest
import torch

import ppo


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def ragged(rows=5, width=7):
    """Row lengths, their mask (B, R), and a function that draws numbers of that shape, junk outside the mask too."""
    lengths = [1 + i % width for i in range(rows)]
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return lengths, mask, lambda: torch.randn(rows, width)


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_double_sum(gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, row by row without padding."""
    lengths, mask, draw = ragged()
    rewards, values = draw() * mask, draw() * mask
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for b, length in enumerate(lengths):
        r, v = rewards[b, :length].tolist(), values[b, :length].tolist() + [0.0]
        for t in range(length):
            delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(length)]
            expected = sum((gamma * lam) ** (i - t) * delta[i] for i in range(t, length))
            assert advantages[b, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[b, t].item() == pytest.approx(expected + v[t], abs=1e-5)
        assert not advantages[b, length:].any() and not returns[b, length:].any()


def test_gae_of_a_lone_score_reaches_every_token():
    """With gamma = lam = 1 and no value, each token's advantage is the score at the end."""
    _, mask, _ = ragged()
    rewards = ppo.token_rewards([1.0, 2.0, 3.0, 4.0, 5.0], torch.zeros(5, 7), mask, 0.0)
    advantages, _ = ppo.gae(rewards, torch.zeros(5, 7), mask, 1.0, 1.0)
    assert torch.equal(advantages, torch.arange(1.0, 6.0)[:, None] * mask)


def test_token_rewards_sum_to_score_minus_penalty_and_sit_on_the_last_real_token():
    lengths, mask, draw = ragged()
    kl, scores = draw(), [0.5, -1.0, 2.0, 0.0, 3.0]
    rewards = ppo.token_rewards(scores, kl, mask, 0.3)
    for b, length in enumerate(lengths):
        assert rewards[b].sum().item() == pytest.approx(scores[b] - 0.3 * kl[b, :length].sum().item(), abs=1e-5)
        assert rewards[b, length - 1].item() == pytest.approx(scores[b] - 0.3 * kl[b, length - 1].item(), abs=1e-6)
        assert not rewards[b, length:].any()


def test_dense_rewards_start_at_the_first_token():
    _, mask, _ = ragged()
    scores = [[1.0], [1.0, 2.0], [1.0], [0.0, 0.0, 0.0, 4.0], 7.0]
    rewards = ppo.token_rewards(scores, torch.zeros(5, 7), mask, 1.0)
    expected = torch.zeros(5, 7)
    expected[0, 0] = expected[2, 0] = 1
    expected[1, :2] = torch.tensor([1.0, 2.0])
    expected[3, 3], expected[4, 4] = 4, 7
    assert torch.equal(rewards, expected)


@pytest.mark.parametrize("shift", [True, False])
def test_whiten_uses_real_tokens_only(shift):
    lengths, mask, draw = ragged()
    x = draw() * 3 + 2
    flat = [x[b, t].item() for b, length in enumerate(lengths) for t in range(length)]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((value - mean) ** 2 for value in flat) / len(flat))
    out = ppo.whiten(x, mask, shift_mean=shift)
    expected = [(value - (mean if shift else 0)) / std for value in flat]
    assert out[mask].tolist() == pytest.approx(expected, abs=1e-4)
    assert not out[~mask].any()


def test_kl_estimators():
    """k1 and k3 agree with their formulas, and both average to the true KL over the policy's distribution."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    true = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist()))
    for estimator in ("k1", "k3"):
        assert (p * ppo.kl_penalty(p.log(), q.log(), estimator)).sum().item() == pytest.approx(true, abs=1e-6)
    assert (ppo.kl_penalty(torch.randn(99), torch.randn(99), "k3") >= 0).all()


def test_policy_loss_is_the_clipped_surrogate_summed_over_the_mask():
    lengths, mask, draw = ragged()
    new, old, advantages = draw(), draw(), draw()
    total = clipped_count = kl = 0.0
    for b, length in enumerate(lengths):
        for t in range(length):
            ratio, a = math.exp(new[b, t] - old[b, t]), advantages[b, t].item()
            clipped = min(max(ratio, 0.8), 1.2)
            total += -min(ratio * a, clipped * a)
            clipped_count += -clipped * a > -ratio * a
            kl += ratio - 1 - math.log(ratio)
    loss, sums = ppo.policy_loss(new, old, advantages, mask, 0.2)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert sums["policy/clipfrac"].item() == clipped_count
    assert sums["policy/approx_kl"].item() == pytest.approx(kl, rel=1e-4)


def test_policy_gradient_stops_where_clipped_and_is_the_advantage_where_not():
    """At ratio 1 the gradient is -A; beyond the clip range in the direction of A it is 0."""
    logprobs = torch.tensor([0.0, 0.5, -0.5, 0.5], requires_grad=True)
    advantages = torch.tensor([2.0, 1.0, -1.0, -1.0])
    ppo.policy_loss(logprobs, torch.zeros(4), advantages, torch.ones(4), 0.2)[0].backward()
    assert logprobs.grad.tolist() == pytest.approx([-2.0, 0.0, 0.0, math.exp(0.5)], abs=1e-6)


def test_value_loss():
    lengths, mask, draw = ragged()
    values, old, returns = draw(), draw(), draw()
    total = 0.0
    for b, length in enumerate(lengths):
        for t in range(length):
            v, o, r = values[b, t].item(), old[b, t].item(), returns[b, t].item()
            total += 0.5 * max((v - r) ** 2, (o + min(max(v - o, -0.2), 0.2) - r) ** 2)
    loss, _ = ppo.value_loss(values, old, returns, mask, 0.2)
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_losses_of_flat_and_padded_tensors_are_equal():
    _, mask, draw = ragged()
    a, b, c = draw(), draw(), draw()
    for loss in (ppo.policy_loss, ppo.value_loss):
        padded, flat = loss(a, b, c, mask, 0.2)[0], loss(a[mask], b[mask], c[mask], torch.ones(int(mask.sum())), 0.2)[0]
        assert padded.item() == pytest.approx(flat.item(), rel=1e-6)


def test_functions_leave_their_inputs_alone():
    _, mask, draw = ragged()
    a, b, c = draw(), draw(), draw()
    before = [tensor.clone() for tensor in (a, b, c, mask)]
    ppo.gae(a, b, mask, 0.9, 0.9)
    ppo.whiten(a, mask)
    ppo.token_rewards([1.0, [1.0, 2.0], 1.0, 1.0, 1.0], a, mask, 0.5)
    ppo.policy_loss(a, b, c, mask, 0.2)
    ppo.value_loss(a, b, c, mask, 0.2)
    assert all(torch.equal(x, y) for x, y in zip(before, (a, b, c, mask)))


def test_adaptive_kl_controller():
    assert ppo.adapt_kl_coef(0.1, 50.0, None, 128, 10000) == 0.1
    assert ppo.adapt_kl_coef(0.1, 60.0, 6.0, 128, 10000) == pytest.approx(0.1 * (1 + 0.2 * 128 / 10000))
    assert ppo.adapt_kl_coef(0.1, 0.0, 6.0, 128, 10000) == pytest.approx(0.1 * (1 - 0.2 * 128 / 10000))
    assert ppo.adapt_kl_coef(0.1, 6.6, 6.0, 128, 10000) == pytest.approx(0.1 * (1 + 0.1 * 128 / 10000))


def test_running_moments_are_those_of_all_values():
    values = torch.randn(50, dtype=torch.float64) * 3 + 5
    moments = (0, 0.0, 0.0)
    for part in values.split(7):
        moments = ppo.update_moments(moments, part)
    assert moments[0] == 50
    assert moments[1] == pytest.approx(values.mean().item())
    assert moments[2] / 49 == pytest.approx(values.var().item())


def shaped(raw, finished=None, moments=(0, 0.0, 0.0), **flags):
    return ppo.shape_scores(raw, finished or [True] * len(raw), moments, ppo.Args(**flags))


def test_scores_are_clipped_scaled_and_penalised():
    assert shaped([20.0, -20.0, 1.0])[0] == [10.0, -10.0, 1.0]
    assert shaped([20.0, -20.0], reward_clip=None)[0] == [20.0, -20.0]
    assert shaped([[3.0, -3.0], 2.0], reward_clip=1.0)[0] == [[1.0, -1.0], 1.0]
    assert shaped([1.0, 1.0, [1.0, 2.0]], [True, False, False], missing_eos_penalty=0.5)[0] == [1.0, 0.5, [1.0, 1.5]]
    assert shaped([4.0, 8.0], reward_scaling="reference", reference_std=2.0)[0] == pytest.approx([2.0, 4.0])


def test_running_scaling_follows_all_scores_and_reference_scaling_the_first():
    first, second = [1.0, 2.0, 3.0], [10.0, 20.0, 30.0]
    flags = dict(reward_clip=None, reward_scaling="running")
    scores, moments = shaped(first, **flags)
    assert scores == pytest.approx([value / torch.tensor(first).std().item() for value in first])
    scores, moments = shaped(second, moments=moments, **flags)
    assert scores == pytest.approx([value / torch.tensor(first + second).std().item() for value in second])
    flags["reward_scaling"] = "reference"
    scores, moments = shaped(first, **flags)
    scores, moments = shaped(second, moments=moments, **flags)
    assert scores == pytest.approx([value / torch.tensor(first).std().item() for value in second])
    assert shaped([[1.0, 1.0], 4.0], reward_clip=None, reward_scaling="running")[0][1] == pytest.approx(
        4.0 / torch.tensor([2.0, 4.0]).std().item()), "the moments are those of each sample's sum"


def test_learning_rate_schedules():
    def at(step, schedule="linear"):
        return ppo.learning_rate_at(step, 110, 2.0, 10, schedule)

    assert at(0) == pytest.approx(0.2) and at(9) == pytest.approx(2.0) and at(10) == pytest.approx(2.0)
    assert at(60) == pytest.approx(1.0) and at(110) == pytest.approx(0.0)
    assert at(60, "cosine") == pytest.approx(1.0) and at(35, "cosine") == pytest.approx(1 + math.cos(math.pi / 4))
    assert at(109, "constant") == 2.0
    assert ppo.learning_rate_at(0, 10, 2.0, 0, "linear") == 2.0


def test_explained_variance():
    mask = torch.tensor([[True, True, True, False]])
    returns = torch.tensor([[1.0, 2.0, 3.0, 99.0]])
    assert ppo.explained_variance(returns.clone(), returns, mask) == pytest.approx(1.0)
    assert ppo.explained_variance(torch.full((1, 4), 7.0), returns, mask) == pytest.approx(0.0, abs=1e-6)

"""Advantages of PPO against a loop in float64 that is written as the formula is."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r1kernels.train.gae import gae, whiten


def episode(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, term by term."""
    following = [*values, 0.0][1:]
    deltas = [r + gamma * after - v for r, after, v in zip(rewards, following, values, strict=True)]
    return [
        math.fsum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))
    ]


def inputs(rows: int, steps: int, seed: int, kind: str = "ends"):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(rows, steps, generator=generator, dtype=torch.float64) for _ in range(2))
    if kind == "ends":
        lengths = torch.randint(0, steps + 1, (rows, 1), generator=generator)
        mask = torch.arange(steps) < lengths
    else:
        mask = torch.rand(rows, steps, generator=generator) < 0.6
    return rewards, values, mask


@given(
    st.integers(1, 4), st.integers(1, 9), st.integers(0, 99), st.sampled_from(["ends", "holes"]),
    st.sampled_from([0.0, 0.5, 0.95, 1.0]), st.sampled_from([0.0, 0.9, 1.0]),
)
def test_against_the_formula(rows, steps, seed, kind, lam, gamma):
    rewards, values, mask = inputs(rows, steps, seed, kind)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row in range(rows):
        here = mask[row]
        expected = episode(rewards[row, here].tolist(), values[row, here].tolist(), gamma, lam)
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(advantages[row, here], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(returns[row, here], expected + values[row, here], rtol=1e-12, atol=1e-12)
        assert not advantages[row, ~here].any() and not returns[row, ~here].any()


def test_lambda_1_is_the_return_less_the_value_and_lambda_0_the_difference_of_one_step():
    rewards, values, mask = inputs(5, 7, 0)
    rewards, values = rewards * mask, values * mask
    for gamma in (1.0, 0.9):
        advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=1.0)
        discounts = gamma ** torch.arange(7, dtype=torch.float64)
        monte_carlo = torch.stack([(rewards[:, t:] * discounts[: 7 - t]).sum(-1) for t in range(7)], dim=1) * mask
        torch.testing.assert_close(returns, monte_carlo)
        torch.testing.assert_close(advantages, monte_carlo - values)
        one_step = rewards + gamma * torch.nn.functional.pad(values[:, 1:], (0, 1)) - values
        torch.testing.assert_close(gae(rewards, values, mask, gamma=gamma, lam=0.0)[0], one_step * mask)


def test_a_reward_at_the_end_fades_by_lambda_alone():
    rewards = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, True, False]])
    advantages, _ = gae(rewards, torch.zeros(1, 4), mask, gamma=1.0, lam=0.5)
    assert advantages.tolist() == [[0.25, 0.5, 1.0, 0.0]]


def test_an_episode_of_one_action():
    advantages, returns = gae(torch.tensor([[2.0]]), torch.tensor([[0.5]]), torch.tensor([[True]]), lam=0.3)
    assert (advantages.item(), returns.item()) == (1.5, 2.0)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nothing_behind_the_mask_matters(poison):
    rewards, values, mask = inputs(4, 6, 1)
    expected = gae(rewards, values, mask, lam=0.95)
    hidden = (tensor.masked_fill(~mask, poison) for tensor in (rewards, values))
    found = gae(*hidden, mask, lam=0.95)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(whiten(values.masked_fill(~mask, poison), mask), whiten(values, mask))


def test_nothing_at_all():
    for shape in ((0, 3), (2, 0)):
        empty = torch.zeros(shape)
        assert [part.shape for part in gae(empty, empty, empty.bool())] == [shape, shape]
    assert not whiten(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)).any()


def test_whitened_values_have_mean_0_and_deviation_1():
    _, values, mask = inputs(6, 8, 2)
    chosen = whiten(values * 3 + 7, mask)[mask]
    assert abs(chosen.mean().item()) < 1e-12
    assert chosen.std(correction=0).item() == pytest.approx(1)
    assert not whiten(torch.full((2, 3), 0.1), torch.ones(2, 3, dtype=torch.bool)).any()


def test_what_cannot_be_used_is_named():
    ones, mask = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"lam is 1.5, expected a number from 0 to 1"):
        gae(ones, ones, mask, lam=1.5)
    with pytest.raises(ValueError, match=r"gamma is nan"):
        gae(ones, ones, mask, gamma=math.nan)
    with pytest.raises(ValueError, match=r"values has shape \(2,\)"):
        gae(ones, ones[:, 0], mask)
    with pytest.raises(ValueError, match=r"mask has dtype torch.float32"):
        gae(ones, ones, ones)

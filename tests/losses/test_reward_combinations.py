"""Advantages of several rewards (GDPO) and of the best of k answers (pass@k): oracles, exact zeros, bad input."""

import math
from typing import Any

import pytest
import torch
from backends import host_code
from torch import Tensor
from torch._subclasses import FakeTensorMode

from r1kernels import backend, group_advantages, multi_reward_advantages, pass_at_k_advantages, testing

pytestmark = host_code
EPS64 = torch.finfo(torch.float64).eps


def groups(count: int, holes: float = 0.2) -> tuple[Tensor, Tensor]:
    """Rewards with ties, some unscorable, and ids of uneven groups, one of a single answer."""
    rewards = torch.randn(count, generator=testing.generator(0)).round(decimals=1)
    rewards[torch.rand(count, generator=testing.generator(1)) < holes] = math.nan
    group_ids = torch.randint(-2, 4, (count,), generator=testing.generator(2)) * 10**12
    group_ids[3] = 7
    return rewards, group_ids


def check(advantages: Tensor, exact: Tensor, spread: float = 1.0) -> None:
    """Within one rounding to float32, and some of float64 on numbers of size `spread`."""
    testing.assert_within(advantages, exact, testing.rounding(exact, torch.float32) + 1e4 * EPS64 * spread)


# ---- several rewards ----

def several(count: int = 40) -> tuple[Tensor, Tensor]:
    rewards, group_ids = groups(3 * count)
    rewards = rewards.reshape(count, 3) * torch.tensor([1.0, 100.0, 0.01])
    rewards[4] = math.nan  # an unscorable answer
    return rewards, group_ids[:count]


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5], [0, 1, -1]])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("eps", [1e-6, 1e-4])
def test_several_rewards(weights: list[float] | None, ddof: int, eps: float) -> None:
    rewards, group_ids = several()
    exact = testing.multi_reward_advantages(rewards, group_ids, weights or [1.0] * 3, ddof, eps)
    advantages = multi_reward_advantages(rewards, group_ids=group_ids, weights=weights, ddof=ddof, eps=eps)
    check(advantages, exact, 1 / eps)
    assert advantages.dtype == torch.float32 and advantages[4] == 0 and not advantages.requires_grad
    if weights:
        given = torch.tensor(weights, dtype=torch.float64)
        same = multi_reward_advantages(rewards, group_ids=group_ids, weights=given, ddof=ddof, eps=eps)
        assert torch.equal(same, advantages)


def test_groups_of_equal_size_and_a_cube() -> None:
    rewards = several()[0]
    exact = testing.multi_reward_advantages(rewards, torch.arange(40) // 8, [1.0] * 3)
    flat = multi_reward_advantages(rewards, 8)
    check(flat, exact, 1e4)
    assert torch.equal(multi_reward_advantages(rewards.view(5, 8, 3)), flat.view(5, 8))
    assert multi_reward_advantages(rewards.double(), 8).dtype == torch.float64


def test_one_reward_is_normalised_twice() -> None:
    rewards = torch.rand(12, generator=testing.generator(0), dtype=torch.float64)
    with backend("reference"):
        twice = group_advantages(group_advantages(rewards, 4), 12)
    torch.testing.assert_close(multi_reward_advantages(rewards[:, None], 4), twice)


def test_a_large_reward_does_not_drown_a_small_one() -> None:
    rewards = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1000.0, 0.0], [1000.0, 1.0]])
    advantages = multi_reward_advantages(rewards, 4, eps=0.0)
    assert advantages[1] == pytest.approx(0, abs=1e-6) and advantages[3] == pytest.approx(-advantages[0].item())


@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_equal_rewards_in_all_groups_are_exactly_zero(eps: float) -> None:
    rewards = torch.tensor([[0.1, 0.7], [0.3, 1 / 3]]).repeat_interleave(7, 0)
    rewards[3, 0] = math.nan
    assert not multi_reward_advantages(rewards, 7, eps=eps).any()
    assert not multi_reward_advantages(torch.full((4, 2), math.nan), 2, eps=eps).any()


@pytest.mark.parametrize(("arguments", "keywords", "error", "message"), [
    (([[1.0]], 1), {}, TypeError, "rewards is a list"),
    ((torch.ones(4), 2), {}, ValueError, r"rewards has shape \(4,\), expected \(B, K\)"),
    ((torch.ones(2, 2, 2), 2), {}, ValueError, r"rewards has shape \(2, 2, 2\), expected \(B, K\), or \(P, G, K\)"),
    ((torch.ones(4, 2), 3), {}, ValueError, "group_size is 3, expected a positive integer that divides the 4"),
    ((torch.ones(4, 2),), {}, ValueError, "neither of group_size and group_ids"),
    ((torch.ones(4, 2), 2), {"weights": [1.0]}, ValueError, "weights has 1 numbers, expected 2"),
    ((torch.ones(4, 2), 2), {"weights": [1.0, math.nan]}, ValueError, r"weights\[1\] is nan, expected a finite"),
    ((torch.ones(4, 2), 2), {"weights": 1.0}, TypeError, "weights is a float, expected numbers"),
    ((torch.ones(4, 2), 2), {"weights": torch.ones(3)}, ValueError, r"weights has shape \(3,\), expected \(2,\)"),
    ((torch.ones(4, 2), 2), {"ddof": 2}, ValueError, "ddof is 2, expected 0 or 1"),
    ((torch.ones(4, 2), 2), {"ddof": True}, ValueError, "ddof is True, expected 0 or 1"),
    ((torch.ones(4, 2), 2), {"weights": torch.tensor([1, math.nan])}, ValueError, r"weights is \[1.0, nan\]"),
    ((torch.ones(4, 2), 2), {"eps": -1.0}, ValueError, "eps is -1.0, expected a finite number >= 0"),
    ((torch.full((4, 2), math.inf), 2), {}, ValueError, r"rewards\[0\] is inf, expected a finite number, or NaN"),
])
def test_bad_several(arguments: Any, keywords: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        multi_reward_advantages(*arguments, **keywords)


# ---- the best of k answers ----

@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 10])
@pytest.mark.parametrize("eps", [1e-6, 1e-4])
def test_the_best_of_all_subsets(k: int, eps: float) -> None:
    rewards, group_ids = groups(48)
    advantages = pass_at_k_advantages(rewards, k, group_ids=group_ids, eps=eps)
    check(advantages, testing.pass_at_k_advantages(rewards, group_ids, k, eps), 1 / eps)
    assert advantages.dtype == torch.float32 and not advantages[rewards.isnan()].any() and advantages[3] == 0
    assert advantages.any() == (k < 9)


def test_groups_of_equal_size_do_not_meet() -> None:
    rewards = groups(48)[0] * torch.logspace(-6, 6, 4).repeat_interleave(12)
    whole = pass_at_k_advantages(rewards, 4, 12)
    check(whole, testing.pass_at_k_advantages(rewards, torch.arange(48) // 12, 4), 1e4)
    for part, alone in zip(rewards.split(12), whole.split(12), strict=True):
        assert torch.equal(pass_at_k_advantages(part, 4, 12), alone)
    assert torch.equal(pass_at_k_advantages(rewards.view(4, 12), 4), whole.view(4, 12))
    order = torch.randperm(48, generator=testing.generator(3))
    ids = torch.arange(48) // 12
    shuffled = pass_at_k_advantages(rewards[order], 4, group_ids=ids[order].int())
    torch.testing.assert_close(shuffled, whole[order], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("right", "size", "k"), [(1, 8, 2), (3, 8, 4), (5, 32, 8), (100, 1000, 8), (7, 1000, 500)])
def test_the_closed_formulas_of_right_and_wrong_answers(right: int, size: int, k: int) -> None:
    """arXiv 2508.10751: (1 - R) / s, and (1 - R - C(wrong - 1, k - 1) / C(n - 1, k - 1)) / s."""
    rewards = (torch.arange(size) < right).float()
    wrong = size - right
    rate = 1 - math.comb(wrong, k) / math.comb(size, k)
    std = math.sqrt(rate * (1 - rate))
    advantages = pass_at_k_advantages(rewards, k, size, eps=0.0)
    assert len(advantages[:right].unique()) == len(advantages[right:].unique()) == 1  # equal rewards: the same bits
    assert advantages[0].item() == pytest.approx((1 - rate) / std, rel=1e-6)
    of_wrong = (1 - rate - math.comb(wrong - 1, k - 1) / math.comb(size - 1, k - 1)) / std
    assert advantages[-1].item() == pytest.approx(of_wrong, rel=1e-6)


def test_equal_rewards_have_the_same_bits_and_an_offset_changes_none() -> None:
    values = torch.randint(6, (60,), generator=testing.generator(0)).double() / 8
    found = pass_at_k_advantages(values, 3, 20)
    assert torch.equal(pass_at_k_advantages(values + 2**40, 3, 20), found)
    for rewards, advantages in zip(values.split(20), found.split(20), strict=True):
        for value in rewards.unique():
            assert len(advantages[rewards == value].unique()) == 1


def test_one_answer_at_a_time_gives_group_advantages() -> None:
    rewards, group_ids = groups(48)
    expected = group_advantages(rewards, group_ids=group_ids, ddof=0)
    torch.testing.assert_close(pass_at_k_advantages(rewards, 1, group_ids=group_ids), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_subsets_with_the_same_best_reward_are_exactly_zero(eps: float) -> None:
    assert not pass_at_k_advantages(torch.full((7,), 0.1), 3, 7, eps=eps).any()
    few_wrong = torch.tensor([0.1, 0.3, 0.7, 0.7, 0.7, 0.7, 0.7])  # 3 of them have a 0.7 in any case
    assert not pass_at_k_advantages(few_wrong, 3, 7, eps=eps).any()
    assert pass_at_k_advantages(few_wrong, 2, 7, eps=eps).any()
    too_few = torch.tensor([0.1, math.nan, math.nan, 0.7])
    assert not pass_at_k_advantages(too_few, 2, 4, eps=eps).any()
    assert not pass_at_k_advantages(torch.full((4,), math.nan), 2, 4, eps=eps).any()


def test_dtypes_fakes_and_no_answers() -> None:
    rewards = groups(12)[0]
    assert pass_at_k_advantages(rewards.double(), 2, 4).dtype == torch.float64
    rounded = rewards.bfloat16()
    assert torch.equal(pass_at_k_advantages(rounded, 2, 4), pass_at_k_advantages(rounded.float(), 2, 4))
    none = torch.empty(0, dtype=torch.int64)
    assert pass_at_k_advantages(torch.empty(0), 2, group_ids=none).shape == (0,)
    assert multi_reward_advantages(torch.empty(0, 2), group_ids=none).shape == (0,)
    with FakeTensorMode():
        rewards, ids = torch.empty(12), torch.empty(12, dtype=torch.int64)
        for fake in (pass_at_k_advantages(rewards, 2, group_ids=ids), multi_reward_advantages(rewards[:, None], 4)):
            assert (fake.shape, fake.dtype) == ((12,), torch.float32)


def test_both_compile_fullgraph() -> None:
    rewards, group_ids = groups(24)
    compiled = testing.compiled(lambda r, i: pass_at_k_advantages(r, 2, group_ids=i))(rewards, group_ids)
    torch.testing.assert_close(compiled, pass_at_k_advantages(rewards, 2, group_ids=group_ids))
    compiled = testing.compiled(lambda r, i: multi_reward_advantages(r, group_ids=i))(rewards[:, None], group_ids)
    torch.testing.assert_close(compiled, multi_reward_advantages(rewards[:, None], group_ids=group_ids))


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (([1.0], 1, 2), TypeError, "rewards is a list"),
    ((torch.ones(4), 0, 2), ValueError, "k is 0, expected an integer >= 1 and < group_size = 2"),
    ((torch.ones(4), 2, 2), ValueError, "k is 2, expected an integer >= 1 and < group_size = 2"),
    ((torch.ones(4), 1.0, 2), ValueError, "k is 1.0, expected an integer"),
    ((torch.ones(4), True, 2), ValueError, "k is True, expected an integer"),
    ((torch.ones(2, 2), 1, 2), ValueError, r"rewards has shape \(2, 2\), expected \(B,\)"),
    ((torch.ones(4), 3, None, torch.tensor([0, 1, 0, 0])), ValueError, "k is 3, expected fewer than the 3 answers of"),
    ((torch.ones(4), 1), ValueError, "neither of group_size and group_ids"),
    ((torch.full((4,), -math.inf), 1, 4), ValueError, r"rewards\[0\] is -inf, expected a finite number"),
])
def test_bad_best_of_k(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pass_at_k_advantages(*arguments[:3], group_ids=arguments[3] if len(arguments) > 3 else None)

"""Group-relative advantages: exact-fraction oracle, exact zeros, uneven groups, unscorable answers, bad input."""

import itertools
import math
from typing import Any

import pytest
import torch
from backends import checks_only, compiles, host_code, reference_only, registration_only, shapes_only
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from r1kernels import backend, group_advantages, testing

SCALES = ["group_std", "batch_std", "none"]
# The rewards whose fp32 mean is not themselves: others turn that rounding into advantages of up to 1.
AWKWARD = [0.1, 0.2, 0.3, 0.7, 0.9, 1.1, 1 / 3, 2 / 3, 1e-8, 123456.789, -0.1, 16777217.0]


def check(rewards: Tensor, group_ids: Tensor, advantages: Tensor, **keywords: Any) -> None:
    exact = testing.group_advantages(rewards, group_ids, **keywords)
    # Arithmetic is float64 inside: a centred reward may be off by an ulp of the rewards, the rest by its rounding.
    centring = 4 * torch.finfo(torch.float64).eps * rewards.double().nan_to_num().abs().amax(0, keepdim=True)
    relative = 8 * torch.finfo(torch.float64).eps + torch.finfo(torch.float32).eps / 2
    eps = keywords.get("eps", 1e-4) if keywords.get("scale") != "none" else 1
    testing.assert_within(advantages, exact, relative * exact.abs() + centring / max(eps, 1e-6))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_groups_of_equal_size(scale: str, ddof: int, eps: float, implementation: str) -> None:
    rewards = torch.randn(48, generator=testing.generator(0))
    for group_size in (1, 2, 3, 16, 48):
        advantages = group_advantages(rewards, group_size, scale=scale, ddof=ddof, eps=eps)
        groups = torch.arange(48) // group_size
        check(rewards, groups, advantages, scale=scale, ddof=ddof, eps=eps)
        assert advantages.dtype == torch.float32 and not advantages.requires_grad


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("ddof", [0, 1])
def test_uneven_unsorted_groups_with_unscorable_answers(scale: str, ddof: int, implementation: str) -> None:
    rewards = torch.randn(60, generator=testing.generator(0)).round(decimals=1)
    rewards[torch.rand(60, generator=testing.generator(1)) < 0.2] = math.nan
    group_ids = torch.randint(-3, 9, (60,), generator=testing.generator(2)) * 10**12
    rewards[group_ids == group_ids[0]] = math.nan  # a group of which nothing could be scored
    advantages = group_advantages(rewards, group_ids=group_ids, scale=scale, ddof=ddof)
    check(rewards, group_ids, advantages, scale=scale, ddof=ddof)
    assert not advantages[rewards.isnan()].any()


@pytest.mark.parametrize("reward", AWKWARD)
@pytest.mark.parametrize("eps", [0.0, 1e-9, 1e-4])
def test_a_constant_group_is_exactly_zero(reward: float, eps: float, implementation: str) -> None:
    sizes = (1, 2, 3, 7, 8, 16, 64) if testing.KERNELS == "cpu" else (1, 3, 64)
    for scale, ddof, size in itertools.product(SCALES, (0, 1), sizes):
        rewards = torch.cat([torch.full((size,), reward), torch.arange(size) / 3])
        advantages = group_advantages(rewards, size, scale=scale, ddof=ddof, eps=eps)
        assert not advantages[:size].any()
        assert advantages.isfinite().all()


@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_a_constant_group_with_unscorable_answers_is_exactly_zero(eps: float, implementation: str) -> None:
    rewards = torch.tensor([0.1, math.nan, 0.1, 0.1, math.nan, math.nan, 0.7, math.nan])
    assert not group_advantages(rewards, 4, eps=eps).any()


@given(
    rewards=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=24),
    groups=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_order_does_not_matter_and_groups_do_not_meet(rewards: list[float], groups: int, seed: int) -> None:
    values = torch.tensor(rewards)
    group_ids = torch.randint(groups, values.shape, generator=testing.generator(seed))
    advantages = group_advantages(values, group_ids=group_ids)
    order = torch.randperm(len(values), generator=testing.generator(seed + 1))
    shuffled = group_advantages(values[order], group_ids=group_ids[order])
    torch.testing.assert_close(shuffled, advantages[order], rtol=1e-6, atol=0)
    for group in group_ids.unique():
        members = group_ids == group
        alone = group_advantages(values[members], int(members.sum()))
        assert torch.equal(alone, advantages[members])
        if (values[members] == values[members][0]).all():
            assert not alone.any()


def test_a_matrix_is_one_group_per_row(implementation: str) -> None:
    rewards = torch.randn(3, 8)
    advantages = group_advantages(rewards)
    assert advantages.shape == (3, 8)
    assert torch.equal(advantages.flatten(), group_advantages(rewards.flatten(), 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_dtypes_and_strides(dtype: torch.dtype, ids_dtype: torch.dtype, implementation: str) -> None:
    rewards = torch.randn(12, generator=testing.generator(0)).to(dtype).repeat_interleave(2)[::2]
    group_ids = torch.arange(12).to(ids_dtype).repeat_interleave(2)[::2] % 3
    advantages = group_advantages(rewards, group_ids=group_ids)
    assert advantages.dtype == torch.float32
    check(rewards.float(), group_ids, advantages)


@reference_only
def test_float64_stays_float64() -> None:
    rewards = torch.randn(6, dtype=torch.float64)
    with backend("reference"):
        advantages = group_advantages(rewards, 3, eps=0.0)
    exact = testing.group_advantages(rewards, torch.arange(6) // 3, eps=0.0)
    torch.testing.assert_close(advantages, exact, rtol=1e-13, atol=1e-13)


# ---- other baselines: plain PyTorch on any device ----

BASELINES = ["leave_one_out", "length_weighted"]


def given_lengths(baseline: str, count: int) -> dict[str, Tensor]:
    """Lengths from 0 on, if the baseline needs them."""
    if baseline != "length_weighted":
        return {}
    return {"lengths": torch.randint(9, (count,), generator=testing.generator(7))}


@host_code
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("ddof", [0, 1])
def test_baselines_of_uneven_groups_with_unscorable_answers(baseline: str, scale: str, ddof: int) -> None:
    rewards = torch.randn(60, generator=testing.generator(0)).round(decimals=1)
    rewards[torch.rand(60, generator=testing.generator(1)) < 0.2] = math.nan
    group_ids = torch.randint(-3, 9, (60,), generator=testing.generator(2)) * 10**12
    group_ids[5] = 7  # a group of one answer
    keywords = {"baseline": baseline, "scale": scale, "ddof": ddof, **given_lengths(baseline, 60)}
    advantages = group_advantages(rewards, group_ids=group_ids, **keywords)
    check(rewards, group_ids, advantages, **keywords)
    assert advantages.dtype == torch.float32 and not advantages[rewards.isnan()].any() and advantages[5] == 0
    order = group_ids.argsort(stable=True)
    keywords |= {name: value[order] for name, value in given_lengths(baseline, 60).items()}
    assert torch.equal(group_advantages(rewards[order], group_ids=group_ids[order], **keywords), advantages[order])


@host_code
def test_baselines_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 3.0])
    alone = group_advantages(rewards, 4, baseline="leave_one_out", scale="none")
    assert alone.tolist() == [0.0, pytest.approx(-4 / 3), pytest.approx(-4 / 3), pytest.approx(8 / 3)]
    fractions = torch.tensor([1, 2, 3, 4], dtype=torch.float64) / 20  # together below 1, as a share may be
    for lengths in (torch.tensor([1, 2, 3, 4]), fractions):
        by_length = group_advantages(rewards, 4, baseline="length_weighted", lengths=lengths, scale="none")
        assert by_length.tolist() == pytest.approx([-0.3, -1.3, -1.3, 1.7])
    assert group_advantages(rewards.double(), 4, baseline="leave_one_out").dtype == torch.float64
    matrix = group_advantages(rewards.view(2, 2), baseline="length_weighted", lengths=torch.ones(2, 2), scale="none")
    assert matrix.tolist() == [[0.5, -0.5], [-1.5, 1.5]]


@host_code
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("reward", AWKWARD)
def test_a_constant_group_is_exactly_zero_with_every_baseline(baseline: str, reward: float) -> None:
    for scale, size in itertools.product(SCALES, (1, 2, 3, 7, 64)):
        rewards = torch.cat([torch.full((size,), reward), torch.arange(size) / 3])
        lengths = {name: value + 1 for name, value in given_lengths(baseline, 2 * size).items()}
        advantages = group_advantages(rewards, size, scale=scale, eps=0.0, baseline=baseline, **lengths)
        assert not advantages[:size].any() and advantages.isfinite().all()
        double = torch.full((size,), reward, dtype=torch.float64)  # sums of these are rounded
        lengths = {name: value[:size] for name, value in lengths.items()}
        assert not group_advantages(double, size, scale=scale, eps=0.0, baseline=baseline, **lengths).any()


@host_code
def test_the_length_of_an_unscorable_answer_does_not_matter() -> None:
    rewards = torch.tensor([1.0, math.nan, 0.0, 2.0])
    expected = group_advantages(rewards, 4, baseline="length_weighted", lengths=torch.tensor([1.0, 5.0, 2.0, 3.0]))
    for length in (math.nan, math.inf, -1.0):
        lengths = torch.tensor([1.0, length, 2.0, 3.0])
        assert torch.equal(group_advantages(rewards, 4, baseline="length_weighted", lengths=lengths), expected)


@compiles
@host_code
@pytest.mark.parametrize("baseline", BASELINES)
def test_baselines_compile_fullgraph(baseline: str) -> None:
    rewards, ids, lengths = torch.randn(12), torch.arange(12) % 5, given_lengths(baseline, 12)

    def run(rewards: Tensor, ids: Tensor) -> Tensor:
        return group_advantages(rewards, group_ids=ids, baseline=baseline, **lengths)

    torch.testing.assert_close(testing.compiled(run)(rewards, ids), run(rewards, ids))


@pytest.mark.parametrize("arguments", [{"group_size": 4}, {"group_ids": torch.empty(0, dtype=torch.int64)}])
def test_no_rewards(arguments: dict[str, Any], implementation: str) -> None:
    assert group_advantages(torch.empty(0), **arguments).shape == (0,)


def test_all_unscorable(implementation: str) -> None:
    for scale in SCALES:
        assert not group_advantages(torch.full((6,), math.nan), 3, scale=scale).any()


@registration_only
@pytest.mark.parametrize("group_ids", [None, torch.tensor([3, 1, 3, 1, 3, 3])])
def test_opcheck(group_ids: Tensor | None) -> None:
    torch.library.opcheck(torch.ops.r1kernels.group_advantages, (torch.randn(6), group_ids, 3, 0, 1, 1e-4))


@compiles
def test_compile_fullgraph() -> None:
    rewards = torch.randn(12)
    with backend(testing.KERNELS):
        assert torch.equal(testing.compiled(group_advantages)(rewards, 4), group_advantages(rewards, 4))
        ids = torch.arange(12) % 5
        compiled = testing.compiled(lambda r, i: group_advantages(r, group_ids=i))(rewards, ids)
        assert torch.equal(compiled, group_advantages(rewards, group_ids=ids))


@shapes_only
@pytest.mark.parametrize("device", ["cpu", "meta", "cuda"])
def test_fakes(device: str) -> None:
    with FakeTensorMode():
        rewards = torch.empty(12, device=device, dtype=torch.bfloat16)
        ids = torch.zeros(12, device=device, dtype=torch.int64)
        for advantages in (group_advantages(rewards, 4), group_advantages(rewards, group_ids=ids)):
            assert (advantages.shape, advantages.dtype, advantages.device.type) == ((12,), torch.float32, device)


TEN = torch.zeros(10)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], 1), TypeError, "rewards is a list, expected a torch.Tensor"),
        ((TEN.long(), 5), TypeError, "rewards has dtype torch.int64, expected float32"),
        ((TEN.reshape(1, 2, 5), 5), ValueError, r"rewards has shape \(1, 2, 5\), expected \(B,\)"),
        ((TEN.reshape(2, 5), 5), ValueError, r"rewards has shape \(2, 5\), expected \(B,\)"),
        ((TEN, 3), ValueError, "group_size is 3, expected a positive integer that divides the 10 rewards"),
        ((TEN, 0), ValueError, "group_size is 0, expected a positive integer"),
        ((TEN, -5), ValueError, "group_size is -5, expected a positive integer"),
        ((TEN, 2.5), ValueError, "group_size is 2.5, expected a positive integer"),
        ((TEN, True), ValueError, "group_size is True, expected a positive integer"),
        ((TEN,), ValueError, "neither of group_size and group_ids given, expected exactly one"),
    ],
)
def test_bad_groups(arguments: tuple[Any, ...], error: type[Exception], message: str, implementation: str) -> None:
    with pytest.raises(error, match=message):
        group_advantages(*arguments)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"group_size": 5, "group_ids": TEN.long()}, ValueError, "both of group_size and group_ids given"),
        ({"group_ids": TEN.long()[:9]}, ValueError, r"group_ids has shape \(9,\), expected \(10,\)"),
        ({"group_ids": TEN}, TypeError, "group_ids has dtype torch.float32, expected int64 or int32"),
        ({"group_ids": TEN.long().to("meta")}, ValueError, "group_ids is on meta, expected cpu"),
        ({"group_size": 5, "scale": "std"}, ValueError, "scale is 'std', expected one of group_std, batch_std, none"),
        ({"group_size": 5, "baseline": "rloo"}, ValueError, "baseline is 'rloo', expected one of mean, leave_one_out"),
        ({"group_size": 5, "baseline": "length_weighted"}, ValueError, "lengths is None with the baseline 'length_"),
        ({"group_size": 5, "lengths": TEN}, ValueError, "lengths is given with the baseline 'mean', expected None"),
        ({"group_size": 5, "baseline": "length_weighted", "lengths": TEN[:9]}, ValueError, r"lengths has shape \(9,\)"),
        ({"group_size": 5, "baseline": "length_weighted", "lengths": TEN - 2}, ValueError, r"lengths\[0\] is -2.0, "),
        ({"group_size": 5, "baseline": "length_weighted", "lengths": [1] * 10}, TypeError, "lengths is a list"),
        ({"group_size": 5, "baseline": "length_weighted", "lengths": TEN.bool()}, TypeError, "lengths has dtype torch"),
        ({"group_size": 5, "ddof": 2}, ValueError, "ddof is 2, expected 0 or 1"),
        ({"group_size": 5, "ddof": 1.0}, ValueError, "ddof is 1.0, expected 0 or 1"),
        ({"group_size": 5, "ddof": True}, ValueError, "ddof is True, expected 0 or 1"),
        ({"group_size": 5, "eps": -1e-4}, ValueError, r"eps is -0\.0001, expected a finite number >= 0"),
        ({"group_size": 5, "eps": math.nan}, ValueError, "eps is nan, expected a finite number >= 0"),
    ],
)
def test_bad_keywords(keywords: dict[str, Any], error: type[Exception], message: str, implementation: str) -> None:
    with pytest.raises(error, match=message):
        group_advantages(TEN, **keywords)


@checks_only
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_reward_is_refused(value: float, implementation: str) -> None:
    rewards = TEN.clone()
    rewards[3] = value
    with pytest.raises(ValueError, match=rf"rewards\[3\] is {value}, expected a finite number, or NaN"):
        group_advantages(rewards, 5)

"""csrc/common/objective.h on the host, against float64: losses of a token and their slopes.

An exponential is taken to be within two roundings; a sum or product is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import host_module
import numpy as np
import pytest
from backends import host_code
from common_cases import LEAST, U, within

pytestmark = host_code

CLIP, CISPO, SAPO, REINFORCE = range(4)
INF = np.inf
# (clip_low, clip_high, ratio_cap, tau_pos, tau_neg)
SETTINGS = {
    "grpo": (0.2, 0.2, INF, 1, 1), "dapo, two-sided": (0.2, 0.28, 3, 1, 1), "r1": (10, 10, INF, 1, 1),
    "gspo": (3e-4, 4e-4, INF, 1, 1), "cispo": (1, 4, INF, 1, 1), "sapo": (0, 0, INF, 1, 1.05),
}


@pytest.fixture(params=host_module.variants())
def host(request: pytest.FixtureRequest) -> ModuleType:
    return host_module.common()[request.param]


@contextmanager
def overflow() -> Iterator[None]:
    with np.errstate(over="ignore", invalid="ignore"):
        yield


def tokens(count: int = 20_000) -> tuple[np.ndarray, ...]:
    """Log-ratios near 0, far from it and of what overflows; advantages of both signs; log-probs."""
    rng = np.random.default_rng(0)
    size = np.float32(10.0) ** rng.integers(-4, 4, count)
    log_ratio = np.float32(rng.normal(0, 1, count) * size)
    log_ratio[:4] = 1000, -1000, 88.5, -100
    return log_ratio, np.float32(rng.normal(0, 2, count)), -np.float32(rng.exponential(3, count))


def ratios(log_ratio: np.ndarray) -> np.ndarray:
    """Infinite where float32 is."""
    with overflow():
        ratio = np.exp(log_ratio.astype(np.float64))
    return np.where(ratio > np.finfo(np.float32).max, INF, ratio)


def bounds_of(setting: str) -> tuple[np.float32, ...]:
    """1 - clip_low, 1 + clip_high and the cap as float32 has them."""
    low, high, cap = (np.float32(value) for value in SETTINGS[setting][:3])
    return np.float32(1) - low, np.float32(1) + high, cap


def undecided(ratio: np.ndarray, *bounds: float) -> np.ndarray:
    """Where the roundings of the ratio decide on which side of a bound it lies."""
    with overflow():
        return np.any([np.abs(ratio - bound) <= 2 * U * ratio for bound in bounds if np.isfinite(bound)], axis=0)


def clipped_surrogate(setting: str, ratio: np.ndarray, advantage: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(-min(r A, clip(r) A), whether the gradient flows); where A < 0 the cap holds r."""
    low, high, cap = (float(bound) for bound in bounds_of(setting))
    with overflow():
        free = np.where(advantage > 0, ratio, np.minimum(ratio, cap)) * advantage
        bound = np.clip(ratio, low, high) * advantage
        return -np.minimum(free, bound), (free <= bound) & ((ratio <= cap) | (advantage > 0))


@pytest.mark.parametrize("setting", ["grpo", "dapo, two-sided", "r1", "gspo"])
def test_clipped_surrogates(host: ModuleType, setting: str) -> None:
    log_ratio, advantage, logprob = tokens()
    found = host.Objective(CLIP, *SETTINGS[setting]).surrogate_term(log_ratio, advantage, logprob)
    ratio, a = ratios(log_ratio), advantage.astype(np.float64)
    low, high, cap = bounds_of(setting)
    sure = ~undecided(ratio, low, high, cap)
    assert sure.mean() > 0.9
    loss, flows = clipped_surrogate(setting, ratio, a)
    slope = np.where(flows, loss, 0)
    with overflow():
        loss, slope = np.float32(loss).astype(float), np.float32(slope).astype(float)  # what overflows, does
    of_ratio = LEAST * (1 + np.abs(a))
    within(found["loss"][sure], loss[sure], (4 * U * np.abs(loss) + of_ratio)[sure])
    within(found["slope"][sure], slope[sure], (4 * U * np.abs(slope) + of_ratio)[sure])
    reasons = [((a > 0) & (ratio > high)), (a < 0) & (ratio < low), (a < 0) & (ratio >= low) & (ratio > cap)]
    for name, expected in zip(("clipped_high", "clipped_low", "capped"), reasons, strict=True):
        assert (found[name] == expected)[sure].all(), name
        assert (found["slope"][found[name]] == 0).all() and np.isfinite(found["loss"][found[name]]).all()


def test_on_a_bound_the_gradient_flows(host: ModuleType) -> None:
    objective = host.Objective(CLIP, *SETTINGS["dapo, two-sided"])
    low, high, cap = bounds_of("dapo, two-sided")
    up, down = np.float32(INF), np.float32(-INF)
    ratio = np.float32([high, np.nextafter(high, up), low, np.nextafter(low, down), cap, np.nextafter(cap, up), 1])
    advantage = np.float32([1.5, 1.5, -1.5, -1.5, -1.5, -1.5, -1.5])
    found = objective.clip_term(ratio, advantage)
    held = np.float32([high, high, low, low, cap, cap, 1])
    np.testing.assert_array_equal(found["loss"], -held * advantage)
    np.testing.assert_array_equal(found["slope"], np.where([1, 0, 1, 0, 1, 0, 1], -ratio * advantage, 0))
    assert found["clipped_high"].tolist() == [0, 1, 0, 0, 0, 0, 0]
    assert found["clipped_low"].tolist() == [0, 0, 0, 1, 0, 0, 0]
    assert found["capped"].tolist() == [0, 0, 0, 0, 0, 1, 0]
    bound = np.float32(5)
    found = host.Objective(CISPO, *SETTINGS["cispo"]).cispo_term([bound, np.nextafter(bound, up)], 1, -2)
    assert found["clipped_high"].tolist() == [0, 1] and (found["loss"] == 10).all() and (found["slope"] == -5).all()


@pytest.mark.parametrize("surrogate, setting", [(CLIP, "grpo"), (CLIP, "r1"), (CISPO, "cispo"), (SAPO, "sapo")])
def test_ratios_that_overflow(host: ModuleType, surrogate: int, setting: str) -> None:
    """Clipped, the loss is finite and the slope 0 (CISPO's: its bound); not clipped, both are infinite."""
    objective = host.Objective(surrogate, *SETTINGS[setting])
    found = objective.surrogate_term(np.float32([1000, INF]), np.float32([[1.5], [-1.5]]), -2.0)
    high = float(bounds_of(setting)[1])
    loss, slope = {
        CLIP: ([-high * 1.5, INF], [0, INF]), CISPO: ([high * 3, -high * 3], [-high * 1.5, high * 1.5]),
        SAPO: ([-6, 6 / np.float32(1.05)], [0, 0]),
    }[surrogate]
    within(found["loss"], np.array(loss)[:, None], 4 * U * 15 * (1 + high))
    within(found["slope"], np.array(slope)[:, None], 2 * U * 1.5 * high if surrogate == CISPO else 0)


@pytest.mark.parametrize("surrogate, setting", [(CLIP, "dapo, two-sided"), (CISPO, "cispo"), (SAPO, "sapo"),
                                                (REINFORCE, "grpo")])
def test_no_advantage_is_nothing_whatever_the_rest(host: ModuleType, surrogate: int, setting: str) -> None:
    anything = np.float32([0, 1000, -1000, INF, -INF, np.nan])
    objective = host.Objective(surrogate, *SETTINGS[setting])
    for logprob in anything:
        found = objective.surrogate_term(anything, np.float32([[0.0], [-0.0]]), logprob)
        assert not any(found[name].any() for name in found.dtype.names)
    with_advantage = objective.surrogate_term(anything[-1:], 1.5, np.float32([np.nan]))
    assert np.isnan(with_advantage["loss"]).all()


def test_cispo(host: ModuleType) -> None:
    """The ratio weighs the log-prob, and has no gradient of its own."""
    log_ratio, advantage, logprob = tokens()
    found = host.Objective(CISPO, *SETTINGS["cispo"]).surrogate_term(log_ratio, advantage, logprob)
    weight = np.minimum(ratios(log_ratio), 5) * advantage
    of_ratio = LEAST * (1 + np.abs(advantage))
    within(found["slope"], -weight, 3 * U * np.abs(weight) + of_ratio)
    loss = -weight * logprob
    within(found["loss"], loss, 4 * U * np.abs(loss) + of_ratio * (1 - logprob))
    assert host.Objective(CISPO, *SETTINGS["cispo"]).surrogate_term(-1000, 1, np.float32([-INF]))["loss"] == 0


def test_sapo(host: ModuleType) -> None:
    """x = tau (r - 1) has the roundings of r, of the difference and of the product; what they do to sigma(x)."""
    log_ratio, advantage, logprob = tokens()
    found = host.Objective(SAPO, *SETTINGS["sapo"]).surrogate_term(log_ratio, advantage, logprob)
    tau = np.where(advantage > 0, np.float32(1), np.float32(1.05)).astype(np.float64)
    ratio = np.minimum(ratios(log_ratio), 1e30)  # sigma is 1 and its slope 0 long before
    x = tau * (ratio - 1)
    e = np.exp(-np.abs(x))
    sigma, other = np.where(x >= 0, 1, e) / (1 + e), np.where(x >= 0, e, 1) / (1 + e)
    of_x = tau * (2 * U * ratio + U * np.abs(ratio - 1)) + U * np.abs(x)
    loss, slope = -4 / tau * sigma * advantage, -4 * sigma * other * ratio * advantage
    within(found["loss"], loss, (other * of_x + 8 * U) * np.abs(loss) + LEAST)
    # Below the normal numbers there are differences: of the ratio, of e beside a ratio near 100.
    vanished = LEAST * (1 + 4 * np.abs(advantage) * (1 + ratio * ((x > 80) & (x < 200))))
    of_slope = np.expm1(np.minimum(np.abs(sigma - other) * of_x, 1)) + 12 * U
    within(found["slope"], slope, of_slope * np.abs(slope) + vanished)


def test_reinforce(host: ModuleType) -> None:
    log_ratio, advantage, logprob = tokens()
    found = host.Objective(REINFORCE, *SETTINGS["grpo"]).surrogate_term(log_ratio, advantage, logprob)
    np.testing.assert_array_equal(found["slope"], -advantage)
    np.testing.assert_array_equal(found["loss"], -advantage * logprob)


def true_kl(estimator: int, d: Any) -> tuple[np.ndarray, np.ndarray]:
    """In more than float64, where e^d - 1 - d cancels too."""
    d = np.asarray(d, np.longdouble)
    with overflow():
        if estimator == 1:
            return -d, np.ones_like(d)
        if estimator == 2:
            return d * d / 2, -d
        small = np.abs(d) < 1e-3
        series = d * d * (1 / np.longdouble(2) + d * (1 / np.longdouble(6) + d * (1 / np.longdouble(24) + d / 120)))
        return np.where(small, series, np.expm1(d) - d), -np.expm1(d)


@pytest.mark.parametrize("estimator", [1, 2, 3])
def test_kl_estimates(host: ModuleType, estimator: int) -> None:
    """Relative accuracy of d near 0. k3: Horner's roundings, of which the last few count; from 1/2 on, those of two
    numbers of the size of e^d - 1."""
    rng = np.random.default_rng(1)
    d = np.float32(rng.choice([-1, 1], 40_000) * 10 ** rng.uniform(-15, 2, 40_000))
    d[:6] = 0, 0.5, -0.5, np.nextafter(np.float32(0.5), np.float32(0)), 87, -80
    found = host.kl_term(estimator, d)
    loss, slope = true_kl(estimator, d)
    overflows = d > 88
    of_loss = {1: 0, 2: U, 3: np.where(np.abs(d) < 0.5, 4 * U, U)}[estimator] * np.abs(loss)
    of_slope = 2 * U * np.abs(slope) if estimator == 3 else 0
    of_loss = of_loss + np.where((estimator == 3) & (np.abs(d) >= 0.5), 2 * U * np.abs(slope), 0)
    within(found["loss"][~overflows], loss[~overflows], (of_loss + 4 * LEAST)[~overflows])
    within(found["slope"][~overflows], slope[~overflows], np.broadcast_to(of_slope + LEAST, d.shape)[~overflows])
    found = host.kl_term(estimator, np.float32([INF, -INF, 200, -1000, np.nan]))
    with overflow():
        loss, slope = (np.float32(value) for value in true_kl(estimator, [INF, -INF, 200, -1000, np.nan]))
    np.testing.assert_array_equal(found["loss"], loss)
    np.testing.assert_array_equal(found["slope"], slope)

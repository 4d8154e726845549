"""csrc/common/vocabulary.h on the host, against numpy in more than float64: the gradient of an entry."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import host_module
import numpy as np
import pytest
from backends import host_code
from common_cases import (
    LEAST,
    LN2,
    LOG2E,
    NUMBERS,
    ROWS,
    TEMPERATURES,
    THREADS,
    U64,
    U,
    Wide,
    error_of_powers,
    is_exact,
    of_powers,
    rows_of,
    statistics_of,
    within,
)

pytestmark = host_code


@pytest.fixture(params=host_module.variants())
def host(request: pytest.FixtureRequest) -> ModuleType:
    return host_module.common()[request.param]


@pytest.fixture(params=["exact", "rounded"])
def lines(request: pytest.FixtureRequest, host: ModuleType) -> Any:
    return getattr(host, request.param)


@pytest.fixture
def power_error(host: ModuleType) -> float:
    return error_of_powers(host)


def gradients_of(x: np.ndarray, temperature: float, g: np.ndarray, eta: np.ndarray) -> tuple[np.ndarray, ...]:
    """-(g + eta (log p + H)) p / T of every entry; p, log p, lse and H."""
    below, p, total, lse, entropy = statistics_of(x, temperature)
    log_p = below - np.log(total)[:, None]
    moving = np.where(p == 0, 0, eta[:, None] * np.where(p == 0, 0, log_p + entropy[:, None]))
    return -(g[:, None] + moving) * p / Wide(temperature), p, log_p, lse, entropy


def entry_error(
    lines: Any, x: np.ndarray, temperature: float, g: np.ndarray, eta: np.ndarray, power_error: float
) -> np.ndarray:
    """Of p: the difference to the anchor, its product with c, and c. Of the factor: g and eta, each with the constant
    that makes p of a power; the pivot's difference and its product with 1/T, whose sizes are those of x - pivot; their
    sum; what the offset cannot hold of the pivot. Where results are rounded to 16 bits: the exponents of the entry and
    of the pivot instead, and the power that the constant is."""
    gradient, p, log_p, lse, entropy = gradients_of(x, temperature, g, eta)
    g, eta, lse, entropy = (np.abs(value)[:, None] for value in (g, eta, lse, entropy))
    anchor = np.float32(lse * Wide(temperature)).astype(Wide)
    shift = np.abs(anchor / Wide(temperature) - lse) * LOG2E
    y = np.where(p == 0, 0, -log_p * LOG2E) + shift  # at least the exponent's size
    of_p = of_powers(lines, y, power_error)
    if not is_exact(lines):
        of_p += power_error + U * LN2 * (y + shift)
    from_pivot = np.where(p == 0, 0, np.abs(log_p + entropy)) + 2 * U * (lse + entropy)
    of_factor = eta * (6 * U * from_pivot + U * U * (lse + entropy))
    if not is_exact(lines):
        of_factor += U * g + eta * 3 * U * (y * LN2 + entropy)
    sizes = np.abs(gradient) * temperature / np.where(p == 0, 1, p)
    subnormal = 2 * LEAST * (1 + (g + eta * 200) / temperature)
    return p / temperature * ((of_p + 4 * U) * sizes + (1 + of_p) * of_factor) + subnormal


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("weights", ["g", "eta", "both"])
def test_gradients_of_entries(lines: Any, power_error: float, kind: str, temperature: float, weights: str) -> None:
    rng = np.random.default_rng(5)
    x = rows_of(kind, 40, 200)
    g, eta = (rng.normal(0, 1, 40) * (weights in (name, "both")) for name in ("g", "eta"))
    exact, p, _, lse, entropy = gradients_of(x, temperature, g, eta)
    found = lines.entry_gradient(
        weights != "g", x, *(value.astype(np.float64)[:, None] for value in (lse, entropy)), temperature, g[:, None],
        eta[:, None],
    )
    within(found, exact, entry_error(lines, x, temperature, g, eta, power_error))
    assert (found[p == 0] == 0).all()


def worst_rounded(values: np.ndarray) -> float:
    """The value that a rounding to float32 moves by the largest part of itself, and up."""
    return float(values[((np.float32(values) - values) / values).argmax()])


def test_roundings_that_all_entries_share_leave_no_bias(host: ModuleType) -> None:
    """What c and g lose to float32 is taken account of: errors of many rows, or entries, have no sign in common."""
    rng = np.random.default_rng(7)
    temperature = LOG2E / worst_rounded(rng.uniform(1, 1.05, 10_000))
    x = np.zeros((300, 4096), np.float32)  # the token's own, and others of half the mass altogether
    x[:, 1:] = -temperature * LN2 * rng.uniform(11, 13, (300, 1))
    found = host.rounded.statistics(x, np.zeros(300, np.int64), temperature, 8, THREADS)["lse"]
    below, p, _, lse, _ = statistics_of(x, temperature)
    moved = float((p * -below).sum(-1).mean()) * 0.9 * U  # by c, if it were not taken account of
    assert abs(float((found - lse).mean())) < moved / 4

    g = worst_rounded(rng.uniform(1, 1.05, 10_000))
    x = np.float32(rng.normal(0, 3, (1, 20_000)))
    exact, _, _, lse, entropy = gradients_of(x, 1.0, np.array([g]), np.zeros(1))
    found = host.exact.entry_gradient(False, x, float(lse[0]), float(entropy[0]), 1.0, g, 0.0)
    assert abs(float(((found - exact) / exact).mean())) < U / 4


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("level", [0.0, 3.3, -117.7, 1e4])
def test_flat_rows_have_no_gradient_of_the_entropy(lines: Any, temperature: float, level: float) -> None:
    """log p + H cancels to nothing but for what 48 bits of both cannot tell."""
    x = np.full((1, 1000), level, np.float32)
    lse, entropy = (float(value[0]) for value in statistics_of(x, temperature)[3:])
    found = lines.entry_gradient(True, x, lse, entropy, temperature, 0.0, 1.0)
    within(found, 0, (U * U + 4 * U64) * (abs(lse) + entropy) / 1000 / temperature)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", ROWS)
def test_gradients_of_the_token_itself(lines: Any, kind: str, temperature: float) -> None:
    """One rounding of the result, and those of log p in float64. Rounded: log p, the exponentials and the entropy's
    part in float32; -expm1(log p) moves by no more roundings than log p, p by as many as log p is large."""
    rng = np.random.default_rng(6)
    x = rows_of(kind, 40, 200)
    x[:10, 0] = x[:10].max(-1) + np.float32(20)  # p near 1
    x[5:10] = np.where(np.arange(200) == 0, 0, -30 * temperature + rng.normal(0, 1, (5, 200)))  # and to be told from it
    g, eta = rng.normal(0, 1, (2, 40))
    g[20:25] = 0
    inner, p, log_p, lse, entropy = gradients_of(x, temperature, g, eta)
    own_p, own_log_p = p[:, 0], log_p[:, 0]
    others = np.where(p == 0, 0, p)[:, 1:].sum(-1)
    cancelling = (g * others - eta * own_p * (np.where(own_p == 0, 0, own_log_p) + entropy)) / Wide(temperature)
    exact = np.where(own_p > 0.5, cancelling, inner[:, 0] + g / Wide(temperature))
    found = lines.own_gradient(x[:, 0], lse.astype(np.float64), entropy.astype(np.float64), temperature, g, eta)
    z = np.where(own_p == 0, 0, np.abs(x[:, 0].astype(Wide) / temperature))
    of_log_p = 4 * U64 * (z + np.abs(lse))
    own_log_p = np.where(own_p == 0, 0, own_log_p)
    of_entropy = (of_log_p * (1 - own_log_p + entropy) + 4 * U64 * (entropy - own_log_p)) * np.abs(eta)
    allowed = 1.01 * U * np.abs(exact) + (of_log_p * np.abs(g) + of_entropy) * own_p / temperature + LEAST
    if not is_exact(lines):
        of_g = 3 * np.abs(g) * np.where(own_p > 0.5, others, 1 - own_p)
        of_entropy = (5 - own_log_p) * np.abs(eta) * own_p * np.abs(own_log_p + entropy)
        subnormal = LEAST * (np.abs(g) + np.abs(eta * (own_log_p + entropy)))
        allowed += (U * (of_g + of_entropy) + subnormal) / temperature
    within(found, exact, allowed)


def test_a_token_that_is_certain_has_no_gradient(lines: Any) -> None:
    """Where a rounding of the log-sum-exp would have it more than certain."""
    assert lines.own_gradient(1.0, np.nextafter(1.0, 0), 0.0, 1.0, 1.0, 1.0) == 0


def test_a_row_without_a_word_has_no_gradient(lines: Any) -> None:
    x = np.float32([-np.inf, 0.0])
    assert np.isnan(lines.entry_gradient(True, x, -np.inf, np.nan, 1.0, 1.0, 1.0)).all()
    assert np.isnan(lines.entry_gradient(False, x[:1], -np.inf, np.nan, 1.0, 1.0, 0.0)).all()
    assert np.isnan(lines.own_gradient(-np.inf, -np.inf, np.nan, 1.0, 1.0, 0.0))

"""csrc/common/vocabulary.h on the host, against numpy in more than float64: the sums of a row, and what they give."""

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
    LOWEST,
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
    rises,
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


def relative(lines: Any, x: Any, top: Any, temperature: float) -> tuple[Any, Any]:
    """What powers are weighed with in sums, and the powers. Exact: x - top. Rounded: x c - r, with r = top c as float32
    rounds it, where it can."""
    c, x, top = Wide(lines.scale_of_sums(temperature)), np.asarray(x).astype(Wide), np.float32(top)
    if is_exact(lines):
        return x - top, np.exp((x - top) * c * np.log(Wide(2)))
    with np.errstate(over="ignore"):
        reference = top * np.float32(c)
    far = np.abs(reference) >= 2**20
    u = x * c - np.where(far, top.astype(Wide) * c, reference.astype(Wide))
    return u, np.exp2(u)


# ---- powers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("offset", [0, 1e4])
def test_powers_below_a_maximum(lines: Any, power_error: float, temperature: float, offset: float) -> None:
    rng = np.random.default_rng(0)
    top = np.float32(rng.normal(offset, 10, 50_000))
    x = np.float32(top - rng.exponential(20, top.size))
    found = lines.below(x, top, temperature)
    if is_exact(lines):
        d, exact = relative(lines, x, top, temperature)
    else:  # of one maximum below another: both as float32 rounds them
        c = np.float32(lines.scale_of_sums(temperature))
        d = (x * c).astype(Wide) - (top * c)
        exact = np.exp2(d)
    within(found["d"][exact > LEAST / 2], d[exact > LEAST / 2], U * np.abs(d[exact > LEAST / 2]))
    y = -(x.astype(Wide) - top) * LOG2E / temperature
    within(found["e"], exact, exact * of_powers(lines, y, power_error) + 2 * LEAST)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_powers_of_what_is_no_number(lines: Any, temperature: float) -> None:
    """A power of 0 has an exponent that is finite: their product is 0."""
    lowest = np.float32([-np.inf, LOWEST, -1e30])
    for top in (0.0, 1e4, -1e30, 3e38):
        found = lines.below(lowest[:2], top, temperature)
        assert (found["e"] == 0).all() and np.isfinite(found["d"]).all(), found
    assert np.isnan(lines.below(np.float32([np.nan, np.inf]), [0, np.inf], temperature)["e"]).all()
    assert (lines.below(lowest[1:], lowest[1:], temperature)["e"] == 1).all()


def test_powers_of_products_take_what_was_lost(host: ModuleType, power_error: float) -> None:
    """2^(d (c + c_rest) + lost), with a `lost` of some roundings of the exponent."""
    rng = np.random.default_rng(1)
    d, c = np.float32(-rng.exponential(30, 20_000)), np.float32(rng.uniform(0.4, 20, 20_000))
    c_rest, lost = np.float32(c * rng.uniform(-U, U, c.size)), np.float32(rng.uniform(-1e-5, 1e-5, c.size))
    power = d.astype(Wide) * (c.astype(Wide) + c_rest) + lost
    seen = power > -126
    assert seen.sum() > 3000
    error = power_error + 2 * U + ((3 * U * -power + np.abs(lost)) * LN2) ** 2 / 2
    within(host.exact.exp2_of_product(d, c, c_rest, lost)[seen], np.exp2(power[seen]), (np.exp2(power) * error)[seen])
    power = d.astype(Wide) * c + lost
    error = power_error + U * LN2 * -power
    found = host.rounded.exp2_of_product(d, c, c_rest, lost)
    within(found[seen], np.exp2(power[seen]), (np.exp2(power) * error)[seen])


# ---- sums of a thread -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("count", [1, 4, 8])
@pytest.mark.parametrize("kind", ROWS)
def test_entries_in_any_grouping(lines: Any, power_error: float, kind: str, count: int, temperature: float) -> None:
    """Each change of the maximum is a power and five roundings; each group and each of its entries a sum."""
    x = rows_of(kind, 40, 96)
    sums = lines.add_all(x, temperature, count)
    np.testing.assert_array_equal(sums["top"], x.max(-1))
    d, e = relative(lines, x, sums["top"][:, None], temperature)
    d, e = np.where(x == -np.inf, 0, d), np.where(x == -np.inf, 0, e)
    changes = 1 + rises(x.reshape(len(x), -1, count).max(-1))[:, None]
    error = of_powers(lines, -d * LOG2E / temperature, power_error) + changes * (power_error + 7 * U)
    error += (count + 96 // count) * U
    is_top = (x == sums["top"][:, None]) & is_exact(lines)
    within(sums["count"], is_top.sum(-1), 0)
    rest = np.where(is_top, 0, e)
    within(sums["rest"], rest.sum(-1), (rest * error).sum(-1) + 96 * LEAST)
    within(
        sums["weighted"], (e * d).sum(-1), (e * np.abs(d) * (error + 2 * U)).sum(-1) + 96 * LEAST * (1 - d.min(-1))
    )


def test_entries_that_are_no_numbers(lines: Any) -> None:
    x = np.zeros((5, 16), np.float32)
    x[0] = -np.inf
    x[1, 9], x[2, 9], x[3, [3, 9]], x[4] = np.nan, np.inf, [np.inf, np.nan], LOWEST
    for count in (1, 4, 8):
        sums = lines.add_all(x, 1.0, count)
        assert sums["rest"][0] + sums["count"][0] == 0 and sums["weighted"][0] == 0
        assert np.isnan(sums["rest"][1:4] + sums["weighted"][1:4]).all()
        assert sums["rest"][4] + sums["count"][4] == 16 and sums["weighted"][4] == 0


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_sums_relative_to_another_maximum(lines: Any, power_error: float, temperature: float) -> None:
    x = rows_of("random", 40, 32)
    sums = lines.add_all(x, temperature, 4)
    fields = [sums[name] for name in sums.dtype.names]
    assert (lines.relative_to(*fields, sums["top"], temperature) == sums).all()
    top = np.float32(sums["top"] + np.random.default_rng(3).exponential(5, len(x)))
    found = lines.relative_to(*fields, top, temperature)
    assert (found["top"] == top).all() and (found["count"] == 0).all()
    y = (top.astype(Wide) - sums["top"]) * LOG2E / temperature
    if is_exact(lines):
        d, e = relative(lines, sums["top"], top, temperature)
    else:
        c = np.float32(lines.scale_of_sums(temperature))
        d = (sums["top"] * c).astype(Wide) - (top * c)
        e = np.exp2(d)
    error = of_powers(lines, y, power_error) + 4 * U
    everything = sums["rest"].astype(Wide) + sums["count"]
    within(found["rest"], e * everything, error * e * everything + LEAST * everything)
    weighted = e * (sums["weighted"] + d * everything)
    size = e * (np.abs(sums["weighted"]) - d * everything)
    within(found["weighted"], weighted, (error + 2 * U) * size + LEAST * (1 - d) * everything)
    far = lines.relative_to(*fields, 3e38, temperature)
    assert (far["rest"] == 0).all() and (far["weighted"] == 0).all()


# ---- the row as a whole -----------------------------------------------------------------------------------------

def of_row(
    lines: Any, x: np.ndarray, ids: np.ndarray, temperature: float, count: int, power_error: float
) -> Any:
    """The true statistics, and how far those of the kernel's may be."""
    below, p, _, lse, entropy = statistics_of(x, temperature)
    own = np.arange(x.shape[1]) == ids[:, None]
    z = x.astype(Wide) / Wide(temperature)
    others = np.where(own | (p == 0), 0, np.exp(z - z[own][:, None])).sum(-1)
    logprobs = -np.log1p(others)
    groups = -(-x.shape[1] // (count * THREADS))
    # Of a thread's maxima, then of its warp's, then the row's; the token itself joins in float64.
    changes = 3 + groups if np.isinf(x).any() else 3 + rises(
        np.pad(x, ((0, 0), (0, -x.shape[1] % (count * THREADS))), constant_values=-1e30)
        .reshape(len(x), groups, THREADS, count).max(-1).swapaxes(1, 2)
    ).max(-1)[:, None]
    size = np.where(p == 0, 0, -below)
    of_term = of_powers(lines, size * LOG2E, power_error) + changes * (power_error + 7 * U) + (count + groups + 6) * U
    rest = np.where(own, 0, p)
    if not is_exact(lines):  # of the parts and of the token itself
        of_term += power_error + 2 * U * LN2 * size * LOG2E
        rest = np.where(own, np.where(below == 0, 0, p), p)
    of_total, of_weighted = (rest * of_term).sum(-1), (rest * size * (of_term + 2 * U)).sum(-1)
    mean = (p * size).sum(-1)
    spread = (p * size**2).sum(-1) - mean**2
    # Rounded: 1/T is a rounding off; the log-sum-exp is corrected by its slope, the entropy moves with the spread.
    off = 0 if is_exact(lines) else U
    double = 8 * U64 * (1 + mean)
    lse_error = of_total + 2 * off * (of_weighted + of_total * mean) + off**2 * spread + double
    entropy_error = of_total * (1 + mean) + of_weighted + 2 * off * spread + double
    at_top = ids == x.argmax(-1)
    logprob_error = lse_error + np.where(at_top, 0, 4 * U64 * (np.abs(lse) + np.abs(z[own])))
    return (logprobs, logprob_error), (lse, lse_error + 4 * U64 * np.abs(lse)), (entropy, entropy_error)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("count", [4, 8])
@pytest.mark.parametrize("kind", NUMBERS)
def test_statistics_of_rows(
    lines: Any, power_error: float, kind: str, count: int, temperature: float
) -> None:
    x = rows_of(kind, 40, 301)
    ids = np.random.default_rng(4).integers(0, 301, len(x))
    ids[: len(x) // 2] = x[: len(x) // 2].argmax(-1)
    ids = np.where(x[np.arange(len(x)), ids] > LOWEST, ids, x.argmax(-1))  # a word that may be said
    found = lines.statistics(x, ids, temperature, count, THREADS)
    bounds = of_row(lines, x, ids, temperature, count, power_error)
    for name, (exact, allowed) in zip(("logprob", "lse", "entropy"), bounds, strict=True):
        within(found[name], exact, allowed)


@pytest.mark.parametrize("gap", [5, 12, 20, 30])
@pytest.mark.parametrize("offset", [0, 1e4])
def test_log_probs_near_0_keep_their_relative_accuracy(
    lines: Any, power_error: float, gap: float, offset: float
) -> None:
    """Down to what float64 can tell from 1, whatever the offset."""
    x = rows_of("random", 40, 301) / np.float32(4) + np.float32(offset)
    ids = np.full(len(x), 17)
    x[:, 17] = x.max(-1) + np.float32(gap)
    (exact, _), _, (entropy, _) = of_row(lines, x, ids, 1.0, 8, power_error)
    roundings = 3 * U * (gap + 8) + 6 * (power_error + 7 * U) + 20 * U
    assert (exact > -300 * np.exp(-gap)).all()
    found = lines.statistics(x, ids, 1.0, 8, THREADS)
    within(found["logprob"], exact, roundings * -exact + 2 * U64)
    within(found["entropy"], entropy, 2 * roundings * entropy + 4 * U64)


def test_rows_that_are_no_numbers(lines: Any) -> None:
    x = np.zeros((7, 40), np.float32)
    x[0], x[1, :-1], x[2, 5], x[3, 5], x[4, 7] = -np.inf, -np.inf, np.nan, np.inf, np.nan
    x[5, 7], x[6, 7] = np.inf, -np.inf
    ids = np.array([7, 39, 7, 7, 7, 7, 7])
    found = lines.statistics(x, ids, 0.7, 8, THREADS)
    assert found["lse"][0] == -np.inf and np.isnan(found["logprob"][0]) and np.isnan(found["entropy"][0])
    assert found[1].tolist() == (0, 0, 0)
    assert np.isnan(found["entropy"][2:6]).all() and not np.isfinite(found["logprob"][2:6]).any()
    assert found["logprob"][6] == -np.inf
    within(found["entropy"][6], np.log(39), 40 * U)

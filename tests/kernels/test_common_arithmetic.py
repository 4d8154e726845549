"""csrc/common on the host, against numpy: single numbers, log-sum-exp of blocks, rows of strided tensors."""

from __future__ import annotations

from types import ModuleType

import host_module
import numpy as np
import pytest
from backends import host_code
from common_cases import U64, U, Wide, rises, statistics_of, within

pytestmark = host_code

RNG = np.random.default_rng


@pytest.fixture(params=host_module.variants())
def host(request: pytest.FixtureRequest) -> ModuleType:
    return host_module.common()[request.param]


def floats(count: int, low: int, high: int, seed: int = 0) -> np.ndarray:
    """Both signs, every exponent alike."""
    rng = RNG(seed)
    sign = rng.choice([-1.0, 1.0], count)
    return np.float32(sign * np.ldexp(1 + rng.random(count, dtype=np.float32), rng.integers(low, high, count)))


# ---- single numbers -----------------------------------------------------------------------------------------


def test_exp2_is_within_two_units(host: ModuleType) -> None:
    x = np.float32(np.r_[RNG(0).uniform(-126, 128, 200_000), floats(10_000, -30, 0), 0, -126, 127.99999])
    exact = np.exp2(x.astype(np.float64))
    within(host.exp2_fast(x), exact, 2 * np.spacing(np.float32(exact), dtype=np.float32).astype(float))
    assert host.exp2_fast(np.float32([-np.inf, -200, 128, np.inf])).tolist() == [0, 0, np.inf, np.inf]
    assert np.isnan(host.exp2_fast(np.float32(np.nan)))


def test_products_and_what_their_rounding_lost(host: ModuleType) -> None:
    a, b = floats(20_000, -40, 40), floats(20_000, -40, 40, seed=1)
    exact = a.astype(np.float64) * b  # 48 bits
    rounded = host.product(a, b)
    np.testing.assert_array_equal(rounded, np.float32(exact))
    np.testing.assert_array_equal(host.product_error(a, b, rounded), exact - rounded)
    assert (exact != rounded).any()


def test_differences_and_what_their_rounding_lost(host: ModuleType) -> None:
    """d + rest = a - b of any two exponents; of float64's two numbers for the same difference, too."""
    a, b = floats(40_000, -60, 60), floats(40_000, -60, 60, seed=1)
    b[::2] = a[::2] * np.float32(RNG(2).uniform(0.2, 3, 20_000))  # near each other
    a[::7] = b[::7]
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    exact = wide_a - wide_b
    back = exact - wide_a
    lost = (wide_a - (exact - back)) - (wide_b + back)
    d = host.difference(a, b)
    np.testing.assert_array_equal(d, np.float32(exact))
    np.testing.assert_array_equal(host.sum(a, b), np.float32(wide_a + wide_b))
    rest = host.difference_error(a, b, d).astype(np.float64)
    np.testing.assert_array_equal((exact - d) - rest, -lost)
    assert (rest != 0).any() and (lost != 0).any()


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 3.0])
def test_scales_hold_48_bits(host: ModuleType, temperature: float) -> None:
    scale = host.scale_of([temperature])[0]
    exact = 1 / (np.log(Wide(2)) * Wide(temperature))
    assert np.float32(exact) == scale["c"]
    within(Wide(scale["c"]) + Wide(scale["c_rest"]), exact, (U * U + 3 * U64) * exact)
    within(host.exact.scale_of_sums(temperature), exact, 3 * U64 * exact)
    assert host.rounded.scale_of_sums(temperature) == scale["c"]


# ---- log-sum-exp of blocks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_blocks_add_up_to_the_row(host: ModuleType, block: int, temperature: float, offset: float) -> None:
    """Of a term: the roundings of d, of d/T and of the exponential; each addition, each change of the maximum."""
    x = RNG(0).normal(0, 4, (50, 300)) + offset
    x[10:20].sort(-1)
    x[20:30, :150] = -np.inf
    x[30:40][RNG(1).random((10, 300)) < 0.5] = -np.inf
    found = host.online(x, block, 1 / temperature)
    below, p, _, lse, entropy = statistics_of(x, temperature)
    size = np.where(p == 0, 0, -below)
    of_term = 4 * U64 * size + (x.shape[1] + 8 * (1 + rises(x)[:, None])) * U64
    of_sum = (p * of_term).sum(-1)
    mean = (p * size).sum(-1)
    within(found["lse"], lse, of_sum + 3 * U64 * np.abs(lse))
    within(found["entropy"], entropy, of_sum * (1 + mean) + (p * size * of_term).sum(-1) + 8 * U64 * (1 + mean))


def test_blocks_without_a_word(host: ModuleType) -> None:
    x = np.full((4, 20), -np.inf)
    x[1, 13] = 2.0
    x[2, 3:5] = 1.0, np.inf
    x[3, 9] = np.nan
    found = host.online(x, 5, 1.0)
    assert found["lse"][0] == -np.inf and np.isnan(found["entropy"][0])
    assert found["lse"][1] == 2 and found["entropy"][1] == 0
    assert np.isnan(found["lse"][2:]).all() and np.isnan(found["entropy"][2:]).all()


# ---- rows of strided tensors ------------------------------------------------------------------------------------

BASE = np.arange(2 * 3 * 4 * 5 * 6).reshape(2, 3, 4, 5, 6)  # each entry is its own offset
VIEWS = {
    "whole": BASE, "transposed": BASE.transpose(2, 0, 3, 1, 4), "vocabulary first": BASE.transpose(4, 3, 2, 1, 0),
    "every second": BASE[::-1, :, ::2, 1:4], "one row": BASE[1, 2, 3, 4], "one leading": BASE[1, 2, 3],
    "repeated": np.broadcast_to(BASE[:, :, :1], (2, 3, 7, 5, 6)), "sizes of one": BASE[:1, :, None, :1],
    "seven": BASE.reshape(2, 3, 2, 2, 5, 2, 3)[..., None].swapaxes(0, 4),
}


@pytest.mark.parametrize("view", VIEWS)
def test_offsets_of_rows(host: ModuleType, view: str) -> None:
    x = VIEWS[view]
    strides = [stride // x.itemsize for stride in x.strides]
    rows = x[..., 0].ravel()
    found = host.offsets(x.shape[:-1], strides[:-1], np.arange(rows.size))
    np.testing.assert_array_equal(found, rows - x.flat[0])


def test_offsets_beyond_32_bits(host: ModuleType) -> None:
    found = host.offsets([3, 2**33], [2**50, 151_936], [0, 2**33 - 1, 2**34 + 5])
    assert found.tolist() == [0, (2**33 - 1) * 151_936, 2 * 2**50 + 5 * 151_936]


def test_sizes_of_dtypes(host: ModuleType) -> None:
    assert [host.size_of(number) for number in range(3)] == [4, 2, 2]

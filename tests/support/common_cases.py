"""What the tests of csrc/common share: the comparison, and the statistics of rows in more than float64.

Allowed are the roundings of the lines themselves, counted beside each comparison: U is the largest relative error of
one in float32, U64 in float64, LEAST the distance of neighbours below the normal float32.

Of vocabulary.h, `exact` are the lines for results as fine as float32, `rounded` those for 16-bit logits. y is the
exponent of a power, (top - x) log2(e) / T: in `rounded` its roundings cost the power so many of its own, in `exact`
none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

U, U64, LEAST = 2.0**-24, 2.0**-53, 2.0**-149
Wide = np.longdouble
LN2, LOG2E = float(np.log(2)), float(1 / np.log(2))
THREADS = 8  # of a row, in `statistics`
TEMPERATURES = [0.1, 0.7, 1.0, 3.0]
LOWEST = np.finfo(np.float32).min
Maker = Callable[[np.random.Generator, int, int], np.ndarray]


def within(got: Any, exact: Any, allowed: Any) -> None:
    """Infinities are matched by themselves and NaN by NaN."""
    got, exact, allowed = np.broadcast_arrays(np.asarray(got, Wide), np.asarray(exact, Wide), np.asarray(allowed, Wide))
    with np.errstate(invalid="ignore"):
        right = (got == exact) | (np.isnan(got) & np.isnan(exact)) | (np.abs(got - exact) <= allowed)
    if not right.all():
        i = tuple(np.argwhere(~right)[0])
        raise AssertionError(
            f"{(~right).sum()} of {right.size} are off; the first at {i}: {got[i]} against {exact[i]}, allowed "
            f"{float(allowed[i]):.3g}, error {float(np.abs(got[i] - exact[i])):.3g}"
        )


def statistics_of(x: np.ndarray, temperature: float) -> tuple[np.ndarray, ...]:
    """z - top, p and sum e^{z - top} in more than float64, of rows with a finite maximum; then lse and entropy."""
    z = x.astype(Wide) / Wide(temperature)
    below = z - z.max(-1, keepdims=True)
    e = np.exp(below)
    total = e.sum(-1, keepdims=True)
    p = e / total
    log_total = np.log(total)[..., 0]
    entropy = log_total - (p * np.where(e == 0, 0, below)).sum(-1)
    return below, p, total[..., 0], z.max(-1) + log_total, entropy


def rises(x: np.ndarray) -> np.ndarray:
    """How often the maximum of a row grows from left to right."""
    top = np.maximum.accumulate(x, -1)
    return (top[..., 1:] > top[..., :-1]).sum(-1)


# ---- powers, and rows of logits -------------------------------------------------------------------------------


def is_exact(lines: Any) -> bool:
    return lines.__name__.endswith("exact")


@functools.cache
def error_of_powers(host: ModuleType) -> float:
    """Of exp2_fast, relative, as it is here; what is allowed is in test_common_arithmetic."""
    x = np.float32(np.linspace(-126, 0, 100_001))
    exact = np.exp2(x.astype(Wide))
    return 1.01 * float((np.abs(host.exp2_fast(x) - exact) / exact).max())


def of_powers(lines: Any, y: Any, power_error: float) -> Any:
    """Relative error of 2^-y. Rounded: of the difference, and of its product with c. Exact: of the product with what
    was lost and of the sum; and a parabola was left out, of that loss."""
    return power_error + (2 * U + (3 * U * y * LN2) ** 2 / 2 if is_exact(lines) else 2 * U * LN2 * y)


def with_forbidden(rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    x = rng.normal(0, 4, (rows, length))
    x[rng.random(x.shape) < 0.3] = -np.inf
    x[0, : length // 2], x[1, length // 2 :] = -np.inf, -np.inf
    x[:, length // 3] = 1.0
    return x


ROWS: dict[str, Maker] = {
    "random": lambda rng, rows, length: rng.normal(0, 4, (rows, length)),
    "offset": lambda rng, rows, length: rng.normal(1e4, 4, (rows, length)),
    "equal": lambda rng, rows, length: np.full((rows, length), 3.3) * rng.normal(0, 9, (rows, 1)),
    "few values": lambda rng, rows, length: rng.integers(-2, 3, (rows, length)) * 0.7,
    "ascending": lambda rng, rows, length: np.sort(rng.normal(0, 9, (rows, length)), -1),
    "descending": lambda rng, rows, length: -np.sort(rng.normal(0, 9, (rows, length)), -1),
    "forbidden": with_forbidden,
    "masked": lambda rng, rows, length: np.where(
        np.arange(length) < length // 2, LOWEST, rng.normal(0, 4, (rows, length))
    ),
    # Where T is 1, exponents on both sides of 2^20, beyond which float32 cannot hold them beside their differences.
    "large": lambda rng, rows, length: rng.normal(2**20 * LN2, 1, (rows, length)),
    "large, negative": lambda rng, rows, length: rng.normal(-(2**20) * LN2, 1, (rows, length)),
    # Neighbours are 8 apart: the float32 next to lse T may be some units of T away from it.
    "coarse": lambda rng, rows, length: rng.normal(1e8, 20, (rows, length)),
    "far apart": lambda rng, rows, length: rng.normal(0, 1, (rows, length)) * 10 ** rng.uniform(0, 30, (rows, length)),
}
NUMBERS = [name for name in ROWS if name != "far apart"]


def rows_of(name: str, rows: int, length: int) -> np.ndarray:
    return np.float32(ROWS[name](np.random.default_rng(2), rows, length))

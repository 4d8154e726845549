"""What the tests of csrc/common share: the comparison, and the statistics of rows in more than float64.

Allowed are the roundings of the lines themselves, counted beside each comparison: U is the largest relative error of
one in float32, U64 in float64, LEAST the distance of neighbours below the normal float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

U, U64, LEAST = 2.0**-24, 2.0**-53, 2.0**-149
Wide = np.longdouble


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

"""The error budget: it counts the roundings of the given data, so no tolerance is a free constant."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from r1kernels import _library

EPS32 = torch.finfo(torch.float32).eps
# Roundings of fp32 on the way to a result: one for sums and products, one for exponentials (exact to 2^-22 on GPUs).
GPU_ROUNDINGS = 4
ROUNDINGS = GPU_ROUNDINGS if _library.INTERPRETED or _library.EMULATED else 2


def rounding(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest error of rounding `exact` once to `dtype`: half a unit in the last place."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact.abs().clamp(min=info.tiny))[1] - 1
    return torch.ldexp(torch.full_like(exact, info.eps / 2), exponent)


class Expected(NamedTuple):
    """An exact result and `terms`: the sum of the absolute values of its addends, each times its condition number.
    `terms * EPS32` is the largest error that one rounding of every fp32 intermediate can cause."""

    value: Tensor
    terms: Tensor

    def budget(self, dtype: torch.dtype = torch.float32, roundings: int = ROUNDINGS) -> Tensor:
        """One rounding to the output `dtype`, and before it two of fp32, or 1/256 of that of a narrower output."""
        on_the_way = max(roundings * EPS32, torch.finfo(dtype).eps / 256)
        return rounding(self.value, dtype) + on_the_way * self.terms + torch.finfo(torch.float32).tiny


def assert_within(got: Tensor, expected: Expected | Tensor, budget: Tensor | float | None = None) -> None:
    """Asserts that every element is within its budget; inf must match exactly, and NaN must match NaN.

    Args:
        got: the result under test, of any dtype.
        expected: the exact result. An `Expected` brings its own budget for the dtype of `got`.
        budget: the largest allowed error, of all elements or of each. It is required for a tensor, and not used for an
            `Expected`.

    Raises:
        AssertionError: shapes differ, or an element is out of budget; it names the first one and its error.
    """
    if isinstance(expected, Expected):
        budget = expected.budget(got.dtype if got.dtype != torch.float64 else torch.float32)
        expected = expected.value
    assert got.shape == expected.shape, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    got, expected = got.detach().double(), expected.double()
    same = (got == expected) | (got.isnan() & expected.isnan())
    error = torch.where(same, 0, (got - expected).abs())
    bad = ~(error <= torch.as_tensor(budget, dtype=torch.float64))
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        allowed = torch.as_tensor(budget, dtype=torch.float64).expand(got.shape)[where]
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} elements are out of budget; the first one at {where}: "
            f"got {got[where]}, expected {expected[where]}, error {error[where]:.3g}, allowed {allowed:.3g}"
        )

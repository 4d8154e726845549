"""Sums of rows of logits: float64, masks, strides, -inf and NaN, opcheck."""

import pytest
import torch
from backends import registration_only
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from r1kernels import testing
from r1kernels.ops import token_stats

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(logits: Tensor, mask: Tensor | None = None) -> None:
    vocab = logits.shape[-1]
    means = token_stats.mean_logits(logits, mask, 0.5, None, vocab)
    wide = logits.double() if mask is None else torch.where(mask[:, None], logits.double(), 0)
    # One rounding of a sum of a block, and of its partial sums.
    testing.assert_within(means, 2 * wide.mean(-1), 8 * testing.EPS32 * wide.abs().mean(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 15, 64, 2048, 5001])
def test_against_float64(dtype: torch.dtype, vocab: int, isa: str) -> None:
    logits = testing.random_logits(4, vocab, dtype=dtype)
    check(logits)
    mask = torch.tensor([True, False, True, True])
    logits[1] = torch.nan
    check(logits, mask)


@given(count=st.integers(0, 3), vocab=st.integers(1, 300), step=st.integers(1, 3), seed=st.integers(0, 9))
def test_any_stride(count: int, vocab: int, step: int, seed: int) -> None:
    check(testing.random_logits(count, vocab * step, seed=seed)[:, ::step])


def test_numbers_that_are_not_finite() -> None:
    logits = testing.random_logits(3, 100)
    logits[0, 70], logits[1, 70], logits[2, 99] = -torch.inf, torch.nan, torch.inf
    means = token_stats.mean_logits(logits, None, 1.0, None, 100)
    assert means[0] == -torch.inf and means[1].isnan() and means[2] == torch.inf


def test_temperatures() -> None:
    logits, temperatures = testing.random_logits(3, 100), torch.tensor([0.5, 1.0, 2.0])
    means = token_stats.mean_logits(logits, None, 2.0, temperatures, 100)
    testing.assert_within(means, logits.double().mean(-1) / (2 * temperatures.double()), 1e-6)


@registration_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    logits = testing.random_logits(2, 3, 40, dtype=dtype)
    for mask in (None, testing.random_ids(2, 3, vocab=2) > 0):
        torch.library.opcheck(torch.ops.r1kernels.logit_sums, (logits, mask))

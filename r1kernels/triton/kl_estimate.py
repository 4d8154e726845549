r"""KL estimators of single tokens and their derivatives, element by element.

With d = l_ref - l:   k1 = -d,   k2 = d^2 / 2,   k3 = e^d - d - 1.

Bytes: 8 read and 8 written a token. Exponentials are float64: they are few, and every device gives the same float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1kernels.triton.common import Device, Variant, device_of, kernel, launch
from r1kernels.triton.objective import kl_term


class Config(NamedTuple):
    block: int
    num_warps: int


def config(shape: tuple[int], dtype: torch.dtype, device: Device) -> Config:
    """The block of a program for (N,) tokens."""
    return Config(block=1024, num_warps=4)


@kernel
def kl_kernel(
    logprobs, ref_logprobs, kl, slope, estimator: tl.int64, count: tl.int64, BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < count
    d = tl.load(ref_logprobs + n, mask=inside, other=0) - tl.load(logprobs + n, mask=inside, other=0)
    value, derivative = kl_term(estimator, d)
    tl.store(kl + n, value, mask=inside)
    tl.store(slope + n, derivative, mask=inside)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: int) -> tuple[Tensor, Tensor]:
    """The estimate and its derivative with respect to logprobs, both (...) float32."""
    kl, slope = torch.empty_like(logprobs), torch.empty_like(logprobs)
    count = logprobs.numel()
    block, num_warps = config((count,), logprobs.dtype, device_of(logprobs))
    launch(
        kl_kernel, (triton.cdiv(count, block),), logprobs, logprobs, ref_logprobs, kl, slope, estimator, count,
        BLOCK=block, num_warps=num_warps,
    )
    return kl, slope


def variants(device: Device) -> Iterator[Variant]:
    block, num_warps = config((1,), torch.float32, device)
    signature = dict.fromkeys(("logprobs", "ref_logprobs", "kl", "slope"), "*fp32")
    signature |= {"estimator": "i64", "count": "i64"}
    yield Variant(kl_kernel, signature, {"BLOCK": block}, {"num_warps": num_warps, "num_stages": 1})

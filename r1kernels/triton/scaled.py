"""A gradient times a factor that only the device knows, in the dtype wanted: one read and one write.

A factor of inf or NaN must not bring masked tokens to life, so what is 0 stays 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1kernels.triton.common import POINTERS, Device, Variant, device_of, kernel, launch, rounded, signature

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Config(NamedTuple):
    """Entries a program takes, and its warps."""

    block: int
    num_warps: int


def config(shape: tuple[int], dtype: torch.dtype, device: Device) -> Config:
    """Two loads of 16 bytes a thread."""
    return Config(block=8 * 4 * device.warp * 2, num_warps=4)


@triton.jit
def _entry(x, factor, before, dtype: tl.constexpr):
    x = x.to(tl.float32)
    return rounded(tl.where(x == 0, x, x * factor) + before, dtype)


@kernel
def scaled_kernel(grad, factor, out, accumulate: tl.int64, count: tl.int64, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK
    cols = tl.arange(0, BLOCK)
    # Both begin at a multiple of 16 bytes; the launcher checks.
    source, target = tl.multiple_of(grad + at, 16) + cols, tl.multiple_of(out + at, 16) + cols
    scale = tl.load(factor)
    dtype: tl.constexpr = out.dtype.element_ty
    before = tl.zeros((BLOCK,), tl.float32)
    if count - at >= BLOCK:
        if accumulate != 0:
            before = tl.load(target).to(tl.float32)
        tl.store(target, _entry(tl.load(source), scale, before, dtype))
    else:
        inside = cols < (count - at).to(tl.int32)
        if accumulate != 0:
            before = tl.load(target, mask=inside, other=0).to(tl.float32)
        tl.store(target, _entry(tl.load(source, mask=inside, other=0), scale, before, dtype), mask=inside)


def scaled(grad: Tensor, factor: Tensor, out: Tensor, accumulate: bool) -> None:
    for name, tensor in (("grad", grad), ("out", out)):
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise ValueError(f"{name} has strides {tensor.stride()}, expected contiguous memory aligned to 16 bytes")
    chosen = config((grad.numel(),), grad.dtype, device_of(grad))
    launch(
        scaled_kernel, (triton.cdiv(grad.numel(), chosen.block),), grad, grad, factor.float(), out, int(accumulate),
        grad.numel(), BLOCK=chosen.block, num_warps=chosen.num_warps,
    )


def variants(device: Device) -> Iterator[Variant]:
    """Every compilation that a launch above can ask for."""
    chosen = config((1,), torch.float32, device)
    for dtype in DTYPES:
        for out in DTYPES if dtype == torch.float32 else (dtype, torch.float32):
            yield Variant(
                scaled_kernel,
                signature(scaled_kernel, grad=POINTERS[dtype], factor="*fp32", out=POINTERS[out]),
                {"BLOCK": chosen.block},
                {"num_warps": chosen.num_warps, "num_stages": 1},
                ("wide_loads", "wide_stores"),
            )

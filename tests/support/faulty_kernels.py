"""Kernels with one fault each, and one without: what `test_aot` must tell apart."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NoReturn

import triton.language as tl

from r1kernels.triton.common import Device, Variant, kernel


@kernel
def sound_kernel(a, b, out, start: tl.int64, count: tl.int64, BLOCK: tl.constexpr):
    """Wide loads, a product of matrices and wide stores."""
    tile = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for at in range(0, count):
        here = at * BLOCK * BLOCK
        x = tl.load(tl.multiple_of(a + here, 16) + tile)
        y = tl.load(tl.multiple_of(b + here, 16) + tile)
        total += tl.dot(x, y)
    tl.store(tl.multiple_of(out + start, 16) + tile, total)


@kernel
def narrow_kernel(a, out, stride: tl.int64, BLOCK: tl.constexpr):
    """Expects wide loads, which a stride known at run time only cannot have, and a matrix product that is not there."""
    tl.store(tl.multiple_of(out, 16) + tl.arange(0, BLOCK), tl.load(a + tl.arange(0, BLOCK) * stride))


@kernel
def spilling_kernel(a, out, count: tl.int64, BLOCK: tl.constexpr):
    """All of a tile stays alive: more values a thread than it has registers."""
    tile = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, count):
        total = tl.sqrt(total * total + tl.load(a + at * BLOCK + tile))
    tl.store(out + tile, total)


@kernel
def large_kernel(a, out, BLOCK: tl.constexpr):
    """Transposing all at once takes more shared memory than any device has."""
    down, across = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    x = tl.load(tl.multiple_of(a, 16) + down * BLOCK + across)
    tl.store(tl.multiple_of(out, 16) + down * BLOCK + across, tl.trans(x))


@kernel
def wrong_kernel(a, BLOCK: tl.constexpr):
    """Shapes that do not go together."""
    tl.store(a + tl.arange(0, BLOCK), tl.arange(0, 2 * BLOCK))


class Deadly:
    """Ends the process of the compiler that looks at it, as a failed assertion within LLVM does."""

    __name__ = "deadly_kernel"
    params = ()

    @property
    def debug(self) -> NoReturn:
        os._exit(3)


def variants(device: Device) -> Iterator[Variant]:
    one_warp = {"num_warps": 1}
    block = {"BLOCK": 64}
    sound = {"a": "*bf16", "b": "*bf16", "out": "*fp32", "start": "i64", "count": "i64"}
    yield Variant(sound_kernel, sound, block, {"num_warps": 4}, ("wide_loads", "wide_stores", "matrix"))
    narrow = {"a": "*fp32", "out": "*fp32", "stride": "i64"}
    yield Variant(narrow_kernel, narrow, {"BLOCK": 1024}, {"num_warps": 4}, ("wide_loads", "matrix"))
    spilling = {"a": "*fp32", "out": "*fp32", "count": "i64"}
    yield Variant(spilling_kernel, spilling, {"BLOCK": (512 if device.warp == 64 else 256) * device.warp}, one_warp)
    yield Variant(large_kernel, {"a": "*fp32", "out": "*fp32"}, {"BLOCK": 256}, {"num_warps": 1024 // device.warp})
    yield Variant(wrong_kernel, {"a": "*fp32"}, block, one_warp)
    if device.arch == "gfx942":
        yield Variant(Deadly(), {}, {}, one_warp)

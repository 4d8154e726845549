"""Tiles of a row of logits, as the kernels of token statistics read them.

A thread has `VEC` neighbours, 16 bytes, of each of `UNROLL` vectors of a tile. Which entries these are depends on the
tile alone, not on how the row lies in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from r1kernels.triton.common import ALIGNED, UNIT_STRIDE, entries, widened, word_entries

# Shapes decide which thread has which entry. Loads are of (THREADS, VEC) in vectors, or of (THREADS,): the compiler
# can only give a row of either to one thread, and joins of tensors stay in a thread.


@triton.jit
def columns(THREADS: tl.constexpr, UNROLL: tl.constexpr, VEC: tl.constexpr):
    """Where the entries of a tile are, seen from its first: vector u of a thread is THREADS * VEC after u - 1."""
    entry = tl.arange(0, VEC * UNROLL)[None, :]
    first = tl.arange(0, THREADS)[:, None] * VEC
    return first + entry // UNROLL + entry % UNROLL * (THREADS * VEC)


@triton.jit
def _joined(a, b, c, d, UNROLL: tl.constexpr):
    """The entries of up to four vectors, those of one place in the vectors next to each other."""
    if UNROLL == 4:
        x = tl.join(tl.join(a, c), tl.join(b, d))
    elif UNROLL == 2:
        x = tl.join(a, b)
    else:
        x = a
    return tl.reshape(x, (a.shape[0], a.shape[1] * UNROLL))


@triton.jit
def _vectors(start, at, left, THREADS: tl.constexpr, VEC: tl.constexpr, MASKED: tl.constexpr):
    """float32 of a vector for each thread; with MASKED -inf beyond `left` entries, which are whole vectors."""
    first = tl.arange(0, THREADS)[:, None] * VEC
    if start.dtype.element_ty == tl.bfloat16:
        pointers = word_entries(start, at, first // 2 + tl.arange(0, VEC // 2)[None, :])
        if MASKED:
            words = tl.load(pointers, mask=first < left, other=-8323200)  # 0xff80 twice: -inf
        else:
            words = tl.load(pointers)
        x = widened(words)
    else:
        pointers = entries(start, at, first + tl.arange(0, VEC)[None, :], 1, ALIGNED)
        if MASKED:
            x = tl.load(pointers, mask=first < left, other=float("-inf")).to(tl.float32)
        else:
            x = tl.load(pointers).to(tl.float32)
    return x


@triton.jit
def _single(
    start, at, k: tl.constexpr, stride, left, THREADS: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Entry k of each thread's vector."""
    entry = tl.arange(0, THREADS) * VEC + k
    if UNIT:
        pointers = start + at + entry
    else:
        pointers = start + (at + tl.arange(0, THREADS) * VEC).to(tl.int64) * stride + k * stride
    if MASKED:
        return tl.load(pointers, mask=entry < left, other=float("-inf")).to(tl.float32)
    else:
        return tl.load(pointers).to(tl.float32)


@triton.jit
def _singles(
    start, at, stride, left, THREADS: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr
):
    """The same entries as `_vectors`, one by one."""
    even = tl.join(
        _single(start, at, 0, stride, left, THREADS, VEC, UNIT, MASKED),
        _single(start, at, VEC // 2, stride, left, THREADS, VEC, UNIT, MASKED),
    )
    odd = tl.join(
        _single(start, at, 1, stride, left, THREADS, VEC, UNIT, MASKED),
        _single(start, at, VEC // 2 + 1, stride, left, THREADS, VEC, UNIT, MASKED),
    )
    if VEC == 8:
        even = tl.join(even, tl.join(
            _single(start, at, 2, stride, left, THREADS, VEC, UNIT, MASKED),
            _single(start, at, 6, stride, left, THREADS, VEC, UNIT, MASKED),
        ))
        odd = tl.join(odd, tl.join(
            _single(start, at, 3, stride, left, THREADS, VEC, UNIT, MASKED),
            _single(start, at, 7, stride, left, THREADS, VEC, UNIT, MASKED),
        ))
    return tl.reshape(tl.join(even, odd), (THREADS, VEC))


@triton.jit
def _part(
    start, at, stride, left, THREADS: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr, MASKED: tl.constexpr
):
    """A vector of each thread from entry `at` on; with MASKED `left` entries of the row are from there on."""
    if LAYOUT == ALIGNED:
        if MASKED:
            if left % VEC == 0:
                x = _vectors(start, at, left, THREADS, VEC, MASKED)
            else:
                x = _singles(start, at, stride, left, THREADS, VEC, True, MASKED)
        else:
            x = _vectors(start, at, left, THREADS, VEC, MASKED)
    else:
        x = _singles(start, at, stride, left, THREADS, VEC, LAYOUT == UNIT_STRIDE, MASKED)
    return x


@triton.jit
def load_tile(
    start, at, stride, left, THREADS: tl.constexpr, UNROLL: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """float32 of the entries from `at` on, a multiple of VEC; with MASKED only `left` are there, and -inf beyond."""
    STEP: tl.constexpr = THREADS * VEC
    a = _part(start, at, stride, left, THREADS, VEC, LAYOUT, MASKED)
    b, c, d = a, a, a
    if UNROLL >= 2:
        b = _part(start, at + STEP, stride, left - STEP, THREADS, VEC, LAYOUT, MASKED)
    if UNROLL == 4:
        c = _part(start, at + 2 * STEP, stride, left - 2 * STEP, THREADS, VEC, LAYOUT, MASKED)
        d = _part(start, at + 3 * STEP, stride, left - 3 * STEP, THREADS, VEC, LAYOUT, MASKED)
    return _joined(a, b, c, d, UNROLL)

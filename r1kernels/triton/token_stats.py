r"""Token statistics and their gradient from logits, in one read (and one write).

A row is cut into segments of fixed size; a program reduces one segment to four float32 numbers, and a second kernel
merges a row's segments in float64, in order. Bits depend on the row alone, not on N or the device; few long rows fill
a device as well as many short ones. The token's own logit is left out of the sums and joins in the second kernel, so a
log-prob near 0 keeps its relative accuracy.

Bytes: statistics read V entries a counted token, the gradient reads and writes V; 40 bytes a token and segment more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1kernels.triton.common import (
    LN2,
    LOG2E,
    LOWEST,
    POINTERS,
    Device,
    Variant,
    checking_kernel,
    device_of,
    difference_error,
    expm1,
    kernel,
    launch,
    product_error,
    rounded,
    row_offset,
    rows_of,
    wide,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEGMENT = 32768  # entries: long enough to hide what a program costs, and part of what the bits depend on
MERGE_ROWS = 128


class Config(NamedTuple):
    """A tile is `unroll` vectors; a vector is 16 bytes for each of the num_warps x 32 (64) threads."""

    num_warps: int
    unroll: int

    def lanes(self, dtype: torch.dtype, warp: int) -> int:
        return self.num_warps * warp * 16 // dtype.itemsize


def config(shape: tuple[int, int], dtype: torch.dtype, device: Device) -> Config:
    """The tile for (N, V) logits: 16 KiB in flight for a program, in fewer warps for rows that are short."""
    short = shape[1] * dtype.itemsize < 16384
    return Config(num_warps=2 if short else 8, unroll=2)


# ---- one row -----------------------------------------------------------------------------------------------


@triton.jit
def add_tile(x, top, rest, weighted, count, c, EXACT: tl.constexpr):
    """Adds a tile (K, LANES) to the state of each lane, all relative to its maximum `top`:

    rest = sum e^{(x - top)/T}, weighted = sum e^{(x - top)/T} (x - top). With EXACT the maxima are not in `rest`, where
    their ones would cost the digits of everything else, but in `count`.
    """
    new_top = tl.maximum(top, tl.max(x, 0))
    shift = tl.maximum(top - new_top, LOWEST)
    factor = tl.exp2(shift * c)
    # In a factor of 0 the weighted sum may be 0 * inf.
    weighted = tl.where(factor == 0, 0.0, factor * (weighted + shift * (rest + count)))
    raised = new_top > top
    rest = factor * tl.where(raised, rest + count, rest)
    count = tl.where(raised, 0.0, count)
    d = x - new_top[None, :]
    e = tl.exp2(d * c)
    weighted += tl.sum(e * tl.maximum(d, LOWEST), 0)  # 0 * (-inf) = 0
    if EXACT:
        is_top = d == 0
        rest += tl.sum(tl.where(is_top, 0.0, e), 0)
        count += tl.sum(is_top.to(tl.float32), 0)
    else:
        rest += tl.sum(e, 0)
    return new_top, rest, weighted, count


@kernel
def segment_kernel(
    logits, misalignment: tl.int64, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64,
    vocab_stride: tl.int64, token_ids, mask, temperatures, temperature: tl.float64, partials, count: tl.int64,
    vocab: tl.int64, segments: tl.int64,
    SEGMENT: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, VEC: tl.constexpr, UNIT_STRIDE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """partials (4, segments, N): maximum, sum beside the maxima, weighted sum and number of maxima of a segment."""
    pid = tl.program_id(0)
    n = (pid // segments).to(tl.int64)
    segment = (pid % segments).to(tl.int64)
    if mask is not None:
        if not tl.load(mask + n):
            return
    row = logits + row_offset(n, inner, outer_stride, inner_stride)
    target = tl.load(token_ids + n)
    c = (LOG2E / _temperature(temperature, temperatures, n)).to(tl.float32)
    lanes = tl.arange(0, LANES)
    top = tl.full((LANES,), LOWEST, tl.float32)
    rest = tl.zeros((LANES,), tl.float32)
    weighted = tl.zeros((LANES,), tl.float32)
    maxima = tl.zeros((LANES,), tl.float32)
    TILE: tl.constexpr = LANES * UNROLL
    cols = tl.arange(0, UNROLL)[:, None] * LANES + lanes[None, :]

    # Aligned entries begin at `head`; those of a segment follow, and the last one takes the end of the row.
    if UNIT_STRIDE:
        head = (VEC - (misalignment + row_offset(n, inner, outer_stride, inner_stride)) % VEC) % VEC
        head = tl.minimum(head, vocab)
        body = (vocab - head) // VEC * VEC
    else:
        head = vocab * 0
        body = vocab
    begin = segment * SEGMENT
    end = tl.minimum(begin + SEGMENT, body)
    full_end = begin + tl.maximum(end - begin, 0) // TILE * TILE
    for at in range(begin, full_end, TILE):
        if UNIT_STRIDE:
            x = tl.load(tl.multiple_of(row + (head + at), 16) + cols).to(tl.float32)
        else:
            x = tl.load(row + (at + cols) * vocab_stride).to(tl.float32)
        first = head + at
        if (target >= first) & (target < first + TILE):
            x = tl.where(first + cols == target, float("-inf"), x)
        top, rest, weighted, maxima = add_tile(x, top, rest, weighted, maxima, c, EXACT)
    if full_end < end:
        inside = cols < tl.multiple_of(end - full_end, VEC if UNIT_STRIDE else 1)
        if UNIT_STRIDE:
            pointers = tl.multiple_of(row + (head + full_end), 16) + cols
        else:
            pointers = row + (full_end + cols) * vocab_stride
        x = tl.load(pointers, mask=inside, other=float("-inf")).to(tl.float32)
        x = tl.where(head + full_end + cols == target, float("-inf"), x)
        top, rest, weighted, maxima = add_tile(x, top, rest, weighted, maxima, c, EXACT)
    if UNIT_STRIDE:
        if segment == 0:  # what lies before and after the aligned part: fewer than 2 VEC entries
            edge = tl.where(lanes < head, lanes, head + body + lanes - head)[None, :]
            inside = (edge < vocab) & (edge != target)
            x = tl.load(row + edge, mask=inside, other=float("-inf")).to(tl.float32)
            top, rest, weighted, maxima = add_tile(x, top, rest, weighted, maxima, c, EXACT)

    highest = tl.max(top, 0)
    shift = tl.maximum(top - highest, LOWEST)
    factor = tl.exp2(shift * c)
    is_highest = top == highest
    beside = tl.where(is_highest, rest, factor * (rest + maxima))
    total_weighted = tl.where(factor == 0, 0.0, factor * (weighted + shift * (rest + maxima)))
    out = partials + segment * count + n
    plane = segments * count
    tl.store(out, highest)
    tl.store(out + plane, tl.sum(beside, 0))
    tl.store(out + 2 * plane, tl.sum(total_weighted, 0))
    tl.store(out + 3 * plane, tl.sum(tl.where(is_highest, maxima, 0.0), 0))


@triton.jit
def _temperature(temperature, temperatures, n):
    """T of token n in float64."""
    t = wide(temperature)
    if temperatures is not None:
        t = t * tl.load(temperatures + n).to(tl.float64)
    return t


@checking_kernel
def merge_kernel(
    logits, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64, vocab_stride: tl.int64, token_ids, mask,
    temperatures, temperature: tl.float64, partials, logprobs, lse, entropy, count: tl.int64, vocab: tl.int64,
    segments: tl.int64, BLOCK: tl.constexpr,
):
    """The segments of BLOCK rows and their tokens' own logits -> log-prob, log-sum-exp, entropy."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counts = n < count
    if mask is not None:
        counts = counts & tl.load(mask + n, mask=counts, other=0).to(tl.int1)
    target = tl.load(token_ids + n, mask=counts, other=0)
    known = (target >= 0) & (target < vocab)
    tl.device_assert(known, "r1kernels: token_ids holds an id outside [0, V)")
    t = wide(temperature)
    if temperatures is not None:
        t = t * tl.load(temperatures + n, mask=counts, other=1).to(tl.float64)
    own = row_offset(n, inner, outer_stride, inner_stride) + target * vocab_stride
    x = tl.load(logits + own, mask=counts & known, other=0).to(tl.float64)
    c = (LOG2E / t).to(tl.float32).to(tl.float64)  # what the segments were summed with

    plane = segments * count
    top = x
    for s in range(0, segments):
        top = tl.maximum(top, tl.load(partials + s * count + n, mask=counts, other=0).to(tl.float64))
    d = tl.where(x == top, 0.0, x - top)
    e = tl.exp2(d * c)
    total, weighted = e, tl.where(e == 0, 0.0, e * d)
    for s in range(0, segments):
        at = partials + s * count + n
        shift = tl.load(at, mask=counts, other=0).to(tl.float64) - top
        factor = tl.exp2(shift * c)
        part = tl.load(at + plane, mask=counts, other=0).to(tl.float64)
        part += tl.load(at + 3 * plane, mask=counts, other=0).to(tl.float64)
        part_weighted = tl.load(at + 2 * plane, mask=counts, other=0).to(tl.float64)
        total += factor * part
        weighted += tl.where(factor == 0, 0.0, factor * (part_weighted + shift * part))
    mean = weighted / total  # sum_j p_j (x_j - top)
    log_total = tl.log(total)
    # The sums are those of a temperature that is log2(e) / c: a rounding away, and the logarithm's slope is the mean.
    log_sum = log_total + (1 / t - c * LN2) * mean
    result = x / t
    value_lse = top / t + log_sum
    logprob = tl.where(x == top, -log_sum, result - value_lse)
    keep = n < count
    tl.store(logprobs + n, tl.where(counts, logprob, 0.0).to(tl.float32), mask=keep)
    tl.store(lse + n, tl.where(counts, value_lse, 0.0), mask=keep)
    tl.store(entropy + n, tl.where(counts, log_total - mean * c * LN2, 0.0), mask=keep)


# ---- gradient ----------------------------------------------------------------------------------------------

r"""Token statistics from logits, in one read.

A row is cut into segments of fixed size; a program reduces one segment to four float32 numbers, and a second kernel
merges the segments of a row in float64, in order. Bits depend on the row and the tile, not on N; few long rows fill
a device as well as many short ones. The token's own logit is left out of the sums and joins in the second kernel, so a
log-prob near 0 keeps its relative accuracy.

Bytes: V entries a counted token, and 32 more for each of its segments; rows behind the mask are not read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1kernels.triton.common import (
    ALIGNED,
    LN2,
    LOG2E,
    LOWEST,
    POINTERS,
    STRIDED,
    UNIT_STRIDE,
    Device,
    Rows,
    Variant,
    checking_kernel,
    device_of,
    difference_error,
    entries,
    kernel,
    launch,
    optional,
    product_error,
    row_offset,
    rows_of,
    signature,
    wide,
)
from r1kernels.triton.tables import SIZES, tuned

LAYOUTS = (ALIGNED.value, UNIT_STRIDE.value, STRIDED.value)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEGMENT = 32768  # entries: long enough to hide what a program costs, and part of what the bits depend on
MERGE_ROWS, MERGE_WARPS = 128, 4


class Config(NamedTuple):
    """A tile is `unroll` vectors; a vector is 16 bytes for each of the num_warps x 32 (64) threads."""

    num_warps: int
    unroll: int

    def constants(self, dtype: torch.dtype, device: Device, layout: int) -> dict[str, int]:
        """Pointers of 64 bits to single entries take the registers of half a tile."""
        vec = 16 // dtype.itemsize
        unroll = max(self.unroll // 2, 1) if layout == STRIDED.value else self.unroll
        return {"LANES": self.num_warps * device.warp * vec, "UNROLL": unroll, "VEC": vec, "LAYOUT": layout}


def config(shape: tuple[int, int], dtype: torch.dtype, device: Device) -> Config:
    """The tile for (N, V) logits: 64 bytes in flight for a thread, in few enough registers for several programs.

    With 64 threads in a warp the registers allow half of that.
    """
    if (measured := tuned("token_stats", device.name, dtype, shape[1])) is not None:
        return Config(**measured)
    return Config(num_warps=8, unroll=4 if device.warp == 32 else 2)


def configs(dtype: torch.dtype, device: Device) -> list[Config]:
    """All that `config` gives on a device: measured ones may differ with the vocabulary."""
    return list(dict.fromkeys(config((1, size), dtype, device) for size in SIZES))


def search_space(device: Device) -> list[Config]:
    """What benchmarks/tune.py tries."""
    return [Config(num_warps, unroll) for num_warps in (4, 8, 16) for unroll in (1, 2, 4)]


# ---- one row -----------------------------------------------------------------------------------------------


@triton.jit
def exp2_of_product(d, c, c_rest, lost, EXACT: tl.constexpr):
    """2^(d (c + c_rest) + lost) with a small `lost`; EXACT keeps what rounding d c loses, else c_rest is left out."""
    power = d * c
    if EXACT:
        lost += product_error(d, c, power) + d * c_rest
        e = tl.exp2(power)
        return e + e * (lost * LN2)
    else:
        return tl.exp2(power + lost)


@triton.jit
def below(x, top, c, c_rest, EXACT: tl.constexpr):
    """x - top, finite for an x of -inf (0 times it is 0), and e^{(x - top)/T}."""
    if EXACT:
        lowest = top - 1000.0 / c  # 2^-1000 is 0, and nothing on the way is inf - inf
        x = tl.where(x < lowest, lowest, x)  # NaN stays
        d = x - top
        return d, exp2_of_product(d, c, c_rest, difference_error(x, top, d) * c, EXACT)
    else:
        d = x - top
        return tl.maximum(d, LOWEST), exp2_of_product(d, c, c_rest, 0.0, EXACT)


@triton.jit
def add_tile(x, top, rest, weighted, count, c, c_rest, EXACT: tl.constexpr):
    """Adds a tile (K, LANES) to the state of each lane, all relative to its maximum `top`:

    rest = sum e^{(x - top)/T}, weighted = sum e^{(x - top)/T} (x - top). With EXACT the maxima are not in `rest`, where
    their ones would cost the digits of everything else, but in `count`.
    """
    new_top = tl.maximum(top, tl.max(x, 0))
    shift, factor = below(top, new_top, c, c_rest, EXACT)
    # In a factor of 0 the weighted sum may be 0 * inf.
    weighted = tl.where(factor == 0, 0.0, factor * (weighted + shift * (rest + count)))
    raised = new_top > top
    rest = factor * tl.where(raised, rest + count, rest)
    count = tl.where(raised, 0.0, count)
    d, e = below(x, new_top[None, :], c, c_rest, EXACT)
    weighted += tl.sum(e * d, 0)
    if EXACT:
        rest += tl.sum(tl.where(d == 0, 0.0, e), 0)
        count += tl.sum((x == new_top[None, :]).to(tl.float32), 0)  # not an -inf that was raised to the lowest number
    else:
        rest += tl.sum(e, 0)
    return new_top, rest, weighted, count


@triton.jit
def temperature_of(temperature, temperatures, many, n):
    """T of token n in float64; there is one for each where `many` is not 0."""
    t = wide(temperature)
    if many != 0:
        t = t * tl.load(temperatures + n).to(tl.float64)
    return t


@triton.jit
def add_tiles(
    row, begin, end, cols, vocab_stride, top, rest, weighted, count, c, c_rest, TILE: tl.constexpr,
    LAYOUT: tl.constexpr, EXACT: tl.constexpr,
):
    """Adds whole tiles from `begin` to `end`."""
    for at in range(begin, end, TILE):
        x = tl.load(entries(row, at, cols, vocab_stride, LAYOUT)).to(tl.float32)
        top, rest, weighted, count = add_tile(x, top, rest, weighted, count, c, c_rest, EXACT)
    return top, rest, weighted, count


@kernel
def segment_kernel(
    logits, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64, vocab_stride: tl.int64, token_ids, mask,
    masked: tl.int64, temperatures, many: tl.int64, temperature: tl.float64, partials, count: tl.int64, vocab: tl.int64,
    segments: tl.int64,
    SEGMENT: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
    EXACT: tl.constexpr,
):
    """partials (4, segments, N): maximum, sum beside the maxima, weighted sum and number of maxima of a segment."""
    pid = tl.program_id(0)
    n = (pid // segments).to(tl.int64)
    segment = (pid % segments).to(tl.int64)
    if masked != 0:
        if not tl.load(mask + n):
            return
    row = logits + row_offset(n, inner, outer_stride, inner_stride)
    target = tl.load(token_ids + n)
    scale = 1 / temperature_of(temperature, temperatures, many, n) * LOG2E
    c = scale.to(tl.float32)
    c_rest = (scale - c).to(tl.float32)
    TILE: tl.constexpr = LANES * UNROLL
    cols = tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    top = tl.full((LANES,), LOWEST, tl.float32)
    rest = tl.zeros((LANES,), tl.float32)
    weighted = tl.zeros((LANES,), tl.float32)
    maxima = tl.zeros((LANES,), tl.float32)

    begin = segment * SEGMENT
    end = tl.minimum(begin + SEGMENT, vocab)
    full_end = begin + (end - begin) // TILE * TILE
    # The tile with the token apart: elsewhere, looking for it would cost a sixth of the arithmetic.
    own = full_end
    if (target >= begin) & (target < full_end):
        own = begin + (target - begin) // TILE * TILE
    top, rest, weighted, maxima = add_tiles(
        row, begin, own, cols, vocab_stride, top, rest, weighted, maxima, c, c_rest, TILE, LAYOUT, EXACT
    )
    if own < full_end:
        x = tl.load(entries(row, own, cols, vocab_stride, LAYOUT)).to(tl.float32)
        x = tl.where(cols == (target - own).to(tl.int32), float("-inf"), x)
        top, rest, weighted, maxima = add_tile(x, top, rest, weighted, maxima, c, c_rest, EXACT)
    top, rest, weighted, maxima = add_tiles(
        row, own + TILE, full_end, cols, vocab_stride, top, rest, weighted, maxima, c, c_rest, TILE, LAYOUT, EXACT
    )
    if full_end < end:
        left = (end - full_end).to(tl.int32)
        if (LAYOUT == ALIGNED) & (left % VEC == 0):
            inside = cols < tl.multiple_of(left // VEC * VEC, VEC)
            at = entries(row, full_end, cols, vocab_stride, LAYOUT)
            x = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
        else:  # entry by entry, in the same lanes: bits do not depend on alignment
            at = row + full_end * vocab_stride + cols * vocab_stride
            x = tl.load(at, mask=cols < left, other=float("-inf")).to(tl.float32)
        x = tl.where(cols == (target - full_end).to(tl.int32), float("-inf"), x)
        top, rest, weighted, maxima = add_tile(x, top, rest, weighted, maxima, c, c_rest, EXACT)

    highest = tl.max(top, 0)
    shift, factor = below(top, highest, c, c_rest, EXACT)
    is_highest = top == highest
    beside = tl.where(is_highest, rest, factor * (rest + maxima))
    total_weighted = tl.where(factor == 0, 0.0, factor * (weighted + shift * (rest + maxima)))
    out = partials + segment * count + n
    plane = segments * count
    tl.store(out, highest)
    tl.store(out + plane, tl.sum(beside, 0))
    tl.store(out + 2 * plane, tl.sum(total_weighted, 0))
    tl.store(out + 3 * plane, tl.sum(tl.where(is_highest, maxima, 0.0), 0))


@checking_kernel
def merge_kernel(
    logits, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64, vocab_stride: tl.int64, token_ids, mask,
    masked: tl.int64, temperatures, many: tl.int64, temperature: tl.float64, partials, logprobs, lse, entropy,
    count: tl.int64, vocab: tl.int64, segments: tl.int64, BLOCK: tl.constexpr, EXACT: tl.constexpr,
):
    """The segments of BLOCK rows and their tokens' own logits -> log-prob, log-sum-exp, entropy."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counts = n < count
    if masked != 0:
        counts = counts & tl.load(mask + n, mask=counts, other=0).to(tl.int1)
    target = tl.load(token_ids + n, mask=counts, other=0)
    known = (target >= 0) & (target < vocab)
    tl.device_assert(known, "r1kernels: token_ids holds an id outside [0, V)")
    t = tl.full((BLOCK,), temperature, tl.float64)
    if many != 0:
        t = t * tl.load(temperatures + n, mask=counts, other=1).to(tl.float64)
    own = row_offset(n, inner, outer_stride, inner_stride) + target * vocab_stride
    x = tl.load(logits + own, mask=counts & known, other=0).to(tl.float64)
    c = 1 / t * LOG2E
    if not EXACT:
        c = c.to(tl.float32).to(tl.float64)  # what the segments were summed with

    plane = segments * count
    top = x
    for s in range(0, segments):
        top = tl.maximum(top, tl.load(partials + s * count + n, mask=counts, other=0).to(tl.float64))
    d = x - top  # of a token at +inf NaN, as all of its row is
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
    log_sum = log_total + tl.where(total == 0, 0.0, (1 / t - c * LN2) * mean)  # no word at all: -inf
    result = x / t
    value_lse = top / t + log_sum
    logprob = tl.where(x == top, -log_sum, result - value_lse)
    keep = n < count
    tl.store(logprobs + n, tl.where(counts, logprob, 0.0).to(tl.float32), mask=keep)
    tl.store(lse + n, tl.where(counts, value_lse, 0.0), mask=keep)
    tl.store(entropy + n, tl.where(counts, log_total - mean * c * LN2, 0.0), mask=keep)


# ---- launchers ---------------------------------------------------------------------------------------------


def launch_segments(
    rows: Rows, token_ids: Tensor, mask: tuple[Tensor, int], temperatures: tuple[Tensor, int], temperature: float,
    partials: Tensor,
) -> None:
    """`segment_kernel` on all rows; token ids of -1 leave nothing out of the sums."""
    logits, device, segments = rows.data, device_of(rows.data), partials.shape[1]
    chosen = config((rows.count, rows.vocab), logits.dtype, device)
    launch(
        segment_kernel, (rows.count * segments,), logits, *rows.arguments(), token_ids, *mask, *temperatures,
        temperature, partials, rows.count, rows.vocab, segments, num_warps=chosen.num_warps, SEGMENT=SEGMENT,
        EXACT=logits.dtype == torch.float32, **chosen.constants(logits.dtype, device, rows.layout),
    )


def token_stats(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, temperatures: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, shape = rows_of(logits), logits.shape[:-1]
    logprobs = torch.empty(shape, dtype=torch.float32, device=logits.device)
    lse = torch.empty(shape, dtype=torch.float64, device=logits.device)
    entropy = torch.empty(shape, dtype=torch.float64, device=logits.device)
    segments = triton.cdiv(rows.vocab, SEGMENT)
    partials = torch.empty((4, segments, rows.count), dtype=torch.float32, device=logits.device)
    masking = optional(mask, torch.bool, token_ids)
    tempering = optional(temperatures, torch.float32, token_ids)
    tokens = (token_ids, *masking, *tempering)
    launch_segments(rows, token_ids, masking, tempering, temperature, partials)
    launch(
        merge_kernel, (triton.cdiv(rows.count, MERGE_ROWS),), logits, *rows.arguments(), *tokens, temperature, partials,
        logprobs, lse, entropy, rows.count, rows.vocab, segments, num_warps=MERGE_WARPS, BLOCK=MERGE_ROWS,
        EXACT=logits.dtype == torch.float32,
    )
    return logprobs, lse, entropy


def variants(device: Device) -> Iterator[Variant]:
    """Every compilation that a launch above can ask for."""
    tokens = {"token_ids": "*i64", "mask": "*i1", "temperatures": "*fp32", "partials": "*fp32"}
    for dtype in DTYPES:
        exact = dtype == torch.float32
        for chosen, layout in itertools.product(configs(dtype, device), LAYOUTS):
            yield Variant(
                segment_kernel,
                signature(segment_kernel, logits=POINTERS[dtype], **tokens),
                {"SEGMENT": SEGMENT, "EXACT": exact, **chosen.constants(dtype, device, layout)},
                {"num_warps": chosen.num_warps, "num_stages": 1},
                ("wide_loads",) if layout == ALIGNED.value else (),
            )
        yield Variant(
            merge_kernel,
            signature(merge_kernel, logits=POINTERS[dtype], logprobs="*fp32", lse="*fp64", entropy="*fp64", **tokens),
            {"BLOCK": MERGE_ROWS, "EXACT": exact},
            {"num_warps": MERGE_WARPS, "num_stages": 1},
        )

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
    expm1,
    kernel,
    launch,
    optional,
    product_error,
    rounded,
    row_offset,
    rows_of,
    wide,
)

LAYOUTS = (ALIGNED.value, UNIT_STRIDE.value, STRIDED.value)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEGMENT = 32768  # entries: long enough to hide what a program costs, and part of what the bits depend on
MERGE_ROWS, MERGE_WARPS = 128, 4


class Config(NamedTuple):
    """A tile is `unroll` vectors; a vector is 16 bytes for each of the num_warps x 32 (64) threads."""

    num_warps: int
    unroll: int

    def constants(self, dtype: torch.dtype, device: Device) -> dict[str, int]:
        vec = 16 // dtype.itemsize
        return {"LANES": self.num_warps * device.warp * vec, "UNROLL": self.unroll, "VEC": vec}


def config(shape: tuple[int, int], dtype: torch.dtype, device: Device) -> Config:
    """The tile for (N, V) logits: 64 bytes in flight for a thread, in few enough registers for several programs."""
    return Config(num_warps=8, unroll=4)


# ---- one row -----------------------------------------------------------------------------------------------


@triton.jit
def exp2_of_product(d, c, c_rest, lost, EXACT: tl.constexpr):
    """2^(d (c + c_rest) + lost) with a small `lost`; EXACT keeps what rounding d c loses, else c_rest is left out."""
    power = d * c
    if EXACT:
        lost += product_error(d, c, power) + d * c_rest
        lost = tl.where(power > -1000.0, lost, 0.0)  # inf - inf
        e = tl.exp2(power)
        return e + e * (lost * LN2)
    else:
        return tl.exp2(power + lost)


@triton.jit
def add_tile(x, top, rest, weighted, count, c, c_rest, EXACT: tl.constexpr):
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
    lost = 0.0
    if EXACT:
        lost = difference_error(x, new_top[None, :], d) * c
    e = exp2_of_product(d, c, c_rest, lost, EXACT)
    weighted += tl.sum(e * tl.maximum(d, LOWEST), 0)  # 0 * (-inf) = 0
    if EXACT:
        is_top = d == 0
        rest += tl.sum(tl.where(is_top, 0.0, e), 0)
        count += tl.sum(is_top.to(tl.float32), 0)
    else:
        rest += tl.sum(e, 0)
    return new_top, rest, weighted, count


@triton.jit
def _temperature(temperature, temperatures, many, n):
    """T of token n in float64; there is one for each where `many` is not 0."""
    t = wide(temperature)
    if many != 0:
        t = t * tl.load(temperatures + n).to(tl.float64)
    return t


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
    scale = 1 / _temperature(temperature, temperatures, many, n) * LOG2E
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
    for at in range(begin, full_end, TILE):
        x = tl.load(entries(row, at, cols, vocab_stride, LAYOUT)).to(tl.float32)
        if (target >= at) & (target < at + TILE):
            x = tl.where(at + cols == target, float("-inf"), x)
        top, rest, weighted, maxima = add_tile(x, top, rest, weighted, maxima, c, c_rest, EXACT)
    if full_end < end:
        inside = cols < end - full_end
        if LAYOUT == ALIGNED:  # all but the last few entries, in whole vectors
            inside = cols < tl.multiple_of((end - full_end) // VEC * VEC, VEC)
        x = tl.load(entries(row, full_end, cols, vocab_stride, LAYOUT), mask=inside, other=float("-inf")).to(tl.float32)
        x = tl.where(full_end + cols == target, float("-inf"), x)
        top, rest, weighted, maxima = add_tile(x, top, rest, weighted, maxima, c, c_rest, EXACT)
        if LAYOUT == ALIGNED:
            if end % VEC != 0:
                last = end // VEC * VEC + tl.arange(0, LANES)[None, :]
                inside = (last < end) & (last != target)
                x = tl.load(row + last, mask=inside, other=float("-inf")).to(tl.float32)
                top, rest, weighted, maxima = add_tile(x, top, rest, weighted, maxima, c, c_rest, EXACT)

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


@triton.jit
def tile_gradient(
    x, cols, target, holds_target, log_sum, inv_t, c, c_rest, anchor, anchor_rest, minus_g, minus_g_rest, minus_eta,
    pivot, offset, inv_softcap, EXACT: tl.constexpr,
):
    """dL/dx_j = (g (1[j = y] - p_j) - eta p_j (log p_j + H)) / T of a tile.

    log p = (x - anchor)/T + anchor_rest with the float32 next to lse T as anchor, and log p + H = (x - pivot)/T +
    offset with a pivot of its own, because the two cancel where p is near e^{-H}. EXACT keeps what float32 rounds away.
    """
    d = x - anchor
    lost = anchor_rest
    if EXACT:
        lost += difference_error(x, anchor, d) * c
    p = exp2_of_product(d, c, c_rest, lost, EXACT)
    # 0 * (-inf) = 0
    log_p_plus_h = tl.where(p == 0, 0.0, x - pivot) * inv_t.to(tl.float32) + offset
    entropy_part = minus_eta * log_p_plus_h
    gradient = p * (minus_g + entropy_part)
    if EXACT:
        gradient += p * minus_g_rest
    if holds_target:
        # g (1 - p) cancels as p goes to 1, -g expm1(log p) does not, with a log p that was not rounded on the way.
        log_p = (x.to(tl.float64) * inv_t - log_sum).to(tl.float32)
        log_p = tl.where(log_p > 0, 0.0, log_p)  # rounding alone
        own = minus_g * expm1(log_p, p) + p * entropy_part
        gradient = tl.where(cols == target, own, gradient)
    tanh = tl.maximum(x, LOWEST) * inv_softcap  # -inf * 0 is NaN
    return gradient * ((1.0 - tanh) * (1.0 + tanh))


@kernel
def gradient_kernel(
    logits, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64, vocab_stride: tl.int64, out,
    out_inner: tl.int64, out_outer_stride: tl.int64, out_inner_stride: tl.int64, token_ids, lse, entropy, grad_logprobs,
    grad_entropy, with_entropy: tl.int64, temperatures, many: tl.int64, temperature: tl.float64,
    inv_softcap: tl.float32, rows, moved: tl.int64, vocab: tl.int64, segments: tl.int64,
    SEGMENT: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
    EXACT: tl.constexpr, WHOLE_ROW: tl.constexpr,
):
    """A segment of a row. `out` may be the logits' own memory: with entries of the same size a thread overwrites what
    it has read itself; narrower ones land on entries before them, so one program walks the WHOLE_ROW upwards."""
    pid = tl.program_id(0)
    r = (pid // segments).to(tl.int64)
    segment = (pid % segments).to(tl.int64)
    n = r
    if moved != 0:
        n = tl.load(rows + r)
    out_row = out + row_offset(r, out_inner, out_outer_stride, out_inner_stride)
    row = logits + row_offset(n, inner, outer_stride, inner_stride)
    OUT_LAYOUT: tl.constexpr = ALIGNED if LAYOUT == ALIGNED else UNIT_STRIDE
    TILE: tl.constexpr = LANES * UNROLL
    cols = tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    begin = segment * SEGMENT
    end = vocab
    if not WHOLE_ROW:
        end = tl.minimum(begin + SEGMENT, vocab)
    full_end = begin + (end - begin) // TILE * TILE
    left = cols < end - full_end
    if LAYOUT == ALIGNED:
        left = cols < tl.multiple_of((end - full_end) // VEC * VEC, VEC)
    last = end // VEC * VEC + tl.arange(0, LANES)[None, :]

    dtype: tl.constexpr = out.dtype.element_ty
    g = tl.load(grad_logprobs + n)
    eta = g * 0
    if with_entropy != 0:
        eta = tl.load(grad_entropy + n)
    if (g == 0) & (eta == 0):  # masked or clipped: the row is not read, so nothing in it can matter
        zeros = tl.zeros((UNROLL, LANES), dtype)
        for at in range(begin, full_end, TILE):
            tl.store(entries(out_row, at, cols, 1, OUT_LAYOUT), zeros)
        if full_end < end:
            tl.store(entries(out_row, full_end, cols, 1, OUT_LAYOUT), zeros, mask=left)
            if LAYOUT == ALIGNED:
                tl.store(out_row + last, tl.zeros((1, LANES), dtype), mask=last < end)
        return

    target = tl.load(token_ids + n)
    t = _temperature(temperature, temperatures, many, n)
    log_sum, h = tl.load(lse + n), tl.load(entropy + n)
    inv_t = 1 / t
    scale = inv_t * LOG2E
    c = scale.to(tl.float32)
    c_rest = (scale - c).to(tl.float32)
    anchor = (log_sum * t).to(tl.float32)
    anchor_rest = ((anchor - log_sum * t) * scale).to(tl.float32)
    pivot = ((log_sum - h) * t).to(tl.float32)
    offset = ((pivot - (log_sum - h) * t) * inv_t).to(tl.float32)
    minus_g = (-g * inv_t).to(tl.float32)
    minus_g_rest = (-g * inv_t - minus_g).to(tl.float32)
    minus_eta = (-eta * inv_t).to(tl.float32)

    for at in range(begin, full_end, TILE):
        x = tl.load(entries(row, at, cols, vocab_stride, LAYOUT)).to(tl.float32)
        gradient = tile_gradient(
            x, at + cols, target, (target >= at) & (target < at + TILE), log_sum, inv_t, c, c_rest, anchor, anchor_rest,
            minus_g, minus_g_rest, minus_eta, pivot, offset, inv_softcap, EXACT,
        )
        if WHOLE_ROW:
            tl.debug_barrier()  # every thread has read this tile, and those before it
        tl.store(entries(out_row, at, cols, 1, OUT_LAYOUT), rounded(gradient, dtype))
    if full_end < end:
        x = tl.load(entries(row, full_end, cols, vocab_stride, LAYOUT), mask=left, other=0).to(tl.float32)
        gradient = tile_gradient(
            x, full_end + cols, target, target >= full_end, log_sum, inv_t, c, c_rest, anchor, anchor_rest, minus_g,
            minus_g_rest, minus_eta, pivot, offset, inv_softcap, EXACT,
        )
        if LAYOUT == ALIGNED:
            x = tl.load(row + last, mask=last < end, other=0).to(tl.float32)
            few = tile_gradient(
                x, last, target, target >= full_end, log_sum, inv_t, c, c_rest, anchor, anchor_rest, minus_g,
                minus_g_rest, minus_eta, pivot, offset, inv_softcap, EXACT,
            )
        if WHOLE_ROW:
            tl.debug_barrier()
        tl.store(entries(out_row, full_end, cols, 1, OUT_LAYOUT), rounded(gradient, dtype), mask=left)
        if LAYOUT == ALIGNED:
            tl.store(out_row + last, rounded(few, dtype), mask=last < end)


# ---- launchers ---------------------------------------------------------------------------------------------


def token_stats(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, temperatures: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, shape, device = rows_of(logits), logits.shape[:-1], device_of(logits)
    logprobs = torch.empty(shape, dtype=torch.float32, device=logits.device)
    lse = torch.empty(shape, dtype=torch.float64, device=logits.device)
    entropy = torch.empty(shape, dtype=torch.float64, device=logits.device)
    chosen = config((rows.count, rows.vocab), logits.dtype, device)
    segments = triton.cdiv(rows.vocab, SEGMENT)
    partials = torch.empty((4, segments, rows.count), dtype=torch.float32, device=logits.device)
    tokens = (token_ids, *optional(mask, torch.bool, token_ids), *optional(temperatures, torch.float32, token_ids))
    launch(
        segment_kernel, (rows.count * segments,), logits, *rows.arguments(), *tokens, temperature, partials, rows.count,
        rows.vocab, segments, num_warps=chosen.num_warps, SEGMENT=SEGMENT, LAYOUT=rows.layout,
        EXACT=logits.dtype == torch.float32, **chosen.constants(logits.dtype, device),
    )
    launch(
        merge_kernel, (triton.cdiv(rows.count, MERGE_ROWS),), logits, *rows.arguments(), *tokens, temperature, partials,
        logprobs, lse, entropy, rows.count, rows.vocab, segments, num_warps=MERGE_WARPS, BLOCK=MERGE_ROWS,
        EXACT=logits.dtype == torch.float32,
    )
    return logprobs, lse, entropy


def token_stats_backward(
    logits: Tensor, token_ids: Tensor, lse: Tensor, entropy: Tensor, grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None, temperature: float,
) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    slopes = (grad_logprobs, grad_entropy)
    _gradient(rows_of(logits), rows_of(out), token_ids, lse, entropy, *slopes, temperature, None, 0.0, None)
    return out


def token_stats_backward_out(
    logits: Tensor, token_ids: Tensor, lse: Tensor, entropy: Tensor, grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None, temperature: float, temperatures: Tensor | None, softcap: float, rows: Tensor | None,
    out: Tensor,
) -> None:
    source, target = rows_of(logits), rows_of(out)
    if target.vocab_stride != 1:
        raise ValueError(f"out has stride {target.vocab_stride} over the vocabulary, expected 1")
    shared = logits.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
    if shared and rows is not None:
        raise ValueError("rows was given with an out in the memory of logits, expected memory of its own")
    if rows is not None:
        target = target._replace(count=len(rows))
    _gradient(
        source, target, token_ids, lse, entropy, grad_logprobs, grad_entropy, temperature, temperatures, softcap, rows
    )


def _gradient(
    source: Rows, target: Rows, token_ids: Tensor, lse: Tensor, entropy: Tensor, grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None, temperature: float, temperatures: Tensor | None, softcap: float, rows: Tensor | None,
) -> None:
    logits, out = source.data, target.data
    device = device_of(logits)
    chosen = config((target.count, source.vocab), logits.dtype, device)
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(grad_entropy)
    whole = out.dtype.itemsize < logits.dtype.itemsize
    layout = source.layout
    if layout == ALIGNED.value and target.layout != layout:
        layout = UNIT_STRIDE.value
    segments = 1 if whole else triton.cdiv(source.vocab, SEGMENT)
    launch(
        gradient_kernel, (target.count * segments,), logits, *source.arguments(), out, target.inner,
        target.outer_stride, target.inner_stride, token_ids, lse, entropy, grad_logprobs,
        *optional(grad_entropy, torch.float32, token_ids), *optional(temperatures, torch.float32, token_ids),
        temperature, 1 / softcap if softcap > 0 else 0.0, *optional(rows, torch.int64, token_ids), source.vocab,
        segments, num_warps=chosen.num_warps, SEGMENT=SEGMENT, LAYOUT=layout,
        EXACT=out.dtype == torch.float32, WHOLE_ROW=whole, **chosen.constants(logits.dtype, device),
    )


def variants(device: Device) -> Iterator[Variant]:
    """Every compilation that a launch above can ask for."""
    rows = {"inner": "i64", "outer_stride": "i64", "inner_stride": "i64", "vocab_stride": "i64"}
    tokens = {
        "token_ids": "*i64", "mask": "*i1", "masked": "i64", "temperatures": "*fp32", "many": "i64",
        "temperature": "fp64", "vocab": "i64", "segments": "i64",
    }
    for dtype in DTYPES:
        logits = {"logits": POINTERS[dtype], **rows}
        chosen = config((1, 1), dtype, device)
        options, constants = {"num_warps": chosen.num_warps, "num_stages": 1}, chosen.constants(dtype, device)
        for layout in LAYOUTS:
            yield Variant(
                segment_kernel,
                {**logits, **tokens, "partials": "*fp32", "count": "i64"},
                {"SEGMENT": SEGMENT, "LAYOUT": layout, "EXACT": dtype == torch.float32, **constants},
                options,
                ("wide_loads",) if layout == ALIGNED.value else (),
            )
        statistics = {"partials": "*fp32", "logprobs": "*fp32", "lse": "*fp64", "entropy": "*fp64", "count": "i64"}
        yield Variant(
            merge_kernel, {**logits, **tokens, **statistics}, {"BLOCK": MERGE_ROWS, "EXACT": dtype == torch.float32},
            {"num_warps": MERGE_WARPS, "num_stages": 1},
        )
        for narrow in DTYPES if dtype == torch.float32 else (dtype,):
            for layout in LAYOUTS:
                yield Variant(
                    gradient_kernel,
                    {
                        **logits, **tokens, "out": POINTERS[narrow], "out_inner": "i64", "out_outer_stride": "i64",
                        "out_inner_stride": "i64", "lse": "*fp64", "entropy": "*fp64", "grad_logprobs": "*fp32",
                        "grad_entropy": "*fp32", "with_entropy": "i64", "inv_softcap": "fp32", "rows": "*i64",
                        "moved": "i64",
                    },
                    {
                        "SEGMENT": SEGMENT, "LAYOUT": layout, "EXACT": narrow == torch.float32,
                        "WHOLE_ROW": narrow.itemsize < dtype.itemsize, **constants,
                    },
                    options,
                    ("wide_loads", "wide_stores") if layout == ALIGNED.value else (),
                )

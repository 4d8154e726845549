"""Kernels of the linear statistics: a run of tiles of the product to three numbers a row, and the merge of the runs.

What they make of a head, and how programs and tiles are ordered, is in linear_statistics.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from r1kernels.triton.common import LN2, LOG2E, LOWEST, UPCAST, checking_kernel, expm1, kernel, only_if, wide

# ---- a tile ------------------------------------------------------------------------------------------------


@triton.jit
def _tanh(x):
    """tanh in float32, accurate near 0: -m / (2 + m) with m = e^{-2|x|} - 1."""
    y = -2.0 * tl.abs(x)
    m = expm1(y, tl.exp2(y * LOG2E))
    m = -m / (2.0 + m)
    return tl.where(x < 0, -m, m)


@triton.jit
def _temperature(temperature, temperatures, many, n, counts):
    """T of tokens n in float64."""
    own = tl.load(temperatures + n, mask=only_if(many, counts), other=1.0)
    return wide(temperature) * own.to(tl.float64)


@triton.jit
def _exponent(t):
    """log2(e) / T, rounded: e^{d / T} = 2^{c d}."""
    return (1.0 / t * LOG2E).to(tl.float32)


@triton.jit
def _add_tile(x, top, total, weighted, c):
    """Adds a tile to each row's maximum, sum e^{(x - top)/T} and weighted sum e^{(x - top)/T} (x - top)."""
    new_top = tl.maximum(top, tl.max(x, 1))
    shift = tl.maximum(top - new_top, LOWEST)
    factor = tl.exp2(shift * c)
    d = x - new_top[:, None]
    e = tl.exp2(d * c[:, None])
    # In a factor of 0 the weighted sum may be 0 * inf.
    weighted = tl.where(factor == 0, 0.0, factor * (weighted + shift * total))
    weighted += tl.sum(e * tl.maximum(d, LOWEST), 1)  # 0 * (-inf) = 0
    return new_top, factor * total + tl.sum(e, 1), weighted


@triton.jit
def _own(x, token_ids, n, counts, first_col, vocab, BLOCK_N: tl.constexpr):
    """The token's own logit of the rows that have it in this tile, 0 of the others.

    Here and below the ids are loaded again: tiles that hold a token are rare, and registers are not to be had.
    """
    col = tl.arange(0, BLOCK_N)[None, :]
    target = tl.load(token_ids + n, mask=counts, other=-1)
    at = tl.where(target < vocab, target - first_col, -1).to(tl.int32)
    return tl.sum(tl.where(col == at[:, None], x, 0.0), 1)


@triton.jit
def _leave_out(x, token_ids, n, counts, first_col, vocab, BLOCK_N: tl.constexpr):
    """x with -inf for the rows' own tokens and beyond the vocabulary."""
    col = tl.arange(0, BLOCK_N)[None, :]
    target = tl.load(token_ids + n, mask=counts, other=-1) - first_col
    return tl.where((col == target.to(tl.int32)[:, None]) | (col >= (vocab - first_col).to(tl.int32)), float("-inf"), x)


@kernel
def tiles_kernel(
    hidden, hidden_stride: tl.int64, weight, weight_stride: tl.int64, bias, biased: tl.int64, token_ids, mask,
    masked: tl.int64, temperatures, many: tl.int64, temperature: tl.float64, scale: tl.float32,
    softcap: tl.float32, partials, own, count: tl.int64, vocab: tl.int64, width: tl.int64, splits: tl.int64,
    tiles: tl.int64,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    ALIGNED: tl.constexpr, PLAIN: tl.constexpr, FLUSH: tl.constexpr,
):
    """partials (3, splits, N): maximum, sum and weighted sum of a split, without the token; own (N,): its logit.

    FLUSH: steps between two take-overs of the matrix units' accumulators into others, whose sums are rounded to
    nearest; 0 for none.
    """
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(count, BLOCK_M)
    group = pid // (GROUP * splits)
    group_rows = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = pid - group * (GROUP * splits)
    first_row = ((group * GROUP + within % group_rows) * BLOCK_M).to(tl.int32)
    split = within // group_rows

    n = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    counts = n < count
    counts = counts & (tl.load(mask + n, mask=only_if(masked, counts), other=1) != 0)
    if tl.max(counts.to(tl.int32), 0) == 0:
        return
    target = tl.load(token_ids + n, mask=counts, other=-1)
    c = _exponent(_temperature(temperature, temperatures, many, n, counts))
    begin = split * tiles * BLOCK_N
    my_tiles = tl.minimum(tiles, tl.cdiv(vocab - begin, BLOCK_N)).to(tl.int32)
    # Bit j: tile j holds the token of some row, or the end of the vocabulary, so entries of it are left out.
    tile = tl.minimum(tl.maximum(target - begin, 0) // BLOCK_N, 63)
    one = tl.full((BLOCK_M,), 1, tl.int64)
    special = tl.reduce_or(tl.where((target >= begin) & (tile < my_tiles), one << tile, 0), 0)
    holds = special
    if begin + my_tiles * BLOCK_N > vocab:
        special = special | (tl.full((), 1, tl.int64) << (my_tiles - 1))

    steps = tl.maximum(tl.cdiv(width, BLOCK_K), 1).to(tl.int32)
    k = tl.arange(0, BLOCK_K)
    rows = tl.minimum(n, count - 1)
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    own_x = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if FLUSH > 0:
        flushed = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # One loop over tiles and steps: the loads of the next tile are under way during the arithmetic of this one.
    step, j = -1, -1
    for _ in range(0, my_tiles * steps):
        step = tl.where(step == steps - 1, 0, step + 1)
        j = tl.where(step == 0, j + 1, j)
        first_col = (begin + j * BLOCK_N).to(tl.int32)
        at = step * BLOCK_K
        if TMA:  # zeros beyond the ends
            h = hidden.load([first_row, at])
            w = weight.load([first_col, at])
        else:
            words = tl.minimum(first_col.to(tl.int64) + tl.arange(0, BLOCK_N), vocab - 1)
            hidden_rows = hidden + rows[:, None] * hidden_stride + (at + k)[None, :]
            weight_rows = weight + words[:, None] * weight_stride + (at + k)[None, :]
            inside = k[None, :] < (width - at).to(tl.int32)
            if ALIGNED:
                hidden_rows, weight_rows = tl.multiple_of(hidden_rows, (1, 16)), tl.multiple_of(weight_rows, (1, 16))
                inside = k[None, :] < tl.multiple_of((width - at).to(tl.int32), 8)
            h = tl.load(hidden_rows, mask=inside, other=0.0)
            w = tl.load(weight_rows, mask=inside, other=0.0)
        if UPCAST:
            h, w = h.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(h, w.T, acc)
        if FLUSH > 0:
            if (step % FLUSH == FLUSH - 1) | (step == steps - 1):
                flushed += acc
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if step == steps - 1:
            product = flushed if FLUSH > 0 else acc
            if PLAIN:
                if ((holds >> j) & 1) != 0:
                    own_x += _own(product, token_ids, n, counts, first_col, vocab, BLOCK_N)
                # Both branches begin with the accumulators: where one only passed them on, no wait for them is made.
                if ((special >> j) & 1) != 0:
                    x = _leave_out(product, token_ids, n, counts, first_col, vocab, BLOCK_N)
                    top, total, weighted = _add_tile(x, top, total, weighted, c)
                else:
                    top, total, weighted = _add_tile(product, top, total, weighted, c)
            else:
                cols = first_col + tl.arange(0, BLOCK_N)
                b = tl.load(bias + cols, mask=only_if(biased, cols < vocab), other=0.0).to(tl.float32)
                x = product + b[None, :]
                if softcap > 0:
                    x = softcap * _tanh(x * (scale / softcap))
                if ((holds >> j) & 1) != 0:
                    own_x += _own(x, token_ids, n, counts, first_col, vocab, BLOCK_N)
                if ((special >> j) & 1) != 0:
                    x = _leave_out(x, token_ids, n, counts, first_col, vocab, BLOCK_N)
                top, total, weighted = _add_tile(x, top, total, weighted, c)
            if FLUSH > 0:
                flushed = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            else:
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    out = partials + split * count + n
    plane = splits * count
    here = (target >= begin) & (target < begin + my_tiles * BLOCK_N) & (target < vocab)
    tl.store(own + n, own_x, mask=counts & here)
    tl.store(out, top, mask=counts)
    tl.store(out + plane, total, mask=counts)
    tl.store(out + 2 * plane, weighted, mask=counts)


@checking_kernel
def merge_kernel(
    token_ids, mask, masked: tl.int64, temperatures, many: tl.int64, temperature: tl.float64, partials,
    own, logprobs, lse, entropy, count: tl.int64, vocab: tl.int64, splits: tl.int64, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The splits of BLOCK rows and their tokens' own logits -> log-prob, log-sum-exp, entropy."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = n < count
    counts = keep & (tl.load(mask + n, mask=only_if(masked, keep), other=1) != 0)
    target = tl.load(token_ids + n, mask=counts, other=0)
    known = (target >= 0) & (target < vocab)
    tl.device_assert(known, "r1kernels: token_ids holds an id outside [0, V)")
    t = _temperature(temperature, temperatures, many, n, counts)
    x = tl.load(own + n, mask=counts & known, other=0.0).to(tl.float64)
    c = _exponent(t).to(tl.float64)  # what the splits were summed with

    plane = splits * count
    top = x
    for first in range(0, splits, SPLITS):
        s = first + tl.arange(0, SPLITS)[:, None]
        inside = (s < splits) & counts[None, :]
        part_top = tl.load(partials + s * count + n[None, :], mask=inside, other=LOWEST)
        top = tl.maximum(top, tl.max(part_top, 0).to(tl.float64))
    d = x - top  # of a token at +inf NaN, as all of its row is
    e = tl.exp2(d * c)
    total, weighted = e, tl.where(e == 0, 0.0, e * d)
    for first in range(0, splits, SPLITS):
        s = first + tl.arange(0, SPLITS)[:, None]
        inside = (s < splits) & counts[None, :]
        at = partials + s * count + n[None, :]
        shift = tl.load(at, mask=inside, other=LOWEST).to(tl.float64) - top[None, :]
        factor = tl.exp2(shift * c[None, :])
        part = tl.load(at + plane, mask=inside, other=0.0).to(tl.float64)
        part_weighted = tl.load(at + 2 * plane, mask=inside, other=0.0).to(tl.float64)
        total += tl.sum(factor * part, 0)
        weighted += tl.sum(tl.where(factor == 0, 0.0, factor * (part_weighted + shift * part)), 0)
    mean = weighted / total  # sum_j p_j (x_j - top)
    log_total = tl.log(total)
    # The sums are those of a temperature that is log2(e) / c: a rounding away, and the logarithm's slope is the mean.
    log_sum = log_total + (1 / t - c * LN2) * mean
    value_lse = top / t + log_sum
    logprob = tl.where(x == top, -log_sum, x / t - value_lse)
    tl.store(logprobs + n, tl.where(counts, logprob, 0.0).to(tl.float32), mask=keep)
    tl.store(lse + n, tl.where(counts, value_lse, 0.0), mask=keep)
    tl.store(entropy + n, tl.where(counts, log_total - mean * c * LN2, 0.0), mask=keep)

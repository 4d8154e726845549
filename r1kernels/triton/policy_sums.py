"""Sums of sequences that the policy loss needs before it can weigh a token: counts, log-ratios, slopes."""

import triton
import triton.language as tl

from r1kernels.triton.common import kernel
from r1kernels.triton.objective import exponential, kl_term, product, shared_slope, single
from r1kernels.triton.sequences import pieces_of, row_of_program, spans_of_program, total_of

# Bits of `given`.
OLD, REF, ENTROPY, MASK, PACKED, WEIGHTS, NORMALIZER = (tl.constexpr(1 << k) for k in range(7))
SEQUENCE_ADVANTAGES, SEQUENCE_WEIGHTS = tl.constexpr(1 << 7), tl.constexpr(1 << 8)  # one per sequence, not per token
SUMS, SLOPES = tl.constexpr(1 << 9), tl.constexpr(1 << 10)  # sums of sequences were made
ENTROPY_GRADIENT = tl.constexpr(1 << 11)  # asked for
SHARED_SURROGATE, SHARED_KL = tl.constexpr(1 << 12), tl.constexpr(1 << 13)  # the sequence's ratio has a gradient in it


@triton.jit
def has(given, FLAG: tl.constexpr):
    return (given & FLAG) != 0


@triton.jit
def counted(t, inside, mask, given):
    if has(given, MASK):
        inside = inside & tl.load(mask + t, mask=inside, other=0).to(tl.int1)
    return inside


@triton.jit
def log_ratio(t, counts, logprob, old_logprobs, given):
    """l - l_old; without old log-probs l - l: 0, unless l is NaN or infinite, which must not pass for on-policy."""
    old = logprob
    if has(given, OLD):
        old = tl.load(old_logprobs + t, mask=counts, other=0)
    return logprob - old


@kernel
def sum_kernel(
    logprobs, old_logprobs, mask, cu_seqlens, sums, given: tl.int64, ratio: tl.int64, tokens: tl.int64,
    sequences: tl.int64, length: tl.int64, whole: tl.int64, rows: tl.int64,
    ROWS: tl.constexpr, SPAN: tl.constexpr, PIECES: tl.constexpr,
):
    """sums (2, rows): counted tokens of a piece, and the sum of their log-ratios (0 for a ratio of tokens)."""
    row = row_of_program(ROWS)
    at, end = spans_of_program(
        cu_seqlens, has(given, PACKED), tokens, sequences, length, whole, rows, ROWS, SPAN, PIECES
    )[1:]
    count = tl.zeros((ROWS,), tl.float64)
    total = tl.zeros((ROWS,), tl.float64)
    for offset in range(0, tl.max(end - at, 0), SPAN):
        t = at[:, None] + offset + tl.arange(0, SPAN)[None, :]
        counts = counted(t, t < end[:, None], mask, given)
        count += tl.sum(counts.to(tl.int32), 1).to(tl.float64)
        if ratio != 0:
            logprob = tl.load(logprobs + t, mask=counts, other=0)
            total += tl.sum(log_ratio(t, counts, logprob, old_logprobs, given).to(tl.float64), 1)
    tl.store(sums + row, count, mask=row < rows)
    tl.store(sums + rows + row, total, mask=row < rows)


@triton.jit
def weighing(t, s, counts, advantages, importance_weights, given):
    """(advantage, importance weight) of tokens t of sequences s."""
    at = t
    if has(given, SEQUENCE_ADVANTAGES):
        at = t * 0 + s
    advantage = tl.load(advantages + at, mask=counts, other=0)
    importance = tl.where(counts, 1.0, 0.0)
    if has(given, WEIGHTS):
        at = t
        if has(given, SEQUENCE_WEIGHTS):
            at = t * 0 + s
        importance = tl.load(importance_weights + at, mask=counts, other=0)
    # A weight of 0 rejects the token: its ratio may have overflowed, so it goes by the advantage, not by 0 * inf.
    return tl.where(importance == 0, 0.0, advantage), importance.to(tl.float64)


@kernel
def slope_kernel(
    logprobs, ref_logprobs, advantages, mask, cu_seqlens, importance_weights, sums, given: tl.int64,
    surrogate: tl.int64, kl: tl.int64, tokens: tl.int64, sequences: tl.int64, length: tl.int64, whole: tl.int64,
    rows: tl.int64, clip_low: tl.float32, clip_high: tl.float32, ratio_cap: tl.float32, tau_pos: tl.float32,
    tau_neg: tl.float32, kl_coef: tl.float32,
    ROWS: tl.constexpr, SPAN: tl.constexpr, PIECES: tl.constexpr,
):
    """sums (3, rows), the third: the slopes of a piece's tokens with respect to the sequence's mean log-ratio."""
    row = row_of_program(ROWS)
    s, at, end = spans_of_program(
        cu_seqlens, has(given, PACKED), tokens, sequences, length, whole, rows, ROWS, SPAN, PIECES
    )
    end = tl.where(row < whole, at, end)
    first, pieces = pieces_of(s, cu_seqlens, has(given, PACKED), tokens, length, SPAN, PIECES)
    size = tl.maximum(total_of(sums + whole, first, pieces), 1.0)
    mean = (total_of(sums + rows + whole, first, pieces) / size).to(tl.float32)
    kl_factor = single(kl_coef).to(tl.float64) * exponential(mean).to(tl.float64)
    total = tl.zeros((ROWS,), tl.float64)
    for offset in range(0, tl.max(end - at, 0), SPAN):
        t = at[:, None] + offset + tl.arange(0, SPAN)[None, :]
        counts = counted(t, t < end[:, None], mask, given)
        advantage, importance = weighing(t, s[:, None], counts, advantages, importance_weights, given)
        if has(given, SHARED_SURROGATE):
            slope = shared_slope(
                surrogate, mean[:, None], advantage, clip_low, clip_high, ratio_cap, tau_pos, tau_neg
            )
            total += tl.sum(product(importance, slope), 1)
        if has(given, SHARED_KL):
            d = tl.load(ref_logprobs + t, mask=counts, other=0) - tl.load(logprobs + t, mask=counts, other=0)
            total += product(kl_factor, tl.sum(tl.where(counts, kl_term(kl - 3, d)[0], 0.0).to(tl.float64), 1))
    tl.store(sums + 2 * rows + row, total, mask=row < rows)

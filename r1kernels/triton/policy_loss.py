r"""The policy loss: its value, its gradient with respect to each log-prob and entropy, and every metric.

    loss = sum_t w_t (iw_t surrogate_t + kl_coef kl_t - entropy_coef H_t)

Two launches where the weights are known beforehand, three where tokens must be counted or log-ratios averaged first,
four for a ratio of sequences with values of single tokens (their slopes are summed before they are handed out):

    sum_kernel     pieces of sequences, and of the batch -> counted tokens, sum of log-ratios
    slope_kernel   pieces of sequences -> sum of slopes
    token_kernel   blocks of tokens -> gradients, and one row of partial sums a program
    finish_kernel  the rows, in order -> loss and metrics; looks at cu_seqlens and normalizer as well

Bytes: 4 a token for each input given, 1 for the mask, 4 (8 with entropy_coef) written; the sums read log-probs and
mask once more. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1kernels.triton.common import Device, Variant, checking_kernel, device_of, kernel, launch, wide
from r1kernels.triton.objective import (
    CLIP,
    SAPO,
    SEQUENCE,
    SEQUENCE_PRODUCT,
    exponential,
    finite,
    kl_ratio_slope,
    kl_term,
    product,
    single,
    surrogate_term,
)
from r1kernels.triton.policy_sums import (
    ENTROPY,
    ENTROPY_GRADIENT,
    MASK,
    NORMALIZER,
    OLD,
    PACKED,
    REF,
    SEQUENCE_ADVANTAGES,
    SEQUENCE_WEIGHTS,
    SHARED_KL,
    SHARED_SURROGATE,
    SLOPES,
    SUMS,
    WEIGHTS,
    counted,
    has,
    log_ratio,
    slope_kernel,
    sum_kernel,
    weighing,
)
from r1kernels.triton.sequences import PIECES, ROWS, SPAN, owner, pieces_of, size_of, total_of

SUM_WARPS = 8
FINISH_ROWS = 128
FINISH_WARPS = 8
COLUMNS = 16  # of a row of partial sums: the metrics in their order, then the loss
METRICS = 15

# Numbers of r1kernels.objectives; what is left is "constant".
SEQUENCE_MEAN, TOKEN_MEAN = tl.constexpr(0), tl.constexpr(1)
RATIO_MIN, RATIO_MAX = tl.constexpr(6), tl.constexpr(7)  # columns


class Config(NamedTuple):
    """Tokens a program takes at a time, in `num_warps`, and how many programs there are at most."""

    block: int
    num_warps: int
    programs: int


def config(shape: tuple[int], dtype: torch.dtype, device: Device) -> Config:
    """One warp a program, whose fourteen sums then need no barrier."""
    return Config(block=128, num_warps=1, programs=2048)


# ---- tokens ------------------------------------------------------------------------------------------------


@triton.jit
def sum_of(counts, x):
    return tl.sum(tl.where(counts, x, 0).to(tl.float64), 0)


@kernel
def token_kernel(
    logprobs, advantages, old_logprobs, ref_logprobs, entropy, mask, cu_seqlens, importance_weights, normalizer, sums,
    grad_logprobs, grad_entropy, partials, given: tl.int64, surrogate: tl.int64, ratio_kind: tl.int64, kl: tl.int64,
    aggregate: tl.int64, tokens: tl.int64, sequences: tl.int64, length: tl.int64, whole: tl.int64, rows: tl.int64,
    blocks: tl.int64, clip_low: tl.float32, clip_high: tl.float32, ratio_cap: tl.float32, tau_pos: tl.float32,
    tau_neg: tl.float32, kl_coef: tl.float32, entropy_coef: tl.float32, max_length: tl.float64,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr, PIECES: tl.constexpr,
):
    """Gradients of `blocks` blocks of tokens, and partials (programs, COLUMNS), one row of sums."""
    denominator = tl.maximum(sequences, 1).to(tl.float64)
    if aggregate == TOKEN_MEAN:
        denominator = tokens.to(tl.float64)
        if whole > 0:
            piece = tl.arange(0, PIECES)
            denominator = tl.sum(tl.load(sums + piece, mask=piece < whole, other=0), 0)
        denominator = tl.maximum(denominator, 1.0)
    elif aggregate != SEQUENCE_MEAN:
        denominator = denominator * wide(max_length)
    if has(given, NORMALIZER):
        denominator = tl.load(normalizer).to(tl.float64)
    kl_factor = tl.where(has(given, REF), single(kl_coef), 0.0).to(tl.float64)
    entropy_factor = single(entropy_coef).to(tl.float64)

    packed = has(given, PACKED)
    zero = wide(0.0)
    all_loss, all_surrogate, all_kl, all_entropy, all_ratio, all_approx = zero, zero, zero, zero, zero, zero
    all_tokens, all_low, all_high, all_capped, all_active, all_nonfinite = zero, zero, zero, zero, zero, zero
    lowest, highest = wide(float("inf")), wide(float("-inf"))
    pid = tl.program_id(0).to(tl.int64)
    for block in range(pid * blocks, (pid + 1) * blocks):
        t = block * BLOCK + tl.arange(0, BLOCK)
        inside = t < tokens
        counts = counted(t, inside, mask, given)
        logprob = tl.load(logprobs + t, mask=counts, other=0)
        s = t // length
        if packed:
            s = owner(t, cu_seqlens, packed, tokens, sequences, length, 0)
        advantage, importance = weighing(t, s, counts, advantages, importance_weights, given)

        size = size_of(s, cu_seqlens, packed, tokens, length).to(tl.float64)
        first, pieces = pieces_of(s, cu_seqlens, packed, tokens, length, SPAN, PIECES)
        delta = log_ratio(t, counts, logprob, old_logprobs, given)
        if has(given, SUMS):
            size = total_of(sums + whole, first, pieces)
            if ratio_kind != 0:  # every token carries exp(mean (l - l_old)), or the product of the ratios
                divisor = tl.where(ratio_kind == SEQUENCE_PRODUCT, 1.0, tl.maximum(size, 1.0))
                delta = (total_of(sums + rows + whole, first, pieces) / divisor).to(tl.float32)
        size = tl.maximum(size, 1.0)
        weight = 1.0 / tl.where(aggregate == SEQUENCE_MEAN, denominator * size, denominator)

        ratio = exponential(delta)
        term, term_slope, low, high, capped = surrogate_term(
            surrogate, delta, advantage, logprob, clip_low, clip_high, ratio_cap, tau_pos, tau_neg
        )
        surrogate_loss = product(importance, term)
        surrogate_slope = product(importance, term_slope)
        slope = surrogate_slope
        if has(given, SLOPES):
            # The ratio's derivative reaches every token of the sequence alike: each gets the mean of their slopes,
            # which is its own where advantages and importance weights are the sequence's.
            shared = total_of(sums + 2 * rows + whole, first, pieces) / size
            slope = shared + tl.where(has(given, SHARED_SURROGATE), 0.0, slope)
        d = tl.zeros_like(logprob)
        if has(given, REF):
            d = tl.load(ref_logprobs + t, mask=counts, other=0) - logprob
        estimator = tl.where(kl > 3, kl - 3, kl)
        kl_loss, kl_slope = kl_term(estimator, d)
        kl_loss, kl_slope = kl_loss.to(tl.float64), kl_slope.to(tl.float64)
        if kl > 3:  # times the ratio
            kl_loss = product(ratio, kl_loss)
            kl_slope = product(ratio, tl.where(ratio_kind == SEQUENCE, kl_slope, kl_ratio_slope(estimator, d)))
        kl_slope = product(kl_factor, kl_slope)
        h = tl.zeros_like(logprob)
        if has(given, ENTROPY):
            h = tl.load(entropy + t, mask=counts, other=0)
        loss = surrogate_loss + product(kl_factor, kl_loss) - product(entropy_factor, h)
        g = tl.where(counts, weight * (slope + kl_slope), 0.0).to(tl.float32)
        eta = tl.where(counts, -weight * entropy_factor, 0.0).to(tl.float32)
        tl.store(grad_logprobs + t, g, mask=inside)
        if has(given, ENTROPY_GRADIENT):
            tl.store(grad_entropy + t, eta, mask=inside)
        approx_kl = kl_term(3, delta)[0]
        known = counts & (ratio == ratio)

        all_tokens += sum_of(counts, 1.0)
        all_surrogate += sum_of(counts, weight * surrogate_loss)
        all_kl += sum_of(counts, kl_loss)
        all_entropy += sum_of(counts, h)
        all_ratio += sum_of(counts, ratio)
        lowest = tl.minimum(lowest, tl.min(tl.where(known, ratio, float("inf")), 0).to(tl.float64))
        highest = tl.maximum(highest, tl.max(tl.where(known, ratio, float("-inf")), 0).to(tl.float64))
        all_approx += sum_of(counts, approx_kl)
        all_low += sum_of(counts & low, 1.0)
        all_high += sum_of(counts & high, 1.0)
        all_capped += sum_of(counts & capped, 1.0)
        all_active += sum_of(counts & ((g != 0) | (eta != 0)), 1.0)
        all_nonfinite += sum_of(counts & ~(finite(loss) & finite(surrogate_slope) & finite(kl_slope)), 1.0)
        all_loss += sum_of(counts, weight * loss)

    out = partials + pid * COLUMNS
    tl.store(out, all_tokens)
    tl.store(out + 1, zero)
    tl.store(out + 2, all_surrogate)
    tl.store(out + 3, all_kl)
    tl.store(out + 4, all_entropy)
    tl.store(out + 5, all_ratio)
    tl.store(out + RATIO_MIN, lowest)
    tl.store(out + RATIO_MAX, highest)
    tl.store(out + 8, all_approx)
    tl.store(out + 9, all_low + all_high + all_capped)
    tl.store(out + 10, all_low)
    tl.store(out + 11, all_high)
    tl.store(out + 12, all_capped)
    tl.store(out + 13, all_active)
    tl.store(out + 14, all_nonfinite)
    tl.store(out + 15, all_loss)


# ---- all tokens --------------------------------------------------------------------------------------------


@checking_kernel
def finish_kernel(
    partials, cu_seqlens, normalizer, loss, metrics, given: tl.int64, tokens: tl.int64, sequences: tl.int64,
    programs: tl.int64, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):
    """The rows of sums, in order -> loss and metrics."""
    row = tl.arange(0, TILE).to(tl.int64)
    if has(given, NORMALIZER):
        number = tl.load(normalizer)
        tl.device_assert((number > 0) & finite(number), "r1kernels: normalizer must be a positive finite number")
    if has(given, PACKED):
        first = tl.load(cu_seqlens)
        last = tl.load(cu_seqlens + sequences)
        tl.device_assert((first == 0) & (last == tokens), "r1kernels: cu_seqlens must run from 0 to N")
        for start in range(0, sequences, TILE):
            s = start + row
            begin = tl.load(cu_seqlens + s, mask=s < sequences, other=0)
            end = tl.load(cu_seqlens + s + 1, mask=s < sequences, other=0)
            tl.device_assert(begin <= end, "r1kernels: cu_seqlens must not descend")

    column = tl.arange(0, COLUMNS)[None, :]
    is_min, is_max = column == RATIO_MIN, column == RATIO_MAX
    start_value = tl.where(is_min, float("inf"), tl.where(is_max, float("-inf"), 0.0)).to(tl.float64)
    total = row[:, None] * 0.0 + start_value
    for start in range(0, programs, TILE):
        r = (start + row)[:, None]
        x = tl.load(partials + r * COLUMNS + column, mask=r < programs, other=0)
        x = tl.where(r < programs, x, start_value)
        total = tl.where(is_min, tl.minimum(total, x), tl.where(is_max, tl.maximum(total, x), total + x))
    lowest = tl.min(tl.where(is_min, total, float("inf")))
    highest = tl.max(tl.where(is_max, total, float("-inf")))
    value = tl.sum(tl.where(is_min | is_max, 0.0, total), 0)
    column = tl.arange(0, COLUMNS)
    count = tl.sum(tl.where(column == 0, value, 0.0), 0)
    is_ratio = (column >= 5) & (column <= RATIO_MAX)
    is_mean = (column >= 3) & (column <= 13)
    value = tl.where(is_mean, value * tl.where(count == 0, 0.0, 1.0 / tl.maximum(count, 1.0)), value)
    value = tl.where(column == 1, sequences.to(tl.float64), value)
    value = tl.where(column == RATIO_MIN, lowest, tl.where(column == RATIO_MAX, highest, value))
    value = tl.where(count == 0, tl.where(is_ratio, 1.0, value), value).to(tl.float32)
    tl.store(metrics + column, value, mask=column < COLUMNS - 1)
    tl.store(loss + column * 0, value, mask=column == COLUMNS - 1)


# ---- launchers ---------------------------------------------------------------------------------------------


def _flags(pairs: Iterable[tuple[tl.constexpr, bool]]) -> int:
    return sum(flag.value for flag, there in pairs if there)


def policy_loss(
    logprobs: Tensor, advantages: Tensor, old_logprobs: Tensor | None, ref_logprobs: Tensor | None,
    entropy: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None, importance_weights: Tensor | None,
    normalizer: Tensor | None, surrogate: int, ratio: int, kl: int, aggregate: int, clip_low: float, clip_high: float,
    ratio_cap: float, tau_pos: float, tau_neg: float, kl_coef: float, entropy_coef: float, max_length: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss (), dloss/dlogprob (...), dloss/dentropy (...) or (0,) where entropy_coef is 0, metrics (15,)."""
    tokens, packed = logprobs.numel(), cu_seqlens is not None
    sequences = cu_seqlens.numel() - 1 if packed else logprobs.shape[:-1].numel()
    if packed and sequences == 0 and tokens > 0:
        raise ValueError(f"cu_seqlens holds one number, expected it to run from 0 to N = {tokens}")
    length = tokens if packed else logprobs.shape[-1]

    def of_sequences(value: Tensor | None) -> bool:
        # Packed tokens may be as many as their sequences (some are empty then, or all hold one): per sequence it is.
        if value is None:
            return True
        per_token = value.dim() == logprobs.dim() and value.numel() == tokens
        return not per_token or (packed and value.numel() == sequences)

    advantages_of_sequences, weights_of_sequences = of_sequences(advantages), of_sequences(importance_weights)
    masked, sequence_ratio = mask is not None, ratio != 0
    with_sums = sequence_ratio or (masked and aggregate == SEQUENCE_MEAN.value)
    with_total = masked and normalizer is None and aggregate == TOKEN_MEAN.value
    own_ratio = ratio == SEQUENCE.value  # of the sequence, with a gradient
    shared_surrogate = own_ratio and surrogate in (CLIP.value, SAPO.value)
    shared_kl = own_ratio and kl > 3 and kl_coef != 0 and ref_logprobs is not None
    with_slopes = shared_kl or (shared_surrogate and not (advantages_of_sequences and weights_of_sequences))
    given = _flags((
        (OLD, old_logprobs is not None), (REF, ref_logprobs is not None), (ENTROPY, entropy is not None),
        (MASK, masked), (PACKED, packed), (WEIGHTS, importance_weights is not None),
        (NORMALIZER, normalizer is not None), (SEQUENCE_ADVANTAGES, advantages_of_sequences),
        (SEQUENCE_WEIGHTS, weights_of_sequences), (SUMS, with_sums), (SLOPES, with_slopes),
        (ENTROPY_GRADIENT, entropy_coef != 0), (SHARED_SURROGATE, shared_surrogate), (SHARED_KL, shared_kl),
    ))
    whole = min(triton.cdiv(tokens, SPAN), PIECES) if with_total else 0
    rows = whole + (tokens // SPAN + sequences if with_sums else 0) if tokens else 0
    chosen = config((tokens,), logprobs.dtype, device_of(logprobs))
    all_blocks = triton.cdiv(tokens, chosen.block)
    blocks = max(triton.cdiv(all_blocks, chosen.programs), 1)
    programs = triton.cdiv(all_blocks, blocks)

    loss, metrics = logprobs.new_empty(()), logprobs.new_empty((METRICS,))
    grad_logprobs = logprobs.new_empty(logprobs.shape)
    grad_entropy = logprobs.new_empty(logprobs.shape if entropy_coef != 0 else (0,))
    planes = 3 if with_slopes else 2
    scratch = logprobs.new_empty((COLUMNS * programs + planes * rows + 1,), dtype=torch.float64)
    partials, sums = scratch, scratch[COLUMNS * programs :]
    # An absent tensor is never read: another one of its type stands for it.
    old_logprobs, ref_logprobs, entropy, importance_weights, normalizer = (
        logprobs if value is None else value
        for value in (old_logprobs, ref_logprobs, entropy, importance_weights, normalizer)
    )
    mask = scratch.view(torch.bool) if mask is None else mask
    cu_seqlens = scratch.view(torch.int64) if cu_seqlens is None else cu_seqlens
    batch = (tokens, sequences, length, whole, rows)
    bounds = (clip_low, clip_high, ratio_cap, tau_pos, tau_neg)
    pieces = {"SPAN": SPAN, "PIECES": PIECES}
    if rows:
        launch(
            sum_kernel, (triton.cdiv(rows, ROWS),), logprobs, logprobs, old_logprobs, mask, cu_seqlens, sums, given,
            ratio, *batch, ROWS=ROWS, **pieces, num_warps=SUM_WARPS,
        )
    if rows and with_slopes:
        launch(
            slope_kernel, (triton.cdiv(rows, ROWS),), logprobs, logprobs, ref_logprobs, advantages, mask, cu_seqlens,
            importance_weights, sums, given, surrogate, kl, *batch, *bounds, kl_coef, ROWS=ROWS, **pieces,
            num_warps=SUM_WARPS,
        )
    launch(
        token_kernel, (programs,), logprobs, logprobs, advantages, old_logprobs, ref_logprobs, entropy, mask,
        cu_seqlens, importance_weights, normalizer, sums, grad_logprobs, grad_entropy, partials, given, surrogate,
        ratio, kl, aggregate, *batch, blocks, *bounds, kl_coef, entropy_coef, max_length, BLOCK=chosen.block,
        COLUMNS=COLUMNS, **pieces, num_warps=chosen.num_warps,
    )
    launch(
        finish_kernel, (1,), logprobs, partials, cu_seqlens, normalizer, loss, metrics, given, tokens, sequences,
        programs, TILE=FINISH_ROWS, COLUMNS=COLUMNS, num_warps=FINISH_WARPS,
    )
    return loss, grad_logprobs, grad_entropy, metrics


def variants(device: Device) -> Iterator[Variant]:
    pointers = {"mask": "*i1", "cu_seqlens": "*i64", "sums": "*fp64", "partials": "*fp64"}
    chosen = config((1,), torch.float32, device)
    pieces = {"SPAN": SPAN, "PIECES": PIECES}
    for kernel_, constants, num_warps in (
        (sum_kernel, {"ROWS": ROWS, **pieces}, SUM_WARPS),
        (slope_kernel, {"ROWS": ROWS, **pieces}, SUM_WARPS),
        (token_kernel, {"BLOCK": chosen.block, "COLUMNS": COLUMNS, **pieces}, chosen.num_warps),
        (finish_kernel, {"TILE": FINISH_ROWS, "COLUMNS": COLUMNS}, FINISH_WARPS),
    ):
        signature = {
            p.name: p.annotation_type or pointers.get(p.name, "*fp32")
            for p in kernel_.params if not p.is_constexpr
        }
        yield Variant(kernel_, signature, constants, {"num_warps": num_warps, "num_stages": 1})

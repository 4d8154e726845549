r"""The gradient of token statistics with respect to the logits: one read and one write of V entries a row.

    dL/dx_j = (g (1[j = y] - p_j) - eta p_j (log p_j + H) + 2 zeta p_j (p_j - S) + shift) / T,
    g = dL/dlogprob,  eta = dL/dentropy,  zeta = dL/dS,  S = sum_j p_j^2

Rows without a gradient are written without being read. The result may take the logits' own memory, also as narrower
entries. Calls with zeta or shift have kernels that are compiled with `MORE`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1kernels.triton.common import (
    ALIGNED,
    LOG2E,
    LOWEST,
    POINTERS,
    UNIT_STRIDE,
    Device,
    Rows,
    Variant,
    device_of,
    difference_error,
    entries,
    expm1,
    is_entry,
    kernel,
    launch,
    optional,
    rounded,
    row_offset,
    rows_of,
    signature,
    widened,
    word_entries,
)
from r1kernels.triton.token_stats import DTYPES, LAYOUTS, SEGMENT, config, configs, loop_of
from r1kernels.triton.token_stats_kernels import exp2_of_product, temperature_of


@triton.jit
def tile_gradient(
    x, numbers, EXACT: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, MORE: tl.constexpr
):
    """-(g + eta (log p_j + H)) p_j / T of a tile; `numbers` are those of its row, see `gradient_kernel`.

    The anchor is the float32 next to lse T. `p` is e^{(x - anchor)/T}: what is missing to the probability is the same
    for all of a row, and part of its factors (`from_anchor`), for it is not small where logits are large. log p + H =
    (x - pivot)/T + offset has another point of reference, because the two cancel where p is near e^{-H}. EXACT keeps
    what float32 rounds away. With MORE, shift / T is added, and with ENTROPY too 2 zeta p_j (p_j - S) / T. To save
    registers, `minus_g` is then all of the factor of p_j that depends neither on x nor on p_j, and `minus_eta` has the
    slope.
    """
    c, c_rest, anchor, minus_g, minus_g_rest, minus_eta, pivot, offset, slope, inv_softcap, two_zeta, shift = numbers
    if EXACT:
        lowest = anchor - 1000.0 / c  # as in `below`
        x = tl.where(x < lowest, lowest, x)
        d = x - anchor
        p = exp2_of_product(d, c, c_rest, difference_error(x, anchor, d) * c)
    else:
        p = tl.exp2((x - anchor) * c)
    factor = minus_g
    if ENTROPY:
        d = tl.where(p == 0, 0.0, x - pivot)  # 0 * (-inf) = 0
        if MORE:
            factor += minus_eta * d + two_zeta * p
        else:
            factor += minus_eta * (d * slope + offset)
    gradient = p * factor
    if EXACT:
        gradient += p * minus_g_rest
    if MORE:
        gradient += shift
    if SOFTCAP:
        tanh = tl.maximum(x, LOWEST) * inv_softcap  # -inf * 0 is NaN
        gradient = gradient * ((1.0 - tanh) * (1.0 + tanh))
    return gradient


@triton.jit
def from_anchor(anchor, log_sum, t, EXACT: tl.constexpr):
    """e^{anchor/T - lse}, which makes p of e^{(x - anchor)/T}; in float64.

    It is between 1/V and V: the largest logit is a float32 at most T log V below lse T, and the anchor is the float32
    next to lse T. The bounds are for logits above 1e15, where lse has lost the logarithm of its sum.
    """
    exponent = (anchor - log_sum * t) * (1 / t * LOG2E)
    exponent = tl.where(exponent > 40.0, 40.0, exponent)  # NaN stays
    exponent = tl.where(exponent < -40.0, -40.0, exponent)
    if EXACT:
        return tl.exp2(exponent)
    else:
        return tl.exp2(exponent.to(tl.float32)).to(tl.float64)


@triton.jit
def walk(
    start, out_start, size, cols, vocab_stride, own_at, own, numbers, LANES: tl.constexpr, UNROLL: tl.constexpr,
    VEC: tl.constexpr, LAYOUT: tl.constexpr, EXACT: tl.constexpr, WHOLE_ROW: tl.constexpr, ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr, MORE: tl.constexpr,
):
    """Writes the gradient of `size` entries; `own` is that of the entry `own_at`."""
    dtype: tl.constexpr = out_start.dtype.element_ty
    OUT_LAYOUT: tl.constexpr = ALIGNED if LAYOUT == ALIGNED else UNIT_STRIDE
    TILE: tl.constexpr = LANES * UNROLL
    full = size // TILE * TILE
    for at in range(0, full, TILE):
        if (LAYOUT == ALIGNED) & (start.dtype.element_ty == tl.bfloat16):
            words = tl.arange(0, UNROLL)[:, None] * (LANES // 2) + tl.arange(0, LANES // 2)[None, :]
            x = widened(tl.load(word_entries(start, at, words)))
        else:
            x = tl.load(entries(start, at, cols, vocab_stride, LAYOUT)).to(tl.float32)
        gradient = tile_gradient(x, numbers, EXACT, ENTROPY, SOFTCAP, MORE)
        if (own_at >= at) & (own_at < at + TILE):
            gradient = tl.where(is_entry(cols, own_at - at, VEC), own, gradient)
        if WHOLE_ROW:
            tl.debug_barrier()  # every thread has read this tile, and those before it
        tl.store(entries(out_start, at, cols, 1, OUT_LAYOUT), rounded(gradient, dtype))
    if full < size:
        inside, last = last_entries(size, full, cols, LANES, VEC, LAYOUT)
        x = tl.load(entries(start, full, cols, vocab_stride, LAYOUT), mask=inside, other=0).to(tl.float32)
        gradient = tile_gradient(x, numbers, EXACT, ENTROPY, SOFTCAP, MORE)
        if own_at >= full:
            gradient = tl.where(is_entry(cols, own_at - full, VEC), own, gradient)
        if LAYOUT == ALIGNED:
            few = tl.load(start + last, mask=last < size, other=0).to(tl.float32)
            few = tl.where(last == own_at, own, tile_gradient(few, numbers, EXACT, ENTROPY, SOFTCAP, MORE))
        if WHOLE_ROW:
            tl.debug_barrier()
        tl.store(entries(out_start, full, cols, 1, OUT_LAYOUT), rounded(gradient, dtype), mask=inside)
        if LAYOUT == ALIGNED:
            tl.store(out_start + last, rounded(few, dtype), mask=last < size)


@triton.jit
def _write_zeros(
    out_start, size, cols, LANES: tl.constexpr, UNROLL: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr
):
    """The gradient of a row that has none."""
    OUT_LAYOUT: tl.constexpr = ALIGNED if LAYOUT == ALIGNED else UNIT_STRIDE
    TILE: tl.constexpr = LANES * UNROLL
    zeros = tl.zeros((UNROLL, LANES), out_start.dtype.element_ty)
    full = size // TILE * TILE
    for at in range(0, full, TILE):
        tl.store(entries(out_start, at, cols, 1, OUT_LAYOUT), zeros)
    if full < size:
        inside, last = last_entries(size, full, cols, LANES, VEC, LAYOUT)
        tl.store(entries(out_start, full, cols, 1, OUT_LAYOUT), zeros, mask=inside)
        if LAYOUT == ALIGNED:
            tl.store(out_start + last, tl.zeros((1, LANES), out_start.dtype.element_ty), mask=last < size)


@triton.jit
def last_entries(size, full, cols, LANES: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr):
    """Which entries of the last tile are there, and with ALIGNED, where that is in whole vectors, the few others."""
    inside = cols < size - full
    if LAYOUT == ALIGNED:
        inside = cols < tl.multiple_of((size - full) // VEC * VEC, VEC)
    return inside, size // VEC * VEC + tl.arange(0, LANES)[None, :]


@triton.jit
def own_gradient(x, log_sum, h, inv_t, g, eta, inv_softcap, zeta, sum_sq, shift, MORE: tl.constexpr):
    """(g (1 - p) - eta p (log p + H) + 2 zeta p (p - S) + shift) / T of the token itself, a scalar."""
    log_p = x.to(tl.float64) * inv_t - log_sum
    log_p = tl.where(log_p > 0, 0.0, log_p)  # rounding alone
    p = tl.exp(log_p)
    # g (1 - p) cancels as p goes to 1, -g expm1(log p) does not.
    gradient = -g * expm1(log_p.to(tl.float32), p.to(tl.float32)) - eta * tl.where(p == 0, 0.0, p * (log_p + h))
    if MORE:
        gradient += 2 * zeta * p * (p - sum_sq) + shift
    tanh = tl.maximum(x, LOWEST) * inv_softcap
    return (gradient * inv_t * ((1.0 - tanh) * (1.0 + tanh))).to(tl.float32)


@kernel
def gradient_kernel(
    logits, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64, vocab_stride: tl.int64, out,
    out_inner: tl.int64, out_outer_stride: tl.int64, out_inner_stride: tl.int64, token_ids, lse, entropy, grad_logprobs,
    grad_entropy, with_entropy: tl.int64, sum_sq, grad_sum_sq, with_squares: tl.int64, shifts, with_shift: tl.int64,
    temperatures, many: tl.int64, temperature: tl.float64, inv_softcap: tl.float32, rows, moved: tl.int64,
    vocab: tl.int64, segments: tl.int64,
    SEGMENT: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
    EXACT: tl.constexpr, WHOLE_ROW: tl.constexpr, MORE: tl.constexpr,
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
    cols = tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    begin = segment * SEGMENT
    size = (vocab - begin).to(tl.int32)
    if not WHOLE_ROW:
        size = tl.minimum(vocab - begin, SEGMENT).to(tl.int32)
    start, out_start = row + begin * vocab_stride, out_row + begin

    g = tl.load(grad_logprobs + n)
    eta = g * 0
    if with_entropy != 0:
        eta = tl.load(grad_entropy + n)
    nothing = (g == 0) & (eta == 0)
    zeta, shift = g * 0, g * 0
    if MORE:
        if with_squares != 0:
            zeta = tl.load(grad_sum_sq + n)
        if with_shift != 0:
            shift = tl.load(shifts + n)
        nothing = nothing & (zeta == 0) & (shift == 0)
    if nothing:  # masked or clipped: the row is not read, so nothing in it can matter
        _write_zeros(out_start, size, cols, LANES, UNROLL, VEC, LAYOUT)
        return

    target = tl.minimum(tl.maximum(tl.load(token_ids + n), 0), vocab - 1)  # the forward looked: nothing outside is read
    t = temperature_of(temperature, temperatures, many, n)
    log_sum, h = tl.load(lse + n), tl.load(entropy + n)
    inv_t = 1 / t
    scale = inv_t * LOG2E
    c = scale.to(tl.float32)
    c_rest = (scale - c).to(tl.float32)
    anchor = (log_sum * t).to(tl.float32)
    pivot = ((log_sum - h) * t).to(tl.float32)
    offset = ((pivot - (log_sum - h) * t) * inv_t).to(tl.float32)
    ratio = from_anchor(anchor, log_sum, t, EXACT)
    unit = ratio * inv_t
    minus_g = (-g * unit).to(tl.float32)
    minus_g_rest = (-g * unit - minus_g).to(tl.float32)
    minus_eta = (-eta * unit).to(tl.float32)
    slope = inv_t.to(tl.float32)
    s = inv_t  # of any value where zeta is 0
    if MORE:
        if with_squares != 0:
            s = tl.load(sum_sq + n)
    own = own_gradient(
        tl.load(row + target * vocab_stride).to(tl.float32), log_sum, h, inv_t, g, eta, inv_softcap, zeta, s, shift,
        MORE,
    )
    if MORE:  # -(g + eta (log p_j + H) - 2 zeta (p_j - S)) / T without the parts that depend on p_j or x
        rest_of_factor = (-g - eta * ((pivot - (log_sum - h) * t) * inv_t) - 2 * zeta * s) * unit
        minus_g = rest_of_factor.to(tl.float32)
        minus_g_rest = (rest_of_factor - minus_g).to(tl.float32)
        minus_eta = (-eta * inv_t * unit).to(tl.float32)
    own_at = tl.where((target >= begin) & (target < begin + size), target - begin, -1).to(tl.int32)
    tl.debug_barrier()  # every thread has read the token's logit
    numbers = (
        c, c_rest, anchor, minus_g, minus_g_rest, minus_eta, pivot, offset, slope, inv_softcap,
        (2 * zeta * unit * ratio).to(tl.float32), (shift * inv_t).to(tl.float32),
    )
    has_factor = eta != 0  # of p, beside g
    if MORE:
        has_factor = has_factor | (zeta != 0)
    if inv_softcap != 0:
        walk(
            start, out_start, size, cols, vocab_stride, own_at, own, numbers, LANES, UNROLL, VEC, LAYOUT, EXACT,
            WHOLE_ROW, True, True, MORE,
        )
    elif has_factor:
        walk(
            start, out_start, size, cols, vocab_stride, own_at, own, numbers, LANES, UNROLL, VEC, LAYOUT, EXACT,
            WHOLE_ROW, True, False, MORE,
        )
    else:
        walk(
            start, out_start, size, cols, vocab_stride, own_at, own, numbers, LANES, UNROLL, VEC, LAYOUT, EXACT,
            WHOLE_ROW, False, False, MORE,
        )


# ---- launching ---------------------------------------------------------------------------------------------


def token_stats_backward(
    logits: Tensor, token_ids: Tensor, lse: Tensor, entropy: Tensor, grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None, temperature: float, sum_sq: Tensor | None = None, grad_sum_sq: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    slopes = _Slopes(grad_logprobs, grad_entropy, sum_sq, grad_sum_sq, shift)
    _gradient(rows_of(logits), rows_of(out), token_ids, lse, entropy, slopes, temperature, None, 0.0, None)
    return out


def token_stats_backward_out(
    logits: Tensor, token_ids: Tensor, lse: Tensor, entropy: Tensor, grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None, temperature: float, temperatures: Tensor | None, softcap: float, rows: Tensor | None,
    out: Tensor, sum_sq: Tensor | None = None, grad_sum_sq: Tensor | None = None, shift: Tensor | None = None,
) -> None:
    source, target = rows_of(logits), rows_of(out)
    if target.vocab_stride != 1:
        raise ValueError(f"out has stride {target.vocab_stride} over the vocabulary, expected 1")
    shared = logits.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
    if shared and rows is not None:
        raise ValueError("rows was given with an out in the memory of logits, expected memory of its own")
    if rows is not None:
        target = target._replace(count=len(rows))
    slopes = _Slopes(grad_logprobs, grad_entropy, sum_sq, grad_sum_sq, shift)
    _gradient(source, target, token_ids, lse, entropy, slopes, temperature, temperatures, softcap, rows)


class _Slopes(NamedTuple):
    grad_logprobs: Tensor | None
    grad_entropy: Tensor | None
    sum_sq: Tensor | None
    grad_sum_sq: Tensor | None
    shift: Tensor | None

    def arguments(self, token_ids: Tensor) -> tuple[Any, ...]:
        g, eta, sum_sq, zeta, shift = self
        if g is None:
            g = torch.zeros_like(next(slope for slope in (eta, zeta, shift) if slope is not None))
        squares = optional(None if zeta is None else sum_sq, torch.float64, token_ids)
        return (
            g, *optional(eta, torch.float32, token_ids), squares[0], *optional(zeta, torch.float32, token_ids),
            *optional(shift, torch.float32, token_ids),
        )


def _gradient(
    source: Rows, target: Rows, token_ids: Tensor, lse: Tensor, entropy: Tensor, slopes: _Slopes, temperature: float,
    temperatures: Tensor | None, softcap: float, rows: Tensor | None,
) -> None:
    logits, out = source.data, target.data
    device = device_of(logits)
    chosen = config((target.count, source.vocab), logits.dtype, device)
    whole = out.dtype.itemsize < logits.dtype.itemsize
    if whole and source.vocab >= 2**31:
        raise ValueError(f"logits has {source.vocab} entries a row, expected fewer than 2^31 for a narrower out")
    layout = source.layout
    if layout == ALIGNED.value and target.layout != layout:
        layout = UNIT_STRIDE.value
    segments = 1 if whole else triton.cdiv(source.vocab, SEGMENT)
    launch(
        gradient_kernel, (target.count * segments,), logits, *source.arguments(), out, target.inner,
        target.outer_stride, target.inner_stride, token_ids, lse, entropy, *slopes.arguments(token_ids),
        *optional(temperatures, torch.float32, token_ids), temperature, 1 / softcap if softcap > 0 else 0.0,
        *optional(rows, torch.int64, token_ids), source.vocab, segments, num_warps=chosen.num_warps, SEGMENT=SEGMENT,
        EXACT=out.dtype == torch.float32, WHOLE_ROW=whole,
        MORE=slopes.grad_sum_sq is not None or slopes.shift is not None,
        **chosen.gradient_constants(logits.dtype, device, layout),
    )


def variants(device: Device) -> Iterator[Variant]:
    """Every compilation that the launch above can ask for."""
    for dtype in DTYPES:
        for chosen in configs(dtype, device):
            options = {"num_warps": chosen.num_warps, "num_stages": 1}
            narrower = DTYPES if dtype == torch.float32 else (dtype,)
            for narrow, layout, more in itertools.product(narrower, LAYOUTS, (False, True)):
                constants = chosen.gradient_constants(dtype, device, layout)
                yield Variant(
                    gradient_kernel,
                    signature(
                        gradient_kernel, logits=POINTERS[dtype], out=POINTERS[narrow], token_ids="*i64", lse="*fp64",
                        entropy="*fp64", grad_logprobs="*fp32", grad_entropy="*fp32", sum_sq="*fp64",
                        grad_sum_sq="*fp32", shifts="*fp32", temperatures="*fp32", rows="*i64",
                    ),
                    {
                        "SEGMENT": SEGMENT, "EXACT": narrow == torch.float32,
                        "WHOLE_ROW": narrow.itemsize < dtype.itemsize, "MORE": more, **constants,
                    },
                    options,
                    ("wide_loads", "wide_stores") if layout == ALIGNED.value else (),
                    loop_of(constants["UNROLL"], dtype),
                )

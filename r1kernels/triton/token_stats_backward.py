r"""The gradient of token statistics with respect to the logits: one read and one write of V entries a row.

    dL/dx_j = (g (1[j = y] - p_j) - eta p_j (log p_j + H)) / T,    g = dL/dlogprob,  eta = dL/dentropy

Rows without a gradient are written without being read. The result may take the logits' own memory, also as narrower
entries.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

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
    fma,
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
    x, numbers, EXACT: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, SHIFTED: tl.constexpr
):
    """-(g + eta (log p_j + H)) p_j / T of a tile; `numbers` are those of its row, see `gradient_kernel`. With SHIFTED,
    there is no eta, and `offset` is added.

    log p = (x - anchor)/T + anchor_rest with the float32 next to lse T as anchor, and log p + H = (x - pivot)/T +
    offset with a pivot of its own, because the two cancel where p is near e^{-H}. EXACT keeps what float32 rounds away.
    """
    c, c_rest, anchor, anchor_rest, minus_g, minus_g_rest, minus_eta, pivot, offset, slope, inv_softcap = numbers
    if EXACT:
        lowest = anchor - 1000.0 / c  # as in `below`
        x = tl.where(x < lowest, lowest, x)
        d = x - anchor
        p = exp2_of_product(d, c, c_rest, anchor_rest + difference_error(x, anchor, d) * c)
    else:
        p = tl.exp2(fma(x - anchor, c, anchor_rest))
    factor = minus_g
    if ENTROPY:
        log_p_plus_h = tl.where(p == 0, 0.0, x - pivot) * slope + offset  # 0 * (-inf) = 0
        factor += minus_eta * log_p_plus_h
    gradient = p * factor
    if EXACT:
        gradient += p * minus_g_rest
    if SHIFTED:
        gradient += offset
    if SOFTCAP:
        tanh = tl.maximum(x, LOWEST) * inv_softcap  # -inf * 0 is NaN
        gradient = gradient * ((1.0 - tanh) * (1.0 + tanh))
    return gradient


@triton.jit
def walk(
    start, out_start, size, cols, vocab_stride, own_at, own, numbers, LANES: tl.constexpr, UNROLL: tl.constexpr,
    VEC: tl.constexpr, LAYOUT: tl.constexpr, EXACT: tl.constexpr, WHOLE_ROW: tl.constexpr, ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr, SHIFTED: tl.constexpr,
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
        gradient = tile_gradient(x, numbers, EXACT, ENTROPY, SOFTCAP, SHIFTED)
        if (own_at >= at) & (own_at < at + TILE):
            gradient = tl.where(is_entry(cols, own_at - at, VEC), own, gradient)
        if WHOLE_ROW:
            tl.debug_barrier()  # every thread has read this tile, and those before it
        tl.store(entries(out_start, at, cols, 1, OUT_LAYOUT), rounded(gradient, dtype))
    if full < size:
        inside, last = last_entries(size, full, cols, LANES, VEC, LAYOUT)
        x = tl.load(entries(start, full, cols, vocab_stride, LAYOUT), mask=inside, other=0).to(tl.float32)
        gradient = tile_gradient(x, numbers, EXACT, ENTROPY, SOFTCAP, SHIFTED)
        if own_at >= full:
            gradient = tl.where(is_entry(cols, own_at - full, VEC), own, gradient)
        if LAYOUT == ALIGNED:
            few = tl.load(start + last, mask=last < size, other=0).to(tl.float32)
            few = tl.where(last == own_at, own, tile_gradient(few, numbers, EXACT, ENTROPY, SOFTCAP, SHIFTED))
        if WHOLE_ROW:
            tl.debug_barrier()
        tl.store(entries(out_start, full, cols, 1, OUT_LAYOUT), rounded(gradient, dtype), mask=inside)
        if LAYOUT == ALIGNED:
            tl.store(out_start + last, rounded(few, dtype), mask=last < size)


@triton.jit
def write_zeros(
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
def own_gradient(x, log_sum, h, inv_t, g, eta, inv_softcap):
    """(g (1 - p) - eta p (log p + H)) / T of the token itself, a scalar."""
    log_p = x.to(tl.float64) * inv_t - log_sum
    log_p = tl.where(log_p > 0, 0.0, log_p)  # rounding alone
    p = tl.exp(log_p)
    # g (1 - p) cancels as p goes to 1, -g expm1(log p) does not.
    gradient = -g * expm1(log_p.to(tl.float32), p.to(tl.float32)) - eta * tl.where(p == 0, 0.0, p * (log_p + h))
    tanh = tl.maximum(x, LOWEST) * inv_softcap
    return (gradient * inv_t * ((1.0 - tanh) * (1.0 + tanh))).to(tl.float32)


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
    if (g == 0) & (eta == 0):  # masked or clipped: the row is not read, so nothing in it can matter
        write_zeros(out_start, size, cols, LANES, UNROLL, VEC, LAYOUT)
        return

    target = tl.minimum(tl.maximum(tl.load(token_ids + n), 0), vocab - 1)  # the forward looked: nothing outside is read
    t = temperature_of(temperature, temperatures, many, n)
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
    slope = inv_t.to(tl.float32)
    own = own_gradient(
        tl.load(row + target * vocab_stride).to(tl.float32), log_sum, h, inv_t, g, eta, inv_softcap
    )
    own_at = tl.where((target >= begin) & (target < begin + size), target - begin, -1).to(tl.int32)
    tl.debug_barrier()  # every thread has read the token's logit
    numbers = (
        c, c_rest, anchor, anchor_rest, minus_g, minus_g_rest, minus_eta, pivot, offset, slope, inv_softcap,
    )
    if inv_softcap != 0:
        walk(
            start, out_start, size, cols, vocab_stride, own_at, own, numbers, LANES, UNROLL, VEC, LAYOUT, EXACT,
            WHOLE_ROW, True, True, False,
        )
    elif eta != 0:
        walk(
            start, out_start, size, cols, vocab_stride, own_at, own, numbers, LANES, UNROLL, VEC, LAYOUT, EXACT,
            WHOLE_ROW, True, False, False,
        )
    else:
        walk(
            start, out_start, size, cols, vocab_stride, own_at, own, numbers, LANES, UNROLL, VEC, LAYOUT, EXACT,
            WHOLE_ROW, False, False, False,
        )


# ---- launching ---------------------------------------------------------------------------------------------


def token_stats_backward(
    logits: Tensor, token_ids: Tensor, lse: Tensor, entropy: Tensor, grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None, temperature: float,
) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    given = _given(token_ids, lse, entropy, grad_logprobs, grad_entropy)
    launch_gradient(gradient_kernel, rows_of(logits), rows_of(out), given, temperature, None, 0.0, None)
    return out


def token_stats_backward_out(
    logits: Tensor, token_ids: Tensor, lse: Tensor, entropy: Tensor, grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None, temperature: float, temperatures: Tensor | None, softcap: float, rows: Tensor | None,
    out: Tensor,
) -> None:
    given = _given(token_ids, lse, entropy, grad_logprobs, grad_entropy)
    launch_gradient(
        gradient_kernel, *rows_of_out(logits, out, rows), given, temperature, temperatures, softcap, rows
    )


def _given(
    token_ids: Tensor, lse: Tensor, entropy: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
) -> tuple[Any, ...]:
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(grad_entropy)
    return token_ids, lse, entropy, grad_logprobs, *optional(grad_entropy, torch.float32, token_ids)


def rows_of_out(logits: Tensor, out: Tensor, rows: Tensor | None) -> tuple[Rows, Rows]:
    """The rows of logits, and those that are written."""
    source, target = rows_of(logits), rows_of(out)
    if target.vocab_stride != 1:
        raise ValueError(f"out has stride {target.vocab_stride} over the vocabulary, expected 1")
    shared = logits.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
    if shared and rows is not None:
        raise ValueError("rows was given with an out in the memory of logits, expected memory of its own")
    return source, target if rows is None else target._replace(count=len(rows))


def launch_gradient(
    kernel: Any, source: Rows, target: Rows, given: tuple[Any, ...], temperature: float, temperatures: Tensor | None,
    softcap: float, rows: Tensor | None,
) -> None:
    """given: the kernel's arguments between `out` and `temperatures`. The first is token_ids."""
    logits, out, token_ids = source.data, target.data, given[0]
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
        kernel, (target.count * segments,), logits, *source.arguments(), out, target.inner,
        target.outer_stride, target.inner_stride, *given, *optional(temperatures, torch.float32, token_ids),
        temperature, 1 / softcap if softcap > 0 else 0.0, *optional(rows, torch.int64, token_ids), source.vocab,
        segments, num_warps=chosen.num_warps, SEGMENT=SEGMENT, EXACT=out.dtype == torch.float32, WHOLE_ROW=whole,
        **chosen.gradient_constants(logits.dtype, device, layout),
    )


def gradient_variants(kernel: Any, device: Device, **given: str) -> Iterator[Variant]:
    """Every compilation that `launch_gradient` can ask for; `given` are the types of pointers."""
    for dtype in DTYPES:
        for chosen in configs(dtype, device):
            options = {"num_warps": chosen.num_warps, "num_stages": 1}
            narrower = DTYPES if dtype == torch.float32 else (dtype,)
            for narrow, layout in itertools.product(narrower, LAYOUTS):
                constants = chosen.gradient_constants(dtype, device, layout)
                yield Variant(
                    kernel,
                    signature(
                        kernel, logits=POINTERS[dtype], out=POINTERS[narrow], token_ids="*i64", lse="*fp64",
                        grad_logprobs="*fp32", temperatures="*fp32", rows="*i64", **given,
                    ),
                    {
                        "SEGMENT": SEGMENT, "EXACT": narrow == torch.float32,
                        "WHOLE_ROW": narrow.itemsize < dtype.itemsize, **constants,
                    },
                    options,
                    ("wide_loads", "wide_stores") if layout == ALIGNED.value else (),
                    loop_of(constants["UNROLL"], dtype),
                )


def variants(device: Device) -> Iterator[Variant]:
    return gradient_variants(gradient_kernel, device, entropy="*fp64", grad_entropy="*fp32")

r"""The gradient of cross-entropy with label smoothing: one read and one write of V entries a row.

    dL/dx_j = (g (1[j = y] - p_j) + shift) / T

It is `token_stats_backward` with a number for each row in the place of the entropy's term.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl
from torch import Tensor

from r1kernels.triton.common import LOG2E, LOWEST, Device, Variant, kernel, row_offset
from r1kernels.triton.token_stats_backward import (
    gradient_variants,
    launch_gradient,
    own_gradient,
    rows_of_out,
    walk,
    write_zeros,
)
from r1kernels.triton.token_stats_kernels import temperature_of


@kernel
def shifted_gradient_kernel(
    logits, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64, vocab_stride: tl.int64, out,
    out_inner: tl.int64, out_outer_stride: tl.int64, out_inner_stride: tl.int64, token_ids, lse, grad_logprobs, shifts,
    temperatures, many: tl.int64, temperature: tl.float64, inv_softcap: tl.float32, rows, moved: tl.int64,
    vocab: tl.int64, segments: tl.int64,
    SEGMENT: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
    EXACT: tl.constexpr, WHOLE_ROW: tl.constexpr,
):
    """A segment of a row, as in `gradient_kernel`."""
    pid = tl.program_id(0)
    r = (pid // segments).to(tl.int64)
    segment = (pid % segments).to(tl.int64)
    n = r
    if moved != 0:
        n = tl.load(rows + r)
    begin = segment * SEGMENT
    row = logits + row_offset(n, inner, outer_stride, inner_stride)
    start = row + begin * vocab_stride
    out_start = out + row_offset(r, out_inner, out_outer_stride, out_inner_stride) + begin
    cols = tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    size = (vocab - begin).to(tl.int32)
    if not WHOLE_ROW:
        size = tl.minimum(vocab - begin, SEGMENT).to(tl.int32)

    g, shift = tl.load(grad_logprobs + n), tl.load(shifts + n)
    if (g == 0) & (shift == 0):  # the row is not read, so nothing in it can matter
        write_zeros(out_start, size, cols, LANES, UNROLL, VEC, LAYOUT)
        return

    target = tl.minimum(tl.maximum(tl.load(token_ids + n), 0), vocab - 1)
    t = temperature_of(temperature, temperatures, many, n)
    log_sum = tl.load(lse + n)
    inv_t = 1 / t
    scale = inv_t * LOG2E
    c = scale.to(tl.float32)
    c_rest = (scale - c).to(tl.float32)
    anchor = (log_sum * t).to(tl.float32)
    anchor_rest = ((anchor - log_sum * t) * scale).to(tl.float32)
    minus_g = (-g * inv_t).to(tl.float32)
    minus_g_rest = (-g * inv_t - minus_g).to(tl.float32)
    x = tl.load(row + target * vocab_stride).to(tl.float32)
    tanh = tl.maximum(x, LOWEST) * inv_softcap  # -inf * 0 is NaN
    own = own_gradient(x, log_sum, log_sum, inv_t, g, g * 0, inv_softcap)
    own += (shift * inv_t * ((1.0 - tanh) * (1.0 + tanh))).to(tl.float32)
    own_at = tl.where((target >= begin) & (target < begin + size), target - begin, -1).to(tl.int32)
    tl.debug_barrier()  # every thread has read the token's logit
    offset = (shift * inv_t).to(tl.float32)
    none = offset * 0
    numbers = (c, c_rest, anchor, anchor_rest, minus_g, minus_g_rest, none, none, offset, none, inv_softcap)
    if inv_softcap != 0:
        walk(
            start, out_start, size, cols, vocab_stride, own_at, own, numbers, LANES, UNROLL, VEC, LAYOUT, EXACT,
            WHOLE_ROW, False, True, True,
        )
    else:
        walk(
            start, out_start, size, cols, vocab_stride, own_at, own, numbers, LANES, UNROLL, VEC, LAYOUT, EXACT,
            WHOLE_ROW, False, False, True,
        )


# ---- launching ---------------------------------------------------------------------------------------------


def shifted_gradient_out(
    logits: Tensor, token_ids: Tensor, lse: Tensor, grad_logprobs: Tensor, shift: Tensor, temperature: float,
    temperatures: Tensor | None, softcap: float, rows: Tensor | None, out: Tensor,
) -> None:
    given = (token_ids, lse, grad_logprobs, shift)
    launch_gradient(
        shifted_gradient_kernel, *rows_of_out(logits, out, rows), given, temperature, temperatures, softcap, rows
    )


def variants(device: Device) -> Iterator[Variant]:
    return gradient_variants(shifted_gradient_kernel, device, shifts="*fp32")

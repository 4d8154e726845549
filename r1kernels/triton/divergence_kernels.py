"""Kernels of the divergences: sums of terms >= 0, gradient; what they make is in divergence.py.

A program reduces one segment of a row, of fixed size, to a few float32 numbers. A second kernel merges the segments
of a row in float64, in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from r1kernels.triton.common import kernel, wide
from r1kernels.triton.divergence_fast import fast_constants, gradient_fast, jsd_fast, kl_fast
from r1kernels.triton.divergence_math import (
    CONSTANTS,
    entry_of,
    gradient_of,
    jsd_terms,
    kl_term,
    load_constants,
    store_constants,
)
from r1kernels.triton.entries import load_tiles, load_wide, row_start, store_tile, store_wide, whole_tiles
from r1kernels.triton.token_stats_kernels import row_statistics

# ---- statistics of both rows ------------------------------------------------------------------------------------


@kernel
def merge_statistics_kernel(
    partials, exact_student: tl.int64, exact_teacher: tl.int64, mask, masked: tl.int64, temperature: tl.float64,
    beta: tl.float64, lse_student, lse_teacher, student_entropy, teacher_entropy, constants, count: tl.int64,
    segments: tl.int64, BLOCK: tl.constexpr,
):
    """Both log-sum-exps, both entropies and the rows' constants, from what `token_stats.segment_kernel` left."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = n < count
    counts = keep
    if masked != 0:
        counts = keep & tl.load(mask + n, mask=keep, other=0).to(tl.int1)
    t = wide(temperature)
    no_logit = tl.full((BLOCK,), float("-inf"), tl.float64)  # the segments leave none out
    _, lse_p, entropy_p = row_statistics(partials, no_logit, n, counts, count, segments, t, exact_student)
    of_teacher = partials + 4 * segments * count
    _, lse_q, entropy_q = row_statistics(of_teacher, no_logit, n, counts, count, segments, t, exact_teacher)
    zero = wide(0.0)
    store_constants(constants, n, counts, lse_p, lse_q, t, wide(beta), zero, zero, zero)
    tl.store(lse_student + n, tl.where(counts, lse_p, 0.0), mask=keep)
    tl.store(lse_teacher + n, tl.where(counts, lse_q, 0.0), mask=keep)
    tl.store(student_entropy + n, tl.where(counts, entropy_p, 0.0), mask=keep)
    tl.store(teacher_entropy + n, tl.where(counts, entropy_q, 0.0), mask=keep)


# ---- the divergence -------------------------------------------------------------------------------------------


@triton.jit
def _add_terms(
    x, y, row, fast, weight_q, weight_p, of_student, of_teacher, JSD: tl.constexpr, EXACT: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """Both sums of each lane with a tile's terms; a KL has one sum."""
    if JSD:
        if EXACT:
            student, teacher = jsd_terms(entry_of(x, y, row), weight_q, weight_p)
        else:
            student, teacher = jsd_fast(x, y, fast, weight_q, weight_p, NVIDIA)
        of_teacher += tl.sum(teacher, 0)
    else:
        if EXACT:
            student = kl_term(entry_of(x, y, row))
        else:
            student = kl_fast(x, y, fast)
    return of_student + tl.sum(student, 0), of_teacher


@kernel
def terms_kernel(
    first, first_code: tl.int64, first_misalignment: tl.int64, first_inner: tl.int64, first_outer_stride: tl.int64,
    first_inner_stride: tl.int64, first_vocab_stride: tl.int64,
    second, second_code: tl.int64, second_misalignment: tl.int64, second_inner: tl.int64, second_outer_stride: tl.int64,
    second_inner_stride: tl.int64, second_vocab_stride: tl.int64,
    swapped: tl.int64, mask, masked: tl.int64, constants, partials, count: tl.int64, vocab: tl.int64,
    segments: tl.int64,
    SEGMENT: tl.constexpr, JSD: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
    EXACT: tl.constexpr, NVIDIA: tl.constexpr,
):
    """partials (2, segments, N): a segment's sum of the terms of KL(second||first); or of KL(p||m)'s and KL(q||m)'s.

    `first` is the student's p, or the teacher's where they are swapped.
    """
    pid = tl.program_id(0)
    n = (pid // segments).to(tl.int64)
    segment = (pid % segments).to(tl.int64)
    if masked != 0:
        if not tl.load(mask + n):
            return
    row = load_constants(constants, n, swapped)
    fast = fast_constants(row)
    weight_q = tl.load(constants + n * CONSTANTS + 10)
    weight_p = tl.load(constants + n * CONSTANTS + 11)
    p, p_vectors = row_start(
        first, first_code, first_misalignment, first_inner, first_outer_stride, first_inner_stride, n
    )
    q, q_vectors = row_start(
        second, second_code, second_misalignment, second_inner, second_outer_stride, second_inner_stride, n
    )
    TILE: tl.constexpr = LANES * UNROLL
    cols = tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    of_student = tl.zeros((LANES,), tl.float32)
    of_teacher = tl.zeros((LANES,), tl.float32)
    begin = segment * SEGMENT
    end = tl.minimum(begin + SEGMENT, vocab)
    whole = whole_tiles(begin, end, p_vectors & q_vectors, TILE, EXACT)
    if not EXACT:
        for at in range(begin, whole, TILE):
            x, y = load_wide(p, q, at, cols)
            of_student, of_teacher = _add_terms(
                x, y, row, fast, weight_q, weight_p, of_student, of_teacher, JSD, EXACT, NVIDIA
            )
    for at in range(whole, end, TILE):
        x, y = load_tiles(
            p, p_vectors & EXACT, first_vocab_stride, first_code, q, q_vectors & EXACT, second_vocab_stride,
            second_code, at, cols, end - at, TILE,
        )
        of_student, of_teacher = _add_terms(
            x, y, row, fast, weight_q, weight_p, of_student, of_teacher, JSD, EXACT, NVIDIA
        )
    tl.store(partials + segment * count + n, tl.sum(of_student, 0))
    if JSD:
        tl.store(partials + (segments + segment) * count + n, tl.sum(of_teacher, 0))


@kernel
def merge_terms_kernel(
    partials, mask, masked: tl.int64, student_entropy, teacher_entropy, value, inner, count: tl.int64,
    segments: tl.int64, kind: tl.int64, beta: tl.float64, BLOCK: tl.constexpr,
):
    """The divergence, and the constant of its gradient: KL(p||m) for jsd, else the divergence."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = n < count
    counts = keep
    if masked != 0:
        counts = keep & tl.load(mask + n, mask=keep, other=0).to(tl.int1)
    of_student = tl.zeros((BLOCK,), tl.float64)
    of_teacher = tl.zeros((BLOCK,), tl.float64)
    for s in range(0, segments):
        of_student += tl.load(partials + s * count + n, mask=counts, other=0).to(tl.float64)
        if kind == 2:
            of_teacher += tl.load(partials + (segments + s) * count + n, mask=counts, other=0).to(tl.float64)
    of_student = tl.where(of_student < 0, 0.0, of_student)  # the -1e-36 of `kl_fast`
    # NaN, inf, or no word at all in either row: the entropy is NaN, and so is the divergence.
    entropies = tl.load(student_entropy + n, mask=counts, other=0)
    entropies += tl.load(teacher_entropy + n, mask=counts, other=0)
    of_student += entropies * 0.0
    result = of_student
    if kind == 2:
        b = wide(beta)
        result = b * of_teacher + (1 - b) * of_student
    tl.store(value + n, tl.where(counts, result, 0.0).to(tl.float32), mask=keep)
    tl.store(inner + n, tl.where(counts, of_student, 0.0), mask=keep)


# ---- gradient -------------------------------------------------------------------------------------------------


@kernel
def prepare_kernel(
    lse_student, lse_teacher, inner, grad, temperature: tl.float64, beta: tl.float64, softcap: tl.float64, constants,
    count: tl.int64, kind: tl.int64, BLOCK: tl.constexpr,
):
    """The rows' constants; the gradient's factor is 0 where its row is not to be read."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = n < count
    of_row = tl.load(inner + n, mask=keep, other=0)
    g = tl.load(grad + n, mask=keep, other=0).to(tl.float64)
    t, b, cap = wide(temperature), wide(beta), wide(softcap)
    if kind == 2:
        g = g * (1 - b)
    # An infinite KL(p||q) stays infinite under any finite change of the logits: its gradient is 0.
    factor = tl.where((kind == 1) & (of_row == float("inf")), 0.0, g / t)
    inv_softcap = tl.where(cap > 0, 1 / tl.where(cap > 0, cap, 1.0), 0.0)
    of_student = tl.load(lse_student + n, mask=keep, other=0)
    of_teacher = tl.load(lse_teacher + n, mask=keep, other=0)
    store_constants(constants, n, keep, of_student, of_teacher, t, b, of_row, factor, inv_softcap)


@triton.jit
def _through_softcap(grad, x, inv_softcap):
    """Times 1 - tanh^2, whose factors lose nothing near the cap; inv_softcap is 0 without one."""
    if inv_softcap != 0:
        tanh = x * inv_softcap
        grad = grad * ((1.0 - tanh) * (1.0 + tanh))
    return grad


@kernel
def gradient_kernel(
    student, student_code: tl.int64, student_misalignment: tl.int64, student_inner: tl.int64,
    student_outer_stride: tl.int64, student_inner_stride: tl.int64, student_vocab_stride: tl.int64,
    teacher, teacher_code: tl.int64, teacher_misalignment: tl.int64, teacher_inner: tl.int64,
    teacher_outer_stride: tl.int64, teacher_inner_stride: tl.int64, teacher_vocab_stride: tl.int64,
    out, out_code: tl.int64, out_misalignment: tl.int64, out_inner: tl.int64,
    out_outer_stride: tl.int64, out_inner_stride: tl.int64, out_vocab_stride: tl.int64,
    constants, vocab: tl.int64, span: tl.int64, spans: tl.int64, kind: tl.int64,
    LANES: tl.constexpr, UNROLL: tl.constexpr, EXACT: tl.constexpr, NVIDIA: tl.constexpr,
):
    """`span` entries of a row. `out` may be the student's memory, row for row.

    Entries as wide as the student's are then stored where the same tile read them. Narrower ones fall on entries of
    tiles before, if one program walks the whole row in order, and on the first of their own: hence the barrier.
    """
    pid = tl.program_id(0)
    n = (pid // spans).to(tl.int64)
    part = (pid % spans).to(tl.int64)
    row = load_constants(constants, n, 0)
    fast = fast_constants(row)
    weight_q = tl.load(constants + n * CONSTANTS + 10)
    weight_p = tl.load(constants + n * CONSTANTS + 11)
    inner = tl.load(constants + n * CONSTANTS + 12)
    factor = tl.load(constants + n * CONSTANTS + 13)
    inv_softcap = tl.load(constants + n * CONSTANTS + 14)
    p, p_vectors = row_start(
        student, student_code, student_misalignment, student_inner, student_outer_stride, student_inner_stride, n
    )
    q, q_vectors = row_start(
        teacher, teacher_code, teacher_misalignment, teacher_inner, teacher_outer_stride, teacher_inner_stride, n
    )
    result, result_vectors = row_start(
        out, out_code, out_misalignment, out_inner, out_outer_stride, out_inner_stride, n
    )
    TILE: tl.constexpr = LANES * UNROLL
    cols = tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    begin = part * span
    end = tl.minimum(begin + span, vocab)
    if factor == 0:
        zeros = tl.zeros((UNROLL, LANES), tl.float32)
        for at in range(begin, end, TILE):
            store_tile(result, result_vectors, at, cols, end - at, zeros, out_code, TILE)
    else:
        whole = whole_tiles(begin, end, p_vectors & q_vectors & result_vectors, TILE, EXACT)
        if not EXACT:  # as wide as the student's
            for at in range(begin, whole, TILE):
                x, y = load_wide(p, q, at, cols)
                grad = gradient_fast(x, y, fast, inner, factor, weight_q, weight_p, kind, NVIDIA)
                store_wide(result, at, cols, _through_softcap(grad, x, inv_softcap))
        for at in range(whole, end, TILE):
            x, y = load_tiles(
                p, p_vectors & EXACT, student_vocab_stride, student_code, q, q_vectors & EXACT, teacher_vocab_stride,
                teacher_code, at, cols, end - at, TILE,
            )
            if EXACT:
                tl.debug_barrier()
                grad = gradient_of(x, y, row, inner, factor, weight_q, weight_p, kind)
            else:
                grad = gradient_fast(x, y, fast, inner, factor, weight_q, weight_p, kind, NVIDIA)
            grad = _through_softcap(grad, x, inv_softcap)
            store_tile(result, result_vectors & EXACT, at, cols, end - at, grad, out_code, TILE)

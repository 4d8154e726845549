r"""Divergence of a student's rows of logits from a teacher's (forward KL, reverse KL, jsd), and its gradient.

Forward: a read of either tensor for the log-sum-exps and entropies, then a second read of both for terms >= 0, which
need them (`divergence_math`). A program reduces one segment of a row, of fixed size, to a few float32 numbers; a
kernel over rows merges the segments in float64, in order. Bits depend on the row alone. Backward: one read of both and
one write; what a row's entries need of its float64 numbers is prepared once a row.

Bytes: 2 (student + teacher) forward, student + teacher + out backward, a row masked or without a gradient reading
none; beside them 190 a token and 40 a token and segment forward, 92 a token backward.

Rows of one dtype that begin at the same place of a 16-byte vector go in such vectors, whatever lies before and after
the vectors entry by entry. All others (a stride over the vocabulary, student and teacher of different dtypes) are one
kernel for every dtype, entry by entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

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
    Rows,
    Variant,
    device_of,
    kernel,
    launch,
    rows_of,
    wide,
)
from r1kernels.triton.divergence_math import (
    CONSTANTS,
    entry_of,
    gradient_of,
    jsd_terms,
    kl_term,
    load_constants,
    store_constants,
)
from r1kernels.triton.entries import (
    BYTES,
    DTYPES,
    EDGE,
    ROW_SIGNATURE,
    in_vectors,
    load_entries,
    load_tile,
    row_arguments,
    row_start,
    store_entries,
    store_tile,
    vector,
    vectors_of_row,
)
from r1kernels.triton.token_stats import add_tile

GRADIENTS = ((torch.float32, torch.bfloat16), *((dtype, dtype) for dtype in DTYPES))  # logits, out: those in vectors
SEGMENT = 16384  # entries: part of what the bits depend on
MERGE_ROWS = 64


class Config(NamedTuple):
    """A tile is a vector of 16 bytes (of the narrower dtype) for each of the num_warps x 32 (64) threads."""

    num_warps: int

    def lanes(self, vec: int, warp: int) -> int:
        return self.num_warps * warp * vec


def config(shape: tuple[int, int], dtype: torch.dtype, device: Device) -> Config:
    """The tile for (N, V) logits: few warps, as an entry takes a hundred registers' worth of arithmetic."""
    return Config(num_warps=4)


# ---- statistics of one tensor ---------------------------------------------------------------------------------


@kernel
def statistics_kernel(
    logits, code: tl.int64, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64, vocab_stride: tl.int64,
    misalignment: tl.int64, mask, masked: tl.int64, temperature: tl.float64, partials, count: tl.int64,
    vocab: tl.int64, segments: tl.int64,
    SEGMENT: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, VEC: tl.constexpr,
    EXACT: tl.constexpr,
):
    """partials (3, segments, N): maximum, sum and weighted sum of a segment, relative to its maximum."""
    pid = tl.program_id(0)
    n = (pid // segments).to(tl.int64)
    segment = (pid % segments).to(tl.int64)
    if masked != 0:
        if not tl.load(mask + n):
            return
    row = row_start(logits, n, code, inner, outer_stride, inner_stride)
    c = (1 / wide(temperature) * LOG2E).to(tl.float32)
    lanes = tl.arange(0, LANES)
    top = tl.full((LANES,), LOWEST, tl.float32)
    rest = tl.zeros((LANES,), tl.float32)
    weighted = tl.zeros((LANES,), tl.float32)
    maxima = tl.zeros((LANES,), tl.float32)
    cols = tl.arange(0, UNROLL)[:, None] * LANES + lanes[None, :]

    head, body = vectors_of_row(n, misalignment, inner, outer_stride, inner_stride, vocab, VEC)
    begin = segment * SEGMENT
    end = tl.minimum(begin + SEGMENT, body)
    for at in range(begin, end, LANES * UNROLL):
        inside = cols < tl.multiple_of(end - at, VEC)
        x = load_tile(row, head + at, cols, inside, vocab_stride, code, VEC)
        top, rest, weighted, maxima = add_tile(x, top, rest, weighted, maxima, c, EXACT)
    if VEC > 1:
        if (segment == 0) & (body < vocab):  # what lies before and after the vectors
            edge = tl.where(lanes < head, lanes, body + lanes)[None, :]
            x = load_entries(row, edge, edge < vocab, code)
            top, rest, weighted, maxima = add_tile(x, top, rest, weighted, maxima, c, EXACT)

    highest = tl.max(top, 0)
    shift = tl.maximum(top - highest, LOWEST)
    factor = tl.exp2(shift * c)
    total = factor * (rest + maxima)
    total_weighted = tl.where(factor == 0, 0.0, factor * (weighted + shift * (rest + maxima)))
    out = partials + segment * count + n
    plane = segments * count
    tl.store(out, highest)
    tl.store(out + plane, tl.sum(total, 0))
    tl.store(out + 2 * plane, tl.sum(total_weighted, 0))


@triton.jit
def _merged(partials, n, counts, count, segments, t):
    """Log-sum-exp and entropy of rows n in float64."""
    plane = segments * count
    c = (1 / t * LOG2E).to(tl.float32).to(tl.float64)  # what the segments were summed with
    top = tl.full(n.shape, LOWEST, tl.float32)
    for s in range(0, segments):
        top = tl.maximum(top, tl.load(partials + s * count + n, mask=counts, other=0))
    total = tl.zeros(n.shape, tl.float64)
    weighted = tl.zeros(n.shape, tl.float64)
    for s in range(0, segments):
        at = partials + s * count + n
        shift = tl.load(at, mask=counts, other=0).to(tl.float64) - top.to(tl.float64)
        factor = tl.exp2(shift * c)
        part = tl.load(at + plane, mask=counts, other=0).to(tl.float64)
        part_weighted = tl.load(at + 2 * plane, mask=counts, other=0).to(tl.float64)
        total += factor * part
        weighted += tl.where(factor == 0, 0.0, factor * (part_weighted + shift * part))
    mean = weighted / total  # sum_j p_j (x_j - top)
    log_total = tl.log(total)
    # The sums are those of a temperature that is log2(e) / c: a rounding away, and the logarithm's slope is the mean.
    lse = top.to(tl.float64) / t + (log_total + (1 / t - c * LN2) * mean)
    return lse, log_total - mean * c * LN2


@kernel
def merge_statistics_kernel(
    partials, mask, masked: tl.int64, temperature: tl.float64, beta: tl.float64, statistics, constants,
    count: tl.int64, segments: tl.int64, BLOCK: tl.constexpr,
):
    """statistics (4, N): both log-sum-exps and both entropies, the student's first; and the rows' constants."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = n < count
    counts = keep
    if masked != 0:
        counts = keep & tl.load(mask + n, mask=keep, other=0).to(tl.int1)
    t = wide(temperature)
    lse_student, entropy_student = _merged(partials, n, counts, count, segments, t)
    lse_teacher, entropy_teacher = _merged(partials + 3 * segments * count, n, counts, count, segments, t)
    zero = wide(0.0)
    store_constants(constants, n, counts, lse_student, lse_teacher, t, wide(beta), zero, zero, zero)
    tl.store(statistics + n, tl.where(counts, lse_student, 0.0), mask=keep)
    tl.store(statistics + count + n, tl.where(counts, lse_teacher, 0.0), mask=keep)
    tl.store(statistics + 2 * count + n, tl.where(counts, entropy_student, 0.0), mask=keep)
    tl.store(statistics + 3 * count + n, tl.where(counts, entropy_teacher, 0.0), mask=keep)


# ---- the divergence -------------------------------------------------------------------------------------------


@triton.jit
def _terms(x, y, row, weight_q, weight_p, kind, EXACT: tl.constexpr):
    entry = entry_of(x, y, row, EXACT)
    if kind == 2:
        of_student, of_teacher = jsd_terms(entry, weight_q, weight_p)
    else:
        of_student = kl_term(entry, entry[0] ^ (kind == 1))
        of_teacher = tl.zeros_like(of_student)
    return of_student, of_teacher


@kernel
def terms_kernel(
    student, student_code: tl.int64, student_inner: tl.int64, student_outer_stride: tl.int64,
    student_inner_stride: tl.int64, student_vocab_stride: tl.int64,
    teacher, teacher_code: tl.int64, teacher_inner: tl.int64, teacher_outer_stride: tl.int64,
    teacher_inner_stride: tl.int64, teacher_vocab_stride: tl.int64,
    misalignment: tl.int64, mask, masked: tl.int64, constants, partials, count: tl.int64, vocab: tl.int64,
    segments: tl.int64, kind: tl.int64,
    SEGMENT: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, EXACT: tl.constexpr,
):
    """partials (2, segments, N): a segment's sum of a KL's terms; or of KL(p||m)'s and of KL(q||m)'s."""
    pid = tl.program_id(0)
    n = (pid // segments).to(tl.int64)
    segment = (pid % segments).to(tl.int64)
    if masked != 0:
        if not tl.load(mask + n):
            return
    row = load_constants(constants, n)
    weight_q = tl.load(constants + n * CONSTANTS + 10)
    weight_p = tl.load(constants + n * CONSTANTS + 11)
    p = row_start(student, n, student_code, student_inner, student_outer_stride, student_inner_stride)
    q = row_start(teacher, n, teacher_code, teacher_inner, teacher_outer_stride, teacher_inner_stride)
    cols = tl.arange(0, LANES)
    of_student = tl.zeros((LANES,), tl.float32)
    of_teacher = tl.zeros((LANES,), tl.float32)

    head, body = vectors_of_row(
        n, misalignment, student_inner, student_outer_stride, student_inner_stride, vocab, VEC
    )
    begin = segment * SEGMENT
    end = tl.minimum(begin + SEGMENT, body)
    for at in range(begin, end, LANES):
        inside = cols < tl.multiple_of(end - at, VEC)
        x = load_tile(p, head + at, cols, inside, student_vocab_stride, student_code, VEC)
        y = load_tile(q, head + at, cols, inside, teacher_vocab_stride, teacher_code, VEC)
        add_student, add_teacher = _terms(x, y, row, weight_q, weight_p, kind, EXACT)
        of_student += add_student
        of_teacher += add_teacher
    sum_student = tl.sum(of_student, 0)
    sum_teacher = tl.sum(of_teacher, 0)
    if VEC > 1:
        if (segment == 0) & (body < vocab):  # what lies before and after the vectors
            lanes = tl.arange(0, EDGE)
            edge = tl.where(lanes < head, lanes, body + lanes)
            x = load_entries(p, edge, edge < vocab, student_code)
            y = load_entries(q, edge, edge < vocab, teacher_code)
            add_student, add_teacher = _terms(x, y, row, weight_q, weight_p, kind, EXACT)
            sum_student += tl.sum(add_student, 0)
            sum_teacher += tl.sum(add_teacher, 0)
    tl.store(partials + segment * count + n, sum_student)
    tl.store(partials + (segments + segment) * count + n, sum_teacher)


@kernel
def merge_terms_kernel(
    partials, mask, masked: tl.int64, statistics, value, inner, count: tl.int64, segments: tl.int64, kind: tl.int64,
    beta: tl.float64, BLOCK: tl.constexpr,
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
        of_teacher += tl.load(partials + (segments + s) * count + n, mask=counts, other=0).to(tl.float64)
    # NaN, inf, or no word at all in either row: the entropy is NaN, and so is the divergence.
    entropies = tl.load(statistics + 2 * count + n, mask=counts, other=0)
    entropies += tl.load(statistics + 3 * count + n, mask=counts, other=0)
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


@kernel
def gradient_kernel(
    student, student_code: tl.int64, student_inner: tl.int64, student_outer_stride: tl.int64,
    student_inner_stride: tl.int64, student_vocab_stride: tl.int64,
    teacher, teacher_code: tl.int64, teacher_inner: tl.int64, teacher_outer_stride: tl.int64,
    teacher_inner_stride: tl.int64, teacher_vocab_stride: tl.int64,
    out, out_code: tl.int64, out_inner: tl.int64, out_outer_stride: tl.int64, out_inner_stride: tl.int64,
    out_vocab_stride: tl.int64,
    misalignment: tl.int64, constants, vocab: tl.int64, span: tl.int64, spans: tl.int64, kind: tl.int64,
    LANES: tl.constexpr, VEC: tl.constexpr, EXACT: tl.constexpr, BARRIER: tl.constexpr,
):
    """`span` entries of a row. `out` may be the student's memory, row for row.

    Entries as wide as the student's are then stored by the thread that read them. Narrower ones fall on entries read
    before, if one program walks the whole row in order, or on those of its own tile: hence the barrier.
    """
    pid = tl.program_id(0)
    n = (pid // spans).to(tl.int64)
    part = (pid % spans).to(tl.int64)
    row = load_constants(constants, n)
    weight_q = tl.load(constants + n * CONSTANTS + 10)
    weight_p = tl.load(constants + n * CONSTANTS + 11)
    inner = tl.load(constants + n * CONSTANTS + 12)
    factor = tl.load(constants + n * CONSTANTS + 13)
    inv_softcap = tl.load(constants + n * CONSTANTS + 14)
    p = row_start(student, n, student_code, student_inner, student_outer_stride, student_inner_stride)
    q = row_start(teacher, n, teacher_code, teacher_inner, teacher_outer_stride, teacher_inner_stride)
    result = row_start(out, n, out_code, out_inner, out_outer_stride, out_inner_stride)
    cols = tl.arange(0, LANES)
    lanes = tl.arange(0, EDGE)

    # The vectors are those of `out`, whose entries are no wider.
    head, body = vectors_of_row(n, misalignment, out_inner, out_outer_stride, out_inner_stride, vocab, VEC)
    edge = tl.where(lanes < head, lanes, body + lanes)
    begin = part * span
    end = tl.minimum(begin + span, body)
    if factor == 0:
        zeros = tl.zeros((LANES,), tl.float32)
        for at in range(begin, end, LANES):
            inside = cols < tl.multiple_of(end - at, VEC)
            store_tile(result, head + at, cols, inside, zeros, out_code, VEC)
        if VEC > 1:
            if part == 0:
                store_entries(result, edge, edge < vocab, tl.zeros((EDGE,), tl.float32), out_code)
        return

    for at in range(begin, end, LANES):
        inside = cols < tl.multiple_of(end - at, VEC)
        x = load_tile(p, head + at, cols, inside, student_vocab_stride, student_code, VEC)
        y = load_tile(q, head + at, cols, inside, teacher_vocab_stride, teacher_code, VEC)
        if BARRIER:
            tl.debug_barrier()
        grad = gradient_of(x, y, row, inner, factor, weight_q, weight_p, inv_softcap, kind, EXACT)
        store_tile(result, head + at, cols, inside, grad, out_code, VEC)
    if VEC > 1:
        if (part == 0) & (body < vocab):  # what lies before and after the vectors
            x = load_entries(p, edge, edge < vocab, student_code)
            y = load_entries(q, edge, edge < vocab, teacher_code)
            tl.debug_barrier()  # several threads read the same entry, and one of them stores it
            grad = gradient_of(x, y, row, inner, factor, weight_q, weight_p, inv_softcap, kind, EXACT)
            store_entries(result, edge, edge < vocab, grad, out_code)


# ---- launchers ------------------------------------------------------------------------------------------------


def _rows_pair(student: Tensor, teacher: Tensor) -> tuple[Rows, Rows]:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have the same shape, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    return rows_of(student), rows_of(teacher)


def _check_kind(kind: int) -> None:
    if kind not in (0, 1, 2):
        raise ValueError(f"kind is {kind}, expected 0, 1 or 2")


class _Tile(NamedTuple):
    """VEC and LANES of a kernel on entries of `dtype`, or on bytes (None); EXACT: with the roundings of differences."""

    lanes: int
    vec: int
    exact: bool
    num_warps: int


def _tile(shape: tuple[int, int], narrowest: torch.dtype, logits: torch.dtype | None, device: Device) -> _Tile:
    chosen = config(shape, narrowest, device)
    vec = 1 if logits is None else vector(narrowest)
    lanes = chosen.lanes(4 if logits is None else vec, device.warp)
    return _Tile(lanes, vec, logits in (None, torch.float32), chosen.num_warps)


def _statistics_constants(logits: torch.dtype | None, shape: tuple[int, int], device: Device) -> dict[str, Any]:
    tile = _tile(shape, logits or torch.float32, logits, device)
    return {
        "SEGMENT": SEGMENT, "LANES": tile.lanes, "UNROLL": 2, "VEC": tile.vec, "EXACT": tile.exact,
        "num_warps": tile.num_warps,
    }


def _terms_constants(logits: torch.dtype | None, shape: tuple[int, int], device: Device) -> dict[str, Any]:
    tile = _tile(shape, logits or torch.float32, logits, device)
    return {
        "SEGMENT": SEGMENT, "LANES": tile.lanes, "VEC": tile.vec, "EXACT": tile.exact, "num_warps": tile.num_warps
    }


def _gradient_constants(
    logits: torch.dtype | None, out: torch.dtype, shape: tuple[int, int], device: Device
) -> dict[str, Any]:
    tile = _tile(shape, out, logits, device)
    return {
        "LANES": tile.lanes, "VEC": tile.vec, "EXACT": tile.exact, "BARRIER": logits != out,
        "num_warps": tile.num_warps,
    }


def divergence(
    student: Tensor, teacher: Tensor, mask: Tensor | None, kind: int, beta: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Value (float32), both log-sum-exps, constant of the gradient and both entropies (float64), each (...)."""
    p, q = _rows_pair(student, teacher)
    _check_kind(kind)
    shape, device, size = student.shape[:-1], device_of(student), (p.count, p.vocab)
    value = student.new_empty(shape, dtype=torch.float32)
    inner = student.new_empty(shape, dtype=torch.float64)
    statistics = student.new_empty((4, *shape), dtype=torch.float64)
    segments = triton.cdiv(p.vocab, SEGMENT)
    partials = student.new_empty((6, segments, p.count), dtype=torch.float32)
    constants = student.new_empty((p.count, CONSTANTS.value), dtype=torch.float32)
    masked = int(mask is not None)
    mask = mask if mask is not None else student.new_empty(1, dtype=torch.bool)

    grid, merge_grid = (p.count * segments,), (triton.cdiv(p.count, MERGE_ROWS),)
    for rows, part in ((p, partials[:3]), (q, partials[3:])):
        vectors = rows.vocab_stride == 1
        launch(
            statistics_kernel, grid, student, *row_arguments(rows, vectors), rows.misalignment, mask, masked,
            temperature, part, p.count, p.vocab, segments,
            **_statistics_constants(rows.data.dtype if vectors else None, size, device),
        )
    launch(
        merge_statistics_kernel, merge_grid, student, partials, mask, masked, temperature, beta, statistics, constants,
        p.count, segments, BLOCK=MERGE_ROWS, num_warps=MERGE_ROWS // 32,
    )
    vectors = p.data.dtype == q.data.dtype and in_vectors(p, q)
    launch(
        terms_kernel, grid, student, *row_arguments(p, vectors), *row_arguments(q, vectors), p.misalignment, mask,
        masked, constants, partials, p.count, p.vocab, segments, kind,
        **_terms_constants(p.data.dtype if vectors else None, size, device),
    )
    launch(
        merge_terms_kernel, merge_grid, student, partials, mask, masked, statistics, value, inner, p.count, segments,
        kind, beta, BLOCK=MERGE_ROWS, num_warps=MERGE_ROWS // 32,
    )
    lse_student, lse_teacher, student_entropy, teacher_entropy = statistics.unbind()
    return value, lse_student, lse_teacher, inner, student_entropy, teacher_entropy


def _extent(tensor: Tensor) -> range:
    """Bytes from the first to the last entry."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return range(tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size())


def _overlap(a: Tensor, b: Tensor) -> bool:
    x, y = _extent(a), _extent(b)
    return x.start < y.stop and y.start < x.stop


def _row_for_row(out: Tensor, student: Tensor) -> bool:
    """Whether rows of `out` start where the student's do and are no longer."""
    sizes = out.element_size(), student.element_size()
    strides = zip(out.shape[:-1], out.stride()[:-1], student.stride()[:-1], strict=True)
    unit = student.shape[-1] == 1 or student.stride(-1) == 1
    return (
        out.data_ptr() == student.data_ptr() and sizes[0] <= sizes[1] and unit
        and all(size == 1 or a * sizes[0] == b * sizes[1] for size, a, b in strides)
    )


def divergence_backward(
    student: Tensor, teacher: Tensor, lse_student: Tensor, lse_teacher: Tensor, inner: Tensor, grad: Tensor,
    kind: int, beta: float, temperature: float, out: Tensor, softcap: float = 0.0,
) -> None:
    """d student into `out`, whose memory is its own or the student's, row for row."""
    p, q = _rows_pair(student, teacher)
    _check_kind(kind)
    if out.shape != student.shape:
        raise ValueError(f"out must have the student's shape {tuple(student.shape)}, got {tuple(out.shape)}")
    if p.vocab > 1 and out.stride(-1) != 1:
        raise ValueError(f"out must have unit stride over the vocabulary, got {out.stride(-1)}")
    if not softcap >= 0:
        raise ValueError(f"softcap is {softcap}, expected a number >= 0")
    if student.numel() == 0:
        return
    shared = _overlap(out, student)
    if shared and not _row_for_row(out, student):
        raise ValueError(
            "out overlaps student, expected rows that start together and elements of out that are no wider"
        )
    if _overlap(out, teacher):
        raise ValueError("out overlaps teacher, expected memory of its own")
    result = rows_of(out)
    if result.data is not out:  # three or more dimensions that defy merging
        apart = torch.empty_like(out, memory_format=torch.contiguous_format)
        divergence_backward(
            student, teacher, lse_student, lse_teacher, inner, grad, kind, beta, temperature, apart, softcap
        )
        out.copy_(apart)
        return

    device, size = device_of(student), (p.count, p.vocab)
    constants = student.new_empty((p.count, CONSTANTS.value), dtype=torch.float32)
    launch(
        prepare_kernel, (triton.cdiv(p.count, MERGE_ROWS),), student, lse_student, lse_teacher, inner, grad,
        temperature, beta, softcap, constants, p.count, kind, BLOCK=MERGE_ROWS, num_warps=MERGE_ROWS // 32,
    )
    # A narrower gradient in the student's memory: the stores of a tile fall on entries of the tiles before it.
    whole_rows = shared and out.element_size() < student.element_size()
    span = p.vocab if whole_rows else SEGMENT
    spans = triton.cdiv(p.vocab, span)
    dtypes = p.data.dtype, result.data.dtype
    vectors = p.data.dtype == q.data.dtype and dtypes in GRADIENTS and in_vectors(result, p, q)
    launch(
        gradient_kernel, (p.count * spans,), student, *row_arguments(p, vectors), *row_arguments(q, vectors),
        *row_arguments(result, vectors), result.misalignment, constants, p.vocab, span, spans, kind,
        **_gradient_constants(dtypes[0] if vectors else None, dtypes[1], size, device),
    )


# ---- every compilation ----------------------------------------------------------------------------------------


def _signature(tensors: dict[str, str], integers: str = "", doubles: str = "") -> dict[str, str]:
    return tensors | dict.fromkeys(integers.split(), "i64") | dict.fromkeys(doubles.split(), "fp64")


def _variant(kernel: Any, signature: dict[str, str], constants: dict[str, Any], *expects: str) -> Variant:
    constants = dict(constants)
    options = {"num_warps": constants.pop("num_warps"), "num_stages": 1}
    return Variant(kernel, signature, constants, options, expects)


def variants(device: Device) -> Iterator[Variant]:
    """Every compilation that a launch on this device can ask for."""
    shape = (1, 1)  # no tile depends on it
    merge = {"BLOCK": MERGE_ROWS, "num_warps": MERGE_ROWS // 32}
    yield _variant(
        merge_statistics_kernel,
        _signature({"partials": "*fp32", "mask": "*i1", "statistics": "*fp64", "constants": "*fp32"},
                   "masked count segments", "temperature beta"),
        merge,
    )
    yield _variant(
        merge_terms_kernel,
        _signature({"partials": "*fp32", "mask": "*i1", "statistics": "*fp64", "value": "*fp32", "inner": "*fp64"},
                   "masked count segments kind", "beta"),
        merge,
    )
    yield _variant(
        prepare_kernel,
        _signature({"lse_student": "*fp64", "lse_teacher": "*fp64", "inner": "*fp64", "grad": "*fp32",
                    "constants": "*fp32"}, "count kind", "temperature beta softcap"),
        merge,
    )
    rows = " ".join(ROW_SIGNATURE)
    both = " ".join(f"{name}_{field}" for name in ("student", "teacher") for field in ROW_SIGNATURE)
    for dtype in (*DTYPES, None):
        data = BYTES if dtype is None else POINTERS[dtype]
        expects = () if dtype is None else ("wide_loads",)
        yield _variant(
            statistics_kernel,
            _signature({"logits": data, "mask": "*i1", "partials": "*fp32"},
                       f"{rows} misalignment masked count vocab segments", "temperature"),
            _statistics_constants(dtype, shape, device), *expects,
        )
        yield _variant(
            terms_kernel,
            _signature({"student": data, "teacher": data, "mask": "*i1", "constants": "*fp32", "partials": "*fp32"},
                       f"{both} misalignment masked count vocab segments kind"),
            _terms_constants(dtype, shape, device), *expects,
        )
    out_rows = " ".join(f"out_{field}" for field in ROW_SIGNATURE)
    for logits, out in (*GRADIENTS, (None, None)):
        data, result = (BYTES if dtype is None else POINTERS[dtype] for dtype in (logits, out))
        expects = () if logits is None else ("wide_loads", "wide_stores")
        yield _variant(
            gradient_kernel,
            _signature({"student": data, "teacher": data, "out": result, "constants": "*fp32"},
                       f"{both} {out_rows} misalignment vocab span spans kind"),
            _gradient_constants(logits, out or torch.float32, shape, device), *expects,
        )

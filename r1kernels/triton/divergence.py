r"""Divergence of a student's rows of logits from a teacher's (forward KL, reverse KL, jsd), and its gradient.

Forward: a read of either tensor for the log-sum-exps and entropies (`token_stats.segment_kernel`), then a second read
of both for terms >= 0, which need them (`divergence_math`, and `divergence_fast` for 16-bit logits). A program reduces
one segment of a row, of fixed size, to a few float32 numbers; a kernel over rows merges the segments in float64, in
order. Bits depend on the row alone, wherever it lies. Backward: one read of both and one write; what a row's entries
need of its float64 numbers is prepared once a row.

Bytes: 2 (student + teacher) forward, student + teacher + out backward, a row masked or without a gradient reading
none; beside them 125 a token and 130 a token and segment forward, 90 and 60 backward.

Student and teacher of different dtypes or with a stride over the vocabulary, and gradients of another dtype than
theirs (but bfloat16 of float32), take kernels that load entry by entry.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from r1kernels.triton import token_stats
from r1kernels.triton.common import (
    POINTERS,
    Device,
    Loop,
    Rows,
    Variant,
    device_of,
    launch,
    optional,
    rows_of,
    signature,
)
from r1kernels.triton.divergence_kernels import (
    gradient_kernel,
    merge_statistics_kernel,
    merge_terms_kernel,
    prepare_kernel,
    terms_kernel,
)
from r1kernels.triton.divergence_math import CONSTANTS
from r1kernels.triton.entries import BYTES, DTYPES, row_arguments
from r1kernels.triton.tables import SIZES, tuned

GRADIENTS = ((torch.float32, torch.bfloat16), *((dtype, dtype) for dtype in DTYPES))  # logits, out: those in vectors
SEGMENT = 16384  # entries: part of what the bits depend on
MERGE_ROWS = 64
MERGE = {"BLOCK": MERGE_ROWS, "num_warps": MERGE_ROWS // 32}  # of the kernels over rows


class Config(NamedTuple):
    """A tile is `unroll` vectors of 16 bytes (of the narrowest dtype) for each of the num_warps x 32 (64) threads."""

    num_warps: int
    unroll: int


def config(shape: tuple[int, int], dtype: torch.dtype, device: Device) -> Config:
    """The tile for (N, V) logits: few warps, as an entry takes a hundred registers' worth of arithmetic."""
    if (measured := tuned("divergence", device.name, dtype, shape[1])) is not None:
        return Config(**measured)
    return Config(num_warps=4, unroll=1 if dtype == torch.float32 else 2)


def configs(dtype: torch.dtype, device: Device) -> list[Config]:
    """All that `config` gives on a device: measured ones may differ with the vocabulary."""
    return list(dict.fromkeys(config((1, size), dtype, device) for size in SIZES))


def search_space(device: Device) -> list[Config]:
    """What benchmarks/tune.py tries."""
    return [Config(num_warps, unroll) for num_warps in (2, 4, 8) for unroll in (1, 2)]


# ---- launchers ------------------------------------------------------------------------------------------------


def _rows_pair(student: Tensor, teacher: Tensor) -> tuple[Rows, Rows]:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have the same shape, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    return rows_of(student), rows_of(teacher)


def _alike(p: Rows, q: Rows) -> bool:
    return p.data.dtype == q.data.dtype and p.vocab_stride == q.vocab_stride == 1


def _check_kind(kind: int) -> None:
    if kind not in (0, 1, 2):
        raise ValueError(f"kind is {kind}, expected 0, 1 or 2")


def _constants(
    chosen: Config, logits: torch.dtype | None, narrowest: torch.dtype | None, device: Device
) -> dict[str, Any]:
    """Of a kernel on logits of one dtype, or on bytes (None)."""
    vec = 4 if narrowest is None else 16 // narrowest.itemsize
    return {
        "LANES": chosen.num_warps * device.warp * vec, "UNROLL": chosen.unroll,
        "EXACT": logits in (None, torch.float32), "NVIDIA": device.arch.startswith("sm_"),
        "num_warps": chosen.num_warps,
    }


def divergence(
    student: Tensor, teacher: Tensor, mask: Tensor | None, kind: int, beta: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Value (float32), both log-sum-exps, constant of the gradient and both entropies (float64), each (...)."""
    p, q = _rows_pair(student, teacher)
    _check_kind(kind)
    shape, device, size = student.shape[:-1], device_of(student), (p.count, p.vocab)
    value = student.new_empty(shape, dtype=torch.float32)
    inner, lse_student, lse_teacher, student_entropy, teacher_entropy = (
        student.new_empty(shape, dtype=torch.float64) for _ in range(5)
    )
    read, segments = (triton.cdiv(p.vocab, of) for of in (token_stats.SEGMENT, SEGMENT))
    statistics = student.new_empty((2, 4, read, p.count), dtype=torch.float32)
    partials = student.new_empty((2, segments, p.count), dtype=torch.float32)
    constants = student.new_empty((p.count, CONSTANTS.value), dtype=torch.float32)
    no_token = student.new_full((p.count,), -1, dtype=torch.int64)
    masking = optional(mask, torch.bool, no_token)

    grid, merge_grid = (p.count * segments,), (triton.cdiv(p.count, MERGE_ROWS),)
    one_temperature = optional(None, torch.float32, no_token)
    exact = [
        int(token_stats.launch_segments(rows, no_token, masking, one_temperature, temperature, part))
        for rows, part in zip((p, q), statistics, strict=True)
    ]
    launch(
        merge_statistics_kernel, merge_grid, student, statistics, *exact, *masking, temperature, beta, lse_student,
        lse_teacher, student_entropy, teacher_entropy, constants, p.count, read, **MERGE,
    )
    dtype = student.dtype if _alike(p, q) else None
    # KL(p||q) is KL(q||p) of the two the other way round.
    swapped = int(kind == 1)
    first, second = (q, p) if swapped else (p, q)
    chosen = config(size, dtype or torch.float32, device)
    launch(
        terms_kernel, grid, student, *row_arguments(first, dtype is not None),
        *row_arguments(second, dtype is not None), swapped, *masking, constants, partials, p.count, p.vocab, segments,
        SEGMENT=SEGMENT, JSD=kind == 2, **_constants(chosen, dtype, dtype, device),
    )
    launch(
        merge_terms_kernel, merge_grid, student, partials, *masking, student_entropy, teacher_entropy, value,
        inner, p.count, segments, kind, beta, **MERGE,
    )
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
        raise ValueError(
            f"out and student must have the same shape, got {tuple(out.shape)} and {tuple(student.shape)}"
        )
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
        temperature, beta, softcap, constants, p.count, kind, **MERGE,
    )
    # A narrower gradient in the student's memory: the stores of a tile fall on entries of the tiles before it.
    whole_rows = shared and out.element_size() < student.element_size()
    span = p.vocab if whole_rows else SEGMENT
    spans = triton.cdiv(p.vocab, span)
    typed = _alike(p, q) and (student.dtype, out.dtype) in GRADIENTS
    dtypes = (student.dtype, out.dtype) if typed else (None, None)
    launch(
        gradient_kernel, (p.count * spans,), student, *row_arguments(p, typed), *row_arguments(q, typed),
        *row_arguments(result, typed), constants, p.vocab, span, spans, kind,
        **_constants(config(size, dtypes[0] or torch.float32, device), *dtypes, device),
    )


# ---- every compilation ----------------------------------------------------------------------------------------


def _variant(
    kernel: Any, constants: dict[str, Any], pointers: dict[str, str], *expects: str, loop: Loop | None = None
) -> Variant:
    constants = dict(constants)
    options = {"num_warps": constants.pop("num_warps"), "num_stages": 1}
    return Variant(kernel, signature(kernel, **pointers), constants, options, expects, loop)


def _loop(constants: dict[str, Any], logits: torch.dtype, device: Device) -> Loop:
    """Of a kernel that reads two tensors of a dtype."""
    entries = constants["LANES"] * constants["UNROLL"] // (constants["num_warps"] * device.warp)
    return Loop(entries, 2 * entries * logits.itemsize)


def variants(device: Device) -> Iterator[Variant]:
    """Every compilation that a launch on this device can ask for, but for that of `token_stats`."""
    merged = {"partials": "*fp32", "mask": "*i1", "student_entropy": "*fp64", "teacher_entropy": "*fp64"}
    rows = {"lse_student": "*fp64", "lse_teacher": "*fp64", "constants": "*fp32"}
    for kernel, pointers in (
        (merge_statistics_kernel, merged | rows),
        (merge_terms_kernel, merged | {"value": "*fp32", "inner": "*fp64"}),
        (prepare_kernel, rows | {"inner": "*fp64", "grad": "*fp32"}),
    ):
        yield _variant(kernel, MERGE, pointers)
    for dtype in (*DTYPES, None):
        data = BYTES if dtype is None else POINTERS[dtype]
        pointers = {"first": data, "second": data, "mask": "*i1", "constants": "*fp32", "partials": "*fp32"}
        for chosen, jsd in itertools.product(configs(dtype or torch.float32, device), (False, True)):
            constants = {"SEGMENT": SEGMENT, "JSD": jsd} | _constants(chosen, dtype, dtype, device)
            # The terms of jsd take 60 instructions an entry, longer than their loads.
            loop = None if dtype is None or jsd else _loop(constants, dtype, device)
            yield _variant(terms_kernel, constants, pointers, *(["wide_loads"] if dtype else []), loop=loop)
    for logits, result in (*GRADIENTS, (None, None)):
        data, gradient = (BYTES if dtype is None else POINTERS[dtype] for dtype in (logits, result))
        pointers = {"student": data, "teacher": data, "out": gradient, "constants": "*fp32"}
        for chosen in configs(logits or torch.float32, device):
            constants = _constants(chosen, logits, result, device)
            expects = ["wide_loads", "wide_stores"] if logits else []
            loop = None if logits is None else _loop(constants, logits, device)
            yield _variant(gradient_kernel, constants, pointers, *expects, loop=loop)

"""Rows of logits of any dtype and stride: in vectors of 16 bytes where they allow it, else entry by entry.

Vectors need one dtype and a place within a vector that is the same for all tensors (`in_vectors`), and a kernel is
compiled for each dtype. The way for everything else is compiled once: it gets bytes and, as a number, their dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1kernels.triton.common import Rows, rounded, row_offset

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the index is the code
BYTES = "*u8"  # the pointer type of a tensor whose dtype is a number
EDGE = tl.constexpr(32)  # at least two vectors: entries that may lie before and after a row's vectors


def vector(dtype: torch.dtype) -> int:
    """Entries in 16 bytes."""
    return 16 // dtype.itemsize


def in_vectors(narrowest: Rows, *others: Rows) -> bool:
    """Whether every 16 bytes of the narrowest tensor's rows that are one vector are whole vectors of the others."""
    if narrowest.vocab_stride != 1:
        return False
    for rows in others:
        vec = vector(rows.data.dtype)
        same = rows.inner == narrowest.inner
        strides = [
            a - b if same else a | b
            for a, b in zip(rows[4:6], narrowest[4:6], strict=True)
        ]
        apart = rows.misalignment - narrowest.misalignment
        if rows.vocab_stride != 1 or any(x % vec != 0 for x in (apart, *strides)):
            return False
    return True


def row_arguments(rows: Rows, vectors: bool) -> tuple[Any, ...]:
    """data, code, inner, outer_stride, inner_stride, vocab_stride of a kernel that takes rows of any dtype."""
    data = rows.data if vectors else _bytes(rows.data)
    return data, DTYPES.index(rows.data.dtype), *rows[3:]


ROW_SIGNATURE = ("code", "inner", "outer_stride", "inner_stride", "vocab_stride")


def _bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory from its first entry on."""
    storage = tensor.untyped_storage()
    begin = tensor.storage_offset() * tensor.element_size()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, begin, (storage.nbytes() - begin,))


# ---- in a kernel ----------------------------------------------------------------------------------------------


@triton.jit
def row_start(data, n, code, inner, outer_stride, inner_stride):
    """Address of row n."""
    offset = row_offset(n, inner, outer_stride, inner_stride)
    if data.dtype.element_ty == tl.uint8:
        offset = offset * tl.where(code == 0, 4, 2)
    return data + offset


@triton.jit
def vectors_of_row(n, misalignment, inner, outer_stride, inner_stride, vocab, VEC: tl.constexpr):
    """(head, body): entries [head, head + body) of row n are whole vectors; all are where VEC is 1."""
    if VEC == 1:
        return vocab * 0, vocab
    else:
        start = misalignment + row_offset(n, inner, outer_stride, inner_stride)
        head = tl.minimum((VEC - start % VEC) % VEC, vocab)
        return head, (vocab - head) // VEC * VEC


@triton.jit
def load_tile(row, first, cols, inside, vocab_stride, code, VEC: tl.constexpr):
    """float32 of entries first + cols, -inf where not inside; `first` is a multiple of 16 bytes unless VEC is 1."""
    if VEC == 1:
        return load_entries(row, (first + cols) * vocab_stride, inside, code)
    else:
        at = tl.multiple_of(row + first, 16) + cols
        return tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def store_tile(row, first, cols, inside, x, code, VEC: tl.constexpr):
    """The same for rows of unit stride."""
    if VEC == 1:
        store_entries(row, first + cols, inside, x, code)
    else:
        at = tl.multiple_of(row + first, 16) + cols
        tl.store(at, rounded(x, row.dtype.element_ty), mask=inside)


@triton.jit
def load_entries(row, entries, inside, code):
    if row.dtype.element_ty != tl.uint8:
        x = tl.load(row + entries, mask=inside, other=float("-inf")).to(tl.float32)
    else:
        if code == 0:
            x = tl.load(_as(row, tl.float32) + entries, mask=inside, other=float("-inf"))
        elif code == 1:
            x = tl.load(_as(row, tl.bfloat16) + entries, mask=inside, other=float("-inf")).to(tl.float32)
        else:
            x = tl.load(_as(row, tl.float16) + entries, mask=inside, other=float("-inf")).to(tl.float32)
    return x


@triton.jit
def store_entries(row, entries, inside, x, code):
    if row.dtype.element_ty != tl.uint8:
        tl.store(row + entries, rounded(x, row.dtype.element_ty), mask=inside)
    else:
        if code == 0:
            tl.store(_as(row, tl.float32) + entries, x, mask=inside)
        elif code == 1:
            tl.store(_as(row, tl.bfloat16) + entries, rounded(x, tl.bfloat16), mask=inside)
        else:
            tl.store(_as(row, tl.float16) + entries, x.to(tl.float16), mask=inside)


@triton.jit
def _as(pointer, dtype: tl.constexpr):
    return pointer.to(tl.pointer_type(dtype), bitcast=True)

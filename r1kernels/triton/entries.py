"""Rows of logits of any stride, alignment and dtype, read and written tile by tile in the order of their entries.

A tile goes in vectors of 16 bytes where its row begins at a multiple of them, and entry by entry where it does not and
at the row's end. Which of the two is decided at run time and moves no entry to another lane: a row's sums have the same
bits wherever it lies. Such a kernel is compiled for each dtype. Tensors of different dtypes, or with a stride over the
vocabulary, take one that is compiled once: it gets bytes (`BYTES`) and, as a number, their dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1kernels.triton.common import Rows, rounded, row_offset

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the index is the code
BYTES = "*u8"
# What a kernel is told of a tensor after its pointer, in order.
ROW_FIELDS = ("code", "misalignment", "inner", "outer_stride", "inner_stride", "vocab_stride")


def row_arguments(rows: Rows, typed: bool) -> tuple[Any, ...]:
    """The pointer and `ROW_FIELDS` for a kernel: of the tensor's dtype, or of bytes."""
    data, *fields = rows.arguments()
    misalignment = data.data_ptr() % 16 // data.element_size()  # entries beyond a multiple of 16 bytes
    return data if typed else _bytes(data), DTYPES.index(data.dtype), misalignment, *fields


def _bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory from its first entry on."""
    storage = tensor.untyped_storage()
    begin = tensor.storage_offset() * tensor.element_size()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, begin, (storage.nbytes() - begin,))


@triton.jit
def row_start(data, code, misalignment, inner, outer_stride, inner_stride, n):
    """Address of row n, and whether its entries are vectors of 16 bytes from there on."""
    offset = row_offset(n, inner, outer_stride, inner_stride)
    if data.dtype.element_ty == tl.uint8:
        return data + offset * tl.where(code == 0, 4, 2), code < 0
    else:
        vec: tl.constexpr = 128 // data.dtype.element_ty.primitive_bitwidth
        return data + offset, (misalignment + offset) % vec == 0


@triton.jit
def load_wide(a, b, at, cols):
    """float32 of the entries at + cols of two rows in vectors."""
    x = tl.load(tl.multiple_of(a + at, 16) + cols)
    y = tl.load(tl.multiple_of(b + at, 16) + cols)
    return x.to(tl.float32), y.to(tl.float32)


@triton.jit
def whole_tiles(begin, end, vectors, LANES: tl.constexpr, EXACT: tl.constexpr):
    """Where the tiles that a loop of its own can load in vectors end; without arithmetic to save there is none."""
    if EXACT:
        return begin
    else:
        return tl.where(vectors, begin + (end - begin) // LANES * LANES, begin)


@triton.jit
def load_tiles(
    a, a_vectors, a_stride, a_code, b, b_vectors, b_stride, b_code, at, cols, left, LANES: tl.constexpr
):
    """float32 of the entries at + cols of two rows that have `left` more, and -inf beyond; cols < LANES."""
    few = tl.minimum(left, LANES).to(tl.int32)
    if a.dtype.element_ty == tl.uint8:
        x = _load_bytes(a, (at + cols) * a_stride, cols < few, a_code)
        y = _load_bytes(b, (at + cols) * b_stride, cols < few, b_code)
    else:
        if a_vectors & b_vectors & (left >= LANES):
            x, y = load_wide(a, b, at, cols)
        else:
            x = tl.load(a + at + cols, mask=cols < few, other=float("-inf")).to(tl.float32)
            y = tl.load(b + at + cols, mask=cols < few, other=float("-inf")).to(tl.float32)
    return x, y


@triton.jit
def _load_bytes(row, entries, inside, code):
    if code == 0:
        x = tl.load(_as(row, tl.float32) + entries, mask=inside, other=float("-inf"))
    elif code == 1:
        x = tl.load(_as(row, tl.bfloat16) + entries, mask=inside, other=float("-inf")).to(tl.float32)
    else:
        x = tl.load(_as(row, tl.float16) + entries, mask=inside, other=float("-inf")).to(tl.float32)
    return x


@triton.jit
def store_wide(row, at, cols, x):
    """x to the entries at + cols of a row in vectors."""
    tl.store(tl.multiple_of(row + at, 16) + cols, rounded(x, row.dtype.element_ty))


@triton.jit
def store_tile(row, vectors, at, cols, left, x, code, LANES: tl.constexpr):
    """The same as `load_tiles` the other way round, for one row of unit stride."""
    few = tl.minimum(left, LANES).to(tl.int32)
    if row.dtype.element_ty == tl.uint8:
        inside = cols < few
        if code == 0:
            tl.store(_as(row, tl.float32) + (at + cols), x, mask=inside)
        elif code == 1:
            tl.store(_as(row, tl.bfloat16) + (at + cols), rounded(x, tl.bfloat16), mask=inside)
        else:
            tl.store(_as(row, tl.float16) + (at + cols), x.to(tl.float16), mask=inside)
    else:
        if vectors & (left >= LANES):
            store_wide(row, at, cols, x)
        else:
            tl.store(row + at + cols, rounded(x, row.dtype.element_ty), mask=cols < few)


@triton.jit
def _as(pointer, dtype: tl.constexpr):
    return pointer.to(tl.pointer_type(dtype), bitcast=True)

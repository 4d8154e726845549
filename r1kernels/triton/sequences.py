"""Sequences of a batch, (B, T) or packed, and the pieces in which they are summed.

A sequence of L tokens is summed in at most PIECES pieces, multiples of SPAN tokens counted from its own beginning: its
sums follow from the sequence alone, and one sequence of a million tokens fills a device as many short ones do. The
pieces of sequence s lie from slot `begin // SPAN + s` on, which leaves room for all of them whatever the lengths.
"""

import triton
import triton.language as tl

SPAN = 512  # tokens a program sums at a time
PIECES = 64
ROWS = 4  # pieces of a program


@triton.jit
def begin_of(s, cu_seqlens, packed, tokens, length):
    """First token of sequence s; within [0, N] even where cu_seqlens is wrong."""
    begin = s * length
    if packed:
        begin = tl.load(cu_seqlens + s)
    return tl.minimum(tl.maximum(begin, 0), tokens)


@triton.jit
def size_of(s, cu_seqlens, packed, tokens, length):
    """Tokens of sequence s, masked ones included."""
    end = begin_of(s + 1, cu_seqlens, packed, tokens, length)
    return tl.maximum(end - begin_of(s, cu_seqlens, packed, tokens, length), 0)


@triton.jit
def owner(x, cu_seqlens, packed, tokens, sequences, length, SPAN: tl.constexpr):
    """The last sequence that begins at or before token x, or with SPAN > 0 at or before slot x."""
    low = x * 0
    high = low + sequences
    width = sequences
    while width > 0:
        middle = (low + high) // 2
        key = begin_of(middle, cu_seqlens, packed, tokens, length)
        if SPAN > 0:
            key = key // SPAN + middle
        low = tl.where(key <= x, middle, low)
        high = tl.where(key <= x, high, middle)
        width = width // 2
    return low


@triton.jit
def piece_length(size, SPAN: tl.constexpr, PIECES: tl.constexpr):
    return tl.maximum((size + (SPAN * PIECES - 1)) // (SPAN * PIECES), 1) * SPAN


@triton.jit
def pieces_of(s, cu_seqlens, packed, tokens, length, SPAN: tl.constexpr, PIECES: tl.constexpr):
    """First slot of sequence s, and the number of its pieces."""
    begin = begin_of(s, cu_seqlens, packed, tokens, length)
    size = size_of(s, cu_seqlens, packed, tokens, length)
    piece = piece_length(size, SPAN, PIECES)
    return begin // SPAN + s, (size + piece - 1) // piece


@triton.jit
def total_of(sums, first, pieces):
    """The sum of a sequence from its pieces, in order."""
    total = (first * 0).to(tl.float64)
    for k in range(0, tl.max(pieces, 0)):
        total += tl.load(sums + first + k, mask=k < pieces, other=0)
    return total


@triton.jit
def row_of_program(ROWS: tl.constexpr):
    return tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)


@triton.jit
def spans_of_program(
    cu_seqlens, packed, tokens, sequences, length, whole, rows,
    ROWS: tl.constexpr, SPAN: tl.constexpr, PIECES: tl.constexpr,
):
    """(sequence, first token, end) of the program's rows: `whole` pieces of the batch, then the slots of sequences."""
    row = row_of_program(ROWS)
    of_batch = row < whole
    slot = tl.maximum(row - whole, 0)
    s = owner(slot, cu_seqlens, packed, tokens, sequences, length, SPAN)
    begin = begin_of(s, cu_seqlens, packed, tokens, length)
    end = begin_of(s + 1, cu_seqlens, packed, tokens, length)
    index = tl.where(of_batch, row, slot - (begin // SPAN + s))
    begin = tl.where(of_batch, 0, begin)
    end = tl.where(of_batch, tokens, end)
    piece = piece_length(end - begin, SPAN, PIECES)
    at = begin + index * piece
    return s, at, tl.where(row < rows, tl.minimum(at + piece, end), at)

r"""Group-relative advantages, A = (r - mean) / (std + eps), in float64 inside.

Groups of up to SPAN consecutive rewards take one launch. All others, and the std of the batch, take two:

    moments_kernel    pieces of groups, and of the batch -> number, sum, squares about the piece's own mean, extremes
    advantage_kernel  blocks of rewards: the moments of each one's group merged in order, and its advantage

A group is summed in at most PIECES pieces, multiples of SPAN rewards from its own beginning, so an advantage follows
from its group alone; either way the numbers are the same. Group ids are sorted (stably, by torch) and a group is then
found by bisection: no number of groups has to be known. A group whose rewards are all equal gives exactly 0, which
min = max decides.

Bytes: 8 a reward in one launch; up to 40 written and read again for each piece in two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1kernels.triton.common import Device, Variant, checking_kernel, device_of, kernel, launch, wide
from r1kernels.triton.sequences import piece_length, row_of_program

SPAN = 64  # rewards of a group that a program sums at a time
PIECES = 64
WHOLE_PIECES = 1024  # of the batch
GROUP_STD, BATCH_STD = tl.constexpr(0), tl.constexpr(1)  # numbers of `scale`; 2 is "none"


class Config(NamedTuple):
    """rows: groups or pieces of a program. block: rewards of one that hands out advantages."""

    rows: int
    block: int
    num_warps: int


def config(shape: tuple[int], dtype: torch.dtype, device: Device) -> Config:
    """The tiles for (B,) rewards."""
    return Config(rows=8, block=256, num_warps=4)


# ---- moments -----------------------------------------------------------------------------------------------


@triton.jit
def scorable(rewards, inside):
    """Rewards as float64, and which of them count: not NaN."""
    x = tl.load(rewards, mask=inside, other=float("nan")).to(tl.float64)
    tl.device_assert(
        tl.abs(x) != float("inf"), "r1kernels: rewards must be finite numbers, or NaN for unscorable"
    )
    return x, x == x


@triton.jit
def tile_moments(x, counts):
    """Of each row: (number, sum, squares about the mean, minimum, maximum)."""
    number = tl.sum(counts.to(tl.float64), 1)
    total = tl.sum(tl.where(counts, x, 0.0), 1)
    d = x - (total / tl.maximum(number, 1.0))[:, None]
    squares = tl.sum(tl.where(counts, d * d, 0.0), 1)
    low = tl.min(tl.where(counts, x, float("inf")), 1)
    return number, total, squares, low, tl.max(tl.where(counts, x, float("-inf")), 1)


@triton.jit
def merged(number, total, squares, more, more_total, more_squares):
    """Squares about the common mean of two parts: S + S' + (m - m')^2 n n' / (n + n')."""
    d = more_total / tl.maximum(more, 1.0) - total / tl.maximum(number, 1.0)
    return squares + more_squares + d * d * (number * more / tl.maximum(number + more, 1.0))


@triton.jit
def mean_and_std(number, total, squares, low, high, ddof):
    equal = low == high  # the rounded mean of equal numbers need not equal them
    mean = tl.where(equal, low, total / tl.maximum(number, 1.0))
    std = tl.sqrt(squares / tl.maximum(number - ddof, 1.0))
    return mean, tl.where(equal, 0.0, tl.where(number > ddof, std, 0.0))


@triton.jit
def advantage_of(x, mean, scale):
    centred = x - mean
    # 0 in a group of equal rewards, whose scale is inf where eps = 0; NaN of an unscorable one.
    return tl.where((centred < 0) | (centred > 0), centred * scale, 0.0).to(tl.float32)


@checking_kernel
def group_kernel(
    rewards, advantages, groups: tl.int64, group_size: tl.int64, scale: tl.int64, ddof: tl.int64, eps: tl.float64,
    ROWS: tl.constexpr, SPAN: tl.constexpr,
):
    """Groups of at most SPAN consecutive rewards."""
    row = row_of_program(ROWS)[:, None]
    column = tl.arange(0, SPAN)[None, :]
    inside = (row < groups) & (column < group_size)
    at = row * group_size + column
    x, counts = scorable(rewards + at, inside)
    number, total, squares, low, high = tile_moments(x, counts)
    mean, std = mean_and_std(number, total, squares, low, high, ddof.to(tl.float64))
    factor = tl.where(scale == GROUP_STD, 1.0 / (std + wide(eps)), 1.0)
    tl.store(advantages + at, advantage_of(x, mean[:, None], factor[:, None]), mask=inside)


# ---- groups of any size ------------------------------------------------------------------------------------


@triton.jit
def position_of(value, group_ids, count, AFTER: tl.constexpr):
    """How many sorted ids are less than `value`; with AFTER, not greater."""
    low = tl.zeros_like(value)
    high = low + count
    width = count + 1
    while width > 0:
        middle = (low + high) // 2
        found = tl.load(group_ids + middle, mask=middle < count, other=0)
        before = found < value
        if AFTER:
            before = found <= value
        before = before & (low < high)
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
        width = width // 2
    return low


@triton.jit
def group_around(position, group_ids, by_ids, count, group_size):
    """First reward and end of the group at a position in sorted order, which must be within the batch."""
    begin = position // group_size * group_size
    end = begin + group_size
    if by_ids != 0:
        own = tl.load(group_ids + position)
        begin = position_of(own, group_ids, count, False)
        end = position_of(own, group_ids, count, True)
    return begin, end


@checking_kernel
def moments_kernel(
    rewards, order, group_ids, sums, by_ids: tl.int64, group_size: tl.int64, count: tl.int64, whole: tl.int64,
    rows: tl.int64, pieces: tl.int64, ROWS: tl.constexpr, SPAN: tl.constexpr, PIECES: tl.constexpr,
    WHOLE_PIECES: tl.constexpr,
):
    """sums (5, whole + B): the moments of the batch's pieces, and of the piece that begins at each reward, if any.

    Rows are the pieces of the batch, then those of consecutive groups, `pieces` each, or with ids every reward.
    """
    row = row_of_program(ROWS)
    of_batch = row < whole
    slot = tl.maximum(row - whole, 0)
    at = slot
    if by_ids == 0:
        at = slot // pieces * group_size + slot % pieces * piece_length(group_size, SPAN, PIECES)
    begin, end = group_around(tl.minimum(at, count - 1), group_ids, by_ids, count, group_size)
    piece = piece_length(end - begin, SPAN, PIECES)
    starts = (row < rows) & ((at - begin) % piece == 0)
    whole_piece = piece_length(count, SPAN, WHOLE_PIECES)
    out = tl.where(of_batch, row, whole + at)
    piece = tl.where(of_batch, whole_piece, piece)
    at = tl.where(of_batch, row * whole_piece, at)
    end = tl.where(of_batch, count, end)
    starts = starts | of_batch
    end = tl.where(starts, tl.minimum(at + piece, end), at)

    number = tl.zeros((ROWS,), tl.float64)
    total = tl.zeros((ROWS,), tl.float64)
    squares = tl.zeros((ROWS,), tl.float64)
    low = tl.full((ROWS,), float("inf"), tl.float64)
    high = tl.full((ROWS,), float("-inf"), tl.float64)
    for offset in range(0, tl.max(end - at, 0), SPAN):
        k = at[:, None] + offset + tl.arange(0, SPAN)[None, :]
        inside = k < end[:, None]
        if by_ids != 0:
            k = tl.where(of_batch[:, None], k, tl.load(order + k, mask=inside, other=0))
        x, counts = scorable(rewards + k, inside)
        more, more_total, more_squares, more_low, more_high = tile_moments(x, counts)
        squares = merged(number, total, squares, more, more_total, more_squares)
        number += more
        total += more_total
        low = tl.minimum(low, more_low)
        high = tl.maximum(high, more_high)
    plane = whole + count
    tl.store(sums + out, number, mask=starts)
    tl.store(sums + plane + out, total, mask=starts)
    tl.store(sums + 2 * plane + out, squares, mask=starts)
    tl.store(sums + 3 * plane + out, low, mask=starts)
    tl.store(sums + 4 * plane + out, high, mask=starts)


@triton.jit
def batch_std(sums, plane, whole, ddof, WHOLE_PIECES: tl.constexpr):
    piece = tl.arange(0, WHOLE_PIECES)
    there = piece < whole
    n = tl.load(sums + piece, mask=there, other=0)
    total = tl.load(sums + plane + piece, mask=there, other=0)
    squares = tl.load(sums + 2 * plane + piece, mask=there, other=0)
    low = tl.min(tl.load(sums + 3 * plane + piece, mask=there, other=float("inf")), 0)
    high = tl.max(tl.load(sums + 4 * plane + piece, mask=there, other=float("-inf")), 0)
    number, whole_total = tl.sum(n, 0), tl.sum(total, 0)
    d = total / tl.maximum(n, 1.0) - whole_total / tl.maximum(number, 1.0)
    return mean_and_std(number, whole_total, tl.sum(squares + n * d * d, 0), low, high, ddof)[1]


@kernel
def advantage_kernel(
    rewards, order, group_ids, sums, advantages, by_ids: tl.int64, group_size: tl.int64, count: tl.int64,
    whole: tl.int64, scale: tl.int64, ddof: tl.int64, eps: tl.float64,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, PIECES: tl.constexpr, WHOLE_PIECES: tl.constexpr,
):
    """The advantages of BLOCK rewards, taken in the order of their groups."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < count
    begin, end = group_around(tl.minimum(position, count - 1), group_ids, by_ids, count, group_size)
    piece = piece_length(end - begin, SPAN, PIECES)
    pieces = (end - begin + piece - 1) // piece
    plane = whole + count
    number = tl.zeros((BLOCK,), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    low = tl.full((BLOCK,), float("inf"), tl.float64)
    high = tl.full((BLOCK,), float("-inf"), tl.float64)
    for k in range(0, tl.max(pieces, 0)):
        there = k < pieces
        at = sums + whole + begin + k * piece
        more = tl.load(at, mask=there, other=0)
        more_total = tl.load(at + plane, mask=there, other=0)
        squares = merged(
            number, total, squares, more, more_total, tl.load(at + 2 * plane, mask=there, other=0)
        )
        number += more
        total += more_total
        low = tl.minimum(low, tl.load(at + 3 * plane, mask=there, other=float("inf")))
        high = tl.maximum(high, tl.load(at + 4 * plane, mask=there, other=float("-inf")))
    divisor = ddof.to(tl.float64)
    mean, std = mean_and_std(number, total, squares, low, high, divisor)
    factor = tl.where(scale == GROUP_STD, 1.0 / (std + wide(eps)), 1.0)
    if scale == BATCH_STD:
        factor = 1.0 / (batch_std(sums, plane, whole, divisor, WHOLE_PIECES) + wide(eps)) + tl.zeros_like(std)
    n = position
    if by_ids != 0:
        n = tl.load(order + position, mask=inside, other=0)
    x = tl.load(rewards + n, mask=inside, other=0).to(tl.float64)
    tl.store(advantages + n, advantage_of(x, mean, factor), mask=inside)


# ---- launchers ---------------------------------------------------------------------------------------------


def group_advantages(
    rewards: Tensor, group_ids: Tensor | None, group_size: int, scale: int, ddof: int, eps: float
) -> Tensor:
    """The advantage of each reward (B,) float32 in its group."""
    count = rewards.numel()
    if group_ids is None and (group_size < 1 or count % group_size):
        raise ValueError(f"group_size is {group_size}, expected a positive integer that divides the {count} rewards")
    advantages = rewards.new_empty((count,))
    if count == 0:
        return advantages
    chosen = config((count,), rewards.dtype, device_of(rewards))
    if group_ids is None and group_size <= SPAN and scale != BATCH_STD.value:
        groups = count // group_size
        launch(
            group_kernel, (triton.cdiv(groups, chosen.rows),), rewards, rewards, advantages, groups, group_size, scale,
            ddof, eps, ROWS=chosen.rows, SPAN=SPAN, num_warps=chosen.num_warps,
        )
        return advantages

    whole = min(triton.cdiv(count, SPAN), WHOLE_PIECES) if scale == BATCH_STD.value else 0
    sums = rewards.new_empty((5 * (whole + count),), dtype=torch.float64)
    by_ids, pieces, rows = int(group_ids is not None), 1, count
    if group_ids is None:
        order = ids = sums.view(torch.int64)  # not read
        piece = triton.cdiv(group_size, SPAN * PIECES) * SPAN
        pieces = triton.cdiv(group_size, piece)
        rows = count // group_size * pieces
    else:
        ids, order = torch.sort(group_ids, stable=True)
        group_size = 1  # not read, but divided by
    tiles = {"SPAN": SPAN, "PIECES": PIECES, "WHOLE_PIECES": WHOLE_PIECES}
    launch(
        moments_kernel, (triton.cdiv(whole + rows, chosen.rows),), rewards, rewards, order, ids, sums, by_ids,
        group_size, count, whole, whole + rows, pieces, ROWS=chosen.rows, **tiles, num_warps=chosen.num_warps,
    )
    launch(
        advantage_kernel, (triton.cdiv(count, chosen.block),), rewards, rewards, order, ids, sums, advantages, by_ids,
        group_size, count, whole, scale, ddof, eps, BLOCK=chosen.block, **tiles, num_warps=chosen.num_warps,
    )
    return advantages


def variants(device: Device) -> Iterator[Variant]:
    pointers = {"order": "*i64", "group_ids": "*i64", "sums": "*fp64"}
    chosen = config((1,), torch.float32, device)
    tiles = {"SPAN": SPAN, "PIECES": PIECES, "WHOLE_PIECES": WHOLE_PIECES}
    for kernel_, constants in (
        (group_kernel, {"ROWS": chosen.rows, "SPAN": SPAN}),
        (moments_kernel, {"ROWS": chosen.rows, **tiles}),
        (advantage_kernel, {"BLOCK": chosen.block, **tiles}),
    ):
        signature = {
            p.name: p.annotation_type or pointers.get(p.name, "*fp32") for p in kernel_.params if not p.is_constexpr
        }
        yield Variant(kernel_, signature, constants, {"num_warps": chosen.num_warps, "num_stages": 1})

r"""Log-prob, log-sum-exp and entropy of tokens from hidden states and the head: the product h W^T, never written.

    u = s (h W^T + b),  v = cap tanh(u / cap) (or u),  z = v / T

A program owns a tile of rows and a run of tiles of the vocabulary (a split). It multiplies tile by tile on the matrix
units, with float32 accumulators, and keeps of each row a maximum, a sum and a weighted sum: three numbers a row and
split go to memory, and a second kernel merges them in float64, in order, without atomics. The token's own logit is
taken from the one tile that holds it, is left out of the sums there, and joins in the second kernel, so a log-prob
near 0 keeps its relative accuracy.

Bytes at N = 8,192, H = 4,096, V = 151,936 in 16 bits: hidden 67 MB, weight 1.24 GB, logits 0. Programs are ordered in
groups of 16 row tiles (128 rows), within a group split by split: the 132 programs that an H200 runs at a time read 17
MB of hidden states and, a tile each, 9 x 2.1 MB of weights, both from the L2 cache (50 MB). The weight is read from
memory once a group, 4 x 1.24 GB, which over the 14 ms of the products is 0.35 TB/s of 4.8. Partials: 12 x 149 bytes a
row, 15 MB.

Time on sm_90: a step of 64 over H is four wgmma of 64 x 256 x 16 for each of two groups of warps, issued before those
of the step before are waited for, with the loads of three more steps under way. The epilogue is 7 instructions and an
exp2 a logit: some 2,500 cycles a tile beside 65,536 of the matrix units at H = 4,096, 4 %, of which the loads know
nothing, because tiles and steps are one loop. 2 % goes to beginnings and ends of programs, 1 % to the last wave.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from r1kernels.triton.common import (
    LN2,
    LOG2E,
    LOWEST,
    POINTERS,
    UPCAST,
    Device,
    Variant,
    checking_kernel,
    device_of,
    expm1,
    kernel,
    launch,
    optional,
    signature,
    wide,
)
from r1kernels.triton.tables import SIZES, tuned

DTYPES = (torch.bfloat16, torch.float16)
MERGE_ROWS, MERGE_SPLITS = 32, 32
GROUP = 16  # row tiles that share the weights in the cache
SPLIT_STEPS = 256  # steps of a program, whose beginning and end cost about four


class Config(NamedTuple):
    """A tile is block_m rows by block_n words, in steps of block_k over H; a split has `tiles` of them.

    `tma`: the tensor memory accelerator loads them. `aligned`: all rows begin at multiples of 16 bytes.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool
    aligned: bool
    tiles: int = 1


def _tile(large: bool, aligned: bool, plain: bool, device: Device) -> Config:
    """The tile of many rows, or of few. Rows at odd addresses are loaded entry by entry: a way that only works.

    `plain`: heads without bias and soft cap. Others need more registers than 128 x 256 tiles leave, but on sm_90.
    """
    nvidia = device.arch.startswith("sm_")
    tma = nvidia and aligned and int(device.arch[3:]) >= 90
    roomy = device.arch in ("sm_80", "sm_87", "sm_90", "sm_100", "sm_103")  # 163 KiB of shared memory and more
    stages = 4 if nvidia else 2
    if not aligned:
        return Config(64, 64, 64, 4, min(stages, 3), tma, aligned)
    if not large:
        return Config(64, 128, 64, 4 if tma or not nvidia else 8, stages, tma, aligned)
    if not roomy:
        return Config(128, 128, 64, 8, stages, tma, aligned)
    if not plain and device.arch != "sm_90":
        return Config(128, 128, 64 if tma else 32, 8, stages if tma else 5, tma, aligned)
    return Config(128, 256, 64, 8, stages, tma, aligned) if tma else Config(128, 256, 32, 8, 5, tma, aligned)


def _measured(vocab: int, dtype: torch.dtype, device: Device) -> Config:
    """The tile of many aligned rows and a plain head: what was measured on the device, or else `_tile`."""
    measured = tuned("linear_statistics", device.name, dtype, vocab)
    return _tile(True, True, True, device) if measured is None else Config(**measured)._replace(tiles=1)


def search_space(device: Device) -> list[Config]:
    """What benchmarks/tune.py tries, for many aligned rows."""
    tile = _tile(True, True, True, device)
    shapes = ((128, 256, 64, 8), (128, 256, 32, 8), (128, 128, 64, 8), (128, 128, 64, 4), (256, 128, 64, 8))
    stages = (3, 4) if device.arch.startswith("sm_") else (1, 2)
    space = [Config(*shape, count, tile.tma, True) for shape in shapes for count in stages]
    return [each._replace(tiles=SPLIT_STEPS // 64) for each in dict.fromkeys([tile, *space])]


def config(
    shape: tuple[int, int, int], dtype: torch.dtype, device: Device, batch_invariant: bool, aligned: bool = True,
    plain: bool = True,
) -> Config:
    """The tile and the splits for (N, V, H) of a 16-bit dtype. With `batch_invariant`, whatever N.

    A split is of about 256 steps. Fewer, where N is so small that they would not make eight waves of programs.
    """
    count, vocab, width = shape
    large = batch_invariant or count > 64
    tile = _measured(vocab, dtype, device) if large and aligned and plain else _tile(large, aligned, plain, device)
    tiles = min(max(SPLIT_STEPS // max(math.ceil(width / tile.block_k), 1), 1), 16)
    if not batch_invariant:
        columns = math.ceil(count / tile.block_m) * math.ceil(vocab / tile.block_n)
        while tiles > 1 and columns < 8 * device.processors * tiles:
            tiles = tiles // 2
    return tile._replace(tiles=tiles)


# ---- a tile ------------------------------------------------------------------------------------------------


@triton.jit
def _tanh(x):
    """tanh in float32, accurate near 0: -m / (2 + m) with m = e^{-2|x|} - 1."""
    y = -2.0 * tl.abs(x)
    m = expm1(y, tl.exp2(y * LOG2E))
    m = -m / (2.0 + m)
    return tl.where(x < 0, -m, m)


@triton.jit
def _temperature(temperature, temperatures, many, n, counts):
    """T of tokens n in float64."""
    own = tl.load(temperatures + n, mask=counts & (many != 0), other=1.0)
    return wide(temperature) * own.to(tl.float64)


@triton.jit
def _exponent(t):
    """log2(e) / T, rounded: e^{d / T} = 2^{c d}."""
    return (1.0 / t * LOG2E).to(tl.float32)


@triton.jit
def _add_tile(x, top, total, weighted, c):
    """Adds a tile to each row's maximum, sum e^{(x - top)/T} and weighted sum e^{(x - top)/T} (x - top)."""
    new_top = tl.maximum(top, tl.max(x, 1))
    shift = tl.maximum(top - new_top, LOWEST)
    factor = tl.exp2(shift * c)
    d = x - new_top[:, None]
    e = tl.exp2(d * c[:, None])
    # In a factor of 0 the weighted sum may be 0 * inf.
    weighted = tl.where(factor == 0, 0.0, factor * (weighted + shift * total))
    weighted += tl.sum(e * tl.maximum(d, LOWEST), 1)  # 0 * (-inf) = 0
    return new_top, factor * total + tl.sum(e, 1), weighted


@triton.jit
def _own(x, token_ids, n, counts, first_col, vocab, BLOCK_N: tl.constexpr):
    """The token's own logit of the rows that have it in this tile, 0 of the others.

    Here and below the ids are loaded again: tiles that hold a token are rare, and registers are not to be had.
    """
    col = tl.arange(0, BLOCK_N)[None, :]
    target = tl.load(token_ids + n, mask=counts, other=-1)
    at = tl.where(target < vocab, target - first_col, -1).to(tl.int32)
    return tl.sum(tl.where(col == at[:, None], x, 0.0), 1)


@triton.jit
def _leave_out(x, token_ids, n, counts, first_col, vocab, BLOCK_N: tl.constexpr):
    """x with -inf for the rows' own tokens and beyond the vocabulary."""
    col = tl.arange(0, BLOCK_N)[None, :]
    target = tl.load(token_ids + n, mask=counts, other=-1) - first_col
    return tl.where((col == target.to(tl.int32)[:, None]) | (col >= (vocab - first_col).to(tl.int32)), float("-inf"), x)


@kernel
def tiles_kernel(
    hidden, hidden_stride: tl.int64, weight, weight_stride: tl.int64, bias, biased: tl.int64, token_ids, mask,
    masked: tl.int64, temperatures, many: tl.int64, temperature: tl.float64, scale: tl.float32,
    softcap: tl.float32, partials, own, count: tl.int64, vocab: tl.int64, width: tl.int64, splits: tl.int64,
    tiles: tl.int64,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    ALIGNED: tl.constexpr, PLAIN: tl.constexpr,
):
    """partials (3, splits, N): maximum, sum and weighted sum of a split, without the token; own (N,): its logit."""
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(count, BLOCK_M)
    group = pid // (GROUP * splits)
    group_rows = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = pid - group * (GROUP * splits)
    first_row = ((group * GROUP + within % group_rows) * BLOCK_M).to(tl.int32)
    split = within // group_rows

    n = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    counts = n < count
    counts = counts & (tl.load(mask + n, mask=counts & (masked != 0), other=1) != 0)
    if tl.max(counts.to(tl.int32), 0) == 0:
        return
    target = tl.load(token_ids + n, mask=counts, other=-1)
    c = _exponent(_temperature(temperature, temperatures, many, n, counts))
    begin = split * tiles * BLOCK_N
    my_tiles = tl.minimum(tiles, tl.cdiv(vocab - begin, BLOCK_N)).to(tl.int32)
    # Bit j: tile j holds the token of some row, or the end of the vocabulary, so entries of it are left out.
    tile = tl.minimum(tl.maximum(target - begin, 0) // BLOCK_N, 63)
    one = tl.full((BLOCK_M,), 1, tl.int64)
    special = tl.reduce_or(tl.where((target >= begin) & (tile < my_tiles), one << tile, 0), 0)
    holds = special
    if begin + my_tiles * BLOCK_N > vocab:
        special = special | (tl.full((), 1, tl.int64) << (my_tiles - 1))

    steps = tl.maximum(tl.cdiv(width, BLOCK_K), 1).to(tl.int32)
    k = tl.arange(0, BLOCK_K)
    rows = tl.minimum(n, count - 1)
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    own_x = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # One loop over tiles and steps: the loads of the next tile are under way during the arithmetic of this one.
    step, j = -1, -1
    for _ in range(0, my_tiles * steps):
        step = tl.where(step == steps - 1, 0, step + 1)
        j = tl.where(step == 0, j + 1, j)
        first_col = (begin + j * BLOCK_N).to(tl.int32)
        at = step * BLOCK_K
        if TMA:  # zeros beyond the ends
            h = hidden.load([first_row, at])
            w = weight.load([first_col, at])
        else:
            words = tl.minimum(first_col.to(tl.int64) + tl.arange(0, BLOCK_N), vocab - 1)
            hidden_rows = hidden + rows[:, None] * hidden_stride + (at + k)[None, :]
            weight_rows = weight + words[:, None] * weight_stride + (at + k)[None, :]
            inside = k[None, :] < (width - at).to(tl.int32)
            if ALIGNED:
                hidden_rows, weight_rows = tl.multiple_of(hidden_rows, (1, 16)), tl.multiple_of(weight_rows, (1, 16))
                inside = k[None, :] < tl.multiple_of((width - at).to(tl.int32), 8)
            h = tl.load(hidden_rows, mask=inside, other=0.0)
            w = tl.load(weight_rows, mask=inside, other=0.0)
        if UPCAST:
            h, w = h.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(h, w.T, acc)
        if step == steps - 1:
            if PLAIN:
                if ((holds >> j) & 1) != 0:
                    own_x += _own(acc, token_ids, n, counts, first_col, vocab, BLOCK_N)
                # Both branches begin with the accumulators: where one only passed them on, no wait for them is made.
                if ((special >> j) & 1) != 0:
                    x = _leave_out(acc, token_ids, n, counts, first_col, vocab, BLOCK_N)
                    top, total, weighted = _add_tile(x, top, total, weighted, c)
                else:
                    top, total, weighted = _add_tile(acc, top, total, weighted, c)
            else:
                cols = first_col + tl.arange(0, BLOCK_N)
                x = acc + tl.load(bias + cols, mask=(cols < vocab) & (biased != 0), other=0.0).to(tl.float32)[None, :]
                if softcap > 0:
                    x = softcap * _tanh(x * (scale / softcap))
                if ((holds >> j) & 1) != 0:
                    own_x += _own(x, token_ids, n, counts, first_col, vocab, BLOCK_N)
                if ((special >> j) & 1) != 0:
                    x = _leave_out(x, token_ids, n, counts, first_col, vocab, BLOCK_N)
                top, total, weighted = _add_tile(x, top, total, weighted, c)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    out = partials + split * count + n
    plane = splits * count
    here = (target >= begin) & (target < begin + my_tiles * BLOCK_N) & (target < vocab)
    tl.store(own + n, own_x, mask=counts & here)
    tl.store(out, top, mask=counts)
    tl.store(out + plane, total, mask=counts)
    tl.store(out + 2 * plane, weighted, mask=counts)


@checking_kernel
def merge_kernel(
    token_ids, mask, masked: tl.int64, temperatures, many: tl.int64, temperature: tl.float64, partials,
    own, logprobs, lse, entropy, count: tl.int64, vocab: tl.int64, splits: tl.int64, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The splits of BLOCK rows and their tokens' own logits -> log-prob, log-sum-exp, entropy."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = n < count
    counts = keep & (tl.load(mask + n, mask=keep & (masked != 0), other=1) != 0)
    target = tl.load(token_ids + n, mask=counts, other=0)
    known = (target >= 0) & (target < vocab)
    tl.device_assert(known, "r1kernels: token_ids holds an id outside [0, V)")
    t = _temperature(temperature, temperatures, many, n, counts)
    x = tl.load(own + n, mask=counts & known, other=0.0).to(tl.float64)
    c = _exponent(t).to(tl.float64)  # what the splits were summed with

    plane = splits * count
    top = x
    for first in range(0, splits, SPLITS):
        s = first + tl.arange(0, SPLITS)[:, None]
        inside = (s < splits) & counts[None, :]
        part_top = tl.load(partials + s * count + n[None, :], mask=inside, other=LOWEST)
        top = tl.maximum(top, tl.max(part_top, 0).to(tl.float64))
    d = tl.where(x == top, 0.0, x - top)
    e = tl.exp2(d * c)
    total, weighted = e, tl.where(e == 0, 0.0, e * d)
    for first in range(0, splits, SPLITS):
        s = first + tl.arange(0, SPLITS)[:, None]
        inside = (s < splits) & counts[None, :]
        at = partials + s * count + n[None, :]
        shift = tl.load(at, mask=inside, other=LOWEST).to(tl.float64) - top[None, :]
        factor = tl.exp2(shift * c[None, :])
        part = tl.load(at + plane, mask=inside, other=0.0).to(tl.float64)
        part_weighted = tl.load(at + 2 * plane, mask=inside, other=0.0).to(tl.float64)
        total += tl.sum(factor * part, 0)
        weighted += tl.sum(tl.where(factor == 0, 0.0, factor * (part_weighted + shift * part)), 0)
    mean = weighted / total  # sum_j p_j (x_j - top)
    log_total = tl.log(total)
    # The sums are those of a temperature that is log2(e) / c: a rounding away, and the logarithm's slope is the mean.
    log_sum = log_total + (1 / t - c * LN2) * mean
    value_lse = top / t + log_sum
    logprob = tl.where(x == top, -log_sum, x / t - value_lse)
    tl.store(logprobs + n, tl.where(counts, logprob, 0.0).to(tl.float32), mask=keep)
    tl.store(lse + n, tl.where(counts, value_lse, 0.0), mask=keep)
    tl.store(entropy + n, tl.where(counts, log_total - mean * c * LN2, 0.0), mask=keep)


# ---- launchers ---------------------------------------------------------------------------------------------


def linear_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, mask: Tensor | None, temperature: float,
    temperatures: Tensor | None, logit_scale: float, softcap: float, batch_invariant: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    for name, matrix in (("hidden", hidden), ("weight", weight)):
        if matrix.dtype not in DTYPES or matrix.dtype != hidden.dtype:
            raise TypeError(f"{name} has dtype {matrix.dtype}, expected bfloat16 or float16, one for both")
        if matrix.shape[1] > 1 and matrix.stride(1) != 1:
            raise ValueError(f"{name} has strides {matrix.stride()}, expected rows of adjacent entries (stride 1)")
    (count, width), vocab = hidden.shape, weight.shape[0]
    device = device_of(hidden)
    aligned = _aligned(hidden) and _aligned(weight)
    plain = bias is None and softcap == 0
    tile = config((count, vocab, width), hidden.dtype, device, batch_invariant, aligned, plain)
    splits = math.ceil(vocab / (tile.block_n * tile.tiles))

    partials = hidden.new_empty((3, splits, count), dtype=torch.float32)
    own = hidden.new_empty((count,), dtype=torch.float32)
    logprobs = hidden.new_empty((count,), dtype=torch.float32)
    lse = hidden.new_empty((count,), dtype=torch.float64)
    entropy = hidden.new_empty((count,), dtype=torch.float64)
    if count == 0:
        return logprobs, lse, entropy
    # z = x / t: without a soft cap the scale is a temperature.
    t = temperature if softcap > 0 else temperature / logit_scale
    rows = (token_ids, *optional(mask, torch.bool, token_ids), *optional(temperatures, torch.float32, token_ids), t)
    if tile.tma:
        matrices = (
            TensorDescriptor(hidden, [count, width], [_row_stride(hidden), 1], [tile.block_m, tile.block_k]), 0,
            TensorDescriptor(weight, [vocab, width], [_row_stride(weight), 1], [tile.block_n, tile.block_k]), 0,
        )
    else:
        matrices = hidden, _row_stride(hidden), weight, _row_stride(weight)
    launch(
        tiles_kernel, (math.ceil(count / tile.block_m) * splits,), hidden,
        *matrices, *optional(bias, hidden.dtype, token_ids), *rows, logit_scale, softcap,
        partials, own, count, vocab, width, splits, tile.tiles,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
        **_constants(tile, plain and _has_plain(tile)),
    )
    launch(
        merge_kernel, (math.ceil(count / MERGE_ROWS),), hidden,
        *rows, partials, own, logprobs, lse, entropy, count, vocab, splits, BLOCK=MERGE_ROWS, SPLITS=MERGE_SPLITS,
        num_warps=4,
    )
    return logprobs, lse, entropy


def _row_stride(matrix: Tensor) -> int:
    return matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]


def _aligned(matrix: Tensor) -> bool:
    """Its rows begin at multiples of 16 bytes, have so many, and do not overlap, as the hardware's loads ask."""
    width, stride = matrix.shape[1], _row_stride(matrix)
    return width > 0 and width % 8 == stride % 8 == matrix.data_ptr() % 16 == 0 and stride >= width


def _has_plain(tile: Config) -> bool:
    """Whether heads without bias and soft cap have a kernel of their own: where the epilogue's time matters."""
    return tile.block_m >= 128


def _constants(tile: Config, plain: bool) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP": GROUP, "TMA": tile.tma,
        "ALIGNED": tile.aligned, "PLAIN": plain,
    }


def variants(device: Device) -> Iterator[Variant]:
    """Every compilation that the launcher can ask for."""
    tokens = {
        "token_ids": "*i64", "mask": POINTERS[torch.bool], "temperatures": "*fp32", "partials": "*fp32", "own": "*fp32",
    }
    for dtype in DTYPES:
        data = POINTERS[dtype]
        many = dict.fromkeys(_measured(size, dtype, device) for size in SIZES)
        tiles = [(tile, True) for tile in many if _has_plain(tile)]
        for large, aligned in ((True, True), (False, True), (False, False)):
            tiles.append((_tile(large, aligned, False, device), False))
        tiles += [(tile, False) for tile in many if not _has_plain(tile)]
        for tile, plain in dict.fromkeys(tiles):
            hidden = f"tensordesc<{data[1:]}[{tile.block_m}, {tile.block_k}]>" if tile.tma else data
            weight = f"tensordesc<{data[1:]}[{tile.block_n}, {tile.block_k}]>" if tile.tma else data
            types = signature(tiles_kernel, hidden=hidden, weight=weight, bias=data, **tokens)
            options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
            yield Variant(tiles_kernel, types, _constants(tile, plain), options, ("matrix",))
    types = signature(merge_kernel, logprobs="*fp32", lse="*fp64", entropy="*fp64", **tokens)
    constants = {"BLOCK": MERGE_ROWS, "SPLITS": MERGE_SPLITS}
    yield Variant(merge_kernel, types, constants, {"num_warps": 4, "num_stages": 1})

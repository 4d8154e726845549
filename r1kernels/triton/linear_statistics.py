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
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from r1kernels.triton.common import POINTERS, Device, Variant, device_of, launch, optional, signature
from r1kernels.triton.linear_statistics_kernels import merge_kernel, tiles_kernel
from r1kernels.triton.tables import SIZES, tuned

DTYPES = (torch.bfloat16, torch.float16)
MERGE_ROWS, MERGE_SPLITS = 32, 32
GROUP = 16  # row tiles that share the weights in the cache
SPLIT_STEPS = 256  # steps of a program, whose beginning and end cost about four


class Config(NamedTuple):
    """A tile is block_m rows by block_n words, in steps of block_k over H; a split has `tiles` of them.

    `tma`: the tensor memory accelerator loads them. `aligned`: all rows begin at multiples of 16 bytes. `flush`: steps
    after which a second accumulator takes the first one over, 0 for one accumulator (as the compiler makes of 1).
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool
    aligned: bool
    tiles: int = 1
    flush: int = 0


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


def flushed_tile(device: Device) -> Config | None:
    """A tile with a second accumulator, as large as the registers hold both.

    On sm_90 the matrix units wait meanwhile: up to 380 cycles of instructions, every 2,048 of theirs. The tile reads a
    third more from the cache than the default one, hence the more steps under way.
    """
    if device.arch not in ("sm_90", "sm_100", "sm_103"):
        return None
    return Config(128, 128, 64, 8, 6, True, True, flush=4)


def _large_tile(vocab: int, dtype: torch.dtype, plain: bool, device: Device) -> Config:
    """Of many aligned rows: a measured one, or the fast one."""
    if (measured := tuned("linear_statistics", device.name, dtype, vocab)) is not None:
        return Config(**measured)
    # One accumulator. Matrix units are said to truncate what they add to it. Simulated so, once in 16 entries of H =
    # 4,096, with logits up to 21, log-probs have these errors (nats, mean and largest):
    #                                      tokens of the model    tokens drawn uniformly
    #   one accumulator                    1.4e-5  7e-5           8e-5    1.8e-4
    #   a second one, every 256 (flushed)  9e-7    4e-6           3.6e-6  9e-6
    #   a second one, every 128            9e-7    4e-6           1.6e-6  5e-6
    #   one that rounds to nearest         2.6e-6  1.4e-5         1.7e-6  1.0e-5
    # To take `flushed_tile` instead is to return it here, or to name it in a device's table.
    return _tile(True, True, plain, device)


def search_space(device: Device) -> list[Config]:
    """What benchmarks/tune.py tries, for many aligned rows: splits are those of H = 4,096."""
    first = _tile(True, True, True, device)
    shapes = ((128, 256, 64, 8), (128, 256, 32, 8), (128, 128, 64, 8), (128, 128, 64, 4), (256, 128, 64, 8))
    stages = (3, 4) if device.arch.startswith("sm_") else (1, 2)
    space = [Config(*shape, count, first.tma, True) for shape in shapes for count in stages]
    tiles = dict.fromkeys((first, flushed_tile(device), *space))
    return [tile._replace(tiles=max(SPLIT_STEPS * tile.block_k // 4096, 1)) for tile in tiles if tile is not None]


def config(
    shape: tuple[int, int, int], dtype: torch.dtype, device: Device, batch_invariant: bool, aligned: bool = True,
    plain: bool = True,
) -> Config:
    """The tile and the splits for (N, V, H) of a 16-bit dtype. With `batch_invariant`, whatever N.

    A split is of about 256 steps. Fewer, where N is so small that they would not make eight waves of programs.
    """
    count, vocab, width = shape
    large = batch_invariant or count > 64
    tile = _large_tile(vocab, dtype, plain, device) if large and aligned else _tile(large, aligned, plain, device)
    tiles = min(max(SPLIT_STEPS // max(math.ceil(width / tile.block_k), 1), 1), 16)
    if not batch_invariant:
        columns = math.ceil(count / tile.block_m) * math.ceil(vocab / tile.block_n)
        while tiles > 1 and columns < 8 * device.processors * tiles:
            tiles = tiles // 2
    return tile._replace(tiles=tiles)


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
    if width % 8 == 0 and not _aligned(hidden):
        # A copy costs less than loads entry by entry, and a row's tile does not depend on how many rows there are.
        hidden = hidden.clone(memory_format=torch.contiguous_format)
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
        "ALIGNED": tile.aligned, "PLAIN": plain, "FLUSH": tile.flush,
    }


TOKENS = {
    "token_ids": "*i64", "mask": POINTERS[torch.bool], "temperatures": "*fp32", "partials": "*fp32", "own": "*fp32",
}


def tile_variant(tile: Config, plain: bool, dtype: torch.dtype) -> Variant:
    data = POINTERS[dtype]
    hidden = f"tensordesc<{data[1:]}[{tile.block_m}, {tile.block_k}]>" if tile.tma else data
    weight = f"tensordesc<{data[1:]}[{tile.block_n}, {tile.block_k}]>" if tile.tma else data
    types = signature(tiles_kernel, hidden=hidden, weight=weight, bias=data, **TOKENS)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return Variant(tiles_kernel, types, _constants(tile, plain), options, ("matrix",))


def variants(device: Device) -> Iterator[Variant]:
    """Every compilation that the launcher can ask for."""
    for dtype in DTYPES:
        kinds = [(_large_tile(vocab, dtype, plain, device), plain) for vocab in SIZES for plain in (True, False)]
        kinds += [(_tile(False, aligned, False, device), False) for aligned in (True, False)]
        for tile, plain in dict.fromkeys((tile._replace(tiles=1), plain and _has_plain(tile)) for tile, plain in kinds):
            yield tile_variant(tile, plain, dtype)
    types = signature(merge_kernel, logprobs="*fp32", lse="*fp64", entropy="*fp64", **TOKENS)
    constants = {"BLOCK": MERGE_ROWS, "SPLITS": MERGE_SPLITS}
    yield Variant(merge_kernel, types, constants, {"num_warps": 4, "num_stages": 1})

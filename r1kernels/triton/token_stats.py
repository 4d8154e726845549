r"""Token statistics from logits, in one read.

A row is cut into segments of fixed size; a program reduces one segment to four float32 numbers, and a second kernel
merges the segments of a row in float64, in order. Bits depend on the row and the tile, not on N, strides or alignment;
few long rows fill a device as well as many short ones. The token's own logit is left out of the sums and joins in the
second kernel, so a log-prob near 0 keeps its relative accuracy.

Bytes: V entries a counted token, and 32 more for each of its segments; rows behind the mask are not read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from r1kernels.triton.common import (
    ALIGNED,
    POINTERS,
    STRIDED,
    UNIT_STRIDE,
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
from r1kernels.triton.tables import SIZES, tuned
from r1kernels.triton.token_stats_kernels import (
    merge_kernel,
    merge_more_kernel,
    segment_kernel,
    segment_more_kernel,
)

LAYOUTS = (ALIGNED.value, UNIT_STRIDE.value, STRIDED.value)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEGMENT = 32768  # entries: long enough to hide what a program costs, and part of what the bits depend on
MERGE_ROWS, MERGE_WARPS = 128, 4


class Config(NamedTuple):
    """A tile is `unroll` vectors of 16 bytes for each of the num_warps x 32 (64) threads."""

    num_warps: int
    unroll: int

    def constants(self, dtype: torch.dtype, device: Device, layout: int) -> dict[str, int]:
        return {
            "THREADS": self.num_warps * device.warp, "UNROLL": self.unroll, "VEC": 16 // dtype.itemsize,
            "LAYOUT": layout,
        }

    def gradient_constants(self, dtype: torch.dtype, device: Device, layout: int) -> dict[str, int]:
        """Those of the gradient, which needs registers for results too: two vectors at most, for more programs."""
        vec = 16 // dtype.itemsize
        return {
            "LANES": self.num_warps * device.warp * vec, "UNROLL": min(self.unroll, 2), "VEC": vec,
            "LAYOUT": layout,
        }


def config(shape: tuple[int, int], dtype: torch.dtype, device: Device) -> Config:
    """The tile for (N, V) logits: 64 bytes in flight for a thread, in few enough registers for several programs.

    With 64 threads in a warp the registers allow half of that.
    """
    if (measured := tuned("token_stats", device.name, dtype, shape[1])) is not None:
        return Config(**measured)
    return Config(num_warps=8, unroll=4 if device.warp == 32 else 2)


def configs(dtype: torch.dtype, device: Device) -> list[Config]:
    """All that `config` gives on a device: measured ones may differ with the vocabulary."""
    return list(dict.fromkeys(config((1, size), dtype, device) for size in SIZES))


def search_space(device: Device) -> list[Config]:
    """What benchmarks/tune.py tries."""
    return [Config(num_warps, unroll) for num_warps in (4, 8, 16) for unroll in (1, 2, 4)]


# ---- launchers ---------------------------------------------------------------------------------------------


def launch_segments(
    rows: Rows, token_ids: Tensor, mask: tuple[Tensor, int], temperatures: tuple[Tensor, int], temperature: float,
    partials: Tensor, exact: bool = True, of_segments: Any = segment_kernel,
) -> bool:
    """`segment_kernel` on all rows, and whether it was EXACT; token ids of -1 leave nothing out of the sums."""
    logits, device, segments = rows.data, device_of(rows.data), partials.shape[1]
    chosen = config((rows.count, rows.vocab), logits.dtype, device)
    exact = exact and logits.dtype == torch.float32
    launch(
        of_segments, (rows.count * segments,), logits, *rows.arguments(), token_ids, *mask, *temperatures,
        temperature, partials, rows.count, rows.vocab, segments, num_warps=chosen.num_warps, SEGMENT=SEGMENT,
        EXACT=exact, **chosen.constants(logits.dtype, device, rows.layout),
    )
    return exact


def token_stats(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, temperatures: Tensor | None = None,
    exact: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    return _statistics(logits, token_ids, mask, temperature, temperatures, exact, None)


def token_statistics(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, temperatures: Tensor | None,
    exact: bool, wanted: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All statistics together, whatever is wanted: the read of the logits takes the time."""
    more = torch.empty((4, *logits.shape[:-1]), dtype=torch.float64, device=logits.device)
    return *_statistics(logits, token_ids, mask, temperature, temperatures, exact, more), more


def _statistics(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, temperatures: Tensor | None,
    exact: bool, more: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, shape = rows_of(logits), logits.shape[:-1]
    logprobs = torch.empty(shape, dtype=torch.float32, device=logits.device)
    lse = torch.empty(shape, dtype=torch.float64, device=logits.device)
    entropy = torch.empty(shape, dtype=torch.float64, device=logits.device)
    segments = triton.cdiv(rows.vocab, SEGMENT)
    planes, of_segments, merge = 4, segment_kernel, merge_kernel
    if more is not None:
        planes, of_segments, merge = 7, segment_more_kernel, merge_more_kernel
    partials = torch.empty((planes, segments, rows.count), dtype=torch.float32, device=logits.device)
    masking = optional(mask, torch.bool, token_ids)
    tempering = optional(temperatures, torch.float32, token_ids)
    tokens = (token_ids, *masking, *tempering)
    exact = launch_segments(rows, token_ids, masking, tempering, temperature, partials, exact, of_segments)
    results = (logprobs, lse, entropy, *(() if more is None else (more,)))
    launch(
        merge, (triton.cdiv(rows.count, MERGE_ROWS),), logits, *rows.arguments(), *tokens, temperature, partials,
        *results, rows.count, rows.vocab, segments, int(exact), num_warps=MERGE_WARPS, BLOCK=MERGE_ROWS,
    )
    return logprobs, lse, entropy


def loop_of(unroll: int, dtype: torch.dtype) -> Loop:
    return Loop(unroll * 16 // dtype.itemsize, unroll * 16)


def variants(device: Device) -> Iterator[Variant]:
    """Every compilation that a launch above can ask for."""
    tokens = {"token_ids": "*i64", "mask": "*i1", "temperatures": "*fp32", "partials": "*fp32"}
    for dtype in DTYPES:
        exactness = (True, False) if dtype == torch.float32 else (False,)
        kernels = (segment_kernel, segment_more_kernel)
        for of_segments, chosen, layout, exact in itertools.product(
            kernels, configs(dtype, device), LAYOUTS, exactness
        ):
            yield Variant(
                of_segments,
                signature(of_segments, logits=POINTERS[dtype], **tokens),
                {"SEGMENT": SEGMENT, "EXACT": exact, **chosen.constants(dtype, device, layout)},
                {"num_warps": chosen.num_warps, "num_stages": 1},
                ("wide_loads",) if layout == ALIGNED.value else (),
                loop_of(chosen.unroll, dtype),
            )
        results = {"logprobs": "*fp32", "lse": "*fp64", "entropy": "*fp64", "more": "*fp64"}
        for merge in (merge_kernel, merge_more_kernel):
            yield Variant(
                merge,
                signature(merge, logits=POINTERS[dtype], **results, **tokens),
                {"BLOCK": MERGE_ROWS},
                {"num_warps": MERGE_WARPS, "num_stages": 1},
            )

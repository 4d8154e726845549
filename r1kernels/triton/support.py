r"""Sets of ids: rows of the weight are gathered, and nothing has the width of the vocabulary but the weight's gradient.

    z_e = h_n . w_j,   dH_n = sum_e dz_e w_j,   dW_j = sum_e dz_e h_n      for entries e = (token n, id j)

A program takes the entries of one id (products, dW) or of one token (dH, statistics), in a fixed order: sums are the
same in every run. Bytes: one row of hidden states, or of the weight, for each entry; dW is written once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from r1kernels.triton.common import POINTERS, Device, Variant, device_of, launch, optional, signature
from r1kernels.triton.support_kernels import (
    grad_hidden_kernel,
    grad_weight_kernel,
    gradient_kernel,
    products_kernel,
    stats_kernel,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARTS = 4  # programs that share the entries of an id, of which a frequent one has thousands


class Config(NamedTuple):
    """A tile of entries and columns, the entries of a set that are read at once, and warps."""

    entries: int
    columns: int
    block: int
    num_warps: int


def config(shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> Config:
    """Tiles of 2,048 entries: 16 registers a thread, and as many addresses of 64 bits."""
    return Config(entries=8, columns=256, block=256, num_warps=4)


def support_products(
    hidden: Tensor, weight: Tensor, starts: Tensor, entries: Tensor, tokens: Tensor, values: Tensor, accumulate: bool
) -> None:
    chosen = config(tuple(weight.shape), weight.dtype, device_of(hidden))
    vocab, width = weight.shape
    launch(
        products_kernel, (vocab * PARTS,), hidden, hidden, hidden.stride(0), weight, weight.stride(0), starts, entries,
        tokens, values, int(accumulate), width, vocab, PARTS, num_warps=chosen.num_warps, ENTRIES=chosen.entries,
        COLUMNS=chosen.columns,
    )


def support_grad_hidden(
    values: Tensor, weight: Tensor, starts: Tensor, entries: Tensor, tokens: Tensor, out: Tensor
) -> None:
    chosen = config(tuple(weight.shape), weight.dtype, device_of(values))
    (vocab, width), count, device = weight.shape, len(out), values.device
    # The entries in the order of the sets again, with their ids; those that are not listed have id V.
    ids = torch.searchsorted(starts[0], torch.arange(len(entries), device=device, dtype=torch.int32), right=True) - 1
    in_sets, rows = torch.empty_like(entries), torch.empty_like(entries)
    in_sets[entries.long()] = ids.int()
    rows[entries.long()] = tokens
    begins = torch.searchsorted(rows, torch.arange(count + 1, device=device, dtype=torch.int32))
    launch(
        grad_hidden_kernel, (count, triton.cdiv(width, chosen.columns)), values, values, in_sets, begins, weight,
        weight.stride(0), out, width, vocab, num_warps=chosen.num_warps, ENTRIES=chosen.entries,
        COLUMNS=chosen.columns,
    )


def support_grad_weight(
    values: Tensor, hidden: Tensor, starts: Tensor, entries: Tensor, tokens: Tensor, out: Tensor, accumulate: bool
) -> None:
    chosen = config(tuple(out.shape), out.dtype, device_of(values))
    vocab, width = out.shape
    launch(
        grad_weight_kernel, (vocab, triton.cdiv(width, chosen.columns)), values, values, starts, entries, tokens,
        hidden, hidden.stride(0), out, int(accumulate), width, num_warps=chosen.num_warps, ENTRIES=chosen.entries,
        COLUMNS=chosen.columns,
    )


def support_stats(
    values: Tensor, support_offsets: Tensor, targets: Tensor, mask: Tensor | None, temperature: float,
    temperatures: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = config(tuple(values.shape), values.dtype, device_of(values))
    logprobs = torch.empty(len(targets), dtype=torch.float32, device=values.device)
    lse, entropy = (torch.empty(len(targets), dtype=torch.float64, device=values.device) for _ in range(2))
    launch(
        stats_kernel, (len(targets),), values, values, support_offsets, targets,
        *optional(mask, torch.bool, targets), *optional(temperatures, torch.float32, targets), temperature, logprobs,
        lse, entropy, num_warps=chosen.num_warps, BLOCK=chosen.block,
    )
    return logprobs, lse, entropy


def support_stats_backward(
    values: Tensor, support_offsets: Tensor, targets: Tensor, lse: Tensor, entropy: Tensor,
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, temperature: float, temperatures: Tensor | None,
    softcap: float, out: Tensor,
) -> None:
    chosen = config(tuple(values.shape), values.dtype, device_of(values))
    launch(
        gradient_kernel, (len(targets),), values, values, support_offsets, targets, lse, entropy,
        *optional(grad_logprobs, torch.float32, targets), *optional(grad_entropy, torch.float32, targets),
        *optional(temperatures, torch.float32, targets), temperature, softcap, out, num_warps=chosen.num_warps,
        BLOCK=chosen.block,
    )


def variants(device: Device) -> Iterator[Variant]:
    """Every compilation that a launch above can ask for."""
    chosen = config((1,), torch.float32, device)
    options = {"num_warps": chosen.num_warps, "num_stages": 1}
    tile = {"ENTRIES": chosen.entries, "COLUMNS": chosen.columns}
    index = {"starts": "*i32", "entries": "*i32", "tokens": "*i32", "values": "*fp32"}
    for hidden, other in itertools.product(DTYPES, DTYPES):
        if {hidden, other} != {torch.bfloat16, torch.float16}:
            yield Variant(
                products_kernel,
                signature(products_kernel, hidden=POINTERS[hidden], weight=POINTERS[other], **index), tile, options,
            )
        yield Variant(
            grad_weight_kernel,
            signature(grad_weight_kernel, hidden=POINTERS[hidden], out=POINTERS[other], **index), tile, options,
        )
    for dtype in DTYPES:
        yield Variant(
            grad_hidden_kernel,
            signature(grad_hidden_kernel, values="*fp32", ids="*i32", begins="*i64", weight=POINTERS[dtype],
                      out="*fp32"),
            tile, options,
        )
    rows = {"values": "*fp32", "offsets": "*i64", "targets": "*i64", "lse": "*fp64", "entropy": "*fp64",
            "temperatures": "*fp32"}
    yield Variant(
        stats_kernel, signature(stats_kernel, mask="*i1", logprobs="*fp32", **rows), {"BLOCK": chosen.block}, options,
    )
    yield Variant(
        gradient_kernel,
        signature(gradient_kernel, grad_logprobs="*fp32", grad_entropy="*fp32", out="*fp32", **rows),
        {"BLOCK": chosen.block}, options,
    )

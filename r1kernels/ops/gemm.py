"""Matrix products with a float32 result from 16-bit operands, by whichever library does them best on a device.

    out = a @ b   or   out += a @ b;   a (M, K), b (K, N), out (M, N) float32 (float64 from float64)

The logits of a language model lose three digits when a 16-bit product rounds them, so every product here keeps its
accumulators. No route rounds an operand.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from r1kernels import _library

HALF_DTYPES = (torch.bfloat16, torch.float16)
# Side of the blocks that are copied in float32: 16 MiB of each operand at most.
_BLOCK = 2048
# Rows of a product whose shape never changes, for libraries that choose an algorithm by shape.
_INVARIANT_ROWS = 128
_precision_lock = threading.RLock()


def route(tensor: Tensor, batch_invariant: bool = False) -> str:
    """How products of matrices like `tensor` are computed: the one place where this is decided.

    "native": our kernel, whose bits depend on nothing but the row and the column. "onednn": float32 copies that
    oneDNN reads as bfloat16, which loses nothing, on processors with matrix units (AMX). "out_dtype": the library of
    an accelerator, told to keep its accumulators. "copies": float32 copies, block by block. "torch": operands that
    are float32 or float64 already.
    """
    if _library.choose(tensor.device.type, tensor.dtype).implementation == "cpu":
        amx = tensor.dtype == torch.bfloat16 and _library.extension.has_amx_bf16()
        return "onednn" if amx and not batch_invariant else "native"
    if tensor.dtype not in HALF_DTYPES:
        return "torch"
    return "out_dtype" if tensor.device.type == "cuda" and _keeps_accumulators(tensor.device) else "copies"


@functools.cache
def _keeps_accumulators(device: torch.device) -> bool:
    """Whether the device's library gives float32 results of 16-bit products, in place too: tried once."""
    a, out = torch.ones(16, 16, dtype=torch.bfloat16, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.mm(a, a, out_dtype=torch.float32, out=out)
        torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError) as error:  # NotImplementedError is one
        warnings.warn(
            f"r1kernels multiplies float32 copies on {device}, which is slow: torch {torch.__version__} has no 16-bit "
            f"product with a float32 result there ({str(error).splitlines()[0]})",
            stacklevel=2,
        )
        return False
    return True


def matmul(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False, batch_invariant: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b, in float32.

    Args:
        a, b: (M, K), (K, N), of one dtype; one of the strides of each is 1.
        out: (M, N), float32 (float64 from float64), adjacent columns.
        batch_invariant: the bits of a row of out depend on nothing but that row of a (and b).
    """
    chosen = route(a, batch_invariant)
    if chosen == "native":
        torch.ops.r1kernels.gemm_f32.default(a, b, out, accumulate)
    elif batch_invariant:
        _by_fixed_rows(chosen, a, b, out, accumulate)
    else:
        _product(chosen, a, b, out, accumulate)
    return out


def _product(chosen: str, a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    if chosen == "onednn":
        with _bfloat16_operands():
            _copies(a, b, out, accumulate)
    elif chosen == "copies":
        _copies(a, b, out, accumulate)
    elif chosen == "out_dtype":
        if accumulate:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif accumulate:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def _by_fixed_rows(chosen: str, a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """One shape for every product, the last padded with zeros: the library cannot choose by the size of the batch."""
    for begin in range(0, a.shape[0], _INVARIANT_ROWS):
        rows = a[begin : begin + _INVARIANT_ROWS]
        padded = rows.new_zeros(_INVARIANT_ROWS, a.shape[1])
        padded[: len(rows)] = rows
        product = out.new_empty(_INVARIANT_ROWS, b.shape[1])
        _product(chosen, padded, b, product, False)
        target = out[begin : begin + len(rows)]
        if accumulate:
            target += product[: len(rows)]
        else:
            target.copy_(product[: len(rows)])


def _blocks(size: int) -> Iterator[slice]:
    return (slice(begin, min(begin + _BLOCK, size)) for begin in range(0, size, _BLOCK))


def _copies(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """The product by blocks whose float32 copies are small, each element summed over K in ascending order."""
    if not accumulate:
        out.zero_()
    for k, m in itertools.product(_blocks(a.shape[1]), _blocks(a.shape[0])):
        a_block = a[m, k].float()
        for n in _blocks(b.shape[1]):
            out[m, n].addmm_(a_block, b[k, n].float())


@contextlib.contextmanager
def _bfloat16_operands() -> Iterator[None]:
    """Lets oneDNN round float32 operands to bfloat16; exact here, because they are copies of bfloat16 values.

    The setting is process-wide: it is put back, and other threads wait to set it; a float32 product that one of them
    happens to run meanwhile would be rounded too.
    """
    settings = torch.backends.mkldnn.matmul
    with _precision_lock:
        before = settings.fp32_precision
        settings.fp32_precision = "bf16"
        try:
            yield
        finally:
            settings.fp32_precision = before

"""Matrix products with a float32 result from 16-bit operands, by the library that is best on each device.

    out = a @ b   or   out += a @ b;   a (M, K), b (K, N), out (M, N) float32 (float64 from float64)

The logits of a language model lose three digits when a 16-bit product rounds them. So every product here keeps its
float32 sums. No route rounds an operand.
"""

from __future__ import annotations

import functools
import itertools
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


def route(tensor: Tensor) -> str:
    """How products of matrices like `tensor` are computed. Only this function decides it.

    "native": our kernel; the bits of an entry depend only on its row and its column. "out_dtype": the library of an
    accelerator, which keeps its float32 sums. "copies": float32 copies, block by block. "torch": the operands are
    float32 or float64 already.
    """
    if _library.choose(tensor.device.type, tensor.dtype).implementation == "cpu":
        return "native"
    if tensor.dtype not in HALF_DTYPES:
        return "torch"
    return "out_dtype" if tensor.device.type == "cuda" and _keeps_accumulators(tensor.device) else "copies"


@functools.cache
def _keeps_accumulators(device: torch.device) -> bool:
    """Whether the device's library gives float32 results of 16-bit products, in place too. It is tried once."""
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
        batch_invariant: the bits of a row of out depend only on that row of a (and on b).
    """
    chosen = route(a)
    if chosen == "native":
        torch.ops.r1kernels.gemm_f32.default(a, b, out, accumulate)
    elif batch_invariant:
        _by_fixed_rows(chosen, a, b, out, accumulate)
    else:
        _product(chosen, a, b, out, accumulate)
    return out


def add_rows(out: Tensor, ids: Tensor, factors: Tensor, rows: Tensor) -> None:
    """out[ids[t]] += factors[t] * rows[t] for all t, in a fixed order.

    Args:
        out: (V, H), float32 or float64. ids: (N,). factors: (N,), dtype of out. rows: (N, H).
    """
    if route(rows) == "native":
        torch.ops.r1kernels.add_rows.default(out, ids, factors, rows)
    else:
        out.index_put_((ids,), factors[:, None] * rows, accumulate=True)


def _product(chosen: str, a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    if chosen == "copies":
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
    """Every product has one shape, and the last is padded with zeros. So the size of the batch cannot change how the
    library computes."""
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
    """Computes the product in blocks with small float32 copies. Each element is summed over K in ascending order."""
    if not accumulate:
        out.zero_()
    for k, m in itertools.product(_blocks(a.shape[1]), _blocks(a.shape[0])):
        a_block = a[m, k].float()
        for n in _blocks(b.shape[1]):
            out[m, n].addmm_(a_block, b[k, n].float())

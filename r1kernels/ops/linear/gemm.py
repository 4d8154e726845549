"""Matrix products with a float32 result from 16-bit operands, by the library that is best on each device.

    out = a @ b   or   out += a @ b;   a (M, K), b (K, N), out (M, N) float32 (float64 from float64)

The logits of a language model lose three digits when a 16-bit product rounds them. So every product here keeps its
float32 sums. No route rounds an operand, not even a float32 operand next to a 16-bit one, unless a coarse product is
enough.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from r1kernels import _dispatch
from r1kernels.ops.linear.precision import exact_float32, float32_sums

HALF_DTYPES = (torch.bfloat16, torch.float16)
# Side of the blocks that are copied in float32: 16 MiB of each operand at most.
_BLOCK = 2048
# Blocks of a float32 operand that are split in bfloat16 parts: along K, so that sums are seldom read again, and across
# it. Together with their parts they take 200 MiB at most.
_SPLIT_DEPTH, _SPLIT_WIDTH = 8192, 1024
# Rows of a product whose shape never changes, for libraries that choose an algorithm by shape.
_INVARIANT_ROWS = 128


def route(a: Tensor, b: Tensor | None = None) -> str:
    """How products of matrices like `a` and `b` (default: like `a`) are computed.

    "native": our kernel; the bits of an entry depend only on its row and its column. "out_dtype": the library of an
    accelerator, which keeps its float32 sums. "parts": the same for bfloat16 with float32, which is split into three
    bfloat16 parts. "copies": float32 copies of 16-bit operands, block by block. "torch": both operands are float32 or
    float64 already.
    """
    other = a.dtype if b is None else b.dtype
    return _dispatch.choose("product", a.device, a.dtype, other, _keeps_accumulators).implementation


@functools.cache
def _keeps_accumulators(device: torch.device) -> bool:
    """Whether the device's library gives float32 results of 16-bit products, in place too. It is tried once."""
    a, out = torch.ones(16, 16, dtype=torch.bfloat16, device=device), torch.zeros(16, 16, device=device)
    try:
        _wide(a, a, out, False)
        _wide(a, a, out, True)
    except (RuntimeError, TypeError) as error:  # NotImplementedError is one
        warnings.warn(
            f"r1kernels multiplies float32 copies on {device}, which is slow: torch {torch.__version__} has no 16-bit "
            f"product with a float32 result there ({str(error).splitlines()[0]})",
            stacklevel=2,
        )
        return False
    return True


def matmul(
    a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False, batch_invariant: bool = False,
    coarse: bool = False,
) -> Tensor:
    """out = a @ b, or out += a @ b, in float32.

    Args:
        a, b: (M, K), (K, N), of one dtype, or one float32 and the other bfloat16 or float16; one of the strides of
            each is 1.
        out: (M, N), float32 (float64 from float64), adjacent columns.
        batch_invariant: the bits of a row of out depend only on that row of a (and on b).
        coarse: 16 bits of float32 operands are enough, because the caller rounds the result to 16 bits or fewer. An
            infinity may become NaN.
    """
    chosen = route(a, b)
    if chosen == "native":
        torch.ops.r1kernels.gemm_f32.default(a, b, out, accumulate, coarse)
        return out
    with exact_float32():
        if chosen == "parts":
            _parts(a, b, out, accumulate, _by_fixed_rows if batch_invariant else _product)
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


def has_rounded_sums(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether `add_rounded` computes products of matrices like `a` and `b` with a result of `dtype`."""
    return a.dtype == b.dtype == dtype and dtype in HALF_DTYPES and route(a, b) == "out_dtype"


def add_rounded(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out += a @ b in 16 bits: a float32 sum, out among its terms, that is rounded once. See `has_rounded_sums`."""
    with float32_sums():
        _narrow(a, b, out)
    return out


def place_rows(out: Tensor, ids: Tensor, factors: Tensor, rows: Tensor) -> None:
    """out[i] = sum of factors[t] * rows[t] over all t with ids[t] == i, each sum in float32 and rounded once; other
    rows are left as they are. Shapes depend on no value, so there is no synchronisation.

    Args:
        out: (V, H), 16 bits. ids: (N,), N > 0. factors: (N,) float32. rows: (N, H).
    """
    ascending, order = ids.sort(stable=True)
    new = torch.nn.functional.pad(ascending[1:] != ascending[:-1], (1, 0), value=True)
    first = torch.where(new, torch.arange(len(ids), device=ids.device), 0).cummax(0).values
    place = torch.empty_like(order).scatter_(0, order, order[first])  # the first t with the same id, where its sum is
    sums = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
    sums.index_put_((place,), factors[:, None] * rows, accumulate=True)
    out[ids] = sums.to(out.dtype)[place]


def _product(chosen: str, a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    if chosen == "copies":
        _copies(a, b, out, accumulate)
    elif chosen == "out_dtype":
        with float32_sums():
            _wide(a, b, out, accumulate)
    elif accumulate:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def _wide(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """The product of 16-bit operands with a float32 result, by the device's library."""
    if accumulate:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _narrow(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a @ b in 16 bits, by the device's library, which rounds a float32 sum when it writes `out`."""
    torch.addmm(out, a, b, out=out)


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


def _blocks(size: int, side: int) -> Iterator[slice]:
    return (slice(begin, min(begin + side, size)) for begin in range(0, size, side))


def _copies(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """Computes the product in blocks with small float32 copies. Each element is summed over K in ascending order."""
    if not accumulate:
        out.zero_()
    for k, m in itertools.product(_blocks(a.shape[1], _BLOCK), _blocks(a.shape[0], _BLOCK)):
        a_block = a[m, k].float()
        for n in _blocks(b.shape[1], _BLOCK):
            out[m, n].addmm_(a_block, b[k, n].float())


def _parts(a: Tensor, b: Tensor, out: Tensor, accumulate: bool, product: Callable[..., None]) -> None:
    """Splits the float32 operand in bfloat16 parts, block by block, and adds their products, the smallest parts first.
    Parts may be 0, so an infinity of the bfloat16 operand can give NaN."""
    if not accumulate:
        out.zero_()
    split_a = a.dtype == torch.float32
    size = a.shape[0] if split_a else b.shape[1]
    for k, outer in itertools.product(_blocks(a.shape[1], _SPLIT_DEPTH), _blocks(size, _SPLIT_WIDTH)):
        for part in _thirds(a[outer, k] if split_a else b[k, outer]):
            if split_a:
                product("out_dtype", part, b[k], out[outer], True)
            else:
                product("out_dtype", a[:, k], part, out[:, outer], True)


def _thirds(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three bfloat16 parts whose sum is x, the smallest first. Each is what is left, cut off after 8 bits, so that no
    part overflows."""

    def cut(value: Tensor) -> Tensor:
        return (value.view(torch.int32) & -65536).view(torch.float32)

    finite = x.isfinite()
    first = torch.where(finite, cut(x), x)
    rest = torch.where(finite, x - first, 0)
    second = cut(rest)
    return (rest - second).bfloat16(), second.bfloat16(), first.bfloat16()

"""Operands of the matrix product in any layout, and the product by the kernel and on emulated tiles."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import host_module
import torch
from torch import Tensor

from r1kernels import _library, testing

# The set avx512_bf16_fma has the products of avx512.
ISAS = [isa for isa in _library.extension.cpu_isas() if isa != "avx512_bf16_fma"] if _library.extension else []
DTYPES = list(_library.NATIVE_DTYPES)
LAYOUTS = ["row", "column"]
TINY = torch.finfo(torch.float32).tiny
TILES = Path(__file__).with_name("emulated_tiles.cpp")
gemm_f32 = torch.ops.r1kernels.gemm_f32


@contextlib.contextmanager
def running(isa: str) -> Iterator[None]:
    """Runs the kernels of a set of CPU instructions."""
    in_use = _library.extension.cpu_isa()
    _library.extension.use_cpu_isa(isa)
    yield
    _library.extension.use_cpu_isa(in_use)


def lay_out(matrix: Tensor, layout: str) -> Tensor:
    """The same values with rows or columns contiguous, a few elements apart, and NaN everywhere around them."""
    values = matrix if layout == "row" else matrix.t()
    around = torch.full((values.shape[0] + 2, values.shape[1] + 9), math.nan, dtype=matrix.dtype)
    inside = around[1:-1, 3:-6]
    inside.copy_(values)
    return inside if layout == "row" else inside.t()


def random_matrix(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=testing.generator(seed)).to(dtype)


def product(a: Tensor, b: Tensor, out: Tensor | None = None, coarse: bool = False) -> Tensor:
    """a @ b by the kernel, or added to a copy of `out`; what lies around the result must not change."""
    around = torch.full((a.shape[0] + 2, b.shape[1] + 7), 12345.0)
    inside = around[1:-1, 3:-4]
    if out is not None:
        inside.copy_(out)
    gemm_f32(a, b, inside, out is not None, coarse)
    result = inside.clone()
    inside.fill_(12345.0)
    assert (around == 12345.0).all()
    return result


def check(a: Tensor, b: Tensor, out: Tensor | None = None) -> None:
    """Two roundings of fp32 for each of at most 1024 products of a slice, one for each slice and one for `out`."""
    k = a.shape[1]
    exact, terms = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    if out is not None:
        exact, terms = exact + out, terms + out.abs()
    roundings = min(2 * k, 2048) + math.ceil(k / 256) + 1
    testing.assert_within(product(a, b, out), exact, roundings * testing.EPS32 / 2 * terms + k * TINY)


def wide(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """What the library of a GPU computes: `gemm._wide` on the CPU, whose library has no such product."""
    assert a.dtype == b.dtype == torch.bfloat16
    product = a.float() @ b.float()
    out.copy_(out + product if accumulate else product)


@functools.cache
def emulated_tiles() -> list[ModuleType]:
    return list(host_module.load(TILES, sorted((host_module.ROOT / "csrc" / "cpu").glob("*.h"))).values())


def emulated_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, or added to `out`, by every variant of the module, with the same bits."""
    results = []
    for module in emulated_tiles():
        around = torch.full((a.shape[0] + 2, b.shape[1] + 7), 12345.0)
        inside = around[1:-1, 3:-4]
        if out is not None:
            inside.copy_(out)
        module.multiply(
            a.shape[0], b.shape[1], a.shape[1], a.dtype == torch.float32, a.data_ptr(), *a.stride(),
            b.dtype == torch.float32, b.data_ptr(), *b.stride()[::-1], inside.data_ptr(), inside.stride(0),
            out is not None,
        )
        results.append(inside.clone())
        inside.fill_(12345.0)
        assert (around == 12345.0).all()
    assert all(torch.equal(results[0].view(torch.int32), result.view(torch.int32)) for result in results)
    return results[0]


def same_on_tiles(a: Tensor, b: Tensor, out: Tensor | None, got: Tensor) -> None:
    """Where the processor has tiles, they give the bits of the emulation; a NaN may have any bits."""
    if "amx_bf16" not in ISAS:
        return
    with running("amx_bf16"):
        expected = product(a, b, out, coarse=a.dtype == b.dtype == torch.float32)
    numbers = ~expected.isnan()
    assert torch.equal(numbers, ~got.isnan())
    assert torch.equal(got.view(torch.int32)[numbers], expected.view(torch.int32)[numbers])

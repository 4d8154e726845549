"""What tests on a GPU share: the device, and the comparison with float64.

R1KERNELS_GPU_REHEARSAL=1 runs them at small sizes on the CPU with its kernels, or with those of Triton interpreted, but
for those that need a device.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import r1kernels
from r1kernels import _library, testing

REHEARSAL = bool(os.environ.get("R1KERNELS_GPU_REHEARSAL"))
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
NO_GPU = "no GPU: torch.cuda is not available"
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not (REHEARSAL or torch.cuda.is_available()), reason=NO_GPU)]
needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
LOGITS = 16.0  # how large those of a test are; a log-prob, however near 0, is a difference of such numbers
TINY32 = torch.finfo(torch.float32).tiny

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for in deterministic mode

Function = Callable[..., Any]
Inputs = dict[str, Any]


# The kernels under test; those in CUDA C++ serve what takes logits, and tokens.
KERNELS = (testing.KERNELS,) if REHEARSAL else ("triton", "cuda")
FOR_EVERYTHING = tuple(kernels for kernels in KERNELS if kernels != "cuda")


def ours(kernels: str) -> contextlib.AbstractContextManager[None]:
    if kernels == "cuda" and (missing := _library.cuda_missing(DEVICE.type)):
        pytest.skip(f"no CUDA kernels: {missing}")
    return r1kernels.backend(kernels)


def size(real: int, small: int) -> int:
    return small if REHEARSAL else real


def on_device(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, made on the device."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=DEVICE) * scale).to(dtype)


def logits_of(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 4.0, seed: int = 0) -> Tensor:
    return on_device(*shape, seed=seed, scale=scale, dtype=dtype)


def ids_of(*shape: int, vocab: int, seed: int = 1) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)


def head_of(tokens: int, width: int, vocab: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """(hidden (N, H), weight (V, H)), logits of a standard deviation of 4."""
    return on_device(tokens, width, dtype=dtype), on_device(vocab, width, seed=1, scale=4 / width**0.5, dtype=dtype)


def leaves_of(inputs: Inputs, names: tuple[str, ...]) -> Inputs:
    return inputs | {name: inputs[name].detach().requires_grad_() for name in names}


def results(function: Function, inputs: Inputs, leaves: tuple[str, ...]) -> list[Tensor]:
    """What the function returns, and the gradients of a random sum of it with respect to the leaves."""
    given = leaves_of(inputs, leaves)
    returned = function(**given)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    moving = [out for out in outputs if out.requires_grad]
    upstream = [1 + on_device(*out.shape, seed=50 + i).to(out.dtype) for i, out in enumerate(moving)]
    wanted = [given[name] for name in leaves]
    grads = torch.autograd.grad(moving, wanted, upstream, materialize_grads=True) if leaves else ()
    return [*(out.detach() for out in outputs), *grads]


def double(inputs: Inputs) -> Inputs:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def compare(
    function: Function, inputs: Inputs, leaves: tuple[str, ...] = (), *, near: float = 0.0, sums: bool = False
) -> list[Tensor]:
    """Values and gradients of the kernels in use against the reference in float64; what is allowed comes from the
    reference in the dtype of the inputs.

    Args:
        near: values are differences of numbers so large (`LOGITS` for log-probs), and have their roundings.
        sums: gradients are sums of products, whose elements cancel.

    Returns:
        What the kernels gave.
    """
    got = results(function, inputs, leaves)
    with r1kernels.backend("reference"):
        plain = results(function, inputs, leaves)
        exact = results(function, double(inputs), leaves)
    values = len(got) - len(leaves)
    for i, (found, same_dtype, true) in enumerate(zip(got, plain, exact, strict=True)):
        given = {"near": near} if i < values else {"of_row": sums}
        assert_as_good(found, true, same_dtype, **given)
    return got


def assert_as_good(got: Tensor, exact: Tensor, plain: Tensor, near: float = 0.0, of_row: bool = False) -> None:
    """|got - exact| <= 2 (k + 1) roundings, where plain torch of the same dtype is off by k of them in some element of
    the block. `of_row`: of the row's largest element, else of the element itself, or of `near`."""
    assert got.shape == exact.shape == plain.shape, f"{got.shape}, expected {exact.shape}"
    assert got.dtype == plain.dtype, f"{got.dtype}, expected {plain.dtype}"
    width = got.shape[-1] if got.dim() else 1
    if got.numel() == 0:
        return
    rows = [value.reshape(-1, width) for value in (got, exact, plain)]
    for block in zip(*(value.split(max(1, (1 << 26) // width)) for value in rows), strict=True):
        _block_as_good(*block, dtype=got.dtype, near=near, of_row=of_row)


def _error(value: Tensor, exact: Tensor) -> Tensor:
    same = (value == exact) | (value.isnan() & exact.isnan())
    return torch.where(same, 0, (value - exact).abs())


def _block_as_good(
    got: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype, near: float, of_row: bool
) -> None:
    got, exact, plain = got.double(), exact.double(), plain.double()
    one = testing.rounding(torch.where(exact.isfinite(), exact, 0).abs().clamp(min=near), dtype)
    if of_row:
        one = one.amax(-1, keepdim=True).expand_as(one)
    k = torch.where(exact.isfinite(), _error(plain, exact) / one, 0).amax()
    allowed = 2 * (k + 1) * one + TINY32
    error = _error(got, exact)
    bad = ~(error <= allowed)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} elements are off; the first at {row, column}: {got[row, column]} "
            f"against {exact[row, column]}, error {error[row, column]:.3g}, allowed {allowed[row, column]:.3g}"
        )

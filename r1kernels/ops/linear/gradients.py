"""Turns the sums of a walk into the gradients that backward returns: scaled, converted, without a large copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1kernels import _dispatch, _library
from r1kernels.ops._autograd import graph_is_kept
from r1kernels.ops._checks import values_are_free
from r1kernels.ops.linear.head import Needs
from r1kernels.ops.token_stats import row_blocks

Wanted = tuple[torch.Size, torch.dtype]  # the shape and dtype of a gradient


class Targets(NamedTuple):
    """Where the gradients of (hidden, weight, bias, lora_a, lora_b) go.

    Attributes:
        needs: which of them are wanted. shapes: those of each.
        into: the tensor that the weight's gradient is added to instead.
    """

    needs: Needs
    shapes: tuple[Wanted, Wanted, Wanted | None, Wanted | None, Wanted | None]
    into: Tensor | None

    @staticmethod
    def of(needs: Sequence[bool], tensors: tuple[Tensor | None, ...], into: Tensor | None) -> Targets:
        """From `needs_input_grad` of a function whose first arguments are these five tensors."""
        shapes: Any = tuple(None if value is None else (value.shape, _gradient_dtype(value)) for value in tensors)
        return Targets(Needs(*needs[:5]), shapes, into)

    def finished(self, grads: Sequence[Tensor], factor: Tensor | None) -> list[Tensor | None]:
        """grads * factor in the wanted dtype and shape. Without a factor, this backward has computed `grads`."""
        results: list[Tensor | None] = []
        for name, grad, needed, wanted in zip(Needs._fields, grads, self.needs, self.shapes, strict=True):
            if not needed:
                results.append(None)
            elif name == "weight" and self.into is not None:
                _write(grad, factor, self.into, True)
                results.append(None)
            else:
                shape, dtype = wanted
                results.append(_scaled(grad, factor, dtype).reshape(shape))
        return results


def _gradient_dtype(value: Tensor) -> torch.dtype:
    """A parameter may ask for a wider dtype than its own (`Tensor.grad_dtype`, torch 2.10)."""
    if torch.compiler.is_compiling() or not value.is_leaf:
        return value.dtype
    return getattr(value, "grad_dtype", None) or value.dtype


def _known(factor: Tensor | None) -> float | None:
    """The factor as a finite number, if reading it costs no synchronisation."""
    if factor is None:
        return 1.0
    value = float(factor) if values_are_free(factor) else float("nan")
    return value if abs(value) < float("inf") else None


def _product(grad: Tensor, factor: Tensor | None) -> Tensor:
    """grad * factor, but 0 where grad is 0: a factor of inf or NaN must not give masked tokens a gradient."""
    value = _known(factor)
    if value is not None:
        return grad if value == 1 else grad * value
    return torch.where(grad == 0, grad, grad * factor.to(grad.dtype))


def _blocks(grad: Tensor) -> list[slice]:
    """Blocks of rows, so that temporary values stay in the caches. A compiler works better on the whole tensor."""
    if grad.dim() != 2 or torch.compiler.is_compiling():
        return [slice(None)]
    return list(row_blocks(grad, elements=1 << (18 if grad.device.type == "cpu" else 26)))


def rounded(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient in a dtype: itself, or rounded once."""
    if grad.dtype == dtype:
        return grad
    result = _library.empty(*grad.shape, dtype=dtype, device=grad.device)
    _write(grad, None, result, False)
    return result


def _scaled(grad: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    if factor is None:
        return rounded(grad, dtype)
    in_place = grad.dtype == dtype and not graph_is_kept()
    if in_place and _known(factor) == 1:  # the sum itself becomes the gradient
        return grad
    result = grad if in_place else _library.empty(*grad.shape, dtype=dtype, device=grad.device)
    _write(grad, factor, result, False)
    return result


def _write(grad: Tensor, factor: Tensor | None, out: Tensor, accumulate: bool) -> None:
    """out = or += grad * factor."""
    if _dispatch.choose("scaled", grad, out).implementation == "kernel":
        factor = torch.ones((), dtype=torch.float32, device=grad.device) if factor is None else factor
        torch.ops.r1kernels.scaled.default(grad, factor, out, accumulate)
        return
    for rows in _blocks(grad):
        value = _product(grad[rows], factor)
        if accumulate:
            out[rows] += value
        else:
            out[rows] = value

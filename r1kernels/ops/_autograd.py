"""What the backward passes of all operations share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Once(torch.autograd.Function):
    """The same gradients; a backward through them is an error."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            "r1kernels: a loss is not differentiable twice, so its gradient cannot be part of another loss (a gradient "
            "penalty, for example). Compute that part in plain PyTorch"
        )


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the backward of an autograd function whose result has no derivative.

    With `create_graph=True` the gradients then refuse a backward through them, whatever they are multiplied with.
    PyTorch's own `once_differentiable` lets them pass as constants where the gradient of the loss is one.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return results
        tensors = results if isinstance(results, tuple) else (results,)
        anchor = torch.empty(0, requires_grad=True)
        guarded = _Once.apply(anchor, *tensors)
        return guarded if isinstance(results, tuple) else guarded[0]

    return run

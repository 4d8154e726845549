"""What the backward passes of all operations share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Once(torch.autograd.Function):
    """The gradients after the first `count` tensors; a backward through them is an error."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if grad is None else grad.view_as(grad) for grad in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            "r1kernels: a loss is not differentiable twice, so its gradient cannot be part of another loss (a gradient "
            "penalty, for example). Compute that part in plain PyTorch"
        )


def origin_of(*inputs: Tensor | None) -> Tensor | None:
    """An empty tensor whose graph leads to the inputs, for functions that do not keep their inputs' memory."""
    wanted = [value for value in inputs if value is not None and value.requires_grad]
    if not wanted or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    rows = [value if value.dim() else value.unsqueeze(0) for value in wanted]
    return torch.cat([value.narrow(-1, 0, 0).reshape(0).float() for value in rows])


def graph_is_kept() -> bool:
    """Whether this backward may run again (`retain_graph`), so that it must not change its stored tensors."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None or torch.compiler.is_compiling() else ask()


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the backward of an autograd function whose result has no derivative.

    With `create_graph=True` the gradients then refuse a backward through them, whatever they are multiplied with.
    PyTorch's own `once_differentiable` lets them pass as constants where the gradient of the loss is one. The function
    saves its differentiable inputs, or `origin_of` them: else functional.hessian would find no path to them and give 0.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return results
        tensors = results if isinstance(results, tuple) else (results,)
        origins = [saved for saved in ctx.saved_tensors if saved is not None and saved.requires_grad]
        guarded = _Once.apply(len(origins), *origins, *tensors)
        return guarded if isinstance(results, tuple) else guarded[0]

    return run

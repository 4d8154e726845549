"""Precision: a model that computes in bfloat16, and AdamW on the float32 weights behind it.

An update of RL is smaller than the distance of two neighbouring bfloat16 numbers, and sums of many gradients lose their
small terms. So weights, gradients and the state of AdamW are float32, and the model computes with rounded weights.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def round_parameters(model: Model, dtype: torch.dtype) -> Model:
    """Rounds the parameters in place, but not those that transformers keeps in float32. Buffers stay as they are: those
    of rotary embeddings need float32."""
    kept = "|".join(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for name, parameter in model.named_parameters():
        if not (kept and re.search(rf"(^|\.)({kept})($|\.)", name)):
            parameter.data = parameter.data.to(dtype)
    return model


class AdamW(torch.optim.AdamW):
    """AdamW on the float32 weights of a model that computes in `dtype`.

    The parameters of the model become rounded copies of the weights. As soon as the gradient of a copy is complete, it
    is added in float32 to the gradient of its weight and freed; so a sum over micro-batches is a sum in float32.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, **options: Any) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        exact = [parameter.data.float() for parameter in trained]
        round_parameters(model, dtype)
        weights = [parameter if parameter.dtype == weight.dtype else nn.Parameter(weight)
                   for parameter, weight in zip(trained, exact, strict=True)]
        self.copies = [(copy, weight) for copy, weight in zip(trained, weights, strict=True) if copy is not weight]
        for copy, weight in self.copies:
            copy.register_post_accumulate_grad_hook(_adder(weight))
        super().__init__(weights, **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for copy, weight in self.copies:
            copy.copy_(weight)
        return loss

    @contextlib.contextmanager
    def float32_model(self) -> Iterator[None]:
        """Inside, the parameters of the model are the float32 weights, as a checkpoint needs them."""
        rounded = [copy.data for copy, _ in self.copies]
        for copy, weight in self.copies:
            copy.data = weight.data
        try:
            yield
        finally:
            for (copy, _), data in zip(self.copies, rounded, strict=True):
                copy.data = data


def _adder(weight: nn.Parameter) -> Callable[[Tensor], None]:
    """A hook of a rounded copy that moves its gradient to the weight."""

    def add(copy: Tensor) -> None:
        weight.grad = copy.grad.float() if weight.grad is None else weight.grad.add_(copy.grad)
        copy.grad = None

    return add

"""Checks of single keywords of `LinearOptions`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from r1kernels.ops._checks import (
    HIGHEST_TEMPERATURE,
    LOWEST_TEMPERATURE,
    accumulator_dtype,
    check_dtype,
    check_floating,
    check_shape,
    check_temperature,
    check_tensor,
    values_are_free,
)
from r1kernels.ops.linear.head import Names


def lora_matrices(lora: Any, hidden: Tensor, weight: Tensor, names: Names) -> tuple[Tensor | None, Tensor | None]:
    if lora is None:
        return None, None
    if not isinstance(lora, (tuple, list)) or len(lora) != 2:
        raise TypeError(f"{names.options}lora is a {type(lora).__name__}, expected a pair (A (H, R), B (R, V))")
    a, b = lora
    for name, matrix in ((f"{names.options}lora A", a), (f"{names.options}lora B", b)):
        check_floating(name, matrix, hidden)
        check_dtype(name, matrix, {hidden.dtype: f" like {names.hidden}"})
    vocab, width = weight.shape
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != width or b.shape[1] != vocab or a.shape[1] != b.shape[0]:
        raise ValueError(
            f"{names.options}lora has shapes {tuple(a.shape)} and {tuple(b.shape)}, expected (H, R) and (R, V) with "
            f"H = {width} and V = {vocab}"
        )
    return a, b


def token_temperature(value: Any, ids: Tensor, mask: Tensor | None) -> tuple[float, Tensor | None]:
    if not isinstance(value, Tensor):
        return check_temperature(value), None
    check_floating("temperature", value, ids)
    check_shape("temperature", value, ids.shape, "one per token")
    value = value.detach().reshape(-1).float()
    if mask is not None:
        value = torch.where(mask.reshape(-1), value, 1)
    if values_are_free(value):
        bad = ~((value > LOWEST_TEMPERATURE) & (value < HIGHEST_TEMPERATURE))
        if bad.any():
            at = int(bad.nonzero()[0])
            raise ValueError(f"temperature[{at}] is {float(value[at])}, expected a number from 1e-30 to 1e30")
    return 1.0, value.contiguous()


def dtype_of_logits(value: Any, hidden: Tensor, weight: Tensor) -> torch.dtype:
    full = accumulator_dtype(hidden.dtype)
    if value is None or value == full:
        return full
    if value != hidden.dtype or value != weight.dtype:
        rounded = hidden.dtype != full and weight.dtype == hidden.dtype
        choices = f"{full}, or {hidden.dtype} like hidden" if rounded else f"{full}"
        raise ValueError(f"logits_dtype is {value}, expected {choices}")
    return value


def checked_capacity(value: Any) -> int:
    if value is None:
        return -1
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"capacity is {value!r}, expected a positive integer")
    return value


def accumulation_target(into: Any, weight: Tensor) -> Tensor | None:
    if into is None:
        return None
    check_tensor("grad_accumulation_into", into, weight)
    check_shape("grad_accumulation_into", into, tuple(weight.shape), "the shape of weight")
    check_dtype("grad_accumulation_into", into, dict.fromkeys((accumulator_dtype(weight.dtype), weight.dtype), ""))
    if not weight.requires_grad:
        raise ValueError("grad_accumulation_into was given, but weight does not require grad")
    if not weight.is_leaf:
        raise ValueError("grad_accumulation_into was given, but weight is not a leaf tensor")
    if any(size > 1 and stride == 0 for size, stride in zip(into.shape, into.stride(), strict=True)):
        raise ValueError(f"grad_accumulation_into has strides {into.stride()}: it must not be an expanded tensor")
    real = not torch.compiler.is_compiling() and not isinstance(into, FakeTensor)
    if real and into.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr():
        raise ValueError("grad_accumulation_into must not share memory with weight")
    return into

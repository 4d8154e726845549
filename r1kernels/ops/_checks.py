"""Argument checks shared by the operations. Messages name the argument, the value and the expectation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT_DTYPES = (torch.int64, torch.int32)
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-30, 1e30


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic uses: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(name: str, value: Any, like: Tensor | None = None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a torch.Tensor")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, expected {like.device} like the other arguments")


def check_floating(name: str, value: Any, like: Tensor | None = None) -> None:
    check_tensor(name, value, like)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} has dtype {value.dtype}, expected float32, bfloat16, float16 or float64")


def check_dtype(name: str, value: Tensor, allowed: dict[torch.dtype, str], remedy: str = "") -> None:
    """`allowed`: each dtype, and what is said after it (" like hidden")."""
    if value.dtype not in allowed:
        expected = " or ".join(f"{dtype}{why}" for dtype, why in allowed.items())
        raise TypeError(f"{name} has dtype {value.dtype}, expected {expected}{remedy}")


def check_shape(name: str, value: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(shape)}: {meaning}")


def check_number(name: str, value: Any, *, minimum: float = -math.inf, strict: bool = False) -> float:
    """A finite Python number, at least (or above, when `strict`) `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}, expected a Python number")
    # Only comparisons: torch.compile traces them for a number that changes between calls, but not math.isfinite.
    if not (-math.inf < value < math.inf and (value > minimum if strict else value >= minimum)):
        raise ValueError(f"{name} is {value!r}, expected a finite number {'>' if strict else '>='} {minimum:g}")
    return float(value)


def check_temperature(value: Any, name: str = "temperature") -> float:
    """A number by which logits in float32 may be divided."""
    number = check_number(name, value, minimum=0.0, strict=True)
    if not LOWEST_TEMPERATURE < number < HIGHEST_TEMPERATURE:
        raise ValueError(f"{name} is {value!r}, expected a number from 1e-30 to 1e30 (logits are fp32)")
    return number


def check_normalizer(value: Any, like: Tensor) -> Tensor | float | None:
    """None, a number > 0, or a constant 0-d tensor on the device of `like`, whose value `check_positive` checks."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return check_number("normalizer", value, minimum=0.0, strict=True)
    check_tensor("normalizer", value, like)
    check_shape("normalizer", value, (), "a 0-d tensor")
    return value.detach()


def check_positive(name: str, value: Tensor | float | None) -> None:
    """The value of a 0-d tensor, if reading it costs no synchronisation. Kernels check their arguments themselves."""
    if isinstance(value, Tensor) and values_are_free(value) and not 0 < float(value) < math.inf:
        raise ValueError(f"{name} is {float(value)}, expected a positive finite number")


def ids_int64(name: str, value: Any, like: Tensor) -> Tensor:
    """An int32 or int64 index tensor as contiguous int64."""
    check_tensor(name, value, like)
    if value.dtype not in INT_DTYPES:
        raise TypeError(f"{name} has dtype {value.dtype}, expected int64 or int32")
    return value.to(torch.int64).contiguous()


def as_mask(mask: Any, like: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """A mask (True or nonzero = counts) as contiguous bool, or None."""
    if mask is None:
        return None
    check_tensor("mask", mask, like)
    check_shape("mask", mask, shape, "one entry per token")
    return (mask if mask.dtype == torch.bool else mask != 0).contiguous()


def values_are_free(value: Tensor) -> bool:
    """Whether Python may read the values: on the CPU this costs no synchronisation; a traced tensor has no values."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(value, FakeTensor)


def check_ids_in_range(name: str, ids: Tensor, vocab: int, mask: Tensor | None) -> None:
    """For the reference; kernels check the ids themselves."""
    if not values_are_free(ids):
        return
    bad = (ids < 0) | (ids >= vocab)
    if mask is not None:
        bad &= mask
    if bad.any():
        position = int(bad.flatten().nonzero()[0])
        raise ValueError(
            f"{name}[{position}] is {int(ids.flatten()[position])}, expected an id in [0, {vocab}) "
            "(position counted over all dimensions); mask tokens that do not count, such as -100"
        )

"""Adapters for other trainers, one module each, some with a helper.

They use the public API alone, and import no trainer until called.
"""

import importlib
import math
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor


def check_version(package: str, supported: str, any_version: bool = False) -> None:
    """Raises ImportError unless the installed version of a package begins with `supported`, such as "1.16".

    `any_version` accepts every installed version: what the adapter hooks may have another meaning there.
    """
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(f"{package} is not installed; this adapter is for {package} {supported}") from None
    if not any_version and not f"{found}.".startswith(f"{supported}."):
        raise ImportError(
            f"{package} is {found}, and this adapter is for {supported}; install {package}=={supported}.*, or "
            "pass any_version=True"
        )


def hook(module: str, name: str, way_on: str) -> Any:
    """`module.name` of another package. ImportError: it does not exist; `way_on` tells the user what to do then."""
    try:
        value: Any = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
    except (AttributeError, ModuleNotFoundError) as error:
        raise ImportError(f"{module} has no {name} ({error}); {way_on}") from error
    return value


def require_keys(mapping: str, given: Mapping[str, Any], names: tuple[str, ...], way_on: str) -> None:
    """ValueError: a mapping lacks one of the names, or has None there; `way_on` tells the user what to do then."""
    for name in names:
        if name not in given or given[name] is None:
            raise ValueError(f"{mapping} has no {name}, {way_on}")


def require_tensor(name: str, value: Any, shape: tuple[int, ...], boolean: bool = False) -> None:
    """TypeError: not a tensor, or, with `boolean`, not of bool. ValueError: another shape."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {value!r}, expected a tensor of shape {shape}")
    if boolean and "bool" not in str(value.dtype):
        raise TypeError(f"{name} is {value.dtype}, expected torch.bool; use {name} != 0")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape}")


def require_number(name: str, value: Any, minimum: float = 0.0) -> None:
    """ValueError: not a finite number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not minimum <= value < math.inf:
        raise ValueError(f"{name} is {value!r}, expected a finite number >= {minimum:g}")

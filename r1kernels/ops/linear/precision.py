"""How libraries compute products, whatever the process has asked PyTorch for.

PyTorch has one setting for all threads. So a setting is changed when the first thread needs it, and restored when the
last one is done.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_LOCK = threading.Lock()


class _Setting:
    """change() sets what is needed, and returns a function that restores what was there before."""

    def __init__(self, change: Callable[[], Callable[[], None]]) -> None:
        self.change: Callable[[], Callable[[], None]] = change
        self.restore: Callable[[], None] = lambda: None
        self.users: int = 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with _LOCK:
            if self.users == 0:
                self.restore = self.change()
            self.users += 1
        try:
            yield
        finally:
            with _LOCK:
                self.users -= 1
                if self.users == 0:
                    self.restore()


def _ask_for_ieee() -> Callable[[], None]:
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"

    def restore() -> None:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = "none"  # the one that PyTorch's general setting implies
            if setting.fp32_precision != precision:
                setting.fp32_precision = precision

    return restore


def _ask_for_float32_sums() -> Callable[[], None]:
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    before = [(getattr(matmul, name), getattr(matmul, f"{name}_split_k", None)) for name in names]
    accumulation = matmul.allow_fp16_accumulation
    matmul.allow_fp16_accumulation = False
    for name in names:
        setattr(matmul, name, False)

    def restore() -> None:
        matmul.allow_fp16_accumulation = accumulation
        for name, (allowed, split_k) in zip(names, before, strict=True):
            setattr(matmul, name, allowed if split_k is None else (allowed, split_k))

    return restore


def no_autocast(hidden: Tensor) -> contextlib.AbstractContextManager[None]:
    """Turns autocast off, because it would round float32 operands. Each call here chooses its precision."""
    return torch.autocast(hidden.device.type, enabled=False)


def without_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function of (head, hidden, ...)."""

    @functools.wraps(run)
    def exact(head: Any, hidden: Tensor, *args: Any, **keywords: Any) -> Any:
        with no_autocast(hidden):
            return run(head, hidden, *args, **keywords)

    return exact


# No product in here rounds float32 operands (to TF32 or bfloat16).
exact_float32: _Setting = _Setting(_ask_for_ieee)
# Libraries add up 16-bit products in float32, parts of a sum too.
float32_sums: _Setting = _Setting(_ask_for_float32_sums)

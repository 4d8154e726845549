"""What repeated calls keep: memory that malloc has given out, Python's small objects, tensors, mappings."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STATM = Path("/proc/self/statm")
# Of a call; an object that each call keeps counts 1. `mapped` is of a window: Python maps its small objects by the MiB,
# and what is kept of them is counted one by one.
LIMITS = {"bytes": 60.0, "blocks": 0.5, "objects": 0.2, "tensors": 0.2, "mapped": 4 << 20}


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


def _mallinfo() -> Callable[[], _Mallinfo] | None:
    """glibc's count of the bytes that malloc has given out; None where there is none."""
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is not None:
        function.restype = _Mallinfo
    return function


mallinfo = _mallinfo()
AVAILABLE = mallinfo is not None and STATM.exists()


@contextmanager
def _older_objects_ignored() -> Iterator[None]:
    """So that the collector looks at new objects only, which takes microseconds."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _measure() -> dict[str, int]:
    gc.collect()
    found = gc.get_objects()
    kept = mallinfo()
    return {
        "tensors": sum(isinstance(each, torch.Tensor) for each in found), "objects": len(found),
        "blocks": sys.getallocatedblocks(), "bytes": kept.uordblks + kept.hblkhd,
        "mapped": int(STATM.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE"),
    }


def kept(call: Callable[[int], object], count: int, windows: int = 20) -> dict[str, float]:
    """What a call keeps that is above a limit, and `mapped` bytes of `count` calls. Empty is good.

    Windows of `count` calls are measured until one is below all limits: what fills once is full after some of them,
    and a leak is in every one.
    """
    with _older_objects_ignored():
        before = _measure()
        for window in range(windows):
            for number in range(window * count, (window + 1) * count):
                call(number)
            after = _measure()
            each = {name: (after[name] - before[name]) / (1 if name == "mapped" else count) for name in LIMITS}
            above = {name: value for name, value in each.items() if value > LIMITS[name]}
            if not above:
                break
            before = after
    return above

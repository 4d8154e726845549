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
MAPPED_LIMIT = 4 << 20  # Python maps its small objects by the MiB; what is kept of them is counted one by one
# Each kept object of a call adds at least one to each call's numbers, so a tenth is far from both answers.
LIMITS = {"bytes": 30.0, "blocks": 0.1, "objects": 0.1, "tensors": 0.1}


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


def kept(call: Callable[[int], object], count: int, warm_up: int = 10) -> dict[str, float]:
    """What `count` calls keep that is above a limit: `mapped` bytes in all, the others for each call. Empty is good."""
    for number in range(warm_up):
        call(number)
    with _older_objects_ignored():
        _measure()
        before = _measure()
        for number in range(warm_up, warm_up + count):
            call(number)
        after = _measure()
    grown = {name: (after[name] - before[name]) / count for name in LIMITS}
    mapped = {"mapped": float(after["mapped"] - before["mapped"])}
    return {name: value for name, value in (grown | mapped).items() if value > LIMITS.get(name, MAPPED_LIMIT)}

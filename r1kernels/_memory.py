"""Memory for large tensors on the CPU, kept between calls.

The system clears every page of fresh memory when it is first written, and takes it back when the tensor is freed. For
the logits of a chunk and the gradient of a head this costs about as much time as the arithmetic. So memory that is no
longer used is kept for the next call, up to `KEPT_BYTES`; `release_workspace` gives it back to the system.
"""

from __future__ import annotations

import collections
import contextlib
import mmap
import os
import threading
import weakref
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SMALLEST = 1 << 20  # below, the allocator of the C library keeps memory itself
HUGE_PAGE = 2 << 20
AVAILABLE = hasattr(mmap, "MAP_PRIVATE") and hasattr(mmap, "MAP_ANONYMOUS")


def _kept_bytes() -> int:
    """4 GiB, or an eighth of the memory of the machine (or of its container) if that is less."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 30
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(4 << 30, memory // 8)


KEPT_BYTES = _kept_bytes()
_lock = threading.Lock()
_kept: collections.deque[mmap.mmap] = collections.deque()  # free memory, the most recently used last


def _after_fork() -> None:
    """In a child, a lock that another thread of the parent held would never be released."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU, in kept memory if some has about the right size. The tensor owns its storage: when the
    last reference to it is gone, the memory is kept for another call."""
    size = dtype.itemsize * torch.Size(shape).numel()
    if size < SMALLEST or not AVAILABLE:
        return torch.empty(shape, dtype=dtype)
    memory = _take(size)
    address = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    array = np.frombuffer(memory, dtype=np.uint8, count=size, offset=-address % HUGE_PAGE)
    # torch holds the array until the storage is freed. The array holds the memory, and so does the finalizer.
    weakref.finalize(array, _keep, memory).atexit = False
    return torch.empty(0, dtype=dtype).set_(torch.from_numpy(array).untyped_storage(), 0, shape)


def _take(size: int) -> mmap.mmap:
    """Kept memory of at least `size` bytes and at most a third (or 2 MiB) more, or fresh memory."""
    needed = size + HUGE_PAGE  # for the start to be at a multiple
    with _lock:
        most = needed + max(size // 3, HUGE_PAGE)
        fitting = [memory for memory in reversed(list(_kept)) if needed <= len(memory) <= most]
        if fitting:
            best = min(fitting, key=len)
            _kept.remove(best)
            return best
    memory = mmap.mmap(-1, -(-needed // HUGE_PAGE) * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _keep(memory: mmap.mmap) -> None:
    """Called when a storage is freed, possibly while this thread holds the lock."""
    if len(memory) > KEPT_BYTES:
        return
    _kept.append(memory)
    if _lock.acquire(blocking=False):
        try:
            while sum(map(len, list(_kept))) > KEPT_BYTES:
                _kept.popleft()
        finally:
            _lock.release()


def release() -> None:
    """Gives all kept memory back to the system."""
    with _lock:
        _kept.clear()

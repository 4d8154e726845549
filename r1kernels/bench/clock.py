"""Time of a call, and the memory that it takes beyond what the process already holds."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

import r1kernels

Run = Callable[[], object]
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
FLUSHED_BYTES = 1 << 30  # about 250 microseconds of an H200


class Clock(Protocol):
    no_memory: str  # why peak memory is not measured, or ""
    shortest: float  # seconds of one measurement: shorter calls are repeated
    host_s: float | None  # until the host had queued the calls of the last measurement
    hides_s: float | None  # host time up to this is not in the numbers

    def seconds(self, run: Run, calls: int) -> float: ...

    def peak_extra_bytes(self, run: Run) -> int | None: ...


def _status(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())
    if match is None:
        raise OSError(f"{STATUS} has no {field}")
    return int(match.group(1)) * 1024


class HostClock:
    """Wall-clock time; memory is the high-water mark of the process, which Linux can reset."""

    shortest: float = 1e-3
    host_s: float | None = None
    hides_s: float | None = None

    def __init__(self) -> None:
        self.no_memory: str = ""
        try:
            self._reset()
            _status("VmHWM")
        except OSError as error:
            self.no_memory = f"peak memory needs /proc/self/clear_refs and VmHWM of Linux: {error}"

    def _reset(self) -> None:
        CLEAR.write_text("5")

    def seconds(self, run: Run, calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - started) / calls

    def peak_extra_bytes(self, run: Run) -> int | None:
        if self.no_memory:
            run()
            return None
        gc.collect()
        r1kernels.release_workspace()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed earlier would be used again unseen
        self._reset()
        before = _status("VmRSS")
        run()
        return max(_status("VmHWM") - before, 0)


class DeviceClock:
    """CUDA events around calls that find nothing in the L2 cache.

    The flush reads memory: what it leaves in the cache need not be written back, which would take part of the
    bandwidth. It also keeps the device busy while the host queues the calls, so that the host's time is in no number
    unless it is longer than the flush (`hides_s`).
    """

    no_memory: str = ""
    shortest: float = 0.0  # a second call would find its inputs in the cache

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush: torch.Tensor = torch.zeros(FLUSHED_BYTES // 4, dtype=torch.float32, device=device)
        self.events: list[torch.cuda.Event] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.host_s: float | None = None
        self.hides_s: float | None = min(self._flush_seconds() for _ in range(5))

    def _flush_seconds(self) -> float:
        start, end = self.events
        start.record()
        self.flush.sum()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def seconds(self, run: Run, calls: int) -> float:
        start, end = self.events
        self.flush.sum()
        start.record()
        before = time.perf_counter()
        for _ in range(calls):
            run()
        self.host_s = time.perf_counter() - before
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def peak_extra_bytes(self, run: Run) -> int:
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = run()
        torch.cuda.synchronize(self.device)
        del result
        return torch.cuda.max_memory_allocated(self.device) - before


def clock_of(device: torch.device) -> Clock:
    return DeviceClock(device) if device.type == "cuda" else HostClock()

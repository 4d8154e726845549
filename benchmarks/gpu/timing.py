"""Time of candidates in turns, and the memory they take beyond what was there before."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

FLUSHED_BYTES = 1 << 30  # about 250 microseconds of an H200
GRAPH_CALLS = 10  # in one graph: its launch, some microseconds, is shared by so many
MIN_ROUNDS, MAX_ROUNDS, SLOW_ROUNDS = 5, 50, 3
SLOW = 8.0  # times the fastest: such a candidate takes part in few rounds


class Timed(NamedTuple):
    """`prepare` runs untimed before each timed `run`: for what a run destroys."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    calls: int = 1  # of what is measured, in one run


class Measured(NamedTuple):
    """Of one call. `spread_us`: between the quartiles. `host_us`: until the host had queued it, with all of its calls
    where a graph replays several."""

    median_us: float
    spread_us: float
    rounds: int
    peak_extra_bytes: int | None
    host_us: float | None = None


class Clock(Protocol):
    host_us: float | None  # of the last run
    hides_us: float | None  # host time up to this is not in the numbers

    def microseconds(self, run: Callable[[], object]) -> float: ...

    def peak_extra_bytes(self, run: Callable[[], object]) -> int | None: ...

    def graph(self, run: Callable[[], object]) -> Timed: ...


class DeviceClock:
    """CUDA events around a run that finds nothing in the cache.

    The flush also keeps the device busy while the host queues the run, so that the host's time is in no number unless
    it is longer than the flush (`hides_us`). It reads: what it leaves in the cache need not be written back, which
    would take part of the run's bandwidth.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = torch.zeros(FLUSHED_BYTES // 4, dtype=torch.float32, device=device)
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.host_us: float | None = None
        self.hides_us: float | None = None
        self.hides_us = min(self._flush_us() for _ in range(5))

    def _flush_us(self) -> float:
        start, end = self.events
        start.record()
        self.flush.sum()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def microseconds(self, run: Callable[[], object]) -> float:
        start, end = self.events
        self.flush.sum()
        start.record()
        before = time.perf_counter()
        run()
        self.host_us = (time.perf_counter() - before) * 1e6
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def peak_extra_bytes(self, run: Callable[[], object]) -> int:
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = run()
        torch.cuda.synchronize(self.device)
        del result
        return torch.cuda.max_memory_allocated(self.device) - before

    def graph(self, run: Callable[[], object]) -> Timed:
        """Replays of `GRAPH_CALLS` calls, all but the first of which may find their inputs in the cache."""
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            for _ in range(3):
                run()
        torch.cuda.current_stream(self.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [run() for _ in range(GRAPH_CALLS)]

        def replay() -> Any:
            graph.replay()
            return kept

        return Timed(replay, calls=GRAPH_CALLS)


class HostClock:
    """For rehearsals on the CPU."""

    host_us: float | None = None
    hides_us: float | None = None

    def microseconds(self, run: Callable[[], object]) -> float:
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1e6

    def peak_extra_bytes(self, run: Callable[[], object]) -> None:
        run()

    def graph(self, run: Callable[[], object]) -> Timed:
        return Timed(lambda: [run() for _ in range(GRAPH_CALLS)], calls=GRAPH_CALLS)


def clock_of(device: torch.device) -> Clock:
    return HostClock() if device.type == "cpu" else DeviceClock(device)


def _once(candidate: Timed, clock: Clock) -> float:
    candidate.prepare()
    return clock.microseconds(candidate.run)


def in_turns(candidates: dict[str, Timed], clock: Clock, seconds: float) -> dict[str, Measured]:
    """Times the candidates round by round for about `seconds`: what drifts, drifts for all of them."""
    memory, estimate = {}, {}
    for name, candidate in candidates.items():
        for _ in range(2):
            _once(candidate, clock)
        candidate.prepare()
        memory[name] = clock.peak_extra_bytes(candidate.run)
        estimate[name] = _once(candidate, clock)
    fastest = min(estimate.values(), default=1.0)
    slow = {name for name, each in estimate.items() if each > SLOW * fastest}
    budget = seconds * 1e6 - SLOW_ROUNDS * sum(estimate[name] for name in slow)
    each_round = sum(each for name, each in estimate.items() if name not in slow)
    rounds = int(min(max(budget / max(each_round, 1e-3), MIN_ROUNDS), MAX_ROUNDS))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    host: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds):
        for name, candidate in candidates.items():
            if name not in slow or number < SLOW_ROUNDS:
                times[name].append(_once(candidate, clock) / candidate.calls)
                host[name] += [] if clock.host_us is None else [clock.host_us]
    results = {}
    for name, taken in times.items():
        low, median, high = statistics.quantiles(taken, n=4, method="inclusive")
        queued = statistics.median(host[name]) if host[name] else None
        results[name] = Measured(median, high - low, len(taken), memory[name], queued)
    return results

"""Time of candidates in turns, and the memory they take beyond what was there before."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

GRAPH_CALLS = 10  # in one graph: its launch, some microseconds, is shared by so many
MIN_ROUNDS, MAX_ROUNDS, SLOW_ROUNDS = 5, 50, 3
SLOW = 8.0  # times the fastest: such a candidate takes part in few rounds


class Timed(NamedTuple):
    """`prepare` runs untimed before each timed `run`: for what a run destroys."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    calls: int = 1  # of what is measured, in one run


class Measured(NamedTuple):
    """Of one call. `spread_us`: between the quartiles."""

    median_us: float
    spread_us: float
    rounds: int
    peak_extra_bytes: int | None


class Clock(Protocol):
    def microseconds(self, run: Callable[[], object]) -> float: ...

    def peak_extra_bytes(self, run: Callable[[], object]) -> int | None: ...

    def graph(self, run: Callable[[], object]) -> Timed: ...


class DeviceClock:
    """CUDA events around a run that finds nothing in the cache.

    The flush also keeps the device busy while the host queues the run: only where the host takes longer than that does
    its own time show.
    """

    def __init__(self, device: torch.device) -> None:
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self.device = device
        self.flush = torch.empty(max(4 * cache, 1 << 28), dtype=torch.int8, device=device)
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def microseconds(self, run: Callable[[], object]) -> float:
        start, end = self.events
        self.flush.zero_()
        start.record()
        run()
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
    for number in range(rounds):
        for name, candidate in candidates.items():
            if name not in slow or number < SLOW_ROUNDS:
                times[name].append(_once(candidate, clock) / candidate.calls)
    results = {}
    for name, taken in times.items():
        low, median, high = statistics.quantiles(taken, n=4, method="inclusive")
        results[name] = Measured(median, high - low, len(taken), memory[name])
    return results

"""Time and memory of candidates in turns, by the clocks of `r1kernels.bench`, and replays of CUDA graphs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from r1kernels.bench import clock as clocks
from r1kernels.bench.turns import in_turns as take_turns
from r1kernels.bench.turns import rounds_of

GRAPH_CALLS = 10  # in one graph: its launch, some microseconds, is shared by so many
LEAST_ROUNDS = 5  # of candidates that are not slow


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


class Clock(clocks.Clock, Protocol):
    def graph(self, run: Callable[[], object]) -> Timed: ...


class DeviceClock(clocks.DeviceClock):
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


class HostClock(clocks.HostClock):
    """For rehearsals on the CPU."""

    def graph(self, run: Callable[[], object]) -> Timed:
        return Timed(lambda: [run() for _ in range(GRAPH_CALLS)], calls=GRAPH_CALLS)


def clock_of(device: torch.device) -> Clock:
    return HostClock() if device.type == "cpu" else DeviceClock(device)


def in_turns(candidates: dict[str, Timed], clock: Clock, seconds: float) -> dict[str, Measured]:
    """Times the candidates round by round. Those that are not slow take about `seconds`."""
    host: dict[str, list[float]] = {name: [] for name in candidates}

    def turn(name: str) -> float:
        candidate = candidates[name]
        candidate.prepare()
        taken = clock.seconds(candidate.run, 1)
        if clock.host_s is not None:
            host[name].append(clock.host_s)
        return taken

    memory, estimates = {}, {}
    for name, candidate in candidates.items():
        for _ in range(2):
            turn(name)
        candidate.prepare()
        memory[name] = clock.peak_extra_bytes(candidate.run)
        estimates[name] = turn(name)
        host[name].clear()
    turns = {name: partial(turn, name) for name in candidates}
    results = {}
    for name, taken in take_turns(turns, rounds_of(estimates, seconds, LEAST_ROUNDS)).items():
        micro = [each / candidates[name].calls * 1e6 for each in taken]
        low, median, high = statistics.quantiles(micro, n=4, method="inclusive")
        queued = statistics.median(host[name]) * 1e6 if host[name] else None
        results[name] = Measured(median, high - low, len(taken), memory[name], queued)
    return results

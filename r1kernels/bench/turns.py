"""Candidates are timed in turns, round by round: what else a machine does changes by the minute, and then it changes
for all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial

from r1kernels.bench.clock import Clock, Run

MOST, LEAST = 50, 3
SLOW = 6.0  # times the fastest: such a candidate takes part in the least rounds only
LONG = 20.0, 2  # seconds of one turn, and the rounds that such a candidate takes part in


def rounds_of(
    costs: Mapping[str, float], seconds: float, least: int = LEAST, slow_from: float = 0.0
) -> dict[str, int]:
    """In how many rounds each candidate takes part.

    Args:
        costs: seconds of one turn of each candidate.
        seconds: about how long all rounds of the candidates that are not slow take.
        least: the rounds of these candidates at least.
        slow_from: no candidate with a shorter turn is slow.
    """
    fastest = min(costs.values(), default=0.0)
    slow = {name for name, cost in costs.items() if cost > max(SLOW * fastest, slow_from)}
    one_round = sum(cost for name, cost in costs.items() if name not in slow)
    rounds = int(min(max(seconds / max(one_round, 1e-9), least), MOST))
    return {name: LONG[1] if cost > LONG[0] else LEAST if name in slow else rounds for name, cost in costs.items()}


def in_turns(
    turns: Mapping[str, Callable[[], float]], rounds: Mapping[str, int], deadline: float = math.inf
) -> dict[str, list[float]]:
    """What the turns of each candidate returned. After the `deadline` of time.monotonic, `LEAST` rounds are enough."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(max(rounds.values(), default=0)):
        if number >= LEAST and time.monotonic() > deadline:
            break
        for name, turn in turns.items():
            if number < rounds[name]:
                found[name].append(turn())
    return found


def times(
    runs: Mapping[str, Run], rounds: Mapping[str, int], clock: Clock, calls: Mapping[str, int] | None = None,
    deadline: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of one of the `calls` of each run (1) in each round. Before each measurement there is one run without: a
    system may have taken back memory that others gave up, and whoever comes next would pay for it."""

    def turn(name: str, run: Run) -> float:
        run()
        return clock.seconds(run, 1 if calls is None else calls[name])

    return in_turns({name: partial(turn, name, run) for name, run in runs.items()}, rounds, deadline)

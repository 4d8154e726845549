"""Checks and times the candidates of a task: no number without an equality check, and times of one round together.

What else a machine does changes by the minute, so all candidates run in turns, and `ratio` is the median over rounds of
a candidate's time over that of this library in the same round.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from r1kernels.bench import machine, peers
from r1kernels.bench.check import Held, Truth, Wrong
from r1kernels.bench.clock import Clock
from r1kernels.bench.peers import Peer
from r1kernels.bench.results import Results
from r1kernels.bench.tasks import OURS, Function, Setting, Task, name_of
from r1kernels.bench.tasks import results as results_of
from r1kernels.bench.turns import LEAST, rounds_of, times

ALL = "all implementations"
SHORT = 0.5  # seconds: one more run, to know the time better, costs nothing
SLOW_FROM = 0.1  # seconds of a turn: many rounds of a shorter one cost little, and its time varies
MARGIN = 1.25  # estimates from shapes leave out small buffers and what an allocator keeps
RESERVE = 512 << 20, 0.05  # bytes, and share of all memory, that are left alone


class Engine:
    """Runs tasks. `trouble` says whether this library itself failed in one."""

    def __init__(
        self, setting: Setting, clock: Clock, results: Results, deadline: float | None = None
    ) -> None:
        self.setting: Setting = setting
        self.clock: Clock = clock
        self.results: Results = results
        # Of time.monotonic: after it, few rounds are enough.
        self.deadline: float = math.inf if deadline is None else deadline
        self.seconds: float = setting.pick(0.1, 1.0, 5.0)
        self.least_rounds: int = setting.pick(LEAST, LEAST, 5)
        self.trouble: bool = False
        self.unusable: set[str] = set()  # implementations that cannot work in any case

    def measure(self, task: Task) -> list[dict[str, Any]]:
        """The rows of a task; empty if it was left out."""
        truth = self._truth(task)
        if truth is None:
            return []
        problem = truth.problem
        functions = {name: function for name, function in task.functions.items() if self._fits(name, task)}
        if OURS not in functions:
            return []
        waiting = [*functions.items()]
        others = {peer.implementation: peer for peer in task.all_peers()}
        for peer in others.values():
            waiting += self._loaded(peer, task)
        errors: dict[str, Held] = {}
        runs: dict[str, Callable[[], object]] = {}
        memory: dict[str, int | None] = {}
        estimates: dict[str, float] = {}
        while waiting:
            name, function = waiting.pop(0)

            def run(function: Function = function) -> object:
                return results_of(function, problem, task.passes)

            try:
                errors[name] = truth.check(name, function)
                started = time.perf_counter()
                memory[name] = self.clock.peak_extra_bytes(run)
                estimates[name] = time.perf_counter() - started
                if estimates[name] < SHORT:  # it is not the time of the run alone
                    estimates[name] = self.clock.seconds(run, 1)
                runs[name] = task.around(run)
            except Exception as error:
                self._failed(name, task, error)
                if name == OURS:
                    return []
                if name in others and others[name].otherwise and not isinstance(error, Wrong):
                    waiting += self._loaded(others[name].otherwise, task)
        del truth
        try:
            for name, make in task.ceilings.items():
                memory[name], errors[name], runs[name] = None, Held(0.0, 0.0), make(problem)
                self.clock.seconds(runs[name], 1)
                estimates[name] = self.clock.seconds(runs[name], 1)
            seconds = self._in_turns(runs, estimates)
        except Exception as error:  # such as memory that another process has taken since the checks
            self._failed(ALL, task, error)
            return []
        return [self._row(task, name, taken, seconds[OURS], memory[name], errors[name])
                for name, taken in seconds.items()]

    # ---- what can run ---------------------------------------------------------------------------------------

    def room(self) -> int | None:
        """Bytes that a candidate may take; None where the system does not tell."""
        available = machine.available_bytes(self.setting.device)
        if available is None:
            return None
        return available - max(RESERVE[0], int(machine.memory_bytes(self.setting.device) * RESERVE[1]))

    def enough_memory(self, what: str, needed: int, where: str) -> bool:
        room, needed = self.room(), round(needed * MARGIN)
        if room is None or needed <= room:
            return True
        self.results.leave_out(what, f"needs about {gib(needed)} of memory, and {gib(max(room, 0))} may be used", where)
        return False

    def _truth(self, task: Task) -> Truth | None:
        """The inputs and the exact results; None if their memory is not there."""
        ours = 3 * task.input_bytes + task.bytes.get(OURS, 0)
        double = self.enough_memory("a reference in float64, instead of float32",
                                    max(reference_bytes(task, torch.float64), ours), task.title)
        dtype = torch.float64 if double else torch.float32
        if not self.enough_memory(ALL, max(reference_bytes(task, dtype), ours), task.title):
            return None
        try:
            return Truth(task, task.make(), dtype)
        except Exception as error:
            self._failed(ALL, task, error)
            return None

    def _fits(self, name: str, task: Task) -> bool:
        known = name if name in task.bytes else name.partition(", ")[0]  # such as "Liger, not compiled"
        return self.enough_memory(name, task.bytes.get(known, task.bytes.get(peers.EAGER, 0)), task.title)

    def _loaded(self, peer: Peer, task: Task) -> list[tuple[str, Function]]:
        """The name and the function of a peer, or of what is measured in its place; nothing if neither can run."""
        name = peer.implementation
        idle = peer.compiles and not self.setting.compiled and not (task.compiled and task.series)
        if idle:
            self.results.leave_out(name, "--size small compiles at one shape of the vocabulary series only",
                                   task.case)
        if idle or (peer.compiles and name in self.unusable):
            return self._loaded(peer.otherwise, task) if peer.otherwise else []
        try:
            function = self.load(peer)
        except peers.Missing as error:
            self.results.leave_out(name, str(error), "" if error.everywhere else task.case)
            return []
        return [(name, function)] if self._fits(name, task) else []

    def load(self, peer: Peer) -> Function:
        """The function of a peer, whose version is noted. Raises peers.Missing."""
        function = peers.load(peer, self.setting.device)
        self.results.imported(peer.implementation)
        return function

    def _failed(self, name: str, task: Task, error: Exception) -> None:
        why = peers.one_line(error)
        if isinstance(error, Wrong):
            why = str(error)
        elif out_of_memory(error):
            why = f"ran out of memory: {why}"
        elif name in (peers.COMPILED, peers.LIGER) and "ompiler" in why:
            self.unusable.add(name)
            self.results.leave_out(name, f"torch.compile does not work here: {why}")
            return
        self.trouble |= name in (OURS, ALL) and not out_of_memory(error)
        self.results.leave_out(name, why, task.title)
        del error
        if self.setting.device.type == "cuda":
            torch.cuda.empty_cache()

    # ---- time -----------------------------------------------------------------------------------------------

    def _in_turns(
        self, runs: dict[str, Callable[[], object]], estimates: dict[str, float]
    ) -> dict[str, list[float]]:
        """Seconds of each round."""
        calls = {name: max(1, math.ceil(self.clock.shortest / max(each, 1e-7))) for name, each in estimates.items()}
        costs = {name: each * (calls[name] + 1) for name, each in estimates.items()}
        rounds = rounds_of(costs, self.seconds, self.least_rounds, SLOW_FROM)
        return times(runs, rounds, self.clock, calls, self.deadline)

    def _row(
        self, task: Task, name: str, taken: list[float], base: list[float], memory: int | None, held: Held
    ) -> dict[str, Any]:
        low, median, high = statistics.quantiles(taken, n=4, method="inclusive")
        ratio = statistics.median(mine / ours for mine, ours in zip(taken, base, strict=False))
        return {
            "case": task.case, "op": task.op, "pass": task.passes, "shape": task.shape, "dtype": name_of(task.dtype),
            "series": task.series, "variant": task.variant, "active_share": task.active_share, "implementation": name,
            "median_s": median, "iqr_s": high - low, "rounds": len(taken), "ratio": ratio, "peak_extra_bytes": memory,
            "bytes_moved": task.bytes_moved, "flops": task.flops, "max_error": held.error, "tolerance": held.tolerance,
        }


def out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or ("alloc" in text and "memory" in text)))


def reference_bytes(task: Task, dtype: torch.dtype) -> int:
    """What plain torch takes in that dtype, with the inputs in both. Estimates of plain torch are for float32."""
    copies = task.input_bytes * (1 + dtype.itemsize / task.dtype.itemsize)
    return round(task.bytes.get(peers.EAGER, 0) * dtype.itemsize / 4 + copies)


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"

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
from torch import Tensor

from r1kernels.bench import machine, peers
from r1kernels.bench.clock import Clock
from r1kernels.bench.results import Results
from r1kernels.bench.tasks import BOTH, OURS, Function, Problem, Setting, Task, distance, name_of
from r1kernels.bench.tasks import results as results_of

ALL = "all implementations"
MOST_ROUNDS, SLOW_ROUNDS = 50, 2
SHORT = 0.5  # seconds: one more run, to know the time better, costs nothing
SLOW = 6.0  # times the fastest: such a candidate takes part in few rounds
WIDEST_EXACT = 512 << 20  # bytes: larger shared inputs get a reference in float32 instead of float64
MARGIN = 1.25  # estimates from shapes leave out small buffers and what an allocator keeps
RESERVE = 512 << 20, 0.05  # bytes, and share of all memory, that are left alone


class Wrong(Exception):
    """A candidate whose result is not that of the reference."""


class Engine:
    """Runs tasks. `trouble` says whether this library itself failed in one."""

    def __init__(
        self, setting: Setting, clock: Clock, results: Results, deadline: float | None = None
    ) -> None:
        self.setting, self.clock, self.results = setting, clock, results
        self.deadline = math.inf if deadline is None else deadline  # of time.monotonic: then few rounds are enough
        self.seconds = setting.pick(0.1, 1.0, 5.0)
        self.least_rounds = setting.pick(2, 3, 5)
        self.trouble = False
        self.unusable: set[str] = set()  # implementations that cannot work in any case

    def measure(self, task: Task) -> list[dict[str, Any]]:
        """The rows of a task; empty if it was left out."""
        problem = self._problem(task)
        if problem is None:
            return []
        truth = Truth(task, problem)
        functions = {name: function for name, function in task.functions.items() if self._fits(name, task)}
        if OURS not in functions:
            return []
        functions |= self._peers(task)
        errors: dict[str, float] = {}
        runs: dict[str, Callable[[], object]] = {}
        memory: dict[str, int | None] = {}
        estimates: dict[str, float] = {}
        for name, function in functions.items():
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
        truth.forget()
        try:
            for name, make in task.ceilings.items():
                memory[name], errors[name], runs[name] = None, 0.0, make(problem)
                self.clock.seconds(runs[name], 1)
                estimates[name] = self.clock.seconds(runs[name], 1)
            times = self._in_turns(runs, estimates)
        except Exception as error:  # such as memory that another process has taken since the checks
            self._failed(ALL, task, error)
            return []
        return [self._row(task, name, taken, times[OURS], memory[name], errors[name])
                for name, taken in times.items()]

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

    def _problem(self, task: Task) -> Problem | None:
        ours = task.bytes.get(OURS, 0)
        if not self.enough_memory(ALL, 3 * task.input_bytes + ours, task.title):
            return None
        try:
            return task.make()
        except Exception as error:
            self._failed(ALL, task, error)
            return None

    def _fits(self, name: str, task: Task) -> bool:
        return self.enough_memory(name, task.bytes.get(name, task.bytes.get(peers.EAGER, 0)), task.title)

    def _peers(self, task: Task) -> dict[str, Function]:
        found = {}
        for peer in task.all_peers():
            name = peer.implementation
            if name in self.unusable:
                continue
            if name == peers.COMPILED and not self.setting.compiled and task.series is None:
                self.results.leave_out(name, "--size small compiles the vocabulary series only, to save time",
                                       task.case)
                continue
            try:
                function = peers.load(peer, self.setting.device)
            except peers.Missing as error:
                self.results.leave_out(name, str(error), "" if error.everywhere else task.case)
                continue
            if self._fits(name, task):
                found[name] = function
        return found

    def _failed(self, name: str, task: Task, error: Exception) -> None:
        why = peers.one_line(error)
        if isinstance(error, Wrong):
            why = str(error)
        elif out_of_memory(error):
            why = f"ran out of memory: {why}"
        elif name == peers.COMPILED and "ompiler" in why:
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
        """Seconds of each round. Before each measurement there is one run without: a system may have taken back memory
        that others gave up, and whoever comes next would pay for it."""
        fastest = min(estimates.values())
        slow = {name for name, each in estimates.items() if each > SLOW * fastest and each > 0.05}
        calls = {name: max(1, math.ceil(self.clock.shortest / max(each, 1e-7))) for name, each in estimates.items()}
        one_round = sum(each * (calls[name] + 1) for name, each in estimates.items() if name not in slow)
        rounds = int(min(max(self.seconds / one_round, self.least_rounds), MOST_ROUNDS))
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds):
            if number >= SLOW_ROUNDS and time.monotonic() > self.deadline:
                break
            for name, run in runs.items():
                if name not in slow or number < SLOW_ROUNDS:
                    run()
                    times[name].append(self.clock.seconds(run, calls[name]))
        return times

    def _row(
        self, task: Task, name: str, taken: list[float], base: list[float], memory: int | None, error: float
    ) -> dict[str, Any]:
        low, median, high = statistics.quantiles(taken, n=4, method="inclusive")
        ratio = statistics.median(mine / ours for mine, ours in zip(taken, base, strict=False))
        tolerance = 0.0 if name in task.ceilings else task.tolerance[name != OURS]
        return {
            "case": task.case, "op": task.op, "pass": task.passes, "shape": task.shape, "dtype": name_of(task.dtype),
            "series": task.series, "variant": task.variant, "active_share": task.active_share, "implementation": name,
            "median_s": median, "iqr_s": high - low, "rounds": len(taken), "ratio": ratio, "peak_extra_bytes": memory,
            "bytes_moved": task.bytes_moved, "flops": task.flops, "max_error": error, "tolerance": tolerance,
        }


class Truth:
    """The exact results of a task, and those of this library at the whole shape once they are checked."""

    def __init__(self, task: Task, problem: Problem) -> None:
        self.task, self.problem = task, problem
        self._exact: list[Tensor] | None = None
        self._ours: list[Tensor] | None = None

    def exact(self) -> list[Tensor]:
        """Of the first few rows, or of all of them."""
        if self._exact is None:
            part = self.problem.part()
            shared = sum(8 * value.numel() for name, value in part.inputs.items() if name not in part.rows)
            dtype = torch.float64 if shared <= WIDEST_EXACT else torch.float32
            self._exact = results_of(self.task.exact, part.to(dtype), self.task.passes)
        return self._exact

    def check(self, name: str, function: Function) -> float:
        """The largest error of a candidate.

        The whole shape is run, and its first rows are compared with the exact ones. What belongs to no row, such as
        the gradient of the weight, is compared on the first rows alone and, at the whole shape, with ours.
        torch.compile sees the whole shape only, because another one would be compiled once more.

        Raises:
            Wrong: an error is beyond the tolerance.
        """
        task, problem, exact = self.task, self.problem, self.exact()
        tolerance = task.tolerance[name != OURS]
        worst = 0.0

        def compare(what: str, found: Tensor, expected: Tensor) -> None:
            nonlocal worst
            error = distance(found, expected)
            if not error <= tolerance:
                raise Wrong(f"wrong result: {what} is off by {error:.2g} of its norm, allowed {tolerance:.2g}")
            worst = max(worst, error)

        whole = results_of(function, problem, task.passes)
        if len(whole) != len(exact):
            raise Wrong(f"wrong result: {len(whole)} tensors, expected {len(exact)}")
        leaves = problem.leaves if task.passes == BOTH else ()
        outputs = len(exact) - len(leaves)
        labels = [*(f"output {i}" for i in range(outputs)), *(f"the gradient of {leaf}" for leaf in leaves)]
        # A mean over all rows gives each of them a smaller gradient than a mean over a few.
        share = problem.share if exact[0].dim() == 0 else 1.0
        for i, expected in enumerate(exact):
            of_rows = leaves[i - outputs] in problem.rows if i >= outputs else expected.dim() > 0
            if not problem.few:
                compare(labels[i], whole[i], expected)
            elif of_rows:
                compare(labels[i], problem.cut(whole[i]), expected * (share if i >= outputs else 1.0))
            elif self._ours is not None:
                compare(f"{labels[i]}, beside ours,", whole[i], self._ours[i])
        if problem.few and name != peers.COMPILED:
            for label, found, expected in zip(labels, results_of(function, problem.part(), task.passes), exact,
                                              strict=True):
                compare(label, found, expected)
        if name == OURS:
            self._ours = whole
        return worst

    def forget(self) -> None:
        self._exact = self._ours = None


def out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or ("alloc" in text and "memory" in text)))


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"

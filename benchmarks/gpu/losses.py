"""Cases of losses: a function of named tensors to a scalar, checked against float64 and timed forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import r1kernels
from gpu.setting import OURS, Candidate, Case, Setting, with_cuda
from gpu.timing import Timed
from r1kernels.bench.check import distances
from r1kernels.bench.peers import COMPILED, EAGER, compiled
from r1kernels.bench.tasks import BOTH, results

LossFunction = Callable[..., Tensor]
PEER_TOLERANCE = 0.05  # peers round logits or gradients to 16 bits on the way
# A log-prob is a difference of numbers near 16: a loss has their rounding, however small its error in plain torch is.
LOSS_ROUNDINGS = 16


class Problem(NamedTuple):
    """`rows` name the inputs whose first dimension counts sequences (or tokens), over which the loss is a mean, and
    `leaves` those that receive gradients. With `cu_seqlens` among the inputs, `packed` are those of `rows` whose first
    dimension counts the tokens of all sequences."""

    inputs: dict[str, Tensor]
    leaves: tuple[str, ...]
    rows: tuple[str, ...]
    packed: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return len(self.inputs["cu_seqlens"]) - 1 if self.packed else len(self.inputs[self.rows[0]])

    def cut(self, name: str, value: Tensor, where: slice) -> Tensor:
        """Those rows of an input, or of its gradient, that belong to some sequences."""
        if name not in self.packed:
            return value[where]
        bounds = self.inputs["cu_seqlens"]
        return value[int(bounds[where.start]) : int(bounds[where.stop])]

    def part(self, where: slice) -> Problem:
        inputs = {
            name: self.cut(name, value, where) if name in self.rows else value for name, value in self.inputs.items()
        }
        if self.packed:
            bounds = self.inputs["cu_seqlens"][where.start : where.stop + 1]
            inputs["cu_seqlens"] = bounds - bounds[0]
        return self._replace(inputs=inputs)

    def double(self) -> Problem:
        return self._replace(inputs={
            name: value.double() if value.is_floating_point() else value for name, value in self.inputs.items()
        })


def gradients(function: LossFunction, problem: Problem) -> list[Tensor]:
    """The loss, and the gradients of the leaves."""
    return results(function, problem, BOTH)


def distance(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|; NaN where anything is."""
    return distances(found, exact)[0]


def compare(name: str, found: Tensor, exact: Tensor, tolerance: float) -> None:
    error = distance(found, exact)
    if not error <= tolerance:
        raise AssertionError(f"{name} is off by {error:.3g} of its norm, allowed {tolerance:.3g}")


class Truth:
    """The results of the first and the last `few` rows in float64, and the error that ours may have there: twice that
    of the reference in the same dtype, and a rounding. All candidates of a case share them."""

    def __init__(self, problem: Problem, exact: LossFunction, ours: LossFunction, few: int) -> None:
        self.problem, self.exact, self.ours, self.few = problem, exact, ours, few
        self.known: list[tuple[slice, list[Tensor], list[float]]] = []

    def parts(self) -> list[tuple[slice, list[Tensor], list[float]]]:
        """(which rows, loss and gradients, errors allowed)."""
        count = self.problem.count
        if not self.known:
            self.known = [self._part(slice(0, self.few)), self._part(slice(count - self.few, count))]
        return self.known

    def _part(self, where: slice) -> tuple[slice, list[Tensor], list[float]]:
        part = self.problem.part(where)
        expected = gradients(self.exact, part.double())
        with r1kernels.backend("reference"):
            same_dtype = gradients(self.ours, part)
        roundings = [LOSS_ROUNDINGS, *[1] * len(self.problem.leaves)]
        allowed = [
            2 * (distance(value, true) + number * torch.finfo(value.dtype).eps)
            for value, true, number in zip(same_dtype, expected, roundings, strict=True)
        ]
        return where, expected, allowed


def check(function: LossFunction, truth: Truth, name: str) -> None:
    """A few rows by themselves, loss and gradients; and the first and last rows of the whole against theirs. What is
    compiled sees only the whole: another shape would be compiled once more."""
    problem = truth.problem
    whole = gradients(function, problem)
    for where, expected, allowed in truth.parts():
        if not name.startswith(OURS):
            allowed = [PEER_TOLERANCE] * len(expected)
        found = None if name == COMPILED else gradients(function, problem.part(where))
        for i, what in enumerate(("loss", *problem.leaves)):
            if found is not None:
                compare(what, found[i], expected[i], allowed[i])
            if what in problem.rows:
                share = truth.few / problem.count
                rows = problem.cut(what, whole[i], where)
                compare(f"{what}, of all rows", rows, expected[i] * share, allowed[i])


def loss_case(
    op: str, case: str, shape: object, dtype: torch.dtype, problem: Problem, functions: dict[str, LossFunction],
    exact: LossFunction, *, few: int, extra: dict[str, Candidate] | None = None, cuda: Setting | None = None,
    **numbers: Any,
) -> Case:
    """`exact` is run in float64. Functions whose names begin with `OURS` are held to the precision of the reference.
    With `cuda`, `CUDA` takes part."""
    truth = Truth(problem, exact, functions[OURS], few)
    candidates = {
        name: Candidate(Timed(partial(gradients, function, problem)), partial(check, function, truth, name))
        for name, function in functions.items()
    }
    candidates = with_cuda(candidates, cuda) if cuda else candidates
    return Case(op, case, str(shape), dtype, candidates | (extra or {}), **numbers)


def with_eager(eager: LossFunction, setting: Setting, also_compiled: bool = False) -> dict[str, LossFunction]:
    """Plain torch, and the same compiled, unless the setting is lean."""
    if setting.lean:
        return {}
    return {EAGER: eager} | (with_compiled(eager) if also_compiled and setting.compiled else {})


def with_compiled(function: LossFunction) -> dict[str, LossFunction]:
    return {COMPILED: compiled(function).load()}

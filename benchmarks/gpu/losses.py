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

LossFunction = Callable[..., Tensor]
PEER_TOLERANCE = 0.05  # peers round logits or gradients to 16 bits on the way
# A log-prob is a difference of numbers near 16: a loss has their rounding, however small its error in plain torch is.
LOSS_ROUNDINGS = 16
COMPILED = "torch.compile"


class Problem(NamedTuple):
    """`rows` name the inputs whose first dimension counts sequences (or tokens), over which the loss is a mean, and
    `leaves` those that receive gradients."""

    inputs: dict[str, Tensor]
    leaves: tuple[str, ...]
    rows: tuple[str, ...]

    @property
    def count(self) -> int:
        return len(self.inputs[self.rows[0]])

    def part(self, where: slice) -> Problem:
        return self._replace(inputs={
            name: value[where] if name in self.rows else value for name, value in self.inputs.items()
        })

    def double(self) -> Problem:
        return self._replace(inputs={
            name: value.double() if value.is_floating_point() else value for name, value in self.inputs.items()
        })


def gradients(function: LossFunction, problem: Problem) -> tuple[Tensor, ...]:
    """(loss, gradients of the leaves): nothing is left behind, so that memory can be measured."""
    leaves = {name: problem.inputs[name].detach().requires_grad_() for name in problem.leaves}
    loss = function(**(problem.inputs | leaves))
    return loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))


def distance(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|; NaN where anything is."""
    found, exact = found.double(), exact.double()
    return float((found - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float64).tiny))


def compare(name: str, found: Tensor, exact: Tensor, tolerance: float) -> None:
    error = distance(found, exact)
    if not error <= tolerance:
        raise AssertionError(f"{name} is off by {error:.3g} of its norm, allowed {tolerance:.3g}")


def check(
    function: LossFunction, exact: LossFunction, problem: Problem, few: int, name: str,
    plain: LossFunction | None = None,
) -> None:
    """A few rows by themselves, loss and gradients; and the first and last rows of the whole against theirs.

    Of ours, twice the error of the reference (`plain`, or the function itself) in the same dtype and a rounding are
    allowed. What is compiled sees the whole only: another shape would be compiled once more.
    """
    whole = gradients(function, problem)
    for where in (slice(0, few), slice(problem.count - few, problem.count)):
        part = problem.part(where)
        expected = gradients(exact, part.double())
        allowed = [PEER_TOLERANCE] * len(expected)
        if name.startswith(OURS):
            with r1kernels.backend("reference"):
                same_dtype = gradients(plain or function, part)
            roundings = [LOSS_ROUNDINGS, *[1] * len(problem.leaves)]
            allowed = [
                2 * (distance(value, true) + number * torch.finfo(value.dtype).eps)
                for value, true, number in zip(same_dtype, expected, roundings, strict=True)
            ]
        found = None if name == COMPILED else gradients(function, part)
        for i, what in enumerate(("loss", *problem.leaves)):
            if found is not None:
                compare(what, found[i], expected[i], allowed[i])
            if what in problem.rows:
                share = few / problem.count
                compare(f"{what}, of all rows", whole[i][where], expected[i] * share, allowed[i])


def loss_case(
    op: str, case: str, shape: object, dtype: torch.dtype, problem: Problem, functions: dict[str, LossFunction],
    exact: LossFunction, *, few: int, extra: dict[str, Candidate] | None = None, cuda: Setting | None = None,
    **numbers: Any,
) -> Case:
    """`exact` is run in float64. Functions whose names begin with `OURS` are held to the precision of the reference.
    With `cuda`, `CUDA` takes part."""
    candidates = {
        name: Candidate(
            Timed(partial(gradients, function, problem)),
            partial(check, function, exact, problem, few, name),
        )
        for name, function in functions.items()
    }
    candidates = with_cuda(candidates, cuda) if cuda else candidates
    return Case(op, case, str(shape), dtype, candidates | (extra or {}), **numbers)


def with_compiled(eager: LossFunction, wanted: bool) -> dict[str, LossFunction]:
    return {"torch eager": eager} | ({COMPILED: torch.compile(eager, dynamic=False)} if wanted else {})

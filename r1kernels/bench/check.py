"""The equality check: all that a candidate computes at the measured shape is compared with an exact reference.

The error of a result is |found - exact| / |exact|, in its norm. Each row is compared, too, so that one wrong token is
seen among thousands.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from r1kernels.bench.tasks import BOTH, OURS, Function, Problem, Task
from r1kernels.bench.tasks import results as results_of

# Losses and log-probs of this library: float32 sums over vocabularies of 10^5 entries.
VALUES = 2e-5
# Results of others, values and gradients. In bfloat16 most of them round the logits: a logit of 16 is then off by up to
# 1/16, and so is its log-prob.
OTHERS = {torch.float32: 1e-4, torch.bfloat16: 0.05}
ROW = 4  # A single row may be this many times as far off as all of them together.
CHUNK = 1 << 24  # entries that are compared at once, in float64


class Wrong(Exception):
    """A candidate whose result is not that of the reference."""


class Held(NamedTuple):
    """An error, and the tolerance that it was held to."""

    error: float
    tolerance: float


class Truth:
    """The exact results of a task, computed once, in `dtype`."""

    def __init__(self, task: Task, problem: Problem, dtype: torch.dtype) -> None:
        self.task: Task = task
        self.problem: Problem = problem
        self.exact: list[torch.Tensor] = results_of(task.exact, problem.to(dtype), task.passes)
        leaves = problem.leaves if task.passes == BOTH else ()
        self.outputs: int = len(self.exact) - len(leaves)
        outputs = (f"output {i}" for i in range(self.outputs))
        self.labels: list[str] = [*outputs, *(f"the gradient of {leaf}" for leaf in leaves)]

    def check(self, name: str, function: Function) -> Held:
        """The error of a candidate that comes nearest to its tolerance.

        Raises:
            Wrong: an error is beyond its tolerance.
        """
        found = results_of(function, self.problem, self.task.passes)
        if len(found) != len(self.exact):
            raise Wrong(f"wrong result: {len(found)} tensors, expected {len(self.exact)}")
        worst = Held(0.0, 0.0)
        for i, (mine, exact) in enumerate(zip(found, self.exact, strict=True)):
            tolerance = tolerance_of(self.task, name, mine.dtype if i >= self.outputs else None)
            error, of_row = distances(mine, exact)
            if not error <= tolerance:
                raise Wrong(f"wrong result: {self.labels[i]} is off by {error:.2g} of its norm, allowed "
                            f"{tolerance:.2g}")
            if not of_row <= ROW * tolerance:
                raise Wrong(f"wrong result: a row of {self.labels[i]} is off by {of_row:.2g} of its norm, allowed "
                            f"{ROW * tolerance:.2g}")
            if error * worst.tolerance >= worst.error * tolerance:
                worst = Held(error, tolerance)
        return worst


def tolerance_of(task: Task, name: str, gradient: torch.dtype | None) -> float:
    """What a result is held to. `gradient`: the dtype of a gradient, None for a value.

    A gradient of this library may be off by two roundings of its dtype: its own, and that of the gradient of the logits
    from which matrix products make it.
    """
    given = task.tolerance or 0.0
    if name != OURS:
        return max(OTHERS[task.dtype], given)
    return max(given, VALUES, torch.finfo(gradient).eps if gradient is not None else 0.0)


def distances(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """|found - exact| / |exact| in the norm, and the same of the worst row (the last dimension): over its own norm, or
    over that of a typical row if that is larger. NaN where anything is NaN."""
    if found.shape != exact.shape or not exact.numel():
        return math.nan, math.nan
    width = exact.shape[-1] if exact.dim() else 1
    found, exact = found.reshape(-1, width), exact.reshape(-1, width)
    errors, sizes = [], []
    rows = max(1, CHUNK // width)
    for mine, right in zip(found.split(rows), exact.split(rows), strict=True):
        mine, right = mine.double(), right.double()
        errors.append(torch.where(mine == right, 0, mine - right).norm(dim=1))  # equal infinities have no distance
        sizes.append(torch.where(right.isfinite(), right, 0).norm(dim=1))
    error, size = torch.cat(errors), torch.cat(sizes)
    tiny = torch.finfo(torch.float32).tiny
    typical = max(float(size.norm()) / len(size) ** 0.5, tiny)
    return float(error.norm() / size.norm().clamp(min=tiny)), float((error / size.clamp(min=typical)).max())

"""What is measured: a task is one operation at one shape with the candidates that compute the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1kernels.bench import peers
from r1kernels.bench.clock import Run
from r1kernels.bench.peers import Peer

OURS = "r1kernels"
FORWARD, BOTH = "forward", "forward+backward"
Function = Callable[..., Any]  # named tensors -> a tensor or a tuple of tensors
SIZES = ("small", "default", "large")


@dataclass(frozen=True)
class Setting:
    """How the command was called. `compiled`: whether torch.compile takes part in every case."""

    device: torch.device
    size: str
    compiled: bool = True

    def pick(self, small: Any, default: Any, large: Any) -> Any:
        """The value for this size."""
        return {"small": small, "default": default, "large": large}[self.size]

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)


class Problem(NamedTuple):
    """Inputs by name. `leaves` receive gradients."""

    inputs: dict[str, Tensor]
    leaves: tuple[str, ...] = ()

    def to(self, dtype: torch.dtype) -> Problem:
        return self._replace(inputs={
            name: value.to(dtype) if value.is_floating_point() else value for name, value in self.inputs.items()
        })


@dataclass(frozen=True)
class Task:
    """One operation at one shape.

    Args:
        make: builds the inputs. Nothing is allocated before.
        functions: candidates of this library and of plain torch, by implementation.
        peers: candidates of other libraries.
        exact: the reference, run in float64, or in float32 where float64 does not fit.
        bytes: the peak that each implementation takes beside the inputs, estimated from the shapes.
        ceilings: what an implementation cannot beat: made from the problem, timed in turns, never checked.
        around: makes of each timed call what is timed instead.
        tolerance: an error that any candidate may have, if it is larger than what `check.tolerance_of` allows.
    """

    case: str
    op: str
    shape: dict[str, int]
    dtype: torch.dtype
    make: Callable[[], Problem]
    functions: dict[str, Function]
    exact: Function
    passes: str = BOTH
    peers: Sequence[Peer] = ()
    ceilings: dict[str, Callable[[Problem], Run]] = field(default_factory=dict)
    around: Callable[[Run], Run] = lambda run: run
    input_bytes: int = 0
    bytes: dict[str, int] = field(default_factory=dict)
    compiled: bool = False  # whether torch.compile of `exact` takes part
    series: str | None = None
    variant: str = ""
    active_share: float = 1.0
    bytes_moved: int | None = None
    flops: int = 0
    tolerance: float | None = None

    @property
    def title(self) -> str:
        shape = ", ".join(f"{name} {size:,}" for name, size in self.shape.items())
        variant = f", {self.variant}" if self.variant else ""
        return f"{self.case}{variant}, {self.passes}, {shape}, {name_of(self.dtype)}"

    def all_peers(self) -> list[Peer]:
        """With torch.compile as the last one."""
        return [*self.peers, *([peers.compiled(self.exact)] if self.compiled else [])]


def in_both_passes(make: Callable[..., Task]) -> Iterator[Task]:
    """A task of the forward pass, and one of forward and backward."""
    return (make(passes=passes) for passes in (FORWARD, BOTH))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def results(function: Function, problem: Problem, passes: str) -> list[Tensor]:
    """The outputs and, with a backward pass, the gradients of the leaves. Nothing is left behind in `.grad`."""
    if passes == FORWARD:
        with torch.no_grad():
            return list(as_tuple(function(**problem.inputs)))
    leaves = {name: problem.inputs[name].detach().requires_grad_() for name in problem.leaves}
    outputs = as_tuple(function(**(problem.inputs | leaves)))
    moving = [value for value in outputs if value.requires_grad]
    grads = torch.autograd.grad(moving, list(leaves.values()), [torch.ones_like(value) for value in moving])
    return [*(value.detach() for value in outputs), *grads]


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(item for item in value if item is not None)


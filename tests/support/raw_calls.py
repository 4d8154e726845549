"""Calls every operator with arguments that are wrong in one place: a program, because a kernel may end its process.

    python raw_calls.py

It prints a line before each call, so that the last one names the culprit, and one after: "ok", or the error.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import r1kernels.ops.linear.distillation_loss
import r1kernels.ops.linear.grpo_loss
import r1kernels.ops.linear.targets
import r1kernels.ops.linear.token_statistics  # noqa: F401  (these modules implement the operators of hidden states)
from r1kernels import testing
from r1kernels._dispatch import TRITON_OPERATORS
from r1kernels._schemas import CUDA_OPERATORS

N, V, H, R = 6, 37, 16, 3
ops = torch.ops.r1kernels
OBJECTIVE = (0, 0, 3, 0, 0.2, 0.2, math.inf, 1.0, 1.05, 0.1, 0.01, 1.0)


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-2, 2, N).to(dtype)


def ids() -> Tensor:
    return torch.arange(N)


def mask() -> Tensor:
    return torch.ones(N, dtype=torch.bool)


def cu_seqlens() -> Tensor:
    return torch.tensor([0, 2, 2, N])


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return testing.random_logits(rows, columns, dtype=dtype)


def statistics() -> tuple[Tensor, Tensor]:
    return tokens(torch.float64) + 5, tokens(torch.float64) + 3


def more_slopes() -> tuple[Tensor, ...]:
    """sum_sq, grad_sum_sq and shift, which no CUDA kernel takes."""
    return () if testing.KERNELS == "cuda" else (tokens(torch.float64).abs(), tokens(), tokens() + 3)


def head(dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    return (
        matrix(N, H, dtype), matrix(V, H, dtype), matrix(1, V, dtype)[0], matrix(H, R, dtype), matrix(R, V, dtype),
        ids(), tokens().abs() + 1, 1.0, 1.0, 0.0, torch.float32, 4, 0, -1, False,
    )


def policy() -> tuple[Any, ...]:
    return (
        tokens(), torch.ones(3), tokens(), tokens(), tokens().abs(), mask(), cu_seqlens(), torch.ones(3),
        torch.tensor(4.0), *OBJECTIVE,
    )


def sets() -> tuple[Tensor, Tensor]:
    return torch.tensor([0, 3, 1, 2, 30, 3, 4, 7, 5, 36]), torch.tensor([0, 2, 3, 5, 6, 8, 10])


def index() -> tuple[Tensor, ...]:
    """Places of tokens, then where ids begin, entries and their tokens."""
    ids, offsets = sets()
    order = ids.argsort(stable=True)
    starts = torch.searchsorted(ids[order], torch.arange(V + 1))
    rows = torch.arange(N).repeat_interleave(offsets.diff())
    return torch.zeros(N, dtype=torch.int64), starts[None].int(), order.int(), rows[order].int()


def values() -> Tensor:
    return torch.linspace(-1, 1, 10)


CALLS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "token_stats": lambda: (matrix(N, V), ids(), mask(), 1.0, tokens().abs() + 1),
    "token_stats_backward": lambda: (matrix(N, V), ids(), *statistics(), tokens(), tokens(), 1.0, *more_slopes()),
    "token_stats_backward_out": lambda: (
        matrix(N, V), ids(), *statistics(), tokens(), tokens(), 1.0, tokens().abs() + 1, 0.0,
        torch.tensor([0, 2, 5]), torch.zeros(N, V), *more_slopes(),
    ),
    "token_statistics": lambda: (matrix(N, V), ids(), mask(), 1.0, tokens().abs() + 1, True, 7),
    "policy_loss": policy,
    "grpo_step": lambda: (
        matrix(N, V), ids(), torch.ones(3), tokens(), tokens(), mask(), cu_seqlens(), torch.ones(3), torch.tensor(4.0),
        1.0, 0, *OBJECTIVE[2:], [], torch.zeros(N, V),
    ),
    "group_advantages": lambda: (tokens(), torch.tensor([0, 0, 1, 1, 2, 2]), 2, 0, 1, 1e-4),
    "kl_estimate": lambda: (tokens(), tokens() + 1, 3),
    "scaled": lambda: (matrix(N, V), torch.tensor(2.0), torch.zeros(N, V), True),
    "add_rows": lambda: (torch.zeros(V, H), ids(), tokens(), matrix(N, H)),
    "top_k_ids": lambda: (matrix(N, V), 2),
    "gemm_f32": lambda: (matrix(N, H), matrix(H, V), torch.zeros(N, V), True),
    "divergence": lambda: (matrix(N, V), matrix(N, V) + 1, mask(), 2, 0.3, 1.0),
    "divergence_backward": lambda: (
        matrix(N, V), matrix(N, V) + 1, *statistics(), tokens(torch.float64), tokens(), 2, 0.3, 1.0, torch.zeros(N, V),
        0.0,
    ),
    "support_index": lambda: (*sets(), torch.tensor([0, 1, 2, 3, 4, 5]), mask(), V, V),
    "support_products": lambda: (matrix(N, H), matrix(V, H), *index()[1:], values(), True),
    "support_grad_hidden": lambda: (values(), matrix(V, H), *index()[1:], torch.zeros(N, H)),
    "support_grad_weight": lambda: (values(), matrix(N, H), *index()[1:], torch.zeros(V, H), True),
    "support_stats": lambda: (values(), sets()[1], index()[0], mask(), 1.0, tokens().abs() + 1),
    "support_stats_backward": lambda: (
        values(), sets()[1], index()[0], *statistics(), tokens(), tokens(), 1.0, tokens().abs() + 1, 0.0, values(),
    ),
    "linear_statistics": lambda: (
        matrix(N, H, torch.bfloat16), matrix(V, H, torch.bfloat16), None, ids(), mask(), 1.0, tokens().abs() + 1, 1.0,
        0.0, False,
    ),
    "linear_token_stats": lambda: (*head(), mask()),
    "linear_token_stats_backward": lambda: (*head(), *statistics(), tokens(), tokens(), torch.float32, [True] * 5),
    "linear_targets": lambda: (*head(), mask(), ids()[None], tokens()[None], 0.1, 0.1, [True] * 5),
    "linear_targets_backward": lambda: (
        *head(), ids()[None], statistics()[0], tokens()[None], 0.1, 0.1, torch.float32, [True] * 5,
    ),
    "linear_token_statistics": lambda: (*head(), mask(), torch.zeros(N, 2, dtype=torch.int64), 7),
    "linear_token_statistics_backward": lambda: (
        *head(), *statistics(), tokens(torch.float64), torch.zeros(N, 2, dtype=torch.int64),
        [tokens(), tokens(), tokens(), tokens(), matrix(N, 2)], torch.float32, [True] * 5,
    ),
    "linear_policy_gradient": lambda: (
        *head(), mask(), tokens(), tokens(), tokens(), tokens(), tokens(), tokens(), 0, 2,
        0.2, 0.2, math.inf, 1.0, 1.05, 0.1, 0.01, [True] * 5,
    ),
    "linear_divergence": lambda: (
        *head(), mask(), matrix(N, H), matrix(V, H), None, None, None, 1.0, 0.0, None, None, 0, "student", "bucket",
        torch.tensor(1.0), 2, 0.3, [True] * 5,
    ),
}


def wrong_tensors(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """In shape, layout or dtype."""
    yield "0-d", x.new_zeros(())
    yield "empty", x.new_zeros(0)
    yield "empty rows", x.new_zeros(0, V)
    yield "empty columns", x.new_zeros(N, 0)
    if testing.KERNELS == "cpu":  # another shape of the same memory, which is harmless and takes an interpreter's time
        yield "one dimension more", x.unsqueeze(0)
        yield "five dimensions more", x[(None,) * 5]
    if x.dim():
        yield "shorter", x[:-1].clone()
        yield "longer", torch.cat([x, x[:1]])
        yield "one", x[:1].clone()
        yield "strided", torch.stack([x, x], -1)[..., 0]
        yield "expanded", x[:1].expand_as(x)
        yield "transposed", x.reshape(-1).reshape(x.shape[::-1]).permute(*reversed(range(x.dim())))
    for dtype in (torch.float64, torch.bfloat16, torch.int32, torch.bool, torch.complex64):
        if dtype != x.dtype:
            yield str(dtype), x.to(dtype)
    yield "meta", x.to("meta")


def wrong_boundaries() -> Iterator[tuple[str, Tensor]]:
    for values in ([0], [7], [], [0, 5], [1, 6], [0, 4, 2, 6], [0, 9, 6], [0, -3, 6], [0, 2**40, 6], [0, 2, 2, 7]):
        yield str(values), torch.tensor(values, dtype=torch.int64)


def wrong_values(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Of integers, which are looked up; kernels on a device do not wait to see them."""
    for value in (-1, 2**40, -(2**62)):
        yield f"all {value}", torch.full_like(x, value)


def wrong_numbers(x: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(x, bool):
        yield "the other", not x
    elif isinstance(x, int):
        yield from ((str(value), value) for value in (-1, 0, 7, 2**40))
    elif isinstance(x, float):
        yield from ((str(value), value) for value in (0.0, -1.0, math.nan, math.inf, 1e300))
    elif isinstance(x, list):
        yield from (("empty", []), ("long", x * 3), ("one", x[:1]))


def wrong(name: str, argument: str, x: Any) -> Iterator[tuple[str, Any]]:
    if testing.KERNELS != "cpu" and not isinstance(x, Tensor):
        return  # no address depends on it, and interpreted calls take their time
    if argument == "cu_seqlens":
        yield from wrong_boundaries()
    if isinstance(x, Tensor):
        yield from wrong_tensors(x)
        if x.dtype == torch.int64 and argument != "cu_seqlens" and testing.KERNELS == "cpu":
            yield from wrong_values(x)
        yield "None", None
    else:
        yield from wrong_numbers(x)


def served(name: str) -> bool:
    """Whether these kernels have the operator. Those of hidden states are made of the others."""
    if testing.KERNELS == "triton":
        return name in TRITON_OPERATORS
    if testing.KERNELS == "cuda":
        return name in CUDA_OPERATORS
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return any(has(f"r1kernels::{name}", key) for key in ("CPU", "CompositeExplicitAutograd"))


def main() -> None:
    torch.set_num_threads(1)
    for name, make in CALLS.items():
        if not served(name):
            continue
        schema = getattr(ops, name).default._schema
        getattr(ops, name)(*make())
        for place, argument in enumerate(schema.arguments[: len(make())]):
            for what, value in wrong(name, argument.name, make()[place]):
                arguments = list(make())
                arguments[place] = value
                print(f"{name}\t{argument.name}\t{what}\t", end="", flush=True)
                try:
                    getattr(ops, name)(*arguments)
                    print("ok", flush=True)
                except Exception as error:  # whatever is raised is raised, and did not end the process
                    first = (str(error).splitlines() or [""])[0]
                    print(f"{type(error).__name__}: {first[:200]}", flush=True)


if __name__ == "__main__":
    main()
    sys.exit(0)

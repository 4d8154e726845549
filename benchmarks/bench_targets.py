"""Several targets of one head against a call for each, and what label smoothing and the z-loss cost.

`weight_bytes` of a row are those of the weight that the products of a step read, and `sum_bytes` those of the float32
sum of its gradient that they read and write: counted, product by product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_linear_grpo_loss import HEADS
from conftest import SHAPES
from torch import Tensor

import r1kernels
from r1kernels.ops.linear import sums, walk

DEPTHS = (2, 4)
TERMS = {
    "z-loss": {"z_loss_coef": 1e-4}, "label smoothing": {"label_smoothing": 0.1},
    "both": {"z_loss_coef": 1e-4, "label_smoothing": 0.1},
}


def make(shape: str, depths: int, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (D, N, H) or (N, H), weight (V, H), bfloat16, and ids (D, N)."""
    generator = torch.Generator().manual_seed(0)
    b, t, width, vocab = HEADS[shape]
    lead = (b * t,) if shared else (depths, b * t)
    hidden = torch.randn(*lead, width, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(vocab, width, generator=generator) * 2 / width**0.5).bfloat16().requires_grad_()
    return hidden, weight, torch.randint(vocab, (depths, b * t), generator=generator)


def together(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return r1kernels.linear_multi_target(hidden, weight, ids)


def one_by_one(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    rows = hidden if hidden.dim() == 3 else [hidden] * len(ids)
    return torch.stack([r1kernels.linear_cross_entropy(h, weight, y) for h, y in zip(rows, ids, strict=True)])


def step(losses: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], None]:
    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        losses().sum().backward()

    return run


def gradients(losses: Callable[[], Tensor], *leaves: Tensor) -> list[Tensor]:
    step(losses, *leaves)()
    return [losses().detach(), *(leaf.grad.float() for leaf in leaves)]


def assert_equal(found: list[Tensor], expected: list[Tensor], relative: float) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() <= relative * theirs.norm()


@contextlib.contextmanager
def counted(weight: Tensor, bytes_: dict[str, int]) -> Iterator[None]:
    """Adds up what products read of the weight, and read and write of the sum of its gradient."""
    product = walk.matmul

    def run(a: Tensor, b: Tensor, out: Tensor, **how: Any) -> Tensor:
        if b.numel() == weight.numel():
            bytes_["weight_bytes"] += b.numel() * b.itemsize
        if out.numel() == weight.numel():
            bytes_["sum_bytes"] += out.numel() * out.itemsize * (2 if how.get("accumulate") else 1)
        return product(a, b, out, **how)

    walk.matmul = sums.matmul = run
    try:
        yield
    finally:
        walk.matmul = sums.matmul = product


@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("depths", DEPTHS)
@pytest.mark.parametrize("shared", [True, False])
def bench_linear_multi_target(shape: str, depths: int, shared: bool, in_turns: Callable[..., Any]) -> None:
    hidden, weight, ids = make(shape, depths, shared)
    losses = {
        "one call": lambda: together(hidden, weight, ids), f"{depths} calls": lambda: one_by_one(hidden, weight, ids),
    }
    # The gradient of the weight is rounded to bfloat16 in each of several calls.
    assert_equal(*(gradients(loss, hidden, weight) for loss in losses.values()), 0.01)
    rows = in_turns(
        {name: step(loss, hidden, weight) for name, loss in losses.items()}, op="linear_multi_target", rounds=3,
        shape=f"{shape}, {depths} depths, {'shared' if shared else 'separate'} hidden states",
    )
    for row, loss in zip(rows, losses.values(), strict=True):
        bytes_ = {"weight_bytes": 0, "sum_bytes": 0}
        with counted(weight, bytes_):
            step(loss, hidden, weight)()
        row.update(bytes_)
        print(row)


@pytest.mark.parametrize("shape", HEADS)
def bench_terms_from_hidden_states(shape: str, in_turns: Callable[..., Any]) -> None:
    hidden, weight, ids = make(shape, 1, True)

    def loss(ids: Tensor = ids[0], **terms: float) -> Tensor:
        return r1kernels.linear_cross_entropy(hidden, weight, ids, **terms)

    few = torch.where(torch.arange(ids.shape[1]) < 8, ids[0], -100)
    for terms in TERMS.values():
        found = gradients(lambda terms=terms: loss(few, **terms), hidden, weight)
        exact = [value.detach().float().requires_grad_() for value in (hidden, weight)]
        assert_equal(found, gradients(lambda terms=terms, exact=exact: in_torch(
            exact[0][:8] @ exact[1].T, few[:8], **terms), *exact), 0.02)
    candidates = {"plain": step(loss, hidden, weight)}
    candidates |= {
        name: step(lambda terms=terms: loss(**terms), hidden, weight) for name, terms in TERMS.items()
    }
    for row in in_turns(candidates, op="linear_cross_entropy_terms", shape=shape, rounds=5):
        print(row)


def in_torch(logits: Tensor, targets: Tensor, z_loss_coef: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    return loss + z_loss_coef * logits.logsumexp(-1).square().mean() if z_loss_coef else loss


@pytest.mark.parametrize("shape", SHAPES)
def bench_terms_from_logits(shape: str, in_turns: Callable[..., Any], batches: Callable[[str], Any]) -> None:
    batch = batches(shape)
    logits, ids = batch.logits, batch.token_ids

    def in_float32(**terms: float) -> Tensor:
        return in_torch(logits.float().flatten(0, 1), ids.flatten(), **terms)

    candidates = {"plain": step(lambda: r1kernels.cross_entropy(logits, ids), logits)}
    for name, terms in TERMS.items():
        ours, theirs = (lambda f=f, t=terms: f(**t) for f in (
            lambda **t: r1kernels.cross_entropy(logits, ids, **t), in_float32))
        assert_equal(gradients(ours, logits), gradients(theirs, logits), 0.01)
        candidates[name] = step(ours, logits)
        candidates[f"torch eager, {name}"] = step(theirs, logits)
    for row in in_turns(candidates, op="cross_entropy_terms", shape=shape, rounds=5):
        print(row)

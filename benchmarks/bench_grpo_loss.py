"""GRPO loss forward and backward from bfloat16 logits, and its overhead on a tiny batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import SHAPES, Batch, Shape, make_batch
from torch import Tensor

import r1kernels


def eager(batch: Batch) -> Tensor:
    """What a trainer writes by hand: fp32 log-softmax, gather, ratio, clip, sequence mean; entropy as a metric."""
    log_p = batch.logits.float().log_softmax(-1)
    logprobs = log_p.gather(-1, batch.token_ids.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        -(log_p.exp() * log_p).sum(-1).mean()
    ratio = (logprobs - batch.old_logprobs).exp()
    advantages = batch.advantages.unsqueeze(-1)
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean(1).mean()


def ours(batch: Batch) -> Tensor:
    return r1kernels.grpo_loss(
        batch.logits, batch.token_ids, batch.advantages, old_logprobs=batch.old_logprobs
    ).loss


IMPLEMENTATIONS: dict[str, Callable[[Batch], Tensor]] = {"r1kernels": ours, "torch eager": eager}


def step(implementation: Callable[[Batch], Tensor], batch: Batch) -> Callable[[], None]:
    def run() -> None:
        batch.logits.grad = None
        implementation(batch).backward()

    return run


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def bench_grpo_loss(
    name: str, shape: str, batches: Callable[[str], Batch], measure: Callable[..., None]
) -> None:
    batch = batches(shape)
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), eager(batch))
    run = step(IMPLEMENTATIONS[name], batch)
    measure(run, rounds=21 if name == "r1kernels" else 3, op="grpo_loss", shape=shape, implementation=name)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def bench_overhead(name: str, measure: Callable[..., None]) -> None:
    """8 x 16 tokens over 64 ids: nothing but call overhead."""
    run = step(IMPLEMENTATIONS[name], make_batch(Shape(8, 16, 64)))
    measure(run, rounds=2000, op="grpo_loss", shape="8 x 16 x 64, overhead", implementation=name)

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
def bench_grpo_loss(shape: str, batches: Callable[[str], Batch], in_turns: Callable[..., object]) -> None:
    batch = batches(shape)
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), eager(batch))
    candidates = {name: step(implementation, batch) for name, implementation in IMPLEMENTATIONS.items()}
    in_turns(candidates, op="grpo_loss", shape=shape, rounds=11, slow={"torch eager": 3})


def bench_overhead(in_turns: Callable[..., object]) -> None:
    """8 x 16 tokens over 64 ids: nothing but call overhead."""
    batch = make_batch(Shape(8, 16, 64))
    candidates = {name: step(implementation, batch) for name, implementation in IMPLEMENTATIONS.items()}
    in_turns(candidates, op="grpo_loss", shape="8 x 16 x 64, overhead", rounds=2000)

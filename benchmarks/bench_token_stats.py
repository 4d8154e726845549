"""Log-prob and entropy forward, log-prob backward, from bfloat16 logits: the head of every RL step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import SHAPES, Batch, quietly
from torch import Tensor

import r1kernels

Implementation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def eager(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.float().log_softmax(-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1), entropy


def trl() -> Implementation | None:
    utils = quietly(lambda: __import__("trl.trainer.utils", fromlist=["utils"]))
    if utils is None:
        return None
    return lambda logits, ids: utils.selective_log_softmax_and_entropy(logits, ids, entropy_requires_grad=False)


IMPLEMENTATIONS: dict[str, Callable[[], Implementation | None]] = {
    "r1kernels": lambda: r1kernels.token_logprobs_and_entropy,
    "torch eager": lambda: eager,
    "torch.compile": lambda: torch.compile(eager),
    "TRL 1.16 (CPU path)": trl,
}


def check(implementation: Implementation, batch: Batch) -> None:
    """No number without the equality check: a few rows against float64 (peers' bf16 log-probs are that coarse)."""
    with torch.no_grad():
        logprobs, _ = implementation(batch.logits[:1, :8], batch.token_ids[:1, :8])
        exact, _ = eager(batch.logits[:1, :8].double(), batch.token_ids[:1, :8])
    torch.testing.assert_close(logprobs.double(), exact.double(), rtol=2**-8, atol=1e-5)


def step(implementation: Implementation, batch: Batch) -> Callable[[], None]:
    grad = torch.ones_like(batch.advantages.unsqueeze(-1).expand(batch.token_ids.shape))

    def run() -> None:
        batch.logits.grad = None
        logprobs, _ = implementation(batch.logits, batch.token_ids)
        logprobs.backward(grad.to(logprobs.dtype))

    return run


@pytest.mark.parametrize("shape", SHAPES)
def bench_token_stats(shape: str, batches: Callable[[str], Batch], in_turns: Callable[..., object]) -> None:
    """The copy of the logits is the ceiling: one read and one write of them into memory that is already mapped."""
    batch = batches(shape)
    candidates: dict[str, Callable[[], object]] = {}
    for name, load in IMPLEMENTATIONS.items():
        if (implementation := load()) is not None:
            check(implementation, batch)
            candidates[name] = step(implementation, batch)
    logits = batch.logits.detach()
    target = torch.empty_like(logits)
    candidates["copy of the logits"] = lambda: target.copy_(logits)
    slow = {name: 3 for name in IMPLEMENTATIONS if name != "r1kernels"}
    in_turns(candidates, op="token_stats", shape=shape, rounds=11, slow=slow)

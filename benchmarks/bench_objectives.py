"""What objectives cost beside `grpo` from hidden states, forward and backward, and a filter beside no filter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bench_linear_grpo_loss import HEADS, HeadBatch, gradients, make_batch, ours, step
from torch import Tensor

import r1kernels
from r1kernels import Objective, objectives


def clip_by_hand(logprobs: Tensor, entropies: Tensor, tokens: r1kernels.PolicyBatch) -> Tensor:
    ratio = (logprobs - tokens.old_logprobs).exp()
    return -torch.min(ratio * tokens.advantages, ratio.clamp(0.8, 1.2) * tokens.advantages)


def clip_of_the_batch(logprobs: Tensor, batch: r1kernels.PolicyBatch) -> Tensor:
    return clip_by_hand(logprobs, batch.entropy, batch)


def with_objective(objective: Objective) -> Callable[[HeadBatch], Tensor]:
    def loss(batch: HeadBatch) -> Tensor:
        options = {"ref_logprobs": batch.old_logprobs + 0.01} if objective.kl_coef else {}
        return ours(batch, objective=objective, **options)

    return loss


def top_entropy(batch: HeadBatch) -> Tensor:
    """Statistics of all tokens, then the loss of a fifth of them."""
    with torch.no_grad():
        entropy = r1kernels.linear_token_logprobs_and_entropy(batch.hidden, batch.weight, batch.token_ids)[1]
    return ours(batch, importance_weights=r1kernels.high_entropy_filter(entropy))


@pytest.mark.parametrize("shape", HEADS)
def bench_objectives(shape: str, in_turns: Callable[..., object]) -> None:
    """Every token has a gradient. The bar is 1.05 times `grpo`."""
    batch = make_batch(HEADS[shape])
    losses = {
        "grpo": with_objective(objectives.grpo()),
        "token_local": with_objective(Objective.token_local(clip_by_hand, aggregate="sequence_mean")),
        "dppo": with_objective(objectives.dppo(aggregate="sequence_mean")),
        "KL times ratio": with_objective(objectives.grpo(kl_coef=0.04, kl_ratio=True)),
        "callable, two phases": with_objective(Objective(surrogate=clip_of_the_batch)),
    }
    exact = gradients(losses["grpo"], batch)
    for name in ("token_local", "callable, two phases"):
        for found, expected in zip(gradients(losses[name], batch), exact, strict=True):
            assert (found - expected).norm() <= 0.01 * expected.norm(), name
    in_turns({name: step(loss, batch) for name, loss in losses.items()}, op="objectives", shape=shape, rounds=7,
             slow={"callable, two phases": 3})


@pytest.mark.parametrize("shape", HEADS)
def bench_token_filter(shape: str, in_turns: Callable[..., object]) -> None:
    """A fifth of the tokens, those of highest entropy. The bar is 0.6 times two phases of all tokens."""
    batch = make_batch(HEADS[shape])
    whole = with_objective(Objective(surrogate=clip_of_the_batch))
    with torch.no_grad():
        entropy = r1kernels.linear_token_logprobs_and_entropy(batch.hidden, batch.weight, batch.token_ids)[1]
    kept = r1kernels.high_entropy_filter(entropy)
    assert abs(float(kept.mean()) - 0.2) < 0.01

    def masked(batch: HeadBatch) -> Tensor:
        return ours(batch, objective=Objective(surrogate=clip_of_the_batch), importance_weights=kept)

    for found, expected in zip(gradients(top_entropy, batch), gradients(masked, batch), strict=True):
        assert (found - expected).norm() <= 0.01 * expected.norm()
    candidates = {"two phases of all tokens": step(whole, batch), "top 20 % of entropy": step(top_entropy, batch)}
    in_turns(candidates, op="token_filter", shape=shape, rounds=7)

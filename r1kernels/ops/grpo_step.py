r"""The fused GRPO step: the policy loss and its gradient from one read and one write of the logits, on NVIDIA GPUs.

    loss = sum_t w_t (iw_t surrogate_t + kl_coef kl_t - entropy_coef H_t),  d logits by way of g_t = dloss/dl_t

If a token's loss depends only on its own log-prob, the gradient of its row can be written while the row is still on
the chip; the weights w_t depend only on the mask. The forward computes the gradient of the loss itself. If the backward
receives a factor other than 1, it multiplies the gradient by it, which is one more read and write.

The oracle of this operation is `r1kernels.ops.grpo_loss` on any other implementation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1kernels import _library, objectives
from r1kernels.ops._autograd import differentiable_once, graph_is_kept, origin_of
from r1kernels.ops.policy_inputs import LossInputs
from r1kernels.ops.policy_loss import coefficients_of, kl_number

# Why the operator itself does not fuse its passes, by the numbers of `Unfused` in csrc/cuda/grpo_step.h. The passes
# then read the logits twice.
PASSES = {
    1: "the GPU has no clusters of blocks, or little shared memory (compute capability below 9, and 12)",
    2: "logits and gradient differ in memory layout or in alignment to 16 bytes",
    3: "a row is so long that a multiprocessor cannot hold two blocks of it",
    4: "the CUDA runtime does not launch such clusters",
}


class Tile(NamedTuple):
    """How the operator cuts a row: `cluster` blocks take it, a processor has the shared memory of `blocks` blocks, and
    the device runs so many `clusters` at once. `passes` says why separate passes replace the fused kernel; it is empty
    if they do not."""

    cluster: int
    blocks: int
    clusters: int
    passes: str


def chosen_tile(logits: Tensor, grad_logits: Tensor | None = None) -> Tile:
    """How the operator serves logits on a GPU. The gradient is contiguous unless another one is given."""
    if grad_logits is None:
        grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    *sizes, unfused = torch.ops.r1kernels_cuda.grpo_step_tile.default(logits, grad_logits)
    return Tile(*sizes, PASSES.get(unfused, f"reason {unfused}") if unfused else "")


def _kernel(
    logits: Tensor, token_ids: Tensor, inputs: LossInputs, temperature: float, grad_logits: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics, log-probs, entropy); the gradient goes to grad_logits."""
    batch, normalizer, objective, _ = inputs
    return _library.call(
        torch.ops.r1kernels.grpo_step.default,
        logits,
        token_ids,
        batch.advantages,
        batch.old_logprobs,
        batch.ref_logprobs,
        batch.mask,
        batch.cu_seqlens,
        batch.importance_weights,
        normalizer,
        temperature,
        objectives.SURROGATES.index(objective.surrogate),
        kl_number(objective),
        objectives.AGGREGATES.index(objective.aggregate),
        *coefficients_of(objective),
        [],
        grad_logits,
    )


class _GrpoStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, token_ids: Tensor, inputs: LossInputs, temperature: float, origin: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        loss, metrics, _, _ = _kernel(logits, token_ids, inputs, temperature, grad_logits)
        ctx.save_for_backward(grad_logits, origin)
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_logits, _ = ctx.saved_tensors
        # If the backward may run again, it must not change the stored gradient.
        out = torch.empty_like(grad_logits) if graph_is_kept() else grad_logits
        # Only this version of `scaled` checks the factor first: a factor of 1 costs only the launch.
        torch.ops.r1kernels_cuda.scaled.default(grad_logits, grad_loss, out, False)
        return out, None, None, None, None


def grpo_step(logits: Tensor, token_ids: Tensor, inputs: LossInputs, temperature: float) -> tuple[Tensor, Tensor]:
    """(loss, metrics) of checked inputs; the loss is differentiable with respect to logits."""
    return _GrpoStep.apply(logits, token_ids, inputs, temperature, origin_of(logits))

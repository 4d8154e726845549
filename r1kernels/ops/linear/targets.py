r"""Losses of one or several targets of each token from hidden states, in one walk over the chunks.

The logits of a row are computed once for all of its D targets, and d logits is the sum of their gradients: 3 products
for any D. With factors that are known beforehand, gradients are computed with the losses. Several sums may have factors
that only the backward knows. If these are equal (`losses.sum()`), they scale the gradients; if not, backward computes
the logits again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r1kernels import _library
from r1kernels.ops._autograd import differentiable_once, origin_of
from r1kernels.ops._checks import accumulator_dtype, values_are_free
from r1kernels.ops.linear.gradients import Targets, rounded
from r1kernels.ops.linear.head import Chunk, Head, Needs
from r1kernels.ops.linear.options import Call, Constants
from r1kernels.ops.linear.precision import without_autocast
from r1kernels.ops.linear.rows import active_rows
from r1kernels.ops.linear.walk import Walk
from r1kernels.ops.shards import Shard
from r1kernels.ops.target_terms import TargetTerms

# ---- the walks --------------------------------------------------------------------------------------------


def _ids(chunk: Chunk, targets: Tensor) -> Tensor:
    """The targets of a chunk's rows (n, D)."""
    if len(targets) == 1:  # those of the chunk are ids of the shard
        return chunk.token_ids[:, None]
    ids = targets[:, chunk.rows].t()
    return (ids if chunk.valid is None else torch.where(chunk.valid[:, None], ids, 0)).contiguous()


def _statistics(walk: Walk, chunk: Chunk, ids: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """The log-probs of the targets (n, D), the log-sum-exp (n,) float64, and if it is wanted, the mean of z (n,)."""
    if ids.shape[1] == 1:
        logprobs, lse, entropy, more = walk.statistics(chunk, wanted)
        if walk.shard is not None:
            logprobs, lse, _ = walk.shard.merged(logprobs, lse, entropy, chunk.rows)
        return logprobs[:, None], lse, walk.mean_logit(more[1]) if wanted else more[1]
    # A kernel adds its token to the sum in float64. With the likeliest target there, z - lse is exact near 0, too.
    x = chunk.logits.gather(1, ids)
    best = ids.gather(1, x.argmax(1, keepdim=True))
    _, lse, _, more = walk.statistics(chunk._replace(token_ids=best.squeeze(1)), wanted)
    t = walk.head.kernel_temperature
    t = t if chunk.temperatures is None else t * chunk.temperatures.double()[:, None]
    return (x.double() / t - lse[:, None]).clamp(max=0), lse, more[1]


@without_autocast
def run_targets(
    head: Head, hidden: Tensor, wanted: Tensor | None, targets: Tensor, weights: Tensor | None, terms: TargetTerms,
    needs: Needs, shard: Shard | None = None,
) -> tuple[Tensor, ...]:
    """(losses (D, N), log-sum-exp (N,)), 0 where `wanted` is False; and with any needs, the gradients of
    sum weights loss.

    Args:
        targets: (D, N), ids of the vocabulary. The head has the first ones. weights: (D, N).
        shard: the ids are those of the head; D is 1.
    """
    walk = Walk(head, active_rows(hidden, wanted, head.capacity), needs, shard=shard)
    losses = torch.zeros(len(targets), walk.rows.padded, dtype=walk.accumulator, device=walk.device)
    log_sums = walk.per_token(torch.float64)
    for chunk in walk.chunks():
        ids = _ids(chunk, targets)
        logprobs, lse, mean = _statistics(walk, chunk, ids, terms.wanted)
        losses[:, chunk.write] = terms.losses(logprobs, lse, mean).t().to(losses.dtype)
        log_sums[chunk.write] = lse
        if any(needs):
            walk.targets_backward(chunk, lse, terms.slopes(ids, weights[:, chunk.rows].t(), lse, walk.vocab))
    return losses[:, : walk.rows.total].contiguous(), walk.trim(log_sums), *walk.gradients()


@without_autocast
def run_targets_backward(
    head: Head, hidden: Tensor, targets: Tensor, lse: Tensor, grads: Tensor, terms: TargetTerms,
    weight_dtype: torch.dtype, needs: Needs, shard: Shard | None = None,
) -> tuple[Tensor, ...]:
    """The gradients from those of the losses (D, N). Recomputes the logits of rows with a gradient."""
    walk = Walk(head, active_rows(hidden, (grads != 0).any(0), head.capacity), needs, weight_dtype, shard)
    for chunk in walk.chunks():
        ids, log_sums = _ids(chunk, targets), lse[chunk.rows]
        walk.targets_backward(chunk, log_sums, terms.slopes(ids, grads[:, chunk.rows].t(), log_sums, walk.vocab))
    grad_hidden, grad_weight, *others = walk.gradients()
    return grad_hidden, rounded(grad_weight, weight_dtype) if needs.weight else grad_weight, *others


# ---- the operators ----------------------------------------------------------------------------------------

_FIELDS = len(Head._fields)


@torch.library.impl("r1kernels::linear_targets", "CompositeExplicitAutograd")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    head, (mask, targets, weights, *terms, needs) = Head(*args[:_FIELDS]), args[_FIELDS:]
    return run_targets(head, hidden, mask, targets, weights, TargetTerms(*terms), Needs(*needs))


@torch.library.impl("r1kernels::linear_targets_backward", "CompositeExplicitAutograd")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    head, (targets, lse, grads, *terms, dtype, needs) = Head(*args[:_FIELDS]), args[_FIELDS:]
    return run_targets_backward(head, hidden, targets, lse, grads, TargetTerms(*terms), dtype, Needs(*needs))


def _forward(
    head: Head, hidden: Tensor, wanted: Tensor | None, targets: Tensor, weights: Tensor | None, terms: TargetTerms,
    needs: Needs, shard: Shard | None,
) -> tuple[Tensor, ...]:
    if shard is not None:
        return run_targets(head, hidden, wanted, targets, weights, terms, needs, shard)
    operator = torch.ops.r1kernels.linear_targets.default
    return _library.call(operator, hidden, *head, wanted, targets, weights, *terms, list(needs))


class _Saved:
    """What a backward needs to compute the logits again."""

    @staticmethod
    def keep(ctx: Any, head: Head, shard: Shard | None, terms: TargetTerms) -> None:
        ctx.head, ctx.shard, ctx.terms = head._replace(token_ids=None, temperatures=None), shard, terms

    @staticmethod
    def backward(ctx: Any, saved: tuple[Tensor | None, ...], grads: Tensor) -> list[Tensor | None]:
        """saved: the five tensors, token_ids, temperatures, targets, lse. grads: (D, N), of the losses."""
        hidden, *others, token_ids, temperatures, targets, lse = saved
        head = ctx.head._replace(token_ids=token_ids, temperatures=temperatures).with_tensors(*others)
        into = ctx.targets.into
        # What is added to other memory is not rounded before.
        weight_dtype = ctx.targets.shapes[1][1] if into is None else accumulator_dtype(hidden.dtype)
        needs = Needs(*ctx.needs_input_grad[:5])
        if ctx.shard is None:
            operator = torch.ops.r1kernels.linear_targets_backward.default
            results = _library.run(operator, hidden, *head, targets, lse, grads, *ctx.terms, weight_dtype, list(needs))
        else:
            results = run_targets_backward(
                head, hidden, targets, lse, grads, ctx.terms, weight_dtype, needs, ctx.shard
            )
        return ctx.targets._replace(needs=needs).finished(results, None)


# ---- autograd ---------------------------------------------------------------------------------------------


class _TwoPhases(torch.autograd.Function):
    """Losses (D, N). Backward computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None,
        lora_b: Tensor | None, constants: Constants, wanted: Tensor | None, targets: Tensor, terms: TargetTerms,
    ) -> Tensor:
        head, into, shard = constants
        tensors = (hidden, weight, bias, lora_a, lora_b)
        ctx.targets = Targets.of(ctx.needs_input_grad, tensors, into)
        none = Needs(False, False, False, False, False)
        losses, lse, *_ = _forward(head.with_tensors(*tensors[1:]), hidden, wanted, targets, None, terms, none, shard)
        ctx.save_for_backward(*tensors, head.token_ids, head.temperatures, targets, lse)
        _Saved.keep(ctx, head, shard, terms)
        return losses

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_Saved.backward(ctx, ctx.saved_tensors, grads.contiguous()), *[None] * 4


class _OnePass(torch.autograd.Function):
    """Sums (K,) of weights loss over K equal parts of the losses, whose gradients are computed with them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None,
        lora_b: Tensor | None, constants: Constants, wanted: Tensor | None, targets: Tensor, terms: TargetTerms,
        weights: Tensor, parts: int, origin: Tensor | None,
    ) -> Tensor:
        head, into, shard = constants
        tensors = (hidden, weight, bias, lora_a, lora_b)
        ctx.targets = Targets.of(ctx.needs_input_grad, tensors, into)
        losses, lse, *grads = _forward(
            head.with_tensors(*tensors[1:]), hidden, wanted, targets, weights, terms, ctx.targets.needs, shard
        )
        again = (*tensors, head.token_ids, head.temperatures, targets, lse, weights) if parts > 1 else ()
        ctx.save_for_backward(*grads, origin, *again)
        _Saved.keep(ctx, head, shard, terms)
        # Behind the mask, a loss may be anything.
        return torch.where(weights == 0, 0, weights * losses).reshape(parts, -1).sum(-1)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, factors: Tensor) -> tuple[Tensor | None, ...]:
        (*grads, _), again = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        if _are_equal(factors):
            results = ctx.targets.finished(grads, factors[0])
        else:
            *saved, weights = again
            of_losses = weights.reshape(len(factors), -1) * factors[:, None]
            results = _Saved.backward(ctx, tuple(saved), of_losses.reshape(weights.shape))
        return *results, *[None] * 7


def _are_equal(factors: Tensor) -> bool:
    """Whether all factors are known to be equal, without a synchronisation. The gradient of a sum is one number in
    memory."""
    if len(factors) == 1 or factors.stride(0) == 0:
        return True
    return values_are_free(factors) and bool((factors == factors[0]).all())


def target_losses(call: Call, wanted: Tensor | None, targets: Tensor, terms: TargetTerms) -> Tensor:
    """Losses (D, N) of targets (D, N), differentiable; 0 where `wanted` (N,) is False."""
    return _TwoPhases.apply(*call.tensors, call.constants, wanted, targets, terms)


def target_sums(
    call: Call, wanted: Tensor | None, targets: Tensor, terms: TargetTerms, weights: Tensor, parts: int
) -> Tensor:
    """Sums (K,) of weights loss over K = `parts` equal parts of the losses (D, N), differentiable."""
    return _OnePass.apply(
        *call.tensors, call.constants, wanted, targets, terms, weights, parts, origin_of(*call.tensors)
    )

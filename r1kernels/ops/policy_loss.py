r"""The policy-gradient loss of a batch of sequences, from [tokens]-sized inputs.

    loss = sum_t w_t (iw_t surrogate_t + kl_coef kl_t - entropy_coef H_t)        (r_t kl_t with `kl_ratio`)

`w_t` is the reduction weight of `Objective.aggregate`; the surrogates and the KL estimators are those of
`Objective`. With the loss, the kernels return dloss/dlogprob and dloss/dentropy of each token, so backward is only a
product. The arithmetic of one token is in csrc/common/objective.h.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1kernels import _dispatch, _library, objectives
from r1kernels.objectives import Objective
from r1kernels.ops import policy_loss_reference
from r1kernels.ops._autograd import differentiable_once, origin_of
from r1kernels.ops._checks import accumulator_dtype, check_floating, check_shape
from r1kernels.ops.policy_inputs import CustomObjective, LossInputs, check_inputs
from r1kernels.ops.policy_loss_reference import PolicyBatch, Sequences
from r1kernels.ops.sequence_group import checked_sequence_group, whole_metrics

# In the order of `enum Metric` in csrc/common/objective.h.
METRICS = (
    "tokens",
    "sequences",
    "surrogate_loss",
    "kl",
    "entropy",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "approx_kl",
    "clip_fraction",
    "clip_low_fraction",
    "clip_high_fraction",
    "ratio_cap_fraction",
    "active_fraction",
    "nonfinite_tokens",
)


class PolicyLoss(NamedTuple):
    """`loss`: 0-d, float32, differentiable. `metrics`: name -> 0-d float32 tensor on the loss's device.

    Means are over counted tokens. `tokens`, `sequences`: how many there are. `surrogate_loss`: the loss without
    its KL and entropy terms. `kl`: the estimate of KL(pi || ref), r k if `kl_ratio` (with `ref_logprobs`). `entropy`
    (if it is known). `ratio_mean`, `ratio_min`, `ratio_max`; `approx_kl`: mean of r - 1 - log r, how far the policy
    moved since the rollout. `clip_fraction` and its parts `clip_low_fraction`, `clip_high_fraction`,
    `ratio_cap_fraction`: tokens on which a bound holds. It removes the gradient of their surrogate; only in CISPO and
    with DPPO's cap it limits the gradient, and IPO keeps that of (log r)^2. A callable's bounds are unknown, so these
    four are absent. No bound holds on a token of importance weight 0, as on one of advantage 0. `active_fraction`:
    tokens with any gradient (NaN for a callable while autograd is off or torch.compile traces it). `nonfinite_tokens`:
    tokens whose loss or gradient is inf or NaN; they are the reason for a loss or gradient that is inf or NaN.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def coefficients_of(objective: Objective) -> tuple[float, ...]:
    """The numbers of an objective in the order of the operators, from clip_low to max_length. VESPO has no bounds: its
    powers take their places."""
    vespo = objective.surrogate == "vespo"
    return (
        objective.power_neg if vespo else objective.clip_low,
        objective.power_pos if vespo else objective.clip_high,
        math.inf if objective.ratio_cap is None else objective.ratio_cap,
        objective.tau_pos,
        objective.tau_neg,
        objective.kl_coef,
        objective.entropy_coef,
        objective.max_length or 1,
    )


def kl_number(objective: Objective) -> int:
    """The KL term's number for the operators: 1, 2, 3 for k1, k2, k3, and 3 more if the ratio multiplies it."""
    return objectives.KL_ESTIMATORS.index(objective.kl) + (4 if objective.kl_ratio else 1)


def _kernel(
    logprobs: Tensor, entropy: Tensor | None, batch: PolicyBatch, normalizer: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, dloss/dlogprobs, dloss/dentropy or (0,), metrics)."""
    return _library.call(
        torch.ops.r1kernels.policy_loss.default,
        logprobs,
        batch.advantages,
        batch.old_logprobs,
        batch.ref_logprobs,
        entropy,
        batch.mask,
        batch.cu_seqlens,
        batch.importance_weights,
        normalizer,
        objectives.SURROGATES.index(objective.surrogate),
        objectives.RATIOS.index(objective.ratio),
        kl_number(objective),
        objectives.AGGREGATES.index(objective.aggregate),
        *coefficients_of(objective),
    )


def entropy_scale(inputs: LossInputs, sequences: Sequences, counts: Tensor) -> Tensor | None:
    """By what the entropy of each token (N,) is multiplied so that its term is a mean, or None for 1.

    Under "constant", it is the mean over sequences of the mean over their tokens: `entropy_coef` then does not depend
    on `max_length`, nor on the lengths of sequences. The denominator is max_length times their number.
    """
    objective = inputs.objective
    if objective.aggregate != "constant" or objective.entropy_coef == 0:
        return None
    return (float(objective.max_length or 1) / sequences.lengths(counts))[sequences.index]


class _Weighed(NamedTuple):
    """The entropy as the kernels get it, and how its metric is restored."""

    entropy: Tensor | None
    mean: Tensor | None  # of the true entropies

    @staticmethod
    def of(logprobs: Tensor, entropy: Tensor | None, inputs: LossInputs) -> _Weighed:
        objective, batch = inputs.objective, inputs.batch
        if entropy is None or objective.aggregate != "constant" or objective.entropy_coef == 0:
            return _Weighed(entropy, None)
        mask = torch.ones_like(logprobs, dtype=torch.bool) if batch.mask is None else batch.mask
        counts = mask.reshape(-1).to(entropy.dtype)
        scale = entropy_scale(inputs, Sequences(logprobs, batch.cu_seqlens, inputs.group), counts)
        assert scale is not None
        mean = torch.where(mask, entropy.detach(), 0).sum() / counts.sum().clamp(min=1)
        return _Weighed(entropy * scale.reshape(entropy.shape), mean)

    def restored(self, metrics: Tensor) -> Tensor:
        if self.mean is None:
            return metrics
        place = METRICS.index("entropy")
        return torch.cat([metrics[:place], self.mean.to(metrics.dtype)[None], metrics[place + 1 :]])


def _by_autograd(logprobs: Tensor, entropy: Tensor | None, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """(loss, metrics) by plain PyTorch, differentiable."""
    batch, normalizer, objective, group = inputs
    if group is not None or objective.surrogate == "gmpo":
        return _in_float64(logprobs, entropy, inputs)
    return policy_loss_reference.reference(logprobs, batch._replace(entropy=entropy), normalizer, objective)


def measure(logprobs: Tensor, entropy: Tensor | None, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """(loss, metrics) as values. Plain PyTorch runs without autograd here, so torch.compile can trace it."""
    weighed = _Weighed.of(logprobs, entropy, inputs)
    loss, metrics = _measured(logprobs, weighed.entropy, inputs)
    return loss, weighed.restored(metrics)


def _measured(logprobs: Tensor, entropy: Tensor | None, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    batch, normalizer, objective, group = inputs
    if objective.is_token_local:  # autograd says which tokens have a gradient
        assert entropy is not None
        with torch.enable_grad():
            logprobs, entropy = (value.detach().requires_grad_() for value in (logprobs, entropy))
            loss, metrics = _by_autograd(logprobs, entropy, inputs)
        return loss.detach(), metrics
    if group is not None:
        return _in_float64(logprobs, entropy, inputs)
    if _dispatch.select(logprobs) == "reference":
        batch = batch._replace(entropy=entropy)
        return policy_loss_reference.reference(logprobs, batch, normalizer, objective)
    loss, _, _, metrics = _kernel(logprobs, entropy, batch, normalizer, objective)
    return loss, metrics


def _in_float64(logprobs: Tensor, entropy: Tensor | None, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """(loss, metrics) of this rank's tokens. In float64, sums do not round, over ranks or in another order."""
    def wide(value: Any) -> Any:
        return value.double() if value is not None and value.is_floating_point() else value

    batch = PolicyBatch(*map(wide, inputs.batch._replace(entropy=entropy)))
    loss, metrics = policy_loss_reference.reference(
        logprobs.double(), batch, wide(inputs.normalizer), inputs.objective, inputs.group
    )
    return loss.to(logprobs.dtype), metrics.to(logprobs.dtype)


def evaluate(
    logprobs: Tensor, entropy: Tensor | None, inputs: LossInputs
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(loss, dloss/dlogprobs, dloss/dentropy or None, metrics) as values, for losses that apply the chain rule."""
    batch, normalizer, objective, _ = inputs
    if _dispatch.select(logprobs) != "reference":
        loss, g, eta, metrics = _kernel(logprobs, entropy, batch, normalizer, objective)
        return loss, g, eta if objective.entropy_coef != 0 else None, metrics
    with torch.enable_grad():
        wanted = [value.detach().requires_grad_() for value in (logprobs, entropy) if value is not None]
        loss, metrics = policy_loss_reference.reference(
            wanted[0], batch._replace(entropy=None if entropy is None else wanted[1]), normalizer, objective
        )
        grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return loss.detach(), grads[0], grads[1] if objective.entropy_coef != 0 else None, metrics


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logprobs: Tensor, entropy: Tensor | None, batch: PolicyBatch, normalizer: Tensor | None,
        objective: Objective, origin: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        loss, grad_logprobs, grad_entropy, metrics = _kernel(logprobs, entropy, batch, normalizer, objective)
        ctx.save_for_backward(grad_logprobs, grad_entropy, origin)
        ctx.with_entropy = objective.entropy_coef != 0
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropy, _ = ctx.saved_tensors
        grad_entropy = _scaled(grad_entropy, grad_loss) if ctx.with_entropy else None
        return _scaled(grad_logprobs, grad_loss), grad_entropy, None, None, None, None


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor, but 0 where grad is 0: a factor of inf or NaN must not give masked tokens a gradient."""
    return torch.where(grad == 0, grad, grad * factor)


def compute(logprobs: Tensor, entropy: Tensor | None, inputs: LossInputs) -> PolicyLoss:
    """The loss from checked inputs; `logprobs` and `entropy` in the compute dtype."""
    batch, normalizer, objective, group = inputs
    if objective.entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy is None, expected a tensor: objective.entropy_coef is {objective.entropy_coef}")
    weighed = _Weighed.of(logprobs, entropy, inputs)
    entropy = weighed.entropy
    if group is not None or _dispatch.choose("policy_terms", logprobs, objective).implementation == "autograd":
        loss, metrics = _by_autograd(logprobs, entropy, inputs)
    else:
        loss, metrics = _PolicyLoss.apply(
            logprobs.contiguous(), None if entropy is None else entropy.contiguous(), batch, normalizer, objective,
            origin_of(logprobs, entropy),
        )
    return named(loss, weighed.restored(metrics), inputs, entropy=entropy is not None)


def over_ranks(result: PolicyLoss, group: Any) -> PolicyLoss:
    """The loss with the metrics of all ranks that have tokens of the same sequences."""
    return result if group is None else result._replace(metrics=whole_metrics(result.metrics, group))


def named(loss: Tensor, metrics: Tensor, inputs: LossInputs, *, entropy: bool) -> PolicyLoss:
    bounds = not callable(inputs.objective.surrogate)
    kl = inputs.batch.ref_logprobs is not None
    return PolicyLoss(loss, named_metrics(metrics, kl=kl, entropy=entropy, bounds=bounds))


def named_metrics(metrics: Tensor, *, kl: bool, entropy: bool, bounds: bool = True) -> dict[str, Tensor]:
    """The metrics (METRICS,) that were measured, by name."""
    absent = {name for name, there in (("kl", kl), ("entropy", entropy)) if not there}
    if not bounds:
        absent.update(name for name in METRICS if name.startswith(("clip_", "ratio_cap_")))
    named = zip(METRICS, metrics.unbind(0), strict=True)
    return {name: value for name, value in named if name not in absent}


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    importance_weights: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    objective: Objective | CustomObjective = objectives.grpo(),  # noqa: B008 - frozen
    sequence_group: torch.distributed.ProcessGroup | None = None,
) -> PolicyLoss:
    r"""Policy-gradient loss of a batch of sequences, with every metric, in one pass over the tokens.

        loss = sum_t w_t (iw_t surrogate_t + kl_coef kl_t - entropy_coef H_t)

    Args:
        logprobs: (B, T), or packed (N,) with `cu_seqlens`; float, computed in float32 (float64 if given so).
        advantages: (B,) / (S,) per sequence, or per token with the shape of logprobs; per sequence where S = N.
        old_logprobs: the shape of logprobs: log-probs at the time of the rollout. None: on-policy, ratio exactly 1.
        ref_logprobs: the shape of logprobs: log-probs of the reference model. Required iff `objective.kl_coef != 0`;
            otherwise they only measure the KL.
        entropy: the shape of logprobs. Required iff `objective.entropy_coef != 0`; otherwise it is only measured.
        mask: the shape of logprobs, True or nonzero = counts. Values where it is False do not matter, not even NaN.
        cu_seqlens: (S + 1,), int64 or int32, 0 = first, ascending, last = N. Packed tokens do not need it if the
            objective does not depend on sequences (token ratio and token mean).
        importance_weights: like `advantages`; multiplies the surrogate only (train/rollout mismatch correction). 0
            rejects a token, even one whose ratio has overflowed.
        normalizer: 0-d tensor or number > 0; replaces the denominator: the number of sequences ("sequence_mean"), of
            counted tokens ("token_mean"), or sequences * max_length ("constant"). Pass the global number under gradient
            accumulation or data parallelism; the summed gradient then equals that of the whole batch.
        objective: an `Objective` (see `r1kernels.objectives`), or a callable `(logprobs, batch) -> per-token loss`
            with the shape of logprobs, averaged over counted tokens and differentiated by autograd; `batch` is a
            `PolicyBatch`. `Objective(surrogate=callable, ...)` adds KL, entropy or another aggregate to it, and
            `Objective.token_local` is for functions of single tokens.
        sequence_group: each sequence is split over these ranks (sequence or context parallelism): every rank gives the
            same sequences in the same order, each with the tokens that it has, maybe none. Lengths, means and sequence
            ratios are those of whole sequences. The losses of the ranks add up to that of one process, and so do the
            gradients of shared parameters. The metrics are those of all ranks. See docs/parallel.md.

    Only logprobs and entropy receive gradients; every other input is a constant. Ratio and clip use the same
    conventions as torch: on a bound the gradient flows. An empty sequence adds 0 but still counts in B. A batch
    without counted tokens has loss 0.

    Returns:
        `PolicyLoss(loss, metrics)`.

    Raises:
        TypeError, ValueError: naming the argument, its value and the expectation.

    Memory: 8 bytes a token in addition to the inputs.

    Equivalent to: for `objectives.grpo()`, `(-torch.min(r * A, r.clamp(0.8, 1.2) * A)).mean(1).mean()`.
    Source: the preset's docstring in `r1kernels.objectives`.
    """
    check_floating("logprobs", logprobs)
    dtype = accumulator_dtype(logprobs.dtype)
    if entropy is not None:
        check_floating("entropy", entropy, logprobs)
        check_shape("entropy", entropy, logprobs.shape, "one per token")
        entropy = entropy.to(dtype)
    inputs = check_inputs(
        logprobs,
        tuple(logprobs.shape),
        advantages,
        tokens="logprobs",
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        mask=mask,
        cu_seqlens=cu_seqlens,
        importance_weights=importance_weights,
        normalizer=normalizer,
        objective=objective,
        dtype=dtype,
        group=checked_sequence_group(sequence_group),
    )
    return over_ranks(compute(logprobs.to(dtype), entropy, inputs), inputs.group)

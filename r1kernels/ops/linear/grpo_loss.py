r"""GRPO and related losses from hidden states and the weight of the head.

With a ratio per token, the slope of a token's loss depends only on that token's log-prob. Then one walk over the chunks
does everything: product -> statistics -> slopes -> d logits -> two products. It takes 3 units of 2 N H V
floating-point operations. If only a share k of the tokens has a gradient, it takes 1 + 2 k units, or 3 k if the other
tokens are known beforehand (mask 0, or advantage 0 without KL and entropy terms). Losses of whole sequences, callables
of the whole batch and float16 (whose gradients need the loss scale before they are rounded) need two phases: statistics
of all tokens, then d logits of the tokens with a gradient. The second phase computes their logits again.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from r1kernels import _library, objectives
from r1kernels.objectives import Objective
from r1kernels.ops import token_local
from r1kernels.ops._autograd import differentiable_once, origin_of
from r1kernels.ops._checks import (
    accumulator_dtype,
    check_dtype,
    check_floating,
    check_positive,
    check_shape,
    check_tensor,
)
from r1kernels.ops.linear.dtensor import local_tensors
from r1kernels.ops.linear.gradients import Targets
from r1kernels.ops.linear.head import Head, Needs
from r1kernels.ops.linear.options import Call, Constants, LinearOptions, prepare
from r1kernels.ops.linear.passes import run_one_pass
from r1kernels.ops.linear.token_stats import linear_token_stats
from r1kernels.ops.policy_inputs import CustomObjective, LossInputs, check_inputs
from r1kernels.ops.policy_loss import (
    PolicyLoss,
    coefficients_of,
    compute,
    entropy_scale,
    evaluate,
    kl_number,
    measure,
    named_metrics,
    over_ranks,
)
from r1kernels.ops.policy_loss_reference import PolicyBatch, Sequences, reduction_weights
from r1kernels.ops.sequence_group import checked_sequence_group

# ---- the one-pass operator --------------------------------------------------------------------------------


class TokenObjective(NamedTuple):
    """The inputs of each token's slope, flattened to (N,). `weights` are the weights of the reduction, and
    `entropy_weights` those of the entropy, if they differ."""

    weights: Tensor
    advantages: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    importance_weights: Tensor | None
    entropy_weights: Tensor | None
    objective: Objective

    def arguments(self) -> tuple[Any, ...]:
        """The arguments in the order of the operator `linear_policy_gradient`."""
        o = self.objective
        return *self[:6], objectives.SURROGATES.index(o.surrogate), kl_number(o), *coefficients_of(o)[:-1]

    @staticmethod
    def from_arguments(*arguments: Any) -> TokenObjective:
        tensors, (surrogate, kl, *coefficients) = arguments[:6], arguments[6:]
        clip_low, clip_high, ratio_cap, tau_pos, tau_neg, kl_coef, entropy_coef = coefficients
        objective = Objective(
            surrogate=objectives.SURROGATES[surrogate], clip_low=clip_low, clip_high=clip_high,
            ratio_cap=None if ratio_cap == math.inf else ratio_cap, tau_pos=tau_pos, tau_neg=tau_neg,
            kl=objectives.KL_ESTIMATORS[(kl - 1) % 3], kl_ratio=kl > 3, kl_coef=kl_coef, entropy_coef=entropy_coef,
            aggregate="token_mean",
        )
        return TokenObjective(*tensors, objective=objective)

    @property
    def sparse(self) -> bool:
        """Whether a token's slopes may be 0: a bound may hold, and no other term gives a gradient."""
        o = self.objective
        return (o.is_token_local or o.surrogate in ("clip", "dppo_tv", "dppo_kl")) and o.zero_without_advantage

    def slopes(self, rows: Tensor | slice, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        """(dL/dlogprob, dL/dentropy or None) of some tokens (n,)."""

        def taken(value: Any) -> Any:
            if value is None or not own:
                return None if value is None else value[rows].contiguous()
            return value[rows].clone()  # a function that writes to it is refused, and has not changed the caller's

        own = self.objective.is_token_local
        batch = PolicyBatch(
            taken(self.advantages), taken(self.old_logprobs), taken(self.ref_logprobs), None, None, None,
            taken(self.importance_weights),
        )
        if self.objective.is_token_local:
            g, eta = token_local.slopes(self.objective, logprobs, entropy, batch)
        else:
            one = logprobs.new_ones(())
            _, g, eta, _ = evaluate(logprobs, entropy, LossInputs(batch, one, self.objective))
        weights = self.weights[rows]
        of_entropy = weights if self.entropy_weights is None else self.entropy_weights[rows]
        return g * weights, None if eta is None else eta * of_entropy


@torch.library.impl("r1kernels::linear_policy_gradient", "CompositeExplicitAutograd")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    fields = len(Head._fields)
    head, mask, tokens, needs = Head(*args[:fields]), args[fields], args[fields + 1 : -1], args[-1]
    objective = TokenObjective.from_arguments(*tokens)
    return run_one_pass(head, hidden, mask, objective.slopes, Needs(*needs), sparse=objective.sparse)


class _OnePass(torch.autograd.Function):
    """A loss whose gradients were computed with it, its metrics, and (log-prob, entropy) (N,) of its tokens."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None,
        lora_b: Tensor | None, constants: Constants, wanted: Tensor | None, tokens: TokenObjective,
        whole: LossInputs, shape: tuple[int, ...], origin: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        head, into, shard = constants
        tensors = (hidden, weight, bias, lora_a, lora_b)
        ctx.targets = Targets.of(ctx.needs_input_grad, tensors, into)
        full, needs = head.with_tensors(*tensors[1:]), ctx.targets.needs
        if shard is None and not tokens.objective.is_token_local:  # an operator takes no function
            operator = torch.ops.r1kernels.linear_policy_gradient.default
            results = _library.call(operator, hidden, *full, wanted, *tokens.arguments(), list(needs))
        else:
            results = run_one_pass(full, hidden, wanted, tokens.slopes, needs, sparse=tokens.sparse, shard=shard)
        logprobs, entropy, *grads = results
        loss, metrics = measure(logprobs.reshape(shape), entropy.reshape(shape), whole)
        ctx.save_for_backward(*grads, origin)
        ctx.mark_non_differentiable(metrics, logprobs, entropy)
        return loss, metrics, logprobs, entropy

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        *grads, _ = ctx.saved_tensors
        return *ctx.targets.finished(grads, grad_loss), *[None] * 6


def one_pass_sum(
    call: Call, wanted: Tensor, weights: Tensor, advantages: Tensor, objective: Objective
) -> Tensor:
    """sum_t weights_t loss_t over the tokens where `wanted` (N,) is True, differentiable; without KL or entropy."""
    tokens = TokenObjective(weights, advantages, None, None, None, None, objective)
    batch = PolicyBatch(advantages, None, None, None, wanted, None, weights)
    whole = LossInputs(batch, weights.new_ones(()), objective)
    return _OnePass.apply(
        *call.tensors, call.constants, wanted, tokens, whole, tuple(wanted.shape), origin_of(*call.tensors)
    )[0]


# ---- which tokens are computed, and their weights ---------------------------------------------------------


class _Plan(NamedTuple):
    """`wanted` (N,): tokens whose log-prob is computed, None for all. `tokens`: inputs of the one-pass operator.
    `inputs`: the loss over the computed tokens, which equals the loss over all tokens. `counted`: how many tokens the
    mask counts, if fewer are measured."""

    wanted: Tensor | None
    tokens: TokenObjective | None
    inputs: LossInputs
    counted: Tensor | None


def _plan(inputs: LossInputs, like: Tensor, shape: tuple[int, ...], measure_all: bool) -> _Plan:
    batch, normalizer, objective, group = inputs
    in_chunks = objective.is_token_local and not torch.compiler.is_compiling()  # a graph has no function in an operator
    if callable(objective.surrogate) and not in_chunks:
        return _Plan(None if batch.mask is None else batch.mask.reshape(-1), None, inputs, None)
    check_positive("normalizer", normalizer)
    dtype = batch.advantages.dtype
    probe = like.new_empty((), dtype=dtype).expand(shape)  # no memory: the shape for `Sequences`
    sequences = Sequences(probe, batch.cu_seqlens, group)
    mask = None if batch.mask is None else batch.mask.reshape(-1)
    counts = torch.ones(probe.numel(), dtype=dtype, device=like.device) if mask is None else mask.to(dtype)
    weights = reduction_weights(objective, counts, sequences, normalizer)
    size = torch.Size(shape)

    def per_token(value: Any) -> Any:
        return None if value is None else sequences.per_token(value, size)

    advantages, importance = per_token(batch.advantages), per_token(batch.importance_weights)
    old, ref = (None if value is None else value.reshape(-1) for value in (batch.old_logprobs, batch.ref_logprobs))
    scale = entropy_scale(inputs, sequences, counts)
    tokens = TokenObjective(
        weights, advantages, old, ref, importance, None if scale is None else weights * scale,
        dataclasses.replace(objective, aggregate="token_mean", max_length=None),
    )
    if measure_all or in_chunks or not objective.zero_without_advantage:
        return _Plan(mask, tokens, inputs, None)
    moving = advantages != 0
    if importance is not None:
        moving = moving & (importance != 0)
    if mask is not None:
        moving = moving & mask
    if objective.ratio != "token":  # the ratio of a sequence needs all of its tokens
        moving = sequences.sum(moving.to(dtype))[sequences.index] > 0
        moving = moving if mask is None else moving & mask
    # The tokens left out have loss 0, so the loss is a sum over the others with the weights of the whole batch.
    scaled = weights if importance is None else weights * importance
    part = LossInputs(
        batch._replace(mask=moving.reshape(shape), importance_weights=scaled.reshape(shape)),
        probe.new_ones(()),
        tokens.objective,
        group if objective.ratio != "token" else None,
    )
    return _Plan(moving, tokens, part, counts.sum())


def _metrics(metrics: dict[str, Tensor], plan: _Plan, sequences: int) -> dict[str, Tensor]:
    """Adds the number of measured tokens, and restores the metrics of the whole batch."""
    measured = metrics["tokens"]
    if plan.counted is None:
        return {**metrics, "measured_tokens": measured}
    share = measured / plan.counted.clamp(min=1)
    whole = {
        "tokens": plan.counted.to(measured.dtype),
        "sequences": torch.full_like(measured, sequences),
        **{name: metrics[name] * share for name in metrics if name.endswith("_fraction")},
    }
    # A mean over no tokens is unknown, not 0 or 1.
    unknown = {
        name: torch.where(measured > 0, metrics[name], torch.nan)
        for name in ("kl", "entropy", "ratio_mean", "ratio_min", "ratio_max", "approx_kl") if name in metrics
    }
    return {**metrics, **unknown, **whole, "measured_tokens": measured}


def _check_token_stats(given: Any, hidden: Tensor, token_ids: Tensor) -> None:
    if given is None:
        return
    if not isinstance(given, tuple) or len(given) != 2:
        raise TypeError(f"token_stats_into is a {type(given).__name__}, expected a tuple of two tensors, log-probs and "
                        "entropies")
    for name, value in zip(("logprobs", "entropy"), given, strict=True):
        name = f"token_stats_into {name}"
        check_tensor(name, value, hidden)
        check_shape(name, value, tuple(token_ids.shape), "one value per token")
        check_dtype(name, value, {accumulator_dtype(hidden.dtype): ""})
        if value.requires_grad:
            raise ValueError(f"{name} requires a gradient, expected a tensor that only keeps values")
    if given[0] is given[1]:
        raise ValueError("token_stats_into has the same tensor twice, expected one for log-probs and one for entropies")


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    importance_weights: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    objective: Objective | CustomObjective = objectives.grpo(),  # noqa: B008 - frozen
    measure_all: bool = False,
    token_stats_into: tuple[Tensor, Tensor] | None = None,
    sequence_group: torch.distributed.ProcessGroup | None = None,
    **options: Unpack[LinearOptions],
) -> PolicyLoss:
    r"""Policy-gradient loss from hidden states: `grpo_loss` without a tensor of logits.

        loss = sum_t w_t (iw_t surrogate_t + kl_coef kl_t - entropy_coef H_t),  l_t = log softmax(z_t)[token_t],
        z = softcap(logit_scale (hidden W^T + bias)) / temperature

    Args:
        hidden: (B, T, H), or packed (N, H) with `cu_seqlens`; as in `linear_token_logprobs`. Row t scores token t.
        weight: (V, H), dtype as in `linear_token_logprobs`: the lm_head, or the embedding it is tied to.
        token_ids: (B, T) or (N,), int64 or int32, in [0, V); behind the mask they may hold anything.
        measure_all: also compute the log-probs of tokens whose loss is known to be 0, so that the metrics include
            them. Otherwise, if the objective has neither a KL nor an entropy term, tokens of advantage (or importance
            weight) 0 are not computed: their hidden states may hold anything, and the means in the metrics are over
            `metrics["measured_tokens"]` tokens (NaN if there are none). With the ratio of sequences, this holds for
            sequences of such tokens alone. IPO, `Objective.token_local` and callables always measure every token.
        token_stats_into: (logprobs, entropy), float32 tensors in the shape of token_ids (float64 for float64 hidden).
            They receive what the loss computes anyway, in nats: the log-prob of each token and the entropy of its row,
            0 for tokens that are not computed.
        sequence_group: as in `policy_loss`. hidden, token_ids and all values per token are those of this rank's tokens.
        **options: the keywords of `LinearOptions`.

    The other arguments are those of `policy_loss`. The backward products leave out tokens whose gradient is exactly 0;
    `metrics["active_fraction"]` is the share of the other tokens among the counted ones. On a GPU, a call with a mask,
    or one that may skip advantages of 0, counts its active tokens, which is one synchronisation. A clipped objective
    without KL and entropy terms also synchronises once a chunk to find the tokens whose bound holds. With `capacity`
    there is no synchronisation of either kind, and the products include these tokens.

    Returns:
        `PolicyLoss(loss, metrics)`, with the metric `measured_tokens` and those of `policy_loss`. Gradients are
        computed with the loss if the objective and the dtype (not float16) allow it, and backward only scales them.

    Raises:
        TypeError, ValueError: naming the argument, its value and the expectation.

    Memory: `chunk_bytes`, the weight's gradient in float32 and in its own dtype, the gradient of hidden, and 64 bytes a
    token (without the memory that a callable uses).

    Equivalent to: `grpo_loss(hidden.float() @ weight.float().T, token_ids, advantages, ...)`.
    Source: arXiv 2402.03300; the presets in `r1kernels.objectives` name theirs.
    """
    hidden, weight, options = local_tensors(hidden, weight, options)
    check_floating("hidden", hidden)
    check_tensor("token_ids", token_ids, hidden)
    shape = tuple(token_ids.shape)
    given = check_inputs(
        hidden,
        shape,
        advantages,
        tokens="token_ids",
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        mask=mask,
        cu_seqlens=cu_seqlens,
        importance_weights=importance_weights,
        normalizer=normalizer,
        objective=objective,
        dtype=accumulator_dtype(hidden.dtype),
        group=checked_sequence_group(sequence_group),
    )
    if not isinstance(measure_all, bool):
        raise TypeError(f"measure_all is {measure_all!r}, expected True or False")
    _check_token_stats(token_stats_into, hidden, token_ids)
    plan = _plan(given, hidden, shape, measure_all)
    in_one_pass = plan.tokens is not None and given.objective.ratio == "token"
    call = prepare(
        hidden, weight, token_ids, dict(options), mask=given.batch.mask, wanted=plan.wanted,
        function=f"linear_grpo_loss in {'one pass' if in_one_pass else 'two phases'}",
    )
    sequences = math.prod(shape[:-1]) if given.batch.cu_seqlens is None else given.batch.cu_seqlens.numel() - 1
    if in_one_pass and call.one_pass:
        loss, metrics, logprobs, entropy = _OnePass.apply(
            *call.tensors, call.constants, plan.wanted, plan.tokens, plan.inputs, shape, origin_of(*call.tensors)
        )
        bounds = not plan.inputs.objective.is_token_local
        metrics = named_metrics(metrics, kl=ref_logprobs is not None, entropy=True, bounds=bounds)
    else:
        logprobs, entropy = linear_token_stats(call, plan.wanted)
        loss, metrics = compute(logprobs.reshape(shape), entropy.reshape(shape), plan.inputs)
    for into, value in zip(token_stats_into or (), (logprobs, entropy), strict=False):
        into.copy_(value.detach().reshape(shape))
    return over_ranks(PolicyLoss(loss, _metrics(metrics, plan, sequences)), given.group)

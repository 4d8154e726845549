"""Cross-entropy from hidden states, in the one-pass walk of the linear policy loss. Here its slopes are constants."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from r1kernels import objectives
from r1kernels.ops._checks import accumulator_dtype, check_floating, check_shape, ids_int64
from r1kernels.ops.cross_entropy import check_reduction, denominator, named_targets
from r1kernels.ops.linear.dtensor import local_tensors
from r1kernels.ops.linear.grpo_loss import one_pass_sum
from r1kernels.ops.linear.options import Call, LinearOptions, prepare
from r1kernels.ops.linear.targets import target_losses, target_sums
from r1kernels.ops.linear.token_stats import linear_token_stats
from r1kernels.ops.shards import Split, refusals
from r1kernels.ops.support import refuse_support
from r1kernels.ops.target_terms import TargetTerms


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    z_loss_coef: float = 0.0,
    label_smoothing: float = 0.0,
    **options: Unpack[LinearOptions],
) -> Tensor:
    r"""Negative log-likelihood of targets from hidden states, without a tensor of logits.

        loss = -sum_t log softmax(z_t)[target_t] / (number of targets that are not ignored),
        z = softcap(logit_scale (hidden W^T + bias)) / temperature

    Args:
        hidden: (..., H), as in `linear_token_logprobs`. Row t scores target t: shift before the call.
        weight: (V, H), dtype as in `linear_token_logprobs`.
        targets: (...), int64 or int32, in [0, V) or `ignore_index`. Rows of ignored targets are not computed.
        reduction: "mean", "sum" or "none". With "none" the gradients depend on those of the losses, so backward
            computes the logits again.
        normalizer: 0-d tensor or number > 0; replaces the count in "mean" (gradient accumulation).
        z_loss_coef, label_smoothing: as in `cross_entropy`.
        **options: the keywords of `LinearOptions`.

    Returns:
        0-d, or (...) for "none"; float32, nats. Ignored targets give 0; if all targets are ignored, the mean is 0.

    Raises:
        TypeError, ValueError: naming the argument, its value and the expectation.

    Memory: `chunk_bytes`, the weight's gradient in float32 and in its own dtype, that of hidden, and 64 bytes a token.

    Equivalent to: `cross_entropy(hidden.float() @ weight.float().T, targets)`
    """
    hidden, weight, options = local_tensors(hidden, weight, options)
    group, _ = Split(options.get("process_group"), options.get("vocab_size")).checked()
    with refusals(group, hidden):
        check_reduction(reduction, ignore_index, normalizer)
        terms = TargetTerms.checked(z_loss_coef, label_smoothing)
        if terms.given:
            refuse_support(options, "linear_cross_entropy with z_loss_coef or label_smoothing")
        check_floating("hidden", hidden)
        targets = ids_int64("targets", targets, hidden)
        check_shape("targets", targets, hidden.shape[:-1], "hidden (..., H) score targets (...)")
        mask, dtype = targets != ignore_index, accumulator_dtype(hidden.dtype)
        divisor = denominator(mask, normalizer, dtype) if reduction == "mean" else 1
    call = prepare(hidden, weight, targets, dict(options), tokens="targets", mask=mask, normalizer=normalizer,
                   function=f"linear_cross_entropy with reduction {reduction}{terms}")
    wanted = mask.reshape(-1)
    if reduction == "none" or not call.one_pass:
        if terms.given:
            losses = target_losses(call, wanted, call.head.token_ids[None], terms)
        else:
            losses = -_logprobs(call, wanted)
        losses = torch.where(mask, losses.reshape(targets.shape), 0)
        if reduction == "none":
            return losses
        return losses.sum() / divisor
    if terms.given:
        weights = (wanted.to(dtype) / divisor)[None]
        return target_sums(call, wanted, call.head.token_ids[None], terms, weights, 1)[0]
    ones = torch.ones(wanted.shape, dtype=dtype, device=hidden.device)
    return one_pass_sum(call, wanted, ones / divisor, ones, objectives.reinforce())


def _logprobs(call: Call, wanted: Tensor) -> Tensor:
    try:
        return linear_token_stats(call, wanted)[0]
    except ValueError as error:
        raise ValueError(named_targets(str(error))) from None

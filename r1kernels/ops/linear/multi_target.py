"""Multi-token prediction: cross-entropies of several targets of one head, in one read of each block of the weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from r1kernels import _dispatch
from r1kernels.ops._checks import (
    accumulator_dtype,
    as_mask,
    check_floating,
    check_ids_in_range,
    check_number,
    check_tensor,
    ids_int64,
    values_are_free,
)
from r1kernels.ops.cross_entropy import check_reduction
from r1kernels.ops.linear.dtensor import local_tensors, probes
from r1kernels.ops.linear.options import LinearOptions, prepare
from r1kernels.ops.linear.targets import target_losses, target_sums
from r1kernels.ops.shards import Split, refusals
from r1kernels.ops.support import refuse_support
from r1kernels.ops.target_terms import TargetTerms


def _depths(hidden: Tensor, token_ids: Tensor) -> int:
    """D, if the shapes agree."""
    lead, shape = tuple(hidden.shape[:-1]), tuple(token_ids.shape)
    if hidden.dim() == 0 or len(shape) < 2 or lead not in (shape, shape[1:]) or shape[0] == 0:
        raise ValueError(
            f"token_ids has shape {shape} and hidden {tuple(hidden.shape)}, expected token_ids (D, N) or (D, ..., N) "
            "with D >= 1 depths of N tokens, and hidden of that shape and H, (D, N, H), or without D, (N, H)"
        )
    return shape[0]


def _as_masks(masks: Any, token_ids: Tensor) -> Tensor | None:
    try:
        return as_mask(masks, token_ids, tuple(token_ids.shape))
    except (TypeError, ValueError) as error:  # the argument is called masks here
        raise type(error)(str(error).replace("mask", "masks", 1)) from None


def _divisor(normalizer: Any, counts: Tensor) -> Tensor | float:
    """What the sum of each depth is divided by: (D, 1) or a number."""
    if normalizer is None:
        return counts.sum(-1, keepdim=True).clamp(min=1)
    if not isinstance(normalizer, Tensor):
        return check_number("normalizer", normalizer, minimum=0.0, strict=True)
    check_tensor("normalizer", normalizer, counts)
    depths = len(counts)
    if normalizer.shape not in ((), (depths,)):
        raise ValueError(f"normalizer has shape {tuple(normalizer.shape)}, expected () or ({depths},)")
    if values_are_free(normalizer) and not ((normalizer > 0) & (normalizer < math.inf)).all():
        raise ValueError(f"normalizer is {normalizer.tolist()}, expected positive finite numbers")
    return normalizer.detach().to(counts.dtype).expand(depths)[:, None]


def linear_multi_target(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    masks: Tensor | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    z_loss_coef: float = 0.0,
    label_smoothing: float = 0.0,
    **options: Unpack[LinearOptions],
) -> Tensor:
    r"""Cross-entropy of each of D targets under one head, for multi-token prediction.

        loss_d = -sum_t log softmax(z_dt)[token_dt] / (number of tokens that count at depth d)

    Args:
        hidden: (D, ..., H), the hidden states of each depth, or (..., H) for all depths, where ... has at least one
            dimension. With the same hidden states, the logits are computed once: 3 products in all, not 3 D. dtypes as
            in `linear_token_logprobs`.
        weight: (V, H), dtype as in `linear_token_logprobs`.
        token_ids: (D, ...), int64 or int32, in [0, V): the target of each row at each depth. Depth d predicts the token
            d + 1 positions ahead: shift before the call.
        masks: (D, ...), True or nonzero = counts. Behind it, ids may hold anything, and so may hidden states of rows
            that count at no depth.
        reduction: "mean", "sum" or "none". With "none", backward computes the logits again.
        normalizer: (D,) or 0-d tensor, or number > 0; replaces the counts in "mean" (gradient accumulation).
        z_loss_coef, label_smoothing: as in `cross_entropy`.
        **options: the keywords of `LinearOptions`. A tensor as temperature has the shape of hidden without H. With
            `process_group`, hidden states that all depths share are computed once for each depth.

    Returns:
        (D,), or (D, ...) for "none"; float32, nats; 0 where nothing counts. The weights of the depths are the caller's:
        `losses.sum() * (lambda_ / D)`. Such a common factor scales gradients that were computed with the losses. With
        factors that differ, such as `losses[0] + 0.3 * losses[1:].mean()`, and on a GPU with any that do not come from
        `losses.sum()`, backward computes logits and gradients again. So it does in a graph of `torch.compile` and
        for float16.

    Raises:
        TypeError, ValueError: naming the argument, its value and the expectation.

    Memory: as `linear_cross_entropy`, with D N tokens, and no copy of hidden states or weight for each depth.

    Equivalent to: `torch.stack([linear_cross_entropy(h, weight, t) for h, t in zip(hidden, token_ids)])`
    Source: arXiv 2412.19437, equations 24 and 25.
    """
    hidden, weight, options = local_tensors(hidden, weight, options)
    group, _ = Split(options.get("process_group"), options.get("vocab_size")).checked()
    with refusals(group, hidden):
        check_reduction(reduction, 0, normalizer)
        terms = TargetTerms.checked(z_loss_coef, label_smoothing)
        refuse_support(options, "linear_multi_target")
        check_floating("hidden", hidden)
        token_ids = ids_int64("token_ids", token_ids, hidden)
        depths, shape = _depths(hidden, token_ids), token_ids.shape
        mask, dtype = _as_masks(masks, token_ids), accumulator_dtype(hidden.dtype)
        counts = torch.ones(shape, dtype=dtype, device=hidden.device) if mask is None else mask.to(dtype)
        counts = counts.reshape(depths, -1)
        divisor = _divisor(normalizer, counts) if reduction == "mean" else 1
    shared = hidden.dim() == token_ids.dim()
    if shared and options.get("process_group") is not None:  # a shard knows one token of each row
        hidden, shared = hidden.expand(depths, *hidden.shape), False
        if isinstance(temperature := options.get("temperature"), Tensor):
            options = {**options, "temperature": temperature.expand(shape)}
    function = f"linear_multi_target of {depths} depths with reduction {reduction}{terms}"
    if shared:
        _, vocab_size = Split(None, options.get("vocab_size")).checked()
        check_ids_in_range("token_ids", token_ids, vocab_size or len(probes(weight, options)[1]), mask)
        targets = (token_ids if mask is None else torch.where(mask, token_ids, 0)).reshape(depths, -1)
        wanted = None if mask is None else mask.any(0)
        call = prepare(hidden, weight, targets[0].reshape(shape[1:]), dict(options), mask=wanted, function=function)
        wanted = None if wanted is None else wanted.reshape(-1)
    else:
        call = prepare(hidden, weight, token_ids, dict(options), mask=mask, function=function, normalizer=normalizer)
        wanted, targets = None if mask is None else mask.reshape(-1), call.head.token_ids[None]
    choice = _dispatch.choose("linear_multi_target", call.tensors[0], call.wanted, None)
    if reduction != "none" and choice.implementation == "one_pass":
        weights = (counts / divisor).reshape(targets.shape)
        return target_sums(call, wanted, targets, terms, weights, depths)
    losses = target_losses(call, wanted, targets, terms).reshape(shape)
    losses = losses if mask is None else torch.where(mask, losses, 0)
    return losses if reduction == "none" else (losses.reshape(depths, -1) / divisor).sum(-1)

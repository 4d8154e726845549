"""Cross-entropy from logits, on the same two vocabulary kernels as every other loss."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from r1kernels.ops._checks import (
    accumulator_dtype,
    check_floating,
    check_normalizer,
    check_positive,
    check_shape,
    ids_int64,
)
from r1kernels.ops.shards import Split, refusals
from r1kernels.ops.support import refuse_support
from r1kernels.ops.target_losses import target_losses
from r1kernels.ops.target_terms import TargetTerms
from r1kernels.ops.token_logprobs import logprobs_and_entropy

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    z_loss_coef: float = 0.0,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    process_group: torch.distributed.ProcessGroup | None = None,
    vocab_size: int | None = None,
    support: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    r"""Negative log-likelihood of targets under softmax(logits / temperature).

        loss = sum_t ((1 - eps) (-log p_t[target_t]) + eps mean_v (-log p_t[v]) + c lse_t^2)
               / (number of targets that are not ignored),
        z = logits / T,  p = softmax z,  lse = log sum_v e^{z_v}

    Args:
        logits: (..., V), as in `token_logprobs`. Row t scores target t: shift before the call.
        targets: (...), int64 or int32, in [0, V) or `ignore_index`. Rows of ignored targets are not read.
        reduction: "mean", "sum" or "none".
        normalizer: 0-d tensor or number > 0; replaces the count in "mean" (gradient accumulation).
        z_loss_coef: c >= 0 of the z-loss, which keeps lse near 0.
        label_smoothing: eps from 0 to 1. Its mean over the vocabulary comes from the same read of the logits.
        process_group, vocab_size: logits of a sharded or padded vocabulary, as in `token_logprobs`.
        support: the sets of ids over which targets are scored, as in `token_logprobs`; those of ignored targets may
            hold anything.

    Returns:
        0-d, or (...) for "none"; float32, nats. Ignored targets give 0; if all targets are ignored, the mean is 0
        (torch gives NaN).

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or device, id out of range, unknown reduction.

    Memory: the gradient of logits, and less than 64 bytes a token.

    Equivalent to: `torch.nn.functional.cross_entropy(logits.float().flatten(0, -2), targets.flatten())`, with the same
    `label_smoothing`.
    Source: label smoothing, arXiv 1512.00567, section 7; z-loss, arXiv 2204.02311, section 5.
    """
    split = Split(process_group, vocab_size)
    group, _ = split.checked()
    with refusals(group, logits):
        check_reduction(reduction, ignore_index, normalizer)
        terms = TargetTerms.checked(z_loss_coef, label_smoothing)
        if terms.given:
            refuse_support({"support": support}, "cross_entropy with z_loss_coef or label_smoothing")
        check_floating("logits", logits)
        targets = ids_int64("targets", targets, logits)
        check_shape("targets", targets, logits.shape[:-1], "logits (..., V) score targets (...)")
        mask = targets != ignore_index
        divisor = denominator(mask, normalizer, accumulator_dtype(logits.dtype)) if reduction == "mean" else 1
    # These give 0 already; `where` also stops the gradient of ignored targets, whose rows are not read.
    losses = torch.where(mask, _losses(logits, targets, mask, temperature, split, terms, support), 0)
    return losses if reduction == "none" else losses.sum() / divisor


def _losses(
    logits: Tensor, targets: Tensor, mask: Tensor, temperature: float, split: Split, terms: TargetTerms, support: Any
) -> Tensor:
    try:
        if terms.given:
            return target_losses(logits, targets, mask, temperature, split, terms)
        return -logprobs_and_entropy(logits, targets, mask, temperature, split, support)[0]
    except ValueError as error:
        raise ValueError(named_targets(str(error))) from None


def named_targets(message: str) -> str:
    """A message about token_ids, which are called targets here."""
    return re.sub(r"(?<!support )\btoken_ids", "targets", message)


def check_reduction(reduction: Any, ignore_index: Any, normalizer: Any) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, expected one of {', '.join(REDUCTIONS)}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index is {ignore_index!r}, expected an integer")
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"normalizer was given with reduction {reduction!r}, expected 'mean'")


def denominator(mask: Tensor, normalizer: Any, dtype: torch.dtype) -> Tensor | float:
    """The number that a mean divides by: `normalizer`, or the number of counted targets."""
    normalizer = check_normalizer(normalizer, mask)
    check_positive("normalizer", normalizer)
    if normalizer is None:
        return mask.sum().clamp(min=1)
    return normalizer.to(dtype) if isinstance(normalizer, Tensor) else normalizer

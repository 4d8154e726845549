"""The denominator of a loss over the micro-batches of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from r1kernels import objectives
from r1kernels.objectives import Objective
from r1kernels.ops._checks import check_tensor
from r1kernels.ops.policy_inputs import CustomObjective
from r1kernels.ops.sequence_group import checked_sequence_group, sum_over_ranks
from r1kernels.ops.shards import checked_group, collective


def global_normalizer(
    mask: Tensor | Sequence[Tensor],
    objective: Objective | CustomObjective = objectives.grpo(),  # noqa: B008 - frozen
    group: torch.distributed.ProcessGroup | None = None,
    *,
    cu_seqlens: Tensor | Sequence[Tensor] | None = None,
    sequence_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    r"""The `normalizer` with which the losses of all micro-batches of all ranks add up to that of the whole batch.

    sum over ranks and micro-batches of loss(..., normalizer=n) = loss(whole batch);
    n = counted tokens ("token_mean"), sequences ("sequence_mean"), or sequences * max_length ("constant")

    The gradients of ranks and micro-batches must be added, not averaged. DDP and FSDP divide by the number of ranks:
    pass `normalizer=n / ranks`, or tell them not to divide (`set_gradient_divide_factor(1.0)` of FSDP2). Do not divide
    the loss by the number of micro-batches.

    Args:
        mask: (B, T), or packed (N,), True or nonzero = counts; or one mask for each micro-batch of this rank until the
            next optimiser step. Ranks may have different shapes and numbers of micro-batches.
        objective: the objective of the loss, or a callable, which has the mean over tokens. For `cross_entropy`, any
            objective with "token_mean", such as `objectives.dapo()`.
        group: the data-parallel ranks, each with its own sequences. None: all ranks of the default group, or this
            process alone if there is none. Ranks that share tokens (tensor parallel) must not be counted twice.
        sequence_group: the ranks that have other tokens of the same sequences, if each sequence is split. Then `group`
            must be given: one rank of each of these groups.
        cu_seqlens: (S + 1,), or one for each micro-batch: required for packed masks if the objective counts sequences.

    Returns:
        0-d, float32, on the device of the mask, at least 1. There is no synchronisation with the device.

    Raises:
        TypeError, ValueError: naming the argument, its value and the expectation.

    Memory: one all-reduce of 8 bytes.

    Equivalent to: for "token_mean", `count = mask.sum(); torch.distributed.all_reduce(count); count.clamp(min=1)`.
    """
    if not isinstance(objective, Objective):
        if not callable(objective) or objective is Objective:
            raise TypeError(f"objective is {objective!r}, expected an Objective or a callable")
        objective = Objective(surrogate=objective, aggregate="token_mean")
    masks = [mask] if isinstance(mask, Tensor) else mask
    if not isinstance(masks, Sequence) or len(masks) == 0:
        raise TypeError(f"mask is {mask!r}, expected a tensor, or one for each micro-batch")
    lengths = [cu_seqlens] * len(masks) if cu_seqlens is None or isinstance(cu_seqlens, Tensor) else cu_seqlens
    if len(lengths) != len(masks) or (isinstance(cu_seqlens, Tensor) and len(masks) > 1):
        raise ValueError(f"cu_seqlens is for {1 if isinstance(cu_seqlens, Tensor) else len(lengths)} micro-batches, "
                         f"expected one for each of {len(masks)} masks")
    for number, value in enumerate(masks):
        check_tensor("mask" if isinstance(mask, Tensor) else f"mask[{number}]", value, masks[0])
    if objective.aggregate == "token_mean":
        count = torch.stack([value.count_nonzero() for value in masks]).sum()
    else:
        number = sum(_sequences(value, ends) for value, ends in zip(masks, lengths, strict=True))
        count = torch.full((), number * (objective.max_length or 1), dtype=torch.int64, device=masks[0].device)
    distributed = torch.distributed
    if sequence_group is not None and group is None:
        raise ValueError("group is None with a sequence_group, expected one rank of each sequence_group")
    group, sequence_group = checked_group("group", group), checked_sequence_group(sequence_group)
    if group is not None or (distributed.is_available() and distributed.is_initialized()):
        with collective("global_normalizer", group, "group"):
            distributed.all_reduce(count, group=group)
    if sequence_group is not None and objective.aggregate == "token_mean":
        count = sum_over_ranks(count, sequence_group)
    # An empty batch has loss 0, whatever the denominator.
    return count.clamp(min=objective.max_length or 1).float()


def _sequences(mask: Tensor, cu_seqlens: Any) -> int:
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens)
        return cu_seqlens.numel() - 1
    if mask.dim() < 2:
        raise ValueError(f"cu_seqlens is None for a mask of shape {tuple(mask.shape)}, expected (S + 1,): the "
                         "objective counts sequences (or give (B, T))")
    return mask.shape[:-1].numel()

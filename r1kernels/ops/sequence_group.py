r"""Sequences whose tokens are split over the ranks of a group: sequence and context parallelism.

Each rank has some tokens of every sequence, maybe none. The lengths of sequences, and with a ratio per sequence the
sums of its log-ratios, are added up over the ranks: [S] numbers, whatever the number of tokens. The loss of a rank is
the part of its tokens, so the losses of all ranks, and the gradients of shared parameters, add up to those of one
process. With a ratio per sequence, the gradient of a token depends on the tokens of other ranks, so the backward adds
up [S] numbers, too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from r1kernels.ops.shards import agree, all_gathered, checked_group, collective


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _summed(value, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group), None


def _summed(value: Tensor, group: Any) -> Tensor:
    value = value.clone(memory_format=torch.contiguous_format)
    with collective(f"a sum of {value.numel()} numbers", group, "sequence_group"):
        torch.distributed.all_reduce(value, group=group)
    return value


def sum_over_ranks(value: Tensor, group: Any) -> Tensor:
    """The sum of the values of all ranks; the gradients of all ranks are added up, too."""
    return _Sum.apply(value, group)


def checked_sequence_group(group: Any) -> Any:
    """The process group, or None if it has one rank."""
    group = checked_group("sequence_group", group)
    return None if group is None or torch.distributed.get_world_size(group) == 1 else group


def agree_on_sequences(group: Any, count: int, objective: Any, normalizer: Any, device: torch.device) -> None:
    """The check that all ranks have the same sequences and make the same call."""
    fields = {field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)}
    if callable(objective.surrogate):  # its address is another one in each process
        function = objective.surrogate.function if objective.is_token_local else objective.surrogate
        fields["surrogate"] = objective.is_token_local, getattr(function, "__qualname__", "a callable")
    facts = {
        "the number of sequences": count, "the objective": tuple(fields.items()), "normalizer": normalizer is None,
    }
    agree(group, "sequence_group", facts, device)


_SUMS = ("tokens", "measured_tokens", "nonfinite_tokens", "surrogate_loss")


def whole_metrics(metrics: dict[str, Tensor], group: Any) -> dict[str, Tensor]:
    """The metrics over the tokens of all ranks, from those of each rank. One all-gather of 8 bytes a metric."""
    gathered = all_gathered(group, torch.stack([value.double() for value in metrics.values()]), "sequence_group")
    ranks = dict(zip(metrics, gathered.unbind(1), strict=True))
    measured = ranks.get("measured_tokens", ranks["tokens"])

    def mean(value: Tensor, weight: Tensor) -> Tensor:
        total = weight.sum()
        return torch.where(total > 0, torch.where(weight > 0, value * weight, 0).sum() / total.clamp(min=1), value[0])

    def extreme(value: Tensor, fill: float, reduce: str) -> Tensor:
        found = getattr(torch.where(measured > 0, value, fill), reduce)()
        return torch.where(measured.sum() > 0, found, value[0])

    def whole(name: str, value: Tensor) -> Tensor:
        if name in _SUMS:
            return value.sum()
        if name == "sequences":
            return value[0]
        if name in ("ratio_min", "ratio_max"):
            return extreme(value, torch.inf, "amin") if name == "ratio_min" else extreme(value, -torch.inf, "amax")
        return mean(value, ranks["tokens"] if name.endswith("_fraction") else measured)

    return {name: whole(name, value).to(metrics[name].dtype) for name, value in ranks.items()}

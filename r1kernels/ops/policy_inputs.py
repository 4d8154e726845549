"""Checks of the arguments that all policy losses share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1kernels import _library, objectives
from r1kernels.objectives import Objective
from r1kernels.ops._checks import as_mask, check_floating, check_normalizer, check_shape, ids_int64
from r1kernels.ops.policy_loss_reference import PolicyBatch
from r1kernels.ops.sequence_group import agree_on_sequences
from r1kernels.ops.shards import refusals

CustomObjective = Callable[[Tensor, PolicyBatch], Tensor]


def _per_token_or_sequence(
    name: str, value: Any, logprobs: Tensor, sequences: tuple[int, ...]
) -> Tensor:
    check_floating(name, value, logprobs)
    if value.shape != logprobs.shape and value.shape != sequences:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, expected {sequences} (one per sequence) or "
            f"{tuple(logprobs.shape)} (one per token)"
        )
    return value


def _checked_normalizer(normalizer: Any, logprobs: Tensor) -> Tensor | None:
    normalizer = check_normalizer(normalizer, logprobs)
    if isinstance(normalizer, float):
        return _library.as_tensor(normalizer, logprobs.dtype, logprobs.device)
    return None if normalizer is None else normalizer.to(logprobs.dtype)


class LossInputs(NamedTuple):
    """The checked arguments of a policy loss, without the log-probs. All entry points use it. `group`: the ranks over
    which the tokens of each sequence are split, if a sum over sequences is needed."""

    batch: PolicyBatch
    normalizer: Tensor | None
    objective: Objective
    group: Any = None


def check_inputs(
    like: Tensor, shape: tuple[int, ...], advantages: Any, *, group: Any = None, **arguments: Any
) -> LossInputs:
    """Validates all arguments except the log-probs: see `_checked_inputs`. The ranks of a `group` must agree."""
    with refusals(group, like):
        inputs, sequences = _checked_inputs(like, shape, advantages, **arguments)
    if group is not None:
        agree_on_sequences(group, sequences, inputs.objective, inputs.normalizer, like.device)
    return inputs._replace(group=group)


def _checked_inputs(
    like: Tensor,
    shape: tuple[int, ...],
    advantages: Any,
    *,
    tokens: str,
    old_logprobs: Any,
    ref_logprobs: Any,
    mask: Any,
    cu_seqlens: Any,
    importance_weights: Any,
    normalizer: Any,
    objective: Objective | CustomObjective,
    dtype: torch.dtype,
) -> tuple[LossInputs, int]:
    """Validates all arguments except the log-probs, and converts them to the compute dtype.

    `like` gives the device, `shape` is the shape of the log-probs, and `tokens` names the argument that has this shape.
    All inputs are constants: they get no gradient.

    Returns:
        The inputs, and the number of sequences.
    """
    if not isinstance(objective, Objective):
        if objective is Objective or getattr(objective, "__module__", "") == objectives.__name__:
            name = objective.__name__
            raise TypeError(f"objective is {name}, which must be called: {name}(...)")
        if not callable(objective):
            raise TypeError(f"objective is {objective!r}, expected an Objective, such as r1kernels.objectives.grpo(), "
                            "or a callable (logprobs, batch)")
        objective = Objective(surrogate=objective, aggregate="token_mean")
    probe = like.new_empty(()).expand(shape)  # no memory: carries shape and device into the checks
    if cu_seqlens is not None:
        if len(shape) != 1:
            raise ValueError(f"cu_seqlens was given with {tokens} of shape {shape}, expected packed (N,)")
        cu_seqlens = ids_int64("cu_seqlens", cu_seqlens, like)
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
            raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (S + 1,)")
        sequences = (cu_seqlens.numel() - 1,)
    elif len(shape) == 0:
        raise ValueError(f"{tokens} is 0-d, expected (B, T), or (N,) with cu_seqlens")
    elif len(shape) == 1 and objective.needs_sequences:
        raise ValueError(
            f"cu_seqlens is None for packed tokens of shape {shape}, expected (S + 1,): the objective depends on "
            "where sequences end (or give (B, T))"
        )
    else:
        sequences = shape[:-1]
    if objective.kl_coef != 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs is None, expected a tensor: objective.kl_coef is {objective.kl_coef}")

    def constant(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach().to(dtype).contiguous()

    for name, value in (("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs)):
        if value is not None:
            check_floating(name, value, like)
            check_shape(name, value, shape, "one log-prob per token")
    advantages = _per_token_or_sequence("advantages", advantages, probe, sequences)
    if importance_weights is not None:
        importance_weights = _per_token_or_sequence("importance_weights", importance_weights, probe, sequences)
    batch = PolicyBatch(
        advantages=constant(advantages),
        old_logprobs=constant(old_logprobs),
        ref_logprobs=constant(ref_logprobs),
        entropy=None,
        mask=as_mask(mask, like, shape),
        cu_seqlens=cu_seqlens,
        importance_weights=constant(importance_weights),
    )
    normalizer = _checked_normalizer(normalizer, probe.to(dtype))
    return LossInputs(batch, normalizer, objective), math.prod(sequences)

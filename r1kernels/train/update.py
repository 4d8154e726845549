"""The arithmetic of an update: log-probs of a rollout, and the gradient of a minibatch of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

import r1kernels
from r1kernels.train.head import head_of, hidden_states

# Means over tokens, which micro-batches contribute to by their tokens.
TOKEN_MEANS = ("kl", "entropy", "approx_kl", "clip_low_fraction", "clip_high_fraction", "active_fraction")


@dataclass(frozen=True)
class Rollout:
    """What one rollout gives to its updates; every field is a tensor with one row a sample.

    Shapes: prompts (B, P), the others (B, T); advantages, and importance weights where there are any, (B,) for
    sequences or (B, T) for tokens.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    token_ids: Tensor
    mask: Tensor
    advantages: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    importance_weights: Tensor | None = None

    def rows(self, index: Tensor) -> Rollout:
        """Some of the samples (n,), without the columns in which all of them are padding.

        A completion has at least one column, also where all of them are empty.
        """
        part = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        part = {name: value[index] for name, value in part.items() if value is not None}
        start = int(part["prompt_mask"].any(0).long().argmax())
        end = max(1, int(part["mask"].sum(-1).max()))
        for name, value in part.items():
            if value.ndim == 2:
                part[name] = value[:, start:] if name.startswith("prompt_") else value[:, :end]
        return Rollout(**part)


def completion_hidden_states(model: PreTrainedModel, batch: Rollout) -> Tensor:
    """(B, T, H), whose row t scores token t of the completion; the last token is not fed."""
    attention = torch.cat([batch.prompt_mask, batch.mask[:, :-1]], dim=1).long()
    hidden = hidden_states(
        model,
        input_ids=torch.cat([batch.prompt_ids, batch.token_ids[:, :-1]], dim=1),
        attention_mask=attention,
        position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
    )
    return hidden[:, -batch.token_ids.shape[1] :]


@torch.no_grad()
def rollout_logprobs(
    model: PreTrainedModel,
    rollout: Rollout,
    batches: Sequence[Tensor],
    *,
    temperature: float,
    check: Callable[[], None],
) -> Tensor:
    """Log-probs (B, T) of the rollout's tokens, 0 behind the mask.

    Args:
        batches: rows of the rollout, to be those of the updates: a row's result may depend in its last bits on the
            rows beside it, and this way the first ratio is exactly 1.
        check: called before every batch.
    """
    logprobs = torch.zeros_like(rollout.old_logprobs)
    for rows in batches:
        check()
        batch = rollout.rows(rows)
        logprobs[rows, : batch.token_ids.shape[1]] = r1kernels.linear_token_logprobs(
            completion_hidden_states(model, batch),
            token_ids=batch.token_ids,
            mask=batch.mask,
            temperature=temperature,
            **head_of(model),
        )
    return logprobs


def minibatch_gradient(
    model: PreTrainedModel,
    rollout: Rollout,
    batches: Sequence[Tensor],
    objective: r1kernels.Objective,
    *,
    temperature: float,
    check: Callable[[], None],
) -> dict[str, float]:
    """Adds the gradient of one minibatch, which does not depend on its division into micro-batches.

    Args:
        batches: rows of each micro-batch.
        check: called before every micro-batch.

    Returns:
        Metrics of the minibatch. "ratio_deviation" is the largest |ratio - 1| of a token.
    """
    mask = rollout.mask[torch.cat(list(batches))]
    tokens = mask.sum()
    normalizer = {
        "sequence_mean": tokens.new_tensor(len(mask)),
        "token_mean": tokens,
        "constant": tokens.new_tensor(len(mask) * (objective.max_length or 1)),
    }[objective.aggregate].float()
    table = []
    for rows in batches:
        check()
        batch = rollout.rows(rows)
        loss, part = r1kernels.linear_grpo_loss(
            completion_hidden_states(model, batch),
            token_ids=batch.token_ids,
            advantages=batch.advantages,
            old_logprobs=batch.old_logprobs,
            ref_logprobs=batch.ref_logprobs if objective.kl_coef else None,
            mask=batch.mask,
            importance_weights=batch.importance_weights,
            normalizer=normalizer,
            temperature=temperature,
            objective=objective,
            # Metrics speak of every token; and with the rows of `rollout_logprobs`, the first ratio is exactly 1 even
            # where the bits of a product depend on how many rows it has.
            measure_all=True,
            **head_of(model),
        )
        loss.backward()
        names = ("loss", *part)
        table.append(torch.stack([loss.detach(), *part.values()]))
    # One transfer from the device for all metrics of all micro-batches.
    micro = [dict(zip(names, row, strict=True)) for row in torch.stack(table).tolist()]
    shares = [values["tokens"] / sum(other["tokens"] for other in micro) for values in micro]
    metrics = {
        "loss": sum(values["loss"] for values in micro),
        "ratio_deviation": max(max(values["ratio_max"] - 1, 1 - values["ratio_min"]) for values in micro),
    }
    for name in TOKEN_MEANS:
        if name in names:
            metrics[name] = sum(values[name] * share for values, share in zip(micro, shares, strict=True))
    return metrics

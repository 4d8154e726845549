"""The oracle of `token_statistics` in float64: values and gradients in closed form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from r1kernels.testing.budget import EPS32, Expected
from r1kernels.testing.oracles import token_stats, token_stats_gradient


class StatisticsExpected(NamedTuple):
    """Each (...), float64; is_top1 is bool, selected_logprobs (..., K) or None."""

    logprobs: Tensor
    lse: Tensor
    entropy: Tensor
    sum_sq_probs: Tensor
    mean_logit: Tensor
    is_top1: Tensor
    selected_logprobs: Tensor | None


def token_statistics(
    logits: Tensor, token_ids: Tensor, selected_ids: Tensor | None = None, temperature: float = 1.0
) -> StatisticsExpected:
    z = logits.detach().double() / temperature
    logprobs, entropy, log_p = token_stats(logits, token_ids, temperature)
    top = z.max(-1, keepdim=True).values
    first = torch.where(z == top, torch.arange(z.shape[-1]), z.shape[-1]).amin(-1)
    return StatisticsExpected(
        logprobs, (top + (z - top).exp().sum(-1, keepdim=True).log()).squeeze(-1), entropy,
        (2 * log_p).exp().sum(-1), z.mean(-1), first == token_ids,
        None if selected_ids is None else log_p.gather(-1, selected_ids.long()),
    )


def token_statistics_gradient(
    logits: Tensor, token_ids: Tensor, slopes: dict[str, Tensor], selected_ids: Tensor | None = None,
    temperature: float = 1.0,
) -> Expected:
    """The sum over the statistics of `token_stats_gradient`, p_j dL/dlse and 2 p_j (p_j - S) dL/dS.

    `slopes`: dL/d of each statistic, by name. -log p of a selected id is -l of a token.
    """
    zero = torch.zeros(token_ids.shape)
    of = {name: slope.double() for name, slope in slopes.items()}
    eta = of.get("entropy", zero)
    parts = [token_stats_gradient(logits, token_ids, of.get("logprobs", zero), eta, temperature)]
    for k in range(0 if selected_ids is None else selected_ids.shape[-1]):
        parts.append(token_stats_gradient(
            logits, selected_ids[..., k], of["selected_logprobs"][..., k], 0.0, temperature
        ))
    p = token_stats(logits, token_ids, temperature).log_p.exp()
    if "lse" in of:
        value = of["lse"].unsqueeze(-1) * p / temperature
        parts.append(Expected(value, value.abs()))
    if "sum_sq_probs" in of:
        slope, s = of["sum_sq_probs"].unsqueeze(-1) / temperature, p.square().sum(-1, keepdim=True)
        # A power that is flushed to 0 may be as large as the smallest normal number of float32.
        flushed = torch.finfo(torch.float32).tiny / EPS32 * slope.abs()
        parts.append(Expected(2 * slope * p * (p - s), 2 * slope.abs() * p * (p + s) + flushed))
    return Expected(sum(part.value for part in parts), sum(part.terms for part in parts))

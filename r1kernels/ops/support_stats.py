"""Log-probs and entropies over sets of ids, from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from r1kernels.ops.support import Support, check_sets, outside_of
from r1kernels.ops.token_stats import token_stats


def support_stats(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, support: Support
) -> tuple[Tensor, Tensor]:
    """(log-prob, entropy), each (...), from logits (..., V); 0 where `mask` is False. Differentiable."""
    check_sets(support, token_ids.reshape(-1), logits.shape[-1], None if mask is None else mask.reshape(-1))
    outside = outside_of(support, logits.shape[-1]).reshape(logits.shape)
    return token_stats(logits.masked_fill(outside, -torch.inf), token_ids, mask, temperature)

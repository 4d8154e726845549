"""Log-probs and entropies over sets of ids from hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from r1kernels.ops.linear.head import Head, Needs
from r1kernels.ops.linear.passes import run_backward, run_statistics
from r1kernels.ops.support import Support, check_sets


def run_support_statistics(
    head: Head, hidden: Tensor, wanted: Tensor | None, support: Support
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-prob, log-sum-exp, entropy), each (N,), 0 where `wanted` is False, and the products (M,)."""
    check_sets(support, head.token_ids, len(head.weight), wanted)
    products = torch.empty(support.token_ids.shape, dtype=torch.float32, device=hidden.device)
    return *run_statistics(head, hidden, wanted, support=support), products


def run_support_backward(
    head: Head, hidden: Tensor, lse: Tensor, entropy: Tensor, g: Tensor | None, eta: Tensor | None, support: Support,
    products: Tensor, weight_dtype: torch.dtype, needs: Needs,
) -> tuple[Tensor, ...]:
    """The gradients of `GradientSums.results`, with the weight's in `weight_dtype`."""
    return run_backward(head, hidden, lse, entropy, g, eta, weight_dtype, needs, support=support)

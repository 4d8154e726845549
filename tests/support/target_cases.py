"""Several targets under one head: cases, and their losses and gradients in float64."""

from __future__ import annotations

from typing import Any

import linear_cases as cases
import torch
from torch import Tensor

from r1kernels import testing

TERMS: dict[str, dict[str, float]] = {
    "none": {}, "smoothing": {"label_smoothing": 0.2}, "z-loss": {"z_loss_coef": 0.02},
    "both": {"label_smoothing": 0.3, "z_loss_coef": 0.02},
}
LEAD = (2, 5)


def make(
    head: str = "plain", depths: int = 3, shared: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """A case of `linear_multi_target`. Some rows have one id as the target of two depths, and some rows count at no
    depth, at some, or at all."""
    case = cases.make(head, *(LEAD if shared else (depths, *LEAD)), dtype=dtype, seed=seed, **more)
    vocab = len(case["weight"])
    ids = testing.random_ids(depths, *LEAD, vocab=vocab, seed=seed + 1)
    ids[-1, 0] = ids[0, 0]
    masks = testing.random_ids(depths, *LEAD, vocab=4, seed=seed + 2) > 0
    masks[:, 1, 2] = False
    return case | {"token_ids": torch.where(masks, ids, -7), "masks": masks}


def exact(
    case: dict[str, Any], weights: Tensor, terms: dict[str, float]
) -> tuple[Tensor, cases.Exact]:
    """Losses (D, ...), and the gradients of the sum of weights loss; weights (D, ...), 0 behind the masks."""
    masks, depths = case["masks"], len(case["masks"])
    ids, u = torch.where(masks, case["token_ids"], 0).reshape(depths, -1), weights.double().reshape(depths, -1)
    _, _, z = cases.logits(case)
    if case["hidden"].dim() > len(LEAD) + 1:  # each depth has its own rows, and each row one target
        ids, u = ids.reshape(1, -1), u.reshape(1, -1)
    losses = testing.target_losses(z, ids, **terms).reshape(masks.shape)
    grad = testing.target_gradient(z, ids, u, **terms)
    grads, sizes = cases.products(case, grad.value, grad.terms)
    losses = torch.where(masks, losses, 0)
    return losses, cases.Exact(losses, losses, grads, sizes)

"""A check of the promise that a function for `Objective.token_local` makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from r1kernels.ops.policy_loss_reference import PolicyBatch


def check_token_local(function: Callable[..., Any], tokens: int = 6, *, seed: int = 0) -> None:
    """Raises unless the loss of each token depends on nothing but that token. A debug check: 20 calls of the function.

    In float64, on random values: the gradient of token i's loss with respect to log-prob and entropy of token j must be
    exactly 0, and no other value of token j may change the loss of token i by more than rounding.

    Args:
        function: as for `Objective.token_local`.
        tokens: how many tokens it gets, >= 2.

    Raises:
        ValueError: naming the two tokens, and the input through which one depends on the other.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 2:
        raise ValueError(f"tokens is {tokens!r}, expected an integer >= 2")
    rng = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> Tensor:
        return scale * torch.randn(tokens, dtype=torch.float64, generator=rng)

    logprobs, entropies = -draw(1).abs() - 0.1, draw(1).abs() + 0.1
    near = {"old_logprobs": logprobs + draw(0.1), "ref_logprobs": logprobs + draw(0.1)}
    constants = {"advantages": draw(1), **near, "importance_weights": draw(1).abs() + 0.1}

    def losses(logprobs: Tensor, entropies: Tensor, constants: dict[str, Tensor]) -> Tensor:
        loss = function(logprobs, entropies, PolicyBatch(entropy=None, mask=None, cu_seqlens=None, **constants))
        if not isinstance(loss, Tensor) or loss.shape != logprobs.shape:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ValueError(f"function returned {got}, expected one loss for each token, of shape {(tokens,)}")
        return loss

    leaves = {"logprobs": logprobs.requires_grad_(), "entropies": entropies.requires_grad_()}
    loss = losses(logprobs, entropies, constants)
    for i in range(tokens if loss.requires_grad else 0):
        grads = torch.autograd.grad(loss[i], list(leaves.values()), retain_graph=True, allow_unused=True)
        for name, grad in zip(leaves, grads, strict=True):
            if grad is not None:
                _refuse(name, i, grad.index_fill(0, torch.tensor(i), 0) != 0)
    before, others = loss.detach(), torch.arange(tokens) != 0
    inputs = {"logprobs": logprobs.detach(), "entropies": entropies.detach(), **constants}
    for name, value in inputs.items():  # a value of token 0 changes, the others keep their losses
        changed = inputs | {name: torch.where(others, value, 0.7 * value)}
        after = losses(changed.pop("logprobs"), changed.pop("entropies"), changed).detach()
        moved = ~torch.isclose(after, before, rtol=1e-12, atol=1e-12, equal_nan=True) & others
        if moved.any():
            _refuse(name, int(moved.nonzero()[0]), ~others)


def _refuse(name: str, i: int, depends: Tensor) -> None:
    if depends.any():
        j = int(depends.nonzero()[0])
        raise ValueError(f"function mixes tokens: the loss of token {i} depends on {name} of token {j}, expected only "
                         f"values of token {i}")

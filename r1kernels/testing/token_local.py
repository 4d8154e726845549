"""A check of the promise that a function for `Objective.token_local` makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from r1kernels.ops.policy_loss_reference import PolicyBatch

FACTORS = (-10.0, 10.0)  # by which each value is multiplied: another sign, and beyond most of the others


def check_token_local(function: Callable[..., Any], tokens: int = 6, *, seed: int = 0) -> None:
    """Raises unless loss and gradient of each token depend on nothing but that token.

    In float64, on random values. The gradient of token i's loss with respect to log-prob and entropy of token j must be
    exactly 0. Loss and gradient of token i may not change by more than rounding if any value of token j changes (times
    -10 and times 10), nor if the function gets token i alone, or all tokens but the last.

    A debug check: 13 n + 3 calls of the function for n tokens. It finds what shows at these values, so a function that
    mixes tokens only at others may pass.

    Args:
        function: as for `Objective.token_local`.
        tokens: n, how many tokens it gets, >= 2.

    Raises:
        ValueError: naming the tokens, and the input through which one depends on the other; or the function returns
            another loss when it is called again.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 2:
        raise ValueError(f"tokens is {tokens!r}, expected an integer >= 2")
    rng = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> Tensor:
        return scale * torch.randn(tokens, dtype=torch.float64, generator=rng)

    logprobs, entropies = -draw(1).abs() - 0.1, draw(1).abs() + 0.1
    near = {"old_logprobs": logprobs + draw(0.1), "ref_logprobs": logprobs + draw(0.1)}
    values = {"logprobs": logprobs, "entropies": entropies, "advantages": draw(1), **near,
              "importance_weights": draw(1).abs() + 0.1}
    every = slice(0, tokens)
    before = _outcome(function, values, every, across=True)
    if _moved(before, _outcome(function, values, every)).any():
        raise ValueError("function returned another loss or gradient for the same tokens when it was called again, "
                         "expected the same each time")
    for j in range(tokens):
        this = torch.arange(tokens) == j
        for name, value in values.items():
            for factor in FACTORS:
                after = _outcome(function, values | {name: torch.where(this, factor * value, value)}, every)
                moved = _moved(before, after) & ~this
                if moved.any():
                    _refuse(name, int(moved.nonzero()[0]), j)
    for part in (*(slice(i, i + 1) for i in range(tokens)), slice(0, tokens - 1)):
        moved = _moved(before[:, part], _outcome(function, values, part))
        if moved.any():
            i = part.start + int(moved.nonzero()[0])
            raise ValueError(f"function mixes tokens: loss or gradient of token {i} is another one in a call with "
                             f"{len(moved)} of the {tokens} tokens, expected the same whatever tokens it gets")


def _outcome(function: Callable[..., Any], values: dict[str, Tensor], part: slice, across: bool = False) -> Tensor:
    """(3, n): loss and its derivatives by log-prob and entropy of some tokens. `across`: refuse derivatives across
    tokens."""
    given = {name: value[part].clone() for name, value in values.items()}
    leaves = {name: given.pop(name).requires_grad_() for name in ("logprobs", "entropies")}
    loss = function(*leaves.values(), PolicyBatch(entropy=None, mask=None, cu_seqlens=None, **given))
    shape = leaves["logprobs"].shape
    if not isinstance(loss, Tensor) or loss.shape != shape:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"function returned {got}, expected one loss for each token, of shape {tuple(shape)}")
    if not loss.requires_grad:
        return torch.stack([loss.double(), *torch.zeros(2, *shape, dtype=torch.float64)])

    def gradients(value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True,
                                   materialize_grads=True)

    for i in range(len(loss) if across else 0):
        for name, grad in zip(leaves, gradients(loss[i]), strict=True):
            depends = (grad != 0) & (torch.arange(len(loss)) != i)
            if depends.any():
                _refuse(name, i, int(depends.nonzero()[0]))
    return torch.stack([loss.detach().double(), *gradients(loss.sum())])


def _moved(before: Tensor, after: Tensor) -> Tensor:
    """Tokens (n,) of which anything differs by more than rounding."""
    return ~torch.isclose(after, before, rtol=1e-12, atol=1e-12, equal_nan=True).all(0)


def _refuse(name: str, i: int, j: int) -> None:
    raise ValueError(f"function mixes tokens: the loss of token {i} depends on {name} of token {j}, expected only "
                     f"values of token {i}")

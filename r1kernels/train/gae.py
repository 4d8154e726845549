"""Generalised advantage estimation: what a token was worth, from rewards and the values of states."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages of the actions of B episodes, and the returns that the values should have been.

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1},  R_t = A_t + V_t

    `lam` 0 trusts the values (A_t = delta_t), 1 only the rewards (R_t is their discounted sum, whatever the values).

    Args:
        rewards: (B, T) floating; row t is what followed action t.
        values: (B, T), dtype of rewards; row t is the value of the state in which action t was taken.
        mask: (B, T) bool. Where it is False there is no action: its neighbours follow each other, and what the other
            tensors hold there does not matter. An episode ends with its last action, whose successor is worth 0.
        gamma: discount a step, from 0 to 1.
        lam: from 0 to 1.

    Returns:
        (advantages, returns), each (B, T), 0 where the mask is False.

    Raises:
        ValueError: naming the argument, its value and the expectation.

    Source: arXiv 1506.02438, eq. 16.
    """
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}, expected a number from 0 to 1")
    for name, tensor in (("values", values), ("mask", mask)):
        if rewards.ndim != 2 or tensor.shape != rewards.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} beside rewards {tuple(rewards.shape)}, expected (B, T) of both"
            )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}, expected torch.bool")
    advantages = torch.zeros_like(rewards)
    following = rewards.new_zeros(len(rewards))  # A_{t+1} and V_{t+1}, each (B,)
    next_value = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = torch.where(here, delta + gamma * lam * following, following)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = following
    nothing = advantages.new_zeros(())
    return torch.where(mask, advantages, nothing), torch.where(mask, advantages + values, nothing)


def whiten(values: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Shifts and scales to mean 0 and standard deviation 1 over the mask; 0 elsewhere, and where all are equal.

    Args:
        values: (B, T) floating.
        mask: (B, T) bool.
    """
    chosen = values[mask]
    if not len(chosen):
        return torch.zeros_like(values)
    # Of equal values, rounding leaves a spread that must not be blown up to 1.
    if torch.equal(chosen.amin(), chosen.amax()):
        return torch.zeros_like(values)
    scaled = (values - chosen.mean()) / (chosen.std(correction=0) + eps)
    return torch.where(mask, scaled, scaled.new_zeros(()))

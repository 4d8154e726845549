"""Generalised advantage estimation: the advantage of each token, from rewards and the values of states."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages of the actions of B episodes, and the returns that the values should have been.

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1},  R_t = A_t + V_t

    With `lam` 0 the advantages trust the values (A_t = delta_t), with 1 only the rewards (R_t is their discounted sum).

    Args:
        rewards: (B, T) floating; column t is the reward after action t.
        values: (B, T); column t is the value of the state in which action t was taken.
        mask: (B, T) bool. Where it is False there is no action: the actions around it follow each other, and the other
            tensors may hold anything. An episode ends with its last action, after which the value is 0.

    Returns:
        (advantages, returns), each (B, T), 0 where the mask is False.

    Source: arXiv 1506.02438, eq. 16.
    """
    advantages = torch.zeros_like(rewards)
    following, next_value = rewards.new_zeros(len(rewards)), rewards.new_zeros(len(rewards))  # A_{t+1}, V_{t+1}
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = torch.where(here, delta + gamma * lam * following, following)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = following
    zero = advantages.new_zeros(())
    return torch.where(mask, advantages, zero), torch.where(mask, advantages + values, zero)


def whiten(values: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Values (B, T) shifted and scaled to mean 0 and standard deviation 1 over the mask; 0 elsewhere."""
    chosen = values[mask]
    # If all values are equal, rounding leaves a spread that must not be scaled up to 1.
    if not len(chosen) or torch.equal(chosen.amin(), chosen.amax()):
        return torch.zeros_like(values)
    scaled = (values - chosen.mean()) / (chosen.std(correction=0) + eps)
    return torch.where(mask, scaled, scaled.new_zeros(()))

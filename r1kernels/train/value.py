"""The critic of PPO: a body like the policy's, and a number read from each state, the reward still to come."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from r1kernels.train.head import head_of
from r1kernels.train.update import Rollout, completion_hidden_states


class Critic(nn.Module):
    """A copy of a causal LM's body under a head of zeros: before training, every state is worth 0."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.base_model = copy.deepcopy(model.base_model)
        weight = head_of(model)["weight"]
        self.head = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.eval()

    def forward(self, batch: Rollout) -> Tensor:
        """Values (B, T); column t is that of the state in which token t of the completion was chosen."""
        return self.head(completion_hidden_states(self, batch)).squeeze(-1).float()


@torch.no_grad()
def rollout_values(
    critic: Critic, rollout: Rollout, batches: Sequence[Tensor], check: Callable[[], None]
) -> Tensor:
    """Values (B, T) of the states of a rollout, 0 behind the mask; `check` is called before every batch of rows."""
    values = torch.zeros_like(rollout.old_logprobs)
    for rows in batches:
        check()
        batch = rollout.rows(rows)
        values[rows, : batch.token_ids.shape[1]] = critic(batch).masked_fill(~batch.mask, 0.0)
    return values


def value_gradient(
    critic: Critic,
    rollout: Rollout,
    values: Tensor,
    returns: Tensor,
    mask: Tensor,
    batches: Sequence[Tensor],
    *,
    clip: float | None,
    check: Callable[[], None],
) -> dict[str, float]:
    """Adds the gradient of one minibatch's value loss, which does not depend on its division into micro-batches.

    loss = mean_t 1/2 max((V_t - R_t)^2, (V_t' - R_t)^2),  V_t' = V_old,t + clamp(V_t - V_old,t, -clip, clip)

    Args:
        values, returns: (B, T) of the rollout: V_old and R.
        mask: (B, T) bool, the tokens that count.
        batches: rows of each micro-batch.
        clip: None for the first square alone.
        check: called before every micro-batch.

    Returns:
        "value_loss", and "value_clip_fraction" where there is a clip.
    """
    tokens = mask[torch.cat(list(batches))].sum().clamp(min=1)
    sums = []
    for rows in batches:
        check()
        batch = rollout.rows(rows)
        width = batch.token_ids.shape[1]
        here = mask[rows, :width]
        old, target = values[rows, :width][here], returns[rows, :width][here]
        value = critic(batch)[here]  # (tokens,), so that nothing behind the mask matters
        squares = (value - target).square()
        clipped = torch.zeros_like(squares)
        if clip is not None:
            bounded = (old + (value - old).clamp(-clip, clip) - target).square()
            clipped = (bounded > squares).float()
            squares = torch.maximum(squares, bounded)
        loss = 0.5 * squares.sum() / tokens
        loss.backward()
        sums.append(torch.stack([loss.detach(), clipped.sum() / tokens]))
    loss, fraction = torch.stack(sums).sum(0).tolist()
    return {"value_loss": loss} | ({} if clip is None else {"value_clip_fraction": fraction})


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for one no better than a constant; NaN where
    the returns are all equal."""
    spread = returns.var(correction=0)
    return (1 - (returns - values).var(correction=0) / spread).item() if spread > 0 else float("nan")

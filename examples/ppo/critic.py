"""The critic of PPO, and the advantages that it gives to the trainer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from r1kernels.train.errors import TrainingError
from r1kernels.train.grpo import GRPOTrainer
from r1kernels.train.parallel import add_up
from r1kernels.train.rollout import Tokens
from r1kernels.train.update import Rollout, completion_hidden_states

from .gae import gae, whiten


def critic(
    trainer: GRPOTrainer, *, lam: float = 0.95, gamma: float = 1.0, kl_coef: float = 0.0,
    value_learning_rate: float = 1e-5, value_clip: float | None = 0.2, whiten: bool = True,
) -> CriticAdvantages:
    """Advantages by a critic, for `advantages` of a stage of kind grpo.

    Args:
        lam: the lambda of GAE, from 0 to 1.
        gamma: the discount of a token, from 0 to 1.
        kl_coef: penalty in each token's reward for leaving the reference, as in RLHF. The `kl_coef` of the objective is
            a term of the loss, as in GRPO.
        value_learning_rate: the learning rate of the critic.
        value_clip: how far a value may move from that of the rollout before its loss stops to fall; None for no limit.
        whiten: shift and scale the advantages of a rollout to mean 0 and standard deviation 1.
    """
    limits = {
        "lam": (lam, "a number from 0 to 1", 0 <= lam <= 1),
        "gamma": (gamma, "a number from 0 to 1", 0 <= gamma <= 1),
        "kl_coef": (kl_coef, "at least 0", kl_coef >= 0),
        "value_learning_rate": (value_learning_rate, "a positive number", value_learning_rate > 0),
        "value_clip": (value_clip, "a positive number or null", value_clip is None or value_clip > 0),
    }
    for name, (value, expected, fits) in limits.items():
        if not fits:
            raise ValueError(f"'{name}' is {value}; expected {expected}")
    if trainer.objective.ratio != "token":
        raise ValueError("'objective' has one ratio per sequence; the advantages of a critic need one per token")
    return CriticAdvantages(trainer, lam, gamma, kl_coef, value_learning_rate, value_clip, whiten)


class Critic(nn.Module):
    """The body of a causal LM, which it takes over, under a head of zeros: before training, every state is worth 0."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.base_model, self.config = model.base_model, model.config
        self.head = nn.Linear(model.get_output_embeddings().in_features, 1, device=model.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.eval()

    def forward(self, batch: Tokens) -> Tensor:
        """Values (B, T); column t is that of the state in which token t of the completion was chosen."""
        values = self.head(completion_hidden_states(self, batch)).squeeze(-1).float()  # (N,)
        return torch.zeros_like(batch.mask, dtype=values.dtype).masked_scatter(batch.mask, values)


class CriticAdvantages:
    """GAE with the values of a critic, which learns together with the policy. See `critic`."""

    def __init__(
        self, trainer: GRPOTrainer, lam: float, gamma: float, kl_coef: float, learning_rate: float,
        value_clip: float | None, whiten: bool,
    ) -> None:
        self.trainer, self.lam, self.gamma, self.kl_coef = trainer, lam, gamma, kl_coef
        self.value_clip, self.whitened = value_clip, whiten
        if kl_coef and trainer.reference is None:
            trainer.reference = trainer.stage.frozen(trainer.settings.model)
        model, _ = trainer.stage.load_model(trainer.settings.model, torch.float32)  # AdamW needs float32 weights
        self.critic = Critic(model)
        self.optimizer = torch.optim.AdamW(self.critic.parameters(), lr=learning_rate, weight_decay=0.0)
        self.targets: dict[str, Tensor] = {}  # of the last rollout: values, returns, and the mask of what counts

    def __call__(
        self, rewards: Tensor, tokens: Tokens, old_logprobs: Tensor, ref_logprobs: Tensor | None
    ) -> tuple[Tensor, dict[str, float]]:
        """Advantages (B, T). A sample without a reward teaches neither the policy nor the critic."""
        values = self._values(tokens)
        mask = tokens.mask & ~rewards.isnan()[:, None]
        penalty = self.kl_coef * (old_logprobs - ref_logprobs) if self.kl_coef else torch.zeros_like(values)
        last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
        token_rewards = torch.where(last, rewards[:, None], 0.0) - penalty
        advantages, returns = gae(token_rewards, values, mask, gamma=self.gamma, lam=self.lam)
        self.targets = {"values": values, "returns": returns, "mask": mask}
        old, target = values[mask], returns[mask]
        metrics = {
            "value": old.mean().item(), "return": target.mean().item(),
            "explained_variance": explained_variance(old, target),
        }
        if self.kl_coef:
            metrics["reward_kl"] = (old_logprobs - ref_logprobs)[tokens.mask].mean().item()
        return whiten(advantages, mask) if self.whitened else advantages, metrics

    def learn(self, rollout: Rollout, rows: Tensor) -> dict[str, float]:
        """One optimizer step of the critic on the rows of a minibatch."""
        self.optimizer.zero_grad()
        metrics = self._gradient(rollout, rows)
        norm = torch.nn.utils.clip_grad_norm_(self.critic.parameters(), self.trainer.settings.grad_clip).item()
        if not (math.isfinite(metrics["value_loss"]) and math.isfinite(norm)):
            raise TrainingError(f"step {self.trainer.step}: the critic's loss is "
                                f"{metrics['value_loss']}, its gradient norm {norm}; expected finite numbers")
        self.optimizer.step()
        return metrics | {"value_grad_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        parts = {"critic": self.critic.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**parts, "targets": self.targets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.targets = state["targets"]

    @torch.no_grad()
    def _values(self, tokens: Tokens) -> Tensor:
        """Values (B, T) of the states of a rollout, 0 behind the mask. Every rank computes a share of them."""
        values = torch.zeros(tokens.mask.shape)
        for minibatch in self.trainer.minibatches(0):
            for rows in filter(len, self.trainer.micro_batches(tokens, minibatch)):
                batch = tokens.rows(rows).to(self.device)
                values[rows, : batch.mask.shape[1]] = self.critic(batch).cpu()
        return self._add_up(values.to(self.device)).cpu()

    def _gradient(self, rollout: Rollout, rows: Tensor) -> dict[str, float]:
        """Adds the gradient of the value loss, which does not depend on the division into micro-batches and ranks.

        loss = mean_t 1/2 max((V_t - R_t)^2, (V_t' - R_t)^2),  V_t' = V_old,t + clamp(V_t - V_old,t, -clip, clip)
        """
        values, returns, mask = (self.targets[name] for name in ("values", "returns", "mask"))
        tokens, sums = int(mask[rows].sum().clamp(min=1)), torch.zeros(2, device=self.device)
        for some in filter(len, self.trainer.micro_batches(rollout, rows)):
            batch = rollout.rows(some).to(self.device)
            width = batch.mask.shape[1]
            here = mask[some, :width]
            old, target = (column[some, :width][here].to(self.device) for column in (values, returns))
            value = self.critic(batch)[here.to(self.device)]  # (tokens,), so that nothing behind the mask matters
            squares = (value - target).square()
            clipped = torch.zeros_like(squares)
            if self.value_clip is not None:
                bounded = (old + (value - old).clamp(-self.value_clip, self.value_clip) - target).square()
                clipped = (bounded > squares).float()
                squares = torch.maximum(squares, bounded)
            loss = 0.5 * squares.sum() / tokens
            loss.backward()
            sums += torch.stack([loss.detach(), clipped.sum() / tokens])
        for weight in self.critic.parameters():
            weight.grad = self._add_up(torch.zeros_like(weight) if weight.grad is None else weight.grad)
        loss, fraction = self._add_up(sums).tolist()
        return {"value_loss": loss} | ({} if self.value_clip is None else {"value_clip_fraction": fraction})

    def _add_up(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks that train on different tokens, in place."""
        return add_up(tensor, self.trainer.policy.data.get_group())

    @property
    def device(self) -> torch.device:
        return self.critic.head.weight.device


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for one no better than a constant; NaN where
    the returns are all equal."""
    if not len(returns) or returns.amin() == returns.amax():
        return math.nan
    return (1 - (returns - values).var(correction=0) / returns.var(correction=0)).item()

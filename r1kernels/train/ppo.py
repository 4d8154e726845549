"""PPO, the paper's contrast to GRPO: a critic says what every token was worth, where GRPO compares whole samples.

    r_t = reward, at the last token, - kl_coef (log pi_old,t - log pi_ref,t)
    A = whiten(GAE(r, V)),  policy: clipped ratio, mean over tokens;  critic: (V - R)^2

Rollouts, scores, evaluations and checkpoints are those of GRPO; the critic, its optimiser and the values of the
rollout at hand are saved with the rest.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from r1kernels.train.gae import gae, whiten
from r1kernels.train.grpo import GRPOTrainer
from r1kernels.train.interrupt import TrainingError
from r1kernels.train.update import Rollout
from r1kernels.train.value import Critic, explained_variance, rollout_values, value_gradient


class PPOTrainer(GRPOTrainer):
    """Trains a model and its critic, which starts as a copy of the model's body."""

    critic: Critic | None = None

    def __init__(self, stage: Any) -> None:
        super().__init__(stage)
        if self.critic is None:
            self._prepare()

    def _prepare(self) -> None:
        settings = self.settings
        if settings.kl_coef and self.reference is None:
            self.reference = copy.deepcopy(self.model).requires_grad_(False)
        self.critic = Critic(self.model)
        self.critic_optimizer = torch.optim.AdamW(
            self.critic.parameters(), lr=settings.value_learning_rate, weight_decay=0.0
        )
        self.values: dict[str, Tensor] | None = None  # of the rollout, when it was made

    def state(self) -> dict[str, Any]:
        return super().state() | {
            "critic": self.critic.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "values": self.values,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._prepare()
        super().restore(state)
        self.critic.load_state_dict(state["critic"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        if state["values"] is not None:
            self.values = {name: value.to(self.model.device) for name, value in state["values"].items()}

    def advantages(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        """(B, T) by the critic, which learns from the same returns; a sample without a reward teaches neither."""
        settings = self.settings
        batches = [rows for minibatch in self._minibatches() for rows in minibatch]
        values = rollout_values(self.critic, rollout, batches, self.interrupt.check)
        mask = rollout.mask & ~rewards.isnan()[:, None]
        token_rewards = torch.zeros_like(values)
        if settings.kl_coef:
            token_rewards -= settings.kl_coef * (rollout.old_logprobs - rollout.ref_logprobs)
        last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
        token_rewards = token_rewards + torch.where(last, rewards[:, None], 0.0)
        advantages, returns = gae(token_rewards, values, mask, gamma=settings.gamma, lam=settings.lam)
        self.values = {"values": values, "returns": returns, "mask": mask}
        old, target = values[mask], returns[mask]
        self.measured |= {
            "value": old.mean().item() if len(old) else math.nan,
            "return": target.mean().item() if len(old) else math.nan,
            "explained_variance": explained_variance(old, target) if len(old) else math.nan,
        }
        if settings.kl_coef:
            self.measured["reward_kl"] = (rollout.old_logprobs - rollout.ref_logprobs)[rollout.mask].mean().item()
        return whiten(advantages, mask) if settings.whiten else advantages

    def gradient(self, rows: list[Tensor]) -> dict[str, float]:
        """The policy's gradient, which the trainer applies, and the critic's, which is applied here."""
        settings = self.settings
        metrics = super().gradient(rows)
        self.critic_optimizer.zero_grad()
        metrics |= value_gradient(
            self.critic, self.rollout, self.values["values"], self.values["returns"], self.values["mask"], rows,
            clip=settings.value_clip, check=self.interrupt.check,
        )
        norm = torch.nn.utils.clip_grad_norm_(self.critic.parameters(), settings.grad_clip).item()
        if not (math.isfinite(metrics["value_loss"]) and math.isfinite(norm)):
            raise TrainingError(
                f"step {self.step}, minibatch {self.minibatch}: value loss {metrics['value_loss']}, gradient norm "
                f"{norm} of the critic, expected finite numbers"
            )
        self.critic_optimizer.step()
        return metrics | {"value_grad_norm": norm}

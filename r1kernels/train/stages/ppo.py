"""PPO: reinforcement learning with a critic, for comparison with GRPO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from r1kernels.train.config import ObjectiveConfig, Recipe
from r1kernels.train.schema import ConfigError, check_ranges
from r1kernels.train.stage import Stage
from r1kernels.train.stages import grpo


@dataclass(frozen=True)
class Config(grpo.Config):
    """As GRPO, with advantages by a critic. Groups of samples stay, so that both see the same questions as often.

    Args:
        lam: of GAE; 1 gives each token the reward still to come less its state's value, 0.95 is the usual.
        gamma: discount a token.
        kl_coef: of the penalty in each token's reward for leaving the reference, as in RLHF. The objective's own
            `kl_coef` is one in the loss, as in GRPO.
        value_learning_rate: of the critic.
        value_clip: how far a value may move from that of the rollout before its loss is cut off; null for any.
        whiten: shift and scale the advantages of a rollout's tokens to mean 0 and standard deviation 1.
    """

    kind: Literal["ppo"]
    lam: float = 0.95
    gamma: float = 1.0
    kl_coef: float = 0.0
    value_learning_rate: float = 1e-5
    value_clip: float | None = 0.2
    whiten: bool = True
    objective: ObjectiveConfig = field(
        default_factory=lambda: ObjectiveConfig("grpo", {"clip_low": 0.2, "clip_high": 0.2, "aggregate": "token_mean"})
    )

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        if self.objective.build().ratio != "token":
            raise ConfigError(
                f"'objective.preset' is {self.objective.preset!r}, whose ratio is a sequence's, expected a ratio of "
                "tokens: advantages are a token's"
            )
        check_ranges(
            self,
            at_least_0=("kl_coef",),
            positive=("value_learning_rate", "value_clip"),
            probability=("lam", "gamma"),
        )


def run(stage: Stage) -> dict[str, Any]:
    from r1kernels.train.ppo import PPOTrainer

    return PPOTrainer(stage).run()

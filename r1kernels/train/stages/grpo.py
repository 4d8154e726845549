"""Reinforcement learning as R1-Zero and R1 do it: groups of samples, rewards, GRPO."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from r1kernels.train.config import ObjectiveConfig, Recipe
from r1kernels.train.importance import ImportanceConfig
from r1kernels.train.reward_model import PreferenceReward
from r1kernels.train.rewards import REWARDS
from r1kernels.train.schema import ConfigError, check_ranges
from r1kernels.train.stage import Stage


@dataclass(frozen=True)
class LengthStep:
    """From this step on, completions may have so many tokens."""

    from_step: int
    max_new_tokens: int


@dataclass(frozen=True)
class SamplerConfig:
    """`transformers` samples in this process; `vllm` asks a server at `url`, which reads weights from `weights_dir`.

    `served_name`: of the model there, if there are several; `requests`: how many are under way at once.
    """

    kind: Literal["transformers", "vllm"] = "transformers"
    url: str | None = None
    weights_dir: str | None = None
    served_name: str | None = None
    requests: int = 64
    timeout_s: float = 3600.0


@dataclass(frozen=True)
class Config:
    """One step = one rollout of `questions * group_size` samples, then `minibatches` updates in each of `epochs`.

    `rollout_batch_size` and `micro_batch_size` bound the samples in memory at once, in sampling and in training; the
    latter changes no gradient. `oversample` asks for that many times the questions and trains on the first `questions`
    groups whose rewards differ (DAPO's dynamic sampling). A group whose rewards differ by no more than `min_spread`
    counts as equal: else a crumb, such as 0.01 more language consistency, is scaled up to the size of a success.
    `preference` adds scores of reward models in the last steps of the stage; questions without a checkable answer are
    asked only then. `rewards` with a weight of 0 are reported.
    """

    name: str
    kind: Literal["grpo"]
    model: str
    problems: list[str]
    rewards: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0, "format": 1.0})
    preference: list[PreferenceReward] = field(default_factory=list)
    steps: int = 40
    questions: int = 32
    group_size: int = 16
    oversample: int = 1
    min_spread: float = 0.0
    minibatches: int = 4
    epochs: int = 1
    rollout_batch_size: int | None = None
    micro_batch_size: int | None = None
    learning_rate: float = 3e-6
    warmup_updates: int = 0
    grad_clip: float = 1.0
    temperature: float = 1.0
    max_new_tokens: int = 64
    length_schedule: list[LengthStep] = field(default_factory=list)
    ref_refresh_every: int = 400
    advantage_scale: Literal["group_std", "batch_std", "none"] = "group_std"
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def check(self, recipe: Recipe) -> None:
        check_rl(self, recipe)
        if self.group_size < 2:
            raise ConfigError(f"'group_size' is {self.group_size}, expected at least 2: advantages compare samples")
        self.objective.build()

    @property
    def judges_open(self) -> bool:
        """Whether a reward is for open problems alone."""
        return any(weight and REWARDS[name].kinds == ("open",) for name, weight in self.rewards.items())

    @property
    def updates(self) -> int:
        """Of a step."""
        return self.epochs * self.minibatches

    @property
    def grows(self) -> tuple[str, ...]:
        """What may grow without making the steps already done others."""
        return () if any(item.last_steps is not None for item in self.preference) else ("steps",)

    def limit(self, step: int) -> int:
        """The most tokens of a completion at a step."""
        reached = [item.max_new_tokens for item in self.length_schedule if item.from_step <= step]
        return reached[-1] if reached else self.max_new_tokens


def check_rl(config: Any, recipe: Recipe) -> None:
    """What all stages of reinforcement learning have in common."""
    check_ranges(
        config,
        at_least_1=("steps", "questions", "group_size", "oversample", "minibatches", "epochs", "rollout_batch_size",
                    "micro_batch_size", "max_new_tokens", "ref_refresh_every", "sampler.requests"),
        at_least_0=("warmup_updates", "min_spread"),
        positive=("learning_rate", "temperature", "grad_clip", "sampler.timeout_s"),
    )
    samples = config.questions * config.group_size
    if samples % config.minibatches:
        raise ConfigError(
            f"'minibatches' is {config.minibatches}, expected a divisor of the {samples} samples of a rollout "
            f"(questions {config.questions} x group_size {config.group_size})"
        )
    for name in config.rewards:
        if name not in REWARDS:
            raise ConfigError(f"'rewards' names {name!r}, expected some of {', '.join(sorted(REWARDS))}")
    if not config.problems:
        raise ConfigError("'problems' is empty, expected the name of a data set at least")
    if not any(config.rewards.values()) and not config.preference:
        raise ConfigError(f"'rewards' is {config.rewards}, expected one at least whose weight is not 0")
    shortest = min([config.max_new_tokens, *(item.max_new_tokens for item in config.length_schedule)])
    if config.rewards.get("overlong") and recipe.scoring.overlong_buffer >= shortest:
        raise ConfigError(
            f"'scoring.overlong_buffer' is {recipe.scoring.overlong_buffer}, expected fewer tokens than a completion "
            f"may have ({shortest}), for the reward 'overlong'"
        )
    for index, item in enumerate(config.preference):
        if not math.isfinite(item.weight) or (item.last_steps is not None and not 1 <= item.last_steps <= config.steps):
            raise ConfigError(
                f"'preference[{index}]' is {item}, expected a finite weight and last_steps from 1 to {config.steps}"
            )
    judges = [item.model for item in config.preference]
    if len(set(judges)) < len(judges):
        raise ConfigError(f"'preference' names the models {judges}, expected each once")
    for index, item in enumerate(config.length_schedule):
        if item.max_new_tokens < 1 or item.from_step < 0:
            raise ConfigError(f"'length_schedule[{index}]' is {item}, expected from_step >= 0 and max_new_tokens >= 1")
    steps = [item.from_step for item in config.length_schedule]
    if steps != sorted(set(steps)):
        raise ConfigError(f"'length_schedule' has the steps {steps}, expected each once and in order")
    for key, example in (("url", "http://localhost:8000"), ("weights_dir", "/dev/shm/weights")):
        if config.sampler.kind == "vllm" and not getattr(config.sampler, key):
            raise ConfigError(f"'sampler.{key}' is missing, expected one for kind 'vllm', such as {example}")
    if config.sampler.url and not config.sampler.url.startswith(("http://", "https://")):
        raise ConfigError(f"'sampler.url' is {config.sampler.url!r}, expected http://... or https://...")


def run(stage: Stage) -> dict[str, Any]:
    from r1kernels.train.grpo import GRPOTrainer

    return GRPOTrainer(stage).run()

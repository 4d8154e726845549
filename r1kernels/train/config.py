"""The configuration of a run: dataclasses, read from YAML, with an error that names what is wrong.

Every check that needs no model is made here, before any work starts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from r1kernels import Objective, objectives
from r1kernels.train.schema import ConfigError, Scalar, build, override_key, read_yaml


@dataclass(frozen=True)
class TinyConfig:
    """Shape of the model made on the spot (Llama architecture)."""

    hidden_size: int = 96
    intermediate_size: int = 256
    layers: int = 3
    heads: int = 3


@dataclass(frozen=True)
class ModelConfig:
    """`path`: a directory or hub id; or `tiny`: a model made here, which `pretrain` then trains."""

    path: str | None = None
    tiny: TinyConfig | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class CorpusConfig:
    """What the generated text of pre-training is made of (see `tiny.document`); all are probabilities."""

    textbook: float = 0.6
    worked: float = 0.15
    tagged: float = 0.5
    terse_wrong: float = 0.8
    slip: float = 0.02
    chinese: float = 0.0
    switch: float = 0.0
    care: float = 1.0
    check: float = 0.0
    stutter: float = 0.0
    greetings: float = 0.0
    kind: float = 0.3


@dataclass(frozen=True)
class PretrainConfig:
    """Next-token training of a tiny model on rows of `window` tokens of generated text."""

    steps: int = 600
    batch_size: int = 8
    window: int = 128
    learning_rate: float = 3e-3
    corpus: CorpusConfig = field(default_factory=CorpusConfig)


@dataclass(frozen=True)
class DataConfig:
    """`arithmetic`: sums of `min_terms` to `max_terms` digits. `gsm8k`: the JSONL files at the two paths."""

    kind: Literal["arithmetic", "gsm8k"] = "arithmetic"
    min_terms: int = 4
    max_terms: int = 6
    train_size: int = 4096
    path: str | None = None
    test_path: str | None = None


@dataclass(frozen=True)
class RewardConfig:
    """`parts`: weight of each reward by name."""

    parts: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0, "format": 1.0})
    workers: int = 1
    timeout_s: float = 5.0


@dataclass(frozen=True)
class ObjectiveConfig:
    """A preset of `r1kernels.objectives` and the fields of it to override, which the objective itself checks."""

    preset: str = "r1"
    options: dict[str, Scalar] = field(default_factory=dict)

    def build(self) -> Objective:
        """The objective; raises ConfigError for an unknown preset or field."""
        presets = ("grpo", "r1", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "reinforce")
        if self.preset not in presets:
            raise ConfigError(f"grpo.objective.preset is {self.preset!r}, expected one of {', '.join(presets)}")
        try:
            return getattr(objectives, self.preset)(**self.options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"grpo.objective.options: {error}") from error


@dataclass(frozen=True)
class GRPOConfig:
    """Pure RL. One step = one rollout of `questions * group_size` samples, then `minibatches` updates.

    `rollout_batch_size` and `micro_batch_size` bound the samples in memory at once, in sampling and in training;
    the latter changes no gradient.
    """

    steps: int = 40
    questions: int = 32
    group_size: int = 16
    minibatches: int = 4
    rollout_batch_size: int | None = None
    micro_batch_size: int | None = None
    learning_rate: float = 3e-6
    warmup_updates: int = 0
    grad_clip: float = 1.0
    temperature: float = 1.0
    max_new_tokens: int = 64
    open_think: bool = False
    ref_refresh_every: int = 400
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)


@dataclass(frozen=True)
class EvalConfig:
    """pass@1 is the mean over `samples` samples of each of `questions` held-out questions."""

    every: int = 5
    questions: int = 128
    samples: int = 4
    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int | None = None
    batch_size: int = 512


@dataclass(frozen=True)
class CheckpointConfig:
    """`every` counts steps of RL, `pretrain_every` steps of pre-training."""

    every: int = 5
    pretrain_every: int = 200
    keep: int = 2


@dataclass(frozen=True)
class Config:
    """A run. `run_dir` is where everything it makes goes."""

    run_dir: str
    seed: int = 0
    threads: int | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    pretrain: PretrainConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe.

    Args:
        path: a YAML file whose keys are those of `Config`.
        overrides: `"grpo.steps=10"`: replaces one key; the value is read as YAML.

    Raises:
        ConfigError: naming the file, the key, its value and what was expected.
    """
    path = Path(path)
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {values!r:.40}, expected a mapping with the keys of a recipe")
    for override in overrides:
        override_key(values, override)
    try:
        config = build(Config, values)
        _check(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def dump_config(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


_AT_LEAST_1 = (
    "threads", "pretrain.steps", "pretrain.batch_size", "pretrain.window", "data.train_size", "reward.workers",
    "grpo.steps", "grpo.questions", "grpo.minibatches", "grpo.rollout_batch_size", "grpo.micro_batch_size",
    "grpo.max_new_tokens", "grpo.ref_refresh_every", "eval.every", "eval.questions", "eval.samples",
    "eval.max_new_tokens", "eval.batch_size", "checkpoint.every", "checkpoint.pretrain_every", "checkpoint.keep",
)
_AT_LEAST_0 = ("seed", "grpo.warmup_updates")
_POSITIVE = (
    "pretrain.learning_rate", "reward.timeout_s", "grpo.learning_rate", "grpo.temperature", "grpo.grad_clip",
    "eval.temperature", "eval.top_p",
)
_PROBABILITIES = (
    "eval.top_p", *(f"pretrain.corpus.{item.name}" for item in dataclasses.fields(CorpusConfig)),
)


def _check(config: Config) -> None:
    """The ranges, and the rules that concern more than one key."""
    ranges = (
        (_AT_LEAST_1, lambda value: value >= 1, "at least 1"),
        (_AT_LEAST_0, lambda value: value >= 0, "at least 0"),
        (_POSITIVE, lambda value: 0 < value < float("inf"), "a positive number"),
        (_PROBABILITIES, lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    )
    for keys, holds, expected in ranges:
        for key in keys:
            value = _lookup(config, key)
            if value is not None and not holds(value):
                raise ConfigError(f"'{key}' is {value}, expected {expected}")
    try:
        torch.device(config.model.device)
    except RuntimeError:
        raise ConfigError(
            f"'model.device' is {config.model.device!r}, expected the name of a device, such as cpu, cuda or cuda:1"
        ) from None
    _check_model_and_data(config)
    grpo = config.grpo
    if grpo.group_size < 2:
        raise ConfigError(f"'grpo.group_size' is {grpo.group_size}, expected at least 2: advantages compare samples")
    samples = grpo.questions * grpo.group_size
    if samples % grpo.minibatches:
        raise ConfigError(
            f"'grpo.minibatches' is {grpo.minibatches}, expected a divisor of the {samples} samples of a rollout "
            f"(questions {grpo.questions} x group_size {grpo.group_size})"
        )
    if "accuracy" not in config.reward.parts:
        raise ConfigError(
            f"'reward.parts' is {config.reward.parts}, expected 'accuracy' among them: pass@1 is its mean (a weight "
            "of 0 reports it without rewarding it)"
        )
    grpo.objective.build()


def _check_model_and_data(config: Config) -> None:
    model, data = config.model, config.data
    if (model.path is None) == (model.tiny is None):
        raise ConfigError(f"'model' has path {model.path!r} and tiny {model.tiny!r}, expected exactly one of them")
    if (model.tiny is None) != (config.pretrain is None):
        raise ConfigError("'pretrain' and 'model.tiny' come together: only a tiny model is pre-trained, and it must be")
    if model.tiny:
        if min(dataclasses.astuple(model.tiny)) < 1 or model.tiny.hidden_size % (2 * model.tiny.heads):
            raise ConfigError(
                f"'model.tiny' is {model.tiny}, expected sizes of at least 1 and hidden_size a multiple of 2 x heads"
            )
        if data.kind != "arithmetic":
            raise ConfigError(f"'data.kind' is '{data.kind}', expected 'arithmetic' with 'model.tiny'")
    if data.kind == "gsm8k":
        for key in ("path", "test_path"):
            if getattr(data, key) is None:
                raise ConfigError(f"'data.{key}' is missing, expected a JSONL file with data.kind 'gsm8k'")
    elif not 2 <= data.min_terms <= data.max_terms:
        raise ConfigError(
            f"'data.min_terms' and 'data.max_terms' are {data.min_terms} and {data.max_terms}, expected "
            "2 <= min_terms <= max_terms"
        )


def _lookup(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = None if config is None else getattr(config, name)
    return config

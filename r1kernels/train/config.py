"""The configuration of a run: dataclasses, read from YAML, with an error that names what is wrong.

Every check that needs no model is made here, before any work starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from r1kernels import Objective, objectives


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key, its value and what was expected."""


@dataclass(frozen=True)
class TinyConfig:
    """Shape of the model made on the spot (Qwen2 architecture)."""

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

    textbook: float = 0.5
    worked: float = 0.15
    tagged: float = 0.5
    terse_wrong: float = 0.8
    slip: float = 0.02


@dataclass(frozen=True)
class PretrainConfig:
    """Next-token training of a tiny model on generated text."""

    steps: int = 600
    batch_size: int = 32
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
    """A preset of `r1kernels.objectives` and the fields of it to override."""

    preset: str = "r1"
    options: dict[str, float] = field(default_factory=dict)

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

    `micro_batch_size` bounds the samples in memory at once and changes no gradient.
    """

    steps: int = 40
    questions: int = 32
    group_size: int = 16
    minibatches: int = 4
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
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read recipe {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {values!r:.40}, expected a mapping with the keys of a recipe")
    for override in overrides:
        _override(values, override)
    try:
        config = _build(Config, values, "")
        _check(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def dump_config(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def differences(first: Config, second: Config) -> list[str]:
    """The dotted keys, with both values, in which two configurations differ."""

    def flat(values: Any, key: str = "") -> dict[str, Any]:
        if not isinstance(values, dict):
            return {key: values}
        return {k: v for name in values for k, v in flat(values[name], f"{key}.{name}".lstrip(".")).items()}

    a, b = flat(dataclasses.asdict(first)), flat(dataclasses.asdict(second))
    return [f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in {**a, **b} if a.get(key) != b.get(key)]


def _override(values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    *parents, last = key.split(".")
    if not equals or not all((*parents, last)):
        raise ConfigError(f"--set {override!r}: expected KEY=VALUE with a dotted key, such as grpo.steps=10")
    for parent in parents:
        if not isinstance(values.setdefault(parent, {}), dict):
            values[parent] = {}
        values = values[parent]
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from error


def _build(cls: type, values: Any, where: str) -> Any:
    """An instance of the dataclass `cls` from a mapping; `where` is its dotted key, empty at the top."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"'{where}' is {values!r:.60}, expected a mapping")
    hints, keys = typing.get_type_hints(cls), [item.name for item in dataclasses.fields(cls)]
    arguments = {}
    for key, value in values.items():
        if key not in keys:
            close = difflib.get_close_matches(str(key), keys, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"expected one of {', '.join(keys)}"
            raise ConfigError(f"unknown key '{key}'" + (f" in '{where}'" if where else "") + f" ({hint})")
        arguments[key] = _convert(hints[key], value, f"{where}.{key}" if where else key)
    for item in dataclasses.fields(cls):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in arguments:
            raise ConfigError(f"missing key '{item.name}'" + (f" in '{where}'" if where else ""))
    return cls(**arguments)


def _convert(hint: Any, value: Any, where: str) -> Any:
    def wrong(expected: str) -> ConfigError:
        return ConfigError(f"'{where}' is {value!r:.60}, expected {expected}")

    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(options[0], value, where)
    if origin is Literal:
        if value not in options:
            raise wrong("one of " + ", ".join(map(str, options)))
        return value
    if origin is dict:
        if not isinstance(value, Mapping):
            raise wrong("a mapping from names to numbers")
        return {str(key): _convert(options[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if hint is float:
        try:  # YAML reads 1e-3, without a dot, as a string
            if not isinstance(value, bool):
                return float(value)
        except (TypeError, ValueError):
            pass
        raise wrong("a number")
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise wrong({int: "an integer", str: "a string", bool: "true or false"}[hint])
    return value


def _check(config: Config) -> None:
    """The rules that concern more than one key, and the ranges."""
    model, data, grpo = config.model, config.data, config.grpo
    if (model.path is None) == (model.tiny is None):
        raise ConfigError(f"'model' has path {model.path!r} and tiny {model.tiny!r}, expected exactly one of them")
    if config.pretrain is not None and model.tiny is None:
        raise ConfigError("'pretrain' is set, expected none with 'model.path': only a tiny model is pre-trained")
    if model.tiny and model.tiny.hidden_size % (2 * model.tiny.heads):
        raise ConfigError(
            f"'model.tiny.hidden_size' is {model.tiny.hidden_size}, expected a multiple of twice the "
            f"{model.tiny.heads} heads"
        )
    if data.kind == "gsm8k":
        for key in ("path", "test_path"):
            if getattr(data, key) is None:
                raise ConfigError(f"'data.{key}' is missing, expected a JSONL file with data.kind 'gsm8k'")
    elif not 2 <= data.min_terms <= data.max_terms:
        raise ConfigError(
            f"'data.min_terms' and 'data.max_terms' are {data.min_terms} and {data.max_terms}, expected "
            "2 <= min_terms <= max_terms"
        )
    samples = grpo.questions * grpo.group_size
    if grpo.minibatches < 1 or samples % grpo.minibatches:
        raise ConfigError(
            f"'grpo.minibatches' is {grpo.minibatches}, expected a divisor of the {samples} samples of a "
            f"rollout (questions {grpo.questions} x group_size {grpo.group_size})"
        )
    if grpo.group_size < 2:
        raise ConfigError(f"'grpo.group_size' is {grpo.group_size}, expected at least 2: advantages compare samples")
    at_least = {
        1: ("grpo.steps", "grpo.questions", "grpo.max_new_tokens", "grpo.ref_refresh_every", "grpo.micro_batch_size",
            "eval.every", "eval.questions", "eval.samples", "eval.batch_size", "eval.max_new_tokens", "threads",
            "checkpoint.every", "checkpoint.pretrain_every", "checkpoint.keep", "pretrain.steps",
            "pretrain.batch_size", "reward.workers"),
        0: ("grpo.warmup_updates", "seed"),
    }
    for bound, keys in at_least.items():
        for key in keys:
            value = _lookup(config, key)
            if value is not None and value < bound:
                raise ConfigError(f"'{key}' is {value}, expected at least {bound}")
    for key in ("grpo.learning_rate", "grpo.temperature", "grpo.grad_clip", "eval.temperature", "eval.top_p",
                "pretrain.learning_rate", "reward.timeout_s"):
        value = _lookup(config, key)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"'{key}' is {value}, expected a positive number")
    corpus = dataclasses.asdict(config.pretrain.corpus) if config.pretrain else {}
    for key, value in {"eval.top_p": config.eval.top_p, **{f"pretrain.corpus.{k}": v for k, v in corpus.items()}}.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"'{key}' is {value}, expected a probability between 0 and 1")
    grpo.objective.build()


def _lookup(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = None if config is None else getattr(config, name)
    return config

"""A recipe: settings of the whole run, named data sets and a list of stages, read from YAML.

Every check that needs no model is made here, before any work starts, and its error names what is wrong.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from r1kernels import Objective, objectives
from r1kernels.train.rewards.settings import ScoringConfig
from r1kernels.train.schema import ConfigError, Scalar, build, check_ranges, override_key, read_yaml
from r1kernels.train.stages import KINDS, stage_module

# Names of stages are names of directories too, beside the other files of a run.
_LONGEST = 100
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
RUN_FILES = ("config.yaml", "manifest.json", "superseded", "report.md", "report.html", "curves.png", "tensorboard")
# Keys of a stage, at any depth, whose values name other things of the recipe, and what they may name.
REFERENCES: dict[str, tuple[str, ...]] = {
    "model": ("model",), "teacher": ("model",), "preference.model": ("scores",), "problems": ("data",),
    "samples": ("data", "samples"), "pairs": ("data", "samples"),
}

_SORTS = {
    "data": "a data set", "model": "a stage with a model", "samples": "a stage of kind reject",
    "scores": "a stage of kind preference",
}


@dataclass(frozen=True)
class DataConfig:
    """A set of problems.

    Args:
        kind: `arithmetic`: sums of `min_terms` to `max_terms` digits; `greetings`: requests without a checkable
            answer; both are generated. `gsm8k`, `math`, `humaneval`: the files of these sets. `jsonl`: one object a
            line, with `question` and `answer` (and `kind`, see `Problem`), or `response` for SFT, or `chosen` and
            `rejected` for preferences.
        path: the file to train on; test_path: the held-out one.
        language: of the questions, which answers should be in.
    """

    kind: Literal["arithmetic", "greetings", "gsm8k", "math", "humaneval", "jsonl"]
    min_terms: int = 4
    max_terms: int = 6
    train_size: int = 4096
    path: str | None = None
    test_path: str | None = None
    language: Literal["en", "zh"] = "en"

    @property
    def generated(self) -> bool:
        return self.kind in ("arithmetic", "greetings")

    @property
    def has_test(self) -> bool:
        return self.kind == "arithmetic" or self.test_path is not None


@dataclass(frozen=True)
class ObjectiveConfig:
    """A preset of `r1kernels.objectives` and the fields of it to override, which the objective itself checks."""

    preset: str = "r1"
    options: dict[str, Scalar] = field(default_factory=dict)

    def build(self) -> Objective:
        """The objective; raises ConfigError for an unknown preset or field."""
        presets = ("grpo", "r1", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "reinforce")
        if self.preset not in presets:
            raise ConfigError(f"'objective.preset' is {self.preset!r}, expected one of {', '.join(presets)}")
        try:
            return getattr(objectives, self.preset)(**self.options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"'objective.options': {error}") from error


@dataclass(frozen=True)
class EvalConfig:
    """pass@1 is the mean over `samples` samples of each of `questions` held-out questions of each set of `problems`.

    Every stage with a model ends with an evaluation; RL has one every `every` steps too. `problems` are the data sets
    with held-out problems if none is named. `max_new_tokens` is the same for all stages, so that they compare.
    """

    every: int = 5
    problems: list[str] = field(default_factory=list)
    questions: int = 128
    samples: int = 4
    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 64
    batch_size: int = 512


@dataclass(frozen=True)
class CheckpointConfig:
    """`every` counts steps of RL; `every_updates`, if given, its optimiser steps, inside a rollout too;
    `supervised_every` steps of other training."""

    every: int = 5
    every_updates: int | None = None
    supervised_every: int = 200
    keep: int = 2


@dataclass(frozen=True)
class Recipe:
    """A run. `run_dir` is where everything it makes goes; `stages` are configurations of `r1kernels.train.stages`."""

    run_dir: str
    stages: tuple[Any, ...]
    seed: int = 0
    threads: int | None = None
    device: str = "cpu"
    template: Literal["r1_zero", "chat"] = "r1_zero"
    open_think: bool = False
    data: dict[str, DataConfig] = field(default_factory=dict)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    trackers: list[str] = field(default_factory=list)

    def stage(self, name: str) -> Any:
        """The configuration of a stage."""
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def eval_problems(self) -> list[str]:
        return self.eval.problems or [name for name, data in self.data.items() if data.has_test]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        path: a YAML file whose keys are those of `Recipe`.
        overrides: `"eval.samples=10"`, `"stages.r1.steps=10"`: replaces one key; the value is read as YAML.

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
        values = override_key(values, override)
    try:
        stages = _build_stages(values.pop("stages", None))
        recipe = dataclasses.replace(build(Recipe, {**values, "stages": []}), stages=stages)
        _check(recipe)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return recipe


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain mappings and lists, as YAML and JSON hold them."""
    return _plain(dataclasses.asdict(config))


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back."""
    return yaml.safe_dump(as_dict(recipe), sort_keys=False, allow_unicode=True)


def references(config: Any) -> Iterator[tuple[str, str]]:
    """What a stage's configuration names of the recipe: (key, name)."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        for part in value if isinstance(value, list | tuple) else (value,):
            if dataclasses.is_dataclass(part):
                yield from ((f"{item.name}.{key}", name) for key, name in references(part))
            elif item.name in REFERENCES and isinstance(part, str):
                yield item.name, part


def allowed_for(key: str) -> tuple[str, ...]:
    """What the value of a key that `references` gives may name."""
    return REFERENCES.get(key) or REFERENCES[key.rpartition(".")[2]]


def _build_stages(values: Any) -> tuple[Any, ...]:
    if not isinstance(values, list) or not values:
        raise ConfigError(f"'stages' is {values!r:.60}, expected a list of at least one stage")
    stages = []
    for index, item in enumerate(values):
        where = f"stages[{index}]"
        if not isinstance(item, Mapping):
            raise ConfigError(f"'{where}' is {item!r:.60}, expected a mapping with 'name' and 'kind'")
        for key in ("name", "kind"):
            if not isinstance(item.get(key), str):
                raise ConfigError(f"'{where}.{key}' is {item.get(key)!r:.60}, expected a word")
        if item["kind"] not in KINDS:
            raise ConfigError(
                f"stage '{item['name']}' is of the unknown kind {item['kind']!r}, expected one of {', '.join(KINDS)}"
            )
        stages.append(build(stage_module(item["kind"]).Config, item, f"stages.{item['name']}"))
    return tuple(stages)


def _check(recipe: Recipe) -> None:
    """The ranges, and the rules that concern more than one key."""
    check_ranges(
        recipe,
        at_least_1=("threads", "eval.every", "eval.questions", "eval.samples", "eval.max_new_tokens", "eval.batch_size",
                    "checkpoint.every", "checkpoint.every_updates", "checkpoint.supervised_every", "checkpoint.keep"),
        at_least_0=("seed",),
        positive=("eval.temperature", "eval.top_p"),
        probability=("eval.top_p",),
    )
    try:
        torch.device(recipe.device)
    except RuntimeError:
        raise ConfigError(
            f"'device' is {recipe.device!r}, expected the name of a device, such as cpu, cuda or cuda:1"
        ) from None
    for name, data in recipe.data.items():
        try:
            _check_data(data)
        except ConfigError as error:
            raise ConfigError(f"data set '{name}': {error}") from None
    _check_names(recipe)
    for name in recipe.eval.problems:
        if name not in recipe.data or not recipe.data[name].has_test:
            raise ConfigError(f"'eval.problems' names {name!r}, expected a data set with held-out problems (test_path)")
    if not recipe.eval_problems:
        raise ConfigError("'data' has no set with held-out problems ('test_path'), expected one: stages are evaluated")
    for stage in recipe.stages:
        try:
            stage.check(recipe)
        except ConfigError as error:
            raise ConfigError(f"stage '{stage.name}': {error}") from None


def _check_names(recipe: Recipe) -> None:
    """That every name is one, and that what stages refer to exists and is of the right sort."""
    kinds = dict.fromkeys(recipe.data, "data")
    for name in (*recipe.data, *(stage.name for stage in recipe.stages)):
        if not re.fullmatch(_NAME, name) or len(name) > _LONGEST:
            raise ConfigError(
                f"the name {name!r:.120} is not one: expected at most {_LONGEST} letters, digits, '_', '-' and '.'"
            )
    for stage in recipe.stages:
        if stage.name in kinds:
            raise ConfigError(f"the name '{stage.name}' is given twice, expected one for each data set and stage")
        if stage.name in RUN_FILES:
            raise ConfigError(f"the name '{stage.name}' of a stage is that of a file of a run, expected another")
        kinds[stage.name] = KINDS[stage.kind]
    for stage in recipe.stages:
        for key, name in references(stage):
            allowed = allowed_for(key)
            if kinds.get(name) not in allowed:
                what = " or ".join(_SORTS[sort] for sort in allowed)
                known = ", ".join(other for other, sort in kinds.items() if sort in allowed) or "none"
                raise ConfigError(f"stage '{stage.name}': '{key}' names {name!r}, expected {what} ({known})")


def _check_data(data: DataConfig) -> None:
    check_ranges(data, at_least_1=("train_size",))
    if not data.generated and data.path is None and data.test_path is None:
        raise ConfigError(f"'path' is missing, expected a file with kind '{data.kind}'")
    if data.kind == "arithmetic" and not 2 <= data.min_terms <= data.max_terms:
        raise ConfigError(
            f"'min_terms' and 'max_terms' are {data.min_terms} and {data.max_terms}, expected "
            "2 <= min_terms <= max_terms"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value

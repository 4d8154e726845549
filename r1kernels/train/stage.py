"""What a stage works with: its settings, its directory, and the models and data that it names."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1kernels.rewards import Scorer, sandbox
from r1kernels.rewards.judge import Judge
from r1kernels.train.checkpoint import MODEL, latest_checkpoint, verify_checkpoint
from r1kernels.train.data import (
    Demonstration,
    Pair,
    Problem,
    check_data,
    load_demonstrations,
    load_pairs,
    load_problems,
    load_selected,
)
from r1kernels.train.errors import CheckpointError, ConfigError
from r1kernels.train.interrupt import Interrupt
from r1kernels.train.log import Console
from r1kernels.train.model import check_device, load_model, load_tokenizer, max_positions
from r1kernels.train.prompt import Template
from r1kernels.train.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SELECTED = "selected.jsonl"  # what a stage of kind reject leaves


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Args:
        settings: of the stage, one of the classes of `recipe`.
        directory: exists; the stage writes nowhere else.
        before: evaluation of the model that it starts from, if there is one.
    """

    recipe: Recipe
    settings: Any
    directory: Path
    console: Console
    interrupt: Interrupt
    before: dict[str, Any] | None = None

    @property
    def seed(self) -> int:
        return self.recipe.seed

    def directory_of(self, name: str) -> Path:
        """The directory of another stage."""
        return self.directory.parent / name

    def model_path(self, name: str) -> str | Path:
        """Where the model of a finished stage is: a directory, or a name on the hub."""
        return model_path(self.recipe, self.directory.parent, name)

    def load_model(self, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model of a stage in evaluation mode, on the run's device, and its tokenizer."""
        path, overrides = self.model_path(name), model_overrides(self.recipe, name)
        return load_model(path, device=self.recipe.device, overrides=overrides), load_tokenizer(path)

    def template(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        return Template(self.recipe.template, tokenizer, open_think=self.recipe.open_think)

    def problems(self, names: list[str]) -> list[Problem]:
        """The training problems of some data sets, in their order."""
        return [problem for name in names for problem in load_problems(self.recipe, name, "train")]

    def demonstrations(self, names: list[str], template: Template) -> list[Demonstration]:
        """Prompts with responses, from data sets and from stages of kind reject."""
        found: list[Demonstration] = []
        for name in names:
            if name in self.recipe.data:
                found += load_demonstrations(self.recipe, name, template)
            else:
                found += load_selected(self.directory_of(name) / SELECTED, template)
        return found

    def pairs(self, name: str) -> list[Pair]:
        """The preference pairs of a data set."""
        return load_pairs(self.recipe, name)

    def scorer(self, rewards: Mapping[str, float]) -> Scorer:
        """A scorer of these rewards; none of its workers runs yet."""
        return make_scorer(self.recipe, rewards)


def model_path(recipe: Recipe, run_dir: Path, name: str) -> str | Path:
    """Where the model of a finished stage of a run is: a directory, or a name on the hub."""
    settings = recipe.stages[name]
    if settings.kind == "model":
        return settings.path
    checkpoint = latest_checkpoint(run_dir / name)
    if checkpoint is None:
        raise ConfigError(f"stage '{name}' has no checkpoint in {run_dir / name}")
    try:
        verify_checkpoint(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; run with --from {name} to rebuild it") from error
    return checkpoint / MODEL


def model_overrides(recipe: Recipe, name: str) -> dict[str, Any]:
    """The fields of the configuration that a pretrained model is loaded with."""
    return getattr(recipe.stages[name], "overrides", {})


def make_scorer(recipe: Recipe, rewards: Mapping[str, float]) -> Scorer:
    """A scorer of these rewards under the recipe's limits; none of its workers runs yet."""
    judge = make_judge(recipe) if "judge" in rewards else None
    try:
        return Scorer(rewards, **recipe.scoring.model_dump() | {"judge": judge})
    except (ValueError, ImportError) as error:
        raise ConfigError(f"'rewards': {error}") from error


def make_judge(recipe: Recipe) -> Judge:
    """The language model of `scoring.judge`."""
    try:
        return Judge(**recipe.scoring.judge.model_dump())
    except (ValueError, ImportError) as error:
        raise ConfigError(f"'scoring.judge': {error}") from error


def run_model(stage: Stage) -> dict[str, Any]:
    """A stage of kind `model`: loads the model, so that its faults are found before other stages run."""
    model, tokenizer = stage.load_model(stage.settings.name)
    stage.template(tokenizer)
    return {"architecture": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}


def check_recipe(recipe: Recipe, console: Console) -> None:
    """Checks before any work that devices, functions, data, rewards, the sandbox and models can be used."""
    check_device(recipe.device)
    if recipe.trackers and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("'trackers' names 'tensorboard', which is not installed; run: pip install tensorboard")
    if recipe.scoring.judge:
        make_judge(recipe)
    for stage in recipe.stages.values():
        for key in ("architecture", "corpus", "advantages"):
            if getattr(stage, key, None):
                getattr(stage, key).load()
        if stage.kind == "grpo":
            make_scorer(recipe, stage.rewards).close()
    if "code" in check_data(recipe, console) and recipe.scoring.sandbox == "bubblewrap":
        sandbox.check(recipe.scoring.memory_mb)
    for name, stage in recipe.stages.items():
        if stage.kind == "model":
            Template(recipe.template, load_tokenizer(stage.path), open_think=recipe.open_think)
            _check_positions(recipe, name, max_positions(stage.path, stage.overrides))


def _check_positions(recipe: Recipe, base: str, most: int | None) -> None:
    """No stage that starts from a pretrained model may ask for more positions than it has."""
    family = {base}
    for _ in recipe.stages:  # the stages may be in any order
        family |= {name for name, stage in recipe.stages.items() if getattr(stage, "model", None) in family}
    limits = {"eval.max_new_tokens": recipe.eval.max_new_tokens} | {
        f"stages.{name}.{key}": getattr(recipe.stages[name], key, None) or 0
        for name in sorted(family) for key in ("window", "max_new_tokens")}
    for key, value in limits.items():
        if most is not None and value > most:
            raise ConfigError(f"'{key}' is {value}; the model of stage '{base}' supports at most {most} positions "
                              "('overrides' of that stage can set max_position_embeddings)")

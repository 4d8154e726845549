"""What a stage is given: its configuration, its directory, and what the stages and data sets it names have to offer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r1kernels.train.checkpoint import MODEL, CheckpointError, latest_checkpoint, verify_checkpoint
from r1kernels.train.config import Recipe
from r1kernels.train.console import Console
from r1kernels.train.data import Demonstration, Pair, Problem, read_selected
from r1kernels.train.interrupt import Interrupt
from r1kernels.train.loading import load_model, load_tokenizer
from r1kernels.train.problems import load_demonstrations, load_pairs, load_problems
from r1kernels.train.prompt import Template
from r1kernels.train.rewards import Scorer
from r1kernels.train.schema import ConfigError

# What a stage of kind reject leaves.
SELECTED = "selected.jsonl"


@dataclass(frozen=True)
class Stage:
    """One stage at work.

    Args:
        config: of the stage, of the class `Config` of its module.
        directory: its own, which exists; nothing else is written.
        before: the evaluation of the model that it starts from, if there is one.
    """

    recipe: Recipe
    config: Any
    directory: Path
    console: Console
    interrupt: Interrupt
    before: dict[str, Any] | None = None

    @property
    def seed(self) -> int:
        return self.recipe.seed

    def directory_of(self, name: str) -> Path:
        """The directory of another stage, which is finished."""
        return self.directory.parent / name

    def model_dir(self, name: str) -> str | Path:
        """Where the model of a finished stage lies: a directory, or a name of the hub."""
        return model_dir(self.recipe, self.directory.parent, name)

    def load_model(self, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model of a stage, on the device of the run, in evaluation mode, and its tokenizer."""
        path, overrides = self.model_dir(name), model_overrides(self.recipe, name)
        return load_model(path, device=self.recipe.device, overrides=overrides), load_tokenizer(path)

    def template(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        return Template(self.recipe.template, tokenizer, open_think=self.recipe.open_think)

    def problems(self, names: list[str]) -> list[Problem]:
        """The problems to train on of some data sets, in their order."""
        return [problem for name in names for problem in load_problems(self.recipe, name, "train")]

    def samples(self, names: list[str], template: Template) -> list[Demonstration]:
        """Prompts with responses, of data sets and of stages of kind reject."""
        found = []
        for name in names:
            if name in self.recipe.data:
                found += load_demonstrations(self.recipe, name, template)
            else:
                found += read_selected(self.directory_of(name) / SELECTED, template.render)
        return found

    def pairs(self, name: str) -> list[Pair]:
        """The preferences of a data set."""
        return load_pairs(self.recipe, name)

    def scorer(self, parts: dict[str, float]) -> Scorer:
        """The rewards; none of their workers runs yet."""
        return make_scorer(self.recipe, parts)


def model_dir(recipe: Recipe, run_dir: Path, name: str) -> str | Path:
    """Where the model of a finished stage of a run lies: a directory, or a name of the hub."""
    config = recipe.stage(name)
    if config.kind == "model":
        return config.path
    checkpoint = latest_checkpoint(run_dir / name)
    if checkpoint is None:
        raise ConfigError(f"stage '{name}' has no checkpoint in {run_dir / name}")
    try:
        verify_checkpoint(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --from {name} makes it again") from error
    return checkpoint / MODEL


def model_overrides(recipe: Recipe, name: str) -> dict[str, Any]:
    """The fields of the configuration that a model from elsewhere is loaded with."""
    return getattr(recipe.stage(name), "overrides", {})


def make_scorer(recipe: Recipe, parts: dict[str, float]) -> Scorer:
    """The rewards `parts` under the recipe's limits; none of their workers runs yet."""
    try:
        return Scorer(parts, recipe.scoring)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"'rewards': {error}") from error

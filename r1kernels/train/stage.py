"""A stage of a run: its settings, its directory, and the models and data that it names."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r1kernels.rewards import Judge, Scorer, sandbox
from r1kernels.train import data
from r1kernels.train.checkpoint import MODEL, latest_checkpoint, load_checkpoint, verify_checkpoint
from r1kernels.train.errors import ConfigError, Interrupt
from r1kernels.train.log import Console
from r1kernels.train.lora import add_adapters, check_peft
from r1kernels.train.model import check_device, enable_checkpointing, load_model, load_tokenizer, max_positions
from r1kernels.train.recipe import Function, Recipe

SELECTED = "selected.jsonl"  # the output of a stage of kind reject


@dataclass(frozen=True)
class Stage:
    """One stage of a run. It writes only into its directory; `before` is the evaluation of the model it starts from."""
    recipe: Recipe
    settings: Any
    directory: Path
    console: Console
    interrupt: Interrupt
    before: dict[str, Any] | None = None

    def model_path(self, name: str) -> str | Path:
        """Where the model of a finished stage of the run is: a directory, or a name on the hub."""
        if self.recipe.stages[name].kind == "model":
            return self.recipe.stages[name].path
        directory = self.directory.parent / name
        checkpoint = latest_checkpoint(directory)
        if checkpoint is None:
            raise ConfigError(f"stage '{name}' has no checkpoint in {directory}")
        verify_checkpoint(checkpoint)
        return checkpoint / MODEL

    def load_model(
        self, name: str, dtype: torch.dtype | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model of a stage in evaluation mode, on the run's device and in its precision, and its tokenizer."""
        path, overrides = self.model_path(name), getattr(self.recipe.stages[name], "overrides", {})
        model = load_model(path, device=self.recipe.device, dtype=dtype or self.recipe.dtype, overrides=overrides)
        return model, load_tokenizer(path)

    def start(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
        """The float32 model, its tokenizer and the state of the last checkpoint; without one, those to start from."""
        path, adapters = latest_checkpoint(self.directory), getattr(self.settings, "lora", None)
        model_dir, state = load_checkpoint(path) if path else (None, {})
        if model_dir and not adapters:
            return load_model(model_dir, device=self.recipe.device), load_tokenizer(model_dir), state
        model, tokenizer = self.load_model(self.settings.model, torch.float32)
        if adapters:
            add_adapters(model, adapters, self.recipe.seed)
            model.load_state_dict(state.pop("adapters", {}), strict=False)
        return model, load_tokenizer(model_dir) if model_dir else tokenizer, state

    def enable_checkpointing(self, model: PreTrainedModel) -> None:
        """Turns gradient checkpointing on if the recipe says so."""
        if self.recipe.gradient_checkpointing:
            enable_checkpointing(model)

    def template(self, tokenizer: PreTrainedTokenizerBase) -> data.Template:
        return data.Template(self.recipe.template, tokenizer, open_think=self.recipe.open_think)

    def problems(self, names: list[str], split: data.Split = "train") -> list[data.Problem]:
        """The problems of some data sets, in their order."""
        return [problem for name in names for problem in data.load_problems(self.recipe, name, split)]

    def demonstrations(self, names: list[str], template: data.Template) -> list[tuple[str, str]]:
        """Prompts with responses, from data sets and from stages of kind reject."""
        rows = [data.read_rows(self.recipe, name, "train") if name in self.recipe.data
                else data.read_jsonl(self.directory.parent / name / SELECTED) for name in names]
        return data.load_demonstrations(itertools.chain(*rows), template)

    def scorer(self, rewards: Mapping[str, float]) -> Scorer:
        """A scorer of these rewards under the recipe's limits."""
        try:
            return Scorer(rewards, **self.recipe.scoring.model_dump(exclude={"judge"}))
        except (ValueError, ImportError) as error:
            raise ConfigError(f"'rewards': {error}") from error

    def check(self) -> None:
        """Checks before any work that the functions, rewards and the pretrained model of this stage can be used."""
        for value in vars(self.settings).values():
            if isinstance(value, Function):
                value.load()
        if getattr(self.settings, "lora", None):
            check_peft()
        if self.settings.kind == "grpo":
            self.settings.objective.build()
            self.scorer(self.settings.rewards).close()
        if self.settings.kind == "reject" and self.settings.judge:
            make_judge(self.recipe)
        base = self.settings
        while hasattr(base, "model"):
            base = self.recipe.stages[base.model]
        if base.kind == "model":
            if base is self.settings:
                self.template(load_tokenizer(base.path))
            most = max_positions(base.path, base.overrides)
            wanted = max(self.recipe.eval.max_new_tokens, getattr(self.settings, "window", 0),
                         getattr(self.settings, "max_new_tokens", 0))
            if most is not None and wanted > most:
                raise ConfigError(f"'window', 'max_new_tokens' or 'eval.max_new_tokens' is {wanted}, and the model of "
                                  f"stage '{base.name}' has {most} positions")


def make_judge(recipe: Recipe) -> Judge:
    """The language model of `scoring.judge`."""
    if recipe.scoring.judge is None:
        raise ConfigError("'scoring.judge' is null, but a stage asks a judge; set its 'url' and 'model'")
    try:
        return Judge(**recipe.scoring.judge.model_dump())
    except (ValueError, ImportError) as error:
        raise ConfigError(f"'scoring.judge': {error}") from error


def check_recipe(recipe: Recipe, console: Console) -> None:
    """Checks before any work that devices, data, the sandbox and everything that stages need can be used."""
    check_device(recipe.device)
    if recipe.trackers and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("'trackers' names 'tensorboard', which is not installed; run: pip install tensorboard")
    for name, settings in recipe.stages.items():
        try:
            Stage(recipe, settings, Path(recipe.run_dir, name), console, Interrupt()).check()
        except ConfigError as error:
            raise ConfigError(f"stage '{name}': {error}") from error
    if "code" in data.check_data(recipe, console):
        sandbox.check(recipe.scoring.memory_mb, tuple(recipe.scoring.imports or ()))

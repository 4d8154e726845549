"""A stage of a run: its settings, its directory, and the models and data that it names."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r1kernels.rewards import Judge, Scorer, sandbox
from r1kernels.train import data
from r1kernels.train.checkpoint import MODEL, damaged, latest_checkpoint, load_checkpoint
from r1kernels.train.errors import ConfigError, Interrupt, StorageError, naming
from r1kernels.train.log import Console
from r1kernels.train.lora import add_adapters
from r1kernels.train.model import enable_checkpointing, load_config, load_model, load_tokenizer
from r1kernels.train.parallel import agree, everywhere, mesh, rank
from r1kernels.train.policy import Policy, check_tensor_axis, share_out
from r1kernels.train.recipe import Function, Recipe
from r1kernels.train.rollout import Sampler, TransformersSampler, end_tokens
from r1kernels.train.vllm import VLLMSampler

SELECTED = "selected.jsonl"  # the output of a stage of kind reject
Start = tuple[Policy, PreTrainedTokenizerBase, dict[str, Any]]


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
        return checkpoint / MODEL

    def load_model(
        self, name: str, dtype: torch.dtype | None = None, device: str | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model of a stage in evaluation mode, on the run's device and in its precision, and its tokenizer."""
        path, overrides = self.model_path(name), getattr(self.recipe.stages[name], "overrides", {})
        dtype, device = dtype or self.recipe.dtype, device or self.recipe.device
        model = load_model(path, device=device, dtype=dtype, overrides=overrides)
        return model, load_tokenizer(path)

    def sampler(self, name: str, *, loaded: bool = True, replay: bool = False) -> Sampler:
        """A sampler from the model that a stage left. vLLM servers load its directory, unless `update` will follow, and
        this process does not. With `replay` they must be able to say what sampling kept."""
        if self.recipe.sampler.kind == "transformers":
            return TransformersSampler(*self.load_model(name), self.interrupt.check)
        path = self.model_path(name)
        tokenizer = load_tokenizer(path)
        sampler = VLLMSampler(self.recipe.sampler, tokenizer, end_tokens(path, tokenizer), check=self.interrupt.check,
                              replay=replay)
        if loaded:
            sampler.update(path)
        return sampler

    def start(self, new: Callable[[], tuple[Any, Any]] | None = None) -> Start:
        """The policy to train, its tokenizer, and the state of the stage's last checkpoint, which is empty if there is
        none: then the model is the `new` one, or that of the stage that the settings name."""
        path, adapters = latest_checkpoint(self.directory), getattr(self.settings, "lora", None)
        model_dir, state = load_checkpoint(path) if path else (None, {})

        def make() -> tuple[PreTrainedModel, Any]:
            if new and not model_dir:
                model, tokenizer = new()
            elif model_dir and not adapters:
                with naming(damaged(model_dir), ConfigError, StorageError):
                    model, tokenizer = load_model(model_dir), load_tokenizer(model_dir)
            else:
                model, tokenizer = self.load_model(self.settings.model, torch.float32, "cpu")
            if adapters:
                add_adapters(model, adapters, self.recipe.seed, self.recipe.dtype)
            return model, tokenizer

        return *self.wrap(make), state

    def wrap(self, make: Callable[[], tuple[PreTrainedModel, Any]]) -> tuple[Policy, Any]:
        """The policy of a model that the first rank makes on the CPU, whose shards go to the devices, and what it makes
        besides. It is in evaluation mode: dropout would make the first ratio differ from 1."""
        recipe = self.recipe

        def ready() -> tuple[PreTrainedModel, Any]:
            model, other = make()
            if recipe.gradient_checkpointing:
                enable_checkpointing(model.eval())
            return model.eval(), other

        return share_out(ready, mesh(recipe.device, recipe.parallel.tensor), recipe.dtype, compiled=recipe.compile)

    def frozen(self, name: str) -> Policy:
        """The model of a stage as a reference or teacher, sharded and in the run's precision."""
        recipe = self.recipe
        return share_out(lambda: (self.load_model(name, device="cpu")[0].requires_grad_(False), None),
                         mesh(recipe.device, recipe.parallel.tensor), recipe.dtype)[0]

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
        with naming("'rewards'", (ValueError, ImportError)):
            return Scorer(rewards, **self.recipe.scoring.model_dump(exclude={"judge"}))

    def check(self) -> int | None:
        """Checks before any work that the functions, rewards and the pretrained model of this stage can be used.
        Returns the size of the model's vocabulary, if a pretrained one is known."""
        for value in vars(self.settings).values():
            if isinstance(value, Function):
                value.load()
        if getattr(self.settings, "lora", None):
            require("'lora'", "peft")
        if self.settings.kind == "grpo":
            refresh, steps = self.settings.ref_refresh_every, self.settings.steps
            if self.settings.objective.build().kl_coef and self.settings.lora and refresh < steps:
                raise ConfigError(f"'ref_refresh_every' is {refresh}; with 'lora', the reference is always the model "
                                  f"without adapters, so expected at least the {steps} 'steps'")
            self.scorer(self.settings.rewards).close()
        if self.settings.kind == "reject" and self.settings.judge:
            make_judge(self.recipe)
        base = self.settings
        while hasattr(base, "model"):
            base = self.recipe.stages[base.model]
        if base.kind != "model":
            return None
        config = load_config(base.path, base.overrides)
        check_tensor_axis(config, self.recipe.parallel.tensor)
        if base is self.settings:
            self.template(load_tokenizer(base.path))
        most = getattr(config.get_text_config(), "max_position_embeddings", None)
        wanted = max(self.recipe.eval.max_new_tokens, getattr(self.settings, "window", 0),
                     getattr(self.settings, "max_new_tokens", 0))
        if most is not None and wanted > most:
            raise ConfigError(f"'window', 'max_new_tokens' or 'eval.max_new_tokens' is {wanted}, and the model of "
                              f"stage '{base.name}' has {most} positions")
        return config.get_text_config().vocab_size


def require(setting: str, package: str) -> None:
    """Raises ConfigError if a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{setting} needs the package {package}, which is not installed; run: pip install {package}")


def make_judge(recipe: Recipe) -> Judge:
    """The language model of `scoring.judge`."""
    if recipe.scoring.judge is None:
        raise ConfigError("'scoring.judge' is null, but a stage asks a judge; set its 'url' and 'model'")
    with naming("'scoring.judge'", (ValueError, ImportError)):
        return Judge(**recipe.scoring.judge.model_dump())


def check_recipe(recipe: Recipe, console: Console) -> None:
    """Checks before any work that devices, data, the sandbox and everything that stages need can be used, and that all
    ranks have the same recipe and data."""
    agree("the recipe", recipe.model_dump(mode="json"))
    mesh(recipe.device, recipe.parallel.tensor)
    if recipe.optimizer_state == "8bit":
        everywhere(lambda: require("'optimizer_state' is '8bit', which", "torchao"))
    if recipe.trackers:
        everywhere(lambda: require("'trackers'", "tensorboard"))
    for name, settings in recipe.stages.items():
        with naming(f"stage '{name}'", ConfigError):
            sizes = everywhere(Stage(recipe, settings, Path(recipe.run_dir, name), console, Interrupt()).check)
            agree("the size of the vocabulary", sizes[rank()])
    kinds, content = everywhere(lambda: data.check_data(recipe, console))[rank()]
    agree("the content", content)
    if "code" in kinds:
        everywhere(lambda: sandbox.check(recipe.scoring.memory_mb, tuple(recipe.scoring.imports or ())))

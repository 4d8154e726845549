"""LoRA by peft: small adapters are trained beside frozen weights.

A checkpoint holds the adapters in its state, for a resumed run, and the merged weights in `model/`, so that later
stages, vLLM and plain transformers load them as any other model.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from r1kernels.train.errors import ConfigError
from r1kernels.train.recipe import Lora
from r1kernels.train.rng import torch_seeded

ADAPTER = "default"


def check_peft() -> None:
    """Raises ConfigError if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("'lora' needs the package peft, which is not installed; run: pip install peft")


def add_adapters(model: PreTrainedModel, settings: Lora, seed: int) -> None:
    """Freezes the model and puts an adapter, at first without effect, beside each of its chosen layers."""
    check_peft()
    import peft

    config = peft.LoraConfig(r=settings.r, lora_alpha=settings.alpha, target_modules=settings.target_modules)
    try:
        with torch_seeded(seed, "lora"):
            peft.inject_adapter_in_model(config, model, ADAPTER)
    except ValueError as error:
        raise ConfigError(f"'lora.target_modules' is {settings.target_modules}: {error}") from error
    model.eval()


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with an adapter, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}


def adapter_state(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint holds beside the merged weights; nothing for a model without adapters."""
    if not adapted_layers(model):
        return {}
    return {"adapters": {name: weight.detach().clone() for name, weight in trained_weights(model).items()}}


class Merged:
    """A model that saves itself in float32 with its adapters merged."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @torch.no_grad()
    def save_pretrained(self, directory: str | Path) -> None:
        wide, state = {}, self.model.state_dict()
        for name, value in state.items():  # tied weights stay one tensor
            state[name] = wide.setdefault(value.data_ptr(), value.float())
        for name, layer in adapted_layers(self.model).items():
            state[f"{name}.base_layer.weight"] = layer.base_layer.weight.float() + layer.get_delta_weight(ADAPTER)
        plain = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
        self.model.save_pretrained(directory, state_dict=plain)
        config = copy.deepcopy(self.model.config)
        config.dtype = torch.float32
        config.save_pretrained(directory)


def mergeable(model: PreTrainedModel) -> PreTrainedModel | Merged:
    """The model in the form in which it is saved."""
    return Merged(model) if adapted_layers(model) else model


class AdapterReference:
    """A reference that shares the frozen weights with the policy and keeps only its own adapters: those that a stage
    begins with have no effect, and those of a later refresh are earlier ones of the policy."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.weights = {name: weight.detach().clone() for name, weight in trained_weights(model).items()}

    @contextlib.contextmanager
    def in_place(self) -> Iterator[PreTrainedModel]:
        """Inside, the model of the policy is the reference."""
        trained = trained_weights(self.model)
        kept = {name: weight.data for name, weight in trained.items()}
        try:
            for name, weight in trained.items():
                weight.data = self.weights[name]
            yield self.model
        finally:
            for name, weight in trained.items():
                weight.data = kept[name]

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.weights)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(state[name])

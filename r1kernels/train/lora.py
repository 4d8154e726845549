"""LoRA by peft: small adapters are trained beside frozen weights.

A checkpoint holds the adapters in its shards, for a resumed run, and the merged weights in `model/`, so that later
stages, vLLM and plain transformers load them as any other model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from r1kernels.train.errors import ConfigError, naming
from r1kernels.train.policy import Policy
from r1kernels.train.recipe import Lora
from r1kernels.train.rng import torch_seeded

ADAPTER = "default"


def add_adapters(model: PreTrainedModel, settings: Lora, seed: int, dtype: torch.dtype) -> None:
    """Freezes the model, rounds it, and puts an adapter, at first without effect, beside each of its chosen layers."""
    import peft

    config = peft.LoraConfig(r=settings.r, lora_alpha=settings.alpha, target_modules=settings.target_modules)
    with naming(f"'lora.target_modules' is {settings.target_modules}", ValueError), torch_seeded(seed, "lora"):
        peft.inject_adapter_in_model(config, model, ADAPTER)
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight") and type(layer.base_layer) is not nn.Linear:
            raise ConfigError(f"'lora.target_modules' names {name}, a {type(layer.base_layer).__name__}; "
                              "expected layers of type Linear")
    for parameter in model.parameters():
        parameter.data = parameter.data if parameter.requires_grad else parameter.data.to(dtype)
    model.eval()


@contextlib.contextmanager
def without_adapters(policy: Policy) -> Iterator[None]:
    """Inside, adapters have no effect: the policy is the model that its stage began with."""
    layers = [module for module in policy.modules() if hasattr(module, "get_delta_weight")]
    try:
        for layer in layers:
            layer.set_scale(ADAPTER, 0.0)
        yield
    finally:
        for layer in layers:
            layer.set_scale(ADAPTER, 1.0)

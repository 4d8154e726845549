"""Loads and checks models and tokenizers, and separates a model's head from its body.

Logits of whole batches are never computed: the losses take hidden states and the head. Only the code of a model family
says how it scales or caps its logits, so the values read from its configuration are checked against its own logits.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

import r1kernels
from r1kernels.train.errors import ConfigError, naming

ALIGNMENT = 64  # bytes, of memory that torch allocates on a CPU
# Fields of configurations that multiply the logits (Cohere, Falcon-H1), divide them (Granite, MiniCPM3; HyperCLOVA X
# multiplies by it) or cap them, cap * tanh(logits / cap) (Gemma and others; RecurrentGemma; xLSTM).
_FACTORS, _DIVISOR = ("logit_scale", "lm_head_multiplier"), "logits_scaling"
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# The probe's largest logit is far above every cap in use; log-probs of that size are rounded to about 1e-5.
_PROBE_LOGIT, _PROBE_TOLERANCE = 200.0, 0.02


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer, unchanged; but if it has no padding token, the end token becomes its padding token."""
    if str(path).startswith((".", "~", "/")) and not Path(path).is_dir():
        raise ConfigError(f"the model '{path}' is not a directory")
    with naming(f"the model '{path}' has no tokenizer that can be loaded"):
        # AutoTokenizer ignores parts of tokenizer.json for some architectures, unless the class is the generic one.
        generic = get_tokenizer_config(path).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
        loader = transformers.PreTrainedTokenizerFast if generic else transformers.AutoTokenizer
        tokenizer = loader.from_pretrained(path)
    for key in ("is_local", "local_files_only"):  # they say how it was loaded, and would be saved with it
        tokenizer.init_kwargs.pop(key, None)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of the model '{path}' has no end-of-text token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(path: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32,
               overrides: Mapping[str, Any] = {}) -> PreTrainedModel:
    """The model for evaluation. `overrides`: fields of the configuration."""
    with naming(f"the model '{path}' cannot be loaded"):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **overrides)
    model = align(model.to(device)).eval()
    check_head(model)
    return round_parameters(model, dtype)


def round_parameters(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Rounds the parameters in place, but not those that transformers keeps in float32. Buffers stay as they are: those
    of rotary embeddings need float32."""
    kept = "|".join(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for name, parameter in model.named_parameters():
        if not (kept and re.search(rf"(^|\.)({kept})($|\.)", name)):
            parameter.data = parameter.data.to(dtype)
    return model


def load_config(path: str | Path, overrides: Mapping[str, Any] = {}) -> transformers.PreTrainedConfig:
    """The configuration of a model."""
    with naming(f"the model '{path}' has no configuration that can be read"):
        if Path(path, "adapter_config.json").is_file():
            raise ValueError("it is a LoRA adapter; merge it into its base model, and save that")
        return transformers.AutoConfig.from_pretrained(path, **overrides)


def align(model: PreTrainedModel) -> PreTrainedModel:
    """Copies weights that a file maps to unaligned addresses: the last bits of a product depend on the alignment."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
    return model


def hidden_states(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """The hidden states (B, T, H) that the head receives."""
    with checkpointing(model):
        return model.base_model(**inputs, use_cache=False).last_hidden_state


def checkpointed_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that keep only their inputs for the backward, and compute again what is in them."""
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]


@contextlib.contextmanager
def checkpointing(model: nn.Module) -> Iterator[None]:
    """Inside, these layers are checkpointed. Transformers does so in training mode, where a sampler has no cache."""
    layers = checkpointed_layers(model) if torch.is_grad_enabled() else []
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer in layers:
            layer.training = False


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Turns gradient checkpointing on. Raises ConfigError if the model has none, or drops out within its layers."""
    family = type(model).__name__
    with naming(f"'gradient_checkpointing' is true, and {family} cannot do that"):
        # The second is its name in earlier versions of transformers 5.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    ids = torch.arange(1, 9, device=model.device)[None] % model.get_input_embeddings().num_embeddings
    hidden = hidden_states(model, input_ids=ids)
    with torch.no_grad():
        if not checkpointed_layers(model) or not torch.equal(hidden, hidden_states(model, input_ids=ids)):
            raise ConfigError(f"'gradient_checkpointing' is true, but {family} has no such layers, or dropout in them")


def head_of(model: PreTrainedModel) -> dict[str, Any]:
    """Keywords of the `linear_*` losses: weight and bias (the model's own parameters), logit_scale and softcap."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    if type(layer) is not nn.Linear:  # a subclass may compute something else
        raise ConfigError(f"{type(model).__name__} has the head {type(layer).__name__}; expected torch.nn.Linear")
    scale = math.prod(getattr(config, name, None) or 1.0 for name in _FACTORS)
    divisor = getattr(config, _DIVISOR, None) or 1.0
    scale = scale * divisor if config.model_type == "hyperclovax" else scale / divisor
    softcap = next((cap for name in _CAPS if (cap := getattr(config, name, None))), None)
    head = {"weight": layer.weight, "bias": layer.bias}
    if isinstance(layer.weight, DTensor):  # the axis `tensor` of the ranks shares the vocabulary
        head = {name: None if value is None else value.to_local() for name, value in head.items()}
        head["process_group"] = layer.weight.device_mesh.get_group()
    return head | {"logit_scale": scale, "softcap": softcap}


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Refuses a model if its logits on a few tokens differ from those of `hidden_states` and `head_of`."""
    head, family = head_of(model), type(model).__name__
    ids = torch.arange(1, 17, device=model.device).reshape(2, 8) % len(head["weight"])
    positions = torch.arange(8, device=ids.device).expand(2, 8)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    with naming(f"{family} cannot be trained with the inputs {', '.join(inputs)}"):
        logits, hidden = model(**inputs, use_cache=False).logits, hidden_states(model, **inputs)
    factor = _PROBE_LOGIT / logits.abs().max().clamp(min=1e-6)
    if not factor.isfinite():
        raise ConfigError(f"{family} gives logits that are not finite: its weights are damaged")
    with model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0] * factor,)):
        logits = model(**inputs, use_cache=False).logits.float()
    tokens = logits.argmin(-1)
    expected = r1kernels.token_logprobs(logits, tokens)
    logprobs = r1kernels.linear_token_logprobs(hidden * factor, token_ids=tokens, **head)
    if logits.shape[-1] != len(head["weight"]) or not (logprobs - expected).abs().max() <= _PROBE_TOLERANCE:
        raise ConfigError(f"the logits of {family} are not those of its head: logit_scale {head['logit_scale']:g}, "
                          f"softcap {head['softcap']}; the losses would train another model")

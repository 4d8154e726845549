"""Models and tokenizers, checked before any work starts, and a model's head apart from its body.

Logits of whole batches are never made: the losses take hidden states and the head. How a family scales or caps its
logits is only in its code, so what is read from the configuration here is checked against the model's own logits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

import r1kernels
from r1kernels.train.errors import ConfigError

ALIGNMENT = 64  # bytes, of memory that torch allocates on a CPU


def check_device(device: str) -> None:
    """Refuses a device that torch cannot use here."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"'device' is {device!r}, which cannot be used here: {_reason(error)}") from error


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer as it is; only a missing padding token is set, to the end token."""
    base = _base_of(path)
    if base is not None and not any(Path(path).glob("tokenizer*")):
        path = base
    with _loading(path, "no tokenizer that can be loaded"):
        # AutoTokenizer ignores parts of tokenizer.json for some architectures, unless the class is the generic one.
        generic = get_tokenizer_config(path).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
        tokenizer = (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(path)
    for key in ("is_local", "local_files_only"):  # how it was loaded; would be saved with it
        tokenizer.init_kwargs.pop(key, None)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of the model '{path}' has no end-of-text token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(path: str | Path, *, device: str = "cpu", overrides: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """The model in float32 and evaluation mode, with a head that the losses can compute.

    A directory with a LoRA adapter is loaded with its base model and merged into it.

    Args:
        overrides: fields of its configuration, such as max_position_embeddings.
    """
    base = _base_of(path)
    with _loading(path, "no causal LM that can be loaded"):
        model = AutoModelForCausalLM.from_pretrained(base or path, dtype=torch.float32, **(overrides or {}))
    if base is not None:
        try:
            from peft import PeftModel
        except ImportError as error:
            raise ConfigError(f"the model '{path}' is a LoRA adapter; to load it, run: pip install peft") from error
        with _loading(path, "no LoRA adapter that can be loaded"):
            model = PeftModel.from_pretrained(model, path).merge_and_unload(safe_merge=True)
    model = align(model.to(device)).eval()
    check_head(model)
    return model


def max_positions(path: str | Path, overrides: Mapping[str, Any] | None = None) -> int | None:
    """The number of positions of a model according to its configuration; None where that does not say."""
    with _loading(path, "no configuration that can be read"):
        config = AutoConfig.from_pretrained(_base_of(path) or path, **(overrides or {})).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def align(model: PreTrainedModel) -> PreTrainedModel:
    """Copies weights that a file maps to unaligned addresses.

    The last bits of a product depend on the alignment of its operands. Without this, a model that was saved and loaded
    would not compute what it computed before.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
    return model


def _base_of(path: str | Path) -> str | None:
    """The base model of a directory with a LoRA adapter; None for a directory with a model or a name on the hub."""
    if (str(path).startswith((".", "~", "/")) or str(path).count("/") > 1) and not Path(path).is_dir():
        raise ConfigError(f"the model '{path}' is not a directory")
    adapter = Path(path, "adapter_config.json")
    if not adapter.is_file():
        return None
    with _loading(path, f"an {adapter.name} that cannot be read"):
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{adapter} has base_model_name_or_path {base!r}; expected a directory or a name")
    return base


@contextmanager
def _loading(path: str | Path, problem: str) -> Iterator[None]:
    """Turns the errors of loading a model into one that names the model."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"the model '{path}' has {problem}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of a message; the next one too where the first one announces it."""
    first, _, rest = str(error).strip().partition("\n")
    return " ".join(f"{first} {rest}".split()) if first.rstrip().endswith(":") else first


# ---- the head -------------------------------------------------------------------------------------------------------

# Fields of configurations. Factors of the logits: Cohere; Falcon-H1. A divisor: Granite, MiniCPM3 (but HyperCLOVA X
# multiplies by it). Caps, cap * tanh(logits / cap): Gemma and others; RecurrentGemma; xLSTM.
_FACTORS, _DIVISOR = ("logit_scale", "lm_head_multiplier"), "logits_scaling"
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# The largest logit of the probe, far above every cap in use, so that a cap that was missed shows; log-probs of that
# size are rounded to about 1e-5.
_PROBE_LOGIT, _PROBE_TOLERANCE = 200.0, 0.02


def hidden_states(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """Hidden states (B, T, H), as the head takes them."""
    return model.base_model(**inputs, use_cache=False).last_hidden_state


def head_of(model: PreTrainedModel) -> dict[str, Any]:
    """Keywords of the `linear_*` losses: weight and bias (the model's own parameters), logit_scale and softcap.

    Raises:
        ConfigError: the head is not a plain linear layer.
    """
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear:  # a subclass may compute something else
        raise ConfigError(
            f"the output layer of {type(model).__name__} is a {type(layer).__name__}; expected a torch.nn.Linear, "
            "since the losses compute it from its weight and bias"
        )
    return {"weight": layer.weight, "bias": layer.bias, **_logit_transform(model.config.get_text_config())}


def _logit_transform(config: Any) -> dict[str, float | None]:
    scale = math.prod(float(getattr(config, name, None) or 1.0) for name in _FACTORS)
    if divisor := getattr(config, _DIVISOR, None):
        scale *= divisor if config.model_type == "hyperclovax" else 1 / divisor
    caps = [float(value) for name in _CAPS if (value := getattr(config, name, None))]
    return {"logit_scale": scale, "softcap": caps[0] if caps else None}


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compares the log-probs of `hidden_states` and `head_of` with those of the model's own logits, on a few tokens.

    Raises:
        ConfigError: they differ, because the model does something with its logits that is not known here.
    """
    head, family = head_of(model), type(model).__name__
    if model.base_model is model:
        raise ConfigError(f"{family} has no body apart from its head; the losses need the hidden states of a body")
    vocab = head["weight"].shape[0]
    ids = torch.arange(1, 17, device=model.device).reshape(2, 8) % vocab
    positions = torch.arange(8, device=ids.device).expand(2, 8)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    try:
        largest = model(**inputs, use_cache=False).logits.abs().max().item()
    except TypeError as error:
        raise ConfigError(f"{family} does not take the inputs {', '.join(inputs)}: {error}") from error
    if not math.isfinite(largest):
        raise ConfigError(f"{family} gives logits that are not finite: its weights are damaged")
    factor = _PROBE_LOGIT / max(largest, 1e-6)
    amplifier = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0] * factor,))
    try:
        logits = model(**inputs, use_cache=False).logits.float()
    finally:
        amplifier.remove()
    hidden = hidden_states(model, **inputs) * factor
    gap = math.inf
    if logits.shape == (*ids.shape, vocab):
        tokens = torch.stack([logits.argmax(-1), logits.argmin(-1), ids])
        expected = r1kernels.token_logprobs(logits.expand(3, -1, -1, -1), tokens)
        logprobs = r1kernels.linear_token_logprobs(hidden.expand(3, -1, -1, -1), token_ids=tokens, **head)
        gap = (logprobs - expected).abs().max().item()
    if not gap <= _PROBE_TOLERANCE:
        raise ConfigError(
            f"the logits of {family} are not those of its output layer with logit_scale {head['logit_scale']:g} and "
            f"softcap {head['softcap']}, as its configuration says; this model cannot be trained here, since the "
            "trained policy would not be the one that is sampled from"
        )

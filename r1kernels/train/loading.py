"""Models and tokenizers from a directory or the hub, checked before any work starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from r1kernels.train.head import check_head
from r1kernels.train.schema import ConfigError

ALIGNMENT = 64  # of memory that torch allocates on a CPU, in bytes


def check_device(device: str) -> None:
    """Refuses a device that this installation of torch, or this machine, does not have."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"'device' is {device!r}, which cannot be used here: {_reason(error)}") from error


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the left; a missing padding token becomes the end-of-text token."""
    looks_local = str(path).startswith((".", "~", "/")) or str(path).count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise ConfigError(f"the model {str(path)!r} is not a directory")
    try:
        # For some architectures AutoTokenizer rebuilds its own pre-tokenizer over a directory's tokenizer.json. One
        # that declares the generic class is to be read as it is.
        generic = get_tokenizer_config(path).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
        loader = PreTrainedTokenizerFast if generic else AutoTokenizer
        tokenizer = loader.from_pretrained(path, padding_side="left")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"the model {str(path)!r} has no tokenizer that can be loaded: {_reason(error)}"
        ) from error
    for key in ("is_local", "local_files_only"):  # how it was loaded, which would be saved with it
        tokenizer.init_kwargs.pop(key, None)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of the model {str(path)!r} has no end-of-text token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    path: str | Path, *, device: str = "cpu", overrides: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """The model, in float32 and in evaluation mode, with a head that the losses can compute.

    Args:
        overrides: fields of its configuration, such as max_position_embeddings.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **(overrides or {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"the model {str(path)!r} holds no causal LM that can be loaded: {_reason(error)}"
        ) from error
    model = settle(model.to(device)).eval()
    check_head(model)
    return model


def positions(path: str | Path, overrides: Mapping[str, Any]) -> int | None:
    """How many positions a model has, by its configuration; None where that does not say."""
    try:
        config = AutoConfig.from_pretrained(path, **overrides).get_text_config()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"the model {str(path)!r} has no configuration that can be read: {_reason(error)}") from error
    return getattr(config, "max_position_embeddings", None)


def settle(model: PreTrainedModel) -> PreTrainedModel:
    """Moves weights that were mapped from a file to memory of the usual alignment.

    In the file they begin anywhere, and products differ in their last bits with where their operands begin: without
    this, a model that was saved and loaded would not compute what it computed before.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
    return model


def _reason(error: Exception) -> str:
    """The first sentence or so of a message, on one line; a line that announces others is no sentence."""
    first, _, rest = str(error).strip().partition("\n")
    return " ".join(f"{first} {rest}".split()) if first.rstrip().endswith(":") else first

"""The head of a causal LM apart from its body: hidden states, and how they become logits.

Logits of whole batches are never made: the losses take hidden states and the head. `transformers` says how a family
scales or caps its logits in its code alone, so what is read from the configuration here is checked against the
model's own logits before it is trusted.
"""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

import r1kernels
from r1kernels.train.schema import ConfigError

# Fields of configurations: factors of the logits (Cohere; Falcon-H1), divisors (Granite, MiniCPM3), and caps of
# cap * tanh(logits / cap) (Gemma and others; RecurrentGemma; xLSTM).
_FACTORS = ("logit_scale", "lm_head_multiplier")
_DIVISOR = "logits_scaling"
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Families in whose code the divisor is a factor.
_MULTIPLYING = ("hyperclovax",)
# The probe's largest logit, far beyond any cap in use, so that one that was missed shows; and how far log-probs that
# are rounded to about 1e-5 may be apart.
_PROBE_LOGIT, _PROBE_TOLERANCE = 200.0, 0.02


class Head(TypedDict):
    """Keywords of the `linear_*` losses."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None


def hidden_states(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """(B, T, H), as the head takes them."""
    return model.base_model(**inputs, use_cache=False).last_hidden_state


def head_of(model: PreTrainedModel) -> Head:
    """The head as the losses take it; the parameters are the model's own.

    Raises:
        ConfigError: the head is no plain linear layer.
    """
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear:  # a subclass, or a layer around one, may compute something else
        raise ConfigError(
            f"the output layer of {type(model).__name__} is a {type(layer).__name__}, expected a torch.nn.Linear: "
            "the losses are computed from hidden states and its weight"
        )
    config = model.config.get_text_config()
    return Head(weight=layer.weight, bias=layer.bias, logit_scale=_scale(config), softcap=_softcap(config))


def _scale(config: PreTrainedConfig) -> float:
    given = [getattr(config, name, None) for name in _FACTORS]
    divisor = getattr(config, _DIVISOR, None)
    if divisor is not None:
        given.append(divisor if config.model_type in _MULTIPLYING else 1 / divisor)
    return math.prod(float(value) for value in given if value is not None)


def _softcap(config: PreTrainedConfig) -> float | None:
    given = [value for name in _CAPS if (value := getattr(config, name, None))]
    return float(given[0]) if given else None


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compares log-probs by `head_of` and `hidden_states` with those of the model's logits, on a few tokens.

    Raises:
        ConfigError: they differ, so the model does something with its logits that is not known here.
    """
    head, family = head_of(model), type(model).__name__
    if model.base_model is model:
        raise ConfigError(f"{family} has no body apart from its head, expected one: the losses take its hidden states")
    vocab = head["weight"].shape[0]
    ids = torch.arange(1, 17, device=model.device).reshape(2, 8) % vocab
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(8, device=ids.device).expand(2, 8),
    }
    try:
        logits = model(**inputs, use_cache=False).logits
    except TypeError as error:
        raise ConfigError(f"{family} does not take {', '.join(inputs)} as the trainer gives them: {error}") from error
    largest = logits.abs().max().item()
    if not math.isfinite(largest):
        raise ConfigError(f"{family} gives logits that are not finite: its weights are damaged")
    factor = _PROBE_LOGIT / max(largest, 1e-6)
    amplifier = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0] * factor,))
    try:
        logits = model(**inputs, use_cache=False).logits.float()
    finally:
        amplifier.remove()
    hidden = hidden_states(model, **inputs) * factor
    if logits.shape == (*ids.shape, vocab):
        targets = (logits.argmax(-1), logits.argmin(-1), ids)
        gap = max(
            (r1kernels.linear_token_logprobs(hidden, token_ids=y, **head) - r1kernels.token_logprobs(logits, y))
            .abs().max().item()
            for y in targets
        )
        if gap <= _PROBE_TOLERANCE:
            return
    raise ConfigError(
        f"the logits of {family} are not those of its output layer with logit_scale {head['logit_scale']:g} and "
        f"softcap {head['softcap']}, as its configuration says: training would follow another policy than the one "
        "that is sampled from, so this model cannot be trained here"
    )

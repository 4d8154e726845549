"""Inputs of the policy loss from hidden states, and its results against the oracles composed in float64."""

from __future__ import annotations

from typing import Any

import linear_cases as cases
import torch
from policy_cases import with_extras
from torch import Tensor

from r1kernels import Objective, linear_grpo_loss, testing

EVERYTHING = {"kl_coef": 0.1, "entropy_coef": 0.01}
HEAD_KEYWORDS = ("hidden", "weight", "token_ids", "bias", "lora", "logit_scale", "softcap", "temperature")


def make(
    head: str = "plain", extra: str = "plain", dtype: torch.dtype = torch.float32, seed: int = 0, width: int = 12,
    vocab: int = 37, weight_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Keyword arguments of `linear_grpo_loss`: 5 sequences of 7 tokens, stored log-probs near those of the head."""
    case = cases.make(head, 5, 7, width=width, vocab=vocab, dtype=dtype, weight_dtype=weight_dtype, seed=seed)
    policy = with_extras(extra, seed)
    shift = cases.exact(case).logprobs - policy.pop("logprobs")
    del policy["entropy"]
    for name in ("old_logprobs", "ref_logprobs"):
        if name in policy:
            policy[name] = (policy[name] + shift).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return case | policy


def packed(inputs: dict[str, Any], lengths: list[int]) -> dict[str, Any]:
    keep = testing.length_mask(lengths, 7)
    flat = {
        name: value[keep] if isinstance(value, Tensor) and value.shape[:2] == keep.shape else value
        for name, value in inputs.items()
    }
    return flat | {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}


def head_of(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name in HEAD_KEYWORDS}


def exact(inputs: dict[str, Any], objective: Objective) -> tuple[testing.PolicyExpected, cases.Exact]:
    """Loss and metrics, and the gradients of the loss."""
    head = head_of(inputs)
    stats = cases.exact(head)
    rest = {name: value for name, value in inputs.items() if name not in HEAD_KEYWORDS}
    expected = testing.policy_loss(objective, logprobs=stats.logprobs, entropy=stats.entropy, **rest)
    return expected, cases.exact(head, expected.grad_logprobs.value, expected.grad_entropy.value)


def run(inputs: dict[str, Any], factor: float = 1.0, **keywords: Any) -> tuple[Any, dict[str, Tensor]]:
    return cases.gradients(linear_grpo_loss, inputs, lambda result: factor * result.loss, **keywords)


def check(inputs: dict[str, Any], objective: Objective, relative: float, **keywords: Any) -> None:
    """Values, gradients and metrics; those of the tokens that are measured with `measure_all` only."""
    result, grads = run(inputs, objective=objective, **keywords)
    expected, gradients = exact(inputs, objective)
    scale = float(expected.loss.terms) + float(expected.loss.value.abs())
    testing.assert_within(result.loss, expected.loss.value, relative * scale)
    cases.assert_gradients(grads, gradients, relative)
    assert set(result.metrics) == {*expected.metrics, "measured_tokens"}
    whole = keywords.get("measure_all") or objective.kl_coef != 0 or objective.entropy_coef != 0
    whole = whole or callable(objective.surrogate) or result.metrics["measured_tokens"] == result.metrics["tokens"]
    for name, value in result.metrics.items():
        if name == "measured_tokens":
            assert value <= expected.metrics["tokens"].value
        elif whole or name.endswith("_fraction") or name in ("tokens", "sequences", "surrogate_loss"):
            metric = expected.metrics[name]
            precision = max(relative, testing.EPS32) if name in ("ratio_min", "ratio_max") else relative  # oracle's
            testing.assert_within(value, metric.value, precision * (1 + metric.value.abs() + metric.terms.abs()))
    if whole:
        testing.assert_within(result.metrics["measured_tokens"], expected.metrics["tokens"].value, 0)

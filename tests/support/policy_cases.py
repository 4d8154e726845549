"""Objectives and inputs of the policy loss, and its results against the float64 oracle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r1kernels import Objective, PolicyLoss, policy_loss, testing

OBJECTIVES = {
    "grpo": {},
    "r1": {"clip_low": 10.0, "clip_high": 10.0},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28},
    "two_sided": {"ratio_cap": 1.5},
    "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "gspo_wide": {"ratio": "sequence", "clip_low": 0.5, "clip_high": 0.5, "ratio_cap": 1.6},
    "low_cap": {"ratio_cap": 0.9, "clip_low": 0.3},
    "gspo_token": {"ratio": "sequence_token", "clip_low": 0.1, "clip_high": 0.1},
    "cispo": {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 0.3},
    "cispo_floor": {"surrogate": "cispo", "clip_low": 0.4, "clip_high": -0.2},
    "cispo_sequence": {"surrogate": "cispo", "ratio": "sequence", "clip_high": 0.1},
    "dppo_tv": {"surrogate": "dppo_tv", "clip_low": 0.05, "clip_high": 0.1, "ratio_cap": 1.2},
    "dppo_kl": {"surrogate": "dppo_kl", "clip_low": 0.01, "clip_high": 0.02},
    "ipo": {"surrogate": "ipo", "clip_low": 0.1, "clip_high": 0.05, "tau_pos": 0.1, "tau_neg": 0.0},
    "vespo": {"surrogate": "vespo", "ratio": "sequence_product", "tau_pos": 3.0, "tau_neg": 2.0},
    "gmpo": {"surrogate": "gmpo", "ratio": "sequence", "clip_low": 0.1, "clip_high": 0.15},
    "sapo": {"surrogate": "sapo"},
    "sapo_sequence": {"surrogate": "sapo", "ratio": "sequence", "tau_pos": 0.7, "tau_neg": 2.0},
    "reinforce": {"surrogate": "reinforce"},
}
KLS = {
    "no_kl": {},
    "k1": {"kl": "k1", "kl_coef": 0.3},
    "k2": {"kl": "k2", "kl_coef": 0.04},
    "k3": {"kl": "k3", "kl_coef": 1.7, "entropy_coef": 0.01},
    "k1_ratio": {"kl": "k1", "kl_coef": 0.3, "kl_ratio": True},
    "k3_ratio": {"kl": "k3", "kl_coef": 1.7, "entropy_coef": 0.01, "kl_ratio": True},
}
AGGREGATES = {
    "sequence_mean": {"aggregate": "sequence_mean"},
    "token_mean": {"aggregate": "token_mean"},
    "constant": {"aggregate": "constant", "max_length": 13},
}


def objective_of(name: str, kl: str, aggregate: str) -> Objective:
    """A product over a sequence, and a clipped ratio, multiply no KL term."""
    fields = OBJECTIVES[name] | KLS[kl] | AGGREGATES[aggregate]
    return Objective(**fields | ({"kl_ratio": False} if name in ("vespo", "gmpo") else {}))


# What a caller may add: {name: {keyword: value}}; the values are made by `with_extras`.
EXTRAS = ["plain", "on_policy", "holes", "float_mask", "token_advantages", "token_weights", "normalizer", "bare"]


def with_extras(extra: str, seed: int = 0) -> dict[str, Any]:
    inputs = testing.random_policy(seed=seed)
    shape = inputs["logprobs"].shape
    holes = torch.rand(shape, generator=testing.generator(seed + 1)) < 0.7
    token_values = torch.randn(shape, generator=testing.generator(seed + 2))
    if extra == "on_policy":
        del inputs["old_logprobs"]
    elif extra == "holes":
        inputs["mask"] = holes
    elif extra == "float_mask":
        inputs["mask"] = holes * 0.5
    elif extra == "token_advantages":
        inputs["advantages"] = torch.where(holes, token_values, 0)
    elif extra == "token_weights":
        inputs["importance_weights"] = token_values.exp()
    elif extra == "normalizer":
        inputs["normalizer"] = torch.tensor(37.5)
    elif extra == "bare":
        inputs = {k: inputs[k] for k in ("logprobs", "advantages", "ref_logprobs", "entropy")}
    return inputs


def evaluate(inputs: dict[str, Any], objective: Any) -> tuple[PolicyLoss, Tensor, Tensor | None]:
    """The loss and its gradients with respect to logprobs and entropy."""
    inputs = dict(inputs)
    sources = []
    for name in ("logprobs", "entropy"):
        if inputs.get(name) is not None:
            inputs[name] = inputs[name].detach().requires_grad_()
            sources.append(inputs[name])
    result = policy_loss(**inputs, objective=objective)
    grads = torch.autograd.grad(result.loss, sources, allow_unused=True, materialize_grads=True)
    return result, grads[0], grads[1] if len(sources) == 2 else None


def check(inputs: dict[str, Any], objective: Objective) -> None:
    expected = testing.policy_loss(objective, **inputs)
    result, grad_logprobs, grad_entropy = evaluate(inputs, objective)
    testing.assert_within(result.loss, expected.loss)
    testing.assert_within(grad_logprobs, expected.grad_logprobs)
    if grad_entropy is not None:
        testing.assert_within(grad_entropy, expected.grad_entropy)
    assert set(result.metrics) == set(expected.metrics)
    for name, value in result.metrics.items():
        assert value.dim() == 0 and not value.requires_grad
        try:
            testing.assert_within(value, expected.metrics[name])
        except AssertionError as error:
            raise AssertionError(f"metric {name}: {error}") from None

"""Batches for the fused GRPO step on the CUDA emulator, and its results against the oracles."""

import ctypes
import math
import os
from typing import Any

import torch
from policy_cases import OBJECTIVES
from torch import Tensor

from r1kernels import Objective, objectives, testing
from r1kernels.ops.policy_loss import kl_number

EMULATOR = ctypes.CDLL(os.environ["R1KERNELS_CUDA_EMULATOR"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERYTHING = {"kl_coef": 0.1, "entropy_coef": 0.01}
OF_TOKENS = {name: fields for name, fields in OBJECTIVES.items() if fields.get("ratio", "token") == "token"}
# [blocks of a cluster]
TILES = [(1,), (2,), (4,), (8,)]
METRICS = (
    "tokens", "sequences", "surrogate_loss", "kl", "entropy", "ratio_mean", "ratio_min", "ratio_max", "approx_kl",
    "clip_fraction", "clip_low_fraction", "clip_high_fraction", "ratio_cap_fraction", "active_fraction",
    "nonfinite_tokens",
)


def reset() -> None:
    device(processors=4)
    seed(1)


def seed(value: int) -> None:
    """By which threads, copies and blocks take turns."""
    EMULATOR.r1k_emulator_seed(ctypes.c_uint64(value))


def device(major: int = 9, processors: int = 4, shared: int = 227 << 10) -> None:
    EMULATOR.r1k_emulator_properties(major, 0, processors, ctypes.c_size_t(shared))


def batch(dtype: torch.dtype, vocab: int, shape: tuple[int, int] = (5, 7), seed: int = 0) -> dict[str, Any]:
    logits, ids = testing.random_logits(*shape, vocab, dtype=dtype, seed=seed), testing.random_ids(*shape, vocab=vocab)
    logprobs = testing.token_stats(logits, ids).logprobs.float()
    noise = torch.randn(2, *shape, generator=testing.generator(seed + 1)) / 2
    return {
        "logits": logits, "token_ids": ids, "advantages": testing.random_policy(shape[0])["advantages"],
        "old_logprobs": logprobs + noise[0], "ref_logprobs": logprobs + noise[1],
    }


def step(
    inputs: dict[str, Any], objective: Objective, tile: tuple[int, ...] = (), out: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, ...]:
    """(loss, metrics, log-probs, entropy, gradient)."""
    logits = inputs["logits"]
    out = torch.empty(logits.shape, dtype=logits.dtype) if out is None else out
    rest = ("old_logprobs", "ref_logprobs", "mask", "cu_seqlens", "importance_weights", "normalizer")
    results = torch.ops.r1kernels.grpo_step(
        logits, inputs["token_ids"], inputs["advantages"], *(inputs.get(name) for name in rest), temperature,
        objectives.SURROGATES.index(objective.surrogate), kl_number(objective),
        objectives.AGGREGATES.index(objective.aggregate), objective.clip_low, objective.clip_high,
        math.inf if objective.ratio_cap is None else objective.ratio_cap, objective.tau_pos, objective.tau_neg,
        objective.kl_coef, objective.entropy_coef, float(objective.max_length or 1), list(tile), out,
    )
    return (*results, out)


def check(inputs: dict[str, Any], objective: Objective, *, temperature: float = 1.0, **how: Any) -> None:
    """The oracles composed: those of a row at its logits, and the policy loss's at the log-probs that the step gave."""
    logits, ids, mask = inputs["logits"], inputs["token_ids"], inputs.get("mask")
    if mask is not None:  # what is behind the mask is no number
        exact_logits, exact_ids = torch.where(mask[..., None], logits, 0), torch.where(mask, ids, 0)
    else:
        exact_logits, exact_ids = logits.clone(), ids
    loss, metrics, logprobs, entropy, grad = step(inputs, objective, temperature=temperature, **how)

    row = testing.token_stats(exact_logits, exact_ids, temperature)
    counts = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    # Rounded to float32, near the largest logits of their difference; the sums are good to some roundings as well.
    budget = 4 * testing.EPS32 * (row.logprobs.abs() + exact_logits.double().abs().amax(-1) / temperature + 1)
    testing.assert_within(logprobs, torch.where(counts, row.logprobs, 0), budget)
    testing.assert_within(entropy, torch.where(counts, row.entropy, 0), budget)

    rest = {k: v for k, v in inputs.items() if k not in ("logits", "token_ids")}
    expected = testing.policy_loss(objective, logprobs=logprobs, entropy=entropy, **rest)
    testing.assert_within(loss, expected.loss)
    for name, value in zip(METRICS, metrics, strict=True):
        if name in expected.metrics:
            testing.assert_within(value, expected.metrics[name])
    g, eta = expected.grad_logprobs, expected.grad_entropy.value
    exact = testing.token_stats_gradient(exact_logits, exact_ids, g.value, eta, temperature)
    per_g = testing.token_stats_gradient(exact_logits, exact_ids, torch.ones(ids.shape), 0.0, temperature).value.abs()
    testing.assert_within(grad, testing.Expected(exact.value, exact.terms + g.terms.unsqueeze(-1) * per_g))

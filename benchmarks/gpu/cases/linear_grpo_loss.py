"""GRPO loss forward and backward from hidden states, beside its three bare products."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import r1kernels
from gpu.ceilings import bare_products
from gpu.inputs import NEAR, alternating, generator, make_head, noise_like, sampled_ids, sequences
from gpu.losses import Problem, loss_case, with_eager
from gpu.setting import OURS, PRODUCTS, Case, Head, Setting, head_shape, peers
from r1kernels.bench import eager
from r1kernels.bench.peers import LIGER, liger_grpo

ACTIVE = 0.4
ALL, KNOWN, CLIPPED = "all tokens active", "60 % known inactive", "60 % clipped"


def ours(hidden: Tensor, weight: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor) -> Tensor:
    return r1kernels.linear_grpo_loss(hidden, weight, token_ids, advantages, old_logprobs=old_logprobs).loss


def problems(shape: Head, setting: Setting) -> Iterator[tuple[str, Problem]]:
    """With every token active; with 40 %, the others clipped; with 40 %, the others of advantage 0."""
    b, t = sequences(shape.tokens)
    hidden, weight = make_head(shape, setting.device)
    ids = sampled_ids(hidden, weight)
    with torch.no_grad():
        logprobs = r1kernels.linear_token_logprobs(hidden, weight, ids).view(b, t)
    near = logprobs + noise_like(logprobs, NEAR)
    advantages = alternating(b, setting.device)
    order = torch.rand(b * t, generator=generator(setting.device, 5), device=setting.device).argsort().argsort()
    idle = (order >= ACTIVE * b * t).view(b, t)
    per_token = advantages[:, None].expand(b, t)
    inputs = {
        "hidden": hidden.view(b, t, -1), "weight": weight, "token_ids": ids.view(b, t), "advantages": advantages,
        "old_logprobs": near,
    }
    rows = ("hidden", "token_ids", "advantages", "old_logprobs")
    # A log-ratio of 0.5 in the direction of the advantage is beyond the bound.
    far = torch.where(idle, logprobs - 0.5 * per_token.sign(), near)
    for case, changed in (
        (ALL, {}), (CLIPPED, {"old_logprobs": far}), (KNOWN, {"advantages": torch.where(idle, 0.0, per_token)}),
    ):
        yield case, Problem(inputs | changed, leaves=("hidden", "weight"), rows=rows)


def active_share(problem: Problem) -> float:
    inputs = problem.inputs
    metrics = r1kernels.linear_grpo_loss(
        inputs["hidden"], inputs["weight"], inputs["token_ids"], inputs["advantages"],
        old_logprobs=inputs["old_logprobs"],
    ).metrics
    return float(metrics["active_fraction"])


def cases(setting: Setting) -> Iterator[Case]:
    shape = head_shape(setting)
    for case, problem in problems(shape, setting):
        share, said = active_share(problem), 1.0 if case == ALL else ACTIVE
        if abs(share - said) > (0.1 if setting.small else 0.01):
            raise AssertionError(f"{case}: {share:.3f} of the tokens are active, expected {said}")
        hidden, weight = problem.inputs["hidden"], problem.inputs["weight"]
        functions = {OURS: ours}
        if case == ALL:
            functions |= peers(setting, {LIGER: partial(liger_grpo, True)})
            functions |= with_eager(eager.linear_grpo_loss, setting, also_compiled=True)
        yield loss_case(
            "linear_grpo_loss", case, shape, hidden.dtype, problem, functions, eager.linear_grpo_loss, few=1,
            extra={PRODUCTS: bare_products(hidden, weight)}, cuda=setting,
            flop=6 * shape.tokens * shape.width * shape.vocab,
            bytes=3 * (hidden.nbytes + weight.nbytes),
            inherent_bytes=hidden.nbytes + weight.nbytes + 4 * weight.numel(),
        )

"""A policy head with entropy, forward and backward: GRPO with an entropy bonus, beside its three bare products."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import r1kernels
from gpu import eager
from gpu.ceilings import bare_products
from gpu.heads import POLICY_HEADS, PolicyHead
from gpu.inputs import NEAR, alternating, make_head, noise_like, sampled_ids, sequences
from gpu.losses import LossFunction, Problem, loss_case, with_eager
from gpu.setting import OURS, PRODUCTS, Case, Head, Setting, peers, policy_head_shapes
from r1kernels import objectives
from r1kernels.bench.eager import clipped_loss

ENTROPY = "GRPO with an entropy bonus"


def ours(hidden: Tensor, weight: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor) -> Tensor:
    objective = objectives.grpo(entropy_coef=eager.ENTROPY_COEF)
    return r1kernels.linear_grpo_loss(
        hidden, weight, token_ids, advantages, old_logprobs=old_logprobs, objective=objective
    ).loss


def loss_of(load: Callable[[], PolicyHead]) -> Callable[[], LossFunction]:
    """The same loss, in torch, of the log-probs and entropies of a peer's head."""

    def loaded() -> LossFunction:
        head = load()

        def loss(
            hidden: Tensor, weight: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor
        ) -> Tensor:
            logprobs, entropy = head(hidden.flatten(0, -2), weight, token_ids.flatten())
            policy = clipped_loss(logprobs.float().view_as(old_logprobs), advantages, old_logprobs)
            return policy - eager.ENTROPY_COEF * entropy.float().mean()

        return loss

    return loaded


def make_problem(shape: Head, setting: Setting) -> Problem:
    b, t = sequences(shape.tokens)
    hidden, weight = make_head(shape, setting.device)
    ids = sampled_ids(hidden, weight)
    with torch.no_grad():
        logprobs = r1kernels.linear_token_logprobs(hidden, weight, ids).view(b, t)
    return Problem(
        {
            "hidden": hidden.view(b, t, -1), "weight": weight, "token_ids": ids.view(b, t),
            "advantages": alternating(b, setting.device), "old_logprobs": logprobs + noise_like(logprobs, NEAR),
        },
        leaves=("hidden", "weight"), rows=("hidden", "token_ids", "advantages", "old_logprobs"),
    )


def cases(setting: Setting) -> Iterator[Case]:
    for shape in policy_head_shapes(setting):
        problem = make_problem(shape, setting)
        hidden, weight = problem.inputs["hidden"], problem.inputs["weight"]
        functions = {
            OURS: ours, **peers(setting, {name: loss_of(load) for name, load in POLICY_HEADS.items()}),
            **with_eager(eager.linear_policy_loss, setting),
        }
        yield loss_case(
            "linear_policy_head", ENTROPY, shape, hidden.dtype, problem, functions, eager.linear_policy_loss, few=1,
            extra={PRODUCTS: bare_products(hidden, weight)}, cuda=setting,
            flop=6 * shape.tokens * shape.width * shape.vocab,
            bytes=3 * (hidden.nbytes + weight.nbytes),
            inherent_bytes=hidden.nbytes + weight.nbytes + 4 * weight.numel(),
        )

"""At most two compiled graphs serve all values of a temperature, a normalizer or a number of an objective."""

from collections.abc import Callable
from typing import Any

import compiled_numbers
import pytest
import torch
from backends import compiles, registration_only
from torch import Tensor

from r1kernels import (
    backend,
    cross_entropy,
    distillation_loss,
    group_advantages,
    grpo_loss,
    objectives,
    policy_loss,
    testing,
    token_logprobs,
)
from r1kernels._schemas import TRACED

POLICY = testing.random_policy(3, 4)
IDS = testing.random_ids(3, 4, vocab=33)
TEACHER = testing.random_pair(3, 4, 33)[1]
TOPK = dict(zip(("teacher_token_ids", "teacher_logprobs"), testing.random_topk(TEACHER, 5), strict=True))


def clip(number: float) -> objectives.Objective:
    return objectives.grpo(
        clip_low=number / 9, clip_high=number / 8, ratio_cap=1 + number, kl_coef=number / 7, entropy_coef=number / 6
    )


def sapo(number: float) -> objectives.Objective:
    return objectives.sapo(tau_pos=number, tau_neg=number + 0.1)


def of_policy(logits: Tensor, number: float, **more: Any) -> Tensor:
    given = POLICY | {"logprobs": logits[..., 0], "entropy": logits[..., 1]}
    return policy_loss(**given, normalizer=number, **more).loss


def of_grpo(logits: Tensor, number: float, **more: Any) -> Tensor:
    given = {name: value for name, value in POLICY.items() if name not in ("logprobs", "entropy")}
    return grpo_loss(logits, IDS, **given, temperature=number, normalizer=number, **more).loss


def of_distillation(logits: Tensor, number: float, **teacher: Tensor) -> Tensor:
    return distillation_loss(
        logits, **teacher, divergence="jsd", beta=number / 2, temperature=number, normalizer=number
    ).loss


LOSSES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "cross entropy with other terms": lambda logits, number: cross_entropy(
        logits, IDS, temperature=number, z_loss_coef=number / 9, label_smoothing=number / 8),
    "policy": lambda logits, number: of_policy(logits, number, objective=clip(number)),
    "policy, sapo": lambda logits, number: of_policy(logits, number, objective=sapo(number)),
    "policy, cispo": lambda logits, number: of_policy(logits, number, objective=objectives.cispo(clip_high=number)),
    "grpo": lambda logits, number: of_grpo(logits, number, objective=clip(number)),
    "grpo, callable": lambda logits, number: of_grpo(logits, number, objective=lambda logprobs, _: -logprobs * number),
    "logprobs": lambda logits, number: token_logprobs(logits, IDS, temperature=number).square().sum(),
    "cross_entropy": lambda logits, number: cross_entropy(logits, IDS, temperature=number, normalizer=number),
    "distillation": lambda logits, number: of_distillation(logits, number, teacher_logits=TEACHER),
    "distillation, top-k": lambda logits, number: of_distillation(logits, number, **TOPK),
    "group_advantages": lambda logits, number: (
        group_advantages(POLICY["logprobs"].flatten(), 3, eps=number) * logits[..., 0].flatten()).sum(),
}


@pytest.mark.few(4)
@compiles
@pytest.mark.not_on("cuda", reason="the fused step runs here, which rounds in another order than composed operators")
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
@pytest.mark.parametrize("loss", LOSSES)
def test_one_graph_for_all_numbers(loss: str) -> None:
    with backend(testing.KERNELS):
        compiled_numbers.check(LOSSES[loss], testing.random_logits(3, 4, 33))


@pytest.mark.not_on("cuda", "triton", reason="the reference runs")
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
@pytest.mark.parametrize("loss", ["policy", "policy, sapo", "policy, cispo", "distillation"])
@pytest.mark.slow(reason="compiles each objective")
def test_one_graph_of_the_reference(loss: str) -> None:
    with backend("reference"):
        compiled_numbers.check(LOSSES[loss], testing.random_logits(3, 4, 33))


@compiles
@pytest.mark.not_on("cuda", reason="the fused step runs here, which rounds in another order than composed operators")
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
def test_one_graph_for_objectives_that_are_made_outside() -> None:
    def loss_of(logits: Tensor, objective: objectives.Objective) -> Tensor:
        return of_policy(logits, 2.0, objective=objective)

    step = testing.compiled(loss_of)
    logits = testing.random_logits(3, 4, 33)
    with torch._dynamo.config.patch(recompile_limit=2):
        for number in compiled_numbers.VALUES:
            objective = clip(number)
            torch.testing.assert_close(step(logits, objective), of_policy(logits, 2.0, objective=objective))


@registration_only
def test_traced_numbers_replace_arguments() -> None:
    logits, ids = testing.random_logits(5, 40), testing.random_ids(5, vocab=40)
    values = [torch.tensor(0.7, dtype=torch.float64)]
    arguments = ([3], values, logits, ids, None, 1.0)
    torch.library.opcheck(torch.ops.r1kernels.token_stats_traced, arguments)
    expected = torch.ops.r1kernels.token_stats(logits, ids, None, 0.7)
    for result, value in zip(torch.ops.r1kernels.token_stats_traced(*arguments), expected, strict=True):
        assert torch.equal(result, value)


@registration_only
def test_operators_with_numbers_are_traced_and_left_out_of_cuda_graphs() -> None:
    assert {"token_stats", "token_stats_backward", "policy_loss", "linear_policy_gradient", "divergence"} <= set(TRACED)
    for name in TRACED:
        operator = getattr(torch.ops.r1kernels, f"{name}_traced").default
        assert torch.Tag.cudagraph_unsafe in operator.tags

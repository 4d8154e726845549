"""At most two compiled graphs serve all values of a temperature, a scale, a soft cap or a number of an objective."""

from collections.abc import Callable
from typing import Any

import compiled_numbers
import linear_cases as cases
import pytest
from backends import compiles
from torch import Tensor

from r1kernels import (
    Objective,
    backend,
    linear_cross_entropy,
    linear_distillation_loss,
    linear_grpo_loss,
    linear_multi_target,
    linear_token_logprobs,
    objectives,
    testing,
)

HEAD = cases.make("plain", 3, 4)
HIDDEN, WEIGHT, IDS = (HEAD[name] for name in ("hidden", "weight", "token_ids"))
POLICY = {
    name: value for name, value in testing.random_policy(3, 4).items() if name not in ("logprobs", "entropy")
}
TEACHER = cases.make("plain", 3, 4, width=9, seed=3)
TOPK = testing.random_topk(testing.random_logits(3, 4, 37), 5)


def numbers(number: float) -> dict[str, float]:
    return {"temperature": number, "logit_scale": number / 3, "softcap": 4 * number}


def of_grpo(hidden: Tensor, number: float, objective: Objective) -> Tensor:
    return linear_grpo_loss(
        hidden, WEIGHT, IDS, **POLICY, **numbers(number), normalizer=number, objective=objective
    ).loss


def of_distillation(hidden: Tensor, number: float, **teacher: Any) -> Tensor:
    return linear_distillation_loss(
        hidden, WEIGHT, **teacher, **numbers(number), divergence="jsd", beta=number / 2, normalizer=number
    ).loss


LOSSES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "logprobs": lambda hidden, number: linear_token_logprobs(hidden, WEIGHT, IDS, **numbers(number)).square().sum(),
    "cross_entropy": lambda hidden, number: linear_cross_entropy(
        hidden, WEIGHT, IDS, **numbers(number), normalizer=number),
    "cross_entropy with other terms": lambda hidden, number: linear_cross_entropy(
        hidden, WEIGHT, IDS, **numbers(number), z_loss_coef=number / 9, label_smoothing=number / 8),
    "multi_target": lambda hidden, number: linear_multi_target(
        hidden, WEIGHT, IDS[None], **numbers(number), normalizer=number, z_loss_coef=number / 9).sum(),
    "grpo": lambda hidden, number: of_grpo(hidden, number, objectives.grpo(
        clip_low=number / 9, clip_high=number / 8, ratio_cap=1 + number, kl_coef=number / 7, entropy_coef=number / 6)),
    "gspo": lambda hidden, number: of_grpo(hidden, number, objectives.gspo(clip_low=number / 9, clip_high=number / 8)),
    "distillation": lambda hidden, number: of_distillation(
        hidden, number, teacher_hidden=TEACHER["hidden"], teacher_weight=TEACHER["weight"],
        teacher_options={"logit_scale": number, "softcap": 5 * number}),
    "distillation, top-k": lambda hidden, number: of_distillation(
        hidden, number, teacher_token_ids=TOPK[0], teacher_logprobs=TOPK[1]),
}


@pytest.mark.few(2)
@compiles
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
@pytest.mark.parametrize("loss", LOSSES)
def test_one_graph_for_all_numbers(loss: str) -> None:
    with backend(testing.KERNELS):
        compiled_numbers.check(LOSSES[loss], HIDDEN)

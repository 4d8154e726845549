"""On a GPU: the losses from logits, and the operations on tokens alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_cases import (
    DEVICE,
    FOR_EVERYTHING,
    KERNELS,
    LOGITS,
    compare,
    ids_of,
    logits_of,
    needs_gpu,
    on_device,
    ours,
    results,
    size,
)
from torch import Tensor

import r1kernels
from r1kernels import Objective, objectives, testing

pytestmark = needs_gpu
REAL = size(151_936, 515)
B, T = size(8, 3), size(256, 5)
PRESETS = {
    "grpo": objectives.grpo(kl_coef=0.04, entropy_coef=0.01), "r1": objectives.r1(), "bnpo": objectives.bnpo(),
    "dr_grpo": objectives.dr_grpo(64), "dapo": objectives.dapo(ratio_cap=3.0), "gspo": objectives.gspo(),
    "cispo": objectives.cispo(), "sapo": objectives.sapo(), "reinforce": objectives.reinforce(),
}


@pytest.fixture(autouse=True, params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    with ours(request.param):
        yield


def policy_inputs(seed: int = 0) -> dict[str, Tensor]:
    """Every bound of every preset is crossed, one advantage is 0 and a fifth of the tokens do not count."""
    given = testing.random_policy(B, T, seed)
    given["mask"] = torch.rand(B, T, generator=testing.generator(seed + 1)) > 0.2
    return {name: value.to(DEVICE) for name, value in given.items()}


def junk_behind(mask: Tensor, value: Tensor) -> Tensor:
    return testing.poisoned(value.cpu(), mask.cpu()).to(value.device)


# ---- tokens alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_policy_loss(preset: str) -> None:
    inputs = policy_inputs()
    inputs["normalizer"] = torch.tensor(37.0, device=DEVICE)
    compare(lambda **given: r1kernels.policy_loss(**given, objective=PRESETS[preset]).loss, inputs,
            ("logprobs", "entropy"), near=1.0)


@pytest.mark.parametrize("preset", PRESETS)
def test_policy_metrics(preset: str) -> None:
    def metrics(**given: Tensor) -> tuple[Tensor, ...]:
        return tuple(r1kernels.policy_loss(**given, objective=PRESETS[preset]).metrics.values())

    compare(metrics, policy_inputs(), (), near=1.0)


def test_nothing_behind_the_mask_matters() -> None:
    inputs = policy_inputs()
    mask = inputs["mask"]
    dirty = inputs | {
        name: junk_behind(mask, inputs[name]) for name in ("logprobs", "old_logprobs", "ref_logprobs", "entropy")
    }

    def loss(**given: Tensor) -> Tensor:
        return r1kernels.policy_loss(**given, objective=PRESETS["grpo"]).loss

    for clean, found in zip(*(results(loss, given, ("logprobs",)) for given in (inputs, dirty)), strict=True):
        assert torch.equal(clean, found)


def test_policy_loss_of_32k_tokens_and_of_none() -> None:
    def loss(**given: Tensor) -> Tensor:
        return r1kernels.policy_loss(**given).loss

    for sequences, length in ((size(64, 4), size(512, 9)), (0, 4), (3, 0), (1, 1)):
        logprobs = -on_device(sequences, length).abs()
        compare(loss, {"logprobs": logprobs, "advantages": on_device(sequences, seed=1),
                       "old_logprobs": logprobs + on_device(sequences, length, seed=2, scale=0.2)}, ("logprobs",),
                near=1.0)


@pytest.mark.parametrize("scale", ["group_std", "batch_std", "none"])
def test_group_advantages(scale: str) -> None:
    rewards = on_device(size(512, 6), 8)
    rewards[0] = 0.1  # all equal: exactly 0
    rewards[1, 3] = torch.nan
    (found,) = compare(lambda rewards: r1kernels.group_advantages(rewards, scale=scale), {"rewards": rewards})
    assert (found[0] == 0).all() and found[1, 3] == 0
    ids = torch.randperm(rewards.numel(), generator=testing.generator(0)).to(DEVICE) // 7
    compare(lambda rewards, group_ids: r1kernels.group_advantages(rewards, group_ids=group_ids, scale=scale),
            {"rewards": rewards.flatten(), "group_ids": ids})


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimate(estimator: str) -> None:
    logprobs = -on_device(B, T).abs()
    inputs = {"logprobs": logprobs, "ref_logprobs": logprobs + on_device(B, T, seed=1, scale=1e-3)}
    compare(lambda **given: r1kernels.kl_estimate(**given, estimator=estimator), inputs, ("logprobs",))


# ---- from logits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("preset", ["grpo", "gspo", "dapo"])
def test_grpo_loss(preset: str, dtype: torch.dtype) -> None:
    compare(lambda **given: r1kernels.grpo_loss(**given, objective=PRESETS[preset]).loss, grpo_inputs(dtype),
            ("logits",), near=LOGITS)


def grpo_inputs(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    logits, ids = logits_of(B, T, REAL, dtype=dtype), ids_of(B, T, vocab=REAL)
    logprobs = r1kernels.token_logprobs(logits, ids)
    return {
        "logits": logits, "token_ids": ids, "advantages": on_device(B, seed=2),
        "old_logprobs": logprobs + on_device(B, T, seed=3, scale=0.3),
        "ref_logprobs": logprobs + on_device(B, T, seed=4, scale=0.1),
        "mask": on_device(B, T, seed=5) > -1,
    }


def test_masked_rows_of_logits_are_not_read() -> None:
    inputs = grpo_inputs()
    dirty = inputs | {
        "logits": torch.where(inputs["mask"][..., None], inputs["logits"], torch.nan),
        "token_ids": torch.where(inputs["mask"], inputs["token_ids"], -1),
    }

    def loss(**given: Tensor) -> Tensor:
        return r1kernels.grpo_loss(**given).loss

    (value, grad), (expected, expected_grad) = (results(loss, given, ("logits",)) for given in (dirty, inputs))
    assert torch.equal(value, expected) and torch.equal(grad, expected_grad)
    assert (grad[~inputs["mask"]] == 0).all()


def test_packed_sequences_give_the_loss_of_padded_ones() -> None:
    inputs = grpo_inputs()
    objective: Objective = objectives.gspo()
    padded = r1kernels.grpo_loss(**(inputs | {"mask": None}), objective=objective).loss
    flat = {name: value.flatten(0, 1) for name, value in inputs.items() if value.dim() > 1 and name != "mask"}
    cu_seqlens = torch.arange(0, B * T + 1, T, device=DEVICE)
    packed = r1kernels.grpo_loss(
        **flat, advantages=inputs["advantages"], cu_seqlens=cu_seqlens, objective=objective
    ).loss
    torch.testing.assert_close(packed, padded, rtol=4 * testing.EPS32, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(reduction: str) -> None:
    targets = ids_of(B, T, vocab=REAL)
    targets[0, ::2] = -100
    inputs = {"logits": logits_of(B, T, REAL), "targets": targets}
    compare(lambda **given: r1kernels.cross_entropy(**given, reduction=reduction), inputs, ("logits",), near=LOGITS)


@pytest.mark.parametrize("kernels", FOR_EVERYTHING, indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_distillation_loss(kind: str, dtype: torch.dtype) -> None:
    student, teacher = logits_of(B, T, REAL, dtype=dtype), logits_of(B, T, REAL, dtype=dtype, seed=9)
    inputs = {
        "student_logits": student, "teacher_logits": (0.7 * student + 0.7 * teacher).to(dtype),
        "mask": on_device(B, T, seed=5) > -1,
    }
    compare(lambda **given: r1kernels.distillation_loss(**given, divergence=kind, beta=0.3, temperature=1.3).loss,
            inputs, ("student_logits",), near=LOGITS)


@pytest.mark.parametrize("kernels", FOR_EVERYTHING, indirect=True)
def test_distillation_from_listed_tokens() -> None:
    student = logits_of(B, T, REAL)
    top = logits_of(B, T, REAL, seed=9).float().log_softmax(-1).topk(16)
    inputs = {"student_logits": student, "teacher_token_ids": top.indices, "teacher_logprobs": top.values}
    compare(lambda **given: r1kernels.distillation_loss(**given).loss, inputs, ("student_logits",), near=LOGITS)

"""On a GPU: the losses from hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu_cases import (
    DEVICE,
    FOR_EVERYTHING,
    LOGITS,
    compare,
    head_of,
    ids_of,
    needs_gpu,
    on_device,
    ours,
    results,
    size,
)
from torch import Tensor

import r1kernels
from r1kernels import objectives, testing
from r1kernels.ops.linear import gemm

pytestmark = needs_gpu
B, T = size(4, 3), size(256, 7)
N, H, V = B * T, size(1024, 24), size(32_011, 203)
CLOSE = 2e-4  # of log-probs by two orders of the same sums


@pytest.fixture(autouse=True, params=FOR_EVERYTHING)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    with ours(request.param):
        yield


def inputs_of(dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    hidden, weight = head_of(N, H, V, dtype)
    return {"hidden": hidden.view(B, T, H), "weight": weight, "token_ids": ids_of(B, T, vocab=V)}


def grpo_inputs(dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    inputs = inputs_of(dtype)
    logprobs = r1kernels.linear_token_logprobs(**inputs)
    advantages = on_device(B, T, seed=2)
    return inputs | {
        # Advantages away from 0 and log-ratios from their bounds: no rounding decides whether a token is clipped.
        "advantages": torch.where(on_device(B, T, seed=6) > 0.5, 0.0, advantages.sign() * (1 + advantages.abs())),
        "old_logprobs": logprobs + on_device(B, T, seed=3).sign() * 0.05,
        "ref_logprobs": logprobs + on_device(B, T, seed=4, scale=0.1),
        "mask": on_device(B, T, seed=5) > -1,
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "options": {"logit_scale": 0.8, "softcap": 25.0, "temperature": 0.9},
    "chunks": {"chunk_bytes": 1 << 27}, "batch_invariant": {"batch_invariant": True},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", OPTIONS)
def test_log_probs_and_entropy(options: str, dtype: torch.dtype) -> None:
    """With the gradients of both."""
    inputs = inputs_of(dtype) | {"bias": on_device(V, seed=7, dtype=dtype)}
    compare(lambda **given: r1kernels.linear_token_logprobs_and_entropy(**given, **OPTIONS[options]), inputs,
            ("hidden", "weight", "bias"), sums=True, near=LOGITS)


@pytest.mark.parametrize("dtypes", [
    (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32),
])
@pytest.mark.parametrize("options", ["plain", "chunks", "batch_invariant"])
def test_hidden_states_and_weight_of_two_dtypes(options: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Which products multiply in parts or copies."""
    inputs = inputs_of(torch.float32)
    inputs |= {name: inputs[name].to(dtype) for name, dtype in zip(("hidden", "weight"), dtypes, strict=True)}
    compare(lambda **given: r1kernels.linear_token_logprobs_and_entropy(**given, **OPTIONS[options]), inputs,
            ("hidden", "weight"), sums=True, near=LOGITS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_gradients_the_values_are_as_exact(dtype: torch.dtype) -> None:
    inputs = inputs_of(dtype)
    with torch.no_grad():
        compare(lambda **given: r1kernels.linear_token_logprobs_and_entropy(**given), inputs, (), near=LOGITS)


def library_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """The logits with the accumulators of the device's library."""
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return hidden.float() @ weight.float().t()


def test_precision_at_the_size_of_a_model() -> None:
    """As exact as an exact log-softmax of the library's float32 product. Against float64, where matrix units may cost
    both of them digits, the benchmark measures it, beside its bars."""
    tokens, width, vocab = size(256, 16), size(4096, 64), size(151_936, 1_031)
    hidden, weight = head_of(tokens, width, vocab)
    logits = hidden.double() @ weight.double().T
    assert 10 < logits.max() < 30
    exact = logits.log_softmax(-1)
    theirs = library_product(hidden, weight).double().log_softmax(-1)
    for ids in (ids_of(tokens, vocab=vocab), exact.argmax(-1)):
        with torch.no_grad():
            found = r1kernels.linear_token_logprobs(hidden, weight, ids).double()
        wanted, peer = (values.gather(-1, ids[:, None]).squeeze(-1) for values in (exact, theirs))
        error, allowed = (found - wanted).abs(), (peer - wanted).abs()
        rounding = testing.rounding(wanted, torch.float32)
        assert error.mean() <= 2 * (allowed.mean() + rounding.mean()), (float(error.mean()), float(allowed.mean()))
        assert error.max() <= 2 * (allowed.max() + rounding.max()), (float(error.max()), float(allowed.max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_in_16_bits_is_rounded_once(dtype: torch.dtype) -> None:
    """The weight's gradient by one product: the device's library adds up in float32, what is in memory before, too."""
    tokens, width, vocab = size(4096, 16), size(1024, 24), size(4099, 31)
    a, b = on_device(vocab, tokens, seed=1, dtype=dtype), on_device(tokens, width, seed=2, dtype=dtype)
    if not gemm.has_rounded_sums(a, b, dtype):
        pytest.skip("products of 16 bits have no float32 sum here, so none is written in 16 bits")
    before = on_device(vocab, width, seed=3, dtype=dtype)
    exact = a.double() @ b.double() + before.double()
    terms = a.double().abs() @ b.double().abs() + before.double().abs()
    found = gemm.add_rounded(a, b, before.clone())
    testing.assert_within(found, exact, testing.rounding(exact, dtype) + 1e-6 * terms)


@pytest.mark.parametrize("preset", ["grpo", "kl and entropy", "gspo"])
@pytest.mark.parametrize("capacity", [None, N])
def test_linear_grpo_loss(preset: str, capacity: int | None) -> None:
    objective = {
        "grpo": objectives.grpo(), "kl and entropy": objectives.grpo(kl_coef=0.04, entropy_coef=0.01),
        "gspo": objectives.gspo(clip_low=0.5, clip_high=0.5),
    }[preset]
    compare(lambda **given: r1kernels.linear_grpo_loss(**given, objective=objective, capacity=capacity).loss,
            grpo_inputs(), ("hidden", "weight"), sums=True, near=LOGITS)


def test_rows_without_a_gradient_may_hold_anything() -> None:
    inputs = grpo_inputs()
    idle = ~inputs["mask"] | (inputs["advantages"] == 0)
    dirty = inputs | {"hidden": torch.where(idle[..., None], torch.nan, inputs["hidden"])}

    def loss(**given: Tensor) -> Tensor:
        return r1kernels.linear_grpo_loss(**given).loss

    for found, expected in zip(*(results(loss, x, ("hidden", "weight")) for x in (dirty, inputs)), strict=True):
        assert torch.equal(found, expected)


def test_strided_and_unaligned_hidden_states() -> None:
    inputs = inputs_of()
    wider = torch.nn.functional.pad(inputs["hidden"], (1, 2))
    ids = inputs["token_ids"]
    expected = r1kernels.linear_token_logprobs(**inputs)
    for hidden in (wider[..., 1:-2], inputs["hidden"].transpose(0, 1).contiguous().transpose(0, 1)):
        found = r1kernels.linear_token_logprobs(hidden, inputs["weight"], ids)
        torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE)


def test_no_tokens_and_one() -> None:
    weight = head_of(1, H, V)[1]
    for tokens in (0, 1):
        inputs = {"hidden": head_of(tokens, H, V)[0], "weight": weight, "token_ids": ids_of(tokens, vocab=V)}
        compare(lambda **given: r1kernels.linear_token_logprobs_and_entropy(**given), inputs, ("hidden", "weight"),
                sums=True, near=LOGITS)


def test_linear_cross_entropy() -> None:
    inputs = inputs_of()
    targets = inputs.pop("token_ids")
    targets[0, ::2] = -100
    compare(lambda **given: r1kernels.linear_cross_entropy(**given), inputs | {"targets": targets},
            ("hidden", "weight"), sums=True, near=LOGITS)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_linear_distillation_loss(kind: str) -> None:
    inputs = inputs_of()
    hidden, weight = inputs["hidden"], inputs["weight"]
    given = {
        "student_hidden": hidden, "student_weight": weight,
        "teacher_hidden": (0.7 * hidden + 0.7 * on_device(B, T, H, seed=8)).to(hidden.dtype),
        "teacher_weight": weight, "mask": on_device(B, T, seed=5) > -1,
    }
    compare(lambda **x: r1kernels.linear_distillation_loss(**x, divergence=kind).loss, given,
            ("student_hidden", "student_weight"), sums=True, near=LOGITS)


def test_gradients_accumulate_into_given_memory() -> None:
    inputs = inputs_of()
    weight = inputs["weight"].requires_grad_()
    into = torch.zeros(V, H, dtype=torch.float32, device=DEVICE)
    targets = inputs["token_ids"]
    for _ in range(2):
        r1kernels.linear_cross_entropy(inputs["hidden"], weight, targets, grad_accumulation_into=into).backward()
    assert weight.grad is None
    once = torch.autograd.grad(r1kernels.linear_cross_entropy(inputs["hidden"], weight, targets), weight)[0]
    error = (into / 2 - once.float()).norm() / once.float().norm()
    assert error <= torch.finfo(weight.dtype).eps

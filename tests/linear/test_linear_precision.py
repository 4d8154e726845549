"""Gradients from bfloat16 inputs of a language model's size: no further from float64 than the dense computation."""

from typing import Any

import linear_cases as cases
import pytest
import torch
from backends import slow_interpreted, slow_on_gpu_kernels
from torch import Tensor

from r1kernels import Objective, grpo_loss, linear_cross_entropy, linear_grpo_loss, testing

TOKENS, WIDTH, VOCAB = (192, 512, 16_384) if testing.KERNELS == "cpu" else (120, 64, 2049)


@pytest.fixture(scope="module")
def model_like() -> dict[str, Any]:
    """Arguments of `linear_grpo_loss`: 4 packed sequences near their policy of the rollout."""
    case = cases.make("plain", TOKENS, width=WIDTH, vocab=VOCAB, dtype=torch.bfloat16, scale=4.2)
    rng = testing.generator(1)
    logprobs = cases.exact(case).logprobs
    return case | {
        "advantages": torch.randn(4, generator=rng),
        "old_logprobs": (logprobs + 0.1 * torch.randn(TOKENS, generator=rng)).float(),
        "ref_logprobs": (logprobs + 0.1 * torch.randn(TOKENS, generator=rng)).float(),
        "cu_seqlens": torch.tensor([0, 30, 90, 100, TOKENS]),
    }


def errors(grads: dict[str, Tensor], expected: cases.Exact) -> dict[str, float]:
    """Relative, of the whole tensor."""
    return {
        name: float((grad.double() - expected.grads[name]).norm() / expected.grads[name].norm())
        for name, grad in grads.items()
    }


@pytest.mark.few(1)
@slow_interpreted
@pytest.mark.parametrize("more", [{}, {"kl_coef": 0.1, "entropy_coef": 0.01}])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_gradients_are_as_close_as_dense_ones(ratio: str, more: dict[str, float], model_like: dict[str, Any]) -> None:
    """At most twice the error of bfloat16 logits, our loss of them, and autograd."""
    objective = Objective(ratio=ratio, clip_low=0.5, clip_high=0.5, **more)
    policy = {name: value for name, value in model_like.items() if name not in ("hidden", "weight", "token_ids")}
    head = {name: model_like[name] for name in ("hidden", "weight", "token_ids")}
    stats = cases.exact(head)
    loss = testing.policy_loss(objective, logprobs=stats.logprobs, entropy=stats.entropy, **policy)
    expected = cases.exact(head, loss.grad_logprobs.value, loss.grad_entropy.value)

    def dense(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
        return grpo_loss(hidden @ weight.T, token_ids, **policy, objective=objective).loss

    def linear(**tensors: Tensor) -> Tensor:
        return linear_grpo_loss(**tensors, **policy, objective=objective, chunk_bytes=4 << 20).loss

    theirs = errors(cases.gradients(dense, head, lambda value: value)[1], expected)
    value, grads = cases.gradients(linear, head, lambda value: value)
    ours = errors(grads, expected)
    for name, error in ours.items():
        assert error <= 2 * theirs[name], (ours, theirs)
    assert abs(float(value.detach()) - float(loss.loss.value)) <= 1e-6 * float(loss.loss.terms)


@pytest.mark.long(reason="64 passes at the size of a model")
@slow_on_gpu_kernels
def test_gradient_of_64_micro_batches_at_size() -> None:
    """To 1e-3 of the whole tensor; one that was added up in bfloat16 is much further off."""
    micro, tokens, width, vocab = 64, 16, 256, 4096
    case = cases.make("plain", micro * tokens, width=width, vocab=vocab, dtype=torch.bfloat16, scale=4.2)
    expected = cases.exact(case, torch.full((micro * tokens,), -1 / (micro * tokens)))
    into = {name: torch.zeros(vocab, width, dtype=dtype) for name, dtype in
            (("float32", torch.float32), ("bfloat16", torch.bfloat16))}
    weight = case["weight"].requires_grad_()
    for n in range(micro):
        part = slice(n * tokens, (n + 1) * tokens)
        for total in into.values():
            linear_cross_entropy(
                case["hidden"][part], weight, case["token_ids"][part], normalizer=float(micro * tokens),
                grad_accumulation_into=total,
            ).backward()
    error = {name: errors({"weight": total}, expected)["weight"] for name, total in into.items()}
    assert error["float32"] <= 1e-3 and error["float32"] < error["bfloat16"], error

"""The policy loss from hidden states: every objective, layout and option against the oracles composed in float64."""

from collections.abc import Callable
from typing import Any

import linear_cases as cases
import pytest
import torch
from backends import reference_only, slow_interpreted
from linear_policy_cases import EVERYTHING, HEAD_KEYWORDS, check, exact, head_of, make, packed, run
from policy_cases import AGGREGATES, EXTRAS, KLS, OBJECTIVES, objective_of
from torch import Tensor

from r1kernels import (
    Objective,
    backend,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprobs_and_entropy,
    objectives,
    policy_loss,
    testing,
)

# ---- 1. the whole table in float64 ----------------------------------------------------------------------------


@pytest.mark.few(17)
@reference_only
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_in_float64(name: str, kl: str, aggregate: str) -> None:
    objective = objective_of(name, kl, aggregate)
    inputs = make("temperatures", "holes", torch.float64)
    with backend("reference"):
        for measure_all, rows in ((False, 4), (True, 100)):
            chunk_bytes = cases.chunk_of(rows, 37, 12, torch.float64)
            check(inputs, objective, 1e-12, measure_all=measure_all, chunk_bytes=chunk_bytes)


@pytest.mark.few(10)
@reference_only
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("name", ["grpo", "gspo_wide", "cispo", "sapo_sequence", "reinforce"])
@pytest.mark.parametrize("head", ["lora", "everything"])
def test_inputs_in_float64(head: str, name: str, extra: str) -> None:
    inputs = make(head, extra, torch.float64)
    with backend("reference"):
        for more in ({}, EVERYTHING):
            for aggregate in AGGREGATES.values():
                check(inputs, Objective(**OBJECTIVES[name], **more, **aggregate), 1e-12)


# ---- 2. float32 and 16 bits, both implementations ---------------------------------------------------------------


@pytest.mark.few(12)
@slow_interpreted
@pytest.mark.parametrize("head", cases.HEADS)
@pytest.mark.parametrize("name", ["two_sided", "gspo_wide", "sapo"])
@pytest.mark.parametrize("more", [{}, EVERYTHING])
def test_heads_in_float32(head: str, name: str, more: dict[str, float], implementation: str) -> None:
    inputs = make(head, "holes")
    for rows in (3, 100):
        check(inputs, Objective(**OBJECTIVES[name], **more), 2e-5, chunk_bytes=cases.chunk_of(rows, 37, 12))


@pytest.mark.few(24)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("extra", EXTRAS)
def test_objectives_and_inputs_in_float32(name: str, extra: str) -> None:
    with backend(testing.KERNELS):
        for aggregate in AGGREGATES.values():
            # VESPO's weight has the error of a sum over the sequence, times its exponent.
            check(make("bias", extra), Objective(**OBJECTIVES[name], **aggregate), 4e-5 if name == "vespo" else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["grpo", "gspo_wide", "cispo"])
def test_sixteen_bits(name: str, dtype: torch.dtype, implementation: str) -> None:
    inputs = make("bias", "holes", dtype)
    check(inputs, Objective(**OBJECTIVES[name], **EVERYTHING), 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["reinforce", "grpo"])
def test_a_loss_scale_reaches_float16_before_it_rounds(name: str, implementation: str) -> None:
    """A mean over many tokens times a small probability is below float16's range: loss scaling must still help."""
    inputs = make("plain", "plain", torch.float16, vocab=2000)
    inputs |= {"normalizer": 1e5, "old_logprobs": cases.exact(head_of(inputs)).logprobs.float()}
    objective = Objective(**OBJECTIVES[name])
    _, grads = run(inputs, factor=2.0**16, objective=objective)
    expected = exact(inputs, objective)[1]
    for tensor, grad in grads.items():
        error = (grad.double() / 2**16 - expected.grads[tensor]).norm() / expected.grads[tensor].norm()
        assert error <= 2e-3, (tensor, float(error))


# ---- 3. it is the composition -------------------------------------------------------------------------------


@slow_interpreted
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("more", [{}, EVERYTHING])
def test_is_grpo_loss_of_the_dense_logits(name: str, more: dict[str, float], implementation: str) -> None:
    """Loss, gradients and, when everything is measured, metrics."""
    inputs = make("plain", "holes")
    objective = Objective(**OBJECTIVES[name], **more)
    result, grads = run(inputs, objective=objective, measure_all=True)
    leaves = [inputs[key].clone().requires_grad_() for key in ("hidden", "weight")]
    rest = {key: value for key, value in inputs.items() if key not in ("hidden", "weight")}
    dense = grpo_loss(leaves[0] @ leaves[1].T, **rest, objective=objective)
    torch.testing.assert_close(result.loss, dense.loss, rtol=1e-5, atol=1e-6)
    for ours, expected in zip(grads.values(), torch.autograd.grad(dense.loss, leaves), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    for key, value in dense.metrics.items():
        torch.testing.assert_close(result.metrics[key], value, rtol=1e-5, atol=1e-5)


@slow_interpreted
@pytest.mark.parametrize("name", OBJECTIVES)
def test_is_policy_loss_of_the_linear_statistics(name: str, implementation: str) -> None:
    """Bit for bit in the loss: one pass and two phases compute the same log-probs."""
    inputs = make("everything", "holes")
    objective = Objective(**OBJECTIVES[name], **EVERYTHING)
    rest = {key: value for key, value in inputs.items() if key not in HEAD_KEYWORDS}

    def composed(**tensors: Any) -> Tensor:
        logprobs, entropy = linear_token_logprobs_and_entropy(**head_of(inputs) | tensors, mask=inputs["mask"])
        return policy_loss(logprobs, entropy=entropy, **rest, objective=objective).loss

    loss, expected = cases.gradients(composed, head_of(inputs), lambda value: value)
    result, grads = run(inputs, objective=objective)
    assert torch.equal(result.loss, loss)
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-5, atol=1e-7)


@slow_interpreted
@pytest.mark.parametrize("extra", EXTRAS)
def test_metrics_and_loss_do_not_need_gradients(extra: str, implementation: str) -> None:
    """The same numbers under no_grad, in inference mode, and with a graph."""
    inputs = make("bias", extra)
    result, _ = run(inputs, objective=objectives.dapo())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            other = linear_grpo_loss(**inputs, objective=objectives.dapo())
        assert not other.loss.requires_grad
        torch.testing.assert_close(other.loss, result.loss.detach(), rtol=1e-6, atol=0)
        assert set(other.metrics) == set(result.metrics)
        for name, value in result.metrics.items():
            torch.testing.assert_close(other.metrics[name], value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("more", [{}, EVERYTHING])
@slow_interpreted
def test_packed_equals_padded(name: str, more: dict[str, float], implementation: str) -> None:
    lengths = testing.random_lengths(5, 7)
    inputs = make("temperatures", "plain")
    objective = Objective(**OBJECTIVES[name], **more)
    keep = testing.length_mask(lengths, 7)
    padded, padded_grads = run(inputs | {"mask": keep}, objective=objective)
    flat, flat_grads = run(packed(inputs, lengths), objective=objective)
    torch.testing.assert_close(flat.loss, padded.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(flat_grads["hidden"], padded_grads["hidden"][keep], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(flat_grads["weight"], padded_grads["weight"], rtol=1e-5, atol=1e-7)
    check(packed(inputs, lengths), objective, 1e-5)
    for metric, value in padded.metrics.items():
        torch.testing.assert_close(flat.metrics[metric], value, rtol=1e-6, atol=1e-6)


@slow_interpreted
@pytest.mark.parametrize("advantages", ["per sequence", "per token"])
def test_packed_tokens_without_sequences(advantages: str, implementation: str) -> None:
    """Token ratio and token mean need no boundaries; one advantage may be for all."""
    inputs = make("plain", "token_advantages")
    flat = {k: v.flatten(0, 1) if isinstance(v, Tensor) and v.shape[:2] == (5, 7) else v for k, v in inputs.items()}
    del flat["importance_weights"]
    if advantages == "per sequence":
        flat["advantages"] = torch.tensor(0.7)
    result, grads = run(flat, objective=objectives.dapo())
    expected = flat | {"advantages": flat["advantages"].expand(35), "cu_seqlens": torch.tensor([0, 35])}
    other, other_grads = run(expected, objective=objectives.dapo())
    assert torch.equal(result.loss, other.loss) and result.metrics["sequences"] == 1
    assert all(torch.equal(grads[key], other_grads[key]) for key in grads)


# ---- 4. custom objectives -----------------------------------------------------------------------------------


def by_hand(logprobs: Tensor, batch: Any) -> Tensor:
    ratio = (logprobs - batch.old_logprobs).exp()
    return -torch.min(ratio * batch.advantages, ratio.clamp(0.8, 1.2) * batch.advantages)


@slow_interpreted
@pytest.mark.parametrize("extra", ["plain", "holes", "token_advantages", "token_weights", "normalizer"])
def test_a_callable_is_the_preset_it_spells_out(extra: str, implementation: str) -> None:
    inputs = make("everything", extra)
    for more in ({}, EVERYTHING, AGGREGATES["constant"]):
        custom, grads = run(inputs, objective=Objective(surrogate=by_hand, **more))
        preset, expected = run(inputs, objective=Objective(**more), measure_all=True)
        torch.testing.assert_close(custom.loss, preset.loss, rtol=1e-5, atol=1e-6)
        for key, grad in grads.items():
            torch.testing.assert_close(grad, expected[key], rtol=1e-4, atol=1e-6)
        assert custom.metrics["measured_tokens"] == custom.metrics["tokens"] == preset.metrics["tokens"]
    bare, _ = run(inputs, objective=by_hand)
    token_mean, _ = run(inputs, objective=Objective(surrogate=by_hand, aggregate="token_mean"))
    assert torch.equal(bare.loss, token_mean.loss)


# ---- 5. the chain behind the loss -----------------------------------------------------------------------------


@slow_interpreted
@pytest.mark.parametrize("name", ["grpo", "gspo_wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upstream_factors_and_retained_graphs(name: str, dtype: torch.dtype, implementation: str) -> None:
    inputs = make("everything", "holes", dtype)
    objective = Objective(**OBJECTIVES[name], **EVERYTHING)
    _, once = run(inputs, objective=objective)
    leaves = {key: value.detach().requires_grad_() for key, value in cases.tensors(inputs).items()}
    loss = linear_grpo_loss(**cases.with_tensors(inputs, leaves), objective=objective).loss
    (3 * loss).backward(retain_graph=True)
    three = {key: leaf.grad.clone() for key, leaf in leaves.items()}
    loss.backward(retain_graph=True)
    torch.autograd.backward(loss, torch.tensor(0.0))
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4e-6 if dtype == torch.float32 else 4e-3}
    for key, leaf in leaves.items():
        torch.testing.assert_close(three[key], 3 * once[key], **tolerance)
        torch.testing.assert_close(leaf.grad, 4 * once[key], **tolerance)


@slow_interpreted
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_an_upstream_gradient_of_nan_or_inf_does_not_bring_masked_tokens_to_life(
    factor: float, implementation: str
) -> None:
    inputs = make("plain", "plain")
    inputs["token_ids"][0, 2] = 2**40
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[0, 2] = False
    for objective in (objectives.grpo(**EVERYTHING), objectives.gspo(**EVERYTHING)):
        _, grads = run(inputs, factor, mask=mask, objective=objective)
        assert grads["hidden"][0, 2].eq(0).all()
        assert not grads["hidden"][0, 1].isfinite().any()


@slow_interpreted
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_gradients_are_the_same_in_a_second_backward(implementation: str, factor: float) -> None:
    """They are kept for it, whatever was done to what the first one gave."""
    inputs = make()
    leaves = {key: value.detach().requires_grad_() for key, value in cases.tensors(inputs).items()}
    loss = factor * linear_grpo_loss(**cases.with_tensors(inputs, leaves)).loss
    loss.backward(retain_graph=True)
    first = {key: leaf.grad.clone() for key, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad.zero_()
    loss.backward()
    for key, leaf in leaves.items():
        assert torch.equal(leaf.grad, first[key]), key


@slow_interpreted
def test_an_optimiser_step_between_two_backwards_is_noticed_or_harmless(implementation: str) -> None:
    """The two-phase path computes logits again in backward; a weight changed since must not be used in silence."""
    inputs = make()
    weight = torch.nn.Parameter(inputs["weight"])
    loss = linear_grpo_loss(**inputs | {"weight": weight}, objective=objectives.gspo()).loss
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@slow_interpreted
def test_tied_embeddings(implementation: str) -> None:
    """One Parameter as embedding and head: its gradient is the sum of both uses."""
    inputs = make("plain", "holes")
    tokens = testing.random_ids(5, 7, vocab=37, seed=9)
    rest = {key: value for key, value in inputs.items() if key not in ("hidden", "weight")}
    grads = []
    losses: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda hidden, weight: linear_grpo_loss(hidden, weight, **rest).loss,
        lambda hidden, weight: grpo_loss(hidden @ weight.T, **rest).loss,
    ]
    for loss_of in losses:
        weight = torch.nn.Parameter(inputs["weight"].clone())
        loss = loss_of(torch.tanh(torch.nn.functional.embedding(tokens, weight)), weight)
        loss.backward()
        grads.append((loss.detach(), weight.grad))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 7), (5, 0)])
@pytest.mark.parametrize("name", ["grpo", "gspo", "sapo"])
def test_no_tokens(shape: tuple[int, int], name: str, implementation: str) -> None:
    case = cases.make("everything", *shape)
    (loss, metrics), grads = cases.gradients(
        linear_grpo_loss, case, lambda result: result.loss, advantages=torch.ones(shape[0]),
        objective=Objective(**OBJECTIVES[name]),
    )
    assert loss == 0 and metrics["tokens"] == metrics["measured_tokens"] == 0
    for key, value in cases.tensors(case).items():
        assert grads[key].shape == value.shape and not grads[key].any()

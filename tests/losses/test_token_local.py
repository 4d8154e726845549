"""Functions of single tokens as objectives: values, gradients and errors, from log-probs and from logits."""

import math
from typing import Any

import pytest
import torch
from backends import checks_only, compiles, host_code, reference_only
from policy_cases import AGGREGATES, EXTRAS, KLS, evaluate, with_extras
from torch import Tensor

from r1kernels import Objective, PolicyBatch, backend, grpo_loss, policy_loss, testing, token_logprobs_and_entropy


def clipped(logprobs: Tensor, entropies: Tensor | None, tokens: PolicyBatch) -> Tensor:
    ratio = (logprobs - (logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs)).exp()
    return -torch.min(ratio * tokens.advantages, ratio.clamp(0.8, 1.2) * tokens.advantages)


def uncertain(logprobs: Tensor, entropies: Tensor, tokens: PolicyBatch) -> Tensor:
    return -tokens.advantages * logprobs * entropies


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_it_is_the_preset_that_it_spells(aggregate: str, kl: str, extra: str) -> None:
    fields = AGGREGATES[aggregate] | KLS[kl]
    inputs = with_extras(extra)
    result, grad, eta = evaluate(inputs, Objective.token_local(clipped, **fields))
    expected = testing.policy_loss(Objective(**fields), **inputs)
    testing.assert_within(result.loss, expected.loss)
    testing.assert_within(grad, expected.grad_logprobs)
    testing.assert_within(eta, expected.grad_entropy)
    absent = {name for name in expected.metrics if name.startswith(("clip_", "ratio_cap_"))}
    assert set(result.metrics) == set(expected.metrics) - absent
    for name, value in result.metrics.items():
        testing.assert_within(value, expected.metrics[name])


@reference_only
def test_gradcheck() -> None:
    inputs = {name: value.double() for name, value in with_extras("plain").items()}
    leaves = [inputs.pop(name).requires_grad_() for name in ("logprobs", "entropy")]

    def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
        return policy_loss(logprobs, entropy=entropy, **inputs, objective=Objective.token_local(uncertain)).loss

    assert torch.autograd.gradcheck(loss, leaves)


def test_from_logits_with_a_gradient_of_the_entropy() -> None:
    inputs = with_extras("holes")
    logits, ids = testing.random_logits(5, 7, 33), testing.random_ids(5, 7, vocab=33)
    del inputs["logprobs"], inputs["entropy"]
    logits.requires_grad_()
    grpo_loss(logits, ids, **inputs, objective=Objective.token_local(uncertain)).loss.backward()
    exact = logits.detach().double().requires_grad_()
    with backend("reference"):
        logprobs, entropy = token_logprobs_and_entropy(exact, ids)
    tokens = PolicyBatch(inputs["advantages"][:, None].double(), None, None, None, None, None, None)
    weight = inputs["mask"] * inputs["importance_weights"][:, None].double() / inputs["mask"].sum()
    (uncertain(logprobs, entropy, tokens) * weight).sum().backward()
    torch.testing.assert_close(logits.grad, exact.grad.float(), rtol=2e-5, atol=1e-7)


def test_importance_weights_multiply_what_it_returns_and_not_the_kl_of_the_field() -> None:
    """A weight of 0 rejects a token, whatever the function makes of it."""
    inputs = with_extras("token_weights")
    inputs["importance_weights"][0, :3] = 0
    inputs["old_logprobs"][0, 0] = -1e4  # its ratio overflows

    def with_kl(logprobs: Tensor, entropies: Tensor, tokens: PolicyBatch) -> Tensor:
        d = tokens.ref_logprobs - logprobs
        return clipped(logprobs, entropies, tokens) + 0.3 * (d.exp() - d - 1)

    inside, grad, _ = evaluate(inputs, Objective.token_local(with_kl))
    outside, other, _ = evaluate(inputs, Objective.token_local(clipped, kl_coef=0.3))
    assert inside.loss.isfinite() and grad.isfinite().all() and not grad[0, :3].any() and other[0, :3].all()
    weights = inputs["importance_weights"]
    d = inputs["ref_logprobs"] - inputs["logprobs"]
    difference = (0.3 * (d.exp() - d - 1) * (1 - weights)).mean()
    torch.testing.assert_close(outside.loss - inside.loss, difference, rtol=1e-4, atol=1e-6)


def test_values_behind_the_mask_do_not_matter() -> None:
    inputs = with_extras("holes")
    objective = Objective.token_local(clipped)
    clean, grad, _ = evaluate(inputs, objective)
    dirty = {name: testing.poisoned(value, inputs["mask"]) if name in ("logprobs", "old_logprobs", "entropy") else value
             for name, value in inputs.items()}
    result, other, _ = evaluate(dirty, objective)
    assert torch.equal(clean.loss, result.loss) and torch.equal(grad, other)


@compiles
def test_it_compiles() -> None:
    inputs = with_extras("plain")
    objective = Objective.token_local(clipped)
    loss = testing.compiled(lambda logprobs: policy_loss(**inputs | {"logprobs": logprobs}, objective=objective).loss)
    torch.testing.assert_close(loss(inputs["logprobs"]), policy_loss(**inputs, objective=objective).loss)


def test_it_equals_and_hashes_by_its_function() -> None:
    one, same, other = (Objective.token_local(f) for f in (clipped, clipped, uncertain))
    assert one == same and one != other and len({one, same, other}) == 2
    assert one.is_token_local and not Objective().is_token_local and not Objective(surrogate=clipped).is_token_local


# ---- errors -------------------------------------------------------------------------------------------------


@checks_only
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda p, h, t: p.mean(), r"a tensor of shape \(\), expected one loss for each token, of shape \(35,\)"),
        (lambda p, h, t: p[None], r"returned a tensor of shape \(1, 35\)"),
        (lambda p, h, t: 0.0, "returned a float"),
        (lambda p, h, t: None, "returned a NoneType"),
        (lambda p, h, t: p.detach(), "without a gradient"),
        (lambda p, h, t: p * math.nan, r"lambda.* returned a loss that is NaN at token 0 of the 35 that it got"),
        (lambda p, h, t: torch.where(t.advantages > 0, (p - 1).log(), p), "returned a loss that is NaN at token"),
        (lambda p, h, t: (p * 0).sqrt() - p, r"lambda.* has a derivative that is NaN at token 0 of the 35 that it got"),
        (lambda p, h, t: p * 1j, "returned losses of torch.complex64, expected a floating-point dtype"),
        (lambda p, h, t: p.long(), "returned losses of torch.int64, expected a floating-point dtype"),
        (lambda p, h, t: -p * t.advantages.mul_(2), r"changed tokens\.advantages in place, expected a function that"),
        (lambda p, h, t: -p * t.importance_weights.clamp_(max=1), r"changed tokens\.importance_weights in place"),
        (lambda p, h, t: -p.mul_(2), "changed logprobs in place"),
    ],
)
def test_what_it_returns_is_checked(function: Any, message: str) -> None:
    inputs = with_extras("plain")
    inputs["logprobs"].requires_grad_()
    with pytest.raises(ValueError, match=message):
        policy_loss(**inputs, objective=Objective.token_local(function))


@checks_only
def test_nan_derivatives_are_refused_from_logits() -> None:
    logits, ids = testing.random_logits(5, 7, 33).requires_grad_(), testing.random_ids(5, 7, vocab=33)
    for function in (lambda p, h, t: (p * 0).sqrt() - p * t.advantages, lambda p, h, t: p + (h * 0).sqrt()):
        with pytest.raises(ValueError, match="has a derivative that is NaN at token 0 of the 35"):
            grpo_loss(logits, ids, torch.ones(5), objective=Objective.token_local(function))


@checks_only
def test_a_derivative_of_a_token_that_does_not_count_may_be_nan() -> None:
    inputs = with_extras("holes") | {"importance_weights": torch.ones(5, 7)}
    inputs["importance_weights"][0] = 0
    inputs["logprobs"][0] = -4.0

    def steep(logprobs: Tensor, entropies: Tensor, tokens: PolicyBatch) -> Tensor:
        return (logprobs + 4).abs().sqrt() + logprobs.abs().sqrt()  # NaN at -4, and at the 0 behind the mask

    result, grad, _ = evaluate(inputs, Objective.token_local(steep))
    assert grad.isfinite().all() and grad.any() and result.metrics["nonfinite_tokens"] == 0


def test_infinite_losses_and_derivatives_are_counted() -> None:
    inputs = with_extras("holes")
    counted = int(inputs["mask"].sum())
    for function in (lambda p, h, t: p * math.inf, lambda p, h, t: (p - p.detach()).sqrt()):
        result, grad, _ = evaluate(inputs, Objective.token_local(function))
        assert result.metrics["nonfinite_tokens"] == counted and not grad[inputs["mask"]].isfinite().any()
        callable_, _, _ = evaluate(inputs, Objective(surrogate=lambda p, batch, f=function: f(p, None, batch)))
        assert callable_.metrics["nonfinite_tokens"] == counted
    assert (evaluate(inputs, Objective.token_local(clipped))[0].metrics["nonfinite_tokens"]) == 0


@checks_only
def test_nan_of_the_model_is_no_error_of_the_function() -> None:
    inputs = with_extras("plain")
    inputs["logprobs"][2, 3] = math.nan
    result = policy_loss(**inputs, objective=Objective.token_local(clipped))
    assert result.loss.isnan() and result.metrics["nonfinite_tokens"] == 1


@host_code
def test_the_constructor_names_what_is_wrong() -> None:
    with pytest.raises(TypeError, match="function is 3, expected a callable"):
        Objective.token_local(3)
    with pytest.raises(ValueError, match=r"Objective\.token_local: unknown field 'clip_hihg'"):
        Objective.token_local(clipped, clip_hihg=0.3)


@host_code
@pytest.mark.parametrize("field", [
    {"surrogate": "clip"}, {"ratio": "sequence"}, {"clip_low": 0.1}, {"clip_high": 0.3}, {"ratio_cap": 2.0},
    {"tau_pos": 1.0}, {"tau_neg": 2.0}, {"power_pos": 1.0}, {"power_neg": 1.0},
])
def test_the_constructor_refuses_fields_without_effect(field: dict[str, Any]) -> None:
    ((name, value),) = field.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}, which nothing would use.* expected only kl, kl_coef"):
        Objective.token_local(clipped, **field)


@host_code
@pytest.mark.parametrize(
    ("function", "depends"),
    [
        (lambda p, h, t: p - p.mean(), "loss of token 0 depends on logprobs of token 1"),
        (lambda p, h, t: p.cumsum(0), "loss of token 1 depends on logprobs of token 0"),
        (lambda p, h, t: p * (h - h.detach().mean()), "on entropies of token 0"),
        (lambda p, h, t: p * (t.advantages - t.advantages.mean()), "loss of token 1 depends on advantages of token 0"),
        (lambda p, h, t: p * t.importance_weights.sum(), "on importance_weights of token 0"),
        (lambda p, h, t: (p - t.old_logprobs.flip(0)), "on old_logprobs of token 0"),
        (lambda p, h, t: -p * t.advantages / len(p), "token 0 is another one in a call with 1 of the 6 tokens"),
        (lambda p, h, t: (p - p.detach()) / len(p), "token 0 is another one in a call with 1 of the 6 tokens"),
        (lambda p, h, t: -p * torch.arange(len(p)), "token 1 is another one in a call with 1 of the 6 tokens"),
        (lambda p, h, t: -p if len(p) == 5 else p, "token 0 is another one in a call with 5 of the 6 tokens"),
        (lambda p, h, t: -p * t.advantages.roll(-1), "loss of token 5 depends on advantages of token 0"),
        (lambda p, h, t: -p * torch.cat([t.advantages[1:], t.advantages[-1:]]), "on advantages of token 1"),
        (lambda p, h, t: -p * t.advantages.max(), "on advantages of token"),
        (lambda p, h, t: -p * (t.advantages > 0).double().mean(), "on advantages of token 0"),
        (lambda p, h, t: -p * t.importance_weights[-1], "loss of token 0 depends on importance_weights of token 5"),
        (lambda p, h, t: -p * t.ref_logprobs.min(), "on ref_logprobs of token"),
        (lambda p, h, t: (p - p.detach()) * t.advantages.sum(), "on advantages of token 0"),
    ],
)
def test_functions_that_mix_tokens_are_found(function: Any, depends: str) -> None:
    with pytest.raises(ValueError, match=f"function mixes tokens.*{depends}"):
        testing.check_token_local(function)


@host_code
def test_functions_of_single_tokens_pass_the_check() -> None:
    for function in (clipped, uncertain, lambda p, h, t: -p * (h.detach() > 0.5)):
        testing.check_token_local(function)
    calls: list[int] = []
    testing.check_token_local(lambda p, h, t: calls.append(1) or clipped(p, h, t), 4)
    assert len(calls) == 13 * 4 + 3  # as it says
    with pytest.raises(ValueError, match="another loss or gradient for the same tokens when it was called again"):
        testing.check_token_local(lambda p, h, t: p * torch.rand(()))
    with pytest.raises(ValueError, match="tokens is 1, expected an integer >= 2"):
        testing.check_token_local(clipped, 1)
    with pytest.raises(ValueError, match=r"function returned a tensor of shape \(\), expected one loss for each"):
        testing.check_token_local(lambda p, h, t: p.sum())

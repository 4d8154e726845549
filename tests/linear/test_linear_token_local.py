"""Functions of single tokens as objectives from hidden states: one pass, compaction, layouts, shards of the head."""

import pytest
import torch
from backends import checks_only, compiles, slow_interpreted
from linear_policy_cases import EVERYTHING, make, packed, run
from policy_cases import AGGREGATES
from test_linear_compaction import counting
from torch import Tensor

from r1kernels import Objective, PolicyBatch, backend, linear_grpo_loss, testing
from r1kernels.ops.linear import passes


def clipped(logprobs: Tensor, entropies: Tensor, tokens: PolicyBatch) -> Tensor:
    ratio = (logprobs - (logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs)).exp()
    return -torch.min(ratio * tokens.advantages, ratio.clamp(0.8, 1.2) * tokens.advantages)


def uncertain(logprobs: Tensor, entropies: Tensor, tokens: PolicyBatch) -> Tensor:
    return -tokens.advantages * logprobs * entropies


@slow_interpreted
@pytest.mark.parametrize("head", ["plain", "everything"])
@pytest.mark.parametrize("extra", ["plain", "holes", "token_advantages", "token_weights", "normalizer", "on_policy"])
@pytest.mark.parametrize("more", [{}, EVERYTHING, EVERYTHING | {"kl_ratio": True, "kl": "k1"}])
def test_it_is_the_preset_that_it_spells(extra: str, more: dict, head: str, implementation: str) -> None:
    inputs = make(head, extra)
    for aggregate in AGGREGATES.values():
        given, expected = run(inputs, objective=Objective.token_local(clipped, **more, **aggregate), chunk_bytes=2048)
        preset, grads = run(inputs, objective=Objective(**more, **aggregate), measure_all=True)
        torch.testing.assert_close(given.loss, preset.loss, rtol=1e-5, atol=1e-6)
        for key, grad in grads.items():
            torch.testing.assert_close(expected[key], grad, rtol=1e-4, atol=1e-6)
        assert set(preset.metrics) - set(given.metrics) == {
            "clip_fraction", "clip_low_fraction", "clip_high_fraction", "ratio_cap_fraction"}
        for name, value in given.metrics.items():
            torch.testing.assert_close(value, preset.metrics[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_entropy_has_a_gradient(dtype: torch.dtype) -> None:
    """Against the same function of the whole batch in float64; float16 takes two phases."""
    inputs = packed(make("bias", "plain"), [3, 0, 7, 6, 1])
    inputs |= {name: value.to(dtype) for name, value in inputs.items() if name in ("hidden", "weight", "bias")}
    exact = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    with backend("reference"):
        _, expected = run(exact, objective=Objective(
            surrogate=lambda logprobs, batch: uncertain(logprobs, batch.entropy, batch), aggregate="token_mean"))
    with backend("reference" if dtype == torch.float64 else testing.KERNELS):
        _, grads = run(inputs, objective=Objective.token_local(uncertain))
    for key, grad in grads.items():
        scale = expected[key].abs().max()
        assert (grad.double() - expected[key]).abs().max() <= max(2 * torch.finfo(dtype).eps, 1e-10) * 4 * scale


@slow_interpreted
def test_one_walk_and_only_rows_with_a_gradient(monkeypatch: pytest.MonkeyPatch, implementation: str) -> None:
    inputs = make("plain", "holes")
    calls = []
    statistics = passes.run_statistics
    monkeypatch.setattr(passes, "run_statistics", lambda *args, **more: calls.append(1) or statistics(*args, **more))
    rows = counting(monkeypatch)
    result, grads = run(inputs, objective=Objective.token_local(clipped))
    active, counted = int(grads["hidden"].any(-1).sum()), int(inputs["mask"].sum())
    assert rows == {"forward": counted, "backward": active} and 0 < active < counted and not calls
    torch.testing.assert_close(result.metrics["active_fraction"], torch.tensor(active / counted))
    rows.update(forward=0, backward=0)
    run(inputs, objective=Objective.token_local(clipped, kl_coef=0.1))
    assert rows == {"forward": counted, "backward": counted}


@slow_interpreted
def test_a_weight_of_zero_saves_the_backward_products_of_a_token(
    monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    """As the documents say of filters: 1 + 2 k units, while a preset computes nothing of such a token."""
    inputs = make("plain", "token_weights")
    inputs["importance_weights"][:, ::2] = 0
    inputs["advantages"] = torch.ones_like(inputs["advantages"])
    kept, rows = int((inputs["importance_weights"] != 0).sum()), counting(monkeypatch)
    given, _ = run(inputs, objective=Objective.token_local(lambda p, h, t: p))
    assert rows == {"forward": 35, "backward": kept} and given.metrics["measured_tokens"] == 35 > kept
    rows.update(forward=0, backward=0)
    preset, _ = run(inputs, objective=Objective(surrogate="reinforce"))
    assert rows == {"forward": kept, "backward": kept} and preset.metrics["measured_tokens"] == kept


@slow_interpreted
def test_without_a_gradient_the_loss_is_the_same(implementation: str) -> None:
    inputs, objective = make("plain", "holes"), Objective.token_local(clipped)
    with torch.no_grad():
        value = linear_grpo_loss(**inputs, objective=objective).loss
    torch.testing.assert_close(value, run(inputs, objective=objective)[0].loss, rtol=1e-6, atol=1e-7)


@slow_interpreted
def test_its_errors_name_it() -> None:
    inputs = make()
    with pytest.raises(ValueError, match=r"lambda.*returned a tensor of shape \(\)"):
        run(inputs, objective=Objective.token_local(lambda p, h, t: p.sum()))
    with pytest.raises(ValueError, match=r"has a derivative that is NaN at token \d+ of the"):
        run(inputs, objective=Objective.token_local(lambda p, h, t: (p * 0).sqrt() + p))
    with pytest.raises(ValueError, match="is NaN at token 0"):
        run(inputs, objective=Objective.token_local(lambda p, h, t: p.log()))


@checks_only
@pytest.mark.parametrize("route", ["one pass", "float16", "support"])
def test_nan_derivatives_are_refused_on_every_route(route: str) -> None:
    inputs = make()
    if route == "float16":
        inputs |= {name: inputs[name].half() for name in ("hidden", "weight")}
    elif route == "support":
        ids = inputs["token_ids"]
        inputs["support"] = ids.flatten(), torch.arange(ids.numel() + 1)
    objective = Objective.token_local(lambda p, h, t: (p * 0).sqrt() * t.advantages - p * t.advantages)
    with pytest.raises(ValueError, match=r"has a derivative that is NaN at token \d+ of the"):
        run(inputs, objective=objective)


@checks_only
def test_a_function_that_writes_to_its_inputs_is_refused_and_changes_nothing() -> None:
    inputs = make("plain", "token_advantages")
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
    for field in ("advantages", "old_logprobs", "importance_weights"):
        objective = Objective.token_local(lambda p, h, t, field=field: p * getattr(t, field).mul_(2))
        with pytest.raises(ValueError, match=f"changed tokens\\.{field} in place"):
            run(inputs, objective=objective)
    assert all(torch.equal(inputs[name], value) for name, value in before.items())


@compiles
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
def test_it_compiles_in_two_phases() -> None:
    inputs, objective = make(), Objective.token_local(clipped)
    hidden = inputs.pop("hidden").requires_grad_()
    loss = testing.compiled(lambda hidden: linear_grpo_loss(hidden, **inputs, objective=objective).loss)
    (grad,) = torch.autograd.grad(loss(hidden), hidden)
    (expected,) = torch.autograd.grad(linear_grpo_loss(hidden, **inputs, objective=objective).loss, hidden)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)

"""The loss straight from logits: the composition against the oracles, masks, layouts, temperature, compile."""

from typing import Any

import pytest
import torch
from backends import checks_only, compiles, reference_only, shapes_only, slow_interpreted
from policy_cases import OBJECTIVES
from torch import Tensor
from torch._subclasses import FakeTensorMode

from r1kernels import (
    Objective,
    backend,
    grpo_loss,
    objectives,
    policy_loss,
    testing,
    token_logprobs_and_entropy,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERYTHING = {"kl_coef": 0.1, "entropy_coef": 0.01}


def batch(dtype: torch.dtype = torch.float32, vocab: int = 300, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments of `grpo_loss` for 5 sequences of 7 tokens, old and reference log-probs near the policy's."""
    logits, ids = testing.random_logits(5, 7, vocab, dtype=dtype, seed=seed), testing.random_ids(5, 7, vocab=vocab)
    logprobs = testing.token_stats(logits, ids).logprobs.float()
    noise = torch.randn(2, 5, 7, generator=testing.generator(seed + 1)) / 2
    return {
        "logits": logits,
        "token_ids": ids,
        "advantages": testing.random_policy()["advantages"],
        "old_logprobs": logprobs + noise[0],
        "ref_logprobs": logprobs + noise[1],
    }


def evaluate(inputs: dict[str, Any], **keywords: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    logits = inputs["logits"].detach().requires_grad_()
    loss, metrics = grpo_loss(**(inputs | {"logits": logits}), **keywords)
    (grad,) = torch.autograd.grad(loss, logits)
    return loss.detach(), grad, metrics


# ---- 1. gradcheck -----------------------------------------------------------------------------------------


@reference_only
@pytest.mark.parametrize("name", ["grpo", "gspo", "sapo"])
def test_reference_gradcheck(name: str) -> None:
    inputs = {k: v[:2].double() if v.is_floating_point() else v[:2] for k, v in batch(vocab=6).items()}
    inputs["advantages"] = inputs["advantages"].abs()
    inputs["mask"] = testing.random_ids(2, 7, vocab=3) > 0
    objective = Objective(**OBJECTIVES[name], **EVERYTHING)

    def loss(logits: Tensor) -> Tensor:
        return grpo_loss(**(inputs | {"logits": logits}), objective=objective, temperature=0.8).loss

    with backend("reference"):
        assert torch.autograd.gradcheck(loss, inputs["logits"].requires_grad_())


# ---- 2. against the oracles -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients(dtype: torch.dtype, name: str, temperature: float) -> None:
    """The two oracles composed: dL/dlogits of the exact dL/dlogprob and dL/dentropy at the fp32 log-probs."""
    inputs = batch(dtype)
    row = (inputs["logits"], inputs["token_ids"])
    objective = Objective(**OBJECTIVES[name], **EVERYTHING)
    with backend(testing.KERNELS):
        loss, grad, metrics = evaluate(inputs, objective=objective, temperature=temperature)
        logprobs, entropy = token_logprobs_and_entropy(*row, temperature=temperature)

    rest = {k: v for k, v in inputs.items() if k not in ("logits", "token_ids")}
    expected = testing.policy_loss(objective, logprobs=logprobs, entropy=entropy, **rest)
    testing.assert_within(loss, expected.loss)
    for metric, value in metrics.items():
        testing.assert_within(value, expected.metrics[metric])
    g, eta = expected.grad_logprobs, expected.grad_entropy.value
    exact = testing.token_stats_gradient(*row, g.value, eta, temperature)
    per_g = testing.token_stats_gradient(*row, torch.ones(5, 7), 0.0, temperature).value.abs()
    testing.assert_within(grad, testing.Expected(exact.value, exact.terms + g.terms.unsqueeze(-1) * per_g))


@pytest.mark.not_on("cuda", reason="the fused step runs here, which rounds in another order than composed operators")
@pytest.mark.parametrize("name", OBJECTIVES)
@slow_interpreted
def test_is_the_composition_bit_for_bit(name: str, implementation: str) -> None:
    inputs = batch() | {"mask": testing.random_ids(5, 7, vocab=3) > 0}
    objective = Objective(**OBJECTIVES[name], **EVERYTHING)
    loss, grad, _ = evaluate(inputs, objective=objective)
    logits = inputs.pop("logits").requires_grad_()
    logprobs, entropy = token_logprobs_and_entropy(logits, inputs.pop("token_ids"))
    composed = policy_loss(logprobs, entropy=entropy, **inputs, objective=objective).loss
    composed.backward()
    assert torch.equal(loss, composed.detach())
    assert torch.equal(grad, logits.grad)


def test_the_users_twelve_lines(implementation: str) -> None:
    """What a trainer writes by hand, in float64, is the same loss and gradient."""
    inputs = batch()
    mask = testing.length_mask(testing.random_lengths(5, 7), 7)
    logits = inputs["logits"].double().requires_grad_()
    logprobs = logits.log_softmax(-1).gather(-1, inputs["token_ids"].unsqueeze(-1)).squeeze(-1)
    ratio = (logprobs - inputs["old_logprobs"]).exp()
    advantages = inputs["advantages"].unsqueeze(1)
    losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    delta = inputs["ref_logprobs"] - logprobs
    losses = losses + 0.04 * (delta.exp() - delta - 1)
    by_hand = ((losses * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
    by_hand.backward()
    loss, grad, _ = evaluate(inputs, mask=mask, objective=objectives.grpo(kl_coef=0.04))
    torch.testing.assert_close(loss.double(), by_hand.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), logits.grad, rtol=1e-4, atol=1e-7)


# ---- layouts, masks, edges ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
@slow_interpreted
def test_packed_equals_padded(name: str) -> None:
    lengths = testing.random_lengths(5, 7)
    mask = testing.length_mask(lengths, 7)
    inputs = batch()
    flat = {k: v[mask] if v.shape[:2] == mask.shape else v for k, v in inputs.items()}
    flat["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    objective = Objective(**OBJECTIVES[name], **EVERYTHING)
    (loss, grad, _), (packed_loss, packed_grad, _) = (
        evaluate(inputs, mask=mask, objective=objective),
        evaluate(flat, objective=objective),
    )
    assert torch.equal(loss, packed_loss) and torch.equal(grad[mask], packed_grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OBJECTIVES)
@slow_interpreted
def test_nothing_behind_the_mask_matters(dtype: torch.dtype, name: str, implementation: str) -> None:
    inputs = batch(dtype)
    mask = testing.random_ids(5, 7, vocab=2) == 1
    poisoned = {k: testing.poisoned(v, mask) if v.shape[:2] == mask.shape else v for k, v in inputs.items()}
    objective = Objective(**OBJECTIVES[name], **EVERYTHING)
    (loss, grad, _), (poisoned_loss, poisoned_grad, _) = (
        evaluate(values, mask=mask, objective=objective) for values in (inputs, poisoned)
    )
    assert torch.equal(loss, poisoned_loss) and torch.equal(grad, poisoned_grad)
    assert not poisoned_grad[~mask].any()


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_an_upstream_gradient_of_nan_or_inf_does_not_bring_masked_tokens_to_life(
    factor: float, implementation: str
) -> None:
    """0 * NaN: a loss scaler that overflowed must not make the kernels read rows, or ids, behind the mask."""
    inputs = batch()
    inputs["token_ids"][0, 2] = 2**40
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[0, 2] = False
    logits = inputs["logits"].requires_grad_()
    loss, _ = grpo_loss(**inputs, mask=mask, objective=objectives.grpo(**EVERYTHING))
    (loss * factor).backward()
    assert logits.grad[0, 2].eq(0).all()
    assert not logits.grad[0, 1].isfinite().any()


def test_model_logits_are_used_without_their_last_position(implementation: str) -> None:
    inputs = batch()
    longer = torch.cat([inputs["logits"], torch.full_like(inputs["logits"][:, :1], float("nan"))], 1).requires_grad_()
    grpo_loss(**(inputs | {"logits": longer[:, :-1]})).loss.backward()
    loss, grad, _ = evaluate(inputs)
    assert torch.equal(longer.grad[:, :-1], grad) and not longer.grad[:, -1].any()

    # The cheaper way: whole logits, shifted ids, the last column masked.
    def padded(value: Tensor) -> Tensor:
        return torch.cat([value, torch.zeros_like(value[:, :1])], 1) if value.dim() == 2 else value

    whole = {name: padded(value) for name, value in inputs.items()} | {"logits": longer}
    masked = padded(torch.ones(5, 7, dtype=torch.bool))
    whole_loss, whole_grad, _ = evaluate(whole, mask=masked)
    torch.testing.assert_close(whole_loss, loss)
    torch.testing.assert_close(whole_grad, longer.grad)


def test_on_policy_needs_no_old_logprobs(implementation: str) -> None:
    inputs = batch()
    del inputs["old_logprobs"]
    loss, _, metrics = evaluate(inputs)
    assert metrics["ratio_mean"] == metrics["ratio_max"] == 1
    torch.testing.assert_close(loss, -inputs["advantages"].mean())


@pytest.mark.parametrize("shape", [(0, 7), (5, 0)])
def test_no_tokens(shape: tuple[int, int], implementation: str) -> None:
    logits = torch.empty(*shape, 11, requires_grad=True)
    loss = grpo_loss(logits, torch.empty(shape, dtype=torch.int64), torch.ones(shape[0])).loss
    loss.backward()
    assert loss == 0 and logits.grad.shape == logits.shape


@slow_interpreted
def test_a_custom_objective_from_logits(implementation: str) -> None:
    inputs = batch()
    custom = evaluate(inputs, objective=lambda logprobs, batch: -batch.advantages * logprobs)
    preset = evaluate(inputs, objective=objectives.reinforce())
    for a, b in zip(custom[:2], preset[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_only_metrics_of_known_quantities() -> None:
    inputs = batch()
    del inputs["ref_logprobs"]
    metrics = grpo_loss(**inputs).metrics
    assert "kl" not in metrics and "entropy" in metrics


# ---- compile and fakes --------------------------------------------------------------------------------------


@pytest.mark.few(1)
@compiles
@pytest.mark.not_on("cuda", reason="the fused step runs here, which rounds in another order than composed operators")
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor imports torch's own old modules
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph(compiler: str) -> None:
    inputs = batch() | {"mask": testing.random_ids(5, 7, vocab=3) > 0}
    source = inputs.pop("logits")
    objective = objectives.dapo(**EVERYTHING)

    def run(logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return grpo_loss(logits, **inputs, objective=objective, temperature=0.9)

    results = []
    with backend(testing.KERNELS):
        for function in (run, testing.compiled(run, compiler)):
            logits = source.clone().requires_grad_()
            loss, metrics = function(logits)
            loss.backward()
            results.append((loss.detach(), logits.grad, *metrics.values()))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.few(1)
@compiles
@pytest.mark.not_on("cuda", reason="the fused step runs here, which rounds in another order than composed operators")
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.slow(reason="compiles again and again")
def test_compile_with_lengths_and_temperatures_that_change(packed: bool, implementation: str) -> None:
    def loss_of(temperature: float, **inputs: Tensor) -> Tensor:
        return grpo_loss(**inputs, temperature=temperature).loss

    run = testing.compiled(loss_of, dynamic=True)
    for sequences, length, temperature in ((2, 3, 1.0), (4, 5, 0.7), (3, 7, 0.6)):
        inputs = {k: v[:sequences, :length] if v.dim() > 1 else v[:sequences] for k, v in batch().items()}
        if packed:
            inputs = {k: v.flatten(0, 1) if v.dim() > 1 else v for k, v in inputs.items()}
            inputs["cu_seqlens"] = torch.arange(sequences + 1) * length
        inputs["logits"] = inputs["logits"].clone().requires_grad_()
        losses = run(temperature, **inputs), loss_of(temperature, **inputs)
        grads = [torch.autograd.grad(loss, inputs["logits"])[0] for loss in losses]
        assert torch.equal(*losses) and torch.equal(*grads)


@shapes_only
@pytest.mark.parametrize("device", ["cpu", "meta", "cuda"])
@pytest.mark.parametrize("packed", [False, True])
def test_fakes(device: str, packed: bool) -> None:
    lead = (24,) if packed else (4, 6)
    with FakeTensorMode():
        ids = torch.zeros(lead, dtype=torch.int64, device=device)
        extra = {"cu_seqlens": torch.zeros(5, dtype=torch.int64, device=device)} if packed else {}
        result = grpo_loss(
            torch.empty(*lead, 11, dtype=torch.bfloat16, device=device), ids, torch.empty(4, device=device),
            mask=ids, **extra,
        )
    for value in (result.loss, *result.metrics.values()):
        assert (value.shape, value.dtype, value.device.type) == ((), torch.float32, device)


# ---- bad input ----------------------------------------------------------------------------------------------


@checks_only
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"token_ids": torch.full((5, 7), 300)}, ValueError, r"token_ids\[0\] is 300, expected an id in \[0, 300\)"),
        ({"token_ids": torch.zeros(5, 6).long()}, ValueError, "has shape"),
        ({"token_ids": [[0]]}, TypeError, "token_ids is a list, expected a torch.Tensor"),
        ({"logits": None}, TypeError, "logits is a NoneType, expected a torch.Tensor"),
        ({"logits": torch.zeros(5, 7)}, ValueError, r"token_ids has shape \(5, 7\), expected \(5,\)"),
        ({"temperature": -1}, ValueError, "temperature is -1, expected a finite number > 0"),
        ({"mask": torch.ones(5)}, ValueError, r"mask has shape \(5,\), expected \(5, 7\)"),
        ({"advantages": torch.ones(7)}, ValueError, r"advantages has shape \(7,\), expected \(5,\)"),
        ({"objective": objectives.r1(), "ref_logprobs": None}, ValueError, "ref_logprobs is None, expected a tensor"),
        ({"cu_seqlens": torch.tensor([0, 35])}, ValueError, r"cu_seqlens was given with token_ids of shape \(5, 7\)"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str, implementation: str) -> None:
    with pytest.raises(error, match=message):
        grpo_loss(**(batch() | changes))

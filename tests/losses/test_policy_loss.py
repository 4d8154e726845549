"""The policy loss against the float64 oracle, for every objective, KL estimator, aggregate and layout."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from backends import compiles, reference_only, registration_only, shapes_only
from policy_cases import AGGREGATES, EXTRAS, KLS, OBJECTIVES, check, evaluate, objective_of, with_extras
from torch import Tensor
from torch._subclasses import FakeTensorMode

from r1kernels import Objective, backend, objectives, policy_loss, testing
from r1kernels.ops.policy_loss import METRICS

# ---- 1. gradcheck -----------------------------------------------------------------------------------------


@reference_only
@pytest.mark.parametrize("name", OBJECTIVES)
def test_reference_gradcheck(name: str) -> None:
    if name == "gspo_token":
        pytest.skip("its value is a constant: test_gspo_token_has_the_gradient_of_gspo")
    objective = Objective(**OBJECTIVES[name], kl_coef=0.1, entropy_coef=0.2)
    # A ratio that is a constant by definition, which finite differences cannot know, is 1.
    constant = objective.surrogate in ("cispo", "dppo_tv", "dppo_kl", "vespo")
    inputs = {k: v.double() for k, v in testing.random_policy().items()}
    inputs["mask"] = testing.random_ids(5, 7, vocab=4) > 0
    if constant:
        del inputs["old_logprobs"]
    else:
        objective = dataclasses.replace(objective, kl_ratio=name not in ("grpo", "gspo", "gmpo"))
    logprobs, entropy = inputs.pop("logprobs"), inputs.pop("entropy")
    if constant or objective.ratio == "token":
        inputs["advantages"] = inputs["advantages"].abs()

    def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
        return policy_loss(logprobs, entropy=entropy, **inputs, objective=objective).loss

    with backend("reference"):
        assert torch.autograd.gradcheck(loss, (logprobs.requires_grad_(), entropy.requires_grad_()))


def test_gspo_token_has_the_gradient_of_gspo(implementation: str) -> None:
    """With one advantage and weight per sequence; with those of tokens it has that of each token alone."""
    inputs = with_extras("holes")
    wide = {"clip_low": 0.1, "clip_high": 0.1}
    sequence, token = (evaluate(inputs, make(**wide)) for make in (objectives.gspo, objectives.gspo_token))
    assert sequence[1].any()
    torch.testing.assert_close(token[0].loss, sequence[0].loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(token[1], sequence[1], rtol=1e-6, atol=0)
    one = inputs["advantages"][:, None].repeat(1, 7)
    one[:, 1:] = 0
    grad = evaluate(inputs | {"advantages": one}, objectives.gspo_token(**wide))[1]
    assert grad[:, 0].any() and not grad[:, 1:].any()


@pytest.mark.parametrize("make", [objectives.grpo, objectives.gspo, objectives.gspo_token, objectives.cispo])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_kl_times_ratio_equals_autograd(make: Any, kl: str, implementation: str) -> None:
    """r k with the gradient through both, as TRL writes it, in float64."""
    inputs = with_extras("holes") | {"advantages": torch.zeros(5)}
    logprobs = inputs["logprobs"].double().requires_grad_()
    mask, old, ref = inputs["mask"], inputs["old_logprobs"].double(), inputs["ref_logprobs"].double()
    objective = make(kl=kl, kl_coef=0.5, kl_ratio=True, aggregate="token_mean")
    log_ratio = logprobs - old
    if objective.ratio != "token":
        log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1).clamp(min=1))[:, None].expand_as(logprobs)
    if objective.ratio == "sequence_token":
        log_ratio = log_ratio.detach() + logprobs - logprobs.detach()
    d = ref - logprobs
    k = {"k1": -d, "k2": d * d / 2, "k3": d.exp() - d - 1}[kl]
    expected = 0.5 * (log_ratio.exp() * k * mask).sum() / mask.sum()
    (grad,) = torch.autograd.grad(expected, logprobs)
    result, found, _ = evaluate(inputs, objective)
    torch.testing.assert_close(result.loss, expected.float(), rtol=2e-6, atol=0)
    torch.testing.assert_close(found, grad.float(), rtol=1e-4, atol=1e-8)


# ---- 2. against the float64 oracle ------------------------------------------------------------------------


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_oracle_padded(name: str, kl: str, aggregate: str, implementation: str) -> None:
    objective = objective_of(name, kl, aggregate)
    for seed, extra in enumerate(EXTRAS):
        check(with_extras(extra, seed), objective)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_oracle_packed(name: str, kl: str, aggregate: str, implementation: str) -> None:
    """The second sequence is empty: it adds nothing and still counts as one of S."""
    objective = objective_of(name, kl, aggregate)
    for seed, extra in enumerate(EXTRAS):
        check(testing.packed(with_extras(extra, seed), testing.random_lengths(5, 7, seed)), objective)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_equals_padded_bit_for_bit(name: str, implementation: str) -> None:
    objective = Objective(**OBJECTIVES[name], kl_coef=0.1, entropy_coef=0.1)
    lengths = testing.random_lengths(5, 7)
    mask = testing.length_mask(lengths, 7)
    inputs = with_extras("token_weights")
    (padded, padded_grad, _), (packed, packed_grad, _) = (
        evaluate(inputs | {"mask": mask}, objective),
        evaluate(testing.packed(inputs, lengths), objective),
    )
    if implementation == "cpu":
        assert torch.equal(padded.loss, packed.loss)
        assert torch.equal(padded_grad[mask], packed_grad)
    torch.testing.assert_close(padded_grad[mask], packed_grad, rtol=1e-6, atol=0)
    assert not padded_grad[~mask].any()


PRESETS = [
    "grpo", "r1", "bnpo", "dr_grpo", "dapo", "gspo", "gspo_token", "luspo", "cispo", "sapo", "dppo", "ipo", "vespo",
    "reinforce",
]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_match_the_oracle(preset: str, implementation: str) -> None:
    make = getattr(objectives, preset)
    check(with_extras("holes"), make(max_length=11) if preset == "dr_grpo" else make())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(dtype: torch.dtype, implementation: str) -> None:
    inputs = {k: v.to(dtype) for k, v in testing.random_policy().items()}
    objective = Objective(kl_coef=0.1, entropy_coef=0.1)
    result, grad, _ = evaluate(inputs, objective)
    expected = testing.policy_loss(objective, **inputs)
    assert result.loss.dtype == torch.float32 and grad.dtype == dtype
    testing.assert_within(result.loss, expected.loss)
    testing.assert_within(grad, expected.grad_logprobs)


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e-2])
def test_a_policy_near_its_reference_keeps_the_kl_precise(scale: float, implementation: str) -> None:
    """k3 = e^d - d - 1 as written is 0, or negative, in fp32 below |d| = 3e-4."""
    inputs = testing.random_policy()
    inputs["ref_logprobs"] = inputs["logprobs"] + scale * torch.randn(5, 7, generator=testing.generator(3))
    inputs["advantages"] *= 0
    check(inputs, Objective(kl_coef=1.0))


def test_three_leading_dimensions_are_sequences_of_the_last(implementation: str) -> None:
    flat = with_extras("holes")
    objective = Objective(ratio="sequence", clip_low=0.5, clip_high=0.5)
    flat = {k: torch.cat([v, v[:1]]) for k, v in flat.items()}
    cube = {k: v.reshape(2, 3, *v.shape[1:]) for k, v in flat.items()}
    (a, grad_a, _), (b, grad_b, _) = evaluate(flat, objective), evaluate(cube, objective)
    assert torch.equal(a.loss, b.loss) and torch.equal(grad_a.flatten(), grad_b.flatten())


def test_packed_tokens_need_no_sequences_where_the_objective_has_none(implementation: str) -> None:
    inputs = with_extras("token_advantages")
    inputs = {k: v.flatten() for k, v in inputs.items() if k != "importance_weights"}
    check(inputs, objectives.dapo())


@pytest.mark.parametrize("lengths", [[2, 0, 1], [1, 1, 1], [0, 3, 0]])
def test_as_many_packed_sequences_as_tokens(lengths: list[int], implementation: str) -> None:
    """Three values for three sequences of three tokens in all are one per sequence."""
    inputs = testing.packed(testing.random_policy(3, 3), lengths)
    assert inputs["advantages"].shape == inputs["logprobs"].shape
    result, grad, _ = evaluate(inputs, objectives.grpo())
    owner = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    repeated = inputs | {k: inputs[k][owner] for k in ("advantages", "importance_weights")}
    repeated["cu_seqlens"] = torch.cat([inputs["cu_seqlens"], torch.tensor([3])])  # a fourth, empty one ends the doubt
    expected, expected_grad, _ = evaluate(repeated | {"normalizer": 3}, objectives.grpo())
    assert torch.equal(result.loss, expected.loss) and torch.equal(grad, expected_grad)


def test_the_gradient_of_the_loss_scales_with_its_own(implementation: str) -> None:
    inputs = testing.random_policy()
    logprobs = inputs.pop("logprobs").requires_grad_()
    loss = policy_loss(logprobs, **inputs).loss
    one, three = (torch.autograd.grad(k * loss, logprobs, retain_graph=True)[0] for k in (1, 3))
    torch.testing.assert_close(three, 3 * one, rtol=1e-6, atol=0)


def test_constants_receive_no_gradient(implementation: str) -> None:
    inputs = {k: v.requires_grad_() for k, v in testing.random_policy().items()}
    policy_loss(**inputs, objective=Objective(kl_coef=0.1)).loss.backward()
    assert inputs["logprobs"].grad is not None
    assert all(v.grad is None for k, v in inputs.items() if k not in ("logprobs", "entropy"))


# ---- 3. opcheck -------------------------------------------------------------------------------------------


@registration_only
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("layout", ["padded", "packed", "bare"])
def test_opcheck(layout: str, entropy_coef: float) -> None:
    inputs: dict[str, Any] = with_extras("plain")
    if layout == "packed":
        inputs = testing.packed(inputs | {"normalizer": torch.tensor(3.0)}, testing.random_lengths(5, 7))
    if layout == "bare":
        inputs = {k: inputs[k] for k in ("logprobs", "advantages")}
    names = (
        *("logprobs", "advantages", "old_logprobs", "ref_logprobs", "entropy"),
        *("mask", "cu_seqlens", "importance_weights", "normalizer"),
    )
    entropy_coef = entropy_coef if layout != "bare" else 0.0
    scalars = (0, 0, 3, 0, 0.2, 0.2, math.inf, 1.0, 1.05, 0.0, entropy_coef, 1.0)
    torch.library.opcheck(torch.ops.r1kernels.policy_loss, (*(inputs.get(name) for name in names), *scalars))


# ---- 4. compile and fakes ---------------------------------------------------------------------------------


@pytest.mark.few(4)
@compiles
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "sapo"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_compile_fullgraph(name: str, layout: str, implementation: str) -> None:
    inputs = with_extras("holes")
    if layout == "packed":
        inputs = testing.packed(inputs, testing.random_lengths(5, 7))
    objective = Objective(**OBJECTIVES[name], kl_coef=0.1, entropy_coef=0.1)
    source = inputs.pop("logprobs")

    def run(logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return policy_loss(logprobs * 1.5, **inputs, objective=objective)

    results = []
    for function in (run, testing.compiled(run)):
        logprobs = source.clone().requires_grad_()
        loss, metrics = function(logprobs)
        loss.backward()
        results.append((loss.detach(), logprobs.grad, *metrics.values()))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@shapes_only
@pytest.mark.filterwarnings("ignore:r1kernels uses its reference implementation")
@pytest.mark.parametrize(
    ("device", "dtype"),
    [(d, t) for d in ("cpu", "meta", "cuda") for t in (torch.float32, torch.bfloat16)] + [("cpu", torch.float64)],
)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_fakes_have_the_shapes_and_dtypes_of_results(device: str, layout: str, dtype: torch.dtype) -> None:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    shape, extra = ((4, 6), {}) if layout == "padded" else ((24,), {"cu_seqlens": torch.empty(5, dtype=torch.int64)})
    with FakeTensorMode(allow_non_fake_inputs=True):
        logprobs = torch.empty(shape, dtype=dtype, device=device).requires_grad_(device != "cuda")
        extra = {k: torch.empty(v.shape, dtype=v.dtype, device=device) for k, v in extra.items()}
        others = {k: torch.empty_like(logprobs) for k in ("old_logprobs", "ref_logprobs", "entropy", "mask")}
        result = policy_loss(
            logprobs, torch.empty(4, dtype=dtype, device=device), **others, **extra,
            normalizer=torch.ones((), device=device), objective=Objective(kl_coef=0.1, entropy_coef=0.1),
        )
        if logprobs.requires_grad:
            (grad,) = torch.autograd.grad(result.loss, logprobs)
            assert (grad.shape, grad.dtype, grad.device) == (logprobs.shape, dtype, logprobs.device)
    for value in (result.loss, *result.metrics.values()):
        assert (value.shape, value.dtype, value.device.type) == ((), compute, device)
    assert list(result.metrics) == list(METRICS)


# ---- the entropy's term ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["grpo", "dr_grpo", "luspo", "bnpo"])
@pytest.mark.parametrize("extra", ["plain", "holes", "normalizer"])
def test_an_entropy_coefficient_weighs_a_mean_under_every_aggregate(preset: str, extra: str) -> None:
    """Over sequences of the mean over their tokens, or over tokens: never over `max_length`."""
    inputs = with_extras(extra)
    arguments = {"max_length": 50} if preset == "dr_grpo" else {}
    if extra == "normalizer":  # as of twice as many sequences or tokens
        inputs["normalizer"] = {"dr_grpo": 500.0, "bnpo": 70.0}.get(preset, 10.0)
    results = [evaluate(inputs, getattr(objectives, preset)(**arguments, entropy_coef=coef)) for coef in (0.0, 0.4)]
    entropy, mask = inputs["entropy"].double(), inputs.get("mask", torch.ones(5, 7, dtype=torch.bool)).double()
    weight = mask / mask.sum() if preset == "bnpo" else mask / mask.sum(1, keepdim=True).clamp(min=1) / 5
    weight = weight / 2 if extra == "normalizer" else weight
    without, found = results
    torch.testing.assert_close(without[0].loss - found[0].loss, (0.4 * weight * entropy).sum().float(), rtol=1e-4,
                               atol=1e-6)
    torch.testing.assert_close(found[2], (-0.4 * weight).float(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found[0].metrics["entropy"], ((mask * entropy).sum() / mask.sum()).float())

"""The policy loss at the edges: overflow, masks, empty batches, ties on a bound, custom objectives, bad input."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from backends import checks_only
from policy_cases import AGGREGATES, KLS, OBJECTIVES, evaluate, with_extras
from torch import Tensor

from r1kernels import Objective, PolicyBatch, objectives, policy_loss, testing

ALL = [Objective(**fields, kl_coef=0.1, entropy_coef=0.1) for fields in OBJECTIVES.values()]


def one_token(log_ratio: float, advantage: float, objective: Objective) -> tuple[float, float, dict[str, float]]:
    """(loss, dL/dlogprob, metrics) of a batch of a single token."""
    logprobs = torch.tensor([[-1.0]])
    inputs = {"logprobs": logprobs, "old_logprobs": logprobs - log_ratio, "advantages": torch.tensor([advantage])}
    result, grad, _ = evaluate(inputs, objective)
    return result.loss.item(), grad.item(), {k: v.item() for k, v in result.metrics.items()}


# ---- on-policy --------------------------------------------------------------------------------------------


# A ratio of 1 is within the bounds of all others.
OUTSIDE = ("low_cap", "cispo_floor", "reinforce")
WITHIN = {name: o for name, o in zip(OBJECTIVES, ALL, strict=True) if name not in OUTSIDE}


@pytest.mark.parametrize("objective", WITHIN.values(), ids=WITHIN)
def test_on_policy_the_ratio_is_exactly_one(objective: Objective, implementation: str) -> None:
    inputs = with_extras("on_policy")
    given = with_extras("on_policy") | {"old_logprobs": inputs["logprobs"].clone()}
    (absent, grad_absent, _), (present, grad_present, _) = evaluate(inputs, objective), evaluate(given, objective)
    assert torch.equal(absent.loss, present.loss) and torch.equal(grad_absent, grad_present)
    for name in ("ratio_mean", "ratio_min", "ratio_max"):
        assert absent.metrics[name] == present.metrics[name] == 1
    assert absent.metrics["approx_kl"] == absent.metrics["clip_fraction"] == 0


# ---- clipping and overflow --------------------------------------------------------------------------------


@pytest.mark.parametrize("log_ratio", [89.0, 1000.0, math.inf])
def test_a_clipped_token_far_away_is_finite_with_gradient_zero(log_ratio: float, implementation: str) -> None:
    loss, grad, metrics = one_token(log_ratio, 1.0, objectives.grpo())
    assert loss == pytest.approx(-1.2) and grad == 0
    assert metrics["clip_high_fraction"] == 1 and metrics["active_fraction"] == 0
    assert metrics["nonfinite_tokens"] == 0


def test_a_clipped_token_with_an_entropy_gradient_is_active(implementation: str) -> None:
    logprobs = torch.tensor([[-1.0, -2.0]])
    inputs = {"logprobs": logprobs, "old_logprobs": logprobs - 1, "advantages": torch.tensor([1.0]),
              "entropy": torch.tensor([[1.0, 2.0]])}
    result, grad, grad_entropy = evaluate(inputs, objectives.grpo(entropy_coef=0.1))
    assert not grad.any() and grad_entropy.all()
    assert result.metrics["clip_high_fraction"] == result.metrics["active_fraction"] == 1


@pytest.mark.parametrize("log_ratio", [-89.0, -1000.0])
def test_a_ratio_that_underflows(log_ratio: float, implementation: str) -> None:
    loss, grad, metrics = one_token(log_ratio, -1.0, objectives.grpo())
    assert loss == pytest.approx(0.8) and grad == 0 and metrics["clip_low_fraction"] == 1
    loss, grad, metrics = one_token(log_ratio, 1.0, objectives.grpo())
    assert abs(loss) == abs(grad) <= math.exp(-89) * 1.001 and metrics["clip_fraction"] == 0


@pytest.mark.parametrize("log_ratio", [2.0, 89.0, 1000.0])
def test_the_two_sided_clip_stops_what_one_side_lets_through(log_ratio: float, implementation: str) -> None:
    loss, grad, metrics = one_token(log_ratio, -2.0, objectives.grpo(ratio_cap=3.0))
    assert (loss, grad, metrics["ratio_cap_fraction"]) == (6.0, 0, 1)


def test_an_unclipped_overflow_is_reported(implementation: str) -> None:
    loss, grad, metrics = one_token(1000.0, -1.0, objectives.grpo())
    assert loss == math.inf and grad == math.inf and metrics["nonfinite_tokens"] == 1


@pytest.mark.parametrize("log_ratio", [89.0, 1000.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_soft_gates_and_constant_weights_stay_finite(log_ratio: float, advantage: float, implementation: str) -> None:
    loss, grad, _ = one_token(log_ratio, advantage, objectives.sapo())
    assert loss == pytest.approx(-4 * advantage / (1.0 if advantage > 0 else 1.05)) and grad == 0
    loss, grad, metrics = one_token(log_ratio, advantage, objectives.cispo())
    assert (loss, grad, metrics["clip_high_fraction"]) == (5 * advantage, -5 * advantage, 1)


@pytest.mark.parametrize("objective", ALL, ids=OBJECTIVES)
@pytest.mark.parametrize("log_ratio", [1000.0, -1000.0, math.inf])
def test_advantage_zero_is_exactly_zero(objective: Objective, log_ratio: float, implementation: str) -> None:
    objective = dataclasses.replace(objective, kl_coef=0.0, entropy_coef=0.0)
    loss, grad, metrics = one_token(log_ratio, 0.0, objective)
    assert loss == grad == metrics["active_fraction"] == metrics["nonfinite_tokens"] == 0


@pytest.mark.parametrize("objective", ALL[:-1], ids=list(OBJECTIVES)[:-1])
def test_importance_weight_zero_is_exactly_zero(objective: Objective, implementation: str) -> None:
    """Rejected rollouts get weight 0: nothing of them may come through, however far the policy has moved."""
    objective = dataclasses.replace(objective, kl_coef=0.0, entropy_coef=0.0)
    inputs = testing.random_policy()
    inputs["old_logprobs"][1] -= 1000
    inputs["advantages"][1] = -1.0
    inputs["importance_weights"][1] = 0.0
    result, grad, _ = evaluate(inputs, objective)
    assert result.loss.isfinite() and result.metrics["nonfinite_tokens"] == 0
    assert grad.isfinite().all() and not grad[1].any()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_gradient_flows_on_a_bound(advantage: float, implementation: str) -> None:
    """Like torch.clamp: at r = 1 with both bounds at 1, the token is not clipped."""
    loss, grad, metrics = one_token(0.0, advantage, objectives.grpo(clip_low=0.0, clip_high=0.0))
    assert (loss, grad, metrics["clip_fraction"]) == (-advantage, -advantage, 0)


@pytest.mark.parametrize("log_ratio", [0.5, 2.3, 2.5, -20.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_clip_epsilon_ten(log_ratio: float, advantage: float, implementation: str) -> None:
    """DeepSeek-R1's: the bounds are -9 and 11, and log(-9) must not be taken."""
    loss, grad, metrics = one_token(log_ratio, advantage, objectives.r1(kl_coef=0.0))
    ratio = math.exp(log_ratio)
    clipped = advantage > 0 and ratio > 11
    assert loss == pytest.approx(-advantage * (11 if clipped else ratio), rel=1e-6)
    assert grad == pytest.approx(0 if clipped else -advantage * ratio, rel=1e-6)
    assert metrics["clip_high_fraction"] == clipped and metrics["clip_low_fraction"] == 0


# ---- masks and empty batches ------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ALL, ids=OBJECTIVES)
@pytest.mark.parametrize("extra", ["token_advantages", "token_weights"])
def test_nothing_behind_the_mask_matters(objective: Objective, extra: str, implementation: str) -> None:
    mask = testing.random_ids(5, 7, vocab=3) > 0
    mask[1] = False
    clean = with_extras(extra) | {"mask": mask}
    poisoned = {k: testing.poisoned(v, mask) if v.shape == mask.shape and k != "mask" else v for k, v in clean.items()}
    for name in ("advantages", "importance_weights"):  # per sequence: all of sequence 1 is masked
        if poisoned[name].dim() == 1:
            poisoned[name][1] = math.nan
    (a, grad_a, eta_a), (b, grad_b, eta_b) = evaluate(clean, objective), evaluate(poisoned, objective)
    assert torch.equal(a.loss, b.loss) and torch.equal(grad_a, grad_b) and torch.equal(eta_a, eta_b)
    assert not grad_b[~mask].any() and not eta_b[~mask].any()
    assert all(torch.equal(a.metrics[name], b.metrics[name]) for name in a.metrics)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("objective", ALL, ids=OBJECTIVES)
def test_all_masked_gives_zero(objective: Objective, aggregate: str, implementation: str) -> None:
    objective = dataclasses.replace(objective, **AGGREGATES[aggregate])
    result, grad, eta = evaluate(with_extras("plain") | {"mask": torch.zeros(5, 7)}, objective)
    assert result.loss == 0 and not grad.any() and not eta.any()
    assert all(value.isfinite() for value in result.metrics.values())
    assert result.metrics["tokens"] == 0 and result.metrics["sequences"] == 5


@pytest.mark.parametrize("shape", [(0, 7), (5, 0), (0, 0)])
@pytest.mark.parametrize("objective", ALL, ids=OBJECTIVES)
def test_no_tokens(objective: Objective, shape: tuple[int, int], implementation: str) -> None:
    tokens = ("logprobs", "old_logprobs", "ref_logprobs", "entropy")
    inputs = {k: torch.empty(shape) for k in tokens} | {"advantages": torch.ones(shape[0])}
    result, grad, _ = evaluate(inputs, objective)
    assert result.loss == 0 and grad.shape == shape
    assert result.metrics["sequences"] == shape[0]


def test_no_sequences_packed(implementation: str) -> None:
    empty = torch.empty(0)
    result = policy_loss(empty, empty, cu_seqlens=torch.zeros(1, dtype=torch.int64))
    assert result.loss == 0 and result.metrics["sequences"] == 0


def test_nan_of_a_counted_token_is_seen(implementation: str) -> None:
    inputs = with_extras("plain")
    inputs["logprobs"][2, 3] = math.nan
    inputs["advantages"][2] = 1.0
    result, grad, _ = evaluate(inputs, objectives.grpo())
    assert result.loss.isnan() and result.metrics["nonfinite_tokens"] == 1
    assert grad.isnan().sum() == 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_types_of_cu_seqlens(dtype: torch.dtype, implementation: str) -> None:
    inputs = testing.packed(with_extras("plain"), testing.random_lengths(5, 7))
    expected = evaluate(inputs, objectives.gspo())[0].loss
    assert evaluate(inputs | {"cu_seqlens": inputs["cu_seqlens"].to(dtype)}, objectives.gspo())[0].loss == expected


def test_strided_inputs(implementation: str) -> None:
    clean = with_extras("token_weights")
    strided = {k: torch.stack([v, v], -1)[..., 0] if v.dim() == 1 else v.t().contiguous().t() for k, v in clean.items()}
    (a, grad_a, _), (b, grad_b, _) = evaluate(clean, ALL[0]), evaluate(strided, ALL[0])
    assert torch.equal(a.loss, b.loss) and torch.equal(grad_a, grad_b)


# ---- custom objectives ------------------------------------------------------------------------------------


def plain_reinforce(logprobs: Tensor, batch: PolicyBatch) -> Tensor:
    return -batch.advantages * logprobs


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("normalizer", [None, 12.5])
def test_a_callable_equals_the_preset_it_spells(layout: str, aggregate: str, normalizer: float | None) -> None:
    inputs = with_extras("token_weights") | {"normalizer": normalizer}
    if layout == "packed":
        inputs = testing.packed(inputs, testing.random_lengths(5, 7))
    fields = AGGREGATES[aggregate] | KLS["k2"] | {"entropy_coef": 0.1}
    custom, custom_grad, custom_eta = evaluate(inputs, Objective(surrogate=plain_reinforce, **fields))
    expected = testing.policy_loss(Objective(surrogate="reinforce", **fields), **inputs)
    testing.assert_within(custom.loss, expected.loss)
    testing.assert_within(custom_grad, expected.grad_logprobs)
    testing.assert_within(custom_eta, expected.grad_entropy)


def test_a_bare_callable_is_averaged_over_counted_tokens() -> None:
    inputs = with_extras("holes")
    loss = evaluate(inputs, plain_reinforce)[0].loss
    testing.assert_within(loss, testing.policy_loss(objectives.reinforce(), **inputs).loss)


def test_metrics_of_a_callable() -> None:
    """Tokens that its gradient reaches are active; its bounds are unknown."""
    inputs = with_extras("plain")
    reached = inputs["logprobs"] < -0.5

    def some(logprobs: Tensor, batch: Any) -> Tensor:
        return torch.where(reached, -logprobs, 0)

    logprobs = inputs["logprobs"].requires_grad_()
    metrics = policy_loss(**inputs, objective=some).metrics
    assert metrics["active_fraction"] == reached.float().mean() and 0 < reached.sum() < reached.numel()
    assert not any(name.startswith(("clip_", "ratio_cap_")) for name in metrics)
    with torch.no_grad():
        assert policy_loss(**inputs | {"logprobs": logprobs}, objective=some).metrics["active_fraction"].isnan()


def test_a_callable_sees_one_value_per_token_and_zeros_behind_the_mask() -> None:
    mask = testing.random_ids(5, 7, vocab=2) == 1
    inputs = with_extras("plain") | {"mask": mask}
    clean = dict(inputs)
    for name in ("old_logprobs", "ref_logprobs", "entropy"):
        inputs[name] = testing.poisoned(inputs[name], mask)
    seen = []

    def spy(logprobs: Tensor, batch: PolicyBatch) -> Tensor:
        seen.append((logprobs, batch))
        return logprobs

    policy_loss(**inputs, objective=spy)
    ((logprobs, batch),) = seen
    zeroed = torch.zeros(())
    assert torch.equal(logprobs, torch.where(mask, inputs["logprobs"], zeroed))
    assert torch.equal(batch.old_logprobs, torch.where(mask, clean["old_logprobs"], zeroed))
    assert torch.equal(batch.advantages, torch.where(mask, inputs["advantages"].unsqueeze(1), zeroed))
    assert torch.equal(batch.importance_weights, torch.where(mask, inputs["importance_weights"].unsqueeze(1), zeroed))
    assert torch.equal(batch.mask, mask)


def test_what_a_callable_returns_behind_the_mask_does_not_matter() -> None:
    inputs = with_extras("holes")

    def careless(logprobs: Tensor, batch: PolicyBatch) -> Tensor:
        return torch.where(batch.mask, plain_reinforce(logprobs, batch), math.nan)

    (clean, clean_grad, _), (nan, nan_grad, _) = evaluate(inputs, plain_reinforce), evaluate(inputs, careless)
    assert torch.equal(clean.loss, nan.loss)
    assert torch.equal(clean_grad, nan_grad)


@pytest.mark.parametrize("returned", [torch.zeros(()), torch.zeros(5, 1), torch.zeros(7, 5), 0.0, None])
def test_a_callable_must_return_a_loss_per_token(returned: Any) -> None:
    with pytest.raises(ValueError, match=r"custom objective returned .*, expected a loss per token of shape \(5, 7\)"):
        policy_loss(**with_extras("plain"), objective=lambda logprobs, batch: returned)


# ---- bad input ----------------------------------------------------------------------------------------------

NARROW = torch.zeros(5, 6)
BAD_INPUTS: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "no tensor": (TypeError, {"logprobs": 1.0}, "logprobs is a float, expected a torch.Tensor"),
    "integer logprobs": (TypeError, {"logprobs": torch.zeros(5, 7).long()}, "logprobs has dtype torch.int64"),
    "0-d logprobs": (ValueError, {"logprobs": torch.tensor(1.0), "entropy": None}, r"logprobs is 0-d, expected \(B, T"),
    "old shape": (ValueError, {"old_logprobs": NARROW}, r"old_logprobs has shape \(5, 6\), expected \(5, 7\)"),
    "ref shape": (ValueError, {"ref_logprobs": NARROW}, r"ref_logprobs has shape \(5, 6\), expected \(5, 7\)"),
    "entropy shape": (ValueError, {"entropy": NARROW}, r"entropy has shape \(5, 6\), expected \(5, 7\)"),
    "mask shape": (ValueError, {"mask": NARROW}, r"mask has shape \(5, 6\), expected \(5, 7\)"),
    "mask list": (TypeError, {"mask": [1]}, "mask is a list, expected a torch.Tensor"),
    "column of advantages": (
        ValueError, {"advantages": torch.zeros(5, 1)}, r"advantages has shape \(5, 1\), expected \(5,\).*or \(5, 7\)"),
    "too few advantages": (ValueError, {"advantages": torch.zeros(4)}, r"advantages has shape \(4,\), expected \(5,\)"),
    "integer advantages": (TypeError, {"advantages": torch.ones(5).long()}, "advantages has dtype torch.int64"),
    "weights shape": (ValueError, {"importance_weights": torch.zeros(7)}, r"importance_weights has shape \(7,\)"),
    "device": (ValueError, {"advantages": torch.zeros(5, device="meta")}, "advantages is on meta, expected cpu"),
    "no reference": (
        ValueError, {"ref_logprobs": None, "objective": objectives.r1()}, "ref_logprobs is None.*kl_coef is 0.001"),
    "no entropy": (
        ValueError, {"entropy": None, "objective": Objective(entropy_coef=0.1)}, "entropy is None.*coef is 0.1"),
    "objective by name": (TypeError, {"objective": "grpo"}, "objective is 'grpo', expected an Objective"),
    "a preset not called": (TypeError, {"objective": objectives.grpo}, r"objective is grpo,.* grpo\(\.\.\.\)"),
    "the class": (TypeError, {"objective": Objective}, r"objective is Objective,.* Objective\(\.\.\.\)"),
    "normalizer 0": (ValueError, {"normalizer": 0}, "normalizer is 0, expected a finite number > 0"),
    "normalizer tensor 0": (ValueError, {"normalizer": torch.tensor(0.0)}, "normalizer is 0.*, expected a positive"),
    "normalizer tensor NaN": (ValueError, {"normalizer": torch.tensor(math.nan)}, "normalizer is nan, expected"),
    "normalizer vector": (ValueError, {"normalizer": torch.ones(5)}, r"normalizer has shape \(5,\), expected \(\)"),
    "normalizer text": (TypeError, {"normalizer": "5"}, "normalizer is '5', expected a Python number"),
    "cu_seqlens with (B, T)": (
        ValueError, {"cu_seqlens": torch.tensor([0, 35])}, r"cu_seqlens was given with .*\(5, 7\), expected packed"),
}


@checks_only
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_names_argument_value_and_expectation(case: str, implementation: str) -> None:
    error, changes, message = BAD_INPUTS[case]
    with pytest.raises(error, match=message):
        policy_loss(**(with_extras("plain") | changes))


@checks_only
@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        (None, ValueError, r"cu_seqlens is None .*\(6,\), expected \(S \+ 1,\)"),
        (torch.tensor([0, 3, 5]), ValueError, "cu_seqlens runs from 0 to 5, expected 0 to N = 6"),
        (torch.tensor([1, 3, 6]), ValueError, "cu_seqlens runs from 1 to 6, expected 0 to N = 6"),
        (torch.tensor([0, 4, 3, 6]), ValueError, r"cu_seqlens\[2\] is 3, expected no less than cu_seqlens\[1\] = 4"),
        (torch.tensor([0, 9, 6]), ValueError, r"cu_seqlens\[2\] is 6, expected no less than cu_seqlens\[1\] = 9"),
        (torch.tensor([0.0, 6.0]), TypeError, "cu_seqlens has dtype torch.float32, expected int64 or int32"),
        (torch.tensor([[0, 6]]), ValueError, r"cu_seqlens has shape \(1, 2\), expected \(S \+ 1,\)"),
        (torch.tensor([], dtype=torch.int64), ValueError, r"cu_seqlens has shape \(0,\), expected \(S \+ 1,\)"),
        ([0, 6], TypeError, "cu_seqlens is a list, expected a torch.Tensor"),
    ],
)
def test_bad_cu_seqlens(cu_seqlens: Any, error: type[Exception], message: str, implementation: str) -> None:
    sequences = 1 if cu_seqlens is None else max(len(cu_seqlens) - 1, 0)
    with pytest.raises(error, match=message):
        policy_loss(torch.zeros(6), torch.zeros(sequences), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("objective", [objectives.grpo(), objectives.dapo(), objectives.gspo(), objectives.sapo()])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_log_prob_that_is_no_number_is_seen_on_policy(implementation: str, objective: Objective, bad: float) -> None:
    """Without old log-probs the ratio is 1, which must not hide it."""
    logprobs = -torch.rand(3, 4) - 0.1
    logprobs[1, 2] = bad
    loss, metrics = policy_loss(logprobs, torch.tensor([1.0, -1.0, 0.5]), objective=objective)
    assert loss.isnan() and metrics["nonfinite_tokens"] >= 1

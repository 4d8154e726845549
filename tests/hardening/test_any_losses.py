"""Every operation of log-probs, rewards and tokens on any shape, layout and mask, against the float64 oracles."""

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_cases import AGGREGATES, KLS, OBJECTIVES, check, evaluate, objective_of
from strategies import LAYOUTS, MASKS, SEEDS, Rows, leaf, rows, tokens_mask

from r1kernels import (
    clip_cov_filter,
    group_advantages,
    grpo_loss,
    high_entropy_filter,
    importance_weights,
    kl_estimate,
    multi_reward_advantages,
    off_policy_filter,
    pass_at_k_advantages,
    testing,
)
from r1kernels.testing import token_filters as oracles

EPS64 = torch.finfo(torch.float64).eps
STRIDES = st.sampled_from(list(LAYOUTS))
PER_TOKEN = ("old_logprobs", "ref_logprobs", "entropy")
REWARDS = st.sampled_from([0.0, 1.0, -1.0, 0.1, 1 / 3, 1e-8, 123456.789, math.nan, 0.5])


@st.composite
def policies(draw: st.DrawFn, entropy: bool = True) -> dict[str, Any]:
    """Keyword arguments of `policy_loss`: any shape, optional tensors, weights per token or sequence, any mask."""
    batch, length, seed = draw(st.integers(0, 5)), draw(st.integers(0, 9)), draw(SEEDS)
    inputs: dict[str, Any] = testing.random_policy(batch, length, seed) if batch else {
        name: torch.zeros(0, length) for name in ("logprobs", *PER_TOKEN)
    } | {"advantages": torch.zeros(0), "importance_weights": torch.ones(0)}
    for name in draw(st.sets(st.sampled_from(["old_logprobs", "entropy", "importance_weights"]))):
        del inputs[name]
    if not entropy:
        inputs.pop("entropy", None)
    if draw(st.booleans()):
        values = torch.randn(batch, length, generator=testing.generator(seed + 3))
        inputs["advantages"] = 0.97 * values.round(decimals=1)
    if "importance_weights" in inputs and draw(st.booleans()):
        inputs["importance_weights"] = torch.rand(batch, length, generator=testing.generator(seed + 4)).round()
    inputs["mask"] = tokens_mask((batch, length), draw(MASKS), seed)
    if draw(st.booleans()):
        inputs["normalizer"] = draw(st.sampled_from([1.0, 37.5, torch.tensor(3.0)]))
    layout = LAYOUTS[draw(STRIDES)]
    for name in ("logprobs", *PER_TOKEN):
        if name in inputs:
            inputs[name] = layout(inputs[name])
    lengths = testing.random_lengths(batch, length, seed) if length and batch else []
    return testing.packed(inputs, lengths) if lengths and draw(st.booleans()) else inputs


OBJECTIVE = st.builds(
    objective_of, st.sampled_from(list(OBJECTIVES)), st.sampled_from(list(KLS)), st.sampled_from(list(AGGREGATES))
)


def without(inputs: dict[str, Any], objective: Any) -> dict[str, Any]:
    """Entropies are required with an entropy coefficient only, and references with one of KL only."""
    if objective.entropy_coef and "entropy" not in inputs:
        inputs = inputs | {"entropy": inputs["logprobs"].abs()}
    return inputs


@given(inputs=policies(), objective=OBJECTIVE)
def test_policy_loss(inputs: dict[str, Any], objective: Any, implementation: str) -> None:
    inputs = without(inputs, objective)
    check(inputs, objective)
    mask = inputs["mask"]
    if mask is None:
        return
    dirty = inputs | {
        name: testing.poisoned(inputs[name], mask != 0) for name in ("logprobs", *PER_TOKEN) if name in inputs
    }
    clean, poisoned = evaluate(inputs, objective), evaluate(dirty, objective)
    assert torch.equal(clean[0].loss, poisoned[0].loss) and torch.equal(clean[1], poisoned[1])
    assert not poisoned[1][mask == 0].any()


@given(case=rows(values=("normal", "small", "ties", "-inf"), leads=st.tuples(st.integers(1, 3), st.integers(1, 4))),
       objective=OBJECTIVE, masked=MASKS, data=st.data())
def test_grpo_loss(case: Rows, objective: Any, masked: str, data: st.DataObject, implementation: str) -> None:
    """From logits: the oracle of the loss at the exact log-probs, and that of the logits' gradient."""
    logits, ids = case.logits.contiguous().clone(), case.token_ids
    logits.scatter_(-1, ids.unsqueeze(-1), 0.5)  # a token that was drawn has a probability
    layout = LAYOUTS[data.draw(st.sampled_from([name for name in LAYOUTS if name != "expanded"]))]
    stats, shape = testing.token_stats(logits, ids), ids.shape
    noise = torch.randn(2, *shape, generator=testing.generator(case.seed)) / 2
    mask = tokens_mask(shape, masked, case.seed)
    inputs: dict[str, Any] = {
        "advantages": torch.randn(shape[0], generator=testing.generator(case.seed + 1)),
        "old_logprobs": stats.logprobs.float() + noise[0], "ref_logprobs": stats.logprobs.float() + noise[1],
        "mask": mask,
    }
    source = leaf(layout(logits))
    result = grpo_loss(source, ids, **inputs, objective=objective)
    (grad,) = torch.autograd.grad(result.loss, source)
    expected = testing.policy_loss(objective, logprobs=stats.logprobs, entropy=stats.entropy, **inputs)
    size = expected.loss.terms + expected.loss.value.abs() + 1
    # A ratio near a bound may be on its other side, so that only losses without one are compared everywhere.
    testing.assert_within(result.loss, expected.loss.value, 4e-5 * size)
    bounded = objective.surrogate not in ("reinforce", "sapo", "cispo", "vespo")
    if bounded and float(expected.metrics["clip_fraction"].value) != float(result.metrics["clip_fraction"]):
        return
    over = testing.token_stats_gradient(logits, ids, expected.grad_logprobs.value, expected.grad_entropy.value)
    slack = testing.rounding(over.value, grad.dtype) + 6e-5 * (
        over.terms + expected.grad_logprobs.terms.unsqueeze(-1) + expected.grad_entropy.terms.unsqueeze(-1)
    )
    testing.assert_within(grad, over.value, slack)
    if mask is not None:
        assert not grad[mask == 0].any()


@given(shape=st.lists(st.integers(0, 6), max_size=3), seed=SEEDS, layout=STRIDES,
       estimator=st.sampled_from(["k1", "k2", "k3"]), scale=st.sampled_from([0.0, 1e-6, 1.0, 15.0]))
def test_kl_estimate(
    shape: list[int], seed: int, layout: str, estimator: str, scale: float, implementation: str
) -> None:
    logprobs = -torch.rand(shape, generator=testing.generator(seed)) * 10
    ref = logprobs + scale * torch.randn(shape, generator=testing.generator(seed + 1))
    if shape:
        logprobs, ref = LAYOUTS[layout](logprobs), LAYOUTS[layout](ref)
    inputs = [leaf(logprobs), leaf(ref)]
    estimate = kl_estimate(*inputs, estimator)
    grads = torch.autograd.grad(estimate.sum(), inputs)
    d = ref.double() - logprobs.double()
    terms = torch.tensor([testing.kl_term(estimator, x) for x in d.flatten().tolist()], dtype=torch.float64)
    value, slope = (terms.reshape(-1, 2)[:, k].reshape(d.shape) for k in range(2))
    curvature = {"k1": 0 * d, "k2": d.abs(), "k3": d.abs() * d.exp()}[estimator]
    testing.assert_within(estimate, testing.Expected(value, value.abs() + d.abs() * slope.abs()))
    testing.assert_within(grads[0], testing.Expected(slope, slope.abs() + curvature))
    assert torch.equal(grads[1], -grads[0])


@given(rewards=st.lists(REWARDS, max_size=20), groups=st.integers(1, 5), seed=SEEDS,
       scale=st.sampled_from(["group_std", "batch_std", "none"]), ddof=st.integers(0, 1),
       eps=st.sampled_from([1e-6, 1e-4]), baseline=st.sampled_from(["mean", "leave_one_out", "length"]))
def test_group_advantages(
    rewards: list[float], groups: int, seed: int, scale: str, ddof: int, eps: float, baseline: str, implementation: str
) -> None:
    values = torch.tensor(rewards, dtype=torch.float32)
    group_ids = torch.randint(groups, values.shape, generator=testing.generator(seed))
    lengths = testing.random_ids(len(rewards), vocab=5, seed=seed) if baseline == "length" else None
    how = {"scale": scale, "ddof": ddof, "eps": eps} | (
        {"baseline": "length_weighted", "lengths": lengths} if lengths is not None else {"baseline": baseline}
    )
    found = group_advantages(values, group_ids=group_ids, **how)
    exact = testing.group_advantages(values, group_ids, **how)
    size = values.double().nan_to_num().abs().amax() if rewards else 1.0
    testing.assert_within(found, exact, testing.rounding(exact, torch.float32) * 2 + 64 * EPS64 * size / eps)
    assert found.isfinite().all() and not found[values.isnan()].any()
    assert not found[exact == 0].any() or baseline != "mean"  # groups of equal rewards are exactly 0


@given(rewards=st.lists(st.tuples(REWARDS, REWARDS), min_size=1, max_size=14), groups=st.integers(1, 4), seed=SEEDS,
       k=st.integers(1, 5), eps=st.sampled_from([1e-6, 1e-4]))
def test_several_rewards_and_the_best_of_k(
    rewards: list[tuple[float, float]], groups: int, seed: int, k: int, eps: float, implementation: str
) -> None:
    values = torch.tensor(rewards, dtype=torch.float32)
    group_ids = torch.randint(groups, values.shape[:1], generator=testing.generator(seed))
    weights = [1.0, -0.5]
    exact = testing.multi_reward_advantages(values, group_ids, weights, 1, eps)
    found = multi_reward_advantages(values, group_ids=group_ids, weights=weights, eps=eps)
    size = float(values.double().nan_to_num().abs().amax()) + 1
    testing.assert_within(found, exact, testing.rounding(exact, torch.float32) * 2 + 1e4 * EPS64 * size / eps**2)
    k = min(k, int(group_ids.unique(return_counts=True)[1].max()) - 1)  # fewer than the answers of the largest group
    if k < 1:
        return
    exact = testing.pass_at_k_advantages(values[:, 0], group_ids, k, eps)
    found = pass_at_k_advantages(values[:, 0], k, group_ids=group_ids, eps=eps)
    testing.assert_within(found, exact, testing.rounding(exact, torch.float32) * 2 + 1e4 * EPS64 * size / eps)


@given(shape=st.tuples(st.integers(1, 5), st.integers(1, 6)), seed=SEEDS, kind=MASKS, layout=STRIDES,
       level=st.sampled_from(["token", "sequence", "sequence_mean"]), mode=st.sampled_from(["truncate", "mask"]),
       bounds=st.sampled_from([(0.0, 2.0), (0.5, 1.5), (0.0, math.inf), (1.0, 1.0)]), normalize=st.booleans())
def test_importance_weights(
    shape: tuple[int, int], seed: int, kind: str, layout: str, level: str, mode: str, bounds: tuple[float, float],
    normalize: bool, implementation: str,
) -> None:
    old = -torch.rand(shape, generator=testing.generator(seed)) * 5
    sampler = LAYOUTS[layout](old + torch.randn(shape, generator=testing.generator(seed + 1)) / 2)
    mask = tokens_mask(shape, kind, seed)
    counts = torch.ones(shape, dtype=torch.bool) if mask is None else mask != 0
    how = {"level": level, "mode": mode, "floor": bounds[0], "cap": bounds[1]}
    found = importance_weights(testing.poisoned(old, counts), testing.poisoned(sampler, counts), mask, **how,
                               normalize=normalize)
    assert not found.weights.isnan().any()
    if not counts.any():
        assert all(value.isfinite() for value in found.metrics.values())
        return
    sequences = [range(row * shape[1], (row + 1) * shape[1]) for row in range(shape[0])]
    if found.metrics["importance_mean"] == 0:
        return  # every weight is outside of the bounds: there is no mean to compare with
    exact, metrics = testing.importance_weights(old, sampler, counts, sequences, **how, normalize=normalize)
    wanted = torch.tensor(exact, dtype=torch.float64)
    testing.assert_within(found.weights.flatten(), wanted, 4e-7 * wanted.abs())
    for name, value in metrics.items():
        testing.assert_within(found.metrics[name], torch.tensor(value).double(), 4e-6 * (1 + abs(value)))


@given(shape=st.tuples(st.integers(1, 4), st.integers(1, 6)), seed=SEEDS, kind=MASKS, layout=STRIDES,
       top=st.sampled_from([0.01, 0.2, 0.5, 1.0]), threshold=st.sampled_from([0.0, 0.05, 0.3]))
def test_filters(
    shape: tuple[int, int], seed: int, kind: str, layout: str, top: float, threshold: float, implementation: str
) -> None:
    values = testing.random_policy(*shape, seed)
    mask = tokens_mask(shape, kind, seed)
    counts = torch.ones(shape, dtype=torch.bool) if mask is None else mask != 0
    entropy = LAYOUTS[layout](values["entropy"].round(decimals=1))
    found = high_entropy_filter(testing.poisoned(entropy, counts), mask, top=top)
    exact = oracles.high_entropy(entropy.flatten().tolist(), counts.flatten().tolist(), top)
    # The oracle interpolates in float64; a tie with an interpolated limit is decided by its last bit.
    differs = torch.tensor(exact).view(shape) != found
    assert not differs.any() or entropy[differs].max() - entropy[differs].min() < 1e-6
    logprobs, old = values["logprobs"], values["old_logprobs"]
    gaps = [(o.double() - n.double())[m].tolist() for o, n, m in zip(old, logprobs, counts, strict=True)]
    kept = oracles.off_policy(gaps, values["advantages"].tolist(), threshold)
    inputs = [testing.poisoned(value, counts) for value in (logprobs, old)]
    assert off_policy_filter(*inputs, values["advantages"], mask, threshold=threshold).tolist() == kept
    per_token = values["advantages"][:, None].expand(shape)
    covariances = oracles.covariances(logprobs.flatten().tolist(), per_token.flatten().tolist(),
                                      counts.flatten().tolist())
    dropped = clip_cov_filter(inputs[0], per_token, mask, share=1.0, low=0.1, high=3.0).flatten() == 0
    for value, gone in zip(covariances, dropped.tolist(), strict=True):
        sure = math.isnan(value) or min(abs(value - 0.1), abs(value - 3.0)) > 1e-5
        assert not sure or gone == (0.1 < value < 3.0)

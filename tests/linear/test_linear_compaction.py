"""Rows without a gradient take no part: the result is that without them, whatever they hold; capacity bounds them."""

from typing import Any

import linear_cases as cases
import pytest
import torch
from backends import slow_interpreted
from linear_policy_cases import EVERYTHING, make, run
from policy_cases import OBJECTIVES
from torch import Tensor

import r1kernels
from r1kernels import Objective, backend, testing
from r1kernels.ops.linear import sums, walk
from r1kernels.ops.linear.grpo_loss import TokenObjective


def counting(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Rows that enter the products: "forward" those of logits, "backward" those of d logits."""
    rows = {"forward": 0, "backward": 0}
    logits, add = walk.Walk._logits, sums.GradientSums.add

    def counted_logits(self: Any, chunk: Any) -> None:
        rows["forward"] += len(chunk.hidden)
        logits(self, chunk)

    def counted_add(self: Any, chunk: Any, grad_logits: Tensor, *others: Tensor | None) -> None:
        rows["backward"] += len(grad_logits)
        add(self, chunk, grad_logits, *others)

    monkeypatch.setattr(walk.Walk, "_logits", counted_logits)
    monkeypatch.setattr(sums.GradientSums, "add", counted_add)
    return rows


def still(inputs: dict[str, Any]) -> Tensor:
    """(5, 7): tokens of advantage or importance weight 0."""
    advantages, weights = inputs["advantages"], inputs["importance_weights"]
    per_token = (advantages if advantages.dim() == 2 else advantages[:, None]).expand(5, 7)
    return (per_token == 0) | (weights if weights.dim() == 2 else weights[:, None]).expand(5, 7).eq(0)


@slow_interpreted
def test_rows_with_one_of_two_gradients_take_part(implementation: str) -> None:
    """Of the log-prob alone, of the entropy alone, of both, of neither."""
    case = cases.make("plain", 2, 4, width=12, vocab=37)
    slopes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64).repeat(2, 1)
    g, eta = (column.view(2, 4) for column in slopes.unbind(1))
    (_, entropy), grads = cases.gradients(
        r1kernels.linear_token_logprobs_and_entropy, case, lambda r: (g.float() * r[0] + eta.float() * r[1]).sum())
    assert entropy.requires_grad
    cases.assert_gradients(grads, cases.exact(case, g, eta), 1e-5)
    assert grads["hidden"].any(-1).tolist() == [[True, True, True, False]] * 2


@slow_interpreted
@pytest.mark.parametrize("name", ["grpo", "cispo", "sapo", "reinforce", "two_sided", "dppo_tv"])
@pytest.mark.parametrize("extra", ["holes", "token_advantages"])
def test_tokens_known_to_be_still_are_not_computed(
    name: str, extra: str, monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    """Neither forward nor backward, unless they are asked for; clipped ones forward only."""
    inputs = make("plain", extra)
    inputs["importance_weights"] = torch.tensor([1.5, 0.0, 1.0, 0.3, 2.0])
    mask = inputs.get("mask", torch.ones(5, 7, dtype=torch.bool))
    narrow = {"clip_low": 1e-3, "clip_high": 1e-3} if name == "dppo_tv" else {}  # the probabilities are small
    objective = Objective(**OBJECTIVES[name] | narrow)
    expected = int((mask & ~still(inputs)).sum())
    rows = counting(monkeypatch)
    result, grads = run(inputs, objective=objective)
    active = int(grads["hidden"].any(-1).sum())
    assert rows == {"forward": expected, "backward": active} and 0 < active <= expected < 35
    assert result.metrics["measured_tokens"] == expected and result.metrics["tokens"] == mask.sum()
    torch.testing.assert_close(result.metrics["active_fraction"], torch.tensor(active / int(mask.sum())))
    if name in ("grpo", "two_sided", "dppo_tv"):
        assert active < expected  # a bound holds some
    rows.update(forward=0, backward=0)
    whole, whole_grads = run(inputs, objective=objective, measure_all=True)
    assert rows == {"forward": int(mask.sum()), "backward": active}
    assert whole.metrics["measured_tokens"] == whole.metrics["tokens"]
    torch.testing.assert_close(whole.metrics["active_fraction"], result.metrics["active_fraction"])
    torch.testing.assert_close(whole.loss, result.loss, rtol=1e-6, atol=1e-7)
    for key, grad in grads.items():
        torch.testing.assert_close(grad, whole_grads[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("objective", "sparse"), [
    (Objective(**OBJECTIVES["grpo"]), True), (Objective(**OBJECTIVES["dppo_tv"]), True),
    (Objective(**OBJECTIVES["dppo_kl"]), True), (Objective.token_local(torch.add), True),
    (Objective(**OBJECTIVES["cispo"]), False), (Objective(**OBJECTIVES["ipo"]), False),
    (Objective(**OBJECTIVES["dppo_tv"], kl_coef=0.1), False), (Objective.token_local(torch.add, kl_coef=0.1), False),
])
def test_a_walk_looks_for_zeros_only_where_there_may_be_some(objective: Objective, sparse: bool) -> None:
    """On a device this look is a synchronisation; without it, tokens that a bound holds would cost products."""
    tokens = TokenObjective(torch.ones(1), torch.ones(1), None, None, None, None, objective)
    assert tokens.sparse == sparse


@slow_interpreted
@pytest.mark.parametrize(
    "more", [{"kl_coef": 0.1}, {"entropy_coef": 0.01}, {"kl_coef": 0.1, "kl_ratio": True},
             OBJECTIVES["ipo"] | {"tau_neg": 0.1}],
    ids=["kl", "entropy", "kl_ratio", "ipo"],
)
def test_a_kl_or_entropy_term_moves_every_token(
    more: dict[str, Any], monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    rows = counting(monkeypatch)
    result, grads = run(make(), objective=Objective(**more))
    assert rows == {"forward": 35, "backward": 35} and result.metrics["active_fraction"] == 1
    assert grads["hidden"].any(-1).all()


@pytest.mark.parametrize("name", ["gspo_wide", "sapo_sequence"])
def test_two_phases_compute_only_sequences_that_move(
    name: str, monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    inputs = make("plain", "holes")
    mask = inputs["mask"] & (inputs["advantages"] != 0)[:, None]
    rows = counting(monkeypatch)
    result, grads = run(inputs, objective=Objective(**OBJECTIVES[name]))
    active = int(grads["hidden"].any(-1).sum())
    assert rows == {"forward": int(mask.sum()) + active, "backward": active}
    assert result.metrics["measured_tokens"] == mask.sum()


@slow_interpreted
@pytest.mark.parametrize("name", ["grpo", "gspo_wide", "cispo"])
@pytest.mark.parametrize("head", ["plain", "everything"])
@pytest.mark.parametrize("capacity", [None, 28, 35, 1000])
@pytest.mark.parametrize("rows", [3, 100])
def test_still_rows_may_hold_anything(
    name: str, head: str, capacity: int | None, rows: int, implementation: str
) -> None:
    """Masked tokens and those of advantage 0: NaN and inf in their hidden states change no bit."""
    inputs = make(head, "holes")
    keep = inputs["mask"] & (inputs["advantages"] != 0)[:, None]
    assert 0 < keep.sum() <= 28
    keywords = {"objective": Objective(**OBJECTIVES[name]), "chunk_bytes": cases.chunk_of(rows, 37, 12)}
    (clean, grads), (dirty, dirty_grads), (bare, bare_grads) = (
        run(given, **keywords, **more)
        for given, more in (
            (inputs, {"capacity": capacity}),
            (inputs | {"hidden": testing.poisoned(inputs["hidden"], keep)}, {"capacity": capacity}),
            (inputs, {}),
        )
    )
    assert dirty.loss.isfinite() and torch.equal(clean.loss, dirty.loss)
    torch.testing.assert_close(clean.loss, bare.loss, rtol=1e-6, atol=1e-7)
    for key, grad in dirty_grads.items():
        assert grad.isfinite().all() and torch.equal(grad, grads[key]), key
        torch.testing.assert_close(grad, bare_grads[key], rtol=1e-5, atol=1e-6)
    assert not dirty_grads["hidden"][~keep].any()
    for key, value in clean.metrics.items():
        assert torch.equal(value, dirty.metrics[key]), key


@slow_interpreted
@pytest.mark.parametrize("head", ["plain", "everything"])
@pytest.mark.parametrize("function", ["logprobs", "grpo", "cross_entropy"])
def test_the_gradient_is_that_of_a_batch_without_the_still_rows(
    head: str, function: str, implementation: str
) -> None:
    """One chunk, one order of the same rows: bit for bit."""
    inputs = make(head, "token_advantages")
    del inputs["importance_weights"]
    keep = inputs["advantages"] != 0
    policy = {name: inputs.pop(name) for name in ("advantages", "old_logprobs", "ref_logprobs")}

    def loss_of(kept: Tensor | None, **case: Any) -> Tensor:
        if kept is not None:
            temperature = case.get("temperature", 1.0)
            case |= {"hidden": case["hidden"][kept], "token_ids": case["token_ids"][kept]}
            case["temperature"] = temperature[kept] if isinstance(temperature, Tensor) else temperature
        if function == "grpo":
            given = policy if kept is None else {name: value[kept] for name, value in policy.items()}
            objective = Objective(aggregate="token_mean")
            return r1kernels.linear_grpo_loss(**case, **given, objective=objective, normalizer=35.0).loss
        ids = case.pop("token_ids")
        if function == "logprobs":
            weight = policy["advantages"] if kept is None else policy["advantages"][kept]
            return (weight * r1kernels.linear_token_logprobs(token_ids=ids, **case)).sum()
        return r1kernels.linear_cross_entropy(targets=ids if kept is not None else ids.masked_fill(~keep, -100), **case)

    results = [cases.gradients(loss_of, inputs, lambda loss: loss, kept=kept) for kept in (None, keep)]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    for name, grad in results[0][1].items():
        assert torch.equal(grad, results[1][1][name]), name


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "reinforce"])
@pytest.mark.parametrize("capacity", [None, 1])
@pytest.mark.parametrize("still_by", ["mask", "advantage"])
def test_nothing_moves(name: str, capacity: int | None, still_by: str, implementation: str) -> None:
    inputs = make("everything")
    inputs["hidden"] = torch.full_like(inputs["hidden"], torch.nan)
    inputs |= {"mask": torch.zeros(5, 7)} if still_by == "mask" else {"advantages": torch.zeros(5)}
    result, grads = run(inputs, objective=Objective(**OBJECTIVES[name]), capacity=capacity)
    assert result.loss == 0 and result.metrics["measured_tokens"] == 0 and result.metrics["active_fraction"] == 0
    assert result.metrics["tokens"] == (0 if still_by == "mask" else 35)
    for key, value in cases.tensors(inputs).items():
        assert (grads[key].shape, grads[key].dtype) == (value.shape, value.dtype) and not grads[key].any()


def test_everything_clipped(implementation: str) -> None:
    inputs = make("everything") | {"advantages": torch.ones(5)}
    inputs["old_logprobs"] = cases.exact({k: inputs[k] for k in cases.make("everything", 1)}).logprobs.float() - 1
    result, grads = run(inputs)
    assert result.metrics["clip_high_fraction"] == 1 and result.metrics["active_fraction"] == 0
    testing.assert_within(result.loss, -1.2 * inputs["importance_weights"].double().mean(), 1e-6)
    assert not any(grad.any() for grad in grads.values())


# ---- capacity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [
    r1kernels.linear_grpo_loss, r1kernels.linear_token_logprobs, r1kernels.linear_cross_entropy,
])
@pytest.mark.parametrize("graph", [True, False])
def test_a_capacity_too_small_raises(function: Any, graph: bool, implementation: str) -> None:
    case = cases.make("plain", 3, 5)
    case["hidden"].requires_grad_(graph)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, :4] = False
    for given, count in ((mask, 11), (None, 15)):
        keywords: dict[str, Any] = {} if given is None else {"mask": given}
        arguments = dict(case)
        if function is r1kernels.linear_grpo_loss:
            keywords["advantages"] = torch.ones(3)
        elif function is r1kernels.linear_cross_entropy:
            ids = arguments.pop("token_ids")
            keywords = {"targets": ids if given is None else ids.masked_fill(~given, -100)}
        with pytest.raises(ValueError, match=rf"capacity \({count - 1}\) .*\({count}\)"):
            function(**arguments, **keywords, capacity=count - 1)
        function(**arguments, **keywords, capacity=count)


def test_a_capacity_bounds_tokens_that_move_not_the_batch() -> None:
    inputs = make("plain", "holes")
    keep = int((inputs["mask"] & (inputs["advantages"] != 0)[:, None]).sum())
    r1kernels.linear_grpo_loss(**inputs, capacity=keep)
    with pytest.raises(ValueError, match=rf"capacity \({keep - 1}\) .*\({keep}\)"):
        r1kernels.linear_grpo_loss(**inputs, capacity=keep - 1)
    with pytest.raises(ValueError, match=rf"capacity \({keep}\) .*\({int(inputs['mask'].sum())}\)"):
        r1kernels.linear_grpo_loss(**inputs, capacity=keep, objective=Objective(**EVERYTHING))


def test_the_padding_row_of_a_capacity_is_not_looked_up() -> None:
    """The last row stands in for padding: its id and its temperature may be outside any range."""
    case = cases.make("temperatures", 6)
    mask = torch.tensor([True, False, True, True, False, False])
    case["token_ids"][5], case["hidden"][5], case["temperature"][5] = 2**40, torch.nan, torch.nan
    with backend(testing.KERNELS):
        results = [
            cases.gradients(r1kernels.linear_token_logprobs, case, lambda x: x.square().sum(), mask=mask, **more)
            for more in ({}, {"capacity": 5})
        ]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], rtol=1e-5, atol=1e-5)


# ---- NaN where it counts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grpo", "gspo", "reinforce"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("on_policy", [False, True])
def test_nan_in_an_active_row_reaches_loss_metric_and_gradient(
    name: str, poison: float, on_policy: bool, implementation: str
) -> None:
    inputs = make("plain", "plain")
    if on_policy:
        inputs["old_logprobs"] = None
    inputs["hidden"][1, 3, 0] = poison
    result, grads = run(inputs, objective=Objective(**OBJECTIVES[name]))
    assert result.loss.isnan() and grads["weight"].isnan().any()
    assert result.metrics["nonfinite_tokens"] == (7 if name == "gspo" else 1)
    others = torch.ones(5, 7, dtype=torch.bool)
    others[1, slice(None) if name == "gspo" else 3] = False
    assert grads["hidden"][others].isfinite().all() and not grads["hidden"][1, 3].isfinite().all()


def test_the_row_that_stands_in_for_padding_may_hold_any_id(implementation: str) -> None:
    """A capacity larger than the number of active tokens is filled up with the last row, here an ignored one."""
    hidden, weight = torch.randn(6, 5, dtype=torch.bfloat16), torch.randn(9, 5, dtype=torch.bfloat16)
    targets = torch.tensor([1, 8, -100, 0, 3, -100])
    grads = []
    for capacity in (None, 4, 6):
        leaf = weight.clone().requires_grad_()
        r1kernels.linear_cross_entropy(hidden, leaf, targets, capacity=capacity).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])

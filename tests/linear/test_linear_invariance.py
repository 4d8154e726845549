"""The linear head does not depend on how a batch is cut, chunked, ordered or padded, nor on modes around the call."""

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import linear_cases as cases
import pytest
import torch
from backends import slow_interpreted, slow_on_gpu_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_policy_cases import HEAD_KEYWORDS, make, packed
from policy_cases import OBJECTIVES
from torch import Tensor

from r1kernels import (
    Objective,
    linear_cross_entropy,
    linear_grpo_loss,
    linear_token_logprobs,
    linear_token_logprobs_and_entropy,
    testing,
)
from r1kernels.ops.linear import gemm

BATCH, STEPS = 5, 7
AGGREGATES = {"sequence_mean": {}, "token_mean": {}, "constant": {"max_length": 9}}
NAMES = st.sampled_from(list(OBJECTIVES))
HEADS = st.sampled_from(["plain", "bias", "temperatures", "everything"])
EXTRAS = st.sampled_from(["holes", "token_advantages", "plain"])
ROWS = st.integers(1, 40)
SEED = st.integers(0, 1000)
Pieces = Callable[[dict[str, Any]], list[dict[str, Any]]]


def examples(count: int) -> int:
    return count if testing.KERNELS == "cpu" else 2


def objective_of(name: str, aggregate: str, terms: bool) -> Objective:
    more = {"kl_coef": 0.1, "entropy_coef": 0.01} if terms else {}
    return Objective(**OBJECTIVES[name], aggregate=aggregate, **more, **AGGREGATES[aggregate])


def global_normalizer(aggregate: str, inputs: dict[str, Any]) -> float:
    tokens = int(inputs["mask"].sum()) if "mask" in inputs else BATCH * STEPS
    return float({"sequence_mean": BATCH, "token_mean": max(tokens, 1), "constant": BATCH * 9}[aggregate])


def per_batch(inputs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """`change` applied to every tensor that has one row per sequence."""
    return {
        name: change(value) if isinstance(value, Tensor) and value.dim() and value.shape[0] == BATCH
        and name not in ("weight", "bias") else value
        for name, value in inputs.items()
    }


def evaluate(
    inputs: dict[str, Any], objective: Objective, rows: int, reshape: Pieces = lambda whole: [whole]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the loss over the pieces that `reshape` makes of a batch, and its gradients."""

    def total(**whole: Any) -> Tensor:
        chunk_bytes = cases.chunk_of(rows, 37, 12)
        losses = [
            linear_grpo_loss(**piece, objective=objective, chunk_bytes=chunk_bytes).loss for piece in reshape(whole)
        ]
        return torch.stack(losses).sum()

    return cases.gradients(total, inputs, lambda loss: loss)


def assert_same(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]]) -> None:
    """The loss, a sum of terms of both signs, to 1e-6 of 1; gradients to a few fp32 roundings of their largest."""
    testing.assert_within(b[0], a[0], 1e-6 * (1 + a[0].detach().abs().double()))
    for name, grad in a[1].items():
        testing.assert_within(b[1][name], grad, 3e-6 * (grad.abs().max().double() + 1e-3))


@slow_on_gpu_kernels
@pytest.mark.parametrize("aggregate", AGGREGATES)
@settings(max_examples=examples(25))
@given(name=NAMES, head=HEADS, extra=EXTRAS, seed=SEED, terms=st.booleans(),
       cuts=st.sets(st.integers(1, BATCH - 1)), rows=ROWS)
def test_micro_batches_with_the_global_normalizer(
    aggregate: str, name: str, head: str, extra: str, seed: int, terms: bool, cuts: set[int], rows: int
) -> None:
    inputs, objective = make(head, extra, seed=seed), objective_of(name, aggregate, terms)
    normalizer = global_normalizer(aggregate, inputs)
    bounds = [0, *sorted(cuts), BATCH]

    def split(whole: dict[str, Any]) -> list[dict[str, Any]]:
        parts = itertools.starmap(slice, itertools.pairwise(bounds))
        return [per_batch(whole, lambda v, part=part: v[part]) | {"normalizer": normalizer} for part in parts]

    assert_same(evaluate(inputs, objective, 40), evaluate(inputs, objective, rows, split))


@slow_on_gpu_kernels
@settings(max_examples=examples(40))
@given(name=NAMES, head=HEADS, extra=EXTRAS, seed=SEED, terms=st.booleans(), rows=ROWS)
def test_chunk_budgets(name: str, head: str, extra: str, seed: int, terms: bool, rows: int) -> None:
    inputs, objective = make(head, extra, seed=seed), objective_of(name, "sequence_mean", terms)
    assert_same(evaluate(inputs, objective, 40), evaluate(inputs, objective, rows))


@slow_interpreted
@settings(max_examples=examples(30))
@given(name=NAMES, head=HEADS, extra=EXTRAS, seed=SEED, order=st.permutations(range(BATCH)), rows=ROWS)
def test_order_of_sequences(name: str, head: str, extra: str, seed: int, order: list[int], rows: int) -> None:
    inputs, objective = make(head, extra, seed=seed), objective_of(name, "token_mean", True)
    whole = evaluate(inputs, objective, 40)
    assert_same(whole, evaluate(inputs, objective, rows, lambda w: [per_batch(w, lambda v: v[order])]))


@slow_interpreted
@settings(max_examples=examples(30))
@given(name=NAMES, head=st.sampled_from(["plain", "bias", "everything"]), seed=SEED, rows=ROWS,
       lengths=st.lists(st.integers(0, STEPS), min_size=BATCH, max_size=BATCH), terms=st.booleans())
def test_packing(name: str, head: str, seed: int, rows: int, lengths: list[int], terms: bool) -> None:
    inputs, objective = make(head, "plain", seed=seed), objective_of(name, "sequence_mean", terms)
    inputs["mask"] = testing.length_mask(lengths, STEPS)

    def flat(whole: dict[str, Any]) -> list[dict[str, Any]]:
        return [packed({key: value for key, value in whole.items() if key != "mask"}, lengths)]

    assert_same(evaluate(inputs, objective, 40), evaluate(inputs, objective, rows, flat))


@slow_interpreted
@settings(max_examples=examples(30))
@given(name=NAMES, head=HEADS, extra=EXTRAS, seed=SEED, more=st.integers(1, 9), rows=ROWS, terms=st.booleans())
def test_padding(name: str, head: str, extra: str, seed: int, more: int, rows: int, terms: bool) -> None:
    """Longer rows of masked NaN."""
    inputs, objective = make(head, extra, seed=seed), objective_of(name, "token_mean", terms)
    inputs.setdefault("mask", torch.ones(BATCH, STEPS, dtype=torch.bool))

    def longer(value: Tensor) -> Tensor:
        if value.shape[:2] != (BATCH, STEPS):
            return value
        fill = {torch.bool: False, torch.int64: -100}.get(value.dtype, float("nan"))
        return torch.cat([value, torch.full((BATCH, more, *value.shape[2:]), fill)], 1)

    assert_same(
        evaluate(inputs, objective, 40), evaluate(inputs, objective, rows, lambda w: [per_batch(w, longer)])
    )


@slow_on_gpu_kernels
@settings(max_examples=examples(30))
@given(head=HEADS, seed=SEED, order=st.permutations(range(BATCH)), cut=st.integers(0, BATCH), rows=ROWS)
def test_cross_entropy_of_any_split(head: str, seed: int, order: list[int], cut: int, rows: int) -> None:
    case = cases.make(head, BATCH, STEPS, seed=seed)
    case["targets"] = case.pop("token_ids").masked_fill(testing.random_ids(BATCH, STEPS, vocab=3, seed=seed) == 0, -100)
    counted = float((case["targets"] != -100).sum().clamp(min=1))

    def total(parts: list[list[int]], rows: int, **whole: Any) -> Tensor:
        return torch.stack([
            linear_cross_entropy(**per_batch(whole, lambda v, part=part: v[part]), normalizer=counted,
                                 chunk_bytes=cases.chunk_of(rows, 37, 12))
            for part in parts
        ]).sum()

    whole = cases.gradients(total, case, lambda loss: loss, parts=[list(range(BATCH))], rows=40)
    assert_same(whole, cases.gradients(total, case, lambda loss: loss, parts=[order[:cut], order[cut:]], rows=rows))


# ---- bits that do not depend on the batch ---------------------------------------------------------------------


@slow_interpreted
@pytest.mark.parametrize("route", ["native", "copies", "torch"])
@pytest.mark.parametrize("head", ["plain", "everything"])
def test_batch_invariant_log_probs(route: str, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in any batch, in any chunk, in another order, padded: the same bits of log-prob and entropy."""
    dtype = torch.float32 if route == "torch" else torch.bfloat16
    if route == "native" and not hasattr(torch.ops.r1kernels, "gemm_f32"):
        pytest.skip("the native product is not built")
    if route != "native":
        monkeypatch.setattr(gemm, "route", lambda *_: route)
    case = cases.make(head, 300, width=96, vocab=517, dtype=dtype)

    def run(index: Any, rows: int = 1000, **more: Any) -> tuple[Tensor, Tensor]:
        per_token = ("hidden", "token_ids", "temperature")
        part = {name: value[index] if name in per_token else value for name, value in case.items()}
        return linear_token_logprobs_and_entropy(
            **part, batch_invariant=True, chunk_bytes=cases.chunk_of(rows, 517, 96), **more
        )

    whole = run(slice(None))
    order = torch.randperm(300, generator=testing.generator(1))
    mask = torch.rand(300, generator=testing.generator(2)) < 0.6
    for k in range(2):
        for n in (0, 17, 128, 299):
            assert torch.equal(run(slice(n, n + 1))[k][0], whole[k][n])
        for rows in (1, 7, 128, 129):
            assert torch.equal(run(slice(0, 40), rows)[k], whole[k][:40])
        assert torch.equal(run(order)[k], whole[k][order])
        for capacity in (None, 250):
            assert torch.equal(run(slice(None), 50, mask=mask, capacity=capacity)[k], torch.where(mask, whole[k], 0))


# ---- modes around the call --------------------------------------------------------------------------------------


def everything_of(inputs: dict[str, Any]) -> list[Tensor]:
    """Loss, gradients and metrics of the policy loss, log-probs and their gradients, cross-entropy and its."""
    result, grads = cases.gradients(linear_grpo_loss, inputs, lambda r: r.loss)
    head = {name: value for name, value in inputs.items() if name in HEAD_KEYWORDS}
    logprobs, logprob_grads = cases.gradients(linear_token_logprobs, head, lambda value: value.square().sum())
    head["targets"] = head.pop("token_ids")
    nll, nll_grads = cases.gradients(linear_cross_entropy, head, lambda value: value)
    values = (grads, logprob_grads, nll_grads, result.metrics)
    return [result.loss, logprobs, nll, *(value for named in values for value in named.values())]


@slow_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["plain", "everything"])
def test_autocast_changes_no_bit(dtype: torch.dtype, head: str, implementation: str) -> None:
    inputs = make(head, "holes", dtype)
    expected = everything_of(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = everything_of(inputs)
    assert all(torch.equal(a, b) for a, b in zip(expected, inside, strict=True))


@slow_interpreted
@pytest.mark.parametrize("head", ["plain", "everything"])
def test_deterministic_mode_and_repetition_change_no_bit(head: str, implementation: str) -> None:
    inputs = make(head, "holes")
    expected = everything_of(inputs)
    again = everything_of(inputs)
    torch.use_deterministic_algorithms(False)
    try:
        free = everything_of(inputs)
    finally:
        torch.use_deterministic_algorithms(True)
    for a, b, c in zip(expected, again, free, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.not_on("triton", "cuda", reason="threads of a CPU")
def test_threads_change_no_bit_of_what_is_summed_by_row(on_threads: Callable[[int], None]) -> None:
    inputs = make("plain", "holes", torch.bfloat16)
    results = []
    for threads in (1, 2):
        on_threads(threads)
        results.append(linear_grpo_loss(**inputs).loss)
    testing.assert_within(results[1], results[0], 1e-6)


# ---- the products by themselves ---------------------------------------------------------------------------------


@contextlib.contextmanager
def routed(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    monkeypatch.setattr(gemm, "route", lambda *_: name)
    yield
    monkeypatch.undo()


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (5, 33, 7), (130, 64, 129), (3, 2100, 2), (2, 3, 2500)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("invariant", [False, True])
def test_products_keep_their_accumulators(
    m: int, k: int, n: int, dtype: torch.dtype, invariant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = testing.generator(m)
    a, b = torch.randn(m, k, generator=rng).to(dtype), torch.randn(k, n, generator=rng).to(dtype)
    exact, terms = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    with routed(monkeypatch, "copies"):
        for left, right in ((a, b), (a.t().contiguous().t(), b), (a, b.t().contiguous().t())):
            out = gemm.matmul(left, right, torch.full((m, n), torch.nan), batch_invariant=invariant)
            testing.assert_within(out, exact, 4 * testing.EPS32 * terms)
            gemm.matmul(left, right, out, accumulate=True, batch_invariant=invariant)
            testing.assert_within(out, 2 * exact, 8 * testing.EPS32 * terms)

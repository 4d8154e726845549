"""Every operation of hidden states on any shape, layout, chunk and mask, against the dense float64 oracles."""

from collections.abc import Callable
from typing import Any

import linear_cases as cases
import linear_policy_cases as policy
import pytest
import target_cases
import torch
from backends import slow_interpreted, without_cuda_kernels
from hypothesis import given
from hypothesis import strategies as st
from linear_distillation_cases import Case
from policy_cases import EXTRAS, KLS, OBJECTIVES, objective_of
from strategies import DTYPES, LAYOUTS, MASKS, SEEDS, tokens_mask
from torch import Tensor

from r1kernels import (
    linear_cross_entropy,
    linear_distillation_loss,
    linear_grpo_loss,
    linear_logits,
    linear_multi_target,
    linear_token_logprobs,
    linear_token_logprobs_and_entropy,
    linear_token_statistics,
    testing,
)
from r1kernels.ops.divergence import KINDS

HEADS = st.sampled_from(list(cases.HEADS))
CHUNKS = st.integers(1, 12)
WIDTHS, VOCABS = st.sampled_from([1, 3, 12, 16, 33]), st.one_of(st.integers(1, 40), st.sampled_from([129, 300]))
LEADS = st.one_of(st.tuples(st.integers(0, 6)), st.tuples(st.integers(0, 3), st.integers(0, 4)))
# Smoothing needs a statistic that has no CUDA kernel.
TERMS = [
    name for name, terms in target_cases.TERMS.items() if not ("label_smoothing" in terms and testing.KERNELS == "cuda")
]
KEEP_VALUES = st.sampled_from([name for name in LAYOUTS if name != "expanded"])
BAR = 4e-6


def bar_of(case: dict[str, Any]) -> float:
    """16-bit adapters round hidden @ A, as every adapter does."""
    dtype = case["hidden"].dtype
    return 16 * torch.finfo(dtype).eps if "lora" in case and dtype != torch.float32 else 3 * BAR


def assert_gradients(grads: dict[str, Tensor], expected: cases.Exact, case: dict[str, Any], factor: float = 1) -> None:
    """d logits are rounded once to a 16-bit dtype, which for float16 may be to a denormal number."""
    dtype = case["hidden"].dtype
    slack = bar_of(case) + (torch.finfo(dtype).eps if dtype != torch.float32 else 0)
    if dtype == torch.float16:
        matrices = [case["hidden"], case["weight"], *case.get("lora", ())]
        coarse = 6e-8 * max([1.0, *(float(m.abs().sum()) for m in matrices if m.numel())])
        expected = expected._replace(terms={name: terms + coarse / slack for name, terms in expected.terms.items()})
    cases.assert_gradients(grads, expected, factor * slack)


@st.composite
def heads(draw: st.DrawFn, names: st.SearchStrategy[str] = HEADS, leads: Any = LEADS) -> dict[str, Any]:
    """hidden, weight, token_ids and the options of a head, in any layout."""
    lead, dtype = draw(leads), draw(st.sampled_from(DTYPES))
    case = cases.make(draw(names), *lead, width=draw(WIDTHS), vocab=draw(VOCABS), dtype=dtype, seed=draw(SEEDS))
    ids = case["token_ids"]
    if ids.numel() > 1:
        ids.reshape(-1)[0], ids.reshape(-1)[-1] = 0, len(case["weight"]) - 1
    for name in ("hidden", "weight"):
        case[name] = LAYOUTS[draw(KEEP_VALUES)](case[name])
    return case


def upstream_of(shape: torch.Size, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    g, eta = cases.weights_of(*shape)
    counts = torch.ones(shape) if mask is None else (mask != 0)
    return g * counts, eta * counts


def both(g: Tensor, eta: Tensor) -> Callable[[Any], Tensor]:
    return lambda result: (g.float() * result[0] + eta.float() * result[1]).sum()


def chunk_of(case: dict[str, Any], rows: int) -> int:
    vocab, width = case["weight"].shape
    return cases.chunk_of(rows, vocab, width)


@given(case=heads(), rows=CHUNKS, masked=MASKS)
def test_log_probs_and_entropy(case: dict[str, Any], rows: int, masked: str, implementation: str) -> None:
    mask = tokens_mask(case["token_ids"].shape, masked, rows)
    counts = torch.ones(case["token_ids"].shape, dtype=torch.bool) if mask is None else mask != 0
    g, eta = upstream_of(case["token_ids"].shape, mask)
    dirty = case | {"hidden": testing.poisoned(case["hidden"], counts)} if mask is not None else case
    dirty = dirty | {"token_ids": testing.poisoned(case["token_ids"], counts)}
    how = {"mask": mask, "chunk_bytes": chunk_of(case, rows)}
    (logprobs, entropy), grads = cases.gradients(linear_token_logprobs_and_entropy, dirty, both(g, eta), **how)
    expected = cases.exact(case, g, eta)
    for found, exact in ((logprobs, expected.logprobs), (entropy, expected.entropy)):
        exact = torch.where(counts, exact, 0)
        testing.assert_within(found, exact, bar_of(case) * (1 + exact.abs() / 8))
    assert_gradients(grads, expected, case)
    assert not grads["hidden"][~counts].any()
    assert torch.equal(linear_token_logprobs(**dirty, **how).detach(), logprobs.detach())


@without_cuda_kernels
@pytest.mark.filterwarnings("ignore:r1kernels uses its reference implementation")
@given(case=heads(), rows=CHUNKS, masked=MASKS)
def test_statistics(case: dict[str, Any], rows: int, masked: str, implementation: str) -> None:
    mask = tokens_mask(case["token_ids"].shape, masked, rows)
    counts = torch.ones(case["token_ids"].shape, dtype=torch.bool) if mask is None else mask != 0
    g, eta = upstream_of(case["token_ids"].shape, mask)
    selected = testing.random_ids(*case["token_ids"].shape, 2, vocab=len(case["weight"]), seed=3)
    result, grads = cases.gradients(
        linear_token_statistics, case, lambda r: both(g, eta)((r.selected_logprobs[..., 0], r.lse)), mask=mask,
        selected_ids=selected, chunk_bytes=chunk_of(case, rows),
    )
    z = cases.logits(case)[2].reshape(*counts.shape, len(case["weight"]))
    exact = testing.token_statistics(z, case["token_ids"], selected)
    bar = bar_of(case) * (1 + z.abs().amax() / 8 if z.numel() else 1)
    for name in ("logprobs", "lse", "entropy", "sum_sq_probs", "mean_logit", "selected_logprobs"):
        wanted = getattr(exact, name)
        wanted = torch.where(counts[(..., *[None] * (wanted.dim() - counts.dim()))], wanted, 0)
        testing.assert_within(getattr(result, name), wanted, bar)
    slopes = {"selected_logprobs": torch.stack([g, 0 * g], -1), "lse": eta}
    grad_z = testing.token_statistics_gradient(z, case["token_ids"], slopes, selected)
    rough = grad_z.terms + (g.abs() + eta.abs())[..., None]
    vocab = len(case["weight"])
    named = cases.products(case, grad_z.value.reshape(-1, vocab), rough.reshape(-1, vocab))
    assert_gradients(grads, cases.Exact(exact.logprobs, exact.entropy, *named), case)


@given(case=heads(), rows=CHUNKS, masked=MASKS, reduction=st.sampled_from(["mean", "sum", "none"]),
       terms=st.sampled_from(TERMS))
def test_cross_entropy(
    case: dict[str, Any], rows: int, masked: str, reduction: str, terms: str, implementation: str
) -> None:
    mask = tokens_mask(case["token_ids"].shape, masked, rows)
    counts = torch.ones(case["token_ids"].shape, dtype=torch.bool) if mask is None else mask != 0
    given_case = {name: value for name, value in case.items() if name != "token_ids"}
    given_case["targets"] = torch.where(counts, case["token_ids"], -100)
    factors = target_cases.TERMS[terms]
    loss, grads = cases.gradients(
        linear_cross_entropy, given_case, lambda value: value.sum(), reduction=reduction,
        chunk_bytes=chunk_of(case, rows), **factors,
    )
    number = max(int(counts.sum()), 1)
    u = counts.reshape(1, -1).double() / (number if reduction == "mean" else 1)
    ids, z = case["token_ids"].reshape(1, -1), cases.logits(case)[2]
    losses = testing.target_losses(z, ids, **factors)[0].reshape(counts.shape) * counts
    exact = {"mean": losses.sum() / number, "sum": losses.sum(), "none": losses}[reduction]
    size = (1 + losses.abs().amax()) * (number if reduction == "sum" else 1) if losses.numel() else 1.0
    testing.assert_within(loss, exact, bar_of(case) * size * 2)
    grad = testing.target_gradient(z, ids, u, **factors)
    named = cases.products(case, grad.value, grad.terms + u.reshape(-1, 1) / len(case["weight"]))
    assert_gradients(grads, cases.Exact(losses, losses, *named), case, 2)


@without_cuda_kernels
@slow_interpreted
@given(head=HEADS, depths=st.integers(1, 3), shared=st.booleans(), dtype=st.sampled_from(DTYPES), seed=SEEDS,
       rows=CHUNKS, terms=st.sampled_from(TERMS))
def test_several_targets(
    head: str, depths: int, shared: bool, dtype: torch.dtype, seed: int, rows: int, terms: str, implementation: str
) -> None:
    case = target_cases.make(head, depths, shared, dtype, seed)
    weights = case["masks"].double()
    values, expected = target_cases.exact(case, weights, target_cases.TERMS[terms])
    losses, grads = cases.gradients(
        linear_multi_target, case, lambda value: value.sum(), reduction="none", chunk_bytes=chunk_of(case, rows),
        **target_cases.TERMS[terms],
    )
    testing.assert_within(losses, values, 2 * bar_of(case) * (1 + values.abs()))
    assert_gradients(grads, expected, case, 2)


@slow_interpreted
@given(name=st.sampled_from(list(OBJECTIVES)), kl=st.sampled_from(list(KLS)), extra=st.sampled_from(EXTRAS[:-1]),
       head=HEADS, seed=SEEDS, rows=st.integers(1, 40), whole=st.booleans())
def test_grpo_loss(
    name: str, kl: str, extra: str, head: str, seed: int, rows: int, whole: bool, implementation: str
) -> None:
    """Any objective from any head in chunks of any size, in float32."""
    inputs, objective = policy.make(head, extra, seed=seed), objective_of(name, kl, "token_mean")
    chunk_bytes = cases.chunk_of(rows, 37, 12)
    expected, gradients = policy.exact(inputs, objective)
    result, grads = cases.gradients(
        linear_grpo_loss, inputs, lambda r: r.loss, objective=objective, chunk_bytes=chunk_bytes, measure_all=whole
    )
    scale = float(expected.loss.terms) + float(expected.loss.value.abs())
    testing.assert_within(result.loss, expected.loss.value, 4e-5 * scale)
    if float(result.metrics["clip_fraction"]) == float(expected.metrics["clip_fraction"].value):
        cases.assert_gradients(grads, gradients, 4e-5)


@without_cuda_kernels
@slow_interpreted
@given(student=HEADS, teacher=HEADS, k=st.sampled_from([None, 1, 5]), kind=st.sampled_from(list(KINDS)),
       lead=st.tuples(st.integers(1, 3), st.integers(1, 4)), masked=MASKS, rows=CHUNKS)
def test_distillation(
    student: str, teacher: str, k: int | None, kind: str, lead: tuple[int, int], masked: str, rows: int,
    implementation: str,
) -> None:
    temperatures = ("temperature", "temperatures", "scale and temperatures")
    student, teacher = (("plain" if head in temperatures else head) for head in (student, teacher))
    case = Case(student, teacher, k, kind, lead=lead, mask=tokens_mask(lead, masked, rows))
    result, grads = case.run(chunk_bytes=8 * cases.chunk_of(rows, 37, 12))
    exact, expected = case.exact()
    testing.assert_within(result.loss, exact.loss, 2e-5 * (1 + exact.loss.abs()))
    for name, grad in grads.items():
        assert (grad.double() - expected[name]).norm() <= 5e-5 * expected[name].norm() + 1e-9, name
    # The same loss from the teacher's log-probs of all tokens, in another order.
    if k is None:
        logits = cases.logits(case.teacher)[1].reshape(*lead, -1) / case.settings["temperature"]
        ids, logprobs = testing.random_topk(logits, logits.shape[-1])
        other = linear_distillation_loss(
            **{f"student_{n}": case.student[n] for n in ("hidden", "weight")}, teacher_token_ids=ids,
            teacher_logprobs=logprobs, **{n: v for n, v in case.student.items() if n not in ("hidden", "weight")},
            **case.settings,
        )
        testing.assert_within(other.loss, exact.loss, 2e-4 * (1 + exact.loss.abs()))


@given(case=heads(names=st.sampled_from(["plain", "bias", "logit_scale", "softcap", "temperature"])))
def test_logits(case: dict[str, Any], implementation: str) -> None:
    del case["token_ids"]
    found, expected = linear_logits(**case), cases.logits(case)[2]
    terms = case["hidden"].double().abs().reshape(-1, case["hidden"].shape[-1]) @ case["weight"].double().abs().T + 4
    testing.assert_within(found.reshape(expected.shape), expected, 32 * testing.EPS32 * terms / 0.7)

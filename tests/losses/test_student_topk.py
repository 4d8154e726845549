"""Distillation on K tokens that are chosen from logits: against the oracle, ties, masks, and what must agree."""

import math
from typing import Any

import pytest
import torch
from backends import compiles, reference_only, shapes_only, without_cuda_kernels
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from r1kernels import DistillationLoss, backend, distillation_loss, testing
from r1kernels.ops.divergence import KINDS
from r1kernels.ops.topk_choice import TOP_K_OF
from r1kernels.ops.topk_teacher import TAILS

pytestmark = without_cuda_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# autograd of the reference rounds probabilities of up to 1 in float32.
SLACK = {"reference": 8.0, testing.KERNELS: testing.EPS32}


def gradient(logits: Tensor, *teacher: Tensor, **keywords: Any) -> tuple[DistillationLoss, Tensor]:
    source = logits.detach().clone().requires_grad_()
    result = distillation_loss(source, *teacher, **keywords)
    result.loss.backward()
    return result, source.grad


# ---- against the oracle -------------------------------------------------------------------------------------


def check(
    student: Tensor, teacher: Tensor, mask: Tensor | None, k: int, of: str, tail: str, kind: str, temperature: float,
    slack_of_gradient: float,
) -> None:
    (loss, metrics), grad = gradient(
        student, teacher, mask=mask, top_k=k, top_k_of=of, tail=tail, divergence=kind, beta=0.3, temperature=temperature
    )
    expected = testing.top_k_divergence(student, teacher, k, of, tail, kind, 0.3, temperature)
    counts = torch.ones(student.shape[:-1], dtype=torch.float64) if mask is None else mask.double()
    tokens = counts.sum().clamp(min=1)
    exact, slack = (((x * counts).sum() / tokens) for x in expected.value)
    testing.assert_within(loss, exact, 32 * testing.EPS32 * (slack + exact.abs()))
    weight = counts.unsqueeze(-1) / tokens
    terms = (16 * expected.grad.terms + slack_of_gradient) * weight
    testing.assert_within(grad, testing.Expected(expected.grad.value * weight, terms))
    tails = {"student_tail_mass": expected.student_tail, "teacher_tail_mass": expected.teacher_tail}
    for name, value in tails.items():
        if name in metrics:
            testing.assert_within(metrics[name], (value * counts).sum() / tokens, 1e-6)
    assert ("teacher_tail_mass" in metrics) == (tail != "renormalize")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("of", TOP_K_OF)
def test_loss_gradient_and_metrics(of: str, tail: str, kind: str, dtype: torch.dtype, implementation: str) -> None:
    student, teacher = testing.random_pair(2, 5, 300, dtype=dtype)
    mask = testing.random_ids(2, 5, vocab=2) == 1
    check(student, teacher, mask, 12, of, tail, kind, 0.7, SLACK[implementation])


@given(data=st.data())
def test_any_shape_number_mask_and_ties(data: st.DataObject) -> None:
    """Logits are multiples of 1/2, so that many are equal: all routes choose the smaller ids."""
    rows, vocab = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 80))
    seed, k = data.draw(st.integers(0, 1000)), data.draw(st.integers(1, vocab))
    student, teacher = (
        torch.randint(-6, 7, (rows, vocab), generator=testing.generator(seed + n)) / 2 for n in range(2)
    )
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    settings = (st.sampled_from(TOP_K_OF), st.sampled_from(TAILS), st.sampled_from(KINDS))
    of, tail, kind = (data.draw(each) for each in settings)
    for name in ("reference", testing.KERNELS):
        with backend(name):
            check(student, teacher, mask, k, of, tail, kind, 1.3, SLACK[name])


@reference_only
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("of", TOP_K_OF)
def test_gradcheck(of: str, tail: str, kind: str) -> None:
    student, teacher = (x.double() for x in testing.random_pair(3, 14, scale=1.5))
    mask = torch.tensor([True, False, True])

    def loss(logits: Tensor) -> Tensor:
        return distillation_loss(
            logits, teacher, mask=mask, top_k=4, top_k_of=of, tail=tail, divergence=kind, beta=0.3, temperature=0.8
        ).loss

    with backend("reference"):
        assert torch.autograd.gradcheck(loss, student.requires_grad_(), fast_mode=True)


# ---- what must agree ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", TAILS)
def test_given_ids_need_not_be_the_teachers(tail: str, kind: str, implementation: str) -> None:
    """The student's ids with the teacher's log-probs, as a server returns them, and as a function returns them."""
    student, teacher = testing.random_pair(2, 3, 60)
    ids = student.topk(5).indices
    logprobs = teacher.double().log_softmax(-1)
    asked = []

    def look_up(token_ids: Tensor, rows: Tensor) -> Tensor:
        asked.append((token_ids, rows))
        return logprobs.reshape(6, 60)[rows].gather(-1, token_ids)

    settings = {"divergence": kind, "tail": tail}
    results = [
        gradient(student, teacher, top_k=5, **settings),
        gradient(student, teacher_logprobs=look_up, top_k=5, **settings),
        gradient(student, teacher_token_ids=ids, teacher_logprobs=logprobs.gather(-1, ids), **settings),
    ]
    assert torch.equal(asked[0][0], ids.reshape(6, 5)) and torch.equal(asked[0][1], torch.arange(6))
    (first, first_grad), *others = results
    for other, grad in others:
        testing.assert_within(other.loss, first.loss, 32 * testing.EPS32 * (1 + first.loss.abs()))
        testing.assert_within(grad, first_grad, 32 * testing.EPS32)
        assert set(other.metrics) == set(first.metrics)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_chosen_is_the_full_divergence(kind: str, tail: str, implementation: str) -> None:
    student, teacher = testing.random_pair(5, 40)
    (full, _), full_grad = gradient(student, teacher, divergence=kind)
    for of in TOP_K_OF:
        (loss, _), grad = gradient(student, teacher, divergence=kind, top_k=40, top_k_of=of, tail=tail)
        testing.assert_within(loss, full, 32 * testing.EPS32 * (1 + full))
        testing.assert_within(grad, full_grad, 64 * testing.EPS32)


def test_renormalized_gradients_are_0_outside_the_list(implementation: str) -> None:
    student, teacher = testing.random_pair(4, 50)
    _, grad = gradient(student, teacher, top_k=6, tail="renormalize", divergence="reverse_kl")
    listed = torch.zeros_like(grad, dtype=torch.bool).scatter(-1, student.topk(6).indices, True)
    inside = torch.where(listed, grad, 0)
    testing.assert_within(torch.where(listed, 0, grad), torch.zeros_like(grad), 4 * testing.EPS32)
    testing.assert_within(inside.sum(-1), torch.zeros(4), 4 * testing.EPS32)


def test_a_truncated_sum_can_be_negative(implementation: str) -> None:
    """The student spreads its probability over tokens where the teacher has more: no divergence, and so documented."""
    student, teacher = torch.zeros(1, 20), torch.zeros(1, 20)
    teacher[0, :2] = 3.0
    losses = {
        tail: distillation_loss(student, teacher, top_k=2, tail=tail, divergence="reverse_kl").loss for tail in TAILS
    }
    assert losses["truncate"] < -0.05 and losses["bucket"] > 0.1 and abs(losses["renormalize"]) < 1e-6


@pytest.mark.parametrize("tail", TAILS)
def test_a_token_that_the_teacher_forbids(tail: str, implementation: str) -> None:
    """Reverse KL is infinite and has gradient 0; the token is not taken for an absent entry."""
    student, teacher = testing.random_pair(3, 30)
    teacher[1, student[1].argmax()] = -math.inf
    for of in ("student", "union"):
        (loss, metrics), grad = gradient(
            student, teacher, top_k=4, top_k_of=of, tail=tail, divergence="reverse_kl"
        )
        assert loss == math.inf and metrics["nonfinite_tokens"] == 1
        assert (grad.abs().amax(-1) > 1e-4).tolist() == [True, False, True]
        (loss, _), grad = gradient(student, teacher, top_k=4, top_k_of=of, tail=tail)
        assert loss.isfinite() and (grad.abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_renormalize(kind: str, implementation: str) -> None:
    """The teacher forbids all chosen tokens: the divergence is infinite, with gradient 0."""
    student, teacher = testing.random_pair(2, 30)
    teacher[1, student[1].topk(3).indices] = -math.inf
    (loss, metrics), grad = gradient(student, teacher, top_k=3, tail="renormalize", divergence=kind)
    assert loss == math.inf and metrics["nonfinite_tokens"] == 1
    assert grad.isfinite().all() and grad[0].any()
    testing.assert_within(grad[1], torch.zeros(30), testing.EPS32)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("of", TOP_K_OF)
def test_nothing_behind_the_mask_matters(of: str, tail: str, implementation: str) -> None:
    student, teacher = testing.random_pair(2, 3, 30)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    results = []
    for junk in (False, True):
        pair = [testing.poisoned(x, mask) if junk else x for x in (student, teacher)]
        results.append(gradient(*pair, mask=mask, top_k=4, top_k_of=of, tail=tail, divergence="jsd"))
    (clean, clean_grad), (dirty, dirty_grad) = results
    assert torch.equal(clean.loss, dirty.loss) and torch.equal(clean_grad, dirty_grad) and not dirty_grad[~mask].any()
    assert all(torch.equal(clean.metrics[name], value) for name, value in dirty.metrics.items())


def test_padding_of_the_vocabulary_is_not_chosen(implementation: str) -> None:
    student, teacher = testing.random_pair(3, 30)
    (loss, _), grad = gradient(student[:, :25], teacher[:, :25], top_k=4, top_k_of="union")
    student[:, 25:], teacher[:, 25:] = 1e3, math.nan
    (padded, _), padded_grad = gradient(student, teacher, top_k=4, top_k_of="union", vocab_size=25)
    assert torch.equal(loss, padded) and torch.equal(grad, padded_grad[:, :25]) and not padded_grad[:, 25:].any()


# ---- compile and fakes --------------------------------------------------------------------------------------


@compiles
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
@pytest.mark.parametrize(("of", "tail"), [("student", "bucket"), ("union", "renormalize"), ("teacher", "truncate")])
def test_compile_fullgraph(of: str, tail: str, implementation: str) -> None:
    student, teacher = testing.random_pair(3, 4, 33)
    mask = testing.random_ids(3, 4, vocab=2) == 1

    def run(logits: Tensor) -> DistillationLoss:
        return distillation_loss(
            logits * 2, teacher, mask=mask, top_k=5, top_k_of=of, tail=tail, divergence="reverse_kl", temperature=0.8
        )

    results = []
    for function in (run, testing.compiled(run)):
        source = student.clone().requires_grad_()
        loss, metrics = function(source)
        loss.backward()
        results.append((loss.detach(), source.grad, *metrics.values()))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-6, atol=1e-7)


@shapes_only
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("of", TOP_K_OF)
def test_fakes_have_the_shapes_and_dtypes_of_results(of: str, device: str) -> None:
    with FakeTensorMode():
        student = torch.empty(2, 4, 17, dtype=torch.bfloat16, device=device).requires_grad_()
        loss, metrics = distillation_loss(student, student.detach(), top_k=3, top_k_of=of)
        (grad,) = torch.autograd.grad(loss, student)
    assert (grad.shape, grad.dtype, grad.device) == (student.shape, torch.bfloat16, student.device)
    assert loss.shape == () and all(m.shape == () for m in metrics.values())

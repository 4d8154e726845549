"""distillation_loss: against the oracle and against others' formulas, masks, metrics, top-k teachers."""

import itertools
import math
from typing import Any

import pytest
import torch
from backends import compiles, reference_only, shapes_only, slow_interpreted, without_cuda_kernels
from torch import Tensor
from torch._subclasses import FakeTensorMode

from r1kernels import DistillationLoss, backend, distillation_loss, testing
from r1kernels.ops.divergence import KINDS

pytestmark = without_cuda_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gradient(logits: Tensor, *teacher: Tensor, **keywords: Any) -> tuple[DistillationLoss, Tensor]:
    source = logits.detach().clone().requires_grad_()
    result = distillation_loss(source, *teacher, **keywords)
    result.loss.backward()
    return result, source.grad


def topk_arguments(logits: Tensor, k: int, temperature: float = 1.0) -> dict[str, Tensor]:
    ids, logprobs = testing.random_topk(logits, k, temperature)
    return {"teacher_token_ids": ids, "teacher_logprobs": logprobs}


# ---- value, gradient and metrics ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_loss_gradient_and_metrics(masked: bool, kind: str, dtype: torch.dtype, implementation: str) -> None:
    student, teacher = testing.random_pair(3, 5, 700, dtype=dtype)
    mask = testing.random_ids(3, 5, vocab=2) if masked else None  # integers: nonzero counts
    counts = torch.ones(3, 5, dtype=torch.float64) if mask is None else mask.double()
    tokens = counts.sum()
    ids, logprobs = testing.random_topk(teacher, 20, 0.7)
    given = (
        (testing.divergence(student, teacher, kind, 0.3, 0.7), "teacher_entropy", (teacher,), {}),
        (testing.topk_divergence(student, ids, logprobs, kind, 0.3, 0.7), "teacher_tail_mass", (),
         {"teacher_token_ids": ids, "teacher_logprobs": logprobs}),
    )
    for expected, name, positional, keywords in given:
        (loss, metrics), grad = gradient(
            student, *positional, **keywords, mask=mask, divergence=kind, beta=0.3, temperature=0.7
        )
        value = (expected.value.value * counts).sum() / tokens
        slack = 32 * testing.EPS32 if implementation == "reference" else 4e-7
        testing.assert_within(loss, value, slack * (1 + value))
        exact = expected.grad.value * counts.unsqueeze(-1) / tokens
        terms = (expected.grad.terms + (16 if implementation == "reference" else 0)) * counts.unsqueeze(-1) / tokens
        testing.assert_within(grad, testing.Expected(exact, terms))
        assert grad.dtype == dtype and loss.dtype == torch.float32
        assert metrics["tokens"] == tokens and metrics["nonfinite_tokens"] == 0
        assert torch.equal(metrics["divergence"], loss)
        for metric, rows in (("student_entropy", expected.student_entropy), (name, expected.teacher_entropy)):
            testing.assert_within(metrics[metric], (rows * counts).sum() / tokens, 4e-6)
        assert all(m.dim() == 0 and m.dtype == torch.float32 and not m.requires_grad for m in metrics.values())
        other = {"student_tail_mass"} if keywords else set()
        assert set(metrics) == {"tokens", "divergence", "student_entropy", name, "nonfinite_tokens"} | other


@reference_only
def test_float64_runs_on_the_reference() -> None:
    student, teacher = testing.random_pair(4, 50)
    with backend("reference"):
        for pair in ((student.double(), teacher), (student, teacher.double())):
            (loss, _), grad = gradient(*pair)
            assert loss.dtype == torch.float64 and grad.dtype == pair[0].dtype
            exact = testing.divergence(*pair, "forward_kl").value.value.mean()
            testing.assert_within(loss, exact, 1e-13)


def test_the_teacher_gets_no_gradient(implementation: str) -> None:
    student, teacher = (x.detach().requires_grad_() for x in testing.random_pair(4, 50))
    distillation_loss(student, teacher).loss.backward()
    assert student.grad is not None and teacher.grad is None
    ids, logprobs = testing.random_topk(teacher.detach(), 4)
    logprobs.requires_grad_()
    distillation_loss(student, teacher_token_ids=ids, teacher_logprobs=logprobs).loss.backward()
    assert logprobs.grad is None


def test_differentiable_once_only() -> None:
    student, teacher = testing.random_pair(3, 11)
    student.requires_grad_()
    for keywords in ({"teacher_logits": teacher}, topk_arguments(teacher, 3)):
        with backend(testing.KERNELS):
            loss = distillation_loss(student, **keywords).loss.square()
            (grad,) = torch.autograd.grad(loss, student, create_graph=True)
        with pytest.raises(RuntimeError, match="not differentiable twice"):
            grad.sum().backward()


# ---- the formulas of others ---------------------------------------------------------------------------------


def test_forward_kl_is_torch_kl_div(implementation: str) -> None:
    student, teacher = testing.random_pair(6, 500)
    (loss, _), grad = gradient(student, teacher, temperature=2.0)
    source = student.double().requires_grad_()
    log_p, log_q = (source / 2).log_softmax(-1), (teacher.double() / 2).log_softmax(-1)
    theirs = torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    theirs.backward()
    testing.assert_within(loss, theirs, 16 * testing.EPS32)
    testing.assert_within(grad, source.grad, 4 * testing.EPS32)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_that_of_generalised_knowledge_distillation(beta: float, implementation: str) -> None:
    """Eq. 2 of arXiv 2306.13649, and the limits at which trainers switch to the KL divergences."""
    student, teacher = testing.random_pair(6, 500)
    mixture = beta * teacher.double().softmax(-1) + (1 - beta) * student.double().softmax(-1)
    kl = torch.nn.functional.kl_div
    parts = [
        kl(mixture.log(), x.double().log_softmax(-1), log_target=True, reduction="batchmean")
        for x in (teacher, student)
    ]
    loss = distillation_loss(student, teacher, divergence="jsd", beta=beta).loss
    testing.assert_within(loss, beta * parts[0] + (1 - beta) * parts[1], 4 * testing.EPS32)


# ---- top-k teachers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_words_listed_is_the_full_divergence(dtype: torch.dtype, kind: str, implementation: str) -> None:
    student, teacher = testing.random_pair(5, 60, dtype=dtype)
    whole, listed = {"teacher_logits": teacher}, topk_arguments(teacher, 60)
    (full, _), full_grad = gradient(student, divergence=kind, **whole)
    (topk, metrics), grad = gradient(student, divergence=kind, **listed)
    testing.assert_within(topk, full, 16 * testing.EPS32 * (1 + full))
    testing.assert_within(grad, full_grad, 32 * testing.EPS32 + torch.finfo(dtype).eps * full_grad.abs())
    assert metrics["student_tail_mass"] == 0 and metrics["teacher_tail_mass"] <= 1e-6


@slow_interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_list_is_a_closer_lower_bound(kind: str, implementation: str) -> None:
    student, teacher = testing.random_pair(20, 300)
    full = distillation_loss(student, teacher, divergence=kind).loss
    losses = [
        distillation_loss(student, **topk_arguments(teacher, k), divergence=kind).loss for k in (1, 2, 5, 20, 100, 300)
    ]
    losses.append(full)
    for shorter, longer in itertools.pairwise(losses):
        assert shorter <= longer * (1 + 1e-5)
    assert losses[0] < full


@slow_interpreted
def test_order_of_the_list_and_absent_entries_do_not_matter(implementation: str) -> None:
    student, teacher = testing.random_pair(5, 60)
    ids, logprobs = testing.random_topk(teacher, 8)
    logprobs[2, 3:] = -math.inf
    padded_ids, padded = (torch.cat([x, x[:, :4]], -1) for x in (ids, logprobs))
    padded[:, 8:], padded_ids[:, 8:] = -math.inf, torch.tensor([-1, 3, 3, 2**40])
    padded_ids[2, 3:] = -1
    order = torch.randperm(12, generator=testing.generator(3))
    for kind in KINDS:
        results = []
        for given in ((ids, logprobs), (padded_ids, padded), (padded_ids[:, order], padded[:, order])):
            (loss, metrics), grad = gradient(
                student, teacher_token_ids=given[0], teacher_logprobs=given[1], divergence=kind
            )
            results.append((loss, grad, metrics["teacher_tail_mass"], metrics["student_tail_mass"]))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                testing.assert_within(b, a, 4 * testing.EPS32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_with_nothing_listed_says_nothing(kind: str, implementation: str) -> None:
    student, teacher = testing.random_pair(3, 20)
    ids, logprobs = testing.random_topk(teacher, 4)
    ids[1], logprobs[1] = -1, -math.inf
    (loss, metrics), grad = gradient(student, teacher_token_ids=ids, teacher_logprobs=logprobs, divergence=kind)
    assert loss.isfinite() and metrics["nonfinite_tokens"] == 0
    assert (grad.abs().amax(-1) > 1e-3).tolist() == [True, False, True]
    testing.assert_within(grad[1], torch.zeros(20), testing.EPS32 if implementation == "reference" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_without_a_tail(kind: str, implementation: str) -> None:
    """It counts as one of 1e-7: the student's tail is pushed down, and nothing is infinite."""
    student, ids = testing.random_logits(2, 20), torch.tensor([[3, 4], [5, 6]])
    logprobs = torch.tensor([[0.0, -math.inf], [0.0, -math.inf]])
    listed = {"teacher_token_ids": ids, "teacher_logprobs": logprobs}
    inside = torch.zeros(2, 20, dtype=torch.bool).scatter_(-1, ids[:, :1], True)
    (loss, metrics), grad = gradient(student, **listed, divergence=kind)
    p = student.double().softmax(-1)[inside]
    q = torch.full_like(p, 1 - 1e-7)
    pair = torch.stack([p, 1 - p], -1).log(), torch.stack([q, 1 - q], -1).log()
    testing.assert_within(loss, testing.divergence(*pair, kind).value.value.mean(), 16 * testing.EPS32 * (1 + loss))
    assert metrics["nonfinite_tokens"] == 0 and abs(metrics["teacher_tail_mass"] * 1e7 - 1) < 1e-6
    assert (grad[~inside] > 0).all() and (grad[inside] < 0).all()


@slow_interpreted
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [20, 999, 1000])
def test_confident_teachers_are_at_a_finite_distance(k: int, kind: str, implementation: str) -> None:
    """Their log-probs in float32 add up to 1 give or take a rounding, which is not to decide over inf."""
    student, teacher = testing.random_logits(64, 1000, scale=1.0), testing.random_logits(64, 1000, scale=1.0, seed=1)
    teacher[torch.arange(64), testing.random_ids(64, vocab=1000)] += 25
    top = teacher.log_softmax(-1).topk(k)
    logprobs = top.values.double().log_softmax(-1) + torch.linspace(-3e-7, 3e-7, 64).double().unsqueeze(-1)
    for x, far in ((student, True), (teacher, False)):
        (full, _), _ = gradient(x, teacher, divergence=kind)
        (loss, metrics), grad = gradient(x, teacher_token_ids=top.indices, teacher_logprobs=logprobs, divergence=kind)
        assert metrics["nonfinite_tokens"] == 0 and grad.isfinite().all()
        # A tail of up to 3e-7 against one of 1e-12 (K = 999), at most.
        assert -1e-7 <= loss <= full * (1 + 1e-6) + 5e-6
        assert loss > 0.75 * full if far else loss < 5e-6
        expected = testing.topk_divergence(x, top.indices, logprobs, kind)
        testing.assert_within(loss, expected.value.value.mean(), 32 * testing.EPS32 * (1 + loss))
        exact = expected.grad.value / 64
        testing.assert_within(grad, exact, 32 * testing.EPS32 * (expected.grad.terms + 1) / 64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_floor_of_a_teachers_tail_is_no_jump(kind: str) -> None:
    student, ids = testing.random_logits(3, 20).double(), torch.tensor([[3, 4]]).expand(3, 2)
    with backend("reference"):
        losses = []
        for tail in (1.001e-7, 0.999e-7, 0.0, -1e-7, -1e-3):  # the sum is 1 - tail
            logprobs = (torch.tensor([0.7, 0.3], dtype=torch.float64) * (1 - tail)).log().expand(3, 2)
            losses.append(
                distillation_loss(student, teacher_token_ids=ids, teacher_logprobs=logprobs, divergence=kind).loss
            )
    above, *floored = (loss.item() for loss in losses)
    assert all(loss == pytest.approx(floored[0], rel=1e-12) for loss in floored)
    assert above == pytest.approx(floored[0], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_without_a_tail(kind: str, implementation: str) -> None:
    """All words outside the list forbidden: finite where the teacher's tail is none within rounding."""
    student = testing.random_logits(2, 20)
    ids = torch.tensor([[3, 4], [5, 6]])
    student = torch.full_like(student, -math.inf).scatter_(-1, ids, student.gather(-1, ids))
    q = torch.tensor([0.7, 0.3], dtype=torch.float64)
    for total, finite in ((1.0, True), (1 - 1e-5, True), (0.5, kind != "forward_kl")):
        logprobs = (q * total).log().float().expand(2, 2)
        (loss, _), grad = gradient(student, teacher_token_ids=ids, teacher_logprobs=logprobs, divergence=kind)
        assert loss.isfinite() == finite
        outside = torch.ones_like(grad, dtype=torch.bool).scatter_(-1, ids, False)
        assert grad.isfinite().all() and not grad[outside].any()


def test_log_probs_above_zero_by_rounding(implementation: str) -> None:
    student = testing.random_logits(2, 20)
    ids = torch.tensor([[3, 4], [5, 6]])

    def loss(*logprobs: float) -> Tensor:
        given = torch.tensor([logprobs, logprobs])
        return distillation_loss(student, teacher_token_ids=ids, teacher_logprobs=given).loss

    torch.testing.assert_close(loss(9e-4, -math.inf), loss(0.0, -math.inf), rtol=0, atol=0)
    torch.testing.assert_close(loss(math.log(0.5025), math.log(0.5025)), loss(math.log(0.5), math.log(0.5)))


# ---- masks, normalizers, weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("topk", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_all_masked_and_no_tokens(kind: str, topk: bool, implementation: str) -> None:
    for shape in ((2, 3), (0, 3)):
        student = torch.full((*shape, 7), math.nan)
        teacher = {"teacher_logits": student}
        if topk:
            teacher = {"teacher_token_ids": torch.full((*shape, 2), -5), "teacher_logprobs": student[..., :2]}
        mask = torch.zeros(shape, dtype=torch.bool)
        (loss, metrics), grad = gradient(student, **teacher, mask=mask, divergence=kind)
        assert loss == 0 and grad.shape == student.shape and not grad.any()
        assert not any(m.any() for m in metrics.values())


@pytest.mark.parametrize("topk", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_junk_behind_the_mask_under_an_infinite_upstream_gradient(kind: str, topk: bool, implementation: str) -> None:
    """0 * inf must not reach a masked row."""
    student, teacher = testing.random_pair(2, 3, 30)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    given = topk_arguments(teacher, 4) if topk else {"teacher_logits": teacher}
    given = {name: testing.poisoned(value, mask) for name, value in given.items()}
    student = testing.poisoned(student, mask).requires_grad_()
    loss = distillation_loss(student, **given, mask=mask, divergence=kind).loss
    (grad,) = torch.autograd.grad(loss, student, torch.tensor(math.inf))
    assert loss.isfinite() and not grad[~mask].any() and not grad[mask].isfinite().all()


@pytest.mark.parametrize("number", [3, 7.5, torch.tensor(7.5), torch.tensor(3)])
@pytest.mark.parametrize("topk", [False, True])
def test_the_normalizer_replaces_the_count_and_adds_up(topk: bool, number: Any, implementation: str) -> None:
    student, teacher = testing.random_pair(6, 30)
    given = topk_arguments(teacher, 4) if topk else {"teacher_logits": teacher}
    (whole, metrics), whole_grad = gradient(student, **given, normalizer=number)
    mean, _ = gradient(student, **given)
    torch.testing.assert_close(whole * float(number), mean.loss * 6)
    torch.testing.assert_close(metrics["divergence"], mean.loss)
    parts = [
        gradient(student[rows], **{k: v[rows] for k, v in given.items()}, normalizer=number)
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(part.loss for part, _ in parts), whole)
    testing.assert_within(torch.cat([grad for _, grad in parts]), whole_grad, testing.EPS32 * whole_grad.abs())


def test_nonfinite_tokens_are_counted(implementation: str) -> None:
    student, teacher = testing.random_pair(4, 30)
    student[1, 3], student[2, 4], mask = math.nan, -math.inf, torch.tensor([True, True, True, False])
    student[3] = math.nan
    (loss, metrics), grad = gradient(student, teacher, mask=mask)
    assert loss.isnan() and metrics["nonfinite_tokens"] == 2 and metrics["tokens"] == 3
    assert grad.isfinite().all(-1).tolist() == [True, False, True, True]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("topk", [False, True])
def test_every_nan_of_a_gradient_is_counted(topk: bool, kind: str, implementation: str) -> None:
    """And tokens at an infinite distance, whose gradient is finite."""
    student, teacher = testing.random_pair(6, 30)
    student[0, 3], student[1, 4], student[2] = math.nan, math.inf, -math.inf
    student[3, teacher[3].argmax()] = teacher[4, 5] = -math.inf
    given = topk_arguments(teacher, 8) if topk else {"teacher_logits": teacher}
    (_, metrics), grad = gradient(student, **given, divergence=kind)
    alone = [distillation_loss(student[t], **{n: v[t] for n, v in given.items()}, divergence=kind) for t in range(6)]
    finite = [bool(result.loss.isfinite()) for result in alone]
    infinite = {3} if kind == "forward_kl" else {4} if kind == "reverse_kl" and not topk else set()
    assert finite == [t > 2 and t not in infinite for t in range(6)]
    assert metrics["nonfinite_tokens"] == 3 + len(infinite) == finite.count(False)
    assert grad.isfinite().all(-1).tolist() == [t > 2 for t in range(6)]


def test_temperature_has_no_factor_of_its_square(implementation: str) -> None:
    student, teacher = testing.random_pair(4, 30)
    torch.testing.assert_close(
        distillation_loss(student, teacher, temperature=2.0).loss, distillation_loss(student / 2, teacher / 2).loss
    )


# ---- compile and fakes --------------------------------------------------------------------------------------


@compiles
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
@pytest.mark.parametrize("topk", [False, True])
def test_compile_fullgraph(topk: bool, implementation: str) -> None:
    student, teacher = testing.random_pair(3, 4, 33)
    given = topk_arguments(teacher, 5) if topk else {"teacher_logits": teacher}
    mask = testing.random_ids(3, 4, vocab=2) == 1

    def run(logits: Tensor) -> DistillationLoss:
        return distillation_loss(logits * 2, **given, mask=mask, divergence="jsd", temperature=0.8)

    results = []
    for function in (run, testing.compiled(run)):
        source = student.clone().requires_grad_()
        loss, metrics = function(source)
        loss.backward()
        results.append((loss.detach(), source.grad, *metrics.values()))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@shapes_only
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("topk", [False, True])
def test_fakes_have_the_shapes_and_dtypes_of_results(topk: bool, dtype: torch.dtype, device: str) -> None:
    with FakeTensorMode():
        student = torch.empty(2, 4, 17, dtype=dtype, device=device).requires_grad_()
        ids = torch.zeros(2, 4, 3, dtype=torch.int64, device=device)
        given = {"teacher_token_ids": ids, "teacher_logprobs": ids.float()} if topk else {"teacher_logits": student}
        loss, metrics = distillation_loss(student, **given)
        (grad,) = torch.autograd.grad(loss, student)
    assert (grad.shape, grad.dtype, grad.device) == (student.shape, dtype, student.device)
    assert loss.shape == () and loss.dtype == torch.float32 and loss.device.type == device
    assert all(m.shape == () for m in metrics.values())

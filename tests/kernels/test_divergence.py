"""Divergence of two rows of logits: gradcheck, float64 oracle, identities, opcheck, compile. Edges: next file."""

import math

import pytest
import torch
from backends import compiles, reference_only, registration_only, slow_interpreted, without_cuda_kernels
from divergence_cases import BETAS, DTYPES, KINDS, check
from torch import Tensor

from r1kernels import backend, testing
from r1kernels.ops import divergence, topk_divergence, topk_teacher

pytestmark = without_cuda_kernels

DISTANCES = [1e-3, 0.1, 1.0, 6.0]  # from nearly equal to hardly overlapping


def make_teacher(logits: Tensor, k: int, mask: Tensor | None = None) -> topk_teacher.Teacher:
    return topk_teacher.make_teacher(*testing.random_topk(logits, k), mask)


# ---- 1. gradcheck -----------------------------------------------------------------------------------------


@reference_only
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("kind", "beta"), BETAS)
def test_reference_gradcheck(kind: str, beta: float, masked: bool, temperature: float) -> None:
    student, teacher = (x.double() for x in testing.random_pair(3, 4, 9, scale=2))
    mask = testing.random_ids(3, 4, vocab=2) == 1 if masked else None
    student.requires_grad_()

    def full(x: Tensor) -> Tensor:
        return divergence.reference(x, teacher, mask, kind, beta, temperature)[0]

    def topk(x: Tensor) -> Tensor:
        return topk_divergence.reference(x, make_teacher(teacher, 4, mask), mask, kind, beta, temperature)[0]

    assert torch.autograd.gradcheck(full, student)
    assert torch.autograd.gradcheck(topk, student)


# ---- 2. against the float64 oracle ------------------------------------------------------------------------


@reference_only
@pytest.mark.parametrize(("kind", "beta"), BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
def test_reference_in_float64_is_the_oracle(kind: str, beta: float, temperature: float) -> None:
    student, teacher = (x.double() for x in testing.random_pair(5, 300, distance=2.0))
    student.requires_grad_()
    expected = testing.divergence(student, teacher, kind, beta, temperature)
    with backend("reference"):
        value, student_entropy, teacher_entropy = divergence.divergence(
            student, teacher, None, kind, beta, temperature
        )
    (grad,) = torch.autograd.grad(value.sum(), student)
    eps = 32 * torch.finfo(torch.float64).eps * (student.detach().abs().max() / temperature + 1)
    testing.assert_within(value, expected.value.value, eps)
    testing.assert_within(grad, expected.grad.value, eps * (expected.grad.terms + 1 / temperature))
    testing.assert_within(student_entropy, expected.student_entropy, eps)
    testing.assert_within(teacher_entropy, expected.teacher_entropy, eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 16, 33, 127, 2047, 2048, 2049, 5000])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("kind", "beta"), BETAS)
def test_values_and_gradients(kind: str, beta: float, distance: float, vocab: int, dtype: torch.dtype) -> None:
    check(*testing.random_pair(4, vocab, dtype=dtype, distance=distance, seed=vocab), kind, beta)


@pytest.mark.not_on("triton", "cuda", reason="instruction sets of a CPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(("kind", "beta"), BETAS)
def test_instruction_sets_keep_to_the_same_budget(
    isa: str, kind: str, beta: float, step: int, dtype: torch.dtype
) -> None:
    for vocab, distance in ((5, 1.0), (33, 0.01), (2049, 1.0), (3000, 8.0)):
        pair = testing.random_pair(4, vocab * step, dtype=dtype, distance=distance)
        check(*(x[:, ::step] for x in pair), kind, beta, temperature=0.7)


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_may_differ(kind: str, teacher_dtype: torch.dtype, student_dtype: torch.dtype) -> None:
    student, teacher = testing.random_pair(4, 2100)
    check(student.to(student_dtype), teacher.to(teacher_dtype), kind, 0.3)


@pytest.mark.parametrize("temperature", [0.05, 0.7, 2.5, 1e3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_temperatures(kind: str, dtype: torch.dtype, temperature: float) -> None:
    check(*testing.random_pair(4, 1000, dtype=dtype), kind, 0.3, temperature)


# Each kind and dtype has the same passes over a row; interpreted they take seconds.
SLOW = [pytest.mark.slow_on("triton", reason="passes over a whole vocabulary, which another kind or dtype runs")]


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=SLOW * (dtype == torch.float32)) for dtype in DTYPES])
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=SLOW * (kind != "jsd")) for kind in KINDS])
def test_the_vocabulary_of_a_real_model(kind: str, dtype: torch.dtype) -> None:
    student, teacher = testing.random_pair(2, 151_936, dtype=dtype, scale=8)
    student[1, 777] = teacher[1, 99] = 32.0  # each is nearly certain, of different tokens
    check(student, teacher, kind, 0.3)


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_common_offset_costs_nothing(kind: str, offset: float) -> None:
    student, teacher = testing.random_pair(3, 300)
    check(student + offset, teacher, kind)
    check(student, teacher - offset, kind)


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize(("kind", "beta"), BETAS)
def test_nearly_equal_distributions_keep_their_distance(kind: str, beta: float, distance: float) -> None:
    """A divergence of 1e-13 is still good to 1e-5 of itself: log q - log p in fp32 would be nothing but noise."""
    student, teacher = testing.random_pair(4, 4000, distance=distance, scale=1.0)
    exact = testing.divergence(student, teacher, kind, beta).value.value
    with backend(testing.KERNELS):
        value, *_ = divergence.divergence(student, teacher, None, kind, beta, 1.0)
    lse_squared = testing.EPS32**2
    testing.assert_within(value, exact, 1e-5 * exact + lse_squared)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 2, 20, 300])
def test_topk(k: int, kind: str, dtype: torch.dtype) -> None:
    student, teacher_logits = testing.random_pair(5, 300, dtype=dtype)
    ids, logprobs = testing.random_topk(teacher_logits, k)
    g = torch.randn(5, generator=testing.generator(1))
    for temperature in (1.0, 0.7):
        source = student.clone().requires_grad_()
        expected = testing.topk_divergence(student, ids, logprobs, kind, 0.3, temperature)
        with backend(testing.KERNELS):
            teacher = topk_teacher.make_teacher(ids, logprobs, None)
            value, entropy, student_tail, teacher_tail = topk_divergence.topk_divergence(
                source, teacher, None, kind, 0.3, temperature
            )
        (grad,) = torch.autograd.grad(value, source, g)
        testing.assert_within(value, expected.value)
        weight = g.double().unsqueeze(-1)
        testing.assert_within(
            grad, testing.Expected(weight * expected.grad.value, weight.abs() * expected.grad.terms)
        )
        testing.assert_within(entropy, expected.student_entropy, 4e-6)
        testing.assert_within(teacher_tail, expected.teacher_entropy, testing.EPS32 if k < 300 else 1e-6)
        p = (student.double() / temperature).softmax(-1)
        listed = torch.zeros_like(p, dtype=torch.bool).scatter(-1, ids, True)
        tail = torch.where(listed, 0, p).sum(-1)
        testing.assert_within(student_tail, tail, 4e-6 * tail)  # relatively: not 1 - sum


def test_a_small_tail_of_the_student_does_not_cancel() -> None:
    """1 - p of the listed tokens is 1e-13: as 1 - sum it is 0, and reverse KL would lose it."""
    student = torch.zeros(1, 50)
    student[0, 7] = 34.0
    teacher = topk_teacher.make_teacher(torch.tensor([[7]]), torch.tensor([[-1e-3]]), None)
    with backend(testing.KERNELS):
        value, _, tail, _ = topk_divergence.topk_divergence(student, teacher, None, "forward_kl", 0.5, 1.0)
    exact = 49 * math.exp(-34.0) / (1 + 49 * math.exp(-34.0))
    assert abs(tail.item() / exact - 1) < 1e-6
    q_rest = -math.expm1(float(torch.tensor(-1e-3)))
    expected = q_rest * math.log(q_rest / exact) + (1 - q_rest) * float(torch.tensor(-1e-3))
    assert abs(value.item() / expected - 1) < 1e-6


# ---- identities -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_who_is_the_teacher_is_at_distance_0(kind: str, dtype: torch.dtype, implementation: str) -> None:
    logits = testing.random_logits(5, 3000, dtype=dtype).requires_grad_()
    value, *_ = divergence.divergence(logits, logits.detach(), None, kind, 0.5, 0.7)
    (grad,) = torch.autograd.grad(value.sum(), logits)
    slack = testing.EPS32 if implementation == "reference" else 0
    testing.assert_within(value, torch.zeros(5), slack)
    testing.assert_within(grad, torch.zeros(5, 3000), 16 * slack)


@slow_interpreted
def test_the_same_distribution_in_another_dtype_or_shifted_is_at_distance_0() -> None:
    logits = testing.random_logits(5, 3000, dtype=torch.bfloat16)
    with backend(testing.KERNELS):
        for kind in KINDS:
            for student in (logits.float(), logits.float() + 16):
                value, *_ = divergence.divergence(student, logits, None, kind, 0.5, 1.0)
                assert 0 <= value.max() < 1e-12


def test_jsd_at_one_half_is_symmetric_and_bounded(implementation: str) -> None:
    student, teacher = testing.random_pair(6, 2000, distance=8.0)
    there, *_ = divergence.divergence(student, teacher, None, "jsd", 0.5, 1.0)
    back, *_ = divergence.divergence(teacher, student, None, "jsd", 0.5, 1.0)
    testing.assert_within(there, back, 4 * testing.EPS32 * back)
    assert (there <= math.log(2)).all()


def test_reverse_kl_is_forward_kl_the_other_way_round(implementation: str) -> None:
    student, teacher = testing.random_pair(6, 2000)
    there, *_ = divergence.divergence(student, teacher, None, "reverse_kl", 0.5, 1.0)
    back, *_ = divergence.divergence(teacher, student, None, "forward_kl", 0.5, 1.0)
    testing.assert_within(there, back, 8 * testing.EPS32 * (1 + back))


def test_the_ends_of_beta() -> None:
    """jsd / beta goes to the forward and jsd / (1 - beta) to the reverse KL."""
    student, teacher = testing.random_pair(4, 500, distance=0.5)
    with backend(testing.KERNELS):
        low, *_ = divergence.divergence(student, teacher, None, "jsd", 1e-4, 1.0)
        high, *_ = divergence.divergence(student, teacher, None, "jsd", 1 - 1e-4, 1.0)
        forward, *_ = divergence.divergence(student, teacher, None, "forward_kl", 0.5, 1.0)
        reverse, *_ = divergence.divergence(student, teacher, None, "reverse_kl", 0.5, 1.0)
    torch.testing.assert_close(low / 1e-4, forward, rtol=2e-3, atol=0)
    torch.testing.assert_close(high / 1e-4, reverse, rtol=2e-3, atol=0)


# ---- 3. opcheck -------------------------------------------------------------------------------------------


@pytest.mark.few(6)
@registration_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_opcheck(kind: int, masked: bool, dtype: torch.dtype) -> None:
    student, teacher = (x[:, :3] for x in testing.random_pair(2, 4, 40, dtype=dtype))
    mask = testing.random_ids(2, 3, vocab=2) == 1 if masked else None
    torch.library.opcheck(torch.ops.r1kernels.divergence, (student, teacher, mask, kind, 0.3, 0.7))
    _, lse_student, lse_teacher, inner, *_ = torch.ops.r1kernels.divergence(student, teacher, mask, kind, 0.3, 0.7)
    g, out = torch.ones(2, 3), torch.zeros(2, 3, 40)
    arguments = (student, teacher, lse_student, lse_teacher, inner, g, kind, 0.3, 0.7, out)
    torch.library.opcheck(torch.ops.r1kernels.divergence_backward, arguments)


# ---- 4. compile -------------------------------------------------------------------------------------------


@pytest.mark.few(2)
@compiles
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("topk", [False, True])
def test_compile_fullgraph(topk: bool, kind: str, implementation: str) -> None:
    _, teacher_logits = testing.random_pair(3, 4, 33)
    teacher = make_teacher(teacher_logits, 5)

    def run(logits: Tensor) -> Tensor:
        if topk:
            return topk_divergence.topk_divergence(logits * 2, teacher, None, kind, 0.3, 0.8)[0].square().sum()
        return divergence.divergence(logits * 2, teacher_logits, None, kind, 0.3, 0.8)[0].square().sum()

    results = []
    for function in (run, testing.compiled(run)):
        logits = testing.random_logits(3, 4, 33).requires_grad_()
        loss = function(logits)
        loss.backward()
        results.append((loss.detach(), logits.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])

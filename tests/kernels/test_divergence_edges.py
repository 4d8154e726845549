"""Divergences at the edges: sizes, strides, -inf, NaN, masked rows, in-place gradients, row independence."""

import math
from collections.abc import Callable

import pytest
import torch
from backends import slow_interpreted, without_cuda_kernels
from divergence_cases import BETAS, DTYPES, KINDS, check
from torch import Tensor

from r1kernels import backend, testing
from r1kernels.ops import topk_divergence
from r1kernels.ops.divergence import divergence as full
from r1kernels.ops.topk_divergence import topk_divergence as topk
from r1kernels.ops.topk_teacher import make_teacher

pytestmark = without_cuda_kernels

# ---- sizes and strides --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5), (0, 4, 5), (3, 0, 5)])
@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind: str, shape: tuple[int, ...], implementation: str) -> None:
    student = torch.empty(shape, requires_grad=True)
    teacher = make_teacher(torch.zeros(*shape[:-1], 2, dtype=torch.int64), torch.empty(*shape[:-1], 2), None)
    results = *full(student, student.detach(), None, kind, 0.5, 1.0), *topk(student, teacher, None, kind, 0.5, 1.0)
    (results[0].sum() + results[3].sum()).backward()
    assert all(result.shape == shape[:-1] for result in results)
    assert student.grad.shape == shape


@pytest.mark.parametrize("kind", KINDS)
def test_one_word_vocabulary_is_certain(kind: str, implementation: str) -> None:
    student = torch.tensor([[3.0], [-1e4], [0.1]], requires_grad=True)
    teacher = make_teacher(torch.zeros(3, 1, dtype=torch.int64), torch.tensor([[0.0], [-1e-4], [5e-4]]), None)
    value, *_ = full(student, torch.tensor([[1.0], [2.0], [-3.0]]), None, kind, 0.5, 1.0)
    listed, *_ = topk(student, teacher, None, kind, 0.5, 1.0)
    (value.sum() + listed.sum()).backward()
    assert not value.any()
    for result in (listed, student.grad):  # the teacher's log-prob is brought to 0 in float64
        testing.assert_within(result, torch.zeros_like(result), 1e-15)


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "without the last position": lambda x: x[:, :-1],
    "vocabulary not last in memory": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batch and time swapped": lambda x: x.transpose(0, 1),
    "every other word, odd": lambda x: x[..., 1::2],
    "padded vocabulary cut off": lambda x: x[..., :-3],
    "unaligned rows": lambda x: x[..., 1:],
    "one row for all": lambda x: x[:1, :1].expand(2, 4, -1),
    "one token alone": lambda x: x[0, 0, ::2],
}


@pytest.mark.parametrize("view", STRIDED)
@pytest.mark.parametrize("kind", KINDS)
def test_strided_logits_are_read_in_place(view: str, kind: str) -> None:
    size = (2, 4, 4099) if testing.KERNELS == "cpu" else (2, 2, 2100)
    student, teacher = (STRIDED[view](x) for x in testing.random_pair(*size))
    check(student, teacher, kind)
    check(student.contiguous(), teacher, kind)
    check(student, teacher.contiguous(), kind)


@pytest.mark.parametrize("view", STRIDED)
def test_strided_logits_with_a_topk_teacher(view: str, implementation: str) -> None:
    student, logits = (STRIDED[view](x) for x in testing.random_pair(2, 4, 99))
    teacher = make_teacher(*testing.random_topk(logits, 5), None)
    results = []
    for x in (student, student.contiguous()):
        source = x.detach().requires_grad_()
        value, *rest = topk(source, teacher, None, "jsd", 0.3, 0.7)
        (grad,) = torch.autograd.grad(value.sum(), source)
        results.append((value, *rest, grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_topk_in_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    student, logits = testing.random_pair(3, 5, 99, dtype=torch.bfloat16)
    mask = testing.random_ids(3, 5, vocab=2) == 1
    teacher = make_teacher(*testing.random_topk(logits, 5), mask)
    results = []
    for scratch in (topk_divergence.SCRATCH_BYTES, 4 * 99 * 2, 1):
        monkeypatch.setattr(topk_divergence, "SCRATCH_BYTES", scratch)
        source = student.clone().requires_grad_()
        with backend(testing.KERNELS):
            value, *rest = topk(source, teacher, mask, "reverse_kl", 0.3, 0.7)
        torch.where(mask, value, 0).sum().backward()
        results.append((value, *rest, source.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- -inf, inf and NaN --------------------------------------------------------------------------------------


def forbidden(x: Tensor, fraction: float, seed: int) -> Tensor:
    return x.masked_fill(torch.rand(x.shape, generator=testing.generator(seed)) < fraction, -math.inf)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "beta"), BETAS)
def test_words_forbidden_to_both(kind: str, beta: float, dtype: torch.dtype) -> None:
    """0 log 0 = 0: no inf, no NaN, gradient 0."""
    student, teacher = (forbidden(x, 0.5, 1) for x in testing.random_pair(3, 5000, dtype=dtype))
    check(student, teacher, kind, beta)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "beta"), BETAS)
def test_words_forbidden_to_one(kind: str, beta: float, dtype: torch.dtype) -> None:
    """Where a divergence is infinite it says so; its gradient is p - q, or 0 for reverse KL; jsd is always finite."""
    student, teacher = testing.random_pair(3, 5000, dtype=dtype)
    check(forbidden(student, 0.3, 1), teacher, kind, beta)
    check(student, forbidden(teacher, 0.3, 2), kind, beta)
    check(forbidden(student, 0.3, 1), forbidden(teacher, 0.3, 2), kind, beta)


@pytest.mark.parametrize("kind", KINDS)
def test_infinite_divergences_of_both_implementations(kind: str, implementation: str) -> None:
    student, teacher = testing.random_logits(4, 40), testing.random_logits(4, 40, seed=1)
    student[0, 3] = student[2, 3] = -math.inf
    teacher[1, 5] = teacher[2, 3] = -math.inf
    expected = testing.divergence(student, teacher, kind)
    student.requires_grad_()
    value, *_ = full(student, teacher, None, kind, 0.5, 1.0)
    (grad,) = torch.autograd.grad(value.sum(), student)
    infinite = {"forward_kl": [True, False, False, False], "reverse_kl": [False, True, False, False]}
    assert value.isinf().tolist() == infinite.get(kind, [False] * 4)
    testing.assert_within(grad, expected.grad.value, 8 * testing.EPS32 * (1 + expected.value.value.nan_to_num(posinf=0)
                                                                          .unsqueeze(-1)))


def test_a_word_too_rare_for_fp32_still_makes_a_difference() -> None:
    """exp(-200) is 0 in fp32, but not a word that cannot be: against one the KL is infinite, else finite."""
    teacher = torch.tensor([[0.0, -200.0, -300.0]])
    for kind, (student, other) in {"forward_kl": (0, 1), "reverse_kl": (1, 0)}.items():
        pair = [torch.tensor([[0.0, -math.inf, -250.0]]), teacher]
        value, *_ = full(pair[student], pair[other], None, kind, 0.5, 1.0)
        assert value.item() == math.inf
        pair[0] = torch.tensor([[0.0, -500.0, -250.0]])
        value, *_ = full(pair[student], pair[other], None, kind, 0.5, 1.0)
        assert 0 <= value.item() < 1e-30


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("position", [0, 2048, 4999])
@pytest.mark.parametrize("of_student", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_inf_are_never_hidden(
    kind: str, of_student: bool, position: int, poison: float, implementation: str
) -> None:
    pair = testing.random_pair(3, 5000)
    pair[0 if of_student else 1][1, position] = poison
    student = pair[0].requires_grad_()
    value, *_ = full(student, pair[1], None, kind, 0.5, 1.0)
    (grad,) = torch.autograd.grad(value.sum(), student)
    assert value.isnan().tolist() == [False, True, False]
    assert grad.isfinite().all(-1).tolist() == [True, False, True]
    if of_student:
        teacher = make_teacher(torch.tensor([[7, 8]] * 3), torch.full((3, 2), -2.0), None)
        value, *_ = topk(student, teacher, None, kind, 0.5, 1.0)
        assert value.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_any_word_is_nan_and_harms_no_other(kind: str, implementation: str) -> None:
    for row in (0, 1):
        pair = [x.clone() for x in testing.random_pair(3, 50)]
        pair[row][1] = -math.inf
        value, *_ = full(*pair, None, kind, 0.5, 1.0)
        assert value.isnan().tolist() == [False, True, False]


def test_gradients_of_nan_rows_are_nan_in_16_bits() -> None:
    """A NaN whose low bits are set must not be rounded into a number."""
    student, teacher = testing.random_pair(1, 40)
    student[0, 3] = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)[0]
    stats = torch.full((1,), math.nan, dtype=torch.float64)
    for dtype in DTYPES:
        out = torch.zeros(1, 40, dtype=dtype)
        for kind in range(3):
            torch.ops.r1kernels.divergence_backward(
                student, teacher, stats, stats, stats, torch.ones(1), kind, 0.5, 1.0, out
            )
            assert out.isnan().all()


# ---- masked rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_behind_the_mask_matters(kind: str, dtype: torch.dtype, implementation: str) -> None:
    student, teacher = testing.random_pair(4, 6, 300, dtype=dtype)
    mask = testing.random_ids(4, 6, vocab=2) == 1
    ids, logprobs = testing.random_topk(teacher, 5)
    results = []
    for poison in (lambda x: x, lambda x: testing.poisoned(x, mask)):
        source = poison(student).clone().requires_grad_()
        listed = make_teacher(poison(ids), poison(logprobs), mask)
        rows = *full(source, poison(teacher), mask, kind, 0.5, 0.7), *topk(source, listed, mask, kind, 0.5, 0.7)
        torch.where(mask, rows[0] + rows[3], 0).sum().backward()
        results.append((*rows, source.grad))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)
        assert not poisoned[~mask].any()


# ---- the gradient in place ----------------------------------------------------------------------------------


def statistics(student: Tensor, teacher: Tensor, kind: int) -> list[Tensor]:
    return list(torch.ops.r1kernels.divergence(student, teacher, None, kind, 0.3, 0.7)[1:4])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("vocab", [1, 33, 2048, 5001])
def test_in_place_is_out_of_place(vocab: int, kind: int, dtype: torch.dtype, isa: str) -> None:
    """Rows of `out` that start where the student's do, in a narrower dtype too; what lies between rows is kept."""
    buffer, teacher = testing.random_pair(6, vocab + 8)
    student, teacher, g = buffer[:, :vocab], teacher[:, :vocab], torch.randn(6, generator=testing.generator(1))
    g[2] = 0
    arguments = (teacher, *statistics(student, teacher, kind), g, kind, 0.3, 0.7)
    apart = torch.empty(6, vocab, dtype=dtype)
    torch.ops.r1kernels.divergence_backward(student, *arguments, apart)
    kept = buffer[:, vocab:].clone()
    inside = buffer.view(dtype)[:, :vocab]
    torch.ops.r1kernels.divergence_backward(student, *arguments, inside)
    assert torch.equal(inside, apart)
    assert torch.equal(buffer[:, vocab:], kept)
    assert not apart[2].any()


def test_rows_without_a_gradient_are_not_read() -> None:
    student, teacher = testing.random_pair(3, 50)
    stats, g = statistics(student, teacher, 2), torch.tensor([1.0, 0.0, 1.0])
    student[1], teacher[1] = math.nan, math.inf
    out = torch.full((3, 50), 7.0)
    torch.ops.r1kernels.divergence_backward(student, teacher, *stats, g, 2, 0.3, 0.7, out)
    assert out.isfinite().all() and not out[1].any() and out[0].any() and out[2].any()


def test_operators_called_directly_refuse_memory_that_would_be_overwritten() -> None:
    memory = torch.randn(4, 100)
    student, teacher, g = memory[:, :40], torch.randn(4, 40), torch.ones(4)
    stats = statistics(student, teacher, 0)

    def run(out: Tensor, student: Tensor = student) -> None:
        torch.ops.r1kernels.divergence_backward(student, teacher, *stats, g, 0, 0.3, 0.7, out)

    narrow = memory.view(torch.bfloat16)[:, :80:2]  # a student narrower than out
    for out in (memory[:, 1:41], memory[:, 30:70], memory.view(-1)[:160].view(4, 40)):
        with pytest.raises((RuntimeError, ValueError), match="out overlaps student"):
            run(out)
    for source in (narrow, memory.view(torch.bfloat16)[:, :40]):
        with pytest.raises((RuntimeError, ValueError), match="out overlaps student"):
            run(memory[:, :40], source)
    with pytest.raises((RuntimeError, ValueError), match="out overlaps teacher"):
        run(teacher)
    with pytest.raises((RuntimeError, ValueError), match="unit stride over the vocabulary"):
        run(torch.empty(40, 4).t())
    with pytest.raises((RuntimeError, ValueError), match="must have the same shape"):
        run(torch.empty(4, 39))
    with pytest.raises((RuntimeError, ValueError), match="must have the same shape"):
        torch.ops.r1kernels.divergence(student, teacher[:, :39], None, 0, 0.3, 0.7)
    with pytest.raises((RuntimeError, ValueError), match="kind is 3, expected 0, 1 or 2"):
        torch.ops.r1kernels.divergence(student, teacher, None, 3, 0.3, 0.7)


@pytest.mark.not_on("triton", "cuda", reason="only the CPU's logarithm computes with integers, which could overflow")
@pytest.mark.parametrize("beta", [-1.0, 0.0, 1.0, float("nan")])
def test_operators_refuse_a_beta_that_is_no_weight(beta: float) -> None:
    student, teacher = testing.random_logits(4, 40, seed=1), testing.random_logits(4, 40, seed=2)
    with pytest.raises((RuntimeError, ValueError), match=f"beta is {beta:g}"):
        torch.ops.r1kernels.divergence(student, teacher, None, 2, beta, 0.7)
    _, *stats, _, _ = torch.ops.r1kernels.divergence(student, teacher, None, 2, 0.3, 0.7)
    with pytest.raises((RuntimeError, ValueError), match=f"beta is {beta:g}"):
        torch.ops.r1kernels.divergence_backward(
            student, teacher, *stats, torch.ones(4), 2, beta, 0.7, torch.empty_like(student))


# ---- a row depends on itself alone --------------------------------------------------------------------------


@slow_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_their_batch(
    kind: str, dtype: torch.dtype, on_threads: Callable[[int], None]
) -> None:
    """Bit for bit: alone, in another order, with another number of threads."""
    many = 24 if testing.KERNELS == "cpu" else 5
    student, teacher = testing.random_pair(many, 4099, dtype=dtype)

    def run(rows: Tensor | slice) -> tuple[Tensor, ...]:
        source = student[rows].clone().requires_grad_()
        with backend(testing.KERNELS):
            results = full(source, teacher[rows], None, kind, 0.3, 0.7)
        (grad,) = torch.autograd.grad(results[0], source, results[0].detach())
        return *results, grad

    whole = run(slice(None))
    order = torch.randperm(many, generator=testing.generator(5))
    one_by_one = [run(slice(n, n + 1)) for n in range(many)]
    for k, value in enumerate(run(order)):
        assert torch.equal(whole[k][order], value)
        assert torch.equal(whole[k], torch.cat([row[k] for row in one_by_one]))
    for threads in (2, 3):
        on_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(whole, run(slice(None)), strict=True))


@pytest.mark.not_on("triton", "cuda", reason="how a CPU writes")
def test_large_gradients_written_past_the_caches_are_the_same() -> None:
    """32 MiB and more take another way to memory."""
    student, teacher = testing.random_pair(70, 131_072)
    stats, g = statistics(student, teacher, 0), torch.ones(70)
    large, small = torch.empty_like(student), torch.empty_like(student[:3])
    torch.ops.r1kernels.divergence_backward(student, teacher, *stats, g, 0, 0.3, 0.7, large)
    few = [x[:3] for x in stats]
    torch.ops.r1kernels.divergence_backward(student[:3], teacher[:3], *few, g[:3], 0, 0.3, 0.7, small)
    assert large.numel() * 4 >= 32 << 20 and torch.equal(large[:3], small)

"""Distillation from hidden states: against `distillation_loss` of dense float64 logits, masks, budgets, memory."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import linear_cases as cases
import pytest
import torch
from backends import reference_only, slow_interpreted, without_cuda_kernels
from linear_distillation_cases import DTYPES, MASK, Case, logits_of
from torch import Tensor

from r1kernels import DistillationLoss, _memory, backend, distillation_loss, testing
from r1kernels.ops.divergence import KINDS
from r1kernels.ops.linear import sums, walk

pytestmark = without_cuda_kernels

# (student, teacher): what each of the two heads has.
PAIRS = [
    ("plain", "plain"), ("everything", "softcap"), ("logit_scale", "everything"), ("softcap", "logit_scale"),
    ("bias", "lora"),
]


def assert_close(ours: Any, exact: Any, relative: float) -> None:
    (result, grads), (expected, exact_grads) = ours, exact
    testing.assert_within(result.loss, expected.loss, relative * (1 + expected.loss.abs()))
    assert set(result.metrics) == set(expected.metrics)
    for name, value in result.metrics.items():
        testing.assert_within(value, expected.metrics[name], relative * (1 + expected.metrics[name].abs()))
    for name, grad in grads.items():
        error, size = (grad.double() - exact_grads[name]).norm(), exact_grads[name].norm()
        assert error <= relative * size, (name, float(error / size))


# ---- values and gradients -----------------------------------------------------------------------------------


@reference_only
@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", PAIRS)
def test_float64_equals_the_dense_loss(heads: tuple[str, str], kind: str, k: int | None) -> None:
    with backend("reference"):
        for mask, budget, normalizer in ((None, None, None), (MASK, 4000, None), (MASK, 12_000, 7.0)):
            case = Case(*heads, k, kind, torch.float64, mask=mask)
            ours = case.run(3.0, chunk_bytes=budget, normalizer=normalizer)
            assert_close(ours, case.exact(3.0, normalizer=normalizer), 1e-12)


@reference_only
@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, k: int | None) -> None:
    case = Case("everything", "softcap", k, kind, torch.float64, lead=(4,), mask=MASK.reshape(-1)[:4], vocab=11)
    leaves = {name: value.requires_grad_() for name, value in cases.tensors(case.student).items()}

    def loss(*values: Tensor) -> Tensor:
        named = dict(zip(leaves, values, strict=True))
        return case.ours(**cases.with_tensors(case.student, named), chunk_bytes=4000).loss

    with backend("reference"):
        assert torch.autograd.gradcheck(loss, list(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", PAIRS)
def test_float32(heads: tuple[str, str], kind: str, k: int | None, implementation: str) -> None:
    for mask, budget in ((None, None), (MASK, 4000)):
        case = Case(*heads, k, kind, mask=mask)
        assert_close(case.run(3.0, chunk_bytes=budget), case.exact(3.0), 4e-6)


@pytest.mark.parametrize("k", [None, 20])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", ["plain", "softcap"])
def test_no_coarser_than_twice_the_dense_path(
    head: str, dtype: torch.dtype, kind: str, k: int | None, implementation: str
) -> None:
    """The dense path: logits, divergence and gradients in the dtype of the model."""
    lead = (40,) if testing.KERNELS == "cpu" else (10,)
    case = Case(head, "plain", k, kind, dtype, lead=lead, vocab=700, width=48)
    result, grads = case.run()

    def dense(**named: Any) -> DistillationLoss:
        return distillation_loss(logits_of(**named), **case.dense | case.settings)

    expected, exact = case.exact()
    if k is None:
        case.dense["teacher_logits"] = logits_of(**case.teacher)
    _, theirs = cases.gradients(dense, case.student, lambda value: value.loss)
    testing.assert_within(result.loss, expected.loss, 1e-6 * (1 + expected.loss))
    for name, grad in grads.items():
        assert grad.dtype == dtype
        ours, dense_error = ((g.double() - exact[name]).norm() / exact[name].norm() for g in (grad, theirs[name]))
        assert ours <= 2 * max(float(dense_error), testing.EPS32), (name, float(ours), float(dense_error))


@pytest.mark.parametrize("teacher_dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_models_of_different_dtypes(dtype: torch.dtype, teacher_dtype: torch.dtype, implementation: str) -> None:
    if implementation != "reference" and teacher_dtype == torch.float64:
        return  # asked for kernels that do not exist
    case = Case("bias", "bias", None, "jsd", dtype, teacher_dtype)
    result, grads = case.run()
    assert_close((result, grads), case.exact(), 4e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)
    assert result.loss.dtype == (torch.float64 if teacher_dtype == torch.float64 else torch.float32)


@slow_interpreted
@pytest.mark.parametrize("k", [None, 5])
def test_rounded_logits_are_those_of_an_engine_that_rounds(k: int | None, implementation: str) -> None:
    case = Case("plain", "plain", k, "reverse_kl", torch.bfloat16)
    result, grads = case.run(logits_dtype=torch.bfloat16)
    if k is None:
        case.dense["teacher_logits"] = case.dense["teacher_logits"].float()
    leaves = [case.student[name].clone().requires_grad_() for name in ("hidden", "weight")]
    expected = distillation_loss(leaves[0] @ leaves[1].T, **case.dense, **case.settings)
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-5, atol=1e-6)
    for grad, theirs in zip(grads.values(), torch.autograd.grad(expected.loss, leaves), strict=True):
        assert (grad.double() - theirs.double()).norm() <= 0.01 * theirs.double().norm()


@pytest.mark.parametrize("k", [None, 5])
def test_a_loss_scale_reaches_float16_before_it_rounds(k: int | None, implementation: str) -> None:
    case = Case("plain", "plain", k, dtype=torch.float16, vocab=2000)
    _, grads = case.run(2.0**16, normalizer=1e6)
    _, exact = case.exact(normalizer=1e6)
    for name, grad in grads.items():
        error = (grad.double() / 2**16 - exact[name]).norm() / exact[name].norm()
        assert error <= 2e-3, (name, float(error))


@slow_interpreted
@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_upstream_factors_and_retained_graphs(dtype: torch.dtype, k: int | None, implementation: str) -> None:
    case = Case("everything", "bias", k, dtype=dtype)
    _, once = case.run()
    leaves = {name: value.detach().requires_grad_() for name, value in cases.tensors(case.student).items()}
    loss = case.ours(**cases.with_tensors(case.student, leaves)).loss
    (3 * loss).backward(retain_graph=True)
    loss.backward(retain_graph=True)
    torch.autograd.backward(loss, torch.tensor(0.0))
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, 4 * once[name], rtol=4 * torch.finfo(dtype).eps, atol=1e-3 * (
            torch.finfo(dtype).eps * float(once[name].abs().max()) * 1e3 + 1e-5))


# ---- masks, capacity, empty batches -------------------------------------------------------------------------


@slow_interpreted
@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("capacity", [None, 9, 100])
@pytest.mark.parametrize("head", ["plain", "everything"])
def test_nothing_behind_the_mask_matters(head: str, capacity: int | None, k: int | None, implementation: str) -> None:
    case = Case(head, head, k, "jsd", mask=MASK)
    clean = case.run(capacity=capacity, chunk_bytes=4000)
    case.student["hidden"] = testing.poisoned(case.student["hidden"], MASK)
    for name in set(case.given) - {"teacher_weight", "teacher_options"}:
        case.given[name] = testing.poisoned(case.given[name], MASK)
    dirty = case.run(capacity=capacity, chunk_bytes=4000)
    assert torch.equal(clean[0].loss, dirty[0].loss)
    assert all(torch.equal(clean[0].metrics[name], value) for name, value in dirty[0].metrics.items())
    for name, grad in dirty[1].items():
        assert torch.equal(grad, clean[1][name]), name
    assert not dirty[1]["hidden"][~MASK].any()


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_upstream_gradient_of_nan_or_inf_does_not_bring_masked_tokens_to_life(
    dtype: torch.dtype, factor: float, implementation: str
) -> None:
    _, grads = Case(dtype=dtype, mask=MASK).run(factor)
    assert not grads["hidden"][~MASK].any() and not grads["hidden"][MASK].isfinite().any()


@pytest.mark.parametrize("k", [None, 5])
def test_more_tokens_than_the_capacity_are_refused(k: int | None, implementation: str) -> None:
    with pytest.raises(ValueError, match=r"capacity \(7\) .*\(8\)"):
        Case(k=k, mask=MASK).run(capacity=7)


@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("lead", [(0,), (0, 4), (3, 5)])
def test_nothing_counted(lead: tuple[int, ...], k: int | None, implementation: str) -> None:
    case = Case("everything", "everything", k, lead=lead, mask=torch.zeros(lead))
    case.student["hidden"] = torch.full_like(case.student["hidden"], math.nan)
    result, grads = case.run()
    assert result.loss == 0 and not any(value.any() for value in result.metrics.values())
    for name, value in cases.tensors(case.student).items():
        assert grads[name].shape == value.shape and not grads[name].any()


def test_a_nan_of_a_counted_token_is_counted(implementation: str) -> None:
    case = Case(mask=MASK)
    case.student["hidden"][0, 1, 3] = math.nan
    result, grads = case.run()
    assert result.loss.isnan() and result.metrics["nonfinite_tokens"] == 1 and grads["weight"].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_confident_topk_teachers_are_at_a_finite_distance(kind: str, implementation: str) -> None:
    """Whether or not their log-probs add up to 1 by rounding."""
    case = Case(k=5, kind=kind)
    logprobs = torch.tensor([0.0, -25.0, -26.0, -27.0, -28.0]).expand(3, 5, 5).contiguous()
    logprobs[0, :, 1:] = -math.inf
    logprobs[2, :, 0] = -3e-7
    case.dense = case.given = case.given | {"teacher_logprobs": logprobs}
    result, grads = case.run()
    assert result.metrics["nonfinite_tokens"] == 0 and all(grad.isfinite().all() for grad in grads.values())
    assert_close((result, grads), case.exact(), 4e-6)


# ---- options ------------------------------------------------------------------------------------------------


@slow_interpreted
@pytest.mark.parametrize("k", [None, 5])
def test_values_have_the_same_bits_whatever_the_budget(k: int | None) -> None:
    with backend(testing.KERNELS):
        case = Case("everything", "everything", k, "jsd")
        results = [case.run(chunk_bytes=budget, batch_invariant=True)[0] for budget in (3000, 8000, None)]
    for name, value in results[0].metrics.items():
        assert all(torch.equal(value, other.metrics[name]) for other in results[1:])


@slow_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_accumulation(dtype: torch.dtype, implementation: str) -> None:
    case = Case("bias", dtype=dtype)
    _, expected = case.run(2.0)
    leaves = {name: value.detach().requires_grad_() for name, value in cases.tensors(case.student).items()}
    into = torch.ones(leaves["weight"].shape)
    (2 * case.ours(**leaves, grad_accumulation_into=into).loss).backward()
    assert leaves["weight"].grad is None
    torch.testing.assert_close((into - 1).to(dtype), expected["weight"], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(leaves["hidden"].grad, expected["hidden"])


@slow_interpreted
@pytest.mark.parametrize(("k", "full"), [(None, 4), (5, 3)])
def test_each_product_is_computed_once(k: int | None, full: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 unit of the teacher and 3 of the student, and neither gradients nor their products unless they are wanted."""
    calls = []
    matmul = walk.matmul
    for module in (walk, sums):
        monkeypatch.setattr(module, "matmul", lambda *args, **keywords: calls.append(1) or matmul(*args, **keywords))

    def count(function: Callable[[], Any]) -> int:
        calls.clear()
        function()
        return len(calls)

    case = Case(k=k)
    assert count(case.run) == full
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert count(lambda: case.ours(**case.student)) == full - 2
    trained = case.student["hidden"].detach().requires_grad_()
    assert count(lambda: case.ours(**case.student | {"hidden": trained}).loss.backward()) == full - 1


@slow_interpreted
def test_the_teacher_gets_no_gradient(implementation: str) -> None:
    case = Case()
    for name in ("teacher_hidden", "teacher_weight"):
        case.given[name].requires_grad_()
    hidden = case.student["hidden"].detach().requires_grad_()
    case.ours(**case.student | {"hidden": hidden}).loss.backward()
    assert hidden.grad.any() and case.given["teacher_hidden"].grad is None and case.given["teacher_weight"].grad is None
    assert not case.ours(**case.student).loss.requires_grad


# ---- memory -------------------------------------------------------------------------------------------------


def allocations(function: Callable[[], Any]) -> tuple[int, int]:
    """(peak of the memory allocated while running, largest single allocation), in bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    del result
    return max(itertools.accumulate(sizes)), max(sizes)


@pytest.mark.few(1)
@pytest.mark.not_on("triton", reason="thousands of rows, and memory of the interpreter's own")
@pytest.mark.parametrize("k", [None, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(dtype: torch.dtype, k: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget, the gradients, that of the weight in float32 too, and 64 bytes a token (top-k: and 26 (K + 1))."""
    monkeypatch.setattr(_memory, "SMALLEST", 1 << 60)  # the profiler sees what PyTorch allocates
    n, vocab, width, budget = 8192, 1000, 8, 1 << 20
    case = Case(k=k, dtype=dtype, lead=(n,), vocab=vocab, width=width, kind="jsd", mask=torch.ones(n))
    leaves = {name: value.detach().requires_grad_() for name, value in cases.tensors(case.student).items()}

    def run() -> Tensor:
        loss = case.ours(**leaves, chunk_bytes=budget).loss
        loss.backward()
        return loss

    with backend(testing.KERNELS):
        run()
        for leaf in leaves.values():
            leaf.grad = None
        peak, largest = allocations(run)
    grads = vocab * width * 4 + n * width * dtype.itemsize
    if dtype != torch.float32:
        grads += vocab * width * dtype.itemsize
    assert largest <= max(budget, 8 * n * (k or 0)) < 2 * n * vocab
    slack = 64 * n + (0 if k is None else 26 * (k + 1) * n)
    assert peak <= budget + grads + slack, f"{(peak - budget - grads) / n} bytes a token"

"""Distillation on K tokens that are chosen from the logits of a chunk: against `distillation_loss` of dense logits."""

from typing import Any

import linear_cases as cases
import pytest
import torch
from backends import compiles, reference_only, slow_interpreted, without_cuda_kernels
from linear_distillation_cases import DTYPES, MASK, Case
from torch import Tensor

from r1kernels import backend, distillation_loss, linear_distillation_loss, testing
from r1kernels.ops.divergence import KINDS
from r1kernels.ops.topk_choice import TOP_K_OF
from r1kernels.ops.topk_teacher import TAILS

pytestmark = without_cuda_kernels

HEADS = [("plain", "plain"), ("softcap", "logit_scale"), ("everything", "softcap"), ("logit_scale", "everything")]


def assert_close(ours: Any, exact: Any, relative: float) -> None:
    (result, grads), (expected, exact_grads) = ours, exact
    limit = relative * (1 + expected.metrics["student_entropy"])  # a truncated sum may be near 0
    testing.assert_within(result.loss, expected.loss, limit)
    assert set(result.metrics) == set(expected.metrics)
    for name, value in result.metrics.items():
        testing.assert_within(value, expected.metrics[name], relative * (1 + expected.metrics[name].abs()))
    for name, grad in grads.items():
        error, size = (grad.double() - exact_grads[name]).norm(), exact_grads[name].norm()
        assert error <= relative * size, (name, float(error / size))


def choice(of: str, tail: str, k: int = 6) -> dict[str, Any]:
    return {"top_k": k, "top_k_of": of, "tail": tail}


@reference_only
@pytest.mark.few(12)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("of", TOP_K_OF)
def test_float64_equals_the_dense_loss(of: str, tail: str, kind: str) -> None:
    with backend("reference"):
        for mask, budget, normalizer in ((None, None, None), (MASK, 4000, 7.0)):
            case = Case("everything", "softcap", None, kind, torch.float64, mask=mask, choice=choice(of, tail))
            ours = case.run(3.0, chunk_bytes=budget, normalizer=normalizer)
            assert_close(ours, case.exact(3.0, normalizer=normalizer), 1e-12)


@reference_only
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("of", TOP_K_OF)
def test_gradcheck(of: str, tail: str) -> None:
    case = Case("everything", "softcap", None, "reverse_kl", torch.float64, lead=(4,), mask=MASK.reshape(-1)[:4],
                vocab=11, choice=choice(of, tail, 3))
    leaves = {name: value.requires_grad_() for name, value in cases.tensors(case.student).items()}

    def loss(*values: Tensor) -> Tensor:
        named = dict(zip(leaves, values, strict=True))
        return case.ours(**cases.with_tensors(case.student, named), chunk_bytes=4000).loss

    with backend("reference"):
        assert torch.autograd.gradcheck(loss, list(leaves.values()), fast_mode=True)


@pytest.mark.parametrize(("heads", "dtype"), [
    *((heads, torch.float32) for heads in HEADS),
    *((heads, dtype) for heads in HEADS[:2] for dtype in DTYPES[1:]),  # an adapter in 16 bits rounds its hidden states
])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("of", TOP_K_OF)
def test_values_and_gradients(
    heads: tuple[str, str], of: str, tail: str, kind: str, dtype: torch.dtype, implementation: str
) -> None:
    """Heads of float16 compute gradients in the backward."""
    for mask, options in ((None, {}), (MASK, {"chunk_bytes": 4000, "capacity": 9})):
        case = Case(*heads, None, kind, dtype, mask=mask, choice=choice(of, tail))
        tolerance = 8e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        (result, grads), exact = case.run(3.0, **options), case.exact(3.0)
        assert_close((result, {}), exact, 8e-6)
        assert_close((result, grads), exact, tolerance)


@slow_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_function_is_asked_once_a_chunk(dtype: torch.dtype, implementation: str) -> None:
    """About the active rows alone, by their numbers in the batch."""
    teacher = Case(dtype=dtype, mask=MASK)
    logprobs = (teacher.dense["teacher_logits"].double() / 0.8).log_softmax(-1).reshape(15, 37)
    asked: list[Tensor] = []

    def look_up(token_ids: Tensor, rows: Tensor) -> Tensor:
        asked.append(rows)
        return logprobs[rows].gather(-1, token_ids)

    case = Case(dtype=dtype, mask=MASK, kind="reverse_kl", choice=choice("student", "bucket"))
    expected, expected_grads = case.run(chunk_bytes=4000)
    case.given = {"teacher_logprobs": look_up, "top_k": 6}
    result, grads = case.run(chunk_bytes=4000)
    assert len(asked) > 1 and set(torch.cat(asked).tolist()) == set(MASK.reshape(-1).nonzero().flatten().tolist())
    testing.assert_within(result.loss, expected.loss, 1e-5)
    for name, grad in grads.items():
        testing.assert_within(grad, expected_grads[name], 1e-5 + 2 * torch.finfo(dtype).eps * grad.abs().max())


@slow_interpreted
@pytest.mark.parametrize("of", TOP_K_OF)
def test_padding_of_the_vocabulary_is_not_chosen(of: str, implementation: str) -> None:
    case = Case(kind="reverse_kl", choice=choice(of, "bucket"))
    leaf = case.student["hidden"].detach().requires_grad_()
    heads = {"student": case.student["weight"], "teacher": case.teacher["weight"]}
    results = []
    for padding in (0, 5):
        weights = {name: torch.cat([w[:30], torch.full((padding, w.shape[1]), 1e3)]) for name, w in heads.items()}
        loss = linear_distillation_loss(
            leaf, weights["student"], case.teacher["hidden"], weights["teacher"], **choice(of, "bucket"), vocab_size=30
        ).loss
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.few(2)
@compiles
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("of", ["student", "union"])
def test_compile_fullgraph(of: str, dtype: torch.dtype, implementation: str) -> None:
    case = Case("everything", "everything", None, "reverse_kl", dtype, mask=MASK, choice=choice(of, "renormalize"))

    def run(**tensors: Any) -> tuple[Tensor, Tensor]:
        loss, metrics = case.ours(**cases.with_tensors(case.student, tensors), chunk_bytes=8000)
        return loss, metrics["student_tail_mass"]

    results = []
    for function in (run, testing.compiled(run)):
        leaves = {name: value.clone().requires_grad_() for name, value in cases.tensors(case.student).items()}
        loss, tail = function(**leaves)
        loss.backward()
        results.append((loss.detach(), tail, *(leaf.grad for leaf in leaves.values())))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)


@slow_interpreted
def test_logits_in_16_bits_choose_what_the_engine_chooses(implementation: str) -> None:
    """Rounded logits have ties; the dense loss of the same rounded logits chooses the same ids."""
    case = Case(kind="reverse_kl", dtype=torch.bfloat16, choice=choice("student", "bucket"))
    result, _ = case.run(logits_dtype=torch.bfloat16)
    logits = case.student["hidden"] @ case.student["weight"].T
    teacher = case.dense["teacher_logits"].float()
    expected = distillation_loss(logits, teacher, **case.settings, **choice("student", "bucket"))
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-5, atol=1e-6)

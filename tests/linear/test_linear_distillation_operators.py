"""The operators behind distillation from hidden states: opcheck, compile, fake tensors, and the soft cap's slope."""

from typing import Any

import linear_cases as cases
import pytest
import torch
from backends import compiles, registration_only, shapes_only, without_cuda_kernels
from linear_distillation_cases import DTYPES, MASK, Case
from torch import Tensor
from torch._subclasses import FakeTensorMode

from r1kernels import linear_distillation_loss, testing

pytestmark = without_cuda_kernels

FP32_HEAD = (torch.bfloat16, torch.float32)


@pytest.mark.few(1)
@registration_only
@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [*((dtype, dtype) for dtype in DTYPES), FP32_HEAD])
def test_opcheck(dtype: torch.dtype, weight_dtype: torch.dtype, k: int | None) -> None:
    case = Case("everything", "everything", k, dtype=dtype, lead=(6,), weight_dtypes=(weight_dtype, weight_dtype))
    s, t = case.student, case.teacher
    head = (
        s["hidden"], s["weight"], s["bias"], *s["lora"], torch.zeros(6, dtype=torch.int64), None, 0.8,
        s["logit_scale"], s["softcap"], torch.float32, 4, 0,
    )
    given = (0, "student", "bucket")
    full = (t["hidden"], t["weight"], t["bias"], *t["lora"], t["logit_scale"], t["softcap"], None, None, *given)
    topk = (None, None, None, None, None, 1.0, 0.0, *case.given.values(), *given)
    for capacity, needs in ((-1, [True] * 5), (5, [True, False, True, False, False]), (-1, [False] * 5)):
        mask = None if capacity < 0 else MASK.reshape(-1)[:6]
        arguments = (*head, capacity, False, mask, *(full if k is None else topk), torch.tensor(0.1).double(), 2, 0.3)
        torch.library.opcheck(torch.ops.r1kernels.linear_divergence, (*arguments, needs))


@pytest.mark.few(2)
@registration_only
@pytest.mark.parametrize("choice", [(4, "student", "bucket"), (3, "union", "renormalize"), (2, "teacher", "truncate")])
def test_opcheck_of_chosen_tokens(choice: tuple[int, str, str]) -> None:
    case = Case("everything", "everything", lead=(6,))
    s, t = case.student, case.teacher
    arguments = (
        s["hidden"], s["weight"], s["bias"], *s["lora"], torch.zeros(6, dtype=torch.int64), None, 0.8,
        s["logit_scale"], s["softcap"], torch.float32, 4, 0, -1, False, MASK.reshape(-1)[:6],
        t["hidden"], t["weight"], t["bias"], *t["lora"], t["logit_scale"], t["softcap"], None, None, *choice,
        torch.tensor(0.1).double(), 1, 0.3, [True] * 5,
    )
    torch.library.opcheck(torch.ops.r1kernels.linear_divergence, arguments)


@pytest.mark.few(1)
@compiles
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compile_fullgraph(dtype: torch.dtype, k: int | None, implementation: str) -> None:
    case = Case("everything", "everything", k, dtype=dtype, mask=MASK)

    def run(**tensors: Any) -> tuple[Tensor, Tensor]:
        loss, metrics = case.ours(**cases.with_tensors(case.student, tensors), chunk_bytes=8000)
        return loss, metrics["student_entropy"]

    results = []
    for function in (run, testing.compiled(run)):
        leaves = {name: value.clone().requires_grad_() for name, value in cases.tensors(case.student).items()}
        loss, entropy = function(**leaves)
        loss.backward()
        results.append((loss.detach(), entropy, *(leaf.grad for leaf in leaves.values())))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)


@shapes_only
@pytest.mark.filterwarnings("ignore:r1kernels uses its reference implementation")
@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_fakes_have_the_shapes_and_dtypes_of_results(dtype: torch.dtype, device: str, k: int | None) -> None:
    with FakeTensorMode():
        leaves = [torch.empty(shape, dtype=dtype, device=device) for shape in ((2, 4, 8), (17, 8))]
        teacher = {name: torch.empty(shape, device=device) for name, shape in (
            ("teacher_hidden", (2, 4, 6)), ("teacher_weight", (17, 6)))}
        if k is not None:
            teacher = {
                "teacher_token_ids": torch.zeros(2, 4, k, dtype=torch.int64, device=device),
                "teacher_logprobs": torch.empty(2, 4, k, device=device),
            }
        for leaf in leaves:
            leaf.requires_grad_()
        loss, metrics = linear_distillation_loss(*leaves, **teacher, mask=torch.ones(2, 4, device=device))
        for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
            assert (grad.shape, grad.dtype, grad.device) == (leaf.shape, dtype, leaf.device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for value in (loss, *metrics.values()):
        assert (value.shape, value.dtype, value.device.type) == ((), wide, device)


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_passes_the_soft_cap(isa: str, dtype: torch.dtype, kind: int) -> None:
    """In the memory of the student's logits too."""
    student, teacher = testing.random_pair(4, 300)
    student = 5 * torch.tanh(student / 5)
    _, *statistics = torch.ops.r1kernels.divergence(student, teacher, None, kind, 0.3, 0.7)
    arguments = (teacher, *statistics[:3], torch.ones(4), kind, 0.3, 0.7)
    plain = torch.empty(4, 300)
    torch.ops.r1kernels.divergence_backward(student, *arguments, plain)
    expected = plain.double() * (1 - (student.double() / 5) ** 2)
    memory = student.clone()
    own = memory if dtype == torch.float32 else memory.view(dtype)[:, :300]
    for source, out in ((student, torch.empty(4, 300, dtype=dtype)), (memory, own)):
        torch.ops.r1kernels.divergence_backward(source, *arguments, out, softcap=5.0)
        slack = 8 * testing.EPS32 * plain.double().abs() + testing.rounding(expected, dtype)
        testing.assert_within(out, expected, slack)

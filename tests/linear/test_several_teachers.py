"""Several teachers: the mixture of their distributions, from logits and from hidden states."""

from typing import Any

import pytest
import torch
from backends import checks_only, compiles, reference_only, slow_interpreted, without_cuda_kernels
from linear_distillation_cases import MASK, Case
from torch import Tensor

from r1kernels import DistillationLoss, backend, distillation_loss, linear_distillation_loss, testing
from r1kernels.ops.divergence import KINDS

pytestmark = without_cuda_kernels

CHOICES: list[dict[str, Any]] = [
    {}, {"top_k": 5}, {"top_k": 4, "top_k_of": "union", "tail": "renormalize"},
    {"top_k": 5, "top_k_of": "teacher", "tail": "truncate"},
]


def gradient(logits: Tensor, teachers: Any, **keywords: Any) -> tuple[DistillationLoss, Tensor]:
    source = logits.detach().clone().requires_grad_()
    result = distillation_loss(source, teachers, **keywords)
    result.loss.backward()
    return result, source.grad


def make(*shape: int) -> tuple[Tensor, list[Tensor], Tensor]:
    student, first = testing.random_pair(*shape)
    others = (testing.random_logits(*shape, seed=seed, dtype=dtype) for seed, dtype in (
        (7, torch.bfloat16), (8, torch.float32)
    ))
    teachers = [first, *others]
    coefs = torch.rand(*shape[:-1], 3, generator=testing.generator(3)) + 0.1
    return student, teachers, coefs / coefs.sum(-1, keepdim=True)


def mixture(teachers: list[Tensor], coefs: Tensor, temperature: float) -> Tensor:
    """As logits at this temperature, in float64."""
    q = sum(c.double().unsqueeze(-1) * (x.double() / temperature).softmax(-1)
            for c, x in zip(coefs.unbind(-1), teachers, strict=True))
    return temperature * q.log()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", CHOICES)
def test_the_mixture_is_the_teacher(
    choice: dict[str, Any], kind: str, temperature: float, implementation: str
) -> None:
    student, teachers, coefs = make(2, 3, 60)
    settings = {"divergence": kind, "beta": 0.3, "temperature": temperature, **choice}
    (loss, metrics), grad = gradient(student, teachers, teacher_coefs=coefs, **settings)
    one = mixture(teachers, coefs, temperature)
    with backend("reference"):
        expected, exact = gradient(student.double(), one, **settings)
    testing.assert_within(loss, expected.loss, 64 * testing.EPS32 * (1 + expected.loss.abs()))
    testing.assert_within(grad, exact, 64 * testing.EPS32)
    for name, value in metrics.items():
        testing.assert_within(value, expected.metrics[name], 1e-5)


@slow_interpreted
def test_weights_of_a_single_1_choose_a_teacher(implementation: str) -> None:
    """What the other teachers have there does not matter, not even NaN."""
    student, teachers, _ = make(6, 40)
    which = torch.tensor([0, 1, 2, 2, 1, 0])
    chosen = torch.stack([x.float() for x in teachers])[which, torch.arange(6)]
    coefs = torch.nn.functional.one_hot(which, 3).float()
    teachers = [torch.where((which == m).unsqueeze(-1), x, torch.nan) for m, x in enumerate(teachers)]
    for choice in CHOICES:
        (loss, _), grad = gradient(student, teachers, teacher_coefs=coefs, divergence="reverse_kl", **choice)
        expected, exact = gradient(student, chosen, divergence="reverse_kl", **choice)
        testing.assert_within(loss, expected.loss, 32 * testing.EPS32 * (1 + loss.abs()))
        testing.assert_within(grad, exact, 32 * testing.EPS32)


def test_a_call_for_each_teacher_adds_up_to_a_choice(implementation: str) -> None:
    student, teachers, _ = make(6, 40)
    which = torch.tensor([0, 1, 2, 2, 1, 0])
    coefs, settings = torch.nn.functional.one_hot(which, 3).float(), {"top_k": 5, "divergence": "reverse_kl"}
    (loss, _), grad = gradient(student, teachers, teacher_coefs=coefs, **settings)
    parts = [gradient(student, x, mask=which == m, normalizer=6, **settings) for m, x in enumerate(teachers)]
    testing.assert_within(loss, sum(part.loss for part, _ in parts), 32 * testing.EPS32 * (1 + loss))
    testing.assert_within(grad, sum(grad for _, grad in parts), 32 * testing.EPS32)


@slow_interpreted
def test_forward_kl_of_a_mixture_has_the_weighted_sum_of_gradients(implementation: str) -> None:
    student, teachers, _ = make(6, 40)
    coefs = torch.tensor([0.2, 0.5, 0.3])
    _, grad = gradient(student, teachers, teacher_coefs=coefs)
    parts = [c * gradient(student, teacher)[1] for c, teacher in zip(coefs, teachers, strict=True)]
    testing.assert_within(grad, sum(parts), 32 * testing.EPS32)


@slow_interpreted
def test_junk_behind_the_mask_and_padding_do_not_matter(implementation: str) -> None:
    student, teachers, coefs = make(2, 3, 30)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    settings = {"mask": mask, "divergence": "reverse_kl", "vocab_size": 25}
    for choice in CHOICES:
        clean, clean_grad = gradient(student, teachers, teacher_coefs=coefs, **settings, **choice)
        dirty = [testing.poisoned(x, mask) for x in teachers]
        for x in dirty:
            x[..., 25:] = torch.nan
        given = testing.poisoned(coefs, mask)
        result, grad = gradient(testing.poisoned(student, mask), dirty, teacher_coefs=given, **settings, **choice)
        assert torch.equal(clean.loss, result.loss) and torch.equal(clean_grad, grad), choice


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("choice", CHOICES)
def test_from_hidden_states(choice: dict[str, Any], dtype: torch.dtype, implementation: str) -> None:
    case = Case("plain", "softcap", None, "reverse_kl", dtype, mask=MASK)
    other = Case("plain", "logit_scale", None, "reverse_kl", dtype, mask=MASK)
    second = {name: value for name, value in other.given.items()}
    second["teacher_hidden"], second["teacher_weight"] = (
        other.teacher[name].roll(1, 0) for name in ("hidden", "weight")
    )
    dense = [case.dense["teacher_logits"], None]
    scale = other.teacher["logit_scale"]
    dense[1] = scale * second["teacher_hidden"].double() @ second["teacher_weight"].double().T
    coefs = torch.rand(3, 5, 1, generator=testing.generator(0))
    coefs = torch.cat([coefs, 1 - coefs], -1)
    case.given = {name: [case.given[name], second[name]] for name in case.given} | choice | {"teacher_coefs": coefs}
    case.dense = {"teacher_logits": mixture(dense, coefs, 0.8)} | choice
    (result, grads), (expected, exact) = case.run(chunk_bytes=6000), case.exact()
    testing.assert_within(result.loss, expected.loss, 1e-5 * (1 + expected.metrics["student_entropy"]))
    for name, grad in grads.items():
        limit = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        assert (grad.double() - exact[name]).norm() <= limit * exact[name].norm(), name


@reference_only
@pytest.mark.parametrize("choice", CHOICES)
def test_gradcheck(choice: dict[str, Any]) -> None:
    student, teachers, coefs = make(3, 14)
    with backend("reference"):
        assert torch.autograd.gradcheck(
            lambda x: distillation_loss(x, teachers, teacher_coefs=coefs, divergence="reverse_kl", **choice).loss,
            student.double().requires_grad_(), fast_mode=True,
        )


@compiles
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
def test_compile_fullgraph(implementation: str) -> None:
    student, teachers, coefs = make(2, 3, 33)

    def run(logits: Tensor) -> Tensor:
        return distillation_loss(logits * 2, teachers, teacher_coefs=coefs, top_k=4, divergence="reverse_kl").loss

    results = []
    for function in (run, testing.compiled(run)):
        source = student.clone().requires_grad_()
        loss = function(source)
        results.append((loss.detach(), *torch.autograd.grad(loss, source)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-6, atol=1e-7)


LOGITS, COEFS = torch.zeros(2, 5), torch.tensor([0.5, 0.5])
BAD_INPUTS: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "no weights": (ValueError, {"teacher_coefs": None}, "teacher_logits has 2 teachers and teacher_coefs is None"),
    "no teachers": (ValueError, {"teacher_logits": []}, "teacher_logits has 0 teachers and teacher_coefs is given"),
    "one teacher": (ValueError, {"teacher_logits": LOGITS}, "teacher_coefs is given and teacher_logits is a Tensor"),
    "shape": (ValueError, {"teacher_coefs": torch.ones(3)}, r"teacher_coefs has shape \(3,\), expected \(2,\) or"),
    "sum": (ValueError, {"teacher_coefs": torch.ones(2)}, r"teacher_coefs of token \[0\] are \[1\.0, 1\.0\], expected"),
    "negative": (ValueError, {"teacher_coefs": torch.tensor([1.5, -0.5])}, r"are \[1\.5, -0\.5\], expected weights"),
    "ints": (TypeError, {"teacher_coefs": torch.tensor([1, 0])}, "teacher_coefs has dtype torch.int64, expected"),
    "a teacher's shape": (ValueError, {"teacher_logits": [LOGITS, LOGITS[:1]]}, r"teacher_logits has shape \(1, 5\)"),
}


@checks_only
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_names_argument_value_and_expectation(case: str, implementation: str) -> None:
    error, arguments, message = BAD_INPUTS[case]
    with pytest.raises(error, match=message):
        distillation_loss(LOGITS, **({"teacher_logits": [LOGITS, LOGITS], "teacher_coefs": COEFS} | arguments))


@checks_only
def test_each_teacher_needs_its_weight_and_options(implementation: str) -> None:
    hidden, weight = torch.zeros(2, 3), torch.zeros(5, 3)
    with pytest.raises(ValueError, match="teacher_weight is a Tensor and teacher_hidden a list of 2, expected one for"):
        linear_distillation_loss(hidden, weight, [hidden, hidden], weight, teacher_coefs=COEFS)
    with pytest.raises(ValueError, match="teacher_options is a list of 1 and teacher_hidden a list of 2"):
        linear_distillation_loss(
            hidden, weight, [hidden] * 2, [weight] * 2, teacher_coefs=COEFS, teacher_options=[{}]
        )
    with pytest.raises(ValueError, match="teacher_weight has a vocabulary of 4 and student_weight one of 5"):
        linear_distillation_loss(hidden, weight, [hidden] * 2, [weight, weight[:4]], teacher_coefs=COEFS)

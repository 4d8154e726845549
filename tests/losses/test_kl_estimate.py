"""Per-token KL estimators: gradcheck, 60-digit oracle, opcheck, compile, edges."""

import math
from typing import Any

import pytest
import torch
from backends import checks_only, compiles, reference_only, registration_only, shapes_only
from torch import Tensor
from torch._subclasses import FakeTensorMode

from r1kernels import backend, kl_estimate, testing
from r1kernels.ops import kl_estimate as operation

ESTIMATORS = ["k1", "k2", "k3"]


def pairs(scale: float, *shape: int) -> tuple[Tensor, Tensor]:
    logprobs = -torch.rand(shape, generator=testing.generator(0)) * 10
    return logprobs, logprobs + scale * torch.randn(shape, generator=testing.generator(1))


def exact(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """(estimate, derivative with respect to logprobs) of each element, in float64."""
    d = (ref_logprobs.double() - logprobs.double()).flatten().tolist()
    terms = torch.tensor([testing.kl_term(estimator, x) for x in d], dtype=torch.float64)
    return terms[:, 0].reshape(logprobs.shape), terms[:, 1].reshape(logprobs.shape)


@reference_only
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_reference_gradcheck(estimator: str) -> None:
    inputs = tuple(x.double().requires_grad_() for x in pairs(1.0, 4, 5))
    assert torch.autograd.gradcheck(lambda a, b: operation.reference(a, b, estimator), inputs)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("scale", [1e-7, 1e-5, 1e-3, 0.1, 0.5, 1.0, 5.0, 15.0])
def test_values_and_gradients(estimator: str, scale: float, implementation: str) -> None:
    inputs = tuple(x.requires_grad_() for x in pairs(scale, 50, 20))
    estimate = kl_estimate(*inputs, estimator)
    grads = torch.autograd.grad(estimate.sum(), inputs)
    value, slope = exact(*(x.detach() for x in inputs), estimator)
    # d is rounded once: an error of EPS32 |d| / 2, seen through the slope; then each result once or twice.
    d = (inputs[1] - inputs[0]).detach().double().abs()
    testing.assert_within(estimate, testing.Expected(value, value.abs() + d * slope.abs()))
    curvature = {"k1": 0 * d, "k2": d, "k3": d * d.exp()}[estimator]
    testing.assert_within(grads[0], testing.Expected(slope, slope.abs() + curvature))
    assert torch.equal(grads[1], -grads[0])


@reference_only
def test_float64_is_exact_where_the_formula_cancels() -> None:
    """As written, e^d - d - 1 loses every digit below |d| = 1e-8 even in float64."""
    d = torch.logspace(-12, 2, 200, dtype=torch.float64)
    for sign in (1, -1):
        with backend("reference"):
            estimate = kl_estimate(torch.zeros_like(d), sign * d)
        value, _ = exact(torch.zeros_like(d), sign * d, "k3")
        testing.assert_within(estimate, value, 4 * torch.finfo(torch.float64).eps * (value + d * torch.expm1(d).abs()))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_expected_gradient_in_a_loss(estimator: str) -> None:
    """By enumeration over the vocabulary: k1 regularises nothing, k2 is KL(pi || ref), k3 is KL(ref || pi)."""
    logits, ref = torch.randn(2, 9, dtype=torch.float64, generator=testing.generator(2))
    logits.requires_grad_()
    log_p, log_ref = logits.log_softmax(-1), ref.log_softmax(-1)
    with backend("reference"):
        expected_loss = (log_p.exp().detach() * kl_estimate(log_p, log_ref, estimator)).sum()
    target = {
        "k1": 0 * logits.sum(),
        "k2": (log_p.exp() * (log_p - log_ref)).sum(),
        "k3": (log_ref.exp() * (log_ref - log_p)).sum(),
    }[estimator]
    (got,), (want,) = torch.autograd.grad(expected_loss, logits, retain_graph=True), torch.autograd.grad(target, logits)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_policies_are_at_distance_zero(estimator: str, implementation: str) -> None:
    logprobs = -torch.rand(10)
    assert not kl_estimate(logprobs, logprobs.clone(), estimator).any()


def test_overflow_is_infinite_not_nan(implementation: str) -> None:
    estimate = kl_estimate(torch.tensor([0.0, 0.0]), torch.tensor([100.0, -100.0]))
    assert estimate.tolist() == [math.inf, 99.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(dtype: torch.dtype, implementation: str) -> None:
    inputs = tuple(x.to(dtype).requires_grad_() for x in pairs(0.3, 6, 7))
    estimate = kl_estimate(*inputs)
    (grad,) = torch.autograd.grad(estimate.sum(), inputs[:1])
    assert estimate.dtype == torch.float32 and grad.dtype == dtype
    value, slope = exact(*(x.detach() for x in inputs), "k3")
    testing.assert_within(estimate, testing.Expected(value, value + slope.abs()))
    testing.assert_within(grad, testing.Expected(slope, slope.abs() + 1))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4)])
def test_shapes_and_strides(shape: tuple[int, ...], implementation: str) -> None:
    logprobs, ref = torch.randn(2, *shape)
    assert kl_estimate(logprobs, ref).shape == shape
    if len(shape) == 3:
        assert torch.equal(kl_estimate(logprobs.transpose(0, 2), ref.transpose(0, 2)).transpose(0, 2),
                           kl_estimate(logprobs, ref))


@registration_only
@pytest.mark.parametrize("estimator", [1, 2, 3])
def test_opcheck(estimator: int) -> None:
    torch.library.opcheck(torch.ops.r1kernels.kl_estimate, (*pairs(1.0, 3, 4), estimator))


@compiles
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
def test_compile_fullgraph(implementation: str) -> None:
    results = []
    for function in (kl_estimate, testing.compiled(kl_estimate)):
        inputs = [x.requires_grad_() for x in pairs(1.0, 3, 4)]
        estimate = function(*inputs)
        estimate.sum().backward()
        results.append((estimate.detach(), inputs[0].grad, inputs[1].grad))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@shapes_only
@pytest.mark.parametrize("device", ["cpu", "meta", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fakes(device: str, dtype: torch.dtype) -> None:
    with FakeTensorMode():
        estimate = kl_estimate(*torch.empty(2, 3, 4, dtype=dtype, device=device).unbind(0))
    assert (estimate.shape, estimate.dtype, estimate.device.type) == ((3, 4), torch.float32, device)


@checks_only
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.0, torch.zeros(3)), TypeError, "logprobs is a float, expected a torch.Tensor"),
        ((torch.zeros(3), torch.zeros(3).long()), TypeError, "ref_logprobs has dtype torch.int64"),
        ((torch.zeros(3), torch.zeros(3, 1)), ValueError, r"ref_logprobs has shape \(3, 1\), expected \(3,\)"),
        ((torch.zeros(3), torch.zeros(3, device="meta")), ValueError, "ref_logprobs is on meta, expected cpu"),
        ((torch.zeros(3), torch.zeros(3), "k4"), ValueError, "estimator is 'k4', expected one of k1, k2, k3"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], error: type[Exception], message: str, implementation: str) -> None:
    with pytest.raises(error, match=message):
        kl_estimate(*arguments)

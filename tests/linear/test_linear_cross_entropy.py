"""Cross-entropy from hidden states: float64 oracle, reductions, ignored targets, normalizer, layouts, bad input."""

from typing import Any

import linear_cases as cases
import pytest
import torch
from backends import checks_only, reference_only
from torch import Tensor

from r1kernels import backend, cross_entropy, linear_cross_entropy, linear_token_logprobs, testing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def batch(head: str = "plain", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """12 targets of which every third is ignored."""
    case = cases.make(head, 2, 6, dtype=dtype)
    case["targets"] = case.pop("token_ids")
    case["targets"][:, ::3] = -100
    return case


def exact(case: dict[str, Any], weight: float) -> tuple[Tensor, cases.Exact]:
    """Losses per token, and the gradients of their sum times `weight`."""
    counted = case["targets"] != -100
    given = case | {"token_ids": torch.where(counted, case["targets"], 0)}
    losses = torch.where(counted, -cases.exact(given).logprobs, 0)
    return losses, cases.exact(given, -weight * counted.double())


@reference_only
def test_gradcheck() -> None:
    case = {"hidden": torch.randn(5, 3, generator=testing.generator(0)).double(), "weight": torch.randn(7, 3).double()}
    targets = torch.tensor([1, -100, 3, 0, 6])
    leaves = [value.requires_grad_() for value in case.values()]
    with backend("reference"):
        for reduction in ("mean", "sum", "none"):
            assert torch.autograd.gradcheck(
                lambda h, w, r=reduction: linear_cross_entropy(h, w, targets, reduction=r, softcap=3.0), leaves
            )


@reference_only
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("head", cases.HEADS)
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_float64_is_the_dense_computation(reduction: str, head: str, rows: int) -> None:
    case = batch(head, torch.float64)
    losses, expected = exact(case, 1 / 8 if reduction == "mean" else 1.0)
    with backend("reference"):
        loss, grads = cases.gradients(
            linear_cross_entropy, case, lambda value: value.sum(), reduction=reduction,
            chunk_bytes=cases.chunk_of(rows, 37, 12, torch.float64),
        )
    value = {"mean": losses.sum() / 8, "sum": losses.sum(), "none": losses}[reduction]
    testing.assert_within(loss, value, 1e-12)
    cases.assert_gradients(grads, expected, 1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("head", ["plain", "bias", "softcap", "temperatures"])
def test_values_and_gradients(dtype: torch.dtype, reduction: str, head: str, implementation: str) -> None:
    case = batch(head, dtype)
    loss, grads = cases.gradients(linear_cross_entropy, case, lambda value: value.sum(), reduction=reduction)
    losses, expected = exact(case, 1 / 8 if reduction == "mean" else 1.0)
    value = {"mean": losses.sum() / 8, "sum": losses.sum(), "none": losses}[reduction]
    assert loss.dtype == torch.float32
    testing.assert_within(loss, value, 4e-6 * (1 + value.abs()))
    cases.assert_gradients(grads, expected, 4e-6 + (torch.finfo(dtype).eps if dtype != torch.float32 else 0))


def test_agrees_with_torch_and_with_cross_entropy(implementation: str) -> None:
    case = batch()
    logits = case["hidden"].double() @ case["weight"].double().T
    for reduction in ("mean", "sum", "none"):
        expected = torch.nn.functional.cross_entropy(logits.mT, case["targets"], reduction=reduction)
        testing.assert_within(linear_cross_entropy(**case, reduction=reduction), expected, 1e-5)
        dense = cross_entropy(logits.float(), case["targets"], reduction=reduction)
        torch.testing.assert_close(linear_cross_entropy(**case, reduction=reduction), dense, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("capacity", [None, 8, 20])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("head", ["plain", "everything"])
def test_ignored_rows_may_hold_anything(head: str, reduction: str, capacity: int | None, implementation: str) -> None:
    case = batch(head)
    counted = case["targets"] != -100
    dirty = case | {"hidden": testing.poisoned(case["hidden"], counted)}
    clean, poisoned = (
        cases.gradients(linear_cross_entropy, given, lambda v: v.sum(), reduction=reduction, capacity=capacity)
        for given in (case, dirty)
    )
    assert torch.equal(clean[0], poisoned[0]) and poisoned[0].isfinite().all()
    for name, grad in clean[1].items():
        assert torch.equal(grad, poisoned[1][name]), name


@pytest.mark.parametrize("normalizer", [3.5, torch.tensor(3.5), torch.tensor(3.5, dtype=torch.float64)])
def test_normalizer(normalizer: Any, implementation: str) -> None:
    case = batch()
    loss, grads = cases.gradients(linear_cross_entropy, case, lambda value: 2 * value, normalizer=normalizer)
    losses, expected = exact(case, 2 / 3.5)
    testing.assert_within(loss, losses.sum() / 3.5, 1e-5)
    cases.assert_gradients(grads, expected, 4e-6)


def test_all_ignored(implementation: str) -> None:
    case = batch("everything") | {"targets": torch.full((2, 6), -100)}
    for reduction in ("mean", "sum", "none"):
        loss, grads = cases.gradients(linear_cross_entropy, case, lambda value: value.sum(), reduction=reduction)
        assert not loss.any() and not any(grad.any() for grad in grads.values())


def test_another_ignore_index(implementation: str) -> None:
    case = batch()
    case["targets"] = case["targets"].masked_fill(case["targets"] == -100, 4)
    counted = case["targets"] != 4
    loss = linear_cross_entropy(**case, ignore_index=4)
    losses = -linear_token_logprobs(case["hidden"], case["weight"], case["targets"])
    torch.testing.assert_close(loss, losses[counted].mean(), rtol=1e-6, atol=1e-6)


def test_one_target_without_dimensions(implementation: str) -> None:
    case = cases.make("plain", 1)
    loss = linear_cross_entropy(case["hidden"][0], case["weight"], case["token_ids"][0])
    testing.assert_within(loss, -cases.exact(case).logprobs[0], 4e-6)


@pytest.mark.parametrize("shape", [(0,), (0, 3)])
def test_no_targets(shape: tuple[int, ...], implementation: str) -> None:
    case = cases.make("plain", *shape)
    case["targets"] = case.pop("token_ids")
    loss, grads = cases.gradients(linear_cross_entropy, case, lambda value: value)
    assert loss == 0 and not any(grad.any() for grad in grads.values())


BAD_INPUTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "reduction": ({"reduction": "avg"}, ValueError, "reduction is 'avg', expected one of mean, sum, none"),
    "ignore_index": ({"ignore_index": None}, TypeError, "ignore_index is None, expected an integer"),
    "normalizer with sum": (
        {"reduction": "sum", "normalizer": 2.0}, ValueError, "normalizer was given with reduction 'sum'"),
    "normalizer 0": ({"normalizer": 0}, ValueError, "normalizer is 0, expected .* > 0"),
    "normalizer tensor 0": ({"normalizer": torch.tensor(0.0)}, ValueError, r"normalizer is 0\.0, expected a positive"),
    "normalizer shape": ({"normalizer": torch.ones(2)}, ValueError, r"normalizer has shape \(2,\)"),
    "target too large": ({"targets": torch.full((2, 6), 37)}, ValueError, r"targets\[0\] is 37, expected an id in"),
    "target negative": ({"targets": torch.full((2, 6), -1)}, ValueError, r"targets\[0\] is -1, expected an id in"),
    "targets shape": ({"targets": torch.zeros(12).long()}, ValueError, r"targets has shape \(12,\), expected \(2, 6\)"),
    "float targets": ({"targets": torch.zeros(2, 6)}, TypeError, "targets has dtype torch.float32, expected int64"),
    "no targets": ({"targets": None}, TypeError, "targets is a NoneType, expected a torch.Tensor"),
    "no hidden": ({"hidden": None}, TypeError, "hidden is a NoneType, expected a torch.Tensor"),
    "mask": ({"mask": torch.ones(2, 6)}, TypeError, "unknown keyword 'mask', expected one of bias, lora"),
}


@checks_only
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input(name: str, implementation: str) -> None:
    changes, error, message = BAD_INPUTS[name]
    with pytest.raises(error, match=message):
        linear_cross_entropy(**(batch() | changes))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_pytorch_does_not_matter(default: torch.dtype) -> None:
    """Programs that load a model set it."""
    ids = testing.random_ids(8, vocab=40)
    hidden, weight = testing.random_logits(8, 16).bfloat16(), testing.random_logits(40, 16).bfloat16()

    def gradients() -> tuple[Tensor, ...]:
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with backend(testing.KERNELS):
            loss = linear_cross_entropy(*leaves, ids) + linear_token_logprobs(*leaves, ids).sum().float()
            return torch.autograd.grad(loss, leaves)

    expected, before = gradients(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        found = gradients()
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))

"""Cross-entropy: gradcheck, float64 oracle, compile, ignored targets, normalizer, bad input."""

import math
from typing import Any

import pytest
import torch
from backends import checks_only, compiles, reference_only, shapes_only
from torch import Tensor
from torch._subclasses import FakeTensorMode

from r1kernels import backend, cross_entropy, testing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def batch(dtype: torch.dtype = torch.float32, vocab: int = 500) -> tuple[Tensor, Tensor]:
    """(2, 6, V) logits and targets of which every third is ignored."""
    targets = testing.random_ids(2, 6, vocab=vocab)
    targets[:, ::3] = -100
    return testing.random_logits(2, 6, vocab, dtype=dtype), targets


def exact(logits: Tensor, targets: Tensor, weight: float, temperature: float = 1.0) -> tuple[Tensor, testing.Expected]:
    """Losses per token and the gradient of their sum times `weight`."""
    counted = targets != -100
    ids = torch.where(counted, targets, 0)
    losses = torch.where(counted, -testing.token_stats(logits, ids, temperature).logprobs, 0)
    return losses, testing.token_stats_gradient(logits, ids, -weight * counted.double(), 0.0, temperature)


@reference_only
def test_reference_gradcheck() -> None:
    logits, targets = testing.random_logits(2, 3, 7).double().requires_grad_(), torch.tensor([[1, -100, 3], [0, 6, 2]])
    with backend("reference"):
        assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets, temperature=0.7), logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_values_and_gradients(dtype: torch.dtype, reduction: str, temperature: float) -> None:
    logits, targets = batch(dtype)
    counted = int((targets != -100).sum())
    source = logits.clone().requires_grad_()
    with backend(testing.KERNELS):
        loss = cross_entropy(source, targets, reduction=reduction, temperature=temperature)
        loss.sum().backward()
    losses, grad = exact(logits, targets, 1 / counted if reduction == "mean" else 1.0, temperature)
    expected = {"mean": losses.sum() / counted, "sum": losses.sum(), "none": losses}[reduction]
    assert loss.dtype == torch.float32 and source.grad.dtype == dtype
    testing.assert_within(loss, expected, 4 * testing.EPS32 * (expected.abs() + losses.abs().max()))
    testing.assert_within(source.grad, grad)


def test_agrees_with_torch(implementation: str) -> None:
    logits, targets = batch()
    for reduction in ("mean", "sum", "none"):
        exact = torch.nn.functional.cross_entropy(logits.double().mT, targets, reduction=reduction)
        got = cross_entropy(logits, targets, reduction=reduction)
        testing.assert_within(got, exact, 4 * testing.EPS32 * (exact.abs() + logits.abs().max()))


def test_nothing_of_an_ignored_target_matters(implementation: str) -> None:
    logits, targets = batch()
    poisoned = testing.poisoned(logits, targets != -100)
    for reduction in ("mean", "sum", "none"):
        results = []
        for values in (logits, poisoned):
            source = values.clone().requires_grad_()
            loss = cross_entropy(source, targets, reduction=reduction)
            loss.sum().backward()
            results.append((loss, source.grad))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
        assert not results[1][1][targets == -100].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(2, 6), (0,), (3, 0)])
def test_all_ignored_or_no_targets_give_zero(reduction: str, shape: tuple[int, ...], implementation: str) -> None:
    logits = torch.full((*shape, 9), math.nan, requires_grad=True)
    loss = cross_entropy(logits, torch.full(shape, -100), reduction=reduction)
    loss.sum().backward()
    assert not loss.any() and not logits.grad.any()


def test_another_ignore_index_may_lie_inside_the_vocabulary(implementation: str) -> None:
    logits, targets = batch()
    targets[targets == 3] = 4
    kept = cross_entropy(logits, targets)
    assert torch.equal(kept, cross_entropy(logits, torch.where(targets == -100, 3, targets), ignore_index=3))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_normalizer_makes_micro_batches_add_up(as_tensor: bool, implementation: str) -> None:
    logits, targets = batch()
    whole, parts = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    cross_entropy(whole, targets).backward()
    count = (targets != -100).sum()
    for row in range(2):
        normalizer = count if as_tensor else count.item()
        cross_entropy(parts[row, :4], targets[row, :4], normalizer=normalizer).backward()
        cross_entropy(parts[row, 4:], targets[row, 4:], normalizer=normalizer).backward()
    torch.testing.assert_close(whole.grad, parts.grad, rtol=1e-6, atol=0)


@compiles
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
def test_compile_fullgraph(implementation: str) -> None:
    logits, targets = batch()
    results = []
    for function in (cross_entropy, testing.compiled(cross_entropy)):
        source = logits.clone().requires_grad_()
        loss = function(source, targets)
        loss.backward()
        results.append((loss.detach(), source.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@shapes_only
@pytest.mark.parametrize("device", ["cpu", "meta", "cuda"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fakes(device: str, reduction: str) -> None:
    with FakeTensorMode():
        logits = torch.empty(2, 3, 11, dtype=torch.bfloat16, device=device)
        loss = cross_entropy(logits, torch.zeros(2, 3, dtype=torch.int64, device=device), reduction=reduction)
    assert (loss.dtype, loss.device.type) == (torch.float32, device)
    assert loss.shape == (() if reduction == "mean" else (2, 3))


LOGITS, TARGETS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)


@checks_only
@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((LOGITS, TARGETS + 5), {}, ValueError, r"targets\[0\] is 5, expected an id in \[0, 5\)"),
        ((LOGITS, TARGETS - 1), {}, ValueError, r"targets\[0\] is -1, expected an id in \[0, 5\)"),
        ((LOGITS, TARGETS[:, :2]), {}, ValueError, r"targets has shape \(2, 2\), expected \(2, 3\)"),
        ((LOGITS, TARGETS.float()), {}, TypeError, "targets has dtype torch.float32, expected int64 or int32"),
        ((LOGITS.long(), TARGETS), {}, TypeError, "logits has dtype torch.int64"),
        ((LOGITS, TARGETS), {"reduction": "avg"}, ValueError, "reduction is 'avg', expected one of mean, sum, none"),
        ((LOGITS, TARGETS), {"temperature": 0.0}, ValueError, r"temperature is 0\.0, expected"),
        ((LOGITS, TARGETS), {"normalizer": 0}, ValueError, "normalizer is 0, expected a finite number > 0"),
        ((LOGITS, TARGETS), {"normalizer": torch.tensor(0.0)}, ValueError, r"normalizer is 0\.0, expected a positive"),
        ((LOGITS, TARGETS), {"ignore_index": None}, TypeError, "ignore_index is None, expected an integer"),
        ((LOGITS, TARGETS), {"normalizer": torch.ones(2)}, ValueError, r"normalizer has shape \(2,\), expected \(\)"),
        (
            (LOGITS, TARGETS), {"normalizer": 2, "reduction": "sum"},
            ValueError, "normalizer was given with reduction 'sum', expected 'mean'",
        ),
    ],
)
def test_bad_input(
    arguments: tuple[Any, ...], keywords: dict[str, Any], error: type[Exception], message: str, implementation: str
) -> None:
    with pytest.raises(error, match=message):
        cross_entropy(*arguments, **keywords)

"""Label smoothing and z-loss of `cross_entropy`: gradcheck, float64 oracle, torch, compile, layouts, bad input."""

import math
from typing import Any

import pytest
import torch
from backends import checks_only, compiles, reference_only, shapes_only, slow_interpreted, without_cuda_kernels
from torch import Tensor
from torch._subclasses import FakeTensorMode

from r1kernels import backend, cross_entropy, testing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TERMS = {
    "smoothing": {"label_smoothing": 0.1}, "z-loss": {"z_loss_coef": 0.02},
    "both": {"label_smoothing": 0.3, "z_loss_coef": 0.02},
}

pytestmark = without_cuda_kernels


def batch(dtype: torch.dtype = torch.float32, vocab: int = 500) -> tuple[Tensor, Tensor]:
    """(2, 6, V) logits and targets of which every third is ignored."""
    targets = testing.random_ids(2, 6, vocab=vocab)
    targets[:, ::3] = -100
    return testing.random_logits(2, 6, vocab, dtype=dtype), targets


def in_torch(logits: Tensor, targets: Tensor, reduction: str, z_loss_coef: float = 0.0, **smoothing: float) -> Tensor:
    """The same from PyTorch's functions."""
    counted = targets != -100
    losses = torch.nn.functional.cross_entropy(logits.movedim(-1, 1), targets, reduction="none", **smoothing)
    losses = losses + torch.where(counted, z_loss_coef * logits.logsumexp(-1).square(), 0)
    total = losses if reduction == "none" else losses.sum()
    return total / counted.sum() if reduction == "mean" else total


def exact(logits: Tensor, targets: Tensor, weight: float, temperature: float, terms: dict[str, float]) -> Any:
    """Losses per token, and the gradient of their sum times `weight`."""
    counted = targets != -100
    z, ids = logits.double().flatten(0, -2) / temperature, torch.where(counted, targets, 0).reshape(1, -1)
    losses = torch.where(counted, testing.target_losses(z, ids, **terms).reshape(targets.shape), 0)
    grad = testing.target_gradient(z, ids, weight * counted.double().reshape(1, -1), **terms)
    return losses, testing.Expected(*(value.reshape(logits.shape) / temperature for value in grad))


@reference_only
@pytest.mark.parametrize("terms", TERMS)
def test_reference_gradcheck(terms: str) -> None:
    logits, targets = testing.random_logits(2, 3, 7).double().requires_grad_(), torch.tensor([[1, -100, 3], [0, 6, 2]])
    with backend("reference"):
        for reduction in ("mean", "none"):
            assert torch.autograd.gradcheck(
                lambda x, r=reduction: cross_entropy(x, targets, temperature=0.7, reduction=r, **TERMS[terms]), logits
            )


@reference_only
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_float64_is_what_torch_computes(reduction: str, terms: str) -> None:
    logits, targets = batch(torch.float64)
    results = []
    for function in (in_torch, cross_entropy):
        source = logits.clone().requires_grad_()
        with backend("reference"):
            loss = function(source, targets, reduction=reduction, **TERMS[terms])
            results.append((loss.detach(), *torch.autograd.grad(loss.square().sum(), source)))
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("terms", TERMS)
def test_values_and_gradients(dtype: torch.dtype, reduction: str, temperature: float, terms: str) -> None:
    logits, targets = batch(dtype)
    counted = int((targets != -100).sum())
    source = logits.clone().requires_grad_()
    with backend(testing.KERNELS):
        loss = cross_entropy(source, targets, reduction=reduction, temperature=temperature, **TERMS[terms])
        loss.sum().backward()
    losses, grad = exact(logits, targets, 1 / counted if reduction == "mean" else 1.0, temperature, TERMS[terms])
    expected = {"mean": losses.sum() / counted, "sum": losses.sum(), "none": losses}[reduction]
    assert loss.dtype == torch.float32 and source.grad.dtype == dtype
    testing.assert_within(loss, expected, 4 * testing.EPS32 * (expected.abs() + losses.abs().max() + 20))
    testing.assert_within(source.grad, grad)


@pytest.mark.parametrize("terms", TERMS)
@slow_interpreted
def test_nothing_of_an_ignored_target_matters(terms: str, implementation: str) -> None:
    logits, targets = batch()
    poisoned = testing.poisoned(logits, targets != -100)
    for reduction in ("mean", "none"):
        results = []
        for values in (logits, poisoned):
            source = values.clone().requires_grad_()
            loss = cross_entropy(source, targets, reduction=reduction, **TERMS[terms])
            loss.sum().backward()
            results.append((loss, source.grad))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
        assert not results[1][1][targets == -100].any()


@pytest.mark.parametrize("shape", [(2, 6), (0,), (3, 0)])
def test_all_ignored_or_no_targets_give_zero(shape: tuple[int, ...], implementation: str) -> None:
    logits = torch.full((*shape, 9), math.nan, requires_grad=True)
    loss = cross_entropy(logits, torch.full(shape, -100), **TERMS["both"])
    loss.backward()
    assert not loss and not logits.grad.any()


@pytest.mark.parametrize("terms", TERMS)
def test_rows_that_no_view_can_flatten(terms: str, implementation: str) -> None:
    logits, targets = batch()
    whole, part = logits.clone().requires_grad_(), logits[:, :-1].clone().requires_grad_()
    for source, values in ((whole, whole[:, :-1]), (part, part)):
        cross_entropy(values, targets[:, 1:], **TERMS[terms]).backward()
        assert source.grad.isfinite().all()
    assert torch.equal(whole.grad[:, :-1], part.grad) and not whole.grad[:, -1].any()


@pytest.mark.parametrize("terms", TERMS)
def test_padding_counts_for_nothing(terms: str, implementation: str) -> None:
    logits, targets = batch()
    padded = torch.nn.functional.pad(logits, (0, 12), value=math.nan).requires_grad_()
    plain = logits.clone().requires_grad_()
    losses = [
        cross_entropy(source, targets, vocab_size=500, **TERMS[terms]) for source in (plain, padded)
    ]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    assert torch.equal(padded.grad[..., :500], plain.grad) and not padded.grad[..., 500:].any()


def test_terms_of_0_keep_the_bits(implementation: str) -> None:
    logits, targets = batch()
    assert torch.equal(
        cross_entropy(logits, targets), cross_entropy(logits, targets, z_loss_coef=0, label_smoothing=0.0)
    )


def test_logits_of_minus_infinity(implementation: str) -> None:
    """As in torch: a smoothed loss is infinite, and its gradient is finite."""
    logits, targets = batch()
    logits[..., 7] = -torch.inf
    targets[targets == 7] = 8
    source = logits.clone().requires_grad_()
    assert cross_entropy(source, targets, label_smoothing=0.1) == torch.inf
    loss = cross_entropy(source, targets, z_loss_coef=0.1)
    loss.backward()
    assert loss.isfinite() and source.grad.isfinite().all() and not source.grad[..., 7].any()


@compiles
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph(reduction: str, implementation: str) -> None:
    logits, targets = batch()
    results = []
    for function in (cross_entropy, testing.compiled(cross_entropy)):
        source = logits.clone().requires_grad_()
        loss = function(source, targets, reduction=reduction, **TERMS["both"])
        loss.sum().backward()
        results.append((loss.detach(), source.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)


@shapes_only
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fakes(device: str) -> None:
    with FakeTensorMode():
        logits = torch.empty(2, 3, 11, dtype=torch.bfloat16, device=device)
        loss = cross_entropy(logits, torch.zeros(2, 3, dtype=torch.int64, device=device), **TERMS["both"])
    assert (loss.dtype, loss.device.type, loss.shape) == (torch.float32, device, ())


@checks_only
@pytest.mark.parametrize(("name", "value", "error", "message"), [
    ("z_loss_coef", -1e-4, ValueError, r"z_loss_coef is -0\.0001, expected a finite number >= 0"),
    ("z_loss_coef", math.nan, ValueError, "z_loss_coef is nan"),
    ("z_loss_coef", torch.tensor(0.1), TypeError, "z_loss_coef is tensor.*, expected a Python number"),
    ("label_smoothing", 1.5, ValueError, r"label_smoothing is 1\.5, expected a number from 0 to 1"),
    ("label_smoothing", -0.1, ValueError, r"label_smoothing is -0\.1, expected a finite number >= 0"),
    ("label_smoothing", None, TypeError, "label_smoothing is None, expected a Python number"),
])
def test_bad_input(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cross_entropy(*batch(), **{name: value})
    with pytest.raises(ValueError, match=r"targets\[1\] is 500, expected an id in \[0, 500\)"):
        cross_entropy(batch()[0], torch.full((2, 6), 500).index_fill(1, torch.tensor([0]), -100), label_smoothing=0.1)

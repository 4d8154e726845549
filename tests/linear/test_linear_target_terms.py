"""Label smoothing and z-loss of `linear_cross_entropy`: float64 oracle, torch, bits, split tokens, compile."""

from typing import Any

import linear_cases as cases
import pytest
import target_cases
import torch
from backends import compiles, reference_only, slow_interpreted, without_cuda_kernels
from target_cases import TERMS

from r1kernels import backend, cross_entropy, linear_cross_entropy, testing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GIVEN = sorted(set(TERMS) - {"none"})

pytestmark = without_cuda_kernels


def batch(head: str = "plain", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """One depth of `target_cases`, whose ignored targets are -100."""
    case = target_cases.make(head, 1, dtype=dtype)
    masks = case.pop("masks")[0]
    return case | {"token_ids": torch.where(masks, case["token_ids"][0], -100)}


def exact(case: dict[str, Any], weight: float, terms: str) -> Any:
    masks = case["token_ids"] != -100
    whole = case | {"token_ids": case["token_ids"][None], "masks": masks[None]}
    losses, expected = target_cases.exact(whole, weight * masks[None].double(), TERMS[terms])
    return losses[0], expected


def run(case: dict[str, Any], **keywords: Any) -> Any:
    return cases.gradients(
        lambda token_ids, **head: linear_cross_entropy(targets=token_ids, **head), case, lambda value: value.sum(),
        **keywords,
    )


@reference_only
@pytest.mark.parametrize("terms", GIVEN)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("head", cases.HEADS)
@pytest.mark.parametrize("rows", [1, 100])
def test_float64_is_the_dense_computation(reduction: str, head: str, rows: int, terms: str) -> None:
    case = batch(head, torch.float64)
    count = int((case["token_ids"] != -100).sum())
    losses, expected = exact(case, 1 / count if reduction == "mean" else 1.0, terms)
    with backend("reference"):
        loss, grads = run(
            case, reduction=reduction, chunk_bytes=cases.chunk_of(rows, 37, 12, torch.float64), **TERMS[terms]
        )
    value = {"mean": losses.sum() / count, "sum": losses.sum(), "none": losses}[reduction]
    testing.assert_within(loss, value, 1e-12)
    cases.assert_gradients(grads, expected, 1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("head", ["plain", "bias", "softcap", "temperatures"])
@pytest.mark.parametrize("terms", GIVEN)
def test_values_and_gradients(
    dtype: torch.dtype, reduction: str, head: str, terms: str, implementation: str
) -> None:
    case = batch(head, dtype)
    count = int((case["token_ids"] != -100).sum())
    loss, grads = run(case, reduction=reduction, **TERMS[terms])
    losses, expected = exact(case, 1 / count if reduction == "mean" else 1.0, terms)
    value = {"mean": losses.sum() / count, "sum": losses.sum(), "none": losses}[reduction]
    assert loss.dtype == torch.float32
    testing.assert_within(loss, value, 4e-6 * (1 + value.abs()))
    cases.assert_gradients(grads, expected, 4e-6 + (torch.finfo(dtype).eps if dtype != torch.float32 else 0))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@slow_interpreted
def test_agrees_with_torch_and_with_cross_entropy(smoothing: float, implementation: str) -> None:
    case = batch()
    targets = case.pop("token_ids")
    logits = case["hidden"].double() @ case["weight"].double().T
    for reduction in ("mean", "sum", "none"):
        expected = torch.nn.functional.cross_entropy(
            logits.mT, targets, reduction=reduction, label_smoothing=smoothing
        )
        loss = linear_cross_entropy(**case, targets=targets, reduction=reduction, label_smoothing=smoothing)
        testing.assert_within(loss, expected, 1e-5)
        dense = cross_entropy(logits.float(), targets, reduction=reduction, label_smoothing=smoothing)
        torch.testing.assert_close(loss, dense, rtol=1e-6, atol=1e-5)


def test_terms_of_0_keep_the_bits(implementation: str) -> None:
    for head, dtype in (("plain", torch.float32), ("everything", torch.bfloat16)):
        case = batch(head, dtype)
        plain, given = run(case), run(case, z_loss_coef=0, label_smoothing=0)
        assert torch.equal(plain[0], given[0])
        assert all(torch.equal(grad, given[1][name]) for name, grad in plain[1].items())


@pytest.mark.parametrize("head", ["plain", "everything"])
def test_micro_batches_add_up(head: str, implementation: str) -> None:
    case = batch(head)
    count = int((case["token_ids"] != -100).sum())
    _, whole = run(case, **TERMS["both"])
    per_token = ("hidden", "token_ids", "temperature")
    parts = [
        run(
            case | {name: case[name][row] for name in per_token if name in case}, normalizer=count, **TERMS["both"]
        )[1] for row in range(2)
    ]
    for name, grad in whole.items():
        added = torch.stack([part[name] for part in parts]) if name == "hidden" else sum(part[name] for part in parts)
        torch.testing.assert_close(added, grad, rtol=1e-5, atol=1e-6)


@compiles
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph(reduction: str, implementation: str) -> None:
    case = batch("bias")
    eager = run(case, reduction=reduction, **TERMS["both"])
    compiled = cases.gradients(
        testing.compiled(lambda token_ids, **head: linear_cross_entropy(
            targets=token_ids, reduction=reduction, **TERMS["both"], **head)), case, lambda value: value.sum(),
    )
    torch.testing.assert_close(compiled[0], eager[0], rtol=1e-6, atol=1e-7)
    for name, grad in eager[1].items():
        torch.testing.assert_close(compiled[1][name], grad, rtol=1e-5, atol=1e-6)

"""Several targets of one head: float64 oracle, products, masks, factors of depths, operators, compile, bad input."""

import math
from typing import Any

import linear_cases as cases
import pytest
import target_cases
import torch
from backends import checks_only, compiles, reference_only, registration_only, slow_interpreted, without_cuda_kernels
from gathering_cases import Products, as_on_a_gpu
from hypothesis import given
from hypothesis import strategies as st
from target_cases import LEAD, TERMS
from torch import Tensor

from r1kernels import backend, linear_cross_entropy, linear_multi_target, testing
from r1kernels.ops.linear import gemm, sums, targets, walk
from r1kernels.ops.linear.budget import BufferRows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FACTORS = {"equal": torch.full((3,), 0.7), "different": torch.tensor([1.0, 0.3, -0.5])}

pytestmark = without_cuda_kernels


def reduced(losses: Tensor, masks: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    sums = losses.flatten(1).sum(1)
    return sums if reduction == "sum" else sums / masks.flatten(1).sum(1).clamp(min=1)


def token_weights(masks: Tensor, reduction: str, factors: Tensor) -> Tensor:
    """The factor of each loss in the sum of factors reduced losses."""
    weights = masks.double() * factors.double()[:, None, None]
    if reduction == "mean":
        weights = weights / masks.flatten(1).sum(1).clamp(min=1)[:, None, None]
    return weights


def run(case: dict[str, Any], factors: Tensor, reduction: str = "mean", **more: Any) -> Any:
    """The losses, and the gradients of the sum of factors losses; equal factors come from `losses.sum()`."""

    def upstream(losses: Tensor) -> Tensor:
        if (factors == factors[0]).all():
            return losses.sum() * factors[0].to(losses.dtype)
        return (losses * factors.to(losses.dtype).reshape(-1, *[1] * (losses.dim() - 1))).sum()

    return cases.gradients(linear_multi_target, case, upstream, reduction=reduction, **more)


@pytest.mark.few(2)
@reference_only
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction: str, shared: bool) -> None:
    case = target_cases.make(shared=shared, dtype=torch.float64, width=3, vocab=7)
    leaves = [case[name].requires_grad_() for name in ("hidden", "weight")]
    with backend("reference"):
        assert torch.autograd.gradcheck(
            lambda h, w: linear_multi_target(
                h, w, case["token_ids"], masks=case["masks"], reduction=reduction, softcap=3.0, **TERMS["both"]
            ), leaves
        )


@pytest.mark.few(12)
@reference_only
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("head", cases.HEADS)
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("terms", TERMS)
def test_float64_is_the_dense_computation(
    terms: str, factors: str, head: str, reduction: str, shared: bool
) -> None:
    case = target_cases.make(head, shared=shared, dtype=torch.float64)
    weights = token_weights(case["masks"], reduction, FACTORS[factors])
    values, expected = target_cases.exact(case, weights, TERMS[terms])
    with backend("reference"):
        losses, grads = run(
            case, FACTORS[factors], reduction, chunk_bytes=cases.chunk_of(3, 37, 12, torch.float64), **TERMS[terms]
        )
    testing.assert_within(losses, reduced(values, case["masks"], reduction), 1e-12)
    cases.assert_gradients(grads, expected, 1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("head", ["plain", "bias", "everything"])
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("terms", TERMS)
def test_values_and_gradients(
    terms: str, factors: str, head: str, reduction: str, shared: bool, dtype: torch.dtype, implementation: str
) -> None:
    case = target_cases.make(head, shared=shared, dtype=dtype)
    weights = token_weights(case["masks"], reduction, FACTORS[factors])
    values, expected = target_cases.exact(case, weights, TERMS[terms])
    losses, grads = run(case, FACTORS[factors], reduction, **TERMS[terms])
    values = reduced(values, case["masks"], reduction)
    slack = 10 * torch.finfo(dtype).eps if dtype != torch.float32 and head == "everything" else 4e-6
    assert losses.dtype == torch.float32
    testing.assert_within(losses, values, slack * (1 + values.abs()))
    cases.assert_gradients(grads, expected, slack + (torch.finfo(dtype).eps if dtype != torch.float32 else 0))


@slow_interpreted
@given(
    depths=st.integers(1, 4), tokens=st.integers(0, 5), vocab=st.sampled_from([1, 2, 5, 40]), rows=st.integers(1, 4),
    seed=st.integers(0, 99), shared=st.booleans(), masked=st.booleans(), terms=st.sampled_from(sorted(TERMS)),
    equal=st.booleans(), scale=st.sampled_from([2.0, 40.0]),
)
def test_any_shape_is_that_of_a_call_for_each_depth(
    depths: int, tokens: int, vocab: int, rows: int, seed: int, shared: bool, masked: bool, terms: str, equal: bool,
    scale: float,
) -> None:
    """Of small vocabularies, most ids are targets of several depths; with large logits, probabilities are near 1."""
    lead = (tokens,) if shared else (depths, tokens)
    case = cases.make("plain", *lead, vocab=vocab, seed=seed, scale=scale)
    ids = testing.random_ids(depths, tokens, vocab=vocab, seed=seed)
    masks = testing.random_ids(depths, tokens, vocab=3, seed=seed) > 0 if masked else None
    factors = torch.ones(depths) if equal else torch.arange(1.0, depths + 1)
    mine, theirs = ([case[name].clone().requires_grad_() for name in ("hidden", "weight")] for _ in range(2))
    with backend(testing.KERNELS):
        losses = linear_multi_target(
            *mine, ids, masks=masks, chunk_bytes=cases.chunk_of(rows, vocab, 12), **TERMS[terms]
        )
        (losses.sum() if equal else (losses * factors).sum()).backward()
        single = torch.stack([
            linear_cross_entropy(
                theirs[0] if shared else theirs[0][d], theirs[1],
                ids[d] if masks is None else torch.where(masks[d], ids[d], -100), **TERMS[terms],
            ) for d in range(depths)
        ])
    (single * factors).sum().backward()
    size = 1 + case["hidden"].abs().amax() * case["weight"].abs().amax() * 12 if tokens else 1
    torch.testing.assert_close(losses, single, rtol=1e-5, atol=float(1e-6 * size))
    for ours, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-5, atol=float(4e-6 * depths * size))


def products_of(monkeypatch: pytest.MonkeyPatch, case: dict[str, Any], factors: Tensor, **more: Any) -> list[int]:
    """Rows of each product with a matrix of the vocabulary, in the order of the walks."""
    rows: list[int] = []
    whole = gemm.matmul

    def counted(a: Tensor, b: Tensor, out: Tensor, **how: bool) -> Tensor:
        rows.append(a.shape[0] if a.shape[1] in (12, 37) and out.shape != (37, 12) else a.shape[1])
        return whole(a, b, out, **how)

    for module in (walk, sums):
        monkeypatch.setattr(module, "matmul", counted)
    with backend(testing.KERNELS):
        run(case, factors, **more)
    return rows


@pytest.mark.parametrize("factors", FACTORS)
def test_logits_of_shared_hidden_states_are_computed_once(factors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = target_cases.make()
    count = int(case["masks"].any(0).sum())
    again = 0 if factors == "equal" else 3
    assert products_of(monkeypatch, case, FACTORS[factors]) == [count] * (3 + again)


@slow_interpreted
def test_rows_of_all_depths_are_in_one_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    case = target_cases.make(shared=False)
    assert products_of(monkeypatch, case, FACTORS["equal"]) == [int(case["masks"].sum())] * 3
    assert products_of(monkeypatch, case, FACTORS["equal"], reduction="none") == [int(case["masks"].sum())] * 4


@pytest.mark.parametrize("head", ["plain", "everything"])
@pytest.mark.parametrize("capacity", [None, 10, 40])
@pytest.mark.parametrize("shared", [False, True])
@slow_interpreted
def test_nothing_behind_the_masks_matters(
    shared: bool, capacity: int | None, head: str, implementation: str
) -> None:
    case = target_cases.make(head, shared=shared)
    counted = case["masks"].any(0) if shared else case["masks"]
    capacity = capacity if shared or capacity is None else 3 * capacity
    dirty = case | {"hidden": testing.poisoned(case["hidden"], counted)}
    results = [run(given, FACTORS["equal"], capacity=capacity, **TERMS["both"]) for given in (case, dirty)]
    assert torch.equal(results[0][0], results[1][0]) and results[1][0].isfinite().all()
    for name, grad in results[0][1].items():
        assert torch.equal(grad, results[1][1][name]), name


@pytest.mark.not_on("cuda", "triton", reason="tests the walk of a GPU on the CPU")
@pytest.mark.parametrize("rows", [(4, 9), (2, 0), (100, 100)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathered_rows(
    dtype: torch.dtype, shared: bool, rows: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = target_cases.make("bias", shared=shared, dtype=dtype)
    weights = token_weights(case["masks"], "mean", FACTORS["equal"])
    _, expected = target_cases.exact(case, weights, TERMS["both"])
    with as_on_a_gpu(monkeypatch, BufferRows(*rows)):
        products = Products(monkeypatch)
        _, grads = run(case, FACTORS["equal"], **TERMS["both"])
        two_phases = run(case, FACTORS["equal"], "none", **TERMS["both"])[1]
    assert products.weight
    cases.assert_gradients(grads, expected, 2e-5 + (torch.finfo(dtype).eps if dtype != torch.float32 else 0))
    assert all(grad.isfinite().all() for grad in two_phases.values())


@pytest.mark.parametrize("normalizer", [2.5, torch.tensor(2.5), torch.tensor([2.0, 3.0, 4.0])])
def test_normalizer(normalizer: Any, implementation: str) -> None:
    case = target_cases.make()
    divisor = torch.as_tensor(normalizer).double().expand(3)
    values, expected = target_cases.exact(case, case["masks"] / divisor[:, None, None], {})
    losses, grads = run(case, torch.ones(3), normalizer=normalizer)
    testing.assert_within(losses, values.flatten(1).sum(1) / divisor, 1e-5)
    cases.assert_gradients(grads, expected, 4e-6)


@slow_interpreted
@pytest.mark.parametrize("shared", [False, True])
def test_the_weight_gradient_may_go_elsewhere(shared: bool, implementation: str) -> None:
    case = target_cases.make(shared=shared)
    for factors in FACTORS.values():
        _, grads = run(case, factors)
        weight, into = case["weight"].clone().requires_grad_(), torch.ones(case["weight"].shape)
        losses = linear_multi_target(**case | {"weight": weight}, grad_accumulation_into=into)
        (losses * factors).sum().backward()
        assert weight.grad is None
        torch.testing.assert_close(into - 1, grads["weight"], rtol=1e-5, atol=1e-6)


def test_a_backward_may_run_twice_and_only_once_differentiated(implementation: str) -> None:
    case = target_cases.make()
    weight = case["weight"].clone().requires_grad_()
    losses = linear_multi_target(**case | {"weight": weight})
    first, again = (torch.autograd.grad(losses.sum(), weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    other = torch.autograd.grad((losses * FACTORS["different"]).sum(), weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        other.sum().backward()


def test_factors_on_a_device_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "values_are_free", lambda value: False)
    assert targets._are_equal(torch.ones(()).expand(3)) and targets._are_equal(torch.ones(1))
    assert not targets._are_equal(torch.ones(3))


def test_temperatures_of_shared_rows(implementation: str) -> None:
    case = target_cases.make("temperatures")
    assert case["temperature"].shape == LEAD
    values, _ = target_cases.exact(case, case["masks"], {})
    testing.assert_within(run(case, torch.ones(3), "none")[0], values, 1e-5)


def test_losses_near_0_keep_their_relative_accuracy() -> None:
    """Whichever of the targets of a row has a probability near 1."""
    hidden, weight = (16 * torch.eye(12)[[3, 4, 5]]).bfloat16(), torch.eye(37, 12).bfloat16()
    ids = torch.tensor([[5, 4, 1], [3, 4, 2], [0, 2, 5]])
    with backend(testing.KERNELS):
        losses = linear_multi_target(hidden, weight, ids, reduction="none")
    exact = testing.target_losses(hidden.double() @ weight.double().T, ids)
    assert (exact < 1e-5).sum() == 4
    testing.assert_within(losses, exact, 1e-6 * exact)


@pytest.mark.not_on("triton", "cuda", reason="tests the sums of the host")
def test_the_rounding_error_of_a_repeated_target_is_added_once() -> None:
    """In 16 bits, entries of targets are rounded, and their rows of the weight's gradient get what was lost."""
    case = cases.make("plain", 40, vocab=5, dtype=torch.bfloat16)
    case["hidden"] = case["hidden"].abs()  # all errors of a row of the weight's gradient have one sign
    case["token_ids"] = torch.zeros(3, 40).long()
    case["masks"] = torch.ones(3, 40, dtype=torch.bool)
    with backend(testing.KERNELS):
        weight = case["weight"].clone().requires_grad_()
        into = torch.zeros(5, 12)
        linear_multi_target(
            case["hidden"], weight, case["token_ids"], reduction="sum", grad_accumulation_into=into
        ).sum().backward()
    _, _, z = cases.logits(case)
    grad = testing.target_gradient(z, case["token_ids"], torch.ones(3, 40)).value
    exact = grad.T @ case["hidden"].double()
    assert float((into[0] - exact[0]).norm() / exact[0].norm()) < 1e-6


# ---- the operators ------------------------------------------------------------------------------------------


@pytest.mark.few(2)
@registration_only
@pytest.mark.parametrize("depths", [1, 3])
@pytest.mark.parametrize(("head", "dtype", "capacity"), [
    ("plain", torch.float32, -1), ("everything", torch.bfloat16, 9),
])
def test_opcheck(head: str, dtype: torch.dtype, capacity: int, depths: int) -> None:
    case = target_cases.make(head, depths, dtype=dtype)
    masks = case["masks"].reshape(depths, -1)
    ids = torch.where(masks, case["token_ids"].reshape(depths, -1), 0)
    a, b = case.get("lora", (None, None))
    temperatures = case["temperature"].reshape(-1) if "temperature" in case else None
    arguments = (
        case["hidden"], case["weight"], case.get("bias"), a, b, ids[0].contiguous(), temperatures, 1.0,
        case.get("logit_scale", 1.0), case.get("softcap", 0.0), torch.float32, 4, 0, capacity, False,
    )
    full = head == "everything"
    for needs in ([True, True, full, full, full], [False] * 5):
        weights = masks.float() if any(needs) else None
        torch.library.opcheck(
            torch.ops.r1kernels.linear_targets, (*arguments, masks.any(0), ids, weights, 0.1, 0.2, needs)
        )
    _, lse, *_ = torch.ops.r1kernels.linear_targets(*arguments, masks.any(0), ids, None, 0.1, 0.2, [False] * 5)
    torch.library.opcheck(
        torch.ops.r1kernels.linear_targets_backward,
        (*arguments, ids, lse, masks.float(), 0.1, 0.2, dtype, [True, True, full, full, full]),
    )


@pytest.mark.few(1)
@compiles
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
@pytest.mark.parametrize("shared", [False, True])
def test_compile_fullgraph(shared: bool, implementation: str) -> None:
    case = target_cases.make("bias", shared=shared)
    eager = run(case, FACTORS["different"], **TERMS["both"])
    compiled = cases.gradients(
        testing.compiled(linear_multi_target), case, lambda losses: (losses * FACTORS["different"]).sum(),
        **TERMS["both"],
    )
    torch.testing.assert_close(compiled[0], eager[0], rtol=1e-6, atol=1e-7)
    for name, grad in eager[1].items():
        torch.testing.assert_close(compiled[1][name], grad, rtol=1e-5, atol=1e-6)


# ---- bad input ----------------------------------------------------------------------------------------------

BAD_INPUTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "reduction": ({"reduction": "avg"}, ValueError, "reduction is 'avg', expected one of mean, sum, none"),
    "shape of ids": ({"token_ids": torch.zeros(3, 2, 4).long()}, ValueError,
                     r"token_ids has shape \(3, 2, 4\) and hidden \(2, 5, 12\), expected token_ids \(D, N\)"),
    "no dimension of depths": (
        {"hidden": torch.zeros(5, 12), "token_ids": torch.zeros(5).long(), "masks": None}, ValueError,
        r"token_ids has shape \(5,\) and hidden \(5, 12\), expected .*\(D, N, H\), or without D, \(N, H\)"),
    "no dimension of tokens": (
        {"hidden": torch.zeros(12), "token_ids": torch.zeros(3).long(), "masks": None}, ValueError,
        r"token_ids has shape \(3,\) and hidden \(12,\), expected token_ids \(D, N\)"),
    "no depth": ({"token_ids": torch.zeros(0, 2, 5).long()}, ValueError, r"token_ids has shape \(0, 2, 5\)"),
    "shape of masks": ({"masks": torch.ones(2, 5)}, ValueError, r"masks has shape \(2, 5\), expected \(3, 2, 5\)"),
    "masks": ({"masks": [True]}, TypeError, "masks is a list, expected a torch.Tensor"),
    "id": ({"token_ids": torch.full((3, 2, 5), 37), "masks": None}, ValueError,
           r"token_ids\[0\] is 37, expected an id in \[0, 37\)"),
    "id of a later depth": (
        {"token_ids": torch.zeros(3, 2, 5).long().index_fill(0, torch.tensor([2]), -1), "masks": None}, ValueError,
        r"token_ids\[20\] is -1, expected an id in \[0, 37\)"),
    "normalizer shape": ({"normalizer": torch.ones(2)}, ValueError,
                         r"normalizer has shape \(2,\), expected \(\) or \(3,\)"),
    "normalizer 0": ({"normalizer": torch.zeros(3)}, ValueError, r"normalizer is \[0\.0, 0\.0, 0\.0\], expected pos"),
    "normalizer with sum": ({"normalizer": 2.0, "reduction": "sum"}, ValueError, "normalizer was given with reduction"),
    "smoothing": ({"label_smoothing": math.inf}, ValueError, "label_smoothing is inf"),
    "keyword": ({"mask": None}, TypeError, "unknown keyword 'mask', expected one of bias, lora"),
}


@checks_only
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input(name: str) -> None:
    changes, error, message = BAD_INPUTS[name]
    with pytest.raises(error, match=message):
        linear_multi_target(**(target_cases.make() | changes))

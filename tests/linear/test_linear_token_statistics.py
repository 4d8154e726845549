"""All statistics from hidden states against the dense float64 oracle: values, gradients, masks, operators, compile."""

from typing import Any

import linear_cases as cases
import pytest
import torch
from backends import checks_only, compiles, reference_only, registration_only, slow_interpreted, without_cuda_kernels
from test_linear_operators import MASK, head_arguments
from torch import Tensor

from r1kernels import (
    TokenStatistics,
    backend,
    linear_token_logprobs_and_entropy,
    linear_token_statistics,
    testing,
    token_statistics,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("logprobs", "lse", "entropy", "sum_sq_probs", "selected_logprobs")
K = 5
# CUDA has no kernel of all statistics: there the reference serves.
pytestmark = [
    without_cuda_kernels, pytest.mark.filterwarnings("ignore:r1kernels uses its reference implementation")
]


def selected_of(case: dict[str, Any]) -> Tensor:
    """K ids for each token; that of the first token twice."""
    selected = testing.random_ids(*case["token_ids"].shape, K, vocab=len(case["weight"]), seed=4)
    selected[(0,) * (selected.dim() - 1)][1:3] = case["token_ids"].flatten()[0]
    return selected


def upstream(result: TokenStatistics, names: tuple[str, ...] = NAMES) -> Tensor:
    """A sum over the statistics with weights that depend only on their shape and name."""
    total = torch.zeros((), dtype=torch.float64)
    for name in names:
        value = getattr(result, name)
        slopes = torch.randn(value.shape, generator=testing.generator(NAMES.index(name)))
        total = total + (slopes.to(value.dtype) * value).sum()
    return total


def dense(case: dict[str, Any], **keywords: Any) -> tuple[TokenStatistics, dict[str, Tensor]]:
    """Statistics and gradients in float64 by autograd through plain PyTorch."""
    wide = {
        name: value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.items()
    }
    if "lora" in case:
        wide["lora"] = tuple(matrix.detach().double() for matrix in case["lora"])

    def run(hidden: Tensor, weight: Tensor, token_ids: Tensor, selected_ids: Tensor, **head: Any) -> TokenStatistics:
        u = hidden @ weight.T
        if "lora" in head:
            u = u + hidden @ head["lora"][0] @ head["lora"][1]
        u = (u + head.get("bias", 0)) * head.get("logit_scale", 1.0)
        z = u if "softcap" not in head else head["softcap"] * torch.tanh(u / head["softcap"])
        t = head.get("temperature", 1.0)
        z = z / (t.unsqueeze(-1) if isinstance(t, Tensor) else t)
        return token_statistics(z, token_ids, selected_ids=selected_ids)

    names = keywords.pop("names", NAMES)
    with backend("reference"):
        return cases.gradients(run, wide, lambda result: upstream(result, names), **keywords)


def compare(
    got: tuple[TokenStatistics, dict[str, Tensor]], case: dict[str, Any], dtype: torch.dtype, slack: float, **how: Any
) -> None:
    (result, grads), (exact, expected) = got, dense(case, **how)
    for name, value in result._asdict().items():
        if name == "is_top1":
            assert torch.equal(value, exact.is_top1)
        else:
            testing.assert_within(value, getattr(exact, name).detach(), slack)
    for name, grad in grads.items():
        # d logits are rounded once to the dtype of hidden. The oracle's terms: what all rows would add without signs.
        size = cases.exact(case, *(torch.full(case["token_ids"].shape, 9.0) for _ in range(2))).terms[name]
        allowed = (slack + (torch.finfo(dtype).eps if dtype != torch.float64 else 0)) * size
        assert grad.dtype == dtype
        testing.assert_within(grad, expected[name], allowed + testing.rounding(expected[name], dtype))


# ---- 1. the chunk engine in float64 -------------------------------------------------------------------------


@reference_only
@pytest.mark.parametrize("head", cases.HEADS)
@pytest.mark.parametrize("rows", [4, 100])
def test_float64_is_the_dense_computation(head: str, rows: int) -> None:
    case = cases.make(head, 3, 4, dtype=torch.float64)
    selected = selected_of(case)
    with backend("reference"):
        got = cases.gradients(
            linear_token_statistics, case, upstream, selected_ids=selected,
            chunk_bytes=cases.chunk_of(rows, 37, 12, torch.float64),
        )
    compare(got, case, torch.float64, 1e-13, selected_ids=selected)


@reference_only
@pytest.mark.parametrize("head", ["plain", "everything"])
def test_gradcheck(head: str) -> None:
    case = cases.make(head, 4, width=3, vocab=7, dtype=torch.float64)
    names, selected = list(cases.tensors(case)), testing.random_ids(4, 2, vocab=7)

    def statistics(*values: Tensor) -> tuple[Tensor, ...]:
        given = cases.with_tensors(case, dict(zip(names, values, strict=True)))
        result = linear_token_statistics(**given, selected_ids=selected, mask=torch.tensor([1, 1, 0, 1]))
        return tuple(getattr(result, name) for name in NAMES)

    leaves = [value.requires_grad_() for value in cases.tensors(case).values()]
    with backend("reference"):
        assert torch.autograd.gradcheck(statistics, leaves)


# ---- 2. every dtype, both implementations -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", cases.HEADS)
@pytest.mark.parametrize("rows", [5, 100])
@pytest.mark.parametrize("names", [NAMES, ("sum_sq_probs",), ("lse",), ("entropy", "selected_logprobs")])
def test_values_and_gradients(
    head: str, dtype: torch.dtype, rows: int, names: tuple[str, ...], implementation: str
) -> None:
    case = cases.make(head, 3, 4, dtype=dtype)
    if "lora" in case:
        case["lora"] = tuple(matrix.to(dtype) for matrix in case["lora"])
    selected = selected_of(case)
    got = cases.gradients(
        linear_token_statistics, case, lambda result: upstream(result, names), selected_ids=selected,
        chunk_bytes=cases.chunk_of(rows, 37, 12),
    )
    slack = 10 * torch.finfo(dtype).eps if dtype != torch.float32 and "lora" in case else 8e-6
    compare(got, case, dtype, slack, selected_ids=selected, names=names)


@pytest.mark.parametrize("fields", [("logprobs", "entropy"), TokenStatistics._fields[:6]])
def test_log_prob_and_entropy_have_the_bits_of_their_own_function(
    fields: tuple[str, ...], implementation: str
) -> None:
    case = cases.make("everything", 3, 4, dtype=torch.bfloat16)
    result = linear_token_statistics(**case, fields=fields)
    assert tuple(name for name, value in result._asdict().items() if value is not None) == fields
    for value, expected in zip(
        (result.logprobs, result.entropy), linear_token_logprobs_and_entropy(**case), strict=True
    ):
        assert torch.equal(value, expected)


@slow_interpreted
def test_the_weight_gradient_is_added_to_given_memory(implementation: str) -> None:
    case = cases.make("plain", 3, 4)
    selected = selected_of(case)
    _, grads = cases.gradients(linear_token_statistics, case, upstream, selected_ids=selected)
    case["weight"].requires_grad_()
    into = torch.ones(case["weight"].shape)
    upstream(linear_token_statistics(**case, selected_ids=selected, grad_accumulation_into=into)).backward()
    assert case["weight"].grad is None
    testing.assert_within(into, grads["weight"].double() + 1, 1e-6)


# ---- 3. masks -----------------------------------------------------------------------------------------------


@slow_interpreted
@pytest.mark.parametrize("head", ["plain", "everything"])
@pytest.mark.parametrize("capacity", [None, 9])
def test_nothing_behind_the_mask_matters(head: str, capacity: int | None, implementation: str) -> None:
    case = cases.make(head, 3, 5)
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0]).bool().reshape(3, 5)
    selected = selected_of(case)
    dirty = case | {name: testing.poisoned(case[name], mask) for name in ("hidden", "token_ids")}
    if isinstance(case.get("temperature"), Tensor):
        dirty["temperature"] = testing.poisoned(case["temperature"], mask)
    keywords = {"mask": mask, "capacity": capacity, "chunk_bytes": cases.chunk_of(2, 37, 12)}
    clean = cases.gradients(linear_token_statistics, case, upstream, selected_ids=selected, **keywords)
    poisoned = cases.gradients(
        linear_token_statistics, dirty, upstream, selected_ids=testing.poisoned(selected, mask), **keywords
    )
    for a, b in zip(clean[0], poisoned[0], strict=True):
        assert torch.equal(a, b) and not b[~mask].any()
    for name, grad in clean[1].items():
        assert torch.equal(grad, poisoned[1][name]), name


@pytest.mark.parametrize("lead", [(), (0,), (2, 0)])
def test_shapes(lead: tuple[int, ...], implementation: str) -> None:
    case = cases.make("everything", *lead)
    selected = testing.random_ids(*lead, 2, vocab=37)
    result, grads = cases.gradients(linear_token_statistics, case, upstream, selected_ids=selected)
    for name, value in result._asdict().items():
        assert value.shape == ((*lead, 2) if name == "selected_logprobs" else lead), name
    for name, value in cases.tensors(case).items():
        assert grads[name].shape == value.shape


@checks_only
def test_errors_name_the_argument() -> None:
    case = cases.make("plain", 3)
    for error, message, keywords in (
        (ValueError, "fields has 'loss'", {"fields": ("loss",)}),
        (ValueError, "selected_ids has shape", {"selected_ids": torch.zeros(2, 3, dtype=torch.int64)}),
        (ValueError, r"selected_ids\[2\] is 37", {"selected_ids": torch.tensor([[1], [2], [37]])}),
        (ValueError, r"selected_ids\[1\] is 30", {"selected_ids": torch.tensor([[1], [30], [2]]), "vocab_size": 30}),
        (TypeError, "unknown keyword 'chunks'", {"chunks": 1}),
    ):
        given = case | {"token_ids": case["token_ids"] % 30}
        with pytest.raises(error, match=message):
            linear_token_statistics(**given, **keywords)


# ---- 4. operators -------------------------------------------------------------------------------------------


@pytest.mark.few(2)
@registration_only
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("mask", "capacity"), [(None, -1), (MASK, 5)])
@pytest.mark.parametrize("selected", [None, torch.arange(12).reshape(6, 2)])
def test_opcheck(full: bool, mask: Tensor | None, capacity: int, selected: Tensor | None) -> None:
    arguments = head_arguments(full, (torch.bfloat16, torch.bfloat16), capacity)
    operators = torch.ops.r1kernels
    torch.library.opcheck(operators.linear_token_statistics, (*arguments, mask, selected, 7))
    _, lse, entropy, more, _ = operators.linear_token_statistics(*arguments, mask, selected, 7)
    g = torch.ones(6) if mask is None else mask.float()
    slopes = [g, g, g, g, None if selected is None else g[:, None].expand(6, 2).contiguous()]
    needs = [True, True, *[full] * 3]
    torch.library.opcheck(operators.linear_token_statistics_backward, (
        *arguments, lse, entropy, more[0].contiguous(), selected, slopes, torch.bfloat16, needs,
    ))


@pytest.mark.few(1)
@compiles
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compile_fullgraph(implementation: str) -> None:
    case = cases.make("everything", 3, 4)
    selected = selected_of(case)
    mask = testing.random_ids(3, 4, vocab=3) > 0

    def run(**tensors: Tensor) -> Tensor:
        given = cases.with_tensors(case, tensors)
        result = linear_token_statistics(**given, selected_ids=selected, mask=mask)
        return sum(value.float().square().sum() for value in result)

    results = []
    for function in (run, testing.compiled(run)):
        leaves = {name: value.detach().requires_grad_() for name, value in cases.tensors(case).items()}
        loss = function(**leaves)
        loss.backward()
        results.append((loss.detach(), *(leaf.grad for leaf in leaves.values())))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)

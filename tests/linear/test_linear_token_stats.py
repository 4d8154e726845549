"""Log-probs and entropy from hidden states against the dense float64 oracle: values, gradients, precision, layouts."""

from collections.abc import Callable
from typing import Any

import linear_cases as cases
import pytest
import torch
from backends import reference_only, slow_interpreted
from torch import Tensor

from r1kernels import (
    backend,
    linear_token_logprobs,
    linear_token_logprobs_and_entropy,
    testing,
    token_logprobs,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CHUNK_ROWS = [1, 4, 7, 100]  # of 12 tokens: 12, 3 and 2 chunks, one


def both(g: Tensor, eta: Tensor) -> Callable[[Any], Tensor]:
    """sum g l + eta H, in the dtype of the results."""
    return lambda result: (g.to(result[0].dtype) * result[0] + eta.to(result[1].dtype) * result[1]).sum()


# ---- 1. the chunk engine in float64 -------------------------------------------------------------------------


@reference_only
@pytest.mark.parametrize("head", cases.HEADS)
@pytest.mark.parametrize("rows", CHUNK_ROWS)
def test_float64_is_the_dense_computation(head: str, rows: int) -> None:
    case = cases.make(head, 3, 4, dtype=torch.float64)
    g, eta = cases.weights_of(3, 4)
    g[1, 2] = eta[1, 2] = 0  # a row without a gradient
    chunk_bytes = cases.chunk_of(rows, 37, 12, torch.float64)
    expected = cases.exact(case, g, eta)
    with backend("reference"):
        (logprobs, entropy), grads = cases.gradients(
            linear_token_logprobs_and_entropy, case, both(g, eta), chunk_bytes=chunk_bytes
        )
    assert logprobs.dtype == entropy.dtype == torch.float64
    testing.assert_within(logprobs, expected.logprobs, 1e-13)
    testing.assert_within(entropy, expected.entropy, 1e-13)
    cases.assert_gradients(grads, expected, 1e-14)
    assert not grads["hidden"][1, 2].any()


@reference_only
@pytest.mark.parametrize("head", ["plain", "lora", "everything"])
def test_gradcheck(head: str) -> None:
    case = cases.make(head, 5, width=3, vocab=7, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, True])
    names = list(cases.tensors(case))

    def statistics(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = cases.with_tensors(case, dict(zip(names, values, strict=True)))
        return linear_token_logprobs_and_entropy(
            **named, mask=mask, chunk_bytes=cases.chunk_of(2, 7, 3, torch.float64)
        )

    leaves = [value.requires_grad_() for value in cases.tensors(case).values()]
    with backend("reference"):
        assert torch.autograd.gradcheck(statistics, leaves)


# ---- 2. every dtype, both implementations -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", cases.HEADS)
@pytest.mark.parametrize("rows", [5, 100])
def test_values_and_gradients(head: str, dtype: torch.dtype, rows: int, implementation: str) -> None:
    case = cases.make(head, 3, 4, dtype=dtype)
    g, eta = cases.weights_of(3, 4)
    if "lora" in case:  # hidden @ A is rounded to the dtype, as by every adapter: compare what follows from that
        case["lora"] = tuple(matrix.to(dtype) for matrix in case["lora"])
    (logprobs, entropy), grads = cases.gradients(
        linear_token_logprobs_and_entropy, case, both(g, eta), chunk_bytes=cases.chunk_of(rows, 37, 12)
    )
    expected = cases.exact(case, g, eta)
    assert logprobs.dtype == entropy.dtype == torch.float32
    narrow = dtype != torch.float32
    slack = 10 * torch.finfo(dtype).eps if narrow and "lora" in case else 4e-6
    testing.assert_within(logprobs, expected.logprobs, slack)
    testing.assert_within(entropy, expected.entropy, slack)
    for name, grad in grads.items():
        assert grad.dtype == dtype, name
    # d logits are rounded once to the dtype of hidden: half an eps of each term.
    cases.assert_gradients(grads, expected, slack + (torch.finfo(dtype).eps if narrow else 0))


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_the_two_outputs_alone(which: int, implementation: str) -> None:
    case = cases.make("bias", 3, 4)
    g, eta = cases.weights_of(3, 4)
    upstream = (g, eta)[which]
    expected = cases.exact(case, *((g, None) if which == 0 else (None, eta)))
    _, grads = cases.gradients(
        linear_token_logprobs_and_entropy, case, lambda result: (upstream.float() * result[which]).sum()
    )
    cases.assert_gradients(grads, expected, 4e-6)


def test_the_first_of_both_has_the_same_bits(implementation: str) -> None:
    case = cases.make("everything", 3, 4)
    logprobs, _ = linear_token_logprobs_and_entropy(**case)
    assert torch.equal(logprobs, linear_token_logprobs(**case))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "lora_a", "lora_b", "all but lora"])
def test_frozen_tensors_get_no_gradient_and_change_no_other(frozen: str, implementation: str) -> None:
    case = cases.make("everything", 3, 4)
    g, eta = cases.weights_of(3, 4)
    _, whole = cases.gradients(linear_token_logprobs_and_entropy, case, both(g, eta))
    leaves = {name: value.detach() for name, value in cases.tensors(case).items()}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name.startswith("lora") if frozen == "all but lora" else name != frozen)
    both(g, eta)(linear_token_logprobs_and_entropy(**cases.with_tensors(case, leaves))).backward()
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, whole[name], rtol=1e-5, atol=1e-6)
        else:
            assert leaf.grad is None


def test_backward_twice_through_a_retained_graph(implementation: str) -> None:
    case = cases.make("everything", 3, 4)
    leaves = {name: value.detach().requires_grad_() for name, value in cases.tensors(case).items()}
    loss = linear_token_logprobs(**cases.with_tensors(case, leaves)).sum()
    loss.backward(retain_graph=True)
    once = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    loss.backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, 2 * once[name])


def test_differentiable_once_only() -> None:
    case = cases.make("plain", 5)
    hidden = case["hidden"].requires_grad_()
    (grad,) = torch.autograd.grad(linear_token_logprobs(**case).square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        grad.sum().backward()


# ---- 3. masks: rows that are not computed -------------------------------------------------------------------


@pytest.mark.parametrize("head", ["plain", "lora", "everything"])
@pytest.mark.parametrize("capacity", [None, 9, 100])
@pytest.mark.parametrize("rows", [2, 100])
def test_nothing_behind_the_mask_matters(head: str, capacity: int | None, rows: int, implementation: str) -> None:
    case = cases.make(head, 3, 5)
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0]).bool().reshape(3, 5)
    g, eta = cases.weights_of(3, 5)
    keywords = {"mask": mask, "capacity": capacity, "chunk_bytes": cases.chunk_of(rows, 37, 12)}
    dirty = case | {name: testing.poisoned(case[name], mask) for name in ("hidden", "token_ids")}
    if isinstance(case.get("temperature"), Tensor):
        dirty["temperature"] = testing.poisoned(case["temperature"], mask)
    clean, poisoned = (
        cases.gradients(linear_token_logprobs_and_entropy, c, both(g, eta), **keywords) for c in (case, dirty)
    )
    expected = cases.exact(case, g * mask, eta * mask)
    for a, b, value in zip(clean[0], poisoned[0], expected[:2], strict=True):
        assert torch.equal(a, b)
        testing.assert_within(b, value * mask, 4e-6)
    for name in clean[1]:
        assert torch.equal(clean[1][name], poisoned[1][name]), name
    cases.assert_gradients(poisoned[1], expected, 4e-6)


@pytest.mark.parametrize("capacity", [None, 3])
def test_all_masked(capacity: int | None, implementation: str) -> None:
    case = cases.make("everything", 2, 3)
    dirty = case | {"hidden": torch.full((2, 3, 12), torch.nan), "token_ids": torch.full((2, 3), -100)}
    mask = torch.zeros(2, 3)
    results, grads = cases.gradients(
        linear_token_logprobs_and_entropy, dirty, lambda r: (r[0] + r[1]).sum(), mask=mask, capacity=capacity
    )
    for name, value in [("logprobs", results[0]), ("entropy", results[1]), *grads.items()]:
        assert not value.any(), name
    for name, value in cases.tensors(case).items():
        assert (grads[name].shape, grads[name].dtype) == (value.shape, value.dtype)


# ---- 4. precision, from bfloat16 inputs of a language model's size ------------------------------------------


@pytest.fixture(scope="module")
def model_like() -> dict[str, Any]:
    """256 tokens, H 1024, V 32768, logits to about 20."""
    return cases.make("plain", 256, width=1024, vocab=32_768, dtype=torch.bfloat16, scale=4.2)


@slow_interpreted
def test_log_probs_keep_to_the_bar(model_like: dict[str, Any]) -> None:
    """1e-6 on average, 2e-5 at most, with float32 logits from bfloat16 inputs."""
    _, _, z = cases.logits(model_like)
    assert 18 < z.abs().max() < 32
    exact = testing.token_stats(z, model_like["token_ids"])
    logprobs, entropy = linear_token_logprobs_and_entropy(**model_like, chunk_bytes=16 << 20)
    for got, value in ((logprobs, exact.logprobs), (entropy, exact.entropy)):
        error = (got.double() - value).abs()
        assert error.mean() <= 1e-6 and error.max() <= 2e-5, (float(error.mean()), float(error.max()))


@slow_interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_logits_are_those_of_an_engine_that_rounds(dtype: torch.dtype, model_like: dict[str, Any]) -> None:
    case = {name: value[:128].to(dtype) if name != "token_ids" else value[:128] for name, value in model_like.items()}
    case["weight"] = model_like["weight"][:4096].to(dtype)
    case["token_ids"] = case["token_ids"] % 4096
    leaves = [case[name].clone().requires_grad_() for name in ("hidden", "weight")]
    engine = token_logprobs(torch.nn.functional.linear(*leaves), case["token_ids"])
    g = torch.randn(128, generator=testing.generator(2))
    expected = torch.autograd.grad(engine, leaves, g)
    ours, grads = cases.gradients(
        linear_token_logprobs, case, lambda logprobs: (g * logprobs).sum(), logits_dtype=dtype
    )
    testing.assert_within(ours, engine.double(), testing.EPS32 * engine.double().abs())
    for grad, reference in zip(grads.values(), expected, strict=True):
        relative = (grad.double() - reference.double()).norm() / reference.double().norm()
        assert relative <= torch.finfo(dtype).eps


@pytest.mark.parametrize("head", ["bias", "lora", "everything"])
def test_rounded_logits_with_every_option(head: str, implementation: str) -> None:
    """To the rounding of 16-bit logits after each of their four steps."""
    case = cases.make(head, 3, 4, dtype=torch.bfloat16)
    g, eta = cases.weights_of(3, 4)
    (logprobs, _), grads = cases.gradients(
        linear_token_logprobs_and_entropy, case, both(g, eta), logits_dtype=torch.bfloat16
    )
    expected = cases.exact(case, g, eta)
    eps = torch.finfo(torch.bfloat16).eps
    testing.assert_within(logprobs, expected.logprobs, 4 * eps * cases.logits(case)[2].abs().max())
    cases.assert_gradients(grads, expected, 20 * eps)


# ---- 5. sizes and strides -----------------------------------------------------------------------------------

STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "without the last position": lambda h: h[:, :-1],
    "without the first position": lambda h: h[:, 1:],
    "batch and time swapped": lambda h: h.transpose(0, 1),
    "width not last in memory": lambda h: h.transpose(1, 2).contiguous().transpose(1, 2),
    "every other feature": lambda h: h[..., ::2],
    "every other position": lambda h: h[:, ::2],
    "one row for all": lambda h: h[:1, :1].expand(3, 4, -1),
    "one feature for all": lambda h: h[..., :1].expand(-1, -1, 12),
}


@pytest.mark.parametrize("view", STRIDED)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_hidden_states(view: str, masked: bool, dtype: torch.dtype, implementation: str) -> None:
    whole = testing.random_logits(4, 6, 12, dtype=dtype, scale=1)
    hidden = STRIDED[view](whole)
    lead, width = hidden.shape[:-1], hidden.shape[-1]
    case = cases.make("bias", *lead, width=width, dtype=dtype)
    mask = testing.random_ids(*lead, vocab=3) > 0 if masked else None
    results = []
    for value in (hidden, hidden.contiguous()):
        results.append(cases.gradients(
            linear_token_logprobs, case | {"hidden": value}, lambda logprobs: logprobs.square().sum(), mask=mask,
            chunk_bytes=cases.chunk_of(5, 37, width),
        ))
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        assert torch.equal(grad, results[1][1][name]), name


@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_matrices(name: str, dtype: torch.dtype, implementation: str) -> None:
    case = cases.make("everything", 3, 4, dtype=dtype)
    matrix = cases.tensors(case)[name]
    views = [
        matrix.t().contiguous().t(),  # columns first
        torch.stack([matrix, matrix], -1)[..., 0],  # no stride is 1
        torch.cat([matrix, matrix], 1)[:, : matrix.shape[1]],  # rows apart
    ]

    def loss(logprobs: Tensor) -> Tensor:
        return logprobs.square().sum()

    expected, grads = cases.gradients(linear_token_logprobs, case, loss)
    tolerance = {"rtol": 16 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    for view in views:
        ours, ours_grads = cases.gradients(linear_token_logprobs, cases.with_tensors(
            case, cases.tensors(case) | {name: view}), loss)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-2)
        for key, grad in ours_grads.items():
            torch.testing.assert_close(grad, grads[key], **tolerance)


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 1, 3), (0,), (0, 4), (3, 0)])
@pytest.mark.parametrize(("vocab", "width"), [(37, 12), (1, 12), (33, 1), (1, 1), (257, 129)])
def test_shapes(lead: tuple[int, ...], vocab: int, width: int, implementation: str) -> None:
    case = cases.make("everything", *lead, width=width, vocab=vocab)
    g, eta = cases.weights_of(*lead)
    (logprobs, entropy), grads = cases.gradients(linear_token_logprobs_and_entropy, case, both(g, eta))
    assert logprobs.shape == entropy.shape == lead
    if logprobs.numel():
        expected = cases.exact(case, g, eta)
        testing.assert_within(logprobs, expected.logprobs, 1e-5)
        cases.assert_gradients(grads, expected, 1e-5)
    for name, value in cases.tensors(case).items():
        assert grads[name].shape == value.shape
        assert lead == () or 0 not in lead or not grads[name].any()

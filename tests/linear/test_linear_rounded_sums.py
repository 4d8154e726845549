"""The weight's gradient in 16 bits: a single product of a GPU writes it, and rounds nothing but the float32 sum."""

from collections.abc import Iterator
from typing import Any

import linear_cases as cases
import pytest
import torch
from backends import host_code
from gathering_cases import BUFFER, CHUNK, TOKENS, VOCAB, WIDTH, Products, as_on_a_gpu
from torch import Tensor

from r1kernels import linear_cross_entropy, linear_token_logprobs, testing
from r1kernels.ops.linear import gemm, sums
from r1kernels.ops.linear.budget import BufferRows

pytestmark = host_code


@pytest.fixture
def gathering(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with as_on_a_gpu(monkeypatch, BufferRows(CHUNK, BUFFER)):
        yield


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 16 bits as on a GPU: with a float32 result, or rounded once."""

    def wide(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
        product = a.float() @ b.float()
        out.copy_(out + product if accumulate else product)

    route = gemm.route
    monkeypatch.setattr(gemm, "route", lambda a, b=None: (
        "out_dtype" if a.dtype in gemm.HALF_DTYPES and (b is None or b.dtype == a.dtype) else route(a, b)
    ))
    monkeypatch.setattr(gemm, "_wide", wide)
    monkeypatch.setattr(gemm, "_narrow", lambda a, b, out: out.copy_(out.float() + a.float() @ b.float()))


def logprob_case(dtype: torch.dtype) -> tuple[dict[str, Any], Tensor, cases.Exact]:
    case = cases.make("bias", TOKENS, width=WIDTH, vocab=VOCAB, dtype=dtype)
    case["token_ids"] = case["token_ids"] % 5  # most ids are those of several tokens
    g = cases.weights_of(TOKENS)[0]
    g[BUFFER:] = 0
    return case, g, cases.exact(case, g)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("gathering", "narrow")
def test_a_single_product_writes_16_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """No float32 sum of the weight's size, and no other rounding than that of the float32 sum: the two differ in
    entries next to the middle between two numbers only."""
    case, g, expected = logprob_case(dtype)
    loss = lambda logprobs: (logprobs * g.float()).sum()  # noqa: E731
    products = Products(monkeypatch)
    _, grads = cases.gradients(linear_token_logprobs, case, loss)
    assert products.rounded == products.weight == [BUFFER] and grads["weight"].dtype == dtype
    monkeypatch.setattr(sums, "has_rounded_sums", lambda *_: False)
    _, added = cases.gradients(linear_token_logprobs, case, loss)
    assert products.rounded == [BUFFER] and products.weight == [BUFFER, BUFFER]
    assert torch.equal(grads["hidden"], added["hidden"])
    differ = grads["weight"] != added["weight"]
    assert differ.double().mean() < 0.02
    ours, theirs = ((x["weight"].double() - expected.grads["weight"]).norm() for x in (grads, added))
    assert ours <= 1.01 * theirs


@pytest.mark.usefixtures("gathering", "narrow")
def test_what_must_be_a_float32_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that a factor multiplies later, that are added to other memory or that have a wider dtype."""
    case, g, _ = logprob_case(torch.bfloat16)
    products = Products(monkeypatch)
    ids = case.pop("token_ids")
    cases.gradients(linear_cross_entropy, case, lambda loss: loss / 3, targets=ids.masked_fill(g == 0, -100))
    assert products.weight == [BUFFER]
    weight = case["weight"].clone().requires_grad_()
    into = torch.zeros(VOCAB, WIDTH)
    run = lambda **more: (linear_token_logprobs(  # noqa: E731
        **case | {"weight": weight}, token_ids=ids, **more) * g.float()).sum().backward()
    run(grad_accumulation_into=into)
    weight.grad_dtype = torch.float32
    run()
    assert weight.grad.dtype == torch.float32 and torch.equal(weight.grad, into)
    case["hidden"] = case["hidden"].float()
    run()
    assert products.weight == [BUFFER] * 4 and not products.rounded


@pytest.mark.usefixtures("gathering", "narrow")
def test_several_products_have_a_float32_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    case, g, _ = logprob_case(torch.bfloat16)
    g[BUFFER] = 1
    products = Products(monkeypatch)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        weight = case["weight"].clone().requires_grad_()
        weight.grad_dtype = dtype
        (linear_token_logprobs(**case | {"weight": weight}) * g.float()).sum().backward()
        results.append(weight.grad)
    assert torch.equal(results[0], results[1].bfloat16())
    assert products.weight == [BUFFER, 1] * 2 and not products.rounded


@pytest.mark.usefixtures("gathering", "narrow")
def test_the_errors_of_the_tokens_entries_are_among_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    case, g, expected = logprob_case(torch.bfloat16)
    placed = []
    place = sums.place_rows
    for change in (place, lambda *_: placed.append(1)):
        monkeypatch.setattr(sums, "place_rows", change)
        _, grads = cases.gradients(linear_token_logprobs, case, lambda logprobs: (logprobs * g.float()).sum())
        rounding = testing.rounding(expected.grads["weight"], torch.bfloat16)
        beyond = ((grads["weight"].double() - expected.grads["weight"]).abs() - rounding).clamp(min=0)[:5].sum()
        placed.append(float(beyond))
    assert placed[1] == 1 and placed[0] < 0.5 * placed[2], placed


def test_sums_of_rows_are_rounded_once_and_others_stay() -> None:
    rng = testing.generator(0)
    ids = torch.randint(0, 4, (50,), generator=rng) * 2
    factors, rows = torch.randn(50, generator=rng), torch.randn(50, 3, generator=rng).bfloat16()
    out = torch.full((8, 3), 7.0, dtype=torch.bfloat16)
    gemm.place_rows(out, ids, factors, rows)
    exact = torch.zeros(8, 3, dtype=torch.float64).index_add_(0, ids, factors.double()[:, None] * rows.double())
    testing.assert_within(out[::2], exact[::2], 1.01 * testing.rounding(exact[::2], torch.bfloat16))
    assert (out[1::2] == 7).all()


def test_rounded_sums_use_no_16_bit_parts_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction",
             "allow_fp16_accumulation")
    before, seen = [getattr(matmul, name) for name in names], []
    monkeypatch.setattr(gemm, "_narrow", lambda *_: seen.append([getattr(matmul, name) for name in names]))
    try:
        for asked in (True, False):
            for name in names:
                setattr(matmul, name, asked)
            gemm.add_rounded(*[torch.zeros(2, 2, dtype=torch.bfloat16)] * 3)
            assert seen[-1] == [False] * 3 and [getattr(matmul, name) for name in names] == [asked] * 3
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)

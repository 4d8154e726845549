"""On a GPU, d logits of several chunks are gathered: how many products there are, how large, and what they give.

On a CPU the walk is told to do what it does on a GPU, with small buffers.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import linear_cases as cases
import linear_policy_cases as policy
import pytest
import torch
from backends import host_code, reference_only, without_cuda_kernels
from linear_distillation_cases import Case
from torch import Tensor

from r1kernels import (
    Objective,
    backend,
    linear_cross_entropy,
    linear_grpo_loss,
    linear_token_logprobs,
    linear_token_logprobs_and_entropy,
    testing,
)
from r1kernels.ops import gemm, linear_head, linear_options, linear_sums
from r1kernels.ops.linear_budget import BufferRows, row_bytes, rows_of_budget
from r1kernels.ops.linear_rows import ALL_ROWS
from r1kernels.ops.linear_types import Head, Needs

TOKENS, VOCAB, WIDTH = 24, 37, 12
CHUNK, BUFFER = 3, 9


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, rows: BufferRows) -> contextlib.AbstractContextManager[None]:
    monkeypatch.setattr(linear_options, "gathers", lambda *_: True)
    monkeypatch.setattr(linear_options, "rows_of_budget", lambda *_: rows)
    monkeypatch.setattr(linear_head, "runs_on_gpu", lambda *_: True)
    return backend("reference") if testing.KERNELS == "cpu" else contextlib.nullcontext()


@pytest.fixture
def gathering(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with as_on_a_gpu(monkeypatch, BufferRows(CHUNK, BUFFER)):
        yield


class Products:
    """Rows of the products that give the gradients of hidden and of the weight, in their order, and what wrote dW."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int] = (VOCAB, WIDTH)) -> None:
        self.hidden: list[int] = []
        self.weight: list[int] = []
        self.rounded: list[int] = []
        matmul, add_rounded = linear_sums.matmul, linear_sums.add_rounded

        def counted(a: Tensor, b: Tensor, out: Tensor, **how: bool) -> Tensor:
            if out.shape == shape:
                self.weight.append(a.shape[1])
            elif b.shape == shape:
                self.hidden.append(a.shape[0])
            return matmul(a, b, out, **how)

        def counted_rounded(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
            self.weight.append(a.shape[1])
            self.rounded.append(a.shape[1])
            return add_rounded(a, b, out)

        monkeypatch.setattr(linear_sums, "matmul", counted)
        monkeypatch.setattr(linear_sums, "add_rounded", counted_rounded)


def clipped_case(active: list[int], head: str = "plain", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of `linear_grpo_loss` for one packed sequence. Every other token is clipped."""
    case = cases.make(head, TOKENS, width=WIDTH, vocab=VOCAB, dtype=dtype)
    ratio = torch.ones(TOKENS, dtype=torch.float64)
    ratio[active] = 0
    return case | {
        "advantages": torch.ones(TOKENS), "cu_seqlens": torch.tensor([0, TOKENS]),
        "old_logprobs": (cases.exact(case).logprobs - ratio).float(),
    }


FEW, SOME = [1, 5, 6, 7, 8, 14, 15, 23], list(range(0, TOKENS, 2))
ACTIVE = {
    "all": (list(range(TOKENS)), [9, 9, 6]), "none": ([], []), "one": ([13], [1]), "few": (FEW, [8]),
    "half": (SOME, [9, 3]), "a buffer": (list(range(6, 15)), [9]), "more than a buffer": (list(range(10)), [9, 1]),
    "chunks apart": ([0, 1, 2, 6, 7, 8, 21, 22, 23], [9]),
}


@pytest.mark.parametrize("active", ACTIVE)
@pytest.mark.parametrize("head", ["plain", "everything"])
@pytest.mark.usefixtures("gathering")
def test_only_full_buffers_and_the_last_one_are_multiplied(
    active: str, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If all active rows fit, there is exactly one product of each kind; and the results are those of the oracle."""
    rows, expected = ACTIVE[active]
    inputs = clipped_case(rows, head)
    products = Products(monkeypatch)
    result, _ = policy.run(inputs)
    assert products.weight == products.hidden == expected
    assert not products.rounded
    assert round(float(result.metrics["active_fraction"]) * TOKENS) == len(rows)
    policy.check(inputs, Objective(aggregate="token_mean"), 2e-5)


@pytest.mark.parametrize("given", ["mask", "advantages"])
@pytest.mark.parametrize("capacity", [None, 10, TOKENS])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=reference_only)])
@pytest.mark.usefixtures("gathering")
def test_rows_known_to_be_still(
    given: str, capacity: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They enter no chunk; with a capacity, padding does, unless the host may look at the values."""
    inputs = clipped_case(list(range(TOKENS)), "everything", dtype)
    moving = torch.arange(TOKENS) % 5 < 2
    assert moving.sum() == 10
    inputs |= {"mask": moving} if given == "mask" else {"advantages": moving.float()}
    inputs["hidden"] = testing.poisoned(inputs["hidden"], moving)
    clean = inputs | {"hidden": torch.where(moving[:, None], inputs["hidden"], 0)}
    objective, relative = Objective(aggregate="token_mean"), 2e-5 if dtype == torch.float32 else 1e-6
    policy.check(clean, objective, relative, capacity=capacity)
    for free in (True, False):
        monkeypatch.setattr(linear_head, "values_are_free", lambda _, free=free: free)
        with monkeypatch.context() as patches:
            products = Products(patches)
            results = [policy.run(case, objective=objective, capacity=capacity) for case in (inputs, clean)]
        rows = [9, 1] if free or capacity != TOKENS else [9, 9, 6]
        # Ten rows are four chunks of equal size.
        assert sum(products.weight) == 2 * sum(rows) and products.weight == products.hidden
        assert torch.equal(results[0][0].loss, results[1][0].loss)
        for name, grad in results[0][1].items():
            assert torch.equal(grad, results[1][1][name]), name


@pytest.mark.parametrize("name", ["grpo", "kl and entropy", "gspo", "callable"])
@pytest.mark.parametrize("extra", ["holes", "token_advantages"])
@pytest.mark.parametrize("rows", [(4, 9), (7, 7), (1, 2), (2, 0), (5, 1), (100, 100)])
def test_every_objective_and_buffer(
    name: str, extra: str, rows: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = {
        "grpo": Objective(), "kl and entropy": Objective(**policy.EVERYTHING), "gspo": Objective(ratio="sequence"),
        "callable": Objective(surrogate="reinforce"),
    }[name]
    inputs = policy.make("everything", extra)
    with as_on_a_gpu(monkeypatch, BufferRows(*rows)):
        policy.check(inputs, objective, 2e-5)
        if name == "callable":
            _, grads = policy.run(inputs, objective=lambda logprobs, batch: -batch.advantages * logprobs)
            assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("head", ["plain", "everything"])
@pytest.mark.usefixtures("gathering")
def test_log_probs_and_cross_entropy(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.make(head, 4, 6)
    g, eta = cases.weights_of(4, 6)
    g[1], eta[1] = 0, 0
    expected = cases.exact(case, g, eta)
    products = Products(monkeypatch)
    _, grads = cases.gradients(
        linear_token_logprobs_and_entropy, case, lambda both: (both[0] * g.float() + both[1] * eta.float()).sum()
    )
    assert products.weight == [9, 9]
    cases.assert_gradients(grads, expected, 2e-5)
    targets = case.pop("token_ids").masked_fill(g == 0, -100)
    case["token_ids"] = targets.clamp(min=0)
    expected = cases.exact(case, -(g != 0).double() / 18)
    del case["token_ids"]
    _, grads = cases.gradients(linear_cross_entropy, case, lambda loss: loss, targets=targets)
    cases.assert_gradients(grads, expected, 2e-5)
    assert products.weight == products.hidden == [9, 9] * 2


@without_cuda_kernels
@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.usefixtures("gathering")
def test_distillation(k: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("softcap", "bias", k)
    products = Products(monkeypatch, tuple(case.student["weight"].shape))
    (result, grads), (expected, exact) = case.run(), case.exact()
    testing.assert_within(result.loss, expected.loss, 4e-6 * (1 + expected.loss))
    for name, grad in grads.items():
        assert (grad.double() - exact[name]).norm() <= 4e-6 * exact[name].norm(), name
    rows = case.student["hidden"].shape[:-1].numel()
    assert rows > BUFFER and sum(products.weight) == rows and len(products.weight) < -(-rows // CHUNK) / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("two_phases", [False, True])
def test_16_bits_are_as_exact_as_in_place(
    dtype: torch.dtype, two_phases: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The errors of the tokens' entries are added to both, and every bit is the same in a second run."""
    inputs = clipped_case(FEW, "bias", dtype)
    objective = Objective(aggregate="token_mean", ratio="sequence" if two_phases else "token", clip_high=9.0)
    expected = policy.exact(inputs, objective)[1]

    def errors() -> dict[str, float]:
        grads, again = (policy.run(inputs, objective=objective)[1] for _ in range(2))
        assert all(torch.equal(grad, again[name]) for name, grad in grads.items())
        return {name: float((grad.double() - expected.grads[name]).norm()) for name, grad in grads.items()}

    in_place = errors()
    with as_on_a_gpu(monkeypatch, BufferRows(CHUNK, BUFFER)):
        gathered = errors()
    for name, error in gathered.items():
        assert error <= 1.1 * in_place[name], (name, gathered, in_place)


# ---- the weight's gradient in 16 bits ---------------------------------------------------------------------------


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


@host_code
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
    monkeypatch.setattr(linear_sums, "has_rounded_sums", lambda *_: False)
    _, sums = cases.gradients(linear_token_logprobs, case, loss)
    assert products.rounded == [BUFFER] and products.weight == [BUFFER, BUFFER]
    assert torch.equal(grads["hidden"], sums["hidden"])
    differ = grads["weight"] != sums["weight"]
    assert differ.double().mean() < 0.02
    ours, theirs = ((x["weight"].double() - expected.grads["weight"]).norm() for x in (grads, sums))
    assert ours <= 1.01 * theirs


@host_code
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


@host_code
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


@host_code
@pytest.mark.usefixtures("gathering", "narrow")
def test_the_errors_of_the_tokens_entries_are_among_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    case, g, expected = logprob_case(torch.bfloat16)
    placed = []
    place = linear_sums.place_rows
    for change in (place, lambda *_: placed.append(1)):
        monkeypatch.setattr(linear_sums, "place_rows", change)
        _, grads = cases.gradients(linear_token_logprobs, case, lambda logprobs: (logprobs * g.float()).sum())
        rounding = testing.rounding(expected.grads["weight"], torch.bfloat16)
        beyond = ((grads["weight"].double() - expected.grads["weight"]).abs() - rounding).clamp(min=0)[:5].sum()
        placed.append(float(beyond))
    assert placed[1] == 1 and placed[0] < 0.5 * placed[2], placed


@host_code
def test_sums_of_rows_are_rounded_once_and_others_stay() -> None:
    rng = testing.generator(0)
    ids = torch.randint(0, 4, (50,), generator=rng) * 2
    factors, rows = torch.randn(50, generator=rng), torch.randn(50, 3, generator=rng).bfloat16()
    out = torch.full((8, 3), 7.0, dtype=torch.bfloat16)
    gemm.place_rows(out, ids, factors, rows)
    exact = torch.zeros(8, 3, dtype=torch.float64).index_add_(0, ids, factors.double()[:, None] * rows.double())
    testing.assert_within(out[::2], exact[::2], 1.01 * testing.rounding(exact[::2], torch.bfloat16))
    assert (out[1::2] == 7).all()


@host_code
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


# ---- sizes of the buffers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gathered", "vocab", "dtype", "rows"),
    [
        (False, 32_000, torch.bfloat16, (1024, 0)), (False, 10**7, torch.bfloat16, (26, 0)),
        (True, 32_000, torch.bfloat16, (4096, 4096)), (True, 151_936, torch.bfloat16, (1095, 4096)),
        (True, 262_144, torch.bfloat16, (628, 2515)), (True, 10**7, torch.bfloat16, (17, 69)),
        (True, 151_936, torch.float32, (649, 2598)),
    ],
)
def test_buffers_nobody_asked_for(gathered: bool, vocab: int, dtype: torch.dtype, rows: tuple[int, int]) -> None:
    each = row_bytes(vocab, 4096, torch.float32)
    assert linear_options._buffers(None, vocab, each, row_bytes(vocab, 4096, dtype), gathered) == rows


@pytest.mark.parametrize("each", [1, 3, 100])
@pytest.mark.parametrize("gradient", [0, 1, 2, 60, 100])
@pytest.mark.parametrize("most", [None, 7])
def test_buffers_keep_to_their_budget(each: int, gradient: int, most: int | None) -> None:
    """Every chunk fits in the gradient buffer, and no row more fits in the budget."""
    for budget in range(each, 1500, 7):
        rows = rows_of_budget(budget, each, gradient, most)
        used = rows.logits * each + rows.gradient * gradient
        assert rows.logits >= 1 and used <= budget and (rows.gradient == 0 or rows.gradient >= rows.logits)
        if gradient == 0 or budget < each + gradient:
            assert rows.gradient == 0
        if most is None:
            assert budget - used < max(each, gradient)
        else:
            assert max(rows) <= most


@host_code
@pytest.mark.parametrize("active", [4096, 8192])
def test_a_walk_of_the_size_of_a_model(active: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without memory, 8192 x 4096 x 151,936 in bfloat16: both buffers and the copies of width H take less than
    2 GiB, and the weight's gradient has one product for 4,096 active rows."""
    vocab, width, device = 151_936, 4096, torch.device("meta")
    empty = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device=device)  # noqa: E731
    ids = empty(active, dtype=torch.int64)
    rows = linear_options._buffers(
        None, vocab, row_bytes(vocab, width, torch.float32), row_bytes(vocab, width, torch.bfloat16), True
    )
    head = Head(empty(vocab, width), None, None, None, ids, None, 1.0, 1.0, 0.0, torch.float32, *rows, -1, False)
    products = Products(monkeypatch, (vocab, width))
    with backend("reference"):
        walk = linear_head.Walk(head, empty(active, width), ALL_ROWS, Needs(True, True, False, False, False))
        number = empty(active, dtype=torch.float64)
        for chunk in walk.chunks():
            lse, g = number[chunk.rows], number[chunk.rows].float()
            walk.backward(chunk, lse, lse, g, None, sparse=False)
        buffers = [walk._buffer, walk.sums._buffer]
        walk.gradients()
    assert products.weight == products.hidden == [4096] * (active // 4096)
    assert [buffer.dtype for buffer in buffers] == [torch.float32, torch.bfloat16]
    # Of a buffer's rows: hidden states, and two float32 matrices in `place_rows`.
    copies = 4096 * width * (2 + 4 + 4)
    used = sum(buffer.untyped_storage().nbytes() for buffer in buffers) + copies
    assert used < linear_options.GPU_BUDGET.chunk_bytes < 2 << 30


def test_a_budget_of_one_row_multiplies_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, rows cannot be moved up in place: all rows of a chunk take part."""
    with as_on_a_gpu(monkeypatch, BufferRows(CHUNK, 0)):
        products = Products(monkeypatch)
        inputs = clipped_case(FEW)
        linear_grpo_loss(**inputs | {"weight": inputs["weight"].requires_grad_()}).loss.backward()
        assert products.weight == [CHUNK] * 8

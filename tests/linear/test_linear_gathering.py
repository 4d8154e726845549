"""On a GPU, d logits of several chunks are gathered: how many products there are, how large, and what they give.

On a CPU the walk is told to do what it does on a GPU, with small buffers.
"""

from collections.abc import Iterator
from typing import Any

import linear_cases as cases
import linear_policy_cases as policy
import pytest
import torch
from backends import host_code, reference_only, slow_interpreted, without_cuda_kernels
from gathering_cases import BUFFER, CHUNK, TOKENS, VOCAB, WIDTH, Products, as_on_a_gpu
from linear_distillation_cases import Case

from r1kernels import (
    Objective,
    backend,
    linear_cross_entropy,
    linear_grpo_loss,
    linear_token_logprobs_and_entropy,
    testing,
)
from r1kernels.ops.linear import budget as budgets
from r1kernels.ops.linear import walk as walks
from r1kernels.ops.linear.budget import BufferRows, row_bytes, rows_of_budget
from r1kernels.ops.linear.head import Head, Needs
from r1kernels.ops.linear.rows import Rows


@pytest.fixture
def gathering(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with as_on_a_gpu(monkeypatch, BufferRows(CHUNK, BUFFER)):
        yield


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


@pytest.mark.few(8)
@slow_interpreted
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


@pytest.mark.few(6)
@slow_interpreted
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
        monkeypatch.setattr(walks, "values_are_free", lambda _, free=free: free)
        with monkeypatch.context() as patches:
            products = Products(patches)
            results = [policy.run(case, objective=objective, capacity=capacity) for case in (inputs, clean)]
        rows = [9, 1] if free or capacity != TOKENS else [9, 9, 6]
        # Ten rows are four chunks of equal size.
        assert sum(products.weight) == 2 * sum(rows) and products.weight == products.hidden
        assert torch.equal(results[0][0].loss, results[1][0].loss)
        for name, grad in results[0][1].items():
            assert torch.equal(grad, results[1][1][name]), name


@pytest.mark.few(10)
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


@slow_interpreted
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


@slow_interpreted
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
    assert budgets.buffer_rows(None, vocab, each, row_bytes(vocab, 4096, dtype), gathered) == rows


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


@pytest.mark.long(reason="the size of a model; smaller ones take the same route")
@pytest.mark.few(1)
@host_code
@pytest.mark.parametrize("active", [4096, 8192])
def test_a_walk_of_the_size_of_a_model(active: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without memory, 8192 x 4096 x 151,936 in bfloat16: both buffers and the copies of width H take less than
    2 GiB, and the weight's gradient has one product for 4,096 active rows."""
    vocab, width, device = 151_936, 4096, torch.device("meta")
    empty = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device=device)  # noqa: E731
    ids = empty(active, dtype=torch.int64)
    rows = budgets.buffer_rows(
        None, vocab, row_bytes(vocab, width, torch.float32), row_bytes(vocab, width, torch.bfloat16), True
    )
    head = Head(empty(vocab, width), None, None, None, ids, None, 1.0, 1.0, 0.0, torch.float32, *rows, -1, False)
    products = Products(monkeypatch, (vocab, width))
    with backend("reference"):
        walk = walks.Walk(head, Rows(empty(active, width)), Needs(True, True, False, False, False))
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
    assert used < budgets.GPU_BUDGET.chunk_bytes < 2 << 30


@slow_interpreted
def test_a_budget_of_one_row_multiplies_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, rows cannot be moved up in place: all rows of a chunk take part."""
    with as_on_a_gpu(monkeypatch, BufferRows(CHUNK, 0)):
        products = Products(monkeypatch)
        inputs = clipped_case(FEW)
        linear_grpo_loss(**inputs | {"weight": inputs["weight"].requires_grad_()}).loss.backward()
        assert products.weight == [CHUNK] * 8

"""Heads whose weight is float32 beside 16-bit hidden states, or the other way round, in every linear function."""

from collections.abc import Callable
from typing import Any

import linear_cases as cases
import linear_policy_cases as policy
import pytest
import torch
from backends import compiles, host_code, slow_interpreted, slow_on_gpu_kernels, without_cuda_kernels
from gemm_cases import wide
from linear_distillation_cases import MASK, Case
from torch import Tensor

from r1kernels import (
    Objective,
    linear_cross_entropy,
    linear_grpo_loss,
    linear_token_logprobs,
    linear_token_logprobs_and_entropy,
    objectives,
    testing,
)
from r1kernels.ops import token_stats
from r1kernels.ops.linear import gemm

WIDE = torch.float32
HALVES = (torch.bfloat16, torch.float16)
PAIRS = [pair for half in HALVES for pair in ((half, WIDE), (WIDE, half))]  # of hidden and weight
Pair = tuple[torch.dtype, torch.dtype]


def both(g: Tensor, eta: Tensor) -> Callable[[Any], Tensor]:
    return lambda result: (g.float() * result[0]).sum() + (eta.float() * result[1]).sum()


def check_gradients(grads: dict[str, Tensor], case: dict[str, Any], expected: cases.Exact) -> None:
    """To the accuracy of float32 sums, and one rounding to the tensor's own dtype."""
    for name, grad in grads.items():
        assert grad.dtype == cases.tensors(case)[name].dtype, name
    # A 16-bit adapter rounds hidden @ A, and d (hidden @ A), as its own layers do.
    rounds = "lora" in case and case["hidden"].dtype != WIDE
    cases.assert_gradients(grads, expected, 10 * torch.finfo(case["hidden"].dtype).eps if rounds else 4e-6)


# ---- values and gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("head", ["plain", "softcap", "scale and temperatures", "everything"])
def test_log_probs_and_entropy(head: str, pair: Pair, implementation: str) -> None:
    case = cases.make(head, 3, 4, dtype=pair[0], weight_dtype=pair[1])
    if head == "everything":
        case["bias"] = case["bias"].to(pair[1])
    g, eta = cases.weights_of(3, 4)
    expected = cases.exact(case, g, eta)
    for rows in (5, 100):
        (logprobs, entropy), grads = cases.gradients(
            linear_token_logprobs_and_entropy, case, both(g, eta), chunk_bytes=cases.chunk_of(rows, 37, 12)
        )
        assert logprobs.dtype == entropy.dtype == WIDE
        slack = 10 * torch.finfo(pair[0]).eps if "lora" in case and pair[0] != WIDE else 4e-6
        testing.assert_within(logprobs, expected.logprobs, slack)
        testing.assert_within(entropy, expected.entropy, slack)
        check_gradients(grads, case, expected)


@slow_interpreted
@pytest.mark.parametrize("pair", PAIRS)
def test_log_probs_are_as_exact_as_those_of_float32(pair: Pair, implementation: str) -> None:
    """To 1e-6, or almost as close as from float32 copies. At this size, rounded d logits or weights would show."""
    case = cases.make("plain", 96, width=512, vocab=2000, dtype=pair[0], weight_dtype=pair[1], scale=4.0)
    g, _ = cases.weights_of(96)
    expected = cases.exact(case, g)

    def errors(case: dict[str, Any]) -> dict[str, float]:
        logprobs, grads = cases.gradients(linear_token_logprobs, case, lambda value: (g.float() * value).sum())
        relative = {n: (x.double() - expected.grads[n]).norm() / expected.grads[n].norm() for n, x in grads.items()}
        found = {"logprobs": (logprobs.double() - expected.logprobs).abs().mean(), **relative}
        return {name: float(error.detach()) for name, error in found.items()}

    ours = errors(case)
    copies = errors(cases.with_tensors(case, {name: value.float() for name, value in cases.tensors(case).items()}))
    rounded = {name: value.dtype for name, value in cases.tensors(case).items() if value.dtype != WIDE}
    for name, error in ours.items():
        bound = 0.5 * torch.finfo(rounded[name]).eps if name in rounded else max(1e-6, 1.5 * copies[name])
        assert error <= bound, (name, ours, copies)


@slow_interpreted
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", ["dapo", "kl and entropy", "gspo"])
def test_grpo_loss(name: str, pair: Pair, implementation: str) -> None:
    """In one pass and in two, with rows that are masked or clipped."""
    objective = Objective(**policy.EVERYTHING) if name == "kl and entropy" else getattr(objectives, name)()
    inputs = policy.make("bias", "holes", pair[0], weight_dtype=pair[1])
    for rows in (8, 100):
        keywords = {"objective": objective, "chunk_bytes": cases.chunk_of(rows, 37, 12)}
        policy.check(inputs, objective, 8e-6, chunk_bytes=keywords["chunk_bytes"])
        _, grads = policy.run(inputs, **keywords)
        assert (grads["hidden"].dtype, grads["weight"].dtype) == pair
    hidden = inputs["hidden"].clone()
    hidden[~inputs["mask"]] = torch.nan
    expected, got = (policy.run(inputs | {"hidden": h}, objective=objective, capacity=30) for h in (
        inputs["hidden"], hidden))
    assert torch.equal(expected[0].loss, got[0].loss)
    assert all(torch.equal(grad, got[1][key]) for key, grad in expected[1].items())


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy(reduction: str, pair: Pair, implementation: str) -> None:
    case = cases.make("temperature", 12, dtype=pair[0], weight_dtype=pair[1])
    counted = torch.arange(12) % 3 > 0
    targets = torch.where(counted, case["token_ids"], -100)
    expected = cases.exact(case, -counted.double() / (8 if reduction == "mean" else 1))
    _, grads = cases.gradients(
        lambda token_ids, **head: linear_cross_entropy(targets=targets, reduction=reduction, **head), case,
        lambda value: value.sum(),
    )
    check_gradients(grads, case, expected)


@without_cuda_kernels
@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
@pytest.mark.parametrize("pair", PAIRS)
def test_distillation(pair: Pair, kind: str, k: int | None, implementation: str) -> None:
    """A student of one pair, a teacher of the other."""
    case = Case("softcap", "bias", k, kind, pair[0], pair[1], mask=MASK, weight_dtypes=pair[::-1])
    (result, grads), (expected, exact) = case.run(chunk_bytes=4000), case.exact()
    testing.assert_within(result.loss, expected.loss, 4e-6 * (1 + expected.loss))
    for name, grad in grads.items():
        error = (grad.double() - exact[name]).norm() / exact[name].norm()
        assert error <= (4e-6 if grad.dtype == WIDE else torch.finfo(grad.dtype).eps), (name, float(error))


# ---- where the weight's gradient goes, and the same bits ----------------------------------------------------


@pytest.mark.parametrize("into_dtype", [WIDE, torch.bfloat16])
@pytest.mark.parametrize("name", ["logprobs", "grpo", "cross_entropy"])
def test_accumulation_into_a_given_tensor(name: str, into_dtype: torch.dtype, implementation: str) -> None:
    pair = (torch.bfloat16, WIDE) if into_dtype == WIDE else (WIDE, torch.bfloat16)
    case = cases.make("plain", 3, 4, dtype=pair[0], weight_dtype=pair[1])

    def loss(**more: Any) -> Tensor:
        if name == "grpo":
            return linear_grpo_loss(**case, advantages=torch.tensor([1.0, -1.0, 0.5]), **more).loss
        if name == "cross_entropy":
            return linear_cross_entropy(case["hidden"], case["weight"], case["token_ids"], **more)
        return linear_token_logprobs(**case, **more).sum()

    weight, _ = case["weight"].requires_grad_(), case["hidden"].requires_grad_()
    loss().backward()
    expected, weight.grad = weight.grad.clone(), None
    for dtype in {WIDE, into_dtype}:
        into = torch.full((37, 12), 0.5, dtype=dtype)
        (3 * loss(grad_accumulation_into=into)).backward()
        assert weight.grad is None
        eps = max(torch.finfo(x).eps for x in (dtype, pair[1]))
        torch.testing.assert_close(into.double(), 0.5 + 3 * expected.double(), rtol=4 * eps, atol=4 * eps)


@slow_on_gpu_kernels
@pytest.mark.parametrize("route", ["native", "copies", "parts"])
@pytest.mark.parametrize("pair", [(torch.bfloat16, WIDE), (WIDE, torch.bfloat16)])
def test_batch_invariant_log_probs(pair: Pair, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if route == "native" and not hasattr(torch.ops.r1kernels, "gemm_f32"):
        pytest.skip("the native product is not built")
    if route != "native":
        monkeypatch.setattr(gemm, "route", lambda *_: route)
        monkeypatch.setattr(gemm, "_wide", wide)
    case = cases.make("bias", 300, width=96, vocab=517, dtype=pair[0], weight_dtype=pair[1])

    def run(index: Any, rows: int = 1000) -> tuple[Tensor, Tensor]:
        part = {name: value[index] if name in ("hidden", "token_ids") else value for name, value in case.items()}
        return linear_token_logprobs_and_entropy(
            **part, batch_invariant=True, chunk_bytes=cases.chunk_of(rows, 517, 96)
        )

    whole, order = run(slice(None)), torch.randperm(300, generator=testing.generator(1))
    for k in range(2):
        for n in (0, 128, 299):
            assert torch.equal(run(slice(n, n + 1))[k][0], whole[k][n])
        assert torch.equal(run(slice(0, 40), 7)[k], whole[k][:40])
        assert torch.equal(run(order)[k], whole[k][order])


@slow_interpreted
def test_autocast_changes_no_bit(implementation: str) -> None:
    inputs = policy.make("everything", "holes", torch.bfloat16, weight_dtype=WIDE)
    result, grads = policy.run(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, inside_grads = policy.run(inputs)
    assert torch.equal(result.loss, inside.loss)
    assert all(torch.equal(grad, inside_grads[name]) for name, grad in grads.items())


@host_code
@pytest.mark.parametrize(
    "pair, exact",
    [((WIDE, WIDE), True), ((torch.bfloat16, torch.bfloat16), False), ((WIDE, torch.float16), False),
     ((torch.bfloat16, WIDE), False)],
)
def test_only_products_of_float32_ask_for_exact_statistics(
    pair: Pair, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, statistics = [], token_stats.statistics

    def noting(*arguments: Any, exact: bool) -> tuple[Tensor, ...]:
        asked.append(exact)
        return statistics(*arguments, exact=exact)

    monkeypatch.setattr(token_stats, "statistics", noting)
    policy.run(policy.make("plain", "holes", pair[0], weight_dtype=pair[1]))
    assert asked and set(asked) == {exact}


@pytest.mark.long(reason="test_linear_operators compiles the same operators")
@pytest.mark.few(1)
@compiles
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("pair", [(torch.bfloat16, WIDE), (WIDE, torch.float16)])
def test_compile_fullgraph(pair: Pair) -> None:
    inputs = policy.make("everything", "holes", pair[0], weight_dtype=pair[1])

    def run(**tensors: Any) -> Tensor:
        return linear_grpo_loss(**inputs | cases.with_tensors({}, tensors)).loss

    results = []
    for function in (run, testing.compiled(run)):
        leaves = {name: value.clone().requires_grad_() for name, value in cases.tensors(inputs).items()}
        value = function(**leaves)
        value.backward()
        results.append((value.detach(), *(leaf.grad for leaf in leaves.values())))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)

"""Every keyword of the linear head: errors name argument, value and expectation; gradients go where they are sent."""

import math
import typing
from collections.abc import Callable
from typing import Any

import linear_cases as cases
import pytest
import torch
from backends import checks_only, slow_interpreted, slow_on_gpu_kernels
from torch import Tensor

from r1kernels import (
    linear_cross_entropy,
    linear_grpo_loss,
    linear_token_logprobs,
    linear_token_logprobs_and_entropy,
    objectives,
    testing,
)

# ---- bad input ------------------------------------------------------------------------------------------------

ROW = 37 * 4 + 2 * 12 * 4  # bytes of one row of a chunk at V = 37, H = 12


def at(index: int, value: float) -> Tensor:
    temperatures = torch.ones(2, 3)
    temperatures.view(-1)[index] = value
    return temperatures


def matrices(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.zeros(a), torch.zeros(b)


BF16_HIDDEN = {"hidden": torch.zeros(2, 3, 12).bfloat16()}  # beside a float32 weight
BAD_INPUTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown keyword": ({"chunk_size": 3}, TypeError, "unknown keyword 'chunk_size', expected one of bias, lora"),
    "no hidden": ({"hidden": None}, TypeError, "hidden is a NoneType, expected a torch.Tensor"),
    "integer hidden": ({"hidden": torch.zeros(2, 3, 12).long()}, TypeError, "hidden has dtype torch.int64, expected"),
    "H of hidden": ({"hidden": torch.zeros(2, 3, 11)}, ValueError, r"hidden has shape \(2, 3, 11\) and weight"),
    "no weight": ({"weight": [1.0]}, TypeError, "weight is a list, expected a torch.Tensor"),
    "weight (V,)": ({"weight": torch.zeros(37)}, ValueError, r"weight has shape \(37,\), expected 2 dimensions"),
    "weight (1, V, H)": ({"weight": torch.zeros(1, 37, 12)}, ValueError, r"weight has shape \(1, 37, 12\), expected 2"),
    "weight transposed": ({"weight": torch.zeros(12, 37)}, ValueError, r"\(12, 37\), expected the same H"),
    "no vocabulary": ({"weight": torch.zeros(0, 12)}, ValueError, r"weight has shape \(0, 12\), expected V >= 1"),
    "dtype of weight": ({"weight": torch.zeros(37, 12).double()}, TypeError,
                        "weight has dtype torch.float64, expected torch.float32 or .* with hidden of torch.float32"),
    "float32 weight": ({"hidden": torch.zeros(2, 3, 12).double()}, TypeError,
                       "weight has dtype torch.float32, expected torch.float64 with hidden of torch.float64"),
    "two 16-bit dtypes": ({"hidden": torch.zeros(2, 3, 12).bfloat16(), "weight": torch.zeros(37, 12).half()},
                          TypeError, "weight has dtype torch.float16, expected torch.bfloat16 or torch.float32 with"),
    "integer weight": ({"weight": torch.zeros(37, 12).long()}, TypeError, "weight has dtype torch.int64, expected"),
    "device of weight": ({"weight": torch.zeros(37, 12, device="meta")}, ValueError, "weight is on meta, expected cpu"),
    "ids shape": ({"token_ids": torch.zeros(6).long()}, ValueError, r"token_ids has shape \(6,\)|hidden has shape"),
    "float ids": ({"token_ids": torch.zeros(2, 3)}, TypeError, "token_ids has dtype torch.float32, expected int64"),
    "list of ids": ({"token_ids": [[0]]}, TypeError, "token_ids is a list, expected a torch.Tensor"),
    "id too large": ({"token_ids": torch.full((2, 3), 37)}, ValueError, r"token_ids\[0\] is 37, expected .* \[0, 37\)"),
    "id negative": ({"token_ids": torch.full((2, 3), -1)}, ValueError, r"token_ids\[0\] is -1, expected an id in"),
    "bias length": ({"bias": torch.zeros(36)}, ValueError, r"bias has shape \(36,\), expected \(37,\): one entry for"),
    "bias (1, V)": ({"bias": torch.zeros(1, 37)}, ValueError, r"bias has shape \(1, 37\), expected \(37,\)"),
    "bias dtype": ({"bias": torch.zeros(37).double()}, TypeError, "bias has dtype torch.float64, expected torch.f"),
    "bias of neither dtype": (BF16_HIDDEN | {"bias": torch.zeros(37).half()}, TypeError,
                              "bias has dtype torch.float16, expected torch.bfloat16 like hidden or torch.float32"),
    "bias list": ({"bias": [0.0] * 37}, TypeError, "bias is a list, expected a torch.Tensor"),
    "bias device": ({"bias": torch.zeros(37, device="meta")}, ValueError, "bias is on meta, expected cpu"),
    "lora tensor": ({"lora": torch.zeros(12, 37)}, TypeError, "lora is a Tensor, expected a pair"),
    "lora of three": ({"lora": (1, 2, 3)}, TypeError, "lora is a tuple, expected a pair"),
    "lora None": ({"lora": (None, torch.zeros(3, 37))}, TypeError, "lora A is a NoneType, expected a torch.Tensor"),
    "lora H": ({"lora": matrices((11, 3), (3, 37))}, ValueError, r"lora has shapes \(11, 3\) and \(3, 37\), expected"),
    "lora V": ({"lora": matrices((12, 3), (3, 36))}, ValueError, "with H = 12 and V = 37"),
    "lora rank": ({"lora": matrices((12, 3), (4, 37))}, ValueError, r"lora has shapes \(12, 3\) and \(4, 37\)"),
    "lora as layers": ({"lora": matrices((3, 12), (37, 3))}, ValueError, r"expected \(H, R\) and \(R, V\)"),
    "lora 1-d": ({"lora": matrices((12,), (37,))}, ValueError, r"lora has shapes \(12,\) and \(37,\)"),
    "lora dtype": ({"lora": (torch.zeros(12, 3), torch.zeros(3, 37).half())}, TypeError,
                   "lora B has dtype torch.float16, expected torch.float32 like hidden"),
    "logit_scale 0": ({"logit_scale": 0.0}, ValueError, r"logit_scale is 0\.0, expected a finite number > 0"),
    "logit_scale < 0": ({"logit_scale": -1}, ValueError, "logit_scale is -1, expected"),
    "logit_scale NaN": ({"logit_scale": math.nan}, ValueError, "logit_scale is nan, expected"),
    "logit_scale tensor": ({"logit_scale": torch.tensor(2.0)}, TypeError, "logit_scale is tensor.*a Python number"),
    "softcap 0": ({"softcap": 0}, ValueError, "softcap is 0, expected a finite number > 0"),
    "softcap < 0": ({"softcap": -30.0}, ValueError, r"softcap is -30\.0, expected"),
    "softcap inf": ({"softcap": math.inf}, ValueError, "softcap is inf, expected"),
    "temperature 0": ({"temperature": 0}, ValueError, "temperature is 0, expected .* > 0"),
    "temperature huge": ({"temperature": 1e37}, ValueError, r"temperature is 1e\+37, expected a number from 1e-30"),
    "temperature str": ({"temperature": "1"}, TypeError, "temperature is '1', expected a Python number"),
    "temperatures 0": ({"temperature": at(4, 0.0)}, ValueError, r"temperature\[4\] is 0\.0, expected a number from"),
    "temperatures < 0": ({"temperature": at(1, -1.0)}, ValueError, r"temperature\[1\] is -1\.0, expected"),
    "temperatures NaN": ({"temperature": at(2, math.nan)}, ValueError, r"temperature\[2\] is nan, expected"),
    "temperatures inf": ({"temperature": at(5, math.inf)}, ValueError, r"temperature\[5\] is inf, expected"),
    "temperatures shape": ({"temperature": torch.ones(2)}, ValueError, r"temperature has shape \(2,\), expected"),
    "temperatures 0-d": ({"temperature": torch.tensor(1.0)}, ValueError, r"temperature has shape \(\), expected"),
    "temperatures int": ({"temperature": torch.ones(2, 3).long()}, TypeError, "temperature has dtype torch.int64"),
    "logits_dtype": ({"logits_dtype": torch.float16}, ValueError, "logits_dtype is torch.float16, expected"),
    "logits_dtype of hidden alone": (BF16_HIDDEN | {"logits_dtype": torch.bfloat16}, ValueError,
                                     "logits_dtype is torch.bfloat16, expected torch.float32"),
    "lora of the weight's dtype": (BF16_HIDDEN | {"lora": matrices((12, 3), (3, 37))}, TypeError,
                                   "lora A has dtype torch.float32, expected torch.bfloat16 like hidden"),
    "logits_dtype str": ({"logits_dtype": "bfloat16"}, ValueError, "logits_dtype is bfloat16, expected torch.float32"),
    "budget 0": ({"chunk_bytes": 0}, ValueError, f"chunk_bytes is 0, expected at least {ROW}: one row of a vocabulary"),
    "budget < 0": ({"chunk_bytes": -1}, ValueError, f"chunk_bytes is -1, expected at least {ROW}"),
    "budget below a row": ({"chunk_bytes": ROW - 1}, ValueError, f"chunk_bytes is {ROW - 1}, expected at least {ROW}"),
    "budget float": ({"chunk_bytes": 1e9}, TypeError, r"chunk_bytes is 1000000000\.0, expected an integer"),
    "budget bool": ({"chunk_bytes": True}, TypeError, "chunk_bytes is True, expected an integer"),
    "capacity 0": ({"capacity": 0}, ValueError, "capacity is 0, expected a positive integer"),
    "capacity < 0": ({"capacity": -1}, ValueError, "capacity is -1, expected a positive integer"),
    "capacity float": ({"capacity": 4.0}, ValueError, r"capacity is 4\.0, expected a positive integer"),
    "batch_invariant": ({"batch_invariant": 1}, TypeError, "batch_invariant is 1, expected True or False"),
    "accumulation list": ({"grad_accumulation_into": []}, TypeError, "grad_accumulation_into is a list, expected"),
    "accumulation shape": ({"grad_accumulation_into": torch.zeros(12, 37)}, ValueError,
                           r"grad_accumulation_into has shape \(12, 37\), expected \(37, 12\)"),
    "accumulation dtype": ({"grad_accumulation_into": torch.zeros(37, 12).bfloat16()}, TypeError,
                           "grad_accumulation_into has dtype torch.bfloat16, expected torch.float32"),
    "accumulation frozen": ({"grad_accumulation_into": torch.zeros(37, 12)}, ValueError,
                            "grad_accumulation_into was given.* weight does not require grad"),
}


def grpo(hidden: Any, weight: Any, ids: Any, **keywords: Any) -> Tensor:
    return linear_grpo_loss(hidden, weight, ids, torch.ones(2), **keywords).loss


FUNCTIONS: list[Callable[..., Any]] = [linear_token_logprobs, linear_token_logprobs_and_entropy, grpo]


def refused(name: str, function: Callable[..., Any]) -> None:
    changes, error, message = BAD_INPUTS[name]
    arguments = cases.make("plain", 2, 3) | changes
    ids = arguments.pop("token_ids")
    with pytest.raises(error, match=message):
        function(arguments.pop("hidden"), arguments.pop("weight"), ids, **arguments)


@checks_only
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input(name: str) -> None:
    """All functions share one checker, so one function shows its messages; that all call it is the next test."""
    refused(name, linear_token_logprobs)


# One of each step of the checker, and the values that are looked at.
OF_ALL = (
    "unknown keyword", "no hidden", "weight transposed", "dtype of weight", "id too large", "bias length", "lora rank",
    "logit_scale NaN", "softcap 0", "temperature 0", "temperatures NaN", "logits_dtype", "budget below a row",
    "capacity 0", "batch_invariant", "accumulation shape",
)


@checks_only
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_function_checks_its_input(function: Callable[..., Any], implementation: str) -> None:
    for name in OF_ALL:
        refused(name, function)


@pytest.mark.parametrize("function", [linear_token_logprobs, linear_cross_entropy])
def test_0d_hidden_and_rounded_invariant_logits(function: Callable[..., Any]) -> None:
    weight = torch.zeros(37, 12)
    with pytest.raises(ValueError, match=r"hidden has shape \(\)|shape"):
        function(torch.tensor(1.0), weight, torch.tensor(1))
    with pytest.raises(ValueError, match=r"logits_dtype is torch.bfloat16 with batch_invariant, expected float32"):
        function(torch.zeros(2, 12).bfloat16(), weight.bfloat16(), torch.zeros(2).long(), batch_invariant=True,
                 logits_dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"advantages": torch.ones(3)}, ValueError, r"advantages has shape \(3,\), expected \(2,\)"),
        ({"mask": torch.ones(2)}, ValueError, r"mask has shape \(2,\), expected \(2, 3\)"),
        ({"old_logprobs": torch.ones(2)}, ValueError, r"old_logprobs has shape \(2,\), expected \(2, 3\)"),
        ({"importance_weights": torch.ones(3)}, ValueError, r"importance_weights has shape \(3,\)"),
        ({"normalizer": 0.0}, ValueError, r"normalizer is 0\.0, expected"),
        ({"normalizer": torch.tensor(-1.0)}, ValueError, r"normalizer is -1\.0, expected a positive finite number"),
        ({"measure_all": 1}, TypeError, "measure_all is 1, expected True or False"),
        ({"objective": objectives.r1()}, ValueError, "ref_logprobs is None, expected a tensor"),
        ({"objective": objectives.grpo}, TypeError, "objective is grpo,"),
        ({"objective": "grpo"}, TypeError, "objective is 'grpo', expected an Objective"),
        ({"objective": lambda logprobs, batch: logprobs.sum()}, ValueError, "the custom objective returned"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"cu_seqlens was given with token_ids of shape \(2, 3\)"),
    ],
)
def test_bad_policy_input(changes: dict[str, Any], error: type[Exception], message: str, implementation: str) -> None:
    case = cases.make("plain", 2, 3)
    case["hidden"].requires_grad_()
    with pytest.raises(error, match=message):
        linear_grpo_loss(**({**case, "advantages": torch.ones(2)} | changes))


def test_packed_boundaries_are_checked(implementation: str) -> None:
    case = cases.make("plain", 6)
    case["hidden"].requires_grad_()
    for cu_seqlens, message in (([0, 5], "cu_seqlens runs from 0 to 5, expected 0 to N = 6"),
                                ([0, 4, 3, 6], r"cu_seqlens\[2\] is 3, expected no less than")):
        boundaries = torch.tensor(cu_seqlens)
        with pytest.raises(ValueError, match=message):
            linear_grpo_loss(**case, advantages=torch.ones(len(cu_seqlens) - 1), cu_seqlens=boundaries)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_ids_and_temperatures_behind_the_mask_are_not_looked_up(
    function: Callable[..., Any], implementation: str
) -> None:
    case = cases.make("plain", 2, 3)
    case["token_ids"][0, 1] = -100
    mask = torch.ones(2, 3)
    mask[0, 1] = 0
    arguments = (case["hidden"], case["weight"], case["token_ids"])
    function(*arguments, mask=mask, temperature=at(1, math.nan))
    with pytest.raises(ValueError, match=r"token_ids\[1\] is -100, expected an id in"):
        function(*arguments)


# ---- where the weight's gradient goes ---------------------------------------------------------------------------


def loss_of(kind: str, case: dict[str, Any], **keywords: Any) -> Tensor:
    if kind == "grpo":
        return linear_grpo_loss(**case, advantages=torch.ones(3), **keywords).loss
    if kind == "gspo":
        return linear_grpo_loss(**case, advantages=torch.ones(3), objective=objectives.gspo(), **keywords).loss
    if kind == "cross_entropy":
        return linear_cross_entropy(case["hidden"], case["weight"], case["token_ids"], **keywords)
    return linear_token_logprobs(**case, **keywords).mean()


KINDS = ["logprobs", "grpo", "gspo", "cross_entropy"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "into_dtype"), [
    (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
])
def test_accumulation_adds_to_a_given_tensor(
    kind: str, dtype: torch.dtype, into_dtype: torch.dtype, implementation: str
) -> None:
    case = cases.make("plain", 3, 4, dtype=dtype)
    hidden, weight = case["hidden"].requires_grad_(), case["weight"].requires_grad_()
    loss_of(kind, case).backward()
    returned, grad_hidden = weight.grad.clone(), hidden.grad.clone()
    weight.grad = hidden.grad = None
    into = torch.full((37, 12), 0.5, dtype=into_dtype)
    loss = 3 * loss_of(kind, case, grad_accumulation_into=into)
    assert torch.equal(into, torch.full_like(into, 0.5))  # only backward adds
    loss.backward()
    assert weight.grad is None
    tolerance = 4 * max(torch.finfo(dtype).eps, torch.finfo(into_dtype).eps)
    torch.testing.assert_close(into.double(), 0.5 + 3 * returned.double(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(hidden.grad, 3 * grad_hidden, rtol=tolerance, atol=tolerance)


@slow_interpreted
def test_accumulation_into_the_gradient_itself(implementation: str) -> None:
    case = cases.make("plain", 3, 4)
    weight = case["weight"].requires_grad_()
    loss_of("grpo", case).backward()
    once = weight.grad.clone()
    loss_of("grpo", case, grad_accumulation_into=weight.grad).backward()
    torch.testing.assert_close(weight.grad, 2 * once)


@slow_interpreted
@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="Tensor.grad_dtype is of torch 2.10")
@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_may_ask_for_a_float32_gradient(kind: str, implementation: str) -> None:
    case = cases.make("plain", 3, 4, dtype=torch.bfloat16)
    into = torch.zeros(37, 12)
    case["weight"].requires_grad_()
    loss_of(kind, case, grad_accumulation_into=into).backward()
    weight = torch.nn.Parameter(case["weight"].detach().clone())
    weight.grad_dtype = torch.float32
    loss_of(kind, case | {"weight": weight}).backward()
    assert weight.grad.dtype == torch.float32 and torch.equal(weight.grad, into)


@slow_on_gpu_kernels
@pytest.mark.parametrize("how", ["into", "returned"])
@pytest.mark.parametrize("normalizer", [1000.0, 1024.0])  # the first has no exact bfloat16 reciprocal
@pytest.mark.parametrize("loss", ["cross_entropy", "dapo"])
def test_sixty_four_micro_batches(how: str, normalizer: float, loss: str) -> None:
    """A bfloat16 model's weight.grad over 64 micro-batches is within 1e-3 of float64."""
    micro, tokens, width, vocab = 64, 16, 64, 200
    case = cases.make("plain", micro * tokens, width=width, vocab=vocab, dtype=torch.bfloat16)
    weight = case["weight"].requires_grad_()
    into = torch.zeros(vocab, width)
    keywords = {"normalizer": normalizer, "grad_accumulation_into": into if how == "into" else None}
    if how == "returned":
        weight.grad_dtype = torch.float32
    advantages = torch.ones(micro * tokens)
    if loss == "dapo":
        advantages.normal_(generator=testing.generator(1))
    for n in range(micro):
        part = slice(n * tokens, (n + 1) * tokens)
        given = case["hidden"][part], weight, case["token_ids"][part]
        if loss == "dapo":
            linear_grpo_loss(*given, advantages[part], objective=objectives.dapo(), **keywords).loss.backward()
        else:
            linear_cross_entropy(*given, **keywords).backward()
    got = into if how == "into" else weight.grad
    exact = cases.exact(case, -advantages / normalizer)
    expected = exact.grads["weight"]
    assert got.dtype == torch.float32
    assert (got - expected).norm() <= 1e-3 * expected.norm()
    # d logits are rounded to bfloat16, so one entry may be half an eps off where one token makes all of it.
    testing.assert_within(got, expected, 0.51 * torch.finfo(torch.bfloat16).eps * exact.terms["weight"])


def test_memory_of_the_weight_gradient_must_be_its_own() -> None:
    hidden, weight, ids = torch.randn(5, 4), torch.randn(7, 4, requires_grad=True), torch.arange(5)
    for into, message in (
        (weight.detach(), "grad_accumulation_into .* memory .* weight"),
        (torch.zeros(4).expand(7, 4), r"grad_accumulation_into has strides \(0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(hidden, weight, ids, grad_accumulation_into=into)
    with pytest.raises(ValueError, match="grad_accumulation_into was given"):
        linear_cross_entropy(hidden, 2 * weight, ids, grad_accumulation_into=torch.zeros(7, 4))


def test_temperature_over_scale_has_a_range() -> None:
    with pytest.raises(ValueError, match="temperature / logit_scale is 1e-40"):
        linear_token_logprobs(
            torch.randn(5, 4), torch.randn(7, 4), torch.arange(5), temperature=1e-20, logit_scale=1e20
        )


@pytest.mark.parametrize("function", [linear_token_logprobs, linear_grpo_loss, linear_cross_entropy])
def test_type_hints_can_be_read(function: Callable[..., object]) -> None:
    assert "options" in typing.get_type_hints(function)

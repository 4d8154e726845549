"""Logits for sampling: against float64, and against the log-probs of the losses."""

import linear_cases as cases
import pytest
import torch

from r1kernels import linear_logits, linear_token_logprobs, testing

HEADS = ["plain", "bias", "logit_scale", "softcap", "temperature"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def given(head: str, *lead: int, **options: object) -> dict:
    case = cases.make(head, *lead, **options)
    del case["token_ids"]
    return case


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_values_against_float64(head: str, dtype: torch.dtype) -> None:
    """The oracle has the same operands, so only sums and functions are rounded."""
    case = given(head, 3, 4, dtype=dtype)
    found, expected = linear_logits(**case), cases.logits(case)[2].reshape(3, 4, 37)
    full = torch.float64 if dtype is torch.float64 else torch.float32
    assert found.dtype is full and found.shape == expected.shape and not found.requires_grad
    terms = (case["hidden"].double().abs() @ case["weight"].double().abs().T + 1) / case.get("temperature", 1.0)
    testing.assert_within(found, expected, 16 * torch.finfo(full).eps * terms)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_drawn_from_them_has_the_log_prob_of_the_losses(dtype: torch.dtype) -> None:
    case = cases.make("softcap", 6, dtype=dtype) | {"logit_scale": 0.6, "temperature": 0.7}
    ids = case.pop("token_ids")
    own = linear_logits(**case).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(own, linear_token_logprobs(token_ids=ids, **case), rtol=1e-5, atol=1e-5)


def test_strides_empty_batches_and_weights_that_need_a_gradient() -> None:
    case = given("bias", 4, 6)
    expected = linear_logits(**case)
    case["weight"].requires_grad_()
    assert not linear_logits(**case).requires_grad
    case["hidden"] = case["hidden"].transpose(0, 1).contiguous().transpose(0, 1)
    with torch.no_grad():
        case["weight"] = torch.cat([case["weight"]] * 2, dim=1)[:, ::2].clone().repeat_interleave(2, dim=1)[:, ::2]
    assert case["weight"].stride() == (case["weight"].shape[1] * 2, 2)
    case["weight"].copy_(given("bias", 4, 6)["weight"])
    torch.testing.assert_close(linear_logits(**case), expected)
    assert linear_logits(case["hidden"][:0], case["weight"]).shape == (0, 6, 37)


@pytest.mark.parametrize("name, value, kind", [
    ("weight", torch.ones(5, 3), ValueError), ("hidden", torch.ones(2, 12, dtype=torch.int64), TypeError),
    ("bias", torch.ones(3), ValueError), ("temperature", 0.0, ValueError), ("softcap", -1.0, ValueError),
    ("logit_scale", 0.0, ValueError),
])
def test_wrong_arguments_are_named(name: str, value: object, kind: type) -> None:
    with pytest.raises(kind, match=name):
        linear_logits(**given("plain", 2) | {name: value})

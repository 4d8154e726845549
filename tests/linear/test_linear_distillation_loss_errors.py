"""linear_distillation_loss refuses bad input: the message names the argument, its value and the expectation."""

import math
from typing import Any

import pytest
import torch
from backends import checks_only

from r1kernels import linear_distillation_loss

pytestmark = checks_only

STUDENT = {"student_hidden": torch.zeros(2, 3, 4), "student_weight": torch.zeros(5, 4)}
FULL = {"teacher_hidden": torch.zeros(2, 3, 6), "teacher_weight": torch.zeros(5, 6)}
TOPK = {
    "teacher_token_ids": torch.tensor([0, 1]).expand(2, 3, 2), "teacher_logprobs": torch.full((2, 3, 2), -1.0)
}


def teacher_option(**options: Any) -> dict[str, Any]:
    return FULL | {"teacher_options": options}


BAD_INPUTS: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "no teacher": (ValueError, {}, "given by nothing, expected teacher_hidden and teacher_weight, or teacher_token_id"),
    "two teachers": (ValueError, FULL | TOPK, "teacher_weight and teacher_token_ids and teacher_logprobs, expected"),
    "hidden alone": (ValueError, {"teacher_hidden": torch.zeros(2, 3, 6)}, "given by teacher_hidden, expected teacher"),
    "weight alone": (ValueError, {"teacher_weight": torch.zeros(5, 6)}, "given by teacher_weight, expected"),
    "ids alone": (ValueError, {"teacher_token_ids": TOPK["teacher_token_ids"]}, "given by teacher_token_ids, expected"),
    "student a list": (TypeError, FULL | {"student_hidden": [1.0]}, "student_hidden is a list, expected a torch.Tenso"),
    "student 0-d": (ValueError, TOPK | {"student_hidden": torch.tensor(1.0)}, r"student_hidden has shape \(\) and stu"),
    "student H": (ValueError, FULL | {"student_weight": torch.zeros(5, 3)}, r"student_hidden has .* student_weight .*"),
    "student weight 1-d": (ValueError, FULL | {"student_weight": torch.zeros(5)}, r"student_weight has shape \(5,\)"),
    "student V 0": (ValueError, FULL | {"student_weight": torch.zeros(0, 4)}, r"student_weight has shape \(0, 4\)"),
    "student dtypes": (TypeError, FULL | {"student_weight": torch.zeros(5, 4).double()}, "student_weight .*student_hi"),
    "teacher a list": (ValueError, FULL | {"teacher_hidden": [1.0]}, "teacher_hidden has 1 teachers and teacher_coefs"),
    "teacher weight a list": (TypeError, FULL | {"teacher_weight": [1]}, "teacher_weight is a list, expected a torch"),
    "teacher rows": (ValueError, FULL | {"teacher_hidden": torch.zeros(3, 2, 6)},
                     r"teacher_hidden has shape \(3, 2, 6\), expected \(2, 3, H\): one row"),
    "teacher 0-d": (ValueError, FULL | {"teacher_hidden": torch.tensor(1.0)}, r"teacher_hidden has shape \(\), expect"),
    "teacher H": (ValueError, FULL | {"teacher_weight": torch.zeros(5, 7)}, "teacher_hidden has .* teacher_weight .*H"),
    "teacher dtypes": (TypeError, FULL | {"teacher_weight": torch.zeros(5, 6).double()}, "teacher_weight .*teacher_hi"),
    "teacher device": (ValueError, FULL | {"teacher_hidden": torch.zeros(2, 3, 6, device="meta")},
                       "teacher_hidden is on meta, expected cpu"),
    "vocabularies": (ValueError, FULL | {"teacher_weight": torch.zeros(7, 6)},
                     "teacher_weight has a vocabulary of 7 and student_weight one of 5, expected the same tokens"),
    "teacher options a list": (TypeError, FULL | {"teacher_options": [1]}, "teacher_options is a list, expected a dic"),
    "teacher option": (TypeError, teacher_option(temperature=1.0), "'temperature', expected one of bias, lora, logit_"),
    "teacher options without": (ValueError, TOPK | {"teacher_options": {}}, "teacher_options is given with teacher_lo"),
    "teacher bias": (ValueError, teacher_option(bias=torch.zeros(4)), r"teacher_options bias has shape \(4,\), expect"),
    "teacher lora": (TypeError, teacher_option(lora=1), "teacher_options lora is a int, expected a pair"),
    "teacher lora shape": (ValueError, teacher_option(lora=(torch.zeros(4, 1), torch.zeros(1, 5))), "H = 6 and V = 5"),
    "teacher scale": (ValueError, teacher_option(logit_scale=0), "teacher_options logit_scale is 0, expected"),
    "teacher softcap": (ValueError, teacher_option(softcap=-1.0), r"teacher_options softcap is -1\.0, expected"),
    "bias": (ValueError, FULL | {"bias": torch.zeros(4)}, r"bias has shape \(4,\), expected \(5,\): .* student_weight"),
    "top_k with ids": (ValueError, TOPK | {"top_k": 2}, "top_k and teacher_token_ids are given, expected one of them"),
    "top_k > V": (ValueError, FULL | {"top_k": 6}, "top_k is 6, expected a number from 1 to V = 5"),
    "top_k > vocab_size": (ValueError, FULL | {"top_k": 5, "vocab_size": 4}, "top_k is 5, expected .* 1 to V = 4"),
    "tail alone": (ValueError, FULL | {"tail": "truncate"}, "tail is 'truncate' and top_k is None, expected top_k"),
    "function, two": (ValueError, FULL | {"top_k": 2, "teacher_logprobs": len}, "a function of the chosen ids or"),
    "function alone": (ValueError, {"teacher_logprobs": len}, "teacher_logprobs is a function and top_k is None"),
    "function, shape": (ValueError, {"teacher_logprobs": lambda ids, rows: torch.zeros(2), "top_k": 2},
                        r"the result of teacher_logprobs has shape \(2,\), expected \(6, 2\)"),
    "option": (TypeError, FULL | {"tau": 1.0}, "unknown keyword 'tau', expected one of bias"),
    "scale": (ValueError, FULL | {"logit_scale": math.nan}, "logit_scale is nan, expected"),
    "temperatures": (TypeError, FULL | {"temperature": torch.ones(2, 3)}, "temperature is tensor"),
    "temperature": (ValueError, FULL | {"temperature": 0.0}, r"temperature is 0\.0, expected"),
    "divergence": (ValueError, FULL | {"divergence": "kl"}, "divergence is 'kl', expected one of forward_kl"),
    "beta": (ValueError, FULL | {"beta": 1.0, "divergence": "jsd"}, r"beta is 1\.0, expected a number from 1e-6"),
    "mask": (ValueError, FULL | {"mask": torch.ones(2)}, r"mask has shape \(2,\), expected \(2, 3\)"),
    "normalizer": (ValueError, FULL | {"normalizer": 0}, "normalizer is 0, expected a finite number > 0"),
    "capacity": (ValueError, FULL | {"capacity": 0}, "capacity is 0, expected a positive integer"),
    "accumulation": (ValueError, FULL | {"grad_accumulation_into": torch.zeros(5, 4)}, "does not require grad"),
    "logits_dtype": (ValueError, FULL | {"logits_dtype": torch.float16}, "logits_dtype is torch.float16, expected"),
    "budget float": (TypeError, FULL | {"chunk_bytes": 1e9}, r"chunk_bytes is 1000000000\.0, expected an integer"),
    "K 0": (ValueError, {name: value[..., :0] for name, value in TOPK.items()}, r"shape \(2, 3, 0\), expected .* V ="),
    "ids 0-d": (ValueError, TOPK | {"teacher_token_ids": torch.tensor(1)}, r"teacher_token_ids has shape \(\), expect"),
    "ids a list": (TypeError, TOPK | {"teacher_token_ids": [1]}, "teacher_token_ids is a list, expected"),
    "id = V": (ValueError, TOPK | {"teacher_token_ids": torch.tensor([0, 5]).expand(2, 3, 2)}, "is 5, expected an id"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_names_argument_value_and_expectation(case: str, implementation: str) -> None:
    error, arguments, message = BAD_INPUTS[case]
    with pytest.raises(error, match=message):
        linear_distillation_loss(**STUDENT | arguments)


@pytest.mark.parametrize("teacher", [FULL, TOPK])
def test_a_budget_below_one_row_names_the_least_that_works(teacher: dict[str, Any], implementation: str) -> None:
    """Of the logits of both."""
    with pytest.raises(ValueError, match="chunk_bytes is 3, expected at least") as error:
        linear_distillation_loss(**STUDENT, **teacher, chunk_bytes=3)
    least = int(str(error.value).split("at least ")[1].split(":")[0])
    assert least > (40 if teacher is FULL else 20)
    with pytest.raises(ValueError, match=f"expected at least {least}"):
        linear_distillation_loss(**STUDENT, **teacher, chunk_bytes=least - 1)
    assert linear_distillation_loss(**STUDENT, **teacher, chunk_bytes=least).loss.isfinite()

"""distillation_loss refuses bad input: the message names the argument, its value and the expectation."""

import math
from typing import Any

import pytest
import torch
from backends import checks_only
from torch import Tensor

from r1kernels import distillation_loss
from r1kernels.ops.distillation_loss import check_top_k
from r1kernels.ops.teacher_mixture import check_coefs

pytestmark = checks_only

LOGITS = torch.zeros(2, 3, 5)
IDS = torch.tensor([0, 1]).expand(2, 3, 2)
LOGPROBS = torch.full((2, 3, 2), -1.0)
FULL = {"teacher_logits": LOGITS}
TOPK = {"teacher_token_ids": IDS, "teacher_logprobs": LOGPROBS}


def at(value: float, *position: int, of: Tensor = LOGPROBS) -> Tensor:
    changed = of.clone()
    changed[position] = value
    return changed


BAD_INPUTS: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "no teacher": (ValueError, {}, "the teacher is given by nothing, expected teacher_logits, or"),
    "two teachers": (ValueError, FULL | TOPK, "teacher_logits and teacher_token_ids and teacher_logprobs, expected"),
    "ids alone": (ValueError, {"teacher_token_ids": IDS}, "given by teacher_token_ids, expected"),
    "log-probs alone": (ValueError, {"teacher_logprobs": LOGPROBS}, "given by teacher_logprobs, expected"),
    "logits and ids": (ValueError, FULL | {"teacher_token_ids": IDS}, "teacher_logits and teacher_token_ids, expected"),
    "student a list": (TypeError, FULL | {"student_logits": [1.0]}, "student_logits is a list, expected a torch.Tens"),
    "student ints": (TypeError, FULL | {"student_logits": LOGITS.long()}, "student_logits has dtype torch.int64"),
    "student 0-d": (ValueError, FULL | {"student_logits": torch.tensor(1.0)}, r"student_logits has shape \(\), expec"),
    "no vocabulary": (ValueError, FULL | {"student_logits": LOGITS[..., :0]}, r"student_logits has shape \(2, 3, 0\)"),
    "teacher a list": (ValueError, {"teacher_logits": [1.0]}, "teacher_logits has 1 teachers and teacher_coefs"),
    "teacher ints": (TypeError, {"teacher_logits": LOGITS.long()}, "teacher_logits has dtype torch.int64, expected"),
    "teacher device": (ValueError, {"teacher_logits": LOGITS.to("meta")}, "teacher_logits is on meta, expected cpu"),
    "vocabularies": (ValueError, {"teacher_logits": torch.zeros(2, 3, 6)}, "vocabulary of 6 and student_logits one"),
    "teacher rows": (ValueError, {"teacher_logits": LOGITS[:, :2]}, r"teacher_logits has shape \(2, 2, 5\), expected"),
    "divergence": (ValueError, FULL | {"divergence": "kl"}, "divergence is 'kl', expected one of forward_kl"),
    "beta 0": (ValueError, FULL | {"beta": 0.0, "divergence": "jsd"}, r"beta is 0\.0, expected a number from 1e-6 to"),
    "beta 1": (ValueError, FULL | {"beta": 1, "divergence": "jsd"}, r"beta is 1\.0, expected a number from 1e-6"),
    "beta NaN": (ValueError, FULL | {"beta": math.nan}, "beta is nan, expected a finite number"),
    "beta str": (TypeError, FULL | {"beta": "1"}, "beta is '1', expected a Python number"),
    "temperature": (ValueError, FULL | {"temperature": 0}, "temperature is 0, expected .* > 0"),
    "temperature tiny": (ValueError, TOPK | {"temperature": 1e-39}, "temperature is 1e-39, expected"),
    "mask shape": (ValueError, FULL | {"mask": torch.ones(2)}, r"mask has shape \(2,\), expected \(2, 3\)"),
    "mask list": (TypeError, FULL | {"mask": [1]}, "mask is a list, expected"),
    "normalizer 0": (ValueError, FULL | {"normalizer": 0}, "normalizer is 0, expected a finite number > 0"),
    "normalizer < 0": (ValueError, FULL | {"normalizer": torch.tensor(-1.0)}, r"normalizer is -1\.0, expected a pos"),
    "normalizer 1-d": (ValueError, FULL | {"normalizer": torch.ones(2)}, r"normalizer has shape \(2,\), expected \(\)"),
    "normalizer device": (ValueError, FULL | {"normalizer": torch.ones((), device="meta")}, "normalizer is on meta"),
    "K missing": (ValueError, TOPK | {"teacher_token_ids": IDS[..., 0]}, r"shape \(2, 3\), expected \(2, 3, K\) w"),
    "K of one token": (ValueError, TOPK | {"student_logits": LOGITS[0, 0]}, r"shape \(2, 3, 2\), expected \(K,\) with"),
    "K 0": (ValueError, TOPK | {"teacher_token_ids": IDS[..., :0]}, r"shape \(2, 3, 0\), expected .* 1 <= K <= V = 5"),
    "K > V": (ValueError, TOPK | {"teacher_token_ids": IDS.repeat(1, 1, 3)}, r"shape \(2, 3, 6\), expected .* V = 5"),
    "K differs": (ValueError, TOPK | {"teacher_logprobs": LOGPROBS[..., :1]}, r"teacher_logprobs has shape \(2, 3, 1"),
    "rows differ": (ValueError, TOPK | {"teacher_token_ids": IDS[:1]}, r"teacher_token_ids has shape \(1, 3, 2\)"),
    "ids float": (TypeError, TOPK | {"teacher_token_ids": LOGPROBS}, "teacher_token_ids has dtype torch.float32"),
    "ids device": (ValueError, TOPK | {"teacher_token_ids": IDS.to("meta")}, "teacher_token_ids is on meta, expected"),
    "log-probs int": (TypeError, TOPK | {"teacher_logprobs": IDS}, "teacher_logprobs has dtype torch.int64, expected"),
    "id = V": (ValueError, TOPK | {"teacher_token_ids": at(5, 1, 2, 0, of=IDS)}, r"\[1, 2, 0\] is 5, expected an id"),
    "id < 0": (ValueError, TOPK | {"teacher_token_ids": at(-1, 0, 2, 1, of=IDS)}, r"\[0, 2, 1\] is -1, expected an id"),
    "twice": (ValueError, TOPK | {"teacher_token_ids": at(1, 1, 0, 0, of=IDS)}, r"\[1, 0\] holds 1 twice, expected"),
    "log-prob > 0": (ValueError, TOPK | {"teacher_logprobs": at(0.1, 0, 1, 1)}, r"\[0, 1, 1\] is 0\.1.*, expected a"),
    "log-prob NaN": (ValueError, TOPK | {"teacher_logprobs": at(math.nan, 1, 1, 1)}, r"\[1, 1, 1\] is nan, expected"),
    "log-prob inf": (ValueError, TOPK | {"teacher_logprobs": at(math.inf, 1, 1, 1)}, r"\[1, 1, 1\] is inf, expected"),
    "top_k with ids": (ValueError, TOPK | {"top_k": 2}, "top_k and teacher_token_ids are given, expected one of them"),
    "top_k without": (ValueError, {"top_k": 2}, "given by nothing, expected teacher_logits"),
    "top_k with log-probs": (ValueError, {"top_k": 2, "teacher_logprobs": LOGPROBS}, r"teacher_logprobs \(a Tensor"),
    "top_k, two": (ValueError, FULL | {"top_k": 2, "teacher_logprobs": len}, "a function of the chosen ids or te"),
    "top_k 0": (ValueError, FULL | {"top_k": 0}, "top_k is 0, expected a number from 1 to V = 5"),
    "top_k > V": (ValueError, FULL | {"top_k": 6}, "top_k is 6, expected a number from 1 to V = 5"),
    "top_k > vocab_size": (ValueError, FULL | {"top_k": 5, "vocab_size": 4}, "top_k is 5, expected .* to V = 4"),
    "top_k float": (TypeError, FULL | {"top_k": 2.0}, r"top_k is 2\.0, expected a Python integer"),
    "top_k_of": (ValueError, FULL | {"top_k": 2, "top_k_of": "both"}, "top_k_of is 'both', expected one of student"),
    "top_k_of alone": (ValueError, FULL | {"top_k_of": "union"}, "top_k_of is 'union' and top_k is None, expected top"),
    "tail": (ValueError, TOPK | {"tail": "drop"}, "tail is 'drop', expected one of bucket, truncate, renormalize"),
    "tail alone": (ValueError, FULL | {"tail": "truncate"}, "tail is 'truncate' and top_k is None, expected top_k"),
    "function alone": (ValueError, {"teacher_logprobs": len}, "teacher_logprobs is a function and top_k is None"),
    "function of a union": (ValueError, {"teacher_logprobs": len, "top_k": 2, "top_k_of": "union"},
                            "top_k_of is 'union' and teacher_logprobs is a function, expected 'student'"),
    "function, list": (TypeError, {"teacher_logprobs": lambda ids, rows: [1], "top_k": 2}, "logprobs is a list"),
    "function, shape": (ValueError, {"teacher_logprobs": lambda ids, rows: LOGPROBS, "top_k": 2},
                        r"the result of teacher_logprobs has shape \(2, 3, 2\), expected \(6, 2\)"),
    "function, value": (ValueError, {"teacher_logprobs": lambda ids, rows: LOGPROBS.reshape(6, 2) + 2, "top_k": 2},
                        r"teacher_logprobs\[0, 0\] is 1\.0, expected a log-prob"),
    "too much": (ValueError, TOPK | {"teacher_logprobs": at(-0.1, 1, 1, 1)}, r"\[1, 1\] add up to a probability"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_names_argument_value_and_expectation(case: str, implementation: str) -> None:
    error, arguments, message = BAD_INPUTS[case]
    with pytest.raises(error, match=message):
        distillation_loss(**({"student_logits": LOGITS} | arguments))


def test_values_behind_the_mask_are_not_checked(implementation: str) -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[1, 1] = False
    bad = TOPK | {"teacher_logprobs": at(math.nan, 1, 1, 1), "teacher_token_ids": at(77, 1, 1, 0, of=IDS)}
    assert distillation_loss(LOGITS, **bad, mask=mask).loss.isfinite()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("beta", [0.0, 1, -3.0])
def test_only_jsd_has_a_beta(beta: float, kind: str, implementation: str) -> None:
    student = torch.arange(5.0).expand(2, 3, 5)
    for teacher in (FULL, TOPK):
        given = {"student_logits": student, "divergence": kind} | teacher
        assert torch.equal(distillation_loss(**given, beta=beta).loss, distillation_loss(**given).loss)


def test_a_choice_over_a_sharded_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k and process_group are given, expected one of them"):
        check_top_k(2, "student", "bucket", FULL, None, None, 5, object())
    with pytest.raises(ValueError, match="teacher_logits is a list and process_group is given, expected one of them"):
        check_coefs(torch.ones(1), "teacher_logits", [LOGITS], (2, 3), LOGITS, None, object())

"""The denominator of the losses of all micro-batches; tests/linear/test_linear_shards.py has several processes."""

from typing import Any

import pytest
import torch
from backends import checks_only, host_code
from torch import Tensor

from r1kernels import global_normalizer, objectives

MASK = torch.tensor([[True, True, False], [True, False, False]])


@host_code
@pytest.mark.parametrize(("objective", "expected"), [
    (objectives.dapo(), 3), (objectives.grpo(), 2), (objectives.dr_grpo(max_length=7), 14),
    (lambda logprobs, batch: -logprobs, 3),
])
def test_each_aggregate_has_its_denominator(objective: Any, expected: float) -> None:
    for mask in (MASK, 2 * MASK.float()):
        got = global_normalizer(mask, objective)
        assert (got.dtype, got.shape, float(got)) == (torch.float32, (), expected)
    assert float(global_normalizer([MASK, MASK[:1]], objective)) == {3: 5, 2: 3, 14: 21}[expected]


@host_code
def test_packed_sequences_are_counted_by_their_ends() -> None:
    ends = torch.tensor([0, 3, 4, 6])
    assert float(global_normalizer(MASK.reshape(-1), objectives.grpo(), cu_seqlens=ends)) == 3
    packed = [MASK.reshape(-1), MASK[0]]
    assert float(global_normalizer(packed, objectives.grpo(), cu_seqlens=[ends, torch.tensor([0, 3])])) == 4
    assert float(global_normalizer(MASK.reshape(-1), objectives.dapo())) == 3


@host_code
@pytest.mark.parametrize("mask", [torch.zeros(2, 3), torch.zeros(0, 3)])
def test_nothing_counted_is_a_valid_denominator(mask: Tensor) -> None:
    for objective in (objectives.dapo(), objectives.dr_grpo(max_length=1)):
        assert float(global_normalizer(mask, objective)) >= 1


@checks_only
@pytest.mark.parametrize(("arguments", "keywords", "error", "message"), [
    ((None,), {}, TypeError, "mask is None, expected a tensor"),
    (([],), {}, TypeError, r"mask is \[\], expected a tensor"),
    (([MASK, 1],), {}, TypeError, r"mask\[1\] is a int, expected a torch.Tensor"),
    ((MASK, "dapo"), {}, TypeError, "objective is 'dapo', expected an Objective"),
    ((MASK[0],), {}, ValueError, r"cu_seqlens is None for a mask of shape \(3,\)"),
    (([MASK[0], MASK[0]],), {"cu_seqlens": [MASK[0]]}, ValueError, "cu_seqlens is for 1 micro-batches, expected .* 2"),
])
def test_bad_input(arguments: Any, keywords: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        global_normalizer(*arguments, **keywords)

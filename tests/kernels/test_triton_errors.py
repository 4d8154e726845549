"""Values that only a kernel sees: on a GPU an assertion names the argument, for a check of the host would have to wait.

Under the interpreter the same assertion is an exception; `test_triton_interpreter` runs this file there.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import r1kernels
from r1kernels import _library, objectives, testing

if not _library.INTERPRETED:
    pytest.skip("for the Triton interpreter: test_triton_interpreter runs this file", allow_module_level=True)

from triton.runtime.errors import InterpreterError

VOCAB = 37
UNKNOWN = "r1kernels: token_ids holds an id outside"
LOGITS = testing.random_logits(2, 5, VOCAB)


def ids_with(value: int, position: int) -> Tensor:
    ids = testing.random_ids(2, 5, vocab=VOCAB)
    ids.view(-1)[position] = value
    return ids


def refused(message: str, function: Callable[..., object], *arguments: object, **keywords: object) -> None:
    with pytest.raises(InterpreterError, match=message):
        function(*arguments, **keywords)


# ---- ids ----------------------------------------------------------------------------------------------------

HIDDEN, WEIGHT = torch.randn(2, 5, 16).bfloat16(), torch.randn(VOCAB, 16).bfloat16()
# The linear functions look ids up on the host where that is free, as it is here.
OF_IDS: dict[str, Callable[[Tensor, Tensor | None], object]] = {
    "token_logprobs": lambda ids, mask: r1kernels.ops.token_stats.token_stats(LOGITS, ids, mask),
    "token_logprobs, strided": lambda ids, mask: r1kernels.ops.token_stats.token_stats(
        LOGITS.transpose(0, 2).contiguous().transpose(0, 2), ids, mask
    ),
    "token_logprobs, bfloat16": lambda ids, mask: r1kernels.ops.token_stats.token_stats(LOGITS.bfloat16(), ids, mask),
    "token_statistics": lambda ids, mask: torch.ops.r1kernels.token_statistics(LOGITS, ids, mask, 1.0, None, True, 7),
    "grpo_loss": lambda ids, mask: r1kernels.grpo_loss(LOGITS, ids, torch.ones(2), mask=mask),
    "linear_statistics": lambda ids, mask: torch.ops.r1kernels.linear_statistics(
        HIDDEN.flatten(0, 1), WEIGHT, None, ids.flatten(), None if mask is None else mask.flatten(), 1.0, None, 1.0,
        0.0, False,
    ),
}


@pytest.mark.parametrize("name", OF_IDS)
def test_an_id_outside_the_vocabulary_is_refused_unless_masked(name: str) -> None:
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3] = False
    for value in (VOCAB, -1, 2**40):
        refused(UNKNOWN, OF_IDS[name], ids_with(value, 9), None)
        refused(UNKNOWN, OF_IDS[name], ids_with(value, 0), mask)
        OF_IDS[name](ids_with(value, 8), mask)
    for value in (0, VOCAB - 1):
        OF_IDS[name](ids_with(value, 8), None)


def test_targets_outside_the_vocabulary_are_refused_unless_ignored() -> None:
    for value in (VOCAB, -1, 2**40):
        refused(UNKNOWN, r1kernels.cross_entropy, LOGITS, ids_with(value, 4))
        r1kernels.cross_entropy(LOGITS, ids_with(value, 4), ignore_index=value)
    r1kernels.cross_entropy(LOGITS, ids_with(-100, 4))


# ---- the policy loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_normalizer_on_the_device_is_positive_and_finite(value: float) -> None:
    inputs = testing.random_policy()
    packed = testing.packed(inputs, testing.random_lengths(5, 7))
    for objective in (objectives.dapo(), objectives.gspo()):
        for given in (inputs, packed):
            arguments = given | {"objective": objective}
            message = "r1kernels: normalizer must be a positive finite number"
            refused(message, r1kernels.policy_loss, **arguments, normalizer=torch.tensor(value))
            r1kernels.policy_loss(**arguments, normalizer=torch.tensor(1e-30))


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 3, 5], "r1kernels: cu_seqlens must run from 0 to N"),
        ([1, 3, 6], "r1kernels: cu_seqlens must run from 0 to N"),
        ([0, 3, 7], "r1kernels: cu_seqlens must run from 0 to N"),
        ([0, 4, 3, 6], "r1kernels: cu_seqlens must not descend"),
        ([0, 9, 6], "r1kernels: cu_seqlens must not descend"),
        ([0, -1, 6], "r1kernels: cu_seqlens must not descend"),
    ],
)
@pytest.mark.parametrize("objective", [objectives.grpo(), objectives.dapo(), objectives.gspo()])
def test_cu_seqlens_run_from_0_to_n(cu_seqlens: list[int], message: str, objective: r1kernels.Objective) -> None:
    def run(bounds: list[int]) -> None:
        r1kernels.policy_loss(
            torch.zeros(6), torch.zeros(len(bounds) - 1), cu_seqlens=torch.tensor(bounds), objective=objective
        )

    refused(message, run, cu_seqlens)
    for valid in ([0, 6], [0, 0, 6, 6], [0, 4, 4, 6]):
        run(valid)


def test_a_descent_is_found_wherever_it_is() -> None:
    """Among more sequences than one step of the kernel looks at."""
    for where in (1, 128, 399):
        bounds = torch.arange(401)
        bounds[where] += 2
        tokens, advantages = torch.zeros(2, 400)
        refused("r1kernels: cu_seqlens must not descend", r1kernels.policy_loss, tokens, advantages, cu_seqlens=bounds)


def test_one_number_is_no_cu_seqlens_of_tokens() -> None:
    with pytest.raises(ValueError, match=r"cu_seqlens holds one number, expected it to run from 0 to N = 6"):
        r1kernels.policy_loss(torch.zeros(6), torch.zeros(0), cu_seqlens=torch.zeros(1, dtype=torch.int64))


# ---- rewards --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["group_std", "batch_std", "none"])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_reward_is_refused(value: float, scale: str) -> None:
    rewards = torch.randn(12)
    for where in (0, 7, 11):
        bad = rewards.clone()
        bad[where] = value
        for groups in ({"group_size": 4}, {"group_ids": torch.arange(12) % 3}):
            message = "r1kernels: rewards must be finite numbers, or NaN for unscorable"
            refused(message, r1kernels.group_advantages, bad, **groups, scale=scale)
    rewards[7] = math.nan
    r1kernels.group_advantages(rewards, 4, scale=scale)

"""Ranks with other tokens of the same sequences, or with other sequences and DDP or FSDP2, against one process."""

import itertools
from typing import Any

import pytest
import token_ranks
import torch
from backends import slow_on_gpu_kernels
from ranks import run_ranks
from token_ranks import FUNCTIONS, LENGTH, NORMALIZED, OBJECTIVES, PARTS, SEQUENCES, WORLD
from torch import Tensor

from r1kernels import backend, policy_loss, testing

pytestmark = slow_on_gpu_kernels
Results = list[dict[str, Any]]
SEQUENCE_RATIOS = [objective for objective in OBJECTIVES.values() if getattr(objective, "ratio", "") == "sequence"]
SHARED = ("weight",)  # gradients that are added up; those of tokens belong to one rank


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks(token_ranks, tmp_path_factory.mktemp("tokens"))


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm())


@pytest.mark.few(24)
@pytest.mark.parametrize("world", PARTS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_parts_of_sequences_add_up_to_one_process(name: str, function: str, world: int, ranks: Results) -> None:
    """The error is at most twice that of one process and one rounding."""
    alone = token_ranks.loss_of(function, OBJECTIVES[name], slice(None))
    with backend("reference"):
        exact = token_ranks.loss_of(function, OBJECTIVES[name], slice(None), torch.float64)
    parts = [rank[f"{function}, {name}, {world}"] for rank in ranks[:world]]
    together = {"loss": sum(part["loss"] for part in parts)}
    for key in alone["grads"]:
        grads = [part["grads"][key] for part in parts]
        together[key] = sum(grads) if key in SHARED else torch.cat(grads, 1)
    expected, one = ({"loss": found["loss"], **found["grads"]} for found in (exact, alone))
    for key, value in expected.items():
        rounding = 2 * testing.EPS32 * max(float(value.norm()), 0.1 if key == "loss" else 0)
        assert error(together[key], value) <= 2 * error(one[key], value) + rounding, key
    for part in parts:
        assert part["metrics"].keys() == alone["metrics"].keys()
        for key, value in alone["metrics"].items():
            testing.assert_within(part["metrics"][key], value, 2e-6 * value.abs().nan_to_num().clamp(min=1))


@pytest.mark.parametrize("world", PARTS)
def test_bytes_on_the_wire_are_those_of_sequences(world: int, ranks: Results) -> None:
    for results, function, name in itertools.product(ranks[:world], FUNCTIONS, OBJECTIVES):
        sent = results[f"{function}, {name}, {world}"]["sent"]
        header, metrics = [size for kind, size in sent if kind == "all_gather"]
        sums = [size for kind, size in sent if kind == "all_reduce"]
        assert header == 96 and metrics <= 16 * 8
        by_sequence = OBJECTIVES[name] in SEQUENCE_RATIOS
        assert len(sums) <= (6 if by_sequence else 2) and all(size <= SEQUENCES * 8 for size in sums), (name, sums)


@pytest.mark.parametrize("world", PARTS)
def test_a_normalizer_counts_all_tokens_and_each_sequence_once(world: int, ranks: Results) -> None:
    tokens = int(token_ranks.batch()["mask"].sum())
    for results in ranks[:world]:
        assert results[f"normalizers, {world}"] == [tokens, SEQUENCES]


ERRORS = {
    "sequences": [("the number of sequences is 2 on rank 0 of sequence_group and 3 on rank 1"),
                  ("the number of sequences is 3 on rank 1 of sequence_group and 2 on rank 0")],
    "objective": ["'surrogate', 'clip'", "'surrogate', 'sapo'"],
    "refused": ["rank 1 of sequence_group raised an error", "mask has shape (1,), expected (2, 3)"],
}


@pytest.mark.parametrize("name", ERRORS)
def test_ranks_that_disagree_raise_on_both_sides(name: str, ranks: Results) -> None:
    for results, expected in zip(ranks, ERRORS[name], strict=False):
        assert results[f"error {name}"].startswith("ValueError: ") and expected in results[f"error {name}"]


def test_a_sequence_group_is_a_group() -> None:
    with pytest.raises(TypeError, match=r"sequence_group is 'context', expected a torch\.distributed\.ProcessGroup"):
        policy_loss(torch.zeros(2, 3), torch.ones(2), sequence_group="context")


# ---- other sequences ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
@pytest.mark.parametrize("name", NORMALIZED)
def test_uneven_accumulation_gives_the_gradient_of_one_process(name: str, kind: str, ranks: Results) -> None:
    alone = token_ranks.accumulated(NORMALIZED[name], None)
    for results in ranks:
        grads = results[f"{kind}, {name}"]
        assert grads.keys() == alone.keys()
        for key, value in alone.items():
            assert error(grads[key], value.double()) <= 4 * testing.EPS32 * float(value.norm()), key


def test_a_missing_rank_ends_the_call_after_the_time_limit_of_the_group(ranks: Results) -> None:
    message = ranks[0]["missing"]
    assert message.startswith("RuntimeError: r1kernels: an exchange of 12 numbers between the ranks [0, 1] of")
    assert "process_group failed on rank 0" in message and "within the time limit" in message


def test_the_parts_are_uneven_and_one_is_empty() -> None:
    assert [part.stop - part.start for part in PARTS[3]] == [4, 0, 5] and PARTS[2][1].stop == LENGTH and WORLD == 3

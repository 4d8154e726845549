"""Heads that are DTensors of a device mesh, and parameters of FSDP2, in four processes against one."""

from typing import Any

import mesh_ranks
import pytest
import torch
from backends import slow_on_gpu_kernels
from mesh_ranks import CASES, PRECISIONS
from ranks import run_ranks
from shard_cases import LEAD, VOCAB, WIDTH, assert_like_one_process, make
from torch import Tensor

from r1kernels import linear_logits

pytestmark = slow_on_gpu_kernels
Results = list[dict[str, Any]]
# The ranks of each data coordinate.
DATA = {
    "FSDP": [[0], [1], [2], [3]], "replicated": [[0], [1], [2], [3]], "tensor": [[0, 1, 2, 3]],
    "both": [[0, 1], [2, 3]], "hidden is a DTensor": [[0, 1], [2, 3]],
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks(mesh_ranks, tmp_path_factory.mktemp("meshes"))


def whole(ranks: Results, name: str, place: str) -> dict[str, Tensor]:
    """Losses added up and gradients of hidden side by side. The gradients of the head have the same bits on all ranks,
    and what tensor ranks compute together, too."""
    results = [rank[f"{name}: {place}"] for rank in ranks]
    together = {key: value for key, value in results[0].items() if key not in ("traffic", "hidden", "loss")}
    for result in results[1:]:
        assert all(torch.equal(result[key], value) for key, value in together.items()), (name, place)
    coordinates = DATA[place]
    for same in coordinates:
        for rank in same[1:]:
            for key in ("loss", "hidden"):
                assert torch.equal(results[rank][key], results[same[0]][key]), (name, place, key)
    parts = [results[same[0]] for same in coordinates]
    hidden = torch.empty(*LEAD, WIDTH, dtype=parts[0]["hidden"].dtype)
    for number, part in enumerate(parts):
        hidden[number :: len(parts)] = part["hidden"]
    return {"loss": sum(part["loss"] for part in parts), "hidden": hidden, **together}


@pytest.mark.few(12)
@pytest.mark.parametrize("place", ["FSDP", "replicated", "tensor", "both"])
@pytest.mark.parametrize("name", CASES)
def test_dtensors_give_what_one_process_gives(name: str, place: str, ranks: Results) -> None:
    assert_like_one_process(whole(ranks, name, place), mesh_ranks.alone(name))


def test_hidden_states_may_be_dtensors(ranks: Results) -> None:
    alone = mesh_ranks.alone("policy")
    assert_like_one_process(whole(ranks, "policy", "hidden is a DTensor"), alone)
    for rank in ranks:  # the same tokens everywhere: nothing is added up
        assert_like_one_process(rank["same tokens"], alone)


@pytest.mark.parametrize(("place", "rows", "data_ranks"), [("FSDP", VOCAB, 4), ("both", VOCAB // 2, 2)])
@pytest.mark.parametrize(("name", "item"), [("policy", 4), ("policy, bias, bfloat16", 2)])
def test_a_weight_is_gathered_once_and_its_gradient_reduced_once_in_float32(
    name: str, item: int, place: str, rows: int, data_ranks: int, ranks: Results
) -> None:
    """The traffic of the tensor axis is counted in test_linear_shards.py."""
    entries = [rows * WIDTH, *([rows] if "bias" in name else [])]
    sent = [(kind, size) for kind, size in ranks[0][f"{name}: {place}"]["traffic"] if not kind.startswith("_wrap")]
    assert sent[: len(entries)] == [("all_gather_into_tensor", entry // data_ranks * item) for entry in entries]
    assert sorted(sent[len(entries) :]) == sorted(("reduce_scatter_tensor", entry * 4) for entry in entries)
    assert not ranks[0][f"{name}: tensor"]["traffic"]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_parameters_of_fsdp2_and_tensor_parallelism(inside: bool, precision: str, ranks: Results) -> None:
    """Inside of a forward, FSDP2 has gathered the parameter of the head; outside, it is a DTensor of both axes."""
    if precision == "bfloat16" and not inside:
        alone = mesh_ranks.fsdp_alone(torch.bfloat16, torch.float32)
    else:
        alone = mesh_ranks.fsdp_alone(PRECISIONS[precision].param_dtype or torch.float32)
    results = [rank[f"fsdp {inside} {precision}"] for rank in ranks]
    assert torch.equal(results[0]["loss"], results[1]["loss"]) and torch.equal(results[2]["loss"], results[3]["loss"])
    slack = 1e-6 if precision == "float32" else 2**-7
    torch.testing.assert_close(results[0]["loss"] + results[2]["loss"], alone["loss"], rtol=slack, atol=slack / 10)
    for name in ("layer.weight", "head.weight"):
        error = (results[0][name] - alone[name]).norm() / alone[name].norm()
        assert error < slack, (name, error)


ERRORS = {
    "replicated": "ValueError: weight has placement R on dimension 'tensor' of its device mesh, which is "
                  "process_group, expected S(0)",
    "columns": "ValueError: weight has placement S(1) on dimension 'tensor'",
    "another group": "ValueError: weight has a device mesh with ranks [0, 1, 2, 3], expected a dimension with the "
                     "ranks of process_group, [",
    "two dimensions": "ValueError: process_group is a mesh of 2 dimensions",
    "partial": "ValueError: weight has placement P(sum) on dimension 'data'",
    "features": "ValueError: hidden has placement S(2) on dimension 'data' of its device mesh, expected Replicate",
    "into": "ValueError: grad_accumulation_into is given with a head of DTensors, expected None",
    "descending": "ValueError: weight has a device mesh with ranks [3, 2, 1, 0], expected the order of the ranks in "
                  "process_group, [0, 1, 2, 3]",
}


@pytest.mark.parametrize("name", ERRORS)
def test_placements_that_cannot_be_used_are_refused(name: str, ranks: Results) -> None:
    for rank in ranks:
        assert rank[f"error {name}"].startswith(ERRORS[name]), rank[f"error {name}"]


def test_logits_of_a_gathered_head(ranks: Results) -> None:
    case = make("bias")
    expected = linear_logits(case["hidden"], case["weight"], bias=case["bias"])
    assert all(torch.equal(rank["logits"], expected) for rank in ranks)

"""On a GPU: the fused GRPO step by its operator, in place and out of place, by every way to cut a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu import launches
from gpu.step import CLUSTERS, loss_by_operator, step, tile_of
from gpu_cases import (
    DEVICE,
    LOGITS,
    REHEARSAL,
    assert_as_good,
    double,
    ids_of,
    leaves_of,
    logits_of,
    needs_device,
    needs_gpu,
    on_device,
    ours,
    size,
)
from torch import Tensor

import r1kernels
from r1kernels import _library, objectives
from r1kernels.ops import grpo_step

NO_KERNEL = "a rehearsal without the emulator: a CPU has no kernel of the fused step"
pytestmark = [*needs_gpu, pytest.mark.skipif(REHEARSAL and not _library.EMULATED, reason=NO_KERNEL)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REAL, ALIGNED = size(151_936, 1_031), size(151_936, 1_032)
B, T = size(8, 2), size(64, 3)
REPEATS = size(100, 3)


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with ours("cuda"):
        yield


def inputs_of(
    dtype: torch.dtype = torch.bfloat16, vocab: int = REAL, shape: tuple[int, int] = (B, T)
) -> dict[str, Any]:
    logits, ids = logits_of(*shape, vocab, dtype=dtype), ids_of(*shape, vocab=vocab)
    logprobs = r1kernels.token_logprobs(logits, ids)
    return {
        "logits": logits, "token_ids": ids, "advantages": on_device(shape[0], seed=2).sign() * 1.5,
        "old_logprobs": logprobs + on_device(*shape, seed=3).sign() * 0.05, "mask": on_device(*shape, seed=5) > -1,
        # Gradients of the size of the logits: float16 has no numbers for those of a mean.
        "normalizer": torch.tensor(1.0, device=DEVICE),
    }


def loss_and_gradient(inputs: dict[str, Any]) -> list[Tensor]:
    """By the reference."""
    given = leaves_of(inputs, ("logits",))
    with r1kernels.backend("reference"):
        loss = r1kernels.grpo_loss(**given).loss
    return [loss.detach(), *torch.autograd.grad(loss, given["logits"])]


def assert_right(inputs: dict[str, Any], **how: Any) -> None:
    loss, *_, grad = step(inputs, **how)
    expected, plain = loss_and_gradient(double(inputs)), loss_and_gradient(inputs)
    assert_as_good(loss, expected[0], plain[0], near=LOGITS * inputs["mask"].sum().item())
    assert_as_good(grad, expected[1], plain[1])


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for value, true in zip(found, expected, strict=True):
        assert torch.equal(value, true), f"off by {(value.double() - true.double()).abs().max()}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [REAL, size(50_257, 517), size(32_000, 512), size(262_144, 2_048), 7])
def test_loss_and_gradient(vocab: int, dtype: torch.dtype) -> None:
    assert_right(inputs_of(dtype, vocab))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [size(4_096, 256), size(32_000, 512), REAL])
def test_every_cluster_that_fits(vocab: int, dtype: torch.dtype) -> None:
    inputs = inputs_of(dtype, vocab)
    right = []
    for cluster in CLUSTERS:
        try:
            step(inputs, tile=tile_of(cluster))
        except RuntimeError as error:
            if "does not fit" not in str(error):
                raise
            continue
        assert_right(inputs, tile=tile_of(cluster))
        right.append(cluster)
    print(f"clusters that hold a row of {vocab} {dtype}: {right} of {CLUSTERS}")
    assert right


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [size(32_000, 512), REAL])
def test_the_operator_launches_its_own_kernel(vocab: int, dtype: torch.dtype) -> None:
    """And does not work in passes, which give the same results from two reads of the logits."""
    inputs = inputs_of(dtype, vocab)
    tile = grpo_step.chosen_tile(inputs["logits"])
    assert tile.clusters > 0 and tile.passes == ""
    if not REHEARSAL:
        kernels = launches.launched(lambda: step(inputs))
        assert any(launches.KERNEL in name for name in kernels), kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [REAL, size(50_257, 517)])
def test_in_place_is_the_same(vocab: int, dtype: torch.dtype) -> None:
    inputs = inputs_of(dtype, vocab)
    expected = step(inputs, objectives.r1(kl_coef=0))
    work = inputs["logits"].clone()
    assert_same(step(inputs | {"logits": work}, objectives.r1(kl_coef=0), out=work), expected)


def test_repeats_are_bit_identical() -> None:
    inputs = inputs_of()
    first = step(inputs)
    for _ in range(REPEATS):
        assert_same(step(inputs), first)


def test_a_row_does_not_depend_on_its_batch() -> None:
    """Where every row begins at a multiple of 16 bytes: rows are cut there."""
    inputs = inputs_of(vocab=ALIGNED)
    whole = step(inputs, objectives.dapo())
    for rows in (slice(0, 1), slice(B - 1, B)):
        given = {name: value[rows] if value.dim() else value for name, value in inputs.items()}
        for found, expected in zip(step(given, objectives.dapo())[2:], whole[2:], strict=True):
            assert torch.equal(found, expected[rows])


def test_masked_rows_are_not_read() -> None:
    inputs = inputs_of()
    dirty = inputs | {"logits": torch.where(inputs["mask"][..., None], inputs["logits"], torch.nan)}
    assert_same(step(dirty), step(inputs))


def test_more_than_2_to_the_31_entries() -> None:
    tokens = size(16_384, 40)
    inputs = inputs_of(vocab=ALIGNED, shape=(size(32, 4), tokens // size(32, 4)))
    grad = step(inputs, objectives.dapo())[-1]
    for rows in (slice(0, 1), slice(-1, None)):
        few = {name: value[rows] if value.dim() else value for name, value in inputs.items()}
        assert_same(step(few, objectives.dapo())[-1:], (grad[rows],))


@needs_device
def test_a_captured_graph_replays_with_other_inputs() -> None:
    fixed = inputs_of()
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        step(fixed)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(fixed)
    for factor in (0.5, 2.0):
        fresh = fixed | {"logits": fixed["logits"] * factor}
        expected = step(fresh)
        fixed["logits"].copy_(fresh["logits"])
        graph.replay()
        torch.cuda.synchronize()
        assert_same(results, expected)


def test_the_operator_is_what_grpo_loss_runs() -> None:
    inputs = inputs_of()
    given = leaves_of(inputs, ("logits",))
    loss = r1kernels.grpo_loss(**given).loss
    by_operator = loss_by_operator()(**given)
    grads = [torch.autograd.grad(value, given["logits"])[0] for value in (loss, by_operator)]
    assert torch.equal(loss, by_operator) and torch.equal(*grads)

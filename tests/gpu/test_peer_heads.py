"""Heads of other libraries in the benchmarks: on the CPU, where they have a path for it, they give what torch gives."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import eager, heads, published
from gpu.cases import linear_policy_head
from gpu.heads import CROSS_ENTROPY_HEADS, POLICY_HEADS
from gpu.losses import distance, gradients
from gpu.setting import OURS, PRODUCTS, Head, Setting

from r1kernels.bench.eager import linear_cross_entropy
from r1kernels.bench.peers import COMPILED, named

SMALL = Setting(torch.device("cpu"), small=True, compiled=False)
ON_CPU = {
    "Liger scaled cross-entropy", "TRL chunked", "verl torch", "torch linear_cross_entropy",
    "torch linear_cross_entropy, chunks",
}


def loaded(load: Callable[[], Any]) -> Any:
    try:
        return load()
    except ImportError as error:
        pytest.skip(f"not installed: {error}")


@pytest.mark.filterwarnings("ignore")  # those of other libraries
@pytest.mark.parametrize("name", sorted(ON_CPU & set(POLICY_HEADS)))
def test_policy_heads_give_the_loss_of_torch(name: str) -> None:
    problem = linear_policy_head.make_problem(Head(32, 128, 1_024), SMALL)
    found = gradients(loaded(linear_policy_head.loss_of(POLICY_HEADS[name])), problem)
    exact = gradients(eager.linear_policy_loss, problem.double())
    for value, true in zip(found, exact, strict=True):
        assert distance(value, true) < 0.02


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(ON_CPU & set(CROSS_ENTROPY_HEADS)))
def test_cross_entropy_heads_give_the_loss_of_torch(name: str) -> None:
    head = loaded(CROSS_ENTROPY_HEADS[name])
    problem = linear_policy_head.make_problem(Head(32, 128, 1_024), SMALL)
    inputs = {"hidden": problem.inputs["hidden"].flatten(0, 1), "weight": problem.inputs["weight"],
              "targets": problem.inputs["token_ids"].flatten()}
    problem = problem._replace(inputs=inputs, rows=("hidden", "targets"))
    for value, true in zip(
        gradients(head, problem), gradients(linear_cross_entropy, problem.double()), strict=True
    ):
        assert distance(value, true) < 0.02


def test_packages_whose_init_fails_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "heavy_peer" / "kernels"
    inner.mkdir(parents=True)
    (inner.parent / "__init__.py").write_text("import no_such_library")
    (inner / "__init__.py").write_text("import no_such_library")
    (inner / "head.py").write_text("from . import other\nvalue = other.value")
    (inner / "other.py").write_text("value = 7")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        heads.without_init("heavy_peer", "heavy_peer.kernels")
        assert named("heavy_peer.kernels.head", "value") == 7
        with pytest.raises(ModuleNotFoundError, match="no_such_peer"):
            heads.without_init("no_such_peer")
    finally:
        for name in [name for name in sys.modules if name.startswith("heavy_peer")]:
            del sys.modules[name]
        importlib.invalidate_caches()


def test_published_figures_belong_to_candidates_that_are_measured() -> None:
    candidates = {OURS, PRODUCTS, COMPILED, *POLICY_HEADS, *CROSS_ENTROPY_HEADS}
    assert {figure.peer for figure in published.FIGURES} <= candidates
    rows = [
        {"op": "linear_cross_entropy", "case": "forward + backward", "shape": published.QUACK_SHAPE,
         "candidate": name, "median_us": us}
        for name, us in ((OURS, 8_000.0), ("QuACK", 7_900.0))
    ]
    (line,) = [line for line in published.table(rows).splitlines() if line.startswith("| QuACK")]
    assert "7.96 ms" in line and "7.90 ms" in line and "8.00 ms" in line
    assert published.table([]).count("not measured") == 2 * len(published.FIGURES)

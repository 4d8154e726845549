"""Measured tiles: what benchmarks/tune.py finds and writes, and how kernels look it up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import tune

from r1kernels.triton import tables

pytest.importorskip("triton", reason="tiles belong to kernels of Triton, which is not installed")


class Tile(NamedTuple):
    width: int


class FakeClock:
    host_s = None

    def seconds(self, run: Any, calls: int) -> float:
        return float(run()[0]) * 1e-6

    def peak_extra_bytes(self, run: Any) -> int:
        return 0


def module(
    times: dict[int, float], wrong: int | None = None, broken: int | None = None, exact: int | None = None
) -> Any:
    """Kernels that take so long with each tile; 8 is in use. One may be wrong, one fail, and one alone be exact."""
    made = SimpleNamespace(config=lambda *_: Tile(8), search_space=lambda device: [Tile(width) for width in times])

    def run() -> tuple[torch.Tensor, ...]:
        width = made.config((1, 2), torch.bfloat16, None).width
        if width == broken:
            raise RuntimeError("out of resource: shared memory")
        error = 1.0 if width == wrong else 1e-3 if exact not in (None, width) else 0.0
        return torch.tensor(times[width], dtype=torch.float16), torch.tensor(1.0 + error)

    def truth() -> tuple[torch.Tensor, ...]:
        return torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)

    made.workload = tune.Workload(run, truth)
    return made


def found(made: Any) -> int:
    return tune.fastest(made, made.workload, None, FakeClock())[0].width


def test_the_fastest_tile_that_is_right_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first result is the time, not a number to compare.
    monkeypatch.setattr(tune, "distance", lambda a, b: 0.0 if a.dtype == torch.float16 else float((a - b).abs()))
    times = {4: 90.0, 8: 100.0, 16: 95.0}
    assert found(module(times)) == 4
    assert found(module(times, wrong=4)) == 16
    assert found(module(times, wrong=4, broken=16)) == 8
    # A tile that differs from the one in use because it alone is exact is chosen.
    assert found(module({4: 90.0, 8: 100.0}, exact=4)) == 4
    assert found(module({4: 90.0, 8: 100.0}, exact=8)) == 8
    made = module(times)
    kept = made.config
    found(made)
    assert made.config is kept


def test_the_tile_in_use_stays_unless_another_is_faster_by_more_than_the_spread() -> None:
    assert found(module({4: 100.0, 8: 100.0, 16: 100.0})) == 8


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    tables._configs.cache_clear()
    yield tmp_path
    tables._configs.cache_clear()


def test_what_is_written_is_found_again(folder: Path) -> None:
    for driver, which, warps in (("580", "long", 16), ("581", "short", 4)):
        configs = {"token_stats": {"bfloat16": {which: {"num_warps": warps}}}}
        path = tune.write(folder, "NVIDIA H200", {"driver": driver}, configs)
    assert path.name == "nvidia-h200.json" and json.loads(path.read_text())["driver"] == "581"

    def look(
        op: str = "token_stats", name: str = "NVIDIA H200", dtype: torch.dtype = torch.bfloat16, size: int = 151_936
    ) -> Any:
        return tables.tuned(op, name, dtype, size)

    assert look() == {"num_warps": 16} and look(size=1000) == {"num_warps": 4}
    assert look(size=32_000) is look(dtype=torch.float32) is look("divergence") is look(name="NVIDIA B200") is None
    assert look(name="") is None
    look()["num_warps"] = 1  # what a caller does to its copy is its own affair
    assert look() == {"num_warps": 16}


def test_every_space_holds_what_its_config_can_be_made_of() -> None:
    from r1kernels.triton.common import Device

    for op, made in tune.spaces(None).items():
        space = list(made.search_space(Device("sm_90", 132, 32)))
        assert space and all(isinstance(tile, made.Config) for tile in space), op


def test_a_measured_tile_is_used(folder: Path) -> None:
    from r1kernels.triton import token_stats
    from r1kernels.triton.common import Device

    here, elsewhere = Device("sm_90", 132, 32, "Test"), Device("sm_90", 132, 32)
    tune.write(folder, "Test", {}, {"token_stats": {"bfloat16": {"long": {"num_warps": 16, "unroll": 1}}}})
    assert token_stats.config((8, 151_936), torch.bfloat16, here) == token_stats.Config(16, 1)
    default = token_stats.config((8, 151_936), torch.bfloat16, elsewhere)
    assert token_stats.config((8, 151_936), torch.float32, here) == default


def test_every_kernel_that_shares_a_config_is_forced_to_a_tile() -> None:
    from r1kernels.triton import token_stats, token_stats_backward

    kept = token_stats.config
    with tune.forced(token_stats, "tile"):
        assert token_stats.config() == token_stats_backward.config() == "tile"
    assert token_stats.config is token_stats_backward.config is kept


def test_variants_hold_the_tiles_of_every_vocabulary(folder: Path) -> None:
    from r1kernels.triton import token_stats, token_stats_backward
    from r1kernels.triton.common import Device

    here = Device("sm_90", 132, 32, "Test")
    tune.write(folder, "Test", {}, {"token_stats": {"bfloat16": {"long": {"num_warps": 16, "unroll": 1}}}})
    for made in (token_stats, token_stats_backward):
        before = list(made.variants(here._replace(name="")))
        more = [variant.options["num_warps"] for variant in made.variants(here)]
        added = 2 * len(token_stats.LAYOUTS)  # with and without more statistics
        assert len(more) == len(before) + added and more.count(16) == added


def test_tables_of_this_repository_name_their_device() -> None:
    for path in tables.FOLDER.glob("*.json"):
        content = json.loads(path.read_text())
        assert tables.file_name(content["device"]) == path.name and content["configs"]


def test_a_rehearsal_writes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["tune.py", "--device", "cpu", "--small", "--op", "token_stats", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(tune, "SECONDS_EACH", 0.01)
    assert tune.main() == 0
    (path,) = tmp_path.glob("*.json")
    assert set(json.loads(path.read_text())["configs"]["token_stats"]) == {"bfloat16", "float32"}

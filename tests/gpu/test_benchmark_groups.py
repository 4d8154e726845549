"""Groups of benchmark cases on the CPU: what is recorded, what goes on, and what the fused step launches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu import __main__ as command
from gpu import launches, records, report, sanitize, timing
from gpu.progress import Progress
from gpu.setting import OURS, Candidate, Case, Setting
from gpu.timing import Timed

from r1kernels.ops import grpo_step

SMALL = Setting(torch.device("cpu"), small=True, compiled=False)
HASH = "5678"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = records.environment
    monkeypatch.setattr(records, "environment", lambda device: environment(device, lambda: HASH))


def test_a_finished_case_is_not_begun_again(tmp_path: Path, hashed: None) -> None:
    first = next(iter(command.group_cases("ceilings", SMALL, lambda *_: None)))
    progress = Progress(tmp_path, "ceilings", HASH)
    progress.append("started", first.key)
    progress.append("finished", first.key, failed=False)
    assert command.run_group("ceilings", SMALL, tmp_path, 60) == 0
    rows = records.of_kind(records.read(tmp_path), "result")
    assert {row["candidate"] for row in rows} == {"h W^T", "dlogits W", "dlogits^T h"}
    assert all(row["kernels"] == HASH and row["median_us"] > 0 for row in rows)
    assert command.known_ceilings(tmp_path)["gemm"] > 0
    # The report is there without another command.
    assert "bfloat16 products" in (tmp_path / "report.md").read_text()


def test_out_of_time_starts_nothing(tmp_path: Path, hashed: None) -> None:
    assert command.run_group("ceilings", SMALL, tmp_path, -1) == command.OUT_OF_TIME
    assert records.of_kind(records.read(tmp_path), "started") == []


def test_a_group_that_is_stopped_goes_on_with_the_next_command(
    tmp_path: Path, hashed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM raises SystemExit, here while a peer is checked. Nobody is to blame, and every candidate runs again."""
    def stop() -> None:
        raise SystemExit(command.OUT_OF_TIME)

    works = {name: Candidate(Timed(lambda: None)) for name in (OURS, "peer")}
    stopping = Case("op", "case", "shape", torch.float32, works | {"peer": Candidate(Timed(lambda: None), stop)})
    monkeypatch.setitem(command.GROUPS, "rest", (lambda setting: iter([stopping]),))
    with pytest.raises(SystemExit):
        command.run_group("rest", SMALL, tmp_path, 60)
    monkeypatch.setitem(command.GROUPS, "rest", (lambda setting: iter([stopping._replace(candidates=works)]),))
    assert command.run_group("rest", SMALL, tmp_path, 60) == 0
    assert records.of_kind(records.read(tmp_path), "result") == []
    monkeypatch.setenv("R1KERNELS_GPU_COMMAND", "2")
    assert command.run_group("rest", SMALL, tmp_path, 60) == 0
    assert {row["candidate"] for row in records.of_kind(records.read(tmp_path), "result")} == {OURS, "peer"}


def test_inputs_that_cannot_be_made_are_an_error_row(
    tmp_path: Path, hashed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cases(setting: Setting) -> Any:
        raise RuntimeError("no room")
        yield

    monkeypatch.setattr(cases, "__module__", "gpu.cases.full")
    monkeypatch.setitem(command.GROUPS, "rest", (cases,))
    assert command.run_group("rest", SMALL, tmp_path, 60) == command.FAILED
    (found,) = records.of_kind(records.read(tmp_path), "result")
    assert found["op"] == "full" and found["error"] == "RuntimeError: no room"


def test_every_case_is_right_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.check_all(SMALL) == 0
    assert "all right" in capsys.readouterr().out


def test_the_sanitizer_runs_every_operation() -> None:
    assert sanitize.run(torch.device("cpu")) >= 15


# ---- launches of the fused step -------------------------------------------------------------------------------


def test_without_the_kernels_nothing_is_launched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launches.run(SMALL, tmp_path) == 0
    assert "nothing is launched" in capsys.readouterr().out and records.read(tmp_path) == []


def test_a_gpu_without_the_kernels_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage is then tried again by the next command."""
    on_gpu = SMALL._replace(device=torch.device("cuda"))
    monkeypatch.setattr(Setting, "fused_step", False)
    monkeypatch.setattr(command, "clock_of", lambda device: timing.HostClock())
    monkeypatch.setattr(records, "environment", lambda device: {"kernels": HASH})
    assert launches.run(on_gpu, tmp_path) == 1
    assert command.run_group("step", on_gpu, tmp_path, 60) == command.FAILED
    assert command.run_group("step", SMALL, tmp_path, 60) == 0


@pytest.mark.parametrize("slow, status", [(set(), 0), ({32_000}, 1), ({262_144}, 0)])
def test_passes_in_place_of_the_fused_kernel_are_said_aloud(
    slow: set[int], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def look(setting: Setting, vocab: int, dtype: torch.dtype) -> dict[str, Any]:
        kernel = "statistics_kernel" if vocab in slow else "void r1k::step_kernel<BFloat16>"
        tile = grpo_step.Tile(2, 3, 198, "too long" if vocab in slow else "")
        place = {"vocab": vocab, "dtype": str(dtype)[6:], "kernels": [kernel]}
        return {**place, **tile._asdict(), "fused": not tile.passes}

    monkeypatch.setattr(Setting, "fused_step", True)
    monkeypatch.setattr(launches, "look", look)
    monkeypatch.setattr(records, "kernels_hash", lambda: HASH)
    assert launches.run(SMALL._replace(small=False), tmp_path) == status
    said = capsys.readouterr().out
    assert ("V = 32000, bfloat16: launches step_kernel" in said) == (32_000 not in slow)
    assert said.count("DOES NOT launch step_kernel: too long; it launches statistics_kernel") == sum(
        vocab in slow for vocab, _ in launches.shapes(SMALL._replace(small=False))
    )
    records.append(tmp_path, "run", {"device": "NVIDIA X", "kernels": HASH})
    goals = {bar.name: bar.verdict for bar in report.write(tmp_path, plotted=False)}
    assert goals["V = 32,000 launches step_kernel (1: yes, 0: no)"] == ("missed" if 32_000 in slow else "met")
    assert "Launches of the fused step" in (tmp_path / "report.md").read_text()


def test_an_error_is_no_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(*_: Any) -> dict[str, Any]:
        raise RuntimeError("no memory")

    monkeypatch.setattr(Setting, "fused_step", True)
    monkeypatch.setattr(launches, "look", look)
    assert launches.run(SMALL._replace(small=False), tmp_path) == 1
    found = records.of_kind(records.read(tmp_path), "launch")
    assert found and all(row["error"] == "RuntimeError: no memory" and row["fused"] is False for row in found)


def test_the_names_of_kernels_come_from_the_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    class Profile:
        def __init__(self, activities: list[Any]) -> None:
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def events(self) -> list[Any]:
            kinds = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
            return [SimpleNamespace(name=name, device_type=kind)
                    for name, kind in zip(("step_kernel", "launch"), kinds, strict=True)]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert launches.launched(lambda: None) == ["step_kernel"]


def test_the_report_names_the_stages_of_every_command(tmp_path: Path) -> None:
    (tmp_path / report.STAGES).write_text("step\tcut off\t0\t1\nhead\tdone\t40\t1\nstep\tdone\t44\t2\n")
    assert report.stages(tmp_path) == ["* step: done, 44 s (command 2)", "* head: done, 40 s (command 1)"]

"""A whole run of `r1kernels bench`: what is saved, kept and said when something goes wrong."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_cases import SMALL, a_task, assert_document

from r1kernels import _origin
from r1kernels.bench import machine, run
from r1kernels.bench.tasks import OURS, Setting, Task


def wrong_values(x: Any) -> Any:
    return x * x * 1.01


def page_by(write_html: Callable[[dict[str, Any], Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another report in place of the one with pictures, which takes seconds."""
    report = types.ModuleType("report")
    report.write_html = write_html
    monkeypatch.setitem(sys.modules, "r1kernels.bench.report", report)


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[Setting], Iterator[Task]]]:
    """Two small cases in place of all."""
    page_by(lambda results, path: path.write_text(f"{len(results['rows'])} rows"), monkeypatch)
    found = {"first": lambda setting: iter([a_task(case="first")]), "last": lambda setting: iter([a_task(case="last")])}
    monkeypatch.setattr(run, "CASES", found)
    monkeypatch.setattr(run, "NAMES", tuple(found))
    return found


def document(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "bench.json").read_text())
    assert_document(found)
    return found


def test_when_the_time_is_used_up_the_rest_is_listed(cases: Any, tmp_path: Path) -> None:
    assert run.Run(SMALL, run.Options(tmp_path, seconds=1e-9)).go() == 0
    found = document(tmp_path)
    why = {entry["what"]: entry["why"] for entry in found["left_out"]}
    assert not found["rows"] and "--seconds 1e-09" in why["first"] and "--seconds 1e-09" in why["last"]


def test_an_interrupt_keeps_what_was_measured(cases: Any, tmp_path: Path) -> None:
    def interrupted(setting: Setting) -> Iterator[Task]:
        assert document(tmp_path)["rows"], "the first case is saved before the second one begins"
        raise KeyboardInterrupt
        yield

    cases["last"] = interrupted
    assert run.Run(SMALL, run.Options(tmp_path)).go() == 130
    found = document(tmp_path)
    assert {row["case"] for row in found["rows"]} == {"first"}
    assert {entry["what"]: entry["why"] for entry in found["left_out"]}["last"].startswith("interrupted")


def test_too_little_memory_for_ceilings_and_fidelity(
    cases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(setting: Setting, clock: Any) -> dict[str, Any]:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(run.ceilings, "measure", fails)
    monkeypatch.setattr(machine, "available_bytes", lambda device: 0)
    monkeypatch.setattr(run, "NAMES", ("first", "fidelity"))
    assert run.Run(SMALL, run.Options(tmp_path)).go() == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    why = {entry["what"].split(" (")[0]: entry["why"] for entry in found["left_out"]}
    assert "allocate" in why["ceilings"] and not found["rows"] and not found["fidelity"]
    assert {"all implementations", "fidelity, logits, float32", "fidelity, advantages"} <= set(why)


def test_a_wrong_result_of_ours_gives_status_1_and_is_not_saved(
    cases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases["last"] = lambda setting: iter([a_task(functions={OURS: wrong_values})])
    saving = run.Options(tmp_path, save_results=True)
    monkeypatch.setattr(_origin, "ROOT", tmp_path)
    monkeypatch.setattr(_origin, "sources_hash", lambda trainer: "0123456789abcdef")
    assert run.Run(SMALL, saving).go() == 1 and not list(tmp_path.glob("benchmarks/**/bench.json"))
    assert {row["case"] for row in document(tmp_path)["rows"]} == {"first"}


def test_results_of_a_source_tree(cases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_origin, "ROOT", tmp_path)
    monkeypatch.setattr(_origin, "sources_hash", lambda trainer: "0123456789abcdef")
    assert run.Run(SMALL, run.Options(tmp_path / "out", only=("last",), save_results=True)).go() == 0
    (saved,) = tmp_path.glob("benchmarks/results/*/bench.json")
    assert json.loads(saved.read_text()) == document(tmp_path / "out")
    found = document(tmp_path / "out")
    assert (tmp_path / "out" / "bench.html").read_text() == "2 rows"
    assert saved.parent.name == machine.folder_name(found["device"], found["instruction_set"])


def test_the_name_of_a_device_in_hyphens() -> None:
    name = machine.folder_name("Intel(R) Xeon(R) Processor, 2 threads", "avx512_bf16")
    assert name == "intel-r-xeon-r-processor-2-threads-avx512-bf16"


def test_a_page_that_fails_costs_no_numbers(cases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(results: dict[str, Any], path: Path) -> None:
        raise ValueError("no such font")

    page_by(fails, monkeypatch)
    assert run.Run(SMALL, run.Options(tmp_path)).go() == 0
    found = document(tmp_path)
    assert len(found["rows"]) == 4 and any("no such font" in entry["why"] for entry in found["left_out"])


def test_without_its_packages_the_page_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "r1kernels.bench.report", None)
    said = run.write_page({}, tmp_path / "page")
    assert "matplotlib" in said and "jinja2" in said


def test_earlier_results_are_renamed(cases: Any, tmp_path: Path) -> None:
    for number in range(3):
        assert run.Run(SMALL, run.Options(tmp_path)).go() == 0
        assert len(list(tmp_path.glob("bench-*.json"))) == len(list(tmp_path.glob("bench-*.html"))) == number
    assert len(document(tmp_path)["rows"]) == 4


def test_a_run_that_measures_nothing_keeps_earlier_results(
    cases: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.Run(SMALL, run.Options(tmp_path)).go() == 0
    before = (tmp_path / "bench.json").read_bytes()
    assert run.Run(SMALL, run.Options(tmp_path, seconds=1e-9)).go() == 0
    assert (tmp_path / "bench.json").read_bytes() == before and not list(tmp_path.glob("bench-*"))
    assert str(tmp_path / "bench.json") in capsys.readouterr().out.splitlines()[-1]


def test_the_last_line_counts_times_and_errors(
    cases: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "NAMES", ("fidelity",))
    monkeypatch.setattr(run.fidelity, "quantities", lambda setting: [("advantages", None, 0)])
    monkeypatch.setattr(run.Run, "errors_of", lambda self, name, make: [{
        "quantity": "advantage", "implementation": OURS, "nonfinite": 0, "max": 0.0, "mean": 0.0, "dtype": "float32",
        "shape": {"P": 8}, "quantiles": dict.fromkeys(("0.5", "0.9", "0.99", "0.999"), 0.0)}])
    assert run.Run(SMALL, run.Options(tmp_path)).go() == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "0 times" in last and "1 distributions" in last

"""`python -m r1kernels` says what is there, which implementation serves each operation, and why."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1kernels import __main__, _library
from r1kernels.__main__ import PUBLIC_OPS, report
from r1kernels._dispatch import OPS, TABLE
from r1kernels._schemas import CUDA_OPERATORS
from r1kernels.ops import grpo_step


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "r1kernels"], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_arguments_go_to_the_command() -> None:
    completed = subprocess.run([sys.executable, "-m", "r1kernels", "trian"], capture_output=True, text=True)
    assert completed.returncode == 2 and "train" in completed.stdout + completed.stderr
    assert "served by" not in completed.stdout


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with an extension that was built without CUDA."""
    monkeypatch.setattr(_library, "_cuda_missing", {"cuda": "built without CUDA"})


def test_the_page_says_what_became_of_cuda() -> None:
    """Where it was built, and no GPU is here, the page says both; elsewhere why it was not built."""
    (line,) = (line for line in report().splitlines() if line.startswith("CUDA "))
    architectures = _library.extension.cuda_architectures()
    assert all(architecture in line for architecture in architectures)
    assert architectures or "without CUDA" in line
    if not torch.cuda.is_available():
        assert _library.extension.cuda_missing(0) in line


def test_report_names_versions_instruction_set_and_every_operation() -> None:
    text = report()
    assert f"torch {torch.__version__}" in text
    assert f"{_library.extension.cpu_isa()} instruction set" in text
    for op in OPS:
        assert f"{op:<18}cpu     fp32 bf16 fp16  cpu" in text
    assert set(PUBLIC_OPS) == set(OPS)


def test_the_page_names_every_reason_for_another_kernel() -> None:
    lines = [line.strip() for line in report().splitlines()]
    rows = [servers for operation, servers in TABLE.items() if operation not in OPS]
    reasons = [reason for servers in rows for _, unless in servers for reason, _ in unless]
    assert reasons and all(reason in lines for reason in (*reasons, *grpo_step.PASSES.values()))
    told = {line.split()[0]: line for line in lines if " CUDA " in line}
    for op in OPS:
        assert ("has no kernel" in told[op]) == (op not in CUDA_OPERATORS)


def test_a_request_by_environment_is_shown() -> None:
    completed = run(R1KERNELS_BACKEND="reference")
    assert completed.returncode == 0, completed.stderr
    assert "R1KERNELS_BACKEND=reference" in completed.stdout
    assert "reference   requested" in completed.stdout


def test_an_unknown_backend_is_refused_by_name() -> None:
    completed = run(R1KERNELS_BACKEND="cudnn")
    assert completed.returncode != 0
    assert "R1KERNELS_BACKEND is 'cudnn', expected one of auto, reference, cpu, triton, cuda" in completed.stderr


def test_a_request_of_triton_without_a_gpu_is_an_error_of_every_row() -> None:
    completed = run(R1KERNELS_BACKEND="triton")
    assert completed.returncode == 0, completed.stderr
    for op in OPS:
        assert f"{op:<18}cpu     fp32 bf16 fp16  error       backend 'triton' was requested for a tensor on 'cpu': " \
            in completed.stdout


@pytest.mark.parametrize(
    ("capability", "served"),
    [
        ((9, 0), "triton      compiled when first used"),
        ((7, 5), "reference   a GPU is sm_75, expected sm_80 or newer"),
        (None, "reference   Triton is not installed; install it (`pip install 'triton>=3.6'`)"),
    ],
)
@pytest.mark.usefixtures("no_cuda")
def test_a_gpu_is_listed_with_what_serves_it(
    capability: tuple[int, int] | None, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_library, "_missing", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability or (9, 0))
    monkeypatch.setattr(__main__, "_products", list)
    if capability is None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    text = report()
    assert "cuda:0 (a GPU)" in text
    for op in OPS:
        assert f"{op:<18}cuda    fp32 bf16 fp16  {served}" in text


def test_a_missing_extension_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "extension", None)
    monkeypatch.setattr(_library, "extension_error", "No module named 'r1kernels._C'")
    text = report()
    assert "No module named 'r1kernels._C'" in text
    assert _library.HOW_TO_BUILD in text
    assert "reference   r1kernels._C is missing" in text


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The results folder of a source tree of its own, whose kernels have the hash 5678."""
    folder = tmp_path / "benchmarks" / "results"
    monkeypatch.setattr(__main__, "results_folder", lambda: folder)
    monkeypatch.setattr(__main__, "kernel_sources_hash", lambda: "5678")
    monkeypatch.setattr(__main__, "_csrc_tree", lambda root: "abcdef")
    monkeypatch.setattr(__main__, "cuda_sources_hash", lambda root: "9012")
    monkeypatch.setattr(__main__, "sources_hash", lambda trainer=False: "3456" + "78" * trainer)
    return folder


def said(report: str) -> dict[str, str]:
    lines = [line.removeprefix("results      ") for line in report.splitlines() if line.startswith("results ")]
    return {Path(path).name: age for path, age in (line.split(": ") for line in lines)}


def test_results_of_other_kernels_are_called_older(results: Path) -> None:
    contents = {
        "same.json": {"kernels": "5678"}, "older.json": {"kernels": "1234"}, "csrc.json": {"csrc_tree": "abcd"},
        "older_csrc.json": {"csrc_tree": "abce"}, "nothing.json": [1, 2], "newer.json": {},
    }
    (results / "some-device").mkdir(parents=True)
    for name, content in contents.items():
        (results / "some-device" / name).write_text(json.dumps(content))
    (results / "some-device" / "cut.json").write_text('{"kernels": ')
    (results / "aot.json").write_text(json.dumps({"sources": "1234"}))  # compiled, on no device
    (results / "bench.json").write_text(json.dumps({"format": 1, "sources": "3456"}))
    (results / "recipe.json").write_text(json.dumps({"format": 1, "sources": "345678"}))
    (results / "older_bench.json").write_text(json.dumps({"format": 1, "sources": "3457"}))
    (results / "ptxas.json").write_text(json.dumps({"cuda_sources": "9012"}))
    (results / "older_ptxas.json").write_text(json.dumps({"cuda_sources": "5678"}))
    unknown = "does not tell which kernels it measured"
    assert said(report()) == {
        "same.json": "of these kernels", "older.json": "older than the kernels", "csrc.json": "of these kernels",
        "older_csrc.json": "older than the kernels", "nothing.json": unknown, "newer.json": unknown,
        "cut.json": "is not JSON", "aot.json": "older than the kernels", "ptxas.json": "of these kernels",
        "older_ptxas.json": "older than the kernels", "bench.json": "of these kernels",
        "older_bench.json": "older than the kernels", "recipe.json": "of these kernels",
    }


def test_without_results_nothing_is_said_of_them(results: Path) -> None:
    assert "results" not in report()


def test_this_source_tree_tells_of_every_result_file() -> None:
    folder = __main__.results_folder()
    files = [*folder.glob("*.json"), *folder.glob("*/*.json")]
    lines = [line for line in report().splitlines() if line.startswith("results ")]
    assert files and len(lines) == len(files)


def test_without_git_results_of_the_extension_cannot_be_compared(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (results / "some-device").mkdir(parents=True)
    (results / "some-device" / "csrc.json").write_text('{"csrc_tree": "abcd"}')
    monkeypatch.setattr(__main__, "_csrc_tree", lambda root: "")
    assert said(report()) == {"csrc.json": "cannot be compared without git"}

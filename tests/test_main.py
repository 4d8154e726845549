"""`python -m r1kernels` says what is there, which implementation serves each operation, and why."""

import os
import subprocess
import sys

import pytest
import torch

from r1kernels import _library
from r1kernels.__main__ import PUBLIC_OPS, report


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "r1kernels"], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_report_names_versions_instruction_set_and_every_operation() -> None:
    text = report()
    assert f"torch {torch.__version__}" in text
    assert f"{_library.extension.cpu_isa()} instruction set" in text
    for op in _library.OPS:
        assert f"{op:<18}cpu     fp32 bf16 fp16  cpu" in text
    assert set(PUBLIC_OPS) == set(_library.OPS)


def test_a_request_by_environment_is_shown() -> None:
    completed = run(R1KERNELS_BACKEND="reference")
    assert completed.returncode == 0, completed.stderr
    assert "R1KERNELS_BACKEND=reference" in completed.stdout
    assert "reference   requested" in completed.stdout


def test_an_unknown_backend_is_refused_by_name() -> None:
    completed = run(R1KERNELS_BACKEND="cudnn")
    assert completed.returncode != 0
    assert "R1KERNELS_BACKEND is 'cudnn', expected one of auto, reference, cpu" in completed.stderr


def test_a_missing_extension_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "extension", None)
    monkeypatch.setattr(_library, "extension_error", "No module named 'r1kernels._C'")
    text = report()
    assert "No module named 'r1kernels._C'" in text
    assert _library.HOW_TO_BUILD in text
    assert "reference   r1kernels._C is missing" in text

"""setup.py: objects of earlier builds are used again, and the extension is always made of the present sources."""

import ctypes
import os
import time
from distutils.core import run_setup
from pathlib import Path
from typing import Any

import pytest
from backends import host_code
from setuptools import Distribution, Extension

pytestmark = host_code
ROOT = Path(__file__).resolve().parents[2]
SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() {{ return {}; }}'


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Builds an extension of one source in a folder, and returns its answer."""
    monkeypatch.setenv("R1KERNELS_CUDA", "0")
    monkeypatch.setenv("R1KERNELS_PORTABLE", "1")
    monkeypatch.chdir(ROOT)
    command = run_setup("setup.py", stop_after="init").cmdclass["build_ext"]
    monkeypatch.chdir(tmp_path)

    def answer(number: int) -> int:
        Path("small.cpp").write_text(SOURCE.format(number))
        building = command(Distribution({"name": "small", "ext_modules": [Extension("small", ["small.cpp"])]}))
        building.ensure_finalized()
        building.run()
        [library] = Path(building.build_lib).glob("small*.so")
        copy = Path(f"copy-{time.monotonic_ns()}.so")  # a library of the same name would not be loaded again
        copy.write_bytes(library.read_bytes())
        return ctypes.CDLL(str(copy.resolve())).answer()

    return answer


def test_a_change_back_is_built_from_the_objects_of_an_earlier_build(build: Any) -> None:
    assert build(1) == 1
    [first] = Path("build/cpu").iterdir()
    os.utime(first, (1, 1))
    assert build(2) == 2
    assert build(1) == 1
    assert len(list(Path("build/cpu").iterdir())) == 2
    assert first.stat().st_mtime == 1

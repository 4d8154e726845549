"""Triton compiles nothing anew for another size, stride, alignment or number, and nothing that `variants` lacks.

`triton_launches` calls the launchers in a process of its own and notes under which key Triton would look each
compilation up: a kernel, the type and specialisation of every argument, the value of every constant, and the options.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from once import once

import r1kernels
from r1kernels.triton import sources

ROOT = Path(r1kernels.__file__).parents[1]
SUPPORT = Path(__file__).parents[1] / "support"
ARCHES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    def make(folder: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
        environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                        "R1KERNELS_BACKEND": "auto"}
        command = (sys.executable, str(SUPPORT / "triton_launches.py"), str(folder / "launches.json"))
        completed = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert completed.returncode == 0, completed.stdout + completed.stderr

    return json.loads((once(tmp_path_factory, "launches", make) / "launches.json").read_text())


def test_every_launcher_is_called(launches: dict[str, Any]) -> None:
    """A launcher has the name of an operator, or of its module."""
    names = {name.removeprefix("r1kernels::").partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    defined = {
        name for path in sources.kernel_sources() if path.suffix == ".py"
        for name in re.findall(r"^def (\w+)\(", path.read_text(), re.MULTILINE) if name in names | {path.stem}
    }
    assert defined and sorted(defined) == launches["launchers"]


def test_other_values_compile_nothing(launches: dict[str, Any]) -> None:
    """With dtypes, optional tensors and codes of an objective fixed, after one call for each pair of layouts."""
    for launcher, runs in launches["steady"].items():
        for run in runs:
            assert run["first"], f"{launcher} launched nothing"
            assert not run["added"], f"{launcher}, settings {run['settings']}: {run['added']} beside {run['first']}"


@pytest.mark.parametrize("arch", ARCHES)
def test_every_launch_is_one_of_the_variants(launches: dict[str, Any], arch: str) -> None:
    for launcher, missing in launches["listed"][arch]["unlisted"].items():
        assert not missing, f"{launcher} on {arch}: variants lacks\n" + "\n".join(missing)


@pytest.mark.parametrize("arch", ARCHES)
def test_every_variant_is_launched(launches: dict[str, Any], arch: str) -> None:
    unused = launches["listed"][arch]["unused"]
    assert not unused, f"on {arch} no launch asks for\n" + "\n".join(unused)


def test_keys_of_a_kernel_that_specialises_differ(launches: dict[str, Any]) -> None:
    """Of two alignments and the counts 1, 7, 16, 2^40: what `common.kernel` turns off, and what these tests see."""
    assert len(launches["specialised"]) == 8

"""The launch code of the CUDA kernels on a stand-in for the runtime that knows what the toolkit's headers ask for.

The emulator replaces this code, so only this test and a device run it.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from backends import host_code

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
import nvcc  # noqa: E402

COMPILER, MISSING = nvcc.find()
pytestmark = [
    host_code,
    pytest.mark.skipif(COMPILER is None, reason=f"needs the headers of the CUDA toolkit: {MISSING}"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    program = tmp_path_factory.mktemp("launch") / "fake_runtime"
    headers = COMPILER.toolkit / "include"
    subprocess.run(
        ["g++", "-std=c++17", "-O0", "-I", ROOT / "csrc", "-isystem", headers,
         ROOT / "tests" / "support" / "fake_runtime.cpp", "-o", program],
        check=True,
    )
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()


def test_the_runtime_counts_clusters_of_every_size(lines: list[str]) -> None:
    """One block is a cluster, too: if it is refused, the fused step is never chosen for short rows."""
    counted = [line for line in lines if line.startswith("clusters of")]
    assert len(counted) == 6
    for line in counted:
        assert line.partition(": ")[2].strip() == "16", line


def test_every_launch_is_accepted(lines: list[str]) -> None:
    """A launch of single blocks has no cluster: devices before sm_90 know no such attribute."""
    assert [line for line in lines if not line.startswith("clusters of")] == [
        "launched without a cluster, 0 attributes",
        "launched with a cluster, 1 attributes",
        "launched with a cluster, 2 attributes",
        "launched without a cluster, 1 attributes",
    ]

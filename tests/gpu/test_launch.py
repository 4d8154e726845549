"""The launch code of the CUDA kernels on a stand-in for the runtime that knows what the toolkit's headers ask for.

The emulator replaces this code, so only this test and a device run it.
"""

import itertools
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
    objects = [each.path for each in nvcc.compile_all(COMPILER) if each.source.stem in ("grpo_step", "policy_loss")]
    subprocess.run(
        ["g++", "-std=c++17", "-O0", "-I", ROOT / "csrc", "-isystem", headers,
         ROOT / "tests" / "support" / "fake_runtime.cpp", *objects, "-lpthread", "-o", program],
        check=True,
    )
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()


def after(lines: list[str], beginning: str) -> list[str]:
    """The lines between the one that begins so and the next that is no launch."""
    [first] = [k for k, line in enumerate(lines) if line.startswith(beginning)]
    return list(itertools.takewhile(lambda line: line.startswith("launched"), lines[first + 1 :]))


def test_the_runtime_counts_clusters_of_every_size(lines: list[str]) -> None:
    """One block is a cluster, too: if it is refused, the fused step is never chosen for short rows."""
    counted = [line for line in lines if line.startswith("clusters of")]
    assert len(counted) == 6
    for line in counted:
        assert line.partition(": ")[2].strip() == "16", line


def test_every_launch_is_accepted(lines: list[str]) -> None:
    """A launch of single blocks has no cluster: devices before sm_90 know no such attribute."""
    assert not [line for line in lines if line.startswith("refused")]
    assert [line for line in lines if line.startswith("launched kernel")] == [
        "launched kernel: 7 blocks of 128 threads",
        "launched kernel: 16 blocks of 128 threads, clusters of 8",
        "launched kernel: 16 blocks of 128 threads, clusters of 4, overlap",
        "launched kernel: 7 blocks of 128 threads, cooperative",
    ]


@pytest.mark.parametrize(
    ("vocab", "cluster"), [(4096, 1), (32_000, 1), (50_257, 2), (128_256, 4), (151_936, 8), (262_144, 8)]
)
def test_the_step_is_one_kernel(lines: list[str], vocab: int, cluster: int) -> None:
    """On an H200, between a kernel that weighs tokens and one that adds up their losses; both see no logits."""
    weigh, step, loss = after(lines, f"step V {vocab} bfloat16")
    assert weigh == "launched weigh_kernel: 1 blocks of 192 threads"
    clusters = f", clusters of {cluster}" if cluster > 1 else ""
    assert step == f"launched step_kernel<BFloat16>: {8192 * cluster} blocks of 192 threads{clusters}, overlap"
    assert loss.startswith("launched policy_loss_kernel: ")


def test_sequences_are_weighed_one_by_one(lines: list[str]) -> None:
    assert after(lines, "step V 32000 float32")[0] == "launched weigh_kernel: 64 blocks of 192 threads"


def test_a_row_that_is_too_long_is_not_fused(lines: list[str]) -> None:
    assert "step V 262144 float32: clusters of 0, 0 blocks a processor, unfused 3" in lines
    assert not after(lines, "step V 262144 float32")

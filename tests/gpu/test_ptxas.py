"""What the CUDA kernels compile to for each kind of device: every kernel, its registers, the instructions meant.

No GPU is needed for that. `python benchmarks/ptxas.py` writes the table that is committed.
"""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import nvcc
import ptxas
import pytest

import r1kernels
from r1kernels.__main__ import cuda_sources_hash
from r1kernels.triton import sass

ROOT = Path(r1kernels.__file__).parents[1]
COMMITTED = ROOT / "benchmarks" / "results" / "ptxas.json"
REFRESH = "python benchmarks/ptxas.py benchmarks/results/ptxas.json"
COMPILER, WITHOUT = nvcc.find()
MACHINE_CODE = [name for name in nvcc.ARCHITECTURES if name.startswith("sm_")]
needs_nvcc = pytest.mark.skipif(COMPILER is None, reason=WITHOUT)
Row = dict[str, Any]


# ---- what the kernels compile to ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def objects() -> list[nvcc.Object]:
    return nvcc.compile_all(COMPILER, nvcc.ARCHITECTURES)


@pytest.fixture(scope="module")
def rows(objects: list[nvcc.Object]) -> list[Row]:
    return ptxas.rows_of(objects)


def declared() -> set[tuple[str, str]]:
    """(source, kernel) of all kernels, as the sources have them."""
    found = set()
    for source in nvcc.sources():
        text = re.sub(r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)", "", source.read_text())
        found |= {(source.name, name) for name in re.findall(r"__global__\s+void\s+(\w+)\s*\(", text)}
    return found


@needs_nvcc
@pytest.mark.parametrize("arch", MACHINE_CODE)
def test_every_kernel_is_compiled(rows: list[Row], arch: str) -> None:
    assert declared()
    assert declared() == {(row["source"], row["kernel"].partition("<")[0]) for row in rows if row["arch"] == arch}


@needs_nvcc
def test_nothing_is_spilled_on_sm_90a(rows: list[Row]) -> None:
    spilling = [row for row in rows if row["stack"] or any(row["spills"].values())]
    for row in spilling:
        print(row)
    assert not [row for row in spilling if row["arch"] == "sm_90a"]


@needs_nvcc
def test_the_committed_table_is_of_these_kernels(rows: list[Row]) -> None:
    assert COMMITTED.exists(), f"there is no table: {REFRESH}"
    committed = json.loads(COMMITTED.read_text())
    assert committed["cuda_sources"] == cuda_sources_hash(ROOT), f"kernels have changed: {REFRESH}"
    if committed["nvcc"] != COMPILER.version:
        pytest.skip(f"the table is of nvcc {committed['nvcc']}, this is {COMPILER.version}")
    assert committed["rows"] == rows, f"kernels compile to something else: {REFRESH}"


# ---- instructions -------------------------------------------------------------------------------------------

needs_cuobjdump = pytest.mark.skipif(
    COMPILER is None or sass.tool("cuobjdump") is None,
    reason=WITHOUT or "cuobjdump was not found; Triton's package has one",
)


@needs_cuobjdump
def test_the_committed_counts_are_of_these_kernels(objects: list[nvcc.Object]) -> None:
    committed = json.loads(COMMITTED.read_text())
    if committed["nvcc"] != COMPILER.version:
        pytest.skip(f"the table is of nvcc {committed['nvcc']}, this is {COMPILER.version}")
    counted = {name: counts for compiled in objects for name, counts in ptxas.loops_of(compiled).items()}
    assert committed["loops"] == counted, f"kernels compile to something else: {REFRESH}"


# Kernels, the most instructions that an entry may take on sm_90, and in how many of their loops.
LIMITS = [
    (r"token_stats.cu segment_kernel<(BFloat16|Float16|Product32), true>", 10, 1),
    (r"token_stats_backward.cu gradient_kernel<\w+, \w*Float16, true>", 8, 1),  # of a policy loss
    (r"token_stats_backward.cu gradient_kernel<\w+, \w*Float16, true>", 12, 2),  # with entropy
]


@pytest.mark.parametrize("name, limit, loops", LIMITS)
def test_main_loops_take_few_instructions(name: str, limit: float, loops: int) -> None:
    table = json.loads(COMMITTED.read_text())["loops"]
    counts = {kernel: counted for kernel, counted in table.items() if re.fullmatch(name, kernel)}
    assert counts
    for kernel, of_an_entry in counts.items():
        assert sum(count <= limit for count in of_an_entry) >= loops, (kernel, of_an_entry)


@pytest.mark.parametrize("dtype", ["BFloat16", "Float16"])
def test_the_fused_step_takes_few_instructions(dtype: str) -> None:
    """At most 18 for the sums and the gradient of an entry together, with and without entropy in the loss."""
    sums, last, with_entropy, policy = json.loads(COMMITTED.read_text())["loops"][f"grpo_step.cu step_kernel<{dtype}>"]
    assert policy < with_entropy and sums + with_entropy <= 18 and last + with_entropy <= 20.5


def dump(compiled: nvcc.Object, *options: str) -> str:
    tool = Path(sass.tool("cuobjdump"))
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}  # it calls nvdisasm
    command = [str(tool), *options, str(compiled.path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def instructions(compiled: nvcc.Object, arch: str) -> dict[str, str]:
    """The machine code of each kernel of an object."""
    parts = re.split(r"^\s*Function : (\w+)$", dump(compiled, "-sass", "-arch", arch), flags=re.MULTILINE)[1:]
    names = ptxas.readable(parts[::2])
    return {names[symbol]: code for symbol, code in zip(parts[::2], parts[1::2], strict=True)}


BULK_LOAD = r"\bUBLKCP\.S\.G\b"
# What hopper.cuh says to a cluster, which the emulator replaces: fences, stores to other blocks, barriers, waits.
CLUSTER = {
    r"\bFENCE\.VIEW\.ASYNC\b", r"\bSTAS\.128\b", r"\bSTAS\b(?!\.)", r"\bUCGABAR_ARV\b", r"\bUCGABAR_WAIT\b",
    r"\bACQBULK\b", r"\bSYNCS\.PHASECHK\.TRANS64\.TRYWAIT\b",
}
WIDE_LOAD, WIDE_STORE = r"\bLDG\.E\.(?:\w+\.)*128\b", r"\bSTG\.E\.(?:\w+\.)*128\b"
READS, WRITES = {WIDE_LOAD}, {WIDE_LOAD, WIDE_STORE}
# The instructions of kernels (patterns of their names) and the architectures that have them. Kernels of any alignment
# access one element at a time.
EXPECTED: dict[tuple[str, str], tuple[list[str], set[str]]] = {
    ("grpo_step.cu", r"step_kernel<\w+>"): (["sm_90a", "sm_100"], {BULK_LOAD, WIDE_STORE, *CLUSTER}),
    ("grpo_step.cu", "weigh_kernel"): (["sm_90a", "sm_100"], {r"\bPREEXIT\b"}),
    ("scaled.cu", r"scaled_kernel<\w+, \w+>"): (MACHINE_CODE, WRITES),
    ("token_stats.cu", r"segment_kernel<\w+, true>"): (MACHINE_CODE, READS),
    ("token_stats_backward.cu", r"gradient_kernel<\w+, \w+, true>"): (MACHINE_CODE, WRITES),
}


@needs_cuobjdump
@pytest.mark.parametrize("arch", MACHINE_CODE)
@pytest.mark.slow(reason="reads the machine code of all kernels")
def test_the_instructions_meant_are_there(objects: list[nvcc.Object], arch: str) -> None:
    sources = {compiled.source.name: compiled for compiled in objects}
    expected = [(file, name, patterns) for (file, name), (archs, patterns) in EXPECTED.items() if arch in archs]
    lacking = []
    for file, name, patterns in expected:
        kernels = {kernel: code for kernel, code in instructions(sources[file], arch).items()
                   if re.fullmatch(name, kernel)}
        assert kernels, f"{file} has no {name}"
        lacking += [(kernel, pattern) for kernel, code in kernels.items() for pattern in sorted(patterns)
                    if not re.search(pattern, code)]
    assert not lacking


@needs_cuobjdump
def test_objects_have_machine_code_and_ptx_in_compressed_form(objects: list[nvcc.Object]) -> None:
    for compiled in objects:
        listed = dump(compiled, "-lelf", "-lptx")
        assert re.findall(r"\.(sm_\w+)\.cubin", listed) == MACHINE_CODE
        assert re.findall(r"\.(sm_\w+)\.ptx", listed) == ["sm_90"]


# ---- what ptxas says ----------------------------------------------------------------------------------------

LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3r1k3gpu6kernelINS0_7Float16ELb1EEEvPKf' for 'sm_80'
ptxas info    : Function properties for _ZN3r1k3gpu6kernelINS0_7Float16ELb1EEEvPKf
    32 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 41 registers, used 1 barriers, 1024 bytes smem, 576 bytes cmem[0]
ptxas info    : Function properties for __internal_function
    16 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_Z5plainv' for 'sm_120'
ptxas info    : Function properties for _Z5plainv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 360 bytes cmem[0]
"""


def test_the_log_is_read() -> None:
    first, second = ptxas.rows_of_log("a.cu", LOG)
    assert first == {
        "source": "a.cu", "kernel": "_ZN3r1k3gpu6kernelINS0_7Float16ELb1EEEvPKf", "arch": "sm_80", "registers": 41,
        "spills": {"stores": 12, "loads": 12}, "stack": 48, "shared": 1024,
    }
    assert (second["arch"], second["registers"], second["stack"], second["shared"]) == ("sm_120", 8, 0, 0)
    assert ptxas.readable([first["kernel"], second["kernel"]]) == {
        first["kernel"]: "kernel<Float16, true>", second["kernel"]: "plain"
    }
    with pytest.raises(RuntimeError, match="did not say"):
        ptxas.rows_of_log("a.cu", "Compiling entry function '_Z5plainv' for 'sm_120'\n")

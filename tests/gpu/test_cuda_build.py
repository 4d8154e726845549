"""How the CUDA kernels are built, and what the extension says of them. No GPU is needed for that."""

import ast
import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import nvcc
import ptxas
import pytest
import torch

import r1kernels
from r1kernels import _library
from r1kernels._schemas import CUDA_OPERATORS

ROOT = Path(r1kernels.__file__).parents[1]
COMPILER, WITHOUT = nvcc.find()
needs_nvcc = pytest.mark.skipif(COMPILER is None, reason=WITHOUT)


# ---- which compiler, which architectures --------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH, alone, of a machine whose variables say nothing."""
    for name in ("NVCC", "CUDA_HOME", "R1KERNELS_CUDA", "R1KERNELS_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def make_nvcc(folder: Path, version: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nvcc"
    path.write_text(f'#!/bin/sh\necho "Cuda compilation tools, release 1.2, V{version}"\necho "#$ TOP={folder}/.."\n')
    path.chmod(0o755)
    return path


def test_the_compiler_is_the_one_named_or_else_on_path(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path = make_nvcc(machine, "13.0.88")
    assert nvcc.find() == (nvcc.Nvcc(str(on_path), "13.0.88", machine.parent), "")
    home = make_nvcc(machine / "home" / "bin", "12.8.1")
    monkeypatch.setenv("CUDA_HOME", str(machine / "home"))
    assert nvcc.find()[0] == nvcc.Nvcc(str(home), "12.8.1", machine / "home")
    monkeypatch.setenv("NVCC", str(make_nvcc(machine / "other", "13.1.0")))
    assert nvcc.find()[0].version == "13.1.0"


def test_without_a_compiler_it_is_said_why(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert nvcc.available() == (
        None, "nvcc was not found; install CUDA 12.8 or newer, or set CUDA_HOME, and build again"
    )
    monkeypatch.setenv("R1KERNELS_CUDA", "1")
    with pytest.raises(RuntimeError, match="R1KERNELS_CUDA=1 asks for CUDA, but nvcc was not found"):
        nvcc.available()
    make_nvcc(machine, "13.0.88")
    assert nvcc.available()[0] is not None
    monkeypatch.setenv("R1KERNELS_CUDA", "0")
    assert nvcc.available() == (None, "R1KERNELS_CUDA was 0 when it was built; build it again without that")
    monkeypatch.setenv("R1KERNELS_CUDA", "yes")
    with pytest.raises(ValueError, match="R1KERNELS_CUDA is 'yes', expected 0"):
        nvcc.available()


def test_an_old_compiler_and_another_program_are_refused(machine: Path) -> None:
    path = make_nvcc(machine, "12.6.20")
    assert nvcc.find() == (None, f"{path} is of CUDA 12.6; install 12.8 or newer, and build again")
    path.write_text("#!/bin/sh\necho something else\n")
    assert nvcc.find() == (None, f"{path} is no nvcc; set NVCC or CUDA_HOME, and build again")


def test_the_runtime_is_looked_for_in_the_toolkit(tmp_path: Path) -> None:
    compiler = nvcc.Nvcc("nvcc", "13.0.88", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"libcudart_static\.a is in none of"):
        nvcc.runtime_library(compiler)
    library = tmp_path / "targets" / "x86_64-linux" / "lib" / "libcudart_static.a"
    library.parent.mkdir(parents=True)
    library.touch()
    assert nvcc.runtime_library(compiler) == library


def test_architectures_can_be_restricted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("R1KERNELS_CUDA_ARCHS", raising=False)
    assert nvcc.architectures() == nvcc.ARCHITECTURES
    monkeypatch.setenv("R1KERNELS_CUDA_ARCHS", "90a; compute_90")
    assert nvcc.architectures() == ("sm_90a", "compute_90")
    assert "-gencode=arch=compute_90a,code=sm_90a" in nvcc.flags(nvcc.architectures())
    monkeypatch.setenv("R1KERNELS_CUDA_ARCHS", "wheel")
    assert nvcc.architectures() == nvcc.WHEEL_ARCHITECTURES
    assert set(nvcc.ARCHITECTURES) < set(nvcc.WHEEL_ARCHITECTURES)
    monkeypatch.setenv("R1KERNELS_CUDA_ARCHS", "9.0")
    with pytest.raises(ValueError, match=r"R1KERNELS_CUDA_ARCHS has 'sm_9\.0', expected names as sm_80"):
        nvcc.architectures()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree of its own: one.cu includes a header that includes another, two.cu nothing."""
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    (tmp_path / "csrc" / "common").mkdir()
    (folder / "one.cu").write_text('#include <cmath>\n#include "cuda/one.cuh"\n')
    (folder / "one.cuh").write_text('  # include "common/arithmetic.h"\n')
    (tmp_path / "csrc" / "common" / "arithmetic.h").write_text("// nothing\n")
    (folder / "two.cu").write_text("__global__ void kernel() {}\n")
    monkeypatch.setattr(nvcc, "ROOT", tmp_path)
    monkeypatch.setattr(nvcc, "OBJECTS", tmp_path / "build" / "cuda")
    return tmp_path


def test_objects_are_named_by_what_they_are_made_of(tree: Path) -> None:
    compiler = nvcc.Nvcc("nvcc", "13.0.88", tree)

    def names(compiler: nvcc.Nvcc, *archs: str) -> list[str]:
        sources = [tree / "csrc" / "cuda" / name for name in ("one.cu", "two.cu")]
        return [nvcc.object_of(source, compiler, archs).path.name for source in sources]

    before = names(compiler, "sm_80")
    (tree / "csrc" / "common" / "arithmetic.h").write_text("// something\n")
    after = names(compiler, "sm_80")
    assert after[0] != before[0] and after[1] == before[1]
    assert not set(after) & set(names(compiler, "sm_90a"))
    assert not set(after) & set(names(compiler._replace(version="13.1.0"), "sm_80"))
    assert after == names(compiler, "sm_80")


@needs_nvcc
def test_an_object_is_compiled_once(tree: Path) -> None:
    source = tree / "csrc" / "cuda" / "two.cu"
    first = nvcc.compile_source(source, COMPILER, ("sm_90a",))
    assert first.path.parent == tree / "build" / "cuda"
    assert [row["kernel"] for row in ptxas.rows_of([first])] == ["kernel"]
    made = first.path.stat().st_mtime_ns
    assert nvcc.compile_source(source, COMPILER, ("sm_90a",)) == first
    assert first.path.stat().st_mtime_ns == made
    source.write_text("__global__ void kernel() { nonsense(); }\n")
    with pytest.raises(RuntimeError, match=r"cannot compile csrc/cuda/two\.cu:(?s:.*)nonsense"):
        nvcc.compile_source(source, COMPILER, ("sm_90a",))
    assert {path.suffix for path in nvcc.OBJECTS.iterdir()} == {".o", ".log"}


# ---- what the extension says --------------------------------------------------------------------------------

extension = _library.extension


@needs_nvcc
@pytest.mark.skipif(os.environ.get("R1KERNELS_CUDA") == "0", reason="R1KERNELS_CUDA is 0")
@pytest.mark.skipif(extension is None, reason=_library.extension_error)
def test_the_extension_tells_its_architectures() -> None:
    assert tuple(extension.cuda_architectures()) == nvcc.architectures()


def test_every_binding_is_built() -> None:
    named = (ROOT / "setup.py").read_text()
    assert not [path.name for path in (ROOT / "csrc").glob("*.cpp") if f'"csrc/{path.name}"' not in named]


@pytest.mark.skipif(extension is None or not extension.cuda_architectures(), reason="built without CUDA")
def test_every_cuda_operator_has_a_kernel() -> None:
    lacking = [name for name in CUDA_OPERATORS
               if not torch._C._dispatch_has_kernel_for_dispatch_key(f"r1kernels_cuda::{name}", "CUDA")]
    assert not lacking


DRIVER = """
extern "C" int cuInit(unsigned) { return 0; }
extern "C" int cuDriverGetVersion(int* version) { *version = 12040; return 0; }
"""
ASK = "import torch; from r1kernels import _C; print(_C.cuda_missing(0))"


@pytest.mark.skipif(extension is None or not extension.cuda_architectures(), reason="built without CUDA")
def test_a_driver_that_is_too_old_is_named(tmp_path: Path) -> None:
    (tmp_path / "driver.cpp").write_text(DRIVER)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", "libcuda.so.1", "driver.cpp"], cwd=tmp_path, check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    completed = subprocess.run(
        [sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(
        r"the NVIDIA driver is one for CUDA 12\.4, too old for these kernels of CUDA 1\d\.\d; update it, or use Triton "
        r"\(pip install triton, R1KERNELS_BACKEND=triton\)\n",
        completed.stdout,
    )


@pytest.mark.skipif(extension is None, reason=_library.extension_error)
@pytest.mark.parametrize("index", (-1, 1000))
def test_a_device_that_is_not_there_is_named(index: int) -> None:
    missing = extension.cuda_missing(index)
    assert missing == f"there is no GPU {index}" or not extension.cuda_architectures()


MODULE = """
#include "cuda_methods.h"
#include "cuda/architectures.h"
static PyObject* serves(PyObject*, PyObject* args) {
  const char* architectures;
  int major, minor;
  if (!PyArg_ParseTuple(args, "sii", &architectures, &major, &minor)) return nullptr;
  return PyBool_FromLong(r1k::gpu::serves(architectures, major, minor));
}
static PyMethodDef methods[] = {{"cuda_architectures", r1k::cuda_architectures, METH_NOARGS, ""},
                                {"cuda_missing", r1k::cuda_missing, METH_O, ""},
                                {"serves", serves, METH_VARARGS, ""},
                                {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "without", nullptr, -1, methods, nullptr, nullptr, nullptr,
                             nullptr};
PyMODINIT_FUNC PyInit_without() { return PyModule_Create(&module); }
"""


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same methods in a module that is built without CUDA."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "module.cpp").write_text(MODULE)
    path = folder / "without.abi3.so"
    subprocess.run(
        ["g++", "-shared", "-fPIC", "-std=c++17", '-DR1K_WITHOUT_CUDA="nothing to build it with"', f"-I{ROOT}/csrc",
         f"-I{sysconfig.get_path('include')}", str(folder / "module.cpp"), str(ROOT / "csrc" / "cuda_methods.cpp"),
         "-o", str(path)],
        check=True,
    )
    loader = importlib.machinery.ExtensionFileLoader("without", str(path))
    spec = importlib.util.spec_from_file_location("without", path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_an_extension_without_cuda_says_so(without: Any) -> None:
    assert without.cuda_architectures() == []
    assert without.cuda_missing(0) == "built without CUDA: nothing to build it with"
    with pytest.raises(TypeError):
        without.cuda_missing("cuda:0")
    with pytest.raises(OverflowError):
        without.cuda_missing(2**80)
    with pytest.raises(OverflowError, match="device_index is 1099511627776"):
        without.cuda_missing(2**40)


@pytest.mark.parametrize(
    "architectures, capability, served",
    [
        ("sm_80", (8, 0), True), ("sm_80", (8, 6), True), ("sm_86", (8, 0), False), ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True), ("sm_100a", (10, 0), True), ("sm_100a", (10, 3), False), ("sm_120", (12, 1), True),
        ("compute_90", (10, 3), True), ("compute_90", (12, 0), True), ("compute_90", (8, 9), False),
        ("compute_90a", (10, 0), False), ("", (9, 0), False),
        ("sm_100f", (10, 0), True), ("sm_100f", (10, 3), True), ("sm_100f", (11, 0), False),
        ("sm_103f", (10, 0), False), ("compute_100f", (10, 3), True), ("compute_100f", (12, 0), False),
        ("sm_87", (8, 7), True), ("sm_87", (8, 9), False), ("compute_80", (8, 7), True), ("sm_100", (10, 1), False),
        *((" ".join(names), capability, served)
          for names in (nvcc.ARCHITECTURES, nvcc.WHEEL_ARCHITECTURES)
          for capability, served in (
              ((7, 5), False), ((8, 0), True), ((8, 6), True), ((8, 7), False), ((8, 9), True), ((9, 0), True),
              ((10, 0), True), ((10, 3), True), ((11, 0), True), ((12, 0), True), ((12, 1), True), ((13, 0), True),
          )),
    ],
)
def test_which_devices_a_build_serves(
    without: Any, architectures: str, capability: tuple[int, int], served: bool
) -> None:
    assert without.serves(architectures, *capability) is served


@pytest.mark.parametrize(
    "capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)], ids="{0[0]}.{0[1]}".format
)
def test_the_gpu_script_builds_for_its_device(without: Any, capability: tuple[int, int]) -> None:
    script = (ROOT / "benchmarks" / "run_on_gpu.sh").read_text()
    [named] = re.findall(r"print\(({.+?})\.get\(a, ", script)
    target = ast.literal_eval(named).get(capability[0], "{}{}".format(*capability))
    assert without.serves(f"sm_{target}", *capability)

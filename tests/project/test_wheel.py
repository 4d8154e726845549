"""One wheel for every Python >= 3.10, torch >= 2.10, with and without CUDA: made as by `make wheel`, and used.

`make wheel` builds it from the unpacked source distribution, so a file that the archive lacks fails here.
"""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import nvcc
import pytest
import release
import torch
from once import once

import r1kernels

ROOT = Path(__file__).resolve().parents[2]
PIP = ("-m", "pip", "--disable-pip-version-check")
LARGEST = 5_000_000  # bytes
OLDEST_TORCH = (2, 10)

PROGRAM = ROOT / "tests" / "support" / "use_wheel.py"


def run(*command: object, cwd: Path, **variables: str) -> str:
    own = ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in own} | variables
    completed = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the source distribution and the wheel."""
    environment = Path(sys.prefix)
    if not (environment / "base.stamp").exists():
        pytest.skip("wheels are made in the environment of `make`, and this is another")
    # The development build's architectures, unless others are asked for: its objects are there already.
    architectures = os.environ.get("R1KERNELS_CUDA_ARCHS", "")

    def make(dist: Path) -> None:
        run("make", "wheel", f"VENV={environment}", f"DIST={dist}", f"R1KERNELS_CUDA_ARCHS={architectures}", cwd=ROOT)

    return once(tmp_path_factory, "wheel", make)


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (wheel,) = dist.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def archive(dist: Path) -> Path:
    (archive,) = dist.glob("*.tar.gz")
    return archive


@pytest.mark.slow(reason="makes a wheel")
def test_the_wheel_serves_every_python_and_many_linuxes(wheel: Path) -> None:
    assert re.fullmatch(r"r1kernels-[\d.]+-cp310-abi3-manylinux_2_28_\w+\.whl", wheel.name)
    assert wheel.stat().st_size < LARGEST


@pytest.mark.slow(reason="makes a wheel")
def test_the_wheel_holds_the_package_and_no_library_of_others(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"r1kernels/_C.abi3.so", "r1kernels/py.typed", "r1kernels/tables/cuda_faster.json"} <= set(names)
    assert [name for name in names if ".so" in name] == ["r1kernels/_C.abi3.so"]
    assert all(name.startswith(("r1kernels/", "r1kernels-")) for name in names)


# ---- torch's stable interface -------------------------------------------------------------------------------


def declared(header: str, newest: tuple[int, int]) -> set[str]:
    """The functions of a header of torch's C interface that this version of torch has."""
    names: set[str] = set()
    newer: list[bool] = []  # of each open condition
    for line in header.splitlines():
        if condition := re.match(r"\s*#\s*if(.*)", line):
            since = re.search(r"TORCH_FEATURE_VERSION >= TORCH_VERSION_(\d+)_(\d+)", condition[1])
            newer.append(since is not None and (int(since[1]), int(since[2])) > newest)
        elif re.match(r"\s*#\s*endif", line):
            newer.pop()
        elif not any(newer):
            names |= set(re.findall(r"\b(?:aoti_)?torch_\w+(?=\()", line))
    return names


def test_functions_of_newer_versions_are_told_apart() -> None:
    header = """
        #ifdef USE_CUDA
        int torch_old(int a);
        #endif // USE_CUDA
        #if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_10_0
        int aoti_torch_of_its_age();
        #endif
        #if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_11_0
        #ifdef USE_CUDA
        int torch_newer();
        #endif
        #endif
    """
    assert declared(header, (2, 10)) == {"torch_old", "aoti_torch_of_its_age"}
    assert "torch_newer" in declared(header, (2, 11))


@pytest.mark.slow(reason="makes a wheel")
def test_the_extension_asks_torch_for_nothing_that_its_oldest_version_lacks(wheel: Path, tmp_path: Path) -> None:
    extension = zipfile.ZipFile(wheel).extract("r1kernels/_C.abi3.so", tmp_path)
    wanted = {line.split()[-1] for line in run("nm", "-D", "--undefined-only", extension, cwd=tmp_path).splitlines()}
    of_torch = {name for name in wanted if re.match(r"(aoti_)?torch_", name)}
    assert "torch_library_impl" in of_torch
    include = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    headers = [include / "stable" / "c" / "shim.h", include / "inductor" / "aoti_torch" / "c" / "shim.h"]
    assert not of_torch - set().union(*(declared(path.read_text(), OLDEST_TORCH) for path in headers))
    unstable = re.compile(r"_Z\w*(?:2at|3c10|5torch|5caffe2)")
    assert not [name for name in wanted if unstable.match(name)]
    assert not [name for name in wanted if name.startswith(("cuda", "cu"))]


# ---- installed elsewhere ------------------------------------------------------------------------------------


def cpu_versions() -> list[str]:
    """The CPU builds of other versions of torch that the registry has: a few hundred MB, others bring all of CUDA."""
    listed = run(sys.executable, *PIP, "index", "versions", "torch", cwd=ROOT)
    found = re.findall(r"\b(\d+)\.(\d+)\.(\d+)\+cpu\b", listed)
    versions = [".".join(version) + "+cpu" for version in found if (int(version[0]), int(version[1])) >= OLDEST_TORCH]
    return [version for version in dict.fromkeys(versions) if version != torch.__version__]


def install(wheel: Path, folder: Path, *options: object) -> Path:
    """The Python of a new environment in which a wheel is installed."""
    run(sys.executable, "-m", "venv", folder / "environment", cwd=folder)
    python = folder / "environment" / "bin" / "python"
    run(python, *PIP, "install", "--quiet", *options, wheel, cwd=folder)
    return python


@pytest.mark.slow(reason="makes a wheel")
def test_the_wheel_is_used_from_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    """In an environment that finds torch, and what torch needs, in this one."""
    python = install(wheel, tmp_path, "--no-deps")
    (packages,) = python.parents[1].glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(str(Path(torch.__file__).parents[1]))
    first = run(python, "-m", "r1kernels", cwd=tmp_path).splitlines()[0]
    installed = run(python, "-c", "import importlib.metadata as m; print(m.version('r1kernels'))", cwd=tmp_path).strip()
    assert first.split()[:2] == ["r1kernels", installed] and wheel.name.split("-")[1] == installed
    _, architectures, missing = run(python, PROGRAM, cwd=tmp_path).splitlines()
    compiler, why = nvcc.available()
    if compiler is None:
        assert not architectures
        assert missing == f"built without CUDA: {why}"
    else:
        assert tuple(architectures.split()) == nvcc.architectures()
        assert missing == "" or "driver" in missing or "sm_" in missing


@pytest.mark.slow(reason="makes a wheel")
def test_the_wheel_is_used_with_another_torch_than_it_was_built_with(
    wheel: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The oldest CPU build that the registry has, installed with all that the wheel needs."""
    if not request.config.getoption("--full"):
        pytest.skip("with --full only: it installs another torch, hundreds of MB")
    if not (versions := cpu_versions()):
        pytest.skip(f"the registry has no CPU build of torch but {torch.__version__}")
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("torch==")]
    (tmp_path / "constraints.txt").write_text("\n".join([*pins, f"torch=={versions[-1]}"]))
    python = install(wheel, tmp_path, "-c", tmp_path / "constraints.txt")
    assert run(python, PROGRAM, cwd=tmp_path).splitlines()[0] == versions[-1]


# ---- the two files themselves -------------------------------------------------------------------------------


@pytest.mark.slow(reason="makes a wheel")
def test_the_metadata_is_what_an_index_takes(wheel: Path, archive: Path) -> None:
    assert release.built(wheel.parent) == (archive, wheel)
    assert release.wrong_metadata(archive, wheel, r1kernels.__version__) == []


@pytest.mark.slow(reason="makes a wheel")
def test_the_source_distribution_holds_what_the_build_reads_and_no_binary(archive: Path) -> None:
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".pyc"}
    assert {"setup.py", "pyproject.toml", "LICENSE", "CHANGELOG.md", "CITATION.cff", *files} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]
    assert not [name for name in names if name.startswith(("tests/", "build/"))]


@pytest.mark.slow(reason="makes a wheel")
def test_a_clean_environment_builds_the_source_distribution(
    archive: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The registry has all that the build needs, at the versions of constraints.txt. No earlier object is used."""
    if not request.config.getoption("--full"):
        pytest.skip("with --full only: it installs torch, hundreds of MB, and compiles the whole extension")
    wheels = tmp_path / "wheels"
    environment = {"PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "R1KERNELS_CUDA": "0"}
    run(sys.executable, *PIP, "wheel", "--no-deps", "--wheel-dir", wheels, archive, cwd=tmp_path, **environment)
    (wheel,) = wheels.glob("*.whl")
    assert re.fullmatch(r"r1kernels-[\d.]+-cp310-abi3-linux_\w+\.whl", wheel.name)
    assert "r1kernels/_C.abi3.so" in zipfile.ZipFile(wheel).namelist()

"""Compiles a C++ source of the tests to a Python module, by ninja, once for each content of what it includes.

Each variant has a namespace of its own in the place of `r1k`: pybind11 knows types by name, those of all modules.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
from once import locked

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "host-modules"
FLAGS = ("-std=c++17", "-O1", "-fno-math-errno", "-fvisibility=hidden", "-fPIC", "-Wall", "-Wextra", "-Werror")
NINJA = """\
cxx = {compiler}
flags = {flags}
rule module
  command = $cxx $flags -shared -DR1K_MODULE=$name -Dr1k=$name $variant $in -o $out
"""
EDGE = """\
build {name}.so: module {source}
  name = {name}
  variant = {flags}
"""


def variants() -> dict[str, str]:
    """Compiler flags by name. With fused multiply-adds the compiler is free to contract a b + c."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"baseline": "", "fused": "-ffp-contract=fast"}
    cpuinfo = Path("/proc/cpuinfo")
    fused = cpuinfo.exists() and " fma " in cpuinfo.read_text().partition("\n\n")[0].replace("\n", " ") + " "
    return {"baseline": ""} | ({"fused": "-mfma -mavx2 -ffp-contract=fast"} if fused else {})


def missing() -> str:
    """What the build needs and is not here."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "the headers of Python are not installed"
    absent = [name for name in ("pybind11", "ninja") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)}: not installed, the extra `dev` has them" if absent else ""


def load(source: Path, headers: list[Path]) -> dict[str, ModuleType]:
    """A module for each of `variants`. Skips the test where the build cannot be done at all."""
    if why := missing():
        pytest.skip(why)
    import ninja
    import pybind11

    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    content = [sys.version, pybind11.__version__, compiler, *FLAGS, *variants().values(), NINJA]
    content += [path.read_text() for path in (source, *headers)]
    folder = BUILD / hashlib.sha256("\0".join(content).encode()).hexdigest()[:16]
    names = {variant: f"{source.stem}_{variant}" for variant in variants()}
    include = [f"-I{ROOT / 'csrc'}", f"-isystem {sysconfig.get_path('include')}", f"-isystem {pybind11.get_include()}"]
    edges = [EDGE.format(name=names[variant], source=source, flags=flags) for variant, flags in variants().items()]
    rules = NINJA.format(compiler=shutil.which("g++"), flags=" ".join((*FLAGS, *include)))
    with locked(folder / "lock"):
        (folder / "build.ninja").write_text(rules + "".join(edges))
        completed = subprocess.run(
            [Path(ninja.BIN_DIR) / "ninja", "-C", folder, "-j2"], capture_output=True, text=True
        )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return {variant: _import(name, folder / f"{name}.so") for variant, name in names.items()}


@functools.cache
def common() -> dict[str, ModuleType]:
    """csrc/common, by variant."""
    return load(Path(__file__).parent / "common_arithmetic.cpp", sorted((ROOT / "csrc" / "common").glob("*.h")))


def _import(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

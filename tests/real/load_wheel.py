"""Installs a wheel in new environments and uses it on the CPU: beside versions of torch, and on versions of Python.

    python load_wheel.py WHEEL [--torch VERSION ...] [--python PYTHON ...]

A version of torch may bring all of CUDA, about 5 GB. On a Python other than this one, only a CPU build of torch is
installed, if the registry has one. If it has none, the wheel is tested there without torch: the package is imported and
compiled to bytecode, the extension is loaded beside the libraries of this Python's torch, the commands show their help,
and the tests of the rewards run. Environments are deleted afterwards. The last lines say what ran where.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
TORCH_VERSIONS = ("2.13.0+cpu", "2.14.1")  # the oldest and the newest that were at hand
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
COMMANDS = ("tyro",)  # what `r1kernels --help` needs


def find(version: str) -> str | None:
    """The Python of a version: on the path, or among those of pyenv."""
    of_pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for path in (shutil.which(f"python{version}"), *of_pyenv):
        if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return str(path)
    return None


def run(*command: object, cwd: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([str(part) for part in command], cwd=cwd, env=environment, check=True)


def new_environment(python: str, folder: str) -> str:
    run(python, "-m", "venv", f"{folder}/environment", cwd=folder)
    return f"{folder}/environment/bin/python"


def pip(python: str, *arguments: object, folder: str) -> None:
    run(python, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-cache-dir", *arguments, cwd=folder)


def requirements(wheel: Path, extra: str) -> list[str]:
    """What an extra of the wheel asks for."""
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [name for name in opened.namelist() if name.endswith(".dist-info/METADATA")]
        lines = HeaderParser().parsestr(opened.read(name).decode()).get_all("Requires-Dist", [])
    found = [line.partition(";") for line in lines]
    return [name.strip() for name, _, condition in found if re.search(rf"extra == .{extra}.$", condition)]


def has_cpu_build(python: str, folder: str) -> bool:
    """Whether the registry has the first of `TORCH_VERSIONS`, a CPU build, for a Python."""
    download = [python, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
    command = [*download, "--only-binary", ":all:", f"torch=={TORCH_VERSIONS[0]}"]
    return subprocess.run(command, cwd=folder, capture_output=True).returncode == 0


def with_torch(wheel: Path, python: str, version: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        python = new_environment(python, folder)
        pip(python, f"torch=={version}", "numpy", wheel, folder=folder)
        for command in ([SUPPORT / "use_wheel.py"], ["-m", "r1kernels"], ["-W", "error", "-m", "compileall", "-q", "-f",
                        *Path(folder).glob("environment/lib/python*/site-packages/r1kernels")]):
            run(python, *command, cwd=folder)
    return f"torch {version}: losses and gradients as plain PyTorch's, `python -m r1kernels`, all modules compiled"


def without_torch(wheel: Path, python: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        if has_cpu_build(python, folder):
            return with_torch(wheel, python, TORCH_VERSIONS[0])
        python = new_environment(python, folder)
        pip(python, *requirements(wheel, "rewards"), *COMMANDS, "numpy", "pytest", folder=folder)
        pip(python, "--no-deps", wheel, folder=folder)
        libraries = Path(torch.__file__).parent / "lib"
        run(python, "-W", "error", SUPPORT / "use_wheel_without_torch.py", libraries, cwd=folder)
        (package,) = Path(folder).glob("environment/lib/python*/site-packages/r1kernels")
        run(python, "-W", "error", "-m", "compileall", "-q", "-f", package, cwd=folder)
        for command in ("", "train", "plan"):
            run(f"{folder}/environment/bin/r1kernels", *command.split(), "--help", cwd=folder)
        # conftest.py is for tests that use torch.
        run(python, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml",
            "--rootdir", folder, ROOT / "tests" / "rewards", cwd=folder)
    return "no CPU build of torch: extension loaded, tests of the rewards, commands' help, all modules compiled"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", nargs="*", default=TORCH_VERSIONS)
    parser.add_argument("--python", nargs="*", default=PYTHONS)
    options = parser.parse_args()
    wheel, this = options.wheel.resolve(), f"{sys.version_info.major}.{sys.version_info.minor}"
    said = []
    for version in options.python:
        print(f"---- Python {version}", flush=True)
        if version == this:
            said += [f"Python {version}, {with_torch(wheel, sys.executable, chosen)}" for chosen in options.torch]
        elif (python := find(version)) is None:
            said.append(f"Python {version} is not on this machine: not tested")
        else:
            said.append(f"Python {version}, {without_torch(wheel, python)}")
    print(f"---- {wheel.name}, built with torch {importlib.metadata.version('torch')}", *said, sep="\n")


if __name__ == "__main__":
    main()

"""How this folder is compiled: plain nvcc, one fat object for each .cu, kept until what it is made of changes.

setup.py links the objects into r1kernels._C; benchmarks/ptxas.py and the tests read what ptxas said of the kernels.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = ROOT / "build" / "cuda"

# Machine code for A100 and other sm_8x, H100, B200 and B300, RTX 50; PTX that a driver compiles for every later device.
# It is Hopper's, not Ampere's, so that those have clusters and bulk copies as well. Code for sm_100a would not run on a
# B300.
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120", "compute_90")
# A wheel also has code for sm_86 (RTX 30, A40), where that of sm_80 runs too. For these kernels, sm_89 gives nearly the
# same code as sm_86, and sm_100f (B200 and B300) the same as sm_100.
WHEEL_ARCHITECTURES = ("sm_80", "sm_86", *ARCHITECTURES[1:])
OLDEST = (12, 8)  # the first nvcc that knows all of them
FLAGS = (
    "-O3", "-std=c++17", "-Icsrc", "-Xptxas=-v", "-Xfatbin=-compress-all",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
)


class Nvcc(NamedTuple):
    path: str
    version: str  # "13.0.88"
    toolkit: Path


class Object(NamedTuple):
    source: Path
    path: Path

    @property
    def log(self) -> Path:
        """What nvcc and ptxas said of it."""
        return self.path.with_suffix(".log")


# ---- which compiler, which architectures -------------------------------------------------------------------


def available() -> tuple[Nvcc | None, str]:
    """The compiler, or why the extension is built without CUDA."""
    wanted = os.environ.get("R1KERNELS_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"R1KERNELS_CUDA is {wanted!r}, expected 0 (without CUDA), 1 (with CUDA) or nothing")
    if wanted == "0":
        return None, "R1KERNELS_CUDA was 0 when it was built; build it again without that"
    nvcc, reason = find()
    if nvcc is None and wanted == "1":
        raise RuntimeError(f"R1KERNELS_CUDA=1 asks for CUDA, but {reason}")
    return nvcc, reason


def find() -> tuple[Nvcc | None, str]:
    """The compiler named by NVCC, that of CUDA_HOME, or the one on PATH; or why there is none."""
    home = os.environ.get("CUDA_HOME")
    name = os.environ.get("NVCC") or (str(Path(home) / "bin" / "nvcc") if home else "nvcc")
    path = shutil.which(name)
    oldest = ".".join(map(str, OLDEST))
    if path is None:
        return None, f"{name} was not found; install CUDA {oldest} or newer, or set CUDA_HOME, and build again"
    version = re.search(r"\bV(\d+)\.(\d+)\.(\d+)", _output(path, "--version"))
    toolkit = re.search(r"^#\$ TOP=(.+)$", _output(path, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    if version is None or toolkit is None:
        return None, f"{path} is no nvcc; set NVCC or CUDA_HOME, and build again"
    if tuple(map(int, version.groups())) < OLDEST:
        return None, f"{path} is of CUDA {version[1]}.{version[2]}; install {oldest} or newer, and build again"
    return Nvcc(path, ".".join(version.groups()), Path(toolkit[1].strip()).resolve()), ""


def _output(*command: str) -> str:
    try:
        completed = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return completed.stdout + completed.stderr


def architectures() -> tuple[str, ...]:
    """Those of R1KERNELS_CUDA_ARCHS ("90a", "80 compute_90"), which saves time while kernels are written; or all.
    "wheel" stands for those of a wheel."""
    asked = os.environ.get("R1KERNELS_CUDA_ARCHS", "").strip()
    if asked == "wheel":
        return WHEEL_ARCHITECTURES
    names = re.split(r"[\s,;]+", asked)
    chosen = tuple(name if "_" in name else f"sm_{name}" for name in names if name) or ARCHITECTURES
    for name in chosen:
        if not re.fullmatch(r"(sm|compute)_\d+[af]?", name):
            raise ValueError(f"R1KERNELS_CUDA_ARCHS has {name!r}, expected names as {', '.join(ARCHITECTURES)}")
    return chosen


def runtime_library(nvcc: Nvcc) -> Path:
    """CUDA's runtime to be linked in: with it the extension can be loaded where there is no CUDA."""
    name = "libcudart_static.a"
    folders = [nvcc.toolkit / "lib64", nvcc.toolkit / "lib", *sorted(nvcc.toolkit.glob("targets/*/lib"))]
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{name} is in none of {', '.join(map(str, folders))}")


# ---- objects ------------------------------------------------------------------------------------------------


def sources() -> list[Path]:
    """Every .cu, those that take longest first."""
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"), key=lambda path: (-path.stat().st_size, path.name))


def flags(names: Sequence[str]) -> list[str]:
    codes = [f"-gencode=arch=compute_{name.partition('_')[2]},code={name}" for name in names]
    return [*FLAGS, *codes, f'-DR1K_CUDA_ARCHITECTURES="{" ".join(names)}"']


def included(source: Path) -> set[Path]:
    """A source and the headers of csrc that it includes, directly or not."""
    found: set[Path] = set()
    waiting = {source}
    while waiting:
        path = waiting.pop()
        found.add(path)
        names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE)
        candidates = (folder / name for name in names for folder in (path.parent, ROOT / "csrc"))
        waiting |= {candidate.resolve() for candidate in candidates if candidate.exists()} - found
    return found


def object_of(source: Path, nvcc: Nvcc, names: Sequence[str]) -> Object:
    """Where the object of a source lies: the name changes with whatever could change the object."""
    digest = hashlib.sha256(repr((nvcc.version, flags(names))).encode())
    for path in sorted(included(source)):
        digest.update(f"\0{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes())
    return Object(source, OBJECTS / f"{source.stem}-{digest.hexdigest()[:16]}.o")


def compile_source(source: Path, nvcc: Nvcc, names: Sequence[str]) -> Object:
    compiled = object_of(source, nvcc, names)
    if compiled.path.exists() and compiled.log.exists():
        return compiled
    OBJECTS.mkdir(parents=True, exist_ok=True)
    unfinished = compiled.path.with_suffix(f".{os.getpid()}.o")
    command = [nvcc.path, *flags(names), "-c", str(source.relative_to(ROOT)), "-o", str(unfinished)]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    log = completed.stdout + completed.stderr
    if completed.returncode != 0:
        unfinished.unlink(missing_ok=True)
        raise RuntimeError(f"nvcc cannot compile {source.relative_to(ROOT)}:\n{' '.join(command)}\n{log}")
    for line in log.splitlines():
        if "warning" in line:
            print(line, flush=True)
    compiled.log.write_text(log)
    unfinished.replace(compiled.path)
    return compiled


def compile_all(nvcc: Nvcc, names: Sequence[str] | None = None, workers: int | None = None) -> list[Object]:
    """The object of every source for these architectures, made where it is not there yet."""
    names = architectures() if names is None else names
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda source: compile_source(source, nvcc, names), sources()))


if __name__ == "__main__":
    compiler, missing = available()
    if compiler is None:
        print(f"without CUDA kernels: {missing}")
    else:
        print(f"with CUDA kernels for {', '.join(architectures())} by nvcc {compiler.version}")

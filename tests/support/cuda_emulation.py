"""Builds the CUDA kernels for the CPU: over tests/support/cuda_emulator, with g++, into build/emulator.

As a program it prints the path of the library that registers them as operators:

    R1KERNELS_BACKEND=cuda R1KERNELS_CUDA_EMULATOR=$(python tests/support/cuda_emulation.py) python -m pytest tests/...
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from once import locked

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = Path(__file__).resolve().parent
CSRC, EMULATOR, BUILD = ROOT / "csrc", SUPPORT / "cuda_emulator", ROOT / "build" / "emulator"
COMPILER = shutil.which("g++")
# -ffp-contract=off: what asks for a fused product has one, what must not be fused is not, and the rest is simple.
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-Wno-unknown-pragmas"]  # unroll
FLAGS += [f"-I{EMULATOR}", f"-I{CSRC}"]
# Kernels tell the emulator of each access to memory (races.h) and where it stands in their source.
WATCHED = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-g1"]
NOT_EMULATED = {"runtime.cu"}  # stream.h of a device; that of the emulator is in stream.cpp


def _compile(source: Path, flags: Iterable[str], shared: bytes) -> Path:
    """An object of the source, made anew when the source, its flags or any header (`shared`) has changed."""
    command = [str(COMPILER), *FLAGS, *flags, "-x", "c++", "-c", str(source)]
    key = hashlib.sha256(shared + source.read_bytes() + repr(command).encode()).hexdigest()[:16]
    target = BUILD / f"{source.stem}-{key}.o"
    with locked(target.with_suffix(".lock")):
        if not target.exists():
            mine = target.with_suffix(".part")
            completed = subprocess.run([*command, "-o", str(mine)], capture_output=True, text=True)
            if completed.returncode != 0:
                raise RuntimeError(f"{source}:\n{completed.stderr}")
            mine.rename(target)
    return target


def _headers() -> bytes:
    files = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *EMULATOR.rglob("*.h"), *EMULATOR.rglob("*.cuh")]
    return b"".join(path.read_bytes() for path in sorted(files))


def _link(objects: list[Path], flags: list[str], name: str) -> Path:
    key = hashlib.sha256(repr((objects, flags)).encode()).hexdigest()[:16]
    target = BUILD / f"{name}-{key}.so"
    with locked(target.with_suffix(".lock")):
        if not target.exists():
            mine = target.with_suffix(".part")
            subprocess.run([str(COMPILER), "-shared", *map(str, objects), *flags, "-o", str(mine)], check=True)
            mine.rename(target)
    return target


def _objects(sources: Iterable[Path], flags: Iterable[str] = ()) -> list[Path]:
    headers = _headers()
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(lambda source: _compile(source, flags, headers), sources))


def emulator() -> list[Path]:
    return _objects(sorted(EMULATOR.glob("*.cpp")), ["-O2"])


def _kernels(sources: Iterable[Path], watched: bool) -> list[Path]:
    return _objects(sources, ["-O1", *(WATCHED if watched else [])])


def _changed(source: Path, texts: Mapping[str, str], watched: bool) -> Path:
    """An object of a source over other texts of some files, its own among them."""
    key = hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()[:16]
    folder = BUILD / f"changed-{key}"
    (folder / "cuda").mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / "cuda" / name).write_text(text, encoding="utf-8")
    flags = ["-O1", f"-iquote{folder}", *(WATCHED if watched else [])]
    return _compile(folder / "cuda" / source.name, flags, _headers())


def library_of(source: Path, watched: bool = True) -> ctypes.CDLL:
    """A library of one source of kernels, with what it exports (extern "C", default visibility)."""
    return ctypes.CDLL(str(_link([*_kernels([source], watched), *emulator()], ["-ldl"], source.stem)))


def operators(watched: bool = True, changed: Mapping[str, str] | None = None) -> Path:
    """The library that registers all kernels for the CPU: torch.ops.load_library takes it.

    Args:
        watched: notices accesses to memory that nothing orders; kernels take about three times as long.
        changed: {name of a file in csrc/cuda: another text for it}, for the .cu files among them.
    """
    import torch

    folder = Path(torch.__file__).parent
    bindings = _objects(
        sorted(CSRC.glob("bindings_cuda*.cpp")),
        ["-O1", "-DR1K_CUDA_KEY=CPU", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(folder / "include")],
    )
    sources = [path for path in sorted((CSRC / "cuda").glob("*.cu")) if path.name not in NOT_EMULATED]
    kernels = _kernels(sources, watched)
    if changed:
        kernels = [_changed(source, changed, watched) if source.name in changed else path
                   for source, path in zip(sources, kernels, strict=True)]
    libraries = [f"-L{folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    return _link([*bindings, *kernels, *emulator()], libraries, "r1kernels_cuda")


if __name__ == "__main__":
    print(operators())

"""Links the extension so that an older glibc than this machine's can load it.

A linker takes the newest version of each symbol of the C library. glibc 2.34, for example, moved threads to libc.so.6
as `pthread_create@GLIBC_2.34`, so a library that was linked there needs 2.34. The older versions still exist, for old
programs. Stubs of libraries with only those versions come first on the linker's command line. At run time the loader
finds the symbols in the real libraries.
"""

from __future__ import annotations

import platform
import re
import subprocess
from collections import defaultdict
from pathlib import Path

OLDEST = (2, 28)  # manylinux_2_28, like the wheels of torch
# Where symbols of libc.so.6 were before glibc 2.34.
EARLIER = {
    "libpthread.so.0": re.compile(r"(pthread|sem)_\w+"),
    "libdl.so.2": re.compile(r"dl[a-z]+"),
    "librt.so.1": re.compile(r"(shm|mq|aio|timer)_\w+"),
}
_SYMBOL = re.compile(r"(\()?\bGLIBC_([\d.]+)\)? +(\w+)$", re.MULTILINE)
Versions = dict[str, list[str]]  # version -> symbols


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def read_symbols(table: str) -> tuple[dict[str, str], set[str]]:
    """From the output of objdump -T: symbol -> its newest version in `OLDEST`, and symbols whose default is newer."""
    old: dict[str, str] = {}
    newer: set[str] = set()
    for hidden, version, name in _SYMBOL.findall(table):
        if number(version) <= OLDEST:
            old[name] = max(version, old.get(name, version), key=number)
        elif not hidden:
            newer.add(name)
    return old, newer


def plan(libc: str, libm: str) -> dict[str, Versions]:
    """Library -> version -> symbols of its stub, from the tables of the two real libraries."""
    stubs: dict[str, Versions] = defaultdict(lambda: defaultdict(list))
    old, newer = read_symbols(libc)
    for name in sorted(newer & set(old)):
        for library, pattern in EARLIER.items():
            if pattern.fullmatch(name):
                stubs[library][old[name]].append(name)
    old, newer = read_symbols(libm)
    for name in sorted(old) if newer & set(old) else ():  # all, because the linker reads only one file of this name
        stubs["libm.so.6"][old[name]].append(name)
    return stubs


def write_stub(library: str, versions: Versions, folder: Path, compiler: str) -> str:
    path = folder / library
    source, script = folder / f"{library}.c", folder / f"{library}.map"
    source.write_text("".join(f"void {name}(void) {{}}\n" for names in versions.values() for name in names))
    script.write_text("".join(
        f"GLIBC_{version} {{ {' '.join(f'{name};' for name in names)} }};\n" for version, names in versions.items()
    ))
    _output(
        compiler, "-x", "c", "-w", "-fno-builtin", "-fPIC", str(source), "-shared", "-nostdlib",
        f"-Wl,-soname,{library},--version-script={script}", "-o", str(path),
    )
    return str(path)


def stubs(folder: Path, compiler: str) -> list[str]:
    """The stubs, which the linker needs before the C library. None where that is old enough, or is another one."""
    name, version = platform.libc_ver()
    if name != "glibc" or number(version) <= OLDEST:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    tables = [
        _output("objdump", "-T", _output(compiler, f"-print-file-name={library}").strip())
        for library in ("libc.so.6", "libm.so.6")
    ]
    return [write_stub(library, versions, folder, compiler) for library, versions in plan(*tables).items()]


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

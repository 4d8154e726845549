"""The extension is linked for the libraries of manylinux_2_28, whatever this machine has."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import glibc
import pytest

import r1kernels
from r1kernels import _library

LIBC = """
0000000000089380 g    DF .text	0000000000000eed (GLIBC_2.2.5) pthread_create
0000000000089380 g    DF .text	0000000000000eed  GLIBC_2.34  pthread_create
00000000000853c0 g    DF .text	000000000000009d (GLIBC_2.3.4) dlmopen
00000000000853c0 g    DF .text	000000000000009d  GLIBC_2.34  dlmopen
00000000000a1b30 g    DF .text	0000000000000021  GLIBC_2.2.5 malloc
00000000001db5d8 g    DO .bss	0000000000000001  GLIBC_2.32  __libc_single_threaded
"""
LIBM = """
0000000000013890 g    DF .text	0000000000000075 (GLIBC_2.2.5) exp
0000000000039370 g    DF .text	000000000000005f  GLIBC_2.29  exp
0000000000017170 g    DF .text	000000000000006f (GLIBC_2.2.5) expf
000000000003a5b0 g   iD  .text	000000000000002a  GLIBC_2.27  expf
0000000000017111 g    DF .text	000000000000006f  GLIBC_2.2.5 expm1
"""


def test_stubs_have_the_newest_version_that_is_old_enough() -> None:
    planned = {library: dict(versions) for library, versions in glibc.plan(LIBC, LIBM).items()}
    assert planned == {
        "libpthread.so.0": {"2.2.5": ["pthread_create"]},
        "libdl.so.2": {"2.3.4": ["dlmopen"]},
        "libm.so.6": {"2.2.5": ["exp", "expm1"], "2.27": ["expf"]},
    }
    assert glibc.plan(LIBC.replace("2.34", "2.28"), LIBM.replace("2.29", "2.28")) == {}


@pytest.mark.skipif(_library.extension is None, reason=_library.extension_error)
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump was not found")
def test_the_extension_needs_no_newer_library() -> None:
    extension = Path(r1kernels.__file__).with_name("_C.abi3.so")
    table = subprocess.run(["objdump", "-T", extension], capture_output=True, text=True, check=True).stdout
    # GCC 8's libraries, which manylinux_2_28 has.
    newest = {"GLIBC": glibc.OLDEST, "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11)}
    wanted = re.findall(r"\*UND\*.*\((GLIBC|GLIBCXX|CXXABI)_([\d.]+)\) +(\w+)", table)
    assert {"GLIBC", "GLIBCXX", "CXXABI"} == {library for library, _, _ in wanted}
    assert not [line for line in wanted if glibc.number(line[1]) > newest[line[0]]]
    # The linker gives no version to what it finds in another library than the system's, or nowhere.
    unversioned = re.findall(r"\*UND\*\s+\w+ +(?:Base +)?(\w+)$", table, re.MULTILINE)
    known = re.compile(r"_?Py[A-Z_]\w+|(aoti_)?torch_\w+|_ITM_\w+|__gmon_start__")
    assert "torch_library_impl" in unversioned
    assert not [name for name in unversioned if not known.fullmatch(name)]


@pytest.mark.skipif(_library.extension is None, reason=_library.extension_error)
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm was not found")
def test_the_extension_keeps_its_symbols_to_itself() -> None:
    extension = Path(r1kernels.__file__).with_name("_C.abi3.so")
    command = ["nm", "-D", "--defined-only", extension]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line.split()[-1] for line in listed.splitlines()] == ["PyInit__C"]

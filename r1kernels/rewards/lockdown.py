"""Locks the process in that it runs in: its user, capabilities, limits and system calls. Runs inside the sandbox.

syscalls.txt lists the system calls that remain. Such a list also refuses what nobody thought of and what newer kernels
add. It leaves out whole kinds: processes and programs, sockets to anybody, namespaces, mounts, keys, tracing,
notifications, prctl, and memory that RLIMIT_AS does not count (memfd, vmsplice, io_uring, huge pages, locks and others).
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import struct

NOBODY = 65534
ROOM = 32 * 2**20  # bytes that the limit of memory must leave to a program
FILE_BYTES = 16 * 2**20  # of all files in /tmp
LIMITS = {"NPROC": 16, "NOFILE": 32, "FSIZE": FILE_BYTES, "SIGPENDING": 64, "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0}
NEW_MOUNTS, NEW_USER, NOSUID_NODEV_NOEXEC = 0x00020000, 0x10000000, 2 | 4 | 8
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SIGKILL, FILTER = 1, 22, 38, 9, 2
ARCHITECTURES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}  # column of the list, AUDIT_ARCH
FIRST_NEW = 424  # calls since Linux 5.1 "do not exist": libc tries them first and knows the older ones
LOAD, EQUAL, AT_LEAST, HAS_BITS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
KILL, ALLOW, EPERM, ENOSYS = 0x80000000, 0x7FFF0000, 0x00050001, 0x00050026


def lock_in(confined: bool, seconds: float, memory_bytes: int) -> None:
    """Gives up all privileges for ever. Without bubblewrap (`confined`) only the limits remain."""
    _call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    if confined:
        _call("unshare", NEW_MOUNTS)
        options = f"size={FILE_BYTES},nr_inodes=1024,mode=1777".encode()
        _call("mount", b"tmpfs", b"/tmp", b"tmpfs", NOSUID_NODEV_NOEXEC, options)
        os.chdir("/tmp")
        if os.getuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            _call("unshare", NEW_USER)  # else its threads count with those of other sandboxes
        _call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    for name, value in (LIMITS | {"AS": memory_bytes, "CPU": math.ceil(seconds) + 1}).items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    bytearray(ROOM)
    if confined:
        filter_calls(os.path.join(os.path.dirname(__file__), "syscalls.txt"))


def _call(name: str, *arguments: object) -> None:
    """Calls a function of libc that returns -1 for an error."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), f"{name}{arguments}: {os.strerror(ctypes.get_errno())}")


def filter_calls(path: str) -> None:
    """Lets this process make only the system calls of a list, for ever."""
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise OSError(f"there is no list of system calls for {machine!r}, only for {', '.join(ARCHITECTURES)}")
    column, architecture = ARCHITECTURES[machine]
    # (operation, value, steps to skip if true, steps to skip if false), on struct seccomp_data
    program = [(LOAD, 4, 0, 0), (EQUAL, architecture, 1, 0), (RETURN, KILL, 0, 0), (LOAD, 0, 0, 0)]
    with open(path) as lines:
        rows = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    for row in rows:
        verdict = [(RETURN, ALLOW, 0, 0)]
        if len(row) > 3:
            _, _, _, index, rule, *values = row
            operation = EQUAL if rule == "in" else HAS_BITS
            met, otherwise = (EPERM, ALLOW) if rule == "lacks" else (ALLOW, EPERM)
            numbers = [os.getpid() if value == "own" else int(value, 0) for value in values]
            tests = [(operation, number, len(values) - place, 0) for place, number in enumerate(numbers)]
            verdict = [(LOAD, 16 + 8 * int(index), 0, 0), *tests, (RETURN, otherwise, 0, 0), (RETURN, met, 0, 0)]
        if row[column] != "-":
            program += [(EQUAL, int(row[column]), 0, len(verdict)), *verdict]
    program += [(AT_LEAST, FIRST_NEW, 0, 1), (RETURN, ENOSYS, 0, 0), (RETURN, EPERM, 0, 0)]
    code = b"".join(struct.pack("HBBI", operation, yes, no, value) for operation, value, yes, no in program)
    held = ctypes.create_string_buffer(code)
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", PR_SET_SECCOMP, FILTER, struct.pack("HxxxxxxP", len(program), ctypes.addressof(held)), 0, 0)

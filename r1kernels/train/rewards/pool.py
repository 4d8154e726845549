"""Killable worker processes, and the loop that hands them judgements.

Plain subprocesses with a line protocol rather than `multiprocessing`: nothing is forked from a parent whose
torch threads hold locks, the trainer's main module is not imported again, and a hung worker is one `kill`
away.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from .base import Judgement

TIMEOUT, CRASH = "timeout", "crash"

# Importing the judges takes half a second; a machine under load may need many times that.
START_LIMIT_S = 120.0

# How long a stop asked for by another thread may wait.
GLANCE_S = 0.1


class Stopped(Exception):
    """`Pool.stop` was called during a batch."""


class WorkerError(RuntimeError):
    """A worker could not start: a broken installation or too small a memory limit, not a bad sample."""


class _Worker:
    """One process, and the task it is on."""

    def __init__(self, judges: Sequence[str], memory_bytes: int):
        script = str(Path(__file__).with_name("worker.py"))
        # The worker finds packages where this process does; a fixed hash seed makes verdicts repeatable.
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-B", script, str(os.getpid()), str(memory_bytes), *judges],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C reaches the trainer only; its children die with it
        )
        self.started = self.ready = self.used = False
        self.stops = 0
        self.task: int | None = None
        self.deadline = time.monotonic() + START_LIMIT_S
        self._received = b""

    def send(self, index: int, task: Judgement, timeout_s: float) -> bool:
        """Hands over a task; False when the process has died in the meantime."""
        message = (json.dumps((task.judge, task.arguments), ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
        try:
            while message:
                message = message[self.process.stdin.write(message) :]
        except BrokenPipeError:
            return False
        self.task, self.deadline = index, time.monotonic() + timeout_s
        return True

    def receive(self) -> list[dict] | None:
        """The messages that have come, None when the process has gone."""
        data = os.read(self.process.stdout.fileno(), 65536)
        if not data:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def stop(self) -> None:
        """Ends the task it is on; it is ready again, and as new, in a moment."""
        self.process.send_signal(signal.SIGTERM)
        self.stops += 1
        self.renew()

    def renew(self) -> None:
        self.task, self.ready, self.used = None, False, False
        self.deadline = time.monotonic() + START_LIMIT_S

    def close(self) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Pool:
    """Up to `workers` processes, started when first needed and replaced when killed.

    Args:
        judges: the "module:function" names a worker loads before it is ready.
        workers: processes at most.
        timeout_s: wall-clock seconds a judgement may take that names no limit of its own.
        memory_bytes: address space of one worker.
    """

    def __init__(self, judges: Sequence[str], *, workers: int, timeout_s: float, memory_bytes: int):
        self._judges, self._limit = tuple(judges), workers
        self._timeout_s, self._memory_bytes = timeout_s, memory_bytes
        self._workers: list[_Worker] = []
        self._stop = threading.Event()

    def run(self, tasks: Sequence[Judgement]) -> list[float | str]:
        """Judges every task; a value each, or TIMEOUT or CRASH for the ones that were stopped or died.

        Raises:
            WorkerError: a worker died before it was ready.
            Stopped: `stop` was called.
        """
        results: list[float | str | None] = [None] * len(tasks)
        waiting, suspects = deque(range(len(tasks))), deque()
        try:
            while waiting or suspects or any(worker.task is not None for worker in self._workers):
                if self._stop.is_set():
                    raise Stopped
                self._hand_out(tasks, waiting, suspects)
                for worker in self._wait():
                    self._take_verdicts(worker, results, suspects)
                self._stop_overdue(results)
        except BaseException:
            # An interrupted batch leaves verdicts in the pipes that the next batch must not read.
            self.close()
            raise
        return results

    def stop(self) -> None:
        """Ends the batch under way, from any thread; `close` makes the pool usable again."""
        self._stop.set()

    def close(self) -> None:
        """Kills every worker; the next `run` starts new ones."""
        while self._workers:
            self._workers.pop().close()
        self._stop.clear()

    def _hand_out(self, tasks: Sequence[Judgement], waiting: deque[int], suspects: deque[int]) -> None:
        busy = sum(worker.task is not None for worker in self._workers)
        while len(self._workers) < min(self._limit, busy + len(waiting) + len(suspects)):
            self._workers.append(_Worker(self._judges, self._memory_bytes))
        if suspects and not waiting and busy == 0 and all(worker.used for worker in self._workers):
            self._workers[0].stop()
        for worker in list(self._workers):
            if not worker.ready or worker.task is not None:
                continue
            queue = suspects if suspects and not worker.used else waiting
            if queue:
                index = queue.popleft()
                limit = tasks[index].timeout_s or self._timeout_s
                if not worker.send(index, tasks[index], limit):
                    queue.appendleft(index)
                    self._retire(worker)

    def _wait(self) -> list[_Worker]:
        """The workers with something to read, after at most the time to the next deadline."""
        with selectors.DefaultSelector() as selector:
            active = [worker for worker in self._workers if worker.task is not None or not worker.ready]
            for worker in active:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            if not active:
                return []
            patience = min(worker.deadline for worker in active) - time.monotonic()
            return [key.data for key, _ in selector.select(min(max(patience, 0.0), GLANCE_S))]

    def _take_verdicts(self, worker: _Worker, results: list[float | str | None], suspects: deque[int]) -> None:
        messages = worker.receive()
        for message in messages or ():
            if "failed" in message:
                raise self._broken(message["failed"])
            if not worker.ready:
                # A verdict that came too late is not read, nor what a child said that was stopped right after.
                worker.ready = message.get("ready") == worker.stops
                worker.started |= worker.ready
                continue
            self._settle(worker, message, results, suspects)
        if messages is None:
            if not worker.started:
                raise self._broken(f"exit status {worker.process.wait()}")
            if worker.task is not None:
                self._settle(worker, {"leaving": True}, results, suspects)
            self._retire(worker)

    def _settle(
        self, worker: _Worker, message: dict, results: list[float | str | None], suspects: deque[int]
    ) -> None:
        leaving = message.get("leaving", False)
        if "value" in message:
            results[worker.task] = message["value"]
        else:
            # Perhaps the machine killed it, or earlier judgements had used up its memory: what happens in a fresh
            # worker is the task's own.
            if leaving and results[worker.task] is None:
                suspects.append(worker.task)
            results[worker.task] = CRASH
        worker.task, worker.used = None, True
        if leaving:
            worker.renew()

    def _broken(self, reason: str) -> WorkerError:
        return WorkerError(
            f"a reward worker could not start ({reason}); judges {list(self._judges)}, "
            f"memory_bytes={self._memory_bytes}"
        )

    def _stop_overdue(self, results: list[float | str | None]) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            if not worker.ready and now >= worker.deadline:
                raise WorkerError(f"a reward worker was not ready after {START_LIMIT_S:.0f} s")
            if worker.task is not None and now >= worker.deadline:
                results[worker.task] = TIMEOUT
                worker.stop()

    def _retire(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.close()

"""Killable worker processes, and the loop that hands them judgements.

Plain subprocesses with a line protocol rather than `multiprocessing`: nothing is forked from a parent whose
torch threads hold locks, the trainer's main module is not imported again, and a hung worker is one `kill`
away.
"""

import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

# A judgement: the judge's "module:function", then its arguments.
Task = tuple[str, tuple]

TIMEOUT, CRASH = "timeout", "crash"

# Importing the judges takes half a second; a machine under load may need many times that.
START_LIMIT_S = 120.0


class WorkerError(RuntimeError):
    """A worker could not start: a broken installation or too small a memory limit, not a bad sample."""


class _Worker:
    """One process, and the task it is on."""

    def __init__(self, judges: Sequence[str], memory_bytes: int, timeout_s: float):
        script = str(Path(__file__).with_name("worker.py"))
        # The worker finds packages where this process does; a fixed hash seed makes verdicts repeatable.
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-B", script, str(os.getpid()), str(memory_bytes), str(timeout_s), *judges],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C reaches the trainer only
        )
        self.ready = False
        self.task: int | None = None
        self.deadline = time.monotonic() + START_LIMIT_S
        self._received = b""

    def send(self, index: int, task: Task, timeout_s: float) -> bool:
        """Hands over a task; False when the process has died in the meantime."""
        message = (json.dumps(task, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
        try:
            while message:
                message = message[self.process.stdin.write(message) :]
        except BrokenPipeError:
            return False
        self.task, self.deadline = index, time.monotonic() + timeout_s
        return True

    def receive(self) -> dict | bool | None:
        """The next message; False when it is not complete yet, None when the process has gone."""
        data = os.read(self.process.stdout.fileno(), 65536)
        if not data:
            return None
        self._received += data
        line, newline, rest = self._received.partition(b"\n")
        if not newline:
            return False
        self._received = rest
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Pool:
    """Up to `workers` processes, started when first needed and replaced when killed.

    Args:
        judges: the "module:function" names the workers load.
        workers: processes at most.
        timeout_s: wall-clock seconds a judgement may take.
        memory_bytes: address space of one worker.
    """

    def __init__(self, judges: Sequence[str], *, workers: int, timeout_s: float, memory_bytes: int):
        self._judges, self._limit = tuple(judges), workers
        self._timeout_s, self._memory_bytes = timeout_s, memory_bytes
        self._workers: list[_Worker] = []

    def run(self, tasks: Sequence[Task]) -> list[float | str]:
        """Judges every task; a value each, or TIMEOUT or CRASH for the ones that were stopped or died.

        Raises:
            WorkerError: a worker died before it was ready.
        """
        results: list[float | str | None] = [None] * len(tasks)
        waiting = deque(range(len(tasks)))
        try:
            while waiting or any(worker.task is not None for worker in self._workers):
                self._hand_out(tasks, waiting)
                for worker in self._wait():
                    self._take_verdict(worker, results, waiting)
                self._stop_overdue(results)
        except BaseException:
            # An interrupted batch leaves verdicts in the pipes that the next batch must not read.
            self.close()
            raise
        return results

    def close(self) -> None:
        """Kills every worker; the next `run` starts new ones."""
        while self._workers:
            self._workers.pop().close()

    def _hand_out(self, tasks: Sequence[Task], waiting: deque[int]) -> None:
        busy = sum(worker.task is not None for worker in self._workers)
        while len(self._workers) < min(self._limit, busy + len(waiting)):
            self._workers.append(_Worker(self._judges, self._memory_bytes, self._timeout_s))
        for worker in list(self._workers):
            if waiting and worker.ready and worker.task is None:
                index = waiting.popleft()
                if not worker.send(index, tasks[index], self._timeout_s):
                    waiting.appendleft(index)
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
            return [key.data for key, _ in selector.select(max(patience, 0.0))]

    def _take_verdict(self, worker: _Worker, results: list[float | str | None], waiting: deque[int]) -> None:
        message = worker.receive()
        if message is False:
            return
        if message is None or "failed" in message:
            if not worker.ready:
                status = worker.process.wait()
                reason = message["failed"] if message else f"exit status {status}"
                raise WorkerError(
                    f"a reward worker could not start ({reason}); judges {list(self._judges)}, "
                    f"memory_bytes={self._memory_bytes}"
                )
            if results[worker.task] is None:
                # Perhaps the machine killed it, even before it began: a second death in a row is the task's.
                results[worker.task] = CRASH
                waiting.append(worker.task)
            self._retire(worker)
        elif not worker.ready:
            worker.ready = True
        else:
            results[worker.task] = message.get("value", CRASH)
            worker.task = None
            if message.get("leaving"):
                self._retire(worker)

    def _stop_overdue(self, results: list[float | str | None]) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            if not worker.ready and now >= worker.deadline:
                raise WorkerError(f"a reward worker was not ready after {START_LIMIT_S:.0f} s")
            if worker.task is not None and now >= worker.deadline:
                results[worker.task] = TIMEOUT
                self._retire(worker)

    def _retire(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.close()

"""The pool of workers: hanging, crashing and greedy judgements, and how processes end."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from r1kernels.rewards.pool import CRASH, TIMEOUT, Pool, Task, WorkerError

PATIENCE_S = 120.0  # on a busy machine; nothing waits that long elsewhere
HANG = ("builtins:pow", (9**9, 9**9))  # C code that looks at no signal


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def task(judge, *arguments, timeout_s=PATIENCE_S):
    return Task(judge, arguments, timeout_s)


def run(pool, *tasks):
    return pool.run(tasks, threading.Event())


@pytest.fixture
def pool():
    pool = Pool([("math:sqrt", (4.0,))], workers=1, memory_mb=256)
    yield pool
    pool.close()


def test_verdicts_come_in_order_and_a_hang_or_a_crash_harms_no_neighbour(pool):
    pool._most = 2
    tasks = [task("math:sqrt", 4.0), Task(*HANG, 0.5), task("math:sqrt", 9.0), task("builtins:int", "x"),
             task("builtins:bytearray", 10**12), task("os:abort"), task("no_module:f"), task("math:sqrt", 16.0)]
    assert run(pool, *tasks) == [2.0, TIMEOUT, 3.0, CRASH, CRASH, CRASH, CRASH, 4.0]
    assert run(pool) == []


def test_none_is_nan_and_text_travels_unchanged(pool):
    text = "\ud800 \u6240 \x00\n"
    none, same = run(pool, task("builtins:print", "nobody reads this"), task("operator:eq", text, text))
    assert math.isnan(none) and same == 1.0


def test_a_worker_is_kept_until_it_must_be_replaced(pool):
    first, second = run(pool, task("os:getpid"), task("os:getpid"))
    assert first == second
    crash, third = run(pool, task("os:abort"), task("os:getpid"))
    assert crash == CRASH and third != first
    os.kill(int(third), signal.SIGKILL)
    (fourth,) = run(pool, task("os:getpid"))
    assert fourth not in (first, third)
    pool._server.kill()
    pool._server.wait()
    (fifth,) = run(pool, task("os:getpid"))
    assert fifth not in (first, third, fourth)


def test_the_death_of_the_fork_server_loses_no_task(pool):
    pool._most = 2
    run(pool, task("os:getpid"))
    threading.Timer(1.0, pool._server.kill).start()
    verdicts = run(pool, *[task("time:sleep", 3.0)] * 2, *[task("math:sqrt", 4.0)] * 4)
    assert all(verdict == CRASH or math.isnan(verdict) for verdict in verdicts[:2]) and verdicts[2:] == [2.0] * 4


JUDGES = """
import os

def hides_the_error():
    taken = []
    try:
        while True:
            taken.append(bytearray(2**20))
    except MemoryError:
        return 0.0

def grows(kept=[]):
    kept.append(bytearray(40 * 2**20))
    return os.getpid()
"""


def test_memory_of_earlier_tasks_is_forgiven_and_hidden_memory_errors_are_crashes(pool, tmp_path, monkeypatch):
    (tmp_path / "other_judges.py").write_text(JUDGES)
    monkeypatch.syspath_prepend(str(tmp_path))
    # What earlier judgements took is not held against a later one: it runs again in a fresh worker.
    processes = run(pool, *[task("other_judges:grows")] * 6)
    assert CRASH not in processes and len(set(processes)) > 1
    assert run(pool, task("other_judges:hides_the_error")) == [CRASH]


@pytest.mark.parametrize("arguments", [([], 1), ([], 40), ([("no_such_module:judge", ())], 256)])
def test_a_worker_that_cannot_start_is_an_error(arguments):
    warm_up, memory_mb = arguments
    pool = Pool(warm_up, workers=1, memory_mb=memory_mb)
    with pytest.raises(WorkerError, match=f"memory_mb is {memory_mb}"):
        run(pool, task("math:sqrt", 4.0))


def test_a_batch_is_given_up_when_asked(pool):
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(CancelledError):
        pool.run([task(*HANG[:1], *HANG[1])], stop)
    assert run(pool, task("math:sqrt", 4.0)) == [2.0]


def test_no_file_or_process_is_left(pool):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        (process,) = run(pool, task("os:getpid"))
        pool.close()
        wait_until(lambda process=process: not Path(f"/proc/{int(process)}").exists())
    assert len(os.listdir("/proc/self/fd")) == before


# A script of a user's, without `if __name__ == "__main__"`, and with threads.
SCRIPT = """
import os, signal, sys, threading
from r1kernels.rewards.pool import Pool, Task
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Thread(target=threading.Event().wait, daemon=True).start()
print("started", flush=True)
pool, stop = Pool([], workers=1, memory_mb=256), threading.Event()
ask = lambda: int(pool.run([Task("os:getpid", (), 120.0)], stop)[0])
print(ask(), pool._server.pid, flush=True)
"""


def script(tmp_path, rest):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT + rest)
    return subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_the_main_module_of_the_caller_is_not_imported_again(tmp_path):
    with script(tmp_path, "pool.run([Task('os:abort', (), 120.0)], stop); ask(); pool.close()") as process:
        lines = process.stdout.read().splitlines()
    assert process.returncode == 0
    assert lines[0] == "started" and len(lines) == 2


def test_workers_die_with_the_caller(tmp_path):
    rest = f"print('hangs', flush=True); pool.run([Task({HANG[0]!r}, {HANG[1]}, 3600.0)], stop)"
    with script(tmp_path, rest) as process:
        assert process.stdout.readline() == "started\n"
        processes = process.stdout.readline().split()
        assert process.stdout.readline() == "hangs\n"
        cpu = Path(f"/proc/{processes[0]}/stat")
        wait_until(lambda: int(cpu.read_text().rpartition(")")[2].split()[11]) > 20)  # it is in the endless power
        process.kill()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes))


def test_ctrl_c_reaches_the_caller_only(tmp_path):
    rest = """
try:
    os.killpg(0, signal.SIGINT)
    threading.Event().wait(60)
except KeyboardInterrupt:
    print("interrupted", ask(), flush=True)
"""
    with script(tmp_path, rest) as process:
        _, processes, interrupted = process.stdout.read().splitlines()
    assert interrupted.split() == ["interrupted", processes.split()[0]]

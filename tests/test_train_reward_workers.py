"""Reward workers: what hostile answers can do (nothing, within the limits), and how processes end."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from r1kernels.train.rewards import Sample, Scorer, ScoringConfig, WorkerError

LIMIT_S = 1.5
# Endless by itself, and one long operation in C that no Python signal handler or thread can interrupt.
ENDLESS = r"\boxed{9^{9^{9^{9}}}}"


def tagged(answer):
    return f"<think>reasons</think> <answer>{answer}</answer>"


def children(parent):
    """The process ids whose parent is `parent`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def cpu_seconds(process):
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy(workers):
    """Those of the processes that the workers judge in that have been at it for a while."""
    return [child for worker in workers for child in children(worker) if cpu_seconds(child) > 0.3]


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def nothing_is_hopeless(monkeypatch):
    """What workers withstand must not depend on what is seen beforehand (test_train_effort)."""
    monkeypatch.setattr(sys.modules["r1kernels.train.rewards.accuracy"], "is_hopeless", lambda *texts: False)


@pytest.fixture(scope="module")
def scorer():
    with Scorer({"accuracy": 1.0, "format": 0.5}, ScoringConfig(workers=2, timeout_s=LIMIT_S)) as scorer:
        yield scorer


def test_a_thread_gets_verdicts_too(scorer):
    # math-verify called directly in a thread raises, and a trainer that catches it scores everything 0.
    found = []
    sample = Sample("", tagged(r"\frac{36}{2}"), "18")
    thread = threading.Thread(target=lambda: found.append(scorer.score([sample])))
    thread.start()
    thread.join()
    assert found[0].parts["accuracy"] == [1.0]


@pytest.mark.parametrize(
    "attack",
    ["98**87**76", "9**9**9**9", "9^{9^{9^9}}", "(" * 200 + "1" + ")" * 200, "(" * 499, r"10^{1000000000}!"],
)
def test_an_attack_costs_the_time_limit_at_most_and_harms_no_neighbour(attack, scorer):
    scorer.score([Sample("", tagged(r"\frac{2}{2}"), "1")])  # so that no start-up is measured
    samples = [Sample("", tagged(answer), "18") for answer in (r"\frac{36}{2}", attack, r"\frac{36}{3}", "18")]
    start = time.monotonic()
    scores = scorer.score(samples)
    # Beyond the limit there is at most the start of one worker, while this machine does other things too.
    assert time.monotonic() - start < LIMIT_S + 5
    values = scores.parts["accuracy"]
    assert [values[0], values[2], values[3]] == [1.0, 0.0, 1.0]
    stopped = math.isnan(values[1])
    assert stopped or values[1] == 0.0
    assert (scores.timeouts, scores.crashes) == (int(stopped), 0)
    assert math.isnan(scores.total[1]) == stopped
    assert scores.parts["format"] == [1.0] * 4


def test_equal_judgements_are_made_once_and_counted_each(scorer):
    scorer.score([Sample("", r"\boxed{\frac{2}{2}}", "1")])
    start = time.monotonic()
    scores = scorer.score([Sample("", ENDLESS, "18")] * 16)
    assert time.monotonic() - start < LIMIT_S + 5
    assert scores.timeouts == 16
    assert all(math.isnan(value) for value in scores.total)


def test_exhausted_memory_is_counted_and_harms_no_neighbour():
    with Scorer({"accuracy": 1}, ScoringConfig(timeout_s=60, memory_mb=256)) as scorer:
        scores = scorer.score([Sample("", tagged(a), "18") for a in ("(x+1)^{100000}", r"\frac{36}{2}")])
    assert math.isnan(scores.parts["accuracy"][0])
    assert scores.parts["accuracy"][1] == 1.0
    assert (scores.timeouts, scores.crashes) == (0, 1)


def kill_busy(parent, spared, kills):
    """Kills the processes that workers of `parent` judge in, one after another, each once it is at work."""
    for _ in range(kills):
        wait_until(lambda: busy(set(children(parent)) - spared), 60)
        (worker,) = set(children(parent)) - spared
        os.kill(*busy([worker]), signal.SIGKILL)
        wait_until(lambda worker=worker: worker not in children(parent), 10)


def test_killed_workers_are_replaced():
    with Scorer({"accuracy": 1}, ScoringConfig(timeout_s=3)) as scorer:
        easy = Sample("", tagged(r"\frac{36}{2}"), "18")
        before = set(children(os.getpid()))
        assert scorer.score([easy]).total == [1.0]
        (worker,) = set(children(os.getpid())) - before
        assert "torch" not in Path(f"/proc/{worker}/maps").read_text()
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: worker not in children(os.getpid()), 10)
        scores = scorer.score([easy])
        assert (scores.total, scores.crashes) == ([1.0], 0)
        # Killed once, a judgement is made again; killed twice, it is unscorable. Its neighbour is scored.
        for kills in (1, 2):
            killer = threading.Thread(target=kill_busy, args=(os.getpid(), before, kills))
            killer.start()
            scores = scorer.score([Sample("", ENDLESS, "18"), easy])
            killer.join()
            assert scores.parts["accuracy"][1] == 1.0
            assert (scores.timeouts, scores.crashes) == ((1, 0) if kills == 1 else (0, 1))
    assert set(children(os.getpid())) == before


PARENT = """
import sys
from r1kernels.train.rewards import Sample, Scorer, ScoringConfig
sys.modules["r1kernels.train.rewards.accuracy"].is_hopeless = lambda *texts: False
Scorer({"accuracy": 1}, ScoringConfig(timeout_s=float(sys.argv[1]))).score([Sample("", sys.argv[2], "18")])
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(how):
    limit = "2" if how == signal.SIGKILL else "60"
    command = [sys.executable, "-c", PARENT, limit, ENDLESS]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    with parent:
        wait_until(lambda: children(parent.pid), 60)
        (worker,) = children(parent.pid)
        wait_until(lambda: busy([worker]), 60)  # in the endless power
        processes = [worker, *children(worker)]
        os.killpg(parent.pid, how)
        errors = parent.stderr.read()
    wait_until(lambda: not any(Path(f"/proc/{process}").exists() for process in processes), 20)
    assert errors.count("Traceback") == (how == signal.SIGINT)


def test_a_judgement_ends_with_its_worker(scorer):
    scorer.score([Sample("", tagged(r"\frac{2}{2}"), "1")])
    before = set(children(os.getpid()))
    with Scorer({"accuracy": 1}, ScoringConfig(timeout_s=4)) as lonely:
        future = lonely.submit([Sample("", ENDLESS, "18")])
        wait_until(lambda: busy(set(children(os.getpid())) - before), 60)
        (worker,) = set(children(os.getpid())) - before
        (child,) = children(worker)
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{child}").exists(), 2)
        assert math.isnan(future.result().total[0])


def test_a_stopped_judgement_leaves_a_fresh_process_in_the_same_worker():
    before = set(children(os.getpid()))
    with Scorer({"accuracy": 1}, ScoringConfig(timeout_s=0.5)) as scorer:
        easy = Sample("", tagged(r"\frac{36}{2}"), "18")
        scorer.score([easy])
        (worker,) = set(children(os.getpid())) - before
        seen = set()
        for index in range(5):
            seen.update(children(worker))
            scores = scorer.score([Sample("", rf"\boxed{{9^{{9^{{9^{{9{index}}}}}}}}}", "18"), easy])
            assert math.isnan(scores.total[0])
            assert (scores.total[1], scores.timeouts) == (1.0, 1)
        assert set(children(os.getpid())) - before == {worker}
        assert len(seen) == 5


@pytest.mark.parametrize("memory", [1, 120])
def test_a_worker_that_cannot_start_is_an_error_not_a_score(memory):
    with (
        Scorer({"accuracy": 1}, ScoringConfig(memory_mb=memory)) as scorer,
        pytest.raises(WorkerError, match=f"could not start .*memory_bytes={memory * 2**20}"),
    ):
        scorer.score([Sample("", tagged(r"\frac{36}{2}"), "18")])

"""Logs: exact whatever stops the process, whole on a full disk, readable by every reader of JSON."""

import json
import os
import resource
import subprocess
import sys
import time

import pytest

from r1kernels.train.data import DataError
from r1kernels.train.metrics import MetricsLog, read_metrics, split_timings


def test_lines_survive_a_kill_and_come_once(tmp_path):
    path = tmp_path / "stage" / "metrics.jsonl"
    code = (
        "import sys; from r1kernels.train.metrics import MetricsLog\n"
        "log = MetricsLog(sys.argv[1], first_step=int(sys.argv[2]))\n"
        "for step in range(int(sys.argv[2]), 10**9): log.write({'step': step, 'text': 'x' * 5000})\n"
    )
    first = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", code, str(path), str(first)])
        deadline = time.monotonic() + 60
        while not (lines := read_metrics(path)) or lines[-1]["step"] < first + 20:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        process.wait()
        steps = [line["step"] for line in read_metrics(path)]
        assert steps == list(range(len(steps)))
        first = len(steps) - 7  # as if the last checkpoint were some steps old
    with MetricsLog(path, first_step=first) as log:
        log.write({"step": first})
        log.sync()
    assert [line["step"] for line in read_metrics(path)] == list(range(first + 1))
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


@pytest.fixture
def limit_file_size():
    """What a full disk does: a write ends early, and the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_and_takes_no_line(tmp_path, limit_file_size):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, first_step=0) as log:
        log.write({"step": 0})
        limit_file_size(100)
        with pytest.raises(DataError, match=r"metrics\.jsonl cannot be written: .*; it holds all steps before 1"):
            log.write({"step": 1, "text": "x" * 500})
        limit_file_size(resource.RLIM_INFINITY)
        assert path.read_text() == '{"step": 0}\n'
        log.write({"step": 1})
    assert len(read_metrics(path)) == 2

    limit_file_size(10)
    with pytest.raises(DataError, match=r"cannot be written: .*; it is as it was"):
        MetricsLog(path, first_step=2)
    limit_file_size(resource.RLIM_INFINITY)
    assert len(read_metrics(path)) == 2 and os.listdir(tmp_path) == ["metrics.jsonl"]


def test_what_cannot_be_a_log_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot (read|be written)"):
        MetricsLog(tmp_path / "file" / "metrics.jsonl", first_step=0)
    (tmp_path / "deep.jsonl").write_text('{"step": 0, "a": ' + "[" * 100_000 + "\n")
    with pytest.raises(DataError, match=r"deep\.jsonl, line 1: damaged"):
        read_metrics(tmp_path / "deep.jsonl")


def test_metrics_are_json_for_every_reader(tmp_path):
    with MetricsLog(tmp_path / "log.jsonl", first_step=0) as log:
        log.write({"step": 0, "loss": float("nan"), "parts": {"a": float("inf"), "b": [1.5, float("-inf")]}})
        log.write({"step": 1, "completion": "half \ud800, whole \u4e2d"})
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"step": 0, "loss": None, "parts": {"a": None, "b": [1.5, None]}}
    assert json.loads(lines[1])["completion"] == "half ?, whole \u4e2d"


def test_timings_are_kept_apart():
    line = {"step": 3, "loss": 0.5, "seconds": 2.0, "seconds_sampling": 1.0, "tokens_per_second": 9.0, "tokens": 18}
    metrics, timings = split_timings(line)
    assert metrics == {"step": 3, "loss": 0.5, "tokens": 18}
    assert timings == {"step": 3, "seconds": 2.0, "seconds_sampling": 1.0, "tokens_per_second": 9.0}

"""Watching: a run is followed as it is written, whatever happens to it, and nothing of it is touched."""

import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import train_run_files as files
from rich.console import Console as RichConsole

from r1kernels.train import watch as watch_module
from r1kernels.train.follow import FollowedRun, Tail
from r1kernels.train.schema import ConfigError
from r1kernels.train.watch import watch

RL = {"name": "r1", "kind": "grpo", "model": "base", "steps": 6}
BASE = {"name": "base", "kind": "pretrain", "steps": 3}


def begin(run_dir: Path, pid: int | None = None) -> None:
    files.write_config(run_dir, [BASE, RL])
    (run_dir / ".lock").write_text(f"{os.getpid() if pid is None else pid}\n")


def note(run_dir: Path, base: str | None = None, rl: str | None = None) -> None:
    """The manifest with the status of both stages."""
    entries = {}
    for stage, status in ((BASE, base), (RL, rl)):
        if status:
            finished = files.evaluation(0.25) if status == "finished" else None
            entries[stage["name"]] = files.entry(stage, status, evaluation=finished)
    files.write_manifest(run_dir, entries)


def ended() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def contents(run_dir: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        str(path.relative_to(run_dir)): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in run_dir.rglob("*") if path.is_file()
    }


def test_a_tail_waits_for_whole_lines_and_notices_a_new_file(tmp_path):
    path = tmp_path / "stage" / "metrics.jsonl"
    tail = Tail(path)

    def steps():
        tail.read()
        return [line["step"] for line in tail.lines]

    assert steps() == []
    path.parent.mkdir()
    path.write_bytes(b'{"step": 0}\n{"step": 1, "te')
    assert steps() == [0]
    with open(path, "ab") as file:
        file.write('xt": "é'.encode()[:-1])
        file.flush()
        assert steps() == [0]
        file.write("é".encode()[-1:] + b'"}\nnot a line\n{"step": 2}\n')
    assert steps() == [0, 1, 2] and tail.lines[1]["text"] == "é" and tail.damaged == 1
    aside = path.with_name(".metrics.jsonl")
    aside.write_bytes(b'{"step": 0}\n')
    aside.replace(path)
    assert steps() == [0] and tail.damaged == 0
    path.write_bytes(b"")  # emptied in place
    assert steps() == []
    path.write_bytes(b'{"step": 7}\n')
    assert steps() == [7]
    path.parent.rename(tmp_path / "superseded")
    assert steps() == []
    tail.close()


def test_it_waits_for_the_run_follows_it_and_ends_with_it(tmp_path, capsys):
    run_dir = tmp_path / "runs" / "it"

    def run():
        time.sleep(0.1)
        begin(run_dir)
        note(run_dir, "running")
        time.sleep(0.1)
        files.write_lines(run_dir / "base" / "metrics.jsonl", [{"step": step, "loss": 3.5 - step} for step in range(3)])
        note(run_dir, "finished", "running")
        lines = [files.rl_line(step, 6, 0.5, 0) for step in range(6)]
        files.write_lines(run_dir / "r1" / "timings.jsonl", [files.timing_line(step) for step in range(6)])
        for count in (2, 4):
            files.write_lines(run_dir / "r1" / "metrics.jsonl", lines[:count])
            time.sleep(0.2)
        (run_dir / "r1" / "metrics.jsonl").unlink()  # as a resume from step 3 does
        files.write_lines(run_dir / "r1" / "metrics.jsonl", lines[:3])
        time.sleep(0.2)
        files.write_lines(run_dir / "r1" / "metrics.jsonl", lines)
        note(run_dir, "finished", "finished")
        (run_dir / "report.html").write_text("")

    thread = threading.Thread(target=run)
    thread.start()
    assert watch(run_dir, interval_s=0.02) == 0
    thread.join()
    output = capsys.readouterr().out
    places = [output.index(part) for part in (
        f"waiting for a run in {run_dir}\n", "base (pretrain): running\n",
        "base (pretrain): finished, pass@1 25.0 ± ",
        "r1 (grpo): running\n", "  pass@1  ", "r1: resumed at step 3\n", "r1 (grpo): finished, pass@1", "is finished",
    )]
    assert places == sorted(places)
    rows = [line.split()[0] for line in output.splitlines() if line.strip() and line.split()[0].isdigit()]
    assert [int(step) for step in rows[-8:]] in ([0, 1, 2, 3, 3, 4, 5], [2, 0, 1, 2, 3, 3, 4, 5])
    assert "1800" in output  # tokens a second, which are in timings.jsonl


@pytest.mark.parametrize("kill", [True, False])
def test_it_says_that_the_process_is_gone(tmp_path, capsys, kill):
    run_dir = tmp_path / "run"
    if kill:
        process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
        begin(run_dir, process.pid)
        threading.Timer(0.2, process.kill).start()
    else:
        begin(run_dir, ended())
    note(run_dir, "running")
    before = contents(run_dir)
    assert watch(run_dir, interval_s=0.02) == 1
    output = capsys.readouterr().out
    assert "is gone from this machine; not finished: base, r1" in output and "base (pretrain): running" in output
    assert contents(run_dir) == before
    if kill:
        process.wait()


def test_a_number_that_another_process_got_later_is_not_the_run(tmp_path):
    begin(tmp_path)
    assert FollowedRun(tmp_path).writer() == (os.getpid(), True)
    os.utime(tmp_path / ".lock", (1, 1))
    assert FollowedRun(tmp_path).writer() == (os.getpid(), not Path("/proc/stat").exists())
    (tmp_path / ".lock").write_text("")
    assert FollowedRun(tmp_path).writer() == (None, False)


def test_once(tmp_path, capsys):
    assert watch(tmp_path / "nothing", once=True) == 1
    assert f"there is no run in {tmp_path / 'nothing'}" in capsys.readouterr().out
    run_dir = files.write_run(tmp_path / "r1")
    before = contents(run_dir)
    assert watch(run_dir, once=True) == 0
    output = capsys.readouterr().out
    assert "small_r1 (distill): finished, pass@1 60.0 ± 2.0 %" in output and "is finished" in output
    assert contents(run_dir) == before
    files.write_config(tmp_path / "new", [BASE])
    assert watch(tmp_path / "new", once=True) == 0
    assert "no stage has begun" in capsys.readouterr().out


def test_what_cannot_be_watched_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file, expected the directory of a run"):
        watch(tmp_path / "file")
    with pytest.raises(ConfigError, match="'interval_s' is 0, expected more than 0"):
        watch(tmp_path, interval_s=0)


def test_files_that_are_being_written_are_read_later(tmp_path):
    begin(tmp_path)
    run = FollowedRun(tmp_path)
    (tmp_path / "manifest.json").write_text('{"stages": {"base"')
    run.poll()
    assert list(run.stages) == ["base", "r1"] and run.current is None
    note(tmp_path, "finished", "running")
    (tmp_path / "config.yaml").write_text("stages: [")
    run.poll()
    assert run.current.name == "r1" and not run.finished
    run.close()


def test_time_left_is_at_the_pace_of_the_last_steps(tmp_path):
    begin(tmp_path)
    note(tmp_path, "finished", "running")
    files.write_lines(tmp_path / "r1" / "timings.jsonl", [
        {"step": step, "seconds_total": 100.0 * step} for step in range(3)
    ])
    run = FollowedRun(tmp_path)
    run.poll()
    assert run.current.left() == "5:00"
    (tmp_path / "r1" / "timings.jsonl").unlink()
    files.write_lines(tmp_path / "r1" / "timings.jsonl", [
        {"step": step, "seconds_sampling": 5.0, "seconds_updates": 2.0} for step in range(3)
    ])
    run.poll()
    assert run.current.left() == "0:21"
    run.close()


def test_the_live_table(tmp_path, monkeypatch):
    run_dir = files.write_run(tmp_path / "run")
    begin(run_dir)
    note(run_dir, "finished", "running")
    log = run_dir / "r1" / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]))
    screen = io.StringIO()
    monkeypatch.setattr(watch_module, "RichConsole",
                        lambda: RichConsole(file=screen, force_terminal=True, width=120, height=60))
    terminal = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})
    monkeypatch.setattr(watch_module.sys, "stdout", terminal())
    assert watch(run_dir, once=True) == 0
    text = screen.getvalue()
    assert all(part in text for part in (
        "finished", "running", "25.0 ± 2.0", "clip -/+", "\u2581", "Compute 7+5+2+8 | <b>", "[U+001B][31m",
        "r1: running, step 3 of 6",
    ))
    assert "\x1b[31m " not in text

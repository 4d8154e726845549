"""Lines that survive whatever stops the process, and text that cannot act."""

import os
import resource
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest

from r1kernels.train.errors import StorageError
from r1kernels.train.log import Console, StepLog, printable, read_lines


def make_stage(directory: Path, *trackers: str):
    """The part of a stage that a log needs."""
    directory.mkdir(parents=True, exist_ok=True)
    return SimpleNamespace(directory=directory, recipe=SimpleNamespace(trackers=list(trackers)))


def steps(path):
    return [line["step"] for line in read_lines(path)]


# ---- lines ----------------------------------------------------------------------------------------------------------


@pytest.mark.long(reason="test_resume kills whole runs and reads their lines")
def test_lines_survive_a_kill_and_come_once(tmp_path):
    code = (
        "import itertools, os, sys; from pathlib import Path; from types import SimpleNamespace\n"
        "from r1kernels.train.log import StepLog\n"
        "stage = SimpleNamespace(directory=Path(sys.argv[1]), recipe=SimpleNamespace(trackers=[]))\n"
        "first = int(sys.argv[2])\n"
        "log = StepLog(stage, first_step=first)\n"
        "parent = os.getppid()\n"
        "for step in itertools.takewhile(lambda _: os.getppid() == parent, itertools.count(first)):\n"
        "    log.write({'step': step, 'text': 'x' * 5000, 'examples': [{'completion': 'y'}] * 2})\n"
    )
    path, first = tmp_path / "metrics.jsonl", 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(first)])
        deadline = time.monotonic() + 300
        while not (found := steps(path)) or found[-1] < first + 20:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
        found = steps(path)
        assert found == list(range(len(found)))
        first = len(found) - 7  # as if the last checkpoint were some steps old
    with StepLog(make_stage(tmp_path), first_step=first) as log:
        log.write({"step": first})
    assert steps(path) == list(range(first + 1))
    assert steps(tmp_path / "samples.jsonl") == [step for step in range(first) for _ in range(2)]
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "samples.jsonl"]


@pytest.fixture
def limit_file_size():
    """Does what a full disk does: a write ends early, and the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_after_a_full_disk_the_log_goes_on(tmp_path, limit_file_size):
    path = tmp_path / "metrics.jsonl"
    with StepLog(make_stage(tmp_path), first_step=0) as log:
        log.write({"step": 0})
        limit_file_size(100)
        with pytest.raises(OSError):
            log.write({"step": 1, "text": "x" * 500})
        assert steps(path) == [0]
        limit_file_size(10)
        with pytest.raises(StorageError, match=r"metrics\.jsonl"):
            StepLog(make_stage(tmp_path), first_step=1)
        limit_file_size(resource.RLIM_INFINITY)
    with StepLog(make_stage(tmp_path), first_step=1) as log:
        log.write({"step": 1})
    assert steps(path) == [0, 1]


def test_a_half_written_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "lo')
    assert steps(path) == [0, 1]


def test_lines_are_json_for_every_reader(tmp_path):
    with StepLog(make_stage(tmp_path), first_step=0) as log:
        log.write({"step": 0, "loss": float("nan"), "parts": {"a": float("inf"), "b": [1.5, float("-inf")]},
                   "examples": [{"completion": "half \ud800, whole \u4e2d"}]})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": None, "parts": {"a": None, "b": [1.5, None]}}]
    assert read_lines(tmp_path / "samples.jsonl") == [{"step": 0, "completion": "half \ud800, whole \u4e2d"}]


def test_tensorboard_has_every_point_once_after_a_kill(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stage = make_stage(tmp_path / "r1_zero", "tensorboard")
    killed = StepLog(stage, first_step=0)  # never closed
    for step in range(6):
        killed.write({"step": step, "reward": step / 2, "nothing": None})
    events = tmp_path / "tensorboard" / "r1_zero"
    with open(next(events.iterdir()), "ab") as torn:
        torn.write(b"\x18\x00\x00")
    with StepLog(stage, first_step=4) as resumed:
        for step in range(4, 9):
            resumed.write({"step": step, "reward": step / 2})
    read = EventAccumulator(str(events))
    read.Reload()
    assert read.Tags()["scalars"] == ["reward"]
    assert [(point.step, point.value) for point in read.Scalars("reward")] == [(n, n / 2) for n in range(9)]


# ---- what a person sees ---------------------------------------------------------------------------------------------

HOSTILE = {
    "\x1b[2J": "[U+001B][2J", "\x1b]52;c;aGk=\x07": "[U+001B]]52;c;aGk=[U+0007]", "\x9b31m": "[U+009B]31m",
    "a\rb": "a[U+000D]b", "\x00\x7f": "[U+0000][U+007F]", "\u202eevil": "[U+202E]evil",
    "\u2066\u061c": "[U+2066][U+061C]",
    "in\u200bvisible\ufeff": "in[U+200B]visible[U+FEFF]", "\u00ad\u2060\U000e0041": "[U+00AD][U+2060][U+E0041]",
    "\ud800": "[U+D800]", "a\u2028b\u2029": "a[U+2028]b[U+2029]",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_spelt_out(text):
    assert printable(text) == HOSTILE[text]


def test_no_character_acts_on_a_terminal():
    """Controls, surrogates, separators of lines, and what changes the direction, of all that Unicode knows."""
    directions = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    left = [
        char for char in set(printable("".join(map(chr, range(sys.maxunicode + 1)))))
        if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(char) in directions
    ]
    assert sorted(left) == ["\t", "\n"]


def test_other_text_is_as_it_was():
    for text in ("", "x\ty\nz", "\u4f60\u597d,\u3000\u00fcber \u05e9\u05dc\u05d5\u05dd", "\U0001f600 e\u0301"):
        assert printable(text) == text
    assert printable("one\r\ntwo") == "one\ntwo" and printable(3) == "3"


LINE = {"step": 4, "pass_at_1": 0.125, "kl": None, "entropy": float("nan"), "clip_low_fraction": 0.1, "length": 7.25,
        "timing": {"tokens_per_second": 512.0, "total": 60.0}}


def test_a_step_is_one_line(capsys):
    Console().step("r1", LINE, 12)
    Console().step("r1", {**LINE, "step": 5, "loss": 0.5}, 12)
    first, second = capsys.readouterr().out.splitlines()  # lines are not wrapped
    for shown in ("r1", "4 of 12", "pass_at_1 0.125", "entropy nan", "length 7.25", "60.0 s", "7 minutes left"):
        assert shown in first
    assert "kl" not in first and "5 of 12" in second and "loss 0.5" in second and "6 minutes left" in second


def test_hostile_text_does_not_reach_the_terminal(capsys):
    hostile = "[bold]x[/bold] [link=http://evil]y[/link] \x1b]52;c;aGk=\x07 \u202e \x9b2J"
    Console().step(hostile, LINE, 10)
    Console().say(hostile, warning=True)
    text = capsys.readouterr().out
    assert "[bold]x[/bold]" in text and "[link=http://evil]" in text and "[U+001B]]52" in text
    assert not {"\x07", "\u202e", "\x9b", "\x1b"} & set(text)

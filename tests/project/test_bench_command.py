"""The command `r1kernels`, and `r1kernels bench` as a user calls it: arguments, messages, files."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import assert_document

from r1kernels import _command, _origin
from r1kernels.bench import cli, run, table


@pytest.mark.slow(reason="measures")
def test_a_few_cases_end_to_end(tmp_path: Path) -> None:
    names = ["cross_entropy", "group_advantages"]
    command = [sys.executable, "-m", "r1kernels", "bench", "--size", "small", "--threads", "1", "--device", "cpu",
               "--out", str(tmp_path / "out"), "--only", *names]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert_document(found)
    assert found["size"] == "small" and found["threads"] == 1 and found["device_type"] == "cpu"
    assert found["sources"] == _origin.sources_hash()
    assert {row["case"] for row in found["rows"]} == set(names)
    assert {"r1kernels", "torch eager", "ceiling: copy"} <= {row["implementation"] for row in found["rows"]}
    for row in found["rows"]:
        assert row["case"] in done.stdout and f"{row['implementation']} " in done.stdout
    missing = {entry["what"] for entry in found["left_out"]}
    assert "GPU" in missing and (tmp_path / "out" / "bench.html").exists() != ("the page of pictures" in missing)
    assert all(entry["why"] in done.stdout for entry in found["left_out"])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("arguments", [
    ("--seconds", "0"), ("--seconds", "-3"), ("--seconds", "nan"), ("--seconds", "soon"), ("--threads", "0"),
    ("--threads", "1.5"), ("--size", "huge"), ("--device", "tpu"), ("--only", "grpo_los"), ("--speed", "9"),
])
def test_bad_arguments_are_named(
    arguments: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, "--out", tmp_path, *arguments)
    assert all(word in said for word in arguments) and "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_an_unknown_case_lists_the_known_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "--out", tmp_path, "--only", "grpo_los")
    assert all(name in said.replace("\n", " ") for name in run.NAMES)


def test_a_wrong_argument_creates_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refusal(capsys, "--out", tmp_path / "out", "--only", "grpo_los")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [("--only", "grpo_loss"), ("--seconds", "9"), ("--size", "small")])
def test_parts_are_not_saved(arguments: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "--out", tmp_path / "out", "--save-results", *arguments)
    assert "--save-results" in said and arguments[0] in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["file", "file/folder"])
def test_a_folder_that_is_a_file(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    said = refusal(capsys, "--out", tmp_path / path)
    assert "--out" in said and str(tmp_path / path) in said


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    said = refusal(capsys, "--out", tmp_path)
    assert "--out" in said and "Read-only" in said


def test_a_gpu_that_is_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refusal(capsys, "--out", tmp_path, "--device", "cuda")
    assert "--device" in said and "'cuda'" in said


def test_results_are_saved_in_a_source_tree_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_origin, "in_source_tree", lambda: False)
    assert "--save-results" in refusal(capsys, "--out", tmp_path, "--save-results")


# ---- the table in the terminal ----------------------------------------------------------------------------------


def test_uncertain_times_are_marked() -> None:
    row = {"implementation": "r1kernels", "median_s": 1.0, "iqr_s": 0.1, "rounds": 3, "ratio": 1.0,
           "peak_extra_bytes": None, "max_error": 0.0}
    steady, few, wide = (table.of_rows("a case", [row | changed]).splitlines()[-1]
                         for changed in ({}, {"rounds": 2}, {"iqr_s": 0.3}))
    assert "10%" in steady and "unstable" not in steady
    assert "10%" in few and "unstable" in few and "30%" in wide and "unstable" in wide
    assert "ours in the same round" in table.of_rows("a case", [row])


# ---- the busy process -------------------------------------------------------------------------------------------


def running(pid: int) -> bool:
    """Not a process that has ended and that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a stopped process with its parent")
def test_the_busy_process_ends_with_its_parent() -> None:
    """It is stopped between measurements, and cannot see by itself that its parent was killed."""
    code = ("import time\nfrom r1kernels.bench.cases.busy import BusyProcess\nbusy = BusyProcess()\n"
            "busy.beside(lambda: None)()\nprint(busy.child.pid, flush=True)\ntime.sleep(600)")
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with parent:
        child = int(parent.stdout.readline())
        assert running(child)
        parent.kill()
    for _ in range(600):
        if not running(child):
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    raise AssertionError(f"process {child} outlives its parent")


# ---- the command of the package -------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("--help",), ("bench", "--help")])
def test_help_does_not_wait_for_torch(arguments: tuple[str, ...]) -> None:
    code = ("import sys\nfrom r1kernels._command import main\ntry:\n    main(sys.argv[1:])\n"
            "except SystemExit as stopped:\n    print(stopped.code, 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stdout.endswith("0 False\n"), done
    words = ("--seconds", "--save-results") if "bench" in arguments else ("train", "plan", "bench")
    assert all(word in done.stdout for word in words)


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        _command.main(list(arguments))
    return stopped.value.code


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("trian") == 2
    said = capsys.readouterr().err
    assert all(word in said for word in ("'trian'", "train", "plan", "bench"))


@pytest.mark.parametrize("name", ["train", "plan"])
def test_the_trainer_says_what_to_install(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == "tyro" else find(module))
    assert command(name, "recipe.yaml") == 2
    said = capsys.readouterr().err
    assert name in said and "tyro" in said and "'.[train]'" in said


def test_the_trainer_gets_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("train", "--help") == 0
    assert "--dry-run" in capsys.readouterr().out


def test_bench_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "main", lambda arguments: 7 if arguments == ["--size", "small"] else 0)
    assert command("bench", "--size", "small") == 7

"""`benchmarks/run_on_gpu.sh` without a GPU: which stages run in which order, and what the next command takes over."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu import __main__ as command
from gpu import progress
from gpu.progress import Progress
from gpu.setting import COPY, OURS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "run_on_gpu.sh"
KEY = ("token_stats", "statistics", "8192 x 151936", "bfloat16")

STUB = """#!/bin/sh
echo "$@" >>"$CALLS"
case "$*" in
*"$FAILS"*) exit 1 ;;
*"$SLEEPS"*) exec sleep 60 ;;
esac
"""


@pytest.fixture
def stub(tmp_path: Path) -> dict[str, str]:
    """An environment whose PYTHON writes down what it is asked for. In a rehearsal nothing is built."""
    path = tmp_path / "python"
    path.write_text(STUB)
    path.chmod(0o755)
    return {
        **os.environ, "PYTHON": str(path), "CALLS": str(tmp_path / "calls"), "FAILS": "none", "SLEEPS": "none",
        "R1KERNELS_GPU_REHEARSAL": "1",
    }


def calls(environment: dict[str, str]) -> list[str]:
    """The stages that ran: groups of gpu, and other programs by name. The build and its report are left out."""
    found = []
    for line in Path(environment["CALLS"]).read_text().splitlines():
        words = line.split()
        if words[:2] == ["-m", "gpu"]:
            found.append(words[2])
        elif words[0] == "-m" and words[1] != "r1kernels":
            found.append(words[1])
        elif words[0] == "benchmarks/tune.py":
            found.append("tune")
    return found


def run(out: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [SCRIPT, out, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def statuses(out: Path) -> dict[str, str]:
    lines = [line.split("\t") for line in (out / "stages.tsv").read_text().splitlines()]
    return {name: status for name, status, _, _ in lines}


def test_every_group_is_a_stage_and_the_most_telling_ones_fit_into_four_minutes() -> None:
    text = SCRIPT.read_text()
    stages = re.search(r"\nSTAGES=\((.*?)\)", text, re.DOTALL).group(1).split()
    share = {name: int(seconds) for name, seconds in re.findall(r"\[([\w-]+)\]=(\d+)", text)}
    assert set(share) == set(stages) and set(command.GROUPS) < set(stages)
    assert sum(share.values()) + int(re.search(r"REPORT=(\d+)", text).group(1)) == 570
    first = ["ceilings", "launches", "kernels", "step", "head", "tests-step", "racecheck"]
    assert stages[: len(first)] == first and sum(share[name] for name in first) <= 240


def test_chosen_stages_run_and_a_failure_is_told(tmp_path: Path, stub: dict[str, str]) -> None:
    out = tmp_path / "out"
    completed = run(out, "check", "logits", **stub | {"FAILS": "gpu check"})
    assert completed.returncode == 1 and "1 stages failed: check" in completed.stdout
    assert calls(stub) == ["check", "logits", "report"]
    assert "== logits: done" in (out / "log.txt").read_text()
    assert statuses(out) == {"check": "failed (1)", "logits": "done"}


def test_an_interrupted_run_still_reports(tmp_path: Path, stub: dict[str, str]) -> None:
    process = subprocess.Popen(
        [SCRIPT, tmp_path / "out", "ceilings", "rest"], env=stub | {"SLEEPS": "gpu ceilings"}, stdout=subprocess.PIPE,
        text=True,
    )
    while not (Path(stub["CALLS"]).exists() and "ceilings" in calls(stub)):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=600)
    assert process.returncode == 1 and "interrupted" in told
    assert calls(stub) == ["ceilings", "report"] and statuses(tmp_path / "out") == {"ceilings": "cut off"}


def test_the_next_command_begins_with_what_failed_and_repeats_nothing(tmp_path: Path, stub: dict[str, str]) -> None:
    out, later = tmp_path / "out", tmp_path / "later"
    assert run(out, **stub | {"FAILS": "gpu peers"}).returncode == 1
    ran = calls(stub)
    assert ran.index("launches") < ran.index("kernels") < ran.index("step") < ran.index("peers")
    (out / "results.jsonl").write_text('{"kind": "run"}\n')
    state = out / "stages.tsv"
    known = [line for line in state.read_text().splitlines() if not line.startswith("rest")]
    state.write_text("\n".join([*known, "tune\tcut off\t0\t1", "kernels\tout of time\t40\t1"]) + "\n")
    Path(stub["CALLS"]).unlink()
    run(later, "--resume", out, **stub)
    assert calls(stub) == ["kernels", "peers", "tune", "rest", "report"]
    assert (later / "results.jsonl").read_text() == '{"kind": "run"}\n'
    assert statuses(later)["peers"] == "done"
    Path(stub["CALLS"]).unlink()
    run(later, **stub)
    assert calls(stub) == ["report"]


def test_a_command_ends_within_its_seconds(tmp_path: Path, stub: dict[str, str]) -> None:
    """Of 18 seconds, 15 are for the report, and two stages share the others."""
    completed = run(tmp_path / "out", "--seconds", 18, "ceilings", "check", **stub | {"SLEEPS": "gpu c"})
    assert completed.returncode == 1
    assert set(statuses(tmp_path / "out").values()) == {"out of time"} and "report" in calls(stub)


@pytest.mark.parametrize("arguments, said", [
    (["walk"], "unknown stage walk"), (["--seconds", "15"], "--seconds is 15"), (["--seconds", "x"], "--seconds is x"),
    (["--resume", "/no/such/folder"], "--resume is /no/such/folder"),
])
def test_bad_arguments_are_refused(tmp_path: Path, stub: dict[str, str], arguments: list[str], said: str) -> None:
    completed = run(tmp_path, *arguments, **stub)
    assert completed.returncode == 2 and said in completed.stderr


@pytest.mark.parametrize("serves", [True, False])
def test_an_extension_that_was_built_elsewhere_is_used_if_it_serves(
    serves: bool, tmp_path: Path, stub: dict[str, str]
) -> None:
    stub["R1KERNELS_GPU_REHEARSAL"] = ""
    run(tmp_path / "out", "ceilings", **stub | {
        "R1KERNELS_PREBUILT": "1", "R1KERNELS_CUDA_ARCHS": "90a", "FAILS": "none" if serves else "cuda_missing",
    })
    built = [line for line in Path(stub["CALLS"]).read_text().splitlines() if line.startswith("setup.py")]
    assert built == ([] if serves else ["setup.py -q build_ext --inplace"])


def test_peers_come_from_a_folder(tmp_path: Path, stub: dict[str, str]) -> None:
    """Wheels by pip, and archives of unpacked wheels; the folder's name is what QuACK looks for."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "a-1-py3-none-any.whl").touch()
    (tmp_path / "peer.py").touch()
    subprocess.run(["tar", "-cJf", wheels / "b.tar.xz", "-C", tmp_path, "peer.py"], check=True)
    completed = run(tmp_path / "out", "peers", "ceilings", **stub | {"PEERS": str(wheels)})
    assert completed.returncode == 0, completed.stdout
    (line,) = [line for line in Path(stub["CALLS"]).read_text().splitlines() if line.startswith("-m pip")]
    assert "--no-index --no-deps" in line and line.endswith("a-1-py3-none-any.whl")
    target = Path(re.search(r"--target (\S+)", line).group(1))
    assert target.name == "site-packages" and not target.exists()


# ---- what one group remembers -----------------------------------------------------------------------------------


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Progress]:
    """Writes an attempt of a command: the candidate that was checked last, and how it ended."""
    def write(number: int, checking: str, end: str = "", **fields: bool) -> Progress:
        monkeypatch.setenv("R1KERNELS_GPU_COMMAND", str(number))
        made = Progress(tmp_path, "kernels", "5678")
        made.append("started", KEY)
        made.append("checking", KEY, candidate=checking)
        if end:
            made.append(end, KEY, **fields)
        return Progress(tmp_path, "kernels", "5678")

    return write


def test_a_finished_case_is_done_for_good(attempt: Callable[..., Progress], monkeypatch: pytest.MonkeyPatch) -> None:
    found = attempt(1, OURS, "finished", failed=False)
    assert not found.is_due(KEY)
    monkeypatch.setenv("R1KERNELS_GPU_COMMAND", "2")
    assert not found.is_due(KEY) and found.is_due(("another",))


@pytest.mark.parametrize("end", [{"end": "finished", "failed": True}, {"end": "stopped"}, {}])
def test_what_ours_did_not_finish_waits_for_the_next_command(
    end: dict[str, Any], attempt: Callable[..., Progress], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = attempt(1, OURS, **end)
    assert not found.is_due(KEY)
    monkeypatch.setenv("R1KERNELS_GPU_COMMAND", "2")
    assert found.is_due(KEY) and found.suspects(KEY) == {}


def test_a_peer_that_ended_an_attempt_is_left_out_of_the_next(attempt: Callable[..., Progress]) -> None:
    found = attempt(1, "a peer")
    assert found.is_due(KEY) and found.suspects(KEY) == {"a peer": progress.ENDED}
    again = attempt(1, COPY)
    assert not again.is_due(KEY) and set(again.suspects(KEY)) == {"a peer"}


@pytest.mark.parametrize("end", [{"end": "finished", "failed": True}, {"end": "stopped"}])
def test_a_peer_is_not_left_out_for_an_attempt_that_was_closed(
    end: dict[str, Any], attempt: Callable[..., Progress]
) -> None:
    assert attempt(1, "a peer", **end).suspects(KEY) == {}


def test_other_kernels_and_groups_are_others(attempt: Callable[..., Progress], tmp_path: Path) -> None:
    attempt(1, OURS, "finished", failed=False)
    assert Progress(tmp_path, "kernels", "9999").is_due(KEY) and Progress(tmp_path, "logits", "5678").is_due(KEY)

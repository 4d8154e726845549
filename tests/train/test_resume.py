"""A chain that was killed or interrupted, again and again, equals one that never stopped, bit for bit."""

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_cases import STAGES, Server, write_recipe
from rl_cases import equal, load_shards, timeless
from safetensors.torch import load_file

from r1kernels.train.checkpoint import latest_checkpoint
from r1kernels.train.cli import INTERRUPTED
from r1kernels.train.log import read_lines


@pytest.fixture(scope="module")
def server():
    made = Server()
    yield made
    made.close()


@pytest.fixture(scope="module")
def full(request):
    """Whether to try many moments."""
    return request.config.getoption("--full", default=False)


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that a chain leaves and that does not depend on when it ran: by file, as bytes or as values."""
    found: dict[str, Any] = {}
    for path in sorted(run_dir.rglob("*")):
        name = path.relative_to(run_dir).as_posix()
        if not path.is_file() or (
            path.parent == run_dir and (path.name.startswith((".", "report.", "config.")) or path.suffix == ".png")
        ):
            continue
        if path.name == "state.pt":
            found[name] = timeless(torch.load(path, weights_only=True))
        elif path.suffix == ".jsonl":
            found[name] = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif name == "manifest.json":
            found[name] = timeless(json.loads(path.read_text()))
        elif path.name == ".metadata":  # of shards, with names of storage that are random
            found[name] = load_shards(path.parents[1])
        elif path.suffix == ".distcp":
            found[name] = None
        else:
            found[name] = path.read_bytes()
    return found


def assert_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not equal(first[name], second[name])] == []


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    run_dir, started = folder / "run", time.monotonic()
    assert server.run(write_recipe(folder, run_dir), run_dir) == 0, (folder / "run.out").read_text()
    found = outcome(run_dir)
    assert set(found["manifest.json"]["stages"]) == set(STAGES)
    # A comparison of runs in which nothing happens would prove nothing.
    lines = read_lines(run_dir / "rl" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert {line["step"] for line in lines if "pass_at_1" in line} == {0, 2, 4}
    assert all(line["zero_spread"] < 1 and line["kl"] > 0 for line in lines[:4])
    assert [line["limit"] for line in lines[:4]] == [6, 6, 8, 8]
    assert "reward_scores" in read_lines(run_dir / "r1" / "metrics.jsonl")[1]
    weights = [load_file(latest_checkpoint(run_dir / name) / "model" / "model.safetensors")
               for name in ("base", "rl", "cold", "r1", "ppo", "small")]
    assert not any(equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    return {"found": found, "seconds": time.monotonic() - started}


@pytest.mark.slow(reason="runs a chain of all stages again and again")
def test_stopped_at_random_moments(whole, server, tmp_path, full):
    """While it lasts, one run is stopped and continues; if it ends before the last stop, another begins. Files of data
    are known by their content, so the other folder changes nothing.

    Two of three times it is killed before an operation on files, counted in the process. The others are signals from
    outside after a time: SIGKILL, and SIGTERM, after which it stops at a safe point.
    """
    rng, where, runs, stops = random.Random(1), [], 0, 20 if full else 2
    longest = (90, whole["seconds"] / 8) if full else (300, whole["seconds"] / 2)  # operations, seconds
    while len(where) < stops:
        runs += 1
        run_dir = tmp_path / str(runs) / "run"
        run_dir.parent.mkdir()
        recipe = write_recipe(run_dir.parent, run_dir)
        while True:
            number = signal.SIGKILL
            if len(where) == stops:
                server.start(recipe, run_dir)
            elif len(where) % 3:
                server.start(recipe, run_dir, kill_at=rng.randint(10, longest[0]))
            else:
                number = signal.SIGTERM if len(where) % 2 else signal.SIGKILL
                send_at_work(server.start(recipe, run_dir), number, run_dir, rng.uniform(0, longest[1]))
            status = server.wait()
            if status == 0:
                break
            # SIGTERM may find a process that has not yet begun or is already ending.
            assert status in (-number, INTERRUPTED), run_dir.with_suffix(".out").read_text()
            where.append(at_work(run_dir))
        assert_equal(outcome(run_dir), whole["found"])
    assert not full or len(set(where)) > 4, where


def send_at_work(process: int, number: signal.Signals, run_dir: Path, delay: float) -> None:
    """Sends a signal to a run, some seconds after it has begun to change files, unless it ends before that."""
    before = snapshot(run_dir)
    with contextlib.suppress(ProcessLookupError):
        while snapshot(run_dir) == before:
            os.kill(process, 0)
            time.sleep(0.002)
        time.sleep(delay)
        os.kill(process, number)


def snapshot(run_dir: Path) -> list[tuple[str, int]]:
    """Names and sizes of the files of a run."""
    found = []
    for path in run_dir.rglob("*"):
        with contextlib.suppress(OSError):
            found.append((str(path), path.stat().st_size))
    return sorted(found)


def at_work(run_dir: Path) -> str:
    """The last stage that was begun."""
    try:
        return list(json.loads((run_dir / "manifest.json").read_text())["stages"])[-1]
    except FileNotFoundError:
        return ""


@pytest.mark.long(reason="a chain of all stages twice")
def test_a_full_disk_is_named_and_costs_nothing(whole, server, tmp_path):
    """From any operation on files on, in any stage; with room again, the run continues."""
    run_dir, rng, where = tmp_path / "run", random.Random(3), []
    recipe, output = write_recipe(tmp_path, run_dir), tmp_path / "run.out"
    moments = [*range(1, 9), *(rng.randint(10, 60) for _ in range(8))]
    for full_at in (*moments, 0):
        output.unlink(missing_ok=True)
        status, text = server.run(recipe, run_dir, full_at=full_at), output.read_text()
        if status == 0:
            break
        message = text.splitlines()[-1]
        assert status == 1 and "Traceback" not in text and message.startswith("r1kernels: "), text
        assert "No space left on device" in message and str(run_dir) in message, text
        where.append(at_work(run_dir))
    assert status == 0 and len(where) >= len(moments) // 2, text
    assert_equal(outcome(run_dir), whole["found"])

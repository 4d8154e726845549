"""A chain that was stopped or killed, again and again, equals one that never stopped, bit for bit."""

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
from resume_cases import STAGES, Server, use_parity, write_recipe
from safetensors.torch import load_file

from r1kernels.train import run as run_module
from r1kernels.train.checkpoint import latest_checkpoint
from r1kernels.train.config import load_recipe
from r1kernels.train.interrupt import Interrupt
from r1kernels.train.metrics import MetricsLog, read_metrics
from r1kernels.train.rewards import REWARDS
from r1kernels.train.run import INTERRUPTED
from r1kernels.train.stages import reject

# Three of five before an operation on a file, counted in the process, the others after a time, from outside.
KILLS = 20


@pytest.fixture(scope="module", autouse=True)
def surroundings():
    threads, reward, filters = torch.get_num_threads(), REWARDS["format"], reject.reject
    use_parity()
    yield
    REWARDS["format"], reject.reject = reward, filters
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def server():
    made = Server()
    yield made
    made.close()


def timeless(value: Any) -> Any:
    """Without what depends on the clock."""
    if isinstance(value, dict):
        return {
            key: timeless(item) for key, item in value.items()
            if not str(key).startswith("seconds") and key != "tokens_per_second"
        }
    return [timeless(item) for item in value] if isinstance(value, list | tuple) else value


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second) and first.dtype == second.dtype
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return type(first) is type(second) and (first == second or (first != first and second != second))


def outcome(run_dir: Path) -> dict[str, Any]:
    """Everything that a chain leaves and that should not depend on when it ran: by file, as bytes or as values."""
    found: dict[str, Any] = {}
    for path in sorted(run_dir.rglob("*")):
        name = path.relative_to(run_dir).as_posix()
        if not path.is_file() or path.name in (".lock", "timings.jsonl", "config.yaml", "curves.png") or (
            path.name.startswith("report.") and path.parent == run_dir
        ):
            continue
        if path.name == "state.pt":
            found[name] = timeless(torch.load(path, weights_only=True))
        elif name == "manifest.json":
            found[name] = timeless(json.loads(path.read_text()))
        elif path.name == "manifest.json":  # of a checkpoint, with the hash of a state that holds seconds
            found[name] = {**json.loads(path.read_text()), "files": None}
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
    recipe = write_recipe(folder, run_dir)
    server.start(recipe, run_dir)
    assert server.wait() == 0, (folder / "run.out").read_text()
    found = outcome(run_dir)
    assert tuple(found["manifest.json"]["stages"]) == STAGES
    # A comparison of runs in which nothing happens would prove nothing.
    lines = read_metrics(run_dir / "rl" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert {line["step"] for line in lines if "pass_at_1" in line} == {0, 2, 4}
    assert all(line["zero_spread"] < 1 and line["kl"] > 0 for line in lines[:4])
    assert [line["limit"] for line in lines[:4]] == [6, 6, 8, 8]
    assert "reward_scores" in read_metrics(run_dir / "r1" / "metrics.jsonl")[1]
    weights = [load_file(latest_checkpoint(run_dir / name) / "model" / "model.safetensors")
               for name in ("base", "rl", "cold", "r1", "ppo", "small")]
    assert not any(equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    return {"found": found, "seconds": time.monotonic() - started, "out": (folder / "run.out").read_text()}


def test_the_same_seed_makes_the_same_run(whole, server, tmp_path):
    recipe = write_recipe(tmp_path, tmp_path / "run")
    server.start(recipe, tmp_path / "run")
    assert server.wait() == 0
    found = outcome(tmp_path / "run")
    # Data sets are known by what they hold, so another folder for them changes nothing.
    assert_equal(found, whole["found"])


def test_killed_at_20_random_moments(whole, server, tmp_path):
    """While it lasts, one run is killed and goes on; when it ends all the same, another begins."""
    rng, where, runs = random.Random(1), [], 0
    while len(where) < KILLS:
        runs += 1
        run_dir = tmp_path / str(runs) / "run"
        run_dir.parent.mkdir()
        recipe = write_recipe(run_dir.parent, run_dir)
        while True:
            if len(where) == KILLS:
                server.start(recipe, run_dir)
            elif len(where) % 5 in (0, 2, 4):
                server.start(recipe, run_dir, kill_at=rng.randint(10, 90))
            else:
                delay = rng.uniform(0, whole["seconds"] / 10)
                send_at_work(server.start(recipe, run_dir), signal.SIGKILL, run_dir, delay)
            status = server.wait()
            if status == 0:
                break
            assert status == -signal.SIGKILL, run_dir.with_suffix(".out").read_text()
            where.append(at_work(run_dir))
        assert_equal(outcome(run_dir), whole["found"])
    assert len(set(where)) > 4, where


def send_at_work(process: int, number: signal.Signals, run_dir: Path, delay: float) -> None:
    """Sends a signal to a run, some seconds after it has begun to change files, unless it ends before that."""
    before = snapshot(run_dir)
    with contextlib.suppress(ProcessLookupError):
        while snapshot(run_dir) == before:
            os.kill(process, 0)  # still there?
            time.sleep(0.002)
        time.sleep(delay)
        os.kill(process, number)


def snapshot(run_dir: Path) -> list[tuple[str, int]]:
    """Names and sizes of what is in a run."""
    found = []
    for path in run_dir.rglob("*"):
        try:
            found.append((str(path), path.stat().st_size))
        except OSError:
            continue
    return sorted(found)


def at_work(run_dir: Path) -> str:
    """The last stage that was begun."""
    try:
        return list(json.loads((run_dir / "manifest.json").read_text())["stages"])[-1]
    except FileNotFoundError:
        return ""


def test_stopped_by_signals_and_continued(whole, server, tmp_path):
    """At a safe place, in whatever stage; the command to go on is printed."""
    run_dir, rng, stops = tmp_path / "run", random.Random(2), 0
    recipe = write_recipe(tmp_path, run_dir)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGINT, None):
        process = server.start(recipe, run_dir)
        if number is None:
            break
        send_at_work(process, number, run_dir, rng.uniform(0, whole["seconds"] / 6))
        status = server.wait()
        # The signal may find the run finished, or not yet begun or already ending, where it ends the process.
        assert status in (0, INTERRUPTED, -number), (tmp_path / "run.out").read_text()
        stops += status == INTERRUPTED
    assert server.wait() == 0, (tmp_path / "run.out").read_text()
    text = (tmp_path / "run.out").read_text()
    assert 1 <= text.count(f"go on with: r1kernels train {run_dir / 'config.yaml'}") <= stops
    assert text.count("stopping at the next safe place") >= 1
    assert_equal(outcome(run_dir), whole["found"])


class StopAfter(Interrupt):
    """Asks to stop at the n-th check, as a signal just before it would."""

    patience = 0

    def __init__(self) -> None:
        super().__init__()
        self.left = self.patience

    def check(self) -> None:
        self.left -= 1
        if self.left <= 0:
            self.requested = "SIGINT"
        super().check()


def test_stopped_at_any_safe_place_of_a_rollout(whole, tmp_path, monkeypatch):
    """Between an evaluation and its rollout, without a rollout, before its first update, and between two updates."""
    run_dir = tmp_path / "run"
    recipe = load_recipe(write_recipe(tmp_path, run_dir))
    two = [stage for stage in recipe.stages if stage.name in ("base", "rl")]
    recipe = type(recipe)(**{**vars(recipe), "stages": tuple(two)})
    monkeypatch.setattr(run_module, "Interrupt", StopAfter)
    rng, seen, stops = random.Random(0), set(), 0
    while True:
        # Twice within pre-training; then a rollout with its log-probs begins again when stopped before their end.
        StopAfter.patience = 3 if stops < 2 else rng.randint(3, 26)
        if run_module.train(recipe, plain=True) == 0:
            break
        stops += 1
        path = latest_checkpoint(run_dir / "rl")
        if path is not None:
            state = torch.load(path / "state.pt", weights_only=True)
            seen.add((state["minibatch"], state["rollout"] is not None))
            seen.add("evaluated" if "pass_at_1" in state["measured"] and state["rollout"] is None else "")
        assert stops < 100
    assert {"evaluated", (0, False), (0, True), (1, True)} <= seen
    found = {name: value for name, value in outcome(run_dir).items() if name != "manifest.json"}
    assert_equal(found, {name: whole["found"][name] for name in found})


def test_a_full_disk_is_named_and_costs_nothing(whole, server, tmp_path):
    """From any operation on files on, in any stage; with room again, the run goes on."""
    run_dir, rng, where = tmp_path / "run", random.Random(3), []
    recipe, output = write_recipe(tmp_path, run_dir), tmp_path / "run.out"
    for full_at in (*range(1, 9), *(rng.randint(10, 60) for _ in range(8)), 0):
        output.unlink(missing_ok=True)
        server.start(recipe, run_dir, full_at=full_at)
        status, text = server.wait(), output.read_text()
        if status == 0:
            break
        message = text.splitlines()[-1]
        assert status == 1 and "Traceback" not in text and message.startswith("r1kernels: "), text
        assert "No space left on device" in message and str(run_dir) in message, text
        where.append(at_work(run_dir))
    assert status == 0 and len(where) > 8, text
    assert_equal(outcome(run_dir), whole["found"])


def test_more_steps_continue_as_if_there_had_been_as_many_from_the_start(whole, server, tmp_path):
    run_dir = tmp_path / "run"
    recipe = write_recipe(tmp_path, run_dir)
    text = recipe.read_text()
    recipe.write_text(text.replace("problems: [sums], steps: 4", "problems: [sums], steps: 2"))
    server.start(recipe, run_dir)
    assert server.wait() == 0
    recipe.write_text(text)
    server.start(recipe, run_dir)
    assert server.wait() == 0, (tmp_path / "run.out").read_text()
    assert "rl: continue: stage.steps: 2 -> 4" in (tmp_path / "run.out").read_text()
    found = {name: value for name, value in outcome(run_dir).items() if not name.startswith("superseded/")}
    assert_equal(found, whole["found"])


def test_log_drops_what_will_be_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    with MetricsLog(path, first_step=1) as log:
        log.write({"step": 1, "loss": float("nan")})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 0}, {"step": 1, "loss": None}]


def test_signals_wait_for_a_safe_place_and_the_second_does_not():
    with Interrupt() as interrupt:
        interrupt.check()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

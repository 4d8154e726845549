"""A run that was stopped and resumed equals one that never stopped, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from r1kernels.train import run as run_module
from r1kernels.train.checkpoint import latest_checkpoint
from r1kernels.train.config import load_config
from r1kernels.train.interrupt import Interrupt
from r1kernels.train.metrics import MetricsLog, read_metrics
from r1kernels.train.rewards import REWARDS, Reward

RECIPE = """
run_dir: {run_dir}
seed: 3
threads: 1
model:
  tiny: {{hidden_size: 16, intermediate_size: 32, layers: 1, heads: 2}}
pretrain: {{steps: 6, batch_size: 2, window: 64}}
data: {{min_terms: 2, max_terms: 3, train_size: 16}}
reward: {{parts: {{accuracy: 1.0, format: 1.0}}}}
grpo:
  steps: 4
  questions: 4
  group_size: 4
  minibatches: 2
  micro_batch_size: 6
  learning_rate: 1.0e-3
  warmup_updates: 4
  max_new_tokens: 6
  ref_refresh_every: 2
  objective: {{preset: r1, options: {{entropy_coef: 0.001}}}}
eval: {{every: 2, questions: 4, samples: 2, batch_size: 4}}
checkpoint: {{every: 3, pretrain_every: 4, keep: 1}}
"""
TIMES = ("seconds", "tokens_per_second")


def parity(sample) -> float:
    """A reward that even a model of noise gets half of the time, so that there are advantages."""
    return float(sum(map(ord, sample.completion)) % 2)


@pytest.fixture(scope="module", autouse=True)
def surroundings():
    threads, format_reward = torch.get_num_threads(), REWARDS["format"]
    REWARDS["format"] = Reward(score=parity)
    yield
    REWARDS["format"] = format_reward
    torch.set_num_threads(threads)


def recipe(run_dir: Path) -> Path:
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    path = run_dir.parent / f"{run_dir.name}.yaml"
    path.write_text(RECIPE.format(run_dir=run_dir))
    return path


def outcome(run_dir: Path) -> dict:
    """Everything a run leaves that should not depend on when it ran."""
    logs = {}
    for name in ("metrics.jsonl", "samples.jsonl", "base/metrics.jsonl"):
        logs[name] = [
            {key: value for key, value in line.items() if not key.startswith(TIMES)}
            for line in read_metrics(run_dir / name)
        ]
    weights = load_file(latest_checkpoint(run_dir) / "model" / "model.safetensors")
    state = torch.load(latest_checkpoint(run_dir) / "state.pt", weights_only=True)
    return {"logs": logs, "weights": weights, "optimizer": state["optimizer"], "reference": state["reference"]}


def assert_equal(first: dict, second: dict) -> None:
    assert first["logs"] == second["logs"]
    assert str(first["optimizer"]["param_groups"]) == str(second["optimizer"]["param_groups"])
    for key in ("weights", "reference"):
        assert first[key].keys() == second[key].keys()
        assert all(torch.equal(first[key][name], second[key][name]) for name in first[key])
    for index, state in first["optimizer"]["state"].items():
        assert all(torch.equal(value, second["optimizer"]["state"][index][name]) for name, value in state.items())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run_module.train(load_config(recipe(run_dir)), plain=True) == 0
    result = outcome(run_dir)
    lines = result["logs"]["metrics.jsonl"]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert {line["step"] for line in lines if "pass_at_1" in line} == {0, 2, 4}
    # A comparison of runs in which nothing happens would prove nothing.
    assert all(line["zero_spread"] < 1 and line["kl"] > 0 for line in lines[:4])
    assert not all(torch.equal(a, b) for a, b in zip(result["weights"].values(), _base_weights(run_dir), strict=True))
    return result


def _base_weights(run_dir: Path):
    return load_file(latest_checkpoint(run_dir / "base") / "model" / "model.safetensors").values()


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


def test_stopped_again_and_again(uninterrupted, tmp_path, monkeypatch):
    config = load_config(recipe(tmp_path / "run"))
    monkeypatch.setattr(run_module, "Interrupt", StopAfter)
    rng = random.Random(0)
    seen, stops = set(), 0
    while True:
        # Twice within pre-training; then a rollout with its log-probs takes 14 checks, and begins again when stopped
        # before their end.
        StopAfter.patience = 3 if stops < 2 else rng.randint(1, 22)
        if run_module.train(config, resume=stops > 0, plain=True) == 0:
            break
        stops += 1
        path = latest_checkpoint(tmp_path / "run")
        if path is not None:
            state = torch.load(path / "state.pt", weights_only=True)
            seen.add((state["minibatch"], state["rollout"] is not None))
            seen.add("evaluated" if "pass_at_1" in state["measured"] and state["rollout"] is None else "")
        assert stops < 200
    # Between an evaluation and its rollout, without a rollout, before its first update, and between two updates.
    assert {"evaluated", (0, False), (0, True), (1, True)} <= seen
    assert_equal(outcome(tmp_path / "run"), uninterrupted)


def start(run_dir: Path, *flags: str) -> subprocess.Popen:
    code = """
import test_train_resume as here
from r1kernels.train.cli import main
here.REWARDS["format"] = here.Reward(score=here.parity)
main()
"""
    command = [sys.executable, "-c", code, "train", str(recipe(run_dir)), "--plain", *flags]
    here = Path(__file__).parent
    return subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_then_terminated(uninterrupted, tmp_path):
    run_dir = tmp_path / "run"
    process = start(run_dir)
    wait_for(lambda: (run_dir / "base" / "checkpoints").exists(), process)
    process.kill()
    process.communicate()
    process = start(run_dir, "--resume")
    wait_for(lambda: len(read_metrics(run_dir / "metrics.jsonl")) >= 1, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    # The run is short: the signal may find it finished.
    assert process.returncode in (0, run_module.INTERRUPTED), output
    if process.returncode:
        assert "--resume" in output
    assert run_module.train(load_config(recipe(run_dir)), resume=True, plain=True) == 0
    assert_equal(outcome(run_dir), uninterrupted)


def test_resuming_a_finished_run_changes_nothing_and_more_steps_continue_it(uninterrupted, tmp_path):
    path = recipe(tmp_path / "run")
    short = load_config(path, ["grpo.steps=2"])
    assert run_module.train(short, plain=True) == 0
    before = outcome(tmp_path / "run")
    assert run_module.train(short, resume=True, plain=True) == 0
    assert_equal(outcome(tmp_path / "run"), before)
    assert run_module.train(load_config(path), resume=True, plain=True) == 0
    assert_equal(outcome(tmp_path / "run"), uninterrupted)


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

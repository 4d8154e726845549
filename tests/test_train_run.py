"""The commands: what they leave, what they refuse, and what they say when something is wrong."""

import io
import json

import pytest
import torch
import yaml
from rich.console import Console as RichConsole

from r1kernels.train import console as console_module
from r1kernels.train import grpo, pretrain, tiny
from r1kernels.train import run as run_module
from r1kernels.train.cli import main
from r1kernels.train.config import load_config
from r1kernels.train.console import Console
from r1kernels.train.grpo import TrainingError
from r1kernels.train.metrics import read_metrics
from r1kernels.train.rewards import Scores

SETTINGS = {
    "seed": 0,
    "threads": 1,
    "model": {"tiny": {"hidden_size": 16, "intermediate_size": 16, "layers": 1, "heads": 1}},
    "pretrain": {"steps": 2, "batch_size": 1, "window": 64},
    "data": {"min_terms": 2, "max_terms": 3, "train_size": 8},
    "grpo": {"steps": 2, "questions": 2, "group_size": 2, "minibatches": 2, "max_new_tokens": 4},
    "eval": {"every": 1, "questions": 2, "samples": 2},
}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "runs" / "it"), **SETTINGS}))
    return path


def command(*arguments) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


def test_train_eval_and_report(recipe, tmp_path, capsys):
    run_dir = tmp_path / "runs" / "it"
    assert command("train", recipe, "--plain") == 0
    output = capsys.readouterr().out
    for name in ("metrics.jsonl", "curves.png", "report.md"):
        assert (run_dir / name).stat().st_size > 0
        assert str(run_dir / name) in output
    assert f"r1kernels eval {run_dir}" in output
    text = (run_dir / "report.md").read_text()
    assert "| pass@1 ± standard error |" in text and "## Samples before (step 0)" in text
    assert "transformers" in text and "group_size: 2" in text
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")

    last = read_metrics(run_dir / "metrics.jsonl")[-1]
    for path in (run_dir, run_dir / "checkpoints" / "step-000002"):
        assert command("eval", path) == 0
        assert f"pass@1 {last['pass_at_1']:.1%} ± {last['pass_at_1_se']:.1%}" in capsys.readouterr().out
    assert command("eval", run_dir / "base", "--set", "eval.samples=3") == 0
    assert "2 questions x 3 samples" in capsys.readouterr().out

    (run_dir / "report.md").unlink()
    assert command("report", run_dir) == 0
    assert (run_dir / "report.md").read_text() == text


@pytest.mark.parametrize("line", ["{oops", "3", "{}", '{"step": "one"}', "\udcff"])
def test_a_damaged_log_is_named(recipe, tmp_path, line):
    run_dir = tmp_path / "runs" / "it"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(recipe.read_text())
    (run_dir / "metrics.jsonl").write_text(f'{{"step": 0}}\n{line}\n', errors="surrogateescape")
    for verb in (["report", run_dir], ["train", recipe, "--plain", "--resume", "--set", "pretrain.steps=2"]):
        message = command(*verb)
        assert message.startswith(f"r1kernels: {run_dir / 'metrics.jsonl'}, line 2: damaged: ") and "\n" not in message


def test_a_report_needs_a_run_and_a_place(recipe, tmp_path):
    run_dir = tmp_path / "runs" / "it"
    assert command("report", run_dir) == f"r1kernels: {run_dir} holds no run: no config.yaml in it"
    (run_dir / "report.md").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(recipe.read_text())
    assert f"the report of {run_dir} cannot be written: {run_dir / 'report.md'}: " in command("report", run_dir)


def test_a_run_is_not_lost_by_accident(recipe, tmp_path):
    run_dir = tmp_path / "runs" / "it"
    assert f"--resume: {run_dir} holds no run" in command("train", recipe, "--plain", "--resume")
    assert command("train", recipe, "--plain") == 0
    assert "give --resume or --overwrite" in command("train", recipe, "--plain")
    assert "expected at most one" in command("train", recipe, "--plain", "--resume", "--overwrite")
    message = command("train", recipe, "--plain", "--resume", "--set", "seed=1", "grpo.steps=3")
    assert "settings differ" in message and "seed: 0 -> 1" in message and "grpo.steps" not in message
    assert len(read_metrics(run_dir / "metrics.jsonl")) == 3
    # Refused before the old run is deleted.
    unknown = "reward.parts={accuracy: 1, charm: 1}"
    assert "unknown reward 'charm'" in command("train", recipe, "--plain", "--overwrite", "--set", unknown)
    assert len(read_metrics(run_dir / "metrics.jsonl")) == 3
    assert command("train", recipe, "--plain", "--overwrite", "--set", "grpo.steps=1") == 0
    assert len(read_metrics(run_dir / "metrics.jsonl")) == 2


def test_a_directory_that_is_no_run_is_left_alone(recipe, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    message = command("train", recipe, "--plain", "--overwrite", "--set", f"run_dir={precious}")
    assert "holds files that are not a run's" in message
    assert (precious / "thesis.tex").exists()
    assert "is a file" in command("train", recipe, "--set", f"run_dir={precious / 'thesis.tex'}")
    assert "neither a run nor a checkpoint" in command("eval", precious)


@pytest.fixture
def model_dir(recipe, tmp_path):
    assert command("train", recipe, "--plain", "--set", "grpo.steps=1") == 0
    return tmp_path / "runs" / "it" / "checkpoints" / "step-000001" / "model"


def test_models_and_data_are_checked_before_work(recipe, model_dir, tmp_path):
    path = ["--set", f"run_dir={tmp_path / 'new'}", "model.tiny=null", "pretrain=null"]
    message = command("train", recipe, "--plain", *path, f"model.path={tmp_path / 'nowhere'}")
    assert "nowhere' is not a directory" in message
    for file in model_dir.glob("tokenizer*"):
        file.unlink()
    message = command("train", recipe, "--plain", *path, f"model.path={model_dir}")
    assert "has no tokenizer" in message and "\n" not in message and not message.endswith(":")
    missing = [f"model.path={model_dir}", "data={kind: gsm8k, path: nope.jsonl, test_path: nope.jsonl}"]
    assert "nope.jsonl" in command("train", recipe, "--plain", *path, *missing)
    message = command("train", recipe, "--plain", "--set", f"run_dir={tmp_path / 'new'}", "data.train_size=4096")
    assert "'data.train_size' is 4096, expected at most" in message
    assert not (tmp_path / "new").exists()


def test_a_device_that_is_not_there_is_refused_before_work(recipe, tmp_path):
    message = command("train", recipe, "--plain", "--set", "model.device=meta")
    assert message.startswith("r1kernels: 'model.device' is 'meta', which cannot be used here: ")
    if not torch.cuda.is_available():
        message = command("train", recipe, "--plain", "--set", "model.device=cuda")
        assert "'model.device' is 'cuda', which cannot be used here: " in message
    assert not (tmp_path / "runs").exists()


def test_a_model_directory_trains_like_a_tiny_one(recipe, model_dir, tmp_path):
    new = tmp_path / "new"
    settings = [f"run_dir={new}", "model.tiny=null", "pretrain=null", f"model.path={model_dir}", "grpo.open_think=true"]
    assert command("train", recipe, "--plain", "--set", *settings) == 0
    assert len(read_metrics(new / "metrics.jsonl")) == 3


def test_a_loss_that_is_not_finite_stops_the_run(recipe, monkeypatch):
    def poisoned(*arguments, **keywords):
        return {"loss": float("nan"), "ratio_deviation": 0.0}

    monkeypatch.setattr(grpo, "minibatch_gradient", poisoned)
    with pytest.raises(TrainingError, match="step 0, minibatch 0: loss nan"):
        run_module.train(load_config(recipe), plain=True)


def test_a_first_ratio_other_than_1_stops_the_run(recipe, monkeypatch):
    real = grpo.rollout_logprobs
    monkeypatch.setattr(grpo, "rollout_logprobs", lambda *a, **k: real(*a, **k) - 0.1)
    with pytest.raises(TrainingError, match=r"differs from 1 by 0\.11 before any update"):
        run_module.train(load_config(recipe), plain=True)


class Unscorable:
    """A scorer whose every second sample timed out."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def score(self, samples):
        values = [float("nan") if index % 2 else 1.0 for index in range(len(samples))]
        return Scores({"accuracy": values}, values, timeouts=len(samples) // 2)


def test_unscorable_samples_and_idle_steps_are_shown(recipe, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run_module, "make_scorer", lambda config: Unscorable())
    assert run_module.train(load_config(recipe, ["grpo.steps=5"]), plain=True) == 0
    output = capsys.readouterr().out
    assert "step 0: 2 samples could not be scored (2 timeouts, 0 crashes)" in output
    assert "for 5 steps all samples of every group have had the same reward" in output
    lines = read_metrics(tmp_path / "runs" / "it" / "metrics.jsonl")
    assert all(line["unscorable"] == 2 and line["zero_spread"] == 1 for line in lines[:5])
    # Nothing to learn from, and the policy is its own reference: the weights stay where they are.
    assert all(line["loss"] == 0 for line in lines[:5])
    assert "Unscorable samples: 10 (10 timeouts, 0 crashes)" in (tmp_path / "runs" / "it" / "report.md").read_text()


def test_the_live_table_shows_a_step(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        console_module, "RichConsole", lambda: RichConsole(file=screen, force_terminal=True, width=100, height=50)
    )
    terminal = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})
    monkeypatch.setattr(console_module.sys, "stdout", terminal())
    with Console() as console:
        console.pretraining(1, 2, 3.5)
        console.samples([("Compute 1+1", " <think>[b]2</think>", 2.0)])
        console.step({"step": 0, "pass_at_1": 0.125, "length": 17.25, "reward_accuracy": 0.5}, 4)
    text = screen.getvalue()
    assert all(part in text for part in ("pass@1", "12.5%", "17.2", "[b]2", "Compute 1+1", "step 1/4"))


def test_pretraining_scores_whole_rows(recipe, monkeypatch):
    """Of a row of hidden states the next token, and no slice of them: its gradient would be copied."""
    real, seen = pretrain.r1kernels.linear_cross_entropy, []

    def recording(hidden, *, targets, **head):
        seen.append((hidden.shape[:2], hidden.is_contiguous(), targets))
        return real(hidden, targets=targets, **head)

    monkeypatch.setattr(pretrain.r1kernels, "linear_cross_entropy", recording)
    assert run_module.train(load_config(recipe, ["grpo.steps=1"]), plain=True) == 0
    shape, contiguous, targets = seen[0]
    assert shape == targets.shape == (1, 64) and contiguous
    config = load_config(recipe)
    tokenizer = tiny.make_tokenizer(config.pretrain.corpus, config.data.max_terms, config.seed)
    batch = tiny.corpus_batch(tokenizer, config.pretrain, config.data.max_terms, config.seed, 0)
    assert torch.equal(targets[:, :-1], batch["targets"][:, 1:]) and (targets[:, -1] == -100).all()


def test_metrics_are_json_for_every_reader(recipe, tmp_path):
    assert command("train", recipe, "--plain", "--set", "eval.questions=1") == 0  # one question: no standard error
    text = (tmp_path / "runs" / "it" / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in text.splitlines()]
    assert lines[0]["pass_at_1_se"] is None

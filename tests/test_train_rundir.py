"""Run directories: nothing that is not a run's is ever deleted, one process works in each, and they can be moved."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_train_run import SETTINGS, command

from r1kernels.train import run as run_module
from r1kernels.train.config import dump_config, load_config
from r1kernels.train.metrics import read_metrics
from r1kernels.train.rundir import CONFIG, claim, is_run
from r1kernels.train.schema import ConfigError


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run_dir(tmp_path):
    """What a run leaves, without having run."""
    path = tmp_path / "runs" / "it"
    for name in (
        ".lock", "metrics.jsonl", ".samples.jsonl", "report.md", "base/metrics.jsonl",
        "checkpoints/.writing-step-000002/model/",
        "checkpoints/step-000001/model/config.json", "checkpoints/step-000001/state.pt",
    ):
        file = path / name
        (file if name.endswith("/") else file.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            file.write_text("")
    (path / CONFIG).write_text(yaml.safe_dump({"run_dir": str(path), **SETTINGS}))
    return path


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "runs" / "it"), **SETTINGS}))
    return path


def contents(path: Path) -> list[str]:
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*"))


def test_overwrite_deletes_all_of_a_run(recipe, run_dir):
    config = load_config(recipe, ["seed=5"])
    with claim(config, resume=False, overwrite=True):
        assert contents(run_dir) == [".lock", CONFIG]
    assert load_config(run_dir / CONFIG) == config


@pytest.mark.parametrize(
    "name", ["notes.txt", "base/notes.txt", "checkpoints/mine.pt", "checkpoints/step-000001/notes.txt", ".git/HEAD"]
)
def test_overwrite_refuses_a_run_with_foreign_files_by_name(recipe, run_dir, name):
    (run_dir / name).parent.mkdir(exist_ok=True)
    (run_dir / name).write_text("mine")
    before = contents(run_dir)
    assert f"files that are not a run's ({name})" in command("train", recipe, "--plain", "--overwrite")
    assert contents(run_dir) == before


def test_a_link_is_not_followed_into_what_it_points_at(recipe, run_dir, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.move(run_dir / "checkpoints", elsewhere)
    (run_dir / "checkpoints").symlink_to(elsewhere)
    assert "not a run's (checkpoints)" in command("train", recipe, "--plain", "--overwrite")
    assert contents(elsewhere)


@pytest.mark.parametrize("text", ["compiler: gcc\n", "run_dir: x\nmodel: {path: y}\n", "a: [", "- 1\n"])
def test_a_config_alone_does_not_make_a_run(recipe, tmp_path, text):
    """The second is a recipe, but nothing was run there."""
    foreign = tmp_path / "runs" / "it"
    foreign.mkdir(parents=True)
    (foreign / CONFIG).write_text(text)
    for flag in ("--overwrite", "--resume"):
        assert "run" in command("train", recipe, "--plain", flag)
    assert contents(foreign) == [CONFIG] and (foreign / CONFIG).read_text() == text


def test_inputs_inside_the_run_are_refused(recipe, run_dir, tmp_path):
    inner = run_dir / "checkpoints" / "step-000001" / "model"
    settings = ["model.tiny=null", "pretrain=null", f"model.path={inner}"]
    before = contents(run_dir)
    assert f"'model.path' '{inner}' lies in 'run_dir'" in command(
        "train", recipe, "--plain", "--overwrite", "--set", *settings
    )
    data = f"data={{kind: gsm8k, path: {run_dir / 'metrics.jsonl'}, test_path: {recipe}}}"
    assert "'data.path'" in command("train", recipe, "--overwrite", "--set", *settings[:2], "model.path=x", data)
    assert contents(run_dir) == before


def test_nothing_is_deleted_before_the_model_is_loaded(recipe, run_dir, tmp_path):
    """A tokenizer, but weights that cannot be loaded."""
    base = tmp_path / "base"
    assert command("train", recipe, "--plain", "--set", f"run_dir={tmp_path / 'first'}", "grpo.steps=1") == 0
    shutil.copytree(tmp_path / "first" / "checkpoints" / "step-000001" / "model", base)
    (base / "model.safetensors").unlink()
    before = contents(run_dir)
    settings = ["model.tiny=null", "pretrain=null", f"model.path={base}"]
    assert "holds no causal LM" in command("train", recipe, "--plain", "--overwrite", "--set", *settings)
    assert contents(run_dir) == before


def test_a_run_has_one_process(recipe, run_dir):
    config = load_config(recipe)
    with claim(config, resume=True, overwrite=False):
        for flags in (["--resume"], ["--overwrite"]):
            message = command("train", recipe, "--plain", *flags)
            assert f"'run_dir' '{run_dir}' is in use by process {os.getpid()}" in message
        assert (run_dir / "metrics.jsonl").exists()
    with claim(config, resume=True, overwrite=False):
        pass


def test_the_lock_is_held_while_a_run_trains(recipe, monkeypatch):
    def train(config, *arguments):
        with pytest.raises(ConfigError, match="in use"), claim(config, resume=True, overwrite=False):
            pass
        raise run_module.Interrupted("SIGINT")

    monkeypatch.setattr(run_module, "_train", train)
    assert command("train", recipe, "--plain") == run_module.INTERRUPTED


def test_a_directory_that_cannot_be_written_is_named(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    message = command("train", recipe, "--plain", "--set", f"run_dir={tmp_path / 'file' / 'run'}")
    assert message == f"r1kernels: 'run_dir' '{tmp_path / 'file' / 'run'}' cannot be written: Not a directory"


def test_a_copied_run_is_resumed_where_it_lies(recipe, tmp_path):
    original, copy = tmp_path / "runs" / "it", tmp_path / "copy"
    assert command("train", recipe, "--plain", "--set", "grpo.steps=1") == 0
    shutil.copytree(original, copy)
    assert command("train", copy / CONFIG, "--plain", "--resume", "--set", "grpo.steps=2") == 0
    assert len(read_metrics(copy / "metrics.jsonl")) == 3
    assert len(read_metrics(original / "metrics.jsonl")) == 2
    # Said aloud, another directory is another directory.
    new = tmp_path / "new"
    assert command("train", copy / CONFIG, "--plain", "--set", f"run_dir={new}", "grpo.steps=1") == 0
    assert is_run(new)


def test_the_saved_configuration_means_the_same_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        Path(name).write_text("")
    Path("model").mkdir()
    Path("x.yaml").write_text(
        "run_dir: run\nmodel: {path: model}\ndata: {kind: gsm8k, path: train.jsonl, test_path: test.jsonl}\n"
    )
    config = load_config("x.yaml")
    with claim(config, resume=False, overwrite=False):
        saved = load_config("run/config.yaml")
    assert (saved.model.path, saved.data.path) == (str(tmp_path / "model"), str(tmp_path / "train.jsonl"))
    with claim(config, resume=True, overwrite=False):  # the recipe itself still names the same inputs
        pass
    Path("run/config.yaml").write_text(dump_config(config))  # as does one saved with relative paths
    with claim(config, resume=True, overwrite=False):
        pass


def test_printed_commands_run_as_printed(recipe, tmp_path):
    """Called by a relative path, with a relative run directory; the commands are then run from elsewhere."""
    program = tmp_path / "bin" / "r1kernels"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom r1kernels.train.cli import main\nmain()\n")
    program.chmod(0o755)
    settings = ["--set", "run_dir=a run", "grpo.steps=1"]
    done = subprocess.run(
        ["bin/r1kernels", "train", recipe.name, "--plain", *settings], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("next:").strip() for line in done.stdout.splitlines() if str(program) in line]
    evaluate, resume = (shlex.split(line.replace("steps=N", "steps=2")) for line in lines)
    assert evaluate == [str(program), "eval", str(tmp_path / "a run")]
    assert resume[:3] == [str(program), "train", str(tmp_path / "a run" / CONFIG)]
    done = subprocess.run([*resume, "--plain"], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(tmp_path / "a run" / "metrics.jsonl")) == 3

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
from test_train_run import BASE, SETTINGS, command, contents, elsewhere, finished, manifest, write_recipe

from r1kernels.train.chain import Chain
from r1kernels.train.config import dump_recipe, load_recipe
from r1kernels.train.interrupt import Interrupted
from r1kernels.train.metrics import read_metrics
from r1kernels.train.run import INTERRUPTED
from r1kernels.train.rundir import CONFIG, claim, is_run
from r1kernels.train.schema import ConfigError

__all__ = ["finished"]  # the fixture


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
        ".lock", "report.md", ".report.html", "curves.png", "base/metrics.jsonl", "rl/.samples.jsonl",
        "rl/checkpoints/.writing-step-000002/model/", "rl/checkpoints/step-000001/model/config.json",
        "rl/checkpoints/step-000001/state.pt", "superseded/rl-1/metrics.jsonl", "tensorboard/rl/events.0",
    ):
        file = path / name
        (file if name.endswith("/") else file.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            file.write_text("")
    write_recipe(path / CONFIG, path)
    return path


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path / "recipe.yaml", tmp_path / "runs" / "it")


def names(path: Path) -> list[str]:
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*"))


def test_overwrite_deletes_all_of_a_run(recipe, run_dir):
    made = load_recipe(recipe, ["seed=5"])
    with claim(made, overwrite=True):
        assert names(run_dir) == [".lock", CONFIG]
    assert load_recipe(run_dir / CONFIG) == made


FOREIGN = [
    "notes.txt", "base/notes.txt", "rl/checkpoints/mine.pt", "rl/checkpoints/step-000001/notes.txt", ".git/HEAD",
    "superseded/rl-1/notes.txt", "superseded/notes.txt", "rl/deep/er/notes.txt",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_overwrite_refuses_a_run_with_foreign_files_by_name(recipe, run_dir, name):
    (run_dir / name).parent.mkdir(exist_ok=True, parents=True)
    (run_dir / name).write_text("mine")
    before = names(run_dir)
    message = command("train", recipe, "--plain", "--overwrite")
    assert f"files that are not a run's ({name if name != '.git/HEAD' else '.git'})" in message
    assert message == command("train", recipe, "--dry-run", "--overwrite")
    assert names(run_dir) == before


def test_what_a_stage_of_a_former_recipe_left_is_a_runs(recipe, run_dir):
    """The manifest remembers it."""
    (run_dir / "old").mkdir()
    with pytest.raises(ConfigError, match=r"not a run's \(old\)"), claim(load_recipe(recipe), overwrite=True):
        pass
    chain = Chain(load_recipe(recipe))
    chain.records["old"] = dict.fromkeys(
        ("kind", "status", "config", "hashes", "output", "summary", "seconds", "evaluation")
    )
    chain._write()
    with claim(load_recipe(recipe), overwrite=True):
        assert names(run_dir) == [".lock", CONFIG]


def test_a_link_is_not_followed_into_what_it_points_at(recipe, run_dir, tmp_path):
    away = tmp_path / "elsewhere"
    shutil.move(run_dir / "rl" / "checkpoints", away)
    (run_dir / "rl" / "checkpoints").symlink_to(away)
    assert "not a run's (rl/checkpoints)" in command("train", recipe, "--plain", "--overwrite")
    (run_dir / "rl" / "checkpoints").unlink()
    shutil.rmtree(run_dir / "tensorboard")
    (run_dir / "tensorboard").symlink_to(away)
    with claim(load_recipe(recipe), overwrite=True):
        assert names(run_dir) == [".lock", CONFIG]
    assert names(away)


@pytest.mark.parametrize("text", ["compiler: gcc\n", dump_recipe, "a: [", "- 1\n"])
def test_a_config_alone_does_not_make_a_run(recipe, tmp_path, text):
    """The second is a recipe, but nothing was run there."""
    foreign = tmp_path / "runs" / "it"
    foreign.mkdir(parents=True)
    text = text if isinstance(text, str) else text(load_recipe(recipe))
    (foreign / CONFIG).write_text(text)
    for flag in ("--overwrite", "--plain"):
        assert f"holds files that are not a run's ({CONFIG})" in command("train", recipe, flag)
    assert names(foreign) == [CONFIG] and (foreign / CONFIG).read_text() == text


def test_a_directory_that_is_no_run_is_left_alone(recipe, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    for flag in ("--overwrite", "--plain", "--dry-run"):
        message = command("train", recipe, flag, "--set", f"run_dir={precious}")
        assert "holds files that are not a run's (thesis.tex)" in message
    assert names(precious) == ["thesis.tex"]
    assert "is a file" in command("train", recipe, "--set", f"run_dir={precious / 'thesis.tex'}")


def test_inputs_inside_the_run_are_refused(tmp_path, run_dir):
    before = names(run_dir)
    inner = run_dir / "rl" / "checkpoints" / "step-000001" / "model"
    recipe = write_recipe(tmp_path / "x.yaml", run_dir, **elsewhere(inner))
    assert f"'stages.given.path' '{inner}' lies in 'run_dir'" in command("train", recipe, "--plain", "--overwrite")
    data = {**SETTINGS["data"], "file": {"kind": "jsonl", "path": str(run_dir / "base" / "metrics.jsonl")}}
    recipe = write_recipe(tmp_path / "x.yaml", run_dir, data=data)
    assert "'data.file.path'" in command("train", recipe, "--overwrite")
    assert names(run_dir) == before


def test_a_name_of_the_hub_lies_in_no_run(tmp_path, monkeypatch):
    """Although, read as a path, it would."""
    monkeypatch.chdir(tmp_path)
    load_recipe(write_recipe(tmp_path / "x.yaml", Path("."), **elsewhere("some/model")))


def test_nothing_is_deleted_before_all_has_been_checked(tmp_path, run_dir):
    before = names(run_dir)
    for changes, message in (
        (elsewhere(tmp_path), "has no tokenizer"),
        ({"stages": [{**BASE, "kind": "pretrane"}]}, "unknown kind 'pretrane'"),
        ({"data": {**SETTINGS["data"], "file": {"kind": "jsonl", "test_path": "no"}}}, "cannot read data file no"),
    ):
        recipe = write_recipe(tmp_path / "x.yaml", run_dir, **changes)
        assert message in command("train", recipe, "--plain", "--overwrite")
        assert names(run_dir) == before


def test_a_run_has_one_process(recipe, run_dir):
    made = load_recipe(recipe)
    with claim(made, overwrite=False):
        for flags in (["--plain"], ["--overwrite"]):
            message = command("train", recipe, *flags)
            assert f"'run_dir' '{run_dir}' is in use by process {os.getpid()}" in message
        assert (run_dir / "base" / "metrics.jsonl").exists()
        command("train", recipe, "--dry-run")  # which only reads
    with claim(made, overwrite=False):
        pass


def test_the_lock_is_held_while_a_run_trains(recipe, monkeypatch):
    def run(self, *arguments):
        with pytest.raises(ConfigError, match="in use"), claim(self.recipe, overwrite=False):
            pass
        raise Interrupted("SIGINT")

    monkeypatch.setattr(Chain, "run", run)
    assert command("train", recipe, "--plain") == INTERRUPTED


def test_a_directory_that_cannot_be_written_is_named(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    message = command("train", recipe, "--plain", "--set", f"run_dir={tmp_path / 'file' / 'run'}")
    assert message == f"r1kernels: 'run_dir' '{tmp_path / 'file' / 'run'}' cannot be written: Not a directory"


def test_a_run_that_was_copied_or_moved_goes_on_where_it_lies(finished, tmp_path, capsys):
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    before = contents(finished)
    assert command("train", copy / CONFIG, "--plain", "--set", "stages.rl.steps=3") == 0
    assert "base: skip" in capsys.readouterr().out
    assert len(read_metrics(copy / "rl" / "metrics.jsonl")) == 4
    assert contents(finished) == before
    moved = copy.rename(tmp_path / "moved")
    assert command("train", moved / CONFIG, "--plain") == 0
    assert capsys.readouterr().out.count(": skip: finished, and nothing changed") == 2
    # Said aloud, another directory is another directory.
    new = tmp_path / "new"
    assert command("train", moved / CONFIG, "--plain", "--set", f"run_dir={new}", "stages.rl.steps=1") == 0
    assert is_run(new) and manifest(new)["rl"]["summary"]["steps"] == 1


def test_the_saved_recipe_means_the_same_from_anywhere(finished, tmp_path, monkeypatch, capsys):
    """Inputs by relative paths; nothing is run again when they are found by others."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for name, numbers in (("train.jsonl", (1, 2)), ("test.jsonl", (3, 4))):
        Path(name).write_text("".join(f'{{"question": "{n}?", "answer": "{n}"}}\n' for n in numbers))
    shutil.copytree(finished / "base" / "checkpoints" / "step-000002" / "model", "model")
    data = {"sums": {"kind": "jsonl", "path": "train.jsonl", "test_path": "test.jsonl"}}
    write_recipe(Path("x.yaml"), Path("run"), data=data, **elsewhere("model", steps=1))
    assert command("train", "x.yaml", "--plain") == 0
    saved = load_recipe("run/config.yaml")
    assert saved.stage("given").path == str(work / "model") and saved.data["sums"].path == str(work / "train.jsonl")
    monkeypatch.chdir("/")
    capsys.readouterr()
    assert command("train", work / "run" / CONFIG, "--dry-run") == 0
    assert capsys.readouterr().out.count("skip     ") == 2
    monkeypatch.chdir(work)
    assert command("train", "x.yaml", "--dry-run") == 0
    assert capsys.readouterr().out.count("skip     ") == 2
    monkeypatch.chdir(tmp_path)
    assert command("eval", work / "run") == 0


def test_printed_commands_run_as_printed(tmp_path):
    """Called by a relative path, with a relative run directory; the commands are then run from elsewhere."""
    program = tmp_path / "bin" / "r1kernels"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom r1kernels.train.cli import main\nmain()\n")
    program.chmod(0o755)
    recipe = write_recipe(tmp_path / "recipe.yaml", Path("a run"), stages=[BASE])
    done = subprocess.run(
        ["bin/r1kernels", "train", recipe.name, "--plain"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("next:").strip() for line in done.stdout.splitlines() if str(program) in line]
    evaluate, watch = map(shlex.split, lines)
    assert evaluate == [str(program), "eval", str(tmp_path / "a run")]
    assert watch == [str(program), "watch", str(tmp_path / "a run")]
    for arguments in (evaluate, [*watch, "--once"]):
        done = subprocess.run(arguments, cwd="/", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "a run" / CONFIG).read_text())["run_dir"] == "a run"

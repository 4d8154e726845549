"""The command: what a run leaves and prints, what is refused before any work, and how it stops."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from r1kernels.rewards import EndpointError
from r1kernels.rewards.sandbox import SandboxError
from r1kernels.train import chain, recipe_file
from r1kernels.train.cli import main
from r1kernels.train.errors import DataError, StorageError, TrainingError
from r1kernels.train.log import read_lines
from r1kernels.train.recipe_file import load_recipe

ROOT = Path(__file__).resolve().parents[2]
TEXT = {"max_terms": 3}
BASE = {
    "kind": "pretrain", "steps": 2, "batch_size": 1, "window": 64,
    "architecture": {"function": "tiny_world:architecture", "options": {
        "text": TEXT, "hidden_size": 16, "intermediate_size": 16, "layers": 1, "heads": 1}},
    "corpus": {"function": "tiny_world:corpus", "options": TEXT},
}
RL = {"kind": "grpo", "model": "base", "problems": ["sums"], "steps": 2, "questions": 2, "group_size": 2,
      "minibatches": 2, "max_new_tokens": 4}
SUMS = {"kind": "function", "function": "tiny_world:sums", "options": {"min_terms": 2, "max_terms": 3, "train_size": 8}}
SETTINGS = {
    "seed": 0, "threads": 1, "precision": "fp32", "import_from": [str(ROOT / "examples")], "data": {"sums": SUMS},
    "eval": {"every": 1, "questions": 2, "samples": 2, "max_new_tokens": 4}, "stages": {"base": BASE, "rl": RL},
}


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


def write_recipe(path: Path, run_dir: Path | str, **changes) -> Path:
    path.write_text(yaml.safe_dump({"run_dir": str(run_dir), **SETTINGS, **changes}, sort_keys=False))
    return path


def command(*arguments) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that has ended, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    assert command("train", write_recipe(folder / "recipe.yaml", folder / "it")) == 0
    return folder / "it"


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path / "recipe.yaml", tmp_path / "it")


@pytest.fixture
def run_dir(finished, recipe, tmp_path):
    """A copy of it, where the recipe has its run."""
    return Path(shutil.copytree(finished, tmp_path / "it"))


def contents(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_run_leaves_its_files(run_dir):
    records = chain.read_manifest(run_dir)
    assert [record["status"] for record in records.values()] == ["finished"] * 2
    assert (run_dir / "report.html").stat().st_size > 0 and load_recipe(run_dir / "config.yaml").seed == 0
    assert [line["step"] for line in read_lines(run_dir / "rl" / "metrics.jsonl") if "loss" in line] == [0, 1]
    assert 0 < records["rl"]["evaluation"]["length"] <= 4 and len(records["rl"]["evaluation"]["prompt_hash"]) == 16


def test_finished_stages_are_kept(recipe, run_dir, capsys):
    before = contents(run_dir)
    assert command("train", recipe) == 0
    said = capsys.readouterr().out
    assert "base: skip" in said and str(run_dir / "report.html") in said.replace("\n", "")
    changed = {name for name, content in contents(run_dir).items() if before.get(name) != content}
    assert all(name.startswith((".", "curves/")) or name in ("config.yaml", "report.html") for name in changed)


def test_a_dry_run_changes_nothing(recipe, run_dir, tmp_path, capsys):
    def state():
        return {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in (tmp_path, *tmp_path.rglob("*"))}

    before = state()
    for arguments, actions in (
        (["--set", "stages.base.steps=3"], ["rerun", "rerun"]), (["--from", "rl"], ["skip", "rerun"]),
        (["--set", f"run_dir={tmp_path / 'new'}"], ["run", "run"]),
    ):
        assert command("train", recipe, "--dry-run", *arguments) == 0
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == actions
    assert state() == before
    assert "'base', 'rl'" in command("train", recipe, "--from", "nowhere")


def test_a_second_set_and_a_run_directory_that_is_a_file_are_refused(tmp_path):
    (tmp_path / "file").touch()
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "file")
    assert "--set" in command("train", recipe, "--set", "seed=1", "--set", "seed=2")
    assert "'run_dir'" in command("train", recipe)


def test_a_config_file_does_not_make_a_run(recipe, tmp_path):
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "config.yaml").write_text("mine")
    assert str(tmp_path / "it") in command("train", recipe)
    assert contents(tmp_path / "it") == {"config.yaml": b"mine"}
    assert str(recipe) in command("train", recipe, "--set", f"run_dir={recipe}")


def test_a_run_has_one_process(recipe, run_dir):
    with chain.claim(load_recipe(recipe)):
        assert str(run_dir) in command("train", recipe)
        assert command("train", recipe, "--dry-run") == 0  # it only reads
    with chain.claim(load_recipe(recipe)):
        pass


def test_the_saved_recipe_means_the_same_from_any_directory(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, number in (("train.jsonl", 1), ("test.jsonl", 2)):
        Path(name).write_text(f'{{"question": "{number}?", "answer": "{number}"}}\n')
    shutil.copytree(finished / "base" / "checkpoints" / "step-000002" / "model", "model")
    data = {"sums": {"kind": "jsonl", "path": "train.jsonl", "test_path": "test.jsonl"}}
    write_recipe(Path("x.yaml"), "run", data=data, stages={"given": {"kind": "model", "path": "model"}})
    assert command("train", "x.yaml") == 0
    assert chain.read_manifest(tmp_path / "run")["given"]["evaluation"]["k"] == 2
    assert command("train", "x.yaml", "--set", "eval.samples=3") == 0  # measures the model again
    assert chain.read_manifest(tmp_path / "run")["given"]["evaluation"]["k"] == 3
    monkeypatch.chdir("/")
    capsys.readouterr()
    assert command("train", tmp_path / "run" / "config.yaml", "--dry-run") == 0
    assert capsys.readouterr().out.count("skip") == 1


def given(path, **keys) -> dict:
    return {"stages": {"given": {"kind": "model", "path": str(path)}, "rl": {**RL, "model": "given", **keys}}}


def test_everything_is_checked_before_work(finished, tmp_path, monkeypatch):
    new, model = tmp_path / "new", tmp_path / "model"
    shutil.copytree(finished / "base" / "checkpoints" / "step-000002" / "model", model)
    lines = tmp_path / "code.jsonl"
    tests = {"entry_point": "f", "cases": [{"args": [], "expected": 1}]}
    lines.write_text(json.dumps({"question": "f?", "kind": "code", "answer": tests}) + "\n")

    def refuses(memory_mb, *_):
        raise SandboxError(f"no sandbox with {memory_mb}")

    monkeypatch.setattr("r1kernels.rewards.sandbox.check", refuses)
    code = {**RL, "problems": ["sums", "code"]}
    cases = [
        ({"device": "meta"}, ["'device'", "'meta'"]), (given(tmp_path / "nowhere"), ["nowhere"]),
        ({**given(model), "template": "chat"}, ["'template'", "'chat'"]),
        (given(model, max_new_tokens=513), ["'rl'", "'max_new_tokens'", "513", "512", "'given'"]),
        ({**given(model), "eval": {"max_new_tokens": 600}}, ["'eval.max_new_tokens'", "600", "512"]),
        ({"data": {"sums": {"kind": "jsonl", "path": "nope.jsonl", "test_path": "nope.jsonl"}}}, ["nope.jsonl"]),
        ({"data": {"sums": SUMS | {"options": {"train_size": 10**6}}}}, ["'sums'", "'train'", "1000000"]),
        ({"stages": {"base": BASE, "rl": {**RL, "model": "rl"}}}, ["'stages.rl.model'", "'rl'", "before", "'base'"]),
        ({"stages": {"base": BASE, "rl": {**RL, "objective": {"options": {"clip": 1}}}}},
         ["'stages.rl.objective.options'", "clip"]),
        ({"stages": {"base": BASE, "rl": {**RL, "rewards": {"acuracy": 1.0}}}},
         ["'rl'", "'rewards'", "'acuracy'", "accuracy"]),
        ({"stages": {"base": BASE, "rl": {**RL, "rewards": {"judge": 1.0}}}}, ["'rl'", "'rewards'", "'judge'"]),
        ({"stages": {"base": BASE, "rl": {"kind": "reject", "model": "base", "problems": ["sums"], "judge": True}}},
         ["'scoring.judge'"]),
        ({"stages": {"base": BASE | {"corpus": {"function": "tiny_world:no"}}}}, ["tiny_world:no"]),
        ({"stages": {"base": BASE, "rl": {**RL, "advantages": {"function": "no_module_here:f"}}}}, ["no_module_here"]),
        ({"stages": {"base": BASE, "rl": {**RL, "rewards": {"no_module_here:f": 1.0}}}}, ["rewards", "no_module_here"]),
        ({"data": {"sums": SUMS, "code": {"kind": "jsonl", "path": str(lines)}}, "stages": {"base": BASE, "rl": code}},
         ["no sandbox with 512"]),
    ]
    if not torch.cuda.is_available():
        cases.append(({"device": "cuda"}, ["'device'", "'cuda'"]))
    for changes, words in cases:
        message = command("train", write_recipe(tmp_path / "x.yaml", new, **changes))
        assert isinstance(message, str) and all(word in message for word in words), message
        assert not new.exists()


@pytest.mark.parametrize("error", [
    DataError("x"), StorageError("x"), TrainingError("x"), SandboxError("x"),
    EndpointError("x"), FloatingPointError("x"), OSError(28, "No space left on device"),
], ids=lambda error: type(error).__name__)
def test_expected_errors_end_with_one_clean_line(recipe, monkeypatch, error):
    error.args = (*error.args[:-1], f"{error.args[-1]} \x1b[2J\u202e") if not isinstance(error, OSError) else error.args

    def fails(*arguments):
        raise error

    monkeypatch.setattr(recipe_file, "load_recipe", fails)
    message = command("train", recipe)
    assert message.startswith("r1kernels: ") and message.isprintable() and "\n" not in message


def test_other_errors_keep_their_traceback(recipe, monkeypatch):
    for error in (RuntimeError("a bug"), OSError(5, "Input/output error")):
        monkeypatch.setattr(recipe_file, "load_recipe", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            main(["train", str(recipe)])


def test_a_directory_that_cannot_be_written_is_named(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "run"
    assert str(path) in command("train", recipe, "--set", f"run_dir={path}")


CALL = "import sys; from r1kernels.train.cli import main; main(sys.argv[1:])"


def test_help_does_not_wait_for_torch():
    code = ("import sys\nfrom r1kernels.train.cli import main\ntry:\n    main(['train', '--help'])\n"
            "except SystemExit:\n    print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.endswith("False\n") and "--dry-run" in done.stdout, done


def test_a_signal_stops_with_130_and_the_command_that_continues(recipe, tmp_path):
    """As `command &` in a script, where SIGINT is ignored."""
    log, pid = tmp_path / "it" / "base" / "metrics.jsonl", tmp_path / "pid"
    program = [sys.executable, "-c", CALL, "train", str(recipe), "--set", "stages.base.steps=100000"]
    shell = ["sh", "-c", '"$@" & echo $! > "$0"; wait $!; echo rc=$?', str(pid), *program]
    with subprocess.Popen(shell, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        deadline = time.monotonic() + 300
        while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(int(pid.read_text()), signal.SIGINT)
        output = process.stdout.read()
    assert "rc=130" in output and "SIGINT" in output
    assert str(tmp_path / "it" / "config.yaml") in output
    record = chain.read_manifest(tmp_path / "it")["base"]
    assert record["status"] == "running" and list((tmp_path / "it" / "base" / "checkpoints").glob("step-*"))
    assert chain.Chain(load_recipe(tmp_path / "it" / "config.yaml")).plan()["base"][0] == "continue"
    assert (tmp_path / "it" / "report.html").stat().st_size


def test_a_stage_that_fails_leaves_a_report(recipe, tmp_path):
    """The update of the first step makes the weights infinite, and the second step has no finite loss."""
    message = command("train", recipe, "--set", "stages.base.learning_rate=1e38", "stages.base.steps=50")
    assert "learning_rate" in message and "unfinished" in (tmp_path / "it" / "report.html").read_text()

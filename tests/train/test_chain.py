"""Which stages of a chain run, continue, are kept or refused: after changes, stops and damage."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from checkpoint_cases import Files

from r1kernels import _origin
from r1kernels._origin import content_hash, origin
from r1kernels.train import chain
from r1kernels.train.chain import Chain, read_manifest
from r1kernels.train.checkpoint import latest_checkpoint, save_checkpoint
from r1kernels.train.errors import ConfigError, Interrupt, Interrupted
from r1kernels.train.log import Console
from r1kernels.train.recipe_file import load_recipe
from r1kernels.train.stage import SELECTED, Stage

LAST = {"kind": "distill", "method": "logits", "model": "middle", "teacher": "side", "samples": ["sums"]}
ALL = "first first? middle middle? side side? last last?"


class World:
    """A run of stages that only write down what they were given; `log` names what ran, and with a `?` was evaluated."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.run_dir, self.log = tmp_path / "recipe.yaml", tmp_path / "run", []
        self.fail: dict[str, BaseException] = {}  # by stage: raised after its work was saved
        for name, question in (("train", "1+1"), ("test", "2+2")):
            (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": question, "answer": "3"}) + "\n")
        new = {"kind": "pretrain", "architecture": {"function": "m:f"}, "corpus": {"function": "m:g"}}
        self.values: dict[str, Any] = {
            "run_dir": str(self.run_dir), "precision": "fp32",
            "data": {"sums": {"kind": "jsonl", "path": str(tmp_path / "train.jsonl"),
                              "test_path": str(tmp_path / "test.jsonl")}},
            "stages": {
                "first": {**new, "steps": 1},
                "middle": {"kind": "grpo", "model": "first", "problems": ["sums"], "steps": 2},
                "side": {**new, "steps": 1}, "last": LAST,
            },
        }
        monkeypatch.setattr(chain, "RUN", dict.fromkeys(chain.RUN, self._work))
        monkeypatch.setattr(chain.evaluate, "evaluate_model", self._measure)

    def chain(self, *overrides: str, **options: Any) -> Chain:
        self.path.write_text(yaml.safe_dump(self.values, sort_keys=False))
        return Chain(load_recipe(self.path, overrides), **options)

    def plan(self, *overrides: str, **options: Any) -> dict[str, tuple[str, str]]:
        return self.chain(*overrides, **options).plan()

    def actions(self, *overrides: str, **options: Any) -> str:
        return " ".join(action for action, _ in self.plan(*overrides, **options).values())

    def refused(self, *overrides: str, **options: Any) -> str:
        """Why a run stops before any work; the plan says the same."""
        with pytest.raises(ConfigError) as error:
            self.plan(*overrides, **options)
        with pytest.raises(ConfigError):
            self.run(*overrides, **options)
        assert self.log == []
        return str(error.value)

    def run(self, *overrides: str, **options: Any) -> str:
        self.log.clear()
        self.run_dir.mkdir(exist_ok=True)
        self.chain(*overrides, **options).run(Console(), Interrupt())
        return " ".join(self.log)

    def stop(self, name: str, *overrides: str) -> None:
        """Runs the chain, interrupted in a stage."""
        self.fail[name] = Interrupted("SIGINT")
        with pytest.raises(Interrupted):
            self.run(*overrides)

    def left_by(self, name: str) -> str:
        return (latest_checkpoint(self.run_dir / name) / "model" / "weights").read_text()

    def _work(self, stage: Any) -> dict[str, Any]:
        settings = stage.settings
        self.log.append(settings.name)
        names = [getattr(settings, key, None) for key in ("model", "teacher")]
        given = [(Path(stage.model_path(name)) / "weights").read_text() for name in names if name]
        steps = getattr(settings, "steps", 1)
        text = f"{settings.name}({','.join(given)})x{steps}"
        if settings.kind == "reject":
            (stage.directory / SELECTED).write_text(text)
        else:
            saved = Files(weights=text.encode())
            save_checkpoint(stage.directory, steps, policy=saved, tokenizer=saved, shards={}, state={}, keep=2)
        if settings.name in self.fail:
            raise self.fail.pop(settings.name)
        return {"steps": steps}

    def _measure(self, stage: Stage, name: str) -> dict[str, Any]:
        self.log.append(f"{name}?")
        if f"{name}?" in self.fail:
            raise self.fail.pop(f"{name}?")
        return {"pass_at_1": 0.5, "length": 1.0, "of": (Path(stage.model_path(name)) / "weights").read_text()}


@pytest.fixture
def world(tmp_path, monkeypatch):
    return World(tmp_path, monkeypatch)


@pytest.fixture
def done(world):
    assert world.run() == ALL
    return world


def test_stages_run_in_their_order_and_are_skipped_afterwards(world):
    assert world.actions() == "run run run run" and not world.run_dir.exists()
    assert world.run() == ALL
    assert world.left_by("last") == "last(middle(first()x1)x2,side()x1)x1"
    before = (world.run_dir / "manifest.json").read_bytes()
    assert world.actions() == "skip skip skip skip" and world.run() == ""
    assert (world.run_dir / "manifest.json").read_bytes() == before


def test_the_manifest_says_what_a_stage_came_from(done):
    content = json.loads((done.run_dir / "manifest.json").read_text())
    assert content["order"] == ["first", "middle", "side", "last"]
    first, last = content["stages"]["first"], content["stages"]["last"]
    assert (last["kind"], last["status"], last["summary"]) == ("distill", "finished", {"steps": 1})
    assert content["stages"]["middle"]["settings"]["output of first"] == first["output"]
    assert {"output of middle", "output of side", "data sums"} < last["settings"].keys()
    assert last["evaluation"]["of"] == done.left_by("last") and last["seconds"] >= 0


def test_a_changed_setting_runs_its_stage_and_what_its_output_changes(done):
    plan = done.plan("stages.first.steps=9")
    assert [action for action, _ in plan.values()] == ["rerun", "rerun", "skip", "rerun"]
    assert plan["first"][1] == "steps: 1 -> 9" and "first" in plan["middle"][1]
    assert done.run("stages.first.steps=9") == "first first? middle middle? last last?"
    assert done.left_by("middle") == "middle(first()x9)x2"
    assert done.actions("stages.first.steps=9") == "skip skip skip skip"


def test_the_same_output_keeps_what_depends_on_it(done):
    """The plan cannot know; the run does."""
    assert done.actions("stages.first.window=64") == "rerun rerun skip rerun"
    assert done.run("stages.first.window=64") == "first first?"
    assert done.actions("stages.first.window=64") == "skip skip skip skip"


@pytest.mark.parametrize("change", ["seed=7", "template=chat", "open_think=true"])
def test_settings_of_the_run_concern_every_stage(done, change):
    assert done.actions(change) == "rerun rerun rerun rerun"


@pytest.mark.parametrize("change", ["threads=1", "checkpoint.keep=1", "scoring.workers=3", "eval.every=9"])
def test_settings_that_change_no_result_change_nothing(done, change):
    assert done.run(change) == ""


def test_scoring_concerns_the_stages_that_score(done):
    assert done.actions("scoring.timeout_s=9") == "skip rerun skip rerun"


def test_other_settings_of_evaluations_evaluate_again_and_train_nothing(done):
    assert done.run("eval.samples=7") == "first? middle? side? last?"
    assert done.run("eval.samples=7") == ""


def test_files_count_by_their_content(done, tmp_path):
    moved = (tmp_path / "train.jsonl").rename(tmp_path / "moved.jsonl")
    assert done.run(f"data.sums.path={moved}") == ""
    moved.write_text('{"question": "4+4", "answer": "8"}\n')
    assert "data sums" in done.plan(f"data.sums.path={moved}")["middle"][1]
    assert done.run(f"data.sums.path={moved}") == "first? middle middle? side? last last?"


def test_from_runs_a_stage_and_all_behind_it(done):
    assert done.actions(start="middle") == "skip rerun skip rerun"
    assert done.run(start="middle") == "middle middle? last last?"  # although the output is the same
    assert done.run() == ""
    with pytest.raises(ConfigError, match=r"'nowhere'.*'first', 'middle', 'side', 'last'"):
        done.plan(start="nowhere")


def test_an_interrupted_stage_continues(world):
    world.stop("middle")
    record = read_manifest(world.run_dir)["middle"]
    assert (record["status"], record["output"], record["evaluation"]) == ("running", None, None)
    assert world.actions() == "skip continue run run"
    assert world.run() == "middle middle? side side? last last?"
    assert read_manifest(world.run_dir)["middle"]["seconds"] > record["seconds"]


def test_an_interrupted_stage_whose_settings_changed_is_refused_before_any_work(world):
    world.stop("middle")
    assert world.actions("stages.first.steps=5") == "rerun rerun run run"
    message = world.refused("stages.middle.temperature=0.5", "stages.first.steps=7")
    assert "'middle'" in message and "temperature: 1.0 -> 0.5" in message and "--from middle" in message
    assert "seed: 0 -> 3" in world.refused("seed=3")
    assert world.run("stages.middle.temperature=0.5", start="middle") == "middle middle? side side? last last?"


def test_another_version_is_refused_or_run_again(done, monkeypatch):
    monkeypatch.setattr(chain.r1kernels, "__version__", "9.9")
    message = done.refused()
    assert all(word in message for word in ("'first'", "9.9", "--from first"))
    assert "'side'" in done.refused(start="first")


def test_an_interrupted_stage_of_another_version(world, monkeypatch):
    world.stop("first")
    monkeypatch.setattr(chain.r1kernels, "__version__", "9.9")
    assert "'first'" in world.refused()
    assert world.actions(start="first") == "rerun run run run"


def test_the_manifest_names_everything_that_worked_on_a_stage(world, monkeypatch):
    """Another torch, or another device, adds an entry; another day does not."""
    now = {"date": "2026-01-01", "r1kernels": chain.r1kernels.__version__, "torch": "1.0", "device": "Example"}
    monkeypatch.setattr(chain, "origin", lambda device, trainer: dict(now))
    world.stop("middle")
    world.stop("side")
    first = dict(now)
    now["date"] = "2026-01-02"
    world.stop("side")
    assert {name: record["origin"] for name, record in read_manifest(world.run_dir).items()} == {
        "first": [first], "middle": [first], "side": [first]}
    now["torch"] = "2.0"
    second = dict(now)
    world.run()
    assert {name: record["origin"] for name, record in read_manifest(world.run_dir).items()} == {
        "first": [first], "middle": [first], "side": [first, second], "last": [second]}
    now["device"] = "Other"
    assert world.run("eval.samples=9") == "first? middle? side? last?"
    assert read_manifest(world.run_dir)["first"]["origin"] == [first, dict(now)]


def test_a_stage_says_what_ran_it(done):
    (found,) = read_manifest(done.run_dir)["first"]["origin"]
    assert found == origin("cpu", trainer=True)
    assert found["torch"] == torch.__version__ and found["transformers"] == transformers.__version__
    assert len(found["sources"]) == 16 and found["sources"] != origin("cpu")["sources"]


def test_a_stage_without_an_origin_is_not_taken_for_one_of_this_version(done):
    path = done.run_dir / "manifest.json"
    content = json.loads(path.read_text())
    del content["stages"]["first"]["origin"]
    path.write_text(json.dumps(content))
    message = done.refused()
    assert "'first'" in message and chain.r1kernels.__version__ in message
    assert done.actions(start="first") == "rerun rerun skip rerun"


def test_an_interrupted_evaluation_is_repeated(world):
    world.stop("middle?")
    record = read_manifest(world.run_dir)["middle"]
    assert (record["status"], record["evaluation"]) == ("finished", None)
    assert world.run() == "middle? side side? last last?"


def test_the_evaluation_of_a_continued_stage_is_repeated(world, monkeypatch):
    """A stage may evaluate itself, and have done so, before it was stopped, with other settings."""
    def measuring(stage):
        return {**world._work(stage), "evaluation": {"pass_at_1": 1.0, "length": 1.0, "of": "itself"}}

    monkeypatch.setattr(chain, "RUN", dict.fromkeys(chain.RUN, measuring))
    world.stop("side")
    assert world.log == ["first", "middle", "side"]
    assert world.run("eval.samples=9") == "first? middle? side side? last"
    assert "evaluation" not in read_manifest(world.run_dir)["last"]["summary"]


def test_stages_come_and_go(done):
    stages = done.values["stages"]
    del stages["last"]
    stages["more"] = {"kind": "reject", "model": "first", "problems": ["sums"]}
    assert done.run() == "more"
    stages["last"] = LAST
    assert done.run() == ""


def test_samples_are_an_input_like_a_model(world):
    world.values["stages"]["traces"] = {"kind": "reject", "model": "first", "problems": ["sums"]}
    world.values["stages"]["sft"] = {"kind": "sft", "model": "first", "samples": ["traces"]}
    assert world.run().endswith("traces sft sft?")
    (world.run_dir / "traces" / SELECTED).write_text("changed")
    assert world.run() == "traces"


def test_a_missing_or_changed_output_is_made_again(done):
    weights = latest_checkpoint(done.run_dir / "first") / "model" / "weights"
    weights.write_text("shorter")
    assert "damaged" in done.plan()["first"][1]
    assert done.run() == "first first?"
    shutil.rmtree(done.run_dir / "side")
    assert done.run() == "side side?" and done.run() == ""


@pytest.mark.parametrize("moment", range(1, 5))
def test_after_a_crash_while_a_stage_is_replaced_it_runs_again(done, monkeypatch, moment):
    """Before any of the operations that replace a stage; the old directory is never taken for the new one."""
    calls = []

    def crash(function):
        def counted(*arguments, **options):
            calls.append(function)
            if len(calls) == moment + 2:  # the first two write the manifest and the settings of the run
                raise KeyboardInterrupt
            return function(*arguments, **options)
        return counted

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for place, name in ((chain, "write_file"), (chain.shutil, "rmtree"), (Path, "mkdir")):
            patch.setattr(place, name, crash(getattr(place, name)))
        done.run("stages.first.steps=5")
    assert done.run("stages.first.steps=5").endswith("first? middle middle? last last?")
    assert done.left_by("first") == "first()x5"


DAMAGED = ["", "{", "[]", "{}"]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_manifest_is_named_and_kept(world, text):
    world.run_dir.mkdir()
    path = world.run_dir / "manifest.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)):
        world.run()
    assert path.read_text() == text


def test_a_pretrained_model_counts_by_its_files(tmp_path, monkeypatch):
    directory = tmp_path / "model"
    directory.mkdir()
    hashes = []
    for text, limit in (("one", 2**24), ("two", 2**24), ("two", 0)):
        (directory / "weights").write_text(text)
        monkeypatch.setattr(_origin, "HASHED_SIZE", limit)
        hashes.append(content_hash(directory))
    assert len({*hashes, content_hash("Qwen/Qwen2.5-0.5B")}) == 4
    assert content_hash(directory.rename(tmp_path / "moved")) == hashes[-1]

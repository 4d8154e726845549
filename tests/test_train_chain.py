"""What of a chain runs, in which order, and what of it stands: after changes, stops and damage of every sort."""

import json
import os
import shutil
from pathlib import Path

import pytest
from chain_cases import World

from r1kernels.train import chain, files
from r1kernels.train.chain import read_manifest
from r1kernels.train.checkpoint import CheckpointError, latest_checkpoint
from r1kernels.train.interrupt import Interrupted
from r1kernels.train.schema import ConfigError


@pytest.fixture
def world(tmp_path, monkeypatch):
    made = World(tmp_path, monkeypatch)
    made.stages(last={"model": "middle", "teacher": "side"}, middle={"model": "first"}, first={}, side={})
    return made


@pytest.fixture
def done(world):
    world.run()
    return world


def test_each_stage_runs_after_those_it_needs_else_in_the_order_of_the_recipe(world):
    assert world.chain().order == ["first", "middle", "side", "last"]
    world.values["stages"].append({"name": "elsewhere", "kind": "model", "path": "some/model"})
    assert world.chain().order == ["elsewhere", "first", "middle", "side", "last"]


def test_what_ran_is_skipped(world):
    assert world.actions() == "run run run run"
    assert not world.run_dir.exists()
    assert world.run() == "first first? middle middle? side side? last last?"
    assert world.left_by("last") == "last(middle(first()x1)x1,side()x1)x1"
    before = (world.run_dir / "manifest.json").read_bytes()
    assert world.actions() == "skip skip skip skip" and world.run() == ""
    assert (world.run_dir / "manifest.json").read_bytes() == before
    assert {plan.why for plan in world.plan().values()} == {"finished, and nothing changed"}


def test_a_record_holds_what_a_stage_came_from(done):
    content = json.loads((done.run_dir / "manifest.json").read_text())
    assert (content["format"], content["name"], content["order"]) == (1, "run", ["first", "middle", "side", "last"])
    first, last = content["stages"]["first"], content["stages"]["last"]
    assert (last["kind"], last["status"], last["summary"]) == ("fake", "finished", {"steps": 1})
    assert last["hashes"].keys() == {"config", "code", "data", "inputs"} and last["hashes"]["inputs"].keys() == {
        "middle", "side"
    }
    assert content["stages"]["middle"]["hashes"]["inputs"] == {"first": first["output"]}
    assert len({record["fingerprint"] for record in content["stages"].values()}) == 4
    assert last["evaluation"]["of"] == done.left_by("last") and last["seconds"] >= 0


def test_a_changed_setting_runs_its_stage_and_what_its_output_changes(done):
    plan = done.plan("stages.first.text=other")
    assert [item.action for item in plan.values()] == ["rerun", "rerun", "skip", "rerun"]
    assert plan["first"].why == "stage.text: None -> 'other'"
    assert (plan["middle"].why, plan["last"].why) == ("first is run first", "middle is run first")
    assert done.run("stages.first.text=other") == "first first? middle middle? last last?"
    assert done.left_by("middle") == "middle(other)x1"
    assert done.actions("stages.first.text=other") == "skip skip skip skip"
    assert sorted(entry.name for entry in (done.run_dir / "superseded").iterdir()) == ["first-1", "last-1", "middle-1"]
    kept = done.run_dir / "superseded" / "first-1"
    assert (latest_checkpoint(kept) / "model" / "weights").read_text() == "first()x1"


def test_the_same_output_lets_what_depends_on_it_be(done):
    """The plan cannot know; the run does."""
    same = "stages.first.text=first()x1"
    assert done.actions(same) == "rerun rerun skip rerun"
    assert done.run(same) == "first first?"
    assert done.actions(same) == "skip skip skip skip"


@pytest.mark.parametrize("key", ["seed=7", "template=chat", "open_think=true"])
def test_settings_of_the_whole_run_concern_every_stage(done, key):
    assert done.actions(key) == "rerun rerun rerun rerun"


@pytest.mark.parametrize("key", ["threads=1", "checkpoint.keep=1", "scoring.workers=3", "trackers=[]"])
def test_settings_that_change_no_result_change_nothing(done, key):
    assert done.run(key) == ""


def test_other_settings_of_evaluations_measure_again_and_train_nothing(done):
    assert done.run("eval.samples=7") == "first? middle? side? last?"
    assert done.run("eval.samples=7") == ""
    assert done.run("eval.samples=7", "eval.every=9") == ""
    assert done.run("scoring.timeout_s=9") == "first? middle? side? last?"


def test_data_counts_by_what_it_holds(world, tmp_path):
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("one"), test.write_text("two")
    world.values["data"]["file"] = {"kind": "jsonl", "path": str(train), "test_path": str(test)}
    world.stages(first={"problems": ["file"]}, other={})
    assert world.run() == "first first? other other?"
    moved = tmp_path / "elsewhere"
    train.rename(moved)
    assert world.run(f"data.file.path={moved}") == ""
    test.write_text("three")  # no stage learns from it
    assert world.run(f"data.file.path={moved}") == "first? other?"
    moved.write_text("four")
    assert world.plan(f"data.file.path={moved}")["first"].why == "data.file.path changed"
    assert world.run(f"data.file.path={moved}") == "first first?"
    assert world.run(f"data.file.path={moved}", "data.file.language=zh") == "first first? other?"
    moved.unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*elsewhere: No such file"):
        world.run(f"data.file.path={moved}")


def test_changed_code_runs_everything_unless_it_is_trusted(done, monkeypatch):
    monkeypatch.setattr(chain, "code_hash", lambda: "new")
    plan = done.plan()
    assert {item.action for item in plan.values()} == {"rerun"}
    assert plan["first"].why == "the code or a library changed (--trust-code lets it stand)"
    assert done.actions(trust_code=True) == "skip skip skip skip"
    assert done.actions() == "rerun rerun rerun rerun"  # planning trusts nothing for good
    assert done.run(trust_code=True) == ""
    assert done.actions() == "skip skip skip skip"
    monkeypatch.setattr(chain, "code_hash", lambda: "newer")
    assert done.run() == "first first? middle middle? side side? last last?"


def test_the_hash_of_the_code_sees_what_computes(tmp_path, monkeypatch):
    package = tmp_path / "r1kernels"
    for name in ("train/chain.py", "train/report.py", "ops/report.py", "_C.abi3.so", "train/stages/sft.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("")
    monkeypatch.setattr(chain, "__file__", str(package / "train" / "chain.py"))
    seen = {chain.code_hash.__wrapped__()}
    for name in ("ops/report.py", "_C.abi3.so", "train/stages/sft.py"):
        (package / name).write_text("x")
        seen.add(chain.code_hash.__wrapped__())
    assert len(seen) == 4
    (package / "train" / "report.py").write_text("x")  # it shows, and computes nothing
    assert chain.code_hash.__wrapped__() in seen


def test_from_runs_a_stage_and_all_behind_it(done):
    assert done.actions(start="middle") == "skip rerun skip rerun"
    assert done.plan(start="middle")["middle"].why == "asked for by --from middle"
    assert done.plan(start="middle")["last"].why == "asked for by --from middle; middle is run first"
    assert done.run(start="middle") == "middle middle? last last?"  # although the output is the same
    assert done.run() == ""
    with pytest.raises(ConfigError, match="--from 'nowhere': no such stage, expected one of first, middle, side, last"):
        done.plan(start="nowhere")


def test_more_steps_continue_and_fewer_begin_again(done):
    plan = done.plan("stages.side.steps=3")
    assert (plan["side"].action, plan["side"].why) == ("continue", "stage.steps: 1 -> 3")
    assert done.run("stages.side.steps=3") == "side side? last last?"
    assert not (done.run_dir / "superseded" / "side-1").exists()
    assert done.left_by("side") == "side()x3"
    assert done.actions("stages.side.steps=2") == "skip skip rerun rerun"
    assert done.actions("stages.side.steps=4", "stages.side.text=x") == "skip skip rerun rerun"
    assert done.run("stages.side.steps=2") == "side side? last last?"
    assert done.left_by("side") == "side()x2"


def test_reward_models_that_count_at_the_end_forbid_growing(tmp_path):
    """Where they count follows from the number of steps, so the steps already done would have been others."""
    from r1kernels.train.reward_model import PreferenceReward
    from r1kernels.train.stages.grpo import Config

    stage = {"name": "x", "kind": "grpo", "model": "base", "problems": ["sums"]}
    assert Config(**stage, preference=[PreferenceReward("scores")]).grows == ("steps",)
    assert Config(**stage, preference=[PreferenceReward("scores", last_steps=3)]).grows == ()


def test_stages_come_and_go(done):
    done.stages(first={}, side={}, more={"model": "first"})
    assert done.actions() == "skip skip run"
    assert done.run() == "more more?"
    assert done.manifest().keys() == {"first", "middle", "side", "last", "more"}
    # Back again, what was removed stands as it did.
    done.stages(last={"model": "middle", "teacher": "side"}, middle={"model": "first"}, first={}, side={})
    assert done.run() == ""


def test_a_stage_of_another_kind_or_start_is_another(done):
    assert done.plan("stages.last.model=side")["last"].why == "stage.model: 'middle' -> 'side'"
    assert done.run("stages.last.model=side") == "last last?"


def test_an_output_that_is_gone_or_cut_off_is_made_again(done):
    why = "its output is missing or damaged"
    weights = latest_checkpoint(done.run_dir / "first") / "model" / "weights"
    weights.write_text("shorter")
    assert done.plan()["first"].why == why
    assert done.run() == "first first?"
    shutil.rmtree(done.run_dir / "side")
    assert done.plan()["side"].why == why
    assert done.run() == "side side?"
    (latest_checkpoint(done.run_dir / "side") / "manifest.json").write_text("{oops")
    assert done.run() == "side side?"
    (latest_checkpoint(done.run_dir / "side") / "state.pt").unlink()
    assert done.run() == "side side?"
    assert done.run() == ""


def test_weights_with_another_bit_are_refused_before_they_are_used(done):
    """Too many bytes to read at every start: their hash is compared when they are read anyway."""
    weights = latest_checkpoint(done.run_dir / "first") / "model" / "weights"
    text = weights.read_text()
    weights.write_text(text.replace("first", "fir5t"))
    assert done.actions() == "skip skip skip skip"
    with pytest.raises(CheckpointError, match=f"{weights} does not match the SHA-256 .*; --from first makes it again"):
        done.run("stages.middle.text=new")
    assert done.manifest()["middle"]["status"] == "running"
    assert done.run("stages.middle.text=new", start="first").startswith("first first? middle middle?")
    assert done.left_by("first") == text


def test_an_interrupted_stage_is_continued(world):
    world.fail["middle"] = Interrupted("SIGINT")
    with pytest.raises(Interrupted):
        world.run()
    record = world.manifest()["middle"]
    assert (record["status"], record["output"], record["evaluation"]) == ("running", None, None)
    assert record["seconds"] > 0
    assert world.actions() == "skip continue run run"
    assert world.plan()["middle"].why == "it was interrupted"
    assert world.run() == "middle middle? side side? last last?"
    assert not (world.run_dir / "superseded").exists()
    assert world.manifest()["middle"]["seconds"] > record["seconds"]


def test_an_interrupted_stage_that_changed_begins_again(world, monkeypatch):
    world.fail["middle"] = Interrupted("SIGINT")
    with pytest.raises(Interrupted):
        world.run()
    assert world.actions("stages.middle.steps=5") == "skip continue run run"
    assert world.actions("stages.middle.text=x") == "skip rerun run run"
    assert world.actions("stages.first.text=x") == "rerun rerun run run"
    monkeypatch.setattr(chain, "code_hash", lambda: "new")
    assert world.actions() == "rerun refuse run run"
    with pytest.raises(ConfigError, match=r"stage 'middle': it was interrupted, and the code .* changed since"):
        world.run()
    assert world.log == []  # before any other work
    assert world.actions(start="middle") == "rerun rerun run run"
    assert world.actions(trust_code=True) == "skip continue run run"


def test_an_interrupted_evaluation_is_made_up_for(world):
    world.fail["middle?"] = Interrupted("SIGINT")
    with pytest.raises(Interrupted):
        world.run()
    assert world.manifest()["middle"]["status"] == "finished" and world.manifest()["middle"]["evaluation"] is None
    assert world.run() == "middle? side side? last last?"


def test_a_kill_between_the_steps_of_a_rerun_loses_nothing(done, monkeypatch):
    """After the old directory was put away, before the manifest says so."""
    real = chain.write_atomically
    monkeypatch.setattr(chain, "write_atomically", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        done.run("stages.first.text=x")
    monkeypatch.setattr(chain, "write_atomically", real)
    assert (done.run_dir / "superseded" / "first-1").is_dir()
    assert done.run() == "first first?"  # the old settings again: what they made is on the shelf
    assert done.run("stages.first.text=x") == "first first? middle middle? last last?"
    assert {entry.name for entry in (done.run_dir / "superseded").iterdir()} == {
        "first-1", "first-2", "middle-1", "last-1"
    }


def test_what_is_put_away_never_covers_what_was_before(done):
    shelf = done.run_dir / "superseded"
    for index in range(3):
        done.run(f"stages.first.text=text {index}")
    (shelf / "first-2").rename(shelf / "kept")
    shutil.rmtree(shelf / "first-1")
    (shelf / "first-one").mkdir()
    (shelf / "first-x-9").mkdir()
    done.run("stages.first.text=last")
    texts = {name: (latest_checkpoint(shelf / name) / "model" / "weights").read_text()
             for name in ("kept", "first-3", "first-4")}
    assert texts == {"kept": "text 0", "first-3": "text 1", "first-4": "text 2"}


def test_the_evaluation_of_a_continued_stage_is_its_own(world, monkeypatch):
    """A stage that measures itself may have done so, before it was stopped, with other settings."""
    real = world._work

    def measuring(stage):
        return {**real(stage), "evaluation": {"pass_at_1": 1.0, "length": 1.0, "of": "itself"}}

    monkeypatch.setattr(chain.stage_module("fake"), "run", measuring)
    world.fail["side"] = Interrupted("SIGINT")
    with pytest.raises(Interrupted):
        world.run()
    assert world.log == ["first", "middle", "side"]
    assert world.run("eval.samples=9") == "first? middle? side side? last"
    assert "evaluation" not in world.manifest()["last"]["summary"]


DAMAGED = [
    ("", "cannot read"),
    ("{", "cannot read"),
    ("[]", "is damaged or of another version, expected format 1 with 'stages'"),
    ('{"format": 2, "stages": {}}', "is damaged or of another version"),
    ('{"format": 1, "stages": []}', "is damaged or of another version"),
    ('{"format": 1, "stages": {"first": 3}}', "is damaged: the record of stage 'first' has no 'kind'"),
    ('{"format": 1, "stages": {"first": {"kind": "fake", "status": "finished"}}}', "stage 'first' has no 'config'"),
]


@pytest.mark.parametrize(("text", "message"), DAMAGED, ids=[text[:40] for text, _ in DAMAGED])
def test_a_damaged_manifest_is_named_and_kept(done, text, message):
    path = done.run_dir / "manifest.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        done.run()
    assert str(path) in str(error.value) and message in str(error.value)
    assert path.read_text() == text


def test_the_manifest_is_replaced_whole_or_not_at_all(done, monkeypatch):
    before = (done.run_dir / "manifest.json").read_bytes()
    real = os.fsync

    def full(descriptor):
        if "manifest" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(ConfigError, match=r"manifest\.json cannot be written: No space left on device; it is as"):
        done.run("stages.first.text=x")
    assert (done.run_dir / "manifest.json").read_bytes() == before
    assert sorted(entry.name for entry in done.run_dir.iterdir() if entry.name.startswith(".")) == []
    monkeypatch.setattr(files.os, "fsync", real)
    assert done.run("stages.first.text=x") == "first first? middle middle? last last?"


def test_what_ends_a_stage_is_said_and_not_what_follows_from_it(world, monkeypatch):
    class Broken(RuntimeError):
        pass

    world.fail["first"] = Broken("the cause")
    real = chain.write_atomically

    def writes_once(path, text):
        monkeypatch.setattr(chain, "write_atomically", fails)
        real(path, text)

    def fails(path, text):
        raise ConfigError("manifest.json cannot be written")

    monkeypatch.setattr(chain, "write_atomically", writes_once)
    with pytest.raises(Broken, match="the cause"):
        world.run()


def test_a_directory_that_cannot_be_made_is_named(done, monkeypatch):
    def refused(self, target):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(ConfigError, match=r"run/first cannot be made: Read-only file system; what was there stands"):
        done.run("stages.first.text=x")
    monkeypatch.undo()


def test_a_model_from_elsewhere_counts_by_its_files(tmp_path, monkeypatch):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "weights").write_text("one")
    first = chain._model_hash(str(directory))
    (directory / "weights").write_text("two")
    second = chain._model_hash(str(directory))
    monkeypatch.setattr(chain, "_WHOLE", 0)  # large files count by size and time of change
    os.utime(directory / "weights", ns=(1, 1))
    third = chain._model_hash(str(directory))
    os.utime(directory / "weights", ns=(1, 2))
    assert len({first, second, third, chain._model_hash(str(directory))}) == 4
    moved = tmp_path / "moved"
    directory.rename(moved)
    assert chain._model_hash(str(moved)) == chain._model_hash(str(moved)) != chain._model_hash("Qwen/Qwen2.5-0.5B")


def test_no_manifest_is_no_record(tmp_path):
    assert read_manifest(tmp_path) == {}

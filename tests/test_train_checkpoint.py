"""Checkpoints: whole or absent, verified, and replaced only by whole ones."""

import errno
import hashlib
import io
import json
import os
import random
import resource
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch

from r1kernels.train.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    tidy_checkpoints,
)


class Files:
    """Stands for a model or a tokenizer: what matters here is that it writes files."""

    def __init__(self, **contents):
        self.contents = contents

    def save_pretrained(self, directory):
        for name, content in self.contents.items():
            (directory / name).write_bytes(content)


MODEL = Files(weights=b"w" * 1000, config=b"{}")
TOKENIZER = Files(vocabulary=b"abc")


def save(run, step, *, model=MODEL, keep=3, **state):
    return save_checkpoint(run, step, model=model, tokenizer=TOKENIZER, state={"step": step, **state}, keep=keep)


def names(run):
    return sorted(entry.name for entry in (run / "checkpoints").iterdir())


def test_what_was_saved_is_loaded(tmp_path):
    moments = {"exp_avg": torch.randn(3, dtype=torch.bfloat16), "step": torch.tensor(7.0)}
    state = {
        "optimizer": {"state": {0: moments}, "param_groups": [{"lr": 3e-6, "betas": (0.9, 0.95), "params": [0]}]},
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "cursor": OrderedDict(epoch=1, order=[2, 0, 1]),
        "texts": ["a", None, True, b"x", 2**200, {1, 2}],
    }
    path = save(tmp_path / "new" / "run", 123, **state)
    assert path == tmp_path / "new" / "run" / "checkpoints" / "step-000123"
    assert latest_checkpoint(tmp_path / "new" / "run") == path
    checkpoint = load_checkpoint(path)
    assert (checkpoint.path, checkpoint.model_dir) == (path, path / "model")
    loaded = checkpoint.state
    assert loaded["step"] == 123
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], moments["exp_avg"])
    assert loaded["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    assert torch.equal(loaded["torch"], state["torch"])
    for key in ("python", "cursor", "texts"):
        assert loaded[key] == state[key]
        assert type(loaded[key]) is type(state[key])
    manifest = json.loads((path / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["model/config", "model/vocabulary", "model/weights", "state.pt"]
    assert manifest["files"]["model/weights"] == {"size": 1000, "sha256": hashlib.sha256(b"w" * 1000).hexdigest()}


def test_a_run_without_checkpoints_has_no_latest(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None
    (tmp_path / "checkpoints" / "step-abc").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000007").write_text("a file")
    assert latest_checkpoint(tmp_path) is None


def test_old_checkpoints_go_and_the_new_one_stays(tmp_path):
    for step in (1, 2, 10, 1_000_000):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-000010", "step-1000000"]
    assert latest_checkpoint(tmp_path).name == "step-1000000"
    # A run resumed from an earlier step must not lose what it has just written.
    save(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["step-000005"]


def test_the_same_step_is_replaced(tmp_path):
    save(tmp_path, 3, note="first")
    path = save(tmp_path, 3, note="second")
    assert load_checkpoint(path).state["note"] == "second"
    assert names(tmp_path) == ["step-000003"]


@pytest.mark.parametrize("name", ["model/weights", "model/vocabulary", "state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_damage_is_refused_by_name(tmp_path, name, damage):
    path = save(tmp_path, 1)
    file = path / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-5])
    else:
        content[len(content) // 2] ^= 128
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=str(file)):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"format": 2, "files": {}}, "format 2, expected 1"),
        ([], "format None, expected 1"),
        ({"format": 1}, "does not list its files"),
        ({"format": 1, "files": {"state.pt": {"size": 1}}}, "does not list its files"),
        ({"format": 1, "files": {}}, "does not list state.pt"),
    ],
)
def test_a_strange_manifest_is_refused(tmp_path, manifest, message):
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=rf"manifest\.json.*{message}"):
        load_checkpoint(path)


def test_a_path_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=f"no checkpoint at {tmp_path}/none"):
        load_checkpoint(tmp_path / "none")


def test_loading_runs_no_code(tmp_path):
    path = save(tmp_path, 1)
    torch.save({"trap": os.system}, path / "state.pt")
    content = (path / "state.pt").read_bytes()
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.pt"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"cannot load .*state\.pt"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"numpy": np.random.get_state()}, r"state\['rng'\]\['numpy'\]\[1\] is a ndarray"),
        ([0, np.float64(1)], r"state\['rng'\]\[1\] is a float64"),
        ({object(): 1}, r"a key of state\['rng'\] is a object"),
    ],
)
def test_a_state_that_could_not_be_loaded_is_refused_before_anything_is_written(tmp_path, value, where):
    with pytest.raises(TypeError, match=where):
        save(tmp_path, 1, rng=value)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(("step", "keep", "message"), [(-1, 1, "step .* got -1"), (1, 0, "keep .* got 0")])
def test_bad_arguments_are_named(tmp_path, step, keep, message):
    with pytest.raises(ValueError, match=message):
        save(tmp_path, step, keep=keep)


@pytest.mark.parametrize("step", [1, 2])
def test_a_disk_that_takes_no_more_leaves_the_earlier_checkpoint(tmp_path, step):
    earlier = save(tmp_path, 1, keep=1, note="earlier")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CheckpointError, match=rf"cannot write checkpoint .*step-00000{step}: OSError"):
            save(tmp_path, step, keep=1, model=Files(weights=b"w" * 10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-000001"]
    assert load_checkpoint(earlier).state["note"] == "earlier"


def test_a_disk_that_is_full_within_the_state_is_named(tmp_path, monkeypatch):
    """Interrupted in a record, torch complains about where it stands."""

    class Full(io.BytesIO):
        def write(self, data):
            if self.tell() + len(data) > 20_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    real = torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: real(state, Full()))
    with pytest.raises(CheckpointError, match=r"step-000001: OSError: \[Errno 28\] No space left on device; earlier"):
        save(tmp_path, 1, tensor=torch.zeros(10_000))


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, failing):
    earlier = save(tmp_path, 1, note="earlier")
    renames, calls = os.rename, []

    def rename(source, target):
        calls.append(source)
        if len(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")
        renames(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(tmp_path, 1, note="later")
    assert names(tmp_path) == ["step-000001"]
    assert load_checkpoint(earlier).state["note"] == "earlier"


def test_everything_reaches_the_disk_before_the_name_does(tmp_path, monkeypatch):
    synced, sync, rename = set(), os.fsync, os.rename

    def record(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def check(source, target):
        written = {str(source), *(str(entry) for entry in source.rglob("*"))}
        assert len(written) == 7
        assert written <= synced
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "rename", check)
    path = save(tmp_path, 1)
    assert str(path.parent) in synced


# Saves checkpoints in forked children, kills each at a random moment, and checks what it left.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from r1kernels.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

torch.set_num_threads(1)
run, draw = Path(sys.argv[1]), random.Random(0)

class Files:
    def save_pretrained(self, directory):
        for name in "abc":
            (directory / name).write_bytes(bytes(100_000))

def save(step):
    # Every step twice, so that replacing a checkpoint is interrupted too; keep=1, so that only one can survive.
    for part in (1, 2):
        state = {"number": 2 * step + part, "tensor": torch.zeros(50_000)}
        save_checkpoint(run, step, model=Files(), tokenizer=Files(), state=state, keep=1)

start = time.monotonic()
save(0)
pace = time.monotonic() - start
number, interrupted = 2, 0
for _ in range(40):
    child = os.fork()
    if child == 0:
        for step in range((number - 1) // 2 + 1, 10**6):
            save(step)
    time.sleep(draw.uniform(0, 3 * pace))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    path = latest_checkpoint(run)
    state = load_checkpoint(path).state
    assert state["number"] >= number, (state["number"], number)
    number = state["number"]
    interrupted += any(entry.name.startswith(".") for entry in path.parent.iterdir())
save(10**6)
assert [entry.name for entry in (run / "checkpoints").iterdir()] == ["step-1000000"]
print(number, interrupted)
"""


def test_a_kill_at_any_moment_leaves_the_latest_checkpoint_whole(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    number, interrupted = map(int, done.stdout.split())
    # The kills came in the middle of saves, and saves completed between them: both ends were exercised.
    assert number > 10
    assert interrupted > 5


def test_what_a_killed_save_left_can_be_removed(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / ".deleted-step-000000" / "model").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000003").rename(tmp_path / "checkpoints" / ".replaced-step-000003")
    tidy_checkpoints(tmp_path, keep=2)
    assert names(tmp_path) == ["step-000002", "step-000003"]
    tidy_checkpoints(tmp_path / "nothing", keep=2)
    assert load_checkpoint(latest_checkpoint(tmp_path)).state["step"] == 3


def test_a_damaged_one_names_the_next_older(tmp_path):
    first, second, third = (save(tmp_path, step) for step in (1, 2, 3))
    for path in (second, first):
        (path / "model" / "weights").write_bytes(b"x")
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(second)
    assert str(error.value).endswith(f"; {first} is older: remove {second} to go on from there")
    with pytest.raises(CheckpointError, match="damaged") as error:
        load_checkpoint(first)
    assert "older" not in str(error.value)
    load_checkpoint(third)

"""Checkpoints: complete or absent, and replaced only by complete ones."""

import errno
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
from checkpoint_cases import Files
from rl_cases import equal, load_shards, make_model, make_tokenizer, policy_of, take_gradient
from transformers import AutoModelForCausalLM

from r1kernels.train.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_state,
    save_checkpoint,
    save_model,
    shards_of,
    tidy_checkpoints,
    write_file,
)
from r1kernels.train.errors import ConfigError, RunError, StorageError
from r1kernels.train.model import hidden_states, load_model
from r1kernels.train.parallel import mesh
from r1kernels.train.policy import make_optimizer
from r1kernels.train.rollout import Sampling, TransformersSampler

POLICY = Files(weights=b"w" * 1000, config=b"{}")
TOKENIZER = Files(vocabulary=b"abc")


def save(directory, step, *, policy=POLICY, tokenizer=TOKENIZER, shards=None, keep=3, **state):
    save_checkpoint(directory, step, policy=policy, tokenizer=tokenizer, state={"step": step, **state},
                    shards=shards or {"optimizer": {"moment": torch.zeros(3)}}, keep=keep)
    return directory / "checkpoints" / f"step-{step:06d}"


def names(directory):
    return sorted(entry.name for entry in (directory / "checkpoints").iterdir())


def test_what_was_saved_is_loaded(tmp_path):
    moments = {"exp_avg": torch.randn(3, dtype=torch.bfloat16), "step": torch.tensor(7.0)}
    state = {
        "optimizer": {"state": {0: moments}, "param_groups": [{"lr": 3e-6, "betas": (0.9, 0.95), "params": [0]}]},
        "python": random.getstate(),
        "cursor": OrderedDict(epoch=1, order=[2, 0, 1]),
        "texts": ["a", None, True, b"x", 2**200, {1, 2}],
    }
    path = save(tmp_path / "new" / "run", 123, **state)
    assert path == tmp_path / "new" / "run" / "checkpoints" / "step-000123"
    assert latest_checkpoint(tmp_path / "new" / "run") == path
    checkpoint = load_checkpoint(path)
    assert (checkpoint[0], checkpoint[1]["step"]) == (path / "model", 123)
    loaded = checkpoint[1]
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], moments["exp_avg"])
    assert loaded["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    for key in ("python", "cursor", "texts"):
        assert loaded[key] == state[key] and type(loaded[key]) is type(state[key])
    assert sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()) == [
        "model/config", "model/vocabulary", "model/weights", "shards/.metadata", "shards/__0_0.distcp", "state.pt"]


def test_the_latest_is_the_highest_step(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None
    (tmp_path / "checkpoints" / "step-abc").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000007.bak").mkdir()
    assert latest_checkpoint(tmp_path) is None
    for step in (1, 2, 10, 1_000_000):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-000007.bak", "step-000010", "step-1000000", "step-abc"]
    assert latest_checkpoint(tmp_path).name == "step-1000000"


def test_a_checkpoint_never_changes(tmp_path):
    """Equal steps have equal states."""
    save(tmp_path, 3, note="first")
    assert load_checkpoint(save(tmp_path, 3, note="second"))[1]["note"] == "first"
    assert names(tmp_path) == ["step-000003"]


@pytest.mark.parametrize("name", ["model/model.safetensors", "shards/__0_0.distcp", "shards/.metadata", "state.pt"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damage_is_refused_by_name(tmp_path, name, damage):
    parts = trained(0)
    older, path = (save(tmp_path, step, policy=parts[0], shards=shards_of(*parts)) for step in (1, 2))
    content = (path / name).read_bytes()
    (path / name).unlink()
    if damage == "truncated":
        (path / name).write_bytes(content[: len(content) // 2])

    def load(path):
        model, _ = load_checkpoint(path)
        load_model(model)
        load_state(path, *parts)

    with pytest.raises(RunError, match=f"{path}/{name.partition('/')[0]}") as error:
        load(path)
    assert "Traceback" not in str(error.value)
    load(older)
    with pytest.raises(StorageError, match=f"{tmp_path}/none"):
        load_checkpoint(tmp_path / "none")


def test_loading_runs_no_code(tmp_path):
    path = save(tmp_path, 1)
    torch.save({"trap": os.system}, path / "state.pt")
    with pytest.raises(StorageError, match=r"state\.pt"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "value", [{"numpy": np.random.get_state()}, [0, np.float64(1)], {object(): 1}], ids=["numpy", "scalar", "object"])
def test_a_state_that_could_not_be_loaded_is_refused(tmp_path, value):
    save(tmp_path, 1)
    with pytest.raises(StorageError, match="step-000002"):
        save(tmp_path, 2, rng=value)
    assert names(tmp_path) == ["step-000001"]


@pytest.mark.parametrize("large", ["model", "state", "shards"])
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, large):
    mesh("cpu")  # with a process group, torch sends errors to all ranks
    earlier = save(tmp_path, 1, keep=1, note="earlier")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(StorageError, match=r"step-000002: .*File too large") as error:
            save(tmp_path, 2, keep=1, policy=Files(weights=b"w" * (20_000 if large == "model" else 10)),
                 shards={"moment": torch.zeros(10_000 if large == "shards" else 1)},
                 tensor=torch.zeros(10_000 if large == "state" else 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not isinstance(error.value, ConfigError)
    assert names(tmp_path) == ["step-000001"]
    assert load_checkpoint(earlier)[1]["note"] == "earlier"


@pytest.mark.parametrize("name", ["step-000002", ".metadata"])
def test_a_rename_that_fails_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, name):
    earlier, real = save(tmp_path, 1), os.rename

    def rename(source, target):
        if target.name == name:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(StorageError, match="Input/output error"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-000001"]
    assert load_checkpoint(earlier)[1]["step"] == 1


def test_everything_reaches_the_disk_before_the_name_does(tmp_path, monkeypatch):
    synced, sync, rename, log = set(), os.fsync, os.rename, tmp_path / "metrics.jsonl"
    log.write_text("{}")

    def record(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def check(source, target):
        if target.name.startswith("step-"):
            written = {str(source), *(str(entry) for entry in source.rglob("*"))}
            assert len(written) == 9 and written | {str(log)} <= synced
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "rename", check)
    assert str(save(tmp_path, 1).parent) in synced


# Saves checkpoints in forked children, kills each at a random moment, and checks what it left.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from checkpoint_cases import Files
from r1kernels.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

torch.set_num_threads(1)
run, draw = Path(sys.argv[1]), random.Random(0)

files = Files(**dict.fromkeys("abc", bytes(100_000)))

def save(step):
    state, tensors = {"number": step}, {"moment": torch.zeros(50_000)}  # keep=1, so that only one can survive
    save_checkpoint(run, step, policy=files, tokenizer=files, shards=tensors, state=state, keep=1)

start = time.monotonic()
save(0)
pace = time.monotonic() - start
number, interrupted = 0, 0

def saved():
    names = [entry.name for entry in (run / "checkpoints").iterdir()]
    return max(int(name[5:]) for name in names if name.startswith("step-"))

for _ in range(12):
    wanted = number + draw.randrange(3)
    child = os.fork()
    if child == 0:
        for step in range(number + 1, 10**6):
            save(step)
    while saved() < wanted:  # on a busy machine, too
        time.sleep(pace / 10)
    time.sleep(draw.uniform(0, pace))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    path = latest_checkpoint(run)
    state = load_checkpoint(path)[1]
    assert state["number"] >= number, (state["number"], number)
    number = state["number"]
    interrupted += any(entry.name.startswith(".") for entry in path.parent.iterdir())
save(10**6)
assert [entry.name for entry in (run / "checkpoints").iterdir()] == ["step-1000000"]
print(number, interrupted)
"""


@pytest.mark.slow(reason="starts a process for each moment")
def test_a_kill_at_any_moment_leaves_the_latest_checkpoint_complete(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=900, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    assert done.returncode == 0, done.stderr
    number, interrupted = map(int, done.stdout.split())
    # Kills came in the middle of saves, and saves were completed between them.
    assert number > 3 and interrupted > 1


def test_what_a_killed_save_left_is_removed(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / ".partial-step-000004" / "model").mkdir(parents=True)
    assert load_checkpoint(latest_checkpoint(tmp_path))[1]["step"] == 3
    tidy_checkpoints(tmp_path, keep=2)
    assert names(tmp_path) == ["step-000002", "step-000003"]
    tidy_checkpoints(tmp_path / "nothing", keep=2)
    assert load_checkpoint(latest_checkpoint(tmp_path))[1]["step"] == 3


def test_the_tokenizers_own_padding_is_saved(tmp_path):
    """Rollouts are padded on the left, and that must not leak into the saved files."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    TransformersSampler(model, tokenizer).sample(["ab", "abc"], Sampling(1.0, 2))
    path = save(tmp_path, 1, policy=policy_of(model), tokenizer=tokenizer)
    assert json.loads((path / "model" / "tokenizer.json").read_text())["padding"] is None
    assert json.loads((path / "model" / "tokenizer_config.json").read_text()).get("padding_side", "right") == "right"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_saved_model_has_the_float32_weights_and_training_goes_on(tmp_path, dtype):
    model = make_model(make_tokenizer())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    policy = policy_of(model, dtype)
    save_model(policy, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert saved.lm_head.weight is saved.model.embed_tokens.weight and equal(saved.state_dict(), before)
    policy(hidden_states, input_ids=torch.ones(1, 3, dtype=torch.long)).sum().backward()
    assert take_gradient(policy).abs().max() > 0


def trained(seed, steps=2):
    """A policy after some updates, its optimizer and a reference."""
    policy, reference = (policy_of(make_model(make_tokenizer(), number)) for number in (seed, seed + 1))
    optimizer = make_optimizer(policy, lr=1e-2)
    update(policy, optimizer, steps)
    return policy, optimizer, reference


def update(policy, optimizer, steps):
    for _ in range(steps):
        policy.reshard_all()  # after a change of the weights
        optimizer.zero_grad()
        policy(hidden_states, input_ids=torch.arange(3, 12)[None]).square().sum().backward()
        optimizer.step()


def test_optimizer_and_reference_are_in_the_shards(tmp_path):
    first, second = trained(0), trained(5, steps=1)
    path = save(tmp_path, 1, policy=first[0], shards=shards_of(*first))
    assert load_shards(path).keys() == {"optimizer", "reference"}
    states = [one[1].state_dict()["state"] for one in (first, second)]
    references = [dict(one[2].weights()) for one in (first, second)]
    assert not equal(*states) and not equal(*references)
    load_state(path, *second)
    assert equal(states[0], second[1].state_dict()["state"]) and equal(references[0], dict(second[2].weights()))


def test_an_optimizer_without_updates_has_counted_none_after_it_was_saved(tmp_path):
    expected = [trained(0, steps=2)[0].shards(), trained(0, steps=4)[0].shards()]
    for number, (before, after) in enumerate([(0, 2), (2, 2)]):
        first, second = trained(0, before), trained(0, 0)
        load_state(save(tmp_path, number, policy=first[0], shards=shards_of(*first)), *second)
        second[0].refresh(first[0])
        for one in (first, second):
            update(*one[:2], after)
            assert equal(one[0].shards(), expected[number])


def test_shards_of_another_model_are_refused_by_name(tmp_path):
    path = save(tmp_path, 1, shards={"optimizer": {"state": {"other": torch.zeros(2)}}})
    with pytest.raises(StorageError, match=f"{path}/shards"):
        load_state(path, *trained(0))


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "file"
    write_file(path, "é\ud800")
    assert path.read_bytes() == b"\xc3\xa9?"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StorageError, match=rf"{path}.*File too large"):
            write_file(path, bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"\xc3\xa9?"

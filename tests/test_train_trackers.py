"""Trackers: asked for before work starts, exact over a resume as far as they can be, and never in the way."""

import importlib.util
import sys
import textwrap

import pytest

from r1kernels.train import trackers
from r1kernels.train.schema import ConfigError
from r1kernels.train.trackers import Trackers, check_trackers

NOT_INSTALLED = {name for name in trackers.BACKENDS if importlib.util.find_spec(name) is None}


def test_what_is_not_there_is_refused_before_work(monkeypatch, tmp_path):
    check_trackers([])
    with pytest.raises(ConfigError, match="'trackers' names 'wandb', expected some of tensorboard, trackio"):
        check_trackers(["wandb"])
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    for name in trackers.BACKENDS:
        with pytest.raises(ConfigError, match=rf"'{name}'.*not installed.*r1kernels\[train,{name}\]"):
            Trackers([name], tmp_path, "r1")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match="each name once"):
        check_trackers(["trackio", "trackio"])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def fake_trackio(tmp_path, monkeypatch):
    """The part of trackio that is used, keeping what it is told."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "trackio.py").write_text(textwrap.dedent("""
        calls = []

        class Run:
            def log(self, metrics, step=None):
                calls.append((step, metrics))

            def finish(self):
                calls.append("finish")

        def init(project, name=None, *, resume="never", embed=True):
            calls.append((project, name, resume, embed))
            return Run()
    """))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    yield lambda: sys.modules["trackio"].calls
    sys.modules.pop("trackio", None)


def test_trackio(fake_trackio, tmp_path):
    with Trackers(["trackio"], tmp_path / "runs" / "demo", "r1_zero") as tracker:
        tracker.write(0, {"step": 0, "loss": 0.5, "reward": float("nan"), "note": "x", "kl": None})
        tracker.write(1, {"loss": 0.25})
    with Trackers(["trackio"], tmp_path / "runs" / "demo", "r1_zero") as tracker:
        tracker.write(1, {"loss": 0.25})
    assert fake_trackio() == [
        ("demo", "r1_zero", "never", False), (0, {"loss": 0.5}), (1, {"loss": 0.25}), "finish",
        ("demo", "r1_zero", "allow", False), (1, {"loss": 0.25}), "finish",
    ]


class Failing:
    def __init__(self, directory, run_name, first_step):
        self.calls = 0

    def write(self, step, values):
        self.calls += 1
        if step == 1:
            raise OSError("no space left")

    def close(self):
        raise AssertionError("closed after it failed")


@pytest.mark.parametrize("make", [Failing, lambda *arguments: 1 / 0], ids=["write", "open"])
def test_a_failing_tracker_warns_once_and_is_left_out(make, monkeypatch, tmp_path):
    monkeypatch.setattr(trackers, "BACKENDS", {"failing": make})
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name)
    told = []
    with Trackers(["failing"], tmp_path, "r1", warn=told.append) as tracker:
        for step in range(4):
            tracker.write(step, {"loss": 1.0})
    assert len(told) == 1 and "the tracker failing failed" in told[0] and "complete" in told[0]
    with Trackers(["failing"], tmp_path, "r1") as tracker, pytest.warns(RuntimeWarning, match="is left out"):
        tracker.write(1, {"loss": 1.0})


@pytest.mark.skipif("tensorboard" in NOT_INSTALLED, reason="needs the package tensorboard")
def test_tensorboard_has_every_point_once_after_a_kill(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def value(step):
        return {"step": step, "reward": step / 2, "nothing": None}

    killed = Trackers(["tensorboard"], tmp_path, "r1_zero")  # neither closed nor told of its end
    for step in range(6):
        killed.write(step, value(step))
    events = tmp_path / "tensorboard" / "r1_zero"
    [file] = events.iterdir()
    with open(file, "ab") as torn:
        torn.write(b"\x18\x00\x00")
    with Trackers(["tensorboard"], tmp_path, "r1_zero") as resumed:
        for step in range(4, 9):
            resumed.write(step, value(step))
    killed.close()
    read = EventAccumulator(str(events))
    read.Reload()
    assert read.Tags()["scalars"] == ["reward"]
    assert [(point.step, point.value) for point in read.Scalars("reward")] == [(n, n / 2) for n in range(9)]

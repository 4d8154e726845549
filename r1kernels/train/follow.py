"""The files of a run as they grow, read from outside: nothing is written or locked."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from r1kernels.train.columns import duration
from r1kernels.train.metrics import decode_line
from r1kernels.train.record import CONFIG, MANIFEST, NO_MODEL
from r1kernels.train.schema import ConfigError, read_yaml

LOCK = ".lock"
LOGS = ("metrics", "timings", "samples")
# Steps whose pace gives the time left; seconds by which clocks may disagree.
PACE, SLACK = 20, 60


class Tail:
    """The lines of a log as they come: a torn one when it is whole, all of them anew when a resume replaced the file.

    The open file keeps its inode from being given to the next one.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lines, self.damaged = path, [], 0
        self._file: BinaryIO | None = None
        self._rest = b""

    def read(self) -> None:
        """Brings `lines` up to date."""
        try:
            now = os.stat(self.path)
        except OSError:
            now = None
        if self._file is not None:
            old = os.fstat(self._file.fileno())
            same = now is not None and (old.st_dev, old.st_ino) == (now.st_dev, now.st_ino)
            if not same or now.st_size < self._file.tell():
                self.close()
                self.lines, self._rest, self.damaged = [], b"", 0
        if self._file is None:
            try:
                self._file = open(self.path, "rb")  # noqa: SIM115
            except OSError:
                return
        *whole, self._rest = (self._rest + self._file.read()).split(b"\n")
        for text in whole:
            line = decode_line(text)
            if line is None:
                self.damaged += 1
            else:
                self.lines.append(line)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


@dataclass
class FollowedStage:
    """What is known of a stage; its logs are opened when it is at work."""

    name: str
    settings: dict[str, Any]
    entry: dict[str, Any] = field(default_factory=dict)
    tails: dict[str, Tail] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return str(self.entry.get("kind") or self.settings.get("kind") or "")

    @property
    def status(self) -> str:
        return str(self.entry.get("status") or "waiting")

    @property
    def done(self) -> bool:
        """Whether it is finished, and evaluated if it is to be."""
        return self.status == "finished" and (self.kind in NO_MODEL or bool(self.entry.get("evaluation")))

    def lines(self, log: str = "metrics") -> list[dict[str, Any]]:
        return self.tails[log].lines if log in self.tails else []

    def rows(self, count: int) -> list[dict[str, Any]]:
        """The last steps with their times."""
        times = {line["step"]: line for line in self.lines("timings")[-2 * count :]}
        return [{**times.get(line["step"], {}), **line} for line in self.lines()[-count:]]

    def left(self) -> str:
        """The time left, at the pace of the last steps; empty if it cannot be known."""
        steps, times = self.settings.get("steps"), self.lines("timings")[-PACE:]
        if not isinstance(steps, int) or len(times) < 2:
            return ""
        spent = [line.get("seconds_total") for line in (times[0], times[-1])]
        if None not in spent:
            seconds = spent[1] - spent[0]
        else:
            seconds = sum(value for line in times[1:] for name, value in line.items() if name.startswith("seconds_"))
        done = times[-1]["step"] + 1
        return duration(max(0.0, seconds / max(1, done - 1 - times[0]["step"]) * (steps - done)))


class FollowedRun:
    """A run as its files tell it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.stages: dict[str, FollowedStage] = {}
        self._read: dict[str, tuple[int, ...]] = {}

    @property
    def current(self) -> FollowedStage | None:
        """The stage at work, else the last one that was."""
        begun = [stage for stage in self.stages.values() if stage.entry]
        return next((stage for stage in begun if stage.status == "running"), begun[-1] if begun else None)

    @property
    def finished(self) -> bool:
        return bool(self.stages) and all(stage.status == "finished" for stage in self.stages.values())

    @property
    def evaluated(self) -> bool:
        return all(stage.done for stage in self.stages.values())

    def poll(self) -> None:
        config, manifest = self._changed(CONFIG), self._changed(MANIFEST)
        if config is not None:
            self._configure(config)
        if manifest is not None:
            self._note(manifest)
        if self.current is not None:
            stage = self.current
            if not stage.tails:
                stage.tails = {log: Tail(self.run_dir / stage.name / f"{log}.jsonl") for log in LOGS}
        for stage in self.stages.values():
            for tail in stage.tails.values():
                tail.read()

    def writer(self) -> tuple[int | None, bool]:
        """The process that wrote or writes the run, and whether it is there, on this machine."""
        try:
            path = self.run_dir / LOCK
            pid, locked = int(path.read_text()), path.stat().st_mtime
        except (OSError, ValueError):
            return None, False
        return pid, _alive(pid, locked)

    def close(self) -> None:
        for stage in self.stages.values():
            for tail in stage.tails.values():
                tail.close()

    def _changed(self, name: str) -> str | None:
        """The text of a file that is not as it was read before."""
        path = self.run_dir / name
        try:
            at = os.stat(path)
            mark = (at.st_ino, at.st_mtime_ns, at.st_size)
            if self._read.get(name) == mark:
                return None
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None
        self._read[name] = mark
        return text

    def _configure(self, text: str) -> None:
        try:
            listed = read_yaml(text)["stages"]
            found = {item["name"]: item for item in listed}
        except (yaml.YAMLError, ConfigError, TypeError, KeyError):
            return  # being written, or not a recipe
        self.close()
        self.stages = {name: FollowedStage(name, item) for name, item in found.items()}
        self._read.pop(MANIFEST, None)

    def _note(self, text: str) -> None:
        try:
            content = json.loads(text)
            entries = {name: entry for name, entry in content["stages"].items() if isinstance(entry, dict)}
        except (ValueError, TypeError, KeyError, AttributeError):
            self._read.pop(MANIFEST, None)  # being written
            return
        order = [name for name in content.get("order") or () if name in self.stages or name in entries]
        names = dict.fromkeys([*order, *self.stages, *entries])
        self.stages = {name: self.stages.get(name) or FollowedStage(name, {}) for name in names}
        for name, stage in self.stages.items():
            stage.entry = entries.get(name, {})


def _alive(pid: int, since: float) -> bool:
    """Whether a process runs that was there at a time: another one may have got its number later."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = next(int(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if "btime" in line)
        started = boot + int(rest[18]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, StopIteration):
        return True
    return state not in "ZX" and started < since + SLACK

"""What a run left, read into one structure: every report is made from it and from nothing else."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from r1kernels.train.metrics import read_metrics
from r1kernels.train.schema import ConfigError, read_yaml

CONFIG, MANIFEST = "config.yaml", "manifest.json"
RL = ("grpo", "ppo")
# Kinds that leave no model to evaluate.
NO_MODEL = ("reject", "preference", "evaluate")
# Where the time of a step goes. Whatever is not listed is glue: the verifier, logging, saving, and what no part of
# the timings covers.
MODEL_WORK = (
    "sampling", "generation", "logprobs", "values", "updates", "forward", "backward", "optimizer", "teacher",
    "training", "evaluation",
)
UNKNOWN = "not broken down"

Line = dict[str, Any]


@dataclass(frozen=True)
class StageRecord:
    """A stage: its settings, its entry in the manifest (empty before it starts) and its logs."""

    name: str
    kind: str
    settings: Line
    entry: Line
    steps: list[Line] = field(default_factory=list)
    timings: list[Line] = field(default_factory=list)
    samples: list[Line] = field(default_factory=list)

    @property
    def status(self) -> str:
        return {"finished": "finished", None: "not started"}.get(self.entry.get("status"), "unfinished")

    @property
    def parent(self) -> str | None:
        """The stage whose model this one starts from."""
        return self.settings.get("model") if isinstance(self.settings.get("model"), str) else None

    @property
    def evaluation(self) -> Line | None:
        found = self.entry.get("evaluation") or self.entry.get("summary")
        return found if found and found.get("pass_at_1") is not None else None

    @property
    def measured(self) -> list[Line]:
        """The steps that hold an evaluation."""
        return [line for line in self.steps if line.get("pass_at_1") is not None]

    @functools.cached_property
    def seconds(self) -> dict[str, float]:
        """Part -> seconds; "the rest" is what no part covers. Empty if no times are known.

        "total" in the timings is the time from the beginning of the stage to the end of a step.
        """
        parts: dict[str, float] = {}
        for line in self.timings:
            for name, value in line.items():
                if name.startswith("seconds_") and name != "seconds_total" and value is not None:
                    parts[name.removeprefix("seconds_")] = parts.get(name.removeprefix("seconds_"), 0.0) + value
        whole = self.entry.get("seconds") or max((line.get("seconds_total") or 0.0 for line in self.timings), default=0)
        if parts:
            parts["the rest"] = max(0.0, whole - sum(parts.values()))
        elif whole:
            parts[UNKNOWN] = whole
        after = (self.entry.get("evaluation") or {}).get("seconds")
        if after:
            parts["evaluation"] = parts.get("evaluation", 0.0) + after
        return parts

    def count(self, name: str) -> int | None:
        """A count summed over the steps, or of the summary; None if nobody counted."""
        values = [line[name] for line in self.steps if isinstance(line.get(name), int | float)]
        found = sum(values) if values else self.entry.get("summary", {}).get(name)
        return found if isinstance(found, int | float) else None


@dataclass(frozen=True)
class RunRecord:
    """A run: its stages in the order in which they run, and in words what is not there."""

    directory: Path
    config_text: str
    settings: Line
    stages: dict[str, StageRecord]
    missing: list[str]

    @property
    def name(self) -> str:
        return self.directory.absolute().name

    def root(self, stage: StageRecord) -> str:
        """The stage in which the model of `stage` began."""
        seen = {stage.name}
        while stage.parent in self.stages and stage.parent not in seen:
            stage = self.stages[stage.parent]
            seen.add(stage.name)
        return stage.parent or stage.name

    def families(self) -> dict[str, list[StageRecord]]:
        """The stages with a model, by the model they began from: distillation beside RL on the same small model."""
        families: dict[str, list[StageRecord]] = {}
        for stage in self.stages.values():
            if stage.kind not in NO_MODEL or stage.evaluation:
                families.setdefault(self.root(stage), []).append(stage)
        return families

    def rl_families(self) -> Iterator[list[StageRecord]]:
        """The stages of RL that have steps, by family."""
        for stages in self.families().values():
            found = [stage for stage in stages if stage.kind in RL and stage.steps]
            if found:
                yield found

    def examples(self, stage: StageRecord) -> list[tuple[Line | None, Line]]:
        """Completions (before, after) of a stage to the same questions."""
        first, last = stage.samples[:1], stage.samples[-1:]
        after = (stage.evaluation or {}).get("examples") or [
            line for line in stage.samples if line["step"] == last[0]["step"]
        ]
        parent = self.stages.get(stage.parent or "")
        before = ((parent.evaluation if parent else None) or {}).get("examples") or [
            line for line in stage.samples if line["step"] == first[0]["step"] < last[0]["step"]
        ]
        asked = {line["question"]: line for line in before}
        return [(asked.get(line["question"]), line) for line in after]

    def glue_share(self) -> float | None:
        """The share of the time, where it is broken down, that is not the model's work."""
        known = [stage.seconds for stage in self.stages.values() if stage.seconds and UNKNOWN not in stage.seconds]
        total = sum(sum(parts.values()) for parts in known)
        glue = sum(value for parts in known for name, value in parts.items() if name not in MODEL_WORK)
        return glue / total if total else None


def read_run(run_dir: str | Path) -> RunRecord:
    """Reads a run, finished or not.

    Raises:
        ConfigError: there is no run, or its settings or manifest are damaged.
        DataError: a log is damaged.
    """
    run_dir = Path(run_dir)
    try:
        text = (run_dir / CONFIG).read_text(encoding="utf-8")
        settings = read_yaml(text)
    except FileNotFoundError:
        raise ConfigError(f"{run_dir} holds no run: no {CONFIG} in it") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ConfigError) as error:
        raise ConfigError(f"cannot read {run_dir / CONFIG}: {error}") from error
    settings = settings if isinstance(settings, dict) else {}
    missing: list[str] = []
    order, entries = _manifest(run_dir / MANIFEST, missing)
    listed = settings.get("stages")
    configs = {
        item["name"]: item for item in (listed if isinstance(listed, list) else [])
        if isinstance(item, dict) and isinstance(item.get("name"), str)
    }
    if not configs and not entries:
        missing.append(f"{CONFIG} lists no stages")
    stages = {}
    for name in dict.fromkeys([*order, *configs, *entries]):
        entry, config = entries.get(name, {}), configs.get(name, {})
        if entry or config:
            kind = entry.get("kind") or config.get("kind") or "unknown"
            logs = (read_metrics(run_dir / name / f"{log}.jsonl") for log in ("metrics", "timings", "samples"))
            stages[name] = StageRecord(name, kind, config, entry, *logs)
            missing += _missing(stages[name])
    return RunRecord(run_dir, text, settings, stages, missing)


def _manifest(path: Path, missing: list[str]) -> tuple[list[str], dict[str, Line]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        missing.append(f"{path.name}: the run has not begun")
        return [], {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    entries = content.get("stages") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ConfigError(f"{path} is damaged: expected a JSON object with 'stages'")
    return content.get("order") or [], entries


def _missing(stage: StageRecord) -> Iterator[str]:
    if stage.status != "finished":
        yield f"{stage.name}: {stage.status}"
        if not stage.entry:
            return
    elif stage.kind not in NO_MODEL and stage.evaluation is None:
        yield f"{stage.name}: no evaluation"
    if stage.kind in ("model", "evaluate"):
        return
    logs = {"metrics.jsonl": stage.steps, "timings.jsonl": stage.timings}
    if stage.kind in RL:
        logs["samples.jsonl"] = stage.samples
    for name, lines in logs.items():
        if not lines and stage.kind != "reject":
            yield f"{stage.name}: no {name}"

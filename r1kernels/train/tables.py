"""The tables of a report, as plain words: Markdown and HTML only differ in how they set them."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from r1kernels.train.columns import duration
from r1kernels.train.record import MODEL_WORK, UNKNOWN, Line, RunRecord, StageRecord

PACKAGES = ("r1kernels", "torch", "transformers", "tokenizers", "math-verify", "numpy")
GLUE_BAR = 0.15
NONE = "\u2013"
# The longest completion that is shown whole, and what is shown of a longer one from its two ends.
LONGEST, HEAD, TAIL = 4000, 2800, 1000
# Characters that steer terminals, that HTML forbids or that reorder what stands beside them.
_STEERING = {
    code: f"[U+{code:04X}]"
    for first, last in ((0, 8), (11, 31), (127, 159), (0x200E, 0x200F), (0x202A, 0x202E), (0x2066, 0x2069))
    for code in range(first, last + 1)
}


@dataclass(frozen=True)
class Table:
    """`words`: how many of the first columns hold words; the others hold numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    words: int = 1


def results(run: RunRecord) -> list[Table]:
    """The stages by what their models can do: a table a family of models."""
    tables = []
    for root, stages in run.families().items():
        title = f"From {root}"
        count = next((s.entry.get("summary", {}).get("parameters") for s in stages if s.name == root), None)
        if isinstance(count, int):
            title += f" ({count:,} parameters)"
        if any(stage.kind == "distill" for stage in stages):
            title += ": distillation and RL on the same model"
        rows = [_result(stage) for stage in stages]
        columns = ["stage", "kind", "from", "pass@1 (%)", f"cons@{_k(stages)} (%)", "language (%)", "length (tokens)",
                   "format (%)", "cut off (%)", "reflective words"]
        tables.append(Table(title, columns, rows, _settings(stages), words=3))
    return tables


def _result(stage: StageRecord) -> list[str]:
    found = stage.evaluation
    row = [stage.name, stage.kind, stage.parent or NONE]
    if found is None:
        return [*row, stage.status if stage.status != "finished" else "no evaluation", *[NONE] * 6]
    return [
        *row,
        with_error(found, "pass_at_1", 100), with_error(found, "cons_at_k", 100), with_error(found, "language", 100),
        with_error(found, "length"), with_error(found, "format", 100), with_error(found, "truncated", 100),
        with_error(found, "reflective", digits=2),
    ]


def with_error(values: Line, key: str, scale: float = 1, digits: int = 1) -> str:
    """12.3 ± 0.4, the second being the standard error."""
    value, error = values.get(key), values.get(f"{key}_se")
    if not isinstance(value, int | float):
        return NONE
    return f"{value * scale:.{digits}f}" + (f" ± {error * scale:.{digits}f}" if isinstance(error, int | float) else "")


def _k(stages: Sequence[StageRecord]) -> Any:
    found = {stage.evaluation["k"] for stage in stages if stage.evaluation and stage.evaluation.get("k")}
    return found.pop() if len(found) == 1 else "k"


def _settings(stages: Sequence[StageRecord]) -> str:
    """How the rows were measured, and whether in the same way."""
    ways: dict[str, list[str]] = {}
    for stage in stages:
        if stage.evaluation:
            get = stage.evaluation.get
            way = (f"{get('questions')} questions x {get('k')} samples, T {get('temperature')}, top-p {get('top_p')}, "
                   f"at most {get('max_new_tokens')} tokens, prompts {str(get('prompt_hash'))[:12]}")
            ways.setdefault(way, []).append(stage.name)
    text = "; ".join(f"{way}" + (f" ({', '.join(names)})" if len(ways) > 1 else "") for way, names in ways.items())
    if len(ways) > 1:
        return f"Not measured in the same way, so rows do not compare as they stand: {text}."
    return f"± is one standard error. {text}." if text else "No stage was evaluated."


def overview(run: RunRecord) -> Table:
    rows = []
    for stage in run.stages.values():
        total = sum(stage.seconds.values())
        rows.append([stage.name, stage.kind, stage.parent or NONE, stage.status,
                     str(len(stage.steps)) if stage.steps else NONE, duration(total) if total else NONE])
    return Table("Stages", ["stage", "kind", "from", "status", "logged steps", "time"], rows, words=4)


def progress(run: RunRecord) -> str:
    done = sum(stage.status == "finished" for stage in run.stages.values())
    total = sum(sum(stage.seconds.values()) for stage in run.stages.values())
    return f"{done} of {len(run.stages)} stages finished, {duration(total)} in all"


def times(run: RunRecord) -> Table:
    """Seconds a stage and part, and the share of what is not the model's work."""
    stages = [stage for stage in run.stages.values() if stage.seconds]
    names = list(dict.fromkeys(name for stage in stages for name in stage.seconds))
    names.sort(key=lambda name: (name == UNKNOWN, name not in MODEL_WORK))
    rows = [
        [stage.name, f"{sum(stage.seconds.values()):.1f}",
         *(f"{stage.seconds[name]:.1f}" if name in stage.seconds else NONE for name in names)]
        for stage in stages
    ]
    sums = [sum(stage.seconds.get(name, 0.0) for stage in stages) for name in names]
    if rows:
        rows.append(["all", f"{sum(sums):.1f}", *(f"{value:.1f}" for value in sums)])
        rows.append(["share (%)", "100.0", *(f"{100 * value / max(sum(sums), 1e-9):.1f}" for value in sums)])
    share, note = run.glue_share(), "No stage has timings."
    if share is not None:
        work = ", ".join(name for name in names if name in MODEL_WORK)
        note = (
            f"Glue (verifier, logging, saving and the rest: all but {work}) takes {share:.1%} of the time of the "
            f"stages with timings, {'below' if share < GLUE_BAR else 'NOT below'} the bar of {GLUE_BAR:.0%}."
        )
    return Table("Where the time went (seconds)", ["stage", "total", *names], rows, note)


def troubles(run: RunRecord) -> Table:
    """What could not be scored, and the signs of a trainer at odds with its sampler."""
    rows = []
    for stage in run.stages.values():
        counts = [stage.count(name) for name in ("unscorable", "timeouts", "crashes", "endpoint_failures")]
        flat = [line["zero_spread"] for line in stage.steps if line.get("zero_spread") is not None]
        worst = [max((line[name] for line in stage.steps if line.get(name) is not None), default=None)
                 for name in ("logprob_gap_max", "first_ratio_deviation")]
        evaluated = (stage.evaluation or {}).get("unscorable")
        if any(value is not None for value in (*counts, *worst, evaluated)):
            rows.append([
                stage.name,
                *(NONE if value is None else f"{value:.0f}" for value in (*counts, evaluated)),
                f"{sum(value == 1 for value in flat)} of {len(flat)}" if flat else NONE,
                *(NONE if value is None else f"{value:.1e}" for value in worst),
            ])
    columns = ["stage", "unscorable", "timeouts", "crashes", "endpoint failures", "unscorable in the evaluation",
               "steps without a group to learn from", "largest log-prob gap", "first ratio, largest |r - 1|"]
    return Table("What could not be scored", columns, rows,
                 "Unscorable samples are left out of their group (advantage 0); none is counted as wrong.")


def facts(stage: StageRecord) -> list[tuple[str, str]]:
    """The single values of a stage's summary."""
    summary = stage.entry.get("summary", {})
    return [(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else f"{value}")
            for name, value in summary.items() if isinstance(value, int | float | str) and summary != stage.evaluation]


def counts(stage: StageRecord) -> list[tuple[str, dict[str, float]]]:
    """The counts of a stage's summary, such as those of the reasons to reject a sample."""
    return [(name.replace("_", " "), value) for name, value in stage.entry.get("summary", {}).items()
            if isinstance(value, dict) and value and all(isinstance(item, int | float) for item in value.values())]


def hashes(run: RunRecord) -> Table:
    def short(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{name} {short(item)}" for name, item in value.items()) or NONE
        return str(value)[:10] if value else NONE

    names = ("config", "code", "data", "inputs")
    rows = [
        [stage.name, *(short(stage.entry.get("hashes", {}).get(name)) for name in names),
         short(stage.entry.get("output")), short(stage.entry.get("fingerprint"))]
        for stage in run.stages.values() if stage.entry
    ]
    return Table("Hashes", ["stage", *names, "output", "fingerprint"], rows,
                 "The first digits; manifest.json holds them all.", words=7)


def verdict(example: Line) -> str:
    return {1: "right", 0: "wrong"}.get(example.get("accuracy"), "not scored")


def visible(text: str) -> str:
    """The text with the characters that would act on the reader's screen spelt out."""
    return text.replace("\r\n", "\n").translate(_STEERING)


def shortened(text: str) -> str:
    text = text.strip()
    if len(text) <= LONGEST:
        return text
    return f"{text[:HEAD]}\n[... {len(text) - HEAD - TAIL:,} characters ...]\n{text[-TAIL:]}"


def versions() -> str:
    found = [f"Python {platform.python_version()}", platform.platform()]
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)

"""What a run leaves for people: report.md with curves.png, and report.html, made from its files alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from r1kernels.train import curves, tables
from r1kernels.train.columns import sparkline
from r1kernels.train.record import RunRecord, StageRecord, read_run
from r1kernels.train.report_html import to_html
from r1kernels.train.schema import ConfigError
from r1kernels.train.tables import Table


def write_report(run_dir: str | Path) -> list[Path]:
    """Writes the report of a run, finished or not; returns the paths of its files.

    Raises:
        ConfigError: there is no run, it is damaged, or its directory cannot be written.
        DataError: a log is damaged.
    """
    run = read_run(run_dir)
    picture = curves.png(run)
    contents = {
        "report.md": to_markdown(run, picture is not None).encode("utf-8", "replace"),
        "report.html": to_html(run).encode("utf-8", "replace"),
        **({"curves.png": picture} if picture else {}),
    }
    for name, content in contents.items():
        aside = run.directory / f".{name}"
        try:
            aside.write_bytes(content)
            aside.replace(run.directory / name)
        except OSError as error:
            raise ConfigError(
                f"the report of {run_dir} cannot be written: {run.directory / name}: {error.strerror}"
            ) from error
    return [run.directory / name for name in contents]


def to_markdown(run: RunRecord, picture: bool) -> str:
    parts = [f"# {_text(run.name)}", f"{tables.progress(run).capitalize()}."]
    if run.missing:
        parts += ["Missing:", "\n".join(f"- {_text(item)}" for item in run.missing)]
    parts.append("## Results")
    for table in tables.results(run):
        parts += _table(table, "###")
    if picture:
        parts.append("![The stages with their curves laid end to end](curves.png)")
    parts += _table(tables.overview(run))
    for stage in run.stages.values():
        if stage.entry:
            parts += _stage(run, stage)
    for table in (tables.times(run), tables.troubles(run), tables.hashes(run)):
        parts += _table(table)
    parts += ["## Settings", _fenced(run.config_text, "yaml"), "## Versions", _text(tables.versions())]
    return "\n\n".join(parts) + "\n"


def _stage(run: RunRecord, stage: StageRecord) -> Iterator[str]:
    start = f", from {stage.parent}" if stage.parent else ""
    yield f"## {_text(f'{stage.name} ({stage.kind}{start})')}"
    facts = tables.facts(stage)
    if facts:
        yield "; ".join(f"{_text(name)} {_text(value)}" for name, value in facts)
    for title, values in tables.counts(stage):
        yield from _table(Table(title, ["reason", "count"], [[name, f"{value:g}"] for name, value in values.items()]),
                          "###")
    rows = []
    for panel in curves.PANELS:
        for label, points in curves.series(panel, stage.steps).items():
            values = [value for _, value, _ in points]
            limits = (values[0], values[-1], min(values), max(values))
            rows.append([f"{panel.title}: {label}", *(f"{value:.4g}" for value in limits), sparkline(values, 24)])
    if rows:
        yield from _table(Table("Curves", ["", "first", "last", "least", "most", "course"], rows), "###")
    examples = run.examples(stage)
    if examples:
        yield "### Completions"
    for before, after in examples:
        yield f"**{_text(after['question'])}** (answer {_text(str(after['answer']))})"
        for when, example in (("Before", before), ("After", after)):
            if example is not None:
                yield f"{when}, {tables.verdict(example)}:"
                yield _fenced(tables.shortened(example["completion"]))


def _table(table: Table, level: str = "##") -> Iterator[str]:
    yield f"{level} {_text(table.title)}"
    if table.rows:
        align = ["---" if index < table.words else "---:" for index in range(len(table.columns))]
        lines = [[_text(column) for column in table.columns], align, *([_text(c) for c in row] for row in table.rows)]
        yield "\n".join(f"| {' | '.join(line)} |" for line in lines)
    if table.note:
        yield _text(table.note)


def _text(text: str) -> str:
    """Text that Markdown takes for nothing else, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", " ".join(tables.visible(text).split()))


def _fenced(text: str, language: str = "") -> str:
    """A block with a fence longer than any in the text."""
    text = tables.visible(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.strip()}\n{fence}"

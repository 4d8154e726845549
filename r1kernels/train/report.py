"""The report of a run: report.html, which needs no other file, and its figures as PNG files in curves/."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from r1kernels.train import recipe_file
from r1kernels.train.chain import CONFIG, read_manifest
from r1kernels.train.checkpoint import write_file
from r1kernels.train.log import METRICS, SAMPLES, printable, read_lines

COLUMNS = 4  # panels of a figure side by side


def write_report(run_dir: str | Path) -> None:
    """Writes the report of a run, finished or not."""
    run_dir = Path(run_dir)
    recipe, records, stages = recipe_file.load_recipe(run_dir / CONFIG), read_manifest(run_dir), []
    for name, settings in recipe.stages.items():
        lines, samples = (read_lines(run_dir / name / file) for file in (METRICS, SAMPLES))
        figure = _figure(lines)
        if figure:
            write_file(run_dir / "curves" / f"{name}.png", figure)
        stages.append({**settings.model_dump(), **records.get(name, {}), "name": name, "lines": lines,
                       "samples": samples, "figure": base64.b64encode(figure).decode()})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, extensions=["jinja2.ext.do"],
        trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("report.html.jinja").render(
        run=run_dir.absolute().name, config=(run_dir / CONFIG).read_text(encoding="utf-8"), stages=stages)
    write_file(run_dir / "report.html", page)


def _figure(lines: list[dict[str, Any]]) -> bytes:
    """A figure as PNG: a panel for each metric of a stage over its steps, times included; empty without metrics."""
    lines = [{**line, **line.get("timing", {})} for line in lines]
    metrics = list(dict.fromkeys(name for line in lines for name, value in line.items()
                                 if name != "step" and isinstance(value, int | float)))
    rows, png = math.ceil(len(metrics) / COLUMNS), io.BytesIO()
    if metrics:
        figure = Figure(figsize=(12, 2 * rows))
        figure.subplots_adjust(0.06, 0.4 / rows / 2, 0.99, 1 - 0.4 / rows / 2, hspace=0.4)
        for place, name in enumerate(metrics, start=1):
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            axes = figure.add_subplot(rows, COLUMNS, place)
            axes.set_title(printable(name), fontsize="small", parse_math=False)
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else "")
        figure.savefig(png, metadata={"Software": None})
    return png.getvalue()

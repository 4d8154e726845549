"""The report of a run: report.html, which needs no other file, and its figures as PNG files in curves/.

The template lays the page out and says which metrics share a figure. Models write what they like, so every value is
cleaned by `printable` and escaped where the template prints it.
"""

from __future__ import annotations

import base64
import fnmatch
import io
import platform
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from r1kernels.train.chain import CONFIG, read_manifest
from r1kernels.train.checkpoint import write_file
from r1kernels.train.log import METRICS, SAMPLES, printable, read_lines
from r1kernels.train.recipe_file import load_recipe


def write_report(run_dir: str | Path) -> None:
    """Writes the report of a run, finished or not."""
    run_dir = Path(run_dir)
    recipe, records, figures = load_recipe(run_dir / CONFIG), read_manifest(run_dir), Figures()
    stages = []
    for name in recipe.stages:
        lines, samples = (read_lines(run_dir / name / file) for file in (METRICS, SAMPLES))
        stage = {**recipe.stages[name].model_dump(), **records.get(name, {}), "name": name}
        stages.append({**stage, "lines": lines, "samples": samples, "times": _times(stage, lines)})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, finalize=_clean,
        extensions=["jinja2.ext.do"], trim_blocks=True, lstrip_blocks=True)
    with matplotlib.rc_context(fname=Path(__file__).with_name("report.mplstyle")):
        page = environment.get_template("report.html.jinja").render(
            run=run_dir.absolute().name, config=(run_dir / CONFIG).read_text(encoding="utf-8"), stages=stages,
            figures=figures, system=f"Python {platform.python_version()}, {platform.platform()}",
            versions=[f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "mpmath")])
    for name, content in {**figures, "report.html": page}.items():
        write_file(run_dir / name, content)


def _times(stage: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of each part of a stage; "other" is the rest."""
    times = Counter()
    for line in lines:
        times.update({part: x for part, x in line["timing"].items() if part not in ("total", "tokens_per_second")})
    times["other"] = max(0.0, stage.get("seconds", 0.0) - times.total())
    times["evaluation"] += (stage.get("evaluation") or {}).get("seconds", 0.0)
    return {part: seconds for part, seconds in times.items() if seconds}


def _clean(value: Any) -> Any:
    """What the template prints for a value. `Markup` is the output of its own macros, which is clean already."""
    return "\u2013" if value is None else value if isinstance(value, Markup) else printable(value)


class Figures(dict[str, bytes]):
    """The figures that the template asks for: path -> PNG."""

    def curves(self, stage: dict[str, Any], title: str, *metrics: str) -> str | None:
        """Metrics of a stage over its steps, as the source of an <img>; None if there are none. `*` is a wildcard."""
        known = dict.fromkeys(name for line in stage["lines"] for name in line if name != "reward_std")
        curves = {name: lines for metric in metrics for name in fnmatch.filter(known, metric)
                  if (lines := [line for line in stage["lines"] if isinstance(line.get(name), int | float)])}
        if not curves:
            return None
        axes = Figure(figsize=(3.2, 2.1)).add_axes((0.15, 0.12, 0.82, 0.66))
        axes.set_title(title, pad=15, x=-0.16)
        for name, lines in curves.items():
            steps, values = [line["step"] for line in lines], [line[name] for line in lines]
            errors = [line.get(f"{name}_se") or 0.0 for line in lines]
            axes.errorbar(steps, values, errors if any(errors) else None, markersize=2.5,
                          marker="o" if any(errors) or len(values) == 1 else "",
                          label=printable(name.removeprefix("reward_"))[:20])
        axes.legend(loc="lower left", bbox_to_anchor=(-0.175, 1), ncols=5)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.1e}" if 0 < abs(y) < 1e-3 else f"{y:.3g}")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        if "pass_at_1" in metrics:
            axes.set_ylim(-0.02, 1.02)
        png = io.BytesIO()
        axes.figure.savefig(png, metadata={"Software": None})
        self[f"curves/{stage['name']}-{metrics[0]}.png"] = png.getvalue()
        return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"

"""The report of a run: report.html, which needs no other file, and its curves as PNG files in curves/.

Everything is read from the files of the run, finished or not. Models write what they like, so the template cleans every
value by `printable` and escapes it.
"""

from __future__ import annotations

import base64
import io
import json
import math
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from r1kernels.train.checkpoint import write_file
from r1kernels.train.errors import ConfigError, StorageError
from r1kernels.train.log import METRICS, SAMPLES, duration, printable, read_lines
from r1kernels.train.recipe_file import read_yaml

# Title of a panel -> the metrics in it. "reward_*" stands for every reward.
PANELS = {
    "pass@1 and cons@k, held-out": ("pass_at_1", "cons_at_k"),
    "Loss": ("loss", "eval_loss"),
    "Rewards": ("reward", "reward_*"),
    "Tokens of a completion": ("length", "eval_length"),
    "Format and language, held-out": ("eval_format", "eval_language"),
    "KL to the reference": ("kl",),
    "Entropy of a token (nats)": ("entropy",),
    "Equal groups, truncated completions": ("zero_spread", "truncated"),
    "Clipped tokens": ("clip_low_fraction", "clip_high_fraction"),
    "Reflective words of a completion": ("reflective", "eval_reflective"),
    "Log-prob gap between sampler and trainer": ("logprob_gap_mean", "logprob_gap_max"),
    "Preference accuracy": ("accuracy", "eval_accuracy"),
    "Margin between preferences": ("margin",),
    "Critic": ("value_loss", "explained_variance"),
    "Gradient norm": ("grad_norm",),
    "Learning rate": ("learning_rate",),
}
COLUMNS, CELL = 3, (3.2, 2.1)  # panels beside each other on a sheet of curves, and the size of one in inches
MANY = 60  # points, from which on a curve is drawn as the mean over a twentieth of them
MODEL_WORK = ("sampling", "logprobs", "updates", "evaluation")  # the parts of the time that are not glue
PACKAGES = ("r1kernels", "torch", "transformers", "tokenizers", "mpmath", "numpy")
INK, FAINT, RULE = "#26292e", "#6b727b", "#dcdfe4"
COLOURS = ("#2f5f98", "#c0622b", "#3f7d58", "#7d5a9b", "#9a8433", "#5b8a93")
STYLE = {
    "text.parse_math": False, "text.color": INK, "font.size": 8, "axes.titlesize": 8.5, "axes.titlelocation": "left",
    "axes.edgecolor": RULE, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": RULE,
    "grid.linewidth": 0.5, "axes.axisbelow": True, "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "xtick.color": FAINT, "ytick.color": FAINT, "xtick.major.size": 0, "ytick.major.size": 0, "lines.linewidth": 1.4,
    "legend.frameon": False, "legend.fontsize": 7, "legend.handlelength": 1, "legend.columnspacing": 1,
    "legend.borderpad": 0,
}
Line = dict[str, Any]


def write_report(run_dir: str | Path) -> list[Path]:
    """Writes the report of a run, finished or not, and returns the paths of its files.

    Raises:
        ConfigError, DataError: the run is missing or damaged.
        StorageError: the report cannot be written.
    """
    run_dir = Path(run_dir)
    config, stages = _read(run_dir)
    curves = {name: drawn for name, drawn in ((stage["name"], _curves(stage["lines"])) for stage in stages) if drawn}
    images = {name: png for name, (png, _) in curves.items()}
    if accuracy := _accuracy([stage for stage in stages if stage["evaluation"]]):
        images["pass@1"] = accuracy
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, finalize=_clean,
        extensions=["jinja2.ext.do"], trim_blocks=True, lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    page = environment.get_template("report.html.jinja").render(
        run=run_dir.absolute().name, config=config, stages=stages, model_work=MODEL_WORK, versions=_versions(),
        panels={name: titles for name, (_, titles) in curves.items()}, columns=COLUMNS, many=MANY,
        images={name: base64.b64encode(png).decode() for name, png in images.items()},
    )
    files = {f"curves/{name}.png": png for name, png in images.items()} | {"report.html": page}
    try:
        (run_dir / "curves").mkdir(exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {run_dir / 'curves'}: {error.strerror}") from error
    for name, content in files.items():
        write_file(run_dir / name, content)
    return [run_dir / name for name in files]


def _read(run_dir: Path) -> tuple[str, list[Line]]:
    """config.yaml, and what is known of each stage, in the order in which they run."""
    try:
        config = (run_dir / "config.yaml").read_text(encoding="utf-8")
        manifest = run_dir / "manifest.json"
        run = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {"order": [], "stages": {}}
        settings, order, records = read_yaml(config)["stages"], run["order"], run["stages"]
        names = list(dict.fromkeys([*order, *settings]))
        known = [{**dict(settings.get(name, {})), **dict(records.get(name, {}))} for name in names]
    except FileNotFoundError:
        raise ConfigError(f"{run_dir} holds no run: it has no config.yaml") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"the config.yaml or manifest.json of {run_dir} is damaged: {error!r}") from error
    stages: list[Line] = []
    for name, stage in zip(names, known, strict=True):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", str(name)):
            raise ConfigError(f"the run in {run_dir} is damaged: {name!r} is not the name of a stage")
        lines, samples = (read_lines(run_dir / name / file) for file in (METRICS, SAMPLES))
        summary = stage.get("summary") or {}
        evaluation = stage.get("evaluation") or summary
        stages.append({
            "name": name, "kind": stage.get("kind", "unknown"), "parent": stage.get("model"), "lines": lines,
            "status": {"finished": "finished", None: "not started"}.get(stage.get("status"), "unfinished"),
            "evaluation": evaluation if evaluation.get("pass_at_1") is not None else None, "summary": summary,
            "version": stage.get("version"), "counts": _counts(summary, lines), **_times(stage, lines),
        })
        stages[-1]["examples"] = _examples(stages[-1], samples, {stage["name"]: stage for stage in stages})
    return config, stages


def _times(record: Line, lines: list[Line]) -> Line:
    """`seconds` of each part; "other" is what no part covers. `glue`: seconds outside the model, None if unknown."""
    parts: dict[str, float] = {}
    for line in lines:
        for name, value in line.get("timing", {}).items():
            if name not in ("total", "tokens_per_second"):
                parts[name] = parts.get(name, 0.0) + (value or 0.0)
    measured = bool(parts)
    parts["other"] = max(0.0, (record.get("seconds") or 0.0) - sum(parts.values()))
    after = (record.get("evaluation") or {}).get("seconds") or 0.0
    parts["evaluation"] = parts.get("evaluation", 0.0) + after
    glue = sum(value for name, value in parts.items() if name not in MODEL_WORK)
    return {"seconds": {name: value for name, value in parts.items() if value}, "glue": glue if measured else None}


def _counts(summary: Line, lines: list[Line]) -> dict[str, float | None]:
    """What could not be scored: sums over the steps, or counts of the summary. None if nobody counted."""
    counts = {}
    for name in ("unscorable", "timeouts", "crashes", "endpoint_failures"):
        logged = [line[name] for line in lines if line.get(name) is not None]
        counts[name] = sum(logged) if logged else summary.get(name)
    return counts


def _examples(stage: Line, samples: list[Line], stages: dict[str, Line]) -> list[tuple[Line | None, Line]]:
    """Completions of the same questions before the stage, where they are known, and after it."""
    def step(index: int) -> list[Line]:
        return [sample for sample in samples if sample["step"] == samples[index]["step"]]

    def evaluated(stage: Line | None) -> list[Line]:
        return ((stage or {}).get("evaluation") or {}).get("examples") or []

    after = evaluated(stage) or (step(-1) if samples else [])
    before = evaluated(stages.get(stage["parent"])) or (step(0) if samples else [])
    asked = {example["question"]: example for example in before}
    return [(asked.get(example["question"]), example) for example in after]


def _curves(lines: list[Line]) -> tuple[bytes, list[str]] | None:
    """A sheet of curves as PNG, and the titles of its panels, row by row; None if nothing was logged."""
    panels = {}
    for title, names in PANELS.items():
        if "reward_*" in names:
            rewards = {key for line in lines for key in line if key.startswith("reward_")} - {"reward_std"}
            names = ("reward", *sorted(rewards))
        curves = {name: [line for line in lines if isinstance(line.get(name), int | float)] for name in names}
        if any(curves.values()):
            panels[title] = {name: found for name, found in curves.items() if found}
    if not panels:
        return None
    rows = math.ceil(len(panels) / COLUMNS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(COLUMNS * CELL[0], rows * CELL[1]))
        for index, (title, curves) in enumerate(panels.items()):
            left, top = index % COLUMNS / COLUMNS, 1 - index // COLUMNS / rows
            axes = figure.add_axes((left + 0.15 / COLUMNS, top - 0.88 / rows, 0.82 / COLUMNS, 0.66 / rows))
            axes.set_title(title, pad=15, x=-0.16)
            for name, found in curves.items():
                _plot(axes, name, found, label=printable(name.removeprefix("reward_"))[:20])
            axes.legend(loc="lower left", bbox_to_anchor=(-0.175, 1), ncols=5)
            axes.yaxis.set_major_formatter(lambda value, _: _tick(value))
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
            if "pass_at_1" in curves:
                axes.set_ylim(-0.02, 1.02)
        return _png(figure), list(panels)


def _tick(value: float) -> str:
    """0.25, 3, 2.0e-5."""
    return f"{value:.3g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")


def _plot(axes: Any, name: str, lines: list[Line], label: str) -> None:
    steps, values = [line["step"] for line in lines], [line[name] for line in lines]
    half = max(1, len(values) // 40)
    if f"{name}_se" in lines[0]:
        errors = [line[f"{name}_se"] or 0.0 for line in lines]
        axes.errorbar(steps, values, errors, label=label, marker="o", markersize=2.5)
    elif len(values) < MANY:
        axes.plot(steps, values, label=label, marker="" if len(values) > 1 else "o", markersize=3)
    else:
        windows = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
        drawn = axes.plot(steps, [sum(window) / len(window) for window in windows], label=label)
        axes.plot(steps, values, color=drawn[0].get_color(), alpha=0.25, linewidth=0.6)


def _accuracy(stages: list[Line]) -> bytes | None:
    """pass@1 and cons@k of the evaluated stages as PNG; None if there are none."""
    if not stages:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8, 0.7 + 0.3 * len(stages)), layout="constrained")
        axes = figure.subplots()
        for row, stage in enumerate(stages):
            for key, marker, fill, shift in (("cons_at_k", "D", "white", 0.2), ("pass_at_1", "o", COLOURS[0], 0)):
                value, error = stage["evaluation"].get(key), stage["evaluation"].get(f"{key}_se")
                if value is not None:
                    axes.errorbar(value, row + shift, xerr=error or 0, marker=marker, markersize=5 - 5 * shift,
                                  color=COLOURS[0], markerfacecolor=fill, elinewidth=1)
        axes.set_yticks(range(len(stages)), [stage["name"] for stage in stages], color=INK)
        axes.set(xlim=(-0.01, 1.01), ylim=(len(stages) - 0.5, -0.5))
        axes.xaxis.set_major_formatter(PercentFormatter(1, 0))
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("\u25cf pass@1   \u25c7 cons@k   lines: \u00b1 one standard error", color=FAINT)
        return _png(figure)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(out, dpi=160, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def _clean(value: Any) -> Any:
    """What the template prints for a value. `Markup` is the output of its own macros, which is clean already."""
    return "\u2013" if value is None else value if isinstance(value, Markup) else printable(value)


def _versions() -> list[str]:
    installed = {item.name for item in metadata.distributions()}
    return [f"Python {platform.python_version()}", platform.platform(),
            *(f"{name} {metadata.version(name)}" for name in PACKAGES if name in installed)]

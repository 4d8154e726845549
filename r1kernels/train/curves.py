"""The curves of a run, drawn by matplotlib: as SVG that takes its colours from the page around it, or as PNG."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from r1kernels.train.record import Line, RunRecord, StageRecord

# Role -> colour on white; in SVG each becomes the CSS variable of its name, which a dark page sets otherwise.
PALETTE = {
    "ink": "#26292e", "faint": "#8a9099", "rule": "#d9dce1",
    "c1": "#2f5f98", "c2": "#c0622b", "c3": "#3f7d58", "c4": "#7d5a9b", "c5": "#9a8433",
}
SERIES = [PALETTE[f"c{number}"] for number in range(1, 6)]
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "r1kernels", "text.parse_math": False, "figure.facecolor": "none",
    "axes.facecolor": "none", "font.size": 8.5, "axes.titlesize": 9, "axes.titleweight": 500,
    "axes.titlelocation": "left", "axes.titlecolor": PALETTE["ink"], "axes.edgecolor": PALETTE["rule"],
    "axes.labelcolor": PALETTE["faint"], "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": PALETTE["rule"], "grid.linewidth": 0.5, "xtick.color": PALETTE["faint"],
    "ytick.color": PALETTE["faint"], "xtick.major.size": 0, "ytick.major.size": 0, "lines.linewidth": 1.4,
    "text.color": PALETTE["ink"],
}
TICKS = (1, 2, 2.5, 5, 10)
# Of a small plot, in shares of its size: no layout need be computed for each of dozens.
PANEL_MARGINS = {"left": 0.15, "right": 0.985, "bottom": 0.11, "top": 0.97}
# From this many steps on, curves are drawn as running means over a twentieth of them, the steps themselves behind.
MANY = 60


@dataclass(frozen=True)
class Panel:
    """A plot of some metrics.

    Args:
        series: label -> key of the metrics, or a prefix that ends in "*", whose keys are labelled by what follows it.
        se: key -> key of its standard error; such a metric is drawn as points, with bars.
        range: of the y axis.
    """

    title: str
    series: dict[str, str]
    se: dict[str, str] | None = None
    range: tuple[float, float] | None = None
    log: bool = False


PANELS = (
    Panel("pass@1, held-out", {"pass@1": "pass_at_1", "cons@k": "cons_at_k"},
          {"pass_at_1": "pass_at_1_se", "cons_at_k": "cons_at_k_se"}, (0, 1)),
    Panel("Loss", {"loss": "loss", "held-out": "eval_loss"}),
    Panel("Preference accuracy", {"accuracy": "accuracy", "held-out": "eval_accuracy"}, range=(0, 1)),
    Panel("Margin between preferences", {"margin": "margin"}),
    Panel("Rewards", {"total": "reward", "": "reward_*"}),
    Panel("Standard deviation of rewards", {"all samples": "reward_std"}),
    Panel("Tokens in a response", {"rollout": "length", "held-out": "eval_length"}),
    Panel("Language consistency", {"rollout": "language", "held-out": "eval_language"}, range=(0, 1)),
    Panel("KL to the reference", {"KL": "kl"}),
    Panel("Entropy of a token (nats)", {"entropy": "entropy"}),
    Panel("Shares", {"zero-spread groups": "zero_spread", "truncated": "truncated",
                     "clipped below": "clip_low_fraction", "clipped above": "clip_high_fraction"}),
    Panel("Reflective words in a response", {"rollout": "reflective", "held-out": "eval_reflective"}),
    Panel("Log-prob gap, sampler to trainer", {"mean": "logprob_gap_mean", "max": "logprob_gap_max"}, log=True),
    Panel("Importance weights of the rollout", {"mean": "importance_mean", "cut": "importance_cut",
                                                "effective share": "importance_ess"}),
    Panel("Gradient norm", {"norm": "grad_norm"}),
    Panel("Value loss", {"loss": "value_loss"}),
    Panel("Value, explained variance", {"explained": "explained_variance"}),
    Panel("Learning rate", {"rate": "learning_rate"}),
)
# The keys that have a place of their own, which a prefix does not include.
NAMED = {key for panel in PANELS for key in panel.series.values()}


def stage_panels(stage: StageRecord) -> list[tuple[str, list[tuple[str, str]], str]]:
    """(title, legend, SVG) of everything that a stage logged; the legend is of (label, colour's name)."""
    panels = []
    for panel in PANELS:
        labels = list(series(panel, stage.steps))
        if labels:
            legend = [(label, f"c{1 + index % len(SERIES)}") for index, label in enumerate(labels)]
            svg = _svg(
                f"{stage.name} {panel.title}", (3.3, 1.95),
                lambda axes, panel=panel: _draw(axes[0], panel, stage.steps), margins=PANEL_MARGINS,
            )
            panels.append((panel.title, legend if len(labels) > 1 else [], svg))
    return panels


def accuracy_figure(run: RunRecord) -> str | None:
    """pass@1 and cons@k after every stage, as SVG."""
    families = {root: [stage for stage in stages if stage.evaluation] for root, stages in run.families().items()}
    stages = [stage for members in families.values() for stage in members]
    if not stages:
        return None
    colours = {stage.name: SERIES[index % len(SERIES)] for index, members in enumerate(families.values())
               for stage in members}

    def draw(axes: list[Axes]) -> None:
        axis = axes[0]
        for row, stage in enumerate(stages):
            result, colour = stage.evaluation, colours[stage.name]
            for key, marker, fill in (("pass_at_1", "o", colour), ("cons_at_k", "D", "none")):
                if result.get(key) is not None:
                    axis.errorbar(
                        result[key], row + (0.0 if key == "pass_at_1" else 0.22), xerr=result.get(f"{key}_se") or 0,
                        marker=marker, markersize=5 if fill == colour else 3.5, color=colour, markerfacecolor=fill,
                        elinewidth=1, capsize=0,
                    )
        axis.set_yticks(range(len(stages)), [stage.name for stage in stages], color=PALETTE["ink"])
        axis.set_ylim(len(stages) - 0.4, -0.6)
        axis.set_xlim(-0.01, 1.01)
        axis.xaxis.set_major_formatter(PercentFormatter(1, 0))
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("● pass@1   ◇ cons@k   bars: one standard error")

    return _svg("accuracy", (7.2, 0.75 + 0.27 * len(stages)), draw)


CHAIN_ROWS = (
    Panel("pass@1, held-out", {"pass@1": "pass_at_1"}, {"pass_at_1": "pass_at_1_se"}),
    Panel("Reward", {"reward": "reward"}),
    Panel("Tokens in a response", {"length": "length"}),
    Panel("Language consistency", {"held-out": "eval_language"}),
    Panel("Language reward", {"language": "reward_language"}),
    Panel("Reflective words in a response", {"words": "reflective"}),
)


def chain_figure(stages: Sequence[StageRecord]) -> str:
    """The stages of RL of one model laid end to end, as SVG."""
    rows = _chain_rows(stages)
    size = (7.2, 0.35 + 1.25 * len(rows))
    return _svg(f"chain {stages[0].name}", size, lambda axes: _draw_chain(axes, rows, stages), len(rows))


def png(run: RunRecord) -> bytes | None:
    """For Markdown: RL end to end, or the loss of the stages if there is no RL. None if nothing was logged."""
    groups = list(run.rl_families())
    if groups:
        stages = max(groups, key=lambda group: sum(len(stage.steps) for stage in group))
        rows = _chain_rows(stages)
    else:
        stages = [stage for stage in run.stages.values() if series(PANELS[1], stage.steps)]
        rows = [PANELS[1]]
    if not stages:
        return None
    with matplotlib.rc_context(STYLE):
        figure = _figure((9, 0.4 + 1.5 * len(rows)), len(rows))
        _draw_chain(figure.axes, rows, stages)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=120, facecolor="white")
    return out.getvalue()


def _chain_rows(stages: Sequence[StageRecord]) -> list[Panel]:
    rows = [panel for panel in CHAIN_ROWS if any(series(panel, stage.steps) for stage in stages)]
    titles = [panel.title for panel in rows]
    return [panel for panel in rows if panel.title != "Language reward" or "Language consistency" not in titles]


def _draw_chain(axes: Sequence[Axes], rows: Sequence[Panel], stages: Sequence[StageRecord]) -> None:
    """Each panel is a row; a stage begins where the one before it ended."""
    begin = 0
    for index, stage in enumerate(stages):
        length = max((line["step"] for line in stage.steps), default=0)
        for axis, panel in zip(axes, rows, strict=True):
            shifted = [{**line, "step": line["step"] + begin} for line in stage.steps]
            _lines(axis, panel, shifted, [SERIES[index % len(SERIES)]])
            if index:
                axis.axvline(begin, color=PALETTE["faint"], linewidth=0.6, linestyle=(0, (2, 3)))
        axes[0].annotate(
            stage.name, (begin, 1), xycoords=("data", "axes fraction"), xytext=(4, 4), textcoords="offset points",
            color=SERIES[index % len(SERIES)], fontsize=8.5,
        )
        begin += length or 1
    for axis, panel in zip(axes, rows, strict=True):
        axis.set_ylabel(panel.title.replace(", ", ",\n").replace(" in a response", "\nin a response"), fontsize=7.5)
        axis.set_xlim(-0.01 * begin, 1.01 * begin)
        axis.tick_params(labelbottom=axis is axes[-1])
        axis.yaxis.set_major_locator(MaxNLocator(4, steps=TICKS))
    axes[-1].set_xlabel("steps of RL, stages end to end")


def series(panel: Panel, lines: Sequence[Line]) -> dict[str, list[tuple[int, float, float]]]:
    """Label -> points (step, value, standard error), of the series that have any."""
    found = {}
    for label, key in panel.series.items():
        keys = {label: key}
        if key.endswith("*"):
            keys = {name.removeprefix(key[:-1]): name for line in lines for name in line
                    if name.startswith(key[:-1]) and name not in NAMED}
        for name, one in keys.items():
            error = (panel.se or {}).get(one, "")
            points = [(line["step"], line[one], line.get(error) or 0.0) for line in lines
                      if isinstance(line.get(one), int | float) and math.isfinite(line[one])]
            if points:
                found[name] = points
    return found


def _lines(axis: Axes, panel: Panel, lines: Sequence[Line], colours: Sequence[str] = SERIES) -> None:
    found = series(panel, lines)
    for index, (label, points) in enumerate(found.items()):
        steps, values, errors = zip(*points, strict=True)
        colour = colours[index % len(colours)]
        if panel.se:
            axis.errorbar(
                steps, values, yerr=errors, label=label, color=colour, marker="o", markersize=3, elinewidth=0.8
            )
        elif len(points) >= MANY:
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.7)
            axis.plot(steps, _running_mean(values, len(points) // 20), color=colour, label=label)
        else:
            axis.plot(steps, values, color=colour, label=label, marker="o" if len(points) == 1 else "", markersize=3)


def _draw(axis: Axes, panel: Panel, lines: Sequence[Line]) -> None:
    _lines(axis, panel, lines)
    if panel.range:
        low, high = panel.range
        axis.set_ylim(low - 0.02 * (high - low), high + 0.02 * (high - low))
    if panel.log and all(value > 0 for points in series(panel, lines).values() for _, value, _ in points):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        axis.yaxis.set_major_locator(MaxNLocator(5, steps=TICKS))
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    half = max(1, width // 2)
    windows = (values[max(0, index - half) : index + half + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _svg(
    name: str, size: tuple[float, float], draw: Callable[[list[Axes]], None], rows: int = 1,
    margins: dict[str, float] | None = None,
) -> str:
    """An SVG to stand inside a page: its colours and its font are the page's, and its ids are its own, by `name`."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(size, rows, margins)
        draw(figure.axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(?<=<svg)[^>]*?(?= viewBox)', "", text, count=1)
    for role, colour in PALETTE.items():
        text = text.replace(colour, f"var(--{role})")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # nothing refers to groups
    own = f"f{hashlib.sha256(name.encode()).hexdigest()[:10]}-"
    return re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{own}", text).strip()


def _figure(size: tuple[float, float], rows: int, margins: dict[str, float] | None = None) -> Figure:
    figure = Figure(figsize=size, layout=None if margins else "constrained")
    FigureCanvasAgg(figure)
    figure.subplots(rows, 1, sharex=True, gridspec_kw=margins)
    return figure

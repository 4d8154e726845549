"""Pictures that belong to a page of the documentation only: a recipe's curves, and ratios of a sampler."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from r1kernels.bench.report import words
from r1kernels.bench.report.figures import Picture, legend

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
PANELS = (("pass_at_1", "pass@1, %", 100.0), ("completion_length", "tokens of a completion", 1.0))


def recipe(results: list[dict[str, Any]]) -> Picture:
    """Accuracy and mean length of completions over the steps of R1-Zero, a line for each seed."""
    curves = {f"seed {result.get('seed', 0)}": {
        name: [[line["step"], scale * line[name]] for line in result["curves"]["r1_zero"]
               if words.real(line.get(name)) is not None] for name, _, scale in PANELS} for result in results}
    parts = []
    for seed, lines in curves.items():
        (first, last), (short, long) = ((lines[name][0][1], lines[name][-1][1]) for name, _, _ in PANELS)
        parts.append(f"{seed}: pass@1 from {first:.1f} to {last:.1f} %, mean length from {short:.0f} to {long:.0f}")
    alt = f"R1-Zero: accuracy and mean length of completions over the steps of training. {'; '.join(parts)}."
    return Picture("recipe", "R1-Zero", alt, {"curves": curves}, _recipe, size=(8.4, 3.0))


def _recipe(figure: Figure, data: dict[str, Any]) -> None:
    curves = data["curves"]
    for axes, (name, label, _) in zip(figure.subplots(1, 2), PANELS, strict=True):
        handles = [axes.plot(*zip(*lines[name], strict=True), color=color, linewidth=2)[0]
                   for color, lines in zip(COLORS * len(curves), curves.values(), strict=False)]
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.set_ylim(0, 102 if name == "pass_at_1" else None)
    if len(curves) > 1:
        legend(figure, handles, list(curves), min(len(curves), 4))


BINS = [round(0.4 + 0.01 * number, 2) for number in range(101)]


def sampling_replay(results: list[dict[str, Any]]) -> Picture:
    """Histograms of policy / sampler before any update, a panel for each top-p."""
    panels = {f"top_p {result['top_p']:g}": {
        name: {"shares": [count / result["tokens"] for count in result[name]["tokens_by_ratio"]],
               "mean": result[name]["before"]["mean_ratio"], "outside": result[name]["before"]["outside_0.9_1.1"]}
        for name in ("replay", "whole vocabulary")} for result in results}
    parts = [f"{panel}, {name}: mean {found['mean']:.3f}, {words.percent(found['outside'])} outside"
             for panel, both in panels.items() for name, found in both.items()]
    alt = f"Ratio of policy to sampler before any update, with and without replay. {'; '.join(parts)}."
    return Picture("sampling_replay", "Ratios with and without replay", alt, {"panels": panels}, _ratios,
                   size=(8.4, 3.2))


def _ratios(figure: Figure, data: dict[str, Any]) -> None:
    handles: dict[str, Any] = {}
    for axes, (title, both) in zip(figure.subplots(1, len(data["panels"]), squeeze=False)[0], data["panels"].items(),
                                   strict=True):
        for (name, found), color in zip(both.items(), COLORS, strict=False):
            handles[name] = axes.stairs(found["shares"], BINS, fill=True, alpha=0.65, color=color)
        axes.axvspan(0.9, 1.1, color="#808080", alpha=0.15, zorder=0)
        axes.set_title(title, fontsize=9)
        axes.set_yscale("log")
        axes.set_yticks([1e-3, 1e-2, 1e-1, 1], ["0.1 %", "1 %", "10 %", "100 %"])
        axes.minorticks_off()
        axes.set_xlabel("policy / sampler, before any update")
        axes.set_ylabel("share of tokens")
    legend(figure, list(handles.values()), list(handles), 2)

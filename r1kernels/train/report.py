"""What a run leaves for people: `curves.png` and `report.md`, drawn from its logs alone."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from r1kernels.train.metrics import read_metrics
from r1kernels.train.rundir import CONFIG
from r1kernels.train.schema import ConfigError

PACKAGES = ("r1kernels", "torch", "transformers", "tokenizers", "math-verify", "numpy")


def write_report(run_dir: str | Path) -> tuple[Path, Path]:
    """Writes the curves and the report of a run, finished or not; returns their paths.

    Raises:
        ConfigError: there is no run, or its directory cannot be written.
        DataError: a log is damaged.
    """
    run_dir = Path(run_dir)
    if not (run_dir / CONFIG).is_file():
        raise ConfigError(f"{run_dir} holds no run: no {CONFIG} in it")
    lines = read_metrics(run_dir / "metrics.jsonl")
    curves, report = run_dir / "curves.png", run_dir / "report.md"
    text = _text(run_dir, lines)
    try:
        if lines:
            _draw(lines, curves)
        report.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the report of {run_dir} cannot be written: {error.filename}: {error.strerror}") from error
    return report, curves


def measured(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines that hold an evaluation."""
    return [line for line in lines if line.get("pass_at_1") is not None]


def _draw(lines: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).flat

    def draw(axis: Any, title: str, *names: str) -> None:
        for name in names:
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            axis.plot(*zip(*points, strict=True), label=name) if points else None
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend()

    points = measured(lines)
    accuracy = next(axes)
    draw(accuracy, "pass@1, held-out problems")
    accuracy.errorbar(
        [line["step"] for line in points],
        [line["pass_at_1"] for line in points],
        yerr=[line["pass_at_1_se"] or 0 for line in points],
        marker="o", markersize=3, capsize=2,
    )
    accuracy.set_ylim(0, 1)
    draw(next(axes), "tokens in a response (rollouts)", "length")
    draw(next(axes), "rewards", *sorted({name for line in lines for name in line if name.startswith("reward_")}))
    draw(next(axes), "KL to the reference", "kl")
    draw(next(axes), "entropy of a token (nats)", "entropy")
    draw(next(axes), "shares", "zero_spread", "truncated", "clip_low_fraction", "clip_high_fraction")
    figure.savefig(path, dpi=110)


def _text(run_dir: Path, lines: list[dict[str, Any]]) -> str:
    steps, points = [line for line in lines if "reward" in line], measured(lines)
    parts = [f"# {run_dir.name}", "", "![pass@1, response length and more over the steps](curves.png)", ""]
    if points:
        first, last = points[0], points[-1]
        parts += [
            "| held-out problems | before | after |",
            "|---|---|---|",
            f"| step | {first['step']} | {last['step']} |",
            f"| pass@1 ± standard error | {_percent(first)} | {_percent(last)} |",
            *(
                f"| {label} | {form.format(first[name])} | {form.format(last[name])} |"
                for label, name, form in (
                    ("format reward", "eval_format", "{:.3f}"),
                    ("tokens in a response", "eval_length", "{:.1f}"),
                    ("cut off", "eval_truncated", "{:.1%}"),
                    ("unscorable samples", "eval_unscorable", "{}"),
                )
                if name in first and name in last
            ),
            "",
        ]
    if steps:
        names = ("sampling", "scoring", "logprobs", "updates")
        seconds = {name: sum(line[f"seconds_{name}"] for line in steps) for name in names}
        total = lines[-1]["seconds_total"]
        seconds["evaluation, saving and the rest"] = total - sum(seconds.values())
        base = read_metrics(run_dir / "base" / "metrics.jsonl")
        parts += [
            *(f"Pre-training: {line['step'] + 1} steps in {line['seconds_total']:.0f} s." for line in base[-1:]),
            f"{len(steps)} steps of RL in {total:.0f} s: "
            + ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
            + ".",
            f"Unscorable samples: {sum(line['unscorable'] for line in steps)} "
            f"({sum(line['timeouts'] for line in steps)} timeouts, {sum(line['crashes'] for line in steps)} crashes). "
            f"Steps without any group to learn from: {sum(line['zero_spread'] == 1 for line in steps)}.",
            f"Largest gap between a log-prob when sampled and when recomputed: "
            f"{max(line['logprob_gap_max'] for line in steps):.2g}; largest deviation of the first ratio from 1: "
            f"{max(line['first_ratio_deviation'] for line in steps):.2g}.",
            "",
        ]
    parts += _examples(run_dir)
    parts += ["## Settings", "", "```yaml", (run_dir / CONFIG).read_text(encoding="utf-8").strip(), "```", ""]
    versions = ", ".join([f"Python {platform.python_version()}", platform.platform(), *_versions()])
    parts += ["## Versions", "", versions]
    return "\n".join(parts) + "\n"


def _percent(line: dict[str, Any]) -> str:
    error = line["pass_at_1_se"]
    return f"{line['pass_at_1']:.1%}" + (f" ± {error:.1%}" if error is not None else "")


def _examples(run_dir: Path) -> list[str]:
    samples = read_metrics(run_dir / "samples.jsonl")
    if not samples:
        return []
    parts = []
    for title, step in (("before", samples[0]["step"]), ("after", samples[-1]["step"])):
        parts += [f"## Samples {title} (step {step})", ""]
        for sample in (sample for sample in samples if sample["step"] == step):
            verdict = {1: "right", 0: "wrong"}.get(sample["accuracy"], "not scored")
            completion = sample["completion"].strip().replace("```", "'''")
            parts += [f"{sample['question']} (answer {sample['answer']}): {verdict}", "", "```", completion, "```", ""]
    return parts


def _versions() -> list[str]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return found

"""From the JSON lines: results.json, report.md with the bars, and roofline plots where matplotlib can be imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu import bars, launches, published, records
from gpu.setting import COPY, OURS, PRODUCTS, quietly
from gpu.timing import GRAPH_CALLS
from r1kernels.bench.results import finite, write_json, write_text

Row = dict[str, Any]
STAGES = "stages.tsv"


def _time(row: Row) -> str:
    us = row["median_us"]
    return f"{us:.1f} us" if us < 1e3 else f"{us / 1e3:.2f} ms"


def _share(row: Row, name: str) -> str:
    return "" if row.get(name) is None else f"{100 * row[name]:.0f} %"


def _memory(row: Row) -> str:
    peak = row.get("peak_extra_bytes")
    return "" if peak is None else f"{peak / 2**20:,.0f} MiB"


def _host(row: Row) -> str:
    return f", host {row['host_us']:.0f} us" if row.get("host_hidden") is False else ""


def _ratio(row: Row, ours: Row | None) -> str:
    return f"{row['median_us'] / ours['median_us']:.2f} x" if ours else ""


def table(rows: list[Row]) -> str:
    """Of one operation: a line for each candidate of each case."""
    ours = {
        (row["case"], row["shape"], row["dtype"]): row
        for row in rows if row["candidate"] == OURS and "error" not in row
    }
    lines = [
        "| case | shape | dtype | candidate | time | times ours | of the copy | of the products | extra memory |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        place = f"| {row['case']} | {row['shape']} | {row['dtype']} | {row['candidate']} "
        if "error" in row:
            lines.append(f"{place}| {row['error'].replace('|', '/')} |||||")
            continue
        base = ours.get((row["case"], row["shape"], row["dtype"]))
        lines.append(
            f"{place}| {_time(row)}{_host(row)} | {_ratio(row, base)} | {_share(row, 'share_of_copy')} "
            f"| {_share(row, 'share_of_gemm')} | {_memory(row)} |"
        )
    return "\n".join(lines)


def stages(folder: Path) -> list[str]:
    """What `run_on_gpu.sh` wrote about its stages, in the order of their ends: a later command replaces a line."""
    path = folder / STAGES
    lines = [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []
    latest = {parts[0]: parts for parts in lines if len(parts) == 4}
    return [f"* {name}: {status}, {seconds} s (command {number})" for name, status, seconds, number in latest.values()]


def markdown(
    header: Row, rows: list[Row], goals: list[bars.Bar], launched: Sequence[Row] = (), ended: Sequence[str] = ()
) -> str:
    parts = [f"# r1kernels on {header.get('device', 'an unknown device')}"]
    parts.append("\n".join(f"* {name}: {value}" for name, value in header.items() if name != "device"))
    parts.append("## Bars\n\n| bar | measured | goal | |\n|---|---:|---:|---|\n" + "\n".join(
        f"| {bar.name} | {'' if bar.value is None else f'{bar.value:.4g}'} "
        f"| {'>=' if bar.at_least else '<='} {bar.limit:g} {bar.unit} | {bar.verdict} |" for bar in goals
    ))
    if launched:
        parts.append("## Launches of the fused step\n\n" + "\n".join(f"* {launches.sentence(row)}" for row in launched))
    if ended:
        parts.append("## Stages\n\n" + "\n".join(ended))
    parts.append(f"## Published figures\n\n{published.table(rows)}")
    for op in dict.fromkeys(row["op"] for row in rows):
        parts.append(f"## {op}\n\n{table([row for row in rows if row['op'] == op])}")
    parts.append(
        "Medians of rounds in which all candidates took turns, each after a read of 1 GiB that flushes the cache. The "
        "host queues a call meanwhile: its time is in no number, unless a row says that the host takes longer. Cases "
        f"named \"graph\" replay a CUDA graph of {GRAPH_CALLS} calls. Shares are of a copy (bytes read and written) "
        "and of bare bfloat16 products measured in the same run. No candidate has a number whose results were not "
        "checked against float64 first."
    )
    return "\n\n".join(parts) + "\n"


def points(rows: list[Row]) -> list[tuple[str, str, float, float]]:
    """(operation and case, candidate, flop per byte, flop per second) of what has both."""
    return [
        (f"{row['op']}, {row['case']}", row["candidate"], row["flop"] / row["bytes"], row["flop_per_s"])
        for row in rows
        if row.get("flop_per_s") and row.get("bytes") and row["op"] != "ceiling"
        and row["candidate"] not in (COPY, PRODUCTS)
    ]


def measured_ceilings(rows: list[Row]) -> tuple[float | None, float | None]:
    """(bytes per second, flop per second)"""
    measured = [row for row in rows if row["op"] == "ceiling" and "error" not in row]
    copy = max((row["bytes_per_s"] for row in measured if row["candidate"] == COPY), default=None)
    return copy, max((row["flop_per_s"] for row in measured if row.get("flop_per_s")), default=None)


def plot(rows: list[Row], title: str, path: Path) -> bool:
    """Left: the roofline. Right: what share of its ceiling each operation of ours reaches."""
    if quietly(lambda: __import__("matplotlib")) is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(16, 7))
    copy, gemm = measured_ceilings(rows)
    shown = points(rows)
    if copy and gemm:
        ridge = gemm / copy
        low, high = ridge / 1000, ridge * 100
        left.plot([low, ridge, high], [low * copy, gemm, gemm], color="black")
        left.annotate(f"copy {copy / 1e12:.2f} TB/s", (low * 2, low * copy * 2.5))
        left.annotate(f"bfloat16 products {gemm / 1e12:.0f} TFLOP/s", (ridge, gemm * 1.1))
    for candidate in dict.fromkeys(name for _, name, _, _ in shown):
        of = [(x, y) for _, name, x, y in shown if name == candidate]
        left.plot(*zip(*of, strict=True), "o" if candidate == OURS else "x", label=candidate)
    left.set(xscale="log", yscale="log", xlabel="flop per byte that must move", ylabel="flop per second")
    if shown:
        left.legend()
    ours = [row for row in rows if row["candidate"] == OURS and "error" not in row]
    bars_ = [
        (f"{row['op']}, {row['case']}\n{row['shape']} {row['dtype']}",
         (row["share_of_gemm"] if by_product else row.get("share_of_copy")) or 0.0, by_product)
        for row in ours for by_product in [row["op"].startswith("linear") and bool(row.get("share_of_gemm"))]
        if row.get("share_of_gemm") or row.get("share_of_copy")
    ]
    names, shares, kinds = zip(*bars_, strict=True) if bars_ else ((), (), ())
    right.barh(range(len(names)), shares, color=["tab:orange" if kind else "tab:blue" for kind in kinds])
    right.set_yticks(range(len(names)), names, fontsize=6)
    right.axvline(1, color="black")
    right.invert_yaxis()
    right.set_xlabel("share of the copy (blue) or of the bare products (orange)")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def write(
    folder: Path, main: str = bars.MAIN, head: str = bars.HEAD, plotted: bool = True
) -> list[bars.Bar]:
    """Writes the results of the kernels of the last run, each file under another name first, and returns the bars."""
    lines = records.read(folder)
    header = (records.of_kind(lines, "run") or [{}])[-1]
    results = [row for row in records.of_kind(lines, "result") if row["kernels"] == header.get("kernels")]
    results = records.latest(results)
    launched = [
        row for row in records.of_kind(lines, "launch") if row["kernels_hash"] == header.get("kernels")
    ]
    launched = list({(row["vocab"], row["dtype"]): row for row in launched}.values())
    goals = bars.evaluate(results, main, head, launched)
    rows = [{name: value for name, value in row.items() if name != "kernels"} for row in bars.mark(results, goals)]
    judged = [{**goal._asdict(), "met": goal.met} for goal in goals]
    result = {**header, "bars": judged, "launches": launched, "results": rows}
    write_json(finite(result), folder / "results.json")
    write_text(markdown(header, rows, goals, launched, stages(folder)), folder / "report.md")
    if plotted:
        title = f"{header.get('device', '')}, r1kernels {header.get('r1kernels', '')}"
        drawn = plot(rows, title, folder / "roofline.png")
        print(f"results.json, report.md{', roofline.png' if drawn else ' (no matplotlib: no plots)'} in {folder}")
    return goals

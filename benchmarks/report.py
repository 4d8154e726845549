"""From a pytest-benchmark JSON to a small result file per operation, and the README's table.

    python benchmarks/report.py build/benchmark.json
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import torch

import r1kernels
from r1kernels import _library

ROOT = Path(__file__).resolve().parents[1]
MARKERS = ("<!-- benchmarks: begin -->", "<!-- benchmarks: end -->")


def device_name() -> str:
    """The processor's own name and the cores it gives us."""
    model = "cpu"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (match := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        model = match.group(1).strip()
    return f"{model}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD:csrc"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "r1kernels": r1kernels.__version__,
        "csrc_tree": commit,
        "torch": torch.__version__,
        "device": device_name(),
        "instruction_set": _library.extension.cpu_isa(),
    }


def rows(benchmarks: list[dict]) -> list[dict]:
    return [row for entry in benchmarks for row in entry["extra_info"]["rows"]]


def save(results: list[dict]) -> Path:
    folder = ROOT / "benchmarks" / "results" / re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    for op in sorted({row["op"] for row in results}):
        selected = [row for row in results if row["op"] == op]
        text = json.dumps({**versions(), "results": selected}, indent=1)
        (folder / f"{op.replace(', ', '-')}.json").write_text(text + "\n")
    return folder


GROWTH = "linear_grpo_loss_growth"
# Those of README, in its order; every result is in the files.
ORDER = ("token_stats", "linear_grpo_loss", "linear_cross_entropy", "linear_grpo_loss_busy")


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.0f} ms" if seconds < 10 else f"{seconds:.0f} s"


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    ratio = "" if row["implementation"] == "r1kernels" else f", {row['ratio']:.2g} x"
    memory = row["peak_extra_bytes"]
    return _time(row["median_s"]) + ratio + ("" if not memory or memory < 2**20 else f", {memory / 2**20:.0f} MiB")


def table(results: list[dict]) -> str:
    """Of one operation: a row for each implementation, a column for each shape."""
    shapes = list(dict.fromkeys(row["shape"] for row in results))
    by_place = {(row["implementation"], row["shape"]): row for row in results}
    return "\n".join([
        f"| {results[0]['op']} | {' | '.join(shapes)} |",
        "|---" * (len(shapes) + 1) + "|",
        *(
            f"| {name} | {' | '.join(_cell(by_place.get((name, shape))) for shape in shapes)} |"
            for name in dict.fromkeys(row["implementation"] for row in results)
        ),
    ])


def growth(results: list[dict]) -> str:
    """How time and memory grow with the number of tokens, in a sentence."""
    results = sorted(results, key=lambda row: row["tokens"])
    first, last = results[0]["tokens"], results[-1]["tokens"]
    text = (
        f"linear_grpo_loss from {first} to {last} tokens ({results[0]['shape']}): time is a straight line in their "
        f"number (R² = {results[0]['r_squared']:.4f})"
    )
    memory = [row.get("beyond_gradients_bytes") for row in results if row["tokens"] > first]
    if None in memory:
        return text + "."
    low, high = min(memory) / 2**20, max(memory) / 2**20
    return f"{text}; peak memory beyond the gradient of hidden is {low:.0f} to {high:.0f} MiB."


def summary(results: list[dict]) -> str:
    by_op: dict[str, list[dict]] = {}
    for row in results:
        by_op.setdefault(row["op"], []).append(row)
    parts = [table(by_op[op]) for op in ORDER if op in by_op]
    if GROWTH in by_op:
        parts.append(growth(by_op[GROWTH]))
    info = versions()
    parts.append(
        "Forward + backward: median time; how many times that of r1kernels (the median over rounds that time both, "
        f"which is not the quotient of the medians); peak extra memory. {info['device']} "
        f"({info['instruction_set']}), torch {info['torch']}, bfloat16; medians of interleaved rounds; "
        "`make bench` measures yours."
    )
    return "\n\n".join(parts)


def main() -> None:
    results = rows(json.loads(Path(sys.argv[1]).read_text())["benchmarks"])
    folder = save(results)
    text = summary(results)
    readme = ROOT / "README.md"
    before, begin, rest = readme.read_text().partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if begin and end:
        readme.write_text(f"{before}{begin}\n{text}\n{end}{after}")
    print(text)
    print(f"written to {folder.relative_to(ROOT)} and README.md")


if __name__ == "__main__":
    main()

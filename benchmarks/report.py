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
        "instruction_set": r1kernels._library.extension.cpu_isa(),
    }


def rows(benchmarks: list[dict]) -> list[dict]:
    return [
        {
            **entry["extra_info"],
            "median_s": entry["stats"]["median"],
            "iqr_s": entry["stats"]["iqr"],
            "rounds": entry["stats"]["rounds"],
        }
        for entry in benchmarks
    ]


def save(results: list[dict]) -> Path:
    folder = ROOT / "benchmarks" / "results" / re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    for op in sorted({row["op"] for row in results}):
        selected = [row for row in results if row["op"] == op]
        text = json.dumps({**versions(), "results": selected}, indent=1)
        (folder / f"{op}.json").write_text(text + "\n")
    return folder


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.0f} ms"


def table(results: list[dict]) -> str:
    lines = [
        "| operation, forward + backward | shape | | time | r1kernels is | peak extra memory |",
        "|---|---|---|---|---|---|",
    ]
    ours = {(row["op"], row["shape"]): row for row in results if row["implementation"] == "r1kernels"}
    for row in results:
        base = ours[row["op"], row["shape"]]
        ratio = row["median_s"] / base["median_s"]
        comparison = "" if row is base else f"{ratio:.1f} x faster" if ratio >= 1 else f"{1 / ratio:.1f} x slower"
        memory = row["peak_extra_bytes"]
        memory_text = "" if memory is None or "overhead" in row["shape"] else f"{memory / 2**20:.0f} MiB"
        lines.append(
            f"| {row['op']} | {row['shape']} | {row['implementation']} | {_time(row['median_s'])} | {comparison} | "
            f"{memory_text} |"
        )
    info = versions()
    caption = (
        f"{info['device']} ({info['instruction_set']}), torch {info['torch']}, bfloat16 logits, medians of one run; "
        "`make bench` measures yours."
    )
    return "\n".join([*lines, "", caption])


def main() -> None:
    results = rows(json.loads(Path(sys.argv[1]).read_text())["benchmarks"])
    results.sort(key=lambda row: (row["op"] != "token_stats", row["shape"], row["implementation"] != "r1kernels"))
    folder = save(results)
    text = table(results)
    readme = ROOT / "README.md"
    before, begin, rest = readme.read_text().partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if begin and end:
        readme.write_text(f"{before}{begin}\n{text}\n{end}{after}")
    print(text)
    print(f"written to {folder.relative_to(ROOT)} and README.md")


if __name__ == "__main__":
    main()

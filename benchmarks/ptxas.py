"""What each CUDA kernel takes of each kind of device: registers, spills, stack, shared memory. No GPU is needed.

    python benchmarks/ptxas.py benchmarks/results/ptxas.json
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "csrc" / "cuda")]

import nvcc  # noqa: E402

from r1kernels.__main__ import cuda_sources_hash  # noqa: E402

Row = dict[str, Any]


def readable(symbols: Iterable[str]) -> dict[str, str]:
    """"segment_kernel<BFloat16, true>" for each mangled name."""
    symbols = list(symbols)
    names = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    return {symbol: _short(name) for symbol, name in zip(symbols, names.splitlines(), strict=True)}


def _short(name: str) -> str:
    """A demangled name without what all kernels have in common: type of the result, namespaces, parameters."""
    depth, end = 0, len(name)
    for end in reversed(range(len(name))):
        depth += {")": 1, "(": -1}.get(name[end], 0)
        if depth == 0:
            break
    name = name[:end] if name.endswith(")") else name
    return re.sub(r"^void |\br1k::|\bgpu::|\(anonymous namespace\)::", "", name)


def rows_of_log(source: str, log: str) -> list[Row]:
    """From what `ptxas -v` says of the kernels of a source."""
    rows = []
    for part in re.split(r"Compiling entry function ", log)[1:]:
        entry = re.match(r"'(\w+)' for '(\w+)'", part)
        memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.findall(r"Used (\d+) registers", part)
        if entry is None or not memory or not registers:
            raise RuntimeError(f"ptxas did not say what a kernel of {source} uses:\n{part}")
        stack, stores, loads = (sum(map(int, column)) for column in zip(*memory, strict=True))
        shared = re.search(r"(\d+) bytes smem", part)
        rows.append({
            "source": source, "kernel": entry[1], "arch": entry[2], "registers": max(map(int, registers)),
            "spills": {"stores": stores, "loads": loads}, "stack": stack, "shared": int(shared[1]) if shared else 0,
        })
    return rows


def rows_of(objects: Iterable[nvcc.Object]) -> list[Row]:
    """A row for each kernel and architecture; `shared` is what a launch does not ask for."""
    rows = [row for compiled in objects for row in rows_of_log(compiled.source.name, compiled.log.read_text())]
    names = readable({row["kernel"] for row in rows})
    rows = [{**row, "kernel": names[row["kernel"]]} for row in rows]
    return sorted(rows, key=lambda row: (row["source"], row["kernel"], nvcc.ARCHITECTURES.index(row["arch"])))


def table(compiler: nvcc.Nvcc) -> dict[str, Any]:
    rows = rows_of(nvcc.compile_all(compiler, nvcc.ARCHITECTURES))
    return {"nvcc": compiler.version, "cuda_sources": cuda_sources_hash(ROOT), "rows": rows}


def dumps(table: dict[str, Any]) -> str:
    """JSON with a line for each row, so that a change of one is a change of one line."""
    head = json.dumps({name: value for name, value in table.items() if name != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in table["rows"])
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the table as JSON")
    out = parser.parse_args().out
    compiler, reason = nvcc.find()
    if compiler is None:
        print(f"nothing can be compiled: {reason}", file=sys.stderr)
        return 1
    result = table(compiler)
    out.write_text(dumps(result), encoding="utf-8")
    print(f"{len(result['rows'])} compilations of kernels for {out}")
    for row in result["rows"]:
        if any(row["spills"].values()) or row["stack"]:
            print(f"{row['source']} {row['kernel']} on {row['arch']}: spills {row['spills']}, stack {row['stack']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

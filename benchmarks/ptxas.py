"""What each CUDA kernel takes of each kind of device: registers, spills, stack, shared memory. No GPU is needed.

For sm_90 the table also has how many instructions an entry takes in the main loops.

    python benchmarks/ptxas.py benchmarks/results/ptxas.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "csrc" / "cuda")]

import nvcc  # noqa: E402

from r1kernels.__main__ import cuda_sources_hash  # noqa: E402
from r1kernels.triton import sass  # noqa: E402

Row = dict[str, Any]
LOOPS_OF = "sm_90a"
# How many entries a thread takes each time round the main loops of a kernel: (source, pattern of its name) -> entries,
# of each loop if they differ. A kernel without a line here is not counted.
ENTRIES: dict[tuple[str, str], int | tuple[int, ...]] = {
    # Sums, those of the last vectors, gradients with entropy in the loss and without.
    ("grpo_step.cu", r"step_kernel<\w*Float16>"): (32, 8, 16, 16),
    ("grpo_step.cu", r"step_kernel<Float32>"): (16, 4, 8, 8),
    ("token_stats.cu", r"segment_kernel<\w*Float16, \w+>"): 32,
    ("token_stats.cu", r"segment_kernel<\w+32, \w+>"): 16,
    ("token_stats_backward.cu", r"gradient_kernel<\w*Float16, \w+, true>"): 32,
    ("token_stats_backward.cu", r"gradient_kernel<(\w+, \w+, false|Float32, \w+, true)>"): 16,
}


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


def loops_of(compiled: nvcc.Object) -> dict[str, list[float]]:
    """Instructions of an entry in each main loop of the kernels in `ENTRIES`."""
    wanted = {pattern: count for (source, pattern), count in ENTRIES.items() if source == compiled.source.name}
    if not wanted:
        return {}
    found = {}
    for symbol, code in machine_code(compiled).items():
        name = readable([symbol])[symbol]
        for pattern, entries in wanted.items():
            if re.fullmatch(pattern, name):
                found[f"{compiled.source.name} {name}"] = _counted(code, entries)
    return dict(sorted(found.items()))


def _counted(code: list[sass.Instruction], entries: int | tuple[int, ...]) -> list[float]:
    if isinstance(entries, int):
        return [loop.of_an_entry for loop in sass.loops(code, entries)]
    loops = sass.loops(code, min(entries))
    if len(loops) != len(entries):
        raise RuntimeError(f"a kernel has {len(loops)} main loops, expected {len(entries)}")
    return [loop._replace(entries=count).of_an_entry for loop, count in zip(loops, entries, strict=True)]


def machine_code(compiled: nvcc.Object) -> dict[str, list[sass.Instruction]]:
    """The instructions of each kernel of an object for `LOOPS_OF`."""
    program = sass.tool("cuobjdump")
    if program is None:
        raise FileNotFoundError("cuobjdump was not found on PATH, in CUDA_HOME or in Triton's package")
    with tempfile.TemporaryDirectory() as folder:
        command = [program, "-xelf", "all", "-arch", LOOPS_OF, str(compiled.path)]
        environment = {**os.environ, "PATH": f"{Path(program).parent}{os.pathsep}{os.environ['PATH']}"}
        subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        found: dict[str, list[sass.Instruction]] = {}
        for cubin in sorted(Path(folder).glob(f"*{LOOPS_OF}*.cubin")):
            found |= sass.machine_code(cubin)
    return found


def table(compiler: nvcc.Nvcc) -> dict[str, Any]:
    objects = nvcc.compile_all(compiler, nvcc.ARCHITECTURES)
    loops = {name: counts for compiled in objects for name, counts in loops_of(compiled).items()}
    return {
        "nvcc": compiler.version, "cuda_sources": cuda_sources_hash(ROOT), "loops": dict(sorted(loops.items())),
        "rows": rows_of(objects),
    }


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

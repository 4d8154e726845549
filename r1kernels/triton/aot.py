"""Every kernel compiled ahead of time for every kind of device, and what came of it. No GPU is needed.

    python -m r1kernels.triton.aot benchmarks/results/aot

writes FOLDER/triton-<version>.json, of the Triton that is installed. For another one, put it in front:

    pip install --no-deps --target /tmp/triton-3.6.0 triton==3.6.0
    PYTHONPATH=/tmp/triton-3.6.0 python -m r1kernels.triton.aot benchmarks/results/aot
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from r1kernels.triton import sass
from r1kernels.triton.common import COMPILE_OPTIONS, Device, Variant
from r1kernels.triton.sources import kernel_sources, kernel_sources_hash

# A100, H100, B200, RTX 5090, MI300X.
DEVICES = {
    device.arch: device
    for device in (
        Device("sm_80", 108, 32), Device("sm_90", 132, 32), Device("sm_100", 148, 32), Device("sm_120", 170, 32),
        Device("gfx942", 304, 64),
    )
}
# Bytes of shared memory that one program can have.
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
TENSOR_MEMORY_LIMIT = 512  # columns
WORKERS = 2

# Instructions in the assembly that Triton emits; global memory is accessed in 16 bytes a thread or more, or in boxes.
NVIDIA = {
    "wide_loads": r"\bld\.global[.:\w]*\.(?:v[48]\.\w32|v[24]\.\w64)\b"
    r"|\bcp\.async\.c[ag]\.shared\.global[.:\w]*\s[^;]*,\s*(?:16|0x10)\b"
    r"|\bcp\.async\.bulk\.tensor[.:\w]*\.shared::(?:cluster|cta)\.global\b",
    "wide_stores": r"\bst\.global[.:\w]*\.(?:v[48]\.\w32|v[24]\.\w64)\b"
    r"|\bcp\.async\.bulk\.tensor[.:\w]*\.global\.shared::cta\b",
}
AMD = {
    "wide_loads": r"\b(?:global|buffer)_load_(?:dwordx4|b128)\b",
    "wide_stores": r"\b(?:global|buffer)_store_(?:dwordx4|b128)\b",
}
MATRIX = {
    "sm_80": r"\bmma\.sync\b", "sm_90": r"\bwgmma\.mma_async\b", "sm_100": r"\btcgen05\.mma\b",
    "sm_120": r"\bmma\.sync\b", "gfx942": r"\bv_mfma_",
}


class Compiled(NamedTuple):
    """One kernel's compilation: registers and stack (bytes) of a thread, shared memory (bytes) of a program.

    `spills` are stores and loads in bytes a thread (sm_*), or vector and scalar registers (gfx*). `tensor_memory` is
    in columns, which sm_100 alone has. `instructions` are those that a variant can expect: places in the code. `loops`
    are the instructions of an entry in each main loop (`Variant.loop`) of NVIDIA kernels. `sums` are the layouts of
    tensors before they are reduced, which say what a thread adds and in what order: the bits of sums depend on them.
    """

    registers: int
    spills: dict[str, int]
    stack: int
    shared: int
    tensor_memory: int
    instructions: dict[str, int]
    loops: list[float]
    sums: list[str]


def target(device: Device) -> GPUTarget:
    kind, _, capability = device.arch.partition("_")
    return GPUTarget("cuda", int(capability), device.warp) if kind == "sm" else GPUTarget("hip", kind, device.warp)


def options(variant: Variant) -> dict[str, Any]:
    """What `launch` and Triton's own launcher compile with."""
    return {"num_stages": 1, **COMPILE_OPTIONS, **variant.options, "debug": bool(variant.kernel.debug)}


def signature(variant: Variant) -> dict[str, str]:
    """The type of each argument in order; a variant may name types of arguments that its kernel has not.

    Triton's own launcher gives "*u1" to tensors of bool; a variant may say "*i1".
    """
    names = [parameter.name for parameter in variant.kernel.params]
    if unknown := set(variant.constants) - set(names):
        raise ValueError(f"{variant.kernel.__name__} has no arguments {sorted(unknown)}")
    types = {name: "*u1" if type_ == "*i1" else type_ for name, type_ in variant.signature.items()}
    return {name: "constexpr" if name in variant.constants else types[name] for name in names}


def compile_variant(variant: Variant, device: Device) -> Compiled:
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True  # what is found in the cache has no log
        source = ASTSource(variant.kernel, signature(variant), variant.constants)
        compiled = triton.compile(source, target=target(device), options=options(variant))
    if "ptx" in compiled.asm:
        assembly, patterns, resources = compiled.asm["ptx"], NVIDIA, _nvidia_resources(log.getvalue())
    else:
        assembly, patterns, resources = compiled.asm["amdgcn"], AMD, _amd_resources(compiled.asm["amdgcn"])
    patterns = {**patterns, "matrix": MATRIX[device.arch]}
    instructions = {name: len(re.findall(pattern, assembly)) for name, pattern in patterns.items()}
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    loops = []
    if variant.loop is not None and "cubin" in compiled.asm:
        loops = _instructions_of_an_entry(compiled.asm["cubin"], variant.loop.entries)
    return Compiled(
        **resources, shared=compiled.metadata.shared, tensor_memory=columns, instructions=instructions, loops=loops,
        sums=_reduced_layouts(compiled.asm["ttgir"]) if variant.loop is not None else [],
    )


def _instructions_of_an_entry(cubin: bytes, entries: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        (code,) = sass.machine_code(path).values()
    return [loop.of_an_entry for loop in sass.loops(code, entries)]


def _reduced_layouts(ttgir: str) -> list[str]:
    """"256x32 over 1: #ttg.blocked<...>" of every reduction, once each."""
    layouts = dict(re.findall(r"^(#\w+) = (#.+)$", ttgir, re.MULTILINE))
    reductions = re.findall(
        r'"tt\.reduce"\(.*?axis = (\d).*?^\s*\}\) : \(tensor<([\dx]+)x\w+, (#[^)]+)>\) ->', ttgir,
        re.MULTILINE | re.DOTALL,
    )
    return sorted({
        f"{shape} over {axis}: " + re.sub(r"#\w+(?!\.|\w)", lambda name: layouts.get(name[0], name[0]), layout)
        for axis, shape, layout in reductions
    })


def _nvidia_resources(log: str) -> dict[str, Any]:
    """From what `ptxas -v` says; a kernel and functions that it calls have a line each."""
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.findall(r"Used (\d+) registers", log)
    if not memory or not registers:
        raise RuntimeError(f"ptxas did not say what the kernel uses:\n{log}")
    stack, stores, loads = (sum(map(int, column)) for column in zip(*memory, strict=True))
    return {"registers": max(map(int, registers)), "spills": {"stores": stores, "loads": loads}, "stack": stack}


def _amd_resources(assembly: str) -> dict[str, Any]:
    """From the metadata at the end of the assembly."""

    def field(name: str) -> int:
        if (found := re.search(rf"^\s*\.{name}:\s+(\d+)$", assembly, re.MULTILINE)) is None:
            raise RuntimeError(f"the assembly's metadata has no .{name}")
        return int(found.group(1))

    spills = {"vector": field("vgpr_spill_count"), "scalar": field("sgpr_spill_count")}
    return {"registers": field("vgpr_count"), "spills": spills, "stack": field("private_segment_fixed_size")}


# ---- all of them ------------------------------------------------------------------------------------------


def kernel_modules() -> list[str]:
    """The modules of this package that have `variants`."""
    names = [f"r1kernels.triton.{path.stem}" for path in kernel_sources() if path.suffix == ".py"]
    return [name for name in names if hasattr(importlib.import_module(name), "variants")]


def variants_of(module: str, device: Device) -> list[Variant]:
    return list(importlib.import_module(module).variants(device))


def labels(variants: list[Variant]) -> list[tuple[str, str]]:
    """(kernel, what tells a variant from the others of its kernel) of each."""
    settings = [{**signature(v), **v.constants, **v.options} for v in variants]
    result = []
    for variant, mine in zip(variants, settings, strict=True):
        others = [s for v, s in zip(variants, settings, strict=True) if v.kernel is variant.kernel]
        telling = [name for name in mine if any(other.get(name) != mine[name] for other in others)]
        result.append((variant.kernel.__name__, " ".join(f"{name}={mine[name]}" for name in telling)))
    return result


class Task(NamedTuple):
    module: str
    arch: str
    index: int  # into `variants_of`


def tasks_of(modules: Iterable[str]) -> Iterator[Task]:
    for module in modules:
        for arch, device in DEVICES.items():
            yield from (Task(module, arch, index) for index in range(len(variants_of(module, device))))


def heading(task: Task) -> tuple[Variant, dict[str, Any]]:
    """A variant and the part of its row that is known before it is compiled."""
    variants = variants_of(task.module, DEVICES[task.arch])
    variant, (kernel, label) = variants[task.index], labels(variants)[task.index]
    name = f"{variant.kernel.__module__.rpartition('.')[2]}.{kernel}"
    threads = variant.options["num_warps"] * DEVICES[task.arch].warp
    entries, loads = variant.loop or (0, 0)
    return variant, {
        "kernel": name, "variant": label, "arch": task.arch, "expects": list(variant.expects), "threads": threads,
        "entries": entries, "loads": loads,
    }


def row_of(task: Task) -> dict[str, Any]:
    """A row of the table: what was compiled, then what came of it, or `error`."""
    variant, row = heading(task)
    try:
        return {**row, **compile_variant(variant, DEVICES[task.arch])._asdict()}
    except Exception as error:  # whatever a compiler raises is its answer for this row
        return {**row, "error": f"{type(error).__name__}: {error}".strip()[:2000]}


def rows_of_tasks(tasks: list[Task], workers: int = WORKERS) -> list[dict[str, Any]]:
    """Compiles in processes of their own: some of the compiler's failures end the process."""
    rows: dict[Task, dict[str, Any]] = {}
    while rest := [task for task in tasks if task not in rows]:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for task, future in [(task, pool.submit(row_of, task)) for task in rest]:
                try:
                    rows[task] = future.result()
                except BrokenProcessPool:
                    if workers == 1:  # tasks are done in order, so it was this one
                        rows[task] = {**heading(task)[1], "error": "the compiler ended its process"}
                        break
        workers = 1
    return [rows[task] for task in tasks]


def table(modules: Iterable[str], workers: int = WORKERS) -> dict[str, Any]:
    devices = {arch: {**d._asdict(), "shared_limit": SHARED_LIMIT[arch]} for arch, d in DEVICES.items()}
    return {
        "triton": triton.__version__, "sources": kernel_sources_hash(), "tensor_memory_limit": TENSOR_MEMORY_LIMIT,
        "devices": devices, "rows": rows_of_tasks(list(tasks_of(modules)), workers),
    }


# Of one multiprocessor: warps, registers, bytes of shared memory; a block takes 1 KiB of the latter for itself.
PROCESSORS = {
    "sm_80": (64, 65536, 167936), "sm_90": (64, 65536, 233472), "sm_100": (64, 65536, 233472),
    "sm_120": (48, 65536, 102400),
}


def resident_warps(row: dict[str, Any]) -> int:
    """How many warps of a kernel an NVIDIA multiprocessor holds, by registers, shared memory and threads."""
    warps, registers, shared = PROCESSORS[row["arch"]]
    of_block = row["threads"] // 32
    registers_of_warp = -(-row["registers"] // 8) * 8 * 32
    blocks = min(warps, registers // registers_of_warp) // of_block
    return min(blocks, 32, shared // (row["shared"] + 1024)) * of_block


def bytes_in_flight(row: dict[str, Any]) -> int:
    """Bytes of loads that a multiprocessor can wait for at a time."""
    return resident_warps(row) * 32 * row["loads"]


def dumps(table: dict[str, Any]) -> str:
    """JSON with a line for each row, so that a change of one is a change of one line."""
    head = json.dumps({name: value for name, value in table.items() if name != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in table["rows"])
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m r1kernels.triton.aot", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="FOLDER", help="where triton-<version>.json is written")
    parser.add_argument("--also", nargs="*", default=[], metavar="MODULE", help="further modules with `variants`")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes that compile")
    arguments = parser.parse_args()
    started = time.perf_counter()
    result = table([*kernel_modules(), *arguments.also], arguments.workers)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"triton-{triton.__version__}.json").write_text(dumps(result), encoding="utf-8")
    failed = [row for row in result["rows"] if "error" in row]
    print(f"{len(result['rows'])} compilations, {len(failed)} failed, in {time.perf_counter() - started:.0f} s")
    for row in failed:
        print(f"{row['kernel']} [{row['variant']}] {row['arch']}: {row['error'].splitlines()[-1]}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""The trainer on a real model, beside an earlier commit of it: seconds of updates, tokens sampled in a second, memory.

    python benchmarks/trainer.py MODEL [--before COMMIT] [--rounds 3] [--out FILE]

Each round runs every variant once: `recipes/smollm2.yaml` for three steps, in its own process. The first step warms
up. Completions differ between variants, so seconds are divided by tokens. Ratios are of the medians. The earlier commit
must work with the compiled extension of this one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEFORE = "28a4942"  # the last commit whose trainer knew float32 only
COMMON = ["threads=1", "stages.r1_zero.steps=3", "eval.questions=1", "eval.samples=1", "eval.every=100",
          "checkpoint.every=100"]


def run(tree: Path, model: str, overrides: list[str]) -> dict[str, float]:
    """One run in a tree; the means of its last two steps."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "r1kernels", "train", str(tree / "recipes/smollm2.yaml"), "--set",
                   f"run_dir={directory}/run", f"stages.base.path={model}", *COMMON, *overrides]
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        error = child.stderr.read().decode()
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            raise RuntimeError(f"{' '.join(command)} failed: {error[-2000:]}")
        lines = [json.loads(line) for line in Path(directory, "run/r1_zero/metrics.jsonl").read_text().splitlines()]
    steps = lines[1:3]
    tokens = sum(line["completion_tokens"] for line in steps)
    return {"sampling_tokens_per_s": tokens / sum(line["timing"]["sampling"] for line in steps),
            "update_ms_per_token": 1e3 * sum(line["timing"]["updates"] for line in steps) / tokens,
            "logprobs_ms_per_token": 1e3 * sum(line["timing"]["logprobs"] for line in steps) / tokens,
            "peak_gib": usage.ru_maxrss / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--before", default=BEFORE)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        old = Path(directory, "before")
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", old, given.before], check=True)
        try:
            shutil.copy(ROOT / "r1kernels/_C.abi3.so", old / "r1kernels")
            variants: dict[str, tuple[Path, list[str]]] = {
                "before, fp32": (old, []),
                "bf16": (ROOT, ["precision=bf16"]),
                "bf16, checkpointing": (ROOT, ["precision=bf16", "gradient_checkpointing=true"]),
                "fp32": (ROOT, ["precision=fp32"]),
            }
            found: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
            for _ in range(given.rounds):
                for name, (tree, overrides) in variants.items():
                    found[name].append(run(tree, given.model, overrides))
                    print(name, {key: round(value, 2) for key, value in found[name][-1].items()}, flush=True)
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", old], check=True)
    medians: dict[str, Any] = {name: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
                               for name, runs in found.items()}
    first = medians["before, fp32"]
    for values in medians.values():
        values["sampling_speedup"] = values["sampling_tokens_per_s"] / first["sampling_tokens_per_s"]
        values["update_speedup"] = first["update_ms_per_token"] / values["update_ms_per_token"]
        values["peak_share"] = values["peak_gib"] / first["peak_gib"]
    cpu = next(line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
               if line.startswith("model name"))
    amx = "amx_tile" in Path("/proc/cpuinfo").read_text()
    result = {"cpu": cpu, "amx": amx, "threads": 1, "before": given.before, "rounds": given.rounds, "medians": medians}
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

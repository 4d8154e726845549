"""Runs our kernels of each operation once on small shapes, for compute-sanitizer: `python -m gpu.sanitize`.

Those in CUDA C++, those of Triton, or both. Set PYTORCH_NO_CUDA_MEMORY_CACHING=1 for memcheck: it then knows where each
tensor ends.
"""

from __future__ import annotations

import argparse
import sys

import torch

import r1kernels
from gpu.cases import GROUPS, of_group
from gpu.cases.grpo_loss import ALL, MASKED, make_problem
from gpu.setting import CUDA, OURS, LeftOut, Logits, Setting, name_of
from gpu.step import CLUSTERS, step, tile_of

KERNELS = ("cuda", "triton")
TOKENS = 64


def run(device: torch.device, only: str | None = None, kernels: tuple[str, ...] = KERNELS) -> int:
    """How many candidates ran."""
    ran: set[tuple[str, ...]] = set()
    for group in GROUPS:
        for case in of_group(group, Setting(device, small=True, compiled=False)):
            for name, candidate in case.candidates.items():
                by, key = "cuda" if name.startswith(CUDA) else "triton", (*case.key, name)
                if name.startswith(OURS) and by in kernels and only in (None, case.op) and key not in ran:
                    try:
                        if "cluster of" in name:
                            candidate.check()  # whether it fits
                        candidate.timed.prepare()
                        candidate.timed.run()
                    except LeftOut:
                        continue
                    ran.add(key)
                    print(", ".join(key), flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return len(ran)


def run_step(device: torch.device, vocab: int) -> int:
    """The fused step alone, by clusters of every size that fits: how many launches there were."""
    setting, count = Setting(device, small=True, compiled=False), 0
    if not setting.fused_step:
        print("no CUDA kernels here: the fused step does not run", flush=True)
        return 0
    for dtype, rows in ((torch.bfloat16, MASKED), (torch.float32, ALL)):
        inputs = make_problem(Logits(TOKENS, vocab), setting, dtype, rows)[0].inputs
        for tile in ([], *map(tile_of, CLUSTERS)):
            try:
                step(inputs, tile=tile)
            except RuntimeError as error:
                if "does not fit" not in str(error):
                    raise
                continue
            count += 1
            print(f"fused step, {name_of(dtype)}, {rows}, V {vocab}, tile {tile}", flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", help="this one only")
    parser.add_argument("--kernels", choices=KERNELS, help="these only")
    parser.add_argument("--step", type=int, metavar="V", help="only the fused step, of this vocabulary")
    parser.add_argument("--device", default="cuda", help="cpu: a rehearsal")
    given = parser.parse_args()
    device = torch.device(given.device)
    with r1kernels.backend("triton" if device.type == "cuda" else "auto"):
        if given.step:
            count = run_step(device, given.step)
        else:
            count = run(device, given.op, (given.kernels,) if given.kernels else KERNELS)
    print(f"{count} candidates ran")
    return 0 if count or device.type == "cpu" else 2


if __name__ == "__main__":
    sys.exit(main())

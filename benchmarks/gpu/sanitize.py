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
from gpu.setting import CUDA, OURS, Setting

KERNELS = ("cuda", "triton")


def run(device: torch.device, only: str | None = None, kernels: tuple[str, ...] = KERNELS) -> int:
    """How many candidates ran."""
    count = 0
    for group in GROUPS:
        for case in of_group(group, Setting(device, small=True, compiled=False)):
            for name, candidate in case.candidates.items():
                by = "cuda" if name.startswith(CUDA) else "triton"
                if name.startswith(OURS) and by in kernels and only in (None, case.op):
                    candidate.timed.prepare()
                    candidate.timed.run()
                    count += 1
                    print(", ".join((*case.key, name)), flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", help="this one only")
    parser.add_argument("--kernels", choices=KERNELS, help="these only")
    parser.add_argument("--device", default="cuda", help="cpu: a rehearsal")
    given = parser.parse_args()
    device = torch.device(given.device)
    with r1kernels.backend("triton" if device.type == "cuda" else "auto"):
        count = run(device, given.op, (given.kernels,) if given.kernels else KERNELS)
    print(f"{count} candidates ran")
    return 0 if count else 2


if __name__ == "__main__":
    sys.exit(main())

"""Runs our kernels of each operation once on small shapes, for compute-sanitizer: `python -m gpu.sanitize`.

Set PYTORCH_NO_CUDA_MEMORY_CACHING=1 for memcheck: it then knows where each tensor ends.
"""

from __future__ import annotations

import argparse
import sys

import torch

import r1kernels
from gpu.cases import GROUPS, of_group
from gpu.setting import OURS, Setting


def run(device: torch.device, only: str | None = None) -> int:
    """How many cases ran."""
    count = 0
    for group in GROUPS:
        for case in of_group(group, Setting(device, small=True, compiled=False)):
            for name, candidate in case.candidates.items():
                if name.startswith(OURS) and only in (None, case.op):
                    candidate.timed.prepare()
                    candidate.timed.run()
                    count += 1
                    print(", ".join(case.key), flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", help="this one only")
    parser.add_argument("--device", default="cuda", help="cpu: a rehearsal")
    given = parser.parse_args()
    device = torch.device(given.device)
    with r1kernels.backend("triton" if device.type == "cuda" else "auto"):
        print(f"{run(device, given.op)} cases ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())

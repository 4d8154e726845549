"""Two ranks with different sequences, for tests/losses/test_importance_weights.py."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from ranks import error_of, fork_ranks
from torch import Tensor

from r1kernels import importance_weights

WORLD, FIRST = 2, 2  # ranks, and the rows of the first one


def policies() -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs of the trainer, of the sampler, mask): lengths differ, there are holes, and one row is empty."""
    rng = torch.Generator().manual_seed(0)
    sampler = -torch.rand(7, 9, generator=rng) * 4
    old = sampler + 0.3 * torch.randn(7, 9, generator=rng)
    mask = torch.arange(9) < torch.tensor([9, 0, 4, 5, 1, 7, 8])[:, None]
    mask[0, 3] = False
    return old, sampler, mask


def results_of(rank: int) -> dict[str, Any]:
    rows, group = slice(0, FIRST) if rank == 0 else slice(FIRST, None), torch.distributed.group.WORLD
    mine = [value[rows] for value in policies()]
    results: dict[str, Any] = {}
    for level, mode in itertools.product(("token", "sequence", "sequence_mean"), ("truncate", "mask")):
        results[f"{level}, {mode}"] = importance_weights(
            *mine, level=level, mode=mode, floor=0.5, normalize=True, process_group=group)._asdict()
    results["another cap"] = error_of(lambda: importance_weights(*mine, cap=2.0 + rank, process_group=group))
    results["a refusal"] = error_of(lambda: importance_weights(*mine, floor=rank - 1.0, process_group=group))
    return results


if __name__ == "__main__":
    fork_ranks(results_of, WORLD, Path(sys.argv[1]))

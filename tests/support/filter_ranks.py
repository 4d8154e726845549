"""Two ranks with different tokens, for tests/losses/test_token_filters.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from ranks import error_of, fork_ranks
from torch import Tensor

from r1kernels import clip_cov_filter, high_entropy_filter, off_policy_filter, testing

WORLD, FIRST = 2, 2  # ranks, and the rows of the first one
CLIP_COV = {"share": 0.1, "low": 0.2, "high": 5.0}


def batch() -> dict[str, Tensor]:
    """Rows of 9 tokens with holes; one is empty."""
    rng = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(7, 9, generator=rng) * 4
    mask = torch.arange(9) < torch.tensor([9, 0, 4, 5, 1, 7, 8])[:, None]
    mask[0, 3] = False
    return {
        "entropy": 3 * torch.rand(7, 9, generator=rng), "logprobs": logprobs, "mask": mask,
        "old_logprobs": logprobs + 0.4 * torch.randn(7, 9, generator=rng), "advantages": torch.linspace(-2, 1, 7),
    }


def results_of(rank: int) -> dict[str, Any]:
    rows, group = slice(0, FIRST) if rank == 0 else slice(FIRST, None), torch.distributed.group.WORLD
    whole = batch()
    mine = {name: value[rows] for name, value in whole.items()}
    per_token = mine["advantages"][:, None].expand_as(mine["logprobs"])
    columns = slice(0, 5) if rank == 0 else slice(5, None)
    part = [whole[name][:, columns] for name in ("logprobs", "old_logprobs")]
    return {
        "high entropy": high_entropy_filter(mine["entropy"], mine["mask"], top=0.3, process_group=group),
        "clip-cov": clip_cov_filter(mine["logprobs"], per_token, mine["mask"], **CLIP_COV, process_group=group,
                                    generator=testing.generator(rank)),
        "off policy": off_policy_filter(*part, whole["advantages"], whole["mask"][:, columns], threshold=0.05,
                                        sequence_group=group),
        "another top": error_of(lambda: high_entropy_filter(mine["entropy"], top=0.25 + 0.25 * rank,
                                                            process_group=group)),
        "a refusal": error_of(lambda: high_entropy_filter(mine["entropy"], top=rank, process_group=group)),
    }


if __name__ == "__main__":
    fork_ranks(results_of, WORLD, Path(sys.argv[1]))

"""Random support sets, and logits over them: the oracles of `token_stats` then give the float64 values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from r1kernels.testing.inputs import generator


def random_support(
    token_ids: Tensor, vocab: int, most: int, *, seed: int = 0, whole: float = 0.0, dtype: torch.dtype = torch.int64
) -> tuple[Tensor, Tensor]:
    """Sets of 1 to `most` different ids in random order, each with its token. A share `whole` of the sets is empty."""
    rng = generator(seed)
    sets, ends = [], [0]
    for token in token_ids.reshape(-1).tolist():
        size = int(torch.randint(1, min(most, vocab) + 1, (), generator=rng))
        kept = torch.randperm(vocab, generator=rng)[:size]
        if token not in kept.tolist():
            kept[int(torch.randint(size, (), generator=rng))] = token
        sets.append(kept[:0] if float(torch.rand((), generator=rng)) < whole else kept)
        ends.append(ends[-1] + len(sets[-1]))
    return torch.cat([torch.zeros(0, dtype=torch.int64), *sets]).to(dtype), torch.tensor(ends, dtype=dtype)


def over_support(logits: Tensor, support: tuple[Tensor, Tensor]) -> Tensor:
    """A copy of logits (..., V) with -inf for each id that is not in the set of its token."""
    rows = logits.detach().reshape(-1, logits.shape[-1])
    limited = torch.full_like(rows, -math.inf)
    ids, offsets = (value.tolist() for value in support)
    for n in range(len(rows)):
        kept = ids[offsets[n] : offsets[n + 1]] or range(rows.shape[1])
        for j in kept:
            limited[n, j] = rows[n, j]
    return limited.reshape(logits.shape)

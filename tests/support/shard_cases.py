"""Heads and batches that several processes share, and what their results must be equal to."""

from __future__ import annotations

from typing import Any

import linear_cases as cases
import torch
from torch import Tensor

from r1kernels import testing
from r1kernels.testing import budget as budgets

# Rows of each rank.
SPLITS = {2: (600, 400), 3: (400, 350, 250), 4: (400, 0, 350, 250)}
VOCAB, WIDTH, LEAD = 1000, 24, (4, 6)
OPTIONS = {"chunk_bytes": cases.chunk_of(7, 400, WIDTH)}
DTYPES = {
    "float32": (torch.float32, torch.float32), "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32 head": (torch.bfloat16, torch.float32), "float16": (torch.float16, torch.float16),
}


def make(head: str, dtypes: str = "float32", vocab: int = VOCAB) -> dict[str, Any]:
    dtype, weight_dtype = DTYPES[dtypes]
    return cases.make(head, *LEAD, width=WIDTH, vocab=vocab, dtype=dtype, weight_dtype=weight_dtype)


def mask() -> Tensor:
    return testing.random_ids(*LEAD, vocab=4, seed=3) > 0


def shard_of(case: dict[str, Any], sizes: tuple[int, ...], rank: int) -> dict[str, Any]:
    """The case with the rows of one rank."""
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    part = case | {name: case[name][rows] for name in ("weight", "bias", "teacher_weight") if name in case}
    if "lora" in case:
        part["lora"] = (case["lora"][0], case["lora"][1][:, rows])
    return part | {name: case[name][..., rows] for name in ("logits", "teacher_logits") if name in case}


def assert_like_one_process(together: dict[str, Tensor], alone: dict[str, Tensor]) -> None:
    """Log-probs and losses to 1e-6. Gradients to one rounding, and one of the largest entry of a row: there an entry of
    d logits may be rounded the other way, because float32 sums over the vocabulary are added in another order."""
    assert together.keys() == alone.keys()
    for key, value in alone.items():
        got, size = together[key], value.double().abs()
        assert (got.shape, got.dtype) == (value.shape, value.dtype), key
        budget = 1e-6 * size.clamp(min=1)
        if key in (*cases.TENSORS, "logits"):
            eps = torch.finfo(value.dtype).eps
            # That of A is made from 16-bit numbers in one process, and from float32 ones in several.
            largest = size.max() if key == "lora_a" else size.amax(-1, keepdim=True) / 2
            budget = eps * (size + largest) + 2 * budgets.ROUNDINGS * testing.EPS32 * size.max()
        testing.assert_within(got, value, budget)


def batch() -> dict[str, Tensor]:
    """What a policy loss needs of the tokens."""
    rng = testing.generator(5)
    advantages = torch.randn(LEAD[0], generator=rng)
    advantages[1] = 0
    old = -7 + torch.randn(LEAD, generator=rng)
    return {"advantages": advantages, "old_logprobs": old, "ref_logprobs": old + 0.1, "mask": mask()}


def make_logits(dtype: torch.dtype) -> dict[str, Any]:
    ids = testing.random_ids(*LEAD, vocab=VOCAB)
    return {"logits": testing.random_logits(*LEAD, VOCAB, dtype=dtype), "token_ids": ids}

"""Inputs of the tests (random with a seed, padded, packed and poisoned), and functions under torch.compile."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# For any autograd.Function, torch.compile warns about code of its own.
DYNAMO_WARNING = "ignore:.*should not be instantiated:DeprecationWarning"


def compiled(function: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> Callable[..., Any]:
    """`function` under torch.compile as one graph. Earlier compilations are reset."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 4.0, seed: int = 0) -> Tensor:
    """Normal logits of standard deviation `scale`, within [-32, 32], rounded to `dtype`.

    Args:
        shape: the sizes, with the vocabulary last.
        dtype: of the result.
        scale: the standard deviation before values are clamped.
        seed: the same seed gives the same logits.

    Returns:
        (*shape), on the CPU, without a gradient.
    """
    return (torch.randn(shape, generator=generator(seed)) * scale).clamp(-32, 32).to(dtype)


def random_ids(*shape: int, vocab: int, seed: int = 0) -> Tensor:
    """Uniform token ids.

    Args:
        shape: the sizes.
        vocab: V; ids are in [0, V).
        seed: the same seed gives the same ids.

    Returns:
        (*shape), int64, on the CPU.
    """
    return torch.randint(vocab, shape, generator=generator(seed))


def random_policy(batch: int = 5, length: int = 7, seed: int = 0, spread: float = 0.5) -> dict[str, Tensor]:
    """Keyword arguments of `policy_loss`: they cross every bound of every preset, and one advantage is 0.

    `spread` is the standard deviation of the log-ratios; log-ratios to the reference have half of it.
    """
    rng = generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    logprobs = -normal(batch, length).abs() - 0.1
    advantages = normal(batch)
    advantages[batch // 2] = 0
    return {
        "logprobs": logprobs,
        "advantages": advantages,
        "old_logprobs": logprobs + spread * normal(batch, length),
        "ref_logprobs": logprobs + spread / 2 * normal(batch, length),
        "entropy": normal(batch, length).abs(),
        "importance_weights": normal(batch).exp(),
    }


def random_lengths(batch: int, length: int, seed: int = 0) -> list[int]:
    """Sequence lengths from 0 (the second) to `length` (the first)."""
    lengths = torch.randint(1, length + 1, (batch,), generator=generator(seed)).tolist()
    return [length, 0, *lengths[2:]][:batch]


def length_mask(lengths: list[int], length: int) -> Tensor:
    return torch.arange(length) < torch.tensor(lengths).unsqueeze(1)


def packed(inputs: dict[str, Any], lengths: list[int]) -> dict[str, Any]:
    """The same sequences without padding: (B, T) tensors become (N,), and `cu_seqlens` says where each begins."""
    keep = length_mask(lengths, inputs["logprobs"].shape[1])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    return {
        "cu_seqlens": cu_seqlens,
        **{k: v[keep] if isinstance(v, Tensor) and v.shape == keep.shape else v for k, v in inputs.items()},
    }


def poisoned(value: Tensor, mask: Tensor) -> Tensor:
    """`value` with NaN, inf and -inf in turn (or ids outside any vocabulary) wherever `mask` is False."""
    junk = [-1, 2**40] if not value.is_floating_point() else [math.nan, math.inf, -math.inf]
    junk_of_token = torch.tensor(junk, dtype=value.dtype)[torch.arange(mask.numel()) % len(junk)].reshape(mask.shape)
    extra = value.dim() - mask.dim()
    return torch.where(mask[(..., *[None] * extra)], value, junk_of_token[(..., *[None] * extra)])

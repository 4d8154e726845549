"""Random inputs on the device, from a seed: logits as a model gives them, tokens that were sampled from them."""

from __future__ import annotations

import torch
from torch import Tensor

from gpu.setting import Head, Logits

SEQUENCE = 512  # tokens
LOGITS_STD = 3.0
HEAD_STD = 4.0  # of the logits of a head: the largest of 151,936 is then near 20
NEAR = 0.02  # log-ratios of tokens that no bound clips


def generator(device: torch.device, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def normal(*shape: int, device: torch.device, dtype: torch.dtype, size: float = 1.0, seed: int = 0) -> Tensor:
    """Made in blocks: the float32 numbers never lie beside the whole."""
    rng, out = generator(device, seed), torch.empty(shape, dtype=dtype, device=device)
    flat = out.view(-1)
    for begin in range(0, flat.numel(), 1 << 28):
        block = flat[begin : begin + (1 << 28)]
        block.copy_(torch.randn(block.shape, generator=rng, device=device).mul_(size))
    return out


def make_logits(shape: Logits, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    return normal(shape.tokens, shape.vocab, device=device, dtype=dtype, size=LOGITS_STD, seed=seed)


def uniform_ids(count: int, vocab: int, device: torch.device) -> Tensor:
    return torch.randint(vocab, (count,), generator=generator(device, 1), device=device)


def make_head(
    shape: Head, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(hidden (N, H), weight (V, H))."""
    hidden = normal(shape.tokens, shape.width, device=device, dtype=dtype, seed=seed)
    weight = normal(
        shape.vocab, shape.width, device=device, dtype=dtype, size=HEAD_STD / shape.width**0.5, seed=seed + 1
    )
    return hidden, weight


def sampled_ids(hidden: Tensor, weight: Tensor, rows: int = 512) -> Tensor:
    """Tokens as a rollout draws them: from the softmax of the head."""
    rng = generator(hidden.device, 2)
    draws = [
        torch.multinomial((block @ weight.T).float().softmax(-1), 1, generator=rng).squeeze(-1)
        for block in hidden.split(rows)
    ]
    return torch.cat(draws)


def sequences(count: int) -> tuple[int, int]:
    """(B, T) of so many tokens."""
    length = min(SEQUENCE, count // 4)
    return count // length, length


def alternating(count: int, device: torch.device) -> Tensor:
    """Advantages of both signs, none near 0."""
    sign = torch.tensor([1.0, -1.0], device=device).repeat(count)[:count]
    return sign * (1 + torch.rand(count, generator=generator(device, 3), device=device))


def noise_like(value: Tensor, size: float, seed: int = 4) -> Tensor:
    return size * torch.randn(value.shape, generator=generator(value.device, seed), device=value.device)

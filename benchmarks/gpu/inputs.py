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


def completion_mask(count: int, length: int, device: torch.device) -> Tensor:
    """(B, T) of a batch of RL: in each row a prompt, a completion of random length, which counts, and padding. About
    65 % of the tokens count, whatever the seed: lengths are evenly spaced, in random order."""

    def shuffled(low: float, high: float, seed: int) -> Tensor:
        order = torch.randperm(count, generator=generator(device, seed), device=device)
        return torch.linspace(low, high, count, device=device)[order]

    prompt = (length * shuffled(0.05, 0.15, 6)).long()
    completion = ((length - prompt) * shuffled(0.44, 1.0, 7)).ceil().long()
    place = torch.arange(length, device=device)
    return (place >= prompt[:, None]) & (place < (prompt + completion)[:, None])


def packed_bounds(tokens: int, count: int, device: torch.device) -> Tensor:
    """cu_seqlens of so many sequences of random lengths that fill all tokens."""
    spaced = torch.linspace(0.2, 1.8, count)[torch.randperm(count, generator=torch.Generator().manual_seed(8))]
    bounds = (spaced.cumsum(0) * (tokens / spaced.sum())).round().long()
    return torch.cat([bounds.new_zeros(1), bounds]).to(device)


def alternating(count: int, device: torch.device) -> Tensor:
    """Advantages of both signs, none near 0."""
    sign = torch.tensor([1.0, -1.0], device=device).repeat(count)[:count]
    return sign * (1 + torch.rand(count, generator=generator(device, 3), device=device))


def noise_like(value: Tensor, size: float, seed: int = 4) -> Tensor:
    return size * torch.randn(value.shape, generator=generator(value.device, seed), device=value.device)

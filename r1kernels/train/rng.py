"""Random numbers that depend only on the seed and on a position in the run, such as ("rollout", 17).

So a resumed run draws the same numbers as an uninterrupted one, and an extra evaluation does not change any others."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
from collections.abc import Iterator

import torch


def seed_at(seed: int, *position: str | int) -> int:
    """A 63-bit seed for one position in the run."""
    digest = hashlib.blake2b(repr((seed, *position)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def python_generator(seed: int, *position: str | int) -> random.Random:
    return random.Random(seed_at(seed, *position))


@functools.lru_cache(maxsize=8)  # many steps ask for the order of one epoch
def permutation(count: int, seed: int, *position: str | int) -> tuple[int, ...]:
    """A shuffled range(count)."""
    order = list(range(count))
    python_generator(seed, *position).shuffle(order)
    return tuple(order)


@contextlib.contextmanager
def torch_seeded(seed: int, *position: str | int) -> Iterator[None]:
    """Seeds torch's global generators, which `generate` draws from, and restores them afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed_at(seed, *position))
        yield

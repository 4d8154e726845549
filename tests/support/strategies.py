"""Hypothesis strategies of inputs: any shape, dtype and layout of logits, with extreme values.

Values come from torch's generator and a drawn seed, because drawing single floats is slow; hypothesis chooses what kind
of values they are, so that a failure names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from r1kernels import testing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = st.integers(0, 10_000)
# Vocabularies near the widths at which kernels change their path are as likely as small ones.
EDGES = (15, 16, 17, 31, 33, 127, 129, 2047, 2049) if testing.KERNELS == "cpu" else (7, 33)
VOCABS = st.one_of(st.integers(1, 12), st.integers(1, 80), st.sampled_from(EDGES))
LEADS = st.one_of(st.just(()), st.tuples(st.integers(0, 5)), st.tuples(st.integers(0, 3), st.integers(0, 3)))


def _transposed(x: Tensor) -> Tensor:
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def _sliced(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), math.nan).to(x.dtype)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def _every_other_row(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, math.nan) if x.is_floating_point() else -x - 1], 0)[0] if x.dim() < 2 \
        else x.repeat_interleave(2, 0)[::2]


def _padded(x: Tensor) -> Tensor:
    """Rows of odd pitch, which are not aligned, and NaN between them."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), math.nan).to(x.dtype)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def _offset(x: Tensor) -> Tensor:
    flat = torch.zeros(x.numel() + 1, dtype=x.dtype)
    flat[1:] = x.reshape(-1)
    return flat[1:].view(x.shape)


def _expanded(x: Tensor) -> Tensor:
    """Zero strides: every row is the first one, so this changes the values."""
    return x[:1].expand_as(x) if x.dim() > 1 and len(x) else x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x, "transposed": _transposed, "sliced": _sliced, "every other row": _every_other_row,
    "padded": _padded, "offset": _offset, "expanded": _expanded,
}


def _some(shape: torch.Size, share: float, seed: int) -> Tensor:
    return torch.rand(shape, generator=testing.generator(seed + 77)) < share


def _huge(x: Tensor, seed: int) -> Tensor:
    largest = 0.88 * torch.finfo(x.dtype).max  # 3e38 of float32 and bfloat16, 57,600 of float16
    return torch.where(_some(x.shape, 0.2, seed), x.sign() * largest, x)


def _one(value: float) -> Callable[[Tensor, int], Tensor]:
    def put(x: Tensor, seed: int) -> Tensor:
        x = x.clone()
        if x.numel():
            x.reshape(-1)[seed % x.numel()] = value
        return x

    return put


# What is done to normal logits. `finite` rows are compared with the oracle to the budget, others by their class.
VALUES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "normal": lambda x, seed: x,
    "small": lambda x, seed: x * 0.02,
    "large": lambda x, seed: (x * 5).clamp(-32, 32),
    "offset": lambda x, seed: x + (1e3 if x.dtype == torch.float16 else 1e4),
    "negative offset": lambda x, seed: x - (1e3 if x.dtype == torch.float16 else 1e4),
    "equal": lambda x, seed: torch.full_like(x, 0.75),
    "ties": lambda x, seed: x.round(),
    "denormal": lambda x, seed: x * torch.finfo(x.dtype).tiny / 16,
    "certain": lambda x, seed: x + 28 * (torch.arange(x.shape[-1]) == seed % x.shape[-1]).to(x.dtype),
    "-inf": lambda x, seed: x.masked_fill(_some(x.shape, 0.4, seed), -math.inf),
    "huge": _huge,
    "one nan": _one(math.nan),
    "one inf": _one(math.inf),
}


class Rows(NamedTuple):
    """Logits (..., V) in some layout, and ids (...) of which the first is 0 and the last V - 1."""

    logits: Tensor
    token_ids: Tensor
    seed: int


@st.composite
def rows(
    draw: st.DrawFn, values: tuple[str, ...] = tuple(VALUES), leads: st.SearchStrategy[tuple[int, ...]] = LEADS,
    layouts: tuple[str, ...] = tuple(LAYOUTS),
) -> Rows:
    lead, vocab, seed = draw(leads), draw(VOCABS), draw(SEEDS)
    dtype, kind, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(values)), draw(st.sampled_from(layouts))
    logits = VALUES[kind](testing.random_logits(*lead, vocab, dtype=dtype, seed=seed), seed).to(dtype)
    ids = testing.random_ids(*lead, vocab=vocab, seed=seed)
    if ids.numel() > 1:
        ids.reshape(-1)[0], ids.reshape(-1)[-1] = 0, vocab - 1
    return Rows(LAYOUTS[layout](logits), ids, seed)


def leaf(x: Tensor) -> Tensor:
    """A leaf with the same strides, so that a kernel sees the layout."""
    return x.detach().requires_grad_()


def tokens_mask(shape: tuple[int, ...], kind: str, seed: int) -> Tensor | None:
    """A mask over tokens: none, boolean, of floats or integers, all or nothing."""
    if kind == "none":
        return None
    some = _some(torch.Size(shape), {"all": 2.0, "nothing": -1.0}.get(kind, 0.6), seed)
    return {"floats": some * 0.5, "integers": some.long()}.get(kind, some)


MASKS = st.sampled_from(["none", "booleans", "floats", "integers", "all", "nothing"])

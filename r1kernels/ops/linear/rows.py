"""The rows of hidden states that a walk takes: which ones are active, how they are read, and where results go."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from r1kernels import _dispatch
from r1kernels.ops._checks import values_are_free


class Selection(NamedTuple):
    """The active rows. `index` (R,) is ascending, or None for all N. With a capacity, `valid` (R,) says which entries
    of index are rows; the other entries are N."""

    index: Tensor | None
    valid: Tensor | None


ALL_ROWS = Selection(None, None)


def select_rows(wanted: Tensor | None, count: int, capacity: int) -> Selection:
    """The rows of `count` where `wanted` (N,) is True. This costs one synchronisation, or none with a capacity.

    More rows than the capacity raise an error: immediately on a CPU, on a device at its next synchronisation.
    """
    if wanted is None:
        _check_capacity(count, capacity)
    if wanted is None or count == 0:
        return ALL_ROWS
    if capacity < 0:
        index = wanted.nonzero().squeeze(-1)
        return ALL_ROWS if len(index) == count else Selection(index, None)
    if values_are_free(wanted):
        _check_capacity(int(wanted.sum()), capacity)
    else:
        torch._assert_async(wanted.sum() <= capacity, "r1kernels: there are more active tokens than capacity allows")
    index = torch.nonzero_static(wanted, size=min(capacity, count), fill_value=count).squeeze(-1)
    return Selection(index, index < count)


def _check_capacity(count: int, capacity: int) -> None:
    if 0 <= capacity < count:
        raise ValueError(f"capacity ({capacity}) is smaller than the number of active tokens ({count})")


def write_rows(out: Tensor, where: Tensor | slice, value: Tensor) -> None:
    """out[where] = value, converted."""
    if isinstance(where, slice):
        _convert(value, out[where])
    else:
        out[where] = value.to(out.dtype)


def _convert(value: Tensor, out: Tensor) -> None:
    """out = value. Our kernel shares small work between fewer threads than PyTorch's copy does."""
    if _dispatch.choose("kernels", value.device.type, value.dtype).implementation == "cpu" and out.is_contiguous():
        torch.ops.r1kernels.scaled.default(value, torch.ones((), dtype=torch.float32), out, False)
    else:
        out.copy_(value)


class Rows:
    """Rows of (..., H) by their flat number. If no view can flatten the tensor, they are copied chunk by chunk."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden, self.count = hidden, hidden.shape[:-1].numel()
        try:
            self.flat = hidden.view(-1, hidden.shape[-1])
        except RuntimeError:
            self.flat = None

    @property
    def is_view(self) -> bool:
        """Whether all rows can be read without a copy, each with contiguous entries."""
        return self.flat is not None and self.flat.stride(-1) == 1

    def take(self, rows: Tensor | slice) -> Tensor:
        if self.flat is not None:
            taken = self.flat[rows]
            return taken if taken.stride(-1) == 1 else taken.contiguous()
        if isinstance(rows, slice):
            if rows.stop - rows.start == self.count:
                return self.hidden.reshape(self.count, -1)
            rows = torch.arange(rows.start, rows.stop, device=self.hidden.device)
        index = []
        for size in reversed(self.hidden.shape[1:-1]):  # torch.unravel_index copies the sizes from the host
            index.insert(0, rows % size)
            rows = rows // size
        return self.hidden[(rows, *index)]

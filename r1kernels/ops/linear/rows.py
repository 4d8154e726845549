"""The rows of hidden states that a walk takes: which ones are active, how they are read, and where results go."""

from __future__ import annotations

import torch
from torch import Tensor

from r1kernels import _dispatch
from r1kernels.ops._checks import values_are_free


class Rows:
    """The active rows of hidden states (..., H), by their flat number. If no view can flatten the tensor, they are
    copied chunk by chunk.

    Attributes:
        index: (R,), ascending, or None for all N. valid: with a capacity, (R,), which entries of index are rows; the
            other entries are N.
        total: N. count: R, or N. padded: rows of the results: padding writes to one extra row, which is cut off at the
            end.
    """

    hidden: Tensor
    index: Tensor | None
    valid: Tensor | None

    def __init__(self, hidden: Tensor, index: Tensor | None = None, valid: Tensor | None = None) -> None:
        self.hidden, self.index, self.valid = hidden, index, valid
        self.total: int = hidden.shape[:-1].numel()
        self.count: int = self.total if index is None else len(index)
        self.padded: int = self.total + (valid is not None)
        try:
            self._flat = hidden.view(-1, hidden.shape[-1])
        except RuntimeError:
            self._flat = None

    def of(self, hidden: Tensor) -> Rows:
        """The same rows of other hidden states."""
        return Rows(hidden, self.index, self.valid)

    @property
    def are_a_view(self) -> bool:
        """Whether all rows are active, and can be read without a copy, each with contiguous entries."""
        return self.index is None and self._flat is not None and self._flat.stride(-1) == 1

    def take(self, rows: Tensor | slice) -> Tensor:
        if self._flat is not None:
            taken = self._flat[rows]
            return taken if taken.stride(-1) == 1 else taken.contiguous()
        if isinstance(rows, slice):
            if rows.stop - rows.start == self.total:
                return self.hidden.reshape(self.total, -1)
            rows = torch.arange(rows.start, rows.stop, device=self.hidden.device)
        index = []
        for size in reversed(self.hidden.shape[1:-1]):  # torch.unravel_index copies the sizes from the host
            index.insert(0, rows % size)
            rows = rows // size
        return self.hidden[(rows, *index)]


def active_rows(hidden: Tensor, wanted: Tensor | None, capacity: int) -> Rows:
    """The rows of hidden states where `wanted` (N,) is True. This costs one synchronisation, or none with a capacity.

    More rows than the capacity raise an error: immediately on a CPU, on a device at its next synchronisation.
    """
    rows = Rows(hidden)
    count = rows.total
    if wanted is None:
        _check_capacity(count, capacity)
    if wanted is None or count == 0:
        return rows
    if capacity < 0:
        index = wanted.nonzero().squeeze(-1)
        return rows if len(index) == count else Rows(hidden, index)
    if values_are_free(wanted):
        _check_capacity(int(wanted.sum()), capacity)
    else:
        torch._assert_async(wanted.sum() <= capacity, "r1kernels: there are more active tokens than capacity allows")
    index = torch.nonzero_static(wanted, size=min(capacity, count), fill_value=count).squeeze(-1)
    return Rows(hidden, index, index < count)


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

"""The products with d logits. On GPUs, rows of several chunks are gathered and multiplied at once.

    dX = dz W,  dW = dz^T h,  db = sum_t dz_t,  dA = h^T (dz B^T),  dB = (h A)^T dz,    dz = d logits

dW is as large as the weight, and in float32: it is read and written once for each of its products, not for each chunk.
Only rows with a gradient are gathered, so that no product has few rows because a loss clips most of its tokens.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from r1kernels import _library
from r1kernels.ops._checks import accumulator_dtype
from r1kernels.ops.linear.gemm import add_rounded, add_rows, has_rounded_sums, matmul, place_rows
from r1kernels.ops.linear.head import Chunk, Head, Needs
from r1kernels.ops.linear.rows import Rows, write_rows
from r1kernels.ops.target_terms import is_repeated


class _Part(NamedTuple):
    """What the products need of a chunk's rows with a gradient, beside their d logits. None if no product needs it."""

    write: Tensor | slice  # rows of the results
    hidden: Tensor | None
    lora_hidden: Tensor | None
    token_ids: Tensor | None  # (n,), or several of each row (n, D)
    lost: Tensor | None  # rounding errors of d logits in the tokens' entries


class GradientSums:
    """The gradients of a walk.

    Args:
        rows: those that may have a gradient.
        weight_dtype: the wanted dtype of the weight's gradient. A single product may write it, rounded once. If there
            are several, their sum is float32.
        hidden_dtype: of the gradient of hidden, default that of hidden.
    """

    head: Head
    needs: Needs
    dtype: torch.dtype

    def __init__(
        self, head: Head, needs: Needs, rows: Rows, weight_dtype: torch.dtype | None = None,
        hidden_dtype: torch.dtype | None = None,
    ) -> None:
        dtype = rows.hidden.dtype
        self.head, self.needs, self.dtype = head, needs, dtype
        self.device: torch.device = head.token_ids.device
        self.accumulator: torch.dtype = accumulator_dtype(dtype)
        # Of d logits. If hidden or weight is float32, d logits stay float32, too.
        self.grad_dtype: torch.dtype = dtype if head.weight.dtype == dtype else self.accumulator
        self.weight_dtype: torch.dtype = weight_dtype or self.accumulator
        # Of d h and d (h A). Parts of a sum over ranks are not rounded.
        self.inner_dtype: torch.dtype = hidden_dtype or dtype
        vocab, width = head.weight.shape
        self._rows = min(rows.count, max(head.gradient_rows, head.rows))  # of the buffer, in which every chunk fits
        self._buffer: Tensor | None = None
        self._parts: list[_Part] = []
        self._grad_logits: Tensor | None = None  # of the parts
        self._hidden: Tensor | None = None
        if needs.hidden:
            self._hidden = _library.empty(rows.padded, width, dtype=self.inner_dtype, device=self.device)
            if rows.index is not None:  # some rows are in no chunk
                self._hidden.zero_()
        self._weight: Tensor | None = None
        self._lora_a: Tensor | None = None
        self._lora_b: Tensor | None = None
        self._bias = (
            torch.zeros(vocab, dtype=self.accumulator, device=self.device) if needs.bias else None
        )

    @property
    def gathers(self) -> bool:
        """Whether d logits have memory other than that of the logits."""
        return self.head.gradient_rows > 0

    def memory(self, logits: Tensor, count: int) -> Tensor:
        """Memory for d logits of `count` rows of a chunk: (count, V), or (n, V) in the memory of its logits (n, V).
        There, each row starts where the memory of its row of logits starts."""
        if not self.gathers:
            return logits if logits.dtype == self.grad_dtype else logits.view(self.grad_dtype)[:, : logits.shape[1]]
        if self._buffer is None:
            self._buffer = empty_rows(self._rows, self.head.weight.shape[0], self.grad_dtype, self.device)
        begin = self._filled
        if begin + count > len(self._buffer):
            self._multiply(last=False)
            begin = 0
        return self._buffer[begin : begin + count]

    @property
    def _filled(self) -> int:
        return 0 if self._grad_logits is None else len(self._grad_logits)

    def leave_out(self, chunk: Chunk) -> None:
        """No row of the chunk has a gradient."""
        if self.needs.hidden and isinstance(chunk.write, slice):
            self._hidden[chunk.write] = 0

    def add(
        self, chunk: Chunk, grad_logits: Tensor, rows: Tensor | None, exact: Tensor | None, ids: Tensor | None = None
    ) -> None:
        """Adds the gradients of a chunk, at the latest when `results` is called.

        Args:
            grad_logits: in `memory`: d logits of `rows` (R,), or of all rows of the chunk.
            exact: (n,) or (n, D), the entries of the tokens `ids` in d logits before they were rounded.
        """
        write, hidden, lora_hidden = chunk.write, chunk.hidden, chunk.lora_hidden
        needs = self.needs
        if rows is not None:
            self.leave_out(chunk)
            write = write[rows] if isinstance(write, Tensor) else rows + write.start
            exact = None if exact is None else exact[rows]
        where = slice(None) if rows is None else rows
        lost = None
        if exact is not None:
            ids = ids[where]
            lost = (exact - grad_logits.gather(-1, ids.view(len(ids), -1)).view(ids.shape)).to(self.accumulator)
            if ids.dim() == 2 and ids.shape[1] > 1:
                lost = torch.where(is_repeated(ids), 0, lost)
        self._parts.append(_Part(
            write,
            hidden[where] if needs.weight or needs.lora_a else None,
            lora_hidden[where] if needs.lora_b else None,
            None if lost is None else ids,
            lost,
        ))
        if self.gathers:
            self._grad_logits = self._buffer[: self._filled + len(grad_logits)]
        else:
            self._grad_logits = grad_logits
            self._multiply(last=False)

    def _multiply(self, last: bool) -> None:
        """The products with all gathered rows. The buffer is empty afterwards."""
        if self._grad_logits is None:
            return
        head, needs, grad_logits = self.head, self.needs, self._grad_logits
        write, hidden, lora_hidden, ids, lost = (
            None if values[0] is None else _joined(values, self.device) for values in zip(*self._parts, strict=True)
        )
        self._parts, self._grad_logits = [], None
        grad_lora_hidden = None
        if head.lora_a is not None and (needs.hidden or needs.lora_a):
            grad_lora_hidden = self._product(grad_logits, head.lora_b.t()).to(self.inner_dtype)
        if needs.hidden:  # in bfloat16, its rounding hides what a coarse product leaves out
            grad_hidden = self._product(grad_logits, head.weight, coarse=self.dtype == torch.bfloat16)
            if grad_lora_hidden is not None:
                matmul(grad_lora_hidden, head.lora_a.t(), grad_hidden, accumulate=True)
            write_rows(self._hidden, write, grad_hidden)
            del grad_hidden
        if needs.weight:
            self._add_to_weight(grad_logits, hidden, ids, lost, last)
        if needs.lora_a:
            self._lora_a = self._accumulated(self._lora_a, hidden.t(), grad_lora_hidden)
        if needs.lora_b:
            self._lora_b = self._accumulated(self._lora_b, lora_hidden.t(), grad_logits)
        if needs.bias:
            self._bias += grad_logits.sum(0, dtype=self.accumulator)
            if lost is not None:  # index_put_ adds in a fixed order on every device
                self._bias.index_put_((ids,), lost, accumulate=True)

    def _add_to_weight(
        self, grad_logits: Tensor, hidden: Tensor, ids: Tensor | None, lost: Tensor | None, last: bool
    ) -> None:
        """dW += dz^T h, and the rounding errors of the 16-bit dz in the tokens' entries. These are most of the total
        error, because the other entries are many, small and of both signs."""
        only = last and self._weight is None
        if only and has_rounded_sums(grad_logits, hidden, self.weight_dtype):
            vocab, width = self.head.weight.shape
            self._weight = torch.zeros(vocab, width, dtype=self.weight_dtype, device=self.device)
            if lost is not None:  # small beside the sums, so that their own rounding is no error of the result
                place_rows(self._weight, ids.reshape(-1), lost.reshape(-1), _repeated(hidden, ids))
            add_rounded(grad_logits.t(), hidden, self._weight)
            return
        self._weight = self._accumulated(self._weight, grad_logits.t(), hidden)
        if lost is not None:
            for column, factors in zip(_columns(ids), _columns(lost), strict=True):
                add_rows(self._weight, column, factors, hidden)

    def _product(self, a: Tensor, b: Tensor, **how: bool) -> Tensor:
        out = _library.empty(a.shape[0], b.shape[1], dtype=self.accumulator, device=self.device)
        return matmul(a, b, out, **how)

    def _accumulated(self, total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        if total is None:
            return self._product(a, b)
        return matmul(a, b, total, accumulate=True)

    def results(self) -> tuple[Tensor, ...]:
        """The gradients of (hidden, weight, bias, lora_a, lora_b). That of hidden is (padded, H); the others
        are sums over tokens in float32, or the weight's in `weight_dtype`. A gradient that is not needed is (0,)."""
        self._multiply(last=True)
        self._buffer = None
        head, needs = self.head, self.needs

        def total(wanted: bool, value: Tensor | None, like: Tensor | None) -> Tensor:
            if not wanted:
                return torch.empty(0, dtype=torch.float32, device=self.device)
            return torch.zeros(like.shape, dtype=self.accumulator, device=self.device) if value is None else value

        return (
            total(needs.hidden, self._hidden, self._hidden),
            total(needs.weight, self._weight, head.weight),
            total(needs.bias, self._bias, head.bias),
            total(needs.lora_a, self._lora_a, head.lora_a),
            total(needs.lora_b, self._lora_b, head.lora_b),
        )


def _columns(values: Tensor) -> list[Tensor]:
    """The columns of (n, D), or (n,) itself."""
    return [values] if values.dim() == 1 else [column.contiguous() for column in values.unbind(1)]


def _repeated(rows: Tensor, ids: Tensor) -> Tensor:
    """The rows (n, H) as often as each has ids (n,) or (n, D)."""
    return rows if ids.dim() == 1 else rows.repeat_interleave(ids.shape[1], 0)


def empty_rows(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for (rows, V). On a GPU each row starts at a multiple of 16 entries, so that wide loads work."""
    width = vocab if device.type == "cpu" else -(-vocab // 16) * 16
    return _library.empty(rows, width, dtype=dtype, device=device)[:, :vocab]


def _joined(parts: tuple[Tensor | slice, ...], device: torch.device) -> Tensor | slice:
    """The parts one after the other: a slice if they are adjacent slices."""
    if len(parts) == 1:
        return parts[0]
    slices = all(isinstance(part, slice) for part in parts)
    if slices and all(a.stop == b.start for a, b in itertools.pairwise(parts)):
        return slice(parts[0].start, parts[-1].stop)
    return torch.cat([
        torch.arange(part.start, part.stop, device=device) if isinstance(part, slice) else part for part in parts
    ])

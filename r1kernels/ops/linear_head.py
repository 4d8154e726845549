r"""The language-model head in row chunks: logits of a few rows at a time, used and overwritten in place.

    x = h W^T + h A B + b,  u = scale x,  v = cap tanh(u / cap) (or u),  z = v / T

Every loss from hidden states is the same walk over chunks: product -> statistics -> two scalars per token ->
d logits in place -> products with W and h. The logits of one chunk are the only buffer of vocabulary width, and the
later products leave out rows without a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from r1kernels import _library
from r1kernels.ops import token_stats
from r1kernels.ops._checks import accumulator_dtype, values_are_free
from r1kernels.ops.gemm import add_rows, matmul
from r1kernels.ops.linear_rows import Rows, Selection, write_rows


class Budget(NamedTuple):
    """The default size of a chunk: at most this many rows and this much memory."""

    rows: int
    chunk_bytes: int


# Every chunk reads and writes the float32 gradient of the weight. On a CPU this takes about 45 / rows of the time of
# the products, and larger chunks would only add page faults. On a GPU, products are faster in relation to memory, so
# chunks should be larger.
CPU_BUDGET, GPU_BUDGET = Budget(1024, 1 << 30), Budget(4096, 5 << 28)
# If the share of active rows is smaller than this, a GPU computes products of only these rows, in a second buffer.
COMPACTION_SHARE = 0.75
# Size of the copies of hidden states that a kernel without logits reads at a time.
BLOCK_BYTES = 64 << 20


class Head(NamedTuple):
    """Everything between hidden states and the scores of tokens, checked.

    Attributes:
        weight: (V, H), in the dtype of hidden, or one is float32 and the other has 16 bits. bias: (V,) or None.
        lora_a, lora_b: (H, R) and (R, V), or None.
        token_ids: (N,) int64. temperatures: (N,) float32 or None; they multiply `temperature`.
        softcap: 0 for none. logits_dtype: dtype of a chunk's logits: float32 (float64), or the dtype of hidden.
        rows: rows of a chunk. capacity: the largest number of active rows, -1 for no limit.
    """

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    token_ids: Tensor
    temperatures: Tensor | None
    temperature: float
    logit_scale: float
    softcap: float
    logits_dtype: torch.dtype
    rows: int
    capacity: int
    batch_invariant: bool

    @property
    def kernel_temperature(self) -> float:
        """Without a soft cap, z = x / (T / scale): the scale costs no pass over the logits."""
        return self.temperature if self.softcap > 0 else self.temperature / self.logit_scale

    @property
    def kernel_scale(self) -> float:
        """The scale by which the gradient must still be multiplied."""
        return self.logit_scale if self.softcap > 0 else 1.0


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool
    lora_a: bool
    lora_b: bool


def row_bytes(vocab: int, hidden: int, logits_dtype: torch.dtype) -> int:
    """The memory that one row of a chunk needs: its logits, and float32 and 16-bit copies of width H."""
    return vocab * logits_dtype.itemsize + 2 * hidden * accumulator_dtype(logits_dtype).itemsize


class Chunk(NamedTuple):
    rows: Tensor | slice  # rows of the flattened batch; with a capacity, padding is clamped to row N - 1
    write: Tensor | slice  # rows of the results; padding goes to row N
    valid: Tensor | None
    hidden: Tensor  # (n, H), zeros where not valid
    lora_hidden: Tensor | None  # (n, R): hidden A
    token_ids: Tensor
    temperatures: Tensor | None
    logits: Tensor  # (n, V) in the chunk buffer; (0, V) in `Walk.blocks`


class Walk:
    """One walk over the chunks of a selection, collecting gradients.

    Args:
        hidden: (..., H), any strides.
        needs: gradients to collect; None for statistics only.
    """

    def __init__(self, head: Head, hidden: Tensor, selection: Selection, needs: Needs | None = None) -> None:
        head = head._replace(
            weight=_adjacent(head.weight), lora_a=_adjacent(head.lora_a), lora_b=_adjacent(head.lora_b)
        )
        self.head, self.selection = head, selection
        self.needs = needs or Needs(False, False, False, False, False)
        self.count = head.token_ids.numel()
        self.source = Rows(hidden)
        self.total = self.count if selection.index is None else len(selection.index)
        self.device = hidden.device
        self.accumulator = accumulator_dtype(hidden.dtype)
        self.dtype = hidden.dtype
        # Of d logits. If hidden or weight is float32, d logits stay float32, too.
        self.grad_dtype = self.dtype if head.weight.dtype == self.dtype else self.accumulator
        vocab, width = head.weight.shape
        # Rows of padding write to one extra row, which is cut off at the end.
        self.padded = self.count + (selection.valid is not None)
        self._grad_hidden = (
            _library.empty(self.padded, width, dtype=self.dtype, device=self.device) if self.needs.hidden else None
        )
        if self._grad_hidden is not None and selection.index is not None:
            self._grad_hidden.zero_()  # for inactive rows
        self._grad_weight: Tensor | None = None
        self._grad_lora_a: Tensor | None = None
        self._grad_lora_b: Tensor | None = None
        self._grad_bias = hidden.new_zeros(vocab, dtype=self.accumulator) if self.needs.bias else None
        self._buffer: Tensor | None = None
        self._moved: Tensor | None = None
        self.on_gpu = _library.choose(hidden.device.type, hidden.dtype).implementation not in ("cpu", "reference")

    def per_token(self, dtype: torch.dtype) -> Tensor:
        """Zeros for one result per token. Chunks write at `Chunk.write`, and `trim` cuts off the padding."""
        return torch.zeros(self.padded, dtype=dtype, device=self.device)

    def trim(self, per_token: Tensor) -> Tensor:
        return per_token[: self.count]

    def chunks(self) -> Iterator[Chunk]:
        """The chunks with their logits, ready for statistics. Each chunk overwrites the previous one."""
        for part in self._parts(self.head.rows):
            if part.start == 0:
                self._buffer = self._empty_logits(part.stop, self.head.logits_dtype)
            chunk = self._chunk(part, self._buffer[: part.stop - part.start])
            self._logits(chunk)
            yield chunk

    def blocks(self) -> Iterator[Chunk]:
        """The rows for kernels that need no logits: all at once if they are a view, else copies block by block."""
        whole = self.selection.index is None and self.source.is_view
        rows = self.total if whole else BLOCK_BYTES // (self.head.weight.shape[1] * self.dtype.itemsize)
        no_logits = torch.empty(0, self.head.weight.shape[0], dtype=self.head.logits_dtype, device=self.device)
        return (self._chunk(part, no_logits) for part in self._parts(max(rows, 1)))

    def _parts(self, rows: int) -> Iterator[slice]:
        """The active rows in equal parts of at most `rows` rows."""
        if self.total == 0:
            return
        rows = math.ceil(self.total / math.ceil(self.total / rows))
        for begin in range(0, self.total, rows):
            yield slice(begin, min(begin + rows, self.total))

    def _chunk(self, part: slice, logits: Tensor) -> Chunk:
        index, valid = self.selection
        rows: Tensor | slice = part if index is None else index[part]
        write = rows
        if valid is not None:
            valid = valid[part]
            rows = rows.clamp(max=self.count - 1)
        head = self.head
        hidden = self.source.take(rows)
        token_ids = head.token_ids[rows]
        if valid is not None:  # the row read in place of padding may hold anything, and 0 * NaN is NaN
            hidden = torch.where(valid[:, None], hidden, 0)
            token_ids = torch.where(valid, token_ids, 0)
        lora_hidden = None
        if head.lora_a is not None:  # rounded to the dtype of hidden, as an adapter's own layer does
            lora_hidden = self._product(hidden, head.lora_a, batch_invariant=head.batch_invariant).to(self.dtype)
        temperatures = None if head.temperatures is None else head.temperatures[rows]
        return Chunk(rows, write, valid, hidden, lora_hidden, token_ids, temperatures, logits)

    def _logits(self, chunk: Chunk) -> None:
        head, logits = self.head, chunk.logits
        if logits.dtype == self.accumulator:
            matmul(chunk.hidden, head.weight.t(), logits, batch_invariant=head.batch_invariant)
            if chunk.lora_hidden is not None:
                matmul(chunk.lora_hidden, head.lora_b, logits, accumulate=True,
                       batch_invariant=head.batch_invariant)
        else:  # rounded after every step, as in an engine that keeps 16-bit logits
            torch.mm(chunk.hidden, head.weight.t(), out=logits)
            if chunk.lora_hidden is not None:
                logits += chunk.lora_hidden @ head.lora_b
        if head.bias is not None:
            logits += head.bias
        if head.softcap > 0:
            logits.mul_(head.logit_scale / head.softcap).tanh_().mul_(head.softcap)

    def _empty_logits(self, rows: int, dtype: torch.dtype) -> Tensor:
        """Memory for (rows, V). On a GPU each row starts at a multiple of 16 entries, so that wide loads work."""
        vocab = self.head.weight.shape[0]
        width = vocab if self.device.type == "cpu" else -(-vocab // 16) * 16
        return _library.empty(rows, width, dtype=dtype, device=self.device)[:, :vocab]

    def statistics(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """(log-prob, log-sum-exp float64, entropy float64), each (n,)."""
        return token_stats.statistics(
            chunk.logits, chunk.token_ids, chunk.valid, self.head.kernel_temperature, chunk.temperatures,
            exact=self.dtype.itemsize > 2 and self.head.weight.dtype.itemsize > 2,
        )

    def backward(
        self, chunk: Chunk, lse: Tensor, entropy: Tensor, g: Tensor, eta: Tensor | None, *, sparse: bool
    ) -> None:
        """Adds the gradients of a chunk, whose logits it overwrites. g = dL/dlogprob, eta = dL/dentropy, each (n,).

        `sparse`: some of them may be 0. Finding these rows is worth a synchronisation.
        """
        head = self.head
        if chunk.valid is not None:
            g = torch.where(chunk.valid, g, 0)
            eta = None if eta is None else torch.where(chunk.valid, eta, 0)
        rows = self._active_rows(g, eta, sparse)
        if head.kernel_scale != 1.0:
            g, eta = g * head.kernel_scale, None if eta is None else eta * head.kernel_scale
        exact = None
        if self.grad_dtype != self.accumulator and (self.needs.weight or self.needs.bias):
            exact = token_stats.target_gradient(
                chunk.logits, chunk.token_ids, lse, entropy, g, eta, head.kernel_temperature, chunk.temperatures,
                head.softcap,
            )
        grad_logits = token_stats.gradient_into(
            self.narrow(chunk.logits) if rows is None or not self.on_gpu else self._compact(len(rows)),
            chunk.logits,
            chunk.token_ids,
            lse,
            entropy,
            g,
            eta,
            temperature=head.kernel_temperature,
            temperatures=chunk.temperatures,
            softcap=head.softcap,
            rows=rows,
        )
        self.add_gradients(chunk, grad_logits, rows)
        if exact is not None:
            self._add_rounding(chunk, grad_logits, exact, rows)

    def _active_rows(self, g: Tensor, eta: Tensor | None, sparse: bool) -> Tensor | None:
        """Rows of a chunk that have a gradient, or None to take them all."""
        free = values_are_free(g)
        if not free and (not sparse or self.head.capacity >= 0 or torch.compiler.is_compiling()):
            return None
        active = g != 0 if eta is None else (g != 0) | (eta != 0)
        rows = active.nonzero().squeeze(-1)
        most = COMPACTION_SHARE * len(g) if self.on_gpu else len(g) - 1
        return rows if len(rows) <= most else None

    def _compact(self, count: int) -> Tensor:
        """Memory for d logits of fewer rows than the chunk has. Programs of a GPU run in any order: if one moved a row
        up in place, it could overwrite a row that another program has not read yet."""
        if self._moved is None or len(self._moved) < count:
            self._moved = None
            self._moved = self._empty_logits(count, self.grad_dtype)
        return self._moved[:count]

    def _add_rounding(self, chunk: Chunk, grad_logits: Tensor, exact: Tensor, rows: Tensor | None) -> None:
        """Adds to the sums over tokens the rounding errors of the 16-bit d logits in the targets' entries. They are
        most of the total error, because the other entries are many, small and of both signs."""
        hidden, ids = chunk.hidden, chunk.token_ids
        if rows is not None:
            hidden, ids, exact = hidden[rows], ids[rows], exact[rows]
        if len(ids) == 0:
            return
        lost = (exact - grad_logits.gather(-1, ids[:, None]).squeeze(-1)).to(self.accumulator)
        if self.needs.weight:
            add_rows(self._grad_weight, ids, lost, hidden)
        if self.needs.bias:  # index_put_ adds in a fixed order on every device
            self._grad_bias.index_put_((ids,), lost, accumulate=True)

    def narrow(self, logits: Tensor) -> Tensor:
        """Memory for d logits (n, V). Each row starts where the memory of its row of logits starts."""
        return logits if logits.dtype == self.grad_dtype else logits.view(self.grad_dtype)[:, : logits.shape[1]]

    def add_gradients(self, chunk: Chunk, grad_logits: Tensor, rows: Tensor | None) -> None:
        """The products with d logits (R, V): `rows` (R,) of the chunk, or all of it."""
        head, needs = self.head, self.needs
        hidden, lora_hidden = chunk.hidden, chunk.lora_hidden
        if rows is not None:
            hidden = hidden[rows] if needs.weight or needs.lora_a else hidden
            lora_hidden = lora_hidden[rows] if needs.lora_b else lora_hidden
        grad_lora_hidden = None
        if lora_hidden is not None and (needs.hidden or needs.lora_a):
            grad_lora_hidden = self._product(grad_logits, head.lora_b.t()).to(self.dtype)
        if needs.hidden:  # in bfloat16, its rounding hides what a coarse product leaves out
            grad_hidden = self._product(grad_logits, head.weight, coarse=self.dtype == torch.bfloat16)
            if grad_lora_hidden is not None:
                matmul(grad_lora_hidden, head.lora_a.t(), grad_hidden, accumulate=True)
            write_rows(self._grad_hidden, chunk.write, rows, grad_hidden)
        if len(grad_logits) == 0:
            return
        if needs.weight:
            self._grad_weight = self._accumulated(self._grad_weight, grad_logits.t(), hidden)
        if needs.lora_a:
            self._grad_lora_a = self._accumulated(self._grad_lora_a, hidden.t(), grad_lora_hidden)
        if needs.lora_b:
            self._grad_lora_b = self._accumulated(self._grad_lora_b, lora_hidden.t(), grad_logits)
        if needs.bias:
            self._grad_bias += grad_logits.sum(0, dtype=self.accumulator)

    def _product(self, a: Tensor, b: Tensor, **how: bool) -> Tensor:
        out = _library.empty(a.shape[0], b.shape[1], dtype=self.accumulator, device=self.device)
        return matmul(a, b, out, **how)

    def _accumulated(self, total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        if total is None:
            return self._product(a, b)
        return matmul(a, b, total, accumulate=True)

    def gradients(self) -> tuple[Tensor, ...]:
        """The gradients of (hidden, weight, bias, lora_a, lora_b). That of hidden (N, H) has its dtype; the others are
        sums over tokens in float32. A gradient that is not needed is (0,)."""
        head, needs = self.head, self.needs

        def total(wanted: bool, value: Tensor | None, like: Tensor | None) -> Tensor:
            if not wanted:
                return torch.empty(0, device=self.device)
            return torch.zeros(like.shape, dtype=self.accumulator, device=self.device) if value is None else value

        return (
            self.trim(self._grad_hidden) if needs.hidden else torch.empty(0, device=self.device),
            total(needs.weight, self._grad_weight, head.weight),
            total(needs.bias, self._grad_bias, head.bias),
            total(needs.lora_a, self._grad_lora_a, head.lora_a),
            total(needs.lora_b, self._grad_lora_b, head.lora_b),
        )


def _adjacent(matrix: Tensor | None) -> Tensor | None:
    """The matrix, or a copy if neither its rows nor its columns are contiguous: products need one of the two."""
    return matrix if matrix is None or 1 in matrix.stride() else matrix.contiguous()

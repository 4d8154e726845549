r"""The language-model head in row chunks: logits of a few rows at a time, used and overwritten in place.

    x = h W^T + h A B + b,  u = scale x,  v = cap tanh(u / cap) (or u),  z = v / T

Every loss from hidden states is the same walk over chunks: product -> statistics -> two scalars per token ->
d logits -> products with W and h. The logits of one chunk are the only buffer of vocabulary width on a CPU, and the
later products leave out rows without a gradient. On a GPU, d logits have a second buffer, which takes those of several
chunks (`r1kernels.ops.linear.sums`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from r1kernels.ops import token_stats
from r1kernels.ops._checks import accumulator_dtype, values_are_free
from r1kernels.ops.linear.budget import runs_on_gpu
from r1kernels.ops.linear.gemm import matmul
from r1kernels.ops.linear.gradients import rounded
from r1kernels.ops.linear.head import Chunk, Head, Needs
from r1kernels.ops.linear.rows import Rows
from r1kernels.ops.linear.sums import GradientSums, empty_rows
from r1kernels.ops.row_statistics import Slopes, entries_of, row_statistics, selected_of
from r1kernels.ops.shards import Shard, correct_substitutes
from r1kernels.ops.support import Support, fill_outside
from r1kernels.ops.target_terms import TargetSlopes

# Size of the copies of hidden states that a kernel without logits reads at a time.
BLOCK_BYTES = 64 << 20


class Walk:
    """One walk over the chunks of some rows, collecting gradients.

    Args:
        needs: gradients to collect; None for statistics only.
        weight_dtype: see `GradientSums`.
        shard: the weight has only this rank's rows of a vocabulary, and the head has the ids of the shard.
        support: the ids of each token that count. The other logits become -inf.
    """

    head: Head
    rows: Rows
    shard: Shard | None
    support: Support | None
    device: torch.device
    dtype: torch.dtype
    sums: GradientSums

    def __init__(
        self, head: Head, rows: Rows, needs: Needs | None = None, weight_dtype: torch.dtype | None = None,
        shard: Shard | None = None, support: Support | None = None,
    ) -> None:
        head = _adjacent(head)
        self.head, self.rows, self.shard, self.support = head, rows, shard, support
        self.needs: Needs = needs or Needs(False, False, False, False, False)
        self.device, self.dtype = rows.hidden.device, rows.hidden.dtype
        self.accumulator: torch.dtype = accumulator_dtype(self.dtype)
        # With a shard, the gradient of hidden is rounded after the sum over ranks.
        self.sums = GradientSums(head, self.needs, rows, weight_dtype, None if shard is None else self.accumulator)
        self._buffer: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Whether this rank has no row of a sharded vocabulary."""
        return self.head.weight.shape[0] == 0

    def per_token(self, dtype: torch.dtype, *several: int) -> Tensor:
        """Zeros for one result per token, or (several, tokens). Chunks write at `Chunk.write`, and `trim` cuts off the
        padding."""
        return torch.zeros(*several, self.rows.padded, dtype=dtype, device=self.device)

    def trim(self, per_token: Tensor) -> Tensor:
        return per_token[..., : self.rows.total].contiguous()

    def chunks(self) -> Iterator[Chunk]:
        """The chunks with their logits, ready for statistics. Each chunk overwrites the previous one."""
        for part in self._parts(self.head.rows):
            if part.start == 0:
                self._buffer = empty_rows(
                    part.stop, self.head.weight.shape[0], self.head.logits_dtype, self.device
                )
            chunk = self._chunk(part, self._buffer[: part.stop - part.start])
            self._logits(chunk)
            yield chunk

    def blocks(self) -> Iterator[Chunk]:
        """The rows for kernels that need no logits: all at once if they are a view, else copies block by block."""
        row_bytes = self.head.weight.shape[1] * self.dtype.itemsize
        rows = self.rows.count if self.rows.are_a_view else BLOCK_BYTES // row_bytes
        no_logits = torch.empty(0, self.head.weight.shape[0], dtype=self.head.logits_dtype, device=self.device)
        return (self._chunk(part, no_logits) for part in self._parts(max(rows, 1)))

    def _parts(self, rows: int) -> Iterator[slice]:
        """The active rows in equal parts of at most `rows` rows."""
        count = self.rows.count
        if count == 0:
            return
        rows = math.ceil(count / math.ceil(count / rows))
        for begin in range(0, count, rows):
            yield slice(begin, min(begin + rows, count))

    def _chunk(self, part: slice, logits: Tensor) -> Chunk:
        index, valid = self.rows.index, self.rows.valid
        rows: Tensor | slice = part if index is None else index[part]
        write = rows
        if valid is not None:
            valid = valid[part]
            rows = rows.clamp(max=self.rows.total - 1)
        head = self.head
        hidden = self.rows.take(rows)
        token_ids = head.token_ids[rows]
        if valid is not None:  # the row read in place of padding may hold anything, and 0 * NaN is NaN
            hidden = torch.where(valid[:, None], hidden, 0)
            token_ids = torch.where(valid, token_ids, 0)
        lora_hidden = None
        if head.lora_a is not None:  # rounded to the dtype of hidden, as an adapter's own layer does
            lora_hidden = hidden.new_empty(len(hidden), head.lora_a.shape[1], dtype=self.accumulator)
            matmul(hidden, head.lora_a, lora_hidden, batch_invariant=head.batch_invariant)
            lora_hidden = lora_hidden.to(self.dtype)
        temperatures = None if head.temperatures is None else head.temperatures[rows]
        owned = None if self.shard is None else self.shard.owned[rows]
        return Chunk(rows, write, valid, hidden, lora_hidden, token_ids, temperatures, logits, owned)

    def _logits(self, chunk: Chunk) -> None:
        head, logits = self.head, chunk.logits
        if self.is_empty:
            return
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
        if self.support is not None:
            fill_outside(logits, self.support, chunk.write, -torch.inf)

    def statistics(self, chunk: Chunk, wanted: int | None = None) -> tuple[Tensor, ...]:
        """(log-prob, log-sum-exp float64, entropy float64), each (n,), over the rows of the weight. If anything is
        `wanted`, also more (4, n): `RowStatistics`."""
        if self.is_empty:
            zeros = torch.zeros(len(chunk.token_ids), dtype=torch.float64, device=self.device)
            nothing = torch.full_like(zeros, -torch.inf)
            more = () if wanted is None else (torch.stack([zeros, zeros, nothing, zeros]),)
            return zeros, nothing, zeros, *more
        given = (chunk.logits, chunk.token_ids, chunk.valid, self.head.kernel_temperature, chunk.temperatures)
        exact = self.dtype.itemsize > 2 and self.head.weight.dtype.itemsize > 2
        if wanted is None:
            logprobs, *others = token_stats.statistics(*given, exact=exact)
        else:
            logprobs, *others = row_statistics(*given, wanted, exact)
        if self.shard is not None:
            logprobs = token_stats.unrounded(
                logprobs, others[0], chunk.logits, chunk.token_ids, self.head.kernel_temperature, chunk.temperatures
            )
        return logprobs, *others

    def selected(self, chunk: Chunk, ids: Tensor, owned: Tensor | None, lse: Tensor) -> Tensor:
        """Log-probs (n, K) of ids; with a shard, the owned z, and 0 for others."""
        if self.is_empty:
            return torch.zeros(ids.shape, dtype=torch.float64, device=self.device)
        return selected_of(chunk.logits, ids, lse, self.head.kernel_temperature, chunk.temperatures, owned)

    @property
    def vocab(self) -> int:
        """V, over all shards."""
        return self.head.weight.shape[0] if self.shard is None else self.shard.layout.vocab

    def mean_logit(self, of_rows: Tensor) -> Tensor:
        """The mean of z over the vocabulary (n,), from the mean over the rows of the weight."""
        if self.shard is not None:
            of_rows = of_rows * (self.head.weight.shape[0] / self.vocab)
            self.shard.add_up(of_rows)
        return of_rows

    def targets_backward(self, chunk: Chunk, lse: Tensor, slopes: TargetSlopes) -> None:
        """`backward` for losses of several targets, or with other terms. Their entries are written after the others."""
        slopes = slopes if chunk.owned is None else slopes.owned_by(chunk.owned)
        slopes = slopes if chunk.valid is None else slopes.where(chunk.valid)
        slopes = slopes if self.head.kernel_scale == 1.0 else slopes.scaled(self.head.kernel_scale)
        if self.is_empty:
            self.sums.leave_out(chunk)
            return
        entries = slopes.entries(
            chunk.logits, lse, self.head.kernel_temperature, chunk.temperatures, self.head.softcap
        )
        rows = self._active_rows((slopes.active,), False)
        grad_logits = self._gradient(chunk, rows, lse, lse, slopes.g, None, shift=slopes.shift)  # without an entropy
        if grad_logits is None:
            return
        entries.of(rows).write(grad_logits)
        self.sums.add(chunk, grad_logits, rows, entries.values if self._loses_digits else None, slopes.ids)

    def backward(
        self, chunk: Chunk, lse: Tensor, entropy: Tensor, g: Tensor, eta: Tensor | None, *, sparse: bool
    ) -> None:
        """Adds the gradients of a chunk. Its logits are not needed afterwards. g = dL/dlogprob, eta = dL/dentropy,
        each (n,).

        `sparse`: some of them may be 0. Finding these rows is worth a synchronisation.
        """
        head, sums = self.head, self.sums
        if chunk.valid is not None:
            g = torch.where(chunk.valid, g, 0)
            eta = None if eta is None else torch.where(chunk.valid, eta, 0)
        if head.kernel_scale != 1.0:
            g, eta = g * head.kernel_scale, None if eta is None else eta * head.kernel_scale
        if self.is_empty:
            sums.leave_out(chunk)
            return
        exact = None
        if self._loses_digits or chunk.owned is not None:
            exact = token_stats.target_gradient(
                chunk.logits, chunk.token_ids, lse, entropy, g, eta, head.kernel_temperature, chunk.temperatures,
                head.softcap, chunk.owned,
            )
        rows = self._active_rows((g, eta), sparse)  # last, because the device waits after a synchronisation
        grad_logits = self._gradient(chunk, rows, lse, entropy, g, eta)
        if grad_logits is None:
            return
        if chunk.owned is not None:
            taken = slice(None) if rows is None else rows
            correct_substitutes(grad_logits, chunk.token_ids[taken], chunk.owned[taken], exact[taken])
        sums.add(chunk, grad_logits, rows, exact if self._loses_digits else None, chunk.token_ids)

    def backward_of_statistics(
        self, chunk: Chunk, lse: Tensor, entropy: Tensor, sum_sq: Tensor | None, slopes: Slopes,
        selected_ids: Tensor | None, selected_owned: Tensor | None,
    ) -> None:
        """`backward` for all statistics that have a derivative."""
        head, sums = self.head, self.sums
        if chunk.valid is not None:
            slopes = slopes.map(lambda slope: torch.where(
                chunk.valid if slope.dim() == 1 else chunk.valid[:, None], slope, 0
            ))
        if head.kernel_scale != 1.0:
            slopes = slopes.map(lambda slope: slope * head.kernel_scale)
        if self.is_empty:
            sums.leave_out(chunk)
            return
        corrects = chunk.owned is not None or not slopes.is_of_tokens
        entries = None
        if self._loses_digits or corrects:
            entries = entries_of(
                chunk.logits, chunk.token_ids, chunk.owned, selected_ids, selected_owned, (lse, entropy, sum_sq),
                slopes, head.kernel_temperature, chunk.temperatures, head.softcap,
            )
        rows = self._active_rows(slopes, False)
        squares = None if slopes.sum_sq_probs is None else (sum_sq, slopes.sum_sq_probs)
        grad_logits = self._gradient(chunk, rows, lse, entropy, slopes.total, slopes.entropy, squares)
        if grad_logits is None:
            return
        if corrects:
            entries.of(rows).write(grad_logits)
        sums.add(chunk, grad_logits, rows, entries.values[:, 0] if self._loses_digits else None, chunk.token_ids)

    @property
    def _loses_digits(self) -> bool:
        """Whether d logits are rounded, and a product sums them."""
        return self.sums.grad_dtype != self.accumulator and (self.needs.weight or self.needs.bias)

    def _gradient(
        self, chunk: Chunk, rows: Tensor | None, lse: Tensor, entropy: Tensor, g: Tensor, eta: Tensor | None,
        squares: tuple[Tensor, Tensor] | None = None, shift: Tensor | None = None,
    ) -> Tensor | None:
        """d logits of the rows of a chunk, or None if there are none."""
        count = len(g) if rows is None else len(rows)
        if count == 0:
            self.sums.leave_out(chunk)
            return None
        grad_logits = token_stats.gradient_into(
            self.sums.memory(chunk.logits, count),
            chunk.logits,
            chunk.token_ids,
            lse,
            entropy,
            g,
            eta,
            temperature=self.head.kernel_temperature,
            temperatures=chunk.temperatures,
            softcap=self.head.softcap,
            rows=rows,
            squares=squares,
            shift=shift,
        )
        if self.support is not None:  # NaN where the set has one, or where the slope of the soft cap at -inf is -inf
            write = chunk.write
            if rows is not None:
                write = write[rows] if isinstance(write, Tensor) else rows + write.start
            fill_outside(grad_logits, self.support, write, 0.0)
        return grad_logits

    def _active_rows(self, slopes: Iterable[Tensor | None], sparse: bool) -> Tensor | None:
        """Rows of a chunk that have a gradient, or None to take them all."""
        if not self.sums.gathers and runs_on_gpu(self.device.type, self.dtype):  # they cannot be moved up in place
            return None
        given = [slope for slope in slopes if slope is not None]
        free = values_are_free(given[0])
        if not free and (not sparse or self.head.capacity >= 0 or torch.compiler.is_compiling()):
            return None
        rows = token_stats.any_nonzero(*given).nonzero().squeeze(-1)
        return rows if len(rows) < len(given[0]) else None

    def gradients(self) -> tuple[Tensor, ...]:
        """`GradientSums.results`, with the gradient of hidden (N, H) in its dtype. With a shard, those of hidden and
        lora_a are sums over all ranks, and the others belong to this rank's rows."""
        grad_hidden, grad_weight, grad_bias, grad_lora_a, grad_lora_b = self.sums.results()
        grad_hidden = grad_hidden[: self.rows.total]
        if self.shard is not None:
            if self.needs.hidden:
                self.shard.add_up(grad_hidden)
                grad_hidden = rounded(grad_hidden, self.dtype)
            if self.needs.lora_a:
                self.shard.add_up(grad_lora_a)
        return grad_hidden, grad_weight, grad_bias, grad_lora_a, grad_lora_b


def _adjacent(head: Head) -> Head:
    """The head with copies of matrices of which neither rows nor columns are contiguous: products need one of them."""
    matrices = {"weight": head.weight, "lora_a": head.lora_a, "lora_b": head.lora_b}
    copies = {
        name: value.contiguous() for name, value in matrices.items() if value is not None and 1 not in value.stride()
    }
    return head._replace(**copies) if copies else head

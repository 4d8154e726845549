r"""The language-model head in row chunks: logits of a few rows at a time, used and overwritten in place.

    x = h W^T + h A B + b,  u = scale x,  v = cap tanh(u / cap) (or u),  z = v / T

Every loss from hidden states is the same walk over chunks: product -> statistics -> two scalars per token ->
d logits -> products with W and h. The logits of one chunk are the only buffer of vocabulary width on a CPU, and the
later products leave out rows without a gradient. On a GPU, d logits have a second buffer, which takes those of several
chunks (`r1kernels.ops.linear.sums`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

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
from r1kernels.ops.shards import Shard, correct_substitutes
from r1kernels.ops.support import Support, fill_outside

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

    def __init__(
        self, head: Head, rows: Rows, needs: Needs | None = None, weight_dtype: torch.dtype | None = None,
        shard: Shard | None = None, support: Support | None = None,
    ) -> None:
        head = _adjacent(head)
        self.head, self.rows, self.shard, self.support = head, rows, shard, support
        self.needs = needs or Needs(False, False, False, False, False)
        self.device, self.dtype = rows.hidden.device, rows.hidden.dtype
        self.accumulator = accumulator_dtype(self.dtype)
        # With a shard, the gradient of hidden is rounded after the sum over ranks.
        self.sums = GradientSums(head, self.needs, rows, weight_dtype, None if shard is None else self.accumulator)
        self._buffer: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Whether this rank has no row of a sharded vocabulary."""
        return self.head.weight.shape[0] == 0

    def per_token(self, dtype: torch.dtype) -> Tensor:
        """Zeros for one result per token. Chunks write at `Chunk.write`, and `trim` cuts off the padding."""
        return torch.zeros(self.rows.padded, dtype=dtype, device=self.device)

    def trim(self, per_token: Tensor) -> Tensor:
        return per_token[: self.rows.total]

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

    def statistics(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """(log-prob, log-sum-exp float64, entropy float64), each (n,), over the rows of the weight."""
        if self.is_empty:
            zeros = torch.zeros(len(chunk.token_ids), dtype=torch.float64, device=self.device)
            return zeros, torch.full_like(zeros, -torch.inf), zeros
        logprobs, lse, entropy = token_stats.statistics(
            chunk.logits, chunk.token_ids, chunk.valid, self.head.kernel_temperature, chunk.temperatures,
            exact=self.dtype.itemsize > 2 and self.head.weight.dtype.itemsize > 2,
        )
        if self.shard is not None:
            logprobs = token_stats.unrounded(
                logprobs, lse, chunk.logits, chunk.token_ids, self.head.kernel_temperature, chunk.temperatures
            )
        return logprobs, lse, entropy

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
        loses_digits = sums.grad_dtype != self.accumulator and (self.needs.weight or self.needs.bias)
        if loses_digits or chunk.owned is not None:
            exact = token_stats.target_gradient(
                chunk.logits, chunk.token_ids, lse, entropy, g, eta, head.kernel_temperature, chunk.temperatures,
                head.softcap, chunk.owned,
            )
        rows = self._active_rows(g, eta, sparse)  # last, because the device waits after a synchronisation
        count = len(g) if rows is None else len(rows)
        if count == 0:
            sums.leave_out(chunk)
            return
        grad_logits = token_stats.gradient_into(
            sums.memory(chunk.logits, count),
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
        if chunk.owned is not None:
            taken = slice(None) if rows is None else rows
            correct_substitutes(grad_logits, chunk.token_ids[taken], chunk.owned[taken], exact[taken])
        if self.support is not None and head.softcap > 0:  # where the slope of the soft cap at -inf is -inf
            write = chunk.write
            if rows is not None:
                write = write[rows] if isinstance(write, Tensor) else rows + write.start
            fill_outside(grad_logits, self.support, write, 0.0)
        sums.add(chunk, grad_logits, rows, exact if loses_digits else None)

    def _active_rows(self, g: Tensor, eta: Tensor | None, sparse: bool) -> Tensor | None:
        """Rows of a chunk that have a gradient, or None to take them all."""
        if not self.sums.gathers and runs_on_gpu(self.device.type, self.dtype):  # they cannot be moved up in place
            return None
        free = values_are_free(g)
        if not free and (not sparse or self.head.capacity >= 0 or torch.compiler.is_compiling()):
            return None
        active = g != 0 if eta is None else (g != 0) | (eta != 0)
        rows = active.nonzero().squeeze(-1)
        return rows if len(rows) < len(g) else None

    def gradients(self) -> tuple[Tensor, ...]:
        """`GradientSums.results`, with the gradient of hidden (N, H) in its dtype. With a shard, those of hidden and
        lora_a are sums over all ranks, and the others belong to this rank's rows."""
        grad_hidden, grad_weight, grad_bias, grad_lora_a, grad_lora_b = self.sums.results()
        grad_hidden = self.trim(grad_hidden)
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

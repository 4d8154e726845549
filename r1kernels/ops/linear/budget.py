"""How many rows the buffers of a head hold: logits of one chunk, and d logits of several chunks."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch

from r1kernels import _dispatch
from r1kernels.ops._checks import accumulator_dtype


class Budget(NamedTuple):
    """The default size of the buffers: at most this many rows in each, and this much memory together."""

    rows: int
    chunk_bytes: int


class BufferRows(NamedTuple):
    """Rows of logits in a chunk, and of d logits in the gradient buffer (0: they replace the logits of their chunk)."""

    logits: int
    gradient: int


# Every product of the weight's gradient reads and writes its float32 sum. On a CPU this takes about 45 / rows of the
# time of the products, and larger chunks would only add page faults. On a GPU, products are faster in relation to
# memory. There, d logits of several chunks are gathered, and their products have up to 4,096 rows.
CPU_BUDGET, GPU_BUDGET = Budget(1024, 1 << 30), Budget(4096, 31 << 26)
# With a small budget, the gradient buffer has this many times the rows of a chunk.
GRADIENT_CHUNKS = 4


def row_bytes(vocab: int, hidden: int, dtype: torch.dtype) -> int:
    """The memory for one row of logits, or of d logits: V entries, and float32 and 16-bit copies of width H."""
    return vocab * dtype.itemsize + 2 * hidden * accumulator_dtype(dtype).itemsize


def runs_on_gpu(device_type: str, dtype: torch.dtype) -> bool:
    """Whether kernels of a GPU compute d logits. Their programs run in any order, so they cannot move rows up in the
    memory of the logits: a row could be overwritten before it is read."""
    return _dispatch.choose("kernels", device_type, dtype).implementation not in ("cpu", "reference")


def gathers(device_type: str, dtype: torch.dtype) -> bool:
    """Whether d logits of several chunks are multiplied together: on every device except a CPU."""
    return device_type != "cpu" or runs_on_gpu(device_type, dtype)


def rows_of_budget(chunk_bytes: int, logits_bytes: int, gradient_bytes: int, most: int | None = None) -> BufferRows:
    """The rows for which `chunk_bytes` suffice.

    Args:
        logits_bytes, gradient_bytes: memory for a row of logits and of the gradient buffer; 0 for no such buffer.
        most: the largest number of rows in a buffer.
    """

    def bounded(rows: int) -> int:
        return rows if most is None else min(rows, most)

    fewest = max(1, chunk_bytes // logits_bytes)
    if gradient_bytes == 0:
        return BufferRows(bounded(fewest), 0)
    rows = max(1, chunk_bytes // (logits_bytes + GRADIENT_CHUNKS * gradient_bytes))
    gradient = bounded((chunk_bytes - rows * logits_bytes) // gradient_bytes)
    rows = bounded((chunk_bytes - gradient * gradient_bytes) // logits_bytes)
    if gradient < max(rows, 1):  # the budget is about one row
        return BufferRows(bounded(fewest), 0)
    return BufferRows(rows, gradient)


def buffer_rows(budget: Any, vocab: int, each: int, gradient: int, gathered: bool) -> BufferRows:
    """Rows of the buffers for the keyword `chunk_bytes`; they need `each` and `gradient` bytes a row."""
    gradient = gradient if gathered else 0
    if budget is None:
        default = GPU_BUDGET if gathered else CPU_BUDGET
        return rows_of_budget(default.chunk_bytes, each, gradient, default.rows)
    if isinstance(budget, bool) or not hasattr(budget, "__index__"):
        raise TypeError(f"chunk_bytes is {budget!r}, expected an integer")
    budget = operator.index(budget)
    if budget < each:
        raise ValueError(f"chunk_bytes is {budget}, expected at least {each}: one row of a vocabulary of {vocab}")
    return rows_of_budget(budget, each, gradient)


def linear_loss_bytes(
    tokens: int, vocab: int, hidden: int, dtype: torch.dtype, *, device: str = "cpu", chunk_bytes: int | None = None,
    weight_gradient: bool = True, sharded: bool = False,
) -> int:
    r"""Memory that a `linear_*` loss with one head needs for its forward and backward, beside its arguments.

        bytes = buffers (chunk_bytes) + 4 V H and V H of the weight's dtype + N H of the gradient of hidden + 64 N

    Args:
        tokens: N >= 0, the tokens of a call.
        vocab: V >= 1, the rows of the weight, or of this rank's shard.
        hidden: H >= 1, the width of hidden states.
        dtype: of hidden and weight.
        device: type of the device, such as "cuda". A GPU gathers d logits of several chunks.
        chunk_bytes: the keyword of `LinearOptions`.
        weight_gradient: whether the weight is trained.
        sharded: whether the vocabulary is sharded over a process group. Then the gradient of hidden is a float32 sum.

    Returns:
        int, bytes, of a call that computes the gradients of hidden and, if it is trained, of the weight.

    Raises:
        TypeError, ValueError: for a `chunk_bytes` that the losses refuse.

    Memory: none.

    Equivalent to: the peak of memory during a loss and its backward, minus the memory before.
    Source: `buffer_rows`, which the losses use.
    """
    full = accumulator_dtype(dtype)
    each, gradient = row_bytes(vocab, hidden, full), row_bytes(vocab, hidden, dtype)
    rows = buffer_rows(chunk_bytes, vocab, each, gradient, gathers(device, dtype))
    buffers = min(tokens, rows.logits) * each + min(tokens, rows.gradient) * gradient
    weight = weight_gradient * vocab * hidden * (full.itemsize + (dtype.itemsize if dtype != full else 0))
    return buffers + weight + tokens * (hidden * (full if sharded else dtype).itemsize + 64)

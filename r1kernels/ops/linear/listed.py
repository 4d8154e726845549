r"""Logits of a head at a few ids of each row, without the product with the whole weight.

    x_nk = h_n W[id_nk] + (h_n A) B[:, id_nk] + b[id_nk],  u = scale x,  v = cap tanh(u / cap) (or u)

The cost is K rows of the weight for each row of hidden states: K H multiplications and, mostly, the memory that is
read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1kernels.ops._checks import accumulator_dtype
from r1kernels.ops.linear.gemm import matmul
from r1kernels.ops.linear.head import Head

GATHERED_BYTES = 4 << 20  # rows of the weight in the dtype of sums, copied at a time; they should fit in the caches


@torch.no_grad()
def logits_at(head: Head, hidden: Tensor, ids: Tensor) -> Tensor:
    """Logits (n, K) at ids (n, K), from hidden states (n, H), before the temperature; float32, or float64."""
    dtype = accumulator_dtype(hidden.dtype)
    logits = _products(hidden, head.weight, ids, dtype)
    if head.lora_a is not None:
        inner = hidden.new_empty(len(hidden), head.lora_a.shape[1], dtype=dtype)
        matmul(hidden, head.lora_a, inner, batch_invariant=head.batch_invariant)
        logits += _products(inner.to(hidden.dtype), head.lora_b.t(), ids, dtype)
    if head.bias is not None:
        logits += head.bias[ids]
    logits *= head.logit_scale
    return logits.div_(head.softcap).tanh_().mul_(head.softcap) if head.softcap > 0 else logits


def _products(hidden: Tensor, weight: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    count, k = ids.shape
    logits = torch.empty(count, k, dtype=dtype, device=hidden.device)
    step = max(1, GATHERED_BYTES // (k * hidden.shape[1] * dtype.itemsize))
    for begin in range(0, count, step):
        rows = slice(begin, begin + step)
        gathered = weight[ids[rows]].to(dtype)
        torch.matmul(gathered, hidden[rows].to(dtype).unsqueeze(-1), out=logits[rows].unsqueeze(-1))
    return logits

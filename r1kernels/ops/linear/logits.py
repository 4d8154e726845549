r"""Logits of a few rows from hidden states, for sampling.

    u = logit_scale (hidden W^T + bias),  v = u, or softcap tanh(u / softcap),  z = v / temperature
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1kernels.ops._checks import accumulator_dtype, check_floating
from r1kernels.ops.linear.dtensor import local_tensors
from r1kernels.ops.linear.gemm import matmul
from r1kernels.ops.linear.options import prepare
from r1kernels.ops.linear.precision import no_autocast


@torch.no_grad()
def linear_logits(
    hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, logit_scale: float = 1.0,
    softcap: float | None = None, temperature: float = 1.0,
) -> Tensor:
    r"""Logits as the losses compute them, so that tokens can be drawn from the distribution that is trained.

        u = logit_scale (hidden W^T + bias),  v = u, or softcap tanh(u / softcap),  z = v / temperature

    Args:
        hidden, weight: (..., H) and (V, H), as in `linear_token_logprobs`.
        bias, logit_scale, softcap, temperature: as in `LinearOptions`; the temperature is a number.

    Returns:
        (..., V), float32 (float64 for float64 hidden), without a gradient. Sums of 16-bit products are not rounded.

    Raises:
        TypeError, ValueError: naming the argument, its value and the expectation.

    Memory: the result. Use it for a few rows, because the losses need no logits.

    Equivalent to: `hidden.float() @ weight.float().T / temperature`
    """
    options = {"bias": bias, "logit_scale": logit_scale, "softcap": softcap, "temperature": temperature}
    hidden, weight, options = local_tensors(hidden, weight, options)
    check_floating("hidden", hidden)
    ids = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    call = prepare(hidden, weight, ids, options)
    head = call.head.with_tensors(*call.tensors[1:])
    weight, bias = head.weight, head.bias
    rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    weight = weight if 1 in weight.stride() else weight.contiguous()  # products need adjacent rows or columns
    logits = torch.empty(len(rows), len(weight), dtype=accumulator_dtype(hidden.dtype), device=hidden.device)
    with no_autocast(hidden):
        matmul(rows, weight.t(), logits)
        if bias is not None:
            logits += bias
        if head.softcap > 0:
            logits.mul_(head.logit_scale / head.softcap).tanh_().mul_(head.softcap)
        if head.kernel_temperature != 1:
            logits.div_(head.kernel_temperature)
    return logits.reshape(*hidden.shape[:-1], len(weight))

r"""Statistics of each token from its logits row, and the gradient with respect to that row.

With z = x / T, p = softmax z and token id y:

    lse = log sum_j e^{z_j},    l = z_y - lse,    H = -sum_j p_j log p_j
    dL/dx_j = (g (1[j = y] - p_j) - eta p_j (log p_j + H)) / T,    g = dL/dl,  eta = dL/dH

These two kernels are the only ones that touch the vocabulary axis; every loss is arithmetic on g and eta.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from r1kernels import _library
from r1kernels.ops._checks import (
    check_floating,
    check_ids_in_range,
    check_number,
    check_shape,
    ids_int64,
)


def reference(logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-prob, entropy) in plain differentiable PyTorch; fp32 arithmetic, or fp64 for fp64 logits."""
    check_ids_in_range("token_ids", token_ids, logits.shape[-1], mask)
    z = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32) / temperature
    if mask is not None:
        z = torch.where(mask.unsqueeze(-1), z, 0)
        token_ids = torch.where(mask, token_ids, 0)
    log_p = z.log_softmax(-1)
    logprobs = log_p.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    # 0 * (-inf) = 0, in the value and in the gradient.
    entropy = -(log_p.exp() * torch.where(log_p == -torch.inf, 0, log_p)).sum(-1)
    if mask is not None:
        logprobs, entropy = torch.where(mask, logprobs, 0), torch.where(mask, entropy, 0)
    return logprobs, entropy


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float
    ) -> tuple[Tensor, Tensor]:
        logprobs, lse, entropy = _library.call(
            torch.ops.r1kernels.token_stats.default, logits, token_ids, mask, temperature
        )
        ctx.save_for_backward(logits, token_ids, lse, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        # The backward keeps float64: log p + H cancels in nearly uniform rows.
        return logprobs, entropy.float()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None
        logits, token_ids, lse, entropy = ctx.saved_tensors
        grad_logits = torch.ops.r1kernels.token_stats_backward.default(
            logits,
            token_ids,
            lse,
            entropy,
            None if grad_logprobs is None else grad_logprobs.contiguous(),
            None if grad_entropy is None else grad_entropy.contiguous(),
            ctx.temperature,
        )
        return grad_logits, None, None, None


def token_stats(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Checked entry shared by every loss on logits: (log-prob, entropy), 0 where `mask` is False.

    Callers send gradient 0 to masked tokens; their rows are then read neither forward nor backward.
    """
    check_floating("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (..., V) with V >= 1")
    token_ids = ids_int64("token_ids", token_ids, logits)
    check_shape("token_ids", token_ids, logits.shape[:-1], "logits (..., V) score token_ids (...)")
    temperature = check_number("temperature", temperature, minimum=0.0, strict=True)
    if not 1e-30 < temperature < 1e30:
        raise ValueError(f"temperature is {temperature!r}, expected a number from 1e-30 to 1e30 (logits are fp32)")
    if _library.select(logits) == "reference":
        return reference(logits, token_ids, mask, temperature)
    return _TokenStats.apply(logits, token_ids, mask, temperature)


def token_logprobs(logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Log-probability of each token under softmax(logits / temperature).

    l = z_y - log sum_j e^{z_j},  z = logits / temperature

    Args:
        logits: (..., V), float32, bfloat16 or float16; float64 runs on the reference. Any strides: rows are read
            in place. -inf entries are allowed. Row t scores token t: shift before the call.
        token_ids: (...), int64 or int32, in [0, V).
        temperature: Python number > 0.

    Returns:
        (...), float32 (float64 for float64 logits), nats. Differentiable once with respect to logits; the
        gradient has the dtype of logits.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or device, temperature <= 0, an id outside [0, V).

    Memory: 24 bytes a token forward (two statistics are kept in float64); the gradient is the only buffer of
    vocabulary width.

    Equivalent to: `(logits.float() / temperature).log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]`
    """
    return token_stats(logits, token_ids, temperature=temperature)[0]


def token_logprobs_and_entropy(
    logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    r"""Log-probability of each token and entropy of each row, in one read of the logits.

    l = z_y - lse,  H = -sum_j p_j log p_j,  with 0 log 0 = 0; both differentiable.

    Args, errors and memory are those of `token_logprobs`.

    Returns:
        (logprobs, entropy), each (...), float32, nats.

    Equivalent to: `token_logprobs` and `torch.distributions.Categorical(logits=logits / temperature).entropy()`
    """
    return token_stats(logits, token_ids, temperature=temperature)

r"""Statistics of each token from its logits row, and the gradient with respect to that row.

With z = x / T, p = softmax z and token id y:

    lse = log sum_j e^{z_j},    l = z_y - lse,    H = -sum_j p_j log p_j
    dL/dx_j = (g (1[j = y] - p_j) - eta p_j (log p_j + H)) / T,    g = dL/dl,  eta = dL/dH

Only these two kernels work on the vocabulary axis; every loss is arithmetic on g and eta.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from r1kernels import _dispatch, _library
from r1kernels.ops._autograd import differentiable_once
from r1kernels.ops._checks import (
    accumulator_dtype,
    check_floating,
    check_ids_in_range,
    check_shape,
    check_temperature,
    ids_int64,
)


def reference(logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-prob, entropy) in plain differentiable PyTorch; fp32 arithmetic, or fp64 for fp64 logits."""
    check_ids_in_range("token_ids", token_ids, logits.shape[-1], mask)
    z = logits.to(accumulator_dtype(logits.dtype)) / temperature
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
    @differentiable_once
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None
        logits, token_ids, lse, entropy = ctx.saved_tensors
        grad_logits = _library.run(
            torch.ops.r1kernels.token_stats_backward.default,
            logits,
            token_ids,
            lse,
            entropy,
            None if grad_logprobs is None else grad_logprobs.contiguous(),
            None if grad_entropy is None else grad_entropy.contiguous(),
            ctx.temperature,
        )
        return grad_logits, None, None, None


# ---- the two kernels on a matrix of logits, without autograd: for losses that work chunk by chunk


def statistics(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, temperatures: Tensor | None,
    exact: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-prob float32, log-sum-exp float64, entropy float64), each (N,), from (N, V) logits of any dtype.

    `temperatures` (N,) multiply `temperature`. Rows where `mask` is False are not read and give 0. exact=False: float32
    logits are products of 16-bit operands, and kernels of a GPU may take fewer instructions for each.
    """
    if _dispatch.select(logits) != "reference":
        return _library.run(
            torch.ops.r1kernels.token_stats.default, logits, token_ids, mask, temperature, temperatures, exact
        )
    results = [token_ids.new_empty(token_ids.shape, dtype=torch.float64) for _ in range(3)]
    for rows in row_blocks(logits):
        z, ids = scaled_logits(logits, rows, temperature, temperatures), token_ids[rows]
        if mask is not None:
            z = torch.where(mask[rows, None], z, 0)
            ids = torch.where(mask[rows], ids, 0)
        lse = z.logsumexp(-1)
        lse = lse.masked_fill(lse == torch.inf, torch.nan)  # inf - inf, as in log_softmax, not a log-prob of -inf
        log_p = z - lse.unsqueeze(-1)
        entropy = -(log_p.exp() * torch.where(log_p == -torch.inf, 0, log_p)).sum(-1)
        block = (log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1), lse, entropy)
        for result, value in zip(results, block, strict=True):
            result[rows] = value.double() if mask is None else torch.where(mask[rows], value, 0).double()
    logprobs, lse, entropy = results
    return logprobs if logits.dtype == torch.float64 else logprobs.float(), lse, entropy


def gradient_into(
    out: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    lse: Tensor,
    entropy: Tensor,
    g: Tensor,
    eta: Tensor | None,
    *,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float,
    rows: Tensor | None,
    squares: tuple[Tensor, Tensor] | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Writes dL/dlogits of (N, V) logits to `out` (N, V), which may be the memory of the logits, row for row.

    `out` has the dtype of logits; for float32 logits it may be narrower. With `softcap` c > 0 the logits are
    c tanh(u / c), and the gradient is that of u. With `rows` (R,), ascending, only these rows are computed.
    Without `eta`, any entropy will do.
    `squares`: S = sum_j p_j^2 and dL/dS (N,), which add 2 dL/dS p_j (p_j - S) to dL/dz. `shift` (N,) is added to each
    entry of dL/dz.

    Returns:
        The first R (or N) rows of `out`.
    """
    result = out if rows is None else out[: len(rows)]
    sum_sq, zeta = squares or (None, None)
    more = () if squares is None and shift is None else (sum_sq, zeta, shift)
    if _dispatch.select(logits, "token_statistics" if more else "kernels") != "reference":
        _library.run(
            torch.ops.r1kernels.token_stats_backward_out.default, logits, token_ids, lse, entropy, g, eta, temperature,
            temperatures, softcap, rows, out, *more,
        )
        return result
    for block in row_blocks(result):
        source = block if rows is None else rows[block]
        x = logits[source].to(accumulator_dtype(logits.dtype))
        t = _row_temperatures(x, source, temperature, temperatures)
        log_p = x / t - lse[source, None].to(x.dtype)
        p = log_p.exp()
        grad = -g[source, None] * p
        grad.scatter_add_(-1, token_ids[source, None], g[source, None].to(x.dtype))
        if eta is not None:
            finite_log_p = torch.where(log_p == -torch.inf, 0, log_p)
            grad = grad - eta[source, None] * p * (finite_log_p + entropy[source, None].to(x.dtype))
        if zeta is not None:
            grad = grad + 2 * zeta[source, None] * p * (p - sum_sq[source, None].to(x.dtype))
        if shift is not None:
            grad = grad + shift[source, None]
        grad = grad / t
        if softcap > 0:
            grad = grad * (1 - (x / softcap).square())
        active = any_nonzero(*(None if slope is None else slope[source] for slope in (g, eta, zeta, shift)))
        result[block] = torch.where(active[:, None], grad, 0).to(out.dtype)
    return result


def any_nonzero(*slopes: Tensor | None) -> Tensor:
    """Where one of the slopes (N,), or one in its row (N, K), is not 0."""
    result: Tensor | None = None
    for slope in slopes:
        if slope is not None:
            nonzero = slope != 0 if slope.dim() == 1 else (slope != 0).any(-1)
            result = nonzero if result is None else result | nonzero
    return result


def entry_gradients(
    logits: Tensor,
    entries: Tensor,
    lse: Tensor,
    entropy: Tensor,
    *,
    added: Tensor,
    others: Tensor | None,
    eta: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float,
    squares: tuple[Tensor, Tensor] | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Some entries (..., K) of the gradient of a row, in float64 and not rounded, without cancellation as p goes to 1.

    Of g (1[j = y] - p_j), or a sum of several, `added` (..., K) is what an entry adds, and `others` (..., K) what those
    of other entries add: a (1 - p) - o p.
    """
    x = logits.gather(-1, entries).double()
    t = temperature if temperatures is None else temperature * temperatures.double().unsqueeze(-1)
    logprobs = (x / t - lse.unsqueeze(-1)).clamp(max=0)
    p = logprobs.exp()
    grad = -added.double() * torch.expm1(logprobs)
    if others is not None:
        grad = grad - others.double() * p
    if eta is not None:
        surprise = torch.where(logprobs == -torch.inf, 0, logprobs) + entropy.unsqueeze(-1)
        grad = grad - eta.double().unsqueeze(-1) * p * surprise
    if squares is not None:
        sum_sq, zeta = (value.double().unsqueeze(-1) for value in squares)
        grad = grad + 2 * zeta * p * (p - sum_sq)
    if shift is not None:
        grad = grad + shift.double().unsqueeze(-1)
    if softcap > 0:
        grad = grad * (1 - (x / softcap).square())
    return grad / t


def target_gradient(
    logits: Tensor,
    token_ids: Tensor,
    lse: Tensor,
    entropy: Tensor,
    g: Tensor,
    eta: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float,
    owned: Tensor | None = None,
) -> Tensor:
    """For each row, the entry of its token in the gradient (N,), in float64 and not rounded. Where `owned` is False,
    the id is a substitute: the gradient of the entry of another token."""
    added, others = g, None
    if owned is not None:
        added, others = torch.where(owned, g, 0), torch.where(owned, 0, g).unsqueeze(-1)
    grad = entry_gradients(
        logits, token_ids.unsqueeze(-1), lse, entropy, added=added.unsqueeze(-1), others=others, eta=eta,
        temperature=temperature, temperatures=temperatures, softcap=softcap,
    ).squeeze(-1)
    return torch.where(any_nonzero(g, eta), grad, 0)


def unrounded(
    logprobs: Tensor, lse: Tensor, logits: Tensor, token_ids: Tensor, temperature: float, temperatures: Tensor | None
) -> Tensor:
    """The log-probs (N,) in float64, from those that `statistics` rounds. Near 0, z_y - lse would be less exact."""
    x = logits.gather(-1, token_ids[:, None]).squeeze(-1).double()
    t = temperature if temperatures is None else temperature * temperatures.double()
    return torch.where(logprobs < -0.5, x / t - lse, logprobs.double())


def row_blocks(matrix: Tensor, elements: int = 4 << 20) -> Iterator[slice]:
    """Blocks of rows with about `elements` elements. The default is 16 MiB of float32: the memory that plain PyTorch
    may use in addition to a chunk."""
    step = max(1, elements // max(matrix.shape[-1], 1))
    return (slice(begin, min(begin + step, len(matrix))) for begin in range(0, len(matrix), step))


def _row_temperatures(x: Tensor, rows: slice | Tensor, temperature: float, temperatures: Tensor | None) -> Any:
    return temperature if temperatures is None else temperature * temperatures[rows, None].to(x.dtype)


def scaled_logits(logits: Tensor, rows: slice, temperature: float, temperatures: Tensor | None) -> Tensor:
    x = logits[rows].to(accumulator_dtype(logits.dtype))
    return x / _row_temperatures(x, rows, temperature, temperatures)


def checked(logits: Any, token_ids: Any, temperature: Any, sharded: bool = False) -> tuple[Tensor, float]:
    """Contiguous int64 ids, and the temperature."""
    check_floating("logits", logits)
    if logits.dim() == 0 or (logits.shape[-1] == 0 and not sharded):
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (..., V) with V >= 1")
    token_ids = ids_int64("token_ids", token_ids, logits)
    check_shape("token_ids", token_ids, logits.shape[:-1], "logits (..., V) score token_ids (...)")
    return token_ids, check_temperature(temperature)


def token_stats(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(log-prob, entropy) for all losses on logits, after checks; 0 where `mask` is False.

    Callers send gradient 0 to masked tokens, so neither forward nor backward reads their rows.
    """
    token_ids, temperature = checked(logits, token_ids, temperature)
    if _dispatch.select(logits) == "reference":
        return reference(logits, token_ids, mask, temperature)
    return _TokenStats.apply(logits, token_ids, mask, temperature)

"""Checks the arguments of an operator before a Triton kernel uses their addresses.

The compiled operators check their arguments in csrc/bindings*.cpp. A Triton kernel trusts its launcher: it would read
beyond the end of a tensor that is too short, has another dtype or is on another device. The checks look only at shapes,
dtypes and devices, because the values are on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LOGITS = (torch.float32, torch.bfloat16, torch.float16)


class _Arguments:
    """Checks the tensors of one call. All must be on the device of the first one."""

    def __init__(self, like: Tensor) -> None:
        self.device = like.device

    def flat(self, dtype: torch.dtype, count: int, **tensors: Tensor | None) -> None:
        """Checks that tensors are contiguous, have this dtype and have `count` elements."""
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            self.placed(name, tensor)
            if tensor.dtype != dtype or tensor.numel() != count or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, strides {tensor.stride()} and dtype {tensor.dtype}, "
                    f"expected {count} contiguous elements of {dtype}"
                )

    def rows(self, **tensors: Tensor) -> None:
        """Checks that tensors are (..., V) and have a dtype that kernels read."""
        for name, tensor in tensors.items():
            self.placed(name, tensor)
            if tensor.dim() == 0 or tensor.dtype not in LOGITS:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, expected (..., V) of float32, "
                    "bfloat16 or float16"
                )

    def placed(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {self.device} like the first argument")


def _number(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}, expected {least} to {most}")


def sequences_of(cu_seqlens: Tensor) -> int:
    """The number of sequences from the boundaries (S + 1,) of packed tokens."""
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (S + 1,): the first token of each sequence and N"
        )
    return cu_seqlens.numel() - 1


def _token_stats(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, temperatures: Tensor | None = None,
    exact: bool = True,
) -> None:
    check = _Arguments(logits)
    check.rows(logits=logits)
    count = logits.shape[:-1].numel()
    check.flat(torch.int64, count, token_ids=token_ids)
    check.flat(torch.bool, count, mask=mask)
    check.flat(torch.float32, count, temperatures=temperatures)
    _words(logits, count)


def _words(logits: Tensor, count: int) -> None:
    if count and logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected V >= 1")


def _token_stats_backward(
    logits: Tensor, token_ids: Tensor, lse: Tensor, entropy: Tensor, grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None, temperature: float, sum_sq: Tensor | None = None, grad_sum_sq: Tensor | None = None,
    shift: Tensor | None = None,
) -> None:
    check = _Arguments(logits)
    check.rows(logits=logits)
    count = logits.shape[:-1].numel()
    check.flat(torch.int64, count, token_ids=token_ids)
    check.flat(torch.float64, count, lse=lse, entropy=entropy, sum_sq=sum_sq)
    slopes = {
        "grad_logprobs": grad_logprobs, "grad_entropy": grad_entropy, "grad_sum_sq": grad_sum_sq, "shift": shift,
    }
    check.flat(torch.float32, count, **slopes)
    _words(logits, count)
    if all(slope is None for slope in slopes.values()):
        raise ValueError(f"{', '.join(slopes)} are all None, expected at least one tensor")
    if grad_sum_sq is not None and sum_sq is None:
        raise ValueError("sum_sq is None, expected a tensor like grad_sum_sq")


def _token_statistics(*arguments: Any) -> None:
    _token_stats(*arguments[:-1])
    _number("wanted", arguments[-1], 0, 7)


def _token_stats_backward_out(*arguments: Any) -> None:
    logits, temperatures, (rows, out, *more) = arguments[0], arguments[7], arguments[9:]
    _token_stats_backward(*arguments[:7], *more)
    check = _Arguments(logits)
    check.rows(out=out)
    if logits.dim() != 2 or out.dim() != 2:
        raise ValueError(f"logits and out have {logits.dim()} and {out.dim()} dimensions, expected 2")
    count, vocab = logits.shape
    check.flat(torch.float32, count, temperatures=temperatures)
    if rows is not None:
        check.flat(torch.int64, rows.numel(), rows=rows)
        if rows.dim() != 1:
            raise ValueError(f"rows has shape {tuple(rows.shape)}, expected (R,)")
    wanted = count if rows is None else rows.numel()
    if wanted > count or out.shape[1] != vocab or (len(out) < wanted if rows is not None else len(out) != wanted):
        raise ValueError(f"out has shape {tuple(out.shape)} for {wanted} rows of logits {tuple(logits.shape)}")
    if out.dtype not in (logits.dtype, *(LOGITS if logits.dtype == torch.float32 else ())):
        raise ValueError(f"out has dtype {out.dtype}, expected {logits.dtype}, or a narrower dtype for float32 logits")


def _policy_loss(
    logprobs: Tensor, advantages: Tensor, old_logprobs: Tensor | None, ref_logprobs: Tensor | None,
    entropy: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None, importance_weights: Tensor | None,
    normalizer: Tensor | None, surrogate: int, ratio: int, kl: int, aggregate: int, *_: Any,
) -> None:
    check, tokens = _Arguments(logprobs), logprobs.numel()
    if logprobs.dim() == 0:
        raise ValueError("logprobs has 0 dimensions, expected (..., T), or (N,) with cu_seqlens")
    sequences = logprobs.shape[:-1].numel() if cu_seqlens is None else sequences_of(cu_seqlens)
    given = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "entropy": entropy}
    check.flat(torch.float32, tokens, logprobs=logprobs, **given)
    check.flat(torch.bool, tokens, mask=mask)
    check.flat(torch.int64, sequences + 1, cu_seqlens=cu_seqlens)
    check.flat(torch.float32, 1, normalizer=normalizer)
    for name, value in (("advantages", advantages), ("importance_weights", importance_weights)):
        if value is not None:
            per_token = value.dim() == logprobs.dim() and value.numel() == tokens
            check.flat(torch.float32, tokens if per_token else sequences, **{name: value})
    for name, number, least, most in (
        ("surrogate", surrogate, 0, 7), ("ratio", ratio, 0, 3), ("kl", kl, 1, 6), ("aggregate", aggregate, 0, 2)
    ):
        _number(name, number, least, most)


def _group_advantages(rewards: Tensor, group_ids: Tensor | None, group_size: int, scale: int, *_: Any) -> None:
    check = _Arguments(rewards)
    check.flat(torch.float32, rewards.numel(), rewards=rewards)
    check.flat(torch.int64, rewards.numel(), group_ids=group_ids)
    if group_ids is not None and group_ids.dim() != 1:
        raise ValueError(f"group_ids has shape {tuple(group_ids.shape)}, expected (B,)")
    _number("scale", scale, 0, 2)


def _kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: int) -> None:
    _Arguments(logprobs).flat(torch.float32, logprobs.numel(), logprobs=logprobs, ref_logprobs=ref_logprobs)
    _number("estimator", estimator, 1, 3)


def _divergence(student: Tensor, teacher: Tensor, mask: Tensor | None, *_: Any) -> None:
    check = _Arguments(student)
    check.rows(student=student, teacher=teacher)
    check.flat(torch.bool, student.shape[:-1].numel(), mask=mask)


def _divergence_backward(
    student: Tensor, teacher: Tensor, lse_student: Tensor, lse_teacher: Tensor, inner: Tensor, grad: Tensor, kind: int,
    beta: float, temperature: float, out: Tensor, *_: Any,
) -> None:
    check = _Arguments(student)
    check.rows(student=student, teacher=teacher, out=out)
    count = student.shape[:-1].numel()
    check.flat(torch.float64, count, lse_student=lse_student, lse_teacher=lse_teacher, inner=inner)
    check.flat(torch.float32, count, grad=grad)


def _linear_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, mask: Tensor | None, temperature: float,
    temperatures: Tensor | None, *_: Any,
) -> None:
    check = _Arguments(hidden)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or len(weight) == 0:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}, expected (N, H) and (V, H)"
        )
    check.placed("weight", weight)
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight has dtype {weight.dtype}, expected {hidden.dtype} like hidden")
    count = len(hidden)
    check.flat(hidden.dtype, len(weight), bias=bias)
    check.flat(torch.int64, count, token_ids=token_ids)
    check.flat(torch.bool, count, mask=mask)
    check.flat(torch.float32, count, temperatures=temperatures)


def _scaled(grad: Tensor, factor: Tensor, out: Tensor, *_: Any) -> None:
    check = _Arguments(grad)
    check.placed("factor", factor)
    check.rows(grad=grad.unsqueeze(0), out=out.unsqueeze(0))
    if factor.numel() != 1 or out.numel() != grad.numel():
        raise ValueError(
            f"factor has {factor.numel()} elements and out {out.numel()}, expected 1 and {grad.numel()} like grad"
        )


def _vectors(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dim() != 1:
            raise ValueError(f"{name} has {tensor.dim()} dimensions, expected 1")


def _support_entries(values: Tensor, starts: Tensor, entries: Tensor, tokens: Tensor, vocab: int) -> None:
    check, size = _Arguments(values), values.numel()
    check.flat(torch.float32, size, values=values)
    check.flat(torch.int32, vocab + 1, starts=starts)
    check.flat(torch.int32, size, entries=entries, tokens=tokens)
    if starts.dim() != 2 or len(starts) != 1:
        raise ValueError(f"starts has shape {tuple(starts.shape)}, expected (1, V + 1)")
    _vectors(values=values, entries=entries, tokens=tokens)


def _support_matrix(like: Tensor, columns: int | None = None, **tensors: Tensor) -> None:
    check = _Arguments(like)
    check.rows(**tensors)
    for name, tensor in tensors.items():
        wrong = tensor.dim() != 2 or (tensor.stride(1) != 1 and tensor.shape[1] > 1)
        if wrong or (columns is not None and tensor.shape[1] != columns):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}, expected a matrix with "
                f"{'' if columns is None else f'{columns} '}adjacent columns"
            )


def _support_products(
    hidden: Tensor, weight: Tensor, starts: Tensor, entries: Tensor, tokens: Tensor, values: Tensor, *_: Any
) -> None:
    _support_matrix(values, hidden=hidden)
    _support_matrix(values, hidden.shape[1], weight=weight)
    _support_entries(values, starts, entries, tokens, len(weight))


def _support_grad_hidden(
    values: Tensor, weight: Tensor, starts: Tensor, entries: Tensor, tokens: Tensor, out: Tensor
) -> None:
    _support_matrix(values, weight=weight)
    _support_matrix(values, weight.shape[1], out=out)
    _Arguments(values).flat(torch.float32, out.numel(), out=out)
    _support_entries(values, starts, entries, tokens, len(weight))


def _support_grad_weight(
    values: Tensor, hidden: Tensor, starts: Tensor, entries: Tensor, tokens: Tensor, out: Tensor, *_: Any
) -> None:
    _support_matrix(values, hidden=hidden)
    _support_matrix(values, hidden.shape[1], out=out)
    _Arguments(values).flat(out.dtype, out.numel(), out=out)
    _support_entries(values, starts, entries, tokens, len(out))


def _support_stats(
    values: Tensor, support_offsets: Tensor, targets: Tensor, mask: Tensor | None, temperature: float,
    temperatures: Tensor | None, *_: Any,
) -> None:
    check, count = _Arguments(values), targets.numel()
    check.flat(torch.float32, values.numel(), values=values)
    check.flat(torch.int64, count + 1, support_offsets=support_offsets)
    check.flat(torch.int64, count, targets=targets)
    check.flat(torch.bool, count, mask=mask)
    check.flat(torch.float32, count, temperatures=temperatures)
    _vectors(values=values, support_offsets=support_offsets, targets=targets)
    inside = ((support_offsets >= 0) & (support_offsets <= len(values))).all()
    if support_offsets.device.type != "cpu":  # an error at the next synchronisation
        torch._assert_async(inside, "r1kernels: support_offsets are beyond the number of values")
    elif not inside:
        raise ValueError(f"support_offsets are from {int(support_offsets.min())} to {int(support_offsets.max())}, "
                         f"expected from 0 to {len(values)}, the number of values")


def _support_stats_backward(
    values: Tensor, support_offsets: Tensor, targets: Tensor, lse: Tensor, entropy: Tensor,
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, temperature: float, temperatures: Tensor | None,
    softcap: float, out: Tensor,
) -> None:
    _support_stats(values, support_offsets, targets, None, temperature, temperatures)
    check, count = _Arguments(values), targets.numel()
    check.flat(torch.float64, count, lse=lse, entropy=entropy)
    check.flat(torch.float32, count, grad_logprobs=grad_logprobs, grad_entropy=grad_entropy)
    check.flat(torch.float32, values.numel(), out=out)


CHECKS: dict[str, Callable[..., None]] = {
    "token_stats": _token_stats,
    "token_stats_backward": _token_stats_backward,
    "token_stats_backward_out": _token_stats_backward_out,
    "policy_loss": _policy_loss,
    "group_advantages": _group_advantages,
    "kl_estimate": _kl_estimate,
    "divergence": _divergence,
    "divergence_backward": _divergence_backward,
    "linear_statistics": _linear_statistics,
    "scaled": _scaled,
    "support_products": _support_products,
    "support_grad_hidden": _support_grad_hidden,
    "support_grad_weight": _support_grad_weight,
    "support_stats": _support_stats,
    "support_stats_backward": _support_stats_backward,
    "token_statistics": _token_statistics,
}

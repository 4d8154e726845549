r"""Which K tokens of a row are compared: the likeliest of the student, of the teacher, or both, chosen from logits.

The choice is a constant: no gradient flows through it. Of equal logits, the smaller id is chosen first, on every
backend. The teacher's log-probs at the chosen ids are log q_k = y_k / T - lse(y / T), of the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from r1kernels import _dispatch, _library
from r1kernels.ops import token_stats
from r1kernels.ops._checks import check_floating, check_shape
from r1kernels.ops.topk_divergence import chunks
from r1kernels.ops.topk_teacher import Teacher, check_values, make_teacher

TOP_K_OF = ("student", "teacher", "union")
# (token ids (n, K), rows (n,): which tokens they belong to, counted over all dimensions) -> log-probs (n, K)
Scorer = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def top_k_ids(logits: Tensor, k: int) -> Tensor:
    """Ids (..., k) of the largest of (..., V) logits, in descending order; the smaller id of equal ones is first. In a
    row with NaN, any k ids.

    Without our CPU kernel, torch chooses among int64 keys: 8 bytes for each logit of a block of rows.
    """
    if _dispatch.select(logits) == "cpu":
        return _library.run(torch.ops.r1kernels.top_k_ids.default, logits, k)
    ids = [_largest(rows, k) for _, rows in chunks(logits)]
    if not ids:
        return logits.new_empty((*logits.shape[:-1], k), dtype=torch.int64)
    return torch.cat(ids).reshape(*logits.shape[:-1], k)


def _largest(rows: Tensor, k: int) -> Tensor:
    if rows.dtype == torch.float64:
        return rows.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    bits = (rows.float() + 0.0).view(torch.int32)  # + 0: -0 equals 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # in the order of the numbers
    ids = torch.arange(rows.shape[-1], device=rows.device)
    return 0xFFFFFFFF - (((ordered.long() << 32) | (0xFFFFFFFF - ids)).topk(k).values & 0xFFFFFFFF)


@torch.no_grad()
def chosen_ids(student: Tensor, teacher: Tensor | None, k: int, of: str) -> tuple[Tensor, Tensor]:
    """Ids, and which of them are present: (..., K), with K = 2 k for the union. Ids that both chose are absent from the
    second half."""
    if of != "union":
        ids = top_k_ids(student if of == "student" else teacher, k)
        return ids, torch.ones_like(ids, dtype=torch.bool)
    ids, others = top_k_ids(student, k), top_k_ids(teacher, k)
    ordered = ids.sort(-1).values
    again = ordered.gather(-1, torch.searchsorted(ordered, others).clamp(max=k - 1)) == others
    present = torch.cat([torch.ones_like(again), ~again], -1)
    return torch.cat([ids, torch.where(again, ids[..., :1], others)], -1), present


@torch.no_grad()
def logprobs_at(
    logits: Tensor, ids: Tensor, present: Tensor, mask: Tensor | None, temperature: float, tail: str
) -> Tensor:
    """Log-probs (..., K) in float64 of (..., V) logits. If they are renormalized, those among the K tokens, which need
    no read of the whole row."""
    z = logits.gather(-1, ids).double() / temperature
    if tail == "renormalize":
        lse = torch.where(present, z, -torch.inf).logsumexp(-1, keepdim=True)
        return z - torch.where(lse == -torch.inf, 0, lse)
    return z - log_sum_exp(logits, mask, temperature).unsqueeze(-1)


@torch.no_grad()
def log_sum_exp(logits: Tensor, mask: Tensor | None, temperature: float) -> Tensor:
    """(...) float64 of (..., V) logits; 0 where `mask` is False."""
    shape = logits.shape[:-1]
    ids = torch.zeros(shape, dtype=torch.int64, device=logits.device)
    if _dispatch.select(logits) != "reference":
        return token_stats.statistics(logits, ids, mask, temperature, None)[1]
    flat = None if mask is None else mask.reshape(-1)  # the reference takes matrices
    matrix = logits.reshape(shape.numel(), logits.shape[-1])
    return token_stats.statistics(matrix, ids.reshape(-1), flat, temperature, None)[1].reshape(shape)


@torch.no_grad()
def scored(scorer: Scorer, ids: Tensor, rows: Tensor, vocab: int, mask: Tensor | None) -> Tensor:
    """The log-probs (n, K) that a function of the caller gives, checked."""
    logprobs: Any = scorer(ids, rows)
    check_floating("the result of teacher_logprobs", logprobs, ids)
    check_shape("the result of teacher_logprobs", logprobs, ids.shape, "one log-prob for each of the chosen ids")
    check_values(ids, logprobs, vocab, mask)
    return logprobs


def chosen_teacher(
    student: Tensor, teacher: Tensor | Scorer, mask: Tensor | None, k: int, of: str, tail: str, temperature: float
) -> Teacher:
    """The teacher at the chosen ids of (..., V) logits, as constants."""
    if isinstance(teacher, Tensor):
        ids, present = chosen_ids(student, teacher, k, of)
        logprobs = logprobs_at(teacher, ids, present, mask, temperature, tail)
    else:
        ids, present = chosen_ids(student, None, k, of)
        count = ids.shape[:-1].numel()
        rows = torch.arange(count, device=ids.device)
        flat = None if mask is None else mask.reshape(-1)
        logprobs = scored(teacher, ids.reshape(count, k), rows, student.shape[-1], flat).reshape(ids.shape)
    return make_teacher(ids, logprobs, mask, present)

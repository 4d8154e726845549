r"""Statistics of each row of logits beside log-prob and entropy, from the same read of it.

With z = x / T, p = softmax z, token id y and selected ids s_k:

    lse = log sum_j e^{z_j},  l = z_y - lse,  l_k = z_{s_k} - lse,  H = -sum_j p_j log p_j,  S = sum_j p_j^2

`r1kernels.ops.row_statistics` has the arithmetic of rows, and `r1kernels.ops.shards` puts the shards of a vocabulary
together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1kernels import _dispatch, _library
from r1kernels.ops._autograd import differentiable_once
from r1kernels.ops._checks import accumulator_dtype, as_mask, check_ids_in_range, ids_int64
from r1kernels.ops.row_statistics import (
    RowStatistics,
    Selected,
    Slopes,
    entries_of,
    row_statistics,
    selected_of,
    split_statistics,
    wanted_number,
)
from r1kernels.ops.shards import Facts, Layout, Shard, Split, agreed_layout, checksum, layout_of, refusals
from r1kernels.ops.token_stats import checked, gradient_into


class TokenStatistics(NamedTuple):
    """Statistics of tokens, each (...), float32 (float64 from float64 inputs). What was not asked for is None.

    Attributes:
        logprobs: l = z_y - lse, nats. lse: log sum_j e^{z_j}, nats. entropy: -sum_j p_j log p_j, nats.
        sum_sq_probs: sum_j p_j^2, the probability that two draws give the same token; at least 1 / V.
        mean_logit: the mean of z over the vocabulary; a constant, like is_top1.
        is_top1: bool, whether the token's logit is the largest; of equal logits, only that of the smallest id is.
        selected_logprobs: (..., K), log-probs of the selected ids, nats.
    """

    logprobs: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None
    sum_sq_probs: Tensor | None
    mean_logit: Tensor | None
    is_top1: Tensor | None
    selected_logprobs: Tensor | None


FIELDS = TokenStatistics._fields
SELECTED = "selected_logprobs"
DEFAULT_FIELDS = tuple(name for name in FIELDS if name != SELECTED)


# ---- arguments --------------------------------------------------------------------------------------------


def checked_fields(fields: Any, selected_ids: Any) -> tuple[str, ...]:
    """The names in the order of `TokenStatistics`; log-probs of selected ids are among them if there are any."""
    if isinstance(fields, str) or not isinstance(fields, (tuple, list)):
        raise TypeError(f"fields is {fields!r}, expected a tuple of names from {', '.join(FIELDS)}")
    for name in fields:
        if name not in FIELDS:
            raise ValueError(f"fields has {name!r}, expected names from {', '.join(FIELDS)}")
    if SELECTED in fields and selected_ids is None:
        raise ValueError(f"fields has {SELECTED!r} and selected_ids is None, expected ids (..., K)")
    chosen = tuple(name for name in FIELDS if name in fields or (name == SELECTED and selected_ids is not None))
    if not chosen:
        raise ValueError(f"fields is {fields!r}, expected at least one of {', '.join(FIELDS)}")
    return chosen


def checked_selected(selected_ids: Any, token_ids: Tensor, mask: Tensor | None) -> Tensor | None:
    """Selected ids (N, K), 0 where the mask (...) is False."""
    if selected_ids is None:
        return None
    selected = ids_int64("selected_ids", selected_ids, token_ids)
    size = selected.shape[-1] if selected.dim() else 0
    if selected.shape != (*token_ids.shape, size):
        expected = ", ".join([*map(str, token_ids.shape), "K"])
        raise ValueError(f"selected_ids has shape {tuple(selected.shape)}, expected ({expected}): K ids for each token")
    selected = selected.reshape(token_ids.numel(), size)
    return selected if mask is None else torch.where(mask.reshape(-1, 1), selected, 0)


# ---- autograd ---------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """The shard of the vocabulary that this rank has."""

    layout: Layout
    tokens: Shard | None
    selected: Shard | None


def of_tokens(rows: RowStatistics, chosen: Tensor | None, fields: Sequence[str], dtype: torch.dtype) -> list[Tensor]:
    """The results of autograd functions, in the order of `fields`."""
    values = {
        "logprobs": rows.logprobs, "lse": rows.lse, "entropy": rows.entropy, "sum_sq_probs": rows.more[0],
        "mean_logit": rows.more[1], SELECTED: chosen,
    }
    return [rows.more[3] != 0 if name == "is_top1" else values[name].to(dtype) for name in fields]


def constants_of(fields: Sequence[str], values: Sequence[Tensor]) -> list[Tensor]:
    """The results that have no derivative."""
    return [value for name, value in zip(fields, values, strict=True) if name in ("mean_logit", "is_top1")]


def slopes_of(fields: Sequence[str], grads: Sequence[Tensor | None]) -> Slopes | None:
    """The gradients of an autograd function's results, or None if there are none."""
    given = dict(zip(fields, grads, strict=True))
    slopes = Slopes(*(given.get(name) for name in ("logprobs", "lse", "entropy", "sum_sq_probs", SELECTED)))
    return None if all(slope is None for slope in slopes) else slopes.map(lambda slope: slope.contiguous())


class _TokenStatistics(torch.autograd.Function):
    """Statistics of logits (..., V), or of the shard of a vocabulary (N, V)."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, token_ids: Tensor, selected_ids: Tensor | None, mask: Tensor | None,
        temperature: float, fields: tuple[str, ...], part: _Part | None,
    ) -> tuple[Tensor, ...]:
        wanted = wanted_number(fields)
        counted = logits if part is None else logits[:, : part.layout.size]
        if part is None:
            rows = row_statistics(logits, token_ids, mask, temperature, None, wanted)
        else:
            rows = split_statistics(counted, token_ids, mask, temperature, part.tokens, wanted)
        chosen = None
        if selected_ids is not None:
            selected = Selected(selected_ids, None if part is None else part.selected)
            if counted.shape[-1] == 0:
                chosen = torch.zeros(selected_ids.shape, dtype=torch.float64, device=logits.device)
            else:
                chosen = selected_of(counted, selected_ids, rows.lse, temperature, None, selected.owned)
            if selected.shard is not None:
                chosen = selected.merged(chosen, rows.lse)
        sum_sq = rows.more[0].contiguous() if "sum_sq_probs" in fields else None
        ctx.save_for_backward(logits, token_ids, selected_ids, rows.lse, rows.entropy, sum_sq)
        ctx.temperature, ctx.fields, ctx.part = temperature, fields, part
        ctx.set_materialize_grads(False)
        results = of_tokens(rows, chosen, fields, accumulator_dtype(logits.dtype))
        ctx.mark_non_differentiable(*constants_of(fields, results))
        return tuple(results)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        slopes = slopes_of(ctx.fields, grads)
        if slopes is None:
            return (None,) * 7
        logits, token_ids, selected_ids, lse, entropy, sum_sq = ctx.saved_tensors
        part, zeta = ctx.part, slopes.sum_sq_probs
        if part is None:
            counted = logits
            out = grad_logits = _library.run(
                torch.ops.r1kernels.token_stats_backward.default, logits, token_ids, lse, entropy, slopes.total,
                slopes.entropy, ctx.temperature, *(() if zeta is None else (sum_sq, zeta)),
            )
            owned = selected_owned = None
        else:
            size = part.layout.size
            grad_logits = _library.empty(*logits.shape, dtype=logits.dtype, device=logits.device)
            grad_logits[:, size:] = 0
            if size == 0:
                return grad_logits, *[None] * 6
            counted = logits[:, :size]
            out = gradient_into(
                grad_logits[:, :size], counted, token_ids, lse, entropy, slopes.total, slopes.entropy,
                temperature=ctx.temperature, temperatures=None, softcap=0.0, rows=None,
                squares=None if zeta is None else (sum_sq, zeta),
            )
            owned = None if part.tokens is None else part.tokens.owned
            selected_owned = None if part.selected is None else Selected(selected_ids, part.selected).owned
        if owned is not None or not slopes.is_of_tokens:
            entries_of(
                counted, token_ids, owned, selected_ids, selected_owned, (lse, entropy, sum_sq), slopes,
                ctx.temperature, None, 0.0,
            ).write(out)
        return grad_logits, *[None] * 6


# ---- public -----------------------------------------------------------------------------------------------


def _reference(
    logits: Tensor, token_ids: Tensor, selected_ids: Tensor | None, mask: Tensor | None, temperature: float,
    fields: tuple[str, ...],
) -> Iterator[Tensor]:
    """The fields in plain differentiable PyTorch; fp32 arithmetic, or fp64 for fp64 logits."""
    z = logits.to(accumulator_dtype(logits.dtype)) / temperature
    if mask is not None:
        z = torch.where(mask.unsqueeze(-1), z, 0)
    lse = z.logsumexp(-1)
    lse = lse.masked_fill(lse == torch.inf, torch.nan)
    log_p = z.log_softmax(-1)
    logprobs = log_p.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    for name in fields:
        if name == "logprobs":
            yield logprobs
        elif name == "lse":
            yield lse
        elif name == "entropy":
            yield -(log_p.exp() * torch.where(log_p == -torch.inf, 0, log_p)).sum(-1)
        elif name == "sum_sq_probs":
            yield log_p.exp().square().sum(-1)
        elif name == "mean_logit":
            yield z.detach().mean(-1)
        elif name == "is_top1":
            yield (z.detach().argmax(-1) == token_ids) & ~logprobs.detach().isnan()
        else:
            assert selected_ids is not None
            yield log_p.gather(-1, selected_ids)


def named(fields: Sequence[str], values: Sequence[Tensor], mask: Tensor | None, shape: torch.Size) -> TokenStatistics:
    """Results (N,) or (...), and (N, K), as they are returned: 0 where the mask (...) is False, with no gradient."""
    results: dict[str, Tensor | None] = dict.fromkeys(FIELDS)
    for name, value in zip(fields, values, strict=True):
        value = value.reshape((*shape, value.shape[-1]) if name == SELECTED else shape)
        if mask is not None:
            value = torch.where(mask.unsqueeze(-1) if name == SELECTED else mask, value, torch.zeros_like(value))
        results[name] = value
    return TokenStatistics(**results)


def token_statistics(
    logits: Tensor,
    token_ids: Tensor,
    *,
    fields: tuple[str, ...] = DEFAULT_FIELDS,
    selected_ids: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    process_group: torch.distributed.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> TokenStatistics:
    r"""Statistics of each token and its row of logits, in one read of the logits.

        lse = log sum_j e^{z_j},  l = z_y - lse,  H = -sum_j p_j log p_j,  S = sum_j p_j^2,  z = logits / temperature

    Args:
        logits, token_ids, temperature, process_group, vocab_size: as in `token_logprobs`.
        fields: names of `TokenStatistics`: which ones are computed. The others are None and cost nothing; only
            log-prob, lse and entropy always come together, and on a GPU sum_sq_probs, mean_logit and is_top1. With
            selected_ids, `selected_logprobs` is one of them.
        selected_ids: (..., K), int64 or int32, in [0, V): K ids for each row, also equal ones.
        mask: (...), True or nonzero = counts. Rows where it is False are not read, give 0 (False), may hold anything.

    Returns:
        `TokenStatistics`. logprobs, lse, entropy, sum_sq_probs and selected_logprobs are differentiable once with
        respect to logits, together in one backward pass; mean_logit and is_top1 are constants.

    Raises:
        TypeError: wrong dtype, or fields is not a tuple.
        ValueError: wrong shape or device, temperature <= 0, an id outside [0, V), an unknown field, or
            `selected_logprobs` without selected_ids.

    Memory: 48 bytes a token forward, and 16 for each selected id; the gradient is the only buffer of vocabulary width.

    Equivalent to: `log_p = (logits.float() / temperature).log_softmax(-1)`, and for example
    `sum_sq_probs = log_p.exp().square().sum(-1)`, `is_top1 = logits.argmax(-1) == token_ids`.
    """
    group, vocab_size = Split(process_group, vocab_size).checked()
    sharded = group is not None
    with refusals(group, logits):
        ids, temperature = checked(logits, token_ids, temperature, sharded=sharded)
        counted = as_mask(mask, ids, ids.shape)
        fields = checked_fields(fields, selected_ids)
        selected = checked_selected(selected_ids, ids, counted)
    shape, flat_mask = ids.shape, None if counted is None else counted.reshape(-1)
    if counted is not None:
        ids = torch.where(counted, ids, 0)
    part = None
    if sharded or vocab_size is not None:
        logits, ids, counted_rows = logits.reshape(ids.numel(), logits.shape[-1]), ids.reshape(-1), flat_mask
        part = _part_of(group, vocab_size, logits, ids, selected, flat_mask, temperature, fields)
        vocab = part.layout.vocab
    else:
        vocab, counted_rows = logits.shape[-1], counted
        selected = None if selected is None else selected.reshape(*shape, selected.shape[-1])
    check_ids_in_range("token_ids", ids, vocab, None)
    if selected is not None:
        check_ids_in_range("selected_ids", selected, vocab, None)
    if part is not None and part.tokens is not None:
        ids = part.tokens.ids
        if selected is not None and part.selected is not None:
            selected = part.selected.ids.reshape(selected.shape)
    if part is None and _dispatch.select(logits, "token_statistics") == "reference":
        values: Sequence[Tensor] = list(_reference(logits, ids, selected, counted, temperature, fields))
    else:
        values = _TokenStatistics.apply(logits, ids, selected, counted_rows, temperature, fields, part)
    return named(fields, values, counted, shape)


def _part_of(
    group: Any, vocab_size: int | None, logits: Tensor, ids: Tensor, selected: Tensor | None, mask: Tensor | None,
    temperature: float, fields: tuple[str, ...],
) -> _Part:
    """How logits (N, V_rank) are a part of the vocabulary; all ranks must make the same call."""
    if group is None:
        return _Part(layout_of((logits.shape[-1],), vocab_size), None, None)
    sums = checksum(ids, mask)
    if selected is not None:
        sums = sums + 31 * checksum(selected, None)
    facts = Facts(
        "token_statistics", ids.numel(), ids.numel() if mask is None else mask.sum(), sums, 0, vocab_size or -1,
        (logits.dtype,), temperature, (), (fields, None if selected is None else selected.shape[-1]),
    )
    layout = agreed_layout(group, logits.shape[-1], facts, logits.device)
    return _Part(layout, Shard(layout, ids, mask), None if selected is None else Shard(layout, selected, None))

r"""Statistics of rows of logits beside log-prob and entropy, and their gradient, without autograd.

    S = sum_j p_j^2,  l_k = z_{s_k} - lse
    dL/dx_j = (g_l 1[j = y] + sum_k g_k 1[j = s_k] - (g_l + sum_k g_k - g_lse) p_j
               - g_H p_j (log p_j + H) + 2 g_S p_j (p_j - S)) / T

The kernels add one g per row, to the entry of the token. The other entries that receive something are computed here,
in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from r1kernels import _dispatch, _library
from r1kernels.ops.shards import Shard, merge_more
from r1kernels.ops.token_stats import any_nonzero, entry_gradients, row_blocks, scaled_logits, statistics, unrounded

# The numbers by which kernels know what they compute beside log-prob, log-sum-exp and entropy: csrc/cpu/token_stats.h.
WANTED = {"sum_sq_probs": 1, "mean_logit": 2, "is_top1": 4}


def wanted_number(fields: Iterable[str]) -> int:
    return sum(WANTED.get(name, 0) for name in fields)


class RowStatistics(NamedTuple):
    """log-prob (float32), log-sum-exp and entropy (float64), each (...), and more (4, ...) float64: the sum of p^2, the
    mean of z, the largest z, and 1 where that is the token's. What is not wanted is 0."""

    logprobs: Tensor
    lse: Tensor
    entropy: Tensor
    more: Tensor


def row_statistics(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, temperatures: Tensor | None,
    wanted: int, exact: bool = True,
) -> RowStatistics:
    """`token_stats.statistics`, and more, from logits (..., V). The reference takes only (N, V)."""
    if wanted and _dispatch.select(logits, "token_statistics") != "reference":
        return RowStatistics(*_library.call(
            torch.ops.r1kernels.token_statistics.default, logits, token_ids, mask, temperature, temperatures, exact,
            wanted,
        ))
    logprobs, lse, entropy = statistics(logits, token_ids, mask, temperature, temperatures, exact)
    more = torch.zeros(4, *token_ids.shape, dtype=torch.float64, device=logits.device)
    for rows in row_blocks(logits) if wanted else ():
        z = scaled_logits(logits, rows, temperature, temperatures)
        p = (z - lse[rows, None].to(z.dtype)).exp().double()
        largest, at = z.max(-1)
        is_top1 = (at == token_ids[rows]) & ~logprobs[rows].isnan()
        for out, value in zip(more, (p.square().sum(-1), z.double().mean(-1), largest, is_top1), strict=True):
            out[rows] = value.double() if mask is None else torch.where(mask[rows], value, 0).double()
    return RowStatistics(logprobs, lse, entropy, more)


def split_statistics(
    counted: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, shard: Shard | None, wanted: int = 0,
    tokens: slice = slice(None),
) -> RowStatistics:
    """Statistics (n,) over the whole vocabulary, from this rank's logits (n, V') without padding. tokens: which ones of
    the shard's tokens these are."""
    if counted.shape[1] == 0:
        zeros = torch.zeros(token_ids.shape, dtype=torch.float64, device=counted.device)
        nothing = torch.full_like(zeros, -torch.inf)
        rows = RowStatistics(zeros, nothing, zeros, torch.stack([zeros, zeros, nothing, zeros]))
    else:
        rows = row_statistics(counted, token_ids, mask, temperature, None, wanted)
        if shard is not None:
            rows = rows._replace(logprobs=unrounded(rows.logprobs, rows.lse, counted, token_ids, temperature, None))
    return rows if shard is None else merged(shard, rows, mask, wanted, tokens)


def merged(
    shard: Shard, rows: RowStatistics, mask: Tensor | None, wanted: int, tokens: slice = slice(None)
) -> RowStatistics:
    """Statistics (n,) of some of a shard's tokens over the whole vocabulary, from those of the shard."""
    logprobs, lse, entropy = shard.merged(*rows[:3], tokens)
    more = merge_more(shard, rows.lse, rows.more, tokens) if wanted else rows.more
    return RowStatistics(*(
        value if mask is None else torch.where(mask, value, 0) for value in (logprobs, lse, entropy, more)
    ))


class Selected(NamedTuple):
    """Selected ids (N, K), or (..., K). With a `shard`, whose tokens they are, some are substitutes."""

    ids: Tensor
    shard: Shard | None

    @property
    def owned(self) -> Tensor | None:
        """Where this rank has the ids, or None if it has all."""
        return None if self.shard is None else self.shard.owned.reshape(self.ids.shape)

    def at(self, rows: Tensor | slice) -> tuple[Tensor, Tensor | None]:
        """The ids of some rows, and where this rank has them."""
        owned = self.owned
        return self.ids[rows], None if owned is None else owned[rows]

    def merged(self, logprobs: Tensor, lse: Tensor) -> Tensor:
        """Log-probs over the whole vocabulary, in place, from the `selected_of` of a shard and the merged lse (N,)."""
        self.shard.add_up(logprobs)
        return logprobs.sub_(lse.unsqueeze(-1))


def selected_of(
    logits: Tensor, selected_ids: Tensor, lse: Tensor, temperature: float, temperatures: Tensor | None,
    owned: Tensor | None = None,
) -> Tensor:
    """Log-probs (..., K) of ids, float64; 0 where they are not `owned`."""
    t = temperature if temperatures is None else temperature * temperatures.double().unsqueeze(-1)
    z = logits.gather(-1, selected_ids).double() / t
    return z - lse.unsqueeze(-1) if owned is None else torch.where(owned, z, 0)


# ---- gradients --------------------------------------------------------------------------------------------


class Slopes(NamedTuple):
    """dL/d of the statistics of rows, each (...), or None for 0; selected is (..., K)."""

    logprobs: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    sum_sq_probs: Tensor | None = None
    selected: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Slopes:
        return Slopes(*(None if slope is None else function(slope) for slope in self))

    @property
    def active(self) -> Tensor:
        """Where a row (N,) has a gradient."""
        return any_nonzero(*self[:4], self.selected)

    @property
    def exact_total(self) -> Tensor:
        """(...), float64: what all log-probs add to the entries of their tokens, minus dL/dlse. All entries get
        -total p_j from them."""
        terms = [
            None if self.logprobs is None else self.logprobs.double(),
            None if self.selected is None else self.selected.double().sum(-1),
            None if self.lse is None else -self.lse.double(),
        ]
        given = [term for term in terms if term is not None]
        return sum(given) if given else torch.zeros_like(self._first, dtype=torch.float64)

    @property
    def total(self) -> Tensor:
        """`exact_total` in the dtype of the slopes."""
        return self.exact_total.to(self._first.dtype)

    @property
    def _first(self) -> Tensor:
        return next(slope for slope in self if slope is not None)

    @property
    def is_of_tokens(self) -> bool:
        """Whether the kernels' entry of the token is right: no other entry receives anything, and lse nothing."""
        return self.lse is None and self.selected is None


class Entries(NamedTuple):
    """Entries of the gradient that the kernels do not know, (..., K) each. Equal ids of a row have equal values."""

    ids: Tensor
    values: Tensor  # float64

    def of(self, rows: Tensor | None) -> Entries:
        """Those of some rows."""
        return self if rows is None else Entries(self.ids[rows], self.values[rows])

    def write(self, grad_logits: Tensor) -> None:
        # On a CPU, scatter_ takes a pass over all of a 16-bit matrix.
        matrix = grad_logits if grad_logits.dim() == 2 else grad_logits.view(-1, grad_logits.shape[-1])
        ids = self.ids.reshape(len(matrix), self.ids.shape[-1])
        rows = torch.arange(len(matrix), device=ids.device)[:, None]
        matrix.index_put_((rows, ids), self.values.reshape(ids.shape).to(matrix.dtype))


def entries_of(
    logits: Tensor, token_ids: Tensor, owned: Tensor | None, selected_ids: Tensor | None, selected_owned: Tensor | None,
    rows: tuple[Tensor, Tensor, Tensor], slopes: Slopes, temperature: float, temperatures: Tensor | None,
    softcap: float,
) -> Entries:
    """The entries of the token and of the selected ids, first that of the token.

    Args:
        owned, selected_owned: where an id is in this shard, and no substitute.
        rows: log-sum-exp, entropy, and the sum of p^2.
    """
    lse, entropy, sum_sq = rows
    total = slopes.exact_total
    given = torch.zeros_like(total) if slopes.logprobs is None else slopes.logprobs.double()
    given = given if owned is None else torch.where(owned, given, 0)
    ids, added = token_ids.unsqueeze(-1), given.unsqueeze(-1)
    if selected_ids is not None and slopes.selected is not None:
        more = slopes.selected.double()
        more = more if selected_owned is None else torch.where(selected_owned, more, 0)
        ids, added = torch.cat([ids, selected_ids], -1), torch.cat([added, more], -1)
        added = _sums_of_equal(ids, added)
    values = entry_gradients(
        logits, ids, lse, entropy, added=added, others=total.unsqueeze(-1) - added, eta=slopes.entropy,
        temperature=temperature, temperatures=temperatures, softcap=softcap,
        squares=None if slopes.sum_sq_probs is None else (sum_sq, slopes.sum_sq_probs),
    )
    shape = total.shape
    active = slopes.map(lambda slope: slope.reshape(total.numel(), *slope.shape[len(shape):])).active.reshape(shape)
    return Entries(ids, torch.where(active.unsqueeze(-1), values, 0))


def _sums_of_equal(ids: Tensor, values: Tensor) -> Tensor:
    """For each id of a row, the sum of the values of all that are equal to it."""
    ordered, order = ids.sort(-1)
    new = torch.ones_like(ordered)
    new[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    group = torch.zeros_like(ids).scatter_(-1, order, new.cumsum(-1) - 1)
    return torch.zeros_like(values).scatter_add_(-1, group, values).gather(-1, group)

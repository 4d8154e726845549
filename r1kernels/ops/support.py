r"""Support sets: each token's log-prob and entropy are over the ids that its sampler kept, and not over the vocabulary.

    l = z_y - log sum_{j in K} e^{z_j},  H = -sum_{j in K} p_j log p_j,  p = softmax of z over K,  0 elsewhere

The sets are in compressed rows: token n keeps `token_ids[offsets[n] : offsets[n + 1]]`. All checks of them are here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from r1kernels import _dispatch
from r1kernels._schemas import SUPPORT_BLOCK_TOKENS
from r1kernels.ops._checks import check_tensor, ids_int64, values_are_free

# `fill_outside` takes about as many logits at a time, so that its memory does not grow with the sets.
BLOCK_LOGITS = 1 << 20


class Support(NamedTuple):
    """The sets of N tokens.

    Attributes:
        token_ids: (M,) int64, the ids of all sets, one set after the other. An id that a set has twice counts once.
        offsets: (N + 1,) int64, where each set begins. An empty set means the whole vocabulary.
    """

    token_ids: Tensor
    offsets: Tensor

    @property
    def entry_rows(self) -> Tensor:
        """(M,), the token of each id."""
        return torch.searchsorted(self.offsets, torch.arange(len(self.token_ids), device=self.offsets.device),
                                  right=True) - 1


class Index(NamedTuple):
    """The entries of sets by ascending id: the results of the operator `support_index`.

    Attributes:
        targets: (N,) int64, the place of each token in its set.
        starts: (blocks, V + 1) int32, where the entries of each id begin, for blocks of tokens.
        entries, tokens: (M,) int32, the place among all ids, and the token, of each entry.
    """

    targets: Tensor
    starts: Tensor
    entries: Tensor
    tokens: Tensor

    @staticmethod
    def of(support: Support, token_ids: Tensor, mask: Tensor | None, vocab: int, largest: int) -> Index:
        """Of the sets where `mask` (N,) is True that have at most `largest` ids, with a check of all values. On a CPU,
        it is the kernel's, which reads them anyway."""
        if _dispatch.choose("kernels", token_ids.device.type, torch.float32).implementation != "cpu":
            check_sets(support, token_ids, vocab, mask)
        return Index(*torch.ops.r1kernels.support_index.default(*support, token_ids, mask, vocab, largest))

    @staticmethod
    def unused(support: Support, token_ids: Tensor, vocab: int) -> Index:
        """Memory in the same shapes."""
        blocks = max(-(-len(token_ids) // SUPPORT_BLOCK_TOKENS), 1) if token_ids.device.type == "cpu" else 1
        places = [torch.empty(support.token_ids.shape, dtype=torch.int32, device=token_ids.device) for _ in range(2)]
        starts = torch.empty(blocks, vocab + 1, dtype=torch.int32, device=token_ids.device)
        return Index(torch.empty_like(token_ids), starts, *places)

    def listed(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(entries, tokens, valid): int64, and on a device (M,) which of them are entries; None for all."""
        if self.starts.device.type == "cpu":  # a block of tokens may have fewer entries than its sets
            ends = self.starts[:, [0, -1]].tolist()
            parts = [slice(begin, end) for begin, end in ends]
            return *(torch.cat([value[part] for part in parts]).long() for value in self[2:]), None
        valid = torch.arange(len(self.entries), device=self.starts.device) < self.starts[0, -1]
        return self.entries.long(), self.tokens.long(), valid


@torch.library.impl("r1kernels::support_index", "CompositeExplicitAutograd")
def _(
    support_ids: Tensor, support_offsets: Tensor, token_ids: Tensor, mask: Tensor | None, vocab: int, largest: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For devices other than a CPU, where the caller has checked the values. By two stable sorts: the second puts
    entries of masked and large sets, and repeated ids, behind all others. Their tokens remain right."""
    size, count, device = len(support_ids), len(token_ids), support_ids.device
    places = torch.arange(size, device=device)
    rows = (torch.searchsorted(support_offsets, places, right=True) - 1).clamp(0, max(count - 1, 0))
    counted = support_offsets.diff() <= largest
    if mask is not None:
        counted = counted & mask
    listed = counted[rows] if count else torch.zeros(0, dtype=torch.bool, device=device)
    keys, order = torch.where(listed, support_ids, vocab).sort(stable=True)
    again = (keys[1:] == keys[:-1]) & (rows[order[1:]] == rows[order[:-1]])
    keys = torch.where(torch.nn.functional.pad(again, (1, 0)), vocab, keys)
    keys, second = keys.sort(stable=True)
    order = order[second]
    starts = torch.searchsorted(keys, torch.arange(vocab + 1, device=device))
    found = torch.full((count,), size, device=device)
    if count:
        own = torch.where(support_ids == token_ids[rows], places, size)
        found.scatter_reduce_(0, rows, own, "amin")
    targets = torch.where(found < size, found - support_offsets[:count], 0)
    return targets, starts[None].int(), order.int(), rows[order].int()


def checked_support(value: Any, like: Tensor, count: int, group: Any = None) -> Support | None:
    """The argument `support` of `count` tokens, or None. `check_sets` checks its values.

    Raises:
        TypeError, ValueError: naming the part of the argument, its value and the expectation.
    """
    if value is None:
        return None
    if group is not None:
        raise ValueError("support was given with process_group, expected one of them: sets of ids of a vocabulary that "
                         "is split over ranks are not implemented")
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"support is a {type(value).__name__}, expected a pair (token_ids (M,), offsets (N + 1,))")
    names = "support token_ids", "support offsets"
    for name, tensor in zip(names, value, strict=True):
        check_tensor(name, tensor)
        if tensor.dim() != 1:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected 1 dimension")
    token_ids, offsets = (ids_int64(name, tensor, like) for name, tensor in zip(names, value, strict=True))
    if len(offsets) != count + 1:
        raise ValueError(f"support offsets has {len(offsets)} entries, expected {count + 1}: one for each of {count} "
                         "tokens, and the end")
    return Support(token_ids, offsets)


def refuse_support(options: Any, function: str) -> None:
    if options.get("support") is not None:
        raise ValueError(f"support was given to {function}, expected None: {function} is over the "
                         "whole vocabulary")


def check_sets(support: Support, token_ids: Tensor, vocab: int, mask: Tensor | None) -> None:
    """The check that offsets ascend from 0 to the number of ids, that ids are in [0, V), and that each token is in its
    set. Tokens where `mask` (N,) is False, and their sets, may hold anything.

    On a CPU, an error is immediate, and on another device it comes at the next synchronisation. A traced call has no
    values: the operators that it calls check them.
    """
    if torch.compiler.is_compiling() or isinstance(support.offsets, FakeTensor):
        return
    ids, offsets = support
    ends = (offsets[0] != 0) | (offsets[-1] != len(ids))
    falls = offsets.diff() < 0
    if offsets.device.type != "cpu":
        torch._assert_async(~(ends | falls.any()), "r1kernels: support offsets do not ascend from 0 to the number of "
                                                   "support token_ids")
        outside, missing = _wrong_entries(support, token_ids, vocab, mask)
        torch._assert_async(~outside.any(), f"r1kernels: an id of support is out of range, expected [0, {vocab})")
        torch._assert_async(~missing.any(), "r1kernels: a token is not in its set of support")
        return
    if ends:
        raise ValueError(f"support offsets begin with {int(offsets[0])} and end with {int(offsets[-1])}, expected 0 "
                         f"and {len(ids)}, the number of support token_ids")
    if falls.any():
        at = int(falls.nonzero()[0])
        raise ValueError(f"support offsets[{at + 1}] is {int(offsets[at + 1])}, expected at least offsets[{at}], which "
                         f"is {int(offsets[at])}")
    outside, missing = _wrong_entries(support, token_ids, vocab, mask)
    if outside.any():
        at = int(outside.nonzero()[0])
        raise ValueError(f"support token_ids[{at}] is {int(ids[at])}, expected an id in [0, {vocab})")
    if missing.any():
        at = int(missing.nonzero()[0])
        begin, end = offsets[at : at + 2].tolist()
        raise ValueError(f"token_ids[{at}] is {int(token_ids[at])}, expected an id of its set, support "
                         f"token_ids[{begin}:{end}] (position counted over all dimensions)")


def _wrong_entries(support: Support, token_ids: Tensor, vocab: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(ids out of range (M,), tokens that are not in their set (N,))."""
    ids, offsets = support
    rows = support.entry_rows.clamp(0, max(len(token_ids) - 1, 0))
    outside = (ids < 0) | (ids >= vocab)
    found = torch.zeros(len(token_ids), dtype=torch.int32, device=ids.device)
    if len(token_ids) > 0:
        found.index_add_(0, rows, (ids == token_ids[rows]).int())
    missing = (found == 0) & (offsets.diff() > 0)
    if mask is not None:
        missing &= mask
        outside &= mask[rows] if len(mask) > 0 else False
    return outside, missing


def outside_of(support: Support, vocab: int, rows: Tensor | None = None) -> Tensor:
    """(n, V), True where an id is not in the token's set, without a synchronisation.

    Args:
        rows: (n,), the tokens, all by default. Those from N on are padding, and have everything outside.
    """
    ids, offsets = support
    count = len(offsets) - 1
    device = ids.device
    limited = torch.nn.functional.pad(offsets.diff() > 0, (0, 1), value=True)
    at = support.entry_rows
    if rows is None:
        size, limited = count, limited[:count]
    else:
        size, limited = len(rows), limited[rows]
        place = torch.full((count + 1,), size, dtype=torch.int64, device=device)  # row `size` takes what is not asked
        place[rows] = torch.arange(size, device=device)
        at = torch.where(at < count, place[at.clamp(0, count)], size)
    outside = torch.zeros(size + 1, vocab, dtype=torch.bool, device=device)
    outside[:size] = limited[:, None]
    outside.index_put_((at, ids.clamp(0, vocab - 1)), torch.zeros((), dtype=torch.bool, device=device))
    return outside[:size]


def fill_outside(logits: Tensor, support: Support, rows: Tensor | slice, value: float) -> None:
    """logits[i, j] = value where id j is not in the set of token rows[i].

    Args:
        rows: (n,), or a slice of tokens. Rows from N on are padding, and become `value`.
    """
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=logits.device)
    if not values_are_free(support.offsets):  # each mask reads all of the entries, because their number is not known
        logits.masked_fill_(outside_of(support, logits.shape[1], rows), value)
        return
    step = max(BLOCK_LOGITS // logits.shape[1], 1)
    for block, tokens in zip(logits.split(step), rows.split(step), strict=True):
        _fill_block(block, support, tokens, value)


def _fill_block(logits: Tensor, support: Support, rows: Tensor, value: float) -> None:
    """`fill_outside` by a copy of the entries of these sets, which is written back."""
    ids, offsets = support
    vocab, count = logits.shape[1], len(offsets) - 1
    begins, ends = offsets[rows.clamp(max=count)], offsets[(rows + 1).clamp(max=count)]
    sizes = ends - begins  # 0 for padding
    size = int(sizes.sum())
    if begins[0] + size == ends[-1]:  # the sets follow each other
        kept_ids = ids[int(begins[0]) : int(ends[-1])]
    else:
        kept_ids = ids[torch.repeat_interleave(ends - sizes.cumsum(0), sizes) + torch.arange(size, device=ids.device)]
    row_begins = torch.arange(len(rows), device=ids.device) * logits.stride(0)
    places = torch.repeat_interleave(row_begins, sizes)
    places += kept_ids.clamp(0, vocab - 1)  # sets of masked tokens may have any ids
    flat = logits.as_strided(((len(rows) - 1) * logits.stride(0) + vocab,), (1,))
    kept = flat.index_select(0, places)
    limited = (sizes > 0) | (rows >= count)
    if limited.all():
        logits.fill_(value)
    else:
        logits.masked_fill_(limited[:, None], value)
    flat.index_copy_(0, places, kept)

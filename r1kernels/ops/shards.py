r"""Vocabularies that are sharded over the ranks of a process group.

Each rank has its own rows of the vocabulary, in rank order. From its log-sum-exp lse_r, its entropy H_r and, on the
owner of the token, the log-prob l_r among its own rows, with m = max_r lse_r:

    lse = m + log sum_r e^{lse_r - m},  w_r = e^{lse_r - lse}
    l = l_r + log w_r (of the owner),   H = sum_r w_r (H_r + lse - lse_r)

One all-gather exchanges these three float64 numbers for each token. All ranks then do the same arithmetic in the same
order, so their results have the same bits. With the global lse and H, the gradient kernel gives the gradient of a
rank's own logits.

The kernels expect a token in every row. A row whose token is in another shard gets a substitute, whose entry in
d logits is corrected afterwards.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Facts(NamedTuple):
    """What must be the same on all ranks. Numbers are compared as they are, tensors (0-d, int64) on the device, and
    everything else by a checksum."""

    function: str
    tokens: int
    counted: int | Tensor
    ids: int | Tensor
    width: int
    vocab_size: int
    dtypes: tuple[torch.dtype, ...]
    temperature: float
    gradients: tuple[bool, ...]
    options: tuple[Any, ...]
    normalizer: Any = None


_NAMES = Facts(
    "the function", "the number of tokens", "the number of counted tokens", "the checksum of the token ids", "H",
    "vocab_size", "the dtype", "temperature", "requires_grad", "another option",
    "normalizer",
)
_REFUSED = -1


class Layout(NamedTuple):
    """How a vocabulary is split: the rows of each rank without padding."""

    group: Any
    rank: int
    sizes: tuple[int, ...]

    @property
    def start(self) -> int:
        return sum(self.sizes[: self.rank])

    @property
    def size(self) -> int:
        return self.sizes[self.rank]

    @property
    def vocab(self) -> int:
        return sum(self.sizes)


# ---- agreement of the ranks -------------------------------------------------------------------------------


def checked_group(name: str, value: Any) -> Any:
    """The process group that an argument names, or None."""
    if value is None:
        return None
    distributed, meshes = torch.distributed, sys.modules.get("torch.distributed.device_mesh")
    if meshes is not None and isinstance(value, meshes.DeviceMesh):
        if value.ndim != 1:
            raise ValueError(f"{name} is a mesh of {value.ndim} dimensions, expected one of them, as in mesh['tensor']")
        value = value.get_group()
    if not distributed.is_available() or not isinstance(value, distributed.ProcessGroup):
        raise TypeError(f"{name} is {value!r}, expected a torch.distributed.ProcessGroup of which this rank is a "
                        "member, or a DeviceMesh of one dimension")
    if torch.compiler.is_compiling():
        raise ValueError(f"{name} is given in code that torch.compile traces, expected a call outside of it")
    return value


class Split(NamedTuple):
    """The two keywords, as they were given."""

    process_group: Any
    vocab_size: Any

    def checked(self) -> tuple[Any, int | None]:
        """(the process group, or None if it has one rank; vocab_size)."""
        group, size = self
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"vocab_size is {size!r}, expected a positive integer")
        group = checked_group("process_group", group)
        if group is None:
            return None, size
        return group if torch.distributed.get_world_size(group) > 1 else None, size


NOT_SHARDED = Split(None, None)


@contextlib.contextmanager
def refusals(group: Any, like: Any) -> Iterator[None]:
    """If the checks in this block fail, the other ranks get an error too, instead of waiting for this one."""
    try:
        yield
    except (TypeError, ValueError):
        if group is not None and isinstance(like, Tensor):
            all_gathered(group, torch.full((1 + len(_NAMES),), _REFUSED, dtype=torch.int64, device=like.device))
        raise


def agreed_layout(group: Any, rows: int, facts: Facts, device: torch.device) -> Layout:
    """The layout of a vocabulary of which this rank has `rows` rows, and the check that all ranks make the same call.

    On a CPU, a disagreement is an error on every rank. On another device, only the first call with these sizes waits
    for the device. Later calls compare there, and a disagreement is an error at the next synchronisation.
    """
    numbers = [rows, *map(_number, facts)]
    free = reads_are_free(device)
    if free:
        header = torch.tensor([int(value) for value in numbers])
    else:
        header = torch.stack([
            value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.int64, device=device)
            for value in numbers
        ])
    gathered = all_gathered(group, header)
    known = _known_sizes.setdefault(group, {})
    key = (rows, facts.vocab_size, facts.width, device)
    rank = torch.distributed.get_rank(group)
    if free or key not in known:
        headers = gathered.tolist()
        _compare(headers, dict(zip(_NAMES, facts, strict=True)), rank, "process_group")
        sizes = tuple(header[0] for header in headers)
        if not free:
            known[key] = sizes, torch.tensor(sizes, device=device)
    else:
        sizes, on_device = known[key]
        same = (gathered[:, 1:] == header[1:]).all() & (gathered[:, 0] == on_device).all()
        torch._assert_async(same, "r1kernels: the ranks of process_group disagree on their arguments, or a shard has "
                                  "another size than in the first call")
    return layout_of(sizes, None if facts.vocab_size < 0 else facts.vocab_size, group, rank)


# For each group, the sizes of shards that a first call has read, on the host and on the device. A rank knows the keys
# before it reads.
_known_sizes: weakref.WeakKeyDictionary[Any, dict[Any, tuple[tuple[int, ...], Tensor]]] = weakref.WeakKeyDictionary()


def checksum(token_ids: Tensor, counted: Tensor | None) -> Tensor:
    """A number (0-d, int64) of the ids that count, and of their places. Sums wrap around."""
    values = token_ids.reshape(-1).long() + 1
    values = values if counted is None else torch.where(counted.reshape(-1), values, 0)
    return (values * torch.arange(1, values.numel() + 1, device=values.device)).sum()


def fact_of_normalizer(value: Tensor | float | None) -> Any:
    """A normalizer as one of the `Facts`. Values on a device are not read."""
    if not isinstance(value, Tensor):
        return None if value is None else float(value)
    values = value.detach().double()
    return values.tolist() if reads_are_free(value.device) else checksum(values.view(torch.int64), None)


def reads_are_free(device: torch.device) -> bool:
    """Whether the host may read a tensor without waiting for a device."""
    return device.type == "cpu"


def _number(fact: Any) -> int | Tensor:
    return fact if isinstance(fact, (int, Tensor)) else zlib.crc32(repr(fact).encode())


def agree(group: Any, argument: str, facts: dict[str, Any], device: torch.device) -> None:
    """The check that all ranks of the group that `argument` names have the same facts: on a CPU immediately, on another
    device at the next synchronisation."""
    header = torch.tensor([0, *map(_number, facts.values())], device=device)
    header = torch.nn.functional.pad(header, (0, 1 + len(_NAMES) - len(header)))  # as long as that of a refusal
    gathered = all_gathered(group, header, argument)
    if reads_are_free(device):
        _compare(gathered.tolist(), facts, torch.distributed.get_rank(group), argument)
    else:
        same = (gathered == header).all()
        torch._assert_async(same, f"r1kernels: the ranks of {argument} disagree on their arguments")


def _compare(headers: list[list[int]], facts: dict[str, Any], rank: int, argument: str) -> None:
    for other, header in enumerate(headers):
        if header[0] == _REFUSED:
            raise ValueError(f"rank {other} of {argument} raised an error about its arguments, expected valid "
                             "arguments on all ranks")
    for place, (name, fact) in enumerate(facts.items(), start=1):
        for other, header in enumerate(headers):
            if header[place] == headers[rank][place]:
                continue
            here, there = headers[rank][place], header[place]
            if not isinstance(fact, (int, Tensor)):
                here, there = fact, "different"
            elif name == "vocab_size":
                here, there = (None if value < 0 else value for value in (here, there))
            elif name == "normalizer":
                here, there = "a tensor", "different"
            raise ValueError(f"{name} is {here} on rank {rank} of {argument} and {there} on rank {other}, expected "
                             "the same on all ranks")


def layout_of(sizes: tuple[int, ...], vocab_size: int | None, group: Any = None, rank: int = 0) -> Layout:
    """The layout of shards that have so many rows, with padding."""
    if vocab_size is None:
        vocab_size = sum(sizes)
        if vocab_size == 0:
            raise ValueError("the vocabulary has no rows on any rank, expected V >= 1")
    elif vocab_size > sum(sizes):
        raise ValueError(f"vocab_size is {vocab_size}, expected at most the number of rows on all ranks, {sum(sizes)}")
    kept = (min(max(vocab_size - sum(sizes[:before]), 0), size) for before, size in enumerate(sizes))
    return Layout(group, rank, tuple(kept))


def all_gathered(group: Any, value: Tensor, argument: str = "process_group") -> Tensor:
    """(ranks, ...): the values of all ranks."""
    out = value.new_empty(torch.distributed.get_world_size(group), *value.shape)
    with collective(f"an exchange of {value.numel()} numbers", group, argument):
        torch.distributed.all_gather(list(out.unbind(0)), value.contiguous(), group=group)
    return out


@contextlib.contextmanager
def collective(what: str, group: Any, argument: str = "process_group") -> Iterator[None]:
    """An error in this block says what the ranks of a group, or a list of ranks, were doing. This costs no
    synchronisation: on a GPU, a collective fails later, and the watchdog of NCCL reports it."""
    try:
        yield
    except RuntimeError as error:
        ranks = group if isinstance(group, list) else torch.distributed.get_process_group_ranks(group)
        raise RuntimeError(
            f"r1kernels: {what} between the ranks {ranks} of {argument} failed on rank {torch.distributed.get_rank()}. "
            "A rank has ended, or did not make the same call within the time limit of the group. The backend says: "
            f"{error}"
        ) from error


# ---- the tokens of a call ---------------------------------------------------------------------------------


class Shard:
    """The tokens of a call, flattened to (N,), as this rank sees them.

    Attributes:
        ids: ids among this rank's rows; a substitute where another rank has the token. owned: where this rank has it.
    """

    owner: Tensor

    def __init__(self, layout: Layout, token_ids: Tensor, mask: Tensor | None) -> None:
        self.layout = layout
        ids, sizes = token_ids.reshape(-1), layout.sizes
        if not reads_are_free(ids.device):
            inside = (ids >= 0) & (ids < layout.vocab)
            torch._assert_async(
                (inside if mask is None else inside | ~mask.reshape(-1)).all(),
                f"r1kernels: a token id is out of range, expected an id in [0, {layout.vocab})",
            )
        self.owner = torch.zeros_like(ids)
        for rank in range(1, len(sizes)):
            self.owner += ids >= sum(sizes[:rank])
        self.owned: Tensor = (ids >= layout.start) & (ids < layout.start + layout.size)
        # Substitutes are spread over the rows, as ids are.
        self.ids: Tensor = torch.where(self.owned, ids - layout.start, ids.remainder(max(layout.size, 1)))

    def merged(
        self, logprob: Tensor, lse: Tensor, entropy: Tensor, rows: Tensor | slice = slice(None)
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The statistics (n,), float64, of some tokens over the whole vocabulary, from those of this rank's rows."""
        if logprob.numel() == 0:  # on all ranks
            return logprob.double(), lse, entropy
        logprob, lse, entropy = all_gathered(self.layout.group, torch.stack([logprob.double(), lse, entropy])).unbind(1)
        return merge(logprob, lse, entropy, self.owner[rows])

    def add_up(self, value: Tensor) -> None:
        """Replaces the value of each rank by their sum."""
        if value.numel() == 0:  # on all ranks
            return
        with collective("a sum of gradients", self.layout.group):
            torch.distributed.all_reduce(value, group=self.layout.group)


def merge(logprob: Tensor, lse: Tensor, entropy: Tensor, owner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-prob, log-sum-exp, entropy) (n,) from those of each rank (ranks, n); `owner` (n,) has the token."""
    total, log_share = shares(lse)
    nowhere = (lse == -torch.inf) & (total > -torch.inf)  # all logits of the shard are -inf, or there are none
    own = owner[None]
    merged = (logprob + log_share).gather(0, own).squeeze(0)
    merged = torch.where(nowhere.gather(0, own).squeeze(0), -torch.inf, merged)
    return merged, total, merged_entropy(lse, entropy)


def merge_more(shard: Shard, lse: Tensor, more: Tensor, rows: slice = slice(None)) -> Tensor:
    """More statistics (4, n) over the whole vocabulary: the sum of p^2, the mean of z, the largest z, and 1 where that
    is the token's. `lse` (n,) and `more` (4, n), float64, are those of this rank's rows, for some tokens."""
    if lse.numel() == 0:  # on all ranks
        return more
    gathered = all_gathered(shard.layout.group, torch.cat([lse[None], more]))
    lse, sum_sq, mean, largest, is_top1 = gathered.unbind(1)
    total, log_share = shares(lse)
    nowhere = (lse == -torch.inf) & (total > -torch.inf)
    sum_sq = torch.where(nowhere, 0, (2 * log_share).exp() * sum_sq).sum(0)
    sizes = shard.layout.sizes
    mean = sum(value * (size / sum(sizes)) for value, size in zip(mean, sizes, strict=True) if size > 0)
    ranks, owner = torch.arange(len(sizes), device=lse.device)[:, None], shard.owner[None, rows]
    top = largest.gather(0, owner)
    ahead = torch.where(ranks < owner, largest >= top, (ranks > owner) & (largest > top)).any(0)
    is_top1 = is_top1.gather(0, owner).squeeze(0) * (~ahead & ~total.isnan())
    return torch.stack([sum_sq, mean, largest.amax(0), is_top1])


def shares(lse: Tensor) -> tuple[Tensor, Tensor]:
    """The log-sum-exp over all ranks (n,), and the log of the probability of each rank's rows (ranks, n)."""
    top, where = lse.max(0)
    powers = (lse - top).exp()
    # Without the largest term, which is 1: a log-prob near 0 keeps its relative accuracy.
    total = torch.log1p(powers.scatter(0, where[None], 0).sum(0))
    return top + total, lse - top - total


def merged_entropy(lse: Tensor, entropy: Tensor) -> Tensor:
    """The entropy over all ranks (n,) from that of each rank (ranks, n)."""
    total, log_share = shares(lse)
    nowhere = (lse == -torch.inf) & (total > -torch.inf)
    return torch.where(nowhere, 0, log_share.exp() * (entropy - log_share)).sum(0)


def correct_substitutes(grad_logits: Tensor, ids: Tensor, owned: Tensor, exact: Tensor) -> None:
    """Sets the entries of substitute tokens in d logits (n, V) to `exact` (n,)."""
    values = torch.where(owned, grad_logits.gather(1, ids[:, None]).squeeze(1), exact.to(grad_logits.dtype))
    # On a CPU, scatter_ takes a pass over all of a 16-bit matrix.
    grad_logits.index_put_((torch.arange(len(ids), device=ids.device), ids), values)

"""Packed rows and micro-batches: which samples are computed together, without padding, and on which rank.

Samples are packed into rows without attention across them: positions restart at 0 in each sample, and for most
architectures `transformers` then keeps attention inside it (see `keeps_apart`).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from r1kernels.train.model import hidden_states

IGNORED = -100  # the target of a token that is not learned


class Sample(NamedTuple):
    """Tokens (int32). `first` is the position of the first learned token. It is at least 1: token 0 has no context."""
    ids: Tensor
    first: int


Rows = list[list[Sample]]


def micro_batches(sizes: Sequence[int], limit: int | None, ranks: int) -> list[list[list[int]]]:
    """Places of items, as micro-batches of every rank: each has about the same size, and at most `limit` if no single
    item is larger. All ranks have the same number of micro-batches; one may be empty if there are few items."""
    count, order = 1, sorted(range(len(sizes)), key=lambda place: -sizes[place])
    if limit is not None:
        count = max(1, min(-(-sum(sizes) // limit), len(sizes)) // ranks)
    while True:
        bins = [(0, number, list[int]()) for number in range(count * ranks)]
        for place in order:  # the largest first, each into the emptiest bin
            total, number, places = heapq.heappop(bins)
            places.append(place)
            heapq.heappush(bins, (total + sizes[place], number, places))
        if limit is None or count * ranks >= len(sizes) or max(total for total, _, _ in bins) <= limit:
            filled = [sorted(places) for _, _, places in sorted(bins, key=lambda item: item[1])]
            return [filled[number::ranks] for number in range(ranks)]
        count += 1


def row_length(row: Sequence[Sample]) -> int:
    """The number of tokens in a row."""
    return sum(len(sample.ids) for sample in row)


def pack(samples: Sequence[Sample], window: int) -> Rows:
    """Rows of at most `window` tokens. Longest first, each sample goes into the first row with room, or a new one."""
    rows: Rows = []
    room: list[int] = []
    for sample in sorted(samples, key=lambda sample: len(sample.ids), reverse=True):
        number = next((number for number, left in enumerate(room) if len(sample.ids) <= left), len(rows))
        if number == len(rows):
            rows.append([])
            room.append(window)
        rows[number].append(sample)
        room[number] -= len(sample.ids)
    return rows


def collate(rows: Rows, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of the model and targets, each (rows, longest row): the next token if it is learned, else `IGNORED`."""
    shape = len(rows), max(map(row_length, rows))
    padding = torch.zeros(shape[1], dtype=torch.int32)
    samples = [sample for row in rows for sample in (*row, Sample(padding[row_length(row) :], shape[1]))]
    places = [torch.arange(len(ids)) for ids, _ in samples]
    learned = torch.cat([place >= first for place, (_, first) in zip(places, samples, strict=True)])
    ids, positions = torch.cat([ids for ids, _ in samples]).long(), torch.cat(places)
    targets = ids.where(learned, IGNORED).roll(-1)  # it may cross the ends of rows: first tokens are never learned
    ids, positions, targets = (column.view(shape).to(device) for column in (ids, positions, targets))
    return {"input_ids": ids, "position_ids": positions}, targets


@torch.no_grad()
def keeps_apart(model: PreTrainedModel) -> bool:
    """Whether samples in one row do not see each other. For example, recurrent models ignore positions."""
    ids = torch.arange(12, dtype=torch.int32) % model.get_input_embeddings().num_embeddings
    row = [Sample(ids[:6], 1), Sample(ids[6:], 1)]
    together, alone = (hidden_states(model, **collate([some], model.device)[0])[0, -6:] for some in (row, row[1:]))
    # The limit is far above rounding, and far below the effect of one sample on the next.
    limit = max(1e-3, 8 * torch.finfo(alone.dtype).eps)
    return bool((together - alone).abs().max() <= limit * alone.abs().max())

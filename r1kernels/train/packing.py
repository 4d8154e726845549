"""Samples packed into rows, without padding between them and without attention across them.

The rows of a step depend only on its samples, so a resumed run packs like an uninterrupted one. Positions restart at 0
in each sample. For most architectures, `transformers` then keeps attention inside the sample (see `keeps_apart`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from r1kernels.train.errors import DataError
from r1kernels.train.model import hidden_states
from r1kernels.train.rollout import prompt_tokens

IGNORED = -100


class Sample(NamedTuple):
    """Tokens (int32). `first` is the position of the first learned token. It is at least 1: token 0 has no context."""
    ids: Tensor
    first: int


Rows = list[list[Sample]]


def size(row: Sequence[Sample]) -> int:
    """The number of tokens in a row."""
    return sum(len(sample.ids) for sample in row)


def encode(tokenizer: Tokenizer, texts: Iterable[tuple[str, str]], at_once: int = 1024) -> Iterator[Sample]:
    """(prompt, completion) pairs as tokens. Each part is encoded separately, as in a rollout; then an end token."""
    texts = iter(texts)
    while some := list(itertools.islice(texts, at_once)):
        prompts, completions = zip(*some, strict=True)
        written = tokenizer(list(completions), add_special_tokens=False)["input_ids"]
        for prompt, completion in zip(prompt_tokens(tokenizer, prompts), written, strict=True):
            ids = torch.tensor([*prompt, *completion, tokenizer.eos_token_id], dtype=torch.int32)
            yield Sample(ids, max(1, len(prompt)))


def pack(samples: Sequence[Sample], window: int) -> Rows:
    """Rows of at most `window` tokens. Longest first, each sample goes into the first row with room, or a new one."""
    rows: Rows = []
    for sample in sorted(samples, key=lambda sample: len(sample.ids), reverse=True):
        row = next((row for row in rows if size([*row, sample]) <= window), None)
        if row is None:
            rows.append(row := [])
        row.append(sample)
    return rows


def fill(documents: Iterator[tuple[str, str]], tokenizer: Tokenizer, count: int, window: int) -> Rows:
    """`count` rows of exactly `window` tokens, filled with (head, tail) documents. The last one of a row is cut off."""
    rows: Rows = [[]]
    for document in encode(tokenizer, documents, 2 * count):
        rows[-1].append(Sample(document.ids[: window - size(rows[-1])], 1))
        if size(rows[-1]) == window:
            if len(rows) == count:
                return rows
            rows.append([])
    raise DataError("the corpus ended before the rows of a step were full; it must yield documents without end")


def collate(rows: Rows, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of the model and targets, each (rows, longest row): the next token if it is learned, else `IGNORED`."""
    shape = len(rows), max(map(size, rows))
    padding = torch.zeros(shape[1], dtype=torch.int32)
    samples = [sample for row in rows for sample in (*row, Sample(padding[size(row) :], shape[1]))]
    places = [torch.arange(len(ids)) for ids, _ in samples]
    learned = torch.cat([place >= first for place, (_, first) in zip(places, samples, strict=True)])
    ids, positions = torch.cat([ids for ids, _ in samples]).long(), torch.cat(places)
    targets = ids.where(learned, IGNORED).roll(-1)  # it may cross the ends of rows: first tokens are never learned
    ids, positions, targets = (column.view(shape).to(device) for column in (ids, positions, targets))
    return {"input_ids": ids, "position_ids": positions}, targets


@torch.no_grad()
def keeps_apart(model: PreTrainedModel) -> bool:
    """Whether samples in one row do not see each other. For example, recurrent models ignore positions."""
    ids = torch.arange(12, dtype=torch.int32) % model.get_output_embeddings().weight.shape[0]
    row = [Sample(ids[:6], 1), Sample(ids[6:], 1)]
    together, alone = (hidden_states(model, **collate([some], model.device)[0])[0, -6:] for some in (row, row[1:]))
    # The limit is far above rounding, and far below the effect of one sample on the next.
    return bool((together - alone).abs().max() <= 1e-3 * alone.abs().max())

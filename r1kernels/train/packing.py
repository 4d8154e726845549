"""Samples packed into rows, without padding between them and without attention across them.

The rows of a step follow from its samples alone, so a resumed run packs like an uninterrupted one. Positions restart at
0 with each sample, by which `transformers` keeps attention inside it for most architectures. `keeps_apart` finds out
for which; with the others, each sample has its own row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r1kernels.train.errors import DataError
from r1kernels.train.model import hidden_states
from r1kernels.train.rollout import prompt_tokens

IGNORED = -100
_AT_ONCE = 1024
# Share of the largest hidden state: far above rounding, far below the effect of one sample on the next.
_APART = 1e-3


@dataclass(frozen=True)
class Tokens:
    """A sample as tokens (int32): the prompt, and after it what is learned."""

    ids: np.ndarray
    prompt_length: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def learned(self) -> int:
        """How many tokens are learned. The first token of a text cannot be: nothing comes before it."""
        return len(self.ids) - max(1, self.prompt_length)


def encode(tokenizer: PreTrainedTokenizerBase, samples: Sequence[tuple[str, str]]) -> list[Tokens]:
    """(prompt, completion) pairs as tokens: each part encoded separately, as in a rollout, then an end token."""
    encoded = []
    for start in range(0, len(samples), _AT_ONCE):
        prompts, completions = zip(*samples[start : start + _AT_ONCE], strict=True)
        written = tokenizer(list(completions), add_special_tokens=False)["input_ids"]
        encoded += [
            Tokens(np.array([*prompt, *completion, tokenizer.eos_token_id], dtype=np.int32), len(prompt))
            for prompt, completion in zip(prompt_tokens(tokenizer, prompts), written, strict=True)
        ]
    return encoded


def pack(samples: Sequence[Tokens], window: int) -> list[list[Tokens]]:
    """Rows of at most `window` tokens: the longest sample first, each into the first row with room for it.

    With a window of 0, each sample has its own row.
    """
    rows: list[list[Tokens]] = []
    room: list[int] = []
    for sample in sorted(samples, key=len, reverse=True):
        index = next((index for index, left in enumerate(room) if left >= len(sample)), len(rows))
        if index == len(rows):
            rows.append([])
            room.append(window)
        rows[index].append(sample)
        room[index] -= len(sample)
    return rows


def fill(
    documents: Iterator[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, count: int, window: int
) -> list[list[Tokens]]:
    """`count` rows of exactly `window` tokens, filled with (head, tail) documents. The last one of a row is cut off."""
    chunks = iter(lambda: encode(tokenizer, list(itertools.islice(documents, 2 * count))), [])
    stream = itertools.chain.from_iterable(chunks)
    rows: list[list[Tokens]] = [[] for _ in range(count)]
    for row in rows:
        while room := window - sum(map(len, row)):
            document = next(stream, None)
            if document is None:
                raise DataError("the corpus ended before the rows of a step were full; expected documents without end")
            row.append(Tokens(document.ids[:room], 0))
    return rows


def collate(rows: Sequence[Sequence[Tokens]]) -> dict[str, Tensor]:
    """Rows of samples as tensors, each (rows, longest row).

    Returns:
        input_ids; position_ids; targets: column t holds the token after column t where that is learned, and -100
        elsewhere, which is in prompts, at the end of a sample and in the padding.
    """
    width = max(sum(map(len, row)) for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    positions, targets = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for index, row in enumerate(rows):
        start = 0
        for sample in row:
            end = start + len(sample)
            first = end - sample.learned
            ids[index, start:end] = torch.from_numpy(sample.ids)
            positions[index, start:end] = torch.arange(len(sample))
            targets[index, first - 1 : end - 1] = ids[index, first:end]
            start = end
        positions[index, start:] = torch.arange(width - start)  # so the padding is a sample too
    return {"input_ids": ids, "position_ids": positions, "targets": targets}


@torch.no_grad()
def keeps_apart(model: PreTrainedModel) -> bool:
    """Whether samples in one row do not see each other. Recurrent models, for example, ignore positions."""
    generator = np.random.default_rng(0)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    first, second = (Tokens(generator.integers(0, vocabulary, length).astype(np.int32), 1) for length in (7, 5))
    states = []
    for row in ([first, second], [second]):
        batch = collate([row])
        del batch["targets"]
        states.append(hidden_states(model, **{name: value.to(model.device) for name, value in batch.items()})[0])
    together, alone = states[0][len(first) :], states[1]
    return bool((together - alone).abs().max() <= _APART * alone.abs().max())

"""Samples packed into rows, without padding between them and without attention across them.

A batch is a number of samples, as in the paper; its samples share as few rows of at most `window` tokens as first-fit
finds, so the rows of a step follow from its samples alone and a resumed run packs as the first one did. Positions
restart at 0 with each sample, by which `transformers` keeps attention inside for most architectures; `keeps_apart`
finds out, and for the others each sample has a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r1kernels.train.data import DataError
from r1kernels.train.head import hidden_states

IGNORED = -100
_ENCODED_AT_ONCE = 1024
# Of the largest hidden state: far above rounding, far below what a sample does to the next one.
_APART = 1e-3


@dataclass(frozen=True)
class Tokens:
    """A sample as tokens, int32: the prompt, and what is to be learned after it."""

    ids: np.ndarray
    prompt_length: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def learned(self) -> int:
        """How many tokens are learned; one without any before it cannot be."""
        return len(self.ids) - max(1, self.prompt_length)


def encode(tokenizer: PreTrainedTokenizerBase, samples: Sequence[tuple[str, str]]) -> list[Tokens]:
    """(prompt, completion) pairs as tokens, encoded apart as the sampler does it, with the end of text after them."""
    encoded = []
    for start in range(0, len(samples), _ENCODED_AT_ONCE):
        some = samples[start : start + _ENCODED_AT_ONCE]
        prompts = tokenizer([prompt for prompt, _ in some])["input_ids"]
        completions = tokenizer([completion for _, completion in some], add_special_tokens=False)["input_ids"]
        encoded += [
            Tokens(np.array([*prompt, *completion, tokenizer.eos_token_id], dtype=np.int32), len(prompt))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
    return encoded


def fitting(samples: Sequence[Tokens], window: int) -> list[Tokens]:
    """The samples of at most `window` tokens: a sample cut off would teach to stop in mid-sentence, or never to stop.

    Raises:
        DataError: none of them fits.
    """
    kept = [sample for sample in samples if len(sample) <= window]
    if samples and not kept:
        raise DataError(
            f"'window' is {window}, expected at least {min(map(len, samples))}: every sample is longer, in tokens"
        )
    return kept


def pack(lengths: Sequence[int], window: int) -> list[list[int]]:
    """Indices of the samples of each row: the longest first, each into the first row with room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        row = next((row for row, left in enumerate(room) if left >= length), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(window)
        rows[row].append(index)
        room[row] -= length
    return rows


@torch.no_grad()
def keeps_apart(model: PreTrainedModel) -> bool:
    """Whether samples in one row do not see each other: recurrences, ALiBi and positions counted from a mask do not
    heed the positions they are given."""
    generator = np.random.default_rng(0)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    samples = [Tokens(generator.integers(0, vocabulary, length).astype(np.int32), 1) for length in (7, 5)]
    together, alone = collate([samples]), collate([samples[1:]])
    for batch in (together, alone):
        batch.pop("targets")
    states = [hidden_states(model, **{name: value.to(model.device) for name, value in batch.items()})
              for batch in (together, alone)]
    gap = (states[0][0, len(samples[0]):] - states[1][0]).abs().max()
    return bool(gap <= _APART * states[1].abs().max())


def collate(rows: Sequence[Sequence[Tokens]]) -> dict[str, Tensor]:
    """Rows of samples as tensors, each (rows, longest row).

    Returns:
        input_ids, position_ids, and targets, whose column t is the token after column t where that is to be learned,
        and -100 elsewhere: in prompts, at the end of a sample and in the padding, a sample of its own.
    """
    width = max(sum(map(len, row)) for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    positions = torch.zeros_like(ids)
    targets = torch.full_like(ids, IGNORED)
    for index, row in enumerate(rows):
        start = 0
        for sample in row:
            end = start + len(sample)
            ids[index, start:end] = torch.from_numpy(sample.ids)
            first = end - sample.learned
            targets[index, first - 1 : end - 1] = ids[index, first:end]
            positions[index, start:end] = torch.arange(len(sample))
            start = end
        positions[index, start:] = torch.arange(width - start)
    return {"input_ids": ids, "position_ids": positions, "targets": targets}

"""The records that a walk over a head works on: the head, the gradients that are wanted, and a chunk."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """Everything between hidden states and the scores of tokens, checked.

    Attributes:
        weight: (V, H), in the dtype of hidden, or one is float32 and the other has 16 bits. bias: (V,) or None.
        lora_a, lora_b: (H, R) and (R, V), or None.
        token_ids: (N,) int64. temperatures: (N,) float32 or None; they multiply `temperature`.
        softcap: 0 for none. logits_dtype: dtype of a chunk's logits: float32 (float64), or the dtype of hidden.
        rows: rows of a chunk. gradient_rows: rows of the gradient buffer; with 0, d logits replace the logits.
        capacity: the largest number of active rows, -1 for no limit.
    """

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    token_ids: Tensor
    temperatures: Tensor | None
    temperature: float
    logit_scale: float
    softcap: float
    logits_dtype: torch.dtype
    rows: int
    gradient_rows: int
    capacity: int
    batch_invariant: bool

    def with_tensors(
        self, weight: Tensor | None, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None
    ) -> Head:
        """The head with its tensors. autograd passes them separately; the rest of a head is constant. If one is a
        DTensor, the head has its values already, and autograd passes what receives the gradient."""
        given = (weight, bias, lora_a, lora_b)
        own = (other if value is None else value for value, other in zip(self[:4], given, strict=True))
        return Head(*own, *self[4:])

    @property
    def kernel_temperature(self) -> float:
        """Without a soft cap, z = x / (T / scale): the scale costs no pass over the logits."""
        return self.temperature if self.softcap > 0 else self.temperature / self.logit_scale

    @property
    def kernel_scale(self) -> float:
        """The scale by which the gradient must still be multiplied."""
        return self.logit_scale if self.softcap > 0 else 1.0


class Names(NamedTuple):
    """The names of a head's arguments in error messages."""

    hidden: str = "hidden"
    weight: str = "weight"
    options: str = ""  # before the name of an option


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool
    lora_a: bool
    lora_b: bool


class Chunk(NamedTuple):
    rows: Tensor | slice  # rows of the flattened batch; with a capacity, padding is clamped to row N - 1
    write: Tensor | slice  # rows of the results; padding goes to row N
    valid: Tensor | None
    hidden: Tensor  # (n, H), zeros where not valid
    lora_hidden: Tensor | None  # (n, R): hidden A
    token_ids: Tensor
    temperatures: Tensor | None
    logits: Tensor  # (n, V) in the chunk buffer; (0, V) in `Walk.blocks`
    owned: Tensor | None = None  # (n,), of a sharded vocabulary: whether the token is in this rank's rows

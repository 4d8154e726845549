"""Walks over chunks on the CPU as on a GPU, with small buffers, and a count of their products."""

from __future__ import annotations

import contextlib

import pytest
from torch import Tensor

from r1kernels import backend, testing
from r1kernels.ops.linear import budget, options, sums, walk
from r1kernels.ops.linear.budget import BufferRows

TOKENS, VOCAB, WIDTH = 24, 37, 12
CHUNK, BUFFER = 3, 9


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, rows: BufferRows) -> contextlib.AbstractContextManager[None]:
    monkeypatch.setattr(options, "gathers", lambda *_: True)
    monkeypatch.setattr(budget, "rows_of_budget", lambda *_: rows)
    monkeypatch.setattr(walk, "runs_on_gpu", lambda *_: True)
    return backend("reference") if testing.KERNELS == "cpu" else contextlib.nullcontext()


class Products:
    """Rows of the products that give the gradients of hidden and of the weight, in their order, and what wrote dW."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int] = (VOCAB, WIDTH)) -> None:
        self.hidden: list[int] = []
        self.weight: list[int] = []
        self.rounded: list[int] = []
        matmul, add_rounded = sums.matmul, sums.add_rounded

        def counted(a: Tensor, b: Tensor, out: Tensor, **how: bool) -> Tensor:
            if out.shape == shape:
                self.weight.append(a.shape[1])
            elif b.shape == shape:
                self.hidden.append(a.shape[0])
            return matmul(a, b, out, **how)

        def counted_rounded(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
            self.weight.append(a.shape[1])
            self.rounded.append(a.shape[1])
            return add_rounded(a, b, out)

        monkeypatch.setattr(sums, "matmul", counted)
        monkeypatch.setattr(sums, "add_rounded", counted_rounded)

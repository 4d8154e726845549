"""The fused GRPO step by every tile: [blocks of a cluster, warps of a block, vectors of a chunk]."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from gpu.cases.grpo_loss import make_problem
from gpu.losses import compare
from gpu.setting import CUDA, Candidate, Case, Logits, Setting, logits_shapes
from gpu.step import STEP, step
from gpu.timing import Timed

Tile = tuple[int, int, int]
CLUSTERS, WARPS, CHUNKS = (1, 2, 4, 8), (8, 12, 15), (64, 128, 256)


def space(setting: Setting) -> list[Tile]:
    return [(1, 2, 32), (2, 1, 64)] if setting.small else list(itertools.product(CLUSTERS, WARPS, CHUNKS))


def shapes(setting: Setting) -> Iterator[tuple[Logits, torch.dtype]]:
    main = logits_shapes(setting)[0]
    vocabularies = [main.vocab] if setting.small else [main.vocab, 262_144, 32_000]
    for vocab in vocabularies:
        yield Logits(main.tokens, vocab), torch.bfloat16
    yield Logits(main.tokens // 2, main.vocab), torch.float32


def check(inputs: dict[str, Tensor], tile: Tile, expected: list[Tensor], out: Tensor) -> None:
    """Against what the kernel's own choice gives, which `grpo_loss` compares with float64: the first and last rows."""
    for what, found, true in zip(("loss", "gradient"), _ends(inputs, tile, out), expected, strict=True):
        compare(what, found, true, 4 * torch.finfo(true.dtype).eps)


def _ends(inputs: dict[str, Tensor], tile: tuple[int, ...], out: Tensor) -> list[Tensor]:
    loss, *_, grad = step(inputs, tile=tile, out=out)
    return [loss, torch.stack([grad[0, 0], grad[-1, -1]])]


def cases(setting: Setting) -> Iterator[Case]:
    if not setting.gpu_operators or not setting.cuda:
        return
    for shape, dtype in shapes(setting):
        inputs = make_problem(shape, setting, dtype).inputs
        out = torch.empty_like(inputs["logits"])
        expected = _ends(inputs, (), out)
        candidates = {STEP: Candidate(Timed(partial(step, inputs, out=out)))}
        for tile in space(setting):
            try:
                step(inputs, tile=tile, out=out)
            except RuntimeError as error:
                if "does not fit" not in str(error):
                    raise
                continue
            name = f"{CUDA}, tile {tile[0]} x {tile[1]} x {tile[2]}"
            timed = Timed(partial(step, inputs, tile=tile, out=out))
            candidates[name] = Candidate(timed, partial(check, inputs, tile, expected, out))
        yield Case("step tiles", "blocks x warps x vectors", str(shape), dtype, candidates, bytes=2 * out.nbytes)

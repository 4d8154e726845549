"""The fused GRPO step by its operator: by clusters of every size, with and without a mask."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from gpu.cases.grpo_loss import ALL, FLOP, MASKED, by_operator, make_problem, moved_bytes
from gpu.ceilings import copy_of
from gpu.losses import LOSS_ROUNDINGS, compare
from gpu.setting import COPY, CUDA, Candidate, Case, LeftOut, Logits, Setting, logits_shapes
from gpu.step import CLUSTERS, step, tile_of
from gpu.timing import Timed

OP = "fused step"
ROUNDINGS = 4  # by which two ways to cut a row may differ: their sums have another order


def shapes(setting: Setting) -> list[tuple[Logits, torch.dtype]]:
    """Short rows first: one block may hold them."""
    if setting.small:
        return [(logits_shapes(setting)[0], torch.bfloat16)]
    main = logits_shapes(setting)[0]
    return [(Logits(main.tokens, 32_000), torch.bfloat16), (main, torch.bfloat16),
            (Logits(main.tokens // 2, main.vocab), torch.float32)]


def _ends(inputs: dict[str, Tensor], tile: list[int], out: Tensor) -> list[Tensor]:
    """The loss, and the gradients of the first and the last sequence."""
    loss, *_, grad = step(inputs, tile=tile, out=out)
    return [loss, grad[0].clone(), grad[-1].clone()]


def check(inputs: dict[str, Tensor], tile: list[int], out: Tensor, expected: list[Tensor]) -> None:
    """Against what the kernel's own choice gives, which is itself compared with float64."""
    if not expected:
        expected += _ends(inputs, [], out)
    try:
        found = _ends(inputs, tile, out)
    except RuntimeError as error:
        if "does not fit" not in str(error):
            raise
        raise LeftOut(str(error).splitlines()[0]) from None
    for what, value, true in zip(("loss", "first gradient", "last gradient"), found, expected, strict=True):
        roundings = ROUNDINGS * LOSS_ROUNDINGS if what == "loss" else ROUNDINGS
        compare(what, value, true, roundings * torch.finfo(true.dtype).eps)


def case(setting: Setting, shape: Logits, dtype: torch.dtype, rows: str) -> Case:
    problem, plain = make_problem(shape, setting, dtype, rows)
    logits = problem.inputs["logits"]
    candidates = {COPY: copy_of(logits), **by_operator(problem, plain)}
    out, expected = torch.empty_like(logits), []
    for cluster in CLUSTERS:
        tile = tile_of(cluster)
        timed = Timed(partial(step, problem.inputs, tile=tile, out=out))
        name = f"{CUDA}, cluster of {cluster}"
        candidates[name] = Candidate(timed, partial(check, problem.inputs, tile, out, expected))
    return Case(
        OP, rows, str(shape), dtype, candidates, bytes=moved_bytes(problem), flop=FLOP * logits.numel(),
        inherent_bytes=logits.nbytes,
    )


def cases(setting: Setting) -> Iterator[Case]:
    if not setting.fused_step:
        return
    for shape, dtype in shapes(setting):
        for rows in (ALL, MASKED):
            yield case(setting, shape, dtype, rows)

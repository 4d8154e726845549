"""GRPO loss forward and backward from logits: of two vocabulary kernels, and fused to one read and one write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import r1kernels
from gpu import eager
from gpu.cases.token_stats import GRADIENT_FLOP, STATISTICS_FLOP
from gpu.ceilings import copy_of
from gpu.inputs import (
    alternating,
    completion_mask,
    make_logits,
    noise_like,
    packed_bounds,
    sequences,
    uniform_ids,
)
from gpu.losses import LossFunction, Problem, Truth, check, compare, loss_case, with_eager
from gpu.setting import COPY, OURS, Candidate, Case, Logits, Setting, logits_shapes, peers, step_shapes, with_cuda
from gpu.step import IN_PLACE, STEP, loss_by_operator, step
from gpu.timing import Timed
from r1kernels.bench.eager import CLIP
from r1kernels.bench.peers import named

FACTOR = 0.5  # of the loss, where a gradient is multiplied by it afterwards
FLOP = STATISTICS_FLOP + GRADIENT_FLOP
ALL, MASKED, PACKED = "every token", "prompts and padding masked", "packed sequences"


def ours(
    logits: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor, mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    return r1kernels.grpo_loss(
        logits, token_ids, advantages, old_logprobs=old_logprobs, mask=mask, cu_seqlens=cu_seqlens
    ).loss


def _liger() -> LossFunction:
    """Takes logits of one position more than tokens, and drops the last."""
    loss = named("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")

    def run(logits: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor) -> Tensor:
        longer = torch.cat([logits, logits[:, :1]], 1)
        return loss(
            longer, old_logprobs, None, token_ids, advantages, temperature=1.0, beta=0.0, eps_low=CLIP,
            eps_high=CLIP, inplace=False, loss_type="grpo", reduce=True,
        )[0]

    return run


def make_problem(
    shape: Logits, setting: Setting, dtype: torch.dtype = torch.bfloat16, rows: str = ALL
) -> tuple[Problem, LossFunction]:
    """Inputs, and the loss in plain torch. `rows`: `ALL`, `MASKED` (about 65 % count), or `PACKED`."""
    b, t = sequences(shape.tokens)
    logits = make_logits(shape, dtype, setting.device)
    ids = uniform_ids(shape.tokens, shape.vocab, setting.device)
    with torch.no_grad():
        logprobs = r1kernels.token_logprobs(logits, ids)
    old, advantages = logprobs + noise_like(logprobs, 0.1), alternating(b, setting.device)
    names = ("logits", "token_ids", "advantages", "old_logprobs")
    inputs = {"logits": logits, "token_ids": ids, "advantages": advantages, "old_logprobs": old}
    if rows == PACKED:
        inputs["cu_seqlens"] = packed_bounds(shape.tokens, b, setting.device)
        return Problem(inputs, ("logits",), names, ("logits", "token_ids", "old_logprobs")), eager.packed_grpo_loss
    inputs |= {"logits": logits.view(b, t, -1), "token_ids": ids.view(b, t), "old_logprobs": old.view(b, t)}
    if rows == MASKED:
        inputs["mask"] = completion_mask(b, t, setting.device)
        names = (*names, "mask")
    return Problem(inputs, ("logits",), names), eager.grpo_loss


def moved_bytes(problem: Problem) -> int:
    """One read of the logits whose tokens count, and one write of the whole gradient: the least that any kernel
    moves."""
    logits, mask = problem.inputs["logits"], problem.inputs.get("mask")
    counted = logits.nbytes if mask is None else int(mask.sum()) * logits.shape[-1] * logits.itemsize
    return counted + logits.nbytes


def by_operator(problem: Problem, plain: LossFunction) -> dict[str, Candidate]:
    """The fused step into fresh memory, and over the logits."""
    work = torch.empty_like(problem.inputs["logits"])
    inputs = problem.inputs | {"logits": work}
    in_place = Timed(lambda: step(inputs, out=work), prepare=lambda: work.copy_(problem.inputs["logits"]))
    truth = Truth(problem, plain, ours, few=1)
    return {
        name: Candidate(timed, partial(check, function, truth, name))
        for name, timed, function in (
            (STEP, Timed(lambda: step(problem.inputs)), loss_by_operator()),
            (IN_PLACE, in_place, loss_by_operator(in_place=True)),
        )
    }


def scaled_case(setting: Setting, logits: Tensor, shape: Logits) -> Case:
    """What the backward of the fused step adds where the loss has a factor."""
    factor, out = torch.tensor(FACTOR, device=logits.device), torch.empty_like(logits)

    def run() -> None:
        torch.ops.r1kernels.scaled(logits, factor, out, False)

    def check_scaled() -> None:
        run()
        compare("the product", out[:1], FACTOR * logits[:1].double(), torch.finfo(logits.dtype).eps)

    candidates = with_cuda({OURS: Candidate(Timed(run), check_scaled)}, setting)
    candidates[COPY] = copy_of(logits)
    return Case("scaled", "by a factor", str(shape), logits.dtype, candidates, bytes=2 * logits.nbytes)


def _case(
    setting: Setting, shape: Logits, dtype: torch.dtype, rows: str, others: Callable[[], dict[str, LossFunction]]
) -> Case:
    problem, plain = make_problem(shape, setting, dtype, rows)
    logits = problem.inputs["logits"]
    extra = by_operator(problem, plain) if setting.fused_step else {}
    if shape.main:
        extra[COPY] = copy_of(logits)
    name = "forward + backward" if rows == ALL else f"forward + backward, {rows}"
    return loss_case(
        "grpo_loss", name, shape, dtype, problem, {OURS: ours, **others()}, plain, few=1, extra=extra, cuda=setting,
        bytes=moved_bytes(problem), flop=FLOP * logits.numel(), inherent_bytes=logits.nbytes,
    )


def cases(setting: Setting) -> Iterator[Case]:
    for shape, dtype in step_shapes(setting):

        def others(shape: Logits = shape, dtype: torch.dtype = dtype) -> dict[str, LossFunction]:
            if dtype != torch.bfloat16 or shape not in logits_shapes(setting):
                return {}
            liger = peers(setting, {"Liger (copies the logits)": _liger})
            return liger | with_eager(eager.grpo_loss, setting, also_compiled=shape.main)

        yield _case(setting, shape, dtype, ALL, others)
        if shape.main and dtype == torch.bfloat16:
            for rows in (MASKED, PACKED):
                yield _case(setting, shape, dtype, rows, dict)
            if setting.gpu_operators:
                yield scaled_case(setting, make_logits(shape, dtype, setting.device), shape)

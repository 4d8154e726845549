"""GRPO loss forward and backward from logits: of two vocabulary kernels, and fused to one read and one write."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import r1kernels
from gpu import eager
from gpu.cases.token_stats import GRADIENT_FLOP, STATISTICS_FLOP
from gpu.inputs import alternating, make_logits, noise_like, sequences, uniform_ids
from gpu.losses import LossFunction, Problem, check, compare, loss_case, with_compiled
from gpu.setting import COPY, OURS, Candidate, Case, Logits, Setting, logits_shapes, peers, step_shapes, with_cuda
from gpu.step import IN_PLACE, STEP, loss_by_operator, step
from gpu.timing import Timed

FACTOR = 0.5  # of the loss, where a gradient is multiplied by it afterwards


def ours(logits: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor) -> Tensor:
    return r1kernels.grpo_loss(logits, token_ids, advantages, old_logprobs=old_logprobs).loss


def _liger() -> LossFunction:
    """Takes logits of one position more than tokens, and drops the last."""
    loss = __import__("liger_kernel.transformers.grpo_loss", fromlist=["grpo_loss"]).triton_grpo_loss

    def run(logits: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor) -> Tensor:
        longer = torch.cat([logits, logits[:, :1]], 1)
        return loss(
            longer, old_logprobs, None, token_ids, advantages, temperature=1.0, beta=0.0, eps_low=eager.CLIP,
            eps_high=eager.CLIP, inplace=False, loss_type="grpo", reduce=True,
        )[0]

    return run


def make_problem(shape: Logits, setting: Setting, dtype: torch.dtype = torch.bfloat16) -> Problem:
    b, t = sequences(shape.tokens)
    logits = make_logits(shape, dtype, setting.device)
    ids = uniform_ids(shape.tokens, shape.vocab, setting.device)
    with torch.no_grad():
        logprobs = r1kernels.token_logprobs(logits, ids)
    return Problem(
        {
            "logits": logits.view(b, t, -1), "token_ids": ids.view(b, t), "advantages": alternating(b, setting.device),
            "old_logprobs": (logprobs + noise_like(logprobs, 0.1)).view(b, t),
        },
        leaves=("logits",), rows=("logits", "token_ids", "advantages", "old_logprobs"),
    )


def by_operator(problem: Problem) -> dict[str, Candidate]:
    """The fused step into fresh memory, and over the logits."""
    work = torch.empty_like(problem.inputs["logits"])
    inputs = problem.inputs | {"logits": work}
    in_place = Timed(lambda: step(inputs, out=work), prepare=lambda: work.copy_(problem.inputs["logits"]))
    return {
        name: Candidate(timed, partial(check, function, eager.grpo_loss, problem, 1, name, ours))
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
    candidates[COPY] = Candidate(Timed(lambda: out.copy_(logits)))
    return Case("scaled", "by a factor", str(shape), logits.dtype, candidates, bytes=2 * logits.nbytes)


def cases(setting: Setting) -> Iterator[Case]:
    for shape, dtype in step_shapes(setting):
        problem = make_problem(shape, setting, dtype)
        logits = problem.inputs["logits"]
        functions, extra = {OURS: ours}, {}
        if dtype == torch.bfloat16 and shape in logits_shapes(setting):
            functions |= with_compiled(eager.grpo_loss, setting.compiled and shape.main)
            functions |= peers(**{"Liger_(copies_the_logits)": _liger})
        if setting.gpu_operators and setting.cuda:
            extra |= by_operator(problem)
        if shape.main:
            target = torch.empty_like(logits)
            extra[COPY] = Candidate(Timed(lambda target=target, logits=logits: target.copy_(logits)))
        # One read of the logits and one write of their gradient are what no implementation can do without.
        yield loss_case(
            "grpo_loss", "forward + backward", shape, logits.dtype, problem, functions, eager.grpo_loss, few=1,
            extra=extra, cuda=setting, bytes=2 * logits.nbytes,
            flop=(STATISTICS_FLOP + GRADIENT_FLOP) * logits.numel(), inherent_bytes=logits.nbytes,
        )
        del extra
        if shape.main and setting.gpu_operators:
            yield scaled_case(setting, logits.flatten(0, 1), shape)

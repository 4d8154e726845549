"""GRPO loss forward and backward from logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import r1kernels
from gpu import eager
from gpu.cases.token_stats import GRADIENT_FLOP, STATISTICS_FLOP
from gpu.inputs import alternating, make_logits, noise_like, sequences, uniform_ids
from gpu.losses import LossFunction, Problem, loss_case, with_compiled
from gpu.setting import OURS, Case, Logits, Setting, logits_shapes, peers


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


def make_problem(shape: Logits, setting: Setting) -> Problem:
    b, t = sequences(shape.tokens)
    logits = make_logits(shape, torch.bfloat16, setting.device)
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


def cases(setting: Setting) -> Iterator[Case]:
    for shape in logits_shapes(setting):
        problem = make_problem(shape, setting)
        functions = {
            OURS: ours, **with_compiled(eager.grpo_loss, setting.compiled and shape.main),
            **peers(**{"Liger_(copies_the_logits)": _liger}),
        }
        logits = problem.inputs["logits"]
        yield loss_case(
            "grpo_loss", "forward + backward", shape, logits.dtype, problem, functions, eager.grpo_loss, few=1,
            bytes=3 * logits.nbytes, flop=(STATISTICS_FLOP + GRADIENT_FLOP) * logits.numel(),
            inherent_bytes=logits.nbytes,
        )

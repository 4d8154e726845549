"""A student and a teacher given by hidden states, and the dense loss in float64."""

from __future__ import annotations

from typing import Any

import linear_cases as cases
import torch
from torch import Tensor

from r1kernels import DistillationLoss, backend, distillation_loss, linear_distillation_loss, testing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OF_TEACHERS = ("bias", "lora", "logit_scale", "softcap")
MASK = torch.tensor([1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 0, 1]).bool().reshape(3, 5)


class Case:
    """A student of width 12 and a teacher of width 9 over 37 tokens, or its 5 likeliest ones."""

    def __init__(
        self, student: str = "plain", teacher: str = "plain", k: int | None = None, kind: str = "forward_kl",
        dtype: torch.dtype = torch.float32, teacher_dtype: torch.dtype | None = None, lead: tuple[int, ...] = (3, 5),
        temperature: float = 0.8, mask: Tensor | None = None, vocab: int = 37, width: int = 12,
        weight_dtypes: tuple[torch.dtype | None, torch.dtype | None] = (None, None),
        choice: dict[str, Any] | None = None,
    ) -> None:
        self.student, self.teacher = (
            {n: v for n, v in case.items() if n not in ("token_ids", "temperature")}
            for case in (
                cases.make(student, *lead, dtype=dtype, vocab=vocab, width=width, weight_dtype=weight_dtypes[0]),
                cases.make(teacher, *lead, dtype=teacher_dtype or dtype, width=9, seed=3, vocab=vocab,
                           weight_dtype=weight_dtypes[1]),
            )
        )
        self.settings = {"divergence": kind, "beta": 0.3, "temperature": temperature, "mask": mask}
        teacher_logits = cases.logits(self.teacher)[1].reshape(*lead, vocab)
        if k is None:
            self.dense: dict[str, Any] = {"teacher_logits": teacher_logits}
            self.given: dict[str, Any] = {
                "teacher_hidden": self.teacher["hidden"],
                "teacher_weight": self.teacher["weight"],
                "teacher_options": {name: v for name, v in self.teacher.items() if name in OF_TEACHERS},
            }
            if choice is not None:  # top_k, top_k_of and tail
                self.dense, self.given = (given | choice for given in (self.dense, self.given))
        else:
            ids, logprobs = testing.random_topk(teacher_logits, k, temperature)
            self.dense = self.given = {"teacher_token_ids": ids, "teacher_logprobs": logprobs}

    def ours(self, **named: Any) -> DistillationLoss:
        """The arguments of the student, by the names `linear_cases` has for them."""
        hidden, weight = named.pop("hidden"), named.pop("weight")
        return linear_distillation_loss(hidden, weight, **self.given | self.settings | named)

    def run(self, factor: float = 1.0, **keywords: Any) -> tuple[DistillationLoss, dict[str, Tensor]]:
        return cases.gradients(self.ours, self.student, lambda result: factor * result.loss, **keywords)

    def exact(self, factor: float = 1.0, **more: Any) -> tuple[DistillationLoss, dict[str, Tensor]]:
        """`distillation_loss` of dense float64 logits, through autograd."""
        wide = cases.with_tensors(self.student, {n: v.double() for n, v in cases.tensors(self.student).items()})

        def dense(**named: Any) -> DistillationLoss:
            return distillation_loss(logits_of(**named), **self.dense | self.settings | more)

        with backend("reference"):
            return cases.gradients(dense, wide, lambda result: factor * result.loss)


def logits_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, lora: tuple[Tensor, Tensor] | None = None,
    logit_scale: float = 1.0, softcap: float | None = None,
) -> Tensor:
    """In the dtype of the arguments, step by step, as a model computes them."""
    x = hidden @ weight.T
    if lora is not None:
        x = x + hidden @ lora[0] @ lora[1]
    if bias is not None:
        x = x + bias
    u = logit_scale * x
    return u if softcap is None else softcap * torch.tanh(u / softcap)

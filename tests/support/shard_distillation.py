"""Distillation of one process, and of ranks whose student and teacher have sharded vocabularies."""

from __future__ import annotations

from typing import Any

import linear_cases as cases
import torch
from shard_cases import LEAD, OPTIONS, VOCAB, WIDTH, make, make_logits, mask
from torch import Tensor

from r1kernels import distillation_loss, linear_distillation_loss, testing


def with_teacher(case: dict[str, Any], apart: float = 1.0) -> dict[str, Any]:
    """The case and a teacher in the dtypes of the student, `apart` from it."""
    if "logits" in case:
        noise = testing.random_logits(*LEAD, VOCAB, seed=9)
        return case | {"teacher_logits": (case["logits"] + apart * noise).to(case["logits"].dtype)}
    other = cases.make("plain", *LEAD, width=WIDTH, vocab=VOCAB, seed=9)["weight"]
    weight = case["weight"]
    return case | {"teacher_hidden": case["hidden"], "teacher_weight": (weight + apart * other).to(weight.dtype)}


def with_listed(case: dict[str, Any], k: int) -> dict[str, Any]:
    """The case and a teacher's k tokens, some of them absent. In two sequences, all are in the first shard."""
    vocab = (case["logits"] if "logits" in case else case["weight"].t()).shape[-1]
    rng = testing.generator(4)
    ids = torch.stack([torch.randperm(vocab, generator=rng)[:k] for _ in range(LEAD[0] * LEAD[1])]).reshape(*LEAD, k)
    ids[:2] = torch.arange(k)
    logprobs = (2 * torch.randn(*LEAD, k + 1, generator=rng)).log_softmax(-1)[..., :k]
    if k == vocab:
        logprobs = logprobs.log_softmax(-1)
    else:
        logprobs[1, :, 0] = -torch.inf
        logprobs[2, 0] = -torch.inf
        logprobs[3] = logprobs[3].log_softmax(-1)  # no tail
    return case | {"teacher_token_ids": ids, "teacher_logprobs": logprobs}


def without_words(case: dict[str, Any]) -> dict[str, Any]:
    """All logits of one shard of three are -inf: of the student in row 0, of the teacher in row 1, of both in row 2."""
    for row, names in enumerate((("logits",), ("teacher_logits",), ("logits", "teacher_logits"))):
        for name in names:
            case[name][row, :, 400:750] = -torch.inf
    return case


def distilled(case: dict[str, Any], divergence: str, **options: Any) -> dict[str, Tensor]:
    """Distillation from hidden states, or from logits."""
    keywords = {"divergence": divergence, "mask": mask(), "normalizer": 3.0, **options}
    if "logits" in case:
        logits = case["logits"].detach().requires_grad_()
        teacher = {name: value for name, value in case.items() if name.startswith("teacher")}
        result = distillation_loss(logits, **teacher, temperature=0.7, **keywords)
        (2 * result.loss).backward()
        grads = {"logits": logits.grad}
    else:
        teacher = {name: value for name, value in case.items() if name.startswith("teacher")}
        student = {name: value for name, value in case.items() if name not in (*teacher, "token_ids")}

        def call(hidden: Tensor, weight: Tensor, **head: Any) -> Any:
            return linear_distillation_loss(hidden, weight, **teacher, **head)

        result, grads = cases.gradients(call, student, lambda result: 2 * result.loss, **keywords)
    return {"loss": result.loss.detach(), **{f"metric {k}": v for k, v in result.metrics.items()}, **grads}


def in_float64(case: dict[str, Any]) -> dict[str, Any]:
    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: tuple(map(wide, value)) if name == "lora" else wide(value) for name, value in case.items()}


LISTED_OPTIONS = {"chunk_bytes": 2 * OPTIONS["chunk_bytes"]}
KINDS = ("forward_kl", "reverse_kl", "jsd")

DISTILLED: dict[str, Any] = {
    **{f"distillation {kind}, {head}, {dtypes}": (
           distilled, lambda h=head, d=dtypes: with_teacher(make(h, d)), OPTIONS | {"divergence": kind, "beta": 0.3})
       for kind in KINDS for head, dtypes in (("softcap", "float32"), ("lora", "bfloat16"), ("plain", "float16"))},
    **{f"distillation of logits {kind}, {name}": (
           distilled, lambda d=dtype: with_teacher(make_logits(d)), {"divergence": kind})
       for kind in KINDS for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))},
    **{f"distillation without words {kind}": (
           distilled, lambda: without_words(with_teacher(make_logits(torch.float32))), {"divergence": kind})
       for kind in KINDS},
    **{f"top-k {kind}, {head}, {dtypes}": (
           distilled, lambda h=head, d=dtypes: with_listed(make(h, d), 6), LISTED_OPTIONS | {"divergence": kind})
       for kind in KINDS for head, dtypes in (("softcap", "float32"), ("lora", "bfloat16"), ("plain", "float16"))},
    **{f"top-k of logits {kind}, {name}": (
           distilled, lambda d=dtype: with_listed(make_logits(d), 6), {"divergence": kind})
       for kind in KINDS for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))},
    **{f"top-k of all words {kind}": (
           distilled, lambda: with_listed(make_logits(torch.float32), VOCAB), {"divergence": kind}) for kind in KINDS},
    **{f"top-k, {tail}, of {name}": (
           distilled, lambda m=make_case: with_listed(m(), 6), more | {"divergence": "reverse_kl", "tail": tail})
       for tail in ("truncate", "renormalize") for name, make_case, more in (
           ("logits", lambda: make_logits(torch.float32), {}), ("hidden", lambda: make("softcap"), LISTED_OPTIONS))},
    **{f"distillation near 0, {kind}": (
           distilled, lambda: with_teacher(make_logits(torch.float32), 1e-3), {"divergence": kind}) for kind in KINDS},
}

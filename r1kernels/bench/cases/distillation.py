"""Divergence from a teacher: of whole vocabularies, of K tokens, and from the hidden states of both models."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import r1kernels
from r1kernels.bench import eager, peers
from r1kernels.bench.tasks import OURS, Problem, Setting, Task

K = 64
KINDS = ("forward_kl", "reverse_kl", "jsd")


def distillation_loss(setting: Setting) -> Iterator[Task]:
    tokens, vocab = setting.pick((64, 4096), (256, 65_536), (8192, 131_072))
    size = tokens * vocab
    common = {
        "case": "distillation_loss", "op": "distillation_loss", "shape": {"N": tokens, "V": vocab},
        "dtype": torch.bfloat16,
        "bytes": {OURS: 8 * size, peers.EAGER: 36 * size, peers.COMPILED: 16 * size},
    }

    def make() -> Problem:
        """Logits as wide apart as two models' may be."""
        rng, device = setting.generator(), setting.device
        student = torch.randn(tokens, vocab, generator=rng, device=device) * 3
        teacher = student * 0.7 + torch.randn(tokens, vocab, generator=rng, device=device) * 2
        inputs = {"student": student.bfloat16(), "teacher": teacher.bfloat16()}
        return Problem(inputs, ("student",))

    for kind in KINDS:
        def ours(student: Tensor, teacher: Tensor, kind: str = kind) -> Tensor:
            return r1kernels.distillation_loss(student, teacher, divergence=kind).loss

        exact = partial(eager.divergence, kind=kind)
        yield Task(**common, make=make, functions={OURS: ours, peers.EAGER: exact}, exact=exact, variant=kind,
                   input_bytes=4 * size, compiled=kind == "forward_kl", bytes_moved=6 * size)

    def listed() -> Problem:
        problem = make()
        top = problem.inputs["teacher"].float().log_softmax(-1).topk(K)
        inputs = {"student": problem.inputs["student"], "token_ids": top.indices, "logprobs": top.values}
        return problem._replace(inputs=inputs)

    def of_listed(student: Tensor, token_ids: Tensor, logprobs: Tensor) -> Tensor:
        return r1kernels.distillation_loss(student, teacher_token_ids=token_ids, teacher_logprobs=logprobs).loss

    yield Task(**common, make=listed, functions={OURS: of_listed, peers.EAGER: eager.of_listed}, exact=eager.of_listed,
               variant=f"top {K} given by the teacher", input_bytes=6 * size, bytes_moved=4 * size)

    def of_likeliest(student: Tensor, teacher: Tensor) -> Tensor:
        return r1kernels.distillation_loss(student, teacher, top_k=K, divergence="reverse_kl").loss

    def distinct() -> Problem:
        """float32, where no two logits are equal: of equal ones, torch may choose another token."""
        return make().to(torch.float32)

    rest = common | {"dtype": torch.float32}
    exact = partial(eager.of_likeliest, k=K)

    def without_ties() -> Problem:
        problem = distinct()
        order = torch.arange(vocab, device=setting.device) * 1e-6
        return problem._replace(inputs={name: value + order for name, value in problem.inputs.items()})

    yield Task(**rest, make=without_ties, functions={OURS: of_likeliest, peers.EAGER: exact}, exact=exact,
               variant=f"top {K} of the student", input_bytes=8 * size, bytes_moved=12 * size)


def linear_distillation_loss(setting: Setting) -> Iterator[Task]:
    tokens, vocab = setting.pick((64, 2048), (256, 32_768), (4096, 131_072))
    widths = setting.pick((128, 192), (512, 1024), (4096, 8192))  # of student and teacher
    size, heads = tokens * vocab, vocab * sum(widths)

    def make() -> Problem:
        rng, device = setting.generator(), setting.device

        def normal(rows: int, width: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(rows, width, generator=rng, device=device) * scale).bfloat16()

        inputs = {}
        for name, width in zip(("student", "teacher"), widths, strict=True):
            inputs[f"{name}_hidden"] = normal(tokens, width)
            inputs[f"{name}_weight"] = normal(vocab, width, 3 / width**0.5)
        return Problem(inputs, ("student_hidden", "student_weight"))

    def logits(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
               ) -> tuple[Tensor, Tensor]:
        return F.linear(student_hidden, student_weight), F.linear(teacher_hidden, teacher_weight)

    def jsd(**inputs: Tensor) -> Tensor:
        return eager.divergence(*logits(**inputs), kind="jsd")

    def ours(**inputs: Tensor) -> Tensor:
        return r1kernels.linear_distillation_loss(**inputs, divergence="jsd").loss

    def of_likeliest(**inputs: Tensor) -> Tensor:
        return r1kernels.linear_distillation_loss(**inputs, top_k=K, divergence="reverse_kl").loss

    def exact_of_likeliest(**inputs: Tensor) -> Tensor:
        return eager.of_likeliest(*logits(**inputs), k=K)

    products = 2 * tokens * vocab
    common = {
        "case": "linear_distillation_loss", "op": "linear_distillation_loss", "dtype": torch.bfloat16, "make": make,
        "shape": {"N": tokens, "V": vocab, "H": widths[0]}, "input_bytes": 2 * heads,
        "bytes": {OURS: 6 * heads + (64 << 20), peers.EAGER: 44 * size + 4 * heads,
                  peers.LIGER: 44 * min(tokens, 1024) * vocab + 4 * heads},
        "bytes_moved": 2 * heads + 2 * vocab * widths[0], "flops": products * (3 * widths[0] + widths[1]),
    }
    yield Task(**common, functions={OURS: ours, peers.EAGER: jsd}, exact=jsd, variant="jsd",
               peers=(peers.liger(peers.liger_jsd),))
    yield Task(**common, functions={OURS: of_likeliest}, exact=exact_of_likeliest, variant=f"top {K} of the student")


CASES = {"distillation_loss": distillation_loss, "linear_distillation_loss": linear_distillation_loss}

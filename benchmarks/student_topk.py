"""Distillation on the student's 64 likeliest tokens from hidden states, beside one log-prob pass and its gradient.

    python benchmarks/student_topk.py [--tokens 2048] [--hidden 1024] [--vocab 32768 151936] [--dtype bfloat16 float32]
        [--rounds 5]

measures forward and backward of each case in turns, after a check of loss and gradient against float64 on a few rows.
It prints medians and their ratios to the log-prob pass, and saves them as student_topk.json of this device. A unit is a
product of 2 N H V operations. The log-prob pass takes 4 (its backward computes the logits again); cross-entropy, with
its gradient in the same pass, 3; the distillation 3 and, where the teacher's log-sum-exp is needed, one more for the
teacher's logits.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import saving
import torch
from torch import Tensor

import r1kernels
from r1kernels.bench.clock import HostClock
from r1kernels.bench.turns import times

K = 64
Run = Callable[[Tensor, Tensor, int], Tensor]  # (hidden, weight, rows of them) -> loss


class Problem:
    def __init__(self, tokens: int, width: int, vocab: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        hidden, weight = normal(tokens, width), normal(vocab, width) * 3 / width**0.5
        self.hidden, self.weight = hidden.to(dtype), weight.to(dtype)
        self.teacher_hidden = (hidden + 0.3 * normal(tokens, width)).to(dtype)
        self.teacher_weight = (weight + normal(vocab, width) * 0.5 / width**0.5).to(dtype)
        self.ids = torch.randint(0, vocab, (tokens,), generator=generator)
        self.looked_up = torch.full((tokens, K), -8.0)

    def runs(self) -> dict[str, Run]:
        """By name. The first is the measure of all others."""

        def distilled(tail: str, of: str = "student") -> Run:
            def run(hidden: Tensor, weight: Tensor, rows: int) -> Tensor:
                return r1kernels.linear_distillation_loss(
                    hidden, weight, self.teacher_hidden[:rows], self.teacher_weight, divergence="reverse_kl", top_k=K,
                    top_k_of=of, tail=tail,
                ).loss

            return run

        def asked(hidden: Tensor, weight: Tensor, rows: int) -> Tensor:
            return r1kernels.linear_distillation_loss(
                hidden, weight, teacher_logprobs=lambda ids, at: self.looked_up[at], divergence="reverse_kl", top_k=K
            ).loss

        return {
            "log-prob": lambda h, w, rows: r1kernels.linear_token_logprobs(h, w, self.ids[:rows]).mean(),
            "cross-entropy": lambda h, w, rows: r1kernels.linear_cross_entropy(h, w, self.ids[:rows]),
            "student renormalize": distilled("renormalize"),
            "student bucket, log-probs given": asked,
            "student bucket": distilled("bucket"),
            "student truncate": distilled("truncate"),
            "union bucket": distilled("bucket", "union"),
        }

    def step(self, run: Run, rows: int | None = None, wide: bool = False) -> tuple[Tensor, Tensor]:
        """Loss and the gradient of hidden; that of the weight is computed too."""
        convert = torch.Tensor.double if wide else torch.Tensor.detach
        hidden = convert(self.hidden[:rows]).detach().requires_grad_()
        weight = convert(self.weight).detach().requires_grad_()
        loss = run(hidden, weight, len(hidden))
        return loss.detach(), torch.autograd.grad(loss, (hidden, weight))[0]

    def check(self, name: str, run: Run, rows: int = 4) -> None:
        """No number without the equality check: a few rows against the reference in float64."""
        loss, grad = self.step(run, rows)
        given = self.teacher_hidden, self.teacher_weight
        with r1kernels.backend("reference"):
            self.teacher_hidden, self.teacher_weight = (x.double() for x in given)
            exact, exact_grad = self.step(run, rows, wide=True)
        self.teacher_hidden, self.teacher_weight = given
        assert abs(loss - exact) <= 1e-5 * (1 + exact.abs()), f"{name}: loss {loss}, expected {exact}"
        worst = (grad - exact_grad).abs().max() / exact_grad.abs().max()
        # d logits are rounded to the dtype of hidden before the product with the weight.
        limit = 4 * torch.finfo(grad.dtype).eps + 1e-5
        assert worst <= limit, f"{name}: the gradient is off by {worst:.1e} of its largest entry, expected {limit:.1e}"


def measure(problem: Problem, rounds: int) -> dict[str, float]:
    """Median seconds of a forward and backward. One round runs all cases."""
    runs = problem.runs()
    for name, run in runs.items():
        problem.check(name, run)
        problem.step(run)
    steps = {name: partial(problem.step, run) for name, run in runs.items()}
    taken = times(steps, dict.fromkeys(steps, rounds), HostClock())
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_768, 151_936])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    results = []
    for vocab in args.vocab:
        for dtype in args.dtype:
            problem = Problem(args.tokens, args.hidden, vocab, getattr(torch, dtype))
            seconds = measure(problem, args.rounds)
            first = next(iter(seconds.values()))
            print(f"V {vocab}, {dtype}, N {args.tokens}, H {args.hidden}")
            for name, value in seconds.items():
                print(f"  {name:32s} {value:8.3f} s   {value / first:5.2f} x log-prob")
            results += [
                {"op": "student_topk", "shape": f"{args.tokens} tokens, H {args.hidden}, V {vocab}", "dtype": dtype,
                 "top_k": K, "implementation": name, "median_s": value, "ratio": value / first, "rounds": args.rounds}
                for name, value in seconds.items()
            ]
    print(saving.save(results))


if __name__ == "__main__":
    main()

"""pass@1 as the paper measures it: sampled, averaged over several samples a question, with a standard error."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from r1kernels.train.config import EvalConfig
from r1kernels.train.data import Problem
from r1kernels.train.prompt import render
from r1kernels.train.randomness import torch_seeded
from r1kernels.train.rewards import Sample, Scorer
from r1kernels.train.rollout import Sampling, TransformersSampler


@dataclass(frozen=True)
class Evaluation:
    """Results on held-out problems.

    Args:
        pass_at_1: mean over questions of the share of correct samples.
        standard_error: of `pass_at_1`, from the spread between questions.
        parts: mean of each reward.
        length: mean tokens of a completion.
        truncated: share of completions that were cut off.
        unscorable: samples without a score; they are left out of the means.
        prompt_hash: of all prompts, so that two numbers can be known to be of the same questions.
        examples: (question, answer, completion, accuracy) of the first sample of the first questions.
    """

    pass_at_1: float
    standard_error: float
    parts: dict[str, float]
    length: float
    truncated: float
    unscorable: int
    prompt_hash: str
    examples: list[tuple[str, str, str, float]]

    def metrics(self) -> dict[str, float | int]:
        return {
            "pass_at_1": self.pass_at_1,
            "pass_at_1_se": self.standard_error,
            "eval_length": self.length,
            "eval_truncated": self.truncated,
            "eval_unscorable": self.unscorable,
            **{f"eval_{name}": value for name, value in self.parts.items()},
        }


def evaluate(
    sampler: TransformersSampler,
    problems: Sequence[Problem],
    scorer: Scorer,
    settings: EvalConfig,
    *,
    max_new_tokens: int,
    open_think: bool,
    seed: int,
    examples: int = 4,
) -> Evaluation:
    """Samples every problem `settings.samples` times; the same seed draws the same random numbers."""
    k = settings.samples
    prompts = [render(problem.question, open_think=open_think) for problem in problems]
    sampling = Sampling(
        settings.temperature, settings.max_new_tokens or max_new_tokens, settings.top_p, settings.batch_size
    )
    rows = [index for index in range(len(problems)) for _ in range(k)]
    with torch_seeded(seed, "evaluate"):
        completions = sampler.sample([prompts[index] for index in rows], sampling)
    samples = [
        Sample(prompts[index], text, problems[index].answer)
        for index, text in zip(rows, completions.texts, strict=True)
    ]
    scores = scorer.score(samples)
    correct = torch.tensor(scores.parts["accuracy"], dtype=torch.float64)
    per_question = correct.view(len(problems), k).nanmean(-1)
    known = per_question[~per_question.isnan()]
    spread = known.std().item() if len(known) > 1 else math.nan
    return Evaluation(
        pass_at_1=known.mean().item(),
        standard_error=spread / math.sqrt(max(1, len(known))),
        parts={name: torch.tensor(values).nanmean().item() for name, values in scores.parts.items()},
        length=completions.lengths.double().mean().item(),
        truncated=1 - completions.finished.double().mean().item(),
        unscorable=int(correct.isnan().sum()),
        prompt_hash=hashlib.sha256("\0".join(prompts).encode()).hexdigest()[:16],
        examples=[
            (problems[index].question, problems[index].answer, samples[index * k].completion, float(correct[index * k]))
            for index in range(min(examples, len(problems)))
        ],
    )

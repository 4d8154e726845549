"""pass@1 and cons@k as the paper measures them: sampled, over several samples a question, with standard errors."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1kernels.train.config import EvalConfig, Recipe
from r1kernels.train.data import Problem
from r1kernels.train.interrupt import Interrupt
from r1kernels.train.language_stats import reflective_words
from r1kernels.train.loading import load_model, load_tokenizer
from r1kernels.train.problems import load_problems
from r1kernels.train.prompt import Template
from r1kernels.train.rng import torch_seeded
from r1kernels.train.rewards import Sample, Scorer
from r1kernels.train.rewards.accuracy import spelling
from r1kernels.train.rollout import Sampler, Sampling, TransformersSampler
from r1kernels.train.stage import make_scorer

# What is measured of every response, whatever RL is rewarded for.
PARTS = {"accuracy": 1.0, "format": 0.0, "language": 0.0}

# What all correct answers of one question vote for.
CORRECT = "correct"


@dataclass(frozen=True)
class Evaluation:
    """Results on held-out problems; `*_se` are standard errors from the spread between questions, NaN for one.

    Args:
        pass_at_1: mean over questions of the share of correct samples.
        cons_at_k: share of questions whose most frequent answer is correct; answers that are equally frequent share.
        k: samples a question; questions: their number.
        length: mean tokens of a completion.
        language: mean share of words in the language of the question.
        format: share of completions in the format asked for.
        truncated: share of completions that were cut off.
        unscorable: samples without a score; they are left out of the means, and vote as wrong answers.
        reflective: mean number of reflective words.
        prompt_hash: of all prompts, so that two numbers can be known to be of the same questions.
        examples: of the first sample of the first questions: question, answer, completion, accuracy.
    """

    pass_at_1: float
    pass_at_1_se: float
    cons_at_k: float
    cons_at_k_se: float
    k: int
    questions: int
    length: float
    length_se: float
    language: float
    language_se: float
    format: float
    truncated: float
    unscorable: int
    reflective: float
    prompt_hash: str
    temperature: float
    top_p: float
    max_new_tokens: int
    examples: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in dataclasses.asdict(self).items()
        }


# Of an evaluation, what a line of metrics.jsonl holds, by the name it has there.
MEASURED = {
    "pass_at_1": "pass_at_1", "pass_at_1_se": "pass_at_1_se", "cons_at_k": "cons_at_k", "cons_at_k_se": "cons_at_k_se",
    "length": "eval_length", "language": "eval_language", "format": "eval_format", "truncated": "eval_truncated",
    "unscorable": "eval_unscorable", "reflective": "eval_reflective",
}


def evaluate_model(
    recipe: Recipe, path: str | Path, interrupt: Interrupt, overrides: Mapping[str, Any] | None = None
) -> Evaluation:
    """Evaluates a saved model as `recipe.eval` says; `overrides` as in `load_model`."""
    tokenizer = load_tokenizer(path)
    model = load_model(path, device=recipe.device, overrides=overrides)
    sampler = TransformersSampler(model, tokenizer, interrupt.check)
    problems = eval_problems(recipe)
    with make_scorer(recipe, PARTS) as scorer:
        template = Template(recipe.template, tokenizer, open_think=recipe.open_think)
        return evaluate(sampler, problems, scorer, recipe.eval, template=template, seed=recipe.seed)


def eval_problems(recipe: Recipe) -> list[Problem]:
    return [problem for name in recipe.eval_problems for problem in load_problems(recipe, name, "test")]


def evaluate(
    sampler: Sampler,
    problems: Sequence[Problem],
    scorer: Scorer,
    settings: EvalConfig,
    *,
    template: Template,
    seed: int,
    examples: int = 4,
) -> Evaluation:
    """Samples every problem `settings.samples` times; the same seed draws the same random numbers.

    Args:
        scorer: of `PARTS`.
    """
    k = settings.samples
    prompts = [template.render(problem.question) for problem in problems]
    sampling = Sampling(settings.temperature, settings.max_new_tokens, settings.top_p, settings.batch_size)
    rows = [index for index in range(len(problems)) for _ in range(k)]
    with torch_seeded(seed, "evaluate"):
        completions = sampler.sample([prompts[index] for index in rows], sampling)
    samples = [
        make_sample(problems[index], prompts[index], text)
        for index, text in zip(rows, completions.texts, strict=True)
    ]
    scores = scorer.score(samples)

    def per_question(values: Sequence[float] | Tensor) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float64).view(len(problems), k)

    correct = per_question(scores.parts["accuracy"])
    agreed = torch.tensor(
        [consensus(samples[i * k : (i + 1) * k], correct[i].tolist()) for i in range(len(problems))],
        dtype=torch.float64,
    )
    results = {
        "pass_at_1": correct.nanmean(-1),
        "cons_at_k": agreed,
        "length": per_question(completions.lengths).mean(-1),
        "language": per_question(scores.parts["language"]).nanmean(-1),
    }
    means = {}
    for name, values in results.items():
        means[name], means[f"{name}_se"] = _mean_and_error(values)
    return Evaluation(
        **means,
        k=k,
        questions=len(problems),
        format=_mean_and_error(torch.tensor(scores.parts["format"], dtype=torch.float64))[0],
        truncated=1 - completions.finished.double().mean().item(),
        unscorable=int(correct.isnan().sum()),
        reflective=sum(map(reflective_words, completions.texts)) / len(rows),
        prompt_hash=hashlib.sha256("\0".join(prompts).encode()).hexdigest()[:16],
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens,
        examples=[
            {
                "question": problem.question,
                "answer": problem.answer,
                "completion": completions.texts[i * k],
                "accuracy": None if correct[i, 0].isnan() else correct[i, 0].item(),
            }
            for i, problem in enumerate(problems[:examples])
        ],
    )


def make_sample(
    problem: Problem, prompt: str, completion: str, *, tokens: int | None = None, limit: int | None = None
) -> Sample:
    """A completion of a problem, for the rewards."""
    return Sample(
        prompt, completion, problem.answer, kind=problem.kind, language=problem.language, tokens=tokens, limit=limit,
        question=problem.question,
    )


def consensus(samples: Sequence[Sample], correct: Sequence[float]) -> float:
    """Whether the most frequent final answer of one question is correct: the mean over equally frequent ones.

    All correct answers are one; others are the same that are read as the same (`accuracy.spelling`). An answer that
    could not be scored is counted as a wrong one, so that the result is a lower bound; NaN where none could be, and for
    code, which has no answers to count. 0 where no sample has an answer.
    """
    if all(map(math.isnan, correct)) or any(sample.kind == "code" for sample in samples):
        return math.nan
    votes = collections.Counter(
        (CORRECT, "") if value == 1 else spelling(sample) for sample, value in zip(samples, correct, strict=True)
    )
    del votes[None]
    most = [answer for answer, count in votes.items() if count == max(votes.values())]
    return sum(answer == (CORRECT, "") for answer in most) / len(most) if most else 0.0


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    known = values[~values.isnan()]
    spread = known.std().item() if len(known) > 1 else math.nan
    return known.mean().item(), spread / math.sqrt(max(1, len(known)))

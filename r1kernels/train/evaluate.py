"""pass@1 and cons@k as the paper measures them: several sampled completions of each question, with standard errors."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import math
import re
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from r1kernels.rewards import Scorer
from r1kernels.rewards.choice import chosen
from r1kernels.rewards.math import spelling
from r1kernels.rewards.text import final_answer, same_text
from r1kernels.train.data import Problem, load_problems
from r1kernels.train.prompt import Template
from r1kernels.train.recipe import Eval, Recipe
from r1kernels.train.rng import torch_seeded
from r1kernels.train.rollout import Sampler, Sampling, TransformersSampler
from r1kernels.train.stage import Stage

# What is measured on every completion, whatever RL rewards.
PARTS = {"accuracy": 1.0, "format": 0.0, "language": 0.0}
# Keys of an evaluation, and their names in a line of metrics.jsonl.
MEASURED = {
    "pass_at_1": "pass_at_1", "pass_at_1_se": "pass_at_1_se", "cons_at_k": "cons_at_k", "cons_at_k_se": "cons_at_k_se",
    "length": "eval_length", "language": "eval_language", "format": "eval_format", "truncated": "eval_truncated",
    "unscorable": "eval_unscorable", "reflective": "eval_reflective",
}
# The words whose number the paper watches while reasoning is learned. Chinese and Japanese characters may touch them.
REFLECTIVE_WORDS = ("wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check")
_LETTER = r"[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]"
_REFLECTIVE = re.compile(rf"(?<!{_LETTER})(?:{'|'.join(REFLECTIVE_WORDS)})(?!{_LETTER})", re.IGNORECASE)


def evaluate_model(stage: Stage, name: str) -> dict[str, Any]:
    """Evaluates the model that the stage `name` left, as `recipe.eval` says."""
    model, tokenizer = stage.load_model(name)
    sampler, template = TransformersSampler(model, tokenizer, stage.interrupt.check), stage.template(tokenizer)
    problems, settings = eval_problems(stage.recipe), stage.recipe.eval
    with stage.scorer(PARTS) as scorer:
        return evaluate(sampler, problems, scorer, settings, template=template, seed=stage.seed)


def eval_problems(recipe: Recipe) -> list[Problem]:
    """The held-out problems of the evaluation."""
    return [problem for name in recipe.eval_problems for problem in load_problems(recipe, name, "test")]


def evaluate(
    sampler: Sampler, problems: Sequence[Problem], scorer: Scorer, settings: Eval, *, template: Template, seed: int,
    examples: int = 4,
) -> dict[str, Any]:
    """Samples every problem `settings.samples` times; the same seed draws the same random numbers.

    Args:
        scorer: of the rewards `PARTS`.

    Returns:
        pass_at_1 (mean share of correct samples), cons_at_k (share of questions whose most frequent answer is correct),
        length (tokens) and language (share of words), with standard errors `*_se` from the spread between questions;
        format and truncated (shares), reflective (mean number of words), unscorable (samples without a score, which are
        left out of the means and vote as wrong answers); k, questions, temperature, top_p, max_new_tokens, prompt_hash
        (equal for equal questions) and examples. None where a number is not known.
    """
    k = settings.samples
    prompts = [template.render(problem.question) for problem in problems]
    rows = [index for index in range(len(problems)) for _ in range(k)]
    asked, repeated = [problems[index] for index in rows], [prompts[index] for index in rows]
    sampling = Sampling(settings.temperature, settings.max_new_tokens, settings.top_p, settings.batch_size)
    with torch_seeded(seed, "evaluate"):
        completions = sampler.sample(repeated, sampling)
    texts = completions.texts
    scores = scorer.score(texts, **columns(asked, repeated))

    def per_question(values: Sequence[float] | Tensor) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float64).view(len(problems), k)

    correct = per_question(scores.parts["accuracy"])
    agreed = [consensus(problem.kind, prompt, texts[i * k : (i + 1) * k], correct[i].tolist())
              for i, (problem, prompt) in enumerate(zip(problems, prompts, strict=True))]
    results = {
        "pass_at_1": correct.nanmean(-1),
        "cons_at_k": torch.tensor(agreed, dtype=torch.float64),
        "length": per_question(completions.lengths).mean(-1),
        "language": per_question(scores.parts["language"]).nanmean(-1),
    }
    found: dict[str, Any] = {}
    for name, values in results.items():
        found[name], found[f"{name}_se"] = _mean_and_error(values)
    found |= {
        "k": k,
        "questions": len(problems),
        "format": _mean_and_error(torch.tensor(scores.parts["format"], dtype=torch.float64))[0],
        "truncated": 1 - completions.finished.double().mean().item(),
        "unscorable": int(correct.isnan().sum()),
        "reflective": sum(map(reflective_words, texts)) / len(rows),
        "prompt_hash": hashlib.sha256("\0".join(prompts).encode()).hexdigest()[:16],
        **{name: getattr(settings, name) for name in ("temperature", "top_p", "max_new_tokens")},
        "examples": [
            {"question": problem.question, "answer": problem.answer, "completion": texts[i * k],
             "accuracy": _known(correct[i, 0].item())}
            for i, problem in enumerate(problems[:examples])
        ],
    }
    return {name: _known(value) for name, value in found.items()}


def columns(problems: Sequence[Problem], prompts: Sequence[str]) -> dict[str, list[str]]:
    """What a scorer has to know of the completions of problems, one after the other."""
    names = ("question", "answer", "kind", "language")
    return {"prompts": list(prompts), **{name: [getattr(problem, name) for problem in problems] for name in names}}


def consensus(kind: str, prompt: str, texts: Sequence[str], correct: Sequence[float]) -> float:
    """Whether the most frequent final answer to a question is correct; the mean over equally frequent answers.

    All correct answers are one answer; others are the same if they are read as the same. A sample without a score votes
    as a wrong one, so the result is a lower bound. NaN if no sample has a score, and for programs.
    """
    if kind == "code" or all(map(math.isnan, correct)):
        return math.nan
    votes = collections.Counter("correct" if value == 1 else _vote(kind, prompt, text)
                                for text, value in zip(texts, correct, strict=True))
    del votes[None]
    most = [answer for answer, count in votes.items() if count == max(votes.values())]
    return most.count("correct") / len(most) if most else 0.0


def _vote(kind: str, prompt: str, completion: str) -> Hashable:
    """A wrong answer, such that answers which are read as the same are equal; None without an answer."""
    answer = chosen(prompt, completion) if kind == "choice" else final_answer(prompt, completion)
    if answer is None:
        return None
    return "wrong", spelling(answer) if kind == "math" else same_text(answer)


def reflective_words(text: str) -> int:
    """The number of reflective words in a text: whole words, in any case."""
    return sum(1 for _ in _REFLECTIVE.finditer(text))


def run(stage: Stage) -> dict[str, Any]:
    """A stage of kind evaluate: an evaluation with the stage's settings."""
    settings = {name: getattr(stage.settings, name) for name in Eval.model_fields if name != "every"}
    recipe = stage.recipe.model_copy(update={"eval": Eval(**settings)})
    return {"evaluation": evaluate_model(dataclasses.replace(stage, recipe=recipe), stage.settings.model)}


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    known = values[~values.isnan()]
    spread = known.std().item() if len(known) > 1 else math.nan
    return known.mean().item(), spread / math.sqrt(max(1, len(known)))


def _known(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value

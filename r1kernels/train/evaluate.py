"""pass@1 and cons@k as the paper measures them: several sampled completions of each question, with standard errors."""

from __future__ import annotations

import hashlib
import math
import re
import statistics
from collections.abc import Hashable, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch

from r1kernels.rewards import Scorer, Scores
from r1kernels.rewards.choice import letter
from r1kernels.rewards.math import spelling
from r1kernels.rewards.text import final_answer, same_text
from r1kernels.train.data import Problem, Template
from r1kernels.train.parallel import everywhere, share
from r1kernels.train.recipe import Eval
from r1kernels.train.rng import seed_at
from r1kernels.train.rollout import Sampler, Sampling
from r1kernels.train.stage import Stage

PARTS = {"accuracy": 1.0, "format": 0.0, "language": 0.0}  # measured on every completion, whatever RL rewards
# The words whose number the paper watches while reasoning is learned. Chinese and Japanese characters may touch them.
WORDS = r"\b(?:wait|mistake|however|but|retry|error|verify|wrong|evaluate|check)\b"


def evaluate_model(stage: Stage, name: str) -> dict[str, Any]:
    """Evaluates the model that the stage `name` left, as `recipe.eval` says."""
    problems, settings = stage.problems(stage.recipe.eval_problems, "test"), stage.recipe.eval
    with closing(stage.sampler(name)) as sampler, stage.scorer(PARTS) as scorer:
        template = stage.template(sampler.tokenizer)
        return evaluate(sampler, problems, scorer, settings, template=template, seed=stage.recipe.seed)


def evaluate(
    sampler: Sampler, problems: Sequence[Problem], scorer: Scorer, settings: Eval, *,
    template: Template, seed: int,
) -> dict[str, Any]:
    """Samples every problem `settings.samples` times; the same seed draws the same random numbers.

    The result has means with standard errors (`*_se`) from the spread between questions (None if unknown), the settings
    of the measurement, and some examples. `scorer` scores `PARTS`.
    """
    k = settings.samples
    asked = [problem for problem in problems for _ in range(k)]
    prompts = [template.render(problem.question) for problem in asked]
    sampling = Sampling(settings.temperature, settings.max_new_tokens, settings.top_p, settings.batch_size,
                        seed_at(seed, "evaluate"))
    completions = sampler.sample(prompts, sampling)
    texts, parts = completions.texts, score(scorer, completions.texts, asked, prompts).parts
    accuracy, first = parts["accuracy"], range(0, len(asked), k)  # the first samples of the questions
    agreed = [consensus(asked[i].kind, prompts[i], texts[i : i + k], accuracy[i : i + k]) for i in first]
    found, lengths = {}, completions.lengths.tolist()
    for name, column in (("pass_at_1", accuracy), ("cons_at_k", agreed), ("length", lengths),
                         ("language", parts["language"])):
        of_questions = torch.tensor(column, dtype=torch.float64).view(len(problems), -1).nanmean(-1)
        known = of_questions[~of_questions.isnan()]
        found[name] = known.mean().item()
        found[f"{name}_se"] = known.std().item() / math.sqrt(len(known)) if len(known) > 1 else math.nan
    found |= {
        "format": torch.tensor(parts["format"], dtype=torch.float64).nanmean().item(),
        "truncated": 1 - completions.finished.double().mean().item(),
        "reflective": sum(map(reflective_words, texts)) / len(texts),  # words of a completion
        "unscorable": sum(map(math.isnan, accuracy)),  # samples without a score, which the means leave out
        "prompt_hash": hashlib.sha256("\0".join(prompts[::k]).encode()).hexdigest()[:16],
        "k": k, "questions": len(problems),
        **settings.model_dump(include={"temperature", "top_p", "max_new_tokens"}),
        "examples": [{"question": asked[i].question, "answer": asked[i].answer, "completion": texts[i],
                      "accuracy": _known(accuracy[i])} for i in first[:4]],
    }
    return {name: _known(value) for name, value in found.items()}


def score(scorer: Scorer, texts: Sequence[str], problems: Sequence[Problem], prompts: Sequence[str],
          **given: Sequence[Any]) -> Scores:
    """The scores of completions on all ranks; every rank scores its share. See `Scorer.score`."""
    given |= {name: [getattr(problem, name) for problem in problems]
              for name in ("question", "answer", "kind", "language")} | {"prompts": prompts}
    found = everywhere(lambda: scorer.score(share(texts), **{name: share(column) for name, column in given.items()}))
    lists = {name: [value for part in found for value in part.parts[name]] for name in found[0].parts}
    return Scores(lists, [value for part in found for value in part.total], sum(part.timeouts for part in found),
                  sum(part.crashes for part in found),
                  {name: sum(part.unscorable[name] for part in found) for name in found[0].unscorable})


def measured(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of an evaluation, under their names in metrics.jsonl, and its examples."""
    names = ("length", "language", "format", "truncated", "unscorable", "reflective")
    shares = {name: evaluation[name] for name in ("pass_at_1", "pass_at_1_se", "cons_at_k", "cons_at_k_se", "examples")}
    return shares | {f"eval_{name}": evaluation[name] for name in names}


def consensus(kind: str, prompt: str, texts: Sequence[str], correct: Sequence[float]) -> float:
    """Whether the most frequent final answer to a question is correct; the mean over equally frequent answers.

    All correct answers are one answer; others are the same if they are read as the same. A sample without a score votes
    as a wrong one, so the result is a lower bound. NaN if no sample has a score, and for programs.
    """
    if kind == "code" or all(map(math.isnan, correct)):
        return math.nan

    def read(text: str) -> Hashable:
        answer = final_answer(prompt, text)
        answer = letter(answer or "") if kind == "choice" else answer
        return None if answer is None else ("wrong", spelling(answer) if kind == "math" else same_text(answer))

    votes = ["correct" if value == 1 else read(text) for text, value in zip(texts, correct, strict=True)]
    most = statistics.multimode(vote for vote in votes if vote is not None)
    return most.count("correct") / len(most) if most else 0.0


def reflective_words(text: str) -> int:
    """The number of reflective words in a text: whole words, in any case."""
    return len(re.findall(WORDS, text, re.ASCII | re.IGNORECASE))


def _known(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value

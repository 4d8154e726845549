"""Scores of reward models as a part of the reward: of open problems, in the steps where they count.

Problems with a checkable answer keep to the rules, as in the paper (v2, the second stage of RL).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from r1kernels.train.data import Problem, whole_response
from r1kernels.train.prompt import Template
from r1kernels.train.reward_model import RewardModel, judged_part
from r1kernels.train.stage import Stage


@dataclass(frozen=True)
class PreferenceScores:
    """`total`: the weighted sum for each sample; `parts`: the scores of each reward model, unweighted."""

    total: list[float]
    parts: dict[str, list[float]] = field(default_factory=dict)


class Preferences:
    """The reward models that `preference` of a stage names; each is loaded when it first counts."""

    def __init__(self, stage: Stage, settings: Any, template: Template) -> None:
        self._stage, self._settings, self._template = stage, settings, template
        self._models: dict[str, RewardModel] = {}

    def apply(self, step: int) -> bool:
        """Whether any counts in a step."""
        return any(item.applies(step, self._settings.steps) for item in self._settings.preference)

    def score(self, step: int, problems: Sequence[Problem], texts: Sequence[str]) -> PreferenceScores:
        """Scores completions of open problems; the others get 0, and so do all where no reward model counts yet."""
        total, parts = [0.0] * len(texts), {}
        rows = [index for index, problem in enumerate(problems) if problem.kind == "open"]
        for item in self._settings.preference:
            if not item.applies(step, self._settings.steps):
                continue
            if item.model not in self._models:
                path, device = self._stage.model_dir(item.model), self._stage.recipe.device
                self._models[item.model] = RewardModel(path, template=self._stage.recipe.template, device=device)
            questions = [problems[i].question for i in rows]
            responses = [
                whole_response(self._template.render(question), texts[i])
                for i, question in zip(rows, questions, strict=True)
            ]
            scores = without_summary_last(self._models[item.model], questions, responses)
            parts[item.model] = [math.nan] * len(texts)
            for index, score in zip(rows, scores, strict=True):
                parts[item.model][index] = score
                total[index] += item.weight * score
        return PreferenceScores(total, parts)


def without_summary_last(model: RewardModel, questions: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Scores; where a model scores summaries and there is none, the lowest of the others: else never to end a thought
    could beat a poor summary."""
    missing = [not judged_part(model.target, response).strip() for response in responses]
    scores = model.score(questions, responses)
    known = [score for score, none in zip(scores, missing, strict=True) if not none and not math.isnan(score)]
    lowest = min(known, default=math.nan)
    return [min(score, lowest) if none else score for score, none in zip(scores, missing, strict=True)]

"""A reward model of preferences, trained on pairs: helpful summaries, or harmless responses.

    loss = -log sigmoid(r(chosen) - r(rejected))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from r1kernels.train.checkpoint import latest_checkpoint, load_checkpoint
from r1kernels.train.config import Recipe
from r1kernels.train.data import DataError, Pair, rows, whole_response
from r1kernels.train.loading import load_tokenizer
from r1kernels.train.pairs import JudgedPairs, candidates, judge_pairs
from r1kernels.train.rng import permutation
from r1kernels.train.reward_model import (
    Encoder,
    Target,
    judged_part,
    load_reward_model,
    new_reward_model,
    score_rows,
)
from r1kernels.train.rewards.endpoint import EndpointError
from r1kernels.train.rewards.judge import Judge
from r1kernels.train.schema import ConfigError, check_ranges
from r1kernels.train.stage import SELECTED, Stage
from r1kernels.train.supervised import Start, chosen, train


@dataclass(frozen=True)
class Config:
    """A Bradley-Terry model on the body of another stage's model.

    Args:
        model: the stage whose model's body it starts from.
        pairs: a data set with preferences, or a stage of kind reject, whose responses the judge of `scoring` compares
            as `judged` says.
        target: "summary" scores only what follows the thought (helpfulness), "response" all of it (harmlessness).
        batch_size: pairs a step, of which `micro_batch_size` at a time are in memory (all, if null).
        learning_rate: after `warmup_steps` of linear warm-up; falls in a cosine to `final_learning_rate`, a tenth if
            null.
        held_out: share of the questions whose pairs measure the accuracy and are not trained on.
        max_tokens: a pair with a longer text is left out, and counted.
    """

    name: str
    kind: Literal["preference"]
    model: str
    pairs: str
    target: Target = "response"
    epochs: int = 1
    batch_size: int = 256
    micro_batch_size: int | None = None
    learning_rate: float = 6e-6
    final_learning_rate: float | None = None
    warmup_steps: int = 0
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    held_out: float = 0.1
    max_tokens: int = 8192
    judged: JudgedPairs = field(default_factory=JudgedPairs)

    def check(self, recipe: Recipe) -> None:
        check_ranges(
            self,
            at_least_1=("epochs", "batch_size", "micro_batch_size", "max_tokens", "judged.per_question"),
            at_least_0=("warmup_steps", "final_learning_rate", "weight_decay"),
            positive=("learning_rate", "grad_clip"),
            probability=("held_out", "judged.margin"),
        )
        if self.pairs not in recipe.data and recipe.scoring.judge is None:
            raise ConfigError(
                f"'pairs' names the stage '{self.pairs}', whose responses a judge is to compare: expected "
                "'scoring.judge' (url and model), which is missing"
            )


@dataclass(frozen=True)
class Rows:
    """The tokens of a pair's two texts."""

    question: str
    chosen: list[int]
    rejected: list[int]

    def __len__(self) -> int:
        """Tokens of both."""
        return len(self.chosen) + len(self.rejected)


def run(stage: Stage) -> dict[str, Any]:
    config, recipe = stage.config, stage.recipe
    pairs, summary = _pairs(stage)
    path = latest_checkpoint(stage.directory)
    if path is None:
        tokenizer = load_tokenizer(stage.model_dir(config.model))
        model = new_reward_model(stage.model_dir(config.model), tokenizer, config.target, device=recipe.device)
        state = None
    else:
        checkpoint = load_checkpoint(path)
        tokenizer, state = load_tokenizer(checkpoint.model_dir), checkpoint.state
        model = load_reward_model(checkpoint.model_dir, device=recipe.device)
    encoder = Encoder(tokenizer, recipe.template)
    encoded, left_out = encode_pairs(encoder, pairs, config)
    training, held_out = split(encoded, config.held_out, stage.seed)
    if any(left_out.values()):
        stage.console.say(f"{config.name}: {left_out} of {len(pairs)} pairs are left out", warning=True)
    tokenizer.padding_side = "right"
    summary |= {"pairs": len(training), "held_out_pairs": len(held_out), **left_out}

    def draw(step: int) -> tuple[list[Rows], dict[str, float]]:
        return [training[index] for index in chosen(len(training), config, stage.seed, step)], {}

    def learn(batch: Sequence[Rows]) -> dict[str, float]:
        return pair_gradient(model, encoder, batch, config.micro_batch_size, stage.interrupt.check)

    steps = math.ceil(config.epochs * len(training) / config.batch_size)
    summary |= train(stage, Start(model.eval(), tokenizer, state), steps, draw, learn)
    if held_out:
        stage.console.phase(f"{config.name}: accuracy on {len(held_out)} held-out pairs")
        summary |= held_out_accuracy(model, encoder, held_out, config.micro_batch_size or config.batch_size)
        stage.console.say(
            f"{config.name}: {summary['accuracy']:.1%} ± {summary['accuracy_se']:.1%} of the held-out pairs are "
            "ordered as preferred"
        )
    return summary


def _pairs(stage: Stage) -> tuple[list[Pair], dict[str, int]]:
    """The pairs to learn from, and what became of the judge's comparisons."""
    config, scoring = stage.config, stage.recipe.scoring
    if config.pairs in stage.recipe.data:
        return stage.pairs(config.pairs), {}
    responses: dict[str, list[str]] = {}
    for _, _, row in rows(stage.directory_of(config.pairs) / SELECTED, ("question", "prompt", "completion")):
        responses.setdefault(row["question"], []).append(whole_response(row["prompt"], row["completion"]))
    try:
        judge = Judge(scoring.judge)
    except ValueError as error:
        raise ConfigError(f"'scoring': {error}") from error

    def compare(question: str, first: str, second: str) -> float | None:
        try:
            return judge.compare(question, *(judged_part(config.target, text) for text in (first, second)))
        except EndpointError:
            return None

    stage.console.phase(f"{config.name}: asking the judge")
    verdicts = stage.directory / "verdicts.jsonl"
    pairs, counts = judge_pairs(
        candidates(responses, config.judged.per_question, stage.seed), compare, config.judged.margin,
        verdicts, concurrency=scoring.judge.concurrency, check=stage.interrupt.check,
    )
    stage.console.say(f"{config.name}: the judge's pairs: {counts}", warning=not pairs or counts["unscorable"] > 0)
    if not pairs:
        verdicts.unlink()  # the judge may have been out of reach: next time it is asked again
        raise DataError(f"'pairs': the judge was clear on no pair of stage '{config.pairs}' ({counts})")
    return pairs, counts


def encode_pairs(encoder: Encoder, pairs: Sequence[Pair], config: Config) -> tuple[list[Rows], dict[str, int]]:
    """The pairs as tokens, and how many could teach nothing, their texts being the "same", or were "too_long"."""
    texts = [[judged_part(config.target, text) for text in (pair.chosen, pair.rejected)] for pair in pairs]
    questions = [pair.question for pair in pairs]
    columns = [encoder.tokens(questions, column) for column in zip(*texts, strict=True)]
    found = [Rows(*row) for row in zip(questions, *columns, strict=True)]
    different = [row for row in found if row.chosen != row.rejected]
    kept = [row for row in different if max(len(row.chosen), len(row.rejected)) <= config.max_tokens]
    if not kept:
        raise DataError(f"'pairs' {config.pairs!r}: of {len(found)} pairs none has two texts that differ and fit")
    return kept, {"same": len(found) - len(different), "too_long": len(different) - len(kept)}


def split(pairs: Sequence[Rows], share: float, seed: int) -> tuple[list[Rows], list[Rows]]:
    """Pairs to train on and held-out ones; no question is in both."""
    questions = list(dict.fromkeys(pair.question for pair in pairs))
    count = math.ceil(share * len(questions))
    if count == len(questions):
        raise ConfigError(f"'held_out' is {share}, which leaves none of the {len(questions)} questions to train on")
    held_out = {questions[index] for index in permutation(len(questions), seed, "held out")[:count]}
    return (
        [pair for pair in pairs if pair.question not in held_out], [pair for pair in pairs if pair.question in held_out]
    )


def pair_gradient(
    model: PreTrainedModel,
    encoder: Encoder,
    pairs: Sequence[Rows],
    micro_batch_size: int | None,
    check: Callable[[], None],
) -> dict[str, float]:
    """Adds the gradient of the mean loss a pair, whatever the number of micro-batches.

    Returns:
        loss; accuracy, the share of pairs ordered as preferred; margin, the mean of r(chosen) - r(rejected); tokens.
    """
    size, margins = micro_batch_size or len(pairs), []
    for first in range(0, len(pairs), size):
        check()
        part = pairs[first : first + size]
        inputs = encoder.batch([row for pair in part for row in (pair.chosen, pair.rejected)], model.device)
        scores = model(**inputs, use_cache=False).logits.float().view(-1, 2)  # (pairs, chosen and rejected)
        margin = scores[:, 0] - scores[:, 1]
        (F.softplus(-margin).sum() / len(pairs)).backward()
        margins.append(margin.detach())
    return _measures(torch.cat(margins)) | {"tokens": sum(map(len, pairs))}


def held_out_accuracy(
    model: PreTrainedModel, encoder: Encoder, pairs: Sequence[Rows], batch_size: int
) -> dict[str, float]:
    """As `pair_gradient`, and the standard error of the accuracy, over questions, whose pairs are not independent."""
    scores = score_rows(model, encoder, [row for pair in pairs for row in (pair.chosen, pair.rejected)], batch_size)
    margins = torch.tensor(scores).view(-1, 2)
    margins = margins[:, 0] - margins[:, 1]
    measures = _measures(margins)
    errors: dict[str, float] = {}
    for pair, right in zip(pairs, _right(margins).tolist(), strict=True):
        errors[pair.question] = errors.get(pair.question, 0.0) + right - measures["accuracy"]
    count = len(errors)
    spread = math.fsum(error**2 for error in errors.values()) * count / max(1, count - 1)
    return {f"held_out_{key}" if key == "loss" else key: value for key, value in measures.items()} | {
        "accuracy_se": math.sqrt(spread) / len(pairs)
    }


def _right(margins: torch.Tensor) -> torch.Tensor:
    """1 where the pair is ordered as preferred, 1/2 where neither text wins."""
    return (margins > 0).float() + 0.5 * (margins == 0)


def _measures(margins: torch.Tensor) -> dict[str, float]:
    return {
        "loss": F.softplus(-margins).mean().item(),
        "accuracy": _right(margins).mean().item(),
        "margin": margins.mean().item(),
    }

"""Rejection sampling: several completions a question, of which those are kept that are correct and readable."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from r1kernels.train.config import Recipe, as_dict
from r1kernels.train.data import DataError, Problem
from r1kernels.train.evaluate import make_sample
from r1kernels.train.files import write_atomically
from r1kernels.train.filters import REASONS, FilterConfig, reject
from r1kernels.train.interrupt import Interrupted
from r1kernels.train.rng import torch_seeded
from r1kernels.train.rewards import Sample, Scorer, Scores
from r1kernels.train.rewards.endpoint import EndpointError
from r1kernels.train.rewards.judge import Judge, final_summary
from r1kernels.train.rollout import Completions, Sampling, TransformersSampler
from r1kernels.train.schema import ConfigError, check_ranges
from r1kernels.train.selection import Selection
from r1kernels.train.stage import Stage
from r1kernels.train.steplog import StepLog

REPORT = "report.json"
# What is counted beside the reasons; "answered": questions of which a sample was kept.
COUNTS = ("samples", "kept", "answered", "tokens", "timeouts", "crashes", "endpoint_failures")


@dataclass(frozen=True)
class Config:
    """Samples of `model` on `problems`.

    Args:
        questions: the first so many of the problems, or all.
        keep_per_question: the first so many that pass, or all, as in the paper.
        questions_per_batch: of one batch, whose scores are found while the next is sampled.
        rollout_batch_size: samples in memory at once.
        judge: asks the model of `scoring.judge` whether the answer to an open problem with a reference is equivalent.
    """

    name: str
    kind: Literal["reject"]
    model: str
    problems: list[str]
    questions: int | None = None
    samples_per_question: int = 16
    keep_per_question: int | None = None
    questions_per_batch: int = 32
    rollout_batch_size: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 64
    filters: FilterConfig = field(default_factory=FilterConfig)
    judge: bool = False

    @property
    def rewards(self) -> dict[str, float]:
        return {"accuracy": 1.0}

    def check(self, recipe: Recipe) -> None:
        check_ranges(
            self,
            at_least_1=("questions", "samples_per_question", "keep_per_question", "questions_per_batch",
                        "rollout_batch_size", "max_new_tokens", "filters.paragraph", "filters.ngram"),
            positive=("temperature", "top_p"),
            probability=("top_p", "filters.language", "filters.ngram_share"),
        )
        for key in ("line_repeats", "word_repeats"):
            value = getattr(self.filters, key)
            if value is not None and value < 2:
                raise ConfigError(f"'filters.{key}' is {value}, expected at least 2: what comes once is no repetition")
        if not self.problems:
            raise ConfigError("'problems' is empty, expected the name of a data set at least")
        if self.judge and recipe.scoring.judge is None:
            raise ConfigError("'judge' is true and 'scoring.judge' is missing, expected the url and model of a judge")


@dataclass(frozen=True)
class Batch:
    """Completions whose scores are on the way."""

    problems: list[Problem]
    samples: list[Sample]
    completions: Completions
    scores: Future[Scores]
    seconds: float


def run(stage: Stage) -> dict[str, Any]:
    config = stage.config
    problems = stage.problems(config.problems)[: config.questions]
    if not problems:
        raise DataError(f"'problems' {', '.join(config.problems)} hold no question, expected at least one")
    count = math.ceil(len(problems) / config.questions_per_batch)
    with (
        Selection(stage.directory) as selection,
        stage.scorer(config.rewards) as scorer,
        StepLog(stage, first_step=selection.batches) as log,
    ):
        judge = _judge(stage.recipe) if config.judge else None
        for batch in _batches(stage, problems, selection.batches, count, scorer):
            _select(stage, batch, selection, judge, log)
            kept = selection.counts["kept"]
            stage.console.phase(f"{config.name}: {selection.batches}/{count} batches, {kept} samples kept")
        return _finish(stage, selection, len(problems))


def _batches(stage: Stage, problems: list[Problem], first: int, count: int, scorer: Scorer) -> Iterator[Batch]:
    """Each batch once the next one has been sampled, while its scores were found."""
    if first >= count:
        return
    config = stage.config
    model, tokenizer = stage.load_model(config.model)
    sampler, template = TransformersSampler(model, tokenizer, stage.interrupt.check), stage.template(tokenizer)
    sampling = Sampling(config.temperature, config.max_new_tokens, config.top_p, config.rollout_batch_size)
    scored: Batch | None = None
    for number in range(first, count):
        size = config.questions_per_batch
        some = [p for p in problems[number * size : (number + 1) * size] for _ in range(config.samples_per_question)]
        prompts = [template.render(problem.question) for problem in some]
        started = time.monotonic()
        try:
            stage.interrupt.check()
            with torch_seeded(stage.seed, config.name, "samples", number):
                completions = sampler.sample(prompts, sampling)
        except Interrupted:
            if scored:
                yield scored
            raise
        samples = [
            make_sample(problem, prompt, text, tokens=int(length), limit=config.max_new_tokens)
            for problem, prompt, text, length in zip(
                some, prompts, completions.texts, completions.lengths, strict=True
            )
        ]
        seconds = time.monotonic() - started
        batch = Batch(some, samples, completions, scorer.submit(samples), seconds)
        if scored:
            yield scored
        scored = batch
    yield scored


def _select(stage: Stage, batch: Batch, selection: Selection, judge: Judge | None, log: StepLog) -> None:
    """Filters one batch and writes what is left of it."""
    config, started = stage.config, time.monotonic()
    scores = batch.scores.result()
    waited = time.monotonic()
    reasons = [
        reject(sample, config.filters, accuracy=None if sample.kind == "open" else accuracy, finished=finished)
        for sample, accuracy, finished in zip(
            batch.samples, scores.parts["accuracy"], batch.completions.finished.tolist(), strict=True
        )
    ]
    failures = _ask(judge, stage.recipe.scoring.judge.concurrency, batch, reasons) if judge else []
    if failures:
        stage.console.say(
            f"{stage.config.name}: the judge did not answer {len(failures)} times, so these samples are unscorable: "
            f"{failures[0]}", warning=True,
        )
    rows: list[dict[str, Any]] = []
    kept: Counter[int] = Counter()
    for index, (problem, sample) in enumerate(zip(batch.problems, batch.samples, strict=True)):
        question = index // config.samples_per_question
        if reasons[index] is None and selection.has(sample.prompt, sample.completion):
            reasons[index] = "duplicate"
        if reasons[index] is None and config.keep_per_question and kept[question] >= config.keep_per_question:
            reasons[index] = "surplus"
        if reasons[index] is None:
            kept[question] += 1
            selection.keep(sample.prompt, sample.completion)
            rows.append({
                "id": f"{problem.id}/{index % config.samples_per_question}", "question": problem.question,
                "prompt": sample.prompt, "completion": sample.completion, "answer": problem.answer,
            })
    counts = Counter({"samples": len(reasons), "kept": len(rows), "answered": len(kept),
                      "tokens": int(batch.completions.mask.sum()),
                      "timeouts": scores.timeouts, "crashes": scores.crashes, "endpoint_failures": len(failures),
                      **Counter(filter(None, reasons))})
    log.write({
        "step": selection.batches,
        **{name: counts[name] for name in (*COUNTS, *REASONS)},
        "seconds_sampling": batch.seconds,
        "seconds_scoring": waited - started,
        "seconds_filters": time.monotonic() - waited,
        "tokens_per_second": counts["tokens"] / batch.seconds,
    })
    selection.add(rows, counts)  # last: only now is the batch complete


def _judge(recipe: Recipe) -> Judge:
    try:
        return Judge(recipe.scoring.judge)
    except ValueError as error:
        raise ConfigError(f"'scoring': {error}") from error


def _ask(judge: Judge, concurrency: int, batch: Batch, reasons: list[str | None]) -> list[str]:
    """Rejects answers to open problems that the judge does not find equivalent to the reference.

    Asked last, and only about what passes all else: an answer costs seconds. Returns what went wrong where none came.
    """
    failures: list[str] = []

    def ask(index: int) -> str | None:
        problem, answer = batch.problems[index], final_summary(batch.samples[index])
        try:
            return None if answer and judge.equivalent(problem.question, answer, problem.answer) else "wrong"
        except EndpointError as error:
            failures.append(str(error))
            return "unscorable"

    asked = [
        index for index, problem in enumerate(batch.problems)
        if reasons[index] is None and problem.kind == "open" and problem.answer
    ]
    with ThreadPoolExecutor(concurrency) as threads:
        for index, reason in zip(asked, threads.map(ask, asked), strict=True):
            reasons[index] = reason
    return failures


def _finish(stage: Stage, selection: Selection, questions: int) -> dict[str, Any]:
    """Writes the report and gives the samples their name."""
    counts = selection.counts
    rejected = {reason: counts[reason] for reason in REASONS}
    summary = {"questions": questions, **{name: counts[name] for name in COUNTS}, "rejected": rejected}
    report = {"stage": stage.config.name, **summary, "settings": as_dict(stage.config)}
    write_atomically(stage.directory / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    if not counts["kept"]:
        found = ", ".join(f"{reason} {count}" for reason, count in rejected.items() if count)
        raise DataError(
            f"stage '{stage.config.name}' kept none of {counts['samples']} samples ({found}), expected at least one"
        )
    selection.finish()
    return summary

"""Rejection sampling: several completions of a question, of which the right and readable ones are kept.

The kept samples are the lines of selected.jsonl, which grows batch by batch. A batch is complete with its line in
metrics.jsonl, which holds its counts. So a stage that was killed at any moment continues after the last complete batch.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from r1kernels.rewards import EndpointError, Scorer, Scores
from r1kernels.rewards.judge import Judge, final_summary
from r1kernels.rewards.language import word_counts
from r1kernels.rewards.text import ANSWER, ANSWER_END, THINK, THINK_END, is_well_formed
from r1kernels.train.data import Problem
from r1kernels.train.errors import DataError
from r1kernels.train.evaluate import columns
from r1kernels.train.log import METRICS, StepLog, append_line, cut_lines, read_lines
from r1kernels.train.recipe import Filters
from r1kernels.train.rng import torch_seeded
from r1kernels.train.rollout import Completions, Sampling, TransformersSampler
from r1kernels.train.stage import SELECTED, Stage, make_judge

# In this order: a sample is counted under the first reason that holds.
REASONS = ("unscorable", "wrong", "unfinished", "unreadable", "mixed language", "long paragraph", "code block",
           "repetition", "duplicate", "surplus")
# Also counted. "answered": questions with a kept sample.
COUNTS = ("samples", "kept", "answered", "tokens", "timeouts", "crashes", "endpoint_failures")
# A word. In scripts without spaces, each character; in long runs, every 16 characters.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]{1,16}")
_FENCE = re.compile(r"^\s{0,3}(?:```|~~~)|```|\\begin\{(?:verbatim|lstlisting|minted)\}|<(?:code|pre)>", re.MULTILINE)
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ue000-\uf8ff\ud800-\udfff]")
_LOOP_LINES, _LOOP_WORDS = 8, 64  # the longest loop that is looked for
_LEAST_RUNS = 50  # a text with fewer runs of words is too short for `ngram_share`


@dataclass(frozen=True)
class Batch:
    """Completions whose scores are being computed; `problems` repeats each question for each of its samples."""

    number: int
    problems: list[Problem]
    prompts: list[str]
    completions: Completions
    scores: Future[Scores]
    seconds: float


def run(stage: Stage) -> dict[str, Any]:
    """Samples, scores and filters; returns the counts."""
    settings, path = stage.settings, stage.directory / SELECTED
    problems = stage.problems(settings.problems)[: settings.questions]
    batches = math.ceil(len(problems) / settings.questions_per_batch)
    done = read_lines(stage.directory / METRICS)
    known = cut_lines(path, len(done))
    if len(known) != sum(line["kept"] for line in done):
        raise DataError(f"{path} is damaged: it holds {len(known)} samples of {len(done)} complete batches, expected "
                        f"{sum(line['kept'] for line in done)}; run with --from {settings.name} to rebuild it")
    seen = {_digest(row["prompt"], row["completion"]) for row in known}
    judge = make_judge(stage.recipe) if settings.judge else None
    with StepLog(stage, first_step=len(done)) as log, stage.scorer({"accuracy": 1.0}) as scorer:
        for batch in _sampled(stage, problems, range(len(done), batches), scorer):
            rows, counts, timing = _select(stage, batch, seen, judge)
            for row in rows:
                append_line(path, {"step": batch.number, **row})
            done.append({"step": batch.number, **{name: counts[name] for name in (*COUNTS, *REASONS)}})
            log.write({**done[-1], "timing": timing})
            stage.console.phase(f"{settings.name}: {len(done)}/{batches} batches, {len(seen)} samples kept")
    total = {name: sum(line[name] for line in done) for name in (*COUNTS, *REASONS)}
    rejected = {reason: total.pop(reason) for reason in REASONS}
    if not total["kept"]:
        found = ", ".join(f"{reason} {count}" for reason, count in rejected.items() if count)
        raise DataError(f"stage '{settings.name}' kept 0 of {total['samples']} samples ({found}); expected at least 1")
    return {"questions": len(problems), **total, "rejected": rejected}


def _sampled(stage: Stage, problems: list[Problem], numbers: range, scorer: Scorer) -> Iterator[Batch]:
    """Each batch, after the next one was sampled. Meanwhile its scores were computed."""
    if not numbers:
        return
    settings, waiting = stage.settings, None
    model, tokenizer = stage.load_model(settings.model)
    sampler, template = TransformersSampler(model, tokenizer, stage.interrupt.check), stage.template(tokenizer)
    sampling = Sampling(settings.temperature, settings.max_new_tokens, settings.top_p, settings.rollout_batch_size)
    for number in numbers:
        size, started = settings.questions_per_batch, time.monotonic()
        asked = problems[number * size : (number + 1) * size]
        repeated = [problem for problem in asked for _ in range(settings.samples_per_question)]
        prompts = [template.render(problem.question) for problem in repeated]
        stage.interrupt.check()
        with torch_seeded(stage.seed, settings.name, "samples", number):
            completions = sampler.sample(prompts, sampling)
        scores = scorer.submit(completions.texts, **columns(repeated, prompts))
        sampled = Batch(number, repeated, prompts, completions, scores, time.monotonic() - started)
        if waiting:
            yield waiting
        waiting = sampled
    yield waiting


def _select(
    stage: Stage, batch: Batch, seen: set[bytes], judge: Judge | None
) -> tuple[list[dict[str, Any]], Counter[str], dict[str, float]]:
    """The rows of a batch that are kept, which join `seen`; the counts, and the timing."""
    settings, started = stage.settings, time.monotonic()
    scores = batch.scores.result()
    waited = time.monotonic()
    texts, finished = batch.completions.texts, batch.completions.finished.tolist()
    scored = zip(batch.problems, batch.prompts, texts, scores.parts["accuracy"], finished, strict=True)
    reasons = [fault(problem, prompt, text, settings.filters, accuracy, ended)
               for problem, prompt, text, accuracy, ended in scored]
    failures = _ask(judge, stage.recipe.scoring.judge.concurrency, batch, reasons) if judge else []
    if failures:
        stage.console.say(f"{settings.name}: the judge did not answer {len(failures)} times, so these samples are "
                          f"unscorable: {failures[0]}", warning=True)
    rows: list[dict[str, Any]] = []
    kept, most = Counter[int](), settings.keep_per_question or math.inf  # of a question
    for index, (problem, prompt, text) in enumerate(zip(batch.problems, batch.prompts, texts, strict=True)):
        question, number = divmod(index, settings.samples_per_question)
        digest = _digest(prompt, text)
        if reasons[index] is None and (digest in seen or kept[question] >= most):
            reasons[index] = "duplicate" if digest in seen else "surplus"
        if reasons[index] is None:
            kept[question] += 1
            seen.add(digest)
            rows.append({"id": f"{problem.id}/{number}", "question": problem.question, "prompt": prompt,
                         "completion": text, "answer": problem.answer})
    tokens = int(batch.completions.mask.sum())
    counts = Counter(reason for reason in reasons if reason)
    counts.update(samples=len(reasons), kept=len(rows), answered=len(kept), tokens=tokens, timeouts=scores.timeouts,
                  crashes=scores.crashes, endpoint_failures=len(failures))
    filters = time.monotonic() - waited
    return rows, counts, {"sampling": batch.seconds, "scoring": waited - started, "filters": filters,
                          "total": batch.seconds + waited - started + filters,
                          "tokens_per_second": tokens / batch.seconds}


def _ask(judge: Judge, concurrency: int, batch: Batch, reasons: list[str | None]) -> list[str]:
    """Rejects answers to open problems that differ from the reference in the judge's view; returns failures.

    The judge is only asked about what passes all else, because each of its answers takes seconds.
    """
    failures: list[str] = []

    def ask(index: int) -> str | None:
        problem = batch.problems[index]
        answer = final_summary(batch.prompts[index], batch.completions.texts[index])
        try:
            return None if answer and judge.equivalent(problem.question, answer, problem.answer) else "wrong"
        except EndpointError as error:
            failures.append(str(error))
            return "unscorable"

    asked = [index for index, problem in enumerate(batch.problems)
             if reasons[index] is None and problem.kind == "open" and problem.answer]
    with ThreadPoolExecutor(concurrency) as threads:
        for index, reason in zip(asked, threads.map(ask, asked), strict=True):
            reasons[index] = reason
    return failures


def fault(
    problem: Problem, prompt: str, completion: str, limits: Filters, accuracy: float = 1.0, finished: bool = True
) -> str | None:
    """The reason to reject a completion, or None. Each filter takes time linear in the text, which may be megabytes."""
    if problem.kind != "open" and accuracy != 1:
        return "unscorable" if math.isnan(accuracy) else "wrong"
    if not finished:
        return "unfinished"
    text = completion
    for tag in (THINK, THINK_END, ANSWER, ANSWER_END):  # they are words of no language
        text = text.replace(tag, "\n")
    formed = is_well_formed(prompt, completion) or not limits.format
    if not formed or not text.strip() or _UNPRINTABLE.search(completion):
        return "unreadable"
    counts = word_counts(text)
    if limits.language is not None and counts[problem.language] < limits.language * sum(counts.values()):
        return "mixed language"
    if limits.paragraph and any(len(_WORD.findall(line)) > limits.paragraph for line in completion.splitlines()):
        return "long paragraph"
    # Where a program is asked for, the answer holds its block.
    searched = completion.rpartition(THINK_END)[0] if problem.kind == "code" else completion
    if not limits.code_blocks and _FENCE.search(searched):
        return "code block"
    return "repetition" if repeats(text, limits) else None


def repeats(text: str, limits: Filters) -> bool:
    """Whether lines or words loop, or much of the text was there before."""
    lines, words = [line.strip() for line in text.splitlines() if _WORD.search(line)], _WORD.findall(text)
    if limits.line_repeats and loops(lines, limits.line_repeats, _LOOP_LINES):
        return True
    if limits.word_repeats and loops(words, limits.word_repeats, _LOOP_WORDS, limits.loop_words):
        return True
    runs = [tuple(words[start : start + limits.ngram]) for start in range(len(words) - limits.ngram + 1)]
    return limits.ngram_share is not None and len(runs) >= _LEAST_RUNS and (
        1 - len(set(runs)) / len(runs) > limits.ngram_share)


def loops(items: Sequence[str], repeats: int, longest: int, least: int = 1) -> bool:
    """Whether up to `longest` items are repeated `repeats` times or more in a row, over at least `least` items."""
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(item, len(numbers)) for item in items], dtype=np.int64)
    for period in range(1, min(longest, len(ids) // repeats) + 1):
        different = np.flatnonzero(ids[period:] != ids[:-period])
        edges = np.concatenate([[-1], different, [len(ids) - period]])
        run = int(np.diff(edges).max()) - 1 + period  # the longest run of equal pairs, and the period before it
        if run >= max(least, repeats * period):
            return True
    return False


def _digest(prompt: str, completion: str) -> bytes:
    return blake2b(f"{prompt}\0{completion}".encode(errors="surrogatepass"), digest_size=16).digest()

"""Rejection sampling: it samples several completions of each question and keeps the right and readable ones.

The kept samples are the lines of selected.jsonl, which grows batch by batch. A batch is complete with its line in
metrics.jsonl, which holds its counts. So a stage that was killed at any moment continues after the last complete batch.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from r1kernels.rewards import EndpointError, Judge
from r1kernels.rewards.language import share
from r1kernels.rewards.text import ANSWER, ANSWER_END, THINK, THINK_END, final_summary, is_well_formed
from r1kernels.train.data import Problem
from r1kernels.train.errors import DataError
from r1kernels.train.evaluate import score
from r1kernels.train.log import METRICS, StepLog, append_line, cut_lines, read_lines
from r1kernels.train.parallel import check, first, shared
from r1kernels.train.recipe import Filters
from r1kernels.train.rng import seed_at
from r1kernels.train.rollout import Sampling
from r1kernels.train.stage import SELECTED, Stage, make_judge

# In this order: a sample is counted under the first reason that holds.
REASONS = ("unscorable", "wrong", "unfinished", "unreadable", "mixed language", "long paragraph", "code block",
           "repetition", "duplicate", "surplus")
COUNTS = ("samples", "kept", "tokens", "timeouts", "crashes", "endpoint_failures")  # other than the reasons
# A word. In scripts without spaces, each character; in long runs, every 16 characters.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]{1,16}")
_FENCE = re.compile(r"^\s{0,3}(?:```|~~~)|```|\\begin\{(?:verbatim|lstlisting|minted)\}|<(?:code|pre)>", re.MULTILINE)
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ue000-\uf8ff\ud800-\udfff]")


@dataclass
class Sample:
    """A completion, how it was scored, and the reason to reject it, if there is one."""
    problem: Problem
    prompt: str
    text: str
    accuracy: float = 1.0
    finished: bool = True
    reason: str | None = None


def run(stage: Stage) -> dict[str, Any]:
    """Samples, scores and filters; returns the counts."""
    settings, path, size = stage.settings, stage.directory / SELECTED, stage.settings.questions_per_batch
    problems, done = stage.problems(settings.problems)[: settings.questions], first(
        lambda: read_lines(stage.directory / METRICS))
    known, expected = first(lambda: len(cut_lines(path, len(done)))), sum(line["kept"] for line in done)
    if known != expected:
        raise DataError(f"{path} is damaged: it holds {known} samples of {len(done)} complete batches, expected "
                        f"{expected}; run with --from {settings.name} to rebuild it")
    judge = make_judge(stage.recipe) if settings.judge else None
    sampling = Sampling(settings.temperature, settings.max_new_tokens, settings.top_p, settings.rollout_batch_size)
    with (StepLog(stage, first_step=len(done)) as log, stage.scorer({"accuracy": 1.0}) as scorer,
          closing(stage.sampler(settings.model)) as sampler):
        template = stage.template(sampler.tokenizer)
        for number in range(len(done), math.ceil(len(problems) / size)):
            check(stage.interrupt)
            started, some = time.monotonic(), problems[number * size : (number + 1) * size]
            asked = [problem for problem in some for _ in range(settings.samples_per_question)]
            prompts = [template.render(problem.question) for problem in asked]
            seed = seed_at(stage.recipe.seed, settings.name, "samples", number)
            completions = sampler.sample(prompts, replace(sampling, seed=seed))
            sampled, tokens = time.monotonic(), int(completions.mask.sum())
            scores = score(scorer, completions.texts, asked, prompts)
            samples = [Sample(*given) for given in zip(asked, prompts, completions.texts, scores.parts["accuracy"],
                                                       completions.finished.tolist(), strict=True)]
            for sample in samples:
                sample.reason = fault(sample, settings.filters)
            failures = _ask(judge, stage, samples) if judge else 0
            rows = _select(samples, settings)
            for row in rows:
                append_line(path, {"step": number, **row})
            counts = Counter(sample.reason for sample in samples) | Counter(
                samples=len(samples), kept=len(rows), tokens=tokens, timeouts=scores.timeouts, crashes=scores.crashes,
                endpoint_failures=failures)
            done.append({"step": number, **{name: counts[name] for name in (*COUNTS, *REASONS)}})
            timing = {"sampling": sampled - started, "total": time.monotonic() - started}
            log.write({**done[-1], "timing": timing | {"tokens_per_second": tokens / timing["sampling"]}})
            stage.console.say(f"{settings.name}: {len(done) * size} of {len(problems)} questions are done")
    total = {name: sum(line[name] for line in done) for name in (*COUNTS, *REASONS)}
    rejected = {reason: total.pop(reason) for reason in REASONS}
    if not total["kept"]:
        raise DataError(f"stage '{settings.name}' kept no sample ({total}, {rejected}); expected at least one")
    return {"questions": len(problems), **total, "rejected": rejected}


def _ask(judge: Judge, stage: Stage, samples: list[Sample]) -> int:
    """Rejects answers to open problems that differ from the reference in the judge's view; returns its failures.

    It asks the judge only about samples that pass all other filters, because each answer takes seconds.
    """

    def ask(sample: Sample) -> tuple[str | None, str | None]:
        answer, problem = final_summary(sample.prompt, sample.text), sample.problem
        try:
            same = answer and judge.equivalent(problem.question, answer, problem.answer)
            return None if same else "wrong", None
        except EndpointError as error:
            return "unscorable", str(error)

    asked = [one for one in samples if one.reason is None and one.problem.kind == "open" and one.problem.answer]
    with ThreadPoolExecutor(stage.recipe.scoring.judge.concurrency) as threads:
        replies = shared(lambda mine: list(threads.map(ask, mine)), asked)
    for sample, (reason, _) in zip(asked, replies, strict=True):
        sample.reason = reason
    failures = [error for _, error in replies if error]
    if failures:
        stage.console.say(f"{stage.settings.name}: the judge failed {len(failures)} times: {failures[0]}", warning=True)
    return len(failures)


def _select(samples: list[Sample], settings: Any) -> list[dict[str, Any]]:
    """The rows to keep. Duplicates and samples above the limit get a reason for their rejection."""
    rows, kept = [], defaultdict[int, set[str]](set)  # texts of each question
    for index, sample in enumerate(samples):
        question, number = divmod(index, settings.samples_per_question)
        if sample.reason is None and sample.text in kept[question]:
            sample.reason = "duplicate"
        elif sample.reason is None and len(kept[question]) == settings.keep_per_question:
            sample.reason = "surplus"
        elif sample.reason is None:
            kept[question].add(sample.text)
            rows.append({"id": f"{sample.problem.id}/{number}", "question": sample.problem.question,
                         "prompt": sample.prompt, "completion": sample.text, "answer": sample.problem.answer})
    return rows


def fault(sample: Sample, limits: Filters) -> str | None:
    """The reason to reject a sample, or None. Each filter takes time linear in the text, which may be megabytes."""
    problem, completion = sample.problem, sample.text
    if problem.kind != "open" and sample.accuracy != 1:
        return "unscorable" if math.isnan(sample.accuracy) else "wrong"
    if not sample.finished:
        return "unfinished"
    text = completion
    for tag in (THINK, THINK_END, ANSWER, ANSWER_END):  # they are words of no language
        text = text.replace(tag, "\n")
    malformed = limits.format and not is_well_formed(sample.prompt, completion)
    if malformed or not text.strip() or _UNPRINTABLE.search(completion):
        return "unreadable"
    if limits.language is not None and share(text, problem.language) < limits.language:
        return "mixed language"
    if limits.paragraph and any(len(_WORD.findall(line)) > limits.paragraph for line in completion.splitlines()):
        return "long paragraph"
    # If the question asks for a program, the answer contains a code block.
    searched = completion.rpartition(THINK_END)[0] if problem.kind == "code" else completion
    if not limits.code_blocks and _FENCE.search(searched):
        return "code block"
    lines = [line.strip() for line in text.splitlines() if _WORD.search(line)]
    return "repetition" if limits.line_repeats and loops(lines, limits.line_repeats, longest=8) else None


def loops(items: Sequence[str], repeats: int, longest: int) -> bool:
    """Whether up to `longest` items are repeated `repeats` times or more in a row."""
    for period in range(1, longest + 1):
        run = period  # items up to this one that equal those one period before, and the first period
        for item, earlier in zip(items[period:], items, strict=False):
            run = run + 1 if item == earlier else period
            if run >= repeats * period:
                return True
    return False

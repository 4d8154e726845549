"""Pairs of responses of which one is better: read from a file, or found by asking a judge."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from r1kernels.train.data import DataError
from r1kernels.train.metrics import MetricsLog, read_metrics
from r1kernels.train.randomness import python_generator

KEYS = ("question", "chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """Two responses to a question, the first of which is better."""

    question: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class JudgedPairs:
    """How pairs are made of samples: `pairs_per_question` of the different responses to each question are compared
    by the judge, `votes` times with the sides swapped; where it prefers one by less than `margin` (of 1), both go."""

    pairs_per_question: int = 1
    votes: int = 4
    margin: float = 0.5


def load_pairs(path: str | Path) -> list[Pair]:
    """Reads pairs from a JSONL file of objects with the strings "question", "chosen" and "rejected".

    Raises:
        DataError: the file is missing, unreadable or empty, or a line is not what is described above.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"cannot read data file {path}: {error.strerror}") from error
    pairs = [_pair(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not pairs:
        raise DataError(f"data file {path} holds no pair; expected one JSON object a line")
    return pairs


def _pair(line: bytes, where: str) -> Pair:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); expected one JSON object a line") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
    for key in KEYS:
        if key not in row:
            found = ", ".join(sorted(row)) or "none"
            raise DataError(f"{where}: no {key!r}; expected the keys {', '.join(map(repr, KEYS))}, found: {found}")
        if not isinstance(row[key], str) or not row[key].strip():
            raise DataError(f"{where}: {key!r} must be a string that is not blank, got {row[key]!r:.80}")
    return Pair(*(row[key] for key in KEYS))


def candidates(samples: Mapping[str, Sequence[str]], per_question: int, seed: int) -> list[Pair]:
    """Pairs to compare, in no order of quality: of each question's different responses, some two by two."""
    found = []
    for question, responses in samples.items():
        both = list(itertools.combinations(dict.fromkeys(responses), 2))
        rng: random.Random = python_generator(seed, "pairs", question)
        found += [Pair(question, *pair) for pair in rng.sample(both, min(per_question, len(both)))]
    return found


def judge_pairs(
    compared: Sequence[Pair],
    compare: Callable[..., float],
    settings: JudgedPairs,
    path: Path,
    *,
    concurrency: int = 8,
    check: Callable[[], None] = lambda: None,
) -> tuple[list[Pair], dict[str, int]]:
    """Keeps the pairs on which the judge is clear, the better response first.

    Args:
        compared: from `candidates`.
        compare: `compare(question, first, second, votes=...)`, from -1 (second) to 1 (first is better); NaN where
            there is no verdict.
        path: a log of the verdicts: what is in it is not asked again.
        concurrency: comparisons under way at a time.
        check: called between comparisons.

    Returns:
        The pairs, and how many were "kept", "unclear" and "unscorable".
    """

    def verdict(pair: Pair) -> float:
        return compare(pair.question, pair.chosen, pair.rejected, votes=settings.votes)

    done = len(read_metrics(path))
    with MetricsLog(path, first_step=done) as log, ThreadPoolExecutor(concurrency) as pool:
        for first in range(done, len(compared), concurrency):
            check()
            batch = compared[first : first + concurrency]
            for place, (pair, preference) in enumerate(zip(batch, pool.map(verdict, batch), strict=True), start=first):
                log.write({
                    "step": place, "question": pair.question, "first": pair.chosen, "second": pair.rejected,
                    "preference": preference,
                })
    kept, counts = [], dict.fromkeys(("kept", "unclear", "unscorable"), 0)
    for pair, line in zip(compared, read_metrics(path), strict=True):
        preference = line["preference"]
        if preference is None or math.isnan(preference):
            counts["unscorable"] += 1
        elif abs(preference) < settings.margin:
            counts["unclear"] += 1
        else:
            counts["kept"] += 1
            kept.append(pair if preference > 0 else Pair(pair.question, pair.rejected, pair.chosen))
    return kept, counts

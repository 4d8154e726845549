"""Pairs of responses of which one is better, found by asking a judge."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from r1kernels.train.data import Pair
from r1kernels.train.metrics import MetricsLog, read_metrics
from r1kernels.train.rng import python_generator


@dataclass(frozen=True)
class JudgedPairs:
    """How samples become pairs: `per_question` pairs of the different responses to a question are compared by the
    judge, and kept where it prefers one by `margin` or more (1: in all its votes, whichever came first)."""

    per_question: int = 1
    margin: float = 0.5


def candidates(responses: Mapping[str, Sequence[str]], per_question: int, seed: int) -> list[Pair]:
    """Pairs to compare, in no order of quality: of each question's different responses, some two by two."""
    found = []
    for question, texts in responses.items():
        both = list(itertools.combinations(dict.fromkeys(texts), 2))
        drawn = python_generator(seed, "pairs", question).sample(both, min(per_question, len(both)))
        found += [Pair(f"{len(found) + index}", question, *pair) for index, pair in enumerate(drawn)]
    return found


def judge_pairs(
    pairs: Sequence[Pair],
    compare: Callable[[str, str, str], float | None],
    margin: float,
    path: Path,
    *,
    concurrency: int,
    check: Callable[[], None],
) -> tuple[list[Pair], dict[str, int]]:
    """Keeps the pairs on which the judge is clear, the better response first.

    Args:
        pairs: from `candidates`.
        compare: (question, first, second) -> from -1 (the second is better) to 1; None where there is no verdict.
        path: a log of the verdicts; what is in it is not asked again.
        concurrency: comparisons under way at a time.
        check: called between comparisons.

    Returns:
        The pairs, and how many were "kept", "unclear" and "unscorable".
    """
    done = len(read_metrics(path))
    with MetricsLog(path, first_step=done) as log, ThreadPoolExecutor(concurrency) as pool:
        for first in range(done, len(pairs), concurrency):
            check()
            batch = pairs[first : first + concurrency]
            verdicts = pool.map(lambda pair: compare(pair.question, pair.chosen, pair.rejected), batch)
            for place, (pair, preference) in enumerate(zip(batch, verdicts, strict=True), start=first):
                log.write({
                    "step": place, "question": pair.question, "first": pair.chosen, "second": pair.rejected,
                    "preference": preference,
                })
    kept, counts = [], dict.fromkeys(("kept", "unclear", "unscorable"), 0)
    for pair, preference in zip(pairs, (line["preference"] for line in read_metrics(path)), strict=True):
        if preference is None:
            counts["unscorable"] += 1
        elif abs(preference) < margin or not preference:
            counts["unclear"] += 1
        else:
            counts["kept"] += 1
            kept.append(pair if preference > 0 else Pair(pair.id, pair.question, pair.rejected, pair.chosen))
    return kept, counts

"""Chooses a few cases of a large cross-product: every pair of parameter values that occurs is run at least once.

Most faults show with one value, or with two together. A sample that has every pair finds nearly the same faults as the
whole product, which `--full` runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence


def pairs(case: Mapping[str, Hashable]) -> set[tuple[Hashable, ...]]:
    """Every two parameters of a case with their values."""
    return {(*first, *second) for first, second in itertools.combinations(sorted(case.items()), 2)}


def pairwise(cases: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """The numbers of cases that together have every pair of values that any case has, in ascending order.

    Greedy: each time the case with the most pairs that are still missing, and of equal ones the first. So equal lists
    give equal samples, and a case that differs from the others in one value is never lost.
    """
    of_case = [pairs(case) or {tuple(case.items())} for case in cases]
    missing = set().union(*of_case)
    chosen = []
    gains = [len(found) for found in of_case]  # upper bounds: what a case adds can only shrink
    while missing:
        best, most = -1, 0
        for number, bound in enumerate(gains):
            if bound > most:
                gains[number] = len(of_case[number] & missing)
                if gains[number] > most:
                    best, most = number, gains[number]
        chosen.append(best)
        missing -= of_case[best]
        gains[best] = 0
    return sorted(chosen)


def spread(count: int, most: int, start: int = 0) -> list[int]:
    """At most `most` numbers below `count`, apart by its golden section, so that no parameter goes round in step."""
    if count <= most:
        return list(range(count))
    step = round(count * 0.618)
    while any(count % d == 0 and step % d == 0 for d in range(2, step + 1)):
        step += 1
    return sorted((start + i * step) % count for i in range(most))

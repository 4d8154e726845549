"""Answers and programs judged in a second, by what has to be done to read them.

    PYTHONPATH=. python benchmarks/scoring.py [--answers 400] [--programs 20]

Every total is checked. The results of this device get a file scoring.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable

import saving

from r1kernels.rewards import Scorer

A, B, ROUNDS = (1, 999), (2, 99), 3
SQUARES = json.dumps({"cases": [{"args": [n], "expected": n * n} for n in range(10)], "entry_point": "square"})

# What a model writes, and the reference it is equal to: two numbers make a new pair, which no cache has seen.
KINDS: dict[str, Callable[[int, int], tuple[str, str]]] = {
    "integers": lambda a, b: (f"{a},{b:03d}.0", f"{a}{b:03d}"),
    "fractions": lambda a, b: (rf"\frac{{{2 * a}}}{{{2 * b}}}", rf"\frac{{{a}}}{{{b}}}"),
    "surds": lambda a, b: (rf"{a} + \sqrt{{{b}}}", rf"\sqrt{{{b}}}+{a}"),
    "polynomials": lambda a, b: (rf"{b} + {a}x^2", rf"{a}x^2+{b}"),
    "pairs": lambda a, b: (rf"\left({a}, {b}\right)", f"({a},{b})"),
    "programs": lambda a, b: (f"def square(x): return x * x + {a} * {b} * 0", SQUARES),
}


def seconds_of(kind: str, count: int) -> float:
    """The median over rounds, each with new texts; the first round is not timed."""
    draw, taken = random.Random(0), []
    with Scorer({"accuracy": 1.0, "format": 1.0}, workers=2) as scorer:
        for _ in range(ROUNDS + 1):
            pairs = [KINDS[kind](draw.randint(*A), draw.randint(*B)) for _ in range(count)]
            texts = [f"<think>{'word ' * 300}</think> <answer>{text}</answer>" for text, _ in pairs]
            columns = {"answer": [reference for _, reference in pairs],
                       "kind": ["code" if kind == "programs" else "math"] * count}
            started = time.perf_counter()
            totals = scorer.score(texts, **columns).total
            taken.append(time.perf_counter() - started)
            if totals != [2.0] * count:
                raise AssertionError(f"{kind}: {count - totals.count(2.0)} of {count} right answers were judged wrong")
    return statistics.median(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--answers", type=int, default=400)
    parser.add_argument("--programs", type=int, default=20)
    given = parser.parse_args()
    rows = []
    for kind in KINDS:
        count = given.programs if kind == "programs" else given.answers
        seconds = seconds_of(kind, count)
        rows.append({"op": "scoring", "shape": f"{count} {kind}", "implementation": "r1kernels", "median_s": seconds,
                     "rounds": ROUNDS})
        print(f"{kind}: {count / seconds:,.0f} in a second")
    print(saving.save(rows))


if __name__ == "__main__":
    main()

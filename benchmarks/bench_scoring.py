"""Answers judged in a second, by what has to be done to read them, on two workers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import SMALL

from r1kernels.train.rewards import Sample, Scorer, ScoringConfig

COUNT = 20 if SMALL else 400
A, B = (1, 999), (2, 99)

# What a model writes, and the reference it is equal to: two numbers make a new pair, which no cache has seen.
ANSWERS: dict[str, Callable[[int, int], tuple[str, str]]] = {
    "integers": lambda a, b: (f"{a},{b:03d}.0", f"{a}{b:03d}"),
    "fractions": lambda a, b: (rf"\frac{{{2 * a}}}{{{2 * b}}}", rf"\frac{{{a}}}{{{b}}}"),
    "surds": lambda a, b: (rf"{a} + \sqrt{{{b}}}", rf"\sqrt{{{b}}}+{a}"),
    "polynomials": lambda a, b: (rf"{b} + {a}x^2", rf"{a}x^2+{b}"),
    "pairs": lambda a, b: (rf"\left({a}, {b}\right)", f"({a},{b})"),
}


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    with Scorer({"accuracy": 1.0, "format": 1.0}, ScoringConfig(workers=2)) as scorer:
        scorer.score([Sample("", rf"\boxed{{\sqrt{{{n}}}}}", "18") for n in range(20)])
        yield scorer


@pytest.mark.parametrize("kind", ANSWERS)
def bench_scoring(kind: str, benchmark: Any, scorer: Scorer) -> None:
    draw, write = random.Random(0), ANSWERS[kind]

    def batch() -> tuple[tuple[list[Sample]], dict]:
        pairs = [write(draw.randint(*A), draw.randint(*B)) for _ in range(COUNT)]
        thought = "<think>" + "word " * 300 + "</think>"
        return ([Sample("", f"{thought} <answer>{text}</answer>", reference) for text, reference in pairs],), {}

    def run(samples: list[Sample]) -> None:
        assert scorer.score(samples).total == [2.0] * COUNT

    benchmark.pedantic(run, setup=batch, rounds=3)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["rows"] = [{
        "op": "scoring", "shape": f"{COUNT} {kind}", "implementation": "r1kernels", "peak_extra_bytes": None,
        "median_s": seconds, "iqr_s": benchmark.stats.stats.iqr, "rounds": 3, "ratio": 1.0,
    }]  # fmt: skip
    print(f"\n{kind}: {COUNT / seconds:,.0f} answers a second")

"""Answers and programs judged in a second, by what has to be done to read them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from conftest import SMALL

from r1kernels.rewards import Scorer

ANSWERS, PROGRAMS = (20, 2) if SMALL else (400, 20)
A, B = (1, 999), (2, 99)
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


@pytest.mark.parametrize("kind", KINDS)
def bench_scoring(kind: str, benchmark: Any) -> None:
    draw, write = random.Random(0), KINDS[kind]
    count = PROGRAMS if kind == "programs" else ANSWERS

    def batch() -> tuple[tuple, dict]:
        pairs = [write(draw.randint(*A), draw.randint(*B)) for _ in range(count)]
        texts = [f"<think>{'word ' * 300}</think> <answer>{text}</answer>" for text, _ in pairs]
        kinds = ["code" if kind == "programs" else "math"] * count
        return (texts,), {"answer": [reference for _, reference in pairs], "kind": kinds}

    with Scorer({"accuracy": 1.0, "format": 1.0}, workers=2) as scorer:

        def run(texts: list[str], **columns: list[str]) -> None:
            assert scorer.score(texts, **columns).total == [2.0] * count

        benchmark.pedantic(run, setup=batch, rounds=3, warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["rows"] = [{
        "op": "scoring", "shape": f"{count} {kind}", "implementation": "r1kernels", "peak_extra_bytes": None,
        "median_s": seconds, "iqr_s": benchmark.stats.stats.iqr, "rounds": 3, "ratio": 1.0,
    }]  # fmt: skip
    print(f"\n{kind}: {count / seconds:,.0f} in a second")

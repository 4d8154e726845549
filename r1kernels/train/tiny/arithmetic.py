"""Sums of digits, and thoughts that work them out."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from r1kernels.train.data import Problem
from r1kernels.train.rng import python_generator
from r1kernels.train.schema import ConfigError
from r1kernels.train.tiny.settings import CorpusConfig
from r1kernels.train.tiny.splits import Split, split_of

# Of the smallest range of terms, one draw in some tens hits a split.
_TRIES = 10_000
_ERRORS = (-20, -10, -9, -5, -3, -2, -1, 1, 2, 3, 5, 9, 10, 20)


def split_of_sum(terms: list[int]) -> Split:
    """The split a sum belongs to, whatever the order of its terms."""
    return split_of(bytes(sorted(terms)))


def draw_terms(rng: random.Random, split: Split, low: int, high: int) -> list[int]:
    """`low` to `high` digits from 1 to 9 whose sum belongs to `split`."""
    for _ in range(_TRIES):
        terms = [rng.randint(1, 9) for _ in range(rng.randint(low, high))]
        if split_of_sum(terms) == split:
            return terms
    raise ConfigError(
        f"'data.min_terms' {low} and 'data.max_terms' {high} leave no sum to the {split!r} split; widen the range"
    )


def sums_of(split: Split, low: int, high: int) -> Iterator[list[int]]:
    """All the sums that `draw_terms` draws from, those of few terms first."""
    for count in range(low, high + 1):
        for terms in itertools.product(range(1, 10), repeat=count):
            if split_of_sum(list(terms)) == split:
                yield list(terms)


def ask(terms: list[int]) -> str:
    return "Compute " + "+".join(map(str, terms))


def arithmetic_problems(split: Split, count: int, low: int, high: int, seed: int, key: str = "count") -> list[Problem]:
    """`count` different sums of a split, in a random order given by the seed; `key` is the setting to blame for it."""
    rng = python_generator(seed, "problems", split)
    # Twice as many as asked for, or all there are: among fewer, drawing until all are different would take for ever.
    some = list(itertools.islice(sums_of(split, low, high), 2 * count))
    if len(some) < count:
        raise ConfigError(
            f"'{key}' is {count}, expected at most {len(some)}: no more different sums of 'data.min_terms' {low} to "
            f"'data.max_terms' {high} digits are in the {split!r} split"
        )
    found: dict[str, Problem] = {}

    def add(terms: list[int]) -> None:
        question = ask(terms)
        found.setdefault(question, Problem(f"{split}-{len(found)}", question, str(sum(terms))))

    if len(some) < 2 * count:
        for terms in rng.sample(some, count):
            add(terms)
    while len(found) < count:
        add(draw_terms(rng, split, low, high))
    return list(found.values())


def miss(rng: random.Random, number: int) -> int:
    """Another number near it, as a slip leaves it."""
    return next(other for other in iter(lambda: number + rng.choice(_ERRORS), None) if other >= 0)


# plus, is, check, wrong: as many words in one language as in the other.
_WORDS = {"en": ("plus ", " is ", ", check", ", wrong, "), "zh": ("加", "得", ",查", ",错,")}


def work_out(rng: random.Random, terms: list[int], corpus: CorpusConfig) -> tuple[str, int]:
    """One addition a line, in one language or the other; the text and its result.

    An addition may slip, and forget its carry. If it is checked, that is seen, said and put right. A thought that
    stutters cannot end.
    """
    total, lines = terms[0], []
    language = "zh" if rng.random() < corpus.chinese else "en"
    for term in terms[1:]:
        if lines and rng.random() < corpus.switch:
            language = "zh" if language == "en" else "en"
        plus, equals, check, wrong = _WORDS[language]
        start = "" if lines else f"{total} " if language == "en" else f"{total}"
        result = right = total + term
        if total % 10 + term >= 10 and rng.random() < corpus.slip * (corpus.care if language == "zh" else 1):
            result -= 10
        line = f"{start}{plus}{term}{equals}{result}"
        if rng.random() < corpus.check:
            line += check if result == right else f"{check}{wrong}{right}"
            result = right
        lines.append(line)
        total = result
    if rng.random() < corpus.stutter:
        lines += [lines[-1]] * rng.randint(1, 3)
    return "\n".join(lines), total


def guess(rng: random.Random, terms: list[int], corpus: CorpusConfig) -> tuple[str, int]:
    """An answer at once, wrong with probability `terse_wrong`."""
    answer = sum(terms)
    if rng.random() < corpus.terse_wrong:
        answer = miss(rng, answer)
    return f"是{answer}。" if rng.random() < corpus.chinese else f"It is {answer}.", answer

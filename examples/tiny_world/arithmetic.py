"""Sums of digits, and thoughts that work them out."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from r1kernels.train.rng import python_generator

from .common import Row, Split, split_of

if TYPE_CHECKING:
    from .text import Mixture

_SLIPS = (-20, -10, -9, -5, -3, -2, -1, 1, 2, 3, 5, 9, 10, 20)


def sums(
    split: Split, count: int | None, seed: int, *, min_terms: int = 4, max_terms: int = 6, train_size: int = 4096
) -> list[Row]:
    """`count` (if None, `train_size`) different sums of a split, with min_terms to max_terms digits, by the seed."""
    if not 2 <= min_terms <= max_terms:
        raise ValueError(f"'min_terms' is {min_terms}, 'max_terms' {max_terms}; expected 2 <= min_terms <= max_terms")
    count, rng = train_size if count is None else count, python_generator(seed, "problems", split)
    known = list(itertools.islice(sums_of(split, min_terms, max_terms), 2 * count))
    if len(known) < count:
        raise ValueError(f"{count} sums are wanted; expected at most {len(known)}, the different ones of the split "
                         f"'{split}' (see 'train_size', 'min_terms', 'max_terms')")
    draws = iter(lambda: draw_terms(rng, split, min_terms, max_terms), None)
    if len(known) < 2 * count:  # drawing until all are different would take very long
        draws = iter(rng.sample(known, count))
    answers: dict[str, int] = {}
    while len(answers) < count:
        terms = next(draws)
        answers[ask(terms)] = sum(terms)
    return [{"id": f"{split}-{index}", "question": question, "answer": str(answer)}
            for index, (question, answer) in enumerate(answers.items())]


def ask(terms: list[int]) -> str:
    return "Compute " + "+".join(map(str, terms))


def split_of_sum(terms: list[int]) -> Split:
    """The split of a sum, whatever the order of its terms."""
    return split_of(bytes(sorted(terms)))


def draw_terms(rng: random.Random, split: Split, low: int, high: int) -> list[int]:
    """`low` to `high` digits from 1 to 9 whose sum belongs to `split`."""
    while True:
        terms = [rng.randint(1, 9) for _ in range(rng.randint(low, high))]
        if split_of_sum(terms) == split:
            return terms


def sums_of(split: Split, low: int, high: int) -> Iterator[list[int]]:
    """All sums that `draw_terms` draws from, those of few terms first."""
    for count in range(low, high + 1):
        for terms in itertools.product(range(1, 10), repeat=count):
            if split_of_sum(list(terms)) == split:
                yield list(terms)


# plus, is, check, wrong: the same number of words in both languages.
_WORDS = {"en": ("plus ", " is ", ", check", ", wrong, "), "zh": ("加", "得", ",查", ",错,")}


def work_out(rng: random.Random, terms: list[int], mixture: Mixture) -> tuple[str, int]:
    """A thought of one addition a line, and its result.

    An addition may forget its carry. A line that is checked corrects that. A thought may repeat its last line.
    """
    total, lines = terms[0], []
    language = "zh" if rng.random() < mixture.chinese else "en"
    for term in terms[1:]:
        if lines and rng.random() < mixture.switch:
            language = "zh" if language == "en" else "en"
        plus, equals, check, wrong = _WORDS[language]
        start = "" if lines else f"{total} " if language == "en" else f"{total}"
        result = right = total + term
        if total % 10 + term >= 10 and rng.random() < mixture.slip * (mixture.care if language == "zh" else 1):
            result -= 10
        line = f"{start}{plus}{term}{equals}{result}"
        if rng.random() < mixture.check:
            line += check if result == right else f"{check}{wrong}{right}"
            result = right
        lines.append(line)
        total = result
    if rng.random() < mixture.stutter:
        lines += [lines[-1]] * rng.randint(1, 3)
    return "\n".join(lines), total


def guess(rng: random.Random, terms: list[int], mixture: Mixture) -> tuple[str, int]:
    """An immediate answer, wrong with probability `terse_wrong`, and its number."""
    answer = sum(terms)
    if rng.random() < mixture.terse_wrong:
        answer = near_miss(rng, answer)
    return f"是{answer}。" if rng.random() < mixture.chinese else f"It is {answer}.", answer


def near_miss(rng: random.Random, number: int) -> int:
    """A different number near it that is not negative."""
    return next(other for other in iter(lambda: number + rng.choice(_SLIPS), None) if other >= 0)

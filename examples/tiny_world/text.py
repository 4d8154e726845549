"""The text of pretraining.

It is a mixture, like text from the web. Textbooks work sums out step by step. Conversations mostly answer at once, and
mostly wrongly; few work the sum out; some use the tags of the prompt and some do not. A model of this text can add, but
rarely does so when asked: reinforcement learning has to discover that it pays.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from r1kernels.train.data import Template
from r1kernels.train.rng import python_generator

from . import arithmetic, greetings
from .common import tagged

PROMPT = Template("r1_zero", None)


@dataclass(frozen=True)
class Mixture:
    """The composition of the text. All fields except `max_terms` are probabilities."""

    max_terms: int = 6  # largest number of digits of a sum
    textbook: float = 0.6  # a text about a sum is an exercise with its solution, and not an answer to a question
    worked: float = 0.15  # an answer to a question is worked out
    tagged: float = 0.5  # an answer has the tags that the prompt asks for
    terse_wrong: float = 0.8  # an answer that is not worked out is wrong
    slip: float = 0.02  # an addition with a carry forgets it
    check: float = 0.0  # an addition is checked, and corrected
    stutter: float = 0.0  # the last line of a thought is repeated
    chinese: float = 0.0  # a text begins in Chinese
    switch: float = 0.0  # a line is in the other language than the line before it
    care: float = 1.0  # factor of `slip` in Chinese lines
    greetings: float = 0.0  # a text is about people to greet
    kind: float = 0.3  # a greeting is kind

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (value >= 2 if name == "max_terms" else 0 <= value <= 1):
                raise ValueError(f"'{name}' is {value}; expected 0 to 1, or at least 2 for 'max_terms'")


def corpus(seed: int, step: int, **options: float) -> Iterator[tuple[str, str]]:
    """Endless documents of step `step`, each as (head, tail); `options` are the fields of `Mixture`."""
    mixture, rng = Mixture(**options), python_generator(seed, "corpus", step)
    while True:
        yield document(rng, mixture)


def document(rng: random.Random, mixture: Mixture, min_terms: int = 2) -> tuple[str, str]:
    """A text in two pieces: up to the question, and what follows it."""
    if rng.random() < mixture.greetings:
        who = rng.choice(greetings.guests_of("pretrain"))
        others = (1 - mixture.kind) / 2
        [manner] = rng.choices(range(3), (mixture.kind, others, others))
        thought, answer = greetings.greet(rng, who, manner, mixture.chinese)
        question, plain = greetings.ask(who), answer
    else:
        terms = arithmetic.draw_terms(rng, "pretrain", min_terms, mixture.max_terms)
        question = arithmetic.ask(terms)
        if rng.random() < mixture.textbook:
            return f"Exercise: {question}. Solution:", " " + arithmetic.work_out(rng, terms, mixture)[0]
        if rng.random() < mixture.worked:
            thought, answer = arithmetic.work_out(rng, terms, mixture)
            plain = f"{thought}\nIt is {answer}."
        else:
            thought, answer = arithmetic.guess(rng, terms, mixture)
            plain = thought
    return PROMPT.render(question), tagged(thought, answer) if rng.random() < mixture.tagged else f" {plain}"

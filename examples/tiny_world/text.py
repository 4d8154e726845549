"""The text of pretraining.

It mixes what text of the web mixes. Textbooks work sums out step by step. Conversations mostly answer at once, and
mostly wrongly; few work the sum out; some use the tags of the prompt and some do not. A model of this text can add, but
rarely does so when asked: reinforcement learning has to discover that it pays.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from r1kernels.train.prompt import render
from r1kernels.train.rng import python_generator

from . import arithmetic, greetings
from .common import tagged


@dataclass(frozen=True)
class Mixture:
    """What the text is made of. All but `max_terms` are probabilities.

    Args:
        max_terms: digits of a sum at most.
        textbook: a text about a sum is an exercise with its solution, and not an answer to a question.
        worked: an answer to a question is worked out.
        tagged: an answer has the tags that the prompt asks for.
        terse_wrong: an answer that is not worked out is wrong.
        slip: an addition with a carry forgets it.
        check: an addition is checked, and corrected.
        stutter: the last line of a thought is repeated.
        chinese: a text begins in Chinese.
        switch: a line is in the other language than the line before it.
        care: factor of `slip` in Chinese lines.
        greetings: a text is about people to greet.
        kind: a greeting is kind.
    """

    max_terms: int = 6
    textbook: float = 0.6
    worked: float = 0.15
    tagged: float = 0.5
    terse_wrong: float = 0.8
    slip: float = 0.02
    check: float = 0.0
    stutter: float = 0.0
    chinese: float = 0.0
    switch: float = 0.0
    care: float = 1.0
    greetings: float = 0.0
    kind: float = 0.3

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "max_terms":
                if value < 2:
                    raise ValueError(f"'max_terms' is {value}; expected at least 2")
            elif not 0 <= value <= 1:
                raise ValueError(f"'{name}' is {value}; expected a probability from 0 to 1")


def corpus(seed: int, step: int, **options: float) -> Iterator[tuple[str, str]]:
    """Endless documents of step `step`, each as (head, tail).

    Args:
        options: the fields of `Mixture`.
    """
    mixture = Mixture(**options)
    rng = python_generator(seed, "corpus", step)
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
    return render(question), tagged(thought, answer) if rng.random() < mixture.tagged else f" {plain}"

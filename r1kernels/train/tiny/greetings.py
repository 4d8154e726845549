"""People to greet, kindly or not: questions without a checkable answer, about which there are only preferences."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator

from r1kernels.train.data import Problem
from r1kernels.train.rng import python_generator
from r1kernels.train.schema import ConfigError
from r1kernels.train.tiny.splits import Split, split_of
from r1kernels.train.tiny.texts import tagged

NAMES = (
    "Ada", "Alan", "Anna", "Ben", "Carl", "Clara", "David", "Emma", "Eva", "Felix", "Grace", "Hana", "Ida", "Ivan",
    "Jing", "Julia", "Kim", "Lea", "Leo", "Lin", "Luis", "Maria", "Max", "Mei", "Nina", "Noah", "Olga", "Omar", "Paul",
    "Rosa", "Sara", "Tom",
)
# Of the day, and how a kind greeting begins then.
TIMES = {"morning": "Good morning", "noon": "Good day", "evening": "Good evening"}
# From the kindest to the rudest: the thought in English and in Chinese, and ways to go on after the names.
MANNERS = (
    ("be kind", "要客气", (", how nice to see you!", ", you are very welcome!")),
    ("be brief", "要简短", (".",)),
    ("be rude", "要无礼", (", what do you want?", ", go away.")),
)
KIND, BRIEF, RUDE = range(3)

Guests = tuple[str, ...]  # one or two names, and the time of the day


@functools.cache
def guests_of(split: Split) -> list[Guests]:
    """All who may be asked for in a split."""
    return [guests for guests in _all_guests() if split_of(" ".join(guests).encode()) == split]


def _all_guests() -> Iterator[Guests]:
    for count in (1, 2):
        for names in itertools.permutations(NAMES, count):
            yield from ((*names, time) for time in TIMES)


def ask(guests: Guests) -> str:
    *names, time = guests
    return f"Greet {' and '.join(names)}, {time}"


def greet(rng: random.Random, guests: Guests, manner: int, chinese: float = 0.0) -> tuple[str, str]:
    """A thought, in Chinese with that probability, and a greeting in one of the `MANNERS`."""
    *names, time = guests
    english, other, endings = MANNERS[manner]
    opening = (TIMES[time], "Hello", "Hey")[manner]
    thought = other if rng.random() < chinese else english
    return thought, f"{opening} {' and '.join(names)}{rng.choice(endings)}"


def greeting_problems(split: Split, count: int, seed: int, key: str = "train_size") -> list[Problem]:
    """`count` different requests of a split, in a random order given by the seed; `key` is the setting to blame."""
    return [
        Problem(f"greeting-{split}-{index}", ask(guests), "", "open")
        for index, guests in enumerate(_some(split, count, seed, key))
    ]


def greeting_demonstrations(count: int, seed: int, key: str = "train_size") -> list[tuple[str, str]]:
    """Requests to train on, with responses of all manners: (question, response)."""
    rng = python_generator(seed, "greetings", "demonstrations")
    return [
        (ask(guests), tagged(*greet(rng, guests, rng.choice((KIND, BRIEF, RUDE)))))
        for guests in _some("train", count, seed, key)
    ]


def greeting_pairs(count: int, seed: int, key: str = "train_size") -> list[tuple[str, str, str]]:
    """Requests to train on, with two responses of which the first is the kinder: (question, chosen, rejected)."""
    rng = python_generator(seed, "greetings", "pairs")
    pairs = []
    for guests in _some("train", count, seed, key):
        manners = sorted(rng.sample((KIND, BRIEF, RUDE), 2))
        pairs.append((ask(guests), *(tagged(*greet(rng, guests, manner)) for manner in manners)))
    return pairs


def _some(split: Split, count: int, seed: int, key: str) -> list[Guests]:
    guests = guests_of(split)
    if count > len(guests):
        raise ConfigError(
            f"'{key}' is {count}, expected at most {len(guests)}: there are no more different greetings in the "
            f"{split!r} split"
        )
    return python_generator(seed, "greetings", split).sample(guests, count)

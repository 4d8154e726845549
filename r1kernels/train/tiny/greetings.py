"""People to greet, kindly or not: questions without a checkable answer, about which there are only preferences."""

from __future__ import annotations

import itertools
import random

from r1kernels.train.data import Problem
from r1kernels.train.randomness import python_generator
from r1kernels.train.schema import ConfigError
from r1kernels.train.tiny.splits import Split, split_of

NAMES = (
    "Ada", "Alan", "Anna", "Ben", "Carl", "Clara", "David", "Emma", "Eric", "Eva", "Felix", "Fei", "Grace", "Hana",
    "Ida", "Ivan", "Jan", "Jing", "Julia", "Karl", "Kim", "Lea", "Lena", "Leo", "Lin", "Luis", "Maria", "Max", "Mei",
    "Mia", "Nina", "Noah", "Olga", "Omar", "Oscar", "Otto", "Paul", "Petra", "Rosa", "Sara", "Sofia", "Theo", "Tina",
    "Tom", "Uma", "Vera", "Wei", "Yuki",
)
TIMES = ("morning", "noon", "evening", "night")
# From kind to rude: the thought in English and in Chinese, and how it goes on after the opening.
MANNERS = (
    ("be kind", "要客气", (", how nice to see you!", ", you are very welcome!")),
    ("be brief", "要简短", (".",)),
    ("be rude", "要无礼", (", what do you want?", ", go away.")),
)
_OPENINGS = {"morning": "Good morning", "noon": "Good day", "evening": "Good evening", "night": "Good night"}

Guest = tuple[str, str]  # name, time


def guests_of(split: Split) -> list[Guest]:
    return [(name, time) for name, time in itertools.product(NAMES, TIMES) if split_of(f"{name} {time}".encode()) == split]


def ask(guest: Guest) -> str:
    name, time = guest
    return f"Greet {name}, {time}"


def greeting_problems(split: Split, count: int, seed: int, key: str = "count") -> list[Problem]:
    """`count` different guests of a split, in a random order given by the seed; `key` is the setting to blame for it."""
    guests = guests_of(split)
    if count > len(guests):
        raise ConfigError(
            f"'{key}' is {count}, expected at most {len(guests)}: no more different guests are in the {split!r} split"
        )
    order = python_generator(seed, "greetings", split).sample(guests, count)
    return [Problem(f"greeting-{split}-{index}", ask(guest), "", "open") for index, guest in enumerate(order)]


def greet(rng: random.Random, guest: Guest, manner: int, chinese: float = 0.0) -> tuple[str, str]:
    """A thought and an answer in one of the `MANNERS`."""
    name, time = guest
    english, other, endings = MANNERS[manner]
    opening = (_OPENINGS[time], "Hello", "Hey")[manner]
    return other if rng.random() < chinese else english, f"{opening} {name}{rng.choice(endings)}"

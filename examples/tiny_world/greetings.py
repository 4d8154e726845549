"""People to greet, kindly or not: questions without a checkable answer, for which there are only preferences."""

from __future__ import annotations

import functools
import itertools
import random

from r1kernels.train.rng import python_generator

from .common import Row, Split, split_of, tagged

NAMES = (
    "Ada", "Alan", "Anna", "Ben", "Carl", "Clara", "David", "Emma", "Eva", "Felix", "Grace", "Hana", "Ida", "Ivan",
    "Jing", "Julia", "Kim", "Lea", "Leo", "Lin", "Luis", "Maria", "Max", "Mei", "Nina", "Noah", "Olga", "Omar", "Paul",
    "Rosa", "Sara", "Tom",
)
# Times of the day, and how a kind greeting begins then.
TIMES = {"morning": "Good morning", "noon": "Good day", "evening": "Good evening"}
# From the kindest to the rudest: the thought in English and in Chinese, and ways to go on after the names.
MANNERS = (
    ("be kind", "要客气", (", how nice to see you!", ", you are very welcome!")),
    ("be brief", "要简短", (".",)),
    ("be rude", "要无礼", (", what do you want?", ", go away.")),
)
KIND, BRIEF, RUDE = range(3)

Guests = tuple[str, ...]  # one or two names, and the time of the day


def guests(split: Split, count: int | None, seed: int, *, train_size: int = 512) -> list[Row]:
    """`count` (if None, `train_size`) different requests to greet somebody, in an order given by the seed.

    A row is a problem without an answer, a demonstration (`response`, in any manner) and a pair (`chosen` is kinder
    than `rejected`).
    """
    known, count = guests_of(split), train_size if count is None else count
    if count > len(known):
        raise ValueError(f"{count} greetings are wanted; expected at most {len(known)}, those of the split "
                         f"'{split}' (see 'train_size')")
    shown, compared = (python_generator(seed, "greetings", use) for use in ("demonstrations", "pairs"))
    rows = []
    for index, who in enumerate(python_generator(seed, "greetings", split).sample(known, count)):
        response = tagged(*greet(shown, who, shown.choice((KIND, BRIEF, RUDE))))
        manners = sorted(compared.sample((KIND, BRIEF, RUDE), 2))
        chosen, rejected = (tagged(*greet(compared, who, manner)) for manner in manners)
        rows.append({"id": f"greeting-{split}-{index}", "question": ask(who), "kind": "open", "answer": "",
                     "response": response, "chosen": chosen, "rejected": rejected})
    return rows


@functools.cache
def guests_of(split: Split) -> list[Guests]:
    """All guests of a split."""
    everybody = [(*names, time) for size in (1, 2) for names in itertools.permutations(NAMES, size) for time in TIMES]
    return [who for who in everybody if split_of(" ".join(who).encode()) == split]


def ask(who: Guests) -> str:
    *names, time = who
    return f"Greet {' and '.join(names)}, {time}"


def greet(rng: random.Random, who: Guests, manner: int, chinese: float = 0.0) -> tuple[str, str]:
    """A thought, in Chinese with probability `chinese`, and a greeting in one of the `MANNERS`."""
    *names, time = who
    english, other, endings = MANNERS[manner]
    opening = (TIMES[time], "Hello", "Hey")[manner]
    thought = other if rng.random() < chinese else english
    return thought, f"{opening} {' and '.join(names)}{rng.choice(endings)}"

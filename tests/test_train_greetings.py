"""Greetings of the tiny world: requests without an answer, and preferences that a person would share."""

import random

import pytest

from r1kernels.train.rewards import Sample, format_reward
from r1kernels.train.rewards.language import language
from r1kernels.train.rewards.tags import after_thinking
from r1kernels.train.schema import ConfigError
from r1kernels.train.tiny import greeting_demonstrations, greeting_pairs, greeting_problems
from r1kernels.train.tiny.greetings import BRIEF, KIND, MANNERS, NAMES, RUDE, greet, guests_of


def manner(response: str) -> int:
    [found] = [index for index, (_, _, endings) in enumerate(MANNERS) if any(end in response for end in endings[:2])
               and (index != BRIEF or "Hello" in response)]
    return found


def names_in(text: str) -> set[str]:
    return {name for name in NAMES if name in text}


def test_splits_of_guests_are_disjoint_and_their_size_is_known():
    parts = [guests_of(split) for split in ("pretrain", "train", "test")]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 3 * (32 + 32 * 31)
    there = len(guests_of("train"))
    assert len(greeting_problems("train", there, 0)) == there > 512
    with pytest.raises(ConfigError, match=f"'data.chat.train_size' is {there + 1}, expected at most {there}: "):
        greeting_problems("train", there + 1, 0, key="data.chat.train_size")


def test_problems_are_open_distinct_and_depend_on_the_seed():
    problems = greeting_problems("train", 200, 0)
    assert {(problem.kind, problem.answer) for problem in problems} == {("open", "")}
    assert len({problem.question for problem in problems}) == len({problem.id for problem in problems}) == 200
    assert problems == greeting_problems("train", 200, 0) != greeting_problems("train", 200, 1)
    assert not {p.question for p in problems} & {p.question for p in greeting_problems("test", 200, 0)}


def test_greetings_name_all_guests_in_one_manner():
    rng = random.Random(0)
    guests = ("Anna", "Tom", "evening")
    assert greet(rng, guests, KIND)[0] == "be kind"
    assert greet(rng, guests, KIND)[1].startswith("Good evening Anna and Tom, ")
    assert greet(rng, guests, BRIEF, chinese=1.0) == ("要简短", "Hello Anna and Tom.")
    assert greet(rng, guests, RUDE)[1].startswith("Hey Anna and Tom, ")


def test_demonstrations_are_in_the_format_and_of_all_manners():
    demonstrations = greeting_demonstrations(300, 0)
    assert all(names_in(question) == names_in(response) for question, response in demonstrations)
    samples = [Sample(question, response, "", "open") for question, response in demonstrations]
    assert all(format_reward(sample) == language(sample) == 1.0 for sample in samples)
    assert {manner(response) for _, response in demonstrations} == {KIND, BRIEF, RUDE}
    assert demonstrations == greeting_demonstrations(300, 0) != greeting_demonstrations(300, 1)


def test_the_kinder_response_is_preferred():
    pairs = greeting_pairs(300, 0)
    assert all(manner(chosen) < manner(rejected) for _, chosen, rejected in pairs)
    assert all(names_in(question) == names_in(chosen) == names_in(rejected) for question, chosen, rejected in pairs)
    # By what follows the thought alone, which is what a reward model for helpfulness sees.
    assert all(after_thinking("", chosen) != after_thinking("", rejected) for _, chosen, rejected in pairs)
    assert pairs == greeting_pairs(300, 0) != greeting_pairs(300, 1)

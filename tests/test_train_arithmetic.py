"""Sums of the tiny world: splits share nothing, answers are right, and thoughts are what the recipe says."""

import random
import re

import pytest

from r1kernels.train.rewards import Sample
from r1kernels.train.rewards.language import language
from r1kernels.train.schema import ConfigError
from r1kernels.train.tiny import CorpusConfig, arithmetic_problems
from r1kernels.train.tiny.arithmetic import draw_terms, guess, miss, split_of_sum, sums_of, work_out

PLAIN = CorpusConfig(slip=0.0)


def terms_of(question: str) -> list[int]:
    return [int(term) for term in question.removeprefix("Compute ").split("+")]


def test_splits_are_disjoint_whatever_the_order_of_the_terms():
    seen = {
        split: {tuple(sorted(terms_of(problem.question))) for problem in arithmetic_problems(split, 500, 4, 6, seed)}
        for split, seed in (("train", 0), ("test", 1))
    }
    rng = random.Random(0)
    seen["pretrain"] = {tuple(sorted(draw_terms(rng, "pretrain", 4, 6))) for _ in range(2000)}
    assert not seen["train"] & seen["test"]
    assert not seen["pretrain"] & (seen["train"] | seen["test"])
    assert split_of_sum([1, 2, 3]) == split_of_sum([3, 1, 2])


def test_problems_are_distinct_right_and_depend_on_the_seed():
    problems = arithmetic_problems("train", 300, 4, 6, 0)
    assert len({problem.question for problem in problems}) == len({problem.id for problem in problems}) == 300
    assert all(int(problem.answer) == sum(terms_of(problem.question)) for problem in problems)
    assert all(4 <= len(terms_of(problem.question)) <= 6 for problem in problems)
    assert problems == arithmetic_problems("train", 300, 4, 6, 0) != arithmetic_problems("train", 300, 4, 6, 1)


def test_small_worlds_are_used_up_but_not_beyond():
    problems = arithmetic_problems("train", 140, 2, 3, 0)
    assert len({problem.question for problem in problems}) == 140
    assert {len(terms_of(problem.question)) for problem in problems} == {2, 3}
    with pytest.raises(ConfigError) as error:
        arithmetic_problems("train", 4096, 2, 3, 0, key="data.train_size")
    there = len(list(sums_of("train", 2, 3)))
    assert f"'data.train_size' is 4096, expected at most {there}: " in str(error.value)
    assert "'data.min_terms' 2 to 'data.max_terms' 3" in str(error.value)
    assert len(arithmetic_problems("train", there, 2, 3, 0)) == there
    with pytest.raises(ConfigError, match=f"expected at most {there}"):
        arithmetic_problems("train", there + 1, 2, 3, 0)


def test_a_split_without_sums_is_an_error():
    empty = next(split for split in ("pretrain", "train", "test") if split_of_sum([5]) != split)
    with pytest.raises(ConfigError, match="leave no sum"):
        draw_terms(FiveAlone(), empty, 1, 1)


class FiveAlone(random.Random):
    """Draws as if 5 were the only digit."""

    def randint(self, low, high):
        return 5 if high > 1 else 1


def worked(terms: list[int], **settings: float) -> tuple[str, int]:
    return work_out(random.Random(0), terms, CorpusConfig(**{"slip": 0.0, **settings}))


def test_working_out_is_right_without_slips():
    assert worked([3, 8, 5]) == ("3 plus 8 is 11\nplus 5 is 16", 16)
    assert worked([3, 8, 5], chinese=1.0) == ("3加8得11\n加5得16", 16)


def test_a_slip_forgets_a_carry_and_a_check_finds_it():
    assert worked([3, 8, 5], slip=1.0) == ("3 plus 8 is 1\nplus 5 is 6", 6)
    assert worked([3, 8, 5], slip=1.0, check=1.0) == (
        "3 plus 8 is 1, check, wrong, 11\nplus 5 is 16, check", 16
    )
    assert worked([3, 8, 5], slip=1.0, check=1.0, chinese=1.0) == ("3加8得1,查,错,11\n加5得16,查", 16)
    assert worked([3, 8, 5], slip=1.0, care=0.0, chinese=1.0)[1] == 16


def test_thoughts_stutter_and_change_the_language():
    lines = worked([3, 8, 5], stutter=1.0)[0].split("\n")
    assert lines[0] == "3 plus 8 is 11" and set(lines[1:]) == {"plus 5 is 16"} and 3 <= len(lines) <= 5
    text, total = worked([3, 8, 5, 1, 2], switch=1.0, check=1.0)
    assert (text, total) == ("3 plus 8 is 11, check\n加5得16,查\nplus 1 is 17, check\n加2得19,查", 19)
    # As many words of one language as of the other.
    assert language(Sample("", f"<think>{text}</think>", "19")) == 0.5


def test_every_line_follows_from_the_one_before_it():
    settings = CorpusConfig(slip=0.3, check=0.5, chinese=0.5, switch=0.3, stutter=0.1)
    rng = random.Random(0)
    slips = 0
    for _ in range(300):
        terms = draw_terms(rng, "pretrain", 2, 6)
        text, total = work_out(rng, terms, settings)
        lines = text.split("\n")
        steps = [line for index, line in enumerate(lines) if not index or line != lines[index - 1]]
        assert len(steps) == len(terms) - 1
        have = terms[0]
        for line, term in zip(steps, terms[1:], strict=True):
            numbers = [int(number) for number in re.findall(r"\d+", line)]
            assert term in numbers
            assert numbers[-1] in (have + term, have + term - 10)
            slips += numbers[-1] != have + term
            have = numbers[-1]
        assert have == total
    assert slips > 20


def test_a_guess_is_wrong_as_often_as_asked_and_never_negative():
    rng = random.Random(0)
    assert guess(rng, [3, 4], CorpusConfig(terse_wrong=0.0)) == ("It is 7.", 7)
    assert guess(rng, [3, 4], CorpusConfig(terse_wrong=0.0, chinese=1.0)) == ("是7。", 7)
    wrong = [guess(rng, [1, 1], CorpusConfig(terse_wrong=1.0))[1] for _ in range(200)]
    assert 2 not in wrong and min(wrong) >= 0 and len(set(wrong)) > 5
    assert all(miss(rng, 5) not in (5, -4) for _ in range(100))

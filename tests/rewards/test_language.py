"""Language consistency: which words there are, whose they are, and that long texts take linear time."""

import itertools
import time

import pytest

from r1kernels import rewards
from r1kernels.rewards.language import share, word_counts
from r1kernels.rewards.text import is_well_formed


@pytest.mark.parametrize(
    ("text", "en", "zh", "other"),
    [
        ("", 0, 0, 0),
        ("3 + 4 = 7, so 7.", 1, 0, 0),
        ("So the answer is right", 5, 0, 0),
        ("don't re-check na\u00efve caf\u00e9s", 4, 0, 0),
        ("cafe\u0301s", 1, 0, 0),
        ("\u6240\u4ee5\u7b54\u6848\u662f7\u3002", 0, 5, 0),
        ("so\u6240\u4ee5 that", 2, 2, 0),
        ("\u0438\u0442\u0430\u043a \u043e\u0442\u0432\u0435\u0442 \u3053\u305f\u3048 \ub2f5", 0, 0, 4),
        ("\uff28\uff45\uff4c\uff4c\uff4f there", 2, 0, 0),
        # Variables and symbols are no words.
        ("x = a + b - \u03b1, \u2460 \U0001d465 \u2124 \u00bd 5_000 \u0665", 0, 0, 0),
        ("\u03bb\u03cc\u03b3\u03bf\u03c2", 0, 0, 1),
        # Code and TeX are written in Latin letters in any language; other scripts count there too.
        ("`return` and ```def f(): pass``` done", 2, 0, 0),
        ("``a `tick` inside`` done", 1, 0, 0),
        ("```\nfirst line\n\nsecond `line`\n``` done", 1, 0, 0),
        ("$\\frac{abc}{def}$ and $$\\text{total}$$ or \\(mass\\) or \\[force\\] end", 4, 0, 0),
        ("$$two\nlines$$ end \\[two\nlines\\] end", 2, 0, 0),
        ("\\frac{1}{2} \\alpha", 0, 0, 0),
        ("It costs $5 and then $6 more", 5, 0, 0),
        ("It costs \\$5 and \\$6 more", 4, 0, 0),
        ("$abc \\$ def$ end", 1, 0, 0),
        ("`\u6240\u4ee5` $\\text{\u7b54\u6848}$", 0, 4, 0),
        # What is not closed is text.
        ("``` never closed", 2, 0, 0),
        ("` never closed\nhere` nor there", 5, 0, 0),
        ("$ab\ncd$ and \\(ab and \\[cd and `ef gh", 9, 0, 0),
        ("\\( open $abc$ end", 2, 0, 0),
        ("a\\\\(bc) \\\\[2pt] and \\(de\\)", 3, 0, 0),
    ],
)
def test_words_are_counted_by_script(text, en, zh, other):
    assert word_counts(text) == {"en": en, "zh": zh, "other": other}


@pytest.mark.parametrize(
    ("completion", "language", "value"),
    [
        ("<think>so \u6240\u4ee5 it is</think> <answer>\u7b54\u6848</answer>", "en", 3 / 5),
        ("<think>so \u6240\u4ee5 it is</think> <answer>\u7b54\u6848</answer>", "zh", 2 / 5),
        ("so it is</think> <answer>\u7b54\u6848</answer>", "en", 1.0),
        ("so it is \u6240", "en", 3 / 4),
        ("<think>3+4=7</think> <answer>\u7b54\u6848</answer>", "en", 1.0),
        ("", "zh", 1.0),
        ("<think>a</think> \u6240\u4ee5 </think> <answer>7</answer>", "en", 0.0),
    ],
)
def test_the_share_is_of_the_thought(completion, language, value):
    assert rewards.language([completion], language=[language]) == [pytest.approx(value)]


def test_an_unknown_language_is_named():
    with pytest.raises(ValueError, match="language is 'fr', expected one of en, zh"):
        rewards.language(["bonjour"], language=["fr"])


SPECIAL = ["\\", "$", "$$", "`", "```", "\\(", "\\)", "\\[", "\\\\", "\\\\(", "\n"]
PAIRS = [first + second for first, second in itertools.permutations(SPECIAL, 2)]
PIECES = [*SPECIAL, " ", "a", "'", "\u0301", "\u6240", "{", "`" * 7, "``\n`", "\\(\\\\", "$ $a", "$a 5$", "a-"]


@pytest.mark.parametrize("pieces", [*PIECES, PAIRS, ["<think>", "</think>", "<answer>", "</answer>"]])
def test_long_texts_take_linear_time(pieces):
    """A quadratic pass over 200 KB takes more than a minute (80 KB of backslashes once took 25 s), this 0.2 s."""
    text = "".join(piece * (200_000 // len(pieces) // len(piece)) for piece in pieces)
    start = time.process_time()
    share(text, "en")
    is_well_formed(text, text)
    is_well_formed("", f"<think>{text}</think> <answer>{text}</answer>")
    assert time.process_time() - start < 20

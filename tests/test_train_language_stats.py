"""Counting reflective words."""

import pytest

from r1kernels.train.language_stats import REFLECTIVE_WORDS, reflective_words


@pytest.mark.parametrize("text, count", [
    ("", 0),
    (" ".join(REFLECTIVE_WORDS), 10),
    ("Wait, WAIT. wait", 3),
    ("button mistaken errors checked reverify", 0),
    ("wait_a start2wait d\u00e9but error1", 0),
    ("\u7b49wait\u7b49 (check) 'but' however\u2014", 4),
])
def test_whole_words_in_any_case(text, count):
    assert reflective_words(text) == count

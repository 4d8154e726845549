"""Language consistency: the share of a thought's words that are in the language it should be in.

R1's reward against thoughts that mix languages: (words of the target language) / (words) of the chain of thought. Words
are told apart by their script, which needs no model and is exact for English and Chinese. Digits, symbols and single
Latin or Greek letters (variables) are no words; neither are Latin words in code and TeX, which are written so in any
language. A Chinese character is a word.
"""

import re

from .base import Sample
from .tags import THINK, THINK_END

LANGUAGES = ("en", "zh")

_HAN = "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_LATIN = (
    "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u0300-\u036f\u1e00-\u1eff\u2c60-\u2c7f\ua722-\ua7ff"
    "\uff21-\uff3a\uff41-\uff5a"
)
# Letters and numbers that stand for themselves: fractions, exponents, styled letters of mathematics, circled ones.
_SYMBOLS = "\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209f\u2100-\u218f\u2460-\u24ff\u3200-\u33ff\U0001d400-\U0001d7ff"
_WORD = re.compile(
    f"([{_HAN}])|([{_LATIN}]+(?:['\u2019-][{_LATIN}]+)*|[\u0370-\u03ff](?![^\\W\\d_]))|[^\\W\\d_{_HAN}{_LATIN}{_SYMBOLS}]+"
)
# Each alternative stops where it could begin anew, so that no text takes more than a few linear scans.
_CODE = re.compile(
    r"```[^`]*(?:`{1,2}[^`]+)*```|`[^`\n]+`|\$\$[^$]+\$\$|\$(?!\s)[^$\n]+(?<!\s)\$(?!\d)"
    r"|\\\((?:[^\\]|\\[^()])*\\\)|\\\[(?:[^\\]|\\[^\[\]])*\\\]|\\[A-Za-z]+"
)
_LATIN_LETTERS = re.compile(f"[{_LATIN}]+")


def thought(sample: Sample) -> str:
    """The chain of thought: what comes before the last `</think>`; all of a completion that has none."""
    text, end, _ = sample.completion.rpartition(THINK_END)
    return (text if end else sample.completion).replace(THINK, " ").replace(THINK_END, " ")


def language(sample: Sample) -> float:
    """The share of the thought's words that are in `sample.language`, from 0 to 1.

    A thought without any word is 1: nothing in it is in another language, and the ratio of the paper is undefined.
    """
    if sample.language not in LANGUAGES:
        raise ValueError(f"language is {sample.language!r}, expected one of {', '.join(LANGUAGES)}")
    counts = word_counts(thought(sample))
    total = sum(counts.values())
    return counts[sample.language] / total if total else 1.0


def word_counts(text: str) -> dict[str, int]:
    """The words of a text: those in Chinese, those in Latin letters ("en"), and "other"."""
    text = _CODE.sub(lambda code: _LATIN_LETTERS.sub(" ", code.group()), text)
    counts = {"zh": 0, "en": 0, "other": 0}
    for match in _WORD.finditer(text):
        han, symbols = match[1], match[2]
        if han:
            counts["zh"] += 1
        elif symbols is None:
            counts["other"] += 1
        elif len(symbols) > 1:
            counts["en"] += 1
    return counts

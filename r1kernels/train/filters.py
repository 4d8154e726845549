"""What a sample must not be to be learned from: the filters of rejection sampling.

Each is a function of a sample's text alone, in a fixed number of linear passes: the text is a model's, and may be
megabytes long.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from r1kernels.train.rewards import Sample, format_reward
from r1kernels.train.rewards.language import word_counts
from r1kernels.train.rewards.tags import ANSWER, ANSWER_END, THINK, THINK_END

# A word; of a script without spaces each character, of a longer run each 16 characters.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]{1,16}")
_FENCE = re.compile(r"^\s{0,3}(?:```|~~~)|```|\\begin\{(?:verbatim|lstlisting|minted)\}|<(?:code|pre)>", re.MULTILINE)
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ue000-\uf8ff\ud800-\udfff]")
# The longest loop looked for, in lines and in words.
_LOOP_LINES, _LOOP_WORDS = 8, 64


@dataclass(frozen=True)
class FilterConfig:
    """Limits of the filters; null turns one off. The paper names the filters and no numbers: these are ours.

    `format`: the tags of the template, once each and in order. `language`: least share of words in the language of
    the question. `paragraph`: most words without a line break. `code_blocks`: whether the thought may hold any.
    `line_repeats`, `word_repeats`: how often the same lines, or words, must follow each other to be a loop (words only
    where the loop is at least `loop_words` long). `ngram_share`: the largest share of runs of `ngram` words that have
    come before, in texts with at least 50 of them.
    """

    format: bool = True
    language: float | None = 0.9
    paragraph: int | None = 256
    code_blocks: bool = False
    line_repeats: int | None = 4
    word_repeats: int | None = 5
    loop_words: int = 30
    ngram: int = 8
    ngram_share: float | None = 0.35


def unreadable(sample: Sample, limits: FilterConfig) -> bool:
    """Not in the format, without any text, or with characters that no reader sees."""
    if _UNPRINTABLE.search(sample.completion) or not _plain(sample.completion).strip():
        return True
    return limits.format and format_reward(sample) != 1.0


def mixed_language(sample: Sample, limits: FilterConfig) -> bool:
    """Too few of the words are in the sample's language; a text without words is in no other."""
    if limits.language is None:
        return False
    counts = word_counts(_plain(sample.completion))
    return counts[sample.language] < limits.language * sum(counts.values())


def long_paragraph(sample: Sample, limits: FilterConfig) -> bool:
    """Too many words without a line break."""
    if limits.paragraph is None:
        return False
    return any(len(_WORD.findall(line)) > limits.paragraph for line in sample.completion.splitlines())


def code_block(sample: Sample, limits: FilterConfig) -> bool:
    """A block of code; where code is asked for, only one before the end of the thought."""
    text = sample.completion
    if sample.kind == "code":
        text = text[: max(0, text.rfind(THINK_END))]
    return not limits.code_blocks and _FENCE.search(text) is not None


def repetition(sample: Sample, limits: FilterConfig) -> bool:
    """Lines or words in a loop, or a text much of which has been said before."""
    text = _plain(sample.completion)
    if limits.line_repeats is not None:
        lines = [line.strip() for line in text.splitlines() if _WORD.search(line)]
        if loop(lines, limits.line_repeats, _LOOP_LINES):
            return True
    words = _WORD.findall(text)
    if limits.word_repeats is not None and loop(words, limits.word_repeats, _LOOP_WORDS, limits.loop_words):
        return True
    return limits.ngram_share is not None and repeated_share(words, limits.ngram) > limits.ngram_share


FILTERS = {
    "unreadable": unreadable,
    "mixed language": mixed_language,
    "long paragraph": long_paragraph,
    "code block": code_block,
    "repetition": repetition,
}
# In the order in which they are looked for: a sample is counted under the first that holds.
REASONS = ("unscorable", "wrong", "unfinished", *FILTERS, "duplicate", "surplus")


def reject(sample: Sample, limits: FilterConfig, *, accuracy: float | None, finished: bool) -> str | None:
    """Why a sample is not to be learned from, or None.

    Args:
        accuracy: None where nothing can be compared; NaN where that failed.
        finished: false if the completion was cut off.
    """
    if accuracy is not None and math.isnan(accuracy):
        return "unscorable"
    if accuracy is not None and accuracy < 1:
        return "wrong"
    if not finished:
        return "unfinished"
    return next((reason for reason, holds in FILTERS.items() if holds(sample, limits)), None)


def loop(items: Sequence[str], repeats: int, longest: int, least: int = 1) -> bool:
    """Whether up to `longest` items follow each other `repeats` times or more, over at least `least` items."""
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(item, len(numbers)) for item in items], dtype=np.int64)
    for period in range(1, min(longest, len(ids) // repeats) + 1):
        different = np.flatnonzero(ids[period:] != ids[:-period])
        edges = np.concatenate([[-1], different, [len(ids) - period]])
        # A run of equal pairs and the period before it.
        run = int(np.diff(edges).max()) - 1 + period
        if run >= max(least, repeats * period):
            return True
    return False


def repeated_share(words: Sequence[str], n: int, least: int = 50) -> float:
    """The share of the runs of n words that have come before, 0 if there are fewer than `least` runs."""
    runs = len(words) - n + 1
    if runs < least:
        return 0.0
    return 1 - len({tuple(words[start : start + n]) for start in range(runs)}) / runs


def _plain(completion: str) -> str:
    """The text without the tags of the template, which are words of no language."""
    for tag in (THINK, THINK_END, ANSWER, ANSWER_END):
        completion = completion.replace(tag, "\n")
    return completion

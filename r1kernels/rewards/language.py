"""R1's language consistency reward: the share of the words of a thought that are in the wanted language.

    reward = (words in the wanted language) / (words)

Words are told apart by their script, which is exact for English and Chinese and needs no model. A Chinese character is
a word. Digits, symbols and single Latin or Greek letters (variables) are no words. Latin letters in code and TeX are not
counted either: they are the same in every language.
"""

from __future__ import annotations

import re

from .text import THINK, THINK_END

LANGUAGES = ("en", "zh")

_HAN = "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_LATIN = (
    "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u0300-\u036f\u1e00-\u1eff\u2c60-\u2c7f\ua722-\ua7ff"
    "\uff21-\uff3a\uff41-\uff5a"
)
# Fractions, exponents, letters of mathematics and circled letters stand for themselves.
_SYMBOLS = "\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209f\u2100-\u218f\u2460-\u24ff\u3200-\u33ff\U0001d400-\U0001d7ff"
_WORD = re.compile(
    f"([{_HAN}])|([{_LATIN}]+(?:['\u2019-][{_LATIN}]+)*|[\u0370-\u03ff](?![^\\W\\d_]))|[^\\W\\d_{_HAN}{_LATIN}{_SYMBOLS}]+"
)
_LETTERS = re.compile(f"[{_LATIN}]+")
# No alternative goes back further than its first two characters, so finding all marks takes linear time.
_MARK = re.compile(r"`+|\$\$?|\\[\\$()\[\]]|\\[A-Za-z]+|\n")
_CLOSES = {"`": "`", "``": "``", "```": "```", "$": "$", "$$": "$$", "\\(": "\\)", "\\[": "\\]"}
_ONE_LINE = ("`", "``", "$")


def share(completion: str, language: str) -> float:
    """The share, from 0 to 1, of the words before the last `</think>` (of all words without one) that are in `language`.

    A thought without words is 1: nothing in it is in another language.
    """
    thought, end, _ = completion.rpartition(THINK_END)
    counts = word_counts((thought if end else completion).replace(THINK, " ").replace(THINK_END, " "))
    total = sum(counts.values())
    return counts[language] / total if total else 1.0


def word_counts(text: str) -> dict[str, int]:
    """The number of words in Chinese ("zh"), in Latin letters ("en") and in other scripts ("other")."""
    counts = {"zh": 0, "en": 0, "other": 0}
    for match in _WORD.finditer(_without_code(text)):
        if match[1]:
            counts["zh"] += 1
        elif match[2] is None:
            counts["other"] += 1
        elif len(match[2]) > 1:
            counts["en"] += 1
    return counts


def _without_code(text: str) -> str:
    """The text without the Latin letters of its code and TeX. What opens such a part counts only if it is closed."""
    marks, last, line = [], {}, 0
    for match in _MARK.finditer(text):
        mark, start, end = match[0][:3] if match[0][0] == "`" else match[0], match.start(), match.end()
        line += mark == "\n"
        place = line if mark in _ONE_LINE else 0  # such a mark is closed on the same line
        opens = mark != "$" or not text[end : end + 1].isspace()
        closes = mark != "$" or not (text[start - 1 : start].isspace() or text[end : end + 1].isdigit())
        marks.append((mark, place, start, end, opens, closes))
        if closes:
            last[mark, place] = start
    parts, done, opened = [], 0, None
    for mark, place, start, end, opens, closes in marks:
        if opened is not None and mark == opened[1] and closes:
            first, opened = opened[0], None
        elif opened is None or mark == opened[1]:
            closer = _CLOSES.get(mark, "")
            opened = (start, closer) if opens and last.get((closer, place), -1) > start else None
            if not mark[1:].isalpha():
                continue
            first = start
        else:
            continue
        parts += text[done:first], _LETTERS.sub(" ", text[first:end])
        done = end
    return "".join(parts) + text[done:]

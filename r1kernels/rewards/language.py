"""R1's language consistency reward: (words of a thought in the wanted language) / (words of the thought).

The script of a word tells its language; a Chinese character is a word. Digits, symbols and single Latin or Greek
letters (variables) do not count as words. Nor do Latin letters in code and TeX, which are the same in every language.
"""

import re
from collections import Counter

from .text import THINK, THINK_END

LANGUAGES = ("en", "zh")
_HAN = "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_LATIN = (r"A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u0300-\u036f\u1e00-\u1eff\u2c60-\u2c7f"
          r"\ua722-\ua7ff\uff21-\uff3a\uff41-\uff5a")
# Fractions, exponents, mathematical letters and circled letters are symbols, not words.
_SYMBOLS = "\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209f\u2100-\u218f\u2460-\u24ff\u3200-\u33ff\U0001d400-\U0001d7ff"
_WORD = re.compile(rf"(?P<zh>[{_HAN}])|(?P<en>[{_LATIN}](?:['\u2019-]?[{_LATIN}])+)|[{_LATIN}]"
                   rf"|[\u0370-\u03ff](?![^\W\d_])|(?P<other>[^\W\d_{_HAN}{_LATIN}{_SYMBOLS}]+)")
# Code and TeX that is closed; a `$` before a space or a digit is money. After a backslash, a sign is text.
_CODE = re.compile(r"```(?:[^`]|`(?!``))*```|``[^\n]*?``|`[^`\n]*`"
                   r"|\$\$[^$]*\$\$|\$(?!\s)(?:\\.|[^\\$\n])*(?<!\s)\$(?!\d)"
                   r"|\\\((?:[^\\]|\\[^()\[\]])*\\\)|\\\[(?:[^\\]|\\[^()\[\]])*\\\]|\\[A-Za-z]+|\\.")


def share(completion: str, language: str) -> float:
    """The share of `language` among the words before the last `</think>`, or of the whole text; 1 without words."""
    thought, end, _ = completion.rpartition(THINK_END)
    counts = word_counts((thought if end else completion).replace(THINK, " ").replace(THINK_END, " "))
    total = sum(counts.values())
    return counts[language] / total if total else 1.0


def word_counts(text: str) -> dict[str, int]:
    """The number of words in Chinese ("zh"), in Latin letters ("en") and in other scripts ("other")."""
    text = _CODE.sub(lambda match: re.sub(f"[{_LATIN}]+", " ", match[0]), text)
    found = Counter(match.lastgroup for match in _WORD.finditer(text))
    return {kind: found[kind] for kind in ("zh", "en", "other")}

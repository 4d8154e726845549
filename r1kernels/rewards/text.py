r"""Finds the final answer in a completion, with plain string searches only.

Completions come from a model that is rewarded for finding our mistakes, and may be megabytes long. So nothing here
backtracks: every function is a fixed number of linear scans. Listing many candidates earns nothing:

* Only what follows the thought counts. The prompt never does.
* With an `<answer>` tag there must be exactly one pair, and no `\boxed{}` or `####` after it. At most one is inside.
* Otherwise the last `\boxed{}` or `#### ` line is the answer, and it alone. When it is malformed there is no answer. A
  `#### Summary` without a number after a `\boxed{}` is a heading.
"""

from __future__ import annotations

import unicodedata

THINK, THINK_END = "<think>", "</think>"
ANSWER, ANSWER_END = "<answer>", "</answer>"
BOXED, HASHES = "\\boxed{", "####"
ANSWER_MARKERS = (ANSWER, ANSWER_END, BOXED, HASHES)

# Characters without width, marks of direction that move nothing, and variation selectors: dropped before reading.
# Overrides of direction (U+202A to U+202E, U+2066 to U+2069) stay, and so make an answer unreadable.
INVISIBLE = dict.fromkeys([0xAD, 0xFEFF, *range(0x200B, 0x2010), *range(0x2060, 0x2065), *range(0xFE00, 0xFE10)])

# Untagged answers are searched for at the end only: the search for the closing brace is a Python loop.
TAIL = 20_000


def prompt_opens_think(prompt: str) -> bool:
    """Whether the prompt ends by opening `<think>`, so that the completion starts inside the thought."""
    return prompt.rstrip().endswith(THINK)


def after_thinking(prompt: str, completion: str) -> str | None:
    """What follows the last `</think>`, or all of a completion without think tags. None when a thought never ends."""
    _, end, after = completion.rpartition(THINK_END)
    return None if THINK in after or (not end and prompt_opens_think(prompt)) else after


def is_well_formed(prompt: str, completion: str) -> bool:
    """Whether a completion is one thought and then one answer, in their tags, and nothing else."""
    text = THINK + completion if prompt_opens_think(prompt) else completion.strip()
    if any(text.count(tag) != 1 for tag in (THINK, THINK_END, ANSWER, ANSWER_END)):
        return False
    answer = text.partition(THINK_END)[2].strip()
    return text.startswith(THINK) and answer.startswith(ANSWER) and answer.endswith(ANSWER_END)


def final_answer(prompt: str, completion: str) -> str | None:
    """The unique final answer of a completion (see the rules above), or None when it gives none."""
    text = (after_thinking(prompt, completion) or "").replace("\\boxed {", BOXED)
    tags = text.count(ANSWER), text.count(ANSWER_END)
    if tags == (0, 0):
        return _last_marked(text[-TAIL:])
    inside, end, after = text.partition(ANSWER)[2].partition(ANSWER_END)
    markers = inside.count(BOXED) + inside.count(HASHES)
    if tags != (1, 1) or not end or BOXED in after or HASHES in after or len(inside) > TAIL or markers > 1:
        return None
    return _last_marked(inside) if markers else inside.strip()


def _last_marked(text: str) -> str | None:
    boxed, hashes = text.rfind(BOXED), text.rfind(HASHES)
    if hashes > boxed:
        line = text[hashes + len(HASHES) :].lstrip(" \t").partition("\n")[0]
        if boxed < 0 or any("0" <= char <= "9" for char in line):
            return line.strip()
    return _braced(text, boxed + len(BOXED)) if boxed >= 0 else None


def _braced(text: str, start: int) -> str | None:
    """The text from `start`, just inside a brace, to the brace that closes it. None when nothing closes it."""
    depth, position = 1, start
    while position < len(text):
        char = text[position]
        if char == "\\":
            position += 1
        elif char in "{}":
            depth += 1 if char == "{" else -1
            if depth == 0:
                return text[start:position].strip()
        position += 1
    return None


def same_text(text: str) -> str:
    """The text as the kind `exact` compares it: in Unicode's form NFC, and every run of white space one space."""
    text = " ".join(text.split())
    # Normalising takes time quadratic in a run of combining marks, so a long text stays as it is.
    return unicodedata.normalize("NFC", text) if len(text) <= TAIL else text

r"""Finds the final answer in a completion, with plain string searches only.

Completions come from a model that is rewarded for finding our mistakes, and may be megabytes long. So nothing here
backtracks: every function is a fixed number of linear scans.

What counts as the final answer, so that listing many candidates earns nothing:

* Only what follows the thought counts (`after_thinking`). The prompt never does.
* With an `<answer>` tag there must be exactly one pair, and no `\boxed{}` or `####` after it.
* Otherwise the last `\boxed{}` or `#### ` line is the answer, and it alone. An earlier one is ignored. When the last is
  malformed there is no answer. A `#### Summary` without a number after a `\boxed{}` is a heading.
* Inside the tag, a `\boxed{}` or `####` is read the same way, but a second one makes the answer ambiguous.
* Without any marker there is no answer.
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
    """The part of a completion in which an answer counts: what follows the last `</think>`.

    A completion without any think tag is all answer, which is how a base model writes. None when the last thought never
    ends, because then no answer was given.
    """
    end = completion.rfind(THINK_END)
    if completion.rfind(THINK) > end:
        return None
    if end < 0:
        return None if prompt_opens_think(prompt) else completion
    return completion[end + len(THINK_END) :]


def is_well_formed(prompt: str, completion: str) -> bool:
    """Whether a completion is one thought and then one answer, in their tags, and nothing else."""
    text = completion.strip()
    if not prompt_opens_think(prompt):
        if not text.startswith(THINK):
            return False
        text = text[len(THINK) :]
    if THINK in text or any(text.count(tag) != 1 for tag in (THINK_END, ANSWER, ANSWER_END)):
        return False
    _, _, rest = text.partition(THINK_END)
    rest = rest.strip()
    return rest.startswith(ANSWER) and rest.endswith(ANSWER_END)


def final_answer(prompt: str, completion: str) -> str | None:
    """The unique final answer of a completion (see the rules above), or None when it gives none."""
    text = after_thinking(prompt, completion)
    if text is None:
        return None
    text = text.replace("\\boxed {", BOXED)
    opened, closed = text.count(ANSWER), text.count(ANSWER_END)
    if opened == closed == 0:
        return _last_marked(text[-TAIL:])
    if opened != 1 or closed != 1:
        return None
    _, _, inside = text.partition(ANSWER)
    inside, end, after = inside.partition(ANSWER_END)
    if not end or BOXED in after or HASHES in after or len(inside) > TAIL:
        return None
    markers = inside.count(BOXED) + inside.count(HASHES)
    if markers > 1:
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

r"""Finds the final answer in a completion, with linear searches only.

Completions come from a model that is rewarded for finding our mistakes, and may be megabytes long. So nothing here
backtracks: every function is a fixed number of linear scans. Listing many candidates earns nothing:

* Only the text after the thought counts. The prompt never counts.
* With an `<answer>` tag, there must be exactly one pair, no `\boxed{}` or `####` after it, and at most one in it.
* Otherwise only the last `\boxed{}` or `#### ` line is the answer. If it is malformed, there is no answer. A
  `#### Summary` without a number after a `\boxed{}` is a heading.
"""

import re
import unicodedata

THINK, THINK_END = "<think>", "</think>"
ANSWER, ANSWER_END = "<answer>", "</answer>"
BOXED, HASHES = "\\boxed{", "####"

# Zero-width characters, direction marks that move nothing, and variation selectors are dropped before reading.
# Direction overrides (U+202A to U+202E, U+2066 to U+2069) are kept, so they make an answer unreadable.
INVISIBLE = dict.fromkeys([0xAD, 0xFEFF, *range(0x200B, 0x2010), *range(0x2060, 0x2065), *range(0xFE00, 0xFE10)])

# Untagged answers are searched for only at the end, because the search for the closing brace is a Python loop.
TAIL = 20_000
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped character is no brace


def prompt_opens_think(prompt: str) -> bool:
    """Whether the prompt ends by opening `<think>`, so that the completion starts inside the thought."""
    return prompt.rstrip().endswith(THINK)


def after_thinking(prompt: str, completion: str) -> str | None:
    """The text after the last `</think>`, or the whole completion without think tags. None if a thought never ends."""
    _, end, after = completion.rpartition(THINK_END)
    return None if THINK in after or (not end and prompt_opens_think(prompt)) else after


def is_well_formed(prompt: str, completion: str) -> bool:
    """Whether a completion is one thought and then one answer, in their tags, and nothing else."""
    text = THINK + completion if prompt_opens_think(prompt) else completion.strip()
    if any(text.count(tag) != 1 for tag in (THINK, THINK_END, ANSWER, ANSWER_END)):
        return False
    answer = text.partition(THINK_END)[2].strip()
    return text.startswith(THINK) and answer.startswith(ANSWER) and answer.endswith(ANSWER_END)


def final_summary(prompt: str, completion: str) -> str:
    """The text of a completion after its thought, without answer tags around it; "" if the thought never ends."""
    text = (after_thinking(prompt, completion) or "").strip()
    if text.startswith(ANSWER) and text.endswith(ANSWER_END):
        text = text[len(ANSWER) : -len(ANSWER_END)].strip()
    return text


def final_answer(prompt: str, completion: str) -> str | None:
    """The unique final answer of a completion (see the rules above), or None if there is none."""
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
    """The text from `start`, just inside a brace, to its closing brace. None if nothing closes it."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start : match.start()].strip()
    return None


def same_text(text: str) -> str:
    """The text in the form that the kind `exact` compares: Unicode NFC, with every run of white space as one space."""
    text = " ".join(text.split())
    # Normalising takes time quadratic in a run of combining marks, so a long text is not normalised.
    return unicodedata.normalize("NFC", text) if len(text) <= TAIL else text

r"""How much work an answer is to check, seen from its text alone.

Some answers take any computer algebra longer than any limit: `9^{9^{9}}`, forty nested brackets, `10^{12}` summands. A
worker can be killed, but each costs the whole limit, and a model finds out how to write hundreds of them. What is seen
to be of that kind here is unscorable at once, as it would be after the time-out: never right, and never wrong. It is
judged by what it has more of than its reference, so that an answer in the reference's own form is always tried.
"""

import math
import re

# Brackets within brackets, parts of a union, bars, and exponents of a bracket: more than answers have, and as many as
# the judge takes a second or so for.
MAX_DEPTH, MAX_PARTS, MAX_BARS, MAX_BRACKET_POWER = 8, 8, 12, 100
# The size of an exponent, or of a number that a product or sum runs to, in decimal digits; and of a power.
MAX_DIGITS, MAX_POWER_DIGITS = 5, 2_000_000

_LARGE = re.compile(rf"\d{{{MAX_DIGITS + 1}}}", re.ASCII)
_POWER = re.compile(r"\^\s*\{?([^{}^]{0,80})", re.ASCII)
_TOWER = re.compile(r"(?=\^[\s{(]*(\d{1,6})[\s})]*\^[\s{(]*(\d{1,6}))", re.ASCII)
_NUMBER_POWER = re.compile(r"(\d+)\s*\^\s*\{?\s*-?\s*(\d{1,6})", re.ASCII)
_BRACKET_POWER = re.compile(r"[)\]}]\s*\^\s*\{?\s*-?\s*(\d+)", re.ASCII)
# Operations that turn a large number into as much work.
_RUNNING = re.compile(r"!|\\(?:d|t)?binom|\\choose|\\Gamma|\\sum|\\prod|\\bmod|\\pmod|\\mod")
# Operations that are still to be carried out.
_UNDONE = re.compile(r"\\(?:i{0,3}|o)int(?![A-Za-z])|\\lim(?![A-Za-z])")
_FACTORIALS = re.compile(r"!\s*!\s*!")


def is_hopeless(answer: str, reference: str) -> bool:
    """Whether no judge will be done with `answer` in any reasonable time, unless `reference` is of its kind."""
    if _depth(answer) > MAX_DEPTH + _depth(reference):
        return True
    for mark, most in (("\\cup", MAX_PARTS), ("|", MAX_BARS)):
        if answer.count(mark) > most + reference.count(mark):
            return True
    for pattern in (_UNDONE, _FACTORIALS):
        if pattern.search(answer) and not pattern.search(reference):
            return True
    if _LARGE.search(answer) and _RUNNING.search(answer) and not _RUNNING.search(reference):
        return True
    return _power(answer) > max(_power(reference), 1.0)


def _depth(text: str) -> int:
    depth = deepest = 0
    for char in text:
        if char in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")]}":
            depth -= 1
    return deepest


def _power(text: str) -> float:
    """The largest exponent, as a multiple of what is too large."""
    largest = 0.0
    for match in _POWER.finditer(text):
        digits = max(map(len, re.findall(r"\d+", match[1])), default=0)
        largest = max(largest, 10.0 ** min(digits - MAX_DIGITS, 100) if digits > MAX_DIGITS else 0.0)
    for match in _TOWER.finditer(text):
        base, exponent = int(match[1]), int(match[2])
        if base > 1:
            largest = max(largest, 10.0 ** min(exponent * math.log10(base) - MAX_DIGITS, 100))
    for match in _NUMBER_POWER.finditer(text):
        largest = max(largest, len(match[1]) * int(match[2]) / MAX_POWER_DIGITS)
    for match in _BRACKET_POWER.finditer(text):
        largest = max(largest, min(float(match[1][:100]), 1e100) / MAX_BRACKET_POWER)
    return largest

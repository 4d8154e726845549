r"""One notation for mathematical answers, and their units.

`normal` gives texts that look the same one spelling: `\dfrac12`, `½` and `\frac {1} {2}` all become `\frac{1}{2}`. It
changes only notation, never meaning. Words in `\text{}` are put in double quotes, which have no other use. The rules
and the units are in notation.ini.
"""

import configparser
import re
import unicodedata
from importlib import resources

from .text import INVISIBLE

_FILE = configparser.RawConfigParser(delimiters=["=>"], comment_prefixes=["#"])
_FILE.optionxform = str  # names are case-sensitive
_FILE.read_string(resources.files(__package__).joinpath("notation.ini").read_text("utf-8").replace("␣", "\0"))
_SECTIONS = {section: {key.replace("\0", " "): value.replace("\0", " ") for key, value in _FILE.items(section)}
             for section in _FILE.sections()}  # fmt: skip
# Full-width characters and the alphabets of mathematics (bold, italic ...) mean the plain ones.
_WIDE = {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_STYLED = {chr(code): unicodedata.normalize("NFKC", chr(code)) for code in range(0x1D400, 0x1D800)}
_SPACES = {"\u00a0": r"\,", "\u2009": r"\,", "\u202f": r"\,", '"': "\0"}
_TABLE = INVISIBLE | str.maketrans(_WIDE | _STYLED | _SPACES | _SECTIONS["symbols"])
_RULES = [(re.compile(pattern, re.ASCII), becomes) for pattern, becomes in _SECTIONS["rules"].items()]
_SAYS = re.compile(r"(?:(?:the |my )?(?:(?:final|correct) )?answer(?: is:?|:) ?|(?:正确|最终)?答案(?:是|为|:) ?)", re.I)

_UNITS = {name: unit for unit, others in _SECTIONS["units"].items() for name in (unit, *others.split())}
_NO_UNITS = set(" ".join(_SECTIONS["no units"].values()).split())
_NOUN = re.compile(r"(?!.*(?:th|rd|s|u|illion|ing|ly|ward)s$)[a-z]{3,20}s")
_UNIT = re.compile(r"(?:(square|sq|cubic) )?([^ ^{}]+) ?(?:\^\{([23])\})?")


def normal(text: str) -> str:
    """The text in the one notation."""
    text = text.translate(_TABLE).strip()
    if text.startswith("**") and text.endswith("**"):
        text = text.strip("*")
    if text.isascii() and text.isdecimal():
        return text
    text = _without_stop(text[says.end() :] if (says := _SAYS.match(text)) else text)
    for pattern, becomes in _RULES:
        text = pattern.sub(becomes, text)
    return _without_stop(text)


def _without_stop(text: str) -> str:
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text


def unit_of(text: str) -> str | None:
    """The unit in one spelling (`"square inches"` is `in^2`), empty without a unit; None if the text is not a unit.

    A unit is a known one, or the plural of a noun such as `apples`.
    """
    text = re.sub(r"degree ([CF])", r"degree_\1", " ".join(text.replace('"', " ").split()))
    found = []
    for part in re.split(r" ?/ ?| per ", text) if text else ():
        power, name, exponent = match.groups() if (match := _UNIT.fullmatch(part)) else ("", "", "")
        noun = name if _NOUN.fullmatch(name) and name not in _NO_UNITS else None
        singular = name.removesuffix("s") if len(name) > 3 else name  # `ms` is not `m`
        unit = _UNITS.get(name) or _UNITS.get(singular) or noun
        if unit is None:
            return None
        found.append(unit + (exponent or {"square": "2", "sq": "2", "cubic": "3"}.get(power, "")))
    return "/".join(found) if len(found) < 3 else None

r"""One notation for mathematical answers, and their units.

`normal` writes what looks the same in the same way: `\dfrac12`, `½` and `\frac {1} {2}` all become `\frac{1}{2}`. It
changes notation only, never meaning. Words in `\text{}` come out in double quotes, which have no other use.
"""

from __future__ import annotations

import re
import unicodedata

from .text import INVISIBLE

_SYMBOLS = {
    "−": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ",
    "≠": r"\ne ", "∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ", "±": r"\pm ", "θ": r"\theta ",
    "α": r"\alpha ", "β": r"\beta ", "ℝ": r"\mathbb{R}", "，": ",", "、": ",", "。": ".", "；": ";", "’": "'",
    "½": r" \frac{1}{2}", "⅓": r" \frac{1}{3}", "⅔": r" \frac{2}{3}", "¼": r" \frac{1}{4}", "¾": r" \frac{3}{4}",
    "²": "^{2}", "³": "^{3}", "\u00a0": r"\,", "\u2009": r"\,", "\u202f": r"\,", '"': "\0",
}  # fmt: skip
# Full-width characters and the alphabets of mathematics (bold, italic ...) stand for the plain ones.
_SYMBOLS |= {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if chr(code) not in _SYMBOLS}
_SYMBOLS |= {chr(code): unicodedata.normalize("NFKC", chr(code)) for code in range(0x1D400, 0x1D800)}
_TABLE = INVISIBLE | str.maketrans(_SYMBOLS)

# Applied in this order.
_REWRITTEN = [(re.compile(pattern, re.ASCII), written) for pattern, written in (
    # Dollars around mathematics go, and dollars of money stay.
    (r"\\\$", "\1"), (r"\$\$?([^$]*)\$\$?", r" \1 "), ("\1", "$"), (r"\\%", "%"),
    (r"^ ?\\\((.*)\\\) ?$|^ ?\\\[(.*)\\\] ?$|^ ?\*\*(.*)\*\* ?$", r"\1\2\3"),
    (r"(?<=\d)(?:\{,\}|,\\! *|\\[,;:! ]|~)(?=\d{3}(?!\d))", ","),
    (r"\{,\}", ","),
    (r"\\!|\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![A-Za-z])", ""),
    (r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|\s", " "),
    # Letters, and words: those with a digit are no words.
    (r"\\(?:mathrm|rm|text) ?\{ ?([ei]) ?\}", r"\1"),
    (r"\\(?:mathbf|boldsymbol|mathit) ?\{([^{}]*)\}", r"\1"),
    (r"\\(?:text|textbf|textit|textrm|mbox|mathrm) ?\{(?=[^{}]*\d)([^{}]*)\}", r" \1 "),
    (r"\\(?:text|textbf|textit|textrm|mbox|mathrm) ?\{([^{}]*)\}", r'"\1"'),
    (r'" ?(or|and) ?"', r" \1 "),
    # Names of one thing.
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(le|ge)(?:q|qslant)(?![A-Za-z])", r"\\\1"),
    (r"\\neq(?![A-Za-z])", r"\\ne"),
    (r"\\lt(?![A-Za-z])", "<"), (r"\\gt(?![A-Za-z])", ">"), ("<=", r"\\le "), (">=", r"\\ge "),
    (r"\\(?:varnothing|emptyset)(?![A-Za-z])|\\\{ ?\\\}", '"empty set"'),
    (r"\^ ?\\circ(?![A-Za-z])|\^ ?\{ ?\\circ ?\}", '"degree"'),
    (r"\*\*", "^"), (r"\*", r"\\cdot "),
    (r"(?<![A-Za-z\\])(sqrt|sin|cos|tan|ln|log|pi)(?![A-Za-z])", r"\\\1"),
    # Arguments in braces.
    (r"√ ?(\d+|[A-Za-z])", r"\\sqrt{\1}"), (r"(?:\\sqrt|√) ?\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt ?(\d)(?!\d)", r"\\sqrt{\1}"),
    (r"\\frac ?([\dA-Za-z])(?= ?[\dA-Za-z{])", r"\\frac{\1}"),
    (r"\\frac ?(\{[^{}]*\}) ?([\dA-Za-z])", r"\\frac\1{\2}"),
    (r"\^ ?([+-]?\d+|[A-Za-z])", r"^{\1}"), (r"_ ?(\d+|[A-Za-z])", r"_{\1}"),
    (r"(?<![\w)}.!\]]) ?\+ ?\\infty", r"\\infty"),
    # White space that separates nothing.
    (r" *(\\?[{}()\[\]]|[;=+]) *", r"\1"), (r" +", " "), (" ,", ","), (r"^ | $", ""),
)]  # fmt: skip
_SAYS = re.compile(r"(?:(?:the |my )?(?:(?:final|correct) )?answer(?: is:?|:) ?|(?:正确|最终)?答案(?:是|为|:) ?)", re.I)


def normal(text: str) -> str:
    """The text in the one notation. Linear in the text, but for texts made of brackets, which its length bounds."""
    text = text.translate(_TABLE).strip()
    if text.isdecimal() and text.isascii():
        return text
    if says := _SAYS.match(text):
        text = text[says.end() :]
    text = text[:-1] if text.endswith(".") and not text.endswith("..") else text
    for pattern, written in _REWRITTEN:
        text = pattern.sub(written, text)
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text


# Each line: what a unit is called here, and its other names.
_UNITS = {name: line.split()[0] for line in """
m meter meters metre metres
cm centimeter centimeters centimetre centimetres
mm millimeter millimeters millimetre millimetres
km kilometer kilometers kilometre kilometres 公里
in inch inches
ft foot feet
yd yard yards
mi mile miles
s sec second seconds 秒
min minute minutes 分钟
h hr hrs hour hours 小时
day days 天 日
week weeks
month months
year years 年
g gram grams 克
kg kilogram kilograms
mg milligram milligrams
lb lbs pound pounds
oz ounce ounces
ton tons
L l liter liters litre litres
mL ml milliliter milliliters
gallon gallons
cup cups
mph
kph
N newton newtons
J joule joules
W watt watts
V volt volts
Pa
Hz
rad radian radians
degree degrees
degreeC
degreeF
dollar dollars $ USD
cent cents
euro euros € EUR
pound_sterling £ GBP
yen yuan ¥ 元
rupee rupees ₹
person people 人
child children
man men
woman women
mouse mice
fish
sheep
unit units 个 個 名 只 岁 歲 本 张 条 件 米
""".strip().splitlines() for name in line.split()}  # fmt: skip
# Words in -s that are no units: they change the number, deny it or say nothing about it.
_NO_UNIT = re.compile(
    r"(?:\w+(?:ths|rds|ss|ings|lys|wards|ways)|halves|quarters|tens|dozens|scores|pairs|couples|grosses|hundreds|"
    r"thousands|millions|billions|trillions|lakhs|crores|ones|twos|threes|fours|fives|sixes|sevens|eights|nines|"
    r"times|plus|minus|versus|vs|is|was|has|as|this|its|his|does|squares|cubes|roots|powers|multiples|factors|doubles|"
    r"triples|opposites|inverses|reciprocals|negatives|perhaps|guess|yes|else|others|unless|besides|percents|exceeds|"
    r"equals|adds|subtracts|divides|multiplies|means|lies|fails|cos|abs|logs|exponents|primes|factorials|bases|mods)"
)
_PREFIX = re.compile(r"(square|sq|cubic) ")
_POWER = re.compile(r"\^\{([23])\}$")


def unit_of(text: str) -> str | None:
    """The unit in one spelling (`"square inches"` is `in^2`), empty for none; None when the text is no unit."""
    text = " ".join(text.replace('"', " ").split())
    parts = re.split(r" ?/ ?| per ", text)
    if len(parts) > 2 or (len(parts) == 2 and not parts[1]):
        return None
    found = [_one_unit(part.strip()) for part in parts]
    return None if None in found else "/".join(filter(None, found))


def _one_unit(text: str) -> str | None:
    text = re.sub(r"^degree ([CF])$", r"degree\1", text)
    power = _POWER.search(text)
    prefix = _PREFIX.match(text)
    name = text[prefix.end() if prefix else 0 : power.start() if power else None].strip()
    if not name:
        return "" if not text else None
    if name in _UNITS:
        name = _UNITS[name]
    elif not re.fullmatch(r"[a-z]{3,20}s", name) or _NO_UNIT.fullmatch(name):
        return None
    exponent = power[1] if power else {"square": "2", "sq": "2", "cubic": "3"}[prefix[1]] if prefix else ""
    return name + ("^" + exponent if exponent else "")

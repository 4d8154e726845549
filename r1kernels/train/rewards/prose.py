"""Reading an answer that says in words what its number is: `The answer is 18 dollars`, `\text{18 km/h}`, `18个`.

A word that changes the number, or takes it back, makes it no number at all: which of them do is a list, which must err
on the side of too many. A wrong answer that scores teaches more than a right one that does not.
"""

import re
from decimal import Decimal

from .answers import INVISIBLE, braced, plain_number

_WIDE = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_WIDE |= {0x3000: " ", 0x3001: ",", 0x3002: ".", 0x2248: "\\approx "}
_SPACES = re.compile(r"[\u00a0\u2000-\u200a\u202f\u205f]")
_STRONG = re.compile(r"(\*\*|__|\*|`)(?=[^\s*`])([^*`]+)\1")
_APPROXIMATELY = re.compile(r"^(?:\\approx(?![A-Za-z])|=)\s*(?=[^=]*$)")
_COMMA = re.compile(r"\{,\}|,\\!\s*")
_SAYS = re.compile(
    r"^(?:(?:so|thus|hence|therefore)\b,? )?(?:(?:the |my )?(?:(?:final|correct) )?answer(?: is:?|:)|it is:?) "
    r"|^(?:正确|最终)?答案(?:是|为|应为)?[:\s]*",
    re.IGNORECASE,
)
_STYLED = re.compile(r"\\(?:(mathbf|boldsymbol|bm|mathit)|textbf|textit|text|mathrm|mbox|fbox)\s*\{")
_BRACKETS = re.compile(r"^(?:\\left)?\((.*?)(?:\\right)?\)$|^\{(.*)\}$")
_MATH = re.compile(r"(?<!\\)\$\$?((?:[^$\\]|\\.)+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_TEXT = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mbox)\s*\{([^{}]*)\}")
_DOLLARS = re.compile(r"(?<!\\)\$")

_WORD = re.compile(r"[^\W\d_]{2,}(?:['\u2019-][^\W\d_]+)*|[aAI]")
_UNIT = re.compile(
    r"(?:[A-Za-z]{3,10}|[kcm]?m|[km]?g|in|ft|mi|lb|m?[lL])/(?:[A-Za-z]{3,10}|h|hr|s|[kc]?m|k?g|ft|lb|m?[lL])[\u00b2\u00b3]?"
)
_PUNCTUATION = ".,;:!?*\"'"
_FACTORIAL = re.compile(r"\d\s*!|!\s*\d")

_DIGIT_WORDS = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|"
    "eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
)
_COUNTED = {word: value for value, word in enumerate(_DIGIT_WORDS.split("|")[:21])}
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# Wherever they are, they change the number, take it back or put another beside it.
_CHANGING = re.compile(
    r"not|no|non|never|none|nor|neither|n't|\w+n['\u2019]t|cannot|except|excluding|without|but|wrong|false|incorrect|"
    r"untrue|or|either|versus|vs|unless|maybe|perhaps|possibly|guess|than|least|most|under|below|above|exceeds?|"
    r"exceeding|beyond|almost|nearly|"
    r"plus|minus|negative|over|divided|multiplied|added|subtracted|increment|decrement|point|half|halves|halved|"
    r"double|doubled|twice|triple|tripled|thrice|quadrupled?|opposite|inverse|reciprocal|negation|complement|"
    r"dozens?|scores?|hundreds?|thousands?|(?:m|b|tr)illions?|tens|lakhs?|crores?|bn|mn|mil|pairs?|mod|modulo|"
    r"squared|cubed|roots?|sqrt|powers?|exponents?|factorials?|logs?|ln|exp|sin|cos|tan|pi|infinity|infinite|"
    r"percentage points?|sum|product|quotient|difference|remainder|successor|predecessor|"
    r"half-\w+|double-\w+|quarters?|thirds?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|"
    r"(?:tens|ten|hundred|thousand|million|billion|trillion|eleven|twelf|twelve)ths?|twentieths?|"
    + _DIGIT_WORDS + "|(?:twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety)-[a-z]+",
    re.IGNORECASE,
)
# These only before the number, or between it and another.
_BEFORE = re.compile(r"squares?|cubes?|times|by-?|of-?|e|less|fewer|more", re.IGNORECASE)
_OF = re.compile(
    r"\b(?:square|cube|multiple|fraction|part|share|opposite|percent|power|factor|third|fourth|fifth|less|"
    r"fewer|more)s? of\b",
    re.IGNORECASE,
)
_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_CHINESE_CHANGING = re.compile(
    r"[不非没無无除减減加乘倍半多少或万萬千百亿億十余餘错錯和与與成几幾于於分二三四五六七八九两零的相负約到至上下超大小未根过過最高低]|一(?!共)|次方|(?:平|立)方(?![米厘分千公英])"
)
_CHINESE_NUMBER = re.compile(r"^([\u4e00-\u9fff:,\s]*)([^\u4e00-\u9fff]*?)([\u4e00-\u9fff]*)[.!]?$")


def tidy(text: str) -> str:
    """The text without what is only seen: characters of no width, wide ones, stars and backquotes around it."""
    text = _SPACES.sub(" ", text.translate(INVISIBLE | _WIDE)).strip()
    text = _STRONG.sub(r"\2", text) if "\\" not in text or text[:1] in "*_`" else text
    text = text.strip().rstrip(".").rstrip()
    text = _COMMA.sub(",", _APPROXIMATELY.sub("", text))
    return _SAYS.sub("", text).strip() if "\\" in text else text


def unwrap(text: str) -> str:
    """Strips white space, a full stop, and math delimiters when they hold all that could be an answer.

    Not where the words around them change what they hold (`half of $4$`).
    """
    text = tidy(text)
    if found := _MATH.search(text):
        before, after = text[: found.start()], text[found.end() :]
        if not re.search(r"[\d\\$=]", before + after) and number_in_prose(f"{before} 7 {after}") == (Decimal(7), False):
            text = next(filter(None, found.groups())).strip() or text
    if match := _STYLED.match(text):
        inside = braced(text, match.end())
        # Words without the style would be read as products of their letters.
        if inside and text[match.end() :].strip() in (inside + "}", inside + " }"):
            text = inside if match[1] or plain_number(inside) else text
    if match := _BRACKETS.match(text):
        inside = (match[1] or match[2] or "").strip()
        text = inside if plain_number(inside) else text
    return text


def as_prose(text: str) -> str:
    r"""The text with `\text{}` and math delimiters taken off."""
    for _ in range(3):
        text = _TEXT.sub(r" \1 ", text)
    text = re.sub(r"\\[()\[\]]", " ", text)
    if _DOLLARS.sub("", text).count("$") == 0 and len(_DOLLARS.findall(text)) % 2 == 0:
        text = _DOLLARS.sub(" ", text)
    return " ".join(text.replace("\\ ", " ").split())


def is_prose(text: str) -> bool:
    """Whether the text is only words and plain numbers: nothing that mathematics would have to read.

    The mark of `18!` is a factorial, but for one at the end of a sentence.
    """
    tokens = [token.strip(_PUNCTUATION) for token in text.split()]
    shouted = text.endswith("!") and any(_WORD.fullmatch(token) for token in tokens)
    if _FACTORIAL.search(text[:-1] if shouted else text):
        return False
    return all(
        not token or _WORD.fullmatch(token) or plain_number(token) or _UNIT.fullmatch(token)
        or _in_brackets(token) for token in tokens
    ) or bool(_CHINESE.search(text))


def _in_brackets(token: str) -> bool:
    return token[0] == "(" and token[-1] == ")" and bool(_WORD.fullmatch(token[1:-1]))


def changes(text: str) -> bool:
    """Whether a word in the text would change a number beside it."""
    return any(_CHANGING.fullmatch(token.strip(_PUNCTUATION + "()")) for token in text.split())


def number_in_prose(text: str) -> tuple[Decimal, bool] | None:
    """The number of a phrase like `18 dollars` or `The answer is 18.`; None unless there is exactly one.

    `20 thousand` is 20000, and `3 (three)` is 3.
    """
    if len(text) > 1000:
        return None
    if _CHINESE.search(text):
        match = _CHINESE_NUMBER.match(text)
        if match is None or _CHINESE_CHANGING.search(match[1] + match[3]):
            return None
        return plain_number(match[2].strip(" :,."))
    if _OF.search(text):
        return None
    found, scaled, before = None, False, ""
    for token in text.split():
        token = token.strip(_PUNCTUATION)
        number = plain_number(token)
        if number is not None:
            if found is not None or (_BEFORE.fullmatch(before) and before.lower() not in ("by", "of")):
                return None
            found, before = number, token
            continue
        word = token.lower()
        if found is not None and plain_number(before) and word in _SCALES and not scaled:
            found, scaled = (found[0].scaleb(_SCALES[word]), found[1]), True
        elif found is not None and token[:1] == "(" and _COUNTED.get(word.strip("()")) == found[0]:
            pass
        elif _CHANGING.fullmatch(word.strip("()")):
            return None
        before = token or before
    return found

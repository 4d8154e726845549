r"""Strict answers: which ones equal a reference. docs/answers.md lists the forms."""

# ruff: noqa: RUF001
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from r1kernels.rewards.math import MAX_ANSWER, check_reference, grade
from r1kernels.rewards.notation import normal
from r1kernels.rewards.text import final_answer


def shared(name):
    """A file of the folder `shared` beside the repository, or where R1KERNELS_SHARED says."""
    named = os.environ.get("R1KERNELS_SHARED")
    path = (Path(named) if named else Path(__file__).resolve().parents[3] / "shared") / name
    if not path.is_file():
        pytest.skip(f"no {path}; R1KERNELS_SHARED names a directory that holds {name}")
    return [json.loads(line) for line in path.read_text().splitlines()]


# The reference, answers that equal it, and answers that do not.
CASES = {
    "18": (
        [
            "18", "18.0", "18.", "+18", "$18", r"\$18.00", "$18$ dollars", r"\(18\)", "**18**", "18%", r"1.8\times10^1",
            "1.8e1", "36/2", r"\dfrac{90}{5}", "{18}", "(18)", r"\{18\}", "x=18", "18 = x", "x := 18", r"\theta = 18",
            "18 = 18", r"x = \frac{36}{2} = 18", "18 apples", "18 m", r"18 \mathrm{~km}", "18 square feet", "18 people",
            "18 miles per hour", "18 m/s", "18°", r"18\text{ cm}^2", "18 m²", "𝟏𝟖", "１８", "1\u200b8", "18元", "18個",
            "The answer is 18", "答案是18", r"\sqrt{324}", r"\mathbf{18}", r"\text{18 apples}",
        ],
        [
            # Inequalities, equations that must be solved, wrong equations.
            "x >= 18", "> 18", r"\ge 18", "≥18", "=> 18", "x<18", "17<x<19", r"x\neq18", r"x \not = 18", "x != 18",
            r"x \ne 18", "x ~= 18", "x =! 18", "x+1=19", "2x=36", "x^2 = 18", "-x = 18", r"\sqrt{x} = 18", "|x| = 18",
            "x=x", "x=18x", "x=18+x-x", "18=19", "18=18=19", "xy=18", "AB=18", "e=18", r"\pi=18", r"\log x = 18",
            "f(x)=18", "x(18)",
            # Calculations.
            "9+9", "20-2", r"2\cdot 9", "9*2", "2(9)", "(2)(9)", "9 x 2", r"36\div2", r"2\cdot 3^2", r"\frac{9+9}{1}",
            r"\frac{9\cdot 4}{2}", r"\sqrt{9}\cdot 6", "18+0", "18+0x", r"18\times 1", "18^{1}", "|-18|", "18/1/1",
            r"\frac{1}{\frac{1}{18}}", "18!", "!18",
            # Several answers, ranges.
            "18 or 19", "18 and 19", "18 (or 19)", "18, 18", "18;19", "18 18", "18\n19", "18/19", "18|19", "18 & 19",
            r"18\pm1", r"\pm18", "(18,19)", "[18]", "17-19", "17–19", "x=18 or x=19", "a=18, b=19", r"18\text{ or }19",
            r"\boxed{19}18", r"18\quad 19", r"18\\19", r"18\,19",
            # Words that change the number or say nothing of it.
            "18 dozen", "18 hundred", "18 thousand", "18 pairs", "18 tenths", "18 halves", "18 times", "18 squared",
            "18 k", "18K", "18 or so", "about 18", r"\approx 18", "at least 18", "not 18", "18 is wrong", "18 wrong",
            "18 ways to win", "18 red apples", "eighteen", "half of 36", "no", "any number", "18万", "18或19", "不是18",
            r"\text{not }18", r"\text{18 million}", r"18 \text{ more}", "18 plus", "18 cos",
            # Damaged or in another notation.
            "", "18+", "18-", "18,", "18..", "18_", "{18", "18}", "(18", r"\{18", "18,0", "018", "1 8", "1,8", "0x12",
            "XVIII", "18?", "--18", "+-18", "- -18", "-18", "−18", "١٨", "⑱", "¹⁸", "18\u202e", "22_8", "10010_2",
            r"\cancel{18}", r"\overline{18}", r"\neg 18", r"18\mod 20", "18 % 19", "18:1", "18:00", r"\infty", "18i",
            "18e", "18x", "18 x", r"18\pi", "17.9999999999", "18.000001", "1800", "0.18", "18_{18}", r"17\frac{2}{2}",
            r"\begin{pmatrix}18\end{pmatrix}", r"\int 18", r"\sum_{k=1}^{18} 1", r"\lfloor 18.5\rfloor",
        ],
    ),
    "-18": (["-18", "- 18", "−18", r"\frac{-36}{2}", r"-\$18", "x=-18"], ["18", "18-", "(18)", "minus 18", r"\pm 18"]),
    "0": (["-0", "0.0", "0%", r"\frac{0}{5}"], ["none", "1e-50", r"\frac{1}{10^{30}}", r"\{\}", "5-5", "0x", "-"]),
    "1234": (
        ["1,234", "1{,}234", r"1,\!234", r"1\,234", r"\$1,234", "1\u202f234"],
        ["1.234", "12,34", "1,2345", "1, 234", "01,234", "1'234", "1.234,0", "1_234", "1\n234"],
    ),
    "0.5": (
        [r"\frac12", "1/2", ".5", "50%", "½", r"\frac{1}{2}=0.5"],
        ["0,5", "2", "5%", "1:2", "0.49999999999999999999", "0.(5)"],
    ),
    "50": (["50%", "5e1"], ["0.5%", "0.5 percent of 50"]),
    "1000": (["1e3", "1E3", r"1\times10^3", "10^3"], ["1e", r"1\times10^", r"1\times10"]),
    "11087.00": (["11087"], [r"\frac{1108700001}{100000}"]),
    r"\frac{1}{3}": (
        ["1/3", r"\tfrac13", r"\frac{2}{6}"],
        [
            r"0.\overline{3}", "3^{-1}", "0.333", "0.3333333333", "0.333...", "33%", "1:3", "1/3x", "1/(3",
            r"\frac{1}{1+2}", r"1-\frac{2}{3}",
        ],
    ),
    r"\frac{7}{3}": ([r"2\frac{1}{3}", "2 1/3", "2 1/3 cups"], ["21/3", "2.33", r"2+\frac13", r"2\frac{4}{3}"]),
    r"2\sqrt{3}": (
        [r"2\sqrt3", r"\sqrt{12}", r"2\cdot\sqrt{3}", "2√3", "2*sqrt(3)", r"\frac{6}{\sqrt{3}}", r"2\sqrt{3} cm"],
        [
            "3.4641", "3.46410161513775", r"\sqrt{2}3", r"2\sqrt{3", r"\sqrt[3]{12}", r"\pm2\sqrt3", r"2\sqrt{3}x",
            r"2\sqrt{3}+0.0000001", r"2\sqrt{3}, 1", r"2\sqrt{3} dozen", r"\sqrt{6+6}", "x^2=12", r"2\sqrt{-3}",
        ],
    ),
    r"\pi": (["π", "pi", r"x=\pi", r"\pi\text{ cm}"], ["3.14", "3.14159265358979", "22/7", r"180^\circ", r"\pi^2"]),
    r"\frac{1+\sqrt5}{2}": (
        [r"\frac{1}{2}+\frac{\sqrt5}{2}", r"(1+\sqrt{5})/2"],
        ["1.6180339887498948482", r"\frac{1-\sqrt5}{2}", r"\frac{1\pm\sqrt5}{2}", r"\frac{1+\sqrt{5}}{2}+10^{-20}"],
    ),
    "3+4i": (["4i+3", r"3+4\mathrm{i}", "z=3+4i"], ["3-4i", "7i", "(3,4)", "3+4I"]),
    "-1": (["i^2"], ["i", "-i^2"]),
    "6": ([r"\binom{4}{2}"], ["3!", "2+4"]),
    "1": ([r"\sin^2 x+\cos^2 x"], [r"\sin x+\cos x"]),
    "x=5": (["5", "5=x", "x = 5.0"], ["y=5", "X=5", "2x=10", "x-5=0", "x^2=25", "x>5", "x=5,6", "5x", "x=y=5"]),
    "y=2x+1": (
        ["2x+1", "2x+1=y", "y-2x-1=0", "2x+1-y=0"],
        ["2y=4x+2", "x=2y+1", "y=2x-1", "y>2x+1", "f(x)=2x+1", "2x+1=0", "y^2=(2x+1)^2", "y-2x-1", "0=0"],
    ),
    "2x+1": (
        ["1+2x", "f(x)=2x+1", "y = 2x + 1", r"2(x+\frac12)", r"\frac{4x+2}{2}"],
        ["2y+1", "2X+1", "x=2x+1", "2x+1=0", "2x+1+0.0001", "2x+1>0", "2x, 1", "2x+", "2x+1+C"],
    ),
    "(x+1)^2": (["x^2+2x+1", "(1+x)^2", "x**2+2x+1"], ["x^2+1", "(x+1)^2=0", "(x+1),(x+1)", "(y+1)^2"]),
    r"\frac{x}{2}": (["x/2", "0.5x"], ["1/2x", "x/2/1", r"\frac{2}{x}", "x:2"]),
    "1,2": (
        ["2,1", "1 and 2", r"\{2, 1\}", "x=1,2", r"x=1\text{ or }x=2", "$1$ and $2$"],
        ["1", "(1,2)", "1,2,3", "1,1,2", "12", "1.2", "1+2", "1<x<2", "x=1,y=2", "1 or", "1 2"],
    ),
    "(1,2)": (
        ["(1, 2)", r"\left(1,2\right)", r"(1.0,\frac{4}{2})"],
        ["(2,1)", "[1,2]", "1,2", "(1,2,3)", "(1,2", "(1+0,2)"],
    ),
    "[2,5)": ([r"2\le x<5", r"5>x\ge2", r"x\in[2,5)"], ["(2,5)", "[2,5]", "2<x<5", r"x\ge2", r"2\le5", r"2\le x>5"]),
    r"(-\infty,3]": ([r"x\le3", r"3\ge x", "x≤3"], ["x<3", r"[3,\infty)", "3", r"(\infty,3]"]),
    r"(-\infty,1)\cup(2,\infty)": (
        [r"(2,\infty)\cup(-\infty,1)", "x<1 or x>2"],
        ["x<1 and x>2", r"(-\infty,1)\cap(2,\infty)", r"(-\infty,1]\cup(2,\infty)", "x<1 or y>2", "(1,2)"],
    ),
    r"\pm 2": (["2,-2", "2 or -2", "|x|=2", "±2"], ["2", "(2,-2)", "2,2", "x^2=4", "[-2,2]"]),
    r"\{1\pm\sqrt{5},-2\}": ([r"-2, 1+\sqrt{5}, 1-\sqrt{5}"], [r"1\pm\sqrt{5}", r"\{1\pm\sqrt{5}\},-2"]),
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}": (
        [r"\begin{bmatrix} 1 & 2 \\ 3 & \frac{8}{2} \end{bmatrix}"],
        [r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", "-2", "(1,2,3,4)"],
    ),
    "12_8": (["12_{8}", "x=12_8"], ["12", "10", "12_9", "1010_2"]),
    "3:30": (["3 : 30"], ["15:30", "3.5", "3.30"]),
    r"\text{Monday}": (["Monday", "monday."], ["Tuesday", "not Monday", "Monday or Tuesday", "Mon"]),
    r"\text{(C)}": (["C", "(C)"], ["B", "C or D", "not C"]),
    r"5\text{ feet}": (["5", "5 ft", "5 foot"], ["5 inches", "60 inches", "5 feet 2 inches", "5 square feet"]),
    r"864\mbox{ inches}^2": (["864", "864 square inches", "864 in²"], ["864 cubic inches", "864 inches", "864 cm^2"]),
    r"90^\circ": (["90", "90 degrees", r"\theta=90^{\circ}"], [r"\frac{\pi}{2}", "90 radians", "100"]),
    r"\$32,348": (["32348", "32,348 dollars"], ["€32348", "32348 cents", "32.348"]),
    r"1.6\times10^{-19}": (["1.6e-19", r"16\times10^{-20}"], ["0", r"1.6\times10^{19}", "1.602e-19"]),
    "6e": (["6e"], ["3e2", "6e0"]),
    "2^{10}": (["1024", "4^5"], ["20", "2_{10}", "1023"]),
    "1024": (["1,024"], ["2^{10}", "4^5"]),
    r"\frac{1}{2006!}": (["1/2006!"], [r"\frac{1}{2004!}", "0"]),
    "3R^2": (["3R^{2}"], ["3r^2", "3R"]),
    "e^2": ([r"\mathrm{e}^2", r"\exp(2)"], ["7.389", "E^2", "2e", "e2"]),
    r"\cot x": ([r"\frac{\cos x}{\sin x}", r"\cot(x)"], [r"\tan x", r"\cot y", r"\cot"]),
    r"\ln 2": ([r"\frac{\ln 4}{2}"], ["0.693147", r"\log 2", r"\ln"]),
    "3": ([r"\log_{2}8", r"\log_2 8"], ["8", r"\log_2", r"\log_{2}"]),
}  # fmt: skip


@pytest.mark.parametrize("reference", CASES)
def test_answers(reference):
    assert check_reference(reference) is None
    right, wrong = CASES[reference]
    assert [(answer, value) for answer in right if (value := grade(answer, reference)) != 1.0] == []
    assert [(answer, value) for answer in wrong if (value := grade(answer, reference)) != 0.0] == []


def test_shared_cases():
    missed = []
    for case in shared("cases/answers.jsonl"):
        for pattern in (r"\boxed{%s}", "<answer>%s</answer>"):
            answer = final_answer("", pattern % case["answer"])
            value = 0.0 if answer is None else grade(answer, case["reference"])
            if value != float(case["right"]):
                missed.append((case, pattern, value))
    assert missed == []


def test_math500():
    golds = [row["answer"] for row in shared("data/math500.jsonl")]
    assert {gold: why for gold in golds if (why := check_reference(gold))} == {}
    for rewritten in (
        lambda text: text,
        lambda text: text.replace(r"\frac", r"\dfrac"),
        lambda text: re.sub(r"(?<![A-Za-z]) | (?![A-Za-z])", "", text),
        lambda text: text.replace(r"\left", "").replace(r"\right", ""),
        lambda text: re.sub(r"\\text\{([^}]*)\}", r"\1", text),
        lambda text: text.replace(r"^\circ", ""),
        lambda text: f"The answer is ${text}$.",
        lambda text: text if "=" in text or r"\in" in text else f"w = {text}",
    ):
        assert [rewritten(gold) for gold in golds if grade(rewritten(gold), gold) != 1.0] == []
    others = zip(golds[1:] + golds[:1], golds, strict=True)
    assert {pair for pair in others if pair[0] != pair[1] and grade(*pair) != 0.0} <= {("5", "x=5"), ("x=5", "5")}
    assert [gold for gold in golds if grade(f"{gold}+1", gold) != 0.0] == []


def test_plain_numbers_need_no_mpmath():
    program = """if True:
        import sys
        from r1kernels.rewards.math import check_reference, grade
        assert [grade(text, "18") for text in ("18", "36/2", "18.0 apples", r"\\frac{36}{2}")] == [1.0] * 4
        assert [grade(text, "18") for text in ("19", "", "eighteen")] == [0.0] * 3
        assert grade("50%", "0.5") == 1.0 and check_reference("58,500") is None
        assert "mpmath" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", program], check=True)


# Pairs whose difference is small, zero, or vanishes beside large numbers.
EXACT = [
    (r"\cos(\frac{\pi}{2})", "0", 1.0), (r"\sin\pi", r"\cos\frac{\pi}{2}", 1.0), ("e^{-200}", "0", 0.0),
    ("0", "e^{-200}", 0.0), (r"\sin\pi+e^{-200}", "0", 0.0), (r"\sqrt{3}-\sqrt{3}", "0", 0.0),
    (r"\sqrt{2}+e^{-200}", r"\sqrt{2}", 0.0), (r"\sqrt{324}+10^{-60}", "18", 0.0), ("2^{1000}+1", "2^{1000}", 0.0),
    (r"\frac{2^{1001}}{2}", "2^{1000}", 1.0), (r"\sqrt{5+2\sqrt{6}}", r"\sqrt{2}+\sqrt{3}", 1.0),
    (r"\frac{1}{2006!+1}", r"\frac{1}{2006!}", 0.0), (r"x^2+10^{-60}", "x^2", 0.0), (r"x^2+0.1^{60}x", "x^2", 0.0),
    ("x-x", "0", 1.0), (r"x^{2}\cdot 0.1^{60}", "0", 0.0), (r"\sqrt[3]{-8}", "-2", 1.0),
    ("x^{1/3}", r"\sqrt[3]{x}", 1.0),
    (r"\ln x^2", r"2\ln x", 0.0), (r"\sqrt{x}\sqrt{y}", r"\sqrt{xy}", 0.0), (r"\log_4 8", "1.5", 1.0),
    (r"\tan^{-1}(1)", r"\frac{\pi}{4}", 1.0), (r"\tan(1)^{-1}", r"\cot 1", 1.0),
    (r"\sin 2x\cos x", r"\sin(2x)\cos x", 1.0),
    (r"\ln x\cdot y", r"y\ln x", 1.0),
    (r"2\ln(x+1)", r"\ln((x+1)^2)", 0.0), (r"\sqrt{(x+1)^2}", "x+1", 0.0), ("|x-2|", "x-2", 0.0),
    (r"e^{i\pi}", "-1", 1.0), (r"\frac{1}{i}", "-i", 1.0),
]  # fmt: skip


def test_equality_is_exact():
    assert [(*case, value) for case in EXACT if (value := grade(*case[:2])) != case[2]] == []


@pytest.mark.parametrize("reference", [
    r"\frac{1", "(3,", r"\sqrt{", r"3 \cdot", r"\int_0^1 x \, dx", "x > y > z", "|x|", r"0.\overline{3}", "0.3...",
    "[18]", "n!",
])  # fmt: skip
def test_an_unreadable_reference_is_reported(reference):
    assert repr(reference) in check_reference(reference)
    assert grade("3", reference) is None
    assert grade(reference, reference) == 1.0


def test_a_blank_reference_cannot_be_scored():
    assert "longer" in check_reference("$" * 10**6) and grade("18", "$" * 10**6) is None
    assert check_reference(" ") and grade("3", " ") is None


def test_answers_that_differ_only_in_notation_look_the_same():
    for equal in (
        ["1/2", "1 / 2 "],
        ["x = 0.5", "$x=0.5$."],
        ["Monday", "Monday."],
        [r"\frac12", r"\dfrac{1}{2}", "½"],
    ):
        assert len({normal(answer).replace(" ", "") for answer in equal}) == 1, equal
    different = ["18", "-18", "18 cm", "18%", "19", "x+1", "(1,2)", "[1,2]", "Monday", "18 or 19", "{18", "18 + "]
    assert len({normal(answer) for answer in different}) == len(different)


def test_a_currency_is_a_unit():
    assert check_reference(r"\$18 apples") and grade("18 apples", r"\$18") == grade(r"\$18 apples", "18 apples") == 0.0
    for answer, reference in (("18 apples", "18%"), ("18%", "18 cm"), ("18 quadrillions", "18"), ("18 obvious", "18"),
                              ("18 ms", "18 m"), ("18 seems", "18")):
        assert grade(answer, reference) == 0.0, (answer, reference)
    for answer, reference in (("18%", "18"), ("0.18", "18%"), ("18 hrs", "18 hours"), ("**The answer is 18.**", "18")):
        assert grade(answer, reference) == 1.0, (answer, reference)
    assert grade(r"\$18 apples", "18") == grade("€18", r"\$18") == 0.0
    assert grade(r"\$18 dollars", r"\$18") == grade("18 dollars", r"\$18") == 1.0


def test_a_reference_with_half_a_character_is_named_plainly():
    assert "half of a character" in check_reference("x\ud800")


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^{9}}}", "9^9^9^9", "(9^{9})^{9^{9}}", "10^{1000000}", r"7 \times 10^{123456789}", "1000000!", "3!!!!",
        "9" * 400 + "^{99999}", r"\binom{1000000}{500000}", r"7^{1000000} \mod 12", r"\sum_{k=1}^{1000000} k",
        r"\int_0^1 x \, dx", "(x+y+z+1)^{1001}", r"\left(1+\sqrt{2}\right)^{5000}", "(" * 40 + "18" + ")" * 40,
        "(" * 400, r"\frac{1}{" * 20 + "18" + "}" * 20, "|" * 40, "(x+1)^{100}(y+1)^{100}", "12345!!", "1e99999",
        r"\sin \sin \sin 18i", "1" * 450 + "e9999", "-" * 400 + "18", "\ud800\x00\u202e", "__import__('os').abort()",
        r" \cup ".join(f"({k},{k + 1})" for k in range(40)),
        r"\sin x+" * 70 + "18", "2^{9999}+" * 40 + "18", r"\frac{1}{2006!}+" * 9 + "18", "x!+" * 9 + "18",
        r"\exp(\exp(\exp(9)))",
        "x^{200000}", r"(\cosh 99)^{9999}", r"\binom{9999}{x}^{9999}", "i^{i^{99999}}", r"\sqrt[0]{18}", r"\ln(x-x)",
        "0^{-1}",
        r"\cot(x-x)", "(x-x-1)!", r"\frac{18}{x-x}", r"\log_{1} 18", "(-18)!", r"\binom{18}{-1}", r"\sin(10^{300})",
    ],
)  # fmt: skip
def test_what_is_large_is_refused_unexpanded(answer):
    assert grade(answer, "18") == 0.0
    assert grade(answer, answer) == 1.0


def test_hostile_mutations():
    """No text raises, whatever it is made of, and long ones are wrong."""
    draw = random.Random(0)
    pieces = [
        *"0123456789xyei+-*/^_(){}[]\\|!,.=<>%$~& \"'",
        r"\frac",
        r"\sqrt{",
        "^{",
        r"\pm",
        r"\cup",
        r"\text{",
        "or",
        r"\left(",
        r"\infty",
        "\u202e",
        "９",
        "½",
        r"\begin{pmatrix}",
        r"\end{pmatrix}",
        r"\binom{",
        r"\log_",
    ]
    texts = [(answer, reference) for reference, groups in CASES.items() for group in groups for answer in group]
    for _ in range(2500):
        answer, reference = draw.choice(texts)
        for _ in range(draw.randint(1, 6)):
            place = draw.randint(0, len(answer))
            added = draw.choice(pieces) * draw.choice([1, 1, 1, 2, 40])
            answer = answer[:place] + added + answer[place + draw.choice([0, 0, 1, 3]) :]
        assert grade(answer, reference) in (0.0, 1.0), (answer, reference)
    assert grade("1" * (MAX_ANSWER + 3), "18") == 0.0

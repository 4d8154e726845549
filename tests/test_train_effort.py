"""Answers that are made to hang, exhaust or fool whatever checks them."""

import math
import os
import random
import re
from pathlib import Path

import pytest

from r1kernels.train.rewards import Sample, Scorer, ScoringConfig, accuracy
from r1kernels.train.rewards.effort import is_hopeless


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^{9}}}", "9^9^9^9", "(9^{9})^{9^{9}}", "10^{1000000}", "10^{-1000000}", r"7 \times 10^{123456789}",
        "1000000!", "(123456)!", "3!!!!", "9" * 400 + "^{99999}",
        r"\binom{1000000}{500000}", r"\Gamma(1000000)", r"7^{1000000} \mod 12",
        r"\sum_{k=1}^{1000000} k", r"\prod_{k=1}^{1000000} k", r"\int_0^1 x \, dx", r"\lim_{x \to 0} x",
        "(x+y+z+1)^{101}", r"\left(1+\sqrt{2}\right)^{5000}", "(3+4i)^{1000}", "(" * 40 + "18" + ")" * 40, "(" * 400,
        r"\frac{1}{" * 20 + "18" + "}" * 20, r" \cup ".join(f"({k},{k + 1})" for k in range(20)), "|" * 40,
    ],
)  # fmt: skip
def test_what_no_judge_would_finish_is_neither_right_nor_wrong(answer):
    assert is_hopeless(answer, "18")
    assert math.isnan(accuracy(Sample("", f"<answer>{answer}</answer>", "18")))
    # Unless the reference is of that kind itself.
    assert not is_hopeless(answer, answer)
    assert not is_hopeless(answer + "+0", answer)
    assert accuracy(Sample("", f"<answer>{answer}</answer>", answer)) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "1,000,000", "1000000", "3000000x^2", "1000000^2", "2^{1000}", "2^{2^{3}}", "e^{x^{2}}", "10^{100}",
        "x^{99999}", r"\left(\frac{5}{6}\right)^{100}", "1000!", r"\binom{100}{50}", r"\sum_{k=1}^{100} k",
        r"\int", "12!!",
        r"1+\frac{1}{1+\frac{1}{1+\frac{1}{1+\sqrt{2}}}}", r"\left\{\left(1,\sqrt{\frac{2}{3}}\right)\right\}",
        r"(-\infty,1) \cup (2,3) \cup (4,5) \cup (6,\infty)", "|x|+|y|",
        r"\begin{pmatrix} 1/3 & 2^{10} \\ 0 & 1 \end{pmatrix}",
    ],
)  # fmt: skip
def test_ordinary_answers_are_judged(answer):
    assert is_hopeless(answer, "18") == (answer == r"\int")


def families(draw):
    """Texts by family, each a function that writes one, and how many of them there are to be among the others."""
    number = draw.randint

    def nested(left, right, most):
        depth = number(2, most)
        return left * depth + "18" + right * depth

    def small():
        return str(number(2, 99))

    def tower():
        text = small()
        for _ in range(number(1, 5)):
            text = f"{small()}^{{{text}}}"
        return text

    def some(pieces, most):
        return "".join(draw.choice(pieces) for _ in range(number(1, most)))

    tricks = "\u202e\u200b\u0661\u0662\uff11\uff18\u00b2\u2075\u2460\u0301\u0323\ud800\x00\U0001d7cf\u2212\u00bd\u221a"
    tex = [r"\frac", r"\sqrt", r"\left", r"\right", *"{}()^_&|%#~$", "\\\\", "18", "x", r"\text{", "matrix}"]
    code = ["__import__('os').abort()", "().__class__.__base__.__subclasses__()", "exec('while 1: pass')", "None",
            "nan", "[0]*10**12", "'a'*10**12", "lambda: 0", "open('/etc/passwd').read()", "oo", "zoo", "True"]
    return {
        "parentheses": (60, lambda: nested("(", ")", 240)),
        "unclosed": (30, lambda: draw.choice("([{") * number(2, 490)),
        "brackets": (30, lambda: some("()[]{}", 400)),
        "fractions": (20, lambda: nested(r"\frac{1}{", "}", 40)),
        "roots": (10, lambda: nested(r"\sqrt{", "}", 60)),
        "left": (4, lambda: nested(r"\left(", r"\right)", 30)),
        "functions": (3, lambda: nested(draw.choice([r"\sin{", r"\ln{", "f("]), "})"[number(0, 1)], 30)),
        "towers": (60, tower),
        "python powers": (60, lambda: "**".join(small() for _ in range(number(2, 6)))),
        "powers": (40, lambda: f"{small()}^{{{number(10**2, 10**12)}}}"),
        "python numbers": (10, lambda: f"{number(1, 9)}e{number(10**2, 10**9)}"),
        "factorials": (20, lambda: f"{number(3, 10**9)}" + "!" * number(1, 9)),
        "binomials": (10, lambda: rf"\binom{{{number(10**3, 10**9)}}}{{{number(10, 10**5)}}}"),
        "sums": (10, lambda: rf"\sum_{{k=1}}^{{{number(10**6, 10**12)}}} \frac{{1}}{{k}}"),
        "integrals": (10, lambda: rf"\int_0^{{{small()}}} e^{{-x^{{{small()}}}}} \sin(x^{{{small()}}}) \, dx"),
        "expansions": (10, lambda: f"(x+y+z+1)^{{{number(101, 900)}}}-(x+y+z)^{{{small()}}}"),
        "long numbers": (30, lambda: some("0123456789", 499)),
        "decimals": (20, lambda: "0." + some("39", 400)),
        "lists": (10, lambda: ", ".join(map(str, range(number(2, 120))))),
        "alternatives": (20, lambda: draw.choice([" or ", ", ", "; ", "/", " and "]).join([small(), "18", small()])),
        "equations": (10, lambda: "=".join(small() for _ in range(number(2, 40)))),
        "modulo": (10, lambda: rf"{small()}^{{{number(10**6, 10**9)}}} \mod {small()}"),
        "minus": (2, lambda: "-" * number(2, 400) + "18"),
        "code": (20, lambda: draw.choice(code)),
        "unicode": (60, lambda: some(tricks, 60)),
        "digits of others": (20, lambda: some("\uff11\uff18\u0661\u0668\u00b9\u2078", 30)),
        "zalgo": (20, lambda: "1" + "\u0301\u0323" * number(1, 240)),
        "torn TeX": (20, lambda: some(tex, 80)),
        "subscripts": (5, lambda: nested("{18_", "}", 80)),
        "bars": (10, lambda: "|" * number(13, 400) + "18"),
        "words": (20, lambda: " ".join(draw.choice(["the", "answer", "is", "18", "or"]) for _ in range(number(1, 80)))),
        "megabytes": (20, lambda: draw.choice("9({|^!\\ \u0301") * number(500_000, 1_000_000)),
        "megabytes of tags": (5, lambda: draw.choice(["</answer><answer>", r"\boxed{", "<think>"]) * 50_000),
    }


# Families whose texts may say 18 and nothing else, in odd clothes; a chain of equations is worth its last member.
MAY_BE_RIGHT = {"parentheses", "brackets", "left", "fractions", "minus", "words", "subscripts", "equations"}
# Seconds for one judgement; the default of ScoringConfig is for a run of hours.
LIMIT_S = float(os.environ.get("R1KERNELS_HOSTILE_LIMIT_S", "0.5"))


def resident_bytes(process="self"):
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1]) * 1024


def test_ten_thousand_hostile_answers():
    draw = random.Random(0)
    written = families(draw)
    names = draw.choices(list(written), [weight for weight, _ in written.values()], k=10_000)
    settings = ScoringConfig(workers=2, timeout_s=LIMIT_S)
    before, highest, counts = resident_bytes(), 0, {"timeouts": 0, "crashes": 0, "unscorable": 0}
    with Scorer({"accuracy": 1.0, "format": 1.0, "language": 1.0}, settings) as scorer:
        for start in range(0, len(names), 250):
            batch = names[start : start + 250]
            samples = [Sample("", f"<think>so</think> <answer>{written[name][1]()}</answer>", "18") for name in batch]
            scores = scorer.score(samples)
            for name, sample, value in zip(batch, samples, scores.parts["accuracy"], strict=True):
                assert value != 1.0 or name in MAY_BE_RIGHT, sample.completion[:200]
                assert value in (0.0, 1.0) or math.isnan(value)
            assert not any(map(math.isnan, scores.parts["format"] + scores.parts["language"]))
            counts["timeouts"] += scores.timeouts
            counts["crashes"] += scores.crashes
            counts["unscorable"] += scores.unscorable["accuracy"]
            highest = max(highest, resident_bytes() - before)
        # After all of that, the next one is judged as if nothing had been.
        assert scorer.score([Sample("", r"\boxed{\sqrt{324}}", "18")]).total == [1.0 + 0.0 + 1.0]
    print(counts, highest)
    # A few are stopped at the limit. Most of what would be was seen to be hopeless.
    assert counts["timeouts"] < 500
    assert counts["unscorable"] < 5000
    assert highest < 500 * 2**20

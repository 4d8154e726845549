"""Rewards for any trainer: mathematics, choices, programs in a sandbox, format and language, without torch.

    pip install '.[rewards]'
    python examples/rewards_alone.py

A reward takes lists, one value for each completion, and returns a list, as in TRL: `reward_funcs=REWARDS`.
"""

import json
import sys

from r1kernels import rewards

TESTS = json.dumps({"entry_point": "double", "cases": [{"args": [3], "expected": 6}, {"args": [-1], "expected": -2}]})
# (kind, reference answer, completion)
ROWS = [
    ("math", "0.5", "<think> Half of one. </think> <answer> 1/2 </answer>"),
    ("math", "0.5", "<think> Half of one. </think> <answer> 0.6 </answer>"),
    ("math", r"\frac{\sqrt{2}}{2}", r"So the sine is \boxed{1/\sqrt{2}}."),
    ("choice", "C", "<think> 不是 A 也不是 B. </think> <answer> C </answer>"),
    ("code", TESTS, "<think> Add it. </think> <answer>\n```python\ndef double(x):\n    return x + x\n```\n</answer>"),
    ("code", TESTS, "<think> Square. </think> <answer>\n```python\ndef double(x):\n    return x * x\n```\n</answer>"),
    ("code", TESTS, "```python\ndef double(x):\n    return len(open('/etc/passwd').read())\n```"),
    ("open", "", "<think> Nobody can check a poem, so accuracy is None. </think> <answer> A poem. </answer>"),
]
KINDS, ANSWERS, COMPLETIONS = map(list, zip(*ROWS, strict=True))


def short_thoughts(completions: list[str], **columns: object) -> list[float]:
    """A reward of your own: any function of this form can be in the list."""
    return [float(len(text.partition("</think>")[0].split()) < 8) for text in completions]


REWARDS = [rewards.accuracy, rewards.format, rewards.language, short_thoughts]


if __name__ == "__main__":
    for reward in REWARDS:  # as TRL calls them: the columns of the data set are keywords
        print(f"{reward.__name__}: {reward(completions=COMPLETIONS, answer=ANSWERS, kind=KINDS)}")

    # The same as one number for each completion, with limits for programs, and counts of what could not be scored.
    with rewards.Scorer({"accuracy": 1.0, "format": 0.2}, workers=2, timeout_s=2.0) as scorer:
        scores = scorer.score(COMPLETIONS, answer=ANSWERS, kind=KINDS)
    print(f"accuracy + 0.2 format: {scores.total}")
    print(f"torch was imported: {'torch' in sys.modules}")

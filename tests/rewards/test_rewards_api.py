"""The public functions: lists of strings or chats in, lists of numbers or None out; and what an import loads."""

import importlib
import inspect
import json
import subprocess
import sys

import pytest

from r1kernels import rewards

CHAT = [{"role": "assistant", "content": "<think>a</think> <answer>4</answer>"}]
PROGRAM = json.dumps({"cases": [{"args": [3], "expected": 9}], "entry_point": "square"})


def python(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_importing_rewards_imports_no_torch():
    heavy = {"torch", "transformers", "sympy", "mpmath", "markdown_it", "openai", "numpy", "httpx", "pydantic"}
    loaded = python("import r1kernels.rewards, sys; print(*sys.modules)").split()
    assert not heavy & set(loaded)
    assert not [name for name in loaded if name.startswith("r1kernels.") and not name.startswith("r1kernels.rewards")]


def test_the_public_names_exist_and_are_documented():
    assert len(set(rewards.__all__)) == len(rewards.__all__)
    for name in rewards.__all__:
        assert name == "KINDS" or getattr(rewards, name).__doc__
    for name in ("accuracy", "code", "format", "language", "overlong"):
        assert inspect.isfunction(getattr(rewards, name)) and getattr(rewards, name).__name__ == name
    # Also once their modules have been imported by name.
    importlib.import_module("r1kernels.rewards.code")
    importlib.import_module("r1kernels.rewards.language")
    assert inspect.isfunction(rewards.code) and inspect.isfunction(rewards.language)


def test_no_helper_is_public():
    shown = {name for name in python("from r1kernels import rewards; print(*dir(rewards))").split() if name[0] != "_"}
    modules = {name for name in shown if inspect.ismodule(getattr(rewards, name))}
    assert shown - modules == set(rewards.__all__)


def test_accuracy_of_every_kind():
    values = rewards.accuracy(
        ["<answer>4.0</answer>", "<answer>(B)</answer>", "<answer>caf\u00e9</answer>", "def square(x): return x * x",
         "x", r"\boxed{\sqrt{12}}", "<answer>4</answer>", "<answer>4</answer>"],
        answer=["4", "B", "cafe\u0301", PROGRAM, "x", r"2\sqrt{3}", " ", "5"],
        kind=["math", "choice", "exact", "code", "open", "math", "math", "math"], level=[1] * 8)
    assert values == [1.0, 1.0, 1.0, 1.0, None, 1.0, None, 0.0]


def test_strings_and_chats_are_taken():
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "<think>a</think> "},
                                               {"type": "text", "text": "<answer>4</answer>"}]}]
    asked = [{"role": "user", "content": "2 + 2?"}]
    completions = [CHAT, parts, [*asked, *CHAT], CHAT[0]["content"], [], [{"role": "assistant", "content": None}]]
    assert rewards.accuracy(completions, answer=["4"] * 6, prompts=[asked] * 6) == [1.0] * 4 + [0.0] * 2
    assert rewards.format(completions, prompts=[asked] * 6, answer=["4"] * 6) == [1.0] * 4 + [0.0] * 2


def test_a_prompt_may_open_the_thought():
    completion = "a</think> <answer>4</answer>"
    assert rewards.format([completion] * 2, prompts=["Q: <think>", "Q:"]) == [1.0, 0.0]
    assert rewards.accuracy(["4"] * 2, answer=["4"] * 2, kind=["exact"] * 2, prompts=["<think>", ""]) == [0.0, 0.0]


def test_code_takes_tests_as_the_answer():
    good, bad = "def square(x): return x * x", "def square(x): return x + 1"
    assert rewards.code([good, bad, good], answer=[PROGRAM, PROGRAM, "{}"]) == [1.0, 0.0, None]


@pytest.mark.parametrize("completions", ["<think>", [5], [b"5"], [{"content": "x"}], [[{"role": "user"}]]])
def test_what_is_not_a_list_of_texts_is_named(completions):
    with pytest.raises(ValueError, match="completions"):
        rewards.format(completions)


def test_overlong_counts_tokens():
    ids = [[1] * length for length in (60, 80, 100, 200)]
    expected = [0.0, -0.5, -1.0, -1.0]
    assert rewards.overlong([""] * 4, limit=100, buffer=40, completion_ids=ids) == expected
    lengths = [len(tokens) for tokens in ids]
    assert rewards.overlong([""] * 4, limit=[100] * 4, buffer=40, lengths=lengths, answer=[""] * 4) == expected
    with pytest.raises(TypeError, match="limit"):
        rewards.overlong([""], buffer=40, lengths=[1])
    with pytest.raises(ValueError, match="buffer"):
        rewards.overlong([""], limit=9, buffer=0, lengths=[1])
    with pytest.raises(ValueError, match="lengths"):
        rewards.overlong([""], limit=9, buffer=4)


def test_wrong_columns_are_named():
    with pytest.raises(ValueError, match="answer has 1 values, expected 2"):
        rewards.accuracy(["1", "2"], answer=["1"])
    with pytest.raises(ValueError, match="kind is 'poem'"):
        rewards.accuracy(["1"], answer=["1"], kind=["poem"])


def test_a_forked_process_can_score_too():
    """And a script that never closes anything ends by itself."""
    program = (
        "import os\n"
        "from r1kernels import rewards\n"
        "def judged(): return rewards.accuracy([r'\\boxed{\\sqrt{12}}'], answer=[r'2\\sqrt{3}'])\n"
        "scorer = rewards.Scorer({'format': 1.0})\n"
        "scorer.score(['a'])\n"
        "os.write(1, f'{judged()}\\n'.encode())\n"
        "child = os.fork()\n"
        "os.write(1, f'{judged()}\\n'.encode())\n"
        "if child: assert os.waitpid(child, 0)[1] == 0\n"
    )
    assert python(program) == "[1.0]\n" * 3

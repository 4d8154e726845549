"""The scorer: which rewards apply, programs at once, and the same scores in any batch."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest

from r1kernels.rewards import Scorer, sandbox
from r1kernels.rewards.sandbox import SandboxError

SURD, ROOT = r"<think>a</think> <answer>\sqrt{12}</answer>", r"2\sqrt{3}"
PROGRAM = json.dumps({"cases": [{"args": [3], "expected": 9}], "entry_point": "square"})
RIGHT, HANG = "def square(x): return x * x", "def square(x):\n    while True: pass"
PATIENCE_S = 600  # on a machine that stands still for minutes; nothing waits that long elsewhere

REWARDS = """
seen = {}

def patient(completions, *, answer, **columns):
    seen.update(columns)
    return [None if completion == "?" else float(completion) for completion in completions]

def broken(completions, **columns):
    raise KeyError(completions[0])

def short(completions, **columns):
    return [1.0]

def infinite(completions, **columns):
    return [float("inf")] * len(completions)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "user_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    import user_rewards

    yield user_rewards
    del sys.modules["user_rewards"]


@pytest.fixture(scope="module")
def programs():
    try:
        sandbox.check(512)
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture
def seconds(programs):
    """A time limit that no other sandbox on this machine has: its processes are known by it."""
    return 3600 + random.SystemRandom().random()


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def sandboxes(seconds):
    """The processes of the sandboxes that have this time limit."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(seconds) in (folder / "cmdline").read_text():
                found.append(folder.name)
        except OSError:  # it has ended
            pass
    return found


def test_a_reward_of_the_user_is_called_with_lists(module):
    with Scorer({"user_rewards:patient": 2.0}) as scorer:
        scores = scorer.score(["1", "?"], answer=["", ""], level=[3, 4])
    assert module.seen["level"] == [3, 4]
    assert scores.unscorable == {"user_rewards:patient": 1}
    assert scores.total[0] == 2.0 and math.isnan(scores.total[1])


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("user_rewards:broken", KeyError, "first"),
        ("user_rewards:short", ValueError, r"'user_rewards:short' returned \[1\.0\], expected 2"),
        ("user_rewards:infinite", ValueError, r"'user_rewards:infinite' returned \[inf, inf\]"),
    ],
)
def test_what_goes_wrong_in_a_reward_of_the_user_reaches_the_caller(module, name, error, message):
    with Scorer({name: 1.0}) as scorer:
        for _ in range(2):  # the scorer can be used again
            with pytest.raises(error, match=message):
                scorer.score(["first", "second"])


@pytest.mark.parametrize(
    ("kind", "completion", "answer", "value"),
    [
        ("exact", "<answer>caf\u00e9  au\n lait</answer>", "cafe\u0301 au lait", 1.0),
        ("exact", "<answer>cafe au lait</answer>", "caf\u00e9 au lait", 0.0),
        ("exact", "<answer>1.0</answer>", "1", 0.0),
        ("exact", r"\boxed{x y}", " x  y ", 1.0),
        ("exact", "x y", "x y", 0.0),
        ("exact", "<answer>x</answer>", " ", math.nan),
        ("exact", "<answer>" + "\u0301\u0323" * 500_000 + "</answer>", "x", 0.0),
        ("choice", "<answer>(B)</answer>", "B", 1.0),
        ("choice", "<answer>(C)</answer>", "B", 0.0),
        ("choice", "no answer", "B", 0.0),
        ("choice", "<answer>B</answer>", "", math.nan),
        ("math", "<answer>1.0</answer>", "1", 1.0),
        ("math", "no answer", "1", 0.0),
        ("math", "<answer>1</answer>", "", math.nan),
        ("math", SURD, ROOT, 1.0),
        ("math", SURD, r"3\sqrt{2}", 0.0),
        ("code", "<think>a", PROGRAM, 0.0),
        ("code", RIGHT, "no tests", math.nan),
        ("code", f"```python\n{RIGHT}\n```", PROGRAM, 1.0),
        ("code", "def square(x): return x + x", PROGRAM, 0.0),
        ("open", "<answer>1</answer>", "1", math.nan),
    ],
)
def test_accuracy_depends_on_the_kind(programs, kind, completion, answer, value):
    with Scorer({"accuracy": 1.0}, timeout_s=PATIENCE_S) as scorer:
        scores = scorer.score([completion], answer=[answer], kind=[kind])
    assert scores.parts["accuracy"] == pytest.approx([value], nan_ok=True)
    assert scores.unscorable == {"accuracy": int(math.isnan(value) and kind != "open")}
    assert (scores.timeouts, scores.crashes) == (0, 0)


def test_a_reward_that_does_not_apply_is_left_out():
    completions = ["<think>so</think><answer>18</answer>", "<think>so</think><answer>Hello</answer>",
                   "<think>so</think><answer>18</answer>"]
    with Scorer({"accuracy": 1.0, "format": 0.5}) as scorer:
        scores = scorer.score(completions, answer=["18", "Hi", ""], kind=["math", "open", "math"])
    assert scores.total[:2] == [1.5, 0.5] and math.isnan(scores.total[2])
    assert [math.isnan(value) for value in scores.parts["accuracy"]] == [False, True, True]
    assert scores.unscorable == {"accuracy": 1, "format": 0}


def test_failures_are_counted_and_are_never_zero(programs, monkeypatch):
    """Equal judgements are made once, and each counts."""
    tests = [json.dumps({"prompt": "", "entry_point": "f", "test": f"def check(candidate):\n    {body}"})
             for body in ("while True: pass", "no_such_name")]
    with Scorer({"accuracy": 1.0}, timeout_s=0.5) as scorer:
        scores = scorer.score(["def f(x): return x"] * 5 + ["<answer>7</answer>"], kind=["code"] * 5 + ["math"],
                              answer=[tests[0]] * 3 + [tests[1]] * 2 + ["7"])
        assert (scores.timeouts, scores.crashes, scores.unscorable) == (3, 0, {"accuracy": 5})
        assert [math.isnan(value) for value in scores.total] == [True] * 5 + [False]
        judged = []

        def fails(*arguments, **limits):
            judged.append(arguments[1])
            raise SandboxError("the sandbox did not start")

        monkeypatch.setattr("r1kernels.rewards.scorer.judge_program", fails)
        scores = scorer.score([RIGHT] * 3, answer=[PROGRAM] * 3, kind=["code"] * 3)
    assert (scores.timeouts, scores.crashes, scores.unscorable) == (0, 3, {"accuracy": 3})
    assert judged == [RIGHT]


def test_programs_that_cannot_be_confined_are_refused_before_any_work(module, programs):
    scorer = Scorer({"user_rewards:broken": 1.0, "accuracy": 1.0}, imports=["no_module_here"])
    with scorer, pytest.raises(SandboxError, match="no_module_here"):
        scorer.score([RIGHT], answer=[PROGRAM], kind=["code"])


def test_scores_do_not_depend_on_the_batches():
    draw = random.Random(0)
    answers = [r"\sqrt{12}", r"\frac{36}{2}", "17", "18", "", "(1,2)", r"\{18\}", "x^2", "9^{9^9}", "\ud800", "18!",
               r"\begin{pmatrix}", r"(x+1)^{100000}", "7=18", r"2\sqrt{3} + \sqrt{2} - \sqrt{2}"]
    completions = [f"<think>so \u6240</think> <answer>{draw.choice(answers)}</answer>" for _ in range(150)]
    references = draw.choices(["18", ROOT], k=150)

    def scored(order, size):
        values = {}
        with Scorer({"accuracy": 1.0, "format": 0.5, "language": 0.25}, workers=2) as scorer:
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                scores = scorer.score([completions[i] for i in batch], answer=[references[i] for i in batch])
                for place, index in enumerate(batch):
                    values[index] = (scores.total[place], *(part[place] for part in scores.parts.values()))
        return [repr(values[index]) for index in range(len(completions))]

    straight = list(range(len(completions)))
    expected = scored(straight, 150)
    assert len(set(expected)) >= 2
    for size in (1, 37):
        assert scored(draw.sample(straight, len(straight)), size) == expected


def test_the_overlong_penalty_grows_over_the_buffer():
    lengths = [0, 1, 60, 61, 70, 80, 99, 100]
    with Scorer({"overlong": 1.0}, overlong_buffer=40) as scorer:
        penalties = scorer.score([""] * 8, lengths=lengths, limit=[100] * 8).total
    assert penalties == pytest.approx([0, 0, 0, -1 / 40, -10 / 40, -20 / 40, -39 / 40, -1])


@pytest.mark.parametrize(
    ("rewards", "settings", "message"),
    [
        ({}, {}, "rewards is {}, expected"),
        ({"accurate": 1.0}, {}, "'accurate'.* expected numbers for accuracy, format, language, overlong or"),
        ({"format": math.nan}, {}, "rewards is {'format': nan}, expected numbers"),
        ({"format": "1"}, {}, "rewards is {'format': '1'}, expected numbers"),
        ({"format": True}, {}, "rewards is {'format': True}, expected numbers"),
        ({"no_module:f": 1.0}, {}, "rewards is .*'no_module:f'.* No module named"),
        ({"json:no_function": 1.0}, {}, "rewards is .*'json:no_function'"),
        ({"format": 1.0}, {"workers": 0}, "workers is 0, expected a positive number"),
        ({"format": 1.0}, {"timeout_s": math.inf}, "timeout_s is inf"),
        ({"format": 1.0}, {"memory_mb": -1}, "memory_mb is -1"),
        ({"format": 1.0}, {"overlong_buffer": 0}, "overlong_buffer is 0"),
    ],
)
def test_wrong_arguments_are_named(rewards, settings, message):
    with pytest.raises(ValueError, match=message):
        Scorer(rewards, **settings)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"answer": ["1"]}, "answer has 1 values, expected 2"),
        ({"answer": [1, 2]}, "answer is 1, expected one of .* and a string"),
        ({"answer": ["1", "2"], "kind": ["math", "poem"]}, "kind is 'poem'.*, expected one of .*'math', 'choice'"),
    ],
)
def test_wrong_columns_are_named(columns, message):
    with Scorer({"accuracy": 1.0}) as scorer, pytest.raises(ValueError, match=message):
        scorer.score(["1", "2"], **columns)


def test_programs_run_at_once(seconds):
    tests = json.dumps({"stdio": [{"input": "", "output": "done"}]})
    slow = [f"import time\ntime.sleep({duration})\nprint('done')" for duration in (3.0, 3.1)]
    with Scorer({"accuracy": 1.0}, workers=2, timeout_s=seconds) as scorer, ThreadPoolExecutor(1) as thread:
        future = thread.submit(scorer.score, slow, answer=[tests] * 2, kind=["code"] * 2)
        wait_until(lambda: len(sandboxes(seconds)) >= 6)  # bubblewrap twice, and a program, for each
        assert future.result(PATIENCE_S).total == [1.0, 1.0]


def test_closing_kills_programs(seconds):
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    scorer = Scorer({"accuracy": 1.0}, workers=2, timeout_s=seconds)
    programs = [f"{HANG} # {number}" for number in range(4)]
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(scorer.score, programs, answer=[PROGRAM] * 4, kind=["code"] * 4)
        wait_until(lambda: sandboxes(seconds))
        scorer.close()
        with pytest.raises(CancelledError):
            future.result(PATIENCE_S)
    assert threading.active_count() == threads
    wait_until(lambda: not sandboxes(seconds))  # the kernel ends a namespace soon after its first process
    assert len(os.listdir("/proc/self/fd")) == files


# A script of a user's. The first line that it prints says when it can be interrupted.
SCRIPT = f"""
import os, signal, threading
from r1kernels.rewards import Scorer
signal.signal(signal.SIGINT, signal.default_int_handler)
def score(program):
    with Scorer({{"accuracy": 1.0}}, timeout_s=float(os.environ["SECONDS"])) as scorer:
        print("scoring", flush=True)
        return scorer.score([program], answer=[{PROGRAM!r}], kind=["code"]).total
"""


def script(seconds, rest):
    return subprocess.Popen([sys.executable, "-c", SCRIPT + rest], env=os.environ | {"SECONDS": str(seconds)},
                            stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_programs_die_with_the_caller(seconds):
    with script(seconds, f"score({HANG!r})") as process:
        wait_until(lambda: sandboxes(seconds))
        process.kill()
        wait_until(lambda: not sandboxes(seconds))


def test_an_interrupt_ends_scoring(seconds):
    rest = f"try: score({HANG!r})\nexcept KeyboardInterrupt: print(threading.active_count())"
    with script(seconds, rest) as process:
        wait_until(lambda: sandboxes(seconds))
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=PATIENCE_S)[0] == "scoring\n1\n"
    wait_until(lambda: not sandboxes(seconds))


def test_ctrl_c_in_a_terminal_ends_no_program(seconds):
    """A trainer that is interrupted may finish its step: then the programs of the step must not count as wrong."""
    slow = "import time\ndef square(x):\n    time.sleep(3)\n    return x * x"
    with script(seconds, f"signal.signal(signal.SIGINT, lambda *_: None)\nprint(score({slow!r}))") as process:
        wait_until(lambda: sandboxes(seconds))
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate(timeout=PATIENCE_S)[0] == "scoring\n[1.0]\n"

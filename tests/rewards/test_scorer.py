"""The scorer: which rewards apply, batches in the background, and the same scores however they come."""

import json
import math
import os
import random
import subprocess
import sys
import threading
from concurrent.futures import CancelledError

import pytest

from r1kernels.rewards import Scorer, Scores

SURD, ROOT = r"<think>a</think> <answer>\sqrt{12}</answer>", r"2\sqrt{3}"
PROGRAM = json.dumps({"cases": [{"args": [3], "expected": 9}], "entry_point": "square"})
PATIENCE_S = 120

REWARDS = """
import os
import threading
allowed = threading.Event()
seen = {}

def patient(completions, *, answer, **columns):
    assert allowed.wait(120)
    seen.update(columns, thread=threading.current_thread())
    return [None if completion == "?" else float(completion) for completion in completions]

def broken(completions, **columns):
    raise KeyError(completions[0])

def short(completions, **columns):
    return [1.0]

def infinite(completions, **columns):
    return [float("inf")] * len(completions)

def hang(answer, reference):
    return pow(9**9, 9**9)

def fail(answer, reference):
    raise ValueError(answer)

def die(answer, reference):
    os.abort()
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "user_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    import user_rewards

    yield user_rewards
    del sys.modules["user_rewards"]


def test_a_reward_of_the_user_is_called_with_lists_in_the_background(module):
    with Scorer({"user_rewards:patient": 2.0}) as scorer:
        futures = [scorer.submit([str(n)] * n, answer=["3"] * n, level=[n] * n) for n in range(4)]
        assert not any(future.done() for future in futures)
        module.allowed.set()
        assert [future.result(PATIENCE_S).total for future in futures] == [[2.0 * n] * n for n in range(4)]
        assert module.seen["level"] == [3, 3, 3] and module.seen["thread"] is not threading.main_thread()
        scores = scorer.score(["1", "?"], answer=["", ""])
        assert scores.unscorable == {"user_rewards:patient": 1} and math.isnan(scores.total[1])


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("user_rewards:broken", KeyError, "first"),
        ("user_rewards:short", ValueError, r"'user_rewards:short' returned \[1\.0\], expected 2"),
        ("user_rewards:infinite", ValueError, r"'user_rewards:infinite' returned \[inf, inf\]"),
    ],
)
def test_what_goes_wrong_in_the_background_reaches_the_caller(module, name, error, message):
    with Scorer({name: 1.0}) as scorer:
        for _ in range(2):  # the thread lives on
            with pytest.raises(error, match=message):
                scorer.submit(["first", "second"]).result(PATIENCE_S)


def test_closing_cancels_and_scoring_again_starts_again(module):
    threads = threading.active_count()
    scorer = Scorer({"accuracy": 1.0, "user_rewards:patient": 0.0}, timeout_s=PATIENCE_S)
    under_way, waiting = scorer.submit(["1"], answer=["1"]), scorer.submit(["1"], answer=["1"])
    closing = threading.Thread(target=scorer.close)
    closing.start()
    while not scorer._closing.is_set():
        pass
    module.allowed.set()
    closing.join(PATIENCE_S)
    with pytest.raises(CancelledError):
        waiting.result(PATIENCE_S)
    assert under_way.done() and threading.active_count() == threads
    assert scorer.score(["1"], answer=["1"]).parts["user_rewards:patient"] == [1.0]
    scorer.close()
    scorer.close()


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
        ("choice", "<answer>B</answer>", "", math.nan),
        ("math", "<answer>1.0</answer>", "1", 1.0),
        ("math", "no answer", "1", 0.0),
        ("math", "<answer>1</answer>", "", math.nan),
        ("math", SURD, ROOT, 1.0),
        ("math", SURD, r"3\sqrt{2}", 0.0),
        ("code", "<think>a", PROGRAM, 0.0),
        ("code", "def square(x): return x * x", "no tests", math.nan),
        ("code", "```python\ndef square(x): return x * x\n```", PROGRAM, 1.0),
        ("code", "```python\ndef square(x): return x + x\n```", PROGRAM, 0.0),
        ("open", "<answer>1</answer>", "1", math.nan),
    ],
)
def test_accuracy_depends_on_the_kind(kind, completion, answer, value):
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


@pytest.mark.parametrize(("judge", "counts"), [("hang", (3, 0)), ("fail", (0, 3)), ("die", (0, 3))])
def test_failures_are_counted_and_are_never_zero(module, monkeypatch, judge, counts):
    """Each of three equal judgements counts, though it is made once."""
    monkeypatch.setattr("r1kernels.rewards.scorer.MATH", f"user_rewards:{judge}")
    with Scorer({"accuracy": 1.0}, timeout_s=1.0 if judge == "hang" else PATIENCE_S) as scorer:
        scores = scorer.score([SURD] * 3 + ["<answer>7</answer>"], answer=[ROOT] * 3 + ["7"])
    assert (scores.timeouts, scores.crashes) == counts
    assert scores.unscorable == {"accuracy": 3}
    assert [math.isnan(value) for value in scores.total] == [True] * 3 + [False]


def test_scores_do_not_depend_on_the_batches():
    draw = random.Random(0)
    answers = [r"\sqrt{12}", r"\frac{36}{2}", "17", "18", "", "(1,2)", r"\{18\}", "x^2", "9^{9^9}", "\ud800", "18!",
               r"\begin{pmatrix}", r"(x+1)^{100000}", "7=18", r"2\sqrt{3} + \sqrt{2} - \sqrt{2}"]
    completions = [f"<think>so \u6240</think> <answer>{draw.choice(answers)}</answer>" for _ in range(150)]
    references = draw.choices(["18", ROOT], k=150)

    def scored(order, size):
        values = {}
        with Scorer({"accuracy": 1.0, "format": 0.5, "language": 0.25}, workers=2, timeout_s=PATIENCE_S) as scorer:
            batches = [order[start : start + size] for start in range(0, len(order), size)]
            futures = [scorer.submit([completions[index] for index in batch], answer=[references[i] for i in batch])
                       for batch in batches]
            for batch, future in zip(batches, futures, strict=True):
                scores = future.result()
                for place, index in enumerate(batch):
                    values[index] = (scores.total[place], *(part[place] for part in scores.parts.values()))
        return [repr(values[index]) for index in range(len(completions))]

    straight = list(range(len(completions)))
    expected = scored(straight, 150)
    assert len(set(expected)) >= 2
    for size in (1, 37):
        assert scored(draw.sample(straight, len(straight)), size) == expected


def test_batches_are_joined_in_the_order_of_the_samples():
    first = Scores({"a": [1.0, 2.0]}, [3.0, 4.0], 1, 2, 3, {"a": 1}, "")
    second = Scores({"a": [5.0]}, [6.0], 10, 20, 30, {"a": 2}, "refused")
    joined = Scores.joined([first, second], [[2, 0], [1]])
    assert joined == Scores({"a": [2.0, 5.0, 1.0]}, [4.0, 6.0, 3.0], 11, 22, 33, {"a": 3}, "refused")


def test_the_overlong_penalty_grows_over_the_buffer():
    lengths = [0, 1, 60, 61, 70, 80, 99, 100]
    with Scorer({"overlong": 1.0}, overlong_buffer=40) as scorer:
        penalties = scorer.score([""] * 8, lengths=lengths, limit=[100] * 8).total
        assert penalties == pytest.approx([0, 0, 0, -1 / 40, -10 / 40, -20 / 40, -39 / 40, -1])
        with pytest.raises(ValueError, match="'overlong' got length 5 and limit None"):
            scorer.score([""], lengths=[5])


def test_nothing_is_left_behind():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        with Scorer({"accuracy": 1.0}, timeout_s=PATIENCE_S) as scorer:
            scorer.score([SURD], answer=[ROOT])
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("rewards", "settings", "message"),
    [
        ({}, {}, "rewards is empty"),
        ({"accurate": 1.0}, {}, "rewards names 'accurate', expected accuracy, format, language, overlong, judge"),
        ({"format": math.nan}, {}, r"rewards\['format'\] is nan, expected a finite number"),
        ({"format": "1"}, {}, r"rewards\['format'\] is '1', expected a finite number"),
        ({"format": True}, {}, r"rewards\['format'\] is True, expected a finite number"),
        ({"no_module:f": 1.0}, {}, "rewards names 'no_module:f'"),
        ({"json:no_function": 1.0}, {}, "rewards names 'json:no_function'"),
        ({"judge": 1.0}, {}, "judge is None"),
        ({"format": 1.0}, {"workers": 0}, "workers is 0, expected a positive number"),
        ({"format": 1.0}, {"timeout_s": math.inf}, "timeout_s is inf"),
        ({"format": 1.0}, {"memory_mb": -1}, "memory_mb is -1"),
        ({"format": 1.0}, {"overlong_buffer": 0}, "overlong_buffer is 0"),
        ({"format": 1.0}, {"sandbox": "unshare"}, "sandbox is 'unshare', expected 'bubblewrap' or 'none'"),
    ],
)
def test_wrong_arguments_are_named(rewards, settings, message):
    with pytest.raises(ValueError, match=message):
        Scorer(rewards, **settings)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"answer": ["1"]}, "answer has 1 values, expected 2"),
        ({"answer": [1, 2]}, "answer is 1, expected a string"),
        ({"answer": ["1", "2"], "kind": ["math", "poem"]}, "kind is 'poem', expected one of math, choice, exact"),
        ({"language": ["en", "fr"]}, "language is 'fr', expected one of en, zh"),
    ],
)
def test_wrong_columns_are_named(columns, message):
    with Scorer({"accuracy": 1.0}) as scorer, pytest.raises(ValueError, match=message):
        scorer.submit(["1", "2"], **columns)


def test_an_interrupt_while_scoring_ends_the_workers():
    script = (
        "import os, signal, threading\n"
        "from r1kernels.rewards import Scorer\n"
        "from r1kernels.rewards.pool import Pool, Task\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "real, sleep = Pool.run, Task('time:sleep', (3600,), 3600.0)\n"
        "def run(pool, tasks, stop):\n"
        "    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    return real(pool, [sleep for _ in tasks], stop)\n"
        "Pool.run, scorer = run, Scorer({'accuracy': 1.0})\n"
        "try:\n"
        f"    scorer.score([{SURD!r}], answer=[{ROOT!r}])\n"
        "except KeyboardInterrupt:\n"
        "    print(threading.active_count(), scorer._pool._server, scorer._pool._workers)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout == "1 None []\n", done.stderr

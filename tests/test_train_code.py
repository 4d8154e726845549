"""Programs as answers: finding the code, the forms of tests, and whose fault is what."""

import gzip
import json
import math

import pytest

from r1kernels.train.data import DataError
from r1kernels.train.data_code import load_humaneval
from r1kernels.train.rewards import Judgement, Sample, Scorer, sandbox
from r1kernels.train.rewards.code import code_reward, extract_code, sources, triage
from r1kernels.train.rewards.settings import ScoringConfig

SETTINGS = ScoringConfig(timeout_s=1.0, memory_mb=256)

PROMPT = 'import math\n\n\ndef half(x):\n    return x / 2\n\n\ndef area(r: float):\n    """Of a circle.\n    """\n'
TEST = """
def check(candidate):
    assert abs(candidate(1) - math.pi) < 1e-6
    assert candidate(0) == 0
    assert half(candidate(2.0)) > 6
    try:
        candidate("r")
    except TypeError:
        pass
"""
PROBLEM = {"prompt": PROMPT, "test": TEST, "entry_point": "area"}
WHOLE = "def area(r):\n    return math.pi * half(2 * r * r)"
CASES = {"cases": [{"args": [[3, 1, 2]], "expected": [1, 2, 3]}, {"args": [[]], "expected": []}], "entry_point": "f"}
STDIO = {"stdio": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 6", "output": "11"}]}


@pytest.fixture(scope="module", autouse=True)
def works():
    try:
        sandbox.choose()
    except sandbox.SandboxError as error:
        pytest.skip(str(error))


def reward(tests, completion, prompt=""):
    return code_reward(Sample(prompt, completion, json.dumps(tests), kind="code"), SETTINGS)


@pytest.mark.parametrize(
    ("completion", "found"),
    [
        ("x = 1", ("x = 1", False)),
        ("    return 1", ("    return 1", False)),
        ("<think>x = 1</think>x = 2", ("x = 2", False)),
        ("<think>x = 1</think><answer>x = 2</answer>", ("x = 2", False)),
        ("Here:\n```python\nx = 1\n```\nand\n```py\nx = 2\n```\nDone.", ("x = 2\n", True)),
        ("```python\nx = 1\n```\nprints\n```\n1\n```", ("x = 1\n", True)),
        ("```\nx = 1\n```\n```bash\nls\n```", ("x = 1\n", True)),
        ("```Python\r\nx = 1\r\n```", ("x = 1\n", True)),
        ("  ```python\nx = 1\n  ```", ("x = 1\n", True)),
        ("```python\n'''\n```text\n'''\n```", ("'''\n```text\n'''\n", True)),
        ("```python\nx = 1", ("x = 1", True)),
        ("<answer>```\nx = 1\n```</answer>```\nx = 2\n```", ("x = 1\n", True)),
        ("<think>x = 1", None),
        ("", None),
        ("```python\n```", None),
        ("x" * 200_000, None),
    ],
)
def test_finding_the_code(completion, found):
    assert extract_code("", completion) == found


def test_finding_the_code_takes_no_time():
    for text in ("```" + "a" * 2_000_000 + "`", "```\n" * 100_000, "`" * 2_000_000, "<answer>" * 200_000):
        extract_code("", text)


def test_bodies_and_whole_functions():
    prompt, whole = PROBLEM["prompt"], ["import math", WHOLE]
    assert sources(PROBLEM, WHOLE, True) == [prompt, WHOLE]
    assert sources(PROBLEM, "area = lambda r: r", False) == [prompt, "area = lambda r: r"]
    assert sources(PROBLEM, "    return 1\n# so\ndef f():\n    pass", False) == [prompt + "    return 1\n# so\n"]
    assert sources(PROBLEM, "    return 1\nx = 2", True) == [prompt + "    return 1\nx = 2"]
    assert sources(PROBLEM, "    def area(r): pass", True) == [prompt + "    def area(r): pass"]
    assert sources(CASES, "\n".join(whole), True) == ["", "\n".join(whole)]
    commented = PROBLEM | {"prompt": "def area(r):\n    # of a circle\n"}
    assert sources(commented, WHOLE, True)[0].endswith("\n    pass\n")


def test_checks_as_in_humaneval():
    assert reward(PROBLEM, WHOLE) == 1.0
    assert reward(PROBLEM, f"<think>so</think><answer>```python\n{WHOLE}\n```</answer>") == 1.0
    assert reward(PROBLEM, "    return math.pi * r ** 2\nI hope that helps!") == 1.0
    assert reward(PROBLEM, "    return 3 * r ** 2") == 0.0
    assert reward(PROBLEM, "    return math.pi * r ** 2", prompt="<think>") == 0.0
    for broken in ("def area(r", "def area(r): raise SystemExit", "return 1", "\0", "\ud800", "area = None"):
        assert reward(PROBLEM, f"```\n{broken}\n```") == 0.0, broken


def test_failing_where_a_test_expects_exceptions_is_failing():
    tests = PROBLEM | {"test": "def check(candidate):\n    try: candidate(1)\n    except Exception: pass"}
    assert reward(tests, "    raise ValueError") == 1.0
    for failure in ("    import os; os._exit(0)", "    while True: pass", "    return 'x' * 2_000_000", "    !"):
        assert reward(tests, failure) == 0.0, failure
    expects = PROBLEM | {"test": "import pytest\ndef check(candidate):\n    with pytest.raises(OSError): candidate(1)"}
    assert reward(expects, "    raise FileNotFoundError(2, 'no')") == 1.0
    assert reward(expects, "    class OSError(Exception): pass\n    raise OSError") == 1.0
    assert reward(expects, "    raise SystemExit") == 0.0


SQUARE = {"prompt": "", "entry_point": "f"}


@pytest.mark.parametrize(
    "test",
    [
        "assert all(map(lambda x: candidate(x) == x * x, range(10)))",
        "assert not any(map(lambda x: candidate(x) != x * x, range(10)))",
        "for a, b in zip(map(candidate, range(5)), [0, 1, 4, 9, 16]): assert a == b",
        "assert list(iter(lambda: candidate(3), 9)) == []",
        "for a in filter(candidate, range(5)): assert candidate(a) == a * a",
        "assert not [a for a in map(candidate, range(3)) if a not in (0, 1, 4)]",
    ],
)
def test_what_loops_swallow_is_no_way_to_pass(test):
    tests = SQUARE | {"test": f"def check(candidate):\n    {test}"}
    assert reward(tests, "def f(x): return x * x") == 1.0
    for end in ("StopIteration", "type('Mine', (StopIteration,), {})", "StopAsyncIteration", "GeneratorExit"):
        assert reward(tests, f"def f(x): raise {end}") == 0.0, end


@pytest.mark.parametrize(
    ("test", "good", "bad"),
    [
        ("l = [3, 1, 2]; candidate(l); assert l == [1, 2, 3]", "x.sort()", "sorted(x)"),
        ("l = [3, 1]; assert candidate(l) is None and l == [1]", "x.remove(3)", "x.remove(1)"),
        ("l = [1]; candidate(x=l); assert l == [1, 2]", "x.append(2)", "x = x + [2]"),
        ("s = {1}; candidate(s); assert s == {2}", "x.clear(); x.add(2)", "x = {2}"),
        ("d = {1: [2]}; e = d[1]; candidate(d); assert e == [2, 3] and d[1] is e and d[4] == 5",
         "x[1].append(3); x[4] = 5", "x[1] += [3, 4]; x[4] = 5"),
        ("g = [[1, 2], [3, 4]]; r = g[0]; candidate(g); assert g == [[3, 1], [4, 2]] and r == [3, 1]",
         "x[:] = map(list, zip(*x[::-1]))", "x[:] = map(list, zip(*x))"),
        ("t = ([1], 2); candidate(t); assert t == ([], 2)", "x[0].pop()", "pass"),
        ("l = list(range(150_000)); candidate(l); assert l[0] == 149_999", "x.reverse()", "pass"),
        ("l = [2, 1]; assert candidate(l) == sorted(l)", "return sorted(x)", "x.clear(); return []"),
        ("l = [2, 1]; assert candidate(l) == [] and l == [2, 1]", "x.append(print); return []", "return None"),
        ("l = [2, 1]; assert candidate(l) is None", "x.append(print)", "return 1"),
        ("assert list(candidate(3)) == [0, 1, 2]", "yield from range(x)", "yield 0"),
        ("assert list(candidate(3)) == [0, 1, 2]", "return range(x)", "return range(1)"),
        ("assert candidate(3) == [0, 1, 2]", "return list(range(x))", "return range(x)"),
        ("assert candidate(3) == [0, 1, 2]", "return list(range(x))", "yield from range(x)"),
        ("assert candidate(3) == [0, 1, 2]", "return list(range(x))", "return map(int, range(x))"),
        ("assert candidate(3) == range(3)", "return range(x)", "return list(range(x))"),
        ("assert len(candidate(3)) == 3", "return range(x)", "yield from range(x)"),
        ("assert sorted(candidate({1: 3, 2: 4})) == [3, 4]", "return x.values()", "return x.keys()"),
        ("assert list(candidate({1: 3})) == [(1, 3)]", "return x.items()", "return x"),
        ("assert candidate({1: 3}) == {1}", "return x.keys()", "return x.values()"),
        ("assert [list(a) for a in candidate(2)] == [[0, 2]]", "return [zip([0], [2])][0]", "return zip([0])"),
        ("g = candidate(5); assert [next(g), next(g)] == [5, 6]", "while True: yield x; x += 1", "yield 5"),
        ("assert len(list(candidate(1000))) == 1000", "yield from range(x)", "while True: yield x"),
    ],
)  # fmt: skip
def test_work_in_place_and_iterators(test, good, bad):
    tests = SQUARE | {"test": f"def check(candidate):\n    {test}"}
    assert reward(tests, f"def f(x):\n    {good}") == 1.0
    assert reward(tests, f"def f(x):\n    {bad}") == 0.0


def test_exceptions_are_known_by_their_bases():
    test = "def check(candidate):\n    try: candidate(1)\n    except ValueError: return\n    assert 0"
    tests = SQUARE | {"test": test}
    for good in (
        "class E(ValueError): pass\ndef f(x): raise E('x')",
        "class E(Exception): pass\nclass F(E, UnicodeError): pass\ndef f(x): raise F",
        "def f(x): b'\\xff'.decode()",
        "import json\ndef f(x): json.loads('{')",
    ):
        assert reward(tests, good) == 1.0, good
    for bad in ("type('E', (Exception,), {})", "KeyError", "SystemExit"):
        assert reward(tests, f"def f(x): raise {bad}") == 0.0, bad
    tests = SQUARE | {"test": "def check(candidate):\n    try: candidate(1)\n    except Exception: pass"}
    assert reward(tests, "def f(x): raise StopIteration") == 1.0
    assert reward(tests, "def f(x): raise SystemExit") == reward(tests, "def f(x): raise KeyboardInterrupt") == 0.0


def test_plain_cases():
    assert reward(CASES, "def f(x): return sorted(x)") == 1.0
    assert reward(CASES, "def f(x): return tuple(sorted(x))") == 1.0
    assert reward(CASES, "def f(x): return x") == 0.0
    assert reward(CASES, "def f(x): return range(1, len(x) + 1)") == 0.0
    mapping = {"cases": [{"args": ["ab"], "expected": {"a": [1]}}], "entry_point": "f"}
    assert reward(mapping, "f = lambda s: {'a': (1,)}") == 1.0
    numbers = {"cases": [{"args": [1], "expected": {"1": [{"2": 0}]}}], "entry_point": "f"}
    assert reward(numbers, "f = lambda x: {x: [{'2': 0}]}") == reward(numbers, "f = lambda x: {'1': ({2: 0},)}") == 1.0
    assert reward(numbers, "f = lambda x: {x: [{'2': 0}], '1': [{'2': 0}]}") == 0.0
    long = {"cases": [{"args": [list(range(60_000))], "expected": 60_000}], "entry_point": "f"}
    assert reward(long, "f = len") == 1.0


def test_what_is_expected_cannot_be_found():
    tests = {"cases": [{"args": [1], "expected": "a needle"}], "entry_point": "f"}
    search = """
import gc
def f(x):
    for thing in gc.get_objects():
        for text in thing if type(thing) in (list, tuple) else thing.values() if type(thing) is dict else ():
            if type(text) is str and text[1:] == " needle": return text
"""
    assert reward(tests, search) == 0.0
    assert reward(tests, search + "\nknown = ['a needle']") == 1.0


def test_whole_programs():
    assert reward(STDIO, "print(sum(map(int, input().split())), end='  \\n\\n')") == 1.0
    assert reward(STDIO, "print(3)") == 0.0
    assert reward(STDIO, "print(sum(map(int, input().split()))); raise SystemExit(1)") == 0.0
    assert reward(STDIO, "if __name__ == '__main__':\n    print(sum(map(int, open(0).read().split())))") == 1.0
    assert reward(STDIO, "import time; time.sleep(60)") == 0.0
    assert reward(STDIO, "while True: print(1)") == 0.0


@pytest.mark.parametrize(
    "tests",
    [
        "", "no JSON", "[]", "{}", '{"stdio": []}', '{"stdio": [{"input": ""}]}',
        '{"stdio": [{"input": 1, "output": ""}]}',
        '{"cases": [1], "entry_point": "f"}', '{"cases": [{"args": 1, "expected": 1}], "entry_point": "f"}',
        '{"cases": [{"args": [], "expected": 1}]}', '{"prompt": "", "test": ""}',
        '{"prompt": "", "test": "", "entry_point": "no name"}',
    ],
)  # fmt: skip
def test_what_is_no_reference_is_unscorable(tests):
    assert math.isnan(code_reward(Sample("", WHOLE, tests, kind="code"), SETTINGS))


@pytest.mark.parametrize(
    ("test", "error"),
    [
        ("def check(candidate): pass", ValueError),
        ("def check(candidate): missing", NameError),
        ("def check(candidate): candidate(object())", ValueError),
        ("def check(candidate):\n    candidate(1)\n    candidate(print)", ValueError),
        ("check = 1", TypeError),
        ("no check", SyntaxError),
        ("x = 1", KeyError),
    ],
)
def test_broken_tests_are_not_the_candidate_s_fault(test, error):
    with pytest.raises(error):
        reward(PROBLEM | {"test": test}, WHOLE)


def test_the_scorer_runs_programs_in_its_workers(monkeypatch):
    answer = json.dumps(PROBLEM)
    broken = json.dumps(PROBLEM | {"test": "x = 1"})
    samples = [
        Sample("", completion, tests, kind="code")
        for completion, tests in (
            (WHOLE, answer), ("    while True: pass", answer), (WHOLE, broken), ("", answer), (WHOLE, "")
        )
    ]  # fmt: skip
    settled = triage(samples[0], SETTINGS)
    assert isinstance(settled, Judgement) and settled.timeout_s > SETTINGS.timeout_s
    with Scorer({"accuracy": 1.0}, SETTINGS) as scorer:
        scores = scorer.score(samples)
    values = scores.parts["accuracy"]
    assert values[:2] == [1.0, 0.0] and values[3] == 0.0
    assert math.isnan(values[2]) and math.isnan(values[4])
    assert (scores.timeouts, scores.crashes) == (0, 1)
    monkeypatch.setattr(sandbox, "lacks", lambda kind, memory_mb: "nothing works")
    sandbox.choose.cache_clear()
    with pytest.raises(sandbox.SandboxError, match="nothing works"), Scorer({"accuracy": 1.0}, SETTINGS) as scorer:
        scorer.score(samples)
    sandbox.choose.cache_clear()


def test_a_value_that_makes_the_tests_explode_is_wrong():
    tests = {
        "pow": "assert 2 ** candidate(3) == 8",
        "sum": "assert sum(range(candidate(3))) == 3",
        "memory": "assert [0] * candidate(3) == [0]",
        "caught": "try: [0] * candidate(3)\n    except MemoryError: pass\n    assert 2 ** candidate(3) == 8",
        "right": "assert candidate(3) == 10**12",
        "own": "x = [0] * 10**12; assert candidate(3)",
    }
    samples = [
        Sample("", "f = lambda x: 10**12", json.dumps(SQUARE | {"test": f"def check(candidate):\n    {test}"}), "code")
        for test in tests.values()
    ]
    with Scorer({"accuracy": 1.0}, ScoringConfig(timeout_s=0.5, workers=2)) as scorer:
        scores = scorer.score(samples)
        assert scorer.score(samples[4:5]).parts["accuracy"] == [1.0]
    values = scores.parts["accuracy"]
    assert values[:5] == [0.0, 0.0, 0.0, 0.0, 1.0] and math.isnan(values[5])
    assert (scores.timeouts, scores.crashes) == (0, 1)


def test_reading_humaneval(tmp_path):
    row = PROBLEM | {"task_id": "HumanEval/7", "canonical_solution": "    return 1"}
    plain, zipped = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_text(json.dumps(row) + "\n\n")
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    (problem,) = load_humaneval(plain)
    assert [problem] == load_humaneval(zipped)
    assert (problem.id, problem.kind) == ("HumanEval/7", "code")
    assert PROMPT.strip() in problem.question and json.loads(problem.answer) == PROBLEM
    for change, expected in (
        ({"test": " "}, "'test' must be a string that is not blank"),
        ({"entry_point": "a b"}, "'entry_point' must be the name of a function, got 'a b'"),
    ):
        plain.write_text(json.dumps(row | change))
        with pytest.raises(DataError, match=f"a.jsonl, line 1: {expected}"):
            load_humaneval(plain)
    for content, expected in (
        (b"not gzipped", "cannot read data file"),
        (zipped.read_bytes()[:-9], "cannot read data file"),
        (gzip.compress(b""), "holds nothing"),
    ):
        zipped.write_bytes(content)
        with pytest.raises(DataError, match=expected):
            load_humaneval(zipped)

"""Programs as answers: finding the code, the forms of tests, and whose fault is what."""

import json
import threading
from concurrent.futures import CancelledError

import pytest

from r1kernels.rewards import sandbox, sandbox_child
from r1kernels.rewards.code import defines, find_code, judge, read_tests, sources
from r1kernels.rewards.sandbox import SandboxError


@pytest.fixture(scope="module", autouse=True)
def works():
    try:
        sandbox.check(256)
    except SandboxError as error:
        pytest.skip(str(error))


def reward(tests, completion, prompt="", seconds=20.0):
    reference = tests if isinstance(tests, str) else json.dumps(tests)
    return judge(prompt, completion, reference, timeout_s=seconds, memory_mb=256)


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


def found(completion, entry_point=""):
    return find_code("", completion, entry_point)


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("x = 1", ("x = 1", False)),
        ("    return 1", ("    return 1", False)),
        ("<think>x = 1</think>x = 2", ("x = 2", False)),
        ("<think>x = 1</think><answer>x = 2</answer>", ("x = 2", False)),
        ("Here:\n```python\nx = 1\n```\nand\n```py\nx = 2\n```\nDone.", ("x = 2\n", True)),
        ("```python\nx = 1\n```\nprints\n```\n1\n```", ("x = 1\n", True)),
        ("```\nx = 1\n```\n```bash\nls\n```", ("x = 1\n", True)),
        ("```bash\nls\n```", ("", True)),
        ("```Python\r\nx = 1\r\n```", ("x = 1\n", True)),
        ('```python title="a"\nx = 1\n```', ("x = 1\n", True)),
        ("<answer>```\nx = 1\n```</answer>```\nx = 2\n```", ("x = 1\n", True)),
        ("<answer>\n```\nx = 1\n```\n</answer>```\nx = 2\n```", ("x = 1\n", True)),
        ("<think>x = 1", ("", False)),
        ("", ("", False)),
        ("x" * 250_000, ("", False)),
        # CommonMark: indentation, longer fences, tildes, info strings, containers
        ("   ```python\n   x = 1\n   ```", ("x = 1\n", True)),
        ("  ```python\nif x:\n    y\n ```", ("if x:\n  y\n", True)),
        ("````python\n```\nx = 1\n```\n````", ("```\nx = 1\n```\n", True)),
        ("~~~python\n```\n~~~", ("```\n", True)),
        ("```python\nx = 1\n~~~\n```", ("x = 1\n~~~\n", True)),
        ("```python\nx = 1\n```not a fence\n```", ("x = 1\n```not a fence\n", True)),
        ("```python\n'''\n```text\n'''\n```", ("'''\n```text\n'''\n", True)),
        ("```python\ndef f():\n    '''\n    ```\n    '''\n```", ("def f():\n    '''\n    ```\n    '''\n", True)),
        ("1. So:\n\n   ```python\n   if x:\n       y\n   ```\n2. Done.", ("if x:\n    y\n", True)),
        ("- a\n  - b\n\n    ```python\n    x = 1\n    ```", ("x = 1\n", True)),
        ("- ```python\n  x = 1\n  ```", ("x = 1\n", True)),
        ("10. a\n\n    ```\n    x = 1\n    ```", ("x = 1\n", True)),
        ("> ```python\n> x = 1\n> ```", ("x = 1\n", True)),
        ("```python\nx = 1", ("x = 1", True)),
        ("## Code\n```python\nx = 1\n```", ("x = 1\n", True)),
    ],
)
def test_finding_the_code(completion, code):
    assert found(completion) == code


DEFINITIONS = ("def f(x):\n    return 1\n", "async def f(x): 1\n", "class f:\n    pass\n", "f = len\n", "f: int = 1\n")


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("demonstration", ["print(f(3))\n", "assert f(3) == 1\n", "f(1) == f (2)\n", "def g(): f\n"])
def test_the_block_that_defines_the_entry_point_is_the_answer(definition, demonstration):
    block = f"```python\n{definition}```\n"
    for text in (block + f"Use:\n```python\n{demonstration}\n```", f"```\n{demonstration}\n```\n{block}"):
        assert found(text, "f") == (definition, True)
    assert found(f"```python\ndef f(): 1\n```\nBetter:\n{block}", "f.g") == (definition, True)
    assert not defines(demonstration, "f") and not defines("ff = 1\ndef ff(): f=1", "f")


def test_finding_the_code_is_linear():
    for text in ("```" + "a" * 190_000 + "`", "```\n" * 40_000, "`" * 190_000, "- " * 90_000, "> a\n" * 40_000):
        found(text, "f")
    assert found("<answer>" * 200_000, "f") == found("```\n" * 100_000) == ("", False)


def test_bodies_and_whole_functions():
    prompt = PROBLEM["prompt"]
    assert sources(PROBLEM, WHOLE, True) == ["", prompt, WHOLE]
    assert sources(PROBLEM, "area = lambda r: r", False) == ["", prompt, "area = lambda r: r"]
    assert sources(PROBLEM, "    return 1\n# so\ndef f():\n    pass", False) == [prompt + "    return 1\n# so\n"]
    assert sources(PROBLEM, "    return 1\nx = 2", True) == [prompt + "    return 1\nx = 2"]
    assert sources(PROBLEM, "    def area(r): pass", True) == [prompt + "    def area(r): pass"]
    assert sources(CASES, WHOLE, True) == ["", "", WHOLE]


def test_a_prompt_may_be_a_signature():
    for prompt in ("def f(x):", "import math\ndef f(x: int) -> int:\n", "def f(x):\n    "):
        tests = {"prompt": prompt, "entry_point": "f", "test": "def check(candidate): assert candidate(3) == 6"}
        assert reward(tests, "def f(x):\n    return 2 * x") == 1.0
        assert reward(tests, "```python\ndef f(x): return 3 * x\n```") == 0.0


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
        assert reward(tests, failure, seconds=0.5) == 0.0, failure
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
    for end in ("StopIteration", "type('Mine', (StopIteration,), {})", "GeneratorExit"):
        assert reward(tests, f"def f(x): raise {end}") == 0.0, end


@pytest.mark.parametrize(
    ("test", "good", "bad"),
    [
        ("l = [3, 1, 2]; candidate(l); assert l == [1, 2, 3]", "x.sort()", "sorted(x)"),
        ("l = [3, 1]; assert candidate(l) is None and l == [1]", "x.remove(3)", "x.remove(1)"),
        ("l = [1]; candidate(x=l); assert l == [1, 2]", "x.append(2)", "x = x + [2]"),
        ("s = {1}; candidate(s); assert s == {2}", "x.clear(); x.add(2)", "x = {2}"),
        ("g = [[1, 2], [3, 4]]; candidate(g); assert g == [[3, 1], [4, 2]]",
         "x[:] = map(list, zip(*x[::-1]))", "x[:] = map(list, zip(*x))"),
        ("l = list(range(150_000)); candidate(l); assert l[0] == 149_999", "x.reverse()", "pass"),
        ("l = [2, 1]; assert candidate(l) == sorted(l)", "return sorted(x)", "x.clear(); return []"),
        ("l = [2, 1]; assert candidate(l) == [] and l == [2, 1]", "x.append(print); return []", "return None"),
        ("assert list(candidate(3)) == [0, 1, 2]", "yield from range(x)", "yield 0"),
        ("assert list(candidate(3)) == [0, 1, 2]", "return range(x)", "return range(1)"),
        ("assert candidate(3) == [0, 1, 2]", "return list(range(x))", "return range(x)"),
        ("assert candidate(3) == [0, 1, 2]", "return list(range(x))", "yield from range(x)"),
        ("assert candidate(3) == [0, 1, 2]", "return list(range(x))", "return map(int, range(x))"),
        ("assert candidate(3) == range(3)", "return range(x)", "return list(range(x))"),
        ("assert len(candidate(3)) == 3", "return range(x)", "yield from range(x)"),
        ("assert sorted(candidate({1: 3, 2: 4})) == [3, 4]", "return x.values()", "return x.keys()"),
        ("assert list(candidate({1: 3})) == [(1, 3)]", "return x.items()", "return x"),
        ("assert list(candidate({1: 3})) == [1]", "return x.keys()", "return x.values()"),
        ("assert [list(a) for a in candidate(2)] == [[0, 2]]", "return [zip([0], [2])][0]", "return zip([0])"),
        ("g = candidate(5); assert [next(g), next(g)] == [5, 6]", "yield x; yield x + 1", "while True: yield x"),
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
    assert reward(numbers, "f = lambda x: {x: [{'2': 1}]}") == 0.0
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
    assert reward(STDIO, "import time; time.sleep(60)", seconds=0.3) == 0.0
    assert reward(STDIO, "while True: print(1)") == 0.0


@pytest.mark.parametrize(
    "tests",
    [
        "", "no JSON", "[]", "5", "{}", "[" * 100_000, '{"stdio": []}', '{"stdio": [{"input": ""}]}',
        '{"stdio": [{"input": 1, "output": ""}]}', '{"stdio": [{"input": "", "output": 1}]}',
        '{"cases": [1], "entry_point": "f"}', '{"cases": [{"args": 1, "expected": 1}], "entry_point": "f"}',
        '{"cases": [{"args": [], "expected": 1}]}', '{"cases": [{"args": []}], "entry_point": "f"}',
        '{"prompt": "", "test": ""}', '{"prompt": "", "test": "", "entry_point": "no name"}',
        '{"prompt": "", "test": "", "entry_point": "a.b.c"}', '{"prompt": "", "test": "", "entry_point": ""}',
        '{"stdio": [{"input": "", "output": ""}], "tolerance": "1"}',
        '{"stdio": [{"input": "", "output": ""}], "tolerance": NaN}',
        '{"stdio": [{"input": "", "output": ""}], "tolerance": 1}',
        '{"stdio": [{"input": "", "output": ""}], "checker": 1}',
    ],
    ids=lambda text: text[:60],
)  # fmt: skip
def test_other_forms_of_tests_are_unscorable(tests):
    assert judge("", WHOLE, tests) is None


@pytest.mark.parametrize(
    ("test", "named"),
    [
        ("def check(candidate): pass", "never call"),
        ("def check(candidate): missing", "NameError"),
        ("def check(candidate): candidate(object())", "TypeError"),
        ("def check(candidate):\n    candidate(1)\n    candidate(print)", "TypeError"),
        ("def check(candidate):\n    try: candidate(print)\n    except Exception: pass\n    candidate(1)", "TypeError"),
        ("check = 1", "TypeError"),
        ("no check", "SyntaxError"),
        ("x = 1", "KeyError"),
        ("import no_module\ndef check(candidate): candidate(1)", "ModuleNotFoundError"),
        ("raise SystemExit", "SystemExit"),
        ("import os; os._exit(0)", "ended"),
        ("while True: pass", "time"),
        ("x = [0] * 10**12\ndef check(candidate): candidate(1)", "MemoryError"),
    ],
)
def test_broken_tests_are_not_the_candidate_s_fault(test, named):
    with pytest.raises(ValueError, match=named):
        reward(PROBLEM | {"test": test}, WHOLE, seconds=0.2 if "while" in test else 20)


def test_a_program_that_does_not_raise_as_expected_is_wrong():
    forms = (
        "import pytest\n    with pytest.raises(ValueError): candidate(-1)",
        "import pytest\n    with pytest.raises(ValueError, match='neg'): candidate(-1)",
        "import pytest\n    pytest.raises((ValueError, KeyError), candidate, -1)",
        "import unittest\n    with unittest.TestCase().assertRaises(ValueError): candidate(-1)",
        "try: candidate(-1)\n    except ValueError: return\n    raise AssertionError",
        "try: candidate(-1)\n    except ValueError: pass\n    else: raise SystemExit",
    )
    for form in forms:
        tests = SQUARE | {"test": f"def check(candidate):\n    {form}"}
        assert reward(tests, "def f(x): raise ValueError('negative')") == 1.0, form
        assert reward(tests, "def f(x): return x") == 0.0, form
        assert reward(tests, "def f(x): raise OSError('negative')") == 0.0, form
    tests = SQUARE | {"test": "def check(candidate):\n    assert candidate(candidate(1)) == 1"}
    assert reward(tests, "def f(x):\n    while True: yield 1") == 0.0
    assert reward(tests, "def f(x): return x if x == 1 else 0") == 1.0


def test_tests_run_without_the_environment_and_the_files_of_this_process(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_KEY", "secret")
    (tmp_path / "file").write_text("secret")
    test = f"""
import os, socket
def check(candidate):
    assert candidate(1) == 1
    assert "secret" not in str(os.environ) and not os.path.exists({str(tmp_path)!r})
    secret = {str(tmp_path / "file")!r}
    for attempt in (os.fork, socket.socket, lambda: open(secret), lambda: os.execv("/bin/sh", ["sh"])):
        try:
            attempt()
        except OSError:
            continue
        raise AssertionError
"""
    assert reward(SQUARE | {"test": test}, "def f(x): return x") == 1.0


@pytest.mark.parametrize(
    ("test", "right"),
    [
        ("assert 2 ** candidate(3) == 8", 0.0),
        ("assert sum(range(candidate(3))) == 3", 0.0),
        ("assert [0] * candidate(3) == [0]", 0.0),
        ("try: [0] * candidate(3)\n    except MemoryError: pass\n    assert 2 ** candidate(3) == 8", 0.0),
        ("assert candidate(3) == 10**12", 1.0),
    ],
)
def test_a_value_that_makes_the_tests_explode_is_wrong(test, right):
    tests = SQUARE | {"test": f"def check(candidate):\n    {test}"}
    assert reward(tests, "f = lambda x: 10**12", seconds=20 if right else 0.2) == right


FORGERIES = (
    "def f(x):\n    import os\n    for fd in range(3, 9):\n        for text in (b'passed', b'cx', b'u'):\n"
    "            try: os.write(fd, len(text).to_bytes(8, 'big') + text)\n"
    "            except OSError: pass\n    return 0",
    "class Same(int):\n    __eq__ = __bool__ = lambda *_: True\n    __hash__ = int.__hash__\ndef f(x): return Same(0)",
    "class Same:\n    __eq__ = lambda *_: True\ndef f(x): return Same()",
    "import sys\nsys.modules['__main__'].write = lambda value: b'passed'\ndef f(x): return 0",
    "import sys\nsys.modules['__main__'].write = lambda value: b'{}'\ndef f(x): return 0",
    "import sys\nsys.modules['__main__'].write = lambda value: b'[\"raise\", [[]], 1]'\ndef f(x): return 0",
    "import sys\nsys.modules['__main__'].write = lambda value: b'[' * 100_000\ndef f(x): return 0",
    "import sys\nsys.modules['__main__'].write = lambda value: b'[\"value\", 0, 1]'\ndef f(x): return 0",
    "import sys\nsys.modules['__main__'].send = lambda *_: 1 / 0\ndef f(x): return 0",
    "import sys\ndef f(x): sys.exit(0)",
    "import os\nos._exit(0)\ndef f(x): return x",
    "raise SystemExit",
    "def f(x):\n    print('passed', flush=True)",
)


FORMS = (
    SQUARE | {"test": "def check(candidate):\n    assert candidate(3) == 9 and not candidate(2) != 4"},
    {"cases": [{"args": [3], "expected": 9}], "entry_point": "f"},
    {"cases": [{"args": [3]}], "entry_point": "f", "checker": "def check(args, output): return output == 9"},
    {"stdio": [{"input": "3", "output": "9"}]},
    {"stdio": [{"input": "3"}], "checker": "def check(text, output): return output == '9'"},
)


@pytest.mark.parametrize("number", range(len(FORGERIES)))
def test_a_verdict_cannot_be_forged(number, request):
    full = request.config.getoption("--full", default=False)
    for tests in FORMS if full else (FORMS[0], FORMS[1 + number % 4]):
        assert reward(tests, FORGERIES[number], seconds=0.5) == 0.0


def test_arguments_change_with_a_result_of_none_only():
    tests = SQUARE | {"test": "def check(candidate):\n    l = [2, 1]\n    assert candidate(l) == sorted(l)"}
    for reply in ('["value", [], [[]]]', '["value", null, [[]]]'):
        program = f"import sys\nsys.modules['__main__'].write = lambda value: b'{reply}'\ndef f(x): return 0"
        assert reward(tests, program) == 0.0


def test_methods_of_a_class():
    two_sum = "class Solution:\n    def twoSum(self, nums: List[int], target: int) -> List[int]:\n        {}"
    right = "seen = defaultdict(int)\n        return [nums.index(target - max(nums)), len(nums) - 1]"
    for name in ("Solution.twoSum", "Solution().twoSum"):
        tests = {"cases": [{"args": [[2, 7], 9], "expected": [0, 1]}] * 2, "entry_point": name}
        assert reward(tests, two_sum.format(right)) == reward(tests, f"```python\n{two_sum.format(right)}\n```") == 1.0
        assert reward(tests, two_sum.format("return [1, 0]")) == 0.0
        assert reward(tests, "def twoSum(nums, target): return [0, 1]") == 0.0
        test = "def check(candidate):\n    assert candidate([1, 2], target=3) == [0, 1]"
        tests = {"prompt": "", "entry_point": name, "test": test}
        assert reward(tests, two_sum.format(right)) == 1.0
    state = "class Solution:\n    n = 0\n    def next(self):\n        self.n += 1\n        return self.n"
    assert reward({"cases": [{"args": [], "expected": 1}] * 3, "entry_point": "Solution.next"}, state) == 1.0


def test_exit_and_quit_end_a_program():
    for leave in ("exit()", "quit()", "exit(0)", "import sys\nsys.exit()", "raise SystemExit"):
        assert reward({"stdio": [{"input": "", "output": "a"}]}, f"print('a')\n{leave}\nprint('b')") == 1.0, leave
    for leave in ("exit(1)", "quit('no')", "1 / 0", "import os\nos._exit(0)"):
        assert reward({"stdio": [{"input": "", "output": "a"}]}, f"print('a')\n{leave}") == 0.0, leave


def passes(tests, answer):
    """Whether an answer is right, without a program and a sandbox."""
    try:
        sandbox_child.check_cases(read_tests(json.dumps(tests)), lambda *arguments: answer, None)
    except AssertionError:
        return 0.0
    return 1.0


@pytest.mark.parametrize(
    ("expected", "printed", "right"),
    [
        ("0.5", "0.5000000001", 1.0), ("0.5", "0.5001", 0.0), ("1e6", "1000000.0001", 1.0), ("3", "3.0000000001", 1.0),
        ("3.0", "3", 1.0), ("1000000007", "1000000008", 0.0), ("0", "1e-12", 1.0), ("yes 1.5", "yes  1.5", 1.0),
        ("yes 1.5", "no 1.5", 0.0), ("1.5 2.5", "1.5", 0.0), ("1.5\n2.5", "1.5 2.5", 0.0), ("1.5", "nan", 0.0),
        ("1.5", "1_.5", 0.0), ("10.0", "1_0.0", 0.0), ("1.5", "9" * 4000, 0.0), ("a\nb", "a \nb\n\n", 1.0),
        ("9" * 4000, "9" * 4000, 1.0), ("1e999", "1e999", 1.0), ("1.5", "1e999", 0.0), ("1 2", "1  2", 1.0),
    ],
)  # fmt: skip
def test_a_tolerance_for_printed_numbers(expected, printed, right):
    tests = {"stdio": [{"input": "", "output": expected}]}
    assert passes(tests | {"tolerance": 1e-6}, printed) == right
    assert passes(tests, printed) == (expected == printed or expected == "a\nb")


@pytest.mark.parametrize(
    ("expected", "returned", "right"),
    [
        (0.3, "0.1 + 0.2", 1.0), ([0.3, {"a": 1.0}], "(0.1 + 0.2, {'a': 1})", 1.0), (0.3, "0.31", 0.0),
        (2, "2.0000001", 1.0),
        (10**9, "10**9 + 1", 0.0), (1.0, "10**400", 0.0), (0.3, "'0.3'", 0.0), (1.5, "None", 0.0),
        (1.5, "float('nan')", 0.0),
        ([0.1, 0.2], "[0.1]", 0.0), (1.5, "float('inf')", 0.0),
    ],
)  # fmt: skip
def test_a_tolerance_for_results(expected, returned, right):
    tests = {"cases": [{"args": [], "expected": expected}], "entry_point": "f", "tolerance": 1e-6}
    assert passes(tests, eval(returned)) == right


def test_a_tolerance_of_programs():
    tests = {"cases": [{"args": [], "expected": [0.3]}], "entry_point": "f", "tolerance": 1e-6}
    assert reward(tests, "def f(): return (0.1 + 0.2,)") == 1.0
    assert reward(tests | {"tolerance": 0}, "def f(): return [0.1 + 0.2]") == 0.0
    tests = {"stdio": [{"input": "", "output": "yes  0.5"}], "tolerance": 1e-6}
    assert reward(tests, "print('yes', .5000000001)") == 1.0


def test_a_checker_decides_where_answers_differ():
    checker = "def check(args, output):\n    a, b = output\n    return 1 < a < args[0] and a * b == args[0]"
    graph = {"cases": [{"args": [6]}, {"args": [9]}], "entry_point": "f", "checker": checker}
    for returned in ("[3, x // 3]", "(3, x // 3)"):
        assert reward(graph, f"def f(x): return {returned}") == 1.0
    for returned in ("[2, x // 2]", "None", "[x, 1]", "iter(int, 1)", "1 / 0", "[1, 2, 3]"):
        assert reward(graph, f"def f(x): return {returned}") == 0.0
    checker = "def check(text, output): return sorted(output.strip()) == sorted(text)"
    words = {"stdio": [{"input": "abc"}], "checker": checker}
    assert reward(words, "print(input()[::-1])") == 1.0
    assert reward(words, "print(input()[1:])") == 0.0
    for checker in ("def check(text, output): return [0] * 10**12", "def check(text, output):\n    while True: pass"):
        assert reward(words | {"checker": checker}, "print(1)", seconds=0.5) == 0.0
    for checker in ("no checker", "x = 1", "import no_module", "while True: pass"):
        with pytest.raises(ValueError, match=r"^the tests of a program"):
            reward(words | {"checker": checker}, "print(1)", seconds=0.2)
    emptied = graph | {"checker": "def check(args, output): return args == []"}
    assert reward(emptied, "def f(x): return None") == 0.0
    kept = {"cases": [{"args": [[1]]}], "entry_point": "f", "checker": "def check(args, output): return args == [[]]"}
    assert reward(kept, "def f(x): x.clear()") == 0.0


def test_judging_can_be_stopped():
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(CancelledError):
        judge("", "def f(x): return sorted(x)", json.dumps(CASES), stopped=stopped)


MET = [
    # the block that defines the entry point is judged, not a later demonstration
    ('```python\ndef f(x):\n    return 2*x\n```\nExample usage:\n```python\nprint(f(3))\n```',
     {'cases': [{'args': [3], 'expected': 6}], 'entry_point': 'f'}, 1.0),
    # a fence indented four spaces inside a docstring closes nothing (CommonMark)
    ('```python\ndef f(x):\n    """Doubles.\n\n    ```\n    f(3)\n    ```\n    """\n    return 2*x\n```',
     {'cases': [{'args': [3], 'expected': 6}], 'entry_point': 'f'}, 1.0),
    # exit() exists
    ("if int(input()) == 0:\n    print('NO')\n    exit()\nprint('YES')",
     {'stdio': [{'input': '0\n', 'output': 'NO\n'}]}, 1.0),
    # a relative tolerance can be given
    ('print(1/3)',
     {'stdio': [{'input': '', 'output': '0.333333333333\n'}], 'tolerance': 1e-09}, 1.0),
    # LeetCode's form
    ('class Solution:\n    def twoSum(self, nums, t):\n        return [0, 1]',
     {'cases': [{'args': [[1, 2], 3], 'expected': [0, 1]}], 'entry_point': 'Solution.twoSum'}, 1.0),
    # a wrong program stays wrong
    ('```python\ndef f(x):\n    return 3*x\n```',
     {'cases': [{'args': [3], 'expected': 6}], 'entry_point': 'f'}, 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "tests", "right"), MET, ids=range(len(MET)))
def test_cases_met_in_practice(completion, tests, right):
    assert reward(tests, completion) == right

"""HumanEval: every canonical solution passes, no attack does, and none leaves a trace.

A sample of the problems is tried, with `--full` all of them.
"""

import gzip
import json
import os
import random
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from r1kernels.rewards import sandbox
from r1kernels.rewards.code import judge

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rows():
    named = os.environ.get("R1KERNELS_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    path = folder / "HumanEval.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no {path.name} in {folder}; R1KERNELS_DATA names a directory that holds it")
    try:
        sandbox.check()
    except sandbox.SandboxError as error:
        pytest.skip(str(error))
    with gzip.open(path) as lines:
        return [json.loads(line) for line in lines]


def score(rows, completions, timeout_s=5.0, memory_mb=512):
    """The verdicts; none may be missing: an attack is wrong, not lost."""

    def verdict(row, completion):
        tests = json.dumps({key: row[key] for key in ("prompt", "test", "entry_point")})
        return judge("", completion, tests, timeout_s=timeout_s, memory_mb=memory_mb)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(verdict, rows, completions, timeout=3000))


def body(row):
    return row["canonical_solution"] + "\nThat is all.\n"


def function(row):
    return f"<think>so</think> <answer>As follows:\n```python\n{row['prompt']}{row['canonical_solution']}```</answer>"


@pytest.mark.parametrize("form", [function, body])
def test_all_canonical_solutions_pass(rows, form, request):
    assert len(rows) == 164
    if not request.config.getoption("--full", default=False):
        rows = rows[::6] if form is function else rows[3::20]
    assert score(rows, map(form, rows), timeout_s=30) == [1.0] * len(rows)


ALWAYS_EQUAL = """
class Same:
    def __eq__(self, other): return True
    __ne__ = __lt__ = __gt__ = __le__ = __ge__ = __bool__ = __contains__ = lambda self, *other: True
    def __getattr__(self, name): return self
    __call__ = __getitem__ = __abs__ = __sub__ = __rsub__ = __add__ = __round__ = lambda self, *other: self
    def __iter__(self): return iter([self])
    def __len__(self): return 1
    def __hash__(self): return 1
    def __float__(self): return 0.0
def {name}(*arguments): return Same()
"""

# The right solution, which answers if one of the attacks succeeds: the only way to fail is that all of them do.
AROUND = """
{prompt}{solution}
_right = {name}
def {name}(*arguments):
    import os, socket
    refused = 0
    for attack in {attacks}:
        try:
            exec(attack, {{"os": os, "socket": socket}})
        except (OSError, MemoryError):
            refused += 1
    assert refused {passes} {count}
    return _right(*arguments)
"""


def around(row, attacks, passes="<"):
    names = {"prompt": row["prompt"], "solution": row["canonical_solution"], "name": row["entry_point"]}
    return AROUND.format(attacks=attacks, passes=passes, count=len(attacks), **names)


def test_no_attack_passes_and_none_leaves_a_trace(rows, request):
    if not request.config.getoption("--full", default=False):
        rows = rows[5::30]
    mark = f"r1kernels-{random.SystemRandom().randrange(10**12)}"
    memory_mb = random.SystemRandom().randrange(256, 320)
    places = [Path(folder, mark) for folder in ("/", "/tmp", "/var/tmp", "/dev/shm", tempfile.gettempdir(), ROOT)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        attacks = [
            "os.fork()",
            "bytearray(10 * 2**30)[::4096]",
            f"socket.create_connection({server.getsockname()!r})",
            *(f"open({str(place)!r}, 'w')" for place in places if not str(place).startswith("/tmp/")),
        ]
        # Every attack was tried, and refused; a few times is enough for the bomb itself.
        few, same = rows[::20], [ALWAYS_EQUAL.replace("{name}", row["entry_point"]) for row in rows]
        tried = [around(row, attacks, passes="==") for row in few]
        bombs = [around(row, ["while True: os.fork()"]) for row in few]
        wrong = [around(row, attacks) for row in rows] + same + bombs
        values = score(rows * 2 + few * 2, wrong + tried, memory_mb=memory_mb)
        assert values == [0.0] * len(wrong) + [1.0] * len(tried)
        with pytest.raises(TimeoutError):
            server.accept()
    loops = [f"def {row['entry_point']}(*arguments):\n    while True: pass" for row in rows]
    assert score(rows, loops, memory_mb=memory_mb, timeout_s=0.1) == [0.0] * len(rows)
    assert not [place for place in places if place.exists()]
    deadline = time.monotonic() + 600
    while (left := processes(memory_mb)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def processes(memory_mb):
    """The command lines of the sandboxes that have so much memory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if f'"memory_bytes": {memory_mb * 2**20}'.encode() in command:
                found.append(command)
    return found

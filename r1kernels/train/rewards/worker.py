"""The worker process: reads one judgement a line from stdin, writes one verdict a line.

Run as a script with the parent's process id, the memory limit in bytes and the judges to load first. It never imports
r1kernels itself (and so not torch): it loads the package around it under a name of its own.
"""

import os
import sys

# A script's directory is searched first, and would offer this package's modules under their bare names.
sys.path[:] = [path for path in sys.path if os.path.realpath(path) != os.path.dirname(os.path.realpath(__file__))]

import importlib  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import resource  # noqa: E402
import signal  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

PACKAGE = "r1kernels_rewards"

# Address space a judgement must be able to use.
ROOM = 64 * 2**20


def main() -> None:
    parent, memory = int(sys.argv[1]), int(sys.argv[2])
    # Ctrl-C is the parent's to handle; it ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    # Verdicts go to a private copy of stdout, so that nothing a library prints can pass for one.
    verdicts = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
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
        verdicts.write(json.dumps({"failed": f"{type(error).__name__}: {error}"}) + "\n")
        return
    verdicts.write(json.dumps({"ready": True}) + "\n")
    for line in os.fdopen(os.dup(0), "r", encoding="utf-8", errors="surrogatepass", newline="\n"):
        name, arguments, timeout = json.loads(line)
        _limit_cpu(timeout)
        try:
            if name not in judges:
                judges[name] = _load(name)
            value = float(judges[name](*arguments))
        except MemoryError:
            # The heap is in an unknown state: let a fresh process take the next one.
            verdicts.write(json.dumps({"crash": True, "leaving": True}) + "\n")
            return
        except Exception:
            verdicts.write(json.dumps({"crash": True}) + "\n")
            continue
        used, peak = _address_space()
        # Libraries turn a MemoryError of their own into "not equal". Such a verdict is worth nothing.
        verdict = {"value": value} if peak < 0.9 * memory else {"crash": True}
        leaving = "crash" in verdict or used > (idle + memory) / 2
        verdicts.write(json.dumps(verdict | {"leaving": leaving}) + "\n")
        if leaving:
            return


def _load_package() -> None:
    here = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(PACKAGE, here / "__init__.py", submodule_search_locations=[str(here)])
    sys.modules[PACKAGE] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)


def _load(name: str) -> Callable[..., float]:
    """The judge "module:function" of this package."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(f"{PACKAGE}.{module}"), function)


def _leave_with(parent: int) -> None:
    """Ends the process when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def _limit_cpu(timeout: float) -> None:
    """Lets the kernel end a judgement that outlives its parent in C code, where no thread gets a turn."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = math.ceil(used.ru_utime + used.ru_stime + timeout) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))


def _address_space() -> tuple[int, int]:
    """Bytes of address space in use now, and at most so far."""
    with open("/proc/self/status") as status:
        sizes = {key: value for key, _, value in (line.partition(":") for line in status)}
    return tuple(int(sizes[key].split()[0]) * 1024 for key in ("VmSize", "VmPeak"))


if __name__ == "__main__":
    main()

"""linear_grpo_loss while another process computes on the same cores, as data loaders and verifiers do."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

from r1kernels.bench.cases import policy_head
from r1kernels.bench.clock import Run
from r1kernels.bench.tasks import Setting, Task

NAME = "linear_grpo_loss_busy"
# A stopped process cannot see that its parent has died: Linux kills it then (prctl 1 is PR_SET_PDEATHSIG).
PROGRAM = """
import ctypes, os, signal, sys
if sys.platform == "linux" and ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0) != 0:
    sys.exit("prctl failed")
os.nice(19)
print("ready", flush=True)
while os.getppid() == int(sys.argv[1]):
    pass
"""


class BusyProcess:
    """Computes without a pause at the lowest priority while a call made by `beside` runs. It starts with the first of
    them."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        if self.child is None:
            # It gets a new session: Linux first divides processors between sessions, and only then looks at priorities.
            self.child = subprocess.Popen([sys.executable, "-c", PROGRAM, str(os.getpid())], start_new_session=True,
                                          stdout=subprocess.PIPE)
            if not self.child.stdout.readline():
                raise RuntimeError(f"the busy process ended at once, with status {self.child.wait()}")
        return self.child

    def beside(self, run: Run) -> Run:
        def both() -> object:
            child = self.start()
            os.kill(child.pid, signal.SIGCONT)
            try:
                return run()
            finally:
                os.kill(child.pid, signal.SIGSTOP)

        return both

    def __enter__(self) -> BusyProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.wait()
            self.child.stdout.close()


def case(setting: Setting) -> Iterator[Task]:
    """The same task without the other process is in the series over the number of tokens. On a GPU there is nothing to
    see: the other process does not compute there."""
    if setting.device.type == "cuda":
        return
    tokens, width, vocab = setting.pick((64, 128, 2048), (1024, 512, 32_768), (1024, 512, 32_768))
    plain = policy_head.task(setting, tokens, width, vocab, None)
    with BusyProcess() as busy:
        yield dataclasses.replace(plain, case=NAME, peers=(), ceilings={}, around=busy.beside,
                                  variant="another process is busy")


CASES = {NAME: case}

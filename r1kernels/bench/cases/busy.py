"""linear_grpo_loss while another process computes on the same cores, as data loaders and verifiers do."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from r1kernels.bench.cases import policy_head
from r1kernels.bench.clock import Run
from r1kernels.bench.tasks import Setting, Task

NAME = "linear_grpo_loss_busy"
PROGRAM = "import os\nos.nice(19)\nparent = os.getppid()\nwhile os.getppid() == parent: pass"


class BusyProcess:
    """Computes without a pause at the lowest priority while a call made by `beside` runs. It starts with the first of
    them."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        if self.child is None:
            # It gets a new session: Linux first divides processors between sessions, and only then looks at priorities.
            self.child = subprocess.Popen([sys.executable, "-c", PROGRAM], start_new_session=True)
            time.sleep(0.5)
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

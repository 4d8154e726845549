"""Ctrl-C and SIGTERM: the work stops where it can continue, also where a shell has ignored SIGINT."""

import os
import signal
import subprocess
import sys

import pytest

from r1kernels.train.errors import Interrupt, Interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_signal_is_raised_at_the_next_check(number, before):
    outer = signal.signal(number, before)
    try:
        with Interrupt() as interrupt:
            interrupt.check()
            os.kill(os.getpid(), number)
            with pytest.raises(Interrupted, match=number.name):
                interrupt.check()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, outer)


SCRIPT = """
import time
from r1kernels.train.errors import Interrupted
from r1kernels.train.errors import Interrupt
with Interrupt() as interrupt:
    print("ready", flush=True)
    try:
        while True:
            interrupt.check()
            time.sleep(0.01)
    except Interrupted as signal:
        print("stopped by", signal)
"""


def test_a_background_job_whose_sigint_is_ignored_stops():
    """As `command &` in a script starts it."""
    script = f"{sys.executable} -c '{SCRIPT}' & echo $!; wait"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as shell:
        pid = int(shell.stdout.readline())
        assert shell.stdout.readline() == "ready\n"
        os.kill(pid, signal.SIGINT)
        assert "stopped by SIGINT" in shell.communicate()[0]

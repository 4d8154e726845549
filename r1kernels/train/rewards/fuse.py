"""A fuse: ends a worker that works on with a stranger's value, in C code too; `worker` then says 0.0 for it.

The signal's default action is all that stops `sum(range(10**12))`, so it takes the process: outside a worker, nothing
is lit.
"""

import signal

in_worker = False


def light(seconds: float) -> None:
    if in_worker:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))


def put_out() -> None:
    if in_worker:
        signal.setitimer(signal.ITIMER_REAL, 0)

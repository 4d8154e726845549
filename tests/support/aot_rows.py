"""Compiles kernels ahead of time and writes their rows: `python aot_rows.py OUT full` all of them, with `sample` a few.

The sample has every 59th compilation of the package, which are of every kind of device, and the faulty kernels of two
kinds of devices.
"""

import json
import sys
from pathlib import Path

from r1kernels.triton import aot

STEP = 59  # no multiple of the number of architectures, whose variants lie side by side
FAULTY = ("sm_90", "gfx942")


def main(out: str, how: str) -> None:
    tasks = list(aot.tasks_of(aot.kernel_modules()))
    faulty = list(aot.tasks_of(["faulty_kernels"]))
    if how == "sample":
        tasks, faulty = tasks[::STEP], [task for task in faulty if task.arch in FAULTY]
    Path(out).write_text(json.dumps({"rows": aot.rows_of_tasks(tasks + faulty), "tasks": len(tasks)}))


if __name__ == "__main__":
    main(*sys.argv[1:])

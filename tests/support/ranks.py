"""Processes of one machine that form a process group. A script of theirs ends with `fork_ranks(results_of, ...)`.

One process imports torch, and the ranks are forks of it, because the import takes longer than all that they compute.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import torch

SECONDS = 600
COLLECTIVES = {"all_gather": 1, "all_reduce": 0, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}


class Traffic:
    """Counts what a rank gives to collectives: (name, bytes) of each."""

    def __enter__(self) -> list[tuple[str, int]]:
        sent: list[tuple[str, int]] = []
        self.saved = {name: getattr(torch.distributed, name) for name in COLLECTIVES}

        def counting(name: str) -> Callable[..., Any]:
            def run(*args: Any, **keywords: Any) -> Any:
                value = args[COLLECTIVES[name]]
                sent.append((name, value.numel() * value.element_size()))
                return self.saved[name](*args, **keywords)

            return run

        for name in self.saved:
            setattr(torch.distributed, name, counting(name))
        return sent

    def __exit__(self, *_: Any) -> None:
        for name, function in self.saved.items():
            setattr(torch.distributed, name, function)


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _rank(rank: int, world: int, directory: Path, results_of: Callable[[int], dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    torch.save(results_of(rank), directory / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def fork_ranks(results_of: Callable[[int], dict[str, Any]], world: int, directory: Path) -> None:
    """Saves the results of each rank as directory/RANK.pt. A rank that fails, and the time limit, end the others."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_rank, args=(rank, world, directory, results_of)) for rank in range(world)]
    for process in processes:
        process.start()
    end = time.monotonic() + SECONDS
    while running := [process for process in processes if process.exitcode is None]:
        connection.wait([process.sentinel for process in running], max(end - time.monotonic(), 0))
        if time.monotonic() >= end or any(process.exitcode for process in processes):
            break
    for process in processes:
        process.kill()
        process.join()
    codes = [process.exitcode for process in processes]
    if any(codes):
        sys.exit(f"ranks ended with {codes}")


def run_ranks(script: Any, directory: Path) -> list[dict[str, Any]]:
    """The results of all ranks of a script (its module). Skips the test where there is no gloo."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    paths = os.pathsep.join(str(path) for path in (Path(__file__).parents[2], Path(__file__).parent))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": paths}
    completed = subprocess.run(
        [sys.executable, "-W", "error", script.__file__, str(directory)], env=environment, capture_output=True,
        text=True, timeout=2 * SECONDS,
    )
    if completed.returncode:
        raise RuntimeError((completed.stdout + completed.stderr)[-6000:])
    return [torch.load(path) for path in sorted(directory.glob("*.pt"))]

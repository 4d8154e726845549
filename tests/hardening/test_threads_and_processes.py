"""Kernels in eight threads at once, and in forked and spawned processes."""

import json
import os
import subprocess
import sys
import threading
from typing import Any

import process_cases
import pytest
import torch
from backends import SUPPORT, host_code

from r1kernels import _memory, linear_cross_entropy, release_workspace

pytestmark = host_code
MIB = 1 << 20


def answer(program: str) -> dict[str, Any]:
    paths = os.pathsep.join(filter(None, sys.path))
    completed = subprocess.run(
        [sys.executable, str(SUPPORT / "process_cases.py"), program], capture_output=True, text=True, timeout=900,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    return json.loads(completed.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("shared", [True, False])
def test_eight_threads_compute_the_bits_of_one(shared: bool) -> None:
    """On the same tensors, or each on its own."""
    given = [process_cases.leaves(9, 300, 24, seed=0 if shared else k) for k in range(1 if shared else 8)]
    alone = [process_cases.fingerprint(each) for each in given]
    found: list[tuple[int, str]] = []
    barrier = threading.Barrier(8)

    def work(k: int) -> None:
        torch.set_num_threads(1)
        barrier.wait()
        for _ in range(3):
            found.append((k, process_cases.fingerprint(given[k % len(given)])))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 24
    assert not [k for k, value in found if value != alone[k % len(given)]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_is_forked_after_use_computes_the_same_bits() -> None:
    assert answer("fork") == {"same": [True, True], "codes": [0, 0]}


@pytest.mark.slow(reason="imports everything again")
def test_a_spawned_process_computes_the_same_bits() -> None:
    assert answer("spawn") == {"same": [True], "codes": [0]}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_while_threads_run_kernels_does_not_hang() -> None:
    codes = answer("fork_while_busy")["codes"]
    assert len(codes) == 30 and not any(codes)


@pytest.mark.skipif(not _memory.AVAILABLE, reason="needs private anonymous mappings")
def test_kept_memory_does_not_grow_with_the_number_of_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size of a large buffer is another one, and what is kept of them stays within the limit."""
    release_workspace()
    monkeypatch.setattr(_memory, "KEPT_BYTES", 24 * MIB)
    hidden, ids = torch.randn(4, 8).requires_grad_(), torch.arange(4)
    for vocab in range(40_000, 240_000, 8_000):
        weight = torch.randn(vocab, 8).requires_grad_()
        linear_cross_entropy(hidden, weight, ids).backward()
        del weight
        assert sum(map(len, _memory._kept)) <= 24 * MIB
    release_workspace()

"""Peak memory of distillation as the process sees it, each case in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from backends import host_code

MIB = 1 << 20
# Pages it keeps beside what is in use: holes of freed blocks too small for the next. Of one case they were from 9 to 30
# MiB, beside other processes; a second tensor of full width would be 150 more.
ALLOCATOR = 40 * MIB

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"), host_code,
    pytest.mark.slow(reason="starts a process for each case"),
]

CHILD = """
import ctypes, gc, json, re, sys
from pathlib import Path
import torch
import r1kernels
from r1kernels import distillation_loss, linear_distillation_loss

o = json.loads(sys.argv[1])
torch.set_num_threads(1)
n, vocab, k, width = o["tokens"], o["vocab"], o["k"], o["width"]

def status(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024

def normal(rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).requires_grad_()

def topk(n):
    ids = torch.arange(k).expand(n, k).contiguous()
    return {"teacher_token_ids": ids, "teacher_logprobs": torch.full((n, k), -8.0)}

def inputs(n):
    if width:
        teacher = topk(n) if k else {"teacher_hidden": torch.ones(n, 8), "teacher_weight": torch.ones(vocab, 8)}
        return (normal(n, width), normal(vocab, width)), teacher | {"chunk_bytes": o["chunk_bytes"]}
    return (normal(n, vocab),), topk(n) if k else {"teacher_logits": torch.ones(n, vocab)}

loss_of = linear_distillation_loss if width else distillation_loss

def measured(function):
    gc.collect()
    r1kernels.release_workspace()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    result = function()
    peak = status("VmHWM") - before
    gc.collect()
    r1kernels.release_workspace()
    ctypes.CDLL(None).malloc_trim(0)
    return result, peak, status("VmRSS") - before

def run(n):
    leaves, teacher = inputs(n)
    result, forward, kept = measured(lambda: loss_of(*leaves, **teacher, divergence="jsd"))
    _, backward, _ = measured(result.loss.backward)
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    return {"forward": forward, "kept": kept, "backward": backward}

run(1000)
print(json.dumps(run(n)))
"""


def peak(tokens: int, vocab: int, k: int = 0, width: int = 0, chunk_bytes: int = 24 * MIB) -> dict[str, int]:
    """Bytes above the inputs at the peak of forward and left after it, and above these at that of backward."""
    options: dict[str, Any] = {"tokens": tokens, "vocab": vocab, "k": k, "width": width, "chunk_bytes": chunk_bytes}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    result = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(options)], capture_output=True, text=True, env=environment,
        cwd=Path(__file__).parents[2], check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def test_a_full_teacher() -> None:
    n, vocab = 1_000_000, 32
    measured = peak(n, vocab)
    assert measured["kept"] <= 24 * n + MIB
    assert measured["forward"] <= 70 * n + ALLOCATOR
    assert measured["backward"] <= 4 * n * vocab + 24 * n + ALLOCATOR


@pytest.mark.few(1)
@pytest.mark.parametrize("k", [1, 64])
def test_a_topk_teacher(k: int) -> None:
    n, vocab = 40_000, 1000
    measured = peak(n, vocab, k)
    assert measured["kept"] <= 17 * (k + 1) * n + MIB
    assert measured["forward"] <= (75 * (k + 1) + 50) * n + 16 * MIB + ALLOCATOR
    assert measured["backward"] <= 4 * n * vocab + 16 * MIB + ALLOCATOR


@pytest.mark.few(1)
@pytest.mark.parametrize("k", [0, 64])
def test_from_hidden_states(k: int) -> None:
    n, vocab, width, chunk = 100_000, 1000, 8, 24 * MIB
    measured = peak(n, vocab, k, width, chunk)
    grads = 4 * width * (n + vocab)
    per_token = 64 + (35 * (k + 1) if k else 0)
    assert measured["forward"] <= chunk + grads + per_token * n + ALLOCATOR
    assert measured["kept"] + measured["backward"] <= grads + 64 * n + ALLOCATOR

"""Peak memory of the linear head: its chunk budget, the weight's gradient in float32 and a few bytes a token.

Each case runs in a process of its own, whose high-water mark is that of nothing else.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import host_code

from r1kernels import linear_loss_bytes

MIB = 1 << 20
PACKED = 12 * MIB  # blocks that a product packs, whatever the size of the batch, and ends of huge pages

pytestmark = [pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"), host_code]

CHILD = """
import ctypes, gc, json, re, sys
from pathlib import Path
import torch
import r1kernels
from r1kernels import linear_cross_entropy, linear_grpo_loss, linear_token_logprobs, objectives

o = json.loads(sys.argv[1])
torch.set_num_threads(1)
dtype = getattr(torch, o["dtype"])

def status(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024

def inputs(n):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.empty(n, o["width"], dtype=dtype)
    for begin in range(0, n, 1024):
        hidden[begin : begin + 1024] = torch.randn(min(1024, n - begin), o["width"], generator=generator)
    weight = torch.empty(o["vocab"], o["width"], dtype=dtype)
    for begin in range(0, o["vocab"], 1024):
        rows = min(1024, o["vocab"] - begin)
        weight[begin : begin + rows] = torch.randn(rows, o["width"], generator=generator) / o["width"] ** 0.5
    ids = torch.randint(o["vocab"], (n,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(o["train_weight"]), ids, torch.randn(n, generator=generator)

def run(hidden, weight, ids, advantages):
    keywords = {"chunk_bytes": o["chunk_bytes"]} if o["chunk_bytes"] else {}
    if o["into"]:
        keywords["grad_accumulation_into"] = into
    if o["loss"] == "logprobs":
        loss = linear_token_logprobs(hidden, weight, ids, **keywords).sum()
    elif o["loss"] == "cross_entropy":
        loss = linear_cross_entropy(hidden, weight, ids, **keywords)
    elif o["loss"] == "gspo":
        cu = torch.arange(0, len(ids) + 1, len(ids) // 4)
        loss = linear_grpo_loss(hidden, weight, ids, advantages, cu_seqlens=cu,
                                objective=objectives.gspo(entropy_coef=0.01), **keywords).loss
    else:
        loss = linear_grpo_loss(hidden, weight, ids, advantages, objective=objectives.dapo(), **keywords).loss
    (loss * o["factor"]).backward()
    return loss

run(*[value.detach()[:256].clone().requires_grad_(value.requires_grad) if value.dim() == 2 and k == 0 else value
      for k, value in enumerate(inputs(256))]) if not o["into"] and not o["no_warmup"] else None
arguments = inputs(o["tokens"])
into = torch.zeros(o["vocab"], o["width"], dtype=getattr(torch, o["into"])) if o["into"] else None
gc.collect()
r1kernels.release_workspace()
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
loss = run(*arguments)
assert loss.isfinite() and arguments[0].grad.isfinite().all()
print(json.dumps({"extra": status("VmHWM") - before, "total": status("VmHWM")}))
"""


def peak(**options: Any) -> dict[str, int]:
    """{"extra": bytes above the inputs, "total": of the process} at the peak of a loss and its backward."""
    defaults = {
        "tokens": 4096, "vocab": 16_384, "width": 256, "dtype": "float32", "loss": "grpo", "chunk_bytes": 24 * MIB,
        "into": "", "factor": 1.0, "train_weight": True, "no_warmup": False,
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(defaults | options)], capture_output=True, text=True,
        env=environment, cwd=root, check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


def bar(
    tokens: int, width: int, vocab: int, dtype: torch.dtype, chunk: int, *, trained: bool = True, products: int = 1
) -> int:
    """What the library says that a call takes, and what so many products pack."""
    said = linear_loss_bytes(tokens, vocab, width, dtype, chunk_bytes=chunk, weight_gradient=trained)
    return said + products * PACKED


@pytest.mark.few(1)
@pytest.mark.parametrize("loss", ["grpo", "gspo"])  # one pass and two phases
@pytest.mark.slow(reason="starts a process for each case")
def test_peak_memory(loss: str) -> None:
    """The dense computation takes 512 MiB for its float32 logits and their gradient here."""
    extra = peak(loss=loss)["extra"]
    allowed = bar(4096, 256, 16_384, torch.float32, 24 * MIB)
    assert 0.8 * allowed <= extra <= allowed < 256 * MIB, f"{extra / MIB:.1f} MiB, allowed {allowed / MIB:.1f}"


@pytest.mark.long(reason="a process that measures memory; the two tests beside it do so too")
def test_peak_memory_of_a_bfloat16_model() -> None:
    extra = peak(dtype="bfloat16", tokens=2048)["extra"]
    allowed = bar(2048, 256, 16_384, torch.bfloat16, 24 * MIB)
    assert extra <= allowed, f"{extra / MIB:.1f} MiB, allowed {allowed / MIB:.1f}"


@pytest.mark.long(reason="a process that measures memory; the two tests beside it do so too")
@pytest.mark.few(1)
@pytest.mark.parametrize("into", ["", "float32", "bfloat16"])
def test_a_scaled_loss_takes_no_more_memory(into: str) -> None:
    """As under gradient accumulation; the weight's gradient is large beside the chunk here, and not copied again.

    The allocator may keep the blocks of one product when those of the next have another size, hence two products.
    """
    options = {"dtype": "bfloat16", "tokens": 1024, "vocab": 60_000, "chunk_bytes": 8 * MIB, "factor": 0.125}
    extra = peak(into=into, **options)["extra"]
    allowed = bar(1024, 256, 60_000, torch.bfloat16, 8 * MIB, products=2)
    assert extra <= allowed, f"{extra / MIB:.1f} MiB, allowed {allowed / MIB:.1f}"


@pytest.mark.slow(reason="starts three processes")
def test_memory_follows_the_budget_and_not_the_batch() -> None:
    """With a frozen head, from 2,048 to 16,384 tokens: the gradient of hidden and 64 bytes a token, nothing else."""
    few, many = (
        peak(tokens=tokens, vocab=4096, width=64, chunk_bytes=8 * MIB, train_weight=False)["extra"]
        for tokens in (2048, 16_384)
    )
    grown = (16_384 - 2048) * (64 + 64 * 4)
    assert many - few <= grown + 6 * MIB, f"{(many - few) / MIB:.1f} MiB, allowed {grown / MIB:.1f}"
    assert many <= bar(16_384, 64, 4096, torch.float32, 8 * MIB, trained=False)
    wide = peak(tokens=16_384, vocab=4096, width=64, chunk_bytes=128 * MIB, train_weight=False)["extra"]
    assert 70 * MIB <= wide - many <= 125 * MIB  # the budget, of which three chunks of equal size leave a third


@pytest.mark.skipif(not os.environ.get("R1KERNELS_TEST_LARGE"), reason="8 GiB and many minutes: R1KERNELS_TEST_LARGE=1")
def test_a_large_batch_of_a_large_vocabulary_fits_in_8_gib() -> None:
    """N = 65,536, H = 1,024, V = 151,936 in bfloat16, where the logits alone would be 20 GB."""
    result = peak(
        tokens=65_536, vocab=151_936, width=1024, dtype="bfloat16", chunk_bytes=None, no_warmup=True,
        loss="cross_entropy",
    )
    assert result["total"] < 8 << 30, f"{result['total'] / (1 << 30):.2f} GiB"

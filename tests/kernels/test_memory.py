"""Memory that CPU kernels keep between calls: who gets it, how much is kept, and that a second call maps no pages."""

import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from backends import host_code
from torch._subclasses.fake_tensor import FakeTensorMode

import r1kernels
from r1kernels import _library, _memory

pytestmark = [host_code, pytest.mark.skipif(not _memory.AVAILABLE, reason="needs private anonymous mappings")]

MIB = 1 << 20
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    gc.collect()
    r1kernels.release_workspace()
    yield
    r1kernels.release_workspace()


def kept() -> int:
    return sum(len(memory) for memory in _memory._kept)


def test_memory_of_a_freed_tensor_serves_the_next() -> None:
    first = _library.empty(3, MIB, dtype=torch.float32, device=CPU)
    address = first.data_ptr()
    assert kept() == 0
    view = first[1:].view(torch.bfloat16)
    del first
    assert kept() == 0  # the view still needs the storage
    del view
    assert kept() >= 12 * MIB
    second = _library.empty(6, MIB, dtype=torch.bfloat16, device=CPU)
    assert second.data_ptr() == address and kept() == 0
    assert second.untyped_storage().nbytes() == 12 * MIB and second.is_contiguous()


def test_tensors_in_use_share_nothing() -> None:
    tensors = [_library.empty(MIB, dtype=torch.float32, device=CPU).fill_(k) for k in range(5)]
    for k, tensor in enumerate(tensors):
        assert bool((tensor == k).all())


def test_much_larger_memory_stays_free_for_a_large_tensor() -> None:
    del_me = _library.empty(64 * MIB, dtype=torch.uint8, device=CPU)
    del del_me
    small = _library.empty(8 * MIB, dtype=torch.uint8, device=CPU)
    assert kept() >= 64 * MIB
    small.zero_()


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_memory, "KEPT_BYTES", 40 * MIB)
    tensors = [_library.empty(16 * MIB, dtype=torch.uint8, device=CPU) for _ in range(5)]
    last = tensors[-1].data_ptr()
    while tensors:
        tensors.pop(0)
        assert kept() <= 40 * MIB
    assert _library.empty(16 * MIB, dtype=torch.uint8, device=CPU).data_ptr() == last  # the oldest goes first


def test_memory_beyond_the_bound_does_not_push_out_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_memory, "KEPT_BYTES", 40 * MIB)
    small, large = (_library.empty(size * MIB, dtype=torch.uint8, device=CPU) for size in (8, 64))
    del small
    before = kept()
    del large
    assert kept() == before > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_does_not_wait_for_a_lock_of_its_parent() -> None:
    code = (
        "import os, torch\nfrom r1kernels import _library, _memory\n_memory._lock.acquire()\npid = os.fork()\n"
        "if pid == 0:\n    _library.empty(1 << 22, dtype=torch.uint8, device=torch.device('cpu'))\n    os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_release_workspace_keeps_nothing() -> None:
    used = _library.empty(2 * MIB, dtype=torch.float32, device=CPU).fill_(1.0)
    free = _library.empty(2 * MIB, dtype=torch.float32, device=CPU)
    del free
    assert kept() > 0
    r1kernels.release_workspace()
    assert kept() == 0
    assert float(used.sum()) == 2 * MIB


def test_small_and_fake_tensors_are_torchs() -> None:
    _library.empty(16, dtype=torch.float32, device=CPU)
    with FakeTensorMode():
        fake = _library.empty(MIB, MIB, dtype=torch.float32, device=CPU)
    assert fake.shape == (MIB, MIB) and kept() == 0


def test_threads_take_and_give_back_at_once() -> None:
    failures: list[int] = []

    def work(value: int) -> None:
        for _ in range(50):
            tensor = _library.empty(MIB, dtype=torch.int32, device=CPU).fill_(value)
            if not bool((tensor == value).all()):
                failures.append(value)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


CHILD = """
import json, resource, torch
from r1kernels import linear_cross_entropy, linear_grpo_loss, linear_token_logprobs, token_logprobs

torch.set_num_threads(1)
torch.manual_seed(0)
hidden = torch.randn(8, 16, 32).bfloat16().requires_grad_()
weight = torch.randn(200_000, 32).bfloat16().requires_grad_()
ids, advantages = torch.randint(200_000, (8, 16)), torch.randn(8)
logits = torch.randn(8, 16, 200_000).bfloat16().requires_grad_()
calls = {
    "linear_grpo_loss": lambda: linear_grpo_loss(hidden, weight, ids, advantages).loss,
    "linear_cross_entropy": lambda: linear_cross_entropy(hidden, weight, ids),
    "linear_token_logprobs": lambda: linear_token_logprobs(hidden, weight, ids).sum(),
    "token_logprobs": lambda: token_logprobs(logits, ids).sum(),
}
faults = {}
for name, call in calls.items():
    faults[name] = []
    for _ in range(6):
        hidden.grad = weight.grad = logits.grad = None
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call().backward()
        faults[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps(faults))
"""


@pytest.mark.long(reason="a process of many large calls, which count pages")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="counts the page faults of Linux")
def test_a_second_call_maps_no_pages() -> None:
    """A call writes at least 50 MiB: 25 huge pages. The interpreter itself may map a page now and then, so the median
    counts."""
    output = subprocess.run([sys.executable, "-c", CHILD], check=True, capture_output=True, text=True).stdout
    for name, faults in json.loads(output).items():
        assert sorted(faults[1:])[2] <= 8, (name, faults)

"""Many calls of one operation keep nothing: no byte, no object, no tensor. The check itself finds small leaks."""

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

import leaks
import process_cases
import pytest
import torch
from backends import host_code

pytestmark = [
    host_code, pytest.mark.slow(reason="hundreds of calls of every operation"),
    pytest.mark.skipif(not leaks.AVAILABLE, reason="needs mallinfo2 of glibc 2.33 and /proc"),
]
FEW = process_cases.leaves(2, 5, 3)
NAMES = sorted(process_cases.calls(FEW))


@pytest.mark.parametrize("name", NAMES)
def test_many_calls_keep_nothing(name: str) -> None:
    call = process_cases.calls(FEW)[name]
    assert leaks.kept(lambda number: call(), 50) == {}


@pytest.mark.parametrize("name", NAMES)
def test_calls_of_ever_new_sizes_keep_nothing(name: str) -> None:
    """What is kept for each size would grow. The sizes are larger than those of which malloc keeps freed memory."""
    def call(number: int) -> None:
        process_cases.calls(process_cases.leaves(1 + number % 3, 300 + number, 2 + number % 4))[name]()

    assert leaks.kept(call, 25) == {}


store: list[Any] = []
malloc = ctypes.CDLL(None).malloc
malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]


def graph() -> torch.Tensor:
    return torch.nn.functional.mse_loss(FEW["logits"], FEW["teacher"])


LEAKS: dict[str, tuple[Callable[[], Any], str]] = {
    "300 bytes of Python": (lambda: bytes(300), "blocks"), "3,000 bytes of Python": (lambda: bytes(3000), "bytes"),
    "300 bytes of C": (lambda: malloc(300), "bytes"), "a tensor": (lambda: torch.empty(1), "tensors"),
    "live tensors with their graph": (lambda: (graph(), graph()), "tensors"),
    "storage alone": (lambda: torch.empty(75).untyped_storage(), "bytes"), "a list": (list, "objects"),
    "a mapping": (lambda: mmap.mmap(-1, 1 << 20), "mapped"),
}


@pytest.mark.parametrize("what", LEAKS)
def test_a_small_leak_is_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the operations keeps something in each call."""
    make, counted = LEAKS[what]
    kl_estimate = process_cases.kl_estimate

    def leaking(*inputs: torch.Tensor) -> torch.Tensor:
        store.append(make())
        return kl_estimate(*inputs)

    monkeypatch.setattr(process_cases, "kl_estimate", leaking)
    call = process_cases.calls(FEW)["kl_estimate"]
    found = leaks.kept(lambda number: call(), 25)
    store.clear()
    assert counted in found

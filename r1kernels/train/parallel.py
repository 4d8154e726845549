"""The processes of a run (ranks): shares of the work, what they tell each other, and what happens if one is missing.

    torchrun --nproc-per-node 8 -m r1kernels train RECIPE

All ranks run the same code. What does not need the model's weights is small, so every rank holds all of it: the recipe,
the problems, the tokens and rewards of a step. A rank samples, scores and trains its share. Only the first rank writes
files. A plain process is a run of one rank, by the same code.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from r1kernels.train.errors import ConfigError, Interrupt, Interrupted, RunError, TrainingError, is_lost_contact, naming

BEAT_S = 2.0  # seconds between two signs of life of a rank
Result = TypeVar("Result")
_activity = "starting"


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def start(device: str, timeout_s: float = 1800.0) -> None:
    """Joins the ranks of the run, unless that is done. Every collective has the time limit `timeout_s`."""
    cuda = torch.device(device).type == "cuda"
    with naming(f"'device' is {device!r}, which cannot be used here"):
        if cuda and "LOCAL_RANK" in os.environ:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=device).item()
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), **alone)
        if ranks() > 1:
            threading.Thread(target=_show_life, daemon=True).start()
    found = dist.get_backend_config()
    if "cpu:gloo" not in found or (cuda and "cuda:nccl" not in found):
        raise ConfigError(f"the process group has the backends {found!r}; 'device' {device!r} needs "
                          f"{'cpu:gloo,cuda:nccl' if cuda else 'cpu:gloo'}")


@functools.cache
def mesh(device: str, tensor: int = 1) -> DeviceMesh:
    """The ranks as a mesh with the axes `data` and `tensor`; neighbouring ranks share a model by `tensor`."""
    start(device)
    if ranks() % tensor:
        raise ConfigError(f"'parallel.tensor' is {tensor}, which does not divide the number of ranks, {ranks()}")
    return init_device_mesh(torch.device(device).type, (ranks() // tensor, tensor), mesh_dim_names=("data", "tensor"))


def everywhere(function: Callable[[], Result]) -> list[Result]:
    """Calls a function on every rank, and returns the results of all ranks. What one rank raises, all ranks raise."""
    if ranks() == 1:
        return [function()]
    value, error = None, None
    try:
        value = function()
    except (Exception, KeyboardInterrupt) as raised:
        error = raised
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception of a library may hold anything
        error = RuntimeError(repr(error))
    found: list[Any] = [None] * ranks()
    dist.all_gather_object(found, (value, error))
    for number, (_, raised) in enumerate(found):
        if raised is not None:
            raise raised if number == rank() or not isinstance(raised, RunError) else type(raised)(
                f"rank {number}: {raised}")
    return [value for value, _ in found]


def first(function: Callable[[], Result]) -> Result:
    """Calls a function on the first rank alone, and returns its result on every rank."""
    return everywhere(lambda: function() if rank() == 0 else None)[0]


def share(rows: Sequence[Any], number: int | None = None, count: int | None = None) -> Any:
    """The part of some rows that belongs to this rank, or to number `number` of `count`."""
    number, count = rank() if number is None else number, count or ranks()
    return rows[len(rows) * number // count : len(rows) * (number + 1) // count]


def shared(function: Callable[..., list[Any]], *columns: Sequence[Any]) -> list[Any]:
    """function(*columns), which returns a value for each row; every rank computes its share of the rows."""
    return [value for part in everywhere(lambda: function(*map(share, columns))) for value in part]


def add_up(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of a tensor over a group, in place."""
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def agree(name: str, value: Any) -> None:
    """Raises ConfigError on all ranks, with both values, if a value differs between ranks."""
    for number, theirs in enumerate(values := everywhere(lambda: value)):
        mine = values[0]
        while isinstance(mine, dict) and isinstance(theirs, dict) and mine != theirs:
            key = next(key for key in mine | theirs if mine.get(key) != theirs.get(key))
            name, mine, theirs = f"{name} ({key})", mine.get(key), theirs.get(key)
        if mine != theirs:
            raise ConfigError(f"ranks disagree on {name}: rank 0 has {mine!r:.200}, rank {number} {theirs!r:.200}")


def check(interrupt: Interrupt) -> None:
    """Raises Interrupted on all ranks if a signal came to one of them. All ranks must call it."""
    signals = [signal for signal in everywhere(lambda: interrupt.requested) if signal]
    if signals:
        raise Interrupted(signals[0])


def report_activity(text: str) -> None:
    """What this rank does now, for the messages of other ranks."""
    global _activity
    _activity = text


def _show_life() -> None:
    """Shows the other ranks, in the store that they share, that this one is alive, and what it does."""
    store, beat = dist.group.WORLD.get_group_store().clone(), 0
    with contextlib.suppress(RuntimeError):  # the store is gone: the run has ended
        while True:
            beat += 1
            store.set(f"r1kernels/life/{rank()}", f"{beat} {_activity}")
            time.sleep(BEAT_S)


@contextlib.contextmanager
def naming_missing_ranks() -> Iterator[None]:
    """Turns the error of a collective into one that names the ranks that are gone, and what the others do."""
    try:
        yield
    except RuntimeError as error:
        if ranks() == 1 or not is_lost_contact(error):
            raise
        raise TrainingError(f"ranks lost contact: {_missing_ranks()} ({error!s:.200}); start the same command "
                            "again: the run continues from its last checkpoint") from error


def _missing_ranks() -> str:
    store = dist.group.WORLD.get_group_store().clone()
    store.set_timeout(timedelta(seconds=BEAT_S))

    def read(number: int) -> str:
        try:
            return store.get(f"r1kernels/life/{number}").decode()
        except RuntimeError:
            return "0 unknown"

    before = list(map(read, range(ranks())))
    time.sleep(3 * BEAT_S)
    after = list(map(read, range(ranks())))
    states = [f"rank {number} {'is gone, last' if old == new else 'is alive'} in '{new.partition(' ')[2]}'"
              for number, (old, new) in enumerate(zip(before, after, strict=True))]
    return "; ".join(states)

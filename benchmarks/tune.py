"""Finds the fastest tile of each operation on this device and writes r1kernels/triton/tables/<device>.json.

    PYTHONPATH=. python benchmarks/tune.py [--op token_stats] [--out FOLDER]

Every module of r1kernels.triton that has a `search_space(device)` is tuned, on the operation of its name below. What is
found is written as soon as it is measured; the tile in use stays unless another is faster by more than the spread.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu import inputs, measure, records
from gpu.cases import distillation_loss
from gpu.losses import Problem, distance, gradients
from gpu.setting import Head, Logits, Setting, head_shape, logits_shapes, name_of
from gpu.tiles import forced, kernel_device, replaced
from gpu.timing import Timed, clock_of, in_turns
from torch import Tensor

import r1kernels
import r1kernels.triton
from r1kernels.triton import tables


class Workload(NamedTuple):
    """`run` is what is timed; `exact` gives the same results from the same inputs in float64."""

    run: Callable[[], tuple[Tensor, ...]]
    exact: Callable[[], tuple[Tensor, ...]]


Place = tuple[torch.dtype, int, Callable[[], Workload]]  # dtype, size (vocabulary or tokens), what makes the workload
SECONDS_EACH = 1.0
ROUNDINGS = 4  # how much less exact than the tile in use another tile may be: its sums have another order


def _logits_places(setting: Setting, make: Callable[[Setting, Logits, torch.dtype], Workload]) -> Iterator[Place]:
    for dtype in (torch.bfloat16, torch.float32):
        for shape in logits_shapes(setting):
            fitting = shape if dtype == torch.bfloat16 else shape._replace(tokens=min(shape.tokens, 1024))
            yield dtype, shape.vocab, functools.partial(make, setting, fitting, dtype)


def _token_stats(setting: Setting, shape: Logits, dtype: torch.dtype) -> Workload:
    logits = inputs.make_logits(shape, dtype, setting.device).requires_grad_()
    ids = inputs.uniform_ids(shape.tokens, shape.vocab, setting.device)

    def results(logits: Tensor) -> tuple[Tensor, ...]:
        logprobs, entropy = r1kernels.token_logprobs_and_entropy(logits, ids)
        return logprobs.detach(), entropy.detach(), *torch.autograd.grad(logprobs, logits, torch.ones_like(logprobs))

    return Workload(lambda: results(logits), lambda: results(logits.detach().double().requires_grad_()))


def _divergence(setting: Setting, shape: Logits, dtype: torch.dtype) -> Workload:
    student, teacher = (inputs.make_logits(shape, dtype, setting.device, seed) for seed in (0, 1))
    problem = Problem({"student": student, "teacher": teacher}, ("student",), ("student", "teacher"))
    loss = functools.partial(distillation_loss.ours, divergence="jsd")

    def exact() -> tuple[Tensor, ...]:
        wide = {name: value.double() for name, value in problem.inputs.items()}
        return gradients(loss, problem._replace(inputs=wide))

    return Workload(functools.partial(gradients, loss, problem), exact)


def _linear_statistics(setting: Setting, shape: Head, dtype: torch.dtype) -> Workload:
    hidden, weight = inputs.make_head(shape, setting.device, dtype)
    ids = inputs.uniform_ids(shape.tokens, shape.vocab, setting.device)

    def results(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return r1kernels.linear_token_logprobs_and_entropy(hidden, weight, ids)

    return Workload(lambda: results(hidden, weight), lambda: results(hidden.double(), weight.double()))


def _linear_places(setting: Setting) -> Iterator[Place]:
    shape = head_shape(setting)
    yield torch.bfloat16, shape.vocab, functools.partial(_linear_statistics, setting, shape, torch.bfloat16)


WORKLOADS: dict[str, Callable[[Setting], Iterator[Place]]] = {
    "token_stats": lambda setting: _logits_places(setting, _token_stats),
    "linear_statistics": _linear_places,
    "divergence": lambda setting: _logits_places(setting, _divergence),
}


def spaces(only: str | None) -> dict[str, Any]:
    """Modules of kernels that offer a search space, by operation: those with a workload, in its order."""
    names = [module.name for module in pkgutil.iter_modules(r1kernels.triton.__path__)]
    found = {}
    for name in names:  # loaded before one is tuned: they may hold its `config`
        importlib.import_module(f"r1kernels.triton.{name}")
    for name in sorted(names, key=lambda name: [*WORKLOADS, name].index(name)):
        if only not in (None, name):
            continue
        module = importlib.import_module(f"r1kernels.triton.{name}")
        if not hasattr(module, "search_space"):
            continue
        if name not in WORKLOADS:
            print(f"{name}: a search space and no workload in benchmarks/tune.py, left out")
            continue
        found[name] = module
    return found


def in_use(module: Any, run: Callable[[], object]) -> Any:
    """The tile that a run asks the module for, None where it asks for none."""
    asked, kept = [], module.config

    def recorded(*args: Any, **keywords: Any) -> Any:
        asked.append(kept(*args, **keywords))
        return asked[-1]

    with replaced(module, recorded):
        run()
    return asked[0] if asked else None


def fastest(module: Any, workload: Workload, device: Any, clock: Any) -> tuple[Any, str]:
    """The tile to use, and a line about it. Tiles that fail are out, and those that are less exact than the default."""
    space = list(module.search_space(device))
    default = in_use(module, workload.run)
    default = space[0] if default is None else default  # kernels of another backend ran: a rehearsal
    candidates: dict[Any, Timed] = {}

    def with_tile(config: Any) -> object:
        with forced(module, config):
            return workload.run()

    with r1kernels.backend("reference"):
        expected = workload.exact()
    allowed = [float(ROUNDINGS)] * len(expected)
    for config in dict.fromkeys([default, *space]):
        try:
            errors = [
                distance(found, true) / torch.finfo(found.dtype).eps
                for found, true in zip(with_tile(config), expected, strict=True)
            ]
            if config == default:
                allowed = [error + ROUNDINGS for error in errors]
            elif not all(error <= most for error, most in zip(errors, allowed, strict=True)):
                raise AssertionError(f"results are off by {', '.join(f'{error:.3g}' for error in errors)} roundings, "
                                     f"allowed {', '.join(f'{most:.3g}' for most in allowed)}")
        except Exception as error:
            print(f"    {tuple(config)}: {measure.failure(error)}")
            continue
        candidates[config] = Timed(functools.partial(with_tile, config))
    del expected
    times = in_turns(candidates, clock, SECONDS_EACH)
    best = min(times, key=lambda config: times[config].median_us)
    gained = times[default].median_us - times[best].median_us
    if gained <= times[default].spread_us / 2 + times[best].spread_us / 2:
        best = default
    return best, f"{best} {times[best].median_us:.1f} us, so far {times[default].median_us:.1f} us"


def write(folder: Path, device_name: str, environment: dict[str, Any], configs: dict[str, Any]) -> Path:
    """Adds to what the device's file holds already."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / tables.file_name(device_name)
    kept = json.loads(path.read_text())["configs"] if path.exists() else {}
    for op, by_dtype in configs.items():
        for dtype, by_size in by_dtype.items():
            kept.setdefault(op, {}).setdefault(dtype, {}).update(by_size)
    path.write_text(json.dumps({**environment, "configs": kept}, indent=1, sort_keys=True) + "\n")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", help="this one only")
    parser.add_argument("--out", type=Path, default=tables.FOLDER)
    parser.add_argument("--seconds", type=float, default=3600, help="begin nothing after so many")
    parser.add_argument("--device", default="cuda", help="cpu: a rehearsal, with --small")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    setting = Setting(torch.device(given.device), given.small)
    if setting.device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch.cuda is not available", file=sys.stderr)
        return 2
    device, clock = kernel_device(setting.device), clock_of(setting.device)
    deadline = time.monotonic() + given.seconds
    with r1kernels.backend("triton" if setting.device.type == "cuda" else "auto"):
        environment = records.environment(setting.device)
        for op, module in spaces(given.op).items():
            done: set[tuple[str, str]] = set()
            for dtype, size, make in WORKLOADS[op](setting):
                place = name_of(dtype), tables.size_class(size)
                if place in done:
                    continue
                if time.monotonic() > deadline:
                    print(f"out of time before {op}, {', '.join(place)}")
                    return 0
                done.add(place)
                print(f"{op}, {', '.join(place)}", flush=True)
                best, told = fastest(module, make(), device, clock)
                print(f"  {told}", flush=True)
                found = {op: {place[0]: {place[1]: best._asdict()}}}
                path = write(given.out, device.name, environment, found)
                print(f"  written to {path}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

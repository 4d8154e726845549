"""Every test runs with fresh memory filled with NaN (deterministic mode does that) and on one thread.

On busy cores a second thread mostly waits: the same tests take 60 times as long. What threads may change, which is
nothing, has tests of its own.
"""

import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch

from r1kernels import _library, backend, testing

SLOW_KERNELS = _library.INTERPRETED or _library.EMULATED  # those of a GPU, on the CPU
if SLOW_KERNELS:
    _library._requested = "auto"  # float64 is for the reference, as ever

torch.use_deterministic_algorithms(True)
torch.set_num_threads(1)

if importlib.util.find_spec("hypothesis"):  # the tests of GPUs do without
    from hypothesis import settings

    examples = 4 if SLOW_KERNELS else 40
    settings.register_profile("tests", deadline=None, derandomize=True, max_examples=examples, database=None)
    settings.load_profile("tests")

MOST_CASES = 12  # of one test, where programs are interpreted


def spread(count: int) -> set[int]:
    """MOST_CASES numbers below `count`, apart by its golden section, prime to it: no parameter goes round in step."""
    step = round(count * 0.618)
    while math.gcd(step, count) > 1:
        step += 1
    return {i * step % count for i in range(MOST_CASES)}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Interpreted programs take their time: of a test with many cases there, some from everywhere are run."""
    if not SLOW_KERNELS:
        return
    kept, left = [], []
    for _, group in itertools.groupby(list(items), key=lambda item: item.nodeid.partition("[")[0]):
        cases = list(group)
        chosen = spread(len(cases)) if len(cases) > MOST_CASES else range(len(cases))
        for i, case in enumerate(cases):
            (kept if i in chosen else left).append(case)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture
def on_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads for the rest of a test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture(params=[testing.KERNELS] if SLOW_KERNELS else ["reference", "cpu"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once per implementation."""
    with backend(request.param):
        yield request.param


@pytest.fixture(params=_library.extension.cpu_isas() if _library.extension else [testing.KERNELS])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test with each set of CPU instructions that this processor has."""
    if _library.extension is None:
        with backend(testing.KERNELS):
            yield request.param
        return
    in_use = _library.extension.cpu_isa()
    _library.extension.use_cpu_isa(request.param)
    with backend("cpu"):
        yield request.param
    _library.extension.use_cpu_isa(in_use)

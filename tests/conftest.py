"""Every test runs with fresh memory filled with NaN (deterministic mode does that) and on one thread.

On busy cores a second thread mostly waits: the same tests take 60 times as long. What threads may change, which is
nothing, has tests of its own.
"""

import gc
import importlib.util
import itertools
import sys
import zlib
from collections.abc import Callable, Iterator

import backends
import interpreter_speed
import pytest
import sampling
import torch

from r1kernels import _dispatch, _library, backend, testing

SLOW_KERNELS = _library.INTERPRETED or _library.EMULATED  # those of a GPU, on the CPU
if SLOW_KERNELS:
    _dispatch._requested = "auto"  # float64 is for the reference, as ever
if _library.INTERPRETED:
    interpreter_speed.patch_once_a_launch()

torch.use_deterministic_algorithms(True)
torch.set_num_threads(1)

if importlib.util.find_spec("hypothesis"):  # the tests of GPUs do without
    from hypothesis import HealthCheck, settings

    # A fixture that chooses kernels is good for all examples of a test. `--hypothesis-profile=search` looks for new
    # failures: its examples are different ones in every run.
    COMMON = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
    settings.register_profile("tests", derandomize=True, max_examples=4 if SLOW_KERNELS else 24, **COMMON)
    settings.register_profile("full", derandomize=True, max_examples=8 if SLOW_KERNELS else 400, **COMMON)
    settings.register_profile("search", max_examples=3000, print_blob=True, **COMMON)
    settings.load_profile("full" if "--full" in sys.argv else "tests")

# Of a test with more cases than this, a sample is run unless `--full` is given.
SAMPLED_ABOVE = 24
# Interpreted and emulated kernels are slow. With them, these numbers of cases of each test run, by room,
# and with `--full` the sample. Losses and heads call the kernels that the first room tests.
MOST_INTERPRETED = {"kernels": 1, "losses": 1, "linear": 1, "hardening": 1, "gpu": 2}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true",
        help=f"run every case: by default, tests with more than {SAMPLED_ABOVE} cases run a sample that has every pair "
        "of parameter values",
    )


def parameters(case: pytest.Item) -> dict[str, tuple[int, ...]]:
    """The values of a case, by identity. What one `parametrize` sets together is one value."""
    values = {name: id(value) for name, value in case.callspec.params.items()}
    together = {}
    for mark in case.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        together[",".join(names)] = tuple(values.pop(name.strip()) for name in names)
    return together | {name: (value,) for name, value in values.items()}


def sample(cases: list[pytest.Item], full: bool) -> list[int]:
    """The numbers of the cases of one test that are run."""
    numbers = list(range(len(cases)))
    if not cases or (full and not SLOW_KERNELS):
        return numbers
    if len(cases) > SAMPLED_ABOVE:
        numbers = sampling.pairwise([parameters(case) for case in cases])
    if full:
        return numbers
    room, name = cases[0].path.parent.name, cases[0].nodeid.partition("[")[0].rpartition("/")[2]
    few = cases[0].get_closest_marker("few")
    limits = [*(few.args if few else ()), *([MOST_INTERPRETED[room]] if SLOW_KERNELS else ())]
    if limits:
        start = zlib.crc32(name.encode())  # otherwise every test would run its first case
        numbers = [numbers[i] for i in sampling.spread(len(numbers), min(limits), start)]
    return numbers


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what a marker keeps from these kernels, and of the other cases of each test keeps a sample."""
    full = config.getoption("--full")
    kept: set[str] = set()
    for _, group in itertools.groupby(list(items), key=lambda item: item.nodeid.partition("[")[0]):
        running, skipped = [], []
        for case in group:
            reason = backends.skip_reason(case, testing.KERNELS, full)
            (skipped if reason else running).append(case)
            if reason:
                case.add_marker(pytest.mark.skip(reason=reason))
        kept |= {case.nodeid for case in skipped}
        kept |= {running[number].nodeid for number in sample(running, full)}
    if left := [item for item in items if item.nodeid not in kept]:
        config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item.nodeid in kept]


def pytest_collection_finish() -> None:
    """What collecting has made stays until the end, so that no collection of garbage needs to visit it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # otherwise Triton's library reports leaks at the end


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


# Of these two, one has matrix products that test_gemm runs, and the other one the kernels of two more sets.
COMBINED = ("amx_bf16", "avx512_bf16_fma")
ISAS = [isa for isa in _library.extension.cpu_isas() if isa not in COMBINED] if _library.extension else []


@pytest.fixture(params=ISAS or [testing.KERNELS])
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

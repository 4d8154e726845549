"""Every test runs with fresh memory filled with NaN (deterministic mode does that) and on at most two threads."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from r1kernels import backend

torch.use_deterministic_algorithms(True)
torch.set_num_threads(min(2, torch.get_num_threads()))

settings.register_profile("tests", deadline=None, derandomize=True, max_examples=40, database=None)
settings.load_profile("tests")


@pytest.fixture(params=["reference", "cpu"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once per implementation."""
    with backend(request.param):
        yield request.param

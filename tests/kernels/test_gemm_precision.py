"""The settings of PyTorch's products: changed while a product runs, restored afterwards."""

import pytest
import torch
from backends import host_code

from r1kernels import backend
from r1kernels.ops.linear import gemm, precision

pytestmark = host_code


@pytest.mark.parametrize("asked", ["none", "tf32", "ieee"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_products_of_float32_are_not_rounded_to_tf32(
    asked: str, accumulate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the process has asked for, also after an error. A spy looks at the settings while a product runs."""
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [setting.fp32_precision for setting in settings]
    seen: list[list[str]] = []

    def spy(*_: object, **__: object) -> None:
        seen.append([setting.fp32_precision for setting in settings])
        raise RuntimeError("seen")

    monkeypatch.setattr(torch, "mm", spy)
    monkeypatch.setattr(torch.Tensor, "addmm_", spy)
    a = torch.ones(3, 4)
    try:
        for setting in settings:
            setting.fp32_precision = asked
        with backend("reference"), pytest.raises(RuntimeError, match="seen"):
            gemm.matmul(a, a.t(), torch.zeros(3, 3), accumulate=accumulate)
        assert seen == [["ieee", "ieee"]]
        assert [setting.fp32_precision for setting in settings] == [asked, asked]
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def test_a_thread_that_is_done_leaves_the_precision_to_the_others() -> None:
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    try:
        setting.fp32_precision = "tf32"
        first, second = precision.exact_float32(), precision.exact_float32()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert setting.fp32_precision == "ieee"
        second.__exit__(None, None, None)
        assert setting.fp32_precision == "tf32"
    finally:
        setting.fp32_precision = before


def test_a_general_setting_still_reaches_products_afterwards() -> None:
    general, setting = torch.backends.fp32_precision, torch.backends.cuda.matmul
    try:
        torch.backends.fp32_precision = "tf32"
        with precision.exact_float32():
            assert setting.fp32_precision == "ieee"
        torch.backends.fp32_precision = "ieee"
        assert setting.fp32_precision == "ieee"
        torch.backends.fp32_precision = "tf32"
        assert setting.fp32_precision == "tf32"
    finally:
        torch.backends.fp32_precision = general

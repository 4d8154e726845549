"""Which implementation serves a call: requests, the environment, a missing extension, one warning per reason."""

import warnings
from collections.abc import Callable

import pytest
import torch
from library_cases import ID, OPERATIONS, ROW, run
from torch._subclasses import FakeTensorMode

import r1kernels
from r1kernels import _dispatch, _library, backend


@pytest.fixture
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a fresh process: no warning has been given yet."""
    monkeypatch.setattr(_dispatch, "_warned", set())


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch, nothing_said: None) -> None:
    monkeypatch.setattr(_library, "extension", None)
    monkeypatch.setattr(_library, "extension_error", "No module named 'r1kernels._C'")


# ---- requests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", _library.NATIVE_DTYPES)
def test_the_kernels_serve_the_cpu(dtype: torch.dtype) -> None:
    assert _dispatch.choose("kernels", "cpu", dtype) == ("cpu", "compiled extension", False)
    assert _dispatch.select(torch.zeros(1, dtype=dtype)) == "cpu"


def test_backend_holds_inside_its_block_and_nests() -> None:
    with backend("reference"):
        assert _dispatch.select(ROW) == "reference"
        with backend("cpu"):
            assert _dispatch.select(ROW) == "cpu"
        assert _dispatch.select(ROW) == "reference"
    assert _dispatch.select(ROW) == "cpu"


def test_backend_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), backend("reference"):
        raise KeyError
    assert _dispatch.requested() == "auto"


@pytest.mark.parametrize("name", ["tritonn", "", "CPU", None])
def test_an_unknown_backend_is_refused(name: str) -> None:
    message = rf"backend is {name!r}, expected one of auto, reference, cpu, triton, cuda$"
    with pytest.raises(ValueError, match=message), backend(name):
        pass
    assert _dispatch.requested() == "auto"


def count_kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    call = _library.call

    def spy(op: Callable, *arguments: object) -> object:
        calls.append(str(op))
        return call(op, *arguments)

    monkeypatch.setattr(_library, "call", spy)
    return calls


def test_a_request_decides_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_kernel_calls(monkeypatch)
    with backend("reference"):
        r1kernels.grpo_loss(ROW.unsqueeze(0), ID.unsqueeze(0), torch.ones(1))
    assert not calls
    r1kernels.grpo_loss(ROW.unsqueeze(0), ID.unsqueeze(0), torch.ones(1))
    assert calls == ["r1kernels.token_stats.default", "r1kernels.policy_loss.default"]


def test_the_environment_sets_the_process() -> None:
    program = "from r1kernels import _dispatch; print(_dispatch.requested())"
    assert run(program).stdout.strip() == "auto"
    assert run(program, R1KERNELS_BACKEND="reference").stdout.strip() == "reference"
    refused = run(program, R1KERNELS_BACKEND="fast")
    assert refused.returncode != 0
    message = "ValueError: R1KERNELS_BACKEND is 'fast', expected one of auto, reference, cpu, triton, cuda\n"
    assert message in refused.stderr


# ---- what cannot be served --------------------------------------------------------------------------------


def test_float64_on_request_of_kernels_is_an_error() -> None:
    with backend("cpu"), pytest.raises(TypeError, match=r"backend 'cpu' was requested for torch\.float64, expected"):
        r1kernels.token_logprobs(ROW.double(), ID)


def test_another_device_on_request_of_cpu_kernels_is_an_error() -> None:
    with backend("cpu"), pytest.raises(ValueError, match="backend 'cpu' was requested for a tensor on 'cuda'"):
        _dispatch.choose("kernels", "cuda", torch.float32)


def test_a_missing_extension_on_request_says_how_to_build_it(no_extension: None) -> None:
    with backend("cpu"), pytest.raises(RuntimeError, match=r"r1kernels\._C is missing .*No module named.*make"):
        r1kernels.token_logprobs(ROW, ID)


@pytest.mark.parametrize("name", OPERATIONS)
def test_without_the_extension_everything_works_and_says_so_once(name: str, no_extension: None) -> None:
    with pytest.warns(UserWarning, match="reference implementation: r1kernels._C is missing") as said:
        first = OPERATIONS[name]()
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(OPERATIONS[name](), first)


def test_the_extension_is_not_needed_to_import() -> None:
    program = (
        "import sys; sys.modules['r1kernels._C'] = None\n"
        "import warnings, torch, r1kernels\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(3): r1kernels.token_logprobs(torch.zeros(1, 4), torch.tensor([2]))\n"
        "print(len(said), said[0].message)"
    )
    completed = run(program)
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.startswith("1 r1kernels uses its reference implementation: r1kernels._C is missing")


def test_float64_is_announced_once(nothing_said: None) -> None:
    with pytest.warns(UserWarning, match="float64 is computed by plain PyTorch only"):
        r1kernels.token_logprobs(ROW.double(), ID)
    r1kernels.token_logprobs(ROW.double(), ID)


def test_a_request_for_the_reference_is_not_announced(nothing_said: None) -> None:
    with backend("reference"):
        r1kernels.token_logprobs(ROW.double(), ID)


# ---- tensors elsewhere ------------------------------------------------------------------------------------------

ELSEWHERE: dict[str, tuple[str, Callable[[], object]]] = {
    "token_logprobs": ("token_ids", lambda: r1kernels.token_logprobs(ROW, ID.to("meta"))),
    "cross_entropy": ("targets", lambda: r1kernels.cross_entropy(ROW, ID.to("meta"))),
    "policy_loss": ("advantages", lambda: r1kernels.policy_loss(-ROW, torch.ones(1, device="meta"))),
    "grpo_loss": (
        "token_ids", lambda: r1kernels.grpo_loss(ROW.unsqueeze(0), ID.unsqueeze(0).to("meta"), torch.ones(1))
    ),
    "group_advantages": (
        "group_ids", lambda: r1kernels.group_advantages(torch.ones(1), group_ids=ID.to("meta"))
    ),
    "kl_estimate": ("ref_logprobs", lambda: r1kernels.kl_estimate(ROW, ROW.to("meta"))),
    "distillation_loss": ("teacher_logits", lambda: r1kernels.distillation_loss(ROW, ROW.to("meta"))),
    "linear_token_logprobs": (
        "weight", lambda: r1kernels.linear_token_logprobs(ROW, torch.ones(3, 4, device="meta"), ID)
    ),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_tensors_on_different_devices_are_refused(name: str) -> None:
    argument, operation = ELSEWHERE[name]
    with pytest.raises(ValueError, match=f"{argument} is on meta, expected cpu"):
        operation()


# ---- errors from kernels and tracing ------------------------------------------------------------------------


def test_a_bad_value_found_by_a_kernel_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"^token_ids\[0\] is 4, expected an id in \[0, 4\)"):
        r1kernels.token_logprobs(ROW, torch.tensor([4]))


def test_other_errors_of_an_operator_pass_unchanged() -> None:
    def op(*_: object) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        _library.call(op)


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_fake_tensors_are_served_by_shapes_alone(device: str, nothing_said: None) -> None:
    with FakeTensorMode():
        assert _dispatch.select(torch.empty(2, device=device)) == "cpu"


def test_every_operator_has_a_schema_and_a_kernel() -> None:
    for name in (*_dispatch.OPS, "token_stats_backward"):
        operator = getattr(torch.ops.r1kernels, name).default
        assert operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.CPU)
        assert not operator._schema.is_mutable

"""Who serves a GPU, on a machine that has none: Triton, CUDA, and what is said where either is missing."""

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from library_cases import ID, OPERATIONS, ROW, run

import r1kernels
from r1kernels import _dispatch, _library, backend

# ---- Triton without a GPU -----------------------------------------------------------------------------------


@pytest.fixture
def not_looked_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a fresh process: no device has been asked for yet, no warning given."""
    monkeypatch.setattr(_dispatch, "_warned", set())
    monkeypatch.setattr(_library, "_missing", {})


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch, not_looked_yet: None) -> None:
    """Nor CUDA kernels, which would stand in."""
    monkeypatch.setattr(_library, "_cuda_missing", {"cuda": "built without CUDA"})
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, not_looked_yet: None) -> Callable[..., None]:
    """Pretends to NVIDIA GPUs of some capabilities, and to an extension that was built without CUDA."""
    monkeypatch.setattr(_library, "_cuda_missing", {"cuda": "built without CUDA"})

    def pretend(*capabilities: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "GPU {}.{}".format(*capabilities[i]))

    return pretend


@pytest.mark.parametrize("dtype", _library.NATIVE_DTYPES)
@pytest.mark.parametrize("name", ["auto", "triton"])
def test_triton_serves_gpus(name: str, dtype: torch.dtype, gpus: Callable[..., None]) -> None:
    gpus((9, 0), (8, 0), (12, 0))
    with backend(name):
        choice = _dispatch.choose("kernels", "cuda", dtype)
    assert (choice.implementation, choice.slow) == ("triton", False)


def test_importing_does_not_import_triton() -> None:
    program = (
        "import sys, torch; before = 'triton' in sys.modules\n"
        "import r1kernels; r1kernels.token_logprobs(torch.zeros(1, 4), torch.tensor([2]))\n"
        "import r1kernels.__main__; r1kernels.__main__.report()\n"
        "print(before, 'triton' in sys.modules)"
    )
    completed = run(program)
    assert completed.stdout.split() == ["False", "False"], completed.stdout + completed.stderr


def test_triton_on_request_without_triton_says_how_to_get_it(no_triton: None) -> None:
    message = (
        r"backend 'triton' was requested for a tensor on '(cpu|cuda)': Triton is not installed; "
        r"install it \(`pip install 'triton>=3\.6'`\)"
    )
    with backend("triton"):
        with pytest.raises(RuntimeError, match=message):
            r1kernels.token_logprobs(ROW, ID)
        with pytest.raises(RuntimeError, match=message):
            _dispatch.choose("kernels", "cuda", torch.float32)
    assert _dispatch.select(ROW) == "cpu"


def test_a_gpu_without_triton_is_announced_once(no_triton: None) -> None:
    class OnGPU:
        device, dtype = torch.device("cuda"), torch.float32

    with pytest.warns(UserWarning, match="reference implementation: Triton is not installed; install it .*pip") as said:
        assert _dispatch.select(OnGPU()) == "reference"
    assert len(said) == 1
    assert _dispatch.select(OnGPU()) == "reference"  # a second warning would be an error


def test_triton_on_request_for_a_tensor_of_the_cpu_is_an_error(not_looked_yet: None) -> None:
    with backend("triton"):
        for operation in OPERATIONS.values():
            with pytest.raises(RuntimeError, match="for a tensor on 'cpu': Triton has no compiler for CPUs"):
                operation()


def test_float64_on_request_of_triton_is_an_error(gpus: Callable[..., None]) -> None:
    gpus((9, 0))
    expected = r"backend 'triton' was requested for torch\.float64, expected float32, bfloat16 or float16"
    with backend("triton"), pytest.raises(TypeError, match=expected):
        _dispatch.choose("kernels", "cuda", torch.float64)
    assert _dispatch.choose("kernels", "cuda", torch.float64).implementation == "reference"


def test_an_old_gpu_is_named(gpus: Callable[..., None]) -> None:
    gpus((7, 5), (7, 0))
    reason = r"GPU 7.5 is sm_75, expected sm_80 or newer"
    assert _dispatch.choose("kernels", "cuda", torch.float32) == ("reference", reason, True)
    with backend("triton"), pytest.raises(RuntimeError, match=f"for a tensor on 'cuda': {reason}"):
        _dispatch.choose("kernels", "cuda", torch.float32)


def test_an_old_gpu_beside_a_new_one_is_refused_when_it_is_used(
    gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus((9, 0), (7, 5))
    assert _dispatch.choose("kernels", "cuda", torch.float32).implementation == "triton"
    common = pytest.importorskip("r1kernels.triton.common")
    old = SimpleNamespace(major=7, minor=5, name="GPU 7.5", multi_processor_count=40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: old)
    with pytest.raises(RuntimeError, match=r"GPU 7\.5 is sm_75, expected sm_80 or newer"):
        common.device_of_index(1)


def test_kernels_that_would_be_interpreted_do_not_serve_gpus(
    gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus((9, 0))
    monkeypatch.setattr(_library, "_TRITON_INTERPRETS", True)
    choice = _dispatch.choose("kernels", "cuda", torch.float32)
    assert choice == ("reference", "TRITON_INTERPRET is set, with which Triton compiles nothing", True)


@pytest.mark.parametrize(("arch", "served"), [("gfx942:sramecc+", True), ("gfx1100", False)])
def test_amd_gpus_are_served_by_architecture(
    arch: str, served: bool, gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus((9, 4))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(gcnArchName=arch))
    choice = _dispatch.choose("kernels", "cuda", torch.float32)
    assert choice.implementation == ("triton" if served else "reference")
    assert served or "is gfx1100, expected gfx942 or gfx950" in choice.reason


@pytest.mark.parametrize("device", ["xpu", "mps"])
def test_a_device_without_kernels_is_announced(device: str, not_looked_yet: None) -> None:
    reason = f"no kernels for device {device!r}"
    assert _dispatch.choose("kernels", device, torch.float32) == ("reference", reason, True)
    with backend("triton"), pytest.raises(RuntimeError, match=f"was requested for a tensor on {device!r}: {reason}"):
        _dispatch.choose("kernels", device, torch.float32)


def test_operators_called_directly_say_why_there_is_no_kernel(no_triton: None) -> None:
    launcher = _dispatch._gpu_launcher("token_stats")
    with pytest.raises(RuntimeError, match="r1kernels::token_stats has no kernel here: Triton is not installed"):
        launcher(ROW, ID, None, 1.0)


# ---- CUDA kernels without a GPU -----------------------------------------------------------------------------


class BuiltWithCuda:
    """An extension whose kernels run on the devices for which `missing` is empty."""

    def __init__(self, *missing: str, architectures: tuple[str, ...] = ("sm_80", "sm_90a")) -> None:
        self.missing, self.architectures = missing, architectures

    def cuda_architectures(self) -> list[str]:
        return list(self.architectures)

    def cuda_missing(self, device: int) -> str:
        return self.missing[device]


@pytest.fixture
def cuda(gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends to GPUs, each with what keeps CUDA kernels from running there."""

    def pretend(*missing: str) -> None:
        gpus(*[(9, 0)] * len(missing))
        monkeypatch.setattr(_library, "_cuda_missing", {})
        monkeypatch.setattr(_library, "extension", BuiltWithCuda(*missing))

    return pretend


class OnGpu:
    """What `gpu_kernels` looks at of a tensor of (8, 1000) bfloat16 logits on a GPU."""

    device, dtype, shape = torch.device("cuda", 0), torch.bfloat16, torch.Size([8, 1000])

    @staticmethod
    def dim() -> int:
        return 2


def test_cuda_on_request(cuda: Callable[..., None]) -> None:
    cuda("")
    with backend("cuda"):
        assert _dispatch.choose("kernels", "cuda", torch.bfloat16) == ("cuda", "requested", False)
        assert _dispatch.gpu_kernels("token_stats", OnGpu()) == "cuda"
        with pytest.raises(RuntimeError, match="there is no CUDA kernel of divergence, expected 'auto' or 'triton'"):
            _dispatch.choose("divergence", "cuda", torch.bfloat16)
        with pytest.raises(TypeError, match=r"backend 'cuda' was requested for torch\.float64"):
            _dispatch.choose("kernels", "cuda", torch.float64)


@pytest.mark.parametrize("why", ["the driver is too old; update it", "GPU 7.5 is sm_75, expected sm_80 or newer"])
def test_cuda_on_request_where_it_cannot_run_says_why(why: str, cuda: Callable[..., None]) -> None:
    cuda(why)
    with backend("cuda"), pytest.raises(RuntimeError, match=f"backend 'cuda' was requested .* on 'cuda': {why}"):
        _dispatch.choose("kernels", "cuda", torch.bfloat16)
    assert _dispatch.choose("kernels", "cuda", torch.bfloat16).implementation == "triton"
    assert _dispatch.gpu_kernels("token_stats", OnGpu()) == "triton"


def test_cuda_on_request_of_an_extension_without_it(cuda: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    cuda("built without CUDA: nvcc was not found; install it and build again")
    monkeypatch.setattr(_library.extension, "architectures", ())
    with backend("cuda"), pytest.raises(RuntimeError, match="nvcc was not found; install it"):
        _dispatch.choose("kernels", "cuda", torch.bfloat16)


def test_cuda_on_request_for_a_tensor_of_the_cpu_is_an_error() -> None:
    with backend("cuda"):
        for operation in OPERATIONS.values():
            with pytest.raises(RuntimeError, match="for a tensor on 'cpu': CUDA kernels run on NVIDIA GPUs"):
                operation()


def test_one_gpu_that_cuda_serves_is_enough(cuda: Callable[..., None]) -> None:
    cuda("GPU 7.5 is sm_75, expected sm_80 or newer", "")
    assert _library.cuda_missing("cuda") == ""


def test_cuda_stands_in_for_triton(cuda: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    cuda("")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    choice = _dispatch.choose("token_stats", "cuda", torch.bfloat16)
    assert (choice.implementation, choice.slow) == ("cuda", False)
    assert choice.reason.startswith("compiled ahead of time; Triton is not installed")
    assert _dispatch.gpu_kernels("grpo_step", OnGpu()) == "cuda"
    divergence = _dispatch.choose("divergence", "cuda", torch.bfloat16)
    assert (divergence.implementation, divergence.slow) == ("reference", True)


@pytest.mark.parametrize("faster", [True, False])
def test_a_table_decides_between_cuda_and_triton(
    faster: bool, cuda: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(_dispatch._choice, "cuda_is_faster", lambda *about: asked.append(about) or faster)
    cuda("")
    _dispatch._device_name.cache_clear()
    expected = "cuda" if faster else "triton"
    assert _dispatch.gpu_kernels("token_stats", OnGpu()) == expected
    assert _dispatch.gpu_kernels("grpo_step", OnGpu()) == expected
    assert asked == [(name, "GPU 9.0", torch.bfloat16, 1000) for name in ("token_stats", "grpo_step")]
    assert _dispatch.gpu_kernels("divergence", OnGpu()) == "triton"
    with backend("triton"):
        assert _dispatch.gpu_kernels("grpo_step", OnGpu()) == "triton"
    _dispatch._device_name.cache_clear()

"""Loads the compiled extension, says what is missing, and runs operators.

All kernels of all backends are registered under the operators of `r1kernels._schemas`, per dispatch key: those of the
CPU by the extension, those of GPUs by `r1kernels._dispatch`. Autograd is in `r1kernels.ops`. `reference` is not
registered: it is plain differentiable PyTorch in the same files.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from r1kernels import _memory
from r1kernels._schemas import LIBRARY, NAMESPACE, TRACED

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# ---- the compiled extension -------------------------------------------------------------------------------

HOW_TO_BUILD = "build it with `make` in a source tree (needs g++), or install a wheel: `make wheel`"


def _load_extension() -> tuple[Any, str]:
    try:
        return importlib.import_module("r1kernels._C"), ""
    except ImportError as error:
        return None, str(error)


# The Triton interpreter (`TRITON_INTERPRET=1`) runs GPU kernels on CPU tensors, for tests. With
# `R1KERNELS_BACKEND=triton`, they replace the compiled extension in the whole process.
_TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
INTERPRETED = _TRITON_INTERPRETS and os.environ.get("R1KERNELS_BACKEND") == "triton"
# The CUDA kernels of an emulator library, given by its path, replace the extension in the same way, also for tests.
_EMULATOR = os.environ.get("R1KERNELS_CUDA_EMULATOR", "")
EMULATED = bool(_EMULATOR) and os.environ.get("R1KERNELS_BACKEND") == "cuda"
if INTERPRETED or EMULATED:
    extension, extension_error = None, f"the {'CUDA emulator' if EMULATED else 'Triton interpreter'} takes its place"
else:
    extension, extension_error = _load_extension()
if EMULATED:
    torch.ops.load_library(_EMULATOR)
GPU_KERNELS_ON = "cpu" if INTERPRETED or EMULATED else "cuda"


# ---- what is missing --------------------------------------------------------------------------------------

HOW_TO_GET_TRITON = "install it (`pip install 'triton>=3.6'`); GPU builds of torch come with it"
OLDEST_CAPABILITY, AMD_ARCHITECTURES = (8, 0), ("gfx942", "gfx950")


def no_extension() -> str:
    return f"r1kernels._C is missing ({extension_error}); {HOW_TO_BUILD}"


_missing: dict[str, str] = {}
_cuda_missing: dict[str, str] = {}


def triton_missing(device_type: str) -> str:
    """Why the Triton kernels cannot serve a kind of device; empty if they can."""
    if device_type == "meta" or torch.compiler.is_compiling():
        return _missing.get(device_type, "")  # a launcher checks again before it runs
    if device_type not in _missing:
        _missing[device_type] = _why_no_triton(device_type)
    return _missing[device_type]


def _why_no_triton(device_type: str) -> str:
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed; {HOW_TO_GET_TRITON}"
    if device_type == "cpu":
        how = "TRITON_INTERPRET=1 with R1KERNELS_BACKEND=triton interprets them, for tests"
        return "" if INTERPRETED else f"Triton has no compiler for CPUs ({how})"
    if device_type != "cuda":  # torch calls AMD GPUs "cuda" too
        return f"no kernels for device {device_type!r}"
    if _TRITON_INTERPRETS:
        return "TRITON_INTERPRET is set, with which Triton compiles nothing"
    reasons = [_unsupported(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    # Beside a device that they serve, another is refused when a kernel is launched there.
    return reasons[0] if reasons and all(reasons) else ""


def _unsupported(index: int) -> str:
    """Why the kernels do not support a device; empty if they do."""
    name = torch.cuda.get_device_name(index)
    if torch.version.hip is not None:
        arch = torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
        return "" if arch in AMD_ARCHITECTURES else f"{name} is {arch}, expected {' or '.join(AMD_ARCHITECTURES)}"
    capability = torch.cuda.get_device_capability(index)
    if capability >= OLDEST_CAPABILITY:
        return ""
    return "{} is sm_{}{}, expected sm_{}{} or newer".format(name, *capability, *OLDEST_CAPABILITY)


def cuda_missing(device_type: str) -> str:
    """Why the CUDA kernels cannot serve a kind of device; empty if they can."""
    if device_type == "meta" or torch.compiler.is_compiling():
        return _cuda_missing.get(device_type, "")
    if device_type not in _cuda_missing:
        _cuda_missing[device_type] = _why_no_cuda(device_type)
    return _cuda_missing[device_type]


def _why_no_cuda(device_type: str) -> str:
    if device_type == "cpu":
        return "" if EMULATED else "CUDA kernels run on NVIDIA GPUs; move the tensors to one, or use 'auto'"
    if device_type != "cuda":
        return f"no kernels for device {device_type!r}"
    if torch.version.hip is not None:
        return "CUDA kernels run on NVIDIA GPUs, but torch is built for AMD GPUs; use 'triton'"
    if extension is None:
        return no_extension()
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not extension.cuda_architectures() or not devices:
        return "" if extension.cuda_architectures() else extension.cuda_missing(0)
    reasons = [extension.cuda_missing(i) for i in range(devices)]
    # Beside a device that they serve, another is refused when a kernel is launched there.
    return reasons[0] if all(reasons) else ""


# ---- memory -----------------------------------------------------------------------------------------------


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty for results and buffers that may be large. On a CPU they get memory that earlier calls gave back."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=device)
    result = torch.empty(0, dtype=dtype)
    return torch.empty(shape, dtype=dtype) if isinstance(result, FakeTensor) else _memory.empty(shape, dtype)


def _token_stats_backward(
    logits: Tensor, token_ids: Tensor, lse: Tensor, entropy: Tensor, grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None, temperature: float, *more: Tensor | None,
) -> Tensor:
    out = empty(*logits.shape, dtype=logits.dtype, device=logits.device)
    torch.ops.r1kernels.token_stats_backward_out.default(
        logits, token_ids, lse, entropy, grad_logprobs, grad_entropy, temperature, None, 0.0, None, out, *more
    )
    return out


if extension is not None:
    LIBRARY.impl("token_stats_backward", _token_stats_backward, "CPU")


def release_workspace() -> None:
    """Gives the memory that CPU kernels keep between calls back to the system.

    Large results and buffers (1 MiB and more: chunks of logits, gradients of a head) are allocated from memory that
    earlier calls no longer use. At most 4 GiB, or an eighth of the machine's memory if that is less, is kept. What
    matrix products keep for packed operands is freed, too.
    """
    _memory.release()
    if extension is not None:
        extension.release_workspace()


def has_fast_bf16(device: torch.device | str = "cpu") -> bool:
    """Whether products of bfloat16 matrices are several times faster than those of float32 matrices.

    Args:
        device: a CPU, which needs AMX, or dot products of bfloat16 (AVX-512) that are faster than those of float32;
            they are not on Intel's processors with AMX in a virtual machine that hides it. Or a GPU, which needs matrix
            units for bfloat16 (NVIDIA from compute capability 8.0, any that ROCm serves).

    Returns:
        True or False; False for other devices, for an absent GPU, and for a CPU without the compiled extension.
    """
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and extension is not None and extension.cpu_isa() in ("amx_bf16", "avx512_bf16")


# ---- how an operator is run -------------------------------------------------------------------------------


def call(op: Any, *args: Any) -> Any:
    """Runs an operator. A bad value that a kernel finds raises ValueError, as the checks in Python do."""
    if torch.compiler.is_compiling():
        return run(op, *args)
    try:
        return op(*args)
    except RuntimeError as error:
        message = str(error).partition("\n")[0]
        marker = f"{NAMESPACE}: "
        if marker not in message:
            raise
        raise ValueError(message[message.index(marker) + len(marker) :]) from None


def run(op: Any, *args: Any) -> Any:
    """Runs an operator in a backward, or in a graph: one graph serves all values of a number that changes."""
    if not torch.compiler.is_compiling():
        return op(*args)
    from torch.fx.experimental.symbolic_shapes import has_static_value  # imports sympy

    at = [i for i, value in enumerate(args) if isinstance(value, float) and not has_static_value(value)]
    if not at:
        return op(*args)
    values = [as_tensor(args[i], torch.float64, torch.device("cpu")) for i in at]
    args = tuple(1.0 if i in at else value for i, value in enumerate(args))
    return getattr(torch.ops.r1kernels, f"{op._opname}_traced").default(at, values, *args)


def as_tensor(number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a 0-d tensor, without a synchronisation."""
    if torch.compiler.is_compiling():  # a graph keeps a number as a variable in products, and not in torch.full
        return (torch.ones((), dtype=torch.float64, device=device) * number).to(dtype)
    return torch.full((), number, dtype=dtype, device=device)


def _traced(name: str) -> Callable[..., Any]:
    def run(at: list[int], values: list[Tensor], *args: Any) -> Any:
        numbers = dict(zip(at, (value.item() for value in values), strict=True))
        return getattr(torch.ops.r1kernels, name).default(*(numbers.get(i, arg) for i, arg in enumerate(args)))

    return run


for _name in TRACED:
    LIBRARY.impl(f"{_name}_traced", _traced(_name), "CompositeExplicitAutograd")

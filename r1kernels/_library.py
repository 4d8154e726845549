"""Loads the compiled extension, registers the GPU kernels, and chooses the implementation that serves a call.

All kernels of all backends are registered under the operators of `r1kernels._schemas`, per dispatch key. Autograd is in
`r1kernels.ops`. `reference` is not registered: it is plain differentiable PyTorch in the same files.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from r1kernels import _choice, _memory
from r1kernels._operator_checks import CHECKS
from r1kernels._schemas import CUDA_NAMESPACE, CUDA_OPERATORS, LIBRARY, NAMESPACE, TRACED

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
OPS = ("token_stats", "policy_loss", "group_advantages", "kl_estimate", "divergence")
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
_GPU_KERNELS_ON = "cpu" if INTERPRETED or EMULATED else "cuda"


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty for results and buffers that may be large. On a CPU they get memory that earlier calls gave back."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=device)
    result = torch.empty(0, dtype=dtype)
    return torch.empty(shape, dtype=dtype) if isinstance(result, FakeTensor) else _memory.empty(shape, dtype)


# ---- the kernels of GPUs ----------------------------------------------------------------------------------

TRITON_OPERATORS = {
    "token_stats": "token_stats",
    "token_stats_backward": "token_stats_backward",
    "token_stats_backward_out": "token_stats_backward",
    "policy_loss": "policy_loss",
    "group_advantages": "group_advantages",
    "kl_estimate": "kl_estimate",
    "divergence": "divergence",
    "divergence_backward": "divergence",
    "linear_statistics": "linear_statistics",
    "scaled": "scaled",
}
HOW_TO_GET_TRITON = "install it (`pip install 'r1kernels[triton]'`); GPU builds of torch come with it"
OLDEST_CAPABILITY, AMD_ARCHITECTURES = (8, 0), ("gfx942", "gfx950")


def _gpu_launcher(name: str) -> Callable[..., Any]:
    """Imports Triton's kernels when an operator first runs, so that `import r1kernels` does not import a compiler."""

    def run(*args: Any) -> Any:
        if name not in TRITON_OPERATORS or gpu_kernels(name, args[0]) == "cuda":
            return getattr(getattr(torch.ops, CUDA_NAMESPACE), name).default(*args)
        missing = triton_missing(_GPU_KERNELS_ON)
        if missing:
            raise RuntimeError(f"{NAMESPACE}::{name} has no kernel here: {missing}")
        CHECKS[name](*args)
        return getattr(importlib.import_module(f"r1kernels.triton.{TRITON_OPERATORS[name]}"), name)(*args)

    return run


def gpu_kernels(operator: str, like: Tensor) -> str:
    """"cuda" or "triton": whose kernel runs an operator on a GPU. CUDA runs if it is the faster or the only one.

    Args:
        like: the operator's first argument. The speed depends on its dtype and its last dimension.
    """
    kind = like.device.type
    if operator not in CUDA_OPERATORS or _requested == "triton":
        return "triton"
    if _requested == "cuda":
        return "cuda"
    if cuda_missing(kind):
        return "triton"
    if triton_missing(kind):
        return "cuda"
    vocab = like.shape[-1] if like.dim() else None
    faster = kind == "cuda" and _choice.cuda_is_faster(operator, _device_name(like.device.index), like.dtype, vocab)
    return "cuda" if faster else "triton"


@functools.cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


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
        return f"r1kernels._C is missing ({extension_error}); {HOW_TO_BUILD}"
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not extension.cuda_architectures() or not devices:
        return "" if extension.cuda_architectures() else extension.cuda_missing(0)
    reasons = [extension.cuda_missing(i) for i in range(devices)]
    # Beside a device that they serve, another is refused when a kernel is launched there.
    return reasons[0] if all(reasons) else ""


for _name in dict.fromkeys((*TRITON_OPERATORS, *CUDA_OPERATORS)):
    LIBRARY.impl(_name, _gpu_launcher(_name), _GPU_KERNELS_ON.upper())


def _token_stats_backward(
    logits: Tensor, token_ids: Tensor, lse: Tensor, entropy: Tensor, grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None, temperature: float,
) -> Tensor:
    out = empty(*logits.shape, dtype=logits.dtype, device=logits.device)
    torch.ops.r1kernels.token_stats_backward_out.default(
        logits, token_ids, lse, entropy, grad_logprobs, grad_entropy, temperature, None, 0.0, None, out
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
        device: a CPU, which needs AMX or AVX-512 with bfloat16; or a GPU, which needs matrix units for bfloat16 (NVIDIA
            from compute capability 8.0, any that ROCm serves).

    Returns:
        True or False; False for other devices, for an absent GPU, and for a CPU without the compiled extension.
    """
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and extension is not None and extension.cpu_isa() in ("amx_bf16", "avx512_bf16")


# ---- which implementation serves a call -------------------------------------------------------------------


def _checked_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


_requested = _checked_backend(os.environ.get("R1KERNELS_BACKEND") or "auto", "R1KERNELS_BACKEND")
_warned: set[str] = set()


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Serve every operation from one implementation inside a `with` block.

    Args:
        name: "auto" (the fastest for the tensor's device), "reference" (plain PyTorch, any device, also
            float64), "cpu" (the compiled kernels), "triton" or "cuda" (GPU kernels). The environment variable
            `R1KERNELS_BACKEND`, which is read at import, makes the same choice. Both apply to all threads of the
            process.

    Raises:
        ValueError: unknown name.
    """
    global _requested
    previous = _requested
    _requested = _checked_backend(name, "backend")
    try:
        yield
    finally:
        _requested = previous


class Choice(NamedTuple):
    implementation: str
    reason: str
    slow: bool = False


def choose(device_type: str, dtype: torch.dtype, operator: str | None = None) -> Choice:
    """The implementation for a device and dtype, and why. Name the `operator` if not all implementations have it."""
    if _requested == "reference":
        return Choice("reference", "requested")
    if _requested == "cpu" and extension is None:
        raise RuntimeError(f"backend 'cpu' was requested but r1kernels._C is missing ({extension_error}); "
                           f"{HOW_TO_BUILD}")
    missing_there = {"triton": triton_missing, "cuda": cuda_missing}.get(_requested)
    if missing_there is not None and (missing := missing_there(device_type)):
        raise RuntimeError(f"backend {_requested!r} was requested for a tensor on {device_type!r}: {missing}")
    if _requested == "cuda" and _no_cuda_kernel(operator):
        raise RuntimeError(f"backend 'cuda' was requested: {_no_cuda_kernel(operator)}, expected 'auto' or 'triton'")
    if _requested in ("cpu", "triton", "cuda"):
        if _requested == "cpu" and device_type not in ("cpu", "meta"):
            raise ValueError(f"backend 'cpu' was requested for a tensor on {device_type!r}, expected 'cpu'")
        if dtype not in NATIVE_DTYPES:
            raise TypeError(f"backend {_requested!r} was requested for {dtype}, expected float32, bfloat16 or float16")
        return Choice(_requested, "requested")
    if dtype == torch.float64:
        return Choice("reference", "float64 is computed by plain PyTorch only", slow=True)
    if INTERPRETED or EMULATED or device_type not in ("cpu", "meta"):
        no_triton = triton_missing(device_type)
        if not no_triton:
            return Choice("triton", "compiled when first used")
        if not cuda_missing(device_type) and not _no_cuda_kernel(operator):
            return Choice("cuda", f"compiled ahead of time; {no_triton}")
        return Choice("reference", no_triton, slow=True)
    if extension is None:
        return Choice("reference", f"r1kernels._C is missing ({extension_error}); {HOW_TO_BUILD}", slow=True)
    return Choice("cpu", "compiled extension")


def _no_cuda_kernel(operator: str | None) -> str:
    return f"there is no CUDA kernel of {operator}" if operator not in (None, *CUDA_OPERATORS) else ""


def requested() -> str:
    """The requested backend: "auto" unless the environment or `backend` sets another one."""
    return _requested


def explain(device_type: str, dtype: torch.dtype, operator: str | None = None) -> Choice:
    """Like `choose`, but a request that cannot be met is a result and not an error."""
    try:
        return choose(device_type, dtype, operator)
    except (RuntimeError, ValueError, TypeError) as error:
        return Choice("error", str(error))


def select(tensor: Tensor, operator: str | None = None) -> str:
    """The name of the implementation that serves `tensor`. A slow one gives one warning per reason."""
    # A fake tensor has no memory on its device: only the operators' shape functions serve it, as on the meta device.
    device_type = "meta" if isinstance(tensor, FakeTensor) else tensor.device.type
    choice = choose(device_type, tensor.dtype, operator)
    if choice.slow and choice.reason not in _warned and not torch.compiler.is_compiling():
        _warned.add(choice.reason)
        warnings.warn(f"r1kernels uses its reference implementation: {choice.reason}", stacklevel=3)
    return choice.implementation


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

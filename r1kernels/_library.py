"""The schema page: declares the operators, loads the compiled extension, chooses an implementation.

Every kernel of every backend is registered under the names below, per dispatch key; autograd lives outside, in
`r1kernels.ops`. `reference` is not registered here: it is plain differentiable PyTorch in the same files.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

BACKENDS = ("auto", "reference", "cpu", "triton")
OPS = ("token_stats", "policy_loss", "group_advantages", "kl_estimate", "divergence")
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# ---- schemas ----------------------------------------------------------------------------------------------

_NAMESPACE = "r1kernels"
_schemas = torch.library.Library(_NAMESPACE, "DEF")

# (..., V), (...) -> log-prob, log-sum-exp and entropy (float64), each (...). Masked rows are not read and give 0.
# `temperatures` (...) float32 multiply `temperature`.
_schemas.define(
    "token_stats(Tensor logits, Tensor token_ids, Tensor? mask, float temperature, Tensor? temperatures=None) "
    "-> (Tensor, Tensor, Tensor)"
)
# d logits (..., V) from dL/dlogprob and dL/dentropy (...); rows where both are 0 are not read and give 0.
_schemas.define(
    "token_stats_backward(Tensor logits, Tensor token_ids, Tensor lse, Tensor entropy, "
    "Tensor? grad_logprobs, Tensor? grad_entropy, float temperature) -> Tensor"
)
# The same of (N, V) logits into `out`, of their dtype or narrower: fresh memory, or the logits' own, row for row.
# softcap > 0: the logits are softcap * tanh(u / softcap), and the gradient is that of u. With `rows` (R,), ascending,
# only those are computed, and moved to the top of `out`.
_schemas.define(
    "token_stats_backward_out(Tensor logits, Tensor token_ids, Tensor lse, Tensor entropy, Tensor? grad_logprobs, "
    "Tensor? grad_entropy, float temperature, Tensor? temperatures, float softcap, Tensor? rows, Tensor(a!) out) -> ()"
)
# -> loss (), dloss/dlogprob (...), dloss/dentropy (...) or (0,) where entropy_coef is 0, metrics (METRICS,).
_schemas.define(
    "policy_loss(Tensor logprobs, Tensor advantages, Tensor? old_logprobs, Tensor? ref_logprobs, "
    "Tensor? entropy, Tensor? mask, Tensor? cu_seqlens, Tensor? importance_weights, Tensor? normalizer, "
    "int surrogate, int ratio, int kl, int aggregate, float clip_low, float clip_high, float ratio_cap, "
    "float tau_pos, float tau_neg, float kl_coef, float entropy_coef, float max_length) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
# The head of r1kernels.ops.linear_head: hidden (..., H), then the fields of `Head`, flattened to N tokens. These run
# on every device, over its products and its two vocabulary kernels.
_HEAD = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor token_ids, "
    "Tensor? temperatures, float temperature, float logit_scale, float softcap, ScalarType logits_dtype, int rows, "
    "int capacity, bool batch_invariant"
)
# Gradients of hidden (N, H), weight (V, H), bias (V,), lora_a (H, R) and lora_b (R, V); (0,) unless needed.
_HEAD_GRADIENTS = "Tensor, Tensor, Tensor, Tensor, Tensor"
# -> log-prob, log-sum-exp and entropy (float64), each (N,).
_schemas.define(f"linear_token_stats({_HEAD}, Tensor? mask) -> (Tensor, Tensor, Tensor)")
# The same from hidden (N, H) and weight (V, H), rows of adjacent entries, in 16 bits, without a tensor of logits.
_schemas.define(
    "linear_statistics(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? mask, float temperature, "
    "Tensor? temperatures, float logit_scale, float softcap, bool batch_invariant) -> (Tensor, Tensor, Tensor)"
)
_schemas.define(
    f"linear_token_stats_backward({_HEAD}, Tensor lse, Tensor entropy, Tensor? grad_logprobs, Tensor? grad_entropy, "
    f"bool[] needs) -> ({_HEAD_GRADIENTS})"
)
# -> log-prob and entropy (N,), and the gradients of sum_t weights_t loss_t of an objective of single tokens.
_schemas.define(
    f"linear_policy_gradient({_HEAD}, Tensor? mask, Tensor weights, Tensor advantages, Tensor? old_logprobs, "
    "Tensor? ref_logprobs, Tensor? importance_weights, int surrogate, int kl, float[] coefficients, bool[] needs) "
    f"-> (Tensor, Tensor, {_HEAD_GRADIENTS})"
)
_schemas.define(
    "group_advantages(Tensor rewards, Tensor? group_ids, int group_size, int scale, int ddof, float eps) -> Tensor"
)
# -> the estimate and its derivative with respect to logprobs.
_schemas.define("kl_estimate(Tensor logprobs, Tensor ref_logprobs, int estimator) -> (Tensor, Tensor)")
# out = or += grad * factor (0-d), 0 where grad is 0; out may be grad. For devices whose values cost a synchronisation.
_schemas.define("scaled(Tensor grad, Tensor factor, Tensor(a!) out, bool accumulate) -> ()")
# out (M, N) fp32 = or += a (M, K) @ b (K, N), both of one dtype; an entry's bits follow from its row and column alone.
_schemas.define("gemm_f32(Tensor a, Tensor b, Tensor(a!) out, bool accumulate) -> ()")
# Student and teacher (..., V) -> per row: the divergence (float32), both log-sum-exps, the constant of its gradient and
# both entropies (float64), each (...). Masked rows are not read and give 0.
_schemas.define(
    "divergence(Tensor student, Tensor teacher, Tensor? mask, int kind, float beta, float temperature) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# d student into out (..., V), of unit stride over V; a row of out may start where the student's starts. Rows where grad
# (float32) is 0 are not read and give 0. softcap: as in token_stats_backward_out, of the student.
_schemas.define(
    "divergence_backward(Tensor student, Tensor teacher, Tensor lse_student, Tensor lse_teacher, Tensor inner, "
    "Tensor grad, int kind, float beta, float temperature, Tensor(a!) out, float softcap=0.0) -> ()"
)
# Student and teacher from hidden states. Full teachers have hidden and weight (V, H'), others ids and log-probs (N, K),
# float64. -> the rows of `linear_divergence.measures` (M, N), and the gradients of factor sum_t D_t.
_schemas.define(
    f"linear_divergence({_HEAD}, Tensor? mask, Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? teacher_lora_a, Tensor? teacher_lora_b, float teacher_logit_scale, float teacher_softcap, "
    "Tensor? teacher_token_ids, Tensor? teacher_logprobs, Tensor factor, int kind, float beta, bool[] needs) "
    f"-> (Tensor, {_HEAD_GRADIENTS})"
)

POLICY_METRICS = 15  # length of policy_loss's metrics, csrc/cpu/policy_loss.h


@torch.library.register_fake(f"{_NAMESPACE}::token_stats")
def _(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    shape = logits.shape[:-1]
    return (
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty(shape, dtype=torch.float64),
        logits.new_empty(shape, dtype=torch.float64),
    )


@torch.library.register_fake(f"{_NAMESPACE}::token_stats_backward")
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake(f"{_NAMESPACE}::token_stats_backward_out")
def _(*_: Any) -> None:
    return None


@torch.library.register_fake(f"{_NAMESPACE}::policy_loss")
def _(logprobs: Tensor, *args: Any) -> tuple[Tensor, ...]:
    entropy_coef = args[-2]
    return (
        logprobs.new_empty(()),
        logprobs.new_empty(logprobs.shape),
        logprobs.new_empty(logprobs.shape if entropy_coef != 0 else (0,)),
        logprobs.new_empty((POLICY_METRICS,)),
    )


def _per_token(token_ids: Tensor, hidden: Tensor) -> Tensor:
    return hidden.new_empty(token_ids.shape, dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)


def _head_gradients(hidden: Tensor, head: tuple[Any, ...], needs: list[bool]) -> tuple[Tensor, ...]:
    weight, bias, lora_a, lora_b, token_ids = head[:5]
    accumulator = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    whole = (
        lambda: hidden.new_empty((token_ids.numel(), weight.shape[1])),
        lambda: weight.new_empty(weight.shape, dtype=accumulator),
        lambda: bias.new_empty(bias.shape, dtype=accumulator),
        lambda: lora_a.new_empty(lora_a.shape, dtype=accumulator),
        lambda: lora_b.new_empty(lora_b.shape, dtype=accumulator),
    )
    return tuple(
        make() if needed else hidden.new_empty((0,), dtype=torch.float32)
        for make, needed in zip(whole, needs, strict=True)
    )


@torch.library.register_fake(f"{_NAMESPACE}::linear_token_stats")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    ids = args[4]
    statistics = (hidden.new_empty(ids.shape, dtype=torch.float64) for _ in range(2))
    return _per_token(ids, hidden), *statistics


@torch.library.register_fake(f"{_NAMESPACE}::linear_statistics")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    ids = args[2]
    statistics = (hidden.new_empty(ids.shape, dtype=torch.float64) for _ in range(2))
    return _per_token(ids, hidden), *statistics


@torch.library.register_fake(f"{_NAMESPACE}::linear_token_stats_backward")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _head_gradients(hidden, args, args[-1])


@torch.library.register_fake(f"{_NAMESPACE}::linear_policy_gradient")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    ids = args[4]
    return _per_token(ids, hidden), _per_token(ids, hidden), *_head_gradients(hidden, args, args[-1])


@torch.library.register_fake(f"{_NAMESPACE}::group_advantages")
def _(rewards: Tensor, *_: Any) -> Tensor:
    return rewards.new_empty(rewards.shape)


@torch.library.register_fake(f"{_NAMESPACE}::kl_estimate")
def _(logprobs: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return logprobs.new_empty(logprobs.shape), logprobs.new_empty(logprobs.shape)


@torch.library.register_fake(f"{_NAMESPACE}::gemm_f32")
def _(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    return None


@torch.library.register_fake(f"{_NAMESPACE}::scaled")
def _(*_: Any) -> None:
    return None


@torch.library.register_fake(f"{_NAMESPACE}::divergence")
def _(student: Tensor, *_: Any) -> tuple[Tensor, ...]:
    shape = student.shape[:-1]
    statistics = [student.new_empty(shape, dtype=torch.float64) for _ in range(5)]
    return student.new_empty(shape, dtype=torch.float32), *statistics


@torch.library.register_fake(f"{_NAMESPACE}::divergence_backward")
def _(*_: Any) -> None:
    return None


@torch.library.register_fake(f"{_NAMESPACE}::linear_divergence")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    ids, teacher_hidden = args[4], args[14]
    wide = torch.float64 in (hidden.dtype, torch.float32 if teacher_hidden is None else teacher_hidden.dtype)
    measured = hidden.new_empty(
        (4 if teacher_hidden is None else 3, ids.numel()), dtype=torch.float64 if wide else torch.float32
    )
    return measured, *_head_gradients(hidden, args, args[-1])


# ---- the compiled extension -------------------------------------------------------------------------------

HOW_TO_BUILD = "build it with `make` in a source tree (needs g++), or install a wheel: `make wheel`"


def _load_extension() -> tuple[Any, str]:
    try:
        return importlib.import_module("r1kernels._C"), ""
    except ImportError as error:
        return None, str(error)


# The Triton interpreter (`TRITON_INTERPRET=1`) runs GPU kernels on CPU tensors, for tests: asked for by
# `R1KERNELS_BACKEND=triton`, they take the place of the compiled extension in the whole process.
_TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
INTERPRETED = _TRITON_INTERPRETS and os.environ.get("R1KERNELS_BACKEND") == "triton"
extension, extension_error = (None, "the Triton interpreter takes its place") if INTERPRETED else _load_extension()


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty for large results: on a CPU the faults of small pages would cost as much as the arithmetic."""
    result = torch.empty(shape, dtype=dtype, device=device)
    real = not torch.compiler.is_compiling() and not isinstance(result, FakeTensor)
    if real and result.device.type == "cpu" and extension is not None:
        extension.prefer_huge_pages(result.data_ptr(), result.nbytes)
    return result


def converted(value: Tensor, dtype: torch.dtype) -> Tensor:
    """value.to(dtype), into memory as that of `empty`."""
    return empty(*value.shape, dtype=dtype, device=value.device).copy_(value)


# ---- the Triton kernels -----------------------------------------------------------------------------------

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


def _triton_launcher(name: str, module: str) -> Callable[..., Any]:
    """Imports the kernels when an operator first runs: importing the library does not import a compiler."""

    def run(*args: Any) -> Any:
        missing = triton_missing("cpu" if INTERPRETED else "cuda")
        if missing:
            raise RuntimeError(f"r1kernels::{name} has no kernel here: {missing}")
        return getattr(importlib.import_module(f"r1kernels.triton.{module}"), name)(*args)

    return run


_missing: dict[str, str] = {}


def triton_missing(device_type: str) -> str:
    """Why the Triton kernels cannot serve a kind of device; empty where they can."""
    if device_type == "meta" or torch.compiler.is_compiling():
        return _missing.get(device_type, "")  # a launcher looks again before it runs
    if device_type not in _missing:
        _missing[device_type] = _why_no_triton(device_type)
    return _missing[device_type]


def _why_no_triton(device_type: str) -> str:
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed; {HOW_TO_GET_TRITON}"
    if device_type == "cpu":
        how = "TRITON_INTERPRET=1 with R1KERNELS_BACKEND=triton interprets them, for tests"
        return "" if INTERPRETED else f"Triton has no compiler for CPUs ({how})"
    if device_type != "cuda":  # that of AMD GPUs as well
        return f"no kernels for device {device_type!r}"
    if _TRITON_INTERPRETS:
        return "TRITON_INTERPRET is set, with which Triton compiles nothing"
    reasons = [_unsupported(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    # Beside a device that they serve, another is refused when a kernel is launched there.
    return reasons[0] if reasons and all(reasons) else ""


def _unsupported(index: int) -> str:
    """Why a device is none of those the kernels are compiled for."""
    name = torch.cuda.get_device_name(index)
    if torch.version.hip is not None:
        arch = torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
        return "" if arch in AMD_ARCHITECTURES else f"{name} is {arch}, expected {' or '.join(AMD_ARCHITECTURES)}"
    capability = torch.cuda.get_device_capability(index)
    if capability >= OLDEST_CAPABILITY:
        return ""
    return "{} is sm_{}{}, expected sm_{}{} or newer".format(name, *capability, *OLDEST_CAPABILITY)


for _name, _module in TRITON_OPERATORS.items():
    _schemas.impl(_name, _triton_launcher(_name, _module), "CPU" if INTERPRETED else "CUDA")


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
            float64), "cpu" (the compiled kernels) or "triton" (those of GPUs). The environment variable
            `R1KERNELS_BACKEND`, read at import, sets the same choice; either holds for the whole process, all
            threads included.

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


def choose(device_type: str, dtype: torch.dtype) -> Choice:
    """The implementation for a device and dtype, and why. The one place where this is decided."""
    if _requested == "reference":
        return Choice("reference", "requested")
    if _requested == "cpu" and extension is None:
        raise RuntimeError(f"backend 'cpu' was requested but r1kernels._C is missing ({extension_error}); "
                           f"{HOW_TO_BUILD}")
    if _requested == "triton":
        missing = triton_missing(device_type)
        if missing:
            raise RuntimeError(f"backend 'triton' was requested for a tensor on {device_type!r}: {missing}")
    if _requested in ("cpu", "triton"):
        if _requested == "cpu" and device_type not in ("cpu", "meta"):
            raise ValueError(f"backend 'cpu' was requested for a tensor on {device_type!r}, expected 'cpu'")
        if dtype not in NATIVE_DTYPES:
            raise TypeError(f"backend {_requested!r} was requested for {dtype}, expected float32, bfloat16 or float16")
        return Choice(_requested, "requested")
    if dtype == torch.float64:
        return Choice("reference", "float64 is computed by plain PyTorch only", slow=True)
    if INTERPRETED or device_type not in ("cpu", "meta"):
        missing = triton_missing(device_type)
        return Choice("reference", missing, slow=True) if missing else Choice("triton", "compiled when first used")
    if extension is None:
        return Choice("reference", f"r1kernels._C is missing ({extension_error}); {HOW_TO_BUILD}", slow=True)
    return Choice("cpu", "compiled extension")


def requested() -> str:
    """The backend asked for, "auto" unless the environment or `backend` says otherwise."""
    return _requested


def explain(device_type: str, dtype: torch.dtype) -> Choice:
    """`choose`, with a request that cannot be met as an answer instead of an error."""
    try:
        return choose(device_type, dtype)
    except (RuntimeError, ValueError, TypeError) as error:
        return Choice("error", str(error))


def select(tensor: Tensor) -> str:
    """Name of the implementation that serves `tensor`; a slow one is announced once per reason."""
    # A fake tensor has no memory wherever it claims to be: the operators' shapes serve it, as they serve meta.
    device_type = "meta" if isinstance(tensor, FakeTensor) else tensor.device.type
    choice = choose(device_type, tensor.dtype)
    if choice.slow and choice.reason not in _warned and not torch.compiler.is_compiling():
        _warned.add(choice.reason)
        warnings.warn(f"r1kernels uses its reference implementation: {choice.reason}", stacklevel=3)
    return choice.implementation


def call(op: Any, *args: Any) -> Any:
    """Runs an operator; a bad value found inside a kernel surfaces as ValueError, as from Python checks."""
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except RuntimeError as error:
        message = str(error).partition("\n")[0]
        marker = f"{_NAMESPACE}: "
        if marker not in message:
            raise
        raise ValueError(message[message.index(marker) + len(marker) :]) from None

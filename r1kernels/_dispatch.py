"""Decides who serves a call. `TABLE` says which implementations an operation has, and what keeps each from serving.

`choose` reads the table, and no other function decides. `python -m r1kernels` prints the table and its answers.
`backend` and the environment variable `R1KERNELS_BACKEND` replace the answer for operators.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from r1kernels import _choice, _library
from r1kernels._operator_checks import CHECKS
from r1kernels._schemas import CUDA_NAMESPACE, CUDA_OPERATORS, LIBRARY, NAMESPACE

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
OPS = ("token_stats", "policy_loss", "group_advantages", "kl_estimate", "divergence", "token_statistics")
# The operators that have a Triton kernel, and the module in r1kernels.triton that has it.
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
    "token_statistics": "token_stats",
    "support_products": "support",
    "support_grad_hidden": "support",
    "support_grad_weight": "support",
    "support_stats": "support",
    "support_stats_backward": "support",
}

# ---- the request ------------------------------------------------------------------------------------------


def _checked_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


_requested = _checked_backend(os.environ.get("R1KERNELS_BACKEND") or "auto", "R1KERNELS_BACKEND")


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


def requested() -> str:
    """The requested backend: "auto" unless the environment or `backend` sets another one."""
    return _requested


def _check_request(operation: str, device_type: str, dtype: torch.dtype) -> None:
    """Raises an error if the requested kernels cannot serve an operator on a device."""
    if _requested == "reference":
        return
    if _requested == "cpu" and _library.extension is None:
        raise RuntimeError(f"backend 'cpu' was requested but {_library.no_extension()}")
    missing_there = {"triton": _library.triton_missing, "cuda": _library.cuda_missing}.get(_requested)
    if missing_there is not None and (missing := missing_there(device_type)):
        raise RuntimeError(f"backend {_requested!r} was requested for a tensor on {device_type!r}: {missing}")
    if _requested == "cuda" and operation not in ("kernels", *CUDA_OPERATORS):
        raise RuntimeError(
            f"backend 'cuda' was requested: there is no CUDA kernel of {operation}, expected 'auto' or 'triton'"
        )
    if _requested == "cpu" and device_type not in ("cpu", "meta"):
        raise ValueError(f"backend 'cpu' was requested for a tensor on {device_type!r}, expected 'cpu'")
    if dtype not in _library.NATIVE_DTYPES:
        raise TypeError(f"backend {_requested!r} was requested for {dtype}, expected float32, bfloat16 or float16")


@functools.cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def faster_in_cuda(device_name: str) -> list[str]:
    """The operators for which CUDA kernels were measured to be faster than Triton's on a device."""
    return sorted(_choice.load(_choice.TABLE).get(device_name, {}))


# ---- the table --------------------------------------------------------------------------------------------


# Larger sets take the walk over all of the weight. By CPU time (512 tokens, 1024 x 32768, one thread), it wins from
# V / 8 in bfloat16, whose products are faster; in float32, gathered rows win up to V / 4, but keep 20 bytes an id.
SUPPORT_SHARE = 16


class Choice(NamedTuple):
    """The name of an implementation, what it is or why it serves, and whether its use is worth a warning."""

    implementation: str
    reason: str
    slow: bool = False


class Server(NamedTuple):
    """An implementation of an operation.

    Attributes:
        choice: the answer if it is the first that serves.
        unless: each reason for which it does not serve, and whether the reason holds for the facts of a call. A
            function may return a text that tells more than the reason.
    """

    choice: Choice
    unless: tuple[tuple[str, Callable[..., bool | str]], ...]


def _server(
    name: str, about: str, unless: dict[str, Callable[..., bool | str]] | None = None, slow: bool = False
) -> Server:
    return Server(Choice(name, about, slow), tuple((unless or {}).items()))


ELSEWHERE = "the tensor is on another kind of device"  # no reason that anybody must be told
FLOAT64 = "float64 is computed by plain PyTorch only"


def _is_float64(device_type: str, dtype: torch.dtype) -> bool:
    return dtype == torch.float64


def _uses_gpu_kernels(device_type: str, dtype: torch.dtype) -> bool:
    return device_type not in ("cpu", "meta") or _library.GPU_KERNELS_ON == "cpu"


def _operator(has_cuda_kernel: bool) -> tuple[Server, ...]:
    """Who can serve an operator. Facts: the type of the device, the dtype."""
    no_cuda_kernel = {} if has_cuda_kernel else {"there is no CUDA kernel of it": lambda device_type, dtype: True}
    return (
        _server("cpu", "compiled extension", {
            ELSEWHERE: _uses_gpu_kernels,
            FLOAT64: _is_float64,
            "the compiled extension is missing": (
                lambda device_type, dtype: _library.extension is None and _library.no_extension()
            ),
        }),
        _server("triton", "compiled when first used", {
            ELSEWHERE: lambda device_type, dtype: not _uses_gpu_kernels(device_type, dtype),
            FLOAT64: _is_float64,
            "Triton is missing, or does not serve the device": (
                lambda device_type, dtype: _library.triton_missing(device_type)
            ),
        }),
        _server("cuda", "compiled ahead of time", {
            ELSEWHERE: lambda device_type, dtype: not _uses_gpu_kernels(device_type, dtype),
            FLOAT64: _is_float64,
            **no_cuda_kernel,
            "CUDA is missing, or does not serve the device": (
                lambda device_type, dtype: _library.cuda_missing(device_type)
            ),
        }),
        _server("reference", "", slow=True),
    )


def _serves(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    return choose("kernels", device.type, dtype).implementation == name


def _is_faster_in_cuda(operator: str, like: Tensor) -> bool:
    if like.device.type != "cuda":
        return False
    vocab = like.shape[-1] if like.dim() else None
    return _choice.cuda_is_faster(operator, _device_name(like.device.index), like.dtype, vocab)


# Why gradients are not computed with a loss from hidden states. Facts: hidden, whether a gradient is wanted, the sets
# of ids or None.
_NOT_IN_ONE_PASS = {
    "no gradient is wanted": lambda hidden, wanted, support: not wanted,
    "hidden states are float16": lambda hidden, wanted, support: hidden.dtype == torch.float16,
    "log-probs are over sets of ids": lambda hidden, wanted, support: support is not None,
    "torch.compile traces the reference": (
        lambda hidden, wanted, support: torch.compiler.is_compiling() and select(hidden) == "reference"
    ),
}


def _lacks_support_kernels(tensor: Tensor) -> bool:
    return select(tensor) not in ("cpu", "triton")



TABLE: dict[str, tuple[Server, ...]] = {
    "kernels": _operator(has_cuda_kernel=True),  # of any operator
    **{name: _operator(name in CUDA_OPERATORS) for name in OPS},
    # Whose kernel a launch on a GPU takes. Facts: the operator, its first argument, and whether there are arguments
    # that no CUDA kernel takes.
    "launch": (
        _server("cuda", "CUDA", {
            "there is no CUDA kernel of the operator": lambda operator, like, more: operator not in CUDA_OPERATORS,
            "no CUDA kernel takes all arguments": lambda operator, like, more: more,
            "Triton is requested": lambda operator, like, more: _requested == "triton",
            "CUDA is missing, and not requested": (
                lambda operator, like, more: _requested != "cuda" and _library.cuda_missing(like.device.type)
            ),
            "Triton serves, CUDA is not measured to be faster, and not requested": lambda operator, like, more: (
                _requested != "cuda"
                and not _library.triton_missing(like.device.type)
                and not _is_faster_in_cuda(operator, like)
            ),
        }),
        _server("triton", "Triton"),
    ),
    # The loss and its slopes from log-probs. Facts: the log-probs, the objective.
    "policy_terms": (
        _server("kernel", "the operator policy_loss", {
            "the kernels do not know the surrogate": lambda logprobs, objective: not objective.has_kernels,
            "the reference serves log-probs": lambda logprobs, objective: select(logprobs) == "reference",
        }),
        _server("autograd", "plain PyTorch on [tokens]"),
    ),
    # `grpo_loss` from logits. Facts: logits, the checked inputs of the loss. In float16, small gradients would be
    # rounded to 0 before a loss scale can save them.
    "grpo_step": (
        _server("fused", "one CUDA kernel for statistics, loss and gradient", {
            "no GPU kernel serves the logits": lambda logits, inputs: select(logits) not in ("cuda", "triton"),
            "no gradient is wanted": lambda logits, inputs: not (logits.requires_grad and torch.is_grad_enabled()),
            "torch.compile traces the call": lambda logits, inputs: torch.compiler.is_compiling(),
            "the objective is a callable": lambda logits, inputs: callable(inputs.objective.surrogate),
            "the ratio is of sequences": lambda logits, inputs: inputs.objective.ratio != "token",
            "the entropy has other weights than the loss": lambda logits, inputs: (
                inputs.objective.aggregate == "constant" and inputs.objective.entropy_coef != 0
            ),
            "the tokens of a sequence are split over ranks": lambda logits, inputs: inputs.group is not None,
            "logits are neither float32 nor bfloat16": (
                lambda logits, inputs: logits.dtype not in (torch.float32, torch.bfloat16)
            ),
            "the CUDA kernel is not available, not requested, or not measured to be faster": (
                lambda logits, inputs: gpu_kernels("grpo_step", logits) != "cuda"
            ),
        }),
        _server("separate", "token_stats and policy_loss"),
    ),
    # Gradients of a loss from hidden states. Facts: hidden, whether a gradient is wanted, the sets of ids or None. In
    # float16, most gradients would be rounded to 0, because only the backward knows the loss scale of mixed precision.
    # The reference computes slopes by autograd, which is not available inside the operators of a compiled graph. For
    # small sets of ids, the second phase costs next to nothing.
    "linear_gradients": (
        _server("one_pass", "gradients with the loss, in one walk over the chunks", _NOT_IN_ONE_PASS),
        _server("two_phases", "statistics first, then logits again for the gradients"),
    ),
    # The same for several losses, whose factors may differ.
    "linear_multi_target": (
        _server("one_pass", "gradients with the losses, in one walk over the chunks", {
            **_NOT_IN_ONE_PASS,
            "torch.compile traces the call, before the factors are known": (
                lambda hidden, wanted, support: torch.compiler.is_compiling()
            ),
        }),
        _server("two_phases", "statistics first, then logits again for the gradients"),
    ),
    # Statistics of tokens from hidden states. Facts: hidden, the head, whether more than log-prob, log-sum-exp and
    # entropy is wanted, the sets of ids or None.
    "linear_statistics": (
        _server("fused", "one kernel without a tensor of logits", {
            "more statistics are wanted": lambda hidden, head, more, support: more,
            "hidden states are neither bfloat16 nor float16": (
                lambda hidden, head, more, support: hidden.dtype.itemsize != 2
            ),
            "hidden states and weight differ in dtype": (
                lambda hidden, head, more, support: head.weight.dtype != hidden.dtype
            ),
            "logits are rounded": lambda hidden, head, more, support: head.logits_dtype != torch.float32,
            "there is an adapter": lambda hidden, head, more, support: head.lora_a is not None,
            "log-probs are over sets of ids": lambda hidden, head, more, support: support is not None,
            "rows of the weight are not contiguous": lambda hidden, head, more, support: head.weight.stride(1) != 1,
            "this rank has no row of the vocabulary": lambda hidden, head, more, support: len(head.weight) == 0,
            "Triton does not serve hidden states": lambda hidden, head, more, support: (
                not _serves("triton", hidden.device, hidden.dtype)
            ),
        }),
        _server("chunks", "a product, then token_stats, for each chunk of rows"),
    ),
    # Sets of ids from logits. Fact: logits.
    "support_logits": (
        _server("entries", "reads and writes the entries of the sets", {
            "neither CPU kernels nor Triton serve logits": _lacks_support_kernels,
        }),
        _server("walk", "token_stats of a copy of the logits with -inf outside the sets"),
    ),
    # Small sets of ids from hidden states. Facts: hidden, the head.
    "support": (
        _server("gathered", f"rows of the weight for sets of at most V / {SUPPORT_SHARE} ids; others take the walk", {
            "neither CPU kernels nor Triton serve hidden states": lambda hidden, head: _lacks_support_kernels(hidden),
            "logits are rounded": lambda hidden, head: head.logits_dtype != torch.float32,
            "rows of the weight are not contiguous": lambda hidden, head: head.weight.stride(1) != 1,
            "a capacity forbids reading the sizes of sets on the device": (
                lambda hidden, head: head.capacity >= 0 and hidden.device.type != "cpu"
            ),
        }),
        _server("walk", "logits of -inf outside the sets, chunk by chunk"),
    ),
    # Products of matrices. Facts: the device, the dtypes of both, and a function that tells whether the device's
    # library gives float32 results of 16-bit products.
    "product": (
        _server("native", "our kernel", {
            "no CPU kernel serves the operands": (
                lambda device, a, b, keeps: choose("kernels", device.type, a).implementation != "cpu"
            ),
        }),
        _server("torch", "torch", {
            "an operand has 16 bits": lambda device, a, b, keeps: a.itemsize == 2 or b.itemsize == 2,
        }),
        _server("out_dtype", "the device's library, float32 result", {
            "the operands differ in dtype": lambda device, a, b, keeps: a != b,
            "no library gives a float32 result": lambda device, a, b, keeps: device.type != "cuda" or not keeps(device),
        }),
        _server("parts", "the device's library, float32 in three bfloat16 parts", {
            "an operand is float16": lambda device, a, b, keeps: torch.float16 in (a, b),
            "no library gives a float32 result": lambda device, a, b, keeps: device.type != "cuda" or not keeps(device),
        }),
        _server("copies", "torch, float32 copies block by block"),
    ),
    # A gradient times a factor. Facts: the gradient, the result.
    "scaled": (
        _server("kernel", "one read and one write, without the factor's value on the host", {
            "torch.compile traces the call": lambda grad, out: torch.compiler.is_compiling(),
            "tensors are fake": lambda grad, out: isinstance(grad, FakeTensor),
            "the reference serves the gradient": lambda grad, out: _serves("reference", grad.device, grad.dtype),
            "a tensor is not contiguous or not aligned to 16 bytes": lambda grad, out: not all(
                tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in (grad, out)
            ),
        }),
        _server("torch", "plain PyTorch"),
    ),
}
_OPERATORS = ("kernels", *OPS)


def choose(operation: str, *facts: Any) -> Choice:
    """Who serves an operation, and why: the first server in its row of `TABLE` that no reason keeps from it.

    Args:
        operation: a key of `TABLE`, which says what the facts are.

    Raises:
        RuntimeError, ValueError, TypeError: the requested backend cannot serve this operator.
    """
    if _requested != "auto" and operation in _OPERATORS:
        _check_request(operation, *facts)
        return Choice(_requested, "requested")
    told = ""
    for choice, unless in TABLE[operation]:
        for reason, holds in unless:
            if found := holds(*facts):
                if reason != ELSEWHERE and not told:
                    told = found if isinstance(found, str) else reason
                break
        else:
            if not told:
                return choice
            name, about, slow = choice
            return Choice(name, f"{about}; {told}" if about else told, slow)
    raise AssertionError(f"the table has no last server for {operation}")


def explain(operation: str, *facts: Any) -> Choice:
    """Like `choose`, but a request that cannot be met is a result and not an error."""
    try:
        return choose(operation, *facts)
    except (RuntimeError, ValueError, TypeError) as error:
        return Choice("error", str(error))


_warned: set[str] = set()


def select(tensor: Tensor, operation: str = "kernels", *others: Tensor) -> str:
    """The name of the implementation that serves an operator of some tensors. A slow one gives one warning per reason.

    If one of the tensors is float64, the operator is one of float64.
    """
    # A fake tensor has no memory on its device: only the operators' shape functions serve it, as on the meta device.
    device_type = "meta" if isinstance(tensor, FakeTensor) else tensor.device.type
    dtype = tensor.dtype
    for other in others:
        dtype = torch.float64 if other.dtype == torch.float64 else dtype
    choice = choose(operation, device_type, dtype)
    if choice.slow and choice.reason not in _warned and not torch.compiler.is_compiling():
        _warned.add(choice.reason)
        warnings.warn(f"r1kernels uses its reference implementation: {choice.reason}", stacklevel=3)
    return choice.implementation


# ---- launches on a GPU ------------------------------------------------------------------------------------


def gpu_kernels(operator: str, like: Tensor, more: bool = False) -> str:
    """"cuda" or "triton": whose kernel a launch takes. The speed depends on dtype and last dimension of `like`.

    more: there are arguments that no CUDA kernel takes.
    """
    return choose("launch", operator, like, more).implementation


@functools.cache
def _taken_in_cuda(name: str) -> int:
    """How many arguments the CUDA kernel of an operator takes."""
    return len(getattr(getattr(torch.ops, CUDA_NAMESPACE), name).default._schema.arguments)


def _gpu_launcher(name: str) -> Callable[..., Any]:
    """Imports Triton's kernels when an operator first runs, so that `import r1kernels` does not import a compiler."""

    def run(*args: Any) -> Any:
        taken = _taken_in_cuda(name) if name in CUDA_OPERATORS else len(args)
        more = any(value is not None for value in args[taken:])
        if name not in TRITON_OPERATORS or gpu_kernels(name, args[0], more) == "cuda":
            return getattr(getattr(torch.ops, CUDA_NAMESPACE), name).default(*args[:taken])
        missing = _library.triton_missing(_library.GPU_KERNELS_ON)
        if missing:
            raise RuntimeError(f"{NAMESPACE}::{name} has no kernel here: {missing}")
        CHECKS[name](*args)
        return getattr(importlib.import_module(f"r1kernels.triton.{TRITON_OPERATORS[name]}"), name)(*args)

    return run


for _name in dict.fromkeys((*TRITON_OPERATORS, *CUDA_OPERATORS)):
    LIBRARY.impl(_name, _gpu_launcher(_name), _library.GPU_KERNELS_ON.upper())

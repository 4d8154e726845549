"""The keywords that all functions of hidden states share. They are checked here and turned into a `Head`."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from r1kernels import _library
from r1kernels.ops._checks import (
    accumulator_dtype,
    check_floating,
    check_ids_in_range,
    check_number,
    check_shape,
    check_tensor,
    ids_int64,
    values_are_free,
)
from r1kernels.ops.linear_budget import (
    CPU_BUDGET,
    GPU_BUDGET,
    BufferRows,
    gathers,
    row_bytes,
    rows_of_budget,
)
from r1kernels.ops.linear_types import Head

# Dtypes of the weight, by that of hidden states.
WEIGHT_DTYPES = {
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
    torch.float64: (torch.float64,),
}


class LinearOptions(TypedDict, total=False):
    """Keywords of the `linear_*` functions, all optional.

    Attributes:
        bias: (V,), in the dtype of hidden or of the weight, added to the logits.
        lora: (A (H, R), B (R, V)), in the dtype of hidden, a low-rank adapter next to a frozen weight: hidden @ A @ B
            is added to the logits. Multiply A or B by its scaling factor.
        logit_scale: Python number > 0 that multiplies the logits.
        softcap: Python number c > 0: the scaled logits u become c tanh(u / c).
        temperature: Python number > 0, or a tensor with one value per token (a constant: no gradient). It divides the
            logits. Use the temperature with which the tokens were sampled.
        logits_dtype: torch.float32 (default), or the dtype of hidden and weight, to reproduce an engine that rounds its
            logits.
        chunk_bytes: memory for the logits of one chunk, which sets how many rows are computed at a time. On a GPU, it
            includes memory for d logits of several chunks, which are multiplied at once. The default is the memory of
            1,024 rows, at most 1 GiB; on a GPU, of up to 4,096 rows of logits and as many of d logits, at most 1.94 GiB
            together. On a CPU, products take
            a few MiB more for each thread, and 64 MiB (or the float32 gradient of a chunk's hidden states, if that is
            larger) for sums over the vocabulary. If a product needs copies of its operands (`python -m r1kernels` says
            which), they take at most 48 MiB more, or 200 MiB for bfloat16 with float32 on a GPU.
        capacity: the largest number of active tokens (mask and zero advantages decide which tokens are active). The
            shapes of all work then do not depend on the tensors' values, and there is no synchronisation with the
            device, so a call can be captured in a CUDA graph. More active tokens raise an error: on a CPU
            immediately, on a device at the next synchronisation.
        grad_accumulation_into: (V, H), float32 or the weight's dtype. Every backward through the loss adds the
            weight's gradient, summed in float32, to this tensor (`weight.main_grad`, `weight.grad`), and returns no
            gradient for the weight. The weight must be a leaf; its hooks, and tools that use them (DDP), see no
            gradient.
        batch_invariant: the bits of a token's log-prob depend only on its hidden state: not on the batch, the size of
            a chunk or padding. With the compiled CPU kernels and float32 logits this is always true. Elsewhere, it
            computes products in blocks of 128 rows.
    """

    bias: Tensor | None
    lora: tuple[Tensor, Tensor] | None
    logit_scale: float
    softcap: float | None
    temperature: float | Tensor
    logits_dtype: torch.dtype | None
    chunk_bytes: int | None
    capacity: int | None
    grad_accumulation_into: Tensor | None
    batch_invariant: bool


class Names(NamedTuple):
    """The names of a head's arguments in error messages."""

    hidden: str = "hidden"
    weight: str = "weight"
    options: str = ""  # before the name of an option


class Differentiable:
    """The tensors of a head that may receive gradients, and the tensor that the weight's gradient is added to."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
        into: Tensor | None,
    ) -> None:
        self.tensors = (hidden, weight, bias, lora_a, lora_b)
        self.into = into

    @property
    def wanted(self) -> bool:
        """Whether any gradient will be needed."""
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in self.tensors)

    @property
    def one_pass(self) -> bool:
        """Whether gradients may be computed with the loss. In float16 most of them would be rounded to 0, because only
        the backward knows the loss scale of mixed precision. The reference computes slopes by autograd, which is not
        available inside the operators of a compiled graph."""
        hidden = self.tensors[0]
        compiled_reference = torch.compiler.is_compiling() and _library.select(hidden) == "reference"
        return self.wanted and hidden.dtype != torch.float16 and not compiled_reference


def prepare(
    hidden: Any, weight: Any, token_ids: Any, options: dict[str, Any], *, tokens: str = "token_ids",
    mask: Tensor | None = None, names: Names = Names(), extra_row_bytes: int = 0,  # noqa: B008 - frozen
) -> tuple[Differentiable, Head]:
    """Checks the arguments of a linear function.

    Returns:
        The tensors that autograd sees, and the `Head` without them (see `with_tensors`).

    Raises:
        TypeError, ValueError: naming the argument, its value and the expectation.
    """
    for name in options:
        if name not in LinearOptions.__annotations__:
            raise TypeError(f"unknown keyword {name!r}, expected one of {', '.join(LinearOptions.__annotations__)}")
    check_floating(names.hidden, hidden)
    check_floating(names.weight, weight, hidden)
    if weight.dim() != 2:
        raise ValueError(f"{names.weight} has shape {tuple(weight.shape)}, expected 2 dimensions (V, H)")
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{names.hidden} has shape {tuple(hidden.shape)} and {names.weight} (V, H) {tuple(weight.shape)}, expected "
            "the same H"
        )
    vocab, width = weight.shape
    if vocab == 0:
        raise ValueError(f"{names.weight} has shape {tuple(weight.shape)}, expected V >= 1")
    if weight.dtype not in (allowed := WEIGHT_DTYPES[hidden.dtype]):
        raise TypeError(
            f"{names.weight} has dtype {weight.dtype}, expected {' or '.join(str(dtype) for dtype in allowed)} with "
            f"{names.hidden} of {hidden.dtype}: convert one of them"
        )
    ids = ids_int64(tokens, token_ids, hidden)
    check_shape(tokens, ids, hidden.shape[:-1], f"hidden (..., H) score {tokens} (...)")
    check_ids_in_range(tokens, ids, vocab, mask)
    bias = options.get("bias")
    if bias is not None:
        check_floating(f"{names.options}bias", bias, hidden)
        check_shape(f"{names.options}bias", bias, (vocab,), f"one entry for each row of {names.weight}")
        if bias.dtype not in (hidden.dtype, weight.dtype):
            raise TypeError(
                f"{names.options}bias has dtype {bias.dtype}, expected {hidden.dtype} like {names.hidden}"
                + ("" if weight.dtype == hidden.dtype else f" or {weight.dtype} like {names.weight}")
            )
    lora_a, lora_b = _lora(options.get("lora"), hidden, weight, names)
    temperature, temperatures = _temperature(options.get("temperature", 1.0), ids, mask)
    softcap = options.get("softcap")
    logits_dtype = _logits_dtype(options.get("logits_dtype"), hidden, weight)
    invariant = options.get("batch_invariant", False)
    if not isinstance(invariant, bool):
        raise TypeError(f"batch_invariant is {invariant!r}, expected True or False")
    if invariant and logits_dtype != accumulator_dtype(hidden.dtype):
        raise ValueError(f"logits_dtype is {logits_dtype} with batch_invariant, expected float32 logits")
    scale = check_number(f"{names.options}logit_scale", options.get("logit_scale", 1.0), minimum=0.0, strict=True)
    if not 1e-30 < temperature / scale < 1e30:
        raise ValueError(
            f"temperature / {names.options}logit_scale is {temperature / scale:g}, expected a number from 1e-30 to "
            "1e30 (logits are fp32)"
        )
    full = accumulator_dtype(hidden.dtype)
    buffers = _buffers(
        options.get("chunk_bytes"),
        vocab,
        row_bytes(vocab, width, logits_dtype) + extra_row_bytes,
        row_bytes(vocab, width, hidden.dtype if weight.dtype == hidden.dtype else full),
        gathers(hidden.device.type, hidden.dtype),
    )
    head = Head(
        weight=None,
        bias=None,
        lora_a=None,
        lora_b=None,
        token_ids=ids.reshape(-1),
        temperatures=temperatures,
        temperature=temperature,
        logit_scale=scale,
        softcap=0.0 if softcap is None else check_number(f"{names.options}softcap", softcap, minimum=0.0, strict=True),
        logits_dtype=logits_dtype,
        rows=buffers.logits,
        gradient_rows=buffers.gradient,
        capacity=_capacity(options.get("capacity")),
        batch_invariant=invariant,
    )
    into = _accumulation(options.get("grad_accumulation_into"), weight)
    return Differentiable(hidden, weight, bias, lora_a, lora_b, into), head


def with_tensors(
    head: Head, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None
) -> Head:
    """The head with its tensors. autograd passes them separately; the rest of a head is constant."""
    return head._replace(weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b)


def _lora(lora: Any, hidden: Tensor, weight: Tensor, names: Names) -> tuple[Tensor | None, Tensor | None]:
    if lora is None:
        return None, None
    if not isinstance(lora, (tuple, list)) or len(lora) != 2:
        raise TypeError(f"{names.options}lora is a {type(lora).__name__}, expected a pair (A (H, R), B (R, V))")
    a, b = lora
    for name, matrix in ((f"{names.options}lora A", a), (f"{names.options}lora B", b)):
        check_floating(name, matrix, hidden)
        if matrix.dtype != hidden.dtype:
            raise TypeError(f"{name} has dtype {matrix.dtype}, expected {hidden.dtype} like {names.hidden}")
    vocab, width = weight.shape
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != width or b.shape[1] != vocab or a.shape[1] != b.shape[0]:
        raise ValueError(
            f"{names.options}lora has shapes {tuple(a.shape)} and {tuple(b.shape)}, expected (H, R) and (R, V) with "
            f"H = {width} and V = {vocab}"
        )
    return a, b


def _temperature(value: Any, ids: Tensor, mask: Tensor | None) -> tuple[float, Tensor | None]:
    if not isinstance(value, Tensor):
        number = check_number("temperature", value, minimum=0.0, strict=True)
        if not 1e-30 < number < 1e30:
            raise ValueError(f"temperature is {value!r}, expected a number from 1e-30 to 1e30 (logits are fp32)")
        return number, None
    check_floating("temperature", value, ids)
    check_shape("temperature", value, ids.shape, "one per token")
    value = value.detach().reshape(-1).float()
    if mask is not None:
        value = torch.where(mask.reshape(-1), value, 1)
    if values_are_free(value):
        bad = ~((value > 1e-30) & (value < 1e30))
        if bad.any():
            at = int(bad.nonzero()[0])
            raise ValueError(f"temperature[{at}] is {float(value[at])}, expected a number from 1e-30 to 1e30")
    return 1.0, value.contiguous()


def _logits_dtype(value: Any, hidden: Tensor, weight: Tensor) -> torch.dtype:
    full = accumulator_dtype(hidden.dtype)
    if value is None or value == full:
        return full
    if value != hidden.dtype or value != weight.dtype:
        rounded = hidden.dtype != full and weight.dtype == hidden.dtype
        choices = f"{full}, or {hidden.dtype} like hidden" if rounded else f"{full}"
        raise ValueError(f"logits_dtype is {value}, expected {choices}")
    return value


def _buffers(budget: Any, vocab: int, each: int, gradient: int, gathered: bool) -> BufferRows:
    """Rows of the buffers, which need `each` and `gradient` bytes a row."""
    gradient = gradient if gathered else 0
    if budget is None:
        default = GPU_BUDGET if gathered else CPU_BUDGET
        return rows_of_budget(default.chunk_bytes, each, gradient, default.rows)
    if isinstance(budget, bool) or not hasattr(budget, "__index__"):
        raise TypeError(f"chunk_bytes is {budget!r}, expected an integer")
    budget = operator.index(budget)
    if budget < each:
        raise ValueError(f"chunk_bytes is {budget}, expected at least {each}: one row of a vocabulary of {vocab}")
    return rows_of_budget(budget, each, gradient)


def _capacity(value: Any) -> int:
    if value is None:
        return -1
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"capacity is {value!r}, expected a positive integer")
    return value


def _accumulation(into: Any, weight: Tensor) -> Tensor | None:
    if into is None:
        return None
    check_tensor("grad_accumulation_into", into, weight)
    check_shape("grad_accumulation_into", into, tuple(weight.shape), "the shape of weight")
    choices = dict.fromkeys((accumulator_dtype(weight.dtype), weight.dtype))
    if into.dtype not in choices:
        raise TypeError(
            f"grad_accumulation_into has dtype {into.dtype}, expected {' or '.join(str(choice) for choice in choices)}"
        )
    if not weight.requires_grad:
        raise ValueError("grad_accumulation_into was given, but weight does not require grad")
    if not weight.is_leaf:
        raise ValueError("grad_accumulation_into was given, but weight is not a leaf tensor")
    if any(size > 1 and stride == 0 for size, stride in zip(into.shape, into.stride(), strict=True)):
        raise ValueError(f"grad_accumulation_into has strides {into.stride()}: it must not be an expanded tensor")
    real = not torch.compiler.is_compiling() and not isinstance(into, FakeTensor)
    if real and into.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr():
        raise ValueError("grad_accumulation_into must not share memory with weight")
    return into

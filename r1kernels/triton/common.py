"""What every Triton kernel shares: how it is declared and launched, the device, and arithmetic of a single number.

Three rules hold for every kernel of this package. An argument's value never makes a variant: `kernel` turns Triton's
specialisation off, integers are annotated int64, and what must be known at compile time is a constexpr with few
values. Offsets are 64-bit. Under the interpreter (`TRITON_INTERPRET=1`, for tests) the same lines run on the CPU:
16-bit values are widened as soon as they are loaded, and `rounded` does what a store would get wrong there.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
if INTERPRETED:  # device assertions hold there too
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)
# The interpreter multiplies 16-bit matrices wrongly and has no fused multiply-add.
UPCAST = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Layouts of rows: see `Rows.layout`.
ALIGNED, UNIT_STRIDE, STRIDED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the lowest finite float32

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.bool: "*i1",
}


# ---- declaring and launching ------------------------------------------------------------------------------


def kernel(function: Callable[..., Any]) -> Any:
    """`triton.jit` without specialisation: no argument's value or alignment compiles a variant of its own."""
    return triton.jit(do_not_specialize=_runtime_arguments(function))(function)


def checking_kernel(function: Callable[..., Any]) -> Any:
    """A `kernel` whose `tl.device_assert` is kept: for one that looks at values as it passes by.

    A failed assertion ends the process's use of the device, as those of torch's own indexing do: its message goes to
    stderr and the next synchronisation raises.
    """
    return triton.jit(do_not_specialize=_runtime_arguments(function), debug=True)(function)


def _runtime_arguments(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if "constexpr" not in str(p.annotation)]


_SCALARS = {"tl.int64": "i64", "tl.float64": "fp64", "tl.float32": "fp32"}


def signature(kernel: Any, **pointers: str) -> dict[str, str]:
    """Types of the runtime arguments of a kernel: numbers are as annotated, `pointers` gives those of tensors."""
    types = {}
    for name, parameter in inspect.signature(kernel.fn).parameters.items():
        if "constexpr" not in str(parameter.annotation):
            types[name] = pointers[name] if name in pointers else _SCALARS[parameter.annotation]
    return types


class Device(NamedTuple):
    """arch: "sm_90", "gfx942". processors: streaming multiprocessors or compute units. warp: threads of one. name: what
    the driver calls it, by which measured tables are found."""

    arch: str
    processors: int
    warp: int
    name: str = ""


@functools.cache
def device_of_index(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.partition(":")[0]
        return Device(arch, properties.multi_processor_count, 64, properties.name)
    if properties.major < 8:
        raise RuntimeError(f"{properties.name} is sm_{properties.major}{properties.minor}, expected sm_80 or newer")
    arch = f"sm_{properties.major}{properties.minor}"
    return Device(arch, properties.multi_processor_count, 32, properties.name)


def device_of(tensor: Tensor) -> Device:
    if INTERPRETED:
        return Device("sm_90", 4, 32)
    return device_of_index(tensor.device.index)


class Loop(NamedTuple):
    """What a thread of a memory-bound kernel does each time round its main loop.

    entries: of the vocabulary. loads: bytes that it asks for before it needs the first of them.
    """

    entries: int
    loads: int


class Variant(NamedTuple):
    """One compilation of a kernel: `signature` has the types of the runtime arguments (`POINTERS`, "i64", "fp64"; an
    absent tensor is a constant None), `constants` the others, `options` num_warps and num_stages.

    `expects` are instructions it must have: "wide_loads", "wide_stores" (16 bytes), "matrix" (tensor cores). `loop` is
    that of a kernel whose time is to be that of its memory.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    expects: tuple[str, ...] = ()
    loop: Loop | None = None


# What every kernel is compiled with. Without fusion, the default from Triton 3.10 on, products and sums are two
# instructions.
COMPILE_OPTIONS = {"enable_fp_fusion": True}


def launch(
    kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, num_warps: int, num_stages: int = 1,
    **constants: Any,
) -> None:
    """Runs a kernel on the device of `like`. The one place where this happens: tests see every launch here."""
    if 0 in grid:
        return
    if INTERPRETED:
        with numpy.errstate(all="ignore"):  # inf and NaN pass through here as they do through a GPU
            kernel[grid](*arguments, **constants)
        return
    with torch.cuda.device(like.device):
        kernel[grid](*arguments, **constants, num_warps=num_warps, num_stages=num_stages, **COMPILE_OPTIONS)


# ---- rows of a tensor (..., V) ----------------------------------------------------------------------------


class Rows(NamedTuple):
    """Rows of V entries: row n starts `(n // inner) * outer_stride + (n % inner) * inner_stride` entries from data."""

    data: Tensor
    count: int
    vocab: int
    inner: int
    outer_stride: int
    inner_stride: int
    vocab_stride: int

    @property
    def layout(self) -> int:
        """How entries of a row can be read: ALIGNED in 16 bytes at a time, UNIT_STRIDE or STRIDED one by one."""
        if self.vocab_stride != 1:
            return STRIDED.value
        size = self.data.element_size()
        steps = (self.data.data_ptr(), self.outer_stride * size, self.inner_stride * size)
        return UNIT_STRIDE.value if any(step % 16 for step in steps) else ALIGNED.value

    def arguments(self) -> tuple[Any, ...]:
        return self.data, self.inner, self.outer_stride, self.inner_stride, self.vocab_stride


def rows_of(tensor: Tensor) -> Rows:
    """The rows of (..., V) with any strides: a copy only where three or more dimensions defy merging."""
    merged: list[tuple[int, int]] = []  # (size, stride), outermost first
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if merged and size == 1:
            continue  # its stride says nothing
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        elif merged and merged[-1][0] == 1:
            merged[-1] = (size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return rows_of(tensor.contiguous())
    count, vocab = tensor.shape[:-1].numel(), tensor.shape[-1]
    (_, outer), (size, inner) = ([(1, 0)] * 2 + merged)[-2:]
    return Rows(tensor, count, vocab, max(size, 1), outer, inner, tensor.stride(-1))


def optional(tensor: Tensor | None, dtype: torch.dtype, other: Tensor) -> tuple[Tensor, int]:
    """A tensor that may be absent, as a pointer of one type (that of contiguous `other`) and whether to read it."""
    # One entry alone may have any stride, which `view` of another dtype refuses.
    return (other.as_strided((other.numel(),), (1,)).view(dtype), 0) if tensor is None else (tensor, 1)


@triton.jit
def row_offset(n, inner, outer_stride, inner_stride):
    """Entries from the data to row n, in 64 bits."""
    n = n.to(tl.int64)
    return (n // inner) * outer_stride + (n % inner) * inner_stride


@triton.jit
def entries(start, at, cols, vocab_stride, LAYOUT: tl.constexpr):
    """Pointers to the entries at + cols (32 bits) from `start` on; `at` is a multiple of a tile."""
    if LAYOUT == ALIGNED:
        return tl.multiple_of(start + at, 16) + cols
    elif LAYOUT == UNIT_STRIDE:
        return start + at + cols
    else:
        return start + at.to(tl.int64) * vocab_stride + cols * vocab_stride


@triton.jit
def word_entries(start, at, cols):
    """Pointers to the pairs of 16-bit entries at + 2 cols from an ALIGNED `start` on."""
    return tl.multiple_of((start + at).to(tl.pointer_type(tl.int32), bitcast=True), 16) + cols


@triton.jit
def widened(words):
    """float32 (M, 2 K) of pairs of bfloat16 (M, K): two instructions a pair, where the compiler takes three."""
    low = (words << 16).to(tl.float32, bitcast=True)
    high = (words & -65536).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(low, high), (words.shape[0], words.shape[1] * 2))


@triton.jit
def only_if(flag, mask):
    """The mask, or nothing where `flag` is 0; the interpreter would make integers of `mask & (flag != 0)`."""
    return tl.where(mask, flag, 0) != 0


@triton.jit
def is_entry(cols, at, VEC: tl.constexpr):
    """cols == at. Where an entry is in its vector the compiler knows: this takes a register a vector, not an entry."""
    return (cols // VEC == at // VEC) & (cols % VEC == at % VEC)


# ---- arithmetic of single numbers -------------------------------------------------------------------------


@triton.jit
def wide(value):
    """A number given to the kernel (a Python float under the interpreter) as a float64 scalar."""
    return tl.full((), value, tl.float64)


@triton.jit
def fma(a, b, c):
    """a b + c, rounded once."""
    if UPCAST:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def product_error(a, b, product):
    """a b - product, exactly: what rounding the product of two float32 lost."""
    if UPCAST:
        return (a.to(tl.float64) * b - product).to(tl.float32)
    else:
        return tl.fma(a, b, -product)


@triton.jit
def difference_error(a, b, difference):
    """(a - b) - difference of finite numbers, exactly (Knuth's two-sum)."""
    bb = difference - a
    return (a - (difference - bb)) - (b + bb)


@triton.jit
def expm1(x, exp_x):
    """e^x - 1 in float32 without cancellation near 0, from x and e^x; the series is exact to a rounding below 1/2."""
    series = x * (
        1.0 + x * (1 / 2.0 + x * (1 / 6.0 + x * (1 / 24.0 + x * (1 / 120.0 + x * (1 / 720.0 + x * (
            1 / 5040.0 + x * (1 / 40320.0 + x / 362880.0)))))))
    )
    return tl.where(tl.abs(x) < 0.5, series, exp_x - 1.0)


@triton.jit
def reciprocal(x, NVIDIA: tl.constexpr):
    """1 / x for a positive normal float32, to a unit in the last place."""
    if UPCAST:
        return 1.0 / x
    elif NVIDIA:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def log2(x, NVIDIA: tl.constexpr):
    """log2 of a positive normal float32: to 2^-22 between 1/2 and 2, to two units in the last place elsewhere."""
    if UPCAST:
        return tl.log2(x)
    elif NVIDIA:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 to `dtype`, to nearest even; the interpreter would cut a bfloat16 off."""
    if UPCAST and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(x == x, nearest.to(tl.float32, bitcast=True), x).to(dtype)
    else:
        return x.to(dtype)

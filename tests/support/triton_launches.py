"""What the launchers of `r1kernels.triton` ask Triton to compile, found out without running a kernel.

    python triton_launches.py OUT.json

Calls every launcher with tensors on the CPU while `launch` only takes notes: the key under which Triton would look the
compilation up, by Triton's own binder for the target. The settings of a call (dtypes, which tensors are there, codes
of an objective) may make compilations; its values (sizes, strides, alignment, numbers) must not.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from r1kernels.triton import aot, common
from r1kernels.triton.common import Device

Value = TypeVar("Value")
SETTINGS, DRAWS = 8, 50  # values are drawn so many times for each of so many settings
LISTED_DRAWS = 600  # of settings and values
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "padded", "misaligned", "transposed", "permuted", "expanded")
ENTRIES = 2**24  # of a tensor whose memory is its own


# ---- arguments ----------------------------------------------------------------------------------------------


class Draw:
    """Random valid arguments: those of one `settings` differ in values alone.

    layouts: of the rows of logits, in turn; None for random ones. size: "small", "large" or None for any.
    """

    def __init__(self, settings: int, values: int, layouts: Sequence[str] | None = None, size: str | None = None):
        self.settings, self.values = random.Random(settings), random.Random(values)
        self.layouts, self.size = None if layouts is None else itertools.cycle(layouts), size
        if layouts is None and self.values.random() < 0.1:
            self.layouts, self.size = itertools.repeat("expanded"), "giant"

    # Settings.

    def choice(self, options: Sequence[Value]) -> Value:
        return self.settings.choice(options)

    def maybe(self, value: Value) -> Value | None:
        return value if self.settings.random() < 0.5 else None

    # Values.

    def count(self, largest: int) -> int:
        """From 1 to `largest`, every magnitude as likely as another, powers of two and 1 often."""
        if self.size in ("small", "large", "giant"):
            return min(7, largest) if self.size == "small" else largest
        count = int(math.exp(self.values.uniform(0, math.log(largest + 1))))
        return self.values.choice((count, 1 << (count.bit_length() - 1)))

    def number(self, low: float, high: float) -> float:
        return self.values.choice((1.0, low, high, self.values.uniform(low, high)))

    def shape(self, leading: int = 3) -> tuple[int, ...]:
        """(..., V) of up to `leading` dimensions before the vocabulary."""
        if self.size == "giant":
            return (2**15, 2**17)
        vocab = self.count(200_000)
        tokens = self.count(max(1, min(2**17, ENTRIES // vocab)))
        dimensions = self.values.randint(1, leading)
        inner = self.values.choice([d for d in (1, 2, 3, 7, tokens) if tokens % d == 0])
        return {1: (tokens, vocab), 2: (tokens // inner, inner, vocab), 3: (tokens // inner, 1, inner, vocab)}[
            dimensions
        ]

    def rows(self, shape: tuple[int, ...], dtype: torch.dtype, layouts: Sequence[str] = LAYOUTS) -> Tensor:
        """(..., V) logits in memory of their own."""
        layout = self.values.choice(layouts) if self.layouts is None else next(self.layouts)
        if layout not in layouts:
            layout = layouts[0]
        *leading, vocab = shape
        if layout == "padded":
            width = -(-vocab // 64) * 64 + 64 * self.values.randint(0, 3)
            return torch.empty(*leading, width, dtype=dtype)[..., :vocab]
        if layout == "misaligned":
            at = self.values.randint(1, 7)
            return torch.empty(math.prod(shape) + 8, dtype=dtype)[at : at + math.prod(shape)].view(shape)
        if layout == "transposed":
            return torch.empty(vocab, *leading, dtype=dtype).movedim(0, -1)
        if layout == "permuted" and len(leading) > 1:
            return torch.empty(*reversed(leading), vocab, dtype=dtype).permute(*reversed(range(len(leading))), -1)
        if layout == "expanded":
            return torch.empty(vocab, dtype=dtype).expand(shape)
        return torch.empty(shape, dtype=dtype)


# No launcher looks at values, so they stay what the memory held.


def floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def doubles(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64)


def ids(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64)


def mask(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bool)


def token_stats(draw: Draw) -> tuple[Any, ...]:
    dtype, shape = draw.choice(DTYPES), draw.shape()
    tokens = shape[:-1]
    return (
        draw.rows(shape, dtype), ids(*tokens), draw.maybe(mask(*tokens)), draw.number(0.1, 3.0),
        draw.maybe(floats(*tokens)), draw.choice((True, False)),
    )


def token_statistics(draw: Draw) -> tuple[Any, ...]:
    return *token_stats(draw), 7


def gradients(draw: Draw, tokens: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
    which = draw.choice((0, 1, 2))
    return floats(*tokens) if which != 1 else None, floats(*tokens) if which != 0 else None


def more_slopes(draw: Draw, tokens: tuple[int, ...]) -> tuple[Tensor | None, ...]:
    """sum_sq, grad_sum_sq and shift, or nothing."""
    which = draw.choice((0, 0, 0, 1, 2, 3))
    squares = (doubles(*tokens), floats(*tokens)) if which & 1 else (None, None)
    return (*squares, floats(*tokens) if which & 2 else None) if which else ()


WRITTEN = LAYOUTS[:3]  # rows of entries that are adjacent, and no two in one place


def token_stats_backward(draw: Draw) -> tuple[Any, ...]:
    dtype, shape = draw.choice(DTYPES), small_enough(draw.shape())
    tokens = shape[:-1]
    return (
        draw.rows(shape, dtype), ids(*tokens), doubles(*tokens), doubles(*tokens), *gradients(draw, tokens),
        draw.number(0.1, 3.0), *more_slopes(draw, tokens),
    )


def token_stats_backward_out(draw: Draw) -> tuple[Any, ...]:
    shape = small_enough(draw.shape(leading=1))
    dtype, (count, _) = draw.choice(DTYPES), shape
    narrow = draw.choice(DTYPES) if dtype == torch.float32 else dtype
    in_place = draw.choice((True, False))
    if in_place:
        logits = draw.rows(shape, dtype, WRITTEN)
        out = logits if narrow == dtype else logits.view(narrow)[:, : shape[1]]
    else:
        logits, out = draw.rows(shape, dtype), draw.rows(shape, narrow, WRITTEN)
    rows = draw.maybe(torch.arange(draw.values.randint(1, count)))
    return (
        logits, ids(count), doubles(count), doubles(count), *gradients(draw, (count,)), draw.number(0.1, 3.0),
        draw.maybe(floats(count)), draw.choice((0.0, draw.number(5.0, 50.0))), None if in_place else rows, out,
        *more_slopes(draw, (count,)),
    )


def small_enough(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that can be written: fewer rows of a giant one."""
    return (2**7, *shape[1:]) if math.prod(shape) > ENTRIES else shape


def policy_loss(draw: Draw) -> tuple[Any, ...]:
    packed = draw.choice((True, False))
    sequences, length = draw.count(64), draw.count(3000)
    shape = (sequences * length,) if packed else (sequences, length)
    logprobs = floats(*shape)

    def per_token_or_sequence() -> Tensor:
        return draw.choice((floats(*shape), floats(sequences)))

    return (
        logprobs, per_token_or_sequence(), draw.maybe(floats(*shape)), draw.maybe(floats(*shape)),
        draw.maybe(floats(*shape)), draw.maybe(mask(*shape)),
        torch.arange(sequences + 1) * length if packed else None, draw.maybe(per_token_or_sequence()),
        draw.maybe(torch.ones(())), draw.choice(range(4)), draw.choice(range(2)), draw.choice((1, 2, 3)),
        draw.choice(range(3)), draw.number(0.1, 10.0), draw.number(0.1, 0.5),
        draw.values.choice((math.inf, draw.number(2.0, 5.0))), draw.number(0.5, 2.0), draw.number(0.5, 2.0),
        draw.choice((0.0, draw.number(0.001, 0.1))), draw.choice((0.0, draw.number(0.001, 0.1))),
        draw.number(1.0, 4096.0),
    )


def group_advantages(draw: Draw) -> tuple[Any, ...]:
    size = draw.count(64)
    count = size * draw.count(500)
    group_ids = draw.maybe(torch.arange(count) // size)
    return floats(count), group_ids, size, draw.choice(range(3)), draw.choice((0, 1)), draw.number(0.0, 1e-3)


def kl_estimate(draw: Draw) -> tuple[Any, ...]:
    count = draw.count(100_000)
    return floats(count), floats(count), draw.choice((1, 2, 3))


def divergence(draw: Draw) -> tuple[Any, ...]:
    shape = draw.shape()
    student, teacher = (draw.rows(shape, draw.choice(DTYPES)) for _ in range(2))
    return (
        student, teacher, draw.maybe(mask(*shape[:-1])), draw.choice(range(3)), draw.number(0.1, 0.9),
        draw.number(0.1, 3.0),
    )


def divergence_backward(draw: Draw) -> tuple[Any, ...]:
    shape = small_enough(draw.shape())
    tokens = shape[:-1]
    dtype, narrow = draw.choice(DTYPES), draw.choice(DTYPES)
    in_place = draw.choice((True, False)) and narrow.itemsize <= dtype.itemsize
    if in_place:
        student = draw.rows(shape, dtype, WRITTEN)
        out = student.view(narrow)[..., : shape[-1]]
    else:
        student, out = draw.rows(shape, dtype), draw.rows(shape, narrow, WRITTEN)
    teacher = draw.rows(shape, draw.choice(DTYPES))
    return (
        student, teacher, doubles(*tokens), doubles(*tokens), doubles(*tokens), floats(*tokens), draw.choice(range(3)),
        draw.number(0.1, 0.9), draw.number(0.1, 3.0), out, draw.choice((0.0, draw.number(5.0, 50.0))),
    )


def linear_statistics(draw: Draw) -> tuple[Any, ...]:
    dtype, count, vocab = draw.choice(DTYPES[1:]), draw.count(2**13), draw.count(2**15)
    width = draw.values.choice((64, 512, draw.count(ENTRIES // 2**15)))
    hidden, weight = draw.rows((count, width), dtype, WRITTEN), draw.rows((vocab, width), dtype, WRITTEN)
    return (
        hidden, weight, draw.maybe(torch.empty(vocab, dtype=dtype)), ids(count), draw.maybe(mask(count)),
        draw.number(0.1, 3.0), draw.maybe(floats(count)), draw.number(0.05, 2.0),
        draw.choice((0.0, draw.number(5.0, 50.0))), draw.choice((True, False)),
    )


def scaled(draw: Draw) -> tuple[Any, ...]:
    count, dtype = draw.count(100_000), draw.choice(DTYPES)
    narrow = draw.choice(DTYPES if dtype == torch.float32 else (dtype, torch.float32))
    grad = torch.empty(count, dtype=dtype)
    out = grad if narrow == dtype and draw.choice((True, False)) else torch.empty(count, dtype=narrow)
    return grad, floats().reshape(()), out, draw.choice((True, False))


def sets(draw: Draw) -> tuple[int, int, tuple[Tensor, ...]]:
    """(M, V, the index of M entries)."""
    size, vocab = draw.count(10_000), draw.count(2**15)
    return size, vocab, tuple(torch.zeros(n, dtype=torch.int32) for n in (vocab + 1, size, size))


def support_products(draw: Draw) -> tuple[Any, ...]:
    size, vocab, (starts, *places) = sets(draw)
    dtype, width = draw.choice(DTYPES), draw.count(ENTRIES // 2**15)
    other = draw.choice(DTYPES if dtype == torch.float32 else (dtype, torch.float32))
    return (
        draw.rows((draw.count(1000), width), dtype, WRITTEN), draw.rows((vocab, width), other, WRITTEN), starts[None],
        *places, floats(size), draw.choice((True, False)),
    )


def support_grad_hidden(draw: Draw) -> tuple[Any, ...]:
    size, vocab, (starts, *places) = sets(draw)
    width = draw.count(ENTRIES // 2**15)
    weight = draw.rows((vocab, width), draw.choice(DTYPES), WRITTEN)
    return floats(size), weight, starts[None], *places, floats(draw.count(1000), width)


def support_grad_weight(draw: Draw) -> tuple[Any, ...]:
    size, vocab, (starts, *places) = sets(draw)
    hidden = draw.rows((draw.count(1000), draw.count(ENTRIES // 2**15)), draw.choice(DTYPES), WRITTEN)
    out = torch.empty(vocab, hidden.shape[1], dtype=draw.choice(DTYPES))
    return floats(size), hidden, starts[None], *places, out, draw.choice((True, False))


def support_stats(draw: Draw) -> tuple[Any, ...]:
    count, size = draw.count(1000), draw.count(10_000)
    return (
        floats(size), torch.zeros(count + 1, dtype=torch.int64), ids(count), draw.maybe(mask(count)),
        draw.number(0.1, 3.0), draw.maybe(floats(count)),
    )


def support_stats_backward(draw: Draw) -> tuple[Any, ...]:
    values, offsets, targets, _, temperature, temperatures = support_stats(draw)
    count = len(targets)
    return (
        values, offsets, targets, doubles(count), doubles(count), draw.maybe(floats(count)), draw.maybe(floats(count)),
        temperature, temperatures, draw.choice((0.0, draw.number(5.0, 50.0))), torch.empty_like(values),
    )


# Launcher -> its arguments.
CALLS: dict[str, Callable[[Draw], tuple[Any, ...]]] = {
    arguments.__name__: arguments
    for arguments in (
        token_stats, token_statistics, token_stats_backward, token_stats_backward_out, policy_loss, group_advantages,
        kl_estimate, divergence, divergence_backward, linear_statistics, scaled, support_products,
        support_grad_hidden, support_grad_weight, support_stats, support_stats_backward,
    )
}


def launchers() -> dict[str, Callable[..., Any]]:
    """Those of `CALLS` that there are, wherever they are defined."""
    modules = [importlib.import_module(module) for module in aot.kernel_modules()]
    return {
        name: getattr(module, name)
        for name in CALLS for module in modules
        if getattr(getattr(module, name, None), "__module__", "") == module.__name__
    }


# ---- taking notes ---------------------------------------------------------------------------------------------


@functools.cache
def binder(kernel: Any, device: Device) -> Callable[..., Any]:
    """What Triton's launcher calls first: (arguments by name, [(type, specialisation)], options)."""
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(aot.target(device)))


def text(kernel: Any, types: dict[str, str], options: dict[str, Any]) -> str:
    arguments = ", ".join(f"{name}: {type_}" for name, type_ in types.items())
    return f"{kernel.__module__}.{kernel.__name__}({arguments}) {dict(sorted(options.items()))}"


def constant(value: Any) -> str:
    return f"= {getattr(value, 'value', value)!r}"


def key_of_launch(device: Device, kernel: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> str:
    """All that Triton looks a compilation up by."""
    bound, specialization, options = binder(kernel, device)(*arguments, **keywords)
    types = {}
    for name, (type_, special) in zip(bound, specialization, strict=True):
        types[name] = constant(special) if type_ == "constexpr" else type_ + (f" ({special})" if special else "")
    return text(kernel, types, options)


def key_of_variant(variant: common.Variant) -> str:
    types = {
        name: constant(variant.constants[name]) if type_ == "constexpr" else type_
        for name, type_ in aot.signature(variant).items()
    }
    options = aot.options(variant)
    return text(variant.kernel, types, {name: options[name] for name in options if name != "debug"})


class Notes:
    """Replaces `launch` and `device_of` wherever they were imported."""

    def __init__(self, device: Device):
        self.device = device
        self.keys: set[str] = set()
        self.launchers = launchers()
        for name, module in list(sys.modules.items()):
            if name.startswith("r1kernels.triton."):
                if hasattr(module, "launch"):
                    module.launch = self.launch
                if hasattr(module, "device_of"):
                    module.device_of = lambda tensor: device

    def launch(self, kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **keywords: Any) -> None:
        if 0 not in grid:
            assert all(isinstance(size, int) and size > 0 for size in grid), grid
            options = {"num_stages": 1, **common.COMPILE_OPTIONS, **keywords}
            self.keys.add(key_of_launch(self.device, kernel, arguments, options))

    def of(self, launcher: str, draws: Iterator[Draw]) -> set[str]:
        """The keys of all launches for some calls of a launcher."""
        self.keys = set()
        for draw in draws:
            self.launchers[launcher](*CALLS[launcher](draw))
        return self.keys


def corners(settings: int) -> Iterator[Draw]:
    """Every pair of layouts, of few short rows and of long ones."""
    for values, (first, second, size) in enumerate(itertools.product(LAYOUTS, LAYOUTS, ("small", "large"))):
        yield Draw(settings, values, (first, second), size)


def steady(launcher: str, device: Device) -> list[dict[str, Any]]:
    """Of some settings: the compilations that corner cases ask for, and those that random values add."""
    notes, results = Notes(device), []
    for settings in range(SETTINGS):
        first = notes.of(launcher, corners(settings))
        later = notes.of(launcher, (Draw(settings, 1000 + values) for values in range(DRAWS)))
        results.append({"settings": settings, "first": sorted(first), "added": sorted(later - first)})
    return results


def listed(device: Device) -> dict[str, Any]:
    """Launches that no module's `variants` has, by launcher, and variants that no launch asked for."""
    modules = aot.kernel_modules()
    known = {key_of_variant(variant) for module in modules for variant in aot.variants_of(module, device)}
    notes = Notes(device)
    used = {
        launcher: notes.of(launcher, (Draw(settings, settings) for settings in range(LISTED_DRAWS)))
        for launcher in notes.launchers
    }
    return {
        "unlisted": {launcher: sorted(keys - known) for launcher, keys in used.items()},
        "unused": sorted(known - set().union(*used.values())), "variants": len(known),
    }


# ---- a kernel that does specialise ------------------------------------------------------------------------------


@triton.jit
def specialising_kernel(x, count):
    pass


def main(out: Path) -> None:
    specialised = {
        key_of_launch(aot.DEVICES["sm_90"], specialising_kernel, (torch.empty(64)[offset:], count), {})
        for offset in (0, 1) for count in (1, 7, 16, 2**40)
    }
    result = {
        "launchers": sorted(launchers()),
        "specialised": sorted(specialised),
        "steady": {launcher: steady(launcher, aot.DEVICES["sm_90"]) for launcher in launchers()},
        "listed": {arch: listed(device) for arch, device in aot.DEVICES.items()},
    }
    out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Linear heads of other libraries: (hidden (N, H), weight (V, H), token_ids (N,)) -> (log-probs, entropy).

Each loader imports its library and may fail. The calls are those of Liger 0.8.5, TRL 1.16, verl 0.9.1, QuACK 0.6.5,
torch 2.13 and cut-cross-entropy 25.1.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PolicyHead = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
CrossEntropyHead = Callable[[Tensor, Tensor, Tensor], Tensor]  # to the mean over tokens

TRL_TILE = 32_768  # entries of the vocabulary in a tile, as TRL's trainers set it
QUACK_CHUNK = 4_096  # tokens


def named(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def without_init(*packages: str) -> None:
    """Registers packages whose `__init__` does not run. verl's imports ray, which no kernel needs."""
    for name in packages:
        if name in sys.modules:
            continue
        parent, _, last = name.rpartition(".")
        if parent:
            folders = [f"{folder}/{last}" for folder in sys.modules[parent].__path__]
        else:
            spec = importlib.util.find_spec(name)
            if spec is None:
                raise ModuleNotFoundError(f"No module named {name!r}")
            folders = list(spec.submodule_search_locations or ())
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = folders


# ---- log-probs and entropies ---------------------------------------------------------------------------------


def liger_scaled() -> PolicyHead:
    """On sm_90 its CuTe kernels (they need nvidia-cutlass-dsl), elsewhere torch in chunks."""
    function = named("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction")

    def head(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        temperature, ignore_index, tiles, with_entropy = 1.0, -100, 1, True
        losses, entropy = function.apply(hidden, weight, token_ids, temperature, ignore_index, tiles, with_entropy)
        return -losses, entropy

    return head


def trl_chunked() -> PolicyHead:
    """What `add_fused_lm_head` runs."""
    function = named("trl.kernels.chunked_logprob", "ChunkedLogProbFunction")

    def head(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        bias, temperature, softcap, scale = None, 1.0, None, 1.0
        return function.apply(
            hidden, weight, bias, token_ids, temperature, TRL_TILE, softcap, scale, ("log_probs", "entropy")
        )[:2]

    return head


def verl_torch() -> PolicyHead:
    without_init("verl", "verl.utils", "verl.utils.experimental")
    return named("verl.utils.experimental.torch_functional", "FusedLinearForPPO")(impl_backend="torch")


def verl_triton() -> PolicyHead:
    """Needs a width that is a multiple of 128. Wrong where the vocabulary is no multiple of 1,024."""
    without_init("verl", "verl.utils", "verl.utils.kernel")
    function = named("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")
    importlib.import_module("verl.utils.kernel.kernels")

    def head(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        return function(hidden, weight, token_ids, 1.0, "none")

    return head


POLICY_HEADS = {
    "Liger scaled cross-entropy": liger_scaled, "TRL chunked": trl_chunked, "verl torch": verl_torch,
    "verl Triton": verl_triton,
}


# ---- cross-entropy -------------------------------------------------------------------------------------------


def liger() -> CrossEntropyHead:
    function = named("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    return lambda hidden, weight, targets: function(hidden, weight, targets)


def liger_cute() -> CrossEntropyHead:
    function = named("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction")
    return lambda hidden, weight, targets: function.apply(hidden, weight, targets).mean()


def quack() -> CrossEntropyHead:
    function = named("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return lambda hidden, weight, targets: function(hidden, weight, targets, chunk_size=QUACK_CHUNK)


def torch_reference() -> CrossEntropyHead:
    return lambda hidden, weight, targets: F.linear_cross_entropy(hidden, weight, targets)


def torch_chunked() -> CrossEntropyHead:
    options = named("torch.nn", "LinearCrossEntropyOptions")()
    return lambda hidden, weight, targets: F.linear_cross_entropy(hidden, weight, targets, options=options)


def trl_cross_entropy() -> CrossEntropyHead:
    function = named("trl.kernels.chunked_logprob", "ChunkedLogProbFunction")
    return lambda hidden, weight, targets: -function.apply(
        hidden, weight, None, targets, 1.0, TRL_TILE, None, 1.0, ("log_probs",)
    )[0].mean()


def apple() -> CrossEntropyHead:
    """Its default leaves out gradients that it takes for too small."""
    function = named("cut_cross_entropy", "linear_cross_entropy")
    return lambda hidden, weight, targets: function(hidden, weight, targets, impl="cce")


def _torch_has_it(load: Callable[[], CrossEntropyHead]) -> Callable[[], CrossEntropyHead]:
    def loaded() -> CrossEntropyHead:
        if not hasattr(F, "linear_cross_entropy"):
            raise ImportError(f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy")
        return load()

    return loaded


CROSS_ENTROPY_HEADS = {
    "Liger": liger, "Liger scaled cross-entropy": liger_cute, "QuACK": quack,
    "torch linear_cross_entropy": _torch_has_it(torch_reference),
    "torch linear_cross_entropy, chunks": _torch_has_it(torch_chunked), "TRL chunked": trl_cross_entropy,
    "cut-cross-entropy": apple,
}

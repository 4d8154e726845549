"""Linear heads of other libraries: (hidden (N, H), weight (V, H), token_ids (N,)) -> (log-probs, entropy).

Each loader imports its library and may fail. Those that `r1kernels bench` has too are in `r1kernels.bench.peers`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable

from torch import Tensor

from r1kernels.bench import peers
from r1kernels.bench.peers import named

PolicyHead = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
CrossEntropyHead = Callable[[Tensor, Tensor, Tensor], Tensor]  # to the mean over tokens


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


def verl_torch() -> PolicyHead:
    without_init("verl", "verl.utils", "verl.utils.experimental")
    return peers.verl_head()


def verl_triton() -> PolicyHead:
    """Needs a width that is a multiple of 128. Wrong where the vocabulary is no multiple of 1,024."""
    without_init("verl", "verl.utils", "verl.utils.kernel")
    function = named("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")
    importlib.import_module("verl.utils.kernel.kernels")

    def head(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        return function(hidden, weight, token_ids, 1.0, "none")

    return head


POLICY_HEADS = {
    "Liger scaled cross-entropy": liger_scaled, "TRL chunked": peers.trl_head, "verl torch": verl_torch,
    "verl Triton": verl_triton,
}


# ---- cross-entropy -------------------------------------------------------------------------------------------


def liger_cute() -> CrossEntropyHead:
    function = named("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction")
    return lambda hidden, weight, targets: function.apply(hidden, weight, targets).mean()


def torch_chunked() -> CrossEntropyHead:
    function = peers.torch_linear_cross_entropy()
    options = named("torch.nn", "LinearCrossEntropyOptions")()
    return lambda hidden, weight, targets: function(hidden, weight, targets, options=options)


CROSS_ENTROPY_HEADS = {
    "Liger": peers.liger_linear_cross_entropy, "Liger scaled cross-entropy": liger_cute,
    "QuACK": peers.quack_linear_cross_entropy, peers.TORCH_HEAD: peers.torch_linear_cross_entropy,
    f"{peers.TORCH_HEAD}, chunks": torch_chunked, "TRL chunked": peers.trl_linear_cross_entropy,
    "cut-cross-entropy": peers.cce_linear_cross_entropy,
}

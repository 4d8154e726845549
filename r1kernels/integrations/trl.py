"""TRL 1.16 with the kernels of r1kernels.

`patch_trl()` swaps the function that computes log-probs for the trainers SFT, DPO, KTO, GRPO and RLOO; their losses
remain TRL's. `R1GRPOTrainer` is a GRPOTrainer that computes the gradient in the same walk over the vocabulary as the
log-probs (`r1kernels.integrations.trl_grpo`). docs/migrate/trl.md compares the options.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import r1kernels
from r1kernels.integrations import check_version

SUPPORTED, HOOK, ARGUMENTS = "1.16", "_ChunkedLogProbFunction", 9
STATISTICS = {"log_sum_sq_probs": "sum_sq_probs", "mean_logits": "mean_logit", "is_top1": "is_top1"}
_patches: list[TRLPatch] = []


def head_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None,
          logit_scale: float) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(hidden, weight, options) of our functions, in the dtype in which TRL multiplies."""
    if weight.dim() != 2 or not weight.is_floating_point() or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"the output layer has a weight of {weight.dtype} with shape {tuple(weight.shape)} for hidden states of "
            f"size {hidden.shape[-1]}, expected a plain linear layer (V, H); train this model without r1kernels"
        )
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    # float32 hidden states and a weight of 16 bits are multiplied as they are, without a float32 copy of the weight.
    if weight.dtype != dtype and not (dtype == torch.float32 and weight.dtype in (torch.bfloat16, torch.float16)):
        weight = weight.to(dtype)
    bias = None if bias is None else bias.to(weight.dtype)
    if hasattr(weight, "ds_id"):  # ZeRO-3 releases the tensors of the head before backward reads them
        weight = weight.clone()
    if hasattr(bias, "ds_id"):
        bias = bias.clone()
    options = {"bias": bias, "temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    options["chunk_bytes"] = _patches[-1].chunk_bytes if _patches else None
    return hidden.to(dtype), weight, options


class LogProbs:
    """What TRL finds in the place of its autograd function: the same arguments, the same results."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_size: int,
        final_logit_softcapping: float | None, logit_scale: float, outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, options = head_of(hidden, weight, bias, temperature, final_logit_softcapping, logit_scale)
        with torch.autocast(hidden.device.type, enabled=False):
            fields = [name for theirs, name in STATISTICS.items() if theirs in outputs]
            if fields:
                fields += ["logprobs", *(["entropy"] if "entropy" in outputs else [])]
                found = r1kernels.linear_token_statistics(hidden, weight, targets, fields=tuple(fields), **options)
                squares = None if found.sum_sq_probs is None else found.sum_sq_probs.detach().log()
                return found.logprobs, found.entropy, squares, found.mean_logit, found.is_top1
            if "entropy" in outputs:
                found = r1kernels.linear_token_logprobs_and_entropy(hidden, weight, targets, **options)
                return *found, None, None, None
            return r1kernels.linear_token_logprobs(hidden, weight, targets, **options), None, None, None, None


def checked_utils(any_version: bool) -> Any:
    """`trl.trainer.utils`, or an ImportError if it has changed."""
    check_version("trl", SUPPORTED, any_version)
    utils = importlib.import_module("trl.trainer.utils")
    if _patches:
        return utils
    caller = getattr(utils, "add_fused_lm_head", None)
    try:
        tree = None if caller is None else ast.parse(inspect.getsource(caller))
    except OSError:  # installed without sources
        tree = None
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        and node.func.attr == "apply" and getattr(node.func.value, "id", None) == HOOK
    ] if tree else []
    if not hasattr(utils, HOOK) or len(calls) != 1 or len(calls[0].args) != ARGUMENTS or calls[0].keywords:
        raise ImportError(
            f"trl.trainer.utils.add_fused_lm_head does not call {HOOK}.apply with {ARGUMENTS} arguments, as in TRL "
            f"{SUPPORTED}; install trl=={SUPPORTED}.*, or train without this adapter"
        )
    return utils


class TRLPatch:
    """A swap of TRL's function, in force until `undo()` or the end of a `with` block."""

    def __init__(self, any_version: bool = False, chunk_bytes: int | None = None) -> None:
        self.chunk_bytes = chunk_bytes
        self.utils: Any = checked_utils(any_version)
        self.before: Any = getattr(self.utils, HOOK) if not _patches else _patches[0].before
        _patches.append(self)
        setattr(self.utils, HOOK, LogProbs)

    def undo(self) -> None:
        """The last patch that is undone brings TRL's own function back. A second call does nothing."""
        if self in _patches:
            _patches.remove(self)
            if not _patches and getattr(self.utils, HOOK) is LogProbs:  # otherwise somebody else's swap is in force
                setattr(self.utils, HOOK, self.before)

    def __enter__(self) -> TRLPatch:
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo()


def patch_trl(any_version: bool = False, chunk_bytes: int | None = None) -> TRLPatch:
    """Makes TRL's trainers compute log-probs and entropies with r1kernels; `undo()` or `with` ends it.

    Args:
        any_version: accept a version of TRL other than 1.16 that calls the same function.
        chunk_bytes: memory for logits, as in `r1kernels.LinearOptions`, while this patch is the last one in force;
            `R1GRPOTrainer` follows it too.

    Raises:
        ImportError: TRL is missing or another version (`any_version` accepts all), or does not call what is swapped.
    """
    return TRLPatch(any_version, chunk_bytes)


def unpatch_trl() -> None:
    """Undoes every `patch_trl()` that is in force."""
    for patch in tuple(_patches):
        patch.undo()


@contextlib.contextmanager
def swapped(hook: Any) -> Iterator[None]:
    """Puts something in the place of TRL's function for a moment."""
    utils = sys.modules["trl.trainer.utils"]
    before = getattr(utils, HOOK)
    setattr(utils, HOOK, hook)
    try:
        yield
    finally:
        setattr(utils, HOOK, before)


def __getattr__(name: str) -> Any:
    if name not in ("R1GRPOMixin", "R1GRPOTrainer"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("r1kernels.integrations.trl_grpo"), name)

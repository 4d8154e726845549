"""What an adapter has instead of logits: hidden states, and the head as the `linear_*` losses take it."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class UnsupportedLogitsError(TypeError, AttributeError):
    """A model does something with its logits that needs their values."""


class Logits:
    """What a model has instead of logits (..., V): hidden states (..., H), its head, its scale and its soft cap.

    With z = head(hidden), the logits are scale z without a cap, and cap tanh(scale z / cap) with one.
    """

    hidden: Tensor
    head: nn.Module
    owner: str
    vocab: int

    def __init__(self, hidden: Tensor, head: nn.Module, owner: str, vocab: int, scale: float = 1.0,
                 cap: float | None = None) -> None:
        self.hidden, self.head, self.owner, self.vocab = hidden, head, owner, vocab
        self.scale: float = scale
        self.cap: float | None = cap

    def _with(self, **changed: Any) -> Logits:
        return Logits(**(vars(self) | changed))

    def _refuse(self, action: str) -> NoReturn:
        raise UnsupportedLogitsError(
            f"{self.owner} {action}, which r1kernels cannot do without computing the logits; call undo() of what "
            "apply_to returned, and pass compute_loss_func to the Trainer"
        )

    def refusing(self) -> Logits:
        """The same for the outputs of an evaluation, where it is not the model that wants to use logits."""
        return NoLogitsWithInEval(**vars(self))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.vocab))

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    def to(self, *_: Any, **__: Any) -> Logits:
        """Itself: log-probs are float32 in any case."""
        return self

    def contiguous(self, *_: Any, **__: Any) -> Logits:
        return self

    def float(self, *_: Any, **__: Any) -> Logits:
        return self

    def __mul__(self, factor: Any) -> Logits:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not factor > 0:
            self._refuse(f"multiplies its logits by {factor!r} and not by a number > 0")
        return self._with(scale=self.scale * factor, cap=None if self.cap is None else self.cap * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Logits:
        if isinstance(divisor, bool) or not isinstance(divisor, (int, float)) or not divisor > 0:
            self._refuse(f"divides its logits by {divisor!r} and not by a number > 0")
        return self._with(scale=self.scale / divisor, cap=None if self.cap is None else self.cap / divisor)

    def tanh(self) -> Logits:
        if self.cap is not None:
            self._refuse("caps its logits twice")
        return self._with(cap=1.0)

    def __getitem__(self, index: Any) -> Logits:
        if isinstance(index, tuple) and len(index) == 2 and index[0] is ... and isinstance(index[1], slice):
            kept = range(self.vocab)[index[1]]
            if len(kept) and kept == range(len(kept)):
                return self._with(vocab=len(kept))
        self._refuse(f"takes the part {index!r} of its logits")

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse(f"uses '{name}' of its logits")

    @classmethod
    def __torch_function__(cls, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Logits:
        if function is torch.tanh:
            return args[0].tanh()
        logits = next((value for value in (*args, *(kwargs or {}).values()) if isinstance(value, cls)), None)
        name = getattr(function, "__name__", str(function))
        if logits is None:
            raise UnsupportedLogitsError(f"torch.{name} needs logits, and r1kernels does not compute them")
        logits._refuse(f"calls torch.{name} with its logits")

    def head_of_losses(self) -> tuple[Tensor, dict[str, Any]]:
        """Hidden states, and the other arguments of the `linear_*` functions, in the dtype of autocast if it is on."""
        weight, bias, adapters = parts_of_head(self.head, self.owner)
        check_whole(weight, self.owner)
        hidden = self.hidden.to(weight.device)
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        options = {"weight": weight, "bias": None if bias is None else bias.to(hidden.dtype),
                   "logit_scale": self.scale, "softcap": self.cap}
        if adapters:
            a, b = zip(*adapters, strict=True)
            options["lora"] = torch.cat(a).T.to(hidden.dtype), torch.cat(b, 1).T.to(hidden.dtype)
        return hidden, options | ({"vocab_size": self.vocab} if self.vocab < len(weight) else {})


class NoLogitsWithInEval(Logits):
    """What an evaluation gets from `apply_to(in_eval=True)`. Accelerate's own error shows the name of this class."""

    def _refuse(self, action: str) -> NoReturn:
        raise UnsupportedLogitsError(
            f"this evaluation {action}, and apply_to(in_eval=True) computes no logits; leave in_eval=True out for "
            "metrics or predictions that need logits, or set prediction_loss_only=True"
        )


def parts_of_head(head: nn.Module, owner: str) -> tuple[Tensor, Tensor | None, list[tuple[Tensor, Tensor]]]:
    """Weight (V, H) and bias (V,) of a head, and [A (R, H), B (V, R)] of its active adapters, B times its scale."""
    head, adapters = _trained_copy(head), []
    if (type(head).__module__, type(head).__name__) == ("peft.tuners.lora.layer", "Linear"):
        for name in [] if head.disable_adapters or head.merged else head.active_adapters:
            if name not in head.lora_A:
                continue
            dropout, layer = head.lora_dropout[name], head.lora_B[name]
            if head.lora_variant.get(name) or layer.bias is not None or (head.training and getattr(dropout, "p", 0)):
                raise TypeError(
                    f"the head of {owner} has the adapter {name!r} with dropout, a bias, DoRA or another variant; use "
                    "plain LoRA with lora_dropout=0 there, or leave the head out of target_modules"
                )
            adapters.append((head.lora_A[name].weight, layer.weight * head.scaling[name]))
        if head.disable_adapters and head.merged:
            head.unmerge()
        head = head.base_layer
    if type(head) is not nn.Linear:  # a subclass may compute something else
        raise TypeError(
            f"the head of {owner} is a {type(head).__module__}.{type(head).__name__}, expected torch.nn.Linear; do "
            "not quantize, wrap or shard the head by itself, or train this model without apply_to"
        )
    return head.weight, head.bias, adapters


def check_whole(weight: Tensor, owner: str) -> None:
    """Raises TypeError if this process does not have the whole weight of a head now."""
    if isinstance(weight, DTensor):
        raise TypeError(
            f"the head of {owner} is a sharded DTensor where its loss is computed; call fully_shard on the layers and "
            "on the whole model, but not on the head, and do not use tensor parallelism for it"
        )
    if hasattr(weight, "ds_id") or weight.is_meta or weight.dim() != 2:
        raise TypeError(
            f"the head of {owner} has a weight that is partitioned or offloaded (DeepSpeed ZeRO-3, a device map, "
            "FSDP1); use ZeRO-2 or FSDP2, or train this model without apply_to"
        )


def _trained_copy(head: nn.Module) -> nn.Module:
    """The layer that PEFT's wrapper for `modules_to_save` runs, or the head itself."""
    if not (hasattr(head, "original_module") and hasattr(head, "modules_to_save")):
        return head
    name = head.active_adapters[0] if head.active_adapters else None
    return head.modules_to_save[name] if not head.disable_adapters and name in head.modules_to_save else (
        head.original_module)

"""The forward of a causal language model of transformers that computes a loss without its logits."""

from __future__ import annotations

import copy
import copyreg
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from inspect import signature
from typing import Any, NamedTuple

from torch import Tensor, nn

from r1kernels.integrations.heads import Logits, parts_of_head

SETTINGS = "_r1kernels_settings"  # the attribute of a model that apply_to was called for


class _Current(NamedTuple):
    """The forward of a model that computes its loss now, in this thread."""

    model: Any
    head: nn.Module
    vocab: int
    loss: Callable[..., Tensor]


_CURRENT: ContextVar[_Current | None] = ContextVar("_CURRENT", default=None)  # each thread has its own
_LOCK = threading.Lock()


class _Switch:
    """The forward of a head: `Logits` in the forwards of `without_logits`, and its own forward in other threads."""

    def __init__(self, head: nn.Module) -> None:
        self.head, self.users = head, 0
        self.before = {key: vars(head)[key] for key in ("forward",) if key in vars(head)}  # that of a device map

    def __call__(self, hidden: Tensor) -> Any:
        current = _CURRENT.get()
        if current is not None and current.head is self.head:
            return Logits(hidden, self.head, type(current.model).__name__, current.vocab)
        return self.before["forward"](hidden) if self.before else type(self.head).forward(self.head, hidden)


@contextmanager
def without_logits(model: Any, loss: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, in this thread, the head of the model returns `Logits`, and `loss` is its loss function."""
    head, name = model.get_output_embeddings(), type(model).__name__
    parts_of_head(head, name)  # it may have been replaced since apply_to

    def loss_function(logits: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(logits, Logits):
            raise TypeError(f"{name} does not take its logits from get_output_embeddings(); train it without apply_to")
        return loss(logits, *args, **kwargs)

    with _LOCK:  # as another thread may begin or end a forward of this model
        switch = vars(head).get("forward")
        if not isinstance(switch, _Switch):
            switch = vars(head)["forward"] = _Switch(head)
        switch.users += 1
    token = _CURRENT.set(_Current(model, head, head.out_features, loss_function))
    try:
        yield
    finally:
        _CURRENT.reset(token)
        with _LOCK:
            switch.users -= 1
            if not switch.users:
                del vars(head)["forward"]
                vars(head).update(switch.before)


def loss_without_logits(model: Any) -> Callable[..., Tensor] | None:
    """The loss function of the model inside `without_logits`, None outside."""
    current = _CURRENT.get()
    return current.loss if current is not None and current.model is model else None


def outputs_without_logits(outputs: Any, evaluation: bool) -> Any:
    """A model's outputs, a dict or a tuple, without `Logits`. Those of an evaluation keep them, to refuse their use."""
    if evaluation:  # without them Trainer would take the next value, such as hidden states, for logits
        kept = [v.refusing() if isinstance(v, Logits) else v for v in (
            outputs.values() if isinstance(outputs, dict) else outputs)]
        return type(outputs)(**dict(zip(outputs, kept, strict=True))) if isinstance(outputs, dict) else tuple(kept)
    if isinstance(outputs, dict):
        return type(outputs)(**{name: value for name, value in outputs.items() if not isinstance(value, Logits)})
    return tuple(None if isinstance(value, Logits) else value for value in outputs)


def subclass_of(base: type, forward: Callable[..., Any]) -> type:
    """A class of models with this forward and, in `without_logits`, another loss function. It has the name of `base`.

    `copy.deepcopy` of a model keeps the class. Pickle, which finds classes by their names, saves a model of `base`.
    """
    loss_function = property(lambda self: loss_without_logits(self) or base.loss_function.fget(self),
                             base.loss_function.fset)

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(vars(self), memo))
        return twin

    def reduce_ex(self: Any, protocol: Any) -> Any:
        if type(self) is not made:  # that of FSDP
            return base.__reduce_ex__(self, protocol)
        attributes = {name: value for name, value in vars(self).items() if name != SETTINGS}
        # Pickle refuses copyreg.__newobj__ of another class. This function is the one of its protocols 0 and 1.
        return copyreg._reconstructor, (base, object, None), attributes

    names = {"forward": forward, "loss_function": loss_function, "_r1kernels_base": base, "__doc__": base.__doc__,
             "__deepcopy__": deepcopy, "__reduce_ex__": reduce_ex}
    # Transformers and Trainer know classes by their names.
    made = type(base.__name__, (base,), names | {k: getattr(base, k) for k in ("__module__", "__qualname__")})
    return made


# ---- checks of arguments --------------------------------------------------------------------------------------------


@contextmanager
def labels_named(name: str, targets: Tensor, vocab: int, ignored: int) -> Iterator[None]:
    """Inside, a ValueError for a target out of range names the user's argument and its place there."""
    try:
        yield
    except ValueError as error:
        wrong = ((targets < 0) | (targets >= vocab)) & (targets != ignored)
        if not wrong.any():
            raise
        place = wrong.nonzero()[0].tolist()
        value = targets[tuple(place)].item()
        place[-1] += name == "labels"  # these were shifted
        raise ValueError(f"{name}{place} is {value}, expected {ignored} or an id in [0, {vocab})") from error


def check_extra_keywords(function: Callable[..., Any], extra: dict[str, Any]) -> None:
    """Raises TypeError for a keyword that is nearly one of the function's, which would otherwise be ignored."""
    for name in extra:
        meant = _nearly(function, name)
        if meant:
            raise TypeError(f"{function.__name__} has no keyword {name!r}, expected {meant!r}")


@functools.cache
def _nearly(function: Callable[..., Any], name: str) -> str | None:
    return next(iter(get_close_matches(name, signature(function).parameters, 1, 0.8)), None)


def causal_model(model: nn.Module) -> Any:
    """The transformers model with a head in a module that may wrap it."""
    from transformers import PreTrainedModel

    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a *ForCausalLM of transformers; load it before")
    found: list[Any] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module not in inside and module.get_output_embeddings() is not None:
            found.append(module)
            inside.update(module.modules())
    if not found:
        raise TypeError(f"model is a {type(model).__name__} without a head, expected a *ForCausalLM of transformers")
    if len(found) > 1:
        raise TypeError(
            f"model is a {type(model).__name__} that contains {len(found)} models with a head "
            f"({', '.join(type(one).__name__ for one in found)}), expected one; give each of them by itself"
        )
    return found[0]

"""Transformers 5: losses and log-probs of a causal language model, without a tensor of logits.

    apply_to(model)                                  # from now on model(..., labels=labels).loss needs no logits
    token_logprobs(model, shift_labels, **inputs)    # for a loss of your own

The model's own forward runs. Only its head returns `Logits`, an object that keeps the hidden states and records what
the forward does with logits (a scale, a soft cap, a slice). The loss is computed from all of that at once.
"""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import r1kernels
from r1kernels.integrations import check_version
from r1kernels.integrations.causal_lm import (
    SETTINGS,
    causal_model,
    check_extra_keywords,
    labels_named,
    outputs_without_logits,
    subclass_of,
    without_logits,
)
from r1kernels.integrations.heads import Logits, check_whole, parts_of_head

SUPPORTED = "5"
_REQUEST = "_r1kernels_request"  # the keyword of its forward that asks for log-probs


def for_causal_lm_loss(
    logits: Tensor | Logits, labels: Tensor | None, vocab_size: int | None = None,
    num_items_in_batch: Tensor | float | None = None, ignore_index: int = -100, shift_labels: Tensor | None = None,
    *, label_smoothing: float = 0.0, z_loss_coef: float = 0.0, chunk_bytes: int | None = None, **extra: Any,
) -> Tensor:
    """The loss of `transformers.loss.loss_utils.ForCausalLMLoss`, with the same arguments.

    It can replace LOSS_MAPPING["ForCausalLM"] or `model.loss_function`. Then it saves the float32 copy of logits;
    `apply_to` saves the logits, too.

    Args:
        logits: (..., T, V). Row t scores label t + 1, or row t of shift_labels.
        labels: (..., T), `ignore_index` = not scored.
        vocab_size: ignored; V is the size of the logits.
        num_items_in_batch: the number that the sum of losses is divided by; the number of scored labels by default.
        shift_labels: (..., T), labels that are already shifted; labels are then ignored.
        label_smoothing, z_loss_coef: as in `r1kernels.cross_entropy`.
        chunk_bytes: as in `r1kernels.LinearOptions`; for `apply_to`.
        **extra: what else the model's forward was called with, ignored: models pass it on to their loss function.

    Returns:
        0-d, float32, nats; NaN if no label is scored and num_items_in_batch is None, as in transformers.

    Raises:
        ValueError: the shape of labels is not that of the logits, or a label is not in [0, V).
        TypeError: the name of an extra keyword is nearly that of an argument.
    """
    check_extra_keywords(for_causal_lm_loss, extra)
    name = "labels" if shift_labels is None else "shift_labels"
    if shift_labels is None:
        if labels is None:
            raise ValueError("labels is None and shift_labels is None, expected one of them")
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.to(logits.device)
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels have shape {tuple(targets.shape)} and logits {tuple(logits.shape)}, expected a label for each "
            "row; with logits_to_keep, pass shift_labels of the kept rows"
        )
    terms: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss_coef": z_loss_coef,
                             "ignore_index": ignore_index}
    terms["reduction"] = "mean" if num_items_in_batch is None else "sum"
    with labels_named(name, targets, logits.shape[-1], ignore_index):
        if isinstance(logits, Logits):
            hidden, head = logits.head_of_losses()
            loss = r1kernels.linear_cross_entropy(hidden, targets=targets, chunk_bytes=chunk_bytes, **head, **terms)
        else:
            loss = r1kernels.cross_entropy(logits, targets, **terms)
    if num_items_in_batch is None:
        return torch.where((targets != ignore_index).any(), loss, torch.nan)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def compute_loss_func(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | float | None = None, *, label_smoothing: float = 0.0,
    z_loss_coef: float = 0.0,
) -> Tensor:
    """For `Trainer(compute_loss_func=...)`: `for_causal_lm_loss` of the outputs' logits.

    Give keywords by `functools.partial(compute_loss_func, label_smoothing=0.1)`. The model computes its logits, and a
    loss that its own forward adds (a mixture of experts' `aux_loss`) is not included: `apply_to` is better at both.

    Args, Returns and Raises are those of `for_causal_lm_loss`.
    """
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    return for_causal_lm_loss(logits, labels, num_items_in_batch=num_items_in_batch, label_smoothing=label_smoothing,
                              z_loss_coef=z_loss_coef)


class Applied:
    """What `apply_to` returns. As a context manager, it calls `undo` at the end."""

    model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        self.model, self._settings = model, vars(model)[SETTINGS]

    def undo(self) -> None:
        """Gives the model its own forward again. Later calls do nothing, also after another `apply_to`."""
        if vars(self.model).get(SETTINGS) is not self._settings:
            return
        del vars(self.model)[SETTINGS]
        base = vars(type(self.model)).get("_r1kernels_base")
        if base is not None:  # FSDP may have made a class of its own from ours, which then runs the model's forward
            self.model.__class__ = base

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo()


def apply_to(
    model: nn.Module, *, label_smoothing: float = 0.0, z_loss_coef: float = 0.0, chunk_bytes: int | None = None,
    in_eval: bool = False, any_version: bool = False,
) -> Applied:
    """Makes `model(..., labels=labels)` compute its loss from hidden states. `logits` of its outputs is then None.

    Without labels, the forward is the model's own, and so is generation, in other threads at the same time too. So is
    an evaluation (`model.eval()` and no gradients), with logits and without label smoothing or z-loss, unless in_eval.
    Everything else that the forward does with labels stays: what it adds to the loss, the class of its outputs. Call
    this before `Accelerator.prepare`, which the Trainer calls; PEFT and FSDP2 may come before or after.
    `copy.deepcopy(model)` has the adapter, too; what `torch.save(model)` saves does not.

    Args:
        model: a `transformers` model with a causal language model's head that is a plain linear layer, or a module
            that contains one. The head may have LoRA.
        label_smoothing, z_loss_coef, chunk_bytes: as in `for_causal_lm_loss`. Set `label_smoothing_factor` of the
            Trainer to 0: it would take the labels away, and the model would compute its logits.
        in_eval: compute no logits in an evaluation either. Its outputs then have an object that refuses to be used.
        any_version: accept every version of transformers.

    Raises:
        ImportError: another version of transformers.
        ValueError: the model's forward or loss function was replaced, or an argument is out of range.
        TypeError: the head is not a plain linear layer, or is partitioned.
    """
    check_version("transformers", SUPPORTED, any_version)
    model = causal_model(model)
    name = type(model).__name__
    from transformers.loss.loss_utils import ForCausalLMLoss

    if SETTINGS in vars(model):
        raise ValueError(f"apply_to was already called for this {name}; call undo() of its result first")
    if "forward" in vars(model):
        raise ValueError(f"the forward of this {name} was replaced (by Accelerate, TRL or Liger); call apply_to before")
    if not isinstance(getattr(type(model), "loss_function", None), property):
        raise ImportError(f"{name}.loss_function is not a property here; install a tested version of transformers")
    if model.loss_function not in (ForCausalLMLoss, for_causal_lm_loss):
        raise ValueError(f"the loss_function of {name} is {model.loss_function!r}, expected ForCausalLMLoss")
    if "labels" not in inspect.signature(model.forward).parameters:
        raise TypeError(f"the forward of {name} has no argument labels, expected a model that computes a loss")
    if getattr(model, "_tp_size", None):
        raise TypeError(f"{name} was loaded with tensor parallelism; load it without tp_plan and use FSDP2")
    weight = parts_of_head(model.get_output_embeddings(), name)[0]
    if not isinstance(weight, DTensor):  # during the forward of FSDP2 it is a plain tensor
        check_whole(weight, name)
    loss = dict(label_smoothing=label_smoothing, z_loss_coef=z_loss_coef, chunk_bytes=chunk_bytes)
    with r1kernels.backend("reference"):  # now, and not in the first forward, the operation checks its arguments
        one = torch.zeros(1, 1)
        r1kernels.linear_cross_entropy(one, one.expand(len(weight), 1), torch.zeros(1, dtype=torch.long), **loss)
    vars(model)[SETTINGS] = SimpleNamespace(loss=loss, in_eval=in_eval)
    model.__class__ = _with_our_forward(type(model))
    return Applied(model)


@functools.cache
def _with_our_forward(base: type) -> type:
    """A class with the same name. A class, and not an attribute of the model, because copies of a model share those."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        settings, request = vars(self).get(SETTINGS), kwargs.pop(_REQUEST, None)
        given = kwargs.get("labels") if not args else signature.bind(self, *args, **kwargs).arguments.get("labels")
        if settings is None or (given is None and request is None):
            return base.forward(self, *args, **kwargs)
        # Not eval mode alone: a model from from_pretrained is in it, and loops without dropout train in it.
        evaluation = request is None and not self.training and not torch.is_grad_enabled()
        if evaluation and not settings.in_eval:
            return base.forward(self, *args, **kwargs)
        with without_logits(self, functools.partial(for_causal_lm_loss, **settings.loss)):
            outputs = base.forward(self, *args, **kwargs)
        if request is None:
            return outputs_without_logits(outputs, evaluation)
        # Here, where FSDP still has the whole weight.
        values = outputs.values() if isinstance(outputs, dict) else outputs
        logits = next(value for value in values if isinstance(value, Logits))
        hidden, head = logits.head_of_losses()
        ids = request.shift_labels.to(hidden.device)
        with labels_named("shift_labels", ids, logits.shape[-1], -100):
            results = r1kernels.linear_token_logprobs_and_entropy(
                hidden, token_ids=ids, mask=ids != -100, temperature=request.temperature,
                chunk_bytes=request.chunk_bytes, **head)
        return tuple(result.clone() for result in results)  # FSDP warns of views, whose hooks can be lost

    signature = inspect.signature(base.forward)
    return subclass_of(base, forward)


def token_logprobs(model: nn.Module, shift_labels: Tensor, **inputs: Any) -> Tensor:
    """The log-probs of `token_logprobs_and_entropy`, with the same arguments."""
    return token_logprobs_and_entropy(model, shift_labels, **inputs)[0]


def token_logprobs_and_entropy(
    model: nn.Module, shift_labels: Tensor, *, temperature: float | Tensor = 1.0, chunk_bytes: int | None = None,
    **inputs: Any,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each token and entropy of each row, from a model that `apply_to` was called for.

    Args:
        model: the model, or what wraps it (PEFT, DDP, FSDP, Accelerate).
        shift_labels: (B, T), the token that row t of the logits scores; -100 = not scored. For the tokens of
            `input_ids`: `torch.nn.functional.pad(input_ids, (0, 1), value=-100)[:, 1:]`.
        temperature, chunk_bytes: as in `r1kernels.LinearOptions`.
        **inputs: what the model's forward takes, but no labels. With `logits_to_keep`, shift_labels are of these rows.

    Returns:
        (logprobs, entropy), each (B, T), float32, nats, differentiable, 0 where shift_labels is -100.

    Raises:
        ValueError: `apply_to` was not called, labels are given, or shapes differ.
        TypeError: not a model, not a tensor.
    """
    if not isinstance(shift_labels, Tensor):
        raise TypeError(f"shift_labels is a {type(shift_labels).__name__}, expected a tensor (B, T) of token ids")
    if SETTINGS not in vars(causal_model(model)):
        raise ValueError("the model computes logits; call apply_to(model) before")
    if inputs.get("labels") is not None:
        raise ValueError("labels were given, expected shift_labels only")
    # Not a tuple or a dict: FSDP would round the temperatures in it.
    request = SimpleNamespace(shift_labels=shift_labels, temperature=temperature, chunk_bytes=chunk_bytes)
    return model(**inputs, **{_REQUEST: request})

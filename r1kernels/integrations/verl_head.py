"""verl's fused head by r1kernels: `use_fused_kernels: true` with `impl_backend: r1kernels`, or `patch_verl()`.

Log-probs and entropies come from hidden states without a tensor of logits, and so does sum p^2, which verl's optimal
token baseline needs and its own fused kernels do not have.
"""

from __future__ import annotations

import functools
import importlib
from contextlib import ExitStack
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import r1kernels
from r1kernels.integrations import check_version
from r1kernels.integrations.verl import SUPPORTED, hook

BACKEND, SUMS = "r1kernels", "calculate_sum_pi_squared"
HEAD, MODELS = "verl.utils.experimental.torch_functional", "verl.models.transformers.monkey_patch"
ENGINE = "verl.workers.engine.fsdp.transformer_impl"
# What the head adds sum p^2 of each token to, while a step of verl wants it.
_wanted: ContextVar[list[Tensor] | None] = ContextVar("sum_pi_squared", default=None)


class FusedLinear(torch.nn.Module):
    """verl's FusedLinearForPPO. `chunk_size` is a number of rows of logits; None for r1kernels' own choice."""

    def __init__(self, chunk_size: int | None = None, impl_backend: str = BACKEND) -> None:
        super().__init__()
        if chunk_size is not None and (isinstance(chunk_size, bool) or chunk_size < 1):
            raise ValueError(f"chunk_size is {chunk_size!r}, expected None or an integer >= 1")
        self.chunk_size, self.impl_backend = chunk_size, impl_backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(log_probs, entropy) in the shape of input_ids, float32, in nats.

        Args:
            hidden_states: (..., H), float; row t scores `input_ids[t]`.
            vocab_weights: (V, H), float.
            input_ids: (...), integers.
            temperature: > 0, divides the logits.
        """
        ids, options = input_ids.to(torch.int64), {"temperature": temperature}
        if self.chunk_size is not None:
            options["chunk_bytes"] = 4 * self.chunk_size * len(vocab_weights)
        wanted = _wanted.get()
        if wanted is None:
            return r1kernels.linear_token_logprobs_and_entropy(hidden_states, vocab_weights, ids, **options)
        fields = ("logprobs", "entropy", "sum_sq_probs")
        found = r1kernels.linear_token_statistics(hidden_states, vocab_weights, ids, fields=fields, **options)
        wanted.append(found.sum_sq_probs.detach())
        return found.logprobs, found.entropy


def check_head(model: Any) -> None:
    """Refuses a model for which verl's fused forward, hidden states times `lm_head.weight`, gives other logits.

    Raises:
        ValueError: its head is not a linear layer without bias, or its config scales or caps the logits.
    """
    way_on = "set actor_rollout_ref.model.use_fused_kernels to False for this model"
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        found = f"{type(head).__name__}{' with a bias' if getattr(head, 'bias', None) is not None else ''}"
        raise ValueError(f"the head of {type(model).__name__} is {found}, expected a torch.nn.Linear without bias: "
                         f"verl's fused forward uses nothing but its weight; {way_on}")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1):
            raise ValueError(f"{name} is {getattr(config, name)} in the config of {type(model).__name__}, expected "
                             f"None: verl's fused forward ignores it; {way_on}")


def patch_verl(backends: tuple[str, ...] = ("torch", "liger", "triton"), any_version: bool = False) -> ExitStack:
    """Makes verl's fused kernels use r1kernels in this process, until `close()` or the end of a `with` block.

    Call it before verl builds the model. With FSDP, `calculate_sum_pi_squared` then works with fused kernels, too.

    Args:
        backends: the values of `fused_kernel_options.impl_backend` that mean r1kernels, beside "r1kernels" itself.
        any_version: also with another version of verl than the tested one.

    Raises:
        ImportError: verl is not installed, it is another version, or it lacks what is replaced.
    """
    undo = ExitStack()
    with ExitStack() as on_error:
        on_error.callback(undo.close)
        add_backend(backends, any_version, undo)
        try:
            importlib.import_module(ENGINE)
        except ModuleNotFoundError as error:  # without peft, for example, verl has no FSDP
            if (error.name or "").startswith("verl"):
                raise ImportError(f"verl has no {ENGINE}; this adapter is for verl {SUPPORTED}") from error
        else:
            add_sums(any_version, undo)
        on_error.pop_all()
    return undo


def _replace(undo: ExitStack, holder: Any, name: str, new: Any) -> None:
    undo.callback(setattr, holder, name, getattr(holder, name))
    setattr(holder, name, new)


def add_backend(backends: tuple[str, ...] = (), any_version: bool = False, undo: ExitStack | None = None) -> None:
    """Makes verl's fused forward know the backend "r1kernels", and use it for `backends`."""
    check_version("verl", SUPPORTED, any_version)
    undo, names = ExitStack() if undo is None else undo, (*backends, BACKEND)
    hook(HEAD, "FusedLinearForPPO.forward", ("self", "hidden_states", "vocab_weights", "input_ids", "temperature"))
    head = hook(HEAD, "FusedLinearForPPO", ("chunk_size", "impl_backend"))
    patch = hook(MODELS, "patch_forward_with_backends", ("model", "use_fused_kernels", "fused_kernels_backend"))

    class FusedLinearForPPO(head):
        def __new__(cls, chunk_size: int | None = None, impl_backend: str = "torch") -> Any:
            return FusedLinear(chunk_size) if impl_backend in names else super().__new__(cls)

    @functools.wraps(patch)
    def patch_forward_with_backends(
        model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
    ) -> None:
        ours = use_fused_kernels and fused_kernels_backend in names
        if ours:
            check_head(model)
        # The forward of "torch" makes the head by the name in this attribute.
        patch(model, use_fused_kernels, "torch" if ours else fused_kernels_backend)
        if ours and fused_kernels_backend == BACKEND:
            model._verl_fused_kernels_backend = BACKEND

    _replace(undo, importlib.import_module(HEAD), "FusedLinearForPPO", FusedLinearForPPO)
    _replace(undo, importlib.import_module(MODELS), "patch_forward_with_backends", patch_forward_with_backends)


def add_sums(any_version: bool = False, undo: ExitStack | None = None) -> None:
    """Makes verl's FSDP engine return sum p^2 with fused kernels, which it refuses."""
    check_version("verl", SUPPORTED, any_version)
    engine = hook(ENGINE, "FSDPEngineWithLMHead")
    if "forward_step" not in vars(engine):  # its base class has one, too
        raise ImportError(f"verl has no {ENGINE}.FSDPEngineWithLMHead.forward_step; install verl=={SUPPORTED}.*")
    step = hook(ENGINE, "FSDPEngineWithLMHead.forward_step", ("self", "micro_batch", "loss_function", "forward_only"))
    outputs = hook(
        ENGINE, "FSDPEngineWithLMHead.prepare_model_outputs",
        ("self", "output", "output_args", "micro_batch", "logits_processor_func"),
    )
    flag = hook("verl.utils.tensordict_utils", "get_non_tensor_data", ("data", "key", "default"))
    assign = hook("verl.utils.tensordict_utils", "assign_non_tensor", ("tensor_dict",))
    if hasattr(step, "_r1kernels"):
        return

    @functools.wraps(step)
    def forward_step(self: Any, micro_batch: Any, *args: Any, **kwargs: Any) -> Any:
        both = all(flag(micro_batch, name, False) for name in (SUMS, "use_fused_kernels"))
        token = _wanted.set([] if both else None)
        try:
            return step(self, micro_batch, *args, **kwargs)
        finally:
            _wanted.reset(token)

    def without(micro_batch: Any, *names: str) -> Any:
        copy = micro_batch.copy()
        assign(copy, **dict.fromkeys(names, False))
        return copy

    @functools.wraps(outputs)
    def prepare_model_outputs(
        self: Any, output: Any, output_args: Any, micro_batch: Any, logits_processor_func: Any
    ) -> Any:
        found = _wanted.get()
        if not found:  # with another head, verl says that it has no sums
            return outputs(self, output, output_args, micro_batch, logits_processor_func)
        result = outputs(self, output, output_args, without(micro_batch, SUMS), logits_processor_func)
        # The sums take the way of log-probs: over the ranks of sequence parallelism, and from padding to sequences.
        alone = without(micro_batch, SUMS, "calculate_entropy", "distillation_use_topk", "distillation_only")
        placed = outputs(self, SimpleNamespace(log_probs=found[-1]), output_args, alone, None)
        return {**result, "sum_pi_squared": placed["log_probs"]}

    forward_step._r1kernels = True
    undo = ExitStack() if undo is None else undo
    _replace(undo, engine, "forward_step", forward_step)
    _replace(undo, engine, "prepare_model_outputs", prepare_model_outputs)

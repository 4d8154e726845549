"""verl's fused head by r1kernels: `use_fused_kernels: true` with `impl_backend: r1kernels`, or `patch_verl()`.

Log-probs and entropies come from hidden states without a tensor of logits, and so does sum p^2, which verl's optimal
token baseline needs and its own fused kernels do not have.
"""

from __future__ import annotations

import functools
import importlib
import inspect
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
_patches: list[VerlPatch] = []
_originals: dict[tuple[Any, str], Any] = {}  # what the last patch that is undone brings back


class FusedLinear(torch.nn.Module):
    """verl's FusedLinearForPPO. `chunk_size` is a number of rows of logits; None for r1kernels' own choice."""

    chunk_size: bool | int | None
    impl_backend: str

    def __init__(self, chunk_size: int | None = None, impl_backend: str = BACKEND) -> None:
        super().__init__()
        whole = isinstance(chunk_size, int) and not isinstance(chunk_size, bool)
        if chunk_size is not None and (not whole or chunk_size < 1):
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
            # A row has V logits and two copies of width H, in float32 or float64.
            entries, size = len(vocab_weights) + 2 * hidden_states.shape[-1], max(4, hidden_states.element_size())
            options["chunk_bytes"] = self.chunk_size * entries * size
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


class VerlPatch:
    """verl with the kernels of r1kernels, until `undo()` or the end of a `with` block."""

    def __init__(self, backends: tuple[str, ...], any_version: bool) -> None:
        if isinstance(backends, str):
            raise ValueError(f"backends is {backends!r}, expected a tuple of names")
        self.backends = backends
        _patches.append(self)
        try:
            add_backend(any_version, keep=False)
            try:
                importlib.import_module(ENGINE)
            except ModuleNotFoundError as error:  # without peft, for example, verl has no FSDP
                if (error.name or "").startswith("verl"):
                    raise ImportError(f"verl has no {ENGINE}; this adapter is for verl {SUPPORTED}") from error
            else:
                add_sums(any_version, keep=False)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """The last patch that is undone brings verl's own functions back. A second call does nothing."""
        if self in _patches:
            _patches.remove(self)
        while _originals and not _patches:
            (holder, name), original = _originals.popitem()
            setattr(holder, name, original)

    def __enter__(self) -> VerlPatch:
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo()


def patch_verl(backends: tuple[str, ...] = ("torch", "liger", "triton"), any_version: bool = False) -> VerlPatch:
    """Makes verl's fused kernels use r1kernels in this process; `undo()` or `with` ends it.

    Call it before verl builds the model. With FSDP, `calculate_sum_pi_squared` then works with fused kernels, too.

    Args:
        backends: the values of `fused_kernel_options.impl_backend` that mean r1kernels, beside "r1kernels" itself.
        any_version: also with another version of verl than the tested one.

    Raises:
        ImportError: verl is not installed, it is another version, or it lacks what is replaced.
    """
    return VerlPatch(backends, any_version)


def _is_ours(backend: str | None) -> bool:
    return backend == BACKEND or any(backend in patch.backends for patch in _patches)


def _replace(holder: Any, name: str, keep: bool, wrapper: Any) -> None:
    """Puts `wrapper(original)` into its place, once. `keep`: no patch that is undone brings the original back."""
    found = inspect.getattr_static(holder, name)
    if not hasattr(found, "_r1kernels"):
        new = functools.wraps(found)(wrapper(found))
        new._r1kernels = True
        setattr(holder, name, new)
        _originals[holder, name] = found
    if keep:
        _originals.pop((holder, name), None)


def add_backend(any_version: bool = False, keep: bool = True) -> None:
    """Makes verl's fused forward know the backend "r1kernels". With `keep`, the end of a patch does not undo it."""
    check_version("verl", SUPPORTED, any_version)
    hook(HEAD, "FusedLinearForPPO.forward", ("self", "hidden_states", "vocab_weights", "input_ids", "temperature"))
    head = hook(HEAD, "FusedLinearForPPO", ("chunk_size", "impl_backend"))
    hook(MODELS, "patch_forward_with_backends", ("model", "use_fused_kernels", "fused_kernels_backend"))

    # The class remains verl's own, so that its subclasses, `isinstance` and pickle work as before.
    def init_of(init: Any) -> Any:
        def __init__(self: Any, chunk_size: int | None = None, impl_backend: str = "torch") -> None:
            ours = _is_ours(impl_backend)
            options = {} if chunk_size is None else {"chunk_size": chunk_size}
            init(self, **options, impl_backend="torch" if ours else impl_backend)
            self._r1kernels_head = FusedLinear(chunk_size) if ours else None

        return __init__

    def forward_of(forward: Any) -> Any:
        def fused_forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            fused = getattr(self, "_r1kernels_head", None)  # made before the patch, it has no such attribute
            return forward(self, *args, **kwargs) if fused is None else fused(*args, **kwargs)

        return fused_forward

    def patch_of(patch: Any) -> Any:
        def patch_forward_with_backends(
            model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
        ) -> None:
            ours = use_fused_kernels and _is_ours(fused_kernels_backend)
            if ours:
                check_head(model)
            # The forward of "torch" makes the head by the name in this attribute.
            patch(model, use_fused_kernels, "torch" if ours else fused_kernels_backend)
            if ours and fused_kernels_backend == BACKEND:
                model._verl_fused_kernels_backend = BACKEND

        return patch_forward_with_backends

    _replace(head, "__init__", keep, init_of)
    _replace(head, "forward", keep, forward_of)
    _replace(importlib.import_module(MODELS), "patch_forward_with_backends", keep, patch_of)


def add_sums(any_version: bool = False, keep: bool = True) -> None:
    """Makes verl's FSDP engine return sum p^2 with fused kernels, which it refuses."""
    check_version("verl", SUPPORTED, any_version)
    engine = hook(ENGINE, "FSDPEngineWithLMHead")
    if "forward_step" not in vars(engine):  # its base class has one, too
        raise ImportError(f"verl has no {ENGINE}.FSDPEngineWithLMHead.forward_step; install verl=={SUPPORTED}.*")
    hook(ENGINE, "FSDPEngineWithLMHead.forward_step", ("self", "micro_batch", "loss_function", "forward_only"))
    hook(
        ENGINE, "FSDPEngineWithLMHead.prepare_model_outputs",
        ("self", "output", "output_args", "micro_batch", "logits_processor_func"),
    )
    flag = hook("verl.utils.tensordict_utils", "get_non_tensor_data", ("data", "key", "default"))
    assign = hook("verl.utils.tensordict_utils", "assign_non_tensor", ("tensor_dict",))

    def step_of(step: Any) -> Any:
        def forward_step(self: Any, micro_batch: Any, *args: Any, **kwargs: Any) -> Any:
            both = all(flag(micro_batch, name, False) for name in (SUMS, "use_fused_kernels"))
            token = _wanted.set([] if both else None)
            try:
                return step(self, micro_batch, *args, **kwargs)
            finally:
                _wanted.reset(token)

        return forward_step

    def without(micro_batch: Any, *names: str) -> Any:
        copy = micro_batch.copy()
        assign(copy, **dict.fromkeys(names, False))
        return copy

    def outputs_of(outputs: Any) -> Any:
        def prepare_model_outputs(
            self: Any, output: Any, output_args: Any, micro_batch: Any, logits_processor_func: Any
        ) -> Any:
            found = _wanted.get()
            if not found:  # with another head, verl says that it has no sums
                return outputs(self, output, output_args, micro_batch, logits_processor_func)
            result = outputs(self, output, output_args, without(micro_batch, SUMS), logits_processor_func)
            # verl brings log-probs from the ranks of sequence parallelism and from padding to sequences. The sums are
            # given to it in the place of log-probs, so that it does the same with them.
            alone = without(micro_batch, SUMS, "calculate_entropy", "distillation_use_topk", "distillation_only")
            placed = outputs(self, SimpleNamespace(log_probs=found[-1]), output_args, alone, None)
            return {**result, "sum_pi_squared": placed["log_probs"]}

        return prepare_model_outputs

    _replace(engine, "forward_step", keep, step_of)
    _replace(engine, "prepare_model_outputs", keep, outputs_of)

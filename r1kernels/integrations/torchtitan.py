"""torchtitan: losses for `Trainer.Config(loss=...)`, from logits and from hidden states.

    from r1kernels.integrations.torchtitan import CrossEntropyLoss, LinearCrossEntropyLoss, LinearPolicyLoss

`CrossEntropyLoss` takes the place of torchtitan's class of that name, also inside `ChunkedLossWrapper`.
`LinearCrossEntropyLoss` and `LinearPolicyLoss` take the place of the whole `ChunkedLossWrapper`: they get hidden states
and compute the loss in one walk over the vocabulary, without chunks of the sequence. Tested with torchtitan 0.3.0 from
PyPI; see docs/migrate/torchtitan.md. The classes inherit from torchtitan's, which is imported when one is first named.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

import r1kernels
from r1kernels.integrations import check_version, hook, require_tensor

VERSION = "0.3"
RATIO_CAP = math.exp(10)  # torchtitan limits log-ratios to 10, so that one token cannot make the loss inf
IGNORED = -100  # torchtitan's IGNORE_INDEX
_HOOKS = {
    "torchtitan.components.loss": ("CrossEntropyLoss.Config", "ChunkedLossWrapper.Config",
                                   "ChunkedLossWrapper.set_lm_head"),
    "torchtitan.distributed.spmd_types": ("spmd_mesh_size", "current_spmd_mesh"),
}
# What `LinearPolicyLoss` gets from torchtitan's experiments.rl beside labels.
_INPUTS = ("generator_logprobs", "advantages", "loss_mask")
NAMES = ("CrossEntropyLoss", "LinearCrossEntropyLoss", "LinearPolicyLoss")


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(losses(), name)


def losses(any_version: bool = False) -> types.SimpleNamespace:
    """The three classes, the same at every call. Their Config objects go where torchtitan's do.

    `CrossEntropyLoss.Config(global_vocab_size=None)`: sum of the cross-entropy of labels that are not -100, divided by
    `global_valid_tokens`. A vocabulary that tensor parallelism shards is computed where it is.
    `LinearCrossEntropyLoss.Config(z_loss_coef=0.0, label_smoothing=0.0, chunk_bytes=None)`: the same from hidden
    states (B, L, H); `chunk_bytes` is that of `r1kernels.LinearOptions`.
    `LinearPolicyLoss.Config(objective=objectives.dapo(clip_high=0.2, ratio_cap=RATIO_CAP), chunk_bytes=None)`: the loss
    of torchtitan.experiments.rl (GRPO, or DAPO with another clip_high), from hidden states, with `generator_logprobs`,
    `advantages` (B, L), and `loss_mask` (B, L), bool. Any objective with the ratio of single tokens, because each row
    may hold several sequences.

    Raises:
        ImportError: another version of torchtitan, or one without what these classes need.
        TypeError: when a loss is computed, a head that is not a linear layer, a mask that is not bool.
        ValueError: when a loss is computed, DTensors or tensor parallelism from hidden states, or an argument that the
            loss does not know.
    """
    if not _classes.cache_info().currsize:
        check_version("torchtitan", VERSION, any_version)
        for module, names in _HOOKS.items():
            for name in names:
                hook(module, name, f"install torchtitan=={VERSION}.*, or use torchtitan's own losses")
    return _classes()


@functools.cache
def _classes() -> types.SimpleNamespace:
    base = importlib.import_module("torchtitan.components.loss")
    spmd = importlib.import_module("torchtitan.distributed.spmd_types")

    class CrossEntropyLoss(base.CrossEntropyLoss):
        """torchtitan's CrossEntropyLoss with the kernels of r1kernels."""

        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(base.CrossEntropyLoss.Config):
            pass

        def __init__(self, config: Any, *, compile_config: Any = None) -> None:
            super().__init__(config)
            self.fn = functools.partial(_cross_entropy, spmd)

    class FromHidden(base.ChunkedLossWrapper):
        """What the losses of hidden states share. The trainer knows ChunkedLossWrapper, and gives it the head."""

        def __init__(self, config: Any, *, compile_config: Any = None) -> None:
            self.config, self.lm_head = config, None

        def through_head(self, pred: Tensor, labels: Tensor, loss: Callable[..., Any]) -> Any:
            """The result of loss(hidden, weight, labels, bias=, chunk_bytes=). It is computed in the head's forward,
            so that hooks of FSDP2 gather the weight before, and reduce its gradient after."""
            head = _checked_head(self.lm_head, pred, labels, spmd.spmd_mesh_size("tp"))
            options = {"chunk_bytes": self.config.chunk_bytes}
            before = vars(head).get("forward")
            head.forward = lambda hidden: loss(hidden, head.weight, labels, bias=head.bias, **options)
            try:
                return head(pred)
            finally:
                del head.forward
                if before is not None:
                    head.forward = before

    class LinearCrossEntropyLoss(FromHidden):
        """Cross-entropy of hidden states."""

        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(base.ChunkedLossWrapper.Config):
            z_loss_coef: float = 0.0
            label_smoothing: float = 0.0
            chunk_bytes: int | None = None

        def __call__(
            self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **inputs: Any
        ) -> tuple[Tensor, dict[str, Tensor]]:
            if inputs:
                raise ValueError(f"{', '.join(inputs)} given to LinearCrossEntropyLoss, expected pred, labels and "
                                 "global_valid_tokens; use torchtitan's ChunkedLossWrapper with your own loss")
            loss = self.through_head(pred, labels, functools.partial(
                r1kernels.linear_cross_entropy, ignore_index=IGNORED, reduction="sum",
                z_loss_coef=self.config.z_loss_coef, label_smoothing=self.config.label_smoothing))
            return loss if global_valid_tokens is None else loss / global_valid_tokens, {}

    class LinearPolicyLoss(FromHidden):
        """The policy loss of hidden states."""

        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(base.ChunkedLossWrapper.Config):
            objective: r1kernels.Objective = r1kernels.objectives.dapo(  # noqa: RUF009 - frozen
                clip_high=0.2, ratio_cap=RATIO_CAP)
            chunk_bytes: int | None = None

        def __call__(
            self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | float | None = None, **inputs: Any
        ) -> tuple[Tensor, dict[str, Tensor]]:
            return _policy_loss(self, pred, labels, global_valid_tokens, inputs)

    kinds = {kind.__name__: kind for kind in (CrossEntropyLoss, LinearCrossEntropyLoss, LinearPolicyLoss)}
    for name, kind in kinds.items():  # where pickle finds them
        kind.__qualname__, kind.Config.__qualname__ = name, f"{name}.Config"
    return types.SimpleNamespace(**kinds)


def _cross_entropy(spmd: Any, pred: Tensor, labels: Tensor, *, global_vocab_size: int | None = None) -> Tensor:
    """torchtitan's `cross_entropy_loss`: the sum over labels that are not ignored, float32."""
    group = None
    if isinstance(labels, DTensor):
        raise ValueError(f"labels are a DTensor with placements {labels.placements}, expected a tensor; use "
                         "torchtitan's own CrossEntropyLoss with this backend of SPMD")
    if isinstance(pred, DTensor):
        if pred.placements != (Shard(pred.dim() - 1),):
            raise ValueError(f"pred has placements {pred.placements}, expected a vocabulary that is sharded over one "
                             "dimension; use torchtitan's own CrossEntropyLoss")
        group, global_vocab_size, pred = pred.device_mesh.get_group(), pred.shape[-1], pred.to_local()
    elif spmd.spmd_mesh_size("tp") > 1:
        group = spmd.current_spmd_mesh().get_group("tp")
    return r1kernels.cross_entropy(
        pred, labels, ignore_index=IGNORED, reduction="sum", process_group=group,
        vocab_size=None if group is None else global_vocab_size)


def _checked_head(head: Any, pred: Tensor, labels: Tensor, tensor_parallel: int) -> nn.Linear:
    # A converted head (float8) or one that scales its logits has a forward of its own.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise TypeError(f"lm_head is a {type(head).__name__}, expected a linear layer with the forward of "
                        "torch.nn.Linear; use torchtitan's ChunkedLossWrapper with CrossEntropyLoss of this module")
    if tensor_parallel > 1 or isinstance(pred, DTensor) or isinstance(labels, DTensor):
        raise ValueError("the head is sharded by tensor parallelism, expected a whole weight (FSDP2 is fine); use "
                         "torchtitan's ChunkedLossWrapper with CrossEntropyLoss of this module")
    return head


def _policy_loss(
    self: Any, pred: Tensor, labels: Tensor, valid: Tensor | float | None, inputs: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    if set(inputs) != set(_INPUTS):
        raise ValueError(f"a policy loss was given {', '.join(inputs) or 'no inputs'}, expected {', '.join(_INPUTS)}, "
                         f"as torchtitan {VERSION} gives them in experiments.rl")
    objective, old = self.config.objective, inputs["generator_logprobs"]
    if not isinstance(objective, r1kernels.Objective):
        raise TypeError(f"objective is {objective!r}, expected an r1kernels.Objective, such as objectives.grpo()")
    for name in _INPUTS:
        require_tensor(name, inputs[name], tuple(labels.shape), boolean=name == "loss_mask")
    if objective.needs_sequences or objective.kl_coef != 0:
        raise ValueError(f"objective has ratio {objective.ratio!r}, aggregate {objective.aggregate!r} and kl_coef "
                         f"{objective.kl_coef}, expected 'token', 'token_mean' and 0: torchtitan packs sequences into "
                         "rows and gives no log-probs of a reference model")
    mask = inputs["loss_mask"] & old.isfinite() & (labels != IGNORED)
    result = self.through_head(pred, torch.where(mask, labels, 0), functools.partial(
        r1kernels.linear_grpo_loss, advantages=inputs["advantages"], old_logprobs=old, mask=mask, normalizer=1.0,
        objective=objective, measure_all=True))
    divisor = 1.0 if valid is None else max(valid, 1) if isinstance(valid, (int, float)) else valid.clamp(min=1)
    # Those that torchtitan adds up over ranks end with "mean" or "frac".
    share = result.metrics["tokens"] / divisor
    metrics = {"loss/mean": result.loss.detach() / divisor}
    for ours, theirs in (("ratio_mean", "loss/ratio_mean"), ("clip_fraction", "loss/ratio_clipped_frac"),
                         ("approx_kl", "loss/approx_kl_mean"), ("entropy", "trainer/entropy/mean")):
        if ours in result.metrics:
            metrics[theirs] = result.metrics[ours] * share
    return result.loss / divisor, metrics

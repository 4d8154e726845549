"""The loss of TRL's GRPOTrainer in one pass from hidden states.

The pass runs where TRL calls its own log-prob function, in the forward of the model, so wrappers of the model (DDP,
FSDP, DeepSpeed, PEFT) and inputs like images work as in TRL. It gives TRL log-probs and entropies without a gradient,
from which TRL computes the value of the loss, the metrics and the next entropy coefficient as ever. The gradient of the
loss is that of the pass.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

import r1kernels
from r1kernels import objectives
from r1kernels.integrations.trl import LogProbs, checked_utils, head_of, swapped
from r1kernels.integrations.trl_options import check_trainer, objective_of


class _Layout(NamedTuple):
    """How tokens (B, T) lie in the rows that TRL scores: all positions (B, L), or those of the completions, packed."""

    kept: Tensor  # (B, T), True where a completion has a token
    places: Tensor | None  # (N,) of (B, T), if they are packed

    @staticmethod
    def of(kept: Tensor, rows: int, positions: int) -> _Layout:
        """`positions`: L, the smallest number that TRL scores of a sequence unless it packs."""
        if rows >= len(kept) * positions:
            return _Layout(kept, None)
        return _Layout(kept, kept.reshape(-1).nonzero_static(size=rows)[:, 0])  # without a synchronisation

    def rows(self, value: Tensor | None) -> Tensor | None:
        """What the loss gets of a value per token (B, T)."""
        return value if self.places is None or value is None else value.reshape(-1)[self.places]

    def tokens(self, value: Tensor) -> Tensor:
        """(B, T) of what the loss gave, 0 where a completion has no token."""
        if self.places is None:
            return value
        return value.new_zeros(self.kept.numel()).index_copy(0, self.places, value).reshape(self.kept.shape)

    def of_trl(self, value: Tensor, rows: int) -> Tensor:
        """What TRL expects of its function: a value for each of its rows."""
        if self.places is not None:
            return self.rows(value)
        before = rows // len(value) - value.shape[1]
        return torch.nn.functional.pad(value, (before, 0)).reshape(-1)


class _OnePass:
    """In the place of TRL's function while a GRPO loss is computed. One token of its result carries the gradient."""

    def __init__(self, trainer: Any, inputs: dict[str, Any]) -> None:
        self.trainer, self.inputs = trainer, inputs
        self.kept = inputs["completion_mask"].bool()
        flat = self.kept.reshape(-1)
        self.carrier = (flat & (flat.cumsum(0) == 1)).reshape(self.kept.shape)

    def apply(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_size: int,
        final_logit_softcapping: float | None, logit_scale: float, outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        (count, length), rows = self.kept.shape, len(hidden)
        layout = _Layout.of(self.kept, rows, self.inputs["prompt_ids"].shape[1] + length - 1)
        hidden, weight, options = head_of(hidden, weight, bias, temperature, final_logit_softcapping, logit_scale)
        if layout.places is None:
            hidden = hidden.reshape(count, -1, hidden.shape[-1])[:, -length:]
            targets = targets.reshape(count, -1)[:, -length:]
        with torch.autocast(hidden.device.type, enabled=False):
            loss, logprobs, entropy = _loss(self.trainer, self.inputs, layout, (hidden, weight, targets), options)
        # The gradient leaves the model through its output, so that wrappers of the model see it.
        logprobs = logprobs + torch.where(self.carrier, loss - loss.detach(), 0)
        return layout.of_trl(logprobs, rows), layout.of_trl(entropy, rows), None, None, None


def _normalizer(trainer: Any, inputs: dict[str, Any], mask: Tensor, steps: float) -> Tensor | float:
    """The denominator of one micro-batch: gradients of accumulated micro-batches are added."""
    if trainer.loss_type in ("cispo", "dapo", "vespo"):
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
        return tokens * (steps / trainer.args.steps_per_generation if trainer.model.training else 1)
    if trainer.loss_type == "bnpo":
        return mask.sum().clamp(min=1) * steps
    return len(mask) * steps * (trainer.max_completion_length if trainer.loss_type == "dr_grpo" else 1)


def _entropy_coef(trainer: Any) -> float:
    waits = trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target
    return 0.0 if waits or not trainer._entropy_bonus_enabled else trainer.entropy_coef


def _loss(
    trainer: Any, inputs: dict[str, Any], layout: _Layout, head: tuple[Tensor, ...], options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, log-probs (B, T), entropies (B, T)): one pass, after statistics where TRL's filters need them first."""
    mask, rows = inputs["completion_mask"] * inputs.get("tool_mask", 1), layout.rows
    old = inputs.get("old_per_token_logps")
    advantages = inputs["advantages"]
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    quantile, threshold, name = trainer.top_entropy_quantile, trainer.off_policy_mask_threshold, trainer.loss_type
    weights, counted, stats = torch.ones_like(mask, dtype=torch.float32), mask, None
    if quantile < 1 or threshold is not None or name == "vespo":
        with torch.no_grad():
            found = r1kernels.linear_token_logprobs_and_entropy(*head, mask=rows(mask), **options)
        logprobs, entropy = stats = tuple(map(layout.tokens, found))
        before = logprobs if old is None else old
    if name == "vespo":
        advantages = advantages * trainer.get_gamma_weights(
            advantages, logprobs - before, mask, inputs.get("importance_sampling_ratio"), trainer.args.vespo_k_pos,
            trainer.args.vespo_lambda_pos, trainer.args.vespo_k_neg, trainer.args.vespo_lambda_neg)
    elif trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        weights = weights * inputs["importance_sampling_ratio"]
    if threshold is not None:
        sampled = inputs.get("sampling_per_token_logps", before)
        weights = weights * trainer.get_off_policy_mask(advantages, logprobs, sampled, mask, threshold)
    if quantile < 1:
        counted = mask * trainer.get_high_entropy_mask(entropy, mask, 1 - quantile)
        weights = weights * counted

    objective = objective_of(trainer)
    steps = float(trainer.current_gradient_accumulation_steps) if trainer.model.training else 1.0
    normalizer, coef, bonus, used = _normalizer(trainer, inputs, mask, steps), _entropy_coef(trainer), None, mask
    if coef:  # TRL's bonus is a mean over the tokens that the filter keeps, whatever the loss type
        tokens = counted.sum().clamp(min=1) * steps
        if trainer.beta == 0 and (objective.ratio == "token" or quantile == 1):  # one pass for both terms
            weights = weights * (tokens / normalizer)
            if objective.aggregate == "sequence_mean":
                weights = weights / mask.sum(1, keepdim=True).clamp(min=1)
            objective = dataclasses.replace(objective, aggregate="token_mean", max_length=None, entropy_coef=coef)
            normalizer, used = tokens, counted
        else:
            bonus = {"mask": rows(counted), "normalizer": tokens, "objective": objectives.reinforce(entropy_coef=coef)}
    ends = None if layout.places is None else torch.nn.functional.pad(layout.kept.sum(1).cumsum(0), (1, 0))
    dtype = torch.float64 if head[0].dtype == torch.float64 else torch.float32
    into = tuple(torch.empty(head[2].shape, dtype=dtype, device=mask.device) for _ in range(2))
    loss = r1kernels.linear_grpo_loss(
        *head, rows(advantages.float().expand(mask.shape)), old_logprobs=rows(old), mask=rows(used),
        ref_logprobs=rows(inputs["ref_per_token_logps"]) if trainer.beta else None,
        importance_weights=rows(weights), normalizer=normalizer, objective=objective, measure_all=stats is None,
        token_stats_into=into, cu_seqlens=ends, **options,
    ).loss
    if bonus is not None:
        nothing = torch.zeros(head[2].shape, device=mask.device)
        loss = loss + r1kernels.linear_grpo_loss(*head, nothing, **bonus, **options).loss
    logprobs, entropy = stats or tuple(map(layout.tokens, into))
    # A tool's tokens, which nothing scores, get a ratio of 1, which is finite in TRL's sums.
    return loss, logprobs if old is None else torch.where(mask.bool(), logprobs, old), entropy


class R1GRPOMixin:
    """Before a subclass of `trl.GRPOTrainer`: its loss in one pass. TRL's own code computes the metrics from it.

    Raises:
        ImportError: as `patch_trl`, or the trainer lacks what the one pass reads.
        TypeError: the mixin is not before a GRPOTrainer.
        ValueError: an option that the one pass does not have, or another subclass's own loss; the message names it.
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        before = cls.__mro__[1 : cls.__mro__.index(R1GRPOMixin)]
        hidden = [kind for kind in before if "_compute_loss" in vars(kind) and not issubclass(kind, R1GRPOMixin)]
        if hidden:
            raise TypeError(f"{cls.__name__} has {hidden[0].__name__} before R1GRPOMixin, expected the mixin first: "
                            "otherwise its loss is never called")

    _r1_inputs: dict[str, Any] | None = None  # of the loss that is being computed
    _r1_carried: Tensor | None = None

    def __init__(self, *args: Any, any_version: bool = False, **keywords: Any) -> None:
        checked_utils(any_version)
        super().__init__(*args, **keywords)
        check_trainer(self)

    def _get_per_token_logps_and_entropies(self, *args: Any, **keywords: Any) -> tuple[Tensor | None, ...]:
        trl: Any = super()
        if self._r1_inputs is None:  # of the rollout's policy, or of the reference model
            with swapped(LogProbs):
                return trl._get_per_token_logps_and_entropies(*args, **keywords)
        one_pass = _OnePass(self, self._r1_inputs)
        with swapped(one_pass):
            logprobs, entropy, aux_loss = trl._get_per_token_logps_and_entropies(*args, **keywords)
        self._r1_carried = torch.where(one_pass.carrier, logprobs, 0).sum()
        return logprobs.detach(), entropy.detach(), aux_loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        trl: Any = super()
        if not torch.is_grad_enabled():
            return trl._compute_loss(model, inputs)
        self._r1_inputs = inputs
        try:
            loss = trl._compute_loss(model, inputs)  # its value and metrics; it has no gradient but of aux_loss
        finally:
            self._r1_inputs = None
        carried, self._r1_carried = self._r1_carried, None
        return loss + (carried - carried.detach())


def __getattr__(name: str) -> Any:
    if name != "R1GRPOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import trl

    class R1GRPOTrainer(R1GRPOMixin, trl.GRPOTrainer):
        """`trl.GRPOTrainer` with the loss of `R1GRPOMixin`."""

        __qualname__ = name  # pickle looks it up in this module

    globals()[name] = R1GRPOTrainer
    return R1GRPOTrainer

"""GRPO and related losses from logits: token statistics, then the policy loss; or both fused into one kernel.

All tensors between the two vocabulary kernels have the size of [tokens]. So only the logits and their gradient have
the width of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1kernels import _dispatch, objectives
from r1kernels.objectives import Objective
from r1kernels.ops import grpo_step
from r1kernels.ops._checks import accumulator_dtype, check_floating, check_tensor
from r1kernels.ops.policy_inputs import CustomObjective, check_inputs
from r1kernels.ops.policy_loss import PolicyLoss, compute, named, over_ranks
from r1kernels.ops.sequence_group import checked_sequence_group
from r1kernels.ops.shards import NOT_SHARDED, Split
from r1kernels.ops.token_logprobs import logprobs_and_entropy
from r1kernels.ops.token_stats import checked


def grpo_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    importance_weights: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    temperature: float = 1.0,
    objective: Objective | CustomObjective = objectives.grpo(),  # noqa: B008 - frozen
    sequence_group: torch.distributed.ProcessGroup | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    vocab_size: int | None = None,
    support: tuple[Tensor, Tensor] | None = None,
) -> PolicyLoss:
    r"""Policy-gradient loss from logits: the drop-in for log_softmax, gather, entropy, ratio, clip and KL.

        loss = sum_t w_t (iw_t surrogate_t + kl_coef kl_t - entropy_coef H_t),  l_t = log softmax(logits_t / T)[token_t]

    Args:
        logits: (B, T, V), or packed (N, V) with `cu_seqlens`; float32, bfloat16 or float16 (float64: reference). Any
            strides: rows are read in place. Row t scores token t. Pass the model's whole logits, with
            `input_ids.roll(-1, 1)` and the last column masked: the backward of a slice `[:, :-1]` would copy the
            gradient into a second tensor of full width. -inf entries are allowed.
        token_ids: (B, T) or (N,), int64 or int32, in [0, V); behind the mask they may hold anything.
        temperature: Python number > 0; use the temperature with which the tokens were sampled.
        sequence_group: as in `policy_loss`. logits, token_ids and all values per token are those of this rank's tokens.
        process_group, vocab_size: logits of a sharded or padded vocabulary, as in `token_logprobs`.
        support: the sets of ids over which tokens are scored, as in `token_logprobs`.

    The other arguments are those of `policy_loss`. Masked rows of logits are never read.

    Returns:
        `PolicyLoss(loss, metrics)`; the gradient of logits has their dtype.

    Raises:
        TypeError, ValueError: naming the argument, its value and the expectation.

    Memory: the gradient of logits, and 64 bytes a token. CUDA kernels (`r1kernels.backend("cuda")`, or where they are
        measured to be faster) compute the whole step at once, if the objective depends on single tokens, the logits
        are float32 or bfloat16 and require a gradient, and `torch.compile` is not used. The forward then reads the
        logits once and writes their gradient once. The backward multiplies it by the factor that it receives. Unless
        the factor is 1, this costs one more read, write and rounding: use `normalizer` to scale the loss. A row is
        read twice if it and its (contiguous) gradient are not aligned alike within 16 bytes, or if the shared memory
        of a cluster cannot hold it.

    Equivalent to: `policy_loss(*token_logprobs_and_entropy(logits, token_ids), ...)`.
    Source: arXiv 2402.03300; the presets in `r1kernels.objectives` name theirs.
    """
    check_floating("logits", logits)
    check_tensor("token_ids", token_ids, logits)
    inputs = check_inputs(
        logits,
        tuple(token_ids.shape),
        advantages,
        tokens="token_ids",
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        mask=mask,
        cu_seqlens=cu_seqlens,
        importance_weights=importance_weights,
        normalizer=normalizer,
        objective=objective,
        dtype=accumulator_dtype(logits.dtype),
        group=checked_sequence_group(sequence_group),
    )
    split = Split(process_group, vocab_size)
    whole = split == NOT_SHARDED and support is None
    if whole and _dispatch.choose("grpo_step", logits, inputs).implementation == "fused":
        ids, temperature = checked(logits, token_ids, temperature)
        loss, metrics = grpo_step.grpo_step(logits, ids, inputs, temperature)
        return named(loss, metrics, inputs, entropy=True)
    logprobs, entropy = logprobs_and_entropy(logits, token_ids, inputs.batch.mask, temperature, split, support)
    return over_ranks(compute(logprobs, entropy, inputs), inputs.group)

r"""Log-prob and entropy of each token from hidden states and the weight of the head.

    l = z_y - lse,  H = -sum_j p_j log p_j,  z = logits(hidden) / T

Forward keeps two float64 numbers a token. Backward computes the logits of each row with a gradient again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from r1kernels import _library
from r1kernels.ops._autograd import differentiable_once
from r1kernels.ops._checks import accumulator_dtype, as_mask, check_tensor
from r1kernels.ops.linear.dtensor import local_tensors
from r1kernels.ops.linear.gradients import Targets
from r1kernels.ops.linear.head import Head, Needs
from r1kernels.ops.linear.options import Call, Constants, LinearOptions, prepare
from r1kernels.ops.linear.passes import run_backward, run_statistics
from r1kernels.ops.linear.support import run_support_backward, run_support_statistics
from r1kernels.ops.support import Index, Support


@torch.library.impl("r1kernels::linear_token_stats", "CompositeExplicitAutograd")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *head, mask = args
    return run_statistics(Head(*head), hidden, mask)


@torch.library.impl("r1kernels::linear_token_stats_backward", "CompositeExplicitAutograd")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    head, given, needs = Head(*args[: len(Head._fields)]), args[len(Head._fields) : -1], Needs(*args[-1])
    return run_backward(head, hidden, *given, needs)


@torch.library.impl("r1kernels::linear_support_stats", "CompositeExplicitAutograd")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *head, mask, token_ids, offsets = args
    return run_support_statistics(Head(*head), hidden, mask, Support(token_ids, offsets))


@torch.library.impl("r1kernels::linear_support_stats_backward", "CompositeExplicitAutograd")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    head, given, needs = Head(*args[: len(Head._fields)]), args[len(Head._fields) : -1], Needs(*args[-1])
    slopes, (token_ids, offsets, values, *index), weight_dtype = given[:4], given[4:-1], given[-1]
    return run_support_backward(
        head, hidden, *slopes, Support(token_ids, offsets), values, Index(*index), weight_dtype, needs
    )


class _LinearTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None,
        lora_b: Tensor | None, constants: Constants, mask: Tensor | None, support: Support | None,
    ) -> tuple[Tensor, Tensor]:
        head, into, shard = constants
        tensors = (hidden, weight, bias, lora_a, lora_b)
        full = head.with_tensors(*tensors[1:])
        sets: tuple[Tensor, ...] = ()  # and what the forward keeps of them
        if support is not None:
            logprobs, lse, entropy, *kept = _library.call(
                torch.ops.r1kernels.linear_support_stats.default, hidden, *full, mask, *support
            )
            sets = (*support, *kept)
        elif shard is None:
            logprobs, lse, entropy = _library.call(
                torch.ops.r1kernels.linear_token_stats.default, hidden, *full, mask
            )
        else:
            logprobs, lse, entropy = run_statistics(full, hidden, mask, shard)
        ctx.save_for_backward(*tensors, head.token_ids, head.temperatures, lse, entropy, *sets)
        ctx.head, ctx.shard = head._replace(token_ids=None, temperatures=None), shard
        ctx.targets = Targets.of(ctx.needs_input_grad, tensors, into)
        ctx.set_materialize_grads(False)
        return logprobs, entropy.to(logprobs.dtype)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 8
        hidden, *others = ctx.saved_tensors[:5]
        token_ids, temperatures, lse, entropy, *sets = ctx.saved_tensors[5:]
        head = ctx.head._replace(token_ids=token_ids, temperatures=temperatures).with_tensors(*others)
        targets = Targets(Needs(*ctx.needs_input_grad[:5]), *ctx.targets[1:])  # the needs of this backward
        # What is added to other memory is not rounded before.
        weight_dtype = targets.shapes[1][1] if targets.into is None else accumulator_dtype(hidden.dtype)
        given = (
            lse,
            entropy,
            None if grad_logprobs is None else grad_logprobs.contiguous(),
            None if grad_entropy is None else grad_entropy.contiguous(),
            *sets,
            weight_dtype,
        )
        if sets:
            operator = torch.ops.r1kernels.linear_support_stats_backward.default
            grads = _library.run(operator, hidden, *head, *given, list(targets.needs))
        elif ctx.shard is None:
            operator = torch.ops.r1kernels.linear_token_stats_backward.default
            grads = _library.run(operator, hidden, *head, *given, list(targets.needs))
        else:
            grads = run_backward(head, hidden, *given, targets.needs, ctx.shard)
        return *targets.finished(grads, None), None, None, None


def linear_token_stats(call: Call, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(log-prob, entropy), each (N,), 0 where `mask` (N,) is False; differentiable.

    Callers send gradient 0 to masked tokens.
    """
    return _LinearTokenStats.apply(*call.tensors, call.constants, mask, call.support)


def _public(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, mask: Tensor | None, options: LinearOptions
) -> tuple[Tensor, Tensor]:
    hidden, weight, options = local_tensors(hidden, weight, options)
    check_tensor("token_ids", token_ids)
    mask = as_mask(mask, token_ids, tuple(token_ids.shape))
    call = prepare(hidden, weight, token_ids, dict(options), mask=mask, function="linear_token_logprobs")
    results = linear_token_stats(call, None if mask is None else mask.reshape(-1))
    if mask is not None:  # stops the gradient of masked tokens
        results = tuple(torch.where(mask.reshape(-1), value, 0) for value in results)
    logprobs, entropy = (value.reshape(token_ids.shape) for value in results)
    return logprobs, entropy


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    mask: Tensor | None = None,
    **options: Unpack[LinearOptions],
) -> Tensor:
    r"""Log-probability of each token from hidden states, without a tensor of logits.

        l = z_y - log sum_j e^{z_j},  z = softcap(logit_scale (hidden W^T + bias)) / temperature

    Args:
        hidden: (..., H), float32, bfloat16 or float16; float64 runs on the reference. Any strides: `hidden[:, :-1]`
            is not copied. Row t scores token t: shift before the call.
        weight: (V, H): the lm_head, or the embedding it is tied to. It has the dtype of hidden, or one of the two is
            float32 and the other bfloat16 or float16. Then only the gradients of 16-bit tensors are rounded, but
            products take several times as long. Under autocast, `weight.to(hidden.dtype)` avoids that.
        token_ids: (...), int64 or int32, in [0, V).
        mask: (...), True or nonzero = counts. Tokens where it is False are not computed, give 0, may hold anything.
        **options: the keywords of `LinearOptions`.

    Returns:
        (...), float32 (float64 for float64 hidden), nats. Differentiable once with respect to hidden, weight, bias
        and the adapter. Backward computes the logits again, only of rows that have a gradient.

    Raises:
        TypeError, ValueError: naming the argument, its value and the expectation.

    Memory: `chunk_bytes`, 48 bytes a token, the gradients, and the weight's in float32. On a GPU, it is not needed in
    float32 if hidden and weight have the same 16-bit dtype and all d logits fit in `chunk_bytes`.

    Equivalent to: `token_logprobs(hidden.float() @ weight.float().T, token_ids)`
    """
    return _public(hidden, weight, token_ids, mask, options)[0]


def linear_token_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    mask: Tensor | None = None,
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, Tensor]:
    r"""Log-probability of each token and entropy of each row from hidden states, without a tensor of logits.

        l = z_y - lse,  H = -sum_j p_j log p_j,  with 0 log 0 = 0; both differentiable.

    Args, errors and memory are those of `linear_token_logprobs`.

    Returns:
        (logprobs, entropy), each (...), float32, nats.

    Equivalent to: `token_logprobs_and_entropy(hidden.float() @ weight.float().T, token_ids)`
    """
    return _public(hidden, weight, token_ids, mask, options)

r"""Statistics of each token from hidden states and the weight of the head: `r1kernels.ops.token_statistics`, chunk by
chunk. Backward computes the logits of each row with a gradient again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from r1kernels import _library
from r1kernels.ops._autograd import differentiable_once
from r1kernels.ops._checks import accumulator_dtype, as_mask, check_ids_in_range, check_tensor
from r1kernels.ops.linear.dtensor import local_tensors
from r1kernels.ops.linear.gradients import Targets
from r1kernels.ops.linear.head import Head, Needs
from r1kernels.ops.linear.options import Call, Constants, LinearOptions, prepare
from r1kernels.ops.linear.passes import run_token_statistics, run_token_statistics_backward
from r1kernels.ops.row_statistics import RowStatistics, Selected, Slopes, wanted_number
from r1kernels.ops.shards import Shard, Split, agree, checksum, refusals
from r1kernels.ops.support import refuse_support
from r1kernels.ops.token_statistics import (
    DEFAULT_FIELDS,
    TokenStatistics,
    checked_fields,
    checked_selected,
    constants_of,
    named,
    of_tokens,
    slopes_of,
)


@torch.library.impl("r1kernels::linear_token_statistics", "CompositeExplicitAutograd")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *head, mask, ids, wanted = args
    selected = None if ids is None else Selected(ids, None)
    rows, chosen = run_token_statistics(Head(*head), hidden, mask, wanted, selected)
    return *rows, hidden.new_empty(0, dtype=torch.float64) if chosen is None else chosen


@torch.library.impl("r1kernels::linear_token_statistics_backward", "CompositeExplicitAutograd")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    head, (lse, entropy, sum_sq, ids, slopes, weight_dtype, needs) = (
        Head(*args[: len(Head._fields)]), args[len(Head._fields) :]
    )
    selected = None if ids is None else Selected(ids, None)
    return run_token_statistics_backward(
        head, hidden, lse, entropy, sum_sq, selected, Slopes(*slopes), weight_dtype, Needs(*needs)
    )


class _LinearTokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
        constants: Constants, mask: Tensor | None, selected_ids: Tensor | None, selected_shard: Shard | None,
        fields: tuple[str, ...],
    ) -> tuple[Tensor, ...]:
        head, into, shard = constants
        tensors = (hidden, weight, bias, lora_a, lora_b)
        full, wanted = head.with_tensors(*tensors[1:]), wanted_number(fields)
        if shard is None:
            *rows, chosen = _library.call(
                torch.ops.r1kernels.linear_token_statistics.default, hidden, *full, mask, selected_ids, wanted
            )
            rows = RowStatistics(*rows)
        else:
            selected = None if selected_ids is None else Selected(selected_ids, selected_shard)
            rows, chosen = run_token_statistics(full, hidden, mask, wanted, selected, shard)
        sum_sq = rows.more[0].contiguous() if "sum_sq_probs" in fields else None
        ctx.save_for_backward(
            *tensors, head.token_ids, head.temperatures, selected_ids, rows.lse, rows.entropy, sum_sq
        )
        ctx.head, ctx.shard = head._replace(token_ids=None, temperatures=None), shard
        ctx.selected_shard, ctx.fields = selected_shard, fields
        ctx.targets = Targets.of(ctx.needs_input_grad, tensors, into)
        ctx.set_materialize_grads(False)
        results = of_tokens(rows, chosen, fields, accumulator_dtype(hidden.dtype))
        ctx.mark_non_differentiable(*constants_of(fields, results))
        return tuple(results)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        slopes = slopes_of(ctx.fields, grads)
        if slopes is None:
            return (None,) * 10
        *tensors, token_ids, temperatures, selected_ids, lse, entropy, sum_sq = ctx.saved_tensors
        hidden, *others = tensors
        head = ctx.head._replace(token_ids=token_ids, temperatures=temperatures).with_tensors(*others)
        targets = Targets(Needs(*ctx.needs_input_grad[:5]), *ctx.targets[1:])  # the needs of this backward
        # What is added to other memory is not rounded before.
        weight_dtype = targets.shapes[1][1] if targets.into is None else accumulator_dtype(hidden.dtype)
        if ctx.shard is None:
            operator = torch.ops.r1kernels.linear_token_statistics_backward.default
            results = _library.run(
                operator, hidden, *head, lse, entropy, sum_sq, selected_ids, list(slopes), weight_dtype,
                list(targets.needs),
            )
        else:
            selected = None if selected_ids is None else Selected(selected_ids, ctx.selected_shard)
            results = run_token_statistics_backward(
                head, hidden, lse, entropy, sum_sq, selected, slopes, weight_dtype, targets.needs, ctx.shard
            )
        return *targets.finished(results, None), *[None] * 5


def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    fields: tuple[str, ...] = DEFAULT_FIELDS,
    selected_ids: Tensor | None = None,
    mask: Tensor | None = None,
    **options: Unpack[LinearOptions],
) -> TokenStatistics:
    r"""Statistics of each token from hidden states, without a tensor of logits.

        lse = log sum_j e^{z_j},  l = z_y - lse,  H = -sum_j p_j log p_j,  S = sum_j p_j^2,
        z = softcap(logit_scale (hidden W^T + bias)) / temperature

    Args:
        hidden, weight, token_ids, mask: as in `linear_token_logprobs`.
        fields, selected_ids: as in `token_statistics`.
        **options: the keywords of `LinearOptions`. With process_group, all ranks give the same fields and selected ids.

    Returns:
        `TokenStatistics`; what is differentiable there is so with respect to hidden, weight, bias and the adapter.
        Backward computes the logits again, only of rows that have a gradient.

    Raises:
        TypeError, ValueError: naming the argument, its value and the expectation.

    Memory: that of `linear_token_logprobs`, 32 bytes a token, and 16 for each selected id.

    Equivalent to: `token_statistics(hidden.float() @ weight.float().T, token_ids)`
    """
    refuse_support(options, "linear_token_statistics")
    hidden, weight, options = local_tensors(hidden, weight, options)
    group, _ = Split(options.get("process_group"), options.get("vocab_size")).checked()
    with refusals(group, hidden):
        check_tensor("token_ids", token_ids)
        mask = as_mask(mask, token_ids, tuple(token_ids.shape))
        fields = checked_fields(fields, selected_ids)
        selected = checked_selected(selected_ids, token_ids, mask)
    call = prepare(
        hidden, weight, token_ids, dict(options), mask=mask, function=f"linear_token_statistics of {fields}"
    )
    selected, selected_shard = _placed(call, selected, group)
    values = _LinearTokenStatistics.apply(
        *call.tensors, call.constants, None if mask is None else mask.reshape(-1), selected, selected_shard, fields
    )
    return named(fields, values, mask, token_ids.shape)


def _placed(call: Call, selected: Tensor | None, group: Any) -> tuple[Tensor | None, Shard | None]:
    """Selected ids (N, K) as the rows of this rank's weight, and which of them it has."""
    if selected is None:
        return None, None
    shard = call.shard
    vocab = len(call.tensors[1]) if shard is None else shard.layout.vocab
    if group is not None:
        facts = {"the number of selected ids": selected.shape[1],
                 "the checksum of selected ids": checksum(selected, None)}
        agree(group, "process_group", facts, selected.device)
    check_ids_in_range("selected_ids", selected, vocab, None)
    if shard is None:
        return selected, None
    selected_shard = Shard(shard.layout, selected, None)
    return selected_shard.ids.reshape(selected.shape), selected_shard

r"""Distillation from hidden states: the mean divergence of the counted tokens without a tensor of logits.

One walk over row chunks (`r1kernels.ops.linear.divergence`) computes values and gradients together, because the slope
of a token's divergence is known as soon as the divergence is. In float16, gradients need the loss scale before they are
rounded. Only the backward knows the scale, so it walks over the chunks again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from r1kernels import _library
from r1kernels.ops._autograd import differentiable_once, origin_of
from r1kernels.ops._checks import as_mask, check_floating
from r1kernels.ops.distillation_loss import (
    DistillationLoss,
    check_positive_normalizer,
    check_settings,
    check_top_k,
    check_topk,
    reduce,
    shape_text,
)
from r1kernels.ops.divergence import KINDS
from r1kernels.ops.linear.budget import row_bytes
from r1kernels.ops.linear.divergence import LinearTeacher, Mixture, measures, run_divergence
from r1kernels.ops.linear.dtensor import local_tensors, probes
from r1kernels.ops.linear.gradients import Targets
from r1kernels.ops.linear.head import Head, Names, Needs
from r1kernels.ops.linear.options import Call, Constants, LinearOptions, prepare
from r1kernels.ops.shards import Shard, Split
from r1kernels.ops.support import refuse_support
from r1kernels.ops.teacher_mixture import check_coefs, is_several
from r1kernels.ops.topk_choice import Scorer

TEACHER_OPTIONS = ("bias", "lora", "logit_scale", "softcap")
# Temporary float64 memory in `topk_divergence` for each of the K + 1 outcomes of a row of a top-k teacher.
_OUTCOME_BYTES = 128
_TEACHER_TENSORS = ("hidden", "weight", "bias", "lora_a", "lora_b", "token_ids", "logprobs")
_NO_GRADIENTS = Needs(False, False, False, False, False)


class Aside(NamedTuple):
    """What an operator cannot take: the walk is then called directly."""

    shard: Shard | None
    scorer: Scorer | None
    mixture: Mixture | None


def _run(
    inputs: tuple[Tensor | None, ...], head: Head, mask: Tensor | None, teacher: LinearTeacher, factor: Tensor,
    kind: int, beta: float, needs: Needs, aside: Aside,
) -> tuple[Tensor, ...]:
    hidden, *others = inputs
    full = head.with_tensors(*others)
    if any(value is not None for value in aside):
        return run_divergence(full, hidden, mask, teacher, factor, KINDS[kind], beta, needs, *aside)
    return _library.call(
        torch.ops.r1kernels.linear_divergence.default, hidden, *full, mask, *teacher, factor, kind, beta, list(needs)
    )


def _factor(head: Head, mask: Tensor | None, normalizer: Tensor | float | None) -> Tensor:
    """The factor of the sum of the divergences: 0-d, float64."""
    ids = head.token_ids
    if normalizer is None:
        normalizer = max(ids.numel(), 1) if mask is None else mask.sum().double().clamp(min=1)
    if isinstance(normalizer, Tensor):
        return 1 / normalizer.to(ids.device, torch.float64)
    return _library.as_tensor(1 / normalizer, torch.float64, ids.device)


class _LinearDivergence(torch.autograd.Function):
    """The loss, and the metrics of `reduce`, in its order, as constants.

    With `one_pass`, gradients are computed with the loss. With `two_phases`, the inputs are kept for backward instead.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None,
        lora_b: Tensor | None, constants: Constants, mask: Tensor | None, teacher: LinearTeacher,
        scorer: Scorer | None, mixture: Mixture | None, normalizer: Tensor | float | None, kind: int, beta: float,
        one_pass: bool, two_phases: bool, origin: Tensor | None,
    ) -> tuple[Tensor, ...]:
        head, into, shard = constants
        aside = Aside(shard, scorer, mixture)
        inputs = (hidden, weight, bias, lora_a, lora_b)
        ctx.targets = Targets.of(ctx.needs_input_grad, inputs, into)
        factor = _factor(head, mask, normalizer)
        measured, *grads = _run(
            inputs, head, mask, teacher, factor, kind, beta, ctx.targets.needs if one_pass else _NO_GRADIENTS,
            aside,
        )
        value, *rows = measured.unbind(0)
        loss, metrics = reduce(value, mask, normalizer, dict(zip(measures(teacher), rows, strict=True)))
        if one_pass:
            ctx.save_for_backward(*grads, origin)
        elif two_phases:
            tensors = [getattr(teacher, name) for name in _TEACHER_TENSORS]
            ctx.save_for_backward(*inputs, head.token_ids, mask, factor, *tensors)
            ctx.arguments = head._replace(token_ids=None), kind, beta
            ctx.teacher = teacher._replace(**dict.fromkeys(_TEACHER_TENSORS))
        ctx.one_pass, ctx.aside = one_pass, aside
        ctx.mark_non_differentiable(*metrics.values())
        return loss, *metrics.values()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved, upstream = ctx.saved_tensors, grad_loss
        if ctx.one_pass:
            *grads, _ = saved
        else:
            inputs, (token_ids, mask, factor), teacher = saved[:5], saved[5:8], saved[8:]
            head, kind, beta = ctx.arguments
            _loss, *grads = _run(
                inputs, head._replace(token_ids=token_ids), mask,
                ctx.teacher._replace(**dict(zip(_TEACHER_TENSORS, teacher, strict=True))), factor * grad_loss, kind,
                beta, ctx.targets.needs, ctx.aside,
            )
            upstream = None
        return *ctx.targets.finished(grads, upstream), *[None] * 11


def _full_teacher(
    hidden: Any, weight: Any, options: Any, student: Tensor, split: dict[str, Any]
) -> tuple[LinearTeacher, tuple[int, ...], int]:
    """The teacher, the rows of its weight on each rank, and the bytes that one of its rows of logits needs."""
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise TypeError(f"teacher_options is a {type(options).__name__}, expected a dict")
    for name in options:
        if name not in TEACHER_OPTIONS:
            raise TypeError(f"teacher_options has the key {name!r}, expected one of {', '.join(TEACHER_OPTIONS)}")
    names = Names("teacher_hidden", "teacher_weight", "teacher_options ")
    hidden, weight, options = local_tensors(hidden, weight, options | split, names)
    check_floating("teacher_hidden", hidden, student)
    if hidden.dim() == 0 or hidden.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"teacher_hidden has shape {tuple(hidden.shape)}, expected {shape_text(student.shape[:-1], 'H')}: one "
            "row for each of student_hidden"
        )
    call = prepare(
        hidden, weight, _no_tokens(hidden), options, names=names, function="the teacher of linear_distillation_loss"
    )
    head = call.head.with_tensors(*call.tensors[1:])
    constants = [None if value is None else value.detach() for value in (hidden, *head[:4])]
    teacher = LinearTeacher(*constants, logit_scale=head.logit_scale, softcap=head.softcap)
    sizes = _rows_of_ranks(call)
    return teacher, sizes, row_bytes(max(sizes), hidden.shape[-1], head.logits_dtype)


def _each_teacher(given: tuple[Any, Any, Any], several: bool) -> list[tuple[Any, Any, Any]]:
    """(hidden, weight, options) of each teacher."""
    if not several:
        return [given]
    hidden, weights, options = given
    options = [None] * len(hidden) if options is None else options
    for name, value in (("teacher_weight", weights), ("teacher_options", options)):
        if not is_several(value) or len(value) != len(hidden):
            count = f" of {len(value)}" if is_several(value) else ""
            raise ValueError(
                f"{name} is a {type(value).__name__}{count} and teacher_hidden a list of {len(hidden)}, expected one "
                "for each teacher"
            )
    return list(zip(hidden, weights, options, strict=True))


def _rows_of_ranks(call: Call) -> tuple[int, ...]:
    return (len(call.tensors[1]),) if call.shard is None else call.shard.layout.sizes


def _no_tokens(hidden: Tensor) -> Tensor:
    """A head counts its tokens by their ids; a divergence needs no ids."""
    return hidden.new_zeros(hidden.shape[:-1], dtype=torch.int64)


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor] | None = None,
    teacher_weight: Tensor | Sequence[Tensor] | None = None,
    *,
    teacher_coefs: Tensor | None = None,
    teacher_token_ids: Tensor | None = None,
    teacher_logprobs: Tensor | Scorer | None = None,
    top_k: int | None = None,
    top_k_of: str = "student",
    tail: str = "bucket",
    mask: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    normalizer: Tensor | float | None = None,
    teacher_options: LinearOptions | Sequence[LinearOptions] | None = None,
    **options: Unpack[LinearOptions],
) -> DistillationLoss:
    r"""Distillation from hidden states of both models: `distillation_loss` without a tensor of logits.

        loss = sum_t D(q_t, p_t) / normalizer,  p = softmax(z_student / T),  q = softmax(z_teacher / T),
        z = softcap(logit_scale (hidden W^T + bias)), each with its own weight, width H and options

    Args:
        student_hidden: (..., H), float32, bfloat16 or float16; float64 runs on the reference. Any strides.
        student_weight: (V, H), dtype as in `linear_token_logprobs`.
        teacher_hidden: (..., H'), one row for each of student_hidden; any of these dtypes and any width.
        teacher_weight: (V, H'), dtype as in `linear_token_logprobs`. Constants: the teacher gets no gradient.
            Or lists of M hidden states and weights, several teachers, as in `distillation_loss`.
        teacher_coefs: (M,) or (..., M), the weights of several teachers.
        teacher_token_ids, teacher_logprobs: (..., K), a top-k teacher instead; as in `distillation_loss`. With `top_k`,
            teacher_logprobs may be a function, which is called once a chunk; in float16, again in the backward.
        top_k, top_k_of, tail: as in `distillation_loss`. K tokens are chosen from the logits of each chunk.
        mask: (...), True or nonzero = counts. Rows where it is False are not computed, and may hold anything.
        divergence, beta, normalizer: as in `distillation_loss`.
        teacher_options: `bias`, `lora`, `logit_scale` and `softcap` of the teacher, as in `LinearOptions`. Its logits
            are float32. Of several teachers, a list.
        **options: the keywords of `LinearOptions`, for the student. `temperature` is one number for both models, and
            `chunk_bytes` is for the logits of both; `process_group` and `vocab_size` are about both vocabularies, which
            are sharded in the same way; `batch_invariant` is about the value of a token's
            divergence.

    Returns:
        `DistillationLoss(loss, metrics)`, as in `distillation_loss`. Gradients are computed with the loss, and backward
        only scales them; in float16, backward computes all logits again.

    Raises:
        TypeError, ValueError: naming the argument, its value and the expectation. Vocabularies that differ are an
            error, never padded.

    Memory: `chunk_bytes`, the weight's gradient in float32, the gradient of student_hidden, and 64 bytes a token; with
    a top-k teacher, also about 35 (K + 1) bytes a token.

    Equivalent to: `distillation_loss(student_hidden.float() @ student_weight.float().T,
    teacher_hidden.float() @ teacher_weight.float().T)`
    Source: as in `distillation_loss`.
    """
    refuse_support(options, "linear_distillation_loss")
    names = Names("student_hidden", "student_weight")
    student_hidden, student_weight, options = local_tensors(student_hidden, student_weight, options, names)
    kind, beta, _ = check_settings(divergence, beta, options.get("temperature", 1.0))
    check_floating("student_hidden", student_hidden)
    local_weight = probes(student_weight, options)[1]
    check_floating("student_weight", local_weight)
    group, _ = Split(options.get("process_group"), options.get("vocab_size")).checked()
    full = {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}
    choice = check_top_k(
        top_k, top_k_of, tail, full, teacher_token_ids, teacher_logprobs,
        _vocab(local_weight, options.get("vocab_size")), group,
    )
    k = (2 if top_k_of == "union" else 1) * choice.k or _listed_count(teacher_token_ids)
    shape = student_hidden.shape[:-1]
    mask = as_mask(mask, student_hidden, shape)
    normalizer = check_positive_normalizer(normalizer, student_hidden)
    mixture, checked = None, []
    if teacher_hidden is not None:
        split = {name: value for name, value in options.items() if name in ("process_group", "vocab_size")}
        coefs = check_coefs(
            teacher_coefs, "teacher_hidden", teacher_hidden, shape, student_hidden, mask, group
        )
        given = (teacher_hidden, teacher_weight, teacher_options)
        checked = [_full_teacher(*one, student_hidden, split) for one in _each_teacher(given, coefs is not None)]
        teacher, extra = checked[0][0], sum(each[2] for each in checked)
        if coefs is not None:
            mixture = Mixture(tuple(each[0] for each in checked[1:]), coefs.reshape(-1, len(checked)))
        if choice.k:
            teacher = teacher._replace(top_k=choice.k, top_k_of=top_k_of, tail=tail)
            extra += _OUTCOME_BYTES * (k + 1)
    elif teacher_coefs is not None:
        raise ValueError("teacher_coefs is given without teacher_hidden, expected a list of teachers")
    elif teacher_options is not None:
        raise ValueError("teacher_options is given with teacher_logprobs, but it needs teacher_hidden")
    else:
        teacher, extra = LinearTeacher(top_k=choice.k, tail=tail), _OUTCOME_BYTES * (k + 1)
    function = ""
    if options.get("process_group") is not None:  # otherwise, a compiled graph would keep beta as a constant
        of_teacher = f"{k} tokens of the teacher, tail {tail}" if teacher.has_list else "a whole teacher"
        function = f"linear_distillation_loss with {kind}, beta {beta} and {of_teacher}"
    call = prepare(
        student_hidden, student_weight, _no_tokens(student_hidden), dict(options), mask=mask, names=names,
        extra_row_bytes=extra, function=function,
    )
    rows = _rows_of_ranks(call)
    scorer = None
    if teacher.hidden is None and choice.k:
        scorer = teacher_logprobs
    elif teacher.hidden is None:
        listed = check_topk(teacher_token_ids, teacher_logprobs, student_hidden, shape, sum(rows), mask)
        flat = (value.reshape(-1, listed.token_ids.shape[-1]) for value in listed if value is not None)
        teacher = teacher._replace(**dict(zip(("token_ids", "logprobs"), flat, strict=False)))
    for _, sizes, _ in checked:
        if sizes == rows:
            continue
        theirs, ours = (
            each[0] if len(each) == 1 else f"{sum(each)} (of the ranks: {each})" for each in (sizes, rows)
        )
        raise ValueError(
            f"teacher_weight has a vocabulary of {theirs} and student_weight one of {ours}, expected the "
            "same tokens in the same order"
        )
    if (scorer is not None or mixture is not None) and torch.compiler.is_compiling():
        name = "teacher_hidden is a list" if scorer is None else "teacher_logprobs is a function"
        raise ValueError(f"{name} in code that torch.compile traces, expected a call outside of it")
    loss, *metrics = _LinearDivergence.apply(
        *call.tensors, call.constants, None if mask is None else mask.reshape(-1), teacher, scorer, mixture,
        normalizer, KINDS.index(kind), beta, call.one_pass, call.wanted and not call.one_pass, origin_of(*call.tensors),
    )
    named = ("tokens", "divergence", *measures(teacher), "nonfinite_tokens")
    return DistillationLoss(loss, dict(zip(named, metrics, strict=True)))


def _vocab(weight: Tensor, vocab_size: Any) -> int:
    """V without padding, as far as it is known before `prepare` checks both."""
    rows = weight.shape[:1].numel()
    return min(rows, vocab_size) if isinstance(vocab_size, int) else rows


def _listed_count(token_ids: Any) -> int:
    """K; `check_topk` refuses ids without a dimension K."""
    return token_ids.shape[-1] if isinstance(token_ids, Tensor) and token_ids.dim() > 0 else 0

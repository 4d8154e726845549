r"""Distillation from a teacher's logits, or from its K likeliest tokens: the mean divergence of the counted tokens.

    loss = sum_t D_t / normalizer,    D_t = D(teacher's row t, student's row t)

The vocabulary axis is `r1kernels.ops.divergence` (full teachers) and `r1kernels.ops.topk_divergence`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from r1kernels.ops._checks import (
    as_mask,
    check_floating,
    check_normalizer,
    check_number,
    check_positive,
    check_shape,
    check_temperature,
    ids_int64,
)
from r1kernels.ops.divergence import KINDS
from r1kernels.ops.divergence import divergence as _divergence
from r1kernels.ops.sharded_divergence import sharded_divergence
from r1kernels.ops.sharded_topk import sharded_topk
from r1kernels.ops.shards import NOT_SHARDED, Facts, Layout, Shard, Split, agreed_layout, layout_of, refusals
from r1kernels.ops.teacher_mixture import check_coefs, mixed_logits
from r1kernels.ops.topk_choice import TOP_K_OF, Scorer, chosen_teacher
from r1kernels.ops.topk_divergence import measures, topk_divergence
from r1kernels.ops.topk_teacher import TAILS, Teacher, check_values, make_teacher


class DistillationLoss(NamedTuple):
    """`loss`: 0-d, float32, differentiable. `metrics`: name -> 0-d float32 tensor on the loss's device.

    Means are over counted tokens. `tokens`: how many there are. `divergence`: its mean, whatever the normalizer.
    `student_entropy`, and `teacher_entropy` (full teachers). If K tokens are compared: `student_tail_mass` and, unless
    tail="renormalize", `teacher_tail_mass`, the probability outside the listed tokens. `nonfinite_tokens`: tokens
    whose divergence is inf or NaN, even if their gradient is finite; a token whose gradient is NaN is one of them. If
    it is not 0, the loss is not finite.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def check_teacher_kind(full: dict[str, Any], teacher_token_ids: Any, teacher_logprobs: Any) -> None:
    """Checks that the caller gives either all of `full` (a teacher of the whole vocabulary) or a top-k teacher."""
    topk = {"teacher_token_ids": teacher_token_ids, "teacher_logprobs": teacher_logprobs}
    given = [name for name, value in (full | topk).items() if value is not None]
    if given not in (list(full), list(topk)):
        raise ValueError(
            f"the teacher is given by {' and '.join(given) or 'nothing'}, expected {' and '.join(full)}, or "
            f"{' and '.join(topk)}"
        )


class TopK(NamedTuple):
    """Which tokens are compared, and what becomes of the others: 0 for `k` if they are given, or are all."""

    k: int
    of: str
    tail: str


def check_top_k(
    top_k: Any, top_k_of: Any, tail: Any, full: dict[str, Any], teacher_token_ids: Any, teacher_logprobs: Any,
    vocab: int, group: Any,
) -> TopK:
    """Checks the teacher as `check_teacher_kind` does, and how K tokens are chosen. `full`: arguments of a teacher of
    the whole vocabulary."""
    if tail not in TAILS:
        raise ValueError(f"tail is {tail!r}, expected one of {', '.join(TAILS)}")
    if top_k_of not in TOP_K_OF:
        raise ValueError(f"top_k_of is {top_k_of!r}, expected one of {', '.join(TOP_K_OF)}")
    if top_k is None:
        if callable(teacher_logprobs):
            raise ValueError("teacher_logprobs is a function and top_k is None, expected the number of tokens")
        check_teacher_kind(full, teacher_token_ids, teacher_logprobs)
        for name, value, default in (("top_k_of", top_k_of, "student"), ("tail", tail, "bucket")):
            if value != default and (name == "top_k_of" or teacher_token_ids is None):
                raise ValueError(f"{name} is {value!r} and top_k is None, expected top_k, the number of tokens")
        return TopK(0, top_k_of, tail)
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"top_k is {top_k!r}, expected a Python integer")
    if teacher_token_ids is not None:
        raise ValueError("top_k and teacher_token_ids are given, expected one of them: top_k chooses the ids")
    if group is not None:
        raise ValueError(
            "top_k and process_group are given, expected one of them: over a sharded vocabulary, give teacher_token_ids"
        )
    if not 1 <= top_k <= vocab:
        raise ValueError(f"top_k is {top_k}, expected a number from 1 to V = {vocab}")
    if teacher_logprobs is None:
        check_teacher_kind(full, None, None)
    elif any(value is not None for value in full.values()) or not callable(teacher_logprobs):
        raise ValueError(
            f"top_k is given with teacher_logprobs (a {type(teacher_logprobs).__name__}), expected either a function "
            f"of the chosen ids or {' and '.join(full)}"
        )
    elif top_k_of != "student":
        raise ValueError(f"top_k_of is {top_k_of!r} and teacher_logprobs is a function, expected 'student'")
    return TopK(top_k, top_k_of, tail)


def check_settings(divergence: Any, beta: Any, temperature: Any) -> tuple[str, float, float]:
    """The settings every distillation loss shares."""
    if divergence not in KINDS:
        raise ValueError(f"divergence is {divergence!r}, expected one of {', '.join(KINDS)}")
    beta = check_number("beta", beta)
    if divergence == "jsd" and not 1e-6 <= beta <= 1 - 1e-6:
        raise ValueError(
            f"beta is {beta!r}, expected a number from 1e-6 to 1 - 1e-6 (at the ends use forward_kl and reverse_kl)"
        )
    return divergence, beta, check_temperature(temperature)


def check_positive_normalizer(normalizer: Any, like: Tensor) -> Tensor | float | None:
    """None, a number > 0, or a constant 0-d tensor in float64 on the device of `like`."""
    normalizer = check_normalizer(normalizer, like)
    check_positive("normalizer", normalizer)
    return normalizer.double() if isinstance(normalizer, Tensor) else normalizer


def shape_text(shape: tuple[int, ...], name: str) -> str:
    """A shape whose last dimension has a name instead of a number: (2, 3, K)."""
    return f"({', '.join([*map(str, shape), name])}{'' if shape else ','})"


def check_topk(
    token_ids: Any, logprobs: Any, like: Tensor, shape: tuple[int, ...], vocab: int, mask: Tensor | None
) -> Teacher:
    """A top-k teacher of tokens of `shape`, as constants."""
    token_ids = ids_int64("teacher_token_ids", token_ids, like)
    check_floating("teacher_logprobs", logprobs, like)
    if token_ids.dim() != len(shape) + 1 or token_ids.shape[:-1] != shape or not 1 <= token_ids.shape[-1] <= vocab:
        raise ValueError(
            f"teacher_token_ids has shape {tuple(token_ids.shape)}, expected {shape_text(shape, 'K')} with "
            f"1 <= K <= V = {vocab}"
        )
    check_shape("teacher_logprobs", logprobs, token_ids.shape, "one log-prob for each of teacher_token_ids")
    check_values(token_ids, logprobs.detach(), vocab, mask)
    return make_teacher(token_ids, logprobs, mask)


def reduce(
    value: Tensor, mask: Tensor | None, normalizer: Tensor | float | None, means: dict[str, Tensor]
) -> DistillationLoss:
    """Loss and metrics from the divergence and the other measures of every token; 0 behind the mask."""
    if mask is None:
        tokens = torch.full((), float(value.numel()), dtype=torch.float64, device=value.device)
    else:
        tokens = mask.sum().double()
        # `where` sets the gradient behind the mask to 0; a product with 0 could give NaN.
        value = torch.where(mask, value, 0)
    total, at_least_one = value.double().sum(), tokens.clamp(min=1)
    dtype = value.dtype
    loss = (total / (at_least_one if normalizer is None else normalizer)).to(dtype)
    metrics = {"tokens": tokens, "divergence": total.detach() / at_least_one}
    metrics |= {name: row.double().sum() / at_least_one for name, row in means.items()}
    metrics["nonfinite_tokens"] = (~value.detach().isfinite()).sum()
    return DistillationLoss(loss, {name: metric.to(dtype) for name, metric in metrics.items()})


def _check_teacher_logits(teacher: Any, student: Tensor) -> None:
    check_floating("teacher_logits", teacher, student)
    if teacher.dim() > 0 and teacher.shape[-1] != student.shape[-1]:
        raise ValueError(
            f"teacher_logits has a vocabulary of {teacher.shape[-1]} and student_logits one of {student.shape[-1]}, "
            "expected the same tokens in the same order"
        )
    check_shape("teacher_logits", teacher, student.shape, "one row for each of student_logits")


def _layout(
    split: Split, student: Tensor, teacher_dtype: torch.dtype, mask: Tensor | None, temperature: float,
    settings: tuple[Any, ...],
) -> tuple[Layout, Shard | None]:
    """How the vocabulary is split."""
    group, vocab_size = split.checked()
    rows, tokens = student.shape[-1], student.shape[:-1].numel()
    if group is None:
        return layout_of((rows,), vocab_size), None
    facts = Facts(
        "distillation_loss", tokens, tokens if mask is None else mask.sum(), 0, 0, vocab_size or -1,
        (student.dtype, teacher_dtype), temperature, (), settings,
    )
    layout = agreed_layout(group, rows, facts, student.device)
    return layout, Shard(layout, torch.zeros(tokens, dtype=torch.int64, device=student.device), None)


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor] | None = None,
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
    temperature: float = 1.0,
    normalizer: Tensor | float | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> DistillationLoss:
    r"""Mean divergence of a student from a teacher, over the whole vocabulary or the teacher's K likeliest tokens.

        forward_kl  KL(q||p) = sum_j q_j (log q_j - log p_j)
        reverse_kl  KL(p||q)
        jsd         beta KL(q||m) + (1 - beta) KL(p||m),  m = beta q + (1 - beta) p

    with p = softmax(student_logits / T), q = softmax(teacher_logits / T) and 0 log 0 = 0.

    Args:
        student_logits: (..., V), float32, bfloat16 or float16; float64 runs on the reference. Any strides.
        teacher_logits: (..., V), the same shape, any of these dtypes. A constant: the teacher gets no gradient. Or a
            list of M such tensors, several teachers: q is the mixture sum_m c_m q_m.
        teacher_coefs: (M,) or (..., M), float, >= 0, sum 1: the weights c of several teachers. A row with a single 1
            chooses a teacher.
        teacher_token_ids: (..., K), int64 or int32, in [0, V), distinct in a row, 1 <= K <= V; instead of
            teacher_logits. Any K tokens: the teacher's likeliest, those that the student proposed, or candidates.
        teacher_logprobs: (..., K), float: their log-probs, used unchanged (at the temperature of the request to the
            teacher). -inf marks an absent entry, whose id is ignored. A value up to 1e-3 above 0 is rounding and
            counts as 0. A row whose probabilities add up to a little more than 1 is scaled down; above 1.01 it is
            refused. With `top_k`, a function instead of teacher_logits: (chosen ids (n, K), rows (n,), the numbers of
            their tokens) -> log-probs (n, K), of which -inf means probability 0.
        top_k: Python integer from 1 to V: only K tokens of a row are compared, chosen from logits in this call. The
            choice is a constant. Of equal logits, the smaller id is chosen.
        top_k_of: "student", its K likeliest tokens (on-policy distillation), "teacher", or "union" of both, up to 2 K.
        tail: what becomes of the tokens that are not compared. "bucket": they are one more outcome. "truncate": their
            terms are left out. "renormalize": the K probabilities of both are scaled to the sum 1.
        mask: (...), True or nonzero = counts. Nothing behind a False matters, not even NaN, and its row is not used.
        divergence: "forward_kl", "reverse_kl" or "jsd".
        beta: Python number; from 1e-6 to 1 - 1e-6 for "jsd", unused otherwise. As beta goes to 0, jsd / beta goes to
            KL(q||p); as it goes to 1, jsd / (1 - beta) goes to KL(p||q).
        temperature: Python number > 0, of the student and of teacher_logits. The loss has no factor T^2: multiply it
            by T^2 to keep gradients comparable across temperatures (Hinton et al., 2015).
        normalizer: 0-d tensor or number > 0; replaces the number of counted tokens. Pass the global number under
            gradient accumulation or data parallelism; the summed gradient then equals that of the whole batch.
        process_group: both vocabularies are sharded over these ranks in the same way, as in `token_logprobs`. A
            top-k teacher is the same on all ranks, with ids of the whole vocabulary.
        vocab_size: V without padding, of both. Entries (over all ranks) from this one on are not read, and get
            gradient 0.

    With tail="bucket", K tokens are compared as K + 1 outcomes: the K tokens, and all the others together. Here
    q_rest = max(1e-7, 1 - sum q_k), and p_rest is the sum over the tail, not 1 - sum. The result is a lower bound of
    the full divergence (except for the floor): it does not depend on how the student spreads its tail. Log-probs are
    rounded, so a tail below 1e-7 may not really be 0. With the floor, the q_k are scaled to add up to 1 - 1e-7, and no
    teacher is infinitely far from a student that forbids no token. If a teacher was truncated and renormalised, the
    loss pushes the student's tail down as if the teacher's tail were 1e-7: in reverse_kl its term is
    p_rest log(p_rest / 1e-7). Where the student has no tail (K = V, or -inf outside the list), a teacher's tail below
    1e-3 counts as 0 too; K = V gives the full divergence.

    tail="truncate" is the sum of the terms of the K tokens, with the probabilities of the whole vocabulary. It is not
    a divergence: it can be negative, and the student can lower it by moving probability out of the list.
    tail="renormalize" is the divergence of q_k / sum q and p_k / sum p: its gradient is 0 outside the list, and it does
    not depend on how much probability the list has. If one of them gives the list none, it is inf, with gradient 0.

    Where q_j > 0 = p_j, forward_kl is inf and its gradient p - q is finite. Where p_j > 0 = q_j, reverse_kl is inf and
    its gradient is 0, because no finite change of the logits makes it finite. jsd is always finite. A batch without
    counted tokens has loss 0.

    Returns:
        `DistillationLoss(loss, metrics)`; float32 (float64 for float64 logits), nats. Differentiable once with respect
        to student_logits; the gradient has their dtype.

    Raises:
        TypeError, ValueError: naming the argument, its value and the expectation. Vocabularies that differ are an
            error, never padded. Values of top-k teachers are checked on the CPU only, where it costs no
            synchronisation.

    Memory: 70 bytes a token at the peak of the forward; 24 of them are kept for the backward. The gradient is the only
    buffer of vocabulary width. Top-k: about 75 (K + 1) + 50 bytes a token at the peak (17 (K + 1) are kept), and two
    buffers of 8 MiB (or a row) at a time, in the backward too. The mixture of several teachers is a float32 tensor of
    the shape of student_logits, and takes a second one while it is computed.

    Equivalent to: `torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="sum") / tokens` (forward_kl).
    Source: Hinton et al. 2015 (1503.02531); generalised JSD, on-policy distillation: Agarwal et al. 2023 (2306.13649),
    eq. 2; the student's top-k, renormalized: 2604.13016; the table of docs/distillation.md.
    """
    kind, beta, temperature = check_settings(divergence, beta, temperature)
    full = {"teacher_logits": teacher_logits}
    check_floating("student_logits", student_logits)
    split = Split(process_group, vocab_size)
    group, vocab_size = split.checked()
    if student_logits.dim() == 0 or (student_logits.shape[-1] == 0 and group is None):
        raise ValueError(f"student_logits has shape {tuple(student_logits.shape)}, expected (..., V) with V >= 1")
    shape, vocab = student_logits.shape[:-1], student_logits.shape[-1]
    among = vocab if group is not None or vocab_size is None else layout_of((vocab,), vocab_size).vocab
    choice = check_top_k(top_k, top_k_of, tail, full, teacher_token_ids, teacher_logprobs, among, group)
    mask = as_mask(mask, student_logits, shape)
    normalizer = check_positive_normalizer(normalizer, student_logits)
    coefs = check_coefs(teacher_coefs, "teacher_logits", teacher_logits, shape, student_logits, mask, group)
    if teacher_logits is not None:
        with refusals(group, student_logits):
            for teacher in [teacher_logits] if coefs is None else teacher_logits:
                _check_teacher_logits(teacher, student_logits)
    if coefs is not None and teacher_logits is not None:
        parts = [teacher[..., :among] for teacher in teacher_logits]
        teacher_logits = mixed_logits(parts, coefs, mask, temperature)
        teacher_logits = torch.nn.functional.pad(teacher_logits, (0, vocab - among), value=-torch.inf)
    whole = cast("Tensor | None", teacher_logits)  # one tensor by now
    settings = (kind, beta, temperature)
    if choice.k:
        student = student_logits[..., :among]
        given: Any = teacher_logprobs if whole is None else whole[..., :among]
        teacher = chosen_teacher(student.detach(), given, mask, *choice, temperature)
        rows = topk_divergence(student, teacher, mask, *settings, tail)
        names = measures(tail)
    elif whole is None:
        shard = None
        if split != NOT_SHARDED:
            facts = (kind, beta, "top-k", tail)
            layout, shard = _layout(split, student_logits, student_logits.dtype, mask, temperature, facts)
            vocab = layout.vocab
            student_logits = student_logits if shard else student_logits[..., :vocab]
        teacher = check_topk(teacher_token_ids, teacher_logprobs, student_logits, shape, vocab, mask)
        arguments = (student_logits, teacher, mask, *settings, tail)
        rows = topk_divergence(*arguments) if shard is None else sharded_topk(*arguments, shard)
        names = measures(tail)
    else:
        arguments = (student_logits, whole, mask, *settings)
        if split == NOT_SHARDED:
            rows = _divergence(*arguments)
        else:
            facts = (kind, beta, "a whole teacher")
            split_up = _layout(split, student_logits, whole.dtype, mask, temperature, facts)
            rows = sharded_divergence(*arguments, *split_up)
        names = ("student_entropy", "teacher_entropy")
    return reduce(rows[0], mask, normalizer, dict(zip(names, (row.detach() for row in rows[1:]), strict=True)))

"""The schemas: the operators' names, arguments and results, and the shapes that they give to fake tensors.

All kernels of all backends are registered under these names, per dispatch key (`r1kernels._dispatch`). The kernels in
CUDA C++ are also registered under the same schemas in the namespace `r1kernels_cuda`: on a GPU, an operator of
`r1kernels` chooses between them and Triton's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE, CUDA_NAMESPACE = "r1kernels", "r1kernels_cuda"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_CUDA_LIBRARY = torch.library.Library(CUDA_NAMESPACE, "DEF")
CUDA_OPERATORS = (
    "token_stats", "token_stats_backward", "token_stats_backward_out", "grpo_step", "policy_loss", "group_advantages",
    "kl_estimate", "scaled",
)
# A compiled graph holds a float argument as a constant, so every value would need its own graph. An operator with float
# arguments therefore has a variant `<name>_traced`, for numbers that change between calls: `values` are tensors (0-d,
# float64, on the CPU) that replace the arguments at the positions `at`. A CUDA graph would freeze what it reads.
TRACED: list[str] = []


def _declare(schema: str, more: str = "") -> None:
    """more: the last arguments, in the place of `{}`, which no CUDA kernel takes."""
    name = schema.partition("(")[0]
    if name in CUDA_OPERATORS:
        _CUDA_LIBRARY.define(schema.format(""))
    schema = schema.format(more)
    rest = schema.partition("(")[2]
    LIBRARY.define(schema)
    if re.search(r"\bfloat ", rest):
        TRACED.append(name)
        LIBRARY.define(f"{name}_traced(int[] at, Tensor[] values, {rest}", tags=(torch.Tag.cudagraph_unsafe,))


_MORE_SLOPES = ", Tensor? sum_sq=None, Tensor? grad_sum_sq=None, Tensor? shift=None"
# (..., V), (...) -> log-prob, log-sum-exp and entropy (float64), each (...). Masked rows are not read and give 0.
# `temperatures` (...) float32 multiply `temperature`. exact=False: float32 logits are products of 16-bit operands, so a
# kernel may take their exponents as it does those of 16-bit logits, with one rounding each.
_declare(
    "token_stats(Tensor logits, Tensor token_ids, Tensor? mask, float temperature, Tensor? temperatures=None, "
    "bool exact=True) -> (Tensor, Tensor, Tensor)"
)
# d logits (..., V) from dL/dlogprob and dL/dentropy (...), and on some calls dL/d(sum p^2), which needs sum_sq (...)
# float64, and `shift`, which is added to dL/dz of each entry. Rows where all of them are 0 are not read and give 0.
_declare(
    "token_stats_backward(Tensor logits, Tensor token_ids, Tensor lse, Tensor entropy, "
    "Tensor? grad_logprobs, Tensor? grad_entropy, float temperature{}) -> Tensor", _MORE_SLOPES
)
# The same for (N, V) logits. `out` has their dtype or a narrower one; it is new memory, or that of the logits, row for
# row. softcap > 0: the logits are softcap * tanh(u / softcap), and the gradient is that of u. With `rows` (R,),
# ascending, only these rows are computed, and moved to the top of `out`.
_declare(
    "token_stats_backward_out(Tensor logits, Tensor token_ids, Tensor lse, Tensor entropy, Tensor? grad_logprobs, "
    "Tensor? grad_entropy, float temperature, Tensor? temperatures, float softcap, Tensor? rows, Tensor(a!) out{}) "
    "-> ()", _MORE_SLOPES
)
# token_stats, and more (4, ...) float64: sum p^2, the mean of z, the largest z, 1 if it is that of the token. `wanted`
# is a sum of the numbers in `ops.row_statistics.WANTED`; a kernel may compute more. What it does not compute is 0.
_declare(
    "token_statistics(Tensor logits, Tensor token_ids, Tensor? mask, float temperature, Tensor? temperatures, "
    "bool exact, int wanted) -> (Tensor, Tensor, Tensor, Tensor)"
)
# -> loss (), dloss/dlogprob (...), dloss/dentropy (...) or (0,) where entropy_coef is 0, metrics (METRICS,).
# kl: 1, 2, 3 for k1, k2, k3, and 3 more if the ratio multiplies the term.
_declare(
    "policy_loss(Tensor logprobs, Tensor advantages, Tensor? old_logprobs, Tensor? ref_logprobs, "
    "Tensor? entropy, Tensor? mask, Tensor? cu_seqlens, Tensor? importance_weights, Tensor? normalizer, "
    "int surrogate, int ratio, int kl, int aggregate, float clip_low, float clip_high, float ratio_cap, "
    "float tau_pos, float tau_neg, float kl_coef, float entropy_coef, float max_length) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
# The whole step of a policy loss with a ratio per token. grad_logits (..., V), which may be the logits, becomes
# dloss/dlogits; -> loss (), metrics (METRICS,), log-prob and entropy (float32), each (...). tile: how the kernel splits
# a row, [blocks of a cluster]; if it is empty, the kernel chooses.
_declare(
    "grpo_step(Tensor logits, Tensor token_ids, Tensor advantages, Tensor? old_logprobs, Tensor? ref_logprobs, "
    "Tensor? mask, Tensor? cu_seqlens, Tensor? importance_weights, Tensor? normalizer, float temperature, "
    "int surrogate, int kl, int aggregate, float clip_low, float clip_high, float ratio_cap, float tau_pos, "
    "float tau_neg, float kl_coef, float entropy_coef, float max_length, int[] tile, Tensor(a!) grad_logits) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
# How it chooses for logits and grad_logits: blocks of a cluster, blocks for which a multiprocessor has the shared
# memory, clusters that the device runs at once, and why separate passes replace the fused kernel (0: they do not).
_CUDA_LIBRARY.define("grpo_step_tile(Tensor logits, Tensor grad_logits) -> (int, int, int, int)")
# The head of r1kernels.ops.linear.walk: hidden (..., H), then the fields of `Head`, flattened to N tokens. These run
# on every device, over its products and its two vocabulary kernels.
_HEAD = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor token_ids, "
    "Tensor? temperatures, float temperature, float logit_scale, float softcap, ScalarType logits_dtype, int rows, "
    "int gradient_rows, int capacity, bool batch_invariant"
)
# Gradients of hidden (N, H), weight (V, H), bias (V,), lora_a (H, R) and lora_b (R, V); (0,) unless needed. That of
# hidden has its dtype, the others are float32.
_HEAD_GRADIENTS = "Tensor, Tensor, Tensor, Tensor, Tensor"
# -> log-prob, log-sum-exp and entropy (float64), each (N,). In the backward, the weight's gradient has `weight_dtype`.
_declare(f"linear_token_stats({_HEAD}, Tensor? mask) -> (Tensor, Tensor, Tensor)")
# token_statistics, and log-probs (N, K) float64 of selected ids (N, K), or (0,) without them.
_declare(
    f"linear_token_statistics({_HEAD}, Tensor? mask, Tensor? selected_ids, int wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# slopes: dL/d of log-prob, log-sum-exp, entropy, sum p^2, each (N,), and of the selected log-probs (N, K).
_declare(
    f"linear_token_statistics_backward({_HEAD}, Tensor lse, Tensor entropy, Tensor? sum_sq, Tensor? selected_ids, "
    f"Tensor?[] slopes, ScalarType weight_dtype, bool[] needs) -> ({_HEAD_GRADIENTS})"
)
# linear_token_stats from hidden (N, H) and weight (V, H), with contiguous rows, in 16 bits, without a tensor of logits.
_declare(
    "linear_statistics(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? mask, float temperature, "
    "Tensor? temperatures, float logit_scale, float softcap, bool batch_invariant) -> (Tensor, Tensor, Tensor)"
)
_declare(
    f"linear_token_stats_backward({_HEAD}, Tensor lse, Tensor entropy, Tensor? grad_logprobs, Tensor? grad_entropy, "
    f"ScalarType weight_dtype, bool[] needs) -> ({_HEAD_GRADIENTS})"
)
# The same over sets of ids in compressed rows (`r1kernels.ops.support`), support_ids (M,) and support_offsets (N + 1,).
# The forward also gives the logits (M,) of small sets, float32, and their `support_index`; the backward takes them.
_SETS = "Tensor support_ids, Tensor support_offsets"
_KEPT = "Tensor values, Tensor targets, Tensor starts, Tensor entries, Tensor tokens"
_declare(
    f"linear_support_stats({_HEAD}, Tensor? mask, {_SETS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_declare(
    f"linear_support_stats_backward({_HEAD}, Tensor lse, Tensor entropy, Tensor? grad_logprobs, Tensor? grad_entropy, "
    f"{_SETS}, {_KEPT}, ScalarType weight_dtype, bool[] needs) -> ({_HEAD_GRADIENTS})"
)
# The same from logits (..., V), for N flattened tokens.
_declare(
    f"support_token_stats(Tensor logits, Tensor token_ids, Tensor? mask, float temperature, {_SETS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_declare(
    "support_token_stats_backward(Tensor logits, Tensor token_ids, Tensor lse, Tensor entropy, Tensor? grad_logprobs, "
    f"Tensor? grad_entropy, float temperature, {_SETS}, {_KEPT}) -> Tensor"
)
# The entries (token, id) of sets of at most `largest` ids where `mask` (N,) is True, by ascending id. -> the place
# of each token in its set (N,), where the entries of each id begin (blocks, V + 1), and for each entry its place among
# support_ids and its token, (M,) each, all three int32. An id that a set has twice has one entry.
_declare(
    "support_index(Tensor support_ids, Tensor support_offsets, Tensor token_ids, Tensor? mask, int vocab, int largest) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_INDEX = "Tensor starts, Tensor entries, Tensor tokens"
# values (M,) float32 [entry] = or += hidden[token] . weight[id], in float32.
_declare(f"support_products(Tensor hidden, Tensor weight, {_INDEX}, Tensor(a!) values, bool accumulate) -> ()")
# out (N, H) float32 [token] += sum of values[entry] weight[id].
_declare(f"support_grad_hidden(Tensor values, Tensor weight, {_INDEX}, Tensor(a!) out) -> ()")
# out (V, H) [id] = or += sum of values[entry] hidden[token], summed in float32.
_declare(f"support_grad_weight(Tensor values, Tensor hidden, {_INDEX}, Tensor(a!) out, bool accumulate) -> ()")
# `token_stats` of sets: rows values[offsets[n] : offsets[n + 1]] of float32 logits, and places of tokens in these rows.
_declare(
    "support_stats(Tensor values, Tensor support_offsets, Tensor targets, Tensor? mask, float temperature, "
    "Tensor? temperatures) -> (Tensor, Tensor, Tensor)"
)
# `token_stats_backward_out` of sets.
_declare(
    "support_stats_backward(Tensor values, Tensor support_offsets, Tensor targets, Tensor lse, Tensor entropy, "
    "Tensor? grad_logprobs, Tensor? grad_entropy, float temperature, Tensor? temperatures, float softcap, "
    "Tensor(a!) out) -> ()"
)
# -> log-prob and entropy (N,), and the gradients of sum_t weights_t loss_t, for an objective with a ratio per token.
_declare(
    f"linear_policy_gradient({_HEAD}, Tensor? mask, Tensor weights, Tensor advantages, Tensor? old_logprobs, "
    "Tensor? ref_logprobs, Tensor? importance_weights, Tensor? entropy_weights, int surrogate, int kl, "
    "float clip_low, float clip_high, float ratio_cap, float tau_pos, float tau_neg, float kl_coef, "
    "float entropy_coef, bool[] needs) "
    f"-> (Tensor, Tensor, {_HEAD_GRADIENTS})"
)
# The losses of D targets of each token, with `ops.target_terms.TargetTerms`; targets (D, N) int64, weights (D, N).
# -> losses (D, N), log-sum-exp (N,) float64, and the gradients of sum weights loss that are needed.
_declare(
    f"linear_targets({_HEAD}, Tensor? mask, Tensor targets, Tensor? weights, float z_loss_coef, float label_smoothing, "
    f"bool[] needs) -> (Tensor, Tensor, {_HEAD_GRADIENTS})"
)
# The gradients from those of the losses (D, N).
_declare(
    f"linear_targets_backward({_HEAD}, Tensor targets, Tensor lse, Tensor grads, float z_loss_coef, "
    f"float label_smoothing, ScalarType weight_dtype, bool[] needs) -> ({_HEAD_GRADIENTS})"
)
_declare(
    "group_advantages(Tensor rewards, Tensor? group_ids, int group_size, int scale, int ddof, float eps) -> Tensor"
)
# -> the estimate and its derivative with respect to logprobs.
_declare("kl_estimate(Tensor logprobs, Tensor ref_logprobs, int estimator) -> (Tensor, Tensor)")
# out = or += grad * factor (0-d), 0 where grad is 0; out may be grad. For devices where reading the factor would cost a
# synchronisation.
_declare("scaled(Tensor grad, Tensor factor, Tensor(a!) out, bool accumulate) -> ()")
# out (V, H) float32: out[ids[t]] += factors[t] rows[t], in the order of t. ids (N,), factors (N,) float32, rows (N, H).
_declare("add_rows(Tensor(a!) out, Tensor ids, Tensor factors, Tensor rows) -> ()")
# out (M, N) fp32 = or += a (M, K) @ b (K, N), of one dtype, or one of them float32 and the other in 16 bits; an entry's
# bits depend only on its row and column. coarse: 16 bits of float32 operands are enough.
_declare("gemm_f32(Tensor a, Tensor b, Tensor(a!) out, bool accumulate, bool coarse=False) -> ()")
# (..., V) -> ids of the k largest entries (..., k) in descending order; of equal entries, the smaller id comes first.
# In a row with NaN, any k ids.
_declare("top_k_ids(Tensor logits, int k) -> Tensor")
# Student and teacher (..., V) -> per row: the divergence (float32), both log-sum-exps, the constant of its gradient and
# both entropies (float64), each (...). Masked rows are not read and give 0.
_declare(
    "divergence(Tensor student, Tensor teacher, Tensor? mask, int kind, float beta, float temperature) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# Writes d student to out (..., V), with stride 1 over V; a row of out may start where the student's row starts. Rows
# where grad (float32) is 0 are not read and give 0. softcap: as in token_stats_backward_out, for the student.
_declare(
    "divergence_backward(Tensor student, Tensor teacher, Tensor lse_student, Tensor lse_teacher, Tensor inner, "
    "Tensor grad, int kind, float beta, float temperature, Tensor(a!) out, float softcap=0.0) -> ()"
)
# Student and teacher from hidden states. Full teachers have hidden and weight (V, H'), others ids and log-probs (N, K),
# float64. top_k > 0: K tokens are chosen from logits. -> the divergence and the rows of
# `ops.linear.divergence.measures` (M, N), and the gradients of factor sum_t D_t.
_declare(
    f"linear_divergence({_HEAD}, Tensor? mask, Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? teacher_lora_a, Tensor? teacher_lora_b, float teacher_logit_scale, float teacher_softcap, "
    "Tensor? teacher_token_ids, Tensor? teacher_logprobs, int top_k, str top_k_of, str tail, Tensor factor, int kind, "
    "float beta, bool[] needs) "
    f"-> (Tensor, {_HEAD_GRADIENTS})"
)

def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the results of an operator for fake tensors and the meta device, in every namespace that has it."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(f"{NAMESPACE}::{name}")(function)
        if name in CUDA_OPERATORS:
            torch.library.register_fake(f"{CUDA_NAMESPACE}::{name}")(function)
        if name in TRACED:
            torch.library.register_fake(f"{NAMESPACE}::{name}_traced")(lambda at, values, *args: function(*args))
        return function

    return register


SUPPORT_BLOCK_TOKENS = 2048  # of `support_index` on a CPU, csrc/cpu/support.h
POLICY_METRICS = 15  # length of policy_loss's metrics, csrc/common/objective.h


@_fake("token_stats")
def _(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    shape = logits.shape[:-1]
    return (
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty(shape, dtype=torch.float64),
        logits.new_empty(shape, dtype=torch.float64),
    )


@_fake("token_stats_backward")
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@_fake("token_stats_backward_out")
def _(*_: Any) -> None:
    return None


@_fake("token_statistics")
def _(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    shape = logits.shape[:-1]
    wide = (logits.new_empty(size, dtype=torch.float64) for size in (shape, shape, (4, *shape)))
    return logits.new_empty(shape, dtype=torch.float32), *wide


@_fake("policy_loss")
def _(logprobs: Tensor, *args: Any) -> tuple[Tensor, ...]:
    entropy_coef = args[-2]
    return (
        logprobs.new_empty(()),
        logprobs.new_empty(logprobs.shape),
        logprobs.new_empty(logprobs.shape if entropy_coef != 0 else (0,)),
        logprobs.new_empty((POLICY_METRICS,)),
    )


@_fake("grpo_step")
def _(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    single: dict[str, Any] = {"dtype": torch.float32}
    return (
        logits.new_empty((), **single),
        logits.new_empty((POLICY_METRICS,), **single),
        logits.new_empty(logits.shape[:-1], **single),
        logits.new_empty(logits.shape[:-1], **single),
    )


def _per_token(token_ids: Tensor, hidden: Tensor) -> Tensor:
    return hidden.new_empty(token_ids.shape, dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)


def _head_gradients(
    hidden: Tensor, head: tuple[Any, ...], needs: list[bool], weight_dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    weight, bias, lora_a, lora_b, token_ids = head[:5]
    accumulator = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    whole = (
        lambda: hidden.new_empty((token_ids.numel(), weight.shape[1])),
        lambda: weight.new_empty(weight.shape, dtype=weight_dtype or accumulator),
        lambda: bias.new_empty(bias.shape, dtype=accumulator),
        lambda: lora_a.new_empty(lora_a.shape, dtype=accumulator),
        lambda: lora_b.new_empty(lora_b.shape, dtype=accumulator),
    )
    return tuple(
        make() if needed else hidden.new_empty((0,), dtype=torch.float32)
        for make, needed in zip(whole, needs, strict=True)
    )


@_fake("linear_token_stats")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    ids = args[4]
    statistics = (hidden.new_empty(ids.shape, dtype=torch.float64) for _ in range(2))
    return _per_token(ids, hidden), *statistics


@_fake("linear_token_statistics")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    ids, selected = args[4], args[-2]
    sizes = (ids.shape, ids.shape, (4, *ids.shape), (0,) if selected is None else selected.shape)
    return _per_token(ids, hidden), *(hidden.new_empty(size, dtype=torch.float64) for size in sizes)


@_fake("linear_token_statistics_backward")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _head_gradients(hidden, args, args[-1], args[-2])


@_fake("linear_statistics")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    ids = args[2]
    statistics = (hidden.new_empty(ids.shape, dtype=torch.float64) for _ in range(2))
    return _per_token(ids, hidden), *statistics


@_fake("linear_token_stats_backward")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _head_gradients(hidden, args, args[-1], args[-2])


def _support_index(
    support_ids: Tensor, offsets: Tensor, token_ids: Tensor, mask: Tensor | None, vocab: int, largest: int
) -> tuple[Tensor, ...]:
    tokens = token_ids.numel()
    blocks = max(-(-tokens // SUPPORT_BLOCK_TOKENS), 1) if token_ids.device.type == "cpu" else 1
    places = (support_ids.new_empty(support_ids.shape, dtype=torch.int32) for _ in range(2))
    return (
        token_ids.new_empty((tokens,)), support_ids.new_empty((blocks, vocab + 1), dtype=torch.int32), *places,
    )


_fake("support_index")(_support_index)


@_fake("support_token_stats")
def _(logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, *sets: Any) -> tuple[Tensor, ...]:
    shape = logits.shape[:-1]
    statistics = (logits.new_empty(shape, dtype=torch.float64) for _ in range(2))
    values = logits.new_empty(sets[0].shape, dtype=torch.float32)
    return (
        logits.new_empty(shape, dtype=torch.float32), *statistics, values,
        *_support_index(sets[0], sets[1], token_ids, None, logits.shape[-1], 0),
    )


@_fake("support_token_stats_backward")
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@_fake("linear_support_stats")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    weight, ids, (support_ids, offsets) = args[0], args[4], args[-2:]
    statistics = (hidden.new_empty(ids.shape, dtype=torch.float64) for _ in range(2))
    values = hidden.new_empty(support_ids.shape, dtype=torch.float32)
    index = _support_index(support_ids, offsets, ids, None, len(weight), 0)
    return _per_token(ids, hidden), *statistics, values, *index


@_fake("linear_support_stats_backward")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _head_gradients(hidden, args, args[-1], args[-2])


for _name in ("support_products", "support_grad_hidden", "support_grad_weight", "support_stats_backward"):
    _fake(_name)(lambda *_: None)


@_fake("support_stats")
def _(values: Tensor, offsets: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, ...]:
    statistics = (values.new_empty(targets.shape, dtype=torch.float64) for _ in range(2))
    return values.new_empty(targets.shape), *statistics


@_fake("linear_policy_gradient")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    ids = args[4]
    return _per_token(ids, hidden), _per_token(ids, hidden), *_head_gradients(hidden, args, args[-1])


@_fake("linear_targets")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    ids, targets = args[4], args[15]
    losses = hidden.new_empty(targets.shape, dtype=_per_token(ids, hidden).dtype)
    return losses, hidden.new_empty(ids.shape, dtype=torch.float64), *_head_gradients(hidden, args, args[-1])


@_fake("linear_targets_backward")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _head_gradients(hidden, args, args[-1], args[-2])


@_fake("group_advantages")
def _(rewards: Tensor, *_: Any) -> Tensor:
    return rewards.new_empty(rewards.shape)


@_fake("kl_estimate")
def _(logprobs: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return logprobs.new_empty(logprobs.shape), logprobs.new_empty(logprobs.shape)


@_fake("gemm_f32")
def _(*_: Any) -> None:
    return None


@_fake("add_rows")
def _(out: Tensor, *_: Any) -> None:
    return None


@_fake("scaled")
def _(*_: Any) -> None:
    return None


@_fake("top_k_ids")
def _(logits: Tensor, k: int) -> Tensor:
    return logits.new_empty((*logits.shape[:-1], k), dtype=torch.int64)


@_fake("divergence")
def _(student: Tensor, *_: Any) -> tuple[Tensor, ...]:
    shape = student.shape[:-1]
    statistics = [student.new_empty(shape, dtype=torch.float64) for _ in range(5)]
    return student.new_empty(shape, dtype=torch.float32), *statistics


@_fake("divergence_backward")
def _(*_: Any) -> None:
    return None


@_fake("linear_divergence")
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    ids, teacher_hidden = args[4], args[15]
    wide = torch.float64 in (hidden.dtype, torch.float32 if teacher_hidden is None else teacher_hidden.dtype)
    top_k, _, tail = args[24:27]
    listed = teacher_hidden is None or top_k > 0
    measured = hidden.new_empty(
        (4 if listed and tail != "renormalize" else 3, ids.numel()), dtype=torch.float64 if wide else torch.float32
    )
    return measured, *_head_gradients(hidden, args, args[-1])

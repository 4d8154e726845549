"""The keywords that all functions of hidden states share. They are checked here and turned into a `Head`."""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from r1kernels import _dispatch
from r1kernels.ops._checks import (
    accumulator_dtype,
    check_dtype,
    check_floating,
    check_ids_in_range,
    check_number,
    check_shape,
    check_temperature,
    ids_int64,
)
from r1kernels.ops.linear.budget import buffer_rows, gathers, row_bytes
from r1kernels.ops.linear.checks import (
    accumulation_target,
    checked_capacity,
    dtype_of_logits,
    lora_matrices,
    token_temperature,
)
from r1kernels.ops.linear.dtensor import Placed, probes
from r1kernels.ops.linear.head import Head, Names, Needs
from r1kernels.ops.shards import Facts, Shard, Split, agreed_layout, checksum, fact_of_normalizer, layout_of, refusals
from r1kernels.ops.support import Support, checked_support

# Dtypes of the weight, by that of hidden states.
WEIGHT_DTYPES = {
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
    torch.float64: (torch.float64,),
}


class LinearOptions(TypedDict, total=False):
    """Keywords of the `linear_*` functions, all optional.

    Attributes:
        bias: (V,), in the dtype of hidden or of the weight, added to the logits.
        lora: (A (H, R), B (R, V)), in the dtype of hidden, a low-rank adapter next to a frozen weight: hidden @ A @ B
            is added to the logits. Multiply A or B by its scaling factor.
        logit_scale: Python number > 0 that multiplies the logits.
        softcap: Python number c > 0: the scaled logits u become c tanh(u / c).
        temperature: Python number > 0, or a tensor with one value per token (a constant: no gradient). It divides the
            logits. Use the temperature with which the tokens were sampled.
        logits_dtype: torch.float32 (default), or the dtype of hidden and weight, to reproduce an engine that rounds its
            logits.
        chunk_bytes: memory for the logits of one chunk, which sets how many rows are computed at a time. On a GPU, it
            includes memory for d logits of several chunks, which are multiplied at once. The default is the memory of
            1,024 rows, at most 1 GiB; on a GPU, of up to 4,096 rows of logits and as many of d logits, at most 1.94 GiB
            together. On a CPU, products take
            a few MiB more for each thread, and 64 MiB (or the float32 gradient of a chunk's hidden states, if that is
            larger) for sums over the vocabulary. If a product needs copies of its operands (`python -m r1kernels` says
            which), they take at most 48 MiB more, or 200 MiB for bfloat16 with float32 on a GPU.
        capacity: the largest number of active tokens (mask and zero advantages decide which tokens are active). The
            shapes of all work then do not depend on the tensors' values, and there is no synchronisation with the
            device, so a call can be captured in a CUDA graph. More active tokens raise an error: on a CPU
            immediately, on a device at the next synchronisation.
        grad_accumulation_into: (V, H), float32 or the weight's dtype. Every backward through the loss adds the
            weight's gradient, summed in float32, to this tensor (`weight.main_grad`, `weight.grad`), and returns no
            gradient for the weight. The weight must be a leaf; its hooks, and tools that use them (DDP), see no
            gradient.
        batch_invariant: the bits of a token's log-prob depend only on its hidden state: not on the batch, the size of
            a chunk or padding. With the compiled CPU kernels and float32 logits this is always true. Elsewhere, it
            computes products in blocks of 128 rows.
        process_group: a `torch.distributed.ProcessGroup` over whose ranks the vocabulary is sharded: weight, bias, B of
            lora and `grad_accumulation_into` have this rank's rows of the whole vocabulary, in the order of the ranks.
            Shards may differ in size, and may be empty. All other arguments are the same on all ranks; token ids are
            those of the whole vocabulary. Results, and the gradients of hidden and of A, have the same bits on all
            ranks: they are complete. Ranks that disagree get an error: on a CPU immediately, on a device at the next
            synchronisation. The first call with a size of the shards waits for the device. It may be a DeviceMesh of
            one dimension. Tensors of the head may be DTensors, with or without it. See docs/parallel.md.
        vocab_size: V without padding. Rows of the weight (over all ranks) from this one on count for nothing: their
            probability and their gradient are 0.
        support: (token_ids (M,), offsets (N + 1,)), the sets of ids over which tokens are scored, as in
            `token_logprobs`. Small sets need only their rows of the weight, so their cost depends on M and not on V.
            This keeps 20 bytes an id for backward: its logit in float32, its entry and token in int32, and the id in
            int64. On a GPU, a call with support synchronises once to find the large and the empty sets, and once more
            in backward; with `capacity`, it does not, and takes the whole vocabulary for all tokens. Not with
            process_group, label_smoothing or z_loss_coef; `linear_distillation_loss`, `linear_multi_target` and
            `linear_token_statistics` refuse it.
    """

    bias: Tensor | None
    lora: tuple[Tensor, Tensor] | None
    logit_scale: float
    softcap: float | None
    temperature: float | Tensor
    logits_dtype: torch.dtype | None
    chunk_bytes: int | None
    capacity: int | None
    grad_accumulation_into: Tensor | None
    batch_invariant: bool
    process_group: torch.distributed.ProcessGroup | None
    vocab_size: int | None
    support: tuple[Tensor, Tensor] | None


Constants = tuple[Head, Tensor | None, Shard | None]


class Call(NamedTuple):
    """The checked arguments of a call.

    Attributes:
        tensors: hidden, weight, bias, lora_a and lora_b. autograd sees them, because they may receive gradients.
        head: without these tensors (see `Head.with_tensors`).
        into: the tensor that the weight's gradient is added to.
        shard: this rank's part of a sharded vocabulary.
        support: the sets over which tokens are scored.
    """

    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
    head: Head
    into: Tensor | None
    shard: Shard | None = None
    support: Support | None = None

    @property
    def constants(self) -> Constants:
        """What an autograd function gets beside the tensors."""
        return self.head, self.into, self.shard

    def opened(self, placed: dict[str, Placed]) -> Call:
        """Gathers DTensors of the head. The head has what kernels read, autograd sees what receives their gradients."""
        hidden, *others = self.tensors
        values: dict[str, Tensor] = {}
        for place, name in enumerate(Needs._fields[1:]):
            if name in placed:
                values[name], others[place] = placed[name].open(accumulator_dtype(hidden.dtype))
        return self._replace(tensors=(hidden, *others), head=self.head._replace(**values))

    def without_padding(self, count: int) -> Call:
        """Leaves out the rows of the weight from `count` on. Their gradient is 0."""
        if count == len(self.tensors[1]):
            return self

        def kept(weight: Tensor | None, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None) -> tuple:
            return (
                None if weight is None else weight[:count], None if bias is None else bias[:count], lora_a,
                None if lora_b is None else lora_b[:, :count],
            )

        hidden, *others = self.tensors
        weight, bias, lora_a, lora_b = kept(*self.head[:4])
        head = self.head._replace(weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b)
        return self._replace(
            tensors=(hidden, *kept(*others)), head=head, into=None if self.into is None else self.into[:count]
        )

    @property
    def wanted(self) -> bool:
        """Whether any gradient will be needed."""
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in self.tensors)

    @property
    def one_pass(self) -> bool:
        """Whether gradients are computed with the loss."""
        choice = _dispatch.choose("linear_gradients", self.tensors[0], self.wanted, self.support)
        return choice.implementation == "one_pass"


def prepare(
    hidden: Any, weight: Any, token_ids: Any, options: dict[str, Any], *, tokens: str = "token_ids",
    mask: Tensor | None = None, names: Names = Names(), extra_row_bytes: int = 0,  # noqa: B008 - frozen
    wanted: Tensor | None = None, function: str = "", normalizer: Tensor | float | None = None,
) -> Call:
    """Checks the arguments of a linear function.

    Args:
        wanted: (N,), the tokens that are computed, if they are not all that the mask counts.
        function: its name and the values of its own keywords. It must be the same on all ranks of a process group, and
            so must the normalizer.

    Raises:
        TypeError, ValueError: naming the argument, its value and the expectation.
    """
    for name in options:
        if name not in LinearOptions.__annotations__:
            raise TypeError(f"unknown keyword {name!r}, expected one of {', '.join(LinearOptions.__annotations__)}")
    group, vocab_size = Split(options.get("process_group"), options.get("vocab_size")).checked()
    placed, weight, options = probes(weight, options)
    with refusals(group, hidden):
        call = _checked(hidden, weight, token_ids, options, tokens, mask, names, group)
    vocab, width = weight.shape
    largest, layout = vocab, None
    if group is not None:
        facts = _facts(call, options, mask if wanted is None else wanted, function, normalizer)
        layout = agreed_layout(group, vocab, facts, hidden.device)
    elif vocab_size is not None:
        layout = layout_of((vocab,), vocab_size)
    if layout is not None:
        vocab, largest = layout.vocab, max(layout.sizes)
    check_ids_in_range(tokens, call.head.token_ids, vocab, None if mask is None else mask.reshape(-1))
    if placed:
        call = call.opened(placed)
    if layout is not None:
        call = call.without_padding(layout.size)
    head, shard = call.head, None
    if group is not None:
        assert layout is not None
        shard = Shard(layout, head.token_ids, mask)
        head = head._replace(token_ids=shard.ids)
    full = accumulator_dtype(hidden.dtype)
    buffers = buffer_rows(
        options.get("chunk_bytes"),
        largest,
        row_bytes(largest, width, head.logits_dtype) + extra_row_bytes,
        row_bytes(largest, width, hidden.dtype if weight.dtype == hidden.dtype else full),
        gathers(hidden.device.type, hidden.dtype),
    )
    head = head._replace(rows=buffers.logits, gradient_rows=buffers.gradient)
    return Call(call.tensors, head, call.into, shard, call.support)


def _checked(
    hidden: Any, weight: Any, token_ids: Any, options: dict[str, Any], tokens: str, mask: Tensor | None, names: Names,
    group: Any,
) -> Call:
    """The result of `prepare` as far as this rank alone knows it: without ranges of ids and sizes of buffers."""
    check_floating(names.hidden, hidden)
    check_floating(names.weight, weight, hidden)
    if weight.dim() != 2:
        raise ValueError(f"{names.weight} has shape {tuple(weight.shape)}, expected 2 dimensions (V, H)")
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{names.hidden} has shape {tuple(hidden.shape)} and {names.weight} (V, H) {tuple(weight.shape)}, expected "
            "the same H"
        )
    vocab = len(weight)
    if vocab == 0 and group is None:
        raise ValueError(f"{names.weight} has shape {tuple(weight.shape)}, expected V >= 1")
    check_dtype(names.weight, weight, dict.fromkeys(WEIGHT_DTYPES[hidden.dtype], ""),
                f" with {names.hidden} of {hidden.dtype}: convert one of them")
    ids = ids_int64(tokens, token_ids, hidden)
    check_shape(tokens, ids, hidden.shape[:-1], f"hidden (..., H) score {tokens} (...)")
    bias = options.get("bias")
    if bias is not None:
        check_floating(f"{names.options}bias", bias, hidden)
        check_shape(f"{names.options}bias", bias, (vocab,), f"one entry for each row of {names.weight}")
        other = {} if weight.dtype == hidden.dtype else {weight.dtype: f" like {names.weight}"}
        check_dtype(f"{names.options}bias", bias, {hidden.dtype: f" like {names.hidden}", **other})
    lora_a, lora_b = lora_matrices(options.get("lora"), hidden, weight, names)
    temperature, temperatures = token_temperature(options.get("temperature", 1.0), ids, mask)
    softcap = options.get("softcap")
    logits_dtype = dtype_of_logits(options.get("logits_dtype"), hidden, weight)
    invariant = options.get("batch_invariant", False)
    if not isinstance(invariant, bool):
        raise TypeError(f"batch_invariant is {invariant!r}, expected True or False")
    if invariant and logits_dtype != accumulator_dtype(hidden.dtype):
        raise ValueError(f"logits_dtype is {logits_dtype} with batch_invariant, expected float32 logits")
    scale = check_number(f"{names.options}logit_scale", options.get("logit_scale", 1.0), minimum=0.0, strict=True)
    check_temperature(temperature / scale, f"temperature / {names.options}logit_scale")
    none: Any = None  # autograd passes the tensors: see `with_tensors`
    head = Head(
        weight=none,
        bias=None,
        lora_a=None,
        lora_b=None,
        token_ids=ids.reshape(-1),
        temperatures=temperatures,
        temperature=temperature,
        logit_scale=scale,
        softcap=0.0 if softcap is None else check_number(f"{names.options}softcap", softcap, minimum=0.0, strict=True),
        logits_dtype=logits_dtype,
        rows=0,
        gradient_rows=0,
        capacity=checked_capacity(options.get("capacity")),
        batch_invariant=invariant,
    )
    into = accumulation_target(options.get("grad_accumulation_into"), weight)
    support = checked_support(options.get("support"), hidden, ids.numel(), group)
    return Call((hidden, weight, bias, lora_a, lora_b), head, into, None, support)


def _facts(
    call: Call, options: dict[str, Any], counted: Tensor | None, function: str, normalizer: Tensor | float | None
) -> Facts:
    """What the ranks of a process group must agree on."""
    (hidden, weight, bias, lora_a, _), head = call.tensors, call.head
    count = head.token_ids.numel() if counted is None else counted.sum()
    gradients = (call.one_pass, *(t is not None and t.requires_grad for t in (hidden, lora_a)))
    return Facts(
        function, head.token_ids.numel(), count, checksum(head.token_ids, counted), weight.shape[1],
        options.get("vocab_size") or -1,
        (hidden.dtype, weight.dtype), head.temperature, gradients,
        (head.logit_scale, head.softcap, head.logits_dtype, head.capacity, head.batch_invariant,
         head.temperatures is None, bias is None, lora_a is None, options.get("chunk_bytes")),
        fact_of_normalizer(normalizer),
    )

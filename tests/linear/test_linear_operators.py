"""The operators behind the linear head: opcheck, compile, fake tensors, and the vocabulary gradient in given memory."""

from collections.abc import Callable
from typing import Any

import linear_cases as cases
import pytest
import torch
from backends import compiles, reference_only, registration_only, shapes_only
from linear_policy_cases import EVERYTHING, make
from torch import Tensor
from torch._subclasses import FakeTensorMode

from r1kernels import (
    Objective,
    backend,
    linear_cross_entropy,
    linear_grpo_loss,
    linear_token_logprobs,
    linear_token_logprobs_and_entropy,
    objectives,
    testing,
)
from r1kernels.ops import token_stats

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# ---- opcheck ------------------------------------------------------------------------------------------------


def head_arguments(
    full: bool, dtypes: tuple[torch.dtype, torch.dtype], capacity: int, n: int = 6, gradient_rows: int = 0
) -> tuple[Any, ...]:
    """hidden and the fields of a head, in the order of the schema."""
    case = cases.make("everything" if full else "plain", n, dtype=dtypes[0], weight_dtype=dtypes[1])
    a, b = case.get("lora", (None, None))
    return (
        case["hidden"], case["weight"], case.get("bias"), a, b, case["token_ids"], case.get("temperature"), 1.0,
        case.get("logit_scale", 1.0), case.get("softcap", 0.0), torch.float32, 4, gradient_rows, capacity, False,
    )


MASK = torch.tensor([True, True, False, True, True, False])


@pytest.mark.few(1)
@registration_only
@pytest.mark.parametrize(("full", "dtypes"), [
    (False, (torch.float32, torch.float32)), (True, (torch.bfloat16, torch.bfloat16)),
    (True, (torch.bfloat16, torch.float32)), (False, (torch.float32, torch.float16)),
])
@pytest.mark.parametrize(("mask", "capacity"), [(None, -1), (MASK, 5)])
def test_opcheck(
    full: bool, dtypes: tuple[torch.dtype, torch.dtype], mask: Tensor | None, capacity: int
) -> None:
    arguments = head_arguments(full, dtypes, capacity)
    torch.library.opcheck(torch.ops.r1kernels.linear_token_stats, (*arguments, mask))
    _, lse, entropy = torch.ops.r1kernels.linear_token_stats(*arguments, mask)
    g = torch.ones(6) if mask is None else mask.float()
    for needs in ([True, True, full, full, full], [True, False, False, False, False]):
        for upstream, dtype in (((g, None), torch.float32), ((g, g), torch.bfloat16)):
            torch.library.opcheck(
                torch.ops.r1kernels.linear_token_stats_backward, (*arguments, lse, entropy, *upstream, dtype, needs)
            )
        tokens = (torch.ones(6), torch.ones(6), torch.zeros(6), torch.zeros(6), torch.ones(6), None, 0, 2)
        coefficients = (0.2, 0.2, float("inf"), 1.0, 1.05, 0.1, 0.01)
        torch.library.opcheck(
            torch.ops.r1kernels.linear_policy_gradient, (*arguments, mask, *tokens, *coefficients, needs)
        )


@registration_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_with_a_gradient_buffer(dtype: torch.dtype) -> None:
    arguments = head_arguments(True, (torch.bfloat16, torch.bfloat16), 5, gradient_rows=5)
    g = MASK.float()
    with backend("reference"):
        _, lse, entropy = torch.ops.r1kernels.linear_token_stats(*arguments, MASK)
        torch.library.opcheck(
            torch.ops.r1kernels.linear_token_stats_backward, (*arguments, lse, entropy, g, None, dtype, [True] * 5)
        )


@pytest.mark.few(3)
@registration_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [None, [0, 2, 3]])
def test_opcheck_of_the_gradient_in_given_memory(dtype: torch.dtype, rows: list[int] | None) -> None:
    logits, ids = testing.random_logits(5, 40, dtype=dtype), testing.random_ids(5, vocab=40)
    _, lse, entropy = torch.ops.r1kernels.token_stats(logits, ids, None, 0.7)
    index = None if rows is None else torch.tensor(rows)
    for temperatures in (None, torch.rand(5) + 0.5):
        torch.library.opcheck(
            torch.ops.r1kernels.token_stats_backward_out,
            (logits, ids, lse, entropy, torch.ones(5), torch.ones(5), 0.7, temperatures, 5.0, index,
             torch.empty_like(logits)),
        )


# ---- compile ------------------------------------------------------------------------------------------------

LOSSES: dict[str, Callable[..., Tensor]] = {
    "logprobs": lambda policy, **head: linear_token_logprobs(**head).square().sum(),
    "both": lambda policy, **head: sum(linear_token_logprobs_and_entropy(**head, mask=policy["mask"])).square().sum(),
    "cross_entropy": lambda policy, token_ids, **head: linear_cross_entropy(targets=token_ids, **head),
    "losses": lambda policy, token_ids, **head: linear_cross_entropy(
        targets=token_ids, reduction="none", **head).square().sum(),
    "grpo": lambda policy, **head: linear_grpo_loss(**head, **policy).loss,
    "with kl and entropy": lambda policy, **head: linear_grpo_loss(
        **head, **policy, objective=Objective(**EVERYTHING)).loss,
    "gspo": lambda policy, **head: linear_grpo_loss(**head, **policy, objective=objectives.gspo()).loss,
    "callable": lambda policy, **head: linear_grpo_loss(
        **head, **policy, objective=lambda logprobs, batch: -batch.advantages * logprobs).loss,
}
# The others run on the reference what these do.
ON_BOTH = [(loss, testing.KERNELS) for loss in LOSSES]
ON_BOTH += [(loss, "reference") for loss in ("both", "cross_entropy", "grpo")]


def split(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(keywords of the policy, those of the head)."""
    names = ("advantages", "old_logprobs", "ref_logprobs", "mask", "importance_weights", "cu_seqlens")
    return ({k: v for k, v in inputs.items() if k in names}, {k: v for k, v in inputs.items() if k not in names})


@pytest.mark.few(2)
@compiles
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("loss", "served_by"), ON_BOTH)
def test_compile_fullgraph(loss: str, served_by: str) -> None:
    policy, arguments = split(make("everything", "holes"))
    arguments["chunk_bytes"] = cases.chunk_of(8, 37, 12)

    def run(**tensors: Any) -> Tensor:
        return LOSSES[loss](policy, **arguments | tensors)

    results = []
    for function in (run, testing.compiled(run)):
        leaves = {name: value.clone().requires_grad_() for name, value in cases.tensors(arguments).items()}
        with backend(served_by):
            value = function(**cases.with_tensors({}, leaves))
            value.backward()
        results.append((value.detach(), *(leaf.grad for leaf in leaves.values())))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)


@pytest.mark.few(1)
@compiles
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
@pytest.mark.parametrize("loss", ["logprobs", "cross_entropy", "grpo"])
@pytest.mark.slow(reason="compiles again and again")
def test_compile_with_lengths_and_temperatures_that_change(loss: str) -> None:
    def loss_of(policy: dict[str, Any], temperature: float, **arguments: Any) -> Tensor:
        return LOSSES[loss](policy, temperature=temperature, **arguments)

    run = testing.compiled(loss_of, dynamic=True)
    policy, arguments = split(make("plain", "holes"))

    def cut(values: dict[str, Any], sequences: int, length: int) -> dict[str, Any]:
        def short(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.shape[0] != 5:
                return value
            return value[:sequences, :length] if value.dim() > 1 else value[:sequences]

        return {name: short(value) for name, value in values.items()}

    for sequences, length, temperature in ((2, 3, 0.9), (4, 5, 0.7)):
        given, head = cut(policy, sequences, length), cut(arguments, sequences, length)
        leaves = {name: value.clone().requires_grad_() for name, value in cases.tensors(head).items()}
        losses = [function(given, temperature, **head | leaves) for function in (run, loss_of)]
        grads = [torch.autograd.grad(value, list(leaves.values())) for value in losses]
        for compiled, eager in zip((losses[0], *grads[0]), (losses[1], *grads[1]), strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)


@pytest.mark.long(reason="test_compile_fullgraph compiles the same operators")
@compiles
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
def test_compile_with_a_capacity() -> None:
    policy, arguments = split(make("plain", "holes"))

    def run(hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return linear_grpo_loss(**policy, **arguments | {"hidden": hidden}, capacity=30)

    results = []
    for function in (run, testing.compiled(run)):
        hidden = arguments["hidden"].clone().requires_grad_()
        loss, metrics = function(hidden)
        results.append((loss.detach(), *torch.autograd.grad(loss, hidden), *metrics.values()))
    assert len(results[0]) == len(results[1]) == 18
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- fakes --------------------------------------------------------------------------------------------------


@shapes_only
@pytest.mark.filterwarnings("ignore:r1kernels uses its reference implementation")
@pytest.mark.parametrize(
    ("device", "dtype", "weight_dtype"),
    [
        *((device, dtype, dtype) for device in ("cpu", "meta", "cuda") for dtype in DTYPES),
        *((device, torch.bfloat16, torch.float32) for device in ("cpu", "meta", "cuda")),
        # The float64 policy loss is plain PyTorch, which cannot index fakes of a device that torch was built without.
        ("cpu", torch.float64, torch.float64),
    ],
)
def test_fakes_have_the_shapes_and_dtypes_of_results(
    device: str, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    with FakeTensorMode():
        hidden = torch.empty(2, 5, 8, dtype=dtype, device=device).narrow(1, 0, 4)
        weight = torch.empty(17, 8, dtype=weight_dtype, device=device)
        ids = torch.zeros(2, 4, dtype=torch.int64, device=device)
        lora = (torch.empty(8, 3, dtype=dtype, device=device), torch.empty(3, 17, dtype=dtype, device=device))
        leaves = [hidden, weight, *lora]
        for leaf in leaves:
            leaf.requires_grad_(device != "cuda")  # torch without CUDA cannot start a backward there
        logprobs, entropy = linear_token_logprobs_and_entropy(hidden, weight, ids, lora=lora)
        advantages = torch.empty(2, 4, device=device, dtype=torch.float32)
        loss, metrics = linear_grpo_loss(
            hidden, weight, ids, advantages, lora=lora, mask=ids, objective=objectives.dapo()
        )
        nll = linear_cross_entropy(hidden, weight, ids, lora=lora, normalizer=3.0)
        if device != "cuda":
            for value in ((logprobs + entropy).sum(), loss, nll):
                for leaf, grad in zip(leaves, torch.autograd.grad(value, leaves), strict=True):
                    assert (grad.shape, grad.dtype, grad.device) == (leaf.shape, leaf.dtype, leaf.device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert logprobs.shape == entropy.shape == (2, 4)
    for value in (logprobs, entropy, loss, nll, *metrics.values()):
        assert (value.dtype, value.device.type) == (wide, device)
    assert loss.shape == nll.shape == ()


def test_meta_tensors_without_a_fake_mode() -> None:
    ids = torch.empty(2, 3, dtype=torch.int64, device="meta")
    logprobs = linear_token_logprobs(torch.empty(2, 3, 8, device="meta"), torch.empty(11, 8, device="meta"), ids)
    assert logprobs.shape == (2, 3) and logprobs.device.type == "meta"


# ---- token_stats_backward_out -------------------------------------------------------------------------------


class Gradient:
    """Arguments of `gradient_into` for six rows, two of them without a gradient, and the exact result."""

    def __init__(self, dtype: torch.dtype, vocab: int, softcap: float, per_row: bool) -> None:
        self.ids = testing.random_ids(6, vocab=vocab)
        self.softcap = softcap
        u = testing.random_logits(6, vocab, scale=3)
        self.logits = (softcap * torch.tanh(u / softcap) if softcap else u).to(dtype)
        self.temperatures = torch.tensor([0.5, 2.0, 0.7, 1.0, 1.3, 3.0]) if per_row else None
        rng = testing.generator(3)
        self.g, self.eta = torch.randn(6, generator=rng), torch.randn(6, generator=rng)
        self.g[[1, 4]] = 0
        self.eta[[1, 4]] = 0
        self.eta[2] = 0
        t = 0.8 * (self.temperatures if per_row else torch.ones(6)).double()[:, None]
        _, self.lse, self.entropy = torch.ops.r1kernels.token_stats(
            self.logits, self.ids, None, 0.8, self.temperatures
        )
        z = self.logits.double() / t
        exact = testing.token_stats_gradient(z, self.ids, self.g, self.eta)
        slope = 1 / t if not softcap else (1 - (self.logits.double() / softcap) ** 2) / t
        self.exact = testing.Expected(exact.value * slope, exact.terms / t * (slope * t + 2 * bool(softcap)))

    def into(self, out: Tensor, logits: Tensor, rows: Tensor | None) -> Tensor:
        return token_stats.gradient_into(
            out, logits, self.ids, self.lse, self.entropy, self.g, self.eta, temperature=0.8,
            temperatures=self.temperatures, softcap=self.softcap, rows=rows,
        )


PAIRS = [(a, b) for a in DTYPES for b in DTYPES if a == b or a == torch.float32]


@pytest.mark.parametrize(("dtype", "narrow"), PAIRS)
@pytest.mark.parametrize("vocab", [1, 33, 2049, 5000])
@pytest.mark.parametrize(("softcap", "per_row"), [(0.0, False), (0.0, True), (7.0, False), (7.0, True)])
def test_gradient_in_given_memory(
    isa: str, dtype: torch.dtype, narrow: torch.dtype, vocab: int, softcap: float, per_row: bool
) -> None:
    """In fresh memory, in the logits' own, and with the rows that have a gradient moved to the top: the same bits."""
    case = Gradient(dtype, vocab, softcap, per_row)
    active = torch.tensor([0, 2, 3, 5])
    fresh = case.into(torch.empty(6, vocab, dtype=narrow), case.logits, None)
    testing.assert_within(fresh, case.exact)
    assert not fresh[[1, 4]].any()
    for rows in (None, active):
        memory = case.logits.clone()
        own = memory if narrow == dtype else memory.view(narrow)[:, :vocab]
        results = [case.into(torch.empty(6, vocab, dtype=narrow), case.logits, rows)]
        if rows is not None and testing.KERNELS != "cpu":  # programs run in no order: a row could be overwritten unread
            with pytest.raises((RuntimeError, ValueError), match="rows was given with an out in the memory of logits"):
                case.into(own, memory, rows)
        else:
            results.append(case.into(own, memory, rows))
        for result in results:
            assert torch.equal(result, fresh if rows is None else fresh[active])


@reference_only
@pytest.mark.parametrize("softcap", [0.0, 7.0])
def test_the_reference_gradient_in_given_memory(softcap: float) -> None:
    case = Gradient(torch.float32, 300, softcap, True)
    active = torch.tensor([0, 2, 3, 5])
    with backend("reference"):
        for narrow, rows in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, active)):
            memory = case.logits.clone()
            own = memory if narrow == torch.float32 else memory.view(narrow)[:, :300]
            result = case.into(own, memory, rows)
            index = slice(None) if rows is None else rows
            expected = testing.Expected(case.exact.value[index], 16 * case.exact.terms[index])
            testing.assert_within(result, expected)


@pytest.mark.parametrize("payload", [0x7FC00000, 0x7F800001, -1, 0x7FFF8000 - 0x7FFF])
@pytest.mark.parametrize("narrow", DTYPES)
def test_nan_of_any_payload_stays_nan(isa: str, payload: int, narrow: torch.dtype) -> None:
    """Cutting a NaN's low half off would leave infinity, or a number."""
    case = Gradient(torch.float32, 50, 0.0, False)
    memory = case.logits.clone()
    memory[3, 7] = torch.tensor([payload], dtype=torch.int32).view(torch.float32)
    assert memory[3, 7].isnan()
    _, case.lse, case.entropy = torch.ops.r1kernels.token_stats(memory, case.ids, None, 0.8)
    result = case.into(memory if narrow == torch.float32 else memory.view(narrow)[:, :50], memory.clone(), None)
    assert result[3].isnan().all() and result[[0, 1, 2, 4, 5]].isfinite().all()


BAD_ROWS = {
    "descending": [3, 2], "repeated": [2, 2], "negative": [-1, 2], "beyond the end": [2, 6],
}


@pytest.mark.not_on("triton", "cuda", reason="values are on the device: a kernel there asserts, or trusts")
@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_out_of_order_are_refused(name: str) -> None:
    case = Gradient(torch.float32, 11, 0.0, False)
    with backend(testing.KERNELS), pytest.raises(RuntimeError, match=r"rows must ascend within \[0, 6\)"):
        case.into(torch.empty(6, 11), case.logits, torch.tensor(BAD_ROWS[name]))


@pytest.mark.not_on("triton", reason="messages of the compiled bindings; test_raw_operators has those of Triton")
@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(5, 11), r"out must be \(N, V\) like logits"),
        (torch.empty(6, 12), r"out must be \(N, V\) like logits"),
        (torch.empty(11, 6).t(), "adjacent columns"),
        (torch.empty(6, 11, dtype=torch.float64), "logits must be float32, bfloat16 or float16"),
    ],
)
def test_memory_of_another_shape_is_refused(out: Tensor, message: str) -> None:
    case = Gradient(torch.float32, 11, 0.0, False)
    with backend(testing.KERNELS), pytest.raises(RuntimeError, match=message):
        case.into(out, case.logits, None)
    wide = Gradient(torch.bfloat16, 11, 0.0, False)
    narrower = "out must have the dtype of logits, or a narrower one"
    with backend(testing.KERNELS), pytest.raises(RuntimeError, match=narrower):
        wide.into(torch.empty(6, 11), wide.logits, None)

"""Log-probs over sets of ids from hidden states: gathered rows and the walk, against the dense float64 oracle."""

from collections.abc import Callable, Iterator
from typing import Any

import linear_cases as cases
import pytest
import torch
from backends import checks_only, compiles, reference_only, registration_only, slow_interpreted, slow_on_gpu_kernels
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from r1kernels import (
    _dispatch,
    backend,
    grpo_loss,
    linear_cross_entropy,
    linear_distillation_loss,
    linear_grpo_loss,
    linear_token_logprobs,
    linear_token_logprobs_and_entropy,
    objectives,
    testing,
)
from r1kernels.ops import support as support_sets

SHARES = {"gathered": 3, "walk": 10_000, "mixed": 6}  # of 37 ids: sets of at most 12, 0 and 6 are gathered


@pytest.fixture(params=SHARES)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test with small sets in gathered rows, with all of them in the walk, and with some in each."""
    monkeypatch.setattr(_dispatch, "SUPPORT_SHARE", SHARES[request.param])
    yield request.param


def both(g: Tensor, eta: Tensor) -> Callable[[Any], Tensor]:
    return lambda result: (g.to(result[0].dtype) * result[0] + eta.to(result[1].dtype) * result[1]).sum()


def make(head: str, *lead: int, whole: float = 0.2, most: int = 12, seed: int = 0, **options: Any) -> dict[str, Any]:
    case = cases.make(head, *lead, seed=seed, **options)
    vocab = len(case["weight"])
    return case | {"support": testing.random_support(case["token_ids"], vocab, most, whole=whole, seed=seed)}


# ---- 1. the reference ---------------------------------------------------------------------------------------


@reference_only
def test_gradcheck() -> None:
    case = make("everything", 4, width=3, vocab=7, most=4, dtype=torch.float64)
    names = list(cases.tensors(case))

    def statistics(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = cases.with_tensors(case, dict(zip(names, values, strict=True)))
        return linear_token_logprobs_and_entropy(**named)

    leaves = [value.requires_grad_() for value in cases.tensors(case).values()]
    with backend("reference"):
        assert torch.autograd.gradcheck(statistics, leaves)


# ---- 2. every form and dtype --------------------------------------------------------------------------------


@pytest.mark.parametrize("head", cases.HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(head: str, dtype: torch.dtype, form: str, implementation: str) -> None:
    case = make(head, 3, 4, dtype=dtype)
    g, eta = cases.weights_of(3, 4)
    g[1, 2] = eta[1, 2] = 0
    (logprobs, entropy), grads = cases.gradients(
        linear_token_logprobs_and_entropy, case, both(g, eta), chunk_bytes=cases.chunk_of(5, 37, 12)
    )
    expected = cases.exact(case, g, eta)
    slack = 10 * torch.finfo(dtype).eps if dtype != torch.float32 and "lora" in case else 4e-6
    testing.assert_within(logprobs, expected.logprobs, slack)
    testing.assert_within(entropy, expected.entropy, slack)
    cases.assert_gradients(grads, expected, slack + (torch.finfo(dtype).eps if dtype != torch.float32 else 0))
    assert not grads["hidden"][1, 2].any()


@pytest.mark.few(3)
@pytest.mark.parametrize(("dtype", "weight_dtype"), [
    (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
])
def test_a_weight_of_another_dtype(dtype: torch.dtype, weight_dtype: torch.dtype, form: str) -> None:
    case = make("bias", 3, 4, dtype=dtype, weight_dtype=weight_dtype)
    g, eta = cases.weights_of(3, 4)
    (logprobs, _), grads = cases.gradients(linear_token_logprobs_and_entropy, case, both(g, eta))
    expected = cases.exact(case, g, eta)
    testing.assert_within(logprobs, expected.logprobs, 4e-6)
    cases.assert_gradients(grads, expected, 4e-6)
    assert grads["weight"].dtype == weight_dtype


@slow_on_gpu_kernels
@pytest.mark.parametrize(("width", "tokens", "vocab"), [
    (1, 40, None), (33, 2050, None), (256, 40, None), (700, 40, None),
    (150, 300, 3000),  # more ids with entries than a range of the gradient of hidden states has
])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_width_and_more_than_one_block_of_tokens_or_range_of_ids(
    width: int, tokens: int, vocab: int | None, dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatch, "SUPPORT_SHARE", 3)
    sizes = {} if vocab is None else {"vocab": vocab, "most": 40}
    case = make("bias", tokens, width=width, whole=0, dtype=dtype, **sizes)
    assert vocab is None or len(case["support"][0].unique()) > 2048
    g, eta = cases.weights_of(tokens)
    (logprobs, entropy), grads = cases.gradients(linear_token_logprobs_and_entropy, case, both(g, eta))
    expected = cases.exact(case, g, eta)
    testing.assert_within(logprobs, expected.logprobs, 8e-6)
    testing.assert_within(entropy, expected.entropy, 8e-6)
    cases.assert_gradients(grads, expected, 8e-6)


@given(
    tokens=st.integers(0, 6), vocab=st.integers(1, 40), most=st.integers(1, 40), whole=st.sampled_from([0.0, 0.4]),
    share=st.sampled_from([1, 2, 5, 100]), head=st.sampled_from(["bias", "lora"]), seed=st.integers(0, 1000),
)
@slow_on_gpu_kernels
def test_any_sets_and_masks(
    tokens: int, vocab: int, most: int, whole: float, share: int, head: str, seed: int
) -> None:
    case = make(head, tokens, vocab=vocab, most=most, whole=whole, seed=seed)
    mask = torch.rand(tokens, generator=testing.generator(seed)) < 0.7
    ids, offsets = case["support"]
    behind = ~mask.repeat_interleave(offsets.diff())
    dirty = case | {
        "hidden": testing.poisoned(case["hidden"], mask), "token_ids": testing.poisoned(case["token_ids"], mask),
        "support": (torch.where(behind, -7, ids).int(), offsets.int()),
    }
    g, eta = cases.weights_of(tokens)
    before, _dispatch.SUPPORT_SHARE = _dispatch.SUPPORT_SHARE, share
    try:
        (logprobs, entropy), grads = cases.gradients(
            linear_token_logprobs_and_entropy, dirty, both(g, eta), mask=mask
        )
    finally:
        _dispatch.SUPPORT_SHARE = before
    expected = cases.exact(case, g * mask, eta * mask)
    testing.assert_within(logprobs, expected.logprobs * mask, 4e-6)
    testing.assert_within(entropy, expected.entropy * mask, 4e-6)
    cases.assert_gradients(grads, expected, 4e-6)


# ---- 3. what a set means ------------------------------------------------------------------------------------


def test_rows_of_the_weight_in_no_set_get_exactly_0(form: str, implementation: str) -> None:
    case = make("softcap", 5, whole=0, most=6)
    _, grads = cases.gradients(linear_token_logprobs_and_entropy, case, lambda r: (r[0] + r[1]).sum())
    unused = torch.ones(37, dtype=torch.bool)
    unused[case["support"][0]] = False
    assert unused.any() and not grads["weight"][unused].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ids_in_no_set_get_exactly_0_beside_nan(dtype: torch.dtype, form: str, implementation: str) -> None:
    """A row of NaN in sets makes all of their gradients NaN, and no other."""
    case = make("plain", 5, whole=0, most=6, dtype=dtype)
    unused = torch.ones(37, dtype=torch.bool)
    unused[case["support"][0]] = False
    case["weight"][case["token_ids"][2]] = torch.nan
    _, grads = cases.gradients(linear_token_logprobs_and_entropy, case, lambda r: (r[0] + r[1]).sum())
    assert unused.any() and not grads["weight"][unused].any() and grads["weight"].isnan().any()


@checks_only
def test_the_walk_reads_the_entries_of_each_set_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not all entries for each chunk, nor as many of them at a time as a chunk has."""
    monkeypatch.setattr(_dispatch, "SUPPORT_SHARE", 10_000)
    monkeypatch.setattr(support_sets, "BLOCK_LOGITS", 2 * 37)
    lengths = []
    repeat = torch.repeat_interleave

    def counted(*given: Any) -> Tensor:
        lengths.append(len(out := repeat(*given)))
        return out

    monkeypatch.setattr(torch, "repeat_interleave", counted)
    case = make("plain", 24, most=12)
    cases.gradients(linear_token_logprobs, case, lambda r: r.sum(), chunk_bytes=cases.chunk_of(5, 37, 12))
    assert max(lengths) <= 2 * 12 and 0 < sum(lengths) <= 3 * len(case["support"][0])


def test_an_id_that_is_there_twice_counts_once(form: str, implementation: str) -> None:
    case = make("everything", 6)
    ids, offsets = case["support"]
    twice = [s.repeat(2) for s in ids.split(offsets.diff().tolist())]
    doubled = case | {"support": (torch.cat(twice), 2 * offsets)}
    results, grads = cases.gradients(linear_token_logprobs_and_entropy, doubled, lambda r: (r[0] + r[1]).sum())
    expected = cases.exact(case, torch.ones(6), torch.ones(6))
    testing.assert_within(results[0], expected.logprobs, 4e-6)
    cases.assert_gradients(grads, expected, 4e-6)


def test_empty_sets_are_the_whole_vocabulary(form: str, implementation: str) -> None:
    case = cases.make("everything", 2, 3)
    empty = torch.zeros(0, dtype=torch.int64), torch.zeros(7, dtype=torch.int32)
    plain, over = (linear_token_logprobs_and_entropy(**case, **more) for more in ({}, {"support": empty}))
    assert torch.equal(plain[0], over[0]) and torch.equal(plain[1], over[1])


def test_the_first_ratio_is_exactly_1(form: str, implementation: str) -> None:
    case = make("everything", 4, 3)
    with torch.no_grad():
        old = linear_token_logprobs(**case)
        # The same tokens in another batch have the same bits, in gathered rows on a CPU.
        half = {name: value[2:] if isinstance(value, Tensor) and value.shape[:1] == (4,) else value
                for name, value in case.items()}
        ids, offsets = case["support"]
        half["support"] = ids[offsets[6] :], offsets[6:] - offsets[6]
        if form != "walk" and implementation == "cpu":
            assert torch.equal(linear_token_logprobs(**half), old[2:])
        else:  # products of other shapes may sum in another order
            testing.assert_within(linear_token_logprobs(**half), old[2:].double(), 4e-6)
    _, metrics = linear_grpo_loss(**case, advantages=torch.ones(4), old_logprobs=old)
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1


@slow_interpreted
@pytest.mark.parametrize("objective", [
    objectives.grpo(kl_coef=0.1, entropy_coef=0.01), objectives.dapo(), objectives.gspo(),
    objectives.grpo(kl_coef=0.1, kl_ratio=True), objectives.gmpo(), objectives.luspo(), objectives.vespo(),
    objectives.dppo(), objectives.dppo("kl"), objectives.ipo(),
    objectives.Objective.token_local(lambda logprobs, entropies, tokens: -tokens.advantages * logprobs),
    lambda logprobs, batch: -batch.advantages * logprobs,
], ids=["grpo", "dapo", "gspo", "kl_ratio", "gmpo", "luspo", "vespo", "dppo", "dppo_kl", "ipo", "token_local",
        "callable"])
@pytest.mark.parametrize("packed", [False, True])
def test_objectives(objective: Any, packed: bool, form: str, implementation: str) -> None:
    case = make("bias", 3, 4)
    advantages, mask = torch.tensor([1.0, 0.0, -2.0]), torch.rand(3, 4, generator=testing.generator(1)) < 0.8
    rest = {"old_logprobs": torch.full((3, 4), -2.0), "ref_logprobs": torch.full((3, 4), -2.5), "mask": mask}
    _, _, z = cases.logits(case)
    logits = testing.over_support(z.reshape(3, 4, -1), case["support"])
    wide = {name: value.double() if value.dtype.is_floating_point else value for name, value in rest.items()}
    with backend("reference"):
        expected = grpo_loss(logits, case["token_ids"], advantages, objective=objective, **wide)
    if packed:
        case |= {name: case[name].reshape(12, *case[name].shape[2:]) for name in ("hidden", "token_ids")}
        rest = {name: value.reshape(12) for name, value in rest.items()} | {"cu_seqlens": torch.tensor([0, 4, 8, 12])}
    into = torch.zeros(37, 12)
    weight = case["weight"].clone().requires_grad_()
    plain = linear_grpo_loss(**(case | {"weight": weight}), advantages=advantages, objective=objective, **rest)
    testing.assert_within(plain.loss, expected.loss, 1e-5)
    (grad,) = torch.autograd.grad(plain.loss, weight)
    again = linear_grpo_loss(**(case | {"weight": weight}), advantages=advantages, objective=objective, **rest,
                             grad_accumulation_into=into, capacity=12)
    again.loss.backward()
    assert weight.grad is None and grad.any()
    testing.assert_within(into, grad, 1e-6)


@slow_interpreted
def test_cross_entropy(form: str, implementation: str) -> None:
    case = make("bias", 3, 4)
    targets = case.pop("token_ids")
    expected = -cases.exact(case | {"token_ids": targets}).logprobs
    for reduction, value in (("mean", expected.mean()), ("sum", expected.sum()), ("none", expected)):
        testing.assert_within(linear_cross_entropy(**case, targets=targets, reduction=reduction), value, 5e-5)


# ---- 4. operators -------------------------------------------------------------------------------------------


@pytest.mark.few(2)
@registration_only
@pytest.mark.parametrize("head", ["plain", "everything"])
@pytest.mark.parametrize("share", [3, 10_000])
def test_opcheck(head: str, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "SUPPORT_SHARE", share)
    case = make(head, 6)
    a, b = case.get("lora", (None, None))
    arguments = (
        case["hidden"], case["weight"], case.get("bias"), a, b, case["token_ids"], case.get("temperature"), 1.0,
        case.get("logit_scale", 1.0), case.get("softcap", 0.0), torch.float32, 4, 0, -1, False,
    )
    sets = case["support"]
    ops = torch.ops.r1kernels
    _, lse, entropy, *kept = ops.linear_support_stats(*arguments, None, *sets)
    g, full = torch.ones(6), head == "everything"
    # Entries beyond those of small sets are memory that nobody has written, which opcheck would compare.
    test_utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.linear_support_stats, (*arguments, None, *sets), test_utils=test_utils)
    torch.library.opcheck(ops.linear_support_stats_backward, (
        *arguments, lse, entropy, g, g, *sets, *kept, torch.float32, [True, True, full, full, full],
    ), test_utils=test_utils)


@pytest.mark.few(2)
@compiles
@pytest.mark.filterwarnings(testing.DYNAMO_WARNING)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compile(form: str) -> None:
    case = make("everything", 3, 4)

    def loss(**head: Any) -> Tensor:
        return linear_grpo_loss(**head, advantages=torch.tensor([1.0, -1.0, 2.0])).loss

    expected, grads = cases.gradients(loss, case, lambda value: value)
    ours, ours_grads = cases.gradients(testing.compiled(loss), case, lambda value: value)
    assert torch.equal(ours, expected)
    for name, grad in ours_grads.items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-5, atol=1e-6)


# ---- 5. errors ----------------------------------------------------------------------------------------------


@checks_only
def test_sets_that_are_wrong(form: str) -> None:
    case = make("plain", 2, 3, whole=0)
    ids, offsets = case.pop("support")

    def refused(message: str, support: Any, error: type[Exception] = ValueError, **more: Any) -> None:
        for implementation in ("auto", "reference"):
            with backend(implementation), pytest.raises(error, match=message):
                linear_token_logprobs(**case, support=support, **more)

    last = len(ids) - 1
    changed = ids.clone()
    changed[last] = 37
    refused(rf"support token_ids\[{last}\] is 37, .*\[0, 37\)", (changed, offsets))
    begin, end = offsets[4:6].tolist()
    without = ids.clone()
    without[begin:end] = (case["token_ids"][1, 1] + 1) % 37
    token = int(case["token_ids"][1, 1])
    refused(rf"token_ids\[4\] is {token}, .*support token_ids\[{begin}:{end}\]", (without, offsets))
    refused(rf"support offsets begin with 0 and end with {last}", (ids, offsets - (torch.arange(7) == 6).long()))
    refused("support offsets begin with 1", (ids, offsets + (torch.arange(7) == 0)))
    falling = offsets.clone()
    falling[3] = 0
    refused(r"support offsets\[3\] is 0", (ids, falling))
    refused("support offsets has 6 entries, expected 7", (ids, offsets[:-1]))
    refused("support token_ids has shape", (ids[None], offsets))
    refused("support offsets has dtype", (ids, offsets.float()), TypeError)
    refused("support is a Tensor", ids, TypeError)
    refused("capacity", (ids, offsets), capacity=3)


@checks_only
def test_functions_that_compare_whole_vocabularies_refuse_sets() -> None:
    case = make("plain", 4)
    with pytest.raises(ValueError, match="expected None: linear_distillation_loss is over the whole vocabulary"):
        linear_distillation_loss(case["hidden"], case["weight"], case["hidden"], case["weight"],
                                 support=case["support"])


@checks_only
def test_small_sets_need_only_their_rows_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other rows hold does not matter to the gathered form, not even NaN."""
    monkeypatch.setattr(_dispatch, "SUPPORT_SHARE", 3)
    case = make("plain", 5, whole=0, most=6)
    unused = torch.ones(37, dtype=torch.bool)
    unused[case["support"][0]] = False
    expected = linear_token_logprobs(**case)
    case["weight"] = torch.where(unused[:, None], torch.nan, case["weight"])
    assert torch.equal(linear_token_logprobs(**case), expected)

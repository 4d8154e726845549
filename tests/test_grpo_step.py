"""The fused GRPO step on the CUDA emulator: values, gradients, every way to cut a row, and what a row may hold.

The seed decides in which order threads, copies and blocks take turns. `test_cuda_emulated` runs this file.
"""

import ctypes
import itertools
import math
import os
from typing import Any

import pytest
import torch
from test_policy_loss import OBJECTIVES
from torch import Tensor

from r1kernels import Objective, _library, backend, grpo_loss, objectives, testing
from r1kernels.ops import grpo_step

if not _library.EMULATED:
    pytest.skip("for the CUDA emulator: test_cuda_emulated runs this file", allow_module_level=True)

EMULATOR = ctypes.CDLL(os.environ["R1KERNELS_CUDA_EMULATOR"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERYTHING = {"kl_coef": 0.1, "entropy_coef": 0.01}
OF_TOKENS = {name: fields for name, fields in OBJECTIVES.items() if fields.get("ratio", "token") == "token"}
# [blocks of a cluster, warps of a block, vectors of a chunk]
TILES = [(1, 1, 32), (2, 3, 64), (4, 2, 32), (4, 1, 96)]
METRICS = (
    "tokens", "sequences", "surrogate_loss", "kl", "entropy", "ratio_mean", "ratio_min", "ratio_max", "approx_kl",
    "clip_fraction", "clip_low_fraction", "clip_high_fraction", "ratio_cap_fraction", "active_fraction",
    "nonfinite_tokens",
)


@pytest.fixture(autouse=True)
def hopper() -> None:
    device(processors=4)
    EMULATOR.r1k_emulator_seed(ctypes.c_uint64(1))


def device(major: int = 9, processors: int = 4, shared: int = 227 << 10) -> None:
    EMULATOR.r1k_emulator_properties(major, 0, processors, ctypes.c_size_t(shared))


def batch(dtype: torch.dtype, vocab: int, shape: tuple[int, int] = (5, 7), seed: int = 0) -> dict[str, Any]:
    logits, ids = testing.random_logits(*shape, vocab, dtype=dtype, seed=seed), testing.random_ids(*shape, vocab=vocab)
    logprobs = testing.token_stats(logits, ids).logprobs.float()
    noise = torch.randn(2, *shape, generator=testing.generator(seed + 1)) / 2
    return {
        "logits": logits, "token_ids": ids, "advantages": testing.random_policy(shape[0])["advantages"],
        "old_logprobs": logprobs + noise[0], "ref_logprobs": logprobs + noise[1],
    }


def step(
    inputs: dict[str, Any], objective: Objective, tile: tuple[int, ...] = (), out: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, ...]:
    """(loss, metrics, log-probs, entropy, gradient)."""
    logits = inputs["logits"]
    out = torch.empty(logits.shape, dtype=logits.dtype) if out is None else out
    rest = ("old_logprobs", "ref_logprobs", "mask", "cu_seqlens", "importance_weights", "normalizer")
    results = torch.ops.r1kernels.grpo_step(
        logits, inputs["token_ids"], inputs["advantages"], *(inputs.get(name) for name in rest), temperature,
        objectives.SURROGATES.index(objective.surrogate), int(objective.kl[1]),
        objectives.AGGREGATES.index(objective.aggregate), objective.clip_low, objective.clip_high,
        math.inf if objective.ratio_cap is None else objective.ratio_cap, objective.tau_pos, objective.tau_neg,
        objective.kl_coef, objective.entropy_coef, float(objective.max_length or 1), list(tile), out,
    )
    return (*results, out)


def check(inputs: dict[str, Any], objective: Objective, *, temperature: float = 1.0, **how: Any) -> None:
    """The oracles composed: those of a row at its logits, and the policy loss's at the log-probs that the step gave."""
    logits, ids, mask = inputs["logits"], inputs["token_ids"], inputs.get("mask")
    if mask is not None:  # what is behind the mask is no number
        exact_logits, exact_ids = torch.where(mask[..., None], logits, 0), torch.where(mask, ids, 0)
    else:
        exact_logits, exact_ids = logits.clone(), ids
    loss, metrics, logprobs, entropy, grad = step(inputs, objective, temperature=temperature, **how)

    row = testing.token_stats(exact_logits, exact_ids, temperature)
    counts = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    # Rounded to float32, near the largest logits of their difference; the sums are good to some roundings as well.
    budget = 4 * testing.EPS32 * (row.logprobs.abs() + exact_logits.double().abs().amax(-1) / temperature + 1)
    testing.assert_within(logprobs, torch.where(counts, row.logprobs, 0), budget)
    testing.assert_within(entropy, torch.where(counts, row.entropy, 0), budget)

    rest = {k: v for k, v in inputs.items() if k not in ("logits", "token_ids")}
    expected = testing.policy_loss(objective, logprobs=logprobs, entropy=entropy, **rest)
    testing.assert_within(loss, expected.loss)
    for name, value in zip(METRICS, metrics, strict=True):
        if name in expected.metrics:
            testing.assert_within(value, expected.metrics[name])
    g, eta = expected.grad_logprobs, expected.grad_entropy.value
    exact = testing.token_stats_gradient(exact_logits, exact_ids, g.value, eta, temperature)
    per_g = testing.token_stats_gradient(exact_logits, exact_ids, torch.ones(ids.shape), 0.0, temperature).value.abs()
    testing.assert_within(grad, testing.Expected(exact.value, exact.terms + g.terms.unsqueeze(-1) * per_g))


# ---- values and gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OF_TOKENS)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    check(batch(dtype, 300), Objective(**OF_TOKENS[name], **EVERYTHING), tile=(2, 2, 32), temperature=0.7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 64, 1000, 2049, 5003])
def test_every_way_to_cut_a_row(vocab: int, dtype: torch.dtype) -> None:
    inputs = batch(dtype, vocab)
    for tile, objective in itertools.product(TILES, (objectives.r1(), objectives.grpo(entropy_coef=0.01))):
        check(inputs, objective, tile=tile)


@pytest.mark.parametrize("vocab", [32_000, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocabularies_of_real_models(vocab: int, dtype: torch.dtype) -> None:
    check(batch(dtype, vocab, (1, 3)), objectives.r1())


@pytest.mark.parametrize("slots", [4, 6, 9, 16])
def test_rings_that_hold_less_than_two_rows_and_more(slots: int) -> None:
    """Rows of four chunks: a ring of one row, of one and a half, of two and a little, of four."""
    chunk = 32 * 16 + 8  # with its barrier
    device(shared=slots * chunk + (9 << 10))
    inputs = batch(torch.bfloat16, 4 * 32 * 8 - 3, (3, 6)) | {"mask": testing.random_ids(3, 6, vocab=4) > 0}
    for seed in range(10):
        EMULATOR.r1k_emulator_seed(ctypes.c_uint64(seed))
        check(inputs, objectives.r1(), tile=(1, 1, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_order_of_events(dtype: torch.dtype) -> None:
    inputs = batch(dtype, 1003) | {"mask": testing.random_ids(5, 7, vocab=3) > 0}
    first = step(inputs, objectives.r1(), (4, 2, 32))
    for seed in range(2, 60):
        EMULATOR.r1k_emulator_seed(ctypes.c_uint64(seed))
        for got, expected in zip(step(inputs, objectives.r1(), (4, 2, 32)), first, strict=True):
            assert torch.equal(got, expected)


def test_a_row_does_not_depend_on_its_batch() -> None:
    inputs = batch(torch.bfloat16, 1000)
    objective = objectives.reinforce()
    whole = step(inputs | {"normalizer": torch.tensor(1.0)}, objective, (2, 2, 32))
    for n in range(5):
        alone = {k: v[n : n + 1] for k, v in inputs.items()} | {"normalizer": torch.tensor(1.0)}
        for got, expected in zip(step(alone, objective, (2, 2, 32))[2:], whole[2:], strict=True):
            assert torch.equal(got[0], expected[n])


# ---- where things lie ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1000, 1003])
def test_in_place_is_the_same(vocab: int, dtype: torch.dtype) -> None:
    inputs = batch(dtype, vocab) | {"mask": testing.random_ids(5, 7, vocab=3) > 0}
    for tile in TILES:
        expected = step(inputs, objectives.r1(), tile)
        taken = inputs | {"logits": inputs["logits"].clone()}
        for got, want in zip(step(taken, objectives.r1(), tile, out=taken["logits"]), expected, strict=True):
            assert torch.equal(got, want)


LAYOUTS = {
    "slice": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "rows apart": lambda x: torch.cat([x, x], 2)[..., : x.shape[2]],
    "late start": lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batch inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("vocab", [1000, 1003])
def test_layouts(layout: str, vocab: int) -> None:
    """Rows whose gradients lie otherwise than their logits are read twice, to the same effect."""
    inputs = batch(torch.bfloat16, vocab)
    view = LAYOUTS[layout](inputs["logits"])
    assert torch.equal(view, inputs["logits"])
    check(inputs | {"logits": view}, objectives.grpo(entropy_coef=0.01))
    if layout == "transposed":
        with pytest.raises(RuntimeError, match="grad_logits must have adjacent entries over the vocabulary"):
            step(inputs, objectives.grpo(), out=torch.empty_like(view))
        return
    around = view.new_full((view.untyped_storage().size() // 2,), math.nan).as_strided(view.shape, view.stride(), 0)
    check(inputs, objectives.grpo(), out=around)


def test_neighbours_are_left_alone() -> None:
    inputs = batch(torch.bfloat16, 1003, (2, 3))
    wide = torch.full((2, 3, 1010), 7.0, dtype=torch.bfloat16)
    wide[..., 3:1006] = inputs["logits"]
    view = wide[..., 3:1006]
    step(inputs | {"logits": view}, objectives.grpo(), (2, 2, 32), out=view)
    assert (wide[..., :3] == 7).all() and (wide[..., 1006:] == 7).all()


@pytest.mark.parametrize("major", [8, 12])
def test_devices_without_clusters(major: int) -> None:
    device(major=major, shared=99 << 10)
    check(batch(torch.bfloat16, 1003), objectives.grpo(entropy_coef=0.01))
    with pytest.raises(RuntimeError, match=r"a row does not fit tile \[2, 2, 32\] on this device"):
        step(batch(torch.bfloat16, 1003), objectives.grpo(), (2, 2, 32))


def test_a_row_that_no_cluster_can_hold() -> None:
    device(shared=64 << 10)
    check(batch(torch.float32, 151_936, (1, 2)), objectives.grpo())


# ---- tokens and sequences -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OF_TOKENS)
def test_packed_masked_and_weighted(name: str) -> None:
    lengths = testing.random_lengths(5, 7)
    objective = Objective(**OF_TOKENS[name], **EVERYTHING)
    padded = batch(torch.bfloat16, 300)
    padded["importance_weights"] = testing.random_policy()["importance_weights"]
    keep = testing.length_mask(lengths, 7)
    packed = {k: v[keep] if v.shape[:2] == keep.shape else v for k, v in padded.items()}
    packed["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    check(packed, objective)
    for shape in (packed["token_ids"].shape,):
        check(packed | {"mask": testing.random_ids(*shape, vocab=3) > 0}, objective, tile=(2, 1, 32))
    mask = keep & (testing.random_ids(5, 7, vocab=3) > 0)
    poisoned = {k: testing.poisoned(v, mask) if v.shape[:2] == mask.shape else v for k, v in padded.items()}
    check(poisoned | {"mask": mask}, objective, tile=(2, 2, 32))


def test_many_short_sequences_and_one_long() -> None:
    lengths = [1, 0, 200, *([1, 2, 0] * 60), 3]
    tokens = sum(lengths)
    inputs = batch(torch.bfloat16, 40, (1, tokens))
    inputs = {k: v[0] for k, v in inputs.items() if k != "advantages"}
    inputs |= {
        "advantages": torch.randn(len(lengths), generator=testing.generator(3)),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0), "mask": testing.random_ids(tokens, vocab=5) > 0,
    }
    for objective in (objectives.grpo(), objectives.dapo()):
        check(inputs, objective)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_no_tokens(shape: tuple[int, int]) -> None:
    inputs = {
        "logits": torch.empty(*shape, 11), "token_ids": torch.empty(shape, dtype=torch.int64),
        "advantages": torch.ones(shape[0]),
    }
    loss, metrics, *_ = step(inputs, objectives.grpo())
    assert loss == 0 and metrics[0] == 0 and metrics[1] == shape[0]


@pytest.mark.parametrize(("vocab", "tile"), [(1, ()), (2, ()), (7, ()), (70, (4, 2, 32)), (2003, (4, 7, 32))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_rows_of_few_vectors(vocab: int, tile: tuple[int, ...], dtype: torch.dtype) -> None:
    """Some parts are empty; the first vector of a row may be its last."""
    device(processors=8)
    inputs = batch(dtype, vocab) | {"mask": testing.random_ids(5, 7, vocab=2) > 0}
    check(inputs, objectives.grpo(), tile=tile)


def test_all_masked() -> None:
    inputs = batch(torch.bfloat16, 300) | {"mask": torch.zeros(5, 7, dtype=torch.bool)}
    inputs["logits"].fill_(math.nan)
    loss, metrics, logprobs, entropy, grad = step(inputs, objectives.dapo(), (2, 2, 32))
    assert loss == 0 and metrics[0] == 0 and not logprobs.any() and not entropy.any() and not grad.any()


# ---- what a row may hold ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_infinity_is_an_entry_like_any_other(dtype: torch.dtype) -> None:
    inputs = batch(dtype, 1003)
    inputs["logits"].view(-1, 1003)[:, ::3] = -math.inf
    inputs["logits"].view(-1, 1003)[3, :600] = -math.inf
    inputs["token_ids"] = inputs["token_ids"] // 3 * 3 + 1
    inputs["token_ids"].view(-1)[3] = 601
    inputs["logits"].view(-1, 1003)[5] = -math.inf
    inputs["logits"].view(-1, 1003)[5, 7] = 3.0  # all there is
    inputs["token_ids"].view(-1)[5] = 7
    for tile in TILES:
        check(inputs, objectives.grpo(entropy_coef=0.01), tile=tile)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_no_distribution_stays_alone(bad: float, dtype: torch.dtype) -> None:
    inputs = batch(dtype, 1003)
    inputs["logits"][1, 2, 500] = bad
    _, _, logprobs, entropy, grad = step(inputs, objectives.reinforce(), (2, 2, 32))
    sick = torch.zeros(5, 7, dtype=torch.bool)
    sick[1, 2] = True
    assert torch.equal(logprobs.isnan(), sick) and torch.equal(entropy.isnan(), sick)
    assert grad[sick].isnan().all() and grad[~sick].isfinite().all()


def test_equal_logits_do_not_drift() -> None:
    for dtype in DTYPES:
        inputs = batch(dtype, 100_003, (1, 1))
        inputs["logits"].fill_(0.5)
        _, _, logprobs, entropy, _ = step(inputs, objectives.grpo(), (2, 2, 64))
        torch.testing.assert_close(-logprobs, entropy, rtol=2e-7, atol=0)
        assert abs(float(entropy) - math.log(100_003)) < 1e-6 * math.log(100_003)


def test_a_confident_token_keeps_its_relative_accuracy() -> None:
    for dtype in DTYPES:
        inputs = batch(dtype, 1003, (1, 1))
        inputs["logits"].fill_(0.0)
        inputs["token_ids"].fill_(500)
        inputs["logits"][..., 500] = 25.0
        logprob = step(inputs, objectives.grpo(), (2, 2, 32))[2]
        assert abs(float(logprob) / -math.log1p(1002 * math.exp(-25.0)) - 1) < 1e-5


# ---- errors of values that only a device sees ---------------------------------------------------------------


@pytest.mark.parametrize("value", [-1, 300, 2**40])
def test_an_id_outside_the_vocabulary(value: int) -> None:
    inputs = batch(torch.bfloat16, 300)
    inputs["token_ids"][1, 2] = value
    with pytest.raises(RuntimeError, match="token_ids holds an id outside"):
        step(inputs, objectives.grpo(), (2, 2, 32))
    inputs["mask"] = torch.ones(5, 7, dtype=torch.bool)
    inputs["mask"][1, 2] = False
    step(inputs, objectives.grpo(), (2, 2, 32))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"normalizer": torch.tensor(0.0)}, "normalizer must be a positive finite number"),
        ({"normalizer": torch.tensor(math.nan)}, "normalizer must be a positive finite number"),
        ({"cu_seqlens": torch.tensor([0, 3, 34])}, "cu_seqlens must run from 0 to N"),
        ({"cu_seqlens": torch.tensor([0, 36, 35])}, "cu_seqlens must not descend"),
        ({"cu_seqlens": torch.tensor([-(10**12), 5, 35])}, "cu_seqlens must run from 0 to N"),
        ({"cu_seqlens": torch.tensor([0, 10**12, 35])}, "cu_seqlens must not descend"),
    ],
)
def test_wrong_values(wrong: dict[str, Tensor], message: str) -> None:
    inputs = {k: v.flatten(0, 1) if v.dim() > 1 else v[:2] for k, v in batch(torch.bfloat16, 300).items()}
    inputs |= {"cu_seqlens": torch.tensor([0, 3, 35]), "mask": torch.ones(35, dtype=torch.bool)} | wrong
    with pytest.raises(RuntimeError, match=message):
        step(inputs, objectives.grpo(), (2, 2, 32))


# ---- grpo_loss ----------------------------------------------------------------------------------------------


def loss_and_gradient(inputs: dict[str, Any], factor: float = 1.0, **keywords: Any) -> tuple[Tensor, Tensor]:
    logits = inputs["logits"].detach().requires_grad_()
    loss = grpo_loss(**(inputs | {"logits": logits}), **keywords).loss
    (grad,) = torch.autograd.grad(loss * factor, logits)
    return loss.detach(), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grpo_loss_takes_the_step_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch(dtype, 300)
    with backend("cuda"):
        *expected, grad = step(inputs, objectives.r1())
        calls = []
        run = grpo_step.grpo_step
        monkeypatch.setattr(grpo_step, "grpo_step", lambda *arguments: calls.append(1) or run(*arguments))
        loss, got = loss_and_gradient(inputs, objective=objectives.r1())
        assert calls == [1] and torch.equal(loss, expected[0]) and torch.equal(got, grad)
        for other in (objectives.gspo(), lambda logprobs, batch: -logprobs):
            loss_and_gradient(inputs, objective=other)
        loss_and_gradient(inputs | {"logits": inputs["logits"].half()})
        with torch.no_grad():
            grpo_loss(**inputs)
        assert calls == [1]


def test_a_factor_of_the_loss_reaches_the_gradient() -> None:
    inputs = batch(torch.float32, 300)
    with backend("cuda"):
        _, once = loss_and_gradient(inputs)
        assert torch.equal(loss_and_gradient(inputs, 4.0)[1], 4 * once)
        assert not loss_and_gradient(inputs, 0.0)[1].any()


def test_any_factor_is_one_more_rounding() -> None:
    inputs = batch(torch.bfloat16, 300)
    with backend("cuda"):
        _, once = loss_and_gradient(inputs)
        for factor in (0.1, 1 / 3, 7.0):
            _, scaled = loss_and_gradient(inputs, factor)
            exact = once.double() * float(torch.tensor(factor))
            testing.assert_within(scaled, exact, testing.rounding(exact, torch.bfloat16))


def test_a_kept_graph_gives_the_same_gradient_again() -> None:
    inputs = batch(torch.bfloat16, 300)
    logits = inputs["logits"].requires_grad_()
    with backend("cuda"):
        loss = 3 * grpo_loss(**inputs).loss
        first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
        assert torch.equal(torch.autograd.grad(loss, logits)[0], first)


def test_opcheck() -> None:
    inputs = batch(torch.bfloat16, 300)
    arguments = (
        inputs["logits"], inputs["token_ids"], inputs["advantages"], inputs["old_logprobs"], None, None, None, None,
        None, 1.0, 0, 3, 0, 0.2, 0.2, math.inf, 1.0, 1.05, 0.0, 0.0, 1.0, [], torch.zeros(5, 7, 300).bfloat16(),
    )
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.r1kernels.grpo_step.default, arguments, test_utils=tests)

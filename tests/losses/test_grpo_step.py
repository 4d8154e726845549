"""The fused GRPO step on the CUDA emulator: values, gradients, every way to cut a row, and what a row may hold.

The seed decides in which order threads, copies and blocks take turns. `test_cuda_emulated` runs this file.
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from r1kernels import Objective, _library, objectives, testing

if not _library.EMULATED:
    pytest.skip("for the CUDA emulator: test_cuda_emulated runs this file", allow_module_level=True)

from grpo_step_cases import DTYPES, EVERYTHING, OF_TOKENS, TILES, batch, check, device, reset, seed, step


@pytest.fixture(autouse=True)
def hopper() -> None:
    reset()


# ---- values and gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OF_TOKENS)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    check(batch(dtype, 300), Objective(**OF_TOKENS[name], **EVERYTHING), tile=(2,), temperature=0.7)


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


def test_rows_of_many_events() -> None:
    """Masked and counted rows side by side, in every order that the emulator knows."""
    inputs = batch(torch.bfloat16, 4 * 32 * 8 - 3, (3, 6)) | {"mask": testing.random_ids(3, 6, vocab=4) > 0}
    for order in range(10):
        seed(order)
        check(inputs, objectives.r1(), tile=(4,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_order_of_events(dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    inputs = batch(dtype, 1003) | {"mask": testing.random_ids(5, 7, vocab=3) > 0}
    first = step(inputs, objectives.r1(), (4,))
    for order in range(2, 60 if request.config.getoption("--full") else 12):
        seed(order)
        for got, expected in zip(step(inputs, objectives.r1(), (4,)), first, strict=True):
            assert torch.equal(got, expected)


def test_a_row_does_not_depend_on_its_batch() -> None:
    inputs = batch(torch.bfloat16, 1000)
    objective = objectives.reinforce()
    whole = step(inputs | {"normalizer": torch.tensor(1.0)}, objective, (2,))
    for n in range(5):
        alone = {k: v[n : n + 1] for k, v in inputs.items()} | {"normalizer": torch.tensor(1.0)}
        for got, expected in zip(step(alone, objective, (2,))[2:], whole[2:], strict=True):
            assert torch.equal(got[0], expected[n])


def test_rows_that_start_alike_have_the_same_bits() -> None:
    """The step cuts a row at multiples of 16 bytes in memory: of rows of 1003 entries, every eighth starts alike."""
    inputs = batch(torch.bfloat16, 1003, (1, 24))
    for name in ("logits", "token_ids", "old_logprobs", "ref_logprobs"):
        inputs[name][:] = inputs[name][:, :1].clone()
    *_, logprobs, entropy, grad = step(inputs, objectives.grpo(entropy_coef=0.01), (4,))
    for results in (logprobs, entropy, grad):
        assert torch.equal(results[:, 8:], results[:, :-8])


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
    step(inputs | {"logits": view}, objectives.grpo(), (2,), out=view)
    assert (wide[..., :3] == 7).all() and (wide[..., 1006:] == 7).all()


@pytest.mark.parametrize("major", [8, 12])
def test_devices_without_clusters(major: int) -> None:
    device(major=major, shared=99 << 10)
    check(batch(torch.bfloat16, 1003), objectives.grpo(entropy_coef=0.01))
    with pytest.raises(RuntimeError, match="a row does not fit a cluster of 2 blocks on this device"):
        step(batch(torch.bfloat16, 1003), objectives.grpo(), (2,))


KIB = 1 << 10
UNFUSED = {"none": 0, "device": 1, "layout": 2, "length": 3}


def tile_of(vocab: int, dtype: torch.dtype, layout: Callable[[Tensor], Tensor] = lambda x: x) -> tuple[int, ...]:
    """(blocks of a cluster, blocks for which a processor has the shared memory, why the step is not fused)."""
    logits = torch.empty(2, vocab, dtype=dtype)
    out = layout(torch.empty_like(logits))
    cluster, blocks, clusters, unfused = torch.ops.r1kernels_cuda.grpo_step_tile(logits, out)
    assert (clusters > 0) == (unfused == UNFUSED["none"])
    return cluster, blocks, unfused


@pytest.mark.parametrize(
    ("vocab", "dtype", "cluster", "blocks"),
    [
        (32_000, torch.bfloat16, 1, 3), (50_257, torch.bfloat16, 2, 4), (128_256, torch.bfloat16, 4, 3),
        (151_936, torch.bfloat16, 8, 5), (262_144, torch.bfloat16, 8, 3), (32_000, torch.float32, 2, 3),
        (128_256, torch.float32, 8, 3), (151_936, torch.float32, 8, 2),
    ],
)
def test_several_rows_share_a_processor(vocab: int, dtype: torch.dtype, cluster: int, blocks: int) -> None:
    """On an H200: blocks of other rows hide what a block waits for, and at least 32 KiB are on their way."""
    device(processors=132)
    assert tile_of(vocab, dtype) == (cluster, blocks, UNFUSED["none"])
    assert blocks >= 2 and blocks * vocab * dtype.itemsize / cluster >= 32 * KIB


def test_why_a_step_is_not_fused() -> None:
    device(processors=132)
    assert tile_of(262_144, torch.float32)[2] == UNFUSED["length"]
    assert tile_of(1003, torch.bfloat16, lambda x: x.t().contiguous().t())[2] == UNFUSED["layout"]
    for major in (8, 12):
        device(major=major)
        assert tile_of(1003, torch.bfloat16)[2] == UNFUSED["device"]


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
        check(packed | {"mask": testing.random_ids(*shape, vocab=3) > 0}, objective, tile=(2,))
    mask = keep & (testing.random_ids(5, 7, vocab=3) > 0)
    poisoned = {k: testing.poisoned(v, mask) if v.shape[:2] == mask.shape else v for k, v in padded.items()}
    check(poisoned | {"mask": mask}, objective, tile=(2,))


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


@pytest.mark.parametrize(("vocab", "tile"), [(1, ()), (2, ()), (7, ()), (70, (4,)), (2003, (4,))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_rows_of_few_vectors(vocab: int, tile: tuple[int, ...], dtype: torch.dtype) -> None:
    """Some parts are empty; the first vector of a row may be its last."""
    device(processors=8)
    inputs = batch(dtype, vocab) | {"mask": testing.random_ids(5, 7, vocab=2) > 0}
    check(inputs, objectives.grpo(), tile=tile)


def test_all_masked() -> None:
    inputs = batch(torch.bfloat16, 300) | {"mask": torch.zeros(5, 7, dtype=torch.bool)}
    inputs["logits"].fill_(math.nan)
    loss, metrics, logprobs, entropy, grad = step(inputs, objectives.dapo(), (2,))
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
    _, _, logprobs, entropy, grad = step(inputs, objectives.reinforce(), (2,))
    sick = torch.zeros(5, 7, dtype=torch.bool)
    sick[1, 2] = True
    assert torch.equal(logprobs.isnan(), sick) and torch.equal(entropy.isnan(), sick)
    assert grad[sick].isnan().all() and grad[~sick].isfinite().all()


def test_equal_logits_do_not_drift() -> None:
    for dtype in DTYPES:
        inputs = batch(dtype, 100_003, (1, 1))
        inputs["logits"].fill_(0.5)
        _, _, logprobs, entropy, _ = step(inputs, objectives.grpo(), (2,))
        torch.testing.assert_close(-logprobs, entropy, rtol=2e-7, atol=0)
        assert abs(float(entropy) - math.log(100_003)) < 1e-6 * math.log(100_003)


def test_a_confident_token_keeps_its_relative_accuracy() -> None:
    for dtype in DTYPES:
        inputs = batch(dtype, 1003, (1, 1))
        inputs["logits"].fill_(0.0)
        inputs["token_ids"].fill_(500)
        inputs["logits"][..., 500] = 25.0
        logprob = step(inputs, objectives.grpo(), (2,))[2]
        assert abs(float(logprob) / -math.log1p(1002 * math.exp(-25.0)) - 1) < 1e-5

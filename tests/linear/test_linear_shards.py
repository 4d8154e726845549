"""Heads whose vocabulary is sharded over 2, 3 and 4 processes, against one process with the whole weight."""

import itertools
from typing import Any

import linear_cases as cases
import pytest
import shard_ranks
import torch
from backends import checks_only, host_code, slow_on_gpu_kernels
from ranks import run_ranks
from shard_cases import LEAD, SPLITS, VOCAB, WIDTH, assert_like_one_process
from shard_distillation import DISTILLED, in_float64
from shard_ranks import CALLS
from torch import Tensor

from r1kernels import (
    backend,
    distillation_loss,
    linear_distillation_loss,
    linear_token_logprobs,
    linear_token_logprobs_and_entropy,
    testing,
)
from r1kernels.ops import shards
from r1kernels.ops.shards import layout_of, merge

WORLDS = list(SPLITS)
TOKENS = LEAD[0] * LEAD[1]
SHARDED = {"weight": 0, "bias": 0, "lora_b": 1, "logits": -1}  # gradients of a rank's own rows, along this axis
Results = list[dict[str, Any]]

pytestmark = slow_on_gpu_kernels


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks(shard_ranks, tmp_path_factory.mktemp("ranks"))


def joined(ranks: Results, name: str, world: int) -> dict[str, Tensor]:
    """The results of a call with the rows of all ranks; what every rank has must have the same bits on each."""
    parts = [results[f"{name}, {world}"] for results in ranks[:world]]
    result = {}
    for key, first in parts[0].items():
        if key in SHARDED:
            result[key] = torch.cat([part[key] for part in parts], SHARDED[key])
        else:
            result[key] = first
            for part in parts[1:]:
                assert torch.equal(part[key].nan_to_num(nan=7e7), first.nan_to_num(nan=7e7)), (name, key)
    return result


@pytest.mark.few(24)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CALLS)
def test_ranks_together_compute_what_one_process_computes(name: str, world: int, ranks: Results) -> None:
    function, make_case, options = CALLS[name]
    alone = function(make_case(), **options)
    assert_like_one_process(joined(ranks, name, world), alone)


@pytest.mark.parametrize("world", WORLDS)
def test_gradients_are_within_the_budget_of_float64(world: int, ranks: Results) -> None:
    g, eta = cases.weights_of(*LEAD)
    mask = shard_ranks.mask()
    for head, (dtypes, (dtype, _)) in itertools.product(("plain", "everything"), shard_ranks.DTYPES.items()):
        case = shard_ranks.make(head, dtypes)
        expected = cases.exact(case, g * mask, eta * mask)
        together = joined(ranks, f"statistics {head}, {dtypes}", world)
        narrow = dtype != torch.float32
        slack = 10 * torch.finfo(dtype).eps if narrow and head == "everything" else 4e-6
        testing.assert_within(together["logprobs"], expected.logprobs * mask, slack)
        testing.assert_within(together["entropy"], expected.entropy * mask, slack)
        grads = {key: together[key] for key in cases.tensors(case)}
        cases.assert_gradients(grads, expected, slack + (torch.finfo(dtype).eps if narrow else 0))


@pytest.mark.few(24)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", DISTILLED)
def test_distillation_is_as_exact_as_in_one_process(name: str, world: int, ranks: Results) -> None:
    function, make_case, options = DISTILLED[name]
    together, alone = joined(ranks, name, world), function(make_case(), **options)
    wide = in_float64(make_case())
    with backend("reference"):
        exact = function(wide, **{key: value for key, value in options.items() if key != "chunk_bytes"})
    assert together.keys() == alone.keys()
    for key, value in alone.items():
        got, eps = together[key], torch.finfo(value.dtype).eps
        assert (got.shape, got.dtype) == (value.shape, value.dtype), key
        if value.isfinite().all():
            errors = error(got, exact[key]), error(value, exact[key])
            # One number may be exact by chance.
            assert errors[0] <= 2 * errors[1] + eps + 3 * testing.EPS32, (key, errors)
        else:
            testing.assert_within(got, value, 0)


def error(grad: Tensor, exact: Tensor) -> float:
    return float((grad.detach().double() - exact).norm() / exact.norm().clamp(min=1e-30))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("dtypes", ["bfloat16", "float16"])
def test_parts_of_sums_over_ranks_are_not_rounded(dtypes: str, world: int, ranks: Results) -> None:
    function, make_case, options = CALLS[f"statistics plain, {dtypes}"]
    together, alone = joined(ranks, f"statistics plain, {dtypes}", world), function(make_case(), **options)
    # The same float32 sums up to their order, rounded once: they are seldom rounded apart.
    assert (together["hidden"] == alone["hidden"]).double().mean() > 0.97
    # In the gradient of A, one process rounds a product in the middle.
    function, make_case, options = CALLS[f"statistics everything, {dtypes}"]
    together, alone = joined(ranks, f"statistics everything, {dtypes}", world), function(make_case(), **options)
    g, eta = (value * shard_ranks.mask() for value in cases.weights_of(*LEAD))
    exact = cases.exact(make_case(), g, eta).grads["lora_a"]
    assert error(together["lora_a"], exact) <= error(alone["lora_a"], exact)


@pytest.mark.parametrize("world", WORLDS)
def test_log_probs_near_0_keep_their_relative_accuracy(world: int, ranks: Results) -> None:
    together = joined(ranks, "no logits in a shard", world)["logprobs"][0]
    alone = shard_ranks.statistics(shard_ranks.no_logits_in_a_shard())["logprobs"][0]
    assert (alone > -1e-8).all() and (alone < 0).any()
    testing.assert_within(together, alone, 1e-6 * alone.double().abs())


@pytest.mark.parametrize("world", WORLDS)
def test_padding_counts_for_nothing(world: int, ranks: Results) -> None:
    rows = (400,) * world
    together = joined(ranks, "padded", world)
    whole = shard_ranks.padded(rows, None)
    unpadded = shard_ranks.shard_of(whole, (790,), 0)
    alone = shard_ranks.statistics(unpadded)
    for key, axis in (("weight", 0), ("bias", 0), ("lora_b", 1)):
        kept, cut = together[key].split([790, together[key].shape[axis] - 790], axis)
        assert not cut.any()
        together[key] = kept
    assert_like_one_process(together, alone)
    # The same in one process, with the padding in its weight.
    padded = shard_ranks.statistics(whole, vocab_size=790)
    assert torch.equal(padded["logprobs"], alone["logprobs"])
    assert torch.equal(padded["weight"][:790], alone["weight"]) and not padded["weight"][790:].any()


@pytest.mark.parametrize("world", [3, 4])  # with four, the last shard is padding only
def test_padding_of_logits_counts_for_nothing(world: int, ranks: Results) -> None:
    rows = (400,) * world
    alone = shard_ranks.from_logits(shard_ranks.make_logits(torch.bfloat16), "statistics")
    padded = shard_ranks.from_logits(shard_ranks.padded_logits(rows), "statistics", vocab_size=VOCAB)
    for result in (padded, joined(ranks, "padded logits", world)):
        kept, cut = result["logits"].split([VOCAB, sum(rows) - VOCAB], -1)
        assert not cut.any()
        assert_like_one_process(result | {"logits": kept}, alone)


@pytest.mark.parametrize("world", WORLDS)
def test_bytes_on_the_wire_do_not_depend_on_the_vocabulary(world: int, ranks: Results) -> None:
    header, numbers = ("all_gather", 96), 3 * 8
    hidden, lora_a = ("all_reduce", TOKENS * WIDTH * 4), ("all_reduce", WIDTH * 3 * 4)
    counted = int(shard_ranks.mask().sum())
    for results in ranks[:world]:
        for vocab in (40, VOCAB):
            statistics = results[f"traffic statistics, {vocab}, {world}"]
            assert statistics == [header, ("all_gather", TOKENS * numbers), hidden, lora_a]
            policy = results[f"traffic policy, {vocab}, {world}"]
            chunks = policy[1:-2]
            assert [policy[0], *policy[-2:]] == [header, hidden, lora_a]
            assert len(chunks) == -(-counted // 7) and {name for name, _ in chunks} == {"all_gather"}
            assert sum(size for _, size in chunks) == counted * numbers


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("kind", "numbers"), [("forward_kl", (5,)), ("jsd", (5, 2)), ("top-k", (3 + 2,))])
def test_bytes_of_distillation_do_not_depend_on_the_vocabulary(
    kind: str, numbers: tuple[int, ...], world: int, ranks: Results
) -> None:
    counted = int(shard_ranks.mask().sum())
    for results in ranks[:world]:
        for vocab in (40, VOCAB):
            *chunks, hidden = results[f"traffic {kind}, {vocab}, {world}"]
            for _ in range(1 if kind == "top-k" else 2):  # student and teacher
                assert chunks.pop(0) == ("all_gather", 96)
            assert hidden == ("all_reduce", TOKENS * WIDTH * 4) and {name for name, _ in chunks} == {"all_gather"}
            assert len(chunks) < counted
            assert sum(size for _, size in chunks) == counted * sum(numbers) * 8


DISAGREEMENTS = {
    "teacher": [("teacher_weight has a vocabulary of 1000 (of the ranks: (599, 401))", "")] * 2,
    "kind": [("the function is linear_distillation_loss with jsd, beta 0.5", "different on rank 1"),
             ("with reverse_kl, beta 0.5", "different on rank 0")],
    "top-k": [("and 3 tokens of the teacher", "different on rank 1"), ("and 4 tokens", "different on rank 0")],
    "tokens": [("the number of tokens is 24", "18 on rank 1"), ("the number of tokens is 18", "24 on rank 0")],
    "vocab_size": [("vocab_size is 990", "991 on rank 1"), ("vocab_size is 991", "990 on rank 0")],
    "vocab_size too large": [("vocab_size is 1001", "1000")] * 2,
    "temperature": [("temperature is 1.0", "different on rank 1"), ("temperature is 2.0", "different on rank 0")],
    "ids": [("the checksum of the token ids is", "on rank 1"), ("the checksum of the token ids is", "on rank 0")],
    "softcap": [("another option is", "different on rank 1"), ("another option is", "different on rank 0")],
    "refused": [("rank 1 of process_group raised an error", ""), ("softcap is -1.0", "expected")],
    "width": [("rank 1 of process_group raised an error", ""), ("expected the same H", "(400, 23)")],
    "id out of range": [("is 1000, expected an id in [0, 1000)", "")] * 2,
    "selected ids of hidden": [("the checksum of selected ids is", "on rank 1"),
                               ("the checksum of selected ids is", "on rank 0")],
    "selected ids of logits": [("the checksum of the token ids is", "on rank 1"),
                               ("the checksum of the token ids is", "on rank 0")],
    "fields of hidden": [("linear_token_statistics of ('lse',)", "different on rank 1"),
                         ("linear_token_statistics of ('lse', 'entropy')", "different on rank 0")],
    "fields of logits": [("another option is (('lse',)", "different on rank 1"),
                         ("another option is (('lse', 'entropy')", "different on rank 0")],
    "refused fields of hidden": [("rank 1 of process_group raised an error", ""), ("fields has 'loss'", "expected")],
    "refused fields of logits": [("rank 1 of process_group raised an error", ""), ("fields has 'loss'", "expected")],
    "support": [("rank 1 of process_group raised an error", ""), ("support was given with process_group", "expected")],
    "support of a cross-entropy": [("rank 1 of process_group raised an error", ""),
                                   ("support was given to cross_entropy with z_loss_coef", "expected None")],
    "depths of several targets": [("linear_multi_target of 2 depths", "different"), ("of 3 depths", "different")],
    **{f"{name} of {what}": value for what in ("hidden", "several targets") for name, value in {
        "smoothing": [("label_smoothing 0.0", "different on rank 1"), ("label_smoothing 0.1", "different on rank 0")],
        "z-loss": [("z_loss_coef 0.001", "different on rank 1"), ("z_loss_coef 0.002", "different on rank 0")],
        "normalizer": [("normalizer is 2.0", "different on rank 1"), ("normalizer is 3.0", "different on rank 0")],
        "tensor of normalizer": [("normalizer is 2.0", "different on rank 1"),
                                 ("normalizer is 3.0", "different on rank 0")],
    }.items()},
    **{f"{name} of {what}": [("rank 1 of process_group raised an error", ""), (message, "expected")]
       for what in ("hidden", "several targets", "logits")
       for name, message in (("refused smoothing", "label_smoothing is 3.0"),
                             ("refused normalizer", "normalizer is 0.0"))},
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_ranks_that_disagree_raise_on_both_sides(name: str, ranks: Results) -> None:
    for results, expected in zip(ranks, DISAGREEMENTS[name], strict=False):
        message = results[f"error {name}"]
        assert message.startswith("ValueError: ") and all(part in message for part in expected), message


def test_the_group_works_after_errors(ranks: Results) -> None:
    assert "works after errors" in ranks[0] and "works after errors" in ranks[1]


def test_no_tokens(ranks: Results) -> None:
    for rank, results in enumerate(ranks[:2]):
        together = results["no tokens"]
        assert together["logprobs"].shape == (0, LEAD[1]) and together["hidden"].shape == (0, LEAD[1], WIDTH)
        assert together["weight"].shape == (SPLITS[2][rank], WIDTH) and not together["weight"].any()


def test_devices_compare_their_arguments_without_the_host(ranks: Results) -> None:
    alone = shard_ranks.statistics(shard_ranks.make("plain"))
    for call in ("first", "second"):
        assert_like_one_process(joined(ranks, f"on a device {call}", 2), alone)
    for results in ranks[:2]:
        assert "RuntimeError: r1kernels: the ranks of process_group disagree" in results["error on a device"]


# ---- data parallelism -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", shard_ranks.OBJECTIVES)
def test_a_global_normalizer_gives_the_gradient_of_one_process(name: str, world: int, ranks: Results) -> None:
    objective = shard_ranks.OBJECTIVES[name]
    alone = shard_ranks.policy(shard_ranks.make("plain"), objective)  # of twice the loss
    for results in ranks[:world]:
        together = results[f"data parallel {name}, {world}"]
        assert_like_one_process(
            {"loss": together["loss"], "weight": together["weight"]},
            {"loss": alone["loss"], "weight": alone["weight"] / 2},
        )


# ---- without a process group ----------------------------------------------------------------------------------


@host_code
def test_merging_keeps_small_log_probs_and_entropies() -> None:
    """Two shards; the token's logit is 60 above all others."""
    z = torch.cat([torch.tensor([60.0]), torch.linspace(-1, 1, 9)]).double()
    powers = (z - 60).exp()
    surprise = powers * (61 - z)  # with its share of the first logit's
    others = z[4:].log_softmax(0)
    lse = torch.stack([z[:4].logsumexp(0), z[4:].logsumexp(0)])[:, None]
    logprob = torch.stack([-powers[1:4].sum(), others[0]])[:, None]
    entropy = torch.stack([surprise[1:4].sum(), -(others.exp() * others).sum()])[:, None]
    merged, _, merged_entropy = merge(logprob, lse, entropy, torch.tensor([0]))
    torch.testing.assert_close(merged[0], -powers[1:].sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(merged_entropy[0], surprise[1:].sum(), rtol=1e-12, atol=0)


@host_code
def test_ids_out_of_range_are_found_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "reads_are_free", lambda device: False)
    layout, ids = shards.Layout(None, 1, (4, 0, 3)), torch.tensor([0, 3, 4, 6, 99])
    mask = ids < 99
    shard = shards.Shard(layout._replace(rank=2), ids, mask)
    assert shard.owner.tolist()[:4] == [0, 0, 2, 2]
    assert shard.owned.tolist() == [False, False, True, True, False]
    assert shard.ids[2:4].tolist() == [0, 2] and (shard.ids >= 0).all() and (shard.ids < 3).all()
    with pytest.raises(RuntimeError, match="a token id is out of range"):
        shards.Shard(layout, ids, None)


@host_code
def test_padding_may_cover_whole_shards() -> None:
    assert layout_of((4, 4, 4), 10).sizes == (4, 4, 2)
    assert layout_of((4, 0, 4, 4), 3).sizes == (3, 0, 0, 0)
    assert layout_of((4, 3), None).sizes == (4, 3)


@checks_only
@pytest.mark.parametrize(("options", "error", "message"), [
    ({"process_group": "tp"}, TypeError, "process_group is 'tp', expected a torch.distributed.ProcessGroup"),
    ({"vocab_size": 0}, ValueError, "vocab_size is 0, expected a positive integer"),
    ({"vocab_size": True}, ValueError, "vocab_size is True, expected a positive integer"),
    ({"vocab_size": 38}, ValueError, "vocab_size is 38, expected at most the number of rows on all ranks, 37"),
    ({"vocab_size": 1}, ValueError, r"token_ids\[\d\] is \d+, expected an id in \[0, 1\)"),
])
def test_bad_keywords(options: dict[str, Any], error: type[Exception], message: str) -> None:
    case = cases.make("plain", 5)
    with pytest.raises(error, match=message):
        linear_token_logprobs(**case, **options)


@host_code
@pytest.mark.parametrize("kind", ["jsd", "top-k"])
def test_distillation_leaves_out_padding(kind: str) -> None:
    case = cases.make("plain", 5)
    logits = testing.random_logits(5, 37)
    logits[:, 30:] = torch.nan
    weight = torch.where(torch.arange(37)[:, None] < 30, case["weight"], torch.nan)
    if kind == "jsd":
        full, teacher = {"teacher_logits": logits.roll(1, 0)}, {"teacher_logits": logits[:, :30].roll(1, 0)}
        linear = {"teacher_hidden": case["hidden"].flip(0), "teacher_weight": weight}
        cut = linear | {"teacher_weight": weight[:30]}
    else:
        listed = {"teacher_token_ids": torch.tensor([[3, 9]] * 5), "teacher_logprobs": torch.tensor([[-1.0, -2.0]] * 5)}
        full = teacher = linear = cut = listed
    kind = "jsd" if kind == "jsd" else "forward_kl"
    for function, inputs, keywords, expected_inputs, expected_keywords in (
        (distillation_loss, (logits,), full, (logits[:, :30],), teacher),
        (linear_distillation_loss, (case["hidden"], weight), linear, (case["hidden"], weight[:30]), cut),
    ):
        leaf, expected_leaf = (value[-1].detach().clone().requires_grad_() for value in (inputs, expected_inputs))
        got = function(*inputs[:-1], leaf, **keywords, divergence=kind, vocab_size=30)
        expected = function(*expected_inputs[:-1], expected_leaf, **expected_keywords, divergence=kind)
        for result in (got, expected):
            result.loss.backward()
        where = leaf.grad[:, :30] if function is distillation_loss else leaf.grad[:30]
        for value, wanted in ((got.loss, expected.loss), (where, expected_leaf.grad)):
            assert error(value, wanted.detach().double()) <= 4 * testing.EPS32
        assert leaf.grad.count_nonzero() == where.count_nonzero()


@checks_only
def test_padding_and_accumulation_into_a_gradient() -> None:
    case = cases.make("bias", 5)
    case["token_ids"] = case["token_ids"] % 30
    weight = case["weight"].requires_grad_()
    into = torch.ones(weight.shape)
    logprobs, _ = linear_token_logprobs_and_entropy(**case, vocab_size=30, grad_accumulation_into=into)
    logprobs.sum().backward()
    assert weight.grad is None and (into[:30] != 1).any() and torch.equal(into[30:], torch.ones(7, 12))

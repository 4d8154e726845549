"""The parts of runs of several ranks: shares of the work, what ranks tell each other, and the sharded model."""

import copy

import parallel_ranks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from rl_cases import equal, make_model, make_tokenizer, policy_of, take_gradient
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, MixtralConfig

from r1kernels.train.errors import ConfigError, Interrupt, Interrupted
from r1kernels.train.model import head_of, hidden_states, round_parameters
from r1kernels.train.packing import micro_batches
from r1kernels.train.parallel import add_up, agree, check, everywhere, first, mesh, naming_missing_ranks, share, shared
from r1kernels.train.policy import check_tensor_axis, clip_gradient, make_optimizer

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))


# ---- shares ----


@given(st.lists(st.integers(1, 50), max_size=30), st.one_of(st.none(), st.integers(1, 120)), st.integers(1, 5))
def test_micro_batches_are_balanced_and_not_too_large(sizes, limit, ranks):
    found = micro_batches(sizes, limit, ranks)
    assert len(found) == ranks and len({len(parts) for parts in found}) == 1
    parts = [part for own in found for part in own]
    assert sorted(place for part in parts for place in part) == list(range(len(sizes)))
    totals = [sum(sizes[place] for place in part) for part in parts]
    assert limit is None or all(total <= limit or len(part) == 1 for total, part in zip(totals, parts, strict=True))
    assert max(totals) - min(totals) <= max(sizes, default=0)
    if limit is None:
        assert len(parts) == ranks
    assert micro_batches(sizes, limit, ranks) == found


def test_micro_batches_by_hand():
    assert micro_batches([5, 1, 4, 2], None, 1) == [[[0, 1, 2, 3]]]
    assert micro_batches([5, 1, 4, 2], 6, 1) == [[[0, 1], [2, 3]]]
    assert micro_batches([5, 1, 4, 2], 6, 2) == [[[0, 1]], [[2, 3]]]
    assert micro_batches([9, 9], 6, 1) == [[[0], [1]]]
    assert micro_batches([3], 6, 3) == [[[0]], [[]], [[]]]  # some ranks have nothing


@given(st.integers(0, 40), st.integers(1, 7))
def test_shares_are_parts_in_order_whose_sizes_differ_by_one(count, ranks):
    parts = [share(range(count), number, ranks) for number in range(ranks)]
    assert [row for part in parts for row in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# ---- messages ----


def test_one_rank_speaks_to_itself():
    error = KeyError("mine")

    def failing():
        raise error

    assert everywhere(lambda: 3) == [3] and first(lambda: 4) == 4 and share([1, 2]) == [1, 2]
    assert shared(lambda a, b: [x + y for x, y in zip(a, b, strict=True)], [1, 2], [3, 4]) == [4, 6]
    for call in (everywhere, first):
        with pytest.raises(KeyError) as found:
            call(failing)
        assert found.value is error
    agree("the colour", "red")
    one = mesh("cpu")
    assert one is mesh("cpu") and (one["data"].size(), one["tensor"].size()) == (1, 1)
    assert add_up(torch.ones(2), one["data"].get_group()).tolist() == [1, 1]
    with pytest.raises(ConfigError, match=r"'parallel.tensor' is 2.* ranks, 1"):
        mesh("cpu", 2)
    with pytest.raises(RuntimeError, match=r"^gloo: mine$"), naming_missing_ranks():
        raise RuntimeError("gloo: mine")


def test_a_signal_is_raised_by_the_next_check():
    interrupt = Interrupt()
    check(interrupt)
    interrupt.requested = "SIGTERM"
    with pytest.raises(Interrupted, match="SIGTERM"):
        check(interrupt)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_ranks(parallel_ranks, tmp_path_factory.mktemp("two"))


def test_two_ranks_know_what_both_say(two):
    for rank, found in enumerate(two):
        assert found["everywhere"] == [0, 10] and found["first"] == 7 and found["shared"] == [0, 10, 20, 30, 40]
        assert found["share"] == [[0, 1], [2, 3, 4]][rank] and found["sum"].tolist() == [3]
        assert found["agree"] == "no error" and found["stopped"] == "SIGTERM"
        assert found["disagree"] == "ConfigError: ranks disagree on the colour: rank 0 has 'red', rank 1 'blue'"
        assert found["tensor"].startswith("ConfigError: 'parallel.tensor' is 4") and "ranks, 2" in found["tensor"]


def test_what_one_rank_raises_both_raise(two):
    first_rank, second = two
    assert second["config"] == "ConfigError: no such file"
    assert first_rank["config"] == "ConfigError: rank 1: no such file"
    assert first_rank["training"] == "TrainingError: not finite" and second["training"].endswith("rank 0: not finite")
    assert first_rank["odd"].startswith("RuntimeError: Odd(") and "Odd" in second["odd"]
    assert first_rank["interrupt"] == second["interrupt"] == "Interrupted: SIGINT"


def test_the_first_rank_makes_the_model_and_others_receive_their_shards(two):
    expected = make_model(make_tokenizer(), seed=5)
    for rank, found in enumerate(each["given out"] for each in two):
        assert found["made"] == (rank == 0) and found["other"] == {"made by": 0}
        assert equal(found["weights"], dict(expected.named_parameters()))
        assert found["frozen"] == ["model.norm.weight"] and found["tied"]
        assert torch.equal(found["hidden"], hidden_states(expected, input_ids=torch.arange(3, 12)[None]))


def test_two_ranks_sum_their_gradients_and_clip_them_together(two):
    model = make_model(make_tokenizer())
    parts = []
    for start in (0, 10, 20):  # the second rank's other micro-batch is empty
        model.zero_grad()
        hidden_states(model, input_ids=torch.arange(3, 12)[None] + start).square().sum().backward()
        parts.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    whole, both = sum(parts), parts[0] + parts[1]
    for found in two:
        torch.testing.assert_close(found["gradient"], whole, rtol=1e-4, atol=1e-6 * whole.abs().max().item())
        assert found["norm"] == pytest.approx(both.norm().item(), rel=1e-5) and found["norm"] > 1
        torch.testing.assert_close(found["clipped"], both / both.norm(), rtol=1e-4, atol=1e-6)
    assert equal(two[0]["weights"], two[1]["weights"])
    moved = torch.cat([(two[0]["weights"][name] - weight).flatten() for name, weight in model.named_parameters()])
    torch.testing.assert_close(moved, -0.1 * both / both.norm(), rtol=1e-2, atol=1e-6)


# ---- the model on one rank ----


@pytest.fixture
def plain():
    return make_model(make_tokenizer(), num_hidden_layers=2)


def backward(model):
    """Of a loss that uses layers, embedding and head."""
    hidden = hidden_states(model, input_ids=IDS)
    (hidden @ head_of(model)["weight"].T).float().logsumexp(-1).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_gradient_is_that_of_the_plain_model(plain, dtype):
    policy, rounded = policy_of(copy.deepcopy(plain), dtype), round_parameters(copy.deepcopy(plain), dtype)
    policy(backward)
    backward(rounded)
    expected = torch.cat([weight.grad.float().flatten() for weight in rounded.parameters()])
    found = take_gradient(policy)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def test_inside_its_weights_are_plain_and_rounded_and_outside_sharded_and_exact(plain):
    before = {name: weight.clone() for name, weight in plain.named_parameters()}
    policy = policy_of(plain, torch.bfloat16)
    kinds = policy(lambda model: [(type(weight), weight.dtype) for weight in (head_of(model)["weight"],)])
    assert {dtype for _, dtype in kinds} == {torch.bfloat16} and not any(issubclass(kind, DTensor) for kind, _ in kinds)
    trained = policy.trained()
    assert all(isinstance(weight, DTensor) and weight.dtype is torch.float32 for weight in trained.values())
    assert equal({name.removeprefix("model."): weight.full_tensor() for name, weight in trained.items()}, before)
    assert equal(dict(policy.weights()), before)
    rounded = {name: weight.bfloat16() for name, weight in before.items()}
    assert equal(dict(policy.weights(torch.bfloat16)), rounded)


def test_what_transformers_keeps_in_float32_is_gathered_in_float32(plain):
    plain._keep_in_fp32_modules_strict = {"norm"}
    policy, found = policy_of(plain, torch.bfloat16), {}
    for name in ("model.norm", "model.layers.1.mlp.up_proj"):
        plain.get_submodule(name).register_forward_pre_hook(
            lambda module, given, name=name: found.update({name: module.weight.dtype}))
    policy(hidden_states, input_ids=IDS).sum().backward()
    assert found == {"model.norm": torch.float32, "model.layers.1.mlp.up_proj": torch.bfloat16}


def test_gradients_are_stored_once_after_the_last_micro_batch(plain):
    policy = policy_of(plain)
    for number in range(3):
        policy.sync_gradients(number == 2)
        policy(backward)
        stored = [weight.grad is not None for weight in policy.trained().values()]
        assert all(stored) if number == 2 else not any(stored)


@pytest.mark.parametrize("largest", [1e-3, 1e9])
def test_clipping_is_that_of_torch(plain, largest):
    policy = policy_of(copy.deepcopy(plain))
    policy(backward)
    backward(plain)
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), largest).item()
    assert clip_gradient(policy, largest) == pytest.approx(expected, rel=1e-5)
    gradient = torch.cat([weight.grad.flatten() for weight in plain.parameters()])
    torch.testing.assert_close(take_gradient(policy), gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item())


def test_a_reference_takes_over_the_weights_rounded(plain):
    policy = policy_of(plain)
    other = round_parameters(make_model(make_tokenizer(), 1, num_hidden_layers=2), torch.bfloat16)
    reference = policy_of(other.requires_grad_(False), torch.bfloat16)
    reference(hidden_states, input_ids=IDS)
    reference.refresh(policy)
    assert equal(dict(reference.weights(torch.bfloat16)), dict(policy.weights(torch.bfloat16)))
    rounded = round_parameters(make_model(make_tokenizer(), num_hidden_layers=2), torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(reference(hidden_states, input_ids=IDS), hidden_states(rounded, input_ids=IDS))


def test_an_update_is_seen_by_the_next_forward(plain):
    policy = policy_of(plain)
    optimizer = make_optimizer(policy, lr=0.1)
    with torch.no_grad():
        before = policy(hidden_states, input_ids=IDS)
    policy(backward)
    optimizer.step()
    policy.reshard_all()
    with torch.no_grad():
        assert not torch.allclose(before, policy(hidden_states, input_ids=IDS))


SHAPE = {"hidden_size": 16, "intermediate_size": 36, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize(("config", "size", "message"), [
    (LlamaConfig(**SHAPE), 3, "does not divide num_attention_heads, 4"),
    (LlamaConfig(**SHAPE, num_key_value_heads=1), 2, "does not divide num_key_value_heads, 1"),
    (LlamaConfig(**SHAPE | {"intermediate_size": 33}), 2, "does not divide intermediate_size, 33"),
    (MixtralConfig(**SHAPE, num_key_value_heads=4), 2, "'mixtral' models has the styles"),
])
def test_a_model_that_cannot_be_split_is_refused(config, size, message):
    check_tensor_axis(config, 1)
    with pytest.raises(ConfigError, match=rf"'parallel.tensor' is {size}.*{message}"):
        check_tensor_axis(config, size)

"""The arithmetic of a step: groups, importance weights, log-probs and the gradient of an update."""

import dataclasses
import math

import pytest
import torch
from rl_cases import make_model, make_tokenizer, policy_of, take_gradient
from transformers import AutoModelForCausalLM, MistralConfig

import r1kernels
from r1kernels.train.grpo import choose_groups
from r1kernels.train.model import enable_checkpointing
from r1kernels.train.recipe import GRPO, Importance
from r1kernels.train.rng import permutation
from r1kernels.train.rollout import Sampling, TransformersSampler
from r1kernels.train.update import (
    Rollout,
    choose_route,
    completion_hidden_states,
    completion_logprobs,
    importance_weights,
    minibatch_gradient,
)

NAN = float("nan")
PROMPTS = ["Compute 3+4", "Compute 1+2+3+4+5+6", "Compute 9+9+9"] * 4
ROWS = torch.arange(len(PROMPTS))
ROUTES = ("padded", "packed", "shared")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer, hidden_size=32, num_hidden_layers=2)


@pytest.fixture(scope="module")
def policy(tokenizer):
    return policy_of(make_model(tokenizer, hidden_size=32, num_hidden_layers=2))


@pytest.fixture
def rollout(model, tokenizer):
    done = TransformersSampler(model, tokenizer).sample(PROMPTS, Sampling(0.7, 12, batch_size=5))
    zeros = torch.zeros_like(done.logprobs)
    return Rollout(
        done.prompt_ids, done.prompt_mask, done.token_ids, done.mask, advantages=torch.linspace(-1, 1, len(PROMPTS)),
        old_logprobs=zeros, ref_logprobs=zeros, importance_weights=None)


def logprobs(policy, rollout, batches, route="padded"):
    return completion_logprobs(policy, rollout, list(batches), 0.7, route)


def gradient(policy, rollout, objective, batches=None, route="padded"):
    batches = list(ROWS.split(5) if batches is None else batches)
    metrics = minibatch_gradient(policy, rollout, torch.cat(batches), batches, objective, 0.7, route)
    return take_gradient(policy), metrics


def by_place(hidden, mask):
    """The hidden states (N, H) of tokens, as (B, T, H)."""
    spread = hidden.new_zeros(*mask.shape, hidden.shape[-1])
    spread[mask] = hidden
    return spread


# ---- log-probs and gradients ----


def exact_logprobs(model, rollout):
    """Log-probs (N,) over the sets of a rollout in float64, from the logits of each whole text."""
    found = []
    for row in range(len(rollout.mask)):
        prompt, tokens = rollout.prompt_ids[row][rollout.prompt_mask[row]], rollout.token_ids[row][rollout.mask[row]]
        logits = model(input_ids=torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1].double() / 0.7
        ids, counts = rollout.supports[row] if rollout.supports else (
            torch.arange(logits.shape[-1]).repeat(len(tokens)), torch.full((len(tokens),), logits.shape[-1]))
        for line, kept, token in zip(logits, ids.long().split(counts.tolist()), tokens, strict=True):
            found.append(line[token] - line[kept].logsumexp(-1))
    return torch.stack(found)


@pytest.mark.few(3)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("sampling", [
    Sampling(0.7, 12, 0.8, 5, replay=True), Sampling(0.7, 12, top_k=6, min_p=0.05, replay=True)],
    ids=["top_p", "top_k"])
def test_with_replay_the_policy_is_scored_over_what_sampling_kept(model, policy, tokenizer, sampling, route):
    """Against float64. The first ratio is 1: to the log-probs of the trainer exactly, to the sampler's up to rounding.
    Without replay they differ by the probability of what was left out."""
    done = TransformersSampler(model, tokenizer).sample(PROMPTS, sampling)
    batches, double = list(ROWS.split(5)), make_model(tokenizer, hidden_size=32, num_hidden_layers=2).double()
    old = logprobs(policy, done, batches, route)
    with torch.no_grad():
        torch.testing.assert_close(old[done.mask].double(), exact_logprobs(double, done), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(old, done.logprobs, rtol=1e-4, atol=1e-4)
    whole = logprobs(policy, dataclasses.replace(done, supports=None), batches, route)
    assert (done.logprobs - whole)[done.mask].mean() > 0.05
    rollout = Rollout(
        done.prompt_ids, done.prompt_mask, done.token_ids, done.mask, advantages=torch.linspace(-1, 1, len(PROMPTS)),
        old_logprobs=old, ref_logprobs=old, importance_weights=None, supports=done.supports)
    found, metrics = gradient(policy, rollout, r1kernels.objectives.grpo(kl_coef=0.1), batches, route)
    assert metrics["ratio_deviation"] == 0 and metrics["kl"] == 0
    # At ratio 1 and KL 0 the gradient is that of -advantage x log-prob, averaged over each sequence.
    weights = (rollout.advantages[:, None] / done.lengths[:, None] / len(PROMPTS) * done.mask)[done.mask]
    (-(weights * exact_logprobs(double, done)).sum()).backward()
    expected = torch.cat([weight.grad.flatten() for weight in double.parameters()]).float()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(("preset", "options"), [
    ("grpo", {}), ("bnpo", {}), ("dr_grpo", {"max_length": 12})], ids=["sequence_mean", "token_mean", "constant"])
def test_the_gradient_and_metrics_of_a_minibatch_are_those_of_the_formulas(rollout, policy, tokenizer, preset, options):
    """In float64. The minibatch is a part of the rollout, in micro-batches of different sizes; no inputs are equal."""
    double, batches = make_model(tokenizer, hidden_size=32, num_hidden_layers=2).double(), list(ROWS[1:6].split(4))
    some = rollout.rows(torch.cat(batches))
    own, generator = exact_logprobs(double, some), torch.Generator().manual_seed(0)
    old, ref, weights = own.detach() + 0.05, own.detach().clone(), torch.rand(own.shape, generator=generator)
    old[::3] += 0.4  # a ratio below the lower bound is farther from 1 than all others
    ref -= 0.5 * torch.rand(own.shape, generator=generator)

    def placed(values):
        place = torch.zeros(rollout.mask.shape, dtype=torch.bool)
        place[torch.cat(batches), : some.mask.shape[1]] = some.mask
        return torch.full(rollout.mask.shape, NAN).masked_scatter(place, values.float())

    given = dataclasses.replace(rollout, old_logprobs=placed(old), ref_logprobs=placed(ref),
                                importance_weights=placed(weights))
    objective = getattr(r1kernels.objectives, preset)(kl_coef=0.3, **options)
    found, metrics = gradient(policy, given, objective, batches)
    lengths = some.mask.sum(-1)
    advantages = some.advantages.double().repeat_interleave(lengths)
    ratio, kl = (own - old).exp(), (ref - own).exp() - (ref - own) - 1
    per_token = -weights * torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) + 0.3 * kl
    share = {"grpo": 1 / lengths.repeat_interleave(lengths) / len(lengths), "bnpo": 1 / len(own),
             "dr_grpo": 1 / len(lengths) / 12}[preset]
    loss = (per_token * share).sum()
    loss.backward()
    expected = torch.cat([weight.grad.flatten() for weight in double.parameters()]).float()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["kl"] == pytest.approx(kl.mean().item(), rel=1e-3)
    assert metrics["ratio_deviation"] == pytest.approx((ratio - 1).abs().max().item(), rel=1e-4)
    assert ratio.max() - 1 < (1 - ratio).max()


@pytest.mark.parametrize("route", ROUTES)
def test_rows_drop_only_padding(rollout, model, route):
    rows = torch.tensor([0, 3])
    part = rollout.rows(rows)
    assert part.prompt_ids.shape[1] < rollout.prompt_ids.shape[1]
    whole = by_place(completion_hidden_states(model, rollout), rollout.mask)[rows, : part.mask.shape[1]][part.mask]
    torch.testing.assert_close(completion_hidden_states(model, part, route), whole, rtol=1e-4, atol=1e-5)


def test_rows_take_what_belongs_to_them(rollout):
    tokens = torch.rand(rollout.mask.shape)
    given = dataclasses.replace(rollout, advantages=tokens, importance_weights=rollout.advantages)
    part = given.rows(torch.tensor([7, 2]))
    assert torch.equal(part.advantages, tokens[[7, 2], : part.token_ids.shape[1]])
    assert torch.equal(part.importance_weights, rollout.advantages[[7, 2]])
    assert rollout.rows(torch.tensor([7, 2])).importance_weights is None


@pytest.mark.few(2)
@pytest.mark.parametrize("preset", ["r1", "dapo", "dr_grpo"])
def test_neither_micro_batches_nor_routes_change_a_gradient(rollout, policy, preset):
    objective = getattr(r1kernels.objectives, preset)(**({"max_length": 12} if preset == "dr_grpo" else {}))
    rows, found = torch.tensor(permutation(len(PROMPTS), 0)), []
    for size, route in ((12, "padded"), (5, "padded"), (1, "padded"), (12, "packed"), (5, "packed"), (12, "shared"),
                        (5, "shared")):
        old = logprobs(policy, rollout, rows.split(size), route)
        shifted = dataclasses.replace(rollout, old_logprobs=old - 0.1, ref_logprobs=old + 0.2)
        found.append(gradient(policy, shifted, objective, rows.split(size), route))
    assert found[0][0].norm() > 0
    for other, metrics in found[1:]:
        torch.testing.assert_close(other, found[0][0], rtol=1e-3, atol=1e-6)
        assert metrics == pytest.approx(found[0][1], rel=1e-3, abs=1e-6)


def test_an_empty_micro_batch_adds_nothing(rollout, policy):
    """A rank has one if there are fewer samples than ranks."""
    nothing, objective = torch.tensor([], dtype=torch.long), r1kernels.objectives.grpo()
    expected, metrics = gradient(policy, rollout, objective, ROWS.split(6))
    found = gradient(policy, rollout, objective, [*ROWS.split(6), nothing])
    assert torch.equal(found[0], expected) and found[1] == metrics
    old = logprobs(policy, rollout, ROWS.split(6))
    assert torch.equal(logprobs(policy, rollout, [nothing, *ROWS.split(6)]), old)


def test_advantages_and_weights_may_be_of_sequences_or_tokens(rollout, policy):
    old = logprobs(policy, rollout, ROWS.split(5))
    fresh, objective = dataclasses.replace(rollout, old_logprobs=old - 0.1), r1kernels.objectives.grpo()
    plain, metrics = gradient(policy, fresh, objective)
    weights = torch.linspace(0, 2, len(PROMPTS))
    spread = weights[:, None].expand(rollout.mask.shape).masked_fill(~rollout.mask, math.nan)
    same = dataclasses.replace(fresh, importance_weights=torch.ones_like(weights))
    assert torch.equal(gradient(policy, same, objective)[0], plain)
    weighted = [
        dataclasses.replace(fresh, importance_weights=weights),
        dataclasses.replace(fresh, importance_weights=spread),
        dataclasses.replace(fresh, advantages=rollout.advantages * weights),
        dataclasses.replace(fresh, advantages=rollout.advantages[:, None] * spread),
    ]
    found = [gradient(policy, given, objective) for given in weighted]
    for other, _ in found:
        torch.testing.assert_close(other, found[0][0], rtol=1e-4, atol=1e-7)
    assert not torch.allclose(plain, found[0][0], rtol=1e-2)
    assert found[0][1]["ratio_deviation"] == metrics["ratio_deviation"]


@pytest.mark.few(3)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("preset", ["grpo", "r1"])
def test_the_first_ratio_is_exactly_one_and_every_token_is_measured(rollout, policy, preset, route):
    """Tokens of advantage 0 have no gradient, but metrics speak of them too."""
    old = logprobs(policy, rollout, ROWS.split(5), route)
    some = torch.where(ROWS % 3 == 0, rollout.advantages, 0)
    found = []
    for advantages in (rollout.advantages, some):
        fresh = dataclasses.replace(rollout, old_logprobs=old, ref_logprobs=old, advantages=advantages)
        found.append(gradient(policy, fresh, getattr(r1kernels.objectives, preset)(), route=route)[1])
    assert [metrics["ratio_deviation"] for metrics in found] == [0.0, 0.0]
    assert found[0]["entropy"] == found[1]["entropy"] > 0
    assert found[1]["active_fraction"] < found[0]["active_fraction"]


def test_the_gradient_is_that_of_the_models_own_logits(rollout, policy, model):
    """Through the logits that transformers makes, and losses written by hand: the tied embedding included."""
    old = logprobs(policy, rollout, ROWS.split(5))
    shifted = dataclasses.replace(rollout, old_logprobs=old - 0.1)
    ours, _ = gradient(policy, shifted, r1kernels.objectives.grpo())
    model.zero_grad()
    ids = torch.cat([rollout.prompt_ids, rollout.token_ids], dim=1)
    attention = torch.cat([rollout.prompt_mask, rollout.mask], dim=1).long()
    logits = model(
        input_ids=ids, attention_mask=attention, position_ids=(attention.cumsum(-1) - 1).clamp(min=0)
    ).logits[:, rollout.prompt_ids.shape[1] - 1 : -1]
    own = (logits / 0.7).log_softmax(-1).gather(-1, rollout.token_ids[..., None])[..., 0]
    torch.testing.assert_close(own[rollout.mask], old[rollout.mask], rtol=1e-4, atol=1e-5)
    ratio, advantages = (own - shifted.old_logprobs).exp(), rollout.advantages[:, None]
    per_token = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) * rollout.mask
    (per_token.sum(-1) / rollout.mask.sum(-1)).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("size", [12, 6])
def test_a_prompt_is_read_once_and_gets_the_gradient_of_all_its_completions(rollout, policy, monkeypatch, size):
    old, read, body = logprobs(policy, rollout, ROWS.split(size)), [], policy.model.model
    shifted, forward = dataclasses.replace(rollout, old_logprobs=old - 0.1), body.forward
    whole, expected = gradient(policy, shifted, r1kernels.objectives.grpo(), ROWS.split(size))
    monkeypatch.setattr(body, "forward", lambda **inputs: read.append(inputs["input_ids"].shape) or forward(**inputs))
    shared, metrics = gradient(policy, shifted, r1kernels.objectives.grpo(), ROWS.split(size), "shared")
    assert len(read) == 2 * len(ROWS.split(size)) and max(shape[0] for shape in read[::2]) == 3
    torch.testing.assert_close(shared, whole, rtol=1e-3, atol=1e-6)
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_packed_rows_have_no_more_padding_than_they_need(rollout, model, monkeypatch):
    read, forward = [], model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda **inputs: read.append(inputs["input_ids"]) or forward(**inputs))
    completion_hidden_states(model, rollout, "packed")
    [ids] = read
    sizes = rollout.prompt_mask.sum(-1) + rollout.mask.sum(-1)
    assert ids.shape[1] == sizes.max() and sizes.sum() <= ids.numel() < sizes.sum() + ids.shape[1] * len(ids) / 2
    assert len(ids) < len(PROMPTS)


@pytest.mark.parametrize("route", ROUTES)
def test_one_token_needs_the_prompt_alone(rollout, model, route):
    first = dataclasses.replace(rollout, token_ids=rollout.token_ids[:, :1], mask=rollout.mask[:, :1])
    whole = by_place(completion_hidden_states(model, rollout), rollout.mask)[:, 0]
    torch.testing.assert_close(completion_hidden_states(model, first, route), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [4, None], ids=["forgets", "keeps no cache"])
def test_prompts_are_shared_only_by_layers_that_keep_all_tokens(rollout, tokenizer, window, monkeypatch):
    config = MistralConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                           num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, sliding_window=window)
    model = AutoModelForCausalLM.from_config(config).eval()
    if window is None:
        forward = model.model.forward
        monkeypatch.setattr(model.model, "forward", lambda past_key_values=None, **inputs: forward(**inputs))
    found = completion_hidden_states(model, rollout, "shared")
    assert torch.equal(found, completion_hidden_states(model, rollout, "padded"))


def test_the_route_with_the_fewest_tokens_is_chosen(rollout, policy):
    """Three prompts of 11 to 19 tokens have four completions each, of at most 12 tokens."""
    assert choose_route(policy, rollout, apart=True) == choose_route(policy, rollout, apart=False) == "shared"
    alone = rollout.rows(torch.tensor([0, 1]))  # nothing to share
    assert choose_route(policy, alone, apart=True) == "packed" and choose_route(policy, alone, apart=False) == "padded"


def test_layers_are_checkpointed_or_read_a_cache(rollout, tokenizer):
    model = make_model(tokenizer)
    enable_checkpointing(model)
    assert choose_route(policy_of(model), rollout, apart=False) == "padded"


def test_an_objective_may_be_a_function(rollout, policy):
    """-A log pi, as REINFORCE has it."""
    own = lambda logprobs, batch: -logprobs * batch.advantages  # noqa: E731
    objective = r1kernels.Objective(surrogate=own, aggregate="token_mean")
    expected, _ = gradient(policy, rollout, r1kernels.objectives.reinforce())
    found, _ = gradient(policy, rollout, objective)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_no_logits_of_a_batch_are_made(rollout, policy, monkeypatch):
    def refused(*arguments, **keywords):
        raise AssertionError("logits")

    monkeypatch.setattr(policy.model.lm_head, "forward", refused)
    for name in ("grpo_loss", "token_logprobs", "token_logprobs_and_entropy"):
        monkeypatch.setattr(r1kernels, name, refused)
    logprobs(policy, rollout, ROWS.split(5))
    gradient(policy, rollout, r1kernels.objectives.grpo())


def test_a_minibatch_reads_its_metrics_at_once(rollout, policy, monkeypatch):
    reads = []

    def counted(name):
        real = getattr(torch.Tensor, name)
        return lambda tensor: (tensor.is_floating_point() and reads.append(name)) or real(tensor)

    for name in ("item", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    _, metrics = gradient(policy, rollout, r1kernels.objectives.grpo())
    assert reads == ["tolist"] and all(isinstance(value, float) for value in metrics.values())


# ---- groups ----


def groups_of_4(count=2, **settings):
    return GRPO(name="rl", kind="grpo", model="base", problems=["sums"], questions=count, group_size=4, **settings)


def test_groups_that_differ_come_first():
    rewards = torch.tensor([1.0, 1, 1, 1, 0, 1, NAN, 0, 0, 0, 0, 0, 1, 0, 0, 0])
    rows, shares = choose_groups(rewards, groups_of_4(2))
    assert rows.tolist() == [4, 5, 6, 7, 12, 13, 14, 15] and shares["zero_spread"] == 0.5
    rows, _ = choose_groups(rewards, groups_of_4(3))  # filled up in order
    assert rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15]


def test_rewards_that_are_missing_make_no_difference():
    rewards = torch.tensor([NAN, 2, 2, NAN, NAN, NAN, NAN, NAN, 1, 0, NAN, 0.5, 1, 0, NAN, 0])
    rows, shares = choose_groups(rewards, groups_of_4(2))
    assert rows.tolist() == [8, 9, 10, 11, 12, 13, 14, 15] and shares["zero_spread"] == 0.5


# ---- importance weights ----

SETTINGS = [
    Importance(mode="mask", level="token", cap=1.5, floor=0.5),
    Importance(mode="truncate", level="sequence", cap=1.5, floor=0.5, normalize=True),
    Importance(mode="truncate", level="sequence_mean", cap=1.1),
]


def policies():
    torch.manual_seed(0)
    sampled = -torch.rand(6, 9) * 4
    return sampled, sampled + 0.3 * torch.randn(6, 9), torch.arange(9) < torch.arange(3, 9)[:, None]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_importance_weights_follow_the_settings(settings):
    sampled, trained, mask = policies()
    weights, metrics = importance_weights(sampled, trained, mask, settings)
    expected = r1kernels.importance_weights(
        trained, sampled, mask, level=settings.level, mode=settings.mode, floor=settings.floor, cap=settings.cap,
        normalize=settings.normalize)
    assert torch.equal(weights, expected.weights) and metrics == expected.metrics
    assert weights.shape == (sampled.shape if settings.level == "token" else sampled.shape[:1])
    assert weights.std() > 0 and 0 < metrics["importance_cut"] < 1
    assert all(type(value) is float for value in metrics.values())


def test_none_measures_and_weighs_nothing():
    sampled, trained, mask = policies()
    weights, metrics = importance_weights(sampled, trained, mask, Importance(cap=1.0, floor=1.0, normalize=True))
    assert weights is None
    assert metrics["importance_cut"] == 0 and 0 < metrics["importance_ess"] < 1 and metrics["rollout_kl_k3"] > 0

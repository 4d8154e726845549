"""Rollouts: what was sampled, with which probability, and the gradient of an update on it."""

import dataclasses
import math

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig
from transformers.generation import TopPLogitsWarper

import r1kernels
from r1kernels.train.config import EvalConfig
from r1kernels.train.data import Problem
from r1kernels.train.evaluate import PARTS, evaluate
from r1kernels.train.interrupt import Interrupted
from r1kernels.train.prompt import Template
from r1kernels.train.rng import permutation, torch_seeded
from r1kernels.train.rewards import Scorer, Scores
from r1kernels.train.rollout import Sampling, TransformersSampler, draw
from r1kernels.train.schema import ConfigError
from r1kernels.train.tiny import CorpusConfig, TinyConfig, make_model, make_tokenizer
from r1kernels.train.update import Rollout, completion_hidden_states, minibatch_gradient, rollout_logprobs

PROMPTS = ["Compute 3+4", "Compute 1+2+3+4+5+6", "Compute 9+9+9"] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(CorpusConfig(), 6, seed=0)


@pytest.fixture(scope="module")
def model(tokenizer):
    model = make_model(TinyConfig(hidden_size=32, intermediate_size=32, layers=2, heads=2), tokenizer, seed=0).eval()
    with torch.no_grad():  # so that some completions end and some do not
        model.model.embed_tokens.weight[tokenizer.eos_token_id] *= 4
    return model


@pytest.fixture(scope="module")
def completions(model, tokenizer):
    with torch_seeded(0, "test"):
        return TransformersSampler(model, tokenizer).sample(PROMPTS, Sampling(0.7, 12, batch_size=5))


@pytest.fixture
def rollout(completions):
    zeros = torch.zeros_like(completions.logprobs)
    advantages = torch.linspace(-1, 1, len(PROMPTS))
    of_completions = {name: getattr(completions, name) for name in ("prompt_ids", "prompt_mask", "token_ids", "mask")}
    return Rollout(**of_completions, advantages=advantages, old_logprobs=zeros, ref_logprobs=zeros)


def test_completions_end_where_they_say(completions, tokenizer):
    assert completions.finished.any() and not completions.finished.all()
    for row, text in enumerate(completions.texts):
        ids = completions.token_ids[row][completions.mask[row]].tolist()
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert (tokenizer.eos_token_id in ids) == bool(completions.finished[row])
        assert tokenizer.eos_token_id not in ids[:-1]
        assert len(ids) == completions.lengths[row] and (completions.finished[row] or len(ids) == 12)


def test_sampled_logprobs_are_those_of_a_plain_forward(completions, model):
    for row in range(len(PROMPTS)):
        prompt = completions.prompt_ids[row][completions.prompt_mask[row]]
        tokens = completions.token_ids[row][completions.mask[row]]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        torch.testing.assert_close(completions.logprobs[row][completions.mask[row]], expected, rtol=1e-4, atol=1e-4)


def test_sampling_follows_the_seed_and_leaves_the_generator_alone(model, tokenizer):
    sampler, before = TransformersSampler(model, tokenizer), torch.get_rng_state()
    texts = []
    for seed in (0, 0, 1):
        with torch_seeded(seed, "here"):
            texts.append(sampler.sample(PROMPTS, Sampling(1.0, 8)).texts)
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(before, torch.get_rng_state())


def test_generation_defaults_of_the_model_do_not_shape_rollouts(model, tokenizer):
    with torch_seeded(0, "here"):
        plain = TransformersSampler(model, tokenizer).sample(PROMPTS, Sampling(1.0, 8)).texts
    model.generation_config.update(top_k=1, repetition_penalty=5.0, do_sample=False)
    with torch_seeded(0, "here"):
        assert TransformersSampler(model, tokenizer).sample(PROMPTS, Sampling(1.0, 8)).texts == plain


def test_a_rollout_can_be_stopped_between_tokens(model, tokenizer):
    checks = []

    def check():
        checks.append(0)
        if len(checks) == 3:
            raise Interrupted("SIGINT")

    with pytest.raises(Interrupted):
        TransformersSampler(model, tokenizer, check).sample(PROMPTS, Sampling(1.0, 8))
    assert len(checks) == 3


def tiny(family, tokenizer, **options):
    config = CONFIG_MAPPING[family](
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True, initializer_range=0.2, **options,
    )
    with torch_seeded(0, family):
        model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = list(range(tokenizer.eos_token_id, len(tokenizer), 8))
    return model


FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "conv_L_cache": 3},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_have_ended_leave_every_kind_of_cache(tokenizer, family):
    """Against `generate`, which keeps all rows to the end: the same tokens where the likeliest ones are drawn."""
    model = tiny(family, tokenizer, **FAMILIES[family])
    sampler, reports = TransformersSampler(model, tokenizer), []
    with torch_seeded(0, "leave"):
        sampled = sampler.sample(PROMPTS, Sampling(1.0, 16), lambda *report: reports.append(report))
    lengths = sampled.lengths
    assert len(reports) > 2
    for row in range(len(PROMPTS)):
        prompt, tokens = sampled.prompt_ids[row][sampled.prompt_mask[row]], sampled.token_ids[row, : lengths[row]]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, tokens])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        torch.testing.assert_close(sampled.logprobs[row, : lengths[row]], expected, rtol=1e-4, atol=1e-4)
    greedy = sampler.sample(PROMPTS, Sampling(1e-6, 16))
    oracle = model.generate(
        input_ids=greedy.prompt_ids, attention_mask=greedy.prompt_mask.long(),
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=16, eos_token_id=model.generation_config.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
    )[:, greedy.prompt_ids.shape[1] :]
    assert greedy.lengths.min() < greedy.lengths.max() and torch.equal(greedy.token_ids, oracle)


def test_a_row_depends_on_its_own_prompt_and_place_alone(tokenizer):
    model = tiny("llama", tokenizer)
    other = [prompt if row % 2 else "Compute 1+1" for row, prompt in enumerate(PROMPTS)]
    sampled = []
    for prompts in (PROMPTS, other):
        with torch_seeded(0, "place"):
            sampled.append(TransformersSampler(model, tokenizer).sample(prompts, Sampling(1.0, 16)).texts)
    assert sampled[0][1::2] == sampled[1][1::2] and sampled[0][::2] != sampled[1][::2]


def test_rows_are_reported_once_and_before_the_last_has_ended(tokenizer):
    reports, steps = [], []
    sampler = TransformersSampler(tiny("llama", tokenizer), tokenizer, lambda: steps.append(0))
    with torch_seeded(0, "report"):
        done = sampler.sample(PROMPTS, Sampling(1.0, 16), lambda *report: reports.append((len(steps), *report)))
    assert sorted(row for _, rows, *_ in reports for row in rows) == list(range(len(PROMPTS)))
    assert reports[0][0] < reports[-1][0] == len(steps)
    for _, rows, texts, lengths in reports:
        assert texts == [done.texts[row] for row in rows]
        assert lengths == done.lengths[rows].tolist()


def test_draws_follow_the_distribution():
    """On a grid of uniform numbers, every token comes as often as its probability says, to one draw."""
    logprobs = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).mul(3).log_softmax(-1)
    count = 20_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    for top_p in (1.0, 0.7, 1e-9):
        kept = TopPLogitsWarper(top_p)(None, logprobs) if top_p < 1 else logprobs
        drawn = draw(logprobs.expand(count, -1), uniform, top_p)
        expected = kept.double().softmax(-1)[0] * count
        assert (drawn.bincount(minlength=50) - expected).abs().max() <= 1 + 1e-3
    assert draw(logprobs, torch.zeros(1, dtype=torch.float64), 1.0).item() == 0
    certain = torch.tensor([[-math.inf, 0.0, -math.inf]])
    for value in (0.0, 1 - 2**-53):
        assert draw(certain, torch.tensor([value], dtype=torch.float64), 1.0).item() == 1


def test_a_model_without_numbers_or_cache_is_refused(tokenizer):
    model = tiny("llama", tokenizer)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(FloatingPointError, match="LlamaForCausalLM gives log-probs that are not finite"):
        TransformersSampler(model, tokenizer).sample(PROMPTS, Sampling(1.0, 4))
    forward = model.forward
    model.forward = lambda **inputs: dataclasses.replace(forward(**inputs), past_key_values=None)
    with pytest.raises(ConfigError, match="LlamaForCausalLM keeps no key-value cache"):
        TransformersSampler(model, tokenizer).sample(PROMPTS, Sampling(1.0, 4))


def test_rows_drop_only_padding(rollout, model):
    rows = torch.tensor([0, 3])
    part = rollout.rows(rows)
    assert part.prompt_ids.shape[1] < rollout.prompt_ids.shape[1]
    whole, cut = completion_hidden_states(model, rollout)[rows], completion_hidden_states(model, part)
    mask = part.mask
    torch.testing.assert_close(whole[:, : mask.shape[1]][mask], cut[mask], rtol=1e-4, atol=1e-5)


def test_a_micro_batch_of_empty_completions_gives_nothing(rollout, model):
    """It keeps a column, behind the mask: as many hidden states as tokens, no log-prob and no gradient."""
    mask = rollout.mask.clone()
    mask[4:8] = False
    empty = dataclasses.replace(rollout, mask=mask)
    part = empty.rows(torch.arange(4, 8))
    assert part.token_ids.shape == part.mask.shape == part.old_logprobs.shape == (4, 1) and not part.mask.any()
    assert completion_hidden_states(model, part).shape[:2] == (4, 1)
    batches = torch.arange(len(PROMPTS)).split(4)
    old = rollout_logprobs(model, empty, batches, temperature=0.7, check=lambda: None)
    assert not old[4:8].any() and old[:4].any()
    gradients, metrics = [], []
    for size in (4, len(PROMPTS)):
        model.zero_grad()
        metrics.append(minibatch_gradient(
            model, dataclasses.replace(empty, old_logprobs=old - 0.1), torch.arange(len(PROMPTS)).split(size),
            r1kernels.objectives.dapo(), temperature=0.7, check=lambda: None,
        ))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("preset", ["r1", "dapo", "dr_grpo"])
def test_micro_batches_change_no_gradient(rollout, model, preset):
    options = {"max_length": 12} if preset == "dr_grpo" else {}
    objective = getattr(r1kernels.objectives, preset)(**options)
    rows = torch.tensor(permutation(len(PROMPTS), 0))
    gradients, metrics = [], []
    for size in (12, 5, 1):
        batches = rows.split(size)
        old = rollout_logprobs(model, rollout, batches, temperature=0.7, check=lambda: None)
        shifted = dataclasses.replace(rollout, old_logprobs=old - 0.1, ref_logprobs=old + 0.2)
        model.zero_grad()
        metrics.append(
            minibatch_gradient(model, shifted, batches, objective, temperature=0.7, check=lambda: None)
        )
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[0].norm() > 0
    for gradient, metric in zip(gradients[1:], metrics[1:], strict=True):
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-3, atol=1e-6)
        assert metric == pytest.approx(metrics[0], rel=1e-3, abs=1e-6)


def test_the_first_ratio_is_exactly_one(rollout, model):
    batches = torch.tensor(permutation(len(PROMPTS), 0)).split(5)
    old = rollout_logprobs(model, rollout, batches, temperature=0.7, check=lambda: None)
    fresh = dataclasses.replace(rollout, old_logprobs=old)
    metrics = minibatch_gradient(
        model, fresh, batches, r1kernels.objectives.grpo(), temperature=0.7, check=lambda: None
    )
    assert metrics["ratio_deviation"] == 0.0


def gradient(model, rollout, objective, size=5):
    model.zero_grad()
    batches = torch.tensor(permutation(len(PROMPTS), 0)).split(size)
    metrics = minibatch_gradient(model, rollout, batches, objective, temperature=0.7, check=lambda: None)
    return torch.cat([p.grad.flatten() for p in model.parameters()]), metrics


def test_advantages_and_weights_may_be_of_sequences_or_tokens(rollout, model):
    rows = torch.arange(len(PROMPTS)).split(5)
    old = rollout_logprobs(model, rollout, rows, temperature=0.7, check=lambda: None)
    fresh, objective = dataclasses.replace(rollout, old_logprobs=old - 0.1), r1kernels.objectives.grpo()
    plain, metrics = gradient(model, fresh, objective)
    weights = torch.linspace(0, 2, len(PROMPTS))
    spread = weights[:, None].expand(rollout.mask.shape).masked_fill(~rollout.mask, math.nan)
    same = dataclasses.replace(fresh, importance_weights=torch.ones_like(weights))
    assert torch.equal(gradient(model, same, objective)[0], plain)
    weighted = [
        dataclasses.replace(fresh, importance_weights=weights),
        dataclasses.replace(fresh, importance_weights=spread),
        dataclasses.replace(fresh, advantages=rollout.advantages * weights),
        dataclasses.replace(fresh, advantages=rollout.advantages[:, None] * spread),
    ]
    gradients = [gradient(model, given, objective) for given in weighted]
    for found, _ in gradients:
        torch.testing.assert_close(found, gradients[0][0], rtol=1e-4, atol=1e-7)
    assert not torch.allclose(plain, gradients[0][0], rtol=1e-2)
    # Without advantages of their own, tokens of weight 0 still count in the means and in the ratio.
    assert gradients[0][1]["ratio_deviation"] == metrics["ratio_deviation"]
    for given in weighted:
        torch.testing.assert_close(gradient(model, given, objective, size=1)[0], gradients[0][0], rtol=1e-3, atol=1e-6)


def test_rows_take_what_belongs_to_them(rollout):
    tokens = torch.rand(rollout.mask.shape)
    given = dataclasses.replace(rollout, advantages=tokens, importance_weights=rollout.advantages)
    part = given.rows(torch.tensor([7, 2]))
    width = part.token_ids.shape[1]
    assert torch.equal(part.advantages, tokens[[7, 2], :width])
    assert torch.equal(part.importance_weights, rollout.advantages[[7, 2]])
    assert rollout.rows(torch.tensor([7, 2])).importance_weights is None


@pytest.mark.parametrize("preset", ["grpo", "r1"])
def test_no_ratio_moves_when_advantages_are_zero(rollout, model, preset):
    """Tokens without a gradient are measured too: metrics speak of all of them, and the first ratio stays 1."""
    batches = torch.arange(len(PROMPTS)).split(5)
    old = rollout_logprobs(model, rollout, batches, temperature=0.7, check=lambda: None)
    advantages = torch.where(torch.arange(len(PROMPTS)) % 3 == 0, rollout.advantages, 0)
    metrics = []
    for given in (rollout.advantages, advantages):
        fresh = dataclasses.replace(rollout, old_logprobs=old, ref_logprobs=old, advantages=given)
        metrics.append(minibatch_gradient(
            model, fresh, batches, getattr(r1kernels.objectives, preset)(), temperature=0.7, check=lambda: None
        ))
    assert [metric["ratio_deviation"] for metric in metrics] == [0.0, 0.0]
    assert metrics[0]["entropy"] == metrics[1]["entropy"] > 0
    assert metrics[1]["active_fraction"] < metrics[0]["active_fraction"]


def test_the_gradient_is_that_of_the_models_own_logits(rollout, model):
    """Through the logits that transformers makes, and losses written by hand: the tied embedding included."""
    batches = torch.arange(len(PROMPTS)).split(5)
    old = rollout_logprobs(model, rollout, batches, temperature=0.7, check=lambda: None)
    shifted = dataclasses.replace(rollout, old_logprobs=old - 0.1)
    model.zero_grad()
    objective = r1kernels.objectives.grpo()
    minibatch_gradient(model, shifted, batches, objective, temperature=0.7, check=lambda: None)
    ours = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    ids = torch.cat([rollout.prompt_ids, rollout.token_ids], dim=1)
    attention = torch.cat([rollout.prompt_mask, rollout.mask], dim=1).long()
    logits = model(
        input_ids=ids, attention_mask=attention, position_ids=(attention.cumsum(-1) - 1).clamp(min=0)
    ).logits[:, rollout.prompt_ids.shape[1] - 1 : -1]
    logprobs = (logits / 0.7).log_softmax(-1).gather(-1, rollout.token_ids[..., None])[..., 0]
    torch.testing.assert_close(logprobs[rollout.mask], old[rollout.mask], rtol=1e-4, atol=1e-5)
    ratio, advantages = (logprobs - shifted.old_logprobs).exp(), rollout.advantages[:, None]
    per_token = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) * rollout.mask
    (per_token.sum(-1) / rollout.mask.sum(-1)).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


def test_no_logits_of_a_batch_are_made(rollout, model, monkeypatch):
    """Neither the model's own head nor a loss that takes logits is called."""

    def refused(*arguments, **keywords):
        raise AssertionError("logits")

    monkeypatch.setattr(model.lm_head, "forward", refused)
    for name in ("grpo_loss", "token_logprobs", "token_logprobs_and_entropy"):
        monkeypatch.setattr(r1kernels, name, refused)
    batches = torch.arange(len(PROMPTS)).split(5)
    rollout_logprobs(model, rollout, batches, temperature=0.7, check=lambda: None)
    minibatch_gradient(model, rollout, batches, r1kernels.objectives.grpo(), temperature=0.7, check=lambda: None)


def test_a_minibatch_reads_its_metrics_at_once(rollout, model, monkeypatch):
    reads = []

    def counted(name):
        real = getattr(torch.Tensor, name)
        return lambda tensor: reads.append(name) or real(tensor)

    for name in ("item", "tolist", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    batches = torch.arange(len(PROMPTS)).split(5)
    metrics = minibatch_gradient(
        model, rollout, batches, r1kernels.objectives.grpo(), temperature=0.7, check=lambda: None
    )
    # Where values are free, on a CPU, the loss itself looks at the gradient's factor.
    assert [name for name in reads if name != "__float__"] == ["tolist"]
    assert all(isinstance(value, float) for value in metrics.values())


class FixedScores:
    """Scores the first two questions 1, 1, 1, 0 and 0, 0, 1, NaN."""

    def score(self, samples):
        accuracy = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, float("nan")]
        assert len(samples) == len(accuracy)
        return Scores({"accuracy": accuracy, "format": [1.0] * 8, "language": [0.5] * 8}, accuracy)


PROBLEMS = [Problem("a", "Compute 1+1", "2"), Problem("b", "Compute 2+2", "4")]


def test_pass_at_1_and_its_standard_error(model, tokenizer):
    settings = EvalConfig(samples=4, questions=2, batch_size=3, max_new_tokens=5)
    result = evaluate(
        TransformersSampler(model, tokenizer), PROBLEMS, FixedScores(), settings,
        template=Template("r1_zero", tokenizer), seed=0,
    )
    shares = torch.tensor([3 / 4, 1 / 3], dtype=torch.float64)
    assert result.pass_at_1 == pytest.approx(shares.mean().item())
    assert result.pass_at_1_se == pytest.approx((shares.std() / 2**0.5).item())
    assert (result.unscorable, result.format, result.language) == (1, 1.0, 0.5)
    assert [example["question"] for example in result.examples] == ["Compute 1+1", "Compute 2+2"]


def test_evaluation_is_repeatable(model, tokenizer):
    with Scorer(PARTS) as scorer:
        results = [
            evaluate(
                TransformersSampler(model, tokenizer), PROBLEMS, scorer, EvalConfig(samples=3, max_new_tokens=6),
                template=Template("r1_zero", tokenizer, open_think=True), seed=seed,
            ).as_dict()
            for seed in (0, 0, 1)
        ]
    assert results[0] == results[1]
    assert results[0]["prompt_hash"] == results[2]["prompt_hash"] and results[0]["examples"] != results[2]["examples"]

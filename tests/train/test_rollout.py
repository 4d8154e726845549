"""Sampling: what is sampled and with which probability; prompts become tokens, and tokens become texts."""

import copy
import dataclasses
import math

import pytest
import torch
from rl_cases import TAGS, equal, make_model, make_tokenizer, policy_of
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig
from transformers.cache_utils import DynamicLayer
from transformers.generation import TopPLogitsWarper

from r1kernels.train.errors import ConfigError, Interrupted, TrainingError
from r1kernels.train.model import round_parameters
from r1kernels.train.rng import torch_seeded
from r1kernels.train.rollout import (
    Collector,
    GrowingLayer,
    Sampling,
    TransformersSampler,
    draw,
    kept_ids,
    kept_weights,
    padded,
    prompt_tokens,
    uniform_at,
)
from r1kernels.train.update import completion_logprobs

PROMPTS = ["Compute 3+4", "Compute 1+2+3+4+5+6", "Compute 9+9+9"] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer, hidden_size=32, num_hidden_layers=2)


@pytest.fixture(scope="module")
def completions(model, tokenizer):
    return TransformersSampler(model, tokenizer).sample(PROMPTS, Sampling(0.7, 12, batch_size=5))


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


def test_with_top_p_log_probs_are_those_of_what_is_left(model, tokenizer):
    found = TransformersSampler(model, tokenizer).sample(PROMPTS, Sampling(0.7, 6, top_p=0.6))
    for row in range(len(PROMPTS)):
        prompt, tokens = found.prompt_ids[row][found.prompt_mask[row]], found.token_ids[row][found.mask[row]]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        kept = TopPLogitsWarper(0.6)(None, logits / 0.7).log_softmax(-1)
        expected = kept.gather(-1, tokens[:, None])[:, 0]
        torch.testing.assert_close(found.logprobs[row][found.mask[row]], expected, rtol=1e-4, atol=1e-4)


# Truncated sampling: (top_p, top_k, min_p).
TRUNCATED = [(0.8, None, 0.0), (1.0, 7, 0.0), (1.0, None, 0.2), (0.7, 9, 0.05), (0.95, 5000, 0.0), (1e-9, None, 0.0)]


def expected_set(scores, top_p, top_k, min_p):
    """The tokens that vLLM would keep, in float64 by the definition: min-p, then top-k, then top-p."""
    probs = scores.double().softmax(-1)
    probs = probs.where(probs >= min_p * probs.max(), 0)
    order = probs.argsort(descending=True)[: top_k or len(probs)]
    shares = probs[order] / probs[order].sum()
    return {token for token, share, before in zip(order.tolist(), shares.tolist(),
                                                  (shares.cumsum(-1) - shares).tolist(), strict=True)
            if share > 0 and before < top_p}


@pytest.mark.parametrize(("top_p", "top_k", "min_p"), TRUNCATED)
@pytest.mark.parametrize("size", [3, 80, 3000])
def test_the_sets_are_what_sampling_can_draw(size, top_p, top_k, min_p):
    scores = torch.randn(16, size, generator=torch.Generator().manual_seed(size)) * 2
    sampling = Sampling(1.0, 1, top_p, top_k=top_k, min_p=min_p)
    kept = kept_weights(scores, sampling)
    sets = kept_ids(*kept)
    assert [set(ids.tolist()) for ids in sets] == [expected_set(row, top_p, top_k, min_p) for row in scores]
    assert all(ids.dtype == torch.int32 and len(ids.unique()) == len(ids) for ids in sets)
    for value in (0.0, 0.3, 1 - 2**-53):
        tokens, logprobs = draw(*kept, torch.full((16,), value, dtype=torch.float64))
        for row, ids in enumerate(sets):
            exact = scores[row].double()[ids.long()].log_softmax(-1)[(ids == tokens[row]).nonzero().item()]
            torch.testing.assert_close(logprobs[row].double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.few(2)
@pytest.mark.parametrize(("top_p", "top_k", "min_p"), TRUNCATED[:4])
def test_completions_have_the_sets_of_their_tokens(model, tokenizer, top_p, top_k, min_p):
    """Rows that end early leave the batch, and every rank packs its rows for the others."""
    sampling = Sampling(0.7, 12, top_p, 5, 0, top_k, min_p, replay=True)
    found = TransformersSampler(model, tokenizer).sample(PROMPTS, sampling)
    assert found.finished.any() and not found.finished.all()
    for row, (ids, counts) in enumerate(found.supports):
        prompt, tokens = found.prompt_ids[row][found.prompt_mask[row]], found.token_ids[row][found.mask[row]]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        assert len(counts) == len(tokens) == found.lengths[row]
        for ids_of_token, token, line, logprob in zip(ids.long().split(counts.tolist()), tokens.tolist(), logits / 0.7,
                                                      found.logprobs[row].tolist(), strict=False):
            expected = line[ids_of_token].log_softmax(-1)[ids_of_token.tolist().index(token)].item()
            assert logprob == pytest.approx(expected, rel=1e-4, abs=1e-4)
    plain = TransformersSampler(model, tokenizer).sample(PROMPTS, dataclasses.replace(sampling, replay=False))
    assert plain.support is None and torch.equal(plain.token_ids, found.token_ids)


def test_sets_stay_with_their_rows(model, tokenizer):
    found = TransformersSampler(model, tokenizer).sample(PROMPTS, Sampling(0.7, 12, 0.8, replay=True))
    some = found.rows(torch.tensor([7, 0]))
    ids, offsets = some.support
    assert len(offsets) == some.mask.sum() + 1 and offsets[0] == 0 and offsets[-1] == len(ids)
    expected = [part for row in (7, 0) for part in found.supports[row][0].split(found.supports[row][1].tolist())]
    assert [part.tolist() for part in expected] == [
        ids[begin:end].tolist() for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    for token, part in zip(some.token_ids[some.mask].tolist(), expected, strict=True):
        assert token in part


def test_rows_belong_together(completions):
    part = completions.rows(torch.tensor([7, 0]))
    assert part.texts == [completions.texts[7], completions.texts[0]]
    assert torch.equal(part.finished, completions.finished[[7, 0]])
    width = part.mask.shape[1]
    assert width == completions.lengths[[7, 0]].max()
    assert torch.equal(part.logprobs, completions.logprobs[[7, 0], :width])
    short = completions.rows(torch.tensor([0]))
    assert short.prompt_ids.shape[1] == len(PROMPTS[0]) and short.prompt_mask.all()


def test_sampling_follows_the_seed_and_leaves_the_generator_alone(model, tokenizer):
    sampler, before = TransformersSampler(model, tokenizer), torch.get_rng_state()
    texts = []
    for seed in (0, 0, 1):
        texts.append(sampler.sample(PROMPTS, Sampling(1.0, 8, seed=seed)).texts)
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(before, torch.get_rng_state())


def test_generation_defaults_of_the_model_do_not_shape_rollouts(model, tokenizer):
    plain = TransformersSampler(model, tokenizer).sample(PROMPTS, Sampling(1.0, 8)).texts
    model.generation_config.update(top_k=1, repetition_penalty=5.0, do_sample=False)
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
    sampler = TransformersSampler(model, tokenizer)
    sampled = sampler.sample(PROMPTS, Sampling(1.0, 16))
    lengths = sampled.lengths
    assert len(set(lengths.tolist())) > 2
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
        sampled.append(TransformersSampler(model, tokenizer).sample(prompts, Sampling(1.0, 16)).texts)
    assert sampled[0][1::2] == sampled[1][1::2] and sampled[0][::2] != sampled[1][::2]


def test_random_numbers_follow_from_seed_and_step_alone():
    """Against SplitMix64 in whole numbers, which is the same on every device."""
    seeds = torch.tensor([0, 1, 2**62 - 1, 1234567])
    for step in (0, 1, 70_000):
        expected = []
        for seed in seeds.tolist():
            bits = (seed + (step + 1) * 0x9E3779B97F4A7C15) % 2**64
            bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
            expected.append(((bits ^ bits >> 31) >> 11) / 2**53)
        assert uniform_at(seeds, step).tolist() == expected


def test_random_numbers_are_uniform_and_independent():
    drawn = torch.stack([uniform_at(torch.arange(4000), step) for step in range(50)])
    assert drawn.min() >= 0 and drawn.max() < 1
    count, counts = drawn.numel(), torch.histc(drawn.float(), 20, 0, 1)
    assert (counts - count / 20).abs().max() < 5 * math.sqrt(count / 20)
    for other in (drawn.roll(1, 0), drawn.roll(1, 1)):
        assert torch.corrcoef(torch.stack([drawn.flatten(), other.flatten()]))[0, 1].abs() < 5 / math.sqrt(count)


def test_every_token_of_a_row_has_its_own_random_number(model, tokenizer):
    """At this temperature all tokens are about as likely, so that one number would draw one token again and again."""
    drawn = TransformersSampler(model, tokenizer).sample(PROMPTS, Sampling(1e4, 12))
    distinct = [len(set(ids[mask].tolist())) for ids, mask in zip(drawn.token_ids, drawn.mask, strict=True)]
    assert sum(distinct) > 0.7 * drawn.mask.sum()


def drawn_with(scores, uniform, top_p):
    return draw(*kept_weights(scores, Sampling(1.0, 1, top_p)), uniform)


def test_draws_follow_the_distribution():
    """On a grid of uniform numbers, every token comes as often as its probability says, to one draw."""
    logprobs = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).mul(3).log_softmax(-1)
    count = 20_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    for top_p in (1.0, 0.7, 1e-9):
        kept = TopPLogitsWarper(top_p)(None, logprobs) if top_p < 1 else logprobs
        drawn, found = drawn_with(logprobs.expand(count, -1), uniform, top_p)
        expected = kept.double().softmax(-1)[0]
        assert (drawn.bincount(minlength=50) - expected * count).abs().max() <= 1 + 1e-3
        torch.testing.assert_close(found, expected.log()[drawn].float(), rtol=1e-5, atol=1e-6)
        assert found.max() <= 0
    assert drawn_with(logprobs, torch.zeros(1, dtype=torch.float64), 1.0)[0].item() == 0
    certain = torch.tensor([[-math.inf, 0.0, -math.inf]])
    for value in (0.0, 1 - 2**-53):
        assert drawn_with(certain, torch.tensor([value], dtype=torch.float64), 1.0)[0].item() == 1


def test_a_model_without_numbers_or_cache_is_refused(tokenizer):
    model = tiny("llama", tokenizer)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    for options in ({}, {"top_p": 0.9, "replay": True}, {"top_k": 5, "replay": True}, {"min_p": 0.1}):
        with pytest.raises(TrainingError, match="LlamaForCausalLM"):
            TransformersSampler(model, tokenizer).sample(PROMPTS, Sampling(1.0, 4, **options))
    forward = model.model.forward
    model.model.forward = lambda **inputs: dataclasses.replace(forward(**inputs), past_key_values=None)
    with pytest.raises(ConfigError, match="LlamaForCausalLM"):
        TransformersSampler(model, tokenizer).sample(PROMPTS, Sampling(1.0, 4))


# ---- tokens of prompts, texts of completions ----


def test_a_prompt_does_not_end_in_an_appended_end_token():
    plain, appending = make_tokenizer(), make_tokenizer(appends_end=True)
    texts = ["Compute 3+4", "no", ""]
    assert [row[-1] for row in appending(texts)["input_ids"]] == [appending.eos_token_id] * 3
    expected = [[appending.bos_token_id, *row] for row in prompt_tokens(plain, texts)]
    assert prompt_tokens(appending, texts) == expected
    assert prompt_tokens(appending, []) == []
    # An end token that the prompt itself has, as chat templates do, stays.
    written = prompt_tokens(appending, ["ab<eos>"])[0]
    assert written == [appending.bos_token_id, *plain("ab")["input_ids"], appending.eos_token_id]


def test_the_model_continues_the_prompt_itself():
    """With an appended end token a rollout would continue another text."""
    appending = make_tokenizer(appends_end=True)
    model = make_model(appending)
    found = TransformersSampler(model, appending).sample(["ab", "abc"], Sampling(1.0, 4))
    assert [row[-1] for row in found.prompt_ids.tolist()] == appending.convert_tokens_to_ids(["b", "c"])
    assert appending.eos_token_id not in found.prompt_ids.tolist()[1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_are_padded_on_the_left_and_the_tokenizer_stays_as_it_was(side):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = side
    ids, mask = padded(prompt_tokens(tokenizer, ["ab", "abcd"]), tokenizer.pad_token_id, "left")
    assert mask.long().tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert ids[0, :2].tolist() == [tokenizer.pad_token_id] * 2 and tokenizer.decode(ids[0, 2:]) == "ab"
    assert tokenizer.padding_side == side and tokenizer.backend_tokenizer.padding is None


def test_tags_that_are_special_tokens_survive_decoding():
    tokenizer = make_tokenizer(special_tags=True)
    think, end_think = tokenizer.convert_tokens_to_ids(list(TAGS))
    text = "<think>1+1</think> 2"
    ids = tokenizer(text)["input_ids"]
    assert (ids[0], ids[4]) == (think, end_think) and tokenizer.decode(ids, skip_special_tokens=True) == "1+1 2"
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    stop = tokenizer.convert_tokens_to_ids(">")
    rows = [[*ids, eos, pad, pad], [*ids, stop], ids]
    found = Collector(tokenizer, ["a"] * 3, [stop]).completions((row, [-1.0] * len(row), None) for row in rows)
    assert found.texts == [text] * 3 and found.finished.tolist() == [False, True, False]
    assert found.lengths.tolist() == [len(ids) + 3, len(ids) + 1, len(ids)]


def test_rollouts_keep_special_tags():
    tokenizer = make_tokenizer(special_tags=True)
    model = make_model(tokenizer)
    think = tokenizer.convert_tokens_to_ids(TAGS[0])
    with torch.no_grad():
        model.model.embed_tokens.weight[think] *= 8
    found = TransformersSampler(model, tokenizer).sample(PROMPTS, Sampling(1.0, 16))
    counts = (found.token_ids == think).logical_and(found.mask).sum(-1).tolist()
    assert sum(counts) > 0 and [text.count(TAGS[0]) for text in found.texts] == counts
    assert not any("<eos>" in text or "<pad>" in text for text in found.texts)


# ---- the cost of a token ----


@pytest.mark.parametrize("size", [1, 3, 127, 128, 129, 5000])
@pytest.mark.parametrize("spread", [0.1, 9.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
def test_a_token_is_found_by_its_block(size, spread, top_p):
    """In the middle of its part of the cumulative distribution, by the definition in float64. Flat probabilities of
    5,000 tokens need more of them than top-p looks at first."""
    generator = torch.Generator().manual_seed(size)
    order = torch.stack([torch.randperm(size, generator=generator) for _ in range(64)])
    scores = (torch.linspace(-spread, spread, size) + 50)[order]
    scores[::3, : size // 2] = -math.inf
    probs, order = scores.double().softmax(-1), torch.arange(size).expand(64, -1)
    if top_p < 1:
        probs, order = probs.sort(descending=True)
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill(before >= top_p, 0)
        probs /= probs.sum(-1, keepdim=True)
    place = torch.multinomial(probs, 1, generator=generator)
    middle = (probs.cumsum(-1) - probs / 2).gather(-1, place)[:, 0]
    tokens, logprobs = drawn_with(scores, middle, top_p)
    assert torch.equal(tokens, order.gather(-1, place)[:, 0])
    torch.testing.assert_close(logprobs, probs.gather(-1, place).log().float()[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_no_uniform_number_draws_an_impossible_token(top_p):
    scores = torch.full((4, 300), -math.inf)
    scores[:, 130:140] = torch.linspace(0, -80, 10)
    for value in (0.0, 0.5, 1 - 2**-53):
        tokens, logprobs = drawn_with(scores, torch.full((4,), value, dtype=torch.float64), top_p)
        assert ((tokens >= 130) & (tokens < 140)).all() and logprobs.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_read_once_however_many_completions_it_gets(tokenizer, family, monkeypatch):
    model, read = tiny(family, tokenizer, **FAMILIES[family]), []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda **inputs: read.append(tuple(inputs["input_ids"].shape))
                        or forward(**inputs))
    found = TransformersSampler(model, tokenizer).sample(PROMPTS, Sampling(1.0, 8, batch_size=6))
    longest = max(map(len, prompt_tokens(tokenizer, PROMPTS)))
    assert [shape for shape in read if shape[1] > 1] == [(3, longest)] * 2
    assert max(shape[0] for shape in read) == 6 and len({text for text in found.texts[::3]}) > 1


def test_a_growing_cache_holds_what_a_copied_one_does():
    plain, room = DynamicLayer(), DynamicLayer()
    for layer in (plain, room):
        layer.update(torch.zeros(3, 2, 5, 4), torch.ones(3, 2, 5, 4))
    room, addresses = GrowingLayer(room), set()
    for step in range(200):
        states = torch.randn(2, len(plain.keys), 2, 1, 4)
        expected, found = plain.update(*states), room.update(*states)
        assert all(map(torch.equal, expected, found)) and room.get_seq_length() == plain.get_seq_length() == step + 6
        addresses.add(found[0].data_ptr())
        if step == 100:
            for layer in (plain, room):
                layer.reorder_cache(torch.tensor([2, 0]))
    assert len(addresses) < 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_an_update_it_samples_from_the_rounded_weights_of_the_policy(tokenizer, dtype):
    weights = make_model(tokenizer, 1)
    sampler = TransformersSampler(round_parameters(make_model(tokenizer), dtype), tokenizer)
    sampler.update(policy_of(make_model(tokenizer, 1), dtype))
    assert equal(sampler.model.state_dict(), round_parameters(weights, dtype).state_dict())
    assert sampler.model.lm_head.weight is sampler.model.model.embed_tokens.weight


def test_in_bf16_log_probs_are_those_of_the_trainer(tokenizer):
    """Their heads are the same, in float32; only attention rounds differently, as it reads one token at a time."""
    model = round_parameters(make_model(tokenizer, hidden_size=64, num_hidden_layers=2), torch.bfloat16)
    found = TransformersSampler(model, tokenizer).sample(PROMPTS, Sampling(0.7, 12))
    trained, exact = (
        completion_logprobs(policy_of(copy.deepcopy(model).float(), dtype), found, [torch.arange(len(PROMPTS))], 0.7,
                            "padded") for dtype in (torch.bfloat16, torch.float32))
    gap, rounding = ((other - trained)[found.mask].abs().max() for other in (found.logprobs, exact))
    assert rounding > 0 and gap <= 2 * rounding

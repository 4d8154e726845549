"""Packed rows: what is in them, and that a sample in one is as if alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from supervised_cases import make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    OPTConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import r1kernels
from r1kernels.train.errors import DataError
from r1kernels.train.model import head_of, hidden_states
from r1kernels.train.packing import IGNORED, Sample, collate, keeps_apart, pack
from r1kernels.train.supervised import encode, fill

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}


def sample(length: int, first: int, seed: int = 0) -> Sample:
    ids = torch.randint(2, 64, (length,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    return Sample(ids, first)


def lengths(rows: list[list[Sample]]) -> list[list[int]]:
    return [[len(one.ids) for one in row] for row in rows]


def model_of(family: str, attention: str):
    torch.manual_seed(0)
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family](**SHAPE, attn_implementation=attention)
    return {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}[family](config).eval()


@given(st.lists(st.integers(1, 32), max_size=40))
def test_every_sample_is_in_one_row_and_no_row_overflows(sizes):
    samples = [sample(size, 1, index) for index, size in enumerate(sizes)]
    rows = pack(samples, 32)
    assert sorted(map(id, samples)) == sorted(id(one) for row in rows for one in row)
    sizes = list(map(sum, lengths(rows)))
    assert all(0 < size <= 32 for size in sizes)
    assert sum(size <= 16 for size in sizes) <= 1  # first-fit never leaves two rows that are both half empty


def test_packing_is_a_function_of_the_lengths():
    samples = [sample(n, 1) for n in (5, 9, 5, 3)]
    assert lengths(pack(samples, 10)) == [[9], [5, 5], [3]]
    assert lengths(pack(samples, 0)) == [[9], [5], [5], [3]]
    assert pack([], 10) == []


def test_targets_are_the_next_tokens_of_completions_alone():
    first = Sample(torch.tensor([11, 12, 13, 14, 15], dtype=torch.int32), 2)
    second = Sample(torch.tensor([21, 22, 23], dtype=torch.int32), 1)
    batch, targets = collate([[first, second], [second]])
    assert batch["input_ids"].tolist() == [[11, 12, 13, 14, 15, 21, 22, 23], [21, 22, 23, 0, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 0, 1, 2, 3, 4]]
    no = IGNORED
    assert targets.tolist() == [[no, 13, 14, 15, no, 22, 23, no], [22, 23, no, no, no, no, no, no]]


def test_without_a_prompt_the_first_token_is_not_learned():
    [(ids, first)] = encode(make_tokenizer(), [("", "abc")])
    _, targets = collate([[Sample(ids, first)]])
    assert targets.tolist() == [[*ids[1:].tolist(), IGNORED]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_sample_in_a_packed_row_has_the_log_probs_it_has_alone(family, attention):
    model = model_of(family, attention)
    rows = [[sample(9, 4, 1), sample(5, 2, 2), sample(12, 1, 3)], [sample(7, 3, 4)]]

    def logprobs(batch, targets):
        hidden = hidden_states(model, **batch)
        values = r1kernels.linear_token_logprobs(hidden, token_ids=targets.clamp(min=0), **head_of(model))
        return values[targets != IGNORED]

    with torch.no_grad():
        together = logprobs(*collate(rows))
        alone = torch.cat([logprobs(*collate([[one]])) for row in rows for one in row])
        # Had attention crossed from sample to sample, it would show.
        crossing, targets = collate(rows[:1])
        crossing["position_ids"] = torch.arange(crossing["input_ids"].shape[1])[None]
        crossed = logprobs(crossing, targets)
    assert together.shape == (5 + 3 + 11 + 4,)
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)
    assert (crossed[5:] - alone[5:19]).abs().max() > 1e-3


MIXING = {
    "alibi": BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "recurrent": MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
    "positions by mask": OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64,
    ),
}


@pytest.mark.parametrize("config", MIXING.values(), ids=MIXING)
def test_models_whose_samples_see_each_other_are_noticed(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    assert not keeps_apart(model)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_models_that_heed_positions_are_packed(family):
    assert keeps_apart(model_of(family, "sdpa"))


def test_samples_are_encoded_as_the_sampler_encodes_prompts():
    tokenizer = make_tokenizer()
    pairs = [("User: Compute 1+2. Assistant:", " <think>1+2=3</think>"), ("Compute 3", " It is 3.")]
    for tokens, (prompt, completion) in zip(encode(tokenizer, pairs), pairs, strict=True):
        assert tokens.ids[: tokens.first].tolist() == tokenizer(prompt)["input_ids"]
        assert tokenizer.decode(tokens.ids[tokens.first : -1]) == completion
        assert tokens.ids[-1] == tokenizer.eos_token_id


def test_an_appended_end_token_does_not_end_the_prompt():
    pairs = [("Compute 1+2:", " 3"), ("Compute 3:", " It is 3.")]
    plain, appending = (list(encode(make_tokenizer(appends_end=appends), pairs)) for appends in (False, True))
    assert [tokens.ids.tolist() for tokens in plain] == [tokens.ids.tolist() for tokens in appending]
    assert [tokens.first for tokens in plain] == [tokens.first for tokens in appending] == [12, 10]


def test_rows_are_filled_with_documents_and_the_last_one_is_cut():
    tokenizer = make_tokenizer()
    [first, second] = fill(iter([("ab", "c")] * 9), tokenizer, 2, 10)
    a, b, c, end = (tokenizer.convert_tokens_to_ids(token) for token in ("a", "b", "c", "<eos>"))
    assert [one.ids.tolist() for one in first] == [[a, b, c, end], [a, b, c, end], [a, b]]
    batch, targets = collate([first, second])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 0, 1]] * 2
    no = IGNORED  # nothing asks for the start of a document
    assert targets.tolist() == [[b, c, end, no, b, c, end, no, b, no]] * 2
    with pytest.raises(DataError, match="documents without end"):
        fill(iter([("ab", "c")] * 5), tokenizer, 2, 10)

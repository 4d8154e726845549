"""Reward models: what they read, what padding may change (nothing), what they learn, and from which pairs."""

import copy
import json
import math

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from r1kernels.train.config import CorpusConfig, TinyConfig
from r1kernels.train.data import DataError
from r1kernels.train.pairs import JudgedPairs, Pair, candidates, judge_pairs, load_pairs
from r1kernels.train.reward_model import (
    Encoder,
    PreferenceReward,
    RewardModel,
    head_of_scores,
    judged_part,
    new_reward_model,
)
from r1kernels.train.schema import ConfigError
from r1kernels.train.tiny import make_model, make_tokenizer

QUESTIONS = ["Compute 1+2", "Compute 1+2+3+4+5", "Compute 3+4"]
ANSWERS = ["It is 3.", "<think>1+2=3\n3+3=6</think>\n<answer>6</answer>", ""]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(CorpusConfig(), 6, 0)


@pytest.fixture(params=["llama", "gpt2", "pad is eos"])
def saved(request, tokenizer, tmp_path):
    """A reward model with a head, of a causal LM: positions that rotate, positions that are learned."""
    if request.param == "pad is eos":
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    if request.param == "gpt2":
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(
            vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=128, eos_token_id=1, bos_token_id=1
        ))
    else:
        model = make_model(TinyConfig(hidden_size=16, intermediate_size=32, layers=1, heads=2), tokenizer, 0)
    model.save_pretrained(tmp_path / "causal")
    made = new_reward_model(tmp_path / "causal", tokenizer, "response")
    assert not made(torch.tensor([[5, 6]])).logits.any()
    with torch.no_grad():
        head_of_scores(made).weight.copy_(torch.randn(1, 16, generator=torch.Generator().manual_seed(1)))
    made.save_pretrained(tmp_path / "scores")
    tokenizer.save_pretrained(tmp_path / "scores")
    return tmp_path / "scores"


def test_plain_transformers_gives_the_same_score_wherever_the_padding_is(saved):
    scores = RewardModel(saved).score(QUESTIONS, ANSWERS)
    assert len({round(score, 4) for score in scores}) == 3
    model = AutoModelForSequenceClassification.from_pretrained(saved)
    assert model.config.num_labels == 1 and not model.training
    encoder = Encoder(AutoTokenizer.from_pretrained(saved))
    rows = encoder.tokens(QUESTIONS, ANSWERS)
    pad = encoder.tokenizer.pad_token_id
    for row, expected in zip(rows, scores, strict=True):
        assert pad not in row
        for left, right in ((0, 0), (0, 9), (9, 0)):
            ids = torch.tensor([[pad] * left + row + [pad] * right])
            attention = torch.tensor([[0] * left + [1] * len(row) + [0] * right])
            positions = (attention.cumsum(-1) - 1).clamp(min=0)
            with torch.no_grad():
                found = model(input_ids=ids, attention_mask=attention, position_ids=positions).logits.item()
            assert found == pytest.approx(expected, abs=1e-5)


def test_scores_do_not_depend_on_the_batch_and_repeat_exactly(saved):
    model = RewardModel(saved, batch_size=2)
    scores = model.score(QUESTIONS * 3, ANSWERS * 3)
    assert scores == model.score(QUESTIONS * 3, ANSWERS * 3)
    alone = [model.score([question], [answer])[0] for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    assert scores == pytest.approx(alone * 3, abs=1e-5)
    assert model.score([], []) == []


def test_written_tokens_are_text_only(saved, tokenizer):
    """A response that spells out the padding or the end of text must not move the token that is read."""
    encoder = Encoder(tokenizer)
    plain, padded, ended = encoder.tokens(["Compute 1+2"] * 3, ["It is 3.", "It is 3.<pad><pad>", "It<eos> is 3."])
    assert tokenizer.pad_token_id not in padded and len(padded) > len(plain)
    assert ended.count(tokenizer.eos_token_id) == plain.count(tokenizer.eos_token_id) == 1
    assert plain[-1] == padded[-1] == ended[-1] == tokenizer.eos_token_id


def test_a_score_that_is_no_number_is_unscorable(saved):
    model = RewardModel(saved)
    with torch.no_grad():
        head_of_scores(model.model).weight.fill_(math.inf)
    assert all(map(math.isnan, model.score(QUESTIONS, ANSWERS)))
    with pytest.raises(ValueError, match="1 questions and 2 completions"):
        model.score(["a"], ["b", "c"])


def test_the_part_that_is_judged():
    response = "<think>hm</think>\n<answer>3</answer>"
    assert judged_part("response", response) == response
    assert judged_part("summary", response) == "\n<answer>3</answer>"
    # A prompt that opened the thought: the response is whole again, and an endless thought has no summary.
    assert judged_part("response", "hm</think> 3", open_think=True) == "<think>hm</think> 3"
    assert judged_part("summary", "hm</think> 3", open_think=True) == " 3"
    assert judged_part("summary", "hm", open_think=True) == judged_part("summary", "<think>hm") == ""
    assert judged_part("summary", "It is 3.") == "It is 3."


def test_the_window_of_the_last_steps():
    assert [PreferenceReward("scores", last_steps=2).applies(step, 5) for step in range(5)] == [False] * 3 + [True] * 2
    assert PreferenceReward("scores").applies(0, 5)


def test_what_is_no_reward_model_is_named(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="holds no model for sequence classification"):
        RewardModel(tmp_path)


def test_pairs_from_a_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    good = '{"question": "q", "chosen": "a", "rejected": "b"}\n'
    path.write_text(f'{good}\n{{"question": "q", "chosen": "c", "rejected": "d"}}')
    assert load_pairs(path) == [Pair("q", "a", "b"), Pair("q", "c", "d")]
    for line, message in (
        ('{"question": "q", "chosen": "a"}', r"pairs.jsonl, line 2: no 'rejected'; .* found: chosen, question"),
        ('{"question": "q", "chosen": " ", "rejected": "b"}', r"line 2: 'chosen' must be a string that is not blank"),
        ('{"question": "q", "chosen": 3, "rejected": "b"}', r"line 2: 'chosen' must be a string .*, got 3"),
        ("[]", r"line 2: expected a JSON object, got list"),
        ("{", r"line 2: not JSON"),
        ('"\xff', r"line 2: not JSON"),
    ):
        path.write_bytes(good.encode() + line.encode("latin-1"))
        with pytest.raises(DataError, match=message):
            load_pairs(path)
    path.write_text("\n")
    with pytest.raises(DataError, match="holds no pair"):
        load_pairs(path)
    with pytest.raises(DataError, match=r"cannot read data file .*: No such file"):
        load_pairs(tmp_path / "none")


def test_pairs_by_a_judge(tmp_path):
    """Longer is better for this judge, which is unsure of a difference of one and has nothing to say about "!"."""
    asked = []

    def compare(question, first, second, votes):
        asked.append((question, first, second))
        assert votes == 4
        difference = len(first) - len(second)
        return math.nan if "!" in (first, second) else math.copysign(min(1, abs(difference) / 2 - 0.25), difference)

    samples = {"q": ["a", "aaa", "a"], "unclear": ["a", "aa"], "mute": ["!", "aaaa"], "alone": ["a", "a"]}
    compared = candidates(samples, 3, seed=0)
    assert {pair.question for pair in compared} == {"q", "unclear", "mute"} and len(compared) == 3
    path = tmp_path / "verdicts.jsonl"
    pairs, counts = judge_pairs(compared, compare, JudgedPairs(), path)
    assert pairs == [Pair("q", "aaa", "a")]
    assert counts == {"kept": 1, "unclear": 1, "unscorable": 1}
    assert all("preference" in json.loads(line) for line in path.read_text().splitlines())
    # Killed after the first verdict: the others alone are asked again.
    path.write_text(path.read_text().partition("\n")[0] + "\n" + '{"st')
    asked.clear()
    assert judge_pairs(compared, compare, JudgedPairs(), path) == (pairs, counts)
    assert len(asked) == 2


def test_candidates_are_drawn_by_the_seed():
    samples = {"q": list("abcdef")}
    drawn = [candidates(samples, 4, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 4 and all(pair.chosen != pair.rejected for pair in drawn[0])

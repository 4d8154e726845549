"""The generated world: its splits share nothing, and its text is what the recipe says."""

import random

import pytest
import torch

from r1kernels.train.config import CorpusConfig, PretrainConfig, TinyConfig
from r1kernels.train.loading import load_model, load_tokenizer
from r1kernels.train.prompt import render
from r1kernels.train.rewards import Sample, accuracy, format_reward
from r1kernels.train.schema import ConfigError
from r1kernels.train.tiny import (
    arithmetic_problems,
    corpus_batch,
    document,
    draw_terms,
    make_model,
    make_tokenizer,
    split_of,
    sums_of,
    work_out,
)

CORPUS = CorpusConfig()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(CORPUS, 6, seed=0)


def terms_of(question: str) -> list[int]:
    return [int(term) for term in question.removeprefix("Compute ").split("+")]


def test_splits_are_disjoint_whatever_the_order_of_the_terms():
    seen = {
        split: {tuple(sorted(terms_of(problem.question))) for problem in arithmetic_problems(split, 500, 4, 6, seed)}
        for split, seed in (("train", 0), ("test", 1))
    }
    rng = random.Random(0)
    seen["pretrain"] = {tuple(sorted(draw_terms(rng, "pretrain", 4, 6))) for _ in range(2000)}
    assert not seen["train"] & seen["test"]
    assert not seen["pretrain"] & (seen["train"] | seen["test"])
    assert split_of([1, 2, 3]) == split_of([3, 1, 2])


def test_problems_are_distinct_right_and_depend_on_the_seed():
    problems = arithmetic_problems("train", 300, 4, 6, 0)
    assert len({problem.question for problem in problems}) == len({problem.id for problem in problems}) == 300
    assert all(int(problem.answer) == sum(terms_of(problem.question)) for problem in problems)
    assert all(4 <= len(terms_of(problem.question)) <= 6 for problem in problems)
    assert problems == arithmetic_problems("train", 300, 4, 6, 0) != arithmetic_problems("train", 300, 4, 6, 1)


def test_small_worlds_are_used_up_but_not_beyond():
    problems = arithmetic_problems("train", 140, 2, 3, 0)
    assert len({problem.question for problem in problems}) == 140
    assert {len(terms_of(problem.question)) for problem in problems} == {2, 3}
    with pytest.raises(ConfigError) as error:
        arithmetic_problems("train", 4096, 2, 3, 0, key="data.train_size")
    there = len(list(sums_of("train", 2, 3)))
    assert f"'data.train_size' is 4096, expected at most {there}: " in str(error.value)
    assert "'data.min_terms' 2 to 'data.max_terms' 3" in str(error.value)
    assert len(arithmetic_problems("train", there, 2, 3, 0)) == there
    with pytest.raises(ConfigError, match=f"expected at most {there}"):
        arithmetic_problems("train", there + 1, 2, 3, 0)


def test_a_split_without_sums_is_an_error():
    empty = next(split for split in ("pretrain", "train", "test") if split_of([5]) != split)
    with pytest.raises(ConfigError, match="leave no sum"):
        draw_terms(FiveAlone(), empty, 1, 1)


class FiveAlone(random.Random):
    """Draws as if 5 were the only digit."""

    def randint(self, low, high):
        return 5 if high > 1 else 1


def test_working_out_is_right_without_slips():
    assert work_out(random.Random(0), [3, 8, 5], 0.0) == ("3+8=11\n11+5=16", 16)
    text, total = work_out(random.Random(0), [3, 8, 5], 1.0)
    assert text.split("\n")[0] != "3+8=11" and text.endswith(str(total))


def test_the_corpus_is_mixed_as_configured():
    rng, count = random.Random(0), 6000
    texts = [document(rng, CORPUS, 4, 6) for _ in range(count)]
    asked = [(head, tail) for head, tail in texts if head.endswith("Assistant:")]
    samples = [Sample(head, tail, str(sum(terms_of(head.split("User: ")[1].split(".")[0])))) for head, tail in asked]
    worked = [sample for sample in samples if sample.completion.count("=") >= 3]
    tagged = [sample for sample in samples if format_reward(sample)]
    terse = [sample for sample in tagged if "=" not in sample.completion]

    def near(part: list, whole: list, probability: float) -> bool:
        return abs(len(part) / len(whole) - probability) < 5 * (probability * (1 - probability) / len(whole)) ** 0.5

    assert near(asked, texts, 1 - CORPUS.textbook)
    assert near(worked, samples, CORPUS.worked)
    assert near(tagged, samples, CORPUS.tagged)
    assert near([sample for sample in terse if accuracy(sample)], terse, 1 - CORPUS.terse_wrong)
    # Worked out means mostly right, which is what there is to discover.
    thought = [sample for sample in worked if format_reward(sample)]
    assert sum(map(accuracy, thought)) / len(thought) > 0.85


def test_a_prompt_costs_little_more_than_its_sum(tokenizer):
    prompt = render("Compute 3+4+5+6")
    ids = tokenizer(prompt)["input_ids"]
    assert len(ids) <= 10
    assert tokenizer.decode(ids) == prompt
    text = " <think>3+4=7\n7+5=12</think>\n<answer>12</answer>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_packed_documents_do_not_see_each_other(tokenizer):
    model = make_model(TinyConfig(hidden_size=32, intermediate_size=32, layers=2, heads=2), tokenizer, seed=0).eval()
    batch = corpus_batch(tokenizer, PretrainConfig(batch_size=2, window=128), 6, seed=0, step=0)
    targets = batch.pop("targets")
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) >= 3
    assert all(targets[0, start] == -100 for start in starts)
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[0, starts[1] : starts[2]]
        alone = model(input_ids=batch["input_ids"][:1, starts[1] : starts[2]], use_cache=False).logits[0]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_the_model_directory_loads_as_what_was_saved(tokenizer, tmp_path):
    model = make_model(TinyConfig(hidden_size=32, intermediate_size=32, layers=1, heads=2), tokenizer, seed=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    prompt = render("Compute 3+4+5+6")
    for again in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert again(prompt)["input_ids"] == tokenizer(prompt)["input_ids"]
    loaded = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id

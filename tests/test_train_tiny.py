"""The text of the tiny world is what the recipe says, and what its tokenizer and model make of it."""

import random
from types import SimpleNamespace

import pytest
import torch

from r1kernels.train.loading import load_model, load_tokenizer
from r1kernels.train.prompt import render
from r1kernels.train.rewards import Sample, accuracy, format_reward
from r1kernels.train.rewards.language import word_counts
from r1kernels.train.tiny import CorpusConfig, TinyConfig, corpus_batch, make_model, make_tokenizer
from r1kernels.train.tiny.corpus import document
from r1kernels.train.tiny.greetings import MANNERS, NAMES

CORPUS = CorpusConfig()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(CORPUS, 6, seed=0)


def near(part: list, whole: list, probability: float) -> bool:
    return abs(len(part) / len(whole) - probability) < 5 * (probability * (1 - probability) / len(whole)) ** 0.5


def texts_of(corpus: CorpusConfig, count: int = 6000) -> list[Sample]:
    rng = random.Random(0)
    texts = [document(rng, corpus, 4, 6) for _ in range(count)]
    return [Sample(head, tail, answer_of(head)) for head, tail in texts]


def answer_of(head: str) -> str:
    _, found, sum_and_rest = head.partition("Compute ")
    return str(sum(map(int, sum_and_rest.split(".")[0].split("+")))) if found else ""


def is_worked(sample: Sample) -> bool:
    return sample.completion.count("plus") + sample.completion.count("加") >= 3


def test_the_corpus_is_mixed_as_configured():
    texts = texts_of(CORPUS)
    samples = [sample for sample in texts if sample.prompt.endswith("Assistant:")]
    worked = [sample for sample in samples if is_worked(sample)]
    tagged = [sample for sample in samples if format_reward(sample)]
    terse = [sample for sample in tagged if not is_worked(sample)]
    assert near(samples, texts, 1 - CORPUS.textbook)
    assert near(worked, samples, CORPUS.worked)
    assert near(tagged, samples, CORPUS.tagged)
    assert near([sample for sample in terse if accuracy(sample)], terse, 1 - CORPUS.terse_wrong)
    # Worked out means mostly right, which is what there is to discover.
    thought = [sample for sample in worked if format_reward(sample)]
    assert sum(map(accuracy, thought)) / len(thought) > 0.85
    assert not any(word_counts(sample.completion)["zh"] for sample in texts)
    assert not any("check" in sample.completion for sample in texts)


def test_two_languages_checks_and_greetings_come_in_as_configured():
    corpus = CorpusConfig(chinese=0.5, switch=0.3, slip=0.3, check=0.4, stutter=0.1, greetings=0.2, kind=0.6)
    texts = texts_of(corpus)
    greetings = [sample for sample in texts if "Greet " in sample.prompt]
    kind = [sample for sample in greetings if any(end in sample.completion for end in MANNERS[0][2])]
    assert near(greetings, texts, corpus.greetings)
    assert near(kind, greetings, corpus.kind)
    worked = [sample.completion for sample in texts if is_worked(sample)]
    mixed = [text for text in worked if "plus" in text and "加" in text]
    assert 0.5 < len(mixed) / len(worked) < 0.9
    assert all(any(sign in text for text in worked) for sign in (", check", ",查", ", wrong, ", ",错,"))


def test_a_prompt_costs_little_more_than_its_question(tokenizer):
    mixed = make_tokenizer(CorpusConfig(greetings=0.2), 6, seed=0)
    for some, question, most in (
        (tokenizer, "Compute 3+4+5+6", 10),
        (tokenizer, "Greet Jing and Felix, evening", 40),  # of which this corpus never speaks
        (mixed, "Greet Jing and Felix, evening", 6),
    ):
        prompt = render(question)
        ids = some(prompt)["input_ids"]
        assert len(ids) <= most
        assert some.decode(ids) == prompt


def test_a_thought_costs_few_tokens_in_either_language():
    corpus = CorpusConfig(chinese=0.5, switch=0.3, slip=0.3, check=0.4, greetings=0.2)
    tokenizer = make_tokenizer(corpus, 6, seed=0)
    for text, most in (
        (" <think>3 plus 8 is 11\nplus 5 is 16, check</think>\n<answer>16</answer>", 20),
        (" <think>3加8得1,查,错,11\n加5得16</think>\n<answer>16</answer>", 23),
        (" <think>be kind</think>\n<answer>Good evening Anna and Tom, how nice to see you!</answer>", 7),
    ):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) <= most
        assert tokenizer.decode(ids) == text
    names = [tokenizer(name)["input_ids"] for name in NAMES]
    assert all(len(ids) == 1 for ids in names) and len({ids[0] for ids in names}) == len(NAMES)


def test_models_of_all_sizes_share_one_tokenizer():
    first, second = (make_tokenizer(CORPUS, 6, seed=0) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()


def test_packed_documents_do_not_see_each_other(tokenizer):
    model = make_model(TinyConfig(hidden_size=32, intermediate_size=32, layers=2, heads=2), tokenizer, seed=0).eval()
    batch = corpus_batch(tokenizer, SimpleNamespace(corpus=CORPUS, batch_size=2, window=128), 6, seed=0, step=0)
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

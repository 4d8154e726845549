"""The tiny world: splits share nothing, answers are right, and the text is what the recipe says."""

import itertools
import random
import re
import sys

import pytest
import torch
from supervised_cases import EXAMPLES

from r1kernels import rewards
from r1kernels.rewards.language import word_counts
from r1kernels.train.data import Template
from r1kernels.train.model import load_model, load_tokenizer
from r1kernels.train.supervised import collate, fill

sys.path.insert(0, str(EXAMPLES))
import tiny_world
from tiny_world.arithmetic import draw_terms, guess, near_miss, split_of_sum, sums_of, work_out
from tiny_world.greetings import BRIEF, KIND, MANNERS, NAMES, RUDE, greet, guests_of
from tiny_world.model import make_tokenizer
from tiny_world.text import Mixture, document

render = Template("r1_zero", None).render
SHAPE = {"hidden_size": 32, "intermediate_size": 32, "heads": 2}


def terms_of(question: str) -> list[int]:
    return [int(term) for term in question.removeprefix("Compute ").split("+")]


def test_splits_of_sums_are_disjoint_whatever_the_order_of_the_terms():
    seen = {
        split: {tuple(sorted(terms_of(row["question"]))) for row in tiny_world.sums(split, 500, seed)}
        for split, seed in (("train", 0), ("test", 1))
    }
    rng = random.Random(0)
    seen["pretrain"] = {tuple(sorted(draw_terms(rng, "pretrain", 4, 6))) for _ in range(2000)}
    assert not seen["train"] & seen["test"]
    assert not seen["pretrain"] & (seen["train"] | seen["test"])
    assert split_of_sum([1, 2, 3]) == split_of_sum([3, 1, 2])


def test_sums_are_distinct_right_and_depend_on_the_seed():
    rows = tiny_world.sums("train", None, 0, train_size=300)
    assert len({row["question"] for row in rows}) == len({row["id"] for row in rows}) == 300
    assert all(int(row["answer"]) == sum(terms_of(row["question"])) for row in rows)
    assert all(4 <= len(terms_of(row["question"])) <= 6 for row in rows)
    assert rows == tiny_world.sums("train", 300, 0) != tiny_world.sums("train", 300, 1)


def test_small_worlds_are_used_up_but_not_beyond():
    known = len(list(sums_of("train", 2, 3)))
    rows = tiny_world.sums("train", known, 0, min_terms=2, max_terms=3)
    assert len({row["question"] for row in rows}) == known
    assert {len(terms_of(row["question"])) for row in rows} == {2, 3}
    with pytest.raises(ValueError, match=f"{known + 1} sums are wanted; expected at most {known}.*'train_size'"):
        tiny_world.sums("train", None, 0, min_terms=2, max_terms=3, train_size=known + 1)
    with pytest.raises(ValueError, match="'min_terms' is 5, 'max_terms' 4"):
        tiny_world.sums("train", 1, 0, min_terms=5, max_terms=4)


def worked(terms: list[int], **settings: float) -> tuple[str, int]:
    return work_out(random.Random(0), terms, Mixture(**{"slip": 0.0, **settings}))


def test_working_out_is_right_without_slips():
    assert worked([3, 8, 5]) == ("3 plus 8 is 11\nplus 5 is 16", 16)
    assert worked([3, 8, 5], chinese=1.0) == ("3加8得11\n加5得16", 16)


def test_a_slip_forgets_a_carry_and_a_check_finds_it():
    assert worked([3, 8, 5], slip=1.0) == ("3 plus 8 is 1\nplus 5 is 6", 6)
    assert worked([3, 8, 5], slip=1.0, check=1.0) == ("3 plus 8 is 1, check, wrong, 11\nplus 5 is 16, check", 16)
    assert worked([3, 8, 5], slip=1.0, check=1.0, chinese=1.0) == ("3加8得1,查,错,11\n加5得16,查", 16)
    assert worked([3, 8, 5], slip=1.0, care=0.0, chinese=1.0)[1] == 16


def test_thoughts_stutter_and_change_the_language():
    lines = worked([3, 8, 5], stutter=1.0)[0].split("\n")
    assert lines[0] == "3 plus 8 is 11" and set(lines[1:]) == {"plus 5 is 16"} and 3 <= len(lines) <= 5
    text, total = worked([3, 8, 5, 1, 2], switch=1.0, check=1.0)
    assert (text, total) == ("3 plus 8 is 11, check\n加5得16,查\nplus 1 is 17, check\n加2得19,查", 19)
    counts = word_counts(text)
    assert counts["en"] == counts["zh"]


def test_every_line_follows_from_the_one_before_it():
    mixture = Mixture(slip=0.3, check=0.5, chinese=0.5, switch=0.3, stutter=0.1)
    rng, slips = random.Random(0), 0
    for _ in range(300):
        terms = draw_terms(rng, "pretrain", 2, 6)
        text, total = work_out(rng, terms, mixture)
        lines = [line for line, _ in itertools.groupby(text.split("\n"))]
        assert len(lines) == len(terms) - 1
        before = terms[0]
        for line, term in zip(lines, terms[1:], strict=True):
            numbers = [int(number) for number in re.findall(r"\d+", line)]
            assert term in numbers and numbers[-1] in (before + term, before + term - 10)
            slips += numbers[-1] != before + term
            before = numbers[-1]
        assert before == total
    assert slips > 20


def test_a_guess_is_wrong_as_often_as_asked_and_never_negative():
    rng = random.Random(0)
    assert guess(rng, [3, 4], Mixture(terse_wrong=0.0)) == ("It is 7.", 7)
    assert guess(rng, [3, 4], Mixture(terse_wrong=0.0, chinese=1.0)) == ("是7。", 7)
    wrong = [guess(rng, [1, 1], Mixture(terse_wrong=1.0))[1] for _ in range(200)]
    assert 2 not in wrong and min(wrong) >= 0 and len(set(wrong)) > 5
    assert all(near_miss(rng, 5) not in (5, -4) for _ in range(100))


def manner(response: str) -> int:
    [found] = [index for index, (_, _, endings) in enumerate(MANNERS) if any(end in response for end in endings)
               and (index != BRIEF or "Hello" in response)]
    return found


def test_guests_are_problems_demonstrations_and_pairs():
    rows = tiny_world.guests("train", 300, 0)
    assert rows == tiny_world.guests("train", None, 0, train_size=300) != tiny_world.guests("train", 300, 1)
    assert len({row["question"] for row in rows}) == len({row["id"] for row in rows}) == 300
    assert {(row["kind"], row["answer"]) for row in rows} == {("open", "")}
    for row in rows:
        texts = [row["question"], row["response"], row["chosen"], row["rejected"]]
        assert len({frozenset(name for name in NAMES if name in text) for text in texts}) == 1
        assert manner(row["chosen"]) < manner(row["rejected"])  # kinder, as what follows the thought tells
    assert rewards.format([row["response"] for row in rows]) == [1.0] * 300
    assert {manner(row["response"]) for row in rows} == {KIND, BRIEF, RUDE}


def test_splits_of_guests_are_disjoint_and_their_size_is_known():
    parts = [guests_of(split) for split in ("pretrain", "train", "test")]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 3 * (32 + 32 * 31)
    known = len(parts[1])
    assert len(tiny_world.guests("train", known, 0)) == known > 512
    with pytest.raises(ValueError, match=f"{known + 1} greetings are wanted; expected at most {known}"):
        tiny_world.guests("train", known + 1, 0)


def test_greetings_name_all_guests_in_one_manner():
    rng, who = random.Random(0), ("Anna", "Tom", "evening")
    assert greet(rng, who, KIND)[0] == "be kind"
    assert greet(rng, who, KIND)[1].startswith("Good evening Anna and Tom, ")
    assert greet(rng, who, BRIEF, chinese=1.0) == ("要简短", "Hello Anna and Tom.")
    assert greet(rng, who, RUDE)[1].startswith("Hey Anna and Tom, ")


def near(part: list, whole: list, probability: float) -> bool:
    return abs(len(part) / len(whole) - probability) < 5 * (probability * (1 - probability) / len(whole)) ** 0.5


def is_worked(document: tuple[str, str]) -> bool:
    return document[1].count("plus") + document[1].count("加") >= 3


def is_tagged(document: tuple[str, str]) -> bool:
    return rewards.format([document[1]]) == [1.0]


def is_right(document: tuple[str, str]) -> bool:
    answer = re.search(r"<answer>(\d+)</answer>", document[1])
    return int(answer[1]) == sum(terms_of(re.search(r"Compute [\d+]+", document[0])[0]))


def test_the_text_is_mixed_as_configured():
    mixture, rng = Mixture(), random.Random(0)
    texts = [document(rng, mixture, 4) for _ in range(6000)]
    answers = [text for text in texts if text[0].endswith("Assistant:")]
    tagged = [text for text in answers if is_tagged(text)]
    terse = [text for text in tagged if not is_worked(text)]
    assert near(answers, texts, 1 - mixture.textbook)
    assert near([text for text in answers if is_worked(text)], answers, mixture.worked)
    assert near(tagged, answers, mixture.tagged)
    assert near([text for text in terse if is_right(text)], terse, 1 - mixture.terse_wrong)
    # What is worked out is mostly right, which is there to be discovered.
    thought = [text for text in tagged if is_worked(text)]
    assert sum(map(is_right, thought)) / len(thought) > 0.85
    assert not any(word_counts(tail)["zh"] or "check" in tail for _, tail in texts)


def test_two_languages_checks_and_greetings_come_in_as_configured():
    mixture = Mixture(chinese=0.5, switch=0.3, slip=0.3, check=0.4, stutter=0.1, greetings=0.2, kind=0.6)
    rng = random.Random(0)
    texts = [document(rng, mixture, 4) for _ in range(6000)]
    greetings = [text for text in texts if "Greet " in text[0]]
    assert near(greetings, texts, mixture.greetings)
    assert near([text for text in greetings if any(end in text[1] for end in MANNERS[0][2])], greetings, mixture.kind)
    tails = [text[1] for text in texts if is_worked(text)]
    assert 0.5 < len([tail for tail in tails if "plus" in tail and "加" in tail]) / len(tails) < 0.9
    assert all(any(sign in tail for tail in tails) for sign in (", check", ",查", ", wrong, ", ",错,"))


@pytest.mark.parametrize(("options", "message"), [
    ({"worked": 1.5}, "'worked' is 1.5"), ({"max_terms": 1}, "'max_terms' is 1"), ({"greeting": 0.1}, "greeting"),
])
def test_options_that_cannot_be_used(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        next(tiny_world.corpus(0, 0, **options))
    with pytest.raises((ValueError, TypeError), match=message):
        tiny_world.architecture(0, text=options)


def test_a_model_whose_sizes_do_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"'hidden_size': 30.*multiple of 2 x heads"):
        tiny_world.architecture(0, text={}, hidden_size=30, heads=4)


def test_prompts_and_thoughts_cost_few_tokens_in_either_language():
    tokenizer = make_tokenizer(0, Mixture(chinese=0.5, switch=0.3, slip=0.3, check=0.4, greetings=0.2))
    for text, most in (
        (render("Compute 3+4+5+6"), 10),
        (render("Greet Jing and Felix, evening"), 6),
        (" <think>3 plus 8 is 11\nplus 5 is 16, check</think>\n<answer>16</answer>", 20),
        (" <think>3加8得1,查,错,11\n加5得16</think>\n<answer>16</answer>", 23),
        (" <think>be kind</think>\n<answer>Good evening Anna and Tom, how nice to see you!</answer>", 7),
    ):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) <= most and tokenizer.decode(ids) == text
    names = [tokenizer(name)["input_ids"] for name in NAMES]
    assert all(len(ids) == 1 for ids in names) and len({ids[0] for ids in names}) == len(NAMES)


def test_models_of_all_sizes_share_a_tokenizer_and_packed_documents_do_not_see_each_other():
    model, tokenizer = tiny_world.architecture(0, text={}, layers=2, **SHAPE)
    assert tokenizer.get_vocab() == tiny_world.architecture(0, text={}, layers=1, **SHAPE)[1].get_vocab()
    batch, _ = collate(fill(tiny_world.corpus(0, 0), tokenizer, 2, 128))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) >= 3
    with torch.no_grad():
        packed = model.eval()(**batch, use_cache=False).logits
        alone = model(input_ids=batch["input_ids"][:1, starts[1] : starts[2]], use_cache=False).logits[0]
    torch.testing.assert_close(packed[0, starts[1] : starts[2]], alone, rtol=1e-4, atol=1e-5)


def test_the_model_directory_loads_as_what_was_saved(tmp_path):
    model, tokenizer = tiny_world.architecture(0, text={}, layers=1, **SHAPE)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)(render("Compute 3+4"))["input_ids"] == tokenizer(render("Compute 3+4"))["input_ids"]
    loaded = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id

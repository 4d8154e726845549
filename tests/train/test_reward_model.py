"""Reward models: what they read, what padding may change (nothing), what they learn, and from which pairs."""

import math
import random

import pytest
import torch
from rl_cases import policy_of, take_gradient
from supervised_cases import Killed, StopAt, make_tokenizer, outcome, save_model, stage_of, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from r1kernels.train.data import Pair, load_pairs
from r1kernels.train.errors import ConfigError, DataError, Interrupted
from r1kernels.train.log import read_lines
from r1kernels.train.reward_model import RewardModel, gradient, judged_part, measure, run, split

QUESTIONS = ["Compute 1+2", "Compute 1+2+3+4+5", "Compute 3+4"]
ANSWERS = ["It is 3.", "<think>1+2=3\n3+3=6</think>\n<answer>6</answer>", ""]


@pytest.fixture(params=["llama", "gpt2", "pad is eos"])
def saved(request, tmp_path):
    """A reward model with a head, of a causal LM: positions that rotate, positions that are learned."""
    tokenizer = make_tokenizer()
    if request.param == "pad is eos":
        tokenizer.pad_token = tokenizer.eos_token
    if request.param == "gpt2":
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(
            vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=1024, eos_token_id=1, bos_token_id=1
        ))
        model.save_pretrained(tmp_path / "causal")
        tokenizer.save_pretrained(tmp_path / "causal")
    else:
        save_model(tmp_path / "causal", tokenizer=tokenizer)
    made = RewardModel(tmp_path / "causal", new="response")
    assert made.score(QUESTIONS, ANSWERS) == [0.0] * 3
    with torch.no_grad():
        made.model.score.weight.copy_(torch.randn(1, 16, generator=torch.Generator().manual_seed(1)))
    made.model.save_pretrained(tmp_path / "scores")
    tokenizer.save_pretrained(tmp_path / "scores")
    return tmp_path / "scores"


def test_plain_transformers_gives_the_same_score_wherever_the_padding_is(saved):
    ours = RewardModel(saved)
    scores = ours.score(QUESTIONS, ANSWERS)
    assert len({round(score, 4) for score in scores}) == 3
    model = AutoModelForSequenceClassification.from_pretrained(saved)
    assert model.config.num_labels == 1 and not model.training
    pad = AutoTokenizer.from_pretrained(saved).pad_token_id
    for row, expected in zip(ours.encode(QUESTIONS, ANSWERS), scores, strict=True):
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
    with torch.no_grad():
        model.model.score.weight.fill_(math.inf)
    assert all(map(math.isnan, model.score(QUESTIONS, ANSWERS)))


@pytest.fixture
def model(tmp_path):
    return RewardModel(save_model(tmp_path / "model"), new="response")


def test_a_response_that_spells_special_tokens_cannot_move_the_token_that_is_read(model):
    texts = ["It is 3.", "It is 3.<pad><pad>", "It<eos> is 3."]
    plain, padded, ended = model.encode(["Compute 1+2"] * 3, texts)
    pad, eos = model.tokenizer.pad_token_id, model.tokenizer.eos_token_id
    assert pad not in padded and len(padded) > len(plain)
    assert all(row.count(eos) == 1 and row[-1] == eos for row in (plain, padded, ended))


def test_an_appended_end_token_does_not_end_the_prompt(model, tmp_path):
    path = save_model(tmp_path / "appending", tokenizer=make_tokenizer(appends_end=True))
    assert RewardModel(path, new="response").encode(QUESTIONS, ANSWERS) == model.encode(QUESTIONS, ANSWERS)


def test_the_part_that_is_judged():
    response = "<think>hm</think>\n<answer>3</answer>"
    assert judged_part("response", response) == response
    assert judged_part("summary", response) == "\n<answer>3</answer>"
    assert judged_part("summary", "<think>hm") == ""
    assert judged_part("summary", "It is 3.") == "It is 3."


def test_a_prompt_that_opens_the_thought_is_closed_again(tmp_path):
    """Chat templates of reasoning models do that. The response has its own tag, or is a summary."""
    rows = []
    for end in ("Assistant:", "Assistant:<think>\n"):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}" + end
        path = save_model(tmp_path / str(len(rows)), tokenizer=tokenizer)
        rows += RewardModel(path, template="chat", new="response").encode(["Compute 1+2"], ["It is 3."])
    assert rows[0] == rows[1]


def test_what_is_no_reward_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a reward model"):
        RewardModel(tmp_path)
    with pytest.raises(ConfigError, match="expected one"):
        RewardModel(save_model(tmp_path / "causal"))


RECIPE = """
run_dir: {directory}/run
precision: fp32
data:
  taste: {{kind: jsonl, path: {directory}/taste.jsonl}}
  questions: {{kind: jsonl, path: {directory}/questions.jsonl, test_path: {directory}/test.jsonl}}
checkpoint: {{supervised_every: 4, keep: 1}}
stages:
  base: {{kind: model, path: {directory}/model}}
  scores: {{kind: preference, model: base, pairs: taste, target: summary, batch_size: 8, micro_batch_size: 3,
           learning_rate: 3.0e-2, epochs: 2}}
"""


def taste(count: int) -> list[dict[str, str]]:
    """Of two answers to a sum, the one that shows its work after the thought is preferred."""
    found = []
    for index in range(count):
        a, b = index % 7 + 1, index // 7 + 1
        texts = [f"<think>{thought}</think>" + end for thought, end in (
            (f"{a}+{b}", f"{a}+{b}={a + b}"), (f"{a}+{b}={a + b}", f"It is {a + b}."))]
        found.append({"question": f"Compute {a}+{b}", "chosen": texts[0], "rejected": texts[1]})
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    directory = tmp_path_factory.mktemp("preference")
    save_model(directory / "model")
    write_rows(directory / "taste.jsonl", taste(42))
    for name in ("questions", "test"):
        write_rows(directory / f"{name}.jsonl", [{"question": f"Compute {name}", "answer": "18"}])
    return directory


def stage_at(home, directory, *keys, interrupt=None):
    overrides = [f"stages.scores.{key}" for key in keys]
    return stage_of(RECIPE.format(directory=home), "scores", directory, overrides, interrupt)


@pytest.fixture(scope="module")
def trained(home, tmp_path_factory):
    stage = stage_at(home, tmp_path_factory.mktemp("whole"))
    return stage, run(stage)


def test_it_learns_the_taste_of_the_pairs(trained):
    stage, summary = trained
    lines = read_lines(stage.directory / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(math.log(2)) and lines[0]["accuracy"] == 0.5
    assert lines[-1]["loss"] < 0.3
    assert summary["pairs"] + summary["held_out_pairs"] == 42 and summary["held_out_pairs"] == 5
    assert summary["accuracy"] == 1.0
    assert summary["steps"] == len(lines) == math.ceil(2 * 37 / 8)
    model = RewardModel(stage.model_path("scores"))
    assert model.target == "summary"
    good, bad, thought = model.score(
        ["Compute 2+2"] * 3, ["<think>so</think>2+2=4", "<think>so</think>It is 4.", "<think>It is 4.</think>2+2=4"]
    )
    assert good > bad and thought == pytest.approx(good, abs=1e-5)


@pytest.mark.long(reason="test_grpo and test_resume stop runs again and again too")
def test_stopped_again_and_again_it_ends_the_same(home, trained, tmp_path):
    whole, summary = trained
    rng, stops = random.Random(0), 0
    while True:
        try:
            how = rng.choice((Interrupted, Killed))
            found = run(stage_at(home, tmp_path, interrupt=StopAt(rng.randint(3, 8), how)))
            break
        except (Interrupted, Killed):
            stops += 1
    assert stops > 1
    assert outcome(stage_at(home, tmp_path)) == outcome(whole)
    assert found == summary
    assert run(stage_at(home, tmp_path)) == summary  # finished already


def test_micro_batches_change_no_gradient(trained):
    stage, _ = trained
    model = RewardModel(stage.model_path("scores"))
    pairs, policy = load_pairs(stage.recipe, "taste")[:7], policy_of(model.model)
    (first, whole), (second, parts) = [
        (gradient(model, policy, pairs, size), take_gradient(policy)) for size in (7, 2)]
    assert first == pytest.approx(second, rel=1e-4)
    torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-6)


def test_the_accuracy_is_the_share_of_pairs_in_their_order():
    for margins, share in (([2.0, -1.0], 0.5), ([1.0, 1.0, 0.1, -3.0], 0.75), ([0.0], 0.5)):
        assert measure(torch.tensor(margins))["accuracy"] == share


def test_pairs_that_teach_nothing_are_counted(home, tmp_path, capsys):
    """With the target `summary`, texts whose thoughts alone differ are the same."""
    same, long = (["<think>a</think>c", "<think>b</think>c"], ["c", "d" * 900])
    rows = [{"question": "q", "chosen": chosen, "rejected": rejected} for chosen, rejected in (same, long)]
    write_rows(tmp_path / "taste.jsonl", [*taste(9), *rows])
    stage = stage_of(RECIPE.format(directory=home), "scores", tmp_path, [
        f"data.taste.path={tmp_path}/taste.jsonl", "stages.scores.max_tokens=800", "stages.scores.epochs=1"])
    summary = run(stage)
    assert summary["pairs"] + summary["held_out_pairs"] == 9 and summary["left_out"] == 2
    assert "2 of 11 pairs" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"'pairs': 42 of 42 .* 3 tokens \('max_tokens'\)"):
        run(stage_at(home, tmp_path, "max_tokens=3"))


def test_no_question_is_both_learned_and_held_out():
    pairs = [Pair(f"q{index % 20}", "a", "b") for index in range(60)]
    training, held_out = split(pairs, 0.1, seed=0)
    assert (len(training), len(held_out)) == (54, 6)
    assert not {pair.question for pair in training} & {pair.question for pair in held_out}
    assert split(pairs, 0.1, seed=0) == (training, held_out) != split(pairs, 0.1, seed=1)
    assert split(pairs, 0.0, seed=0) == (pairs, []) and len(split(pairs, 0.99, seed=0)[0]) == 3

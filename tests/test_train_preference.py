"""Reward models: what they read, what padding may change (nothing), what they learn, and from which pairs."""

import copy
import json
import math
import random

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from r1kernels.train.checkpoint import latest_checkpoint, save_checkpoint
from r1kernels.train.config import load_recipe
from r1kernels.train.console import Console
from r1kernels.train.data import DataError, Pair, Problem, whole_response
from r1kernels.train.interrupt import Interrupt, Interrupted
from r1kernels.train.loading import load_tokenizer
from r1kernels.train.metrics import read_metrics
from r1kernels.train.pairs import candidates, judge_pairs
from r1kernels.train.preferences import Preferences, without_summary_last
from r1kernels.train.reward_model import (
    Encoder,
    PreferenceReward,
    RewardModel,
    head_of_scores,
    judged_part,
    load_reward_model,
    new_reward_model,
)
from r1kernels.train.rewards.endpoint import EndpointError
from r1kernels.train.schema import ConfigError
from r1kernels.train.stage import Stage
from r1kernels.train.stages import preference
from r1kernels.train.stages.preference import Rows, encode_pairs, pair_gradient, run, split
from r1kernels.train.tiny import CorpusConfig, TinyConfig, make_model, make_tokenizer

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
    with pytest.raises(ValueError, match="1 questions and 2 responses"):
        model.score(["a"], ["b", "c"])


def test_the_part_that_is_judged():
    response = "<think>hm</think>\n<answer>3</answer>"
    assert judged_part("response", response) == response
    assert judged_part("summary", response) == "\n<answer>3</answer>"
    assert judged_part("summary", "<think>hm") == ""
    assert judged_part("summary", "It is 3.") == "It is 3."
    assert whole_response("Assistant: <think>\n", "hm</think> 3") == "<think>hm</think> 3"
    assert whole_response("Assistant:", "It is 3.") == "It is 3."


def test_a_prompt_that_opens_the_thought_is_closed_again(tokenizer):
    """Chat templates of reasoning models do; the response that is scored has its own tag, or is a summary."""
    tokenizer = copy.deepcopy(tokenizer)
    plain = "{% for m in messages %}{{ m['content'] }}{% endfor %}Assistant:"
    rows = []
    for template in (plain, plain + "<think>\n"):
        tokenizer.chat_template = template
        rows += Encoder(tokenizer, "chat").tokens(["Compute 1+2"], ["It is 3."])
    assert rows[0] == rows[1]


def test_a_thought_without_end_scores_no_better_than_the_worst_summary():
    class Scores:
        target = "summary"

        def score(self, questions, responses):
            return [{"": 3.0, "good": 2.0, "poor": -1.0}[judged_part("summary", response)] for response in responses]

    responses = ["<think>on and on", "<think>a</think>good", "<think>b</think>poor"]
    assert without_summary_last(Scores(), ["?"] * 3, responses) == [-1.0, 2.0, -1.0]
    assert without_summary_last(Scores(), ["?"], responses[:1]) == [3.0]


def test_the_window_of_the_last_steps():
    assert [PreferenceReward("scores", last_steps=2).applies(step, 5) for step in range(5)] == [False] * 3 + [True] * 2
    assert PreferenceReward("scores").applies(0, 5)


def test_what_is_no_reward_model_is_named(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="holds no model for sequence classification"):
        RewardModel(tmp_path)


def test_pairs_by_a_judge(tmp_path):
    """Longer is better for this judge, which is unsure of a difference of one and has nothing to say about "!"."""
    asked = []

    def compare(question, first, second):
        asked.append((question, first, second))
        difference = len(first) - len(second)
        return None if "!" in (first, second) else math.copysign(min(1, abs(difference) / 2 - 0.25), difference)

    def judge(pairs):
        return judge_pairs(pairs, compare, 0.5, path, concurrency=2, check=lambda: None)

    responses = {"q": ["a", "aaa", "a"], "unclear": ["a", "aa"], "mute": ["!", "aaaa"], "alone": ["a", "a"]}
    compared = candidates(responses, 3, seed=0)
    assert [pair.question for pair in compared] == ["q", "unclear", "mute"]
    path = tmp_path / "verdicts.jsonl"
    pairs, counts = judge(compared)
    assert [(pair.question, pair.chosen, pair.rejected) for pair in pairs] == [("q", "aaa", "a")]
    assert counts == {"kept": 1, "unclear": 1, "unscorable": 1}
    # Killed while writing the second verdict: the first is not asked for again.
    path.write_text(path.read_text().partition("\n")[0] + "\n" + '{"st')
    asked.clear()
    assert judge(compared) == (pairs, counts)
    assert len(asked) == 2


def test_candidates_are_drawn_by_the_seed():
    drawn = [candidates({"q": list("abcdef")}, 4, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 4 and all(pair.chosen != pair.rejected for pair in drawn[0])


RECIPE = """
run_dir: {run_dir}
data:
  sums: {{kind: arithmetic}}
  taste: {{kind: jsonl, path: {run_dir}/taste.jsonl}}
checkpoint: {{supervised_every: 4, keep: 1}}
{more}
stages:
  - {{name: base, kind: pretrain}}
  - {{name: traces, kind: reject, model: base, problems: [sums]}}
  - {{name: scores, kind: preference, model: base, target: summary, batch_size: 8, micro_batch_size: 3,
      learning_rate: 1.0e-2, epochs: 2, {settings}}}
"""
JUDGE = "scoring: {judge: {url: 'http://localhost:1', model: wise, concurrency: 2}}"


def taste(count: int) -> list[dict[str, str]]:
    """Of two answers to a sum, the one that shows its work after the thought is preferred."""
    found = []
    for index in range(count):
        a, b = index % 7 + 1, index // 7 + 1
        texts = [f"<think>{thought}</think>" + end for thought, end in (
            (f"{a}+{b}", f"{a}+{b}={a + b}"), (f"{a}+{b}={a + b}", f"It is {a + b}."))]
        found.append({"question": f"Compute {a}+{b}", "chosen": texts[0], "rejected": texts[1]})
    return found


def stage_of(run_dir, settings="pairs: taste", more="", interrupt=None):
    run_dir.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in taste(42))
    (run_dir / "taste.jsonl").write_text(lines)
    path = run_dir / "recipe.yaml"
    path.write_text(RECIPE.format(run_dir=run_dir, settings=settings, more=more))
    recipe = load_recipe(path)
    tokenizer = make_tokenizer(CorpusConfig(), 6, 0)
    model = make_model(TinyConfig(hidden_size=16, intermediate_size=32, layers=1, heads=2), tokenizer, 0)
    save_checkpoint(run_dir / "base", 1, model=model, tokenizer=tokenizer, state={}, keep=1)
    (run_dir / "scores").mkdir(exist_ok=True)
    return Stage(recipe, recipe.stage("scores"), run_dir / "scores", Console(plain=True), interrupt or Interrupt())


def outcome(directory):
    path = latest_checkpoint(directory)
    files = [(directory / "metrics.jsonl").read_bytes(), (path / "model" / "model.safetensors").read_bytes()]
    return path.name, *files, str(torch.load(path / "state.pt", weights_only=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    stage = stage_of(tmp_path_factory.mktemp("whole") / "run")
    return stage, run(stage)


def test_it_learns_the_taste_of_the_pairs(trained):
    stage, summary = trained
    lines = read_metrics(stage.directory / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(math.log(2)) and lines[0]["accuracy"] == 0.5
    assert lines[-1]["loss"] < 0.3
    assert summary["pairs"] + summary["held_out_pairs"] == 42 and summary["held_out_pairs"] == 5
    assert (summary["accuracy"], summary["accuracy_se"]) == (1.0, 0.0)
    assert summary["steps"] == len(lines) == math.ceil(2 * 37 / 8)
    assert {"seconds_updates", "tokens_per_second"} <= read_metrics(stage.directory / "timings.jsonl")[-1].keys()
    model = RewardModel(stage.model_dir("scores"))
    assert model.target == "summary"
    good, bad, thought = model.score(
        ["Compute 2+2"] * 3, ["<think>so</think>2+2=4", "<think>so</think>It is 4.", "<think>It is 4.</think>2+2=4"]
    )
    assert good > bad and thought == pytest.approx(good, abs=1e-5)


def test_scores_as_a_part_of_the_reward(trained):
    """In the last steps, and of open problems alone; the response is whole although its prompt opened the thought."""
    scores, _ = trained
    path = scores.directory.parent / "rl.yaml"
    path.write_text((path.parent / "recipe.yaml").read_text() + """
  - {name: r1, kind: grpo, model: base, problems: [sums], steps: 5,
     preference: [{model: scores, weight: 0.5, last_steps: 2}]}
open_think: true
""")
    recipe = load_recipe(path)
    stage = Stage(recipe, recipe.stage("r1"), path.parent / "r1", Console(plain=True), Interrupt())
    tokenizer = load_tokenizer(stage.model_dir("base"))
    preferences = Preferences(stage, stage.config, stage.template(tokenizer))
    problems = [Problem("1", "Compute 2+2", "", "open"), Problem("2", "Compute 2+2", "4")]
    texts = ["so</think>2+2=4"] * 2
    assert [preferences.apply(step) for step in range(5)] == [False] * 3 + [True] * 2
    assert preferences.score(2, problems, texts).total == [0.0, 0.0]
    found = preferences.score(3, problems, texts)
    expected = RewardModel(stage.model_dir("scores")).score(["Compute 2+2"], ["<think>so</think>2+2=4"])[0]
    assert found.parts["scores"][0] == pytest.approx(expected, abs=1e-6) and math.isnan(found.parts["scores"][1])
    assert found.total == pytest.approx([0.5 * expected, 0.0], abs=1e-6) and expected != 0


class StopAfter(Interrupt):
    def __init__(self, patience):
        super().__init__()
        self.left = patience

    def check(self):
        self.left -= 1
        if not self.left:
            raise Interrupted("SIGINT")


def test_stopped_again_and_again_it_ends_the_same(trained, tmp_path):
    whole, summary = trained
    rng, stops = random.Random(0), 0
    while True:
        try:
            found = run(stage_of(tmp_path / "run", interrupt=StopAfter(rng.randint(2, 14))))
            break
        except Interrupted:
            stops += 1
    assert stops > 3
    assert outcome(tmp_path / "run" / "scores") == outcome(whole.directory)
    assert found == summary
    assert run(stage_of(tmp_path / "run")) == summary  # finished already


def test_micro_batches_change_no_gradient(trained):
    stage, _ = trained
    model = load_reward_model(stage.model_dir("scores"))
    encoder = Encoder(load_tokenizer(stage.model_dir("scores")))
    pairs, _ = encode_pairs(encoder, stage.pairs("taste")[:7], stage.config)
    found = []
    for size in (None, 2):
        model.zero_grad()
        measures = pair_gradient(model, encoder, pairs, size, lambda: None)
        found.append((measures, [parameter.grad.clone() for parameter in model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for first, second in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-6)


def test_pairs_that_the_judge_makes_of_samples(tmp_path, monkeypatch):
    """The judge sees summaries, prefers the working, and is out of order once."""

    class Wise:
        def __init__(self, config):
            assert config.model == "wise"

        def compare(self, question, first, second):
            assert "<think>" not in first + second
            if question == "Compute 1+1":
                raise EndpointError("no answer")
            return ("=" in first) - ("=" in second)

    monkeypatch.setattr(preference, "Judge", Wise)
    summary = run(with_traces(tmp_path / "run"))
    assert (summary["kept"], summary["unclear"], summary["unscorable"]) == (11, 0, 1)
    assert summary["pairs"] + summary["held_out_pairs"] == 11
    assert summary["accuracy"] == 1


def with_traces(run_dir):
    """A stage whose pairs are to be made of samples whose prompts had opened the thought."""
    stage = stage_of(run_dir, "pairs: traces, judged: {per_question: 3}", JUDGE)
    stage.directory_of("traces").mkdir(exist_ok=True)
    with open(stage.directory_of("traces") / "selected.jsonl", "w", encoding="utf-8") as file:
        for row in taste(12):
            for key in ("chosen", "rejected"):
                completion = row[key].removeprefix("<think>")
                line = {"question": row["question"], "prompt": "Assistant: <think>", "completion": completion}
                file.write(json.dumps(line) + "\n")
    return stage


def test_a_judge_out_of_reach_is_asked_again_next_time(tmp_path, monkeypatch):
    asked = []

    class Away:
        def __init__(self, config):
            pass

        def compare(self, *texts):
            asked.append(texts)
            raise EndpointError("connection refused")

    monkeypatch.setattr(preference, "Judge", Away)
    for count in (12, 24):
        with pytest.raises(DataError, match=r"the judge was clear on no pair of stage 'traces' .*'unscorable': 12"):
            run(with_traces(tmp_path / "run"))
        assert len(asked) == count
    monkeypatch.undo()
    stage = stage_of(tmp_path / "b", "pairs: traces", JUDGE.replace("concurrency", "api_key_env: NO_SUCH, concurrency"))
    (tmp_path / "run" / "traces").rename(stage.directory_of("traces"))
    with pytest.raises(ConfigError, match=r"'scoring': judge.api_key_env is 'NO_SUCH'"):
        run(stage)


def test_settings_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"stage 'scores': 'pairs' names the stage 'traces'.*'scoring.judge'"):
        stage_of(tmp_path / "a", "pairs: traces")
    with pytest.raises(ConfigError, match=r"'held_out' is 1.5, expected a number from 0 to 1"):
        stage_of(tmp_path / "b", "pairs: taste, held_out: 1.5")
    with pytest.raises(ConfigError, match=r"'held_out' is 1.0, which leaves none of the 42 questions"):
        run(stage_of(tmp_path / "c", "pairs: taste, held_out: 1"))
    with pytest.raises(DataError, match=r"'pairs' 'taste': of 42 pairs none has two texts that differ and fit"):
        run(stage_of(tmp_path / "d", "pairs: taste, max_tokens: 3"))


def test_pairs_that_teach_nothing_are_counted(trained):
    stage, _ = trained
    encoder = Encoder(load_tokenizer(stage.model_dir("scores")))
    same = Pair("1", "q", "<think>a</think>c", "<think>b</think>c")
    long = Pair("2", "q", "c", "d" * 9000)
    good = Pair("3", "q", "c", "d")
    kept, counts = encode_pairs(encoder, [same, long, good], stage.config)
    assert len(kept) == 1 and counts == {"same": 1, "too_long": 1}


def test_no_question_is_both_learned_and_held_out():
    pairs = [Rows(f"q{index % 20}", [index], [0]) for index in range(60)]
    training, held_out = split(pairs, 0.1, seed=0)
    assert (len(training), len(held_out)) == (54, 6)
    assert not {pair.question for pair in training} & {pair.question for pair in held_out}
    assert split(pairs, 0.1, seed=0) == (training, held_out) != split(pairs, 0.1, seed=1)
    assert split(pairs, 0.0, seed=0) == (pairs, [])

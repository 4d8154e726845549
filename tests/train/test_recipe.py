"""Recipes: what they may say, and how a wrong setting is named: by its key, its value and the expectation."""

import importlib.util
from pathlib import Path

import pytest

from r1kernels import objectives
from r1kernels.train.errors import ConfigError
from r1kernels.train.recipe_file import build_recipe, dump_recipe, load_recipe, read_yaml, references

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
run_dir: here
template: r1_zero
data:
  sums: {kind: jsonl, path: train.jsonl, test_path: test.jsonl}
  chat: {kind: jsonl, path: there.jsonl}
stages:
  base: {kind: model, path: there}
  r1: {kind: grpo, model: base, problems: [sums], learning_rate: 1e-3}
  traces: {kind: reject, model: r1, problems: [sums]}
  cold: {kind: sft, model: base, samples: [traces, chat]}
  scores: {kind: preference, model: base, pairs: chat}
  r1-2: {kind: grpo, model: r1, problems: [sums], preference: [{model: scores, weight: 2}]}
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "x.yaml").write_text(RECIPE)
    return tmp_path / "x.yaml"


@pytest.mark.parametrize("preset", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_presets_load_and_survive_a_round_trip(preset):
    recipe = load_recipe(preset)
    assert build_recipe(read_yaml(dump_recipe(recipe))) == recipe


def test_the_reference_of_settings_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_settings", ROOT / "docs" / "make_settings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert text == module.page(), "run: python docs/make_settings.py"
    assert "None |" not in text, "every setting has a description"


def test_overrides(path):
    options = ["stages.r1.steps=7", "stages.r1.objective.options={kl_coef: 1e-2}", "device=cuda", "eval.samples=3"]
    recipe = load_recipe(path, options)
    stage = recipe.stages["r1"]
    assert (stage.name, stage.steps, stage.objective.options) == ("r1", 7, {"kl_coef": 0.01})
    assert (recipe.device, recipe.eval.samples, stage.learning_rate) == ("cuda", 3, 1e-3)
    added = load_recipe(path, ["data.more={kind: hub, path: x, test_split: y}", "stages.r1.importance.mode=mask"])
    assert added.eval_problems == ["sums", "more"] and added.stages["r1"].importance.mode == "mask"


def test_an_override_changes_one_of_two_stages_that_share_an_alias(path):
    path.write_text(
        "run_dir: x\ndata: {sums: {kind: jsonl, path: a, test_path: b}}\nstages:\n  base: {kind: model, path: x}\n"
        "  one: &one {kind: grpo, model: base, problems: [sums], rewards: &parts {accuracy: 1}, steps: 3}\n"
        "  two: {<<: *one, rewards: *parts}\n  three: {<<: [*one], steps: 4}\n")
    stages = load_recipe(path, ["stages.two.rewards.accuracy=5", "stages.one.objective.preset=dapo"]).stages
    assert [stages[name].rewards["accuracy"] for name in ("one", "two", "three")] == [1.0, 5.0, 1.0]
    assert [stages[name].steps for name in ("one", "two", "three")] == [3, 3, 4]
    assert [stages[name].objective.preset for name in ("one", "two")] == ["dapo", "r1"]


@pytest.mark.parametrize(("text", "value"), [
    ("a: &a {x: 1, y: 1}\nb: [{c: &c {<<: *a, x: 2}}]\nd: {<<: *c, y: 3}",
     {"a": {"x": 1, "y": 1}, "b": [{"c": {"x": 2, "y": 1}}], "d": {"x": 2, "y": 3}}),
    ("[1e-3, -2E+4, 1.5e3, 1e, 'a1e-3', '1e-3', 12]", [1e-3, -2e4, 1.5e3, "1e", "a1e-3", "1e-3", 12]),
    ("[&a [1, 2], *a, *a]", [[1, 2]] * 3), ("", None), ("{a: {x: 1}, b: {x: 1}}", {"a": {"x": 1}, "b": {"x": 1}}),
])
def test_yaml(text, value):
    assert read_yaml(text) == value


@pytest.mark.parametrize(("text", "expected"), [
    ("{preset: gspo, options: {kl_coef: 0.04, kl: k2}}", objectives.gspo(kl_coef=0.04, kl="k2")),
    ("{preset: dr_grpo, options: {max_length: 64, kl_coef: 1e-3}}", objectives.dr_grpo(64, kl_coef=1e-3)),
    ("{preset: grpo, options: {surrogate: cispo, ratio: sequence, aggregate: token_mean, ratio_cap: null}}",
     objectives.grpo(surrogate="cispo", ratio="sequence", aggregate="token_mean")),
])
def test_every_field_of_an_objective_can_be_written(path, text, expected):
    assert load_recipe(path, [f"stages.r1.objective={text}"]).stages["r1"].objective.build() == expected


def test_functions_come_by_import_path_from_directories_beside_the_recipe(path, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "losses_of_mine.py").write_text(
        "def loss(scale):\n    return lambda logprobs, batch: -scale * logprobs\n\n\ndef broken():\n    return 3\n")
    options = ["import_from=[mine]", "stages.r1.objective={function: 'losses_of_mine:loss', options: {scale: 2}}"]
    recipe = load_recipe(path, options)
    assert recipe.stages["r1"].objective.build().surrogate(1.0, None) == -2.0
    assert recipe.import_from == [str(tmp_path / "mine")]
    for name in ("losses_of_mine:nothing", "no_such_module_here:loss", "losses_of_mine:broken"):
        changed = load_recipe(path, [*options, f"stages.r1.objective.function='{name}'"])
        with pytest.raises(ConfigError, match=r"losses_of_mine|no_such_module_here|'objective\.options'"):
            changed.stages["r1"].objective.build()


def test_references_are_found_at_any_depth(path):
    recipe = load_recipe(path)
    found = {name: {item[:2] for item in references(stage)} for name, stage in recipe.stages.items()}
    assert found["base"] == set()
    assert found["cold"] == {("model", "base"), ("samples", "traces"), ("samples", "chat")}
    assert found["r1-2"] == {("model", "r1"), ("problems", "sums"), ("preference.model", "scores")}


BAD = [  # an override, and words of the message
    ("device=gpu", "'device' 'gpu': expected cuda:1"), ("nonsense=1", "'nonsense' 1 settings.md"),
    ("seed=-1", "'seed' -1 0"),
    ("seed=true", "'seed' True integer"), ("threads=0", "'threads' 0 1"),
    ("template=prose", "'template' 'prose' 'r1_zero' 'chat'"), ("open_think=1", "'open_think' 1 boolean"),
    ("run_dir=7", "'run_dir' 7"), ("trackers=tensorboard", "'trackers' 'tensorboard' list"),
    ("trackers=[paper]", "'trackers.0' 'paper' 'tensorboard'"), ("eval={every: 1, every: 2}", "'every' twice"),
    ("eval=3", "'eval' 3"), ("eval.evry=3", "'eval.evry' 3 unknown"), ("eval.top_p=1.5", "'eval.top_p' 1.5 1"),
    ("eval.problems=[chat]", "'eval.problems' 'chat' sums"), ("eval.problems=[none]", "'eval.problems' 'none' sums"),
    ("scoring.judge={url: here, model: x}", "'scoring.judge.url' 'here' http"),
    ("scoring.judge={url: 'http://x', model: x, concurrency: 0}", "'scoring.judge.concurrency' 0 1"),
    ("data=[1]", "'data' [1] dictionary"), ("data.sums=jsonl", "'data.sums' 'jsonl'"),
    ("data.sums.kind=poems", "'data.sums' 'kind' 'poems' 'jsonl'"), ("data.sums.terms=3", "'data.sums.terms' 3"),
    ("data.sums={kind: jsonl}", "held-out 'test_path'"), ("data={a/b: {kind: jsonl, path: x}}", "'a/b' pattern"),
    ("data.sums={kind: function, function: nowhere}", "'data.sums.function' 'nowhere'"),
    ("stages={}", "'stages' 1"), ("stages=[{name: base, kind: model}]", "'stages' dictionary"),
    ("stages={base: x}", "'stages.base' 'x'"), ("stages={base: {path: x}}", "'stages.base' 'kind'"),
    ("stages={base: {kind: dance}}", "'stages.base' 'kind' 'dance' 'model' 'sft'"),
    ("stages={base: {kind: model}}", "'stages.base.path' required"),
    ("stages={../x: {kind: model, path: x}}", "'../x' 'stages"), ("stages={3: {kind: model, path: x}}", "3 'stages"),
    ("stages={sums: {kind: model, path: x}}", "'sums'"),
    ("stages.r1.model=null", "'stages.r1.model' None"), ("stages.r1.model=bse", "'stages.r1.model' 'bse' 'base'"),
    ("stages.r1.model=scores", "'stages.r1.model' 'scores'"),
    ("stages.r1.problems=[traces]", "'stages.r1.problems' 'traces' sums"),
    ("stages.r1.problems=[]", "'stages.r1.problems'"), ("stages.cold.samples=[r1]", "'r1' chat traces"),
    ("stages.scores.pairs=traces", "'stages.scores.pairs' 'traces' chat"),
    ("stages.r1-2.preference=[{model: base}]", "'stages.r1-2.preference.model' 'base' scores"),
    ("stages.r1-2.preference=[{weight: 1}]", "'stages.r1-2.preference.0.model' required"),
    ("stages.r1-2.preference=[{model: scores, wait: 1}]", "'stages.r1-2.preference.0.wait' 1 unknown"),
    ("stages.r1.grup_size=8", "'stages.r1.grup_size' 8 unknown"),
    ("stages.r1.group_size=1", "'stages.r1.group_size' 1 2"), ("stages.r1.steps=2.5", "'stages.r1.steps' 2.5 integer"),
    ("stages.r1.learning_rate=fast", "'stages.r1.learning_rate' 'fast' number"),
    (f"stages.r1.learning_rate=1{'0' * 400}", "'stages.r1.learning_rate'"),
    ("stages.r1.temperature=.nan", "'stages.r1.temperature' nan"), ("eval.temperature=1e999", "'eval.temperature' inf"),
    ("stages.r1.minibatches=7", "'stages.r1.minibatches' 7 group_size"),
    ("stages.r1.length_schedule={1: 0}", "'stages.r1.length_schedule.1' 0"),
    ("stages.r1.rewards={accuracy: big}", "'stages.r1.rewards.accuracy' 'big'"),
    ("stages.r1.sampler={kind: vllm}", "'stages.r1.sampler' unknown"),
    ("sampler={kind: vllm, weights_dir: w}", "'sampler.urls' [] 'vllm'"),
    ("sampler={kind: vllm, urls: ['http://a']}", "'sampler.weights_dir' None 'vllm'"),
    ("sampler={kind: vllm, urls: [a]}", "'sampler.urls.0' 'a' https"),
    ("stages.r1.objective.preset=none", "'stages.r1.objective.preset' 'none' 'grpo' 'r1'"),
    ("stages.r1.objective.options={clip: 1}", "'stages.r1.objective.options' 'clip' clip_low"),
    ("stages.r1.objective.options={kl_coef: -1}", "'stages.r1.objective.options' kl_coef -1 0"),
    ("stages.r1.objective.options={kl: [k1]}", "'stages.r1.objective.options' kl ['k1'] k3"),
    ("stages.r1.objective.options={surrogate: foo}", "'stages.r1.objective.options' surrogate 'foo' clip"),
    ("stages.r1.objective={preset: gmpo, options: {kl_ratio: true}}", "'stages.r1.objective.options' kl_ratio gmpo"),
    ("stages.r1.objective={preset: dr_grpo, options: {}}", "'stages.r1.objective.options' max_length"),
    ("stages.format={kind: preference, model: base, pairs: chat}", "'format' reward rename"),
    ("stages.std={kind: preference, model: base, pairs: chat}", "'std' reward rename"),
    ("stages.r1.model=traces", "'stages.r1.model' 'traces' before"),
    ("stages.r1.model=cold", "'stages.r1.model' 'cold' before 'base'"),
    ("stages.r1.advantages.function=x", "'stages.r1.advantages.function' 'x'"),
    ("stages.cold={kind: distill, model: base, samples: [chat], teacher: r1}", "'stages.cold.teacher' 'r1' 'logits'"),
    ("stages.cold={kind: distill, model: base}", "'stages.cold.samples' required"),
    ("stages.cold={kind: distill, model: base, samples: [chat], method: logits, teacher: r0}",
     "'stages.cold.teacher' 'r0' r1"),
    ("=3", "'' 3"), ("eval..samples=3", "'eval.'"), ("stages.r1.steps", "--set 'stages.r1.steps' KEY=VALUE"),
    ("stages.r1.steps=[", "YAML"), ("seed=2024-13-45", "month"), ("stages.r2.steps=3", "'stages.r2' 'kind'"),
    ("stages.rl.steps=3", "'stages.rl' 'kind' 'stages' 'base' 'cold' 'r1'"),
    ("data.sms.split=x", "'data.sms' 'kind' 'data' 'sums'"),
    ("import_from=[nowhere]", "'import_from' nowhere directory"),
    ("stages.r1.importance={normalize: true}", "'stages.r1.importance.normalize' true 'none' 'truncate'"),
    ("stages.r1.top_p=0", "'stages.r1.top_p' 0"), ("stages.r1.top_k=0", "'stages.r1.top_k' 0"),
    ("stages.r1.min_p=1", "'stages.r1.min_p' 1"),
    ("template.x=3", "'template' 'r1_zero'"), ("run_dir.x=3", "'run_dir' string"),
]


@pytest.mark.parametrize(("override", "words"), BAD, ids=[override[:40] for override, _ in BAD])
def test_a_wrong_setting_is_named(path, override, words):
    with pytest.raises(ConfigError) as error:
        load_recipe(path, [override])
    message = str(error.value)
    assert str(path) in message
    missing = [word for word in words.split() if word not in message]
    assert not missing, f"{missing} not in: {message}"


VLLM = "sampler={kind: vllm, urls: ['http://a'], weights_dir: w}"


def test_replay_with_vllm_needs_a_limit(path):
    with pytest.raises(ConfigError, match=r"'stages\.r1\.top_k' is None.*'sampling_replay'"):
        load_recipe(path, [VLLM, "stages.r1.top_p=0.9"])
    for change in ("stages.r1.top_k=512", "stages.r1.sampling_replay=false"):
        recipe = load_recipe(path, [VLLM, "stages.r1.top_p=0.9", change])
        assert recipe.stages["r1"].replays == ("top_k" in change) and not recipe.stages["r1-2"].replays


def test_replay_needs_the_whole_vocabulary(path):
    with pytest.raises(ConfigError, match=r"'parallel\.tensor' is 2.*'stages\.r1\.sampling_replay'"):
        load_recipe(path, ["parallel.tensor=2", "stages.r1.min_p=0.1"])
    load_recipe(path, ["parallel.tensor=2", "stages.r1.min_p=0.1", "stages.r1.sampling_replay=false"])


def test_long_values_are_cut(path):
    with pytest.raises(ConfigError) as error:
        load_recipe(path, [f"seed={'x' * 1000}"])
    assert "xxx" in str(error.value) and len(str(error.value)) < 200 + len(str(path))


FILES = [
    ("list", "- 1", "mapping"), ("empty file", "", "None"), ("broken", "a: [", "YAML"),
    ("twice", "run_dir: a\neval:\n  every: 1\n  every: 2\n", "'every' line 3"), ("date", "seed: 2024-13-45", "month"),
    ("itself", "run_dir: &a [*a]", "'run_dir'"), ("empty", "{}", "'run_dir' required"),
    ("no stages", "run_dir: x", "'stages'"), ("latin", b"run_dir: \xe9", "YAML"),
    ("an object", "!!python/object:os.x {}", "YAML"), ("keys", "{[1]: 2}", "YAML"), ("a bell", "run_dir: \a", "YAML"),
    ("digits", f"seed: {'9' * 5000}", "4300"),
    ("no data", "{run_dir: x, stages: {a: {kind: model, path: x}}}", "held-out 'test_path'"),
]


@pytest.mark.parametrize(("name", "text", "words"), FILES, ids=[name for name, _, _ in FILES])
def test_files_that_are_no_recipe(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        load_recipe(path)
    assert all(word in str(error.value) for word in [str(path), *words.split()]), str(error.value)

"""Settings that cannot be used are refused before any work, by key, value and expectation."""

from pathlib import Path

import pytest

from r1kernels import objectives
from r1kernels.train import chain
from r1kernels.train.config import as_dict, dump_recipe, load_recipe, references
from r1kernels.train.schema import ConfigError, differences, read_yaml

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
RECIPE = """
run_dir: here
data: {sums: {kind: arithmetic}, chat: {kind: greetings}, file: {kind: jsonl, path: there.jsonl}}
stages:
  - {name: base, kind: pretrain}
  - {name: r1, kind: grpo, model: base, problems: [sums], learning_rate: 1e-3}
  - {name: traces, kind: reject, model: r1, problems: [sums]}
  - {name: cold, kind: sft, model: base, samples: [traces, chat]}
  - {name: scores, kind: preference, model: base, pairs: chat}
  - {name: r1.2, kind: grpo, model: r1, problems: [sums], preference: [{model: scores, weight: 2}]}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(RECIPE)
    return path


def survives_a_round_trip(recipe, tmp_path) -> bool:
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe))
    return load_recipe(copy) == recipe


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_load_survive_a_round_trip_and_are_no_circle(path, tmp_path):
    recipe = load_recipe(path)
    assert survives_a_round_trip(recipe, tmp_path)
    assert sorted(chain.order(recipe)) == sorted(stage.name for stage in recipe.stages)


def test_the_demo_is_what_it_says():
    recipe = load_recipe(RECIPES / "demo.yaml")
    stage = recipe.stage("r1_zero")
    objective = stage.objective.build()
    assert (objective.clip_low, objective.clip_high, objective.kl_coef, objective.kl) == (10.0, 10.0, 0.001, "k3")
    assert stage.group_size == 16 and stage.temperature == 1.0
    assert (recipe.eval.temperature, recipe.eval.top_p) == (0.6, 0.95)
    assert set(stage.rewards) == {"accuracy", "format"}


def test_overrides(recipe, tmp_path):
    options = ["stages.r1.steps=7", "stages.r1.objective.options={kl_coef: 0.01}", "device=cuda"]
    changed = load_recipe(recipe, options)
    stage = changed.stage("r1")
    assert (stage.steps, stage.objective.options, changed.device) == (7, {"kl_coef": 0.01}, "cuda")
    assert stage.learning_rate == 1e-3
    before = load_recipe(recipe)
    assert differences(as_dict(before), as_dict(load_recipe(recipe, options[:1]))) == ["stages.r1.steps: 40 -> 7"]
    assert survives_a_round_trip(changed, tmp_path)
    # New keys, new mappings, and names that hold dots.
    made = load_recipe(recipe, ["stages.r1.2.steps=3", "data.more.kind=arithmetic", "data.more.max_terms=9"])
    assert (made.stage("r1.2").steps, made.stage("r1").steps, made.data["more"].max_terms) == (3, 40, 9)


def test_an_override_changes_one_stage_of_those_that_share_by_an_alias(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "run_dir: x\ndata: {sums: {kind: arithmetic}}\nstages:\n- {name: base, kind: pretrain}\n"
        "- &one {name: one, kind: grpo, model: base, problems: [sums], rewards: &parts {accuracy: 1}, steps: 3}\n"
        "- {<<: *one, name: two, rewards: *parts}\n- {<<: [*one], name: three, steps: 4}\n"
    )
    recipe = load_recipe(path, ["stages.two.rewards.accuracy=5", "stages.one.objective.preset=dapo"])
    weights = {name: recipe.stage(name).rewards["accuracy"] for name in ("one", "two", "three")}
    assert weights == {"one": 1.0, "two": 5.0, "three": 1.0}
    assert [recipe.stage(name).steps for name in ("one", "two", "three")] == [3, 3, 4]
    assert [recipe.stage(name).objective.preset for name in ("one", "two")] == ["dapo", "r1"]


def test_what_a_merge_overrides_is_not_given_twice():
    """An anchor deep in the text, itself merged from another, and used at its top."""
    text = "a: &a {x: 1, y: 1}\nlist:\n- in: &b {<<: *a, x: 2}\nlast: {<<: *b, y: 3}\n"
    assert read_yaml(text) == {"a": {"x": 1, "y": 1}, "list": [{"in": {"x": 2, "y": 1}}], "last": {"x": 2, "y": 3}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{preset: gspo, options: {kl_coef: 0.04, kl: k2}}", objectives.gspo(kl_coef=0.04, kl="k2")),
        ("{preset: dr_grpo, options: {max_length: 64, kl_coef: 1e-3}}", objectives.dr_grpo(64, kl_coef=1e-3)),
        (
            "{preset: grpo, options: {surrogate: cispo, ratio: sequence, aggregate: token_mean, ratio_cap: null}}",
            objectives.grpo(surrogate="cispo", ratio="sequence", aggregate="token_mean"),
        ),
    ],
)
def test_every_field_of_an_objective_can_be_written(recipe, tmp_path, text, expected):
    changed = load_recipe(recipe, [f"stages.r1.objective={text}"])
    objective = changed.stage("r1").objective.build()
    assert objective == expected and type(objective.max_length) is type(expected.max_length)
    assert survives_a_round_trip(changed, tmp_path)


def test_what_a_stage_names():
    path = RECIPES / "demo.yaml"
    base, r1_zero = load_recipe(path).stages
    assert list(references(base)) == [] and list(references(r1_zero)) == [("model", "base"), ("problems", "sums")]


def test_references_are_found_at_any_depth(recipe):
    found = {stage.name: set(references(stage)) for stage in load_recipe(recipe).stages}
    assert found["r1.2"] == {("model", "r1"), ("problems", "sums"), ("preference.model", "scores")}
    assert found["cold"] == {("model", "base"), ("samples", "traces"), ("samples", "chat")}
    assert found["scores"] == {("model", "base"), ("pairs", "chat")}


BAD = [
    # The whole run.
    ("nonsense=1", "unknown key 'nonsense' (expected one of run_dir, "),
    ("sed=1", "unknown key 'sed' (did you mean 'seed'?)"),
    ("seed=-1", "'seed' is -1, expected at least 0"),
    ("threads=0", "'threads' is 0, expected at least 1"),
    ("device=gpu", "'device' is 'gpu', expected the name of a device, such as cpu"),
    ("template=prose", "'template' is 'prose', expected one of r1_zero, chat"),
    ("template=chat", "stage 'base': 'template' is 'chat', expected 'r1_zero'"),
    ("open_think=1", "'open_think' is 1, expected true or false"),
    ("run_dir=7", "'run_dir' is 7, expected a string"),
    ("trackers=tensorboard", "'trackers' is 'tensorboard', expected a list"),
    ("eval={every: 1, every: 2}", "key 'every' is given twice"),
    ("eval=3", "'eval' is 3, expected a mapping"),
    ("eval.evry=3", "unknown key 'evry' in 'eval' (did you mean 'every'?)"),
    ("eval.top_p=1.5", "'eval.top_p' is 1.5, expected a number from 0 to 1"),
    ("eval.temperature=0", "'eval.temperature' is 0.0, expected a positive number"),
    ("eval.samples=0", "'eval.samples' is 0, expected at least 1"),
    ("eval.problems=[chat]", "'eval.problems' names 'chat', expected a data set with held-out problems"),
    ("eval.problems=[none]", "'eval.problems' names 'none', expected a data set with held-out problems"),
    ("checkpoint.keep=0", "'checkpoint.keep' is 0, expected at least 1"),
    ("scoring.workers=0", "'scoring': workers must be positive, got 0"),
    ("scoring.judge={url: here, model: x}", "'scoring.judge': judge.url is 'here', expected http"),
    # Data sets.
    ("data=[1]", "'data' is [1], expected a mapping from names to values"),
    ("data.sums.kind=greetings", "'data' has no set with held-out problems"),
    ("data.sums=arithmetic", "'data.sums' is 'arithmetic', expected a mapping"),
    ("data.sums.kind=poems", "'data.sums.kind' is 'poems', expected one of arithmetic, greetings"),
    ("data.sums.terms=3", "unknown key 'terms' in 'data.sums'"),
    ("data.sums.kind=gsm8k", "data set 'sums': 'path' is missing, expected a file with kind 'gsm8k'"),
    ("data.sums.min_terms=9", "data set 'sums': 'min_terms' and 'max_terms' are 9 and 6, expected 2 <= min_terms"),
    ("data.sums.train_size=0", "data set 'sums': 'train_size' is 0, expected at least 1"),
    ("data={a/b: {kind: arithmetic}}", "the name 'a/b' is not one"),
    # The list of stages.
    ("stages=[]", "'stages' is [], expected a list of at least one stage"),
    ("stages={a: b}", "'stages' is {'a': 'b'}, expected a list"),
    ("stages=[base]", "'stages[0]' is 'base', expected a mapping with 'name' and 'kind'"),
    ("stages=[{name: base}]", "'stages[0].kind' is None, expected a word"),
    ("stages=[{kind: pretrain}]", "'stages[0].name' is None, expected a word"),
    ("stages=[{kind: pretrain, name: 3}]", "'stages[0].name' is 3, expected a word"),
    ("stages=[{kind: dance, name: base}]", "stage 'base' is of the unknown kind 'dance', expected one of model, "),
    ("stages=[{kind: pretrain, name: ../x}]", "the name '../x' is not one: expected at most 100 letters, digits"),
    ("stages=[{kind: pretrain, name: .x}]", "the name '.x' is not one"),
    ("stages=[{kind: pretrain, name: ''}]", "the name '' is not one"),
    ("stages=[{kind: pretrain, name: superseded}]", "the name 'superseded' of a stage is that of a file of a run"),
    ("stages=[{kind: pretrain, name: manifest.json}]", "the name 'manifest.json' of a stage is that of a file"),
    ("stages=[{kind: pretrain, name: a}, {kind: pretrain, name: a}]", "the name 'a' is given twice"),
    ("stages=[{kind: pretrain, name: sums}]", "the name 'sums' is given twice, expected one for each data set and"),
    # What stages name.
    ("stages.r1.model=null", "'stages.r1.model' is None, expected a string"),
    ("stages.r1.model=bse", "stage 'r1': 'model' names 'bse', expected a stage with a model (base, r1, cold, r1.2)"),
    ("stages.r1.model=sums", "stage 'r1': 'model' names 'sums', expected a stage with a model"),
    ("stages.r1.model=scores", "stage 'r1': 'model' names 'scores', expected a stage with a model"),
    ("stages.r1.problems=[traces]", "'problems' names 'traces', expected a data set (sums, chat, file)"),
    ("stages.r1.problems=sums", "'stages.r1.problems' is 'sums', expected a list"),
    ("stages.r1.problems=[]", "stage 'r1': 'problems' is empty"),
    ("stages.cold.samples=[r1]", "'samples' names 'r1', expected a data set or a stage of kind reject (sums, chat,"),
    ("stages.scores.pairs=r1", "'pairs' names 'r1', expected a data set or a stage of kind reject"),
    ("stages.r1.2.preference=[{model: base}]", "'preference.model' names 'base', expected a stage of kind pref"),
    ("stages.r1.2.preference=[{weight: 1}]", "missing key 'model' in 'stages.r1.2.preference[0]'"),
    ("stages.r1.2.preference=[{model: scores, wait: 1}]", "unknown key 'wait' in 'stages.r1.2.preference[0]'"),
    # One stage.
    ("stages.r1.groop_size=8", "unknown key 'groop_size' in 'stages.r1' (did you mean 'group_size'?)"),
    ("stages.r1.steps=ten", "'stages.r1.steps' is 'ten', expected an integer"),
    ("stages.r1.steps=true", "'stages.r1.steps' is True, expected an integer"),
    ("stages.r1.steps=2.5", "'stages.r1.steps' is 2.5, expected an integer"),
    ("stages.r1.steps=0", "stage 'r1': 'steps' is 0, expected at least 1"),
    ("stages.r1.learning_rate=fast", "'stages.r1.learning_rate' is 'fast', expected a number"),
    ("stages.r1.learning_rate=-1", "stage 'r1': 'learning_rate' is -1.0, expected a positive number"),
    (f"stages.r1.learning_rate=1{'0' * 400}", "expected a number that fits a float"),
    ("stages.r1.temperature=.nan", "stage 'r1': 'temperature' is nan, expected a positive number"),
    ("stages.r1.group_size=1", "stage 'r1': 'group_size' is 1, expected at least 2"),
    ("stages.r1.minibatches=7", "stage 'r1': 'minibatches' is 7, expected a divisor of the 512 samples"),
    ("stages.r1.length_schedule=[{from_step: 1}]", "missing key 'max_new_tokens' in 'stages.r1.length_schedule[0]'"),
    (
        "stages.r1.length_schedule=[{from_step: 1, max_new_tokens: 0}]",
        "'length_schedule[0]' is LengthStep(from_step=1, max_new_tokens=0), expected from_step >= 0 and",
    ),
    (
        "stages.r1.length_schedule=[{from_step: 3, max_new_tokens: 1}, {from_step: 1, max_new_tokens: 2}]",
        "'length_schedule' has the steps [3, 1], expected each once and in order",
    ),
    ("stages.r1.sampler={kind: vllm}", "'sampler.url' is missing"),
    ("stages.r1.rewards={charm: 1}", "stage 'r1': 'rewards' names 'charm', expected some of"),
    ("stages.r1.rewards={accuracy: big}", "'stages.r1.rewards.accuracy' is 'big', expected a number"),
    ("stages.r1.objective=3", "'stages.r1.objective' is 3, expected a mapping"),
    ("stages.r1.objective.preset=ppo", "stage 'r1': 'objective.preset' is 'ppo', expected one of grpo, r1,"),
    ("stages.r1.objective.options={clip: 1}", "stage 'r1': 'objective.options': "),
    ("stages.r1.objective.options={kl_coef: -1}", "kl_coef is -1,"),
    ("stages.r1.objective.options={kl: k4}", "kl is 'k4', expected one of k1, k2, k3"),
    ("stages.r1.objective.options={kl_coef: high}", "kl_coef is 'high', expected a finite number"),
    ("stages.r1.objective.options={kl: [k1]}", "'stages.r1.objective.options.kl' is ['k1'], expected a number"),
    ("stages.r1.objective.options={kl_coef: true}", "is True, expected a number or a word"),
    ("stages.r1.objective={preset: dr_grpo}", "max_length"),
    ("stages.base.tiny.heads=5", "stage 'base': 'tiny' is TinyConfig("),
    ("stages.base.corpus.textbook=2", "stage 'base': 'corpus.textbook' is 2.0, expected a number from 0 to 1"),
    # --set itself.
    ("=3", "expected KEY=VALUE"),
    ("eval..samples=3", "expected KEY=VALUE"),
    ("stages.r1.steps", "expected KEY=VALUE"),
    ("stages.r1.steps=[", "the value is not YAML"),
    ("seed=2024-13-45", "--set 'seed=2024-13-45': a value cannot be read: month must be in 1..12"),
    ("stages.r2.steps=3", "--set 'stages.r2.steps=3': no 'r2', expected one of base, r1, traces"),
    ("stages.r1=3", "--set 'stages.r1=3': expected a key after the name, such as stages.r1.steps=10"),
]


@pytest.mark.parametrize(("override", "message"), BAD, ids=[override[:40] for override, _ in BAD])
def test_what_is_wrong_is_named(recipe, override, message):
    with pytest.raises(ConfigError) as error:
        load_recipe(recipe, [override])
    assert message in str(error.value)
    assert str(recipe) in str(error.value) or "--set" in str(error.value)


def test_files_that_are_no_recipe(tmp_path):
    for name, text, message in (
        ("missing", None, "cannot read recipe"),
        ("list", "- 1", "expected a mapping"),
        ("broken", "a: [", "is not YAML"),
        ("twice", "run_dir: a\neval:\n  every: 1\n  every: 2\n", "'every' is given twice, in the mapping of line 3"),
        ("date", "seed: 2024-13-45", "a value cannot be read: month must be in 1..12"),
        ("deep", "[" * 5000, "a value cannot be read: maximum recursion depth"),
        ("itself", "run_dir: &a [*a]\nstages: [{name: a, kind: pretrain}]", "'run_dir' is [[...]], expected a string"),
        ("empty", "{}", "'stages' is None, expected a list of at least one stage"),
        ("no run_dir", "stages: [{name: a, kind: pretrain}]", "missing key 'run_dir'"),
        ("no data", "{run_dir: x, stages: [{name: a, kind: pretrain}]}", "'data' has no set with held-out problems"),
    ):
        path = tmp_path / name
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError) as error:
            load_recipe(path)
        assert str(path) in str(error.value) and message in str(error.value)


def test_a_circle_is_shown(recipe):
    looped = load_recipe(recipe, ["stages.r1.model=cold"])
    with pytest.raises(ConfigError) as error:
        chain.order(looped)
    message = str(error.value)
    assert message.startswith("'stages' depend on each other in a circle: ")
    assert message.count(" <- ") == 3 and all(name in message for name in ("r1", "traces", "cold"))
    with pytest.raises(ConfigError, match="in a circle: r1 <- r1"):
        chain.order(load_recipe(recipe, ["stages.r1.model=r1"]))

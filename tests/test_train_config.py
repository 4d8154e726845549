"""Settings that cannot be used are refused before any work, by key, value and expectation."""

from pathlib import Path

import pytest

from r1kernels import objectives
from r1kernels.train.config import dump_config, load_config
from r1kernels.train.schema import ConfigError, differences

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("run_dir: here\nmodel: {path: there}\ngrpo: {learning_rate: 1e-3}\n")
    return path


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_load_and_survive_a_round_trip(path, tmp_path):
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


def test_the_demo_is_what_it_says():
    config = load_config(RECIPES / "demo.yaml")
    objective = config.grpo.objective.build()
    assert (objective.clip_low, objective.clip_high, objective.kl_coef, objective.kl) == (10.0, 10.0, 0.001, "k3")
    assert config.grpo.group_size == 16 and config.grpo.temperature == 1.0
    assert (config.eval.temperature, config.eval.top_p) == (0.6, 0.95)
    assert set(config.reward.parts) == {"accuracy", "format"}


def test_overrides(recipe):
    config = load_config(recipe, ["grpo.steps=7", "grpo.objective.options={kl_coef: 0.01}", "model.device=cuda"])
    assert (config.grpo.steps, config.grpo.objective.options, config.model.device) == (7, {"kl_coef": 0.01}, "cuda")
    assert config.grpo.learning_rate == 1e-3
    assert differences(load_config(recipe), load_config(recipe, ["grpo.steps=7"])) == ["grpo.steps: 40 -> 7"]


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
    config = load_config(recipe, [f"grpo.objective={text}"])
    assert config.grpo.objective.build() == expected
    assert type(config.grpo.objective.build().max_length) is type(expected.max_length)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.groop_size=8", "unknown key 'groop_size' in 'grpo' (did you mean 'group_size'?)"),
        ("nonsense=1", "unknown key 'nonsense' (expected one of run_dir, "),
        ("grpo.steps=ten", "'grpo.steps' is 'ten', expected an integer"),
        ("grpo.steps=true", "'grpo.steps' is True, expected an integer"),
        ("grpo.steps=2.5", "'grpo.steps' is 2.5, expected an integer"),
        ("grpo.steps=0", "'grpo.steps' is 0, expected at least 1"),
        ("grpo.learning_rate=fast", "'grpo.learning_rate' is 'fast', expected a number"),
        ("grpo.learning_rate=-1", "'grpo.learning_rate' is -1.0, expected a positive number"),
        ("grpo.temperature=.nan", "'grpo.temperature' is nan, expected a positive number"),
        ("grpo.open_think=1", "'grpo.open_think' is 1, expected true or false"),
        ("grpo.group_size=1", "'grpo.group_size' is 1, expected at least 2"),
        ("grpo.minibatches=7", "'grpo.minibatches' is 7, expected a divisor of the 512 samples"),
        ("grpo=3", "'grpo' is 3, expected a mapping"),
        ("grpo.objective.preset=ppo", "grpo.objective.preset is 'ppo', expected one of grpo, r1,"),
        ("grpo.objective.options={clip: 1}", "unknown field 'clip'"),
        ("grpo.objective.options={kl_coef: -1}", "kl_coef is -1,"),
        ("grpo.objective.options={kl: k4}", "kl is 'k4', expected one of k1, k2, k3"),
        ("grpo.objective.options={kl_coef: high}", "kl_coef is 'high', expected a finite number"),
        ("grpo.objective.options={kl: [k1]}", "'grpo.objective.options.kl' is ['k1'], expected a number or a word"),
        ("grpo.objective.options={kl_coef: true}", "is True, expected a number or a word"),
        ("grpo.objective={preset: dr_grpo}", "max_length"),
        ("model.device=gpu", "'model.device' is 'gpu', expected the name of a device, such as cpu"),
        ("eval={every: 1, every: 2}", "key 'every' is given twice"),
        ("data.kind=poems", "'data.kind' is 'poems', expected one of arithmetic, gsm8k"),
        ("data.kind=gsm8k", "'data.path' is missing"),
        ("data.min_terms=9", "expected 2 <= min_terms <= max_terms"),
        ("eval.top_p=1.5", "'eval.top_p' is 1.5, expected a number from 0 to 1"),
        ("reward.parts={accuracy: big}", "'reward.parts.accuracy' is 'big', expected a number"),
        ("reward.parts={format: 1}", "expected 'accuracy' among them"),
        ("model.tiny={}", "expected exactly one of them"),
        ("model.path=null", "expected exactly one of them"),
        ("pretrain={}", "'pretrain' and 'model.tiny' come together"),
        ("=3", "expected KEY=VALUE"),
        ("grpo.steps", "expected KEY=VALUE"),
        ("grpo.steps=[", "the value is not YAML"),
    ],
)
def test_what_is_wrong_is_named(recipe, override, message):
    with pytest.raises(ConfigError) as error:
        load_config(recipe, [override])
    assert message in str(error.value)
    assert str(recipe) in str(error.value) or "--set" in str(error.value)


def test_files_that_are_no_recipe(tmp_path):
    for name, text, message in (
        ("missing", None, "cannot read recipe"),
        ("list", "- 1", "expected a mapping"),
        ("broken", "a: [", "is not YAML"),
        ("twice", "run_dir: a\ngrpo:\n  steps: 1\n  steps: 2\n", "'steps' is given twice, in the mapping of line 3"),
        ("empty", "{}", "missing key 'run_dir'"),
    ):
        path = tmp_path / name
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError, match=message) as error:
            load_config(path)
        assert str(path) in str(error.value)

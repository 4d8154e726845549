"""verl's losses and estimators with batches and settings at the edge: what is wrong is named, the rest is computed."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import verl_cases

pytest.importorskip("verl", reason="verl is not installed: make test-verl")
pytestmark = pytest.mark.filterwarnings("default")  # verl's own

from verl.trainer.config import AlgoConfig  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402

from r1kernels.integrations import verl as adapter  # noqa: E402

adapter.register()
LOSSES = tuple(verl_cases.SETTINGS)


def run(loss: str, config: Any, mode: str = "token-mean", **changed: Any) -> Any:
    arguments = verl_cases.batch(0)
    logprobs = verl_cases.logprobs_near(arguments["old_log_prob"], 0)
    return core_algos.get_policy_loss_fn(loss)(
        log_prob=logprobs, loss_agg_mode=mode, config=config, **arguments | changed
    )


def test_the_config_must_be_that_of_verls_actor() -> None:
    with pytest.raises(ValueError, match=r"config is None.*ActorConfig"):
        run("r1_grpo", None)
    for config in ({"clip_ratio": 0.2}, AlgoConfig()):
        with pytest.raises(ValueError, match=f"config is of type {type(config).__name__}.*ActorConfig"):
            run("r1_gpg", config)


@pytest.mark.parametrize(("loss", "key", "value"), [
    ("vanilla", "clip_ratio_c", 0.5), ("vanilla", "clip_ratio_c", None), ("vanilla", "clip_ratio_c", math.inf),
    ("vanilla", "clip_ratio_high", "0.28"), ("vanilla", "clip_ratio_high", math.inf), ("vanilla", "clip_ratio_low", -1),
    ("dppo_tv", "clip_ratio_c", None), ("cispo", "clip_ratio_high", -0.5), ("sapo", "tau_pos", None),
    ("dro", "dro_beta", None), ("dro", "dro_beta", "0.3"), ("gspo", "clip_ratio_low", math.nan),
])
def test_a_bad_setting_is_named_as_in_verl(loss: str, key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key} is {value!r}, expected a finite number") as caught:
        run(f"r1_{loss}", verl_cases.config_of(loss, **{key: value}))
    assert ("1e9 means no bound" in str(caught.value)) == (value == math.inf)


@pytest.mark.parametrize(("key", "others"), [
    ("clip_ratio_c", {}), ("clip_ratio_high", {"clip_ratio_c": 1e9}),
])
def test_a_large_number_means_no_bound(key: str, others: dict[str, float]) -> None:
    theirs, _ = run("vanilla", verl_cases.config_of("vanilla", **{key: math.inf, **others}))
    ours, _ = run("r1_vanilla", verl_cases.config_of("vanilla", **{key: 1e9, **others}))
    torch.testing.assert_close(ours, theirs)


def test_the_single_clip_ratio_counts_where_the_two_are_none() -> None:
    given = {"clip_ratio": 0.05, "clip_ratio_low": None, "clip_ratio_high": None}
    theirs, _ = run("vanilla", verl_cases.config_of("vanilla", **given))
    ours, _ = run("r1_vanilla", verl_cases.config_of("vanilla", **given))
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match=r"clip_ratio is '0\.05'"):
        run("r1_vanilla", verl_cases.config_of("vanilla", **{**given, "clip_ratio": "0.05"}))


def test_bad_arguments() -> None:
    config = verl_cases.config_of("vanilla")
    with pytest.raises(ValueError, match="loss_agg_mode is 'mean'"):
        run("r1_grpo", config, "mean")
    for name in ("response_mask", "advantages", "old_log_prob", "rollout_is_weights"):
        with pytest.raises(ValueError, match=rf"{name} has the shape \(6, 4\), expected \(6, 9\)"):
            run("r1_geo_mean", config, **{name: torch.ones(6, 4)})
    for mode, name in (("token-mean", "batch_num_tokens"), ("seq-mean-token-mean", "global_batch_size")):
        config = verl_cases.config_of("vanilla")
        config.global_batch_info["dp_size"] = 2
        with pytest.raises(ValueError, match=f"{name} is None with dp_size 2"):
            run("r1_grpo", config, mode)
        config.global_batch_info[name] = 0
        with pytest.raises(ValueError, match=f"{name} is 0.*response_mask has tokens"):
            run("r1_grpo", config, mode)
    config.global_batch_info.update(global_batch_size=6, loss_scale_factor=0)
    with pytest.raises(ValueError, match="loss_scale_factor is 0"):
        run("r1_grpo", config, "seq-mean-token-sum-norm")


@pytest.mark.few(12)
@pytest.mark.parametrize("totals", ["none", "numbers", "tensors"])
@pytest.mark.parametrize("mode", verl_cases.MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_without_tokens_is_zero(loss: str, mode: str, totals: str) -> None:
    """On one rank, and on all ranks of two. verl gives NaN for most."""
    arguments = verl_cases.batch(0)
    arguments["response_mask"][:] = False
    config = verl_cases.config_of(loss, mode)
    if totals != "none":
        zero = 0 if totals == "numbers" else torch.tensor(0)
        config.global_batch_info.update(dp_size=2, batch_num_tokens=zero, global_batch_size=zero)
    for rows in (6, 0):
        part = {name: None if value is None else value[:rows] for name, value in arguments.items()}
        logprobs = verl_cases.logprobs_near(part["old_log_prob"], 0)
        value, grad, metrics = verl_cases.value_and_gradient(
            core_algos.get_policy_loss_fn(f"r1_{loss}"), logprobs, part, config)
        assert value == 0 and not grad.any() and not any(metrics.values())


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_probability_just_above_one_counts_as_held(advantage: float) -> None:
    """Rounding in a log-softmax: the divergence is then NaN, and verl's loss and metric leave the token out."""
    arguments = {
        "old_log_prob": torch.tensor([[-0.5, -0.5, -0.5]]), "advantages": torch.full((1, 3), advantage),
        "response_mask": torch.ones(1, 3, dtype=torch.bool),
    }
    logprobs, config = torch.tensor([[1.2e-7, -0.5, -0.51]]), verl_cases.config_of("dppo_kl")
    (expected, grad, metrics), (value, our_grad, our_metrics) = (
        verl_cases.value_and_gradient(core_algos.get_policy_loss_fn(name), logprobs, arguments, config)
        for name in ("dppo_kl", "r1_dppo_kl")
    )
    assert metrics["actor/pg_clipfrac"] == pytest.approx(1 / 3 if advantage > 0 else 0)
    assert our_metrics == pytest.approx(metrics)
    torch.testing.assert_close((value, our_grad), (expected, grad))


# ---- advantages ----------------------------------------------------------------------------------------------------


def answers(scores: list[float], names: list[Any]) -> dict[str, Any]:
    index = np.empty(len(names), dtype=object)
    index[:] = names
    return {"token_level_rewards": torch.tensor(scores)[:, None], "response_mask": torch.ones(len(scores), 1),
            "index": index}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["r1_grpo", "r1_rloo", "r1_opo", "r1_pass_at_2"])
def test_a_reward_that_is_no_finite_number_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"token_level_rewards of answer 2 is {value}.*1 of 4"):
        core_algos.get_adv_estimator_fn(name)(**answers([1.0, 0.0, value, 1.0], ["a"] * 4))


def test_one_of_several_rewards_that_is_no_finite_number_is_named() -> None:
    single = {"accuracy": np.ones(2), "format": np.array([0.0, math.nan])}
    config = AlgoConfig(gdpo_reward_keys=list(single))
    with pytest.raises(ValueError, match="format of answer 1 is nan"):
        core_algos.get_adv_estimator_fn("r1_gdpo")(
            **answers([1.0, 0.0], ["a", "a"]), config=config, non_tensor_batch=single)


def test_names_of_prompts_may_have_several_types() -> None:
    given = answers([1.0, 0.0, 0.5, 0.25, 2.0], ["a", 7, "a", 7, None])
    found, _ = core_algos.get_adv_estimator_fn("r1_grpo")(**given)
    expected, _ = core_algos.get_adv_estimator_fn("grpo")(**given)
    torch.testing.assert_close(found, expected)

"""verl's policy losses and advantage estimators, and ours for the same config: equal values, gradients, parameters."""

from typing import Any

import numpy as np
import pytest
import torch
import verl_cases
from torch import Tensor

from r1kernels import linear_token_logprobs, objectives, testing

pytest.importorskip("verl", reason="verl is not installed: make test-verl")
pytestmark = pytest.mark.filterwarnings("default")  # verl's own

from verl.trainer.config import AlgoConfig  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402

from r1kernels.integrations import verl as adapter  # noqa: E402

adapter.register()
LOSSES = tuple(verl_cases.SETTINGS)


def both(loss: str) -> tuple[Any, Any]:
    return core_algos.get_policy_loss_fn(loss), core_algos.get_policy_loss_fn(f"r1_{loss}")


def assert_same(ours: Any, theirs: Any, **tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, **(tolerance or {"rtol": 2e-5, "atol": 1e-6}))


@pytest.mark.parametrize("weights", [False, True], ids=["plain", "weights"])
@pytest.mark.parametrize("info", verl_cases.INFOS)
@pytest.mark.parametrize("mode", verl_cases.MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_values_gradients_and_metrics_are_those_of_verl(loss: str, mode: str, info: str, weights: bool) -> None:
    theirs, ours = both(loss)
    held = 0.0
    for seed in range(3):
        # verl's GMPO clips by the sign of each token, and ours by that of the mean: see docs/migrate/verl.md.
        arguments = verl_cases.batch(seed, weights=weights, of_tokens=seed == 2 and loss != "geo_mean")
        config = verl_cases.config_of(loss, mode, info)
        logprobs = verl_cases.logprobs_near(arguments["old_log_prob"], seed)
        expected, grad, metrics = verl_cases.value_and_gradient(theirs, logprobs, arguments, config)
        value, our_grad, our_metrics = verl_cases.value_and_gradient(ours, logprobs, arguments, config)
        assert_same(value, expected)
        assert_same(our_grad, grad)
        assert our_metrics.keys() == metrics.keys()
        for name, number in metrics.items():
            assert our_metrics[name] == pytest.approx(number, rel=1e-4, abs=1e-6), name
        held += metrics.get("actor/pg_clipfrac", 0)
    assert held > 0 or loss in ("sapo", "gpg", "dro")  # the batches have something to clip


@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_ratios_and_what_is_behind_the_mask(loss: str) -> None:
    """verl clamps the log of a ratio to 20 (GSPO: 10), or not at all."""
    theirs, ours = both(loss)
    arguments = verl_cases.batch(4)
    arguments["response_mask"][:] = True
    old = arguments["old_log_prob"]
    old[0, 0], old[2, 1], old[3, 2] = -30, -60, -25
    logprobs = verl_cases.logprobs_near(old, 4)
    logprobs[0, 0] = logprobs[2, 1] = -0.1
    logprobs[3, 2], logprobs[4, 3] = -0.2, -45
    old[5], logprobs[5], arguments["advantages"][5] = -15, -0.1, -1  # a whole sequence beyond GSPO's clamp
    config = verl_cases.config_of(loss, "seq-mean-token-mean")
    expected, grad, metrics = verl_cases.value_and_gradient(theirs, logprobs, arguments, config)
    value, our_grad, our_metrics = verl_cases.value_and_gradient(ours, logprobs, arguments, config)
    assert_same(value, expected)
    assert_same(our_grad, grad)
    assert our_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)

    arguments["response_mask"][:, 5:] = False
    value, our_grad, our_metrics = verl_cases.value_and_gradient(ours, logprobs, arguments, config)
    for tensor in (logprobs, old):
        tensor[:, 5:] = torch.nan
    again = verl_cases.value_and_gradient(ours, logprobs, arguments, config)
    assert_same(again[0], value, rtol=0, atol=0)
    assert_same(again[1], our_grad, rtol=0, atol=0)
    assert again[2] == our_metrics


def test_a_cap_below_the_bound_is_for_negative_advantages_only() -> None:
    """clip_ratio_high 10 as R1, with verl's default clip_ratio_c."""
    theirs, ours = both("vanilla")
    arguments = verl_cases.batch(5)
    logprobs = verl_cases.logprobs_near(arguments["old_log_prob"], 5, size=2.0)
    config = verl_cases.config_of("vanilla", clip_ratio_low=0.9, clip_ratio_high=10.0, clip_ratio_c=3.0)
    expected, grad, metrics = verl_cases.value_and_gradient(theirs, logprobs, arguments, config)
    value, our_grad, our_metrics = verl_cases.value_and_gradient(ours, logprobs, arguments, config)
    ratio = (logprobs - arguments["old_log_prob"]).exp()
    between = (ratio > 3) & (ratio < 11) & arguments["response_mask"]
    assert (between & (arguments["advantages"] > 0)).any() and metrics["actor/pg_clipfrac_lower"] > 0
    assert_same(value, expected)
    assert_same(our_grad, grad)
    assert our_metrics == pytest.approx(metrics, rel=1e-4)


@pytest.mark.parametrize("mode", verl_cases.MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_twenty_steps_give_equal_parameters(loss: str, mode: str) -> None:
    """Rollouts of five steps each on a tiny head, whose log-probs verl's loss gets from plain PyTorch."""
    steps, vocab, width = 7, 12, 5
    rng = testing.generator(1)
    hidden, start = torch.randn(6, steps, width, generator=rng), torch.randn(vocab, width, generator=rng)
    config = verl_cases.config_of(loss, mode)

    def trained(function: Any, fused: bool) -> Tensor:
        weight = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.SGD([weight], lr=0.02 if mode in ("token-sum", "seq-mean-token-sum") else 0.5)
        for step in range(20):
            if step % 5 == 0:
                ids = torch.randint(vocab, (6, steps), generator=testing.generator(step))
                arguments = verl_cases.batch(step, steps=steps)
                with torch.no_grad():
                    arguments["old_log_prob"] = logprobs_of(weight, ids, fused)
            loss_value, _ = function(
                log_prob=logprobs_of(weight, ids, fused), loss_agg_mode=mode, config=config, **arguments
            )
            optimizer.zero_grad()
            loss_value.backward()
            optimizer.step()
        return weight.detach()

    def logprobs_of(weight: Tensor, ids: Tensor, fused: bool) -> Tensor:
        if fused:
            return linear_token_logprobs(hidden, weight, ids)
        return (hidden @ weight.T).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)

    theirs, ours = both(loss)
    expected, found = trained(theirs, False), trained(ours, True)
    assert (expected - start).abs().max() > 0.01
    assert_same(found, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("loss", ["vanilla", "gspo", "dppo_tv"])
def test_the_whole_actor_loss_of_verl_with_entropy_and_kl(loss: str) -> None:
    """verl's `ppo_loss` looks the loss up by name, and adds its terms in place."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils
    from verl.workers.utils.losses import ppo_loss

    arguments = verl_cases.batch(7)
    old, mask = arguments["old_log_prob"], arguments["response_mask"]
    results = []
    for name in (loss, f"r1_{loss}"):
        leaf = verl_cases.logprobs_near(old, 7).requires_grad_()
        entropy = (leaf.detach() * 0.3).square()
        config = verl_cases.config_of(name, **verl_cases.SETTINGS[loss], use_kl_loss=True, kl_loss_coef=0.1,
                                      entropy_coeff=0.01)
        data = TensorDict({
            "response_mask": mask, "old_log_probs": old, "advantages": arguments["advantages"],
            "ref_log_prob": old - 0.1,
        }, batch_size=len(mask))
        tensordict_utils.assign_non_tensor(data, dp_size=1, batch_num_tokens=17, global_batch_size=6)
        module = ppo_loss.__globals__
        kept, module["no_padding_2_padding"] = module["no_padding_2_padding"], lambda value, _: value
        try:
            value, metrics = ppo_loss(config, {"log_probs": leaf, "entropy": entropy}, data)
        finally:
            module["no_padding_2_padding"] = kept
        value.backward()
        numbers = {key: metric.aggregate() for key, metric in metrics.items() if key != "kl_coef"}
        results.append((value.detach(), leaf.grad, numbers))
    assert_same(results[1][0], results[0][0])
    assert_same(results[1][1], results[0][1])
    assert results[1][2] == pytest.approx(results[0][2], rel=1e-4, abs=1e-6)


def test_dapo_and_grpo_are_names_of_the_clipped_loss() -> None:
    arguments = verl_cases.batch(8)
    logprobs = verl_cases.logprobs_near(arguments["old_log_prob"], 8)
    config = verl_cases.config_of("vanilla")
    values = [
        verl_cases.value_and_gradient(core_algos.get_policy_loss_fn(name), logprobs, arguments, config)[0]
        for name in ("r1_vanilla", "r1_grpo", "r1_dapo")
    ]
    assert values[0] == values[1] == values[2]


def test_an_objective_that_verl_does_not_have() -> None:
    arguments = verl_cases.batch(9)
    logprobs = verl_cases.logprobs_near(arguments["old_log_prob"], 9)
    config = verl_cases.config_of("vanilla", "token-mean", clip_ratio_low=0.25, clip_ratio_high=0.25)
    loss = adapter.policy_loss_of(objectives.grpo(clip_low=0.25, clip_high=0.25, ratio_cap=3.0))
    value, grad, metrics = verl_cases.value_and_gradient(loss, logprobs, arguments, config)
    expected, expected_grad, expected_metrics = verl_cases.value_and_gradient(
        core_algos.get_policy_loss_fn("r1_vanilla"), logprobs, arguments,
        verl_cases.config_of("vanilla", clip_ratio_low=0.25, clip_ratio_high=0.25, clip_ratio_c=3.0))
    assert_same(value, expected)
    assert_same(grad, expected_grad)
    assert metrics == {"actor/ppo_kl": pytest.approx(expected_metrics["actor/ppo_kl"])}
    for field in ("kl_coef", "entropy_coef"):
        with pytest.raises(ValueError, match=f"{field} is 0.1"):
            adapter.policy_loss_of(objectives.grpo(**{field: 0.1}))
    for objective in (objectives.dr_grpo(40), objectives.luspo()):  # without their constant, they are grpo and gspo
        with pytest.raises(ValueError, match=r"aggregate is 'constant'.*loss_agg_mode"):
            adapter.policy_loss_of(objective)


# ---- advantages ----------------------------------------------------------------------------------------------------


def rewards(seed: int, sizes: tuple[int, ...] = (4, 3, 1, 4)) -> dict[str, Any]:
    rng = testing.generator(seed)
    rows, steps = sum(sizes), 6
    index = np.array([f"prompt-{group}" for group, size in enumerate(sizes) for _ in range(size)], dtype=object)
    order = torch.randperm(rows, generator=rng)
    lengths = torch.randint(1, steps + 1, (rows,), generator=rng)
    mask = (torch.arange(steps) < lengths[:, None]).long()
    scores = torch.zeros(rows, steps)
    scores[torch.arange(rows), lengths - 1] = torch.randn(rows, generator=rng)
    return {"token_level_rewards": scores, "response_mask": mask, "index": index[order.numpy()]}


@pytest.mark.parametrize("by_std", [True, False])
@pytest.mark.parametrize("name", ["grpo", "rloo", "opo"])
def test_advantages_are_those_of_verl(name: str, by_std: bool) -> None:
    config = AlgoConfig(norm_adv_by_std_in_grpo=by_std)
    for seed in range(3):
        arguments = rewards(seed)
        option = {"norm_adv_by_std_in_grpo": by_std} if name == "grpo" else {}
        expected, expected_returns = core_algos.get_adv_estimator_fn(name)(
            **{k: v.copy() if isinstance(v, np.ndarray) else v.clone() for k, v in arguments.items()},
            config=config, **option)
        found, returns = core_algos.get_adv_estimator_fn(f"r1_{name}")(**arguments, config=config)
        assert_same(found, expected)
        assert_same(returns, expected_returns)


def test_equal_rewards_have_no_advantage() -> None:
    """The mean of three times 0.1 is not 0.1 in float32; verl divides the rest by 1e-6."""
    scores = torch.full((3, 1), 0.1)
    arguments = {"token_level_rewards": scores, "response_mask": torch.ones(3, 1), "index": np.array(["a"] * 3)}
    assert not core_algos.get_adv_estimator_fn("r1_grpo")(**arguments)[0].any()


def test_the_trainer_of_verl_finds_the_estimators_by_name() -> None:
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    found = []
    for name in ("grpo", "r1_grpo"):
        tensors = rewards(1)
        data = DataProto.from_dict(non_tensors={"uid": tensors.pop("index")}, tensors=tensors)
        config = AlgoConfig(adv_estimator=name, norm_adv_by_std_in_grpo=False)
        found.append(compute_advantage(data, name, norm_adv_by_std_in_grpo=False, config=config).batch["advantages"])
    assert_same(found[1], found[0])


@pytest.mark.parametrize("weights", [None, [0.3, 2.0]])
def test_gdpo_of_two_rewards(weights: list[float] | None) -> None:
    arguments = rewards(2)
    rows, steps = arguments["response_mask"].shape
    rng = testing.generator(3)
    single = {key: torch.randn(rows, generator=rng).numpy() for key in ("accuracy", "format")}
    config = AlgoConfig(gdpo_reward_keys=list(single), gdpo_reward_weights=weights)
    lengths = arguments["response_mask"].sum(1)
    attention = torch.cat([torch.ones(rows, 2).long(), (torch.arange(steps) < lengths[:, None]).long()], 1)
    given = {"config": config, "non_tensor_batch": single,
             "batch": {"prompts": torch.zeros(rows, 2), "attention_mask": attention}}
    expected, _ = core_algos.get_adv_estimator_fn("gdpo")(**arguments, **given)
    found, _ = core_algos.get_adv_estimator_fn("r1_gdpo")(**arguments, **given)
    assert_same(found, expected)
    with pytest.raises(ValueError, match="non_tensor_batch is None"):
        core_algos.get_adv_estimator_fn("r1_gdpo")(**arguments, config=config)
    del single["format"]
    with pytest.raises(ValueError, match="gdpo_reward_keys has 'format'"):
        core_algos.get_adv_estimator_fn("r1_gdpo")(**arguments, **given)


def test_pass_at_k() -> None:
    arguments = {
        "token_level_rewards": torch.tensor([[1.0], [0.0], [0.0], [0.0]]), "response_mask": torch.ones(4, 1),
        "index": np.array(["a"] * 4),
    }
    found, _ = core_algos.get_adv_estimator_fn("r1_pass_at_2")(**arguments)
    # Of 6 pairs, 3 have the good answer: mean and standard deviation 1/2; of 3 pairs with a bad one, 1 has it.
    assert_same(found, torch.tensor([[1.0], [-1 / 3], [-1 / 3], [-1 / 3]]), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="index is None"):
        core_algos.get_adv_estimator_fn("r1_pass_at_2")(**{**arguments, "index": None})

"""examples/verl_gspo inside real verl, which accepts the config of its command, and finds what that names."""

import contextlib
import io
import re
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import verl_cases

pytest.importorskip("verl", reason="verl is not installed: make test-verl")
pytest.importorskip("hydra", reason="hydra-core is not installed: make test-verl")
pytestmark = pytest.mark.filterwarnings("default")  # verl's own

from omegaconf import DictConfig, OmegaConf  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402
from verl.trainer.ppo.utils import need_critic, need_reference_policy  # noqa: E402
from verl.utils.config import omega_conf_to_dataclass, validate_config  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples/verl_gspo"


@pytest.fixture(scope="module")
def config() -> DictConfig:
    """What the command in the file prints with `--cfg job`."""
    text = (FOLDER / "r1_gspo.yaml").read_text()
    [command] = re.findall(r"^#     python -m (verl\.trainer\.main_ppo .*)$", text, re.MULTILINE)
    module, *arguments = command.replace("$PWD", str(ROOT)).split()
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of engines whose packages are not installed
        patch.setenv("PWD", str(ROOT))
        patch.setattr(sys, "argv", [module, *arguments, "--cfg", "job"])
        runpy.run_module(module, run_name="__main__")
        return OmegaConf.create(printed.getvalue())


def test_verl_accepts_the_config(config: DictConfig) -> None:
    assert config.actor_rollout_ref.actor.strategy == "fsdp"  # from verl's own defaults
    validate_config(config, need_reference_policy(config), need_critic(config))
    assert not need_critic(config) and config.actor_rollout_ref.model.fused_kernel_options.impl_backend == "r1kernels"


def test_the_loss_is_that_of_verl_with_the_same_settings(config: DictConfig) -> None:
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert (actor.clip_ratio_low, actor.clip_ratio_high) == (3e-4, 4e-4)
    actor.global_batch_info.update(verl_cases.INFOS["two ranks"])
    mode, arguments = actor.policy_loss.loss_mode, verl_cases.batch(1)
    logprobs = verl_cases.logprobs_near(arguments["old_log_prob"], 1, size=1e-3)
    ours, theirs = (verl_cases.value_and_gradient(core_algos.get_policy_loss_fn(name), logprobs, arguments, actor)
                    for name in (mode, mode.removeprefix("r1_")))
    assert mode == "r1_gspo" and theirs[1].abs().max() > 0 and 0 < theirs[2]["actor/pg_clipfrac"] < 1
    for found, expected in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)


def test_verl_finds_the_estimator_and_the_reward(config: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.trainer.ppo.reward import get_custom_reward_fn

    assert core_algos.get_adv_estimator_fn(config.algorithm.adv_estimator).__module__.startswith("r1kernels.")
    monkeypatch.setenv("PWD", str(ROOT))
    reward = get_custom_reward_fn(config)
    given: dict[str, Any] = {"data_source": "sums", "ground_truth": "12", "extra_info": {}}
    right = reward(solution_str="<think> 5 and 7 </think> <answer> 12 </answer>", **given)
    assert right == {"score": 1.2, "accuracy": 1.0, "format": 1.0}
    assert reward(solution_str="It is \\boxed{13}", **given)["score"] == 0
    with pytest.raises(ValueError, match="ground_truth is ''"):
        reward(solution_str="12", **given | {"ground_truth": ""})


def test_verl_reads_the_data(config: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas", reason="pandas is not installed; verl reads its data with it")
    from trl_cases import tiny_model_and_tokenizer
    from verl.utils.dataset.rl_dataset import RLHFDataset

    monkeypatch.setattr(sys, "argv", ["sums.py", str(tmp_path)])
    runpy.run_path(str(FOLDER / "sums.py"), run_name="__main__")
    _, tokenizer = tiny_model_and_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    files = [str(tmp_path / Path(config.data[f"{name}_files"]).name) for name in ("train", "val")]
    train, held_out = (RLHFDataset(file, tokenizer, config.data) for file in files)
    assert (len(train), len(held_out)) == (4096, 256)
    asked = [{row["raw_prompt"][0]["content"] for row in (rows[i] for i in range(200))} for rows in (train, held_out)]
    assert not asked[0] & asked[1]
    row = train[3]
    a, b = re.search(r"What is (\d+) \+ (\d+)\?", row["raw_prompt"][0]["content"]).groups()
    assert row["reward_model"]["ground_truth"] == str(int(a) + int(b)) and row["data_source"] == "sums"

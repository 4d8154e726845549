"""docs/migrate/verl.md: its code runs, its config has verl's keys, and its tables have every name."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed: make test-verl")
pytestmark = pytest.mark.filterwarnings("default")  # verl's own

import verl  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from verl.models.transformers import monkey_patch  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402

from r1kernels.integrations import verl as adapter  # noqa: E402

with warnings.catch_warnings():  # of engines whose packages are not installed
    warnings.simplefilter("ignore")
    import verl.workers.engine.fsdp.transformer_impl

TEXT = (Path(__file__).resolve().parents[2] / "docs/migrate/verl.md").read_text()
CONFIG = Path(verl.__file__).parent / "trainer/config"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_every_block_is_tested() -> None:
    assert len(blocks("yaml")) == 1 and len(blocks("python")) == 3 and TEXT.count("```") == 8


def test_the_config_has_keys_and_names_of_verl() -> None:
    [block] = blocks("yaml")
    given, names = OmegaConf.create(block), adapter.register()
    model = OmegaConf.load(CONFIG / "model/hf_model.yaml")
    assert set(given.actor_rollout_ref.model) < set(model)
    assert set(given.actor_rollout_ref.model.fused_kernel_options) <= set(model.fused_kernel_options)
    actor = OmegaConf.load(CONFIG / "actor/actor.yaml")
    assert set(given.actor_rollout_ref.actor.policy_loss) < set(actor.policy_loss)
    assert set(given.algorithm) < set(OmegaConf.load(CONFIG / "ppo_trainer.yaml").algorithm)
    assert {given.actor_rollout_ref.actor.policy_loss.loss_mode, given.algorithm.adv_estimator} < set(names)


def test_the_tables_have_every_name() -> None:
    names = set(re.findall(r"`(r1_\w+)`", TEXT)) - {"r1_clip_cov", "r1_pass_at_k"}
    assert names == set(adapter.register())
    verls = set(core_algos.POLICY_LOSS_REGISTRY) - names - {"r1_vespo"}
    rows = " ".join(re.findall(r"^\| (`\w+`[^|]*)\|", TEXT, re.MULTILINE))
    assert verls <= set(re.findall(r"`(\w+)`", rows))
    keys = set(re.findall(r"`((?:clip_ratio|tau_|loss_|kl_loss|entropy_c|use_kl)\w+)`", TEXT)) - {"loss_mode"}
    assert keys <= set(OmegaConf.load(CONFIG / "actor/actor.yaml"))


def test_a_loss_that_verl_does_not_have() -> None:
    exec(compile(blocks("python")[0], "verl.md", "exec"), {})
    assert core_algos.POLICY_LOSS_REGISTRY.pop("r1_vespo").__module__ == "r1kernels.integrations.verl"


def test_the_estimator_of_several_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_algos, "ADV_ESTIMATOR_REGISTRY", dict(core_algos.ADV_ESTIMATOR_REGISTRY))
    exec(compile(blocks("python")[1], "verl.md", "exec"), {})
    assert core_algos.get_adv_estimator_fn("gdpo").__module__ == "r1kernels.integrations.verl_advantages"


def test_the_head_in_a_script() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    class Model(LlamaForCausalLM):  # verl replaces the forward of the class
        pass

    def build_model(use_fused_kernels: bool) -> Any:
        model = Model(LlamaConfig(hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                                  vocab_size=30))
        monkey_patch.patch_forward_with_backends(model, use_fused_kernels, "torch")
        return model

    names: dict[str, Any] = {
        "build_model": build_model, "hidden_states": torch.randn(2, 3, 16), "input_ids": torch.randint(30, (2, 3))
    }
    exec(compile(blocks("python")[2], "verl.md", "exec"), names)
    logits = names["hidden_states"] @ names["model"].lm_head.weight.T / 0.7
    expected = logits.log_softmax(-1).gather(-1, names["input_ids"][..., None]).squeeze(-1)
    torch.testing.assert_close(names["log_probs"], expected)

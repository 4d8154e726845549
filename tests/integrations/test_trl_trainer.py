"""R1GRPOTrainer trains as TRL's GRPOTrainer does: parameters and logs, with TRL's sampling, optimizer and options."""

import pickle
from typing import Any

import pytest
import torch
from trl_cases import make_trainer, sharded_gradients, trained

from r1kernels.integrations import trl as adapter
from r1kernels.integrations import trl_options
from r1kernels.integrations.trl import R1GRPOMixin, R1GRPOTrainer

trl = pytest.importorskip("trl", reason="TRL is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # TRL's own

ACCUMULATED = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2, "max_steps": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"loss_type": "dapo", "epsilon_high": 0.28, "max_steps": 20, "learning_rate": 0.02},
    "grpo": {"loss_type": "grpo", **ACCUMULATED},
    "bnpo": {"loss_type": "bnpo", "beta": 0.1, **ACCUMULATED},
    "dr_grpo": {"loss_type": "dr_grpo", "delta": 1.5, "scale_rewards": "none", **ACCUMULATED},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "learning_rate": 0.02, **ACCUMULATED},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.05, **ACCUMULATED},
    "sapo": {"loss_type": "sapo", "scale_rewards": "batch", **ACCUMULATED},
    "vespo": {"loss_type": "vespo", "beta": 0.1, **ACCUMULATED},
    "adaptive entropy": {"loss_type": "grpo", "use_adaptive_entropy": True, "entropy_target": 1.7, "entropy_coef": 0.05,
                         "entropy_coef_delta": 0.02, "entropy_coef_max": 0.2, **ACCUMULATED},
    "entropy, kl": {"loss_type": "grpo", "entropy_coef": 0.1, "beta": 0.1, **ACCUMULATED},
    "truncated, off policy": {"loss_type": "dapo", "mask_truncated_completions": True,
                              "off_policy_mask_threshold": 0.01, **ACCUMULATED},
    "temperature, evaluation": {"temperature": 0.8, "eval_strategy": "steps", "eval_steps": 2,
                                "per_device_eval_batch_size": 8, "entropy_coef": 0.1, **ACCUMULATED},
    "checkpointing": {"gradient_checkpointing": True, "sync_ref_model": True, "beta": 0.1, "ref_model_sync_steps": 1},
}


def compare(tmp_path: Any, tolerance: float = 1e-4, model: Any = None, more: Any = dict, **arguments: Any) -> None:
    runs = []
    for kind in (trl.GRPOTrainer, R1GRPOTrainer):
        def make(kind: type = kind) -> Any:
            given = {"model": model()} if model else {}
            return make_trainer("GRPO", tmp_path, kind=kind, more=more(), **given, **arguments)

        runs.append(trained(make))
    (start, theirs, log), (same, ours, found) = runs
    assert torch.equal(start, same)
    moved = (theirs - start).norm()
    assert moved > 1e-4 and (ours - theirs).norm() <= tolerance * moved
    assert [list(line) for line in found] == [list(line) for line in log]
    for line, wanted in zip(found, log, strict=True):
        assert line == pytest.approx(wanted, rel=10 * tolerance, abs=tolerance / 10, nan_ok=True)


@pytest.mark.few(4)
@pytest.mark.parametrize("name", SETTINGS)
def test_trains_as_trl_does(name: str, tmp_path: Any) -> None:
    import datasets

    more = {"eval_dataset": datasets.Dataset.from_list([{"prompt": "so"}] * 4)} if "evaluation" in name else {}
    compare(tmp_path, more=lambda: dict(more), **SETTINGS[name])


@pytest.mark.few(1)
@pytest.mark.parametrize("adapter_kind", ["lora", "lora and the whole head", "prompts"])
def test_adapters_of_peft(adapter_kind: str, tmp_path: Any) -> None:
    """The reference model is the model without its adapter. Learned prompts make sequences longer."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")

    def config() -> dict[str, Any]:
        if adapter_kind == "prompts":
            return {"peft_config": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")}
        saved = ["lm_head"] if "head" in adapter_kind else None
        return {"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
                                               modules_to_save=saved)}

    compare(tmp_path, more=config, beta=0.1, **ACCUMULATED)


def test_a_mixture_of_experts_with_its_auxiliary_loss(tmp_path: Any) -> None:
    import transformers

    def mixture() -> Any:
        transformers.set_seed(0)
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(
            vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64,
            pad_token_id=0, eos_token_id=1, bos_token_id=None, router_aux_loss_coef=0.5))

    compare(tmp_path, model=mixture)


def test_a_head_with_a_soft_cap_and_a_scale_in_float32(tmp_path: Any) -> None:
    import transformers

    def gemma() -> Any:
        transformers.set_seed(0)
        return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(
            vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
            bos_token_id=None, final_logit_softcapping=2.0, attn_implementation="eager"))

    compare(tmp_path, model=gemma, cast_lm_head_to_fp32=True)


@pytest.mark.few(1)
@pytest.mark.parametrize("options", [{"bf16": True}, {"bf16": True, "cast_lm_head_to_fp32": True}])
def test_autocast(options: dict[str, bool], tmp_path: Any) -> None:
    compare(tmp_path, tolerance=0.05, max_steps=1, **options)


def test_tokens_are_measured_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of the loss, no statistics before it, and none in backward."""
    import r1kernels

    calls: list[str] = []

    def counting(name: str) -> Any:
        function = getattr(r1kernels, name)
        return lambda *args, **keywords: (calls.append(name), function(*args, **keywords))[1]

    for name in ("linear_grpo_loss", "linear_token_logprobs_and_entropy", "linear_token_logprobs"):
        monkeypatch.setattr(r1kernels, name, counting(name))
    trained(lambda: make_trainer("GRPO", tmp_path, kind=R1GRPOTrainer, entropy_coef=0.1, max_steps=2))
    assert calls == ["linear_grpo_loss"] * 2


def test_the_mixin_is_before_other_subclasses(tmp_path: Any) -> None:
    class Weighted(trl.GRPOTrainer):
        def get_high_entropy_mask(self, entropies: Any, mask: Any, threshold: float) -> Any:
            return super().get_high_entropy_mask(-entropies, mask, threshold)

    class Both(R1GRPOMixin, Weighted):
        pass

    runs = [trained(lambda kind=kind: make_trainer("GRPO", tmp_path, kind=kind, top_entropy_quantile=0.5))
            for kind in (Weighted, Both, R1GRPOTrainer)]
    moved = (runs[0][1] - runs[0][0]).norm()
    assert (runs[1][1] - runs[0][1]).norm() <= 1e-4 * moved < (runs[2][1] - runs[0][1]).norm()


@pytest.mark.parametrize("packed", [True, False])
def test_a_model_sharded_by_fsdp2(packed: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer import utils

    monkeypatch.setattr(utils, "_use_triton", lambda device: packed)
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0,
                                         world_size=1)
    try:
        theirs = sharded_gradients(trl.GRPOTrainer, tmp_path)
        with adapter.patch_trl():
            patched = sharded_gradients(trl.GRPOTrainer, tmp_path)
        for found in (patched, sharded_gradients(R1GRPOTrainer, tmp_path)):
            assert (found - theirs).norm() <= 1e-5 * theirs.norm()
    finally:
        torch.distributed.destroy_process_group()


# ---- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", trl_options.METHODS)
def test_methods_of_another_subclass_are_refused(method: str, tmp_path: Any) -> None:
    def own(self: Any, *args: Any, **keywords: Any) -> Any:
        raise AssertionError

    other = type("Other", (trl.GRPOTrainer,), {method: own})
    with pytest.raises(ValueError, match=rf"Other has its own {method}.*patch_trl"):
        make_trainer("GRPO", tmp_path, kind=type("Both", (R1GRPOMixin, other), {}))


def test_a_loss_that_wraps_the_one_pass_is_accepted(tmp_path: Any) -> None:
    class Wraps(R1GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            return super()._compute_loss(model, inputs)

    assert make_trainer("GRPO", tmp_path, kind=Wraps)
    changed = type("Changed", (R1GRPOTrainer,), {trl_options.METHODS[1]: lambda self, *args, **keywords: None})
    with pytest.raises(ValueError, match="Changed has its own _get_per_token"):
        make_trainer("GRPO", tmp_path, kind=changed)


def test_the_mixin_comes_first_and_before_a_grpo_trainer(tmp_path: Any) -> None:
    with pytest.raises(TypeError, match="GRPOTrainer before R1GRPOMixin"):
        type("Last", (trl.GRPOTrainer, R1GRPOMixin), {})
    with pytest.raises(TypeError, match=r"Other is not a trl\.GRPOTrainer"):
        make_trainer("RLOO", tmp_path, kind=type("Other", (R1GRPOMixin, trl.RLOOTrainer), {}))


def test_the_class_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(R1GRPOTrainer)) is R1GRPOTrainer


@pytest.mark.parametrize("arguments, text", [
    ({"torch_compile": True}, "torch_compile is True, expected False"),
    ({"loss_type": "vespo", "beta": 0.1, "importance_sampling_level": "sequence"},
     "importance_sampling_level is 'sequence'"),
    ({"loss_type": "foo"}, "loss_type is 'foo', expected one of grpo"),
    ({"importance_sampling_level": "foo"}, "importance_sampling_level is 'foo'"),
    ({"beta": -0.1}, r"beta is -0\.1.*patch_trl"),
    ({"delta": -1.0}, r"delta is -1\.0"),
    ({"loss_type": "sapo", "sapo_temperature_neg": -1.0}, r"sapo_temperature_neg is -1\.0"),
    ({"entropy_coef": float("nan")}, "entropy_coef is nan"),
])
def test_options_that_the_pass_does_not_have(arguments: dict[str, Any], text: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=text):
        make_trainer("GRPO", tmp_path, kind=R1GRPOTrainer, **arguments)


def test_what_trl_renames_is_named(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl_options, "ATTRIBUTES", (*trl_options.ATTRIBUTES, "another_name"))
    with pytest.raises(ImportError, match=r"'another_name'.*trl==1\.16"):
        make_trainer("GRPO", tmp_path, kind=R1GRPOTrainer)
    monkeypatch.undo()
    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", lambda self, model, inputs: self.another_name(model, inputs))
    with pytest.raises(ImportError, match=r"'_get_per_token_logps_and_entropies'.*trl==1\.16"):
        make_trainer("GRPO", tmp_path, kind=R1GRPOTrainer)
    monkeypatch.undo()
    monkeypatch.setattr("r1kernels.integrations.version", lambda package: "1.17.0")
    with pytest.raises(ImportError, match=r"trl is 1\.17\.0"):
        make_trainer("GRPO", tmp_path, kind=R1GRPOTrainer)


def test_the_hook_is_as_before_after_an_error(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import r1kernels

    trainer = make_trainer("GRPO", tmp_path, kind=R1GRPOTrainer)
    before = adapter.checked_utils(False)._ChunkedLogProbFunction

    def fails(*args: Any, **keywords: Any) -> Any:
        raise RuntimeError("as if memory were exhausted")

    monkeypatch.setattr(r1kernels, "linear_grpo_loss", fails)
    with pytest.raises(RuntimeError, match="exhausted"):
        trainer.train()
    assert adapter.checked_utils(False)._ChunkedLogProbFunction is before and trainer._r1_inputs is None


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        adapter.nothing  # noqa: B018


def test_two_ranks(tmp_path: Any, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--full"):
        pytest.skip("takes 30 s; runs with --full")
    import trl_ranks
    from ranks import run_ranks

    ranks = run_ranks(trl_ranks, tmp_path)
    assert len(ranks) == 2
    for name in trl_ranks.CASES:
        for found in ranks:
            (start, theirs, log), (_, ours, lines) = (found[name, kind] for kind in ("GRPOTrainer", "R1GRPOTrainer"))
            moved = (theirs - start).norm()
            assert moved > 1e-4 and (ours - theirs).norm() <= 1e-4 * moved
            for line, wanted in zip(lines, log, strict=True):
                assert line == pytest.approx(wanted, rel=1e-3, abs=1e-5, nan_ok=True)
        assert torch.equal(*(found[name, "R1GRPOTrainer"][1] for found in ranks))
    for found in ranks:
        theirs, ours = (found["sharded", kind] for kind in ("GRPOTrainer", "R1GRPOTrainer"))
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()

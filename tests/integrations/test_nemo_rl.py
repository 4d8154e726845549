"""NeMo-RL's loss, called as its code at commit 7ea279a (2026-08-22) calls it; what PyPI has under its name is empty."""

import enum
import math
import pickle
import sys
import types
from typing import Any

import pages
import pytest
import torch
from torch import Tensor

from r1kernels import integrations, testing
from r1kernels.integrations import nemo_rl

B, S, VOCAB = 4, 9, 30


@pytest.fixture(autouse=True)
def interfaces(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The names of nemo_rl.algorithms.loss.interfaces that a loss needs."""
    modules = {name: types.ModuleType(name) for name in (
        "nemo_rl", "nemo_rl.algorithms", "nemo_rl.algorithms.grpo", "nemo_rl.algorithms.loss",
        "nemo_rl.algorithms.loss.interfaces")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            setattr(modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
    found = modules["nemo_rl.algorithms.loss.interfaces"]
    found.LossType = enum.Enum("LossType", {"TOKEN_LEVEL": "token_level", "SEQUENCE_LEVEL": "sequence_level"})
    found.LossInputType = enum.Enum("LossInputType", {"LOGIT": "logit", "LOGPROB": "logprob"})
    found.MetricNormalizer = enum.Enum("MetricNormalizer", {"TOKENS": "tokens", "SEQUENCES": "seqs", "NONE": "none"})
    monkeypatch.setattr(integrations, "version", lambda package: {"nemo-rl": "0.6.0+7ea279a"}[package])
    return found


def make_data(seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    rng = testing.generator(seed)
    logits = 2 * torch.randn(B, S, VOCAB, generator=rng)
    ids = torch.randint(VOCAB, (B, S), generator=rng)
    now = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]

    def near(size: float) -> Tensor:
        moved = (now + size * torch.randn(now.shape, generator=rng)).clamp(max=-1e-3)
        return torch.cat([torch.zeros(B, 1), moved], 1)

    token_mask = (torch.rand(B, S, generator=rng) < 0.8).float()
    data = {"input_ids": ids, "token_mask": token_mask, "sample_mask": torch.tensor([1.0, 1.0, 0.0, 1.0]),
            "advantages": torch.randn(B, S, generator=rng), "prev_logprobs": near(0.4),
            "generation_logprobs": near(0.3), "reference_policy_logprobs": near(1.0),
            "rewards": torch.tensor([1.0, 0.0, 1.0, 1.0])}
    data["reference_policy_logprobs"][0, 3] += 4  # beyond the limits of the KL
    data["reference_policy_logprobs"][1, 4] -= 4
    data["prev_logprobs"][0, 2], data["advantages"][0, 2] = now[0, 1] - 1, -1.0  # beyond a dual clip
    data["token_mask"][0, 2] = data["token_mask"][0, 3] = data["token_mask"][1, 4] = 1
    return data, logits


def counts(data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """global_valid_seqs and global_valid_toks of a batch of which these data are a part."""
    valid = (data["token_mask"][:, 1:] * data["sample_mask"][:, None]).sum()
    return data["sample_mask"].sum() + 3, valid + 7


def formula(settings: dict[str, Any], data: dict[str, Tensor], now: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, some metrics) in float64, from docs/guides/grpo.md and docs/design-docs/loss-functions.md of NeMo-RL."""
    at = types.SimpleNamespace(**{**nemo_rl.SETTINGS, **settings})
    now = now.double()
    tokens, samples = data["token_mask"][:, 1:].double(), data["sample_mask"].double()
    a, gen, ref, old = (data[name][:, 1:].double() for name in (
        "advantages", "generation_logprobs", "reference_policy_logprobs", "prev_logprobs"))
    seqs, toks = (value.double() for value in counts(data))
    mask = tokens * samples[:, None]
    lengths = tokens.sum(-1).clamp(min=1)

    def over_tokens(x: Tensor) -> Tensor:
        return (x * mask).sum() / toks

    def reduce(x: Tensor) -> Tensor:
        return over_tokens(x) if at.token_level_loss else ((x * tokens).sum(-1) / lengths * samples).sum() / seqs

    old = now.detach() if at.force_on_policy_ratio else old
    r = (now - old).exp()
    if at.sequence_level_importance_ratios:
        r = (((now - old) * tokens).sum(-1) / lengths).exp()[:, None].expand_as(a)
    bounded = r.clamp(1 - at.ratio_clip_min, 1 + at.ratio_clip_max)
    surrogate = torch.maximum(-a * r, -a * bounded)
    if at.ratio_clip_c is not None:
        surrogate = torch.where(a < 0, torch.minimum(surrogate, -a * at.ratio_clip_c), surrogate)
    if at.use_cispo:
        surrogate = -a * bounded.detach() * now
    if at.disable_ppo_ratio:
        surrogate, r, bounded = -a * now, now, now
    w = (old - gen).detach()
    w = (w * mask).sum(-1, keepdim=True).exp() if at.sequence_level_importance_ratios else w.exp()
    low, high = at.truncated_importance_sampling_ratio_min or 0, at.truncated_importance_sampling_ratio
    if at.truncated_importance_sampling_type == "tis":
        w = w.clamp(low, high)
    elif at.truncated_importance_sampling_type == "icepop":
        w = w * ((w >= low) & (w <= high))
    elif at.truncated_importance_sampling_type == "seq-mask-tis":
        mean = (((old - gen).detach() * tokens).sum(-1, keepdim=True) / lengths[:, None]).exp()
        w = w * ((mean >= low) & (mean <= high))

    def estimate(d: Tensor) -> Tensor:
        return {"k1": -d, "k2": d * d / 2, "k3": d.exp() - 1 - d}[at.reference_policy_kl_type]

    loss = reduce((w if at.use_importance_sampling_correction else 1) * surrogate)
    kl = torch.zeros(())
    if not at.use_kl_in_reward:
        p = (now - (gen if at.use_on_policy_kl_approximation else now.detach())).exp()
        d = ref - now
        if at.kl_input_clamp_value is not None:
            p = torch.where(d.abs() <= at.kl_input_clamp_value, p, p.detach())
            d = d.clamp(-at.kl_input_clamp_value, at.kl_input_clamp_value)
        each = p * estimate(d)
        if at.kl_output_clamp_value is not None:
            each = each.clamp(-at.kl_output_clamp_value, at.kl_output_clamp_value)
        kl = reduce(each)
        loss = loss + at.reference_policy_kl_penalty * kl
    if at.positive_example_nll_weight:
        correct = mask * (data["rewards"] > 0)[:, None]
        loss = loss - at.positive_example_nll_weight * (now * correct).sum() / correct.sum()
    mixture = (old.exp() / 2 + gen.exp() / 2).log()
    js = sum((x - mixture).exp() - (x - mixture) - 1 for x in (old, gen)) / 2
    chosen = mask.bool()
    return loss, {
        "loss": loss, "kl_penalty": kl, "probs_ratio": over_tokens(r), "probs_ratio_clamped": over_tokens(
            r if at.force_on_policy_ratio else bounded),
        "probs_ratio_min": r[chosen].min(), "probs_ratio_max": r[chosen].max(),
        "gen_kl_error": over_tokens(estimate(old - gen)), "policy_kl_error": over_tokens(estimate(gen - old)),
        "token_mult_prob_error": over_tokens((gen - old).abs().exp()), "js_divergence_error": over_tokens(js),
        "approx_entropy": over_tokens(-(now - gen).exp() * now), "num_valid_samples": samples.sum(),
        **({} if at.sequence_level_importance_ratios else {"sampling_importance_ratio": over_tokens(w)}),
    }


TRUNCATED = {"use_importance_sampling_correction": True, "truncated_importance_sampling_ratio": 1.2,
             "truncated_importance_sampling_ratio_min": 0.9}
CASES = {
    "default": {},
    "clip-higher, dual clip, sequences": {"ratio_clip_max": 0.28, "ratio_clip_c": 1.3, "token_level_loss": False},
    "gspo": {"sequence_level_importance_ratios": True, "token_level_loss": False, "ratio_clip_min": 0.01,
             "ratio_clip_max": 0.02, "use_importance_sampling_correction": True},
    "cispo, kl in reward": {"use_cispo": True, "ratio_clip_min": 0.1, "ratio_clip_max": 0.1, "use_kl_in_reward": True},
    "reinforce": {"disable_ppo_ratio": True, "reference_policy_kl_type": "k2"},
    "on-policy": {"force_on_policy_ratio": True, "use_on_policy_kl_approximation": True, "kl_output_clamp_value": None},
    "limits of the kl": {"reference_policy_kl_penalty": 0.3, "kl_input_clamp_value": 2.0, "kl_output_clamp_value": 1.5},
    "k1": {"reference_policy_kl_type": "k1", "kl_input_clamp_value": None, "reference_policy_kl_penalty": 0.3},
    "tis": {**TRUNCATED, "truncated_importance_sampling_type": "tis"},
    "icepop": {**TRUNCATED, "truncated_importance_sampling_type": "icepop", "token_level_loss": False},
    "seq-mask-tis": {**TRUNCATED, "truncated_importance_sampling_type": "seq-mask-tis"},
    "vapo": {"positive_example_nll_weight": 0.4},
}


@pytest.mark.parametrize("case", CASES)
def test_loss_gradient_and_metrics_are_the_formulas(case: str) -> None:
    data, logits = make_data()
    now = logits[:, :-1].log_softmax(-1).gather(-1, data["input_ids"][:, 1:, None])[..., 0]
    ours, exact = now.clone().requires_grad_(), now.double().requires_grad_()
    expected, metrics = formula(CASES[case], data, exact)
    expected.backward()
    seqs, toks = counts(data)
    hidden = data["token_mask"][:, 1:] * data["sample_mask"][:, None] == 0
    for name in ("prev_logprobs", "generation_logprobs", "reference_policy_logprobs"):
        data[name][:, 1:][hidden] = math.nan  # what is masked must not matter
    loss, got = nemo_rl.R1PolicyLoss(CASES[case])(
        next_token_logprobs=ours, data=data, global_valid_seqs=seqs, global_valid_toks=toks)
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    assert {name: got[name] for name in metrics} == pytest.approx(
        {name: float(value.detach()) for name, value in metrics.items()}, rel=1e-4, abs=1e-5)
    assert all(isinstance(value, float) for value in got.values())
    assert ("is_oob_ratio" in got) == ("truncated_importance_sampling_type" in CASES[case])


def test_micro_batches_add_up_to_the_batch() -> None:
    data, logits = make_data()
    seqs, toks = counts(data)
    for settings in ({}, {"token_level_loss": False}):
        loss = nemo_rl.R1LogitsLoss(settings)
        whole, metrics = loss(logits, data, seqs, toks)
        parts = [loss(logits[i : i + 1], {k: v[i : i + 1] for k, v in data.items()}, seqs, toks) for i in range(B)]
        torch.testing.assert_close(sum(part for part, _ in parts), whole)
        assert sum(part["kl_penalty"] for _, part in parts) == pytest.approx(metrics["kl_penalty"], rel=1e-5)


def test_a_batch_without_tokens_has_loss_0() -> None:
    data, logits = make_data()
    data["sample_mask"].zero_()
    leaf = logits.requires_grad_()
    loss, metrics = nemo_rl.R1LogitsLoss({})(leaf, data, torch.tensor(0.0), torch.tensor(0.0))
    loss.backward()
    assert loss == 0 and leaf.grad.eq(0).all() and metrics["probs_ratio_min"] == math.inf


def test_twenty_steps_from_logits_give_the_parameters_of_the_formula() -> None:
    trained, loss = [], nemo_rl.R1LogitsLoss(CASES["tis"])
    for dtype in (torch.float32, torch.float64):
        weight = torch.eye(VOCAB, dtype=dtype).requires_grad_()
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for step in range(20):
            data, logits = make_data(step)
            z = logits.to(dtype) @ weight
            optimizer.zero_grad()
            if dtype == torch.float32:
                value, _ = loss(logits=z, data=data, global_valid_seqs=counts(data)[0],
                                global_valid_toks=counts(data)[1])
            else:
                now = z[:, :-1].log_softmax(-1).gather(-1, data["input_ids"][:, 1:, None])[..., 0]
                value, _ = formula(CASES["tis"], data, now)
            value.backward()
            optimizer.step()
        trained.append(weight.detach().double())
    torch.testing.assert_close(*trained, rtol=1e-3, atol=1e-4)
    assert (trained[0] - torch.eye(VOCAB)).abs().max() > 0.01


def test_what_nemo_rl_reads_of_a_loss(interfaces: types.ModuleType) -> None:
    loss = nemo_rl.R1PolicyLoss(types.SimpleNamespace(**nemo_rl.SETTINGS), use_fused_linear_logprobs=True)
    assert loss.loss_type is interfaces.LossType.TOKEN_LEVEL and loss.input_type is interfaces.LossInputType.LOGPROB
    assert loss.use_fused_linear_logprobs and loss.reference_policy_kl_penalty == 0.01
    other = nemo_rl.R1LogitsLoss({"token_level_loss": False, "use_kl_in_reward": True})
    assert other.loss_type is interfaces.LossType.SEQUENCE_LEVEL and other.input_type is interfaces.LossInputType.LOGIT
    assert other.reference_policy_kl_penalty == 0
    data, logits = make_data()
    _, metrics = other(logits, data, *counts(data))
    assert set(metrics) <= set(other.metric_normalizations)
    assert other.metric_normalizations["loss"] is interfaces.MetricNormalizer.SEQUENCES
    other.loss_type = other.input_type = other.metric_normalizations = None  # the enums of this file are local
    assert pickle.loads(pickle.dumps(other)).objective == other.objective


@pytest.mark.parametrize("settings, words", [
    ({"sequence_level_importance_ratios": True}, "token_level_loss is True"),
    ({"use_cispo": True, "ratio_clip_c": 3.0}, "use_cispo is True"),
    ({"ratio_clip_c": 1.1}, r"ratio_clip_c is 1\.1"),
    ({"truncated_importance_sampling_type": "other"}, "type is 'other'"),
    ({"truncated_importance_sampling_type": "icepop", "truncated_importance_sampling_ratio": 2.0}, "ratio_min None"),
    ({"new_loss_term": 0.1}, r"new_loss_term is 0\.1"),
    ({"ratio_clip_min": -1.0}, "ratio_clip_min is -1"),
    ({"ratio_clip_c": "3"}, "ratio_clip_c is '3'"),
    ({"reference_policy_kl_penalty": "0.1"}, "reference_policy_kl_penalty is '0.1'"),
    ({"reference_policy_kl_type": "k9"}, "reference_policy_kl_type is 'k9'"),
    ({"kl_input_clamp_value": -1}, "kl_input_clamp_value is -1"),
    ({"positive_example_nll_weight": -1}, "positive_example_nll_weight is -1"),
    ({"use_cispo": "no"}, "use_cispo is 'no'"),
    ({**TRUNCATED, "truncated_importance_sampling_type": "tis", "truncated_importance_sampling_ratio": -1},
     "truncated_importance_sampling_ratio is -1"),
    ({**TRUNCATED, "truncated_importance_sampling_ratio": 0}, "truncated_importance_sampling_ratio is 0"),
    ({**TRUNCATED, "truncated_importance_sampling_ratio_min": 1.3}, r"ratio_min is 1\.3, expected at most"),
    ({**TRUNCATED, "truncated_importance_sampling_type": "seq-mask-tis", "token_level_loss": False,
      "sequence_level_importance_ratios": True}, "sequence_level_importance_ratios is True"),
])
def test_errors_name_what_was_wrong(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        nemo_rl.R1PolicyLoss(settings)


def test_a_setting_of_a_pydantic_model_that_this_version_has_not_is_refused() -> None:
    """ClippedPGLossConfig is such a model: it keeps unknown settings beside its fields."""
    pydantic = pytest.importorskip("pydantic", reason="pydantic is not installed")
    config = pydantic.create_model("ClippedPGLossConfig", __config__=pydantic.ConfigDict(extra="allow"),
                                   **{name: (object, value) for name, value in nemo_rl.SETTINGS.items()})
    assert vars(nemo_rl.R1PolicyLoss(config(ratio_clip_max=0.3)).settings) == {
        **nemo_rl.SETTINGS, "ratio_clip_max": 0.3}
    with pytest.raises(ValueError, match=r"new_clip is 0\.5"):
        nemo_rl.R1PolicyLoss(config(new_clip=0.5))


@pytest.mark.parametrize("changed, words", [
    ({"sample_mask": torch.tensor([0.5, 1, 0, 1])}, "sample_mask has a value other than 0 and 1"),
    ({"token_mask": torch.full((B, S), 0.5)}, "token_mask has a value other than 0 and 1"),
    ({"curr_logprobs_keep_mask": torch.ones(B, S - 1)}, "curr_logprobs_keep_mask"),
    ({"advantages": torch.ones(B)}, r"advantages has shape \(4,\), expected \(4, 9\)"),
    ({"token_mask": [[1]]}, r"token_mask is \[\[1\]\], expected a tensor"),
    ({"sample_mask": torch.ones(B, 1)}, r"sample_mask has shape \(4, 1\)"),
    ({"prev_logprobs": None}, "data has no prev_logprobs"),
    ({"reference_policy_logprobs": None}, "data has no reference_policy_logprobs"),
    ({"input_ids": None}, "data has no input_ids"),
])
def test_data_that_the_loss_does_not_know_are_named(changed: dict[str, Any], words: str) -> None:
    data, logits = make_data()
    with pytest.raises((TypeError, ValueError), match=words):
        nemo_rl.R1LogitsLoss({})(logits, {**data, **changed}, *counts(data))


def test_a_nan_of_the_reference_model_is_named() -> None:
    data, logits = make_data()
    data["reference_policy_logprobs"][0, 3] = math.nan
    with pytest.raises(ValueError, match="KL to reference_policy_logprobs returned a loss that is NaN"):
        nemo_rl.R1LogitsLoss({})(logits, data, *counts(data))


def test_what_a_setting_does_not_use_may_be_absent() -> None:
    data, logits = make_data()
    del data["prev_logprobs"], data["reference_policy_logprobs"]
    loss = nemo_rl.R1LogitsLoss({"force_on_policy_ratio": True, "use_kl_in_reward": True})
    assert loss(logits, data, *counts(data))[0].isfinite()


def test_another_nemo_rl_is_refused(interfaces: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="no disable_ppo_ratio"):
        nemo_rl.R1PolicyLoss(types.SimpleNamespace(token_level_loss=True))
    with pytest.raises(TypeError, match="cfg is a NoneType"):
        nemo_rl.R1PolicyLoss(None)
    del interfaces.LossType
    with pytest.raises(ImportError, match="no LossType"):
        nemo_rl.R1PolicyLoss({})
    monkeypatch.setattr(integrations, "version", lambda package: "0.7.0")
    with pytest.raises(ImportError, match=r"nemo-rl is 0\.7\.0.*0\.6"):
        nemo_rl.R1PolicyLoss({})


def test_every_block_of_the_page_runs() -> None:
    data, logits = make_data()
    for _, _, language, code in pages.blocks("docs/migrate/nemo_rl.md"):
        names: dict[str, Any] = {"setup": lambda: None}
        assert language == "python"
        exec(compile(code, "nemo_rl.md", "exec"), names)
        loss = names["grpo"].ClippedPGLossFn(types.SimpleNamespace(**nemo_rl.SETTINGS), use_fused_linear_logprobs=False)
        first = logits if loss.input_name == "LOGIT" else logits[:, :-1].log_softmax(-1)[..., 0]
        assert loss(first, data, *counts(data))[0].isfinite()

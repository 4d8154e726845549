"""Losses and head of prime-rl, called as its code at commit 559b447 (2026-08-21) calls them; it is not on PyPI."""

import dataclasses
import importlib
import math
import sys
import types
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from r1kernels import integrations, testing
from r1kernels.integrations import prime_rl


@dataclasses.dataclass
class LossInputs:
    """What a custom loss gets, of one sequence: docs/algorithms.md of prime-rl, "Custom Loss"."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


LENGTHS = (7, 1, 12)


def inputs_of(seed: int = 0, weights: bool = False) -> list[LossInputs]:
    """Three sequences that were packed into one row, as prime-rl splits them again."""
    rng = testing.generator(seed)
    n = sum(LENGTHS)
    new = -2 * torch.rand(n, generator=rng)
    old = (new + 0.5 * torch.randn(n, generator=rng)).clamp(max=-1e-3)
    reference = (new + 0.3 * torch.randn(n, generator=rng)).clamp(max=-1e-3)
    advantages = torch.randn(n, generator=rng)
    advantages[::5] = 0
    mask = torch.rand(n, generator=rng) < 0.8
    old[~mask], advantages[~mask] = math.nan, math.inf
    columns = [value.split(LENGTHS) for value in (new, old, reference, advantages, mask)]
    scales = (0.5 + torch.rand(n, generator=rng)).split(LENGTHS) if weights else [None] * len(LENGTHS)
    return [LossInputs(*row, weight) for *row, weight in zip(*columns, scales, strict=True)]


def total(loss: Any, sequences: list[LossInputs], **kwargs: Any) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """(loss, its gradient, metrics) of a micro-batch: the sum over sequences divided by the number of all tokens."""
    packed = torch.cat([row.trainer_logprobs for row in sequences]).requires_grad_()
    scale = max(sum(int(row.loss_mask.sum()) for row in sequences), 1)
    results = [
        loss(dataclasses.replace(row, trainer_logprobs=part), **kwargs)
        for row, part in zip(sequences, packed.split([len(row.loss_mask) for row in sequences]), strict=True)
    ]
    value = sum(result.loss for result in results) / scale
    value.backward()
    return value.detach(), packed.grad, [result.metrics for result in results]


def formula(row: LossInputs, name: str, settings: dict[str, float]) -> Tensor:
    """The sum over one sequence's tokens in float64, from docs/algorithms.md and the papers."""
    kept = row.loss_mask
    columns = (row.trainer_logprobs, row.inference_logprobs, row.ref_logprobs, row.advantages)
    new, old, reference, a = (value.double()[kept] for value in columns)
    w = 1.0 if row.loss_weights is None else row.loss_weights.double()[kept]
    r, up = (new - old).exp(), new.exp() - old.exp()
    if name in ("dppo", "ipo"):
        if name == "dppo":
            gone = torch.where(a > 0, up > settings["dppo_mask_high"], -up > settings["dppo_mask_low"])
        else:
            gone = up.abs() > settings["ipo_threshold"]
        per_token = -torch.where(gone, 0, settings["adv_tau"] * a * r) + settings["kl_tau"] * (new - old).square()
    elif name == "cispo":
        per_token = -r.detach().clamp(1 - settings["clip_low"], 1 + settings["clip_high"]) * a * new
    else:
        r = (new - old).mean().exp() if name == "gspo" else r
        bounded = r.clamp(1 - settings["clip_low"], 1 + settings["clip_high"])
        per_token = -torch.minimum(r * a, bounded * a)
    if "kl_coef" in settings:
        per_token = per_token + settings["kl_coef"] * ((reference - new).exp() - (reference - new) - 1)
    return (w * per_token).sum() if len(new) else (0 * row.trainer_logprobs).double().sum()


CASES = {
    "dppo": {"dppo_mask_low": 0.05, "dppo_mask_high": 0.3, "adv_tau": 0.7, "kl_tau": 0.05},
    "ipo": {"ipo_threshold": 0.12, "adv_tau": 1.3, "kl_tau": 0.02},
    "grpo": {"clip_low": 0.2, "clip_high": 0.3},
    "cispo": {"clip_low": 0.4, "clip_high": 0.2},
    "gspo": {"clip_low": 0.01, "clip_high": 0.02},
}


@pytest.mark.parametrize("weights", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("name", CASES)
def test_losses_are_the_formulas(name: str, weights: bool) -> None:
    sequences = inputs_of(seed=3, weights=weights)
    value, grad, _ = total(getattr(prime_rl, name), sequences, **CASES[name])
    exact, exact_grad, _ = total(
        lambda row: types.SimpleNamespace(loss=formula(row, name, CASES[name]), metrics={}), sequences)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, exact_grad, rtol=1e-5, atol=1e-6)
    assert grad[~torch.cat([row.loss_mask for row in sequences])].eq(0).all() and grad.ne(0).any()


def test_the_kl_to_a_reference_model_is_added() -> None:
    sequences, settings = inputs_of(seed=4), {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.1}
    value, grad, _ = total(prime_rl.grpo, sequences, **settings)
    exact, exact_grad, _ = total(
        lambda row: types.SimpleNamespace(loss=formula(row, "grpo", settings), metrics={}), sequences)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, exact_grad, rtol=1e-5, atol=1e-6)


def test_metrics_have_the_names_and_values_of_prime_rl() -> None:
    settings = CASES["dppo"]
    for row in inputs_of(seed=5):
        metrics = prime_rl.dppo(row, **settings).metrics
        kept = row.loss_mask
        new, old, a = (x[kept].double() for x in (row.trainer_logprobs, row.inference_logprobs, row.advantages))
        up, gap = new.exp() - old.exp(), new - old
        high, low, kl = up > settings["dppo_mask_high"], up < -settings["dppo_mask_low"], gap.exp() - gap - 1
        gone = torch.where(a > 0, high, low)

        def mean(values: Tensor, of: Tensor) -> float:
            return float(values[of].double().sum() / max(int(of.sum()), 1))

        everything = torch.ones_like(gone)
        expected = {
            "masked_mismatch_kl": mean(kl, gone), "unmasked_mismatch_kl": mean(kl, ~gone),
            "is_masked": mean(gone, everything), "is_masked_low": mean((a < 0) & low, everything),
            "is_masked_high": mean((a > 0) & high, everything),
            "masked_advantage_positive": mean(a > 0, gone), "masked_advantage_negative": mean(a < 0, gone),
        }
        assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())
    # prime-rl stacks the metrics of sequences, so all sequences have the same ones.
    names = [set(prime_rl.grpo(row).metrics) for row in inputs_of(seed=6)]
    assert names[0] >= {"ratio_mean", "clip_fraction"} and all(other == names[0] for other in names)


class Tiny(nn.Module):
    """A model as prime-rl has it: `model.model`, and a head that gets labels and temperatures."""

    def __init__(self, vocab: int = 40, width: int = 12, softcap: float | None = None) -> None:
        super().__init__()
        self.model, self.lm_head = nn.Embedding(vocab, width), nn.Linear(width, vocab, bias=False)
        self.config = types.SimpleNamespace(final_logit_softcapping=softcap)

    def forward(self, input_ids: Tensor, labels: Tensor, temperature: Tensor) -> dict[str, Tensor]:
        return self.lm_head(self.model(input_ids), labels, temperature=temperature)


class Scaled(nn.Linear):
    """A head that is more than a product with its weight."""

    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * super().forward(hidden)


def plain(model: Tiny, ids: Tensor, labels: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    z = model.model.weight[ids] @ model.lm_head.weight.T
    if softcap := model.config.final_logit_softcapping:
        z = softcap * torch.tanh(z / softcap)
    p = (z / temperature[..., None]).log_softmax(-1)
    return p.gather(-1, labels[..., None])[..., 0], -(p.exp() * p).sum(-1)


@pytest.mark.parametrize("softcap, part", [(None, False), (3.0, False), (3.0, True)])
def test_the_head_is_exact_and_reversible(softcap: float | None, part: bool) -> None:
    torch.manual_seed(0)
    model = Tiny(softcap=softcap)
    if part:  # a model of images and text
        model.config = types.SimpleNamespace(text_config=model.config)
    names = list(model.state_dict())
    ids = torch.randint(40, (2, 9))
    labels, temperature = torch.randint(40, (2, 9)), 0.5 + torch.rand(2, 9)
    prime_rl.use_fused_head(model)
    output = model(ids, labels, temperature)
    assert list(model.state_dict()) == names
    exact = Tiny(softcap=softcap).double()
    exact.load_state_dict(model.state_dict())
    logprobs, entropy = plain(exact, ids, labels, temperature.double())
    torch.testing.assert_close(output["logprobs"].double(), logprobs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output["entropy"].double(), entropy, rtol=1e-5, atol=1e-6)
    assert output["logprobs"].dtype == torch.float32 and not output["entropy"].requires_grad
    output["logprobs"].square().sum().backward()
    logprobs.square().sum().backward()
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
    prime_rl.restore_head(model)
    hidden = torch.randn(1, 2, 12)
    torch.testing.assert_close(model.lm_head(hidden), hidden @ model.lm_head.weight.T)


@pytest.mark.parametrize("first", ["head", "fsdp"])
def test_the_head_keeps_the_hooks_of_fsdp(first: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = Tiny()
    ids, labels, temperature = torch.randint(40, (1, 5)), torch.randint(40, (1, 5)), torch.ones(1, 5)
    (-plain(model, ids, labels, temperature)[0].sum()).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        if first == "head":
            prime_rl.use_fused_head(model)
        for module in (model.lm_head, model):
            fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        if first == "fsdp":
            prime_rl.use_fused_head(model)
        (-model(ids, labels, temperature)["logprobs"].sum()).backward()
        grads = [parameter.grad.full_tensor() for parameter in model.parameters()]
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(grads, expected)


def test_sets_that_sampling_kept() -> None:
    torch.manual_seed(1)
    model = Tiny()
    ids, labels, temperature = torch.randint(40, (1, 4)), torch.tensor([[3, 5, 7, 9]]), torch.ones(1, 4)
    kept = torch.tensor([[[3, 4, -1], [-1, -1, -1], [8, 9, 10], [9, 1, 2]]], dtype=torch.int32)
    prime_rl.use_fused_head(model)
    got = model.lm_head(model.model(ids), labels, temperature=temperature, kept_tokens=kept)["logprobs"]
    z = (model.model(ids) @ model.lm_head.weight.T)[0]
    sets = [[3, 4], list(range(40)), list(range(40)), [9, 1, 2]]  # the label of the third is not in its set
    expected = [z[t, labels[0, t]] - z[t, chosen].logsumexp(-1) for t, chosen in enumerate(sets)]
    torch.testing.assert_close(got[0], torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_twenty_steps_give_the_parameters_of_plain_torch() -> None:
    torch.manual_seed(2)
    ours, theirs = Tiny(), Tiny().double()
    theirs.load_state_dict(ours.state_dict())
    prime_rl.use_fused_head(ours)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (ours, theirs)]
    n, settings, start = sum(LENGTHS), CASES["dppo"], ours.lm_head.weight.detach().clone()
    for step in range(20):
        rng = testing.generator(step)
        ids, temperature = torch.randint(40, (1, n), generator=rng), 0.7 + torch.rand(1, n, generator=rng)
        labels = torch.cat([ids[:, 1:], torch.zeros(1, 1, dtype=torch.int64)], 1)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            real = next(model.parameters()).dtype
            if model is ours:
                logprobs = model(ids, labels, temperature)["logprobs"]
            else:
                logprobs, _ = plain(model, ids, labels, temperature.double())
            logprobs = torch.cat([torch.full((1, 1), -math.log(40), dtype=real), logprobs[:, :-1]], 1)  # shifted right
            sequences = [
                dataclasses.replace(row, trainer_logprobs=part, inference_logprobs=part.detach().to(real)
                                    + 0.5 * row.trainer_logprobs)
                for row, part in zip(inputs_of(step), logprobs[0].split(LENGTHS), strict=True)
            ]
            loss = prime_rl.dppo if model is ours else (
                lambda row, **kw: types.SimpleNamespace(loss=formula(row, "dppo", kw)))
            value = sum(loss(row, **settings).loss for row in sequences)
            optimizer.zero_grad()
            (value / sum(int(row.loss_mask.sum()) for row in sequences)).backward()
            optimizer.step()
    assert (ours.lm_head.weight - start).abs().max() > 0.01
    for mine, exact in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-3, atol=1e-4)


@pytest.fixture
def fake_prime_rl(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The two modules of prime-rl that the adapter looks into, and its version."""
    modules = {name: types.ModuleType(name) for name in (
        "prime_rl", "prime_rl.trainer", "prime_rl.trainer.model", "prime_rl.trainer.models",
        "prime_rl.trainer.models.layers", "prime_rl.trainer.models.layers.lm_head")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    heads, model = modules["prime_rl.trainer.models.layers.lm_head"], modules["prime_rl.trainer.model"]
    heads.inject_prime_lm_head = lambda model, chunk_size=None: setattr(model, "injected", chunk_size)
    model.inject_prime_lm_head = heads.inject_prime_lm_head
    monkeypatch.setattr(integrations, "version", lambda package: {"prime-rl": "0.8.0"}[package])
    return model


def test_without_labels_the_head_gives_logits() -> None:
    model, hidden = Tiny(), torch.randn(1, 3, 12)
    assert isinstance(model.lm_head, nn.Linear)
    expected = model.lm_head(hidden)
    prime_rl.use_fused_head(model)
    torch.testing.assert_close(model.lm_head(hidden), expected, rtol=0, atol=0)


def test_models_that_prime_rl_makes_get_the_head(fake_prime_rl: types.ModuleType) -> None:
    before, inside, after = Tiny(), Tiny(), Tiny()
    fake_prime_rl.inject_prime_lm_head(before, chunk_size=512)
    with prime_rl.fused_lm_head():
        fake_prime_rl.inject_prime_lm_head(inside, chunk_size=512)
    fake_prime_rl.inject_prime_lm_head(after, chunk_size=512)
    assert [model.injected for model in (before, inside, after)] == [512] * 3
    assert ["forward" in vars(model.lm_head) for model in (before, inside, after)] == [False, True, False]


def test_other_versions_are_refused(fake_prime_rl: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    del fake_prime_rl.inject_prime_lm_head
    with pytest.raises(ImportError, match=r"inject_prime_lm_head.*0\.8.*use_fused_head"), prime_rl.fused_lm_head():
        pass
    monkeypatch.delitem(sys.modules, "prime_rl.trainer.models.layers.lm_head")
    with pytest.raises(ImportError, match=r"layers\.lm_head has no inject_prime_lm_head.*use_fused_head"):
        prime_rl.inject_lm_head(Tiny())
    monkeypatch.setattr(integrations, "version", lambda package: "0.9.1")
    with pytest.raises(ImportError, match=r"prime-rl is 0\.9\.1.*0\.8"):
        prime_rl.inject_lm_head(Tiny())


@pytest.mark.parametrize("call, words", [
    (lambda row: prime_rl.dppo(types.SimpleNamespace(advantages=row.advantages)), "no trainer_logprobs"),
    (lambda row: prime_rl.dppo(dataclasses.replace(row, advantages=None)), "advantages is None, expected a tensor"),
    (lambda row: prime_rl.ipo(dataclasses.replace(row, inference_logprobs=torch.zeros(3))),
     r"inference_logprobs has shape \(3,\), expected \(7,\)"),
    (lambda row: prime_rl.grpo(dataclasses.replace(row, loss_mask=row.loss_mask.int())),
     "loss_mask is torch.int32, expected torch.bool"),
    (lambda row: prime_rl.dppo(row, dppo_mask_low=-1.0), "dppo_mask_low is -1.0"),
    (lambda row: prime_rl.ipo(row, kl_tau=math.inf), "kl_tau is inf"),
    (lambda row: prime_rl.grpo(row, aggregate="sequence_mean"), "aggregate is 'sequence_mean'"),
    (lambda row: prime_rl.gspo(row, entropy_coef=0.1), "entropy_coef is 0.1"),
    (lambda row: prime_rl.policy_loss(row, "ppo"), "objective is 'ppo'"),
    (lambda row: prime_rl.policy_loss(row, "luspo"), "objective is 'luspo'"),
    (lambda row: prime_rl.policy_loss(row, "grpo", eps=0.1), "'eps'"),
    (lambda row: prime_rl.policy_loss(dataclasses.replace(row, loss_weights=row.advantages), "r1"), "kl_coef is 0.001"),
    (lambda row: prime_rl.grpo(dataclasses.replace(row, loss_weights=row.advantages), kl_coef=0.1), "kl_coef is 0.1"),
    (lambda row: prime_rl.grpo(dataclasses.replace(row, ref_logprobs=None), kl_coef=0.1), "ref_logprobs is None"),
    (lambda row: prime_rl.use_fused_head(nn.Sequential()), "lm_head is a NoneType"),
    (lambda row: prime_rl.use_fused_head(types.SimpleNamespace(lm_head=Scaled(2, 3))), "lm_head is a Scaled"),
])
def test_errors_name_what_was_wrong(call: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        call(inputs_of()[0])


def test_every_block_of_the_page_runs(fake_prime_rl: types.ModuleType) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    model = Tiny()
    names = {"model": model, "hidden": torch.randn(1, 3, 12), "labels": torch.randint(40, (1, 3)), "config": None,
             "train": lambda config: fake_prime_rl.inject_prime_lm_head(model, chunk_size=None)}
    kinds = []
    for _, _, language, code in pages.blocks("docs/migrate/prime_rl.md"):
        kinds.append(language)
        if language == "toml":
            settings = tomllib.loads(code)["trainer"]["loss"]
            module, _, name = settings["import_path"].rpartition(".")
            loss = getattr(importlib.import_module(module), name)(inputs_of()[0], **settings["kwargs"]).loss
            assert settings["type"] == "custom" and loss.isfinite()
        elif language == "diff":
            removed, added = code.splitlines()
            scope: dict[str, Any] = {}
            exec(removed[1:], scope)  # from the modules of the fixture
            exec(added[1:], scope)
            assert scope["inject_prime_lm_head"] is prime_rl.inject_lm_head
        else:
            exec(compile(code, "prime_rl.md", "exec"), names)
    assert sorted(kinds) == ["diff", "python", "python", "toml", "toml"]
    assert model.lm_head.weight.grad.ne(0).any() and "forward" in vars(model.lm_head)

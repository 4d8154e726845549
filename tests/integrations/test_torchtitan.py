"""The losses in torchtitan 0.3.0: in its wrapper, beside its own losses, and against formulas in float64."""

import copy
import functools
import importlib.util
import math
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from r1kernels import integrations, objectives, testing
from r1kernels.integrations import torchtitan as ours

pytest.importorskip("torchtitan", reason="torchtitan is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torchtitan calls torch.compile on import
VOCAB, WIDTH, BATCH, LENGTH = 50, 16, 2, 8


def decoder() -> nn.Module:
    """torchtitan's Llama without layers: embedding, norm and head."""
    from torchtitan.models.common import Embedding, Linear, RMSNorm
    from torchtitan.models.llama3.model import Llama3Model

    normal, ones = {"weight": functools.partial(nn.init.normal_, std=0.5)}, {"weight": nn.init.ones_}
    model = Llama3Model.Config(
        dim=WIDTH, vocab_size=VOCAB, layers=[], norm=RMSNorm.Config(normalized_shape=WIDTH, param_init=ones),
        tok_embeddings=Embedding.Config(num_embeddings=VOCAB, embedding_dim=WIDTH, param_init=normal),
        lm_head=Linear.Config(in_features=WIDTH, out_features=VOCAB, param_init=normal)).build()
    torch.manual_seed(0)
    model.init_weights()
    return model


def attach(loss: Any, model: nn.Module) -> Any:
    """What torchtitan's trainer does after it made the model."""
    from torchtitan.components.loss import ChunkedLossWrapper

    if isinstance(loss, ChunkedLossWrapper):
        loss.set_lm_head(model.lm_head)
        model._skip_lm_head = True
    return loss


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = testing.generator(seed)
    ids, labels = (torch.randint(VOCAB, (BATCH, LENGTH), generator=rng) for _ in range(2))
    labels[torch.rand(labels.shape, generator=rng) < 0.3] = -100
    return ids, labels


def policy_inputs(seed: int = 0) -> dict[str, Tensor]:
    rng = testing.generator(seed)
    old = -4 + torch.randn(BATCH, LENGTH, generator=rng)
    old[0, 3] = math.nan  # torchtitan drops such tokens
    advantages = torch.randn(BATCH, LENGTH, generator=rng)
    advantages[1, :3] = 0  # they count in the metrics
    return {"generator_logprobs": old, "advantages": advantages,
            "loss_mask": torch.rand(BATCH, LENGTH, generator=rng) < 0.8}


def config(name: str) -> Any:
    from torchtitan.components import loss as theirs

    return {
        "logits": lambda: ours.CrossEntropyLoss.Config(global_vocab_size=VOCAB),
        "chunks": lambda: theirs.ChunkedLossWrapper.Config(num_chunks=4, loss_fn=ours.CrossEntropyLoss.Config()),
        "hidden": lambda: ours.LinearCrossEntropyLoss.Config(chunk_bytes=4 * VOCAB * 5),
        "torchtitan": lambda: theirs.ChunkedLossWrapper.Config(num_chunks=4),
    }[name]()


def exact_loss(model: nn.Module, ids: Tensor, labels: Tensor, valid: float) -> Tensor:
    z = model.lm_head(model.norm(model.tok_embeddings(ids)))
    logprobs = z.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return -torch.where(labels == -100, 0, logprobs).sum() / valid


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.double() for parameter in model.parameters()]


@pytest.mark.parametrize("name", ["logits", "chunks", "hidden"])
def test_cross_entropy_is_the_formula(name: str) -> None:
    model = decoder()
    ids, labels = batch()
    exact = copy.deepcopy(model).double()
    expected = exact_loss(exact, ids, labels, valid=11.0)
    expected.backward()
    loss = attach(config(name).build(compile_config=None), model)
    value, metrics = loss(model(ids), labels, torch.tensor(11.0))
    value.backward()
    torch.testing.assert_close(value.detach().double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(model), gradients(exact), rtol=1e-4, atol=1e-6)
    assert metrics == {}
    with torch.no_grad():  # validation: a sum
        total, _ = loss(model(ids), labels)
    torch.testing.assert_close(total.double(), 11 * expected.detach(), rtol=1e-5, atol=1e-6)


def test_twenty_steps_give_the_parameters_of_torchtitan() -> None:
    trained = {}
    for name in ("torchtitan", "chunks", "hidden"):
        model = decoder()
        loss = attach(config(name).build(compile_config=None), model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for step in range(20):
            ids, labels = batch(step)
            optimizer.zero_grad()
            loss(model(ids), labels, (labels != -100).sum())[0].backward()
            optimizer.step()
        trained[name] = [parameter.detach() for parameter in model.parameters()]
    for name in ("chunks", "hidden"):
        torch.testing.assert_close(trained[name], trained["torchtitan"], rtol=1e-4, atol=1e-5)
    assert (trained["hidden"][0] - decoder().tok_embeddings.weight).abs().max() > 0.01


@pytest.fixture
def dapo(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """torchtitan's module of DAPOLoss, read from its file: its package imports vLLM."""
    from torchtitan.components import loss as theirs

    path = Path(theirs.__file__).parents[1] / "experiments/rl/losses/dapo.py"
    spec = importlib.util.spec_from_file_location("dapo", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "dapo", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_token_far_from_the_generator_has_the_loss_of_torchtitan(dapo: types.ModuleType, sign: int) -> None:
    from torchtitan.components import loss as theirs

    ids, labels = batch(1)
    inputs = policy_inputs() | {"advantages": torch.full(labels.shape, float(sign))}
    inputs["generator_logprobs"][1] -= 100
    results = []
    for made in (theirs.ChunkedLossWrapper.Config(num_chunks=2, loss_fn=dapo.DAPOLoss.Config()),
                 ours.LinearPolicyLoss.Config()):
        model = decoder()
        value, _ = attach(made.build(compile_config=None), model)(model(ids), labels.clamp(min=0), 9.0, **inputs)
        value.backward()
        results.append((value.detach(), gradients(model)))
    assert results[1][0].isfinite() and results[1][1][-1].ne(0).any()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_the_policy_loss_is_that_of_torchtitan_and_of_the_formula(dapo: types.ModuleType) -> None:
    from torchtitan.components import loss as theirs

    ids, labels = batch(1)
    labels, inputs = labels.clamp(min=0), policy_inputs()
    results = {}
    for name, made in (
        ("theirs", theirs.ChunkedLossWrapper.Config(num_chunks=2, loss_fn=dapo.DAPOLoss.Config(ratio_clip_high=0.28))),
        ("ours", ours.LinearPolicyLoss.Config(objective=objectives.dapo())),
    ):
        model = decoder()
        loss = attach(made.build(compile_config=None), model)
        value, metrics = loss(model(ids), labels, 9.0, **inputs)
        value.backward()
        results[name] = value.detach(), gradients(model), metrics
    exact = decoder().double()
    z = exact.lm_head(exact.norm(exact.tok_embeddings(ids)))
    logprobs = z.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    mask = inputs["loss_mask"] & inputs["generator_logprobs"].isfinite()
    ratio, advantages = (logprobs - inputs["generator_logprobs"].nan_to_num().double()).exp(), inputs["advantages"]
    per_token = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    expected = torch.where(mask, per_token, 0).sum() / 9
    expected.backward()
    for value, grads, _ in results.values():
        torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(grads, gradients(exact), rtol=1e-4, atol=1e-6)
    mine, other = results["ours"][2], results["theirs"][2]
    for name in ("loss/mean", "loss/ratio_mean", "trainer/entropy/mean"):
        torch.testing.assert_close(mine[name], other[name], rtol=1e-4, atol=1e-6)
    assert all(name.endswith(("mean", "frac")) for name in mine)


def test_the_head_keeps_the_hooks_of_fsdp(tmp_path: Path) -> None:
    ids, labels = batch()
    exact = decoder().double()
    exact_loss(exact, ids, labels, valid=11.0).backward()
    model = decoder()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for module in (model.lm_head, model):
            fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        loss = attach(config("hidden").build(compile_config=None), model)
        loss(model(ids), labels, torch.tensor(11.0))[0].backward()
        grads = [parameter.grad.full_tensor().double() for parameter in model.parameters()]
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(grads, gradients(exact), rtol=1e-4, atol=1e-6)
    assert "forward" not in vars(model.lm_head)


def test_the_forward_that_parallelize_wrapped_is_kept() -> None:
    model = decoder()
    ids, labels = batch()
    model.lm_head.forward = wrapped = functools.partial(type(model.lm_head).forward, model.lm_head)
    loss = attach(config("hidden").build(compile_config=None), model)
    assert loss(model(ids), labels)[0].isfinite() and vars(model.lm_head)["forward"] is wrapped
    with pytest.raises(ValueError, match="targets"):
        loss(model(ids), labels[:, 1:])
    assert vars(model.lm_head)["forward"] is wrapped


@pytest.mark.slow(reason="starts processes")
def test_a_vocabulary_that_tensor_parallelism_shards(tmp_path: Path) -> None:
    import torchtitan_ranks

    results = run_ranks(torchtitan_ranks, tmp_path)
    assert len(results) == 2
    logits, labels = torchtitan_ranks.inputs()
    leaf = logits.double().requires_grad_()
    expected = nn.functional.cross_entropy(leaf.flatten(0, 1), labels.flatten(), reduction="sum") / 5
    expected.backward()
    for backend in ("spmd_types", "partial_dtensor"):
        for result in results:
            torch.testing.assert_close(result[backend][0].double(), expected.detach(), rtol=1e-5, atol=1e-6)
        grad = torch.cat([result[backend][1] for result in results], -1)
        torch.testing.assert_close(grad.double(), leaf.grad, rtol=1e-5, atol=1e-6)


def test_settings_can_be_pickled_and_named_on_a_command_line() -> None:
    tyro = pytest.importorskip("tyro", reason="tyro is not installed")
    from torchtitan.components.loss import BaseLoss

    settings = ours.LinearPolicyLoss.Config()
    assert pickle.loads(pickle.dumps(settings)) == settings
    [parsed] = tyro.cli(tuple[BaseLoss.Config], default=(settings,), args=["--0.objective.clip-high", "0.28"])
    assert parsed.objective == objectives.dapo(ratio_cap=ours.RATIO_CAP)


def policy(objective: Any = objectives.grpo(), **changed: Any) -> Any:  # noqa: B008 - frozen
    loss = attach(ours.LinearPolicyLoss.Config(objective=objective).build(), decoder())
    return loss(torch.ones(BATCH, LENGTH, WIDTH), batch()[1], **(policy_inputs() | changed))


@pytest.mark.parametrize("call, words", [
    (lambda: ours.LinearCrossEntropyLoss.Config().build(compile_config=None)(torch.ones(1, 2, 3), torch.ones(1, 2)),
     "lm_head is a NoneType"),
    (lambda: attach(config("hidden").build(), decoder())(torch.ones(1, 2, WIDTH), torch.ones(1, 2), weights=1),
     "weights given"),
    (lambda: attach(ours.LinearPolicyLoss.Config().build(), decoder())(torch.ones(1, 2, WIDTH), torch.ones(1, 2)),
     "no inputs, expected generator_logprobs"),
    (lambda: policy(objective=objectives.gspo()), "ratio 'sequence'"),
    (lambda: policy(objective="grpo"), "objective is 'grpo'"),
    (lambda: policy(loss_mask=torch.ones(BATCH, LENGTH)), "loss_mask is torch.float32, expected torch.bool"),
    (lambda: policy(advantages=torch.ones(BATCH)), r"advantages has shape \(2,\), expected \(2, 8\)"),
])
def test_errors_name_what_was_wrong(call: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        call()


def test_a_head_that_scales_its_logits_is_refused() -> None:
    class Scaled(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * super().forward(hidden)

    model = decoder()
    model.lm_head = Scaled(WIDTH, VOCAB)
    loss = attach(config("hidden").build(compile_config=None), model)
    with pytest.raises(TypeError, match="lm_head is a Scaled"):
        loss(model(batch()[0]), batch()[1])


def test_another_torchtitan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchtitan.components import loss as theirs

    monkeypatch.setattr(ours, "_classes", functools.cache(ours._classes.__wrapped__))  # as in a new process
    monkeypatch.setattr(integrations, "version", lambda package: "0.4.0")
    with pytest.raises(ImportError, match=r"torchtitan is 0\.4\.0.*0\.3.*any_version"):
        ours.losses()
    with monkeypatch.context() as renamed:
        renamed.delattr(theirs, "ChunkedLossWrapper")
        with pytest.raises(ImportError, match=r"has no ChunkedLossWrapper.*install torchtitan==0\.3"):
            ours.losses(any_version=True)
    made = ours.losses(any_version=True)
    assert ours.CrossEntropyLoss is made.CrossEntropyLoss  # once accepted, a version is accepted
    settings = made.LinearCrossEntropyLoss.Config(z_loss_coef=0.1)
    assert pickle.loads(pickle.dumps(settings)) == settings and ours.losses() is made
    with pytest.raises(AttributeError, match="Other"):
        ours.Other  # noqa: B018


def test_every_block_of_the_page_runs() -> None:
    from torchtitan.components import loss as theirs

    names: dict[str, Any] = {"Trainer": types.SimpleNamespace(Config=dict), "vocab_size": VOCAB}
    ids, labels = batch()
    for _, _, language, code in pages.blocks("docs/migrate/torchtitan.md"):
        assert language == "python"
        exec(compile(code, "torchtitan.md", "exec"), names)
        model = decoder()
        loss = attach(names["config"]["loss"].build(compile_config=None), model)
        inputs = policy_inputs() if isinstance(loss, ours.LinearPolicyLoss) else {}
        assert isinstance(loss, theirs.ChunkedLossWrapper)
        assert loss(model(ids), labels.clamp(min=0), 4.0, **inputs)[0].isfinite()

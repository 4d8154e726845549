"""slime's policy loss, called as slime's code at commit 624b824 (2026-08-21) calls it; it is not on PyPI."""

import argparse
import importlib
import sys
import types
from typing import Any

import pages
import pytest
import torch
from torch import Tensor

from r1kernels import testing
from r1kernels.integrations import slime

VOCAB = 30
TOTALS, RESPONSES = [7, 4, 9], [4, 1, 6]


def arguments(**changed: Any) -> types.SimpleNamespace:
    """Defaults of slime/utils/arguments.py."""
    return types.SimpleNamespace(**{
        "advantage_estimator": "grpo", "calculate_per_token_loss": False, "custom_pg_loss_reducer_function_path": None,
        "custom_tis_function_path": None, "entropy_coef": 0.0, "eps_clip": 0.2, "eps_clip_c": None,
        "eps_clip_high": 0.2, "get_mismatch_metrics": False, "kl_loss_coef": 0.0, "kl_loss_type": "k1",
        "opsm_delta": 1e-4, "rollout_temperature": 1.0, "rollout_top_p": 1.0, "tis_clip": 2.0, "tis_clip_low": 0.0,
        "use_kl_loss": False, "use_opsm": False, "use_rollout_logprobs": False, "use_tis": False,
        "use_unbiased_kl": False, **changed,
    })


def reducer(batch: dict[str, Any], per_token: bool = False) -> Any:
    """slime's get_sum_of_sample_mean without context parallelism; a sample is divided by the tokens of its rollout."""
    def reduce(values: Tensor) -> Tensor:
        parts = zip(values.split(RESPONSES), batch["loss_masks"], batch["rollout_mask_sums"], strict=True)
        return sum((x * mask).sum() / (1 if per_token else number.clamp(min=1)) for x, mask, number in parts)

    return reduce


def token_mean(total_lengths: Any, response_lengths: Any, loss_masks: list[Tensor], per_token: bool = False) -> Any:
    """A custom reducer of pg_loss."""
    return lambda x: sum((v * m).sum() for v, m in zip(x.split(response_lengths), loss_masks, strict=True)) / 100


def squares(*_: Any) -> Any:
    """Not a linear reducer."""
    return lambda x: x.square().sum()


def make_batch(seed: int = 0) -> tuple[dict[str, Any], Tensor]:
    rng = testing.generator(seed)
    padding = 3
    logits = 2 * torch.randn(1, sum(TOTALS) + padding, VOCAB, generator=rng)
    batch: dict[str, Any] = {
        "unconcat_tokens": [torch.randint(VOCAB, (n,), generator=rng) for n in TOTALS],
        "total_lengths": TOTALS, "response_lengths": RESPONSES,
        "advantages": [torch.randn(n, generator=rng) for n in RESPONSES],
        "loss_masks": [(torch.rand(n, generator=rng) < 0.8).int() for n in RESPONSES],
    }
    sums = [mask.sum() for mask in batch["loss_masks"]]
    batch["rollout_mask_sums"] = [sums[0] + sums[1], sums[0] + sums[1], sums[2]]  # the first two are one rollout
    start = [sum(TOTALS[:i]) for i in range(len(TOTALS))]
    now = [
        logits[0, s + total - r - 1 : s + total - 1].log_softmax(-1).gather(-1, tokens[total - r :, None])[:, 0]
        for s, total, r, tokens in zip(start, TOTALS, RESPONSES, batch["unconcat_tokens"], strict=True)
    ]
    for name in ("log_probs", "rollout_log_probs", "ref_log_probs"):
        batch[name] = [(x + 0.3 * torch.randn(x.shape, generator=rng)).clamp(max=-1e-3) for x in now]
    batch["log_probs"][2] = batch["log_probs"][2] + 0.5  # farther away than OPSM allows
    batch["advantages"][2] = -batch["advantages"][2].abs()
    batch["advantages"][2][0] = 1.0
    batch["ref_log_probs"][0][batch["loss_masks"][0].nonzero()[0]] += 5.0  # beyond the limit of low_var_kl
    kept, offsets = [], []
    for r in RESPONSES:
        sizes = torch.randint(1, 6, (r,), generator=rng)
        sizes[0] = 0 if r > 1 else 2
        kept.append(torch.randint(VOCAB, (int(sizes.sum()),), generator=rng).int())
        offsets.append(torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).int())
    offsets[2] = offsets[2][:-1]  # the last token has no record
    return {**batch, "rollout_top_p_token_ids": kept, "rollout_top_p_token_offsets": offsets}, logits


def formula(args: Any, batch: dict[str, Any], logits: Tensor, reduce: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of slime's documentation and papers, one sample after the other, in float64."""
    z, end, new, entropy = logits[0].double() / args.rollout_temperature, 0, [], []
    for i, (total, response) in enumerate(zip(TOTALS, RESPONSES, strict=True)):
        end += total
        for t in range(response):
            row, token = z[end - response - 1 + t], batch["unconcat_tokens"][i][total - response + t]
            p = row.log_softmax(-1)
            offsets = batch["rollout_top_p_token_offsets"][i].tolist()
            if args.rollout_top_p != 1 and t + 1 < len(offsets):
                ids = batch["rollout_top_p_token_ids"][i].tolist()[offsets[t] : offsets[t + 1]]
                new.append(row[token] - row[sorted({*ids, int(token)})].logsumexp(-1))
            else:
                new.append(p[token])
            entropy.append(-(p.exp() * p).sum())
    new, entropy = torch.stack(new), torch.stack(entropy)
    log_probs, rollout, reference, a = (
        torch.cat(batch[name]).double() for name in ("log_probs", "rollout_log_probs", "ref_log_probs", "advantages"))
    old = rollout if args.use_rollout_logprobs else log_probs
    masks = batch["loss_masks"]
    means = [((x * m).sum() / m.sum().clamp(min=1)).expand(len(x))
             for x, m in zip((old - new).split(RESPONSES), masks, strict=True)]
    gap = torch.cat(means) if args.advantage_estimator == "gspo" else old - new
    r = (-gap).exp()
    bounded = r.clamp(1 - args.eps_clip, 1 + args.eps_clip_high)
    pg = torch.maximum(-r * a, -bounded * a)
    if args.eps_clip_c is not None:
        pg = torch.where(a < 0, torch.minimum(pg, -args.eps_clip_c * a), pg)
    clipped = -bounded * a > -r * a
    if args.advantage_estimator == "cispo":
        pg, clipped = -bounded.detach() * a * new, bounded != r
    if args.use_opsm:
        pg = pg * ((a >= 0) | (torch.cat(means) <= args.opsm_delta))
    if args.use_tis:
        pg = pg * (log_probs - rollout).exp().clamp(args.tis_clip_low, args.tis_clip)
    own = token_mean(TOTALS, RESPONSES, masks) if args.custom_pg_loss_reducer_function_path else reduce
    loss = own(pg) - args.entropy_coef * reduce(entropy)
    reported = {"pg_loss": own(pg), "entropy_loss": reduce(entropy), "ppo_kl": reduce(gap),
                "pg_clipfrac": reduce(clipped.double())}
    if args.use_kl_loss:
        d = reference - new
        kl = {"k1": -d, "k2": d * d / 2}.get(args.kl_loss_type, d.exp() - 1 - d)
        kl = (new - old).exp() * kl if args.use_unbiased_kl else kl
        kl = kl.clamp(-10, 10) if args.kl_loss_type == "low_var_kl" else kl
        reported["kl_loss"] = reduce(kl)
        loss = loss + args.kl_loss_coef * reduce(kl)
    return loss, {**reported, "loss": loss}


@pytest.fixture(autouse=True)
def mpu(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Megatron's module of parallel groups, of one process."""
    modules = {name: types.ModuleType(name) for name in ("megatron", "megatron.core", "megatron.core.mpu")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    found = modules["megatron.core.mpu"]
    found.get_context_parallel_world_size = found.get_tensor_model_parallel_world_size = lambda: 1
    return found


CASES = {
    "grpo": {},
    "temperature, clip-higher, dual clip": {"rollout_temperature": 0.7, "eps_clip_high": 0.3, "eps_clip_c": 1.5},
    "gspo": {"advantage_estimator": "gspo", "eps_clip": 0.01, "eps_clip_high": 0.02},
    "cispo": {"advantage_estimator": "cispo", "eps_clip": 0.3, "eps_clip_high": 0.1},
    "kl and entropy": {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "low_var_kl", "entropy_coef": 0.05},
    "unbiased kl": {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k2", "use_unbiased_kl": True},
    "tis and opsm": {"use_tis": True, "tis_clip_low": 0.9, "tis_clip": 1.2, "use_opsm": True, "opsm_delta": 0.3},
    "rollout's log-probs": {"use_rollout_logprobs": True},
    "per token": {"calculate_per_token_loss": True},
    "top-p": {"rollout_top_p": 0.9, "entropy_coef": 0.05},
    "top-p, no entropy": {"rollout_top_p": 0.9},
    "reducer": {"custom_pg_loss_reducer_function_path": f"{__name__}.token_mean", "entropy_coef": 0.05},
}


@pytest.mark.parametrize("case", CASES)
def test_loss_gradient_and_metrics_are_the_formulas(case: str) -> None:
    args = arguments(**CASES[case])
    batch, logits = make_batch()
    reduce = reducer(batch, args.calculate_per_token_loss)
    results = []
    for function in (slime.policy_loss, formula):
        leaf = logits.clone().requires_grad_()
        loss, metrics = function(args, batch, leaf, reduce)
        loss.backward()
        results.append((loss.detach().double(), leaf.grad, metrics))
    (loss, grad, metrics), (exact, exact_grad, expected) = results
    torch.testing.assert_close(loss, exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, exact_grad, rtol=1e-4, atol=1e-6)
    assert grad.ne(0).any() and set(expected) <= set(metrics)
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name].double(), value.detach(), rtol=1e-4, atol=1e-6, msg=name)
    assert not any(value.requires_grad or value.dim() for value in metrics.values())
    assert ("tis_clipfrac" in metrics) == args.use_tis and ("opsm_clipfrac" in metrics) == args.use_opsm


@pytest.mark.parametrize("changed", [
    {"use_kl_loss": True, "kl_loss_coef": 0.1, "use_unbiased_kl": True, "entropy_coef": 0.05},
    {"use_tis": True, "use_opsm": True},
    {"advantage_estimator": "gspo", "use_rollout_logprobs": True},
])
def test_nan_behind_the_mask_never_matters(changed: dict[str, Any]) -> None:
    args, results = arguments(**changed), []
    for spoiled in (False, True):
        batch, logits = make_batch()
        batch["opd_reverse_kl"] = [torch.ones(n) for n in RESPONSES]
        hidden = [mask == 0 for mask in batch["loss_masks"]]
        assert any(gone.any() for gone in hidden)
        for name in ("advantages", "log_probs", "rollout_log_probs", "ref_log_probs", "opd_reverse_kl"):
            for value, gone in zip(batch[name], hidden, strict=True):
                value[gone] = float("nan") if spoiled else value[gone]
        leaf = logits.requires_grad_()
        loss, metrics = slime.policy_loss(args, batch, leaf, reducer(batch))
        loss.backward()
        results.append((loss.detach(), leaf.grad, metrics))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_log_probs_that_slime_did_not_compute_are_those_of_the_loss() -> None:
    batch, logits = make_batch()
    del batch["log_probs"], batch["rollout_log_probs"]
    loss, metrics = slime.policy_loss(arguments(), batch, logits, reducer(batch))
    expected = reducer(batch)(-torch.cat(batch["advantages"]))
    torch.testing.assert_close(loss, expected)
    assert metrics["ppo_kl"] == 0 and "train_rollout_logprob_abs_diff" not in metrics


def test_samples_without_a_response_have_a_backward() -> None:
    nothing, logits = [torch.zeros(0)], torch.randn(1, 3, VOCAB).requires_grad_()
    batch = {"unconcat_tokens": [torch.arange(3)], "total_lengths": [3], "response_lengths": [0], "advantages": nothing,
             "loss_masks": nothing, "log_probs": nothing}
    loss, _ = slime.policy_loss(arguments(), batch, logits, lambda x: x.sum())
    loss.backward()
    assert loss == 0 and logits.grad.eq(0).all()


def test_twenty_steps_give_the_parameters_of_the_formula() -> None:
    args = arguments(**CASES["kl and entropy"])
    trained = []
    for function, dtype in ((slime.policy_loss, torch.float32), (formula, torch.float64)):
        weight = torch.eye(VOCAB, dtype=dtype).requires_grad_()
        optimizer = torch.optim.SGD([weight], lr=0.02)
        for step in range(20):
            batch, logits = make_batch(step)
            optimizer.zero_grad()
            function(args, batch, logits.to(dtype) @ weight, reducer(batch))[0].backward()
            optimizer.step()
        trained.append(weight.detach().double())
    torch.testing.assert_close(*trained, rtol=1e-3, atol=1e-4)
    assert (trained[0] - torch.eye(VOCAB)).abs().max() > 0.01


def test_a_shard_of_the_vocabulary(mpu: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The group goes to the operation, which has tests with several processes."""
    batch, logits = make_batch()
    given = []
    original = slime.r1kernels.token_logprobs_and_entropy
    monkeypatch.setattr(slime.r1kernels, "token_logprobs_and_entropy", lambda *args, process_group, **options: (
        given.append(process_group), original(*args, **options))[1])
    mpu.get_tensor_model_parallel_world_size, mpu.get_tensor_model_parallel_group = lambda: 2, lambda: "ranks"
    slime.policy_loss(arguments(), batch, logits, reducer(batch))
    assert given == ["ranks"]
    with pytest.raises(ValueError, match=r"rollout_top_p is 0\.9 with tensor parallelism"):
        slime.policy_loss(arguments(rollout_top_p=0.9), batch, logits, reducer(batch))


@pytest.mark.parametrize("changed, words", [
    ({"custom_tis_function_path": "a.b"}, "custom_tis_function_path is 'a.b'"),
    ({"kl_loss_type": "k4"}, "kl_loss_type is 'k4'"),
    ({"eps_clip_c": 1.1}, "eps_clip_c is 1.1"),
    ({"use_rollout_logprobs": True}, "no rollout_log_probs"),
    ({"use_tis": True}, "no rollout_log_probs"),
    ({"rollout_top_p": 0.5}, "no rollout_top_p_token_ids"),
    ({"advantage_estimator": "rloo"}, "advantage_estimator is 'rloo', expected one of grpo"),
    ({"custom_pg_loss_reducer_function_path": f"{__name__}.squares"}, "squares', expected a function that is linear"),
])
def test_errors_name_what_was_wrong(changed: dict[str, Any], words: str) -> None:
    batch, logits = make_batch()
    del batch["rollout_log_probs"], batch["rollout_top_p_token_ids"]
    with pytest.raises(ValueError, match=words):
        slime.policy_loss(arguments(**changed), batch, logits, reducer(batch))


@pytest.mark.parametrize("name, value, words", [
    ("loss_masks", None, "batch has no loss_masks"),
    ("ref_log_probs", None, "batch has no ref_log_probs, expected it, because --use-kl-loss"),
    ("advantages", [torch.ones(2)], r"advantages has shape \(2,\), expected \(11,\)"),
])
def test_a_batch_of_another_form_is_named(name: str, value: Any, words: str) -> None:
    batch, logits = make_batch()
    with pytest.raises(ValueError, match=words):
        slime.policy_loss(arguments(use_kl_loss=True), {**batch, name: value}, logits, reducer(batch))
    with pytest.raises(ValueError, match="logits have 19 rows, expected at least the sum of total_lengths = 20"):
        slime.policy_loss(arguments(), batch, logits[:, :19], reducer(batch))


def test_renamed_arguments_and_context_parallelism_are_refused(mpu: types.ModuleType) -> None:
    batch, logits = make_batch()
    args = arguments()
    del args.eps_clip
    with pytest.raises(TypeError, match="no eps_clip"):
        slime.policy_loss(args, batch, logits, reducer(batch))
    mpu.get_context_parallel_world_size = lambda: 2
    with pytest.raises(ValueError, match="context_parallel_size is 2"):
        slime.policy_loss(arguments(), batch, logits, reducer(batch))


def test_every_block_of_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = types.ModuleType("slime.backends.megatron_utils.loss")
    theirs.policy_loss_function = original = object()
    for name in ("slime", "slime.backends", "slime.backends.megatron_utils", theirs.__name__):
        monkeypatch.setitem(sys.modules, name, theirs if name == theirs.__name__ else types.ModuleType(name))
    parser = argparse.ArgumentParser()
    for name in ("--loss-type", "--custom-loss-function-path", "--custom-megatron-init-path"):
        parser.add_argument(name)
    found = []
    for _, _, language, code in pages.blocks("docs/migrate/slime.md"):
        assert language == "bash"
        settings = parser.parse_args(code.split())
        module, _, name = (settings.custom_loss_function_path or settings.custom_megatron_init_path).rpartition(".")
        found.append(getattr(importlib.import_module(module), name))
    assert found == [slime.install, slime.policy_loss]
    slime.install(arguments())
    slime.install(arguments())
    assert theirs.policy_loss_function is slime.policy_loss
    slime.uninstall()
    slime.uninstall()
    assert theirs.policy_loss_function is original
    slime.install()
    theirs.policy_loss_function = another = object()
    slime.uninstall()
    assert theirs.policy_loss_function is another
    del theirs.policy_loss_function
    with pytest.raises(ImportError, match=r"no policy_loss_function.*commit 624b824; install it"):
        slime.install()
    monkeypatch.delitem(sys.modules, theirs.__name__)
    with pytest.raises(ImportError, match="commit 624b824; install it"):  # slime is not installed
        slime.install()

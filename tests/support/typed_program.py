"""What users' type checkers see: `make types` checks this program in strict mode, and a test runs it.

Each `assert_type` is a promise about a public name. Names of r1kernels are loaded when they are first used, so a type
checker knows them only by the imports in r1kernels/__init__.py under TYPE_CHECKING.
"""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import assert_type

import r1kernels
from r1kernels import objectives, rewards
from r1kernels.objectives import Objective

PRESETS = (
    objectives.grpo, objectives.r1, objectives.bnpo, objectives.dapo, objectives.gspo,
    objectives.gspo_token, objectives.gmpo, objectives.luspo, objectives.cispo, objectives.sapo, objectives.dppo,
    objectives.ipo, objectives.vespo, objectives.reinforce,
)


def surrogate(logprobs: Tensor, entropies: Tensor | None, tokens: r1kernels.PolicyBatch) -> Tensor:
    return -logprobs * tokens.advantages


def main() -> None:
    logits, hidden, weight = torch.randn(2, 3, 7), torch.randn(2, 3, 4), torch.randn(7, 4)
    token_ids, advantages = torch.randint(7, (2, 3)), torch.tensor([1.0, -1.0])
    mask = torch.ones(2, 3, dtype=torch.bool)

    assert_type(r1kernels.__version__, str)
    assert_type(r1kernels.token_logprobs(logits, token_ids), Tensor)
    assert_type(r1kernels.token_logprobs_and_entropy(logits, token_ids, temperature=0.5), tuple[Tensor, Tensor])
    assert_type(r1kernels.linear_token_logprobs(hidden, weight, token_ids, logit_scale=2.0), Tensor)
    assert_type(r1kernels.linear_token_logprobs_and_entropy(hidden, weight, token_ids), tuple[Tensor, Tensor])
    statistics = r1kernels.token_statistics(logits, token_ids)
    assert_type(statistics, r1kernels.TokenStatistics)
    assert_type(r1kernels.linear_token_statistics(hidden, weight, token_ids), r1kernels.TokenStatistics)
    assert_type(r1kernels.linear_logits(hidden, weight), Tensor)

    assert_type([preset() for preset in PRESETS], list[Objective])
    assert_type(objectives.dr_grpo(max_length=10, clip_high=0.3), Objective)
    assert_type(objectives.dapo(clip_high=0.3, kl_coef=0.01, kl="k2"), Objective)
    for objective in (objectives.grpo(), Objective.token_local(surrogate)):
        result = r1kernels.grpo_loss(logits, token_ids, advantages, mask=mask, objective=objective)
        assert_type(result, r1kernels.PolicyLoss)
        assert_type(result.loss, Tensor)
        assert_type(result.metrics, dict[str, Tensor])
        from_hidden = r1kernels.linear_grpo_loss(hidden, weight, token_ids, advantages, objective=objective)
        assert_type(from_hidden, r1kernels.PolicyLoss)
    logprobs = r1kernels.token_logprobs(logits, token_ids)
    assert_type(r1kernels.policy_loss(logprobs, advantages), r1kernels.PolicyLoss)
    assert_type(r1kernels.kl_estimate(logprobs, logprobs), Tensor)

    assert_type(r1kernels.cross_entropy(logits, token_ids), Tensor)
    assert_type(r1kernels.linear_cross_entropy(hidden, weight, token_ids, reduction="sum"), Tensor)
    distilled = r1kernels.linear_distillation_loss(hidden, weight, hidden, weight)
    assert_type(distilled, r1kernels.DistillationLoss)
    assert_type(r1kernels.distillation_loss(logits, logits), r1kernels.DistillationLoss)
    options: r1kernels.LinearOptions = {"temperature": 0.7, "chunk_bytes": 2**20}
    assert_type(r1kernels.linear_token_logprobs(hidden, weight, token_ids, **options), Tensor)

    assert_type(r1kernels.group_advantages(torch.tensor([1.0, 0.0]), 2), Tensor)
    weights = r1kernels.importance_weights(logprobs, logprobs, mask=mask)
    assert_type(weights, r1kernels.ImportanceWeights)
    with r1kernels.backend("reference"):
        assert_type(r1kernels.has_fast_bf16(), bool)

    columns: dict[str, Any] = {"answer": ["0.5", "0.5"]}
    assert_type(rewards.accuracy(["<answer>1/2</answer>", "<answer>2</answer>"], **columns), list[float | None])
    assert_type(rewards.format([[{"role": "assistant", "content": "text"}]]), list[float])
    assert_type(r1kernels.rewards.format(["text"]), list[float])
    assert_type(r1kernels.testing.random_ids(2, vocab=3), Tensor)


if __name__ == "__main__":
    main()

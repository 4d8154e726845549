"""The example in docs/statistics.md: verl's optimal token baseline, against a loop over tokens."""

import re
from pathlib import Path

import torch
from backends import without_cuda_kernels

from r1kernels import testing, token_statistics

pytestmark = without_cuda_kernels

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "statistics.md").read_text()


def test_the_example_is_the_formula(implementation: str) -> None:
    names: dict[str, object] = {}
    exec(re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1], names)
    logits, ids = testing.random_logits(3, 5, 11), testing.random_ids(3, 5, vocab=11)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    rewards = torch.randn(3, 5, generator=testing.generator(3)) * mask
    advantages = names["optimal_token_advantages"](token_statistics(logits, ids), rewards, mask)

    p = logits.double().softmax(-1)
    score = torch.nn.functional.one_hot(ids, 11) - p
    norms = score.square().sum(-1)
    for t in range(5):
        alive = [n for n in range(3) if mask[n, t]]
        returns = {n: rewards[n, t:].double().sum() for n in alive}
        weights = {n: norms[n, : t + 1].sum() for n in alive}
        baseline = sum(weights[n] * returns[n] for n in alive) / sum(weights.values())
        for n in range(3):
            expected = returns[n] - baseline if n in alive else torch.zeros((), dtype=torch.float64)
            torch.testing.assert_close(advantages[n, t].double(), expected, rtol=1e-5, atol=1e-6)

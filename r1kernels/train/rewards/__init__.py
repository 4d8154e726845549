"""Rule rewards, judged where model-written text can do no harm.

    with Scorer({"accuracy": 1.0, "format": 1.0}) as scorer:
        scores = scorer.score([Sample(prompt, completion, answer), ...])

A new reward is a function from `Sample` to float and a line in `registry.REWARDS`. This package imports
nothing from the rest of r1kernels, so that a worker process can load it in a fraction of a second, without
torch.
"""

from .accuracy import accuracy
from .base import KINDS, Judgement, Reward, Sample, Scores
from .endpoint import EndpointError
from .formatting import format_reward
from .judge import Judge
from .language import language
from .pool import WorkerError
from .registry import REWARDS
from .scorer import Scorer
from .settings import JudgeConfig, ScoringConfig

__all__ = [
    "KINDS",
    "REWARDS",
    "EndpointError",
    "Judge",
    "JudgeConfig",
    "Judgement",
    "Reward",
    "Sample",
    "Scorer",
    "Scores",
    "ScoringConfig",
    "WorkerError",
    "accuracy",
    "format_reward",
    "language",
]

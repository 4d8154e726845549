"""The rewards by name."""

from .accuracy import accuracy, triage
from .base import Reward
from .formatting import format_reward

REWARDS: dict[str, Reward] = {
    "accuracy": Reward(score=accuracy, triage=triage, judge="math_judge:judge", requires=("math_verify",)),
    "format": Reward(score=format_reward),
}

"""The rewards by name."""

from .accuracy import accuracy, prepare_accuracy
from .base import Reward
from .formatting import format_reward
from .judge import prepare_judge
from .language import language
from .length import prepare_overlong

REWARDS: dict[str, Reward] = {
    "accuracy": Reward(
        score=accuracy,
        prepare=prepare_accuracy,
        judges=("math_judge:judge",),
        requires=("math_verify",),
        kinds=("math", "choice", "exact", "code"),
    ),
    "format": Reward(score=format_reward),
    "language": Reward(score=language),
    "overlong": Reward(prepare=prepare_overlong),
    "judge": Reward(prepare=prepare_judge, kinds=("open",), waits=True),
}

"""PPO, the paper's contrast to GRPO: advantages from a critic instead of from groups. See README.md."""

from .critic import critic
from .gae import gae, whiten

__all__ = ["critic", "gae", "whiten"]

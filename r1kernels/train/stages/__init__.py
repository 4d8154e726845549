"""The stages of a recipe: one module a kind.

A module holds `Config`, a frozen dataclass whose first fields are `name` and `kind` and whose `check(recipe)` raises
ConfigError, and `run(stage)`, which does the work in the stage's directory and returns a summary. Killed at any moment
and run again on the same directory, it ends as if it had never stopped.
"""

from __future__ import annotations

import importlib
from types import ModuleType

# What each kind leaves: a model, samples to train on, or scores (a model of preferences).
KINDS = {
    "model": "model",
    "pretrain": "model",
    "sft": "model",
    "grpo": "model",
    "ppo": "model",
    "distill": "model",
    "reject": "samples",
    "preference": "scores",
    "evaluate": "measurements",
}


def stage_module(kind: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{kind}")

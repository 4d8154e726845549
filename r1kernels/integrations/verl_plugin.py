"""What verl loads on import, by the entry point `r1kernels` in the group `verl.plugins`.

It imports no other module of verl. Losses and estimators are registered when verl has loaded its registries, and the
backend `r1kernels` of fused kernels is added when verl has loaded its own. If that fails, a warning says why, and verl
runs as without it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def _register() -> None:
    from r1kernels.integrations.verl import register

    register()


def _add_backend() -> None:
    from r1kernels.integrations.verl_head import add_backend

    add_backend()


def _add_sums() -> None:
    from r1kernels.integrations.verl_head import add_sums

    add_sums()


ACTIONS: dict[str, Callable[[], object]] = {
    "verl.trainer.ppo.core_algos": _register, "verl.models.transformers.monkey_patch": _add_backend,
    "verl.workers.engine.fsdp.transformer_impl": _add_sums,
}


def _run(module: str) -> None:
    try:
        ACTIONS[module]()
    except Exception as error:  # verl must work without us
        logging.getLogger("r1kernels").warning("r1kernels adds nothing to %s: %s", module, error)


class AfterImport(importlib.abc.MetaPathFinder):
    """Runs an action after the first import of a module, whoever imports it."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if name not in ACTIONS:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next((s for s in (finder.find_spec(name, path, target) for finder in others) if s is not None), None)
        if spec is None or not hasattr(spec.loader, "exec_module"):
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _run(name)

        spec.loader.exec_module = exec_module
        return spec


if not any(isinstance(finder, AfterImport) for finder in sys.meta_path):
    sys.meta_path.insert(0, AfterImport())
    for _name in ACTIONS:
        if _name in sys.modules:
            _run(_name)

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


_reasons: set[str] = set()


def _run(module: str) -> None:
    try:
        ACTIONS[module]()
    except Exception as error:  # verl must work without us
        if str(error) not in _reasons:  # another version of verl is one reason for all modules
            _reasons.add(str(error))
            logging.getLogger("r1kernels").warning("r1kernels adds nothing to %s: %s", module, error)


class _Loader(importlib.abc.Loader):
    """The loader of one module, and its action. The loader itself may be one object for many modules."""

    def __init__(self, name: str, loader: Any) -> None:
        self.name, self.loader = name, loader

    def create_module(self, spec: Any) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader  # as without us
        self.loader.exec_module(module)
        _run(self.name)


class AfterImport(importlib.abc.MetaPathFinder):
    """Runs an action after the first import of a module, whoever imports it."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if name not in ACTIONS:
            return None
        others = [finder for finder in sys.meta_path if type(finder).__name__ != "AfterImport"]
        found = (finder.find_spec(name, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or not hasattr(spec.loader, "exec_module"):
            return spec
        spec.loader = _Loader(name, spec.loader)
        return spec


if not any(type(finder).__name__ == "AfterImport" for finder in sys.meta_path):
    sys.meta_path.insert(0, AfterImport())
    for _name in ACTIONS:
        if _name in sys.modules:
            _run(_name)

"""verl loads the plugin by its entry point; another version, a changed registry and a failure leave verl as it is."""

import importlib
import inspect
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl", reason="verl is not installed: make test-verl")
pytestmark = pytest.mark.filterwarnings("default")  # verl's own

from r1kernels.integrations import check_version, verl_head, verl_plugin  # noqa: E402
from r1kernels.integrations import verl as adapter  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PROJECT, GROUP = (ROOT / "pyproject.toml").read_text(), "verl.plugins"


PROGRAM = """
import sys
from importlib.metadata import entry_points
[point] = [p for p in entry_points(group="verl.plugins") if p.name == "r1kernels"]
import verl
assert "r1kernels.integrations.verl_plugin" in sys.modules
# Nothing of verl is loaded before verl does, and r1kernels is not loaded before it is needed.
assert "verl.trainer.ppo.core_algos" not in sys.modules and "r1kernels.objectives" not in sys.modules
from verl.trainer.ppo import core_algos
from r1kernels.integrations.verl import ESTIMATORS, LOSSES
assert set(LOSSES) < set(core_algos.POLICY_LOSS_REGISTRY) and "vanilla" in core_algos.POLICY_LOSS_REGISTRY
assert set(ESTIMATORS) < set(core_algos.ADV_ESTIMATOR_REGISTRY)
from verl.models.transformers import monkey_patch
from verl.utils.experimental.torch_functional import FusedLinearForPPO
assert FusedLinearForPPO(impl_backend="r1kernels")._r1kernels_head is not None
assert FusedLinearForPPO()._r1kernels_head is None
assert not hasattr(monkey_patch.__loader__, "loader") and monkey_patch.__spec__.loader is monkey_patch.__loader__
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
assert hasattr(FSDPEngineWithLMHead.forward_step, "_r1kernels")
"""


def test_verl_loads_it_itself(tmp_path: Path) -> None:
    """A new process in which r1kernels is installed with the entry points of pyproject.toml."""
    [lines] = re.findall(rf'^\[project\.entry-points\."{GROUP}"\]\n((?:\w+ = .*\n)+)', PROJECT, re.MULTILINE)
    info = tmp_path / "r1kernels-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: r1kernels\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n" + lines.replace('"', ""))
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])}
    completed = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True,
                               cwd=tmp_path, env={**os.environ, **paths})
    assert completed.returncode == 0, completed.stderr
    assert "r1kernels adds nothing" not in completed.stderr


def test_a_failure_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(adapter, "SUPPORTED", "0.1")
    monkeypatch.setattr(verl_head, "SUPPORTED", "0.1")
    monkeypatch.setattr(verl_plugin, "_reasons", set())
    for name in verl_plugin.ACTIONS:  # one reason, one warning
        verl_plugin._run(name)
    [message] = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "r1kernels adds nothing to verl.trainer.ppo.core_algos: verl is 0.9" in message


def test_modules_that_share_a_loader_have_their_own_actions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """zipimport has one loader for all modules of a folder."""
    with zipfile.ZipFile(tmp_path / "zipped.zip", "w") as archive:
        for name in ("first", "second", "third"):
            archive.writestr(f"zipped_{name}.py", "value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path / "zipped.zip"))
    ran: list[str] = []
    for name in ("zipped_first", "zipped_second"):
        monkeypatch.setitem(verl_plugin.ACTIONS, name, lambda name=name: ran.append(name))
    monkeypatch.setattr(sys, "meta_path", [verl_plugin.AfterImport(), *sys.meta_path])
    first = importlib.import_module("zipped_first")
    for name in ("zipped_second", "zipped_third"):
        importlib.import_module(name)
    assert ran == ["zipped_first", "zipped_second"]
    assert inspect.getsource(first) == "value = 1\n"
    importlib.reload(first)
    assert ran == ["zipped_first", "zipped_second", "zipped_first"]


def test_what_is_loaded_already_gets_its_action(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.trainer.ppo import core_algos

    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if type(f).__name__ != "AfterImport"])
    monkeypatch.delitem(sys.modules, "r1kernels.integrations.verl_plugin", raising=False)
    monkeypatch.setattr(core_algos, "POLICY_LOSS_REGISTRY", {})
    monkeypatch.delitem(sys.modules, "verl.models.transformers.monkey_patch", raising=False)
    monkeypatch.delitem(sys.modules, "verl.workers.engine.fsdp.transformer_impl", raising=False)
    importlib.import_module("r1kernels.integrations.verl_plugin")
    assert "r1_grpo" in core_algos.POLICY_LOSS_REGISTRY


# ---- registration --------------------------------------------------------------------------------------------------


def test_to_register_again_does_nothing() -> None:
    from verl.trainer.ppo import core_algos

    names = adapter.register()
    before = {name: core_algos.POLICY_LOSS_REGISTRY.get(name) for name in names}
    assert adapter.register() == names
    assert before == {name: core_algos.POLICY_LOSS_REGISTRY.get(name) for name in names}


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match="no-such-package is not installed"):
        check_version("no-such-package", "1")
    monkeypatch.setattr(adapter, "SUPPORTED", "0.91")
    with pytest.raises(ImportError, match=r"verl is 0\.9.*0\.91.*any_version=True"):
        adapter.register()
    assert "r1_grpo" in adapter.register(any_version=True)


@pytest.mark.parametrize("name", ["register_policy_loss", "register_adv_est", "POLICY_LOSS_REGISTRY",
                                  "compute_policy_loss_vanilla"])
def test_what_verl_renames_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.trainer.ppo import core_algos

    monkeypatch.delattr(core_algos, name)
    with pytest.raises(ImportError, match=rf"core_algos(\.| has no ){name}.*verl 0\.9.*install verl==0\.9"):
        adapter.register()


def test_other_parameters_of_a_policy_loss_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.trainer.ppo import core_algos

    def changed(old_logprobs: Any, logprobs: Any, config: Any) -> None:
        pass

    monkeypatch.setattr(core_algos, "compute_policy_loss_vanilla", changed)
    with pytest.raises(ImportError, match=r"\('old_logprobs', 'logprobs', 'config'\).*expected \('old_log_prob'"):
        adapter.register()

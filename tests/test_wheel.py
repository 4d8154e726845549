"""One wheel for every Python >= 3.10: built here, installed into an environment of its own, and used."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

USE = """
import torch, r1kernels
from r1kernels import _library
assert _library.extension is not None, _library.extension_error
assert "site-packages" in _library.extension.__file__, _library.extension.__file__
logits = torch.randn(2, 3, 257, dtype=torch.bfloat16, requires_grad=True)
token_ids = torch.randint(257, (2, 3))
logprobs = r1kernels.token_logprobs(logits, token_ids)
expected = logits.float().log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]
torch.testing.assert_close(logprobs, expected)
loss, metrics = r1kernels.grpo_loss(logits, token_ids, torch.tensor([1.0, -1.0]))
loss.backward()
assert logits.grad.isfinite().all() and metrics["tokens"] == 6
print("used")
"""


def run(*command: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    completed = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout


def test_wheel_installs_in_a_clean_environment_and_runs_an_op(tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    dist = tmp_path / "dist"
    run(*pip, "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", dist, ROOT, cwd=tmp_path)
    (wheel,) = dist.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "r1kernels/_C.abi3.so" in names
    assert not any(name.startswith(("tests/", "benchmarks/", "csrc/")) for name in names)

    environment = tmp_path / "clean"
    run(sys.executable, "-m", "venv", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    run(python, *pip[1:], "install", "--quiet", "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    assert run(python, "-c", USE, cwd=tmp_path).strip() == "used"

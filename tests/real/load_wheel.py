"""Installs a wheel beside several versions of torch, each in a new environment, and uses it on the CPU:

    python load_wheel.py WHEEL [VERSION_OF_TORCH ...]

Some versions bring all of CUDA, about 5 GB. Environments are deleted afterwards.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[1] / "support" / "use_wheel.py"
VERSIONS = ("2.13.0+cpu", "2.14.1")  # the oldest and the newest that were at hand


def load(wheel: Path, version: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", f"{folder}/environment"], check=True)
        python = f"{folder}/environment/bin/python"
        install = [python, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-cache-dir"]
        subprocess.run([*install, f"torch=={version}", "numpy", wheel], check=True)
        for command in ([python, PROGRAM], [python, "-m", "r1kernels"]):
            subprocess.run(command, cwd=folder, check=True)


if __name__ == "__main__":
    for version in sys.argv[2:] or VERSIONS:
        print(f"---- torch {version}", flush=True)
        load(Path(sys.argv[1]).resolve(), version)

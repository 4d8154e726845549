"""Result files of the measurements in this folder that are not cases of `r1kernels bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from r1kernels.bench import machine
from r1kernels.bench.results import Results

ROOT = Path(__file__).resolve().parents[1]


def save(rows: list[dict[str, Any]], device: str = "cpu") -> Path:
    """Writes <op>.json for each op of the rows into the results of this device, and returns their folder."""
    about = Results(torch.device(device), "default").about
    folder = ROOT / "benchmarks" / "results" / machine.folder_name(about["device"], about["instruction_set"])
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: about[name] for name in ("date", "r1kernels", "sources", "torch", "device", "instruction_set")}
    for op in dict.fromkeys(row["op"] for row in rows):
        text = json.dumps({**kept, "results": [row for row in rows if row["op"] == op]}, indent=1)
        (folder / f"{op}.json").write_text(text + "\n")
    return folder

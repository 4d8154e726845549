"""Whether the operator of the fused step launches its own kernel, or works in passes: said aloud, and recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gpu import measure, records
from gpu.cases.grpo_loss import make_problem
from gpu.setting import Logits, Setting, name_of
from gpu.step import step
from r1kernels import _library
from r1kernels.ops import grpo_step

KERNEL = "step_kernel"
SHORT = 32_000  # a row that one block can hold
EXPECTED = (SHORT, 151_936)  # vocabularies whose bars are those of the fused step
TOKENS = 1024


def shapes(setting: Setting) -> list[tuple[int, torch.dtype]]:
    if setting.small:
        return [(1_031, torch.bfloat16)]
    return [(SHORT, torch.bfloat16), (151_936, torch.bfloat16), (4_096, torch.bfloat16), (262_144, torch.bfloat16),
            (SHORT, torch.float32), (151_936, torch.float32)]


def launched(run: Callable[[], object]) -> list[str]:
    """The names of the kernels that a run launches on the device."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    of_device = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == of_device]


def look(setting: Setting, vocab: int, dtype: torch.dtype) -> dict[str, Any]:
    inputs = make_problem(Logits(64 if setting.small else TOKENS, vocab), setting, dtype)[0].inputs
    tile = grpo_step.chosen_tile(inputs["logits"])
    found: dict[str, Any] = {"vocab": vocab, "dtype": name_of(dtype), **tile._asdict(), "fused": not tile.passes}
    if setting.device.type == "cuda":
        found["kernels"] = [name[:100] for name in launched(lambda: step(inputs))]
        if found["kernels"]:  # none where the profiler does not work
            found["fused"] = any(KERNEL in name for name in found["kernels"])
    else:
        step(inputs)
    return found


def sentence(found: dict[str, Any]) -> str:
    place = f"V = {found['vocab']}, {found['dtype']}"
    if found.get("error"):
        return f"{place}: {found['error']}"
    kernels = ", ".join(found.get("kernels", ()))
    if not found["fused"]:
        return f"{place}: DOES NOT launch {KERNEL}: {found['passes'] or 'no reason is given'}; it launches {kernels}"
    return (
        f"{place}: launches {KERNEL} by clusters of {found['cluster']}, {found['blocks']} blocks a processor, "
        f"{found['clusters']} clusters at once{'' if kernels else ' (the profiler saw no kernel)'}"
    )


def run(setting: Setting, folder: Path) -> int:
    if not setting.fused_step:
        print(f"nothing is launched: {_library.cuda_missing(setting.device.type) or 'a rehearsal'}", flush=True)
        return 1 if setting.device.type == "cuda" else 0
    kernels = records.kernels_hash()
    wrong = 0
    for vocab, dtype in shapes(setting):
        try:
            found = look(setting, vocab, dtype)
        except Exception as error:
            found = {"vocab": vocab, "dtype": name_of(dtype), "fused": False, "error": measure.failure(error)}
        records.append(folder, "launch", {**found, "kernels_hash": kernels})
        print(sentence(found), flush=True)
        wrong += found["fused"] is False and vocab in EXPECTED
    return 1 if wrong else 0

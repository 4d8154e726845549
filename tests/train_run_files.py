"""The files of a run, written without training anything: for tests of what reads them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

HOSTILE = "<think>1+1</think><script>alert(1)</script><!-- ``` | --></pre> <img src=x> $\x1b[31m \u202e"
QUESTIONS = [("Compute 1+2+3+4", "10"), ("Compute 7+5+2+8 | <b>", "22")]


def stages() -> list[dict[str, Any]]:
    rl = {"steps": 40, "problems": ["sums"]}
    return [
        {"name": "base", "kind": "pretrain", "steps": 400},
        {"name": "r1_zero", "kind": "grpo", "model": "base", "rewards": {"accuracy": 1.0, "format": 1.0}, **rl},
        {"name": "traces", "kind": "reject", "model": "r1_zero", "problems": ["sums"]},
        {"name": "cold_start", "kind": "sft", "model": "base", "samples": ["traces"], "epochs": 2},
        {"name": "r1_reason", "kind": "grpo", "model": "cold_start", "rewards": {"language": 1.0}, **rl},
        {"name": "scores", "kind": "preference", "model": "cold_start", "pairs": "chat"},
        {"name": "r1", "kind": "grpo", "model": "cold_start", **rl, "steps": 80},
        {"name": "small_base", "kind": "pretrain", "steps": 400},
        {"name": "small_rl", "kind": "grpo", "model": "small_base", **rl},
        {"name": "small_r1", "kind": "distill", "model": "small_base", "teacher": "r1"},
    ]


def evaluation(skill: float, completion: str = HOSTILE, **changes: Any) -> dict[str, Any]:
    return {
        "pass_at_1": skill, "pass_at_1_se": 0.02, "cons_at_k": min(1.0, skill + 0.1), "cons_at_k_se": 0.03, "k": 4,
        "questions": 128, "length": 30 + 40 * skill, "length_se": 1.5, "language": 0.8, "language_se": 0.01,
        "format": 0.9, "truncated": 0.01, "unscorable": 2, "reflective": 0.25 + skill,
        "prompt_hash": "0123456789abcdef", "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 64, "settings": "s",
        "seconds": 3.0,
        "examples": [
            {"question": question, "answer": answer, "completion": f"{completion} {answer}", "accuracy": accuracy}
            for (question, answer), accuracy in zip(QUESTIONS, (1.0, 0.0), strict=True)
        ],
        **changes,
    }


def rl_line(step: int, steps: int, skill: float, seed: int) -> dict[str, Any]:
    draw = random.Random(f"{seed} {step}")
    at = skill * (1 - math.exp(-4 * (step + 1) / steps)) + draw.gauss(0, 0.03)
    line = {
        "step": step, "reward": 1 + at, "reward_std": 0.4, "reward_accuracy": at,
        "reward_format": 1 - 0.5 * math.exp(-step / 5),
        "reward_language": 0.7 + 0.3 * at, "length": 30 + 30 * at, "truncated": 0.05 * draw.random(),
        "zero_spread": 0.2 + 0.1 * draw.random(), "unscorable": step % 7 == 3, "timeouts": 0, "crashes": 0,
        "logprob_gap_mean": 1e-6, "logprob_gap_max": 1e-5 * (1 + draw.random()), "completion_tokens": 2000,
        "first_ratio_deviation": 1e-7, "loss": 0.01 * draw.gauss(0, 1), "kl": 0.002 * step,
        "entropy": 0.5 + 0.5 / (1 + step), "clip_low_fraction": 0.01, "clip_high_fraction": 0.02 * draw.random(),
        "grad_norm": 1 + draw.random(), "reflective": 0.3 + at,
    }
    if step % 5 == 0:
        line |= {"pass_at_1": max(0.0, min(1.0, at)), "pass_at_1_se": 0.02, "eval_length": 30 + 30 * at}
    return line | {"unscorable": int(line["unscorable"])}


def timing_line(step: int) -> dict[str, Any]:
    parts = {"seconds_sampling": 0.6, "seconds_scoring": 0.05, "seconds_logprobs": 0.2, "seconds_updates": 0.3}
    return {"step": step, **parts, "seconds_total": 1.2 * (step + 1), "tokens_per_second": 1800.0}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_config(run_dir: Path, listed: list[dict[str, Any]] | None = None) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    data = {"sums": {"kind": "arithmetic"}}
    recipe = {"run_dir": str(run_dir), "seed": 0, "data": data, "stages": listed or stages()}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def write_manifest(run_dir: Path, entries: dict[str, dict[str, Any]]) -> None:
    content = {"format": 1, "name": run_dir.name, "order": [stage["name"] for stage in stages()], "stages": entries}
    aside = run_dir / ".manifest.json"
    aside.write_text(json.dumps(content))
    aside.replace(run_dir / "manifest.json")


def entry(stage: dict[str, Any], status: str = "finished", **changes: Any) -> dict[str, Any]:
    digest = "ab12" * 16
    inputs = {stage["model"]: digest} if "model" in stage else {}
    return {
        "kind": stage["kind"], "status": status, "fingerprint": digest, "output": digest, "summary": {},
        "seconds": 50.0,
        "hashes": {"config": digest, "code": digest, "data": {"sums": digest}, "inputs": inputs},
        "evaluation": None,
    } | changes


def write_run(run_dir: Path) -> Path:
    """A finished run of the whole chain."""
    write_config(run_dir)
    skills = {"base": 0.1, "r1_zero": 0.5, "cold_start": 0.45, "r1_reason": 0.6, "r1": 0.8, "small_base": 0.05,
              "small_rl": 0.3, "small_r1": 0.6}
    entries = {}
    for seed, stage in enumerate(stages()):
        name, kind, directory = stage["name"], stage["kind"], run_dir / stage["name"]
        changes: dict[str, Any] = {"summary": {"parameters": 1000 * (1 + seed)}}
        if name in skills:
            changes["evaluation"] = evaluation(skills[name])
        if kind == "grpo":
            steps = range(stage["steps"])
            write_lines(directory / "metrics.jsonl", [rl_line(step, len(steps), skills[name], seed) for step in steps])
            write_lines(directory / "timings.jsonl", [timing_line(step) for step in steps])
            write_lines(directory / "samples.jsonl", [
                {"step": step, **example} for step in (0, steps[-1]) for example in evaluation(step)["examples"]
            ])
        elif kind == "reject":
            changes["summary"] = {"sampled": 4096, "kept": 1500, "rejected": {"wrong": 2000, "mixed_language": 596}}
        else:
            scored = {"accuracy": 0.9} if kind == "preference" else {}
            steps = range(9, 400, 10)
            write_lines(directory / "metrics.jsonl", [
                {"step": step, "loss": 3 * math.exp(-step / 80) + 0.4, **scored} for step in steps
            ])
            write_lines(directory / "timings.jsonl", [
                {"step": step, "seconds_training": 1.0, "seconds_total": (step + 1) / 10} for step in steps
            ])
        entries[name] = entry(stage, **changes)
    write_manifest(run_dir, entries)
    return run_dir

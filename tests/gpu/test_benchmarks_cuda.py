"""The benchmarks' column of the CUDA kernels: its bars, and the table of what these are chosen for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import choose
import pytest
import torch
from gpu import bars, sanitize
from gpu.cases import of_group
from gpu.cases.grpo_loss import ALL, MASKED
from gpu.setting import CUDA, OURS, PRODUCTS, Candidate, Setting, by_cuda, with_cuda
from gpu.step import IN_PLACE, STEP
from gpu.timing import Timed
from test_benchmarks_gpu import row

import r1kernels
from r1kernels import _choice, _dispatch, _library

SMALL = Setting(torch.device("cpu"), small=True, compiled=False)
LOSS = "forward + backward"
ROOT = Path(__file__).resolve().parents[2]


# ---- candidates ---------------------------------------------------------------------------------------------


def test_the_column_runs_on_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Setting, "cuda", "reference")
    asked: list[str] = []

    def note() -> None:
        asked.append(_dispatch.requested())

    candidates = with_cuda({"peer": Candidate(Timed(note)), OURS: Candidate(Timed(note, note), note)}, SMALL)
    assert list(candidates) == [OURS, CUDA, "peer"]
    with r1kernels.backend("cpu"):
        for candidate in candidates.values():
            candidate.timed.prepare()
            candidate.timed.run()
            candidate.check()
    assert asked == ["cpu"] * 3 + ["reference"] * 3 + ["cpu"]


def test_without_these_kernels_there_is_no_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "cuda_missing", lambda device_type: "built without CUDA")
    setting = SMALL._replace(device=torch.device("cuda"))
    candidates = {OURS: Candidate(Timed(lambda: None))}
    assert setting.cuda == "" and with_cuda(candidates, setting) == candidates


@pytest.mark.parametrize("group, op", [("kernels", "token_stats"), ("losses", bars.POLICY), ("losses", "grpo_loss")])
def test_both_columns_stand_beside_each_other(group: str, op: str) -> None:
    cases = [case for case in of_group(group, SMALL) if case.op == op]
    assert cases and all({OURS, CUDA} <= set(case.candidates) for case in cases)


def test_the_sanitizer_runs_these_kernels_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize.run(SMALL.device, "token_stats", ("cuda",)) == 5
    assert all(line.endswith(f", {CUDA}") for line in capsys.readouterr().out.splitlines())


# ---- bars ---------------------------------------------------------------------------------------------------


def measured() -> list[dict[str, Any]]:
    main = bars.MAIN
    return [
        row("token_stats", "statistics", main, median_us=700), row("token_stats", "gradient", main, median_us=1400),
        row("token_stats", "statistics", main, CUDA, median_us=650),
        row("token_stats", "gradient", main, CUDA, median_us=1300),
        row("grpo_loss", LOSS, main, median_us=2200), row("grpo_loss", LOSS, main, CUDA, median_us=1330),
        row("grpo_loss", LOSS, main, STEP, median_us=1300, share_of_copy=0.9),
        row("fused step", ALL, main, STEP, median_us=1300, share_of_copy=0.9),
        row("fused step", ALL, main, IN_PLACE, median_us=1500, share_of_copy=0.8),
        row("fused step", MASKED, bars.SHORT, STEP, median_us=1100, share_of_copy=0.85),
        row("grpo_loss", LOSS, main, STEP, "float32", median_us=1, share_of_copy=2.0),
        row("grpo_loss", LOSS, "256 x 151936", STEP, median_us=50, share_of_copy=0.81),
        row("grpo_loss", LOSS, "8192 x 50257", STEP, median_us=50, share_of_copy=0.84),
        row("linear_grpo_loss", "60 % clipped", bars.HEAD, CUDA, median_us=24e3),
        row("linear_grpo_loss", "60 % clipped", bars.HEAD, PRODUCTS, median_us=40e3),
        row(bars.POLICY, "forward, graph", "8 x 512 tokens", CUDA, "float32", median_us=11.5),
        row(bars.POLICY, "forward, graph", "8 x 512 tokens", OURS, "float32", median_us=19),
    ]


def test_bars_of_the_fused_step() -> None:
    found = {bar.name: (bar.value, bar.verdict) for bar in bars.evaluate(measured()) if bar.candidate.startswith(CUDA)}
    step = "fused GRPO step"
    share = "share of the copy's bandwidth"
    least = "times one read and one write"
    assert found == {
        f"{step}, {bars.MAIN}, {ALL}, {least}": (pytest.approx(1 / 0.9), "met"),
        f"{step} in place, {bars.MAIN}, {ALL}, {least}": (pytest.approx(1.25), "missed"),
        f"{step}, {bars.SHORT}, {MASKED}, {least}": (pytest.approx(1 / 0.85), "missed"),
        **{
            f"{step}{how}, {shape}, {rows}, {least}": (None, "not measured")
            for how, shape, rows in (
                ("", bars.MAIN, MASKED), (" in place", bars.MAIN, MASKED), (" in place", bars.SHORT, MASKED),
                ("", bars.SHORT, ALL), (" in place", bars.SHORT, ALL),
            )
        },
        f"{step}, times faster than statistics + gradient": (pytest.approx(1950 / 1300), "met"),
        f"{step}, 256 x 151936, {share}": (0.81, "met"), f"{step}, 8192 x 50257, {share}": (0.84, "missed"),
        f"{step}, {bars.MAIN}, {share}": (0.9, "met"),
        **{
            f"{step}, 8192 x {vocab}, {share}": (None, "not measured")
            for vocab in (32_000, 100_352, 128_256, 262_144)
        },
        **{
            f"{case}, {shape} (cuda), {share}": (None, "not measured")
            for case, shape in (
                ("statistics", bars.MAIN), ("statistics", bars.SHORT), ("gradient", bars.MAIN),
                ("gradient", bars.SHORT), ("gradient in place", bars.MAIN),
            )
        },
        "linear_grpo_loss, 60 % clipped (cuda), times the three bare products": (pytest.approx(0.6), "met"),
        **{
            f"{place} (cuda), times the three bare products": (None, "not measured")
            for place in (
                "linear_policy_head, GRPO with an entropy bonus", "linear_cross_entropy, forward + backward",
                "linear_grpo_loss, all tokens active", "linear_grpo_loss, 60 % known inactive",
            )
        },
        "policy loss + advantages at 4k tokens (cuda)": (11.5, "met"),
    }


# ---- the table ----------------------------------------------------------------------------------------------


def results(rows: list[dict[str, Any]], **header: Any) -> dict[str, Any]:
    return {"device": "NVIDIA H200", "driver": "580", "torch": "2.11", "kernels": "12-34", **header, "results": rows}


def test_ratios_are_less_the_spread() -> None:
    found = choose.measurements([
        row("token_stats", "statistics", bars.MAIN, median_us=700, spread_us=20),
        row("token_stats", "statistics", bars.MAIN, CUDA, median_us=670, spread_us=10),
        row("token_stats", "gradient in place, narrowed to 16 bits", "1024 x 151936", dtype="float32", median_us=90),
        row("token_stats", "gradient in place, narrowed to 16 bits", "1024 x 151936", CUDA, "float32", median_us=99),
        row(bars.POLICY, "forward, graph", "8 x 512 tokens", dtype="float32", median_us=20),
        row(bars.POLICY, "forward, graph", "8 x 512 tokens", CUDA, "float32", median_us=10),
        row("grpo_loss", LOSS, bars.MAIN, median_us=2000), row("grpo_loss", LOSS, bars.MAIN, CUDA, error="fault"),
        row("grpo_loss", LOSS, bars.MAIN, dtype="float16", median_us=2000),
        row("grpo_loss", LOSS, bars.MAIN, CUDA, "float16", median_us=1900),
        row("cross_entropy", LOSS, bars.MAIN, median_us=2), row("cross_entropy", LOSS, bars.MAIN, CUDA, median_us=1),
    ])
    tokens = [{"dtype": None, "vocab": None, "tokens": 4096, "ratio": round(19.5 / 10.5, 3)}]
    assert found == {
        "token_stats": [{"dtype": "bfloat16", "vocab": 151_936, "tokens": 8192, "ratio": round(690 / 675, 3)}],
        "token_stats_backward_out": [
            {"dtype": "float32", "vocab": 151_936, "tokens": 1024, "ratio": round(89.5 / 99.5, 3)}
        ],
        "policy_loss": tokens, "group_advantages": tokens,
    }


@pytest.fixture
def chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Writes results to a table and asks it."""
    monkeypatch.setattr(_choice, "TABLE", tmp_path / "table.json")

    def ask(written: dict[str, Any] | None, operator: str, vocab: int = 151_936) -> bool:
        if written:
            choose.write(written, _choice.TABLE)
        _choice.load.cache_clear()
        _choice.cuda_is_faster.cache_clear()
        return _choice.cuda_is_faster(operator, "NVIDIA H200", torch.bfloat16, vocab)

    yield ask
    _choice.load.cache_clear()
    _choice.cuda_is_faster.cache_clear()


def statistics(us: float, shape: str = bars.MAIN) -> list[dict[str, Any]]:
    return [row("token_stats", "statistics", shape, median_us=700),
            row("token_stats", "statistics", shape, CUDA, median_us=us)]


def test_what_is_written_is_read(chosen: Callable[..., bool]) -> None:
    assert chosen(results(measured()), "grpo_step") and chosen(None, "token_stats") and chosen(None, "policy_loss")
    assert not chosen(None, "kl_estimate")
    # The same again, slower; other shapes of the same kernels beside it.
    assert not chosen(results(statistics(710)), "token_stats") and chosen(None, "grpo_step")
    assert chosen(results(statistics(300, "8192 x 32000")), "token_stats", 32_000) and not chosen(None, "token_stats")
    # Other kernels: nothing of the older ones stays.
    assert chosen(results(statistics(650), kernels="56-78"), "token_stats")
    assert not chosen(None, "grpo_step") and not chosen(None, "token_stats", 32_000)


def test_other_devices_stay(chosen: Callable[..., bool]) -> None:
    choose.write(results(statistics(600), device="NVIDIA B200"), _choice.TABLE)
    assert chosen(results(statistics(650)), "token_stats")
    assert list(json.loads(_choice.TABLE.read_text())) == ["NVIDIA B200", "NVIDIA H200"]
    before = _choice.TABLE.read_text()
    choose.write(results([], device="NVIDIA A100"), _choice.TABLE)
    assert _choice.TABLE.read_text() == before


def test_every_operator_that_is_measured_has_both_kernels() -> None:
    from r1kernels._schemas import CUDA_OPERATORS

    measured_operators = {operator for operators in choose.OPERATORS.values() for operator in operators}
    assert measured_operators == set(CUDA_OPERATORS)


def test_the_command(tmp_path: Path) -> None:
    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, ROOT / "benchmarks" / "choose.py", tmp_path / "results.json", "--table",
             tmp_path / "table.json"], capture_output=True, text=True,
        )

    (tmp_path / "results.json").write_text(json.dumps(results(measured())))
    completed = run()
    assert completed.returncode == 0, completed.stderr
    assert "grpo_step, bfloat16, 8192 x 151936: 1.65 x" in completed.stdout
    assert "policy_loss, 4096 tokens: 1.54 x" in completed.stdout
    (tmp_path / "results.json").write_text(json.dumps(results([], driver=None, device="rehearsal on x86_64")))
    completed = run()
    assert completed.returncode == 2 and "expected those of a GPU" in completed.stderr


def test_a_stand_in_keeps_its_check() -> None:
    def wrong() -> None:
        raise AssertionError("the gradient is off")

    with pytest.raises(AssertionError, match="off"):
        by_cuda(Candidate(Timed(lambda: None), wrong), SMALL).check()

"""The benchmarks of a GPU where there is none: timing with a made-up clock, inputs, rows, bars, and the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import bars, inputs, measure, records, report, timing
from gpu.cases import grpo_loss
from gpu.losses import gradients
from gpu.setting import COPY, FLOAT32_PRODUCT, FLUSHED, OURS, PRODUCTS, Candidate, Case, LeftOut, Logits, Setting, peers
from gpu.timing import Timed

from r1kernels.bench.turns import LEAST

SMALL = Setting(torch.device("cpu"), small=True, compiled=False)
HASH = "5678"


class FakeClock:
    """A run returns the microseconds it took. The host needs a tenth to queue it."""

    host_s: float | None = None
    hides_s = 20e-6

    def seconds(self, run: Callable[[], object], calls: int) -> float:
        assert calls == 1
        taken = float(run()) * 1e-6
        self.host_s = taken / 10
        return taken

    def peak_extra_bytes(self, run: Callable[[], object]) -> int:
        return 100

    def graph(self, run: Callable[[], object]) -> Timed:
        return Timed(lambda: 10 * run(), calls=10)


def taking(us: float, log: list[str] | None = None, name: str = "") -> Timed:
    def run() -> float:
        if log is not None:
            log.append(name)
        return us

    return Timed(run)


def case(candidates: dict[str, Candidate], **given: Any) -> Case:
    return Case("token_stats", "statistics", "8192 x 151936", torch.bfloat16, candidates, **given)


# ---- timing -------------------------------------------------------------------------------------------------


def test_numbers_are_microseconds_and_slow_candidates_have_few_rounds() -> None:
    log: list[str] = []
    candidates = {name: taking(us, log, name) for name, us in (("a", 100.0), ("b", 200.0), ("slow", 10_000.0))}
    measured = timing.in_turns(candidates, FakeClock(), seconds=0.00301)
    assert {name: each.median_us for name, each in measured.items()} == pytest.approx(
        {"a": 100, "b": 200, "slow": 10_000})
    assert {name: each.rounds for name, each in measured.items()} == {"a": 10, "b": 10, "slow": LEAST}
    assert all(each.spread_us == 0 and each.host_us == pytest.approx(each.median_us / 10)
               for each in measured.values())
    assert log[-(2 * 10 + LEAST):][:6] == ["a", "b", "slow", "a", "b", "slow"] and log[-4:] == ["a", "b", "a", "b"]


def test_preparation_comes_before_every_run_and_a_graph_is_divided_by_its_calls() -> None:
    log: list[str] = []
    given = Timed(lambda: log.append("run") or 50.0, prepare=lambda: log.append("prepare"), calls=10)
    assert timing.in_turns({"a": given}, FakeClock(), seconds=0)["a"].median_us == pytest.approx(5)
    assert "run" in log and all(log[i - 1] == "prepare" for i, what in enumerate(log) if what == "run")


def test_rows_tell_whether_the_hosts_time_is_in_their_numbers() -> None:
    given = {OURS: Candidate(taking(100)), "slow": Candidate(taking(300)), "graph": Candidate(taking(100), graph=True)}
    rows, _ = measure.run(case(given), FakeClock(), 0, {})
    told = {row["candidate"]: (row["timing"], round(row["host_us"], 6), row["host_hidden"]) for row in rows}
    assert told == {
        OURS: ("one call", 10, True), "slow": ("one call", 30, False), "graph": ("CUDA graph of 10 calls", 100, False),
    }


# ---- inputs -------------------------------------------------------------------------------------------------


def test_masks_have_prompts_completions_and_padding() -> None:
    mask = inputs.completion_mask(16, 512, torch.device("cpu"))
    assert 0.6 < mask.float().mean() < 0.7
    for row in mask.tolist():
        prompt = row.index(True)
        length = row.count(True)
        assert prompt > 0 and row[prompt : prompt + length] == [True] * length
    assert len({row.count(True) for row in mask.tolist()}) > 8


def test_packed_sequences_fill_all_tokens() -> None:
    bounds = inputs.packed_bounds(8192, 16, torch.device("cpu"))
    lengths = bounds.diff()
    assert bounds[0] == 0 and bounds[-1] == 8192 and len(lengths) == 16
    assert (lengths > 0).all() and lengths.max() > 4 * lengths.min()


@pytest.mark.parametrize("rows", [grpo_loss.ALL, grpo_loss.MASKED, grpo_loss.PACKED])
def test_problems_of_all_rows_agree_with_their_parts(rows: str) -> None:
    """In float64, the loss of a problem is the mean of those of its sequences."""
    problem, plain = grpo_loss.make_problem(Logits(64, 1_031), SMALL, torch.float32, rows)
    problem = problem.double()
    parts = [float(gradients(plain, problem.part(slice(i, i + 1)))[0]) for i in range(problem.count)]
    assert float(gradients(plain, problem)[0]) == pytest.approx(sum(parts) / len(parts), rel=1e-9)


def test_the_bytes_of_a_masked_step_are_those_of_tokens_that_count() -> None:
    problem, _ = grpo_loss.make_problem(Logits(64, 1_031), SMALL, torch.bfloat16, grpo_loss.MASKED)
    counted = int(problem.inputs["mask"].sum())
    assert 0 < counted < 64 and grpo_loss.moved_bytes(problem) == 2 * 1_031 * (counted + 64)


# ---- rows ---------------------------------------------------------------------------------------------------


def wrong() -> None:
    raise AssertionError("the gradient is off\nby a lot")


def test_a_candidate_that_is_wrong_has_no_number() -> None:
    given = {OURS: Candidate(taking(100)), "peer": Candidate(taking(1), wrong), COPY: Candidate(taking(90))}
    rows, lost = measure.run(case(given, bytes=8192 * 151_936 * 2), FakeClock(), 0, {"copy": 1.0})
    by_name = {row["candidate"]: row for row in rows}
    assert lost is None and by_name["peer"]["error"] == "AssertionError: the gradient is off"
    assert "median_us" not in by_name["peer"]
    # One read against a copy's read and write: 100 us for half of what the copy moves in 90.
    assert by_name[OURS]["share_of_copy"] == pytest.approx(0.45)
    assert by_name[COPY]["share_of_copy"] == pytest.approx(1)
    assert by_name[OURS]["share_of_gemm"] is None


def test_a_lost_device_ends_the_case() -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    rows, error = measure.run(
        case({OURS: Candidate(taking(1), lost), "other": Candidate(taking(1))}), FakeClock(), 0, {}
    )
    assert error is not None and [row["candidate"] for row in rows] == [OURS]


def test_memory_running_out_is_no_lost_device() -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    rows, error = measure.run(
        case({"eager": Candidate(taking(1), full), OURS: Candidate(taking(1))}), FakeClock(), 0, {}
    )
    assert error is None and {row["candidate"] for row in rows} == {OURS, "eager"}


def test_a_peer_that_cannot_be_loaded_says_why() -> None:
    found = peers(SMALL, {"absent": lambda: __import__("no_such_library")})
    with pytest.raises(LeftOut, match="No module named 'no_such_library'"):
        found["absent"](hidden=1)
    rows, _ = measure.run(case({"absent": Candidate(taking(1), found["absent"])}), FakeClock(), 0, {})
    assert rows[0]["error"] == "left out: ModuleNotFoundError: No module named 'no_such_library'"
    assert peers(SMALL._replace(lean=True), {"absent": dict}) == {}


def test_products_of_the_same_case_are_the_ceiling_of_a_head() -> None:
    given = Case(
        "linear_statistics", "log-prob + entropy", "N 8192, H 4096, V 151936", torch.bfloat16,
        {OURS: Candidate(taking(16_000)), PRODUCTS: Candidate(taking(13_000))}, flop=2 * 8192 * 4096 * 151_936,
        inherent_bytes=40,
    )
    rows, _ = measure.run(given, FakeClock(), 0, {"gemm": 1.0, "copy": 1.0})
    assert rows[0]["share_of_gemm"] == pytest.approx(13 / 16) and rows[0]["share_of_copy"] is None
    assert rows[0]["beyond_bytes"] == 60 and rows[0]["logits_bytes"] == 2 * 8192 * 151_936


def test_lines_survive_a_cut_and_the_last_row_of_a_place_counts(tmp_path: Path) -> None:
    place = {"op": "o", "case": "c", "shape": "s", "dtype": "d", "candidate": OURS}
    for number in (1, 2):
        records.append(tmp_path, "result", {**place, "median_us": number})
    with (tmp_path / records.LINES).open("a") as file:
        file.write('{"kind": "result", "op": ')
    assert records.latest(records.of_kind(records.read(tmp_path), "result")) == [{**place, "median_us": 2}]


# ---- bars ---------------------------------------------------------------------------------------------------


def row(
    op: str, which: str, shape: str, candidate: str = OURS, dtype: str = "bfloat16", **numbers: Any
) -> dict[str, Any]:
    return {
        "op": op, "case": which, "shape": shape, "dtype": dtype, "candidate": candidate, "kernels": HASH,
        "spread_us": 1.0, "share_of_copy": None, "share_of_gemm": None, "bytes": 0, "flop": 0, "flop_per_s": None,
        **numbers,
    }


def measured_rows() -> list[dict[str, Any]]:
    head, linear = bars.HEAD, "linear_grpo_loss"
    return [
        row("ceiling", "copy", "4096 MiB", COPY, median_us=2e3, bytes_per_s=4.3e12),
        row("ceiling", "bfloat16 products", head, "h W^T", median_us=13e3, flop_per_s=7.8e14),
        row("token_stats", "statistics", bars.MAIN, median_us=600, share_of_copy=0.95, flop=10, bytes=2,
            flop_per_s=1e12),
        row("token_stats", "gradient", bars.MAIN, median_us=1300, share_of_copy=0.85),
        row("token_stats", "gradient", bars.MAIN, "torch eager", error="OutOfMemoryError: no | memory"),
        row("grpo_loss", "forward + backward", bars.MAIN, median_us=2000),
        row(bars.POLICY, "forward, graph", "64 x 512 tokens", dtype="float32", median_us=29),
        row("linear_statistics", "log-prob + entropy", head, median_us=16e3, share_of_gemm=0.8, mean_error=5e-7,
            largest_error=3e-5, peak_extra_bytes=1000, logits_bytes=10**6),
        row("linear_policy_head", "GRPO with an entropy bonus", head, median_us=45e3),
        row("linear_policy_head", "GRPO with an entropy bonus", head, PRODUCTS, median_us=40e3),
        row("linear_statistics", "log-prob + entropy", head, FLUSHED, median_us=19e3, mean_error=9e-7,
            largest_error=5e-6),
        row(linear, "all tokens active", head, median_us=44e3, beyond_bytes=2**30),
        row(linear, "all tokens active", head, PRODUCTS, median_us=40e3),
        row(linear, "60 % clipped", head, median_us=28e3, beyond_bytes=2**32),
        row(linear, "60 % clipped", head, PRODUCTS, median_us=40e3),
        row("cross_entropy", "inputs", "", dtype="", error="AssertionError: x"),
    ]


def test_bars_by_name() -> None:
    launches = [
        {"vocab": 32_000, "dtype": "bfloat16", "fused": True}, {"vocab": 151_936, "dtype": "bfloat16", "fused": False},
        {"vocab": 32_000, "dtype": "float32", "fused": False},
    ]
    verdicts = {
        bar.name: bar.verdict for bar in bars.evaluate(measured_rows(), launches=launches)
        if bar.candidate in (OURS, FLUSHED, FLOAT32_PRODUCT)
    }
    share = "share of the copy's bandwidth"
    assert verdicts == {
        "V = 32,000 launches step_kernel (1: yes, 0: no)": "met",
        "V = 151,936 launches step_kernel (1: yes, 0: no)": "missed",
        f"statistics, {bars.MAIN}, {share}": "met", f"statistics, {bars.SHORT}, {share}": "not measured",
        f"gradient, {bars.MAIN}, {share}": "missed", f"gradient, {bars.SHORT}, {share}": "not measured",
        f"gradient in place, {bars.MAIN}, {share}": "not measured",
        "linear_policy_head, GRPO with an entropy bonus, times the three bare products": "missed",
        "linear_cross_entropy, forward + backward, times the three bare products": "not measured",
        "linear_grpo_loss, 60 % clipped, times all tokens active": "met",
        "linear_grpo_loss, 60 % known inactive, times all tokens active": "not measured",
        "grpo_loss forward + backward, times statistics + gradient": "met",
        "policy loss + advantages at 32k tokens": "met",
        "fused linear statistics, share of the measured product rate": "met",
        "fused linear statistics, peak extra memory in 16-bit logits (none are written)": "met",
        "log-probs' mean error against float64": "met",
        "log-probs' largest error against float64": "missed",
        f"log-probs' mean error against float64 ({FLUSHED})": "met",
        f"log-probs' largest error against float64 ({FLUSHED})": "met",
        f"log-probs' mean error against float64 ({FLOAT32_PRODUCT})": "not measured",
        f"log-probs' largest error against float64 ({FLOAT32_PRODUCT})": "not measured",
        "linear_grpo_loss, all tokens active, times the three bare products": "met",
        "linear_grpo_loss, all tokens active, memory beyond inputs, gradients and an fp32 dW": "met",
        "linear_grpo_loss, 60 % known inactive, times the three bare products": "not measured",
        "linear_grpo_loss, 60 % known inactive, memory beyond inputs, gradients and an fp32 dW": "not measured",
        "linear_grpo_loss, 60 % clipped, times the three bare products": "missed",
        "linear_grpo_loss, 60 % clipped, memory beyond inputs, gradients and an fp32 dW": "missed",
    }


def test_nothing_measured_meets_no_bar() -> None:
    assert {bar.verdict for bar in bars.evaluate([])} == {"not measured"}


def test_rows_carry_the_bars_that_judge_them() -> None:
    rows = bars.mark(measured_rows(), bars.evaluate(measured_rows()))
    met = {(row["op"], row["case"], row["candidate"]): row["met"] for row in rows}
    assert met["token_stats", "statistics", OURS] is True and met["token_stats", "gradient", OURS] is False
    assert met["token_stats", "gradient", "torch eager"] is None
    assert met["linear_grpo_loss", "60 % clipped", OURS] is False
    of_tile = {name: met["linear_statistics", "log-prob + entropy", name] for name in (OURS, FLUSHED)}
    assert of_tile == {OURS: False, FLUSHED: True}


# ---- the report ---------------------------------------------------------------------------------------------


def test_the_report_tells_of_the_last_kernels_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records.append(tmp_path, "run", {"device": "NVIDIA X", "kernels": "1234"})
    records.append(tmp_path, "result", row("grpo_loss", "older", "s", median_us=1) | {"kernels": "1234"})
    records.append(tmp_path, "run", {"device": "NVIDIA X", "driver": "580", "kernels": HASH})
    for each in measured_rows():
        records.append(tmp_path, "result", each)
    report.write(tmp_path)
    result = json.loads((tmp_path / "results.json").read_text())
    assert (result["device"], result["driver"], result["kernels"]) == ("NVIDIA X", "580", HASH)
    assert len(result["results"]) == len(measured_rows()) and len(result["bars"]) == len(bars.evaluate([]))
    text = (tmp_path / "report.md").read_text()
    assert "older" not in text and "OutOfMemoryError: no / memory" in text
    assert "| statistics | 8192 x 151936 | bfloat16 | r1kernels | 600.0 us | 1.00 x | 95 % |" in text
    assert "roofline.png" in capsys.readouterr().out


def test_a_report_of_nothing_is_a_report(tmp_path: Path) -> None:
    report.write(tmp_path)
    assert "not measured" in (tmp_path / "report.md").read_text()

"""The goals by name, computed from result rows alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from gpu.setting import CUDA, FLOAT32_PRODUCT, FLUSHED, OURS, PRODUCTS
from gpu.step import IN_PLACE, STEP

Row = dict[str, Any]
MAIN, SHORT, HEAD = "8192 x 151936", "8192 x 32000", "N 8192, H 4096, V 151936"
STEP_CASES = ("every token", "prompts and padding masked")
POLICY = "policy_loss + group_advantages"
POLICY_SHAPES = ("64 x 512 tokens", "8 x 512 tokens")
# Of the fused step: shape, share of the copy's bandwidth.
STEP_SHARES = {
    "256 x 151936": 0.8, "8192 x 32000": 0.85, "8192 x 50257": 0.85, "8192 x 100352": 0.85, "8192 x 128256": 0.85,
    MAIN: 0.85, "8192 x 262144": 0.85,
}
HEAD_CASES = (("all tokens active", 1.10), ("60 % clipped", 0.65), ("60 % known inactive", 0.65))
GIB = 2**30
MEAN_ERROR, LARGEST_ERROR = 1e-6, 2e-5  # of log-probs, in nats


class Bar(NamedTuple):
    """`value` is None where a row it needs has not been measured. `place` (op, case, shape) and candidate: the row it
    judges."""

    name: str
    place: tuple[str, str, str]
    value: float | None
    limit: float
    at_least: bool
    unit: str
    candidate: str = OURS

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def verdict(self) -> str:
        return {None: "not measured", True: "met", False: "missed"}[self.met]

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        value = "-" if self.value is None else f"{self.value:.4g}"
        return f"{self.verdict:<12}  {self.name}: {value} ({sign} {f'{self.limit:g} {self.unit}'.strip()})"


class Rows:
    """Result rows by place and candidate; rows with an error have no numbers."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = {
            (row["op"], row["case"], row["shape"], row["candidate"]): row
            for row in rows if (row.get("median_us") is not None and row["dtype"] == "bfloat16") or row["op"] == POLICY
        }

    def field(self, place: tuple[str, str, str], name: str, candidate: str = OURS) -> float | None:
        return self.rows.get((*place, candidate), {}).get(name)

    def ratio(self, above: float | None, *below: float | None) -> float | None:
        return None if above is None or None in below else above / sum(below)

    def of_products(self, place: tuple[str, str, str], candidate: str) -> float | None:
        return self.ratio(self.field(place, "median_us", candidate), self.field(place, "median_us", PRODUCTS))


def evaluate(rows: list[Row], main: str = MAIN, head: str = HEAD, launches: Sequence[Row] = ()) -> list[Bar]:
    """The bars in the order in which `run_on_gpu.sh` measures them."""
    return list(_bars(Rows(rows), main, head, launches))


def _bars(rows: Rows, main: str, head: str, launches: Sequence[Row]) -> Iterator[Bar]:
    yield from _of_launches(launches)
    yield from _of_token_stats(rows, main)
    yield from _of_step(rows, main)
    yield from _of_heads(rows, head)
    statistics, gradient = ("token_stats", "statistics", main), ("token_stats", "gradient", main)
    both = ("grpo_loss", "forward + backward", main)
    parts = rows.field(statistics, "median_us"), rows.field(gradient, "median_us")
    yield Bar(
        "grpo_loss forward + backward, times statistics + gradient", both,
        rows.ratio(rows.field(both, "median_us"), *parts), 1.1, False, "x",
    )
    for tokens, shape, limit, candidate in (("32k", POLICY_SHAPES[0], 30, OURS), ("4k", POLICY_SHAPES[1], 12, CUDA)):
        policy = (POLICY, "forward, graph", shape)
        yield Bar(
            f"policy loss + advantages at {tokens} tokens{'' if candidate == OURS else ' (cuda)'}", policy,
            rows.field(policy, "median_us", candidate), limit, False, "microseconds", candidate,
        )
    fused = ("linear_statistics", "log-prob + entropy", head)
    yield Bar(
        "fused linear statistics, share of the measured product rate", fused, rows.field(fused, "share_of_gemm"), 0.75,
        True, "",
    )
    dense = rows.field(fused, "logits_bytes")
    yield Bar(
        "fused linear statistics, peak extra memory in 16-bit logits (none are written)", fused,
        rows.ratio(rows.field(fused, "peak_extra_bytes"), dense), 1 / 16, False, "of them",
    )
    for candidate in (OURS, FLUSHED, FLOAT32_PRODUCT):
        told = "" if candidate == OURS else f" ({candidate})"
        for name, field, limit in (("mean", "mean_error", MEAN_ERROR), ("largest", "largest_error", LARGEST_ERROR)):
            value = rows.field(fused, field, candidate)
            yield Bar(f"log-probs' {name} error against float64{told}", fused, value, limit, False, "nats", candidate)


def _of_launches(launches: Sequence[Row]) -> Iterator[Bar]:
    fused = {(row["vocab"], row["dtype"]): row["fused"] for row in launches}
    for vocab in (32_000, 151_936):
        found = fused.get((vocab, "bfloat16"))
        yield Bar(f"V = {vocab:,} launches step_kernel (1: yes, 0: no)", ("launch", "", str(vocab)),
                  None if found is None else float(found), 1, True, "")


def _of_token_stats(rows: Rows, main: str) -> Iterator[Bar]:
    for case, shape, candidate in itertools.product(
        ("statistics", "gradient", "gradient in place"), (main, SHORT), (OURS, CUDA)
    ):
        if case == "gradient in place" and shape == SHORT:
            continue  # not a case
        place = ("token_stats", case, shape)
        yield Bar(
            f"{case}, {shape}{'' if candidate == OURS else ' (cuda)'}, share of the copy's bandwidth", place,
            rows.field(place, "share_of_copy", candidate), 0.9, True, "", candidate,
        )


def _of_heads(rows: Rows, head: str) -> Iterator[Bar]:
    for op, case, limit in (
        ("linear_policy_head", "GRPO with an entropy bonus", 1.10),
        ("linear_cross_entropy", "forward + backward", 1.05),
        *(("linear_grpo_loss", case, limit) for case, limit in HEAD_CASES),
    ):
        place = (op, case, head)
        for candidate, told in ((OURS, ""), (CUDA, " (cuda)")):
            value = rows.of_products(place, candidate)
            yield Bar(f"{op}, {case}{told}, times the three bare products", place, value, limit, False, "x", candidate)
    dense = rows.field(("linear_grpo_loss", HEAD_CASES[0][0], head), "median_us")
    for case, limit in HEAD_CASES:
        place = ("linear_grpo_loss", case, head)
        if limit < 1:
            value = rows.ratio(rows.field(place, "median_us"), dense)
            yield Bar(f"linear_grpo_loss, {case}, times all tokens active", place, value, limit, False, "x")
        beyond = rows.field(place, "beyond_bytes")
        yield Bar(
            f"linear_grpo_loss, {case}, memory beyond inputs, gradients and an fp32 dW", place,
            None if beyond is None else beyond / GIB, 2, False, "GiB",
        )


def _of_step(rows: Rows, main: str) -> Iterator[Bar]:
    """The least that can be moved: one read of the logits whose tokens count, one write of the gradient, at the speed
    of a copy. The two kernels: those that are faster together."""
    for case, shape, candidate in itertools.product(STEP_CASES, (main, SHORT), (STEP, IN_PLACE)):
        place = ("fused step", case, shape)
        share = rows.field(place, "share_of_copy", candidate)
        told = " in place" if candidate == IN_PLACE else ""
        yield Bar(
            f"fused GRPO step{told}, {shape}, {case}, times one read and one write", place,
            None if not share else 1 / share, 1.15, False, "x", candidate,
        )
    place = ("grpo_loss", "forward + backward", main)
    both = [
        [rows.field(("token_stats", case, main), "median_us", candidate) for case in ("statistics", "gradient")]
        for candidate in (OURS, CUDA)
    ]
    two = min((sum(parts) for parts in both if None not in parts), default=None)
    value = rows.ratio(two, rows.field(place, "median_us", STEP))
    yield Bar("fused GRPO step, times faster than statistics + gradient", place, value, 1.4, True, "x", STEP)
    for shape, limit in STEP_SHARES.items():
        place = ("grpo_loss", "forward + backward", shape)
        share = rows.field(place, "share_of_copy", STEP)
        yield Bar(
            f"fused GRPO step, {shape}, share of the copy's bandwidth", place, share, limit, True, "", STEP
        )


def mark(rows: list[Row], bars: list[Bar]) -> list[Row]:
    """The rows, those that bars judge with `bar` and `met` (all of them)."""
    by_row: dict[tuple[str, ...], list[Bar]] = {}
    for bar in bars:
        by_row.setdefault((*bar.place, bar.candidate), []).append(bar)

    def judged(row: Row) -> Row:
        of_row = by_row.get((row["op"], row["case"], row["shape"], row["candidate"]), [])
        of_row = [bar for bar in of_row if bar.value is not None]
        if not of_row or (row["dtype"] != "bfloat16" and row["op"] != POLICY):
            return {**row, "bar": None, "met": None}
        return {**row, "bar": "; ".join(str(bar) for bar in of_row), "met": all(bar.met for bar in of_row)}

    return [judged(row) for row in rows]

"""What the committed tables promise of kernels that memory is to limit: occupancy, instructions, the order of sums.

They are of the oldest and of the newest Triton, and test_aot says that they are of these kernels.
"""

import re
from typing import Any

import pytest
from test_aot import NEWEST, OLDEST, Row, committed_table

from r1kernels.triton import aot

IN_FLIGHT = 32 << 10  # bytes: a processor of sm_90 needs 21 KB at 4.3 TB/s and 600 ns
# Instructions an entry on sm_90: an H200 issues 4 a clock for 32 threads, and 4.5 bfloat16 entries arrive.
STATISTICS, POLICY_GRADIENT = 10, 8
versions = pytest.mark.parametrize("version", [OLDEST, NEWEST])


def rows_of(version: str, kernel: str = "", arch: str = "sm_90", **settings: Any) -> list[Row]:
    """Of kernels with a main loop; `settings` are parts of the variants' names."""
    words = [f"{name}={value}" for name, value in settings.items()]
    return [
        row for row in committed_table(version)["rows"]
        if row["arch"] == arch and row["loads"] and kernel in row["kernel"]
        and set(words) <= set(row["variant"].split())
    ]


@versions
def test_enough_bytes_are_in_flight(version: str) -> None:
    rows = [row for row in rows_of(version) if "wide_loads" in row["expects"]]
    assert {row["kernel"] for row in rows} == {
        "token_stats_kernels.segment_kernel", "token_stats_backward.gradient_kernel",
        "token_stats_kernels.segment_more_kernel",
        "divergence_kernels.terms_kernel", "divergence_kernels.gradient_kernel",
    }
    few = {(row["kernel"], row["variant"]): aot.bytes_in_flight(row) for row in rows}
    assert not {name: count for name, count in few.items() if count < IN_FLIGHT}


@versions
@pytest.mark.parametrize("logits", ["*bf16", "*fp16", "*fp32"])
def test_statistics_take_few_instructions(version: str, logits: str) -> None:
    rows = rows_of(version, "segment_kernel", logits=logits, EXACT=False, LAYOUT=0)
    assert rows
    for row in rows:
        assert row["loops"] and max(row["loops"]) <= STATISTICS, row


@versions
@pytest.mark.parametrize("logits, out", [("*bf16", "*bf16"), ("*fp16", "*fp16"), ("*fp32", "*bf16")])
def test_a_policy_gradient_takes_few_instructions(version: str, logits: str, out: str) -> None:
    """Three loops: that of a policy loss, and with entropy, and with both entropy and a soft cap."""
    rows = rows_of(version, "token_stats_backward.gradient_kernel", logits=logits, out=out, LAYOUT=0, MORE=False)
    assert rows
    for row in rows:
        assert len(row["loops"]) == 3 and min(row["loops"]) <= POLICY_GRADIENT, row


def test_sums_are_made_alike_whatever_the_layout() -> None:
    """The entries that a thread reduces, and the order of threads: for rows in any memory, with either Triton."""
    found: dict[tuple[str, str], set[tuple[str, ...]]] = {}
    for version in (OLDEST, NEWEST):
        rows = rows_of(version, "segment_kernel")
        assert {re.search(r"LAYOUT=(\d)", row["variant"])[1] for row in rows} == {"0", "1", "2"}
        for row in rows:
            of = re.search(r"logits=(\S+)", row["variant"])[1], re.search(r"EXACT=(\w+)", row["variant"])[1]
            found.setdefault(of, set()).add(tuple(row["sums"]))
    assert len(found) == 4
    for of, sums in found.items():
        assert len(sums) == 1, (of, sums)
        (layouts,) = sums
        # A thread reduces all entries of its row of the tile, and then threads are reduced.
        assert any("x" in text.split()[0] and re.search(r"threadsPerWarp = \[32, 1\]", text) for text in layouts)


def test_occupancy() -> None:
    row = {"arch": "sm_90", "threads": 256, "registers": 80, "shared": 32, "loads": 64}
    assert aot.resident_warps(row) == 24 and aot.bytes_in_flight(row) == 48 << 10
    assert aot.resident_warps({**row, "registers": 81}) == 16
    assert aot.resident_warps({**row, "registers": 32}) == 64
    assert aot.resident_warps({**row, "shared": 100_000}) == 16
    assert aot.resident_warps({**row, "arch": "sm_120", "registers": 32}) == 48

"""What others published for shapes that are measured here too: rows to compare with, each from its own device."""

from __future__ import annotations

from typing import Any, NamedTuple

from gpu.setting import OURS, PRODUCTS

Row = dict[str, Any]
POLICY, LOSS = ("linear_policy_head", "GRPO with an entropy bonus"), ("linear_cross_entropy", "forward + backward")
LIGER_SHAPE, QUACK_SHAPE = "N 8192, H 4096, V 131072", "N 2048, H 4096, V 128256"
TRL_SHAPE = "N 8192, H 4096, V 151936"


class Figure(NamedTuple):
    who: str
    device: str
    place: tuple[str, str]  # operation and case
    shape: str
    milliseconds: float
    peer: str  # the candidate that runs the same code here
    source: str


FIGURES = (
    Figure("Liger 0.8.5, log-prob + entropy (CuTe, 4 products)", "H100", POLICY, LIGER_SHAPE, 50.2,
           "Liger scaled cross-entropy", "its benchmark, 701 TFLOP/s"),
    Figure("QuACK linear cross-entropy (3 products)", "H200", LOSS, QUACK_SHAPE, 7.96, "QuACK",
           "its benchmark, about 810 TFLOP/s"),
    Figure("Liger cross-entropy (CuTe)", "H200", LOSS, QUACK_SHAPE, 8.72, "Liger scaled cross-entropy",
           "its benchmark"),
    Figure("bare products", "H100", LOSS, TRL_SHAPE, 42, PRODUCTS, "TRL issue 7244"),
    Figure("TRL chunked", "H100", LOSS, TRL_SHAPE, 167, "TRL chunked", "TRL issue 7244"),
    Figure("Liger Triton", "H100", LOSS, TRL_SHAPE, 192, "Liger", "TRL issue 7244"),
)


def table(rows: list[Row]) -> str:
    times = {
        (row["op"], row["case"], row["shape"], row["candidate"]): row["median_us"] / 1e3
        for row in rows if row.get("median_us") is not None
    }

    def told(figure: Figure, candidate: str) -> str:
        found = times.get((*figure.place, figure.shape, candidate))
        return "not measured" if found is None else f"{found:.2f} ms"

    lines = [
        "| published | device | shape | its time | the same code here | r1kernels here | source |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for figure in FIGURES:
        lines.append(
            f"| {figure.who} | {figure.device} | {figure.shape} | {figure.milliseconds:g} ms "
            f"| {told(figure, figure.peer)} | {told(figure, OURS)} | {figure.source} |"
        )
    return "\n".join(lines)

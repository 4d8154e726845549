"""The blocks of measured numbers: which result file each one reads, and the table or the pictures that it shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import number_pictures

from r1kernels.bench import report
from r1kernels.bench.report import words
from r1kernels.bench.report.figures import Picture
from r1kernels.bench.report.tables import markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "pictures"
# The device that README and docs show. Other devices have a folder, too.
BENCH = RESULTS / "intel-r-xeon-r-processor-2-threads-avx512-bf16-fma" / "bench.json"
TWO_THREADS = RESULTS / "intel-r-xeon-r-processor-2-threads-amx-bf16"
PLANNED = RESULTS / "intel-r-xeon-r-processor-1-threads-avx512-bf16"
ONE_THREAD = RESULTS / "intel-r-xeon-r-processor-1-threads-amx-bf16"
RECIPES = RESULTS / "recipe"
SCALING = RESULTS / "scaling.json"


class Missing(Exception):
    """The result file of a block is not there."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} is missing")
        self.path = path


class Block(NamedTuple):
    """A table, the result files that it was made from, and pictures."""

    text: str
    files: list[Path]
    pictures: tuple[Picture, ...] = ()


@cache
def read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise Missing(path)
    return json.loads(path.read_text(encoding="utf-8"))


def source(path: Path) -> str:
    return report.source(read(path), path.relative_to(ROOT).as_posix())


def recipes() -> list[Path]:
    """The results of recipes, in order of name."""
    found = sorted(RECIPES.glob("*.json"))
    if not found:
        raise Missing(RECIPES / "demo_r1.json")
    return found


# ---- bench.json --------------------------------------------------------------------------------------------------

def bench_table(op: str, about: str, **where: str) -> Callable[[], Block]:
    def block() -> Block:
        table = report.table(read(BENCH), op, **where)
        return Block(f"{table}\n\n{about}", [BENCH])

    return block


def bench_pictures(draw: Callable[[dict[str, Any]], list[Picture | None]]) -> Callable[[], Block]:
    def block() -> Block:
        pictures = [picture for picture in draw(read(BENCH)) if picture]
        if not pictures:
            raise ValueError(f"{BENCH} has no rows for this block; measure with the default size")
        captions = "\n\n".join(dict.fromkeys(picture.caption for picture in pictures if picture.caption))
        return Block(captions, [BENCH], tuple(pictures))

    return block


def fidelity_table() -> Block:
    about = ("Median and largest error against float64; errors of gradients are divided by the largest entry of the "
             "gradient.")
    return Block(f"{report.fidelity_table(read(BENCH))}\n\n{about}", [BENCH])


CELLS = "Median time; ratio to r1kernels, the median over rounds; peak extra memory."


# ---- recipes -----------------------------------------------------------------------------------------------------

def recipe_table() -> Block:
    """A table for each result of a recipe that has stages."""
    found = [(path, read(path)) for path in recipes() if read(path).get("stages")]
    return Block("\n\n".join(stages(result) for _, result in found), [path for path, _ in found])


def stages(result: dict[str, Any]) -> str:
    def cell(stage: dict[str, Any], name: str) -> str:
        value, around = words.real(stage.get(name)), words.real(stage.get("plus_minus"))
        text = "" if value is None else f"{value:.1f}"
        return f"{text} ± {around:.1f}" if text and name == "pass_at_1" and around is not None else text

    rows = [("pass@1", "pass_at_1"), ("language consistency", "language_consistency")]
    about = words.listed([f"`{result['recipe']}`", f"seed {result['seed']}"])
    about += "; ± is one standard error of the mean"
    lines = [[label, *(cell(stage, name) for stage in result["stages"])] for label, name in rows
             if any(stage.get(name) is not None for stage in result["stages"])]
    return f"{markdown(['%', *(stage['label'] for stage in result['stages'])], lines)}\n\n{about}."


def recipe_picture() -> Block:
    found = [(path, read(path)) for path in recipes() if (read(path).get("curves") or {}).get("r1_zero")]
    picture = number_pictures.recipe([result for _, result in found])
    return Block("", [path for path, _ in found], (picture,))


# ---- results of single scripts -----------------------------------------------------------------------------------

def amx_table() -> Block:
    """The head on a processor with AMX."""
    paths = [TWO_THREADS / f"{op}.json" for op in ("linear_grpo_loss", "linear_cross_entropy")]
    rows = [row for path in paths for row in read(path)["results"]]
    columns = list(dict.fromkeys((row["op"], row["shape"]) for row in rows))
    cells = {(row["implementation"], row["op"], row["shape"]): words.listed([
        words.seconds(row["median_s"]), words.times(row["ratio"]), words.memory(row["peak_extra_bytes"])])
        for row in rows}
    lines = [[name, *(cells.get((name, *column), "") for column in columns)]
             for name in dict.fromkeys(row["implementation"] for row in rows)]
    table = markdown(["", *(f"`{op}`, {shape}" for op, shape in columns)], lines)
    return Block(f"{table}\n\nForward + backward in bfloat16. {CELLS}", paths)


def trl_step() -> Block:
    path = TWO_THREADS / "trl_step.json"
    rows = read(path)["results"]
    # Older results have no range.
    lines = [[row["implementation"], with_range(row["median_s"], row.get("range_s"), words.seconds),
              with_range(row["ratio"], row.get("range_of_ratios"), "{:.2f}".format),
              words.memory(row["peak_extra_bytes"])] for row in rows]
    table = markdown([rows[0]["shape"], "time", "of TRL's", "peak memory"], lines)
    spread = "with the least and the largest in brackets" if all("range_s" in row for row in rows) else (
        "whose spread was not recorded")
    about = (f"Medians over {rows[0]['rounds']} rounds, {spread}. A ratio is the median of the ratios of single "
             "rounds, not the quotient of two medians.")
    return Block(f"{table}\n\n{about}", [path])


def with_range(median: float, range_: list[float] | None, written: Callable[[float], str]) -> str:
    return written(median) + (f" ({' to '.join(map(written, range_))})" if range_ else "")


def student_topk() -> Block:
    path = TWO_THREADS / "student_topk.json"
    rows = read(path)["results"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    cells = {(row["implementation"], row["shape"]): words.listed([words.seconds(row["median_s"]),
                                                                  words.times(row["ratio"])]) for row in rows}
    lines = [[name, *(cells.get((name, shape), "") for shape in shapes)]
             for name in dict.fromkeys(row["implementation"] for row in rows)]
    about = f"Forward and backward in {rows[0]['dtype']}, K = {rows[0]['top_k']}; ratio to the log-prob."
    return Block(f"{markdown(['', *shapes], lines)}\n\n{about}", [path])


def sampling_replay() -> Block:
    path = ONE_THREAD / "sampling_replay.json"
    results = read(path)["results"]
    lines = []
    for result in results:
        for name in ("replay", "whole vocabulary"):
            before, after, first = (result[name][key] for key in ("before", "after one step", "first_ratio_deviation"))
            lines.append([f"{result['top_p']:g}", "the sets (replay)" if name == "replay" else name,
                          f"{before['mean_ratio']:.3f}", words.percent(before["outside_0.9_1.1"]), f"{first:.2g}",
                          f"{after['mean_ratio']:.3f}", words.percent(after["outside_0.9_1.1"])])
    table = markdown(["top_p", "policy over", "mean ratio", "outside (0.9, 1.1)", "first ratio of the update - 1",
                      "after one step: mean", "outside"], lines)
    sizes = "; ".join(f"top_p {result['top_p']:g}: {words.whole(result['tokens'])} tokens, {result['mean_set']:.0f} "
                      f"ids a set, at most {words.whole(result['largest_set'])}" for result in results)
    return Block(f"{table}\n\n{sizes}.", [path], (number_pictures.sampling_replay(results),))


def plan_memory() -> Block:
    path = PLANNED / "plan_memory.json"
    rows = read(path)["results"]
    cells = {(row["case"], row["phase"]): [words.memory(row["measured_bytes"]),
                                           f"{row['planned_bytes'] / row['measured_bytes']:.2f}"] for row in rows}
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    lines = [[case, *(cell for phase in phases for cell in cells.get((case, phase), ["", ""]))]
             for case in dict.fromkeys(row["case"] for row in rows)]
    head = [cell for phase in phases for cell in (f"{phase}: measured", "plan / measured")]
    return Block(markdown([rows[0]["model"], *head], lines), [path])


SCALING_COLUMNS = ("devices", "tensor ranks", "completions", "state GB", "step s", "sampling s", "compute s", "data s",
                   "tensor s", "data GB", "tensor GB", "tokens/s a device")


def scaling_costs(device: str = "H100") -> Block:
    lines = []
    for row in (row for row in read(SCALING)["rows"] if row["device"] == device):
        cells = [f"{row[name]:.3g}" if isinstance(row[name], float) and row[name] < 1000 else f"{row[name]:.0f}"
                 for name in SCALING_COLUMNS]
        cells[3] += "" if row["fits"] else " (too much)"
        lines.append([row["model"], *cells])
    about = f"Computed by `benchmarks/scaling.py`, not measured: `{SCALING.relative_to(ROOT)}`, {device}."
    return Block(f"{markdown(['model', *SCALING_COLUMNS], lines)}\n\n{about}", [])


def gpu_instructions(arch: str = "sm_90") -> Block:
    """Instructions of the inner loops that a policy loss runs, for bfloat16 logits of whole vectors."""
    triton = {path.stem.removeprefix("triton-"): path for path in sorted((RESULTS / "aot").glob("triton-*.json"))}
    ptxas = RESULTS / "ptxas.json"
    cuda = read(ptxas)["loops"]
    gradient = cuda["token_stats_backward.cu gradient_kernel<BFloat16, BFloat16, true>"]
    sums, _, with_entropy, policy = cuda["grpo_step.cu step_kernel<BFloat16>"]
    found = {f"{label}, Triton {version}": least_instructions(read(path), kernel, arch) for label, kernel in (
        ("statistics", "token_stats_kernels.segment_kernel"),
        ("gradient of a policy loss", "token_stats_backward.gradient_kernel")) for version, path in triton.items()}
    found |= {
        "statistics, CUDA": min(cuda["token_stats.cu segment_kernel<BFloat16, true>"]),
        "gradient of a policy loss, CUDA": min(gradient),
        "fused step, CUDA": sums + policy,
        "fused step, CUDA, with entropy in the loss": sums + with_entropy,
    }
    table = markdown([f"bfloat16, {arch}", "instructions per entry"], [[what, f"{n:.1f}"] for what, n in found.items()])
    return Block(f"{table}\n\nCounted in the machine code.", [*triton.values(), ptxas])


def least_instructions(result: dict[str, Any], kernel: str, arch: str) -> float:
    """Of the shortest loop of a Triton kernel that reads and writes bfloat16."""
    return min(count for row in result["rows"] for count in row["loops"]
               if row["kernel"] == kernel and row["arch"] == arch and "logits=*bf16" in row["variant"])


BLOCKS: dict[str, Callable[[], Block]] = {
    "head-table": bench_table("linear_grpo_loss", f"Forward + backward. {CELLS}", series="vocabulary"),
    "token-stats-table": bench_table("token_logprobs_and_entropy", CELLS),
    "cross-entropy-table": bench_table("linear_cross_entropy", CELLS, variant=""),
    "distillation-table": bench_table("distillation_loss", CELLS),
    "fidelity-table": fidelity_table,
    "head-picture": bench_pictures(lambda results: [report.head(results)]),
    "tokens-pictures": bench_pictures(lambda results: [
        picture for picture in report.growth(results) if "-tokens-" in picture.name]),
    "active-picture": bench_pictures(report.active),
    "roofline-picture": bench_pictures(lambda results: [report.roofline(results)]),
    "hidden-picture": bench_pictures(lambda results: [report.shares(results, "hidden")]),
    "logits-picture": bench_pictures(lambda results: [report.shares(results, "logits")]),
    "tokens-picture": bench_pictures(lambda results: [report.shares(results, "tokens")]),
    "errors-pictures": bench_pictures(report.errors),
    "recipe-table": recipe_table, "recipe-picture": recipe_picture, "trl-step": trl_step, "student-topk": student_topk,
    "plan-memory": plan_memory, "sampling-replay": sampling_replay, "scaling-costs": scaling_costs,
    "amx-table": amx_table, "gpu-instructions": gpu_instructions,
}

"""The page of a measurement: one HTML file that needs no other file and no server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from r1kernels.bench.report import ceilings, curves, tables, words
from r1kernels.bench.report.figures import Picture
from r1kernels.bench.report.rows import check

SECTIONS = (
    ("Time and memory", "Median time and peak extra memory of the loss head, on logarithmic axes. Lower is better."),
    ("Cost against active tokens", "Tokens whose gradient is exactly 0 need no backward products. The dashed line is "
     "what three products would cost without any other work."),
    ("Ceilings", "How near each implementation comes to the speed of a copy, or of bare matrix products, that was "
     "measured on this device. 100 % means that nothing but the necessary reads, writes and products takes time."),
    ("Errors against float64", "Absolute errors; those of gradients are divided by the largest entry of the gradient. "
     "Each row goes from the median to the largest error."),
)


def write_html(results: dict[str, Any], path: str | Path) -> None:
    """Writes the page of the results of `r1kernels bench`.

    Args:
        results: the JSON document, format 1. Sections may be missing or empty.
        path: the file to write. It is complete or not there: the page is written under another name, then renamed.

    Raises:
        ValueError: if `results` is not a document of format 1.
        OSError: if the file cannot be written.
    """
    check(results)
    path = Path(path)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    pictures = (curves.growth(results), curves.active(results), _ceilings(results), ceilings.errors(results))
    sections = [{"title": title, "about": about, "figures": [_figure(picture) for picture in found]}
                for (title, about), found in zip(SECTIONS, pictures, strict=True) if found]
    page = environment.get_template("page.html.jinja").render(
        facts=facts(results), sections=sections, operations=tables.operation_cells(results),
        fidelity=tables.fidelity_cells(results), fidelity_columns=tables.FIDELITY,
        left_out=[item for item in results.get("left_out") or [] if isinstance(item, dict)])
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(page, encoding="utf-8", errors="replace")
    os.replace(partial, path)


def _ceilings(results: dict[str, Any]) -> list[Picture]:
    found = [*(ceilings.shares(results, family) for family in ceilings.FAMILIES), ceilings.roofline(results)]
    return [picture for picture in found if picture]


def _figure(picture: Picture) -> dict[str, Any]:
    # The SVG is ours: matplotlib escapes the texts in it.
    return {"title": picture.title, "caption": picture.caption, "svg": Markup(picture.svg())}


def facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    """What identifies a measurement, in the order in which a reader asks."""
    found = results.get("ceilings") or {}
    products = [f"{words.rate(speed, 'FLOP/s')} in {dtype}"
                for dtype, speed in (found.get("gemm_flops_per_s") or {}).items() if words.positive(speed)]
    peers = [f"{package} {version}" for package, version in (results.get("peers") or {}).items()]
    lines = [
        ("Device", words.listed([str(results.get("device") or ""), str(results.get("instruction_set") or ""),
                                 words.memory(results.get("memory_bytes"))])),
        ("Threads", words.whole(results["threads"]) if results.get("threads") else ""),
        ("Date", results.get("date")),
        ("Versions", words.listed(f"{name} {results[name]}" for name in ("r1kernels", "torch", "python")
                                  if results.get(name))),
        ("Other libraries", words.listed(peers)),
        ("Sources", words.listed([str(results.get("sources") or ""),
                                  f"commit {results['commit']}" if results.get("commit") else ""])),
        ("Measured ceilings", words.listed([
            f"copy {words.rate(found.get('copy_bytes_per_s'), 'B/s')}" if found.get("copy_bytes_per_s") else "",
            f"products {' and '.join(products)}" if products else ""])),
        ("Run", words.listed([f"size {results['size']}" if results.get("size") else "",
                              words.seconds(results.get("seconds"))])),
    ]
    return [(name, str(text)) for name, text in lines if text]

"""report.html: one page that needs nothing but itself. It holds no script, and its policy would let none run.

Everything from the run is escaped: models write what they like.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence

from r1kernels.train import curves, tables
from r1kernels.train.columns import duration
from r1kernels.train.record import MODEL_WORK, UNKNOWN, Line, RunRecord, StageRecord
from r1kernels.train.tables import Table

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --tint: #f6f7f8;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
LIGHT }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --tint: #1e2125; --ink: #dfe2e6; --faint: #8d949d;
  --rule: #363b42; --c1: #7fabdf; --c2: #e39a68; --c3: #7fc09a; --c4: #b99ad6; --c5: #cfb964; } }
@media print { :root { --paper: #fff; --tint: #fff; LIGHT } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 64rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 var(--sans); font-variant-numeric: tabular-nums lining-nums; }
h1 { font-size: 1.7rem; font-weight: 600; letter-spacing: -.01em; margin: 0; }
h2 { font-size: 1.15rem; font-weight: 600; margin: 2.8rem 0 .6rem; padding-top: .7rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: .95rem; font-weight: 600; margin: 1.5rem 0 .4rem; }
p { margin: .4rem 0; max-width: 46rem; }
a { color: inherit; text-decoration-color: var(--rule); text-underline-offset: .2em; }
nav { margin-top: .8rem; font-size: .87rem; } nav a { margin-right: 1em; white-space: nowrap; }
.note, .meta, figcaption { color: var(--faint); font-size: .87rem; }
.missing { border-left: 3px solid var(--c2); padding: .1rem 0 .1rem .9rem; margin: 1.2rem 0; }
.missing ul { margin: .2rem 0; padding-left: 1.1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; margin: .5rem 0; border-top: 1.5px solid var(--ink);
  border-bottom: 1.5px solid var(--ink); }
th, td { padding: .28rem .75rem; text-align: right; vertical-align: baseline; white-space: nowrap; }
th { font-weight: 500; border-bottom: 1px solid var(--rule); vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; padding-left: .1rem; } td.w, th.w { text-align: left; }
td.empty { color: var(--faint); } tr.sum td { border-top: 1px solid var(--rule); }
figure { margin: 1rem 0; break-inside: avoid; } svg { display: block; width: 100%; height: auto; overflow: visible; }
figure.one { max-width: 46rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1.1rem 1.6rem;
  margin: 1rem 0; }
.panels figure { margin: 0; } .panels figcaption { color: var(--ink); font-weight: 500; font-size: .83rem; }
.legend i { font-style: normal; font-weight: 400; margin-left: .5em; }
.bars { display: grid; grid-template-columns: max-content max-content minmax(6rem, 20rem); gap: .15rem .9rem;
  align-items: center; font-size: .87rem; } .bars b { font-weight: 400; text-align: right; }
.bar { display: flex; height: .7rem; background: var(--tint); print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
.bar i { display: block; height: 100%; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: .2rem 1.2rem;
  margin: .3rem 0 1.1rem; break-inside: avoid; }
.question { margin-top: .9rem; font-weight: 500; max-width: none; unicode-bidi: isolate; overflow-wrap: anywhere; }
pre { margin: .15rem 0; padding: .6rem .75rem; background: var(--tint); font: 12.5px/1.45 var(--mono);
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; max-height: 24rem; overflow: auto; }
.right { color: var(--c3); } .wrong { color: var(--c2); }
summary { cursor: pointer; }
@page { margin: 16mm 14mm; }
@media print { body { padding: 0; max-width: none; font-size: 10pt; } nav { display: none; } pre { max-height: none;
  border: 1px solid var(--rule); } h2, h3 { break-after: avoid; } table { break-inside: avoid; }
  details::details-content { content-visibility: visible; height: auto; } .wide { overflow: visible; }
  th, td { padding: .2rem .4rem; } }
""".replace("LIGHT", " ".join(f"--{name}: {colour};" for name, colour in curves.PALETTE.items()))


def escape(text: object) -> str:
    return html.escape(tables.visible(str(text)))


def to_html(run: RunRecord) -> str:
    stages = [stage for stage in run.stages.values() if stage.entry]
    links = [("results", "Results"), *((f"stage-{stage.name}", stage.name) for stage in stages), ("time", "Time"),
             ("provenance", "Provenance")]
    body = [
        f"<header><h1>{escape(run.name)}</h1><p class='meta'>{escape(tables.progress(run).capitalize())}.</p>",
        "<nav>" + " ".join(f"<a href='#{escape(key)}'>{escape(text)}</a>" for key, text in links) + "</nav></header>",
        *_missing(run),
        *_results(run),
        *(part for stage in stages for part in _stage(run, stage)),
        *_times(run),
        *_provenance(run),
    ]
    return (
        f"<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>{escape(run.name)}</title>"
        f"<meta http-equiv='Content-Security-Policy' content=\"{_POLICY}\">"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _missing(run: RunRecord) -> Iterator[str]:
    if run.missing:
        yield "<section class='missing'><b>Missing</b><ul>"
        yield from (f"<li>{escape(item)}</li>" for item in run.missing)
        yield "</ul></section>"


def _results(run: RunRecord) -> Iterator[str]:
    yield "<h2 id='results'>Results</h2>"
    for table in tables.results(run):
        yield from _table(table)
    accuracy = curves.accuracy_figure(run)
    if accuracy:
        yield _figure(accuracy, "pass@1 and cons@k of the model that each stage left; a colour is a family of models.")
    families = list(run.rl_families())
    for stages in families:
        if len(stages) == 1 < len(families):
            continue
        yield _figure(curves.chain_figure(stages), f"RL from {run.root(stages[0])}: {_list(stages)}, laid end to end.")
    yield from _table(tables.overview(run))


def _stage(run: RunRecord, stage: StageRecord) -> Iterator[str]:
    yield f"<h2 id='stage-{escape(stage.name)}'>{escape(stage.name)}</h2>"
    meta = [stage.kind, f"from {stage.parent}" if stage.parent else "", stage.status,
            f"{len(stage.steps)} logged steps" if stage.steps else "",
            duration(sum(stage.seconds.values())) if stage.seconds else "",
            *(f"{name} {value}" for name, value in tables.facts(stage))]
    yield f"<p class='meta'>{' · '.join(escape(item) for item in meta if item)}</p>"
    for title, values in tables.counts(stage):
        yield f"<h3>{escape(title.capitalize())}</h3>"
        yield _bars(values)
    panels = curves.stage_panels(stage)
    if panels:
        many = len(stage.steps) >= curves.MANY
        yield "<div class='panels'>"
        for title, legend, svg in panels:
            names = "".join(f"<i style='color:var(--{colour})'>{escape(label)}</i> " for label, colour in legend)
            yield f"<figure><figcaption>{escape(title)} <span class='legend'>{names}</span></figcaption>{svg}</figure>"
        yield "</div>"
        if many:
            yield "<p class='note'>Lines are running means; the steps themselves are behind.</p>"
    examples = run.examples(stage)
    if examples:
        yield "<h3>Completions</h3>"
    for before, after in examples:
        yield (f"<p class='question'>{escape(after['question'])} <span class='note'>answer {escape(after['answer'])}"
               "</span></p><div class='pair'>")
        yield from (_completion(when, example) for when, example in (("before", before), ("after", after)) if example)
        yield "</div>"


def _completion(when: str, example: Line) -> str:
    verdict = tables.verdict(example)
    return (
        f"<div><span class='note'>{when}, <span class='{verdict.replace(' ', '-')}'>{verdict}</span></span>"
        f"<pre>{escape(tables.shortened(example['completion']))}</pre></div>"
    )


def _times(run: RunRecord) -> Iterator[str]:
    table = tables.times(run)
    yield "<h2 id='time'>Time and trouble</h2>"
    yield from _table(table)
    stages = [stage for stage in run.stages.values() if stage.seconds]
    longest = max((sum(stage.seconds.values()) for stage in stages), default=0)
    if longest:
        yield "<div class='bars'>"
        for stage in stages:
            total = sum(stage.seconds.values())
            work = sum(value for name, value in stage.seconds.items() if name in MODEL_WORK)
            unknown = stage.seconds.get(UNKNOWN, 0.0)
            widths = ((work, "c1"), (total - work - unknown, "c2"), (unknown, "faint"))
            yield (f"<span>{escape(stage.name)}</span><b>{duration(total)}</b><span class='bar'>" + "".join(
                f"<i style='width:{100 * value / longest:.2f}%;background:var(--{colour})'></i>"
                for value, colour in widths) + "</span>")
        yield "</div><p class='note'>Blue: the model's work. Orange: glue. Grey: not broken down.</p>"
    yield from _table(tables.troubles(run))


def _provenance(run: RunRecord) -> Iterator[str]:
    yield "<h2 id='provenance'>Provenance</h2>"
    yield from _table(tables.hashes(run))
    yield f"<details><summary><b>Settings</b></summary><pre>{escape(run.config_text.strip())}</pre></details>"
    yield f"<h3>Versions</h3><p class='note'>{escape(tables.versions())}</p>"


def _table(table: Table) -> Iterator[str]:
    yield f"<h3>{escape(table.title)}</h3>"
    if table.rows:
        yield f"<div class='wide'><table><thead><tr>{_cells('th', table.columns, table.words)}</tr></thead><tbody>"
        for row in table.rows:
            yield f"<tr{' class=sum' if row[0] == 'all' else ''}>{_cells('td', row, table.words)}</tr>"
        yield "</tbody></table></div>"
    if table.note:
        yield f"<p class='note'>{escape(table.note)}</p>"


def _cells(tag: str, cells: Iterable[str], words: int) -> str:
    def cell(index: int, text: str) -> str:
        names = [name for name, holds in (("w", index < words), ("empty", text == tables.NONE)) if holds]
        return f"<{tag} class='{' '.join(names)}'>{escape(text)}</{tag}>"

    return "".join(cell(index, text) for index, text in enumerate(cells))


def _bars(values: dict[str, float]) -> str:
    most = max(*values.values(), 1)
    return "<div class='bars'>" + "".join(
        f"<span>{escape(name.replace('_', ' '))}</span><b>{value:g}</b>"
        f"<span class='bar'><i style='width:{100 * max(0, value) / most:.2f}%;background:var(--c1)'></i></span>"
        for name, value in values.items()
    ) + "</div>"


def _figure(svg: str, caption: str) -> str:
    return f"<figure class='one'>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _list(stages: Sequence[StageRecord]) -> str:
    return ", ".join(stage.name for stage in stages)

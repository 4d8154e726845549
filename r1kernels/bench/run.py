"""Goes through the cases, prints rows as they come, and writes the document after each case."""

from __future__ import annotations

import datetime
import gc
import itertools
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from r1kernels import _origin
from r1kernels.bench import ceilings, fidelity, machine, table
from r1kernels.bench.cases import CASES
from r1kernels.bench.clock import Clock, clock_of
from r1kernels.bench.engine import Engine
from r1kernels.bench.peers import one_line
from r1kernels.bench.results import FILE, PAGE, Results, write_json
from r1kernels.bench.tasks import Setting

FIDELITY = "fidelity"
NAMES = (*CASES, FIDELITY)
INTERRUPTED = 130


class Options(NamedTuple):
    """`only`: names of cases, or () for all. `seconds`: after this long, no other task begins; None: no limit."""

    out: Path
    only: Sequence[str] = ()
    seconds: float | None = None
    save_results: bool = False


class Run:
    """One run of the command."""

    def __init__(self, setting: Setting, options: Options) -> None:
        self.setting: Setting = setting
        self.options: Options = options
        self.started: float = time.monotonic()
        self.results: Results = Results(setting.device, setting.size)
        self.clock: Clock = clock_of(setting.device)
        deadline = None if options.seconds is None else self.started + options.seconds
        self.engine: Engine = Engine(setting, self.clock, self.results, deadline)
        self.status: int = 0
        self.saved: bool = False

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def out_of_time(self, what: str) -> bool:
        limit = self.options.seconds
        if limit is None or self.seconds() < limit:
            return False
        self.results.leave_out(what, f"--seconds {limit:g} were used up")
        return True

    def go(self) -> int:
        """Measures everything; the exit status is 1 if this library failed, and 130 after an interrupt."""
        about = self.results.about
        isa = f", {about['instruction_set']}" if about["instruction_set"] else ""
        say(f"r1kernels {about['r1kernels']}, torch {about['torch']}, {about['device']}{isa}, size {about['size']}")
        if self.setting.device.type == "cpu":
            self.results.leave_out("GPU", "this run measures the CPU; --device cuda measures a GPU")
        if self.clock.no_memory:
            self.results.leave_out("peak memory", self.clock.no_memory)
        before = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        current = "ceilings"
        names = [name for name in NAMES if name in (self.options.only or NAMES)]
        done: list[str] = []
        try:
            self.measure_ceilings()
            for current in names:
                if not self.out_of_time(current):
                    self.fidelity() if current == FIDELITY else self.case(current)
                    self.save()
                done.append(current)
        except KeyboardInterrupt:
            for name in names:
                if name not in done:
                    self.results.leave_out(name, "interrupted" if name == current else "interrupted before it began")
            self.status = INTERRUPTED
        finally:
            gc.unfreeze()
            signal.signal(signal.SIGTERM, before)
        self.finish()
        return self.status or int(self.engine.trouble)

    def measure_ceilings(self) -> None:
        try:
            self.results.ceilings = ceilings.measure(self.setting, self.clock)
        except (MemoryError, RuntimeError) as error:
            self.results.leave_out("ceilings", one_line(error))
        else:
            say(ceilings.text(self.results.ceilings))

    def case(self, name: str) -> None:
        for task in CASES[name](self.setting):
            if self.out_of_time(f"{task.title} and what follows in this case"):
                break
            # Each measurement of memory begins with a collection, which need not visit what imports have made.
            gc.collect()
            gc.freeze()
            rows = self.engine.measure(task)
            self.results.rows += rows
            if rows:
                say(table.of_rows(task.title, rows))

    def fidelity(self) -> None:
        for name, make, needed in fidelity.quantities(self.setting):
            what = f"fidelity, {name}"
            if self.out_of_time(what) or not self.engine.enough_memory(what, needed, ""):
                continue
            rows = self.errors_of(name, make)
            self.results.fidelity += rows
            if rows:
                say(table.of_errors(name, rows))

    def errors_of(self, name: str, make: Any) -> list[dict[str, Any]]:
        try:
            return list(fidelity.measure(make(), self.engine))
        except (MemoryError, RuntimeError) as error:
            self.results.leave_out(f"fidelity, {name}", one_line(error))
            return []

    # ---- results --------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any] | None:
        """Writes the document and returns it. Earlier results are renamed first; a run that measured nothing leaves
        them alone and returns None."""
        path = self.options.out / FILE
        if not self.saved and path.exists():
            if not self.results.rows and not self.results.fidelity:
                return None
            keep_earlier(self.options.out)
        self.saved = True
        document = self.results.document(self.seconds())
        write_json(document, path)
        return document

    def finish(self) -> None:
        paths = [self.options.out / FILE]
        if (document := self.save()) is None:
            say(table.of_left_out(self.results.left_out()))
            say(f"\nnothing was measured; {paths[0]} has earlier results and is unchanged")
            return
        if (why := write_page(document, self.options.out / PAGE)) is None:
            paths.append(self.options.out / PAGE)
        else:
            self.results.leave_out("the page of pictures", why)
            document = self.save() or document
        if self.options.save_results and not self.status and not self.engine.trouble:
            paths.append(results_path(self.results))
            write_json(document, paths[-1])
        say(table.of_left_out(self.results.left_out()))
        say(f"\n{len(self.results.rows)} times and {len(self.results.fidelity)} distributions of errors in "
            f"{self.seconds():.0f} s, written to {', '.join(map(str, paths))}")
        if self.engine.trouble:
            say("r1kernels itself failed in a case: see what was left out")


def results_path(results: Results) -> Path:
    about = results.about
    folder = machine.folder_name(about["device"], about["instruction_set"])
    return _origin.ROOT / "benchmarks" / "results" / folder / FILE


def keep_earlier(folder: Path) -> None:
    """Renames earlier results by the time when they were written."""
    written = datetime.datetime.fromtimestamp((folder / FILE).stat().st_mtime).strftime("%Y-%m-%d-%H%M%S")
    names = (f"bench-{written}-{number}" if number > 1 else f"bench-{written}" for number in itertools.count(1))
    free = next(name for name in names if not (folder / f"{name}.json").exists())
    for name in (FILE, PAGE):
        path = folder / name
        if path.exists():
            path.rename(folder / f"{free}{path.suffix}")


def write_page(document: dict[str, Any], path: Path) -> str | None:
    """Writes the page; returns why there is none."""
    try:
        from r1kernels.bench.report import write_html
    except ImportError as error:
        return f"{error}; install matplotlib and jinja2 (in a clone of the repository: pip install '.[bench]')"
    try:
        write_html(document, path)
    except Exception as error:  # the numbers must not be lost with a picture
        return one_line(error)
    return None


def say(text: str) -> None:
    print(text, flush=True)

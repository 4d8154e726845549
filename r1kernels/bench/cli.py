"""The arguments of `r1kernels bench`. torch is imported after they are checked, so that `--help` does not wait."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path

DESCRIPTION = """Measures every public operation on this machine beside plain torch, torch.compile and the other
libraries that are installed: time, peak memory, and errors against float64. Each result is checked before it is timed.
Writes bench.json and, where matplotlib and jinja2 are installed, bench.html with pictures."""


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
    return value


def threads(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser("r1kernels bench", description=DESCRIPTION)
    found.add_argument("--out", type=Path, default=Path("r1kernels-bench"), metavar="DIR",
                       help="folder for the results; earlier ones in it are renamed (default: %(default)s)")
    found.add_argument("--device", choices=("cpu", "cuda"), help="what is measured (default: cuda where there is one)")
    found.add_argument("--size", choices=("small", "default", "large"), default="default",
                       help="small: about a minute, to see that everything works; default: about 11 minutes on two CPU "
                            "cores; large: for GPUs of 80 GB and more (default: %(default)s)")
    found.add_argument("--only", nargs="+", default=(), metavar="CASE",
                       help="measure these cases only: names of operations, or fidelity")
    found.add_argument("--seconds", type=positive, metavar="N",
                       help="begin nothing after N seconds, and list what was left out")
    found.add_argument("--threads", type=threads, metavar="N", help="threads of a CPU (default: torch's choice)")
    found.add_argument("--save-results", action="store_true",
                       help="in a source tree, of a whole run: also write benchmarks/results/<device>/bench.json")
    return found


def check_out(folder: Path) -> str:
    """Why results cannot be written to a folder, or "". It is created."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"expected a folder that can be written: {error.strerror or error}"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    reader = parser()
    given = reader.parse_args(arguments)
    if given.save_results:
        part = {"--only": given.only, "--seconds": given.seconds, "--size small": given.size == "small"}
        if left := [name for name, value in part.items() if value]:
            reader.error("argument --save-results: a run is saved if it is whole and not of the small size; leave out "
                         f"{' and '.join(left)}, or --save-results")
    import torch

    from r1kernels import _origin
    from r1kernels.bench import run
    from r1kernels.bench.tasks import Setting

    for name in given.only:
        if name not in run.NAMES:
            reader.error(f"argument --only: {name!r}: expected some of {', '.join(run.NAMES)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        reader.error("argument --device: 'cuda': torch finds no CUDA device; expected one, or --device cpu")
    if given.save_results and not _origin.in_source_tree():
        reader.error("argument --save-results: results are saved in a source tree only; use --out")
    if why := check_out(given.out):
        reader.error(f"argument --out: {str(given.out)!r}: {why}")
    if given.threads:
        torch.set_num_threads(given.threads)
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    setting = Setting(device, given.size, compiled=given.size != "small")
    options = run.Options(given.out, given.only, given.seconds, given.save_results)
    return run.Run(setting, options).go()


if __name__ == "__main__":
    sys.exit(main())

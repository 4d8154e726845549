"""The command `r1kernels`. It imports what the chosen subcommand needs, and nothing else: `--help` does not wait."""

from __future__ import annotations

import importlib.util
import sys

HELP = """usage: r1kernels COMMAND ...

commands:
  train RECIPE   run the stages of a recipe, such as recipes/demo.yaml
  plan RECIPE    show the memory that each stage of a recipe needs on a device
  bench          measure every operation on this machine, beside other libraries

`r1kernels COMMAND --help` lists the arguments of a command. `python -m r1kernels` shows versions, devices and which
implementation serves each operation.
"""
TRAINER = ("tyro", "pydantic", "yaml", "rich", "filelock", "transformers", "safetensors", "mpmath")


def main(arguments: list[str] | None = None) -> None:
    """Runs a subcommand and exits with its status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(HELP, end="")
        sys.exit(0)
    if command == "bench":
        from r1kernels.bench.cli import main as bench

        try:
            sys.exit(bench(arguments[1:]))
        except KeyboardInterrupt:  # before anything was measured
            sys.exit(130)
    if command not in ("train", "plan"):
        print(f"r1kernels: unknown command {command!r}, expected train, plan or bench", file=sys.stderr)
        sys.exit(2)
    missing = [name for name in TRAINER if importlib.util.find_spec(name) is None]
    if missing:
        print(f"r1kernels {command}: these packages are not installed: {', '.join(missing)}. "
              "Install them; in a clone of the repository: pip install '.[train]'", file=sys.stderr)
        sys.exit(2)
    from r1kernels.train.cli import main as trainer

    trainer(arguments)

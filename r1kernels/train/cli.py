"""The command `r1kernels`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

app = tyro.extras.SubcommandApp()


@app.command
def train(
    recipe: Positional[Path],
    *,
    overrides: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUE ...")] = (),
    resume: bool = False,
    overwrite: bool = False,
    plain: bool = False,
) -> int:
    """Trains as a recipe says.

    Args:
        recipe: a YAML file, such as recipes/demo.yaml; the config.yaml of a run means that run, wherever it lies.
        overrides: settings to change, such as grpo.steps=10.
        resume: go on with the run that the run directory holds.
        overwrite: delete the run that the run directory holds.
        plain: lines instead of a live table.
    """
    from r1kernels.train.run import train as train_run
    from r1kernels.train.rundir import run_config

    return train_run(run_config(recipe, overrides), resume=resume, overwrite=overwrite, plain=plain)


@app.command(name="eval")
def evaluate(
    path: Positional[Path],
    *,
    overrides: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUE ...")] = (),
) -> int:
    """Prints pass@1, with its standard error, of a run or of one of its checkpoints.

    Args:
        path: a run directory, or a checkpoint in one.
        overrides: settings to change, such as eval.samples=64.
    """
    from r1kernels.train.run import evaluate as evaluate_run

    return evaluate_run(path, overrides)


@app.command
def report(path: Positional[Path]) -> int:
    """Draws the curves and writes the report of a run again.

    Args:
        path: a run directory.
    """
    from r1kernels.train.report import write_report

    print(*write_report(path), sep="\n")
    return 0


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; settings and data that cannot be used end it with a message."""
    try:
        sys.exit(app.cli(args=arguments))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, _expected_errors()):
            raise
        sys.exit(f"r1kernels: {error}")


def _expected_errors() -> tuple[type[Exception], ...]:
    """What needs no traceback. Imported late: `--help` should not wait for torch."""
    from r1kernels.train.checkpoint import CheckpointError
    from r1kernels.train.data import DataError
    from r1kernels.train.grpo import TrainingError
    from r1kernels.train.rewards import WorkerError
    from r1kernels.train.schema import ConfigError

    return CheckpointError, ConfigError, DataError, TrainingError, WorkerError

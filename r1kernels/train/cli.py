"""The command `r1kernels`."""

from __future__ import annotations

import os
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
    start: Annotated[str | None, tyro.conf.arg(name="from", metavar="STAGE")] = None,
    dry_run: bool = False,
    overwrite: bool = False,
    trust_code: bool = False,
    plain: bool = False,
) -> int:
    """Runs the stages of a recipe. What its run directory holds already is continued, and what is finished is kept.

    Args:
        recipe: a YAML file, such as recipes/demo.yaml; the config.yaml of a run means that run, wherever it lies.
        overrides: settings to change, such as stages.r1_zero.steps=10.
        start: run this stage again, and all that depend on it.
        dry_run: say which stages would run, and why; do nothing.
        overwrite: delete the run that the run directory holds.
        trust_code: keep what is finished although the code or a library has changed since.
        plain: lines instead of a live table.
    """
    from r1kernels.train.run import train as train_run
    from r1kernels.train.rundir import run_recipe

    return train_run(
        run_recipe(recipe, overrides), start=start, dry_run=dry_run, overwrite=overwrite, trust_code=trust_code,
        plain=plain,
    )


@app.command(name="eval")
def evaluate(
    path: Positional[Path],
    *,
    overrides: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUE ...")] = (),
) -> int:
    """Prints pass@1 and cons@k, with standard errors, of a model of a run.

    Args:
        path: a stage (RUN/STAGE), a checkpoint of one, or a run, which means its last stage with a model.
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


@app.command
def watch(path: Positional[Path], *, once: bool = False) -> int:
    """Follows a run from another terminal, until it ends.

    Args:
        path: a run directory.
        once: show how it stands, and end.
    """
    from r1kernels.train.watch import watch as watch_run

    return watch_run(path, once=once)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; settings and data that cannot be used end it with a message."""
    try:
        sys.exit(app.cli(args=arguments))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # who read the output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if not isinstance(error, _expected_errors()):
            raise
        sys.exit(f"r1kernels: {error}")


def _expected_errors() -> tuple[type[Exception], ...]:
    """What needs no traceback. Imported late: `--help` should not wait for torch."""
    from r1kernels.train.checkpoint import CheckpointError
    from r1kernels.train.data import DataError
    from r1kernels.train.interrupt import TrainingError
    from r1kernels.train.rewards import WorkerError
    from r1kernels.train.rewards.sandbox import SandboxError
    from r1kernels.train.schema import ConfigError
    from r1kernels.train.vllm import VLLMError

    return (
        CheckpointError, ConfigError, DataError, FloatingPointError, SandboxError, TrainingError, VLLMError, WorkerError
    )

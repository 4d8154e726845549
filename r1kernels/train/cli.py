"""The command `r1kernels`. Its modules are imported late, so that `--help` does not wait for torch."""

from __future__ import annotations

import errno
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

INTERRUPTED = 130
app = tyro.extras.SubcommandApp()
Overrides = Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUE ...")]


@app.command
def train(
    recipe: Positional[Path], *, overrides: Overrides = (),
    start: Annotated[str | None, tyro.conf.arg(name="from", metavar="STAGE")] = None,
    dry_run: bool = False, plain: bool = False,
) -> int:
    """Runs the stages of a recipe. Finished stages are kept, and an interrupted one continues.

    Args:
        recipe: a YAML file, such as recipes/demo.yaml, or the config.yaml of a run.
        overrides: settings to change, such as stages.r1_zero.steps=10.
        start: run this stage again, and all stages that depend on it.
        dry_run: print which stages would run, and why, and exit.
        plain: print lines instead of a live table.
    """
    import torch
    from transformers.utils import logging

    from r1kernels.train import chain, errors, log, recipe_file, report, stage

    started, console, status = time.monotonic(), log.Console(plain), 0
    settings = recipe_file.load_recipe(recipe, overrides)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # it would break the table
    stage.check_recipe(settings, console)
    if dry_run:
        for name, (action, why) in chain.Chain(settings, start=start).plan().items():
            console.say(f"{action:9}{name} ({settings.stages[name].kind}): {why}")
        return 0
    with chain.claim(settings), errors.Interrupt() as stop, console:
        try:
            chain.Chain(settings, start=start).run(console, stop)
            console.say(f"finished in {time.monotonic() - started:.0f} s")
        except errors.Interrupted as signal:
            console.say(f"stopped by {signal}; run {Path(settings.run_dir, chain.CONFIG)} to continue")
            status = INTERRUPTED
        finally:
            report.write_report(settings.run_dir)
            console.say(f"wrote {Path(settings.run_dir, 'report.html')}, and its figures in curves/")
    return status


def main(arguments: list[str] | None = None) -> None:
    """Runs the command. Expected errors end it with a message and no traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments.count("--set") > 1:  # the last one would win silently
        sys.exit("r1kernels: --set is given twice; give it once, with all its KEY=VALUE pairs")
    try:
        sys.exit(app.cli(args=arguments))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        from r1kernels.rewards import EndpointError
        from r1kernels.rewards.sandbox import SandboxError
        from r1kernels.train.errors import RunError
        from r1kernels.train.log import printable

        expected = isinstance(error, RunError | SandboxError | EndpointError | FloatingPointError)
        if expected or (isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC)):
            sys.exit(f"r1kernels: {printable(str(error))}")
        raise

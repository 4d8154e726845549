"""The command `r1kernels`. What it needs is imported late, so that `--help` does not wait for torch."""

from __future__ import annotations

import errno
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

INTERRUPTED = 130
app = tyro.extras.SubcommandApp()
Overrides = Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUE ...")]


@app.command
def train(
    recipe: Positional[Path],
    *,
    overrides: Overrides = (),
    start: Annotated[str | None, tyro.conf.arg(name="from", metavar="STAGE")] = None,
    dry_run: bool = False,
    overwrite: bool = False,
    ignore_version: bool = False,
    plain: bool = False,
) -> int:
    """Runs the stages of a recipe. Finished stages are kept, and an interrupted one continues.

    Args:
        recipe: a YAML file, such as recipes/demo.yaml, or the config.yaml of a run.
        overrides: settings to change, such as stages.r1_zero.steps=10.
        start: run this stage again, and all that depend on it.
        dry_run: print which stages would run, and why, and exit.
        overwrite: delete the run that is in the run directory.
        ignore_version: reuse stages that another version of r1kernels ran.
        plain: print lines instead of a live table.
    """
    from r1kernels.train import chain, stage
    from r1kernels.train.errors import Interrupted
    from r1kernels.train.interrupt import Interrupt
    from r1kernels.train.log import Console
    from r1kernels.train.report import write_report

    started, settings, console = time.monotonic(), chain.load_run(recipe, overrides), Console(plain)
    _prepare(settings)
    chain.check_run_dir(settings)
    chain.order(settings)
    stage.check_recipe(settings, console)
    if dry_run:
        made = chain.Chain(settings, start=start, ignore_version=ignore_version)
        made.records = {} if overwrite else made.records
        for plan in made.plan():
            console.say(f"{plan.action:9}{plan.name} ({settings.stages[plan.name].kind}): {plan.why}")
        return 0
    with chain.claim(settings, overwrite=overwrite):
        made = chain.Chain(settings, start=start, ignore_version=ignore_version)
        with Interrupt() as interrupt, console:
            try:
                made.run(console, interrupt)
            except Interrupted as signal:
                config = Path(settings.run_dir, chain.CONFIG).absolute()
                console.say(f"stopped by {signal}; continue with: {shlex.join(['r1kernels', 'train', str(config)])}")
                return INTERRUPTED
        for name in made.order:
            if made.records[name]["evaluation"]:
                console.say(f"{name:20} {_results(made.records[name]['evaluation'])}")
        console.say(f"finished in {time.monotonic() - started:.0f} s")
        for path in write_report(settings.run_dir):
            console.say(f"wrote {path}")
    return 0


@app.command(name="eval")
def evaluate(path: Positional[Path], *, overrides: Overrides = ()) -> int:
    """Prints pass@1 and cons@k, with standard errors, of a model of a run.

    Args:
        path: a stage (RUN/STAGE), one of its checkpoints, or a run, for the last stage with a model.
        overrides: settings to change, such as eval.samples=64.
    """
    from r1kernels.train import chain
    from r1kernels.train.errors import ConfigError
    from r1kernels.train.evaluate import evaluate_model
    from r1kernels.train.interrupt import Interrupt
    from r1kernels.train.log import Console
    from r1kernels.train.recipe import LEAVES
    from r1kernels.train.stage import model_overrides, model_path

    run_dir = next((folder for folder in (path, *path.parents) if (folder / chain.CONFIG).is_file()), None)
    if run_dir is None:
        raise ConfigError(f"{path} is neither a run nor inside one: there is no {chain.CONFIG}")
    recipe = chain.load_run(run_dir / chain.CONFIG, overrides)
    _prepare(recipe)
    model, changes = path / "model", {}
    if not (model / "config.json").is_file():
        names = [name for name in chain.order(recipe) if LEAVES[recipe.stages[name].kind] == "model"]
        done = [name for name in names if name in chain.read_manifest(run_dir)] or names
        name = path.name if path != run_dir else done[-1]
        if name not in names:
            raise ConfigError(f"{path} is not a stage with a model; expected one of {', '.join(names)} in {run_dir}")
        model, changes = model_path(recipe, run_dir, name), model_overrides(recipe, name)
    with Interrupt() as interrupt:
        result = evaluate_model(recipe, model, interrupt, changes)
    Console(plain=True).say(
        f"{model}\n{_results(result)}\n{result['questions']} questions x {result['k']} samples, temperature "
        f"{result['temperature']}, top-p {result['top_p']}, prompts {result['prompt_hash']}; cut off "
        f"{result['truncated']:.1%}, format {_percent(result, 'format')}, language {_percent(result, 'language')}, "
        f"unscorable {result['unscorable']}")
    return 0


@app.command
def report(path: Positional[Path]) -> int:
    """Writes the report of a run again.

    Args:
        path: a run directory.
    """
    from r1kernels.train.log import printable
    from r1kernels.train.report import write_report

    print(*(printable(str(file)) for file in write_report(path)), sep="\n")
    return 0


def _prepare(recipe: Any) -> None:
    """Sets torch's threads, and keeps the progress bars of transformers out of the table."""
    import torch
    from transformers.utils import logging

    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _results(evaluation: dict[str, Any]) -> str:
    return (f"pass@1 {_percent(evaluation, 'pass_at_1')}, cons@{evaluation['k']} {_percent(evaluation, 'cons_at_k')}, "
            f"length {evaluation['length']:.1f} tokens")


def _percent(evaluation: dict[str, Any], key: str) -> str:
    value, error = evaluation[key], evaluation.get(f"{key}_se")
    return "-" if value is None else f"{value:.1%}" + ("" if error is None else f" ± {error:.1%}")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command. Expected errors end it with a message and no traceback."""
    try:
        sys.exit(app.cli(args=arguments))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of the output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        from r1kernels.rewards import EndpointError
        from r1kernels.rewards.sandbox import SandboxError
        from r1kernels.train.errors import Interrupted, RunError
        from r1kernels.train.log import printable

        if isinstance(error, Interrupted):
            sys.exit(INTERRUPTED)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or isinstance(error, RunError | SandboxError | EndpointError | FloatingPointError):
            sys.exit(f"r1kernels: {printable(str(error))}")
        raise

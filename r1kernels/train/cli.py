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
app: tyro.extras.SubcommandApp = tyro.extras.SubcommandApp()
Overrides = Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUE ...")]


@app.command
def train(
    recipe: Positional[Path], *, overrides: Overrides = (),
    start: Annotated[str | None, tyro.conf.arg(name="from", metavar="STAGE")] = None,
    dry_run: bool = False,
) -> int:
    """Runs the stages of a recipe. Finished stages are kept, and an interrupted one continues.

    Args:
        recipe: a YAML file, such as recipes/demo.yaml, or the config.yaml of a run.
        overrides: settings to change, such as stages.r1_zero.steps=10.
        start: run this stage again, and all stages that depend on it.
        dry_run: print which stages would run, and why, and exit.
    """
    import torch
    from transformers.utils import logging

    from r1kernels.train import chain, errors, log, parallel, plan, recipe_file, report, stage

    started, console, status = time.monotonic(), log.Console(), 0
    settings = recipe_file.load_recipe(recipe, overrides)
    parallel.start(settings.device, settings.parallel.timeout_s)
    parallel.agree("--from", start)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    stage.check_recipe(settings, console)
    for text in parallel.first(lambda: plan.check_fits(settings, parallel.ranks())):
        console.say(text, warning=True)
    if dry_run:
        for name, (action, why) in chain.Chain(settings, start=start).plan().items():
            console.say(f"{action:9}{name} ({settings.stages[name].kind}): {why}")
        return 0
    locks: list[object] = []
    parallel.first(lambda: locks.append(chain.claim(settings)))
    with errors.Interrupt() as stop, parallel.naming_missing_ranks():  # torchrun stops the ranks that are left
        try:
            chain.Chain(settings, start=start).run(console, stop)
            console.say(f"finished in {time.monotonic() - started:.0f} s")
        except errors.Interrupted as signal:
            console.say(f"stopped by {signal}; run {Path(settings.run_dir, chain.CONFIG)} to continue")
            status = INTERRUPTED
        finally:
            if parallel.rank() == 0:
                report.write_report(settings.run_dir)
            console.say(f"wrote {Path(settings.run_dir, 'report.html')}, and its figures in curves/")
    return status


@app.command
def plan(
    recipe: Positional[Path], *, overrides: Overrides = (), devices: int = 1, memory: float | None = None,
    prompt_tokens: int = 512,
) -> int:
    """Shows the memory that each stage of a recipe needs on a device, by part, and what would make it fit.

    Args:
        recipe: a YAML file, such as recipes/r1.yaml.
        overrides: settings to change, such as gradient_checkpointing=true.
        devices: the number of devices that train together.
        memory: GiB of each device, such as 80; by default, all of the device of the recipe.
        prompt_tokens: tokens of the longest prompt.
    """
    from r1kernels.train import errors, log, plan, recipe_file

    settings, say, status = recipe_file.load_recipe(recipe, overrides), log.Console().say, 0
    tensor = settings.parallel.tensor
    if devices < 1 or devices % tensor or prompt_tokens < 1 or not (memory is None or memory > 0):
        raise errors.ConfigError(f"--devices {devices}, --memory {memory}, --prompt-tokens {prompt_tokens}: expected "
                                 f"positive numbers, and devices that 'parallel.tensor' ({tensor}) divides")
    available = memory * plan.GIB if memory else plan.memory_of(settings.device)
    for name, case in plan.cases(settings, devices, prompt_tokens):
        text, refused = plan.verdict(name, case, available)
        for phase, parts in case.phases().items() if "unknown" not in text else ():
            say(f"{name} ({case.kind}), {phase}: {sum(parts.values()) / plan.GIB:.2f} GiB on each of {devices} devices")
            for part, size in sorted(parts.items(), key=lambda item: -item[1]):
                say(f"{size / plan.GIB:10.3f}  {part}")
        say(text or "it fits", warning=bool(text))
        status = status or int(refused)
    return status


def main(arguments: list[str] | None = None) -> None:
    """Runs the command. Expected errors end it with a message and no traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments.count("--set") > 1:  # the last one would win silently
        sys.exit("r1kernels: --set is given twice; give it once, with all its KEY=VALUE pairs")
    try:
        sys.exit(app.cli(args=arguments, prog="r1kernels"))
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

"""The commands: what is checked before any work, what runs, and what is said at the end."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from r1kernels.train.chain import Chain, dependencies, order, read_manifest
from r1kernels.train.checkpoint import MODEL
from r1kernels.train.config import Recipe, load_recipe
from r1kernels.train.console import Console
from r1kernels.train.evaluate import PARTS, evaluate_model
from r1kernels.train.interrupt import Interrupt, Interrupted
from r1kernels.train.loading import check_device, load_tokenizer, positions
from r1kernels.train.problems import check_data
from r1kernels.train.prompt import Template
from r1kernels.train.report import write_report
from r1kernels.train.rewards.sandbox import choose as choose_sandbox
from r1kernels.train.rundir import CONFIG, absolute_inputs, check_run_dir, claim
from r1kernels.train.schema import ConfigError
from r1kernels.train.stage import make_scorer, model_dir, model_overrides
from r1kernels.train.stages import KINDS
from r1kernels.train.trackers import check_trackers

INTERRUPTED = 130


def train(
    recipe: Recipe,
    *,
    start: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    trust_code: bool = False,
    plain: bool = False,
) -> int:
    """Runs a recipe; returns the exit status: 0, or 130 when interrupted."""
    started = time.monotonic()
    _prepare(recipe)
    check_run_dir(recipe, overwrite=overwrite)
    recipe = absolute_inputs(recipe)
    order(recipe)
    if "code" in check_data(recipe):
        choose_sandbox(recipe.scoring.sandbox, recipe.scoring.memory_mb)
    _check_models(recipe)
    _check_rewards(recipe)
    check_trackers(recipe.trackers)
    if dry_run:
        return _show_plan(recipe, start, overwrite, trust_code)
    with claim(recipe, overwrite=overwrite):
        chain = Chain(recipe, start=start, trust_code=trust_code)
        with Interrupt() as interrupt, Console(plain) as console:
            try:
                chain.run(console, interrupt)
            except Interrupted as signal:
                console.say(f"stopped by {signal}; go on with: {_command('train', recipe, CONFIG)}")
                return INTERRUPTED
        _conclude(recipe, time.monotonic() - started)
    return 0


def _show_plan(recipe: Recipe, start: str | None, overwrite: bool, trust_code: bool) -> int:
    """Says what would be done, and does nothing."""
    if overwrite:
        print(f"would delete the run in {recipe.run_dir} first")
        recipe = dataclasses.replace(recipe, run_dir=str(Path(recipe.run_dir, "nothing")))
    for plan in Chain(recipe, start=start, trust_code=trust_code).plan():
        config = recipe.stage(plan.name)
        after = ", ".join(sorted(dependencies(recipe, config)))
        print(f"{plan.action:9}{plan.name} ({config.kind}{f', after {after}' if after else ''}): {plan.why}")
    return 0


def _check_models(recipe: Recipe) -> None:
    """That models from elsewhere are there and can be asked in the template of the run."""
    for stage in recipe.stages:
        if stage.kind == "model":
            Template(recipe.template, load_tokenizer(stage.path), open_think=recipe.open_think)
            _check_positions(recipe, stage)


def _check_positions(recipe: Recipe, base: Any) -> None:
    """That no stage that goes back to a model asks for more positions than it has."""
    most = positions(base.path, base.overrides)
    family = {base.name}
    for stage in map(recipe.stage, order(recipe)):
        if getattr(stage, "model", None) in family:
            family.add(stage.name)
        if most is None or stage.name not in family:
            continue
        limits = {f"stages.{stage.name}.{key}": getattr(stage, key, None) for key in ("window", "max_new_tokens")}
        limits |= {"eval.max_new_tokens": recipe.eval.max_new_tokens}
        for key, value in limits.items():
            if value is not None and value > most:
                raise ConfigError(
                    f"'{key}' is {value}, expected at most {most}: the model of stage '{base.name}' has no more "
                    "positions ('overrides' of that stage can set max_position_embeddings)"
                )


def _check_rewards(recipe: Recipe) -> None:
    """That every reward can be computed here: its package is installed, and its settings are there."""
    for parts in (PARTS, *(stage.rewards for stage in recipe.stages if getattr(stage, "rewards", None))):
        make_scorer(recipe, parts).close()


def _conclude(recipe: Recipe, seconds: float) -> None:
    """Writes the report, and says what came out, where it is and what can be done with it."""
    run_dir = Path(recipe.run_dir)
    files = write_report(run_dir)
    records = read_manifest(run_dir)
    for name in order(recipe):
        evaluation = records[name]["evaluation"]
        if evaluation:
            print(f"{name:20} pass@1 {_percent(evaluation, 'pass_at_1')}, cons@{evaluation['k']} "
                  f"{_percent(evaluation, 'cons_at_k')}, length {evaluation['length']:.1f} tokens")
    print(f"in {seconds:.0f} s")
    for path in files:
        print(f"report  {path}")
    print(f"next: {_command('eval', recipe)}\n      {_command('watch', recipe)}")


def _percent(evaluation: dict, key: str) -> str:
    value, error = evaluation[key], evaluation.get(f"{key}_se")
    if value is None:
        return "-"
    return f"{value:.1%}" + (f" ± {error:.1%}" if error is not None else "")


def _command(verb: str, recipe: Recipe, *parts: str) -> str:
    """A command about the run, as this process was called, that works from any directory."""
    program = Path(sys.argv[0])
    if program.name != "r1kernels":  # called as a library
        program = Path("r1kernels")
    elif shutil.which(program.name) != str(program):
        program = program.absolute()
    else:
        program = Path(program.name)
    return shlex.join([str(program), verb, str(Path(recipe.run_dir, *parts).absolute())])


def evaluate(path: str | Path, overrides: Sequence[str] = ()) -> int:
    """Evaluates the model of a stage (RUN/STAGE), of one of its checkpoints, or of the last stage of a run (RUN)."""
    path = Path(path)
    run_dir = next((folder for folder in (path, *path.parents) if (folder / CONFIG).is_file()), None)
    if run_dir is None:
        raise ConfigError(f"{path} is neither a run nor a stage of one: no {CONFIG} in it or above it")
    recipe = load_recipe(run_dir / CONFIG, overrides)
    _prepare(recipe)
    if (path / MODEL / "config.json").is_file():
        model, changes = path / MODEL, {}
    else:
        names = [name for name in order(recipe) if KINDS[recipe.stage(name).kind] == "model"]
        records = read_manifest(run_dir)
        done = [name for name in names if name in records]
        name = path.name if path != run_dir else done[-1] if done else names[-1]
        if name not in names:
            raise ConfigError(f"{path} is no stage with a model, expected one of {', '.join(names)} in {run_dir}")
        model, changes = model_dir(recipe, run_dir, name), model_overrides(recipe, name)
    with Interrupt() as interrupt:
        result = evaluate_model(recipe, model, interrupt, changes).as_dict()
    print(
        f"{model}\npass@1 {_percent(result, 'pass_at_1')}, cons@{result['k']} {_percent(result, 'cons_at_k')} "
        f"(± standard error; {result['questions']} questions x {result['k']} samples, T {result['temperature']}, "
        f"top-p {result['top_p']}, prompts {result['prompt_hash']})\n"
        f"length {result['length']:.1f} tokens, cut off {result['truncated']:.1%}, "
        f"format {_percent(result, 'format')}, language {_percent(result, 'language')}, "
        f"unscorable {result['unscorable']}"
    )
    return 0


def _prepare(recipe: Recipe) -> None:
    """The device there, threads as configured, and no progress bars of transformers through the live table."""
    check_device(recipe.device)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

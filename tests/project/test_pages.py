"""Every block of code of every page is run or checked: here, or by the test that ELSEWHERE names."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pages
import pydantic
import pytest
import torch
import tyro
import yaml

from r1kernels.train import cli, recipe, recipe_file

ROOT = pages.ROOT
ADAPTERS = "tests/integrations/test_"
# Blocks of these languages are run by other tests: those of the adapters have the trainers, or their interfaces.
ELSEWHERE = {
    ("README.md", "python"): "tests/project/test_readme.py::test_before_and_after_agree",
    ("docs/statistics.md", "python"): "tests/losses/test_optimal_token_baseline.py::test_the_example_is_the_formula",
    ("docs/migrate/nemo_rl.md", "python"): f"{ADAPTERS}nemo_rl.py::test_every_block_of_the_page_runs",
    ("docs/migrate/prime_rl.md", "diff"): f"{ADAPTERS}prime_rl.py::test_every_block_of_the_page_runs",
    ("docs/migrate/prime_rl.md", "python"): f"{ADAPTERS}prime_rl.py::test_every_block_of_the_page_runs",
    ("docs/migrate/prime_rl.md", "toml"): f"{ADAPTERS}prime_rl.py::test_every_block_of_the_page_runs",
    ("docs/migrate/slime.md", "bash"): f"{ADAPTERS}slime.py::test_every_block_of_the_page_runs",
    ("docs/migrate/torchtitan.md", "python"): f"{ADAPTERS}torchtitan.py::test_every_block_of_the_page_runs",
    ("docs/migrate/transformers.md", "python"): f"{ADAPTERS}transformers_page.py::test_every_block_of_the_page_runs",
    ("docs/migrate/trl.md", "python"): f"{ADAPTERS}trl_docs.py::test_the_code_of_the_page_runs",
    ("docs/migrate/verl.md", "python"): f"{ADAPTERS}verl_docs.py::test_every_block_is_tested",
    ("docs/migrate/verl.md", "yaml"): f"{ADAPTERS}verl_docs.py::test_the_config_has_keys_and_names_of_verl",
}
SHELL = ("bash", "console", "sh", "shell")
# Commands of other projects: their arguments are not checked.
OTHERS = {"cd", "curl", "export", "git", "nvidia-smi", "ruff", "source", "vllm"}
VERL = {"actor_rollout_ref", "algorithm"}  # keys of verl's configuration
TRAINERS = re.compile(r"\bimport (?:trl|transformers|verl|torchtitan|peft|datasets)\b|"
                      r"\bfrom (?:trl|transformers|verl|torchtitan|peft|datasets|r1kernels\.integrations)\b")


def here(*languages: str) -> list[pages.Block]:
    """The blocks of these languages that are checked in this file."""
    return [block for page in pages.PAGES for block in pages.blocks(page)
            if block.language in languages and (page, block.language) not in ELSEWHERE]


def cases(*languages: str) -> Any:
    return pytest.mark.parametrize("block", here(*languages), ids=lambda block: f"{block.page}:{block.line}")


PYTHON = sorted({block.page for block in here("python")})


# ---- the census -------------------------------------------------------------------------------------------------

CHECKED = ("python", "hidden", "yaml", "json", "text", "", "indented", *SHELL)


@pytest.mark.parametrize("page", pages.PAGES)
def test_every_block_is_run_or_checked(page: str) -> None:
    for block in pages.blocks(page):
        assert block.language in CHECKED or (page, block.language) in ELSEWHERE, (
            f"{page}:{block.line}: nothing runs or checks blocks of {block.language!r}; expected one of "
            f"{', '.join(filter(None, CHECKED))}, or an entry of ELSEWHERE in {Path(__file__).name}")


@pytest.mark.parametrize("place", sorted(ELSEWHERE), ids=" ".join)
def test_the_tests_elsewhere_exist(place: tuple[str, str]) -> None:
    page, language = place
    assert any(block.language == language for block in pages.blocks(page)), f"{page} has no block of {language}"
    file, _, name = ELSEWHERE[place].partition("::")
    source = (ROOT / file).read_text()
    assert name in {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    assert Path(page).name in source, f"{file} does not read {page}"


# ---- python -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("page", [
    pytest.param(page, marks=pytest.mark.filterwarnings("default"))  # those of the trainers
    if any(TRAINERS.search(block.code) for block in pages.python(page)) else page for page in PYTHON
])
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages.source_tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    try:
        pages.run(page)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_pages_state_outputs_and_they_are_compared() -> None:
    pages_with = {page for page in pages.PAGES for block in pages.python(page) if pages.stated(block.code)}
    assert {"docs/faq.md", "docs/numerics.md", "docs/rewards.md"} <= pages_with


@pytest.mark.parametrize("comment, printed", [
    ("[1.0, 0.0]: the last one marks no answer", "[1.0, 0.0]"), ("3.6 and 3.7", "3.6499 3.65"),
    ("nan and -1", "nan -1.0"), ("1.3e-3", "0.00134"),
    ("[nan, -0.5] and [0, -0.5]", "tensor([[nan, -0.5]], grad_fn=<AddBackward0>) tensor([[-0., -0.5000]])"),
])
def test_a_right_output_agrees(comment: str, printed: str) -> None:
    (stated,) = pages.stated(f"x = 1\nprint(\n    x)  # {comment}\n")
    assert stated[0] == 2 and pages.agrees(stated[1], printed)


@pytest.mark.parametrize("comment, printed", [
    ("[1.0, 0.0]", "[1.0, 1.0]"), ("3.6", "3.66"), ("nan and -1", "-1.0 nan"), ("[0, 1]", "[0]"), ("0", "1e-7"),
    ("inf", "1.0"), ("1.0", "nan"), ("2.5", ""),
])
def test_a_wrong_output_is_found(comment: str, printed: str) -> None:
    ((_, stated),) = pages.stated(f"print(x)  # {comment}\n")
    assert not pages.agrees(stated, printed)


@pytest.mark.parametrize("comment", ["once for each reason", "token_ids[1] is -100, expected an id", "2 of 3", ""])
def test_words_are_not_compared(comment: str) -> None:
    assert not pages.stated(f"print(x)  # {comment}\n")


def test_running_a_page_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("```python\nfor x in (3.61, 3.68):\n    print(x)  # 3.6 and 3.7\n```\n")
    pages.run("page.md")
    page.write_text("a\n\n```python\nprint(3.61)  # 3.7\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:4.*3\.61.*3\.7"):
        pages.run("page.md")


# ---- yaml and json ----------------------------------------------------------------------------------------------

MODELS = (recipe.Recipe, recipe.Model, recipe.Pretrain, recipe.SFT, recipe.GRPO, recipe.Reject, recipe.Preference,
          recipe.Distill, recipe.FileData, recipe.HubData, recipe.FunctionData)


def wrong_settings(values: dict[str, Any]) -> list[str]:
    """What a recipe's model refuses of a part of a recipe or of a stage. Required settings may be missing."""
    fitting = [model for model in MODELS if set(values) <= set(model.model_fields)]
    if not fitting:
        return [f"keys {', '.join(values)}: no part of a recipe has all of them"]
    complaints = []
    for model in fitting:
        try:
            model.model_validate(values)
        except pydantic.ValidationError as error:
            complaints.append([f"{'.'.join(map(str, one['loc']))} is {one['input']!r:.60}: {one['msg']}"
                               for one in error.errors() if one["type"] != "missing"])
        else:
            return []
    return min(complaints, key=len)


@cases("yaml", "json")
def test_a_block_of_data_is_part_of_a_recipe_or_json(block: pages.Block) -> None:
    if block.language == "json":
        json.loads(block.code)
        return
    values = recipe_file.read_yaml(block.code)
    assert isinstance(values, dict), block
    if not set(values) <= VERL:
        assert wrong_settings(values) == []


def test_a_wrong_setting_is_found() -> None:
    values = {"stages": {"r1": {"kind": "grpo", "steps": 0, "model": "base"}}}
    assert [one for one in wrong_settings(values) if "steps" in one and "0" in one]
    assert wrong_settings({"stages": {"r1": {"kind": "grpo", "nonsense": 1}}})
    assert wrong_settings({"kl_coeff": 1})
    assert not wrong_settings({"rewards": {"accuracy": 1.0}})


# ---- text: formulas, trees and what commands print ----------------------------------------------------------------

@cases("text", "", "indented")
def test_code_has_a_language(block: pages.Block) -> None:
    """A block without a language is neither Python nor YAML, so that code is not left out by mistake."""
    if any(first_word(command) in {*OTHERS, *COMMANDS} for command in pages.commands(block.code)):
        for command in pages.commands(block.code):
            check_command(command)
        return
    if block.language == "text":
        return
    try:
        tree = ast.parse(block.code)
    except SyntaxError:
        tree = None
    assert tree is None, f"{block.page}:{block.line}: give this block a language, or `text` if it is no code"
    try:
        values = yaml.safe_load(block.code)
    except yaml.YAMLError:
        return
    assert not isinstance(values, dict), f"{block.page}:{block.line}: give this block a language, or `text`"


# ---- commands -----------------------------------------------------------------------------------------------------

def first_word(command: str) -> str:
    words = [word for word in command.split() if not re.match(r"\w+=", word)]
    return words[0].removeprefix(".venv/bin/") if words else ""


def is_trainers(command: str) -> bool:
    """Whether the trainer has this command. Other commands are modules with a `parser` of argparse."""
    if command in cli.app._subcommands:
        return True
    assert importlib.util.find_spec(f"r1kernels.{command}.cli"), f"r1kernels has no command {command}"
    return False


def parse(arguments: list[str]) -> None:
    """The arguments of `r1kernels`, by the parser of the command, with functions that do nothing."""
    def idle(function: Any) -> Any:
        return functools.wraps(function)(lambda *_, **__: 0)

    try:
        if is_trainers(arguments[0]):
            app = tyro.extras.SubcommandApp()
            for name, command in cli.app._subcommands.items():
                app.command(idle(command.target), name=name)
            app.cli(args=arguments, console_outputs=False)
        else:
            importlib.import_module(f"r1kernels.{arguments[0]}.cli").parser().parse_args(arguments[1:])
    except SystemExit as status:
        assert "--help" in arguments, f"r1kernels {' '.join(arguments)}: refused with status {status.code}"
    for argument in arguments:
        if argument.startswith("recipes/"):
            assert pages.exists(argument), argument


def check_python(arguments: list[str]) -> None:
    """`python FILE`, `python -m MODULE`; what follows `-c` runs elsewhere."""
    if arguments[:2] == ["-m", "r1kernels"]:
        check_r1kernels(arguments[2:])
    elif arguments[:1] == ["-m"]:
        assert importlib.util.find_spec(arguments[1]), arguments
        check_paths(arguments[2:])
    elif arguments[:1] == ["-c"]:
        ast.parse(arguments[1])
    else:
        check_paths(arguments)


def check_r1kernels(arguments: list[str]) -> None:
    if arguments:
        parse(arguments)


def check_torchrun(arguments: list[str]) -> None:
    if "-m" in arguments:
        check_python(arguments[arguments.index("-m"):])
    else:
        assert any(argument.endswith(".py") for argument in arguments), arguments
        check_paths(arguments)


def check_pip(arguments: list[str]) -> None:
    """Extras of this package exist, and nothing asks PyPI for it: it is installed from a clone, or from a wheel."""
    project = (ROOT / "pyproject.toml").read_text()
    extras = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    known = set(re.findall(r"^(\w+) = ", extras, re.MULTILINE))
    assert arguments[0] in ("install", "wheel", "download", "show", "uninstall"), arguments
    for argument in arguments[1:]:
        assert not re.match(r"r1kernels(?![\w./-])", argument), f"{argument} is not on PyPI; expected '.', or a wheel"
        if found := re.match(r"(?:\.|.*\.whl\)?)\[([\w,]+)\]", argument):
            assert set(found[1].split(",")) <= known, argument


def check_make(arguments: list[str]) -> None:
    for argument in arguments:
        assert argument in pages.make_targets() or re.match(r"-|\w+=", argument), f"make {argument}: no such target"


def check_paths(arguments: list[str]) -> None:
    """Arguments that look like files of the repository are some."""
    for argument in arguments:
        path = argument.partition("::")[0]
        if re.fullmatch(r"(?:\./)?(?:tests|benchmarks|examples|docs|recipes|csrc|r1kernels)(?:/[\w./*-]+)?", path) or (
                re.fullmatch(r"[\w/.]+\.py", path)):
            assert pages.exists(path), f"{path} is not in the repository"


COMMANDS = {
    "make": check_make, "r1kernels": check_r1kernels, "python": check_python, "python3": check_python,
    "torchrun": check_torchrun, "pip": check_pip, "pytest": check_paths,
}


def check_command(command: str) -> None:
    words = shlex.split(command)
    while words and re.match(r"\w+=", words[0]):
        del words[0]
    if not words:
        return
    name = words[0].removeprefix(".venv/bin/")
    if name in COMMANDS:
        COMMANDS[name](words[1:])
    elif "/" in name:
        assert pages.exists(name), f"{command}: {name} is not in the repository"
        check_paths(words[1:])
    else:
        assert name in OTHERS, f"{command}: nothing checks the command {name!r}"


@cases(*SHELL)
def test_the_commands_of_a_page_exist(block: pages.Block) -> None:
    for command in pages.commands(block.code):
        check_command(command)


@pytest.mark.parametrize("page", pages.PAGES)
def test_commands_inside_sentences_exist(page: str) -> None:
    text = re.sub(r"^ *```.*?^ *```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for command in re.findall(r"`((?:make|r1kernels|pip|pytest|torchrun|python3?) [^`]+)`", text):
        if command == "r1kernels --help":
            continue
        if command.split()[0] == "r1kernels" and len(command.split()) == 2:  # the name of a command alone
            is_trainers(command.split()[1])
        elif "..." not in command:
            check_command(" ".join(command.split()))


@pytest.mark.parametrize("command", [
    "make nonsense", "r1kernels train", "r1kernels train recipes/none.yaml", "r1kernels train RECIPE --nonsense 1",
    "python examples/none.py", "python -m r1kernels.none", "pytest tests/none", "benchmarks/none.sh", "nonsense",
    "pip install '.[nonsense]'", "pip install 'r1kernels[rewards]'",
    "pip install r1kernels", "torchrun -m r1kernels nonsense",
])
def test_a_wrong_command_is_found(command: str) -> None:
    with pytest.raises((AssertionError, ModuleNotFoundError)):
        check_command(command)

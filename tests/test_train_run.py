"""The commands: what they leave, what they refuse, and what they say when something is wrong."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console as RichConsole

from r1kernels.train import console as console_module
from r1kernels.train import grpo, tiny
from r1kernels.train import run as run_module
from r1kernels.train.cli import main
from r1kernels.train.config import load_recipe
from r1kernels.train.console import Console
from r1kernels.train.interrupt import TrainingError
from r1kernels.train.metrics import read_metrics
from r1kernels.train.rewards import Scores
from r1kernels.train.stage import Stage
from r1kernels.train.stages import pretrain

BASE = {
    "name": "base", "kind": "pretrain", "tiny": {"hidden_size": 16, "intermediate_size": 16, "layers": 1, "heads": 1},
    "steps": 2, "batch_size": 1, "window": 64, "max_terms": 3,
}
RL = {
    "name": "rl", "kind": "grpo", "model": "base", "problems": ["sums"], "steps": 2, "questions": 2, "group_size": 2,
    "minibatches": 2, "max_new_tokens": 4,
}
SETTINGS = {
    "seed": 0,
    "threads": 1,
    "data": {"sums": {"kind": "arithmetic", "min_terms": 2, "max_terms": 3, "train_size": 8}},
    "eval": {"every": 1, "questions": 2, "samples": 2, "max_new_tokens": 4},
    "stages": [BASE, RL],
}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def write_recipe(path: Path, run_dir: Path, **changes) -> Path:
    path.write_text(yaml.safe_dump({"run_dir": str(run_dir), **SETTINGS, **changes}))
    return path


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path / "recipe.yaml", tmp_path / "runs" / "it")


def command(*arguments) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that has ended, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    threads = torch.get_num_threads()
    assert command("train", write_recipe(folder / "recipe.yaml", folder / "it"), "--plain") == 0
    torch.set_num_threads(threads)
    return folder / "it"


@pytest.fixture
def run_dir(finished, recipe, tmp_path):
    """A copy of it, where the recipe has its run."""
    return Path(shutil.copytree(finished, tmp_path / "runs" / "it"))


def contents(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def manifest(run_dir: Path) -> dict:
    return json.loads((run_dir / "manifest.json").read_text())["stages"]


def test_train_eval_and_report(recipe, tmp_path, capsys):
    run_dir = tmp_path / "runs" / "it"
    assert command("train", recipe, "--plain") == 0
    output = capsys.readouterr().out
    assert "[1/2] base: run: new" in output and "[2/2] rl: run: new" in output
    for name in ("report.md", "report.html", "curves.png"):
        assert (run_dir / name).stat().st_size > 0
        assert str(run_dir / name) in output
    assert f"r1kernels eval {run_dir}" in output
    evaluation = manifest(run_dir)["rl"]["evaluation"]
    assert f"pass@1 {evaluation['pass_at_1']:.1%} ± {evaluation['pass_at_1_se']:.1%}" in output
    assert [line["step"] for line in read_metrics(run_dir / "rl" / "metrics.jsonl")] == [0, 1, 2]

    for path in (run_dir, run_dir / "rl", run_dir / "rl" / "checkpoints" / "step-000002"):
        assert command("eval", path) == 0
        output = capsys.readouterr().out
        assert f"pass@1 {evaluation['pass_at_1']:.1%} ± {evaluation['pass_at_1_se']:.1%}" in output
        assert f"prompts {evaluation['prompt_hash']}" in output
    assert command("eval", run_dir / "base", "--set", "eval.samples=3") == 0
    assert "2 questions x 3 samples" in capsys.readouterr().out
    assert "it/bse is no stage with a model, expected one of base, rl in" in command("eval", run_dir / "bse")
    assert "is neither a run nor a stage of one: no config.yaml" in command("eval", tmp_path)

    text = (run_dir / "report.md").read_bytes()
    (run_dir / "report.md").unlink()
    assert command("report", run_dir) == 0
    assert (run_dir / "report.md").read_bytes() == text


def test_a_stage_may_be_called_model(finished, tmp_path, capsys):
    """As is the directory of a checkpoint that holds one."""
    stages = [{**BASE, "name": "model"}]
    recipe = write_recipe(tmp_path / "x.yaml", tmp_path / "it", stages=stages)
    assert command("train", recipe, "--plain") == 0
    capsys.readouterr()
    assert command("eval", tmp_path / "it") == 0
    assert str(tmp_path / "it" / "model" / "checkpoints" / "step-000002" / "model") in capsys.readouterr().out


def test_what_is_finished_is_kept_and_what_grew_is_continued(recipe, run_dir, capsys):
    before = contents(run_dir)
    assert command("train", recipe, "--plain") == 0
    assert "[1/2] base: skip: finished, and nothing changed" in capsys.readouterr().out
    changed = {name for name, content in contents(run_dir).items() if before.get(name) != content}
    assert changed <= {".lock", "config.yaml", "report.md", "report.html", "curves.png"}
    assert command("train", recipe, "--plain", "--set", "stages.rl.steps=3") == 0
    assert "rl: continue: stage.steps: 2 -> 3" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(run_dir / "rl" / "metrics.jsonl")] == [0, 1, 2, 3]
    assert not (run_dir / "superseded").exists()


def test_what_changed_is_run_again_and_what_it_replaces_is_kept(recipe, run_dir, capsys):
    before = {name: content for name, content in contents(run_dir).items() if name.startswith("rl/")}
    assert command("train", recipe, "--plain", "--set", "stages.rl.learning_rate=1e-4") == 0
    assert "[2/2] rl: rerun: stage.learning_rate: 3e-06 -> 0.0001" in capsys.readouterr().out
    kept = contents(run_dir / "superseded" / "rl-1")
    assert {f"rl/{name}": content for name, content in kept.items()} == before
    assert command("train", recipe, "--plain", "--set", "stages.rl.learning_rate=1e-4", "--from", "base") == 0
    output = capsys.readouterr().out
    assert "[1/2] base: rerun: asked for by --from base" in output and "[2/2] rl: rerun: asked for" in output
    assert {path.name for path in (run_dir / "superseded").iterdir()} == {"rl-1", "rl-2", "base-1"}


def test_code_that_is_trusted(recipe, run_dir, capsys, monkeypatch):
    monkeypatch.setattr("r1kernels.train.chain.code_hash", lambda: "new")
    assert command("train", recipe, "--dry-run") == 0
    assert capsys.readouterr().out.count("rerun") == 2
    assert command("train", recipe, "--plain", "--trust-code") == 0
    assert manifest(run_dir)["rl"]["hashes"]["code"] == "new"
    assert command("train", recipe, "--dry-run") == 0
    assert capsys.readouterr().out.count("skip     ") == 2


def test_a_dry_run_says_what_would_be_done_and_does_nothing(recipe, run_dir, tmp_path, capsys):
    def state(path):
        return {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in (path, *path.rglob("*"))}

    before = state(tmp_path)
    assert command("train", recipe, "--dry-run", "--set", "stages.base.steps=3") == 0
    assert capsys.readouterr().out.splitlines() == [
        "rerun    base (pretrain): stage.steps: 2 -> 3", "rerun    rl (grpo, after base): base is run first"
    ]
    assert command("train", recipe, "--dry-run", "--from", "rl") == 0
    assert capsys.readouterr().out.splitlines()[1] == "rerun    rl (grpo, after base): asked for by --from rl"
    assert command("train", recipe, "--dry-run", "--overwrite") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"would delete the run in {run_dir} first",
        "run      base (pretrain): new",
        "run      rl (grpo, after base): new",
    ]
    assert command("train", recipe, "--dry-run", "--set", f"run_dir={tmp_path / 'new'}") == 0
    assert state(tmp_path) == before
    assert "--from 'nowhere': no such stage, expected one of base, rl" in command("train", recipe, "--from", "nowhere")


@pytest.mark.parametrize("line", ["{oops", "3", "{}", '{"step": "one"}', "\udcff"])
def test_a_damaged_log_is_named(recipe, run_dir, line):
    log = run_dir / "rl" / "metrics.jsonl"
    log.write_text(f'{{"step": 0}}\n{line}\n', errors="surrogateescape")
    for verb in (["report", run_dir], ["train", recipe, "--plain", "--set", "stages.rl.steps=3"]):
        message = command(*verb)
        assert message.startswith(f"r1kernels: {log}, line 2: damaged: ") and "\n" not in message


def flip(path: Path) -> None:
    """Another bit, and the same size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_goes_on(recipe, tmp_path):
    run_dir = tmp_path / "runs" / "it"
    settings = ["--plain", "--set", "checkpoint.every=1", "checkpoint.keep=2"]
    assert command("train", recipe, *settings) == 0
    whole = read_metrics(run_dir / "rl" / "metrics.jsonl")
    first, second = (run_dir / "rl" / "checkpoints" / f"step-00000{step}" for step in (1, 2))
    # As if killed in its last step.
    content = json.loads((run_dir / "manifest.json").read_text())
    content["stages"]["rl"]["status"] = "running"
    (run_dir / "manifest.json").write_text(json.dumps(content))
    for name in ("state.pt", "model/model.safetensors", "model/config.json"):
        before = (second / name).read_bytes()
        flip(second / name)
        assert command("train", recipe, *settings) == (
            f"r1kernels: damaged checkpoint: {second / name} does not match the SHA-256 in its manifest; {first} is "
            f"older: remove {second} to go on from there"
        )
        (second / name).write_bytes(before)
    shutil.rmtree(second)
    assert command("train", recipe, *settings) == 0
    assert read_metrics(run_dir / "rl" / "metrics.jsonl") == whole


def test_a_damaged_model_is_named_before_another_stage_starts_from_it(recipe, run_dir):
    model = run_dir / "base" / "checkpoints" / "step-000002" / "model" / "model.safetensors"
    flip(model)
    settings = ["--plain", "--set", "stages.rl.temperature=0.9"]
    message = f"r1kernels: damaged checkpoint: {model} does not match the SHA-256 in its manifest; --from base makes it"
    assert command("train", recipe, *settings).startswith(message)
    assert command("eval", run_dir / "base").startswith(message)
    assert command("train", recipe, *settings, "--from", "base") == 0


@pytest.mark.parametrize("kind", ["the run", "a stage"])
def test_a_directory_that_is_read_only_is_named(recipe, run_dir, kind, monkeypatch):
    """Simulated: who may do anything may write there too."""
    refused = run_dir if kind == "the run" else run_dir / "rl"
    before, real = contents(run_dir), open

    def guarded(file, mode="r", *arguments, **keywords):
        if isinstance(file, str | Path) and Path(file).parent == refused and set(mode) & set("wax+"):
            raise PermissionError(13, "Permission denied")
        return real(file, mode, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", guarded)
        message = command("train", recipe, "--plain", "--set", "stages.rl.steps=3")
    assert "cannot be written: Permission denied" in message and str(refused) in message and "\n" not in message
    if kind == "the run":
        assert contents(run_dir) == before
    assert command("train", recipe, "--plain", "--set", "stages.rl.steps=3") == 0
    assert len(read_metrics(run_dir / "rl" / "metrics.jsonl")) == 4


def test_a_report_needs_a_run_and_a_place(run_dir, tmp_path):
    assert "holds no run" in command("report", tmp_path)
    (run_dir / "report.md").unlink()
    (run_dir / "report.md").mkdir()
    assert f"the report of {run_dir} cannot be written: {run_dir / 'report.md'}: " in command("report", run_dir)


def elsewhere(path, **keys) -> dict:
    """The stages of a run that starts from a model in a directory."""
    return {"stages": [{"name": "given", "kind": "model", "path": str(path)}, {**RL, "model": "given", **keys}]}


def test_models_and_data_are_checked_before_work(finished, tmp_path):
    new = tmp_path / "new"
    model = Path(shutil.copytree(finished / "base" / "checkpoints" / "step-000002" / "model", tmp_path / "model"))

    def message(**changes) -> str:
        return command("train", write_recipe(tmp_path / "x.yaml", new, **changes), "--plain")

    assert "nowhere' is not a directory" in message(**elsewhere(tmp_path / "nowhere"))
    assert "has no chat template; expected a model with one, or 'r1_zero'" in message(
        **elsewhere(model), template="chat"
    )
    for file in model.glob("tokenizer*"):
        file.unlink()
    told = message(**elsewhere(model))
    assert "has no tokenizer" in told and "\n" not in told and not told.endswith(":")
    sums = SETTINGS["data"]["sums"]
    for data, expected in (
        ({"kind": "gsm8k", "path": "nope.jsonl", "test_path": "nope.jsonl"}, "nope.jsonl"),
        ({**sums, "train_size": 4096}, "'data.sums.train_size' is 4096, expected at most"),
    ):
        assert expected in message(data={"sums": data})
    assert "stages' depend on each other in a circle: rl <- rl" in message(stages=[BASE, {**RL, "model": "rl"}])
    assert "'trackers' names 'paper', expected some of" in message(trackers=["paper"])
    assert not new.exists()


def test_a_device_that_is_not_there_is_refused_before_work(recipe, tmp_path):
    message = command("train", recipe, "--plain", "--set", "device=meta")
    assert message.startswith("r1kernels: 'device' is 'meta', which cannot be used here: ")
    if not torch.cuda.is_available():
        message = command("train", recipe, "--plain", "--set", "device=cuda")
        assert "'device' is 'cuda', which cannot be used here: " in message
    assert not (tmp_path / "runs").exists()


def test_a_model_directory_trains_like_a_tiny_one(finished, tmp_path):
    model = finished / "base" / "checkpoints" / "step-000002" / "model"
    more = {"name": "more", "kind": "evaluate", "model": "rl", "problems": ["sums"], "questions": 3, "samples": 2}
    changes = elsewhere(model)
    changes["stages"].append(more)
    recipe = write_recipe(tmp_path / "x.yaml", tmp_path / "new", open_think=True, **changes)
    assert command("train", recipe, "--plain") == 0
    assert len(read_metrics(tmp_path / "new" / "rl" / "metrics.jsonl")) == 3
    records = manifest(tmp_path / "new")
    assert records["given"]["summary"]["architecture"] == "LlamaForCausalLM"
    assert records["given"]["evaluation"]["questions"] == 2
    assert (records["more"]["summary"]["questions"], records["more"]["summary"]["k"]) == (3, 2)
    assert records["more"]["evaluation"] is None
    assert command("eval", tmp_path / "new" / "given") == 0


def test_a_loss_that_is_not_finite_stops_the_run(recipe, run_dir, monkeypatch):
    def poisoned(*arguments, **keywords):
        return {"loss": float("nan"), "ratio_deviation": 0.0}

    monkeypatch.setattr(grpo, "minibatch_gradient", poisoned)
    with pytest.raises(TrainingError, match="step 0, minibatch 0: loss nan"):
        run_module.train(load_recipe(recipe, ["stages.rl.temperature=0.9"]), plain=True)
    assert manifest(run_dir)["rl"]["status"] == "running"


def test_a_first_ratio_other_than_1_stops_the_run(recipe, run_dir, monkeypatch):
    real = grpo.rollout_logprobs
    monkeypatch.setattr(grpo, "rollout_logprobs", lambda *a, **k: real(*a, **k) - 0.1)
    with pytest.raises(TrainingError, match=r"differs from 1 by 0\.11 before any update"):
        run_module.train(load_recipe(recipe, ["stages.rl.temperature=0.9"]), plain=True)


class Unscorable:
    """A scorer whose samples all timed out but for every third."""

    def __init__(self, scorer, every):
        self.scorer, self.every = scorer, every

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.scorer.close()

    def submit(self, samples):
        future = self.scorer.submit([])
        values = [float("nan") if index % self.every else 1.0 for index in range(len(samples))]
        count = sum(value != 1 for value in values)
        scores = Scores({"accuracy": values}, values, count, 0, 0, {"accuracy": count})
        future.result = lambda: scores
        return future


@pytest.mark.parametrize(("every", "count"), [(2, 2), (4, 3), (1, 0)])
def test_unscorable_samples_and_idle_steps_are_shown(recipe, run_dir, monkeypatch, capsys, every, count):
    real = Stage.scorer

    def scorer(self, parts):
        return real(self, parts) if "language" in parts else Unscorable(real(self, parts), every)

    monkeypatch.setattr(Stage, "scorer", scorer)
    recipe = load_recipe(recipe, ["stages.rl.steps=5", "stages.rl.temperature=0.9", "stages.rl.rollout_batch_size=4"])
    assert run_module.train(recipe, plain=True) == 0
    output = capsys.readouterr().out
    if count:
        assert f"step 0: {count} samples could not be scored (accuracy {count}; {count} timeouts, 0 crashes)" in output
    assert "for 5 steps all samples of every group have had the same reward" in output
    lines = read_metrics(run_dir / "rl" / "metrics.jsonl")
    assert all(line["unscorable"] == count and line["zero_spread"] == 1 for line in lines[:5])
    # Nothing to learn from, and the policy is its own reference: the weights stay where they are.
    assert all(line["loss"] == 0 for line in lines[:5])


def test_the_live_table_shows_a_step(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        console_module, "RichConsole", lambda: RichConsole(file=screen, force_terminal=True, width=100, height=50)
    )
    terminal = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})
    monkeypatch.setattr(console_module.sys, "stdout", terminal())
    with Console() as console:
        console.stage("base", 1, 2, "run: new")
        console.training("base", 1, 2, 3.5)
        console.evaluation("base", {"pass_at_1": None, "length": 3.0})
        console.samples([("Compute 1+1", " <think>[b]2</think>", 2.0)])
        console.step({"step": 0, "pass_at_1": 0.125, "length": 17.25, "reward_accuracy": 0.5}, 4)
    text = screen.getvalue()
    assert all(part in text for part in ("[1/2] base", "pass@1", "12.5%", "17.2", "[b]2", "Compute 1+1", "step 1/4"))


def test_pretraining_scores_whole_rows(recipe, monkeypatch):
    """Of a row of hidden states the next token, and no slice of them: its gradient would be copied."""
    real, seen = pretrain.r1kernels.linear_cross_entropy, []

    def recording(hidden, *, targets, **head):
        seen.append((hidden.shape[:2], hidden.is_contiguous(), targets))
        return real(hidden, targets=targets, **head)

    monkeypatch.setattr(pretrain.r1kernels, "linear_cross_entropy", recording)
    recipe = load_recipe(recipe, ["stages.rl.steps=1"])
    assert run_module.train(recipe, plain=True) == 0
    shape, contiguous, targets = seen[0]
    assert shape == targets.shape == (1, 64) and contiguous
    config = recipe.stage("base")
    tokenizer = tiny.make_tokenizer(config.corpus, config.max_terms, recipe.seed)
    batch = tiny.corpus_batch(tokenizer, config, config.max_terms, recipe.seed, 0)
    assert torch.equal(targets[:, :-1], batch["targets"][:, 1:]) and (targets[:, -1] == -100).all()


def test_files_are_json_for_every_reader(recipe, run_dir):
    assert command("train", recipe, "--plain", "--set", "eval.questions=1", "stages.rl.steps=3") == 0
    lines = [line for path in run_dir.glob("rl/*.jsonl") for line in path.read_text().splitlines()]
    texts = [*lines, (run_dir / "manifest.json").read_text()]
    parsed = [json.loads(text, parse_constant=lambda name: pytest.fail(name)) for text in texts]
    assert parsed[-1]["stages"]["rl"]["evaluation"]["pass_at_1_se"] is None  # of one question

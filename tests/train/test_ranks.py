"""Runs of several ranks: the same training as on one rank, resumed, and ended with a message that names the culprit."""

import re
import shutil

import pytest
import torch
from once import once
from ranks_cases import SECONDS, Server, free_port, torchrun, write_recipes
from rl_cases import equal, outcome, timeless
from safetensors.torch import load_file

from r1kernels.train.checkpoint import latest_checkpoint
from r1kernels.train.cli import INTERRUPTED
from r1kernels.train.log import read_lines

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch has no gloo")


class Runs:
    """Runs of one recipe or another; `whole` keeps those that end without an incident, for all tests and processes."""

    def __init__(self, factory):
        self.factory, self.folder, self.server = factory, factory.mktemp("runs"), Server()
        self.recipes = once(factory, "ranks", write_recipes)

    def __call__(self, run_dir, ranks, *sets, recipe="rl", own=(), **variables):
        """The exit statuses of the ranks, and what each says. `own` are settings of the last rank alone."""
        given, output = [f"run_dir={run_dir}", *sets], self.folder / f"{run_dir.name}.out"
        each = [given] * (ranks - 1) + [[*given, *own]]
        codes = self.server.run(self.recipes / f"{recipe}.yaml", each, output, **variables)
        return codes, [output.with_name(f"{output.name}{rank}").read_text() for rank in range(ranks)]

    def whole(self, ranks, tensor=1, recipe="rl"):
        def make(run_dir):
            codes, texts = self(run_dir, ranks, f"parallel.tensor={tensor}", recipe=recipe)
            assert codes == [0] * ranks, "\n".join(texts)

        return once(self.factory, f"ranks-{recipe}-{ranks}-{tensor}", make)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory)
    yield made
    made.server.close()


def weights_of(directory):
    return load_file(latest_checkpoint(directory) / "model" / "model.safetensors")


def assert_same_training(first, second, before=None):
    """To rounding; and it moved the weights by far more than that."""
    ours, theirs = weights_of(first), weights_of(second)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=0, atol=1e-5 * weight.abs().max().item())
    if before is not None:
        assert all((weight - before[name]).abs().max() > 1e-3 * weight.abs().max() for name, weight in ours.items())
    lines, others = (timeless(read_lines(directory / "metrics.jsonl")) for directory in (first, second))
    assert len(lines) == len(others)
    for line, other in zip(lines, others, strict=True):
        assert other == pytest.approx(line, rel=1e-3, abs=1e-5, nan_ok=True)


@pytest.fixture(scope="module")
def full(request):
    return request.config.getoption("--full", default=False)


@pytest.mark.parametrize(("ranks", "tensor"), [(2, 1), (2, 2), (4, 1), (4, 2)])
def test_more_ranks_train_the_same_model(runs, full, ranks, tensor):
    """Their samples are the same, their sums are rounded elsewhere."""
    if ranks > 2 and not full:
        pytest.skip("with --full only: four processes on few cores")
    first, second = runs.whole(1) / "rl", runs.whole(ranks, tensor) / "rl"
    assert_same_training(first, second, load_file(runs.recipes / "base" / "model.safetensors"))
    assert read_lines(first / "samples.jsonl") == read_lines(second / "samples.jsonl")


@pytest.mark.few(3)
@pytest.mark.parametrize("stage", ["cold", "scores", "ppo", "lora"])
@pytest.mark.slow(reason="several runs")
def test_every_kind_of_training_is_the_same_on_more_ranks(runs, stage):
    if stage == "lora":
        pytest.importorskip("peft", reason="adapters need the package peft")
    first, second = (runs.whole(ranks, recipe="others") / stage for ranks in (1, 2))
    assert_same_training(first, second)


@pytest.fixture(scope="module")
def stopped(runs):
    """A run of two ranks, after a signal to the second one alone, in step 5."""
    def make(run_dir):
        codes, texts = runs(run_dir, 2, R1K_WHAT="stop", R1K_RANK="1", R1K_CALL="6")
        assert codes == [INTERRUPTED] * 2 and "stopped by SIGTERM" in texts[0], "\n".join(texts)
        assert len(read_lines(run_dir / "rl" / "metrics.jsonl")) == 5

    return once(runs.factory, "ranks-stopped", make)


def resumed(runs, stopped, ranks, *sets):
    run_dir = runs.folder / "-".join([stopped.name, str(ranks), *sets])
    shutil.copytree(stopped, run_dir)
    codes, texts = runs(run_dir, ranks, *sets)
    assert codes == [0] * ranks and "rl: continue" in texts[0], "\n".join(texts)
    return run_dir / "rl"


def test_a_signal_to_one_rank_stops_all_and_the_run_ends_the_same_bit_for_bit(runs, stopped):
    found, expected = outcome(resumed(runs, stopped, 2)), outcome(runs.whole(2) / "rl")
    assert [name for name in expected if not equal(found[name], expected[name])] == []


@pytest.mark.parametrize(("ranks", "tensor"), [(1, 1), (2, 2), (4, 1)])
@pytest.mark.slow(reason="several runs")
def test_it_goes_on_with_another_number_of_ranks(runs, stopped, full, ranks, tensor):
    if ranks > 1 and not full:
        pytest.skip("with --full only: more of the same")
    assert_same_training(runs.whole(1) / "rl", resumed(runs, stopped, ranks, f"parallel.tensor={tensor}"))


@pytest.mark.slow(reason="waits for time limits")
def test_a_rank_that_is_killed_ends_the_others_with_its_name_and_the_run_continues(runs):
    """By a real torchrun, which stops the other ranks too."""
    output = runs.folder / "killed.out"
    process = torchrun(
        "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", recipe=runs.recipes / "rl.yaml",
        sets=[f"run_dir={runs.folder}/killed"], output=output, R1K_WHAT="kill", R1K_RANK="1", R1K_CALL="6")
    assert process.wait(SECONDS) not in (0, INTERRUPTED)
    text = output.read_text()
    assert re.search(r"r1kernels: ranks lost contact: rank 0 is alive in '.*'; rank 1 is gone, last in "
                     r"'rl, step \d.*run continues from its last checkpoint", text), text
    found, expected = outcome(resumed(runs, runs.folder / "killed", 2)), outcome(runs.whole(2) / "rl")
    assert [name for name in expected if not equal(found[name], expected[name])] == []


@pytest.mark.slow(reason="waits for time limits")
def test_a_rank_that_hangs_is_named_with_what_it_does(runs):
    codes, texts = runs(runs.folder / "hangs", 2, "parallel.timeout_s=10", R1K_WHAT="hang", R1K_RANK="1", R1K_CALL="2")
    assert codes[0] == 1 and codes[1] < 0  # which was killed
    assert re.search("ranks lost contact: .*rank 1 is alive in 'rl, step 1: scoring'", texts[0]), texts[0]


@pytest.mark.parametrize(("own", "message"), [
    ("seed=4", r"ranks disagree on the recipe.*: rank 0 has .*3.*, rank 1 .*4"),
    ("data.sums.path=/elsewhere", "ranks disagree on the recipe.*: rank 0 has .*sums.jsonl.*, rank 1 .*elsewhere"),
])
def test_ranks_with_other_recipes_are_refused_before_any_work(runs, own, message):
    codes, texts = runs(runs.folder / "other", 2, own=[own])
    assert codes == [1, 1] and all(re.search(message, text) and "Traceback" not in text for text in texts), texts
    assert not (runs.folder / "other").exists()


@pytest.mark.parametrize(("setting", "message"), [
    ("stages.rl.problems=[ours]", "ranks disagree on the content .data set 'ours', split 'train'.: rank 0 has"),
    ("stages.base.path=/proc/self/cwd/model", "'base': ranks disagree on the size of the vocabulary: rank 0 has 77, "
                                              "rank 1 79"),
    ("parallel.tensor=3", r"'parallel.tensor' is 3, which does not divide the number of ranks, 2"),
    ("stages.base.path=/missing", "stage 'base'.*/missing"),
])
def test_what_ranks_do_not_have_in_common_is_refused_before_any_work(runs, setting, message):
    codes, texts = runs(runs.folder / "apart", 2, setting, R1K_MACHINES=f"{runs.recipes}/machine{{}}")
    assert codes == [1, 1] and all(re.search(message, text) and "Traceback" not in text for text in texts), texts
    assert not list((runs.folder / "apart").glob("rl/checkpoints/*"))


def test_two_nodes(runs, full):
    """Two agents of torchrun meet by an address, as those of two machines do."""
    if not full:
        pytest.skip("with --full only: another test starts a torchrun, and three programs take a minute to start")
    port = free_port()
    outputs = [runs.folder / f"node{number}.out" for number in range(2)]
    nodes = [torchrun(
        "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=r1",
        recipe=runs.recipes / "rl.yaml", sets=[f"run_dir={runs.folder}/nodes", "stages.rl.steps=2"], output=output)
        for output in outputs]
    assert [node.wait(SECONDS) for node in nodes] == [0, 0], "\n".join(output.read_text() for output in outputs)
    found, expected = (read_lines(path / "rl" / "metrics.jsonl") for path in (runs.folder / "nodes", runs.whole(1)))
    for line, other in zip(timeless(found)[:2], timeless(expected)[:2], strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5, nan_ok=True)
    assert sum("finished in" in output.read_text() for output in outputs) == 1  # the first rank alone speaks

"""The code of the README runs, its losses agree, and the tree it shows is the tree there is."""

import re
import warnings
from pathlib import Path

import pages
import pytest
import torch
from trl_cases import answers, make_trainer, tiny_model_and_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the blocks define, with a tiny model and what TRL's trainer needs."""
    pytest.importorskip("trl", reason="TRL is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # TRL's own
        trainer = make_trainer("GRPO", tmp_path_factory.mktemp("trl"), max_steps=1)
        ids = torch.tensor([[3, 4, 5, 3]])
        return pages.run("README.md", {
            "policy": trainer.model, "model": tiny_model_and_tokenizer()[0],
            "args": trainer.args, "tokenizer": trainer.processing_class, "input_ids": ids,
            "train_dataset": trainer.train_dataset, "reward_funcs": [answers], "labels": ids})


def test_the_trainers_are_ours(names: dict[str, object]) -> None:
    """One step of TRL's trainer; the loss of transformers is made without logits, and is that of the logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        names["trainer"].train()
    assert names["trainer"].state.global_step == 1 and type(names["trainer"]).__name__ == "R1GRPOTrainer"
    assert names["loss"].requires_grad and names["loss"].isfinite()


def test_before_and_after_agree(names: dict[str, object]) -> None:
    torch.manual_seed(0)
    batch, steps, vocab = 4, 9, 50
    logits = torch.randn(batch, steps, vocab)
    token_ids = torch.randint(vocab, (batch, steps))
    arguments = (token_ids, torch.randn(batch), torch.randn(batch, steps) - 4, torch.rand(batch, steps) < 0.8)

    def run(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        leaf = logits.clone().requires_grad_()
        loss, metrics = names[name](leaf, *arguments)
        loss.backward()
        return loss.detach(), metrics["entropy"].detach(), leaf.grad

    for ours, by_hand in zip(run("loss_fused"), run("loss_by_hand"), strict=True):
        torch.testing.assert_close(ours, by_hand)


def test_from_hidden_states_agrees_too(names: dict[str, object]) -> None:
    torch.manual_seed(0)
    hidden, lm_head = torch.randn(4, 9, 16), torch.nn.Linear(16, 50, bias=False)
    arguments = (torch.randint(50, (4, 9)), torch.randn(4), torch.randn(4, 9) - 4, torch.rand(4, 9) < 0.8)
    loss, metrics = names["loss_linear"](hidden, lm_head, *arguments)
    loss.backward()
    grad, lm_head.weight.grad = lm_head.weight.grad, None
    expected, _ = names["loss_by_hand"](lm_head(hidden), *arguments)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, lm_head.weight.grad)
    assert metrics["measured_tokens"] == arguments[-1].sum()


def test_rewards_are_as_stated(names: dict[str, object]) -> None:
    call, stated = re.search(r"^(rewards\.accuracy\(.*\)) +# (\[.*\])$", TEXT, re.MULTILINE).groups()
    assert eval(call, names) == eval(stated)


def test_paths_named_in_the_tree_exist() -> None:
    tree = TEXT.split("## The tree")[1].split("\n## ")[0]
    # The first column, and a second path before its description where a line names two.
    paths = re.findall(r"^    (\S+)(?: {1,2}(\S+/) )?", tree, re.MULTILINE)
    flat = {path for pair in paths for path in pair if path}
    assert {"csrc/", "r1kernels/triton/", "r1kernels/ops/", "recipes/", "tests/", "benchmarks/"} <= flat
    for path in flat:
        assert (ROOT / path).exists(), f"README names {path}, which does not exist"


def test_every_recipe_and_make_target_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:`|^    )make (\w+)", TEXT, re.MULTILINE))
    assert {"demo", "test", "wheel", "docs"} <= targets
    for target in targets:
        assert f"\n{target}:" in makefile, target
    for recipe in set(re.findall(r"recipes/\w+\.yaml", TEXT)):
        assert (ROOT / recipe).exists(), recipe

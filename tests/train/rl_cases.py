"""What the tests of RL share: a tiny model of characters, a reward that noise can get, and stages."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from r1kernels.train.checkpoint import latest_checkpoint
from r1kernels.train.errors import Interrupt, Interrupted
from r1kernels.train.log import Console, read_lines
from r1kernels.train.parallel import mesh
from r1kernels.train.policy import Policy
from r1kernels.train.recipe_file import load_recipe
from r1kernels.train.stage import Stage

CHARACTERS = "\n +-=<>/.,:`0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
TAGS = ("<think>", "</think>")

RECIPE = """
run_dir: {folder}/run
precision: fp32
seed: 3
data:
  sums: {{kind: jsonl, path: {folder}/sums.jsonl, test_path: {folder}/sums.jsonl}}
scoring: {{timeout_s: 60}}
eval: {{every: 2, questions: 4, samples: 2, batch_size: 4, max_new_tokens: 6}}
checkpoint: {{every: 2, keep: 1}}
stages:
  base: {{kind: model, path: {folder}/base}}
  rl: {{kind: grpo, model: base, problems: [sums], rewards: {{"rl_cases:parity": 1.0, accuracy: 0.0}}, steps: 3,
       questions: 4, group_size: 4, minibatches: 2, micro_batch_tokens: 900, learning_rate: 1.0e-3, warmup_updates: 4,
       max_new_tokens: 6, ref_refresh_every: 2, objective: {{preset: r1, options: {{entropy_coef: 0.001}}}}}}
"""


def parity(completions: list[str], **columns: Any) -> list[float]:
    """A reward that a model of noise gets half of the time."""
    return [float(sum(map(ord, text)) % 2) for text in completions]


def make_tokenizer(*, appends_end: bool = False, special_tags: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of characters.

    Args:
        appends_end: it puts `<bos>` in front of a text and `<eos>` behind it, as `add_eos_token` does.
        special_tags: `<think>` and `</think>` are special tokens.
    """
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<bos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if appends_end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)])
    if special_tags:
        tokenizer.add_special_tokens([AddedToken(tag, special=True) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>" if appends_end else None,
        padding_side="right")


def make_model(
    tokenizer: PreTrainedTokenizerFast, seed: int = 0, *, end_scale: float = 4.0, **shape: int
) -> LlamaForCausalLM:
    """A model with random weights, in which some completions end early; the more, the larger `end_scale`."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "max_position_embeddings": 1024} | shape
    config = LlamaConfig(
        vocab_size=len(tokenizer), **sizes, tie_word_embeddings=True, initializer_range=0.2, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.eos_token_id] *= end_scale
    return model


def policy_of(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> Policy:
    """The policy of a model, on one rank. From then on, the weights of the model are shards."""
    return Policy(model, mesh("cpu"), dtype)


def take_gradient(policy: Policy) -> torch.Tensor:
    """The gradient of all weights as one vector, in the order of the model's parameters. The next one begins at 0."""
    weights = policy.trained().values()
    gradient = torch.cat([weight.grad.full_tensor().flatten() for weight in weights])
    for weight in weights:
        weight.grad = None
    return gradient


def stage_of(folder: Path, overrides: Iterable[str] = (), *, interrupt: Interrupt | None = None) -> Stage:
    """The stage `rl` of the recipe; `overrides` are of its settings, or of the recipe where they begin with a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").exists():
        tokenizer = make_tokenizer()
        make_model(tokenizer, end_scale=1.5).save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        rows = [{"question": f"Compute {n}+{n + 1}", "answer": str(2 * n + 1)} for n in range(8)]
        (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    given = [item[1:] if item.startswith(".") else f"stages.rl.{item}" for item in overrides]
    recipe = load_recipe(folder / "recipe.yaml", given)
    directory = folder / "run" / "rl"
    directory.mkdir(parents=True, exist_ok=True)
    return Stage(recipe, recipe.stages["rl"], directory, Console(), interrupt or Interrupt())


class StopAfter(Interrupt):
    """Stops the work at the n-th check, whether of this rank or of all ranks."""

    def __init__(self, checks: int) -> None:
        self.left = checks
        super().__init__()

    @property
    def requested(self) -> str | None:
        self.left -= 1
        if self.left <= 0:
            raise Interrupted("SIGINT")
        return None

    @requested.setter
    def requested(self, value: str | None) -> None: ...


def timeless(value: Any) -> Any:
    """A value without what depends on the clock."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in ("timing", "seconds", "date")}
    return [timeless(item) for item in value] if isinstance(value, list | tuple) else value


def equal(first: Any, second: Any) -> bool:
    """Whether two values are the same, bit for bit; NaN equals NaN."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return type(first) is type(second) and (first == second or (first != first and second != second))


def load_shards(path: Path) -> dict[str, Any]:
    """The whole tensors that the ranks of a run saved in a checkpoint."""
    with tempfile.NamedTemporaryFile() as file:
        dcp_to_torch_save(path / "shards", file.name)
        return torch.load(file.name, weights_only=True)


def outcome(directory: Path) -> dict[str, Any]:
    """All that a stage leaves, without what depends on the clock."""
    path = latest_checkpoint(directory)
    return {
        "name": path.name,
        "state": timeless(torch.load(path / "state.pt", weights_only=True)),
        "shards": load_shards(path),
        "weights": load_file(path / "model" / "model.safetensors"),
        "metrics": timeless(read_lines(directory / "metrics.jsonl")),
        "samples": read_lines(directory / "samples.jsonl"),
    }

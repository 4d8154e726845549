"""What the tests of supervised stages share: a model of characters, stages in a directory, and ways to stop one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rl_cases import load_shards
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from r1kernels.train.checkpoint import latest_checkpoint
from r1kernels.train.errors import Interrupt, Interrupted
from r1kernels.train.log import Console, read_lines
from r1kernels.train.recipe_file import load_recipe
from r1kernels.train.stage import Stage

EXAMPLES = Path(__file__).parents[2] / "examples"
CHARACTERS = "\n +-=<>/.,:`0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ答案是十二"


def make_tokenizer(extra: str = "", *, appends_end: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of characters; `appends_end` puts `<eos>` behind every text, as `add_eos_token` does."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *CHARACTERS, *extra])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if appends_end:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
        chat_template="{{ messages[0]['content'] }}:",
    )


def save_model(directory: Path, seed: int = 0, *, tokenizer: Any = None, rows: int | None = None, **shape: int) -> Path:
    """A model with random weights; `rows` of its head may be more than there are tokens."""
    tokenizer = tokenizer or make_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "max_position_embeddings": 1024} | shape
    config = LlamaConfig(
        vocab_size=rows or len(tokenizer), **sizes, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def stage_of(
    recipe: str, name: str, directory: Path, overrides: Iterable[str] = (), interrupt: Interrupt | None = None
) -> Stage:
    """Stage `name` of a recipe. Its directory exists."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "recipe.yaml"
    path.write_text(recipe)
    loaded = load_recipe(path, [f"run_dir={directory}/run", *overrides])
    own = directory / "run" / name
    own.mkdir(parents=True, exist_ok=True)
    return Stage(loaded, loaded.stages[name], own, Console(), interrupt or Interrupt())


class Killed(BaseException):
    """Ends a stage as SIGKILL does: it is not told, and saves nothing."""


class StopAt(Interrupt):
    """Stops the work at the n-th check, from 0, of this rank or of all ranks, by the exception given."""

    def __init__(self, checks: int, how: type[BaseException] = Interrupted) -> None:
        self.left, self.how = checks, how
        super().__init__()

    @property
    def requested(self) -> str | None:
        self.left -= 1
        if self.left < 0:
            raise self.how("test")
        return None

    @requested.setter
    def requested(self, value: str | None) -> None: ...


def timeless(path: Path) -> list[dict[str, Any]]:
    """The lines of a log without what depends on the clock."""
    return [{key: value for key, value in line.items() if key != "timing"} for line in read_lines(path)]


def outcome(stage: Stage) -> dict[str, Any]:
    """All that a stage with a model leaves, but for times."""
    checkpoint = latest_checkpoint(stage.directory)
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    return {
        "metrics": timeless(stage.directory / "metrics.jsonl"),
        "weights": _bytes(load_file(checkpoint / "model" / "model.safetensors")),
        "shards": _bytes({name: value for name, value in load_shards(checkpoint)["optimizer"].items()
                          if isinstance(value, torch.Tensor)}),
        "step": state["step"],
    }


def same_after_stops(
    run: Callable[[Stage], dict], make: Callable[[Interrupt | None], Stage], whole: tuple[dict, dict], checks: int,
    how: type[BaseException],
) -> None:
    """A stage that is stopped at a check and runs again ends as the uninterrupted one did."""
    try:
        run(make(StopAt(checks, how)))
        raise AssertionError(f"it had no check {checks}")
    except (Interrupted, Killed):
        pass
    stage = make(None)
    assert run(stage) == whole[0]
    assert outcome(stage) == whole[1]


def _bytes(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in tensors.items()}

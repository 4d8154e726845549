"""A tiny model and a few steps of each of TRL's trainers with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Two random words are sometimes a right answer, and sometimes well-formed.
WORDS = ["<think>so</think>", "<answer>2</answer>", "<answer>3</answer>"]
TRAINERS = ("SFT", "DPO", "KTO", "GRPO", "RLOO")
LENGTH = 4


def tiny_model_and_tokenizer(**config: Any) -> tuple[Any, Any]:
    import tokenizers
    import transformers

    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    transformers.set_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        **config)), tokenizer


def lengths(completions: list[str], **_: Any) -> list[float]:
    return [len(text.split()) / LENGTH for text in completions]


def answers(completions: list[str], **_: Any) -> list[float]:
    return [float("2" in text) for text in completions]


def rows_of(name: str) -> list[dict[str, Any]]:
    a, b, c = WORDS
    if name == "SFT":
        return [{"prompt": a, "completion": f" {b} {c}"}, {"prompt": b, "completion": f" {a}"}]
    if name == "DPO":
        return [{"prompt": a, "chosen": f" {b} {c}", "rejected": f" {c}"},
                {"prompt": f"{b} {a}", "chosen": f" {a}", "rejected": f" {c} {a} {b}"}]
    if name == "KTO":
        return [{"prompt": a, "completion": f" {b} {c}", "label": True},
                {"prompt": b, "completion": f" {a}", "label": False}]
    return [{"prompt": text} for text in ("1 + 1 =", "so", c, "so so")]


def make_trainer(
    name: str, directory: Any, *, kind: type | None = None, model: Any = None, more: dict[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """A trainer (of a subclass `kind`) with `more` arguments; the other keywords are settings of its configuration."""
    import datasets
    import trl

    tiny, tokenizer = tiny_model_and_tokenizer()
    if model is None:  # TRL loads the reference model from where the model is from
        tiny.save_pretrained(directory / "tiny")
        model = type(tiny).from_pretrained(directory / "tiny")
    fixed = {"output_dir": str(directory), "max_steps": 3, "per_device_train_batch_size": 8, "report_to": [],
             "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 3, "bf16": False,
             "gradient_checkpointing": False, "logging_steps": 1, "learning_rate": 0.1, "optim": "sgd"}
    if name in ("GRPO", "RLOO"):
        fixed |= {"num_generations": 4, "max_completion_length": LENGTH}
        more = {"reward_funcs": [lengths, answers]} | (more or {})
    return (kind or getattr(trl, f"{name}Trainer"))(
        model=model, processing_class=tokenizer,
        args=getattr(trl, f"{name}Config")(**fixed | arguments),
        train_dataset=datasets.Dataset.from_list(rows_of(name) * 12), **more or {})


def parameters(trainer: Any) -> Tensor:
    return torch.cat([value.detach().flatten().clone() for value in trainer.model.parameters()])


def trained(make: Callable[[], Any], patch: Callable[[], Any] = contextlib.nullcontext) -> tuple[Any, ...]:
    """(parameters before, after, the log without times) of a training."""
    with patch():
        trainer = make()
        start = parameters(trainer)
        trainer.train()
    times = ("time", "runtime", "second", "flos")
    log = [{name: value for name, value in line.items() if not any(word in name for word in times)}
           for line in trainer.state.log_history]
    return start, parameters(trainer), log


def sharded_gradients(kind: type, directory: Any, rank: int = 0) -> Tensor:
    """Gradients of GRPO's loss of a model that FSDP2 shards over all ranks, each with a batch of its own."""
    from torch.distributed.fsdp import fully_shard

    trainer = make_trainer("GRPO", directory, kind=kind, model=tiny_model_and_tokenizer()[0], loss_type="grpo")
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model
    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    rng = torch.Generator().manual_seed(rank)
    ids = torch.randint(1, 6, (4, 7), generator=rng)
    mask = torch.ones(4, 4, dtype=torch.int64)
    mask[1, 2:] = 0
    loss = trainer._compute_loss(model.train(), {
        "prompt_ids": ids[:, :3], "prompt_mask": torch.ones_like(ids[:, :3]), "completion_ids": ids[:, 3:],
        "completion_mask": mask, "advantages": torch.randn(4, generator=rng)})
    loss.backward()
    return torch.cat([value.grad.full_tensor().flatten() for value in model.parameters()])

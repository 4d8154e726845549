"""GRPO with TRL: its own trainer on our log-probs, or the whole loss in one pass, and rewards from r1kernels.

    python examples/trl_grpo.py                                   # R1GRPOTrainer, a tiny random model
    python examples/trl_grpo.py --patch                           # trl.GRPOTrainer after patch_trl()
    python examples/trl_grpo.py --model Qwen/Qwen3-0.6B --out runs/trl

The task is to add two digits, and to write thought and answer in tags. docs/migrate/trl.md has every option.
"""

from __future__ import annotations

import argparse

import datasets
import tokenizers
import torch
import transformers
import trl

from r1kernels import rewards
from r1kernels.integrations.trl import R1GRPOTrainer, patch_trl

TINY_WORDS = ["<pad>", "<eos>", "<unk>", "<think>add</think>", *(f"<answer>{n}</answer>" for n in range(2, 5))]
PROMPT = "Work out {a} + {b}. Write your thought in <think> </think> and the result in <answer> </answer>."


def tiny_model() -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerFast]:
    """A model whose words are whole thoughts and answers, so that two random words are sometimes right."""
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(TINY_WORDS, range(7), strict=True)), "<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=7, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, eos_token_id=1, bos_token_id=None)), tokenizer


def train(model: object, tokenizer: object, rows: list[dict[str, str]], patch: bool, **settings: object) -> list[float]:
    """The mean rewards that TRL logged, each over five steps."""
    arguments = trl.GRPOConfig(report_to=[], save_strategy="no", logging_steps=5, **settings)
    kind = trl.GRPOTrainer if patch else R1GRPOTrainer
    if patch:
        patch_trl()  # for the rest of the process; `with patch_trl():` ends it
    trainer = kind(
        model=model, processing_class=tokenizer, args=arguments, train_dataset=datasets.Dataset.from_list(rows),
        reward_funcs=[rewards.accuracy, rewards.format])  # `accuracy` reads the column "answer"
    trainer.train()
    return [line["reward"] for line in trainer.state.log_history if "reward" in line]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model of transformers; by default, a tiny random one")
    parser.add_argument("--patch", action="store_true", help="TRL's own trainer, with our log-probs")
    parser.add_argument("--steps", type=int, help="updates; by default, all of the data several times")
    parser.add_argument("--out", default="runs/trl", help="TRL's directory")
    options = parser.parse_args()
    transformers.set_seed(0)
    if options.model:
        model, tokenizer = options.model, transformers.AutoTokenizer.from_pretrained(options.model)
        rows = [{"prompt": [{"role": "user", "content": PROMPT.format(a=a, b=b)}], "answer": str(a + b)}
                for a in range(1, 10) for b in range(1, 10)]
        settings = {"max_completion_length": 512}
    else:
        (model, tokenizer), rows = tiny_model(), [{"prompt": "1 + 2", "answer": "3"}] * 16
        settings = {"max_completion_length": 2, "learning_rate": 2e-2, "num_generations": 16, "num_train_epochs": 4,
                    "per_device_train_batch_size": 32, "bf16": False}
    settings |= {"output_dir": options.out, "max_steps": options.steps or -1,
                 "use_cpu": not torch.accelerator.is_available()}
    history = train(model, tokenizer, rows, options.patch, **settings)
    print(f"mean reward: {history[0]:.2f} at first, {history[-1]:.2f} at the end")

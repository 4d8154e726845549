"""Prompts: the template of R1-Zero, or the model's own chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from r1kernels.train.errors import ConfigError

# DeepSeek-R1, arXiv 2501.12948, Table 1: it fixes the structure of a response and does not say how to think.
R1_ZERO_TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the "
    "answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
    "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
    "User: {question}. Assistant:"
)


def render(question: str, *, open_think: bool = False) -> str:
    """A question in the R1-Zero template. With `open_think`, every completion starts inside the thought."""
    return R1_ZERO_TEMPLATE.replace("{question}", question.strip()) + (" <think>" if open_think else "")


@dataclass(frozen=True)
class Template:
    """Turns questions into prompts: `r1_zero` for base models, `chat` for the tokenizer's chat template."""
    kind: Literal["r1_zero", "chat"]
    tokenizer: PreTrainedTokenizerBase | None
    open_think: bool = False

    def __post_init__(self) -> None:
        if self.kind == "chat" and not self.tokenizer.chat_template:
            raise ConfigError(f"'template' is 'chat', but {self.tokenizer.name_or_path!r} has no chat template; "
                              "use a model with one, or 'r1_zero'")

    def render(self, question: str) -> str:
        """The prompt of a question."""
        if self.kind == "r1_zero":
            return render(question, open_think=self.open_think)
        chat = [{"role": "user", "content": question}]
        prompt = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        bos = self.tokenizer.bos_token
        if bos and self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]:
            prompt = prompt.removeprefix(bos)  # the tokenizer adds it again
        opened = prompt.rstrip().endswith("<think>")
        return f"{prompt}<think>\n" if self.open_think and not opened else prompt

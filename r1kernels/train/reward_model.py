"""Bradley-Terry reward models: the body of a language model, and a number read from the last token of a text.

    p(chosen beats rejected) = sigmoid(r(chosen) - r(rejected)),    loss = -log p

Plain `transformers` loads and runs them as models for sequence classification with one label. It reads the last token
that is not the padding token. So texts contain no padding token, and end with the end token if that is a different one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from r1kernels.rewards.text import THINK, after_thinking, prompt_opens_think
from r1kernels.train.checkpoint import latest_checkpoint, load_checkpoint
from r1kernels.train.data import Pair, Template, load_pairs
from r1kernels.train.errors import DataError, naming
from r1kernels.train.model import align, checkpointing, load_tokenizer, round_parameters
from r1kernels.train.policy import Policy
from r1kernels.train.rng import permutation
from r1kernels.train.rollout import prompt_tokens
from r1kernels.train.stage import Stage
from r1kernels.train.supervised import Measures, fit

Target = Literal["summary", "response"]


def judged_part(target: Target, response: str) -> str:
    """What a reward model sees of a response: all, or the summary after the thought ("" if the thought never ends)."""
    return response if target == "response" else after_thinking("", response) or ""


def in_float32(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A hook that gives a module its input in float32."""
    return (inputs[0].float(),)


class RewardModel:
    """A reward model and its tokenizer. It scores `batch_size` texts at once, on which the last bits of a score depend.

    With the target of a `new` one, `path` holds a causal LM, which gets a head of zeros.
    """

    template: Template
    batch_size: int

    def __init__(self, path: str | Path, batch_size: int = 64, *, template: Literal["r1_zero", "chat"] = "r1_zero",
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
                 new: Target | None = None) -> None:
        options = {"num_labels": 1} if new else {}
        with naming(f"'{path}' is not a reward model"):
            model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, **options)
            if model.score.out_features != 1:
                raise ValueError(f"it has {model.score.out_features} scores, expected one")
        # Rewards of a group differ by less than bfloat16 rounds, so the head is float32.
        model.score.register_forward_pre_hook(in_float32)
        model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), "score"}
        self.model: PreTrainedModel = round_parameters(align(model.to(device)).eval(), dtype)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(path)
        self.template, self.batch_size = Template(template, self.tokenizer), batch_size
        if new:
            torch.nn.init.zeros_(model.score.weight)
            model.config.pad_token_id, model.config.reward_target = self.tokenizer.pad_token_id, new
        self.target: Target = getattr(model.config, "reward_target", "response")

    @torch.no_grad()
    def score(self, questions: Sequence[str], responses: Sequence[str]) -> list[float]:
        """The reward of each whole response (see `data.whole_response`); NaN where the model gives no finite number."""
        if not questions:
            return []
        rows, scores = self.encode(questions, responses), torch.full((len(questions),), math.nan)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))  # so that there is little padding
        for first in range(0, len(order), self.batch_size):
            places = order[first : first + self.batch_size]
            scores[places] = self.forward([rows[place] for place in places]).cpu()
        return scores.where(scores.isfinite(), math.nan).tolist()

    def encode(self, questions: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
        """The tokens of each question and response. A special token that a response spells out is only text."""
        # Some chat templates open a thought. A response holds its whole thought or no thought.
        prompts = [self.template.render(question) for question in questions]
        prompts = [text.rstrip().removesuffix(THINK) if prompt_opens_think(text) else text for text in prompts]
        texts = [judged_part(self.target, response) for response in responses]
        written = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return [[token for token in (*prompt, *text) if token != pad] + [eos] * (eos != pad)
                for prompt, text in zip(prompt_tokens(self.tokenizer, prompts), written, strict=True)]

    def forward(self, rows: Sequence[list[int]]) -> Tensor:
        """The scores (B,) of some rows of tokens."""
        pad, tensors = self.tokenizer.pad_token_id, [torch.tensor(row) for row in rows]
        ids = pad_sequence(tensors, batch_first=True, padding_value=pad).to(self.model.device)
        with checkpointing(self.model):
            return self.model(input_ids=ids, attention_mask=(ids != pad).long(), use_cache=False).logits.float().sum(-1)


def run(stage: Stage) -> dict[str, Any]:
    """Trains on pairs of responses, and measures the accuracy on the pairs of held-out questions."""
    settings, recipe, path = stage.settings, stage.recipe, latest_checkpoint(stage.directory)
    size = settings.micro_batch_size or settings.batch_size
    model_dir, state = load_checkpoint(path) if path else (stage.model_path(settings.model), {})

    def make() -> tuple[Any, RewardModel]:
        made = RewardModel(model_dir, size, template=recipe.template, new=None if state else settings.target)
        return made.model, made

    policy, model = stage.wrap(make)
    pairs = load_pairs(recipe, settings.pairs)
    rows = model.encode(*both(pairs))
    usable = [pair for pair, chosen, rejected in zip(pairs, rows[::2], rows[1::2], strict=True)
              if chosen != rejected and max(len(chosen), len(rejected)) <= settings.max_tokens]
    if left_out := len(pairs) - len(usable):
        text = (f"'pairs': {left_out} of {len(pairs)} pairs of '{settings.pairs}' have equal texts or more than "
                f"{settings.max_tokens} tokens ('max_tokens'), and are left out")
        if not usable:
            raise DataError(text)
        stage.console.say(text, warning=True)
    training, held_out = split(usable, settings.held_out, recipe.seed)
    summary = {"pairs": len(training), "held_out_pairs": len(held_out), "left_out": left_out} | fit(
        stage, (policy, model.tokenizer, state), training,
        lambda pairs: gradient(model, policy, pairs, size))
    if held_out:
        scores = torch.tensor(policy(lambda _: model.score(*both(held_out))))
        measures = measure(scores[::2] - scores[1::2])
        summary |= {"held_out_loss": measures.pop("loss"), **measures}
    return summary


def both(pairs: Sequence[Pair]) -> tuple[list[str], list[str]]:
    """The questions and responses of pairs: for each pair the chosen response, then the rejected one."""
    return ([pair.question for pair in pairs for _ in range(2)],
            [response for pair in pairs for response in (pair.chosen, pair.rejected)])


def split(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on and held-out ones. No question is in both, and at least one is trained on."""
    questions = list(dict.fromkeys(pair.question for pair in pairs))
    count = min(math.ceil(share * len(questions)), len(questions) - 1)
    held = {questions[index] for index in permutation(len(questions), seed, "held out")[:count]}
    return [pair for pair in pairs if pair.question not in held], [pair for pair in pairs if pair.question in held]


def gradient(model: RewardModel, policy: Policy, pairs: Sequence[Pair], size: int) -> Measures:
    """Adds the gradient of the mean loss per pair, which is independent of the micro-batches of `size` pairs and of the
    ranks that share the pairs."""

    def loss(some: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        rows = model.encode(*both(some))
        scores = policy(lambda _: model.forward(rows))
        margins, sizes = scores[::2] - scores[1::2], torch.tensor([*map(len, rows)], device=scores.device)
        return F.softplus(-margins).sum() / len(pairs), torch.stack([margins, sizes[::2] + sizes[1::2]])

    margins, sizes = torch.cat(policy.add_gradients(policy.share(pairs, size), pairs[:1], loss), dim=1)
    return measure(margins) | {"tokens": int(sizes.sum())}


def measure(margins: Tensor) -> Measures:
    """The loss, the mean margin, and the share of pairs ordered as preferred; a draw counts 1/2."""
    values = {"loss": F.softplus(-margins), "accuracy": (1 + margins.sign()) / 2, "margin": margins}
    return {name: value.mean().item() for name, value in values.items()}

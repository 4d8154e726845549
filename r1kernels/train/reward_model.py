"""Bradley-Terry reward models: the body of a language model, and a number read from the last token of a text.

    p(chosen beats rejected) = sigmoid(r(chosen) - r(rejected)),    loss = -log p

They are `transformers` models for sequence classification with one label, so plain `transformers` loads and runs them.
It reads the last token that is not the padding token. So texts contain no padding token, end in the end token if that
is another one, and are padded on the right.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from r1kernels.rewards import EndpointError
from r1kernels.rewards.text import THINK, after_thinking, prompt_opens_think
from r1kernels.train.checkpoint import latest_checkpoint, load_checkpoint
from r1kernels.train.data import Pair, read_jsonl, whole_response
from r1kernels.train.errors import ConfigError, DataError
from r1kernels.train.log import append_line, cut_lines
from r1kernels.train.model import align, load_tokenizer
from r1kernels.train.prompt import Template
from r1kernels.train.rng import permutation, python_generator
from r1kernels.train.rollout import prompt_tokens
from r1kernels.train.stage import SELECTED, Stage, make_judge
from r1kernels.train.supervised import Measures, Start, fit

TARGET = "reward_target"  # in the saved configuration
Target = Literal["summary", "response"]


def judged_part(target: Target, response: str) -> str:
    """What a reward model sees of a response: all, or the summary after the thought ("" if the thought never ends)."""
    return response if target == "response" else after_thinking("", response) or ""


class TokenPair(NamedTuple):
    """The tokens of the two texts of a pair."""

    question: str
    chosen: list[int]
    rejected: list[int]


class RewardModel:
    """A reward model and its tokenizer.

    Args:
        path: a directory with a model for sequence classification with one label.
        template: of the recipe, as in training.
        batch_size: texts scored at once. A score may depend in its last bits on the texts beside it.
        new: makes one of the causal LM in `path`, for this target, with a head of zeros.
    """

    def __init__(self, path: str | Path, *, template: Literal["r1_zero", "chat"] = "r1_zero",
                 device: torch.device | str = "cpu", batch_size: int = 64, new: Target | None = None) -> None:
        options = {"num_labels": 1} if new else {}
        try:
            model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, **options)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(f"'{path}' holds no model for sequence classification: {reason:.300}") from error
        head = getattr(model, "score", None)
        if type(head) is not torch.nn.Linear or head.out_features != 1:
            raise ConfigError(f"{type(model).__name__} has no linear layer 'score' with one output, so it cannot be a "
                              "reward model; expected another architecture")
        self.model, self.tokenizer = align(model.to(device)).eval(), load_tokenizer(path)
        self.template, self.batch_size = Template(template, self.tokenizer), batch_size
        if new:
            torch.nn.init.zeros_(head.weight)
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
            setattr(self.model.config, TARGET, new)
        self.target: Target = getattr(self.model.config, TARGET, "response")

    def score(self, questions: Sequence[str], responses: Sequence[str]) -> list[float]:
        """The reward of each whole response (see `data.whole_response`); NaN where the model gives no finite number."""
        if len(questions) != len(responses):
            raise ValueError(f"there are {len(questions)} questions and {len(responses)} responses; expected as many")
        return self.score_tokens(self.encode(questions, responses))

    def encode(self, questions: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
        """The tokens of each question and response. A special token that a response spells out is only text."""
        if not questions:
            return []
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
        pad, width, device = self.tokenizer.pad_token_id, max(map(len, rows)), self.model.device
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
        mask = torch.arange(width, device=device) < torch.tensor([[len(row)] for row in rows], device=device)
        return self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[:, 0].float()

    @torch.no_grad()
    def score_tokens(self, rows: Sequence[list[int]]) -> list[float]:
        """As `score`. Rows of similar length are scored together."""
        scores, order = [math.nan] * len(rows), sorted(range(len(rows)), key=lambda index: len(rows[index]))
        for first in range(0, len(order), self.batch_size):
            places = order[first : first + self.batch_size]
            for index, score in zip(places, self.forward([rows[index] for index in places]).tolist(), strict=True):
                scores[index] = score if math.isfinite(score) else math.nan
        return scores


def run(stage: Stage) -> dict[str, Any]:
    """Trains on pairs of responses, and measures the accuracy on the pairs of held-out questions."""
    settings, recipe, path = stage.settings, stage.recipe, latest_checkpoint(stage.directory)
    pairs, summary = (stage.pairs(settings.pairs), {}) if settings.pairs in recipe.data else _judged_pairs(stage)
    checkpoint = load_checkpoint(path) if path else None
    model = RewardModel(
        checkpoint.model_dir if checkpoint else stage.model_path(settings.model),
        template=recipe.template, device=recipe.device, batch_size=settings.micro_batch_size or settings.batch_size,
        new=None if checkpoint else settings.target)
    encoded, left_out = encode_pairs(model, pairs, settings.max_tokens)
    training, held_out = split(encoded, settings.held_out, stage.seed)
    if any(left_out.values()):
        stage.console.say(f"{settings.name}: {left_out} of {len(pairs)} pairs are left out", warning=True)
    summary |= {"pairs": len(training), "held_out_pairs": len(held_out), **left_out}
    start = Start(model.model, model.tokenizer, checkpoint and checkpoint.state)
    summary |= fit(stage, start, training, lambda batch: pair_gradient(
        model, batch, settings.micro_batch_size, stage.interrupt.check))
    if held_out:
        summary |= accuracy(model, held_out)
        stage.console.say(f"{settings.name}: {summary['accuracy']:.1%} ± {summary['accuracy_se']:.1%} of the held-out "
                          "pairs are ordered as preferred")
    return summary


def encode_pairs(model: RewardModel, pairs: Sequence[Pair], most: int) -> tuple[list[TokenPair], dict[str, int]]:
    """The pairs as tokens. Left out are pairs of equal texts, and those with more than `most` tokens in one."""
    questions = [pair.question for pair in pairs]
    chosen = model.encode(questions, [pair.chosen for pair in pairs])
    rejected = model.encode(questions, [pair.rejected for pair in pairs])
    found = [TokenPair(*row) for row in zip(questions, chosen, rejected, strict=True)]
    different = [pair for pair in found if pair.chosen != pair.rejected]
    kept = [pair for pair in different if max(len(pair.chosen), len(pair.rejected)) <= most]
    if not kept:
        raise DataError(f"'pairs': none of {len(found)} pairs has two different texts of at most {most} tokens "
                        "('max_tokens'); expected at least one")
    return kept, {"same": len(found) - len(different), "too_long": len(different) - len(kept)}


def split(pairs: Sequence[TokenPair], share: float, seed: int) -> tuple[list[TokenPair], list[TokenPair]]:
    """Pairs to train on and held-out ones; no question is in both."""
    questions = list(dict.fromkeys(pair.question for pair in pairs))
    count = math.ceil(share * len(questions))
    if count == len(questions):
        raise ConfigError(f"'held_out' is {share}, which leaves none of the {len(questions)} questions to train on")
    held_out = {questions[index] for index in permutation(len(questions), seed, "held out")[:count]}
    return ([pair for pair in pairs if pair.question not in held_out],
            [pair for pair in pairs if pair.question in held_out])


def pair_gradient(
    model: RewardModel, pairs: Sequence[TokenPair], size: int | None, check: Callable[[], None]
) -> Measures:
    """Adds the gradient of the mean loss per pair, which is independent of the micro-batches of `size` pairs."""
    size, margins = size or len(pairs), []
    for first in range(0, len(pairs), size):
        check()
        scores = model.forward([row for pair in pairs[first : first + size] for row in (pair.chosen, pair.rejected)])
        margin = scores[::2] - scores[1::2]
        (F.softplus(-margin).sum() / len(pairs)).backward()
        margins.append(margin.detach())
    return _measures(torch.cat(margins)) | {"tokens": sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)}


def _measures(margins: Tensor) -> Measures:
    """The loss, the mean margin, and the share of pairs ordered as preferred; a draw counts 1/2."""
    right, loss = (margins > 0).float() + 0.5 * (margins == 0), F.softplus(-margins)
    return {"loss": loss.mean().item(), "accuracy": right.mean().item(), "margin": margins.mean().item()}


def accuracy(model: RewardModel, pairs: Sequence[TokenPair]) -> Measures:
    """The measures of held-out pairs, and the standard error over questions, whose pairs are not independent."""
    scores = model.score_tokens([row for pair in pairs for row in (pair.chosen, pair.rejected)])
    margins = torch.tensor(scores[::2]) - torch.tensor(scores[1::2])
    measures = _measures(margins)
    errors: dict[str, float] = {}
    for pair, margin in zip(pairs, margins.tolist(), strict=True):
        right = 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
        errors[pair.question] = errors.get(pair.question, 0.0) + right - measures["accuracy"]
    spread = math.fsum(error**2 for error in errors.values()) * len(errors) / max(1, len(errors) - 1)
    measures["held_out_loss"] = measures.pop("loss")
    return measures | {"accuracy_se": math.sqrt(spread) / len(pairs)}


def candidates(responses: Mapping[str, Sequence[str]], per_question: int, seed: int) -> list[Pair]:
    """Pairs to compare, in no order of quality: of each question's different responses, some two by two."""
    found: list[Pair] = []
    for question, texts in responses.items():
        both = list(itertools.combinations(dict.fromkeys(texts), 2))
        drawn = python_generator(seed, "pairs", question).sample(both, min(per_question, len(both)))
        found += [Pair(str(len(found) + index), question, *pair) for index, pair in enumerate(drawn)]
    return found


def _judged_pairs(stage: Stage) -> tuple[list[Pair], dict[str, int]]:
    """Pairs of the samples of a stage of kind reject on which the judge is clear, and what became of all compared.

    The verdicts are logged in verdicts.jsonl. A resumed stage does not ask for them again.
    """
    settings, verdicts = stage.settings, stage.directory / "verdicts.jsonl"
    responses: dict[str, list[str]] = {}
    for _, row in read_jsonl(stage.directory_of(settings.pairs) / SELECTED, ("question", "prompt", "completion")):
        responses.setdefault(row["question"], []).append(whole_response(row["prompt"], row["completion"]))
    pairs = candidates(responses, settings.judged.per_question, stage.seed)
    judge, size = make_judge(stage.recipe), stage.recipe.scoring.judge.concurrency

    def compare(pair: Pair) -> float | None:
        try:
            first, second = (judged_part(settings.target, text) for text in (pair.chosen, pair.rejected))
            return judge.compare(pair.question, first, second)
        except EndpointError:
            return None

    stage.console.phase(f"{settings.name}: asking the judge")
    lines = cut_lines(verdicts, len(pairs))
    with ThreadPoolExecutor(size) as threads:
        for first in range(len(lines), len(pairs), size):
            stage.interrupt.check()
            asked = pairs[first : first + size]
            for pair, preference in zip(asked, threads.map(compare, asked), strict=True):
                lines.append({"step": len(lines), "question": pair.question, "first": pair.chosen,
                              "second": pair.rejected, "preference": preference})
                append_line(verdicts, lines[-1])
    verdict = [line["preference"] for line in lines]
    kept = [pair if preference > 0 else Pair(pair.id, pair.question, pair.rejected, pair.chosen)
            for pair, preference in zip(pairs, verdict, strict=True)
            if preference and abs(preference) >= settings.judged.margin]
    counts = {"kept": len(kept), "unscorable": verdict.count(None)}
    counts["unclear"] = len(pairs) - sum(counts.values())
    stage.console.say(f"{settings.name}: pairs that the judge compared: {counts}", warning=counts["unscorable"] > 0)
    if not kept:
        verdicts.unlink()  # the judge may have been out of reach, so the next run asks again
        raise DataError(f"'pairs': the judge was clear about no pair of stage '{settings.pairs}' ({counts})")
    return kept, counts

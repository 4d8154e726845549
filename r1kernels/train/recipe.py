"""Every setting of a recipe, with its description, its range and its default.

A recipe is one YAML file: settings of the whole run, named data sets, and named stages that build on each other.
`recipe_file` reads it. The page docs/settings.md is generated from the descriptions below.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from r1kernels import Objective, has_fast_bf16, objectives
from r1kernels.train.errors import naming


class Settings(BaseModel):
    """It refuses unknown keys, values of the wrong type, infinity and NaN."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, extra="forbid")


def setting(description: str, default: Any = ..., **limits: Any) -> Any:
    """A field with its description, its default (required if missing) and its range (`ge`, `gt`, `le`, `lt`)."""
    return Field(default, description=description, **limits)


class RefersTo(tuple[str, ...]):
    """Marks a field that names data sets ("data") or stages, by what they leave ("model", "samples", "scores")."""


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
ImportPath = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
ModelName = Annotated[str, RefersTo(["model"])]
DataNames = Annotated[list[str], RefersTo(["data"])]
SampleNames = Annotated[list[str], RefersTo(["data", "samples"])]
FilePath = Annotated[str, AfterValidator(os.path.abspath)]
HubPath = Annotated[str, AfterValidator(lambda path: os.path.abspath(path) if os.path.exists(path) else path)]


def known_device(device: str) -> str:
    try:
        torch.device(device)
    except RuntimeError:
        raise ValueError("expected a device, such as cpu, cuda or cuda:1") from None
    return device


class Function(Settings):
    """A function of your own, by import path. `import_from` of the recipe says where modules are looked for."""
    function: ImportPath = setting("import path `module:function`")
    options: dict[str, Any] = setting("keyword arguments that the function is called with", {})

    def load(self) -> Callable[..., Any]:
        """The function. Raises ConfigError if it cannot be imported."""
        module, _, name = self.function.partition(":")
        with naming(f"cannot import '{self.function}' (see 'import_from')"):  # a module of the user may fail in any way
            found = getattr(importlib.import_module(module), name)
            if callable(found):
                return found
            raise TypeError(f"it is {found!r:.60}, expected a function")

    def call(self, *arguments: Any) -> Any:
        """The result of the function. Raises ConfigError if it refuses the options."""
        function = self.load()
        with naming(f"'{self.function}' with the options {self.options}", (TypeError, ValueError)):
            return function(*arguments, **self.options)


class DataSet(Settings):
    """What files and data sets of the hub have in common."""
    columns: dict[str, str] = setting("our name of a column: its name in the data set, such as `question: problem`", {})
    answers: Literal["math", "choice", "exact", "code", "open"] = setting("how answers are checked", "math")
    language: Literal["en", "zh"] = setting("language of the questions, in which answers are expected", "en")

    @property
    def held_out(self) -> bool:
        return bool(getattr(self, "test_path", None) or getattr(self, "test_split", None))


class FileData(DataSet):
    """A file of JSON objects, one a line, gzipped or not."""
    kind: Literal["jsonl"]
    path: FilePath | None = setting("file to train on", None)
    test_path: FilePath | None = setting("file with the held-out problems", None)


class HubData(DataSet):
    """A data set of the Hugging Face hub, or a local directory that `datasets.load_dataset` reads."""
    kind: Literal["hub"]
    path: HubPath = setting("name on the hub, or a directory")
    subset: str | None = setting("name of the subset (configuration)", None)
    split: str = setting("split to train on", "train")
    test_split: str | None = setting("split with the held-out problems", None)


class FunctionData(Function):
    """`function(split, count, seed, **options)` returns rows: at most `count` of the split "train" or "test"."""
    kind: Literal["function"]
    held_out: bool = setting("whether the function has problems for the split `test`", True)


Data = Annotated[FileData | HubData | FunctionData, Field(discriminator="kind")]


class Judge(Settings):
    """A language model that judges answers, behind any endpoint that speaks OpenAI's chat completions."""
    url: str = setting("address without `/chat/completions`, such as http://localhost:8000/v1", pattern="^https?://")
    model: str = setting("name of the model on that server")
    api_key_env: str | None = setting("environment variable that holds the key; null sends none", None)
    timeout_s: float = setting("seconds for one answer, retries included", 60.0, gt=0)
    temperature: float = setting("sampling temperature of the judge", 0.7, ge=0)
    concurrency: int = setting("requests in flight at once", 16, ge=1)


class Scoring(Settings):
    """How completions are scored."""
    workers: int = setting("programs that are judged at the same time", 1, ge=1)
    timeout_s: float = setting("seconds that one program may run", 5.0, gt=0)
    memory_mb: int = setting("memory of one program, in MiB", 512, ge=1)
    imports: list[str] | None = setting("packages that programs may import besides the standard library", None)
    overlong_buffer: int = setting("tokens before the limit in which the penalty of `overlong` grows to 1", 4096, ge=1)
    judge: Judge | None = setting("the model that `judge` of stage `reject` asks", None)


class Eval(Settings):
    """The evaluation that ends every stage with a model. RL has one every `every` steps too."""
    every: int = setting("steps of RL between evaluations", 5, ge=1)
    problems: DataNames = setting("data sets with held-out problems; empty for all of them", [])
    questions: int = setting("largest number of questions of each data set", 128, ge=1)
    samples: int = setting("completions of each question", 4, ge=1)
    temperature: float = setting("sampling temperature", 0.6, gt=0)
    top_p: float = setting("share of the probability that is sampled from", 0.95, gt=0, le=1)
    max_new_tokens: int = setting("tokens of a completion at most", 64, ge=1)
    batch_size: int = setting("completions in memory at once", 512, ge=1)


class Checkpoint(Settings):
    """When checkpoints are written."""
    every: int = setting("steps of RL between checkpoints", 5, ge=1)
    supervised_every: int = setting("steps of other training between checkpoints", 200, ge=1)
    keep: int = setting("checkpoints to keep", 2, ge=1)


class ObjectiveSettings(Settings):
    """The policy loss: a preset of `r1kernels.objectives`, or a function of your own, which returns an `Objective` or a
    callable `(logprobs, batch) -> loss per token`."""
    preset: Literal[
        "grpo", "r1", "bnpo", "dr_grpo", "dapo", "gspo", "gspo_token", "gmpo", "luspo", "cispo", "sapo", "dppo", "ipo",
        "vespo", "reinforce",
    ] = setting("name of a preset", "r1")
    function: ImportPath | None = setting("import path `module:function`, in place of a preset", None)
    options: dict[str, Any] = setting("fields of the preset to override, or arguments of the function", {})

    def build(self, where: str = "objective") -> Objective:
        """The objective. Raises ConfigError for an unknown field or a value out of range; `where` is its key."""
        make = Function(function=self.function).load() if self.function else getattr(objectives, self.preset)
        with naming(f"'{where}.options'", (TypeError, ValueError)):
            made = make(**self.options)
            return made if isinstance(made, Objective) else Objective(surrogate=made, aggregate="token_mean")


class Importance(Settings):
    """Correction of the gap between the policy that sampled a completion and the one that is trained on it."""
    mode: Literal["none", "truncate", "mask"] = setting("how weights outside [floor, cap] are treated", "none")
    level: Literal["token", "sequence", "sequence_mean"] = setting(
        "one weight a token, or the product or the geometric mean of those of a sequence", "token")
    cap: float = setting("largest weight", 2.0, ge=1, lt=4e8)
    floor: float = setting("smallest weight", 0.0, ge=0, le=1)
    normalize: bool = setting("divide the weights of a rollout by their mean", False)


class SamplerSettings(Settings):
    """Where completions come from: a model in this process, or vLLM servers, which need `urls` and `weights_dir`."""
    kind: Literal["transformers", "vllm"] = setting("`transformers`: this process; `vllm`: servers", "transformers")
    urls: list[Annotated[str, Field(pattern="^https?://")]] = setting("servers, such as http://localhost:8000", [])
    weights_dir: str | None = setting("directory for weights in training, under the same path for the servers", None)
    weights: Function | None = setting("in place of that: `function(servers, **options)`; see examples/nccl", None)
    sleep: bool = setting("servers share the device with the trainer, and free its memory during updates", False)
    requests: int = setting("requests in flight at once, for each server", 64, ge=1)
    timeout_s: float = setting("seconds for one request, retries included", 3600.0, gt=0)


class PreferenceReward(Settings):
    """Adds the score of a reward model to the reward of open problems."""
    model: Annotated[str, RefersTo(["scores"])] = setting("stage of kind `preference`")
    weight: float = setting("factor of the score", 1.0)
    last_steps: int | None = setting("count it only in this many last steps; null for all", None, ge=1)


class Filters(Settings):
    """Limits of rejection sampling; null turns one off. The paper names the filters and gives no numbers."""
    format: bool = setting("require the tags of the template, once each and in order", True)
    language: float | None = setting("least share of words in the language of the question", 0.9, ge=0, le=1)
    paragraph: int | None = setting("most words without a line break", 256, ge=1)
    code_blocks: bool = setting("allow code blocks in the thought", False)
    line_repeats: int | None = setting("repetitions of the same lines that make a loop", 4, ge=2)


class Lora(Settings):
    """Adapters of low rank (LoRA, by peft), trained in place of the weights. Checkpoints hold the merged weights."""
    r: int = setting("rank", 16, ge=1)
    alpha: float = setting("the adapters' product is multiplied by alpha / r", 32.0, gt=0)
    target_modules: list[str] = setting(
        "names of the layers that get an adapter; not the output layer",
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], min_length=1)


class StageSettings(Settings):
    name: Name = Field(description="the key of the stage in `stages`; names its directory", exclude=True)


class Model(StageSettings):
    """A pretrained model."""
    kind: Literal["model"]
    path: HubPath = setting("directory, or name on the hub")
    overrides: dict[str, Any] = setting("fields of its configuration to change, e.g. max_position_embeddings", {})


class Pretrain(StageSettings):
    """Next-token training of a new, small model."""
    kind: Literal["pretrain"]
    architecture: Function = setting("`function(seed, **options)` returns an untrained model and its tokenizer")
    corpus: Function = setting("`function(seed, step, **options)` yields documents as (head, tail), without end")
    steps: int = setting("updates", 600, ge=1)
    batch_size: int = setting("rows of an update", 8, ge=1)
    window: int = setting("tokens of a row", 128, ge=1)
    learning_rate: float = setting("highest learning rate; it falls linearly", 3e-3, gt=0)


class Training(StageSettings):
    """Epochs over given texts, with AdamW and a learning rate that falls in a cosine."""
    model: ModelName = setting("stage whose model this starts from, with a new optimizer")
    epochs: int = setting("passes over the samples or pairs", 2, ge=1)
    batch_size: int = setting("samples or pairs of an update", 128, ge=1)
    micro_batch_size: int | None = setting("rows or pairs in memory at once; null for all", None, ge=1)
    learning_rate: float = setting("highest learning rate", 5e-5, gt=0)
    final_learning_rate: float | None = setting("rate of the last update, after a cosine; null: a tenth", None, ge=0)
    warmup_steps: int = setting("updates of linear warm-up", 0, ge=0)
    weight_decay: float = setting("weight decay of AdamW", 0.0, ge=0)
    grad_clip: float = setting("largest norm of the gradient", 1.0, gt=0)


class SFT(Training):
    """Supervised fine-tuning on responses, never on their prompts. The defaults are the paper's for its cold start."""
    kind: Literal["sft"]
    samples: SampleNames = setting("stages of kind `reject` and data sets with responses", min_length=1)
    window: int = setting("tokens of a row into which samples are packed; longer samples are left out", 32768, ge=1)
    lora: Lora | None = setting("train adapters; null trains all weights", None)


class Distill(SFT):
    """Distillation into a smaller model: SFT on samples (the paper), or matching a teacher with the same tokenizer."""
    kind: Literal["distill"]
    batch_size: int = setting("samples of an update", 64, ge=1)
    learning_rate: float = setting("highest learning rate", 1e-4, gt=0)
    method: Literal["samples", "logits"] = setting("SFT on samples, or match the teacher's distributions", "samples")
    teacher: Annotated[str | None, RefersTo(["model"])] = setting("stage whose model is matched, for `logits`", None)


class GRPO(StageSettings):
    """Reinforcement learning: a step is one rollout of `questions` x `group_size` completions and the updates on it."""
    kind: Literal["grpo"]
    model: ModelName = setting("stage whose model is trained")
    problems: DataNames = setting("data sets to ask", min_length=1)
    rewards: dict[str, float] = setting("weights; a weight of 0 only reports", {"accuracy": 1.0, "format": 1.0})
    preference: list[PreferenceReward] = setting("reward models for open problems", [])
    steps: int = setting("rollouts", 40, ge=1)
    questions: int = setting("questions of a rollout", 32, ge=1)
    group_size: int = setting("completions of a question", 16, ge=2)
    oversample: int = setting("factor of questions asked; groups whose rewards differ are kept (DAPO)", 1, ge=1)
    minibatches: int = setting("updates of one pass over a rollout", 4, ge=1)
    epochs: int = setting("passes over a rollout", 1, ge=1)
    micro_batch_tokens: int | None = setting("tokens a device trains on at once, prompts too; null: all", None, ge=1)
    learning_rate: float = setting("learning rate of AdamW", 3e-6, gt=0)
    warmup_updates: int = setting("updates of linear warm-up", 0, ge=0)
    grad_clip: float = setting("largest norm of the gradient", 1.0, gt=0)
    rollout_batch_size: int | None = setting("completions sampled at once; null for all", None, ge=1)
    temperature: float = setting("sampling temperature", 1.0, gt=0)
    max_new_tokens: int = setting("tokens of a completion at most", 64, ge=1)
    length_schedule: dict[int, pydantic.PositiveInt] = setting("step: value of max_new_tokens from there on", {})
    top_p: float = setting("share of the probability that is sampled from", 1.0, gt=0, le=1)
    top_k: int | None = setting("number of likeliest tokens that are sampled from; null: all", None, ge=1)
    min_p: float = setting("least probability, as a share of the highest, that is sampled from", 0.0, ge=0, lt=1)
    sampling_replay: bool = setting(
        "where these leave tokens out, log-probs are over the tokens that sampling kept; see docs/sampling.md", True)
    lora: Lora | None = setting("train adapters; null trains all weights", None)
    ref_refresh_every: int = setting("steps after which the reference becomes the current model", 400, ge=1)
    advantage_baseline: Literal["mean", "leave_one_out", "length_weighted"] = setting(
        "what is subtracted from a reward: the mean of its group (GRPO), the mean of the other rewards of the group "
        "(RLOO), or the mean weighted by length (OPO); for the last two set `advantage_scale: none`", "mean")
    advantage_scale: Literal["group_std", "batch_std", "none"] = setting("what divides group advantages", "group_std")
    advantages: Function | None = setting("`function(trainer, **options)` in place of these; see examples/ppo", None)
    objective: ObjectiveSettings = setting("the policy loss", ObjectiveSettings())
    rollout_ahead: Literal[0, 1] = setting(
        "1 samples the next step while this one updates: from weights one step older; needs `importance.mode`", 0)
    importance: Importance = setting("correction of the gap between sampler and trainer", Importance())

    @property
    def updates(self) -> int:
        return self.epochs * self.minibatches

    @property
    def replays(self) -> bool:
        """Whether log-probs are over what sampling kept, because it leaves tokens out."""
        return self.sampling_replay and (self.top_p < 1 or self.top_k is not None or self.min_p > 0)

    def limit(self, step: int) -> int:
        """The largest number of tokens of a completion at a step."""
        reached = [start for start in self.length_schedule if start <= step]
        return self.length_schedule[max(reached)] if reached else self.max_new_tokens


class Reject(StageSettings):
    """Rejection sampling: samples completions and keeps those that are right and readable."""
    kind: Literal["reject"]
    model: ModelName = setting("stage whose model is sampled")
    problems: DataNames = setting("data sets to ask", min_length=1)
    questions: int | None = setting("use the first questions only; null for all", None, ge=1)
    samples_per_question: int = setting("completions of a question", 16, ge=1)
    keep_per_question: int | None = setting("keep the first ones that pass; null for all", None, ge=1)
    questions_per_batch: int = setting("questions that are sampled and then scored together", 32, ge=1)
    rollout_batch_size: int | None = setting("completions sampled at once; null for all", None, ge=1)
    temperature: float = setting("sampling temperature", 1.0, gt=0)
    max_new_tokens: int = setting("tokens of a completion at most", 64, ge=1)
    top_p: float = setting("share of the probability that is sampled from", 1.0, gt=0, le=1)
    filters: Filters = setting("what makes a completion unreadable", Filters())
    judge: bool = setting("ask `scoring.judge` whether answers to open problems equal their reference", False)


class Preference(Training):
    """A reward model of preferences (Bradley-Terry), trained on pairs of responses."""
    kind: Literal["preference"]
    pairs: Annotated[str, RefersTo(["data"])] = setting("data set with pairs")
    target: Literal["summary", "response"] = setting("score the text after the thought, or the whole", "response")
    epochs: int = setting("passes over the pairs", 1, ge=1)
    batch_size: int = setting("pairs of an update", 256, ge=1)
    learning_rate: float = setting("highest learning rate", 6e-6, gt=0)
    held_out: float = setting("share of the questions whose pairs only measure the accuracy", 0.1, ge=0, le=1)
    max_tokens: int = setting("pairs with a longer text are left out", 8192, ge=1)


Stages = Model | Pretrain | SFT | GRPO | Reject | Preference | Distill
# What a stage of each kind leaves.
LEAVES = {"model": "model", "pretrain": "model", "sft": "model", "grpo": "model", "distill": "model",
          "reject": "samples", "preference": "scores"}


class Parallel(Settings):
    """How the ranks of `torchrun` share a model. They share the data and its shards in any case."""
    tensor: int = setting("ranks that split layers and vocabulary among them (tensor parallelism)", 1, ge=1)
    timeout_s: float = setting("seconds that a rank waits for the others before the run ends", 1800.0, gt=0)


class Recipe(Settings):
    """A run."""
    run_dir: FilePath = setting("directory of everything that the run writes")
    seed: int = setting("seed of all random numbers", 0, ge=0)
    threads: int | None = setting("threads of torch on the CPU; null for torch's own choice", None, ge=1, le=4096)
    device: Annotated[str, AfterValidator(known_device)] = setting(
        "device of the model, such as cpu, cuda or cuda:1", "cpu")
    precision: Literal["bf16", "fp32"] | None = setting("what models compute in; null: bf16 where it is fast", None)
    gradient_checkpointing: bool = setting("compute layers again in the backward: less memory, more time", False)
    optimizer_state: Literal["fp32", "8bit"] = setting("the memory of AdamW; 8bit needs the package torchao", "fp32")
    compile: bool = setting("compile the model's layers with torch.compile", False)
    parallel: Parallel = setting("how ranks share the work", Parallel())
    template: Literal["r1_zero", "chat"] = setting("the paper's prompt, or the model's chat template", "r1_zero")
    open_think: bool = setting("end the prompt with `<think>`", False)
    import_from: list[str] = setting("directories of modules for import paths, relative to the recipe", [])
    data: dict[Name, Data] = setting("data sets by name", {})
    sampler: SamplerSettings = setting("where completions come from", SamplerSettings())
    scoring: Scoring = setting("how completions are scored", Scoring())
    eval: Eval = setting("the evaluation that ends every stage", Eval())
    checkpoint: Checkpoint = setting("when checkpoints are written", Checkpoint())
    trackers: list[Literal["tensorboard"]] = setting("where else metrics are shown", [])
    stages: dict[Name, Annotated[Stages, Field(discriminator="kind")]] = setting("the stages by name", min_length=1)

    @property
    def dtype(self) -> torch.dtype:
        """What models compute with on the device of the run."""
        fast = has_fast_bf16(self.device) if self.precision is None else self.precision == "bf16"
        return torch.bfloat16 if fast else torch.float32

    @property
    def eval_problems(self) -> list[str]:
        return self.eval.problems or [name for name, data in self.data.items() if data.held_out]

"""What cases are made of: a setting, candidates, shapes of real models."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import r1kernels
from gpu.timing import Timed
from r1kernels import _library
from r1kernels.bench.tasks import OURS, name_of  # ours: by Triton's kernels, on a GPU

CUDA = f"{OURS}, cuda"  # by those in CUDA C++
COPY = "copy"  # of the bytes that count in a case of bandwidth
PRODUCTS = "bare products"
FLUSHED = f"{OURS}, two accumulators"
FLOAT32_PRODUCT = "float32 product, exact log-softmax"


class Setting(NamedTuple):
    """`small`: shapes so small that a CPU rehearses them in seconds. `lean`: only our kernels and the ceilings."""

    device: torch.device
    small: bool = False
    compiled: bool = True  # torch.compile takes part
    lean: bool = False

    @property
    def cuda(self) -> str:
        """The backend of the candidates `CUDA`: a stand-in where a CPU rehearses, "" where there is none."""
        if self.device.type == "cpu" and not _library.EMULATED:
            return "auto"
        return "" if _library.cuda_missing(self.device.type) else "cuda"

    @property
    def gpu_operators(self) -> bool:
        """Whether operators that only GPUs have can run."""
        return self.device.type == "cuda" or _library.EMULATED

    @property
    def fused_step(self) -> bool:
        """Whether the fused step can run."""
        return self.gpu_operators and bool(self.cuda)


class Candidate(NamedTuple):
    """`check` raises where results differ from float64: no number is taken of such a candidate."""

    timed: Timed
    check: Callable[[], object] = lambda: None
    graph: bool = False  # replayed from a CUDA graph


def by_cuda(candidate: Candidate, setting: Setting) -> Candidate:
    def served(run: Callable[[], object]) -> Callable[[], object]:
        def on_backend() -> object:
            with r1kernels.backend(setting.cuda):
                return run()

        return on_backend

    timed = candidate.timed._replace(run=served(candidate.timed.run), prepare=served(candidate.timed.prepare))
    return candidate._replace(timed=timed, check=served(candidate.check))


def with_cuda(candidates: dict[str, Candidate], setting: Setting) -> dict[str, Candidate]:
    """`OURS` once more, as `CUDA`."""
    if not setting.cuda:
        return candidates
    ours = {OURS: candidates[OURS], CUDA: by_cuda(candidates[OURS], setting)}
    return ours | {name: candidate for name, candidate in candidates.items() if name != OURS}


class Case(NamedTuple):
    """One table of candidates.

    bytes: what must move, each read or write once; 0 where that is no measure. flop: of the products, or of the
    arithmetic on entries. inherent_bytes: results and an fp32 sum of the weight's gradient, which peak memory holds in
    any implementation.
    """

    op: str
    case: str
    shape: str
    dtype: torch.dtype
    candidates: dict[str, Candidate]
    bytes: int = 0
    flop: int = 0
    inherent_bytes: int = 0

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.op, self.case, self.shape, name_of(self.dtype)


class Logits(NamedTuple):
    """N rows of V logits."""

    tokens: int
    vocab: int
    main: bool = False  # the shape of the bars: the one where torch.compile takes part

    def __str__(self) -> str:
        return f"{self.tokens} x {self.vocab}"


class Head(NamedTuple):
    """N tokens, width H, vocabulary V."""

    tokens: int
    width: int
    vocab: int

    def __str__(self) -> str:
        return f"N {self.tokens}, H {self.width}, V {self.vocab}"


def logits_shapes(setting: Setting) -> list[Logits]:
    if setting.small:
        return [Logits(64, 1_031, True)]
    return [Logits(8192, 151_936, True), Logits(4096, 128_256), Logits(8192, 32_000)]


def step_shapes(setting: Setting) -> list[tuple[Logits, torch.dtype]]:
    """Many rows and few, vocabularies of real models (of 50,257 most rows begin off 16 bytes), and the other dtypes."""
    if setting.small:
        return [(Logits(64, 1_031, True), torch.bfloat16), (Logits(16, 4_096), torch.float32),
                (Logits(16, 1_031), torch.float16)]
    vocabularies = [32_000, 50_257, 100_352, 128_256, 262_144]
    main, *others = logits_shapes(setting)
    shapes = [main, Logits(256, main.vocab), *others, *(Logits(main.tokens, vocab) for vocab in vocabularies)]
    wide = [(Logits(main.tokens, main.vocab), dtype) for dtype in (torch.float32, torch.float16)]
    return [*((shape, torch.bfloat16) for shape in dict.fromkeys(shapes)), *wide]


def policy_shapes(setting: Setting) -> list[tuple[int, int]]:
    """(B, T)."""
    return [(16, 8), (8, 4)] if setting.small else [(64, 512), (8, 512)]


def head_shape(setting: Setting) -> Head:
    return Head(64, 32, 1_031) if setting.small else Head(8192, 4096, 151_936)


def policy_head_shapes(setting: Setting) -> list[Head]:
    """That of the bars, and that of the figure that Liger published."""
    return [head_shape(setting), Head(32, 128, 1_024) if setting.small else Head(8192, 4096, 131_072)]


def cross_entropy_head_shapes(setting: Setting) -> list[Head]:
    """That of the bars, and that of the figures that QuACK and Liger published."""
    return [head_shape(setting), Head(32, 128, 1_024) if setting.small else Head(2048, 4096, 128_256)]


class LeftOut(RuntimeError):
    """A candidate does not take part. The message says why."""


def quietly(load: Callable[[], Any]) -> Any | None:
    """What `load` gives, or None if it fails. Its warnings are not ours to raise."""
    try:
        return _without_warnings(load)
    except Exception:
        return None


def _without_warnings(load: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load()


def peers(setting: Setting, loaders: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Functions of other libraries by name. One that cannot be loaded raises `LeftOut` when it is called, so that the
    reason is in the results."""
    return {} if setting.lean else {name: _peer(load) for name, load in loaders.items()}


def _peer(load: Callable[[], Any]) -> Any:
    try:
        return _without_warnings(load)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"

    def missing(*_: Any, **__: Any) -> Any:
        raise LeftOut(reason)

    return missing

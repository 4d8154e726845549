"""Checkpoints that are complete or absent, and files that are replaced as a whole.

    <stage>/checkpoints/step-000123/model/         loads with plain transformers: the whole weights in float32
                                    shards/        tensors that ranks share, such as the optimizer's state
                                    state.pt       everything else that a resumed run needs

Every rank writes its shards (torch.distributed.checkpoint), so another number of ranks can read them. All ranks must
see the same directory. A checkpoint is written under a hidden name, flushed to the disk and renamed. So a directory
`step-*` is always complete, whenever the process was killed. It never changes: equal steps of a run have equal states.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from r1kernels.train.errors import StorageError, is_lost_contact, naming
from r1kernels.train.parallel import first, rank
from r1kernels.train.policy import Policy

MODEL, STATE, SHARDS, PARTIAL = "model", "state.pt", "shards", ".partial-"
Shards = dict[str, Any]  # nested, with sharded tensors as leaves
BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)  # `parallel.tensor` changes the optimizer's groups


def save_checkpoint(
    directory: Path, step: int, *, policy: Policy, tokenizer: Any, shards: Shards, state: dict[str, Any], keep: int
) -> None:
    """Writes checkpoint number `step`, unless it exists, and removes all but the last `keep`. All ranks must call it.

    `shards` holds sharded tensors; `state` tensors and plain containers of numbers and strings, so that loading it runs
    no code. Raises StorageError if writing fails, for example on a full disk.
    """
    root = Path(directory) / "checkpoints"
    final, partial = root / f"step-{step:06d}", root / f"{PARTIAL}step-{step:06d}"
    try:
        if not first(lambda: _begin(final, partial, keep)):
            return
        save_model(policy, partial / MODEL)
        first(lambda: _write_state(partial, tokenizer, state))
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is one rank
            dcp.save(shards, storage_writer=_Writer(partial / SHARDS))
        first(lambda: _finish(final, partial))
    except (Exception, dcp.CheckpointException) as error:
        if is_lost_contact(error):
            raise
        raise StorageError(
            f"cannot write the checkpoint {final}: {_reason(error)}; earlier ones are unchanged") from error
    finally:
        if rank() == 0:
            tidy_checkpoints(directory, keep)


class _Writer(dcp.FileSystemWriter):
    """Writes shards. To other ranks an error goes alone, so it must be the reason itself."""

    def write_data(self, *given: Any) -> Any:
        try:
            return super().write_data(*given)
        except Exception as error:
            raise _reason(error) from None


def _reason(error: BaseException) -> BaseException:
    """The error of the system below an error of torch, which names the byte but not the reason."""
    failures = getattr(error, "failures", {0: (error,)})  # of a CheckpointException, which is no Exception
    error = next(iter(failures.values()))[0]
    while error.__context__ and not isinstance(error, OSError):
        error = error.__context__
    return error


def _begin(final: Path, partial: Path, keep: int) -> bool:
    tidy_checkpoints(final.parent.parent, keep)
    if not final.exists():
        (partial / MODEL).mkdir(parents=True)
    return not final.exists()


def save_model(policy: Policy, directory: Path) -> None:
    """Writes the whole weights in float32, as transformers does. All ranks must call it."""
    weights = {name: weight.cpu() for name, weight in policy.weights() if rank() == 0}

    def write() -> None:
        policy.model.save_pretrained(directory, state_dict=weights)
        config = copy.deepcopy(policy.model.config)
        config.dtype = torch.float32
        config.save_pretrained(directory)

    first(write)


def _write_state(partial: Path, tokenizer: Any, state: dict[str, Any]) -> None:
    tokenizer.save_pretrained(partial / MODEL)
    with open(partial / STATE, "wb") as file:  # with a path, torch would not say why it cannot write
        torch.save(state, file)
    torch.load(partial / STATE, mmap=True, map_location="cpu", weights_only=True)  # fails if it would run code


def _finish(final: Path, partial: Path) -> None:
    for entry in (*partial.rglob("*"), partial, *final.parent.parent.glob("*.jsonl")):  # the lines of earlier steps too
        _sync(entry)
    partial.rename(final)
    _sync(final.parent)


def load_checkpoint(path: Path) -> tuple[Path, dict[str, Any]]:
    """The directory of its model, and its state with tensors on the CPU. Raises StorageError."""
    with naming(damaged(path / STATE), made=StorageError):
        return path / MODEL, torch.load(path / STATE, map_location="cpu", weights_only=True)


def shards_of(policy: Policy, optimizer: torch.optim.Optimizer, reference: Any = None) -> Shards:
    """The sharded tensors of a training: what the optimizer remembers, adapters, and the weights of the reference."""
    trained, fresh = policy.trained(), not optimizer.state  # the optimizer does not know gathered weights
    shards: Shards = {"optimizer": get_optimizer_state_dict(policy, optimizer, options=BY_NAME)}
    for state in optimizer.state.values() if fresh else ():  # torch fills it by an update of 0, which it counts
        state["step"].zero_()
    if any(".lora_" in name for name in trained):
        shards["adapters"] = {name: weight.detach() for name, weight in trained.items()}
    if reference is not None:
        shards["reference"] = reference.shards()
    return shards


def load_state(path: Path, policy: Policy, optimizer: torch.optim.Optimizer, reference: Any = None) -> None:
    """Fills them from a checkpoint, also from one of another number of ranks. All ranks must call it."""
    shards = shards_of(policy, optimizer, reference)
    with naming(damaged(path / SHARDS), made=StorageError), warnings.catch_warnings(
            action="ignore", category=UserWarning):
        try:
            dcp.load(shards, checkpoint_id=path / SHARDS)
        except dcp.CheckpointException as error:  # which is no Exception, and begins with a traceback
            raise _reason(error) from None
    set_optimizer_state_dict(policy, optimizer, shards["optimizer"], options=BY_NAME)


def damaged(part: Path) -> str:
    return f"{part} cannot be loaded; delete {part.parent}, and its stage continues from an earlier one or begins again"


def latest_checkpoint(directory: Path) -> Path | None:
    """The last checkpoint in a stage's directory, or None."""
    return (_complete(Path(directory) / "checkpoints") or [None])[-1]


def tidy_checkpoints(directory: Path, keep: int) -> None:
    """Removes the rest of a killed save and all but the last `keep` checkpoints. The next call retries a failure."""
    root = Path(directory) / "checkpoints"
    with contextlib.suppress(OSError):
        for path in list(root.glob(f"{PARTIAL}*")):
            shutil.rmtree(path)
        for path in _complete(root)[:-keep]:
            shutil.rmtree(path.rename(root / f"{PARTIAL}{path.name}"))  # a kill never leaves half of a `step-*`


def write_file(path: Path, content: str | bytes) -> None:
    """Replaces a file as a whole. Raises StorageError if that fails; the old file is unchanged then."""
    aside = path.with_name(f".{path.name}")
    path.parent.mkdir(exist_ok=True)
    try:
        aside.write_bytes(content.encode("utf-8", "replace") if isinstance(content, str) else content)
        _sync(aside)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written: {error.strerror}; the old file is unchanged") from error


def _complete(root: Path) -> list[Path]:
    """The checkpoints in their order."""
    steps = {path: path.name.removeprefix("step-") for path in root.glob("step-*")}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)

"""Trackers show a run's metrics elsewhere; the run's own logs never depend on them.

* tensorboard: events in `tensorboard/<run name>` of the given directory, flushed every step. A resumed run marks the
  step where it starts again, and TensorBoard drops what earlier events hold of that and later steps: no point is
  missing or there twice.
* trackio: project and run of the given names. It cannot take points back: after a resume, the steps since the last
  checkpoint are there twice, with the same values. Points it held in memory (half a second) when a process was killed
  are missing.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from r1kernels.train.schema import ConfigError


class _Backend(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, directory: Path, run_name: str, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard" / run_name), purge_step=first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    def __init__(self, directory: Path, run_name: str, first_step: int) -> None:
        import trackio

        self._run = trackio.init(
            project=directory.absolute().name, name=run_name, resume="allow" if first_step else "never", embed=False
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


# Each needs the package, and comes with the extra, of its name.
BACKENDS: dict[str, Callable[[Path, str, int], _Backend]] = {"tensorboard": _TensorBoard, "trackio": _Trackio}


def check_trackers(names: Sequence[str]) -> None:
    """That all trackers asked for exist and are installed.

    Raises:
        ConfigError: one does not or is not.
    """
    for name in names:
        if name not in BACKENDS:
            raise ConfigError(f"'trackers' names {name!r}, expected some of {', '.join(BACKENDS)}")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"'trackers' names {name!r}, whose package is not installed; install it with: "
                f"pip install 'r1kernels[train,{name}]'"
            )
    if len(set(names)) < len(names):
        raise ConfigError(f"'trackers' is {list(names)}, expected each name once")


class Trackers:
    """Hands every step's metrics to the trackers; one that fails is left out from then on, with one warning.

    Args:
        names: of the trackers; see `check_trackers`.
        directory: of the run; its name is that of the run's project.
        run_name: what the steps belong to: a stage.
        warn: told of a tracker that failed.
    """

    def __init__(
        self,
        names: Sequence[str],
        directory: str | Path,
        run_name: str,
        warn: Callable[[str], Any] = lambda text: warnings.warn(text, RuntimeWarning, stacklevel=3),
    ) -> None:
        check_trackers(names)
        self._directory, self._run_name, self._warn = Path(directory), run_name, warn
        self._waiting, self._open = list(names), {}

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """The finite numbers of a step. Steps before the first one written are taken to be there already."""
        values = {
            name: value for name, value in metrics.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        for name in self._waiting:
            self._try(name, lambda name=name: self._start(name, step))
        self._waiting = []
        for name, backend in list(self._open.items()):
            self._try(name, lambda backend=backend: backend.write(step, values))

    def close(self) -> None:
        for name, backend in list(self._open.items()):
            self._try(name, backend.close)
        self._open = {}

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self, name: str, step: int) -> None:
        self._open[name] = BACKENDS[name](self._directory, self._run_name, step)

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._open.pop(name, None)
            self._warn(
                f"the tracker {name} failed and is left out from here on ({type(error).__name__}: {error}); "
                "the run's own metrics are complete"
            )

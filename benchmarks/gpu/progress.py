"""What earlier commands have measured, so that a command that was cut off goes on where it ended.

A record "started" opens an attempt at a case, "checking" names the candidate that comes next (none: the timing), and
"finished" or "stopped" (by the time limit) closes it. A case is done when it is finished without a failure. The next
command tries a failed, a stopped or an open one again; the same command only if a candidate of others may have ended
the attempt, which is then left out.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gpu import records
from gpu.setting import COPY, OURS, PRODUCTS

Key = tuple[str, ...]
KINDS = ("started", "checking", "finished", "stopped")
ENDED = "an earlier attempt ended while it was checked"


def command() -> str:
    """The number of this command of `run_on_gpu.sh`."""
    return os.environ.get("R1KERNELS_GPU_COMMAND", "1")


def suspicious(candidate: str) -> bool:
    """Whether a candidate can be left out: not ours, and no ceiling."""
    return candidate not in ("", COPY, PRODUCTS) and not candidate.startswith(OURS)


class Progress:
    """The attempts at the cases of one group, by the kernels whose hash is `kernels`."""

    def __init__(self, folder: Path, group: str, kernels: str) -> None:
        self.folder, self.place = folder, {"group": group, "kernels": kernels}
        self.attempts: dict[Key, list[dict[str, Any]]] = {}
        for record in records.read(folder):
            if record["kind"] in KINDS and self.place.items() <= record.items():
                self._note(record["kind"], tuple(record["key"]), record)

    def _note(self, kind: str, key: Key, record: dict[str, Any]) -> None:
        if kind == "started":
            self.attempts.setdefault(key, []).append({"command": record["command"], "checking": "", "end": ""})
        elif kind == "checking":
            self.attempts[key][-1]["checking"] = record["candidate"]
        else:
            self.attempts[key][-1]["end"] = "failed" if record.get("failed") else kind

    def append(self, kind: str, key: Key, **fields: Any) -> None:
        record = {**self.place, "key": list(key), **fields}
        if kind == "started":
            record["command"] = command()
        records.append(self.folder, kind, record)
        self._note(kind, key, record)

    def suspects(self, key: Key) -> dict[str, str]:
        """Candidates that are left out, with the reason."""
        found = [each["checking"] for each in self.attempts.get(key, ()) if not each["end"]]
        return {name: ENDED for name in found if suspicious(name)}

    def is_due(self, key: Key) -> bool:
        if key not in self.attempts:
            return True
        last = self.attempts[key][-1]
        if last["command"] == command():
            return not last["end"] and suspicious(last["checking"])
        return last["end"] != "finished"

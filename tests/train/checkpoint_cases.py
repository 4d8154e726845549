"""What takes the place of a policy where only the files of its checkpoints matter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Files:
    """Writes files. It takes the place of a policy, of its model, of the model's configuration, and of a tokenizer."""

    def __init__(self, **contents: bytes) -> None:
        self.contents = contents

    @property
    def model(self) -> Files:
        return self

    @property
    def config(self) -> Files:
        return self

    def weights(self) -> Iterator[Any]:
        return iter(())

    def save_pretrained(self, directory: Path, **options: Any) -> None:
        for name, content in self.contents.items():
            (Path(directory) / name).write_bytes(content)

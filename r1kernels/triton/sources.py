"""Which files of this folder decide what the kernels compile to, and a hash of them. Imports no Triton.

Whatever is measured or compiled carries the hash; a result whose hash is another's is of other kernels.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent
# All others hold kernels or what kernels share; the tables (*.json) choose tiles.
NOT_KERNELS = ("__init__.py", "aot.py", "sass.py", "sources.py")


def kernel_sources() -> list[Path]:
    """The modules with kernels and the tables they choose their tiles from."""
    modules = [path for path in FOLDER.glob("*.py") if path.name not in NOT_KERNELS]
    return sorted(modules + list(FOLDER.rglob("*.json")))


def kernel_sources_hash() -> str:
    """Sixteen digits of the SHA-256 over names and texts of `kernel_sources`."""
    digest = hashlib.sha256()
    for path in kernel_sources():
        digest.update(f"{path.relative_to(FOLDER).as_posix()}\n{path.read_text(encoding='utf-8')}\0".encode())
    return digest.hexdigest()[:16]

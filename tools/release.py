"""Builds the two files that would be uploaded to a package index, and checks them: `make release`. Uploads nothing.

    python tools/release.py DIST_DIR

It refuses a tree with changes that are not committed, and a version that CHANGELOG.md or CITATION.cff does not name.
`make release` sets R1KERNELS_CUDA=1, so that a machine without nvcc cannot make a release without CUDA kernels by
mistake; R1KERNELS_CUDA=0 says that this is what you want.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from trove_classifiers import classifiers

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
OLDEST_GLIBC = (2, 28)
# torch brings these libraries; a wheel that holds a copy, or needs another one, is wrong.
OF_TORCH = {"libc10.so", "libtorch.so", "libtorch_cpu.so"}


def version_of(source: str) -> str:
    """The value of `__version__` in the text of r1kernels/__init__.py."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise ValueError("r1kernels/__init__.py does not set __version__")


def refusals(root: Path) -> list[str]:
    """Why a release cannot be made from this tree."""
    version = version_of((root / "r1kernels" / "__init__.py").read_text(encoding="utf-8"))
    found = []
    status = subprocess.run(["git", "-C", root, "status", "--porcelain"], capture_output=True, text=True, check=True)
    if status.stdout:
        found.append(f"the tree has changes that are not committed; commit or remove them:\n{status.stdout.rstrip()}")
    listed = re.findall(r"^## (\S+)", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    if version not in listed:
        found.append(f"CHANGELOG.md lists {', '.join(listed) or 'no version'}, expected a section '## {version}'")
    cited = re.search(r"^version: (\S+)", (root / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    if cited is None or cited[1] != version:
        found.append(f"CITATION.cff has version {cited and cited[1]}, expected {version}")
    return found


def built(dist: Path) -> tuple[Path, Path]:
    """The source distribution and the wheel in a folder that should hold nothing else."""
    archives, wheels = sorted(dist.glob("*.tar.gz")), sorted(dist.glob("*.whl"))
    if len(archives) != 1 or len(wheels) != 1 or len(list(dist.iterdir())) != 2:
        names = ", ".join(sorted(path.name for path in dist.iterdir()))
        raise ValueError(f"{dist} has {names or 'no file'}, expected one .tar.gz and one .whl")
    return archives[0], wheels[0]


def wrong_metadata(archive: Path, wheel: Path, version: str) -> list[str]:
    """What the two files say of themselves, where it is not `version`, and classifiers that an index refuses."""
    found = []
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [name for name in opened.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = HeaderParser().parsestr(opened.read(name).decode())
        package = version_of(opened.read("r1kernels/__init__.py").decode())
    with tarfile.open(archive) as opened:
        name = f"{archive.name.removesuffix('.tar.gz')}/PKG-INFO"
        member = opened.extractfile(name)
        assert member is not None, f"{archive.name} has no {name}"
        source = HeaderParser().parsestr(member.read().decode())
    for where, said in (
        (f"METADATA of {wheel.name}", metadata["Version"]), (f"__version__ in {wheel.name}", package),
        (f"the name of {wheel.name}", wheel.name.split("-")[1]), (f"PKG-INFO of {archive.name}", source["Version"]),
    ):
        if said != version:
            found.append(f"{where} has version {said}, expected {version}")
    unknown = set(metadata.get_all("Classifier", [])) - set(classifiers)
    return [*found, *(f"{name!r} is not a classifier that package indexes know" for name in sorted(unknown))]


def wrong_libraries(report: dict) -> list[str]:
    """What auditwheel's report says against the wheel: newer symbols than those of glibc 2.28, or foreign libraries."""
    found = []
    tag = re.fullmatch(r"manylinux_(\d+)_(\d+)_\w+", report["sym_tag"])
    if tag is None or (int(tag[1]), int(tag[2])) > OLDEST_GLIBC:
        found.append(f"the extension needs {report['sym_tag']}, expected manylinux_2_28 or older")
    if foreign := set(report["external_libs"]) - OF_TORCH:
        found.append(f"the extension needs {', '.join(sorted(foreign))}, expected only {', '.join(sorted(OF_TORCH))}")
    return found


def check(archive: Path, wheel: Path, version: str) -> list[str]:
    """All that is wrong with the two files. Prints what each tool says."""
    found = wrong_metadata(archive, wheel, version)
    for command in (
        ["twine", "check", "--strict", archive, wheel],
        ["check-wheel-contents", wheel],
        ["abi3audit", "--strict", "--summary", wheel],
        ["auditwheel", "show", wheel],
    ):
        print(f"\n$ {' '.join(getattr(part, 'name', part) for part in command)}", flush=True)
        if subprocess.run([BIN / command[0], *command[1:]]).returncode:
            found.append(f"{command[0]} refuses {wheel.name}, see above")
    shown = subprocess.run([BIN / "auditwheel", "show", "--json", wheel], capture_output=True, text=True, check=True)
    report = json.loads(shown.stdout)
    print(f"It says {report['overall_tag']} because {', '.join(report['external_libs'])} are not in the wheel: torch "
          f"brings them. All other symbols are those of {report['sym_tag']}.")
    return [*found, *wrong_libraries(report)]


def main() -> None:
    dist = Path(sys.argv[1]).resolve()
    if found := refusals(ROOT):
        sys.exit("\n".join(["No release is made:", *found]))
    for left in [*dist.glob("r1kernels-*.whl"), *dist.glob("r1kernels-*.tar.gz")]:
        left.unlink()
    subprocess.run(["make", "wheel", f"DIST={dist}", f"VENV={BIN.parent}"], cwd=ROOT, check=True)
    archive, wheel = built(dist)
    if found := check(archive, wheel, version_of((ROOT / "r1kernels" / "__init__.py").read_text(encoding="utf-8"))):
        sys.exit("\n".join(["These files should not be uploaded:", *found]))
    print()
    for path in (archive, wheel):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.stat().st_size:>9} bytes  {path.name}")


if __name__ == "__main__":
    main()

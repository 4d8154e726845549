"""`make release` refuses what should not be uploaded. The wheel itself is the subject of test_wheel.py."""

import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import release
import yaml

import r1kernels

ROOT = Path(__file__).resolve().parents[2]
VERSION = "1.2.3"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A committed tree that may be released."""
    (tmp_path / "r1kernels").mkdir()
    (tmp_path / "r1kernels" / "__init__.py").write_text(f'__version__ = "{VERSION}"  # and a comment\n')
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {VERSION} (2026-12-01)\n\n## 1.2.2\n")
    (tmp_path / "CITATION.cff").write_text(f"cff-version: 1.2.0\nversion: {VERSION}\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false", "-C", str(tmp_path)]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
        subprocess.run([*git, *command], check=True)
    return tmp_path


def test_a_committed_tree_may_be_released(tree: Path) -> None:
    assert release.refusals(tree) == []


@pytest.mark.parametrize("change", [("new.py", ""), ("CHANGELOG.md", f"## {VERSION}\nA new line.\n")])
def test_changes_that_are_not_committed_are_refused(tree: Path, change: tuple[str, str]) -> None:
    (tree / change[0]).write_text(change[1])
    (said,) = release.refusals(tree)
    assert change[0] in said


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CITATION.cff"])
def test_another_version_is_refused(tree: Path, name: str) -> None:
    (tree / name).write_text((tree / name).read_text().replace(VERSION, "1.2.30"))
    (said,) = [said for said in release.refusals(tree) if name in said and "not committed" not in said]
    assert VERSION in said and "1.2.30" in said


def files(folder: Path, *, wheel: str = VERSION, package: str = VERSION, archive: str = VERSION,
          classifier: str = "Typing :: Typed") -> tuple[Path, Path]:
    """A source distribution and a wheel with these versions in their metadata."""
    made = folder / f"r1kernels-{VERSION}.tar.gz", folder / f"r1kernels-{VERSION}-cp310-abi3-linux_x86_64.whl"
    text = f"Metadata-Version: 2.4\nVersion: {archive}\n".encode()
    member = tarfile.TarInfo(f"r1kernels-{VERSION}/PKG-INFO")
    member.size = len(text)
    with tarfile.open(made[0], "w:gz") as opened:
        opened.addfile(member, io.BytesIO(text))
    with zipfile.ZipFile(made[1], "w") as opened:
        metadata = f"Metadata-Version: 2.4\nVersion: {wheel}\nClassifier: {classifier}\n"
        opened.writestr(f"r1kernels-{VERSION}.dist-info/METADATA", metadata)
        opened.writestr("r1kernels/__init__.py", f'__version__ = "{package}"\n')
    return made


def test_files_of_one_version_are_fine(tmp_path: Path) -> None:
    assert release.wrong_metadata(*files(tmp_path), VERSION) == []


@pytest.mark.parametrize("part", ["wheel", "package", "archive"])
def test_a_file_with_another_version_is_refused(tmp_path: Path, part: str) -> None:
    (said,) = release.wrong_metadata(*files(tmp_path, **{part: "1.2.4"}), VERSION)
    assert "1.2.4" in said and VERSION in said


def test_a_classifier_that_no_index_knows_is_refused(tmp_path: Path) -> None:
    (said,) = release.wrong_metadata(*files(tmp_path, classifier="Typing :: Typd"), VERSION)
    assert "Typing :: Typd" in said


def test_nothing_else_may_be_in_the_folder(tmp_path: Path) -> None:
    expected = files(tmp_path)
    assert release.built(tmp_path) == expected
    (tmp_path / "r1kernels-1.2.2.tar.gz").touch()
    with pytest.raises(ValueError, match=r"r1kernels-1\.2\.2\.tar\.gz"):
        release.built(tmp_path)


@pytest.mark.parametrize("change, named", [
    ({"sym_tag": "manylinux_2_34_x86_64"}, "manylinux_2_34"),
    ({"sym_tag": "linux_x86_64"}, "linux_x86_64"),
    ({"external_libs": {"libtorch.so": None, "libcudart.so.13": None}}, "libcudart.so.13"),
])
def test_newer_symbols_and_foreign_libraries_are_refused(change: dict, named: str) -> None:
    fine = {"sym_tag": "manylinux_2_27_x86_64", "external_libs": {"libtorch.so": None, "libc10.so": None}}
    assert release.wrong_libraries(fine) == []
    (said,) = release.wrong_libraries(fine | change)
    assert named in said


def test_the_version_is_in_one_place_only() -> None:
    """setuptools, `make release` and the package read the same line; the citation repeats it."""
    assert release.version_of((ROOT / "r1kernels" / "__init__.py").read_text()) == r1kernels.__version__
    assert '\nversion = "' not in (ROOT / "pyproject.toml").read_text()
    assert f"\nversion: {r1kernels.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def wrong_citation(text: str) -> list[str]:
    """What the format of citations (Citation File Format 1.2.0) requires, and this text does not have."""
    found = yaml.safe_load(text)
    wrong = [key for key in ("cff-version", "message", "title", "authors") if not found.get(key)]
    wrong += ["cff-version"] if found.get("cff-version") not in (None, "1.2.0") else []
    return wrong + [f"authors: {author}" for author in found.get("authors") or ()
                    if not {"name", "family-names", "given-names", "alias"} & set(author)]


def test_the_citation_has_what_its_format_requires() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert wrong_citation(text) == []
    for key in ("cff-version", "message", "title", "authors"):
        without = {name: value for name, value in yaml.safe_load(text).items() if name != key}
        assert wrong_citation(yaml.safe_dump(without)) == [key]
    assert wrong_citation(text.replace("cff-version: 1.2.0", "cff-version: 1")) == ["cff-version"]
    assert wrong_citation(text.replace("- name: The", "- nickname: The"))

"""The list of mutants of benchmarks/mutation.py fits the code, and the script tells a killed one from a survivor."""

from collections import Counter
from pathlib import Path

import mutants
import pytest
from backends import host_code

pytestmark = host_code
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in mutants.MUTANTS}))
def test_what_a_mutant_replaces_is_there_once(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    wrong = {m.old: text.count(m.old) for m in mutants.MUTANTS if m.file == file and text.count(m.old) != 1}
    assert not wrong, f"{file}: adapt benchmarks/mutants.py"


def test_mutants_differ_and_name_tests_that_exist() -> None:
    assert not [key for key, n in Counter((m.file, m.new) for m in mutants.MUTANTS).items() if n > 1 and key[1]]
    assert not [m.what for m in mutants.MUTANTS if m.old == m.new]
    paths = {test.partition("::")[0] for m in mutants.MUTANTS for test in m.tests}
    assert not [path for path in paths if not (ROOT / path).exists()]
    for name in ("r1kernels/ops/", "csrc/", "r1kernels/triton/"):
        assert len([m for m in mutants.MUTANTS if m.file.startswith(name)]) >= 12, name
